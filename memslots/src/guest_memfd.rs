// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`GuestMemfd`]: memory that the guest has and this process does not. A slot can have a part of one beside its user
//! mapping; which of the two a page comes from is the VM's memory attributes' to say (private or shared).

use crate::GuestMemfdRange;
use crate::ids::Ids;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A guest_memfd of one VM (Documentation/virt/kvm/api.rst, `KVM_CREATE_GUEST_MEMFD`), made by
/// [`Memslots::create_guest_memfd`](crate::Memslots::create_guest_memfd). Clones are the same file; it is closed, and
/// its memory given back, when the last of them and the last slot with it have gone (and the last snapshot that shows such
/// a slot).
///
/// Two are equal if they are the same file.
#[derive(Clone)]
pub struct GuestMemfd {
    file: Arc<OwnedFd>,
    size: u64,
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
    pub(crate) fn new(file: OwnedFd, size: u64, vm: Arc<Ids>) -> Self {
        let file = Arc::new(file);
        Self { file, size, vm }
    }

    /// The size in bytes, which does not change.
    pub const fn size(&self) -> u64 {
        self.size
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
            .finish_non_exhaustive()
    }
}
