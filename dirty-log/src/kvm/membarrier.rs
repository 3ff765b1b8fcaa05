// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `membarrier(2)`: a full barrier on every CPU that runs a thread of this process.

use std::io;
use std::sync::OnceLock;

/// Whether the kernel has it (4.14), no filter forbids it, and the process is registered, which this
/// call does. Asked once.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    // The barrier itself is tried as well: a filter may let the one pass and not the other.
    *AVAILABLE.get_or_init(|| register().and_then(|()| barrier()).is_ok())
}

/// The barrier. A process that was forked from one that had registered asks again before it gives up.
pub(crate) fn interrupt_all() -> io::Result<()> {
    barrier().or_else(|_| register().and_then(|()| barrier()))
}

fn register() -> io::Result<()> {
    membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)
}

fn barrier() -> io::Result<()> {
    membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)
}

fn membarrier(command: libc::c_int) -> io::Result<()> {
    // SAFETY: the call takes two integers (no flags) and a CPU number that no flag asks for, and
    // touches no memory.
    match unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
