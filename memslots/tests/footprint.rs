// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a slot costs this process beside its memory, counted by the allocator.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::{
    Backing, Errno, Layout, MemoryRegion, Memslots, NewSlot, PAGE_SIZE, PrivateRanges,
    SetMemoryRegion, SlotFlags,
};
use std::alloc::{GlobalAlloc, Layout as AllocLayout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_memory::GuestAddress;

/// The system's allocator, with a sum.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: AllocLayout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: AllocLayout) {
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Agrees to everything and keeps nothing.
struct Agreeable;

impl SetMemoryRegion for Agreeable {
    unsafe fn set_memory_region(&self, _: &MemoryRegion) -> Result<(), Errno> {
        Ok(())
    }

    fn max_slots(&self) -> usize {
        32_764
    }
}

#[test]
fn a_slot_costs_less_than_a_kilobyte() {
    const SLOTS: u64 = 10_000;
    let memslots = Memslots::<()>::with_policy(Agreeable, PrivateRanges::none());
    let slot = |index: u64| NewSlot {
        start: GuestAddress(index * 2 * PAGE_SIZE),
        backing: Backing::anonymous(PAGE_SIZE),
        flags: SlotFlags::NONE,
    };
    let layout: Layout = (0..SLOTS).map(slot).collect();
    let before = BYTES.load(Ordering::Relaxed);
    drop(memslots.set_layout(&layout).unwrap());
    let each = (BYTES.load(Ordering::Relaxed) - before) / SLOTS as usize;
    println!("{each} bytes a slot");
    assert!(each < 1000, "{each} bytes a slot");
    memslots.set_layout(&Layout::new()).unwrap().grace.wait();
    let left = BYTES.load(Ordering::Relaxed) - before;
    // The list of the ids that have come back keeps its room.
    assert!(
        left < 16 * SLOTS as usize,
        "{left} bytes of {SLOTS} slots are left when they are gone"
    );
}
