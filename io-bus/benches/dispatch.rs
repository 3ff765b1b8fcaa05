// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One access to an empty device, through this crate and through what a user would use instead:
//! vm-device's `IoManager` behind the mutex that vmm-reference puts around it.
//!
//! `cargo bench -p io-bus`. Every access enters and leaves the published tables, so quiescence is
//! in the figure.

#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::{Arc, Mutex};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use io_bus::{IoBus, MmioAddress, MmioRange};
use vm_device::DeviceMmio;
use vm_device::device_manager::{IoManager, MmioManager};

struct Empty;

impl DeviceMmio for Empty {
    fn mmio_read(&self, _: MmioAddress, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
}

/// Ranges of a page each, with a page between them.
fn range(n: u64) -> MmioRange {
    MmioRange::new(MmioAddress(0xd000_0000 + n * 0x2000), 0x1000).unwrap()
}

/// Addresses spread uniformly over all ranges (xorshift), more than a branch predictor remembers.
fn addresses(ranges: u64) -> Vec<MmioAddress> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..1 << 16)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            MmioAddress(range(state % ranges).base().0 + (state >> 32) % 0xff8)
        })
        .collect()
}

fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("mmio_read");
    for ranges in [8, 64, 1000] {
        let addresses = addresses(ranges);
        let mut next = addresses.iter().cycle();

        let mut manager = IoManager::new();
        for n in 0..ranges {
            manager.register_mmio(range(n), Arc::new(Empty)).unwrap();
        }
        let manager = Arc::new(Mutex::new(manager));
        group.bench_function(BenchmarkId::new("Mutex<IoManager>", ranges), |b| {
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
        for n in 0..ranges {
            bus.register_mmio(range(n), Arc::new(Empty)).unwrap().keep();
        }
        let mut dispatcher = bus.dispatcher();
        group.bench_function(BenchmarkId::new("io-bus", ranges), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                let address = *next.next().unwrap();
                let outcome = dispatcher.mmio_read(address, black_box(&mut data));
                assert!(outcome.is_answered());
            })
        });
        group.bench_function(BenchmarkId::new("io-bus, repeated", ranges), |b| {
            b.iter(|| {
                let mut data = [0; 4];
                let address = black_box(range(ranges / 2).base());
                let outcome = dispatcher.mmio_read(address, black_box(&mut data));
                assert!(outcome.is_answered());
            })
        });
        group.bench_function(BenchmarkId::new("loop alone", ranges), |b| {
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
