// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which snapshot the next incremental one of a machine that runs builds on: the last that was taken of it, or that it was
//! restored from, from whose moment on its writes are tracked.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::format::SnapshotId;

/// The end of the machine's chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tip {
    pub(crate) id: SnapshotId,
    /// How many snapshots there are before it.
    pub(crate) depth: u32,
    /// Where it was put.
    pub(crate) dir: PathBuf,
}

/// What a machine knows of its chain.
#[derive(Debug, Default)]
pub(crate) struct ChainTip {
    tip: Mutex<Option<Tip>>,
    /// Every snapshot begins to track.
    always: AtomicBool,
}

impl ChainTip {
    /// None: writes are not tracked. Who holds it is the one that takes a snapshot.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Option<Tip>> {
        // What is in it is whole after each statement.
        self.tip.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn track_always(&self) {
        // Relaxed: said before the machine runs.
        self.always.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_tracking_always(&self) -> bool {
        self.always.load(Ordering::Relaxed)
    }
}
