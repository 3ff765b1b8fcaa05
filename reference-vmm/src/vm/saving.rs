// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a snapshot asks of a machine that runs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use irq_routing::Irqchip;
use irq_routing::ioapic::IoapicState;
use kvm_core::Vm;
use memslots::Snapshot;

use super::{Parts, Running};
use crate::config::Config;
use crate::devices::acpi_power::PowerState;
use crate::devices::coalesce::PolledOutput;
use crate::devices::rtc::RtcState;
use crate::devices::serial::PortState;
use crate::devices::virtio::any::PlacedDevice;
use crate::memory::SlotTable;
use crate::snapshot::{ChainTip, SnapshotError};

/// What a device has of the host cannot change hands.
#[derive(Debug, thiserror::Error)]
#[error("{device}: what it has of the host cannot change hands: {source}")]
pub struct HostSideError {
    /// Its name in the machine.
    pub device: String,
    /// `WouldBlock`: another process has it. Else the host's errno.
    pub source: io::Error,
}

impl Running {
    /// Refuses what no snapshot could be of, before anything is done.
    pub(crate) fn check_for_snapshot(&self) -> Result<(), SnapshotError> {
        if self.debugger.is_some() {
            return Err(SnapshotError::Debugger);
        }
        let own = self.parts.virtio.get(self.parts.configured..);
        if let Some(own) = own.and_then(<[_]>::first) {
            return Err(SnapshotError::Device(own.name().to_owned()));
        }
        Ok(())
    }

    /// What it is made of.
    pub(crate) fn config(&self) -> &Config {
        &self.parts.config
    }

    /// On which snapshot the next one may build.
    pub(crate) fn chain(&self) -> &ChainTip {
        &self.parts.chain
    }

    pub(crate) fn vm(&self) -> &Vm {
        &self.parts.vm
    }

    pub(crate) fn irqchip(&self) -> &Irqchip {
        &self.parts.irqchip
    }

    /// With the split irqchip.
    pub(crate) fn ioapic_state(&self) -> Option<IoapicState> {
        self.parts.chip.as_ref().map(|chip| chip.state())
    }

    pub(crate) fn virtio(&self) -> &[Arc<dyn PlacedDevice>] {
        &self.parts.virtio
    }

    /// Guest memory of now, without permissions. What is read of it while the guest runs is of no one moment.
    pub fn memory(&self) -> Snapshot<SlotTable> {
        self.parts.memslots.snapshot()
    }

    /// Of COM1, whose output has reached the console, of the clock and of the power switch.
    pub(crate) fn device_states(&self) -> (PortState, RtcState, PowerState) {
        let Parts {
            com1, rtc, power, ..
        } = &self.parts;
        com1.sync();
        (com1.state(), rtc.state(), power.state())
    }

    /// Has the devices of a paused machine let go of what only one process may have: it is about to go on in another one.
    ///
    /// # Errors
    /// A device's name, and why it does not; those that did have it again.
    pub fn release_host(&self) -> Result<(), HostSideError> {
        for (at, device) in self.parts.virtio.iter().enumerate() {
            if let Err(source) = device.let_go() {
                let before = self.parts.virtio.iter().take(at);
                // Nobody was told that it is free.
                before.for_each(|device| drop(device.take_back()));
                let device = device.name().to_owned();
                return Err(HostSideError { device, source });
            }
        }
        Ok(())
    }

    /// The machine goes on here after all.
    ///
    /// # Errors
    /// A device whose host side somebody else has. The others have theirs.
    pub fn take_host_back(&self) -> Result<(), HostSideError> {
        let mut outcome = Ok(());
        for device in &self.parts.virtio {
            if let Err(source) = device.take_back() {
                let device = device.name().to_owned();
                outcome = outcome.and(Err(HostSideError { device, source }));
            }
        }
        outcome
    }

    /// Whether its end has begun.
    pub(crate) fn is_stopping(&self) -> bool {
        // Relaxed: who misses it looks again.
        self.stopping.load(Ordering::Relaxed)
    }
}
