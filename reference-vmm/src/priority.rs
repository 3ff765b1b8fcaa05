// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who goes first on a host that is busy.

/// The least that a thread can ask for.
const LAST: libc::c_int = 19;

/// Has the calling thread go behind all others of the host from now on, for good: what it has left to do is in nobody's
/// interest. Of one that may not, nothing changes.
pub(crate) fn step_back() {
    // SAFETY: no pointers. On Linux it is the calling thread's alone.
    let done = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LAST) };
    if done != 0 {
        log::debug!(
            "the priority stays as it is: {}",
            std::io::Error::last_os_error()
        );
    }
}
