// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The controllers' state: what is read and written in which order, what is refused, and what a call
//! that fails has done, whichever ioctl fails.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::error::Error as _;

use irq_routing::fake::{Call, FakeHost};
use irq_routing::host::AccessIrqchip;
use irq_routing::ioapic::{IoapicState, IoapicStateError, SplitIoapic};
use irq_routing::{
    IrqchipKind, IrqchipPart, IrqchipState, IrqchipStateError, KernelIrqchipState, PicState, Pit,
    PitChannelState, PitState, Routing, StateVersion,
};

const KERNEL: IrqchipKind = IrqchipKind::Kernel { pit: Pit::Absent };
const KERNEL_WITH_PIT: IrqchipKind = IrqchipKind::Kernel { pit: Pit::Present };
const KINDS: [IrqchipKind; 5] = [
    IrqchipKind::None,
    KERNEL,
    KERNEL_WITH_PIT,
    IrqchipKind::Kernel {
        pit: Pit::PresentWithSpeaker,
    },
    IrqchipKind::Split { pins: 24 },
];

/// A state in which nothing is as after reset.
fn busy(pit: bool) -> KernelIrqchipState {
    let pic = |irq_base| PicState {
        irq_base,
        imr: 0xfb,
        elcr: 0x20,
        elcr_mask: 0xf8,
        ..PicState::default()
    };
    let mut ioapic = IoapicState {
        ioregsel: 0x12,
        id: 3,
        lines: 1 << 5,
        ..IoapicState::default()
    };
    ioapic.redirections[5] = 0xc051;
    let channel = PitChannelState {
        count: 0x10000,
        mode: 2,
        gate: 1,
        rw_mode: 3,
        ..PitChannelState::default()
    };
    KernelIrqchipState {
        version: StateVersion::CURRENT,
        pics: [pic(0x20), pic(0x28)],
        ioapic,
        pit: pit.then_some(PitState {
            channels: [channel; 3],
            flags: PitState::SPEAKER_DATA_ON,
        }),
    }
}

fn state_of(kind: IrqchipKind) -> IrqchipState {
    match kind {
        IrqchipKind::None => IrqchipState::None,
        IrqchipKind::Kernel { pit } => IrqchipState::Kernel(busy(pit != Pit::Absent)),
        IrqchipKind::Split { .. } => IrqchipState::Split,
    }
}

#[test]
fn a_state_is_restored_and_saved_as_it_was() {
    for kind in KINDS {
        let (host, irqchip) = FakeHost::with_irqchip(kind);
        irqchip.restore(&host, &state_of(kind)).unwrap();
        assert_eq!(irqchip.state(&host).unwrap(), state_of(kind));
    }
}

#[test]
fn the_timer_is_saved_first_and_restored_last_and_the_second_pic_before_the_first() {
    use IrqchipPart::{FirstPic, Ioapic, Pit, SecondPic};
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL_WITH_PIT);
    let state = irqchip.state(&host).unwrap();
    let saved = [Pit, SecondPic, FirstPic, Ioapic].map(Call::GetState);
    assert_eq!(host.take_calls(), saved);
    irqchip.restore(&host, &state).unwrap();
    let restored = [SecondPic, FirstPic, Ioapic, Pit].map(Call::SetState);
    assert_eq!(host.take_calls(), restored);

    // What the VM has not is not asked for.
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    irqchip.state(&host).unwrap();
    irqchip.restore(&host, &state_of(KERNEL)).unwrap();
    assert_eq!(host.take_calls().len(), 6);
    for kind in [IrqchipKind::None, IrqchipKind::Split { pins: 24 }] {
        let (host, irqchip) = FakeHost::with_irqchip(kind);
        irqchip
            .restore(&host, &irqchip.state(&host).unwrap())
            .unwrap();
        assert_eq!(host.take_calls(), []);
    }
}

#[test]
fn a_state_of_another_kind_is_refused_before_anything_is_written() {
    for from in KINDS {
        for to in KINDS {
            let (host, irqchip) = FakeHost::with_irqchip(to);
            let before = host.vm();
            let answer = irqchip.restore(&host, &state_of(from));
            // With the speaker or without, it is one timer.
            if std::mem::discriminant(&state_of(from)) == std::mem::discriminant(&state_of(to))
                && (from == KERNEL) == (to == KERNEL)
            {
                answer.unwrap();
                continue;
            }
            let error = answer.unwrap_err();
            assert!(matches!(error, IrqchipStateError::Kind { .. }), "{error}");
            assert_eq!(host.take_calls(), [], "{error}");
            assert_eq!(host.vm(), before);
        }
    }
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let error = irqchip.restore(&host, &state_of(KERNEL_WITH_PIT));
    assert_eq!(
        error.unwrap_err().to_string(),
        "a state of KVM's PICs, IOAPIC and timer is not for a VM with KVM's PICs and IOAPIC and no timer"
    );
}

#[test]
fn an_impossible_ioapic_is_refused_before_anything_is_written() {
    let (host, irqchip) = FakeHost::with_irqchip(KERNEL);
    let refused = |change: fn(&mut IoapicState)| {
        let mut state = busy(false);
        change(&mut state.ioapic);
        let error = irqchip.restore(&host, &IrqchipState::Kernel(state));
        assert_eq!(host.take_calls(), []);
        error.unwrap_err()
    };
    let id = IoapicStateError::Id(16).into();
    assert_eq!(refused(|ioapic| ioapic.id = 16), id);
    let lines = IoapicStateError::Lines(1 << 24).into();
    assert_eq!(refused(|ioapic| ioapic.lines = 1 << 24), lines);
}

#[test]
fn whichever_ioctl_fails_the_error_names_the_part_and_what_was_restored_before_it() {
    for errno in [libc::ENXIO, libc::EINVAL, libc::EINTR] {
        for kind in KINDS {
            let (host, irqchip) = FakeHost::with_irqchip(kind);
            irqchip.state(&host).unwrap();
            for call in host.take_calls().iter().enumerate() {
                let (skip, &Call::GetState(part)) = call else {
                    panic!("{call:?}");
                };
                let before = host.vm();
                host.fail_after(skip, errno);
                let error = irqchip.state(&host).unwrap_err();
                let source = irq_routing::Errno::new(errno);
                assert_eq!(error, IrqchipStateError::Save { part, source });
                assert_eq!(host.take_calls().len(), skip + 1);
                assert_eq!(host.vm(), before);
            }

            let state = state_of(kind);
            irqchip.restore(&host, &state).unwrap();
            for call in host.take_calls().iter().enumerate() {
                let (skip, &Call::SetState(part)) = call else {
                    panic!("{call:?}");
                };
                let (host, irqchip) = FakeHost::with_irqchip(kind);
                let before = host.vm().chips;
                host.fail_after(skip, errno);
                let error = irqchip.restore(&host, &state).unwrap_err();
                let IrqchipStateError::Restore {
                    part: told,
                    restored,
                    ..
                } = error
                else {
                    panic!("{error}");
                };
                assert_eq!(told, part);
                assert_eq!(restored, &IrqchipPart::RESTORE_ORDER[..skip]);
                assert!(error.source().is_some());
                let (now, whole) = (host.vm().chips, busy(state_has_pit(&state)));
                let has = |part| restored.contains(&part);
                let pics = [has(IrqchipPart::FirstPic), has(IrqchipPart::SecondPic)];
                for (at, restored) in pics.into_iter().enumerate() {
                    let from = if restored { whole } else { before };
                    assert_eq!(now.pics[at], from.pics[at]);
                }
                let from = if has(IrqchipPart::Ioapic) {
                    whole
                } else {
                    before
                };
                assert_eq!(now.ioapic, from.ioapic);
                assert_eq!(now.pit, before.pit, "the timer is last");
                irqchip.restore(&host, &state).unwrap();
                assert_eq!(irqchip.state(&host).unwrap(), state);
            }
        }
    }
    let error = IrqchipStateError::Restore {
        part: IrqchipPart::Pit,
        restored: &IrqchipPart::RESTORE_ORDER[..3],
        source: irq_routing::Errno::new(libc::ENXIO),
    };
    assert_eq!(
        error.to_string(),
        "KVM_SET_PIT2 of the timer failed; restored before it: second PIC, first PIC, IOAPIC"
    );
}

fn state_has_pit(state: &IrqchipState) -> bool {
    matches!(
        state,
        IrqchipState::Kernel(KernelIrqchipState { pit: Some(_), .. })
    )
}

#[test]
fn a_guest_moves_between_the_in_kernel_ioapic_and_the_split_one() {
    let (kernel, irqchip) = FakeHost::with_irqchip(KERNEL);
    irqchip.restore(&kernel, &state_of(KERNEL)).unwrap();
    let IrqchipState::Kernel(saved) = irqchip.state(&kernel).unwrap() else {
        panic!("it is a kernel irqchip");
    };
    let (split, split_irqchip) = FakeHost::with_irqchip(IrqchipKind::Split { pins: 24 });
    let ioapic = SplitIoapic::new(&Routing::new(&split, &split_irqchip)).unwrap();
    ioapic.restore(&saved.ioapic).unwrap();
    assert_eq!(ioapic.state(), saved.ioapic);
    let back = KernelIrqchipState {
        ioapic: ioapic.state(),
        ..saved
    };
    irqchip
        .restore(&kernel, &IrqchipState::Kernel(back))
        .unwrap();
    assert_eq!(kernel.ioapic().unwrap(), saved.ioapic);
}

#[test]
fn there_is_no_third_pic() {
    let (host, _) = FakeHost::with_irqchip(KERNEL);
    assert_eq!(host.pic(2).unwrap_err().errno(), libc::ENXIO);
    let error = host.set_pic(2, &PicState::default()).unwrap_err();
    assert_eq!(error.errno(), libc::ENXIO);
}

#[cfg(feature = "with-serde")]
#[test]
fn every_kind_of_state_survives_serde() {
    for kind in KINDS {
        let text = serde_json::to_string(&state_of(kind)).unwrap();
        let back: IrqchipState = serde_json::from_str(&text).unwrap();
        assert_eq!(back, state_of(kind), "{text}");
    }
}

#[cfg(feature = "with-serde")]
#[test]
fn a_state_of_another_version_or_with_an_unknown_field_is_refused() {
    let mut value = serde_json::to_value(state_of(KERNEL_WITH_PIT)).unwrap();
    let refused = |value: &serde_json::Value| {
        let read = serde_json::from_value::<IrqchipState>(value.clone());
        read.unwrap_err().to_string()
    };
    for field in ["/Kernel", "/Kernel/ioapic", "/Kernel/pics/0", "/Kernel/pit"] {
        let at = |value: &mut serde_json::Value| {
            let object = value.pointer_mut(field).and_then(|at| at.as_object_mut());
            object.unwrap().insert("news".into(), 1.into());
        };
        let mut value = value.clone();
        at(&mut value);
        assert!(refused(&value).contains("`news`"), "{}", refused(&value));
    }
    for number in [0, 2, u32::MAX] {
        value["Kernel"]["version"] = number.into();
        let message = refused(&value);
        assert!(message.contains(&format!("version {number};")), "{message}");
    }
    value["Kernel"]["version"] = 1.into();
    assert_eq!(
        serde_json::from_value::<IrqchipState>(value).unwrap(),
        state_of(KERNEL_WITH_PIT)
    );
}

#[cfg(feature = "kvm")]
mod abi {
    use super::*;
    use irq_routing::kvm::abi::{pic_from_kvm, pic_to_kvm, pit_from_kvm, pit_to_kvm};
    use proptest::prelude::*;

    fn any_channel() -> impl Strategy<Value = PitChannelState> {
        let bytes = any::<[u8; 9]>();
        (any::<u32>(), any::<u16>(), bytes, any::<i64>()).prop_map(|(count, latch, b, time)| {
            PitChannelState {
                count,
                latched_count: latch,
                count_latched: b[0],
                status_latched: b[1],
                status: b[2],
                read_state: b[3],
                write_state: b[4],
                write_latch: b[5],
                rw_mode: b[6],
                mode: b[7],
                bcd: b[8],
                gate: b[0] ^ b[8],
                count_load_time: time,
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_pic_comes_back_as_it_went(b in any::<[u8; 16]>()) {
            let state = PicState {
                last_irr: b[0],
                irr: b[1],
                imr: b[2],
                isr: b[3],
                priority_add: b[4],
                irq_base: b[5],
                read_reg_select: b[6],
                poll: b[7],
                special_mask: b[8],
                init_state: b[9],
                auto_eoi: b[10],
                rotate_on_auto_eoi: b[11],
                special_fully_nested_mode: b[12],
                init4: b[13],
                elcr: b[14],
                elcr_mask: b[15],
            };
            let raw = pic_to_kvm(&state);
            prop_assert_eq!(pic_from_kvm(&raw), state);
            // In the ABI's order: no field is another's.
            // SAFETY: sixteen bytes without padding.
            let bytes: [u8; 16] = unsafe { std::mem::transmute(raw) };
            prop_assert_eq!(bytes, b);
        }

        #[test]
        fn a_timer_comes_back_as_it_went(
            channels in [any_channel(), any_channel(), any_channel()],
            flags in any::<u32>(),
        ) {
            let state = PitState { channels, flags };
            let raw = pit_to_kvm(&state);
            prop_assert_eq!(pit_from_kvm(&raw), state);
            prop_assert_eq!(pit_to_kvm(&pit_from_kvm(&raw)), raw);
            prop_assert_eq!(raw.reserved, [0; 9]);
        }
    }
}
