// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What each boot protocol promises a kernel: where its image goes, what it finds in memory, and the
//! registers it starts with.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod images;

use std::io::{self, Cursor, Read, Seek, SeekFrom};

use images::*;
use reference_vmm::arch::boot::{
    BootConfig, BootError, BootPlan, CpuMode, FileCopy, Image, ImageKind, Preference, Protocol,
    Source, plan,
};
use reference_vmm::arch::layout;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

fn memory() -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
}

fn kernel_copy(offset: usize, len: usize, to: u64) -> FileCopy {
    let (offset, len, to) = (offset as u64, len as u64, GuestAddress(to));
    FileCopy {
        source: Source::Kernel,
        offset,
        len,
        to,
    }
}

fn write_at(plan: &BootPlan, address: GuestAddress) -> &[u8] {
    &plan.writes.iter().find(|(at, _)| *at == address).unwrap().1
}

fn number(bytes: &[u8], offset: usize, width: usize) -> u64 {
    let mut value = [0; 8];
    value[..width].copy_from_slice(&bytes[offset..offset + width]);
    u64::from_le_bytes(value)
}

/// The E820 map of a zero page: start, length, type.
fn e820(zero_page: &[u8]) -> Vec<(u64, u64, u64)> {
    let count = usize::from(zero_page[0x1e8]);
    let entry = |i| 0x2d0 + 20 * i;
    (0..count)
        .map(|i| {
            let at = entry(i);
            (
                number(zero_page, at, 8),
                number(zero_page, at + 8, 8),
                number(zero_page, at + 16, 4),
            )
        })
        .collect()
}

const MAP_OF_64_MIB: [(u64, u64, u64); 5] = [
    (0, 0x9_fc00, 1),
    (0x9_fc00, 0x400, 2),
    (0xe_0000, 0x2_0000, 2),
    (0x10_0000, 63 * MIB, 1),
    (0xfffb_c000, 0x4000, 2),
];

#[test]
fn a_relocatable_bzimage_starts_in_long_mode_at_its_preferred_address() {
    let plan = plan_of(bzimage()).unwrap();
    assert_eq!(plan.entry.protocol, Protocol::Linux64);
    assert_eq!(plan.entry.mode, CpuMode::Long64);
    assert_eq!(plan.entry.rip, 16 * MIB + 0x200);
    assert_eq!(plan.entry.rsi, layout::ZERO_PAGE_ADDR.0);
    assert_eq!((plan.entry.rax, plan.entry.rbx), (0, 0));
    assert_eq!(plan.entry.identity_gib, 1);
    assert_eq!(plan.copies, [kernel_copy(SETUP_LEN, PAYLOAD_LEN, 16 * MIB)]);
}

#[test]
fn linux_finds_its_header_map_command_line_and_rsdp_in_the_zero_page() {
    let plan = plan_of(bzimage()).unwrap();
    let page = write_at(&plan, layout::ZERO_PAGE_ADDR);
    assert_eq!(page.len(), 4096);
    assert_eq!(number(page, hdr::MAGIC, 4), 0x5372_6448);
    assert_eq!(number(page, hdr::VERSION, 2), 0x020f);
    assert_eq!(page[hdr::TYPE_OF_LOADER], 0xff);
    assert_eq!(number(page, hdr::CMD_LINE_PTR, 4), layout::CMDLINE_ADDR.0);
    // What the kernel says stays as it said it: memtest86+ reads cmdline_size bytes.
    assert_eq!(number(page, hdr::CMDLINE_SIZE, 4), 2047);
    assert_eq!(number(page, hdr::INIT_SIZE, 4), 8 * MIB);
    assert_eq!(number(page, 0x70, 8), RSDP);
    assert_eq!(e820(page), MAP_OF_64_MIB);
    assert_eq!(write_at(&plan, layout::CMDLINE_ADDR), b"x\0");
    // Nothing of the file but the header: Linux takes a sentinel that is not 0 for a wild loader.
    assert!(
        page[..0x70]
            .iter()
            .chain(&page[0x78..0x1e8])
            .all(|byte| *byte == 0)
    );
    assert_eq!(page[0x1ef], 0);
}

#[test]
fn the_setup_header_ends_where_the_image_says() {
    let mut image = bzimage();
    set(&mut image, hdr::VERSION, 2, 0x0206);
    // The jump at 0x200 goes behind cmdline_size, the last field of 2.06: code follows.
    image[0x201] = 0x3a;
    image[0x23c..0x300].fill(0xcc);
    let plan = plan_of(image).unwrap();
    let page = write_at(&plan, layout::ZERO_PAGE_ADDR);
    assert_ne!(number(page, hdr::CMDLINE_SIZE, 4), 0);
    assert!(page[0x23c..0x2d0].iter().all(|byte| *byte == 0));
}

#[test]
fn an_old_bzimage_starts_in_protected_mode_at_code32_start() {
    let mut image = bzimage();
    set(&mut image, hdr::VERSION, 2, 0x0206);
    let plan = plan_of(image).unwrap();
    assert_eq!(plan.entry.protocol, Protocol::Linux32);
    assert_eq!(plan.entry.mode, CpuMode::Protected32);
    assert_eq!(plan.entry.rip, MIB);
    assert_eq!(plan.entry.rsi, layout::ZERO_PAGE_ADDR.0);
}

/// memtest86+ 6.10 of Debian: not relocatable, header of protocol 2.12, 255 bytes of command line.
#[test]
fn an_image_like_memtest_starts_at_1_mib() {
    for (xloadflags, mode, rip) in [
        (9, CpuMode::Long64, MIB + 0x200),
        (4, CpuMode::Protected32, MIB),
    ] {
        let mut image = bzimage();
        for (offset, width, value) in [
            (hdr::VERSION, 2, 0x020c),
            (hdr::RELOCATABLE, 1, 0),
            (hdr::KERNEL_ALIGNMENT, 4, 0x1000),
            (hdr::INITRD_ADDR_MAX, 4, 0xffff_ffff),
            (hdr::XLOADFLAGS, 2, xloadflags),
            (hdr::CMDLINE_SIZE, 4, 255),
            (hdr::PREF_ADDRESS, 8, MIB),
            (hdr::INIT_SIZE, 4, 0x6_acf8),
        ] {
            set(&mut image, offset, width, value);
        }
        let plan = plan_of(image).unwrap();
        assert_eq!((plan.entry.mode, plan.entry.rip), (mode, rip));
        assert_eq!(plan.copies, [kernel_copy(SETUP_LEN, PAYLOAD_LEN, MIB)]);
    }
}

#[test]
fn syssize_may_round_up_and_what_is_behind_it_stays_in_the_file() {
    let mut short = bzimage();
    short.truncate(SETUP_LEN + PAYLOAD_LEN - 8);
    let plan = plan_of(short).unwrap();
    assert_eq!(
        plan.copies,
        [kernel_copy(SETUP_LEN, PAYLOAD_LEN - 8, 16 * MIB)]
    );
    let mut signed = bzimage();
    signed.extend([0xee; 1500]);
    let plan = plan_of(signed).unwrap();
    assert_eq!(plan.copies, [kernel_copy(SETUP_LEN, PAYLOAD_LEN, 16 * MIB)]);
}

#[test]
fn an_initrd_ends_below_what_the_kernel_can_reach_and_above_the_kernel() {
    let mut image = bzimage();
    set(&mut image, hdr::INITRD_ADDR_MAX, 4, 40 * MIB - 1);
    let initrds = [initrd("a", vec![1; 5000])];
    let plan = plan(&mut kernel(image.clone()), &initrds, &config("")).unwrap();
    let start = 40 * MIB - 8192;
    let copy = FileCopy {
        source: Source::Initrd(0),
        offset: 0,
        len: 5000,
        to: GuestAddress(start),
    };
    assert_eq!(plan.copies[1], copy);
    let page = write_at(&plan, layout::ZERO_PAGE_ADDR);
    assert_eq!(number(page, hdr::RAMDISK_IMAGE, 4), start);
    assert_eq!(number(page, hdr::RAMDISK_SIZE, 4), 5000);

    // 16 MiB below the limit are the kernel's 8 MiB from 16 MiB on; 15 MiB fit below it alone.
    let below = [initrd("a", vec![1; 15 * MIB as usize])];
    set(&mut image, hdr::INITRD_ADDR_MAX, 4, 30 * MIB - 1);
    let plan = images_plan(&image, &below).unwrap();
    assert_eq!(plan.copies[1].to.0, MIB);
    let above = [initrd("a", vec![1; 16 * MIB as usize])];
    let error = images_plan(&image, &above).unwrap_err();
    assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
}

fn images_plan(image: &[u8], initrds: &[Image<Cursor<Vec<u8>>>]) -> Result<BootPlan, BootError> {
    plan(&mut kernel(image), initrds, &config(""))
}

#[test]
fn memory_above_the_hole_is_told_and_an_initrd_stays_below_it() {
    let ram = [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 3 << 30)];
    let config = BootConfig {
        ram: &ram,
        ..config("")
    };
    let initrds = [initrd("a", vec![1; 4096])];
    let plan = plan(&mut kernel(bzimage()), &initrds, &config).unwrap();
    assert_eq!(plan.copies[1].to.0, 0x8000_0000 - 4096);
    assert_eq!(plan.entry.identity_gib, 2);
    let map = e820(write_at(&plan, layout::ZERO_PAGE_ADDR));
    assert_eq!(map.last(), Some(&(4 << 30, 3 << 30, 1)));
    assert_eq!(map[3], (MIB, (3 << 30) - MIB, 1));
}

#[test]
fn an_elf_file_that_is_not_linux_starts_in_long_mode_with_boot_params() {
    let plan = plan_of(elf64(&[])).unwrap();
    assert_eq!(plan.entry.protocol, Protocol::Linux64);
    assert_eq!(
        (plan.entry.mode, plan.entry.rip),
        (CpuMode::Long64, MIB + 4)
    );
    assert_eq!(plan.entry.rsi, layout::ZERO_PAGE_ADDR.0);
    assert_eq!(plan.entry.rsp, layout::BOOT_STACK_TOP.0);
    let [code, data] = plan.copies[..] else {
        panic!("two segments")
    };
    assert_eq!((code.len, code.to.0), (300, MIB));
    assert_eq!(
        (data.len, data.to.0, data.offset),
        (100, 2 * MIB, code.offset + 300)
    );
    let page = write_at(&plan, layout::ZERO_PAGE_ADDR);
    assert_eq!(number(page, 0x1fe, 2), 0xaa55);
    assert_eq!(
        number(page, hdr::CMDLINE_SIZE, 4),
        layout::CMDLINE_MAX as u64 - 1
    );
    assert_eq!(e820(page), MAP_OF_64_MIB);
}

#[test]
fn a_virtual_entry_point_is_translated() {
    let high = Segment {
        virtual_start: 0xffff_ffff_8010_0000,
        ..segment(MIB, vec![0; 64], 64)
    };
    let image = elf(true, 0xffff_ffff_8010_0010, &[high], &[], &[]);
    assert_eq!(plan_of(image).unwrap().entry.rip, MIB + 16);
}

#[test]
fn the_notes_decide_how_an_elf_file_starts() {
    use Preference::{Fastest, Pvh};
    let entry = MIB as u32 + 8;
    let both = [linux_note(), pvh_note(entry)].concat();
    let eight_bytes = note("Xen", 18, &u64::from(entry).to_le_bytes());
    let far = [
        note("GNU", 3, &[7; 20]),
        note("Xen", 6, b"guest"),
        pvh_note(entry),
    ]
    .concat();
    for (notes, preference, protocol, rip) in [
        (&both, Fastest, Protocol::Linux64, MIB + 4),
        (&both, Pvh, Protocol::Pvh, MIB + 8),
        (&linux_note(), Pvh, Protocol::Linux64, MIB + 4),
        (&pvh_note(entry), Fastest, Protocol::Pvh, MIB + 8),
        (&eight_bytes, Fastest, Protocol::Pvh, MIB + 8),
        (&far, Fastest, Protocol::Pvh, MIB + 8),
        (
            &note("Xen", 18, &[1, 2]),
            Fastest,
            Protocol::Linux64,
            MIB + 4,
        ),
    ] {
        let config = BootConfig {
            preference,
            ..config("x")
        };
        let plan = plan(&mut kernel(elf64(notes)), &[], &config).unwrap();
        assert_eq!((plan.entry.protocol, plan.entry.rip), (protocol, rip));
    }
}

#[test]
fn pvh_finds_its_map_module_command_line_and_rsdp() {
    let initrds = [initrd("a", vec![1; 5]), initrd("b", vec![2; 7])];
    let image = elf64(&pvh_note(MIB as u32));
    let plan = plan(&mut kernel(image), &initrds, &config("console")).unwrap();
    assert_eq!(plan.entry.mode, CpuMode::Protected32);
    assert_eq!(plan.entry.rbx, layout::START_INFO_ADDR.0);
    let info = write_at(&plan, layout::START_INFO_ADDR);
    let base = layout::START_INFO_ADDR.0;
    let pointed = |offset: usize| (number(info, offset, 8) - base) as usize;
    assert_eq!(number(info, 0, 4), 0x336e_c578);
    assert_eq!(number(info, 4, 4), 1);
    assert_eq!(number(info, 12, 4), 1);
    let module = pointed(16);
    assert_eq!(number(info, module, 8), 64 * MIB - 4096);
    assert_eq!(number(info, module + 8, 8), 8 + 7);
    assert_eq!(number(info, 24, 8), layout::CMDLINE_ADDR.0);
    assert_eq!(number(info, 32, 8), RSDP);
    let (map, count) = (pointed(40), number(info, 48, 4) as usize);
    let entry = |i| {
        let at = map + 24 * i;
        (
            number(info, at, 8),
            number(info, at + 8, 8),
            number(info, at + 16, 4),
        )
    };
    assert_eq!((0..count).map(entry).collect::<Vec<_>>(), MAP_OF_64_MIB);
    assert_eq!(write_at(&plan, layout::CMDLINE_ADDR), b"console\0");
}

#[test]
fn multiboot_finds_its_memory_command_line_and_modules() {
    let initrds = [initrd("env", vec![1; 5]), initrd("second", vec![2; 4097])];
    let plan = plan(&mut kernel(multiboot_elf()), &initrds, &config("a b")).unwrap();
    let entry = plan.entry;
    assert_eq!(
        (entry.protocol, entry.mode),
        (Protocol::Multiboot1, CpuMode::Protected32)
    );
    assert_eq!((entry.rip, entry.rax), (4 * MIB + 16, 0x2bad_b002));
    assert_eq!(entry.rbx, layout::START_INFO_ADDR.0);

    let memory = memory();
    let (mut kernel, mut initrds) = (kernel(multiboot_elf()), initrds);
    plan.load(&memory, &mut kernel, &mut initrds).unwrap();
    let word = |address: u64| u64::from(memory.read_obj::<u32>(GuestAddress(address)).unwrap());
    let string = |address: u64| {
        let mut bytes = [0; 64];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        String::from_utf8(bytes.split(|b| *b == 0).next().unwrap().to_vec()).unwrap()
    };
    let info = entry.rbx;
    assert_eq!(word(info), 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    assert_eq!((word(info + 4), word(info + 8)), (639, 63 * 1024));
    assert_eq!(string(word(info + 16)), "k a b");
    assert_eq!(string(word(info + 64)), "reference-vmm");
    assert_eq!(word(info + 20), 2);
    let modules = word(info + 24);
    let first = (word(modules), word(modules + 4), string(word(modules + 8)));
    let second = (
        word(modules + 16),
        word(modules + 20),
        string(word(modules + 24)),
    );
    assert_eq!(
        first,
        (64 * MIB - 4096, 64 * MIB - 4096 + 5, "env".to_owned())
    );
    assert_eq!(second.1 - second.0, 4097);
    assert_eq!(second.0 % 4096, 0);
    assert_eq!(second.2, "second");
    assert_eq!(word(first.0), 0x0101_0101);
    let (map, len) = (word(info + 48), word(info + 44));
    let entries: Vec<_> = (0..len / 24)
        .map(|i| {
            let at = map + 24 * i;
            assert_eq!(word(at), 20);
            (word(at + 4), word(at + 12), word(at + 20))
        })
        .collect();
    assert_eq!(entries, MAP_OF_64_MIB);
}

#[test]
fn a_raw_multiboot_image_goes_where_its_header_says() {
    let plan = plan_of(multiboot_raw()).unwrap();
    assert_eq!(plan.entry.protocol, Protocol::Multiboot1);
    assert_eq!(plan.entry.rip, 2 * MIB + 64);
    // The header at 64 says its address is load + 32: the image begins 32 bytes into the file.
    assert_eq!(plan.copies, [kernel_copy(32, 1000, 2 * MIB)]);
}

#[test]
fn loading_puts_every_byte_where_the_plan_says() {
    let (mut kernel, mut initrds) = (kernel(elf64(&[])), [initrd("a", vec![7; 5000])]);
    let plan = plan(&mut kernel, &initrds, &config("hello")).unwrap();
    let memory = memory();
    plan.load(&memory, &mut kernel, &mut initrds).unwrap();
    let read = |address: u64, len: usize| {
        let mut bytes = vec![0; len];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    };
    assert_eq!(read(MIB, 301), [vec![0xf4; 300], vec![0]].concat());
    assert_eq!(read(2 * MIB, 101), [vec![0x55; 100], vec![0]].concat());
    assert_eq!(read(layout::CMDLINE_ADDR.0, 6), b"hello\0");
    assert_eq!(read(plan.copies[2].to.0, 5000), vec![7; 5000]);
}

/// A file that grew or shrank between plan and load, or whose disk fails.
#[test]
fn a_file_that_changed_is_an_error_at_load() {
    let plan = plan_of(bzimage()).unwrap();
    let error = plan
        .load(&memory(), &mut kernel(vec![1; 2000]), &mut [])
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel image k had 2000 bytes when it was opened and has fewer now"
    );
    let with_initrd = images_plan(&bzimage(), &[initrd("a", vec![1])]).unwrap();
    let error = with_initrd
        .load(&memory(), &mut kernel(bzimage()), &mut [])
        .unwrap_err();
    assert!(
        matches!(error, BootError::MissingInitrd { index: 0, given: 0 }),
        "{error}"
    );
    let small = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MIB as usize)]).unwrap();
    let error = plan
        .load(&small, &mut kernel(bzimage()), &mut [])
        .unwrap_err();
    assert!(
        matches!(
            error,
            BootError::Memory {
                address: 0x100_0000,
                ..
            }
        ),
        "{error}"
    );
}

/// Fails the n-th read or seek.
struct Failing {
    file: Cursor<Vec<u8>>,
    calls_left: u32,
}

impl Failing {
    fn call(&mut self) -> io::Result<()> {
        if self.calls_left == 0 {
            return Err(io::Error::from_raw_os_error(5));
        }
        self.calls_left -= 1;
        Ok(())
    }
}

impl Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.call()?;
        self.file.read(buffer)
    }
}

impl Seek for Failing {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.call()?;
        self.file.seek(to)
    }
}

#[test]
fn every_read_that_fails_is_told_with_the_file() {
    for bytes in [
        bzimage(),
        elf64(&pvh_note(MIB as u32)),
        multiboot_elf(),
        multiboot_raw(),
    ] {
        for calls_left in 0.. {
            let file = Failing {
                file: Cursor::new(bytes.clone()),
                calls_left,
            };
            let result = Image::new(ImageKind::Kernel, "k", file)
                .and_then(|mut kernel| plan(&mut kernel, &[], &config("x")));
            match result {
                Ok(_) => break,
                Err(error) => assert_eq!(
                    error.to_string(),
                    "cannot read the kernel image k: Input/output error (os error 5)"
                ),
            }
            assert!(calls_left < 100);
        }
    }
}
