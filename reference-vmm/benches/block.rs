// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk through its virtqueue, by a driver in the same process, against what does the same I/O without a device: one
//! thread that calls `pread`/`pwrite`, and a bare io_uring with the same depth. The file is in the page cache, so what
//! is measured is the way there. `BENCH_DISK` names another file (it is overwritten).
//!
//! The driver's part (rings, registers) is in the figures of the disk, the change of threads as well; of the vCPU's exit,
//! its ioeventfd and its irqfd nothing is.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../tests/support/disk.rs"]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod disk;

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use disk::{ALL, IN, OUT, engines, header};
use io_uring::{IoUring, opcode, types};
use reference_vmm::devices::virtio::block::{Block, Io};
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver};
use vm_memory::{Bytes, GuestAddress};

const FILE: u64 = 256 << 20;

#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    write: bool,
    block: u32,
    depth: usize,
    random: bool,
}

const LOADS: [Load; 6] = [
    Load {
        name: "4 KiB random read, 1 deep",
        write: false,
        block: 4096,
        depth: 1,
        random: true,
    },
    Load {
        name: "4 KiB random write, 1 deep",
        write: true,
        block: 4096,
        depth: 1,
        random: true,
    },
    Load {
        name: "4 KiB random read, 32 deep",
        write: false,
        block: 4096,
        depth: 32,
        random: true,
    },
    Load {
        name: "4 KiB random write, 32 deep",
        write: true,
        block: 4096,
        depth: 32,
        random: true,
    },
    Load {
        name: "1 MiB sequential read, 4 deep",
        write: false,
        block: 1 << 20,
        depth: 4,
        random: false,
    },
    Load {
        name: "1 MiB sequential write, 4 deep",
        write: true,
        block: 1 << 20,
        depth: 4,
        random: false,
    },
];

/// Where the next request goes: the same places for each contender.
struct Places {
    load: Load,
    state: u64,
}

impl Places {
    fn new(load: Load) -> Self {
        let state = 0x9e37_79b9_7f4a_7c15;
        Places { load, state }
    }

    fn next(&mut self) -> u64 {
        let blocks = FILE / u64::from(self.load.block);
        if self.load.random {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
        } else {
            self.state += 1;
        }
        self.state % blocks * u64::from(self.load.block)
    }
}

/// A driver with `depth` requests whose buffers are set up once.
struct Disk {
    driver: FakeDriver<Block>,
    load: Load,
    /// Of each request: its header and its first descriptor.
    slots: Vec<(GuestAddress, u16)>,
}

impl Disk {
    fn new(path: &Path, io: Io, load: Load) -> Self {
        let mut driver = FakeDriver::new(disk::config(path, io).open().unwrap());
        driver.start(ALL);
        let slots = (0..load.depth).map(|_| {
            let head = driver.allocate(16);
            let data = driver.allocate(load.block.into());
            let status = driver.allocate(1);
            let descriptor = |at: GuestAddress, len, write: bool| Descriptor {
                address: at.0,
                len,
                flags: if write { 2 } else { 0 },
                next: 0,
            };
            let chain = [
                descriptor(head, 16, false),
                descriptor(data, load.block, !load.write),
                descriptor(status, 1, true),
            ];
            (head, driver.put(0, &chain))
        });
        let slots = slots.collect();
        Disk {
            driver,
            load,
            slots,
        }
    }

    fn make_available(&mut self, slot: usize, places: &mut Places) {
        let (head, descriptor) = self.slots[slot];
        let kind = if self.load.write { OUT } else { IN };
        let header = header(kind, places.next() / 512);
        self.driver.memory().write_slice(&header, head).unwrap();
        self.driver.make_available(0, descriptor);
    }

    /// So many requests, `depth` at a time.
    fn run(&mut self, count: u64) -> Duration {
        let mut places = Places::new(self.load);
        let start = Instant::now();
        let first = (self.slots.len() as u64).min(count);
        for slot in 0..first as usize {
            self.make_available(slot, &mut places);
        }
        self.driver.notify(0);
        let (mut begun, mut done) = (first, 0);
        while done < count {
            let (mut used, _) = self.driver.used(0);
            let before = begun;
            loop {
                done += 1;
                if begun < count {
                    begun += 1;
                    let slot = self
                        .slots
                        .iter()
                        .position(|(_, head)| *head == used)
                        .unwrap();
                    self.make_available(slot, &mut places);
                }
                match self.driver.take_used(0) {
                    Some((next, _)) => used = next,
                    None => break,
                }
            }
            if begun > before {
                self.driver.notify(0);
            }
        }
        start.elapsed()
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn plain(file: &File, load: Load, count: u64) -> Duration {
    let mut data = vec![1; load.block as usize];
    let mut places = Places::new(load);
    let start = Instant::now();
    for _ in 0..count {
        let at = places.next();
        match load.write {
            true => file.write_all_at(&data, at).unwrap(),
            false => file.read_exact_at(&mut data, at).unwrap(),
        }
    }
    start.elapsed()
}

fn bare_uring(file: &File, load: Load, count: u64) -> Duration {
    let mut ring = IoUring::new(128).unwrap();
    let mut data = vec![vec![1u8; load.block as usize]; load.depth];
    let mut places = Places::new(load);
    let file = types::Fd(file.as_raw_fd());
    let start = Instant::now();
    let (mut begun, mut done) = (0, 0);
    let mut free: Vec<usize> = (0..load.depth).collect();
    while done < count {
        while begun < count
            && let Some(slot) = free.pop()
        {
            let (at, to) = (places.next(), data[slot].as_mut_ptr());
            let entry = match load.write {
                true => opcode::Write::new(file, to, load.block).offset(at).build(),
                false => opcode::Read::new(file, to, load.block).offset(at).build(),
            };
            // SAFETY: the slot's buffer lives until all are done, and nothing else uses it before its completion.
            unsafe {
                ring.submission()
                    .push(&entry.user_data(slot as u64))
                    .unwrap()
            };
            begun += 1;
        }
        ring.submit_and_wait(1).unwrap();
        for completion in ring.completion() {
            assert_eq!(completion.result(), load.block as i32);
            free.push(completion.user_data() as usize);
            done += 1;
        }
    }
    start.elapsed()
}

fn disks(c: &mut Criterion) {
    let temporary = tempfile::NamedTempFile::new().unwrap();
    let path = std::env::var_os("BENCH_DISK").map(PathBuf::from);
    let path = path.unwrap_or_else(|| temporary.path().to_owned());
    let file = open(&path);
    for at in 0..FILE >> 20 {
        file.write_all_at(&[1; 1 << 20], at << 20).unwrap();
    }
    let engines = engines();
    for load in LOADS {
        let mut group = c.benchmark_group(load.name);
        group.throughput(Throughput::Bytes(load.block.into()));
        for io in &engines {
            let mut disk = Disk::new(&path, *io, load);
            let name = format!("disk, io={io:?}").to_lowercase();
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter_custom(|count| disk.run(count));
            });
        }
        group.bench_function(BenchmarkId::from_parameter("pread/pwrite"), |b| {
            b.iter_custom(|count| plain(&file, load, count));
        });
        if engines.contains(&Io::Uring) {
            group.bench_function(BenchmarkId::from_parameter("bare io_uring"), |b| {
                b.iter_custom(|count| bare_uring(&file, load, count));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(3));
    targets = disks
}
criterion_main!(benches);
