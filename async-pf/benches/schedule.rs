// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the bookkeeping of a fault costs, beside the fetch that it saves: a fault, its start and
//! its finish through [`Schedule`], against the map from page to waiters that a pager writes by
//! hand, and against the read of the page itself. `cargo bench -p async-pf`.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{HashMap, VecDeque};
use std::hint::black_box;
use std::io::Write;

use async_pf::{FilePiece, FileSource, Outcome, PageSource, Schedule, VcpuQueue};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use memslots::Gfn;

const PAGES: u64 = 4096;

/// A pseudo-random order of all pages.
fn order() -> impl Iterator<Item = u64> {
    (0..PAGES).map(|page| page * 1_597 % PAGES)
}

fn faults(c: &mut Criterion) {
    let mut group = c.benchmark_group("4096 faults");
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("Schedule", |b| {
        b.iter_batched(
            || Schedule::<u32>::new(Gfn(0), PAGES, 64).unwrap(),
            |mut pages| {
                for page in order() {
                    let _ = black_box(pages.fault(Gfn(page), 1));
                    let job = pages.start().unwrap();
                    black_box(pages.finish(job.gfn, Outcome::Arrived).unwrap());
                }
                pages
            },
            BatchSize::SmallInput,
        );
    });
    group.bench_function("by hand, HashMap and VecDeque", |b| {
        b.iter_batched(
            || (HashMap::<u64, Vec<u32>>::new(), VecDeque::new()),
            |(mut waiting, mut queue)| {
                for page in order() {
                    let waiters = waiting.entry(page).or_default();
                    if waiters.is_empty() {
                        queue.push_back(page);
                    }
                    waiters.push(1);
                    let page: u64 = queue.pop_front().unwrap();
                    black_box(waiting.remove(&page).unwrap());
                }
                waiting
            },
            BatchSize::SmallInput,
        );
    });
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![1; (PAGES * 4096) as usize]).unwrap();
    let piece = FilePiece {
        first: Gfn(0),
        pages: PAGES,
        offset: 0,
    };
    let source = FileSource::new(file, [piece]).unwrap();
    let mut buffer = [0; 4096];
    group.bench_function("the reads alone (cached file)", |b| {
        b.iter(|| {
            for page in order() {
                let _ = black_box(source.fetch(Gfn(page), &mut buffer).unwrap());
            }
        });
    });
    group.finish();

    let mut queue = VcpuQueue::new(0).unwrap();
    c.bench_function("VcpuQueue: setup, arrived, check", |b| {
        b.iter(|| {
            let token = queue.setup(black_box(Gfn(1))).unwrap();
            queue.arrived(token).unwrap();
            black_box(queue.check_completion())
        });
    });
}

criterion_group!(benches, faults);
criterion_main!(benches);
