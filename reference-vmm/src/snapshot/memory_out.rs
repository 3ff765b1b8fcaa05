// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory on its way into the file `memory`: piece by piece, in whatever order.

#![forbid(unsafe_code)]

use memslots::SlotTable;
use vm_memory::{Bytes, GuestAddress};

use super::files::{Draft, DraftFile, SnapshotFiles};
use super::format::checksum;
use super::pages::{self, PageMap, Piece, Region};
use super::save::SnapshotError;

/// What writes guest memory into a draft's file, and into the map of it what each piece is.
pub(super) struct MemoryOut<'a, F: SnapshotFiles> {
    draft: &'a Draft<'a, F>,
    file: &'a DraftFile,
    map: &'a mut PageMap,
    buffer: Vec<u8>,
    written: u64,
}

impl<'a, F: SnapshotFiles> MemoryOut<'a, F> {
    /// Into `file` of `draft`. `map` has its regions, and gets its pieces: those that are not written are zero.
    pub(super) fn new(draft: &'a Draft<'a, F>, file: &'a DraftFile, map: &'a mut PageMap) -> Self {
        map.pieces = vec![Piece::default(); map.expected() as usize];
        MemoryOut {
            buffer: vec![0; map.piece as usize],
            written: 0,
            draft,
            file,
            map,
        }
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
        let piece = self.buffer.get_mut(..place.len as usize);
        let piece = piece.unwrap_or_default();
        let address = place.guest;
        // Whatever else has it mapped may write meanwhile: what is checked and written is this copy.
        let read = memory.read_slice(piece, GuestAddress(address));
        read.map_err(|error| SnapshotError::Memory {
            address,
            why: error.to_string(),
        })?;
        let runs = pages::runs(piece);
        if let Some(of) = self.map.pieces.get_mut(number) {
            of.checksum = (!runs.is_empty()).then(|| checksum(piece));
        }
        for (start, len) in runs {
            let run = piece.get(start..start + len).unwrap_or_default();
            self.draft
                .write(self.file, run, place.offset + start as u64)?;
            self.written += len as u64;
        }
        Ok(())
    }

    /// Bytes that were not zero, in whole pages.
    pub(super) fn written(&self) -> u64 {
        self.written
    }
}
