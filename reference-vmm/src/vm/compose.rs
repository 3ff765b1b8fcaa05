// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The steps of set-up from the irqchip on, the same for a machine that boots and for one that goes on from a snapshot
//! ([the order of set-up](super) has the reasons).

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use io_bus::{IoBus, IoRange};
use irq_routing::ioapic::SplitIoapic;
use irq_routing::{Gsi, Irqchip, IrqchipError, IrqchipKind, Pit, Routing};
use kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR;
use kvm_core::{KickSignal, Vcpu, Vm, VmSetup};
use vm_device::bus::{PioAddress, PioRange};

use super::error::BuildError;
use super::tracking::Tracker;
use super::wiring::{Wiring, register_devices, register_ioapic, wire_virtio};
use super::{Host, Machine, Parts, Power};
use crate::arch::layout;
use crate::config::{self, Config};
use crate::devices::coalesce::{Coalescing, PolledOutput};
use crate::devices::interrupt::{Interrupt, Wire};
use crate::devices::ioapic::Ioapic;
use crate::devices::rtc::Rtc;
use crate::devices::serial::{ConsoleOut, SerialPort};
use crate::devices::virtio::any::Devices;
use crate::devices::virtio::bay;
use crate::end::EndSignal;
use crate::memory::Memslots;
use crate::msrs;
use crate::snapshot::machine::DevicesSection;
use crate::snapshot::{ChainTip, RestoreError};

/// A VM with its memory and its irqchip: what vCPUs are made in, and all that costs KVM time.
pub(super) struct Frame {
    pub(super) vm: Vm,
    irqchip: Irqchip,
    routing: Routing<Host>,
}

impl Frame {
    /// Steps 5 and 6 up to the first vCPU. The memory's slots are there.
    pub(super) fn new(config: &Config, setup: VmSetup) -> Result<Self, BuildError> {
        // 5. The irqchip.
        setup.set_tss_address(layout::TSS_ADDR)?;
        let irqchip =
            Irqchip::create(setup.fd(), irqchip_kind(config)).map_err(|error| {
                match (&error, config.irqchip) {
                    (IrqchipError::Unsupported(_), config::Irqchip::Split) => {
                        BuildError::NoSplitIrqchip(error)
                    }
                    _ => error.into(),
                }
            })?;
        let routing = Routing::new(setup.fd().clone(), &irqchip);
        // Only to be told of them: the guest gets the fault that KVM would give it.
        if setup.capabilities().has(KVM_CAP_X86_USER_SPACE_MSR) {
            setup.exit_on_msrs(msrs::EXITS)?;
        }

        // 6. vCPUs.
        // Below SIGRTMIN: a kick arrives also where the user's pending signals have reached their
        // limit. SIGURG of these: one that comes from elsewhere does no harm and never did.
        let kick = KickSignal::new(libc::SIGURG).map_err(kvm_core::Error::from)?;
        let vm = setup.kick_signal(kick).finish();
        Ok(Frame {
            vm,
            irqchip,
            routing,
        })
    }
}

/// What a machine is composed of, its memory in place.
pub(super) struct Composition<'a, C> {
    pub(super) config: &'a Config,
    pub(super) frame: Frame,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) memslots: Memslots,
    /// Has the memory's slots.
    pub(super) tracker: Tracker,
    pub(super) devices: Devices,
    pub(super) console: C,
    pub(super) end: &'a Arc<EndSignal>,
    /// The states of what is no virtio device; those have theirs in them.
    pub(super) saved: Option<&'a DevicesSection>,
}

impl<C: AsFd> Composition<'_, C> {
    /// Makes the rest.
    pub(super) fn compose(self) -> Result<Machine, BuildError> {
        let Composition {
            config,
            frame,
            vcpus,
            memslots,
            tracker,
            devices,
            console,
            end,
            saved,
        } = self;
        let Frame {
            vm,
            irqchip,
            routing,
        } = frame;
        let places = bay::places(devices.len());
        tracker.add_vcpus(&vcpus).map_err(BuildError::DirtyLog)?;

        // 7. Devices.
        let chip = match config.irqchip {
            config::Irqchip::Split => Some(SplitIoapic::new(&routing).map_err(|source| {
                let device = "the IOAPIC";
                BuildError::Interrupt { device, source }
            })?),
            _ => None,
        };
        let interrupt = |device: &'static str, gsi| {
            let refused = |source| BuildError::Interrupt { device, source };
            let gsi = routing.reserve(Gsi(gsi)).map_err(refused)?;
            let wire = match &chip {
                Some(chip) => Wire::Pin(chip.line(&gsi).map_err(refused)?),
                None => Wire::Eventfd(routing.source(&gsi)),
            };
            Ok::<_, BuildError>(Interrupt::new(device, wire, end.clone()))
        };
        let out = ConsoleOut::new(console, end.clone()).map_err(|source| BuildError::Process {
            what: "duplicate stdout",
            source,
        })?;
        let line = interrupt("COM1", layout::COM1_GSI)?;
        let com1 = match saved {
            None => SerialPort::new(line, out),
            Some(saved) => SerialPort::from_state(line, out, &saved.com1),
        };
        let com1 = com1.map_err(|source| BuildError::Process {
            what: "make the serial port",
            source,
        })?;
        let com1 = Arc::new(com1);
        // Weak: the port's console has the end.
        let console_of = Arc::downgrade(&com1);
        end.before_own_end(move || {
            if let Some(com1) = console_of.upgrade() {
                com1.sync();
            }
        });
        let line = interrupt("ACPI", layout::GED_GSI)?;
        let power = Arc::new(match saved {
            None => Power::new(end.clone(), line),
            Some(saved) => Power::from_state(end.clone(), line, &saved.power),
        });
        let rtc = match saved {
            None => Some(Rtc::new()),
            Some(saved) => Rtc::from_state(&saved.rtc),
        };
        let rtc = rtc.map(Arc::new).ok_or_else(|| RestoreError::Device {
            device: "the real-time clock",
            why: "no clock has such a time or such a memory".into(),
        })?;
        let bus = IoBus::new();
        let (mut registrations, mut names) =
            register_devices(&bus, config, &com1, &power, &rtc, end)?;
        let ioapic = chip
            .clone()
            .map(|chip| Arc::new(Ioapic::new(chip, end.clone())));
        if let Some(ioapic) = &ioapic {
            let (registration, name) = register_ioapic(&bus, ioapic)?;
            registrations.push(registration);
            names.push(name);
        }
        let mut virtio = Vec::with_capacity(devices.len());
        let mut unmasked = Vec::new();
        for ((name, device), place) in devices.list.into_iter().zip(&places) {
            let wiring = Wiring {
                routing: &routing,
                chip: chip.as_ref(),
                ram: &memslots.ram(),
                host: vm.fd(),
                bus: &bus,
                end,
            };
            let wired = wire_virtio(&wiring, name, device, place)?;
            virtio.push(wired.device);
            unmasked.extend(wired.unmasked);
            registrations.push(wired.registration);
            names.push(wired.name);
        }
        // Only the transmit register; nothing is asked of KVM before a guest writes much.
        let transmit = PioRange::new(PioAddress(layout::COM1_PORT), 1).map(IoRange::from);
        let transmit = transmit.map_err(|_| BuildError::Process {
            what: "name the serial port's transmit register",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        let console = Coalescing::new(vm.fd().clone(), com1.clone(), transmit);
        if !config.coalesce_console {
            console.leave_off();
        }
        let parts = Parts {
            config: config.clone(),
            configured: devices.configured,
            irqchip,
            chip,
            com1,
            power,
            rtc,
            console,
            ioapic,
            virtio,
            stdio: devices.stdio,
            _unmasked: unmasked,
            _registrations: registrations,
            names,
            bus,
            tracker,
            chain: ChainTip::default(),
            lazy: None,
            mapped: None,
            memslots,
            vm,
        };
        Ok(Machine {
            parts,
            vcpus,
            end: end.clone(),
            kvm_stats: None,
            gdb: None,
            restored: saved.is_some(),
            handed_over: false,
        })
    }
}

fn irqchip_kind(config: &Config) -> IrqchipKind {
    match config.irqchip {
        config::Irqchip::Kernel => IrqchipKind::Kernel {
            pit: if config.pit {
                Pit::PresentWithSpeaker
            } else {
                Pit::Absent
            },
        },
        config::Irqchip::Split => IrqchipKind::Split {
            pins: layout::IOAPIC_PINS,
        },
        config::Irqchip::None => IrqchipKind::None,
    }
}
