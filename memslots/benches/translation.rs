// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translation and access against vm-memory's own `GuestMemoryMmap`; cached access against a raw pointer; what a
//! publication and a slot cost. The alternatives stand in the same run: only ratios within a run mean something.
//! `cargo bench -p memslots`

#![allow(
    missing_docs,
    reason = "criterion's macros make undocumented functions"
)]
#![allow(clippy::unwrap_used)]

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};
use memslots::{
    Backing, Errno, HvaCache, MemoryRegion, Memslots, NewSlot, PAGE_SIZE, PrivateRanges,
    SetMemoryRegion, Slot, SlotFlags, SlotHint,
};
use std::hint::black_box;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

/// A host that says yes and keeps nothing, so that what is measured is ours.
struct YesHost;

impl SetMemoryRegion for YesHost {
    unsafe fn set_memory_region(&self, _region: &MemoryRegion) -> Result<(), Errno> {
        Ok(())
    }

    fn max_slots(&self) -> usize {
        32_764
    }
}

const SIZE: u64 = PAGE_SIZE;

fn address(index: u64) -> GuestAddress {
    GuestAddress(index * 2 * SIZE)
}

/// Addresses in all slots in an order that no prefetcher guesses.
fn addresses(count: u64) -> Vec<GuestAddress> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    (0..1 << 14)
        .map(|_| GuestAddress(address(next() % count).0 + next() % (SIZE - 8)))
        .collect()
}

/// What `look` costs on each of `of`, the loop around it being as small as it can be.
fn each<T: Copy, R>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    of: &[T],
    mut look: impl FnMut(T) -> R,
) {
    group.bench_function(id, |bench| {
        bench.iter_custom(|times| {
            let start = Instant::now();
            let mut left = times;
            while left > 0 {
                let some = of.len().min(left as usize);
                for one in &of[..some] {
                    black_box(look(*one));
                }
                left -= some as u64;
            }
            start.elapsed()
        });
    });
}

/// A turn through `of` for ever.
fn turns<T: Copy>(of: &[T]) -> impl FnMut() -> T {
    let (mut turn, mask) = (0, of.len() - 1);
    assert!(of.len().is_power_of_two());
    move || {
        turn = (turn + 1) & mask;
        of[turn]
    }
}

fn slots(count: u64) -> (Memslots, Vec<Slot>) {
    let memslots = Memslots::<()>::with_policy(YesHost, PrivateRanges::none());
    let new = (0..count).map(|index| NewSlot {
        start: address(index),
        backing: Backing::anonymous(SIZE),
        flags: SlotFlags::NONE,
    });
    let slots = memslots.create_all(new).unwrap();
    (memslots, slots)
}

fn mmap(count: u64) -> GuestMemoryMmap {
    let ranges: Vec<_> = (0..count)
        .map(|index| (address(index), SIZE as usize))
        .collect();
    GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap()
}

/// Which slot: nothing but the search.
fn search(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("search");
    for count in [1u64, 4, 512, 32_000] {
        let (memslots, _slots) = slots(count);
        let (snapshot, addresses) = (memslots.snapshot(), addresses(count));
        let table = &*snapshot;
        let id = |name| BenchmarkId::new(name, count);
        each(&mut group, id("SlotTable::find"), &addresses, |at| {
            table.find(at).is_some()
        });
        each(&mut group, id("SlotTable::translate"), &addresses, |at| {
            table.translate(at).map(|found| found.host)
        });
        let mut reader = memslots.reader();
        each(&mut group, id("Reader, translate"), &addresses, |at| {
            reader.enter().translate(at).map(|found| found.host)
        });
        // 32,000 mappings twice are more than a process may have.
        if count <= 512 {
            let mmap = mmap(count);
            each(
                &mut group,
                id("GuestMemoryMmap::find_region"),
                &addresses,
                |at| mmap.find_region(at).is_some(),
            );
            each(
                &mut group,
                id("GuestMemoryMmap::get_host_address"),
                &addresses,
                |at| mmap.get_host_address(at).ok(),
            );
        }
        if count >= 512 {
            let extents: Vec<_> = addresses
                .iter()
                .map(|address| table.find(*address).unwrap().extent().clone())
                .collect();
            let ids: Vec<_> = extents.iter().map(|extent| extent.id()).collect();
            each(&mut group, id("SlotTable::by_id"), &ids, |id| {
                table.by_id(id).is_some()
            });
            let hosts: Vec<_> = extents.iter().map(|extent| extent.host_start()).collect();
            each(&mut group, id("SlotTable::hva_to_gpa"), &hosts, |host| {
                table.hva_to_gpa(host).is_some()
            });
        }
    }
    group.finish();
}

fn access(criterion: &mut Criterion) {
    for (name, write) in [("read_obj", false), ("write_obj", true)] {
        let mut group = criterion.benchmark_group(name);
        for count in [1u64, 4, 512] {
            let (memslots, _slots) = slots(count);
            let (mmap, addresses) = (mmap(count), addresses(count));
            let mut next = turns(&addresses);
            // One closure for each kind of memory, read or written.
            macro_rules! measure {
                ($name:literal, $memory:expr) => {
                    group.bench_function(BenchmarkId::new($name, count), |bench| {
                        if write {
                            bench.iter(|| $memory.write_obj(black_box(7u64), next()).unwrap());
                        } else {
                            bench.iter(|| black_box($memory.read_obj::<u64>(next()).unwrap()));
                        }
                    });
                };
            }
            let (snapshot, ram) = (memslots.snapshot(), memslots.ram());
            let (checked, mut reader) = (ram.memory(), ram.reader());
            measure!("SlotTable", snapshot);
            measure!("CheckedMemory", checked);
            measure!("Reader, CheckedView", reader.enter().checked());
            measure!("GuestRam::memory each time", ram.memory());
            measure!("GuestMemoryMmap", mmap);
        }
        group.finish();
    }
}

/// The same range over and over, at changing offsets.
fn cached(criterion: &mut Criterion) {
    const LENGTH: usize = 0x800;
    let mut group = criterion.benchmark_group("cached");
    let (memslots, _slots) = slots(512);
    let snapshot = memslots.snapshot();
    let base = GuestAddress(address(77).0 + 0x100);
    let mut state = 1usize;
    let offsets: Vec<usize> = (0..4096)
        .map(|_| {
            state = state.wrapping_mul(25_214_903_917).wrapping_add(11);
            (state >> 16) % (LENGTH - 8)
        })
        .collect();
    let id = BenchmarkId::from_parameter;

    let table = &*snapshot;
    let raw = table.get_host_address(base).unwrap();
    let raw_read = |base: *const u8, length: usize, offset: usize| {
        if offset > length || length - offset < size_of::<u64>() {
            return None;
        }
        // SAFETY: within the range, which the slot has and the snapshot keeps mapped; a u64 has no invalid value.
        Some(unsafe { base.add(offset).cast::<u64>().read_unaligned() })
    };
    each(
        &mut group,
        id("raw pointer add and bounds check"),
        &offsets,
        |offset| raw_read(black_box(raw), black_box(LENGTH), offset),
    );
    let mut cache = HvaCache::new(base, LENGTH);
    each(&mut group, id("HvaCache::read_obj"), &offsets, |offset| {
        cache.read_obj::<u64>(table, offset).ok()
    });
    let mut reader = memslots.reader();
    each(
        &mut group,
        id("Reader, HvaCache::read_obj"),
        &offsets,
        |offset| cache.read_obj::<u64>(&reader.enter(), offset).ok(),
    );
    let mut hint = SlotHint::new();
    let at = |offset: usize| GuestAddress(base.0 + offset as u64);
    each(&mut group, id("SlotHint::translate"), &offsets, |offset| {
        hint.translate(table, at(offset)).map(|found| found.host)
    });
    each(&mut group, id("SlotTable::translate"), &offsets, |offset| {
        table.translate(at(offset)).map(|found| found.host)
    });
    group.finish();
}

fn change(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one slot's flag changed among");
    for count in [4u64, 512, 32_000] {
        let (memslots, mut slots) = slots(count);
        println!(
            "{count} slots: {} bytes a slot in the table",
            memslots.snapshot().memory() as u64 / count
        );
        let mut on = false;
        let slot = &mut slots[(count / 2) as usize];
        group.bench_function(BenchmarkId::from_parameter(count), |bench| {
            bench.iter(|| {
                on = !on;
                let flags = if on {
                    SlotFlags::LOG_DIRTY_PAGES
                } else {
                    SlotFlags::NONE
                };
                drop(slot.set_flags(flags).unwrap());
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("create and drop, 6 GiB");
    let memslots = Memslots::new(YesHost);
    group.bench_function("Memslots on no host", |bench| {
        let create = || {
            memslots.create(
                GuestAddress(1 << 32),
                Backing::anonymous(6 << 30),
                SlotFlags::NONE,
            )
        };
        bench.iter(|| create().unwrap());
    });
    group.bench_function("GuestMemoryMmap", |bench| {
        bench.iter(|| {
            GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(1 << 32), 6 << 30)]).unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, search, access, cached, change);
criterion_main!(benches);
