// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the code that is model-checked takes its atomics and its lock from: `std`, or loom under `--cfg loom`.

#[cfg(not(loom))]
mod imp {
    pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
    pub(crate) use std::sync::{Mutex, MutexGuard};
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
}

pub(crate) use imp::*;
use std::sync::PoisonError;

/// Locks, whether or not a holder panicked: for sections that cannot.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
