// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where pages come from.

mod composite;
mod file;
mod sparse;

pub use composite::CompositeSource;
pub use file::{FilePiece, FileSource};
pub use sparse::SparseSource;

use std::io;
use std::sync::Arc;

use memslots::{Gfn, PAGE_SIZE};

use crate::Lane;
use crate::peer::PeerError;

/// What a source found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
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
    /// A peer did not bring it.
    #[error("gfn {:#x}: {source}", gfn.0)]
    Peer {
        /// The first page asked for.
        gfn: Gfn,
        /// Why.
        source: Arc<PeerError>,
    },
    /// A source of the consumer's own failed.
    #[error("gfn {:#x}: {source}", gfn.0)]
    Other {
        /// The first page asked for.
        gfn: Gfn,
        /// Whether asking again may help.
        transient: bool,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl SourceError {
    /// Whether asking again may help: the medium failed, not the request.
    ///
    /// `EIO` on a network file system, `EAGAIN`, `ENOMEM`, `ETIMEDOUT` and the like pass. That a
    /// page does not exist, or that the file shrank, does not.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Read { .. } => true,
            Self::Peer { source, .. } => source.is_transient(),
            Self::Other { transient, .. } => *transient,
            _ => false,
        }
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

    /// As [`fetch`](Self::fetch), and says whether someone waits for the pages. A source that has a line of its own (a
    /// connection) lets faults overtake the rest in it; another takes no notice.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch).
    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let _ = lane;
        self.fetch(first, into)
    }

    /// Whether a fault's fetch overtakes those that are under way in the lane of what nobody waits for. Then a page that is
    /// among those when someone touches it is fetched once more, in the fault's lane, and the first answer is taken; else it
    /// is waited for.
    fn overtakes(&self) -> bool {
        false
    }

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

/// Refuses a buffer that is no whole number of pages, and pages that do not exist.
pub(crate) fn whole_pages(first: Gfn, into: &[u8]) -> Result<(), SourceError> {
    let bytes = into.len();
    if bytes == 0 || !(bytes as u64).is_multiple_of(PAGE_SIZE) {
        return Err(SourceError::Buffer { bytes });
    }
    match first.0.checked_add(bytes as u64 / PAGE_SIZE) {
        Some(_) => Ok(()),
        None => Err(SourceError::NoSuchPage { gfn: Gfn(u64::MAX) }),
    }
}
