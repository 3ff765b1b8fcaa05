// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices through which the guest ends itself: each is a port or two and tells the [`EndSignal`].

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::{I8042Device, Trigger};

use crate::end::{EndSignal, GuestEnd};

/// The line that resets the machine.
#[derive(Debug)]
struct ResetLine(Arc<EndSignal>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.tell(GuestEnd::Reset);
        Ok(())
    }
}

/// The i8042 keyboard controller, of which this machine has the reset line alone: vm-superio's model,
/// on the two ports of a PC.
#[derive(Debug)]
pub struct I8042(Mutex<I8042Device<ResetLine>>);

impl I8042 {
    /// Data port.
    pub const DATA: u16 = 0x60;
    /// Command and status port.
    pub const COMMAND: u16 = 0x64;

    /// A controller that tells `end`.
    pub fn new(end: Arc<EndSignal>) -> Self {
        I8042(Mutex::new(I8042Device::new(ResetLine(end))))
    }

    /// The model's register for an access: its offset from the data port.
    fn register(base: PioAddress, offset: PioAddressOffset) -> u8 {
        u8::try_from((base + offset).0.wrapping_sub(Self::DATA)).unwrap_or(u8::MAX)
    }

    fn model(&self) -> MutexGuard<'_, I8042Device<ResetLine>> {
        // The model has no state that a panic elsewhere could leave half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DevicePio for I8042 {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(self.model().read(Self::register(base, offset)));
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let Some(value) = data.first() {
            let Ok(()) = self.model().write(Self::register(base, offset), *value);
        }
    }
}

/// QEMU's isa-debug-exit: a write of `value` ends the VM, and the process's status is
/// `(value << 1) | 1`. Reads give 0.
#[derive(Debug)]
pub struct DebugExit(Arc<EndSignal>);

impl DebugExit {
    /// Ports taken from the base on.
    pub const LEN: u16 = 4;

    /// A device that tells `end`.
    pub fn new(end: Arc<EndSignal>) -> Self {
        DebugExit(end)
    }
}

impl DevicePio for DebugExit {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        let mut value = [0; 4];
        for (to, from) in value.iter_mut().zip(data) {
            *to = *from;
        }
        self.0.tell(GuestEnd::DebugExit(u32::from_le_bytes(value)));
    }
}

/// pvpanic's port (QEMU's docs/specs/pvpanic): a read says which events are understood, a write
/// says which one happened.
#[derive(Debug)]
pub struct Pvpanic {
    end: Arc<EndSignal>,
    /// A guest may write as often as it likes; the log gets one line.
    said: Once,
}

/// Bit 0: the guest's kernel panicked.
const PVPANIC_PANICKED: u8 = 1 << 0;
/// Bit 1: it panicked, and a crash kernel takes over now: the guest goes on.
const PVPANIC_CRASH_LOADED: u8 = 1 << 1;

impl Pvpanic {
    /// A device that tells `end`.
    pub fn new(end: Arc<EndSignal>) -> Self {
        let said = Once::new();
        Pvpanic { end, said }
    }
}

impl DevicePio for Pvpanic {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PVPANIC_PANICKED | PVPANIC_CRASH_LOADED;
        }
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        match data.first() {
            Some(event) if event & PVPANIC_PANICKED != 0 => self.end.tell(GuestEnd::Panicked),
            Some(event) if event & PVPANIC_CRASH_LOADED != 0 => {
                self.said.call_once(|| {
                    log::warn!("the guest's kernel panicked and goes on into its crash kernel");
                });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(write: impl FnOnce(Arc<EndSignal>)) -> Option<GuestEnd> {
        let end = Arc::new(EndSignal::new().unwrap());
        write(end.clone());
        end.get().cloned()
    }

    #[test]
    fn i8042_resets_on_its_command_port_alone() {
        let write =
            |port: u16, value| told(|end| I8042::new(end).pio_write(PioAddress(port), 0, &[value]));
        assert_eq!(write(0x64, 0xfe), Some(GuestEnd::Reset));
        assert_eq!(write(0x64, 0xff), None);
        assert_eq!(write(0x60, 0xfe), None);
    }

    #[test]
    fn debug_exit_takes_every_width() {
        for (bytes, value) in [
            (&[0x10][..], 0x10),
            (&[1, 2], 0x201),
            (&[1, 2, 3, 4], 0x0403_0201),
            (&[], 0),
        ] {
            let end = told(|end| DebugExit::new(end).pio_write(PioAddress(0xf4), 0, bytes));
            assert_eq!(end, Some(GuestEnd::DebugExit(value)));
        }
    }

    #[test]
    fn pvpanic_ends_the_vm_unless_a_crash_kernel_follows() {
        let write =
            |event: u8| told(|end| Pvpanic::new(end).pio_write(PioAddress(0x505), 0, &[event]));
        assert_eq!(write(1), Some(GuestEnd::Panicked));
        assert_eq!(write(2), None);
        assert_eq!(write(0), None);
    }
}
