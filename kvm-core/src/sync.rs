// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The primitives that the lifecycle is built on: the standard library's, or loom's twins of them
//! under `--cfg loom`, where every interleaving and every allowed stale read is tried.
//!
//! `Arc` is always the standard one: no ordering in this crate leans on a reference count.

#[cfg(all(not(loom), any(test, feature = "test-utilities")))]
pub(crate) use std::sync::atomic::AtomicU8;
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU32, AtomicU64, fence},
};

#[cfg(all(loom, any(test, feature = "test-utilities")))]
pub(crate) use loom::sync::atomic::AtomicU8;
#[cfg(loom)]
pub(crate) use loom::sync::{
    Condvar, Mutex, MutexGuard,
    atomic::{AtomicU32, AtomicU64, fence},
};

#[cfg(loom)]
pub(crate) use loom::thread;
#[cfg(not(loom))]
pub(crate) use std::thread;

pub(crate) use std::sync::atomic::Ordering;
use std::time::Duration;

#[cfg(loom)]
pub(crate) use loom::thread_local;
#[cfg(not(loom))]
pub(crate) use std::thread_local;

/// Locks. Nothing panics while one of this crate's locks is held, so a poisoned one (a consumer's
/// panic can only unwind through a moment without locks) is as good as a clean one.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

/// Waits on `condvar`; may wake spuriously, so callers loop on their condition.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    match condvar.wait(guard) {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

/// As [`wait`], but for `patience` at most. Loom's twin knows no time, and waits like [`wait`].
pub(crate) fn wait_for<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    patience: Duration,
) -> MutexGuard<'a, T> {
    match condvar.wait_timeout(guard, patience) {
        Ok((guard, _)) => guard,
        Err(poisoned) => poisoned.into_inner().0,
    }
}
