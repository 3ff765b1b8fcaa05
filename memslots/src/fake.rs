// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host for tests, of this crate and of those who use it: it keeps slots by KVM's rules ([`SlotMap`]) and has no
//! guest. It notes every call, and refuses the ones that it was told to refuse.

use crate::{Errno, Limits, MemoryRegion, SetMemoryRegion, SlotId, SlotMap, SlotShape};
use std::collections::BTreeMap;
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
}
