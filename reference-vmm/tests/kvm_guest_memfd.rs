// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `--memory SIZE,guest-memfd`: a guest whose memory is a guest_memfd has what any other has, and is saved whole and goes
//! on, with nothing lost. What takes a dirty log or a userfaultfd is refused with the reason, and the guest runs on. Where
//! the host's KVM has no such memory, that is said before there is a guest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use guests::boot;
use guests::console;
use guests::verifier::verifier64;
use kvm_core::{CheckExtension, Kvm};
use memslots::{Holes, MemoryKind};
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::end::GuestEnd;
use reference_vmm::lazy::{LazyRequest, PageServerAt};
use reference_vmm::snapshot::{RestoreRequest, SnapshotKind, SnapshotRequest};
use reference_vmm::vm::Machine;
use reference_vmm::vm::control::RunState;
use reference_vmm::vm::tracking::TrackUser;
use serde_json::Value;
use support::keeper::{Guest, keeper};
use support::{Vmm, need_kvm};

/// KVM's `KVM_CAP_GUEST_MEMFD_FLAGS`.
fn flags() -> i32 {
    need_kvm();
    let kvm = Kvm::open().unwrap();
    CheckExtension::check_extension(kvm.fd(), 244)
}

/// Whether this host has such memory; where it has not, the command line is refused with what it takes.
fn host_has_it() -> bool {
    let flags = flags().max(0);
    if flags & 3 == 3 {
        return true;
    }
    let ended = Vmm::boot(boot::hello64())
        .words("--memory 16M,guest-memfd")
        .output();
    let value = format!("KVM_CAP_GUEST_MEMFD_FLAGS is {flags} here");
    ended
        .expect_status(2)
        .expect_stdout("")
        .expect_line(&["16777216", &value, "Linux 6.18"]);
    println!("{ended}");
    false
}

fn of_guest_memfd(config: Config) -> Config {
    Config {
        memory: "16M,guest-memfd".parse().unwrap(),
        ..config
    }
}

#[test]
fn all_of_its_memory_is_of_one_but_for_its_firmware() {
    if !host_has_it() {
        return;
    }
    for memory in [
        "6G,guest-memfd",
        "2M,guest-memfd",
        "64M,guest-memfd,prefault",
    ] {
        let ended = Vmm::boot(console::rom64())
            .words("--debug-exit --stats=json --memory")
            .arg(memory)
            .output();
        ended.expect_status(1).expect_stdout("RR\n");
        let line = ended.stderr.lines().last().unwrap_or_default();
        let stats: Value = serde_json::from_str(line).unwrap();
        let slots = stats["slots"].as_array().unwrap();
        assert!(slots.len() >= 3, "{stats}");
        for slot in slots {
            let due = match slot["read-only"].as_bool().unwrap() {
                true => "anonymous memory",
                false => "a guest_memfd",
            };
            assert_eq!(slot["backing"], due, "{stats}");
        }
    }
}

/// The bytes of its guest_memfd that nobody has ever touched.
fn holes(guest: &Guest) -> u64 {
    let holes = Holes::open().unwrap();
    let table = guest.running.memory();
    let regions = table.regions().map(|region| region.mapping());
    let regions = regions.filter(|mapping| mapping.kind() == MemoryKind::GuestMemfd);
    let found = regions.flat_map(|mapping| holes.of(mapping, 0..mapping.size()).unwrap());
    found.map(|hole| hole.end - hole.start).sum()
}

#[test]
fn a_guest_in_one_is_saved_whole_and_goes_on_with_nothing_lost() {
    if !host_has_it() {
        return;
    }
    for irqchip in [Irqchip::Split, Irqchip::Kernel] {
        let (_kernel, config) = keeper(4, irqchip);
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("first"), folder.path().join("second"));
        let mut guest = Guest::boot(&of_guest_memfd(config));
        guest.hear(3);
        let untouched = holes(&guest);
        assert!(untouched > 12 << 20, "{untouched}");
        guest.snapshot(&SnapshotRequest::new(&first));
        // What is read is made, and a guest_memfd's pages are never swapped.
        assert_eq!(holes(&guest), untouched);
        // It ran on; and what it goes on in is a guest_memfd again, of which another snapshot is taken.
        guest.hear(2);
        guest.running.pause().unwrap();
        guest.snapshot(&SnapshotRequest::new(&second));
        guest.is_saved_in(&second);
        guest.running.resume().unwrap();
        guest.has_all();
        for dir in [&first, &second] {
            let mut guest = Guest::restore(&RestoreRequest::new(dir));
            let table = guest.running.memory();
            let writable = table.regions().filter(|region| !region.is_read_only());
            for kind in writable.map(|region| region.mapping().kind()) {
                assert_eq!(kind, MemoryKind::GuestMemfd);
            }
            guest.hear(3);
            let third = folder.path().join("third");
            guest.snapshot(&SnapshotRequest::new(&third));
            guest.has_all();
            Guest::restore(&RestoreRequest::new(&third)).has_all();
        }
    }
}

#[test]
fn every_page_of_it_is_found_as_it_was_by_four_vcpus() {
    if !host_has_it() {
        return;
    }
    let (_kernel, config) = verified();
    let mut guest = Guest::boot(&config);
    guest.hear(3);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.has_all();
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    guest.hear(3);
    guest.has_all();
}

/// A machine of four vCPUs that find all of their memory as it is to be, over and over.
fn verified() -> (tempfile::TempPath, Config) {
    let kernel = support::file(&guests::image::elf64(verifier64()));
    let (_, config) = keeper(4, Irqchip::Split);
    let config = Config {
        kernel: Some(kernel.to_path_buf()),
        ..of_guest_memfd(config)
    };
    (kernel, config)
}

#[test]
fn what_takes_a_dirty_log_or_a_userfaultfd_is_refused_and_the_guest_runs_on() {
    if !host_has_it() {
        return;
    }
    let (_kernel, config) = keeper(2, Irqchip::Split);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("s");
    let mut guest = Guest::boot(&of_guest_memfd(config));
    guest.hear(2);
    let log = "the dirty log on a guest_memfd: KVM has no such thing";
    Vmm::boot(boot::hello64())
        .words("--memory 16M,guest-memfd --dirty-log ring")
        .output()
        .expect_status(2)
        .expect_line(&[
            "guest-memfd and --dirty-log ring",
            "leave one of the two out",
        ]);
    for user in [TrackUser::Snapshot, TrackUser::Migration] {
        let why = guest.running.start_tracking(user).unwrap_err().to_string();
        assert!(
            why.contains(log) && why.contains("a whole snapshot"),
            "{why}"
        );
        assert!(!guest.running.is_tracked(user));
    }
    let plain = SnapshotRequest::new(&dir);
    let tracked = SnapshotRequest {
        track: Some(true),
        ..plain.clone()
    };
    let background = SnapshotRequest {
        background: true,
        ..plain.clone()
    };
    let diff = SnapshotRequest {
        kind: SnapshotKind::Diff { base: None },
        ..plain.clone()
    };
    for (request, needle) in [
        (tracked, log),
        (background, "write-protect faults on a guest_memfd: "),
        (diff, "track"),
    ] {
        let why = guest.running.snapshot(&request).unwrap_err().to_string();
        assert!(why.contains(needle), "{why}");
        assert!(!dir.exists(), "{why}");
    }
    assert_eq!(guest.running.state(), RunState::Running);
    guest.hear(2);
    guest.snapshot(&plain);
    guest.has_all();

    let lazy = RestoreRequest {
        lazy: Some(LazyRequest::default()),
        ..RestoreRequest::new(&dir)
    };
    let tracks = RestoreRequest {
        track: true,
        ..RestoreRequest::new(&dir)
    };
    let server = RestoreRequest {
        lazy: Some(LazyRequest {
            page_server: Some(Box::new(PageServerAt {
                address: "unix:/nowhere".parse().unwrap(),
                tls: None,
            })),
            ..LazyRequest::default()
        }),
        ..RestoreRequest::new(&dir)
    };
    for (request, needle) in [
        (lazy, "--lazy: the guest's memory is a guest_memfd"),
        (server, "--page-server: the guest's memory is a guest_memfd"),
        (tracks, "no dirty log: restore it without it"),
    ] {
        let (_, writer) = std::io::pipe().unwrap();
        let end = std::sync::Arc::new(reference_vmm::end::EndSignal::new().unwrap());
        let Err(why) = Machine::restore(&request, &writer, &end) else {
            panic!("no {needle}");
        };
        assert_eq!(why.exit_status(), 2, "{why}");
        let why = why.to_string();
        // What a restore cannot do is no remedy.
        assert!(why.contains(needle) && !why.contains("take a"), "{why}");
    }
    let info = Vmm::command(["snapshot", "info"]).arg(&dir).output();
    assert!(info.text().contains("16.0 MiB, guest-memfd\n"), "{info}");
    // And it was not hurt by any of it.
    let (said, end) = Guest::restore(&RestoreRequest::new(&dir)).quit();
    assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{said}");
}

#[test]
fn it_is_not_migrated_and_says_so_before_anybody_is_connected_to() {
    if !host_has_it() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (socket, nobody) = (folder.path().join("api"), folder.path().join("nobody"));
    let mut run = Vmm::boot(boot::spin64())
        .words("--memory 16M,guest-memfd --api-sock")
        .arg(&socket)
        .start();
    run.wait_for("up\n");
    let to = format!("unix:{}", nobody.display());
    let ended = Vmm::command(["ctl", "--api-sock"])
        .arg(&socket)
        .args(["migrate", "--to", &to])
        .output();
    ended
        .expect_status(1)
        .expect_line(&["dirty log on a guest_memfd"]);
    run.signal(libc::SIGTERM);
    run.wait().expect_status(0);
}
