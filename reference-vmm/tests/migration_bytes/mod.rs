// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as what the other side of a migration's data connection sends. libFuzzer's target `migration` and
//! `migration_codec.rs` share it.
//!
//! Whatever the bytes: nothing panics, a sink is given whole pages of the address space, and as many as the frame says; and
//! what a decoder took, an encoder can send again.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use reference_vmm::migration::codec::{
    Compression, Counts, Decoder, Encoder, Frame, MOST_CONTENTS, PAGE, Sink,
};
use reference_vmm::migration::pages::ReadPages;
use vm_memory::VolatileSlice;

/// Guest memory that is there to look at: what a page has last, and runs of zeros as they came.
#[derive(Default)]
pub struct Pages {
    pub last: BTreeMap<u64, Vec<u8>>,
    pub counts: Counts,
    /// Runs of zeros longer than this are counted alone.
    pub most_zeros: u64,
    /// What is behind it is no guest memory.
    pub end: u64,
    /// Contents are read into memory that it lends.
    pub lends: bool,
    /// It was asked for memory.
    pub lent: u64,
}

impl Pages {
    pub fn up_to(end: u64) -> Self {
        Pages {
            most_zeros: end.min(256 * PAGE as u64),
            end,
            ..Pages::default()
        }
    }

    fn check(&self, address: u64, len: u64) -> io::Result<()> {
        assert!(len > 0 && len.is_multiple_of(PAGE as u64));
        assert!(address.is_multiple_of(PAGE as u64));
        let end = address.checked_add(len).unwrap();
        assert!(end <= 1 << 52);
        match end <= self.end {
            true => Ok(()),
            false => Err(io::Error::other("no guest memory")),
        }
    }
}

impl Sink for Pages {
    fn pages(&mut self, address: u64, contents: &[u8]) -> io::Result<()> {
        self.check(address, contents.len() as u64)?;
        assert!(contents.len() <= MOST_CONTENTS);
        for (page, at) in contents.chunks(PAGE).zip((address..).step_by(PAGE)) {
            self.last.insert(at, page.to_vec());
            self.counts.data_pages += 1;
        }
        Ok(())
    }

    fn lend(
        &mut self,
        runs: &[Range<u64>],
        fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> io::Result<bool> {
        self.lent += 1;
        if !self.lends {
            return Ok(false);
        }
        let mut memory = Vec::new();
        for run in runs {
            self.check(run.start, run.end - run.start)?;
            memory.push(vec![0; (run.end - run.start) as usize]);
        }
        let slices = memory
            .iter_mut()
            .map(|bytes| VolatileSlice::from(&mut bytes[..]));
        fill(&slices.collect::<Vec<_>>());
        for (run, bytes) in runs.iter().zip(memory) {
            self.pages(run.start, &bytes)?;
        }
        Ok(true)
    }

    fn zeros(&mut self, address: u64, len: u64) -> io::Result<()> {
        self.check(address, len)?;
        self.counts.zero_pages += len / PAGE as u64;
        for at in (address..address + len.min(self.most_zeros)).step_by(PAGE) {
            self.last.insert(at, vec![0; PAGE]);
        }
        Ok(())
    }
}

/// Everything of `stream`, and its marks in order.
pub fn decode(mut stream: &[u8], sink: &mut Pages) -> (Vec<u64>, Counts, bool) {
    let from: &mut dyn ReadPages = &mut stream;
    let mut decoder = Decoder::new().unwrap();
    let mut marks = Vec::new();
    loop {
        match decoder.frame(from, sink) {
            Ok(Frame::Pages) => {}
            Ok(Frame::Mark(mark)) => marks.push(mark),
            Ok(Frame::End) => return (marks, decoder.counts(), true),
            Err(error) => {
                assert!(!error.to_string().contains('\n'));
                return (marks, decoder.counts(), false);
            }
        }
    }
}

/// The frames of these pages, then a mark.
pub fn encode(
    pages: &BTreeMap<u64, Vec<u8>>,
    by: Compression,
    checksums: bool,
) -> (Vec<u8>, Counts) {
    let mut out = Vec::new();
    let mut encoder = Encoder::new(by).unwrap();
    encoder.set_checksums(checksums);
    let mut source = |at: u64, into: &mut [u8]| {
        for (page, at) in into.chunks_mut(PAGE).zip((at..).step_by(PAGE)) {
            page.copy_from_slice(&pages[&at]);
        }
        Ok(())
    };
    let mut rest = pages.keys().copied().peekable();
    while let Some(begin) = rest.next() {
        // As long as pages follow each other they are one run.
        let mut end = begin + PAGE as u64;
        while rest.next_if_eq(&end).is_some() {
            end += PAGE as u64;
        }
        let len = end - begin;
        encoder.pages(begin, len, &mut source, &mut out).unwrap();
    }
    encoder.mark(7, &mut out).unwrap();
    (out, encoder.counts())
}

/// The same, of pages that are lent.
pub fn encode_lent(
    pages: &BTreeMap<u64, Vec<u8>>,
    by: Compression,
    checksums: bool,
) -> (Vec<u8>, Counts) {
    let mut out = Vec::new();
    let mut encoder = Encoder::new(by).unwrap();
    encoder.set_checksums(checksums);
    // Runs of pages, each in memory of its own.
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    for (at, page) in pages {
        match runs.last_mut() {
            Some((start, bytes)) if *start + bytes.len() as u64 == *at => bytes.extend(page),
            _ => runs.push((*at, page.clone())),
        }
    }
    for runs in runs.chunks_mut(50) {
        let lent = runs
            .iter_mut()
            .map(|(at, bytes)| (*at, VolatileSlice::from(&mut bytes[..])));
        encoder.lent(&lent.collect::<Vec<_>>(), &mut out).unwrap();
    }
    encoder.mark(7, &mut out).unwrap();
    (out, encoder.counts())
}

/// What holds for any bytes.
pub fn run(bytes: &[u8]) {
    let mut sink = Pages::up_to(1 << 40);
    let (_, counts, whole) = decode(bytes, &mut sink);
    assert!(counts.wire_bytes <= bytes.len() as u64);
    assert_eq!(whole, counts.wire_bytes == bytes.len() as u64);
    if !whole {
        // The last frame may have been given away in part.
        assert!(sink.counts.data_pages >= counts.data_pages);
    } else {
        assert_eq!(sink.counts.data_pages, counts.data_pages);
        assert_eq!(sink.counts.zero_pages, counts.zero_pages);
    }
    // As far as the contents are there it makes no difference where they are read into, nor where a page is in two runs.
    let mut lending = Pages::up_to(1 << 40);
    lending.lends = true;
    assert_eq!(decode(bytes, &mut lending).1, counts);
    let (again, _) = encode(&sink.last, Compression::None, true);
    let mut same = Pages::up_to(1 << 40);
    let (marks, ..) = decode(&again, &mut same);
    assert_eq!(marks, [7]);
    assert!(same.last == sink.last);
}

/// A frame whose checksums are right and whose rest is `bytes`: so that random ones come past them.
pub fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut frame = bytes.to_vec();
    frame.resize(frame.len().max(24), 0);
    frame[..4].copy_from_slice(b"RVPG");
    frame[4] = 1 + (frame[4] & 1);
    let runs = usize::from(u16::from_le_bytes([frame[6], frame[7]]) % 1025);
    frame[6..8].copy_from_slice(&(runs as u16).to_le_bytes());
    let table = 24 + 16 * runs;
    frame.resize(frame.len().max(table), 0);
    if frame[4] == 1 {
        let sent = (frame.len() - table).min(MOST_CONTENTS) as u32;
        frame[8..12].copy_from_slice(&sent.to_le_bytes());
        if frame[5] & 1 == 0 {
            frame[12..16].copy_from_slice(&sent.to_le_bytes());
        }
    }
    let sum = match frame[5] & 2 {
        0 => 0,
        _ => crc32fast::hash(&frame[table..]),
    };
    frame[16..20].copy_from_slice(&sum.to_le_bytes());
    frame[20..24].fill(0);
    let sum = crc32fast::hash(&frame[..table]);
    frame[20..24].copy_from_slice(&sum.to_le_bytes());
    frame
}

/// One for libFuzzer: the first byte says whether the frame is sealed.
pub fn fuzz(bytes: &[u8]) {
    match bytes.split_first() {
        Some((0..128, rest)) => run(rest),
        Some((_, rest)) => run(&sealed(rest)),
        None => run(bytes),
    }
}
