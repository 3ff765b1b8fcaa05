// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Raising an interrupt by a call instead of an eventfd: the level of a line
//! (`KVM_IRQ_LINE_STATUS`), and a message without a route (`KVM_SIGNAL_MSI`). Both say whether
//! anyone took it.

#![forbid(unsafe_code)]

use crate::error::Error;
use crate::host::{SetGsiRouting, SetIrqLine, SignalMsi};
use crate::irqchip::IrqchipKind;
use crate::level::Level;
use crate::route::{Msi, Route};
use crate::routing::{GsiHandle, Routing};
use crate::wait::Wait;

/// What became of an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It was delivered.
    Delivered {
        /// How many took it: vCPUs, or chips where a line is wired to several.
        to: u32,
    },
    /// It merged with one that is still pending there.
    Coalesced,
    /// No one took it: masked at the pin, no route, no such vCPU, or that one's APIC is disabled.
    Masked,
}

impl Arrival {
    fn of_line(status: i32) -> Self {
        match u32::try_from(status) {
            Ok(0) => Arrival::Coalesced,
            Ok(to) => Arrival::Delivered { to },
            Err(_) => Arrival::Masked,
        }
    }

    // A message is never merged in KVM's count: 0 says that the guest does not listen.
    fn of_msi(status: i32) -> Self {
        match u32::try_from(status) {
            Ok(to) if to > 0 => Arrival::Delivered { to },
            _ => Arrival::Masked,
        }
    }
}

impl<H: SetGsiRouting + SetIrqLine + Clone> Routing<H> {
    /// A line to a GSI, low. Asks nothing of the kernel unless the GSI's route must first be
    /// committed.
    ///
    /// # Errors
    ///
    /// [`Error::NoIrqchip`]; as [`Change::commit`](crate::Change::commit) where a route was
    /// deferred.
    pub fn line(&self, gsi: &GsiHandle) -> Result<Line<H>, Error> {
        self.settle(gsi)?;
        Ok(Line {
            routing: self.clone(),
            gsi: gsi.clone(),
            level: Level::default(),
        })
    }
}

impl<H: SignalMsi> Routing<H> {
    /// Sends a message that needs no route and no GSI: one ioctl, no grace period, no lock. For what
    /// happens rarely; an irqfd on a routed GSI is cheaper for what happens often.
    ///
    /// # Errors
    ///
    /// [`Error::NoIrqchip`], [`Error::SignalMsi`].
    pub fn signal_msi(&self, msi: Msi) -> Result<Arrival, Error> {
        if self.irqchip() == IrqchipKind::None {
            return Err(Error::NoIrqchip);
        }
        let status = self.host().signal_msi(msi);
        let status = status.map_err(|source| Error::SignalMsi { msi, source })?;
        Ok(Arrival::of_msi(status))
    }
}

impl<H: SetGsiRouting + SignalMsi> Routing<H> {
    /// Sends the message that a GSI is routed to, and never waits (`kvm_set_irq_inatomic`): no irqfd
    /// is needed for it. [`Arrival::Masked`] from a GSI without a route. As an irqfd's, a message of
    /// a pin of the split irqchip passes its IOAPIC by.
    ///
    /// # Errors
    ///
    /// [`Error::WouldBlock`] while a commit is under way and while the GSI's route is deferred,
    /// until a commit ([`Routing::flush`]); [`Error::NoMessage`], [`Error::ForeignGsi`]; as
    /// [`Routing::signal_msi`].
    pub fn try_signal(&self, gsi: &GsiHandle) -> Result<Arrival, Error> {
        self.raisable(gsi)?;
        let table = self.try_settled(gsi.gsi())?;
        // A message stands alone.
        match table.map_gsi(gsi.gsi()).next() {
            Some(Route::Msi(msi)) => self.signal_msi(msi),
            Some(_) => Err(Error::NoMessage(gsi.gsi())),
            None => Ok(Arrival::Masked),
        }
    }
}

/// What a device holds to set the level of its interrupt, whichever controller it leads to: a
/// [`Line`] or a [`LineSource`](crate::LineSource) of the in-kernel irqchip, a
/// [`PinLine`](crate::ioapic::PinLine) of the split one.
pub trait LevelSource: Send + Sync {
    /// Sets the level, and says what became of a rise.
    ///
    /// # Errors
    ///
    /// What the host answered; the level is then what it was.
    fn set(&self, level: bool) -> Result<Arrival, Error>;

    /// The same, and never waits (`kvm_set_irq_inatomic`): for a thread that has other things to do.
    ///
    /// # Errors
    ///
    /// [`Error::WouldBlock`] where [`set`](LevelSource::set) would wait for another thread or for
    /// the kernel, and as there. The level is then what it was.
    fn try_set(&self, level: bool) -> Result<Arrival, Error>;
}

/// A line to a GSI, set by calls. Dropped while high, it is lowered.
///
/// All lines of one GSI are one input for KVM (`KVM_USERSPACE_IRQ_SOURCE_ID`): the last call
/// decides. [`Line::share`] makes it one that several sources hold high. With the split irqchip a
/// pin's route is a message, which a line can send once and KVM does not hold: there the lines are
/// those of the [`SplitIoapic`](crate::ioapic::SplitIoapic).
#[derive(Debug)]
pub struct Line<H: SetIrqLine> {
    routing: Routing<H>,
    gsi: GsiHandle,
    level: Level,
}

impl<H: SetIrqLine> Line<H> {
    /// Sets the level. A high level-triggered pin interrupts again after each acknowledgement until
    /// it is low.
    ///
    /// # Errors
    ///
    /// [`Error::Line`].
    pub fn set(&self, level: bool) -> Result<Arrival, Error> {
        self.set_with(level, Wait::Allowed)
    }

    /// The same, and never waits for another thread that sets the line.
    ///
    /// # Errors
    ///
    /// [`Error::WouldBlock`], [`Error::Line`]; the level is what it was.
    pub fn try_set(&self, level: bool) -> Result<Arrival, Error> {
        self.set_with(level, Wait::Never)
    }

    /// Raises and lowers: one edge. Of an edge-triggered pin the interrupt stays; a level-triggered
    /// one may not have seen it.
    ///
    /// # Errors
    ///
    /// [`Error::Line`]; if lowering failed, the line is high.
    pub fn pulse(&self) -> Result<Arrival, Error> {
        self.pulse_with(Wait::Allowed)
    }

    /// The same, and never waits for another thread that sets the line.
    ///
    /// # Errors
    ///
    /// [`Error::WouldBlock`], and as [`Line::pulse`].
    pub fn try_pulse(&self) -> Result<Arrival, Error> {
        self.pulse_with(Wait::Never)
    }

    /// The GSI.
    pub fn gsi(&self) -> &GsiHandle {
        &self.gsi
    }

    /// Lowers it if it is high.
    pub(crate) fn lower(&self) -> Result<(), Error> {
        let mut level = self.level.hold(Wait::Allowed)?;
        level.lower(|_, level| self.tell(level))
    }

    pub(crate) fn set_with(&self, level: bool, wait: Wait) -> Result<Arrival, Error> {
        self.level
            .hold(wait)?
            .set(level, |_, level| self.tell(level))
    }

    fn pulse_with(&self, wait: Wait) -> Result<Arrival, Error> {
        let mut level = self.level.hold(wait)?;
        let arrival = level.set(true, |_, level| self.tell(level))?;
        level.set(false, |_, level| self.tell(level))?;
        Ok(arrival)
    }

    fn tell(&self, level: bool) -> Result<Arrival, Error> {
        let gsi = self.gsi.gsi();
        let status = self.routing.host().set_irq_line(gsi, level);
        let status = status.map_err(|source| Error::Line { gsi, level, source })?;
        Ok(Arrival::of_line(status))
    }
}

impl<H: SetIrqLine + Send + Sync> LevelSource for Line<H> {
    fn set(&self, level: bool) -> Result<Arrival, Error> {
        Line::set(self, level)
    }

    fn try_set(&self, level: bool) -> Result<Arrival, Error> {
        Line::try_set(self, level)
    }
}

impl<H: SetIrqLine> Drop for Line<H> {
    fn drop(&mut self) {
        // KVM has no reason to refuse a level that it took before; there is no one to tell if it
        // did.
        let _ = self.lower();
    }
}
