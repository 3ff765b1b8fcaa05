// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ACPI tables (ACPI 6.5), by which an unmodified kernel finds its CPUs, devices and power switch.
//!
//! ```text
//! RSDP ── XSDT ─┬─ FADT ── DSDT   devices, power button, \_S5
//!               └─ MADT           local APICs, IOAPIC
//! ```
//!
//! The machine is a hardware-reduced one (ACPI 6.5, 4.1): it has no PM timer, no SCI, no ACPI
//! enable handshake, no 8259 PICs and no 8254 timer that a kernel should look for. Linux then skips
//! all probing of those (`acpi_generic_reduced_hw_init` in arch/x86), which is both less code in the
//! monitor and a faster boot. What replaces them:
//!
//! | on a PC | here |
//! | --- | --- |
//! | PM1 control: power off | sleep control register, `\_S5` |
//! | PM1 status: power button | control-method button PNP0C0C, notified by a Generic Event Device |
//! | SCI | the Generic Event Device's own interrupt |
//! | 8042 at 0x64: reset | the same port and value as the FADT's reset register |
//! | keyboard, VGA | declared absent, so that no driver probes for them |
//!
//! ISA interrupts need no overrides in the MADT: a device's `_CRS` names its GSI with its trigger.

mod dsdt;
mod tables;

use kvm_core::arch::x86_64::Topology;
use vm_memory::GuestAddress;

use super::layout;

/// Most CPUs that the DSDT has names for.
pub const MAX_CPUS: u32 = 4096;
/// Most virtio-mmio devices that the DSDT has names for.
pub const MAX_VIRTIO_MMIO: usize = 4096;

/// A virtio-mmio device, which the guest's driver finds by its `_HID` "LNRO0005".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// First address of its registers, below 4 GiB.
    pub address: u32,
    /// Length of its registers in bytes.
    pub len: u32,
    /// Its interrupt, edge-triggered.
    pub gsi: u32,
}

/// What the tables describe. [`AcpiConfig::new`] has the machine of [`layout`].
#[derive(Clone, Copy, Debug)]
pub struct AcpiConfig<'a> {
    /// The CPUs, with their APIC ids.
    pub cpus: Topology,
    /// Port and interrupt of a 16550 UART.
    pub com1: Option<(u16, u32)>,
    /// Index port of the real-time clock.
    pub rtc: Option<u16>,
    /// Port of pvpanic.
    pub pvpanic: Option<u16>,
    /// Port and value of the reset register.
    pub reset: (u16, u8),
    /// Ports of the sleep control and sleep status registers.
    pub sleep: (u16, u16),
    /// Event register's port and interrupt of the Generic Event Device.
    pub ged: (u16, u32),
    /// virtio-mmio devices, in the order of their `_UID`.
    pub virtio_mmio: &'a [VirtioMmio],
    /// Whether the DSDT has a device object (ACPI0007) for each CPU. Kernels find their CPUs in the
    /// MADT; drivers of processor power states look for these.
    pub processor_devices: bool,
}

impl AcpiConfig<'_> {
    /// The machine of [`layout`] with these CPUs and no virtio devices.
    pub fn new(cpus: Topology) -> Self {
        AcpiConfig {
            cpus,
            com1: Some((layout::COM1_PORT, layout::COM1_GSI)),
            rtc: Some(layout::RTC_PORT),
            pvpanic: Some(layout::PVPANIC_PORT),
            reset: (layout::RESET_PORT, layout::RESET_VALUE),
            sleep: (layout::SLEEP_CONTROL_PORT, layout::SLEEP_STATUS_PORT),
            ged: (layout::GED_PORT, layout::GED_GSI),
            virtio_mmio: &[],
            processor_devices: true,
        }
    }
}

/// The tables, ready to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Where the RSDP is: for the boot protocols that tell it.
    pub rsdp: GuestAddress,
    /// What to write where, all within [`layout::ACPI_TABLES`]. Guest memory is taken to be zero
    /// between them.
    pub writes: Vec<(GuestAddress, Vec<u8>)>,
}

/// Why tables cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AcpiError {
    /// The DSDT has no name for so many CPUs.
    #[error("{0} CPUs cannot be told by ACPI: at most {MAX_CPUS} can")]
    Cpus(u32),
    /// The DSDT has no name for so many devices.
    #[error("{0} virtio-mmio devices cannot be told by ACPI: at most {MAX_VIRTIO_MMIO} can")]
    VirtioMmio(usize),
    /// The tables are larger than the place for them.
    #[error("the ACPI tables of {len} bytes do not fit into the {room} bytes below 1 MiB")]
    TooLarge {
        /// Bytes of all tables.
        len: u64,
        /// Bytes of their place.
        room: u64,
    },
}

/// Makes the tables for `config`. A pure function: the same machine has the same tables.
///
/// # Errors
///
/// [`AcpiError`]: more of something than can be told.
pub fn tables(config: &AcpiConfig<'_>) -> Result<AcpiTables, AcpiError> {
    if config.cpus.cpus() > MAX_CPUS {
        return Err(AcpiError::Cpus(config.cpus.cpus()));
    }
    if config.virtio_mmio.len() > MAX_VIRTIO_MMIO {
        return Err(AcpiError::VirtioMmio(config.virtio_mmio.len()));
    }
    let rsdp = GuestAddress(layout::ACPI_TABLES.start);
    // The RSDP is first, where it is searched for; its contents come last, for it points at others.
    let mut area = Area {
        next: rsdp.0 + tables::RSDP_LEN,
        writes: Vec::with_capacity(5),
    };
    let dsdt = area.add(tables::dsdt(dsdt::body(config)));
    let fadt = area.add(tables::fadt(config, dsdt));
    let madt = area.add(tables::madt(config.cpus));
    let xsdt = area.add(tables::xsdt(&[fadt, madt]));
    if area.next > layout::ACPI_TABLES.end {
        let range = layout::ACPI_TABLES;
        let (len, room) = (area.next - range.start, range.end - range.start);
        return Err(AcpiError::TooLarge { len, room });
    }
    area.writes.push((rsdp, tables::rsdp(xsdt)));
    Ok(AcpiTables {
        rsdp,
        writes: area.writes,
    })
}

/// Gives tables their addresses, one behind the other.
struct Area {
    next: u64,
    writes: Vec<(GuestAddress, Vec<u8>)>,
}

impl Area {
    fn add(&mut self, table: Vec<u8>) -> GuestAddress {
        // No table needs an alignment; a multiple of 16 is easier to find in a dump.
        let address = GuestAddress(self.next.next_multiple_of(16));
        self.next = address.0 + table.len() as u64;
        self.writes.push((address, table));
        address
    }
}
