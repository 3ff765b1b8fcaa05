// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A source of a pin's line: what a device holds to raise a pin of the IOAPIC in user space.

#![forbid(unsafe_code)]

use super::SplitIoapic;
use crate::error::Error;
use crate::host::{SetGsiRouting, SignalMsi};
use crate::level::Level;
use crate::line::{Arrival, LevelSource};
use crate::routing::GsiHandle;
use crate::wait::Wait;

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
        self.set_with(level, Wait::Allowed)
    }

    /// The same, and never waits: neither for another thread, nor for the guest's access or EOI that
    /// is under way in the chip, nor for a commit.
    ///
    /// # Errors
    ///
    /// [`Error::WouldBlock`], of a level-triggered pin also while its route is not KVM's yet: the
    /// first [`PinLine::set`] after the guest changed the entry commits it, and so does
    /// [`Routing::flush`](crate::Routing::flush). [`Error::SignalMsi`]. The source's level is then
    /// what it was, and nothing was sent.
    pub fn try_set(&self, level: bool) -> Result<Arrival, Error> {
        self.set_with(level, Wait::Never)
    }

    /// Raises and lowers, with nothing in between: one edge, if no other source holds the line high.
    /// Of a level-triggered pin that is [`Arrival::Delivered`] it is one interrupt, and none where
    /// it is not.
    ///
    /// # Errors
    ///
    /// As [`PinLine::set`]; lowering does not fail.
    pub fn pulse(&self) -> Result<Arrival, Error> {
        self.pulse_with(Wait::Allowed)
    }

    /// The same, and never waits.
    ///
    /// # Errors
    ///
    /// As [`PinLine::try_set`].
    pub fn try_pulse(&self) -> Result<Arrival, Error> {
        self.pulse_with(Wait::Never)
    }

    /// The GSI, which is the pin.
    pub fn gsi(&self) -> &GsiHandle {
        &self.gsi
    }

    fn set_with(&self, level: bool, wait: Wait) -> Result<Arrival, Error> {
        let mut held = self.level.hold(wait)?;
        held.set(level, |was, level| self.tell(was, level, wait))
    }

    fn pulse_with(&self, wait: Wait) -> Result<Arrival, Error> {
        let mut held = self.level.hold(wait)?;
        let pin = self.gsi.gsi().0;
        held.set(false, |was, _| self.ioapic.pulse_source(pin, was, wait))
    }

    fn tell(&self, was: bool, level: bool, wait: Wait) -> Result<Arrival, Error> {
        let pin = self.gsi.gsi().0;
        self.ioapic.set_source(pin, was, level, wait)
    }
}

impl<H: SetGsiRouting + SignalMsi + Clone + Send + Sync> LevelSource for PinLine<H> {
    fn set(&self, level: bool) -> Result<Arrival, Error> {
        PinLine::set(self, level)
    }

    fn try_set(&self, level: bool) -> Result<Arrival, Error> {
        PinLine::try_set(self, level)
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
        let wait = Wait::Allowed;
        if let Ok(mut level) = self.level.hold(wait) {
            // Lowering sends nothing, so it does not fail.
            let _ = level.lower(|was, level| self.tell(was, level, wait));
        }
    }
}
