// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The `try_` forms never wait: while another thread stands inside a call to the kernel, with its
//! locks held, they answer at once, and what they refuse has changed nothing. One that waited would
//! hang its test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use irq_routing::fake::{Call, FakeHost};
use irq_routing::ioapic::{PinLine, SplitIoapic};
use irq_routing::{
    Arrival, Chip, ChipPin, Error, Gsi, GsiHandle, IrqchipKind, LevelSource, Msi, Pit, Routing,
};

const KERNEL: IrqchipKind = IrqchipKind::Kernel { pit: Pit::Absent };
const SPLIT: IrqchipKind = IrqchipKind::Split { pins: 24 };
const TAKEN: Arrival = Arrival::Delivered { to: 1 };

const EDGE: (u32, u32) = (4, 0x50);
const LEVEL: (u32, u32) = (5, 0x8051);

fn msi(data: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data,
        devid: None,
    }
}

fn would_block<T: Debug>(answer: Result<T, Error>) {
    assert!(matches!(answer, Err(Error::WouldBlock)), "{answer:?}");
}

/// Does `meanwhile` while `call` stands still in its next ioctl.
fn during<T>(host: &FakeHost, call: impl FnOnce() -> T + Send, meanwhile: impl FnOnce()) {
    let hold = host.hold_next();
    thread::scope(|scope| {
        scope.spawn(|| drop(call()));
        hold.entered();
        meanwhile();
        drop(hold);
    });
}

type Pin<'a> = (GsiHandle, PinLine<&'a FakeHost>);

/// A chip with an edge-triggered and a level-triggered pin, whose routes KVM has not.
fn split(host: &FakeHost) -> (Routing<&FakeHost>, SplitIoapic<&FakeHost>, [Pin<'_>; 2]) {
    let irqchip = irq_routing::Irqchip::assume(SPLIT);
    let routing = Routing::new(host, &irqchip);
    let ioapic = SplitIoapic::new(&routing).unwrap();
    let pins = [EDGE, LEVEL].map(|(pin, entry)| {
        program(&ioapic, pin, entry);
        let gsi = routing.reserve(Gsi(pin)).unwrap();
        let line = ioapic.line(&gsi).unwrap();
        (gsi, line)
    });
    (routing, ioapic, pins)
}

fn program(ioapic: &SplitIoapic<&FakeHost>, pin: u32, entry: u32) {
    ioapic.write(0x00, &(0x10 + 2 * pin).to_le_bytes());
    ioapic.write(0x10, &entry.to_le_bytes());
}

#[test]
fn a_line_that_another_thread_sets_is_left_to_it() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let gsis = [10, 11].map(|gsi| routing.reserve(Gsi(gsi)).unwrap());
    let [line, other] = [0, 1].map(|at| routing.line(&gsis[at]).unwrap());
    let raise = || line.set(true).unwrap();
    during(&host, raise, || {
        host.take_calls();
        would_block(line.try_set(false));
        would_block(line.try_pulse());
        assert_eq!(host.take_calls(), [], "KVM was not asked");
        assert_eq!(other.try_set(true).unwrap(), TAKEN);
    });
    assert_eq!(line.try_set(false).unwrap(), TAKEN);
    assert_eq!(line.try_pulse().unwrap(), TAKEN);
    assert!(!host.vm().lines[&Gsi(10)]);
    host.fail_after(0, libc::ENOMEM);
    assert!(matches!(line.try_set(true), Err(Error::Line { .. })));
    drop(line);
    assert_eq!(
        host.take_calls().len(),
        5,
        "a line that is low is not lowered"
    );
}

#[test]
fn a_shared_line_that_another_source_sets_is_left_to_it() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let gsi = routing.reserve(Gsi(10)).unwrap();
    let shared = routing.line(&gsi).unwrap().share().unwrap();
    let (one, two) = (shared.source(), shared.source());
    let raise = || one.set(true).unwrap();
    during(&host, raise, || {
        host.take_calls();
        would_block(one.try_set(false));
        would_block(two.try_set(true));
        assert_eq!(host.take_calls(), []);
    });
    // The refused source was not counted: the line falls with the other.
    one.try_set(false).unwrap();
    assert!(!host.vm().lines[&Gsi(10)]);
    // Through the trait as well, and both are counted now.
    let two: &dyn LevelSource = &two;
    two.try_set(true).unwrap();
    one.try_set(true).unwrap();
    one.try_set(false).unwrap();
    assert!(host.vm().lines[&Gsi(10)]);
    two.try_set(false).unwrap();
    assert!(!host.vm().lines[&Gsi(10)]);
}

#[test]
fn a_pin_is_left_alone_while_its_chip_sends() {
    let host = FakeHost::with_irqchip(SPLIT).0;
    let (_routing, ioapic, [(gsi, edge), (_, level)]) = split(&host);
    let second = ioapic.line(&gsi).unwrap();
    let before = ioapic.state();
    let pulse = || edge.pulse().unwrap();
    during(&host, pulse, || {
        host.take_calls();
        would_block(edge.try_set(true));
        would_block(second.try_set(true));
        would_block(second.try_pulse());
        would_block(level.try_set(true));
        assert_eq!(host.take_calls(), []);
    });
    assert_eq!(ioapic.state(), before);
    assert_eq!(ioapic.coalesced(Gsi(4)), 0);
    assert_eq!(second.try_pulse().unwrap(), TAKEN);
    assert_eq!(host.take_calls(), [Call::SignalMsi(msi(0x50))]);
}

#[test]
fn a_pin_is_left_alone_while_the_guest_writes_to_its_chip() {
    let host = FakeHost::with_irqchip(SPLIT).0;
    let (_routing, ioapic, [_, (_, level)]) = split(&host);
    program(&ioapic, LEVEL.0, LEVEL.1 | 0x1_0000);
    assert_eq!(level.try_set(true).unwrap(), Arrival::Masked);
    // It waits: unmasking commits its route and sends it.
    let unmask = || program(&ioapic, LEVEL.0, LEVEL.1);
    during(&host, unmask, || would_block(level.try_set(false)));
    assert!(ioapic.redirection(Gsi(LEVEL.0)).unwrap().remote_irr());
    assert_eq!(level.try_set(false).unwrap(), TAKEN);
}

#[test]
fn a_level_whose_route_is_not_kvms_is_sent_after_the_commit() {
    let host = FakeHost::with_irqchip(SPLIT).0;
    let (routing, ioapic, [(_, edge), (_, level)]) = split(&host);
    let before = (ioapic.state(), host.vm());
    would_block(level.try_set(true));
    would_block(level.try_pulse());
    assert_eq!((ioapic.state(), host.vm()), before);
    assert_eq!(host.take_calls(), []);
    assert!(ioapic.take_error().is_none(), "the caller was told");
    // An edge needs none.
    assert_eq!(edge.try_pulse().unwrap(), TAKEN);
    assert_eq!(host.take_calls(), [Call::SignalMsi(msi(0x50))]);

    routing.flush().unwrap();
    host.take_calls();
    assert_eq!(level.try_set(true).unwrap(), TAKEN);
    assert_eq!(host.take_calls(), [Call::SignalMsi(msi(0x8051))]);
    assert_eq!(level.try_set(true).unwrap(), Arrival::Coalesced);
    assert_eq!(level.try_set(false).unwrap(), TAKEN);
    // What the guest changes is a new route.
    ioapic.eoi(0x51);
    program(&ioapic, LEVEL.0, 0x8052);
    would_block(level.try_set(true));
    assert_eq!(level.set(true).unwrap(), TAKEN);
}

#[test]
fn a_pin_whose_message_fails_is_what_it_was() {
    let host = FakeHost::with_irqchip(SPLIT).0;
    let (routing, ioapic, lines) = split(&host);
    routing.flush().unwrap();
    let before = ioapic.state();
    for (_, line) in &lines {
        host.fail_after(0, libc::ENOMEM);
        assert!(matches!(line.try_set(true), Err(Error::SignalMsi { .. })));
        assert_eq!(ioapic.state(), before);
        assert_eq!(line.try_set(true).unwrap(), TAKEN);
        line.try_set(false).unwrap();
        ioapic.eoi(0x51);
        assert_eq!(ioapic.state(), before);
    }
}

#[test]
fn during_a_commit_what_needs_no_route_goes_and_what_needs_one_is_refused() {
    let host = FakeHost::with_irqchip(SPLIT).0;
    let (routing, ioapic, [(_, edge), (_, level)]) = split(&host);
    let [ours, theirs, lazy] = [0, 1, 2].map(|_| routing.allocate().unwrap());
    routing.route(&ours, msi(0x60)).unwrap();
    let attached = routing.source(&ours);
    attached.enable().unwrap();
    let lazy = routing.source(&lazy);
    let before = ioapic.state();
    let commit = || routing.route(&theirs, msi(0x61)).unwrap();
    during(&host, commit, || {
        host.take_calls();
        would_block(routing.try_signal(&ours));
        would_block(level.try_set(true));
        would_block(lazy.try_trigger());
        assert_eq!(host.take_calls(), []);
        assert_eq!(edge.try_pulse().unwrap(), TAKEN);
        assert_eq!(routing.signal_msi(msi(0x62)).unwrap(), TAKEN);
        attached.try_trigger().unwrap();
        let sent = [0x50, 0x62].map(|data| Call::SignalMsi(msi(data)));
        assert_eq!(host.take_calls(), sent);
    });
    assert_eq!(ioapic.state(), before);
    assert_eq!(routing.try_signal(&ours).unwrap(), TAKEN);
    assert_eq!(level.try_set(true).unwrap(), TAKEN);
    let irqfd = attached.irqfd().unwrap().unwrap();
    assert_eq!(irqfd.eventfd().read().unwrap(), 1);
}

#[test]
fn a_gsi_is_signalled_along_the_route_that_kvm_has() {
    let host = FakeHost::with_irqchip(SPLIT).0;
    let (routing, _, _) = split(&host);
    let gsi = routing.allocate().unwrap();
    assert_eq!(routing.try_signal(&gsi).unwrap(), Arrival::Masked);
    for data in [0x60, 0x61] {
        let mut change = routing.change();
        change.route(&gsi, msi(data));
        change.defer().unwrap();
        would_block(routing.try_signal(&gsi));
        routing.flush().unwrap();
        host.take_calls();
        assert_eq!(routing.try_signal(&gsi).unwrap(), TAKEN);
        assert_eq!(host.take_calls(), [Call::SignalMsi(msi(data))]);
    }
    host.fail_after(0, libc::ENOMEM);
    let failed = routing.try_signal(&gsi);
    assert!(matches!(failed, Err(Error::SignalMsi { .. })));

    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let kernel = Routing::new(&host, &irqchip);
    let foreign = kernel.try_signal(&gsi);
    assert!(matches!(foreign, Err(Error::ForeignGsi(_))));
    let pin = kernel.reserve(Gsi(4)).unwrap();
    let error = kernel.try_signal(&pin).unwrap_err();
    assert_eq!(error.to_string(), "GSI 4 is not routed to a message");
    let pin = ChipPin {
        chip: Chip::IOAPIC,
        pin: 3,
    };
    let message = kernel.allocate().unwrap();
    kernel.route(&message, pin).unwrap();
    assert!(matches!(
        kernel.try_signal(&message),
        Err(Error::NoMessage(_))
    ));

    let (host, irqchip) = FakeHost::with_irqchip(IrqchipKind::None);
    let none = Routing::new(&host, &irqchip);
    let gsi = none.allocate().unwrap();
    assert!(matches!(none.try_signal(&gsi), Err(Error::NoIrqchip)));
}

#[test]
fn a_source_is_raised_once_it_is_attached() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let routing = Routing::new(&host, &irqchip);
    let source = routing.source(&routing.reserve(Gsi(4)).unwrap());
    would_block(source.try_trigger());
    assert_eq!(host.take_calls(), []);
    // While another thread attaches it, too.
    let enable = || source.enable().unwrap();
    during(&host, enable, || would_block(source.try_trigger()));
    source.try_trigger().unwrap();
    assert_eq!(host.take_calls(), [Call::AttachIrqfd(Gsi(4))]);
    let irqfd = source.irqfd().unwrap().unwrap();
    assert_eq!(irqfd.eventfd().read().unwrap(), 1);

    let (host, irqchip) = FakeHost::with_irqchip(IrqchipKind::None);
    let routing = Routing::new(&host, &irqchip);
    let source = routing.source(&routing.reserve(Gsi(4)).unwrap());
    source.try_trigger().unwrap();
}

#[test]
fn a_pulse_of_a_level_pin_is_one_interrupt_or_none_whenever_eois_come() {
    let host = FakeHost::with_irqchip(SPLIT).0;
    let (_routing, ioapic, [_, (_, level)]) = split(&host);
    let done = AtomicBool::new(false);
    let mut delivered = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                ioapic.eoi(0x51);
            }
        });
        for _ in 0..5000 {
            delivered += usize::from(level.pulse().unwrap() == TAKEN);
        }
        done.store(true, Ordering::Relaxed);
    });
    let sent = Call::SignalMsi(msi(0x8051));
    let sent = host.take_calls().into_iter().filter(|&call| call == sent);
    assert_eq!(sent.count(), delivered);
    assert!(delivered > 0);
}
