// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interrupt routing table of a KVM virtual machine: irqchips, GSIs, MSI, irqfd

#![deny(unsafe_code)]

mod error;
pub mod fake;
mod gsi;
pub mod host;
mod irqchip;
mod irqfd;
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub mod kvm;
mod line;
mod route;
mod routing;
mod rules;
mod source;
mod table;

pub use error::Error;
pub use gsi::{Gsi, GsiPool};
pub use host::Errno;
pub use irqchip::{Irqchip, IrqchipError, IrqchipKind, Pit};
pub use irqfd::{DetachedIrqfd, Irqfd};
pub use line::{Arrival, Line};
pub use route::{Chip, ChipPin, Entry, HvSint, Msi, Route, S390Adapter, XenEvtchn};
pub use routing::{Change, Committed, GsiHandle, Routing};
pub use rules::{IOAPIC_PINS, PIC_PINS, RouteError, Rules, XEN_2LEVEL_PORTS};
pub use source::IrqSource;
pub use table::Table;
