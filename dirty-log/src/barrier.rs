// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The heavy half of an asymmetric barrier: `membarrier(2)`, where there is one.
//!
//! The system call is in `kvm/`; without the feature, under loom and under miri both halves are
//! fences, and this module says so.

use std::io;

/// Whether [`heavy`] executes a barrier on all threads of this process. One answer for its life.
pub(crate) fn is_asymmetric() -> bool {
    imp::available()
}

/// Has every thread of this process that runs pass a full barrier before this returns. Of one where
/// [`is_asymmetric`] says no, nothing: its threads execute fences.
pub(crate) fn heavy() -> io::Result<()> {
    if is_asymmetric() {
        imp::interrupt_all()
    } else {
        Ok(())
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
