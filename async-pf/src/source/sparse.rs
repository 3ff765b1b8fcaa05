// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of which a file has only what is not zero.

use std::fs::File;
use std::ops::Range;

use memslots::{Gfn, PAGE_SIZE};

use super::{Fetched, FilePiece, FileSource, PageSource, SourceError, whole_pages};

/// Pages in a file, and zeros where the file has none: a snapshot that left its zero pages out.
///
/// ```
/// use async_pf::{Fetched, FilePiece, PageSource, SparseSource};
/// use memslots::Gfn;
/// use std::io::Write;
///
/// let mut file = tempfile::tempfile()?;
/// file.write_all(&[7; 0x1000])?;
/// let piece = FilePiece { first: Gfn(3), pages: 1, offset: 0 };
/// let source = SparseSource::new(file, [piece], Gfn(0)..Gfn(8))?;
///
/// let mut pages = [0; 0x2000];
/// assert_eq!(source.fetch(Gfn(0), &mut pages)?, Fetched::Zero);
/// assert_eq!(source.run(Gfn(0), 8), 3, "then comes what the file has");
/// assert_eq!(source.fetch(Gfn(2), &mut pages)?, Fetched::Bytes);
/// assert_eq!((pages[0xfff], pages[0x1000]), (0, 7));
/// assert!(source.fetch(Gfn(8), &mut pages).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SparseSource {
    file: FileSource,
    all: Range<Gfn>,
}

impl SparseSource {
    /// A source for the pages `all`, of which `file` has `pieces`.
    ///
    /// # Errors
    /// As [`FileSource::new`]; and [`SourceError::Layout`] of a piece that is not among `all`.
    pub fn new(
        file: File,
        pieces: impl IntoIterator<Item = FilePiece>,
        all: Range<Gfn>,
    ) -> Result<Self, SourceError> {
        let file = FileSource::new(file, pieces)?;
        let outside =
            |piece: &&FilePiece| piece.first < all.start || piece.first.0 + piece.pages > all.end.0;
        match file.pieces().iter().find(outside) {
            Some(piece) => Err(SourceError::Layout {
                gfn: piece.first,
                pages: piece.pages,
            }),
            None => Ok(Self { file, all }),
        }
    }
}

impl PageSource for SparseSource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        whole_pages(first, into)?;
        let pages = into.len() as u64 / PAGE_SIZE;
        for gfn in [first, Gfn(first.0 + pages - 1)] {
            if !self.all.contains(&gfn) {
                return Err(SourceError::NoSuchPage { gfn });
            }
        }
        if self.file.gap(first) >= pages && self.file.locate(first).is_none() {
            return Ok(Fetched::Zero);
        }
        let (mut gfn, mut rest) = (first, into);
        while !rest.is_empty() {
            let pages = self.run(gfn, rest.len() as u64 / PAGE_SIZE);
            let (now, later) = rest.split_at_mut((pages * PAGE_SIZE) as usize);
            match self.file.locate(gfn) {
                Some(_) => {
                    let _ = self.file.fetch(gfn, now)?;
                }
                None => now.fill(0),
            }
            (gfn, rest) = (Gfn(gfn.0 + pages), later);
        }
        Ok(Fetched::Bytes)
    }

    fn run(&self, first: Gfn, pages: u64) -> u64 {
        let there = self.file.locate(first).map(|(_, there)| there);
        there.unwrap_or_else(|| self.file.gap(first)).min(pages)
    }
}
