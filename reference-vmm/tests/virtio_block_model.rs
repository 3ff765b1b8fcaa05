// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk against a model of it, an array of bytes: random requests, many at a time, on a host that does as little as it
//! may, with pauses and restores in between.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/disk.rs"]
mod disk;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use disk::*;
use proptest::prelude::*;
use reference_vmm::devices::virtio::block::engine::Action;
use reference_vmm::devices::virtio::block::{Block, DiskConfig, Image, Io};
use reference_vmm::devices::virtio::fake::{FakeDriver, Request};

/// Sectors; a request of a batch has [`PART`] of them to itself, so that their order does not matter.
const SECTORS: u64 = 8 * PART;
const PART: u64 = 64;

#[derive(Clone, Debug)]
struct Op {
    kind: Kind,
    /// In the request's part.
    sector: u64,
    count: u64,
    /// Where the data's buffer is cut.
    cut: usize,
    byte: u8,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    Zero { unmap: bool },
    Discard,
    Flush,
}

#[derive(Clone, Debug)]
enum Step {
    Batch(Vec<Op>),
    /// At rest, and on.
    Pause,
    /// At rest, and on as another device.
    Restore,
    /// The driver begins anew.
    Reset,
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![
        3 => Just(Kind::Read),
        3 => Just(Kind::Write),
        1 => any::<bool>().prop_map(|unmap| Kind::Zero { unmap }),
        1 => Just(Kind::Discard),
        1 => Just(Kind::Flush),
    ];
    (kind, 0..PART, 1..=PART, any::<usize>(), any::<u8>()).prop_map(
        |(kind, sector, count, cut, byte)| Op {
            kind,
            sector,
            count: count.min(PART - sector),
            cut,
            byte,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(op(), 1..=8).prop_map(Step::Batch),
        1 => Just(Step::Pause),
        1 => Just(Step::Restore),
        1 => Just(Step::Reset),
    ]
}

/// A host that does a part of most reads and writes, and is interrupted now and then.
fn lazy(seed: u64) -> Host {
    let mut state = seed | 1;
    Host::new(move |job| {
        // xorshift
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match (job.action(), state % 8) {
            (_, 0) => Fate::Fail(libc::EINTR),
            (Action::Zero | Action::Punch, 1) => Fate::Fail(libc::EINVAL),
            (Action::Read | Action::Write { .. }, 2..6) => Fate::Short(state >> 8 & 0x3fff),
            _ => Fate::Pass,
        }
    })
}

/// Makes a request available, in two buffers of data where it has any.
fn request(driver: &mut FakeDriver<Block>, queue: usize, part: u64, op: &Op) -> Request {
    let sector = part * PART + op.sector;
    let len = op.count as usize * 512;
    let cut = op.cut % (len + 1);
    match op.kind {
        Kind::Read => {
            let room = [cut as u32, (len - cut) as u32, 1];
            driver.request(queue, &[&header(IN, sector)], &room)
        }
        Kind::Write => {
            let data = data(op);
            let readable: [&[u8]; 3] = [&header(OUT, sector), &data[..cut], &data[cut..]];
            driver.request(queue, &readable, &[1])
        }
        Kind::Zero { unmap } => {
            let range = range(sector, op.count as u32, unmap.into());
            driver.request(queue, &[&header(ZEROES, 0), &range], &[1])
        }
        Kind::Discard => {
            // In two ranges.
            let first = op.count as u32 / 2;
            let ranges = [
                range(sector, first, 0),
                range(sector + u64::from(first), op.count as u32 - first, 0),
            ];
            driver.request(queue, &[&header(DISCARD, 0), &ranges.concat()], &[1])
        }
        Kind::Flush => driver.request(queue, &[&header(FLUSH, 0)], &[1]),
    }
}

fn data(op: &Op) -> Vec<u8> {
    let len = op.count as usize * 512;
    (0..len)
        .map(|at| op.byte.wrapping_add((at / 3) as u8))
        .collect()
}

fn run(io: Io, queues: u16, depth: usize, seed: u64, steps: &[Step]) {
    let file = image(SECTORS as usize * 512);
    let mut model = pattern(SECTORS as usize * 512);
    let one = DiskConfig {
        queues,
        ..config(file.path(), io)
    };
    let image = Image::open(file.path(), false).unwrap();
    let host = lazy(seed);
    let mut driver = driver(host.disk_of(image.clone(), &one, depth));
    let holes = driver.offered() >> 13 & 1 == 1;
    for step in steps {
        match step {
            Step::Batch(ops) => {
                let mut asked: Vec<Vec<_>> = vec![Vec::new(); queues.into()];
                for (part, op) in (0..).zip(ops) {
                    let queue = op.cut % usize::from(queues);
                    let op = match op.kind {
                        Kind::Discard if !holes => Op {
                            kind: Kind::Flush,
                            ..op.clone()
                        },
                        _ => op.clone(),
                    };
                    let request = request(&mut driver, queue, part, &op);
                    asked[queue].push((part, op, request));
                }
                for (queue, mut asked) in asked.into_iter().enumerate() {
                    driver.notify(queue);
                    while !asked.is_empty() {
                        let (head, written) = driver.used(queue);
                        let at = asked.iter().position(|(_, _, of)| of.head == head).unwrap();
                        let (part, op, request) = asked.swap_remove(at);
                        let said = answer(&driver, &request, written);
                        assert_eq!(said.status, OK, "{op:?}");
                        let start = (part * PART + op.sector) as usize * 512;
                        let of = &mut model[start..start + op.count as usize * 512];
                        match op.kind {
                            Kind::Read => assert!(said.data == of, "{op:?}"),
                            Kind::Write => of.copy_from_slice(&data(&op)),
                            Kind::Zero { .. } => of.fill(0),
                            // It is advice: zeros, or as it was.
                            Kind::Discard => {
                                let mut is = vec![0; of.len()];
                                file.as_file().read_exact_at(&mut is, start as u64).unwrap();
                                for (was, is) in of.chunks_mut(512).zip(is.chunks(512)) {
                                    assert!(is == was || is == [0; 512], "{op:?}");
                                    was.copy_from_slice(is);
                                }
                            }
                            Kind::Flush => {}
                        }
                    }
                }
            }
            Step::Pause => {
                assert!(driver.device.pause(Duration::from_secs(60)));
                driver.device.resume();
            }
            Step::Restore => {
                assert!(driver.device.pause(Duration::from_secs(60)));
                let text = serde_json::to_string(&driver.device.state().unwrap()).unwrap();
                let state = serde_json::from_str(&text).unwrap();
                driver = driver.restored(&state, host.disk_of(image.clone(), &one, depth));
                driver.device.resume();
            }
            Step::Reset => {
                driver.reset();
                driver.start(ALL);
            }
        }
    }
    drop(driver);
    assert!(std::fs::read(file.path()).unwrap() == model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_is_an_array_of_bytes(
        queues in prop_oneof![Just(1u16), 2..=4u16],
        depth in 1..20usize,
        seed: u64,
        steps in prop::collection::vec(step(), 1..24),
    ) {
        for io in engines() {
            run(io, queues, depth, seed, &steps);
        }
    }
}
