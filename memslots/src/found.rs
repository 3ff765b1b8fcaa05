// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Found`]: an address that a table has, as an offset into a slot, and the memory there.

use crate::ordered::Hit;
use crate::region::Entry;
use crate::{Hva, Region, Translation};
use std::sync::Arc;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::{BS, Bitmap};

/// Made by [`SlotTable::lookup`](crate::SlotTable) alone.
pub(crate) struct Found<'a, B> {
    pub(crate) hit: Hit<'a, Entry, Arc<Region<B>>>,
    pub(crate) entry: Entry,
    /// From the slot's start, and below its size.
    pub(crate) offset: u64,
}

impl<'a, B> Found<'a, B> {
    /// The slot. Always there.
    #[inline(always)]
    pub(crate) fn region(&self) -> Option<&'a Arc<Region<B>>> {
        self.hit.cold()
    }

    #[inline(always)]
    pub(crate) const fn contiguous(&self) -> u64 {
        self.entry.size() - self.offset
    }

    #[inline(always)]
    pub(crate) const fn translation(&self) -> Translation {
        Translation {
            slot: self.entry.id(),
            host: Hva(self.entry.host() + self.offset as usize),
            writable: !self.entry.is_read_only(),
            contiguous: self.contiguous(),
        }
    }
}

impl<'a, B: Bitmap> Found<'a, B> {
    /// The memory from here on, no more than `most` bytes and no more than the slot has.
    #[inline(always)]
    pub(crate) fn slice(&self, most: usize) -> Option<VolatileSlice<'a, BS<'a, B>>> {
        let count = usize::try_from(self.contiguous()).map_or(most, |here| here.min(most));
        let start = (self.entry.host() + self.offset as usize) as *mut u8;
        let bitmap = self.region()?.bitmap_at(self.offset as usize);
        // SAFETY: the entry is that of a region of the table, which keeps the region, and so the mapping, for `'a`;
        // `offset + count` is at most its size. Whoever else uses this memory is the guest or another volatile slice.
        Some(unsafe { VolatileSlice::with_bitmap(start, count, bitmap, None) })
    }
}
