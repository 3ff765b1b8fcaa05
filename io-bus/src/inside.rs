// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether this thread is inside an access right now.
//!
//! A device that unregisters something from inside an access must not wait for accesses to end: its
//! own would never. The count is the thread's and not a bus's, because waiting for *any* bus from
//! inside an access can close a circle of two threads, each in a device of one bus and waiting for
//! the other.

use std::cell::Cell;
use std::marker::PhantomData;

#[cfg(not(loom))]
thread_local! {
    /// How many accesses are on this thread's stack: a device may itself dispatch to another.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

#[cfg(loom)]
loom::thread_local! {
    static DEPTH: Cell<u32> = Cell::new(0);
}

#[inline]
fn depth() -> u32 {
    DEPTH.with(Cell::get)
}

#[inline]
fn set_depth(depth: u32) {
    DEPTH.with(|cell| cell.set(depth));
}

/// Counts as one access on this thread until it is dropped, by unwinding too.
pub(crate) struct Inside {
    /// The depth before. Kept, so that leaving stores without loading what entering has just stored:
    /// two loads that wait for a store are a third of an access.
    before: u32,
    _thread: PhantomData<*const ()>,
}

impl Inside {
    #[inline]
    pub(crate) fn enter() -> Self {
        let before = depth();
        set_depth(before.wrapping_add(1));
        Self {
            before,
            _thread: PhantomData,
        }
    }
}

impl Drop for Inside {
    #[inline]
    fn drop(&mut self) {
        // Accesses end in the reverse of the order in which they began.
        set_depth(self.before);
    }
}

/// Whether the calling thread is inside a device's answer to an access, on any bus.
///
/// Then [`Registration::unregister`](crate::Registration::unregister) and its like do not wait.
pub fn is_inside_access() -> bool {
    depth() != 0
}
