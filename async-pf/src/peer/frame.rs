// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes into greetings and frames, and back: plain data. [The module](super) has the tables.

use memslots::{Gfn, PAGE_SIZE};

use super::PeerError;
use crate::Lane;

/// Pages of an ask, at most: 256 KiB.
pub const MOST_PAGES: u32 = 64;
/// Bytes of the words of a refusal, at most; what is longer is cut when it is sent.
pub const MOST_WORDS: usize = 256;
/// Bytes of a body, at most: an answer of as many pages and runs as there can be.
pub const MOST_BODY: usize = 2 + MOST_PAGES as usize * (4 + PAGE_SIZE as usize);

pub const GREETING: usize = 32;
pub const HEAD: usize = 20;
const MAGIC: [u8; 8] = *b"\x89APFP\r\n\x1a";
const VERSION: u16 = 1;
/// Of a greeting's flags: compressed answers.
pub const COMPRESSED: u16 = 1;
/// Of a run: zeros.
const ZEROS: u32 = 1 << 31;
const ASK: usize = 12;

/// What a side says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    pub flags: u16,
    pub window: u16,
    /// Milliseconds.
    pub beat: u32,
    pub image: u64,
}

/// Refuses what begins with another protocol's bytes, of which so many came.
pub fn check_magic(bytes: &[u8], got: usize) -> Result<(), PeerError> {
    let mut magic = [0; 8];
    let came = bytes.get(..got.min(magic.len())).unwrap_or_default();
    magic
        .iter_mut()
        .zip(came)
        .for_each(|(to, byte)| *to = *byte);
    match MAGIC.starts_with(came) {
        true => Ok(()),
        false => Err(PeerError::NotOurs { magic }),
    }
}

impl Greeting {
    pub fn to_bytes(self) -> [u8; GREETING] {
        let mut bytes = [0; GREETING];
        let mut put = Put(&mut bytes);
        put.bytes(&MAGIC);
        put.bytes(&VERSION.to_le_bytes());
        put.bytes(&self.flags.to_le_bytes());
        put.bytes(&self.window.to_le_bytes());
        put.bytes(&[0; 2]);
        put.bytes(&self.beat.to_le_bytes());
        put.bytes(&self.image.to_le_bytes());
        let checksum = crc32fast::hash(bytes.get(..28).unwrap_or_default());
        Put(bytes.get_mut(28..).unwrap_or_default()).bytes(&checksum.to_le_bytes());
        bytes
    }

    pub fn parse(bytes: &[u8; GREETING]) -> Result<Self, PeerError> {
        let mut take = Take(bytes);
        let magic = take.array::<8>();
        check_magic(&magic, magic.len())?;
        let version = take.u16();
        if version != VERSION {
            return Err(PeerError::Version {
                theirs: version,
                ours: VERSION,
            });
        }
        let greeting = Self {
            flags: take.u16(),
            window: take.u16(),
            beat: {
                take.u16();
                take.u32()
            },
            image: take.u64(),
        };
        let said = take.u32();
        let found = crc32fast::hash(bytes.get(..28).unwrap_or_default());
        match said == found {
            true => Ok(greeting),
            false => Err(PeerError::Checksum { said, found }),
        }
    }
}

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ask(Lane),
    Pages { compressed: bool },
    Failed(Refusal),
    Beat,
}

/// How a side's source failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NoSuchPage,
    MayPass,
    ForGood,
}

impl Kind {
    fn to_bytes(self) -> [u8; 2] {
        match self {
            Self::Ask(Lane::Fault) => [1, 0],
            Self::Ask(Lane::Prefetch) => [1, 1],
            Self::Pages { compressed } => [2, u8::from(compressed)],
            Self::Failed(Refusal::NoSuchPage) => [3, 0],
            Self::Failed(Refusal::MayPass) => [3, 1],
            Self::Failed(Refusal::ForGood) => [3, 2],
            Self::Beat => [4, 0],
        }
    }

    fn parse([kind, detail]: [u8; 2]) -> Result<Self, PeerError> {
        Ok(match (kind, detail) {
            (1, 0) => Self::Ask(Lane::Fault),
            (1, 1) => Self::Ask(Lane::Prefetch),
            (2, 0) => Self::Pages { compressed: false },
            (2, 1) => Self::Pages { compressed: true },
            (3, 0) => Self::Failed(Refusal::NoSuchPage),
            (3, 1) => Self::Failed(Refusal::MayPass),
            (3, 2) => Self::Failed(Refusal::ForGood),
            (4, 0) => Self::Beat,
            _ => return Err(PeerError::Kind { kind, detail }),
        })
    }
}

/// A frame's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub kind: Kind,
    pub id: u64,
    pub len: u32,
    checksum: u32,
}

impl Head {
    /// With a length that its kind can have. What the ask of an answer allows is the reader's to look at.
    pub fn parse(bytes: &[u8; HEAD]) -> Result<Self, PeerError> {
        let mut take = Take(bytes);
        let kind = Kind::parse(take.array())?;
        let zero = take.u16();
        let head = Self {
            kind,
            len: take.u32(),
            id: take.u64(),
            checksum: take.u32(),
        };
        let len = head.len as usize;
        let fits = match kind {
            Kind::Ask(_) => len == ASK,
            Kind::Pages { .. } => (6..=MOST_BODY).contains(&len),
            Kind::Failed(_) => (8..=8 + MOST_WORDS).contains(&len),
            Kind::Beat => len == 0 && head.id == 0,
        };
        match fits && zero == 0 {
            true => Ok(head),
            false => Err(PeerError::Length {
                kind: kind.to_bytes()[0],
                id: head.id,
                len: head.len,
            }),
        }
    }

    /// The error of a frame that this side is not sent.
    pub fn unwanted(&self) -> PeerError {
        let [kind, detail] = self.kind.to_bytes();
        PeerError::Kind { kind, detail }
    }

    /// That the bytes are those that were sent.
    pub fn check(&self, bytes: &[u8; HEAD], body: &[u8]) -> Result<(), PeerError> {
        let found = checksum(bytes, body);
        match found == self.checksum {
            true => Ok(()),
            false => Err(PeerError::Checksum {
                said: self.checksum,
                found,
            }),
        }
    }
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head.get(..16).unwrap_or_default());
    hasher.update(body);
    hasher.finalize()
}

/// A frame being written: leaves room for its head, which comes last.
pub fn begin(frame: &mut Vec<u8>) {
    frame.clear();
    frame.resize(HEAD, 0);
}

/// Writes the head of a frame whose body is there.
pub fn end(frame: &mut [u8], kind: Kind, id: u64) {
    let len = frame.len().saturating_sub(HEAD) as u32;
    let mut put = Put(frame);
    put.bytes(&kind.to_bytes());
    put.bytes(&[0; 2]);
    put.bytes(&len.to_le_bytes());
    put.bytes(&id.to_le_bytes());
    let sum = checksum(frame, frame.get(HEAD..).unwrap_or_default());
    Put(frame.get_mut(16..).unwrap_or_default()).bytes(&sum.to_le_bytes());
}

/// A whole frame with this body.
pub fn frame(kind: Kind, id: u64, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + body.len());
    begin(&mut frame);
    frame.extend_from_slice(body);
    end(&mut frame, kind, id);
    frame
}

/// Pages that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    pub first: Gfn,
    pub pages: u32,
}

impl Ask {
    pub fn to_frame(self, lane: Lane, id: u64) -> Vec<u8> {
        let mut body = [0; ASK];
        let mut put = Put(&mut body);
        put.bytes(&self.first.0.to_le_bytes());
        put.bytes(&self.pages.to_le_bytes());
        frame(Kind::Ask(lane), id, &body)
    }

    pub fn parse(id: u64, body: &[u8]) -> Result<Self, PeerError> {
        let mut take = Take(body);
        let ask = Self {
            first: Gfn(take.u64()),
            pages: take.u32(),
        };
        let ends = ask.first.0.checked_add(u64::from(ask.pages));
        match (1..=MOST_PAGES).contains(&ask.pages) && ends.is_some() {
            true => Ok(ask),
            false => Err(PeerError::Ask {
                id,
                gfn: ask.first,
                pages: ask.pages,
            }),
        }
    }

    /// How long the body of an answer to it can be.
    pub fn most_body(self) -> u32 {
        2 + self.pages * (4 + PAGE_SIZE as u32)
    }
}

/// Pages that are all zeros, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub pages: u32,
    pub zeros: bool,
}

/// Writes the runs of an answer.
pub fn put_runs(body: &mut Vec<u8>, runs: &[Run]) {
    body.extend_from_slice(&(runs.len() as u16).to_le_bytes());
    for run in runs {
        let zeros = if run.zeros { ZEROS } else { 0 };
        body.extend_from_slice(&(run.pages | zeros).to_le_bytes());
    }
}

/// The runs of an answer, which are all of its pages, and where their bytes begin.
pub fn take_runs(id: u64, body: &[u8], ask: Ask) -> Result<(Vec<Run>, usize), PeerError> {
    let mut take = Take(body);
    let count = u32::from(take.u16());
    let refused = |covered| PeerError::Runs {
        id,
        runs: count,
        covered,
        pages: ask.pages,
    };
    if count == 0 || count > ask.pages || take.0.len() < count as usize * 4 {
        return Err(refused(0));
    }
    let mut runs = Vec::with_capacity(count as usize);
    let mut covered = 0u64;
    for _ in 0..count {
        let run = take.u32();
        let (pages, zeros) = (run & !ZEROS, run & ZEROS != 0);
        covered += u64::from(pages);
        if pages == 0 || covered > u64::from(ask.pages) {
            return Err(refused(covered));
        }
        runs.push(Run { pages, zeros });
    }
    match covered == u64::from(ask.pages) {
        true => Ok((runs, body.len() - take.0.len())),
        false => Err(refused(covered)),
    }
}

/// The bytes of the runs that have some.
pub fn bytes_of(runs: &[Run]) -> usize {
    let pages = runs.iter().filter(|run| !run.zeros).map(|run| run.pages);
    pages.sum::<u32>() as usize * PAGE_SIZE as usize
}

/// Which page failed, and why.
pub fn refusal(kind: Refusal, id: u64, gfn: Gfn, words: &str) -> Vec<u8> {
    let mut cut = words.len().min(MOST_WORDS);
    while !words.is_char_boundary(cut) {
        cut -= 1;
    }
    let mut body = gfn.0.to_le_bytes().to_vec();
    body.extend_from_slice(words.get(..cut).unwrap_or_default().as_bytes());
    frame(Kind::Failed(kind), id, &body)
}

/// As [`refusal`] wrote it.
pub fn take_refusal(body: &[u8]) -> (Gfn, String) {
    let mut take = Take(body);
    let gfn = Gfn(take.u64());
    // They go to a log: of what is no text, or would move its cursor or turn its direction, nothing is kept.
    let words = String::from_utf8_lossy(take.0);
    (gfn, words.chars().filter(|c| is_plain(*c)).collect())
}

/// Whether a character has a picture of its own, or combines with one: no control, no format character (U+202E turns the
/// text behind it round) and no separator but the space, as far as std knows.
fn is_plain(c: char) -> bool {
    // std escapes what has no picture; at the beginning of a text also what combines.
    let mut pair = String::from("x");
    pair.push(c);
    c.is_ascii() && !c.is_ascii_control() || pair.escape_debug().eq(pair.chars())
}

/// Writes from the front; of a buffer that is too short, what fits.
struct Put<'a>(&'a mut [u8]);

impl Put<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        let len = bytes.len().min(self.0.len());
        let (now, later) = std::mem::take(&mut self.0).split_at_mut(len);
        now.copy_from_slice(bytes.get(..len).unwrap_or_default());
        self.0 = later;
    }
}

/// Reads from the front; behind the end, zeros.
struct Take<'a>(&'a [u8]);

impl Take<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let len = N.min(self.0.len());
        let (now, later) = self.0.split_at(len);
        Put(&mut array).bytes(now);
        self.0 = later;
        array
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_bytes_are_a_frame_that_could_have_been_written_or_refused(
            bytes in prop::array::uniform20(any::<u8>()), kind in 0u8..6, detail in 0u8..4, len in 0u32..300,
        ) {
            let mut bytes: [u8; HEAD] = bytes;
            bytes[..4].copy_from_slice(&[kind, detail, 0, 0]);
            bytes[4..8].copy_from_slice(&len.to_le_bytes());
            if let Ok(head) = Head::parse(&bytes) {
                prop_assert!(head.len as usize <= MOST_BODY);
                prop_assert_eq!(head.kind.to_bytes(), [kind, detail]);
            }
        }

        #[test]
        fn runs_come_back_or_do_not_add_up(
            pages in prop::collection::vec((0u32..5, any::<bool>()), 0..8), asked in 1u32..=MOST_PAGES,
        ) {
            let runs: Vec<Run> = pages.iter().map(|(pages, zeros)| Run { pages: *pages, zeros: *zeros }).collect();
            let ask = Ask { first: Gfn(0), pages: asked };
            let mut body = Vec::new();
            put_runs(&mut body, &runs);
            let whole = runs.iter().map(|run| run.pages).sum::<u32>() == asked
                && runs.iter().all(|run| run.pages > 0);
            match take_runs(1, &body, ask) {
                Ok(taken) => prop_assert!(whole && taken == (runs, body.len())),
                Err(error) => prop_assert!(!whole, "{}", error),
            }
        }

        #[test]
        fn any_body_is_runs_or_refused(body in prop::collection::vec(any::<u8>(), 0..40), pages in 1u32..9) {
            if let Ok((runs, at)) = take_runs(1, &body, Ask { first: Gfn(0), pages }) {
                prop_assert!(at <= body.len() && bytes_of(&runs) <= pages as usize * 4096);
            }
        }
    }

    #[test]
    fn a_flipped_bit_of_a_frame_or_a_greeting_is_seen() {
        let ask = Ask {
            first: Gfn(7),
            pages: 3,
        };
        let good = ask.to_frame(Lane::Prefetch, 9);
        let read = |bytes: &[u8]| {
            let head: [u8; HEAD] = bytes[..HEAD].try_into().unwrap();
            let parsed = Head::parse(&head)?;
            parsed.check(&head, &bytes[HEAD..]).map(|()| parsed)
        };
        assert_eq!(read(&good).unwrap().kind, Kind::Ask(Lane::Prefetch));
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            read(&bad).unwrap_err();
        }
        let greeting = Greeting {
            flags: COMPRESSED,
            window: 5,
            beat: 1000,
            image: 77,
        };
        let good = greeting.to_bytes();
        assert_eq!(Greeting::parse(&good).unwrap(), greeting);
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            Greeting::parse(&bad).unwrap_err();
        }
    }

    #[test]
    fn words_are_cut_between_characters() {
        let words = "ä".repeat(200);
        let frame = refusal(Refusal::ForGood, 1, Gfn(5), &words);
        let (gfn, taken) = take_refusal(&frame[HEAD..]);
        assert_eq!(gfn, Gfn(5));
        assert_eq!(taken, "ä".repeat(128));
    }

    #[test]
    fn words_that_would_turn_round_what_is_shown_behind_them_lose_that() {
        let words = "a\u{202e}b\u{2066}\x1b[1m\u{9b}c\u{200f}\u{61c}\u{2028}, \"é\" 'e\u{301}'";
        let frame = refusal(Refusal::ForGood, 1, Gfn(5), words);
        let (_, taken) = take_refusal(&frame[HEAD..]);
        assert_eq!(taken, "ab[1mc, \"é\" 'e\u{301}'");
    }
}
