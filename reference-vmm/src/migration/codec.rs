// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages of guest memory as frames on a stream, and frames as pages again.
//!
//! A frame, little-endian:
//!
//! ```text
//!    0   4  magic: 52 56 50 47  ("RVPG")
//!    4   1  kind: 1 pages, 2 mark
//!    5   1  flags: 1 the contents are zstd's, 2 they have a checksum
//!    6   2  number of runs, n: at most 1024; 1 or more of pages, 0 of a mark
//!    8   4  bytes of the contents as they are sent        ┐ of a mark: its number, 8 bytes
//!   12   4  bytes of the contents when they are unpacked  ┘
//!   16   4  checksum of the contents as they are sent; 0 where they have none
//!   20   4  checksum of bytes 0 to 23, with this field 0, and of the runs
//!   24 16n  for each run:
//!             0   8  guest physical address, a multiple of 4096
//!             8   8  length in bytes, a multiple of 4096, not 0; with bit 0 set: all of it is zero, and not sent
//!    …       the contents: the pages of the other runs, one behind the other, at most 1 MiB
//! ```
//!
//! A page is in one run of a frame: of one that is in two, which of them counts is not said. Checksums are CRC-32, as
//! gzip's. A mark says where in the stream something is, a round's end say; what it is, is for the two sides.
//!
//! # What is copied, and why
//!
//! The guest writes while its memory is sent. What is packed or has a checksum is therefore first copied into the frame and
//! then looked at: that which is sent is what was looked at ([`Encoder::pages`]). What has neither goes from guest memory
//! to the connection as it lies there ([`Encoder::lent`]), and from the connection into guest memory ([`Sink::lend`]): such
//! a page is looked at only for whether it is zero. If the guest writes it behind that, then what is sent is old, or half of
//! it new; it is as long as the frame says, for a run is of pages and not of their contents, and the page is dirty and comes
//! again in the next round.
//!
//! Where contents have a checksum the other side takes a whole frame before it gives any of it away. Where they have none,
//! the header and the runs are looked at before any page is written, and a connection that breaks within the contents
//! leaves a part of them in guest memory: whoever takes frames has to throw that memory away then. The destination of a
//! migration does; its guest has not begun.
//!
//! # Bounds
//!
//! A frame has [`MOST_CONTENTS`] bytes of pages and [`MOST_RUNS`] runs at most, and both sides keep one frame, made at the
//! beginning: nothing is allocated by what comes, but a list of a frame's runs where their memory is lent. Whether a run
//! is in guest memory only the [`Sink`] knows, and it is asked before anything is written. A length of zeros has no bound
//! here but the address space's: it costs the sender as little as it likes, and the sink should make it cost little too.
//! What is known of zeros waits for contents to go with, but for no more than 16 MiB that were looked at: the other side
//! takes silence for the sender's end.
//!
//! # Checksums
//!
//! A header and its runs always have one. Contents have one by choice ([`Encoder::set_checksums`]), and a migration's have
//! none: TLS knows what was changed without it, and a Unix socket, or TCP within the host, is memory. There is no other way
//! to go ([`transport`](super::transport)).

#![forbid(unsafe_code)]

use std::fmt;
use std::io::{self, Read, Write};
use std::ops::{AddAssign, Range};
use std::str::FromStr;

use crc32fast::Hasher;
use vm_memory::VolatileSlice;
use zstd::bulk::{Compressor, Decompressor};

use super::pages::{self, Lent, Parts, ReadPages, WritePages, is_fault};
use crate::snapshot::format::{u32_at, u64_at};
use crate::snapshot::pages::is_zero;

/// What pages are counted in, bytes.
pub const PAGE: usize = 4096;
/// Bytes of pages in a frame, at most.
pub const MOST_CONTENTS: usize = 1 << 20;
/// Runs in a frame, at most.
pub const MOST_RUNS: usize = 1024;

/// Bytes of zero pages that wait to be told of, at most. A guest may have gigabytes of them that have to be read, and who
/// waits at the other end is to hear that the work goes on: a slow reader has read so many within a second.
const MOST_WAITING: u64 = 16 << 20;
/// Bytes of pages after which a frame is sent: what lies in a core's own cache.
const FULL: usize = 256 << 10;
const MAGIC: [u8; 4] = *b"RVPG";
const HEADER: usize = 24;
const RUN: usize = 16;
/// Where the contents begin in the buffers; header and runs lie right before them.
const BEFORE: usize = HEADER + RUN * MOST_RUNS;
const PAGES: u8 = 1;
const MARK: u8 = 2;
const ZSTD: u8 = 1;
const CHECKSUM: u8 = 2;
const ALL_ZERO: u64 = 1;
/// Where guest memory ends at most, by the 52 address bits of x86-64.
const MOST_ADDRESS: u64 = 1 << 52;

/// Whether pages are packed before they are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// `none`: they are sent as they are.
    #[default]
    None,
    /// `zstd` or `zstd:LEVEL`. A frame that it does not make smaller is sent as it is.
    Zstd {
        /// 1 to 19; the higher the smaller and the slower. Negative ones to -7 are the fastest.
        level: i32,
    },
}

impl Compression {
    /// Of `zstd` without a number.
    const LEVEL: i32 = 1;
    const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let level = match text.split_once(':') {
            None if text == "none" => return Ok(Compression::None),
            None if text == "zstd" => Some(Self::LEVEL),
            Some(("zstd", level)) => level.parse().ok(),
            _ => None,
        };
        match level {
            Some(level) if level != 0 && Self::LEVELS.contains(&level) => {
                Ok(Compression::Zstd { level })
            }
            _ => Err(format!(
                "\"{text}\" is no compression: none, zstd or zstd:LEVEL, with LEVEL from -7 to 19 and not 0"
            )),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Compression::None => f.write_str("none"),
            Compression::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

/// What went through an encoder or a decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages that were zero.
    pub zero_pages: u64,
    /// Pages that had contents.
    pub data_pages: u64,
    /// Bytes on the wire, headers and all.
    pub wire_bytes: u64,
    /// Frames, marks among them.
    pub frames: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.zero_pages += more.zero_pages;
        self.data_pages += more.data_pages;
        self.wire_bytes += more.wire_bytes;
        self.frames += more.frames;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    address: u64,
    len: u64,
    zero: bool,
}

/// Makes frames of pages. One for each connection; after an error both are of no more use.
pub struct Encoder {
    /// Room for header and runs, then the contents.
    buffer: Vec<u8>,
    /// The same, packed.
    packed: Vec<u8>,
    zstd: Option<Compressor<'static>>,
    checksums: bool,
    runs: Vec<Run>,
    /// Bytes of contents in the buffer.
    filled: usize,
    /// Bytes of the runs that are zero.
    waiting: u64,
    counts: Counts,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder")
            .field("filled", &self.filled)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl Encoder {
    /// With all the memory that it will need, and with checksums of contents.
    ///
    /// # Errors
    /// zstd's, of a level that it does not know.
    pub fn new(compression: Compression) -> io::Result<Self> {
        let zstd = match compression {
            Compression::None => None,
            Compression::Zstd { level } => Some(Compressor::new(level)?),
        };
        Ok(Encoder {
            buffer: vec![0; BEFORE + FULL],
            packed: match zstd {
                Some(_) => vec![0; BEFORE + FULL],
                None => Vec::new(),
            },
            zstd,
            checksums: true,
            runs: Vec::with_capacity(MOST_RUNS),
            filled: 0,
            waiting: 0,
            counts: Counts::default(),
        })
    }

    /// Whether contents have a checksum from now on.
    pub fn set_checksums(&mut self, on: bool) {
        self.checksums = on;
    }

    /// What was given to `out` so far: without what waits in the buffer.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes the `len` bytes of guest memory at `address`, both multiples of [`PAGE`], and gives each full frame to `out`.
    /// `memory` copies what is at an address of the guest's into a buffer; it is asked in order, and for up to 256 KiB at a
    /// time.
    ///
    /// # Errors
    /// `InvalidInput`: these are no whole pages. `memory`'s, and `out`'s.
    pub fn pages<W: Write + ?Sized>(
        &mut self,
        address: u64,
        len: u64,
        mut memory: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
        out: &mut W,
    ) -> io::Result<()> {
        let end = end_of_pages(address, len)?;
        let mut at = address;
        while at < end {
            // Each page may be a run of its own.
            let runs = MOST_RUNS - self.runs.len();
            if self.filled == FULL || runs < FULL / PAGE || self.waiting >= MOST_WAITING {
                self.flush(out)?;
            }
            let room = (FULL - self.filled) as u64;
            let take = room.min(end - at) as usize;
            let begin = BEFORE + self.filled;
            let taken = self.buffer.get_mut(begin..begin + take);
            memory(at, taken.unwrap_or_default())?;
            self.sort_out(at, take);
            at += take as u64;
        }
        Ok(())
    }

    /// Takes pages as they lie in guest memory, in whole pages at multiples of [`PAGE`], and gives them to `out` before it
    /// returns. They are not copied, where they are neither packed nor have a checksum.
    ///
    /// # Errors
    /// As [`pages`](Self::pages)'s.
    pub fn lent<W: WritePages + ?Sized>(
        &mut self,
        memory: &[Lent<'_>],
        out: &mut W,
    ) -> io::Result<()> {
        for (address, slice) in memory {
            end_of_pages(*address, slice.len() as u64)?;
        }
        if self.checksums || self.zstd.is_some() {
            for (address, slice) in memory {
                let copy = |at: u64, into: &mut [u8]| {
                    let from = slice.offset((at - address) as usize);
                    from.map_err(io::Error::other)?.copy_to(into);
                    Ok(())
                };
                self.pages(*address, slice.len() as u64, copy, out)?;
            }
            return Ok(());
        }
        if self.filled > 0 {
            self.flush(out)?;
        }
        let (mut contents, mut sent) = (Vec::with_capacity(memory.len()), 0);
        for (address, slice) in memory {
            // Where the pages begin that are not zero, and have no piece yet.
            let mut from = 0;
            for at in (0..slice.len()).step_by(PAGE) {
                if self.is_full() || sent == MOST_CONTENTS {
                    piece(slice, from..at, &mut contents)?;
                    from = at;
                    self.send(&contents, sent, out)?;
                    contents.clear();
                    sent = 0;
                }
                let zero = pages::is_zero(&page_of(slice, at)?);
                self.add(address + at as u64, PAGE as u64, zero);
                if zero {
                    piece(slice, from..at, &mut contents)?;
                    from = at + PAGE;
                } else {
                    sent += PAGE;
                }
            }
            piece(slice, from..slice.len(), &mut contents)?;
        }
        match sent {
            // What is known of zeros may wait, but not for ever.
            0 => Ok(()),
            _ => self.send(&contents, sent, out),
        }
    }

    /// Gives the runs that wait to `out`, and `contents` of `len` bytes behind them.
    fn send<W: WritePages + ?Sized>(
        &mut self,
        contents: &[VolatileSlice<'_>],
        len: usize,
        out: &mut W,
    ) -> io::Result<()> {
        let begin = BEFORE - HEADER - RUN * self.runs.len();
        let head = self.buffer.get_mut(begin..BEFORE).unwrap_or_default();
        let counts = heading(head, &self.runs, 0, (len, len), 0);
        pages::write_all(out, Parts::new(head, contents))?;
        self.sent(counts);
        Ok(())
    }

    fn sent(&mut self, counts: Counts) {
        self.runs.clear();
        (self.filled, self.waiting) = (0, 0);
        self.counts += counts;
    }

    /// Makes runs of the `take` bytes behind what is filled, and closes the gaps that zero pages leave.
    fn sort_out(&mut self, address: u64, take: usize) {
        let begin = BEFORE + self.filled;
        for at in (0..take).step_by(PAGE) {
            let page = begin + at..begin + at + PAGE;
            let zero = is_zero(self.buffer.get(page.clone()).unwrap_or_default());
            if !zero {
                let to = BEFORE + self.filled;
                if to != page.start {
                    self.buffer.copy_within(page, to);
                }
                self.filled += PAGE;
            }
            self.add(address + at as u64, PAGE as u64, zero);
        }
    }

    /// Takes the `len` bytes of guest memory at `address`, both multiples of [`PAGE`], of which it is known that they are
    /// zero: nothing is read for it.
    ///
    /// # Errors
    /// As [`pages`](Self::pages)'s.
    pub fn zeros<W: Write + ?Sized>(
        &mut self,
        address: u64,
        len: u64,
        out: &mut W,
    ) -> io::Result<()> {
        end_of_pages(address, len)?;
        if len == 0 {
            return Ok(());
        }
        if self.is_full() {
            self.flush(out)?;
        }
        self.add(address, len, true);
        Ok(())
    }

    /// There is no room for a run, or what is known of zeros has waited long enough.
    fn is_full(&self) -> bool {
        self.runs.len() == MOST_RUNS || self.waiting >= MOST_WAITING
    }

    /// There is room for a run.
    fn add(&mut self, address: u64, len: u64, zero: bool) {
        self.waiting += if zero { len } else { 0 };
        match self.runs.last_mut() {
            Some(run) if run.zero == zero && run.address + run.len == address => run.len += len,
            _ => self.runs.push(Run { address, len, zero }),
        }
    }

    /// Gives to `out` what waits in the buffer, if anything does.
    ///
    /// # Errors
    /// `out`'s.
    pub fn flush<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        if self.runs.is_empty() {
            return Ok(());
        }
        let raw = self.buffer.get(BEFORE..BEFORE + self.filled);
        let raw = raw.unwrap_or_default();
        let mut flags = 0;
        let mut sent = self.filled;
        if let Some(zstd) = &mut self.zstd
            && let Some(room) = self.packed.get_mut(BEFORE..BEFORE + raw.len())
            && let Ok(len) = zstd.compress_to_buffer(raw, room)
            && len < raw.len()
        {
            // What is larger than the room, zstd gives up.
            (flags, sent) = (ZSTD, len);
        }
        let frame = match flags & ZSTD {
            0 => &mut self.buffer,
            _ => &mut self.packed,
        };
        let contents = frame.get(BEFORE..BEFORE + sent).unwrap_or_default();
        let mut sum = 0;
        if self.checksums && sent > 0 {
            flags |= CHECKSUM;
            sum = crc32fast::hash(contents);
        }
        let begin = BEFORE - HEADER - RUN * self.runs.len();
        let frame = frame.get_mut(begin..BEFORE + sent).unwrap_or_default();
        let counts = heading(frame, &self.runs, flags, (sent, self.filled), sum);
        out.write_all(frame)?;
        self.sent(counts);
        Ok(())
    }

    /// Gives to `out` what waits, and a mark behind it.
    ///
    /// # Errors
    /// `out`'s.
    pub fn mark<W: Write + ?Sized>(&mut self, mark: u64, out: &mut W) -> io::Result<()> {
        self.flush(out)?;
        let mut frame = header(MARK, 0, 0, mark, 0);
        seal(&mut frame, 0);
        out.write_all(&frame)?;
        self.counts += Counts {
            wire_bytes: HEADER as u64,
            frames: 1,
            ..Counts::default()
        };
        out.flush()
    }
}

/// Where they end, if these are whole pages.
fn end_of_pages(address: u64, len: u64) -> io::Result<u64> {
    let page = PAGE as u64;
    let end = address.checked_add(len).filter(|end| *end <= MOST_ADDRESS);
    let whole = address.is_multiple_of(page) && len.is_multiple_of(page);
    end.filter(|_| whole).ok_or_else(|| {
        let why = format!("{len} bytes at {address:#x} are no pages of a guest's");
        io::Error::new(io::ErrorKind::InvalidInput, why)
    })
}

/// A header without its own checksum.
fn header(kind: u8, flags: u8, runs: u16, lengths: u64, sum: u32) -> [u8; HEADER] {
    let mut head = [0; HEADER];
    head[..4].copy_from_slice(&MAGIC);
    head[4] = kind;
    head[5] = flags;
    head[6..8].copy_from_slice(&runs.to_le_bytes());
    head[8..16].copy_from_slice(&lengths.to_le_bytes());
    head[16..20].copy_from_slice(&sum.to_le_bytes());
    head
}

/// Writes header and runs of pages to the beginning of `frame`, which ends behind them or with the contents; what that comes
/// to.
fn heading(
    frame: &mut [u8],
    runs: &[Run],
    flags: u8,
    (sent, unpacked): (usize, usize),
    sum: u32,
) -> Counts {
    let lengths = (sent as u64) | (unpacked as u64) << 32;
    let mut counts = Counts {
        wire_bytes: (HEADER + RUN * runs.len() + sent) as u64,
        frames: 1,
        ..Counts::default()
    };
    let (head, table) = frame.split_at_mut(HEADER.min(frame.len()));
    head.copy_from_slice(&header(PAGES, flags, runs.len() as u16, lengths, sum));
    for (run, into) in runs.iter().zip(table.as_chunks_mut::<RUN>().0) {
        let (address, len) = into.split_at_mut(8);
        address.copy_from_slice(&run.address.to_le_bytes());
        let zero = if run.zero { ALL_ZERO } else { 0 };
        len.copy_from_slice(&(run.len | zero).to_le_bytes());
        let pages = run.len / PAGE as u64;
        match run.zero {
            true => counts.zero_pages += pages,
            false => counts.data_pages += pages,
        }
    }
    seal(frame, runs.len());
    counts
}

fn page_of<'a>(slice: &VolatileSlice<'a>, at: usize) -> io::Result<VolatileSlice<'a>> {
    slice.subslice(at, PAGE).map_err(io::Error::other)
}

/// These bytes of `slice` as a piece of its own, if there are any.
fn piece<'a>(
    slice: &VolatileSlice<'a>,
    range: Range<usize>,
    into: &mut Vec<VolatileSlice<'a>>,
) -> io::Result<()> {
    if !range.is_empty() {
        let piece = slice.subslice(range.start, range.len());
        into.push(piece.map_err(io::Error::other)?);
    }
    Ok(())
}

/// Writes a frame's own checksum into it.
fn seal(frame: &mut [u8], runs: usize) {
    let table = frame.get(HEADER..HEADER + RUN * runs).unwrap_or_default();
    let sum = head_sum(frame, table);
    if let Some(field) = frame.get_mut(20..24) {
        field.copy_from_slice(&sum.to_le_bytes());
    }
}

/// The checksum of a header and its runs, with the field that it is in taken for 0.
fn head_sum(header: &[u8], runs: &[u8]) -> u32 {
    let mut sum = Hasher::new();
    sum.update(header.get(..20).unwrap_or_default());
    sum.update(&[0; 4]);
    sum.update(runs);
    sum.finalize()
}

/// Where pages go that a [`Decoder`] reads.
pub trait Sink {
    /// Whole pages with their contents, at a multiple of [`PAGE`].
    ///
    /// # Errors
    /// There is no guest memory, or it cannot be written; the stream ends by it.
    fn pages(&mut self, address: u64, contents: &[u8]) -> io::Result<()>;

    /// Whole pages that are zero. Memory that is still as it was made is so already.
    ///
    /// # Errors
    /// As [`pages`](Self::pages)'s.
    fn zeros(&mut self, address: u64, len: u64) -> io::Result<()>;

    /// Calls `fill` once with the memory of all these runs of pages, in their order, into which their contents are read; or
    /// says false, and they come by [`pages`](Self::pages). Behind an error nobody knows what is in that memory.
    ///
    /// # Errors
    /// As [`pages`](Self::pages)'s, and nothing was filled.
    fn lend(
        &mut self,
        _runs: &[Range<u64>],
        _fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> io::Result<bool> {
        Ok(false)
    }
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Pages, which the sink has.
    Pages,
    /// A mark, with its number.
    Mark(u64),
    /// The other side closed the connection, between two frames.
    End,
}

/// The stream ends here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The connection's, with the peer in it.
    #[error(transparent)]
    Connection(io::Error),
    /// It ended within a frame.
    #[error("the connection was closed within a frame of pages")]
    Cut,
    /// This is no frame.
    #[error("what came is no frame of pages: {0}")]
    Damaged(String),
    /// There is no such guest memory, or it cannot be written.
    #[error("pages cannot be put into guest memory: {0}")]
    Sink(io::Error),
}

/// Reads frames. One for each connection; after an error both are of no more use.
pub struct Decoder {
    /// Runs, then contents as they came.
    buffer: Vec<u8>,
    /// Contents unpacked; made when the first packed ones come.
    unpacked: Vec<u8>,
    /// Runs that have contents.
    lent: Vec<Range<u64>>,
    zstd: Decompressor<'static>,
    counts: Counts,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// With the memory for one frame.
    ///
    /// # Errors
    /// zstd has no memory.
    pub fn new() -> io::Result<Self> {
        Ok(Decoder {
            buffer: vec![0; RUN * MOST_RUNS + MOST_CONTENTS],
            unpacked: Vec::new(),
            lent: Vec::with_capacity(MOST_RUNS),
            zstd: Decompressor::new()?,
            counts: Counts::default(),
        })
    }

    /// What was read so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Reads one frame from `from`, and gives its pages to `sink`. Waits as `from` waits.
    ///
    /// # Errors
    /// [`DecodeError`]. Of a frame that is damaged the sink has got nothing; of one that is cut, and whose contents have no
    /// checksum, it may have a part.
    pub fn frame<R: ReadPages + ?Sized>(
        &mut self,
        from: &mut R,
        sink: &mut impl Sink,
    ) -> Result<Frame, DecodeError> {
        let mut head = [0; HEADER];
        let got = loop {
            match from.read(&mut head) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(DecodeError::Connection(error)),
                Ok(got) => break got,
            }
        };
        if got == 0 {
            return Ok(Frame::End);
        }
        fill(from, head.get_mut(got..).unwrap_or_default())?;
        let head = Head::parse(&head)?;
        let (runs, contents) = self.buffer.split_at_mut(RUN * head.runs);
        fill(from, runs)?;
        head.check(runs)?;
        let mut counts = Counts {
            wire_bytes: (HEADER + runs.len() + head.sent) as u64,
            frames: 1,
            ..Counts::default()
        };
        if head.kind == MARK {
            self.counts += counts;
            return Ok(Frame::Mark(head.mark));
        }
        let as_it_is = head.flags == 0 && head.sent > 0;
        let filled = as_it_is && lend(from, sink, runs, &mut self.lent)?;
        let mut contents: &[u8] = match filled {
            true => &[],
            false => {
                let contents = contents.get_mut(..head.sent).unwrap_or_default();
                fill(from, contents)?;
                head.check_contents(contents)?;
                contents
            }
        };
        if head.flags & ZSTD != 0 {
            self.unpacked.resize(MOST_CONTENTS, 0);
            let room = self.unpacked.get_mut(..head.unpacked).unwrap_or_default();
            let unpacked = self.zstd.decompress_to_buffer(contents, room);
            if unpacked.as_ref().ok() != Some(&head.unpacked) {
                let why = match unpacked {
                    Ok(len) => format!("{len} bytes of contents, of {}", head.unpacked),
                    Err(error) => format!("its contents are not zstd's: {error}"),
                };
                return Err(DecodeError::Damaged(why));
            }
            contents = room;
        }
        for run in each_run(runs) {
            let pages = run.len / PAGE as u64;
            if run.zero {
                counts.zero_pages += pages;
                sink.zeros(run.address, run.len)
            } else {
                counts.data_pages += pages;
                if filled {
                    continue;
                }
                // As long as the contents: checked.
                let (these, rest) = contents.split_at((run.len as usize).min(contents.len()));
                contents = rest;
                sink.pages(run.address, these)
            }
            .map_err(DecodeError::Sink)?;
        }
        self.counts += counts;
        Ok(Frame::Pages)
    }
}

/// Reads contents where they belong, if `sink` has such memory.
fn lend<R: ReadPages + ?Sized>(
    from: &mut R,
    sink: &mut impl Sink,
    runs: &[u8],
    lent: &mut Vec<Range<u64>>,
) -> Result<bool, DecodeError> {
    lent.clear();
    let data = each_run(runs).filter(|run| !run.zero);
    lent.extend(data.map(|run| run.address..run.address + run.len));
    let mut read = Ok(());
    let filled = sink.lend(lent, &mut |memory| {
        read = pages::read_all(from, Parts::new(&[], memory));
    });
    let filled = filled.map_err(DecodeError::Sink)?;
    read.map_err(|error| match is_fault(&error) {
        true => DecodeError::Sink(error),
        false => broke(error),
    })?;
    Ok(filled)
}

fn fill<R: Read + ?Sized>(from: &mut R, bytes: &mut [u8]) -> Result<(), DecodeError> {
    from.read_exact(bytes).map_err(broke)
}

fn broke(error: io::Error) -> DecodeError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => DecodeError::Cut,
        _ => DecodeError::Connection(error),
    }
}

fn each_run(table: &[u8]) -> impl Iterator<Item = Run> {
    table.as_chunks::<RUN>().0.iter().map(|entry| {
        let len = u64_at(entry, 8);
        Run {
            address: u64_at(entry, 0),
            len: len & !ALL_ZERO,
            zero: len & ALL_ZERO != 0,
        }
    })
}

/// A header whose lengths are within bounds; that it is whole is not known before its runs are there.
struct Head {
    bytes: [u8; HEADER],
    kind: u8,
    flags: u8,
    runs: usize,
    sent: usize,
    unpacked: usize,
    mark: u64,
}

impl Head {
    fn parse(bytes: &[u8; HEADER]) -> Result<Self, DecodeError> {
        let wrong = |why: String| Err(DecodeError::Damaged(why));
        let [a, b, c, d, kind, flags, low, high, ..] = *bytes;
        if [a, b, c, d] != MAGIC {
            return wrong(format!("it begins with {:02x?}", [a, b, c, d]));
        }
        let mut head = Head {
            bytes: *bytes,
            kind,
            flags,
            runs: u16::from_le_bytes([low, high]).into(),
            sent: 0,
            unpacked: 0,
            mark: u64_at(bytes, 8),
        };
        let runs = head.runs;
        match kind {
            MARK if runs == 0 && flags == 0 => return Ok(head),
            PAGES if (1..=MOST_RUNS).contains(&runs) && flags & !(ZSTD | CHECKSUM) == 0 => {}
            _ => return wrong(format!("kind {kind} with flags {flags:#x} and {runs} runs")),
        }
        head.sent = u32_at(bytes, 8) as usize;
        head.unpacked = u32_at(bytes, 12) as usize;
        let (sent, unpacked) = (head.sent, head.unpacked);
        let as_packed = match flags & ZSTD {
            0 => sent == unpacked,
            _ => sent < unpacked,
        };
        if unpacked > MOST_CONTENTS || !as_packed {
            return wrong(format!("{sent} bytes of contents, {unpacked} unpacked"));
        }
        Ok(head)
    }

    /// That header and runs are as they were sent, and the runs are pages as many as the contents.
    fn check(&self, runs: &[u8]) -> Result<(), DecodeError> {
        let wrong = |why: String| Err(DecodeError::Damaged(why));
        if head_sum(&self.bytes, runs) != u32_at(&self.bytes, 20) {
            return wrong("the checksum of its header is another".into());
        }
        let mut data = 0_u64;
        for Run { address, len, zero } in each_run(runs) {
            let page = PAGE as u64;
            let end = address.checked_add(len);
            let fits = end.is_some_and(|end| end <= MOST_ADDRESS);
            if !fits || len == 0 || !len.is_multiple_of(page) || !address.is_multiple_of(page) {
                return wrong(format!("a run of {len} bytes at {address:#x}"));
            }
            // At most 1024 times 2^52.
            data += if zero { 0 } else { len };
        }
        if data != self.unpacked as u64 {
            let has = self.unpacked;
            return wrong(format!("runs of {data} bytes, and {has} of contents"));
        }
        // Where contents have no checksum the field is 0: known before they are read.
        match self.flags & CHECKSUM == 0 && u32_at(&self.bytes, 16) != 0 {
            true => wrong("it has a checksum of contents that have none".into()),
            false => Ok(()),
        }
    }

    /// That the contents are as they were sent, where that is told.
    fn check_contents(&self, contents: &[u8]) -> Result<(), DecodeError> {
        let summed = self.flags & CHECKSUM != 0;
        match summed && crc32fast::hash(contents) != u32_at(&self.bytes, 16) {
            true => Err(DecodeError::Damaged(
                "the checksum of its contents is another".into(),
            )),
            false => Ok(()),
        }
    }
}
