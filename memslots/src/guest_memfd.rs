// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`GuestMemfd`]: memory whose owner is the VM. Of one that cannot be mapped, the guest has what this process has not: a
//! slot can have a part of it beside its user mapping, and which of the two a page comes from is the VM's memory
//! attributes' to say (private or shared). One that can be mapped is all of a slot's memory: KVM goes to the file for what
//! the guest touches, this process to its mapping, and both find the same pages.

use crate::GuestMemfdRange;
use crate::ids::Ids;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A guest_memfd of one VM (Documentation/virt/kvm/api.rst, `KVM_CREATE_GUEST_MEMFD`), made by
/// [`Memslots::create_guest_memfd`](crate::Memslots::create_guest_memfd) or
/// [`create_mappable_guest_memfd`](crate::Memslots::create_mappable_guest_memfd). Clones are the same file; it is closed, and
/// its memory given back, when the last of them and the last slot with it have gone (and the last snapshot that shows such
/// a slot).
///
/// Two are equal if they are the same file.
#[derive(Clone)]
pub struct GuestMemfd {
    file: Arc<File>,
    size: u64,
    mappable: bool,
    /// Whose it is.
    vm: Arc<Ids>,
}

/// The part of a guest_memfd that a slot has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) file: GuestMemfd,
    pub(crate) offset: u64,
}

impl GuestMemfd {
    pub(crate) fn new(file: OwnedFd, size: u64, mappable: bool, vm: Arc<Ids>) -> Self {
        Self {
            file: Arc::new(file.into()),
            size,
            mappable,
            vm,
        }
    }

    /// The size in bytes, which does not change.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether this process can map it: whether it can be a slot's [memory](crate::Backing::guest_memfd).
    pub const fn is_mappable(&self) -> bool {
        self.mappable
    }

    pub(crate) const fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(crate) fn belongs_to(&self, vm: &Arc<Ids>) -> bool {
        Arc::ptr_eq(&self.vm, vm)
    }
}

impl Binding {
    pub(crate) fn range(&self) -> GuestMemfdRange {
        GuestMemfdRange {
            fd: self.file.file.as_raw_fd(),
            offset: self.offset,
            file_size: self.file.size,
        }
    }
}

impl AsFd for GuestMemfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl PartialEq for GuestMemfd {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.file, &other.file)
    }
}

impl Eq for GuestMemfd {}

impl fmt::Debug for GuestMemfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemfd")
            .field("fd", &self.file.as_raw_fd())
            .field("size", &self.size)
            .field("mappable", &self.mappable)
            .finish_non_exhaustive()
    }
}
