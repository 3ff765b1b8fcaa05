// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot comes into being whole, or not at all.
//!
//! ```text
//!   begin    .NAME.partial/            made beside NAME, locked
//!   write      state, memory           each synced, then the directory
//!   commit   .NAME.partial ──► NAME    renamed; where there was a NAME the two are exchanged, and the older removed
//!            the parent directory      synced
//! ```
//!
//! What is replaced and removed is a snapshot's alone: its `state`, its `memory`, each `diskN` that it says it has, and a
//! `working_set` that is one. Where anything else lies there, before or since the snapshot began, whatever its name, it stays
//! under it, and the snapshot is refused.
//!
//! One that another beside it builds on is not replaced either: that one would be lost ([`children`](super::children)). While
//! one is being written it has its parent locked (`flock(2)` of the directory, shared), and who replaces one has that for
//! itself: so neither is done while the other is not.
//!
//! None is put into the directory of another, or below it: that one would hold then what is not its own.
//!
//! Until the rename the older snapshot is what it was, and after it the new one is whole and durable: a crash in between
//! leaves one of the two under the name. What it leaves under `.NAME.partial` is nobody's, for its lock went with the
//! process, and the next snapshot of that name removes it; who wants the room before may do so by hand. A call
//! that fails leaves nothing behind.

use std::ffi::{CString, OsString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::contents::{self, Contents, Names};

/// The file of the machine's state, in a snapshot's directory.
pub const STATE: &str = "state";
/// The file of guest memory.
pub const MEMORY: &str = "memory";
/// The file of what a guest touched first when it went on from here.
pub use crate::lazy::{WORKING_SET, WORKING_SET_PAGES};
/// What the files of disks begin with, before their number.
pub const DISK: &str = "disk";

/// What a snapshot asks of the host's file system: a call each. A test plays one that is full or broken.
#[allow(clippy::missing_errors_doc, reason = "always the errno of the call")]
pub trait SnapshotFiles {
    /// Makes a directory that nobody else may read, and locks it for as long as what is returned lives. One that is there
    /// and that nobody has locked is removed first. `WouldBlock`: somebody has.
    fn create_dir(&self, path: &Path) -> io::Result<Locked>;
    /// Makes a file that nobody else may read.
    fn create(&self, path: &Path) -> io::Result<File>;
    /// `ftruncate(2)`.
    fn set_len(&self, file: &File, len: u64) -> io::Result<()>;
    /// `pwrite(2)`: how many of the bytes were written.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// `fsync(2)`, of a file or a directory.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Opens a directory, to sync it.
    fn open_dir(&self, path: &Path) -> io::Result<File>;
    /// Renames, if there is nothing of the new name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Exchanges two names.
    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()>;
    /// Has `to`, which is empty, share all that is in `from`: `ioctl_ficlone(2)`.
    fn reflink(&self, from: &File, to: &File) -> io::Result<()> {
        clone(from, to)
    }
    /// Removes the directory of a snapshot, or of a part of one; one in which anything else lies stays as it is, which is an
    /// error.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The host's own.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostFiles;

impl SnapshotFiles for HostFiles {
    fn create_dir(&self, path: &Path) -> io::Result<Locked> {
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        if let Err(error) = builder.create(path) {
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(error);
            }
            let _stale = lock_dir(path)?;
            remove(path)?;
            builder.create(path)?;
        }
        lock_dir(path).inspect_err(|error| {
            // Where another process has it by now it is that one's. Else it is ours, and empty.
            if error.kind() != io::ErrorKind::WouldBlock
                && let Err(left) = std::fs::remove_dir(path)
            {
                log::warn!("{} is left there: {left}", path.display());
            }
        })
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        options.open(path)
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<usize> {
        file.write_at(bytes, offset)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn open_dir(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        rename(from, to, libc::RENAME_NOREPLACE)
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        rename(one, other, libc::RENAME_EXCHANGE)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        remove(path)
    }
}

/// `ioctl_ficlone(2)`.
pub(super) fn clone(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: two open descriptors.
    match unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    // Of one that is half written there are only names.
    let Names { own, foreign } = Names::of(path)?;
    if let Some(name) = foreign {
        let text = format!(
            "it holds {}, which is no file of a snapshot",
            name.display()
        );
        return Err(io::Error::new(io::ErrorKind::DirectoryNotEmpty, text));
    }
    for name in own {
        std::fs::remove_file(path.join(name))?;
    }
    std::fs::remove_dir(path)
}

/// A file or a directory that is locked (`flock(2)`), as long as this lives: also where a process that was forked meanwhile has its
/// descriptor still.
#[derive(Debug)]
pub struct Locked(File);

impl Deref for Locked {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: an open descriptor. That it cannot be is no matter: it is closed now.
        unsafe { libc::flock(self.0.as_raw_fd(), libc::LOCK_UN) };
    }
}

/// Locks it, [`libc::LOCK_EX`] or [`libc::LOCK_SH`]; does not wait.
pub(crate) fn lock(file: File, how: libc::c_int) -> io::Result<Locked> {
    // SAFETY: an open descriptor.
    match unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } {
        0 => Ok(Locked(file)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Locks a directory, which is still the one of this name then.
fn lock_dir(path: &Path) -> io::Result<Locked> {
    let dir = lock(File::open(path)?, libc::LOCK_EX)?;
    let (locked, named) = (dir.metadata()?, std::fs::symlink_metadata(path)?);
    match (locked.dev(), locked.ino()) == (named.dev(), named.ino()) {
        true => Ok(dir),
        false => Err(io::ErrorKind::WouldBlock.into()),
    }
}

fn rename(from: &Path, to: &Path, flags: libc::c_uint) -> io::Result<()> {
    let (from, to) = (c_path(from)?, c_path(to)?);
    let at = libc::AT_FDCWD;
    // SAFETY: both names end with a NUL and live through the call.
    match unsafe { libc::renameat2(at, from.as_ptr(), at, to.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// A step of the writing was refused. The older snapshot, if there was one, is what it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// There is no name in the path, as in `/` or `..`.
    #[error("{0} names no directory that a snapshot could be")]
    NoName(PathBuf),
    /// It would be what is no file of another snapshot's, which nothing could replace or remove any more then.
    #[error("{} is within the snapshot {}: name another directory", dir.display(), snapshot.display())]
    Within {
        /// Where it was to be.
        dir: PathBuf,
        /// The other one, without links on the way.
        snapshot: PathBuf,
    },
    /// Something else is there.
    #[error("{0} is there and is no snapshot: name another place, or remove it")]
    Occupied(PathBuf),
    /// A snapshot is there, or an empty directory was, and with it what is no snapshot's and would be removed.
    #[error(
        "{} holds {}, which is no file of a snapshot and would be removed with it: name another place, or move it away",
        dir.display(), entry.display()
    )]
    Foreign {
        /// Where.
        dir: PathBuf,
        /// Its name there.
        entry: OsString,
    },
    /// A snapshot is there that others build on, which would be lost with it.
    #[error(
        "{} is the parent of {child}{}, and cannot be replaced: name another directory, or first make a full one of \
         {child} (snapshot merge {child} --to OUT) and remove it",
        dir.display(), others(*.more)
    )]
    Parent {
        /// Where.
        dir: PathBuf,
        /// One that builds on it.
        child: PathBuf,
        /// How many more do.
        more: usize,
    },
    /// A snapshot is there that one builds on which is being written.
    #[error("{} cannot be replaced: a snapshot that builds on it is being written", .0.display())]
    BuiltOn(PathBuf),
    /// What it was to be a directory of is not there.
    #[error("{} is not there, in which {} was to be: make that folder first", folder.display(), dir.display())]
    NoFolder {
        /// Where it was to be.
        dir: PathBuf,
        /// What is missing.
        folder: PathBuf,
    },
    /// Another process writes a snapshot of this name.
    #[error("another snapshot to {0} is being written")]
    InUse(PathBuf),
    /// A call failed.
    #[error("cannot {what} {path}: {source}")]
    Call {
        /// What it was for.
        what: &'static str,
        /// Of what.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
}

fn others(more: usize) -> String {
    match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    }
}

/// A snapshot that is being written. Dropped, nothing of it is left.
#[derive(Debug)]
pub struct Draft<'a, F: SnapshotFiles> {
    files: &'a F,
    /// Where it is to be.
    target: PathBuf,
    /// Where it is.
    partial: PathBuf,
    parent: PathBuf,
    /// There is an older one.
    replaces: bool,
    /// Keeps others out.
    lock: Locked,
    done: bool,
}

/// A file of a draft, with its name for errors.
#[derive(Debug)]
pub struct DraftFile {
    file: File,
    path: PathBuf,
}

impl<'a, F: SnapshotFiles> Draft<'a, F> {
    /// Begins one that is to be the directory `target`: new, empty, or an older snapshot that is replaced.
    ///
    /// # Errors
    /// [`WriteError`]; nothing was made.
    pub fn begin(files: &'a F, target: &Path) -> Result<Self, WriteError> {
        let name = target.file_name();
        let name = name.ok_or_else(|| WriteError::NoName(target.to_owned()))?;
        not_within(target)?;
        let replaces = look(target)?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".partial");
        let partial = parent.join(hidden);
        let lock = files
            .create_dir(&partial)
            .map_err(|source| match source.kind() {
                io::ErrorKind::WouldBlock => WriteError::InUse(target.to_owned()),
                io::ErrorKind::NotFound if !parent.exists() => WriteError::NoFolder {
                    dir: target.to_owned(),
                    folder: parent.clone(),
                },
                _ => call("make the directory", &partial)(source),
            })?;
        Ok(Draft {
            files,
            target: target.to_owned(),
            partial,
            parent,
            replaces,
            lock,
            done: false,
        })
    }

    /// Makes one of its files.
    ///
    /// # Errors
    /// [`WriteError::Call`].
    pub fn create(&self, name: &str, len: u64) -> Result<DraftFile, WriteError> {
        let path = self.partial.join(name);
        let file = self.files.create(&path);
        let file = file.map_err(call("make", &path))?;
        let of = DraftFile { file, path };
        self.set_len(&of, len)?;
        Ok(of)
    }

    /// Has a file of it end behind so many bytes.
    ///
    /// # Errors
    /// [`WriteError::Call`].
    pub(super) fn set_len(&self, of: &DraftFile, len: u64) -> Result<(), WriteError> {
        let sized = self.files.set_len(&of.file, len);
        sized.map_err(call("set the length of", &of.path))
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// [`WriteError::Call`].
    pub fn write(&self, of: &DraftFile, bytes: &[u8], offset: u64) -> Result<(), WriteError> {
        let (mut rest, mut offset) = (bytes, offset);
        while !rest.is_empty() {
            let written = match self.files.write_at(&of.file, rest, offset) {
                Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                written => written,
            };
            let written = written.map_err(call("write", &of.path))?;
            rest = rest.get(written..).unwrap_or_default();
            offset += written as u64;
        }
        Ok(())
    }

    /// Has a file of it, which is empty, share all that is in `from` with it. The errno, with nothing done, if the file
    /// system cannot.
    ///
    /// # Errors
    /// That errno.
    pub(super) fn reflink(&self, of: &DraftFile, from: &File) -> io::Result<()> {
        self.files.reflink(from, &of.file)
    }

    /// Has a file on the disk. Blocks for it.
    ///
    /// # Errors
    /// [`WriteError::Call`].
    pub fn sync(&self, of: &DraftFile) -> Result<(), WriteError> {
        let synced = self.files.sync(&of.file);
        synced.map_err(call("sync", &of.path))
    }

    /// Puts it in its place. Blocks for the disk.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn commit(mut self) -> Result<(), WriteError> {
        let synced = self.files.sync(&self.lock);
        synced.map_err(call("sync", &self.partial))?;
        // Who has begun to build on it meanwhile is waited for by nobody, and who begins from now on finds the new one.
        let _replaced = match self.replaces {
            true => Some(hold_to_replace(&self.target)?),
            false => None,
        };
        let parent = self.files.open_dir(&self.parent);
        let parent = parent.map_err(call("open", &self.parent))?;
        self.swap()
            .map_err(call("rename the new snapshot to", &self.target))?;
        // What lay there when it began is known; what came since is seen where nobody finds it by its name any more.
        if self.replaces
            && let Err(error) = look_again(&self.partial, &self.target)
        {
            self.swap_back();
            return Err(error);
        }
        if let Err(error) = self.files.sync(&parent) {
            // What is on the disk nobody knows then. Under the name is the older one again, which was whole before.
            self.swap_back();
            return Err(call("sync", &self.parent)(error));
        }
        self.done = true;
        if self.replaces
            && let Err(error) = self.files.remove(&self.partial)
        {
            log::warn!(
                "the snapshot before this one is left in {}: {error}",
                self.partial.display()
            );
        }
        Ok(())
    }

    /// What was under the name is there again. Where that is refused nothing is removed.
    fn swap_back(&mut self) {
        let back = match self.replaces {
            true => self.swap(),
            false => self.files.rename(&self.target, &self.partial),
        };
        if let Err(back) = back {
            log::error!(
                "{}: the new snapshot stays there, though it was refused or its name may not be durable: {back}",
                self.target.display()
            );
            self.done = true;
        }
    }

    fn swap(&self) -> io::Result<()> {
        match self.replaces {
            true => self.files.exchange(&self.partial, &self.target),
            false => self.files.rename(&self.partial, &self.target),
        }
    }
}

impl<F: SnapshotFiles> Drop for Draft<'_, F> {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.files.remove(&self.partial)
        {
            log::warn!(
                "what was written of a snapshot is left in {}: {error}",
                self.partial.display()
            );
        }
    }
}

pub(super) fn call(what: &'static str, path: &Path) -> impl Fn(io::Error) -> WriteError {
    let path = path.to_owned();
    move |source| WriteError::Call {
        what,
        path: path.clone(),
        source,
    }
}

/// Whether there is something that a new snapshot replaces.
fn look(target: &Path) -> Result<bool, WriteError> {
    let occupied = || WriteError::Occupied(target.to_owned());
    match std::fs::symlink_metadata(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(call("look at", target)(error)),
        Ok(there) if !there.is_dir() => return Err(occupied()),
        Ok(_) => {}
    }
    match contents::of(target)? {
        Contents::Nothing => Ok(true),
        Contents::Snapshot => hold_to_replace(target).map(|_| true),
        Contents::Beside(entry) => Err(foreign(target, entry)),
        Contents::Other(_) => Err(occupied()),
    }
}

/// Keeps `dir`, on which a snapshot is built, from being replaced until that is there.
///
/// # Errors
/// [`WriteError::InUse`]: it is being replaced.
pub fn hold_parent(dir: &Path) -> Result<Locked, WriteError> {
    let held = File::open(dir).and_then(|file| lock(file, libc::LOCK_SH));
    held.map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => WriteError::InUse(dir.to_owned()),
        _ => call("lock", dir)(source),
    })
}

/// Keeps others from building on the snapshot in `target`, on which none builds.
fn hold_to_replace(target: &Path) -> Result<Locked, WriteError> {
    let held = lock_dir(target).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => WriteError::BuiltOn(target.to_owned()),
        _ => call("lock", target)(source),
    })?;
    not_a_parent(target)?;
    Ok(held)
}

/// Refuses a snapshot that others build on. What cannot be parsed is nobody's parent any more.
fn not_a_parent(target: &Path) -> Result<(), WriteError> {
    let Ok(id) = super::link::id_of(target) else {
        return Ok(());
    };
    let mut children = super::children::of(target, id).into_iter();
    match children.next() {
        None => Ok(()),
        Some(child) => Err(WriteError::Parent {
            dir: target.to_owned(),
            child,
            more: children.len(),
        }),
    }
}

/// Looks again at what was `target`, and is `dir` now.
fn look_again(dir: &Path, target: &Path) -> Result<(), WriteError> {
    match contents::of(dir)? {
        Contents::Nothing | Contents::Snapshot => Ok(()),
        // Nothing of it was there when it was looked at.
        Contents::Beside(entry) | Contents::Other(entry) => Err(foreign(target, entry)),
    }
}

fn foreign(dir: &Path, entry: OsString) -> WriteError {
    let dir = dir.to_owned();
    WriteError::Foreign { dir, entry }
}

/// Whether both are one file, or one directory.
pub(super) fn same(one: &Path, other: &Path) -> bool {
    let of = |path: &Path| {
        let path = match path.as_os_str().is_empty() {
            true => Path::new("."),
            false => path,
        };
        let is = std::fs::metadata(path).ok()?;
        Some((is.dev(), is.ino()))
    };
    of(one).is_some_and(|one| Some(one) == of(other))
}

/// From the root on; as it is where the process has no current directory.
pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Refuses a `target` that has a snapshot above it, whichever links and dots lead there.
fn not_within(target: &Path) -> Result<(), WriteError> {
    let above = absolute(target);
    // What is not there yet, and so cannot be made there, is left to who finds that out.
    let mut there = above.ancestors().skip(1);
    let there = there.find_map(|above| std::fs::canonicalize(above).ok());
    let mut there = there.iter().flat_map(|above| above.ancestors());
    match there.find(|above| is_snapshot(above)) {
        Some(snapshot) => Err(WriteError::Within {
            dir: target.to_owned(),
            snapshot: snapshot.to_owned(),
        }),
        None => Ok(()),
    }
}

/// Whether what can be read of `dir` says so, wherever its files are.
fn is_snapshot(dir: &Path) -> bool {
    let state = std::fs::canonicalize(dir.join(STATE));
    state.is_ok_and(|state| matches!(contents::begins_as(&state, &super::format::MAGIC), Ok(true)))
}
