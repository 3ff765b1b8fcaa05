// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An IOAPIC's state as plain data.

#![forbid(unsafe_code)]

use thiserror::Error;

use super::{Ioapic, PINS, Redirection};
use crate::rules::IOAPIC_PINS;
use crate::version::StateVersion;

/// What an IOAPIC knows, to be saved and restored. [`kvm::abi`](crate::kvm::abi) has both
/// directions of `struct kvm_ioapic_state`, so a guest can move between KVM's IOAPIC and this one.
///
/// Which sources hold a line high is not in it: each device makes its sources anew and sets them
/// once, high or low.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct IoapicState {
    /// Of the serialized form.
    pub version: StateVersion,
    /// `IOREGSEL`: which register the window shows.
    pub ioregsel: u8,
    /// The chip's id, 4 bits.
    pub id: u8,
    /// The level of each line, a bit a pin.
    pub lines: u32,
    /// The redirection table, remote IRR included.
    pub redirections: [u64; IOAPIC_PINS as usize],
}

/// The state after reset.
impl Default for IoapicState {
    fn default() -> Self {
        Ioapic::new().state()
    }
}

impl IoapicState {
    /// Whether any IOAPIC could have it; which destinations there are is the VM's to say.
    pub(crate) fn check(&self) -> Result<(), IoapicStateError> {
        if self.id > 0xf {
            return Err(IoapicStateError::Id(self.id.into()));
        }
        if self.lines >> IOAPIC_PINS != 0 {
            return Err(IoapicStateError::Lines(self.lines));
        }
        Ok(())
    }
}

/// Why a state is none of this chip's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IoapicStateError {
    /// The id has more than four bits.
    #[error("an IOAPIC's id has four bits, not {0:#x}")]
    Id(u32),
    /// `IOREGSEL` has more than eight bits.
    #[error("IOREGSEL has eight bits, not {0:#x}")]
    Select(u32),
    /// A line that the chip has not is high.
    #[error("an IOAPIC has 24 lines, not those of {0:#x}")]
    Lines(u32),
    /// A destination above 255 in a VM without extended destinations: its interrupt would go to
    /// another vCPU.
    #[error("pin {pin} goes to an APIC id above 255 ({bits:#018x}), which this VM has not")]
    Destination {
        /// The pin.
        pin: u32,
        /// Its whole entry.
        bits: u64,
    },
}

impl Ioapic {
    /// The chip's state.
    pub fn state(&self) -> IoapicState {
        IoapicState {
            version: StateVersion::CURRENT,
            ioregsel: self.select,
            id: self.id,
            lines: self.lines,
            redirections: self.redirections.map(Redirection::bits),
        }
    }

    /// Takes a state on. Sends nothing: [`Ioapic::redeliver`] does, once the local APICs are
    /// restored. Reserved bits, which KVM's IOAPIC keeps, are dropped.
    ///
    /// # Errors
    ///
    /// [`IoapicStateError`]; the chip is then what it was.
    pub fn restore(&mut self, state: &IoapicState) -> Result<(), IoapicStateError> {
        state.check()?;
        let mut redirections = [Redirection::RESET; PINS];
        for ((pin, entry), bits) in (0..).zip(&mut redirections).zip(state.redirections) {
            if Redirection::names_extended(bits) && !self.extended {
                return Err(IoapicStateError::Destination { pin, bits });
            }
            *entry = Redirection::from_bits(bits, self.extended);
        }
        self.select = state.ioregsel;
        self.id = state.id;
        self.lines = state.lines;
        self.redirections = redirections;
        Ok(())
    }
}
