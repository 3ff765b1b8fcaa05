// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest on the real KVM's split irqchip, whose IOAPIC is this crate's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::{Machine, Mode};
use irq_routing::host::CreateIrqchip;
use irq_routing::ioapic::{PinLine, SplitIoapic};
use irq_routing::{Arrival, Gsi, GsiHandle, IrqchipKind};
use kvm_ioctls::VmFd;

const SPLIT: IrqchipKind = IrqchipKind::Split { pins: 24 };

/// The guest's edge-triggered pin and its vector.
const EDGE: (Gsi, Option<u8>) = (Gsi(4), Some(0x50));
/// The level-triggered one.
const LEVEL: (Gsi, Option<u8>) = (Gsi(5), Some(0x51));

const TAKEN: Arrival = Arrival::Delivered { to: 1 };

/// None, and the reason on stderr, where KVM has no split irqchip.
fn machine() -> Option<Machine> {
    if !common::kvm().create_vm().unwrap().has_split_irqchip() {
        eprintln!("skipped: this host's KVM has no split irqchip (KVM_CAP_SPLIT_IRQCHIP)");
        return None;
    }
    let mut machine = Machine::new(SPLIT, Mode::Protected, guests::irq::ioapic());
    machine.ioapic = Some(SplitIoapic::new(&machine.routing).unwrap());
    machine.ready();
    Some(machine)
}

fn chip(machine: &Machine) -> SplitIoapic<Arc<VmFd>> {
    machine.ioapic.clone().unwrap()
}

fn line(machine: &Machine, gsi: Gsi) -> (PinLine<Arc<VmFd>>, GsiHandle) {
    let gsi = machine.routing.reserve(gsi).unwrap();
    (chip(machine).line(&gsi).unwrap(), gsi)
}

/// The guest's entry of a pin, as it would write it.
fn write_entry(chip: &SplitIoapic<Arc<VmFd>>, gsi: Gsi, low: u32) {
    chip.write(0x00, &(0x10 + 2 * gsi.0).to_le_bytes());
    chip.write(0x10, &low.to_le_bytes());
}

#[test]
fn the_guest_programs_the_table() {
    let Some(machine) = machine() else { return };
    let chip = chip(&machine);
    assert_eq!(chip.redirection(EDGE.0).unwrap().bits(), 0x50);
    assert_eq!(chip.redirection(LEVEL.0).unwrap().bits(), 0x8051);
    assert!(
        machine.routing.table().is_empty(),
        "no one can raise a pin yet, so KVM was not asked for anything"
    );
}

#[test]
fn an_edge_arrives_once() {
    let Some(mut machine) = machine() else { return };
    let (line, _gsi) = line(&machine, EDGE.0);
    for _ in 0..3 {
        assert_eq!(line.set(true).unwrap(), TAKEN);
        assert_eq!(line.set(true).unwrap(), Arrival::Coalesced);
        assert_eq!(machine.next_vector(), EDGE.1);
        assert!(machine.stays_idle(), "a line that stays high is no edge");
        line.set(false).unwrap();
    }
    assert_eq!(line.pulse().unwrap(), TAKEN);
    assert_eq!(machine.next_vector(), EDGE.1);
    assert!(machine.stays_idle());
    assert!(
        machine.routing.table().is_empty(),
        "an edge needs no route: no commit, no grace period"
    );
    assert_eq!(chip(&machine).coalesced(EDGE.0), 3);
}

#[test]
fn a_level_that_stays_asserted_comes_again_after_each_eoi() {
    let Some(mut machine) = machine() else { return };
    let (line, _gsi) = line(&machine, LEVEL.0);
    assert_eq!(line.set(true).unwrap(), TAKEN);
    assert_eq!(machine.routing.table().len(), 2, "both pins in one commit");
    assert_eq!(line.set(true).unwrap(), Arrival::Coalesced);
    for _ in 0..4 {
        assert_eq!(machine.next_vector(), LEVEL.1);
        assert!(chip(&machine).redirection(LEVEL.0).unwrap().remote_irr());
    }
    line.set(false).unwrap();
    // The last one's handler has reported and not yet acknowledged.
    assert!(machine.stays_idle());
    assert!(!chip(&machine).redirection(LEVEL.0).unwrap().remote_irr());
    assert_eq!(machine.eois, 4, "one EOI for each");
    assert_eq!(line.set(true).unwrap(), TAKEN);
    assert_eq!(machine.next_vector(), LEVEL.1);
    line.set(false).unwrap();
    assert!(machine.stays_idle());
    assert!(chip(&machine).take_error().is_none());
}

#[test]
fn two_sources_hold_a_line_until_both_are_low() {
    let Some(mut machine) = machine() else { return };
    let (one, gsi) = line(&machine, LEVEL.0);
    let two = chip(&machine).line(&gsi).unwrap();
    one.set(true).unwrap();
    assert_eq!(two.set(true).unwrap(), Arrival::Coalesced);
    assert_eq!(machine.next_vector(), LEVEL.1);
    one.set(false).unwrap();
    assert_eq!(machine.next_vector(), LEVEL.1);
    drop(two);
    assert!(machine.stays_idle());
}

#[test]
fn a_device_lowers_its_line_when_it_is_told_of_the_eoi() {
    let Some(mut machine) = machine() else { return };
    let (line, _gsi) = line(&machine, LEVEL.0);
    let line = Arc::new(line);
    let acked = Arc::clone(&line);
    let lower = move || assert_eq!(acked.set(false).unwrap(), TAKEN);
    let notifier = chip(&machine).register_ack_notifier(LEVEL.0, lower);
    for _ in 0..3 {
        assert_eq!(line.set(true).unwrap(), TAKEN);
        assert_eq!(machine.next_vector(), LEVEL.1);
        assert!(machine.stays_idle());
    }
    drop(notifier.unwrap());
    line.set(true).unwrap();
    assert_eq!(machine.next_vector(), LEVEL.1);
    assert_eq!(machine.next_vector(), LEVEL.1, "no one lowers it now");
}

#[test]
fn a_level_pin_masked_in_its_handler_is_acknowledged_and_comes_when_unmasked() {
    let Some(mut machine) = machine() else { return };
    let (line, _gsi) = line(&machine, LEVEL.0);
    line.set(true).unwrap();
    assert_eq!(machine.next_vector(), LEVEL.1);
    // In the handler, before its EOI, as Linux masks a one-shot interrupt.
    let chip = chip(&machine);
    write_entry(&chip, LEVEL.0, 0x1_8051);
    assert_eq!(line.set(true).unwrap(), Arrival::Masked);
    assert!(machine.stays_idle());
    assert_eq!(machine.eois, 1, "a masked pin's EOI arrives");
    assert!(!chip.redirection(LEVEL.0).unwrap().remote_irr());
    write_entry(&chip, LEVEL.0, 0x8051);
    assert_eq!(machine.next_vector(), LEVEL.1);
    line.set(false).unwrap();
    assert!(machine.stays_idle());
}

#[test]
fn an_irqfd_on_a_pin_follows_the_redirection_table() {
    let Some(mut machine) = machine() else { return };
    let gsi = machine.routing.reserve(EDGE.0).unwrap();
    let source = machine.routing.source(&gsi);
    source.trigger().unwrap();
    assert_eq!(machine.next_vector(), EDGE.1);
    let chip = chip(&machine);
    write_entry(&chip, EDGE.0, 0x51);
    source.trigger().unwrap();
    assert_eq!(machine.next_vector(), Some(0x51));
    write_entry(&chip, EDGE.0, 0x1_0051);
    source.trigger().unwrap();
    assert!(machine.stays_idle(), "an edge on a masked pin is lost");
    write_entry(&chip, EDGE.0, 0x50);
    assert!(machine.stays_idle());
    source.trigger().unwrap();
    assert_eq!(machine.next_vector(), EDGE.1);
}

#[test]
fn a_state_that_was_saved_in_a_handler_goes_on() {
    let Some(mut machine) = machine() else { return };
    let (line_before, gsi) = line(&machine, LEVEL.0);
    line_before.set(true).unwrap();
    assert_eq!(machine.next_vector(), LEVEL.1);
    // Within the handler: an EOI is outstanding. The guest and its APIC stay; the chip is a new one.
    let state = chip(&machine).state();
    let restored = SplitIoapic::new(&machine.routing).unwrap();
    restored.restore(&state).unwrap();
    let line = restored.line(&gsi).unwrap();
    machine.ioapic = Some(restored.clone());
    restored.redeliver().unwrap();
    assert!(restored.redirection(LEVEL.0).unwrap().remote_irr());
    assert_eq!(machine.next_vector(), LEVEL.1, "the line is still high");
    line.set(false).unwrap();
    assert!(machine.stays_idle());
    assert_eq!(machine.eois, 2);
}

#[test]
fn kvms_own_ioapic_takes_the_state_and_gives_it_back() {
    use irq_routing::kvm::abi::{ioapic_from_kvm, ioapic_to_kvm};
    use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
    let Some(machine) = machine() else { return };
    let (line, _gsi) = line(&machine, LEVEL.0);
    line.set(true).unwrap();
    let state = chip(&machine).state();

    let vm = common::kvm().create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let mut irqchip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    irqchip.chip.ioapic = ioapic_to_kvm(&state);
    vm.set_irqchip(&irqchip).unwrap();
    vm.get_irqchip(&mut irqchip).unwrap();
    // SAFETY: KVM filled in the IOAPIC that was asked for.
    let kvms = unsafe { irqchip.chip.ioapic };
    assert_eq!(ioapic_from_kvm(&kvms).unwrap(), state);
}
