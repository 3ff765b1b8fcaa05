// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The IOAPIC of the split irqchip on the monitor's bus.

use std::sync::Arc;

use irq_routing::host::{SetGsiRouting, SignalMsi};
use irq_routing::ioapic::SplitIoapic;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};

use crate::end::{Chain, EndSignal, GuestEnd};

/// irq-routing's chip; what the host refuses it ends the guest, which would wait for an interrupt that
/// never comes.
#[derive(Debug)]
pub struct Ioapic<H> {
    chip: SplitIoapic<H>,
    end: Arc<EndSignal>,
}

impl<H: SetGsiRouting + SignalMsi + Clone> Ioapic<H> {
    /// The chip, with its failures told to `end`.
    pub fn new(chip: SplitIoapic<H>, end: Arc<EndSignal>) -> Self {
        Ioapic { chip, end }
    }

    /// The guest ended the interrupts of a vector: `KVM_EXIT_IOAPIC_EOI`.
    pub fn eoi(&self, vector: u8) {
        self.chip.eoi(vector);
        self.check();
    }

    fn check(&self) {
        if let Some(error) = self.chip.take_error() {
            let what = format!("the IOAPIC cannot interrupt the guest: {}", Chain(&error));
            self.end.tell(GuestEnd::Failed(what));
        }
    }
}

impl<H: SetGsiRouting + SignalMsi + Clone> DeviceMmio for Ioapic<H> {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        self.chip.read(offset, data);
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        self.chip.write(offset, data);
        self.check();
    }
}
