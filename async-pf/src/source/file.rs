// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages in a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memslots::{Gfn, PAGE_SIZE};

use super::{Fetched, PageSource, SourceError, whole_pages};

/// A stretch of guest memory in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePiece {
    /// The first guest page.
    pub first: Gfn,
    /// How many pages.
    pub pages: u64,
    /// Where in the file its first byte is; need not be aligned.
    pub offset: u64,
}

/// Pages in a file (on a disk, in memory, of a memfd), read with `pread`: any number of workers share one, with no seek and no lock.
///
/// ```
/// use async_pf::{Fetched, FilePiece, FileSource, PageSource};
/// use memslots::Gfn;
/// use std::io::Write;
///
/// let mut file = tempfile::tempfile()?;
/// file.write_all(&[7; 0x2000])?;
/// let source = FileSource::new(file, [FilePiece { first: Gfn(0x100), pages: 2, offset: 0 }])?;
///
/// let mut page = [0; 0x1000];
/// assert_eq!(source.fetch(Gfn(0x101), &mut page)?, Fetched::Bytes);
/// assert_eq!(page, [7; 0x1000]);
/// assert!(source.fetch(Gfn(0x102), &mut page).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FileSource {
    file: File,
    /// Ascending, disjoint.
    pieces: Vec<FilePiece>,
}

impl FileSource {
    /// A source for `pieces` of guest memory in `file`. They are checked against each other and
    /// against the file's size now, so that a truncated file is refused before a guest runs.
    ///
    /// # Errors
    /// [`SourceError::Layout`], [`SourceError::FileTooShort`], or [`SourceError::Read`] where the
    /// size cannot be asked. A device's size is not known this way: its pieces are not checked.
    pub fn new(
        file: File,
        pieces: impl IntoIterator<Item = FilePiece>,
    ) -> Result<Self, SourceError> {
        let mut pieces: Vec<FilePiece> =
            pieces.into_iter().filter(|piece| piece.pages > 0).collect();
        pieces.sort_by_key(|piece| piece.first);
        let refused = |piece: &FilePiece| SourceError::Layout {
            gfn: piece.first,
            pages: piece.pages,
        };
        let metadata = file.metadata().map_err(|source| SourceError::Read {
            gfn: pieces.first().map_or(Gfn(0), |piece| piece.first),
            offset: 0,
            want: 0,
            source,
        })?;
        let mut free_from = 0;
        for piece in &pieces {
            let end = piece
                .first
                .0
                .checked_add(piece.pages)
                .ok_or_else(|| refused(piece))?;
            if piece.first.0 < free_from {
                return Err(refused(piece));
            }
            free_from = end;
            let bytes = piece
                .pages
                .checked_mul(PAGE_SIZE)
                .ok_or_else(|| refused(piece))?;
            let end = piece
                .offset
                .checked_add(bytes)
                .ok_or_else(|| refused(piece))?;
            if metadata.is_file() && end > metadata.len() {
                return Err(SourceError::FileTooShort {
                    gfn: piece.first,
                    end,
                    len: metadata.len(),
                });
            }
        }
        Ok(Self { file, pieces })
    }

    /// Where in the file the page is, and how many pages there are from it on.
    pub(super) fn locate(&self, gfn: Gfn) -> Option<(u64, u64)> {
        let after = self.pieces.partition_point(|piece| piece.first <= gfn);
        let piece = self.pieces.get(after.checked_sub(1)?)?;
        let into = gfn.0 - piece.first.0;
        (into < piece.pages).then(|| (piece.offset + into * PAGE_SIZE, piece.pages - into))
    }
}

impl FileSource {
    pub(super) fn pieces(&self) -> &[FilePiece] {
        &self.pieces
    }

    /// How many pages from this one on are in no piece, if it is in none itself.
    pub(super) fn gap(&self, gfn: Gfn) -> u64 {
        let after = self.pieces.partition_point(|piece| piece.first <= gfn);
        let next = self.pieces.get(after);
        next.map_or(u64::MAX, |piece| piece.first.0) - gfn.0
    }
}

impl PageSource for FileSource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        whole_pages(first, into)?;
        let (mut gfn, mut rest) = (first, into);
        while !rest.is_empty() {
            let (offset, pages) = self.locate(gfn).ok_or(SourceError::NoSuchPage { gfn })?;
            let pages = pages.min(rest.len() as u64 / PAGE_SIZE);
            let (now, later) = rest.split_at_mut((pages * PAGE_SIZE) as usize);
            read_exactly(&self.file, gfn, offset, now)?;
            (gfn, rest) = (Gfn(gfn.0 + pages), later);
        }
        Ok(Fetched::Bytes)
    }

    fn run(&self, first: Gfn, pages: u64) -> u64 {
        self.locate(first).map_or(1, |(_, there)| there.min(pages))
    }
}

/// `pread` until the buffer is full; a signal is no failure, an early end is one of its own.
fn read_exactly(file: &File, gfn: Gfn, offset: u64, into: &mut [u8]) -> Result<(), SourceError> {
    let want = into.len();
    let mut got = 0;
    while got < want {
        match file.read_at(&mut into[got..], offset + got as u64) {
            Ok(0) => {
                return Err(SourceError::ShortRead {
                    gfn,
                    offset,
                    got,
                    want,
                });
            }
            Ok(more) => got += more,
            Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(SourceError::Read {
                    gfn,
                    offset,
                    want,
                    source,
                });
            }
        }
    }
    Ok(())
}
