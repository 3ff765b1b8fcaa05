// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a pager was not started, took no guess, or was not finished.

use std::io;
use std::ops::Range;

use memslots::Gfn;
use memslots::uffd::{Features, LendError};

use super::Pager;

/// Why a slot cannot be paged, or a pager was not started. Nothing has changed then, and no role is lent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// Somebody else fills the registration, or it has no mode for it.
    #[error(transparent)]
    Lend(#[from] LendError),
    /// The guest's pages end beyond the last there can be.
    #[error("{pages} pages of {page_size:#x} bytes from gfn {:#x} on end beyond the last gfn", first.0)]
    Wraps {
        /// The first.
        first: Gfn,
        /// How many.
        pages: u64,
        /// Their size, in bytes.
        page_size: u64,
    },
    /// There is no slot.
    #[error("a pager without a slot")]
    NoSlot,
    /// Pages that do not come are to be poisoned, and the kernel cannot.
    #[error(
        "this kernel's userfaultfd lacks {feature}, which GiveUp::Poison needs: choose GiveUp::Tell"
    )]
    NoPoison {
        /// What it lacks.
        feature: Features,
    },
    /// The pipe that ends the threads' waits cannot be made.
    #[error("cannot make the pager's pipe: {0}")]
    Pipe(io::Error),
    /// A thread cannot be made.
    #[error("cannot make the thread {name}: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Why pages were not put in line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrefetchError {
    /// The pager has no such slot.
    #[error("there is no slot {slot}: the pager has {slots}")]
    NoSlot {
        /// The place asked for.
        slot: usize,
        /// How many there are.
        slots: usize,
    },
    /// They are not in the slot.
    #[error("gfns {:#x}..{:#x} are not all in {:#x}..{:#x}", gfns.start, gfns.end, of.start, of.end)]
    OutOfRange {
        /// The pages, by number.
        gfns: Range<u64>,
        /// Those of the slot.
        of: Range<u64>,
    },
    /// So many ranges are in line that one more helps nobody: later.
    #[error("{bound} ranges are in line already")]
    Backlog {
        /// The bound.
        bound: usize,
    },
}

/// Not everything is there: here is the pager again, which goes on. Dropped, it takes the pager with it, and what is missing is
/// poisoned: see [`Pager::finish`].
#[must_use = "dropping it drops the pager, which poisons what is missing"]
#[derive(Debug, thiserror::Error)]
#[error("{missing} pages are still to come")]
#[non_exhaustive]
pub struct FinishError {
    /// It.
    pub pager: Pager,
    /// How many pages are missing, of their registration's size.
    pub missing: u64,
}
