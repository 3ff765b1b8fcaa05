// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The DSDT: the machine's devices in AML (ACPI 6.5, chapters 6, 19 and 20).
//!
//! No device has a `_STA`: absent, it means present and working, and a kernel evaluates one method
//! less for each.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion, OpRegionSpace, Package,
    Path, ResourceTemplate, Scope, Store, ZERO,
};

use super::{AcpiConfig, VirtioMmio};
use crate::arch::layout;

/// Notification of a power button: it was pressed (ACPI 6.5, 5.6.6, table 5.147).
const BUTTON_PRESSED: u8 = 0x80;

/// Notification of a generation id: it is another one.
const GENERATION_CHANGED: u8 = 0x80;

/// The DSDT's contents behind its header.
pub(super) fn body(config: &AcpiConfig<'_>) -> Vec<u8> {
    let mut devices = Vec::new();
    if let Some((port, gsi)) = config.com1 {
        com1(port, gsi, &mut devices);
    }
    if let Some(port) = config.rtc {
        rtc(port, &mut devices);
    }
    if let Some(port) = config.pvpanic {
        pvpanic(port, &mut devices);
    }
    power_button(config.ged, &mut devices);
    generation(&mut devices);
    for (uid, device) in (0_u32..).zip(config.virtio_mmio) {
        virtio_mmio(uid, device, &mut devices);
    }
    if config.processor_devices {
        for cpu in 0..config.cpus.cpus() {
            processor(cpu, &mut devices);
        }
    }
    let mut body = Scope::raw(path("_SB_"), devices);
    soft_off(&mut body);
    body
}

fn path(name: &str) -> Path {
    Path::new(name)
}

/// An interrupt of the device's own, active high.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn com1(port: u16, gsi: u32, out: &mut Vec<u8>) {
    Device::new(
        path("COM1"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0501")),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(
                path("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 8), &edge(gsi)]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// Without an interrupt: Linux then uses the clock without alarms.
fn rtc(port: u16, out: &mut Vec<u8>) {
    Device::new(
        path("RTC_"),
        vec![
            &Name::new(path("_HID"), &EISAName::new("PNP0B00")),
            &Name::new(
                path("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 2)]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

fn pvpanic(port: u16, out: &mut Vec<u8>) {
    Device::new(
        path("PEVT"),
        vec![
            &Name::new(path("_HID"), &"QEMU0001"),
            &Name::new(
                path("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// The power button, and the Generic Event Device (ACPI 6.5, 5.6.9) that tells when it was pressed:
/// its interrupt makes the kernel call `_EVT`, which reads and so clears the event register. `_INI`,
/// which the kernel calls once when it takes its devices over, writes to it.
fn power_button((port, gsi): (u16, u32), out: &mut Vec<u8>) {
    Device::new(
        path("PWRB"),
        vec![&Name::new(path("_HID"), &EISAName::new("PNP0C0C"))],
    )
    .to_aml_bytes(out);
    Device::new(
        path("GED_"),
        vec![
            &Name::new(path("_HID"), &"ACPI0013"),
            &Name::new(path("_UID"), &ZERO),
            &Name::new(path("_CRS"), &ResourceTemplate::new(vec![&edge(gsi)])),
            &OpRegion::new(path("EVRG"), OpRegionSpace::SystemIO, &port, &1_u8),
            &Field::new(
                path("EVRG"),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVNT", 8)],
            ),
            // Any write tells the monitor that an ACPI system runs, which will hear of the button.
            &Method::new(
                path("_INI"),
                0,
                false,
                vec![&Store::new(&path("EVNT"), &acpi_tables::aml::ONE)],
            ),
            // Serialized: two interrupts do not share one reading of the register.
            &Method::new(
                path("_EVT"),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &path("EVNT")),
                    &If::new(
                        &And::new(&ZERO, &Local(0), &layout::GED_EVENT_POWER_BUTTON),
                        vec![&Notify::new(&path("PWRB"), &BUTTON_PRESSED)],
                    ),
                    &If::new(
                        &And::new(&ZERO, &Local(0), &layout::GED_EVENT_GENERATION),
                        vec![&Notify::new(&path("VGEN"), &GENERATION_CHANGED)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// The generation id (Microsoft, "Virtual Machine Generation ID", 2012): `ADDR` says where its 16 bytes are, by two
/// halves of the address. A guest that hears of another one has been restored, perhaps not for the first time, and
/// makes its random numbers anew. Linux's driver finds the device by its `_CID`.
fn generation(out: &mut Vec<u8>) {
    let (low, high) = (
        layout::GENERATION_ID.0 as u32,
        (layout::GENERATION_ID.0 >> 32) as u32,
    );
    Device::new(
        path("VGEN"),
        vec![
            &Name::new(path("_HID"), &"REFV0001"),
            &Name::new(path("_CID"), &"VM_Gen_Counter"),
            &Name::new(path("_DDN"), &"VM_Gen_Counter"),
            &Name::new(path("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(out);
}

/// "LNRO0005" is what Linux's and others' virtio-mmio drivers match.
fn virtio_mmio(uid: u32, device: &VirtioMmio, out: &mut Vec<u8>) {
    Device::new(
        Path::new(&format!("V{uid:03X}")),
        vec![
            &Name::new(path("_HID"), &"LNRO0005"),
            &Name::new(path("_UID"), &uid),
            // DMA is coherent with the CPUs' caches.
            &Name::new(path("_CCA"), &acpi_tables::aml::ONE),
            &Name::new(
                path("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, device.address, device.len),
                    &edge(device.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(out);
}

/// `_UID` is what ties it to its entry in the MADT.
fn processor(cpu: u32, out: &mut Vec<u8>) {
    Device::new(
        Path::new(&format!("C{cpu:03X}")),
        vec![
            &Name::new(path("_HID"), &"ACPI0007"),
            &Name::new(path("_UID"), &cpu),
        ],
    )
    .to_aml_bytes(out);
}

/// The sleep type of S5. Hardware-reduced machines use the first element alone.
fn soft_off(out: &mut Vec<u8>) {
    let sleep_type = layout::SLEEP_TYPE_S5;
    Name::new(
        path("_S5_"),
        &Package::new(vec![&sleep_type, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(out);
}
