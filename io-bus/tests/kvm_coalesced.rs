// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Coalesced writes on the real KVM: every one arrives, once, in order, before the exit that
//! follows, whether KVM kept it or not.

#![cfg(feature = "kvm")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::sync::{Arc, Mutex};

use io_bus::{Answer, At, BusKind, Error, IoBus, IoDevice, IoRange, SetCoalescedZone};
use vm::Seen;

/// Everything that reached a device, in order.
#[derive(Default)]
struct Journal(Mutex<Vec<(u64, Vec<u8>)>>);

impl IoDevice for Journal {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        data.fill(0);
        self.0.lock().unwrap().push((at.address(), Vec::new()));
        Answer::Accepted
    }

    fn write(&self, at: At, data: &[u8]) -> Answer {
        self.0.lock().unwrap().push((at.address(), data.to_vec()));
        Answer::Accepted
    }
}

fn ports() -> IoRange {
    IoRange::new(0x3f8, 8).unwrap()
}

fn page() -> IoRange {
    IoRange::new(0x8000, 0x1000).unwrap()
}

/// Runs the counting guest with these zones. Gives the exits, and what the device has seen.
fn count(rounds: u16, zones: &[(BusKind, IoRange)]) -> (Vec<Seen>, Vec<(u64, Vec<u8>)>) {
    let mut machine = vm::machine_with(guests::io::io_counters(), rounds.into());
    let bus = IoBus::new();
    let journal = Arc::new(Journal::default());
    for (kind, range) in [
        (BusKind::Pio, ports()),
        (BusKind::Mmio, page()),
        (BusKind::Pio, IoRange::new(0x60, 1).unwrap()),
    ] {
        bus.register(kind, range, journal.clone()).unwrap().keep();
    }
    bus.attach_coalesced_ring(machine.ring()).unwrap();
    let zones: Vec<_> = zones
        .iter()
        .map(|(kind, range)| bus.coalesce(machine.vm.clone(), *kind, *range).unwrap())
        .collect();
    let exits = machine.run(&mut bus.dispatcher());
    assert!(exits.iter().all(|(_, outcome)| outcome.is_answered()));
    drop(zones);
    let seen = journal.0.lock().unwrap().clone();
    let exits: Vec<_> = exits.into_iter().map(|(seen, _)| seen).collect();
    let kept = 2 * u64::from(rounds) + 1 - exits.len() as u64;
    assert_eq!(bus.coalesced_writes(), kept);
    (exits, seen)
}

/// What the guest does, in its order.
fn expected(rounds: u16) -> Vec<(u64, Vec<u8>)> {
    let mut all = Vec::new();
    for n in 0..rounds {
        let data = n.to_le_bytes().to_vec();
        all.extend([(0x3f8, data.clone()), (0x8000, data)]);
    }
    all.push((0x60, Vec::new()));
    all
}

#[test]
fn kept_writes_arrive_in_order_before_the_exit_that_follows() {
    let (exits, seen) = count(10, &[(BusKind::Pio, ports()), (BusKind::Mmio, page())]);
    assert_eq!(seen, expected(10));
    // Only the read left the guest.
    assert_eq!(exits, [Seen::In(0x60, vec![0])]);
}

#[test]
fn a_zone_on_one_bus_alone_keeps_the_order_with_the_other() {
    for zone in [(BusKind::Pio, ports()), (BusKind::Mmio, page())] {
        let (exits, seen) = count(10, &[zone]);
        assert_eq!(seen, expected(10));
        assert_eq!(exits.len(), 11);
    }
}

#[test]
fn a_full_ring_falls_back_to_plain_exits_and_keeps_the_order() {
    let rounds = 1000;
    let (exits, seen) = count(rounds, &[(BusKind::Pio, ports()), (BusKind::Mmio, page())]);
    assert_eq!(seen, expected(rounds));
    // The ring has room for 169 writes; the 170th leaves the guest, and they go before it.
    let overflows = exits.len() - 1;
    assert_eq!(overflows, 2 * usize::from(rounds) / 170);
    let ends = exits.iter().filter(|seen| matches!(seen, Seen::In(..)));
    assert_eq!(ends.count(), 1);
}

#[test]
fn without_a_zone_every_write_leaves_the_guest_and_so_it_does_after_one() {
    let (exits, seen) = count(5, &[]);
    assert_eq!((exits.len(), seen), (11, expected(5)));

    let mut machine = vm::machine_with(guests::io::io_serial(), 5);
    let bus = IoBus::new();
    bus.attach_coalesced_ring(machine.ring()).unwrap();
    let vm = machine.vm.clone();
    let mut zone = bus.coalesce(vm, BusKind::Pio, ports()).unwrap();
    let mut io = bus.dispatcher();
    assert_eq!(machine.run(&mut io).len(), 0);
    assert_eq!(bus.coalesced_writes(), 5);
    zone.end().unwrap();
    machine.restart();
    assert_eq!(machine.run(&mut io).len(), 5);
    assert_eq!(bus.coalesced_zones(), []);
}

#[test]
fn a_zone_that_ends_has_what_was_kept_carried_out() {
    let mut machine = vm::machine_with(guests::io::io_serial(), 7);
    let bus = IoBus::new();
    let journal = Arc::new(Journal::default());
    let _serial = bus
        .register(BusKind::Pio, ports(), journal.clone())
        .unwrap();
    bus.attach_coalesced_ring(machine.ring()).unwrap();
    let zone = bus
        .coalesce(machine.vm.clone(), BusKind::Pio, ports())
        .unwrap();
    // A vCPU whose exit nobody has dispatched yet: another bus's dispatcher has no ring.
    machine.run(&mut IoBus::new().dispatcher());
    assert_eq!(journal.0.lock().unwrap().len(), 0);
    drop(zone);
    assert_eq!(journal.0.lock().unwrap().len(), 7);
}

#[test]
fn this_host_is_asked_what_it_can() {
    let machine = vm::machine(&[]);
    let vm = machine.vm.clone();
    assert!(vm.can_coalesce(BusKind::Mmio) && vm.can_coalesce(BusKind::Pio));
    assert!(!vm.can_coalesce(BusKind::CcwNotify) && !vm.can_coalesce(BusKind::FastMmio));
    let bus = IoBus::new();
    let none = bus.coalesce(vm.clone(), BusKind::Pio, ports()).unwrap_err();
    assert!(matches!(none, Error::NoRing { .. }));
    bus.attach_coalesced_ring(machine.ring()).unwrap();
    // Any vCPU shows it; one is enough.
    let second = bus.attach_coalesced_ring(machine.ring()).unwrap_err();
    assert_eq!(second, Error::RingAttached);
    for range in [IoRange::exact(0x3f8), IoRange::new(0xfff8, 9).unwrap()] {
        let refused = bus.coalesce(vm.clone(), BusKind::Pio, range);
        assert!(matches!(refused, Err(Error::NotCoalescible { .. })));
    }
}
