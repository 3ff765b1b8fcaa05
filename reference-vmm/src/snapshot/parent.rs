// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! On which snapshot an incremental one builds: the section `parent` of the file `state`.
//!
//! ```text
//!    0  16  the parent's id
//!   16   4  how many snapshots there are before this one: 1 to 128
//!   20   4  length of the path, bytes: 1 to 4096
//!   24   …  the parent's directory, absolute, as it was then: any bytes but 0
//! ```
//!
//! A parent is known by its id alone. It is looked for at its path, and if there is none of that id there, beside the
//! snapshot that wants it under the last name of the path: a chain may be moved as a whole.

#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::format::{SnapshotId, u32_at};

/// A chain has no more snapshots than these before its last.
pub const MOST_DEPTH: u32 = 128;

const PATH: usize = 24;
const MOST_PATH: usize = 4096;

/// The snapshot before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// Its number.
    pub id: SnapshotId,
    /// How many there are before the one that has this section.
    pub depth: u32,
    /// Where it was.
    pub path: PathBuf,
}

/// Why bytes are no such section.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the section parent is none: {0}")]
pub struct ParentError(pub String);

impl Parent {
    /// Where it may be, for the snapshot in `child`: one place or two.
    pub fn places(&self, child: &Path) -> Vec<PathBuf> {
        let mut places = vec![self.path.clone()];
        let beside = self.path.file_name().map(|name| match child.parent() {
            Some(folder) => folder.join(name),
            None => PathBuf::from(name),
        });
        places.extend(beside.filter(|beside| *beside != self.path));
        places
    }

    /// Whether [`parse`](Self::parse) reads what [`encode`](Self::encode) writes. A path from the root on may be longer than
    /// the host takes where a process is deep below it.
    ///
    /// # Errors
    /// [`ParentError`]: it does not, with what is wrong.
    pub fn check(&self) -> Result<(), ParentError> {
        Parent::parse(&self.encode()).map(drop)
    }

    /// The section's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let path = self.path.as_os_str().as_bytes();
        let mut bytes = self.id.0.to_vec();
        bytes.extend(self.depth.to_le_bytes());
        bytes.extend((path.len() as u32).to_le_bytes());
        bytes.extend(path);
        bytes
    }

    /// Reads the section.
    ///
    /// # Errors
    /// [`ParentError`]: it is not one of these, with what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParentError> {
        let wrong = |text: String| Err(ParentError(text));
        let path = bytes.get(PATH..).unwrap_or_default();
        let (depth, len) = (u32_at(bytes, 16), u32_at(bytes, 20) as usize);
        if path.len() != len || !(1..=MOST_PATH).contains(&len) || path.contains(&0) {
            let has = bytes.len();
            return wrong(format!("a path of {len} bytes in {has} bytes"));
        }
        if !(1..=MOST_DEPTH).contains(&depth) {
            return wrong(format!(
                "{depth} snapshots before it, and there are 1 to {MOST_DEPTH}"
            ));
        }
        let Some(id) = bytes.first_chunk::<16>() else {
            return wrong("no id".into());
        };
        Ok(Parent {
            id: SnapshotId(*id),
            depth,
            path: OsStr::from_bytes(path).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_read_again_is_found_before_it_is_written() {
        let of = |path: Vec<u8>, depth| Parent {
            id: SnapshotId([7; 16]),
            depth,
            path: OsStr::from_bytes(&path).into(),
        };
        let longest = of(vec![b'a'; MOST_PATH], MOST_DEPTH);
        assert_eq!(longest.check(), Ok(()));
        for wrong in [
            of(vec![b'a'; MOST_PATH + 1], 1),
            of(Vec::new(), 1),
            of(b"/s".to_vec(), MOST_DEPTH + 1),
        ] {
            let text = wrong.check().unwrap_err().to_string();
            let value = match wrong.depth {
                1 => wrong.path.as_os_str().len().to_string(),
                depth => depth.to_string(),
            };
            assert!(text.contains(&value), "{text}");
        }
    }
}
