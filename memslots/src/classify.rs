// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a `KVM_SET_USER_MEMORY_REGION` would do, decided without asking KVM: pure arithmetic on the request, the slot
//! that has the id now, and the other slots. The rules, and the order in which they are looked at, are those of today's
//! `__kvm_set_memory_region`; `tests/kvm_oracle.rs` asks the host's KVM the same questions.
//!
//! It knows none of KVM's private ranges: see [`PrivateRanges`](crate::PrivateRanges) for that policy.

use crate::{Gfn, Hva, PAGE_SHIFT, PAGE_SIZE, SlotFlags, SlotId};
use std::collections::BTreeMap;
use std::fmt;
use thiserror::Error;
use vm_memory::GuestAddress;

/// The most pages that one slot can have (`KVM_MEM_MAX_NR_PAGES`): a dirty bitmap is indexed by a 32-bit number.
pub const MAX_PAGES: u64 = (1 << 31) - 1;

/// The argument of `KVM_SET_USER_MEMORY_REGION`: a request, legal or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Which slot.
    pub id: SlotId,
    /// Its flags.
    pub flags: SlotFlags,
    /// Its first guest physical address.
    pub start: GuestAddress,
    /// Its size in bytes; 0 deletes it.
    pub size: u64,
    /// Its first host virtual address.
    pub host: Hva,
}

/// A slot as KVM has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotShape {
    /// The first guest physical address.
    pub start: GuestAddress,
    /// The size in bytes, not 0.
    pub size: u64,
    /// The first host virtual address.
    pub host: Hva,
    /// The flags.
    pub flags: SlotFlags,
}

/// What a request does to a slot (`kvm_mr_change`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// There is a slot where there was none (`KVM_MR_CREATE`).
    Create,
    /// The slot goes (`KVM_MR_DELETE`).
    Delete,
    /// The slot's guest address changes, and perhaps its flags (`KVM_MR_MOVE`). A running vCPU can see the gap.
    Move,
    /// Nothing but the flags changes (`KVM_MR_FLAGS_ONLY`).
    FlagsOnly,
    /// The request describes the slot as it is. KVM accepts it and does nothing.
    Nothing,
}

/// Bounds that are the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Slots in an address space: ids below this are the user's (`KVM_USER_MEM_SLOTS`, `KVM_CAP_NR_MEMSLOTS`).
    pub slots: u32,
    /// Address spaces (`KVM_CAP_MULTI_ADDRESS_SPACE`, 1 without it).
    pub address_spaces: u32,
    /// The last frame that the host's MMU code can map for a guest. KVM tells no one; [`Limits::new`] assumes the whole
    /// 64-bit range, and then it is KVM that refuses.
    pub last_gfn: Gfn,
}

/// Why KVM would refuse a request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Flags that KVM does not know, or not in this call.
    #[error("{id}: flags {flags:?} are not known to this call")]
    Flags {
        /// The slot.
        id: SlotId,
        /// The flags asked for.
        flags: SlotFlags,
    },
    /// A number that is not a multiple of [`PAGE_SIZE`].
    #[error("{id}: the {what} {value:#x} is not a multiple of the page size {PAGE_SIZE:#x}")]
    Unaligned {
        /// The slot.
        id: SlotId,
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The host addresses are not user space's.
    #[error("{id}: {size:#x} bytes from the host address {host} are not in user space")]
    HostRange {
        /// The slot.
        id: SlotId,
        /// The first host address.
        host: Hva,
        /// The size in bytes.
        size: u64,
    },
    /// No slot can have this id.
    #[error("{id}: KVM has {} address spaces of {} slots here", limits.address_spaces, limits.slots)]
    Id {
        /// The id.
        id: SlotId,
        /// The bounds that it exceeds.
        limits: Limits,
    },
    /// The guest addresses wrap around.
    #[error("{id}: {size:#x} bytes from guest address {:#x} wrap around the end of the address space", start.0)]
    Wraps {
        /// The slot.
        id: SlotId,
        /// The first guest address.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
    },
    /// More than [`MAX_PAGES`].
    #[error("{id}: {pages} pages are more than a slot can have ({MAX_PAGES})")]
    TooManyPages {
        /// The slot.
        id: SlotId,
        /// The pages asked for.
        pages: u64,
    },
    /// A slot that is not there is to be deleted.
    #[error("{id}: cannot be deleted, it does not exist")]
    NoSuchSlot {
        /// The slot.
        id: SlotId,
    },
    /// An existing slot's size, host address or read-only flag is to change: delete it and create another.
    #[error("{id}: the {what} of an existing slot cannot change")]
    Fixed {
        /// The slot.
        id: SlotId,
        /// Which of its properties.
        what: &'static str,
    },
    /// Another slot of the same address space has some of these guest addresses.
    #[error("{id}: {size:#x} bytes from guest address {:#x} overlap {with}", start.0)]
    Overlap {
        /// The slot.
        id: SlotId,
        /// The first guest address.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
        /// The other slot.
        with: SlotId,
    },
    /// Beyond what the host's MMU code can map.
    #[error("{id}: {size:#x} bytes from guest address {:#x} go beyond {last_gfn}, the last of this host", start.0)]
    BeyondLastGfn {
        /// The slot.
        id: SlotId,
        /// The first guest address.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
        /// The host's last frame.
        last_gfn: Gfn,
    },
}

impl Refusal {
    /// The errno that KVM gives: EEXIST for an overlap, EINVAL for everything else.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Overlap { .. } => libc::EEXIST,
            _ => libc::EINVAL,
        }
    }
}

impl Limits {
    /// One address space of `slots` slots, every guest frame.
    pub const fn new(slots: u32) -> Self {
        Self {
            slots,
            address_spaces: 1,
            last_gfn: Gfn(u64::MAX >> PAGE_SHIFT),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Delete => "delete",
            Self::Move => "move",
            Self::FlagsOnly => "change the flags of",
            Self::Nothing => "leave alone",
        })
    }
}

/// Everything but the other slots: what `request` does to `old`, the slot that has the id now.
///
/// # Errors
/// [`Refusal`], never `Overlap` or `BeyondLastGfn`, which [`SlotMap::check`] adds.
pub fn classify(
    old: Option<&SlotShape>,
    request: &MemoryRegion,
    limits: &Limits,
) -> Result<Change, Refusal> {
    let &MemoryRegion {
        id,
        flags,
        start,
        size,
        host,
    } = request;
    let known = SlotFlags::LOG_DIRTY_PAGES | SlotFlags::READ_ONLY;
    if !known.contains(flags) {
        return Err(Refusal::Flags { id, flags });
    }
    let numbers = [
        ("size", size),
        ("guest address", start.0),
        ("host address", host.0 as u64),
    ];
    for (what, value) in numbers {
        if !value.is_multiple_of(PAGE_SIZE) {
            return Err(Refusal::Unaligned { id, what, value });
        }
    }
    // The kernel's `access_ok`, as far as every host agrees on it: the upper half is the kernel's. The exact end of
    // user space is the host's (47 or 56 bits); mmap gives nothing beyond it.
    if (host.0 as u64)
        .checked_add(size)
        .is_none_or(|end| end >= 1 << 63)
    {
        return Err(Refusal::HostRange { id, host, size });
    }
    if u32::from(id.address_space()) >= limits.address_spaces
        || u32::from(id.index()) >= limits.slots
    {
        return Err(Refusal::Id {
            id,
            limits: *limits,
        });
    }
    // A range that ends exactly at 2^64 wraps to 0 in the kernel's sum too.
    if start.0.checked_add(size).is_none() {
        return Err(Refusal::Wraps { id, start, size });
    }
    let pages = size >> PAGE_SHIFT;
    if pages > MAX_PAGES {
        return Err(Refusal::TooManyPages { id, pages });
    }
    let Some(old) = old else {
        return if size == 0 {
            Err(Refusal::NoSuchSlot { id })
        } else {
            Ok(Change::Create)
        };
    };
    if size == 0 {
        return Ok(Change::Delete);
    }
    let fixed = [
        ("host address", host == old.host),
        ("size", size == old.size),
        (
            "read-only flag",
            !(flags ^ old.flags).contains(SlotFlags::READ_ONLY),
        ),
    ];
    for (what, same) in fixed {
        if !same {
            return Err(Refusal::Fixed { id, what });
        }
    }
    Ok(match (start == old.start, flags == old.flags) {
        (false, _) => Change::Move,
        (true, false) => Change::FlagsOnly,
        (true, true) => Change::Nothing,
    })
}

/// The slots that KVM has: a model in plain data, which accepts and refuses as KVM does.
///
/// ```
/// use memslots::{Change, Hva, Limits, MemoryRegion, SlotFlags, SlotId, SlotMap};
/// use vm_memory::GuestAddress;
/// let mut slots = SlotMap::new(Limits::new(32_764));
/// let mut request = MemoryRegion {
///     id: SlotId(0), flags: SlotFlags::NONE, start: GuestAddress(0), size: 0x4000, host: Hva(0x7000_0000),
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
}

impl SlotMap {
    /// No slots.
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            by_id: BTreeMap::new(),
            by_start: BTreeMap::new(),
        }
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
            if let Some(with) = self.overlap(id, start.0, size) {
                return Err(Refusal::Overlap {
                    id,
                    start,
                    size,
                    with,
                });
            }
            // After the overlap, as in KVM.
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
        let &MemoryRegion {
            id,
            flags,
            start,
            size,
            host,
        } = request;
        if let Some(old) = self.by_id.remove(&id) {
            self.by_start.remove(&(id.address_space(), old.start.0));
        }
        if change != Change::Delete {
            self.by_id.insert(
                id,
                SlotShape {
                    start,
                    size,
                    host,
                    flags,
                },
            );
            self.by_start.insert((id.address_space(), start.0), id);
        }
        Ok(change)
    }

    /// A slot other than `id`, of the same address space, that has a part of `start..start + size` (`size` > 0).
    fn overlap(&self, id: SlotId, start: u64, size: u64) -> Option<SlotId> {
        let space = id.address_space();
        // Slots do not overlap each other, so only the last two that begin before the end can reach into the range:
        // the last, or, if that one is `id` itself, the one before it.
        let before_the_end = self.by_start.range((space, 0)..(space, start + size));
        before_the_end
            .rev()
            .filter(|(_, other)| **other != id)
            .take(1)
            .find_map(|((_, from), other)| {
                let other_size = self.by_id.get(other)?.size;
                (from + other_size > start).then_some(*other)
            })
    }
}
