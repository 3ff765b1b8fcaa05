// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which snapshot the next incremental one of a machine that runs builds on: the last that was taken of it, or that it was
//! restored from, from whose moment on its writes are tracked.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

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
    /// One is taken in the background.
    background: AtomicBool,
}

/// The end of the chain, for the one that takes a snapshot.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    tip: MutexGuard<'a, Option<Tip>>,
    of: Option<&'a AtomicBool>,
}

impl Deref for Hold<'_> {
    type Target = Option<Tip>;

    fn deref(&self) -> &Option<Tip> {
        &self.tip
    }
}

impl DerefMut for Hold<'_> {
    fn deref_mut(&mut self) -> &mut Option<Tip> {
        &mut self.tip
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if let Some(background) = self.of {
            background.store(false, Ordering::Relaxed);
        }
    }
}

impl ChainTip {
    /// Who holds it is the one that takes a snapshot; what is in it is none where writes are not tracked. Waits for one
    /// that is taken in a pause; none while one is taken in the background.
    pub(crate) fn lock(&self) -> Option<Hold<'_>> {
        // Relaxed: who misses it waits, and that is all.
        if self.background.load(Ordering::Relaxed) {
            return None;
        }
        // What is in it is whole after each statement.
        let tip = self.tip.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Hold { tip, of: None })
    }

    /// The same for one in the background; none while another is taken.
    pub(crate) fn try_lock(&self) -> Option<Hold<'_>> {
        let tip = match self.tip.try_lock() {
            Ok(tip) => tip,
            Err(TryLockError::Poisoned(tip)) => tip.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        self.background.store(true, Ordering::Relaxed);
        let of = Some(&self.background);
        Some(Hold { tip, of })
    }

    pub(crate) fn track_always(&self) {
        // Relaxed: said before the machine runs.
        self.always.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_tracking_always(&self) -> bool {
        self.always.load(Ordering::Relaxed)
    }
}
