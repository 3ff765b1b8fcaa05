// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine whose memory comes while it runs ([`lazy`](crate::lazy)).

use std::sync::Arc;

use super::blank::Framed;
use super::{BuildError, Machine, Running};
use crate::arch::layout;
use crate::end::EndSignal;
use crate::file_pages;
use crate::lazy::{self, LazyError, LazyMemory, LazyProgress, LazyRequest, LazyStats};
use crate::migration::postcopy::ask::Later;
use crate::snapshot::RestoreError;

impl Framed {
    /// Waits for the one page that the restore itself writes by hand. Written before it is there and lost, it would be a
    /// `SIGBUS`; so it is an error.
    ///
    /// # Errors
    /// [`BuildError::Ended`]: why it does not come has been told to `end`. [`RestoreError::Memory`]: the guest was to go on
    /// without what is lost.
    pub(super) fn await_generation(&self, end: &EndSignal) -> Result<(), BuildError> {
        let memory = self.memory();
        let Some(region) = memory.find(layout::GENERATION_ID) else {
            return Ok(());
        };
        let at = layout::GENERATION_ID.0;
        let came = file_pages::find_in(region, at..at + 1);
        came.map_err(|error| {
            log::debug!("the generation id's page: {error}");
            match end.is_told() {
                true => BuildError::Ended,
                false => BuildError::from(RestoreError::Memory {
                    address: at,
                    why: "it does not come, and the machine needs it before there is a guest, which alone could go on without \
                          (--on-loss poison)"
                        .into(),
                }),
            }
        })
    }
}

impl Framed {
    /// Whether its memory, which is empty, could come when it runs.
    ///
    /// # Errors
    /// [`LazyError`], with the remedy.
    pub(crate) fn can_come_later(&self) -> Result<(), LazyError> {
        lazy::check(self.memslots())
    }

    /// Has some of its memory come later.
    ///
    /// # Errors
    /// [`LazyError`]; the machine is of no use then.
    pub(crate) fn come_later(
        &self,
        request: &LazyRequest,
        later: Later,
        end: &Arc<EndSignal>,
    ) -> Result<LazyMemory, LazyError> {
        LazyMemory::arrive(request, later, self.memslots(), end)
    }
}

impl Machine {
    /// Some of its memory comes later, or none does.
    pub(crate) fn set_lazy(&mut self, lazy: Option<LazyMemory>) {
        self.parts.lazy = lazy;
    }
}

impl Running {
    /// Its memory, if that comes while it runs.
    pub(crate) fn lazy(&self) -> Option<&LazyMemory> {
        self.parts.lazy.as_ref()
    }

    /// How far its memory has come, of a machine that was restored so.
    pub fn lazy_progress(&self) -> Option<LazyProgress> {
        self.lazy().map(LazyMemory::progress)
    }

    /// What its memory's coming took, of a machine that was restored so.
    pub fn lazy_stats(&self) -> Option<LazyStats> {
        self.lazy().map(LazyMemory::stats)
    }

    /// Has all of its memory brought, at full speed, and waits for that: what reads memory behind this waits for no page.
    /// Of memory that another process brings nothing is known: it comes as it is read. Whether what the guest touches first
    /// was being recorded, which ends with this.
    ///
    /// # Errors
    /// [`LazyError`]: some of it does not come, or the guest has ended.
    pub fn settle_memory(&self) -> Result<bool, LazyError> {
        self.settle_memory_while(&|| true)
    }

    /// The same, for as long as it is `wanted`.
    ///
    /// # Errors
    /// [`LazyError`], as above; [`LazyError::Unwanted`].
    pub(crate) fn settle_memory_while(&self, wanted: &dyn Fn() -> bool) -> Result<bool, LazyError> {
        self.lazy().map_or(Ok(false), |lazy| {
            lazy.settle(|| !self.is_stopping(), wanted)
        })
    }
}
