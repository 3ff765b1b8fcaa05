// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be refused, with the values that were refused.

use vmm_sys_util::errno;

use crate::ioeventfd::IoEvent;
use crate::range::{BusKind, IoRange};

/// Why a registration, a move or an ioeventfd was refused. Whatever failed has changed nothing.
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
}
