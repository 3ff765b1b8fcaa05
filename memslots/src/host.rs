// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one capability that the crate needs of a host, as a trait, so that a test can be the host.

use crate::MemoryRegion;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// An error number of the host, as in `errno.h`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({})", self.0)
    }
}

impl std::error::Error for Errno {}

/// Who keeps the slots: a KVM VM, or a test's stand-in.
///
/// # Contract
/// The answer is the truth: after `Ok` of a deletion no guest reaches the memory, which is unmapped then; after an error
/// nothing has changed. A panic is no answer: of a [`set_memory_region`](Self::set_memory_region) that unwinds nobody could
/// tell what the guest reaches, so that [`Memslots`](crate::Memslots) aborts the process. An implementation that hands its requests on to a real VM answers for this with the `unsafe`
/// block that it needs there.
pub trait SetMemoryRegion {
    /// Creates, changes or deletes a slot: `KVM_SET_USER_MEMORY_REGION`, or, for a request with a
    /// [`guest_memfd`](MemoryRegion::guest_memfd), `KVM_SET_USER_MEMORY_REGION2`. May wait, some milliseconds, for a
    /// grace period inside KVM.
    ///
    /// # Errors
    /// The host's errno; then nothing has changed.
    ///
    /// # Safety
    /// Until the slot is deleted, its host range is memory that is the guest's to read and write: mapped, and never
    /// anything that this program's own safety rests upon.
    unsafe fn set_memory_region(&self, region: &MemoryRegion) -> Result<(), Errno>;

    /// How many slots there can be (`KVM_CAP_NR_MEMSLOTS`).
    fn max_slots(&self) -> usize;

    /// Whether this VM can have slots with a guest_memfd (`KVM_CAP_GUEST_MEMFD` and `KVM_CAP_USER_MEMORY2`, asked of
    /// the VM). A host that does not say is one that cannot.
    fn has_guest_memfd(&self) -> bool {
        false
    }

    /// Makes a guest_memfd of `size` bytes for this VM (`KVM_CREATE_GUEST_MEMFD`).
    ///
    /// # Errors
    /// The host's errno; EOPNOTSUPP where [`has_guest_memfd`](Self::has_guest_memfd) says no.
    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
        let _ = size;
        Err(Errno(libc::EOPNOTSUPP))
    }

    /// Whether this VM can have guest_memfds that this process maps as well (both flags of
    /// `KVM_CAP_GUEST_MEMFD_FLAGS`, asked of the VM; Linux 6.18). A host that does not say is one that cannot.
    fn has_mappable_guest_memfd(&self) -> bool {
        false
    }

    /// Makes a guest_memfd of `size` bytes that can be mapped, and whose pages are shared with the guest from the start
    /// (`GUEST_MEMFD_FLAG_MMAP` and `GUEST_MEMFD_FLAG_INIT_SHARED`).
    ///
    /// # Errors
    /// The host's errno; EOPNOTSUPP where [`has_mappable_guest_memfd`](Self::has_mappable_guest_memfd) says no.
    fn create_mappable_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
        let _ = size;
        Err(Errno(libc::EOPNOTSUPP))
    }
}

macro_rules! forward {
    ($($type:ty),*) => {$(
        impl<T: SetMemoryRegion + ?Sized> SetMemoryRegion for $type {
            unsafe fn set_memory_region(&self, region: &MemoryRegion) -> Result<(), Errno> {
                // SAFETY: the caller's promise is the same.
                unsafe { (**self).set_memory_region(region) }
            }

            fn max_slots(&self) -> usize {
                (**self).max_slots()
            }

            fn has_guest_memfd(&self) -> bool {
                (**self).has_guest_memfd()
            }

            fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
                (**self).create_guest_memfd(size)
            }

            fn has_mappable_guest_memfd(&self) -> bool {
                (**self).has_mappable_guest_memfd()
            }

            fn create_mappable_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
                (**self).create_mappable_guest_memfd(size)
            }
        }
    )*};
}

forward!(&T, Arc<T>, Box<T>);
