// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an ioctl's answer means. The kernel does as many pages as it can, says how many in a field of the argument, and
//! an errno why it went no further; here that is one decision: done, go on, or stop.

use super::Call;
use crate::{Errno, Hva};
use thiserror::Error;

/// An operation on pages that stopped before its end.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{} of {size:#x} bytes at {at}, stopped after {done:#x}: {cause}", call.name())]
pub struct OpError {
    /// Which.
    pub call: Call,
    /// Its first address.
    pub at: Hva,
    /// How much was to be done, in bytes.
    pub size: u64,
    /// How much was, from the start. It stays done, and who waited for those pages is awake.
    pub done: u64,
    /// Why it stopped there.
    #[source]
    pub cause: Cause,
}

/// Why an operation went no further.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// The range is none of the registration, or not whole pages; nothing was asked of the kernel.
    #[error("a range of whole pages of the registration was expected")]
    OutOfRange,
    /// There is a page already (`EEXIST`): another worker was first. Nobody has been woken by this.
    #[error("there is a page already")]
    AlreadyThere,
    /// The process's memory is being changed (`EAGAIN`: fork, `mremap`, pages given back), and the change waits for its
    /// message to be read. Read the messages, then try again.
    #[error("the memory is being changed; read the messages first")]
    Changing,
    /// The memory is not registered any more, or unmapped (`ENOENT`).
    #[error("the memory is not registered any more")]
    NotRegistered,
    /// The process has ended (`ESRCH`).
    #[error("the process has ended")]
    ProcessGone,
    /// No memory for the page (`ENOMEM`; `ENOSPC` of a tmpfs at its limit).
    #[error("there is no memory for the page")]
    NoMemory,
    /// What was to be placed cannot be read, or for `UFFDIO_CONTINUE`, is not in the page cache (`EFAULT`).
    #[error("what was to be placed is not there")]
    NoSource,
    /// A page to be moved is in use elsewhere (`EBUSY`), by a child since a fork for one: copy it.
    #[error("a page to be moved is in use elsewhere")]
    Pinned,
    /// A moved page cannot come write-protected, and a [`ProtectRole`](super::ProtectRole) is at work: copy it.
    #[error("a moved page would not be write-protected")]
    Unprotected,
    /// Any other refusal.
    #[error(transparent)]
    Refused(Errno),
}

/// What follows from one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// All of it is done.
    Done,
    /// This many bytes are, more than none and fewer than all: ask for the rest.
    GoOn(u64),
    /// No further.
    Stop(Cause),
}

/// Reads the kernel's answer to an operation on `asked` bytes: `field` is its count, or a negative errno again.
pub(super) fn settle(result: Result<(), Errno>, field: i64, asked: u64) -> Step {
    match result {
        Ok(()) => Step::Done,
        Err(Errno(libc::EAGAIN)) => match u64::try_from(field) {
            Ok(done) if done > 0 && done < asked => Step::GoOn(done),
            _ => Step::Stop(Cause::Changing),
        },
        Err(errno) => Step::Stop(cause(errno)),
    }
}

fn cause(errno: Errno) -> Cause {
    match errno.0 {
        libc::EEXIST => Cause::AlreadyThere,
        libc::EAGAIN => Cause::Changing,
        libc::ENOENT => Cause::NotRegistered,
        libc::ESRCH => Cause::ProcessGone,
        libc::ENOMEM | libc::ENOSPC => Cause::NoMemory,
        libc::EFAULT => Cause::NoSource,
        libc::EBUSY => Cause::Pinned,
        _ => Cause::Refused(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever a kernel answers, a loop over it ends, and never goes beyond what was asked.
        #[test]
        fn going_on_always_makes_progress_and_never_too_much(
            errno in 0i32..140,
            field in prop_oneof![any::<i64>(), -20i64..20, (0i64..8).prop_map(|pages| pages * 4096)],
            asked in (1u64..8).prop_map(|pages| pages * 4096),
        ) {
            let result = if errno == 0 { Ok(()) } else { Err(Errno(errno)) };
            match settle(result, field, asked) {
                Step::Done => prop_assert_eq!(errno, 0),
                Step::GoOn(done) => {
                    prop_assert_eq!(errno, libc::EAGAIN);
                    prop_assert!(done > 0 && done < asked);
                }
                Step::Stop(cause) => prop_assert!(errno != 0 && cause != Cause::OutOfRange),
            }
        }
    }

    #[test]
    fn each_errno_of_the_manual_has_its_name() {
        let named = [
            (libc::EEXIST, Cause::AlreadyThere),
            (libc::ENOENT, Cause::NotRegistered),
            (libc::ESRCH, Cause::ProcessGone),
            (libc::ENOMEM, Cause::NoMemory),
            (libc::ENOSPC, Cause::NoMemory),
            (libc::EFAULT, Cause::NoSource),
            (libc::EBUSY, Cause::Pinned),
            (libc::EINVAL, Cause::Refused(Errno(libc::EINVAL))),
        ];
        for (errno, cause) in named {
            assert_eq!(settle(Err(Errno(errno)), -1, 4096), Step::Stop(cause));
        }
        assert_eq!(
            settle(Err(Errno(libc::EAGAIN)), -11, 4096),
            Step::Stop(Cause::Changing)
        );
        assert_eq!(
            settle(Err(Errno(libc::EAGAIN)), 4096, 8192),
            Step::GoOn(4096)
        );
    }
}
