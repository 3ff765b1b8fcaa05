// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Linux's boot protocol (Documentation/arch/x86/boot.rst): the zero page, for bzImage and ELF
//! alike, and the start of a plain ELF kernel.
//!
//! An ELF64 file that is not Linux starts the same way: in long mode at its entry point, with the
//! address of `boot_params` in RSI, where it finds its memory map, command line and initrd.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use std::io::{Read, Seek};
use vm_memory::{ByteValued, GuestAddress};

use super::cmdline;
use super::elf::ElfFile;
use super::memory_map::memory_map;
use super::place::{Initrd, Placement};
use super::{BootConfig, BootError, BootPlan, CpuMode, Entry, FileCopy, Image, Machine, Protocol};
use crate::arch::layout;

/// "HdrS", little-endian.
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
/// `boot_flag` of a boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// `type_of_loader` of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// The protocol whose fields an ELF kernel's header pretends to have: 2.15.
const VERSION: u16 = 0x020f;
/// `loadflags`: the kernel was loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// A Linux kernel whose parts are placed.
pub(super) struct Loaded {
    /// The header for the zero page: the image's own, or a made-up one.
    pub(super) header: setup_header,
    pub(super) mode: CpuMode,
    pub(super) rip: u64,
    /// The longest command line, bytes without the NUL.
    pub(super) cmdline_limit: u64,
    /// Address at which the initrd must end.
    pub(super) initrd_limit: u64,
    pub(super) copies: Vec<FileCopy>,
}

/// Plans an ELF64 file that starts by the 64-bit protocol.
pub(super) fn plan_elf<F: Read + Seek>(
    kernel: &Image<F>,
    elf: &ElfFile,
    place: &mut Placement,
    machine: &Machine<'_>,
) -> Result<BootPlan, BootError> {
    let copies = elf.claim(kernel, place)?;
    let cmdline_limit = if elf.is_linux {
        cmdline::LINUX_LIMIT
    } else {
        layout::CMDLINE_MAX as u64 - 1
    };
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION,
        loadflags: LOADED_HIGH,
        // The kernel's to say, where it has a header: the room for a command line, not its length.
        // (memtest86+ reads so many bytes.)
        cmdline_size: cmdline_limit as u32,
        ..Default::default()
    };
    let loaded = Loaded {
        header,
        mode: CpuMode::Long64,
        rip: elf.physical(kernel, elf.entry)?,
        cmdline_limit,
        initrd_limit: place.ram_end(),
        copies,
    };
    finish(loaded, place, machine)
}

/// Adds the initrd, the command line and the zero page.
pub(super) fn finish(
    loaded: Loaded,
    place: &mut Placement,
    machine: &Machine<'_>,
) -> Result<BootPlan, BootError> {
    let Loaded {
        mut header,
        mode,
        rip,
        cmdline_limit,
        initrd_limit,
        mut copies,
    } = loaded;
    cmdline::check(machine.config.cmdline, cmdline_limit)?;
    let initrd = place.joined_initrd(machine.initrds, initrd_limit, &mut copies)?;

    header.type_of_loader = LOADER_UNDEFINED;
    // These fit: everything is placed below the MMIO hole.
    header.cmd_line_ptr = layout::CMDLINE_ADDR.0 as u32;
    if let Some(Initrd { start, len }) = initrd {
        header.ramdisk_image = start as u32;
        header.ramdisk_size = len as u32;
    }
    let mut writes = vec![(layout::ZERO_PAGE_ADDR, zero_page(header, machine.config))];
    writes.extend(cmdline::write(machine.config.cmdline));

    let protocol = match mode {
        CpuMode::Long64 => Protocol::Linux64,
        CpuMode::Protected32 => Protocol::Linux32,
    };
    let entry = Entry {
        rsi: layout::ZERO_PAGE_ADDR.0,
        ..Entry::new(protocol, mode, rip, place)
    };
    Ok(BootPlan {
        entry,
        copies,
        writes,
    })
}

fn zero_page(header: setup_header, config: &BootConfig<'_>) -> Vec<u8> {
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.acpi_rsdp_addr = config.rsdp.map_or(0, |GuestAddress(address)| address);
    let map = memory_map(config.ram);
    let mut table = params.e820_table;
    // `Placement::new` has checked that the map fits.
    for (entry, range) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start.0,
            size: range.len,
            r#type: range.kind as u32,
        };
    }
    params.e820_entries = map.len().min(table.len()) as u8;
    params.e820_table = table;
    params.as_slice().to_vec()
}
