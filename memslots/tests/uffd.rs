// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The userfaultfd layer's promises, on a fake kernel: what is negotiated, one owner, both roles at once, and a call
//! that fails has changed nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Such ranges are what is to be refused.
#![allow(clippy::reversed_empty_ranges)]

use memslots::uffd::fake::{FakeUffd, Touch};
use memslots::uffd::{
    Call, Cause, Event, FaultKind, Features, FillRole, ForeignRange, LendError, Message, Messages,
    Modes, OpError, OpenError, ProtectRole, RegisterError, Registration, Uffd, UnregisterReason,
    Wake, encode,
};
use memslots::{Backing, Errno, Hva, Mapping, PAGE_SIZE};
use proptest::prelude::*;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;
use vm_memory::GuestAddress;

const ALL: Features = Features::from_bits(0x1ffff);
const LINUX_6_1: Features = Features::from_bits(0x1fff);
const PAGES: u64 = 16;
const P: u64 = PAGE_SIZE;
const ERRNOS: [i32; 6] = [
    libc::EINVAL,
    libc::ENOMEM,
    libc::EPERM,
    libc::EBUSY,
    libc::ENOENT,
    libc::ESRCH,
];

struct World {
    fake: FakeUffd,
    uffd: Uffd,
    memory: Arc<Mapping>,
}

impl World {
    fn new() -> Self {
        Self::with(Features::NONE, Backing::anonymous(PAGES * P))
    }

    fn with(required: Features, backing: Backing) -> Self {
        let fake = FakeUffd::new(ALL);
        let uffd = Uffd::on(|| fake.open(), required, Features::NONE).unwrap();
        let memory = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
        Self { fake, uffd, memory }
    }

    fn register(&self, modes: Modes) -> Registration {
        self.uffd.register_all(&self.memory, modes).unwrap()
    }

    fn at(&self, page: u64) -> Hva {
        Hva(self.memory.host().0 + (page * P) as usize)
    }

    fn byte(&self, page: u64) -> u8 {
        // SAFETY: within the mapping.
        unsafe { (self.at(page).0 as *const u8).read_volatile() }
    }

    fn last_call(&self) -> (Call, Vec<u64>) {
        self.fake.calls().pop().unwrap()
    }
}

#[test]
fn what_is_required_is_on_or_named_and_what_is_optional_is_on_where_it_is() {
    let open = |required, optional| {
        let fake = FakeUffd::new(LINUX_6_1);
        Uffd::on(|| fake.open(), required, optional)
    };
    let uffd = open(
        Features::THREAD_ID,
        Features::POISON | Features::EXACT_ADDRESS,
    )
    .unwrap();
    assert_eq!(uffd.available(), LINUX_6_1);
    assert_eq!(
        uffd.enabled(),
        Features::THREAD_ID | Features::EXACT_ADDRESS
    );
    let error = open(
        Features::POISON | Features::MOVE | Features::THREAD_ID,
        Features::NONE,
    )
    .unwrap_err();
    assert!(matches!(error, OpenError::Missing { .. }));
    assert!(
        error
            .to_string()
            .starts_with("this kernel's userfaultfd lacks POISON (Linux 6.6), MOVE (Linux 6.8)"),
        "{error}"
    );
}

#[test]
fn a_refusal_at_any_step_of_opening_is_an_error() {
    let steps = [Call::Api, Call::Api, Call::Api];
    for failing in 0..steps.len() {
        for errno in [libc::EPERM, libc::ENOMEM] {
            let fake = FakeUffd::new(LINUX_6_1);
            fake.fail(failing, Errno(errno));
            let error = Uffd::on(|| fake.open(), Features::NONE, Features::POISON).unwrap_err();
            assert_eq!(error.to_string(), format!("UFFDIO_API: {}", Errno(errno)));
        }
    }
    let denied = Uffd::on(
        || {
            Err(OpenError::Denied {
                errno: Errno(libc::EPERM),
                device: Errno(libc::EACCES),
            })
        },
        Features::NONE,
        Features::NONE,
    )
    .unwrap_err()
    .to_string();
    for remedy in [
        "CAP_SYS_PTRACE",
        "/dev/userfaultfd",
        "vm.unprivileged_userfaultfd=1",
        &Errno(libc::EPERM).to_string(),
        &Errno(libc::EACCES).to_string(),
    ] {
        assert!(denied.contains(remedy), "{denied}");
    }
}

#[test]
fn ranges_that_are_none_of_the_mapping_are_refused_without_a_call() {
    let world = World::new();
    let before = world.fake.calls().len();
    for range in [
        0..0,
        P..P,
        1..P,
        0..P + 1,
        0..(PAGES + 1) * P,
        2 * P..P,
        u64::MAX - P + 1..P,
    ] {
        let error = world
            .uffd
            .register(&world.memory, range, Modes::MISSING)
            .unwrap_err();
        assert!(matches!(error, RegisterError::Range { .. }), "{error}");
        // Where it lies decides which pages are whole.
        let host = world.memory.host();
        assert!(
            error.to_string().ends_with(&format!("at {host}")),
            "{error}"
        );
    }
    let error = world
        .uffd
        .register_all(&world.memory, Modes::NONE)
        .unwrap_err();
    assert_eq!(error, RegisterError::NoMode);
    let error = world
        .uffd
        .register_all(&world.memory, Modes::MINOR)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("minor faults on anonymous memory"),
        "{error}"
    );
    let error = world
        .uffd
        .register_all(&world.memory, Modes::ASYNC_WRITE_PROTECT)
        .unwrap_err();
    assert!(matches!(error, RegisterError::Synchrony { .. }), "{error}");
    assert_eq!(world.fake.calls().len(), before);
}

#[test]
fn one_range_has_one_registration_and_another_owner_is_named() {
    let world = World::new();
    let first = world
        .uffd
        .register(&world.memory, 0..4 * P, Modes::MISSING)
        .unwrap();
    let error = world
        .uffd
        .register(&world.memory, 3 * P..5 * P, Modes::MISSING)
        .unwrap_err();
    assert!(matches!(error, RegisterError::Overlap { .. }), "{error}");
    let _second = world
        .uffd
        .register(&world.memory, 4 * P..5 * P, Modes::WRITE_PROTECT)
        .unwrap();
    assert_eq!(
        world.uffd.locate(Hva(world.at(4).0 + 5)),
        Some((world.at(4).0..world.at(5).0, Modes::WRITE_PROTECT))
    );
    assert_eq!(world.uffd.locate(world.at(5)), None);
    drop(first);
    let again = world
        .uffd
        .register(&world.memory, 3 * P..4 * P, Modes::MISSING)
        .unwrap();
    assert_eq!(world.fake.ranges().len(), 2);
    world.fake.fail(0, Errno(libc::EBUSY));
    let error = world
        .uffd
        .register(&world.memory, 8 * P..9 * P, Modes::MISSING)
        .unwrap_err();
    assert!(
        error.to_string().contains("has another userfaultfd"),
        "{error}"
    );
    drop(again);
}

#[test]
fn a_registration_that_fails_has_changed_nothing_and_neither_has_its_end() {
    for errno in ERRNOS {
        let world = World::new();
        world.fake.fail(0, Errno(errno));
        world
            .uffd
            .register_all(&world.memory, Modes::MISSING)
            .unwrap_err();
        assert_eq!(
            (world.fake.ranges().len(), world.uffd.locate(world.at(0))),
            (0, None)
        );

        let registration = world.register(Modes::MISSING);
        world.fake.fail(0, Errno(errno));
        registration.add(Modes::WRITE_PROTECT).unwrap_err();
        assert_eq!(registration.modes(), Modes::MISSING);

        world.fake.fail(0, Errno(errno));
        let back = registration.unregister().unwrap_err();
        assert_eq!(back.reason, UnregisterReason::Refused(Errno(errno)));
        assert_eq!(world.fake.ranges().len(), 1);
        assert_eq!(back.registration.modes(), Modes::MISSING);
        back.registration.unregister().unwrap();
        assert_eq!(
            (world.fake.ranges().len(), world.uffd.locate(world.at(0))),
            (0, None)
        );
    }
}

#[test]
fn a_mode_is_added_in_one_call_that_names_the_old_ones_too() {
    let world = World::new();
    let registration = world.register(Modes::MISSING);
    registration.add(Modes::WRITE_PROTECT).unwrap();
    let (call, argument) = world.last_call();
    assert_eq!((call, argument[2]), (Call::Register, 3));
    let calls = world.fake.calls().len();
    registration.add(Modes::MISSING).unwrap();
    assert_eq!(
        world.fake.calls().len(),
        calls,
        "what is so already costs no call"
    );
    registration.add(Modes::MINOR).unwrap_err();
    assert_eq!(registration.modes(), Modes::MISSING | Modes::WRITE_PROTECT);
}

#[test]
fn a_role_has_one_borrower_and_a_registration_ends_after_its_roles() {
    let world = World::new();
    let registration = world.register(Modes::MISSING);
    let range = registration.host_range();
    let range = format!("{:#x}..{:#x}", range.start, range.end);
    let refused = registration.lend_protect().unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!(
            "who protects {range} needs one of WRITE_PROTECT | ASYNC_WRITE_PROTECT, and it is registered for MISSING"
        )
    );
    let fill = registration.lend_fill().unwrap();
    let refused = registration.lend_fill().unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!("who fills {range} is somebody else already")
    );
    let back = registration.unregister().unwrap_err();
    assert_eq!(back.reason, UnregisterReason::Lent);
    drop(fill);
    let fill = back.registration.lend_fill().unwrap();
    drop(back);
    assert_eq!(world.fake.ranges().len(), 1, "the role is still lent");
    fill.zero(0..P, Wake::Now).unwrap();
    drop(fill);
    assert_eq!(world.fake.ranges().len(), 0);
}

#[test]
fn memory_stays_mapped_until_its_registration_is_gone() {
    let world = World::new();
    let registration = world.register(Modes::MISSING);
    let memory = Arc::downgrade(&world.memory);
    let World {
        fake,
        uffd,
        memory: mapped,
    } = world;
    drop((mapped, uffd));
    assert!(memory.upgrade().is_some());
    assert_eq!(fake.ranges().len(), 1);
    drop(registration);
    assert_eq!(fake.ranges().len(), 0);
    assert!(memory.upgrade().is_none());
}

#[test]
fn a_copy_goes_on_after_a_part_of_it_and_says_how_far_it_came() {
    let world = World::new();
    let registration = world.register(Modes::MISSING);
    let fill = registration.lend_fill().unwrap();
    let data: Vec<u8> = (0..8u8).flat_map(|page| [page + 1; P as usize]).collect();
    world.fake.do_partly(0, 3 * P);
    world.fake.do_partly(1, P);
    fill.copy(0, &data, Wake::Now).unwrap();
    let copies = world
        .fake
        .calls()
        .into_iter()
        .filter(|(call, _)| *call == Call::Copy);
    let parts: Vec<_> = copies
        .map(|(_, argument)| {
            (
                (argument[0] as usize - world.at(0).0) as u64 / P,
                argument[2] / P,
            )
        })
        .collect();
    assert_eq!(parts, [(0, 8), (3, 5), (4, 4)]);
    assert_eq!(
        (0..8).map(|page| world.byte(page)).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6, 7, 8]
    );

    // A page in the middle is there already: what is before it is placed, what is behind is not.
    fill.copy(10 * P, &data[..P as usize], Wake::Now).unwrap();
    let error = fill
        .copy(8 * P, &data[..4 * P as usize], Wake::Now)
        .unwrap_err();
    assert_eq!((error.done, error.cause), (2 * P, Cause::AlreadyThere));
    assert_eq!(error.at, world.at(8));
    assert_eq!(world.fake.page(world.at(11)), None);
}

#[test]
fn every_errno_of_every_operation_is_a_cause_and_leaves_the_page_as_it_was() {
    type Op = fn(&FillRole, &Mapping) -> Result<(), OpError>;
    let operations: [(Call, Op); 6] = [
        (Call::Copy, |fill, _| {
            fill.copy(0, &[1; P as usize], Wake::Now)
        }),
        (Call::Copy, |fill, staging| {
            fill.copy_from(0, staging, P, P, Wake::Now)
        }),
        (Call::ZeroPage, |fill, _| fill.zero(0..P, Wake::Now)),
        (Call::Poison, |fill, _| fill.poison(0..P, Wake::Now)),
        (Call::Move, |fill, staging| {
            fill.move_from(0, staging, 0, P, false, Wake::Now)
        }),
        (Call::Wake, |fill, _| fill.wake(0..P)),
    ];
    let staging = Mapping::new(&Backing::anonymous(2 * P), GuestAddress(0)).unwrap();
    let causes = [
        (libc::EEXIST, Cause::AlreadyThere),
        (libc::EAGAIN, Cause::Changing),
        (libc::ENOENT, Cause::NotRegistered),
        (libc::ESRCH, Cause::ProcessGone),
        (libc::ENOMEM, Cause::NoMemory),
        (libc::EFAULT, Cause::NoSource),
        (libc::EBUSY, Cause::Pinned),
        (libc::EINVAL, Cause::Refused(Errno(libc::EINVAL))),
    ];
    for (call, operation) in operations {
        for (errno, cause) in causes {
            let world = World::new();
            let registration = world.register(Modes::MISSING);
            let fill = registration.lend_fill().unwrap();
            world.fake.fail(0, Errno(errno));
            let error = operation(&fill, &staging).unwrap_err();
            assert_eq!(
                (error.call, error.cause, error.done),
                (call, cause, 0),
                "{error}"
            );
            assert_eq!(world.fake.page(world.at(0)), None);
            operation(&fill, &staging).unwrap();
        }
    }
}

#[test]
fn ranges_that_are_none_of_the_registration_never_reach_the_kernel() {
    let world = World::new();
    let modes = Modes::MISSING | Modes::WRITE_PROTECT;
    let registration = world
        .uffd
        .register(&world.memory, 4 * P..8 * P, modes)
        .unwrap();
    let (fill, protect) = (
        registration.lend_fill().unwrap(),
        registration.lend_protect().unwrap(),
    );
    let staging = Mapping::new(&Backing::anonymous(2 * P), GuestAddress(0)).unwrap();
    let before = world.fake.calls().len();
    for range in [
        0..0,
        0..5 * P,
        1..P,
        3 * P..5 * P,
        4 * P..5 * P,
        2 * P..P,
        u64::MAX - P + 1..u64::MAX,
    ] {
        let size = range.end.saturating_sub(range.start);
        let refused = [
            fill.zero(range.clone(), Wake::Now),
            fill.poison(range.clone(), Wake::Now),
            fill.continue_minor(range.clone(), Wake::Now),
            fill.wake(range.clone()),
            protect.protect(range.clone()),
            protect.unprotect(range.clone(), Wake::Now),
            fill.copy_from(range.start, &staging, 0, size, Wake::Now),
            fill.move_from(range.start, &staging, 0, size, false, Wake::Now),
        ];
        for result in refused {
            assert_eq!(result.unwrap_err().cause, Cause::OutOfRange, "{range:?}");
        }
    }
    for (start, size) in [(P, 2 * P), (3 * P, P), (u64::MAX, P)] {
        let error = fill
            .copy_from(0, &staging, start, size, Wake::Now)
            .unwrap_err();
        assert_eq!(error.cause, Cause::OutOfRange);
        let error = fill
            .move_from(0, &staging, start, size, false, Wake::Now)
            .unwrap_err();
        assert_eq!(error.cause, Cause::OutOfRange);
    }
    assert_eq!(
        fill.copy(0, &[0; 100], Wake::Now).unwrap_err().cause,
        Cause::OutOfRange
    );
    assert_eq!(world.fake.calls().len(), before);
    assert_eq!(fill.page_of(Hva(world.at(5).0 + 17)), Some(P));
    assert_eq!(
        (fill.page_of(world.at(3)), fill.page_of(world.at(8))),
        (None, None)
    );
}

#[test]
fn pages_that_arrive_while_a_snapshot_protects_come_protected() {
    let world = World::new();
    let registration = world.register(Modes::MISSING | Modes::WRITE_PROTECT);
    let fill = registration.lend_fill().unwrap();
    fill.zero(0..P, Wake::Now).unwrap();
    let protect = registration.lend_protect().unwrap();
    fill.zero(P..2 * P, Wake::Now).unwrap();
    assert_eq!(
        world.fake.page(world.at(1)),
        Some(false),
        "nothing is protected yet"
    );
    protect.protect(0..PAGES * P).unwrap();
    assert_eq!(world.fake.page(world.at(0)), Some(true));
    fill.copy(2 * P, &[1; P as usize], Wake::Now).unwrap();
    fill.zero(3 * P..6 * P, Wake::Now).unwrap();
    for page in 2..6 {
        assert_eq!(world.fake.page(world.at(page)), Some(true), "page {page}");
    }
    let staging = Mapping::new(&Backing::anonymous(P), GuestAddress(0)).unwrap();
    let error = fill
        .move_from(6 * P, &staging, 0, P, false, Wake::Now)
        .unwrap_err();
    assert_eq!(error.cause, Cause::Unprotected);
    // The first write of each is told, and goes on when its protection is taken away.
    assert_eq!(world.fake.touch(world.at(3), true), Touch::Sleeps);
    protect.unprotect(3 * P..4 * P, Wake::Now).unwrap();
    assert_eq!(world.fake.touch(world.at(3), true), Touch::Done);
    drop(protect);
    for page in 0..6 {
        assert_eq!(world.fake.page(world.at(page)), Some(false), "page {page}");
    }
    fill.copy(7 * P, &[1; P as usize], Wake::Now).unwrap();
    assert_eq!(world.fake.page(world.at(7)), Some(false));
}

#[test]
fn a_page_that_is_being_filled_while_protection_begins_is_protected_in_the_end() {
    type Fill = fn(&FillRole) -> Result<(), OpError>;
    let operations: [Fill; 2] = [
        |fill| fill.copy(0, &[1; P as usize], Wake::Now),
        |fill| fill.zero(0..P, Wake::Now),
    ];
    for (call, operation) in [Call::Copy, Call::ZeroPage].into_iter().zip(operations) {
        let world = World::new();
        let registration = world.register(Modes::MISSING | Modes::WRITE_PROTECT);
        let (fill, protect) = (
            registration.lend_fill().unwrap(),
            registration.lend_protect().unwrap(),
        );
        let (go, gone) = mpsc::channel();
        thread::scope(|scope| {
            let protect = &protect;
            scope.spawn(move || {
                gone.recv().unwrap();
                protect.protect(0..PAGES * P).unwrap();
            });
            // In the middle of the filling the other begins, and gets as far as it can: its call does not come before
            // the filling is over. A while is enough to see one that does.
            let fake = world.fake.clone();
            world.fake.before(call, move || {
                go.send(()).unwrap();
                let is_protect = |(call, _): &(Call, Vec<u64>)| *call == Call::WriteProtect;
                let _came = (0..2000).any(|_| {
                    thread::yield_now();
                    fake.calls().iter().any(is_protect)
                });
            });
            operation(&fill).unwrap();
        });
        assert_eq!(world.fake.page(world.at(0)), Some(true), "{}", call.name());
    }
}

#[test]
fn a_page_that_is_filled_while_protection_ends_is_not_protected() {
    let world = World::new();
    let registration = world.register(Modes::MISSING | Modes::WRITE_PROTECT);
    let fill = Arc::new(registration.lend_fill().unwrap());
    let protect = registration.lend_protect().unwrap();
    protect.protect(0..PAGES * P).unwrap();
    world.fake.before(Call::WriteProtect, {
        let fill = Arc::clone(&fill);
        move || fill.copy(0, &[1; P as usize], Wake::Now).unwrap()
    });
    world.fake.after(Call::WriteProtect, {
        let fill = Arc::clone(&fill);
        move || fill.copy(P, &[1; P as usize], Wake::Now).unwrap()
    });
    drop(protect);
    for page in 0..2 {
        assert_eq!(world.fake.page(world.at(page)), Some(false), "page {page}");
    }
}

#[test]
fn a_protection_that_could_not_be_ended_is_as_it_was_and_can_be_ended_later() {
    for errno in ERRNOS.into_iter().chain([libc::EAGAIN]) {
        let world = World::new();
        let registration = world.register(Modes::MISSING | Modes::WRITE_PROTECT);
        let fill = registration.lend_fill().unwrap();
        fill.zero(0..2 * P, Wake::Now).unwrap();
        let protect = registration.lend_protect().unwrap();
        protect.protect(0..PAGES * P).unwrap();
        assert_eq!(world.fake.touch(world.at(1), true), Touch::Sleeps);
        world.fake.fail(0, Errno(errno));
        let error = protect.end().unwrap_err();
        let reason = error.reason;
        assert_eq!((reason.call, reason.done), (Call::WriteProtect, 0));
        assert_eq!(reason.cause == Cause::Changing, errno == libc::EAGAIN);
        assert_eq!(world.fake.asleep(), [world.at(1)]);
        assert_eq!(world.fake.page(world.at(0)), Some(true));
        // It is still lent, and what comes is still protected.
        let refused = registration.lend_protect().unwrap_err();
        assert!(matches!(refused, LendError::Lent { .. }), "{refused}");
        fill.zero(2 * P..3 * P, Wake::Now).unwrap();
        assert_eq!(world.fake.page(world.at(2)), Some(true));
        error.role.end().unwrap();
        assert_eq!(world.fake.asleep(), []);
        for page in 0..3 {
            assert_eq!(world.fake.page(world.at(page)), Some(false), "page {page}");
        }
        fill.zero(3 * P..4 * P, Wake::Now).unwrap();
        assert_eq!(world.fake.page(world.at(3)), Some(false));
        // One call, and no more when the role is gone.
        let calls = world.fake.calls();
        let is_end =
            |(call, words): &&(Call, Vec<u64>)| *call == Call::WriteProtect && words[2] == 0;
        assert_eq!(calls.iter().filter(is_end).count(), 2);
        drop(registration.lend_protect().unwrap());
    }
}

#[test]
fn nobody_sleeps_on_a_protection_whose_holder_is_gone() {
    // An event that is read in the end; and one that is not.
    for refusals in [1, 3, 5000] {
        let world = World::new();
        let registration = world.register(Modes::WRITE_PROTECT);
        world.fake.touch(world.at(0), true);
        let protect = registration.lend_protect().unwrap();
        protect.protect(0..P).unwrap();
        assert_eq!(world.fake.touch(world.at(0), true), Touch::Sleeps);
        let before = world.fake.calls().len();
        for call in 0..refusals {
            world.fake.fail(call, Errno(libc::EAGAIN));
        }
        if refusals == 5000 {
            // The descriptor's calls, until it gives up: then waking is not refused.
            let fake = world.fake.clone();
            world.fake.before(Call::Wake, move || fake.fail_no_more());
        }
        drop(protect);
        assert_eq!(world.fake.asleep(), [], "after {refusals} refusals");
        let calls = world.fake.calls().len() - before;
        let ended = refusals < 5000;
        assert_eq!(world.fake.page(world.at(0)), Some(!ended));
        if ended {
            assert_eq!(calls, refusals + 1, "it was asked for until it was done");
        } else {
            // Who woke faults again, is told of again, and whoever reads that ends what was left.
            assert_eq!(world.fake.touch(world.at(0), true), Touch::Sleeps);
            registration.lend_protect().unwrap().end().unwrap();
            assert_eq!(world.fake.asleep(), []);
            assert_eq!(world.fake.touch(world.at(0), true), Touch::Done);
        }
    }
}

#[test]
fn a_minor_fault_is_continued_and_comes_protected_too() {
    let world = World::with(Features::NONE, Backing::memfd(PAGES * P));
    let registration = world.register(Modes::MINOR | Modes::WRITE_PROTECT);
    let (fill, protect) = (
        registration.lend_fill().unwrap(),
        registration.lend_protect().unwrap(),
    );
    world.fake.cache(world.at(0));
    world.fake.cache(world.at(1));
    assert_eq!(world.fake.touch(world.at(0), false), Touch::Sleeps);
    fill.continue_minor(0..P, Wake::Now).unwrap();
    assert_eq!(world.fake.page(world.at(0)), Some(false));
    protect.protect(0..PAGES * P).unwrap();
    fill.continue_minor(P..2 * P, Wake::Now).unwrap();
    assert_eq!(world.fake.page(world.at(1)), Some(true));
    let error = fill.continue_minor(2 * P..3 * P, Wake::Now).unwrap_err();
    assert_eq!(error.cause, Cause::NoSource);
}

#[test]
fn a_page_that_was_protected_before_there_was_one_is_poisoned_and_one_that_there_is_keeps_its_protection()
 {
    let world = World::new();
    let registration = world.register(Modes::MISSING | Modes::WRITE_PROTECT);
    let fill = registration.lend_fill().unwrap();
    let protect = registration.lend_protect().unwrap();
    protect.protect(0..PAGES * P).unwrap();
    fill.copy(5 * P, &[7; P as usize], Wake::Now).unwrap();
    assert_eq!(world.fake.touch(world.at(2), false), Touch::Sleeps);
    fill.poison(2 * P..3 * P, Wake::Now).unwrap();
    assert_eq!(world.fake.asleep(), []);
    assert_eq!(world.fake.touch(world.at(2), false), Touch::Poisoned);
    let error = fill.poison(3 * P..8 * P, Wake::Now).unwrap_err();
    assert_eq!((error.cause, error.done), (Cause::AlreadyThere, 2 * P));
    assert_eq!((error.at, error.size), (world.at(3), 5 * P));
    assert_eq!(world.fake.page(world.at(5)), Some(true), "as it was");
    assert_eq!(world.byte(5), 7);
    assert_eq!(world.fake.page(world.at(6)), None);
    fill.poison(6 * P..PAGES * P, Wake::Now).unwrap();
    assert_eq!(
        world.fake.touch(world.at(PAGES - 1), false),
        Touch::Poisoned
    );
}

#[test]
fn who_sleeps_wakes_when_it_is_said() {
    let world = World::new();
    let registration = world.register(Modes::MISSING);
    let fill = registration.lend_fill().unwrap();
    for page in 0..4 {
        assert_eq!(world.fake.touch(world.at(page), false), Touch::Sleeps);
    }
    fill.zero(0..P, Wake::Later).unwrap();
    fill.copy(P, &[0; P as usize], Wake::Later).unwrap();
    fill.poison(2 * P..3 * P, Wake::Later).unwrap();
    assert_eq!(world.fake.asleep().len(), 4);
    fill.wake(0..2 * P).unwrap();
    assert_eq!(world.fake.asleep(), [world.at(2), world.at(3)]);
    assert_eq!(world.fake.touch(world.at(2), false), Touch::Poisoned);
    registration.wake_all().unwrap();
    assert_eq!(world.fake.asleep(), []);
    assert_eq!(
        world.fake.touch(world.at(3), false),
        Touch::Sleeps,
        "there is still no page"
    );
    drop(fill);
    assert_eq!(world.fake.asleep(), [world.at(3)]);
    drop(registration);
    assert_eq!(world.fake.asleep(), []);
}

#[test]
fn messages_come_once_each_and_unread_ones_are_not_lost() {
    let world = World::new();
    let _registration = world.register(Modes::MISSING);
    for page in 0..5 {
        world.fake.touch(world.at(page), page == 2);
    }
    world.fake.tell([0xff; 32]);
    world.fake.tell(encode(&Message::Fork { descriptor: 3 }));
    world.fake.tell(encode(&Message::Remove(0x1000..0x2000)));
    let mut messages = Messages::with_capacity(3);
    assert_eq!(world.uffd.read(&mut messages), Ok(3));
    let fault = |event: Option<Event>| match event {
        Some(Event::Fault(fault)) => fault,
        other => panic!("{other:?}"),
    };
    assert_eq!(fault(messages.next()).address, world.at(0));
    assert_eq!(
        world.uffd.read(&mut messages),
        Ok(2),
        "two are left, and none is read over them"
    );
    assert_eq!(fault(messages.next()).address, world.at(1));
    let third = fault(messages.next());
    assert_eq!(
        (third.address, third.write, third.kind),
        (world.at(2), true, FaultKind::Missing)
    );
    assert!(messages.next().is_none());
    assert_eq!(world.uffd.read(&mut messages), Ok(3));
    let mut rest: Vec<Event> = messages.by_ref().collect();
    assert_eq!(world.uffd.read(&mut messages), Ok(2));
    rest.extend(messages.by_ref());
    assert!(matches!(
        rest[..],
        [
            Event::Fault(_),
            Event::Fault(_),
            Event::Unknown(0xff),
            Event::Fork(None),
            Event::Remove(_)
        ]
    ));
    assert_eq!(world.uffd.read(&mut messages), Ok(0));
    assert_eq!(world.uffd.wait(Some(std::time::Duration::ZERO)), Ok(false));
}

/// One step of two borrowers and a guest.
#[derive(Clone, Debug)]
enum StepOf {
    Copy(u64, u64),
    Zero(u64, u64),
    Protect(u64, u64),
    Unprotect(u64, u64),
    Touch(u64, bool),
    Borrow,
    GiveBack,
}

fn steps() -> impl Strategy<Value = StepOf> {
    let ranges = || (0..PAGES).prop_flat_map(|first| (Just(first), 1..=PAGES - first));
    prop_oneof![
        ranges().prop_map(|(first, count)| StepOf::Copy(first, count)),
        ranges().prop_map(|(first, count)| StepOf::Zero(first, count)),
        ranges().prop_map(|(first, count)| StepOf::Protect(first, count)),
        ranges().prop_map(|(first, count)| StepOf::Unprotect(first, count)),
        (0..PAGES, any::<bool>()).prop_map(|(page, write)| StepOf::Touch(page, write)),
        Just(StepOf::Borrow),
        Just(StepOf::GiveBack),
    ]
}

proptest! {
    /// Whatever the two do, in any order: between `protect` of everything and the role's end no write of a page that was
    /// not unprotected goes untold, and after its end none sleeps on a protected page.
    #[test]
    fn no_write_is_missed_while_a_snapshot_protects_and_none_waits_after_it(
        steps in prop::collection::vec(steps(), 1..60),
    ) {
        let world = World::new();
        let registration = world.register(Modes::MISSING | Modes::WRITE_PROTECT);
        let fill = registration.lend_fill().unwrap();
        let mut protect: Option<ProtectRole> = None;
        // Pages whose writes may go untold, while there is a protector that has protected all.
        let mut open: Option<Vec<bool>> = None;
        for step in steps {
            match step {
                StepOf::Copy(first, count) => {
                    let data = vec![1; (count * P) as usize];
                    let _ = fill.copy(first * P, &data, Wake::Now);
                }
                StepOf::Zero(first, count) => {
                    let _ = fill.zero(first * P..(first + count) * P, Wake::Now);
                }
                StepOf::Borrow if protect.is_none() => {
                    let role = registration.lend_protect().unwrap();
                    role.protect(0..PAGES * P).unwrap();
                    (protect, open) = (Some(role), Some(vec![false; PAGES as usize]));
                }
                StepOf::GiveBack => (protect, open) = (None, None),
                StepOf::Protect(first, count) => {
                    if let (Some(role), Some(open)) = (&protect, &mut open) {
                        role.protect(first * P..(first + count) * P).unwrap();
                        open[first as usize..(first + count) as usize].fill(false);
                    }
                }
                StepOf::Unprotect(first, count) => {
                    if let (Some(role), Some(open)) = (&protect, &mut open) {
                        role.unprotect(first * P..(first + count) * P, Wake::Now).unwrap();
                        open[first as usize..(first + count) as usize].fill(true);
                    }
                }
                StepOf::Touch(page, write) => {
                    let there = world.fake.page(world.at(page)).is_some();
                    let touched = world.fake.touch(world.at(page), write);
                    match &open {
                        Some(open) if write && there && !open[page as usize] => {
                            prop_assert_eq!(touched, Touch::Sleeps);
                        }
                        None => prop_assert_eq!(touched == Touch::Done, there),
                        _ => {}
                    }
                }
                StepOf::Borrow => {}
            }
        }
    }
}

#[test]
fn a_wait_for_messages_ends_when_another_descriptor_has_something() {
    let world = World::new();
    let _registration = world.register(Modes::MISSING);
    let (stopped, stop) = std::io::pipe().unwrap();
    assert_eq!(
        world.uffd.wait_or(&stopped, Some(Duration::ZERO)),
        Ok(false)
    );
    assert_eq!(world.fake.touch(world.at(1), false), Touch::Sleeps);
    assert_eq!(world.uffd.wait_or(&stopped, None), Ok(true));
    let mut messages = Messages::with_capacity(8);
    assert_eq!(world.uffd.read(&mut messages), Ok(1));
    assert_eq!(
        world.uffd.wait_or(&stopped, Some(Duration::ZERO)),
        Ok(false)
    );
    drop(stop);
    assert_eq!(world.uffd.wait_or(&stopped, None), Ok(false));
}

#[test]
fn another_processs_memory_is_filled_by_its_addresses_and_stays_registered() {
    let world = World::new();
    let registration = world.register(Modes::MISSING);
    let uffd = Uffd::foreign(world.fake.open_again(), ALL);
    let all = registration.host_range();
    let range = ForeignRange::new(&uffd, all.clone(), P, Modes::MISSING).unwrap();
    let role = range.lend_fill().unwrap();
    assert_eq!(role.page_of(world.at(3)), Some(3 * P));
    role.copy(3 * P, &[7; 4096], Wake::Now).unwrap();
    role.zero(4 * P..5 * P, Wake::Now).unwrap();
    role.poison(5 * P..6 * P, Wake::Now).unwrap();
    assert_eq!(world.fake.touch(world.at(3), false), Touch::Done);
    assert_eq!(world.fake.touch(world.at(4), false), Touch::Done);
    assert_eq!(world.fake.touch(world.at(5), false), Touch::Poisoned);
    // A move would take both of its ends to be in the other process.
    let ours = Mapping::new(&Backing::anonymous(P), GuestAddress(0)).unwrap();
    let moved = role.move_from(8 * P, &ours, 0, P, false, Wake::Now);
    let refused = Cause::Refused(Errno(libc::EINVAL));
    assert_eq!(moved.unwrap_err().cause, refused);
    drop((role, range));
    assert!(
        world
            .fake
            .calls()
            .iter()
            .all(|(call, _)| *call != Call::Unregister)
    );
    assert_eq!(world.fake.touch(world.at(9), false), Touch::Sleeps);
    // Its end ended its place in the table as well.
    ForeignRange::new(&uffd, all, P, Modes::MISSING).unwrap();
}

#[test]
fn memory_is_registered_with_the_userfaultfd_of_its_own_process_only() {
    let world = World::new();
    let at = world.memory.host().0;
    let refused = |range, page_size, modes| {
        let uffd = Uffd::foreign(world.fake.open_again(), ALL);
        ForeignRange::new(&uffd, range, page_size, modes).unwrap_err()
    };
    let own = ForeignRange::new(&world.uffd, at..at + 4096, P, Modes::MISSING);
    assert_eq!(own.unwrap_err(), RegisterError::Whose { foreign: false });
    let foreign = Uffd::foreign(world.fake.open_again(), ALL);
    let ours = foreign.register_all(&world.memory, Modes::MISSING);
    assert_eq!(ours.unwrap_err(), RegisterError::Whose { foreign: true });
    for (range, page_size) in [
        (at..at, P),
        (at + 1..at + 4096, P),
        (at..at + 4097, P),
        (at + 4096..at, P),
        (at..at + 4096, 0),
        (at..at + 4096, 2048),
        (at..at + 3 * 4096, 3 * P),
        (at..at + 4096, 2 << 20),
    ] {
        let expected = RegisterError::ForeignRange {
            range: range.clone(),
            page_size,
        };
        assert_eq!(refused(range, page_size, Modes::MISSING), expected);
    }
    let none = refused(at..at + 4096, P, Modes::WRITE_PROTECT);
    assert_eq!(none, RegisterError::NoMode);
    let first = ForeignRange::new(&foreign, at..at + 8192, P, Modes::MISSING).unwrap();
    let overlap = ForeignRange::new(&foreign, at + 4096..at + 8192, P, Modes::MISSING);
    assert!(matches!(overlap, Err(RegisterError::Overlap { .. })));
    let _role = first.lend_fill().unwrap();
    assert!(matches!(first.lend_fill(), Err(LendError::Lent { .. })));
}
