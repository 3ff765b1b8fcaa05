// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host for tests, of this crate and of those who use it: it keeps slots by KVM's rules ([`SlotMap`]) and has no
//! guest. It notes every call, and refuses the ones that it was told to refuse.

use crate::{Errno, Limits, MemoryRegion, PAGE_SIZE, SetMemoryRegion, SlotId, SlotMap, SlotShape};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A stand-in for a VM. Clones are the same one.
///
/// ```
/// use memslots::fake::FakeHost;
/// use memslots::{Backing, Errno, Memslots, SlotFlags};
/// use vm_memory::GuestAddress;
///
/// let host = FakeHost::new(8);
/// let memslots = Memslots::new(host.clone());
/// host.fail(0, Errno(libc::ENOMEM)); // the next call
/// assert!(memslots.create(GuestAddress(0), Backing::anonymous(0x1000), SlotFlags::NONE).is_err());
/// assert!(host.slots().is_empty());
/// ```
#[derive(Clone, Debug)]
pub struct FakeHost {
    limits: Limits,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    slots: SlotMap,
    calls: Vec<MemoryRegion>,
    /// Call number to what it answers.
    failures: BTreeMap<usize, Errno>,
}

impl FakeHost {
    /// A VM without slots, on a host that can have `slots` of them.
    pub fn new(slots: u32) -> Self {
        let limits = Limits::new(slots);
        let slots = SlotMap::new(limits);
        let state = State {
            slots,
            calls: Vec::new(),
            failures: BTreeMap::new(),
        };
        Self {
            limits,
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// The same, as a host whose VMs can have guest_memfds (which are memfds here).
    #[must_use]
    pub fn with_guest_memfd(mut self) -> Self {
        self.limits.guest_memfd = true;
        self.lock().slots.allow_guest_memfd();
        self
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The call that comes after `after` others from now fails with `errno`, and changes nothing.
    pub fn fail(&self, after: usize, errno: Errno) {
        let mut state = self.lock();
        let call = state.calls.len() + after;
        state.failures.insert(call, errno);
    }

    /// Takes back what `fail` arranged and has not come to pass.
    pub fn fail_no_more(&self) {
        self.lock().failures.clear();
    }

    /// The calls so far, refused ones included.
    pub fn calls(&self) -> Vec<MemoryRegion> {
        self.lock().calls.clone()
    }

    /// The slots that there are, by id.
    pub fn slots(&self) -> Vec<(SlotId, SlotShape)> {
        self.lock()
            .slots
            .iter()
            .map(|(id, shape)| (id, *shape))
            .collect()
    }
}

impl SetMemoryRegion for FakeHost {
    unsafe fn set_memory_region(&self, region: &MemoryRegion) -> Result<(), Errno> {
        let mut state = self.lock();
        let call = state.calls.len();
        state.calls.push(*region);
        if let Some(errno) = state.failures.remove(&call) {
            return Err(errno);
        }
        state
            .slots
            .apply(region)
            .map(drop)
            .map_err(|refusal| Errno(refusal.errno()))
    }

    fn max_slots(&self) -> usize {
        self.limits.slots as usize
    }

    fn has_guest_memfd(&self) -> bool {
        self.limits.guest_memfd
    }

    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
        if !self.limits.guest_memfd {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Errno(libc::EINVAL));
        }
        let last = || {
            Errno(
                io::Error::last_os_error()
                    .raw_os_error()
                    .unwrap_or(libc::EIO),
            )
        };
        // SAFETY: the name is a C string, the flag a documented one.
        let fd = unsafe { libc::memfd_create(c"guest_memfd".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(last());
        }
        // SAFETY: just made, and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).map_err(|_| last())?;
        Ok(file.into())
    }

    fn has_mappable_guest_memfd(&self) -> bool {
        self.limits.guest_memfd
    }

    fn create_mappable_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
        self.create_guest_memfd(size)
    }
}
