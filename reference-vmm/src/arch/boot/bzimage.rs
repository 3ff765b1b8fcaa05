// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! bzImage: Linux's own format, a real-mode part with the setup header and a protected-mode part
//! that unpacks itself. memtest86+ comes in it too.
//!
//! The real-mode part stays in the file. The other part goes to `pref_address` where the kernel can
//! be relocated (the unpacked kernel then overwrites the packed one, and the host backs that memory
//! once), else to `code32_start`.

use std::io::{Read, Seek};

use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::linux::{self, Loaded};
use super::place::Placement;
use super::{BootError, BootPlan, CpuMode, FileCopy, Image, Machine, Source};
use crate::arch::layout;

/// Offset of the setup header in the file and in the zero page.
const HEADER: u64 = 0x1f1;
/// Offset of "HdrS".
const MAGIC: usize = 0x202;
/// End of "HdrS".
const MAGIC_END: usize = MAGIC + 4;
/// The 64-bit entry point, from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// `setup_sects` that 0 stands for.
const DEFAULT_SETUP_SECTS: u64 = 4;
/// The longest command line before protocol 2.06.
const OLD_CMDLINE_LIMIT: u64 = 255;
/// Where the initrd must end before protocol 2.03 said.
const OLD_INITRD_MAX: u64 = 0x37ff_ffff;

/// The boot protocols in which the fields used here appeared.
mod version {
    pub(super) const HIGH: u16 = 0x0200;
    pub(super) const INITRD_MAX: u16 = 0x0203;
    pub(super) const SYSSIZE_32_BIT: u16 = 0x0204;
    pub(super) const RELOCATABLE: u16 = 0x0205;
    pub(super) const CMDLINE_SIZE: u16 = 0x0206;
    pub(super) const INIT_SIZE: u16 = 0x020a;
    pub(super) const XLOADFLAGS: u16 = 0x020c;
}

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC..MAGIC_END) == Some(&linux::HEADER_MAGIC.to_le_bytes())
}

pub(super) fn plan<F: Read + Seek>(
    kernel: &mut Image<F>,
    place: &mut Placement,
    machine: &Machine<'_>,
) -> Result<BootPlan, BootError> {
    let header = read_header(kernel)?;
    let protocol = header.version;
    let since = |version, value: u64, older: u64| if protocol >= version { value } else { older };
    let image = || kernel.describe();

    let version = u64::from(protocol);
    if protocol < version::HIGH {
        return Err(kernel.bad_field(
            "version",
            version,
            "boot protocols before 2.00 have no high kernels",
        ));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(kernel.bad_field(
            "loadflags",
            u64::from(header.loadflags),
            "this is a zImage, for addresses below 1 MiB",
        ));
    }

    // The protected-mode part of the file.
    let sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTS,
        sectors => u64::from(sectors),
    };
    let offset = (sectors + 1) * 512;
    let in_file = kernel.len().saturating_sub(offset);
    if in_file == 0 {
        kernel.check_range("real-mode part", 0, offset + 1)?;
    }
    let len = if protocol >= version::SYSSIZE_32_BIT {
        // In units of 16 bytes, rounded up. Behind it may be a signature, which is not loaded.
        let len = u64::from(header.syssize) * 16;
        if len == 0 {
            return Err(kernel.bad_field("syssize", 0, "the protected-mode part has no bytes"));
        }
        kernel.check_range("protected-mode part", offset, len - 15)?;
        len.min(in_file)
    } else {
        in_file
    };

    // Where it is loaded, and what the kernel takes there once it runs.
    let relocatable = protocol >= version::RELOCATABLE && header.relocatable_kernel != 0;
    let has_init_size = protocol >= version::INIT_SIZE;
    let (field, load) = if relocatable && has_init_size {
        ("pref_address", header.pref_address)
    } else {
        ("code32_start", u64::from(header.code32_start))
    };
    if load < layout::HIGH_RAM.0 {
        return Err(kernel.bad_field(field, load, "kernels are loaded at 1 MiB or above"));
    }
    let align = u64::from(header.kernel_alignment);
    if relocatable && has_init_size && align != 0 && !load.is_multiple_of(align) {
        return Err(kernel.bad_field(field, load, "not a multiple of kernel_alignment"));
    }
    let init_size = since(version::INIT_SIZE, header.init_size.into(), 0);
    let pref_address = header.pref_address;
    if relocatable || !has_init_size || pref_address == load {
        place.claim(
            image,
            "kernel (with the memory to unpack itself)",
            load,
            len.max(init_size),
        )?;
    } else {
        // It moves itself there, over whatever it was loaded to.
        let what = "kernel (where it moves itself)";
        let start = load.min(pref_address);
        let end = load
            .saturating_add(len)
            .max(pref_address.saturating_add(init_size));
        place.check_ram(image, what, pref_address, init_size)?;
        place.claim(image, what, start, end - start)?;
    }

    let xloadflags = since(version::XLOADFLAGS, header.xloadflags.into(), 0);
    let (mode, rip) = if xloadflags & u64::from(XLF_KERNEL_64) != 0 {
        if len <= ENTRY_64 {
            let syssize = u64::from(header.syssize);
            return Err(kernel.bad_field(
                "syssize",
                syssize,
                "too short for the 64-bit entry at 512",
            ));
        }
        (CpuMode::Long64, load + ENTRY_64)
    } else {
        (CpuMode::Protected32, load)
    };

    let cmdline_limit = since(
        version::CMDLINE_SIZE,
        header.cmdline_size.into(),
        OLD_CMDLINE_LIMIT,
    );
    let initrd_max = since(
        version::INITRD_MAX,
        header.initrd_addr_max.into(),
        OLD_INITRD_MAX,
    );
    let copies = vec![FileCopy {
        source: Source::Kernel,
        offset,
        len,
        to: GuestAddress(load),
    }];
    let header = setup_header {
        code32_start: load as u32,
        ..header
    };
    let initrd_limit = initrd_max + 1;
    linux::finish(
        Loaded {
            header,
            mode,
            rip,
            cmdline_limit,
            initrd_limit,
            copies,
        },
        place,
        machine,
    )
}

/// Reads the header up to where it says that it ends; what is behind stays zero, as the zero page
/// must have it.
fn read_header<F: Read + Seek>(kernel: &mut Image<F>) -> Result<setup_header, BootError> {
    // The second byte of the jump instruction at 0x200 is the distance from the magic to the end.
    let jump = kernel.head().get(MAGIC - 1).copied().map_or(0, u64::from);
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let end = (MAGIC as u64 + jump).min(HEADER + bytes.len() as u64);
    let len = (end - HEADER) as usize;
    kernel.read_at("setup header", HEADER, &mut bytes[..len])?;
    Ok(header)
}
