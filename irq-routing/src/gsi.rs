// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! GSI numbers, and who has which.
//!
//! A global system interrupt is an index into KVM's routing table, nothing more: what it means is
//! what the table says. [`GsiPool`] is the set of numbers in use; it knows neither table nor VM.
//! The handles that give a number back when they are dropped are in [`crate::routing`].

#![forbid(unsafe_code)]

use std::fmt;
use std::ops::Range;

/// The number of a global system interrupt: an index into the VM's routing table.
///
/// On x86 the numbers below 24 are the IOAPIC's pins (and those below 16 the two PICs' as well) in
/// the default table; what lies above has no meaning until a route gives it one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

impl fmt::Display for Gsi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GSI {}", self.0)
    }
}

const BITS: u32 = u64::BITS;

/// Which GSIs below a limit are taken: a bitmap, lowest number first.
///
/// Low numbers first, because KVM sizes its table by the highest number that it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GsiPool {
    // Grows as numbers are taken: a VM with a serial port alone pays one word for it.
    words: Vec<u64>,
    limit: u32,
}

impl GsiPool {
    /// An empty pool of the GSIs `0..limit`.
    pub fn new(limit: u32) -> Self {
        Self {
            words: Vec::new(),
            limit,
        }
    }

    /// How many GSIs the VM can have at most; every number is below it.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Whether somebody has this GSI.
    pub fn is_taken(&self, gsi: Gsi) -> bool {
        self.word(gsi.0 / BITS) & (1 << (gsi.0 % BITS)) != 0
    }

    /// Takes one number; false, and nothing happens, when it is taken already or not below the
    /// limit.
    pub fn take(&mut self, gsi: Gsi) -> bool {
        if gsi.0 >= self.limit || self.is_taken(gsi) {
            return false;
        }
        let index = (gsi.0 / BITS) as usize;
        if self.words.len() <= index {
            self.words.resize(index + 1, 0);
        }
        if let Some(word) = self.words.get_mut(index) {
            *word |= 1 << (gsi.0 % BITS);
        }
        true
    }

    /// Takes the lowest free number of a range, as far as the range lies below the limit.
    pub fn take_lowest(&mut self, range: Range<u32>) -> Option<Gsi> {
        let end = range.end.min(self.limit);
        let mut next = range.start;
        while next < end {
            // Bits below `next` count as taken, so the first zero is the lowest free one of this
            // word.
            let taken = self.word(next / BITS) | ((1u64 << (next % BITS)) - 1);
            let free = next / BITS * BITS + taken.trailing_ones();
            if taken != u64::MAX {
                let gsi = Gsi(free);
                return (free < end && self.take(gsi)).then_some(gsi);
            }
            next = free;
        }
        None
    }

    /// Gives a number back; false when nobody had it.
    pub fn free(&mut self, gsi: Gsi) -> bool {
        let was_taken = self.is_taken(gsi);
        if let Some(word) = self.words.get_mut((gsi.0 / BITS) as usize) {
            *word &= !(1 << (gsi.0 % BITS));
        }
        was_taken
    }

    fn word(&self, index: u32) -> u64 {
        self.words.get(index as usize).copied().unwrap_or(0)
    }
}
