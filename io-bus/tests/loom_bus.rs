// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this crate adds to `srcu`'s orderings, in every interleaving:
//! `RUSTFLAGS="--cfg loom" cargo test --release --target-dir target/loom -p io-bus --test loom_bus`
//!
//! That an access is over before `unregister` is back and that two devices which remove each other
//! end; the ring of coalesced writes with a producer and two that drain; and a completion against an
//! interruption. A wake-up that is lost is a deadlock, which fails the model.

#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use io_bus::{
    Answer, At, BusKind, IoBus, IoDevice, IoRange, Outcome, Registration, Removal, RingMemory,
    defer,
};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

fn page(n: u64) -> IoRange {
    IoRange::new(n * 0x1000, 0x1000).unwrap()
}

fn model(f: impl Fn() + Send + Sync + 'static) {
    loom::model(f);
}

/// For what has too many interleavings: those with up to so many preemptions.
fn bounded(preemptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(f);
}

struct Hook<F>(F);

impl<F: Fn() + Send + Sync> IoDevice for Hook<F> {
    fn read(&self, _: At, _: &mut [u8]) -> Answer {
        Answer::Declined
    }
    fn write(&self, _: At, _: &[u8]) -> Answer {
        (self.0)();
        Answer::Accepted
    }
}

/// Memory that the device uses in an access, and that its owner uses once the device is off.
struct Cell(UnsafeCell<u32>);

// SAFETY: what the cell is for: loom itself checks that each access is ordered after the ones that
// it conflicts with.
unsafe impl Send for Cell {}
// SAFETY: as above.
unsafe impl Sync for Cell {}

#[test]
fn nobody_is_inside_a_device_that_is_unregistered_or_has_moved_away() {
    for moves in [false, true] {
        model(move || {
            let bus = IoBus::new();
            let state = Arc::new(Cell(UnsafeCell::new(0)));
            let used = state.clone();
            let device = Hook(move || {
                // SAFETY: loom fails the model if the owner's access is not ordered.
                used.0.with_mut(|cell| unsafe { *cell += 1 });
            });
            let mut registration = bus.register(BusKind::Mmio, page(1), device).unwrap();
            let mut io = bus.dispatcher();
            let vcpu = thread::spawn(move || {
                let _ = io.write(BusKind::Mmio, 0x1000, &[0]);
            });
            let removal = match moves {
                true => registration.relocate(0x8000).unwrap(),
                false => registration.unregister(),
            };
            assert!(removal.is_done());
            // SAFETY: as above: nobody is inside by that range.
            state.0.with_mut(|cell| unsafe { *cell += 1 });
            vcpu.join().unwrap();
        });
    }
}

#[test]
fn two_devices_that_remove_each_other_end() {
    bounded(6, || {
        let bus = IoBus::new();
        let slots: Arc<[Mutex<Option<Registration>>; 2]> =
            Arc::new([Mutex::new(None), Mutex::new(None)]);
        for me in 0..2_usize {
            let hands = slots.clone();
            let device = Hook(move || {
                let peer = hands[1 - me].lock().unwrap().take();
                if let Some(peer) = peer {
                    assert!(matches!(
                        peer.unregister(),
                        Removal::Done | Removal::Pending(_)
                    ));
                }
            });
            let at = bus
                .register(BusKind::Mmio, page(me as u64), device)
                .unwrap();
            *slots[me].lock().unwrap() = Some(at);
        }
        let mut io = bus.dispatcher();
        let other = thread::spawn(move || {
            let _ = io.write(BusKind::Mmio, 0x1000, &[0]);
        });
        let _ = bus.dispatcher().write(BusKind::Mmio, 0, &[0]);
        other.join().unwrap();
        // The first one inside takes the other off; whoever it was, nothing is left waiting.
        assert!(bus.ranges(BusKind::Mmio).len() <= 1);
        let last: Vec<_> = slots
            .iter()
            .filter_map(|slot| slot.lock().unwrap().take())
            .collect();
        assert!(last.into_iter().all(|one| one.unregister().is_done()));
    });
}

struct Words(std::sync::Arc<Vec<AtomicU32>>);

impl RingMemory for Words {
    fn words(&self) -> &[AtomicU32] {
        &self.0
    }
}

/// A vCPU's kept write comes before its exit, though another thread may carry it out; and no write
/// comes twice.
///
/// (The Release of `first` is not what this needs: a fence that `srcu` executes under loom as the
/// write is carried out orders as much. With `membarrier` there is none on the reader's side.)
#[test]
fn a_kept_write_comes_before_its_vcpus_exit_whoever_drains() {
    model(|| {
        let words: Vec<_> = (0..2 + 3 * 6).map(|_| AtomicU32::new(0)).collect();
        let words = std::sync::Arc::new(words);
        // KVM's part: fill the entry, then advance.
        for (word, value) in words[2..].iter().zip([0x1000, 0, 1, 0, 7, 0]) {
            word.store(value, Ordering::Relaxed);
        }
        words[1].store(1, Ordering::Release);
        let bus = IoBus::new();
        bus.attach_coalesced_ring(Words(words.clone())).unwrap();
        // Relaxed: the ring's own orderings have to carry it from one drainer to the other.
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let device = Hook(move || {
            counted.store(counted.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        });
        let at = bus.register(BusKind::Mmio, page(1), device).unwrap();

        let mut other = bus.dispatcher();
        let drainer = thread::spawn(move || {
            other.before_exit();
        });
        let mut io = bus.dispatcher();
        io.before_exit();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        drainer.join().unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 1);
        at.keep();
    });
}

#[test]
fn a_completion_and_an_interruption_are_both_seen() {
    struct Slow(Mutex<Option<io_bus::Completion>>);
    impl IoDevice for Slow {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            let (completion, deferral) = defer();
            *self.0.lock().unwrap() = Some(completion);
            Answer::Deferred(deferral)
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            Answer::Declined
        }
    }
    model(|| {
        let bus = IoBus::new();
        let device = std::sync::Arc::new(Slow(Mutex::new(None)));
        let at = bus
            .register(BusKind::Mmio, page(1), device.clone())
            .unwrap();
        let mut io = bus.dispatcher();
        let interrupter = io.interrupter();
        let mut data = [0];
        assert_eq!(io.read(BusKind::Mmio, 0x1000, &mut data), Outcome::Deferred);
        let completion = device.0.lock().unwrap().take().unwrap();
        let answerer = thread::spawn(move || assert!(completion.complete(&[5])));
        let kicker = thread::spawn(move || interrupter.interrupt());
        let mut turns = 0;
        while io.wait_read(&mut data) == Outcome::Deferred {
            turns += 1;
        }
        assert!(turns <= 1 && data == [5]);
        answerer.join().unwrap();
        kicker.join().unwrap();
        at.keep();
    });
}

/// A vCPU looks at the ring while another drains it and a third writes on: `last` has gone once around
/// between its two loads, and its own writes wait all the same.
#[test]
fn a_ring_that_was_filled_again_is_not_taken_for_empty() {
    bounded(2, || {
        let words: Vec<_> = (0..2 + 3 * 6).map(|_| AtomicU32::new(0)).collect();
        let words = std::sync::Arc::new(words);
        for n in 0..2 {
            for (word, value) in words[2 + 6 * n..].iter().zip([0x1000, 0, 1, 0, 7, 0]) {
                word.store(value, Ordering::Relaxed);
            }
        }
        words[1].store(2, Ordering::Release);
        let bus = IoBus::new();
        bus.attach_coalesced_ring(Words(words.clone())).unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let device = Hook(move || {
            // KVM, for a third vCPU, while the second entry is carried out.
            if counted.load(Ordering::Relaxed) == 1 {
                assert_eq!(words[0].load(Ordering::Acquire), 1);
                words[1].store(0, Ordering::Release);
            }
            counted.fetch_add(1, Ordering::Relaxed);
        });
        let at = bus.register(BusKind::Mmio, page(1), device).unwrap();
        let mut other = bus.dispatcher();
        let drainer = thread::spawn(move || {
            other.before_exit();
        });
        let mut io = bus.dispatcher();
        io.before_exit();
        assert!(count.load(Ordering::Relaxed) >= 2, "our two writes");
        drainer.join().unwrap();
        at.keep();
    });
}
