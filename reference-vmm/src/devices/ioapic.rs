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

#[cfg(test)]
mod tests {
    use super::*;
    use irq_routing::fake::FakeHost;
    use irq_routing::ioapic::IOAPIC_BASE;
    use irq_routing::{Gsi, IrqchipKind, Routing};

    #[test]
    fn what_the_host_refuses_the_chip_ends_the_guest() {
        let (host, irqchip) = FakeHost::with_irqchip(IrqchipKind::Split { pins: 24 });
        let host = Arc::new(host);
        let routing = Routing::new(host.clone(), &irqchip);
        let chip = SplitIoapic::new(&routing).unwrap();
        let line = chip.line(&routing.reserve(Gsi(9)).unwrap()).unwrap();
        let end = Arc::new(EndSignal::new().unwrap());
        let ioapic = Ioapic::new(chip, end.clone());
        // Pin 9: level-triggered, vector 0x31.
        for (offset, value) in [(0, 0x10 + 2 * 9), (0x10, 0x8031_u32)] {
            ioapic.mmio_write(MmioAddress(IOAPIC_BASE), offset, &value.to_le_bytes());
        }
        line.set(true).unwrap();
        assert!(!end.is_told());
        // It is still up at its EOI, and is sent again.
        host.fail_after(0, libc::ENOMEM);
        ioapic.eoi(0x31);
        let Some(GuestEnd::Failed(what)) = end.get() else {
            panic!("{:?}", end.get())
        };
        assert!(
            what.contains("IOAPIC") && what.contains("os error 12"),
            "{what}"
        );
    }
}
