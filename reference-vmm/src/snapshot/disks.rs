// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot that has its disks with it, as they were.
//!
//! Without, a snapshot [knows its disks by name](crate::devices::virtio::block::Fingerprint), and a restore refuses one
//! that has moved on. With `--disks reflink` each image is cloned at the pause into the snapshot's directory as `disk0`,
//! `disk1`, …: a file system that shares extents (XFS, Btrfs, bcachefs) does it at once and without room. With
//! `--disks copy` it is copied where that cannot be, holes left out, and the guest stands still for as long. A disk that
//! the guest only reads is not copied: who writes to it has to say so.
//!
//! The section `disks` of the file `state` is a JSON list, an object for each that is there:
//!
//! ```json
//! [{"disk": 0, "len": 1073741824}]
//! ```
//!
//! `disk` is its place in the configuration, from 0 on, `len` the length of the file, bytes. The copies have no checksum:
//! they are as good as the file system. A guest that goes on never writes to them: `restore --disks-to FOLDER` makes
//! copies of the copies, for the guest to have ([`provide`]).

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::files::{self, DISK, Draft, DraftFile, SnapshotFiles, WriteError};
use super::format::{Container, Kind};
use super::machine::StateError;
use super::restore::RestoreError;
use crate::devices::virtio::block::{BlockState, Fingerprint};
use crate::devices::virtio::list::DeviceState;
use crate::devices::virtio::mmio::MmioState;

/// What a snapshot does with disks that the guest writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCopies {
    /// It says which they are.
    #[default]
    Name,
    /// It has a clone of each, or there is no snapshot.
    Reflink,
    /// It has a clone of each, or a copy.
    Copy,
}

/// A disk that is in a snapshot's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskCopy {
    /// Its place in the configuration.
    pub disk: usize,
    /// Length of the file, bytes.
    pub len: u64,
}

/// A disk cannot be had in the snapshot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// It cannot be opened or read.
    #[error("cannot read the disk {path}: {source}")]
    Read {
        /// Its image.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// Another file has its name now.
    #[error("the disk {path} is not the guest's any more: {what}")]
    Other {
        /// Its image.
        path: PathBuf,
        /// In what it differs.
        what: String,
    },
    /// The file system cannot clone it.
    #[error(
        "the disk {path} cannot be cloned to where the snapshot is: {source}; --disks copy copies it, while the guest \
         stands still"
    )]
    Reflink {
        /// Its image.
        path: PathBuf,
        /// The errno.
        source: io::Error,
    },
    /// The copy cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl DiskCopy {
    /// The name of its file in the snapshot's directory.
    pub fn name(self) -> String {
        format!("{DISK}{}", self.disk)
    }
}

/// The disks that a file `state` says are beside it.
///
/// # Errors
/// [`StateError`]: the section is none.
pub fn of(container: &Container<'_>) -> Result<Vec<DiskCopy>, StateError> {
    let kind = Kind::Disks;
    let Ok(bytes) = container.section(kind) else {
        return Ok(Vec::new());
    };
    let copies: Vec<DiskCopy> =
        serde_json::from_slice(bytes).map_err(|source| StateError::Section { kind, source })?;
    let mut disks = BTreeSet::new();
    if let Some(twice) = copies.iter().find(|copy| !disks.insert(copy.disk)) {
        let text = format!("disk {} is there twice", twice.disk);
        return Err(StateError::Mismatch(text));
    }
    Ok(copies)
}

/// The section that says so; none if there are none.
pub(super) fn section(copies: &[DiskCopy]) -> Result<Option<(Kind, Vec<u8>)>, StateError> {
    let kind = Kind::Disks;
    if copies.is_empty() {
        return Ok(None);
    }
    let bytes =
        serde_json::to_vec(copies).map_err(|source| StateError::Section { kind, source })?;
    Ok(Some((kind, bytes)))
}

/// Opens a disk's image to read, if it still is the one that the device has.
///
/// # Errors
/// [`CopyError`].
pub(super) fn open_as_it_was(
    path: &Path,
    disk: usize,
    states: &[DeviceState],
) -> Result<File, CopyError> {
    let read = |source| CopyError::Read {
        path: path.to_owned(),
        source,
    };
    let image = File::open(path).map_err(read)?;
    let name = format!("disk{disk}");
    let state = states.iter().find(|state| state.name == name);
    let state = state.map(|state| MmioState::<BlockState>::deserialize(&state.state));
    let was = state
        .transpose()
        .map_err(|error| read(io::Error::other(error)))?
        .and_then(|state| state.device.image);
    let now = Fingerprint::of(&image, false).map_err(read)?;
    match was.and_then(|was| was.differs(&now)) {
        None => Ok(image),
        Some(what) => Err(CopyError::Other {
            path: path.to_owned(),
            what,
        }),
    }
}

/// Has what is in `image` in a file of the draft: cloned, and with `copy` copied where that cannot be, with `go_on` asked
/// before each MiB. What the image has by then is in it; that it is on the disk too is [`Draft::sync`]'s.
///
/// # Errors
/// [`CopyError`], and what `go_on` says.
pub(super) fn copy_in<F: SnapshotFiles, E: From<CopyError>>(
    draft: &Draft<'_, F>,
    image: &File,
    path: &Path,
    disk: usize,
    copy: bool,
    go_on: impl Fn() -> Result<(), E>,
) -> Result<(DiskCopy, DraftFile), E> {
    let read = |source| CopyError::Read {
        path: path.to_owned(),
        source,
    };
    // A block device's length is where its end is.
    let len = end(image).map_err(read)?;
    let of = DiskCopy { disk, len };
    let file = draft.create(&of.name(), 0).map_err(CopyError::from)?;
    match draft.reflink(&file, image) {
        Ok(()) => return Ok((of, file)),
        Err(source) if !copy => {
            let path = path.to_owned();
            return Err(CopyError::Reflink { path, source }.into());
        }
        Err(_) => draft.set_len(&file, len).map_err(CopyError::from)?,
    }
    let read = |error| E::from(read(error));
    copy_data(image, len, read, |bytes, at| {
        go_on()?;
        draft
            .write(&file, bytes, at)
            .map_err(|error| CopyError::from(error).into())
    })?;
    Ok((of, file))
}

/// Calls `write` with what is in `from` and is no hole.
fn copy_data<E>(
    from: &File,
    len: u64,
    read: impl Fn(io::Error) -> E,
    write: impl Fn(&[u8], u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let Some(start) = seek(from, at, libc::SEEK_DATA).filter(|start| *start < len) else {
            return Ok(());
        };
        let hole = seek(from, start, libc::SEEK_HOLE).unwrap_or(len).min(len);
        at = start;
        while at < hole {
            let count = (hole - at).min(buffer.len() as u64);
            let part = buffer.get_mut(..count as usize).unwrap_or_default();
            from.read_exact_at(part, at).map_err(&read)?;
            write(part, at)?;
            at += count;
        }
    }
    Ok(())
}

/// `lseek(2)`. None: there is nothing more. A file that cannot say so has data everywhere.
fn seek(file: &File, at: u64, whence: libc::c_int) -> Option<u64> {
    // SAFETY: an open descriptor; the position that it moves is nobody's, for all reads say theirs.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, whence) };
    match u64::try_from(found) {
        Ok(found) => Some(found),
        Err(_) => match io::Error::last_os_error().raw_os_error() {
            Some(libc::ENXIO) => None,
            _ if whence == libc::SEEK_DATA => Some(at),
            _ => None,
        },
    }
}

/// Where a file or a block device ends.
fn end(file: &File) -> io::Result<u64> {
    // SAFETY: an open descriptor.
    let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| io::Error::last_os_error())
}

/// Images that were made for a guest to go on with. Dropped, they are removed, unless they were [kept](Self::keep).
#[derive(Debug, Default)]
pub struct Provided {
    images: Vec<(usize, PathBuf)>,
    kept: bool,
}

impl Provided {
    /// Each disk's place, and its new image.
    pub fn images(&self) -> &[(usize, PathBuf)] {
        &self.images
    }

    /// They are the guest's now.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Provided {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        for (_, image) in &self.images {
            if let Err(error) = std::fs::remove_file(image) {
                log::warn!("the disk {} is left there: {error}", image.display());
            }
        }
    }
}

/// Copies disks of the snapshot in `dir` to `folder`, under the same names, by clones where that can be. Nothing that is
/// there is written over.
///
/// # Errors
/// [`RestoreError::DiskCopy`]; what was made is removed.
pub fn provide(dir: &Path, copies: &[DiskCopy], folder: &Path) -> Result<Provided, RestoreError> {
    let mut provided = Provided::default();
    if !folder.is_dir() {
        return Err(RestoreError::Override {
            flag: "--disks-to",
            why: format!("{} is no folder: name one that is there", folder.display()),
        });
    }
    for copy in copies {
        let (from, to) = (dir.join(copy.name()), folder.join(copy.name()));
        let wrong = |path: &Path| {
            let path = path.to_owned();
            move |source| RestoreError::DiskCopy {
                path: path.clone(),
                source,
            }
        };
        let (image, len) = super::link::open(&from)?;
        if len != copy.len {
            return Err(RestoreError::DiskLength {
                path: from,
                has: len,
                says: copy.len,
            });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&to).map_err(wrong(&to))?;
        provided.images.push((copy.disk, to.clone()));
        if files::clone(&image, &file).is_err() {
            file.set_len(len).map_err(wrong(&to))?;
            copy_data(&image, len, wrong(&from), |bytes, at| {
                file.write_all_at(bytes, at).map_err(wrong(&to))
            })?;
        }
        // A guest's flush is to mean that what is below is durable too.
        file.sync_all().map_err(wrong(&to))?;
    }
    if !provided.images.is_empty() {
        // And that there is a file of the name.
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|source| RestoreError::DiskCopy {
            path: folder.to_owned(),
            source,
        })?;
    }
    Ok(provided)
}
