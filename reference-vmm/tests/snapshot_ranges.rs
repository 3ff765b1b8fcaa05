// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sets of pages do what sets do, and the sections that hold them are read back or refused.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::ops::Range;

use proptest::prelude::*;
use reference_vmm::snapshot::packed::{Duplicates, FIRST, Packed, Stored};
use reference_vmm::snapshot::pages::{PAGE, PageMap, Piece};
use reference_vmm::snapshot::ranges::Ranges;

const PAGES: u64 = 64;

fn runs() -> impl Strategy<Value = Vec<Range<u64>>> {
    let run = (0..PAGES, 0_u64..9).prop_map(|(start, len)| start * PAGE..(start + len) * PAGE);
    prop::collection::vec(run, 0..12)
}

fn set(runs: impl IntoIterator<Item = Range<u64>>) -> BTreeSet<u64> {
    runs.into_iter()
        .flat_map(|run| run.step_by(PAGE as usize))
        .collect()
}

/// Whether it has the form that it promises.
fn is_in_order(ranges: &Ranges) -> bool {
    let runs: Vec<_> = ranges.iter().collect();
    runs.iter().all(|run| !run.is_empty()) && runs.windows(2).all(|two| two[0].end < two[1].start)
}

proptest! {
    #[test]
    fn ranges_are_sets_of_pages(one in runs(), other in runs(), start in 0..PAGES, len in 0..PAGES, most in 1_usize..5) {
        let (a, b) = (Ranges::of(one.clone()), Ranges::of(other.clone()));
        let (of_a, of_b) = (set(one), set(other));
        for (ranges, wanted) in [
            (a.clone(), of_a.clone()),
            (a.union(&b), &of_a | &of_b),
            (a.subtract(&b), &of_a - &of_b),
            (b.subtract(&a), &of_b - &of_a),
        ] {
            prop_assert!(is_in_order(&ranges), "{:?}", ranges);
            prop_assert_eq!(set(ranges.iter()), wanted.clone());
            prop_assert_eq!(ranges.bytes(), wanted.len() as u64 * PAGE);
            prop_assert_eq!(Ranges::parse(&ranges.encode()).unwrap(), ranges);
        }
        let range = start * PAGE..(start + len) * PAGE;
        let within = set(a.within(range.clone()));
        prop_assert_eq!(within, of_a.iter().copied().filter(|page| range.contains(page)).collect());
        let thin = a.thinned(most);
        prop_assert!(is_in_order(&thin) && thin.count() <= most);
        prop_assert!(a.subtract(&thin).is_empty());
        if a.count() <= most {
            prop_assert_eq!(thin, a);
        }
    }

    #[test]
    fn any_bytes_are_a_section_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        if let Ok(ranges) = Ranges::parse(&bytes) {
            prop_assert_eq!(ranges.encode(), &*bytes);
        }
        let own = Ranges::of(Some(0..PAGES * PAGE));
        if let Ok(duplicates) = Duplicates::parse(&bytes, &own) {
            prop_assert_eq!(duplicates.encode(), &*bytes);
        }
    }
}

#[test]
fn a_section_of_runs_is_as_the_essay_says_byte_by_byte() {
    let ranges = Ranges::of([0x3000..0x5000, 0x1000..0x2000]);
    let mut wanted = b"\x02\0\0\0\0\0\0\0".to_vec();
    for number in [0x1000_u64, 0x1000, 0x3000, 0x2000] {
        wanted.extend(number.to_le_bytes());
    }
    assert_eq!(ranges.encode(), wanted);
    let with = |at: usize, value: u8| {
        let mut bytes = wanted.clone();
        bytes[at] = value;
        Ranges::parse(&bytes)
    };
    assert!(with(0, 2).is_ok());
    // Too few, too many, no page, no length, touching, in the wrong order, beyond the end of everything.
    for (at, value) in [
        (0, 1),
        (0, 3),
        (3, 1),
        (4, 1),
        (8, 1),
        (17, 0),
        (25, 0x20),
        (25, 0),
    ] {
        assert!(with(at, value).is_err(), "{at} {value}");
    }
    let mut beyond = wanted.clone();
    beyond[24..32].copy_from_slice(&(u64::MAX - 0xfff).to_le_bytes());
    assert!(Ranges::parse(&beyond).is_err());
    for len in 0..wanted.len() {
        assert!(Ranges::parse(&wanted[..len]).is_err(), "{len}");
    }
}

#[test]
fn duplicates_name_pages_that_are_stored() {
    let own = Ranges::of([0..4 * PAGE, 8 * PAGE..12 * PAGE]);
    let mut of = Duplicates::default();
    for (page, source) in [(1, 0), (2, 0), (3, 9), (8, 9), (10, 11)] {
        assert!(of.push(page * PAGE, source * PAGE));
    }
    assert_eq!(of.bytes(), 5 * PAGE);
    assert_eq!(Duplicates::parse(&of.encode(), &own).unwrap(), of);
    let all: Vec<_> = of.within(0..12 * PAGE).collect();
    assert_eq!(all.len(), 5);
    // A run of pages that are the same as a run, and a part of it.
    let mut of = Duplicates::default();
    for page in [8, 9, 10] {
        assert!(of.push(page * PAGE, (page - 8) * PAGE));
    }
    assert_eq!(of.encode().len(), 8 + 24);
    let part: Vec<_> = of.within(9 * PAGE..10 * PAGE).collect();
    assert_eq!(
        (part[0].range.clone(), part[0].of),
        (9 * PAGE..10 * PAGE, PAGE)
    );
    for (page, source) in [
        // What is not there, and what is in a hole.
        (4, 0),
        (1, 4),
        (1, 12),
        // Itself, and what is a duplicate itself.
        (1, 1),
    ] {
        let mut of = Duplicates::default();
        of.push(page * PAGE, source * PAGE);
        assert!(
            Duplicates::parse(&of.encode(), &own).is_err(),
            "{page} {source}"
        );
    }
    let mut of = Duplicates::default();
    of.push(PAGE, 2 * PAGE);
    of.push(2 * PAGE, 3 * PAGE);
    assert!(Duplicates::parse(&of.encode(), &own).is_err());
}

#[test]
fn the_pieces_of_a_compressed_file_lie_behind_each_other() {
    let mut map = PageMap::of([(0, 3 << 20)]);
    let sum = |checksum| Piece { checksum };
    map.pieces = vec![sum(Some(7)), sum(None), sum(Some(9))];
    let packed = Packed {
        pieces: vec![Stored::Zstd(100), Stored::Zero, Stored::Plain(1 << 20)],
    };
    let bytes = packed.encode();
    assert_eq!(Packed::parse(&bytes, &map).unwrap(), packed);
    let offsets: Vec<_> = packed.offsets().collect();
    assert_eq!(offsets, [FIRST, FIRST + 100, FIRST + 100]);
    assert_eq!(packed.file_len(), FIRST + 100 + (1 << 20));
    // Another form, a frame as long as the piece, a piece that is none and has a checksum, one that has none and is one.
    for (at, value) in [
        (0, 2),
        (4, 1),
        (14, 0x10),
        (12, 0),
        (8, 0),
        (8, 3),
        (16, 1),
        (16, 2),
        (30, 0),
    ] {
        let mut bytes = bytes.clone();
        bytes[at] = value;
        assert!(Packed::parse(&bytes, &map).is_err(), "{at} {value}");
    }
    for len in 0..bytes.len() {
        assert!(Packed::parse(&bytes[..len], &map).is_err(), "{len}");
    }
}
