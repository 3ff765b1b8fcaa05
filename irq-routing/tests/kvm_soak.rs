// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Interrupts at full rate from two threads into a guest that counts them, while a third changes
//! routes without rest: none is lost, none comes twice. About a second for each irqchip;
//! `LONG_TESTS=1` makes it a minute.
//!
//! What makes the counts exact, although an APIC merges what waits for the same vector:
//!
//! - In lockstep a sender raises its next only when the guest has counted the last one, wherever the
//!   route led it meanwhile.
//! - Of a pulse on the level-triggered pin in user space the chip says whether it was sent; it sends
//!   nothing more until the EOI, so nothing is there to merge with: at full rate the guest counts as
//!   many as were [`Arrival::Delivered`].
//! - A burst of messages at full rate is at least one interrupt and at most as many as were sent. Its
//!   end is the lowest vector of all, which the APIC gives the guest last.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Machine, Mode, Ram};
use guests::irq::REPORTED;
use irq_routing::host::CreateIrqchip;
use irq_routing::ioapic::SplitIoapic;
use irq_routing::{
    Arrival, Committed, Error, Gsi, GsiHandle, IrqchipKind, LevelSource, Msi, Pit, Routing,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Vm = Arc<VmFd>;

/// The guest's pins and their vectors.
const EDGE: (Gsi, u8) = (Gsi(20), 0x50);
const LEVEL: (Gsi, u8) = (Gsi(21), 0x51);
/// Sent behind others: the APIC delivers those first.
const LAST: u8 = 0x52;
/// Where the messages' route leads, in turn.
const MOVING: RangeInclusive<u8> = 0x53..=0x5a;
/// Of a GSI that comes and goes.
const PASSING: u8 = 0x5b;

const BURST: u32 = 200;

/// To APIC 0.
fn msi(vector: u8) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector.into(),
        devid: None,
    }
}

/// Ends the other threads, the guest among them, however this one ends.
struct Stop<'a> {
    routing: &'a Routing<Vm>,
    stop: &'a AtomicBool,
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.routing.signal_msi(msi(REPORTED)).unwrap();
    }
}

/// Waits until a count is what it should be; panics where it is more, or is not in a minute.
fn comes_to(what: &str, expected: u32, count: impl Fn() -> u32) {
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        let counted = count();
        if counted == expected {
            return;
        }
        assert!(
            counted < expected,
            "{what}: {counted} of {expected}: one came twice"
        );
        assert!(
            Instant::now() < give_up,
            "{what}: {counted} of {expected}: one was lost"
        );
        thread::yield_now();
    }
}

/// Again until it can be done without waiting.
fn patiently<T>(mut call: impl FnMut() -> Result<T, Error>) -> T {
    loop {
        match call() {
            Err(Error::WouldBlock) => thread::yield_now(),
            other => return other.unwrap(),
        }
    }
}

struct Soak<'a> {
    routing: &'a Routing<Vm>,
    ram: &'a Ram,
    stop: &'a AtomicBool,
    end: Instant,
}

impl Soak<'_> {
    /// Counts rounds as long as the time lasts: one at least, however slow the host is.
    fn rounds(&self) -> impl Iterator<Item = u32> {
        let goes_on = || Instant::now() < self.end && !self.stop.load(Ordering::Relaxed);
        (0..).take_while(move |&round| round == 0 || goes_on())
    }

    fn moving(&self) -> u32 {
        MOVING.map(|vector| self.ram.counted(vector)).sum()
    }

    /// By an irqfd and by calls, to wherever the GSI leads: how many were sent.
    fn messages(&self, gsi: &GsiHandle) -> u32 {
        let mut irqfd = self.routing.irqfd(gsi).unwrap();
        // `sent` is what the guest should have counted.
        let (mut all, mut sent) = (0, 0);
        for round in self.rounds() {
            all += 100 + BURST;
            for _ in 0..50 {
                irqfd.trigger().unwrap();
                sent += 1;
                comes_to("an irqfd's messages", sent, || self.moving());
                let arrival = patiently(|| self.routing.try_signal(gsi));
                assert_eq!(arrival, Arrival::Delivered { to: 1 });
                sent += 1;
                comes_to("a GSI's messages", sent, || self.moving());
            }
            for _ in 0..BURST / 2 {
                irqfd.trigger().unwrap();
                patiently(|| self.routing.try_signal(gsi));
            }
            // Nothing of the irqfd's is under way when it is detached.
            let detached = irqfd.detach().unwrap();
            self.routing.signal_msi(msi(LAST)).unwrap();
            comes_to("the end of a burst", round + 1, || self.ram.counted(LAST));
            let came = self.moving() - sent;
            assert!((1..=BURST).contains(&came), "{came} of {BURST} at once");
            sent += came;
            irqfd = detached.attach().unwrap();
        }
        all
    }

    /// Edges of a pin in lockstep, and levels at full rate: how many were delivered.
    fn pins(&self, ioapic: &SplitIoapic<Vm>, [edge, level]: [&GsiHandle; 2]) -> u32 {
        let (edge, level) = (ioapic.line(edge).unwrap(), ioapic.line(level).unwrap());
        // Its first one commits the pins' routes.
        level.pulse().unwrap();
        let (mut edges, mut levels, mut coalesced) = (0, 1, 0u32);
        for _ in self.rounds() {
            for _ in 0..50 {
                assert_eq!(patiently(|| edge.try_pulse()), Arrival::Delivered { to: 1 });
                edges += 1;
                comes_to("edges of a pin", edges, || self.ram.counted(EDGE.1));
            }
            for _ in 0..BURST {
                match patiently(|| level.try_pulse()) {
                    Arrival::Delivered { to: 1 } => levels += 1,
                    Arrival::Coalesced => coalesced += 1,
                    other => panic!("{other:?}"),
                }
                if coalesced % 8 == 7 {
                    thread::yield_now();
                }
            }
            comes_to("levels of a pin", levels, || self.ram.counted(LEVEL.1));
        }
        eprintln!("{coalesced} levels more came before the EOI of the last");
        assert!(ioapic.take_error().is_none());
        edges + levels
    }

    /// The same pins of KVM's own IOAPIC, both in lockstep.
    fn kvms_pins(&self, [edge, level]: [&GsiHandle; 2]) -> u32 {
        let line = self.routing.line(edge).unwrap().share().unwrap();
        let edge: &dyn LevelSource = &line.source();
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let resample = eventfd();
        let told = resample.try_clone().unwrap();
        let level = self.routing.irqfd_resample(level, eventfd(), resample);
        let level = level.unwrap();
        let mut sent = 0;
        for _ in self.rounds() {
            assert_eq!(
                patiently(|| edge.try_set(true)),
                Arrival::Delivered { to: 1 }
            );
            patiently(|| edge.try_set(false));
            level.trigger().unwrap();
            sent += 1;
            comes_to("edges of KVM's pin", sent, || self.ram.counted(EDGE.1));
            comes_to("levels of KVM's pin", sent, || self.ram.counted(LEVEL.1));
            comes_to("a resample", 1, || told.read().unwrap_or(0) as u32);
        }
        2 * sent
    }

    /// Changes routes without rest: how often KVM's table was set.
    fn change(&self, moving: &GsiHandle) -> u32 {
        let mut commits = 0;
        for (_, vector) in self.rounds().zip(MOVING.cycle()) {
            let mut change = self.routing.change();
            change.route(moving, msi(vector));
            let committed = if vector % 2 == 0 {
                change.commit().unwrap()
            } else {
                change.defer().unwrap();
                self.routing.flush().unwrap()
            };
            commits += u32::from(committed != Committed::Unchanged);
            // Another device comes, interrupts once, and goes.
            let passing = self.routing.allocate().unwrap();
            self.routing.route(&passing, msi(PASSING)).unwrap();
            let before = self.ram.counted(PASSING);
            let irqfd = self.routing.irqfd(&passing).unwrap();
            irqfd.trigger().unwrap();
            comes_to("a passing device", before + 1, || self.ram.counted(PASSING));
            commits += 1;
        }
        commits
    }
}

fn soak(kind: IrqchipKind) {
    let long = std::env::var_os("LONG_TESTS").is_some();
    let span = Duration::from_secs(if long { 60 } else { 1 });
    let mut machine = Machine::new(kind, Mode::Protected, guests::irq::counter());
    let (routing, ram) = (machine.routing.clone(), Arc::clone(&machine.ram));
    let ioapic = match kind {
        IrqchipKind::Split { .. } => Some(SplitIoapic::new(&routing).unwrap()),
        _ => None,
    };
    machine.ioapic = ioapic.clone();
    machine.ready();
    let [edge, level] = [EDGE, LEVEL].map(|(gsi, _)| routing.reserve(gsi).unwrap());
    let moving = routing.allocate().unwrap();
    routing.route(&moving, msi(*MOVING.start())).unwrap();
    let stop = AtomicBool::new(false);
    let soak = Soak {
        routing: &routing,
        ram: &ram,
        stop: &stop,
        end: Instant::now() + span,
    };
    let pins = [&edge, &level];
    let (soak, moving) = (&soak, &moving);
    let (messages, pins, commits) = thread::scope(|scope| {
        let _stop = Stop {
            routing: &routing,
            stop: &stop,
        };
        scope.spawn(|| assert_eq!(machine.reported_vector(), REPORTED));
        let messages = scope.spawn(|| soak.messages(moving));
        let pins = scope.spawn(|| match &ioapic {
            Some(ioapic) => soak.pins(ioapic, pins),
            None => soak.kvms_pins(pins),
        });
        let commits = scope.spawn(|| soak.change(moving));
        (
            messages.join().unwrap(),
            pins.join().unwrap(),
            commits.join().unwrap(),
        )
    });
    eprintln!("{kind:?}: {messages} messages, {pins} by pins, {commits} commits");
    assert!(messages > 0 && pins > 0 && commits > 0);
}

#[test]
fn no_interrupt_is_lost_or_doubled_through_the_split_irqchip() {
    if !common::kvm().create_vm().unwrap().has_split_irqchip() {
        eprintln!("NOT TRIED: this host's KVM has no split irqchip (KVM_CAP_SPLIT_IRQCHIP)");
        return;
    }
    soak(IrqchipKind::Split { pins: 24 });
}

#[test]
fn no_interrupt_is_lost_or_doubled_through_the_irqchip_in_the_kernel() {
    soak(IrqchipKind::Kernel { pit: Pit::Absent });
}
