// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the ACPI tables promise: a kernel that searches finds them, their sums are right, and they
//! name the machine's CPUs and ports.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_core::arch::x86_64::Topology;
use reference_vmm::arch::acpi::{AcpiConfig, AcpiError, VirtioMmio, tables};
use reference_vmm::arch::layout;

/// The tables as they stand in guest memory.
struct Memory(Vec<u8>);

const BASE: u64 = layout::ACPI_TABLES.start;

impl Memory {
    fn of(config: &AcpiConfig<'_>) -> Self {
        let range = layout::ACPI_TABLES;
        let mut memory = vec![0; (range.end - range.start) as usize];
        for (address, bytes) in tables(config).unwrap().writes {
            let at = (address.0 - BASE) as usize;
            let place = &mut memory[at..at + bytes.len()];
            assert!(place.iter().all(|byte| *byte == 0), "tables overlap");
            place.copy_from_slice(&bytes);
        }
        Memory(memory)
    }

    fn number(&self, address: u64, width: usize) -> u64 {
        let at = (address - BASE) as usize;
        let mut value = [0; 8];
        value[..width].copy_from_slice(&self.0[at..at + width]);
        u64::from_le_bytes(value)
    }

    fn bytes(&self, address: u64, len: u64) -> &[u8] {
        &self.0[(address - BASE) as usize..][..len as usize]
    }

    fn sum(&self, address: u64, len: u64) -> u8 {
        self.bytes(address, len)
            .iter()
            .fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// A table's contents with its header, its sum checked.
    fn table(&self, address: u64, signature: &[u8]) -> &[u8] {
        assert_eq!(self.bytes(address, 4), signature);
        let len = self.number(address + 4, 4);
        assert_eq!(self.sum(address, len), 0, "sum of {signature:?}");
        self.bytes(address, len)
    }

    /// The RSDP, found as ACPI 6.5, 5.2.5.1 says.
    fn rsdp(&self) -> u64 {
        let range = layout::ACPI_TABLES;
        let found = range
            .step_by(16)
            .find(|at| self.bytes(*at, 8) == b"RSD PTR ")
            .unwrap();
        assert_eq!(self.sum(found, 20), 0);
        assert_eq!(self.sum(found, 36), 0);
        found
    }

    /// FADT and MADT, by way of the XSDT.
    fn fadt_and_madt(&self) -> (u64, u64) {
        let xsdt = self.number(self.rsdp() + 24, 8);
        assert_eq!(self.table(xsdt, b"XSDT").len(), 36 + 16);
        (self.number(xsdt + 36, 8), self.number(xsdt + 44, 8))
    }
}

#[test]
fn the_rsdp_is_where_the_tables_say_and_a_search_finds_it() {
    let config = machine(1);
    assert_eq!(Memory::of(&config).rsdp(), tables(&config).unwrap().rsdp.0);
}

#[test]
fn the_fadt_is_hardware_reduced_with_reset_sleep_and_no_keyboard_to_probe() {
    let memory = Memory::of(&machine(1));
    let (fadt, _) = memory.fadt_and_madt();
    assert_eq!(memory.table(fadt, b"FACP").len(), 276);
    let flags = memory.number(fadt + 112, 4);
    for bit in [0, 4, 5, 10, 12, 20] {
        assert_ne!(flags & 1 << bit, 0, "flag {bit} of {flags:#x}");
    }
    let boot_arch = memory.number(fadt + 109, 2);
    assert_eq!(
        boot_arch,
        1 << 2,
        "8042 and legacy devices absent, VGA absent, RTC present"
    );
    // Generic addresses: I/O space, 8 bits wide, byte access.
    for (offset, port) in [
        (116, layout::RESET_PORT),
        (244, layout::SLEEP_CONTROL_PORT),
        (256, layout::SLEEP_STATUS_PORT),
    ] {
        assert_eq!(memory.number(fadt + offset, 4), 0x0100_0801);
        assert_eq!(memory.number(fadt + offset + 4, 8), u64::from(port));
    }
    assert_eq!(memory.number(fadt + 128, 1), u64::from(layout::RESET_VALUE));
    let dsdt = memory.number(fadt + 140, 8);
    assert_eq!(memory.number(fadt + 40, 4), dsdt);
    memory.table(dsdt, b"DSDT");
}

#[test]
fn a_machine_without_a_clock_says_so() {
    let memory = Memory::of(&AcpiConfig {
        rtc: None,
        ..machine(1)
    });
    let (fadt, _) = memory.fadt_and_madt();
    assert_eq!(memory.number(fadt + 109, 2), 1 << 2 | 1 << 5);
}

/// `cpus` CPUs of one socket.
fn machine<'a>(cpus: u32) -> AcpiConfig<'a> {
    AcpiConfig::new(Topology::flat(cpus).unwrap())
}

#[test]
fn the_madt_has_every_cpu_and_the_ioapic() {
    for cpus in [1, 2, 64, 255, 256, 1000] {
        let memory = Memory::of(&machine(cpus));
        let (_, madt) = memory.fadt_and_madt();
        let table = memory.table(madt, b"APIC").to_vec();
        assert_eq!(memory.number(madt + 36, 4), 0xfee0_0000);
        assert_eq!(memory.number(madt + 40, 4), 0, "no 8259 PICs");
        let (mut at, mut ids, mut ioapics) = (44, Vec::new(), 0);
        while at < table.len() {
            let entry = &table[at..at + usize::from(table[at + 1])];
            let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
            match entry[0] {
                0 => {
                    assert_eq!((entry[2], word(4)), (entry[3], 1));
                    assert_ne!(entry[3], 255, "the broadcast");
                    ids.push(u32::from(entry[3]));
                }
                9 => {
                    assert_eq!((word(4), word(8)), (word(12), 1));
                    ids.push(word(4));
                }
                1 => {
                    assert_eq!((word(4), word(8)), (0xfec0_0000, 0));
                    ioapics += 1;
                }
                kind => panic!("entry of type {kind}"),
            }
            at += entry.len();
        }
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
        assert_eq!(ioapics, 1);
    }
}

#[test]
fn apic_ids_that_nobody_has_are_left_out_and_uids_are_not() {
    let topology = Topology::new(2, 3, 2).unwrap();
    let memory = Memory::of(&AcpiConfig::new(topology));
    let (_, madt) = memory.fadt_and_madt();
    let table = memory.table(madt, b"APIC").to_vec();
    // Type and length, then UID and APIC id.
    let entries = table[44..].chunks(8).take(12);
    let told: Vec<_> = entries
        .map(|entry| (entry[0], entry[2], entry[3]))
        .collect();
    let ids = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13];
    let expected: Vec<_> = (0..).zip(ids).map(|(uid, id)| (0, uid, id)).collect();
    assert_eq!(told, expected);
    assert_eq!(count(&memory, b"ACPI0007\0"), 12);
}

/// How often a byte string stands in the DSDT.
fn count(memory: &Memory, needle: &[u8]) -> usize {
    let (fadt, _) = memory.fadt_and_madt();
    let dsdt = memory.table(memory.number(fadt + 140, 8), b"DSDT");
    dsdt.windows(needle.len())
        .filter(|window| window == &needle)
        .count()
}

/// An I/O port descriptor (ACPI 6.5, 6.4.2.5): 16-bit decoding, one base, its length.
fn io(port: u16, len: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x47, 1, low, high, low, high, 1, len]
}

/// An extended interrupt descriptor (ACPI 6.5, 6.4.3.6): consumer, edge, active high, exclusive.
fn interrupt(gsi: u32) -> Vec<u8> {
    [&[0x89, 6, 0, 0b0011, 1][..], &gsi.to_le_bytes()].concat()
}

#[test]
fn the_dsdt_names_each_device_with_its_port_and_interrupt() {
    let devices = [0, 1].map(|i| VirtioMmio {
        address: layout::VIRTIO_MMIO.start as u32 + i * 4096,
        len: 4096,
        gsi: 16 + i,
    });
    let memory = Memory::of(&AcpiConfig {
        virtio_mmio: &devices,
        ..machine(3)
    });
    for (what, times) in [
        // EISA ids PNP0501, PNP0B00, PNP0C0C.
        (&b"\x41\xd0\x05\x01"[..], 1),
        (b"\x41\xd0\x0b\x00", 1),
        (b"\x41\xd0\x0c\x0c", 1),
        (b"QEMU0001\0", 1),
        (b"ACPI0013\0", 1),
        (b"ACPI0007\0", 3),
        (b"LNRO0005\0", 2),
        (&io(layout::COM1_PORT, 8), 1),
        (&io(layout::RTC_PORT, 2), 1),
        (&io(layout::PVPANIC_PORT, 1), 1),
        (&interrupt(layout::COM1_GSI), 1),
        (&interrupt(layout::GED_GSI), 1),
        (&interrupt(16), 1),
        (&interrupt(17), 1),
        // \_S5, its package's first byte.
        (b"\x08_S5_\x12\x07\x04\x0a\x05", 1),
    ] {
        assert_eq!(count(&memory, what), times, "{what:x?}");
    }
    let bare = AcpiConfig {
        com1: None,
        rtc: None,
        pvpanic: None,
        processor_devices: false,
        ..machine(3)
    };
    let memory = Memory::of(&bare);
    for what in [
        &b"\x41\xd0\x05\x01"[..],
        b"\x41\xd0\x0b\x00",
        b"QEMU0001",
        b"ACPI0007",
    ] {
        assert_eq!(count(&memory, what), 0, "{what:x?}");
    }
}

#[test]
fn more_than_can_be_told_is_refused() {
    assert_eq!(tables(&machine(4097)), Err(AcpiError::Cpus(4097)));
    let device = VirtioMmio {
        address: 0xc000_0000,
        len: 4096,
        gsi: 16,
    };
    let with = |count| {
        let devices = vec![device; count];
        tables(&AcpiConfig {
            virtio_mmio: &devices,
            ..machine(1)
        })
        .map(|_| ())
    };
    assert_eq!(with(256), Ok(()));
    assert!(matches!(
        with(4096),
        Err(AcpiError::TooLarge { room: 0x1_f000, .. })
    ));
    assert_eq!(with(4097), Err(AcpiError::VirtioMmio(4097)));
}

/// The disassembler and compiler of ACPICA take every table, and make the same AML again.
#[test]
#[ignore = "needs iasl: apt-get install acpica-tools"]
fn iasl_accepts_the_tables() {
    use std::process::Command;
    let devices = [VirtioMmio {
        address: 0xc000_0000,
        len: 4096,
        gsi: 16,
    }];
    for cpus in [1, 300] {
        let config = AcpiConfig {
            virtio_mmio: &devices,
            ..machine(cpus)
        };
        let dir = tempfile::tempdir().unwrap();
        for (_, bytes) in tables(&config).unwrap().writes {
            let name = String::from_utf8(bytes[..4].to_vec()).unwrap();
            if name == "RSD " {
                continue;
            }
            std::fs::write(dir.path().join(format!("{name}.dat")), &bytes).unwrap();
            let iasl = |args: &[&str]| {
                let out = Command::new("iasl")
                    .args(args)
                    .current_dir(&dir)
                    .output()
                    .unwrap();
                let text =
                    String::from_utf8_lossy(&out.stderr) + String::from_utf8_lossy(&out.stdout);
                assert!(out.status.success(), "iasl {args:?}: {text}");
                assert!(!text.contains("Error "), "iasl {args:?}: {text}");
                text.into_owned()
            };
            iasl(&["-d", &format!("{name}.dat")]);
            let compiled = iasl(&["-p", "again", &format!("{name}.dsl")]);
            if name == "DSDT" {
                assert!(compiled.contains("0 Errors, 0 Warnings"), "{compiled}");
                let again = std::fs::read(dir.path().join("again.aml")).unwrap();
                assert_eq!(again[36..], bytes[36..]);
            }
        }
    }
}
