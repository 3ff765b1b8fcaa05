// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file `memory`, and the section that says what is in it.
//!
//! The file begins with a header of 2 MiB, nearly all of it a hole, so that guest memory in it lies as it does in the
//! guest relative to a huge page:
//!
//! ```text
//!    0   8  magic: 89 52 56 4d 4d 0d 0a 1a  ("\x89RVMM\r\n\x1a")
//!    8   4  version: 1
//!   12   4  checksum of bytes 0 to 31, with this field 0
//!   16  16  the snapshot's id
//!   2 MiB   the regions, one behind the other, each at the next multiple of 2 MiB
//! ```
//!
//! What is zero in guest memory is a hole, page by page; behind the header and between regions all is zero. The section `memory` of the file `state`:
//!
//! ```text
//!    0   8  length of the file `memory`, bytes
//!    8   4  bytes that one checksum is of: a power of two from 64 KiB to 1 GiB
//!   12   4  number of regions, n: 1 to 4096
//!   16 24n  for each region, in order of address:
//!             0   8  guest physical address, a multiple of 4096
//!             8   8  length in bytes, a multiple of 4096, not 0
//!            16   8  offset in the file
//!   …       for each region, for each piece of so many bytes, the last may be shorter:
//!             0   4  1 if anything in it is not zero, else 0
//!             4   4  checksum of the piece; 0 of one that is zero
//! ```

#![forbid(unsafe_code)]

use super::format::{SnapshotId, checksum, u32_at, u64_at};
use super::ranges::Ranges;

/// What the file begins with.
pub const MAGIC: [u8; 8] = *b"\x89RVMM\r\n\x1a";
/// Bytes of its header, and what regions are aligned to.
pub const ALIGN: u64 = 2 << 20;
/// Bytes of a piece, as they are written here.
pub const PIECE: u32 = 1 << 20;
/// A page: what is zero is left out in these.
pub const PAGE: u64 = 4096;

const VERSION: u32 = 1;
pub(super) const HEADER: usize = 32;
const MOST_REGIONS: usize = 4096;
/// Where guest memory ends at most, by the 52 address bits of x86-64.
const MOST_ADDRESS: u64 = 1 << 52;

/// A run of guest memory, and where it is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// Where in the file.
    pub offset: u64,
}

/// One piece: its checksum, unless it is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// None: all of it is zero.
    pub checksum: Option<u32>,
}

/// What is where in the file `memory`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMap {
    /// Bytes of a piece.
    pub piece: u32,
    /// In order of address.
    pub regions: Vec<Region>,
    /// Of all regions, one behind the other.
    pub pieces: Vec<Piece>,
}

/// Why bytes are no such section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the section memory is none: {0}")]
pub struct PagesError(pub String);

/// Why a file is not the memory of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It begins with something else.
    #[error("it is no memory of a snapshot's")]
    Magic,
    /// A version that this build does not know.
    #[error("it has version {0} of the format, and this build reads version {VERSION}")]
    Version(u32),
    /// Its header is damaged.
    #[error("its header is damaged")]
    Damaged,
    /// It is another snapshot's.
    #[error("it is of the snapshot {memory}, and the state beside it of {state}")]
    Foreign {
        /// The memory's.
        memory: SnapshotId,
        /// The state's.
        state: SnapshotId,
    },
}

impl PageMap {
    /// Regions of these addresses and lengths, with their places in the file, and no pieces yet.
    pub fn of(memory: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut offset = ALIGN;
        let place = |(guest, len): (u64, u64)| {
            let region = Region { guest, len, offset };
            offset = offset.saturating_add(len).next_multiple_of(ALIGN);
            region
        };
        PageMap {
            piece: PIECE,
            regions: memory.into_iter().map(place).collect(),
            pieces: Vec::new(),
        }
    }

    /// Length of the file, bytes.
    pub fn file_len(&self) -> u64 {
        let last = self.regions.last();
        last.map_or(ALIGN, |region| region.offset + region.len)
    }

    /// How many pieces there are to be.
    pub fn expected(&self) -> u64 {
        let of = |region: &Region| region.len.div_ceil(self.piece.into());
        self.regions.iter().map(of).sum()
    }

    /// Where each piece is, as a [`Region`] of its own, with its number: the place of it in [`pieces`](Self::pieces).
    pub fn places(&self) -> impl Iterator<Item = (usize, Region)> {
        let size = u64::from(self.piece);
        let places = self.regions.iter().flat_map(move |region| {
            let starts = (0..region.len).step_by(size as usize);
            starts.map(move |at| Region {
                guest: region.guest + at,
                len: (region.len - at).min(size),
                offset: region.offset + at,
            })
        });
        places.enumerate()
    }

    /// The piece that has this address, and its number.
    pub fn locate(&self, guest: u64) -> Option<(usize, Region)> {
        let size = u64::from(self.piece);
        let mut before = 0;
        for region in &self.regions {
            let at = guest.checked_sub(region.guest)?;
            if at < region.len {
                let start = at / size * size;
                let place = Region {
                    guest: region.guest + start,
                    len: (region.len - start).min(size),
                    offset: region.offset + start,
                };
                return Some(((before + at / size) as usize, place));
            }
            before += region.len.div_ceil(size);
        }
        None
    }

    /// All of guest memory.
    pub fn all(&self) -> Ranges {
        let regions = self.regions.iter();
        Ranges::of(regions.map(|region| region.guest..region.guest + region.len))
    }

    /// Each piece: where it is, and what it is.
    pub fn each(&self) -> impl Iterator<Item = (Region, Piece)> {
        let places = self.places().map(|(_, place)| place);
        places.zip(self.pieces.iter().copied())
    }

    /// The section's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + 24 * self.regions.len() + 8 * self.pieces.len());
        bytes.extend(self.file_len().to_le_bytes());
        bytes.extend(self.piece.to_le_bytes());
        bytes.extend((self.regions.len() as u32).to_le_bytes());
        for region in &self.regions {
            for number in [region.guest, region.len, region.offset] {
                bytes.extend(number.to_le_bytes());
            }
        }
        for piece in &self.pieces {
            bytes.extend(u32::from(piece.checksum.is_some()).to_le_bytes());
            bytes.extend(piece.checksum.unwrap_or(0).to_le_bytes());
        }
        bytes
    }

    /// Reads the section.
    ///
    /// # Errors
    /// [`PagesError`]: it is not one of these, with what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, PagesError> {
        let wrong = |text: String| Err(PagesError(text));
        let (len, piece, count) = (u64_at(bytes, 0), u32_at(bytes, 8), u32_at(bytes, 12));
        if !piece.is_power_of_two() || !(64 << 10..=1 << 30).contains(&piece) {
            return wrong(format!("pieces of {piece} bytes"));
        }
        let end = 16 + 24 * count as usize;
        if !(1..=MOST_REGIONS as u32).contains(&count) || bytes.len() < end {
            return wrong(format!("{count} regions in {} bytes", bytes.len()));
        }
        let mut regions: Vec<Region> = Vec::with_capacity(count as usize);
        let table = bytes.get(16..end).unwrap_or_default();
        for entry in table.chunks_exact(24) {
            let region = Region {
                guest: u64_at(entry, 0),
                len: u64_at(entry, 8),
                offset: u64_at(entry, 16),
            };
            let Region { guest, len, offset } = region;
            let (first, behind) = match regions.last() {
                None => (0, ALIGN),
                Some(last) => (
                    last.guest + last.len,
                    (last.offset + last.len).next_multiple_of(ALIGN),
                ),
            };
            let whole = guest.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0;
            let fits = guest
                .checked_add(len)
                .is_some_and(|end| end <= MOST_ADDRESS);
            if !whole || !fits || guest < first || offset != behind {
                return wrong(format!(
                    "a region of {len} bytes for the guest's {guest:#x} at {offset} of the file, behind one that ends at \
                     {first:#x}, where {behind} is wanted"
                ));
            }
            regions.push(region);
        }
        let mut map = PageMap {
            piece,
            regions,
            pieces: Vec::new(),
        };
        if len != map.file_len() {
            let ends = map.file_len();
            return wrong(format!(
                "a file of {len} bytes, whose regions end at {ends}"
            ));
        }
        let rest = bytes.get(end..).unwrap_or_default();
        let expected = map.expected();
        if rest.len() as u64 != expected.saturating_mul(8) {
            let has = rest.len();
            return wrong(format!("{has} bytes of checksums, of {expected} pieces"));
        }
        map.pieces.reserve_exact(rest.len() / 8);
        for entry in rest.chunks_exact(8) {
            map.pieces.push(match (u32_at(entry, 0), u32_at(entry, 4)) {
                (0, 0) => Piece::default(),
                (1, sum) => Piece {
                    checksum: Some(sum),
                },
                (mark, sum) => {
                    return wrong(format!("a piece marked {mark} with checksum {sum:#x}"));
                }
            });
        }
        Ok(map)
    }
}

/// The header of the file `memory`; behind it is a hole.
pub fn header(id: SnapshotId) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..].copy_from_slice(&id.0);
    let sum = checksum(&header);
    header[12..16].copy_from_slice(&sum.to_le_bytes());
    header
}

/// Whether a file that begins with these bytes is the memory of the snapshot `id`.
///
/// # Errors
/// [`HeaderError`].
pub fn check_header(bytes: &[u8], id: SnapshotId) -> Result<(), HeaderError> {
    let Some(bytes) = bytes.first_chunk::<HEADER>() else {
        return Err(HeaderError::Magic);
    };
    if bytes[..8] != MAGIC {
        return Err(HeaderError::Magic);
    }
    match u32_at(bytes, 8) {
        VERSION => {}
        version => return Err(HeaderError::Version(version)),
    }
    let mut of = [0; 16];
    of.copy_from_slice(&bytes[16..]);
    let memory = SnapshotId(of);
    if *bytes != header(memory) {
        return Err(HeaderError::Damaged);
    }
    match memory == id {
        true => Ok(()),
        false => Err(HeaderError::Foreign { memory, state: id }),
    }
}

/// The runs of a piece's bytes that are not zero, in whole pages: offset and length.
pub fn runs(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (number, page) in bytes.chunks(PAGE as usize).enumerate() {
        if is_zero(page) {
            continue;
        }
        let at = number * PAGE as usize;
        match runs.last_mut() {
            Some((start, len)) if *start + *len == at => *len += page.len(),
            _ => runs.push((at, page.len())),
        }
    }
    runs
}

/// Whether all bytes are zero: by words, which the compiler makes vectors of.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks
        .iter()
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}
