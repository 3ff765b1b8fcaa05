// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The state of the real KVM's controllers: saved, spoilt, restored, and saved again it is the same;
//! and a guest goes on with it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Machine, Mode};
use irq_routing::host::{AccessIrqchip, SetIrqLine};
use irq_routing::ioapic::Redirection;
use irq_routing::{
    Gsi, Irqchip, IrqchipKind, IrqchipPart, IrqchipState, IrqchipStateError, KernelIrqchipState,
    Pit,
};
use kvm_ioctls::VmFd;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

const KERNEL: IrqchipKind = IrqchipKind::Kernel { pit: Pit::Absent };
const KERNEL_WITH_PIT: IrqchipKind = IrqchipKind::Kernel {
    pit: Pit::PresentWithSpeaker,
};

fn vm(kind: IrqchipKind) -> (VmFd, Irqchip) {
    let vm = common::kvm().create_vm().unwrap();
    let irqchip = Irqchip::create(&vm, kind).unwrap();
    (vm, irqchip)
}

fn save(vm: &VmFd, irqchip: &Irqchip) -> KernelIrqchipState {
    match irqchip.state(vm).unwrap() {
        IrqchipState::Kernel(state) => state,
        other => panic!("not the in-kernel irqchip's: {other:?}"),
    }
}

/// What a restore keeps. Not the times, which KVM sets anew when it loads a count; and not the high
/// lines of unmasked edge-triggered pins: KVM tells of those that were raised twice, although it
/// delivered them, and would deliver them again.
fn kept(mut state: KernelIrqchipState) -> KernelIrqchipState {
    for (pin, bits) in state.ioapic.redirections.into_iter().enumerate() {
        let entry = Redirection::from_bits(bits, false);
        if !entry.is_level() && !entry.is_masked() {
            state.ioapic.lines &= !(1 << pin);
        }
    }
    for channel in state.pit.iter_mut().flat_map(|pit| &mut pit.channels) {
        channel.count_load_time = 0;
    }
    state
}

/// A guest's doing, on bytes that it may write.
#[derive(Clone, Copy, Debug)]
struct Pic {
    mask: u8,
    base: u8,
    elcr: u8,
    nested: u8,
}

fn pic() -> impl Strategy<Value = Pic> {
    (any::<u8>(), any::<u8>(), any::<u8>(), 0..2u8).prop_map(|(mask, base, elcr, nested)| Pic {
        mask,
        base: base & 0xf8,
        elcr,
        nested,
    })
}

fn entry() -> impl Strategy<Value = u64> {
    (0x30u64..0x40, any::<bool>(), any::<bool>()).prop_map(|(vector, level, masked)| {
        vector | u64::from(level) << 15 | u64::from(masked) << 16
    })
}

#[derive(Clone, Debug)]
struct Guest {
    pics: [Pic; 2],
    entries: Vec<u64>,
    counts: [u32; 3],
    mode: u8,
    lines: Vec<(u32, bool)>,
}

fn guest() -> impl Strategy<Value = Guest> {
    let lines = prop::collection::vec((0u32..24, any::<bool>()), 0..40);
    let entries = prop::collection::vec(entry(), 24);
    // Periods so long that none ends meanwhile: 55 ms at most, and no interrupt in mode 5.
    let mode = select(vec![0xffu8, 5]);
    (
        [pic(), pic()],
        entries,
        [1u32..=0x10000, 1..=0x10000, 1..=0x10000],
        mode,
        lines,
    )
        .prop_map(|(pics, entries, counts, mode, lines)| Guest {
            pics,
            entries,
            counts,
            mode,
            lines,
        })
}

/// Programs the controllers as a guest does, and raises lines.
fn program(vm: &VmFd, irqchip: &Irqchip, guest: &Guest) {
    let mut state = save(vm, irqchip);
    for (pic, of) in state.pics.iter_mut().zip(&guest.pics) {
        (pic.imr, pic.irq_base) = (of.mask, of.base);
        pic.elcr = of.elcr & pic.elcr_mask;
        pic.special_fully_nested_mode = of.nested;
        (pic.irr, pic.last_irr, pic.isr) = (0, 0, 0);
    }
    state.ioapic.lines = 0;
    for (to, from) in state.ioapic.redirections.iter_mut().zip(&guest.entries) {
        *to = *from;
    }
    if let Some(pit) = &mut state.pit {
        for (channel, &count) in pit.channels.iter_mut().zip(&guest.counts) {
            (channel.count, channel.mode) = (count, guest.mode);
        }
    }
    for gsi in 0..24 {
        vm.set_irq_line(gsi, false).unwrap();
    }
    irqchip.restore(vm, &IrqchipState::Kernel(state)).unwrap();
    for &(gsi, level) in &guest.lines {
        vm.set_irq_line(gsi, level).unwrap();
    }
}

#[test]
fn saved_spoilt_and_restored_it_is_the_same() {
    let cases = if std::env::var_os("LONG_TESTS").is_some() {
        3000
    } else {
        150
    };
    for kind in [KERNEL, KERNEL_WITH_PIT] {
        let (vm, irqchip) = vm(kind);
        // Someone for the PICs and the IOAPIC to interrupt.
        let _vcpu = vm.create_vcpu(0).unwrap();
        let mut runner = TestRunner::new(Config {
            failure_persistence: None,
            ..Config::with_cases(cases)
        });
        let verdict = runner.run(&(guest(), guest()), |(before, after)| {
            program(&vm, &irqchip, &before);
            let saved = save(&vm, &irqchip);
            program(&vm, &irqchip, &after);
            irqchip.restore(&vm, &IrqchipState::Kernel(saved)).unwrap();
            let again = save(&vm, &irqchip);
            prop_assert_eq!(kept(again), kept(saved));
            Ok(())
        });
        verdict.unwrap();
    }
}

#[test]
fn what_waits_in_the_second_pic_before_a_restore_does_not_wait_in_the_first_afterwards() {
    let (vm, irqchip) = vm(KERNEL);
    let _vcpu = vm.create_vcpu(0).unwrap();
    let open = Pic {
        mask: 0,
        base: 0x20,
        elcr: 0,
        nested: 0,
    };
    let quiet = Guest {
        pics: [open; 2],
        entries: vec![1 << 16; 24],
        counts: [1; 3],
        mode: 5,
        lines: Vec::new(),
    };
    program(&vm, &irqchip, &quiet);
    let saved = save(&vm, &irqchip);
    let raised = Guest {
        lines: vec![(12, true)],
        ..quiet
    };
    program(&vm, &irqchip, &raised);
    assert_eq!(
        save(&vm, &irqchip).pics.map(|pic| pic.irr),
        [1 << 2, 1 << 4]
    );
    irqchip.restore(&vm, &IrqchipState::Kernel(saved)).unwrap();
    assert_eq!(save(&vm, &irqchip).pics.map(|pic| pic.irr), [0, 0]);
}

#[test]
fn a_timer_of_another_vm_runs_on() {
    let (from, irqchip) = vm(KERNEL_WITH_PIT);
    let mut state = from.pit().unwrap();
    (state.channels[2].count, state.channels[2].mode) = (1234, 3);
    from.set_pit(&state).unwrap();
    let saved = irqchip.state(&from).unwrap();
    let (to, irqchip) = vm(IrqchipKind::Kernel { pit: Pit::Present });
    irqchip.restore(&to, &saved).unwrap();
    let channel = to.pit().unwrap().channels[2];
    assert_eq!((channel.count, channel.mode), (1234, 3));
}

#[test]
fn a_wrong_claim_about_the_irqchip_is_kvms_error_with_the_parts_name() {
    let none = Irqchip::assume(IrqchipKind::None);
    for kind in [IrqchipKind::None, IrqchipKind::Split { pins: 24 }] {
        let (vm, _) = vm(kind);
        let wrong = Irqchip::assume(KERNEL);
        let error = wrong.state(&vm).unwrap_err();
        let part = IrqchipPart::SecondPic;
        let source = irq_routing::Errno::new(libc::ENXIO);
        assert_eq!(error, IrqchipStateError::Save { part, source });
        let state = IrqchipState::Kernel(KernelIrqchipState::default());
        let restored = &[];
        let error = wrong.restore(&vm, &state).unwrap_err();
        let expected = IrqchipStateError::Restore {
            part,
            restored,
            source,
        };
        assert_eq!(error, expected);
        none.restore(&vm, &none.state(&vm).unwrap()).unwrap();
    }
    let (vm, irqchip) = vm(KERNEL);
    assert_eq!(vm.pic(2).unwrap_err().errno(), libc::ENXIO);
    let kernel = irqchip.state(&vm).unwrap();
    let IrqchipState::Kernel(mut kernel) = kernel else {
        panic!("{kernel:?}");
    };
    kernel.pit = Some(Default::default());
    let wrong = Irqchip::assume(KERNEL_WITH_PIT);
    let error = wrong
        .restore(&vm, &IrqchipState::Kernel(kernel))
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_SET_PIT2 of the timer failed; restored before it: second PIC, first PIC, IOAPIC"
    );
}

#[test]
fn a_guest_goes_on_with_what_waited_when_it_was_saved() {
    let mut machine = Machine::new(KERNEL, Mode::Real, guests::irq::pic());
    machine.ready();
    let irqchip = Irqchip::assume(KERNEL);
    machine.vm.set_irq_line(Gsi(4), true).unwrap();
    machine.vm.set_irq_line(Gsi(4), false).unwrap();
    let saved = irqchip.state(&machine.vm).unwrap();
    assert_eq!(machine.next_vector(), Some(0x24));
    assert!(machine.stays_idle());
    // As if the guest were another that was saved before the interrupt reached it.
    irqchip.restore(&machine.vm, &saved).unwrap();
    assert_eq!(machine.next_vector(), Some(0x24));
    assert!(machine.stays_idle());
}
