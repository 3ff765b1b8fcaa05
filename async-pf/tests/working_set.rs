// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A working set is the order of first touch, comes back from its file as it was or is refused, and is read ahead with
//! every page once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Barrier;
use std::time::Duration;

use async_pf::working_set::{
    FileError, HeatMap, HoldOut, PlanLimits, RecordError, Recorder, Refresh, RefreshPolicy,
    ReplayPlan, Usage, WorkingSet,
};
use memslots::Gfn;
use proptest::prelude::*;

const SNAPSHOT: [u8; 16] = *b"a snapshot's id.";

fn record(touches: impl IntoIterator<Item = (u64, u64)>) -> WorkingSet {
    let recorder = Recorder::new(Gfn(0x100), 4096, 4096, SNAPSHOT).unwrap();
    for (gfn, millis) in touches {
        recorder.touch_at(Gfn(gfn), Duration::from_millis(millis));
    }
    recorder.finish()
}

fn some_record() -> impl Strategy<Value = WorkingSet> {
    let touch = (0x100u64..0x300, 0u64..3, 1u64..6);
    proptest::collection::vec(touch, 0..60).prop_map(|touches| {
        let mut millis = 0;
        record(touches.into_iter().flat_map(|(gfn, wait, pages)| {
            millis += wait * wait * 40;
            (gfn..gfn + pages).map(move |gfn| (gfn, millis))
        }))
    })
}

/// The header's checksum made right again, so that what is behind it is looked at.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = crc32fast::hash(&bytes[..60]).to_le_bytes();
    bytes[60..64].copy_from_slice(&checksum);
    let end = bytes.len() - 4;
    let checksum = crc32fast::hash(&bytes[64..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&checksum);
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_record_is_the_order_of_first_touch(
        touches in proptest::collection::vec(0xf0u64..0x180, 0..200), most in 0usize..80,
    ) {
        let recorder = Recorder::new(Gfn(0x100), 0x40, most, SNAPSHOT).unwrap();
        let mut order = Vec::new();
        for gfn in touches {
            let first = (0x100..0x140).contains(&gfn) && !order.contains(&gfn);
            prop_assert_eq!(recorder.touch(Gfn(gfn)), first);
            if first {
                order.push(gfn);
            }
        }
        let lost = order.len().saturating_sub(most);
        order.truncate(most);
        prop_assert_eq!(recorder.noted(), order.len());
        let record = recorder.finish();
        prop_assert_eq!(record.order().map(|gfn| gfn.0).collect::<Vec<_>>(), order);
        prop_assert_eq!(record.lost(), lost as u64);
    }

    #[test]
    fn a_record_comes_back_as_it_was(record in some_record()) {
        let bytes = record.encode();
        prop_assert_eq!(WorkingSet::decode(&bytes).unwrap(), record.clone());
        // A few bytes a page, also where no two are neighbours.
        prop_assert!(bytes.len() <= 68 + record.runs().len() * 6);
    }

    #[test]
    fn bytes_that_were_changed_are_refused(
        record in some_record(), at: prop::sample::Index, flip in 1u8..=255,
    ) {
        let mut bytes = record.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        prop_assert!(WorkingSet::decode(&bytes).is_err());
    }

    #[test]
    fn bytes_that_were_cut_or_grew_are_refused(
        record in some_record(), at: prop::sample::Index, more in 1usize..9,
    ) {
        let mut bytes = record.encode();
        prop_assert!(WorkingSet::decode(&bytes[..at.index(bytes.len())]).is_err());
        bytes.extend(vec![0; more]);
        prop_assert!(WorkingSet::decode(&bytes).is_err());
    }

    /// Checksums are right, contents are not: what is accepted is as good as recorded.
    #[test]
    fn whatever_is_accepted_is_a_record(
        record in some_record(), changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = record.encode();
        for (at, byte) in changes {
            // Behind the version: anything but the checksums.
            let at = 12 + at.index(bytes.len() - 16);
            bytes[at] = byte;
        }
        if let Ok(accepted) = WorkingSet::decode(&sealed(bytes.clone())) {
            let span = accepted.first().0..accepted.first().0 + accepted.pages();
            let mut seen = BTreeSet::new();
            let mut after = Duration::ZERO;
            for run in accepted.runs() {
                prop_assert!(run.pages > 0 && run.after >= after);
                after = run.after;
                for gfn in (run.first.0..run.first.0 + run.pages).take(10_000) {
                    prop_assert!(span.contains(&gfn) && seen.insert(gfn));
                }
            }
            prop_assert_eq!(accepted.encode(), sealed(bytes), "a record has one form");
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        WorkingSet::decode(&bytes).ok();
        let mut headed = record([]).encode();
        headed.splice(64..64, bytes.iter().copied());
        let size = (bytes.len() as u32).to_le_bytes();
        headed[56..60].copy_from_slice(&size);
        headed[8..12].copy_from_slice(&1u32.to_le_bytes());
        WorkingSet::decode(&sealed(headed)).ok();
    }

    #[test]
    fn a_plan_reads_each_wanted_page_once_and_in_its_batch(
        record in some_record(), batch in 0u64..40, gap in 0u64..9, read in 0u64..20, one_in in 0u32..9,
    ) {
        let hold_out = HoldOut::one_in(one_in, 3);
        let limits = PlanLimits { batch, gap, read, hold_out };
        let plan = ReplayPlan::new(&record, limits);
        let wanted: BTreeSet<u64> = record.order().filter(|gfn| !hold_out.has(*gfn)).map(|gfn| gfn.0).collect();
        let mut read_at = BTreeMap::new();
        for (at, one) in plan.reads().iter().enumerate() {
            prop_assert!(one.pages <= read.max(1));
            let recorded = one.range().filter(|gfn| wanted.contains(gfn)).count() as u64;
            prop_assert!(one.wanted <= recorded, "{:?}", one);
            prop_assert!(wanted.contains(&one.first.0), "a read begins with a wanted page");
            for gfn in one.range() {
                prop_assert!(read_at.insert(gfn, at).is_none(), "{:#x} is read twice", gfn);
                prop_assert!(!hold_out.has(Gfn(gfn)));
            }
        }
        prop_assert!(wanted.iter().all(|gfn| read_at.contains_key(gfn)));
        prop_assert_eq!(plan.total(), read_at.len() as u64);

        // A page may come before its batch, with a gap; never after it.
        let order: Vec<u64> = record.order().filter(|gfn| !hold_out.has(*gfn)).map(|gfn| gfn.0).collect();
        for (number, pages) in order.chunks(batch.max(1) as usize).enumerate() {
            for gfn in pages {
                prop_assert!(plan.reads()[read_at[gfn]].batch <= number as u32);
            }
        }
        for pair in plan.reads().windows(2) {
            prop_assert!(pair[0].batch < pair[1].batch
                || pair[0].batch == pair[1].batch && pair[0].range().end <= pair[1].first.0, "sorted");
        }
    }

    #[test]
    fn a_record_with_what_was_missed_has_both(one in some_record(), other in some_record()) {
        let both = one.with_missed(&other);
        let mut order: Vec<Gfn> = one.order().collect();
        order.extend(other.order().filter(|gfn| !order.contains(gfn)).collect::<Vec<_>>());
        prop_assert_eq!(both.order().collect::<Vec<_>>(), order);
        prop_assert_eq!(WorkingSet::decode(&both.encode()).unwrap(), both);
    }

    #[test]
    fn a_part_of_a_record_has_what_was_touched_by_then(record in some_record(), millis in 0u64..2000) {
        let until = Duration::from_millis(millis);
        let part = record.until(until);
        let runs: Vec<_> = record.runs().iter().filter(|run| run.after <= until).copied().collect();
        prop_assert_eq!(part.runs(), &runs);
        prop_assert_eq!(WorkingSet::decode(&part.encode()).unwrap(), part);
    }

    #[test]
    fn a_heat_map_has_each_cell_once(record in some_record(), columns in 0usize..70, rows in 0usize..40) {
        let map = HeatMap::new(&record, columns, rows);
        let (text, svg) = (map.to_text(), map.to_svg());
        let hot = text.lines().skip(1).flat_map(|line| line.split(' ').nth(1).unwrap().chars());
        let hot = hot.filter(|cell| *cell != '.').count();
        prop_assert_eq!(svg.matches("<title>").count(), hot);
        prop_assert_eq!(hot == 0, record.touched() == 0);
    }
}

#[test]
fn threads_that_touch_at_once_are_each_in_the_record_once() {
    let recorder = Recorder::new(Gfn(0), 10_000, 10_000, SNAPSHOT).unwrap();
    let barrier = Barrier::new(4);
    let firsts: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4u64)
            .map(|thread| {
                let (recorder, barrier) = (&recorder, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    let order = (0..10_000u64).map(|page| (page * 1_597 + thread * 13) % 10_000);
                    order.filter(|page| recorder.touch(Gfn(*page))).count()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert_eq!(firsts, 10_000);
    let record = recorder.finish();
    let mut order: Vec<u64> = record.order().map(|gfn| gfn.0).collect();
    order.sort_unstable();
    assert!(order.into_iter().eq(0..10_000));
    WorkingSet::decode(&record.encode()).unwrap();
}

#[test]
fn what_cannot_be_watched_is_refused() {
    for (first, pages) in [(0, 0), (0, (1 << 32) + 1), (1 << 52, 1), (u64::MAX, 2)] {
        assert_eq!(
            Recorder::new(Gfn(first), pages, 1, SNAPSHOT).unwrap_err(),
            RecordError::Span { first, pages }
        );
    }
}

#[test]
fn each_thing_that_is_wrong_is_named() {
    let good = record([(0x100, 0), (0x110, 1)]).encode();
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let refused = |bytes: Vec<u8>| WorkingSet::decode(&bytes).unwrap_err();
    assert!(matches!(refused(with(0, b"PNG")), RecordError::Magic(_)));
    assert_eq!(refused(with(8, &[2])), RecordError::Version(2));
    assert!(matches!(
        refused(with(20, &[1])),
        RecordError::Checksum { what: "header", .. }
    ));
    assert!(matches!(
        refused(with(66, &[9])),
        RecordError::Checksum { .. }
    ));
    assert!(matches!(
        refused(Vec::new()),
        RecordError::Length { got: 0, .. }
    ));
    let run = |bytes, number| match refused(sealed(bytes)) {
        RecordError::Run { run, .. } => assert_eq!(run, number),
        other => panic!("{other}"),
    };
    // A run outside, a page twice, more runs than bytes could be, fewer runs than there are.
    run(with(64, &[1]), 0);
    run(with(67, &[1, 0, 1]), 1);
    run(with(12, &u32::MAX.to_le_bytes()), u32::MAX);
    run(with(12, &1u32.to_le_bytes()), 1);
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("working-set");
    let (old, new) = (record([(0x100, 0)]), record([(0x100, 0), (0x155, 7)]));
    old.save(&path).unwrap();
    // What a crash left.
    std::fs::write(folder.path().join(".working-set.partial"), "half").unwrap();
    new.save(&path).unwrap();
    assert_eq!(WorkingSet::load_of(&path, SNAPSHOT).unwrap(), new);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    // Something is in the way of the partial file: the old one stays.
    std::fs::create_dir(folder.path().join(".working-set.partial")).unwrap();
    let error = old.save(&path).unwrap_err();
    assert!(
        matches!(error, FileError::Call { call: "remove", .. }),
        "{error}"
    );
    assert_eq!(WorkingSet::load(&path).unwrap(), new);
}

#[test]
fn what_is_no_record_is_not_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("working-set");
    assert!(matches!(
        WorkingSet::load(&path),
        Err(FileError::Call { call: "open", .. })
    ));
    assert!(matches!(
        WorkingSet::load(folder.path()),
        Err(FileError::NotAFile(_))
    ));
    assert!(matches!(
        record([]).save("..".as_ref()),
        Err(FileError::Name(_))
    ));
    record([]).save(&path).unwrap();
    assert!(matches!(
        WorkingSet::load_of(&path, [0; 16]),
        Err(FileError::OtherSnapshot(_))
    ));
    // Longer than any record, and mostly a hole: refused by its size, not read.
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let error = WorkingSet::load(&path).unwrap_err();
    assert!(
        matches!(
            error,
            FileError::Record {
                source: RecordError::TooLong {
                    bytes: 0x100_0000_0000
                },
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_record_that_is_used_is_kept_and_an_old_one_recorded_again() {
    let old = record((0x100..0x900).map(|gfn| (gfn, 0)));
    let limits = PlanLimits {
        hold_out: HoldOut::one_in(8, 1),
        ..PlanLimits::default()
    };
    let plan = ReplayPlan::new(&old, limits);
    // A guest that touches these faults on those of them that were not read ahead.
    let restore = |wanted: &mut dyn Iterator<Item = u64>| {
        let ahead: BTreeSet<Gfn> = plan.pages().collect();
        let faulted = record(
            wanted
                .filter(|gfn| !ahead.contains(&Gfn(*gfn)))
                .map(|gfn| (gfn, 0)),
        );
        Usage::compare(&old, &plan, &faulted)
    };
    let policy = RefreshPolicy::default();

    let same = restore(&mut (0x100..0x900));
    assert_eq!(same.used_share(), Some(1.0));
    assert_eq!(
        (same.missed, same.late, policy.judge(&same)),
        (0, 0, Refresh::Keep)
    );

    let half = restore(&mut (0x100..0x500));
    let share = half.used_share().unwrap();
    assert!(
        (0.35..0.65).contains(&share),
        "the sample says {share}, the truth is 0.5"
    );

    let other = restore(&mut (0x800..0xc00));
    assert_eq!(policy.judge(&other), Refresh::Record);
    let more = restore(&mut (0x100..0xf00));
    assert_eq!((more.missed, policy.judge(&more)), (0x600, Refresh::Extend));
    assert!(more.missed_share().unwrap() > 0.4);

    let blind = ReplayPlan::new(
        &old,
        PlanLimits {
            hold_out: HoldOut::NONE,
            ..limits
        },
    );
    let unknown = Usage::compare(&old, &blind, &record([]));
    assert_eq!(
        (unknown.used_share(), policy.judge(&unknown)),
        (None, Refresh::Keep)
    );
}

#[test]
fn a_picture_needs_nothing_beside_it() {
    let map = HeatMap::new(&record([(0x100, 0), (0x101, 0), (0x900, 15)]), 16, 16);
    let svg = map.to_svg();
    assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
    assert!(!svg.contains("href") && !svg.contains("url("));
    assert!(
        svg.contains("<title>0x100000: 2 of 16 pages, first after 0 ms</title>"),
        "{svg}"
    );
    assert!(
        map.to_text()
            .lines()
            .nth(1)
            .unwrap()
            .ends_with("0...............")
    );
    // What a character is, and how much: 16 pages.
    let legend = map.legend();
    let begin = "a character is 64 KiB of guest memory, a line 1 MiB from the address";
    assert!(legend.starts_with(begin), "{legend}");
    for meant in ["\n0 to 9  touched", "\n.       not touched"] {
        assert!(legend.contains(meant), "{legend}");
    }
}
