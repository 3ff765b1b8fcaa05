// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! In steady state nothing is allocated, whatever is dirty: harvests, parts, runs, rings, shared bitmaps.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dirty_log::{ClearDirtyLog, GetDirtyLog, LogBuffer};
use dirty_log::{
    DirtyLog, DirtyRings, HostWrites, KvmManualBitmap, PAGE_SIZE, ResetRings, RingEntry,
    SharedSource, SlotKey, Union,
};
use memslots::{Hva, SlotExtent, SlotId};
use vm_memory::{GuestAddress, bitmap::Bitmap};

/// The system's, and a count of what it was asked for.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: the system's allocator does all of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PAGES: u64 = 10_000;

/// A manual bitmap in which every third page is always dirty.
struct Host;

impl GetDirtyLog for Host {
    fn get_dirty_log(&self, _: SlotId, buffer: &mut LogBuffer) -> io::Result<()> {
        buffer.words_mut().fill(0x9249_2492_4924_9249);
        Ok(())
    }
}

impl ClearDirtyLog for Host {
    fn clear_dirty_log(&self, _: SlotId, _: u64, _: u32, _: &[u64]) -> io::Result<()> {
        Ok(())
    }
}

struct Ring(Arc<[RingEntry]>);

impl ResetRings for Ring {
    fn reset_dirty_rings(&self) -> io::Result<u32> {
        Ok(self.0.iter().filter_map(RingEntry::reset).count() as u32)
    }
}

/// The only test of this program: others would be counted.
#[test]
fn a_harvest_in_steady_state_allocates_nothing() {
    // SAFETY: no VM has this slot; its numbers are all that is used.
    let slot = unsafe {
        SlotExtent::new(SlotId(4), GuestAddress(0), PAGES * PAGE_SIZE, Hva(0x1000)).unwrap()
    };
    let entries: Arc<[RingEntry]> = (0..64).map(|_| RingEntry::default()).collect();
    let rings = DirtyRings::new(Ring(entries.clone()));
    rings.add_vcpu(0, entries.clone()).unwrap();
    let shared: Arc<Vec<AtomicU64>> = Arc::new((0..200).map(|_| AtomicU64::new(0)).collect());
    let writes = HostWrites::new(PAGES).unwrap();
    let source = Union::new(PAGES)
        .with(KvmManualBitmap::new(Host, slot.clone()).unwrap())
        .and_then(|all| all.with(rings.log(&slot)?))
        .and_then(|all| all.with(SharedSource::new(shared.clone(), &slot)?))
        .and_then(|all| all.with(writes.clone()))
        .unwrap();
    let mut log = DirtyLog::new(slot, source).unwrap();
    let mut next = 0;
    let mut round = |log: &mut DirtyLog<Union>| {
        for page in 0..40 {
            // Half of them of a slot that nobody knows.
            assert!(entries[next % 64].push(SlotKey(4 + page % 2), u64::from(page) * 3));
            next += 1;
        }
        shared[7].fetch_or(0xff00, Ordering::Relaxed);
        writes.mark_dirty(0x123_4567, 0x1_2345);
        let mut sent = 0;
        let mut parts = log.parts(1024).unwrap();
        while let Some(part) = parts.next_part().unwrap() {
            sent += part.gfns().count() as u64 + part.count();
            part.commit();
        }
        let harvest = log.harvest().unwrap();
        sent += harvest.runs().map(|run| run.pages).sum::<u64>();
        harvest.commit();
        sent
    };
    round(&mut log);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let sent: u64 = (0..50).map(|_| round(&mut log)).sum();
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
    assert!(sent > 50 * PAGES);
}
