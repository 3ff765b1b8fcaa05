// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot comes into being whole or not at all, whatever call the host refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faulty_files;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use faulty_files::Faulty;
use reference_vmm::snapshot::files::{Draft, HostFiles, SnapshotFiles, WriteError, hold_parent};
use reference_vmm::snapshot::format::{Kind, SnapshotId, encode};

fn state(text: &str) -> Vec<u8> {
    let disks = br#"[{"disk": 10, "len": 8}]"#;
    let sections = [(Kind::Vm, text.into()), (Kind::Disks, disks.to_vec())];
    encode(SnapshotId([1; 16]), &sections)
}

fn write(files: &impl SnapshotFiles, target: &Path, text: &str) -> Result<(), WriteError> {
    let draft = Draft::begin(files, target)?;
    let memory = draft.create("memory", 1 << 20)?;
    draft.write(&memory, text.as_bytes(), 4096)?;
    let bytes = state(text);
    let file = draft.create("state", bytes.len() as u64)?;
    draft.write(&file, &bytes, 0)?;
    draft.sync(&memory)?;
    draft.sync(&file)?;
    draft.commit()
}

/// Every file below, and what is in it.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(tree(&path)),
            false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}

#[test]
fn a_refused_call_leaves_the_older_snapshot_whole_and_nothing_beside_it() {
    for older in [false, true] {
        // How many calls there are.
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("s");
        let good = Faulty::new(usize::MAX, None);
        write(&HostFiles, &target, "old").unwrap();
        if !older {
            fs::remove_dir_all(&target).unwrap();
        }
        write(&good, &target, "new").unwrap();
        let calls = good.calls.get();
        assert!(calls >= 11, "{calls}");
        for at in 0..calls {
            for errno in [libc::ENOSPC, libc::EIO, libc::EDQUOT] {
                let folder = tempfile::tempdir().unwrap();
                let target = folder.path().join("s");
                if older {
                    write(&HostFiles, &target, "old").unwrap();
                }
                let before = tree(folder.path());
                let error = write(&Faulty::new(at, Some(errno)), &target, "new").unwrap_err();
                let text = error.to_string();
                assert!(text.contains(&format!("os error {errno}")), "{at}: {text}");
                assert!(
                    text.contains(folder.path().to_str().unwrap()),
                    "{at}: {text}"
                );
                assert_eq!(tree(folder.path()), before, "{older} {at} {text}");
                let entries = fs::read_dir(folder.path()).unwrap().count();
                assert_eq!(entries, usize::from(older), "{at}: {text}");
                // And it works afterwards.
                write(&HostFiles, &target, "new").unwrap();
                assert_eq!(fs::read(target.join("state")).unwrap(), state("new"));
            }
        }
    }
}

#[test]
fn a_short_write_is_gone_on_with() {
    for at in 0..12 {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("s");
        write(&Faulty::new(at, None), &target, "new").unwrap();
        assert_eq!(fs::read(target.join("state")).unwrap(), state("new"));
        let memory = fs::read(target.join("memory")).unwrap();
        assert_eq!((memory.len(), &memory[4096..4099]), (1 << 20, &b"new"[..]));
    }
}

#[test]
fn what_a_crash_left_is_removed_by_the_next_and_what_is_being_written_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("s");
    let partial = folder.path().join(".s.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("memory"), "half").unwrap();
    write(&HostFiles, &target, "new").unwrap();
    assert!(!partial.exists());
    let held = Draft::begin(&HostFiles, &target).unwrap();
    let error = write(&HostFiles, &target, "other").unwrap_err();
    assert!(matches!(error, WriteError::InUse(_)), "{error}");
    drop(held);
    assert!(!partial.exists());
    assert_eq!(fs::read(target.join("state")).unwrap(), state("new"));
}

#[test]
fn only_a_snapshot_or_an_empty_directory_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("empty")).unwrap();
    write(&HostFiles, &at("empty"), "new").unwrap();
    fs::write(at("file"), "x").unwrap();
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full").join("state"), "mine").unwrap();
    std::os::unix::fs::symlink(at("empty"), at("link")).unwrap();
    for name in ["file", "full", "link"] {
        let error = write(&HostFiles, &at(name), "new").unwrap_err();
        assert!(matches!(error, WriteError::Occupied(_)), "{name}: {error}");
    }
    assert_eq!(fs::read(at("full").join("state")).unwrap(), b"mine");
    for path in ["/", ".."] {
        let error = write(&HostFiles, Path::new(path), "new").unwrap_err();
        assert!(matches!(error, WriteError::NoName(_)), "{error}");
    }
    // Its owner's alone.
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(at("empty")), mode(at("empty").join("memory"))),
        (0o700, 0o600)
    );
}

/// What lies there under other names than a snapshot's files have.
fn foreign(error: &WriteError, target: &Path, name: &str) {
    let WriteError::Foreign { dir, entry } = error else {
        panic!("{error}");
    };
    assert_eq!((&**dir, entry.to_str()), (target, Some(name)));
    assert!(
        error.to_string().contains("would be removed with it"),
        "{error}"
    );
}

#[test]
fn what_lies_beside_an_older_snapshot_is_not_removed_with_it() {
    // It says that it has a disk10, and no disk3.
    let names = [
        "root.raw",
        "disk",
        "disk01",
        "disk-1",
        "disk3",
        "state.bak",
        // Not what a restore records.
        "working_set",
        "working_set_pages",
        "sub",
    ];
    for name in names {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("s");
        write(&HostFiles, &target, "old").unwrap();
        fs::write(target.join("disk10"), "its disk").unwrap();
        match name {
            "sub" => fs::create_dir(target.join(name)).unwrap(),
            _ => fs::write(target.join(name), "somebody's own").unwrap(),
        }
        let before = tree(folder.path());
        foreign(
            &write(&HostFiles, &target, "new").unwrap_err(),
            &target,
            name,
        );
        assert_eq!(tree(folder.path()), before);
        assert!(target.join(name).exists());
        // Moved away, the older one is replaced.
        fs::rename(target.join(name), folder.path().join("away")).unwrap();
        write(&HostFiles, &target, "new").unwrap();
        assert_eq!(fs::read(target.join("state")).unwrap(), state("new"));
        assert!(!target.join("disk10").exists());
    }
}

#[test]
fn a_folder_that_is_not_there_is_named_and_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let error = write(&HostFiles, &missing.join("s"), "new").unwrap_err();
    assert!(matches!(error, WriteError::NoFolder { .. }), "{error}");
    let named = format!("{} is not there", missing.display());
    assert!(error.to_string().starts_with(&named), "{error}");
    assert!(!missing.exists());
}

#[test]
fn none_is_put_into_another_whichever_way_leads_there() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write(&HostFiles, &at("s"), "old").unwrap();
    fs::create_dir_all(at("s/below")).unwrap();
    std::os::unix::fs::symlink(at("s"), at("link")).unwrap();
    std::os::unix::fs::symlink(at("s/below"), at("deep")).unwrap();
    let before = tree(folder.path());
    for name in [
        "s/x",
        "./s/x",
        "s/below/x",
        "s/missing/x",
        "link/x",
        "deep/x",
        "s/../s/x",
    ] {
        let error = write(&Faulty::new(0, Some(libc::EIO)), &at(name), "new").unwrap_err();
        let WriteError::Within { dir, snapshot } = &error else {
            panic!("{name}: {error}");
        };
        assert_eq!(
            (&**dir, snapshot),
            (&*at(name), &fs::canonicalize(at("s")).unwrap())
        );
        assert!(
            error.to_string().contains("is within the snapshot"),
            "{error}"
        );
        assert_eq!(tree(folder.path()), before, "{name}");
    }
    fs::remove_dir(at("s/below")).unwrap();
    // Beside it, by a way through it; it itself; and below what only has such a name.
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("dir/state"), "idle").unwrap();
    fs::create_dir_all(at("other/state")).unwrap();
    for name in ["s/../beside", "s", "dir/x", "other/x"] {
        write(&HostFiles, &at(name), "new").unwrap();
        assert_eq!(fs::read(at(name).join("state")).unwrap(), state("new"));
    }
}

#[test]
fn what_comes_to_lie_there_while_a_snapshot_is_written_is_not_removed_either() {
    let names = ["thesis.tex", "state", "memory", "disk0", "disk1"];
    for (older, name) in [false, true]
        .into_iter()
        .flat_map(|older| names.map(|name| (older, name)))
    {
        if older && name == "memory" {
            // There is one, which it would be.
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("s");
        match older {
            true => write(&HostFiles, &target, "old").unwrap(),
            false => fs::create_dir(&target).unwrap(),
        }
        let draft = Draft::begin(&HostFiles, &target).unwrap();
        let bytes = state("new");
        let file = draft.create("state", bytes.len() as u64).unwrap();
        draft.write(&file, &bytes, 0).unwrap();
        draft.sync(&file).unwrap();
        fs::write(target.join(name), "years of work").unwrap();
        let mut due = tree(folder.path());
        due.retain(|path, _| path.starts_with(&target));
        foreign(&draft.commit().unwrap_err(), &target, name);
        assert_eq!(tree(folder.path()), due, "{older} {name}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn what_a_crash_left_is_removed_by_the_next_one_but_nothing_else_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let (target, partial) = (folder.path().join("s"), folder.path().join(".s.partial"));
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("memory"), "half").unwrap();
    fs::write(partial.join("root.raw"), "somebody's own").unwrap();
    let before = tree(folder.path());
    let error = write(&HostFiles, &target, "new").unwrap_err().to_string();
    assert!(error.contains("it holds root.raw"), "{error}");
    assert_eq!(tree(folder.path()), before);
    fs::remove_file(partial.join("root.raw")).unwrap();
    write(&HostFiles, &target, "new").unwrap();
    assert!(!partial.exists());
}

#[test]
fn what_was_locked_is_free_when_it_is_let_go_whoever_has_its_descriptor_still() {
    let folder = tempfile::tempdir().unwrap();
    let parent = hold_parent(folder.path()).unwrap();
    // As a child has it between fork and exec.
    let child = parent.try_clone().unwrap();
    let made = folder.path().join("s");
    let locked = HostFiles.create_dir(&made).unwrap();
    let child_of = locked.try_clone().unwrap();
    let refused = HostFiles.create_dir(&made).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    drop((parent, locked));
    HostFiles.create_dir(&made).unwrap();
    drop((child, child_of));
}
