// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What recording a working set costs a fault, and what its replay gains.
//! * A first touch through the [`Recorder`], against the set and list behind a mutex that a pager writes by hand, and against
//!   the copy of a page, which is the least that a fault costs.
//! * A plan of reads out of a record, and the record's encoding.
//! * A guest that touches a working set of 1,024 pages, scattered over a memory of 256 MiB whose file is not in the page
//!   cache: brought by its faults, and with the recorded set prefetched.
//!
//! `cargo bench -p async-pf --bench working_set`; needs a userfaultfd, and files on a disk (`TMPDIR`).
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashSet;
use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::pager::{PagedSlot, Pager, PagerConfig};
use async_pf::working_set::{PlanLimits, Recorder, ReplayPlan, WorkingSet};
use async_pf::{FilePiece, FileSource};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use memslots::uffd::{Features, Modes, Uffd};
use memslots::{Backing, Gfn, Mapping, PAGE_SIZE};
use vm_memory::GuestAddress;

const TOUCHES: u64 = 16_384;
/// Of the memory.
const PAGES: u64 = 65_536;
/// Pages that lie together in the working set, and how many such runs it has.
const RUN: u64 = 8;
const RUNS: u64 = 128;

fn order() -> impl Iterator<Item = u64> {
    (0..TOUCHES).map(|step| step * 6_151 % TOUCHES)
}

/// So many threads make all touches, each its share.
fn by(threads: usize, touch: impl Fn(u64) + Sync) {
    thread::scope(|scope| {
        for number in 0..threads {
            let touch = &touch;
            scope.spawn(move || order().skip(number).step_by(threads).for_each(touch));
        }
    });
}

fn record() -> WorkingSet {
    let recorder = Recorder::new(Gfn(0), PAGES, PAGES as usize, [7; 16]).unwrap();
    for gfn in working_set() {
        recorder.touch(Gfn(gfn));
    }
    recorder.finish()
}

/// What the guest touches, in its order.
fn working_set() -> impl Iterator<Item = u64> {
    let runs = (0..RUNS).map(|run| run * 53 % RUNS * (PAGES / RUNS));
    runs.flat_map(|first| first..first + RUN)
}

fn recording(c: &mut Criterion) {
    for threads in [1, 2] {
        let name = format!("{TOUCHES} first touches, {threads} threads");
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(TOUCHES));
        group.bench_function("Recorder", |b| {
            b.iter_batched(
                || Recorder::new(Gfn(0), TOUCHES, TOUCHES as usize, [7; 16]).unwrap(),
                |recorder| {
                    by(threads, |gfn| {
                        black_box(recorder.touch(Gfn(gfn)));
                    });
                    recorder
                },
                BatchSize::SmallInput,
            );
        });
        group.bench_function("by hand, a mutex with a HashSet and a Vec", |b| {
            b.iter_batched(
                || Mutex::new((HashSet::new(), Vec::new())),
                |record| {
                    by(threads, |gfn| {
                        let mut record = record.lock().unwrap();
                        let (seen, list) = &mut *record;
                        if seen.insert(gfn) {
                            list.push((gfn, Instant::now()));
                        }
                    });
                    record
                },
                BatchSize::SmallInput,
            );
        });
        let page = [7u8; PAGE_SIZE as usize];
        group.bench_function("copies of a page", |b| {
            b.iter_batched(
                || vec![0u8; PAGE_SIZE as usize * 64 * threads],
                |mut memory| {
                    thread::scope(|scope| {
                        for memory in memory.chunks_mut(PAGE_SIZE as usize * 64) {
                            scope.spawn(move || {
                                for gfn in 0..TOUCHES / threads as u64 {
                                    let at = (gfn % 64 * PAGE_SIZE) as usize;
                                    memory[at..at + page.len()].copy_from_slice(black_box(&page));
                                }
                            });
                        }
                    });
                    memory
                },
                BatchSize::SmallInput,
            );
        });
        group.finish();
    }
}

fn planning(c: &mut Criterion) {
    let record = record();
    let bytes = record.encode();
    let mut group = c.benchmark_group(format!("a record of {} pages", record.touched()));
    group.bench_function("encode", |b| b.iter(|| black_box(record.encode())));
    group.bench_function("decode", |b| {
        b.iter(|| black_box(WorkingSet::decode(&bytes).unwrap()));
    });
    group.bench_function("plan", |b| {
        b.iter(|| black_box(ReplayPlan::new(&record, PlanLimits::default())));
    });
    group.finish();
}

/// A memory file on the disk.
fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let block: Vec<u8> = (0..1 << 20).map(|at| at as u8 | 1).collect();
    for _ in 0..(PAGES * PAGE_SIZE) >> 20 {
        file.write_all(&block).unwrap();
    }
    file.sync_all().unwrap();
    file
}

/// Puts the file out of the page cache.
fn forget(file: &File) {
    // SAFETY: a system call on an open descriptor, with integers.
    let refused = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(refused, 0);
}

/// How long a guest takes to have its working set, with what is to be prefetched at its start.
fn restore(file: &File, plan: Option<&ReplayPlan>) -> Duration {
    forget(file);
    let uffd = Uffd::open(Features::POISON, Features::NONE).unwrap();
    let memory = Backing::anonymous(PAGES * PAGE_SIZE);
    let memory = Arc::new(Mapping::new(&memory, GuestAddress(0)).unwrap());
    let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    let piece = FilePiece {
        first: Gfn(0),
        pages: PAGES,
        offset: 0,
    };
    let source = FileSource::new(file.try_clone().unwrap(), [piece]).unwrap();
    let slot = PagedSlot::new(&registration, Gfn(0), Arc::new(source)).unwrap();
    let config = PagerConfig {
        workers: 2,
        ..PagerConfig::default()
    };
    let pager = Pager::start(&uffd, vec![slot], config).unwrap();
    let begun = Instant::now();
    for read in plan.into_iter().flat_map(ReplayPlan::reads) {
        let range = read.range();
        pager.prefetch(0, Gfn(range.start)..Gfn(range.end)).unwrap();
    }
    for page in working_set() {
        let at = memory.host().0 + (page * PAGE_SIZE) as usize;
        // SAFETY: within the mapping; read volatile.
        black_box(unsafe { (at as *const u64).read_volatile() });
    }
    begun.elapsed()
}

fn replay(c: &mut Criterion) {
    let file = file();
    let plan = ReplayPlan::new(&record(), PlanLimits::default());
    let mut group = c.benchmark_group(format!("{} pages of a cold file", RUN * RUNS));
    group.sample_size(20);
    for (name, plan) in [("by faults", None), ("replayed", Some(&plan))] {
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| (0..iterations).map(|_| restore(&file, plan)).sum());
        });
    }
    group.finish();
}

criterion_group!(benches, recording, planning, replay);
criterion_main!(benches);
