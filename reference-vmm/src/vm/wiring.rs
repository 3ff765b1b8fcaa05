// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices onto the bus, with their interrupts and doorbells.

use std::io;
use std::sync::Arc;

use io_bus::{BusKind, IoBus, IoDevice, IoRange, Registration};
use irq_routing::ioapic::{IOAPIC_LEN, Notifier, SplitIoapic};
use irq_routing::{Gsi, Routing};
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_superio::Trigger;

use super::error::BuildError;
use super::{Com1, Host, Power};
use crate::arch::{acpi, layout};
use crate::config::{self, Config};
use crate::devices::FIXED_PORTS;
use crate::devices::interrupt::Interrupt;
use crate::devices::ioapic::Ioapic;
use crate::devices::power::{DebugExit, I8042, Pvpanic};
use crate::devices::rtc::Rtc;
use crate::devices::virtio::any::{AnyDevice, PlacedDevice};
use crate::devices::virtio::bay::KvmDoorbells;
use crate::devices::virtio::interrupt::DriverLink;
use crate::devices::virtio::mmio::Place;
use crate::end::EndSignal;
use crate::memory::GuestRam;
use crate::stats::Named;

/// Puts the machine's devices on the bus. All of them are ports, in the order of [`FIXED_PORTS`].
pub(super) fn register_devices(
    bus: &IoBus,
    config: &Config,
    com1: &Arc<Com1>,
    power: &Arc<Power>,
    rtc: &Arc<Rtc>,
    end: &Arc<EndSignal>,
) -> Result<(Vec<Registration>, Vec<Named>), BuildError> {
    let mut registrations = Vec::with_capacity(8);
    let mut names = Vec::with_capacity(8);
    let i8042 = Arc::new(I8042::new(end.clone()));
    let mut add = |device: &'static str, port: u16, len: u16, model: Port| {
        let range = PioRange::new(PioAddress(port), len).map_err(|_| {
            let why = format!("its {len} ports go past 0xffff");
            config::ConfigError::DebugExit { port, why }
        })?;
        let registration = bus
            .register_pio(range, model)
            .map_err(|source| BuildError::Bus { device, source })?;
        registrations.push(registration);
        names.push((device.into(), BusKind::Pio, IoRange::from(range)));
        Ok::<_, BuildError>(())
    };
    let fixed: [Port; FIXED_PORTS.len()] = [
        com1.clone(),
        i8042.clone(),
        i8042,
        rtc.clone(),
        power.clone(),
        Arc::new(Pvpanic::new(end.clone())),
    ];
    for ((device, port, len), model) in FIXED_PORTS.into_iter().zip(fixed) {
        add(device, port, len, model)?;
    }
    if let Some(port) = config.debug_exit {
        add(
            "debug-exit",
            port,
            DebugExit::LEN,
            Arc::new(DebugExit::new(end.clone())),
        )?;
    }
    Ok((registrations, names))
}

type Port = Arc<dyn vm_device::DevicePio + Send + Sync>;

pub(super) fn register_ioapic(
    bus: &IoBus,
    ioapic: &Arc<Ioapic<Host>>,
) -> Result<(Registration, Named), BuildError> {
    let device = "the IOAPIC";
    let base = MmioAddress(layout::IOAPIC_ADDR.0);
    let range = MmioRange::new(base, IOAPIC_LEN).map_err(|_| BuildError::Process {
        what: "name the IOAPIC's registers",
        source: io::ErrorKind::InvalidInput.into(),
    })?;
    let model: Arc<dyn vm_device::DeviceMmio + Send + Sync> = ioapic.clone();
    let registration = bus
        .register_mmio(range, model)
        .map_err(|source| BuildError::Bus { device, source })?;
    Ok((registration, (device.into(), BusKind::Mmio, range.into())))
}

/// What a virtio device is connected to.
pub(super) struct Wiring<'a> {
    pub(super) routing: &'a Routing<Host>,
    /// With the split irqchip.
    pub(super) chip: Option<&'a SplitIoapic<Host>>,
    pub(super) ram: &'a GuestRam,
    pub(super) host: &'a Host,
    pub(super) bus: &'a IoBus,
    pub(super) end: &'a Arc<EndSignal>,
}

/// A virtio device that is connected.
pub(super) struct Wired {
    pub(super) device: Arc<dyn PlacedDevice>,
    pub(super) registration: Registration,
    pub(super) name: Named,
    pub(super) unmasked: Option<Notifier>,
}

/// Gives a virtio device its interrupt, an irqfd that is attached when it is first raised; its doorbells, ioeventfds
/// that are attached when its driver is ready; and its place on the bus.
pub(super) fn wire_virtio(
    wiring: &Wiring<'_>,
    name: String,
    device: Box<dyn AnyDevice>,
    place: &acpi::VirtioMmio,
) -> Result<Wired, BuildError> {
    let kind = device.kind();
    let refused = |source| BuildError::Interrupt {
        device: kind,
        source,
    };
    let gsi = wiring.routing.reserve(Gsi(place.gsi)).map_err(refused)?;
    let source = wiring.routing.source(&gsi);
    let interrupt = Interrupt::new(name.clone(), source, wiring.end.clone());
    // Refused, it has ended the guest.
    let driver = DriverLink::new(move || drop(interrupt.trigger()));
    let base = MmioAddress(place.address.into());
    let device = device.put(Place {
        name: name.clone(),
        ram: wiring.ram.clone(),
        driver: driver.clone(),
        doorbells: Box::new(KvmDoorbells::new(wiring.host.clone(), base.0)),
    });
    // With KVM's own IOAPIC nobody is told, and an edge that comes while the guest moves the pin to another vCPU is
    // lost, as to the chip itself.
    let unmasked = wiring.chip.map(|chip| {
        chip.register_mask_notifier(Gsi(place.gsi), move |masked| {
            if !masked {
                driver.repeat();
            }
        })
    });
    let unmasked = unmasked.transpose().map_err(refused)?;
    let bus = |source| BuildError::Bus {
        device: kind,
        source,
    };
    let range = IoRange::new(base.0, place.len.into()).map_err(bus)?;
    let model: Arc<dyn IoDevice> = device.clone();
    let registration = wiring.bus.register(BusKind::Mmio, range, model);
    Ok(Wired {
        device,
        registration: registration.map_err(bus)?,
        name: (name.into(), BusKind::Mmio, range),
        unmasked,
    })
}
