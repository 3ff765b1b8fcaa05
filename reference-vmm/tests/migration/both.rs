// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Both sides of a migration in a [`World`], to their ends, and what holds behind any of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reference_vmm::migration::codec::Compression;
use reference_vmm::migration::destination::{self, ReceiveError, receive};
use reference_vmm::migration::event::Observer;
use reference_vmm::migration::limit::Limiter;
use reference_vmm::migration::message::MigrationId;
use reference_vmm::migration::orders::Orders;
use reference_vmm::migration::postcopy::When;
use reference_vmm::migration::source::{self, MigrateError, Settings, WhenStuck, migrate};

use crate::world::Side::{Destination, Source};
use crate::world::{Dial, Ear, Made, Maker, World};

pub const ID: MigrationId = MigrationId([7; 16]);

pub type Received = Result<destination::Arrived<Made>, ReceiveError>;

pub fn settings(when_stuck: WhenStuck, postcopy: When) -> Settings {
    Settings {
        connections: 2,
        compression: Compression::None,
        limit: Arc::new(Limiter::new(None)),
        // The guest always has some pages left: it goes through all rounds that are tried, and is stopped then, if ever.
        downtime: Duration::from_nanos(10),
        time: Duration::from_secs(3600),
        when_stuck,
        postcopy,
        patience: source::Patience {
            again: Duration::from_millis(1),
            ..source::Patience::default()
        },
    }
}

/// Both sides, each on a thread of its own, to their ends.
pub fn both(
    world: &Arc<World>,
    settings: &Settings,
    orders: &Orders,
    observer: &dyn Observer,
    refuses: Option<&'static str>,
) -> (Result<(), MigrateError>, Received) {
    let maker = Maker {
        world: Arc::clone(world),
        refuses,
    };
    let ear = Ear(Arc::clone(world));
    let patience = destination::Patience {
        greeting: world.greeting(),
        pages: Duration::from_millis(200),
        // None of the two is silent without an end to its connection.
        asked: match world.has_tunnel() {
            // Behind it nobody is known to be gone: it is asked until it answers.
            true => Duration::from_millis(500),
            false => Duration::from_millis(100),
        },
        ..destination::Patience::default()
    };
    // Where no source was ever heard, one is waited for.
    let gone = AtomicBool::new(false);
    let stop = || {
        gone.load(Ordering::Relaxed)
            .then(|| "no source is left".to_owned())
    };
    std::thread::scope(|scope| {
        let there = scope.spawn(|| receive(ear, maker, patience, &stop));
        let dial = Dial(Arc::clone(world));
        let here = migrate(&**world, &dial, ID, settings, orders, observer);
        gone.store(here.is_err(), Ordering::Relaxed);
        (here, there.join().unwrap())
    })
}

/// The guest has one owner, and the other has nothing of it.
pub fn check(world: &World, here: &Result<(), MigrateError>, there: &Received, what: &str) {
    let said = || {
        let there = there.as_ref().map(|_| ()).map_err(ToString::to_string);
        let here = here.as_ref().map_err(ToString::to_string);
        format!("{what}: source {here:?}, destination {there:?}")
    };
    assert_eq!(world.wrong(), [""; 0], "{}", said());
    let runs = [world.runs(Source), world.runs(Destination)];
    assert_eq!(runs, [here.is_err(), here.is_ok()], "{}", said());
    assert_eq!(there.is_ok(), here.is_ok(), "{}", said());
    if let Err(error) = here {
        // Who reads no further knows where it is.
        let first = error.to_string();
        assert!(first.starts_with("the guest runs on here: "), "{first}");
    }
    for side in [Source, Destination] {
        assert_eq!(world.is_locked(side), world.runs(side), "{}", said());
    }
    assert!(here.is_ok() || !world.is_tracked(), "{}", said());
    assert_eq!(world.throttled(), 0, "{}", said());
}
