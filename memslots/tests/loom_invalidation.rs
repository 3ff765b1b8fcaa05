// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The invalidation sequence against a concurrent invalidator, in every interleaving and permitted reordering:
//! `RUSTFLAGS="--cfg loom" cargo test --release --target-dir target/loom -p memslots --test loom_invalidation`
//!
//! Guest memory is an atomic word here (relaxed: a guest or another thread may write it at any time), and what an
//! invalidator takes away for good is a loom cell, which two threads must not touch without an order between them.

#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use memslots::{Gfn, Invalidations};
use srcu::Published;
use std::ops::Range;

const FRAME: Range<Gfn> = Gfn(7)..Gfn(8);

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.check(f);
}

fn invalidations() -> std::sync::Arc<Invalidations> {
    std::sync::Arc::default()
}

/// Memory that is used, and gone.
struct Pinned(UnsafeCell<bool>);

// SAFETY: what the cell is for: loom itself checks that each access is ordered after the ones that it conflicts with.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

#[test]
fn two_words_that_were_read_and_need_no_retry_are_of_one_time() {
    model(|| {
        let all = invalidations();
        let words = Arc::new([AtomicU64::new(1), AtomicU64::new(1)]);
        let (other, punched) = (all.clone(), Arc::clone(&words));
        let thread = thread::spawn(move || {
            let invalidation = other.begin(FRAME);
            punched[0].store(0, Ordering::Relaxed);
            punched[1].store(0, Ordering::Relaxed);
            drop(invalidation);
        });
        let seq = all.sequence();
        let read = [0, 1].map(|index: usize| words[index].load(Ordering::Relaxed));
        if !all.retry(seq, FRAME) {
            assert_eq!(read[0], read[1]);
        }
        thread.join().unwrap();
    });
}

#[test]
fn what_began_and_ended_in_between_is_noticed_whatever_else_is_in_progress() {
    model(|| {
        let all = invalidations();
        let word = Arc::new(AtomicU64::new(1));
        let (other, punched) = (all.clone(), Arc::clone(&word));
        let thread = thread::spawn(move || {
            let invalidation = other.begin(FRAME);
            punched.store(0, Ordering::Relaxed);
            drop(invalidation);
            // Another frame, which is none of the user's business.
            drop(other.begin(Gfn(100)..Gfn(101)));
        });
        let seq = all.sequence();
        let before = word.load(Ordering::Relaxed);
        let after = word.load(Ordering::Relaxed);
        if !all.retry(seq, FRAME) {
            assert_eq!(before, after);
        }
        thread.join().unwrap();
    });
}

#[test]
fn a_no_inside_a_guard_holds_until_the_guard_is_left() {
    model(|| {
        let (all, table) = (invalidations(), Arc::new(Published::new(())));
        let pinned = Arc::new(Pinned(UnsafeCell::new(true)));
        let mut reader = table.reader();
        let seq = all.sequence();
        let (other, used) = (all.clone(), Arc::clone(&pinned));
        let thread = thread::spawn(move || {
            let guard = reader.enter();
            if !other.retry(seq, FRAME) {
                // SAFETY: loom fails the model if the write below is not ordered before or after.
                assert!(used.0.with(|there| unsafe { *there }));
            }
            drop(guard);
        });
        let invalidation = all.begin(FRAME);
        table.grace().wait();
        // SAFETY: as above.
        pinned.0.with_mut(|there| unsafe { *there = false });
        drop(invalidation);
        thread.join().unwrap();
    });
}

#[test]
fn two_invalidators_count_and_each_is_noticed() {
    model(|| {
        let all = invalidations();
        let seq = all.sequence();
        let threads = [FRAME, Gfn(100)..Gfn(101)].map(|range| {
            let all = all.clone();
            thread::spawn(move || drop(all.begin(range)))
        });
        let during = all.sequence();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(all.retry(seq, FRAME));
        let settled = all.sequence();
        assert!(!all.retry_any(settled));
        assert!(all.retry_any(during) == (during != settled));
    });
}
