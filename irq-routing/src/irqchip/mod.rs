// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interrupt controllers that KVM has for a VM: which, making them, and their state.

#![forbid(unsafe_code)]

mod pic;
mod pit;
mod state;

use thiserror::Error;

use crate::host::{CreateIrqchip, Errno};

pub use pic::PicState;
pub use pit::{PitChannelState, PitState};
pub use state::{IrqchipPart, IrqchipState, IrqchipStateError, KernelIrqchipState};

/// The 8254 timer that goes with the in-kernel irqchip.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Pit {
    /// None: the guest has other timers, or a device model of the VMM's.
    #[default]
    Absent,
    /// In the kernel; port 0x61 (the speaker's gate, and timer 2's) stays with the VMM.
    Present,
    /// In the kernel, and port 0x61 as well (`KVM_PIT_SPEAKER_DUMMY`): what a guest that calibrates
    /// its clock by timer 2, as Linux does, needs where the VMM has no device there.
    PresentWithSpeaker,
}

/// Which interrupt controllers are in the kernel. Chosen once, before the first vCPU.
///
/// Cost: making or freeing [`Kernel`](IrqchipKind::Kernel) waits for grace periods inside KVM (its
/// devices sit on KVM's own buses; about 15 ms at the VM's end on the development hosts, and more
/// for memory slots made after it), the other two do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IrqchipKind {
    /// None, not even local APICs: no routes, no irqfds, no MSIs.
    #[default]
    None,
    /// Local APICs, IOAPIC and both PICs.
    Kernel {
        /// The timer.
        pit: Pit,
    },
    /// Local APICs only; IOAPIC and PICs are the VMM's. Interrupts arrive as MSI routes.
    Split {
        /// GSIs `0..pins` are the pins of the VMM's IOAPIC: KVM reports the end of a
        /// level-triggered interrupt routed from these (`KVM_EXIT_IOAPIC_EOI`). At most the host's
        /// route limit.
        pins: u32,
    },
}

/// What went wrong with making the controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IrqchipError {
    /// The host's KVM has no such irqchip. Nothing was changed.
    #[error("this host's KVM has no {0}")]
    Unsupported(&'static str),
    /// `KVM_CREATE_IRQCHIP` failed: EEXIST where there is one, EINVAL after the first vCPU. Nothing
    /// was changed.
    #[error("KVM_CREATE_IRQCHIP failed")]
    Kernel(#[source] Errno),
    /// `KVM_CAP_SPLIT_IRQCHIP` failed: EEXIST where there is an irqchip or a vCPU, EINVAL with more
    /// pins than the host takes. Nothing was changed.
    #[error("KVM_CAP_SPLIT_IRQCHIP with {pins} pins failed")]
    Split {
        /// The pins asked for.
        pins: u32,
        /// KVM's answer.
        #[source]
        source: Errno,
    },
    /// `KVM_CREATE_PIT2` failed after the irqchip was made, which KVM cannot undo: the VM has
    /// `made`.
    #[error("KVM_CREATE_PIT2 failed; the VM has the irqchip without the timer")]
    Pit {
        /// What the VM has: go on without the timer, or give the VM up.
        made: Irqchip,
        /// KVM's answer.
        #[source]
        source: Errno,
    },
}

/// The interrupt controllers of one VM, made: what [`Routing`](crate::Routing) must know to begin.
/// [`state`](Irqchip::state) and [`restore`](Irqchip::restore) are for snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Irqchip {
    kind: IrqchipKind,
}

impl Irqchip {
    /// Makes the controllers. To be called before the VM's first vCPU; memory slots come first
    /// where they can (a slot made after the in-kernel irqchip waits for a grace period).
    ///
    /// # Errors
    ///
    /// [`IrqchipError`]. All but [`IrqchipError::Pit`] have changed nothing; what can be known to
    /// fail is asked before anything is made.
    pub fn create<H: CreateIrqchip>(host: &H, kind: IrqchipKind) -> Result<Self, IrqchipError> {
        match kind {
            IrqchipKind::None => {}
            IrqchipKind::Kernel { pit } => {
                if pit != Pit::Absent && !host.has_pit2() {
                    return Err(IrqchipError::Unsupported(
                        "timer in the kernel (KVM_CAP_PIT2)",
                    ));
                }
                host.create_irqchip().map_err(IrqchipError::Kernel)?;
                if pit != Pit::Absent {
                    let speaker = pit == Pit::PresentWithSpeaker;
                    host.create_pit2(speaker).map_err(|source| {
                        let pit = Pit::Absent;
                        let made = Self::assume(IrqchipKind::Kernel { pit });
                        IrqchipError::Pit { made, source }
                    })?;
                }
            }
            IrqchipKind::Split { pins } => {
                if !host.has_split_irqchip() {
                    return Err(IrqchipError::Unsupported(
                        "split irqchip (KVM_CAP_SPLIT_IRQCHIP)",
                    ));
                }
                host.create_split_irqchip(pins)
                    .map_err(|source| IrqchipError::Split { pins, source })?;
            }
        }
        Ok(Self { kind })
    }

    /// The controllers of a VM that someone else made so. A wrong claim costs errors from KVM,
    /// nothing worse.
    pub fn assume(kind: IrqchipKind) -> Self {
        Self { kind }
    }

    /// Which controllers they are.
    pub fn kind(&self) -> IrqchipKind {
        self.kind
    }
}
