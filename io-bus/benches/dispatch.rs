// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One access to an empty device, through this crate and through what a user would use instead:
//! vm-device's `IoManager` behind the mutex that vmm-reference puts around it.
//!
//! `cargo bench -p io-bus --bench dispatch`. Every access enters and leaves the published tables, so
//! quiescence is in the figure. "repeated" is the same device again, which the cookie finds, and
//! "least bus" the least that could be called one: enter, compare with one range, call, leave.
//! "counting" has the counters on; "loop alone" is what measuring itself costs each of them.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::{Arc, Mutex};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use io_bus::{Answer, At, IoBus, IoDevice, Mmio, MmioAddress, MmioRange};
use srcu::Published;
use vm_device::DeviceMmio;
use vm_device::device_manager::{IoManager, MmioManager};

struct Empty;

impl DeviceMmio for Empty {
    fn mmio_read(&self, _: MmioAddress, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
}

/// xorshift: the same numbers at every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}

/// Disjoint ranges (the mutexed one takes no others) of 16 bytes to 16 KiB, at random distances,
/// aligned to their size as PCI's are.
fn ranges(count: u64) -> Vec<MmioRange> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut next = 0xc000_0000;
    let mut ranges = Vec::new();
    for _ in 0..count {
        let size = 16 << random.below(11);
        let base = (next + random.below(0x4000)) / size * size + size;
        ranges.push(MmioRange::new(MmioAddress(base), size).unwrap());
        next = base + size;
    }
    ranges
}

/// Addresses spread uniformly over the ranges, more of them than a branch predictor remembers.
fn addresses(ranges: &[MmioRange]) -> Vec<MmioAddress> {
    let mut random = Random(0xd1b5_4a32_d192_ed03);
    (0..1 << 16)
        .map(|_| {
            let range = ranges[random.below(ranges.len() as u64) as usize];
            MmioAddress(range.base().0 + random.below(range.size() - 3))
        })
        .collect()
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("mmio_read");
    for count in [8, 64, 1000] {
        let ranges = ranges(count);
        let addresses = addresses(&ranges);
        let mut next = addresses.iter().cycle();

        let mut manager = IoManager::new();
        for range in &ranges {
            manager.register_mmio(*range, Arc::new(Empty)).unwrap();
        }
        let manager = Arc::new(Mutex::new(manager));
        group.bench_function(BenchmarkId::new("Mutex<IoManager>", count), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                let address = *next.next().unwrap();
                manager
                    .lock()
                    .unwrap()
                    .mmio_read(address, black_box(&mut data))
                    .unwrap();
            })
        });

        let bus = IoBus::new();
        for range in &ranges {
            bus.register_mmio(*range, Arc::new(Empty)).unwrap().keep();
        }
        let mut dispatcher = bus.dispatcher();
        group.bench_function(BenchmarkId::new("io-bus", count), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                let address = *next.next().unwrap();
                let outcome = dispatcher.mmio_read(address, black_box(&mut data));
                assert!(outcome.is_answered());
            })
        });
        group.bench_function(BenchmarkId::new("io-bus, repeated", count), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                let address = black_box(ranges[ranges.len() / 2].base());
                let outcome = dispatcher.mmio_read(address, black_box(&mut data));
                assert!(outcome.is_answered());
            })
        });
        let device: Arc<dyn IoDevice> = Arc::new(Mmio(Empty));
        let one = Published::new((ranges[ranges.len() / 2], device));
        let mut reader = one.reader();
        group.bench_function(BenchmarkId::new("least bus", count), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                let address = black_box(ranges[ranges.len() / 2].base());
                let row = reader.enter();
                let (base, size) = (row.0.base().0, row.0.size());
                let offset = address.0.wrapping_sub(base);
                assert!(offset < size);
                let answer = row.1.read(At { base, offset }, black_box(&mut data));
                assert!(matches!(answer, Answer::Accepted));
            })
        });
        bus.count(true);
        group.bench_function(BenchmarkId::new("io-bus, counting", count), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                let address = *next.next().unwrap();
                let outcome = dispatcher.mmio_read(address, black_box(&mut data));
                assert!(outcome.is_answered());
            })
        });
        group.bench_function(BenchmarkId::new("loop alone", count), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                black_box(*next.next().unwrap());
                black_box(&mut data);
            })
        });
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
