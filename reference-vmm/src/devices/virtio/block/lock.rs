// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The lock on an image: one writer, or any number of readers.
//!
//! It is the kernel's lock of an open file description (`fcntl(2)`, `F_OFD_SETLK`). A writer has all of the file locked
//! for itself. A reader does as a QEMU does: this says what it does with an image by shared locks on single bytes, and by
//! others what nobody else may do meanwhile, and looks whether anyone has a lock that speaks against either
//! (`block/file-posix.c`). So both programs leave an image alone that the other one writes, and read one together.
//!
//! It goes with the description: when the process ends, however it ends, and not when another
//! descriptor of the same file is closed, as a POSIX lock would. It is advice to those who ask for it, and nobody else
//! is kept from the file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Whether another open file has a lock on this one's file, to read or to write: it is somebody's disk. Takes none.
pub fn is_locked(file: &File) -> bool {
    meets_another(file, whole(libc::F_WRLCK))
}

/// Whether another open file has a lock that would exclude this one.
fn meets_another(file: &File, mut lock: libc::flock) -> bool {
    // SAFETY: an open descriptor, and a flock that lives through the call, which writes it.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    // A kind of file that has no locks has none.
    asked == 0 && libc::c_int::from(lock.l_type) != libc::F_UNLCK
}

/// The bytes that say what is done with an image: it is read, written, resized.
const READS: i64 = 100;
const WRITES: i64 = 101;
const RESIZES: i64 = 103;
/// The byte that says that nobody else may do it.
const fn forbids(done: i64) -> i64 {
    done + 100
}

/// A lock on all of a file.
fn whole(kind: libc::c_int) -> libc::flock {
    part(kind, 0, 0)
}

/// A lock on `len` bytes from `start`; 0 is all to the file's end, however far that is.
fn part(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    // SAFETY: plain data, for which zeros are a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (start, len);
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

/// Takes the lock on `file`: to write, alone; else shared with those who read. Does not wait for it. What it has of it
/// where it is refused goes with the file.
pub fn lock(file: &File, write: bool) -> Locked {
    if write {
        return match take(file, whole(libc::F_WRLCK)) {
            Ok(()) => Locked::Yes,
            Err(refused) => refused,
        };
    }
    for byte in [READS, forbids(WRITES), forbids(RESIZES)] {
        if let Err(refused) = take(file, part(libc::F_RDLCK, byte, 1)) {
            return refused;
        }
    }
    // Asked when ours are there: who begins to write now finds them.
    let another = |byte| meets_another(file, part(libc::F_WRLCK, byte, 1));
    match another(WRITES) || another(RESIZES) || another(forbids(READS)) {
        true => Locked::Conflict,
        false => Locked::Yes,
    }
}

/// Gives up all locks on `file`. A kind of file that has none has nothing to give up.
pub fn unlock(file: &File) -> io::Result<()> {
    match take(file, whole(libc::F_UNLCK)) {
        Ok(()) | Err(Locked::Yes | Locked::Conflict) => Ok(()),
        Err(Locked::Impossible(error)) => match error.raw_os_error() {
            Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => Ok(()),
            _ => Err(error),
        },
    }
}

fn take(file: &File, lock: libc::flock) -> Result<(), Locked> {
    // SAFETY: an open descriptor, and a flock that lives through the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Locked::Conflict,
        _ => Locked::Impossible(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::path::Path;

    fn open(path: &Path) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).open(path).unwrap()
    }

    /// As a QEMU does it, that lets nobody else write or resize.
    fn qemu(path: &Path, does: &[i64]) -> Option<File> {
        let file = open(path);
        let forbidden = [WRITES, RESIZES];
        for byte in does.iter().copied().chain(forbidden.map(forbids)) {
            take(&file, part(libc::F_RDLCK, byte, 1)).ok()?;
        }
        let mut against = forbidden
            .into_iter()
            .chain(does.iter().copied().map(forbids));
        let free = |byte| !meets_another(&file, part(libc::F_WRLCK, byte, 1));
        against.all(free).then_some(file)
    }

    fn qemu_reads(path: &Path) -> Option<File> {
        qemu(path, &[READS])
    }

    fn qemu_writes(path: &Path) -> Option<File> {
        qemu(path, &[READS, WRITES, RESIZES])
    }

    fn reads(path: &Path) -> Option<File> {
        let file = open(path);
        matches!(lock(&file, false), Locked::Yes).then_some(file)
    }

    fn writes(path: &Path) -> Option<File> {
        let file = open(path);
        matches!(lock(&file, true), Locked::Yes).then_some(file)
    }

    #[test]
    fn a_writer_is_alone_and_readers_are_together_with_qemus_as_well() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        for writer in [writes, qemu_writes] {
            let held = writer(path);
            assert!(held.is_some());
            for other in [reads, qemu_reads, writes, qemu_writes] {
                assert!(other(path).is_none());
            }
            assert!(is_locked(&open(path)));
        }
        for reader in [reads, qemu_reads] {
            let held = (reader(path), reads(path), qemu_reads(path));
            assert!(held.0.is_some() && held.1.is_some() && held.2.is_some());
            for other in [writes, qemu_writes] {
                assert!(other(path).is_none());
            }
            assert!(is_locked(&open(path)));
        }
        assert!(!is_locked(&open(path)));
    }

    #[test]
    fn what_is_let_go_another_process_takes_and_what_it_has_nobody_takes_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        for write in [true, false] {
            let held = open(path);
            assert!(matches!(lock(&held, write), Locked::Yes));
            assert!(writes(path).is_none());
            unlock(&held).unwrap();
            let other = writes(path).unwrap();
            assert!(matches!(lock(&held, write), Locked::Conflict));
            drop(other);
            assert!(matches!(lock(&held, write), Locked::Yes));
            assert!(writes(path).is_none());
        }
    }
}
