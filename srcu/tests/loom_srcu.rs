// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Every interleaving, and every reordering that the memory model allows, of a few readers and writers:
//! `RUSTFLAGS="--cfg loom" cargo test --release --target-dir target/loom -p srcu --test loom_srcu`
//!
//! Loom knows no `membarrier(2)`: both halves of the crate's barrier are SeqCst fences here, which is what the kernel
//! promises of them and no more. (One ordering is needed by the asymmetric pair alone, and so no model shows it: the
//! Release of a reader's second enter, which the fence of its first leave makes up for here.)
//!
//! A table, or a resource that a table leads to, is a loom cell: reading it and freeing it without an order between the
//! two fails the model. A wake-up that is lost is a deadlock, which fails it too.

#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use srcu::Published;

/// Memory that is written when it is made and when it is freed.
struct Tracked(UnsafeCell<usize>);

// SAFETY: what the cell is for: loom itself checks that each access is ordered after the ones that it conflicts with.
unsafe impl Send for Tracked {}
// SAFETY: as above.
unsafe impl Sync for Tracked {}

const FREED: usize = usize::MAX;

impl Tracked {
    fn new(value: usize) -> Self {
        let new = Self(UnsafeCell::new(FREED));
        new.write(value);
        new
    }

    fn write(&self, value: usize) {
        // SAFETY: loom fails the model if another access is not ordered before or after this one.
        self.0.with_mut(|cell| unsafe { *cell = value });
    }

    fn read(&self) -> usize {
        // SAFETY: as above, for writes.
        self.0.with(|cell| unsafe { *cell })
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.write(FREED);
    }
}

fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    // Three preemptions find every bug that these models were made to find (each ordering was weakened in turn).
    builder.preemption_bound.get_or_insert(3);
    builder.check(f);
}

#[test]
fn a_table_is_not_freed_under_a_reader() {
    model(|| {
        let published = Arc::new(Published::new(Tracked::new(0)));
        let mut reader = published.reader();
        let thread = thread::spawn(move || {
            for _ in 0..2 {
                let guard = reader.enter();
                assert_eq!(guard.read(), guard.generation() as usize);
            }
        });
        drop(published.publish(Tracked::new(1)));
        drop(published.publish(Tracked::new(2)));
        thread.join().unwrap();
    });
}

#[test]
fn after_wait_nobody_uses_what_the_old_table_led_to() {
    model(|| {
        let published = Arc::new(Published::new(0));
        let resource = Arc::new(Tracked::new(7));
        let mut reader = published.reader();
        let seen = Arc::clone(&resource);
        let thread = thread::spawn(move || {
            for _ in 0..2 {
                let guard = reader.enter();
                if *guard == 0 {
                    assert_eq!(seen.read(), 7);
                }
            }
        });
        published.publish(1).wait();
        resource.write(FREED);
        thread.join().unwrap();
    });
}

#[test]
fn wait_waits_for_each_of_two_readers() {
    model(|| {
        let published = Arc::new(Published::new(0));
        let resource = Arc::new(Tracked::new(7));
        let threads = [0, 1].map(|_| {
            let (mut reader, seen) = (published.reader(), Arc::clone(&resource));
            thread::spawn(move || {
                let guard = reader.enter();
                if *guard == 0 {
                    assert_eq!(seen.read(), 7);
                }
            })
        });
        published.publish(1).wait();
        resource.write(FREED);
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn two_waiting_writers_are_both_woken_and_free_in_order() {
    model(|| {
        let published = Arc::new(Published::new(Tracked::new(0)));
        let mut reader = published.reader();
        let reading = thread::spawn(move || {
            let guard = reader.enter();
            assert!(guard.read() <= 2);
        });
        let other = Arc::clone(&published);
        let writing = thread::spawn(move || other.publish(Tracked::new(1)).wait());
        published.publish(Tracked::new(2)).wait();
        reading.join().unwrap();
        writing.join().unwrap();
        assert_eq!(published.generation(), 2);
    });
}

#[test]
fn who_removes_from_inside_defers_and_it_runs_once_when_all_have_left() {
    model(|| {
        let published = Arc::new(Published::new(0));
        let resource = Arc::new(Tracked::new(7));
        let ran = Arc::new(AtomicUsize::new(0));
        let (mut reader, seen) = (published.reader(), Arc::clone(&resource));
        let thread = thread::spawn(move || {
            let guard = reader.enter();
            if *guard == 0 {
                assert_eq!(seen.read(), 7);
            }
        });
        let mut own = published.reader();
        let guard = own.enter();
        assert_eq!((*guard, resource.read()), (0, 7));
        let freed = (Arc::clone(&resource), Arc::clone(&ran));
        published.publish(1).defer(move || {
            freed.0.write(FREED);
            freed.1.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 0, "we are still inside");
        assert_eq!(resource.read(), 7);
        drop(guard);
        thread.join().unwrap();
        assert_eq!(ran.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn a_reader_that_comes_while_a_writer_waits_sees_the_new_table_or_is_waited_for() {
    model(|| {
        let published = Arc::new(Published::new(Tracked::new(0)));
        let resource = Arc::new(Tracked::new(7));
        let (other, seen) = (Arc::clone(&published), Arc::clone(&resource));
        let thread = thread::spawn(move || {
            let mut reader = other.reader();
            let guard = reader.enter();
            if guard.read() == 0 {
                assert_eq!(seen.read(), 7);
            }
        });
        published.publish(Tracked::new(1)).wait();
        resource.write(FREED);
        thread.join().unwrap();
    });
}

#[test]
fn an_old_table_is_freed_as_the_last_reader_leaves_though_nobody_asks() {
    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    model(|| {
        let drops = Arc::new(AtomicUsize::new(0));
        let published = Published::new(Counted(Arc::clone(&drops)));
        let mut reader = published.reader();
        let thread = thread::spawn(move || {
            drop(reader.enter());
            reader
        });
        drop(published.publish(Counted(Arc::clone(&drops))));
        let reader = thread.join().unwrap();
        assert_eq!(drops.load(Ordering::Relaxed), 1);
        drop(reader);
    });
}

#[test]
fn a_guard_that_was_forgotten_ends_when_its_reader_goes() {
    model(|| {
        let published = Arc::new(Published::new(Tracked::new(0)));
        let mut reader = published.reader();
        let thread = thread::spawn(move || std::mem::forget(reader.enter()));
        published.publish(Tracked::new(1)).wait();
        thread.join().unwrap();
    });
}

#[test]
fn who_sleeps_for_a_forgotten_guard_is_woken_at_its_readers_next_leave() {
    model(|| {
        let published = Arc::new(Published::new(Tracked::new(0)));
        let mut reader = published.reader();
        let thread = thread::spawn(move || {
            std::mem::forget(reader.enter());
            reader.enter().read();
            reader
        });
        published.publish(Tracked::new(1)).wait();
        drop(thread.join().unwrap());
    });
}

#[test]
fn a_generation_leads_to_its_table_or_a_later_one() {
    model(|| {
        let published = Arc::new(Published::new(0));
        let mut reader = published.reader();
        let thread = thread::spawn(move || {
            let seen = reader.generation();
            assert!(reader.load().generation() >= seen);
            let seen = reader.generation();
            assert!(reader.enter().generation() >= seen);
        });
        drop(published.publish(1));
        thread.join().unwrap();
    });
}

#[test]
fn who_sees_a_generation_sees_what_its_writer_had_done() {
    model(|| {
        let published = Arc::new(Published::new(()));
        let resource = Arc::new(Tracked::new(0));
        let (other, done) = (Arc::clone(&published), Arc::clone(&resource));
        let thread = thread::spawn(move || {
            done.write(7);
            drop(other.publish(()));
        });
        if published.generation() == 1 {
            assert_eq!(resource.read(), 7);
        }
        thread.join().unwrap();
    });
}
