// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saving the controllers that are KVM's, and restoring them.
//!
//! The order is part of it:
//!
//! ```text
//!   save      timer ─► second PIC ─► first PIC ─► IOAPIC
//!   restore   second PIC ─► first PIC ─► IOAPIC ─► timer
//! ```
//!
//! The timer runs while the vCPUs stand still. Saved first, a tick of its is in the PICs' and the
//! IOAPIC's state at worst as well, never in none; restored last, its first tick finds them restored.
//! The second PIC goes before the first, because whenever KVM takes the state of one on it asks the
//! second whether something waits there and tells pin 2 of the first: the other way round, what
//! waited before the restore would wait afterwards.

#![forbid(unsafe_code)]

use std::fmt;

use thiserror::Error;

use super::{Irqchip, IrqchipKind, PicState, Pit, PitState};
use crate::host::{AccessIrqchip, Errno};
use crate::ioapic::{IoapicState, IoapicStateError};
use crate::version::StateVersion;

/// What a VM's controllers know, as far as they are in the kernel and no vCPU's (the local APICs go
/// with their vCPUs). Made by [`Irqchip::state`].
///
/// Which serialized forms are read is [`StateVersion`]'s policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[allow(clippy::large_enum_variant, reason = "a VM has one, for a moment")]
pub enum IrqchipState {
    /// Of [`IrqchipKind::None`]: nothing.
    None,
    /// Of [`IrqchipKind::Kernel`].
    Kernel(KernelIrqchipState),
    /// Of [`IrqchipKind::Split`]: nothing that is in the kernel. The IOAPIC's is
    /// [`SplitIoapic::state`](crate::ioapic::SplitIoapic::state).
    Split,
}

/// What the in-kernel irqchip knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct KernelIrqchipState {
    /// Of the serialized form.
    pub version: StateVersion,
    /// Both PICs: pins 0 to 7 of a PC's 16, and 8 to 15.
    pub pics: [PicState; 2],
    /// The IOAPIC. A guest that is to move to a split irqchip takes this one with it
    /// ([`SplitIoapic::restore`](crate::ioapic::SplitIoapic::restore)), and back.
    pub ioapic: IoapicState,
    /// The timer, where there is one.
    pub pit: Option<PitState>,
}

/// A part of the in-kernel irqchip, saved and restored by one ioctl.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IrqchipPart {
    /// The PIC of pins 0 to 7 (`KVM_IRQCHIP_PIC_MASTER`).
    FirstPic,
    /// The PIC of pins 8 to 15 (`KVM_IRQCHIP_PIC_SLAVE`).
    SecondPic,
    /// The IOAPIC (`KVM_IRQCHIP_IOAPIC`).
    Ioapic,
    /// The timer.
    Pit,
}

impl IrqchipPart {
    /// The order in which a state is restored.
    pub const RESTORE_ORDER: &'static [IrqchipPart] = &[
        IrqchipPart::SecondPic,
        IrqchipPart::FirstPic,
        IrqchipPart::Ioapic,
        IrqchipPart::Pit,
    ];

    /// The ioctl that does this to the part.
    fn ioctl(self, verb: &str) -> String {
        let of = match self {
            IrqchipPart::Pit => "PIT2",
            IrqchipPart::FirstPic | IrqchipPart::SecondPic | IrqchipPart::Ioapic => "IRQCHIP",
        };
        format!("KVM_{verb}_{of}")
    }
}

impl fmt::Display for IrqchipPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IrqchipPart::FirstPic => "first PIC",
            IrqchipPart::SecondPic => "second PIC",
            IrqchipPart::Ioapic => "IOAPIC",
            IrqchipPart::Pit => "timer",
        })
    }
}

/// Why a state was not saved or restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IrqchipStateError {
    /// A part did not give its state. Nothing was changed.
    #[error("{} of the {part} failed", part.ioctl("GET"))]
    Save {
        /// Which part.
        part: IrqchipPart,
        /// KVM's answer: ENXIO where the VM has no such part.
        #[source]
        source: Errno,
    },
    /// The state is of other controllers than the VM has. Nothing was changed.
    #[error("a state of {state} is not for a VM with {vm}")]
    Kind {
        /// Whose the state is, in words.
        state: &'static str,
        /// What the VM has, in words.
        vm: &'static str,
    },
    /// The IOAPIC's state is none. Nothing was changed.
    #[error("the IOAPIC's state is not possible")]
    Ioapic(#[from] IoapicStateError),
    /// A part did not take its state: it and those after it are what they were, those before it
    /// are as the state has them. Restoring again is possible, from the first part on.
    #[error("{} of the {part} failed; restored before it: {}", part.ioctl("SET"), list(restored))]
    Restore {
        /// Which part.
        part: IrqchipPart,
        /// The parts that have been restored.
        restored: &'static [IrqchipPart],
        /// KVM's answer: ENXIO where the VM has no such part.
        #[source]
        source: Errno,
    },
}

impl Irqchip {
    /// What the controllers know. To be called while no vCPU runs, no device raises and no irqfd
    /// does, or the parts are not of one moment.
    ///
    /// Costs an ioctl a part, none of which waits for a grace period.
    ///
    /// # Errors
    ///
    /// [`IrqchipStateError::Save`].
    pub fn state<H: AccessIrqchip>(&self, host: &H) -> Result<IrqchipState, IrqchipStateError> {
        let IrqchipKind::Kernel { pit } = self.kind else {
            return Ok(match self.kind {
                IrqchipKind::Split { .. } => IrqchipState::Split,
                _ => IrqchipState::None,
            });
        };
        let failed = |part| move |source| IrqchipStateError::Save { part, source };
        let pit = match pit {
            Pit::Absent => None,
            Pit::Present | Pit::PresentWithSpeaker => {
                Some(host.pit().map_err(failed(IrqchipPart::Pit))?)
            }
        };
        let second = host.pic(1).map_err(failed(IrqchipPart::SecondPic))?;
        let first = host.pic(0).map_err(failed(IrqchipPart::FirstPic))?;
        let ioapic = host.ioapic().map_err(failed(IrqchipPart::Ioapic))?;
        let pics = [first, second];
        Ok(IrqchipState::Kernel(KernelIrqchipState {
            version: StateVersion::CURRENT,
            pics,
            ioapic,
            pit,
        }))
    }

    /// Lets the controllers take a state on. To be called when the local APICs have theirs (one that
    /// is set later forgets what the IOAPIC has just sent it) and before the vCPUs run; then the
    /// devices set their lines once more.
    ///
    /// Costs an ioctl a part, none of which waits for a grace period.
    ///
    /// # Errors
    ///
    /// [`IrqchipStateError::Kind`] and [`IrqchipStateError::Ioapic`] have changed nothing;
    /// [`IrqchipStateError::Restore`] says how far it came.
    pub fn restore<H: AccessIrqchip>(
        &self,
        host: &H,
        state: &IrqchipState,
    ) -> Result<(), IrqchipStateError> {
        let mismatch = IrqchipStateError::Kind {
            state: state.in_words(),
            vm: self.kind.in_words(),
        };
        let (state, pit) = match (state, self.kind) {
            (IrqchipState::None, IrqchipKind::None) => return Ok(()),
            (IrqchipState::Split, IrqchipKind::Split { .. }) => return Ok(()),
            (IrqchipState::Kernel(state), IrqchipKind::Kernel { pit }) => (state, pit),
            _ => return Err(mismatch),
        };
        if state.pit.is_some() != (pit != Pit::Absent) {
            return Err(mismatch);
        }
        state.ioapic.check()?;
        let [first, second] = &state.pics;
        for (done, &part) in IrqchipPart::RESTORE_ORDER.iter().enumerate() {
            let set = match part {
                IrqchipPart::SecondPic => host.set_pic(1, second),
                IrqchipPart::FirstPic => host.set_pic(0, first),
                IrqchipPart::Ioapic => host.set_ioapic(&state.ioapic),
                IrqchipPart::Pit => state.pit.map_or(Ok(()), |pit| host.set_pit(&pit)),
            };
            let restored = &IrqchipPart::RESTORE_ORDER[..done];
            set.map_err(|source| IrqchipStateError::Restore {
                part,
                restored,
                source,
            })?;
        }
        Ok(())
    }
}

const KERNEL: &str = "KVM's PICs and IOAPIC and no timer";
const KERNEL_WITH_PIT: &str = "KVM's PICs, IOAPIC and timer";

impl IrqchipState {
    fn in_words(&self) -> &'static str {
        match self {
            IrqchipState::None => "no irqchip",
            IrqchipState::Kernel(KernelIrqchipState { pit: None, .. }) => KERNEL,
            IrqchipState::Kernel(_) => KERNEL_WITH_PIT,
            IrqchipState::Split => "a split irqchip",
        }
    }
}

impl IrqchipKind {
    fn in_words(self) -> &'static str {
        match self {
            IrqchipKind::None => "no irqchip",
            IrqchipKind::Kernel { pit: Pit::Absent } => KERNEL,
            IrqchipKind::Kernel { .. } => KERNEL_WITH_PIT,
            IrqchipKind::Split { .. } => "a split irqchip",
        }
    }
}

fn list(parts: &[IrqchipPart]) -> String {
    if parts.is_empty() {
        return "nothing".into();
    }
    let names: Vec<_> = parts.iter().map(IrqchipPart::to_string).collect();
    names.join(", ")
}
