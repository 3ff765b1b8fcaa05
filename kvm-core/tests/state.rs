// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole state without KVM: its order, its refusals, every errno, its serialized form.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/leaves.rs"]
mod leaves;
mod states;

use kvm_core::Errno;
use kvm_core::arch::x86_64::{CpuidPlan, Topology};
use kvm_core::state::fake::{FakeClock, FakeState};
use kvm_core::state::{
    AccessClock, ClockError, ClockRestore, ClockState, Msr, Passage, Refusal, RestoreError,
    SaveError, TscRestored, VcpuPiece, VcpuState, VmState,
};
use proptest::prelude::*;
use states::{fresh, host, state};

const EIO: i32 = 5;
const IA32_TSC: u32 = 0x10;
const PAT: u32 = 0x277;

fn restore(vcpu: &FakeState, state: &VcpuState) -> Result<(), RestoreError> {
    host().restore(vcpu, state, &Passage::default()).map(drop)
}

/// As it is where the TSC went by its value: the offset is KVM's to find.
fn by_value(mut state: VcpuState) -> VcpuState {
    state.tsc_offset = None;
    state
}

#[test]
fn what_is_saved_is_what_is_restored() {
    let saved = host().save(&FakeState::new(state())).unwrap();
    assert_eq!(saved, state());
    let to = fresh();
    restore(&to, &saved).unwrap();
    assert_eq!(by_value(to.state()), by_value(saved));
}

#[test]
fn pieces_are_saved_and_restored_in_the_order_that_kvm_needs() {
    let from = FakeState::new(state());
    host().save(&from).unwrap();
    let saving = from.calls();
    let to = fresh();
    restore(&to, &state()).unwrap();
    let restoring: Vec<_> = to.calls();
    let in_order = |calls: &[&str], orders: &[(&str, &str)]| {
        for (first, then) in orders {
            let last = calls.iter().rposition(|call| call == first).expect(first);
            let begin = calls.iter().position(|call| call == then).expect(then);
            assert!(last < begin, "{first} before {then}: {calls:?}");
        }
    };
    in_order(
        &saving,
        &[
            ("mp_state", "registers"),
            ("mp_state", "system"),
            ("mp_state", "events"),
            ("events", "system"),
            ("events", "debug"),
            ("get_msrs", "lapic"),
        ],
    );
    in_order(
        &restoring,
        &[
            ("set_cpuid", "set_system"),
            ("set_cpuid", "set_xsave"),
            ("set_cpuid", "put_msrs"),
            ("set_tsc_khz", "put_msrs"),
            ("set_up_mce", "put_msrs"),
            ("set_system", "set_lapic"),
            ("set_system", "set_nested"),
            ("set_xsave", "put_msrs"),
            ("set_lapic", "put_msrs"),
            ("put_msrs", "set_nested"),
            ("set_registers", "set_events"),
            ("set_nested", "set_events"),
            ("set_events", "set_mp_state"),
            ("put_msrs", "tell_clock_gap"),
        ],
    );
    let mut pieces = VcpuPiece::SAVE_ORDER.to_vec();
    pieces.sort_by_key(|piece| VcpuPiece::RESTORE_ORDER.iter().position(|p| p == piece));
    // That it stood still is told to who is restored, and is nothing that one has.
    pieces.push(VcpuPiece::ClockGap);
    assert_eq!(pieces, VcpuPiece::RESTORE_ORDER);
}

#[test]
fn an_errno_at_any_ioctl_of_saving_is_told_with_its_piece_and_changes_nothing() {
    let whole = FakeState::new(state());
    host().save(&whole).unwrap();
    let mut pieces = Vec::new();
    for call in 0..whole.calls().len() {
        let vcpu = FakeState::new(state());
        vcpu.fail_at(call, EIO);
        let SaveError { piece, errno } = host().save(&vcpu).unwrap_err();
        assert_eq!(errno, Errno::new(EIO));
        assert_eq!(vcpu.calls().len(), call + 1);
        assert_eq!(vcpu.state(), state());
        pieces.push(piece);
    }
    pieces.dedup();
    assert_eq!(pieces, VcpuPiece::SAVE_ORDER);
}

#[test]
fn an_errno_at_any_ioctl_of_restoring_is_told_with_its_piece_and_nothing_follows_it() {
    let whole = fresh();
    // By offset, so that every piece has its ioctl.
    let passage = Passage {
        elapsed: 0,
        host_tsc: Some((5, 5)),
    };
    let mut state = state();
    state.tsc_khz = 2_000_000;
    for msr in &mut state.msrs {
        if msr.index == IA32_TSC {
            msr.value = 5 + 77;
        }
    }
    let restored = host().restore(&whole, &state, &passage).unwrap();
    assert_eq!(restored.tsc, TscRestored::Offset);
    assert_eq!(whole.state().tsc_offset, Some(77));
    // Its value is not written as well.
    assert_eq!(whole.state().msr(IA32_TSC), Some(0));
    let calls = whole.calls();
    let changes = |name: &str| name.starts_with("set_") || name.starts_with("put_");
    let first = calls.iter().position(|name| changes(name)).unwrap();
    let mut pieces = Vec::new();
    for call in 0..calls.len() {
        let vcpu = fresh();
        let before = vcpu.state();
        vcpu.fail_at(call, EIO);
        let error = host().restore(&vcpu, &state, &passage).unwrap_err();
        assert_eq!(vcpu.calls().len(), call + 1, "{error}");
        match error {
            RestoreError::Refused(Refusal::Read { errno, .. }) => {
                assert!(call < first);
                assert_eq!((errno, vcpu.state()), (Errno::new(EIO), before));
            }
            RestoreError::Failed { piece, errno } => {
                assert!(call >= first);
                assert_eq!(errno, Errno::new(EIO));
                assert!(error.to_string().contains(&piece.to_string()), "{error}");
                pieces.push(piece);
            }
            other => panic!("{other}"),
        }
    }
    pieces.pop();
    pieces.dedup();
    let mut expected = VcpuPiece::RESTORE_ORDER.to_vec();
    // The same frequency as the vCPU has.
    expected.retain(|piece| *piece != VcpuPiece::TscFrequency);
    assert_eq!(pieces, expected);
}

#[test]
fn a_vcpu_without_local_apic_or_offset_is_saved_without_them() {
    let mut without = state();
    (without.lapic, without.tsc_offset) = (None, None);
    let saved = host().save(&FakeState::new(without.clone())).unwrap();
    assert_eq!(saved, without);
}

#[test]
fn msrs_are_read_and_written_whatever_their_number_and_wherever_one_is_refused() {
    for (count, unreadable) in [
        (1, 0),
        (255, 254),
        (256, 255),
        (700, 0),
        (700, 300),
        (700, 699),
    ] {
        let indices: Vec<u32> = (0x1_0000..).take(count).collect();
        let mut host = host();
        host.msrs = indices.clone();
        let mut all = state();
        all.mcg_cap = None;
        all.msrs = indices
            .iter()
            .map(|index| Msr {
                index: *index,
                value: u64::from(*index) * 3,
            })
            .collect();
        let missing = all.msrs.remove(unreadable).index;
        let saved = host.save(&FakeState::new(all.clone())).unwrap();
        assert_eq!(saved.unreadable_msrs, [missing]);
        assert_eq!(saved.msrs, all.msrs);

        let to = fresh_with(&all);
        host.restore(&to, &saved, &Passage::default()).unwrap();
        assert_eq!(to.state().msrs, all.msrs);
    }
}

/// A fresh vCPU with the MSRs of `like`, all 0.
fn fresh_with(like: &VcpuState) -> FakeState {
    let mut state = fresh().state();
    state.mcg_cap = like.mcg_cap;
    state.msrs = like.msrs.clone();
    for msr in &mut state.msrs {
        msr.value = 0;
    }
    FakeState::new(state)
}

#[test]
fn an_msr_that_is_not_written_is_an_error_unless_it_has_its_value_already() {
    let wanted = state();
    let value = wanted.msr(PAT).unwrap();
    let to = fresh().read_only(&[PAT]);
    let error = restore(&to, &wanted).unwrap_err();
    let expected = RestoreError::Msr {
        index: PAT,
        value,
        host: Some(0),
    };
    assert_eq!(error, expected);
    let text = "KVM does not take MSR 0x277 = 0x27701 (it is 0x0 here); the vCPU is not usable now";
    assert_eq!(error.to_string(), text);

    let mut same = fresh().state();
    for msr in &mut same.msrs {
        if msr.index == PAT {
            msr.value = value;
        }
    }
    let to = FakeState::new(same).read_only(&[PAT]);
    restore(&to, &wanted).unwrap();
    assert_eq!(by_value(to.state()), by_value(wanted));
}

#[test]
fn an_msr_that_the_host_has_not_is_left_out_when_it_is_0_and_told_and_refused_otherwise() {
    let mut with_one = state();
    let index = 0xdead;
    with_one.msrs.push(Msr { index, value: 0 });
    let done = host().restore(&fresh(), &with_one, &Passage::default());
    assert_eq!(done.unwrap().skipped_msrs, [index]);
    with_one.msrs.last_mut().unwrap().value = 9;
    let error = Refusal::Msr { index, value: 9 };
    assert_eq!(restore(&fresh(), &with_one), Err(error.into()));
    assert_eq!(
        error.to_string(),
        "MSR 0xdead = 0x9 is none of those that this host's KVM has"
    );
}

/// Refused, with this text in the reason, and nothing was changed.
#[track_caller]
fn refused(host: &kvm_core::state::StateHost, state: &VcpuState, text: &str) {
    let vcpu = fresh();
    let before = vcpu.state();
    let error = host.restore(&vcpu, state, &Passage::default()).unwrap_err();
    assert!(matches!(error, RestoreError::Refused(_)), "{error}");
    assert!(error.to_string().contains(text), "{error}");
    assert_eq!(vcpu.state(), before);
}

#[test]
fn what_a_host_lacks_is_named() {
    type Spoil = fn(&mut kvm_core::state::StateHost);
    let cases: [(&str, Spoil); 7] = [
        ("KVM_CAP_XCRS", |host| host.xcrs = false),
        ("KVM_CAP_ONE_REG", |host| host.one_reg = false),
        ("KVM_CAP_NESTED_STATE", |host| host.nested_bytes = 0),
        ("128 bytes, and this host's have 128 to 100", |host| {
            host.nested_bytes = 100
        }),
        ("CPUID 0x40000001.0 EAX bits 0x00000010", |host| {
            host.cpuid.iter_mut().for_each(|leaf| {
                if leaf.function == 0x4000_0001 {
                    leaf.eax &= !0x10;
                }
            });
        }),
        ("physical addresses of 46 bits, this host of 39", |host| {
            host.cpuid.iter_mut().for_each(|leaf| {
                if leaf.function == 0x8000_0008 {
                    leaf.eax = 39;
                }
            });
        }),
        (
            "XSAVE component 2 is 256 bytes at 576 in the guest's area, 256 at 832",
            |host| {
                host.cpuid.iter_mut().for_each(|leaf| {
                    if (leaf.function, leaf.index) == (0xd, 2) {
                        leaf.ebx = 832;
                    }
                });
            },
        ),
    ];
    for (text, spoil) in cases {
        let mut host = host();
        spoil(&mut host);
        refused(&host, &state(), text);
    }
    // The other hypervisor's leaves first, KVM's behind them.
    let mut behind = state();
    for leaf in &mut behind.cpuid {
        if leaf.function & 0x4000_0000 != 0 {
            leaf.function += 0x100;
        }
    }
    behind.cpuid.iter_mut().for_each(|leaf| {
        if leaf.function == 0x4000_0101 {
            leaf.eax |= 1 << 31;
        }
    });
    refused(&host(), &behind, "CPUID 0x40000101.0 EAX bits 0x80000000");
}

#[test]
fn a_guest_of_any_topology_is_taken_by_the_host_that_it_was_made_for() {
    for model in [leaves::amd(), leaves::intel()] {
        let mut host = host();
        host.cpuid = model.iter().map(|&leaf| leaf.into()).collect();
        for (sockets, cores, threads) in [(1, 1, 1), (1, 4, 1), (1, 2, 2), (2, 3, 2), (300, 1, 1)] {
            let topology = Topology::new(sockets, cores, threads).unwrap();
            let plan = CpuidPlan {
                id: topology.highest_apic_id(),
                topology,
                tsc_deadline: true,
                arat: Some(true),
                mca_recovery: false,
            };
            let mut state = state();
            state.xcrs.clear();
            let cpuid = plan.apply(&model).unwrap();
            state.cpuid = cpuid.as_slice().iter().map(|&leaf| leaf.into()).collect();
            assert_eq!(host.check(&state), Ok(()), "{topology}");
        }
    }
}

#[test]
fn a_tsc_frequency_that_the_host_cannot_give_is_refused_and_one_that_is_near_is_not() {
    let mut host = host();
    host.tsc_control = false;
    refused(
        &host,
        &state(),
        "the guest's TSC has 2100000 kHz, this host's 2000000",
    );
    let mut near = state();
    near.tsc_khz = 2_000_499;
    host.restore(&fresh(), &near, &Passage::default()).unwrap();
}

#[test]
fn a_deadline_timer_is_offered_whatever_the_list_says() {
    let mut host = host();
    let deadline = 1 << 24;
    host.cpuid.iter_mut().for_each(|leaf| {
        if leaf.function == 1 {
            leaf.ecx &= !deadline;
        }
    });
    let mut with_deadline = state();
    with_deadline.cpuid.iter_mut().for_each(|leaf| {
        if leaf.function == 1 {
            leaf.ecx |= deadline;
        }
    });
    assert_eq!(host.check(&with_deadline), Ok(()));
    host.tsc_deadline = false;
    refused(&host, &with_deadline, "CPUID 0x1.0 ECX bits 0x01000000");
}

#[test]
fn a_counter_follows_the_clock_by_offset_where_the_hosts_are_known_and_by_value_elsewhere() {
    let khz = 2_000_000;
    let with = |offset, tsc, host_tsc| {
        let mut state = state();
        (state.tsc_khz, state.tsc_offset) = (khz, offset);
        for msr in &mut state.msrs {
            if msr.index == IA32_TSC {
                msr.value = tsc;
            }
        }
        let to = fresh();
        let elapsed = 3_000_000;
        let passage = Passage { elapsed, host_tsc };
        let done = host().restore(&to, &state, &passage).unwrap();
        let now = to.state();
        (done.tsc, now.tsc_offset, now.msr(IA32_TSC))
    };
    // 3 ms at 2 GHz.
    let moved = 6_000_000;
    let by_offset = with(Some(500), 10_500, Some((10_000, 40_000)));
    let offset = 500_u64.wrapping_sub(30_000).wrapping_add(moved);
    assert_eq!(by_offset, (TscRestored::Offset, Some(offset), Some(0)));
    let value = (TscRestored::Value, Some(0), Some(10_500 + moved));
    assert_eq!(with(Some(500), 10_500, None), value);
    assert_eq!(with(None, 10_500, Some((10_000, 40_000))), value);
    // Hours between value and offset: one of the hosts scales.
    let hours = 10_500 + u64::from(khz) * 1000 * 3600;
    let scaled = with(Some(500), hours, Some((10_000, 40_000)));
    assert_eq!(scaled, (TscRestored::Value, Some(0), Some(hours + moved)));
}

#[test]
fn a_clock_is_restored_as_saved_or_advanced_and_its_errnos_are_told() {
    let saved = VmState {
        clock: ClockState {
            nanoseconds: 1_000,
            realtime: 50_000,
            host_tsc: Some(7),
            tsc_stable: true,
        },
        ..Default::default()
    };
    let later = ClockState {
        nanoseconds: 3,
        realtime: 52_500,
        host_tsc: Some(9),
        tsc_stable: true,
    };
    let host_tsc = Some((7, 9));
    let restored = |how| saved.restore(&FakeClock::new(later), how).unwrap();
    assert_eq!(
        restored(ClockRestore::AsSaved),
        Passage {
            elapsed: 0,
            host_tsc
        }
    );
    let elapsed = 2_500;
    assert_eq!(
        restored(ClockRestore::Advanced),
        Passage { elapsed, host_tsc }
    );
    let mut timeless = saved;
    timeless.clock.realtime = 0;
    let clock = FakeClock::new(later);
    let refused = timeless.restore(&clock, ClockRestore::Advanced);
    assert_eq!(refused, Err(ClockError::NoRealtime));
    assert_eq!(clock.clock(), Ok(later), "nothing was changed");
    assert_eq!(
        timeless
            .restore(&clock, ClockRestore::AsSaved)
            .unwrap()
            .elapsed,
        0
    );
    let failed = |call| {
        let clock = FakeClock::new(later);
        clock.fail_at(call, EIO);
        saved.restore(&clock, ClockRestore::AsSaved).unwrap_err()
    };
    assert_eq!(failed(0), ClockError::Set(Errno::new(EIO)));
    assert_eq!(failed(1), ClockError::ReadAgain(Errno::new(EIO)));
    let clock = FakeClock::new(later);
    clock.fail_at(0, EIO);
    assert_eq!(
        VmState::save(&clock),
        Err(ClockError::Read(Errno::new(EIO)))
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// Any one feature bit that a guest has and a host has not.
    #[test]
    fn the_cpuid_leaf_register_and_bit_that_a_host_lacks_are_named(
        which in 0..5_usize, bit in 0..32_u32,
    ) {
        let (function, name) = [
            (1, "ECX"), (1, "EDX"), (7, "EBX"), (0x8000_0001, "ECX"), (0x8000_0001, "EDX"),
        ][which];
        fn register<'a>(leaf: &'a mut kvm_core::state::CpuidLeaf, name: &str) -> &'a mut u32 {
            match name {
                "EBX" => &mut leaf.ebx,
                "ECX" => &mut leaf.ecx,
                _ => &mut leaf.edx,
            }
        }
        let mut host = host();
        let mut state = state();
        for (leaves, set) in [(&mut host.cpuid, false), (&mut state.cpuid, true)] {
            for leaf in leaves.iter_mut().filter(|leaf| leaf.function == function) {
                let register = register(leaf, name);
                *register = if set { *register | 1 << bit } else { *register & !(1 << bit) };
            }
        }
        let no_feature = match (function, name) {
            (1, "ECX") => 1 << 21 | 1 << 24 | 1 << 27 | 1_u32 << 31,
            (1, "EDX") => 1 << 28,
            (0x8000_0001, "ECX") => 1 << 1 | 1 << 22,
            _ => 0,
        };
        match host.check(&state) {
            Ok(()) => prop_assert!(no_feature >> bit & 1 != 0),
            Err(Refusal::Cpuid { function: f, index, register, bits }) => {
                prop_assert_eq!((f, index, register, bits), (function, 0, name, 1 << bit));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}

#[cfg(feature = "with-serde")]
mod form {
    use super::*;
    use kvm_core::state::{Events, GeneralRegisters, StateBytes, StateVersion, SystemRegisters};

    fn text(state: &VcpuState) -> String {
        serde_json::to_string(state).unwrap()
    }

    #[test]
    fn every_version_but_those_that_are_known_is_refused_with_its_number() {
        let good = text(&state());
        let now = StateVersion::CURRENT.number();
        assert!(
            good.starts_with(&format!("{{\"version\":{now},")),
            "{}",
            &good[..40]
        );
        for version in [0, now + 1, 4_000_000_000] {
            let other = good.replacen(&format!("{now}"), &version.to_string(), 1);
            let error = serde_json::from_str::<VcpuState>(&other)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("this state has version {version};")),
                "{error}"
            );
            let vm = serde_json::to_string(&VmState::default()).unwrap();
            let vm = vm.replacen(&format!("{now}"), &version.to_string(), 1);
            let error = serde_json::from_str::<VmState>(&vm)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("this state has version {version};")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_field_that_this_version_has_not_is_refused_and_so_is_one_that_is_missing() {
        let more = text(&state()).replacen('{', "{\"colour\":1,", 1);
        let error = serde_json::from_str::<VcpuState>(&more)
            .unwrap_err()
            .to_string();
        assert!(error.contains("colour"), "{error}");
        let inner = text(&state()).replacen("{\"rax\"", "{\"ray\"", 1);
        let error = serde_json::from_str::<VcpuState>(&inner)
            .unwrap_err()
            .to_string();
        assert!(error.contains("ray"), "{error}");
        let less = text(&state()).replacen("\"mp_state\":3,", "", 1);
        let error = serde_json::from_str::<VcpuState>(&less)
            .unwrap_err()
            .to_string();
        assert!(error.contains("mp_state"), "{error}");
    }

    #[test]
    fn bytes_are_digits_in_text_and_other_text_is_refused() {
        let bytes = StateBytes(vec![0, 0x1f, 0xa0]);
        assert_eq!(serde_json::to_string(&bytes).unwrap(), "\"001fa0\"");
        let read = |text: &str| serde_json::from_str::<StateBytes>(text);
        assert_eq!(read("\"001FA0\"").unwrap(), bytes);
        for bad in ["\"001fa\"", "\"0g\"", "\"é\"", "3", "[1]"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    fn any_registers() -> impl Strategy<Value = GeneralRegisters> {
        any::<[u64; 6]>().prop_map(|[rax, rsp, r8, r15, rip, rflags]| GeneralRegisters {
            rax,
            rsp,
            r8,
            r15,
            rip,
            rflags,
            ..Default::default()
        })
    }

    fn any_system() -> impl Strategy<Value = SystemRegisters> {
        (
            any::<[u64; 5]>(),
            any::<[u16; 3]>(),
            any::<[u8; 4]>(),
            any::<Option<[u64; 4]>>(),
        )
            .prop_map(
                |(
                    [cr0, cr4, efer, base, gdt],
                    [selector, limit, _],
                    [kind, g, unusable, l],
                    pdptrs,
                )| {
                    let mut system = SystemRegisters {
                        cr0,
                        cr4,
                        efer,
                        pdptrs,
                        ..Default::default()
                    };
                    (system.cs.base, system.cs.selector, system.cs.kind) = (base, selector, kind);
                    (system.ss.g, system.tr.unusable, system.ldt.l) = (g, unusable, l);
                    (system.gdt.base, system.idt.limit) = (gdt, limit);
                    system
                },
            )
    }

    fn any_events() -> impl Strategy<Value = Events> {
        (any::<[u8; 6]>(), any::<[u32; 3]>(), any::<u64>()).prop_map(|(b, w, payload)| {
            let mut events = Events {
                flags: w[0],
                sipi_vector: w[1],
                ..Default::default()
            };
            (events.exception.vector, events.exception.error_code) = (b[0], w[2]);
            events.exception.payload = payload;
            (events.interrupt.shadow, events.nmi.pending) = (b[1], b[2]);
            (events.smi.latched_init, events.triple_fault) = (b[3], b[4]);
            events
        })
    }

    fn any_bytes() -> impl Strategy<Value = StateBytes> {
        proptest::collection::vec(any::<u8>(), 0..300).prop_map(StateBytes)
    }

    prop_compose! {
        fn any_state()(
            registers in any_registers(),
            system in any_system(),
            events in any_events(),
            xsave in any_bytes(),
            lapic in proptest::option::of(any_bytes()),
            nested in proptest::option::of(any_bytes()),
            msrs in proptest::collection::vec(any::<(u32, u64)>(), 0..20),
            unreadable_msrs in any::<Vec<u32>>(),
            leaves in proptest::collection::vec(any::<[u32; 7]>(), 0..20),
            (mp_state, tsc_khz, tsc_offset, mcg_cap) in any::<(u32, u32, Option<u64>, Option<u64>)>(),
        ) -> VcpuState {
            let leaf = |[function, index, flags, eax, ebx, ecx, edx]: [u32; 7]| {
                kvm_core::state::CpuidLeaf { function, index, flags, eax, ebx, ecx, edx }
            };
            VcpuState {
                registers,
                system,
                events,
                xsave,
                lapic,
                nested,
                unreadable_msrs,
                msrs: msrs.into_iter().map(|(index, value)| Msr { index, value }).collect(),
                cpuid: leaves.into_iter().map(leaf).collect(),
                mp_state,
                tsc_khz,
                tsc_offset,
                mcg_cap,
                ..state()
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

        #[test]
        fn any_state_is_the_same_when_it_was_text(state in any_state()) {
            let back: VcpuState = serde_json::from_str(&text(&state)).unwrap();
            prop_assert_eq!(back, state);
        }
    }
}
