// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SlotMap`]: the slots that KVM has, as plain data that accepts and refuses requests as KVM does. The rules about one
//! slot are [`classify`](classify())'s; those about several are here.

use crate::{
    Change, Gfn, GuestMemfdRange, Limits, MemoryRegion, Refusal, SlotFlags, SlotId, SlotShape,
    classify,
};
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use vm_memory::GuestAddress;

/// The slots that KVM has: a model in plain data, which accepts and refuses as KVM does.
///
/// ```
/// use memslots::{Change, Hva, Limits, MemoryRegion, SlotFlags, SlotId, SlotMap};
/// use vm_memory::GuestAddress;
/// let mut slots = SlotMap::new(Limits::new(32_764));
/// let mut request = MemoryRegion {
///     id: SlotId(0), flags: SlotFlags::NONE, start: GuestAddress(0), size: 0x4000, host: Hva(0x7000_0000),
///     guest_memfd: None,
/// };
/// assert_eq!(slots.apply(&request), Ok(Change::Create));
/// request.start = GuestAddress(0x10_0000);
/// assert_eq!(slots.check(&request), Ok(Change::Move));
/// request.size = 0x5000;
/// assert!(slots.check(&request).is_err(), "a slot's size cannot change");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotMap {
    limits: Limits,
    by_id: BTreeMap<SlotId, SlotShape>,
    /// (address space, first guest address) to id.
    by_start: BTreeMap<(u16, u64), SlotId>,
    /// (guest_memfd, first byte in it) to id.
    bindings: BTreeMap<(RawFd, u64), SlotId>,
}

/// The private memory that KVM takes from a request: it looks at it only under the flag.
fn binding(request: &MemoryRegion) -> Option<GuestMemfdRange> {
    let looks = request.flags.contains(SlotFlags::GUEST_MEMFD);
    request.guest_memfd.filter(|_| looks)
}

impl SlotShape {
    /// The request that makes slot `id` such a one.
    pub(crate) fn request(&self, id: SlotId) -> MemoryRegion {
        let &Self {
            start,
            size,
            host,
            flags,
            guest_memfd,
        } = self;
        MemoryRegion {
            id,
            flags,
            start,
            size,
            host,
            guest_memfd,
        }
    }
}

impl SlotMap {
    /// No slots.
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            by_id: BTreeMap::new(),
            by_start: BTreeMap::new(),
            bindings: BTreeMap::new(),
        }
    }

    /// The VM turns out to be able to have guest_memfd slots.
    pub(crate) fn allow_guest_memfd(&mut self) {
        self.limits.guest_memfd = true;
    }

    /// The host's bounds.
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The slot with this id.
    pub fn get(&self, id: SlotId) -> Option<&SlotShape> {
        self.by_id.get(&id)
    }

    /// All slots, by id.
    pub fn iter(&self) -> impl Iterator<Item = (SlotId, &SlotShape)> {
        self.by_id.iter().map(|(id, shape)| (*id, shape))
    }

    /// How many slots there are.
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// What `request` would do.
    ///
    /// # Errors
    /// [`Refusal`], where KVM would refuse it.
    pub fn check(&self, request: &MemoryRegion) -> Result<Change, Refusal> {
        let &MemoryRegion {
            id, start, size, ..
        } = request;
        let change = classify(self.get(id), request, &self.limits)?;
        if matches!(change, Change::Create | Change::Move) {
            if let Some((with, there)) = self.overlap(id, start.0, size) {
                return Err(Refusal::Overlap {
                    id,
                    start,
                    size,
                    with,
                    with_start: there.start,
                    with_size: there.size,
                });
            }
            // After the overlap, as in KVM.
            if let Some(memory) = binding(request) {
                self.check_binding(request, memory)?;
            }
            if Gfn::containing(GuestAddress(start.0 + (size - 1))) > self.limits.last_gfn {
                return Err(Refusal::BeyondLastGfn {
                    id,
                    start,
                    size,
                    last_gfn: self.limits.last_gfn,
                });
            }
        }
        Ok(change)
    }

    /// Does what `request` asks for.
    ///
    /// # Errors
    /// As [`check`](Self::check); then nothing has changed.
    pub fn apply(&mut self, request: &MemoryRegion) -> Result<Change, Refusal> {
        let change = self.check(request)?;
        self.commit(request);
        Ok(change)
    }

    /// Does what `request`, which was [checked](Self::check), asks for. Returns what takes it back.
    pub(crate) fn commit(&mut self, request: &MemoryRegion) -> MemoryRegion {
        let &MemoryRegion {
            id,
            flags,
            start,
            size,
            host,
            ..
        } = request;
        let guest_memfd = binding(request);
        let old = if size == 0 {
            self.by_id.remove(&id)
        } else {
            let shape = SlotShape {
                start,
                size,
                host,
                flags,
                guest_memfd,
            };
            self.by_id.insert(id, shape)
        };
        let space = id.address_space();
        match &old {
            Some(old) if size == 0 || old.start != start => {
                self.by_start.remove(&(space, old.start.0));
            }
            _ => {}
        }
        if let Some(memory) = old.and_then(|old| old.guest_memfd) {
            self.bindings.remove(&(memory.fd, memory.offset));
        }
        if size != 0 {
            self.by_start.insert((space, start.0), id);
            if let Some(memory) = guest_memfd {
                self.bindings.insert((memory.fd, memory.offset), id);
            }
        }
        match old {
            Some(old) => old.request(id),
            None => MemoryRegion {
                size: 0,
                ..*request
            },
        }
    }

    /// The rules of `kvm_gmem_bind` for a slot of more than 0 bytes.
    fn check_binding(
        &self,
        request: &MemoryRegion,
        memory: GuestMemfdRange,
    ) -> Result<(), Refusal> {
        let &MemoryRegion {
            id, start, size, ..
        } = request;
        let end = memory.offset.checked_add(size);
        let Some(end) = end.filter(|end| *end <= memory.file_size) else {
            return Err(Refusal::GuestMemfdRange {
                id,
                start,
                size,
                memory,
            });
        };
        // Bindings of one file do not overlap each other, so the last that begins before the end tells.
        let last = self
            .bindings
            .range((memory.fd, 0)..(memory.fd, end))
            .next_back();
        if let Some((&(_, from), &with)) = last
            && with != id
            && let Some(shape) = self.by_id.get(&with)
            && from + shape.size > memory.offset
        {
            return Err(Refusal::GuestMemfdBound {
                id,
                start,
                size,
                memory,
                with,
                with_start: shape.start,
                with_size: shape.size,
            });
        }
        Ok(())
    }

    /// A slot other than `id`, of the same address space, that has a part of `start..start + size` (`size` > 0).
    fn overlap(&self, id: SlotId, start: u64, size: u64) -> Option<(SlotId, &SlotShape)> {
        let space = id.address_space();
        // Slots do not overlap each other, so only the last two that begin before the end can reach into the range:
        // the last, or, if that one is `id` itself, the one before it.
        let before_the_end = self.by_start.range((space, 0)..(space, start + size));
        before_the_end
            .rev()
            .filter(|(_, other)| **other != id)
            .take(1)
            .find_map(|((_, from), other)| {
                let there = self.by_id.get(other)?;
                (from + there.size > start).then_some((*other, there))
            })
    }
}
