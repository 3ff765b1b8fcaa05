// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files of a snapshot as bytes: what was written is read back, and any other bytes are refused with what is wrong.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use proptest::prelude::*;
use reference_vmm::snapshot::format::{
    FormatError, Kind, MAGIC, SnapshotId, VERSION, checksum, encode, parse,
};
use reference_vmm::snapshot::machine::{MachineState, StateError};
use reference_vmm::snapshot::pages::{
    self, ALIGN, HeaderError, PAGE, PageMap, Piece, check_header, header,
};

const ID: SnapshotId = SnapshotId(*b"0123456789abcdef");

fn small() -> Vec<u8> {
    let sections = [
        (Kind::Config, b"{}".to_vec()),
        (Kind::Vcpus, Vec::new()),
        (Kind::Memory, vec![7; 100]),
    ];
    encode(ID, &sections)
}

/// With its checksums made right again, so that what is behind them is met.
fn sealed(mut file: Vec<u8>) -> Vec<u8> {
    let count = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let end = (48 + 32 * count).min(file.len());
    let sum = checksum(&file[48..end]);
    file[40..44].copy_from_slice(&sum.to_le_bytes());
    let sum = checksum(&file[..44]);
    file[44..48].copy_from_slice(&sum.to_le_bytes());
    file
}

#[test]
fn a_file_is_as_the_essay_says_byte_by_byte() {
    let file = encode(ID, &[(Kind::Vm, b"ab".to_vec())]);
    let mut wanted =
        b"\x89RVMS\r\n\x1a\x01\0\0\0\x01\0\0\x000123456789abcdef\x52\0\0\0\0\0\0\0".to_vec();
    let mut table = b"\x02\0\0\0\0\0\0\0\x50\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
    // CRC-32 of "ab", from any other tool.
    table.extend(0x9e83_486d_u32.to_le_bytes());
    table.extend([0; 4]);
    wanted.extend(checksum(&table).to_le_bytes());
    wanted.extend(checksum(&wanted).to_le_bytes());
    wanted.extend(table);
    wanted.extend(b"ab");
    assert_eq!(file, wanted);
}

#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let file = small();
    for len in 0..file.len() {
        let error = parse(&file[..len]).unwrap_err();
        match len {
            0 => assert_eq!(error, FormatError::Empty),
            1..8 => assert_eq!(error, FormatError::Magic(file[..len].to_vec())),
            8..48 => assert_eq!(error, FormatError::Short(len as u64), "{len}"),
            _ => {
                let says = file.len() as u64;
                let has = len as u64;
                assert_eq!(error, FormatError::Length { has, says });
            }
        }
    }
    let mut longer = file.clone();
    longer.push(0);
    assert!(matches!(parse(&longer), Err(FormatError::Length { .. })));
}

#[test]
fn one_bit_that_is_another_one_is_found_anywhere() {
    let file = small();
    for bit in 0..8 * file.len() {
        let mut damaged = file.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let error = parse(&damaged).unwrap_err();
        let expected = match bit / 8 {
            0..8 => matches!(error, FormatError::Magic(_)),
            8..12 => matches!(error, FormatError::Version(_)),
            _ => matches!(error, FormatError::Checksum { .. }),
        };
        assert!(expected, "bit {bit}: {error}");
    }
}

#[test]
fn a_foreign_and_a_newer_file_are_told_with_what_they_say() {
    let error = parse(b"\x7fELF\x02\x01\x01\0").unwrap_err().to_string();
    assert!(error.contains("7f 45 4c 46"), "{error}");
    let mut newer = small();
    newer[8] = 2;
    let error = parse(&newer).unwrap_err();
    assert_eq!(error, FormatError::Version(2));
    let text = error.to_string();
    assert!(text.contains(&format!("version {VERSION}")), "{text}");
    // Line ends that a transfer as text has changed.
    let mut text = small();
    text.remove(5);
    assert!(matches!(parse(&text), Err(FormatError::Magic(_))));
}

#[test]
fn a_table_that_is_none_is_refused_behind_its_checksum_too() {
    let entry = |at: usize, value: u8| {
        let mut file = small();
        file[48 + at] = value;
        parse(&sealed(file)).unwrap_err()
    };
    assert_eq!(entry(0, 99), FormatError::UnknownKind(99));
    for (at, value, needle) in [
        (0, Kind::Vcpus as u8, "twice"),
        (4, 2, "flags 0x2"),
        (28, 1, "flags"),
        (8, 1, "is to begin at 144"),
        (16, 200, "200 bytes"),
        (23, 0xff, "bytes at 144"),
        (32 + 8, 0, "section 3"),
    ] {
        let error = entry(at, value);
        let text = error.to_string();
        let checked = matches!(error, FormatError::Table(_));
        assert!(checked && text.contains(needle), "{at} {value}: {text}");
    }
    for count in [0_u32, 65, u32::MAX] {
        let mut file = small();
        file[12..16].copy_from_slice(&count.to_le_bytes());
        let sum = checksum(&file[..44]);
        file[44..48].copy_from_slice(&sum.to_le_bytes());
        assert!(
            matches!(parse(&file), Err(FormatError::Table(_))),
            "{count}"
        );
    }
    // Something behind the last section.
    let mut file = small();
    file.push(0);
    let len = file.len() as u64;
    file[32..40].copy_from_slice(&len.to_le_bytes());
    let error = parse(&sealed(file)).unwrap_err().to_string();
    assert!(
        error.contains("ends at 246, and the file at 247"),
        "{error}"
    );
    // A kind that may be passed over is.
    let mut file = small();
    (file[48], file[52]) = (99, 1);
    let file = sealed(file);
    let read = parse(&file).unwrap();
    assert_eq!(
        read.section(Kind::Config),
        Err(FormatError::Missing(Kind::Config))
    );
    assert_eq!(read.section(Kind::Memory).unwrap(), [7; 100]);
}

fn map() -> PageMap {
    let mut map = PageMap::of([(0, 3 << 20), (4 << 20, (1 << 20) + PAGE), (1 << 32, PAGE)]);
    map.pieces = (0..map.expected())
        .map(|piece| Piece {
            checksum: (piece % 2 == 0).then_some(piece as u32),
        })
        .collect();
    map
}

#[test]
fn regions_are_placed_as_in_the_guest_relative_to_a_huge_page() {
    let map = map();
    let offsets: Vec<_> = map
        .regions
        .iter()
        .map(|region| region.offset / ALIGN)
        .collect();
    assert_eq!(offsets, [1, 3, 4]);
    assert_eq!((map.expected(), map.file_len()), (6, 4 * ALIGN + PAGE));
    let places: Vec<_> = map
        .each()
        .map(|(place, _)| (place.offset / PAGE, place.len / PAGE))
        .collect();
    assert_eq!(
        places,
        [
            (512, 256),
            (768, 256),
            (1024, 256),
            (1536, 256),
            (1792, 1),
            (2048, 1)
        ]
    );
    assert_eq!(PageMap::parse(&map.encode()).unwrap(), map);
}

#[test]
fn a_map_of_pages_that_is_none_is_refused() {
    let good = map().encode();
    let with = |at: usize, value: u64, len: usize| {
        let mut bytes = good.clone();
        bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        PageMap::parse(&bytes).unwrap_err().to_string()
    };
    for (at, value, len, needle) in [
        (0, 5, 8, "a file of 5 bytes"),
        (8, 0, 4, "pieces of 0"),
        (8, 3 << 20, 4, "pieces of 3145728"),
        (8, 1 << 31, 4, "pieces of 2147483648"),
        (12, 0, 4, "0 regions"),
        (12, u64::from(u32::MAX), 4, "4294967295 regions"),
        (16, 1, 8, "the guest's 0x1"),
        (24, 0, 8, "a region of 0 bytes"),
        (24, u64::MAX - 4095, 8, "a region of"),
        (32, 0, 8, "at 0 of the file"),
        (40, 1 << 20, 8, "behind one that ends at 0x300000"),
        (88, 2, 4, "marked 2"),
        (96, 1, 4, "marked 0 with checksum 0x1"),
    ] {
        let at = if at == 96 { 88 + 12 } else { at };
        let error = with(at, value, len);
        assert!(error.contains(needle), "{at} {value}: {error}");
    }
    for len in 0..good.len() {
        PageMap::parse(&good[..len]).unwrap_err();
    }
}

#[test]
fn memory_of_another_snapshot_is_not_taken_for_this_ones() {
    let bytes = header(ID);
    check_header(&bytes, ID).unwrap();
    let other = SnapshotId([9; 16]);
    let error = check_header(&header(other), ID).unwrap_err();
    assert_eq!(
        error,
        HeaderError::Foreign {
            memory: other,
            state: ID
        }
    );
    assert_eq!(check_header(&MAGIC, ID), Err(HeaderError::Magic));
    assert_eq!(check_header(&[0; 4096], ID), Err(HeaderError::Magic));
    for at in 8..32 {
        let mut damaged = bytes;
        damaged[at] ^= 1;
        let error = check_header(&damaged, ID).unwrap_err();
        match at {
            8..12 => assert!(matches!(error, HeaderError::Version(_)), "{at}"),
            _ => assert_eq!(error, HeaderError::Damaged, "{at}"),
        }
    }
}

proptest! {
    #[test]
    fn what_was_written_is_read_back(
        id in any::<[u8; 16]>(),
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..=7),
    ) {
        let sections: Vec<_> = Kind::ALL.into_iter().zip(bodies).collect();
        let file = encode(SnapshotId(id), &sections);
        let read = parse(&file).unwrap();
        prop_assert_eq!(read.id, SnapshotId(id));
        for (kind, body) in &sections {
            prop_assert_eq!(read.section(*kind).unwrap(), body.as_slice());
        }
    }

    #[test]
    fn any_bytes_are_refused_or_read_and_nothing_else(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let _ = parse(&bytes);
        let _ = PageMap::parse(&bytes);
        let mut headed = MAGIC.to_vec();
        headed.extend(&bytes);
        let _ = parse(&headed);
        // A good one with one byte changed, and its checksums made right.
        let mut file = small();
        let at = at.index(file.len() - 48) + 48;
        file[at] = value;
        let _ = parse(&sealed(file));
        let mut bytes = map().encode();
        let at = at % bytes.len();
        bytes[at] = value;
        if let Ok(read) = PageMap::parse(&bytes) {
            prop_assert_eq!(read.encode(), bytes);
        }
    }

    #[test]
    fn runs_are_the_pages_that_are_not_zero(pages in prop::collection::vec(any::<bool>(), 0..40), tail in 0_usize..4096) {
        let mut bytes = vec![0; pages.len() * 4096 + tail];
        for (page, set) in pages.iter().enumerate() {
            bytes[page * 4096 + page * 97 % 4096] = u8::from(*set);
        }
        if tail > 0 {
            *bytes.last_mut().unwrap() = 1;
        }
        let mut covered = vec![false; bytes.len()];
        let mut last = None;
        for (start, len) in pages::runs(&bytes) {
            prop_assert!(last.is_none_or(|end| end < start), "two runs without a gap");
            covered[start..start + len].fill(true);
            last = Some(start + len);
        }
        for (page, covered) in bytes.chunks(4096).zip(covered.chunks(4096)) {
            let wanted = page.iter().any(|byte| *byte != 0);
            prop_assert!(covered.iter().all(|byte| *byte == wanted));
        }
        prop_assert_eq!(pages::is_zero(&bytes), bytes.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_configuration_is_no_longer_than_one_can_be_and_none_but_a_configuration() {
    let parse = |config: String| {
        let file = encode(ID, &[(Kind::Config, config.into_bytes())]);
        MachineState::parse(&file).unwrap_err()
    };
    let list = |count: usize| format!(r#"{{"x":[{}{{}}]}}"#, r#"{"a":0},"#.repeat(count));
    let long = list(1 << 17);
    let len = long.len();
    let error = parse(long);
    assert!(
        matches!(error, StateError::LongConfig(has) if has == len),
        "{error}"
    );
    // Refused at its first key, whatever is behind it.
    let error = parse(list(1000)).to_string();
    assert!(error.contains("unknown field `x`"), "{error}");
}
