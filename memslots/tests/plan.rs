// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A layout is a value, and a plan gets there: in the fewest calls, in an order in which each is legal, saying what a
//! vCPU could notice, and shown to readers all at once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Applied, Backing, Change, Errno, Error, Layout, LayoutSlot, Left, Memslots, NewSlot, PAGE_SIZE,
    PrivateRanges, Refusal, SlotFlags, SlotId, Unrestored,
};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use vm_memory::{Bytes, GuestAddress};

fn slot(page: u64, pages: u64) -> NewSlot {
    NewSlot {
        start: GuestAddress(page * PAGE_SIZE),
        backing: Backing::anonymous(pages * PAGE_SIZE),
        flags: SlotFlags::NONE,
    }
}

fn named(name: &str, page: u64, pages: u64) -> LayoutSlot {
    slot(page, pages).named(name)
}

fn flagged(mut slot: LayoutSlot, flags: SlotFlags) -> LayoutSlot {
    slot.slot.flags = flags;
    slot
}

struct World {
    host: FakeHost,
    memslots: Memslots,
}

impl World {
    fn new(layout: &Layout) -> Self {
        let host = FakeHost::new(16).with_guest_memfd();
        let memslots = Memslots::new(host.clone());
        memslots.set_layout(layout).unwrap();
        for slot in layout.slots() {
            let at = slot.slot.start;
            memslots.snapshot().write_obj(at.0 + 1, at).unwrap();
        }
        Self { host, memslots }
    }

    /// The plan's steps, in short: what, from where, to where, in pages, and `!` with a gap.
    fn plan(&self, layout: &Layout) -> Vec<String> {
        let short = |step: &memslots::Step| {
            let (start, gap) = (
                step.start.0 / PAGE_SIZE,
                step.gap.as_ref().map_or("", |_| "!"),
            );
            match step.change {
                Change::Create => format!("make {start}{gap}"),
                Change::Delete => format!("delete {start}{gap}"),
                Change::Move => format!("move {} {start}{gap}", step.from.unwrap().0 / PAGE_SIZE),
                Change::FlagsOnly => format!("flags {start}{gap}"),
                other => panic!("a step for {other:?}"),
            }
        };
        self.memslots
            .plan(layout)
            .unwrap()
            .steps()
            .iter()
            .map(short)
            .collect()
    }

    fn contents(&self, page: u64) -> u64 {
        self.memslots
            .snapshot()
            .read_obj(GuestAddress(page * PAGE_SIZE))
            .unwrap()
    }

    fn calls(&self) -> usize {
        self.host.calls().len()
    }
}

#[test]
fn what_is_so_already_costs_no_call_and_no_publication() {
    let layout = Layout::new().with(slot(0, 4)).with(named("high", 64, 4));
    let world = World::new(&layout);
    let (calls, generation) = (world.calls(), world.memslots.generation());
    let Applied { extents, .. } = world.memslots.set_layout(&layout).unwrap();
    assert_eq!(
        (world.calls(), world.memslots.generation()),
        (calls, generation)
    );
    assert_eq!(
        extents
            .iter()
            .map(|extent| extent.id().0)
            .collect::<Vec<_>>(),
        [0, 1]
    );
    assert_eq!(world.memslots.layout(), layout);
    assert!(
        world
            .memslots
            .plan(&world.memslots.layout())
            .unwrap()
            .is_empty()
    );
}

#[test]
fn each_kind_of_step_comes_in_its_turn() {
    let world = World::new(
        &Layout::new()
            .with(named("ram", 0, 8))
            .with(named("moves", 16, 4))
            .with(named("rom", 32, 4))
            .with(named("goes", 48, 4))
            .with(named("in the way", 64, 4)),
    );
    let layout = Layout::new()
        .with(flagged(named("ram", 0, 8), SlotFlags::LOG_DIRTY_PAGES))
        .with(named("moves", 66, 4))
        .with(flagged(named("rom", 32, 4), SlotFlags::READ_ONLY))
        .with(named("new", 80, 4))
        .with(named("waits", 16, 4));
    let plan = world.plan(&layout);
    let expected = [
        "make 80",
        "flags 0",
        "delete 64!",
        "move 16 66!",
        "delete 32!",
        "make 32",
        "make 16",
        "delete 48",
    ];
    assert_eq!(plan, expected);
    let calls = world.calls();
    let generation = world.memslots.generation();
    let applied = world.memslots.set_layout(&layout).unwrap();
    assert_eq!(world.calls() - calls, expected.len());
    assert_eq!(
        world.memslots.generation(),
        generation + 1,
        "one publication"
    );
    // The same memory is the same memory: contents and ids come along.
    assert_eq!(
        (world.contents(66), world.contents(32)),
        (16 * PAGE_SIZE + 1, 32 * PAGE_SIZE + 1)
    );
    let ids: Vec<_> = applied.extents.iter().map(|extent| extent.id().0).collect();
    assert_eq!(ids, [0, 1, 2, 5, 6]);
    assert_eq!(
        (world.contents(80), world.contents(16)),
        (0, 0),
        "new memory is new"
    );
}

#[test]
fn moves_go_in_the_order_of_their_places_and_a_circle_costs_one_call_more() {
    let before = |pages: [u64; 3]| {
        Layout::new()
            .with(named("a", pages[0], 1))
            .with(named("b", pages[1], 1))
            .with(named("c", pages[2], 1))
    };
    let world = World::new(&before([0, 1, 2]));
    assert_eq!(
        world.plan(&before([1, 2, 3])),
        ["move 2 3!", "move 1 2!", "move 0 1!"]
    );
    let circle = world.plan(&before([1, 2, 0]));
    assert_eq!(circle, ["delete 0!", "move 2 0!", "move 1 2!", "make 1"]);
    // What is dirty is remembered by a move and forgotten by a deletion: a slot without a log is the one to go.
    let logged = Layout::new()
        .with(flagged(named("a", 0, 1), SlotFlags::LOG_DIRTY_PAGES))
        .with(flagged(named("b", 1, 1), SlotFlags::LOG_DIRTY_PAGES))
        .with(named("c", 2, 1));
    world.memslots.set_layout(&logged).unwrap();
    let mut turned = logged.clone();
    for (name, page) in [("a", 1), ("b", 2), ("c", 0)] {
        turned.get_mut(name).unwrap().slot.start = GuestAddress(page * PAGE_SIZE);
    }
    assert_eq!(world.plan(&turned)[0], "delete 2!");
    world.memslots.set_layout(&turned).unwrap();
    assert_eq!(
        [0, 1, 2].map(|page| world.contents(page)),
        [2 * PAGE_SIZE + 1, 1, PAGE_SIZE + 1]
    );
}

#[test]
fn a_move_over_its_own_old_place_is_one_call() {
    let world = World::new(&Layout::new().with(named("a", 4, 4)));
    assert_eq!(
        world.plan(&Layout::new().with(named("a", 6, 4))),
        ["move 4 6!"]
    );
}

#[test]
fn a_gap_is_where_memory_was_and_will_be() {
    let world = World::new(&Layout::new().with(slot(0, 8)));
    // Replaced in its middle only: only there can a vCPU miss it.
    let plan = world
        .memslots
        .plan(&Layout::new().with(slot(2, 2)).with(slot(5, 1)))
        .unwrap();
    assert_eq!(plan.steps()[0].gap, Some(2 * PAGE_SIZE..6 * PAGE_SIZE));
    assert!(plan.has_gap());
    let gone = world.memslots.plan(&Layout::new()).unwrap();
    assert!(!gone.has_gap() && gone.steps().len() == 1);
    let more = world
        .memslots
        .plan(&Layout::new().with(slot(0, 8)).with(slot(8, 8)))
        .unwrap();
    assert!(!more.has_gap());
}

#[test]
fn a_plan_reads_as_what_it_does() {
    let world = World::new(&Layout::new().with(named("a", 0, 1)).with(slot(16, 1)));
    let layout = Layout::new()
        .with(named("a", 16, 1))
        .with(named("b", 32, 2));
    let text = world.memslots.plan(&layout).unwrap().to_string();
    let expected = "1. create a slot (b) at 0x20000..0x22000\n\
                    2. delete slot 1 at 0x10000..0x11000; vCPUs may miss 0x10000..0x11000\n\
                    3. move slot 0 (a) from 0x0 to 0x10000..0x11000; vCPUs may miss 0x0..0x1000";
    assert_eq!(text, expected);
    assert_eq!(
        world
            .memslots
            .plan(&world.memslots.layout())
            .unwrap()
            .to_string(),
        "nothing to do"
    );
}

#[test]
fn memory_is_known_by_name_or_by_place_and_by_its_backing() {
    let world = World::new(&Layout::new().with(named("a", 0, 1)).with(slot(4, 1)));
    // A name goes along, and can be given and taken without a call.
    assert_eq!(
        world.plan(&Layout::new().with(named("a", 8, 1)).with(slot(4, 1))),
        ["move 0 8!"]
    );
    assert!(
        world
            .plan(&Layout::new().with(slot(0, 1)).with(named("b", 4, 1)))
            .is_empty()
    );
    // Another name is other memory; another size or kind too.
    assert_eq!(
        world.plan(&Layout::new().with(named("z", 0, 1)).with(slot(4, 1))),
        ["delete 0!", "make 0"]
    );
    assert_eq!(
        world.plan(&Layout::new().with(named("a", 0, 2)).with(slot(4, 1))),
        ["delete 0!", "make 0"]
    );
    let mut memfd = slot(4, 1);
    memfd.backing = Backing::memfd(PAGE_SIZE);
    assert_eq!(
        world.plan(&Layout::new().with(named("a", 0, 1)).with(memfd)),
        ["delete 4!", "make 4"]
    );
    // What has no name is known by its place only.
    assert_eq!(
        world.plan(&Layout::new().with(named("a", 0, 1)).with(slot(8, 1))),
        ["make 8", "delete 4"]
    );
    // Renamed, it answers to the new name.
    world
        .memslots
        .set_layout(&Layout::new().with(slot(0, 1)).with(named("b", 4, 1)))
        .unwrap();
    assert_eq!(
        world.plan(&Layout::new().with(slot(0, 1)).with(named("b", 12, 1))),
        ["move 4 12!"]
    );
}

#[test]
fn a_slot_that_is_owned_is_in_the_way_and_one_that_is_kept_is_not() {
    let world = World::new(&Layout::new());
    let owned = world
        .memslots
        .create_all([named("owned", 0, 4)])
        .unwrap()
        .remove(0);
    assert!(
        world.plan(&Layout::new()).is_empty(),
        "a layout does not take what is someone's"
    );
    assert!(world.memslots.layout().slots().is_empty());
    let over = world
        .memslots
        .plan(&Layout::new().with(slot(2, 1)))
        .unwrap_err();
    assert!(
        matches!(
            over,
            Error::Refused(Refusal::Overlap {
                with: SlotId(0),
                ..
            })
        ),
        "{over}"
    );
    let twice = world
        .memslots
        .plan(&Layout::new().with(named("owned", 8, 1)))
        .unwrap_err();
    assert!(matches!(twice, Error::NameTwice { .. }), "{twice}");
    let plan = world
        .memslots
        .plan(&Layout::new().with(slot(8, 1)))
        .unwrap();
    drop(owned.keep());
    let stale = world.memslots.apply(plan).unwrap_err();
    assert!(matches!(stale, Error::Stale { changes: 1 }), "{stale}");
    assert_eq!(
        world.plan(&Layout::new().with(named("owned", 8, 4))),
        ["move 0 8!"]
    );
    assert_eq!(
        world.plan(&Layout::new().with(slot(2, 1))),
        ["delete 0!", "make 2"]
    );
}

#[test]
fn a_plan_of_other_slots_or_of_another_vm_is_refused() {
    let world = World::new(&Layout::new().with(slot(0, 1)));
    let layout = Layout::new().with(slot(0, 1)).with(slot(4, 1));
    let plan = world.memslots.plan(&layout).unwrap();
    let again = plan.clone();
    world.memslots.apply(plan).unwrap();
    let calls = world.calls();
    let error = world.memslots.apply(again).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the plan was made 1 changes of the slots ago"
    );
    let other = World::new(&Layout::new());
    let error = other
        .memslots
        .apply(world.memslots.plan(&layout).unwrap())
        .unwrap_err();
    assert_eq!(error.to_string(), "the plan is of another VM's memslots");
    assert_eq!(world.calls(), calls);
}

#[test]
fn what_cannot_be_is_refused_before_the_first_call_and_says_its_numbers() {
    let world = World::new(&Layout::new().with(slot(0, 1)));
    let refused = |layout: Layout| {
        let planned = world
            .memslots
            .plan(&layout)
            .map(drop)
            .unwrap_err()
            .to_string();
        assert_eq!(
            world
                .memslots
                .set_layout(&layout)
                .map(drop)
                .unwrap_err()
                .to_string(),
            planned
        );
        planned
    };
    let calls = world.calls();
    assert_eq!(
        refused(Layout::new().with(slot(4, 4)).with(slot(0, 5))),
        "the layout has 0x0..0x5000 and 0x4000..0x8000, which overlap"
    );
    assert_eq!(
        refused(Layout::new().with(named("a", 4, 1)).with(named("a", 8, 1))),
        "two slots have the name \"a\""
    );
    assert_eq!(
        refused(Layout::new().with(slot(0xfee00, 1))),
        "0x1000 bytes from guest address 0xfee00000 overlap the APIC access page (0xfee00000..0xfee01000)"
    );
    assert_eq!(
        refused(Layout::new().with(slot(3, 0))),
        "a slot of 0 bytes at guest address 0x3000"
    );
    assert_eq!(
        refused((0..17).map(|index| slot(index * 2, 1)).collect()),
        "16 more slots, but 15 of this host's 16 are free"
    );
    let mut odd = slot(4, 1);
    odd.start.0 += 8;
    assert!(refused(Layout::new().with(odd)).contains("is not a multiple of the page size"));
    assert!(refused(Layout::new().with(slot(!0 >> 12, 1))).contains("wrap around the end"));
    let private =
        slot(4, 1).with_guest_memfd(&world.memslots.create_guest_memfd(PAGE_SIZE).unwrap(), 0);
    assert_eq!(
        refused(Layout::new().with(flagged(private.clone(), SlotFlags::READ_ONLY))),
        "guest addresses 0x4000..0x5000 (slot 1): flags READ_ONLY | GUEST_MEMFD are not known to this call"
    );
    assert_eq!(world.calls(), calls);
    // And with the policy overridden, KVM is asked.
    let free = Memslots::<()>::with_policy(FakeHost::new(4), PrivateRanges::none());
    free.set_layout(&Layout::new().with(slot(0xfee00, 1)))
        .unwrap();
    let elsewhere = World::new(&Layout::new());
    assert_eq!(
        elsewhere
            .memslots
            .plan(&Layout::new().with(private))
            .unwrap_err()
            .to_string(),
        "the guest_memfd is of another VM's memslots"
    );
}

#[test]
fn a_slot_with_a_guest_memfd_is_made_anew_where_others_change() {
    let world = World::new(&Layout::new());
    let file = world.memslots.create_guest_memfd(8 * PAGE_SIZE).unwrap();
    let layout = Layout::new()
        .with(slot(0, 4).with_guest_memfd(&file, 0).named("private"))
        .with(slot(8, 4).with_guest_memfd(&file, 4 * PAGE_SIZE));
    world.memslots.set_layout(&layout).unwrap();
    world
        .memslots
        .snapshot()
        .write_obj(7u64, GuestAddress(0))
        .unwrap();
    assert!(world.memslots.plan(&layout).unwrap().is_empty());
    assert_eq!(world.memslots.layout(), layout);
    let mut moved = layout.clone();
    moved.get_mut("private").unwrap().slot.start = GuestAddress(16 * PAGE_SIZE);
    assert_eq!(world.plan(&moved), ["delete 0!", "make 16"]);
    world.memslots.set_layout(&moved).unwrap();
    assert_eq!(world.contents(16), 7, "the user mapping comes along");
    let twice = slot(32, 2).with_guest_memfd(&file, 3 * PAGE_SIZE);
    let bound = world.memslots.create_all([twice]).unwrap_err();
    assert!(
        bound
            .to_string()
            .contains("of the guest_memfd are in part those of 0x"),
        "{bound}"
    );
    let beyond = slot(32, 2).with_guest_memfd(&file, 7 * PAGE_SIZE);
    let beyond = world.memslots.create_all([beyond]).unwrap_err();
    assert!(
        beyond
            .to_string()
            .contains("are not within a guest_memfd of 0x8000 bytes"),
        "{beyond}"
    );
    let plain = Memslots::new(FakeHost::new(4));
    assert!(matches!(
        plain.create_guest_memfd(PAGE_SIZE),
        Err(Error::NoGuestMemfd)
    ));
    assert!(matches!(
        world.memslots.create_guest_memfd(7),
        Err(Error::GuestMemfd { .. })
    ));
}

#[test]
fn a_step_that_fails_is_named_and_what_cannot_be_taken_back_is_told_and_put_right_later() {
    let before = Layout::new()
        .with(flagged(named("flags", 0, 1), SlotFlags::NONE))
        .with(named("goes", 4, 1))
        .with(named("moves", 8, 1));
    let after = Layout::new()
        .with(named("new", 16, 1))
        .with(flagged(named("flags", 0, 1), SlotFlags::LOG_DIRTY_PAGES))
        .with(named("moves", 4, 1));
    let world = World::new(&before);
    assert_eq!(
        world.plan(&after),
        ["make 16", "flags 0", "delete 4!", "move 8 4!"]
    );
    // The move fails; of what came before, nothing can be taken back.
    world.host.fail(3, Errno(libc::EIO));
    for undo in 4..7 {
        world.host.fail(undo, Errno(libc::ENOMEM));
    }
    let generation = world.memslots.generation();
    let error = world.memslots.set_layout(&after).unwrap_err();
    let Error::Undo { left, cause } = error else {
        panic!("{error}")
    };
    assert_eq!(
        cause.to_string(),
        format!(
            "KVM did not move 0x8000 to 0x4000..0x5000 (slot 2) in step 4 of 4: {}",
            Errno(libc::EIO)
        )
    );
    let errno = Errno(libc::ENOMEM);
    let mut left = left;
    left.sort_by_key(|slot| slot.id);
    assert_eq!(
        left,
        [
            Unrestored {
                id: SlotId(0),
                start: GuestAddress(0),
                size: PAGE_SIZE,
                left: Left::Changed,
                errno
            },
            Unrestored {
                id: SlotId(1),
                start: GuestAddress(4 * PAGE_SIZE),
                size: PAGE_SIZE,
                left: Left::Missing,
                errno
            },
            Unrestored {
                id: SlotId(3),
                start: GuestAddress(16 * PAGE_SIZE),
                size: PAGE_SIZE,
                left: Left::Stays,
                errno
            },
        ]
    );
    // Readers see what KVM has, but for what was never to be seen.
    let snapshot = world.memslots.snapshot();
    assert_eq!(snapshot.generation(), generation + 1);
    let seen: Vec<_> = snapshot
        .regions()
        .map(|region| (region.extent().id().0, region.flags()))
        .collect();
    assert_eq!(
        seen,
        [(0, SlotFlags::LOG_DIRTY_PAGES), (2, SlotFlags::NONE)]
    );
    assert_eq!(
        world
            .host
            .slots()
            .iter()
            .map(|(id, _)| id.0)
            .collect::<Vec<_>>(),
        [0, 2, 3]
    );
    // The same layout as before is made of the same memory, contents included; what stayed goes.
    assert_eq!(world.plan(&before), ["make 4", "flags 0", "delete 16"]);
    world.memslots.set_layout(&before).unwrap();
    assert_eq!(world.contents(4), 4 * PAGE_SIZE + 1);
    assert_eq!(world.memslots.layout(), before);
    assert_eq!(
        world
            .host
            .slots()
            .iter()
            .map(|(id, _)| id.0)
            .collect::<Vec<_>>(),
        [0, 1, 2]
    );
    let host = world.host.clone();
    drop(world);
    assert!(host.slots().is_empty());
}

/// Two readers and a writer: whatever a reader sees is one of the two layouts, whole, and its memory is there.
#[test]
fn readers_see_one_layout_or_the_other() {
    let rounds = match std::env::var_os("LONG_TESTS") {
        Some(_) => 20_000,
        None => 600,
    };
    let one = Layout::new()
        .with(named("a", 0, 1))
        .with(named("b", 8, 1))
        .with(named("c", 16, 2));
    // Two change places, one goes, one comes.
    let other = Layout::new()
        .with(named("b", 0, 1))
        .with(named("a", 8, 1))
        .with(named("d", 32, 3));
    let memslots = Memslots::new(FakeHost::new(16));
    memslots.set_layout(&one).unwrap();
    let stop = AtomicBool::new(false);
    let shape = |layout: &Layout| {
        let ranges = layout.slots().iter().map(LayoutSlot::guest_range);
        ranges.collect::<Vec<_>>()
    };
    let shapes = [shape(&one), shape(&other)];
    let reader = || {
        let mut reader = memslots.reader();
        while !stop.load(Ordering::Relaxed) {
            let table = reader.enter();
            let seen = table.regions().map(|region| region.extent().guest_range());
            let seen: Vec<_> = seen.collect();
            assert!(shapes.contains(&seen), "{seen:x?}");
            for region in table.regions() {
                let at = region.extent().start();
                assert_eq!(table.read_obj::<u64>(at).unwrap(), 0);
            }
        }
    };
    thread::scope(|scope| {
        scope.spawn(reader);
        scope.spawn(reader);
        let stopping = Stop(&stop);
        for _ in 0..rounds {
            memslots.set_layout(&other).unwrap();
            memslots.set_layout(&one).unwrap().grace.wait();
        }
        drop(stopping);
    });
    // No id is lost on the way, once the last of what was deleted has gone.
    assert_eq!(memslots.available(), 13);
}

/// Stops the readers however the writer ends.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn memory_that_was_lost_where_another_slot_is_comes_back_with_the_next_layout() {
    let before = Layout::new()
        .with(slot(0, 1))
        .with(slot(5, 2).named("moves"));
    let world = World::new(&before);
    let (lost, moving) = (world.contents(0), world.contents(5));
    // delete 0, move 5 to 0, make 5: the last fails, and the move is not taken back, so 0 cannot be made again.
    let after = Layout::new().with(named("moves", 0, 2)).with(slot(5, 1));
    assert_eq!(world.plan(&after), ["delete 0!", "move 5 0!", "make 5"]);
    world.host.fail(2, Errno(libc::ENOMEM));
    world.host.fail(3, Errno(libc::EIO));
    let error = world.memslots.set_layout(&after).unwrap_err();
    assert!(matches!(error, Error::Undo { .. }), "{error}");
    world.host.fail_no_more();
    assert_eq!(world.contents(0), moving);
    world.memslots.set_layout(&before).unwrap();
    assert_eq!((world.contents(0), world.contents(5)), (lost, moving));
}

#[test]
fn private_memory_goes_to_another_slot_after_the_one_that_has_it() {
    let world = World::new(&Layout::new());
    let file = world.memslots.create_guest_memfd(8 * PAGE_SIZE).unwrap();
    let layout = Layout::new()
        .with(slot(0, 2).with_guest_memfd(&file, 0))
        .with(slot(4, 2).with_guest_memfd(&file, 2 * PAGE_SIZE))
        .with(slot(8, 4).with_guest_memfd(&file, 4 * PAGE_SIZE));
    world.memslots.set_layout(&layout).unwrap();
    let another = world.memslots.create_guest_memfd(8 * PAGE_SIZE).unwrap();
    for (after, steps) in [
        // All of it elsewhere, in one slot.
        (
            Layout::new().with(slot(32, 8).with_guest_memfd(&file, 0)),
            vec!["delete 0!", "delete 4!", "delete 8!", "make 32"],
        ),
        // A part of the one in the middle.
        (
            Layout::new()
                .with(slot(0, 2).with_guest_memfd(&file, 0))
                .with(slot(8, 4).with_guest_memfd(&file, 4 * PAGE_SIZE))
                .with(slot(32, 1).with_guest_memfd(&file, 3 * PAGE_SIZE)),
            vec!["delete 4!", "make 32"],
        ),
        // The same bytes of another file are other memory.
        (
            Layout::new().with(slot(32, 8).with_guest_memfd(&another, 0)),
            vec!["make 32", "delete 0", "delete 4", "delete 8"],
        ),
    ] {
        assert_eq!(world.plan(&after), steps);
        world.memslots.set_layout(&after).unwrap();
        assert_eq!(world.memslots.layout(), after);
        world.memslots.set_layout(&layout).unwrap();
    }
}
