// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! By what an image is known again: whether it is the disk that a snapshot was taken with, as it was then.
//!
//! A guest that goes on with a disk that has moved on writes old metadata over new and breaks its file systems, without a
//! word. So a disk that the guest writes goes on only as the same file with the same times of its last write and of its
//! last change: the kernel sets both at each write, and nobody sets the second. Of a disk that is read alone the size and
//! the time of the last write count, so that it may be moved. A block device keeps no times of its contents: of it the
//! size is all that is known.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use serde::{Deserialize, Serialize};

/// An image at one moment, as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// A block device.
    pub block_device: bool,
    /// The guest could only read it.
    pub readonly: bool,
    /// The file system's device number, and the inode's number.
    pub inode: (u64, u64),
    /// Bytes; 0 of a block device.
    pub len: u64,
    /// When it was last written: seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
    /// When it or what is known of it was last changed.
    pub changed: (i64, i64),
}

impl Fingerprint {
    /// Of an open image.
    ///
    /// # Errors
    /// The errno of `fstat(2)`.
    pub fn of(file: &File, readonly: bool) -> io::Result<Self> {
        let is = file.metadata()?;
        Ok(Fingerprint {
            block_device: is.file_type().is_block_device(),
            readonly,
            inode: (is.dev(), is.ino()),
            len: is.len(),
            modified: (is.mtime(), is.mtime_nsec()),
            changed: (is.ctime(), is.ctime_nsec()),
        })
    }

    /// What of it another one has not: the first thing, in words. None where the disk is as it was.
    pub fn differs(&self, now: &Fingerprint) -> Option<String> {
        let time = |(seconds, nanoseconds): (i64, i64)| format!("{seconds}.{nanoseconds:09}");
        if self.block_device != now.block_device {
            let kind = |is| if is { "a block device" } else { "a file" };
            let (was, is) = (kind(self.block_device), kind(now.block_device));
            return Some(format!("it was {was} and is {is}"));
        }
        if self.block_device {
            return None;
        }
        if self.len != now.len {
            return Some(format!("it had {} bytes and has {}", self.len, now.len));
        }
        if self.modified != now.modified {
            let (was, is) = (time(self.modified), time(now.modified));
            return Some(format!(
                "it was last written at {was} when the snapshot was taken, and has been written since, at {is}"
            ));
        }
        if self.readonly {
            return None;
        }
        if self.inode != now.inode {
            let ((_, was), (_, is)) = (self.inode, now.inode);
            return Some(format!("it is another file: inode {is}, and it was {was}"));
        }
        if self.changed != now.changed {
            let (was, is) = (time(self.changed), time(now.changed));
            return Some(format!(
                "it was last changed at {was} when the snapshot was taken, and has been changed since, at {is}"
            ));
        }
        None
    }
}
