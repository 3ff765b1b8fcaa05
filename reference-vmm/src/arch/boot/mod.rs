// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a kernel image to a vCPU's first instruction.
//!
//! Two steps, so that a configuration that cannot work is refused before a VM exists:
//!
//! 1. [`plan`] reads the image's headers and decides everything: the protocol, where each byte
//!    goes, what the kernel is told, and the registers it starts with. It writes nowhere.
//! 2. [`BootPlan::load`] carries it out: file contents go straight into guest memory with `read`,
//!    never through a buffer, so a kernel costs no memory of the monitor's own.
//!
//! # Which protocol
//!
//! | image | protocol | first mode |
//! | --- | --- | --- |
//! | bzImage with `XLF_KERNEL_64` | Linux 64-bit ([`Protocol::Linux64`]) | long mode |
//! | other bzImage | Linux 32-bit ([`Protocol::Linux32`]) | 32-bit protected mode |
//! | ELF64 with notes of Linux | Linux 64-bit | long mode |
//! | ELF with the PVH note | PVH ([`Protocol::Pvh`]) | 32-bit protected mode |
//! | ELF or raw image with a multiboot header | multiboot 1 ([`Protocol::Multiboot1`]) | 32-bit protected mode |
//! | any other ELF64 | Linux 64-bit: `boot_params` in RSI | long mode |
//!
//! The first row that fits wins. A Linux `vmlinux` has both an entry for the 64-bit protocol and
//! the PVH note; the 64-bit one starts in the mode the kernel ends up in, and skips the code that
//! builds page tables and turns `hvm_start_info` into `boot_params`. [`Preference::Pvh`] asks for
//! the other.
//!
//! # Threat model
//!
//! Images are hostile. Every number in a header is checked against the file's length and the
//! guest's RAM before it is used, sums are checked for overflow, no allocation is sized by a header
//! (program headers and notes are read up to fixed limits), and what is copied never overlaps, so
//! the work is bounded by the guest's RAM. linux-loader's loaders are not used for that reason (a
//! note's offset overflows there, and every program header may name the whole file again); its
//! structure definitions are.
//!
//! # Known limits
//!
//! The kernel and its initrd are placed below the MMIO hole, also where the protocol allows more.
//! No video modes (multiboot images that insist are refused), no EFI.

mod bzimage;
mod cmdline;
mod elf;
mod error;
mod image;
mod linux;
mod memory_map;
mod multiboot;
mod place;
mod pvh;

use std::io::{Read, Seek};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

pub use error::BootError;
pub use image::{Image, ImageKind};
pub use memory_map::{MemoryKind, MemoryRange, memory_map};

use crate::arch::layout;
use place::Placement;

/// How a kernel is entered and told about the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Protocol {
    /// Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
    Linux64,
    /// Linux's 32-bit boot protocol (same file, "32-bit boot protocol").
    Linux32,
    /// Xen's PVH entry (xen/include/public/arch-x86/hvm/start_info.h).
    Pvh,
    /// Multiboot specification 0.6.96.
    Multiboot1,
}

/// The mode in which the first vCPU starts. Segments are flat in both, interrupts off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMode {
    /// Long mode with the identity map at [`Entry::page_tables`].
    Long64,
    /// 32-bit protected mode, paging off.
    Protected32,
}

/// The state of the first vCPU at the kernel's first instruction: what is not named here is zero,
/// and RFLAGS is 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The protocol that the rest follows.
    pub protocol: Protocol,
    /// The mode.
    pub mode: CpuMode,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer: a stack of one page, which no protocol promises.
    pub rsp: u64,
    /// RAX: multiboot's magic, else 0.
    pub rax: u64,
    /// RBX: `hvm_start_info` or the multiboot information, else 0.
    pub rbx: u64,
    /// RSI: Linux's `boot_params`, else 0.
    pub rsi: u64,
    /// Where a GDT with the entry's segments belongs, for kernels that reload them.
    pub gdt: GuestAddress,
    /// Where kvm-core's `LongModeTables` belong for [`CpuMode::Long64`]: the same address, because
    /// they begin with the GDT. The page tables behind it map guest physical memory one to one.
    pub page_tables: GuestAddress,
    /// How much the page tables map from address 0 on, in GiB (1 to
    /// [`layout::IDENTITY_MAX_GIB`]): all that the plan places.
    pub identity_gib: u64,
}

/// Which protocol to take where an image offers several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// The table in the [module's documentation](self).
    #[default]
    Fastest,
    /// PVH where the image has the note.
    Pvh,
}

/// What the monitor decided before it looked at the kernel.
#[derive(Clone, Copy, Debug)]
pub struct BootConfig<'a> {
    /// The guest's RAM: start and length in bytes, ascending, the first one from address 0. As from
    /// `memslots::ram_layout`.
    pub ram: &'a [(GuestAddress, u64)],
    /// The kernel's command line, without a NUL.
    pub cmdline: &'a str,
    /// The ACPI tables' RSDP, told to kernels whose protocol has a place for it.
    pub rsdp: Option<GuestAddress>,
    /// Protocol to take where there is a choice.
    pub preference: Preference,
}

/// The file that a [`FileCopy`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The kernel image.
    Kernel,
    /// The initrd or module with this index.
    Initrd(usize),
}

/// A part of a file that goes into guest memory as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileCopy {
    /// The file.
    pub source: Source,
    /// Offset of the first byte in it.
    pub offset: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// Where they go.
    pub to: GuestAddress,
}

/// All that has to be done to start a kernel.
///
/// Guest memory is taken to be zero where the plan writes nothing (an ELF image's `.bss`, the rest
/// of a structure's page), as memory of a new VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootPlan {
    /// How the first vCPU starts.
    pub entry: Entry,
    /// Parts of files. They overlap neither one another nor `writes`.
    pub copies: Vec<FileCopy>,
    /// Bytes made by the monitor: structures of the protocol and the command line.
    pub writes: Vec<(GuestAddress, Vec<u8>)>,
}

/// Decides how `kernel` is started on the machine that `config` describes, with `initrds` as its
/// initial RAM disk (Linux and PVH: one after the other, each on a 4-byte boundary, which the
/// kernel unpacks in turn) or its modules (multiboot).
///
/// Reads headers from the files, blocks as their `read` does, allocates some KiB, and changes
/// nothing.
///
/// # Errors
///
/// [`BootError`] says which file or option is wrong, with the value.
pub fn plan<F: Read + Seek>(
    kernel: &mut Image<F>,
    initrds: &[Image<F>],
    config: &BootConfig<'_>,
) -> Result<BootPlan, BootError> {
    let mut place = Placement::new(config.ram)?;
    cmdline::check(config.cmdline, layout::CMDLINE_MAX as u64 - 1)?;
    let machine = Machine {
        config,
        initrds: &sizes(initrds),
    };

    if kernel.head().starts_with(elf::MAGIC) {
        let elf = elf::ElfFile::parse(kernel)?;
        let multiboot = multiboot::find_header(kernel.head());
        return match (elf.is_linux && elf.is_64, elf.pvh_entry, multiboot) {
            (linux, Some(entry), _) if !linux || config.preference == Preference::Pvh => {
                pvh::plan(kernel, &elf, entry, &mut place, &machine)
            }
            (false, None, Some(header)) => {
                multiboot::plan(kernel, Some(&elf), &header, &mut place, &machine)
            }
            _ if elf.is_64 => linux::plan_elf(kernel, &elf, &mut place, &machine),
            _ => Err(BootError::NoEntry {
                image: kernel.describe(),
            }),
        };
    }
    if bzimage::is_bzimage(kernel.head()) {
        return bzimage::plan(kernel, &mut place, &machine);
    }
    if let Some(header) = multiboot::find_header(kernel.head()) {
        return multiboot::plan(kernel, None, &header, &mut place, &machine);
    }
    Err(error::not_a_kernel(kernel.describe(), kernel.head()))
}

impl BootPlan {
    /// Carries the plan out on `memory`, from the files that it was made of. Reads from the files
    /// until everything is copied.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is shorter by now, or `memory` without the RAM that the plan
    /// was made for. `memory` has a part of the contents then, and no vCPU should run on it.
    pub fn load<M, F>(
        &self,
        memory: &M,
        kernel: &mut Image<F>,
        initrds: &mut [Image<F>],
    ) -> Result<(), BootError>
    where
        M: GuestMemoryBackend,
        F: ReadVolatile + Seek,
    {
        for copy in &self.copies {
            match copy.source {
                Source::Kernel => kernel.copy_to(memory, copy)?,
                Source::Initrd(index) => {
                    let given = initrds.len();
                    initrds
                        .get_mut(index)
                        .ok_or(BootError::MissingInitrd { index, given })?
                        .copy_to(memory, copy)?;
                }
            }
        }
        write_all(memory, &self.writes)
    }
}

/// Writes each block of bytes to its address: for [`BootPlan::writes`] and the ACPI tables.
///
/// # Errors
///
/// [`BootError::Memory`] where `memory` has no RAM at one of them; what stands before it has been
/// written.
pub fn write_all<M: GuestMemoryBackend>(
    memory: &M,
    blocks: &[(GuestAddress, Vec<u8>)],
) -> Result<(), BootError> {
    for (address, bytes) in blocks {
        memory
            .write_slice(bytes, *address)
            .map_err(|source| BootError::Memory {
                address: address.0,
                len: bytes.len() as u64,
                source,
            })?;
    }
    Ok(())
}

/// What the protocols' planners share.
struct Machine<'a> {
    config: &'a BootConfig<'a>,
    initrds: &'a [InitrdFile],
}

/// Name and length of an initrd; its contents do not matter for a plan.
struct InitrdFile {
    /// Kind and path, for messages.
    name: String,
    /// The path alone, which a multiboot kernel is told.
    path: String,
    len: u64,
}

fn sizes<F>(initrds: &[Image<F>]) -> Vec<InitrdFile> {
    let file = |image: &Image<F>| InitrdFile {
        name: image.describe(),
        path: image.name().to_owned(),
        len: image.len(),
    };
    initrds.iter().map(file).collect()
}

impl Entry {
    /// An entry with the fixed addresses of [`layout`] and no arguments in registers.
    fn new(protocol: Protocol, mode: CpuMode, rip: u64, place: &Placement) -> Self {
        Entry {
            protocol,
            mode,
            rip,
            rsp: layout::BOOT_STACK_TOP.0,
            rax: 0,
            rbx: 0,
            rsi: 0,
            gdt: layout::BOOT_TABLES_ADDR,
            page_tables: layout::BOOT_TABLES_ADDR,
            identity_gib: place
                .top()
                .div_ceil(1 << 30)
                .clamp(1, layout::IDENTITY_MAX_GIB),
        }
    }
}
