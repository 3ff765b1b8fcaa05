// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that goes before its memory has one owner, and all of its memory follows it once, whatever breaks and is made
//! again: the wire is cut at each message, in each direction, and either side killed there.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "migration/both.rs"]
mod both;
#[allow(dead_code)]
#[path = "migration/world.rs"]
mod world;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use both::{Received, both};
use reference_vmm::migration::event::{Event, Observer};
use reference_vmm::migration::orders::{OrderError, Orders};
use reference_vmm::migration::postcopy::{LastWord, When};
use reference_vmm::migration::source::{After, MigrateError, Settings, WhenStuck, Why};
use world::Side::{Destination, Source};
use world::{Arrives, Fault, Strike, World};

fn settings(postcopy: When) -> Settings {
    both::settings(WhenStuck::Cancel, postcopy)
}

/// And all of its memory has followed it.
fn check(world: &World, here: &Result<(), MigrateError>, there: &Received, what: &str) {
    both::check(world, here, there, what);
    assert!(here.is_err() || world.is_whole(), "{what}");
}

/// Counts what followed the guest, and gives an order at an event.
#[derive(Default)]
struct Watch<'a> {
    missing: Mutex<Option<u64>>,
    sent: Mutex<u64>,
    broken: AtomicBool,
    at: Option<(&'a Orders, u64)>,
}

impl Observer for Watch<'_> {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::PostCopy { missing } => *self.missing.lock().unwrap() = Some(missing),
            Event::Served { broken, .. } => {
                self.broken.fetch_or(broken.is_some(), Ordering::Relaxed);
            }
            Event::Sent { pages, .. } => {
                let mut sent = self.sent.lock().unwrap();
                *sent += pages;
                if let Some((orders, after)) = self.at
                    && *sent >= after
                {
                    orders.switch().unwrap();
                }
            }
            _ => {}
        }
    }
}

#[test]
fn whenever_it_switches_all_that_the_guest_has_follows_it_once() {
    let pages = world::pages();
    for when in [
        When::AfterRounds(0),
        When::AfterRounds(1),
        When::AfterRounds(3),
        When::After(Duration::ZERO),
        When::Auto,
    ] {
        let world = World::new(None);
        let watch = Watch::default();
        let (here, there) = both(&world, &settings(when), &Orders::default(), &watch, None);
        check(&world, &here, &there, &when.to_string());
        let missing = watch.missing.lock().unwrap().unwrap();
        assert_eq!(world.served(), missing, "{when}");
        if when == When::AfterRounds(0) {
            assert_eq!((missing, *watch.sent.lock().unwrap()), (pages, 0));
        }
    }
}

#[test]
fn at_an_order_in_the_midst_of_a_round_what_was_sent_of_it_is_not_sent_again() {
    let pages = world::pages();
    let mut cut = 0;
    for after in [1, pages / 4, pages / 2] {
        let world = World::new(None);
        let orders = Orders::default();
        let watch = Watch {
            at: Some((&orders, after)),
            ..Watch::default()
        };
        let (here, there) = both(&world, &settings(When::ByHand), &orders, &watch, None);
        check(&world, &here, &there, &after.to_string());
        let (sent, missing) = (*watch.sent.lock().unwrap(), world.served());
        assert_eq!(Some(missing), *watch.missing.lock().unwrap());
        // What the guest wrote meanwhile comes again: it writes some pages at each look.
        assert!(sent + missing >= pages, "{sent} {missing}");
        cut += u64::from(sent < pages);
        assert_eq!(orders.switch(), Err(OrderError::Over));
    }
    assert!(cut > 0, "no round was cut");
}

#[test]
fn one_that_was_not_asked_for_never_switches() {
    let world = World::new(None);
    let orders = Orders::default();
    orders.switch().unwrap();
    let settings = Settings {
        when_stuck: WhenStuck::Stop,
        ..settings(When::Never)
    };
    let watch = Watch::default();
    let (here, there) = both(&world, &settings, &orders, &watch, None);
    here.unwrap();
    there.unwrap();
    assert_eq!(*watch.missing.lock().unwrap(), None);
    assert_eq!(world.served(), 0);
}

#[test]
fn a_destination_that_cannot_have_it_says_so_before_the_first_page_with_the_remedy() {
    let world = World::new(None);
    world.hears_no_faults();
    let watch = Watch::default();
    let (here, there) = both(&world, &settings(HOW), &Orders::default(), &watch, None);
    check(&world, &here, &there, "no userfaultfd");
    let why = here.unwrap_err().to_string();
    for needle in ["have one", "--postcopy=never"] {
        assert!(why.contains(needle), "{why}");
    }
    assert_eq!(*watch.sent.lock().unwrap(), 0);
}

const HOW: When = When::AfterRounds(1);

/// At each message of each side; some at the same time, for most of it is waiting.
fn at_each_message(arrives: &[Arrives], strike: Strike, check: impl Fn(Fault, &Arc<World>) + Sync) {
    let world = World::new(None);
    let (here, _there) = both(&world, &settings(HOW), &Orders::default(), &(), None);
    here.unwrap();
    for of in [Source, Destination] {
        let most = world.said(of);
        let (next, struck) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let each = || {
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let number = at / arrives.len();
                if number >= most {
                    return;
                }
                let fault = Fault {
                    of,
                    number,
                    arrives: arrives[at % arrives.len()],
                    strike,
                };
                let world = World::new(Some(fault));
                check(fault, &world);
                struck.fetch_add(usize::from(world.struck()), Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(each);
            }
        });
        let struck = struck.into_inner();
        assert!(struck >= most / 2 * arrives.len(), "{strike:?}: {struck}");
    }
}

fn one_guest_runs(arrives: &[Arrives], strike: Strike) {
    let stayed = AtomicBool::new(false);
    let went_on = AtomicBool::new(false);
    at_each_message(arrives, strike, |fault, world| {
        let watch = Watch::default();
        let (here, there) = both(world, &settings(HOW), &Orders::default(), &watch, None);
        check(world, &here, &there, &format!("{fault:?}"));
        stayed.fetch_or(here.is_err(), Ordering::Relaxed);
        let again = here.is_ok() && world.struck();
        went_on.fetch_or(again, Ordering::Relaxed);
        if here.is_ok() {
            // What was under way when it broke is asked for again, and nothing else.
            let missing = watch.missing.lock().unwrap().unwrap();
            assert!(world.served() <= missing + 2 * 64, "{fault:?}");
        }
    });
    assert!(stayed.into_inner() && went_on.into_inner(), "{strike:?}");
}

#[test]
fn a_wire_that_is_severed_at_any_message_is_made_again_and_nothing_is_lost() {
    one_guest_runs(
        &[Arrives::Half, Arrives::All],
        Strike::SeverAll { lost: false },
    );
}

#[test]
fn a_wire_that_loses_what_was_under_way_is_made_again_and_nothing_is_lost() {
    one_guest_runs(&[Arrives::All], Strike::SeverAll { lost: true });
}

#[test]
fn a_wire_of_whose_end_the_destination_hears_nothing_is_made_again_and_nothing_is_lost() {
    one_guest_runs(&[Arrives::All], Strike::Freeze);
}

#[test]
fn one_connection_that_breaks_at_any_message_is_made_again_and_nothing_is_lost() {
    one_guest_runs(&[Arrives::Nothing, Arrives::All], Strike::SeverOne);
}

#[test]
fn a_way_that_is_closed_for_a_while_is_tried_until_it_is_open() {
    one_guest_runs(&[Arrives::All], Strike::Partition(5));
}

#[test]
fn a_tunnel_that_dies_at_any_message_is_not_taken_for_the_destination() {
    one_guest_runs(&[Arrives::All], Strike::Tunnel(5));
}

#[test]
fn a_socket_whose_path_is_anothers_by_now_is_not_taken_for_the_destination() {
    one_guest_runs(&[Arrives::All], Strike::Replaced(5));
}

#[test]
fn a_firewall_that_refuses_for_a_while_is_not_taken_for_the_destinations_death() {
    let struck = AtomicBool::new(false);
    let world = World::new(None);
    let (here, _there) = both(&world, &settings(HOW), &Orders::default(), &(), None);
    here.unwrap();
    for of in [Source, Destination] {
        for number in 0..world.said(of) {
            let fault = Fault {
                of,
                number,
                arrives: Arrives::All,
                strike: Strike::Firewall(5),
            };
            let world = World::new(Some(fault));
            let (here, there) = both(&world, &settings(HOW), &Orders::default(), &(), None);
            check(&world, &here, &there, &format!("{fault:?}"));
            struck.fetch_or(world.struck(), Ordering::Relaxed);
        }
    }
    assert!(struck.into_inner());
}

#[test]
fn what_the_destination_says_at_last_is_what_became_of_the_guest() {
    let said = |missing, lost, why: &str| {
        let world = World::new(None);
        world.says_at_last(LastWord {
            missing,
            lost,
            why: why.into(),
            ..LastWord::default()
        });
        both(&world, &settings(HOW), &Orders::default(), &(), None).0
    };
    said(0, 0, "").unwrap();
    // It has gone, and has ended there.
    said(7, 0, "it powered off").unwrap();
    let error = said(1, 3, "0x1000 does\nnot come").unwrap_err();
    assert_eq!(error.after, After::Damaged);
    let words = error.to_string();
    for needle in [
        "the guest has gone, and not all",
        "come to the destination: 3",
        "0x1000 does\\nnot come",
    ] {
        assert!(words.contains(needle), "{words}");
    }
}

#[test]
fn a_destination_that_is_killed_leaves_the_guest_with_the_source_unless_it_was_its_own() {
    let lost = AtomicBool::new(false);
    at_each_message(
        &[Arrives::All],
        Strike::Kill(Destination),
        |fault, world| {
            let (here, there) = both(world, &settings(HOW), &Orders::default(), &(), None);
            let what = format!("{fault:?}: {here:?}");
            assert_eq!(world.wrong(), [""; 0], "{what}");
            if !world.struck() {
                return check(world, &here, &there, &what);
            }
            assert!(!world.runs(Destination), "{what}");
            // Heard that it was the destination's, the source never runs it again.
            match &here {
                Ok(()) => assert!(!world.runs(Source), "{what}"),
                Err(error) if error.after == After::Lost => {
                    assert!(matches!(error.why, Why::DestinationGone { .. }), "{what}");
                    assert!(error.to_string().contains("the guest is lost"), "{error}");
                    assert!(!world.runs(Source), "{what}");
                    lost.store(true, Ordering::Relaxed);
                }
                Err(_) => assert!(world.runs(Source), "{what}"),
            }
        },
    );
    assert!(lost.into_inner());
}

#[test]
fn a_source_that_is_killed_takes_its_guest_along_unless_it_was_given_away() {
    at_each_message(&[Arrives::All], Strike::Kill(Source), |fault, world| {
        let (here, there) = both(world, &settings(HOW), &Orders::default(), &(), None);
        let what = format!("{fault:?}: {here:?}");
        assert_eq!(world.wrong(), [""; 0], "{what}");
        if !world.struck() {
            return check(world, &here, &there, &what);
        }
        assert!(!world.runs(Source), "{what}");
        // It runs there with what it has; whether all has come is another matter.
        assert_eq!(world.runs(Destination), there.is_ok(), "{what}");
        assert_eq!(world.is_locked(Destination), there.is_ok(), "{what}");
    });
}
