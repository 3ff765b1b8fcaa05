// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two halves of the full barrier that a reader and a writer meet at, and which of them pays for it.
//!
//! Twice a reader stores and then loads while a writer stores and then loads what the other has stored, and at least
//! one load must see the other side's store (see [`crate::domain`] for what breaks if neither does):
//!
//! ```text
//!   reader                          writer
//!   enter:  my word := inside       the table's pointer := next
//!           LIGHT ──────────┐ ┌──── HEAVY
//!           load the pointer└─┘     load each reader's word
//!   leave:  my word := outside      my reader's PENDING := true
//!           LIGHT ──────────┐ ┌──── HEAVY
//!           load PENDING    └─┘     load that reader's word
//! ```
//!
//! A processor may let a load overtake an earlier store (x86 does this one reordering, and no other), so without any
//! barrier both loads may see the old. The usual cure is a full fence on both sides, and readers pay it at each access.
//! They need not: `membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED)` interrupts every CPU that runs a thread of this process
//! and has it execute a full barrier. So the writer, who is rare, makes the readers' fences happen, and the reader only
//! has to keep the *compiler* from swapping the two. Whatever point of the reader's program the interrupt hits: if it
//! comes before the load, the load comes after the writer's store; if it comes after the load, the store that precedes
//! it in the program is visible before the writer goes on to look. A thread that does not run has passed the
//! scheduler's barriers. That is the whole proof, and it is the kernel's (`membarrier(2)`); Rust's memory model knows
//! no such thing, and the models under loom have full fences on both sides in its place.

use crate::sync::{Ordering, fence};

/// Who pays. One for each domain, for good: a reader that relies on the writers' half while a writer relies on the
/// readers' would be the bug that all this prevents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Barrier {
    /// Both sides, each time: a SeqCst fence.
    Symmetric,
    /// The writers, for both: `membarrier`.
    #[cfg_attr(any(loom, miri, not(target_os = "linux")), allow(dead_code))]
    Asymmetric,
}

impl Barrier {
    /// The best that there is here. Asks the kernel once a process.
    pub(crate) fn choose() -> Self {
        if imp::available() {
            Self::Asymmetric
        } else {
            Self::Symmetric
        }
    }

    /// The readers' half. Pairs with [`heavy`](Self::heavy).
    #[inline(always)]
    pub(crate) fn light(self) {
        match self {
            Self::Symmetric => full_fence(),
            Self::Asymmetric => crate::sync::compiler_fence(Ordering::SeqCst),
        }
    }

    /// The writers' half. Pairs with [`light`](Self::light), of every reader at once.
    pub(crate) fn heavy(self) {
        // This thread's own, in both cases: the kernel takes a short way, and no barrier, where it need not interrupt
        // anyone (one thread, or one CPU).
        fence(Ordering::SeqCst);
        if self == Self::Asymmetric {
            imp::interrupt_all();
        }
    }
}

/// Out of line: beside a fence a call costs nothing, and the readers that need none jump over nothing.
#[cold]
#[inline(never)]
fn full_fence() {
    fence(Ordering::SeqCst);
}

#[cfg(all(target_os = "linux", not(loom), not(miri)))]
mod imp {
    use std::io::Write;
    use std::sync::OnceLock;

    /// Whether this process may use expedited barriers: the kernel has them (4.14), no filter forbids them, and the
    /// process is registered, which this call does.
    pub(super) fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        // The barrier itself is tried as well: a filter may let the one pass and not the other.
        *AVAILABLE.get_or_init(|| register() && barrier())
    }

    pub(super) fn interrupt_all() {
        // A process that was forked from one that had registered keeps the registration; ask again before giving up.
        if barrier() || (register() && barrier()) {
            return;
        }
        // It worked when the readers were told to rely on it. Who goes on without it frees memory under a reader.
        let error = std::io::Error::last_os_error();
        let _ = writeln!(
            std::io::stderr(),
            "srcu: membarrier(2) worked before and does not now ({error}); a seccomp filter must let it pass"
        );
        std::process::abort();
    }

    fn register() -> bool {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
    }

    fn barrier() -> bool {
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
    }

    fn membarrier(command: libc::c_int) -> bool {
        // SAFETY: the call takes two integers (no flags) and a CPU number that no flag asks for, and touches no memory.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }
}

#[cfg(not(all(target_os = "linux", not(loom), not(miri))))]
mod imp {
    pub(super) fn available() -> bool {
        false
    }

    pub(super) fn interrupt_all() {}
}
