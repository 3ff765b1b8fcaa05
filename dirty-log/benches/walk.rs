// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The walk from bits to runs against the bit-by-bit loop that monitors write by hand, and marking
//! a range against vm-memory's `AtomicBitmap`. `cargo bench -p dirty-log`.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::num::NonZeroUsize;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dirty_log::{DirtyBitmap, HostWrites, PAGE_SIZE, PageRun};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

/// 64 GiB of guest memory: 2 MiB of bitmap.
const PAGES: u64 = 64 << 30 >> 12;

/// One question a page, as the loops of peers ask it, with their merging of neighbours.
fn bit_by_bit(words: &[u64], mut run: impl FnMut(PageRun)) {
    let mut open: Option<PageRun> = None;
    for (index, word) in words.iter().enumerate() {
        for bit in 0..64 {
            let page = index as u64 * 64 + bit;
            if word & (1 << bit) != 0 {
                match &mut open {
                    Some(run) => run.pages += 1,
                    None => {
                        open = Some(PageRun {
                            first: page,
                            pages: 1,
                        })
                    }
                }
            } else if let Some(done) = open.take() {
                run(done);
            }
        }
    }
    if let Some(done) = open {
        run(done);
    }
}

fn walk(c: &mut Criterion) {
    let mut sparse = DirtyBitmap::new(PAGES);
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
    let mut full = DirtyBitmap::new(PAGES);
    full.set_all();
    for (name, bitmap) in [
        ("clean", DirtyBitmap::new(PAGES)),
        ("1 percent", sparse),
        ("full", full),
    ] {
        let mut group = c.benchmark_group(format!("walk of 64 GiB, {name}"));
        group.throughput(Throughput::Bytes(PAGES / 8));
        group.sample_size(20);
        group.bench_function("runs", |b| {
            b.iter(|| {
                black_box(&bitmap).runs().for_each(|run| {
                    black_box(run);
                })
            });
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

fn mark(c: &mut Criterion) {
    let mut group = c.benchmark_group("mark 256 pages");
    let ours = HostWrites::new(1 << 18);
    let theirs = AtomicBitmap::new(1 << 30, NonZeroUsize::new(PAGE_SIZE as usize).unwrap());
    let (at, len) = (37 * PAGE_SIZE as usize, 256 * PAGE_SIZE as usize);
    group.bench_function("HostWrites", |b| {
        b.iter(|| ours.mark_dirty(black_box(at), len))
    });
    group.bench_function("vm-memory AtomicBitmap", |b| {
        b.iter(|| theirs.mark_dirty(black_box(at), len));
    });
    group.finish();
    let mut group = c.benchmark_group("mark one page");
    group.bench_function("HostWrites", |b| {
        b.iter(|| ours.mark_dirty(black_box(at), 8))
    });
    group.bench_function("vm-memory AtomicBitmap", |b| {
        b.iter(|| theirs.mark_dirty(black_box(at), 8));
    });
    group.finish();
}

criterion_group!(benches, walk, mark);
criterion_main!(benches);
