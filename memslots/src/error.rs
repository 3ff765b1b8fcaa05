// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`enum@Error`]: why the slots are not as they were asked to be.

use crate::classify::place;
use crate::{
    Change, Errno, MapError, MemoryRegion, PrivateRange, Refusal, SlotId, SlotShape, Veto,
};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;
use vm_memory::GuestAddress;

/// Why slots could not be made or changed. Except for [`Undo`](Self::Undo), everything is as it was before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// KVM would refuse it; it was not asked.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A slot without memory: in KVM's call a size of 0 deletes.
    #[error("a slot of 0 bytes at guest address {:#x}", start.0)]
    Empty {
        /// The first guest address asked for.
        start: GuestAddress,
    },
    /// KVM keeps some of these guest addresses for itself.
    #[error(
        "{size:#x} bytes from guest address {:#x} overlap {} ({:#x}..{:#x})",
        start.0, private.name, private.range.start, private.range.end
    )]
    Private {
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
        /// What is there.
        private: PrivateRange,
    },
    /// Two slots of a layout have some guest addresses in common.
    #[error(
        "the layout has {:#x}..{:#x} and {:#x}..{:#x}, which overlap",
        first.start, first.end, second.start, second.end
    )]
    LayoutOverlap {
        /// The guest addresses of the one that begins first.
        first: Range<u64>,
        /// The guest addresses of the other.
        second: Range<u64>,
    },
    /// A name means one slot.
    #[error("two slots have the name {name:?}")]
    NameTwice {
        /// The name.
        name: Arc<str>,
    },
    /// More slots than the host has ids for. Of a plan too: the ids of what it deletes come free only when the last
    /// reader has left.
    #[error("{wanted} more slots, but {available} of this host's {limit} are free")]
    NoFreeId {
        /// The slots asked for.
        wanted: usize,
        /// The ids that are free.
        available: usize,
        /// The host's limit.
        limit: u32,
    },
    /// The host gave no memory.
    #[error("no mapping of {size:#x} bytes for guest address {:#x}: {source}", start.0)]
    Map {
        /// Where in the guest it was to be.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
        /// The reason.
        source: MapError,
    },
    /// This VM can have no guest_memfd, and so no slot with private memory.
    #[error(
        "this VM can have no guest_memfd: its KVM lacks KVM_CAP_GUEST_MEMFD or KVM_CAP_USER_MEMORY2 for it"
    )]
    NoGuestMemfd,
    /// This VM can have no guest_memfd that this process maps as well.
    #[error(
        "this VM can have no guest_memfd that can be mapped: that takes Linux 6.18 or later, whose KVM has \
         KVM_CAP_GUEST_MEMFD_FLAGS with both flags, MMAP and INIT_SHARED"
    )]
    NoMappableGuestMemfd,
    /// A slot with a guest_memfd that can be mapped has other memory beside it: KVM would go to the one, this process to
    /// the other.
    #[error(
        "the slot at {:#x} has a guest_memfd that can be mapped, from {offset:#x} on, and its own memory is another: make \
         it of the same bytes (Backing::guest_memfd)", start.0
    )]
    OtherThanGuestMemfd {
        /// The slot's first address.
        start: GuestAddress,
        /// The offset in the guest_memfd, in bytes.
        offset: u64,
    },
    /// The host made no guest_memfd.
    #[error("no guest_memfd of {size:#x} bytes: {source}")]
    GuestMemfd {
        /// The size asked for, in bytes.
        size: u64,
        /// The reason; EINVAL for a size that is 0 or no multiple of the page size.
        source: Errno,
    },
    /// A [`Plan`](crate::Plan) or a [`GuestMemfd`](crate::GuestMemfd) is another VM's.
    #[error("the {what} is of another VM's memslots")]
    OtherVm {
        /// Which of the two.
        what: &'static str,
    },
    /// The slots have changed since the plan was made, so what it says of steps and gaps may be wrong: make another.
    #[error("the plan was made {changes} changes of the slots ago")]
    Stale {
        /// How many changes there were since.
        changes: u64,
    },
    /// A [`ChangeListener`](crate::ChangeListener) refused; KVM was not asked, and the listeners before it were told.
    #[error("a listener refused the change: {source}")]
    Vetoed {
        /// Its reason.
        source: Veto,
    },
    /// A [`ChangeListener`](crate::ChangeListener) tried to change the slots of whose change it was being told.
    #[error("a listener cannot change the slots of whose change it is being told")]
    InListener,
    /// KVM refused.
    #[error(
        "KVM did not {change} {} in step {step} of {steps}: {source}",
        request(region, old.as_deref())
    )]
    Kvm {
        /// What was to be done.
        change: Change,
        /// The request.
        region: MemoryRegion,
        /// The slot as it was, if it was there.
        old: Option<Box<SlotShape>>,
        /// Which of the calls it was, counted from 1.
        step: usize,
        /// How many calls there were to be.
        steps: usize,
        /// The reason.
        source: Errno,
    },
    /// A change failed, and then not all that had been done before it could be taken back. What KVM has is what readers
    /// see now, but for slots that [stay](Left::Stays); no memory is lost, and the next layout puts it right.
    #[error(
        "a failed change could not be taken back: {}; it failed because {cause}",
        list(left)
    )]
    Undo {
        /// The slots that are not as they were.
        left: Vec<Unrestored>,
        /// The first failure.
        #[source]
        cause: Box<Error>,
    },
}

/// A slot that a failed change has left other than it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unrestored {
    /// Which.
    pub id: SlotId,
    /// Its first guest address: where it is, or, of one that is missing, was.
    pub start: GuestAddress,
    /// Its size in bytes.
    pub size: u64,
    /// How it is now.
    pub left: Left,
    /// What KVM answered when it was to be put back.
    pub errno: Errno,
}

/// How a slot is after a change that failed and could not be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Left {
    /// It was not there before, and the guest sees it. Readers never did. It is deleted by the next plan, or with the
    /// [`Memslots`](crate::Memslots), and its memory stays mapped until then.
    Stays,
    /// It was there, and neither the guest nor readers see it any more. Its memory, with what is in it, is kept for the
    /// next layout that wants it.
    Missing,
    /// It is there, in another place or with other flags; readers see it as it is.
    Changed,
}

/// The slot of a request that was refused: where it was and where it was to be, of a deletion the former alone.
fn request(region: &MemoryRegion, old: Option<&SlotShape>) -> String {
    let new = place(region.id, region.start, region.size);
    match old {
        Some(old) if region.size == 0 => place(region.id, old.start, old.size),
        Some(old) if old.start != region.start => format!("{:#x} to {new}", old.start.0),
        _ => new,
    }
}

fn list(left: &[Unrestored]) -> String {
    let one = |slot: &Unrestored| {
        let how = match slot.left {
            Left::Stays => "stays",
            Left::Missing => "is missing",
            Left::Changed => "is changed",
        };
        let which = place(slot.id, slot.start, slot.size);
        format!("{which} {how} ({})", slot.errno)
    };
    left.iter().map(one).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Unrestored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&list(std::slice::from_ref(self)))
    }
}
