// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What two lists of leaves differ in, by the names of their features.

use std::collections::BTreeSet;
use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

use super::features::bit_names;
use super::leaves::{Register, Word};
use super::template::holds_features;

/// A register that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which.
    pub word: Word,
    /// Its value on the host.
    pub host: u32,
    /// Its value for the guest.
    pub guest: u32,
}

impl Difference {
    /// Whether its bits stand for features. Otherwise it holds numbers, and the two values are what there
    /// is to say.
    #[must_use]
    pub fn is_features(&self) -> bool {
        holds_features(self.word)
    }

    /// The features that the guest has and the host has not.
    #[must_use]
    pub fn added(&self) -> Vec<String> {
        self.names(self.guest & !self.host)
    }

    /// The features that the host has and the guest has not.
    #[must_use]
    pub fn removed(&self) -> Vec<String> {
        self.names(self.host & !self.guest)
    }

    fn names(&self, mask: u32) -> Vec<String> {
        if self.is_features() {
            bit_names(self.word, mask)
        } else {
            Vec::new()
        }
    }
}

/// `0x7.0 ebx: -avx2 -bmi1 +erms`, or `0x1.0 eax: 0xc06f2 -> 0x306f0` where it holds numbers.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.word)?;
        if !self.is_features() {
            return write!(f, " {:#x} -> {:#x}", self.host, self.guest);
        }
        for (sign, names) in [('-', self.removed()), ('+', self.added())] {
            for name in names {
                write!(f, " {sign}{name}")?;
            }
        }
        Ok(())
    }
}

/// Every register in which two lists differ, by leaf, subleaf and register. A leaf that a list does not
/// have reads as 0.
#[must_use]
pub fn differences(host: &[kvm_cpuid_entry2], guest: &[kvm_cpuid_entry2]) -> Vec<Difference> {
    let both = host.iter().chain(guest);
    let places: BTreeSet<_> = both.map(|leaf| (leaf.function, leaf.index)).collect();
    let words = places.into_iter().flat_map(|(leaf, subleaf)| {
        Register::ALL.map(|register| Word::new(leaf, subleaf, register))
    });
    words
        .map(|word| Difference {
            word,
            host: word.of(host),
            guest: word.of(guest),
        })
        .filter(|difference| difference.host != difference.guest)
        .collect()
}
