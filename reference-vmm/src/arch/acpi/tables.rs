// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tables of fixed form: RSDP, XSDT, FADT and MADT (ACPI 6.5, 5.2).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::Topology;
use vm_memory::GuestAddress;

use super::AcpiConfig;
use crate::arch::layout;

const OEM_ID: [u8; 6] = *b"REFVMM";
const OEM_TABLE_ID: [u8; 8] = *b"REFVMM  ";
const OEM_REVISION: u32 = 1;

/// Bytes of an RSDP of revision 2.
pub(super) const RSDP_LEN: u64 = 36;

/// Length of the header that begins every table but the RSDP.
const HEADER_LEN: u32 = 36;
/// DSDT revision from which on its integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// MADT revision of ACPI 6.5 (table 5.19).
const MADT_REVISION: u8 = 6;

/// `IAPC_BOOT_ARCH` (ACPI 6.5, 5.2.9.3), bit 2: probe for no VGA. Bit 1 (8042 present) stays 0, so
/// that no keyboard driver probes; bit 0 (legacy devices) too, for the DSDT names every device.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// `IAPC_BOOT_ARCH`, bit 5: there is no CMOS clock.
const BOOT_ARCH_NO_RTC: u16 = 1 << 5;
/// Byte of the CMOS memory with the century.
const RTC_CENTURY: u8 = 0x32;

/// MADT entry types (ACPI 6.5, table 5.21).
const MADT_LOCAL_APIC: u8 = 0;
const MADT_IOAPIC: u8 = 1;
const MADT_LOCAL_X2APIC: u8 = 9;
/// Local APIC flags, bit 0: the processor can be used.
const APIC_ENABLED: u32 = 1;
/// An 8-bit APIC id of 255 is the broadcast.
const MAX_XAPIC_ID: u32 = 254;

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

pub(super) fn rsdp(xsdt: GuestAddress) -> Vec<u8> {
    bytes(&Rsdp::new(OEM_ID, xsdt.0))
}

pub(super) fn xsdt(tables: &[GuestAddress]) -> Vec<u8> {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table.0);
    }
    bytes(&xsdt)
}

pub(super) fn dsdt(body: Vec<u8>) -> Vec<u8> {
    table(*b"DSDT", DSDT_REVISION, &body)
}

pub(super) fn fadt(config: &AcpiConfig<'_>, dsdt: GuestAddress) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    // A set button flag says that the button is no fixed hardware: the DSDT has the power button,
    // and there is no sleep button.
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt.0)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless)
        .flag(Flags::Wbinvd);
    // Old readers know the 32-bit field alone; the same address in both is allowed.
    fadt.dsdt = (dsdt.0 as u32).into();
    fadt.reset_reg = port(config.reset.0);
    fadt.reset_value = config.reset.1;
    fadt.sleep_control_reg = port(config.sleep.0);
    fadt.sleep_status_reg = port(config.sleep.1);
    fadt.century = if config.rtc.is_some() { RTC_CENTURY } else { 0 };
    let rtc = if config.rtc.is_some() {
        0
    } else {
        BOOT_ARCH_NO_RTC
    };
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | rtc).into();
    bytes(&fadt.finalize())
}

/// The MADT. A processor's `_UID` is its index, its APIC id its place in the topology. Its PCAT_COMPAT flag is clear: there are no PICs to mask.
pub(super) fn madt(cpus: Topology) -> Vec<u8> {
    let mut body = Vec::with_capacity(8 + 12 + 16 * cpus.cpus() as usize);
    body.extend_from_slice(&(layout::LAPIC_ADDR.0 as u32).to_le_bytes());
    body.extend_from_slice(&0_u32.to_le_bytes());
    for (uid, VcpuId(id)) in (0_u32..).zip(cpus.apic_ids()) {
        if id <= MAX_XAPIC_ID {
            // An index is never above its id.
            body.extend_from_slice(&[MADT_LOCAL_APIC, 8, uid as u8, id as u8]);
            body.extend_from_slice(&APIC_ENABLED.to_le_bytes());
        } else {
            body.extend_from_slice(&[MADT_LOCAL_X2APIC, 16, 0, 0]);
            for word in [id, APIC_ENABLED, uid] {
                body.extend_from_slice(&word.to_le_bytes());
            }
        }
    }
    // Id 0, an IOAPIC's value after reset, KVM's and ours; its pins are the GSIs from 0 on.
    body.extend_from_slice(&[MADT_IOAPIC, 12, 0, 0]);
    body.extend_from_slice(&(layout::IOAPIC_ADDR.0 as u32).to_le_bytes());
    body.extend_from_slice(&0_u32.to_le_bytes());
    table(*b"APIC", MADT_REVISION, &body)
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(
        signature,
        HEADER_LEN,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}
