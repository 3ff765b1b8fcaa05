// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one place where the crate takes its atomics, fences and locks from: `std`, or loom under `--cfg loom`, so that
//! what the models explore is the code that ships. `Arc` stays std's in both: none of its orderings is relied upon.

#[cfg(not(loom))]
mod imp {
    pub(crate) use std::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU64, Ordering, compiler_fence, fence,
    };
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::atomic::compiler_fence;
}

pub(crate) use imp::*;
use std::sync::PoisonError;

/// Locks, whether or not a holder panicked: every critical section of this crate leaves its data whole at each step,
/// and the one that runs a caller's closure (`update`) changes nothing before the closure has returned.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar`, poison ignored as in [`lock`].
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}
