// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The walk from bits to runs against the bit-by-bit loop that monitors write by hand, and marking
//! a range against vm-memory's `AtomicBitmap`. `cargo bench -p dirty-log`.
#![allow(missing_docs, clippy::unwrap_used)]

mod peers;

use std::hint::black_box;
use std::num::NonZeroUsize;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dirty_log::{DirtyBitmap, DirtySource, HostWrites, PAGE_SIZE, PageRun};
use peers::{bit_by_bit, read};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

/// 512 GiB of guest memory: 16 MiB of bitmap.
const PAGES: u64 = 512 << 30 >> 12;

fn walk(c: &mut Criterion) {
    let mut sparse = DirtyBitmap::new(PAGES).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..PAGES / 100 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        sparse
            .set(PageRun {
                first: state % PAGES,
                pages: 1,
            })
            .unwrap();
    }
    let mut full = DirtyBitmap::new(PAGES).unwrap();
    full.set_all();
    // Written once: memory that nobody has touched is one page of zeros, and always in the cache.
    let mut clean = full.clone();
    clean.clear_all();
    for (name, bitmap) in [("clean", clean), ("1 percent", sparse), ("full", full)] {
        let mut group = c.benchmark_group(format!("walk of 512 GiB, {name}"));
        group.throughput(Throughput::Bytes(PAGES / 8));
        group.sample_size(10);
        group.bench_function("runs", |b| {
            b.iter(|| {
                black_box(&bitmap).runs().for_each(|run| {
                    black_box(run);
                })
            });
        });
        group.bench_function("a read of it", |b| {
            b.iter(|| read(black_box(&bitmap).words()))
        });
        group.bench_function("bit by bit", |b| {
            b.iter(|| {
                bit_by_bit(black_box(&bitmap).words(), |run| {
                    black_box(run);
                })
            });
        });
        group.finish();
    }
}

/// Each of the operations on whole bitmaps, against a plain read.
fn whole(c: &mut Criterion) {
    let (mut one, mut other) = (
        DirtyBitmap::new(PAGES).unwrap(),
        DirtyBitmap::new(PAGES).unwrap(),
    );
    one.set_all();
    other
        .set(PageRun {
            first: 5,
            pages: PAGES / 2,
        })
        .unwrap();
    let mut group = c.benchmark_group("whole bitmaps of 512 GiB");
    group.throughput(Throughput::Bytes(PAGES / 8));
    group.sample_size(10);
    group.bench_function("a read of it", |b| b.iter(|| read(black_box(&one).words())));
    group.bench_function("count", |b| b.iter(|| black_box(&one).count()));
    group.bench_function("is clean, and it is", |b| {
        let mut clean = one.clone();
        clean.clear_all();
        b.iter(|| black_box(&clean).is_clean());
    });
    group.bench_function("merge", |b| {
        b.iter(|| one.merge(black_box(&other)).unwrap())
    });
    group.bench_function("invert", |b| b.iter(|| black_box(&mut one).invert()));
    let mut writes = HostWrites::new(PAGES).unwrap();
    group.bench_function("harvest of clean HostWrites", |b| {
        b.iter(|| writes.take(black_box(&mut other)).unwrap());
    });
    group.finish();
}

fn mark(c: &mut Criterion) {
    let (at, len) = (37 * PAGE_SIZE as usize, 256 * PAGE_SIZE as usize);
    for (name, len) in [("mark 256 pages", len), ("mark one page", 8)] {
        let mut group = c.benchmark_group(name);
        let ours = HostWrites::new(1 << 18).unwrap();
        let theirs = AtomicBitmap::new(1 << 30, NonZeroUsize::new(PAGE_SIZE as usize).unwrap());
        group.bench_function("HostWrites", |b| {
            b.iter(|| ours.mark_dirty(black_box(at), len))
        });
        ours.stop();
        group.bench_function("HostWrites, off", |b| {
            b.iter(|| ours.mark_dirty(black_box(at), len))
        });
        group.bench_function("no bitmap", |b| {
            b.iter(|| ().mark_dirty(black_box(at), len))
        });
        group.bench_function("vm-memory AtomicBitmap", |b| {
            b.iter(|| theirs.mark_dirty(black_box(at), len));
        });
        group.finish();
    }
}

criterion_group!(benches, walk, whole, mark);
criterion_main!(benches);
