// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file `memory` that is compressed, and in which pages that are the same are there once.
//!
//! Such a file is read and not mapped: its pieces have no place that a page of the guest's could be mapped to, and one
//! page of a file cannot be many of a guest's that are each its own. A snapshot that is mapped therefore knows neither
//! section.
//!
//! The file begins as any other ([`pages`](super::pages)), with zeros up to byte 4096, and its pieces are stored one
//! behind the other from there on. The offsets of the section `memory` are then those of the file as it would be without. The section `packed`:
//!
//! ```text
//!    0   4  form: 1, zstd
//!    4   4  0
//!    8  8n  for each piece of the section `memory`, in its order:
//!             0   4  0 it is zero and not stored; 1 it is stored as it is; 2 it is a zstd frame
//!             4   4  bytes in the file
//! ```
//!
//! A checksum of the section `memory` is of the piece as it comes out. A page that is the same as one stored elsewhere is
//! zero in its piece, and named in the section `duplicates`:
//!
//! ```text
//!    0   4  number of runs, n: 0 to 4194304
//!    4   4  0
//!    8 24n  for each run, in order of address, none over another:
//!             0   8  guest physical address, a multiple of 4096
//!             8   8  length in bytes, a multiple of 4096, not 0
//!            16   8  guest physical address of the pages that it is the same as
//! ```
//!
//! Both are pages that this file has: an incremental snapshot names none of its parent's. What is named is stored, and no
//! duplicate itself.
//!
//! # Sizes that somebody wants to deceive with
//! A frame never comes out longer than its piece: there is no room for more, and that is an error, as is less. A piece is
//! no longer than what a [`PageMap`] may have, and what is stored of it not longer than it is.

#![forbid(unsafe_code)]

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use serde::Deserialize;

use super::format::{u32_at, u64_at};
use super::pages::{PAGE, PageMap};
use super::ranges::{MOST_RUNS, Ranges};

/// Where the first piece is in the file.
pub const FIRST: u64 = 4096;

const ZSTD: u32 = 1;

/// How a file `memory` is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Compression {
    /// Each page at its place, so that it can be mapped.
    #[default]
    None,
    /// zstd at its fastest level, and pages that are the same once.
    Zstd,
}

/// How a piece is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Not at all: it is zero.
    Zero,
    /// As it is: it did not become smaller.
    Plain(u32),
    /// A zstd frame of so many bytes.
    Zstd(u32),
}

/// The pieces of a file that is compressed, in the order of the section `memory`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// How each is stored.
    pub pieces: Vec<Stored>,
}

/// Pages that are the same as others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Duplicates {
    runs: Vec<Duplicate>,
}

/// A run of pages, and that which it is the same as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Duplicate {
    /// Guest physical addresses of the run.
    pub range: Range<u64>,
    /// Where the other begins.
    pub of: u64,
}

/// Why bytes are none of these sections.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the section {0} is none: {1}")]
pub struct PackedError(pub &'static str, pub String);

impl Stored {
    /// Bytes in the file.
    pub fn len(self) -> u64 {
        match self {
            Stored::Zero => 0,
            Stored::Plain(len) | Stored::Zstd(len) => len.into(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

impl Packed {
    /// Where each piece is in the file.
    pub fn offsets(&self) -> impl Iterator<Item = u64> {
        let mut offset = FIRST;
        self.pieces.iter().map(move |piece| {
            let at = offset;
            offset += piece.len();
            at
        })
    }

    /// Length of the file, bytes.
    pub fn file_len(&self) -> u64 {
        FIRST + self.pieces.iter().map(|piece| piece.len()).sum::<u64>()
    }

    /// The section's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + 8 * self.pieces.len());
        bytes.extend(ZSTD.to_le_bytes());
        bytes.extend([0; 4]);
        for piece in &self.pieces {
            let (kind, len) = match *piece {
                Stored::Zero => (0_u32, 0),
                Stored::Plain(len) => (1, len),
                Stored::Zstd(len) => (2, len),
            };
            bytes.extend(kind.to_le_bytes());
            bytes.extend(len.to_le_bytes());
        }
        bytes
    }

    /// Reads the section, of a file with this map.
    ///
    /// # Errors
    /// [`PackedError`]: it is not one of these, with what is wrong.
    pub fn parse(bytes: &[u8], map: &PageMap) -> Result<Self, PackedError> {
        let wrong = |text: String| Err(PackedError("packed", text));
        let form = u32_at(bytes, 0);
        if bytes.len() < 8 || form != ZSTD || u32_at(bytes, 4) != 0 {
            return wrong(format!("form {form}, and this build knows {ZSTD}"));
        }
        let rest = bytes.get(8..).unwrap_or_default();
        if rest.len() != 8 * map.pieces.len() {
            let (has, pieces) = (rest.len(), map.pieces.len());
            return wrong(format!("{has} bytes for {pieces} pieces"));
        }
        let mut pieces = Vec::with_capacity(map.pieces.len());
        for (entry, (place, piece)) in rest.chunks_exact(8).zip(map.each()) {
            let (kind, len) = (u32_at(entry, 0), u32_at(entry, 4));
            let (bytes, full) = (u64::from(len), place.len);
            pieces.push(match (kind, piece.checksum) {
                (0, None) if len == 0 => Stored::Zero,
                (1, Some(_)) if bytes == full => Stored::Plain(len),
                (2, Some(_)) if (1..full).contains(&bytes) => Stored::Zstd(len),
                _ => {
                    return wrong(format!(
                        "a piece of {full} bytes for {:#x} of kind {kind} in {len} bytes",
                        place.guest
                    ));
                }
            });
        }
        Ok(Packed { pieces })
    }
}

impl Duplicates {
    /// Adds the page at `page`, behind all that there are, which is the same as that at `of`; whether there was room.
    pub fn push(&mut self, page: u64, of: u64) -> bool {
        let (full, end) = (self.runs.len() >= MOST_RUNS, page.saturating_add(PAGE));
        match self.runs.last_mut() {
            Some(last) if last.range.end == page && last.of + (page - last.range.start) == of => {
                last.range.end = end;
                true
            }
            _ if full => false,
            _ => {
                let range = page..end;
                self.runs.push(Duplicate { range, of });
                true
            }
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        let of = |run: &Duplicate| run.range.end - run.range.start;
        self.runs.iter().map(of).sum()
    }

    /// What of `range` they are, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Duplicate> {
        let first = self
            .runs
            .partition_point(|run| run.range.end <= range.start);
        let runs = self.runs.get(first..).unwrap_or_default().iter();
        let end = range.end;
        runs.take_while(move |run| run.range.start < end)
            .map(move |run| {
                let start = run.range.start.max(range.start);
                Duplicate {
                    range: start..run.range.end.min(range.end),
                    of: run.of + (start - run.range.start),
                }
            })
    }

    /// The section's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + 24 * self.runs.len());
        bytes.extend((self.runs.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        for Duplicate { range, of } in &self.runs {
            for number in [range.start, range.end - range.start, *of] {
                bytes.extend(number.to_le_bytes());
            }
        }
        bytes
    }

    /// Reads the section, of a file that has the pages `own`.
    ///
    /// # Errors
    /// [`PackedError`]: it is not one of these, with what is wrong.
    pub fn parse(bytes: &[u8], own: &Ranges) -> Result<Self, PackedError> {
        let wrong = |text: String| Err(PackedError("duplicates", text));
        let count = u32_at(bytes, 0) as usize;
        let rest = bytes.get(8..).unwrap_or_default();
        if bytes.len() < 8 || u32_at(bytes, 4) != 0 || count > MOST_RUNS || rest.len() != 24 * count
        {
            return wrong(format!("{count} runs in {} bytes", bytes.len()));
        }
        let mut runs: Vec<Duplicate> = Vec::with_capacity(count);
        for entry in rest.chunks_exact(24) {
            let (start, len, of) = (u64_at(entry, 0), u64_at(entry, 8), u64_at(entry, 16));
            let whole = [start, len, of]
                .iter()
                .all(|number| number.is_multiple_of(PAGE))
                && len > 0;
            let behind = runs.last().is_none_or(|last| last.range.end <= start);
            let ends = (start.checked_add(len), of.checked_add(len));
            let (Some(end), Some(_)) = ends else {
                return wrong(format!("a run of {len} bytes at {start:#x}"));
            };
            if !whole || !behind {
                return wrong(format!(
                    "a run of {len} bytes at {start:#x}, which is no run of pages behind the one before"
                ));
            }
            let range = start..end;
            runs.push(Duplicate { range, of });
        }
        let copies = Ranges::of(runs.iter().map(|run| run.range.clone()));
        let stored = own.subtract(&copies);
        let named = runs.iter().map(|run| {
            let len = run.range.end - run.range.start;
            run.of..run.of + len
        });
        let outside = [copies.subtract(own), Ranges::of(named).subtract(&stored)];
        if let Some(page) = outside.iter().flat_map(|of| of.iter()).next() {
            return wrong(format!(
                "the page at {:#x} is the same as another or is what another is the same as, and is not stored",
                page.start
            ));
        }
        Ok(Duplicates { runs })
    }
}

/// What of the pages that went by is remembered, to know one again: of those with the same few bits of their hash the
/// last, so that a guest of any size costs the same.
pub(super) struct Seen {
    keys: [RandomState; 2],
    table: Vec<Option<([u64; 2], u64)>>,
}

impl Seen {
    /// 10 MiB.
    const ENTRIES: usize = 1 << 18;

    pub(super) fn new() -> Self {
        Seen {
            keys: [RandomState::new(), RandomState::new()],
            table: vec![None; Self::ENTRIES],
        }
    }

    /// Where a page with these bytes was, if that is remembered; else this one is, at `page`.
    ///
    /// Bytes are compared by 128 bits of a keyed hash (SipHash, its keys made anew each time), which a guest that does not
    /// know the keys cannot make equal; by chance they are once in 2^100 pages.
    pub(super) fn find(&mut self, page: u64, bytes: &[u8]) -> Option<u64> {
        let hash = self.keys.each_ref().map(|key| key.hash_one(bytes));
        let entry = self
            .table
            .get_mut(hash.first().copied()? as usize % Self::ENTRIES)?;
        match entry {
            Some((known, at)) if *known == hash => Some(*at),
            _ => {
                *entry = Some((hash, page));
                None
            }
        }
    }
}
