// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A call that fails has changed nothing: every ioctl of every operation is refused in turn, and what KVM has, what
//! readers see and which ids are free are compared with before.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Backing, Errno, Error, Left, MemoryRegion, Memslots, NewSlot, PAGE_SIZE, PrivateRanges,
    Refusal, SetMemoryRegion, Slot, SlotExtent, SlotFlags, SlotId, SlotShape, Unrestored,
};
use std::error::Error as _;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use vm_memory::{Bytes, GuestAddress};

const ERRNOS: [i32; 6] = [
    libc::EINVAL,
    libc::EEXIST,
    libc::ENOMEM,
    libc::EFAULT,
    libc::EINTR,
    libc::EIO,
];

/// Everything that an operation can change.
#[derive(Debug, PartialEq)]
struct Everything {
    kvm: Vec<(SlotId, SlotShape)>,
    published: Vec<(SlotExtent, SlotFlags)>,
    generation: u64,
    free_ids: usize,
    contents: u64,
}

struct World {
    host: FakeHost,
    memslots: Memslots,
    slots: Vec<Slot>,
}

const RAM: GuestAddress = GuestAddress(0);
const HIGH: GuestAddress = GuestAddress(1 << 32);

fn anonymous(start: u64, pages: u64) -> NewSlot {
    let backing = Backing::anonymous(pages * PAGE_SIZE);
    NewSlot {
        start: GuestAddress(start),
        backing,
        flags: SlotFlags::NONE,
    }
}

impl World {
    fn new() -> Self {
        let host = FakeHost::new(16);
        let memslots = Memslots::new(host.clone());
        let slots = memslots
            .create_all([anonymous(RAM.0, 16), anonymous(HIGH.0, 4)])
            .unwrap();
        memslots.snapshot().write_obj(0x1234_5678u64, RAM).unwrap();
        Self {
            host,
            memslots,
            slots,
        }
    }

    fn everything(&self) -> Everything {
        let snapshot = self.memslots.snapshot();
        Everything {
            kvm: self.host.slots(),
            published: snapshot
                .regions()
                .map(|region| (region.extent().clone(), region.flags()))
                .collect(),
            generation: snapshot.generation(),
            free_ids: self.memslots.available(),
            contents: snapshot.read_obj(RAM).unwrap(),
        }
    }
}

type Operation = fn(&mut World) -> Result<(), Error>;

/// Each operation, and how many ioctls it makes.
const OPERATIONS: [(&str, usize, Operation); 6] = [
    ("create", 1, |world| {
        world
            .memslots
            .create(
                GuestAddress(1 << 20),
                Backing::memfd(PAGE_SIZE),
                SlotFlags::NONE,
            )
            .map(|slot| drop(slot.keep()))
    }),
    ("create_all", 3, |world| {
        let new = [
            anonymous(1 << 20, 1),
            anonymous(2 << 20, 2),
            anonymous(3 << 20, 600),
        ];
        world
            .memslots
            .create_all(new)
            .map(|slots| world.slots.extend(slots))
    }),
    ("remove", 1, |world| {
        match world.slots.pop().unwrap().remove() {
            Ok(_grace) => Ok(()),
            Err(error) => {
                world.slots.push(error.slot);
                Err(error.reason)
            }
        }
    }),
    ("drop", 1, |world| {
        let before = world.host.slots().len();
        drop(world.slots.pop());
        // A drop has no result to give: here is what it would have been.
        if world.host.slots().len() == before {
            return Err(Refusal::NoSuchSlot { id: SlotId(0) }.into());
        }
        Ok(())
    }),
    ("relocate", 1, |world| {
        world.slots[1].relocate(GuestAddress(2 << 32)).map(drop)
    }),
    ("set_flags", 1, |world| {
        world.slots[0]
            .set_flags(SlotFlags::LOG_DIRTY_PAGES)
            .map(drop)
    }),
];

#[test]
fn every_ioctl_refused_in_turn_leaves_everything_as_it_was() {
    for (name, ioctls, operation) in OPERATIONS {
        for failing in 0..ioctls {
            for errno in ERRNOS {
                let mut world = World::new();
                let before = world.everything();
                world.host.fail(failing, Errno(errno));
                assert!(
                    operation(&mut world).is_err(),
                    "{name}, call {failing}, errno {errno}"
                );
                assert_eq!(
                    world.everything(),
                    before,
                    "{name}, call {failing}, errno {errno}"
                );
                // And the same works afterwards.
                if name != "drop" {
                    operation(&mut world).unwrap();
                    assert_ne!(world.everything(), before, "{name}");
                }
            }
        }
    }
}

#[test]
fn an_operation_makes_no_more_calls_than_it_must() {
    for (name, ioctls, operation) in OPERATIONS {
        let mut world = World::new();
        let before = world.host.calls().len();
        operation(&mut world).unwrap();
        assert_eq!(world.host.calls().len() - before, ioctls, "{name}");
    }
    let mut world = World::new();
    let before = world.host.calls().len();
    world.slots[0].set_flags(SlotFlags::NONE).unwrap().wait();
    world.slots[1].relocate(HIGH).unwrap().wait();
    assert_eq!(
        world.host.calls().len(),
        before,
        "what is so already costs no call"
    );
}

#[test]
fn what_kvm_would_refuse_is_refused_before_the_first_call() {
    let refused: [(&str, Vec<NewSlot>); 7] = [
        ("size 0", vec![anonymous(1 << 20, 0)]),
        (
            "unaligned",
            vec![anonymous(1 << 20, 1), anonymous((2 << 20) + 8, 1)],
        ),
        ("wraps", vec![anonymous(!0xfffu64, 1)]),
        (
            "overlaps RAM",
            vec![anonymous(1 << 20, 1), anonymous(PAGE_SIZE, 1)],
        ),
        (
            "overlaps its own",
            vec![anonymous(1 << 20, 2), anonymous((1 << 20) + PAGE_SIZE, 1)],
        ),
        ("too many pages", vec![anonymous(8 << 32, 1 << 31)]),
        ("the APIC's page", vec![anonymous(0xfec0_0000, 0x300)]),
    ];
    for (name, new) in refused {
        let mut world = World::new();
        let (before, calls) = (world.everything(), world.host.calls().len());
        assert!(world.memslots.create_all(new).is_err(), "{name}");
        assert_eq!(
            (world.everything(), world.host.calls().len()),
            (before, calls),
            "{name}"
        );
        world.slots.clear();
    }
    let mut world = World::new();
    let before = world.everything();
    let empty = world.memslots.create_all([anonymous(1 << 20, 0)]);
    assert_eq!(
        empty.unwrap_err().to_string(),
        "a slot of 0 bytes at guest address 0x100000"
    );
    assert!(matches!(
        world.slots[1].relocate(GuestAddress(PAGE_SIZE)),
        Err(Error::Refused(Refusal::Overlap { .. }))
    ));
    assert!(matches!(
        world.slots[1].relocate(GuestAddress(1)),
        Err(Error::Refused(Refusal::Unaligned { .. }))
    ));
    assert!(matches!(
        world.slots[1].relocate(GuestAddress(0xfee0_0000)),
        Err(Error::Private { .. })
    ));
    let read_only = world.slots[1].set_flags(SlotFlags::READ_ONLY);
    assert!(matches!(
        read_only,
        Err(Error::Refused(Refusal::Fixed {
            what: "read-only flag",
            ..
        }))
    ));
    assert_eq!(world.everything(), before);
}

#[test]
fn more_slots_than_ids_are_refused_whole_and_the_message_has_the_numbers() {
    let world = World::new();
    let before = world.everything();
    let too_many = (0..15).map(|index| anonymous((index + 1) << 20, 1));
    let error = world.memslots.create_all(too_many).unwrap_err();
    assert_eq!(
        error.to_string(),
        "15 more slots, but 14 of this host's 16 are free"
    );
    assert_eq!(world.everything(), before);
    let all = (0..14).map(|index| anonymous((index + 1) << 20, 1));
    assert_eq!(world.memslots.create_all(all).unwrap().len(), 14);
}

#[test]
fn memory_that_the_host_does_not_have_leaves_no_slot() {
    let world = World::new();
    let before = world.everything();
    // Legal for KVM, larger than a process: 2^31 - 1 pages a slot, many of them.
    let huge = (0..14).map(|index| anonymous((index + 1) << 44, (1 << 31) - 1));
    let huge = huge.chain([anonymous(1 << 20, 1)]);
    let memslots = Memslots::<()>::with_policy(FakeHost::new(1 << 16), PrivateRanges::none());
    drop(memslots.create_all(huge));
    let error = memslots
        .create_all((0..64).map(|index| anonymous((index + 1) << 44, (1 << 31) - 1)))
        .unwrap_err();
    assert!(matches!(error, Error::Map { .. }), "{error}");
    assert_eq!(memslots.snapshot().regions().len(), 0);
    assert_eq!(world.everything(), before);
}

#[test]
fn an_undo_that_fails_says_what_is_left_and_keeps_its_memory_and_its_id() {
    let world = World::new();
    let generation = world.memslots.generation();
    world.host.fail(1, Errno(libc::ENOMEM)); // the second creation
    world.host.fail(2, Errno(libc::EIO)); // the deletion of the first
    let error = world
        .memslots
        .create_all([anonymous(1 << 20, 1), anonymous(2 << 20, 1)])
        .unwrap_err();
    let (enomem, eio) = (Errno(libc::ENOMEM), Errno(libc::EIO));
    let cause = format!("KVM did not create 0x200000..0x201000 (slot 3) in step 2 of 2: {enomem}");
    assert_eq!(
        error.to_string(),
        format!(
            "a failed change could not be taken back: 0x100000..0x101000 (slot 2) stays ({eio}); it failed because {cause}"
        )
    );
    assert_eq!(error.source().unwrap().to_string(), cause);
    let Error::Undo { left, cause } = error else {
        panic!("{error}")
    };
    let stays = Unrestored {
        id: SlotId(2),
        start: GuestAddress(1 << 20),
        size: PAGE_SIZE,
        left: Left::Stays,
        errno: Errno(libc::EIO),
    };
    assert_eq!(left, [stays]);
    assert!(matches!(
        *cause,
        Error::Kvm {
            source: Errno(libc::ENOMEM),
            ..
        }
    ));
    assert_eq!(
        world.memslots.generation(),
        generation,
        "readers never saw it"
    );
    assert_eq!(world.memslots.available(), 13, "its id is taken");
    let over_it = world.memslots.create_all([anonymous(1 << 20, 1)]);
    assert!(matches!(
        over_it,
        Err(Error::Refused(Refusal::Overlap {
            with: SlotId(2),
            ..
        }))
    ));
    let host = world.host.clone();
    drop(world);
    assert!(
        host.slots().is_empty(),
        "the last chance to delete it was taken"
    );
}

#[test]
fn an_id_is_reused_lowest_first_once_nobody_holds_its_extent() {
    let mut world = World::new();
    let slot = |world: &World| {
        world
            .memslots
            .create_all([anonymous(1 << 20, 1)])
            .unwrap()
            .pop()
            .unwrap()
    };
    let extent = world.slots[0].extent().clone();
    assert_eq!(extent.id(), SlotId(0));
    drop(world.slots.remove(0));
    let next = slot(&world);
    assert_eq!(
        next.extent().id(),
        SlotId(2),
        "someone still relies on the size of slot 0"
    );
    drop((extent, next));
    assert_eq!(slot(&world).extent().id(), SlotId(0));
}

#[test]
fn kept_slots_go_with_the_last_owner_and_owned_ones_before() {
    let world = World::new();
    let World {
        host,
        memslots,
        mut slots,
    } = world;
    let kept = slots.remove(0).keep();
    drop(memslots);
    assert_eq!(host.slots().len(), 2, "a slot keeps the rest alive");
    drop(slots);
    assert!(host.slots().is_empty());
    let calls = host.calls();
    assert_eq!((calls[2].id, calls[3].id), (SlotId(1), kept.id()));
}

/// Whether the page is mapped in this process.
fn is_mapped(address: usize) -> bool {
    let mut there = 0u8;
    // SAFETY: the byte is one for each page; the address is looked up, and not touched.
    unsafe { libc::mincore(address as *mut _, PAGE_SIZE as usize, &raw mut there) == 0 }
}

#[test]
fn memory_of_a_slot_that_kvm_never_deletes_stays_mapped_and_readers_see_the_others_go() {
    let World {
        host,
        memslots,
        slots,
    } = World::new();
    let ram = memslots.ram();
    let kept: Vec<_> = slots.into_iter().map(Slot::keep).collect();
    host.fail(0, Errno(libc::EIO));
    drop(memslots);
    let left = host.slots();
    assert_eq!(left.len(), 1, "the first was not deleted");
    assert_eq!(left[0].0, kept[0].id());
    assert!(is_mapped(kept[0].host_start().0));
    assert!(ram.snapshot().find(kept[1].start()).is_none());
    drop(ram);
    assert!(
        is_mapped(kept[0].host_start().0),
        "the guest may still use it"
    );
    assert!(!is_mapped(kept[1].host_start().0));
}

/// A host that panics at its second call.
struct Panics(FakeHost);

impl SetMemoryRegion for Panics {
    unsafe fn set_memory_region(&self, region: &MemoryRegion) -> Result<(), Errno> {
        assert!(self.0.calls().is_empty(), "the host's own");
        // SAFETY: the caller's promise is the same.
        unsafe { self.0.set_memory_region(region) }
    }

    fn max_slots(&self) -> usize {
        16
    }
}

#[test]
fn a_host_that_panics_takes_the_process_with_it_before_any_memory_goes() {
    const CHILD: &str = "MEMSLOTS_HOST_PANICS";
    if std::env::var_os(CHILD).is_some() {
        let memslots = Memslots::new(Panics(FakeHost::new(16)));
        drop(memslots.create_all([anonymous(0, 1), anonymous(1 << 20, 1)]));
        return;
    }
    let name = "a_host_that_panics_takes_the_process_with_it_before_any_memory_goes";
    let child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert_eq!(child.status.signal(), Some(libc::SIGABRT), "{child:?}");
}

#[test]
fn a_slot_keeps_its_name_when_it_is_moved_and_flagged() {
    let memslots = Memslots::new(FakeHost::new(4));
    let new = [anonymous(0, 1).named("ram")];
    let mut slot = memslots.create_all(new).unwrap().pop().unwrap();
    slot.relocate(HIGH).unwrap().wait();
    slot.set_flags(SlotFlags::LOG_DIRTY_PAGES).unwrap().wait();
    let extent = slot.keep();
    let layout = memslots.layout();
    let named = layout.get("ram").unwrap();
    assert_eq!(named.slot.start, extent.start());
    assert_eq!(named.slot.flags, SlotFlags::LOG_DIRTY_PAGES);
}
