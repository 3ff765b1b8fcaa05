// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translations that are kept: [`HvaCache`], one range of guest memory that is accessed again and again
//! (`gfn_to_hva_cache`), and [`SlotHint`], the slot that a thread asked about last.
//!
//! Both are plain numbers and keep nothing alive: a vCPU thread has them across `KVM_RUN`. They are good for nothing
//! without a table, and a table that is at hand keeps its memory mapped. What ties the two together is the table's
//! serial number, which no other table of the process has: the same number is the same table, so the same translation;
//! another one, and the address is looked up again. So a cache never goes stale, whatever happened meanwhile, and one
//! that meets another VM's table is only slow.

use crate::access::read_only;
use crate::{Hva, SlotBitmap, SlotId, SlotTable, Translation};
use std::ptr;
use std::sync::atomic::Ordering;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemoryError, GuestMemoryResult,
    VolatileMemory, VolatileSlice,
};

/// The serial number of no table.
const NONE: u64 = u64::MAX;

/// A range of guest memory whose translation is kept (`gfn_to_hva_cache`): a ring's index, a steal-time record, a
/// descriptor table.
///
/// Each access takes the table that it is for (a guard of [`Memslots::reader`](crate::Memslots::reader), or a
/// snapshot), and costs a comparison and a bounds check while that is the one of the access before. A range that no
/// slot has whole (it spans two, say) is looked up each time.
///
/// ```
/// use memslots::{Backing, HvaCache, Memslots, SlotFlags, fake::FakeHost};
/// use vm_memory::GuestAddress;
///
/// let memslots = Memslots::new(FakeHost::new(8));
/// let slot = memslots.create(GuestAddress(0), Backing::anonymous(0x1000), SlotFlags::NONE)?;
/// let mut reader = memslots.reader();
/// let mut record = HvaCache::new(GuestAddress(0x40), 16);
///
/// record.write_obj(&reader.enter(), 8, 0x1234u64)?; // at each exit
/// assert_eq!(record.read_obj::<u16>(&reader.enter(), 8)?, 0x1234);
/// drop(slot);
/// assert!(record.read_obj::<u16>(&reader.enter(), 8).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct HvaCache {
    address: GuestAddress,
    length: usize,
    /// Of the table that the rest is from; [`NONE`] if there is none whose answer could be kept.
    serial: u64,
    /// The whole range is in one slot; how far from its start.
    offset: usize,
    host: usize,
    /// The address of the slot's bitmap, whose type is the table's.
    bitmap: usize,
    read_only: bool,
}

impl HvaCache {
    /// The `length` bytes from `address`. Looks nothing up yet (the kernel's `kvm_gfn_to_hva_cache_init` does: use
    /// [`check`](Self::check)).
    pub const fn new(address: GuestAddress, length: usize) -> Self {
        Self {
            address,
            length,
            serial: NONE,
            offset: 0,
            host: 0,
            bitmap: 0,
            read_only: false,
        }
    }

    /// The first address of the range.
    pub const fn address(&self) -> GuestAddress {
        self.address
    }

    /// The length of the range in bytes.
    pub const fn length(&self) -> usize {
        self.length
    }

    /// Looks the range up in `table`, if that is not done already: whether it can be read (`kvm_gfn_to_hva_cache_init`).
    ///
    /// # Errors
    /// [`GuestMemoryError::InvalidGuestAddress`], with the first address that no slot has.
    pub fn check<B: SlotBitmap>(&mut self, table: &SlotTable<B>) -> GuestMemoryResult<()> {
        if self.is_current(table) {
            return Ok(());
        }
        let mut address = self.address;
        let mut left = self.length as u64;
        while left > 0 {
            let invalid = GuestMemoryError::InvalidGuestAddress(address);
            let Some(found) = table.translate(address) else {
                return Err(invalid);
            };
            let here = left.min(found.contiguous);
            left -= here;
            if left > 0 {
                address.0 = address.0.checked_add(here).ok_or(invalid)?;
            }
        }
        Ok(())
    }

    /// Where the range is in this process, and whether it may be written; `None` unless one slot has it whole. The
    /// address is good for as long as the table is at hand.
    #[inline]
    pub fn hva<B>(&mut self, table: &SlotTable<B>) -> Option<(Hva, bool)> {
        self.is_current(table)
            .then_some((Hva(self.host), !self.read_only))
    }

    /// The whole range as memory, to be read; `None` unless one slot has it whole.
    #[inline]
    pub fn slice<'a, B: Bitmap>(
        &mut self,
        table: &'a SlotTable<B>,
    ) -> Option<VolatileSlice<'a, BS<'a, B>>> {
        let length = self.length;
        self.part(table, 0, length, false).ok()?
    }

    /// Whether what is kept is from `table`, now that it was looked up if it was not. False if it cannot be kept.
    #[inline]
    fn is_current<B>(&mut self, table: &SlotTable<B>) -> bool {
        self.serial == table.serial() || self.look_up(table)
    }

    #[cold]
    fn look_up<B>(&mut self, table: &SlotTable<B>) -> bool {
        self.serial = NONE;
        let Some(found) = table.lookup(self.address) else {
            return false;
        };
        let Some(region) = found.region() else {
            return false;
        };
        if found.contiguous() < self.length as u64 {
            return false;
        }
        self.offset = found.offset as usize;
        self.host = found.entry.host() + self.offset;
        self.bitmap = ptr::from_ref(region.bitmap_ref()).expose_provenance();
        self.read_only = found.entry.is_read_only();
        self.serial = table.serial();
        true
    }

    /// The `count` bytes at `offset`, if one slot has the whole range. An error if they are not in the range.
    #[inline]
    fn part<'a, B: Bitmap>(
        &mut self,
        table: &'a SlotTable<B>,
        offset: usize,
        count: usize,
        write: bool,
    ) -> GuestMemoryResult<Option<VolatileSlice<'a, BS<'a, B>>>> {
        if offset > self.length || count > self.length - offset {
            return Err(beyond(self.address, offset));
        }
        if !self.is_current(table) {
            return Ok(None);
        }
        if write && self.read_only {
            return Err(read_only());
        }
        // SAFETY: `table` is the one that the numbers are from, since no other table of any type has its serial number, and
        // it has not changed since: for `'a` it keeps the region that has this bitmap, of this type.
        let bitmap = unsafe { &*ptr::with_exposed_provenance::<B>(self.bitmap) };
        let start = (self.host + offset) as *mut u8;
        let bitmap = bitmap.slice_at(self.offset + offset);
        // SAFETY: as above the region's mapping is kept for `'a`, and has the whole range, which has these bytes. Whoever
        // else uses this memory is the guest or another volatile slice.
        Ok(Some(unsafe {
            VolatileSlice::with_bitmap(start, count, bitmap, None)
        }))
    }

    /// Reads an object at `offset` of the range (`kvm_read_guest_cached`).
    ///
    /// # Errors
    /// As [`CheckedMemory`](crate::CheckedMemory)'s; [`GuestMemoryError::InvalidGuestAddress`] if the object does not end
    /// within the range.
    #[inline]
    pub fn read_obj<T: ByteValued>(
        &mut self,
        table: &SlotTable<impl SlotBitmap>,
        offset: usize,
    ) -> GuestMemoryResult<T> {
        match self.part(table, offset, size_of::<T>(), false)? {
            Some(slice) => Ok(slice.get_ref(0)?.load()),
            None => table.checked().read_obj(self.at(offset)?),
        }
    }

    /// Writes an object at `offset` of the range (`kvm_write_guest_cached`).
    ///
    /// # Errors
    /// As [`read_obj`](Self::read_obj); a read-only slot refuses.
    #[inline]
    pub fn write_obj<T: ByteValued>(
        &mut self,
        table: &SlotTable<impl SlotBitmap>,
        offset: usize,
        value: T,
    ) -> GuestMemoryResult<()> {
        match self.part(table, offset, size_of::<T>(), true)? {
            Some(slice) => {
                slice.get_ref(0)?.store(value);
                Ok(())
            }
            None => table.checked().write_obj(value, self.at(offset)?),
        }
    }

    /// Reads bytes at `offset` of the range, all of them.
    ///
    /// # Errors
    /// As [`read_obj`](Self::read_obj).
    pub fn read_slice(
        &mut self,
        table: &SlotTable<impl SlotBitmap>,
        offset: usize,
        into: &mut [u8],
    ) -> GuestMemoryResult<()> {
        match self.part(table, offset, into.len(), false)? {
            Some(slice) => Ok(slice.read_slice(into, 0)?),
            None => table.checked().read_slice(into, self.at(offset)?),
        }
    }

    /// Writes bytes at `offset` of the range, all of them.
    ///
    /// # Errors
    /// As [`write_obj`](Self::write_obj). An error in the middle of a range that spans slots leaves the part before it
    /// written, as vm-memory does it everywhere.
    pub fn write_slice(
        &mut self,
        table: &SlotTable<impl SlotBitmap>,
        offset: usize,
        from: &[u8],
    ) -> GuestMemoryResult<()> {
        match self.part(table, offset, from.len(), true)? {
            Some(slice) => Ok(slice.write_slice(from, 0)?),
            None => table.checked().write_slice(from, self.at(offset)?),
        }
    }

    /// Reads an integer at `offset` of the range in one piece.
    ///
    /// # Errors
    /// As [`read_obj`](Self::read_obj), and if it is not aligned.
    #[inline]
    pub fn load<T: AtomicAccess>(
        &mut self,
        table: &SlotTable<impl SlotBitmap>,
        offset: usize,
        order: Ordering,
    ) -> GuestMemoryResult<T> {
        match self.part(table, offset, size_of::<T>(), false)? {
            Some(slice) => Ok(slice.load(0, order)?),
            None => table.checked().load(self.at(offset)?, order),
        }
    }

    /// Writes an integer at `offset` of the range in one piece.
    ///
    /// # Errors
    /// As [`write_obj`](Self::write_obj), and if it is not aligned.
    #[inline]
    pub fn store<T: AtomicAccess>(
        &mut self,
        table: &SlotTable<impl SlotBitmap>,
        offset: usize,
        value: T,
        order: Ordering,
    ) -> GuestMemoryResult<()> {
        match self.part(table, offset, size_of::<T>(), true)? {
            Some(slice) => Ok(slice.store(value, 0, order)?),
            None => table.checked().store(value, self.at(offset)?, order),
        }
    }

    fn at(&self, offset: usize) -> GuestMemoryResult<GuestAddress> {
        self.address
            .0
            .checked_add(offset as u64)
            .map(GuestAddress)
            .ok_or(GuestMemoryError::GuestAddressOverflow)
    }
}

#[cold]
fn beyond(address: GuestAddress, offset: usize) -> GuestMemoryError {
    GuestMemoryError::InvalidGuestAddress(GuestAddress(address.0.saturating_add(offset as u64)))
}

/// The slot that a thread asked about last: most questions are about the same one again. The kernel's
/// `last_used_slot`.
///
/// ```
/// use memslots::{Backing, Memslots, SlotFlags, SlotHint, fake::FakeHost};
/// use vm_memory::GuestAddress;
///
/// let memslots = Memslots::new(FakeHost::new(8));
/// let slot = memslots.create(GuestAddress(0), Backing::anonymous(0x1000), SlotFlags::NONE)?;
/// let (mut reader, mut hint) = (memslots.reader(), SlotHint::new()); // once a thread
/// let table = reader.enter();
/// let address = GuestAddress(0x123);
/// assert_eq!(hint.translate(&table, address), table.translate(address));
/// # drop(table);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct SlotHint {
    serial: u64,
    start: u64,
    size: u64,
    host: usize,
    slot: SlotId,
    writable: bool,
}

impl SlotHint {
    /// Knows no slot yet.
    pub const fn new() -> Self {
        Self {
            serial: NONE,
            start: 0,
            size: 0,
            host: 0,
            slot: SlotId(0),
            writable: false,
        }
    }

    /// As [`SlotTable::translate`], and faster if the slot is that of the question before.
    #[inline]
    pub fn translate<B>(
        &mut self,
        table: &SlotTable<B>,
        address: GuestAddress,
    ) -> Option<Translation> {
        let offset = address.0.wrapping_sub(self.start);
        if self.serial == table.serial() && offset < self.size {
            return Some(Translation {
                slot: self.slot,
                host: Hva(self.host + offset as usize),
                writable: self.writable,
                contiguous: self.size - offset,
            });
        }
        self.look_up(table, address)
    }

    #[inline(never)]
    fn look_up<B>(&mut self, table: &SlotTable<B>, address: GuestAddress) -> Option<Translation> {
        let found = table.lookup(address)?;
        self.serial = table.serial();
        self.start = address.0 - found.offset;
        self.size = found.entry.size();
        self.host = found.entry.host();
        self.slot = found.entry.id();
        self.writable = !found.entry.is_read_only();
        Some(found.translation())
    }
}

impl Default for SlotHint {
    fn default() -> Self {
        Self::new()
    }
}
