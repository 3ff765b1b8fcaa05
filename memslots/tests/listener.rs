// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who mirrors guest memory hears of a change before it, may refuse it, and has let go of memory before it can go.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Backing, ChangeListener, Errno, Error, Layout, LayoutChange, LayoutSlot, Memslots, NewSlot,
    PAGE_SIZE, SlotChange, SlotFlags, Veto,
};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use vm_memory::GuestAddress;

fn slot(page: u64, pages: u64) -> NewSlot {
    NewSlot {
        start: GuestAddress(page * PAGE_SIZE),
        backing: Backing::anonymous(pages * PAGE_SIZE),
        flags: SlotFlags::NONE,
    }
}

type Hook = Box<dyn Fn(&str) + Send + Sync>;

/// An IOMMU: guest address to (size, host address). Refuses what it is told to refuse.
#[derive(Default)]
struct Mirror {
    name: &'static str,
    maps: Mutex<BTreeMap<u64, (u64, usize)>>,
    refuses: AtomicBool,
    /// What was called, in the order of the calls; shared between mirrors.
    log: Arc<Mutex<Vec<String>>>,
    /// Called in each of the calls.
    hook: Mutex<Option<Hook>>,
}

impl Mirror {
    fn new(name: &'static str, log: &Arc<Mutex<Vec<String>>>) -> Arc<Self> {
        let log = Arc::clone(log);
        Arc::new(Self {
            name,
            log,
            ..Self::default()
        })
    }

    fn called(&self, what: &str) {
        self.log
            .lock()
            .unwrap()
            .push(format!("{} {what}", self.name));
        if let Some(hook) = &*self.hook.lock().unwrap() {
            hook(what);
        }
    }

    fn maps(&self) -> BTreeMap<u64, (u64, usize)> {
        self.maps.lock().unwrap().clone()
    }
}

impl Mirror {
    /// As an IOMMU does it: what is mapped already cannot be mapped over.
    fn map(&self, region: &memslots::Region) {
        let extent = region.extent();
        let range = extent.guest_range();
        let mut maps = self.maps.lock().unwrap();
        for (start, (size, _)) in &*maps {
            assert!(start + size <= range.start || range.end <= *start);
        }
        maps.insert(range.start, (extent.size(), extent.host_start().0));
    }

    fn unmap(&self, region: &memslots::Region) {
        let extent = region.extent();
        let known = self.maps.lock().unwrap().remove(&extent.start().0);
        assert_eq!(known, Some((extent.size(), extent.host_start().0)));
        // Still mapped in this process: memory goes after the last listener's call, not before.
        let byte = extent.host_start().0 as *const u8;
        // SAFETY: the slot's first byte, which is what this test is about.
        unsafe { byte.read_volatile() };
    }

    fn has(&self, region: &memslots::Region) -> bool {
        let extent = region.extent();
        let there = self.maps.lock().unwrap().get(&extent.start().0).copied();
        there == Some((extent.size(), extent.host_start().0))
    }
}

impl ChangeListener for Mirror {
    fn prepare(&self, change: &LayoutChange<'_>) -> Result<(), Veto> {
        self.called("prepare");
        if self.refuses.load(Ordering::Relaxed) {
            return Err("no more pinned pages".into());
        }
        let free = change.added().filter(|region| !change.displaces(region));
        free.for_each(|region| self.map(region));
        Ok(())
    }

    fn commit(&self, change: &LayoutChange<'_>) {
        self.called("commit");
        change.removed().for_each(|region| self.unmap(region));
        // What displaced something; or, after a failure that could not be taken back, all of it.
        let left = change.added().filter(|region| !self.has(region));
        left.for_each(|region| self.map(region));
    }

    fn abort(&self, change: &LayoutChange<'_>) {
        self.called("abort");
        let free = change.added().filter(|region| !change.displaces(region));
        free.for_each(|region| self.unmap(region));
    }
}

fn shown(memslots: &Memslots) -> BTreeMap<u64, (u64, usize)> {
    let place = |region: &Arc<memslots::Region>| {
        let extent = region.extent();
        (extent.start().0, (extent.size(), extent.host_start().0))
    };
    memslots.snapshot().regions().map(place).collect()
}

struct World {
    host: FakeHost,
    memslots: Memslots,
    first: Arc<Mirror>,
    second: Arc<Mirror>,
    log: Arc<Mutex<Vec<String>>>,
    _listening: Vec<memslots::Listening>,
}

impl World {
    fn new() -> Self {
        let host = FakeHost::new(16);
        let memslots = Memslots::new(host.clone());
        let layout = Layout::new()
            .with(slot(0, 4).named("a"))
            .with(slot(8, 4).named("b"));
        memslots.set_layout(&layout).unwrap();
        let log = Arc::default();
        let (first, second) = (Mirror::new("first", &log), Mirror::new("second", &log));
        let listening =
            [&first, &second].map(|mirror| memslots.listen(Arc::clone(mirror) as _).unwrap());
        log.lock().unwrap().clear();
        let _listening = listening.into();
        Self {
            host,
            memslots,
            first,
            second,
            log,
            _listening,
        }
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// Moves, removes and adds, three calls.
    fn change(&self) -> Result<(), Error> {
        let layout = Layout::new()
            .with(slot(16, 4).named("a"))
            .with(slot(32, 1).named("c"));
        self.memslots.set_layout(&layout).map(drop)
    }

    fn in_step(&self) {
        assert_eq!(self.first.maps(), shown(&self.memslots));
        assert_eq!(self.second.maps(), shown(&self.memslots));
        // And what readers see, KVM has.
        let kvm = self.host.slots();
        for (start, (size, host)) in shown(&self.memslots) {
            let same = |shape: &memslots::SlotShape| {
                (shape.start.0, shape.size, shape.host.0) == (start, size, host)
            };
            assert!(kvm.iter().any(|(_, shape)| same(shape)));
        }
    }
}

#[test]
fn who_registers_is_told_of_what_there_is_and_of_every_change() {
    let world = World::new();
    world.in_step();
    assert_eq!(world.first.maps().len(), 2);
    world.change().unwrap();
    assert_eq!(
        world.log(),
        [
            "first prepare",
            "second prepare",
            "first commit",
            "second commit"
        ]
    );
    world.in_step();
    let mut owned = world
        .memslots
        .create(
            GuestAddress(1 << 30),
            Backing::memfd(PAGE_SIZE),
            SlotFlags::NONE,
        )
        .unwrap();
    world.in_step();
    owned.relocate(GuestAddress(2 << 30)).unwrap().wait();
    world.in_step();
    drop(owned);
    world.in_step();
    world.log();
    // What changes nothing is no change.
    world.memslots.set_layout(&world.memslots.layout()).unwrap();
    assert!(world.log().is_empty());
}

#[test]
fn a_veto_by_the_second_takes_back_the_first_and_kvm_is_not_asked() {
    let world = World::new();
    let (calls, before, generation) = (
        world.host.calls().len(),
        shown(&world.memslots),
        world.memslots.generation(),
    );
    world.second.refuses.store(true, Ordering::Relaxed);
    let error = world.change().unwrap_err();
    assert_eq!(
        error.to_string(),
        "a listener refused the change: no more pinned pages"
    );
    let Error::Vetoed { source } = error else {
        panic!("{error}")
    };
    assert_eq!(source.to_string(), "no more pinned pages");
    assert_eq!(
        world.log(),
        ["first prepare", "second prepare", "first abort"]
    );
    assert_eq!(
        (world.host.calls().len(), shown(&world.memslots)),
        (calls, before)
    );
    assert_eq!(
        (world.memslots.generation(), world.memslots.available()),
        (generation, 14)
    );
    // Owned slots come under the same veto.
    assert!(world.memslots.create_all([slot(64, 1)]).is_err());
    world.second.refuses.store(false, Ordering::Relaxed);
    world.change().unwrap();
    world.in_step();
}

#[test]
fn a_failure_of_kvm_aborts_all_the_last_first() {
    for failing in 0..3 {
        let world = World::new();
        world.host.fail(failing, Errno(libc::ENOMEM));
        world.change().unwrap_err();
        assert_eq!(
            world.log(),
            [
                "first prepare",
                "second prepare",
                "second abort",
                "first abort"
            ]
        );
        world.in_step();
    }
}

#[test]
fn a_failure_that_cannot_be_taken_back_is_told_as_what_has_become_of_it() {
    let world = World::new();
    // make 32, move 0 to 16, delete 8: the last fails, and the move cannot be taken back.
    world.host.fail(2, Errno(libc::EIO));
    world.host.fail(3, Errno(libc::EIO));
    assert!(matches!(world.change(), Err(Error::Undo { .. })));
    let log = world.log();
    assert_eq!(
        log[2..],
        [
            "second abort",
            "first abort",
            "first commit",
            "second commit"
        ]
    );
    world.in_step();
    assert!(world.first.maps().contains_key(&(16 * PAGE_SIZE)));
}

#[test]
fn removed_memory_is_mapped_until_the_last_listener_has_let_go() {
    let world = World::new();
    // `Mirror::commit` reads a byte of it. Nobody else holds it: no reader, no snapshot.
    world.memslots.set_layout(&Layout::new()).unwrap();
    assert!(world.first.maps().is_empty() && world.second.maps().is_empty());
}

#[test]
fn guest_then_listeners_then_readers_see_a_change() {
    let world = World::new();
    let (memslots, host) = (world.memslots.clone(), world.host.clone());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = Arc::clone(&seen);
    *world.second.hook.lock().unwrap() = Some(Box::new(move |what: &str| {
        let guest = host
            .slots()
            .iter()
            .any(|(_, shape)| shape.start.0 == 32 * PAGE_SIZE);
        let reader = memslots
            .reader()
            .enter()
            .find(GuestAddress(32 * PAGE_SIZE))
            .is_some();
        note.lock().unwrap().push((what.to_owned(), guest, reader));
        // Reading and planning deadlock with nothing, and show the old layout still.
        assert_eq!(memslots.layout().get("c").is_some(), guest);
        assert!(memslots.plan(&Layout::new()).is_ok());
    }));
    world.change().unwrap();
    let seen = seen.lock().unwrap().clone();
    assert_eq!(
        seen,
        [
            ("prepare".to_owned(), false, false),
            ("commit".to_owned(), true, false)
        ]
    );
}

#[test]
fn a_listener_that_changes_the_slots_gets_an_error_and_no_deadlock() {
    let world = World::new();
    let (tell, told) = mpsc::channel();
    let memslots = world.memslots.clone();
    let tell = Mutex::new(tell);
    *world.first.hook.lock().unwrap() = Some(Box::new(move |_: &str| {
        let change = memslots.set_layout(&Layout::new()).map(drop);
        let create = memslots.create_all([slot(64, 1)]).map(drop);
        tell.lock().unwrap().send([change, create]).unwrap();
    }));
    world.change().unwrap();
    for result in told.try_iter().flatten() {
        assert!(matches!(result, Err(Error::InListener)));
    }
    world.in_step();
}

#[test]
fn a_registration_that_is_dropped_ends_when_the_call_at_hand_has_ended() {
    let memslots = Memslots::new(FakeHost::new(4));
    let mirror = Mirror::new("mirror", &Arc::default());
    let listening = memslots.listen(Arc::clone(&mirror) as _).unwrap();
    let (entered, wait) = (mpsc::channel(), mpsc::channel::<()>());
    let (enter, leave) = (Mutex::new(entered.0), Mutex::new(wait.1));
    let over = Arc::new(AtomicBool::new(false));
    let done = Arc::clone(&over);
    *mirror.hook.lock().unwrap() = Some(Box::new(move |what: &str| {
        if what == "commit" {
            enter.lock().unwrap().send(()).unwrap();
            leave.lock().unwrap().recv().unwrap();
            done.store(true, Ordering::SeqCst);
        }
    }));
    thread::scope(|scope| {
        let changer = scope.spawn(|| memslots.create_all([slot(0, 1)]).unwrap());
        entered.1.recv().unwrap();
        let (tell, about_to) = mpsc::channel();
        let dropper = scope.spawn(move || {
            tell.send(()).unwrap();
            drop(listening);
            assert!(
                over.load(Ordering::SeqCst),
                "the call at hand has ended before the drop"
            );
        });
        about_to.recv().unwrap();
        // Time for a drop that would not wait to end, and fail.
        (0..1000).for_each(|_| thread::yield_now());
        wait.0.send(()).unwrap();
        dropper.join().unwrap();
        *mirror.hook.lock().unwrap() = Some(Box::new(|what: &str| panic!("{what} after the end")));
        drop(changer.join().unwrap());
    });
}

#[test]
fn who_refuses_what_there_is_is_not_registered() {
    let world = World::new();
    let mirror = Mirror::new("third", &world.log);
    mirror.refuses.store(true, Ordering::Relaxed);
    assert!(matches!(
        world.memslots.listen(mirror as _),
        Err(Error::Vetoed { .. })
    ));
    assert_eq!(world.log(), ["third prepare"]);
    world.change().unwrap();
    assert!(!world.log().iter().any(|call| call.starts_with("third")));
}

#[test]
fn a_panic_in_prepare_is_as_a_veto_and_one_in_commit_waits_for_the_end() {
    for (when, done) in [("prepare", false), ("commit", true)] {
        let world = World::new();
        let calls = world.host.calls().len();
        *world.second.hook.lock().unwrap() = Some(Box::new(move |what: &str| {
            if what == when {
                panic!("a listener's own");
            }
        }));
        assert!(catch_unwind(AssertUnwindSafe(|| world.change())).is_err());
        assert_eq!(world.host.calls().len() > calls, done);
        assert_eq!(
            world.first.maps(),
            shown(&world.memslots),
            "the other one is in step"
        );
        assert_eq!(shown(&world.memslots).contains_key(&(32 * PAGE_SIZE)), done);
        if !done {
            assert_eq!(
                world.log(),
                ["first prepare", "second prepare", "first abort"]
            );
        }
        // And it goes on.
        world.second.hook.clear_poison();
        *world.second.hook.lock().unwrap() = None;
        world.memslots.create_all([slot(64, 1)]).unwrap();
        assert_eq!(world.first.maps(), shown(&world.memslots));
    }
}

/// Calls back in each of its calls.
struct Calls<F>(F);

impl<F: Fn(&str, &LayoutChange<'_>) + Send + Sync> ChangeListener for Calls<F> {
    fn prepare(&self, change: &LayoutChange<'_>) -> Result<(), Veto> {
        (self.0)("prepare", change);
        Ok(())
    }
    fn commit(&self, change: &LayoutChange<'_>) {
        (self.0)("commit", change);
    }
    fn abort(&self, change: &LayoutChange<'_>) {
        (self.0)("abort", change);
    }
}

/// Panics in the calls of this name, once it is registered.
fn panics_in(call: &'static str) -> Arc<dyn ChangeListener> {
    let registered = AtomicBool::new(false);
    Arc::new(Calls(move |what: &str, _: &LayoutChange<'_>| {
        if registered.fetch_or(what == "commit", Ordering::Relaxed) && what == call {
            panic!("a listener's own");
        }
    }))
}

#[test]
fn a_panic_in_abort_waits_until_all_are_told_and_what_kvm_has_is_published() {
    // The change is taken back; or, with the second number, is not.
    for failures in [2..3, 2..4] {
        let undone = failures.len() == 1;
        let world = World::new();
        let listening = world.memslots.listen(panics_in("abort")).unwrap();
        for call in failures {
            world.host.fail(call, Errno(libc::EIO));
        }
        let before = shown(&world.memslots);
        assert!(catch_unwind(AssertUnwindSafe(|| world.change())).is_err());
        assert_eq!(
            world.log()[2..4],
            ["second abort", "first abort"],
            "the panic was before them"
        );
        world.in_step();
        let kvm = world.host.slots().len();
        world.host.fail_no_more();
        if undone {
            assert_eq!(shown(&world.memslots), before);
            assert_eq!(kvm, before.len());
        }
        drop(listening);
        world.change().unwrap();
        world.in_step();
        assert_eq!(world.host.slots().len(), shown(&world.memslots).len());
    }
}

#[test]
fn slots_that_a_panic_in_commit_keeps_from_their_owner_are_a_part_of_the_layout() {
    let memslots = Memslots::new(FakeHost::new(4));
    let listening = memslots.listen(panics_in("commit")).unwrap();
    let made = catch_unwind(AssertUnwindSafe(|| {
        memslots.create_all([slot(0, 1)]).map(drop)
    }));
    assert!(made.is_err());
    assert_eq!(memslots.layout(), Layout::new().with(slot(0, 1)));
    drop(listening);
    memslots.set_layout(&Layout::new()).unwrap();
    assert_eq!(memslots.snapshot().regions().len(), 0);
}

#[test]
fn a_slot_knows_where_it_is_after_a_panic_in_the_commit_of_its_move() {
    let memslots = Memslots::new(FakeHost::new(4));
    let mut moving = memslots.create_all([slot(0, 1)]).unwrap().pop().unwrap();
    let _listening = memslots.listen(panics_in("commit")).unwrap();
    let to = GuestAddress(8 * PAGE_SIZE);
    let moved = catch_unwind(AssertUnwindSafe(|| moving.relocate(to).map(drop)));
    assert!(moved.is_err());
    assert_eq!(moving.extent().start(), to);
    let seen = memslots.snapshot();
    assert_eq!(
        seen.by_id(moving.extent().id()).unwrap().extent(),
        moving.extent()
    );
}

#[test]
fn a_slot_that_is_dropped_in_a_listeners_call_goes_when_the_change_is_over() {
    for when in ["prepare", "commit", "abort"] {
        let host = FakeHost::new(8);
        let memslots = Memslots::new(host.clone());
        let owned = Arc::new(Mutex::new(None));
        let drops = Arc::clone(&owned);
        let _listening = memslots
            .listen(Arc::new(Calls(move |what: &str, _: &LayoutChange<'_>| {
                if what == when {
                    drop(drops.lock().unwrap().take());
                }
            })))
            .unwrap();
        // The creation is a change itself, at the end of which there is nothing to drop yet.
        *owned.lock().unwrap() = memslots.create_all([slot(0, 1)]).unwrap().pop();
        if when == "abort" {
            host.fail(0, Errno(libc::EIO));
        }
        let made = memslots.set_layout(&Layout::new().with(slot(5, 1)));
        assert_eq!(made.is_ok(), when != "abort");
        assert!(owned.lock().unwrap().is_none());
        let left = usize::from(made.is_ok());
        assert_eq!(memslots.snapshot().regions().len(), left, "{when}");
        assert_eq!(host.slots().len(), left, "{when}");
    }
}

#[test]
fn flags_alone_are_neither_removed_nor_added() {
    struct Flags(Mutex<Vec<SlotFlags>>);
    impl ChangeListener for Flags {
        fn prepare(&self, _: &LayoutChange<'_>) -> Result<(), Veto> {
            Ok(())
        }
        fn commit(&self, change: &LayoutChange<'_>) {
            for slot in change.slots() {
                if let SlotChange::Flags { to, .. } = slot {
                    assert_eq!(change.added().count() + change.removed().count(), 0);
                    self.0.lock().unwrap().push(to.flags());
                }
            }
        }
        fn abort(&self, _: &LayoutChange<'_>) {}
    }
    let memslots = Memslots::new(FakeHost::new(4));
    let flags = Arc::new(Flags(Mutex::default()));
    let _listening = memslots.listen(Arc::clone(&flags) as _).unwrap();
    let mut slot = memslots
        .create(
            GuestAddress(0),
            Backing::anonymous(PAGE_SIZE),
            SlotFlags::NONE,
        )
        .unwrap();
    slot.set_flags(SlotFlags::LOG_DIRTY_PAGES).unwrap().wait();
    assert_eq!(*flags.0.lock().unwrap(), [SlotFlags::LOG_DIRTY_PAGES]);
}

fn layouts() -> impl Strategy<Value = Vec<(usize, u64, u64)>> {
    prop::collection::vec((0..4usize, 0..12u64, 1..4u64), 0..4)
}

/// Slots of four names, those that overlap an earlier one left out.
fn layout(slots: &[(usize, u64, u64)]) -> Layout {
    let mut layout = Layout::new();
    for &(name, page, pages) in slots {
        let new: LayoutSlot = slot(page, pages).named(["a", "b", "c", "d"][name]);
        let range = new.guest_range();
        let free = layout.slots().iter().all(|other| {
            let there = other.guest_range();
            other.name() != new.name() && (there.end <= range.start || range.end <= there.start)
        });
        if free {
            layout.push(new);
        }
    }
    layout
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_mirror_is_what_readers_see_whatever_fails(
        steps in prop::collection::vec((layouts(), prop::option::of(0..6usize), 0..4usize, any::<bool>()), 1..8),
    ) {
        let world = World::new();
        for (slots, failing, undo_failures, veto) in steps {
            if let Some(failing) = failing {
                for call in failing..=failing + undo_failures {
                    world.host.fail(call, Errno(libc::EIO));
                }
            }
            world.second.refuses.store(veto, Ordering::Relaxed);
            drop(world.memslots.set_layout(&layout(&slots)));
            world.host.fail_no_more();
            world.in_step();
        }
    }
}
