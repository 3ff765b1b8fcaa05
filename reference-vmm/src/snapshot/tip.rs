// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which snapshot the next incremental one of a machine that runs builds on: the last that was taken of it, or that it was
//! restored from, from whose moment on its writes are tracked.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

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
    /// Before `tip`, which only who has begun takes, and so at once.
    taken: Mutex<Option<How>>,
    /// One taken in a pause is done.
    done: Condvar,
    tip: Mutex<Option<Tip>>,
    /// Every snapshot begins to track.
    always: AtomicBool,
}

/// How a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    InPause,
    Background,
}

/// The end of the chain, for the one that takes a snapshot.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    // Before it is said that it is done: the next one waits for nothing then.
    tip: MutexGuard<'a, Option<Tip>>,
    _begun: Begun<'a>,
}

/// One is taken. Dropped, another may be.
#[derive(Debug)]
struct Begun<'a>(&'a ChainTip);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        *self.0.taken() = None;
        self.0.done.notify_all();
    }
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

impl ChainTip {
    /// Who holds it is the one that takes a snapshot; what is in it is none where writes are not tracked. Waits for one
    /// that is taken in a pause; none as soon as one is taken in the background.
    pub(crate) fn lock(&self) -> Option<Hold<'_>> {
        let taken = self
            .done
            .wait_while(self.taken(), |taken| *taken == Some(How::InPause));
        self.begin(taken.unwrap_or_else(PoisonError::into_inner), How::InPause)
    }

    /// The same for one in the background; none while another is taken.
    pub(crate) fn try_lock(&self) -> Option<Hold<'_>> {
        self.begin(self.taken(), How::Background)
    }

    fn begin(&self, mut taken: MutexGuard<'_, Option<How>>, how: How) -> Option<Hold<'_>> {
        if taken.is_some() {
            return None;
        }
        *taken = Some(how);
        drop(taken);
        let begun = Begun(self);
        // What is in it is whole after each statement.
        let tip = self.tip.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Hold { tip, _begun: begun })
    }

    fn taken(&self) -> MutexGuard<'_, Option<How>> {
        // As above.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn track_always(&self) {
        // Relaxed: said before the machine runs.
        self.always.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_tracking_always(&self) -> bool {
        self.always.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_one_in_a_pause_is_told_of_one_in_the_background_that_came_first() {
        let chain = ChainTip::default();
        let background = chain.try_lock();
        assert!(background.is_some());
        assert!(chain.lock().is_none() && chain.try_lock().is_none());
        drop(background);
        let in_pause = chain.lock().unwrap();
        assert!(chain.try_lock().is_none());
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| chain.lock().is_some());
            drop(in_pause);
            // Whoever of the two comes first, and it is held while the other is waited for.
            let background = chain.try_lock();
            let waited = waits.join().unwrap();
            assert!(waited || background.is_some());
        });
        assert!(chain.try_lock().is_some());
    }
}
