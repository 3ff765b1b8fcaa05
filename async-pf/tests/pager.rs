// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pager's promises on a fake kernel: whatever a source or an ioctl answers, whoever waits goes on, and nothing is
//! fetched twice, forgotten or left running.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::pager::{
    GiveUp, Lost, LostReason, PagedSlot, Pager, PagerConfig, PagerEvents, PrefetchError, StartError,
};
use async_pf::working_set::Recorder;
use async_pf::{
    CompositeSource, Fetched, FilePiece, FileSource, Lane, PageSource, SourceError, ZeroSource,
};
use memslots::uffd::fake::{FakeUffd, Touch};
use memslots::uffd::{
    Call, Fault, FaultKind, Features, Message, Modes, Registration, Uffd, encode,
};
use memslots::{Backing, Errno, Gfn, Hva, Mapping, PAGE_SIZE};
use vm_memory::GuestAddress;

const P: u64 = PAGE_SIZE;
const PAGES: u64 = 64;
const ALL: Features = Features::from_bits(0x1ffff);
/// Nothing here takes this long; what hangs fails in the end.
const LONG: Duration = Duration::from_secs(30);

struct World {
    fake: FakeUffd,
    uffd: Uffd,
    memory: Arc<Mapping>,
    registration: Registration,
}

impl World {
    fn new() -> Self {
        Self::with(ALL, Modes::MISSING | Modes::WRITE_PROTECT)
    }

    fn with(available: Features, modes: Modes) -> Self {
        let fake = FakeUffd::new(available);
        let uffd = Uffd::on(|| fake.open(), Features::EVENT_REMOVE, Features::NONE).unwrap();
        let memory = Mapping::new(&Backing::anonymous(PAGES * P), GuestAddress(0)).unwrap();
        let memory = Arc::new(memory);
        let registration = uffd.register_all(&memory, modes).unwrap();
        Self {
            fake,
            uffd,
            memory,
            registration,
        }
    }

    fn slot(&self, source: impl PageSource + 'static) -> PagedSlot {
        PagedSlot::new(&self.registration, Gfn(0x100), Arc::new(source)).unwrap()
    }

    fn start(&self, source: impl PageSource + 'static, config: PagerConfig) -> Pager {
        Pager::start(&self.uffd, vec![self.slot(source)], config).unwrap()
    }

    fn at(&self, page: u64) -> Hva {
        Hva(self.memory.host().0 + (page * P) as usize)
    }

    fn byte(&self, page: u64) -> u8 {
        // SAFETY: within the mapping; read volatile, as another thread fills it.
        unsafe { (self.at(page).0 as *const u8).read_volatile() }
    }

    fn count(&self, call: Call) -> usize {
        let calls = self.fake.calls();
        calls.iter().filter(|(made, _)| *made == call).count()
    }

    /// Someone touches the page and waits until it is there, or poisoned.
    fn touch(&self, page: u64) -> Touch {
        until("the page is served", || {
            let touch = self.fake.touch(self.at(page), false);
            (touch != Touch::Sleeps).then_some(touch)
        })
    }

    fn wakes_all(&self) {
        until("nobody sleeps", || {
            self.fake.asleep().is_empty().then_some(())
        });
    }
}

/// Looks until there is something. No sleep decides a test: only one that would fail takes long.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < LONG, "waited in vain until {what}");
        thread::yield_now();
    }
}

/// Each page is full of its number's low byte; counts what is asked of it, and fails as it is told.
#[derive(Clone, Default)]
struct Scripted {
    shared: Arc<Script>,
}

#[derive(Default)]
struct Script {
    /// How often a page is still to fail, and whether that passes.
    failing: Mutex<HashMap<u64, (u32, bool)>>,
    asked: Mutex<Vec<(u64, u64)>>,
}

impl Scripted {
    fn fail(self, gfn: u64, times: u32, transient: bool) -> Self {
        let mut failing = self.shared.failing.lock().unwrap();
        failing.insert(gfn, (times, transient));
        drop(failing);
        self
    }

    fn asked(&self) -> Vec<(u64, u64)> {
        self.shared.asked.lock().unwrap().clone()
    }
}

impl PageSource for Scripted {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let pages = into.len() as u64 / P;
        self.shared.asked.lock().unwrap().push((first.0, pages));
        for (gfn, page) in (first.0..).zip(into.chunks_mut(P as usize)) {
            page.fill(gfn as u8);
            let mut failing = self.shared.failing.lock().unwrap();
            let Some((times, transient)) = failing.get_mut(&gfn) else {
                continue;
            };
            if *times == 0 {
                continue;
            }
            *times -= 1;
            return Err(match transient {
                true => SourceError::Read {
                    gfn: Gfn(gfn),
                    offset: 0,
                    want: 4096,
                    source: io::Error::from_raw_os_error(libc::EIO),
                },
                false => SourceError::NoSuchPage { gfn: Gfn(gfn) },
            });
        }
        Ok(Fetched::Bytes)
    }
}

#[derive(Default)]
struct Told {
    lost: Mutex<Vec<(u64, String)>>,
    protected: AtomicUsize,
    removed: Mutex<Vec<std::ops::Range<usize>>>,
    remapped: Mutex<Vec<(Hva, Hva, u64)>>,
    failed: Mutex<Vec<Errno>>,
}

impl PagerEvents for Told {
    fn lost(&self, lost: &Lost<'_>) {
        let told = (lost.gfn.0, lost.reason.to_string());
        self.lost.lock().unwrap().push(told);
    }

    fn removed(&self, addresses: std::ops::Range<usize>) {
        self.removed.lock().unwrap().push(addresses);
    }

    fn remapped(&self, from: Hva, to: Hva, size: u64) {
        self.remapped.lock().unwrap().push((from, to, size));
    }

    fn failed(&self, errno: Errno) {
        self.failed.lock().unwrap().push(errno);
    }

    fn write_protected(&self, _: &Fault) -> bool {
        // Relaxed: a number that orders nothing else. The first answer is "not yet".
        self.protected.fetch_add(1, Ordering::Relaxed) > 0
    }
}

fn quick() -> PagerConfig {
    PagerConfig {
        backoff: Duration::from_micros(100),
        ..PagerConfig::default()
    }
}

#[test]
fn whatever_an_ioctl_answers_once_everybody_goes_on_and_everything_comes() {
    const ERRNOS: [i32; 9] = [
        libc::EEXIST,
        libc::EAGAIN,
        libc::ENOENT,
        libc::ESRCH,
        libc::ENOMEM,
        libc::ENOSPC,
        libc::EFAULT,
        libc::EBUSY,
        libc::EINVAL,
    ];
    for errno in ERRNOS {
        for after in 0..6 {
            for workers in [1, 2] {
                let world = World::new();
                let pager = world.start(Scripted::default(), PagerConfig { workers, ..quick() });
                world.fake.fail(after, Errno(errno));
                for page in [5, 6, 7, 8, 40] {
                    world.fake.touch(world.at(page), false);
                }
                pager.prefetch_rest();
                let what = format!("{errno} after {after} with {workers}");
                assert!(pager.wait(LONG), "{what}");
                let progress = pager.progress();
                assert_eq!((progress.missing, progress.failed), (0, None));
                assert_eq!(pager.finish().unwrap().len(), 1);
                // Then there is nobody any more who could sleep or read.
                if errno == libc::ESRCH {
                    continue;
                }
                world.wakes_all();
                let (mut lost, mut believed) = (0, 0);
                for page in 0..PAGES {
                    match world.fake.touch(world.at(page), false) {
                        Touch::Done if world.byte(page) == page as u8 => {}
                        Touch::Poisoned => lost += 1,
                        // The kernel said that there was one, and is taken at its word. A fault whose message was read behind
                        // that is one on a page that was given back since, for all that the pager knows, and has zeros.
                        Touch::Sleeps if errno == libc::EEXIST => believed += 1,
                        Touch::Done if errno == libc::EEXIST && world.byte(page) == 0 => {
                            believed += 1;
                        }
                        other => {
                            panic!("page {page} is {other:?} with {}: {what}", world.byte(page))
                        }
                    }
                }
                assert_eq!(lost, progress.lost, "{what}");
                assert!(believed <= 1, "{believed} pages for one answer: {what}");
            }
        }
    }
}

#[test]
fn what_lies_in_two_mappings_of_the_kernel_comes_and_is_poisoned_on_both_sides() {
    let world = World::new();
    let config = PagerConfig {
        window: P,
        ..quick()
    };
    let pager = world.start(Scripted::default(), config);
    world.fake.split(world.at(8));
    world.fake.split(world.at(9));
    pager.prefetch(0, Gfn(0x104)..Gfn(0x10c)).unwrap();
    until("they are settled", || {
        (pager.progress().missing == PAGES - 8).then_some(())
    });
    assert_eq!((pager.stats().placed, pager.progress().lost), (8, 0));
    for page in 4..12 {
        assert_eq!(world.touch(page), Touch::Done, "page {page}");
        assert_eq!(world.byte(page), page as u8);
    }
    for page in [20, 33, 50] {
        world.fake.split(world.at(page));
    }
    drop(pager);
    for page in (0..4).chain(12..PAGES) {
        assert_eq!(world.touch(page), Touch::Poisoned, "page {page}");
    }
}

#[test]
fn a_page_that_is_not_registered_any_more_is_lost_alone_and_never_there() {
    let world = World::new();
    let told = Arc::new(Told::default());
    let config = PagerConfig {
        events: told.clone(),
        ..quick()
    };
    let pager = world.start(Scripted::default(), config);
    world.fake.fail(0, Errno(libc::ENOENT));
    assert_eq!(world.touch(4), Touch::Poisoned);
    assert_eq!((world.touch(5), world.byte(5)), (Touch::Done, 5));
    let lost = told.lost.lock().unwrap().clone();
    assert_eq!((lost.len(), lost[0].0), (1, 0x104));
    assert!(lost[0].1.contains("not registered any more"), "{lost:?}");
    assert_eq!(pager.progress().lost, 1);
}

#[test]
fn an_operation_that_stops_halfway_goes_on_where_it_stopped() {
    let world = World::new();
    let source = Scripted::default();
    let pager = world.start(source.clone(), quick());
    world.fake.do_partly(0, 3 * P);
    pager.prefetch(0, Gfn(0x100)..Gfn(0x110)).unwrap();
    until("they are placed", || {
        (pager.stats().placed == 16).then_some(())
    });
    assert_eq!(source.asked(), [(0x100, 16)]);
    assert_eq!(world.byte(15), 0x0f);
}

#[test]
fn a_failure_that_passes_is_tried_again_and_one_that_stays_poisons_its_page_alone() {
    let world = World::new();
    let source = Scripted::default()
        .fail(0x103, 3, true)
        .fail(0x105, u32::MAX, true)
        .fail(0x109, 1, false);
    let told = Arc::new(Told::default());
    let pager = world.start(
        source,
        PagerConfig {
            events: told.clone(),
            retries: Some(5),
            longest_backoff: Duration::from_millis(1),
            ..quick()
        },
    );
    assert_eq!((world.touch(3), world.byte(3)), (Touch::Done, 3));
    assert_eq!(pager.stats().retries, 3);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    for page in 0..PAGES {
        let expected = match page {
            5 | 9 => Touch::Poisoned,
            _ => Touch::Done,
        };
        assert_eq!(world.touch(page), expected, "page {page}");
        if expected == Touch::Done {
            assert_eq!(world.byte(page), page as u8);
        }
    }
    assert_eq!(pager.progress().lost, 2);
    let mut lost = told.lost.lock().unwrap().clone();
    lost.sort();
    assert_eq!(lost.len(), 2);
    assert!(lost[0].1.contains("gfn 0x105: reading"), "{lost:?}");
    assert_eq!(lost[1], (0x109, "no source has gfn 0x109".into()));
}

/// Away for its first so many fetches.
struct Away(AtomicUsize);

impl PageSource for Away {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        // Relaxed: a number that orders nothing else.
        let left = |left: usize| left.checked_sub(1);
        let order = Ordering::Relaxed;
        if self.0.fetch_update(order, order, left).is_ok() {
            return Err(SourceError::Other {
                gfn: first,
                transient: true,
                source: "it is away".into(),
            });
        }
        into.fill(9);
        Ok(Fetched::Bytes)
    }
}

#[test]
fn a_source_that_is_away_for_a_while_costs_no_page_as_long_as_the_deadline_lets_it() {
    for (workers, backlog) in [(1, 1024), (1, 2), (2, 2)] {
        let world = World::new();
        let told = Arc::new(Told::default());
        let config = PagerConfig {
            workers,
            backlog,
            events: told.clone(),
            ahead: 8 * P,
            longest_backoff: Duration::from_millis(1),
            ..quick()
        };
        // The page that is touched, and each of a piece, far more often than a handful of times.
        let pager = world.start(Away(AtomicUsize::new(20 * 9)), config);
        pager.prefetch_rest();
        assert_eq!((world.touch(7), world.byte(7)), (Touch::Done, 9));
        assert!(pager.wait(LONG));
        assert_eq!((pager.progress().lost, pager.progress().missing), (0, 0));
        assert!(told.lost.lock().unwrap().is_empty());
    }
}

#[test]
fn a_file_that_was_cut_off_poisons_what_it_has_lost() {
    let world = World::new();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![7; (PAGES * P) as usize]).unwrap();
    let piece = FilePiece {
        first: Gfn(0x100),
        pages: PAGES,
        offset: 0,
    };
    let source = FileSource::new(file.try_clone().unwrap(), [piece]).unwrap();
    file.set_len(40 * P + 5).unwrap();
    let pager = world.start(source, quick());
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(pager.progress().lost, PAGES - 40);
    assert_eq!(world.touch(39), Touch::Done);
    assert_eq!(world.touch(40), Touch::Poisoned);
}

/// Panics at one page.
struct Rotten;

impl PageSource for Rotten {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        assert_ne!(first, Gfn(0x102), "this panic is a test's");
        ZeroSource.fetch(first, into)
    }
}

#[test]
fn a_source_that_panics_costs_its_page_and_no_worker() {
    let world = World::new();
    let pager = world.start(Rotten, quick());
    assert_eq!(world.touch(2), Touch::Poisoned);
    assert_eq!(world.touch(3), Touch::Done);
    assert_eq!(pager.stats().lost, 1);
    assert_eq!(
        world.count(Call::Copy),
        0,
        "zeros are placed without a copy"
    );
}

/// Stops in its first fetch until it is let go.
struct Gate {
    inside: Barrier,
    open: Barrier,
    times: AtomicUsize,
}

impl Gate {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            inside: Barrier::new(2),
            open: Barrier::new(2),
            times: AtomicUsize::new(0),
        })
    }
}

struct Gated(Arc<Gate>);

impl PageSource for Gated {
    fn fetch(&self, _: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        // Relaxed: a number that orders nothing else.
        if self.0.times.fetch_add(1, Ordering::Relaxed) == 0 {
            self.0.inside.wait();
            self.0.open.wait();
        }
        into.fill(9);
        Ok(Fetched::Bytes)
    }
}

#[test]
fn two_faults_on_a_page_are_one_fetch() {
    let world = World::new();
    let gate = Gate::new();
    let pager = world.start(
        Gated(gate.clone()),
        PagerConfig {
            workers: 2,
            ..quick()
        },
    );
    assert_eq!(world.fake.touch(world.at(4), false), Touch::Sleeps);
    gate.inside.wait();
    assert_eq!(world.fake.touch(world.at(4), true), Touch::Sleeps);
    until("the second fault is read", || {
        (pager.stats().joined == 1).then_some(())
    });
    gate.open.wait();
    world.wakes_all();
    assert_eq!(gate.times.load(Ordering::Relaxed), 1);
}

#[test]
fn a_fault_overtakes_what_nobody_waits_for() {
    let world = World::new();
    let gate = Gate::new();
    let pager = world.start(
        Gated(gate.clone()),
        PagerConfig {
            ahead: P,
            ..quick()
        },
    );
    pager.prefetch(0, Gfn(0x100)..Gfn(0x120)).unwrap();
    gate.inside.wait();
    assert_eq!(world.fake.touch(world.at(50), false), Touch::Sleeps);
    gate.open.wait();
    world.wakes_all();
    until("all of it has come", || {
        (pager.stats().placed == 33).then_some(())
    });
    let copies: Vec<u64> = world
        .fake
        .calls()
        .into_iter()
        .filter(|(call, _)| *call == Call::Copy)
        .map(|(_, argument)| (argument[0] - world.memory.host().0 as u64) / P)
        .collect();
    let place = copies.iter().position(|page| *page == 50).unwrap();
    assert!(place <= 2, "behind the piece under way: {copies:?}");
}

/// Notes in which lane it is asked for what.
#[derive(Clone, Default)]
struct Lanes(Arc<Mutex<Vec<(u64, Lane)>>>);

impl PageSource for Lanes {
    fn fetch(&self, _: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        panic!("asked without its lane");
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        self.0.lock().unwrap().push((first.0, lane));
        Ok(Fetched::Zero)
    }
}

#[test]
fn a_source_is_told_whether_someone_waits() {
    let world = World::new();
    let lanes = Lanes::default();
    // As a part of another source, too.
    let part: Arc<dyn PageSource> = Arc::new(lanes.clone());
    let all = CompositeSource::new([(Gfn(0x100)..Gfn(0x100 + PAGES), part)]).unwrap();
    let config = PagerConfig {
        ahead: PAGES * P,
        ..quick()
    };
    let pager = world.start(all, config);
    assert_eq!(world.touch(9), Touch::Done);
    pager.prefetch(0, Gfn(0x100)..Gfn(0x101)).unwrap();
    until("the guess has come", || {
        (pager.stats().placed == 2).then_some(())
    });
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    let asked = lanes.0.lock().unwrap();
    let of = |gfn| asked.iter().filter(move |(first, _)| *first == gfn);
    assert!(of(0x109).all(|(_, lane)| *lane == Lane::Fault));
    assert_eq!(of(0x109).count(), 1);
    let others = asked.iter().filter(|(first, _)| *first != 0x109);
    assert!(
        others.clone().all(|(_, lane)| *lane == Lane::Prefetch),
        "{asked:?}"
    );
    assert!(others.count() >= 3);
}

#[test]
fn a_worker_inside_its_source_is_not_waited_for() {
    let world = World::new();
    let gate = Gate::new();
    let pager = world.start(Gated(gate.clone()), quick());
    assert_eq!(world.fake.touch(world.at(4), false), Touch::Sleeps);
    gate.inside.wait();
    drop(pager);
    assert_eq!(
        world.fake.touch(world.at(4), false),
        Touch::Poisoned,
        "nobody hangs"
    );
    let role = world.registration.lend_fill();
    assert!(role.is_ok(), "the next pager can have it");
    gate.open.wait();
    assert_eq!(world.count(Call::Copy), 0, "what comes too late is dropped");
}

#[test]
fn a_page_that_is_late_is_given_up_at_its_deadline_while_every_worker_is_stuck() {
    for give_up in [GiveUp::Poison, GiveUp::Tell] {
        let world = World::new();
        let gate = Gate::new();
        let told = Arc::new(Told::default());
        let deadline = Duration::from_millis(30);
        let pager = world.start(
            Gated(gate.clone()),
            PagerConfig {
                deadline,
                give_up,
                events: told.clone(),
                ..quick()
            },
        );
        // As a guess, or the first could be late before its worker begins.
        pager.prefetch(0, Gfn(0x104)..Gfn(0x105)).unwrap();
        gate.inside.wait();
        // Read by the guard, for nobody else is left.
        assert_eq!(world.fake.touch(world.at(4), false), Touch::Sleeps);
        assert_eq!(world.fake.touch(world.at(20), false), Touch::Sleeps);
        until("both are given up", || {
            (told.lost.lock().unwrap().len() == 2).then_some(())
        });
        let reason = LostReason::Deadline(deadline).to_string();
        let expected = [(0x104, reason.clone()), (0x114, reason)];
        assert_eq!(*told.lost.lock().unwrap(), expected);
        if give_up == GiveUp::Poison {
            assert_eq!(world.touch(4), Touch::Poisoned);
            assert_eq!(world.touch(20), Touch::Poisoned);
            world.wakes_all();
        } else {
            assert_eq!(world.fake.asleep().len(), 2, "the machine is to be stopped");
        }
        gate.open.wait();
        drop(pager);
        world.wakes_all();
    }
}

/// The guard's thread, to be looked at from outside.
#[derive(Clone, Default)]
struct Guard(Arc<AtomicI32>);

impl Guard {
    /// Threads of this pager say which is the guard's.
    fn of(&self, config: PagerConfig) -> PagerConfig {
        let tid = Arc::clone(&self.0);
        PagerConfig {
            spawn: Arc::new(move |name, run| {
                let (tid, guard) = (Arc::clone(&tid), name == "pager-guard");
                let run = move || {
                    if guard {
                        // SAFETY: a number of the caller's own thread.
                        tid.store(unsafe { libc::gettid() }, Ordering::Release);
                    }
                    run();
                };
                thread::Builder::new().name(name).spawn(run).map(drop)
            }),
            ..config
        }
    }

    /// Waits until it has not gone to sleep anew for longer than it takes between two looks (2 ms), by much.
    fn sleeps(&self) {
        let switches = || {
            let tid = self.0.load(Ordering::Acquire);
            let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).ok()?;
            let line = status.lines().find(|l| l.starts_with("voluntary_ctxt"))?;
            line.rsplit('\t').next()?.parse::<u64>().ok()
        };
        let mut last = (switches(), Instant::now());
        until("the guard sleeps", || {
            let now = switches();
            if now.is_none() || now != last.0 {
                last = (now, Instant::now());
            }
            (last.1.elapsed() > Duration::from_millis(60)).then_some(())
        });
    }
}

/// Stops at the first fetch of one page until it is let go, and fails then, but not for good.
struct Falters(Arc<Gate>, u64);

impl PageSource for Falters {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        // Relaxed: a number that orders nothing else.
        if first.0 == self.1 && self.0.times.fetch_add(1, Ordering::Relaxed) == 0 {
            self.0.inside.wait();
            self.0.open.wait();
            return Err(SourceError::Other {
                gfn: first,
                transient: true,
                source: "it was away".into(),
            });
        }
        into.fill(9);
        Ok(Fetched::Bytes)
    }
}

#[test]
fn a_page_that_is_being_placed_at_its_deadline_has_come_and_nobody_is_told_that_it_is_lost() {
    for give_up in [GiveUp::Poison, GiveUp::Tell] {
        let world = World::new();
        let told = Arc::new(Told::default());
        // Far more than it takes to begin to place it.
        let deadline = Duration::from_millis(400);
        let config = PagerConfig {
            deadline,
            give_up,
            events: told.clone(),
            ..quick()
        };
        let events = told.clone();
        // Inside the kernel until long after the deadline: whoever would tell has had the time to.
        world.fake.before(Call::Copy, move || {
            let begun = Instant::now();
            while events.lost.lock().unwrap().is_empty() && begun.elapsed() < 2 * deadline {
                thread::yield_now();
            }
        });
        let pager = world.start(Scripted::default(), config);
        assert_eq!(world.fake.touch(world.at(4), false), Touch::Sleeps);
        world.wakes_all();
        until("it is noted", || (pager.stats().placed == 1).then_some(()));
        assert_eq!((world.touch(4), world.byte(4)), (Touch::Done, 4));
        assert_eq!(
            (pager.stats().lost, told.lost.lock().unwrap().len()),
            (0, 0)
        );
        assert_eq!((world.touch(5), world.byte(5)), (Touch::Done, 5));
    }
}

#[test]
fn a_late_page_that_there_is_has_come() {
    let (world, gate) = (World::with(ALL, Modes::MISSING), Gate::new());
    let told = Arc::new(Told::default());
    let config = PagerConfig {
        deadline: Duration::from_millis(20),
        events: told.clone(),
        ..quick()
    };
    let pager = world.start(Gated(gate.clone()), config);
    world.fake.fail_next(Call::Poison, Errno(libc::EEXIST));
    assert_eq!(world.fake.touch(world.at(4), false), Touch::Sleeps);
    gate.inside.wait();
    world.wakes_all();
    until("it counts", || {
        (pager.progress().missing == PAGES - 1).then_some(())
    });
    assert_eq!(
        (pager.progress().lost, told.lost.lock().unwrap().len()),
        (0, 0)
    );
    gate.open.wait();
}

#[test]
fn a_page_under_way_that_is_touched_while_the_guard_sleeps_is_given_up_at_its_deadline() {
    for workers in [1, 2] {
        let (world, gate, guard) = (World::new(), Gate::new(), Guard::default());
        let config = PagerConfig {
            workers,
            deadline: Duration::from_millis(30),
            ..quick()
        };
        let pager = world.start(Gated(gate.clone()), guard.of(config));
        pager.prefetch(0, Gfn(0x104)..Gfn(0x105)).unwrap();
        gate.inside.wait();
        if workers == 2 {
            guard.sleeps();
        }
        assert_eq!(world.fake.touch(world.at(4), false), Touch::Sleeps);
        world.wakes_all();
        assert_eq!(world.touch(4), Touch::Poisoned);
        assert_eq!((pager.stats().joined, pager.stats().lost), (1, 1));
        gate.open.wait();
    }
}

#[test]
fn a_fetch_that_fails_while_the_guard_sleeps_is_tried_again_long_before_its_deadline() {
    let (world, gate, guard) = (World::new(), Gate::new(), Guard::default());
    let config = PagerConfig {
        workers: 2,
        deadline: Duration::MAX,
        ..quick()
    };
    let pager = world.start(Falters(gate.clone(), 0x104), guard.of(config));
    assert_eq!(world.fake.touch(world.at(4), false), Touch::Sleeps);
    gate.inside.wait();
    guard.sleeps();
    gate.open.wait();
    world.wakes_all();
    assert_eq!((world.touch(4), world.byte(4)), (Touch::Done, 9));
    assert_eq!((pager.stats().retries, pager.stats().lost), (1, 0));
}

#[test]
fn the_last_of_the_rest_that_fails_while_the_guard_sleeps_is_tried_again() {
    let (world, gate, guard) = (World::new(), Gate::new(), Guard::default());
    let config = PagerConfig {
        workers: 2,
        ahead: P,
        longest_backoff: Duration::from_millis(1),
        ..quick()
    };
    let pager = world.start(Falters(gate.clone(), 0x100 + PAGES - 1), guard.of(config));
    pager.prefetch_rest();
    gate.inside.wait();
    guard.sleeps();
    gate.open.wait();
    assert!(pager.wait(LONG), "{:?}", pager.progress());
    assert_eq!(pager.progress().lost, 0);
}

#[test]
fn a_thread_that_cannot_be_made_is_an_error_and_leaves_nothing_behind() {
    for failing in 0..3 {
        let world = World::new();
        let (made, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counting, ending) = (made.clone(), ended.clone());
        let config = PagerConfig {
            workers: 2,
            spawn: Arc::new(move |name, run| {
                // SeqCst: a test's counters.
                if counting.fetch_add(1, Ordering::SeqCst) == failing {
                    return Err(io::Error::from_raw_os_error(libc::EAGAIN));
                }
                let ending = ending.clone();
                let run = move || {
                    run();
                    ending.fetch_add(1, Ordering::SeqCst);
                };
                thread::Builder::new().name(name).spawn(run).map(drop)
            }),
            ..quick()
        };
        let slot = world.slot(ZeroSource);
        let error = Pager::start(&world.uffd, vec![slot], config).unwrap_err();
        assert!(matches!(error, StartError::Thread { .. }), "{error}");
        until("its threads have ended", || {
            (ended.load(Ordering::SeqCst) == failing).then_some(())
        });
        assert!(world.registration.lend_fill().is_ok());
        assert_eq!(world.count(Call::Poison), 0, "nothing was promised yet");
    }
}

#[test]
fn what_is_given_back_comes_as_zeros_and_is_not_fetched() {
    let world = World::new();
    let source = Scripted::default();
    let pager = world.start(source.clone(), quick());
    let range = world.at(8).0..world.at(16).0;
    world.fake.tell(encode(&Message::Remove(range)));
    until("it is noted", || (pager.stats().removed == 8).then_some(()));
    assert_eq!(world.touch(9), Touch::Done);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    let brought =
        |(first, pages): &(u64, u64)| (*first..first + pages).any(|g| (0x108..0x110).contains(&g));
    assert!(!source.asked().iter().any(brought), "{:?}", source.asked());
    assert_eq!(pager.stats().zeros, 1);
}

#[test]
fn what_is_given_back_moved_away_or_unmapped_is_asked_of_no_source_and_its_owner_is_told_of_two_of_these()
 {
    for workers in [1, 2] {
        let world = World::new();
        let (source, told) = (Scripted::default(), Arc::new(Told::default()));
        let config = PagerConfig {
            workers,
            events: told.clone(),
            ..quick()
        };
        let pager = world.start(source.clone(), config);
        let at = |page| world.at(page).0;
        let (to, size) = (Hva(0x7000_0000), 4 * P);
        world.fake.tell(encode(&Message::Remove(at(4)..at(8))));
        let from = world.at(12);
        world.fake.tell(encode(&Message::Remap { from, to, size }));
        world.fake.tell(encode(&Message::Unmap(at(20)..at(24))));
        until("they are noted", || {
            (pager.stats().removed == 12).then_some(())
        });
        until("its owner is told", || {
            let removed = told.removed.lock().unwrap().clone();
            let remapped = told.remapped.lock().unwrap().clone();
            (removed.first() == Some(&(at(4)..at(8))) && remapped == [(from, to, size)])
                .then_some(())
        });
        pager.prefetch_rest();
        assert!(pager.wait(LONG));
        let gone = |gfn: u64| matches!(gfn - 0x100, 4..8 | 12..16 | 20..24);
        let asked = source.asked();
        assert!(
            !asked
                .iter()
                .any(|(first, pages)| (*first..first + pages).any(gone)),
            "{asked:?}"
        );
        assert_eq!((world.touch(8), world.byte(8)), (Touch::Done, 8));
        assert_eq!(pager.progress().lost, 0);
        pager.finish().unwrap();
    }
}

#[test]
fn a_childs_memory_is_none_of_its_pagers_and_faults_go_on() {
    let world = World::new();
    let pager = world.start(Scripted::default(), quick());
    world.fake.tell(encode(&Message::Fork { descriptor: 99 }));
    assert_eq!((world.touch(3), world.byte(3)), (Touch::Done, 3));
    assert_eq!(pager.progress().failed, None);
}

#[test]
fn a_kernel_that_cannot_be_read_ends_the_pager_its_owner_is_told_once_and_nobody_sleeps() {
    for (workers, give_up) in [(1, GiveUp::Poison), (2, GiveUp::Poison), (2, GiveUp::Tell)] {
        let world = World::new();
        let told = Arc::new(Told::default());
        let config = PagerConfig {
            workers,
            give_up,
            events: told.clone(),
            ..quick()
        };
        let pager = world.start(Scripted::default(), config);
        assert_eq!((world.touch(3), world.byte(3)), (Touch::Done, 3));
        let errno = Errno(libc::EIO);
        world.fake.fail_reads(errno);
        assert_eq!(world.fake.touch(world.at(40), false), Touch::Sleeps);
        world.wakes_all();
        until("its owner is told", || {
            (*told.failed.lock().unwrap() == [errno]).then_some(())
        });
        assert_eq!(pager.progress().failed, Some(errno));
        assert!(!pager.wait(LONG), "nothing more comes");
        // What is not poisoned is for whoever reads next.
        let expected = match give_up {
            GiveUp::Poison => Touch::Poisoned,
            _ => Touch::Sleeps,
        };
        for page in [0, 40, 63] {
            assert_eq!(world.fake.touch(world.at(page), false), expected);
        }
        assert_eq!(world.fake.touch(world.at(3), false), Touch::Done);
        drop(pager);
        assert_eq!(*told.failed.lock().unwrap(), [errno]);
    }
}

#[test]
fn a_page_that_was_given_back_without_a_word_comes_as_zeros() {
    let world = World::new();
    let pager = world.start(Scripted::default(), quick());
    // Once: each touch of a page that is not there is another message.
    assert_eq!(world.fake.touch(world.at(3), false), Touch::Sleeps);
    until("it has come", || (pager.stats().placed == 1).then_some(()));
    // Of a fault on a page that it has placed, the pager only knows that there was one.
    let fault = Fault {
        address: world.at(3),
        kind: FaultKind::Missing,
        write: false,
        thread: 0,
    };
    world.fake.tell(encode(&Message::Fault(fault)));
    until("it is answered", || {
        (world.count(Call::ZeroPage) == 1 && world.count(Call::Wake) == 1).then_some(())
    });
    assert_eq!(pager.stats().late, 1);
    assert_eq!(world.byte(3), 3, "it was there: whoever waited is woken");
}

#[test]
fn write_protect_faults_go_to_who_protects_until_they_are_answered() {
    let world = World::new();
    let told = Arc::new(Told::default());
    let pager = world.start(
        Scripted::default(),
        PagerConfig {
            events: told.clone(),
            ..quick()
        },
    );
    assert_eq!(world.touch(3), Touch::Done);
    let role = world.registration.lend_protect().unwrap();
    role.protect(0..PAGES * P).unwrap();
    assert_eq!(world.fake.touch(world.at(3), true), Touch::Sleeps);
    until("it is told of twice", || {
        (told.protected.load(Ordering::Relaxed) == 2).then_some(())
    });
    assert_eq!(world.touch(4), Touch::Done);
    assert_eq!(
        world.fake.page(world.at(4)),
        Some(true),
        "it came protected"
    );
    assert_eq!(pager.stats().protected, 1);
}

#[test]
fn bad_requests_are_refused_with_their_values_and_change_nothing() {
    let world = World::new();
    let start = |slots, config| Pager::start(&world.uffd, slots, config).unwrap_err();
    assert!(matches!(start(vec![], quick()), StartError::NoSlot));
    let second = {
        let _first = world.slot(ZeroSource);
        PagedSlot::new(&world.registration, Gfn(0), Arc::new(ZeroSource)).unwrap_err()
    };
    assert!(matches!(second, StartError::Lend(_)));
    let far = Gfn(u64::MAX - 5);
    let wraps = PagedSlot::new(&world.registration, far, Arc::new(ZeroSource)).unwrap_err();
    assert!(matches!(wraps, StartError::Wraps { pages: PAGES, .. }));
    let old = World::with(Features::from_bits(0x1fff), Modes::MISSING);
    let slot = vec![old.slot(ZeroSource)];
    let error = Pager::start(&old.uffd, slot, quick()).unwrap_err();
    assert!(error.to_string().contains("POISON (Linux 6.6)"), "{error}");

    let gate = Gate::new();
    let config = PagerConfig {
        backlog: 2,
        ..quick()
    };
    let pager = world.start(Gated(gate.clone()), config);
    assert_eq!(
        pager.prefetch(1, Gfn(0x100)..Gfn(0x101)),
        Err(PrefetchError::NoSlot { slot: 1, slots: 1 })
    );
    for (start, end) in [(0xff, 0x101), (0x13f, 0x141), (0x105, 0x104)] {
        let error = pager.prefetch(0, Gfn(start)..Gfn(end)).unwrap_err();
        assert!(matches!(error, PrefetchError::OutOfRange { .. }), "{error}");
    }
    assert_eq!(pager.prefetch(0, Gfn(0x100)..Gfn(0x100)), Ok(()));
    pager.prefetch(0, Gfn(0x100)..Gfn(0x101)).unwrap();
    gate.inside.wait();
    for page in 0x110..0x112 {
        pager.prefetch(0, Gfn(page)..Gfn(page + 1)).unwrap();
    }
    assert_eq!(
        pager.prefetch(0, Gfn(0x120)..Gfn(0x121)),
        Err(PrefetchError::Backlog { bound: 2 })
    );
    gate.open.wait();
    until("they have come", || {
        (pager.progress().missing == PAGES - 3).then_some(())
    });
    let unfinished = pager.finish().unwrap_err();
    assert_eq!(unfinished.to_string(), "61 pages are still to come");
    assert!(!unfinished.pager.wait(Duration::ZERO));
    unfinished.pager.prefetch_rest();
    assert!(unfinished.pager.wait(LONG), "it goes on");
}

#[test]
fn what_someone_faulted_on_is_recorded_and_what_came_before_is_not() {
    let world = World::new();
    let record = Arc::new(Recorder::new(Gfn(0), 0x200, 64, [7; 16]).unwrap());
    let config = PagerConfig {
        record: Some(Arc::clone(&record)),
        window: P,
        ..PagerConfig::default()
    };
    let pager = world.start(Scripted::default(), config);
    pager.prefetch(0, Gfn(0x110)..Gfn(0x112)).unwrap();
    until("it is there", || {
        (pager.progress().missing == PAGES - 2).then_some(())
    });
    for page in [9, 0x10, 3, 9] {
        assert!(matches!(world.touch(page), Touch::Done));
    }
    let order: Vec<_> = record.so_far().order().map(|gfn| gfn.0).collect();
    assert_eq!(order, [0x109, 0x103]);
}

#[test]
fn a_pager_that_is_closed_by_one_owner_poisons_what_is_missing_and_waits_no_more_for_another() {
    let world = World::new();
    let pager = Arc::new(world.start(Scripted::default(), PagerConfig::default()));
    let waits = Arc::clone(&pager);
    let waits = thread::spawn(move || waits.wait(LONG));
    pager.close();
    assert!(!waits.join().unwrap(), "all of it came");
    assert!(!pager.wait(LONG), "for who comes late as well");
    assert!(matches!(world.touch(5), Touch::Poisoned));
    pager.close();
}

/// Ends its pager as soon as two pages are lost.
#[derive(Default)]
struct Ends {
    pager: Mutex<Option<Arc<Pager>>>,
    lost: AtomicUsize,
    ended: AtomicUsize,
}

impl PagerEvents for Ends {
    fn lost(&self, _: &Lost<'_>) {
        // SeqCst: a test's counters.
        self.lost.fetch_add(1, Ordering::SeqCst);
        until("both are lost, and the pager is known", || {
            let known = self.pager.lock().unwrap().is_some();
            (known && self.lost.load(Ordering::SeqCst) >= 2).then_some(())
        });
        let pager = self.pager.lock().unwrap().clone();
        if let Some(pager) = pager {
            pager.close();
        }
        self.ended.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn calls_of_a_pagers_own_threads_may_end_it_two_at_once_too() {
    let world = World::new();
    let events = Arc::new(Ends::default());
    let source = Scripted::default()
        .fail(0x103, 1, false)
        .fail(0x120, 1, false);
    let config = PagerConfig {
        workers: 2,
        events: events.clone(),
        ..quick()
    };
    let pager = Arc::new(world.start(source, config));
    *events.pager.lock().unwrap() = Some(Arc::clone(&pager));
    for page in [3, 0x20] {
        assert_eq!(world.fake.touch(world.at(page), false), Touch::Sleeps);
    }
    until("both calls have returned", || {
        (events.ended.load(Ordering::SeqCst) == 2).then_some(())
    });
    world.wakes_all();
    assert_eq!(world.touch(40), Touch::Poisoned);
    assert!(world.registration.lend_fill().is_ok(), "its role is free");
    // From outside it waits for the threads, which end.
    events.pager.lock().unwrap().take();
    pager.close();
}

/// Drops its pager when a page is lost.
#[derive(Default)]
struct Drops(Mutex<Option<Pager>>, AtomicUsize);

impl PagerEvents for Drops {
    fn lost(&self, _: &Lost<'_>) {
        let pager = until("the pager is known", || self.0.lock().unwrap().take());
        drop(pager);
        // SeqCst: a test's counter.
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn the_guards_call_may_drop_the_pager_while_a_worker_is_inside_its_source() {
    let (world, gate) = (World::new(), Gate::new());
    let events = Arc::new(Drops::default());
    let config = PagerConfig {
        deadline: Duration::from_millis(30),
        events: events.clone(),
        ..quick()
    };
    let pager = world.start(Gated(gate.clone()), config);
    *events.0.lock().unwrap() = Some(pager);
    assert_eq!(world.fake.touch(world.at(3), false), Touch::Sleeps);
    gate.inside.wait();
    until("it is dropped", || {
        (events.1.load(Ordering::SeqCst) == 1).then_some(())
    });
    assert_eq!(world.touch(40), Touch::Poisoned);
    gate.open.wait();
}

/// Holds what nobody waits for until it is let go, and of faults each until there are as many as are to come at once.
#[derive(Default)]
struct Crowd {
    faults_at_once: usize,
    /// Inside now, and at most.
    ahead: AtomicUsize,
    most_ahead: AtomicUsize,
    faults: AtomicUsize,
    let_go: AtomicUsize,
}

struct Crowded(Arc<Crowd>);

impl PageSource for Crowded {
    fn fetch(&self, gfn: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, gfn, into)
    }

    // SeqCst: a test's counters.
    fn fetch_for(&self, lane: Lane, _: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        let crowd = &self.0;
        if lane == Lane::Prefetch {
            let inside = crowd.ahead.fetch_add(1, Ordering::SeqCst) + 1;
            crowd.most_ahead.fetch_max(inside, Ordering::SeqCst);
            until("it is let go", || {
                (crowd.let_go.load(Ordering::SeqCst) == 1).then_some(())
            });
            crowd.ahead.fetch_sub(1, Ordering::SeqCst);
        } else {
            crowd.faults.fetch_add(1, Ordering::SeqCst);
            until("the other faults are under way too", || {
                (crowd.faults.load(Ordering::SeqCst) >= crowd.faults_at_once).then_some(())
            });
        }
        Ok(Fetched::Zero)
    }
}

#[test]
fn all_workers_but_two_bring_at_once_what_nobody_waits_for_and_two_faults_are_served_meanwhile() {
    for (workers, ahead, faults_at_once) in [(2, 1, 1), (3, 1, 2), (4, 2, 2), (6, 4, 2)] {
        let world = World::new();
        let crowd = Arc::new(Crowd {
            faults_at_once,
            ..Crowd::default()
        });
        let config = PagerConfig {
            workers,
            ahead: P,
            deadline: LONG,
            ..quick()
        };
        let pager = world.start(Crowded(crowd.clone()), config);
        pager.prefetch_rest();
        until("as many as may are under way", || {
            (crowd.ahead.load(Ordering::SeqCst) == ahead).then_some(())
        });
        // Apart, so that neither comes with the other.
        for page in [20, 60].into_iter().take(faults_at_once) {
            assert_eq!(world.fake.touch(world.at(page), false), Touch::Sleeps);
        }
        world.wakes_all();
        assert_eq!(
            crowd.ahead.load(Ordering::SeqCst),
            ahead,
            "{workers} workers"
        );
        crowd.let_go.store(1, Ordering::SeqCst);
        assert!(pager.wait(LONG));
        assert_eq!(crowd.most_ahead.load(Ordering::SeqCst), ahead);
        assert_eq!(pager.stats().lost, 0);
    }
}

/// Its source ends its pager while another thread is inside a call of this.
#[derive(Default)]
struct EndsInside {
    pager: Mutex<Option<Arc<Pager>>>,
    /// The other thread is in its call.
    called: AtomicUsize,
    /// How many threads have ended, of three.
    over: AtomicUsize,
    order: Mutex<Vec<&'static str>>,
}

struct EndsInsideSource(Arc<EndsInside>);

impl PageSource for EndsInsideSource {
    fn fetch(&self, _: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        let pager = until("the pager is known, and the other is in its call", || {
            // SeqCst: a test's counters.
            let called = self.0.called.load(Ordering::SeqCst) == 1;
            self.0.pager.lock().unwrap().clone().filter(|_| called)
        });
        pager.close();
        self.0.order.lock().unwrap().push("closed");
        Ok(Fetched::Zero)
    }
}

impl PagerEvents for EndsInside {
    fn removed(&self, _: std::ops::Range<usize>) {
        self.called.store(1, Ordering::SeqCst);
        until("the third thread has ended", || {
            (self.over.load(Ordering::SeqCst) >= 1).then_some(())
        });
        // Time for who would not wait for this call; who does, waits longer.
        thread::sleep(Duration::from_millis(50));
        self.order.lock().unwrap().push("told");
    }
}

#[test]
fn a_source_that_ends_its_pager_waits_for_all_other_threads() {
    let world = World::new();
    let ends = Arc::new(EndsInside::default());
    let notes = Arc::clone(&ends);
    let config = PagerConfig {
        workers: 2,
        events: ends.clone(),
        spawn: Arc::new(move |name, run| {
            let notes = Arc::clone(&notes);
            thread::Builder::new().name(name).spawn(move || {
                run();
                notes.over.fetch_add(1, Ordering::SeqCst);
            })?;
            Ok(())
        }),
        ..quick()
    };
    let pager = Arc::new(world.start(EndsInsideSource(ends.clone()), config));
    *ends.pager.lock().unwrap() = Some(pager);
    assert_eq!(world.fake.touch(world.at(3), false), Touch::Sleeps);
    let range = world.at(8).0..world.at(9).0;
    world.fake.tell(encode(&Message::Remove(range)));
    until("it is closed", || {
        (ends.order.lock().unwrap().len() == 2).then_some(())
    });
    assert_eq!(*ends.order.lock().unwrap(), ["told", "closed"]);
    assert_eq!(world.touch(3), Touch::Poisoned);
    ends.pager.lock().unwrap().take();
}

/// Panics at everything.
struct Panics;

impl PagerEvents for Panics {
    fn lost(&self, _: &Lost<'_>) {
        panic!("this panic is a test's");
    }

    fn removed(&self, _: std::ops::Range<usize>) {
        panic!("this panic is a test's");
    }

    fn write_protected(&self, _: &Fault) -> bool {
        panic!("this panic is a test's");
    }
}

#[test]
fn a_panic_of_who_is_told_costs_no_worker_and_not_the_guard() {
    let world = World::new();
    let config = |deadline| PagerConfig {
        events: Arc::new(Panics),
        deadline,
        ..quick()
    };
    // Its one worker's.
    let pager = world.start(Scripted::default().fail(0x103, 1, false), config(LONG));
    assert_eq!(world.touch(3), Touch::Poisoned);
    let range = world.at(8).0..world.at(9).0;
    world.fake.tell(encode(&Message::Remove(range)));
    let role = world.registration.lend_protect().unwrap();
    assert_eq!((world.touch(4), world.byte(4)), (Touch::Done, 4));
    role.protect(0..PAGES * P).unwrap();
    assert_eq!(world.fake.touch(world.at(4), true), Touch::Sleeps);
    until("all three have been told", || {
        (pager.stats().unanswered == 3).then_some(())
    });
    drop(role);
    world.wakes_all();
    assert_eq!((world.touch(20), world.byte(20)), (Touch::Done, 20));
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    drop(pager);

    // The guard's, one after the other: its worker is inside the source.
    let (world, gate) = (World::new(), Gate::new());
    let soon = config(Duration::from_millis(30));
    let pager = world.start(Gated(gate.clone()), soon);
    // As a guess, or the first could be late before its worker begins.
    pager.prefetch(0, Gfn(0x103)..Gfn(0x104)).unwrap();
    gate.inside.wait();
    for page in [3, 30] {
        assert_eq!(world.touch(page), Touch::Poisoned);
    }
    gate.open.wait();
}

/// Panics when it is asked what lies together.
struct Undecided;

impl PageSource for Undecided {
    fn fetch(&self, _: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        into.fill(9);
        Ok(Fetched::Bytes)
    }

    fn run(&self, _: Gfn, _: u64) -> u64 {
        panic!("this panic is a test's");
    }
}

#[test]
fn a_source_that_panics_when_asked_how_much_to_ask_for_is_asked_for_a_page() {
    let world = World::new();
    let pager = world.start(Undecided, quick());
    assert_eq!((world.touch(3), world.byte(3)), (Touch::Done, 9));
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(pager.stats().fetches, PAGES);
}

#[test]
fn a_source_of_ones_own_says_itself_whether_to_ask_again() {
    let of = |transient| SourceError::Other {
        gfn: Gfn(0x1f),
        transient,
        source: "it is gone".into(),
    };
    assert!(of(true).is_transient() && !of(false).is_transient());
    assert_eq!(of(true).to_string(), "gfn 0x1f: it is gone");
}
