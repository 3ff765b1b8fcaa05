// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory on its way into the file `memory`: piece by piece, in whatever order.

#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::mem;
use std::ops::Range;

use memslots::Holes;
use zstd::bulk::Compressor;

use super::files::{Draft, DraftFile, SnapshotFiles};
use super::format::{Kind, checksum};
use super::packed::{self, Compression, Duplicates, Packed, Seen, Stored};
use super::pages::{self, PAGE, PageMap, Piece, Region};
use super::ranges::Ranges;
use super::save::SnapshotError;
use crate::end::Chain;
use crate::file_pages;
use crate::memory::SlotTable;

/// What writes guest memory into a draft's file, and into the map of it what each piece is.
pub(super) struct MemoryOut<'a, F: SnapshotFiles> {
    draft: &'a Draft<'a, F>,
    file: &'a DraftFile,
    map: &'a mut PageMap,
    own: Option<&'a Ranges>,
    packer: Option<Packer>,
    buffer: Vec<u8>,
    written: u64,
    /// Opened where there is memory that is better not touched.
    holes: OnceCell<Option<Holes>>,
}

/// What compresses.
struct Packer {
    zstd: Compressor<'static>,
    frame: Vec<u8>,
    seen: Seen,
    packed: Packed,
    duplicates: Duplicates,
    /// Where the next piece goes.
    next: u64,
}

impl<'a, F: SnapshotFiles> MemoryOut<'a, F> {
    /// Into `file` of `draft`. `map` has its regions, and gets its pieces: those that are not written are zero.
    pub(super) fn new(draft: &'a Draft<'a, F>, file: &'a DraftFile, map: &'a mut PageMap) -> Self {
        map.pieces = vec![Piece::default(); map.expected() as usize];
        MemoryOut {
            own: None,
            packer: None,
            buffer: vec![0; map.piece as usize],
            written: 0,
            holes: OnceCell::new(),
            draft,
            file,
            map,
        }
    }

    /// Of each piece only these pages: what an incremental snapshot has.
    pub(super) fn only(mut self, own: Option<&'a Ranges>) -> Self {
        self.own = own;
        self
    }

    /// In this form. Compressed, pieces have to come in their order, and behind the last comes
    /// [`sections`](Self::sections).
    ///
    /// # Errors
    /// [`SnapshotError::Compress`].
    pub(super) fn compressed(mut self, by: Compression) -> Result<Self, SnapshotError> {
        self.packer = match by {
            Compression::None => None,
            Compression::Zstd => Some(Packer::new(self.map.piece)?),
        };
        Ok(self)
    }

    /// Writes the pieces `places` of [`PageMap::places`], in the order in which they come: `go_on` is asked before each.
    ///
    /// # Errors
    /// [`SnapshotError::Memory`], [`SnapshotError::Write`], and what `go_on` says.
    pub(super) fn write(
        &mut self,
        memory: &SlotTable,
        places: impl IntoIterator<Item = (usize, Region)>,
        go_on: impl Fn() -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        for (number, place) in places {
            go_on()?;
            self.write_piece(memory, number, place)?;
        }
        Ok(())
    }

    /// Writes one piece, once: what of it is not zero.
    ///
    /// # Errors
    /// [`SnapshotError::Memory`], [`SnapshotError::Write`].
    pub(super) fn write_piece(
        &mut self,
        memory: &SlotTable,
        number: usize,
        place: Region,
    ) -> Result<(), SnapshotError> {
        let holes = mem::take(&mut self.holes);
        // Whatever else has it mapped may write meanwhile: what is checked and written is this copy.
        let written = self.write_from(number, place, |range, bytes| {
            let address = range.start;
            let read = file_pages::read_present(memory, &holes, address, bytes);
            read.map_err(|error| SnapshotError::Memory {
                address,
                why: Chain(&error).to_string(),
            })
        });
        self.holes = holes;
        written
    }

    /// [`write_piece`](Self::write_piece), with what `read` gives for guest physical addresses.
    ///
    /// # Errors
    /// [`SnapshotError::Write`], [`SnapshotError::Compress`], and what `read` says.
    pub(super) fn write_from<E: From<SnapshotError>>(
        &mut self,
        number: usize,
        place: Region,
        read: impl Fn(Range<u64>, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let piece = self.buffer.get_mut(..place.len as usize);
        let piece = piece.unwrap_or_default();
        let whole = place.guest..place.guest + place.len;
        let something = match self.own {
            None => {
                read(whole, piece)?;
                true
            }
            Some(own) => {
                let mut runs = own.within(whole).peekable();
                let something = runs.peek().is_some();
                if something {
                    piece.fill(0);
                }
                for run in runs {
                    let (from, to) = (run.start - place.guest, run.end - place.guest);
                    let part = piece.get_mut(from as usize..to as usize);
                    read(run, part.unwrap_or_default())?;
                }
                something
            }
        };
        let checksum = match something {
            true => self.put(number, place)?,
            false => None,
        };
        if let Some(of) = self.map.pieces.get_mut(number) {
            of.checksum = checksum;
        }
        Ok(())
    }

    /// Writes what is in the buffer; its checksum, unless it is zero.
    fn put(&mut self, number: usize, place: Region) -> Result<Option<u32>, SnapshotError> {
        let piece = self.buffer.get_mut(..place.len as usize);
        let piece = piece.unwrap_or_default();
        if let Some(packer) = &mut self.packer {
            packer.leave_duplicates_out(place.guest, piece);
        }
        let runs = pages::runs(piece);
        if runs.is_empty() {
            return Ok(None);
        }
        let sum = checksum(piece);
        match &mut self.packer {
            Some(packer) => {
                let at = packer.next;
                let (bytes, stored) = packer.pack(piece)?;
                self.draft.write(self.file, bytes, at)?;
                packer.next += stored.len();
                self.written += stored.len();
                if let Some(of) = packer.of(number) {
                    *of = stored;
                }
            }
            None => {
                for (start, len) in runs {
                    let run = piece.get(start..start + len).unwrap_or_default();
                    let at = place.offset + start as u64;
                    self.draft.write(self.file, run, at)?;
                    self.written += len as u64;
                }
            }
        }
        Ok(Some(sum))
    }

    /// Bytes of memory in the file.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    /// What the file `state` says of a compressed file, beyond the section of memory.
    pub(super) fn sections(&mut self) -> Vec<(Kind, Vec<u8>)> {
        let Some(packer) = &mut self.packer else {
            return Vec::new();
        };
        let count = self.map.pieces.len();
        packer.packed.pieces.resize(count, Stored::Zero);
        let packed = (Kind::Packed, packer.packed.encode());
        match packer.duplicates.is_empty() {
            true => vec![packed],
            false => vec![packed, (Kind::Duplicates, packer.duplicates.encode())],
        }
    }
}

impl Packer {
    /// zstd's fastest level that is no negative one: what is compressed while a guest stands still is to be so soon.
    const LEVEL: i32 = 1;

    fn new(piece: u32) -> Result<Self, SnapshotError> {
        let zstd = Compressor::new(Self::LEVEL).map_err(SnapshotError::Compress)?;
        Ok(Packer {
            zstd,
            frame: vec![0; zstd::zstd_safe::compress_bound(piece as usize)],
            seen: Seen::new(),
            packed: Packed::default(),
            duplicates: Duplicates::default(),
            next: packed::FIRST,
        })
    }

    /// Makes pages zero that are the same as one that has been written, and remembers that they are.
    fn leave_duplicates_out(&mut self, guest: u64, piece: &mut [u8]) {
        for (at, page) in (guest..)
            .step_by(PAGE as usize)
            .zip(piece.chunks_exact_mut(PAGE as usize))
        {
            if pages::is_zero(page) {
                continue;
            }
            if let Some(of) = self.seen.find(at, page)
                && self.duplicates.push(at, of)
            {
                page.fill(0);
            }
        }
    }

    /// A piece as it is stored.
    fn pack<'a>(&'a mut self, piece: &'a [u8]) -> Result<(&'a [u8], Stored), SnapshotError> {
        let len = self.zstd.compress_to_buffer(piece, &mut self.frame[..]);
        let len = len.map_err(SnapshotError::Compress)?;
        match self.frame.get(..len) {
            Some(frame) if len < piece.len() => Ok((frame, Stored::Zstd(len as u32))),
            _ => Ok((piece, Stored::Plain(piece.len() as u32))),
        }
    }

    /// The place of a piece in the table. Those before it that have not come are zero.
    fn of(&mut self, number: usize) -> Option<&mut Stored> {
        if number >= self.packed.pieces.len() {
            self.packed.pieces.resize(number + 1, Stored::Zero);
        }
        self.packed.pieces.get_mut(number)
    }
}
