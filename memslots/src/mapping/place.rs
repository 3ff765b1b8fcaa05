// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where in the process a mapping goes: how much address space it wants, and where in that the memory starts.
//!
//! ```text
//!   base                  start                            start + size            base + length
//!    │ guard │   slack    │             memory             │   slack   │ guard │
//! ```
//! The slack lets the memory lie in the host as it lies in the guest, relative to the huge page: a huge page serves the
//! host's translation and the guest's together only if both addresses are congruent.

use super::MapError;
use crate::PAGE_SIZE;

/// The size of a transparent huge page on x86-64.
pub(super) const HUGE: u64 = 2 << 20;

/// The address space for one mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// What to reserve, in bytes.
    pub length: usize,
    /// The memory itself, in bytes.
    pub size: usize,
    /// Untouchable bytes before and behind.
    guard: usize,
    /// The memory starts congruent to `phase` modulo this.
    align: usize,
    phase: usize,
}

impl Place {
    /// For `size` bytes of pages of `page_size`, which the guest sees at `guest`.
    pub fn new(size: u64, page_size: u64, guest: u64, guarded: bool) -> Result<Self, MapError> {
        let too_large = MapError::TooLarge { size };
        let (align, phase) = if page_size > PAGE_SIZE {
            // The kernel takes hugetlb mappings at multiples of the page only.
            (page_size, 0)
        } else if size >= HUGE {
            (HUGE, guest % HUGE)
        } else {
            (PAGE_SIZE, 0)
        };
        let guard = if guarded { PAGE_SIZE } else { 0 };
        let slack = align - PAGE_SIZE;
        let length = size
            .checked_add(slack)
            .and_then(|length| length.checked_add(2 * guard))
            .filter(|length| *length <= isize::MAX as u64);
        let Some(length) = length else {
            return Err(too_large);
        };
        Ok(Self {
            length: length as usize,
            size: size as usize,
            guard: guard as usize,
            align: align as usize,
            phase: phase as usize,
        })
    }

    /// How far behind `base`, a multiple of the page size, the memory starts.
    pub const fn shift(&self, base: usize) -> usize {
        let first = base.wrapping_add(self.guard);
        self.guard + (self.phase.wrapping_sub(first) & (self.align - 1))
    }

    /// Whether the memory is all of what is reserved, wherever that lies.
    pub const fn is_exact(&self) -> bool {
        self.length == self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_memory_lies_within_in_the_guests_phase_and_between_the_guards(
            pages in 1u64..5000,
            huge in prop_oneof![Just(PAGE_SIZE), Just(HUGE), Just(1u64 << 30)],
            guest in (0u64..1 << 40).prop_map(|page| page * PAGE_SIZE),
            base in (16usize..1 << 35).prop_map(|page| page * PAGE_SIZE as usize),
            guarded: bool,
        ) {
            let size = pages * huge;
            let place = Place::new(size, huge, guest, guarded).unwrap();
            let shift = place.shift(base);
            let guard = if guarded { PAGE_SIZE as usize } else { 0 };
            prop_assert!(shift >= guard);
            prop_assert!(shift + place.size + guard <= place.length);
            let start = (base + shift) as u64;
            prop_assert_eq!(start % huge, 0);
            if huge == PAGE_SIZE && size >= HUGE {
                prop_assert_eq!(start % HUGE, guest % HUGE);
            }
            prop_assert_eq!(place.is_exact(), huge == PAGE_SIZE && size < HUGE && !guarded);
        }
    }

    #[test]
    fn a_size_beyond_the_address_space_is_refused() {
        for size in [!0xfff, i64::MAX as u64 & !0xfff] {
            assert_eq!(
                Place::new(size, PAGE_SIZE, 0, true),
                Err(MapError::TooLarge { size })
            );
        }
    }
}
