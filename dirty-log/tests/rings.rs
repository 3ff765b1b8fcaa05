// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The dirty ring against a fake kernel that refuses any reset with any errno, and that overruns: nothing is
//! lost, and nothing is handed out before its pages are watched again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod slots;

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use dirty_log::{DirtyLog, DirtyRings, Error, ResetRings, RingEntry, SlotKey};
use slots::{ERRNOS, PAGES, extent, extent_of, pages, set};

/// A kernel with dirty rings, as virt/kvm/dirty_ring.c: which pages are watched, and where each ring is.
struct Kernel {
    rings: Vec<Arc<[RingEntry]>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    dirty: Vec<usize>,
    reset: Vec<usize>,
    unwatched: BTreeSet<(u32, u64)>,
    /// The next resets: an errno, or how many entries are reset before it stops for a signal.
    next: Vec<Result<usize, i32>>,
    resets: u32,
    /// Entries that the next reset does not count: they were written over in between.
    uncounted: usize,
}

impl Kernel {
    fn new(vcpus: usize, entries: usize) -> Arc<Self> {
        let ring = |_| (0..entries).map(|_| RingEntry::default()).collect();
        Arc::new(Self {
            rings: (0..vcpus).map(ring).collect(),
            state: Mutex::new(State {
                dirty: vec![0; vcpus],
                reset: vec![0; vcpus],
                ..State::default()
            }),
        })
    }

    fn rings(self: &Arc<Self>) -> DirtyRings<Arc<Self>> {
        let rings = DirtyRings::new(self.clone());
        for (vcpu, ring) in self.rings.iter().enumerate() {
            rings.add_vcpu(vcpu as u32, ring.clone()).unwrap();
        }
        rings
    }

    /// A guest's write; says whether the ring had room, or the page was not watched.
    fn write(&self, vcpu: usize, slot: u32, page: u64) -> bool {
        let mut state = self.state.lock().unwrap();
        if !state.unwatched.insert((slot, page)) {
            return true;
        }
        let at = state.dirty[vcpu] % self.rings[vcpu].len();
        state.dirty[vcpu] += 1;
        self.rings[vcpu][at].push(SlotKey(slot), page)
    }

    fn next(&self, next: impl IntoIterator<Item = Result<usize, i32>>) {
        self.state.lock().unwrap().next = next.into_iter().collect();
    }
}

impl ResetRings for Kernel {
    fn reset_dirty_rings(&self) -> io::Result<u32> {
        let mut state = self.state.lock().unwrap();
        state.resets += 1;
        let next = if state.next.is_empty() {
            Ok(usize::MAX)
        } else {
            state.next.remove(0)
        };
        let most = next.map_err(io::Error::from_raw_os_error)?;
        let mut done = 0;
        for (vcpu, ring) in self.rings.iter().enumerate() {
            while done < most {
                let at = state.reset[vcpu] % ring.len();
                let Some((slot, page)) = ring[at].reset() else {
                    break;
                };
                state.unwatched.remove(&(slot.0, page));
                state.reset[vcpu] += 1;
                done += 1;
            }
        }
        Ok((done - std::mem::take(&mut state.uncounted)) as u32)
    }
}

#[test]
fn what_a_ring_told_is_handed_out_after_its_pages_are_watched_again() {
    let kernel = Kernel::new(2, 64);
    let rings = kernel.rings();
    let mut log = DirtyLog::new(extent(), rings.log(&extent()).unwrap()).unwrap();
    for lap in 0..20 {
        for page in 0..30 {
            assert!(kernel.write(page as usize % 2, 4, lap * 7 + page));
        }
        let harvest = log.harvest().unwrap();
        assert!(kernel.state.lock().unwrap().unwatched.is_empty());
        assert_eq!(pages(harvest.bitmap()), set(lap * 7..lap * 7 + 30));
        harvest.commit();
    }
    let before = kernel.state.lock().unwrap().resets;
    assert!(log.harvest().unwrap().bitmap().is_clean());
    let after = kernel.state.lock().unwrap().resets;
    assert_eq!(before, after, "no call where nothing was taken");
    let mut told = Vec::new();
    rings.told(|vcpu, entries| told.push((vcpu, entries)));
    assert_eq!(told, [(0, 300), (1, 300)]);
}

#[test]
fn a_refused_reset_hands_nothing_out_and_loses_nothing() {
    for errno in ERRNOS.into_iter().filter(|errno| *errno != libc::EINTR) {
        let kernel = Kernel::new(1, 64);
        let rings = kernel.rings();
        let other = extent_of(9, 0, 64);
        let mut log = DirtyLog::new(extent(), rings.log(&extent()).unwrap()).unwrap();
        let mut others = DirtyLog::new(other.clone(), rings.log(&other).unwrap()).unwrap();
        kernel.write(0, 4, 5);
        kernel.write(0, 9, 6);
        kernel.next([Err(errno), Err(errno), Err(errno)]);
        match log.harvest() {
            Err(Error::ResetRings { source }) => assert_eq!(source.raw_os_error(), Some(errno)),
            other => panic!("{other:?}"),
        }
        // Not through the other slot either, whose entries were taken by the first call.
        assert!(others.harvest().is_err());
        assert!(rings.reap().is_err());
        assert!(log.pending().is_clean() && others.pending().is_clean());
        kernel.write(0, 4, 7);
        assert_eq!(pages(log.harvest().unwrap().bitmap()), set([5, 7]));
        assert_eq!(pages(others.harvest().unwrap().bitmap()), set([6]));
        assert!(kernel.state.lock().unwrap().unwatched.is_empty());
    }
}

#[test]
fn a_reset_that_a_signal_cut_short_is_made_again_and_what_it_was_about_stays_dirty() {
    let kernel = Kernel::new(1, 64);
    let rings = kernel.rings();
    let mut log = DirtyLog::new(extent(), rings.log(&extent()).unwrap()).unwrap();
    (0..5).for_each(|page| assert!(kernel.write(0, 4, page)));
    kernel.next([Ok(2), Err(libc::EINTR), Ok(1)]);
    let harvest = log.harvest().unwrap();
    assert_eq!(pages(harvest.bitmap()), set(0..5));
    harvest.commit();
    // Some of them may not be watched: they come again until someone turned the log off and on.
    let harvest = log.harvest().unwrap();
    assert_eq!(pages(harvest.bitmap()), set(0..5));
    harvest.commit();
    assert!(rings.trust());
    assert!(log.harvest().unwrap().bitmap().is_clean());
    // A signal each time: an error, and nothing lost.
    kernel.write(0, 4, 9);
    kernel.next([Err(libc::EINTR); 100]);
    assert!(matches!(
        log.harvest(),
        Err(Error::NotReset { vcpu: 0, left: 1 })
    ));
    kernel.next([]);
    assert_eq!(pages(log.harvest().unwrap().bitmap()), set([9]));
}

#[test]
fn entries_of_no_registered_slot_are_reported_and_harm_nobody() {
    let kernel = Kernel::new(1, 64);
    let rings = kernel.rings();
    let mut log = DirtyLog::new(extent(), rings.log(&extent()).unwrap()).unwrap();
    for (slot, page) in [(4, 1), (4 | 1 << 16, 2), (5, 3), (4, PAGES), (4, u64::MAX)] {
        assert!(kernel.write(0, slot, page));
    }
    let reaped = rings.reap().unwrap();
    assert_eq!((reaped.entries, reaped.unknown), (5, 4));
    let (count, examples) = rings.unknown();
    let seen: Vec<_> = examples
        .iter()
        .map(|entry| (entry.slot.slot(), entry.slot.address_space(), entry.offset))
        .collect();
    assert_eq!(count, 4);
    assert_eq!(
        seen,
        [(4, 1, 2), (5, 0, 3), (4, 0, PAGES), (4, 0, u64::MAX)]
    );
    assert_eq!(pages(log.harvest().unwrap().bitmap()), set([1]));
    drop(log);
    kernel.write(0, 4, 1);
    assert_eq!(rings.reap().unwrap().unknown, 1, "its log is gone");
}

#[test]
fn a_slot_and_a_vcpu_are_registered_once() {
    let kernel = Kernel::new(1, 64);
    let rings = kernel.rings();
    let first = rings.log(&extent()).unwrap();
    assert!(matches!(
        rings.log(&extent()),
        Err(Error::Twice {
            what: "slot",
            number: 4
        })
    ));
    assert!(rings.add_vcpu(0, kernel.rings[0].clone()).is_err());
    drop(first);
    assert!(rings.log(&extent()).is_ok());
}

#[test]
fn a_ring_that_was_overrun_makes_every_page_dirty_for_good() {
    for sign in ["taken whole", "none reset", "one not counted"] {
        let kernel = Kernel::new(2, 64);
        let rings = kernel.rings();
        let mut log = DirtyLog::new(extent(), rings.log(&extent()).unwrap()).unwrap();
        (0..8).for_each(|page| assert!(kernel.write(0, 4, page)));
        match sign {
            "taken whole" => {
                (8..64).for_each(|page| assert!(kernel.write(0, 4, page)));
                assert!(!kernel.write(0, 4, 99), "there is no room");
            }
            // KVM waits at an entry that is free by its flags.
            "none reset" => kernel.state.lock().unwrap().reset[0] = 40,
            _ => kernel.state.lock().unwrap().uncounted = 1,
        }
        for _ in 0..2 {
            let harvest = log.harvest().unwrap();
            assert_eq!(harvest.count(), PAGES, "{sign}");
            harvest.commit();
        }
        assert_believed_no_more(&rings);
    }
}

/// Of every slot all pages are dirty, of one that is registered now too.
fn assert_believed_no_more(rings: &DirtyRings<Arc<Kernel>>) {
    assert!(rings.reap().unwrap().overrun);
    assert!(!rings.trust());
    let other = extent_of(9, 0, 64);
    let mut later = DirtyLog::new(other.clone(), rings.log(&other).unwrap()).unwrap();
    for _ in 0..2 {
        let harvest = later.harvest().unwrap();
        assert_eq!(harvest.count(), 64, "nor a log made later");
        harvest.commit();
    }
}

#[test]
fn a_vcpu_whose_empty_ring_is_full_by_kvms_count_is_told_that_it_is_stuck() {
    let kernel = Kernel::new(2, 64);
    let rings = kernel.rings();
    let mut log = DirtyLog::new(extent(), rings.log(&extent()).unwrap()).unwrap();
    for page in 0..20 {
        kernel.write(1, 4, page);
        assert!(rings.full(1).is_ok(), "it had something each time");
    }
    log.harvest().unwrap().commit();
    // Another thread may have reaped in between, once or twice.
    assert!(rings.full(1).is_ok() && rings.full(1).is_ok());
    assert!(log.harvest().unwrap().bitmap().is_clean());
    assert!(matches!(rings.full(1), Err(Error::RingStuck { vcpu: 1 })));
    // What it told before is not believed either: it was overrun, nobody knows when.
    for _ in 0..2 {
        let harvest = log.harvest().unwrap();
        assert_eq!(harvest.count(), PAGES);
        harvest.commit();
    }
    assert_believed_no_more(&rings);
    assert!(rings.full(0).is_ok(), "the other one goes on");
}
