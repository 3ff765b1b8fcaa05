// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The level that a source of an interrupt was set to last.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::line::Arrival;

/// A source's level, low at first. It is held while the controller is told, so that what it says is what the controller
/// was told last.
#[derive(Debug, Default)]
pub(crate) struct Level(Mutex<bool>);

impl Level {
    /// Sets it: `tell` takes the level from what it was to what it is to be. If that fails, it is what it was.
    pub(crate) fn set(
        &self,
        level: bool,
        tell: impl FnOnce(bool, bool) -> Result<Arrival, Error>,
    ) -> Result<Arrival, Error> {
        put(&mut self.high(), level, tell)
    }

    /// Raises it and lowers it; what became of the rise.
    pub(crate) fn pulse(
        &self,
        tell: impl Fn(bool, bool) -> Result<Arrival, Error>,
    ) -> Result<Arrival, Error> {
        let mut high = self.high();
        let arrival = put(&mut high, true, &tell)?;
        put(&mut high, false, &tell)?;
        Ok(arrival)
    }

    /// Lowers it if it is high.
    pub(crate) fn lower(
        &self,
        tell: impl FnOnce(bool, bool) -> Result<Arrival, Error>,
    ) -> Result<(), Error> {
        let mut high = self.high();
        if *high {
            put(&mut high, false, tell)?;
        }
        Ok(())
    }

    fn high(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn put(
    high: &mut bool,
    level: bool,
    tell: impl FnOnce(bool, bool) -> Result<Arrival, Error>,
) -> Result<Arrival, Error> {
    let arrival = tell(*high, level)?;
    *high = level;
    Ok(arrival)
}
