// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A sample, and all that is read from it, allocates nothing.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;

use kvm_core::fake::{FakeStat, FakeStats};
use kvm_core::stats::StatsReader;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, with a count for each thread.
struct Counting;

// SAFETY: every call goes on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_round_of_sampling_allocates_nothing() {
    let histogram = FakeStat {
        flags: kvm_bindings::KVM_STATS_TYPE_LOG_HIST,
        values: vec![1; 32],
        ..FakeStat::counter("waits", 0)
    };
    let file = FakeStats::new("kvm-1", [FakeStat::counter("exits", 3), histogram]);
    let mut reader = StatsReader::open(&file).unwrap();
    let mut before = reader.latest().clone();
    let calls = CALLS.get();
    for _ in 0..10 {
        let now = reader.sample().unwrap();
        let exits = now.named("exits").unwrap().scaled();
        black_box(exits.and_then(|exits| exits.as_f64()));
        let changes = now.since(&before).unwrap();
        let buckets = changes.iter().flat_map(|change| change.buckets());
        black_box(buckets.map(|bucket| bucket.count).sum::<i128>());
        before.clone_from(now);
    }
    assert_eq!(CALLS.get(), calls);
}

#[test]
fn a_file_that_claims_gigabytes_gets_none() {
    let bytes = FakeStats::new("kvm-1", [FakeStat::counter("exits", 3)]).bytes();
    // Each word of the header, and each half word of the descriptor behind the id.
    for at in (0..24).step_by(4).chain((72..88).step_by(2)) {
        let mut spoilt = bytes.clone();
        spoilt[at..at + 4].copy_from_slice(&0xffff_fff0_u32.to_ne_bytes());
        let file = FakeStats::from_bytes(spoilt);
        LARGEST.set(0);
        let _ = black_box(StatsReader::open(&file));
        assert!(LARGEST.get() <= kvm_core::stats::StatsSchema::LIMIT);
    }
}
