// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The record's file: written beside, synced, renamed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{MOST_BYTES, RecordError, WorkingSet};

/// Why a file was not written, or not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// A call failed.
    #[error("{call} {}: {source}", path.display())]
    Call {
        /// What was tried.
        call: &'static str,
        /// Of which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no name of a file.
    #[error("{} is no name of a file", .0.display())]
    Name(PathBuf),
    /// It is not a regular file.
    #[error("{} is not a regular file", .0.display())]
    NotAFile(PathBuf),
    /// What is in it is no record.
    #[error("{}: {source}", path.display())]
    Record {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: RecordError,
    },
    /// It is the record of another snapshot.
    #[error("{} is the working set of another snapshot", .0.display())]
    OtherSnapshot(PathBuf),
}

impl WorkingSet {
    /// Writes it to `path`: beside it as `.NAME.partial` first, synced and renamed then, so that whatever happens there is
    /// the old file or the new one, whole. Blocks for as long as the disk takes.
    ///
    /// # Errors
    /// [`FileError`]; what was at `path` is as it was, and the partial file is gone (as far as it can be removed). When the
    /// last step fails, which is to sync the directory, the new file is in place and may not outlive a crash.
    pub fn save(&self, path: &Path) -> Result<(), FileError> {
        let no_name = || FileError::Name(path.to_owned());
        let name = path.file_name().ok_or_else(no_name)?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(".partial");
        let partial = directory.join(partial);

        let saved = self.save_by_way_of(&partial, path, directory);
        if saved.is_err() {
            // Best effort: the error that matters is the first one.
            fs::remove_file(&partial).ok();
        }
        saved
    }

    fn save_by_way_of(
        &self,
        partial: &Path,
        path: &Path,
        directory: &Path,
    ) -> Result<(), FileError> {
        match fs::remove_file(partial) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", partial)(source));
            }
            _ => {}
        }
        // Created, so that no link is followed that somebody has put there.
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(partial)
            .map_err(failed("create", partial))?;
        file.write_all(&self.encode())
            .map_err(failed("write", partial))?;
        file.sync_all().map_err(failed("sync", partial))?;
        fs::rename(partial, path).map_err(failed("rename to", path))?;
        let directory_file = File::open(directory).map_err(failed("open", directory))?;
        directory_file.sync_all().map_err(failed("sync", directory))
    }

    /// Reads the record at `path`. Blocks for as long as the disk takes; reads no more than [`MOST_BYTES`].
    ///
    /// # Errors
    /// [`FileError`]: without a record a restore goes on without prefetch.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        // A pipe in its place does not hold the open up.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(NONBLOCK)
            .open(path)
            .map_err(failed("open", path))?;
        let metadata = file.metadata().map_err(failed("look at", path))?;
        if !metadata.is_file() {
            return Err(FileError::NotAFile(path.to_owned()));
        }
        let wrong = |source| FileError::Record {
            path: path.to_owned(),
            source,
        };
        let bytes = metadata.len();
        if bytes > MOST_BYTES as u64 {
            return Err(wrong(RecordError::TooLong { bytes }));
        }
        let mut contents = Vec::with_capacity(bytes as usize);
        // It may grow while it is read.
        file.take(MOST_BYTES as u64 + 1)
            .read_to_end(&mut contents)
            .map_err(failed("read", path))?;
        Self::decode(&contents).map_err(wrong)
    }

    /// As [`load`](Self::load), of the record of this snapshot alone.
    ///
    /// # Errors
    /// As there, and [`FileError::OtherSnapshot`].
    pub fn load_of(path: &Path, snapshot: [u8; 16]) -> Result<Self, FileError> {
        let record = Self::load(path)?;
        match record.snapshot == snapshot {
            true => Ok(record),
            false => Err(FileError::OtherSnapshot(path.to_owned())),
        }
    }
}

/// `O_NONBLOCK`, of all architectures that this runs on.
const NONBLOCK: i32 = 0o4000;

fn failed(call: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError::Call { call, path, source }
}
