// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The record as bytes. All numbers are little-endian.
//!
//! ```text
//!    0   8  magic: 89 52 57 53 0d 0a 1a 0a  ("\x89RWS\r\n\x1a\n")
//!    8   4  version: 1
//!   12   4  number of runs, n
//!   16   8  first page of the span, a frame number
//!   24   8  pages of the span: 1 to 2^32
//!   32  16  the snapshot's name
//!   48   8  touches that were lost
//!   56   4  bytes of the runs, b
//!   60   4  checksum of bytes 0 to 59
//!   64   b  the runs: for each
//!             from the end of the run before (of the first: from the span's first page) to its first page, signed
//!             pages, less 1
//!             milliseconds since the run before (of the first: since the beginning)
//!  64+b  4  checksum of the runs
//! ```
//!
//! A run's numbers are of 7 bits a byte, low ones first, bit 7 says that more follow; the signed one is folded (0, -1, 1,
//! -2 …). Each is written in as few bytes as it takes, so a record has one form. A run near the one before is 3 bytes.
//! Checksums are CRC-32, as gzip's.
//!
//! # What a reader promises
//! Whatever the bytes are, [`WorkingSet::decode`] does not panic, and allocates in proportion to their number. What it
//! gives is as a recorder would have made it: runs within the span, no page twice, times ascending.

use std::time::Duration;

use memslots::Gfn;

use super::{Run, WorkingSet};

/// The most pages that a record may watch: 16 TiB of them.
pub const MOST_PAGES: u64 = 1 << 32;
/// The most bytes that a record may have.
pub const MOST_BYTES: usize = 256 << 20;

/// What a record begins with.
pub const MAGIC: [u8; 8] = *b"\x89RWS\r\n\x1a\n";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const TAIL: usize = 4;
/// A run is no shorter.
const LEAST_RUN: usize = 3;
/// Times are no later: what a recorder notes at most.
const MOST_MILLIS: u64 = u32::MAX as u64;

/// Why there is no record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A span that cannot be watched.
    #[error(
        "{pages} pages from gfn {first:#x} cannot be watched: 1 to {MOST_PAGES} pages of 52-bit numbers can"
    )]
    Span {
        /// Its first page.
        first: u64,
        /// How many.
        pages: u64,
    },
    /// The bytes begin with something else.
    #[error("this is no working set: it begins with {0:02x?}")]
    Magic([u8; 8]),
    /// A version that this build does not know.
    #[error("the working set has version {0}, and this build knows version {VERSION}")]
    Version(u32),
    /// There are fewer or more bytes than the header says.
    #[error("a working set of {got} bytes, of which there should be {want}")]
    Length {
        /// How many there are.
        got: usize,
        /// How many there should be; of a header that is not whole, its size.
        want: usize,
    },
    /// More bytes than a record may have.
    #[error("a working set of {bytes} bytes: {MOST_BYTES} are the most")]
    TooLong {
        /// How many there are.
        bytes: u64,
    },
    /// A checksum is another one.
    #[error(
        "the working set's {what} is damaged: the checksum is {found:#010x}, and {written:#010x} was written"
    )]
    Checksum {
        /// Of what.
        what: &'static str,
        /// That of the bytes.
        found: u32,
        /// That in the bytes.
        written: u32,
    },
    /// A run that cannot be.
    #[error("run {run} of the working set {what}")]
    Run {
        /// Which, from 0.
        run: u32,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Refuses a span that cannot be watched.
pub(super) fn check_span(first: u64, pages: u64) -> Result<(), RecordError> {
    const MOST_GFN: u64 = 1 << 52;
    let fits = first <= MOST_GFN && (1..=MOST_PAGES).contains(&pages);
    match fits && first + pages <= MOST_GFN {
        true => Ok(()),
        false => Err(RecordError::Span { first, pages }),
    }
}

impl WorkingSet {
    /// Its bytes, as the [file](Self::save) has them. Runs behind the first that do not fit into [`MOST_BYTES`] (which is
    /// millions of them) are left out, and their pages counted as [lost](Self::lost).
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        let (mut end, mut millis, mut runs) = (self.first.0, 0, 0u32);
        let mut lost = self.lost;
        for run in &self.runs {
            const MOST_RUN: usize = 30;
            if bytes.len() + MOST_RUN + TAIL > MOST_BYTES {
                lost = lost.saturating_add(run.pages);
                continue;
            }
            let after = (run.after.as_millis() as u64).min(MOST_MILLIS);
            let distance = run.first.0.wrapping_sub(end) as i64;
            put(&mut bytes, ((distance << 1) ^ (distance >> 63)) as u64);
            put(&mut bytes, run.pages - 1);
            put(&mut bytes, after.saturating_sub(millis));
            (end, millis, runs) = (run.end(), after.max(millis), runs + 1);
        }
        let checksum = crc32fast::hash(bytes.get(HEADER..).unwrap_or_default());
        let size = (bytes.len() - HEADER) as u32;
        bytes.extend_from_slice(&checksum.to_le_bytes());

        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&runs.to_le_bytes());
        header.extend_from_slice(&self.first.0.to_le_bytes());
        header.extend_from_slice(&self.pages.to_le_bytes());
        header.extend_from_slice(&self.snapshot);
        header.extend_from_slice(&lost.to_le_bytes());
        header.extend_from_slice(&size.to_le_bytes());
        let checksum = crc32fast::hash(&header);
        header.extend_from_slice(&checksum.to_le_bytes());
        bytes.splice(..HEADER, header);
        bytes
    }

    /// The record that the bytes are.
    ///
    /// # Errors
    /// [`RecordError`], which says what is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > MOST_BYTES {
            return Err(RecordError::TooLong {
                bytes: bytes.len() as u64,
            });
        }
        let mut fields = Fields(bytes);
        let short = RecordError::Length {
            got: bytes.len(),
            want: HEADER + TAIL,
        };
        let magic = fields.array().ok_or(short.clone())?;
        if magic != MAGIC {
            return Err(RecordError::Magic(magic));
        }
        let mut header = || {
            Some((
                fields.u32()?,
                fields.u32()?,
                fields.u64()?,
                fields.u64()?,
                fields.array::<16>()?,
                fields.u64()?,
                fields.u32()?,
                fields.u32()?,
            ))
        };
        let (version, count, first, pages, snapshot, lost, size, written) =
            header().ok_or(short)?;
        // Before the checksum: another version may have it elsewhere.
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        check("header", bytes.get(..HEADER - 4), written)?;
        check_span(first, pages)?;
        let want = (HEADER + TAIL).saturating_add(size as usize);
        if bytes.len() != want {
            let got = bytes.len();
            return Err(RecordError::Length { got, want });
        }
        let runs = bytes.get(HEADER..want - TAIL);
        let mut tail = Fields(bytes.get(want - TAIL..).unwrap_or_default());
        check("list of runs", runs, tail.u32().unwrap_or(0))?;
        let runs = decode_runs(runs.unwrap_or_default(), count, first, pages)?;
        Ok(Self {
            first: Gfn(first),
            pages,
            snapshot,
            lost,
            runs,
        })
    }
}

fn check(what: &'static str, bytes: Option<&[u8]>, written: u32) -> Result<(), RecordError> {
    let found = crc32fast::hash(bytes.unwrap_or_default());
    match found == written {
        true => Ok(()),
        false => Err(RecordError::Checksum {
            what,
            found,
            written,
        }),
    }
}

fn decode_runs(bytes: &[u8], count: u32, first: u64, pages: u64) -> Result<Vec<Run>, RecordError> {
    let wrong = |run, what| Err(RecordError::Run { run, what });
    // What is allocated for them is bounded by the bytes that are there.
    if bytes.len() / LEAST_RUN < count as usize {
        return wrong(
            count,
            "is said to be there, and there are not enough bytes for it",
        );
    }
    let (mut fields, mut runs) = (Fields(bytes), Vec::with_capacity(count as usize));
    let (mut end, mut millis) = (first, 0u64);
    for run in 0..count {
        let mut next = || Some((fields.number()?, fields.number()?, fields.number()?));
        let Some((folded, less, since)) = next() else {
            return wrong(
                run,
                "is not whole, or has a number in more bytes than it takes",
            );
        };
        let distance = (folded >> 1) as i64 ^ -((folded & 1) as i64);
        let start = end.wrapping_add(distance as u64);
        let Some(into) = start.checked_sub(first).filter(|into| *into < pages) else {
            return wrong(run, "begins outside of the memory that was watched");
        };
        if less >= pages - into {
            return wrong(run, "ends outside of the memory that was watched");
        }
        millis = match millis.checked_add(since) {
            Some(millis) if millis <= MOST_MILLIS => millis,
            _ => return wrong(run, "was touched later than a recorder runs"),
        };
        end = start + less + 1;
        runs.push(Run {
            first: Gfn(start),
            pages: less + 1,
            after: Duration::from_millis(millis),
        });
    }
    if !fields.0.is_empty() {
        return wrong(count, "is not said to be there, and there are bytes left");
    }
    let mut sorted: Vec<(u64, u64, u32)> = (runs.iter().zip(0..))
        .map(|(run, number)| (run.first.0, run.end(), number))
        .collect();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        if let [(_, end, a), (start, _, b)] = pair
            && start < end
        {
            return wrong(*a.max(b), "has a page that another one has");
        }
    }
    Ok(runs)
}

fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Takes numbers from the front of bytes; `None` when there are not enough.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// `None` too of one that does not fit, or that is longer than it need be.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for place in 0..10 {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            if place == 9 && bits > 1 {
                return None;
            }
            number |= bits << (7 * place);
            if byte & 0x80 == 0 {
                return (byte != 0 || place == 0).then_some(number);
            }
        }
        None
    }
}
