// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A bit that is taken comes with its data, and a write is in this harvest or in the next: all
//! interleavings and reorderings of a writer and a harvester.
#![cfg(loom)]

use dirty_log::{DirtyBitmap, DirtySource, HostWrites, PAGE_SIZE, PageRun};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use vm_memory::bitmap::Bitmap;

/// Two writers on two pages of one word, one harvester; the data are relaxed, as guest memory is.
#[test]
fn no_write_is_lost_and_no_bit_comes_before_its_data() {
    loom::model(|| {
        let log = HostWrites::new(2).unwrap();
        let data = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let writers: Vec<_> = (0..2)
            .map(|page| {
                let (log, data) = (log.clone(), data.clone());
                thread::spawn(move || {
                    data[page].store(1, Ordering::Relaxed);
                    log.mark_dirty(page * PAGE_SIZE as usize, 8);
                })
            })
            .collect();

        let mut harvester = log;
        let mut copied = [0u64; 2];
        let mut harvest = || {
            let mut dirty = DirtyBitmap::new(2).unwrap();
            harvester.take(&mut dirty).unwrap();
            for run in dirty.runs() {
                for page in run.first..run.end() {
                    copied[page as usize] = data[page as usize].load(Ordering::Relaxed);
                    assert_eq!(copied[page as usize], 1, "a bit came before its data");
                }
            }
        };
        harvest(); // while they run
        for writer in writers {
            writer.join().unwrap();
        }
        harvest(); // the last one, with everything stopped
        assert_eq!(copied, [1, 1], "a write was lost");
    });
}

/// The same page written twice: the second write may not hide behind the first one's bit.
#[test]
fn a_page_written_again_is_copied_again() {
    loom::model(|| {
        let log = HostWrites::new(1).unwrap();
        let data = Arc::new(AtomicU64::new(0));
        let writer = {
            let (log, data) = (log.clone(), data.clone());
            thread::spawn(move || {
                for value in 1..=2 {
                    data.store(value, Ordering::Relaxed);
                    log.mark_dirty(0, 8);
                }
            })
        };
        let mut harvester = log;
        let mut copy = 0;
        let mut harvest = || {
            let mut dirty = DirtyBitmap::new(1).unwrap();
            harvester.take(&mut dirty).unwrap();
            if dirty.runs().eq([PageRun { first: 0, pages: 1 }]) {
                copy = data.load(Ordering::Relaxed);
            }
        };
        harvest();
        writer.join().unwrap();
        harvest();
        assert_eq!(copy, 2, "the last write was lost");
    });
}

/// A log is turned on while a device writes: what the device wrote is seen by whoever turned it on, or marked.
#[test]
fn a_write_while_the_log_is_turned_on_is_marked_or_visible() {
    loom::model(|| {
        let log = HostWrites::off(1);
        let data = Arc::new(AtomicU64::new(0));
        let writer = {
            let (log, data) = (log.clone(), data.clone());
            thread::spawn(move || {
                data.store(1, Ordering::Relaxed);
                log.mark_dirty(0, 8);
            })
        };
        log.start().unwrap();
        // The first copy of everything, and the harvest behind it.
        let mut copy = data.load(Ordering::Relaxed);
        writer.join().unwrap();
        let mut dirty = DirtyBitmap::new(1).unwrap();
        log.clone().take(&mut dirty).unwrap();
        if !dirty.is_clean() {
            copy = data.load(Ordering::Relaxed);
        }
        assert_eq!(copy, 1, "a write was lost");
    });
}

/// Two turn it on at once: each may copy as soon as its own call has returned.
#[test]
fn of_two_who_turn_it_on_each_sees_the_write_or_finds_it_marked() {
    loom::model(|| {
        let log = HostWrites::off(1);
        // The words are made before: their OnceLock is std's, of whose ordering loom knows nothing.
        log.start().unwrap();
        log.stop();
        let data = Arc::new(AtomicU64::new(0));
        let copy = |log: &HostWrites, data: &AtomicU64| {
            log.start().unwrap();
            data.load(Ordering::Relaxed)
        };
        let writer = {
            let (log, data) = (log.clone(), data.clone());
            thread::spawn(move || {
                data.store(1, Ordering::Relaxed);
                log.mark_dirty(0, 8);
            })
        };
        let other = {
            let (log, data) = (log.clone(), data.clone());
            thread::spawn(move || copy(&log, &data))
        };
        let mine = copy(&log, &data);
        let others = other.join().unwrap();
        writer.join().unwrap();
        let mut dirty = DirtyBitmap::new(1).unwrap();
        log.clone().take(&mut dirty).unwrap();
        for copied in [mine, others] {
            assert!(copied == 1 || !dirty.is_clean(), "a write was lost");
        }
    });
}
