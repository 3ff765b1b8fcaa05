// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each call refused in turn, and what is true in the moment of each.

use super::*;
use crate::fake::FakeHost;
use crate::{
    Backing, GuestMemfd, Invalidations, Memslots, NewSlot, PAGE_SIZE, PrivateRanges, SlotFlags,
};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::Bytes;
use vm_memory::bitmap::AtomicBitmap;

const PAGE: u64 = PAGE_SIZE;
const PATTERN: u8 = 0xa5;

/// The kernel, but for the call that it is told to refuse; and at each call it looks whether the readers are told of what
/// is about to happen.
struct Spy {
    invalidations: Arc<Invalidations>,
    refuse: Option<(usize, Errno)>,
    calls: Cell<usize>,
    /// Of each call: whether the whole of the request is an invalidation in progress.
    told: RefCell<Vec<bool>>,
    concerns: Range<Gfn>,
}

impl Spy {
    fn call(&self, then: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        let number = self.calls.replace(self.calls.get() + 1);
        let all = &self.invalidations;
        // A number that is taken now is as good as any: only one in progress makes it bad.
        let page = |gfn| all.retry(all.sequence(), Gfn(gfn)..Gfn(gfn + 1));
        let told = (self.concerns.start.0..self.concerns.end.0).all(page);
        self.told.borrow_mut().push(told);
        match self.refuse {
            Some((refused, errno)) if refused == number => Err(errno),
            _ => then(),
        }
    }
}

impl Discard for Spy {
    unsafe fn dont_need(&self, start: *mut c_void, size: usize) -> Result<(), Errno> {
        // SAFETY: the caller's promise is the same.
        self.call(|| unsafe { Kernel.dont_need(start, size) })
    }

    fn punch_hole(&self, file: BorrowedFd<'_>, offset: u64, size: u64) -> Result<(), Errno> {
        self.call(|| Kernel.punch_hole(file, offset, size))
    }
}

struct Machine {
    memslots: Memslots<AtomicBitmap>,
    memfd: GuestMemfd,
}

/// Anonymous memory in pages 0..2; a memfd in 2..4; in 4..6 anonymous memory with pages 1..3 of a guest_memfd of four.
fn machine() -> Machine {
    let host = FakeHost::new(8).with_guest_memfd();
    let memslots = Memslots::<AtomicBitmap>::with_policy(host, PrivateRanges::none());
    let memfd = memslots.create_guest_memfd(4 * PAGE).unwrap();
    let slot = |page: u64, backing| NewSlot {
        start: GuestAddress(page * PAGE),
        backing,
        flags: SlotFlags::NONE,
    };
    let slots = memslots
        .create_all([
            slot(0, Backing::anonymous(2 * PAGE)).into(),
            slot(2, Backing::memfd(2 * PAGE)).into(),
            slot(4, Backing::anonymous(2 * PAGE)).with_guest_memfd(&memfd, PAGE),
        ])
        .unwrap();
    for slot in slots {
        slot.keep();
    }
    let snapshot = memslots.snapshot();
    let bytes = [PATTERN; 6 * PAGE as usize];
    snapshot.write_slice(&bytes, GuestAddress(0)).unwrap();
    for region in snapshot.regions() {
        region.bitmap_ref().reset();
    }
    private(&memfd)
        .write_all_at(&bytes[..4 * PAGE as usize], 0)
        .unwrap();
    drop(snapshot);
    Machine { memslots, memfd }
}

/// The fake's guest_memfds are memfds.
fn private(memfd: &GuestMemfd) -> File {
    memfd.as_fd().try_clone_to_owned().unwrap().into()
}

/// Whether a page is as it was, all of it; if not, it is zeros.
fn is_full(page: &[u8]) -> bool {
    assert!(page.iter().all(|byte| *byte == page[0]), "half a page");
    assert!([0, PATTERN].contains(&page[0]));
    page[0] != 0
}

impl Machine {
    /// Of the guest's pages, which are full and which are noted as written; of the guest_memfd's, which are full.
    fn state(&self) -> ([bool; 6], [bool; 6], [bool; 4]) {
        let snapshot = self.memslots.snapshot();
        let mut page = [0; PAGE as usize];
        let full = std::array::from_fn(|index| {
            let at = GuestAddress(index as u64 * PAGE);
            snapshot.read_slice(&mut page, at).unwrap();
            is_full(&page)
        });
        let dirty = std::array::from_fn(|index| {
            let at = GuestAddress(index as u64 * PAGE);
            let region = snapshot.find(at).unwrap();
            let offset = at.0 - region.extent().start().0;
            region.bitmap_ref().dirty_at(offset as usize)
        });
        let in_memfd = std::array::from_fn(|index| {
            let at = index as u64 * PAGE;
            private(&self.memfd).read_exact_at(&mut page, at).unwrap();
            is_full(&page)
        });
        (full, dirty, in_memfd)
    }

    fn spy(&self, concerns: Range<u64>, refuse: Option<(usize, Errno)>) -> Spy {
        Spy {
            invalidations: self.memslots.snapshot().invalidations().clone(),
            refuse,
            calls: Cell::new(0),
            told: RefCell::default(),
            concerns: Gfn(concerns.start)..Gfn(concerns.end),
        }
    }
}

fn pages(range: Range<u64>) -> Range<GuestAddress> {
    GuestAddress(range.start * PAGE)..GuestAddress(range.end * PAGE)
}

#[test]
fn readers_are_told_until_the_last_page_is_gone() {
    let machine = machine();
    let spy = machine.spy(1..6, None);
    let done = machine
        .memslots
        .ram()
        .punch_by(&spy, &[pages(5..6), pages(1..4)]);
    assert_eq!(done, Ok(4 * PAGE));
    // The third slot's two, then the first's and the second's.
    assert_eq!(spy.told.into_inner(), [true; 4]);
    let all = spy.invalidations;
    assert!(!all.retry_any(all.sequence()), "it is over");
}

#[test]
fn private_memory_is_given_back_with_the_shared_that_it_lies_beside() {
    let machine = machine();
    assert_eq!(
        machine.memslots.ram().punch(&[pages(5..6), pages(1..2)]),
        Ok(2 * PAGE)
    );
    let punched = [false, true, false, false, false, true];
    // Page 5 is the slot's second, and the slot begins at the file's second.
    let expected = (
        punched.map(|punched| !punched),
        punched,
        [true, true, false, true],
    );
    assert_eq!(machine.state(), expected);
}

#[test]
fn each_call_that_is_refused_leaves_what_it_was_for_and_says_what_was_done_before() {
    /// The calls of a punch of everything: call, slot, and what was given back before.
    const CALLS: [(&str, u32, u64); 4] = [
        (ADVISE, 0, 0),
        (PUNCH, 1, 2 * PAGE),
        (ADVISE, 2, 4 * PAGE),
        (PUNCH_PRIVATE, 2, 4 * PAGE),
    ];
    for errno in [
        libc::EINVAL,
        libc::ENOMEM,
        libc::EPERM,
        libc::EOPNOTSUPP,
        libc::ENOSPC,
        libc::EINTR,
    ]
    .map(Errno)
    {
        for (number, (call, slot, done)) in CALLS.into_iter().enumerate() {
            let machine = machine();
            let before = machine.state();
            assert_eq!(before, ([true; 6], [false; 6], [true; 4]));
            let spy = machine.spy(0..6, Some((number, errno)));
            let error = PunchError::Host {
                call,
                slot: SlotId(slot),
                start: u64::from(slot) * 2 * PAGE,
                size: 2 * PAGE,
                done,
                source: errno,
            };
            let refused = machine.memslots.ram().punch_by(&spy, &[pages(0..6)]);
            assert_eq!(refused, Err(error));
            assert_eq!(spy.calls.get(), number + 1, "nothing is asked after it");
            // The slots before it are punched, and of the third, when its guest_memfd is refused, the user mapping.
            let punched = std::array::from_fn(|page| page < 2 * number);
            let expected = (punched.map(|punched| !punched), punched, [true; 4]);
            assert_eq!(machine.state(), expected, "{call}: {errno:?}");
            let all = &spy.invalidations;
            assert!(!all.retry_any(all.sequence()), "it is over");
            // Asked again, it is done.
            let again = machine.memslots.ram().punch(&[pages(0..6)]);
            assert_eq!(again, Ok(6 * PAGE));
            let punched = machine.state();
            assert_eq!(punched, ([false; 6], [true; 6], [true, false, false, true]));
        }
    }
}
