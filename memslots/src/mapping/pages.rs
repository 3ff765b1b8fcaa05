// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What happens to a mapping's pages without a write, and who cannot bear it: a [`PointInTime`](crate::uffd::PointInTime)
//! keeps what pages hold by their protection, and a page that is given back, or merged with another, loses that without a
//! word.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// One of all that was cut from the same memory.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    state: Mutex<State>,
    /// Fewer are giving pages back.
    fewer: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Those that keep what pages hold.
    keepers: usize,
    /// Those that are giving pages back.
    discards: usize,
    /// Pages are merged with equal ones.
    mergeable: bool,
}

impl Pages {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages may be given back until what is returned is dropped; none where somebody keeps what they hold. Does not
    /// block.
    pub fn discard(self: &Arc<Self>) -> Option<Discarding> {
        let mut state = self.lock();
        if state.keepers > 0 {
            return None;
        }
        state.discards += 1;
        Some(Discarding(Arc::clone(self)))
    }

    /// Pages are given to the kernel to be merged by `advise`, for good where that succeeds; none where somebody keeps
    /// what they hold.
    pub fn merge<E>(&self, advise: impl FnOnce() -> Result<(), E>) -> Option<Result<(), E>> {
        let mut state = self.lock();
        if state.keepers > 0 {
            return None;
        }
        let advised = advise();
        state.mergeable |= advised.is_ok();
        Some(advised)
    }

    /// No page is given back or merged until what is returned is dropped; none where they are merged. Waits for who is
    /// giving some back.
    #[cfg(feature = "uffd")]
    pub fn keep(self: &Arc<Self>) -> Option<Keeping> {
        let mut state = self.lock();
        if state.mergeable {
            return None;
        }
        // Nobody begins any more.
        state.keepers += 1;
        while state.discards > 0 {
            let waited = self.fewer.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Some(Keeping(Arc::clone(self)))
    }
}

/// Pages are being given back.
#[must_use]
pub(crate) struct Discarding(Arc<Pages>);

impl Drop for Discarding {
    fn drop(&mut self) {
        self.0.lock().discards -= 1;
        self.0.fewer.notify_all();
    }
}

/// Pages stay.
#[cfg(feature = "uffd")]
#[must_use]
pub(crate) struct Keeping(Arc<Pages>);

#[cfg(feature = "uffd")]
impl Drop for Keeping {
    fn drop(&mut self) {
        self.0.lock().keepers -= 1;
    }
}

#[cfg(all(test, feature = "uffd"))]
mod tests {
    use super::*;

    #[test]
    fn who_keeps_pages_waits_for_those_that_give_some_back_and_lets_nobody_begin() {
        let pages = Arc::new(Pages::default());
        let (first, second) = (pages.discard().unwrap(), pages.discard().unwrap());
        std::thread::scope(|scope| {
            let keeping = scope.spawn(|| pages.keep().unwrap());
            // It waits, and nobody begins any more.
            while let Some(more) = pages.discard() {
                drop(more);
                std::thread::yield_now();
            }
            drop(first);
            assert!(!keeping.is_finished());
            drop(second);
            let keeping = keeping.join().unwrap();
            assert!(pages.discard().is_none());
            assert!(pages.merge(|| Ok::<_, ()>(())).is_none());
            drop(keeping);
        });
        assert!(pages.discard().is_some());
        assert_eq!(pages.merge(|| Err(())), Some(Err(())));
        assert!(pages.keep().is_some());
        assert_eq!(pages.merge(|| Ok::<_, ()>(())), Some(Ok(())));
        assert!(pages.keep().is_none());
    }
}
