// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What it costs to serve a fault from a file in the page cache: one thread, and two, touch every page of a memory once,
//! and their faults are served by
//! * a loop without any bookkeeping (poll, read, `pread`, copy), on one thread or two;
//! * a handler as Firecracker's example is: one thread, a page a fault, out of a mapped file;
//! * the [`Pager`], with one worker or two.
//!
//! In random order, where no read-ahead helps, and in a row, where it does. `cargo bench -p async-pf --bench pager`; needs
//! a userfaultfd.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use async_pf::pager::{PagedSlot, Pager, PagerConfig};
use async_pf::{FilePiece, FileSource};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use memslots::uffd::{Event, Features, FillRole, Messages, Modes, Registration, Uffd, Wake};
use memslots::{Backing, Gfn, Hva, Mapping, PAGE_SIZE};
use vm_memory::GuestAddress;

const PAGES: u64 = 4096;
const SIZE: u64 = PAGES * PAGE_SIZE;

struct World {
    uffd: Uffd,
    memory: Arc<Mapping>,
    registration: Registration,
}

impl World {
    fn new() -> Self {
        let uffd = Uffd::open(Features::POISON, Features::NONE).unwrap();
        let memory = Arc::new(Mapping::new(&Backing::anonymous(SIZE), GuestAddress(0)).unwrap());
        let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
        Self {
            uffd,
            memory,
            registration,
        }
    }

    /// How long it takes that so many threads touch all pages, each its share.
    fn touch(&self, threads: u64, order: fn(u64) -> u64) -> Duration {
        let host = self.memory.host();
        let begun = Instant::now();
        thread::scope(|scope| {
            for number in 0..threads {
                scope.spawn(move || {
                    let share = PAGES / threads;
                    for page in (0..share).map(|step| number * share + order(step) % share) {
                        touch(host, page);
                    }
                });
            }
        });
        begun.elapsed()
    }

    /// Serves faults on so many threads while all pages are touched.
    fn beside(
        &self,
        servers: usize,
        serve: impl Fn(&FillRole, u64) + Sync,
        touch: impl Fn() -> Duration,
    ) -> Duration {
        let role = self.registration.lend_fill().unwrap();
        let (stopped, stop) = io::pipe().unwrap();
        thread::scope(|scope| {
            for _ in 0..servers {
                scope.spawn(|| {
                    let mut messages = Messages::with_capacity(1);
                    while self.uffd.wait_or(&stopped, None).unwrap() {
                        self.uffd.read(&mut messages).unwrap();
                        for event in &mut messages {
                            if let Event::Fault(fault) = event {
                                serve(&role, role.page_of(fault.address).unwrap());
                            }
                        }
                    }
                });
            }
            let took = touch();
            drop(stop);
            took
        })
    }
}

fn touch(host: Hva, page: u64) {
    let at = host.0 + (page * PAGE_SIZE) as usize;
    // SAFETY: within a mapping that lives as long as the bench; read volatile.
    black_box(unsafe { (at as *const u64).read_volatile() });
}

fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..PAGES {
        file.write_all(&[page as u8 | 1; PAGE_SIZE as usize])
            .unwrap();
    }
    file
}

fn each(iterations: u64, mut once: impl FnMut(World) -> Duration) -> Duration {
    (0..iterations).map(|_| once(World::new())).sum()
}

fn pager(world: &World, file: &File, workers: usize) -> Pager {
    let piece = FilePiece {
        first: Gfn(0),
        pages: PAGES,
        offset: 0,
    };
    let source = FileSource::new(file.try_clone().unwrap(), [piece]).unwrap();
    let slot = PagedSlot::new(&world.registration, Gfn(0), Arc::new(source)).unwrap();
    let config = PagerConfig {
        workers,
        ..PagerConfig::default()
    };
    Pager::start(&world.uffd, vec![slot], config).unwrap()
}

fn faults(c: &mut Criterion) {
    let file = file();
    let mapped = Backing::file_private(file.try_clone().unwrap(), 0, SIZE);
    let mapped = Mapping::new(&mapped, GuestAddress(0)).unwrap();
    let random: fn(u64) -> u64 = |step| step * 1_597;
    let row: fn(u64) -> u64 = |step| step;
    for (name, order) in [("random", random), ("in a row", row)] {
        for threads in [1, 2] {
            let name = format!("{PAGES} faults, {name}, {threads} touching");
            let mut group = c.benchmark_group(name);
            group
                .throughput(Throughput::Elements(PAGES))
                .sample_size(20);
            for servers in [1, 2] {
                group.bench_function(format!("bare loop, {servers}"), |b| {
                    b.iter_custom(|iterations| {
                        each(iterations, |world| {
                            let serve = |role: &FillRole, offset: u64| {
                                let mut page = [0; PAGE_SIZE as usize];
                                file.read_exact_at(&mut page, offset).unwrap();
                                role.copy(offset, &page, Wake::Now).unwrap();
                            };
                            world.beside(servers, serve, || world.touch(threads, order))
                        })
                    });
                });
                group.bench_function(format!("Pager, {servers}"), |b| {
                    b.iter_custom(|iterations| {
                        each(iterations, |world| {
                            let pager = pager(&world, &file, servers);
                            let took = world.touch(threads, order);
                            assert!(pager.wait(Duration::from_secs(9)));
                            took
                        })
                    });
                });
            }
            group.bench_function("as Firecracker's example", |b| {
                b.iter_custom(|iterations| {
                    each(iterations, |world| {
                        let serve = |role: &FillRole, offset: u64| {
                            role.copy_from(offset, &mapped, offset, PAGE_SIZE, Wake::Now)
                                .unwrap();
                        };
                        world.beside(1, serve, || world.touch(threads, order))
                    })
                });
            });
            group.finish();
        }
    }
}

criterion_group!(benches, faults);
criterion_main!(benches);
