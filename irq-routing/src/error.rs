// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with the table and what hangs on it.

#![forbid(unsafe_code)]

use std::io;

use thiserror::Error;

use crate::gsi::Gsi;
use crate::host::Errno;
use crate::irqchip::IrqchipKind;
use crate::route::Msi;
use crate::rules::{IOAPIC_PINS, RouteError};

/// What went wrong with the table or with something attached to it. The call that returns it
/// changed nothing.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A `try_` call would have had to wait for a lock, or for a grace period of the kernel's. The
    /// form without `try_` does so.
    #[error("this cannot be done now without waiting")]
    WouldBlock,
    /// The GSI goes to a pin or elsewhere, where a message was wanted.
    #[error("{0} is not routed to a message")]
    NoMessage(Gsi),
    /// The VM has no irqchip in the kernel (`IrqchipKind::None`): nothing can be raised.
    #[error("the VM has no irqchip in the kernel, nothing can raise an interrupt")]
    NoIrqchip,
    /// The GSI has an owner already.
    #[error("{0} is taken")]
    GsiTaken(Gsi),
    /// Every GSI that was asked for is taken.
    #[error("no free GSI from {start} to below {end}")]
    NoFreeGsi {
        /// The first GSI that would have done.
        start: u32,
        /// Below the host's limit already.
        end: u32,
    },
    /// The handle belongs to another VM's table.
    #[error("{0} belongs to another routing table")]
    ForeignGsi(Gsi),
    /// KVM would refuse the entry; it was not asked.
    #[error("the route is not possible")]
    Route(#[from] RouteError),
    /// `KVM_SET_GSI_ROUTING` failed: the table is what it was.
    #[error("KVM_SET_GSI_ROUTING with {entries} entries failed")]
    SetRouting {
        /// How large the refused table was.
        entries: usize,
        /// KVM's answer.
        #[source]
        source: Errno,
    },
    /// `KVM_IRQFD` failed: EBUSY when the eventfd is attached already, EINVAL for resampling
    /// without an IOAPIC in the kernel.
    #[error("KVM_IRQFD failed to attach an eventfd to {gsi}")]
    Attach {
        /// What the eventfd was to raise.
        gsi: Gsi,
        /// KVM's answer.
        #[source]
        source: Errno,
    },
    /// `KVM_IRQFD` failed to detach: the eventfd is still attached.
    #[error("KVM_IRQFD failed to detach an eventfd from {gsi}")]
    Detach {
        /// What the eventfd raises.
        gsi: Gsi,
        /// KVM's answer.
        #[source]
        source: Errno,
    },
    /// An eventfd could not be made or written.
    #[error("the eventfd for {gsi} failed")]
    EventFd {
        /// What the eventfd raises.
        gsi: Gsi,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// `KVM_IRQ_LINE_STATUS` failed: the line is what it was.
    #[error("KVM_IRQ_LINE_STATUS failed to set {gsi} to {}", u8::from(*level))]
    Line {
        /// The line.
        gsi: Gsi,
        /// The level that it was to have.
        level: bool,
        /// KVM's answer.
        #[source]
        source: Errno,
    },
    /// The VM's irqchip is not a split one with a reserved GSI for each pin of an IOAPIC in user
    /// space.
    #[error("an IOAPIC in user space needs a split irqchip with {IOAPIC_PINS} pins, not {0:?}")]
    NotSplit(IrqchipKind),
    /// The GSI is no pin of the IOAPIC.
    #[error("{0} is no pin of the IOAPIC, which has {IOAPIC_PINS}")]
    NoPin(Gsi),
    /// `KVM_SIGNAL_MSI` failed.
    #[error("KVM_SIGNAL_MSI of {:#x} to {:#x} failed", msi.data, msi.address)]
    SignalMsi {
        /// The message.
        msi: Msi,
        /// KVM's answer.
        #[source]
        source: Errno,
    },
}
