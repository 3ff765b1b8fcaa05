// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the owner of the table promises: numbers by handle, one ioctl a commit and none for
//! nothing, and a call that fails has changed nothing, whichever ioctl fails.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::error::Error as _;
use std::sync::Barrier;
use std::thread;

use irq_routing::fake::{Call, FakeHost, FakeVm};
use irq_routing::{
    Arrival, Chip, ChipPin, Committed, Error, Gsi, GsiHandle, Irqchip, IrqchipError, IrqchipKind,
    Msi, Pit, Route, RouteError, Routing, Table,
};
use proptest::prelude::*;

const KERNEL: IrqchipKind = IrqchipKind::Kernel { pit: Pit::Absent };
const SPLIT: IrqchipKind = IrqchipKind::Split { pins: 24 };

fn msi(data: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data,
        devid: None,
    }
}

#[test]
fn a_legacy_device_costs_one_attach_at_its_first_interrupt_and_no_commit() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let com1 = routing.reserve(Gsi(4)).unwrap();
    let source = routing.source(&com1);
    assert_eq!(routing.flush().unwrap(), Committed::Unchanged);
    assert_eq!(host.take_calls(), []);
    source.trigger().unwrap();
    source.clone().trigger().unwrap();
    assert_eq!(host.take_calls(), [Call::AttachIrqfd(Gsi(4))]);
    drop((source, com1));
    assert_eq!(host.take_calls(), [Call::DetachIrqfd(Gsi(4))]);
    assert_eq!(routing.reserve(Gsi(4)).unwrap().gsi(), Gsi(4));
}

#[test]
fn many_routes_are_one_ioctl_and_the_same_again_none() {
    let (host, irqchip) = FakeHost::with_irqchip(SPLIT);
    let routing = Routing::new(&host, &irqchip);
    let gsis: Vec<GsiHandle> = (0..100).map(|_| routing.allocate().unwrap()).collect();
    assert_eq!(host.take_calls(), [], "numbers cost nothing");
    for expected in [Committed::Written { entries: 100 }, Committed::Unchanged] {
        let mut change = routing.change();
        for (gsi, data) in gsis.iter().zip(0x30..) {
            change.route(gsi, msi(data));
        }
        assert_eq!(change.commit().unwrap(), expected);
    }
    assert_eq!(host.take_calls(), [Call::SetGsiRouting(100)]);
    assert_eq!(host.vm().table, *routing.table());

    // Dropped, they cost nothing either: no one can raise them.
    drop(gsis);
    assert_eq!(routing.flush().unwrap(), Committed::Unchanged);
    assert_eq!(host.take_calls(), []);
}

#[test]
fn deferred_routes_go_with_the_first_attach() {
    let (host, irqchip) = FakeHost::with_irqchip(SPLIT);
    let routing = Routing::new(&host, &irqchip);
    let gsis: Vec<GsiHandle> = (0..3).map(|_| routing.allocate().unwrap()).collect();
    for gsi in &gsis {
        let mut change = routing.change();
        change.route(gsi, msi(gsi.gsi().0));
        change.defer().unwrap();
    }
    assert_eq!(host.take_calls(), []);
    let irqfds: Vec<_> = gsis.iter().map(|gsi| routing.irqfd(gsi).unwrap()).collect();
    let attached = gsis.iter().map(|gsi| Call::AttachIrqfd(gsi.gsi()));
    let expected: Vec<Call> = std::iter::once(Call::SetGsiRouting(3))
        .chain(attached)
        .collect();
    assert_eq!(host.take_calls(), expected);
    drop(irqfds);
}

#[test]
fn a_changed_pin_is_visible_even_when_its_owner_is_gone() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let gsi = routing.reserve(Gsi(5)).unwrap();
    let pin = ChipPin {
        chip: Chip::IOAPIC,
        pin: 9,
    };
    assert_eq!(
        routing.route(&gsi, pin).unwrap(),
        Committed::Written { entries: 39 }
    );
    assert_eq!(routing.table().map_chip_pin(pin), Some(Gsi(9)));
    drop(gsi);
    assert_eq!(routing.flush().unwrap(), Committed::Written { entries: 40 });
    assert_eq!(host.vm().table, Table::x86_default());
}

#[test]
fn a_change_can_add_remove_and_reset() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let [a, b] = [20, 21].map(|n| routing.reserve(Gsi(n)).unwrap());
    let extra = ChipPin {
        chip: Chip::PIC_SLAVE,
        pin: 3,
    };
    let mut change = routing.change();
    change.add_pin(&a, extra);
    change.unroute(&b);
    change.commit().unwrap();
    let table = routing.table();
    assert_eq!(table.map_gsi(Gsi(20)).count(), 2);
    assert_eq!(table.map_gsi(Gsi(21)).count(), 0);
    let mut change = routing.change();
    change.reset(&a);
    change.reset(&b);
    change.commit().unwrap();
    assert_eq!(*routing.table(), Table::x86_default());

    // Dropped without a commit, a change never was.
    let mut change = routing.change();
    change.unroute(&a);
    drop(change);
    assert_eq!(routing.flush().unwrap(), Committed::Unchanged);
}

#[test]
fn a_pin_that_is_given_up_does_not_make_the_table_too_full() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    host.set_limit(60);
    let routing = Routing::new(&host, &irqchip);
    let pin = routing.reserve(Gsi(4)).unwrap();
    let mut change = routing.change();
    change.unroute(&pin);
    change.commit().unwrap();
    // 38 of the 40 default entries are left, and others take the rest of the room.
    let others: Vec<_> = (0..22).map(|_| routing.allocate().unwrap()).collect();
    let mut change = routing.change();
    for gsi in &others {
        change.route(gsi, msi(gsi.gsi().0));
    }
    assert_eq!(change.commit().unwrap(), Committed::Written { entries: 60 });
    let mut change = routing.change();
    change.reset(&pin);
    let full = RouteError::TableFull {
        gsi: Gsi(4),
        limit: 60,
    };
    match change.commit() {
        Err(Error::Route(error)) => assert_eq!(error, full),
        other => panic!("{other:?}"),
    }
    drop(pin);
    routing.route(&others[0], msi(0x99)).unwrap();
    assert_eq!(host.vm().table.len(), 60, "what KVM takes");
}

#[test]
fn numbers_are_refused_by_name() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    host.set_limit(26);
    let routing = Routing::new(&host, &irqchip);
    let (first, second) = (routing.allocate().unwrap(), routing.allocate().unwrap());
    assert_eq!((first.gsi(), second.gsi()), (Gsi(24), Gsi(25)));
    let error = routing.allocate().unwrap_err();
    assert_eq!(error.to_string(), "no free GSI from 24 to below 26");
    let error = routing.reserve(Gsi(24)).unwrap_err();
    assert_eq!(error.to_string(), "GSI 24 is taken");
    let error = routing.reserve(Gsi(26)).unwrap_err();
    let source = error.source().unwrap();
    assert_eq!(
        source.to_string(),
        "GSI 26 is not below this host's limit of 26"
    );
    // A clone keeps the number; the last one gives it back.
    let clone = first.clone();
    drop(first);
    routing.allocate().unwrap_err();
    drop(clone);
    assert_eq!(routing.allocate().unwrap().gsi(), Gsi(24));
    assert_eq!(routing.allocate_in(5..7).unwrap().gsi(), Gsi(5));
}

#[test]
fn a_handle_of_another_table_is_refused() {
    let (host, irqchip) = FakeHost::with_irqchip(SPLIT);
    let (ours, theirs) = (Routing::new(&host, &irqchip), Routing::new(&host, &irqchip));
    let gsi = theirs.allocate().unwrap();
    assert!(matches!(
        ours.route(&gsi, msi(0x30)),
        Err(Error::ForeignGsi(_))
    ));
    assert!(matches!(ours.irqfd(&gsi), Err(Error::ForeignGsi(_))));
    assert!(matches!(ours.line(&gsi), Err(Error::ForeignGsi(_))));
    assert_eq!(host.take_calls(), []);
}

#[test]
fn an_irqfd_that_could_not_be_detached_is_still_attached() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let gsi = routing.reserve(Gsi(4)).unwrap();
    let irqfd = routing.irqfd(&gsi).unwrap();
    host.fail_after(0, libc::ENOMEM);
    let (irqfd, error) = irqfd.detach().unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_IRQFD failed to detach an eventfd from GSI 4"
    );
    assert_eq!(host.vm().irqfds.len(), 1);
    drop(irqfd);
    assert!(host.vm().irqfds.is_empty());
}

#[test]
fn of_threads_that_raise_it_first_one_attaches() {
    for _ in 0..200 {
        let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
        let routing = Routing::new(&host, &irqchip);
        let source = routing.source(&routing.reserve(Gsi(4)).unwrap());
        let start = Barrier::new(4);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    start.wait();
                    source.trigger().unwrap();
                });
            }
        });
        assert_eq!(host.take_calls(), [Call::AttachIrqfd(Gsi(4))]);
        assert_eq!(
            source.irqfd().unwrap().unwrap().eventfd().read().unwrap(),
            4
        );
    }
}

#[test]
fn a_dropped_line_is_lowered_once() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let gsi = routing.reserve(Gsi(10)).unwrap();
    drop(routing.line(&gsi).unwrap());
    assert_eq!(host.take_calls(), []);
    let line = routing.line(&gsi).unwrap();
    for (status, arrival) in [
        (2, Arrival::Delivered { to: 2 }),
        (0, Arrival::Coalesced),
        (-1, Arrival::Masked),
    ] {
        host.set_status(status);
        assert_eq!(line.set(true).unwrap(), arrival);
    }
    drop(line);
    assert_eq!(
        host.take_calls().last(),
        Some(&Call::SetIrqLine(Gsi(10), false))
    );
    assert_eq!(host.take_calls(), []);
}

#[test]
fn an_irqchip_that_could_be_made_only_half_says_what_is_there() {
    let kind = IrqchipKind::Kernel { pit: Pit::Present };
    let host = FakeHost::new();
    host.fail_after(1, libc::ENOMEM);
    match Irqchip::create(&host, kind).unwrap_err() {
        IrqchipError::Pit { made, source } => {
            assert_eq!(made.kind(), KERNEL);
            assert_eq!(host.vm().irqchip, KERNEL);
            assert_eq!(source.errno(), libc::ENOMEM);
        }
        other => panic!("{other}"),
    }
    for kind in [kind, KERNEL, SPLIT] {
        let host = FakeHost::new();
        host.fail_after(0, libc::ENOMEM);
        let error = Irqchip::create(&host, kind).unwrap_err();
        assert_eq!(host.vm(), FakeVm::default(), "{error}");
    }
}

/// An operation that asks the kernel something, and its name.
type Step<'a> = (&'static str, Box<dyn FnMut() -> Result<(), Error> + 'a>);

#[test]
fn whichever_ioctl_fails_the_call_changed_nothing_and_works_when_repeated() {
    for errno in [libc::ENOMEM, libc::EINVAL, libc::EINTR, libc::EBUSY] {
        for kind in [KERNEL, SPLIT] {
            let (host, irqchip) = FakeHost::with_irqchip(kind);
            let routing = Routing::new(&host, &irqchip);
            let gsi = routing.allocate().unwrap();
            let other = routing.allocate().unwrap();
            let (irqfd, detached, line) = (cell(), cell(), cell());
            let source = routing.source(&gsi);
            let steps: Vec<Step<'_>> = vec![
                (
                    "route",
                    Box::new(|| routing.route(&gsi, msi(0x30)).map(drop)),
                ),
                (
                    "reroute",
                    Box::new(|| routing.route(&gsi, msi(0x31)).map(drop)),
                ),
                (
                    "defer",
                    Box::new(|| {
                        let mut change = routing.change();
                        change.route(&other, msi(0x40));
                        change.defer()
                    }),
                ),
                // Two ioctls: the commit and the attach.
                (
                    "attach",
                    Box::new(|| {
                        *irqfd.borrow_mut() = Some(routing.irqfd(&other)?);
                        Ok(())
                    }),
                ),
                (
                    "detach",
                    Box::new(|| {
                        let attached = irqfd.borrow_mut().take().unwrap();
                        match attached.detach() {
                            Ok(now) => *detached.borrow_mut() = Some(now),
                            Err((still, error)) => {
                                *irqfd.borrow_mut() = Some(still);
                                return Err(error);
                            }
                        }
                        Ok(())
                    }),
                ),
                (
                    "attach again",
                    Box::new(|| {
                        let now = detached.borrow_mut().take().unwrap();
                        match now.attach() {
                            Ok(attached) => *irqfd.borrow_mut() = Some(attached),
                            Err((still, error)) => {
                                *detached.borrow_mut() = Some(still);
                                return Err(error);
                            }
                        }
                        Ok(())
                    }),
                ),
                ("trigger", Box::new(|| source.trigger())),
                (
                    "line",
                    Box::new(|| {
                        *line.borrow_mut() = Some(routing.line(&gsi)?);
                        Ok(())
                    }),
                ),
                (
                    "raise",
                    Box::new(|| line.borrow().as_ref().unwrap().set(true).map(drop)),
                ),
                (
                    "lower",
                    Box::new(|| line.borrow().as_ref().unwrap().set(false).map(drop)),
                ),
                (
                    "signal",
                    Box::new(|| routing.signal_msi(msi(0x50)).map(drop)),
                ),
            ];
            for (name, mut step) in steps {
                let mut skip = 0;
                loop {
                    let before = (host.vm(), routing.table());
                    host.take_calls();
                    host.fail_after(skip, errno);
                    let result = step();
                    let calls = host.take_calls();
                    let Err(error) = result else {
                        assert!(
                            calls.len() <= skip,
                            "{name}: a failed ioctl was not reported"
                        );
                        host.fail_after(usize::MAX, 0);
                        break;
                    };
                    assert!(
                        error.source().is_some(),
                        "{name}: {error} has lost its cause"
                    );
                    assert_eq!(calls.len(), skip + 1, "{name} went on after a failure");
                    // What comes before a failing attach is the commit of what was wanted anyway.
                    let (vm, table) = before;
                    let now = host.vm();
                    assert_eq!((&now.irqfds, &now.lines), (&vm.irqfds, &vm.lines), "{name}");
                    assert!(
                        skip > 0 || (now == vm && routing.table() == table),
                        "{name}"
                    );
                    assert_eq!(
                        host.vm().table,
                        *routing.table(),
                        "{name}: the tables differ"
                    );
                    skip += 1;
                    if skip > calls.len() {
                        break;
                    }
                }
            }
        }
    }

    fn cell<T>() -> std::cell::RefCell<Option<T>> {
        std::cell::RefCell::new(None)
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Allocate,
    Reserve(u32),
    Drop(usize),
    Route(usize, u32, Then),
    Pin(usize, u32, Then),
    Attach(usize),
    DropIrqfd(usize),
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    Commit,
    Defer,
    Forget,
}

fn op() -> impl Strategy<Value = Op> {
    let at = 0usize..8;
    let then =
        prop_oneof![3 => Just(Then::Commit), 2 => Just(Then::Defer), 1 => Just(Then::Forget)];
    prop_oneof![
        3 => Just(Op::Allocate),
        1 => (0u32..30).prop_map(Op::Reserve),
        3 => at.clone().prop_map(Op::Drop),
        5 => (at.clone(), 0u32..4, then.clone()).prop_map(|(at, data, then)| Op::Route(at, data, then)),
        2 => (at.clone(), 0u32..26, then).prop_map(|(at, pin, then)| Op::Pin(at, pin, then)),
        3 => at.clone().prop_map(Op::Attach),
        2 => at.prop_map(Op::DropIrqfd),
        1 => Just(Op::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done, in whatever order, with ioctls failing at random: KVM's table is right for
    /// every number that something could raise, and a commit is at most one ioctl.
    #[test]
    fn what_could_be_raised_goes_where_its_owner_said(
        ops in prop::collection::vec((op(), prop::bool::weighted(0.15)), 1..80),
    ) {
        let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
        let routing = Routing::new(&host, &irqchip);
        let default = Table::x86_default();
        let mut handles: Vec<GsiHandle> = Vec::new();
        let mut irqfds = Vec::new();
        let mut wanted: BTreeMap<Gsi, Vec<Route>> = BTreeMap::new();
        for (op, fail) in ops {
            // A drop that fails would leave an irqfd behind, as it would in a kernel that did so.
            let fail = fail && !matches!(op, Op::Drop(_) | Op::DropIrqfd(_));
            host.fail_after(if fail { 0 } else { usize::MAX }, libc::ENOMEM);
            host.take_calls();
            let before = host.vm();
            let mut settled = false;
            let mut failed = false;
            match op {
                Op::Allocate => handles.extend(routing.allocate()),
                Op::Reserve(n) => {
                    let taken = handles.iter().any(|gsi| gsi.gsi() == Gsi(n))
                        || irqfds.iter().any(|(gsi, _)| *gsi == Gsi(n));
                    let reserved = routing.reserve(Gsi(n));
                    prop_assert_eq!(reserved.is_err(), taken);
                    handles.extend(reserved);
                }
                Op::Drop(at) if at < handles.len() => drop(handles.remove(at)),
                Op::DropIrqfd(at) if at < irqfds.len() => drop(irqfds.remove(at)),
                Op::Route(at, _, then) | Op::Pin(at, _, then) if at < handles.len() => {
                    let gsi = &handles[at];
                    let route = match op {
                        Op::Pin(_, pin, _) => Route::Pin(ChipPin { chip: Chip::IOAPIC, pin }),
                        Op::Route(_, data, _) => Route::Msi(msi(data)),
                        _ => unreachable!(),
                    };
                    let mut change = routing.change();
                    change.route(gsi, route);
                    let done = match then {
                        Then::Commit => change.commit().map(|_| settled = true),
                        Then::Defer => change.defer(),
                        Then::Forget => continue,
                    };
                    match done {
                        Ok(()) => drop(wanted.insert(gsi.gsi(), vec![route])),
                        Err(Error::Route(RouteError::NoSuchPin { .. })) => failed = true,
                        Err(error) => {
                            prop_assert!(fail, "{}", error);
                            failed = true;
                        }
                    }
                }
                Op::Attach(at) if at < handles.len() => match routing.irqfd(&handles[at]) {
                    Ok(irqfd) => irqfds.push((handles[at].gsi(), irqfd)),
                    Err(_) => failed = true,
                },
                Op::Flush => match routing.flush() {
                    Ok(_) => settled = true,
                    Err(_) => failed = true,
                },
                _ => {}
            }
            prop_assert!(!failed || host.vm() == before, "a failed call changed something");
            let commits = host.take_calls();
            let commits = commits.iter().filter(|call| matches!(call, Call::SetGsiRouting(_)));
            prop_assert!(commits.count() <= 1);

            let live = |gsi: Gsi| {
                handles.iter().any(|handle| handle.gsi() == gsi)
                    || irqfds.iter().any(|(of, _)| *of == gsi)
            };
            wanted.retain(|&gsi, _| live(gsi));
            let vm = host.vm();
            prop_assert_eq!(&vm.table, &*routing.table());
            for gsi in (0..40).map(Gsi) {
                let of_default = || default.map_gsi(gsi).collect::<Vec<_>>();
                let should = wanted.get(&gsi).cloned().unwrap_or_else(of_default);
                let is: Vec<Route> = vm.table.map_gsi(gsi).collect();
                let attached_now = matches!(op, Op::Attach(at) if !failed
                    && handles.get(at).is_some_and(|handle| handle.gsi() == gsi));
                if attached_now || (settled && live(gsi)) {
                    prop_assert_eq!(is, should, "{} after {:?}", gsi, op);
                }
            }
        }
        host.fail_after(usize::MAX, 0);
        drop((handles, irqfds));
        prop_assert!(host.vm().irqfds.is_empty());
    }
}
