// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be refused, with the values that were refused.

use vmm_sys_util::errno;

use crate::ioeventfd::IoEvent;
use crate::range::{BusKind, IoRange};

/// Why a registration, a move, an ioeventfd or a coalesced zone was refused. Whatever failed has changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A range of no bytes. KVM's "length 0", one address for every length, is
    /// [`IoRange::exact`].
    #[error("an I/O range at {base:#x} has no bytes")]
    EmptyRange {
        /// Where it would begin.
        base: u64,
    },
    /// The range runs past the last 64-bit address.
    #[error("an I/O range of {size:#x} bytes at {base:#x} runs past the end of the address space")]
    WrappingRange {
        /// Where it would begin.
        base: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The range lies beyond the addresses that this bus has.
    #[error("the {bus} bus ends at {:#x}, before the range {range}", bus.last_address())]
    OutsideBus {
        /// The bus.
        bus: BusKind,
        /// The range that does not fit on it.
        range: IoRange,
    },
    /// The bus already has as many ranges as it may (`NR_IOBUS_DEVS` unless chosen otherwise).
    /// KVM answers ENOSPC here.
    #[error("the {bus} bus is full: it holds its {capacity} ranges already")]
    BusFull {
        /// The bus.
        bus: BusKind,
        /// Its capacity in ranges.
        capacity: usize,
    },
    /// The range was registered no longer, or its bus is gone.
    #[error("nothing is registered here any more at {range} on the {bus} bus")]
    NotRegistered {
        /// The bus.
        bus: BusKind,
        /// The range that the handle last had.
        range: IoRange,
    },
    /// KVM refused to attach an ioeventfd.
    #[error("KVM_IOEVENTFD refused {event}")]
    AssignIoEventFd {
        /// What was asked for.
        event: IoEvent,
        /// KVM's answer. EEXIST: another ioeventfd could match the same write. ENOSPC: KVM's own
        /// bus is full.
        source: errno::Error,
    },
    /// KVM refused to detach an ioeventfd, which is attached still.
    #[error("KVM_IOEVENTFD did not detach {event}")]
    DeassignIoEventFd {
        /// What was to be detached.
        event: IoEvent,
        /// KVM's answer.
        source: errno::Error,
    },
    /// The write would not be one to this range.
    #[error(
        "offset {offset:#x} is no place for an ioeventfd in the range {range} on the {bus} bus"
    )]
    OutsideRange {
        /// The bus.
        bus: BusKind,
        /// The registration's range.
        range: IoRange,
        /// Where in it the ioeventfd should be, in bytes.
        offset: u64,
    },
    /// The registration has no such ioeventfd (any more).
    #[error("the registration has no such ioeventfd")]
    NoSuchIoEvent,
    /// A virtual machine has one ring of coalesced writes, and these buses have theirs.
    #[error("these buses have their ring of coalesced writes already")]
    RingAttached,
    /// The memory is too small for a ring: one entry is always free.
    #[error("a ring of coalesced writes needs room for two entries, and {words} words have none")]
    RingTooSmall {
        /// Its size in 32-bit words.
        words: usize,
    },
    /// This host's KVM shares no ring, or the mapping of it failed.
    #[error("the ring of coalesced writes could not be mapped")]
    MapRing {
        /// ENOSYS if KVM lacks the capability, otherwise `mmap`'s answer.
        source: errno::Error,
    },
    /// Without the ring, a zone's writes would be lost.
    #[error(
        "attach_coalesced_ring first: writes to {range} on the {bus} bus have no ring to be kept in"
    )]
    NoRing {
        /// The bus.
        bus: BusKind,
        /// The zone that was asked for.
        range: IoRange,
    },
    /// KVM coalesces on MMIO and PIO alone, and ranges of up to 4 GiB - 1.
    #[error("{range} on the {bus} bus is nothing that KVM can coalesce")]
    NotCoalescible {
        /// The bus.
        bus: BusKind,
        /// The zone that was asked for.
        range: IoRange,
    },
    /// This host's KVM does not coalesce writes on that bus.
    #[error("this host's KVM does not coalesce writes on the {bus} bus")]
    CannotCoalesce {
        /// The bus.
        bus: BusKind,
    },
    /// Two zones that overlap: KVM would take them, and drop both with one of them.
    #[error("the zone {range} on the {bus} bus overlaps the zone {other}")]
    ZoneOverlap {
        /// The bus.
        bus: BusKind,
        /// The zone that was asked for.
        range: IoRange,
        /// The zone that there is.
        other: IoRange,
    },
    /// KVM refused a zone.
    #[error("KVM_REGISTER_COALESCED_MMIO refused {range} on the {bus} bus")]
    RegisterZone {
        /// The bus.
        bus: BusKind,
        /// The zone that was asked for.
        range: IoRange,
        /// KVM's answer. ENOSPC: KVM's own bus is full.
        source: errno::Error,
    },
    /// KVM refused to end a zone, which is there still.
    #[error("KVM_UNREGISTER_COALESCED_MMIO refused {range} on the {bus} bus")]
    UnregisterZone {
        /// The bus.
        bus: BusKind,
        /// The zone.
        range: IoRange,
        /// KVM's answer.
        source: errno::Error,
    },
}
