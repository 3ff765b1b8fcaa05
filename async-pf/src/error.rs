// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong, with the values that did.

use memslots::Gfn;

use crate::{PageEvent, PageState, Token};

/// Why a call failed. A call that fails has changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The vCPU waits for as many pages as it may: let this fault be served synchronously.
    #[error("vCPU {vcpu} waits for {bound} pages already")]
    QueueFull {
        /// The vCPU.
        vcpu: u16,
        /// Its bound.
        bound: usize,
    },
    /// A token cannot hold this vCPU's number.
    #[error("vCPU {vcpu} is beyond {max}, the last that a token can name")]
    VcpuTooLarge {
        /// The number given.
        vcpu: u16,
        /// The largest there is.
        max: u16,
    },
    /// A vCPU waits for so few pages at most that a queue of so many is a mistake, and one that there is no memory for.
    #[error("a bound of {bound} pages is beyond {max}")]
    Bound {
        /// The bound given.
        bound: usize,
        /// The largest there is.
        max: usize,
    },
    /// So many pages are no slot's: their bookkeeping is beyond memory.
    #[error("{pages} pages are beyond {max}, the most that a schedule has")]
    TooManyPages {
        /// How many were given.
        pages: u64,
        /// The most there are.
        max: u64,
    },
    /// Nothing waits under this token: it was cleared, or told already.
    #[error("no page is awaited under token {:#x}", token.get())]
    StaleToken {
        /// The token.
        token: Token,
    },
    /// The page is not one of this schedule's.
    #[error("gfn {:#x} is not in {first:#x}..{end:#x}", gfn.0)]
    OutOfRange {
        /// The page.
        gfn: Gfn,
        /// The schedule's first page.
        first: u64,
        /// One past its last page.
        end: u64,
    },
    /// So many guesses are in line that one more helps nobody.
    #[error("{bound} prefetches are in line already")]
    Backlog {
        /// The bound.
        bound: usize,
    },
    /// The page is not in a state in which this can happen to it.
    #[error("gfn {:#x} is {state:?}: {event:?} cannot happen to it", gfn.0)]
    Transition {
        /// The page.
        gfn: Gfn,
        /// Its state.
        state: PageState,
        /// What was asked.
        event: PageEvent,
    },
}
