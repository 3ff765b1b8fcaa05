// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a change hands back: whether an access that began before it can still be under way.

use std::fmt;

use srcu::Grace;

use crate::inside::is_inside_access;

/// Whether a device that was taken off its range can still be in an access that began before.
#[derive(Debug)]
#[must_use = "while a removal is pending, an access may still be inside the device"]
pub enum Removal {
    /// No access is inside the device any more, and none will be.
    Done,
    /// The caller is itself inside an access, so nobody waited. No further access will see the
    /// device; the bus drops it when those that had begun have ended.
    Pending(Pending),
}

impl Removal {
    /// Whether no access can be inside the device any more.
    pub fn is_done(&self) -> bool {
        match self {
            Removal::Done => true,
            Removal::Pending(pending) => pending.is_over(),
        }
    }
}

/// The accesses that had begun when a device was taken off its range.
///
/// Dropping this is fine: the bus lets go of the device in any case.
#[must_use = "an access may still be inside the device"]
pub struct Pending {
    /// None if there was nothing to wait for.
    pub(crate) grace: Option<Grace>,
}

impl Pending {
    /// Whether all of them have ended. Never blocks.
    pub fn is_over(&self) -> bool {
        self.grace.as_ref().is_none_or(Grace::is_over)
    }

    /// Blocks until all of them have ended; inside an access it does not block, and answers
    /// [`Removal::Pending`] unless they have.
    pub fn wait(self) -> Removal {
        if self.is_over() {
            return Removal::Done;
        }
        if is_inside_access() {
            return Removal::Pending(self);
        }
        if let Some(grace) = self.grace {
            grace.wait();
        }
        Removal::Done
    }

    /// Has `f` run when all of them have ended: here and now if they have, otherwise on the thread
    /// that finds it out first, which may be a vCPU's as it leaves its access. So keep it short;
    /// it must not wait for an access.
    pub fn then(self, f: impl FnOnce() + Send + 'static) {
        match self.grace {
            Some(grace) => grace.defer(f),
            None => f(),
        }
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("is_over", &self.is_over())
            .finish()
    }
}
