// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration asks of the machine that it takes away, over the real KVM: disks that are durable, nobody else at work
//! with it, and the machine at the end that was offered at the beginning.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use dirty_log::estimate::Throttle;
use reference_vmm::api::router::{Action, Outcome};
use reference_vmm::api::{self, Monitor};
use reference_vmm::config::Irqchip;
use reference_vmm::devices::virtio::any::Devices;
use reference_vmm::devices::virtio::device::{Activation, Assignment, Cx, Handler, VirtioDevice};
use reference_vmm::devices::virtio::fault::Fault;
use reference_vmm::end::EndSignal;
use reference_vmm::migration::address::Address;
use reference_vmm::migration::codec::Compression;
use reference_vmm::migration::dial::Dial;
use reference_vmm::migration::guest::{Dirty, Refusal, SourceGuest};
use reference_vmm::migration::incoming::{Incoming, IncomingRequest};
use reference_vmm::migration::limit::Limiter;
use reference_vmm::migration::live::LiveGuest;
use reference_vmm::migration::message::MigrationId;
use reference_vmm::migration::orders::Orders;
use reference_vmm::migration::outgoing::{MigrateRequest, Order};
use reference_vmm::migration::postcopy::When;
use reference_vmm::migration::source::{self, Settings, WhenStuck, migrate};
use reference_vmm::snapshot::SnapshotRequest;
use reference_vmm::vm::{Machine, RunState};
use support::keeper::{Guest, keeper};
use support::{WATCHDOG, need_kvm};

/// A device that counts how often its host is asked to keep what it has.
struct Durable(Arc<AtomicUsize>);

struct Nothing;

impl Handler for Nothing {
    fn notified(&mut self, _: &mut Cx<'_>, _: usize) -> Result<(), Fault> {
        Ok(())
    }
}

impl VirtioDevice for Durable {
    type Handler = Nothing;
    type State = ();
    const DEVICE_ID: u32 = 63;
    const NAME: &'static str = "durable";

    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn activate(&mut self, _: &Activation) -> Result<Vec<Assignment<Nothing>>, Fault> {
        let (queues, handler) = (vec![0], Nothing);
        Ok(vec![Assignment { queues, handler }])
    }
    fn retire(&mut self, _: Vec<Nothing>) {}
    fn state(&self) {}
    fn make_durable(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn disks_are_durable_before_the_guest_stops() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let asked = Arc::new(AtomicUsize::new(0));
    let mut guest = Guest::start(|console, end| {
        let mut devices = Devices::open(&config, console).unwrap();
        devices.add("durable", Durable(Arc::clone(&asked)));
        Machine::build_with(&config, devices, console, end).unwrap()
    });
    guest.hear(1);
    let live = LiveGuest::new(&guest.running, &guest.end);
    live.hold().unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    live.take_back().unwrap();
    drop(live);
    guest.hear(1);
    let live = LiveGuest::new(&guest.running, &guest.end);
    // Refused behind that, for the machine is stopped: it was asked while nothing stood still for it.
    guest.running.stop();
    assert!(live.hold().is_err());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[test]
fn a_guest_of_which_a_snapshot_is_taken_is_not_handed_over() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let folder = tempfile::tempdir().unwrap();
    let (running, end) = (&guest.running, &guest.end);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // One behind the other, each of which holds the machine for most of its time.
        let snapshots = scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                let taken = running.snapshot(&SnapshotRequest::new(folder.path().join("to")));
                let why = taken.map_or_else(|error| error.to_string(), |_| String::new());
                assert!(why.is_empty() || why.contains("handed over"), "{why}");
            }
        });
        let live = LiveGuest::new(running, end);
        let begun = Instant::now();
        let refused = loop {
            match live.hold() {
                Ok(()) => live.take_back().unwrap(),
                Err(why) => break why.to_string(),
            }
            if snapshots.is_finished() || begun.elapsed() > WATCHDOG {
                break "never".to_owned();
            }
        };
        over.store(true, Ordering::SeqCst);
        snapshots.join().unwrap();
        assert!(
            refused.contains("a snapshot of the guest is being taken"),
            "{refused}"
        );
    });
    assert_eq!(guest.running.state(), RunState::Running);
    guest.hear(1);
    guest.has_all();
}

#[test]
fn a_snapshot_in_the_background_and_a_migration_are_not_done_side_by_side() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("silent");
    let silent = UnixListener::bind(&path).unwrap();
    let machine = api::Machine::new(&guest.running, &guest.end);
    let snapshot = || {
        machine.perform(Action::Snapshot(SnapshotRequest {
            background: true,
            ..SnapshotRequest::new(folder.path().join("to"))
        }))
    };
    std::thread::scope(|scope| {
        let request = MigrateRequest::new(format!("unix:{}", path.display()));
        let migrates = scope.spawn(|| machine.perform(Action::Migrate(Box::new(request))));
        // It has begun, and waits for an answer.
        let connection = silent.accept().unwrap();
        let Outcome::Refused(why) = snapshot() else {
            panic!("it was taken");
        };
        assert!(why.contains("the guest is being moved"), "{why}");
        let cancelled = machine.perform(Action::MigrateOrder(Order::Cancel));
        assert!(matches!(cancelled, Outcome::Done));
        let moved = migrates.join().unwrap();
        assert!(matches!(moved, Outcome::Refused(why) if why.contains("cancelled")));
        drop(connection);
    });
    assert!(matches!(snapshot(), Outcome::Json(_)));
}

/// A guest without a machine: it stands still from the start, all of its memory is zeros, and it says at the end that it is
/// another one.
struct Changeling {
    offered: Vec<u8>,
    state: Vec<u8>,
    memory: u64,
}

struct Nowhere;

impl Dirty for Nowhere {
    fn pages(&self) -> u64 {
        0
    }
    fn runs(&self, _: &mut dyn FnMut(Range<u64>) -> bool) {}
    fn commit(self) {}
}

impl SourceGuest for Changeling {
    type Dirty<'a> = Nowhere;

    fn memory(&self) -> u64 {
        self.memory
    }
    fn over(&self) -> Option<String> {
        None
    }
    fn rehearse(&self) -> Result<Vec<u8>, Refusal> {
        Ok(self.offered.clone())
    }
    fn start_tracking(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn stop_tracking(&self) {}
    fn harvest(&self) -> Result<Nowhere, Refusal> {
        Ok(Nowhere)
    }
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Refusal> {
        Ok(())
    }
    fn throttle(&self, _: Throttle) -> Result<(), Refusal> {
        Ok(())
    }
    fn hold(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn state(&self) -> Result<Vec<u8>, Refusal> {
        // It is not paused.
        Ok([&[0], &*self.state].concat())
    }
    fn release(&self) -> Result<(), Refusal> {
        Ok(())
    }
    fn take_back(&self) -> Result<(), Refusal> {
        Ok(())
    }
}

/// A machine with so many vCPUs, as it is offered.
fn offered(cpus: u32) -> Vec<u8> {
    let (_kernel, config) = keeper(cpus, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    LiveGuest::new(&guest.running, &guest.end)
        .rehearse()
        .unwrap()
}

#[test]
fn a_machine_that_is_another_than_was_offered_is_refused() {
    need_kvm();
    let (one, two) = (offered(1), offered(2));
    for (first, last, refused) in [(&one, &one, false), (&one, &two, true)] {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("incoming"));
        let incoming = Incoming::bind(&IncomingRequest::new(address.clone())).unwrap();
        let changeling = Changeling {
            offered: first.clone(),
            state: last.clone(),
            memory: 16 << 20,
        };
        let settings = Settings {
            connections: 1,
            compression: Compression::None,
            limit: Arc::new(Limiter::new(None)),
            downtime: WATCHDOG,
            time: WATCHDOG,
            when_stuck: WhenStuck::Stop,
            postcopy: When::Never,
            patience: source::Patience::default(),
        };
        let end = Arc::new(EndSignal::new().unwrap());
        let (_console, writer) = std::io::pipe().unwrap();
        let (said, hears) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let came = incoming.receive(writer, &end, &|| None, Machine::start);
                said.send(came.map(drop)).unwrap();
            });
            let (dial, id) = (Dial::new(address, None), MigrationId([1; 16]));
            let moved = migrate(&changeling, &dial, id, &settings, &Orders::default(), &());
            let came = hears.recv().unwrap();
            assert_eq!(moved.is_err(), refused, "{moved:?} {came:?}");
            assert_eq!(came.is_err(), refused, "{moved:?} {came:?}");
            if let Err(error) = moved {
                let why = error.to_string();
                assert!(why.contains("another machine than was offered"), "{why}");
            }
        });
    }
}
