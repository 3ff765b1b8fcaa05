// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot that others build on is not replaced, and the refusal says who they are.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chain_files;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use chain_files::{Files, at, id, memory, parent, tree};
use reference_vmm::snapshot::SnapshotError;
use reference_vmm::snapshot::children;
use reference_vmm::snapshot::files::{Draft, HostFiles, WriteError, hold_parent};
use reference_vmm::snapshot::merge::{MergeError, MergeRequest, merge};
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::ranges::Ranges;

fn write(dir: &Path, number: u8, on: Option<(&Path, u8)>) {
    let parent =
        on.map(|(dir, before)| (parent(dir, id(before), before.into()), Ranges::of([at(0)])));
    let memory = &memory();
    Files {
        dir,
        id: id(number),
        parent,
        memory,
    }
    .write();
}

/// `base`, and `inc` on it.
fn two() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (base, inc) = (folder.path().join("base"), folder.path().join("inc"));
    write(&base, 1, None);
    write(&inc, 2, Some((&base, 1)));
    (folder, base, inc)
}

/// Begins a snapshot that would be in `dir`, and gives it up.
fn begin(dir: &Path) -> Result<(), WriteError> {
    Draft::begin(&HostFiles, dir).map(drop)
}

#[test]
fn what_others_build_on_is_not_replaced_and_who_they_are_is_said() {
    let (folder, base, inc) = two();
    let before = tree(folder.path());
    let error = begin(&base).unwrap_err();
    let text = error.to_string();
    let WriteError::Parent { dir, child, more } = error else {
        panic!("{text}");
    };
    assert_eq!((dir, child, more), (base.clone(), inc.clone(), 0));
    let says = format!("{} is the parent of {}", base.display(), inc.display());
    assert!(text.contains(&says), "{text}");

    // By any way that leads there.
    let way = folder.path().join("way");
    symlink(folder.path(), &way).unwrap();
    assert!(matches!(
        begin(&way.join("base")),
        Err(WriteError::Parent { .. })
    ));
    fs::remove_file(way).unwrap();

    let again = folder.path().join("again");
    write(&again, 3, Some((&base, 1)));
    let Err(WriteError::Parent { child, more, .. }) = begin(&base) else {
        panic!();
    };
    assert_eq!((child, more), (again.clone(), 1));
    fs::remove_dir_all(again).unwrap();
    assert_eq!(tree(folder.path()), before);

    // The last is nobody's parent.
    begin(&inc).unwrap();
    fs::remove_dir_all(&inc).unwrap();
    begin(&base).unwrap();
}

#[test]
fn a_merge_does_not_replace_what_others_build_on_either() {
    let (folder, base, inc) = two();
    let other = folder.path().join("other");
    write(&other, 9, None);
    let before = tree(folder.path());
    let request = MergeRequest {
        dirs: vec![other],
        to: base.clone(),
        compression: Compression::None,
    };
    let error = merge(&request, &HostFiles).unwrap_err();
    assert_eq!(error.exit_status(), 2);
    let MergeError::Write(SnapshotError::Write(WriteError::Parent { child, .. })) = error else {
        panic!("{error}");
    };
    assert_eq!(child, inc);
    assert_eq!(tree(folder.path()), before);
}

#[test]
fn a_child_that_comes_while_a_snapshot_is_written_is_not_lost_either() {
    let (folder, base, inc) = two();
    fs::remove_dir_all(&inc).unwrap();
    let draft = Draft::begin(&HostFiles, &base).unwrap();
    write(&inc, 2, Some((&base, 1)));
    let before = tree(&base);
    let error = draft.commit().unwrap_err();
    assert!(matches!(error, WriteError::Parent { .. }), "{error}");
    assert_eq!(tree(&base), before);
    assert!(!folder.path().join(".base.partial").exists());
}

#[test]
fn bad_neighbours_are_nobodys_children_and_no_error() {
    let (folder, base, inc) = two();
    let state = fs::read(inc.join("state")).unwrap();
    fs::remove_dir_all(&inc).unwrap();
    let neighbour = |name: &str| {
        let dir = folder.path().join(name);
        fs::create_dir(&dir).unwrap();
        dir.join("state")
    };
    // Each length of a state that was cut off, and each of its first bytes turned over, is no child or is one.
    let path = neighbour("cut");
    for len in 0..state.len() {
        fs::write(&path, &state[..len]).unwrap();
        children::of(&base, id(1));
    }
    let path = neighbour("turned");
    for at in 0..state.len().min(1024) {
        let mut bytes = state.clone();
        bytes[at] ^= 0xff;
        fs::write(&path, bytes).unwrap();
        children::of(&base, id(1));
    }
    fs::write(folder.path().join("file"), &state).unwrap();
    fs::create_dir(neighbour("directory")).unwrap();
    symlink("nowhere", neighbour("dangling")).unwrap();
    symlink("/proc/self/mem", neighbour("memory")).unwrap();
    let fifo = neighbour("fifo");
    make_fifo(&fifo);
    fs::remove_dir_all(folder.path().join("turned")).unwrap();
    fs::remove_dir_all(folder.path().join("cut")).unwrap();
    assert_eq!(children::of(&base, id(1)), Vec::<PathBuf>::new());
    begin(&base).unwrap();
}

fn make_fifo(path: &Path) {
    let made = std::process::Command::new("mkfifo").arg(path).status();
    assert!(made.unwrap().success());
}

#[test]
fn only_the_place_where_a_child_finds_its_parent_is_kept() {
    let (folder, base, inc) = two();
    // A copy under another name is not looked for, and may be replaced.
    let copy = folder.path().join("copy");
    write(&copy, 1, None);
    assert_eq!(children::of(&copy, id(1)), Vec::<PathBuf>::new());
    begin(&copy).unwrap();
    assert_eq!(children::of(&base, id(1)), std::slice::from_ref(&inc));
    // Another snapshot of the place is not what it builds on.
    write(&base, 7, None);
    assert_eq!(children::of(&base, id(7)), Vec::<PathBuf>::new());
    begin(&base).unwrap();

    // A chain that was moved as a whole finds it beside itself.
    write(&base, 1, None);
    let moved = tempfile::tempdir().unwrap();
    for name in ["base", "inc"] {
        fs::rename(folder.path().join(name), moved.path().join(name)).unwrap();
    }
    let (base, inc) = (moved.path().join("base"), moved.path().join("inc"));
    assert_eq!(children::of(&base, id(1)), [inc]);
    assert!(matches!(begin(&base), Err(WriteError::Parent { .. })));
}

#[test]
fn what_one_is_being_written_on_is_not_replaced_and_what_is_replaced_is_not_built_on() {
    let (folder, _, inc) = two();
    // Begun before anybody built on it.
    let draft = Draft::begin(&HostFiles, &inc).unwrap();
    let held = hold_parent(&inc).unwrap();
    let before = fs::read(inc.join("state")).unwrap();
    let error = draft.commit().unwrap_err();
    assert!(
        matches!(&error, WriteError::BuiltOn(dir) if *dir == inc),
        "{error}"
    );
    // And behind that.
    let error = begin(&inc).unwrap_err();
    assert!(
        matches!(&error, WriteError::BuiltOn(dir) if *dir == inc),
        "{error}"
    );
    assert_eq!(fs::read(inc.join("state")).unwrap(), before);
    // Many may be written at once.
    let other = hold_parent(&inc).unwrap();
    drop(held);
    assert!(begin(&inc).is_err());
    drop(other);

    // What was cut short, or still goes on, is in nobody's way.
    let cut = folder.path().join(".cut.partial");
    write(&cut, 3, Some((&inc, 2)));
    begin(&inc).unwrap();
}
