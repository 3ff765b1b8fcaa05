// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host that refuses one call on a snapshot's files, or has something else happen before.

#![allow(dead_code)]

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use reference_vmm::snapshot::files::{HostFiles, Locked, MEMORY, SnapshotFiles};

/// The host's files, of which one call is refused, or writes half of what it is given.
pub struct Faulty {
    pub calls: Cell<usize>,
    /// Which call, from 0 on.
    at: usize,
    /// None: a short write.
    errno: Option<i32>,
    /// When the last call was, by [`coarse_time`].
    called: Cell<Duration>,
    /// For how long, by that clock, there was none before the newest file was made.
    pub idle: Cell<Duration>,
}

impl Faulty {
    /// Refuses the call number `at`, from 0 on; none: it writes half.
    pub fn new(at: usize, errno: Option<i32>) -> Self {
        let calls = Cell::new(0);
        Faulty {
            calls,
            at,
            errno,
            called: Cell::new(coarse_time()),
            idle: Cell::default(),
        }
    }

    /// Refuses none.
    pub fn none() -> Self {
        Self::new(usize::MAX, None)
    }

    fn is_due(&self) -> bool {
        let call = self.calls.get();
        self.calls.set(call + 1);
        self.called.set(coarse_time());
        call == self.at
    }

    fn check(&self) -> io::Result<()> {
        match (self.is_due(), self.errno) {
            (true, Some(errno)) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }
}

/// The clock by which file systems tell the time of a write (`CLOCK_REALTIME_COARSE`).
fn coarse_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a timespec that lives through the call.
    let said = unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut time) };
    assert_eq!(said, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl SnapshotFiles for Faulty {
    fn create_dir(&self, path: &Path) -> io::Result<Locked> {
        self.check()?;
        HostFiles.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<File> {
        self.idle
            .set(coarse_time().saturating_sub(self.called.get()));
        self.check()?;
        HostFiles.create(path)
    }
    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        self.check()?;
        HostFiles.set_len(file, len)
    }
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        match (self.is_due(), self.errno) {
            (true, Some(errno)) => Err(io::Error::from_raw_os_error(errno)),
            (true, None) => HostFiles.write_at(file, &bytes[..bytes.len() / 2], offset),
            _ => HostFiles.write_at(file, bytes, offset),
        }
    }
    fn sync(&self, file: &File) -> io::Result<()> {
        self.check()?;
        HostFiles.sync(file)
    }
    fn open_dir(&self, path: &Path) -> io::Result<File> {
        self.check()?;
        HostFiles.open_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check()?;
        HostFiles.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        self.check()?;
        HostFiles.exchange(one, other)
    }
    fn reflink(&self, from: &File, to: &File) -> io::Result<()> {
        self.check()?;
        HostFiles.reflink(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        // What is refused here cannot but be left, which is told.
        HostFiles.remove(path)
    }
}

/// The host's files, with something to be done before each write to the file of memory, its header aside.
pub fn before(hook: impl Fn()) -> impl SnapshotFiles {
    before_those_of(MEMORY, move |offset| {
        if offset > 0 {
            hook();
        }
    })
}

/// The same, before each write to the file of this name, with where it is written.
pub fn before_those_of(name: &'static str, hook: impl Fn(u64)) -> impl SnapshotFiles {
    Writes(move |file: &File, bytes: &[u8], offset| {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if link.ends_with(name) {
            hook(offset);
        }
        HostFiles.write_at(file, bytes, offset)
    })
}

/// The host's files, with room for so many bytes.
pub fn with_room(room: u64) -> impl SnapshotFiles {
    let left = Cell::new(room);
    Writes(move |file: &File, bytes: &[u8], offset| {
        let room = left.get().min(bytes.len() as u64);
        left.set(left.get() - room);
        match room {
            0 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            _ => HostFiles.write_at(file, &bytes[..room as usize], offset),
        }
    })
}

/// The host's files, written by this.
struct Writes<F>(F);

impl<F: Fn(&File, &[u8], u64) -> io::Result<usize>> SnapshotFiles for Writes<F> {
    fn create_dir(&self, path: &Path) -> io::Result<Locked> {
        HostFiles.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<File> {
        HostFiles.create(path)
    }
    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        HostFiles.set_len(file, len)
    }
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        (self.0)(file, bytes, offset)
    }
    fn sync(&self, file: &File) -> io::Result<()> {
        HostFiles.sync(file)
    }
    fn open_dir(&self, path: &Path) -> io::Result<File> {
        HostFiles.open_dir(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        HostFiles.rename(from, to)
    }
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        HostFiles.exchange(one, other)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        HostFiles.remove(path)
    }
}
