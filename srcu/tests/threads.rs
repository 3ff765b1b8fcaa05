// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The promises on real threads, where a model cannot go: many rounds, panics, what is dropped when and how often.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use srcu::Published;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

/// A table that counts its drops and whose contents say whether it was freed.
struct Counted {
    value: usize,
    echo: Box<usize>,
    drops: Arc<AtomicUsize>,
}

impl Counted {
    fn new(value: usize, drops: &Arc<AtomicUsize>) -> Self {
        Self {
            value,
            echo: Box::new(value),
            drops: Arc::clone(drops),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *self.echo = usize::MAX;
        self.drops.fetch_add(1, Ordering::SeqCst);
    }
}

/// Stops the readers however the writers end: a panic fails the test, and does not hang it.
struct StopReaders<'a>(&'a AtomicBool);

impl Drop for StopReaders<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn readers_and_writers_in_a_crowd_see_whole_tables_and_each_is_dropped_once() {
    let rounds = if std::env::var_os("LONG_TESTS").is_some() {
        2_000_000
    } else {
        20_000
    };
    let rounds = if cfg!(miri) { 50 } else { rounds };
    let drops = Arc::new(AtomicUsize::new(0));
    let published = Published::new(Counted::new(0, &drops));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let readers = StopReaders(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                let mut reader = published.reader();
                let mut last = 0;
                while !stop.load(Ordering::Relaxed) {
                    let guard = reader.enter();
                    assert_eq!(*guard.echo, guard.value);
                    assert!(guard.generation() >= last, "time does not run backwards");
                    last = guard.generation();
                }
            });
        }
        // Readers that come and go.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut reader = published.reader();
                let guard = reader.enter();
                assert_eq!(*guard.echo, guard.value);
            }
        });
        let other_writer = scope.spawn(|| {
            for round in 0..rounds {
                drop(published.publish(Counted::new(round, &drops)));
            }
        });
        for round in 0..rounds {
            let next = |_: &Counted| Ok::<_, ()>((Counted::new(round, &drops), ()));
            let ((), grace) = published.update(next).unwrap();
            if round % 8 == 0 {
                grace.wait();
            }
        }
        other_writer.join().unwrap();
        drop(readers);
    });
    published.grace().wait();
    assert_eq!(published.generation(), 2 * rounds as u64);
    drop(published);
    assert_eq!(drops.load(Ordering::SeqCst), 2 * rounds + 1);
}

#[test]
fn wait_returns_when_the_last_reader_inside_has_left_and_not_before() {
    let published = Published::new(0);
    let mut reader = published.reader();
    let guard = reader.enter();
    let grace = published.publish(1);
    assert!(!grace.is_over());
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            grace.wait();
            tell.send(()).unwrap();
        });
        assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Empty));
        assert_eq!(*guard, 0, "the table of the time of entering");
        drop(guard);
        told.recv().unwrap();
    });
    assert_eq!(*reader.enter(), 1);
}

#[test]
fn a_panic_inside_a_guard_leaves() {
    let published = Published::new(0);
    let mut reader = published.reader();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _guard = reader.enter();
        panic!("inside");
    }));
    assert!(panicked.is_err());
    published.publish(1).wait();
    assert_eq!(*reader.enter(), 1, "and the reader goes on");
}

#[test]
fn an_update_that_fails_or_panics_has_changed_nothing() {
    let published = Published::new(5);
    assert_eq!(
        published.update(|_| Err::<(i32, ()), _>("no")).err(),
        Some("no")
    );
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _ = published.update(|_| -> Result<(i32, ()), ()> { panic!("in the writer") });
    }));
    assert!(panicked.is_err());
    assert_eq!((published.generation(), *published.load()), (0, 5));
    published.publish(6).wait();
    assert_eq!((published.generation(), *published.load()), (1, 6));
}

#[test]
fn a_deferred_closure_that_panics_stops_neither_the_others_nor_the_table() {
    let drops = Arc::new(AtomicUsize::new(0));
    let published = Published::new(Counted::new(0, &drops));
    let mut reader = published.reader();
    let ran = Arc::new(AtomicUsize::new(0));
    let guard = reader.enter();
    let count = |ran: &Arc<AtomicUsize>| {
        let ran = Arc::clone(ran);
        move || {
            ran.fetch_add(1, Ordering::SeqCst);
        }
    };
    published
        .publish(Counted::new(1, &drops))
        .defer(count(&ran));
    published.grace().defer(|| panic!("in a closure"));
    published.grace().defer(count(&ran));
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    let panicked = catch_unwind(AssertUnwindSafe(|| drop(guard)));
    assert!(panicked.is_err());
    assert_eq!(
        (drops.load(Ordering::SeqCst), ran.load(Ordering::SeqCst)),
        (1, 2)
    );
    published.publish(Counted::new(2, &drops)).wait();
}

#[test]
fn a_deferred_closure_may_publish_and_defer_again() {
    let published = Arc::new(Published::new(0));
    let mut reader = published.reader();
    let guard = reader.enter();
    let again = Arc::clone(&published);
    published.publish(1).defer(move || {
        let third = Arc::clone(&again);
        again.publish(2).defer(move || drop(third.publish(3)));
    });
    assert_eq!(published.generation(), 1);
    drop(guard);
    assert_eq!((published.generation(), *reader.enter()), (3, 3));
}

#[test]
fn with_nobody_inside_defer_runs_at_once() {
    let published = Published::new(0);
    let _idle = published.reader();
    let (tell, told) = mpsc::channel();
    published.publish(1).defer(move || tell.send(()).unwrap());
    told.try_recv().unwrap();
}

#[test]
fn a_snapshot_outlives_everything_and_keeps_only_its_table() {
    let drops = Arc::new(AtomicUsize::new(0));
    let published = Published::new(Counted::new(0, &drops));
    let snapshot = published.load();
    published.publish(Counted::new(1, &drops)).wait();
    drop(published);
    assert_eq!(drops.load(Ordering::SeqCst), 1, "the current one");
    assert_eq!((*snapshot.echo, snapshot.generation()), (0, 0));
    drop(snapshot);
    assert_eq!(drops.load(Ordering::SeqCst), 2);
}

#[test]
fn a_reader_keeps_the_table_when_the_writers_side_is_gone() {
    let published = Published::new(7);
    let mut reader = published.reader();
    drop(published);
    assert_eq!(*reader.enter(), 7);
}

#[test]
fn a_forgotten_guard_holds_back_until_its_reader_enters_again() {
    let published = Published::new(0);
    let mut reader = published.reader();
    std::mem::forget(reader.enter());
    let grace = published.publish(1);
    assert!(!grace.is_over());
    assert_eq!(*reader.enter(), 1);
    assert!(grace.is_over());
}

#[test]
fn each_grace_period_is_over_no_later_than_those_after_it() {
    let published = Published::new(0);
    let mut readers = [published.reader(), published.reader()];
    let [first, second] = &mut readers;
    let early = first.enter();
    let a = published.publish(1);
    let late = second.enter();
    let b = published.publish(2);
    assert_eq!((a.is_over(), b.is_over()), (false, false));
    drop(early);
    assert_eq!(
        (a.is_over(), b.is_over()),
        (true, false),
        "the second reader came after the first publication"
    );
    drop(late);
    assert_eq!((a.is_over(), b.is_over()), (true, true));
}

#[test]
fn what_prints_says_what_is_held_back() {
    let published = Published::new(0);
    let mut reader = published.reader();
    let guard = reader.enter();
    let grace = published.publish(1);
    assert_eq!(
        format!("{published:?}"),
        "Published { generation: 1, readers: 1, retired: 1 }"
    );
    assert_eq!(
        format!("{grace:?}"),
        "Grace { inside_at_start: 1, is_over: false }"
    );
    assert_eq!(format!("{guard:?}"), "Guard { generation: 0, value: 0 }");
    assert_eq!(
        format!("{:?}", published.load()),
        "Snapshot { generation: 1, value: 1 }"
    );
}
