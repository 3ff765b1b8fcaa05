// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Small kernel images of every format, made field by field for the tests of `arch::boot`.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::io::Cursor;

use reference_vmm::arch::boot::{
    BootConfig, BootError, BootPlan, Image, ImageKind, Preference, plan,
};
use vm_memory::GuestAddress;

pub const MIB: u64 = 1 << 20;
pub const RAM: &[(GuestAddress, u64)] = &[(GuestAddress(0), 64 * MIB)];
pub const RSDP: u64 = 0xe_0000;

pub fn config(cmdline: &str) -> BootConfig<'_> {
    BootConfig {
        ram: RAM,
        cmdline,
        rsdp: Some(GuestAddress(RSDP)),
        preference: Preference::Fastest,
    }
}

pub fn kernel(bytes: impl Into<Vec<u8>>) -> Image<Cursor<Vec<u8>>> {
    Image::new(ImageKind::Kernel, "k", Cursor::new(bytes.into())).unwrap()
}

pub fn initrd(name: &str, bytes: impl Into<Vec<u8>>) -> Image<Cursor<Vec<u8>>> {
    Image::new(ImageKind::Initrd, name, Cursor::new(bytes.into())).unwrap()
}

/// Plans an image on 64 MiB with the command line "x".
pub fn plan_of(bytes: impl Into<Vec<u8>>) -> Result<BootPlan, BootError> {
    plan(&mut kernel(bytes), &[], &config("x"))
}

/// Writes a little-endian number into an image.
pub fn set(image: &mut [u8], offset: usize, width: usize, value: u64) {
    image[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Field offsets of the setup header, as boot.rst has them.
pub mod hdr {
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const JUMP: usize = 0x200;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
}

/// Bytes of the real-mode part of [`bzimage`].
pub const SETUP_LEN: usize = 1024;
/// Bytes of its protected-mode part.
pub const PAYLOAD_LEN: usize = 4096;

/// A bzImage as today's Linux builds them, small.
pub fn bzimage() -> Vec<u8> {
    let mut image = vec![0; SETUP_LEN];
    image.extend((0..PAYLOAD_LEN).map(|i| (i % 251) as u8));
    for (offset, width, value) in [
        (hdr::SETUP_SECTS, 1, 1),
        (hdr::SYSSIZE, 4, PAYLOAD_LEN as u64 / 16),
        (0x1fe, 2, 0xaa55),
        (hdr::JUMP, 2, 0x6aeb),
        (hdr::MAGIC, 4, 0x5372_6448),
        (hdr::VERSION, 2, 0x020f),
        (hdr::LOADFLAGS, 1, 1),
        (hdr::CODE32_START, 4, MIB),
        (hdr::INITRD_ADDR_MAX, 4, 0x7fff_ffff),
        (hdr::KERNEL_ALIGNMENT, 4, 2 * MIB),
        (hdr::RELOCATABLE, 1, 1),
        (hdr::XLOADFLAGS, 2, 1),
        (hdr::CMDLINE_SIZE, 4, 2047),
        (hdr::PREF_ADDRESS, 8, 16 * MIB),
        (hdr::INIT_SIZE, 4, 8 * MIB),
    ] {
        set(&mut image, offset, width, value);
    }
    image
}

/// A segment to load.
#[derive(Clone)]
pub struct Segment {
    pub physical: u64,
    pub virtual_start: u64,
    pub bytes: Vec<u8>,
    pub memory_len: u64,
}

pub fn segment(physical: u64, bytes: Vec<u8>, memory_len: u64) -> Segment {
    Segment {
        physical,
        virtual_start: physical,
        bytes,
        memory_len,
    }
}

/// An ELF note with 4-byte alignment.
pub fn note(name: &str, kind: u32, contents: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32 + 1, contents.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    note.extend(name.as_bytes());
    note.push(0);
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(contents);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

pub fn pvh_note(entry: u32) -> Vec<u8> {
    note("Xen", 18, &entry.to_le_bytes())
}

pub fn linux_note() -> Vec<u8> {
    note("Linux", 0x100, b"Debian")
}

/// An executable of 32 or 64 bits. `behind_headers` stands right behind the program headers: the
/// place for a multiboot header.
pub fn elf(
    is_64: bool,
    entry: u64,
    segments: &[Segment],
    notes: &[u8],
    behind_headers: &[u8],
) -> Vec<u8> {
    let (word, header_len, phdr_len) = if is_64 { (8, 64, 56) } else { (4, 52, 32) };
    let count = segments.len() + usize::from(!notes.is_empty());
    let mut image = vec![0; header_len + count * phdr_len];
    image[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', if is_64 { 2 } else { 1 }, 1, 1]);
    set(&mut image, 16, 2, 2);
    set(&mut image, 18, 2, if is_64 { 62 } else { 3 });
    set(&mut image, 24, word, entry);
    set(&mut image, 24 + word, word, header_len as u64);
    set(&mut image, if is_64 { 54 } else { 42 }, 2, phdr_len as u64);
    set(&mut image, if is_64 { 56 } else { 44 }, 2, count as u64);
    image.extend(behind_headers);

    let header = |image: &mut Vec<u8>, index: usize, kind: u64, part: &Segment| {
        let at = header_len + index * phdr_len;
        let offset = image.len() as u64;
        set(image, at, 4, kind);
        let fields: [usize; 5] = if is_64 {
            [8, 16, 24, 32, 40]
        } else {
            [4, 8, 12, 16, 20]
        };
        let values = [
            offset,
            part.virtual_start,
            part.physical,
            part.bytes.len() as u64,
            part.memory_len,
        ];
        for (field, value) in fields.iter().zip(values) {
            set(image, at + field, word, value);
        }
        image.extend(&part.bytes);
    };
    for (index, part) in segments.iter().enumerate() {
        header(&mut image, index, 1, part);
    }
    if !notes.is_empty() {
        header(
            &mut image,
            segments.len(),
            4,
            &segment(0, notes.to_vec(), notes.len() as u64),
        );
    }
    image
}

/// A plain ELF64 kernel at 1 MiB: code, and a segment of data with `.bss`.
pub fn elf64(notes: &[u8]) -> Vec<u8> {
    let segments = [
        segment(MIB, vec![0xf4; 300], 300),
        segment(2 * MIB, vec![0x55; 100], 0x1_0000),
    ];
    elf(true, MIB + 4, &segments, notes, &[])
}

pub const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;

/// A multiboot header: magic, flags, checksum, then the five addresses.
pub fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let checksum = 0_u32.wrapping_sub(MULTIBOOT_MAGIC).wrapping_sub(flags);
    let mut header = Vec::new();
    for word in [MULTIBOOT_MAGIC, flags, checksum].iter().chain(addresses) {
        header.extend(word.to_le_bytes());
    }
    header
}

/// A 32-bit ELF kernel with a multiboot header, as kvm-unit-tests are.
pub fn multiboot_elf() -> Vec<u8> {
    let code = segment(4 * MIB, vec![0x90; 500], 0x2000);
    elf(false, 4 * MIB + 16, &[code], &[], &multiboot_header(3, &[]))
}

/// A raw image whose multiboot header, 64 bytes into the file, loads it to 2 MiB from byte 32 on.
pub fn multiboot_raw() -> Vec<u8> {
    let mut image = vec![0xcc; 2048];
    let load = 2 * MIB as u32;
    let header = multiboot_header(
        1 << 16 | 3,
        &[load + 32, load, load + 1000, load + 5000, load + 64],
    );
    image[64..64 + header.len()].copy_from_slice(&header);
    image
}
