// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's interrupt, without which the guest does not go on.

use std::borrow::Cow;
use std::error::Error;
use std::sync::Arc;

use irq_routing::IrqSource;
use irq_routing::host::{AttachIrqfd, SetGsiRouting, SignalMsi};
use irq_routing::ioapic::PinLine;
use vm_superio::Trigger;

use super::edge::TryTrigger;
use crate::end::{EndSignal, GuestEnd};

/// An interrupt source that ends the guest when the host refuses the interrupt. A device forgets
/// that it wanted one, and a guest that sleeps until it comes would sleep for ever.
#[derive(Debug)]
pub struct Interrupt<T> {
    device: Cow<'static, str>,
    source: T,
    end: Arc<EndSignal>,
}

impl<T> Interrupt<T> {
    /// The interrupt `source` of `device`, with its failure told to `end`.
    pub fn new(device: impl Into<Cow<'static, str>>, source: T, end: Arc<EndSignal>) -> Self {
        Interrupt {
            device: device.into(),
            source,
            end,
        }
    }
}

impl<T> Trigger for Interrupt<T>
where
    T: Trigger,
    T::E: Error + 'static,
{
    type E = T::E;

    fn trigger(&self) -> Result<(), T::E> {
        self.source
            .trigger()
            .inspect_err(|error| self.refused(error))
    }
}

impl<T> TryTrigger for Interrupt<T>
where
    T: TryTrigger,
    T::E: Error + 'static,
{
    fn try_trigger(&self) -> Result<bool, T::E> {
        self.source
            .try_trigger()
            .inspect_err(|error| self.refused(error))
    }
}

impl<T> Interrupt<T> {
    fn refused(&self, error: &(dyn Error + 'static)) {
        let what = format!(
            "cannot interrupt the guest for {}: {}",
            self.device,
            crate::end::Chain(error)
        );
        self.end.tell(GuestEnd::Failed(what));
    }
}

/// Where a device's edges go.
#[derive(Debug)]
pub enum Wire<H: AttachIrqfd + SetGsiRouting + SignalMsi + Clone> {
    /// To a controller in KVM, by an irqfd; or nowhere, if there is none.
    Eventfd(IrqSource<H>),
    /// To a pin of the IOAPIC in the monitor.
    Pin(PinLine<H>),
}

impl<H: AttachIrqfd + SetGsiRouting + SignalMsi + Clone> Trigger for Wire<H> {
    type E = irq_routing::Error;

    fn trigger(&self) -> Result<(), irq_routing::Error> {
        match self {
            Wire::Eventfd(source) => source.trigger(),
            Wire::Pin(line) => line.pulse().map(drop),
        }
    }
}

impl<H: AttachIrqfd + SetGsiRouting + SignalMsi + Clone> TryTrigger for Wire<H> {
    fn try_trigger(&self) -> Result<bool, irq_routing::Error> {
        match self {
            // A write of an eventfd that does not block.
            Wire::Eventfd(source) => source.trigger().map(|()| true),
            Wire::Pin(line) => match line.try_pulse() {
                Ok(_) => Ok(true),
                Err(irq_routing::Error::WouldBlock) => Ok(false),
                Err(error) => Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    struct Refused;
    impl Trigger for Refused {
        type E = io::Error;
        fn trigger(&self) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(libc::ENOMEM))
        }
    }
    impl TryTrigger for Refused {
        fn try_trigger(&self) -> io::Result<bool> {
            self.trigger().map(|()| true)
        }
    }

    /// A guest with pin 4 level-triggered and rewritten: its vCPU's thread stands in the commit of the
    /// route, with the IOAPIC's lock held.
    #[test]
    fn console_input_and_the_power_button_do_not_wait_for_a_commit_of_the_guests_routes() {
        use crate::devices::acpi_power::AcpiPower;
        use crate::devices::edge::Owing;
        use crate::devices::serial::SerialPort;
        use irq_routing::fake::{Call, FakeHost};
        use irq_routing::ioapic::SplitIoapic;
        use irq_routing::{Gsi, IrqchipKind, Routing};
        use vm_device::DevicePio;
        use vm_device::bus::PioAddress;

        let (host, irqchip) = FakeHost::with_irqchip(IrqchipKind::Split { pins: 24 });
        let host = Arc::new(host);
        let routing = Routing::new(host.clone(), &irqchip);
        let chip = SplitIoapic::new(&routing).unwrap();
        let end = Arc::new(EndSignal::new().unwrap());
        let interrupt = |device, pin| {
            let line = chip.line(&routing.reserve(Gsi(pin)).unwrap()).unwrap();
            Interrupt::new(device, Wire::Pin(line), end.clone())
        };
        let port = SerialPort::new(interrupt("COM1", 4), Vec::new()).unwrap();
        let power = AcpiPower::new(end.clone(), interrupt("ACPI", 9));
        power.pio_write(PioAddress(crate::devices::acpi_power::PORT), 2, &[1]);
        let write = |register, value: u8| port.pio_write(PioAddress(0x3f8), register, &[value]);
        let program = |pin: u8, vector: u32| {
            chip.write(0x00, &[0x10 + 2 * pin]);
            chip.write(0x10, &(0x8000 | vector).to_le_bytes());
        };
        program(4, 0x31);
        program(9, 0x41);
        write(1, 1);

        let hold = host.hold_next();
        std::thread::scope(|scope| {
            // The transmitter's interrupt.
            scope.spawn(|| write(1, 3));
            hold.entered();
            // What the main thread does; one that waited would hang here.
            assert_eq!(port.enqueue(b"hi"), 2);
            assert!(power.press().unwrap());
            assert!(port.owes_interrupt() && power.owes_interrupt());
            drop(hold);
        });
        // What a vCPU's thread does then.
        port.send_owed();
        power.send_owed();
        assert!(!port.owes_interrupt() && !power.owes_interrupt());
        let vector = |call| match call {
            Call::SignalMsi(msi) => Some(msi.data & 0xff),
            _ => None,
        };
        let vectors: Vec<_> = host.take_calls().into_iter().filter_map(vector).collect();
        assert!(
            vectors.contains(&0x31) && vectors.contains(&0x41),
            "{vectors:x?}"
        );
        assert!(!end.is_told());
    }

    #[test]
    fn a_refused_interrupt_ends_the_guest_and_names_the_device() {
        let waiting = |interrupt: &Interrupt<Refused>| interrupt.trigger().is_err();
        let never = |interrupt: &Interrupt<Refused>| interrupt.try_trigger().is_err();
        for call in [&waiting as &dyn Fn(&_) -> bool, &never] {
            let end = Arc::new(EndSignal::new().unwrap());
            assert!(call(&Interrupt::new("COM1", Refused, end.clone())));
            let Some(GuestEnd::Failed(what)) = end.get() else {
                panic!("{:?}", end.get())
            };
            assert!(
                what.contains("COM1") && what.contains("os error 12"),
                "{what}"
            );
        }
    }
}
