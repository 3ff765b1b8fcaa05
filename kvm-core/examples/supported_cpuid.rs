// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Prints what `KVM_GET_SUPPORTED_CPUID` says here, one leaf a line, in the form of `tests/fixtures/`:
//! leaf, subleaf, flags, EAX, EBX, ECX, EDX, all hexadecimal.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for leaf in kvm_core::Kvm::open()?.supported_cpuid()?.as_slice() {
        println!(
            "{:08x} {:x} {:x} {:08x} {:08x} {:08x} {:08x}",
            leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx
        );
    }
    Ok(())
}
