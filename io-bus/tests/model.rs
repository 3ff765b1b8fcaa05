// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bus against a model that is a few plain lists; the steps are proptest's, so that what fails
//! is made small. The model is in `lockstep/`.

#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "its other drivers decode bytes")]
mod lockstep;

use io_bus::{BusKind, Direction, IoRange, WriteLength, WriteMatch};
use lockstep::{Later, Step, Temper, Way};
use proptest::prelude::*;

fn range() -> impl Strategy<Value = IoRange> {
    (address(), 0u64..24).prop_map(|(base, size)| match size {
        0 => IoRange::exact(base),
        size => IoRange::new(base, size).unwrap_or(IoRange::exact(base)),
    })
}

/// A few pages' edges, so that cookies share places and do not.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..4, 0u64..32).prop_map(|(page, offset)| page * 0x1000 + 0xff0 + offset),
        1 => (0u64..32).prop_map(|back| u64::MAX - back),
        1 => (0u64..32).prop_map(|back| 0xffff - back),
    ]
}

fn bus() -> impl Strategy<Value = BusKind> {
    prop::sample::select(&BusKind::ALL[..])
}

fn writes() -> impl Strategy<Value = WriteMatch> {
    prop::sample::select(vec![
        WriteMatch::Any,
        WriteMatch::Length(WriteLength::Two),
        WriteMatch::Length(WriteLength::Four),
        WriteMatch::U8(1),
        WriteMatch::U32(1),
        WriteMatch::U32(2),
    ])
}

fn access() -> impl Strategy<Value = Step> {
    let way = prop_oneof![
        2 => bus().prop_map(Way::Plain),
        2 => Just(Way::Mmio),
        1 => (0usize..5).prop_map(Way::Repeated),
    ];
    let direction = prop::sample::select(vec![Direction::Read, Direction::Write]);
    let len = prop::sample::select(vec![0usize, 1, 2, 3, 4, 8, 12, 20]);
    let later = prop::sample::select(vec![
        Later::Complete,
        Later::Complete,
        Later::Decline,
        Later::Drop,
        Later::Abandon,
    ]);
    (way, direction, address(), len, later)
        .prop_map(|(way, direction, at, len, later)| Step::Access(way, direction, at, len, later))
}

fn step() -> impl Strategy<Value = Step> {
    let temper = prop::sample::select(vec![Temper::Mild, Temper::Picky, Temper::Slow]);
    let n = any::<usize>;
    let seldom = || prop::bool::weighted(0.2);
    let refuse = prop::option::weighted(0.4, 0usize..6);
    prop_oneof![
        6 => (bus(), range(), temper).prop_map(|(b, r, t)| Step::Register(b, r, t)),
        2 => (n(), any::<bool>()).prop_map(|(n, explicit)| Step::Remove(n, explicit)),
        2 => (n(), address(), refuse.clone())
            .prop_map(|(n, base, refuse)| Step::Move(n, base, refuse)),
        4 => (n(), -2i8..3, refuse).prop_map(|(n, by, refuse)| Step::Nudge(n, 4 * by, refuse)),
        6 => (n(), 0u64..5, writes(), seldom())
            .prop_map(|(n, o, w, refuse)| Step::Attach(n, 4 * o, w, refuse)),
        1 => (n(), n(), seldom()).prop_map(|(n, which, refuse)| Step::Detach(n, which, refuse)),
        16 => access(),
        3 => (bus(), address(), 1usize..9).prop_map(|(bus, a, len)| {
            let bus = if bus == BusKind::Pio { bus } else { BusKind::Mmio };
            Step::Coalesced(bus, a, len)
        }),
        2 => Just(Step::BeforeExit),
        2 => (bus(), range(), seldom()).prop_map(|(b, r, refuse)| Step::Zone(b, r, refuse)),
        1 => (n(), seldom()).prop_map(|(n, refuse)| Step::EndZone(n, refuse)),
        1 => any::<bool>().prop_map(Step::Count),
        1 => any::<bool>().prop_map(Step::Trace),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_bus_does_what_a_few_lists_would(steps in prop::collection::vec(step(), 1..120)) {
        lockstep::run(steps);
    }
}
