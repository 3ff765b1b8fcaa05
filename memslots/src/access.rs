// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Access for devices: [`GuestRam`], the live handle; [`CheckedMemory`], what it gives, which refuses writes to
//! read-only slots; [`ClearGuest`], the one access that vm-memory lacks.
//!
//! vm-memory makes every `GuestMemoryBackend` a `GuestMemory` that ignores permissions, so what checks them must be a
//! type of its own that is no backend.

use crate::{HvaError, SlotBitmap, SlotTable};
use srcu::{Published, Reader, Snapshot};
use std::fmt;
use std::io;
use std::iter::FusedIterator;
use std::ops::Deref;
use std::sync::Arc;
use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Address, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, GuestMemoryResult,
    Permissions, VolatileSlice,
};

/// The VM's memory as it is at each moment: give a clone of it to every device.
///
/// [`memory`](GuestAddressSpace::memory) gives the slots of now; it takes a lock for the cloning of one reference, and
/// never waits for a change that is being made. What it gave keeps its slots mapped while it lives, so a device takes
/// it for the handling of one queue, and does not store it. (A vCPU thread uses
/// [`Memslots::reader`](crate::Memslots::reader), which takes no lock.)
pub struct GuestRam<B: SlotBitmap = ()> {
    table: Arc<Published<SlotTable<B>>>,
}

/// What [`GuestRam`] gives: a counted reference to a [`CheckedMemory`].
pub struct LoadedMemory<B: SlotBitmap = ()>(CheckedMemory<B>);

/// The slots at one moment, with their permissions: a write to a read-only slot fails, and leaves it as it was.
///
/// The error is [`GuestMemoryError::IOError`] of kind `PermissionDenied`, with [`HvaError::ReadOnly`] inside, as the
/// kernel's own accessors answer `KVM_HVA_ERR_RO_BAD`. An access that begins in writable memory and runs into a
/// read-only slot is done up to there, as vm-memory does it everywhere.
pub struct CheckedMemory<B: SlotBitmap = ()> {
    table: Snapshot<SlotTable<B>>,
}

/// [`CheckedMemory`] of a table that is at hand: what a vCPU thread, or a device with a [`Reader`] of its own, makes of
/// its guard. Costs nothing to make.
///
/// ```
/// # use memslots::{Backing, Memslots, SlotFlags, fake::FakeHost};
/// # use vm_memory::{Bytes, GuestAddress};
/// # let memslots = Memslots::new(FakeHost::new(8));
/// # let slot = memslots.create(GuestAddress(0), Backing::anonymous(0x1000), SlotFlags::NONE)?;
/// let mut reader = memslots.ram().reader(); // once a device
/// let table = reader.enter(); // at each notification
/// table.checked().write_obj(7u16, GuestAddress(0x10))?;
/// # drop(table);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Where vm-memory's own kind of handle is wanted (virtio-queue), `&table.checked()` is one.
pub struct CheckedView<'a, B = ()> {
    table: &'a SlotTable<B>,
}

/// The slices of a range, each checked when its turn comes.
struct CheckedSlices<'a, B> {
    table: &'a SlotTable<B>,
    address: GuestAddress,
    /// Bytes to come; 0 after the end and after an error.
    left: usize,
    writes: bool,
}

/// [`CheckedSlices`] up to the first error, which is not the first slice's.
struct UntilError<'a, B: Bitmap> {
    first: Option<VolatileSlice<'a, BS<'a, B>>>,
    rest: CheckedSlices<'a, B>,
}

impl<B: SlotBitmap> GuestRam<B> {
    pub(crate) fn new(table: Arc<Published<SlotTable<B>>>) -> Self {
        Self { table }
    }

    /// The slots of now, without permissions: for loaders.
    pub fn snapshot(&self) -> Snapshot<SlotTable<B>> {
        self.table.load()
    }

    /// A device's own way to the slots, as [`Memslots::reader`](crate::Memslots::reader): entering it takes no lock and
    /// counts no reference, and it keeps nothing mapped while it is not inside. [`SlotTable::checked`] on what it shows
    /// has the permissions.
    pub fn reader(&self) -> Reader<SlotTable<B>> {
        self.table.reader()
    }

    pub(crate) fn table(&self) -> &Published<SlotTable<B>> {
        &self.table
    }

    /// Whether something cached from generation `g` of the slots is still right: if this is `g`. Takes no lock.
    pub fn generation(&self) -> u64 {
        self.table.generation()
    }
}

impl<B: SlotBitmap> GuestAddressSpace for GuestRam<B> {
    type M = CheckedMemory<B>;
    type T = LoadedMemory<B>;

    fn memory(&self) -> LoadedMemory<B> {
        LoadedMemory(CheckedMemory {
            table: self.table.load(),
        })
    }
}

impl<B: SlotBitmap> CheckedMemory<B> {
    /// Permissions on top of a snapshot.
    pub fn new(table: Snapshot<SlotTable<B>>) -> Self {
        Self { table }
    }

    /// The slots, for translation.
    pub fn table(&self) -> &SlotTable<B> {
        &self.table
    }
}

impl<'a, B> CheckedView<'a, B> {
    pub(crate) const fn new(table: &'a SlotTable<B>) -> Self {
        Self { table }
    }

    /// The slots, for translation.
    pub const fn table(&self) -> &'a SlotTable<B> {
        self.table
    }

    #[inline]
    fn slices(
        &self,
        address: GuestAddress,
        left: usize,
        access: Permissions,
    ) -> CheckedSlices<'a, B> {
        CheckedSlices {
            table: self.table,
            address,
            left,
            writes: access.has_write(),
        }
    }
}

impl<'a, B: Bitmap> CheckedSlices<'a, B> {
    #[inline]
    fn step(&mut self) -> GuestMemoryResult<VolatileSlice<'a, BS<'a, B>>> {
        let address = self.address;
        let found = match self.table.lookup(address) {
            Some(found) if !(self.writes && found.entry.is_read_only()) => found,
            Some(_) => return Err(read_only()),
            None => return Err(GuestMemoryError::InvalidGuestAddress(address)),
        };
        let slice = found
            .slice(self.left)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        let here = slice.len();
        self.left -= here;
        if self.left > 0 {
            // A slot can end at most one page below 2^64, so the sum does not wrap.
            self.address = address
                .checked_add(here as u64)
                .ok_or(GuestMemoryError::GuestAddressOverflow)?;
        }
        Ok(slice)
    }
}

/// The kernel's `KVM_HVA_ERR_RO_BAD`, as vm-memory can say it.
#[cold]
pub(crate) fn read_only() -> GuestMemoryError {
    GuestMemoryError::IOError(io::Error::new(
        io::ErrorKind::PermissionDenied,
        HvaError::ReadOnly,
    ))
}

impl<'a, B: Bitmap> Iterator for CheckedSlices<'a, B> {
    type Item = GuestMemoryResult<VolatileSlice<'a, BS<'a, B>>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let item = self.step();
        if item.is_err() {
            self.left = 0;
        }
        Some(item)
    }
}

impl<B: Bitmap> FusedIterator for CheckedSlices<'_, B> {}

impl<'a, B: Bitmap> GuestMemorySliceIterator<'a, BS<'a, B>> for CheckedSlices<'a, B> {
    /// As vm-memory's own, which moves each slice through a peeking iterator.
    #[inline]
    fn stop_on_error(
        mut self,
    ) -> GuestMemoryResult<impl Iterator<Item = VolatileSlice<'a, BS<'a, B>>>> {
        let first = self.next().transpose()?;
        Ok(UntilError { first, rest: self })
    }
}

impl<'a, B: Bitmap> Iterator for UntilError<'a, B> {
    type Item = VolatileSlice<'a, BS<'a, B>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        self.first
            .take()
            .or_else(|| self.rest.next().and_then(Result::ok))
    }
}

impl<B: SlotBitmap> GuestMemory for CheckedView<'_, B> {
    /// Never given out: it knows no permissions.
    type PhysicalMemory = SlotTable<B>;
    type Bitmap = B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.slices(addr, count, access).all(|slice| slice.is_ok())
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, B>>> {
        Ok(self.slices(addr, count, access))
    }
}

impl<B: SlotBitmap> GuestMemory for CheckedMemory<B> {
    /// Never given out: it knows no permissions.
    type PhysicalMemory = SlotTable<B>;
    type Bitmap = B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.table.checked().check_range(addr, count, access)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, B>>> {
        Ok(self.table.checked().slices(addr, count, access))
    }
}

/// Zeroing guest memory (`kvm_clear_guest`), for everything that is a [`GuestMemory`].
pub trait ClearGuest: GuestMemory {
    /// Writes zeros to `count` bytes from `address`, across slots.
    ///
    /// # Errors
    /// As vm-memory's accesses: no slot, or a read-only one. If any of the bytes cannot be written, none is.
    fn clear(&self, address: GuestAddress, count: usize) -> GuestMemoryResult<()> {
        // A first pass that only looks, because half a clear helps nobody.
        self.get_slices(address, count, Permissions::Write)?
            .try_for_each(|slice| slice.map(drop))?;
        for slice in self.get_slices(address, count, Permissions::Write)? {
            let slice = slice?;
            let mut done = 0;
            while done < slice.len() {
                done += vm_memory::Bytes::write(&slice, &ZEROS, done)?;
            }
        }
        Ok(())
    }
}

static ZEROS: [u8; 4096] = [0; 4096];

impl<M: GuestMemory + ?Sized> ClearGuest for M {}

impl<B: SlotBitmap> Deref for LoadedMemory<B> {
    type Target = CheckedMemory<B>;

    fn deref(&self) -> &CheckedMemory<B> {
        &self.0
    }
}

impl<B: SlotBitmap> Clone for LoadedMemory<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: SlotBitmap> Clone for CheckedMemory<B> {
    fn clone(&self) -> Self {
        Self {
            table: self.table.clone(),
        }
    }
}

impl<B> Clone for CheckedView<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for CheckedView<'_, B> {}

impl<B> fmt::Debug for CheckedView<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckedView")
            .field("table", &self.table)
            .finish()
    }
}

impl<B: SlotBitmap> Clone for GuestRam<B> {
    fn clone(&self) -> Self {
        Self {
            table: Arc::clone(&self.table),
        }
    }
}

impl<B: SlotBitmap> fmt::Debug for GuestRam<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRam")
            .field("table", &self.table)
            .finish()
    }
}

impl<B: SlotBitmap> fmt::Debug for CheckedMemory<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckedMemory")
            .field("table", &self.table)
            .finish()
    }
}

impl<B: SlotBitmap> fmt::Debug for LoadedMemory<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
