// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which snapshots build on one: without it they are worth nothing, and nothing in it says that they are there.
//!
//! A chain lies in one folder as a rule, so the directories beside the snapshot are asked for their parents. Of each no more
//! is read than the header, the table and the section `parent` of its file `state`; what is no snapshot, or cannot be read,
//! is nobody's child. One that lies elsewhere is not found: nothing but it knows of it.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::files::{STATE, absolute, same};
use super::format::{self, HEAD, Kind, SnapshotId};
use super::link;
use super::parent::Parent;

/// No more directories than these are asked.
pub const MOST_BESIDE: usize = 16_384;

/// A section `parent` has no more bytes.
const MOST_SECTION: u64 = 8192;

/// The snapshots beside the one in `dir`, whose number is `id`, that would find it there as what they build on, by
/// directory, in its order. Blocks for the file system.
pub fn of(dir: &Path, id: SnapshotId) -> Vec<PathBuf> {
    let dir = absolute(dir);
    // By the folder that it is in, whatever links lead there.
    let Some(folder) = std::fs::canonicalize(&dir).ok() else {
        return Vec::new();
    };
    let mut folders: Vec<_> = [dir.parent(), folder.parent()]
        .into_iter()
        .flatten()
        .collect();
    if let [one, other] = &*folders
        && same(one, other)
    {
        folders.pop();
    }
    let entries = folders
        .into_iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten();
    let mut found = Vec::new();
    for (asked, entry) in entries.flatten().enumerate() {
        if asked == MOST_BESIDE {
            log::warn!(
                "there are more than {MOST_BESIDE} entries beside {}: whether the others build on it was not looked at",
                dir.display()
            );
            break;
        }
        // One that is being written has its parent locked; one that never was written to its end is nothing.
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(b".") && name.ends_with(b".partial") {
            continue;
        }
        let child = entry.path();
        if builds_on(&child, &dir, id) {
            found.push(child);
        }
    }
    found.sort();
    found
}

/// Whether the snapshot in `child` would find its parent `id` in `dir`, and nowhere else.
fn builds_on(child: &Path, dir: &Path, id: SnapshotId) -> bool {
    let Ok(Some(parent)) = parent_of(child) else {
        return false;
    };
    if parent.id != id || same(child, dir) {
        return false;
    }
    let is_there =
        |place: &PathBuf| same(place, dir) || link::id_of(place).is_ok_and(|found| found == id);
    let mut places = parent.places(child).into_iter().filter(is_there).peekable();
    // A copy of it elsewhere is as good.
    places.peek().is_some() && places.all(|place| same(&place, dir))
}

/// What the snapshot in `dir` says that it builds on; none where it is a full one, or no snapshot.
fn parent_of(dir: &Path) -> io::Result<Option<Parent>> {
    let path = dir.join(STATE);
    // Opening a pipe would wait for its other end.
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let is = file.metadata()?;
    if !is.is_file() {
        return Ok(None);
    }
    let len = is.len();
    let mut head = vec![0; HEAD.min(usize::try_from(len).unwrap_or(HEAD))];
    file.read_exact_at(&mut head, 0)?;
    let Some(place) = format::find(&head, Kind::Parent) else {
        return Ok(None);
    };
    if place.len > MOST_SECTION || place.offset.saturating_add(place.len) > len {
        return Ok(None);
    }
    let mut section = vec![0; place.len as usize];
    file.read_exact_at(&mut section, place.offset)?;
    let is_whole = format::checksum(&section) == place.checksum;
    Ok(is_whole.then(|| Parent::parse(&section).ok()).flatten())
}
