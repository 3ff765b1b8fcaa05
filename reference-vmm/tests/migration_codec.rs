// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages of guest memory through frames: all of them arrive, and nothing that is damaged does.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::{self, Read};

use proptest::prelude::*;
use reference_vmm::migration::codec::{
    Compression, DecodeError, Decoder, Encoder, Frame, MOST_RUNS, PAGE,
};
use reference_vmm::migration::pages::ReadPages;
use vm_memory::VolatileSlice;

mod migration_bytes;

use migration_bytes::{Pages, decode, encode, encode_lent, fuzz, run, sealed};

const ZSTD: Compression = Compression::Zstd { level: 1 };
const LEN: u64 = PAGE as u64;

/// A page that is zero, of one byte, of text, or of noise.
fn page() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(vec![0; PAGE]),
        any::<u8>().prop_map(|byte| vec![byte; PAGE]),
        any::<u32>().prop_map(|seed| {
            let text = format!("line {seed} of a log; ");
            text.into_bytes().into_iter().cycle().take(PAGE).collect()
        }),
        any::<u64>().prop_map(noise),
        // One byte at one place.
        (0..PAGE, 1_u8..).prop_map(|(at, byte)| {
            let mut page = vec![0; PAGE];
            page[at] = byte;
            page
        }),
    ]
}

fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) | 1;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(99);
        (state >> 32) as u8
    });
    words.take(PAGE).collect()
}

fn memory() -> impl Strategy<Value = BTreeMap<u64, Vec<u8>>> {
    let near = (0_u64..400).prop_map(|page| page * LEN);
    let far = (0_u64..1 << 28).prop_map(|page| page * LEN);
    proptest::collection::btree_map(prop_oneof![9 => near, 1 => far], page(), 0..200)
}

fn by() -> impl Strategy<Value = Compression> {
    prop_oneof![Just(Compression::None), Just(ZSTD)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_page_arrives_as_it_was_sent(memory in memory(), by in by(), checksums in any::<bool>()) {
        let (stream, sent) = encode(&memory, by, checksums);
        let mut sink = Pages::up_to(1 << 40);
        let (marks, got, whole) = decode(&stream, &mut sink);
        prop_assert!(whole);
        prop_assert_eq!(marks, [7]);
        prop_assert!(sink.last == memory);
        prop_assert_eq!(sent, got);
        prop_assert_eq!(sent.wire_bytes, stream.len() as u64);
        prop_assert_eq!(sent.data_pages + sent.zero_pages, memory.len() as u64);
    }

    #[test]
    fn pages_that_are_lent_arrive_the_same_in_memory_that_is_lent_or_is_not(
        memory in memory(), by in by(), checksums in any::<bool>(), lends in any::<bool>(),
    ) {
        let (stream, sent) = encode_lent(&memory, by, checksums);
        let mut sink = Pages::up_to(1 << 40);
        sink.lends = lends;
        let (marks, got, whole) = decode(&stream, &mut sink);
        prop_assert!(whole);
        prop_assert_eq!(marks, [7]);
        prop_assert!(sink.last == memory);
        prop_assert_eq!(sent, got);
        prop_assert_eq!(sent.wire_bytes, stream.len() as u64);
        let zeros = memory.values().filter(|page| page.iter().all(|byte| *byte == 0)).count();
        prop_assert_eq!(sent.zero_pages, zeros as u64);
        prop_assert_eq!(sent.data_pages + sent.zero_pages, memory.len() as u64);
        // What is looked at again before it is given away is not read into guest memory.
        prop_assert!(!checksums || sink.lent == 0);
    }

    #[test]
    fn memory_is_lent_for_no_frame_whose_head_is_damaged_and_a_cut_is_one_wherever_it_is(
        memory in memory(), cut in any::<prop::sample::Index>(), bit in 0..8_u32,
    ) {
        let (mut stream, _) = encode_lent(&memory, Compression::None, false);
        let lending = || Pages { lends: true, ..Pages::up_to(1 << 40) };
        let cut = cut.index(stream.len());
        let (_, got, whole) = decode(&stream[..cut], &mut lending());
        prop_assert_eq!(whole, got.wire_bytes == cut as u64);
        // The first frame's.
        let runs = usize::from(u16::from_le_bytes([stream[6], stream[7]]));
        stream[cut % (24 + 16 * runs)] ^= 1 << bit;
        let mut sink = lending();
        let (_, got, whole) = decode(&stream, &mut sink);
        prop_assert!(!whole);
        prop_assert_eq!(got, Default::default());
        prop_assert_eq!(sink.lent, 0);
        prop_assert!(sink.last.is_empty());
    }

    #[test]
    fn a_stream_that_is_cut_anywhere_is_the_frames_before_or_cut(
        memory in memory(), by in by(), cut in any::<prop::sample::Index>(),
    ) {
        let (stream, _) = encode(&memory, by, true);
        let cut = cut.index(stream.len());
        let mut sink = Pages::up_to(1 << 40);
        let (_, got, whole) = decode(&stream[..cut], &mut sink);
        prop_assert_eq!(whole, got.wire_bytes == cut as u64);
        for (at, page) in &sink.last {
            prop_assert!(memory[at] == *page);
        }
        prop_assert_eq!(sink.counts.data_pages, got.data_pages);
    }

    #[test]
    fn a_frame_with_a_wrong_bit_anywhere_gives_the_sink_nothing(
        memory in memory(), by in by(), at in any::<prop::sample::Index>(), bit in 0..8_u32,
    ) {
        let (mut stream, _) = encode(&memory, by, true);
        let at = at.index(stream.len());
        stream[at] ^= 1 << bit;
        let mut sink = Pages::up_to(1 << 40);
        let (_, got, whole) = decode(&stream, &mut sink);
        prop_assert!(!whole);
        prop_assert!(got.wire_bytes <= at as u64);
        prop_assert_eq!(sink.counts.data_pages, got.data_pages);
        for (at, page) in &sink.last {
            prop_assert!(memory[at] == *page);
        }
    }

    #[test]
    fn whatever_comes_does_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        fuzz(&bytes);
        run(&sealed(&bytes));
    }

    #[test]
    fn a_frame_that_is_nearly_one_does_no_harm(
        memory in memory(), by in by(),
        changes in proptest::collection::vec((0_usize..200, any::<u8>()), 0..6),
    ) {
        let (mut stream, _) = encode(&memory, by, false);
        for (at, byte) in changes {
            if let Some(place) = stream.get_mut(at) {
                *place = byte;
            }
        }
        run(&stream);
        run(&sealed(&stream));
    }
}

#[test]
fn a_run_of_memory_is_asked_for_in_order_and_once_and_its_zeros_are_not_sent() {
    // Every third page is zero, and behind them are many.
    let many = 300;
    let mut asked = 0;
    let mut source = |at: u64, into: &mut [u8]| {
        assert_eq!(at, asked);
        asked += into.len() as u64;
        for (page, number) in into.chunks_mut(PAGE).zip(at / LEN..) {
            let zero = number >= many || number.is_multiple_of(3);
            page.fill(if zero { 0 } else { number as u8 | 1 });
        }
        Ok(())
    };
    let mut encoder = Encoder::new(Compression::None).unwrap();
    let mut stream = Vec::new();
    let pages = 100_000;
    encoder
        .pages(0, pages * LEN, &mut source, &mut stream)
        .unwrap();
    encoder.flush(&mut stream).unwrap();
    assert_eq!(asked, pages * LEN);
    let sent = encoder.counts();
    assert_eq!((sent.data_pages, sent.zero_pages), (200, pages - 200));
    assert!(sent.wire_bytes < 201 * LEN + 300 * 16);
    let mut sink = Pages::up_to(1 << 40);
    sink.most_zeros = u64::MAX;
    let (_, got, whole) = decode(&stream, &mut sink);
    assert!(whole);
    assert_eq!(got, sent);
    assert_eq!(sink.last.len() as u64, pages);
    for (at, page) in sink.last {
        let number = at / LEN;
        let zero = number >= many || number.is_multiple_of(3);
        let byte = if zero { 0 } else { number as u8 | 1 };
        assert!(page == [byte; PAGE], "page {number}");
    }
}

#[test]
fn what_is_known_to_be_zero_is_sent_without_being_read_and_beside_what_is() {
    let mut encoder = Encoder::new(Compression::None).unwrap();
    let mut out = Vec::new();
    let ones = |_: u64, into: &mut [u8]| {
        into.fill(1);
        Ok(())
    };
    // Zeros that are found join those that are known.
    let zeros = |_: u64, into: &mut [u8]| {
        into.fill(0);
        Ok(())
    };
    encoder.pages(0, 2 * LEN, ones, &mut out).unwrap();
    encoder.zeros(2 * LEN, 1 << 20, &mut out).unwrap();
    encoder
        .pages((1 << 20) + 2 * LEN, LEN, zeros, &mut out)
        .unwrap();
    encoder.zeros(0, 0, &mut out).unwrap();
    encoder.flush(&mut out).unwrap();
    let counts = encoder.counts();
    assert_eq!((counts.frames, counts.data_pages), (1, 2));
    assert_eq!(counts.zero_pages, (1 << 8) + 1);
    assert_eq!(out.len(), 24 + 2 * 16 + 2 * PAGE);
    // As many as one likes.
    encoder.zeros(0, 1 << 40, &mut out).unwrap();
    for page in 0..3 * MOST_RUNS as u64 {
        encoder.zeros(2 * page * LEN, LEN, &mut out).unwrap();
    }
    encoder.mark(7, &mut out).unwrap();
    let mut sink = Pages::up_to(1 << 41);
    let (marks, got, whole) = decode(&out, &mut sink);
    assert!(whole && marks == [7]);
    assert_eq!(got, encoder.counts());
    for (at, len) in [
        (1, LEN),
        (LEN, 1),
        (u64::MAX - LEN + 1, LEN),
        (1 << 52, LEN),
    ] {
        let error = encoder.zeros(at, len, &mut out).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
}

#[test]
fn who_looks_through_many_zero_pages_says_so_again_and_again() {
    // What a source looks through within a second, even one that is not optimised.
    const OFTEN: u64 = 16 << 20;
    const PIECE: u64 = 256 << 10;
    let pieces = 5 * OFTEN / PIECE;
    let zeros = vec![0; PIECE as usize];
    let mut given = zeros.clone();
    let lent = VolatileSlice::from(given.as_mut_slice());
    for by in ["copied", "lent", "known"] {
        for compression in [Compression::None, ZSTD] {
            let mut encoder = Encoder::new(compression).unwrap();
            encoder.set_checksums(false);
            let mut out = Vec::new();
            for piece in 0..pieces {
                let at = piece * PIECE;
                let taken = match by {
                    "copied" => {
                        let fill = |_: u64, into: &mut [u8]| {
                            into.copy_from_slice(&zeros[..into.len()]);
                            Ok(())
                        };
                        encoder.pages(at, PIECE, fill, &mut out)
                    }
                    "lent" => encoder.lent(&[(at, lent)], &mut out),
                    _ => encoder.zeros(at, PIECE, &mut out),
                };
                taken.unwrap();
                let waits = at + PIECE - encoder.counts().zero_pages * LEN;
                assert!(waits <= OFTEN, "{by} {compression}: {waits} bytes wait");
            }
            encoder.mark(7, &mut out).unwrap();
            let counts = encoder.counts();
            // A frame for each, and the mark: no more than is needed.
            assert_eq!(counts.frames, 5 + 1, "{by} {compression}");
            let mut sink = Pages::up_to(1 << 40);
            sink.most_zeros = PIECE;
            let (marks, got, whole) = decode(&out, &mut sink);
            assert!(whole && marks == [7]);
            assert_eq!(got, counts);
            assert_eq!(counts.zero_pages * LEN, pieces * PIECE);
        }
    }
}

#[test]
fn more_runs_than_a_frame_has_become_several_frames() {
    let memory: BTreeMap<_, _> = (0..3 * MOST_RUNS as u64)
        .map(|number| (number * 2 * LEN, vec![0; PAGE]))
        .collect();
    let (stream, sent) = encode(&memory, Compression::None, true);
    assert!(sent.frames >= 4, "{sent:?}");
    let mut sink = Pages::up_to(1 << 40);
    assert!(decode(&stream, &mut sink).2);
    assert!(sink.last == memory);
}

#[test]
fn what_packs_well_is_sent_packed_and_noise_as_it_is() {
    let pages = |make: fn(u64) -> Vec<u8>| (0..100).map(|n| (n * LEN, make(n))).collect();
    let text: BTreeMap<_, _> = pages(|n| vec![n as u8 | 1; PAGE]);
    let (packed, _) = encode(&text, ZSTD, true);
    assert!(packed.len() < 100 * PAGE / 10);
    let noise: BTreeMap<_, _> = pages(noise);
    let (raw, _) = encode(&noise, Compression::None, true);
    let (packed, _) = encode(&noise, ZSTD, true);
    assert!(raw == packed);
}

#[test]
fn runs_that_are_not_as_long_as_the_contents_are_refused_whatever_the_checksums_say() {
    let frame = |runs: &[(u64, u64)], contents: usize| {
        let mut bytes = vec![0; 24];
        bytes[5] = 2;
        bytes[6] = runs.len() as u8;
        for (address, len) in runs {
            bytes.extend(address.to_le_bytes());
            bytes.extend(len.to_le_bytes());
        }
        bytes.resize(bytes.len() + contents, 5);
        sealed(&bytes)
    };
    let whole = |runs: &[(u64, u64)], contents| {
        let mut sink = Pages::up_to(1 << 40);
        let (_, counts, whole) = decode(&frame(runs, contents), &mut sink);
        assert_eq!(sink.last.is_empty(), counts == Default::default());
        whole
    };
    assert!(whole(&[(0, LEN), (8 * LEN, LEN | 1)], PAGE));
    for (runs, contents) in [
        (&[(0, 2 * LEN)][..], PAGE),
        (&[(0, LEN)], 2 * PAGE),
        (&[(0, LEN), (LEN, LEN)], PAGE),
        (&[(0, LEN)], 0),
        (&[(0, LEN | 1)], PAGE),
        (&[(0, 0)], 0),
        (&[(0, 1)], 0),
        (&[(0, LEN / 2)], PAGE / 2),
        (&[(LEN / 2, LEN)], PAGE),
        (&[((1 << 52) - LEN, (2 * LEN) | 1)], 0),
        (&[(0, u64::MAX)], 0),
        (&[(u64::MAX - LEN + 1, LEN)], PAGE),
    ] {
        assert!(!whole(runs, contents), "{runs:x?} with {contents}");
    }
}

#[test]
fn pages_that_the_sink_does_not_have_end_the_stream_with_its_reason() {
    let memory = BTreeMap::from([(8 * LEN, vec![1; PAGE])]);
    let (stream, _) = encode(&memory, Compression::None, true);
    let mut sink = Pages::up_to(8 * LEN);
    let mut decoder = Decoder::new().unwrap();
    let error = decoder.frame(&mut &stream[..], &mut sink).unwrap_err();
    assert!(matches!(error, DecodeError::Sink(_)), "{error}");
    assert_eq!(
        error.to_string(),
        "pages cannot be put into guest memory: no guest memory"
    );
}

#[test]
fn what_are_no_whole_pages_is_refused_before_memory_is_asked() {
    let mut encoder = Encoder::new(Compression::None).unwrap();
    let none = |_: u64, _: &mut [u8]| -> io::Result<()> { panic!("asked") };
    for (address, len) in [(1, LEN), (0, 1), (!0xfff, LEN), (1 << 52, LEN)] {
        let error = encoder.pages(address, len, none, &mut io::sink());
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    encoder.pages(0, 0, none, &mut io::sink()).unwrap();
}

#[test]
fn memory_that_cannot_be_read_is_not_sent_and_what_was_read_before_is() {
    let mut encoder = Encoder::new(Compression::None).unwrap();
    let mut stream = Vec::new();
    let ones = |_: u64, into: &mut [u8]| {
        into.fill(1);
        Ok(())
    };
    let broken = |_: u64, _: &mut [u8]| Err(io::Error::other("broken"));
    encoder.pages(0, LEN, ones, &mut stream).unwrap();
    encoder.pages(LEN, LEN, broken, &mut stream).unwrap_err();
    encoder.mark(1, &mut stream).unwrap();
    let mut sink = Pages::up_to(1 << 40);
    assert_eq!(decode(&stream, &mut sink).0, [1]);
    assert!(sink.last == BTreeMap::from([(0, vec![1; PAGE])]));
}

/// Reads that are interrupted, and that come a byte at a time.
struct Dripping<'a>(&'a [u8], bool);

impl Read for Dripping<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = into.len().min(1);
        self.0.read(&mut into[..len])
    }
}

impl ReadPages for Dripping<'_> {}

#[test]
fn a_frame_may_come_byte_by_byte() {
    let memory = BTreeMap::from([(0, noise(1)), (LEN, vec![0; PAGE])]);
    let (stream, _) = encode(&memory, Compression::None, true);
    let mut sink = Pages::up_to(1 << 40);
    let mut decoder = Decoder::new().unwrap();
    let mut from = Dripping(&stream, false);
    let frames = [(); 3].map(|()| decoder.frame(&mut from, &mut sink).unwrap());
    assert_eq!(frames, [Frame::Pages, Frame::Mark(7), Frame::End]);
    assert!(sink.last == memory);
}

#[test]
fn a_compression_is_named_as_it_is_read() {
    for (text, by) in [
        ("none", Compression::None),
        ("zstd:1", ZSTD),
        ("zstd:-3", Compression::Zstd { level: -3 }),
        ("zstd:19", Compression::Zstd { level: 19 }),
    ] {
        assert_eq!(text.parse(), Ok(by));
        assert_eq!(by.to_string(), text);
        Encoder::new(by).unwrap();
    }
    assert_eq!("zstd".parse(), Ok(ZSTD));
    for text in [
        "", "gzip", "zstd:", "zstd:0", "zstd:20", "zstd:-8", "none:1",
    ] {
        let error = text.parse::<Compression>().unwrap_err();
        assert!(error.contains(text), "{error}");
    }
}
