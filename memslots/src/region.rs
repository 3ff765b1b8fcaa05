// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One slot's memory as vm-memory sees it.

use crate::guest_memfd::Binding;
use crate::mapping::Mapping;
use crate::{MAX_PAGES, PAGE_SHIFT, SlotExtent, SlotFlags, SlotId};
use std::fmt;
use std::sync::Arc;
use vm_memory::bitmap::{BS, Bitmap, NewBitmap};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestMemoryResult, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// What notes the writes that this process makes to a slot. `()` notes nothing and costs nothing; any
/// [`vm_memory::bitmap::NewBitmap`] will do. One is made while the lock of its [`Memslots`](crate::Memslots) is held: its
/// `with_len` changes no slots.
pub trait SlotBitmap: NewBitmap + Send + Sync + 'static {}

impl<B: NewBitmap + Send + Sync + 'static> SlotBitmap for B {}

/// A slot's memory: its extent, its flags, its mapping, and who notes the writes. Keeps the mapping alive.
///
/// As a [`GuestMemoryRegion`] it knows no permissions: it is how a loader fills a read-only slot.
pub struct Region<B = ()> {
    extent: SlotExtent,
    flags: SlotFlags,
    mapping: Arc<Mapping>,
    bitmap: Arc<B>,
    /// Its private memory, if it has some. Shared, since few have: a pointer is all that the others pay.
    guest_memfd: Option<Arc<Binding>>,
}

impl<B: SlotBitmap> Region<B> {
    /// `mapping` is as large as `extent` says and starts where it says.
    pub(crate) fn new(
        extent: SlotExtent,
        flags: SlotFlags,
        mapping: Mapping,
        guest_memfd: Option<Binding>,
    ) -> Self {
        let bitmap = Arc::new(B::with_len(extent.size() as usize));
        Self {
            extent,
            flags,
            mapping: Arc::new(mapping),
            bitmap,
            guest_memfd: guest_memfd.map(Arc::new),
        }
    }
}

impl<B> Region<B> {
    /// The same memory in another place or with other flags; `extent` has this one's host range.
    pub(crate) fn changed(&self, extent: SlotExtent, flags: SlotFlags) -> Self {
        let (mapping, bitmap) = (Arc::clone(&self.mapping), Arc::clone(&self.bitmap));
        Self {
            extent,
            flags,
            mapping,
            bitmap,
            guest_memfd: self.guest_memfd.clone(),
        }
    }

    /// The slot's extent.
    pub fn extent(&self) -> &SlotExtent {
        &self.extent
    }

    /// The slot's flags.
    pub fn flags(&self) -> SlotFlags {
        self.flags
    }

    /// The memory itself: of which kind it is, in pages of which size. A clone keeps it mapped.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Whether the guest, and devices through [`CheckedMemory`](crate::CheckedMemory), may only read it.
    pub fn is_read_only(&self) -> bool {
        self.flags.contains(SlotFlags::READ_ONLY)
    }

    /// The size of the host's pages behind it, in bytes (`kvm_host_page_size`): what it can be punched by
    /// ([`GuestRam::punch`](crate::GuestRam::punch)), and what a fault brings at least.
    pub fn page_size(&self) -> u64 {
        self.mapping.page_size()
    }
}

impl<B> Region<B> {
    /// The part of a guest_memfd that the slot has, if it has one.
    pub(crate) fn guest_memfd(&self) -> Option<&Binding> {
        self.guest_memfd.as_deref()
    }

    /// Who notes the writes.
    pub(crate) fn bitmap_ref(&self) -> &B {
        &self.bitmap
    }
}

impl<B: Bitmap> Region<B> {
    /// Who notes the writes from `offset` on.
    #[inline]
    pub(crate) fn bitmap_at(&self, offset: usize) -> BS<'_, B> {
        self.bitmap.slice_at(offset)
    }
}

impl<B: Bitmap> GuestMemoryRegion for Region<B> {
    type B = B;

    fn len(&self) -> GuestUsize {
        self.extent.size()
    }

    fn start_addr(&self) -> GuestAddress {
        self.extent.start()
    }

    fn bitmap(&self) -> BS<'_, B> {
        self.bitmap.slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        if addr.0 >= self.extent.size() {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        Ok(self.mapping.start().wrapping_add(addr.0 as usize))
    }

    fn file_offset(&self) -> Option<&FileOffset> {
        self.mapping.file()
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, B>>> {
        let end = offset.0.checked_add(count as u64);
        if end.is_none_or(|end| end > self.extent.size()) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let start = self.mapping.start().wrapping_add(offset.0 as usize);
        let bitmap = self.bitmap.slice_at(offset.0 as usize);
        // SAFETY: `offset + count` is at most the mapping's size, and the mapping lives as long as the region that the
        // slice borrows from. Whoever else uses this memory is the guest or another volatile slice.
        Ok(unsafe { VolatileSlice::with_bitmap(start, count, bitmap, None) })
    }
}

impl<B: Bitmap> GuestMemoryRegionBytes for Region<B> {}

/// What a table keeps of a region beside it, so that a lookup and an access need not follow the pointer: 16 bytes.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    host: usize,
    id: SlotId,
    /// The pages, at most [`MAX_PAGES`], and [`READ_ONLY`].
    pages: u32,
}

const READ_ONLY: u32 = 1 << 31;

impl Entry {
    pub(crate) fn new<B>(region: &Region<B>) -> Self {
        // More than that is refused before there is a region.
        let pages = region.extent.pages().min(MAX_PAGES) as u32;
        let read_only = if region.is_read_only() { READ_ONLY } else { 0 };
        Self {
            host: region.extent.host_start().0,
            id: region.extent.id(),
            pages: pages | read_only,
        }
    }

    #[inline]
    pub(crate) const fn size(self) -> u64 {
        ((self.pages & !READ_ONLY) as u64) << PAGE_SHIFT
    }

    #[inline]
    pub(crate) const fn host(self) -> usize {
        self.host
    }

    #[inline]
    pub(crate) const fn id(self) -> SlotId {
        self.id
    }

    #[inline]
    pub(crate) const fn is_read_only(self) -> bool {
        self.pages & READ_ONLY != 0
    }
}

impl<B> fmt::Debug for Region<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Region");
        debug
            .field("extent", &self.extent)
            .field("flags", &self.flags)
            .finish_non_exhaustive()
    }
}
