// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the pager takes its locks and its clock from: `std`, or loom under `--cfg loom`. There the clock stands still,
//! and a wait with a limit may end at once, as one whose time is over: so no deadline passes in a model, and nothing may
//! depend on how long something takes.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

#[cfg(not(loom))]
mod imp {
    pub(crate) use std::sync::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    };
    pub(crate) use std::thread::{ThreadId, sleep, yield_now};

    pub(crate) fn thread_id() -> ThreadId {
        std::thread::current().id()
    }

    pub(crate) fn now() -> super::Instant {
        super::Instant::now()
    }
}

#[cfg(loom)]
mod imp {
    use std::sync::OnceLock;

    pub(crate) use loom::sync::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    };
    pub(crate) use loom::thread::{ThreadId, yield_now};

    pub(crate) fn thread_id() -> ThreadId {
        loom::thread::current().id()
    }

    pub(crate) fn sleep(_: super::Duration) {
        yield_now();
    }

    pub(crate) fn now() -> super::Instant {
        static ALWAYS: OnceLock<super::Instant> = OnceLock::new();
        *ALWAYS.get_or_init(super::Instant::now)
    }
}

pub(crate) use imp::*;

/// Waits for `condvar`, for so long at most. `mutex` is the guard's.
#[cfg(not(loom))]
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    _mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    limit: Duration,
) -> MutexGuard<'a, T> {
    let waited = condvar.wait_timeout(guard, limit);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

/// As above.
#[cfg(loom)]
pub(crate) fn wait_timeout<'a, T>(
    _condvar: &Condvar,
    mutex: &'a Mutex<T>,
    guard: MutexGuard<'a, T>,
    _limit: Duration,
) -> MutexGuard<'a, T> {
    drop(guard);
    yield_now();
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
