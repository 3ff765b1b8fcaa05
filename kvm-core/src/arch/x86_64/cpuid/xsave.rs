// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What follows when a feature goes: its part of the extended state (leaf 0xd), and leaves that are its
//! own. A guest that reads of a state without its instructions would switch it on and save it for
//! nothing, or refuse to start.

use kvm_bindings::kvm_cpuid_entry2;

use super::features::feature;
use super::leaves::{Register, Word, subleaf, subleaf_mut};

/// FXSAVE's 512 bytes and XSAVE's header.
const LEGACY_BYTES: u32 = 576;

/// The features whose state has a component of its own (Intel SDM volume 1, 13.1), with their bits of
/// XCR0 and of `IA32_XSS` together.
const COMPONENTS: &[(&str, u32)] = &[
    ("avx", 1 << 2),
    ("mpx", 1 << 3 | 1 << 4),
    ("avx512f", 1 << 5 | 1 << 6 | 1 << 7),
    ("intel_pt", 1 << 8),
    ("pku", 1 << 9),
    ("user_shstk", 1 << 11 | 1 << 12),
    ("uintr", 1 << 14),
    ("arch_lbr", 1 << 15),
    ("hwp", 1 << 16),
    ("amx_tile", 1 << 17 | 1 << 18),
];
/// APX has a component and no name here yet: leaf 7 subleaf 1 EDX bit 21.
const APX: (Word, u32, u32) = (Word::new(7, 1, Register::Edx), 1 << 21, 1 << 19);

/// Leaves that describe one feature.
const OF_ONE_FEATURE: &[(u32, &str)] = &[
    (0x14, "intel_pt"),
    (0x1d, "amx_tile"),
    (0x1e, "amx_tile"),
    (0x24, "avx10"),
];

/// Takes away what belongs to features that the host has and the list has not. (What of this kind the host
/// itself lists without the feature stays as it is: a software KVM does that.)
pub(super) fn follow(host: &[kvm_cpuid_entry2], leaves: &mut Vec<kvm_cpuid_entry2>) {
    let lost = |leaves: &[_], name| {
        feature(name).is_some_and(|f| f.word.of(host) & !f.word.of(leaves) & f.mask() != 0)
    };
    for (leaf, name) in OF_ONE_FEATURE {
        if lost(leaves, name) {
            leaves.retain(|entry| entry.function != *leaf);
        }
    }
    if lost(leaves, "xsave") {
        leaves.retain(|entry| entry.function != 0xd);
        return;
    }
    if subleaf(leaves, 0xd, 0).is_none() {
        return;
    }
    let mut gone = COMPONENTS
        .iter()
        .filter(|(name, _)| lost(leaves, name))
        .fold(0, |mask, (_, bits)| mask | bits);
    if APX.0.of(host) & !APX.0.of(leaves) & APX.1 != 0 {
        gone |= APX.2;
    }
    if gone == 0 {
        return;
    }
    let xcr0 = Word::new(0xd, 0, Register::Eax).of(leaves) & !gone;
    let xss = Word::new(0xd, 1, Register::Ecx).of(leaves) & !gone;
    leaves.retain(|leaf| {
        let component = leaf.function == 0xd && (2..32).contains(&leaf.index);
        !component || (xcr0 | xss) & 1 << leaf.index != 0
    });
    // The standard form has each component at its own place, whatever lies between.
    let end = leaves
        .iter()
        .filter(|leaf| leaf.function == 0xd && (2..32).contains(&leaf.index))
        .filter(|leaf| xcr0 & 1 << leaf.index != 0)
        .map(|leaf| leaf.ebx.saturating_add(leaf.eax))
        .fold(LEGACY_BYTES, u32::max);
    let main = subleaf_mut(leaves, 0xd, 0);
    (main.eax, main.ecx) = (xcr0, end);
    // Of what is switched on now; KVM keeps it true while the guest runs.
    main.ebx = main.ebx.min(end);
    if subleaf(leaves, 0xd, 1).is_some() {
        subleaf_mut(leaves, 0xd, 1).ecx = xss;
    }
}
