// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The IOAPIC in a VM: a device on the MMIO bus, lines for its pins, and the routes by which KVM
//! knows whose EOIs to report.
//!
//! Messages go by `KVM_SIGNAL_MSI`; a level-triggered one goes only when KVM has the pin's route
//! (GSI = pin), because KVM reports the EOIs of vectors that it finds there. So the guest's writes
//! to the redirection table cost no ioctl, however many they are: the first level-triggered
//! interrupt commits them all. A pin that is masked while its EOI is outstanding keeps its route
//! until then.
//!
//! Locks, in this order: a line's own, the chip's, the routing table's. None is held while a
//! notifier runs. The chip's is held across `KVM_SIGNAL_MSI` and, when a route changed, across the
//! commit.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::line::PinLine;
use super::notifier::{Notifier, Notifiers};
use super::redirection::MSI_LEVEL;
use super::{Ioapic, IoapicState, IoapicStateError, PINS, PinMessages, Redirection, Written};
use crate::error::Error;
use crate::gsi::Gsi;
use crate::host::{SetGsiRouting, SignalMsi};
use crate::irqchip::IrqchipKind;
use crate::line::Arrival;
use crate::route::Msi;
use crate::routing::{GsiHandle, Routing};
use crate::rules::IOAPIC_PINS;
use crate::wait::Wait;

/// The IOAPIC of a VM with [`IrqchipKind::Split`]. Clones are the same chip.
///
/// It is a `vm_device::DeviceMmio` (feature `vm-device`): registered at
/// [`IOAPIC_BASE`](super::IOAPIC_BASE) for [`IOAPIC_LEN`](super::IOAPIC_LEN) bytes it needs no glue.
/// The VMM gives it the vector of each `KVM_EXIT_IOAPIC_EOI` ([`eoi`](SplitIoapic::eoi)).
///
/// A device raises a pin by a [`PinLine`] ([`line`](SplitIoapic::line)), or, where it is
/// edge-triggered, by an irqfd or [`IrqSource`](crate::IrqSource) on the same GSI, as with any other
/// irqchip: the pin's route follows the redirection table then, and is gone while the pin is masked.
/// The routes of GSIs 0 to 23 are the chip's; a VMM that changes one with a
/// [`Change`](crate::Change) loses it at the guest's next write.
#[derive(Clone, Debug)]
pub struct SplitIoapic<H> {
    inner: Arc<Inner<H>>,
}

#[derive(Debug)]
struct Inner<H> {
    routing: Routing<H>,
    chip: Mutex<Chip>,
    acks: Notifiers<()>,
    masks: Notifiers<bool>,
}

#[derive(Debug)]
struct Chip {
    ioapic: Ioapic,
    /// How many sources hold each line high.
    sources: [u32; PINS],
    /// The first error that no one was there to be told of.
    failed: Option<Error>,
}

impl<H: SetGsiRouting + SignalMsi + Clone> SplitIoapic<H> {
    /// A chip after reset. Asks nothing of the kernel. With
    /// [`x2apic_ids`](crate::Rules::x2apic_ids) in the table's rules the guest may name extended
    /// destinations.
    ///
    /// # Errors
    ///
    /// [`Error::NotSplit`].
    pub fn new(routing: &Routing<H>) -> Result<Self, Error> {
        match routing.irqchip() {
            IrqchipKind::Split { pins } if pins >= IOAPIC_PINS => {}
            other => return Err(Error::NotSplit(other)),
        }
        let ioapic = if routing.rules().x2apic_ids {
            Ioapic::with_extended_destinations()
        } else {
            Ioapic::new()
        };
        Ok(Self {
            inner: Arc::new(Inner {
                routing: routing.clone(),
                chip: Mutex::new(Chip {
                    ioapic,
                    sources: [0; PINS],
                    failed: None,
                }),
                acks: Notifiers::new(),
                masks: Notifiers::new(),
            }),
        })
    }

    /// A new source of a pin's line, low. Any number of sources are ORed on a line
    /// (`kvm_request_irq_source_id` has 64 for a VM).
    ///
    /// Commits the pin's route if its EOI is outstanding, after a restore; else asks nothing of the
    /// kernel.
    ///
    /// # Errors
    ///
    /// [`Error::NoPin`], [`Error::ForeignGsi`]; as [`Change::commit`](crate::Change::commit).
    pub fn line(&self, gsi: &GsiHandle) -> Result<PinLine<H>, Error> {
        self.inner.routing.own(gsi)?;
        let pin = pin_of(gsi.gsi())?;
        let chip = self.chip();
        if let Some(entry) = chip.ioapic.redirection(pin)
            && entry.remote_irr()
        {
            self.inner.routing.settle_pin(gsi.gsi(), entry.msi())?;
        }
        drop(chip);
        Ok(PinLine::new(self.clone(), gsi.clone()))
    }

    /// Sets the level of one source, which knows what it was.
    pub(super) fn set_source(
        &self,
        pin: u32,
        was_high: bool,
        high: bool,
        wait: Wait,
    ) -> Result<Arrival, Error> {
        let mut chip = wait.lock(&self.inner.chip)?;
        self.set_source_in(&mut chip, pin, was_high, high, wait)
    }

    /// Raises one source and lowers it, with no EOI and no access in between. On an error it is what
    /// it was.
    pub(super) fn pulse_source(
        &self,
        pin: u32,
        was_high: bool,
        wait: Wait,
    ) -> Result<Arrival, Error> {
        let mut chip = wait.lock(&self.inner.chip)?;
        let arrival = self.set_source_in(&mut chip, pin, was_high, true, wait)?;
        // A fall sends nothing, so it does not fail.
        self.set_source_in(&mut chip, pin, true, false, wait)?;
        Ok(arrival)
    }

    /// The chip's lock is held.
    fn set_source_in(
        &self,
        chip: &mut Chip,
        pin: u32,
        was_high: bool,
        high: bool,
        wait: Wait,
    ) -> Result<Arrival, Error> {
        let Chip {
            ioapic, sources, ..
        } = chip;
        let mut messages = Messages {
            wait,
            ..self.messages()
        };
        let line_was_high = ioapic.lines() & 1 << pin != 0;
        let count = &mut sources[pin as usize];
        match (was_high, high) {
            (false, true) => *count += 1,
            (true, false) => *count -= 1,
            _ => {}
        }
        if !high && *count > 0 {
            // Another source holds it up.
            return Ok(Arrival::Delivered { to: 1 });
        }
        let arrival = ioapic.set_line(pin, high, &mut messages);
        match messages.failed.take() {
            None => Ok(arrival),
            Some(error) => {
                *count -= u32::from(!was_high);
                if !line_was_high {
                    ioapic.set_line(pin, false, &mut messages);
                }
                Err(error)
            }
        }
    }

    /// The guest ended the interrupts of a vector: `KVM_EXIT_IOAPIC_EOI`, or the chip's EOI
    /// register. Ack notifiers are told first, so that a device that has nothing more to say lowers
    /// its line; then pins whose line is still high interrupt again.
    ///
    /// Never blocks on the guest; may wait for a commit. Errors: [`SplitIoapic::take_error`].
    pub fn eoi(&self, vector: u8) {
        let pins = self.chip().ioapic.pins_of(vector);
        for pin in each(pins) {
            self.inner.acks.tell(Gsi(pin), ());
        }
        if pins != 0 {
            self.act(pins, |ioapic, messages| ioapic.eoi(pins, messages));
        }
    }

    /// Reads registers: [`Ioapic::read`].
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.chip().ioapic.read(offset, data);
    }

    /// Writes registers, [`Ioapic::write`], and does what follows from it: messages, routes,
    /// notifiers. Errors: [`SplitIoapic::take_error`].
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut chip = self.chip();
        let mut messages = self.messages();
        let written = chip.ioapic.write(offset, data, &mut messages);
        if let Written::Redirection { pin, .. } = written {
            self.settle(&mut chip, 1 << pin, messages);
        }
        drop(chip);
        match written {
            Written::Nothing => {}
            Written::Eoi { vector } => self.eoi(vector),
            Written::Redirection { pin, masked } => {
                if let Some(masked) = masked {
                    self.inner.masks.tell(Gsi(pin), masked);
                }
            }
        }
    }

    /// Sends what is pending, and makes sure that KVM reports the EOIs that are outstanding. To be
    /// called after [`SplitIoapic::restore`], when the devices have their lines again and the local
    /// APICs their state (one that is set later forgets what was delivered before), and before the
    /// vCPUs run.
    ///
    /// # Errors
    ///
    /// As [`Change::commit`](crate::Change::commit), and [`Error::SignalMsi`]. What was not sent is
    /// still pending.
    pub fn redeliver(&self) -> Result<(), Error> {
        let mut chip = self.chip();
        for pin in each(chip.ioapic.outstanding()) {
            if let Some(entry) = chip.ioapic.redirection(pin) {
                self.inner.routing.settle_pin(Gsi(pin), entry.msi())?;
            }
        }
        let mut messages = self.messages();
        chip.ioapic.redeliver(!0, &mut messages);
        messages.failed.map_or(Ok(()), Err)
    }

    /// Takes a saved state on. Sends nothing and commits nothing; lines that the state has high are
    /// so until a source of theirs is set low and no other holds them. [`SplitIoapic::redeliver`]
    /// is to follow.
    ///
    /// # Errors
    ///
    /// [`IoapicStateError`]; nothing was changed.
    pub fn restore(&self, state: &IoapicState) -> Result<(), IoapicStateError> {
        let mut chip = self.chip();
        chip.ioapic.restore(state)?;
        let messages = self.messages();
        self.settle(&mut chip, !0, messages);
        Ok(())
    }

    /// Resets the chip: every pin masked, nothing outstanding. Lines keep their levels; mask
    /// notifiers are not told, as KVM's are not.
    pub fn reset(&self) {
        self.act(!0, |ioapic, _| ioapic.reset());
    }

    /// Does something to the chip on no caller's behalf.
    fn act(&self, pins: u32, action: impl FnOnce(&mut Ioapic, &mut Messages<'_, H>)) {
        let mut chip = self.chip();
        let mut messages = self.messages();
        action(&mut chip.ioapic, &mut messages);
        self.settle(&mut chip, pins, messages);
    }

    /// Lets the routes of some pins follow their entries, and keeps the first error.
    fn settle(&self, chip: &mut Chip, pins: u32, messages: Messages<'_, H>) {
        let mut failed = messages.failed;
        for pin in each(pins) {
            let Some(entry) = chip.ioapic.redirection(pin) else {
                break;
            };
            let route = match (entry.is_masked(), entry.remote_irr()) {
                (false, _) => Some(entry.msi()),
                // KVM still has an EOI to report.
                (true, true) => continue,
                (true, false) => None,
            };
            let routed = self.inner.routing.route_pin(Gsi(pin), route);
            failed = failed.or(routed.err());
        }
        if chip.failed.is_none() {
            chip.failed = failed;
        }
    }

    fn messages(&self) -> Messages<'_, H> {
        Messages {
            routing: &self.inner.routing,
            wait: Wait::Allowed,
            failed: None,
        }
    }
}

impl<H> SplitIoapic<H> {
    /// Registers a call for each acknowledgement of a level-triggered pin
    /// (`kvm_register_irq_ack_notifier`): at its EOI, before the line is looked at again, on the
    /// thread of the vCPU whose exit it is. At any time, from inside a notifier too; it may lower
    /// and raise lines.
    ///
    /// # Errors
    ///
    /// [`Error::NoPin`].
    pub fn register_ack_notifier(
        &self,
        gsi: Gsi,
        call: impl Fn() + Send + Sync + 'static,
    ) -> Result<Notifier, Error> {
        pin_of(gsi)?;
        Ok(self.inner.acks.register(gsi, move |()| call()))
    }

    /// Registers a call for each change of a pin's mask (`kvm_register_irq_mask_notifier`), which
    /// it is told: true is masked. On the thread of the vCPU that wrote it, after the write took
    /// effect. At any time, from inside a notifier too.
    ///
    /// # Errors
    ///
    /// [`Error::NoPin`].
    pub fn register_mask_notifier(
        &self,
        gsi: Gsi,
        call: impl Fn(bool) + Send + Sync + 'static,
    ) -> Result<Notifier, Error> {
        pin_of(gsi)?;
        Ok(self.inner.masks.register(gsi, call))
    }

    /// Whether anyone waits for a pin's acknowledgements (`kvm_irq_has_notifier`).
    pub fn has_ack_notifier(&self, gsi: Gsi) -> bool {
        self.inner.acks.has(gsi)
    }

    /// Whether anyone is told of a pin's mask.
    pub fn has_mask_notifier(&self, gsi: Gsi) -> bool {
        self.inner.masks.has(gsi)
    }

    /// The chip's state, to be saved while no vCPU runs.
    pub fn state(&self) -> IoapicState {
        self.chip().ioapic.state()
    }

    /// A pin's redirection entry; none if the GSI is no pin.
    pub fn redirection(&self, gsi: Gsi) -> Option<Redirection> {
        self.chip().ioapic.redirection(gsi.0)
    }

    /// How many rises of an edge-triggered line came while it was high already.
    pub fn coalesced(&self, gsi: Gsi) -> u64 {
        self.chip().ioapic.coalesced(gsi.0)
    }

    /// The first thing that went wrong since this was last asked and of which no caller could be
    /// told: in an access of the guest's, or an EOI. The pin was left pending (or, edge-triggered,
    /// lost its edge), and the next access, EOI or level of the pin tries again.
    pub fn take_error(&self) -> Option<Error> {
        self.chip().failed.take()
    }

    fn chip(&self) -> MutexGuard<'_, Chip> {
        // Nothing panics while it is held; and if: each pin is whole after each step.
        self.inner
            .chip
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends by `KVM_SIGNAL_MSI`, and remembers the first error.
struct Messages<'a, H> {
    routing: &'a Routing<H>,
    /// Whether a route may be committed.
    wait: Wait,
    failed: Option<Error>,
}

impl<H: SetGsiRouting + SignalMsi> Messages<'_, H> {
    fn try_send(&self, pin: u32, msi: Msi) -> Result<Arrival, Error> {
        if msi.data & MSI_LEVEL != 0 {
            match self.wait {
                Wait::Allowed => self.routing.settle_pin(Gsi(pin), msi)?,
                Wait::Never => {
                    let table = self.routing.try_settled(Gsi(pin))?;
                    if !table.map_gsi(Gsi(pin)).eq([msi.into()]) {
                        return Err(Error::WouldBlock);
                    }
                }
            }
        }
        self.routing.signal_msi(msi)
    }
}

impl<H: SetGsiRouting + SignalMsi> PinMessages for Messages<'_, H> {
    fn send(&mut self, pin: u32, msi: Msi) -> Arrival {
        self.try_send(pin, msi).unwrap_or_else(|error| {
            self.failed.get_or_insert(error);
            Arrival::Masked
        })
    }
}

#[cfg(feature = "vm-device")]
impl<H: SetGsiRouting + SignalMsi + Clone> vm_device::DeviceMmio for SplitIoapic<H> {
    fn mmio_read(
        &self,
        _base: vm_device::bus::MmioAddress,
        offset: vm_device::bus::MmioAddressOffset,
        data: &mut [u8],
    ) {
        self.read(offset, data);
    }

    fn mmio_write(
        &self,
        _base: vm_device::bus::MmioAddress,
        offset: vm_device::bus::MmioAddressOffset,
        data: &[u8],
    ) {
        self.write(offset, data);
    }
}

fn pin_of(gsi: Gsi) -> Result<u32, Error> {
    if gsi.0 < IOAPIC_PINS {
        Ok(gsi.0)
    } else {
        Err(Error::NoPin(gsi))
    }
}

fn each(pins: u32) -> impl Iterator<Item = u32> {
    (0..IOAPIC_PINS).filter(move |pin| pins & 1 << pin != 0)
}
