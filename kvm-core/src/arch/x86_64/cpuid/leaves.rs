// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leaves, subleaves and registers: how a place in CPUID is named, found and written.

use std::fmt;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "with-serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "lowercase")
)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// All four, in the order of CPUID's documentation.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    /// Its value in a leaf.
    #[must_use]
    pub const fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }

    pub(super) const fn of_mut(self, leaf: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut leaf.eax,
            Self::Ebx => &mut leaf.ebx,
            Self::Ecx => &mut leaf.ecx,
            Self::Edx => &mut leaf.edx,
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        })
    }
}

/// One register of one subleaf: 32 bits of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word {
    /// The leaf: EAX of the question.
    pub leaf: u32,
    /// The subleaf: ECX of the question; 0 where the leaf has none.
    pub subleaf: u32,
    /// The register.
    pub register: Register,
}

impl Word {
    /// This word.
    #[must_use]
    pub const fn new(leaf: u32, subleaf: u32, register: Register) -> Self {
        Self {
            leaf,
            subleaf,
            register,
        }
    }

    /// Its value; 0 where the list does not have its leaf, which is what a guest would read.
    #[must_use]
    pub fn of(self, leaves: &[kvm_cpuid_entry2]) -> u32 {
        subleaf(leaves, self.leaf, self.subleaf).map_or(0, |leaf| self.register.of(leaf))
    }
}

/// `0x7.0 ebx`: leaf, subleaf, register.
impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}.{} {}", self.leaf, self.subleaf, self.register)
    }
}

/// Who made the processor, as far as leaves differ by it (leaf 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// "GenuineIntel".
    Intel,
    /// "AuthenticAMD", and "HygonGenuine", which has AMD's leaves.
    Amd,
    /// Another one. Such a processor gets the leaves that all have.
    Other,
}

impl Vendor {
    /// The vendor in leaf 0.
    #[must_use]
    pub fn of(leaves: &[kvm_cpuid_entry2]) -> Self {
        match &vendor_bytes(leaves) {
            b"GenuineIntel" => Self::Intel,
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            _ => Self::Other,
        }
    }
}

/// Leaf 0's name of the vendor: EBX, EDX, ECX.
fn vendor_bytes(leaves: &[kvm_cpuid_entry2]) -> [u8; 12] {
    let mut name = [0; 12];
    if let Some(leaf) = find(leaves, 0) {
        for (i, word) in [leaf.ebx, leaf.edx, leaf.ecx].into_iter().enumerate() {
            name[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
    name
}

/// Leaf 0's name of the vendor, to be shown: bytes that are no ASCII are escaped.
#[must_use]
pub fn vendor_name(leaves: &[kvm_cpuid_entry2]) -> String {
    vendor_bytes(leaves).escape_ascii().to_string()
}

/// Family, model and stepping (leaf 1), as they are spoken of: with their extensions added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The family.
    pub family: u32,
    /// The model.
    pub model: u32,
    /// The stepping.
    pub stepping: u32,
}

impl Signature {
    /// The signature in leaf 1.
    #[must_use]
    pub fn of(leaves: &[kvm_cpuid_entry2]) -> Self {
        let eax = Word::new(1, 0, Register::Eax).of(leaves);
        let base = eax >> 8 & 0xf;
        let (family, extended) = match base {
            0xf => (base + (eax >> 20 & 0xff), true),
            _ => (base, base == 6),
        };
        let high = if extended { eax >> 16 & 0xf } else { 0 };
        Self {
            family,
            model: high << 4 | eax >> 4 & 0xf,
            stepping: eax & 0xf,
        }
    }
}

/// Subleaf 0 of a leaf.
pub(in crate::arch::x86_64) fn find(
    leaves: &[kvm_cpuid_entry2],
    function: u32,
) -> Option<&kvm_cpuid_entry2> {
    subleaf(leaves, function, 0)
}

pub(super) fn subleaf(
    leaves: &[kvm_cpuid_entry2],
    function: u32,
    index: u32,
) -> Option<&kvm_cpuid_entry2> {
    leaves
        .iter()
        .find(|leaf| leaf.function == function && leaf.index == index)
}

/// The leaf of this place, made of zeros where the list does not have it.
pub(super) fn subleaf_mut(
    leaves: &mut Vec<kvm_cpuid_entry2>,
    function: u32,
    index: u32,
) -> &mut kvm_cpuid_entry2 {
    let at = leaves
        .iter()
        .position(|leaf| leaf.function == function && leaf.index == index);
    let at = at.unwrap_or_else(|| {
        leaves.push(zeros(function, index));
        leaves.len() - 1
    });
    &mut leaves[at]
}

/// An empty leaf. KVM compares the subleaf only where it is told that the leaf has several.
pub(super) fn zeros(function: u32, index: u32) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        flags: if index > 0 || has_subleaves(function) {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        } else {
            0
        },
        ..Default::default()
    }
}

/// Leaves whose answer depends on ECX: KVM's own list (`cpuid_function_is_indexed`).
const fn has_subleaves(function: u32) -> bool {
    matches!(
        function,
        4 | 7
            | 0xb
            | 0xd
            | 0xf
            | 0x10
            | 0x12
            | 0x14
            | 0x17
            | 0x18
            | 0x1d
            | 0x1e
            | 0x1f
            | 0x20
            | 0x23
            | 0x24
            | 0x8000_001d
            | 0x8000_0026
    )
}

pub(super) fn set_to(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}
