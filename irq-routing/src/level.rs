// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The level that a source of an interrupt was set to last.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard};

use crate::error::Error;
use crate::line::Arrival;
use crate::wait::Wait;

/// A source's level, low at first. It is held while the controller is told, so that what it says is what the controller
/// was told last.
#[derive(Debug, Default)]
pub(crate) struct Level(Mutex<bool>);

impl Level {
    /// Holds it, so that no other thread sets it meanwhile.
    pub(crate) fn hold(&self, wait: Wait) -> Result<Held<'_>, Error> {
        wait.lock(&self.0).map(Held)
    }
}

/// A level that is this thread's to set.
pub(crate) struct Held<'a>(MutexGuard<'a, bool>);

impl Held<'_> {
    /// Sets it: `tell` takes the level from what it was to what it is to be. If that fails, it is what it was.
    pub(crate) fn set(
        &mut self,
        level: bool,
        tell: impl FnOnce(bool, bool) -> Result<Arrival, Error>,
    ) -> Result<Arrival, Error> {
        let arrival = tell(*self.0, level)?;
        *self.0 = level;
        Ok(arrival)
    }

    /// Lowers it if it is high.
    pub(crate) fn lower(
        &mut self,
        tell: impl FnOnce(bool, bool) -> Result<Arrival, Error>,
    ) -> Result<(), Error> {
        if *self.0 {
            self.set(false, tell)?;
        }
        Ok(())
    }
}
