// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that migrates has one owner, whatever breaks: the wire is cut at each message, in each direction, and either
//! side killed there.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "migration/both.rs"]
mod both;
#[allow(dead_code)]
#[path = "migration/world.rs"]
mod world;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use both::{ID, Received, both, check};
use reference_vmm::migration::address::Address;
use reference_vmm::migration::callers::MOST;
use reference_vmm::migration::codec::Compression;
use reference_vmm::migration::destination::{self, ReceiveError, receive};
use reference_vmm::migration::dial;
use reference_vmm::migration::event::{Event, Observer};
use reference_vmm::migration::limit::Limiter;
use reference_vmm::migration::link::{
    LinkError, Patient, TICK, Watch, Wire, greeted, receive as hear,
};
use reference_vmm::migration::message::{Greeting, Message, MigrationId, Role, Side as Says};
use reference_vmm::migration::orders::{OrderError, Orders, Whereabouts};
use reference_vmm::migration::pages::{ReadPages, WritePages};
use reference_vmm::migration::postcopy::When;
use reference_vmm::migration::source::{
    self, After, MigrateError, Settings, WhenStuck, Why, migrate,
};
use reference_vmm::migration::tls::{Tls, TlsFiles};
use reference_vmm::migration::transport::{HANDSHAKE, Listener};
use world::Side::{Destination, Source};
use world::{Arrives, Dial, Ear, Fault, Maker, Side, Strike, World};

fn settings() -> Settings {
    both::settings(WhenStuck::Stop, When::Never)
}

#[test]
fn a_guest_goes_with_all_that_it_has() {
    let world = World::new(None);
    let (here, there) = both(&world, &settings(), &Orders::default(), &(), None);
    here.as_ref().unwrap();
    check(&world, &here, &there, "nothing breaks");
}

/// How many messages each side has in a migration that nothing breaks.
fn messages() -> [usize; 2] {
    let world = World::new(None);
    let (here, _there) = both(&world, &settings(), &Orders::default(), &(), None);
    here.unwrap();
    [world.said(Source), world.said(Destination)]
}

/// At each message of each side; for a word that comes late, of the source.
fn at_each_message(arrives: &[Arrives], strike: Strike, check: impl Fn(Fault, &Arc<World>)) {
    let sides: &[Side] = match strike {
        Strike::Late => &[Source],
        _ => &[Source, Destination],
    };
    for (of, most) in sides.iter().copied().zip(messages()) {
        let mut struck = 0;
        // Which of two connections is faster changes how many frames there are.
        for number in 0..most + 4 {
            for arrives in arrives.iter().copied() {
                let fault = Fault {
                    of,
                    number,
                    arrives,
                    strike,
                };
                let world = World::new(Some(fault));
                check(fault, &world);
                struck += usize::from(world.struck());
            }
        }
        assert!(
            struck >= most / 2 * arrives.len(),
            "{strike:?}: {struck} of {most}"
        );
    }
}

const ALL: [Arrives; 3] = [Arrives::Nothing, Arrives::Half, Arrives::All];

fn one_guest_runs(arrives: &[Arrives], strike: Strike) {
    at_each_message(arrives, strike, |fault, world| {
        let (here, there) = both(world, &settings(), &Orders::default(), &(), None);
        check(world, &here, &there, &format!("{fault:?}"));
    });
}

#[test]
fn a_wire_that_is_severed_at_any_message_leaves_one_guest() {
    one_guest_runs(&ALL, Strike::SeverAll { lost: false });
}

#[test]
fn a_wire_that_loses_what_was_under_way_leaves_one_guest() {
    one_guest_runs(&ALL, Strike::SeverAll { lost: true });
}

#[test]
fn one_connection_that_breaks_at_any_message_leaves_one_guest() {
    one_guest_runs(&ALL, Strike::SeverOne);
}

#[test]
fn a_way_that_is_closed_for_a_while_leaves_one_guest() {
    one_guest_runs(&[Arrives::Nothing, Arrives::All], Strike::Partition(5));
}

#[test]
fn a_firewall_that_refuses_for_a_while_at_any_message_is_not_taken_for_the_destinations_death() {
    one_guest_runs(&[Arrives::Nothing, Arrives::All], Strike::Firewall(5));
}

/// A wire on which a byte comes whenever it is read, which takes so long, and that counts them.
struct Drip(Vec<u8>, usize, Duration);

impl Read for Drip {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        std::thread::sleep(self.2);
        let next = self.0.get(self.1).copied();
        self.1 += 1;
        bytes[0] = next.unwrap();
        Ok(1)
    }
}

impl Write for Drip {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl ReadPages for Drip {}
impl WritePages for Drip {}
impl Wire for Drip {}

#[test]
fn a_greeting_or_a_message_that_drips_is_over_in_time() {
    let (id, role) = (ID, Role::Settle);
    let greeting = Greeting { id, role }.encode().to_vec();
    let message = Message::GivenUp("why".repeat(100)).encode().unwrap();
    let watch = Watch {
        quiet: Duration::from_millis(200),
        stop: &|| None,
    };
    // Each byte takes a tenth of that.
    let drip = |bytes: &[u8]| Drip(bytes.to_vec(), 0, Duration::from_millis(20));
    let mut drips = drip(&greeting);
    let why = greeted(&mut drips, &watch).unwrap_err();
    assert!(matches!(why, LinkError::Slow(_)), "{why}");
    assert!(drips.1 <= 15, "{}", drips.1);
    let mut drips = drip(&message);
    let why = hear(&mut drips, Says::Destination, &watch).unwrap_err();
    assert!(matches!(why, LinkError::Slow(_)), "{why}");
    assert!(drips.1 <= 15, "{}", drips.1);
}

#[test]
fn whoever_never_stops_talking_is_stopped_all_the_same() {
    // Relaxed: one thread.
    let asked = AtomicU32::new(0);
    let stop = || {
        let again = asked.fetch_add(1, Ordering::Relaxed) > 0;
        again.then(|| "it is not wanted any more".to_owned())
    };
    let watch = || Watch {
        quiet: Duration::from_secs(60),
        stop: &stop,
    };
    let message = Message::GivenUp("why".repeat(1000)).encode().unwrap();
    let mut drips = Drip(message, 0, TICK / 5);
    let why = hear(&mut drips, Says::Source, &watch()).unwrap_err();
    assert!(matches!(why, LinkError::Stopped(_)), "{why}");
    assert!(drips.1 <= 15, "{}", drips.1);
    // And who reads pages, each of which comes at once.
    asked.store(0, Ordering::Relaxed);
    let mut talks = Drip(vec![0; 1 << 20], 0, TICK / 5);
    let mut patient = Patient::new(&mut talks, watch());
    let error = loop {
        if let Err(error) = patient.read(&mut [0]) {
            break error;
        }
    };
    let why = patient.why(error);
    assert!(matches!(why, LinkError::Stopped(_)), "{why}");
    assert!(talks.1 <= 15, "{}", talks.1);
}

#[test]
fn a_tunnel_that_dies_at_any_message_is_not_taken_for_the_destination() {
    one_guest_runs(&ALL, Strike::Tunnel(5));
}

#[test]
fn a_socket_whose_path_is_anothers_by_now_is_not_taken_for_the_destination() {
    one_guest_runs(&ALL, Strike::Replaced(5));
}

#[test]
fn a_destination_that_is_killed_at_any_message_leaves_the_guest_with_the_source_unless_it_was_its_own()
 {
    at_each_message(&ALL, Strike::Kill(Destination), |fault, world| {
        let (here, there) = both(world, &settings(), &Orders::default(), &(), None);
        let what = format!("{fault:?}");
        if !world.struck() {
            return check(world, &here, &there, &what);
        }
        assert_eq!(world.wrong(), [""; 0], "{what}");
        // Gone, the source had heard that it was the destination's, and it died with its process.
        assert_eq!(world.runs(Source), here.is_err(), "{what}: {here:?}");
        assert!(!world.runs(Destination), "{what}");
    });
}

#[test]
fn a_source_that_is_killed_at_any_message_takes_its_guest_along_unless_it_was_given_away() {
    at_each_message(&ALL, Strike::Kill(Source), |fault, world| {
        let (here, there) = both(world, &settings(), &Orders::default(), &(), None);
        let what = format!("{fault:?}");
        if !world.struck() {
            return check(world, &here, &there, &what);
        }
        assert_eq!(world.wrong(), [""; 0], "{what}");
        assert!(!world.runs(Source), "{what}");
        assert_eq!(world.runs(Destination), there.is_ok(), "{what}: {here:?}");
        assert_eq!(world.is_locked(Destination), there.is_ok(), "{what}");
    });
}

#[test]
fn a_word_that_arrives_behind_the_pledge_starts_nothing() {
    let arrives = [Arrives::Nothing];
    at_each_message(&arrives, Strike::Late, |fault, world| {
        let (here, there) = both(world, &settings(), &Orders::default(), &(), None);
        check(world, &here, &there, &format!("{fault:?}"));
    });
}

/// Does something at an event.
struct At<F: Fn(&Event<'_>) + Sync>(F);

impl<F: Fn(&Event<'_>) + Sync> Observer for At<F> {
    fn event(&self, event: Event<'_>) {
        (self.0)(&event);
    }
}

#[test]
fn a_cancel_at_any_moment_before_the_guest_is_given_away_leaves_it_where_it_is() {
    let count = std::sync::atomic::AtomicUsize::new(0);
    let counter = At(|_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let world = World::new(None);
    both(&world, &settings(), &Orders::default(), &counter, None)
        .0
        .unwrap();
    let (mut cancelled, mut too_late, mut heard) = (0, 0, 0);
    for number in 0..count.into_inner() {
        let (world, orders) = (World::new(None), Orders::default());
        let seen = std::sync::atomic::AtomicUsize::new(0);
        let refused = AtomicBool::new(false);
        let observer = At(|_| {
            if seen.fetch_add(1, Ordering::Relaxed) == number {
                let late = orders.cancel() == Err(OrderError::TooLate);
                refused.store(late, Ordering::Relaxed);
            }
        });
        let (here, there) = both(&world, &settings(), &orders, &observer, None);
        check(
            &world,
            &here,
            &there,
            &format!("cancelled at event {number}"),
        );
        match (refused.into_inner(), &here) {
            (true, Ok(())) => too_late += 1,
            (false, Err(error)) => {
                assert!(matches!(error.why, Why::Cancelled), "{error}");
                // Unless it was asked first where the guest is.
                heard += usize::from(matches!(there, Err(ReceiveError::GivenUp(_))));
                cancelled += 1;
            }
            other => panic!("event {number}: {other:?}"),
        }
    }
    assert!(
        cancelled > 10 && heard > 10 && too_late == 1,
        "{cancelled} {too_late}"
    );
    assert_eq!(
        Orders::default().settle(Whereabouts::Here),
        Err(OrderError::NotInDoubt)
    );
}

#[test]
fn a_guest_that_ends_at_any_moment_ends_once() {
    for number in 0..12 {
        let world = World::new(None);
        let seen = std::sync::atomic::AtomicUsize::new(0);
        let observer = At(|_| {
            if seen.fetch_add(1, Ordering::Relaxed) == number {
                world.end();
            }
        });
        let (here, there) = both(&world, &settings(), &Orders::default(), &observer, None);
        assert!(
            matches!(here.unwrap_err().why, Why::Over(_)),
            "event {number}"
        );
        assert!(there.is_err() && !world.runs(Source) && !world.runs(Destination));
        assert_eq!(world.wrong(), [""; 0]);
    }
}

#[test]
fn a_guest_that_writes_too_fast_is_refused_with_what_a_stop_would_cost_and_goes_on() {
    let world = World::new(None);
    let settings = Settings {
        when_stuck: WhenStuck::Cancel,
        ..settings()
    };
    let (here, there) = both(&world, &settings, &Orders::default(), &(), None);
    check(&world, &here, &there, "stuck");
    let error = here.unwrap_err();
    let why = error.to_string();
    let Why::Stuck { rounds, left, .. } = error.why else {
        panic!("{why}");
    };
    assert!(rounds >= 3 && left > 0);
    assert!(why.contains("pages are left"), "{why}");
    assert!(why.contains("--when-stuck throttle"), "{why}");
}

/// So little may be sent that no round ever ends.
fn crawling(time: Duration) -> Settings {
    Settings {
        when_stuck: WhenStuck::Throttle,
        limit: Arc::new(Limiter::new(std::num::NonZeroU64::new(1))),
        time,
        ..settings()
    }
}

#[test]
fn a_round_that_does_not_end_in_time_is_given_up_with_what_is_left_of_it() {
    let world = World::new(None);
    let settings = crawling(Duration::from_millis(100));
    let (here, there) = both(&world, &settings, &Orders::default(), &(), None);
    check(&world, &here, &there, "out of time");
    let error = here.unwrap_err();
    let why = error.to_string();
    let Why::OutOfTime {
        round, pages, left, ..
    } = error.why
    else {
        panic!("{why}");
    };
    assert!(
        round == 1 && pages == world::pages() && left > 0 && left <= pages,
        "{why}"
    );
    assert!(why.contains("pages are left"), "{why}");
}

#[test]
fn a_round_that_the_time_cuts_short_is_sent_again_by_a_guest_that_is_to_be_stopped() {
    for micros in [0, 100, 1000, 5000, 20_000] {
        let world = World::new(None);
        let settings = Settings {
            time: Duration::from_micros(micros),
            ..settings()
        };
        let rounds = Mutex::new(Vec::new());
        let observer = At(|event| match event {
            Event::RoundDone(done) => rounds.lock().unwrap().push(done.pages),
            Event::Throttled(_) => panic!("it is not to be slowed"),
            _ => {}
        });
        let (here, there) = both(&world, &settings, &Orders::default(), &observer, None);
        here.as_ref().unwrap();
        // With all of its memory, or it says so.
        check(&world, &here, &there, &format!("{micros} us"));
        if micros == 0 {
            assert_eq!(rounds.into_inner().unwrap(), [0, world::pages()]);
        }
    }
}

#[test]
fn a_destination_that_dies_while_nothing_may_be_sent_is_noticed() {
    // The first piece on each data connection, behind greetings and the offer.
    for number in 4..6 {
        let fault = Fault {
            of: Source,
            number,
            arrives: Arrives::All,
            strike: Strike::Kill(Destination),
        };
        let world = World::new(Some(fault));
        let settings = crawling(Duration::from_secs(3600));
        let (here, there) = both(&world, &settings, &Orders::default(), &(), None);
        assert!(world.struck());
        check(&world, &here, &there, "dead");
        assert!(matches!(here.unwrap_err().why, Why::Link { .. }));
    }
}

#[test]
fn a_cancel_is_heard_while_nothing_may_be_sent() {
    let (world, orders) = (World::new(None), Orders::default());
    let (here, there) = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Behind its greetings and its offer.
            while world.said(Source) < 5 {
                std::thread::yield_now();
            }
            orders.cancel().unwrap();
        });
        let settings = crawling(Duration::from_secs(3600));
        both(&world, &settings, &orders, &(), None)
    });
    check(&world, &here, &there, "cancelled");
    assert!(matches!(here.unwrap_err().why, Why::Cancelled));
}

fn throttling() -> Settings {
    Settings {
        when_stuck: WhenStuck::Throttle,
        ..settings()
    }
}

/// What the guest was slowed by, step by step.
fn steps(world: &Arc<World>) -> (Vec<u8>, Result<(), MigrateError>, Received) {
    let steps = Mutex::new(Vec::new());
    let observer = At(|event| {
        if let Event::Throttled(throttle) = event {
            assert_eq!(world.throttled(), throttle.as_percent());
            steps.lock().unwrap().push(throttle.as_percent());
        }
    });
    let (here, there) = both(world, &throttling(), &Orders::default(), &observer, None);
    (steps.into_inner().unwrap(), here, there)
}

/// QEMU's.
const STEPS: [u8; 9] = [20, 30, 40, 50, 60, 70, 80, 90, 99];

#[test]
fn a_guest_that_writes_too_fast_goes_when_it_is_slowed_enough_and_is_slow_no_more() {
    let world = World::new(None);
    let (steps, here, there) = steps(&world);
    here.as_ref().unwrap();
    check(&world, &here, &there, "slowed");
    assert!(steps.len() > 1 && STEPS.starts_with(&steps), "{steps:?}");
}

#[test]
fn a_guest_that_is_slowed_in_vain_is_given_up_on_with_what_is_left_to_do_and_is_slow_no_more() {
    let world = World::new(None);
    world.defies_throttles();
    let (steps, here, there) = steps(&world);
    check(&world, &here, &there, "in vain");
    assert_eq!(steps, STEPS);
    let why = here.unwrap_err().to_string();
    for needle in ["slowed by 99 %", "pages are left", "(--postcopy)"] {
        assert!(why.contains(needle), "{why}");
    }
}

#[test]
fn a_wire_that_is_severed_at_any_message_leaves_one_guest_that_is_slow_no_more() {
    let strike = Strike::SeverAll { lost: false };
    at_each_message(&[Arrives::Nothing, Arrives::All], strike, |fault, world| {
        let (here, there) = both(world, &throttling(), &Orders::default(), &(), None);
        check(world, &here, &there, &format!("{fault:?}"));
    });
}

#[test]
fn a_cancel_at_any_step_of_a_throttle_lifts_it() {
    for step in [20, 30, 99] {
        let (world, orders) = (World::new(None), Orders::default());
        world.defies_throttles();
        let observer = At(|event| {
            if let Event::Throttled(throttle) = event
                && throttle.as_percent() == step
            {
                orders.cancel().unwrap();
            }
        });
        let (here, there) = both(&world, &throttling(), &orders, &observer, None);
        check(&world, &here, &there, "cancelled");
        assert!(matches!(here.unwrap_err().why, Why::Cancelled), "{step}");
    }
}

#[test]
fn a_destination_that_cannot_have_the_guest_says_so_before_the_first_page() {
    let world = World::new(None);
    let accepted = AtomicBool::new(false);
    let observer = At(|event| {
        if let Event::Accepted { .. } | Event::Round { .. } = event {
            accepted.store(true, Ordering::Relaxed);
        }
    });
    let why = "this host has no such MSR";
    let (here, there) = both(
        &world,
        &settings(),
        &Orders::default(),
        &observer,
        Some(why),
    );
    check(&world, &here, &there, "refused");
    assert!(!accepted.into_inner());
    let here = here.unwrap_err().to_string();
    assert!(here.contains(why), "{here}");
    let there = there.err().unwrap().to_string();
    assert!(there.contains(why), "{there}");
}

/// A destination that would stay for an hour to be asked, until `stop` says something.
fn staying(world: &Arc<World>, stop: &(dyn Fn() -> Option<String> + Sync)) -> Received {
    let maker = Maker {
        world: Arc::clone(world),
        refuses: None,
    };
    let patience = destination::Patience {
        asked: Duration::from_secs(3600),
        ..destination::Patience::default()
    };
    receive(Ear(Arc::clone(world)), maker, patience, stop)
}

#[test]
fn a_destination_whose_machine_fails_behind_the_state_ends_when_the_source_has_heard_so() {
    let world = World::new(None);
    world.spoil();
    let (here, there) = std::thread::scope(|scope| {
        let there = scope.spawn(|| staying(&world, &|| None));
        let dial = Dial(Arc::clone(&world));
        let here = migrate(&*world, &dial, ID, &settings(), &Orders::default(), &());
        (here, there.join().unwrap())
    });
    check(&world, &here, &there, "spoiled");
    let why = there.err().unwrap().to_string();
    assert!(why.contains("cannot be made whole"), "{why}");
}

#[test]
fn a_destination_that_nobody_asks_ends_when_it_is_stopped() {
    // The source is gone, and nobody knows whether it had let go of the guest.
    let [messages, _] = messages();
    let fault = Fault {
        of: Source,
        number: messages - 3,
        arrives: Arrives::All,
        strike: Strike::Kill(Source),
    };
    let world = World::new(Some(fault));
    // Behind that it stays to be asked.
    let stop = || world.was_dropped().then(|| "SIGTERM".to_owned());
    let there = std::thread::scope(|scope| {
        let there = scope.spawn(|| staying(&world, &stop));
        let dial = Dial(Arc::clone(&world));
        let here = migrate(&*world, &dial, ID, &settings(), &Orders::default(), &());
        assert!(here.is_err() && world.struck());
        there.join().unwrap()
    });
    assert!(there.is_err() && !world.runs(Destination) && world.was_dropped());
    assert_eq!(world.wrong(), [""; 0]);
}

#[test]
fn a_destination_that_is_stopped_before_the_guest_is_its_own_leaves_it_to_the_source() {
    let [messages, _] = messages();
    let world = World::new(None);
    // Go has been said, and not been taken.
    let stop = || (world.said(Source) == messages - 1).then(|| "SIGTERM".to_owned());
    let (here, there) = std::thread::scope(|scope| {
        let there = scope.spawn(|| staying(&world, &stop));
        let dial = Dial(Arc::clone(&world));
        let here = migrate(&*world, &dial, ID, &settings(), &Orders::default(), &());
        (here, there.join().unwrap())
    });
    check(&world, &here, &there, "stopped");
    assert!(here.is_err());
}

/// Where the word that gives the guest away is lost and no way leads to the destination any more.
fn in_doubt(say: Whereabouts) -> (Arc<World>, Result<(), MigrateError>, Received) {
    let [messages, _] = messages();
    // The last two are Go and Done.
    let fault = Fault {
        of: Source,
        number: messages - 2,
        arrives: match say {
            Whereabouts::Here => Arrives::Nothing,
            Whereabouts::There => Arrives::All,
        },
        strike: Strike::Partition(u32::MAX),
    };
    let (world, orders) = (World::new(Some(fault)), Orders::default());
    let told = AtomicBool::new(false);
    let observer = At(|event| {
        if let Event::InDoubt(why) = event {
            assert!(why.contains("cannot be reached"), "{why}");
            assert!(!world.runs(Source));
            assert_eq!(orders.cancel(), Err(OrderError::TooLate));
            // Whoever says so has looked.
            while say == Whereabouts::There && !world.runs(Destination) {
                std::thread::yield_now();
            }
            while say == Whereabouts::Here && world.is_locked(Destination) {
                std::thread::yield_now();
            }
            told.store(true, Ordering::Relaxed);
        }
    });
    let (here, there) = std::thread::scope(|scope| {
        scope.spawn(|| {
            // It is in doubt from then on, until this is said.
            while !told.load(Ordering::Relaxed) || orders.settle(say).is_err() {
                std::thread::yield_now();
            }
        });
        both(&world, &settings(), &orders, &observer, None)
    });
    assert!(world.struck());
    (world, here, there)
}

#[test]
fn a_source_that_can_ask_nobody_stands_still_until_somebody_says_where_the_guest_is() {
    let (world, here, there) = in_doubt(Whereabouts::Here);
    check(&world, &here, &there, "here");
    assert!(matches!(here.unwrap_err().why, Why::SaidToBeHere));
    let (world, here, there) = in_doubt(Whereabouts::There);
    check(&world, &here, &there, "there");
}

#[test]
fn a_destination_that_cannot_accept_for_a_while_is_not_taken_for_gone() {
    let [messages, _] = messages();
    let fault = Fault {
        of: Source,
        // Go.
        number: messages - 2,
        arrives: Arrives::All,
        strike: Strike::SeverAll { lost: false },
    };
    let world = World::new(Some(fault));
    world.out_of_files(1);
    let (here, there) = both(&world, &settings(), &Orders::default(), &(), None);
    check(&world, &here, &there, "out of files");
    assert!(here.is_ok() && world.runs(Destination));
}

#[test]
fn a_destination_that_cannot_accept_for_a_while_before_any_source_has_come_waits_on() {
    let world = World::new(None);
    world.out_of_files_at_first(2);
    let (here, there) = both(&world, &settings(), &Orders::default(), &(), None);
    check(&world, &here, &there, "out of files at first");
    here.unwrap();
    assert_eq!(world.lacks_files(), 0);
}

#[test]
fn what_cannot_be_taken_back_is_tried_again_and_then_told() {
    // The state is lost: the source has let go of its disk.
    let [messages, _] = messages();
    let fault = Fault {
        of: Source,
        number: messages - 3,
        arrives: Arrives::Nothing,
        strike: Strike::SeverAll { lost: false },
    };
    for (busy, patience, expected) in [
        (3, Duration::from_secs(60), true),
        (u32::MAX, Duration::ZERO, false),
    ] {
        let world = World::new(Some(fault));
        world.busy(busy);
        let mut settings = settings();
        settings.patience.take_back = patience;
        let (here, there) = both(&world, &settings, &Orders::default(), &(), None);
        assert!(there.is_err());
        assert_eq!(world.wrong(), [""; 0]);
        assert_eq!(world.runs(Source), expected);
        let error = here.unwrap_err();
        assert_eq!(error.after == After::RunsOn, expected, "{error}");
        let begins = match expected {
            true => "the guest runs on here: ",
            false => "the guest is paused here, because ",
        };
        let said = error.to_string();
        assert!(said.starts_with(begins), "{said}");
        assert_eq!(!said.contains("somebody has the disk"), expected, "{said}");
    }
}

#[test]
fn strangers_who_say_nothing_keep_nobody_waiting() {
    let world = World::new(None);
    world.hears_strangers_out();
    let _silent: Vec<_> = (0..8).map(|_| world.stranger()).collect();
    let (here, there) = both(&world, &settings(), &Orders::default(), &(), None);
    check(&world, &here, &there, "silent strangers");
    here.unwrap();
}

#[test]
fn strangers_are_sent_away_and_the_guest_comes_all_the_same() {
    let world = World::new(None);
    let mut lines = [world.stranger(), world.stranger(), world.stranger()];
    lines[0]
        .write_all(b"GET / HTTP/1.1\r\nHost: somebody-on-the-network\r\n\r\n")
        .unwrap();
    let settle = reference_vmm::migration::message::Greeting {
        id: MigrationId([9; 16]),
        role: reference_vmm::migration::message::Role::Settle,
    };
    lines[1].write_all(&settle.encode()).unwrap();
    let [_, mut asks, silent] = lines;
    // Nothing comes, and its end does.
    drop(silent);
    let said = std::thread::scope(|scope| {
        let asks = scope.spawn(move || {
            let mut answer: Vec<u8> = Vec::new();
            while answer.len() < 13 {
                let mut bytes = [0; 64];
                match asks.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(len) => answer.extend(&bytes[..len]),
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
                }
            }
            answer
        });
        let (here, there) = both(&world, &settings(), &Orders::default(), &(), None);
        check(&world, &here, &there, "strangers");
        asks.join().unwrap()
    });
    // It knows nothing of another migration; of its own, if that has been offered by then, it tells who knows its number.
    use reference_vmm::migration::message::{Ending, Message};
    let unknown = Message::Settled(Ending::Unknown).encode().unwrap();
    let known = Message::Known {
        chance: [0; 16],
        proof: [0; 32],
    };
    let known = known.encode().unwrap();
    let is_known = said.get(..8) == known.get(..8);
    assert!(said == unknown || is_known, "{said:?}");
}

/// A guest that goes over real connections.
fn goes_over(
    address: &str,
    tls: [Option<&Tls>; 2],
) -> (Arc<World>, Result<(), MigrateError>, Received) {
    let listener = Listener::bind(&address.parse().unwrap(), tls[1]).unwrap();
    goes_to(listener, tls[0], When::Never)
}

/// Within a time in which who says nothing is not closed by itself.
fn goes_to(
    listener: Listener,
    tls: Option<&Tls>,
    postcopy: When,
) -> (Arc<World>, Result<(), MigrateError>, Received) {
    let address = listener.address().clone();
    let dial = dial::Dial::new(address, tls.cloned());
    let world = World::new(None);
    let maker = Maker {
        world: Arc::clone(&world),
        refuses: None,
    };
    let gone = AtomicBool::new(false);
    let stop = || {
        gone.load(Ordering::Relaxed)
            .then(|| "no source is left".to_owned())
    };
    let patience = destination::Patience::default();
    let (here, there) = std::thread::scope(|scope| {
        let there = scope.spawn(|| receive(dial::Ear::new(listener), maker, patience, &stop));
        let orders = Orders::default();
        let settings = Settings {
            connections: 3,
            compression: Compression::Zstd { level: 1 },
            postcopy,
            patience: source::Patience {
                connect: HANDSHAKE / 2,
                ..settings().patience
            },
            ..settings()
        };
        let here = migrate(&*world, &dial, ID, &settings, &orders, &());
        gone.store(here.is_err(), Ordering::Relaxed);
        (here, there.join().unwrap())
    });
    (world, here, there)
}

#[test]
fn a_guest_goes_over_unix_sockets_tcp_and_tls() {
    let folder = tempfile::tempdir().unwrap();
    let path = format!("unix:{}", folder.path().join("s").display());
    let (tls, other) = (authority(&folder, "a"), authority(&folder, "b"));
    for (address, tls) in [
        (path.as_str(), None),
        ("tcp:127.0.0.1:0", None),
        ("tcp:127.0.0.1:0", Some(&tls)),
    ] {
        let (world, here, there) = goes_over(address, [tls, tls]);
        here.as_ref().unwrap();
        check(&world, &here, &there, address);
    }
    // Who is not known is not let in.
    for tls in [[Some(&tls), Some(&other)], [None, Some(&tls)]] {
        let (world, here, there) = goes_over("tcp:127.0.0.1:0", tls);
        check(&world, &here, &there, "a stranger");
        here.unwrap_err();
    }
}

/// Connects from this address of this host's.
fn stranger(from: [u8; 4], to: &Address) -> std::io::Result<OwnedFd> {
    let Address::Tcp { port, .. } = to else {
        panic!("{to}");
    };
    let place = |ip: [u8; 4], port: u16| libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(ip),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: a new socket, which is owned from here on.
    let socket = unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        assert!(socket >= 0);
        OwnedFd::from_raw_fd(socket)
    };
    let fd = socket.as_raw_fd();
    for (call, place) in [
        (
            libc::bind as unsafe extern "C" fn(_, _, _) -> _,
            place(from, 0),
        ),
        (libc::connect, place([127, 0, 0, 1], *port)),
    ] {
        let len = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        // SAFETY: an open socket, and an address as long as is said, which is only read.
        if unsafe { call(fd, (&raw const place).cast(), len) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(socket)
}

#[test]
fn a_crowd_that_connects_and_says_nothing_keeps_neither_a_source_nor_its_pages_out() {
    let folder = tempfile::tempdir().unwrap();
    let tls = authority(&folder, "a");
    for (from, pause) in [
        // From another address, as fast as it can; and from the source's own, so slowly that it has its seconds for TLS.
        ([127, 0, 0, 2], Duration::ZERO),
        ([127, 0, 0, 1], Duration::from_millis(50)),
    ] {
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind(&address, Some(&tls)).unwrap();
        let to = listener.address().clone();
        let over = AtomicBool::new(false);
        let (came, came_before) = (AtomicU32::new(0), MOST as u32 - 8);
        let (world, here, there) = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut crowd = VecDeque::new();
                while !over.load(Ordering::Relaxed) {
                    // Where no more can connect, or nobody listens any more.
                    if let Ok(one) = stranger(from, &to) {
                        crowd.push_back(one);
                        came.fetch_add(1, Ordering::Relaxed);
                    }
                    // The first ones never go by themselves.
                    if crowd.len() > 300 {
                        crowd.remove(280);
                    }
                    if came.load(Ordering::Relaxed) > came_before + 30 {
                        std::thread::sleep(pause);
                    }
                }
            });
            // They are there before it, as many as can be before any is accepted.
            while came.load(Ordering::Relaxed) < came_before {
                std::thread::yield_now();
            }
            let went = goes_to(listener, Some(&tls), When::AfterRounds(1));
            over.store(true, Ordering::Relaxed);
            went
        });
        let what = format!("{from:?}, {came:?} came");
        println!("{what}");
        check(&world, &here, &there, &what);
        here.unwrap();
        assert!(world.is_whole(), "{what}");
    }
}

/// Of an authority of its own.
fn authority(folder: &tempfile::TempDir, name: &str) -> Tls {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
    use std::os::unix::fs::PermissionsExt;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let write = |what: &str, text: String| {
        let path = folder.path().join(format!("{name}.{what}"));
        std::fs::write(&path, text).unwrap();
        let owner = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&path, owner).unwrap();
        path
    };
    Tls::load(&TlsFiles {
        cert: write("pem", certificate.pem()),
        key: write("key", key.serialize_pem()),
        ca: write("ca", issuer.pem()),
        name: None,
    })
    .unwrap()
}
