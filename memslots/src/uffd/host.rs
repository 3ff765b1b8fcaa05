// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the layer needs of a kernel's userfaultfd, as a trait, so that a test can be the kernel
//! (`fake`).

use super::{Call, RawMessage};
use crate::Errno;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

/// A userfaultfd that has been opened and nothing more.
pub trait UffdHost: Send + Sync {
    /// An ioctl whose argument is `argument`: as many words as [`Call::words`], in the kernel's order, some of which the
    /// kernel writes. Who calls sees to the number of words.
    ///
    /// # Errors
    /// The kernel's errno.
    ///
    /// # Safety
    /// The argument names memory of this process only that is a guest's, or for the source of a copy, memory that is
    /// readable for the length of the call.
    unsafe fn ioctl(&self, call: Call, argument: &mut [u64]) -> Result<(), Errno>;

    /// Reads as many messages as there are and fit, without waiting, and says how many.
    ///
    /// # Errors
    /// The kernel's errno; `EAGAIN` where there are none.
    fn read(&self, messages: &mut [RawMessage]) -> Result<usize, Errno>;

    /// Waits until there is a message, for this long at most (`None` is for ever), and says whether there is one.
    ///
    /// # Errors
    /// The kernel's errno; `EINTR` at a signal.
    fn wait(&self, limit: Option<Duration>) -> Result<bool, Errno>;

    /// As [`wait`](Self::wait), and ends as soon as `other` can be read or has nobody who writes to it any more. Says
    /// whether there is a message.
    ///
    /// # Errors
    /// The kernel's errno; `EINTR` at a signal.
    fn wait_or(&self, other: BorrowedFd<'_>, limit: Option<Duration>) -> Result<bool, Errno>;

    /// Its descriptor, for epoll.
    fn descriptor(&self) -> RawFd;

    /// The descriptor that a [fork message](super::Message::Fork) brought; `None` of a host that forks none.
    ///
    /// # Safety
    /// The number came in such a message of this host, and was not claimed before.
    unsafe fn claim(&self, descriptor: u32) -> Option<OwnedFd>;

    /// Of the pages of 4 KiB from an address of this process on, as many as there are bytes: 1 in the byte of one that
    /// there is, 0 of one that there is not (a mark is none).
    ///
    /// # Errors
    /// The kernel's errno.
    fn present(&self, at: usize, pages: &mut [u8]) -> Result<(), Errno> {
        super::sys::mincore(at, pages)
    }
}
