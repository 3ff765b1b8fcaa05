// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A look at every access as it happens: the trace hook.
//!
//! Installed and removed at run time with [`IoBus::trace`](crate::IoBus::trace). It lives in the
//! published tables as devices do, so its absence costs the branch that counters cost too, and its
//! removal has the same promise: done means that no access is inside it any more.

use std::time::Duration;

use crate::dispatcher::Outcome;
use crate::range::BusKind;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From a device to the guest.
    Read,
    /// From the guest to a device.
    Write,
}

/// One access, or one piece of one, as it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access<'a> {
    /// The bus that answered, or the last that was asked.
    pub bus: BusKind,
    /// Where it began.
    pub address: u64,
    /// Read or write.
    pub direction: Direction,
    /// The bytes: of a read, as the guest will see them.
    pub data: &'a [u8],
    /// What became of it. One that was [deferred](Outcome::Deferred) is told again when its answer
    /// has come.
    pub outcome: Outcome,
    /// How long the devices took, if the hook asked for it. Of a deferred answer's second telling,
    /// `None`.
    pub duration: Option<Duration>,
}

/// Sees every access of a bus.
///
/// # Contract
///
/// Called on the vCPU's thread, inside the access: all that holds for a device's answer holds here.
/// It must not install or remove the hook and wait, for it would wait for itself; it gets a pending
/// token as a device does.
pub trait Trace: Send + Sync {
    /// An access has ended.
    fn access(&self, access: &Access<'_>);

    /// Whether accesses are to be timed: two readings of the clock each. Asked at each access.
    fn wants_duration(&self) -> bool {
        false
    }
}

impl<T: Trace + ?Sized> Trace for std::sync::Arc<T> {
    fn access(&self, access: &Access<'_>) {
        (**self).access(access);
    }

    fn wants_duration(&self) -> bool {
        (**self).wants_duration()
    }
}
