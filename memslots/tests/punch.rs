// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory given back under slots that stay: what is punched reads as zeros and is really gone, what is refused changes
//! nothing, and whoever holds something derived from it is told or waited for.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Backing, Errno, Gfn, HvaCache, Memslots, NewSlot, PAGE_SIZE, PrivateRanges, PunchError, Slot,
    SlotFlags, SlotId,
};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

const PATTERN: u64 = 0x1122_3344_5566_7788;

fn pages(range: Range<u64>) -> Range<GuestAddress> {
    GuestAddress(range.start * PAGE_SIZE)..GuestAddress(range.end * PAGE_SIZE)
}

/// Anonymous memory in pages 0..4, a memfd in 4..8, a ROM in 8..10; all of it the pattern.
fn machine() -> (Memslots, Vec<Slot>) {
    let memslots = Memslots::<()>::with_policy(FakeHost::new(8), PrivateRanges::none());
    let slot = |page: u64, backing, flags| NewSlot {
        start: GuestAddress(page * PAGE_SIZE),
        backing,
        flags,
    };
    let slots = memslots
        .create_all([
            slot(0, Backing::anonymous(4 * PAGE_SIZE), SlotFlags::NONE),
            slot(4, Backing::memfd(4 * PAGE_SIZE), SlotFlags::NONE),
            slot(8, Backing::anonymous(2 * PAGE_SIZE), SlotFlags::READ_ONLY),
        ])
        .unwrap();
    let snapshot = memslots.snapshot();
    for word in 0..10 * PAGE_SIZE / 8 {
        snapshot.write_obj(PATTERN, GuestAddress(word * 8)).unwrap();
    }
    (memslots, slots)
}

/// What each page holds: the pattern or zeros, all over.
fn contents(memslots: &Memslots) -> [bool; 10] {
    std::array::from_fn(|page| {
        let mut bytes = vec![0u8; PAGE_SIZE as usize];
        let at = GuestAddress(page as u64 * PAGE_SIZE);
        memslots.snapshot().read_slice(&mut bytes, at).unwrap();
        let words = bytes
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
        let first = u64::from_ne_bytes(bytes[..8].try_into().unwrap());
        assert!(words.into_iter().all(|word| word == first));
        assert!(first == PATTERN || first == 0);
        first == PATTERN
    })
}

/// Whether the host has a page in memory for the first byte of the range.
fn is_resident(memslots: &Memslots, page: u64) -> bool {
    let address = GuestAddress(page * PAGE_SIZE);
    let host = memslots.snapshot().translate(address).unwrap().host;
    let mut there = 0u8;
    // SAFETY: one page, of a mapping that exists, and one byte for the answer.
    let result = unsafe { libc::mincore(host.0 as *mut _, PAGE_SIZE as usize, &mut there) };
    assert_eq!(result, 0);
    there & 1 != 0
}

#[test]
fn what_is_punched_is_given_back_and_reads_as_zeros_and_nothing_else_changes() {
    let (memslots, _slots) = machine();
    let ram = memslots.ram();
    let snapshot = memslots.snapshot();
    let file = snapshot
        .find(GuestAddress(4 * PAGE_SIZE))
        .unwrap()
        .file_offset()
        .unwrap();
    let blocks = || file.file().metadata().unwrap().blocks() * 512;
    assert_eq!(blocks(), 4 * PAGE_SIZE);
    // One page of anonymous memory, and a range across both kinds.
    let done = ram.punch(&[pages(1..2), pages(3..6)]).unwrap();
    assert_eq!(done, 4 * PAGE_SIZE);
    assert!(!is_resident(&memslots, 1) && !is_resident(&memslots, 3));
    assert!(is_resident(&memslots, 0));
    assert_eq!(blocks(), 2 * PAGE_SIZE);
    let punched = [1, 3, 4, 5];
    let expected = std::array::from_fn(|page| !punched.contains(&page));
    assert_eq!(contents(&memslots), expected);
    // It comes back when it is written.
    snapshot
        .write_slice(&PATTERN.to_ne_bytes().repeat(512), GuestAddress(PAGE_SIZE))
        .unwrap();
    assert!(contents(&memslots)[1]);
    assert_eq!(ram.punch(&[]), Ok(0));
}

#[test]
fn of_a_file_that_the_slot_has_a_part_of_the_rest_stays() {
    use std::os::unix::fs::FileExt;

    // A slot of three pages from the file's third on; another from its seventh.
    let file = tempfile::tempfile().unwrap();
    let pattern = PATTERN.to_ne_bytes().repeat(512);
    for page in 0..8 {
        file.write_all_at(&pattern, page * PAGE_SIZE).unwrap();
    }
    let file = std::sync::Arc::new(file);
    let memslots = Memslots::<()>::with_policy(FakeHost::new(8), PrivateRanges::none());
    let part = |page: u64, pages: u64| {
        Backing::file_shared(file.clone(), page * PAGE_SIZE, pages * PAGE_SIZE)
    };
    let create = |page: u64, backing| {
        let start = GuestAddress(page * PAGE_SIZE);
        memslots.create(start, backing, SlotFlags::NONE).unwrap()
    };
    let _slots = [create(10, part(2, 3)), create(20, part(6, 2))];
    let done = memslots.ram().punch(&[pages(11..13), pages(20..21)]);
    assert_eq!(done, Ok(3 * PAGE_SIZE));
    let mut bytes = pattern.clone();
    for page in 0..8 {
        file.read_exact_at(&mut bytes, page * PAGE_SIZE).unwrap();
        let punched = [3, 4, 6].contains(&page);
        assert_eq!(bytes == pattern, !punched, "page {page} of the file");
        assert_eq!(bytes.iter().all(|byte| *byte == 0), punched);
    }
    let snapshot = memslots.snapshot();
    let word = |page: u64| snapshot.read_obj::<u64>(GuestAddress(page * PAGE_SIZE));
    let found = [10, 11, 12, 20, 21].map(|page| word(page).unwrap());
    assert_eq!(found, [PATTERN, 0, 0, 0, PATTERN]);
}

#[test]
fn what_is_refused_changes_nothing_and_says_why_with_values() {
    let (memslots, slots) = machine();
    let ram = memslots.ram();
    let seq = memslots.snapshot().invalidations().sequence();
    let [anonymous, _, rom] = [0, 1, 2].map(|index: usize| slots[index].extent().id());
    let page_size = PAGE_SIZE;
    let bytes = |range: Range<u64>| GuestAddress(range.start)..GuestAddress(range.end);
    let unaligned = |address| PunchError::Unaligned {
        slot: anonymous,
        address,
        page_size,
    };
    let refused = [
        (
            pages(2..2),
            PunchError::Empty {
                start: 2 * PAGE_SIZE,
                end: 2 * PAGE_SIZE,
            },
        ),
        (bytes(8..16), unaligned(8)),
        (bytes(0..PAGE_SIZE + 8), unaligned(PAGE_SIZE + 8)),
        (
            pages(7..9),
            PunchError::ReadOnly {
                slot: rom,
                address: 8 * PAGE_SIZE,
            },
        ),
        (
            pages(20..21),
            PunchError::NoSlot {
                address: 20 * PAGE_SIZE,
            },
        ),
        (
            bytes(0..u64::MAX),
            PunchError::ReadOnly {
                slot: rom,
                address: 8 * PAGE_SIZE,
            },
        ),
    ];
    for (range, error) in refused {
        // After a range that would do.
        assert_eq!(ram.punch(&[pages(0..1), range]), Err(error));
    }
    assert_eq!(contents(&memslots), [true; 10]);
    assert!(!memslots.snapshot().invalidations().retry_any(seq));
}

#[test]
fn memory_that_would_not_read_as_zeros_is_not_given_back() {
    use memslots::MemoryKind;
    use std::io::Write;

    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0xa5; PAGE_SIZE as usize]).unwrap();
    let bytes = file.metadata().unwrap().blocks();
    let held = std::sync::Arc::new(file);
    let foreign = std::sync::Arc::new([0_u8; 3 * PAGE_SIZE as usize]);
    let start = (foreign.as_ptr() as usize).next_multiple_of(PAGE_SIZE as usize);
    let backings = [
        Backing::file_private(held.clone(), 0, PAGE_SIZE),
        // SAFETY: a page of an array that its owner, given along, keeps where it is, and that nobody looks at.
        unsafe { Backing::external(memslots::Hva(start), PAGE_SIZE, foreign) },
    ];
    let memslots = Memslots::new(FakeHost::new(8));
    let slots = memslots
        .create_all(
            backings
                .into_iter()
                .zip([0, 1])
                .map(|(backing, page)| NewSlot {
                    start: GuestAddress(page * PAGE_SIZE),
                    backing,
                    flags: SlotFlags::NONE,
                }),
        )
        .unwrap();
    for (slot, page) in slots.iter().zip(0..) {
        let Err(PunchError::Unsupported {
            slot: id,
            address,
            source,
        }) = memslots.ram().punch(&[pages(page..page + 1)])
        else {
            panic!("page {page} was given back")
        };
        assert_eq!((id, address), (slot.extent().id(), page * PAGE_SIZE));
        let external = source.kind == MemoryKind::External;
        assert_eq!(external, page == 1, "{source}");
    }
    let mut byte = [0];
    memslots
        .snapshot()
        .read_slice(&mut byte, GuestAddress(0))
        .unwrap();
    assert_eq!(byte, [0xa5]);
    assert_eq!(held.metadata().unwrap().blocks(), bytes);
}

#[test]
fn a_host_that_refuses_ends_the_invalidation_and_says_how_far_it_came() {
    let (memslots, _slots) = machine();
    let invalidations = memslots.snapshot().invalidations().clone();
    let seq = invalidations.sequence();
    let locked = GuestAddress(2 * PAGE_SIZE);
    let host = memslots.snapshot().translate(locked).unwrap().host;
    // SAFETY: a page of a mapping that exists. Locked memory is not given back: EINVAL.
    let result = unsafe { libc::mlock(host.0 as *const _, PAGE_SIZE as usize) };
    assert_eq!(result, 0);
    let refused = memslots
        .ram()
        .punch(&[pages(0..1), pages(2..3), pages(3..4)]);
    let error = PunchError::Host {
        call: "madvise(MADV_DONTNEED)",
        slot: SlotId(0),
        start: 2 * PAGE_SIZE,
        size: PAGE_SIZE,
        done: PAGE_SIZE,
        source: Errno(libc::EINVAL),
    };
    assert_eq!(refused, Err(error));
    let mut expected = [true; 10];
    expected[0] = false;
    assert_eq!(contents(&memslots), expected);
    assert!(invalidations.retry_any(seq), "something was given back");
    assert!(
        !invalidations.retry_any(invalidations.sequence()),
        "and it is over"
    );
}

#[test]
fn bitmaps_are_told_since_the_contents_change() {
    let memslots = Memslots::<AtomicBitmap>::with_policy(FakeHost::new(8), PrivateRanges::none());
    let backing = Backing::anonymous(4 * PAGE_SIZE);
    let _slot = memslots
        .create(GuestAddress(0), backing, SlotFlags::NONE)
        .unwrap();
    memslots.ram().punch(&[pages(1..3)]).unwrap();
    let snapshot = memslots.snapshot();
    let region = snapshot.find(GuestAddress(0)).unwrap();
    let dirty = |page: u64| region.bitmap().dirty_at((page * PAGE_SIZE) as usize);
    assert_eq!([0, 1, 2, 3].map(dirty), [false, true, true, false]);
}

#[test]
fn a_punch_waits_for_the_reader_that_was_told_that_all_is_well() {
    let (memslots, _slots) = machine();
    let invalidations = memslots.snapshot().invalidations().clone();
    let mut reader = memslots.reader();
    let seq = invalidations.sequence();
    let page = Gfn(1)..Gfn(2);
    thread::scope(|scope| {
        let table = reader.enter();
        assert!(!invalidations.retry(seq, page.clone()));
        let punching = scope.spawn(|| memslots.ram().punch(&[pages(1..2)]));
        while !invalidations.retry(seq, page.clone()) {
            thread::yield_now();
        }
        assert!(!invalidations.retry(seq, Gfn(5)..Gfn(6)), "another page");
        // It has begun, and it waits for us.
        assert!(!punching.is_finished());
        assert_eq!(
            table.read_obj::<u64>(GuestAddress(PAGE_SIZE)).unwrap(),
            PATTERN
        );
        drop(table);
        assert_eq!(punching.join().unwrap(), Ok(PAGE_SIZE));
    });
    assert!(!contents(&memslots)[1]);
}

#[test]
fn two_readers_and_a_writer_that_punches_fills_and_remakes_and_no_wrong_answer() {
    // By rounds, or by the clock where that is asked for.
    let end = std::env::var_os("LONG_TESTS").map(|_| Instant::now() + Duration::from_secs(60));
    let (memslots, mut slots) = machine();
    let (ram, stop) = (memslots.ram(), AtomicBool::new(false));
    thread::scope(|scope| {
        let readers = StopReaders(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                let mut reader = ram.reader();
                let invalidations = memslots.snapshot().invalidations().clone();
                let mut caches: Vec<_> = (0..4)
                    .map(|page| HvaCache::new(GuestAddress(page * PAGE_SIZE), PAGE_SIZE as usize))
                    .collect();
                let mut words = vec![0u8; PAGE_SIZE as usize];
                while !stop.load(Ordering::Relaxed) {
                    for (page, cache) in caches.iter_mut().enumerate() {
                        let table = reader.enter();
                        let of = Gfn(page as u64)..Gfn(page as u64 + 1);
                        let seq = invalidations.sequence();
                        if invalidations.retry(seq, of.clone()) {
                            continue;
                        }
                        // The writer waits for us now, whatever it wants with this page; or it is no slot's.
                        if cache.read_slice(&table, 0, &mut words).is_ok() {
                            assert!(words.chunks(8).all(|word| word == &words[..8]), "torn");
                        }
                        assert!(
                            table
                                .checked()
                                .read_obj::<u64>(GuestAddress(4 * PAGE_SIZE))
                                .is_ok()
                        );
                    }
                }
            });
        }
        let mut round = 0u64;
        while end.map_or(round < 3_000, |end| Instant::now() < end) {
            round += 1;
            let page = round % 4;
            if round.is_multiple_of(3) {
                let (invalidation, grace) = ram.invalidate(Gfn(page)..Gfn(page + 1));
                grace.wait();
                let data = round.to_ne_bytes().repeat(512);
                memslots
                    .snapshot()
                    .write_slice(&data, GuestAddress(page * PAGE_SIZE))
                    .unwrap();
                drop(invalidation);
            } else if round % 16 == 1 {
                // The whole slot, while the readers' caches point into it.
                drop(slots.remove(0));
                let backing = Backing::anonymous(4 * PAGE_SIZE);
                let slot = memslots.create(GuestAddress(0), backing, SlotFlags::NONE);
                slots.insert(0, slot.unwrap());
            } else {
                ram.punch(&[pages(page..page + 1)]).unwrap();
            }
        }
        drop(readers);
    });
}

/// Stops the readers however the writer ends: a panic of the writer fails the test, and does not hang it.
struct StopReaders<'a>(&'a AtomicBool);

impl Drop for StopReaders<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
