// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a `KVM_SET_USER_MEMORY_REGION` would do, decided without asking KVM: pure arithmetic on the request, the slot
//! that has the id now, and the other slots. The rules, and the order in which they are looked at, are those of today's
//! `__kvm_set_memory_region`; `tests/kvm_oracle.rs` asks the host's KVM the same questions.
//!
//! It knows none of KVM's private ranges: see [`PrivateRanges`](crate::PrivateRanges) for that policy.

use crate::{Gfn, Hva, PAGE_SHIFT, PAGE_SIZE, SlotFlags, SlotId};
use std::fmt;
use std::os::fd::RawFd;
use thiserror::Error;
use vm_memory::GuestAddress;

/// The most pages that one slot can have (`KVM_MEM_MAX_NR_PAGES`): a dirty bitmap is indexed by a 32-bit number.
pub const MAX_PAGES: u64 = (1 << 31) - 1;

/// The argument of `KVM_SET_USER_MEMORY_REGION`, or, with a [`guest_memfd`](Self::guest_memfd), of
/// `KVM_SET_USER_MEMORY_REGION2`: a request, legal or not.
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
    /// Its private memory. With it, the request is one for the newer of the two calls, which looks at it only if
    /// [`SlotFlags::GUEST_MEMFD`] is set; without it, one for the older call, which every host has.
    pub guest_memfd: Option<GuestMemfdRange>,
}

/// Where in a guest_memfd a slot's private memory begins; it is as long as the slot.
///
/// The classifier takes the descriptor for the file: one file has one descriptor here, and it is a guest_memfd of this
/// VM ([`GuestMemfd`](crate::GuestMemfd) sees to both).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestMemfdRange {
    /// The file.
    pub fd: RawFd,
    /// The first byte in it.
    pub offset: u64,
    /// The size of the whole file in bytes, which its creation has fixed.
    pub file_size: u64,
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
    /// The private memory, of a slot with [`SlotFlags::GUEST_MEMFD`].
    pub guest_memfd: Option<GuestMemfdRange>,
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
    /// Whether this VM can have guest_memfd slots (`KVM_CAP_GUEST_MEMFD` asked of the VM: on some kernels only certain
    /// types of VM can). [`Limits::new`] says no.
    pub guest_memfd: bool,
}

/// Why KVM would refuse a request.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Flags that KVM does not know, or not in this call.
    #[error("{}: flags {flags:?} are not known to this call", at(*id, *start, *size))]
    Flags {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
        /// The flags asked for.
        flags: SlotFlags,
    },
    /// A number that is not a multiple of [`PAGE_SIZE`].
    #[error(
        "{}: the {what} {value:#x} is not a multiple of the page size {PAGE_SIZE:#x}",
        at(*id, *start, *size)
    )]
    Unaligned {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The host addresses are not user space's.
    #[error(
        "{}: {size:#x} bytes from the host address {host} are not in user space",
        at(*id, *start, *size)
    )]
    HostRange {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
        /// The first host address.
        host: Hva,
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
    #[error("{size:#x} bytes from guest address {:#x} wrap around the end of the address space", start.0)]
    Wraps {
        /// The slot.
        id: SlotId,
        /// The first guest address.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
    },
    /// More than [`MAX_PAGES`].
    #[error("{}: {pages} pages are more than a slot can have ({MAX_PAGES})", at(*id, *start, *size))]
    TooManyPages {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
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
    #[error("{}: the {what} of an existing slot cannot change", at(*id, *start, *size))]
    Fixed {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
        /// Which of its properties.
        what: &'static str,
    },
    /// Another slot of the same address space has some of these guest addresses.
    #[error("{} overlap {}", at(*id, *start, *size), place(*with, *with_start, *with_size))]
    Overlap {
        /// The slot.
        id: SlotId,
        /// The first guest address.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
        /// The other slot.
        with: SlotId,
        /// Its first guest address.
        with_start: GuestAddress,
        /// Its size in bytes.
        with_size: u64,
    },
    /// A slot with a guest_memfd is as it was made until it is deleted: it cannot move, and its flags cannot change.
    #[error("{}: a slot with a guest_memfd can only be deleted, not changed", at(*id, *start, *size))]
    GuestMemfdFixed {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The slot's private memory would not lie within its guest_memfd.
    #[error(
        "{}: {size:#x} bytes from offset {:#x} are not within a guest_memfd of {:#x} bytes",
        at(*id, *start, *size), memory.offset, memory.file_size
    )]
    GuestMemfdRange {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
        /// Where in which file.
        memory: GuestMemfdRange,
    },
    /// Another slot has some of these bytes of the guest_memfd.
    #[error(
        "{}: {size:#x} bytes from offset {:#x} of the guest_memfd are in part those of {}",
        at(*id, *start, *size), memory.offset, place(*with, *with_start, *with_size)
    )]
    GuestMemfdBound {
        /// The slot.
        id: SlotId,
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size asked for, in bytes.
        size: u64,
        /// Where in which file.
        memory: GuestMemfdRange,
        /// The other slot.
        with: SlotId,
        /// Its first guest address.
        with_start: GuestAddress,
        /// Its size in bytes.
        with_size: u64,
    },
    /// Beyond what the host's MMU code can map.
    #[error("{} go beyond {last_gfn}, the last of this host", at(*id, *start, *size))]
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

/// A slot by its guest addresses, which is how a user knows it, and by its id, which is how KVM does.
pub(crate) fn place(id: SlotId, start: GuestAddress, size: u64) -> String {
    match size {
        // Nothing but the id means anything in a deletion.
        0 => id.to_string(),
        size => format!("{:#x}..{:#x} ({id})", start.0, start.0.saturating_add(size)),
    }
}

fn at(id: SlotId, start: GuestAddress, size: u64) -> String {
    let what = if size == 0 { "" } else { "guest addresses " };
    format!("{what}{}", place(id, start, size))
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
            guest_memfd: false,
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
/// [`Refusal`], never one that is about other slots or about the host's last frame: [`SlotMap::check`] adds those.
///
/// [`SlotMap::check`]: crate::SlotMap::check
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
        guest_memfd,
    } = request;
    // The older call knows nothing of guest_memfds, whatever the host can do.
    let private = flags.contains(SlotFlags::GUEST_MEMFD);
    let known = if private && limits.guest_memfd && guest_memfd.is_some() {
        SlotFlags::GUEST_MEMFD
    } else {
        SlotFlags::LOG_DIRTY_PAGES | SlotFlags::READ_ONLY
    };
    if !known.contains(flags) {
        return Err(Refusal::Flags {
            id,
            start,
            size,
            flags,
        });
    }
    let aligned = |what, value: u64| {
        if value.is_multiple_of(PAGE_SIZE) {
            return Ok(());
        }
        Err(Refusal::Unaligned {
            id,
            start,
            size,
            what,
            value,
        })
    };
    let numbers = [
        ("size", size),
        ("guest address", start.0),
        ("host address", host.0 as u64),
    ];
    for (what, value) in numbers {
        aligned(what, value)?;
    }
    // The kernel's `access_ok`, as far as every host agrees on it: the upper half is the kernel's. The exact end of
    // user space is the host's (47 or 56 bits); mmap gives nothing beyond it.
    if (host.0 as u64)
        .checked_add(size)
        .is_none_or(|end| end >= 1 << 63)
    {
        return Err(Refusal::HostRange {
            id,
            start,
            size,
            host,
        });
    }
    if let (true, Some(memory)) = (private, guest_memfd) {
        aligned("guest_memfd offset", memory.offset)?;
        if memory.offset.checked_add(size).is_none() {
            return Err(Refusal::GuestMemfdRange {
                id,
                start,
                size,
                memory,
            });
        }
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
        return Err(Refusal::TooManyPages {
            id,
            start,
            size,
            pages,
        });
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
    // Even one that describes the slot as it is.
    if private {
        return Err(Refusal::GuestMemfdFixed { id, start, size });
    }
    let fixed = [
        ("host address", host == old.host),
        ("size", size == old.size),
        (
            "read-only flag",
            !(flags ^ old.flags).contains(SlotFlags::READ_ONLY),
        ),
        ("guest_memfd", !old.flags.contains(SlotFlags::GUEST_MEMFD)),
    ];
    for (what, same) in fixed {
        if !same {
            return Err(Refusal::Fixed {
                id,
                start,
                size,
                what,
            });
        }
    }
    Ok(match (start == old.start, flags == old.flags) {
        (false, _) => Change::Move,
        (true, false) => Change::FlagsOnly,
        (true, true) => Change::Nothing,
    })
}
