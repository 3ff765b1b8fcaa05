// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a change of the slots sets free (memory, deferred closures) is let go of with no lock held, so it may change
//! slots in its turn.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{Backing, Memslots, PAGE_SIZE, PrivateRanges, Slot, SlotFlags};
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use vm_memory::GuestAddress;
use vm_memory::bitmap::{Bitmap, NewBitmap, WithBitmapSlice};

/// A deadlock fails the test instead of hanging it. Nothing is timed: a test that ends, ends before.
fn within_reason(test: impl FnOnce() + Send + 'static) {
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        tell.send(()).unwrap();
    });
    if told.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("a deadlock");
    }
    thread.join().unwrap();
}

fn page(memslots: &Memslots, index: u64) -> Slot {
    let backing = Backing::anonymous(PAGE_SIZE);
    memslots
        .create(GuestAddress(index * PAGE_SIZE), backing, SlotFlags::NONE)
        .unwrap()
}

thread_local! {
    /// What the drop of the next bitmap does.
    static AT_DROP: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// Notes nothing; its drop is the moment at which a slot's memory is unmapped.
#[derive(Debug, Default)]
struct AtDrop;

impl Drop for AtDrop {
    fn drop(&mut self) {
        if let Some(f) = AT_DROP.with_borrow_mut(Option::take) {
            f();
        }
    }
}

impl WithBitmapSlice<'_> for AtDrop {
    type S = ();
}

impl Bitmap for AtDrop {
    fn mark_dirty(&self, _: usize, _: usize) {}
    fn dirty_at(&self, _: usize) -> bool {
        false
    }
    fn slice_at(&self, _: usize) {}
}

impl NewBitmap for AtDrop {
    fn with_len(_: usize) -> Self {
        Self
    }
}

#[test]
fn memory_is_let_go_of_with_no_lock_held() {
    within_reason(|| {
        let memslots = Memslots::<AtDrop>::with_policy(FakeHost::new(8), PrivateRanges::none());
        let create = |memslots: &Memslots<AtDrop>, page: u64| {
            let start = GuestAddress(page * PAGE_SIZE);
            memslots.create(start, Backing::anonymous(PAGE_SIZE), SlotFlags::NONE)
        };
        let first = create(&memslots, 0).unwrap();
        let (tell, told) = mpsc::channel();
        let again = memslots.clone();
        AT_DROP.set(Some(Box::new(move || {
            tell.send(create(&again, 1).unwrap()).unwrap();
        })));
        first.remove().unwrap().wait();
        let second = told.try_recv().unwrap();
        assert_eq!(second.extent().start(), GuestAddress(PAGE_SIZE));
        assert_eq!(memslots.snapshot().regions().len(), 1);
    });
}

/// Whoever finds the grace period over runs the closure: the reader that leaves, or a thread that changes slots.
#[test]
fn a_deferred_closure_may_change_slots_whoever_runs_it() {
    let rounds = if std::env::var_os("LONG_TESTS").is_some() {
        400_000u64
    } else {
        4_000
    };
    within_reason(move || {
        let memslots = Memslots::new(FakeHost::new(64));
        let stop = AtomicBool::new(false);
        let mut reader = memslots.reader();
        thread::scope(|scope| {
            let _stop = StopReaders(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(reader.enter());
                }
            });
            for round in 0..rounds {
                let (gone, with_it) = (page(&memslots, 0), page(&memslots, 1 + round % 32));
                let (tell, told) = mpsc::channel();
                gone.remove().unwrap().defer(move || {
                    drop(with_it);
                    tell.send(()).unwrap();
                });
                drop(page(&memslots, 40));
                told.recv().unwrap();
            }
        });
        assert_eq!(memslots.available(), 64);
    });
}

struct StopReaders<'a>(&'a AtomicBool);

impl Drop for StopReaders<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
