// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SlotExtent`]: which slot, which guest pages, which host pages. The one thing that other crates need of a slot.

use crate::ids::IdClaim;
use crate::{Gfn, Hva, PAGE_SHIFT, PAGE_SIZE, SlotId};
use std::hash::{Hash, Hasher};
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;
use vm_memory::GuestAddress;

/// The extent of an installed slot: its id, its guest range and its host range, which have one size.
///
/// It is what makes a call sound whose buffer size KVM derives from the slot (`KVM_GET_DIRTY_LOG` writes one bit for
/// each page that *KVM's* slot has): who has an extent knows that size. So that this stays true, the id of a slot that
/// [`Memslots`](crate::Memslots) made is not given to another slot while a clone of its extent exists. The extent keeps
/// neither the slot nor its memory alive: a call on a slot that is deleted by then fails (ENOENT), and no more.
#[derive(Clone, Debug)]
pub struct SlotExtent {
    id: SlotId,
    start: GuestAddress,
    pages: NonZeroU64,
    host: Hva,
    /// `None` for slots that someone else manages.
    claim: Option<Arc<IdClaim>>,
}

/// Why these numbers are no slot's.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExtentError {
    /// The size is zero.
    #[error("a slot of size 0")]
    Empty,
    /// An address or the size is not a multiple of [`PAGE_SIZE`].
    #[error("{what} {value:#x} is not a multiple of the page size {PAGE_SIZE:#x}")]
    Unaligned {
        /// Which of the numbers.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A range ends beyond its address space.
    #[error("{size:#x} bytes from {what} {start:#x} wrap around the end of the address space")]
    Wraps {
        /// Which of the addresses.
        what: &'static str,
        /// Its value.
        start: u64,
        /// The size, in bytes.
        size: u64,
    },
}

impl SlotExtent {
    /// The extent of a slot that someone else manages: `size` bytes (a multiple of [`PAGE_SIZE`]) at `start`, backed by
    /// the host memory at `host`.
    ///
    /// Slots of [`Memslots`](crate::Memslots) have theirs from [`Slot::extent`](crate::Slot::extent), without `unsafe`.
    ///
    /// # Errors
    /// [`ExtentError`], if the numbers can be no slot's.
    ///
    /// # Safety
    /// For as long as this or a clone of it exists, the slot `id`, of the VM with which it is used, is one of exactly
    /// `size` bytes, or does not exist.
    pub unsafe fn new(
        id: SlotId,
        start: GuestAddress,
        size: u64,
        host: Hva,
    ) -> Result<Self, ExtentError> {
        Self::checked(id, start, size, host, None)
    }

    /// The extent of a slot whose id is claimed.
    pub(crate) fn claimed(
        claim: Arc<IdClaim>,
        start: GuestAddress,
        size: u64,
        host: Hva,
    ) -> Result<Self, ExtentError> {
        Self::checked(claim.id(), start, size, host, Some(claim))
    }

    fn checked(
        id: SlotId,
        start: GuestAddress,
        size: u64,
        host: Hva,
        claim: Option<Arc<IdClaim>>,
    ) -> Result<Self, ExtentError> {
        let Some(pages) = NonZeroU64::new(size >> PAGE_SHIFT) else {
            return Err(if size == 0 {
                ExtentError::Empty
            } else {
                ExtentError::Unaligned {
                    what: "size",
                    value: size,
                }
            });
        };
        for (what, value) in [
            ("size", size),
            ("guest address", start.0),
            ("host address", host.0 as u64),
        ] {
            if !value.is_multiple_of(PAGE_SIZE) {
                return Err(ExtentError::Unaligned { what, value });
            }
        }
        for (what, from) in [("guest address", start.0), ("host address", host.0 as u64)] {
            if from.checked_add(size).is_none() {
                return Err(ExtentError::Wraps {
                    what,
                    start: from,
                    size,
                });
            }
        }
        Ok(Self {
            id,
            start,
            pages,
            host,
            claim,
        })
    }

    /// The same slot at another guest address.
    pub(crate) fn moved_to(&self, start: GuestAddress) -> Result<Self, ExtentError> {
        Self::checked(self.id, start, self.size(), self.host, self.claim.clone())
    }

    /// The slot's number.
    pub const fn id(&self) -> SlotId {
        self.id
    }

    /// The guest physical address of the first byte.
    pub const fn start(&self) -> GuestAddress {
        self.start
    }

    /// The first guest frame.
    pub const fn first_gfn(&self) -> Gfn {
        Gfn::containing(self.start)
    }

    /// The number of pages, at least 1.
    pub const fn pages(&self) -> u64 {
        self.pages.get()
    }

    /// The size in bytes, a multiple of [`PAGE_SIZE`].
    pub const fn size(&self) -> u64 {
        self.pages.get() << PAGE_SHIFT
    }

    /// The guest physical addresses.
    pub const fn guest_range(&self) -> Range<u64> {
        self.start.0..self.start.0 + self.size()
    }

    /// The host virtual address of the first byte.
    pub const fn host_start(&self) -> Hva {
        self.host
    }

    /// The host virtual addresses.
    pub const fn host_range(&self) -> Range<usize> {
        self.host.0..self.host.0 + self.size() as usize
    }

    /// Whether the guest address lies in the slot.
    pub const fn contains(&self, address: GuestAddress) -> bool {
        address.0.wrapping_sub(self.start.0) < self.size()
    }

    /// Where the guest address lies in this process; `None` outside the slot (`gfn_to_hva_memslot`).
    pub const fn hva(&self, address: GuestAddress) -> Option<Hva> {
        if self.contains(address) {
            Some(Hva(self.host.0 + (address.0 - self.start.0) as usize))
        } else {
            None
        }
    }

    /// Which guest address the host address is; `None` outside the slot (`hva_to_gfn_memslot`).
    pub const fn guest_address(&self, host: Hva) -> Option<GuestAddress> {
        let offset = host.0.wrapping_sub(self.host.0) as u64;
        if offset < self.size() {
            Some(GuestAddress(self.start.0 + offset))
        } else {
            None
        }
    }

    /// The frame of the slot's `index`th page (the meaning of bit `index` in its dirty bitmap); `None` beyond its end.
    pub const fn gfn(&self, index: u64) -> Option<Gfn> {
        if index < self.pages.get() {
            Some(Gfn(self.first_gfn().0 + index))
        } else {
            None
        }
    }

    /// The index within the slot of a frame (its bit in the dirty bitmap); `None` outside the slot.
    pub const fn page_index(&self, gfn: Gfn) -> Option<u64> {
        let index = gfn.0.wrapping_sub(self.first_gfn().0);
        if index < self.pages.get() {
            Some(index)
        } else {
            None
        }
    }
}

/// By value: the same slot in the same place.
impl PartialEq for SlotExtent {
    fn eq(&self, other: &Self) -> bool {
        (self.id, self.start, self.pages, self.host)
            == (other.id, other.start, other.pages, other.host)
    }
}

impl Eq for SlotExtent {}

impl Hash for SlotExtent {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.id, self.start.0, self.pages, self.host).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, size: u64, host: usize) -> Result<SlotExtent, ExtentError> {
        // SAFETY: used with no VM at all.
        unsafe { SlotExtent::new(SlotId(3), GuestAddress(start), size, Hva(host)) }
    }

    #[test]
    fn both_ways_of_the_translation_agree_and_end_at_the_ends() {
        let e = extent(0x10_0000, 0x3000, 0x7000_0000).unwrap();
        assert_eq!(
            (e.pages(), e.size(), e.first_gfn()),
            (3, 0x3000, Gfn(0x100))
        );
        assert_eq!(e.hva(GuestAddress(0x10_2fff)), Some(Hva(0x7000_2fff)));
        assert_eq!(
            e.guest_address(Hva(0x7000_2fff)),
            Some(GuestAddress(0x10_2fff))
        );
        assert_eq!(
            (
                e.hva(GuestAddress(0x10_3000)),
                e.hva(GuestAddress(0xf_ffff))
            ),
            (None, None)
        );
        assert_eq!(
            (
                e.guest_address(Hva(0x7000_3000)),
                e.guest_address(Hva(0x6fff_ffff))
            ),
            (None, None)
        );
        assert_eq!((e.gfn(2), e.gfn(3)), (Some(Gfn(0x102)), None));
        assert_eq!(
            (
                e.page_index(Gfn(0x102)),
                e.page_index(Gfn(0x103)),
                e.page_index(Gfn(0xff))
            ),
            (Some(2), None, None)
        );
    }

    #[test]
    fn numbers_that_are_no_slot_are_refused_with_their_values() {
        assert_eq!(extent(0, 0, 0x1000), Err(ExtentError::Empty));
        assert_eq!(
            extent(0, 7, 0x1000),
            Err(ExtentError::Unaligned {
                what: "size",
                value: 7
            })
        );
        assert_eq!(
            extent(0, 0x1001, 0x1000),
            Err(ExtentError::Unaligned {
                what: "size",
                value: 0x1001
            })
        );
        assert_eq!(
            extent(1, 0x1000, 0x1000),
            Err(ExtentError::Unaligned {
                what: "guest address",
                value: 1
            })
        );
        assert_eq!(
            extent(0, 0x1000, 0x1008),
            Err(ExtentError::Unaligned {
                what: "host address",
                value: 0x1008
            })
        );
        let top = !0xfffu64;
        assert_eq!(
            extent(top, 0x1000, 0x1000),
            Err(ExtentError::Wraps {
                what: "guest address",
                start: top,
                size: 0x1000
            })
        );
        assert!(extent(0x1000, 0x1000, top as usize).is_err());
    }
}
