// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device's interrupt, without which the guest does not go on.

use std::error::Error;
use std::sync::Arc;

use irq_routing::IrqSource;
use irq_routing::host::{AttachIrqfd, SetGsiRouting, SignalMsi};
use irq_routing::ioapic::PinLine;
use vm_superio::Trigger;

use crate::end::{EndSignal, GuestEnd};

/// An interrupt source that ends the guest when the host refuses the interrupt. A device forgets
/// that it wanted one, and a guest that sleeps until it comes would sleep for ever.
#[derive(Debug)]
pub struct Interrupt<T> {
    device: &'static str,
    source: T,
    end: Arc<EndSignal>,
}

impl<T> Interrupt<T> {
    /// The interrupt `source` of `device`, with its failure told to `end`.
    pub fn new(device: &'static str, source: T, end: Arc<EndSignal>) -> Self {
        Interrupt {
            device,
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
        self.source.trigger().inspect_err(|error| {
            let what = format!(
                "cannot interrupt the guest for {}: {}",
                self.device,
                crate::end::Chain(error)
            );
            self.end.tell(GuestEnd::Failed(what));
        })
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

    #[test]
    fn a_refused_interrupt_ends_the_guest_and_names_the_device() {
        let end = Arc::new(EndSignal::new().unwrap());
        assert!(
            Interrupt::new("COM1", Refused, end.clone())
                .trigger()
                .is_err()
        );
        let Some(GuestEnd::Failed(what)) = end.get() else {
            panic!("{:?}", end.get())
        };
        assert!(
            what.contains("COM1") && what.contains("os error 12"),
            "{what}"
        );
    }
}
