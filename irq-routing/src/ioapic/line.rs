// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source of a pin's line: what a device holds to raise a pin of the IOAPIC in user space.

#![forbid(unsafe_code)]

use super::SplitIoapic;
use crate::error::Error;
use crate::host::{SetGsiRouting, SignalMsi};
use crate::level::Level;
use crate::line::{Arrival, LevelSource};
use crate::routing::GsiHandle;

/// One source of the line to a pin, made by [`SplitIoapic::line`]. The line is high while any of its
/// sources is. Dropped while high, it is lowered.
#[derive(Debug)]
pub struct PinLine<H: SetGsiRouting + SignalMsi + Clone> {
    ioapic: SplitIoapic<H>,
    gsi: GsiHandle,
    level: Level,
}

impl<H: SetGsiRouting + SignalMsi + Clone> PinLine<H> {
    pub(super) fn new(ioapic: SplitIoapic<H>, gsi: GsiHandle) -> Self {
        Self {
            ioapic,
            gsi,
            level: Level::default(),
        }
    }

    /// Sets the source's level (`kvm_set_irq`). A level-triggered pin interrupts while its line is
    /// high, again after each EOI; an edge-triggered one when the line rises.
    ///
    /// Of a rise it says what became of the interrupt: [`Arrival::Delivered`];
    /// [`Arrival::Coalesced`] where the EOI of the one before is outstanding, or the line was high
    /// and the pin is edge-triggered; [`Arrival::Masked`] where the pin is masked or no APIC took
    /// it, and then a level-triggered one waits. A fall is [`Arrival::Delivered`] to one.
    ///
    /// Costs a `KVM_SIGNAL_MSI` where there is something to send, and a commit before it where the
    /// guest changed the entry of a level-triggered pin.
    ///
    /// # Errors
    ///
    /// [`Error::SignalMsi`]; as [`Change::commit`](crate::Change::commit). The source's level is
    /// then what it was.
    pub fn set(&self, level: bool) -> Result<Arrival, Error> {
        self.level.set(level, |was, level| self.tell(was, level))
    }

    /// Raises and lowers: one edge, if no other source holds the line high.
    ///
    /// # Errors
    ///
    /// As [`PinLine::set`]; lowering does not fail.
    pub fn pulse(&self) -> Result<Arrival, Error> {
        self.level.pulse(|was, level| self.tell(was, level))
    }

    /// The GSI, which is the pin.
    pub fn gsi(&self) -> &GsiHandle {
        &self.gsi
    }

    fn tell(&self, was: bool, level: bool) -> Result<Arrival, Error> {
        self.ioapic.set_source(self.gsi.gsi().0, was, level)
    }
}

impl<H: SetGsiRouting + SignalMsi + Clone + Send + Sync> LevelSource for PinLine<H> {
    fn set(&self, level: bool) -> Result<Arrival, Error> {
        PinLine::set(self, level)
    }
}

/// A device's edge: [`PinLine::pulse`].
#[cfg(feature = "vm-superio")]
impl<H: SetGsiRouting + SignalMsi + Clone> vm_superio::Trigger for PinLine<H> {
    type E = Error;

    fn trigger(&self) -> Result<(), Error> {
        self.pulse().map(drop)
    }
}

impl<H: SetGsiRouting + SignalMsi + Clone> Drop for PinLine<H> {
    fn drop(&mut self) {
        // Lowering sends nothing, so it does not fail.
        let _ = self.level.lower(|was, level| self.tell(was, level));
    }
}
