// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Chains of snapshots over the real KVM: each holds what was written since the one before, and a guest that knows what it
//! has goes on from any of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faulty_files;
mod support;

use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use faulty_files::{Faulty, before};
use guests::keeper::keeper64;
use reference_vmm::config::Irqchip;
use reference_vmm::snapshot::files::{Draft, HostFiles, WriteError};
use reference_vmm::snapshot::info::{self, SnapshotInfo};
use reference_vmm::snapshot::merge::{MergeRequest, merge};
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotError, SnapshotKind, SnapshotRequest};
use reference_vmm::vm::Running;
use reference_vmm::vm::tracking::TrackUser;
use support::keeper::{Guest, keeper};
use support::{Vmm, long, need_kvm};
use vm_memory::{Bytes, GuestAddress};

/// Pages that the guest leaves alone: one that this test writes before each link, and makes zero before every other one,
/// and behind it one for each link.
const MINE: u64 = 15 << 20;

/// Writes to a page as a device does, once.
fn write(running: &Running, page: u64, fill: u8) {
    let address = GuestAddress(MINE + page * 4096);
    running
        .memory()
        .write_slice(&[fill; 4096], address)
        .unwrap();
}

fn is_filled(running: &Running, page: u64, fill: u8) -> bool {
    let (mut bytes, address) = ([0xee; 4096], GuestAddress(MINE + page * 4096));
    running.memory().read_slice(&mut bytes, address).unwrap();
    bytes == [fill; 4096]
}

/// What the first page has at a link.
fn fill(number: usize) -> u8 {
    if number.is_multiple_of(2) { 7 } else { 0 }
}

fn full(dir: &Path) -> SnapshotRequest {
    SnapshotRequest {
        track: Some(true),
        ..SnapshotRequest::new(dir)
    }
}

fn diff(dir: &Path, base: &Path) -> SnapshotRequest {
    let base = Some(base.to_owned());
    SnapshotRequest {
        kind: SnapshotKind::Diff { base },
        ..SnapshotRequest::new(dir)
    }
}

#[test]
fn a_guest_goes_on_from_any_link_of_a_chain_and_has_lost_nothing() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for (cpus, irqchip, log) in [
        (1, Irqchip::Split, "bitmap"),
        (4, Irqchip::Kernel, "bitmap"),
        (1, Irqchip::Kernel, "ring"),
        (4, Irqchip::Split, "ring"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dir = |number: usize| folder.path().join(format!("s{number}"));
        let (_kernel, mut config) = keeper(cpus, irqchip);
        config.dirty_log = log.parse().unwrap();
        let mut guest = Guest::boot(&config);
        let links = if long() { 20 } else { 5 };
        for number in 0..links {
            guest.hear(1);
            guest.running.pause().unwrap();
            write(&guest.running, 0, fill(number));
            write(&guest.running, 1 + number as u64, 1 + number as u8);
            let mut request = match number {
                0 => full(&dir(0)),
                _ => diff(&dir(number), &dir(number - 1)),
            };
            if number % 3 == 2 {
                request.compression = Compression::Zstd;
            }
            guest.snapshot(&request);
            guest.is_saved_in(&dir(number));
            guest.running.resume().unwrap();
        }
        guest.hear(1);
        guest.has_all();
        let last = SnapshotInfo::read(&dir(links - 1)).unwrap();
        assert_eq!(last.chain.len(), links - 1, "{last}");
        assert!(last.own < last.memory / 2, "{last}");
        assert_eq!(info::verify(&dir(links - 1)).unwrap(), links);
        for number in [0, 1, 2, links - 1] {
            let mut guest = Guest::restore(&RestoreRequest::new(dir(number)));
            assert!(is_filled(&guest.running, 0, fill(number)), "{number}");
            for before in 0..links {
                let filled = if before <= number {
                    1 + before as u8
                } else {
                    0
                };
                assert!(is_filled(&guest.running, 1 + before as u64, filled));
            }
            guest.hear(2);
            guest.has_all();
        }
        // As one, which needs none of them.
        let out = folder.path().join("out");
        let request = MergeRequest {
            dirs: vec![dir(links - 1)],
            to: out.clone(),
            compression: Compression::None,
        };
        merge(&request, &HostFiles).unwrap();
        (0..links).for_each(|number| std::fs::remove_dir_all(dir(number)).unwrap());
        let mut guest = Guest::restore(&RestoreRequest::new(&out));
        guest.hear(2);
        guest.has_all();
    }
}

#[test]
fn a_chain_goes_on_behind_a_restore() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for (memory, log) in [
        ("16M", "bitmap"),
        ("16M,shared", "bitmap"),
        ("16M", "ring=32768"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let dir = |number: usize| folder.path().join(format!("s{number}"));
        let (_kernel, mut config) = keeper(1, Irqchip::Split);
        config.memory = memory.parse().unwrap();
        config.dirty_log = log.parse().unwrap();
        let mut guest = Guest::boot(&config);
        guest.hear(1);
        guest.snapshot(&full(&dir(0)));
        drop(guest);
        for number in 1..5 {
            let request = RestoreRequest {
                track: true,
                ..RestoreRequest::new(dir(number - 1))
            };
            let mut guest = Guest::restore(&request);
            guest.hear(1);
            guest.running.pause().unwrap();
            // What it was restored from is the last one.
            guest.snapshot(&SnapshotRequest {
                kind: SnapshotKind::Diff { base: None },
                ..SnapshotRequest::new(dir(number))
            });
            guest.is_saved_in(&dir(number));
        }
        let info = SnapshotInfo::read(&dir(4)).unwrap();
        assert_eq!(info.parent.as_ref().map(|of| of.depth), Some(4));
        let mut guest = Guest::restore(&RestoreRequest::new(dir(4)));
        guest.hear(1);
        guest.has_all();
    }
}

#[test]
fn what_an_incremental_snapshot_cannot_build_on_is_refused_with_the_numbers() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let refused = |guest: &Guest, request: &SnapshotRequest, needles: &[&str]| {
        let before = std::fs::read_dir(folder.path()).unwrap().count();
        let error = guest.running.snapshot(request).unwrap_err();
        let text = reference_vmm::end::Chain(&error).to_string();
        for needle in needles {
            assert!(text.contains(needle), "{text}: {needle}");
        }
        let after = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(before, after);
        error
    };
    // Nobody tracks.
    guest.snapshot(&SnapshotRequest::new(dir("a")));
    refused(&guest, &diff(&dir("x"), &dir("a")), &["--track"]);
    guest.snapshot(&full(&dir("a")));
    guest.snapshot(&diff(&dir("b"), &dir("a")));
    // An older one.
    let id = |name: &str| SnapshotInfo::read(&dir(name)).unwrap().id.to_string();
    let b = dir("b");
    let needles = [&*id("a"), &*id("b"), b.to_str().unwrap()];
    let error = refused(&guest, &diff(&dir("x"), &dir("a")), &needles);
    assert!(matches!(error, SnapshotError::Base { .. }));
    // None at all, and onto the chain itself.
    refused(&guest, &diff(&dir("x"), &dir("nothing")), &["nothing"]);
    for name in ["a", "b"] {
        let error = refused(&guest, &diff(&dir(name), &dir("b")), &[name]);
        assert!(matches!(error, SnapshotError::OntoItself(_)));
    }
    // A full one onto what the last one builds on.
    for request in [full(&dir("a")), SnapshotRequest::new(dir("a"))] {
        let error = refused(&guest, &request, &[b.to_str().unwrap(), "builds on"]);
        assert!(matches!(error, SnapshotError::OntoBase { .. }));
    }
    // One that lost what it builds on.
    std::fs::rename(dir("a"), folder.path().join("elsewhere")).unwrap();
    refused(&guest, &diff(&dir("x"), &dir("b")), &["builds on"]);
    std::fs::rename(folder.path().join("elsewhere"), dir("a")).unwrap();
    // A full one between is the last one then; and it is no more.
    guest.snapshot(&SnapshotRequest::new(dir("c")));
    refused(&guest, &diff(&dir("x"), &dir("b")), &[&id("c")]);
    // A merge knows of no guest, and may replace it.
    let (was, request) = (
        id("c"),
        MergeRequest {
            dirs: vec![dir("b")],
            to: dir("c"),
            compression: Compression::None,
        },
    );
    merge(&request, &HostFiles).unwrap();
    let c = dir("c");
    let needles = [c.to_str().unwrap(), &was, &id("c"), "replaced", "full one"];
    let error = refused(&guest, &diff(&dir("x"), &c), &needles);
    assert!(matches!(error, SnapshotError::Replaced { .. }));
    // Which is replaced by itself, as nothing builds on it.
    guest.snapshot(&SnapshotRequest::new(dir("c")));
    guest.snapshot(&SnapshotRequest {
        track: Some(false),
        ..diff(&dir("d"), &dir("c"))
    });
    assert!(!guest.running.is_tracked(TrackUser::Snapshot));
    refused(&guest, &diff(&dir("x"), &dir("d")), &["--track"]);
    // Nobody's chain goes on there, and it is the parent of one all the same.
    let d = dir("d");
    let needles = ["is the parent of", d.to_str().unwrap()];
    let error = refused(&guest, &SnapshotRequest::new(dir("c")), &needles);
    assert!(matches!(
        error,
        SnapshotError::Write(WriteError::Parent { .. })
    ));
    guest.has_all();
}

#[test]
fn a_file_call_that_is_refused_loses_no_page_and_no_older_link() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    // One that fails begins nothing.
    for at in [0, 3, 6] {
        let error = guest
            .running
            .snapshot_with(&full(&dir("a")), &Faulty::new(at, Some(libc::ENOSPC)));
        error.unwrap_err();
        assert!(!guest.running.is_tracked(TrackUser::Snapshot), "{at}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
    guest.snapshot(&full(&dir("a")));
    let mut newest = dir("a");
    let mut refused = 0;
    for (name, errno, compression) in [
        ("b", libc::ENOSPC, Compression::None),
        ("c", libc::EIO, Compression::Zstd),
    ] {
        let request = SnapshotRequest {
            compression,
            ..diff(&dir(name), &newest)
        };
        // Once, before the first that fails.
        write(&guest.running, 0, name.as_bytes()[0]);
        for at in 0.. {
            guest.hear(1);
            let files = Faulty::new(at, Some(errno));
            guest.running.pause().unwrap();
            let taken = guest.running.snapshot_with(&request, &files);
            match taken {
                Err(error) => {
                    let text = reference_vmm::end::Chain(&error).to_string();
                    assert!(text.contains(&format!("os error {errno}")), "{text}");
                    assert!(!dir(name).exists(), "{at}");
                    info::verify(&newest).unwrap();
                    refused += 1;
                }
                Ok(_) => {
                    // All that was written since the last good one is in it.
                    guest.is_saved_in(&dir(name));
                    guest.running.resume().unwrap();
                    break;
                }
            }
            guest.running.resume().unwrap();
        }
        newest = dir(name);
    }
    assert!(refused > 20, "{refused}");
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&newest));
    guest.hear(2);
    guest.has_all();
}

#[test]
fn the_command_line_makes_a_chain_says_what_it_is_and_merges_it() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let socket = path("api");
    let mut run = Vmm::boot(keeper64())
        .words("--cmdline 1 --memory 16M --debug-exit --rng --track-dirty-pages --api-sock")
        .arg(&socket)
        .stdin_pipe()
        .start();
    run.wait_for("1");
    let ctl = |words: &[&str]| {
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(&socket);
        ctl.args(words).output()
    };
    let vmm = |words: &[&str]| Vmm::command(words).output();
    let (a, b, c, out) = (path("a"), path("b"), path("c"), path("out"));
    ctl(&["snapshot", &b, "--base", &a])
        .expect_status(1)
        .expect_line(&["--track"]);
    ctl(&["snapshot", &a]).expect_status(0);
    ctl(&["snapshot", &b, "--base", &a, "--compress", "zstd"]).expect_status(0);
    ctl(&["snapshot", &c, "--base", &a])
        .expect_status(1)
        .expect_line(&["build on that"]);
    ctl(&["snapshot", &c, "--base", &b]).expect_status(0);
    run.type_in(b"q");
    run.wait().expect_status(1).expect_silence();

    let json = |words: &[&str]| -> serde_json::Value {
        let said = vmm(words);
        said.expect_status(0);
        serde_json::from_slice(&said.stdout).unwrap()
    };
    let of = json(&["snapshot", "info", &c, "--json"]);
    assert_eq!(of["snapshot_type"], "Diff");
    assert_eq!(of["chain"][1]["path"], a.as_str());
    assert_eq!(of["parent"]["depth"], 2);
    vmm(&["snapshot", "info", &c]).expect_status(0);
    let of = json(&["snapshot", "info", &b, "--json"]);
    assert_eq!(of["children"], serde_json::json!([c]));
    let said = vmm(&["snapshot", "info", &b]);
    said.expect_status(0);
    let words = String::from_utf8(said.stdout).unwrap();
    assert!(words.contains(&format!("parent of   {c}\n")), "{words}");
    vmm(&["snapshot", "verify", &c])
        .expect_status(0)
        .expect_stdout(&format!(
            "{c} is whole, and so are the 2 that it builds on\n"
        ));
    let merged = json(&["snapshot", "merge", &a, &b, &c, "--to", &out, "--json"]);
    assert_eq!(merged["links"], 3);
    vmm(&["snapshot", "merge", &b, &c, "--to", &out])
        .expect_status(2)
        .expect_line(&[&b, "Name the full one first", &a]);
    // The chain is broken, and what was merged is not.
    std::fs::remove_file(PathBuf::from(&b).join("memory")).unwrap();
    vmm(&["snapshot", "verify", &c])
        .expect_status(2)
        .expect_line(&[&c, &b, "the file `state` alone"]);
    vmm(&["restore", "--from", &c])
        .expect_status(2)
        .expect_line(&[&c, &b, "the file `state` alone"]);
    let mut on = Vmm::command(["restore", "--from", &out])
        .stdin_pipe()
        .start();
    on.wait_for("5");
    on.type_in(b"q");
    on.wait().expect_status(1).expect_silence();
}

/// Whether somebody could put another snapshot in the place of this one.
fn can_be_replaced(dir: &Path) -> Result<(), WriteError> {
    Draft::begin(&HostFiles, dir).map(drop)
}

#[test]
fn what_a_snapshot_builds_on_cannot_be_replaced_while_it_is_written_nor_be_built_on_while_it_is_replaced()
 {
    need_kvm();
    let folder = tempfile::tempdir().unwrap();
    let dir = |name: &str| folder.path().join(name);
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    guest.snapshot(&full(&dir("a")));
    for (name, on, background) in [("b", "a", false), ("c", "b", true)] {
        let on = dir(on);
        write(&guest.running, 0, 1);
        // It is not there yet, and nobody can tell by its files what it builds on.
        let tried = Cell::new(0);
        let files = before(|| {
            let refused = can_be_replaced(&on);
            assert!(
                matches!(&refused, Err(WriteError::BuiltOn(dir)) if *dir == on),
                "{background}: {refused:?}"
            );
            tried.set(tried.get() + 1);
        });
        let request = SnapshotRequest {
            background,
            ..diff(&dir(name), &on)
        };
        guest.running.snapshot_with(&request, &files).unwrap();
        assert!(tried.get() > 0);
        let refused = can_be_replaced(&on);
        assert!(
            matches!(refused, Err(WriteError::Parent { .. })),
            "{refused:?}"
        );
    }
    // Whoever replaces one has its folder to himself.
    let last = dir("c");
    let held = std::fs::File::open(&last).unwrap();
    // SAFETY: a lock on an open descriptor.
    let locked = unsafe { libc::flock(held.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    assert_eq!(locked, 0);
    let request = diff(&dir("d"), &last);
    let error = guest.running.snapshot(&request).unwrap_err();
    assert!(
        matches!(&error, SnapshotError::Write(WriteError::InUse(dir)) if *dir == last),
        "{error:?}"
    );
    assert!(!dir("d").exists());
    drop(held);
    guest.running.snapshot(&request).unwrap();
    guest.has_all();
}
