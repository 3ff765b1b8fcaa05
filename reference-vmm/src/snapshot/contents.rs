// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What lies in a directory: whether a snapshot may take its place, and all of it be removed.
//!
//! Names alone do not tell: a `state` may be anybody's. A snapshot is what has a file `state` that begins as one, and its
//! files are that, `memory`, each `diskN` that it says it has, and a `working_set` and its pages that begin as such. Where it cannot be
//! parsed any `diskN` passes: it may be damaged, or newer than this program.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use async_pf::working_set;

use super::disks::{self, DiskCopy};
use super::files::{DISK, MEMORY, STATE, WORKING_SET, WORKING_SET_PAGES, WriteError, call};
use super::format;
use super::link::read_state;
use crate::lazy::kept;

/// What is in a directory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Contents {
    Nothing,
    /// A snapshot, and nothing else.
    Snapshot,
    /// A snapshot, and something of this name.
    Beside(OsString),
    /// No snapshot, but something of this name.
    Other(OsString),
}

/// What is in `dir`.
///
/// # Errors
/// [`WriteError::Call`]: that cannot be known.
pub(super) fn of(dir: &Path) -> Result<Contents, WriteError> {
    let Names { own, foreign } = Names::of(dir).map_err(call("read", dir))?;
    let state = own.iter().find(|name| *name == STATE);
    let Some(any) = foreign.as_ref().or(state).or(own.first()) else {
        return Ok(Contents::Nothing);
    };
    let Some(said) = said(dir)? else {
        return Ok(Contents::Other(any.clone()));
    };
    let stranger = own.iter().find(|name| {
        RECORDS
            .iter()
            .any(|(of, magic)| *name == of && !begins(dir, of, magic))
    });
    let foreign = foreign.or(stranger.cloned());
    let mut disks = own.into_iter().filter(|name| is_disk(name));
    let unsaid = said.and_then(|said| disks.find(|disk| said.iter().all(|it| *it != **disk)));
    Ok(match foreign.or(unsaid) {
        Some(name) => Contents::Beside(name),
        None => Contents::Snapshot,
    })
}

/// The names of the disks that the file `state` in `dir` says are beside it, none where it cannot be parsed. Nothing: it is
/// no snapshot's.
fn said(dir: &Path) -> Result<Option<Option<Vec<OsString>>>, WriteError> {
    let path = dir.join(STATE);
    // What cannot be read may be one all the same: nobody is told to remove it.
    if !begins_as(&path, &format::MAGIC)? {
        return Ok(None);
    }
    let bytes = read_state(&path).unwrap_or_default();
    let parsed = format::parse(&bytes).ok();
    let disks = parsed.and_then(|container| disks::of(&container).ok());
    let names = disks.map(|disks| disks.into_iter().map(DiskCopy::name));
    Ok(Some(names.map(|names| names.map(OsString::from).collect())))
}

/// Whether a regular file is at `path` that begins with `magic`. Nothing else is opened: it might wait for a writer.
///
/// # Errors
/// [`WriteError::Call`]: that cannot be known.
pub(super) fn begins_as<const N: usize>(path: &Path, magic: &[u8; N]) -> Result<bool, WriteError> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => {}
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(call("look at", path)(error));
        }
        _ => return Ok(false),
    }
    let mut found = [0; N];
    let file = File::open(path).map_err(call("open", path))?;
    match file.read_exact_at(&mut found, 0) {
        Ok(()) => Ok(found == *magic),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(call("read", path)(error)),
    }
}

/// The names in a directory.
pub(super) struct Names {
    /// Those that a snapshot's files have.
    pub(super) own: Vec<OsString>,
    /// One that none has.
    pub(super) foreign: Option<OsString>,
}

impl Names {
    pub(super) fn of(dir: &Path) -> io::Result<Self> {
        let mut own = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if !is_own(&name) || entry.file_type()?.is_dir() {
                let foreign = Some(name);
                return Ok(Names { own, foreign });
            }
            own.push(name);
        }
        let foreign = None;
        Ok(Names { own, foreign })
    }
}

/// Whether a file of a snapshot has this name.
fn is_own(name: &OsStr) -> bool {
    // What a record is before it is whole has nothing that would tell.
    let partial = |of: &str| format!(".{of}.partial");
    let record = RECORDS
        .iter()
        .any(|(of, _)| name == *of || *name == *partial(of));
    record || name == STATE || name == MEMORY || is_disk(name)
}

/// What a restore records of what a guest touches first, and how that begins.
const RECORDS: [(&str, [u8; 8]); 2] = [
    (WORKING_SET, working_set::MAGIC),
    (WORKING_SET_PAGES, kept::MAGIC),
];

fn begins(dir: &Path, name: &str, magic: &[u8; 8]) -> bool {
    matches!(begins_as(&dir.join(name), magic), Ok(true))
}

fn is_disk(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix(DISK));
    let parsed = number.and_then(|number| Some((number, number.parse::<u32>().ok()?)));
    parsed.is_some_and(|(number, parsed)| parsed.to_string() == number)
}
