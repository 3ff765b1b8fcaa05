// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether this thread is inside an access right now.
//!
//! A device that unregisters something from inside an access must not wait for accesses to end: its
//! own would never. The flag is the thread's and not a bus's, because waiting for *any* bus from
//! inside an access can close a circle of two threads, each in a device of one bus and waiting for
//! the other.

use std::cell::Cell;
use std::marker::PhantomData;

use crate::dispatcher::unlikely;

#[cfg(not(loom))]
thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

#[cfg(loom)]
loom::thread_local! {
    static INSIDE: Cell<bool> = Cell::new(false);
}

/// Counts as an access on this thread until it is dropped, by unwinding too.
pub(crate) struct Inside {
    /// Whether no other encloses it: a device may itself dispatch to another. A flag and a branch,
    /// where a depth that is counted up and down would have each access wait for the one before it:
    /// what is stored here depends on nothing that was loaded.
    outermost: bool,
    _thread: PhantomData<*const ()>,
}

impl Inside {
    #[inline(always)]
    pub(crate) fn enter() -> Self {
        let outermost = !is_inside_access();
        if outermost {
            INSIDE.with(|inside| inside.set(true));
        } else {
            unlikely();
        }
        Self {
            outermost,
            _thread: PhantomData,
        }
    }
}

impl Drop for Inside {
    #[inline(always)]
    fn drop(&mut self) {
        if self.outermost {
            INSIDE.with(|inside| inside.set(false));
        } else {
            unlikely();
        }
    }
}

/// Whether the calling thread is inside a device's answer to an access, on any bus.
///
/// Then [`Registration::unregister`](crate::Registration::unregister) and its like do not wait.
#[inline]
pub fn is_inside_access() -> bool {
    INSIDE.with(Cell::get)
}
