// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSR filters and exits on the real KVM, and KVM as the oracle of both: which filters it takes, and
//! which accesses it lets through. `LONG_TESTS=1` asks many more.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

mod common;

use common::{Machine, kvm, long_tests, watchdog};
use kvm_bindings::{
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_msr_filter, kvm_msr_filter_range,
};
use kvm_core::arch::x86_64::msr_features::msr_feature_name;
use kvm_core::arch::x86_64::msr_filter::{
    Direction, FilterMsrs, MAX_RANGES, MsrAccess, MsrExits, MsrFilter, MsrFilterError, MsrRange,
};
use kvm_core::{Exit, Flow, HaltReason, VcpuSet, VcpuView};
use kvm_ioctls::VmFd;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

/// What came of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// It was done, and a read gave this.
    Done(u64),
    /// A general protection fault.
    Fault,
}

/// An access, what user space saw of it (its reason), and what came of it.
type Seen = (Option<u32>, Came);

/// Has a guest make accesses: `next` gets what came of the last one and says the next, until it says
/// `None`. The low half of what a write writes is 1, and its high half 0. Exits to user space are
/// answered with what `answer` says: `None` is a fault.
fn converse(
    machine: &Machine,
    mut next: impl FnMut(Option<Seen>) -> Option<(u32, Direction)>,
    answer: impl Fn() -> Option<u64>,
) {
    let set = VcpuSet::new(machine.vm.identity().clone());
    let runner = set.enroll(machine.vcpu(0)).unwrap();
    let (mut last, mut asked) = (None, None);
    let (mut reason, mut low) = (None, 0);
    let Err(halt) = runner.run(|_: &VcpuView<'_, _>, exit: Exit<'_>| {
        match exit {
            Exit::PioIn { port, data, .. } => {
                if port == 0x10 {
                    asked = next(last.take());
                }
                let Some((index, direction)) = asked else {
                    return Flow::Stop(());
                };
                let word = match port {
                    0x10 => index,
                    _ => u32::from(direction == Direction::Write),
                };
                data.copy_from_slice(&word.to_le_bytes());
            }
            Exit::PioOut { port, data, .. } => {
                let word = u32::from_le_bytes(data.try_into().unwrap());
                let came = match port {
                    0x20 => {
                        low = word;
                        return Flow::Continue;
                    }
                    0x22 => Came::Done(u64::from(word) << 32 | u64::from(low)),
                    0x24 => Came::Done(0),
                    _ => Came::Fault,
                };
                last = Some((reason.take(), came));
            }
            Exit::X86Rdmsr {
                index,
                reason: why,
                mut reply,
            }
            | Exit::X86Wrmsr {
                index,
                reason: why,
                mut reply,
                ..
            } => {
                assert_eq!(Some(index), asked.map(|(index, _)| index));
                reason = Some(why);
                match answer() {
                    Some(value) => reply.accept(value),
                    None => reply.refuse(),
                }
            }
            other => panic!("{other:?}"),
        }
        Flow::Continue
    });
    assert_eq!(halt.reason, HaltReason::Handler(()));
}

/// What came of each access of a list.
fn accesses(
    machine: &Machine,
    list: &[(u32, Direction)],
    answer: impl Fn() -> Option<u64>,
) -> Vec<Seen> {
    let (mut seen, mut rest) = (Vec::new(), list.iter().copied());
    let next = |came| {
        seen.extend(came);
        rest.next()
    };
    converse(machine, next, answer);
    seen
}

/// IA32_SYSENTER_CS: every KVM has it, and any value will do.
const SYSENTER_CS: u32 = 0x174;

fn all() -> MsrExits {
    MsrExits {
        unknown: true,
        invalid: true,
        filtered: true,
    }
}

fn denies(index: u32) -> MsrFilter {
    let range = MsrRange::new(MsrAccess::Both, index, 1).unwrap().denied();
    MsrFilter::allowing().with(range).unwrap()
}

#[test]
fn a_denied_access_comes_to_user_space_and_is_answered_or_faults() {
    watchdog(|| {
        let machine = Machine::new(guests::cpu::msrs());
        FilterMsrs::exit_on_msrs(machine.vm.fd(), all()).unwrap();
        machine.vm.set_msr_filter(&denies(SYSENTER_CS)).unwrap();
        let (read, write) = (Direction::Read, Direction::Write);
        let list = [
            (SYSENTER_CS, read),
            (SYSENTER_CS, write),
            (SYSENTER_CS + 1, read),
            (SYSENTER_CS + 1, write),
        ];
        let value = 0x1122_3344_5566_7788;
        let filtered = Some(KVM_MSR_EXIT_REASON_FILTER);
        let answered = accesses(&machine, &list, || Some(value));
        let expected = [
            (filtered, Came::Done(value)),
            (filtered, Came::Done(0)),
            (None, Came::Done(0)),
            (None, Came::Done(0)),
        ];
        assert_eq!(answered, expected);
    });
    watchdog(|| {
        let machine = Machine::new(guests::cpu::msrs());
        FilterMsrs::exit_on_msrs(machine.vm.fd(), all()).unwrap();
        machine.vm.set_msr_filter(&denies(SYSENTER_CS)).unwrap();
        let list = [Direction::Read, Direction::Write].map(|d| (SYSENTER_CS, d));
        let filtered = Some(KVM_MSR_EXIT_REASON_FILTER);
        let refused = accesses(&machine, &list, || None);
        assert_eq!(refused, [(filtered, Came::Fault); 2]);
    });
}

#[test]
fn a_denied_access_is_a_fault_where_nobody_asked_for_it() {
    watchdog(|| {
        let machine = Machine::new(guests::cpu::msrs());
        machine.vm.set_msr_filter(&denies(SYSENTER_CS)).unwrap();
        let list = [
            (SYSENTER_CS, Direction::Read),
            (SYSENTER_CS, Direction::Write),
            (SYSENTER_CS + 1, Direction::Read),
        ];
        let seen = accesses(&machine, &list, || panic!("no exit was asked for"));
        let expected = [
            (None, Came::Fault),
            (None, Came::Fault),
            (None, Came::Done(0)),
        ];
        assert_eq!(seen, expected);
    });
}

#[test]
fn an_msr_that_kvm_does_not_know_comes_to_user_space() {
    watchdog(|| {
        const NOBODYS: u32 = 0x4b56_4dee;
        let machine = Machine::new(guests::cpu::msrs());
        FilterMsrs::exit_on_msrs(machine.vm.fd(), all()).unwrap();
        let list = [Direction::Read, Direction::Write].map(|d| (NOBODYS, d));
        let seen = accesses(&machine, &list, || Some(7));
        let unknown = Some(KVM_MSR_EXIT_REASON_UNKNOWN);
        assert_eq!(seen, [(unknown, Came::Done(7)), (unknown, Came::Done(0))]);
    });
}

#[test]
fn the_hosts_feature_msrs_are_read_as_data() {
    let features = kvm().msr_features().unwrap();
    for (index, value) in features.iter() {
        let name = msr_feature_name(index).unwrap_or("?");
        println!("{index:#x} {name} = {value:#x}");
        assert_eq!(features.get(index), Some(value));
    }
    assert!(features.iter().map(|(index, _)| index).is_sorted());
}

/// The numbers of a `kvm_msr_filter`.
type Raw = (u32, Vec<(u32, u32, u32, Vec<u64>)>);

fn kvm_takes(vm: &VmFd, (flags, ranges): &Raw) -> bool {
    let mut raw = kvm_msr_filter {
        flags: *flags,
        ..Default::default()
    };
    for (to, (flags, base, count, bits)) in raw.ranges.iter_mut().zip(ranges) {
        *to = kvm_msr_filter_range {
            flags: *flags,
            base: *base,
            nmsrs: *count,
            bitmap: bits.as_ptr().cast_mut().cast(),
        };
    }
    // SAFETY: KVM reads what it does not refuse for its length; `raw_filters` gives each range as many
    // bits as the longest that it takes.
    let result = unsafe { vm.set_msr_filter_unchecked(&raw) };
    if let Err(errno) = result {
        assert_eq!(errno.errno(), libc::EINVAL, "only EINVAL is a verdict");
    }
    result.is_ok()
}

fn ours((flags, ranges): &Raw) -> Result<MsrFilter, MsrFilterError> {
    let ranges = ranges.iter();
    let ranges = ranges.map(|(flags, base, count, bits)| (*flags, *base, *count, &bits[..]));
    MsrFilter::from_raw(*flags, ranges)
}

fn raw_filters() -> impl Strategy<Value = Raw> {
    let flags = prop_oneof![20 => 0_u32..2, 1 => any::<u32>()];
    let range_flags = prop_oneof![40 => 1_u32..4, 1 => Just(0), 1 => any::<u32>()];
    let base = prop_oneof![
        4 => 0_u32..0x1000,
        4 => 0xc000_0000_u32..0xc000_1000,
        1 => select(vec![u32::MAX, u32::MAX - 1, u32::MAX - 64]),
        1 => any::<u32>(),
    ];
    let count = prop_oneof![
        20 => 1_u32..300,
        2 => Just(0),
        2 => select(vec![12287, 12288, 12289, 12352, u32::MAX]),
    ];
    let range = (range_flags, base, count, any::<[u64; 8]>());
    let ranges = prop::collection::vec(range, 0..=MAX_RANGES);
    (flags, ranges).prop_map(|(flags, ranges)| {
        let whole = |bits: [u64; 8]| bits.iter().copied().cycle().take(12288 / 64).collect();
        let ranges = ranges.into_iter();
        let ranges = ranges.map(|(f, base, count, bits)| (f, base, count, whole(bits)));
        (flags, ranges.collect())
    })
}

/// The long form asks many more; an emulated host answers a tenth of them in the time.
fn cases(usual: u32) -> u32 {
    let in_lab = std::env::var_os("REFERENCE_VMM_LAB").is_some();
    match (long_tests(), in_lab) {
        (true, false) => usual * 7,
        (true, true) | (false, false) => usual,
        (false, true) => usual / 10,
    }
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        failure_persistence: None,
        ..Config::with_cases(cases)
    })
}

#[test]
fn kvm_takes_the_filters_that_this_crate_takes_and_no_others() {
    watchdog(|| {
        let setup = kvm().create_vm().unwrap();
        let cases = cases(3_000);
        let (mut taken, mut refused) = (0, 0);
        let verdicts = std::cell::RefCell::new((&mut taken, &mut refused));
        runner(cases)
            .run(&raw_filters(), |raw| {
                let theirs = kvm_takes(setup.fd(), &raw);
                let mut counts = verdicts.borrow_mut();
                *if theirs {
                    &mut *counts.0
                } else {
                    &mut *counts.1
                } += 1;
                match ours(&raw) {
                    Ok(filter) => {
                        prop_assert!(theirs);
                        // And as this crate writes it, it is taken too. (A filter set waits for readers.)
                        if (*counts.0 + *counts.1) % 8 == 0 {
                            prop_assert_eq!(setup.set_msr_filter(&filter), Ok(()));
                        }
                    }
                    // What KVM takes and matches nothing with; it may refuse the filter for a later range.
                    Err(MsrFilterError::RangeEnd { .. }) => {}
                    Err(_) => prop_assert!(!theirs),
                }
                Ok(())
            })
            .unwrap();
        println!("{taken} taken, {refused} refused");
        assert!(taken > cases / 10 && refused > cases / 20);
    });
}

#[test]
fn the_accesses_that_kvm_denies_are_those_that_this_crate_says() {
    watchdog(|| {
        // Near these, so that ranges meet; some are MSRs that KVM has, most are nobody's.
        const MIDDLES: [u32; 4] = [0x174, 0x7f0, 0x8f8, 0xc000_0080];
        let cases = cases(200);
        let range = (
            select(vec![MsrAccess::Read, MsrAccess::Write, MsrAccess::Both]),
            select(MIDDLES.to_vec()),
            -20_i32..20,
            1_u32..40,
            any::<u64>(),
        );
        let index = (select(MIDDLES.to_vec()), -24_i32..44);
        let accessed = prop::collection::vec((index, any::<bool>()), 20);
        let filters = (any::<bool>(), prop::collection::vec(range, 1..6), accessed);
        let machine = Machine::new(guests::cpu::msrs());
        FilterMsrs::exit_on_msrs(machine.vm.fd(), all()).unwrap();
        // Each filter with its accesses, one after the other in one run of the guest.
        let mut runner = runner(cases);
        let mut left = cases;
        let mut filter = MsrFilter::allowing();
        let mut list = Vec::new().into_iter();
        let mut asked = None;
        let (mut denied, mut allowed) = (0, 0);
        let next = |came: Option<Seen>| {
            if let (Some((reason, _)), Some((index, direction))) = (came, asked) {
                let filtered = reason == Some(KVM_MSR_EXIT_REASON_FILTER);
                let allows = filter.allows(index, direction);
                assert_eq!(filtered, !allows, "{index:#x} {direction:?} of {filter:x?}");
                *if filtered { &mut denied } else { &mut allowed } += 1;
            }
            asked = list.next();
            if asked.is_none() && left > 0 {
                left -= 1;
                let (denies, ranges, accessed) = filters.new_tree(&mut runner).unwrap().current();
                filter = made(denies, ranges);
                machine.vm.set_msr_filter(&filter).unwrap();
                let place = |((middle, offset), write): ((u32, i32), bool)| {
                    let direction = if write {
                        Direction::Write
                    } else {
                        Direction::Read
                    };
                    (middle.wrapping_add_signed(offset), direction)
                };
                let all: Vec<_> = accessed.into_iter().map(place).collect();
                list = all.into_iter();
                asked = list.next();
            }
            asked
        };
        // Neither EFER nor another of these minds a 1.
        converse(&machine, next, || Some(0));
        println!("{denied} denied, {allowed} allowed");
        assert!(denied > cases && allowed > cases);
    });
}

type MadeOf = (MsrAccess, u32, i32, u32, u64);

fn made(denies: bool, ranges: Vec<MadeOf>) -> MsrFilter {
    let mut filter: Option<MsrFilter> = None;
    for (access, middle, offset, len, bits) in ranges {
        let base = middle.wrapping_add_signed(offset);
        let mut range = MsrRange::new(access, base, len).unwrap();
        for index in range.msrs() {
            range.allow(index, bits >> (index % 64) & 1 != 0);
        }
        filter = Some(match filter {
            None if denies => MsrFilter::denying(range),
            None => MsrFilter::allowing().with(range).unwrap(),
            Some(filter) => filter.with(range).unwrap(),
        });
    }
    filter.unwrap()
}
