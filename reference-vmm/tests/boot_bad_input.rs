// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bad input ends in one clear line: each error names the file, the value and what is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod images;

use std::fs;

use images::*;
use reference_vmm::arch::boot::{BootConfig, Image, ImageKind, Preference, plan};
use vm_memory::GuestAddress;

fn message(bytes: Vec<u8>) -> String {
    plan_of(bytes).unwrap_err().to_string()
}

fn bzimage_with(offset: usize, width: usize, value: u64) -> Vec<u8> {
    let mut image = bzimage();
    set(&mut image, offset, width, value);
    image
}

fn elf_with(offset: usize, width: usize, value: u64) -> Vec<u8> {
    let mut image = elf64(&[]);
    set(&mut image, offset, width, value);
    image
}

/// Offsets in [`elf64`]'s first program header.
const PHDR: usize = 64;
const P_OFFSET: usize = PHDR + 8;
const P_PADDR: usize = PHDR + 24;
const P_FILESZ: usize = PHDR + 32;
const P_MEMSZ: usize = PHDR + 40;

#[test]
fn files_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let open = |name: &str| {
        Image::open(ImageKind::Kernel, &path(name))
            .unwrap_err()
            .to_string()
    };
    let shown = |name: &str| path(name).display().to_string();
    let missing = format!(
        "cannot open the kernel image {}: No such file or directory (os error 2)",
        shown("missing")
    );
    assert_eq!(open("missing"), missing);
    fs::create_dir(path("dir")).unwrap();
    let a_dir = format!(
        "the kernel image {} is a directory; give a regular file",
        shown("dir")
    );
    assert_eq!(open("dir"), a_dir);
    fs::write(path("empty"), []).unwrap();
    assert_eq!(
        open("empty"),
        format!("the kernel image {} is empty", shown("empty"))
    );
    let device = Image::open(ImageKind::Initrd, "/dev/null".as_ref())
        .unwrap_err()
        .to_string();
    assert_eq!(
        device,
        "the initrd /dev/null is not a regular file; give a regular file"
    );
}

#[test]
fn files_that_are_no_kernels() {
    let begins = |first: &str, hint: &str| {
        format!("the kernel image k is not a kernel: it begins with {first}; {hint}")
    };
    let expected = "a bzImage, an ELF file or a multiboot image is expected";
    assert_eq!(
        message(vec![0; 4096]),
        begins("00 00 00 00 00 00 00 00", expected)
    );
    assert_eq!(message(b"a\n".to_vec()), begins("61 0a", expected));
    assert_eq!(
        message(vec![0x1f, 0x8b, 8]),
        begins("1f 8b 08", "that is gzip; unpack it first")
    );
    let efi = "that is an EFI program, and there is no EFI here; take a bzImage or an ELF file";
    assert_eq!(message(b"MZ\x90\0".to_vec()), begins("4d 5a 90 00", efi));
    assert_eq!(
        message(b"#!/bin/sh\n".to_vec()),
        begins("23 21 2f 62 69 6e 2f 73", "that is a script")
    );
}

#[test]
fn truncated_images() {
    let truncated = |what: &str, end: u64, len: u64| {
        format!(
            "the kernel image k is truncated: its {what} ends at byte {end}, and the file has {len}"
        )
    };
    let cut = |mut image: Vec<u8>, len: usize| {
        image.truncate(len);
        message(image)
    };
    assert_eq!(
        cut(bzimage(), 0x210),
        truncated("setup header", 0x26c, 0x210)
    );
    assert_eq!(
        cut(bzimage(), 1024),
        truncated("real-mode part", 1025, 1024)
    );
    assert_eq!(
        cut(bzimage(), 3000),
        truncated("protected-mode part", 5120 - 15, 3000)
    );
    assert_eq!(cut(elf64(&[]), 10), truncated("ELF header", 20, 10));
    assert_eq!(cut(elf64(&[]), 63), truncated("ELF header", 64, 63));
    assert_eq!(
        cut(elf64(&[]), 100),
        truncated("table of program headers", 176, 100)
    );
    assert_eq!(cut(elf64(&[]), 300), truncated("segment", 476, 300));
    let overflow = elf_with(P_OFFSET, 8, u64::MAX - 10);
    assert!(message(overflow).starts_with("the kernel image k is truncated: its segment ends at"));
}

#[test]
fn header_fields_that_cannot_be() {
    let field = |field: &str, value: u64, problem: &str| {
        format!("the kernel image k has {value:#x} in its header's {field}: {problem}")
    };
    for (image, expected) in [
        (
            bzimage_with(hdr::VERSION, 2, 0x1ff),
            field(
                "version",
                0x1ff,
                "boot protocols before 2.00 have no high kernels",
            ),
        ),
        (
            bzimage_with(hdr::LOADFLAGS, 1, 0x80),
            field(
                "loadflags",
                0x80,
                "this is a zImage, for addresses below 1 MiB",
            ),
        ),
        (
            bzimage_with(hdr::SYSSIZE, 4, 0),
            field("syssize", 0, "the protected-mode part has no bytes"),
        ),
        (
            bzimage_with(hdr::SYSSIZE, 4, 0x20),
            field("syssize", 0x20, "too short for the 64-bit entry at 512"),
        ),
        (
            bzimage_with(hdr::PREF_ADDRESS, 8, 16 * MIB + 1),
            field(
                "pref_address",
                16 * MIB + 1,
                "not a multiple of kernel_alignment",
            ),
        ),
        (
            bzimage_with(hdr::PREF_ADDRESS, 8, 0),
            field("pref_address", 0, "kernels are loaded at 1 MiB or above"),
        ),
        (
            elf_with(4, 1, 3),
            field("EI_CLASS", 3, "neither 32 nor 64 bits"),
        ),
        (
            elf_with(5, 1, 2),
            field("EI_DATA", 2, "x86 is little-endian"),
        ),
        (
            elf_with(16, 2, 1),
            field(
                "e_type",
                1,
                "not an executable; is this an object file or a module?",
            ),
        ),
        (
            elf_with(18, 2, 183),
            field(
                "e_machine",
                183,
                "built for another architecture; this machine is an x86-64",
            ),
        ),
        (
            elf_with(56, 2, 0xffff),
            field("e_phnum", 0xffff, "1 to 128 program headers are expected"),
        ),
        (
            elf_with(54, 2, 32),
            field("e_phentsize", 32, "not the size of a program header"),
        ),
        (
            elf_with(P_FILESZ, 8, 301),
            field("p_filesz", 301, "more than p_memsz"),
        ),
        (
            elf(true, 0, &[segment(MIB, vec![], 0)], &[], &[]),
            field("e_phnum", 1, "none of them is a segment to load"),
        ),
    ] {
        assert_eq!(message(image), expected);
    }
}

#[test]
fn kernels_that_do_not_fit() {
    assert_eq!(
        message(bzimage_with(hdr::INIT_SIZE, 4, 48 * MIB + 1)),
        "the kernel image k wants its kernel (with the memory to unpack itself) at \
         0x1000000..0x4000001, and the guest's RAM below 4 GiB ends at 0x4000000: give the guest \
         more memory, or link the image lower"
    );
    assert_eq!(
        message(bzimage_with(hdr::PREF_ADDRESS, 8, 0xffff_ffff_ffe0_0000)),
        "the kernel image k wants its kernel (with the memory to unpack itself) at \
         0xffffffffffe00000..0x10000000000600000, and the guest's RAM below 4 GiB ends at \
         0x4000000: give the guest more memory, or link the image lower"
    );
    assert_eq!(
        message(elf_with(P_PADDR, 8, 0x7000)),
        "the kernel image k wants its segment at 0x7000..0x712c, which overlaps the monitor's boot \
         data at 0x6000..0x20000"
    );
    assert_eq!(
        message(elf_with(P_MEMSZ, 8, MIB + 1)),
        "the kernel image k wants its segment at 0x200000..0x210000, which overlaps segment at \
         0x100000..0x200001"
    );
    assert_eq!(
        message(elf_with(24, 8, 48 * MIB)),
        "the kernel image k starts at 0x3000000, where none of its segments is"
    );
    let mut pvh = elf64(&pvh_note(48 * MIB as u32));
    set(&mut pvh, 24, 8, MIB);
    assert_eq!(
        message(pvh),
        "the kernel image k starts at 0x3000000, where none of its segments is"
    );
}

#[test]
fn images_without_a_way_to_start() {
    let plain = elf(false, MIB, &[segment(MIB, vec![0; 8], 8)], &[], &[]);
    assert_eq!(
        message(plain),
        "the kernel image k is a 32-bit ELF file with neither a multiboot header in its first 8 KiB \
         nor a PVH note: there is no way to start it"
    );
    let wants_video = elf(
        false,
        MIB,
        &[segment(MIB, vec![0; 8], 8)],
        &[],
        &multiboot_header(7, &[]),
    );
    assert_eq!(
        message(wants_video),
        "the kernel image k has 0x4 in its header's multiboot flags: it requires a feature that \
         this machine has not (bit 2 is a video mode)"
    );
    let mut raw = vec![0; 128];
    raw[..12].copy_from_slice(&multiboot_header(3, &[]));
    assert_eq!(
        message(raw),
        "the kernel image k has 0x3 in its header's multiboot flags: without bit 16, which gives \
         the load addresses, it must be an ELF file"
    );
}

#[test]
fn a_multiboot_header_that_is_cut_off_is_none() {
    let mut image = multiboot_raw();
    image.truncate(64 + 31);
    assert!(message(image).starts_with("the kernel image k is not a kernel: it begins with cc cc"));
}

#[test]
fn more_modules_than_the_information_can_name() {
    let with = |count: usize, name: &str| {
        let initrds: Vec<_> = (0..count).map(|_| initrd(name, vec![1])).collect();
        plan(&mut kernel(multiboot_elf()), &initrds, &config("")).map_err(|e| e.to_string())
    };
    let too_many = |count: usize| {
        Err(format!(
            "{count} modules are too many: at most 244 fit into the multiboot information"
        ))
    };
    assert!(with(244, "m").is_ok());
    assert_eq!(with(245, "m"), too_many(245));
    // Their names share the command line's room.
    let names =
        "the command line and the names of the modules take 80036 bytes; 65536 is the limit";
    assert_eq!(with(20, &"n".repeat(4000)), Err(names.to_owned()));
}

#[test]
fn initrds_and_command_lines_that_are_too_long() {
    let huge = [initrd("i", vec![0; 64 * MIB as usize])];
    let error = plan(&mut kernel(bzimage()), &huge, &config(""))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "the initrd i of 67108864 bytes does not fit: the guest's memory of 67108864 bytes has no \
         such room beside the kernel below 0x80000000; give the guest more memory"
    );
    let too_long = |image: Vec<u8>, len: usize| {
        plan(&mut kernel(image), &[], &config(&"a".repeat(len)))
            .unwrap_err()
            .to_string()
    };
    let exceeds = |len: usize, limit: u64| {
        format!("the command line of {len} bytes exceeds the kernel's limit of {limit}")
    };
    assert_eq!(too_long(bzimage(), 2048), exceeds(2048, 2047));
    assert_eq!(
        too_long(bzimage_with(hdr::VERSION, 2, 0x205), 256),
        exceeds(256, 255)
    );
    assert_eq!(
        too_long(bzimage_with(hdr::CMDLINE_SIZE, 4, 0xffff_ffff), 65536),
        exceeds(65536, 65535)
    );
    assert_eq!(too_long(elf64(&linux_note()), 2048), exceeds(2048, 2047));
    assert_eq!(too_long(elf64(&[]), 65536), exceeds(65536, 65535));
    assert_eq!(too_long(multiboot_elf(), 65534), exceeds(65536, 65535));
    let nul = plan(&mut kernel(bzimage()), &[], &config("a\0b"))
        .unwrap_err()
        .to_string();
    assert_eq!(
        nul,
        "the command line has a NUL at byte 1; the kernel would not read on"
    );
    // The longest ones are taken.
    plan(&mut kernel(bzimage()), &[], &config(&"a".repeat(2047))).unwrap();
    plan(&mut kernel(elf64(&[])), &[], &config(&"a".repeat(65535))).unwrap();
}

#[test]
fn memory_that_cannot_hold_a_kernel() {
    let on = |ram: &[(GuestAddress, u64)]| {
        let config = BootConfig {
            ram,
            cmdline: "",
            rsdp: None,
            preference: Preference::Fastest,
        };
        plan(&mut kernel(bzimage()), &[], &config)
            .unwrap_err()
            .to_string()
    };
    let bad = |problem: &str, len: u64| {
        format!("the guest's RAM cannot hold a kernel: {problem} (the first range has {len} bytes)")
    };
    assert_eq!(on(&[]), bad("kernels are loaded above 1 MiB", 0));
    assert_eq!(
        on(&[(GuestAddress(0), MIB)]),
        bad("kernels are loaded above 1 MiB", MIB)
    );
    assert_eq!(
        on(&[(GuestAddress(MIB), MIB)]),
        bad("no RAM at address 0", MIB)
    );
}
