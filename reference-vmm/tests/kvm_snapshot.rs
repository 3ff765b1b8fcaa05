// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots over the real KVM: a guest that knows what it has is stopped anywhere, and goes on elsewhere.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod faulty_files;
mod support;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use faulty_files::{before, with_room};
use guests::keeper::{QUIT, keeper64};
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::devices::virtio::any::Devices;
use reference_vmm::devices::virtio::rng::Rng;
use reference_vmm::end::GuestEnd;
use reference_vmm::main_loop::GuestSide;
use reference_vmm::snapshot::{RestoreRequest, SnapshotRequest};
use reference_vmm::vm::{Machine, RunState};
use support::keeper::{Guest, digits, keeper};
use support::{Vmm, lab_short, long, need_kvm};

/// Where snapshots go.
fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("snapshot");
    (folder, dir)
}

#[test]
fn a_guest_goes_on_where_it_was_again_and_again_and_has_lost_nothing() {
    need_kvm();
    let rounds = if long() { 40 } else { 4 };
    for (cpus, irqchip) in [
        (1, Irqchip::Split),
        (1, Irqchip::Kernel),
        (4, Irqchip::Split),
        (4, Irqchip::Kernel),
    ] {
        let (kernel, config) = keeper(cpus, irqchip);
        let (_folder, dir) = place();
        let mut guest = Guest::boot(&config);
        // No restore needs it.
        drop(kernel);
        let mut all = String::new();
        for round in 0..rounds {
            // Anywhere: the guest does not wait for who hears it.
            guest.hear(1 + round * 7 % 5);
            guest.running.pause().unwrap();
            guest.snapshot(&SnapshotRequest::new(&dir));
            assert_eq!(guest.running.state(), RunState::Paused);
            let (said, end) = guest.leave();
            assert_eq!(end, None, "{cpus} {irqchip:?} round {round}: {said}");
            all += &said;
            guest = Guest::restore(&RestoreRequest::new(&dir));
        }
        guest.hear(2);
        let (said, end) = guest.quit();
        all += &said;
        assert_eq!(
            end,
            Some(GuestEnd::DebugExit(0)),
            "{cpus} {irqchip:?}: {all}"
        );
        let count = all.len() - 1;
        assert_eq!(all, digits(count) + "!", "{cpus} {irqchip:?}");
    }
}

#[test]
fn what_was_typed_before_the_snapshot_is_read_behind_it() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    // The guest looks once a pass: of a few tries it is stopped before it has in most.
    for _ in 0..20 {
        let (_folder, dir) = place();
        let mut guest = Guest::boot(&config);
        guest.hear(1);
        assert_eq!(guest.running.input(&[QUIT]), 1);
        if guest.running.pause().is_err() || guest.end.is_told() {
            continue;
        }
        guest.snapshot(&SnapshotRequest::new(&dir));
        let (said, end) = guest.leave();
        if said.contains('!') {
            continue;
        }
        assert_eq!(end, None);
        let mut guest = Guest::restore(&RestoreRequest::new(&dir));
        while !guest.end.is_told() {
            guest.listen();
        }
        assert_eq!(guest.leave().1, Some(GuestEnd::DebugExit(0)));
        return;
    }
    panic!("the guest was always faster");
}

/// A snapshot of a keeper that stands still, in `dir`.
fn taken(dir: &Path, irqchip: Irqchip) {
    let (_kernel, config) = keeper(1, irqchip);
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    guest.running.pause().unwrap();
    guest.snapshot(&SnapshotRequest::new(dir));
    guest.leave();
}

#[test]
fn a_guest_runs_on_behind_its_snapshot_and_many_go_on_from_it() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let (_folder, dir) = place();
    let mut first = Guest::boot(&config);
    first.hear(2);
    first.snapshot(&SnapshotRequest::new(&dir));
    assert_eq!(first.running.state(), RunState::Running);
    let mut clones: Vec<_> = (0..if lab_short() { 3 } else { 20 })
        .map(|_| Guest::restore(&RestoreRequest::new(&dir)))
        .collect();
    // The files may go: who goes on from them has them.
    std::fs::remove_dir_all(&dir).unwrap();
    for clone in &mut clones {
        clone.hear(2);
    }
    for guest in clones.into_iter().chain([first]) {
        let (said, end) = guest.quit();
        assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{said}");
    }
}

#[test]
fn memory_that_cannot_be_mapped_is_read() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let config = Config {
        memory: "16M,shared".parse().unwrap(),
        ..config
    };
    let (_folder, dir) = place();
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.leave();
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    guest.hear(2);
    let (said, end) = guest.quit();
    assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{said}");
}

#[test]
fn the_command_line_takes_a_snapshot_and_goes_on_from_it() {
    need_kvm();
    let (folder, dir) = place();
    let socket = folder.path().join("api");
    let mut run = Vmm::boot(keeper64())
        .words("--cmdline 1 --memory 16M --debug-exit --rng --api-sock")
        .arg(&socket)
        .stdin_pipe()
        .start();
    run.wait_for("12");
    let ctl = |words: &[&str]| {
        let mut ctl = Vmm::command(["ctl", "--api-sock"]).arg(&socket);
        ctl = ctl.args(words);
        ctl.output()
    };
    let dir_text = dir.to_str().unwrap();
    let told = ctl(&["snapshot", dir_text]);
    let said = told.expect_status(0).text();
    let due = format!("{dir_text}: the guest stood still for ");
    assert!(
        said.starts_with(&due) && said.ends_with(" of 16.0 MiB of memory written\n"),
        "{told}"
    );
    // Where there is something else, nothing is done and the guest runs on.
    let refused = ctl(&["snapshot", folder.path().to_str().unwrap()]);
    refused.expect_status(1).expect_line(&["is no snapshot"]);
    let status = |of: support::Running, quit: bool| {
        let mut of = of;
        if quit {
            of.type_in(b"q");
        }
        of.wait()
    };
    status(run, true).expect_status(1).expect_silence();
    let mut on = Vmm::command(["restore", "--from"])
        .arg(&dir)
        .stdin_pipe()
        .start();
    on.wait_for("5");
    status(on, true).expect_status(1).expect_silence();
}

#[test]
fn what_is_damaged_is_refused_with_what_is_wrong_and_status_2() {
    need_kvm();
    let (folder, dir) = place();
    taken(&dir, Irqchip::Split);
    let other = folder.path().join("other");
    taken(&other, Irqchip::Split);
    let (state, memory) = (dir.join("state"), dir.join("memory"));
    let good = std::fs::read(&state).unwrap();
    let len = std::fs::metadata(&memory).unwrap().len();
    let refused = |needles: &[&str]| {
        let ended = Vmm::command(["restore", "--from"]).arg(&dir).output();
        ended
            .expect_status(2)
            .expect_stdout("")
            .expect_line(needles);
    };
    let name = state.to_str().unwrap();
    std::fs::write(&state, &good[..good.len() - 1]).unwrap();
    refused(&[name, "cut off"]);
    std::fs::write(&state, b"").unwrap();
    refused(&[name, "it is empty"]);
    let mut newer = good.clone();
    newer[8] = 2;
    std::fs::write(&state, newer).unwrap();
    refused(&[name, "version 2"]);
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&state, damaged).unwrap();
    refused(&[name, "section first-pages", "0x"]);
    std::fs::remove_file(&state).unwrap();
    refused(&[dir.to_str().unwrap(), "has no file `state`"]);
    std::fs::create_dir(&state).unwrap();
    refused(&[name, "no regular file"]);
    std::fs::remove_dir(&state).unwrap();
    std::fs::write(&state, &good).unwrap();

    let name = memory.to_str().unwrap();
    let open = || {
        std::fs::File::options()
            .read(true)
            .write(true)
            .open(&memory)
            .unwrap()
    };
    open().set_len(len - 1).unwrap();
    refused(&[name, &(len - 1).to_string(), &len.to_string()]);
    open().set_len(len).unwrap();
    // The kept memory, and where nothing was.
    for at in [(2 << 20) + 0x10_0000 + 0x30_0000_u64, len - 1] {
        let mut byte = [0];
        open().read_exact_at(&mut byte, at).unwrap();
        open().write_all_at(&[!byte[0]], at).unwrap();
        refused(&[name, "damaged between"]);
        open().write_all_at(&byte, at).unwrap();
    }
    std::fs::copy(other.join("memory"), &memory).unwrap();
    refused(&[name, "is of the snapshot"]);
    std::fs::copy(&memory, other.join("memory")).unwrap();
    let mut on = Vmm::command(["restore", "--from"])
        .arg(&other)
        .stdin_pipe()
        .start();
    on.wait_for("5");
    on.type_in(b"q");
    on.wait().expect_status(1).expect_silence();
}

#[test]
fn what_the_snapshot_has_not_cannot_be_another_one() {
    need_kvm();
    let (_folder, dir) = place();
    taken(&dir, Irqchip::Kernel);
    for (words, needle) in [
        ("--disk 0:path=/x", "there is no disk 0: the guest has 0"),
        ("--net 1:tap=t", "there is no network card 1"),
        ("--vsock cid=5", "no vsock device"),
        ("--console stdio", "no hvc0"),
        ("--port name=p,unix=/x", "no port \"p\""),
        ("--kvm /nonexistent", "/nonexistent"),
    ] {
        let ended = Vmm::command(["restore", "--from"])
            .arg(&dir)
            .words(words)
            .output();
        let status = if words.starts_with("--kvm") { 1 } else { 2 };
        ended.expect_status(status).expect_line(&[needle]);
    }
}

#[test]
fn a_device_of_a_programs_own_is_refused_by_its_name_and_the_guest_runs_on() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let (folder, dir) = place();
    let mut guest = Guest::start(|console, end| {
        let mut devices = Devices::open(&config, console).unwrap();
        devices.add("mine", Rng);
        Machine::build_with(&config, devices, console, end).unwrap()
    });
    guest.hear(1);
    let error = guest
        .running
        .snapshot(&SnapshotRequest::new(dir))
        .unwrap_err();
    assert!(error.to_string().starts_with("mine "), "{error}");
    assert_eq!(guest.running.state(), RunState::Running);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let (said, end) = guest.quit();
    assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{said}");
}

#[test]
fn who_pauses_a_guest_while_it_is_snapshotted_has_it_paused_behind_that() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let (_folder, dir) = place();
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let (now, begun) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let running = &guest.running;
        let pauses = scope.spawn(move || {
            begun.recv().unwrap();
            running.pause()
        });
        // The guest stands still for the snapshot when its memory is written.
        let files = before(|| {
            let _ = now.send(());
        });
        let request = SnapshotRequest::new(&dir);
        running.snapshot_with(&request, &files).unwrap();
        pauses.join().unwrap().unwrap();
    });
    assert_eq!(guest.running.state(), RunState::Paused);
    guest.running.resume().unwrap();
    assert_eq!(guest.quit().1, Some(GuestEnd::DebugExit(0)));
}

#[test]
fn a_file_of_memory_that_was_cut_off_costs_its_guest_no_more_than_what_it_needs_of_it() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let (folder, dir) = place();
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.leave();
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    guest.hear(1);
    // What it never looks at.
    let memory = std::fs::File::options()
        .write(true)
        .open(dir.join("memory"));
    let memory = memory.unwrap();
    memory
        .set_len(memory.metadata().unwrap().len() - (1 << 20))
        .unwrap();
    let request = SnapshotRequest::new(folder.path().join("second"));
    let error = guest.running.snapshot(&request).unwrap_err().to_string();
    assert!(
        error.contains("cannot be read") && error.contains("os error 14"),
        "{error}"
    );
    guest.hear(2);
    assert_eq!(guest.quit().1, Some(GuestEnd::DebugExit(0)));
}

#[test]
fn a_guest_whose_file_of_memory_was_cut_off_has_not_crashed() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let (folder, dir) = place();
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    guest.snapshot(&SnapshotRequest::new(&dir));
    guest.leave();
    let memory = dir.join("memory");
    let whole = std::fs::metadata(&memory).unwrap().len();
    // All of it, and what begins with the guest's first page but one.
    for to in [0, whole - (16 << 20) + 4096] {
        let copy = folder.path().join(format!("cut-{to}"));
        std::fs::create_dir(&copy).unwrap();
        for name in ["state", "memory"] {
            std::fs::copy(dir.join(name), copy.join(name)).unwrap();
        }
        let mut on = Vmm::command(["restore", "--from"])
            .arg(&copy)
            .stdin_pipe()
            .start();
        on.wait_for("5");
        let file = std::fs::File::options()
            .write(true)
            .open(copy.join("memory"));
        file.unwrap().set_len(to).unwrap();
        // Its next tick of the clock needs what is gone.
        let ended = on.wait();
        ended.expect_status(1).expect_line(&[
            copy.join("memory").to_str().unwrap(),
            "cannot be read at guest address 0x",
            &format!("it was cut off, to {to} bytes of {whole}"),
        ]);
    }
}

#[test]
fn a_disk_that_is_full_leaves_the_older_snapshot_and_the_guest_running_or_paused_as_it_was() {
    need_kvm();
    let (_kernel, config) = keeper(1, Irqchip::Split);
    let (folder, dir) = place();
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    guest.snapshot(&SnapshotRequest::new(&dir));
    let before = std::fs::read(dir.join("state")).unwrap();
    let request = SnapshotRequest::new(dir.clone());
    for room in [0, 100, 5000, 200_000] {
        for state in [RunState::Running, RunState::Paused] {
            match state {
                RunState::Running => guest.running.resume().unwrap(),
                RunState::Paused => guest.running.pause().unwrap(),
            }
            let files = with_room(room);
            let error = guest.running.snapshot_with(&request, &files).unwrap_err();
            assert!(error.to_string().contains("No space left"), "{error}");
            assert_eq!(guest.running.state(), state);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
            assert!(std::fs::read(dir.join("state")).unwrap() == before);
        }
    }
    guest.running.resume().unwrap();
    let (said, end) = guest.quit();
    assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{said}");
    let mut guest = Guest::restore(&RestoreRequest::new(&dir));
    guest.hear(2);
    assert_eq!(guest.quit().1, Some(GuestEnd::DebugExit(0)));
}
