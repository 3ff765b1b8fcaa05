// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two readers and a writer that never rests: no answer is wrong. A few seconds; a minute under
//! `LONG_TESTS=1`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use io_bus::{Answer, At, BusKind, IoBus, IoDevice, IoRange, Outcome};

/// Answers reads with its name and the offset; knows when it must not be asked any more.
struct Named {
    name: u32,
    gone: AtomicBool,
}

impl IoDevice for Named {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        assert!(
            !self.gone.load(Ordering::Relaxed),
            "asked after it was gone"
        );
        let word = u64::from(self.name) << 32 | at.offset;
        data.copy_from_slice(&word.to_le_bytes());
        Answer::Accepted
    }
    fn write(&self, _: At, _: &[u8]) -> Answer {
        Answer::Declined
    }
}

fn named(name: u32) -> Arc<Named> {
    let gone = AtomicBool::new(false);
    Arc::new(Named { name, gone })
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) % end
    }
}

const PAGES: u64 = 64;
/// Every fourth page has a device that never moves.
const FIXED: u64 = 4;

fn page(n: u64) -> IoRange {
    IoRange::new(n * 0x1000, 0x1000).unwrap()
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn two_readers_and_a_writer_and_no_wrong_answer() {
    let long = std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1");
    let span = Duration::from_secs(if long { 60 } else { 2 });
    let bus = IoBus::new();
    for n in (0..PAGES).step_by(FIXED as usize) {
        bus.register(BusKind::Mmio, page(n), named(n as u32))
            .unwrap()
            .keep();
    }
    let stop = AtomicBool::new(false);
    let started = Barrier::new(3);
    let reads = AtomicU64::new(0);
    let moving_answered = AtomicU64::new(0);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for seed in [0x9e37_79b9, 0xd1b5_4a32] {
            let mut io = bus.dispatcher();
            let (stop, started, reads, answered) = (&stop, &started, &reads, &moving_answered);
            scope.spawn(move || {
                let mut random = Random(seed);
                started.wait();
                while !stop.load(Ordering::Relaxed) {
                    let (n, offset) = (random.below(PAGES), random.below(0xff8));
                    let mut data = [0; 8];
                    let outcome = io.read(BusKind::Mmio, n * 0x1000 + offset, &mut data);
                    let word = u64::from_le_bytes(data);
                    reads.fetch_add(1, Ordering::Relaxed);
                    match outcome {
                        Outcome::Answered if n % FIXED == 0 => {
                            assert_eq!(word, n << 32 | offset);
                        }
                        Outcome::Answered => {
                            // One of those that move; its page is what it was asked for.
                            assert!(word >> 32 >= 1000);
                            assert_eq!(word & 0xffff_ffff, offset);
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Outcome::Unclaimed => {
                            assert_ne!(n % FIXED, 0, "a device that never moved was not there");
                            assert_eq!(word, u64::MAX);
                        }
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        started.wait();
        let mut random = Random(0x1234_5678);
        let mut moving = Vec::new();
        let mut name = 1000;
        let end = Instant::now() + span;
        while Instant::now() < end {
            let n = FIXED * random.below(PAGES / FIXED) + 1 + random.below(FIXED - 1);
            match random.below(8) {
                0..3 if moving.len() < 24 => {
                    let device = named(name);
                    name += 1;
                    let at = bus
                        .register(BusKind::Mmio, page(n), device.clone())
                        .unwrap();
                    moving.push((device, at));
                }
                3 | 4 if !moving.is_empty() => {
                    let which = random.below(moving.len() as u64) as usize;
                    let (device, registration) = moving.swap_remove(which);
                    assert!(registration.unregister().is_done());
                    device.gone.store(true, Ordering::Relaxed);
                }
                5 | 6 if !moving.is_empty() => {
                    let which = random.below(moving.len() as u64) as usize;
                    assert!(moving[which].1.relocate(n * 0x1000).unwrap().is_done());
                }
                7 => bus.count(random.below(2) == 0),
                _ => {}
            }
        }
    });
    assert!(reads.load(Ordering::Relaxed) > 1000);
    assert!(moving_answered.load(Ordering::Relaxed) > 100);
}
