// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Multiboot 1 (Multiboot specification 0.6.96): 32-bit protected mode, a magic in EAX and the
//! information structure in EBX. The image is an ELF file, or any file whose multiboot header says
//! where it goes (the "a.out kludge").
//!
//! The command line begins with the image's name, as GRUB's and QEMU's do: kernels take the first
//! word for that.

use std::io::{Read, Seek};

use vm_memory::GuestAddress;

use super::cmdline;
use super::elf::ElfFile;
use super::image;
use super::memory_map::{MemoryRange, memory_map};
use super::place::{Initrd, Placement};
use super::{BootError, BootPlan, CpuMode, Entry, FileCopy, Image, Machine, Protocol, Source};
use crate::arch::layout;

/// The header stands on a 4-byte boundary within these first bytes of the file.
const SEARCHED: usize = image::HEAD;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// EAX at entry.
const LOADER_MAGIC: u64 = 0x2bad_b002;

/// Header flag: the addresses in the header say where the image goes.
const FLAG_ADDRESSES: u32 = 1 << 16;
/// Header flags 0 to 15 are requirements: 0 (modules on pages) and 1 (memory sizes) are always met,
/// 2 wants a video mode, the others have no meaning yet.
const REQUIRED: u32 = 0xffff;
const REQUIREMENTS_MET: u32 = 0b11;

/// Flags of the information structure: which of its fields are there.
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

/// Bytes of the information structure that is written, up to `boot_loader_name`'s end.
const INFO_LEN: u64 = 68;
const MODULE_LEN: u64 = 16;
const MAP_ENTRY_LEN: u64 = 24;

const LOADER_NAME: &str = "reference-vmm";

/// A multiboot header as the file has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// Where it stands in the file.
    offset: u64,
    flags: u32,
    header_addr: u32,
    load_addr: u32,
    load_end_addr: u32,
    bss_end_addr: u32,
    entry_addr: u32,
}

/// The multiboot header in an image's first bytes, if it has one.
pub(super) fn find_header(bytes: &[u8]) -> Option<Header> {
    let bytes = &bytes[..bytes.len().min(SEARCHED)];
    let len = bytes.len();
    let word = |at: usize| -> u32 {
        bytes
            .get(at..)
            .and_then(|bytes| bytes.first_chunk())
            .map_or(0, |b| u32::from_le_bytes(*b))
    };
    for at in (0..len.saturating_sub(11)).step_by(4) {
        let (magic, flags, checksum) = (word(at), word(at + 4), word(at + 8));
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            continue;
        }
        if flags & FLAG_ADDRESSES != 0 && at + 32 > len {
            // The addresses are not there: no header after all.
            continue;
        }
        return Some(Header {
            offset: at as u64,
            flags,
            header_addr: word(at + 12),
            load_addr: word(at + 16),
            load_end_addr: word(at + 20),
            bss_end_addr: word(at + 24),
            entry_addr: word(at + 28),
        });
    }
    None
}

/// Plans an image with this header, which is an ELF file or not.
pub(super) fn plan<F: Read + Seek>(
    kernel: &Image<F>,
    elf: Option<&ElfFile>,
    header: &Header,
    place: &mut Placement,
    machine: &Machine<'_>,
) -> Result<BootPlan, BootError> {
    let unmet = header.flags & REQUIRED & !REQUIREMENTS_MET;
    if unmet != 0 {
        let problem = "it requires a feature that this machine has not (bit 2 is a video mode)";
        return Err(kernel.bad_field("multiboot flags", unmet.into(), problem));
    }
    let (mut copies, rip) = match elf {
        // The specification lets the addresses of the header win over those of the ELF file.
        _ if header.flags & FLAG_ADDRESSES != 0 => header.claim(kernel, place)?,
        Some(elf) => (elf.claim(kernel, place)?, elf.physical(kernel, elf.entry)?),
        None => {
            let problem = "without bit 16, which gives the load addresses, it must be an ELF file";
            return Err(kernel.bad_field("multiboot flags", header.flags.into(), problem));
        }
    };
    let modules = place.modules(machine.initrds, &mut copies)?;
    let writes = information(kernel, &modules, machine, place)?;
    let entry = Entry::new(Protocol::Multiboot1, CpuMode::Protected32, rip, place);
    let entry = Entry {
        rax: LOADER_MAGIC,
        rbx: layout::START_INFO_ADDR.0,
        ..entry
    };
    Ok(BootPlan {
        entry,
        copies,
        writes,
    })
}

impl Header {
    /// Takes the memory that the header's addresses name; the copy and the entry point.
    fn claim<F: Read + Seek>(
        &self,
        kernel: &Image<F>,
        place: &mut Placement,
    ) -> Result<(Vec<FileCopy>, u64), BootError> {
        let [load, load_end, bss_end] =
            [self.load_addr, self.load_end_addr, self.bss_end_addr].map(u64::from);
        // The header's own address ties file offsets to addresses.
        let offset = u64::from(self.header_addr)
            .checked_sub(load)
            .and_then(|before| self.offset.checked_sub(before))
            .ok_or_else(|| {
                let problem = "the image would begin before the file, or behind its header";
                kernel.bad_field("load_addr", load, problem)
            })?;
        let len = match load_end {
            0 => kernel.len().saturating_sub(offset),
            end => end
                .checked_sub(load)
                .ok_or_else(|| kernel.bad_field("load_end_addr", end, "lower than load_addr"))?,
        };
        kernel.check_range("image", offset, len)?;
        let end = load + len;
        if bss_end != 0 && bss_end < end {
            return Err(kernel.bad_field(
                "bss_end_addr",
                bss_end,
                "lower than the end of the data",
            ));
        }
        let memory_len = bss_end.max(end) - load;
        place.claim(|| kernel.describe(), "image", load, memory_len)?;
        let entry = u64::from(self.entry_addr);
        if !(load..load + memory_len).contains(&entry) {
            return Err(BootError::EntryOutside {
                image: kernel.describe(),
                entry,
            });
        }
        let copy = FileCopy {
            source: Source::Kernel,
            offset,
            len,
            to: GuestAddress(load),
        };
        Ok((if len > 0 { vec![copy] } else { Vec::new() }, entry))
    }
}

/// The information structure with all that it points at: structures in the boot information's page,
/// strings in the command line's area.
fn information<F>(
    kernel: &Image<F>,
    modules: &[Initrd],
    machine: &Machine<'_>,
    place: &Placement,
) -> Result<Vec<(GuestAddress, Vec<u8>)>, BootError> {
    let config = machine.config;
    let mut strings = Strings::default();
    let separator = if config.cmdline.is_empty() { "" } else { " " };
    let cmdline = format!("{}{separator}{}", kernel.name(), config.cmdline);
    cmdline::check(&cmdline, layout::CMDLINE_MAX as u64 - 1)?;
    let cmdline = strings.add(&cmdline);
    let loader_name = strings.add(LOADER_NAME);

    let info = layout::START_INFO_ADDR.0;
    let map: Vec<MemoryRange> = memory_map(config.ram);
    let map_len = map.len() as u64 * MAP_ENTRY_LEN;
    let map_addr = info + INFO_LEN;
    let modules_addr = map_addr + map_len;
    let room = layout::ZERO_PAGE_ADDR.0.saturating_sub(modules_addr) / MODULE_LEN;
    if modules.len() as u64 > room {
        let (count, max) = (modules.len(), room as usize);
        return Err(BootError::TooManyModules { count, max });
    }

    // Everything is below the MMIO hole, so addresses fit into 32 bits.
    let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    if !modules.is_empty() {
        flags |= INFO_MODULES;
    }
    let mut words = [0_u32; INFO_LEN as usize / 4];
    let upper = place.ram_end().saturating_sub(layout::HIGH_RAM.0);
    for (offset, value) in [
        (0, u64::from(flags)),
        (4, layout::EBDA.start / 1024),
        (8, upper / 1024),
        (16, cmdline),
        (20, modules.len() as u64),
        (24, if modules.is_empty() { 0 } else { modules_addr }),
        (44, map_len),
        (48, map_addr),
        (64, loader_name),
    ] {
        words[offset / 4] = value as u32;
    }
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    for range in &map {
        // `size` does not count itself.
        bytes.extend_from_slice(&(MAP_ENTRY_LEN as u32 - 4).to_le_bytes());
        bytes.extend_from_slice(&range.start.0.to_le_bytes());
        bytes.extend_from_slice(&range.len.to_le_bytes());
        bytes.extend_from_slice(&(range.kind as u32).to_le_bytes());
    }
    for (module, file) in modules.iter().zip(machine.initrds) {
        let string = strings.add(&file.path);
        for word in [module.start, module.start + module.len, string, 0] {
            bytes.extend_from_slice(&(word as u32).to_le_bytes());
        }
    }
    let (len, max) = (strings.bytes.len(), layout::CMDLINE_MAX);
    if len > max {
        return Err(BootError::ModuleNames { len, max });
    }
    Ok(vec![
        (layout::START_INFO_ADDR, bytes),
        (layout::CMDLINE_ADDR, strings.bytes),
    ])
}

/// NUL-terminated strings, one behind the other from the command line's address on.
#[derive(Default)]
struct Strings {
    bytes: Vec<u8>,
}

impl Strings {
    /// Appends a string; its guest physical address.
    fn add(&mut self, string: &str) -> u64 {
        let address = layout::CMDLINE_ADDR.0 + self.bytes.len() as u64;
        self.bytes.extend_from_slice(string.as_bytes());
        self.bytes.push(0);
        address
    }
}
