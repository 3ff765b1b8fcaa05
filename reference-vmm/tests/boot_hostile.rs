// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hostile images: whatever stands in a kernel's headers, planning it ends soon, in little memory,
//! without a panic, and a plan that comes out can be carried out within the guest's RAM.
//!
//! `LONG_TESTS=1` runs forty times as many images. The seeds are fixed: a failure repeats.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod images;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, Cursor, Read, Seek, SeekFrom};

use images::*;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use reference_vmm::arch::boot::{
    BootConfig, BootPlan, CpuMode, Image, ImageKind, Preference, Source, plan,
};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Most bytes that planning may allocate at once.
const LARGEST_ALLOCATION: usize = 128 << 10;
/// Most bytes and reads that planning may take from a file.
const MOST_READ: usize = 256 << 10;
const MOST_READS: usize = 600;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, which remembers the largest request of each thread.
struct Watched;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(layout.size())));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// A file that counts what is read from it.
struct Counted {
    file: Cursor<Vec<u8>>,
    reads: usize,
    bytes: usize,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read(buffer)?;
        self.reads += 1;
        self.bytes += len;
        assert!(self.reads <= MOST_READS, "{} reads", self.reads);
        assert!(self.bytes <= MOST_READ, "{} bytes read", self.bytes);
        Ok(len)
    }
}

impl Seek for Counted {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// A change to an image.
#[derive(Clone, Debug)]
enum Mutation {
    /// Bytes `offset..offset + width` become `value`.
    Set {
        offset: usize,
        width: usize,
        value: u64,
    },
    /// The same, in the part of the file where the headers are.
    SetInHeader {
        offset: usize,
        width: usize,
        value: u64,
    },
    /// The file ends early.
    Truncate(usize),
    /// The file goes on with a copy of its beginning.
    Extend(usize),
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0_u64..16,
        (0_u64..64).prop_map(|bit| 1 << bit),
        (0_u64..64, 0_u64..4096).prop_map(|(bit, off)| (1_u64 << bit).wrapping_sub(off)),
        (0_u64..64).prop_map(|mib| mib << 20),
        Just(u64::MAX),
        Just(u64::from(u32::MAX)),
        Just(0x7fff_ffff_ffff_ffff),
    ]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let width = || prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)];
    prop_oneof![
        1 => (any::<usize>(), width(), value())
            .prop_map(|(offset, width, value)| Mutation::Set { offset, width, value }),
        8 => (0_usize..0x100, width(), value())
            .prop_map(|(offset, width, value)| Mutation::SetInHeader { offset, width, value }),
        1 => any::<usize>().prop_map(Mutation::Truncate),
        1 => (0_usize..20_000).prop_map(Mutation::Extend),
    ]
}

/// The images, each with the offset from which on its headers stand.
fn originals() -> Vec<(usize, Vec<u8>)> {
    let notes = [
        linux_note(),
        pvh_note(MIB as u32 + 8),
        note("GNU", 3, &[9; 20]),
    ]
    .concat();
    let note_segments = elf(
        true,
        MIB,
        &[
            segment(MIB, notes.clone(), 4096),
            segment(2 * MIB, vec![1; 64], 64),
        ],
        &notes,
        &multiboot_header(1 << 16, &[0, 0, 0, 0, 0]),
    );
    let mut old = bzimage();
    set(&mut old, hdr::VERSION, 2, 0x0202);
    vec![
        (0x1f0, bzimage()),
        (0x1f0, old),
        (0, elf64(&[])),
        (0, elf64(&notes)),
        (0, elf64(&pvh_note(MIB as u32))),
        (176 + 56, elf64(&notes)),
        (0, note_segments),
        (0, multiboot_elf()),
        (52, multiboot_elf()),
        (64, multiboot_raw()),
    ]
}

fn mutate(headers: usize, image: &mut Vec<u8>, mutations: &[Mutation]) {
    for mutation in mutations {
        match *mutation {
            Mutation::Set {
                offset,
                width,
                value,
            } => {
                let offset = offset % image.len();
                write(image, offset, width, value);
            }
            Mutation::SetInHeader {
                offset,
                width,
                value,
            } => {
                write(image, headers + offset, width, value);
            }
            Mutation::Truncate(len) => image.truncate(1 + len % image.len()),
            Mutation::Extend(len) => {
                let more: Vec<u8> = image.iter().copied().cycle().take(len).collect();
                image.extend(more);
            }
        }
    }
}

fn write(image: &mut [u8], offset: usize, width: usize, value: u64) {
    for (at, byte) in (offset..offset + width).zip(value.to_le_bytes()) {
        if let Some(place) = image.get_mut(at) {
            *place = byte;
        }
    }
}

/// Checks a plan against the RAM and the files that it was made for.
fn check(plan: &BootPlan, ram: &[(GuestAddress, u64)], kernel_len: u64, initrd_len: u64) {
    let low_end = ram[0].1;
    let mut ranges = Vec::new();
    for copy in &plan.copies {
        let file_len = match copy.source {
            Source::Kernel => kernel_len,
            Source::Initrd(0) => initrd_len,
            Source::Initrd(index) => panic!("initrd {index}"),
        };
        assert!(copy.len > 0);
        assert!(
            copy.offset.checked_add(copy.len).unwrap() <= file_len,
            "{copy:?}"
        );
        ranges.push((copy.to.0, copy.to.0.checked_add(copy.len).unwrap()));
    }
    for (address, bytes) in &plan.writes {
        ranges.push((address.0, address.0 + bytes.len() as u64));
    }
    ranges.sort_unstable();
    assert!(ranges.iter().all(|(_, end)| *end <= low_end), "{ranges:x?}");
    assert!(
        ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0),
        "{ranges:x?}"
    );
    let entry = &plan.entry;
    assert!(entry.rip < low_end);
    assert!((1..=4).contains(&entry.identity_gib));
    if entry.mode == CpuMode::Protected32 {
        assert!(u32::try_from(entry.rip).is_ok());
    }
}

#[test]
fn mutated_images_are_planned_or_refused_in_bounded_work() {
    let long = std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1");
    let cases = if long { 200_000 } else { 5_000 };
    let originals = originals();
    let strategy = (
        0..originals.len(),
        prop::collection::vec(mutation(), 1..8),
        prop_oneof![Just(2_u64), Just(32), Just(64)],
        prop_oneof![Just(Preference::Fastest), Just(Preference::Pvh)],
        any::<bool>(),
    );
    let mut runner = TestRunner::new(ProptestConfig {
        cases,
        rng_seed: RngSeed::Fixed(0x5eed),
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let (planned, refused) = (Cell::new(0), Cell::new(0));
    runner
        .run(&strategy, |(which, mutations, mib, preference, high)| {
            let (headers, mut image) = originals[which].clone();
            mutate(headers, &mut image, &mutations);
            let ram = [
                (GuestAddress(0), mib * MIB),
                (GuestAddress(4 << 30), 32 * MIB),
            ];
            let ram = &ram[..1 + usize::from(high)];
            let config = BootConfig {
                ram,
                cmdline: "console=ttyS0",
                rsdp: None,
                preference,
            };
            let len = image.len() as u64;
            let counted = |bytes: Vec<u8>| Counted {
                file: Cursor::new(bytes),
                reads: 0,
                bytes: 0,
            };
            let mut kernel = Image::new(ImageKind::Kernel, "k", counted(image.clone())).unwrap();
            let initrd_len = 3000;
            let initrds =
                [Image::new(ImageKind::Initrd, "i", counted(vec![1; initrd_len])).unwrap()];

            LARGEST.set(0);
            let result = plan(&mut kernel, &initrds, &config);
            let largest = LARGEST.get();
            assert!(
                largest <= LARGEST_ALLOCATION,
                "an allocation of {largest} bytes"
            );
            match result {
                Ok(plan) => {
                    planned.set(planned.get() + 1);
                    check(&plan, ram, len, initrd_len as u64);
                    let ranges: Vec<_> = ram
                        .iter()
                        .map(|(start, len)| (*start, *len as usize))
                        .collect();
                    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
                    plan.load(
                        &memory,
                        &mut images::kernel(image),
                        &mut [initrd("i", vec![1; 3000])],
                    )
                    .unwrap();
                }
                Err(error) => {
                    refused.set(refused.get() + 1);
                    assert!(!error.to_string().contains('\n'));
                }
            }
            Ok(())
        })
        .unwrap();
    // Mutations that everything refuses would test nothing.
    let (planned, refused) = (planned.get(), refused.get());
    assert!(planned > cases / 50, "{planned} planned, {refused} refused");
    assert!(refused > cases / 50, "{planned} planned, {refused} refused");
}

#[test]
fn random_bytes_behind_each_magic_are_refused_or_planned() {
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 1_000,
        rng_seed: RngSeed::Fixed(7),
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let bytes = prop::collection::vec(any::<u8>(), 1..9000);
    runner
        .run(&(bytes, 0..4), |(mut bytes, magic)| {
            match magic {
                0 => write(&mut bytes, 0, 8, 0x0001_0102_464c_457f),
                1 => write(&mut bytes, 0x202, 4, 0x5372_6448),
                2 => {
                    for (at, byte) in multiboot_header(1 << 16, &[]).into_iter().enumerate() {
                        write(&mut bytes, at, 1, byte.into());
                    }
                }
                _ => {}
            }
            let len = bytes.len() as u64;
            if let Ok(plan) = plan_of(bytes) {
                check(&plan, RAM, len, 0);
            }
            Ok(())
        })
        .unwrap();
}

/// Program headers that name the same large part of the file again and again, as notes.
#[test]
fn notes_without_end_cost_little() {
    let mut one = note("GNU", 1, &[0; 100]).repeat(4096);
    one.truncate(400 << 10);
    let count = 100;
    let mut image = elf(
        true,
        MIB,
        &vec![segment(MIB, vec![0; 16], 16); count],
        &one,
        &[],
    );
    // All but the first become copies of the last one, the notes.
    let header = |index: usize| 64 + 56 * index..64 + 56 * (index + 1);
    let notes = image[header(count)].to_vec();
    for index in 1..count {
        image[header(index)].copy_from_slice(&notes);
    }
    let file = Counted {
        file: Cursor::new(image),
        reads: 0,
        bytes: 0,
    };
    let mut kernel = Image::new(ImageKind::Kernel, "k", file).unwrap();
    LARGEST.set(0);
    let plan = plan(&mut kernel, &[], &config("x")).unwrap();
    assert!(LARGEST.get() <= LARGEST_ALLOCATION);
    assert_eq!(plan.entry.rip, MIB);
}
