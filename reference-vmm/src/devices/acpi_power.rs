// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hardware of hardware-reduced ACPI: sleep control and status, and the Generic Event Device
//! through which the power button is pressed (ACPI 6.5, 4.8.3.7 and 5.6.9).
//!
//! Three byte ports in a row: sleep control, sleep status, events. A read of the event port gives
//! the pending events and clears them, as the DSDT's `_EVT` method does on the device's interrupt.
//! The DSDT's `_INI` writes to the event port: an ACPI system is running and will see the button.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Once};

use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::Trigger;

use super::edge::{Edge, Owing, TryTrigger};
use crate::arch::layout::{
    GED_EVENT_GENERATION, GED_EVENT_POWER_BUTTON, GED_PORT, SLEEP_CONTROL_PORT, SLEEP_CONTROL_S5,
};
use crate::end::{EndSignal, GuestEnd};

const EVENTS: u16 = GED_PORT - SLEEP_CONTROL_PORT;

/// Base port.
pub const PORT: u16 = SLEEP_CONTROL_PORT;

/// Ports taken.
pub const LEN: u16 = EVENTS + 1;

/// Sleep registers and event device; `T` interrupts the guest on the event device's GSI.
#[derive(Debug)]
pub struct AcpiPower<T> {
    end: Arc<EndSignal>,
    interrupt: Edge<T>,
    pending: AtomicU8,
    listening: AtomicBool,
    /// A guest may ask for other sleep states as often as it likes; the log gets one line.
    said: Once,
}

/// The device as plain data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerState {
    /// Events that the guest has not read.
    pub pending: u8,
    /// An ACPI system runs in the guest.
    pub listening: bool,
    /// An interrupt is due that has not been sent.
    pub owes_interrupt: bool,
}

impl<T: TryTrigger> AcpiPower<T> {
    /// A machine whose power is on.
    pub fn new(end: Arc<EndSignal>, interrupt: T) -> Self {
        AcpiPower {
            end,
            interrupt: Edge::new(interrupt),
            pending: AtomicU8::new(0),
            listening: AtomicBool::new(false),
            said: Once::new(),
        }
    }

    /// A device in this state. An interrupt that is due is owed ([`AcpiPower::owes_interrupt`]) until somebody sends it.
    pub fn from_state(end: Arc<EndSignal>, interrupt: T, state: &PowerState) -> Self {
        let power = Self::new(end, interrupt);
        power.pending.store(state.pending, Ordering::Relaxed);
        power.listening.store(state.listening, Ordering::Relaxed);
        if state.owes_interrupt {
            power.interrupt.want();
        }
        power
    }

    /// The device as plain data. To be asked while no vCPU runs.
    pub fn state(&self) -> PowerState {
        PowerState {
            pending: self.pending.load(Ordering::Relaxed),
            listening: self.listening.load(Ordering::Relaxed),
            owes_interrupt: self.interrupt.is_wanted(),
        }
    }

    /// The machine has another generation id than it had ([`arch::acpi`](crate::arch::acpi)): an ACPI system that runs in
    /// the guest is to hear of it. The interrupt is owed ([`AcpiPower::owes_interrupt`]).
    pub fn tell_generation(&self) {
        if self.listening.load(Ordering::Relaxed) {
            self.pending
                .fetch_or(GED_EVENT_GENERATION, Ordering::Release);
            self.interrupt.want();
        }
    }

    /// Presses the power button. Returns whether an ACPI system runs in the guest; if none does,
    /// nothing happens. Never waits: an interrupt that could not be sent at once is owed
    /// ([`AcpiPower::owes_interrupt`]). What the guest does about it is the guest's business.
    ///
    /// # Errors
    /// The interrupt could not be sent.
    pub fn press(&self) -> Result<bool, T::E> {
        // Relaxed: the flag publishes nothing but itself.
        if !self.listening.load(Ordering::Relaxed) {
            return Ok(false);
        }
        // Release, with the AcqRel swap of the guest's read: the event is pending before the
        // interrupt that tells of it. (The trigger is a system call or a lock in any case.)
        self.pending
            .fetch_or(GED_EVENT_POWER_BUTTON, Ordering::Release);
        self.interrupt.want();
        self.interrupt.try_send()?;
        Ok(true)
    }

    /// Whether the guest is to be interrupted by someone who may wait ([`Owing`]).
    pub fn owes_interrupt(&self) -> bool {
        self.interrupt.is_wanted()
    }
}

impl<T: Trigger + Send + Sync> Owing for AcpiPower<T> {
    fn send_owed(&self) {
        // The interrupt tells of its own failure.
        let _ = self.interrupt.send();
    }
}

impl<T: Trigger + Send + Sync> DevicePio for AcpiPower<T> {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if offset == EVENTS
            && let Some(first) = data.first_mut()
        {
            *first = self.pending.swap(0, Ordering::AcqRel);
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        match (offset, data.first()) {
            (0, Some(&SLEEP_CONTROL_S5)) => self.end.tell(GuestEnd::PoweredOff),
            (0, Some(value)) => self.said.call_once(|| {
                log::warn!("the guest asks for sleep state {value:#x}; S5 is all there is");
            }),
            (EVENTS, Some(_)) => self.listening.store(true, Ordering::Relaxed),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::edge::tests::Count;

    fn device() -> AcpiPower<Count> {
        AcpiPower::new(Arc::new(EndSignal::new().unwrap()), Count::default())
    }

    #[test]
    fn the_s5_write_powers_off_and_no_other_does() {
        let base = PioAddress(PORT);
        for value in 0..=255u8 {
            let device = device();
            device.pio_write(base, 0, &[value]);
            let told = (value == 5 << 2 | 1 << 5).then_some(GuestEnd::PoweredOff);
            assert_eq!(device.end.get().cloned(), told, "{value:#x}");
        }
    }

    #[test]
    fn the_button_waits_for_nothing_and_its_interrupt_is_owed_then() {
        let count = Count::default();
        let end = Arc::new(EndSignal::new().unwrap());
        let device = AcpiPower::new(end, count.clone());
        device.pio_write(PioAddress(PORT), EVENTS, &[1]);
        count.busy(true);
        assert!(device.press().unwrap());
        assert_eq!((count.sent(), device.owes_interrupt()), (0, true));
        device.send_owed();
        assert_eq!((count.sent(), device.owes_interrupt()), (1, false));
    }

    #[test]
    fn the_button_reaches_a_guest_that_listens_once() {
        let count = Count::default();
        let end = Arc::new(EndSignal::new().unwrap());
        let (device, base) = (AcpiPower::new(end, count.clone()), PioAddress(PORT));
        assert!(!device.press().unwrap(), "no one listens");
        device.pio_write(base, EVENTS, &[1]);
        assert!(device.press().unwrap());
        assert_eq!((count.sent(), device.owes_interrupt()), (1, false));
        let mut data = [0xff];
        device.pio_read(base, EVENTS, &mut data);
        assert_eq!(data, [GED_EVENT_POWER_BUTTON]);
        device.pio_read(base, EVENTS, &mut data);
        assert_eq!(data, [0]);
    }
}
