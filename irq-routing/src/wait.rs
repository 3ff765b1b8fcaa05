// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a call may wait: what tells `set` from `try_set`.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use crate::error::Error;

/// May a call wait, for a lock or for a grace period?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Yes.
    Allowed,
    /// No: [`Error::WouldBlock`] where it would have to.
    Never,
}

impl Wait {
    /// Takes a lock. What it guards is whole after a panic, as every lock's of this crate is.
    pub(crate) fn lock<T>(self, mutex: &Mutex<T>) -> Result<MutexGuard<'_, T>, Error> {
        match self {
            Wait::Allowed => Ok(mutex.lock().unwrap_or_else(PoisonError::into_inner)),
            Wait::Never => match mutex.try_lock() {
                Ok(guard) => Ok(guard),
                Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => Err(Error::WouldBlock),
            },
        }
    }
}
