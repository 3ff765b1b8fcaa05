// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest on the real KVM's split irqchip, whose IOAPIC is this crate's.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{Machine, Mode};
use irq_routing::host::{CreateIrqchip, SetIrqLine};
use irq_routing::ioapic::{IOAPIC_BASE, Ioapic, IoapicStateError, PinLine, SplitIoapic};
use irq_routing::kvm::abi::{ioapic_from_kvm, ioapic_to_kvm};
use irq_routing::{Arrival, Gsi, GsiHandle, IrqchipKind, Msi, Pit};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::VmFd;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

const SPLIT: IrqchipKind = IrqchipKind::Split { pins: 24 };

/// The guest's edge-triggered pin and its vector.
const EDGE: (Gsi, Option<u8>) = (Gsi(4), Some(0x50));
/// The level-triggered one.
const LEVEL: (Gsi, Option<u8>) = (Gsi(5), Some(0x51));

const TAKEN: Arrival = Arrival::Delivered { to: 1 };

/// None, and the reason on stderr, where KVM has no split irqchip.
fn machine() -> Option<Machine> {
    if !common::kvm().create_vm().unwrap().has_split_irqchip() {
        eprintln!("NOT TRIED: this host's KVM has no split irqchip (KVM_CAP_SPLIT_IRQCHIP)");
        return None;
    }
    let mut machine = Machine::new(SPLIT, Mode::Protected, guests::irq::ioapic());
    machine.ioapic = Some(SplitIoapic::new(&machine.routing).unwrap());
    machine.ready();
    Some(machine)
}

/// Runs a test on a machine, and again where the host showed that it had not told the guest's exits as they were
/// ([`Machine::is_replayed`]).
fn on_machine(test: impl Fn(Machine)) {
    for _ in 0..5 {
        let Some(machine) = machine() else { return };
        let replayed = Arc::clone(&machine.is_replayed);
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(machine))) else {
            return;
        };
        if !replayed.load(Ordering::Relaxed) {
            resume_unwind(panic);
        }
        eprintln!(
            "NOT COUNTED: this KVM told of an EOI before what its handler had done, and again"
        );
    }
    panic!("this KVM did so five times");
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
    on_machine(|machine| {
        let chip = chip(&machine);
        assert_eq!(chip.redirection(EDGE.0).unwrap().bits(), 0x50);
        assert_eq!(chip.redirection(LEVEL.0).unwrap().bits(), 0x8051);
        assert!(
            machine.routing.table().is_empty(),
            "no one can raise a pin yet, so KVM was not asked for anything"
        );
    });
}

#[test]
fn an_edge_arrives_once() {
    on_machine(|mut machine| {
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
    });
}

#[test]
fn a_level_that_stays_asserted_comes_again_after_each_eoi() {
    on_machine(|mut machine| {
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
    });
}

#[test]
fn two_sources_hold_a_line_until_both_are_low() {
    on_machine(|mut machine| {
        let (one, gsi) = line(&machine, LEVEL.0);
        let two = chip(&machine).line(&gsi).unwrap();
        one.set(true).unwrap();
        assert_eq!(two.set(true).unwrap(), Arrival::Coalesced);
        assert_eq!(machine.next_vector(), LEVEL.1);
        one.set(false).unwrap();
        assert_eq!(machine.next_vector(), LEVEL.1);
        drop(two);
        assert!(machine.stays_idle());
    });
}

#[test]
fn a_device_lowers_its_line_when_it_is_told_of_the_eoi() {
    on_machine(|mut machine| {
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
    });
}

#[test]
fn a_level_pin_masked_in_its_handler_is_acknowledged_and_comes_when_unmasked() {
    on_machine(|mut machine| {
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
    });
}

#[test]
fn an_irqfd_on_a_pin_follows_the_redirection_table() {
    on_machine(|mut machine| {
        let gsi = machine.routing.reserve(EDGE.0).unwrap();
        let irqfd = machine.routing.irqfd(&gsi).unwrap();
        irqfd.trigger().unwrap();
        assert_eq!(machine.next_vector(), EDGE.1);
        let chip = chip(&machine);
        write_entry(&chip, EDGE.0, 0x51);
        irqfd.trigger().unwrap();
        assert_eq!(machine.next_vector(), Some(0x51));
        write_entry(&chip, EDGE.0, 0x1_0051);
        irqfd.trigger().unwrap();
        assert!(machine.stays_idle());
        // KVM looks at an edge without a route once more, on a thread of its own; detaching waits for
        // that.
        let irqfd = irqfd.detach().unwrap().attach().unwrap();
        write_entry(&chip, EDGE.0, 0x50);
        assert!(machine.stays_idle(), "an edge on a masked pin is lost");
        irqfd.trigger().unwrap();
        assert_eq!(machine.next_vector(), EDGE.1);
    });
}

#[test]
fn a_state_that_was_saved_in_a_handler_goes_on() {
    on_machine(|mut machine| {
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
    });
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Line(u32, bool),
    /// Register, bytes, value.
    Write(u8, u32, u32),
    /// Offset, bytes, value.
    WriteAt(u64, u32, u32),
    ReadAt(u64, u32),
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || select(vec![1u32, 2, 4, 4, 4]);
    // Pins that go to the IOAPIC alone; entries that reach APIC 0, without reserved bits.
    let pin = || 16u32..20;
    let entry = (
        select(vec![0x30u32, 0x31]),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    let entry = entry.prop_map(|(vector, polarity, level, masked)| {
        vector | u32::from(polarity) << 13 | u32::from(level) << 15 | u32::from(masked) << 16
    });
    let halves = (pin(), 0..2u32).prop_map(|(pin, half)| 0x10 + 2 * pin as u8 + half as u8);
    // Neither the version, which differs, nor entries, whose reserved bits KVM keeps.
    let others = prop_oneof![0..1u8, 2..0x10u8, 0x40..0xffu8];
    // Between the registers, and not the EOI register, which KVM's has not.
    let offset = (0..0x100u64).prop_filter("EOI", |&offset| offset != 0x40 && offset != 0x10);
    prop_oneof![
        6 => (pin(), any::<bool>()).prop_map(|(pin, high)| Step::Line(pin, high)),
        6 => (halves, entry, any::<bool>()).prop_map(|(register, entry, narrow)| {
            let bytes = if narrow { 2 } else { 4 };
            Step::Write(register, bytes, if register % 2 == 0 { entry } else { 0 })
        }),
        1 => (others, bytes(), any::<u32>()).prop_map(|(register, b, v)| Step::Write(register, b, v)),
        1 => (offset, bytes(), any::<u32>()).prop_map(|(at, b, value)| Step::WriteAt(at, b, value)),
        2 => (select(vec![0x00u64, 0x10, 0x14, 0x20, 0xf0]), bytes())
            .prop_map(|(at, bytes)| Step::ReadAt(at, bytes)),
    ]
}

/// The kernel is the oracle: its own IOAPIC and this crate's, told the same, are and answer the same.
#[test]
fn it_is_kvms_ioapic_in_all_that_both_have() {
    let kvms = |machine: &Machine| {
        let mut irqchip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        machine.vm.get_irqchip(&mut irqchip).unwrap();
        // SAFETY: KVM filled in the IOAPIC that was asked for.
        unsafe { irqchip.chip.ioapic }
    };
    let kind = IrqchipKind::Kernel { pit: Pit::Absent };
    let machine = RefCell::new(Machine::new(kind, Mode::Protected, guests::irq::accessor()));
    let fresh = kvms(&machine.borrow());
    let cases = if std::env::var_os("LONG_TESTS").is_some() {
        2000
    } else {
        60
    };
    let config = Config {
        failure_persistence: None,
        ..Config::with_cases(cases)
    };
    let mut runner = TestRunner::new(config);
    let sequences = prop::collection::vec(step(), 1..60);
    let verdict = runner.run(&sequences, |steps| {
        let machine = &mut *machine.borrow_mut();
        let mut chip = Ioapic::new();
        let mut messages = |_: u32, _: Msi| TAKEN;
        // Lines first: a reset chip forgets nothing of KVM's sources.
        for pin in 16..20 {
            machine.vm.set_irq_line(Gsi(pin), false).unwrap();
        }
        let mut irqchip = kvm_irqchip {
            chip_id: KVM_IRQCHIP_IOAPIC,
            ..Default::default()
        };
        irqchip.chip.ioapic = fresh;
        machine.vm.set_irqchip(&irqchip).unwrap();
        for step in steps {
            match step {
                Step::Line(pin, high) => {
                    let status = machine.vm.set_irq_line(Gsi(pin), high).unwrap();
                    let arrival = chip.set_line(pin, high, &mut messages);
                    let expected = match status {
                        0 => arrival == Arrival::Coalesced,
                        1.. => arrival == TAKEN,
                        // Masked, or an EOI is outstanding: KVM does not say which.
                        _ => arrival != TAKEN,
                    };
                    prop_assert!(expected, "{:?}: {} and {:?}", step, status, arrival);
                }
                Step::Write(register, bytes, value) => {
                    machine.write_mmio(IOAPIC_BASE, 4, register.into());
                    machine.write_mmio(IOAPIC_BASE + 0x10, bytes, value);
                    let _ = chip.write(0x00, &[register], &mut messages);
                    let value = &value.to_le_bytes()[..bytes as usize];
                    let _ = chip.write(0x10, value, &mut messages);
                }
                Step::WriteAt(offset, bytes, value) => {
                    // Aligned: an access that crosses a page is another matter.
                    let offset = offset & !u64::from(bytes - 1);
                    if offset == 0x10 || offset == 0x40 {
                        continue;
                    }
                    machine.write_mmio(IOAPIC_BASE + offset, bytes, value);
                    let value = &value.to_le_bytes()[..bytes as usize];
                    let _ = chip.write(offset, value, &mut messages);
                }
                Step::ReadAt(offset, bytes) => {
                    if offset == 0x10 && chip.state().ioregsel == 1 {
                        continue;
                    }
                    let kvm = machine.read_mmio(IOAPIC_BASE + offset, bytes);
                    let mut data = [0; 4];
                    chip.read(offset, &mut data[..bytes as usize]);
                    prop_assert_eq!(u32::from_le_bytes(data), kvm, "{:?}", step);
                }
            }
            machine.settle_mmio();
            let (kvm, ours) = (kvms(machine), chip.state());
            let kvm = ioapic_from_kvm(&kvm).unwrap();
            prop_assert_eq!(kvm.redirections, ours.redirections, "{:?}", step);
            prop_assert_eq!(
                (kvm.ioregsel, kvm.id),
                (ours.ioregsel, ours.id),
                "{:?}",
                step
            );
            // KVM leaves out the lines whose rise it delivered as an edge, whatever they are now.
            prop_assert_eq!(kvm.lines & !ours.lines, 0, "{:?}", step);
        }
        Ok(())
    });
    verdict.unwrap();
}

#[test]
fn kvms_own_ioapic_takes_the_state_and_gives_it_back() {
    on_machine(|machine| {
        let (line, _gsi) = line(&machine, LEVEL.0);
        line.set(true).unwrap();
        let state = chip(&machine).state();
        // The high line of an edge-triggered pin was delivered; KVM would deliver it again.
        let mut with_edge = state;
        with_edge.lines |= 1 << EDGE.0.0;
        assert_eq!(ioapic_to_kvm(&with_edge).irr, 1 << LEVEL.0.0);

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

        let (mut select, mut id) = (kvms, kvms);
        (select.ioregsel, id.id) = (0x100, 0x100);
        assert_eq!(
            ioapic_from_kvm(&select),
            Err(IoapicStateError::Select(0x100))
        );
        assert_eq!(ioapic_from_kvm(&id), Err(IoapicStateError::Id(0x100)));
    });
}
