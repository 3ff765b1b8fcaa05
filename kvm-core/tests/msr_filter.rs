// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSR filters beside a naive model of KVM's rules.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![cfg(target_arch = "x86_64")]

use std::collections::HashMap;

use kvm_core::arch::x86_64::msr_filter::{
    Direction, MAX_RANGE_MSRS, MAX_RANGES, MsrAccess, MsrExits, MsrFilter, MsrFilterError, MsrRange,
};
use proptest::prelude::*;

fn access() -> impl Strategy<Value = MsrAccess> {
    prop_oneof![
        Just(MsrAccess::Read),
        Just(MsrAccess::Write),
        Just(MsrAccess::Both)
    ]
}

fn about(access: MsrAccess, direction: Direction) -> bool {
    matches!(
        (access, direction),
        (MsrAccess::Both, _)
            | (MsrAccess::Read, Direction::Read)
            | (MsrAccess::Write, Direction::Write)
    )
}

proptest! {
    #[test]
    fn the_verdict_is_that_of_a_table_with_an_entry_for_each_msr(
        denies: bool,
        ranges in prop::collection::vec(
            (access(), 0x7f0_u32..0x920, 1_u32..200, any::<bool>(),
             prop::collection::vec((0_u32..200, any::<bool>()), 0..20)),
            1..=MAX_RANGES),
        asked in prop::collection::vec(0x7e0_u32..0xa10, 50),
    ) {
        // The model: for each MSR and direction, what the first range said that has it.
        let mut table: HashMap<(u32, bool), bool> = HashMap::new();
        let mut filter: Option<MsrFilter> = None;
        for (access, base, count, all_denied, edits) in ranges {
            let mut range = MsrRange::new(access, base, count).unwrap();
            let mut mine = vec![!all_denied; count as usize];
            if all_denied {
                range = range.denied();
            }
            for (at, allowed) in edits {
                let inside = at < count;
                prop_assert_eq!(range.allow(base + at, allowed), inside);
                if inside {
                    mine[at as usize] = allowed;
                }
            }
            for (index, allowed) in (base..).zip(mine) {
                for direction in [Direction::Read, Direction::Write] {
                    if about(access, direction) {
                        let write = direction == Direction::Write;
                        table.entry((index, write)).or_insert(allowed);
                    }
                }
            }
            filter = Some(match filter {
                None if denies => MsrFilter::denying(range),
                None => MsrFilter::allowing().with(range).unwrap(),
                Some(filter) => filter.with(range).unwrap(),
            });
        }
        let filter = filter.unwrap();
        for index in asked {
            for direction in [Direction::Read, Direction::Write] {
                let listed = table.get(&(index, direction == Direction::Write));
                let expected = (0x800..0x900).contains(&index) || *listed.unwrap_or(&!denies);
                prop_assert_eq!(filter.allows(index, direction), expected, "{:#x}", index);
            }
        }
        // As numbers and back it is the same.
        let raw = filter.ranges().iter().map(|range| {
            let msrs = range.msrs();
            (range.access().flags(), msrs.start, msrs.end - msrs.start, range.bitmap())
        });
        prop_assert_eq!(MsrFilter::from_raw(filter.flags(), raw), Ok(filter.clone()));
    }
}

#[test]
fn what_kvm_refuses_is_refused_with_the_numbers() {
    let range = |base, count| MsrRange::new(MsrAccess::Both, base, count).map(drop);
    assert_eq!(range(0, MAX_RANGE_MSRS), Ok(()));
    for count in [0, MAX_RANGE_MSRS + 1, u32::MAX] {
        let error = range(5, count).unwrap_err();
        assert_eq!(error, MsrFilterError::RangeLength { base: 5, count });
    }
    assert_eq!(range(u32::MAX - 1, 1), Ok(()));
    let (base, count) = (u32::MAX, 1);
    assert_eq!(
        range(base, count),
        Err(MsrFilterError::RangeEnd { base, count })
    );

    let one = || MsrRange::new(MsrAccess::Read, 0x10, 1).unwrap();
    let mut filter = MsrFilter::denying(one());
    for _ in 1..MAX_RANGES {
        filter = filter.with(one()).unwrap();
    }
    assert_eq!(filter.with(one()), Err(MsrFilterError::TooManyRanges));

    let raw = |flags, ranges: &[(u32, u32, u32, &[u64])]| {
        MsrFilter::from_raw(flags, ranges.iter().copied())
    };
    assert_eq!(raw(2, &[]), Err(MsrFilterError::Flags(2)));
    assert_eq!(raw(1, &[]), Err(MsrFilterError::DeniesAll));
    assert_eq!(raw(1, &[(9, 0, 0, &[])]), Err(MsrFilterError::DeniesAll));
    assert_eq!(raw(0, &[]), Ok(MsrFilter::allowing()));
    for flags in [0, 4, 7] {
        let refused = MsrFilterError::RangeFlags { base: 1, flags };
        assert_eq!(raw(0, &[(flags, 1, 1, &[1])]), Err(refused));
    }
    // A bitmap that is too short denies what it has no bit for.
    let short = raw(0, &[(3, 0x100, 100, &[u64::MAX])]).unwrap();
    assert!(short.allows(0x13f, Direction::Read) && !short.allows(0x140, Direction::Read));
}

#[test]
fn the_reasons_are_kvms_bits() {
    let exits = |unknown, invalid, filtered| MsrExits {
        unknown,
        invalid,
        filtered,
    };
    let masks = [
        (exits(false, false, false), 0),
        (exits(false, true, false), 1),
        (exits(true, false, false), 2),
        (exits(false, false, true), 4),
        (exits(true, true, true), 7),
    ];
    for (exits, mask) in masks {
        assert_eq!(exits.mask(), mask);
    }
}
