// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! PVH: 32-bit protected mode without paging, and `hvm_start_info` in EBX
//! (xen/include/public/arch-x86/hvm/start_info.h, docs/misc/pvh.pandoc).

use std::io::{Read, Seek};

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::cmdline;
use super::elf::ElfFile;
use super::memory_map::memory_map;
use super::place::Placement;
use super::{BootError, BootPlan, CpuMode, Entry, Image, Machine, Protocol};
use crate::arch::layout;

/// The version with a memory map.
const VERSION: u32 = 1;

pub(super) fn plan<F: Read + Seek>(
    kernel: &Image<F>,
    elf: &ElfFile,
    entry: u64,
    place: &mut Placement,
    machine: &Machine<'_>,
) -> Result<BootPlan, BootError> {
    let config = machine.config;
    let limit = if elf.is_linux {
        cmdline::LINUX_LIMIT
    } else {
        layout::CMDLINE_MAX as u64 - 1
    };
    cmdline::check(config.cmdline, limit)?;
    let mut copies = elf.claim(kernel, place)?;
    let rip = elf.physical(kernel, entry)?;
    let ram_end = place.ram_end();
    let initrd = place.joined_initrd(machine.initrds, ram_end, &mut copies)?;

    // start_info, the module list and the memory map, one behind the other. `Placement::new` has
    // checked that there are few ranges of RAM: all fits into the page.
    let base = layout::START_INFO_ADDR.0;
    let modules = base + size_of::<hvm_start_info>() as u64;
    let map = modules + size_of::<hvm_modlist_entry>() as u64;
    let ranges = memory_map(config.ram);
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { modules } else { 0 },
        cmdline_paddr: layout::CMDLINE_ADDR.0,
        rsdp_paddr: config.rsdp.map_or(0, |address| address.0),
        memmap_paddr: map,
        memmap_entries: ranges.len() as u32,
        ..Default::default()
    };
    let module = initrd.map_or_else(hvm_modlist_entry::default, |initrd| hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.len,
        ..Default::default()
    });
    let mut bytes = Vec::with_capacity(512);
    bytes.extend_from_slice(info.as_slice());
    bytes.extend_from_slice(module.as_slice());
    for range in &ranges {
        let entry = hvm_memmap_table_entry {
            addr: range.start.0,
            size: range.len,
            type_: range.kind as u32,
            ..Default::default()
        };
        bytes.extend_from_slice(entry.as_slice());
    }
    let mut writes = vec![(layout::START_INFO_ADDR, bytes)];
    writes.extend(cmdline::write(config.cmdline));

    let entry = Entry::new(Protocol::Pvh, CpuMode::Protected32, rip, place);
    Ok(BootPlan {
        entry: Entry { rbx: base, ..entry },
        copies,
        writes,
    })
}
