// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lock on an image: one writer, or any number of readers.
//!
//! It is the kernel's lock of an open file description (`fcntl(2)`, `F_OFD_SETLK`) on the whole file, which QEMU's own
//! locks meet as well. It goes with the description: when the process ends, however it ends, and not when another
//! descriptor of the same file is closed, as a POSIX lock would. It is advice to those who ask for it, and nobody else
//! is kept from the file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Whether another open file has a lock on this one's file, to read or to write: it is somebody's disk. Takes none.
pub fn is_locked(file: &File) -> bool {
    let mut lock = whole(libc::F_WRLCK);
    // SAFETY: an open descriptor, and a flock that lives through the call, which writes it.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    // A kind of file that has no locks has none.
    asked == 0 && libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

/// A lock on all of a file.
fn whole(kind: libc::c_int) -> libc::flock {
    // SAFETY: plain data, for which zeros are a value: from the file's start to its end, however far that is.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

/// What came of asking for the lock.
#[derive(Debug)]
pub enum Locked {
    /// It is held until `file` and its duplicates are closed.
    Yes,
    /// Another open file has one that excludes it.
    Conflict,
    /// This kind of file has no such locks.
    Impossible(io::Error),
}

/// Takes the lock on `file`: to write, alone; else shared with those who read. Does not wait for it.
pub fn lock(file: &File, write: bool) -> Locked {
    let lock = whole(if write { libc::F_WRLCK } else { libc::F_RDLCK });
    // SAFETY: an open descriptor, and a flock that lives through the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 {
        return Locked::Yes;
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Locked::Conflict,
        _ => Locked::Impossible(error),
    }
}
