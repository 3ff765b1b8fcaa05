// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration needs of the guest on either side, so that the conversation can be had without one.

use std::ops::Range;
use std::sync::Arc;

use async_pf::PageSource;
use dirty_log::estimate::Throttle;
use vm_memory::VolatileSlice;

use super::pages::Lent;
use super::postcopy::ask::Later;

/// A step that the guest's side refused, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

impl Refusal {
    /// Of an error and its sources.
    pub fn of(error: &dyn std::error::Error) -> Self {
        Refusal(crate::end::Chain(error).to_string())
    }
}

/// Pages that were written.
pub trait Dirty: Sync {
    /// How many.
    fn pages(&self) -> u64;
    /// Calls `each` with every run of them, guest physical addresses, in order, until it says false.
    fn runs(&self, each: &mut dyn FnMut(Range<u64>) -> bool);
    /// They have arrived: forgets them. Dropped instead, they are dirty still.
    fn commit(self);
}

/// The guest on the source. Calls come from one thread, but for [`read`](Self::read), [`lend`](Self::lend) and
/// [`holes`](Self::holes).
///
/// ```text
///   runs ──► start_tracking ──► tracked ──► hold ──► held ──► release ──► let go of
///    ▲ ◄──── stop_tracking ◄──────┘          │                   │
///    └──────────────── take_back ◄───────────┴───────────────────┘
/// ```
pub trait SourceGuest: Sync {
    /// What a harvest finds.
    type Dirty<'a>: Dirty
    where
        Self: 'a;

    /// Bytes of guest memory.
    fn memory(&self) -> u64;
    /// Why there is nothing to migrate any more: the guest has ended.
    fn over(&self) -> Option<String>;
    /// Somebody has paused it, and it stays so until it is resumed.
    fn is_paused(&self) -> bool {
        false
    }
    /// The machine as it is now, in the form of a snapshot's file `state`, with the guest stopped for it shortly.
    ///
    /// # Errors
    /// [`Refusal`]; the guest runs on.
    fn rehearse(&self) -> Result<Vec<u8>, Refusal>;
    /// From here on what is written is known. The first harvest is of all pages.
    ///
    /// # Errors
    /// [`Refusal`].
    fn start_tracking(&self) -> Result<(), Refusal>;
    /// No more. It is not asked of a guest that has gone.
    fn stop_tracking(&self);
    /// What was written since the last harvest that was committed.
    ///
    /// # Errors
    /// [`Refusal`].
    fn harvest(&self) -> Result<Self::Dirty<'_>, Refusal>;
    /// Of these pages, those that are zero because nothing has ever been put there, in order; as far as that is known
    /// without reading them. It is asked behind the harvest that they are of, so what is put there later is in the next.
    fn holes(&self, _: Range<u64>) -> Vec<Range<u64>> {
        Vec::new()
    }
    /// Reads guest memory.
    ///
    /// # Errors
    /// [`Refusal`].
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Refusal>;
    /// Calls `with` once with the memory of these pages, all of them and in their order, where it is memory of this process;
    /// or says false, and it is [`read`](Self::read). The guest goes on to write there.
    ///
    /// # Errors
    /// [`Refusal`]; `with` was not called.
    fn lend(
        &self,
        _pages: &[Range<u64>],
        _with: &mut dyn FnMut(&[Lent<'_>]),
    ) -> Result<bool, Refusal> {
        Ok(false)
    }
    /// The memory as it will be when the guest is held, for who serves it to the destination for as long as that asks: behind
    /// the hand-over, too. It is read on threads of its own.
    ///
    /// # Errors
    /// [`Refusal`]: it cannot be served.
    fn serve(&self) -> Result<Arc<dyn PageSource>, Refusal> {
        Err(Refusal("its memory cannot be served page by page".into()))
    }
    /// Has each vCPU sleep this part of its time from now on; with [`Throttle::NONE`] it is lifted.
    ///
    /// # Errors
    /// [`Refusal`]; what was in force still is. There is none for lifting it.
    fn throttle(&self, throttle: Throttle) -> Result<(), Refusal>;
    /// Stops the guest; from here on nobody else lets it go on.
    ///
    /// # Errors
    /// [`Refusal`]; it runs on.
    fn hold(&self) -> Result<(), Refusal>;
    /// The machine that is held, as [`Blank::prepare`] takes it.
    ///
    /// # Errors
    /// [`Refusal`].
    fn state(&self) -> Result<Vec<u8>, Refusal>;
    /// Lets go of what only one can have: the locks of its disks.
    ///
    /// # Errors
    /// [`Refusal`]; all are held still.
    fn release(&self) -> Result<(), Refusal>;
    /// Takes back what was released, and has the guest go on if it ran before it was held. It may be asked again after an
    /// error.
    ///
    /// # Errors
    /// [`Refusal`]; the guest is held still.
    fn take_back(&self) -> Result<(), Refusal>;
}

/// Memory of a machine that is to be.
pub trait ArrivingMemory: Sync {
    /// Writes what came. Threads call it at once, never for the same page.
    ///
    /// # Errors
    /// [`Refusal`]: there is no such memory, or it cannot be written.
    fn page(&self, address: u64, bytes: &[u8]) -> Result<(), Refusal>;
    /// Calls `fill` once with the memory of these runs of pages, all of them and in their order, where it is memory of this
    /// process; or says false, and they come by [`page`](Self::page). A connection that breaks meanwhile leaves a part of what
    /// was to come there: nobody runs in this memory yet, and it is thrown away then.
    ///
    /// # Errors
    /// As of [`page`](Self::page), and `fill` was not called.
    fn lend(
        &self,
        _runs: &[Range<u64>],
        _fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> Result<bool, Refusal> {
        Ok(false)
    }
    /// Makes `len` bytes zero.
    ///
    /// # Errors
    /// As of [`page`](Self::page).
    fn zero(&self, address: u64, len: u64) -> Result<(), Refusal>;
    /// Has what came so far where the guest finds it without an exit, as far as the host can do that, and returns when that
    /// is done or soon after `enough`. More may come meanwhile.
    fn pre_fault(&self, _enough: &dyn Fn() -> bool) {}
}

/// What makes the machine on the destination. Dropped at any point, nothing of it is left.
pub trait DestinationGuest {
    /// A machine whose memory is there.
    type Blank: Blank;
    /// Who offers it, before that is heard; none where the connection cannot tell.
    fn is_from(&mut self, _source: Option<String>) {}
    /// Makes it for the machine that is offered, if such a one can be here.
    ///
    /// # Errors
    /// [`Refusal`]: the host cannot have it. Nothing is left.
    fn offered(self, state: &[u8]) -> Result<Self::Blank, Refusal>;
}

/// A machine whose memory is there, and whose state is to come.
pub trait Blank: Sized {
    /// Its memory.
    type Memory<'a>: ArrivingMemory
    where
        Self: 'a;
    /// With its state.
    type Prepared: Prepared;
    /// Where pages go.
    fn memory(&self) -> Self::Memory<'_>;
    /// Whether the guest could run here before all of its memory is. Asked before the first page comes.
    ///
    /// # Errors
    /// [`Refusal`], with the remedy.
    fn can_come_later(&self) -> Result<(), Refusal> {
        Err(Refusal("memory cannot come later here".into()))
    }
    /// As [`prepare`](Self::prepare), where some of the memory comes later. What of it came in a round is not what it should
    /// be: nobody reads that.
    ///
    /// # Errors
    /// As of [`prepare`](Self::prepare).
    fn prepare_later(self, _state: &[u8], _later: Later) -> Result<Self::Prepared, Refusal> {
        Err(Refusal("memory cannot come later here".into()))
    }
    /// Makes it whole, disks locked and threads made, and does all that can fail: what fails behind it is a guest lost. Nothing
    /// of the guest runs yet.
    ///
    /// # Errors
    /// [`Refusal`]; nothing is left.
    fn prepare(self, state: &[u8]) -> Result<Self::Prepared, Refusal>;
}

/// A machine that one word starts.
pub trait Prepared {
    /// A machine that runs.
    type Running;
    /// Has the guest go on, which is no more than to let go of what holds it.
    ///
    /// # Errors
    /// [`Refusal`]: this machine was stopped meanwhile. The guest is lost, as if its monitor had ended.
    fn start(self) -> Result<Self::Running, Refusal>;
}
