// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading and answering faults allocates nothing once it is set up: a pager must not wait for an allocator that waits
//! for memory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::uffd::{Event, Features, Messages, Modes, Uffd, Wake};
use memslots::{Backing, HugePages, Mapping, PAGE_SIZE};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::thread;
use vm_memory::GuestAddress;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: it is the system's, counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn faults_are_read_and_answered_without_allocation() {
    const PAGES: u64 = 64;
    let uffd = Uffd::open(Features::NONE, Features::NONE)
        .expect("this test needs a userfaultfd: run it as root, or as the error says");
    let backing = Backing::anonymous(PAGES * PAGE_SIZE).huge_pages(HugePages::Never);
    let memory = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
    let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    let pager = registration.lend_fill().unwrap();
    let mut messages = Messages::with_capacity(8);
    let toucher = thread::spawn({
        let memory = Arc::clone(&memory);
        move || {
            let sum = |sum: u64, page: u64| {
                let byte = (memory.host().0 + (page * PAGE_SIZE) as usize) as *const u8;
                // SAFETY: within the mapping.
                sum + u64::from(unsafe { byte.read_volatile() })
            };
            (0..PAGES).fold(0, sum)
        }
    });
    let contents = [3; PAGE_SIZE as usize];
    let before = ALLOCATIONS.get();
    let mut answered = 0;
    while answered < PAGES {
        uffd.wait(None).unwrap();
        uffd.read(&mut messages).unwrap();
        for event in &mut messages {
            if let Event::Fault(fault) = event {
                let page = pager.page_of(fault.address).unwrap();
                assert!(uffd.locate(fault.address).is_some());
                pager.copy(page, &contents, Wake::Now).unwrap();
                answered += 1;
            }
        }
    }
    assert_eq!(ALLOCATIONS.get(), before);
    assert_eq!(toucher.join().unwrap(), 3 * PAGES);
}
