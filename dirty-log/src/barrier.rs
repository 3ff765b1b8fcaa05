// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The heavy half of an asymmetric barrier: `membarrier(2)`, where there is one.
//!
//! The system call is in `kvm/`; without the feature, under loom and under miri both halves are
//! fences, and this module says so.

use std::io;

/// A heavy half. A test's fake answers any errno.
pub(crate) trait Barrier {
    /// Whether [`heavy`](Self::heavy) executes a barrier on all threads of this process. One answer for
    /// its life.
    fn is_asymmetric(&self) -> bool;

    /// Has every thread of this process that runs pass a full barrier before this returns. Of one where
    /// [`is_asymmetric`](Self::is_asymmetric) says no, nothing, and it does not fail: its threads execute
    /// fences.
    ///
    /// # Errors
    /// The errno: some threads may not have passed one.
    fn heavy(&self) -> io::Result<()>;
}

/// This process's.
pub(crate) struct Process;

impl Barrier for Process {
    fn is_asymmetric(&self) -> bool {
        imp::available()
    }

    fn heavy(&self) -> io::Result<()> {
        if self.is_asymmetric() {
            imp::interrupt_all()
        } else {
            Ok(())
        }
    }
}

#[cfg(all(feature = "kvm", target_os = "linux", not(loom), not(miri)))]
use crate::kvm::membarrier as imp;

#[cfg(not(all(feature = "kvm", target_os = "linux", not(loom), not(miri))))]
mod imp {
    pub(super) fn available() -> bool {
        false
    }

    pub(super) fn interrupt_all() -> std::io::Result<()> {
        Ok(())
    }
}
