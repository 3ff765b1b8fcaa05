// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Prints what `KVM_GET_SUPPORTED_CPUID` says here, one leaf a line, in the form of `tests/fixtures/`:
//! leaf, subleaf, flags, EAX, EBX, ECX, EDX, all hexadecimal.

use std::error::Error;
use std::process::ExitCode;

fn run() -> Result<(), Box<dyn Error>> {
    for leaf in kvm_core::Kvm::open()?.supported_cpuid()?.as_slice() {
        println!(
            "{:08x} {:x} {:x} {:08x} {:08x} {:08x} {:08x}",
            leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supported_cpuid: {error}");
            ExitCode::FAILURE
        }
    }
}
