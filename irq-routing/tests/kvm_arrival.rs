// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Interrupts arrive in a guest on the real KVM, along every path that the crate has.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Machine, Mode};
use irq_routing::{Arrival, Error, Gsi, Irqchip, IrqchipKind, Msi, Pit, Routing};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const KERNEL: IrqchipKind = IrqchipKind::Kernel { pit: Pit::Absent };
const SPLIT: IrqchipKind = IrqchipKind::Split { pins: 24 };

/// The edge-triggered ISA pin of the PIC guest and its vector.
const EDGE: (Gsi, Option<u8>) = (Gsi(4), Some(0x24));
/// The level-triggered one.
const LEVEL: (Gsi, Option<u8>) = (Gsi(5), Some(0x25));

fn pic_machine() -> Machine {
    let mut machine = Machine::new(KERNEL, Mode::Real, guests::irq::pic());
    machine.ready();
    machine
}

fn apic_machine(kind: IrqchipKind) -> Machine {
    let mut machine = Machine::new(kind, Mode::Protected, guests::irq::apic());
    machine.ready();
    machine
}

/// To APIC 0.
fn msi(vector: u32) -> Msi {
    Msi {
        address: 0xfee0_0000,
        data: vector,
        devid: None,
    }
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

#[test]
fn an_irqfd_on_a_legacy_pin_arrives_through_the_default_route() {
    let mut machine = pic_machine();
    let gsi = machine.routing.reserve(EDGE.0).unwrap();
    let irqfd = machine.routing.irqfd(&gsi).unwrap();
    for _ in 0..3 {
        irqfd.trigger().unwrap();
        assert_eq!(machine.next_vector(), EDGE.1);
    }
    assert!(machine.stays_idle());
}

#[test]
fn a_source_attaches_itself_at_its_first_interrupt() {
    let mut machine = pic_machine();
    let gsi = machine.routing.reserve(EDGE.0).unwrap();
    let source = machine.routing.source(&gsi);
    assert!(machine.stays_idle());
    for _ in 0..3 {
        source.clone().trigger().unwrap();
        assert_eq!(machine.next_vector(), EDGE.1);
    }
}

#[test]
fn a_source_without_an_irqchip_is_connected_to_nothing() {
    let vm = common::kvm().create_vm().unwrap();
    let irqchip = Irqchip::create(&vm, IrqchipKind::None).unwrap();
    let routing = Routing::new(&vm, &irqchip);
    let gsi = routing.reserve(Gsi(4)).unwrap();
    let source = routing.source(&gsi);
    source.trigger().unwrap();
    source.enable().unwrap();
    assert!(!source.is_connected());
    assert!(matches!(routing.irqfd(&gsi), Err(Error::NoIrqchip)));
    assert!(matches!(routing.line(&gsi), Err(Error::NoIrqchip)));
    assert!(matches!(
        routing.signal_msi(msi(0x50)),
        Err(Error::NoIrqchip)
    ));
}

#[test]
fn what_was_raised_while_detached_arrives_when_attached_again() {
    let mut machine = pic_machine();
    let gsi = machine.routing.reserve(EDGE.0).unwrap();
    let detached = machine.routing.irqfd(&gsi).unwrap().detach().unwrap();
    detached.trigger().unwrap();
    detached.trigger().unwrap();
    assert!(machine.stays_idle());
    let irqfd = detached.attach().unwrap();
    assert_eq!(machine.next_vector(), EDGE.1);
    assert!(machine.stays_idle(), "two edges that wait are one");
    irqfd.trigger().unwrap();
    assert_eq!(machine.next_vector(), EDGE.1);
}

#[test]
fn a_dropped_irqfd_is_detached() {
    let mut machine = pic_machine();
    let gsi = machine.routing.reserve(EDGE.0).unwrap();
    let fd = eventfd();
    let irqfd = machine.routing.irqfd_with(&gsi, fd.try_clone().unwrap());
    let irqfd = irqfd.unwrap();
    // EBUSY: an eventfd is attached once.
    let again = machine.routing.irqfd_with(&gsi, fd.try_clone().unwrap());
    assert!(matches!(again, Err(Error::Attach { .. })));
    fd.write(1).unwrap();
    assert_eq!(machine.next_vector(), EDGE.1);
    drop(irqfd);
    fd.write(1).unwrap();
    assert!(machine.stays_idle());
    let _irqfd = machine.routing.irqfd_with(&gsi, fd).unwrap();
    assert_eq!(machine.next_vector(), EDGE.1);
}

#[test]
fn a_resampled_line_stays_up_until_the_guest_acknowledges() {
    let mut machine = pic_machine();
    let gsi = machine.routing.reserve(LEVEL.0).unwrap();
    let (fd, resample) = (eventfd(), eventfd());
    let (trigger, acknowledged) = (fd.try_clone().unwrap(), resample.try_clone().unwrap());
    let _irqfd = machine.routing.irqfd_resample(&gsi, fd, resample).unwrap();
    for _ in 0..3 {
        trigger.write(1).unwrap();
        assert_eq!(machine.next_vector(), LEVEL.1);
        // The handler has reported and not yet acknowledged.
        acknowledged.read().unwrap_err();
        assert!(machine.stays_idle());
        assert_eq!(acknowledged.read().unwrap(), 1);
    }
}

#[test]
fn a_pulse_is_one_interrupt_on_an_edge_triggered_pin() {
    let mut machine = pic_machine();
    let gsi = machine.routing.reserve(EDGE.0).unwrap();
    let line = machine.routing.line(&gsi).unwrap();
    assert!(matches!(line.pulse().unwrap(), Arrival::Delivered { .. }));
    assert_eq!(line.pulse().unwrap(), Arrival::Coalesced);
    assert_eq!(machine.next_vector(), EDGE.1);
    assert!(machine.stays_idle());
}

#[test]
fn a_high_line_interrupts_again_until_it_is_low() {
    let mut machine = pic_machine();
    let gsi = machine.routing.reserve(LEVEL.0).unwrap();
    let line = machine.routing.line(&gsi).unwrap();
    line.set(true).unwrap();
    for _ in 0..3 {
        assert_eq!(machine.next_vector(), LEVEL.1);
    }
    line.set(false).unwrap();
    assert!(machine.stays_idle());
    line.set(true).unwrap();
    assert_eq!(machine.next_vector(), LEVEL.1);
    drop(line);
    assert!(machine.stays_idle(), "a dropped line is low");
}

#[test]
fn a_masked_pin_says_so() {
    let machine = pic_machine();
    // The guest masks all but two; the IOAPIC's pins are masked since reset.
    let gsi = machine.routing.reserve(Gsi(7)).unwrap();
    let line = machine.routing.line(&gsi).unwrap();
    assert_eq!(line.pulse().unwrap(), Arrival::Masked);
}

#[test]
fn a_message_arrives_with_and_without_a_route() {
    for kind in [KERNEL, SPLIT] {
        let mut machine = apic_machine(kind);
        let sent = machine.routing.signal_msi(msi(0x51)).unwrap();
        assert_eq!(sent, Arrival::Delivered { to: 1 });
        assert_eq!(machine.next_vector(), Some(0x51));

        let gsi = machine.routing.allocate().unwrap();
        machine.routing.route(&gsi, msi(0x50)).unwrap();
        let irqfd = machine.routing.irqfd(&gsi).unwrap();
        irqfd.trigger().unwrap();
        assert_eq!(machine.next_vector(), Some(0x50));

        // A route changes under an attached irqfd.
        machine.routing.route(&gsi, msi(0x51)).unwrap();
        irqfd.trigger().unwrap();
        assert_eq!(machine.next_vector(), Some(0x51));
    }
}

#[test]
fn a_message_that_no_one_takes_says_so() {
    // Not yet run, the guest's APIC is disabled.
    let machine = Machine::new(SPLIT, Mode::Protected, guests::irq::apic());
    assert_eq!(
        machine.routing.signal_msi(msi(0x50)).unwrap(),
        Arrival::Masked
    );
    // A VM without a vCPU: KVM has an errno for that.
    let vm = common::kvm().create_vm().unwrap();
    let irqchip = Irqchip::create(&vm, SPLIT).unwrap();
    let empty = Routing::new(&vm, &irqchip);
    assert_eq!(empty.signal_msi(msi(0x50)).unwrap(), Arrival::Masked);

    let machine = apic_machine(SPLIT);
    let nobody = Msi {
        address: 0xfee0_0000 | 5 << 12,
        ..msi(0x50)
    };
    assert_eq!(machine.routing.signal_msi(nobody).unwrap(), Arrival::Masked);
}

#[test]
fn a_deferred_route_is_committed_when_something_attaches() {
    let mut machine = apic_machine(SPLIT);
    let gsi = machine.routing.allocate().unwrap();
    let mut change = machine.routing.change();
    change.route(&gsi, msi(0x50));
    change.defer().unwrap();
    assert!(machine.routing.table().is_empty());
    let irqfd = machine.routing.irqfd(&gsi).unwrap();
    assert_eq!(machine.routing.table().len(), 1);
    irqfd.trigger().unwrap();
    assert_eq!(machine.next_vector(), Some(0x50));
}

#[test]
fn a_number_taken_again_does_not_inherit_a_route() {
    let mut machine = apic_machine(SPLIT);
    let gsi = machine.routing.allocate().unwrap();
    let number = gsi.gsi();
    machine.routing.route(&gsi, msi(0x50)).unwrap();
    drop(gsi);
    assert_eq!(
        machine.routing.table().len(),
        1,
        "no grace period for what no one can raise"
    );

    let gsi = machine.routing.allocate().unwrap();
    assert_eq!(gsi.gsi(), number);
    let irqfd = machine.routing.irqfd(&gsi).unwrap();
    irqfd.trigger().unwrap();
    assert!(machine.stays_idle());
}

#[test]
fn the_speakers_port_is_the_kernels_only_when_it_was_asked_for() {
    // in al, 0x61; out 0x80, al
    let code = [0xe4, 0x61, 0xe6, 0x80];
    for (pit, port) in [
        (Pit::Absent, 0x61),
        (Pit::Present, 0x61),
        (Pit::PresentWithSpeaker, 0x80),
    ] {
        let mut machine = Machine::new(IrqchipKind::Kernel { pit }, Mode::Real, &code);
        assert_eq!(machine.next_port(), port, "{pit:?}");
    }
}
