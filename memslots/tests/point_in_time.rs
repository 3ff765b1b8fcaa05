// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of one moment on the real kernel: whoever writes behind it, a thread or a system call, to a page that was there
//! or to one that was not.

#![cfg(feature = "uffd")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/pool.rs"]
mod pool;

use memslots::fake::FakeHost;
use memslots::uffd::point_in_time::PointInTimeError;
use memslots::uffd::{OpenError, PointInTime};
use memslots::{
    Backing, HugePageSize, HugePages, HugePool, MapError, Mapping, Memslots, NewSlot,
    PrivateRanges, PunchError, SlotFlags,
};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;

fn mappings() -> Vec<Arc<Mapping>> {
    let size = PAGES * PAGE;
    let backings = [
        Backing::anonymous(size).huge_pages(HugePages::Never),
        Backing::anonymous(size).huge_pages(HugePages::Advise),
        Backing::memfd(size),
    ];
    let mapped = backings.iter().map(|backing| {
        let mapping = Mapping::new(backing, GuestAddress(0)).unwrap();
        Arc::new(mapping)
    });
    mapped.collect()
}

fn begin(mappings: &[Arc<Mapping>], room: u64) -> Option<PointInTime> {
    match PointInTime::begin(mappings.iter().cloned(), room) {
        Err(PointInTimeError::Open(error @ OpenError::Denied { .. })) => {
            eprintln!("NOT TRIED: {error}");
            None
        }
        begun => Some(begun.unwrap()),
    }
}

fn word(mapping: &Mapping, page: u64) -> &AtomicU64 {
    let at = mapping.host().0 + (page * PAGE) as usize;
    // SAFETY: a word of a mapping that lives as long as what is returned, and is accessed by atomic accesses.
    unsafe { &*(at as *const AtomicU64) }
}

/// Writes to pages, every second of which was there, until it is stopped: each page's word grows.
fn scribble(mapping: &Mapping, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for page in 0..PAGES {
            word(mapping, page).fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[test]
fn threads_that_write_all_the_time_do_not_change_what_is_read() {
    let mappings = mappings();
    // Room for few copies: writers wait for the reader.
    let Some(kept) = begin(&mappings, 16 * PAGE) else {
        return;
    };
    for mapping in &mappings {
        (0..PAGES)
            .step_by(2)
            .for_each(|page| word(mapping, page).store(7, Ordering::Relaxed));
    }
    for round in 0..2 {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let threads: Vec<_> = mappings
                .iter()
                .map(|mapping| scope.spawn(|| scribble(mapping, &stop)))
                .collect();
            for area in 0..mappings.len() {
                kept.lay(area, 0..PAGES * PAGE).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            threads
                .into_iter()
                .for_each(|thread| thread.join().unwrap());
        });
        if round == 0 {
            // Laid twice is laid.
            continue;
        }
        let values = |mapping: &Arc<Mapping>| {
            let word = |page| word(mapping, page).load(Ordering::Relaxed);
            (0..PAGES).map(word).collect::<Vec<_>>()
        };
        let moment: Vec<_> = mappings.iter().map(values).collect();
        kept.freeze(&[]).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for mapping in &mappings {
                scope.spawn(|| scribble(mapping, &stop));
            }
            while kept.copied() == 0 {
                std::thread::yield_now();
            }
            let mut bytes = vec![0; (64 * PAGE) as usize];
            for (area, moment) in moment.iter().enumerate() {
                for start in (0..PAGES).step_by(64) {
                    kept.read(area, start * PAGE, &mut bytes).unwrap();
                    for (page, bytes) in (start..).zip(bytes.chunks(PAGE as usize)) {
                        let value = u64::from_le_bytes(*bytes.first_chunk().unwrap());
                        assert_eq!(value, moment[page as usize], "page {page} of {area}");
                    }
                    kept.done(area, start * PAGE..(start + 64) * PAGE).unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn a_system_call_that_writes_waits_as_a_thread_does() {
    let mappings = mappings();
    let Some(kept) = begin(&mappings, 1 << 20) else {
        return;
    };
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0xab; 2 * PAGE as usize]).unwrap();
    let read = |mapping: &Mapping, file: &File, page: u64| {
        let at = mapping.host().0 + (page * PAGE) as usize;
        // SAFETY: two pages of a mapping that lives through the call.
        let got = unsafe { libc::pread(file.as_raw_fd(), at as *mut _, 2 * PAGE as usize, 0) };
        assert_eq!(got, 2 * PAGE as isize);
    };
    for (area, mapping) in mappings.iter().enumerate() {
        word(mapping, 4).store(5, Ordering::Relaxed);
        // Page 5 is not there; and what is not laid is kept as well.
        kept.lay(area, 0..5 * PAGE).unwrap();
    }
    let wanted: Vec<_> = (0..mappings.len())
        .map(|area| (area, 0..8 * PAGE))
        .collect();
    assert_eq!(kept.freeze(&wanted).unwrap().pages, 3 * wanted.len() as u64);
    for (area, mapping) in mappings.iter().enumerate() {
        read(mapping, &file, 4);
        assert_eq!(word(mapping, 5).load(Ordering::Relaxed) as u8, 0xab);
        let mut bytes = vec![0xee; 2 * PAGE as usize];
        kept.read(area, 4 * PAGE, &mut bytes).unwrap();
        let was = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        assert_eq!(was, 5);
        assert!(bytes[8..].iter().all(|byte| *byte == 0));
        let twice = kept.read(area, 4 * PAGE, &mut bytes).unwrap_err();
        assert!(matches!(twice, PointInTimeError::NotKept { .. }), "{twice}");
    }
    assert_eq!(kept.copied(), 2 * mappings.len() as u64);
    drop(kept);
    // Nothing waits any more, and memory may be registered again.
    for mapping in &mappings {
        (0..PAGES).for_each(|page| word(mapping, page).store(1, Ordering::Relaxed));
    }
    drop(begin(&mappings, 0).unwrap());
}

#[test]
fn pages_are_not_given_back_while_they_are_kept() {
    let memslots = Memslots::<()>::with_policy(FakeHost::new(8), PrivateRanges::none());
    let slot = |page: u64, backing| NewSlot {
        start: GuestAddress(page * PAGE),
        backing,
        flags: SlotFlags::NONE,
    };
    let whole = Arc::new(Mapping::new(&Backing::anonymous(8 * PAGE), GuestAddress(0)).unwrap());
    let _slots = memslots
        .create_all([
            slot(0, Backing::anonymous(8 * PAGE)),
            slot(8, Backing::memfd(8 * PAGE)),
            slot(16, Backing::part(&whole, 4 * PAGE, 4 * PAGE)),
        ])
        .unwrap();
    let ram = memslots.ram();
    let snapshot = memslots.snapshot();
    let own = snapshot
        .regions()
        .map(|region| Arc::clone(region.mapping()));
    // Of the third slot's memory the whole, of which it is a part.
    let mappings: Vec<_> = own.take(2).chain([whole]).collect();
    let (starts, pages) = ([0, 8, 16], [3, 3, 7]);
    for (mapping, page) in mappings.iter().zip(pages) {
        word(mapping, page).store(7, Ordering::Relaxed);
    }
    for (number, start) in starts.into_iter().enumerate() {
        let other = starts[(number + 1) % 3];
        let Some(kept) = begin(&mappings[number..=number], 1 << 20) else {
            return;
        };
        let page = pages[number];
        kept.lay(0, page * PAGE..(page + 1) * PAGE).unwrap();
        let given = |page: u64| GuestAddress(page * PAGE)..GuestAddress((page + 1) * PAGE);
        // All of a request is refused with a part of it.
        let refused = ram.punch(&[given(other), given(start + 3)]).unwrap_err();
        let address = (start + 3) * PAGE;
        assert!(
            matches!(refused, PunchError::Kept { address: at, .. } if at == address),
            "{refused}"
        );
        kept.freeze(&[]).unwrap();
        ram.punch(&[given(start + 3)]).unwrap_err();
        let mut bytes = vec![0; PAGE as usize];
        kept.read(0, page * PAGE, &mut bytes).unwrap();
        assert_eq!(bytes[0], 7);
        // What nobody keeps is given back.
        assert_eq!(ram.punch(&[given(other)]), Ok(PAGE));
        drop(kept);
        assert_eq!(ram.punch(&[given(start + 3)]), Ok(PAGE));
        assert_eq!(word(&mappings[number], page).load(Ordering::Relaxed), 0);
    }
}

#[test]
fn memory_whose_pages_are_merged_is_not_kept() {
    let map = |backing: &Backing| Mapping::new(backing, GuestAddress(0)).map(Arc::new);
    let plain = map(&Backing::anonymous(PAGES * PAGE)).unwrap();
    match map(&Backing::anonymous(PAGES * PAGE).mergeable()) {
        // A kernel without KSM.
        Err(error @ MapError::Call { .. }) => return eprintln!("NOT TRIED: {error}"),
        merged => {
            let mappings = [plain.clone(), merged.unwrap()];
            match PointInTime::begin(mappings, 0) {
                Err(PointInTimeError::Open(error @ OpenError::Denied { .. })) => {
                    return eprintln!("NOT TRIED: {error}");
                }
                refused => {
                    let refused = refused.unwrap_err();
                    let mergeable = matches!(refused, PointInTimeError::Mergeable { area: 1 });
                    assert!(mergeable, "{refused}");
                }
            }
        }
    }
    // A part is of the whole, and the whole of its parts.
    let part = Backing::part(&plain, 0, PAGE).mergeable();
    let kept = begin(std::slice::from_ref(&plain), 0).unwrap();
    assert_eq!(map(&part).err(), Some(MapError::MergeableKept));
    drop(kept);
    map(&part).unwrap();
    let refused = PointInTime::begin([plain], 0).unwrap_err();
    let mergeable = matches!(refused, PointInTimeError::Mergeable { area: 0 });
    assert!(mergeable, "{refused}");
}

#[test]
fn large_pages_are_copied_whole_and_read_in_parts() {
    let (large, page) = (HugePageSize::MIB_2.bytes(), HugePageSize::MIB_2);
    let _pool = pool::Overcommit::raise(2);
    if HugePool::of_host(page).is_none_or(|pool| pool.available() < 2) {
        return eprintln!("NOT TRIED: this host has no pool of 2 MiB pages, and lends none");
    }
    for backing in [
        Backing::hugetlb(2 * large, page),
        Backing::hugetlb_memfd(2 * large, page),
    ] {
        let mapping = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
        let Some(kept) = begin(std::slice::from_ref(&mapping), 2 * large) else {
            return;
        };
        let pages = 2 * large / PAGE;
        let fill = |add: u64| {
            (0..pages).for_each(|page| word(&mapping, page).store(page + add, Ordering::Relaxed));
        };
        fill(1);
        kept.lay(0, 0..2 * large).unwrap();
        kept.freeze(&[]).unwrap();
        let mut bytes = vec![0; PAGE as usize];
        let mut read = |page: u64| {
            kept.read(0, page * PAGE, &mut bytes).unwrap();
            u64::from_le_bytes(*bytes.first_chunk().unwrap())
        };
        // The first part from memory, the rest of the page from its copy; of the other all from its copy.
        assert_eq!(read(0), 1);
        fill(0x1000);
        assert_eq!(kept.copied(), 2);
        (0..pages).for_each(|page| assert_eq!(read(page), page + 1));
        // Of a part of one nothing is free: it is read again.
        assert_eq!(read(pages - 1), pages);
        kept.done(0, 0..2 * large).unwrap();
        let over = kept.read(0, 0, &mut bytes).unwrap_err();
        assert!(matches!(over, PointInTimeError::NotKept { .. }), "{over}");
    }
}
