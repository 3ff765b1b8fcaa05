// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Several sources on one line of the in-kernel irqchip: devices that share a level-triggered
//! interrupt.
//!
//! KVM ORs the sources that are its own (`kvm_request_irq_source_id`) and takes all of user space
//! for one of them, so that the last call decides. Here user space's sources are ORed first.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use crate::error::Error;
use crate::host::SetIrqLine;
use crate::level::Level;
use crate::line::{Arrival, LevelSource, Line};
use crate::routing::GsiHandle;
use crate::wait::Wait;

/// A [`Line`] that is high while any of its sources is. Clones are the same line.
#[derive(Debug)]
pub struct SharedLine<H: SetIrqLine> {
    inner: Arc<Inner<H>>,
}

#[derive(Debug)]
struct Inner<H: SetIrqLine> {
    line: Line<H>,
    /// How many sources are high. Held across the ioctl, so that what KVM was told last is what it
    /// says.
    high: Mutex<usize>,
}

impl<H: SetIrqLine> Line<H> {
    /// Makes the line one with any number of sources. It is lowered first if it is high.
    ///
    /// # Errors
    ///
    /// [`Error::Line`], with the line, still high.
    pub fn share(self) -> Result<SharedLine<H>, (Self, Error)> {
        if let Err(error) = self.lower() {
            return Err((self, error));
        }
        let high = Mutex::new(0);
        let inner = Arc::new(Inner { line: self, high });
        Ok(SharedLine { inner })
    }
}

impl<H: SetIrqLine> SharedLine<H> {
    /// One more source, low. Asks nothing of the kernel.
    pub fn source(&self) -> LineSource<H> {
        LineSource {
            line: self.clone(),
            level: Level::default(),
        }
    }

    /// The GSI.
    pub fn gsi(&self) -> &GsiHandle {
        self.inner.line.gsi()
    }
}

impl<H: SetIrqLine> Clone for SharedLine<H> {
    fn clone(&self) -> Self {
        let inner = Arc::clone(&self.inner);
        Self { inner }
    }
}

/// One source of a [`SharedLine`]. Dropped while high, it is lowered.
#[derive(Debug)]
pub struct LineSource<H: SetIrqLine> {
    line: SharedLine<H>,
    // Locked before the line's count.
    level: Level,
}

impl<H: SetIrqLine> LineSource<H> {
    /// Sets the source's level. Each rise is told to KVM, which says what became of it; a fall only
    /// when no other source holds the line high, and is else [`Arrival::Delivered`] to one.
    ///
    /// # Errors
    ///
    /// [`Error::Line`]; the source's level is what it was.
    pub fn set(&self, level: bool) -> Result<Arrival, Error> {
        self.set_with(level, Wait::Allowed)
    }

    /// The same, and never waits for another thread that sets this source or the line.
    ///
    /// # Errors
    ///
    /// [`Error::WouldBlock`], [`Error::Line`]; the source's level is what it was.
    pub fn try_set(&self, level: bool) -> Result<Arrival, Error> {
        self.set_with(level, Wait::Never)
    }

    /// The line.
    pub fn line(&self) -> &SharedLine<H> {
        &self.line
    }

    fn set_with(&self, level: bool, wait: Wait) -> Result<Arrival, Error> {
        let mut held = self.level.hold(wait)?;
        held.set(level, |was, level| self.tell(was, level, wait))
    }

    fn tell(&self, was: bool, level: bool, wait: Wait) -> Result<Arrival, Error> {
        let mut count = wait.lock(&self.line.inner.high)?;
        let others = *count - usize::from(was);
        let arrival = if level || others == 0 {
            self.line.inner.line.set_with(level, wait)?
        } else {
            Arrival::Delivered { to: 1 }
        };
        *count = others + usize::from(level);
        Ok(arrival)
    }
}

impl<H: SetIrqLine + Send + Sync> LevelSource for LineSource<H> {
    fn set(&self, level: bool) -> Result<Arrival, Error> {
        LineSource::set(self, level)
    }

    fn try_set(&self, level: bool) -> Result<Arrival, Error> {
        LineSource::try_set(self, level)
    }
}

impl<H: SetIrqLine> Drop for LineSource<H> {
    fn drop(&mut self) {
        let wait = Wait::Allowed;
        let Ok(mut level) = self.level.hold(wait) else {
            return;
        };
        let lowered = level.lower(|was, level| self.tell(was, level, wait));
        // KVM has no reason to refuse a level that it took before. If it did, this source is no
        // longer one all the same: the next change of the line lowers it.
        if lowered.is_err()
            && let Ok(mut high) = wait.lock(&self.line.inner.high)
        {
            *high -= 1;
        }
    }
}
