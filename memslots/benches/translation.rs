// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translation and access against vm-memory's own `GuestMemoryMmap`, with 1, 4 and 512 slots, and what making a slot
//! costs beside its `mmap`. `cargo bench -p memslots`

#![allow(
    missing_docs,
    reason = "criterion's macros make undocumented functions"
)]
#![allow(clippy::unwrap_used)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use memslots::fake::FakeHost;
use memslots::{Backing, Memslots, NewSlot, PAGE_SIZE, PrivateRanges, SlotFlags};
use std::hint::black_box;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u64 = 4 * PAGE_SIZE;

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
    (0..4096)
        .map(|_| GuestAddress(address(next() % count).0 + next() % (SIZE - 8)))
        .collect()
}

fn lookup(criterion: &mut Criterion) {
    for (name, by_access) in [("translate", false), ("read_obj", true)] {
        let mut group = criterion.benchmark_group(name);
        for count in [1u64, 4, 512] {
            let memslots = Memslots::<()>::with_policy(FakeHost::new(1024), PrivateRanges::none());
            let new = (0..count).map(|index| NewSlot {
                start: address(index),
                backing: Backing::anonymous(SIZE),
                flags: SlotFlags::NONE,
            });
            let _slots = memslots.create_all(new).unwrap();
            let ranges: Vec<_> = (0..count)
                .map(|index| (address(index), SIZE as usize))
                .collect();
            let mmap = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
            let addresses = addresses(count);
            let mut turn = 0;
            let mut next = || {
                turn = (turn + 1) % addresses.len();
                addresses[turn]
            };
            let snapshot = memslots.snapshot();
            if by_access {
                let checked = memslots.ram().memory();
                group.bench_function(BenchmarkId::new("SlotTable", count), |bench| {
                    bench.iter(|| black_box(snapshot.read_obj::<u64>(next()).unwrap()));
                });
                group.bench_function(BenchmarkId::new("CheckedMemory", count), |bench| {
                    bench.iter(|| black_box(checked.read_obj::<u64>(next()).unwrap()));
                });
                group.bench_function(BenchmarkId::new("GuestMemoryMmap", count), |bench| {
                    bench.iter(|| black_box(mmap.read_obj::<u64>(next()).unwrap()));
                });
            } else {
                let mut reader = memslots.reader();
                group.bench_function(BenchmarkId::new("SlotTable", count), |bench| {
                    bench.iter(|| black_box(snapshot.translate(next()).unwrap().host));
                });
                group.bench_function(
                    BenchmarkId::new("Reader enter and translate", count),
                    |bench| {
                        bench.iter(|| black_box(reader.enter().translate(next()).unwrap().host));
                    },
                );
                group.bench_function(BenchmarkId::new("GuestMemoryMmap", count), |bench| {
                    bench.iter(|| black_box(mmap.get_host_address(next()).unwrap()));
                });
            }
        }
        group.finish();
    }
}

fn creation(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("create and drop, 6 GiB");
    let memslots = Memslots::new(FakeHost::new(8));
    group.bench_function("Memslots on a fake host", |bench| {
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

criterion_group!(benches, lookup, creation);
criterion_main!(benches);
