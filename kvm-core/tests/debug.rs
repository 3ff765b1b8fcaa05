// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Debug registers as data against a naive model; whose an exception was; pieces of pages; and NMI
//! requests, on a vCPU without KVM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(all(target_arch = "x86_64", not(loom)))]

use kvm_bindings as kvm;
use kvm_core::arch::x86_64::{
    Access, BreakpointError, DebugCause, GuestDebug, HARDWARE_SLOTS, HardwareBreakpoint,
    HardwareBreakpoints, Injection, dr6_for_guest, pages,
};
use kvm_core::fake::{FakeVcpu, Step};
use kvm_core::{Exit, Flow, HaltReason, Identity, VcpuId, VcpuSet, VcpuView};
use proptest::prelude::*;

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![
        Just(Access::Execute),
        Just(Access::Write),
        Just(Access::ReadWrite)
    ]
}

/// Any breakpoint that there is.
fn breakpoint() -> impl Strategy<Value = HardwareBreakpoint> {
    (any::<u64>(), 0..4u32, access()).prop_map(|(address, log, access)| match access {
        Access::Execute => HardwareBreakpoint::execute(address),
        _ => HardwareBreakpoint::new(address & !((1 << log) - 1), 1 << log, access).unwrap(),
    })
}

fn set_of(breakpoints: &[HardwareBreakpoint]) -> HardwareBreakpoints {
    let mut set = HardwareBreakpoints::default();
    for breakpoint in breakpoints {
        set.insert(*breakpoint).unwrap();
    }
    set
}

/// DR7 as the SDM's table has it: a field at a time, in text, most significant bit first.
fn dr7_by_the_table(set: &HardwareBreakpoints) -> u64 {
    let slots: Vec<_> = (0..HARDWARE_SLOTS).map(|n| set.get(n)).collect();
    let mut text = String::new();
    for slot in slots.iter().rev() {
        text += match slot.map(|b| b.len()) {
            Some(8) => "10",
            Some(4) => "11",
            Some(2) => "01",
            _ => "00",
        };
        text += match slot.map(|b| b.access()) {
            Some(Access::ReadWrite) => "11",
            Some(Access::Write) => "01",
            _ => "00",
        };
    }
    text += "000001"; // 15 to 10: GD and RTM are off, bit 10 is one
    text += "10"; // GE, LE
    for slot in slots.iter().rev() {
        text += if slot.is_some() { "10" } else { "00" }; // G, L
    }
    assert_eq!(text.len(), 32);
    u64::from_str_radix(&text, 2).unwrap()
}

proptest! {
    #[test]
    fn dr7_is_that_of_the_manuals_table(
        breakpoints in prop::collection::vec(breakpoint(), 0..=4),
        removed in prop::collection::vec(0..4usize, 0..3),
    ) {
        let mut set = set_of(&breakpoints);
        for index in removed {
            if let Some(breakpoint) = set.get(index) {
                prop_assert!(set.remove(breakpoint));
            }
        }
        prop_assert_eq!(set.dr7(), dr7_by_the_table(&set));
        for (n, address) in set.addresses().into_iter().enumerate() {
            prop_assert_eq!(address, set.get(n).map_or(0, |b| b.address()));
        }
    }

    #[test]
    fn four_fit_and_the_fifth_changes_nothing(breakpoints in prop::collection::vec(breakpoint(), 5)) {
        let mut set = HardwareBreakpoints::default();
        for (n, breakpoint) in breakpoints[..4].iter().enumerate() {
            prop_assert_eq!(set.insert(*breakpoint), Ok(n));
        }
        let before = set;
        prop_assert_eq!(set.insert(breakpoints[4]), Err(BreakpointError::Full));
        prop_assert_eq!(set, before);
        // A slot that is given back is the next to be taken.
        prop_assert!(set.remove(breakpoints[2]));
        prop_assert!(set.insert(breakpoints[4]).is_ok());
    }

    #[test]
    fn only_what_a_processor_can_watch_exists(address: u64, len in 0..20u64, access in access()) {
        let made = HardwareBreakpoint::new(address, len, access);
        let len_fits = match access {
            Access::Execute => len == 1,
            _ => [1, 2, 4, 8].contains(&len),
        };
        let exists = len_fits && address.is_multiple_of(len);
        prop_assert_eq!(made.is_ok(), exists, "{:?}", made);
        match made {
            Ok(made) => prop_assert_eq!((made.address(), made.len(), made.access()), (address, len, access)),
            Err(error) => {
                let text = error.to_string();
                prop_assert!(text.contains(&format!("{len} bytes at {address:#x}")), "{}", text);
            }
        }
    }

    #[test]
    fn a_cover_watches_each_byte_once_and_no_other(
        address in prop_oneof![any::<u64>(), 0..64u64, u64::MAX - 64..=u64::MAX],
        len in 0..40u64,
    ) {
        let cover: Vec<_> = HardwareBreakpoint::cover(address, len, Access::Write).collect();
        for piece in &cover {
            prop_assert_eq!(
                HardwareBreakpoint::new(piece.address(), piece.len(), Access::Write), Ok(*piece)
            );
        }
        let bytes: Vec<_> =
            cover.iter().flat_map(|b| (0..b.len()).map(|n| b.address().wrapping_add(n))).collect();
        let fits = len > 0 && address.checked_add(len - 1).is_some();
        let wanted: Vec<_> = (0..if fits { len } else { 0 }).map(|n| address + n).collect();
        if cover.len() <= HARDWARE_SLOTS {
            prop_assert_eq!(bytes, wanted);
        } else {
            // More than any processor has: that it is too much is all there is to know.
            prop_assert_eq!(cover.len(), HARDWARE_SLOTS + 1);
            prop_assert!(wanted.starts_with(&bytes));
        }
    }

    #[test]
    fn the_ioctls_argument_has_what_was_asked_for_and_nothing_else(
        breakpoints in prop::collection::vec(breakpoint(), 0..=4),
        software: bool, single_step: bool, block_interrupts: bool,
    ) {
        let hardware = set_of(&breakpoints);
        let debug = GuestDebug { hardware, software, single_step, block_interrupts };
        let argument = debug.to_kvm();
        let has = |flag: u32| argument.control & flag != 0;
        prop_assert_eq!(has(kvm::KVM_GUESTDBG_USE_HW_BP), !breakpoints.is_empty());
        prop_assert_eq!(has(kvm::KVM_GUESTDBG_USE_SW_BP), software);
        prop_assert_eq!(has(kvm::KVM_GUESTDBG_SINGLESTEP), single_step);
        prop_assert_eq!(has(kvm::KVM_GUESTDBG_BLOCKIRQ), block_interrupts);
        prop_assert!(!has(kvm::KVM_GUESTDBG_INJECT_DB | kvm::KVM_GUESTDBG_INJECT_BP));
        prop_assert_eq!(has(kvm::KVM_GUESTDBG_ENABLE), !debug.is_off());
        prop_assert_eq!(debug.is_off(), argument == Default::default());
        if !breakpoints.is_empty() {
            prop_assert_eq!(&argument.arch.debugreg[..4], &hardware.addresses()[..]);
            prop_assert_eq!(argument.arch.debugreg[7], hardware.dr7());
        }
        for (injection, flag) in [
            (Injection::Breakpoint, kvm::KVM_GUESTDBG_INJECT_BP),
            (Injection::Debug { dr6: 0 }, kvm::KVM_GUESTDBG_INJECT_DB),
        ] {
            let mut expected = argument;
            expected.control |= flag;
            prop_assert_eq!(debug.injecting(injection), expected);
        }
    }

    #[test]
    fn an_exception_is_the_debuggers_only_where_it_asked_for_it(
        breakpoints in prop::collection::vec(breakpoint(), 0..=4),
        software: bool, single_step: bool, exception in prop_oneof![Just(1u32), Just(3)], dr6: u64,
    ) {
        let debug = GuestDebug {
            hardware: set_of(&breakpoints), software, single_step, block_interrupts: false,
        };
        let met = (0..breakpoints.len()).find(|n| dr6 >> n & 1 != 0);
        let stepped = dr6 >> 14 & 1 != 0;
        let expected = match (exception, met) {
            (3, _) if software => DebugCause::Software,
            (3, _) => DebugCause::Guest(Injection::Breakpoint),
            (_, Some(n)) => DebugCause::Hardware(breakpoints[n]),
            _ if single_step && stepped => DebugCause::Step,
            _ => DebugCause::Guest(Injection::Debug { dr6 }),
        };
        prop_assert_eq!(debug.cause(exception, dr6), expected);
    }

    #[test]
    fn the_guests_dr6_gains_what_happened(guest: u64, exit: u64) {
        let after = dr6_for_guest(guest, exit);
        for bit in 0..64 {
            let (guest, exit, after) = (guest >> bit & 1, exit >> bit & 1, after >> bit & 1);
            let expected = match bit {
                0..=3 => exit,
                13..=15 => guest | exit,
                _ => guest,
            };
            prop_assert_eq!(after, expected, "bit {}", bit);
        }
    }

    #[test]
    fn pieces_of_pages_are_all_of_the_bytes_and_cross_no_page(
        linear in prop_oneof![any::<u64>(), u64::MAX - 9000..=u64::MAX],
        len in 0..20_000u64,
    ) {
        let mut next = u128::from(linear);
        for (at, piece) in pages(linear, len) {
            prop_assert_eq!(u128::from(at), next);
            prop_assert!(piece > 0 && at / 4096 == (at + (piece - 1)) / 4096);
            next += u128::from(piece);
        }
        prop_assert_eq!(next, (u128::from(linear) + u128::from(len)).min(1 << 64));
    }
}

/// Runs a vCPU without KVM, asks for `nmis`, and says how often KVM_NMI was called.
fn nmis(vcpu: FakeVcpu, nmis: usize) -> usize {
    let set = VcpuSet::new(Identity::vm("test"));
    let state = vcpu.state();
    let thread = set
        .spawn("vcpu0", vcpu, |_: &VcpuView<'_, ()>, _: Exit<'_>| {
            Flow::<()>::Continue
        })
        .unwrap();
    for n in 1..=nmis {
        set.nmi(VcpuId(0)).unwrap();
        while state.log().nmis < n {
            std::thread::yield_now();
        }
    }
    set.stop().unwrap();
    assert_eq!(thread.join().unwrap().reason, HaltReason::Stopped);
    state.log().nmis
}

#[test]
fn each_nmi_that_is_asked_for_is_raised_once_on_the_vcpus_thread() {
    assert_eq!(nmis(FakeVcpu::new(VcpuId(0), [Step::Guest]), 20), 20);
}

#[test]
fn a_host_without_nmis_stops_no_vcpu() {
    let vcpu = FakeVcpu::new(VcpuId(0), [Step::Guest]).nmi_fails(22);
    assert_eq!(nmis(vcpu, 3), 3);
}

#[test]
fn an_nmi_for_nobody_is_refused_with_the_number() {
    let set = VcpuSet::new(Identity::vm("test"));
    let error = set.nmi(VcpuId(3)).unwrap_err();
    assert_eq!(error.to_string(), "no vCPU 3 is enrolled");
}
