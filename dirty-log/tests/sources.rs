// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Manual protect, the dirty ring and shared bitmaps against fake kernels that refuse any call with any
//! errno: nothing is lost, only what is handed out is cleared, and nothing is handed out before its pages
//! are watched again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dirty_log::{
    ChooseLog, ClearDirtyLog, DirtyBitmap, DirtyLog, DirtyRings, DirtySource, Error, GetDirtyLog,
    HostWrites, KvmManualBitmap, LogBuffer, LogChoice, LogInForce, PAGE_SIZE, PageRun, ResetRings,
    RingEntry, RingSize, SharedLog, SharedSource, SharedWords, SlotKey, Union,
};
use memslots::{Hva, SlotExtent, SlotId};
use proptest::prelude::*;
use vm_memory::{GuestAddress, bitmap::Bitmap};

const PAGES: u64 = 700;

fn extent_of(slot: u32, first: u64, pages: u64) -> SlotExtent {
    let (at, size) = (GuestAddress(first * PAGE_SIZE), pages * PAGE_SIZE);
    // SAFETY: a fake's slot; no memory is touched through it.
    unsafe { SlotExtent::new(SlotId(slot), at, size, Hva(0x7000_0000)).unwrap() }
}

fn extent() -> SlotExtent {
    extent_of(4, 0x100, PAGES)
}

fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

fn pages(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
    set(bitmap.runs().flat_map(|run| run.first..run.end()))
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun { first, pages }
}

const ERRNOS: [i32; 6] = [
    libc::EINTR,
    libc::ENOENT,
    libc::EINVAL,
    libc::ENOMEM,
    libc::EIO,
    libc::EBADF,
];

// ---- manual protect ----

/// A kernel with manual protect: a page that is not watched is not told when it is written.
struct Manual {
    dirty: RefCell<DirtyBitmap>,
    /// Refuses the call after so many, of either kind.
    refuse: Cell<Option<(u32, i32)>>,
    /// Each clear: first page, pages.
    clears: RefCell<Vec<(u64, u32)>>,
}

impl Manual {
    fn new() -> Self {
        Self {
            dirty: RefCell::new(DirtyBitmap::new(PAGES)),
            refuse: Cell::new(None),
            clears: RefCell::default(),
        }
    }

    fn write(&self, pages: PageRun) {
        self.dirty.borrow_mut().set(pages).unwrap();
    }

    fn may(&self) -> io::Result<()> {
        match self.refuse.get() {
            Some((0, errno)) => {
                self.refuse.set(None);
                Err(io::Error::from_raw_os_error(errno))
            }
            Some((calls, errno)) => {
                self.refuse.set(Some((calls - 1, errno)));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl GetDirtyLog for Manual {
    fn get_dirty_log(&self, slot: SlotId, buffer: &mut LogBuffer) -> io::Result<()> {
        assert_eq!(slot, SlotId(4));
        self.may()?;
        buffer
            .words_mut()
            .copy_from_slice(self.dirty.borrow().words());
        Ok(())
    }
}

impl ClearDirtyLog for Manual {
    fn clear_dirty_log(
        &self,
        slot: SlotId,
        first: u64,
        pages: u32,
        bits: &[u64],
    ) -> io::Result<()> {
        assert_eq!(slot, SlotId(4));
        self.may()?;
        // KVM's own rules.
        let end = first + u64::from(pages);
        assert!(first.is_multiple_of(64) && end <= PAGES);
        assert!(pages.is_multiple_of(64) || end == PAGES);
        assert_eq!(bits.len() as u32, pages.div_ceil(64));
        self.clears.borrow_mut().push((first, pages));
        let mut cleared = DirtyBitmap::new(PAGES);
        let mut words = vec![0; cleared.words().len()];
        words[(first / 64) as usize..][..bits.len()].copy_from_slice(bits);
        cleared.merge_words(&words).unwrap();
        self.dirty.borrow_mut().subtract(&cleared).unwrap();
        Ok(())
    }
}

#[test]
fn a_look_clears_nothing_and_a_part_clears_only_what_it_hands_out() {
    let host = Manual::new();
    let source = KvmManualBitmap::new(&host, extent()).unwrap();
    let mut log = DirtyLog::new(extent(), source).unwrap();
    for page in [3, 70, 130, 699] {
        host.write(run(page, 1));
    }
    let mut parts = log.parts(64).unwrap();
    assert!(host.clears.borrow().is_empty());
    // Written after the look, before its part: told again, for the look did not see it.
    host.write(run(71, 1));
    let part = parts.next_part().unwrap().unwrap();
    assert_eq!((part.range(), part.count()), (run(0, 64), 1));
    part.commit();
    assert_eq!(*host.clears.borrow(), [(0, 64)]);
    let part = parts.next_part().unwrap().unwrap();
    assert_eq!(set(part.runs().map(|run| run.first)), set([70]));
    part.commit();
    drop(parts); // the rest is not asked for
    assert_eq!(pages(&host.dirty.borrow()), set([71, 130, 699]));
    let harvest = log.harvest().unwrap();
    assert_eq!(pages(harvest.bitmap()), set([71, 130, 699]));
    harvest.commit();
    assert!(host.dirty.borrow().is_clean());
}

#[test]
fn a_chunk_is_as_large_as_what_is_dirty_in_it_and_no_larger_than_it_may_be() {
    let host = Manual::new();
    let source = KvmManualBitmap::new(&host, extent())
        .unwrap()
        .with_chunk(130); // rounded up to 192
    let mut log = DirtyLog::new(extent(), source).unwrap();
    host.write(run(65, 1));
    host.write(run(200, 400));
    host.write(run(699, 1));
    log.harvest().unwrap().commit();
    assert_eq!(
        *host.clears.borrow(),
        [(64, 64), (192, 192), (384, 192), (576, 124)]
    );
    log.harvest().unwrap().commit();
    assert_eq!(host.clears.borrow().len(), 4, "a clean slot is not cleared");
}

#[test]
fn manual_protect_loses_nothing_whichever_call_is_refused() {
    for errno in ERRNOS {
        for call in 0..12 {
            for in_parts in [false, true] {
                let host = Manual::new();
                let source = KvmManualBitmap::new(&host, extent())
                    .unwrap()
                    .with_chunk(64);
                let mut log = DirtyLog::new(extent(), source).unwrap();
                let wrote = set((0..PAGES).step_by(97));
                for page in &wrote {
                    host.write(run(*page, 1));
                }
                host.refuse.set(Some((call, errno)));
                let mut got = BTreeSet::new();
                for _ in 0..3 {
                    let failed = take_all(&mut log, in_parts, &mut got).is_err();
                    if failed {
                        // Not dealt with: pending, or still the kernel's.
                        let mut all = log.pending().clone();
                        all.merge(&host.dirty.borrow()).unwrap();
                        assert_eq!(&pages(&all) | &got, wrote, "{errno} at call {call}");
                    }
                }
                assert_eq!(got, wrote, "{errno} at call {call}, parts: {in_parts}");
                assert!(host.dirty.borrow().is_clean());
            }
        }
    }
}

fn take_all(
    log: &mut DirtyLog<impl DirtySource>,
    in_parts: bool,
    got: &mut BTreeSet<u64>,
) -> Result<(), Error> {
    if !in_parts {
        let harvest = log.harvest()?;
        got.extend(pages(harvest.bitmap()));
        harvest.commit();
        return Ok(());
    }
    let mut parts = log.parts(128)?;
    while let Some(part) = parts.next_part()? {
        got.extend(part.runs().flat_map(|run| run.first..run.end()));
        part.commit();
    }
    Ok(())
}

// ---- the ring ----

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
        Ok(done as u32)
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
    // Taken whole, or reset by less than was taken: both say that entries were written over.
    for taken_whole in [true, false] {
        let kernel = Kernel::new(2, 64);
        let rings = kernel.rings();
        let mut log = DirtyLog::new(extent(), rings.log(&extent()).unwrap()).unwrap();
        if taken_whole {
            (0..64).for_each(|page| assert!(kernel.write(0, 4, page)));
            assert!(!kernel.write(0, 4, 99), "there is no room");
        } else {
            (0..8).for_each(|page| assert!(kernel.write(0, 4, page)));
            // KVM waits at an entry that is free by its flags: it counts none.
            kernel.state.lock().unwrap().reset[0] = 40;
        }
        for _ in 0..2 {
            let harvest = log.harvest().unwrap();
            assert_eq!(harvest.count(), PAGES);
            harvest.commit();
        }
        assert!(rings.reap().unwrap().overrun);
        assert!(!rings.trust());
        let other = extent_of(9, 0, 64);
        let mut later = DirtyLog::new(other.clone(), rings.log(&other).unwrap()).unwrap();
        assert_eq!(later.harvest().unwrap().count(), 64, "nor a log made later");
    }
}

#[test]
fn a_vcpu_whose_empty_ring_is_full_by_kvms_count_is_told_that_it_is_stuck() {
    let kernel = Kernel::new(2, 64);
    let rings = kernel.rings();
    for page in 0..20 {
        kernel.write(1, 4, page);
        assert!(rings.full(1).is_ok(), "it had something each time");
    }
    // Another thread may have reaped in between, once or twice.
    assert!(rings.full(1).is_ok() && rings.full(1).is_ok());
    assert!(matches!(rings.full(1), Err(Error::RingStuck { vcpu: 1 })));
    assert!(rings.full(0).is_ok(), "the other one goes on");
}

// ---- what a VM is asked for ----

struct Vm {
    capabilities: Vec<(u32, i32)>,
    refuse: Option<i32>,
    enabled: RefCell<Vec<(u32, u64)>>,
}

impl ChooseLog for Vm {
    fn capability(&self, capability: u32) -> i32 {
        let known = self.capabilities.iter().find(|(cap, _)| *cap == capability);
        known.map_or(0, |(_, value)| *value)
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        if let Some(errno) = self.refuse {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.enabled.borrow_mut().push((capability, argument));
        Ok(())
    }
}

const MANUAL: u32 = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
const RING: u32 = kvm_bindings::KVM_CAP_DIRTY_LOG_RING;
const RING_ACQ_REL: u32 = kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL;

fn choose(
    choice: LogChoice,
    capabilities: &[(u32, i32)],
    refuse: Option<i32>,
) -> (Result<LogInForce, Error>, Vec<(u32, u64)>) {
    let vm = Vm {
        capabilities: capabilities.to_vec(),
        refuse,
        enabled: RefCell::default(),
    };
    (choice.apply(&vm), vm.enabled.into_inner())
}

#[test]
fn what_is_in_force_is_what_the_host_was_asked_for_and_nothing_is_asked_in_vain() {
    let (initially_set, not) = (true, false);
    let both = LogChoice::ManualProtect { initially_set };
    let (in_force, enabled) = choose(both, &[(MANUAL, 3)], None);
    assert_eq!(
        in_force.unwrap(),
        LogInForce::ManualProtect { initially_set }
    );
    assert_eq!(enabled, [(MANUAL, 3)]);
    for has in [0, -22, 1, 2] {
        let (in_force, enabled) = choose(both, &[(MANUAL, has)], None);
        assert!(matches!(
            in_force,
            Err(Error::NoManualProtect { wanted: 3, .. })
        ));
        assert!(enabled.is_empty());
    }
    let best = LogChoice::BestBitmap { initially_set };
    for (has, want, asked) in [
        (0, LogInForce::Bitmap, &[][..]),
        (
            1,
            LogInForce::ManualProtect { initially_set: not },
            &[(MANUAL, 1)],
        ),
        (
            3,
            LogInForce::ManualProtect { initially_set },
            &[(MANUAL, 3)],
        ),
    ] {
        let (in_force, enabled) = choose(best, &[(MANUAL, has)], None);
        assert_eq!((in_force.unwrap(), &enabled[..]), (want, asked));
    }
    let (in_force, enabled) = choose(LogChoice::Bitmap, &[(MANUAL, 3)], Some(libc::EIO));
    assert_eq!((in_force.unwrap(), enabled.len()), (LogInForce::Bitmap, 0));
}

#[test]
fn a_ring_is_enabled_by_the_newer_capability_and_its_size_is_checked_first() {
    let size = RingSize::new(4096).unwrap();
    let ring = LogChoice::Ring(size);
    let (in_force, enabled) = choose(ring, &[(RING, 1 << 20), (RING_ACQ_REL, 1 << 20)], None);
    assert_eq!(in_force.unwrap(), LogInForce::Ring(size));
    assert_eq!(enabled, [(RING_ACQ_REL, 65536)]);
    let (in_force, enabled) = choose(ring, &[(RING, 1 << 20)], None);
    assert!(in_force.is_ok());
    assert_eq!(enabled, [(RING, 65536)]);
    for (bytes, most) in [(0, 0), (32768, 2048)] {
        let (in_force, enabled) = choose(ring, &[(RING_ACQ_REL, bytes)], None);
        let error = in_force.unwrap_err();
        assert!(
            matches!(error, Error::RingTooLarge { most: m, .. } if m == most),
            "{error}"
        );
        assert!(enabled.is_empty());
    }
    let (in_force, _) = choose(ring, &[(RING_ACQ_REL, 1 << 20)], Some(libc::EINVAL));
    let text = in_force.unwrap_err().to_string();
    assert!(text.contains("after the first vCPU"), "{text}");
}

// ---- shared bitmaps, and unions ----

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_window_of_a_shared_bitmap_takes_its_own_bits_and_leaves_the_neighbours(
        first in 0u64..200, pages in 1u64..300, marked in proptest::collection::btree_set(0u64..512, 0..200)
    ) {
        let shared: Arc<Vec<AtomicU64>> = Arc::new((0..8).map(|_| AtomicU64::new(0)).collect());
        for frame in &marked {
            shared[(frame / 64) as usize].fetch_or(1 << (frame % 64), Ordering::Release);
        }
        let mut source = SharedSource::new(shared.clone(), &extent_of(1, first, pages)).unwrap();
        let mut dirty = DirtyBitmap::new(pages);
        source.take(&mut dirty).unwrap();
        let inside = |frame: &u64| (first..first + pages).contains(frame);
        let want = set(marked.iter().filter(|frame| inside(frame)).map(|frame| frame - first));
        prop_assert_eq!(pages_of(&dirty), want);
        let left = (0..512).filter(|frame| {
            shared[(frame / 64) as usize].load(Ordering::Relaxed) & 1 << (frame % 64) != 0
        });
        prop_assert_eq!(set(left), set(marked.iter().copied().filter(|frame| !inside(frame))));
        prop_assert!(source.take(&mut DirtyBitmap::new(pages + 1)).is_err());
    }

    #[test]
    fn parts_are_the_whole(
        dirty in proptest::collection::btree_set(0u64..PAGES, 0..300), each in 1u64..900
    ) {
        let writes = HostWrites::new(PAGES);
        let mut log = DirtyLog::new(extent(), writes.clone()).unwrap();
        for page in &dirty {
            writes.mark_dirty((page * PAGE_SIZE) as usize, 1);
        }
        let mut seen = Vec::new();
        let mut parts = log.parts(each).unwrap();
        while let Some(mut part) = parts.next_part().unwrap() {
            let range = part.range();
            let runs: Vec<PageRun> = part.runs().collect();
            prop_assert_eq!(part.count(), runs.iter().map(|run| run.pages).sum::<u64>());
            prop_assert!(part.count() > 0 && range.first.is_multiple_of(64));
            for each in &runs {
                prop_assert!(each.first >= range.first && each.end() <= range.end());
                seen.extend(each.first..each.end());
            }
            if range.first > 0 {
                let refused = part.forget(run(0, 1)).is_err();
                prop_assert!(refused);
            }
            // Forgotten one by one, or all at once.
            if seen.len() % 2 == 0 {
                for each in runs { part.forget(each).unwrap(); }
                prop_assert_eq!(part.count(), 0);
            } else {
                part.commit();
            }
        }
        prop_assert!(seen.iter().eq(dirty.iter()));
        prop_assert!(log.pending().is_clean());
    }
}

fn pages_of(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
    pages(bitmap)
}

#[test]
fn a_shared_log_is_sealed_and_another_mapping_of_it_is_heard() {
    let log = Arc::new(SharedLog::new(0x100 + PAGES).unwrap());
    assert_eq!(log.size(), 4096, "whole pages");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&log.fd());
    for size in [0, 4095, 8192] {
        // SAFETY: integers alone.
        let cut = unsafe { libc::ftruncate(fd, size) };
        assert_eq!(cut, -1, "a peer cannot make it {size} bytes");
    }
    // A peer: a mapping of its own, through the descriptor.
    let bit = 0x100 + 77;
    let peer = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{fd}"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&peer, &[1 << (bit % 8)], bit / 8).unwrap();
    let mut dirty =
        DirtyLog::new(extent(), SharedSource::new(log.clone(), &extent()).unwrap()).unwrap();
    assert_eq!(pages(dirty.harvest().unwrap().bitmap()), set([77]));
    assert!(
        log.words()
            .iter()
            .all(|word| word.load(Ordering::Relaxed) == 0)
    );
    let beyond = extent_of(1, 32768 - 5, 6);
    assert!(matches!(
        SharedSource::new(log, &beyond),
        Err(Error::BeyondShared {
            slot: SlotId(1),
            end: 32769,
            frames: 32768
        })
    ));
}

/// Fails its next `take` without having moved anything.
struct Fails(Arc<Mutex<bool>>);

impl DirtySource for Fails {
    fn pages(&self) -> u64 {
        PAGES
    }

    fn take(&mut self, _: &mut DirtyBitmap) -> Result<(), Error> {
        if std::mem::take(&mut *self.0.lock().unwrap()) {
            return Err(Error::ResetRings {
                source: io::Error::other("injected"),
            });
        }
        Ok(())
    }
}

#[test]
fn a_union_loses_nothing_whichever_of_its_sources_fails() {
    for position in 0..3 {
        let fail = Arc::new(Mutex::new(true));
        let writes = [HostWrites::new(PAGES), HostWrites::new(PAGES)];
        let mut union = Union::new(PAGES);
        for at in 0..3 {
            if at as u64 == position {
                union.add(Fails(fail.clone())).unwrap();
            } else {
                union.add(writes[at % 2].clone()).unwrap();
            }
        }
        let mut log = DirtyLog::new(extent(), union).unwrap();
        writes[0].mark_dirty(0, 1);
        writes[1].mark_dirty(4096, 1);
        assert!(log.harvest().is_err());
        // The two that are left, whichever they are, have the same source once or twice.
        let heard = set((0..3).filter(|at| *at != position).map(|at| at % 2));
        assert_eq!(pages(log.harvest().unwrap().bitmap()), heard);
    }
    assert!(Union::new(PAGES).with(HostWrites::new(1)).is_err());
}

// ---- the VMM's own writes, on and off ----

#[test]
fn a_log_that_is_off_marks_nothing_and_one_that_is_turned_on_marks_from_then_on() {
    let writes = HostWrites::off(PAGES);
    let mut log = DirtyLog::new(extent(), writes.clone()).unwrap();
    writes.mark_dirty(0, 1);
    assert!(!writes.is_on() && !writes.dirty_at(0));
    assert!(log.harvest().unwrap().bitmap().is_clean());
    writes.start().unwrap();
    writes.start().unwrap();
    writes.clone().mark_dirty(4096, 1);
    writes.stop();
    writes.mark_dirty(8192, 1);
    assert_eq!(
        pages(log.harvest().unwrap().bitmap()),
        set([1]),
        "what was marked stays"
    );
    HostWrites::new(1).stop();
}
