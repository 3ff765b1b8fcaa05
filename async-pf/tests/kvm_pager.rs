// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pager on the kernel's userfaultfd: threads touch memory in place of vCPUs, and every byte that they read is the one
//! that its page should have.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::pager::{GiveUp, Lost, PagedSlot, Pager, PagerConfig, PagerEvents};
use async_pf::peer::{PageServer, PeerConfig, PeerSource, ServerConfig, Wire, fake};
use async_pf::{Fetched, PageSource, SourceError, ZeroSource};
use memslots::uffd::{Cause, Fault, Features, Modes, ProtectRole, Registration, Uffd, Wake};
use memslots::{Backing, Gfn, Hva, Mapping, PAGE_SIZE};
use vm_memory::GuestAddress;

const P: u64 = PAGE_SIZE;
const LONG: Duration = Duration::from_secs(60);

/// The word that begins page `gfn` in the source; its last word is the complement.
fn key(gfn: u64) -> u64 {
    gfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Pages with a keyed pattern; every seventh is zero.
struct Keyed;

impl PageSource for Keyed {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        for (gfn, page) in (first.0..).zip(into.chunks_mut(P as usize)) {
            page.fill(0);
            if gfn % 7 != 0 {
                page[..8].copy_from_slice(&key(gfn).to_ne_bytes());
                page[4088..].copy_from_slice(&(!key(gfn)).to_ne_bytes());
            }
        }
        Ok(Fetched::Bytes)
    }
}

fn uffd() -> Uffd {
    Uffd::open(
        Features::EVENT_REMOVE,
        Features::POISON | Features::WP_UNPOPULATED,
    )
    .expect("this test needs a userfaultfd: run it as root, or as the error says")
}

struct World {
    uffd: Uffd,
    memory: Arc<Mapping>,
    registration: Registration,
}

impl World {
    /// Whether a page that will not come can be a memory error; says so if not.
    fn poisons(&self) -> bool {
        let poisons = self.uffd.available().contains(Features::POISON);
        if !poisons {
            eprintln!("NOT TRIED: this kernel's userfaultfd has no POISON (Linux 6.6)");
        }
        poisons
    }

    fn new(backing: &Backing, modes: Modes) -> Self {
        let uffd = uffd();
        let memory = Arc::new(Mapping::new(backing, GuestAddress(0)).unwrap());
        let registration = uffd.register_all(&memory, modes).unwrap();
        Self {
            uffd,
            memory,
            registration,
        }
    }

    fn start(&self, source: impl PageSource + 'static, config: PagerConfig) -> Pager {
        let slot = PagedSlot::new(&self.registration, Gfn(0), Arc::new(source)).unwrap();
        let poisons = self.uffd.available().contains(Features::POISON);
        let give_up = if poisons {
            config.give_up
        } else {
            GiveUp::Tell
        };
        Pager::start(&self.uffd, vec![slot], PagerConfig { give_up, ..config }).unwrap()
    }

    fn read(&self, page: u64) -> [u64; 2] {
        read(self.memory.host(), page)
    }

    fn give_back(&self, page: u64, pages: u64) {
        let at = (self.memory.host().0 + (page * P) as usize) as *mut libc::c_void;
        // SAFETY: whole pages of the mapping, which nobody has a reference to.
        let result = unsafe { libc::madvise(at, (pages * P) as usize, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }
}

/// The first and the last word of a page.
fn read(start: Hva, page: u64) -> [u64; 2] {
    let at = start.0 + (page * P) as usize;
    // SAFETY: within a mapping that lives as long as the test; read volatile, as it may change.
    [at, at + 4088].map(|at| unsafe { (at as *const u64).read_volatile() })
}

fn expected(gfn: u64) -> [u64; 2] {
    match gfn % 7 {
        0 => [0, 0],
        _ => [key(gfn), !key(gfn)],
    }
}

/// A sequence that looks random, the same in each run.
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn what_is_touched_comes_and_the_rest_behind_it() {
    for backing in [Backing::anonymous(512 * P), Backing::memfd(512 * P)] {
        for workers in [1, 2] {
            let world = World::new(&backing, Modes::MISSING);
            let pager = world.start(
                Keyed,
                PagerConfig {
                    workers,
                    ..PagerConfig::default()
                },
            );
            assert_eq!(world.read(300), expected(300));
            assert!(pager.progress().missing >= 480, "nothing comes unasked");
            pager.prefetch_rest();
            assert!(pager.wait(LONG));
            let stats = pager.stats();
            assert_eq!((stats.placed, stats.latency.count()), (512, stats.faults));
            drop(pager.finish().unwrap());
            for page in 0..512 {
                assert_eq!(world.read(page), expected(page));
            }
        }
    }
}

#[test]
fn a_mapping_that_madvise_has_split_comes_and_is_poisoned_on_both_sides() {
    for drops in [false, true] {
        let world = World::new(&Backing::anonymous(64 * P), Modes::MISSING);
        let pager = world.start(Keyed, PagerConfig::default());
        let at = (world.memory.host().0 + (8 * P) as usize) as *mut libc::c_void;
        // SAFETY: whole pages of the mapping; advice about core dumps changes no contents.
        let split = unsafe { libc::madvise(at, (8 * P) as usize, libc::MADV_DONTDUMP) };
        assert_eq!(split, 0);
        if drops && world.uffd.available().contains(Features::POISON) {
            drop(pager);
            for page in [0, 7, 8, 15, 16, 63] {
                assert!(!readable(world.memory.host(), page), "page {page}");
            }
            continue;
        }
        pager.prefetch(0, Gfn(4)..Gfn(20)).unwrap();
        pager.prefetch_rest();
        assert!(pager.wait(LONG));
        assert_eq!((pager.stats().placed, pager.progress().lost), (64, 0));
        for page in 0..64 {
            assert_eq!(world.read(page), expected(page), "page {page}");
        }
    }
}

#[test]
fn a_mapping_of_transparent_huge_pages_comes_in_its_own_pages_beside_what_is_there_of_it() {
    const PAGES: u64 = 2048;
    let uffd = uffd();
    let memory = Arc::new(Mapping::new(&Backing::anonymous(PAGES * P), GuestAddress(0)).unwrap());
    let start = memory.host();
    // SAFETY: all of the mapping; advice changes no contents.
    let advised =
        unsafe { libc::madvise(start.0 as *mut _, (PAGES * P) as usize, libc::MADV_HUGEPAGE) };
    assert_eq!(
        advised, 0,
        "this test needs a kernel with transparent huge pages"
    );
    // A huge page, of the first 2 MiB; the rest is to come.
    for page in 0..512 {
        let at = (start.0 + (page * P) as usize) as *mut u64;
        // SAFETY: within the mapping, which nobody else has yet.
        unsafe { at.write_volatile(7) };
    }
    let modes = Modes::MISSING | Modes::WRITE_PROTECT;
    let registration = uffd.register_all(&memory, modes).unwrap();
    let slot = PagedSlot::new(&registration, Gfn(0), Arc::new(Keyed)).unwrap();
    let slot = slot.only([Gfn(512)..Gfn(PAGES)]);
    let config = PagerConfig {
        workers: 2,
        give_up: GiveUp::Tell,
        ..PagerConfig::default()
    };
    let pager = Pager::start(&uffd, vec![slot], config).unwrap();
    // Protection cuts the huge page at its end.
    let role = registration.lend_protect().unwrap();
    role.protect(500 * P..600 * P).unwrap();
    for page in [512, 600, 1023, 1024, 2047] {
        assert_eq!(read(start, page), expected(page), "page {page}");
    }
    role.end().unwrap();
    // Given back in one, as a balloon does it.
    let at = (start.0 + (1536 * P) as usize) as *mut libc::c_void;
    // SAFETY: whole pages of the mapping, which nobody has a reference to.
    let given = unsafe { libc::madvise(at, (512 * P) as usize, libc::MADV_DONTNEED) };
    assert_eq!(given, 0);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    for page in 0..PAGES {
        let wanted = match page {
            0..512 => [7, 0],
            512..1536 => expected(page),
            _ => [0, 0],
        };
        assert_eq!(read(start, page), wanted, "page {page}");
    }
    assert_eq!((pager.progress().lost, pager.stats().unanswered), (0, 0));
}

/// Has a page wherever it is asked, and notes where.
struct Noted(Mutex<Vec<u64>>);

impl PageSource for Noted {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let pages = into.len() as u64 / P;
        self.0.lock().unwrap().extend(first.0..first.0 + pages);
        Keyed.fetch(first, into)
    }
}

#[test]
fn of_some_pages_alone_the_others_keep_what_they_have_and_are_not_asked_for() {
    let uffd = Uffd::open(Features::NONE, Features::POISON).unwrap();
    let memory = Arc::new(Mapping::new(&Backing::anonymous(64 * P), GuestAddress(0)).unwrap());
    let start = memory.host();
    // Pages 0 to 15 are here; 40 and the last are to come, and 16 to 39 nobody ever wrote.
    for page in 0..16 {
        // SAFETY: mapped for as long as this runs, and nobody else has it yet.
        unsafe { ((start.0 + page * P as usize) as *mut u64).write_volatile(7) };
    }
    let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    let source = Arc::new(Noted(Mutex::default()));
    let of: Arc<dyn PageSource> = Arc::clone(&source) as _;
    let first = Gfn(1000);
    let slot = PagedSlot::new(&registration, first, of).unwrap();
    // Beyond the slot there is nothing.
    let slot = slot.only([Gfn(1040)..Gfn(1041), Gfn(1063)..Gfn(2000), Gfn(0)..Gfn(9)]);
    let pager = Pager::start(&uffd, vec![slot], PagerConfig::default()).unwrap();
    let progress = pager.progress();
    assert_eq!((progress.total, progress.missing), (64, 2));
    let expected = |page| match page {
        0..16 => [7, 0],
        40 | 63 => expected(1000 + page),
        _ => [0, 0],
    };
    for page in [3, 20, 40, 41] {
        assert_eq!(read(start, page), expected(page), "{page}");
    }
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    let mut asked = std::mem::take(&mut *source.0.lock().unwrap());
    asked.sort_unstable();
    assert_eq!(asked, [1040, 1063]);
    for page in 0..64 {
        assert_eq!(read(start, page), expected(page), "{page}");
    }
    pager.finish().unwrap();
}

#[test]
fn faults_in_a_row_are_brought_by_a_window_that_grows() {
    let world = World::new(&Backing::anonymous(4096 * P), Modes::MISSING);
    let pager = world.start(Keyed, PagerConfig::default());
    for page in 0..4096 {
        assert_eq!(world.read(page), expected(page));
    }
    let stats = pager.stats();
    assert!(stats.faults < 4096 / 16, "{stats:?}");
    assert!(
        pager.wait(LONG),
        "the last is noted just after it was placed"
    );
    assert!(pager.finish().is_ok());
}

#[test]
fn memory_that_was_given_back_reads_as_zeros_brought_or_not() {
    let world = World::new(&Backing::anonymous(64 * P), Modes::MISSING);
    let pager = world.start(Keyed, PagerConfig::default());
    assert_eq!(world.read(10), expected(10));
    world.give_back(9, 3);
    for page in 9..12 {
        assert_eq!(world.read(page), [0, 0]);
    }
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(world.read(12), expected(12));
    assert_eq!(world.read(9), [0, 0]);
}

/// Waits inside a fetch until it is let go.
struct Gate {
    inside: Barrier,
    open: Barrier,
    once: AtomicBool,
}

impl PageSource for &'static Gate {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        // Relaxed: a flag that orders nothing else.
        if first == Gfn(1) && !self.once.swap(true, Ordering::Relaxed) {
            self.inside.wait();
            self.open.wait();
        }
        Keyed.fetch(first, into)
    }
}

#[test]
fn what_is_given_back_while_it_is_fetched_is_not_brought() {
    for workers in [1, 2] {
        let gate: &'static Gate = Box::leak(Box::new(Gate {
            inside: Barrier::new(2),
            open: Barrier::new(2),
            once: AtomicBool::new(false),
        }));
        let world = World::new(&Backing::anonymous(4 * P), Modes::MISSING);
        let pager = world.start(
            gate,
            PagerConfig {
                workers,
                ..PagerConfig::default()
            },
        );
        pager.prefetch(0, Gfn(1)..Gfn(2)).unwrap();
        gate.inside.wait();
        // The worker is inside the source, and this waits for the message to be read: by another.
        world.give_back(1, 1);
        gate.open.wait();
        assert_eq!(world.read(1), [0, 0]);
        assert_eq!(world.read(2), expected(2));
    }
}

/// Never answers for odd pages.
struct Mute;

impl PageSource for Mute {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        if first.0 % 2 == 1 {
            loop {
                thread::park();
            }
        }
        Keyed.fetch(first, into)
    }

    fn run(&self, _: Gfn, _: u64) -> u64 {
        1
    }
}

/// Reads a page by a system call, which says EFAULT of a poisoned one where a load would end the process.
fn readable(start: Hva, page: u64) -> bool {
    let (_reader, writer) = std::io::pipe().unwrap();
    let at = (start.0 + (page * P) as usize) as *const libc::c_void;
    // SAFETY: a page of a mapping that lives as long as the test; the kernel reads it.
    unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), at, 8) == 8 }
}

#[test]
fn a_source_that_never_answers_keeps_nobody_beyond_the_deadline() {
    let world = World::new(&Backing::anonymous(64 * P), Modes::MISSING);
    if !world.poisons() {
        return;
    }
    let deadline = Duration::from_millis(100);
    let pager = world.start(
        Mute,
        PagerConfig {
            workers: 2,
            deadline,
            ..PagerConfig::default()
        },
    );
    let begun = Instant::now();
    thread::scope(|scope| {
        for page in [1, 3, 5, 7] {
            let host = world.memory.host();
            scope.spawn(move || assert!(!readable(host, page)));
        }
    });
    // Not a speed test: that they come back at all is the promise, and long before a patient machine gives up.
    assert!(begun.elapsed() >= deadline);
    assert_eq!(pager.progress().lost, 4);
    // Both workers are gone for good; memory that was given back needs no source.
    world.give_back(20, 1);
    assert_eq!(world.read(20), [0, 0]);
    drop(pager);
}

#[test]
fn a_pager_that_is_to_bring_as_much_at_once_as_there_is_brings_it() {
    let world = World::new(&Backing::anonymous(64 * P), Modes::MISSING);
    let config = PagerConfig {
        workers: 2,
        window: u64::MAX,
        least_window: 1 << 48,
        ahead: u64::MAX,
        ..PagerConfig::default()
    };
    let pager = world.start(Keyed, config);
    assert_eq!(world.read(40), expected(40));
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    for page in 0..64 {
        assert_eq!(world.read(page), expected(page));
    }
}

/// What a thread was to run.
type Kept = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

#[test]
fn a_pager_one_of_whose_threads_has_gone_has_failed_and_nobody_waits_for_it() {
    let world = World::new(&Backing::anonymous(64 * P), Modes::MISSING);
    if !world.poisons() {
        return;
    }
    let kept = Kept::default();
    let keep = Arc::clone(&kept);
    let config = PagerConfig {
        workers: 2,
        spawn: Arc::new(move |name, run| match name == "pager-1" {
            true => {
                *keep.lock().unwrap() = Some(run);
                Ok(())
            }
            false => thread::Builder::new().name(name).spawn(run).map(drop),
        }),
        ..PagerConfig::default()
    };
    let pager = world.start(Keyed, config);
    assert_eq!(world.read(5), expected(5));
    assert_eq!(pager.progress().failed, None);
    drop(kept.lock().unwrap().take());
    let failed = pager.progress().failed.map(|errno| errno.0);
    assert_eq!(failed, Some(libc::EOWNERDEAD));
    assert!(!pager.wait(Duration::MAX));
    assert!(!readable(world.memory.host(), 40));
    assert_eq!(world.read(5), expected(5));
}

#[test]
fn a_pager_that_has_lost_a_thread_before_it_is_there_is_not_started() {
    let world = World::new(&Backing::anonymous(64 * P), Modes::MISSING);
    let slot = PagedSlot::new(&world.registration, Gfn(0), Arc::new(Keyed)).unwrap();
    let config = PagerConfig {
        // It says that it has run it, and has not.
        spawn: Arc::new(|_, _| Ok(())),
        give_up: GiveUp::Tell,
        ..PagerConfig::default()
    };
    let refused = Pager::start(&world.uffd, vec![slot], config).unwrap_err();
    assert!(refused.to_string().contains("pager"), "{refused}");
    // Nothing was promised, and nothing is lost.
    let pager = world.start(Keyed, PagerConfig::default());
    assert_eq!(world.read(40), expected(40));
    drop(pager);
}

#[test]
fn dropped_before_everything_is_there_it_poisons_the_rest() {
    let world = World::new(&Backing::anonymous(64 * P), Modes::MISSING);
    if !world.poisons() {
        return;
    }
    let pager = world.start(Keyed, PagerConfig::default());
    assert_eq!(world.read(5), expected(5));
    drop(pager);
    assert_eq!(world.read(5), expected(5));
    assert!(!readable(world.memory.host(), 40));
    assert!(
        world.registration.lend_fill().is_ok(),
        "the role is free again"
    );
}

/// Has page 9 and no other.
struct Alone;

impl PageSource for Alone {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        match first.0 {
            9 if into.len() as u64 == P => Keyed.fetch(first, into),
            _ => Err(SourceError::NoSuchPage { gfn: first }),
        }
    }
}

#[test]
fn a_lost_page_that_was_protected_before_it_came_is_an_error_and_what_came_stays_protected() {
    for backing in [Backing::anonymous(2048 * P), Backing::memfd(2048 * P)] {
        let world = World::new(&backing, Modes::MISSING | Modes::WRITE_PROTECT);
        if !world.poisons() {
            return;
        }
        let events = Arc::new(Unprotect {
            start: world.memory.host().0,
            ..Unprotect::default()
        });
        let role = world.registration.lend_protect().unwrap();
        role.protect(0..2048 * P).unwrap();
        assert!(events.role.set(role).is_ok());
        let config = PagerConfig {
            events: events.clone(),
            ..PagerConfig::default()
        };
        let pager = world.start(Alone, config);
        assert!(!readable(world.memory.host(), 3));
        assert_eq!(world.read(9), expected(9));
        assert_eq!(*events.lost.lock().unwrap(), [3]);
        drop(pager);
        for page in [0, 3, 8, 10, 600, 2047] {
            assert!(!readable(world.memory.host(), page), "page {page}");
        }
        let role = events.role.get().unwrap();
        let at = (world.memory.host().0 + 9 * P as usize) as *mut u64;
        let (at, told) = (at as usize, AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: within the mapping, and nobody else has a reference to it.
                unsafe { (at as *mut u64).write_volatile(1) };
                assert!(told.load(Ordering::SeqCst), "it was written untold");
            });
            // Its message, now that no pager reads them.
            assert!(world.uffd.wait(Some(LONG)).unwrap());
            told.store(true, Ordering::SeqCst);
            role.unprotect(9 * P..10 * P, Wake::Now).unwrap();
        });
    }
}

#[derive(Default)]
struct Unprotect {
    role: OnceLock<ProtectRole>,
    start: usize,
    told: AtomicU64,
    lost: Mutex<Vec<u64>>,
}

impl PagerEvents for Unprotect {
    fn write_protected(&self, fault: &Fault) -> bool {
        let page = (fault.address.0 - self.start) as u64 / P * P;
        let role = self.role.get().expect("nothing is protected before");
        // Relaxed: a number, read after the threads were joined.
        self.told.fetch_add(1, Ordering::Relaxed);
        match role.unprotect(page..page + P, Wake::Now) {
            Err(error) => {
                assert_eq!(error.cause, Cause::Changing);
                false
            }
            Ok(()) => true,
        }
    }

    fn lost(&self, lost: &Lost<'_>) {
        self.lost.lock().unwrap().push(lost.gfn.0);
    }
}

#[test]
fn four_threads_read_what_they_should_beside_prefetch_discards_and_write_protection() {
    const PAGES: u64 = 8192;
    let discarded = |page: u64| page % 64 >= 60;
    let world = World::new(
        &Backing::anonymous(PAGES * P),
        Modes::MISSING | Modes::WRITE_PROTECT,
    );
    let events = Arc::new(Unprotect {
        start: world.memory.host().0,
        ..Unprotect::default()
    });
    let config = PagerConfig {
        workers: 2,
        events: events.clone(),
        ..PagerConfig::default()
    };
    let pager = world.start(Keyed, config);
    let role = world.registration.lend_protect().unwrap();
    role.protect(0..PAGES / 2 * P).unwrap();
    assert!(events.role.set(role).is_ok());
    thread::scope(|scope| {
        for vcpu in 0..4u64 {
            let host = world.memory.host();
            scope.spawn(move || {
                let mut seed = 0x1234_5678 + vcpu * 77;
                for _ in 0..PAGES {
                    let page = next(&mut seed) % PAGES;
                    if discarded(page) {
                        continue;
                    }
                    assert_eq!(read(host, page), expected(page), "page {page}");
                    if page % 4 == vcpu {
                        // A write of what is there: the page stays right, and is written.
                        let at = (host.0 + (page * P) as usize) as *mut u64;
                        // SAFETY: as in `read`; of this page, no other thread writes.
                        unsafe { at.write_volatile(expected(page)[0]) };
                    }
                }
            });
        }
        scope.spawn(|| {
            for block in 0..PAGES / 64 {
                world.give_back(block * 64 + 60, 4);
                for page in block * 64 + 60..block * 64 + 64 {
                    assert_eq!(world.read(page), [0, 0], "page {page} was given back");
                }
            }
        });
        let mut seed = 99;
        for _ in 0..200 {
            let first = next(&mut seed) % (PAGES - 32);
            let _ = pager.prefetch(0, Gfn(first)..Gfn(first + 32));
        }
        pager.prefetch_rest();
    });
    assert!(pager.wait(LONG));
    for page in 0..PAGES {
        let wanted = if discarded(page) {
            [0, 0]
        } else {
            expected(page)
        };
        assert_eq!(world.read(page), wanted, "page {page}");
    }
    assert!(events.told.load(Ordering::Relaxed) > 0);
    assert!(events.lost.lock().unwrap().is_empty());
    assert_eq!(pager.stats().unanswered, 0);
}

#[test]
fn minor_faults_map_what_the_page_cache_has() {
    const PAGES: u64 = 256;
    let world = World::new(&Backing::memfd(PAGES * P), Modes::MINOR);
    // Contents come through the file, as from another process that shares it.
    let of = world.memory.file().unwrap();
    for page in 0..PAGES {
        let mut bytes = [0; P as usize];
        let _ = Keyed.fetch(Gfn(page), &mut bytes).unwrap();
        std::os::unix::fs::FileExt::write_all_at(of.file(), &bytes, of.start() + page * P).unwrap();
    }
    let pager = world.start(ZeroSource, PagerConfig::default());
    for page in (0..PAGES).step_by(3) {
        assert_eq!(world.read(page), expected(page));
    }
    assert!(pager.stats().minor > 0);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    let before = pager.stats().minor;
    for page in 0..PAGES {
        assert_eq!(world.read(page), expected(page));
    }
    assert_eq!(pager.stats().minor, before);
}

#[test]
fn of_missing_and_minor_faults_each_page_is_what_the_page_cache_has_or_else_the_source() {
    const PAGES: u64 = 256;
    let cached = |page: u64| page % 16 < 5;
    for workers in [1, 2] {
        let world = World::new(&Backing::memfd(PAGES * P), Modes::MISSING | Modes::MINOR);
        let of = world.memory.file().unwrap();
        for page in (0..PAGES).filter(|page| cached(*page)) {
            let at = of.start() + page * P;
            std::os::unix::fs::FileExt::write_all_at(of.file(), &[0xee; P as usize], at).unwrap();
        }
        let config = PagerConfig {
            workers,
            ..PagerConfig::default()
        };
        let pager = world.start(Keyed, config);
        let expected = |page| match cached(page) {
            true => [0xeeee_eeee_eeee_eeee; 2],
            false => expected(page),
        };
        // In a row, so that the windows of minor faults reach beyond what is cached.
        for page in 0..PAGES / 2 {
            assert_eq!(world.read(page), expected(page), "page {page}");
        }
        assert!(pager.stats().minor > 0);
        pager.prefetch_rest();
        assert!(pager.wait(LONG));
        for page in 0..PAGES {
            assert_eq!(world.read(page), expected(page), "page {page}");
        }
        assert_eq!(pager.progress().lost, 0);
    }
}

#[test]
fn what_is_touched_comes_from_a_peer_whose_connections_break_again_and_again() {
    let server = PageServer::new(Arc::new(Keyed), ServerConfig::default());
    let (server, count) = (Arc::new(server), AtomicU64::new(0));
    let connect = move |_| {
        let (ours, theirs) = fake::pair();
        // Relaxed: a number that orders nothing else.
        let number = count.fetch_add(1, Ordering::Relaxed);
        theirs.break_after(32 + next(&mut (number + 77)) % 300_000);
        let server = Arc::clone(&server);
        thread::spawn(move || server.serve(&theirs).ok());
        Ok(Box::new(ours) as Box<dyn Wire>)
    };
    let limits = PeerConfig {
        tries: 1000,
        ..PeerConfig::default()
    };
    let source = Arc::new(PeerSource::connect(connect, limits).unwrap());
    let world = World::new(&Backing::memfd(1024 * P), Modes::MISSING);
    let slot = PagedSlot::new(&world.registration, Gfn(0), source.clone()).unwrap();
    let config = PagerConfig {
        workers: 2,
        deadline: LONG,
        give_up: GiveUp::Tell,
        ..PagerConfig::default()
    };
    let pager = Pager::start(&world.uffd, vec![slot], config).unwrap();
    thread::scope(|scope| {
        for vcpu in 0..4u64 {
            let start = world.memory.host();
            scope.spawn(move || {
                let mut seed = vcpu + 1;
                for _ in 0..400 {
                    let page = next(&mut seed) % 1024;
                    assert_eq!(read(start, page), expected(page), "page {page}");
                }
            });
        }
        pager.prefetch_rest();
    });
    assert!(pager.wait(LONG));
    for page in 0..1024 {
        assert_eq!(world.read(page), expected(page), "page {page}");
    }
    assert!(source.stats().connections > 5, "{:?}", source.stats());
    assert_eq!(pager.progress().lost, 0);
}
