// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Real answers of `KVM_GET_SUPPORTED_CPUID`, kept as text: `examples/supported_cpuid.rs` prints more.
#![allow(dead_code)]

use kvm_bindings::kvm_cpuid_entry2;

/// An Intel processor under the software KVM, which leaves out most instructions.
pub fn intel() -> Vec<kvm_cpuid_entry2> {
    parse(include_str!("../fixtures/intel_software_kvm.txt"))
}

/// QEMU's AMD processor under kvm_amd, in the lab.
pub fn amd() -> Vec<kvm_cpuid_entry2> {
    parse(include_str!("../fixtures/amd_lab.txt"))
}

fn parse(text: &str) -> Vec<kvm_cpuid_entry2> {
    let leaf = |line: &str| {
        let words: Vec<_> = line
            .split_whitespace()
            .map(|word| u32::from_str_radix(word, 16).unwrap())
            .collect();
        let [function, index, flags, eax, ebx, ecx, edx] = words[..] else {
            panic!("{line:?}");
        };
        kvm_cpuid_entry2 {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    };
    text.lines().map(leaf).collect()
}

pub fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    *leaves
        .iter()
        .find(|leaf| (leaf.function, leaf.index) == (function, index))
        .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
}
