// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What Rust's runtime does for a process before `main`, as far as this monitor wants it.
//!
//! The binary begins with C's `main`: Rust's own start asks for the stack's bounds, which makes glibc
//! read `/proc/self/maps`, and sets up a handler that names a stack overflow; together 0.2 ms of a
//! start of 1.5 ms (an empty static program, with and without). An overflow of the main thread's
//! stack ends in a plain SIGSEGV instead. The two things that matter for a program with a console
//! are done here.

use std::ffi::{CStr, OsStr, OsString, c_char, c_int};
use std::io;
use std::os::unix::ffi::OsStrExt;

/// Opens `/dev/null` where descriptor 0, 1 or 2 is closed (or the next file opened would become the
/// console), has writes to a closed pipe, or past the largest file allowed, fail instead of killing the
/// process, and blocks SIGUSR1, which would kill one that has not taken over its signals yet.
///
/// # Errors
/// `/dev/null` cannot be opened.
pub fn prepare() -> io::Result<()> {
    for fd in 0..=2 {
        // SAFETY: asks for the flags of a descriptor, open or not.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0 {
            continue;
        }
        // SAFETY: a valid path. The lowest free descriptor, which `open` takes, is `fd`, for those
        // below it are open by now.
        if unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: no handler is installed.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    one_heap();
    crate::signals::hold_show_registers();
    Ok(())
}

/// Has all threads share one heap (glibc; elsewhere nothing is done). Each would have one of its own otherwise, of which the making
/// is four changes of the address space: a lazy restore, which starts five threads before its guest runs, has them wait for each
/// other there. What is allocated while a guest runs is little, and most of it comes out of the thread's own cache.
fn one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no other thread allocates yet. Refused, each thread has its heap.
    let _ = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// The arguments of C's `main`.
///
/// # Safety
/// `argv` has `argc` pointers to C strings.
pub unsafe fn args(argc: c_int, argv: *const *const c_char) -> Vec<OsString> {
    (0..usize::try_from(argc).unwrap_or(0))
        .map(|index| {
            // SAFETY: `index` is below `argc`, and the caller vouches for the pointers.
            let arg = unsafe { CStr::from_ptr(*argv.add(index)) };
            OsStr::from_bytes(arg.to_bytes()).to_owned()
        })
        .collect()
}
