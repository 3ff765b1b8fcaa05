// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One pager for several slots, of memory of every kind and page size: each page is that of its own slot's source.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../memslots/tests/common/pool.rs"]
mod pool;

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use async_pf::pager::{GiveUp, Lost, PagedSlot, Pager, PagerConfig, PagerEvents};
use async_pf::{Fetched, PageSource, SourceError};
use memslots::uffd::{Features, Modes, Registration, Uffd};
use memslots::{Backing, Gfn, HugePageSize, HugePool, Hva, Mapping, PAGE_SIZE};
use vm_memory::GuestAddress;

const P: u64 = PAGE_SIZE;
const HUGE: u64 = HugePageSize::MIB_2.bytes();
const LONG: Duration = Duration::from_secs(60);

/// The word that begins guest page `gfn` of this slot.
fn word(slot: u64, gfn: u64) -> u64 {
    slot << 56 | gfn << 8 | 1
}

/// Each page begins with its slot and number; `broken` is one that fails for good.
struct Slot {
    number: u64,
    broken: Option<u64>,
}

impl PageSource for Slot {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        for (gfn, page) in (first.0..).zip(into.chunks_mut(P as usize)) {
            if self.broken == Some(gfn) {
                return Err(SourceError::NoSuchPage { gfn: Gfn(gfn) });
            }
            page.fill(0);
            page[..8].copy_from_slice(&word(self.number, gfn).to_ne_bytes());
        }
        Ok(Fetched::Bytes)
    }
}

#[derive(Default)]
struct Losses(Mutex<Vec<(usize, u64)>>);

impl PagerEvents for Losses {
    fn lost(&self, lost: &Lost<'_>) {
        self.0.lock().unwrap().push((lost.slot, lost.gfn.0));
    }
}

struct Area {
    memory: Arc<Mapping>,
    _registration: Registration,
    first: u64,
    pages: u64,
}

impl Area {
    fn read(&self, page: u64) -> u64 {
        read(self.memory.host(), page)
    }

    fn give_back(&self, from: u64, size: u64) {
        let at = (self.memory.host().0 + from as usize) as *mut libc::c_void;
        // SAFETY: whole pages of the mapping, which nobody has a reference to.
        let given = unsafe { libc::madvise(at, size as usize, libc::MADV_DONTNEED) };
        assert_eq!(given, 0, "{}", std::io::Error::last_os_error());
    }
}

fn read(start: Hva, page: u64) -> u64 {
    let at = start.0 + (page * P) as usize;
    // SAFETY: within a mapping that lives as long as the test; read volatile, as it may change.
    unsafe { (at as *const u64).read_volatile() }
}

/// A pager of these memories, which begin at guest pages 0x1_0000 apart, the last first.
fn start(
    backings: Vec<Backing>,
    broken: Option<u64>,
    workers: usize,
) -> (Pager, Vec<Area>, Arc<Losses>) {
    let uffd = Uffd::open(Features::EVENT_REMOVE, Features::POISON)
        .expect("this test needs a userfaultfd: run it as root, or as the error says");
    let count = backings.len() as u64;
    let (mut areas, mut slots) = (Vec::new(), Vec::new());
    for (number, backing) in (0..).zip(backings) {
        let first = (count - number) << 16;
        let memory = Arc::new(Mapping::new(&backing, GuestAddress(first * P)).unwrap());
        let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
        let broken = broken.filter(|_| number == 0).map(|page| first + page);
        let source = Arc::new(Slot { number, broken });
        slots.push(PagedSlot::new(&registration, Gfn(first), source).unwrap());
        areas.push(Area {
            pages: memory.size() / P,
            memory,
            _registration: registration,
            first,
        });
    }
    let losses = Arc::new(Losses::default());
    let config = PagerConfig {
        workers,
        deadline: LONG,
        events: losses.clone(),
        give_up: match uffd.available().contains(Features::POISON) {
            true => GiveUp::Poison,
            false => GiveUp::Tell,
        },
        ..PagerConfig::default()
    };
    (Pager::start(&uffd, slots, config).unwrap(), areas, losses)
}

/// Four threads touch all of all areas, each from another place on.
fn touch_all(areas: &[Area], given_back: impl Fn(u64, u64) -> bool + Copy + Send) {
    thread::scope(|scope| {
        for vcpu in 0..4 {
            scope.spawn(move || {
                for step in 0.. {
                    let mut any = false;
                    for (slot, area) in (0..).zip(areas) {
                        if step >= area.pages {
                            continue;
                        }
                        any = true;
                        // Backwards in one of two, so that no window serves all.
                        let page = (step * 37 + vcpu * area.pages / 4) % area.pages;
                        if !given_back(slot, page) {
                            let wanted = word(slot, area.first + page);
                            assert_eq!(area.read(page), wanted, "slot {slot}, page {page}");
                        }
                    }
                    if !any {
                        break;
                    }
                }
            });
        }
    });
}

#[test]
fn each_slots_pages_come_from_its_own_source() {
    for workers in [1, 2] {
        let backings = vec![
            Backing::anonymous(500 * P),
            Backing::memfd(300 * P),
            Backing::anonymous(P),
        ];
        let (pager, areas, losses) = start(backings, None, workers);
        areas[0].give_back(100 * P, 20 * P);
        let given_back = |slot, page| slot == 0 && (100..120).contains(&page);
        // Guesses about one slot are not about another.
        pager
            .prefetch(1, Gfn(areas[1].first + 10)..Gfn(areas[1].first + 50))
            .unwrap();
        touch_all(&areas, given_back);
        pager.prefetch_rest();
        assert!(pager.wait(LONG));
        assert!((100..120).all(|page| areas[0].read(page) == 0));
        let stats = pager.stats();
        assert_eq!((stats.lost, stats.removed, stats.unanswered), (0, 20, 0));
        assert_eq!(pager.progress().total, 801);
        assert!(losses.0.lock().unwrap().is_empty());
        // What was given back and touched is noted a moment after it was read.
        assert!(pager.wait(LONG));
        assert_eq!(pager.finish().unwrap().len(), 3);
    }
}

#[test]
fn the_rest_of_every_slot_comes_though_nobody_touches_any() {
    let backings = vec![Backing::memfd(40 * P), Backing::anonymous(500 * P)];
    let (pager, areas, _) = start(backings, None, 2);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(pager.stats().faults, 0);
    pager.finish().unwrap();
    for (slot, area) in (0..).zip(&areas) {
        for page in 0..area.pages {
            assert_eq!(area.read(page), word(slot, area.first + page));
        }
    }
}

#[test]
fn a_page_that_fails_in_one_slot_is_lost_there_alone() {
    let backings = vec![Backing::anonymous(64 * P), Backing::anonymous(64 * P)];
    let (pager, areas, losses) = start(backings, Some(7), 1);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(*losses.0.lock().unwrap(), [(0, areas[0].first + 7)]);
    assert_eq!(pager.progress().lost, 1);
    assert_eq!(areas[0].read(6), word(0, areas[0].first + 6));
    assert_eq!(areas[1].read(7), word(1, areas[1].first + 7));
}

/// Whether there are huge pages for the test; says so if not.
fn has_huge(pages: u64) -> bool {
    let has = HugePool::of_host(HugePageSize::MIB_2).is_some_and(|pool| pool.available() >= pages);
    if !has {
        eprintln!("NOT TRIED: this host has no pool of 2 MiB pages, and lends none");
    }
    has
}

#[test]
fn huge_pages_come_whole_beside_small_ones_and_are_zeros_where_they_were_given_back() {
    let _pool = pool::Overcommit::raise(6);
    if !has_huge(6) {
        return;
    }
    for workers in [1, 2] {
        let backings = vec![
            Backing::hugetlb(3 * HUGE, HugePageSize::MIB_2),
            Backing::hugetlb_memfd(3 * HUGE, HugePageSize::MIB_2),
            Backing::anonymous(100 * P),
        ];
        let (pager, areas, _) = start(backings, None, workers);
        areas[0].give_back(HUGE, HUGE);
        let each = HUGE / P;
        let given_back = move |slot, page| slot == 0 && page / each == 1;
        touch_all(&areas, given_back);
        pager.prefetch_rest();
        assert!(pager.wait(LONG));
        assert!((each..2 * each).all(|page| areas[0].read(page) == 0));
        let stats = pager.stats();
        // Pages are of their registration's size.
        assert_eq!(pager.progress().total, 3 + 3 + 100);
        assert_eq!((stats.lost, stats.removed, stats.unanswered), (0, 1, 0));
        // What was given back and touched is noted a moment after it was read.
        assert!(pager.wait(LONG));
        assert_eq!(pager.finish().unwrap().len(), 3);
    }
}

#[test]
fn a_huge_page_of_which_a_part_fails_is_lost_whole_and_no_other() {
    let _pool = pool::Overcommit::raise(2);
    if !has_huge(2) {
        return;
    }
    let backings = vec![Backing::hugetlb(2 * HUGE, HugePageSize::MIB_2)];
    let (pager, areas, losses) = start(backings, Some(HUGE / P + 9), 1);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    // It is named by its first guest page.
    assert_eq!(*losses.0.lock().unwrap(), [(0, areas[0].first + HUGE / P)]);
    assert_eq!(areas[0].read(511), word(0, areas[0].first + 511));
}
