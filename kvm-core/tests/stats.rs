// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's statistics, of files made by hand: what there is is read whole, what cannot be is an error, and
//! a call that fails has changed nothing.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_bindings as kvm;
use kvm_core::Errno;
use kvm_core::fake::{FakeStat, FakeStats};
use kvm_core::stats::{
    Base, Bucket, Kind, Scale, Scaled, StatsError, StatsPart, StatsReader, StatsSchema, Unit,
};
use proptest::collection::vec;
use proptest::prelude::*;

const NANOSECONDS: u32 = kvm::KVM_STATS_UNIT_SECONDS | kvm::KVM_STATS_BASE_POW10;
// Of struct kvm_stats_header, and of the first descriptor of a fake file.
const NAME_SIZE: usize = 4;
const NUM_DESC: usize = 8;
const ID_OFFSET: usize = 12;
const DESC_OFFSET: usize = 16;
const DATA_OFFSET: usize = 20;
const FIRST: usize = 24 + 48;

fn stat(name: &str, flags: u32, exponent: i16, values: &[u64]) -> FakeStat {
    FakeStat {
        flags,
        exponent,
        values: values.to_vec(),
        ..FakeStat::counter(name, 0)
    }
}

fn linear(name: &str, bucket_size: u32, values: &[u64]) -> FakeStat {
    FakeStat {
        bucket_size,
        ..stat(name, kvm::KVM_STATS_TYPE_LINEAR_HIST, 0, values)
    }
}

/// One of each kind.
fn all_kinds() -> FakeStats {
    FakeStats::new(
        "kvm-1/vcpu-0",
        [
            FakeStat::counter("exits", 12),
            stat(
                "pages",
                kvm::KVM_STATS_TYPE_INSTANT | kvm::KVM_STATS_UNIT_BYTES | kvm::KVM_STATS_BASE_POW2,
                10,
                &[3],
            ),
            stat(
                "wait_max",
                kvm::KVM_STATS_TYPE_PEAK | NANOSECONDS,
                -9,
                &[1_500_000_000],
            ),
            linear("depth", 10, &[1, 2, 3]),
            stat(
                "wait_hist",
                kvm::KVM_STATS_TYPE_LOG_HIST | NANOSECONDS,
                -9,
                &[4, 5, 6, 7],
            ),
            stat(
                "guest_mode",
                kvm::KVM_STATS_TYPE_INSTANT | kvm::KVM_STATS_UNIT_BOOLEAN,
                0,
                &[1],
            ),
            stat(
                "cycles",
                kvm::KVM_STATS_TYPE_CUMULATIVE | kvm::KVM_STATS_UNIT_CYCLES,
                0,
                &[u64::MAX],
            ),
            stat("strange", 0xabcd_0fed, 5, &[1, 2]),
        ],
    )
}

fn open(file: &FakeStats) -> StatsReader<FakeStats> {
    StatsReader::open(file).unwrap()
}

/// The file with these bytes in place of its own.
fn spoilt(at: usize, bytes: &[u8]) -> FakeStats {
    let mut file = all_kinds().bytes();
    file[at..at + bytes.len()].copy_from_slice(bytes);
    FakeStats::from_bytes(file)
}

#[test]
fn every_kind_unit_and_base_is_read_and_unknown_ones_are_kept_as_numbers() {
    let reader = open(&all_kinds());
    let schema = reader.schema();
    assert_eq!((schema.id(), schema.flags()), ("kvm-1/vcpu-0", 0));
    let seen: Vec<_> = schema
        .statistics()
        .iter()
        .map(|s| (s.name(), s.kind(), s.scale(), s.values(), s.bucket_size()))
        .collect();
    let scale = |unit, base, exponent| Scale {
        unit,
        base,
        exponent,
    };
    let things = scale(Unit::None, Base::Ten, 0);
    let ns = scale(Unit::Seconds, Base::Ten, -9);
    assert_eq!(
        seen,
        [
            ("exits", Kind::Cumulative, things, 1, 0),
            (
                "pages",
                Kind::Instant,
                scale(Unit::Bytes, Base::Two, 10),
                1,
                0
            ),
            ("wait_max", Kind::Peak, ns, 1, 0),
            ("depth", Kind::LinearHistogram, things, 3, 10),
            ("wait_hist", Kind::LogHistogram, ns, 4, 0),
            (
                "guest_mode",
                Kind::Instant,
                scale(Unit::Boolean, Base::Ten, 0),
                1,
                0
            ),
            (
                "cycles",
                Kind::Cumulative,
                scale(Unit::Cycles, Base::Ten, 0),
                1,
                0
            ),
            (
                "strange",
                Kind::Other(0xd),
                scale(Unit::Other(0xe), Base::Other(0xf), 5),
                2,
                0
            ),
        ]
    );
    assert_eq!(schema.statistics()[7].flags(), 0xabcd_0fed);
}

#[test]
fn numbers_are_found_by_index_by_name_and_in_order() {
    let reader = open(&all_kinds());
    let sample = reader.latest();
    assert_eq!(sample.get(0).unwrap().number(), Some(12));
    assert_eq!(sample.named("cycles").unwrap().number(), Some(u64::MAX));
    assert_eq!(reader.schema().index_of("cycles"), Some(6));
    assert!(sample.get(8).is_none() && sample.named("exit").is_none());
    assert_eq!(sample.iter().len(), 8);
    let numbers: Vec<_> = sample.iter().map(|v| v.number()).collect();
    // Histograms, and what has several numbers, have no one number.
    let expected = [
        Some(12),
        Some(3),
        Some(1_500_000_000),
        None,
        None,
        Some(1),
        Some(u64::MAX),
        None,
    ];
    assert_eq!(numbers, expected);
    let strange: Vec<_> = sample.named("strange").unwrap().numbers().collect();
    assert_eq!(strange, [1, 2]);
    assert_eq!(sample.named("strange").unwrap().buckets().count(), 0);
}

#[test]
fn a_scaled_number_is_exact_and_says_its_unit() {
    let reader = open(&all_kinds());
    let scaled = |name| reader.latest().named(name).unwrap().scaled().unwrap();
    assert_eq!(scaled("wait_max").mantissa, 1_500_000_000);
    assert_eq!(scaled("wait_max").as_f64(), Some(1.5));
    assert_eq!(scaled("wait_max").to_string(), "1500000000 ns");
    assert_eq!(scaled("pages").as_f64(), Some(3072.0));
    assert_eq!(scaled("pages").to_string(), "3 KiB");
    assert_eq!(scaled("exits").to_string(), "12");
    assert_eq!(scaled("guest_mode").to_string(), "1");
    let of = |unit, base, exponent, mantissa| Scaled {
        mantissa,
        scale: Scale {
            unit,
            base,
            exponent,
        },
    };
    // A tenth is the double nearest to it.
    assert_eq!(of(Unit::Seconds, Base::Ten, -1, 1).as_f64(), Some(0.1));
    assert_eq!(of(Unit::Seconds, Base::Ten, -9, -7).to_string(), "-7 ns");
    assert_eq!(of(Unit::Seconds, Base::Ten, -7, 3).to_string(), "3×10^-7 s");
    assert_eq!(of(Unit::None, Base::Two, 4, 3).to_string(), "3×2^4");
    assert_eq!(of(Unit::Cycles, Base::Two, 0, 3).to_string(), "3 cycles");
    assert_eq!(of(Unit::Bytes, Base::Other(9), 1, 3).as_f64(), None);
    assert_eq!(of(Unit::Bytes, Base::Other(9), 0, 3).as_f64(), Some(3.0));
    for base in [Base::Ten, Base::Two] {
        assert_eq!(of(Unit::None, base, i16::MAX, 0).as_f64(), Some(0.0));
        assert_eq!(of(Unit::None, base, i16::MIN, 1).as_f64(), Some(0.0));
        let huge = of(Unit::None, base, i16::MAX, -1).as_f64();
        assert_eq!(huge, Some(f64::NEG_INFINITY));
    }
}

#[test]
fn buckets_have_the_documented_ranges() {
    let reader = open(&all_kinds());
    let buckets = |name| -> Vec<_> { reader.latest().named(name).unwrap().buckets().collect() };
    let bucket = |start, end, count| Bucket { start, end, count };
    assert_eq!(
        buckets("depth"),
        [
            bucket(0, Some(10), 1),
            bucket(10, Some(20), 2),
            bucket(20, None, 3)
        ]
    );
    assert_eq!(
        buckets("wait_hist"),
        [
            bucket(0, Some(1), 4),
            bucket(1, Some(2), 5),
            bucket(2, Some(4), 6),
            bucket(4, None, 7)
        ]
    );
    assert_eq!(buckets("exits"), []);
}

#[test]
fn histograms_of_impossible_shape_lose_their_ranges_and_keep_their_numbers() {
    let log = kvm::KVM_STATS_TYPE_LOG_HIST;
    let file = FakeStats::new(
        "",
        [
            linear("no width", 0, &[1, 2]),
            stat("no bucket", log, 0, &[]),
            stat("one bucket", log, 0, &[9]),
            stat("too many", log, 0, &[1; 70]),
            linear("widest", u32::MAX, &vec![0; usize::from(u16::MAX)]),
            stat("no number", 0, 0, &[]),
        ],
    );
    let reader = open(&file);
    let of = |name| reader.latest().named(name).unwrap();
    assert_eq!(of("no width").buckets().count(), 0);
    assert_eq!(of("no width").numbers().collect::<Vec<_>>(), [1, 2]);
    assert_eq!(of("no bucket").buckets().count(), 0);
    let one: Vec<_> = of("one bucket").buckets().collect();
    assert_eq!(
        one,
        [Bucket {
            start: 0,
            end: None,
            count: 9
        }]
    );
    assert_eq!(of("one bucket").number(), None);
    let many: Vec<_> = of("too many").buckets().collect();
    assert_eq!(many.len(), 65);
    assert_eq!((many[63].start, many[63].end), (1 << 62, Some(1 << 63)));
    assert_eq!((many[64].start, many[64].end), (1 << 63, None));
    assert_eq!(of("too many").numbers().len(), 70);
    let widest = of("widest").buckets().last().unwrap();
    let start = u64::from(u32::MAX) * u64::from(u16::MAX - 1);
    assert_eq!((widest.start, widest.end), (start, None));
    assert_eq!(of("no number").number(), None);
    assert!(of("no number").is_zero());
}

#[test]
fn two_samples_have_exact_differences() {
    let file = all_kinds();
    let mut reader = open(&file);
    let before = reader.latest().clone();
    assert!(before.since(&before).unwrap().iter().all(|c| c.is_zero()));

    file.set("exits", &[u64::MAX]);
    file.set("pages", &[1]);
    file.set("cycles", &[0]);
    file.set("wait_hist", &[4, 6, 6, 9]);
    let now = reader.sample().unwrap();
    let changes = now.since(&before).unwrap();
    let number = |name| changes.named(name).unwrap().number();
    assert_eq!(number("exits"), Some(i128::from(u64::MAX) - 12));
    assert_eq!(number("pages"), Some(-2));
    assert_eq!(number("cycles"), Some(-i128::from(u64::MAX)));
    assert_eq!(number("wait_hist"), None);
    let pages = changes.named("pages").unwrap().scaled().unwrap();
    assert_eq!(
        (pages.as_f64(), pages.to_string()),
        (Some(-2048.0), "-2 KiB".into())
    );
    let waits = changes.named("wait_hist").unwrap();
    let counts: Vec<_> = waits.buckets().map(|b| b.count).collect();
    assert_eq!(counts, [0, 1, 0, 2]);
    let changed: Vec<_> = changes
        .iter()
        .filter(|c| !c.is_zero())
        .map(|c| c.statistic().name())
        .collect();
    assert_eq!(changed, ["exits", "pages", "wait_hist", "cycles"]);
    assert!(changes.get(8).is_none() && changes.named("none").is_none());
}

#[test]
fn samples_of_the_same_statistics_compare_and_others_are_refused() {
    let one = open(&FakeStats::new(
        "kvm-1/vcpu-0",
        [FakeStat::counter("exits", 1)],
    ));
    let two = open(&FakeStats::new(
        "kvm-1/vcpu-1",
        [FakeStat::counter("exits", 5)],
    ));
    let more = two.latest().since(one.latest()).unwrap();
    assert_eq!(more.get(0).unwrap().number(), Some(4));
    let vm = open(&FakeStats::new("kvm-1", [FakeStat::counter("pages", 5)]));
    let refused = vm.latest().since(one.latest());
    assert_eq!(refused.unwrap_err(), StatsError::OtherStatistics);
    let mut copy = vm.latest().clone();
    copy.clone_from(one.latest());
    assert_eq!(copy.named("exits").unwrap().number(), Some(1));
}

#[test]
fn a_file_cut_at_any_length_is_an_error_that_says_which_part() {
    let whole = all_kinds().bytes();
    let descriptors = FIRST + 8 * (16 + 48);
    for len in 0..whole.len() {
        let part = match len {
            0..24 => StatsPart::Header,
            24..FIRST => StatsPart::Id,
            _ if len < descriptors => StatsPart::Descriptors,
            _ => StatsPart::Data,
        };
        let file = FakeStats::from_bytes(whole[..len].to_vec());
        match StatsReader::open(&file).unwrap_err() {
            StatsError::Truncated {
                part: cut,
                wanted,
                got,
            } => {
                assert_eq!(cut, part, "{len}");
                assert!(got < wanted);
            }
            other => panic!("{len}: {other}"),
        }
    }
    assert!(StatsReader::open(&FakeStats::from_bytes(whole)).is_ok());
}

#[test]
fn offsets_and_sizes_that_overflow_are_errors_and_allocate_nothing_much() {
    let max = u32::MAX.to_ne_bytes();
    let error = |file: FakeStats| StatsReader::open(&file).unwrap_err();
    let too_large = |part, bytes| StatsError::TooLarge { part, bytes };
    assert_eq!(
        error(spoilt(NAME_SIZE, &max)),
        too_large(StatsPart::Id, u64::from(u32::MAX))
    );
    assert_eq!(
        error(spoilt(NUM_DESC, &max)),
        too_large(StatsPart::Descriptors, u64::from(u32::MAX) * 64)
    );
    // Both at once are beyond 64 bits; the name is refused before they are multiplied.
    let mut both = max.to_vec();
    both.extend(max);
    assert!(matches!(
        error(spoilt(NAME_SIZE, &both)),
        StatsError::TooLarge { .. }
    ));
    for (at, part) in [
        (ID_OFFSET, StatsPart::Id),
        (DESC_OFFSET, StatsPart::Descriptors),
        (DATA_OFFSET, StatsPart::Data),
    ] {
        match error(spoilt(at, &max)) {
            StatsError::Truncated {
                part: cut, got: 0, ..
            } => assert_eq!(cut, part),
            other => panic!("{other}"),
        }
    }
    // A statistic's own offset, and its number of values.
    assert_eq!(
        error(spoilt(FIRST + 8, &max)),
        too_large(StatsPart::Data, u64::from(u32::MAX) + 8)
    );
    assert!(matches!(
        error(spoilt(FIRST + 6, &u16::MAX.to_ne_bytes())),
        StatsError::Truncated {
            part: StatsPart::Data,
            wanted: 524_280,
            ..
        }
    ));
    let limit = StatsSchema::LIMIT.to_string();
    let text = error(spoilt(NUM_DESC, &max)).to_string();
    assert!(
        text.contains("descriptors") && text.contains(&limit),
        "{text}"
    );
}

#[test]
fn odd_names_are_names_and_an_odd_place_is_a_place() {
    let name = |name: &[u8]| FakeStat {
        name: name.to_vec(),
        ..FakeStat::counter("", 7)
    };
    let long = [b'n'; 60];
    let file = FakeStats::new(
        "no NUL at the end of an id of forty-eight bytes .",
        [name(&long), name(b""), name(b"a\xffb"), name(b"a\0rest")],
    );
    let reader = open(&file);
    assert_eq!(
        reader.schema().id(),
        "no NUL at the end of an id of forty-eight bytes "
    );
    let names: Vec<_> = reader
        .schema()
        .statistics()
        .iter()
        .map(|s| s.name())
        .collect();
    assert_eq!(
        names,
        [
            std::str::from_utf8(&long[..48]).unwrap(),
            "",
            "a\u{fffd}b",
            "a"
        ]
    );
    assert!(reader.latest().iter().all(|v| v.number() == Some(7)));

    // Names without room, and no statistics at all.
    let mut bare = vec![0; 24];
    bare[NUM_DESC] = 1;
    bare[DESC_OFFSET] = 24;
    bare[DATA_OFFSET] = 40;
    bare.extend([0, 0, 0, 0, 0, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    // Its number is at byte 3 of the data.
    bare.extend([9, 9, 9, 2, 1, 0, 0, 0, 0, 0, 0]);
    let reader = open(&FakeStats::from_bytes(bare));
    assert_eq!(reader.latest().named("").unwrap().number(), Some(0x102));
    let reader = open(&FakeStats::new("empty", []));
    assert_eq!(reader.latest().iter().len(), 0);
    assert_eq!(reader.schema().data_len(), 0);
}

#[test]
fn a_host_without_statistics_says_so_and_other_errnos_are_told() {
    for errno in [libc::ENOTTY, libc::EINVAL] {
        let error = StatsReader::open(&all_kinds().open_fails(errno)).unwrap_err();
        assert_eq!(error, StatsError::Unsupported);
        assert!(error.to_string().contains("KVM_CAP_BINARY_STATS_FD"));
    }
    for errno in [libc::EMFILE, libc::ENOMEM, libc::EIO] {
        let error = StatsReader::open(&all_kinds().open_fails(errno)).unwrap_err();
        let told = StatsError::Open {
            errno: Errno::new(errno),
        };
        assert_eq!(error, told);
    }
}

#[test]
fn an_errno_at_each_read_is_told_and_a_sample_that_fails_changes_nothing() {
    let parts = [
        StatsPart::Header,
        StatsPart::Id,
        StatsPart::Descriptors,
        StatsPart::Data,
    ];
    for (reads, part) in parts.into_iter().enumerate() {
        let file = all_kinds();
        file.reads_fail_after(reads, libc::EFAULT);
        let errno = Errno::new(libc::EFAULT);
        let error = StatsReader::open(&file).unwrap_err();
        assert_eq!(error, StatsError::Read { part, errno });
        assert!(error.to_string().contains(&part.to_string()));
    }
    let file = all_kinds();
    let mut reader = open(&file);
    assert_eq!(file.reads(), parts.len());
    let before = reader.latest().clone();
    file.set("exits", &[99]);
    file.reads_fail_after(0, libc::EIO);
    assert!(matches!(reader.sample(), Err(StatsError::Read { .. })));
    let same = |reader: &StatsReader<FakeStats>| {
        let changes = reader.latest().since(&before).unwrap();
        changes.iter().all(|c| c.is_zero())
    };
    assert!(same(&reader));
    // One that tears in the middle of the numbers has overwritten none of the latest.
    file.reads_fail_after(usize::MAX, 0);
    file.cut(file.bytes().len() - 8);
    assert!(matches!(reader.sample(), Err(StatsError::Truncated { .. })));
    assert!(same(&reader));
}

#[test]
fn a_sample_is_one_read() {
    let file = all_kinds();
    let mut reader = open(&file);
    for _ in 0..10 {
        let before = file.reads();
        reader.sample().unwrap();
        assert_eq!(file.reads(), before + 1);
    }
}

#[test]
fn a_reader_can_be_sent_and_its_samples_shared() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    send::<StatsReader<FakeStats>>();
    sync::<kvm_core::stats::Sample>();
    #[cfg(feature = "kvm")]
    send::<StatsReader<kvm_core::stats::StatsFd>>();
}

/// Everything that can be asked of a reader; nothing of it may panic.
fn walk(reader: &mut StatsReader<FakeStats>) {
    let before = reader.latest().clone();
    let Ok(now) = reader.sample() else { return };
    for (index, value) in now.iter().enumerate() {
        let statistic = value.statistic();
        let _ = (format!("{statistic:?}"), statistic.kind());
        let _ = value.scaled().map(|s| (s.to_string(), s.as_f64()));
        assert_eq!(value.numbers().len(), usize::from(statistic.values()));
        assert!(value.buckets().count() <= usize::from(statistic.values()));
        assert_eq!(
            now.get(index).unwrap().is_zero(),
            value.numbers().all(|n| n == 0)
        );
        let _ = statistic.bucket_range(usize::MAX);
    }
    let changes = now.since(&before).unwrap();
    assert!(changes.iter().all(|change| change.is_zero()));
    assert!(changes.iter().all(|c| c.buckets().all(|b| b.count == 0)));
}

fn any_stat() -> impl Strategy<Value = FakeStat> {
    (
        "[a-z_]{1,47}",
        any::<u32>(),
        any::<i16>(),
        any::<u32>(),
        vec(any::<u64>(), 0..70),
    )
        .prop_map(|(name, flags, exponent, bucket_size, values)| FakeStat {
            name: name.into(),
            flags,
            exponent,
            bucket_size,
            values,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn what_is_in_the_file_is_what_is_read(stats in vec(any_stat(), 0..20)) {
        let file = FakeStats::new("kvm-1", stats.clone());
        let mut reader = open(&file);
        prop_assert_eq!(reader.latest().iter().len(), stats.len());
        for (value, stat) in reader.latest().iter().zip(&stats) {
            let read = value.statistic();
            prop_assert_eq!(read.name().as_bytes(), &stat.name);
            prop_assert_eq!((read.flags(), read.scale().exponent), (stat.flags, stat.exponent));
            prop_assert_eq!(read.bucket_size(), stat.bucket_size);
            prop_assert_eq!(value.numbers().collect::<Vec<_>>(), stat.values.clone());
            // Ranges begin at 0, leave no gap, and only the last has no end.
            let buckets: Vec<_> = value.buckets().collect();
            let mut next = Some(0);
            for bucket in &buckets {
                prop_assert_eq!(next, Some(bucket.start));
                next = bucket.end;
            }
            prop_assert!(buckets.is_empty() || next.is_none());
        }
        walk(&mut reader);
    }

    #[test]
    fn a_spoilt_file_is_read_or_is_an_error(
        spots in vec((0_usize..900, any::<u8>()), 1..8),
        len in 0_usize..2000,
    ) {
        let mut bytes = all_kinds().bytes();
        for (at, byte) in spots {
            if let Some(slot) = bytes.get_mut(at) {
                *slot = byte;
            }
        }
        bytes.truncate(len);
        match StatsReader::open(&FakeStats::from_bytes(bytes)) {
            Ok(mut reader) => walk(&mut reader),
            Err(error) => drop(error.to_string()),
        }
    }

    #[test]
    fn any_bytes_are_read_or_are_an_error(
        words in vec(prop_oneof![0_u32..200, any::<u32>()], 6),
        tail in vec(any::<u8>(), 0..2000),
    ) {
        let mut bytes: Vec<_> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(tail);
        match StatsReader::open(&FakeStats::from_bytes(bytes)) {
            Ok(mut reader) => walk(&mut reader),
            Err(error) => drop(error.to_string()),
        }
    }
}
