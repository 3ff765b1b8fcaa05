// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The machine's devices, one concept a file: vm-device's traits towards the bus, and towards the
//! monitor either the [`EndSignal`](crate::end::EndSignal) or the console.
//!
//! A device here holds its own lock, if it needs one, but not while it interrupts ([`edge`]), and never
//! panics on a guest's access: width, offset and value are the guest's.

pub mod acpi_power;
pub mod coalesce;
pub mod edge;
pub mod interrupt;
pub mod ioapic;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod virtio;

use crate::arch::layout;

/// The ports that every machine's devices take: device, first port, number of ports. The monitor
/// registers these, and a device whose port the user chooses must stay clear of them.
pub const FIXED_PORTS: [(&str, u16, u16); 6] = [
    ("the serial port", layout::COM1_PORT, 8),
    ("the keyboard controller's data port", power::I8042::DATA, 1),
    ("the keyboard controller", power::I8042::COMMAND, 1),
    ("the real-time clock", rtc::Rtc::PORT, rtc::Rtc::LEN),
    (
        "the ACPI power registers",
        acpi_power::PORT,
        acpi_power::LEN,
    ),
    ("pvpanic", layout::PVPANIC_PORT, 1),
];

/// Ports that KVM's in-kernel irqchip answers before the monitor sees the access: both PICs, their
/// edge/level registers, and the timer that may go with them.
pub const KERNEL_PORTS: [(&str, u16, u16); 4] = [
    ("the interrupt controller", 0x20, 2),
    ("the second interrupt controller", 0xa0, 2),
    (
        "the interrupt controllers' edge and level register",
        0x4d0,
        2,
    ),
    ("the timer", 0x40, 4),
];
