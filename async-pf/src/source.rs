// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where pages come from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memslots::{Gfn, PAGE_SIZE};

/// What a source found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fetched {
    /// The buffer holds the pages.
    Bytes,
    /// The pages are all zeros and the buffer was not touched: map the zero page instead of
    /// copying (`UFFDIO_ZEROPAGE`).
    Zero,
}

/// Why a source did not deliver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The source has no such page.
    #[error("no source has gfn {:#x}", gfn.0)]
    NoSuchPage {
        /// The page.
        gfn: Gfn,
    },
    /// The source ends within the page: it is not the file that it was when it was opened.
    #[error("gfn {:#x}: the file ends after {got} of {want} bytes at offset {offset:#x}", gfn.0)]
    ShortRead {
        /// The first page asked for.
        gfn: Gfn,
        /// Where in the file its bytes begin.
        offset: u64,
        /// The bytes that were there.
        got: usize,
        /// The bytes needed.
        want: usize,
    },
    /// Reading failed.
    #[error("gfn {:#x}: reading {want} bytes at offset {offset:#x}: {source}", gfn.0)]
    Read {
        /// The first page asked for.
        gfn: Gfn,
        /// Where in the file its bytes begin.
        offset: u64,
        /// The bytes needed.
        want: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The buffer is empty or no whole number of pages.
    #[error("a buffer of {bytes} bytes is no whole number of pages")]
    Buffer {
        /// Its size.
        bytes: usize,
    },
    /// The pieces of a file overlap in guest memory, or leave an address space.
    #[error("the piece of {pages} pages from gfn {:#x} overlaps another or ends nowhere", gfn.0)]
    Layout {
        /// The piece's first page.
        gfn: Gfn,
        /// Its pages.
        pages: u64,
    },
    /// A piece lies beyond the end of its file.
    #[error("gfn {:#x}: needs the file up to byte {end:#x}, it has {len:#x}", gfn.0)]
    FileTooShort {
        /// The piece's first page.
        gfn: Gfn,
        /// Where in the file the piece ends.
        end: u64,
        /// The file's size.
        len: u64,
    },
}

impl SourceError {
    /// Whether asking again may help: the medium failed, not the request.
    ///
    /// `EIO` on a network file system, `EAGAIN`, `ENOMEM`, `ETIMEDOUT` and the like pass. That a
    /// page does not exist, or that the file shrank, does not.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Read { .. })
    }
}

/// Has the contents of guest pages.
///
/// # Contract
/// The answer for a page never changes. A call may block for as long as the medium takes, so it is
/// made from a pager's worker, never from a vCPU thread with a lock held. Several workers call at
/// once. On an error the buffer's contents mean nothing.
pub trait PageSource: Send + Sync {
    /// Reads the pages from `first` on into `into`, whose size says how many: a whole number of
    /// [`PAGE_SIZE`] bytes.
    ///
    /// # Errors
    /// [`SourceError`]; [`SourceError::is_transient`] says whether trying again may help.
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError>;

    /// How many of `pages` pages from `first` on are best fetched in one call: those that lie together, or are all zeros.
    /// Answered without blocking; at least 1, at most `pages`.
    fn run(&self, first: Gfn, pages: u64) -> u64 {
        let _ = first;
        pages
    }
}

/// Every page is zero: memory that the guest has not used before.
#[derive(Clone, Copy, Debug, Default)]
pub struct ZeroSource;

impl PageSource for ZeroSource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        whole_pages(first, into)?;
        Ok(Fetched::Zero)
    }
}

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

/// Pages in a file, read with `pread`: any number of workers share one, with no seek and no lock.
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

    /// Where in the file the page is, and how many pages follow it there.
    fn locate(&self, gfn: Gfn) -> Option<(u64, u64)> {
        let after = self.pieces.partition_point(|piece| piece.first <= gfn);
        let piece = self.pieces.get(after.checked_sub(1)?)?;
        let into = gfn.0 - piece.first.0;
        (into < piece.pages).then(|| (piece.offset + into * PAGE_SIZE, piece.pages - into))
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

/// Refuses a buffer that is no whole number of pages, and pages that do not exist.
fn whole_pages(first: Gfn, into: &[u8]) -> Result<(), SourceError> {
    let bytes = into.len();
    if bytes == 0 || !(bytes as u64).is_multiple_of(PAGE_SIZE) {
        return Err(SourceError::Buffer { bytes });
    }
    match first.0.checked_add(bytes as u64 / PAGE_SIZE) {
        Some(_) => Ok(()),
        None => Err(SourceError::NoSuchPage { gfn: Gfn(u64::MAX) }),
    }
}
