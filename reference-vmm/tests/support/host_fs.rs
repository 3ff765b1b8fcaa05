// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! File systems of the host that fail as a test wants it: for root, in the lab.

#![allow(dead_code, reason = "each test has use for some")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::lab::{busybox, named};

/// Runs a program of e2fsprogs; its exit status, and what it said.
pub fn e2fsprogs(program: &str, words: &[&str]) -> (i32, String) {
    let path = Path::new(&named("LAB_E2FSPROGS")).join(program);
    let output = Command::new(path).args(words).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.code().unwrap_or(-1), said)
}

/// Makes an ext4 of that size in a file, and puts it where nothing takes it away.
pub fn make_ext4(file: &Path, mib: u32) {
    let path = file.to_str().unwrap();
    let words = ["-q", "-F", "-t", "ext4", path, &format!("{mib}M")];
    let (status, said) = e2fsprogs("mke2fs", &words);
    assert_eq!(status, 0, "mke2fs: {said}");
    File::open(file).unwrap().sync_all().unwrap();
}

/// A folder of memory that has room for so much.
pub struct Small(tempfile::TempDir);

impl Small {
    pub fn new(mib: u32) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().to_str().unwrap();
        let size = format!("size={mib}M");
        busybox(&["mount", "-t", "tmpfs", "-o", &size, "small", path]);
        Small(folder)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Gives it another size.
    pub fn resize(&self, mib: u32) {
        let options = format!("remount,size={mib}M");
        let path = self.0.path().to_str().unwrap();
        busybox(&["mount", "-o", &options, path]);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        unmount(self.0.path());
    }
}

/// An ext4 of the host's on a loop device: it can be frozen, and it can crash.
pub struct HostFs {
    /// `disk`, and where it is mounted.
    folder: tempfile::TempDir,
}

impl HostFs {
    pub fn new(mib: u32) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let it = HostFs { folder };
        make_ext4(&it.disk(), mib);
        std::fs::create_dir(it.mounted()).unwrap();
        it.mount();
        it
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk")
    }

    fn mounted(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    fn mount(&self) {
        let (disk, mounted) = (self.disk(), self.mounted());
        let (disk, mounted) = (disk.to_str().unwrap(), mounted.to_str().unwrap());
        busybox(&["mount", "-t", "ext4", "-o", "loop", disk, mounted]);
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.mounted().join(name)
    }

    /// Who writes to it waits as long as this lives.
    pub fn frozen(&self) -> Frozen<'_> {
        self.freeze("--freeze");
        Frozen(self)
    }

    fn freeze(&self, word: &str) {
        busybox(&["fsfreeze", word, self.mounted().to_str().unwrap()]);
    }

    /// Loses what is in the host's memory alone, as where its power fails, and comes back by its journal. Nobody has a
    /// file open in it.
    pub fn crash(&self) {
        // linux/fs/ext4/ext4.h: EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
        const SHUTDOWN: libc::c_ulong = 0x8004_587d;
        let without_its_log = 2u32;
        let folder = File::open(self.mounted()).unwrap();
        // SAFETY: the call reads a number, which lives through it.
        let done = unsafe {
            let flags = &raw const without_its_log;
            libc::ioctl(folder.as_raw_fd(), SHUTDOWN as libc::Ioctl, flags)
        };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        drop(folder);
        busybox(&["umount", self.mounted().to_str().unwrap()]);
        self.mount();
    }
}

impl Drop for HostFs {
    fn drop(&mut self) {
        unmount(&self.mounted());
    }
}

/// A file system that is frozen. A test that fails lets go of it too: who waits for it cannot be killed.
pub struct Frozen<'a>(&'a HostFs);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.0.freeze("--unfreeze");
    }
}

/// Takes a mount away, whoever uses it. A test that fails has said why already.
fn unmount(path: &Path) {
    let words = ["umount", "-l", path.to_str().unwrap_or_default()];
    let _ = Command::new(named("LAB_BUSYBOX")).args(words).status();
}
