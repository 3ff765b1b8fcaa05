// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which entries a VM's KVM takes: its verdict, known before it is asked.
//!
//! The rules are those of `kvm_set_irq_routing`, `setup_routing_entry` (`virt/kvm/irqchip.c`) and
//! of x86's `kvm_set_routing_entry`. `tests/kvm_oracle.rs` asks the real KVM the same thousands of
//! questions. What KVM finds out later than the rules do is its to judge: then the commit fails with
//! its errno and changes nothing.

#![forbid(unsafe_code)]

use thiserror::Error;

use crate::gsi::Gsi;
use crate::irqchip::IrqchipKind;
use crate::route::{Chip, ChipPin, Entry, Msi, Route, XenEvtchn};

/// Pins of one 8259A.
pub const PIC_PINS: u32 = 8;
/// Pins of KVM's IOAPIC (`KVM_IOAPIC_NUM_PINS`).
pub const IOAPIC_PINS: u32 = 24;

/// Why an entry cannot be in this VM's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RouteError {
    /// The VM was made without an interrupt controller in the kernel, so it has no table.
    #[error("{gsi}: a VM without an irqchip in the kernel has no routing table")]
    NoIrqchip {
        /// The GSI of the refused entry.
        gsi: Gsi,
    },
    /// The GSI is not below the host's limit (`KVM_CAP_IRQ_ROUTING`).
    #[error("{gsi} is not below this host's limit of {limit}")]
    GsiOutOfRange {
        /// The GSI of the refused entry.
        gsi: Gsi,
        /// GSIs are below this.
        limit: u32,
    },
    /// The VM's kernel has no such pin: another chip or pin number, or any pin where the irqchip is
    /// split.
    #[error("{gsi}: the kernel has no pin {} on chip {}", pin.pin, pin.chip.0)]
    NoSuchPin {
        /// The GSI of the refused entry.
        gsi: Gsi,
        /// The pin that is not there.
        pin: ChipPin,
    },
    /// This host does not take entries of this kind.
    #[error("{gsi}: this host takes no {kind} routes")]
    Unsupported {
        /// The GSI of the refused entry.
        gsi: Gsi,
        /// The kind, in words.
        kind: &'static str,
    },
    /// With 32-bit APIC ids (`KVM_CAP_X2APIC_API`) the low byte of the address's upper half must be
    /// 0.
    #[error("{gsi}: MSI address {:#x} sets bits 32 to 39, reserved with 32-bit APIC ids", msi.address)]
    ReservedAddressBits {
        /// The GSI of the refused entry.
        gsi: Gsi,
        /// The message.
        msi: Msi,
    },
    /// The event channel's priority is not one that KVM delivers.
    #[error("{gsi}: KVM delivers no Xen event channel {} with priority {:#x}", evtchn.port, evtchn.priority)]
    EventChannel {
        /// The GSI of the refused entry.
        gsi: Gsi,
        /// The event channel.
        evtchn: XenEvtchn,
    },
    /// A GSI goes to at most one pin of a chip, and whatever is no pin stands alone.
    #[error("{gsi} has a route already that excludes {route:?}")]
    Conflict {
        /// The GSI of the refused entry.
        gsi: Gsi,
        /// The route that was refused.
        route: Route,
    },
    /// The table has as many entries as the host takes.
    #[error("{gsi}: the table has {limit} entries already, as many as this host takes")]
    TableFull {
        /// The GSI of the refused entry.
        gsi: Gsi,
        /// Entries that fit.
        limit: u32,
    },
}

/// What a VM's KVM accepts as an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rules {
    /// The irqchip that the VM was made with.
    pub irqchip: IrqchipKind,
    /// GSIs and entries are at most this many (`KVM_CAP_IRQ_ROUTING`; 4096 on Linux today).
    pub limit: u32,
    /// Hyper-V synthetic interrupts can be routed (`KVM_CAP_HYPERV_SYNIC`).
    pub hv_sint: bool,
    /// Xen event channels can be routed (`KVM_CAP_XEN_HVM` with its two-level bit). KVM looks at the
    /// delivery alone: a port that the guest does not have is found out when it is raised.
    pub xen_evtchn: bool,
    /// The VMM enabled `KVM_CAP_X2APIC_API` with 32-bit APIC ids, which reserves address bits 32 to
    /// 39.
    pub x2apic_ids: bool,
}

impl Rules {
    /// Rules of a host that routes pins and messages, and nothing else.
    pub fn new(irqchip: IrqchipKind, limit: u32) -> Self {
        Self {
            irqchip,
            limit,
            hv_sint: false,
            xen_evtchn: false,
            x2apic_ids: false,
        }
    }

    /// Whether this entry alone may be in the table; [`Table::insert`](crate::Table::insert) asks
    /// about the rest.
    pub fn check(&self, entry: &Entry) -> Result<(), RouteError> {
        self.check_route(entry.gsi, &entry.route)
    }

    #[inline]
    pub(crate) fn check_route(&self, gsi: Gsi, route: &Route) -> Result<(), RouteError> {
        if self.irqchip == IrqchipKind::None {
            return Err(RouteError::NoIrqchip { gsi });
        }
        self.check_gsi(gsi)?;
        match *route {
            Route::Pin(pin) if !self.has_pin(pin) => Err(RouteError::NoSuchPin { gsi, pin }),
            Route::Msi(msi) if self.x2apic_ids && msi.address >> 32 & 0xff != 0 => {
                Err(RouteError::ReservedAddressBits { gsi, msi })
            }
            Route::Pin(_) | Route::Msi(_) => Ok(()),
            Route::HvSint(_) if self.hv_sint => Ok(()),
            Route::HvSint(_) => Err(unsupported(gsi, "Hyper-V SINT")),
            Route::XenEvtchn(_) if !self.xen_evtchn => Err(unsupported(gsi, "Xen event channel")),
            Route::XenEvtchn(evtchn) if evtchn.priority != XenEvtchn::PRIO_2LEVEL => {
                Err(RouteError::EventChannel { gsi, evtchn })
            }
            Route::XenEvtchn(_) => Ok(()),
            Route::S390Adapter(_) => Err(unsupported(gsi, "s390 adapter")),
        }
    }

    /// Whether the number is one that the host's table can hold.
    #[inline]
    pub fn check_gsi(&self, gsi: Gsi) -> Result<(), RouteError> {
        let limit = self.limit;
        if gsi.0 < limit {
            Ok(())
        } else {
            Err(RouteError::GsiOutOfRange { gsi, limit })
        }
    }

    /// Whether the VM's kernel has this pin. A split irqchip leaves the PICs and the IOAPIC to user
    /// space.
    fn has_pin(&self, at: ChipPin) -> bool {
        let pins = match (self.irqchip, at.chip) {
            (IrqchipKind::Kernel { .. }, Chip::PIC_MASTER | Chip::PIC_SLAVE) => PIC_PINS,
            (IrqchipKind::Kernel { .. }, Chip::IOAPIC) => IOAPIC_PINS,
            _ => 0,
        };
        at.pin < pins
    }
}

fn unsupported(gsi: Gsi, kind: &'static str) -> RouteError {
    RouteError::Unsupported { gsi, kind }
}
