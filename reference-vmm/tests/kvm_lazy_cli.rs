// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `restore --lazy` from its command line and its control socket, and a host that refuses any call of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use guests::keeper::{KEPT, keeper64};
use reference_vmm::api::Client;
use reference_vmm::snapshot::link::Link;
use serde_json::{Value, json};
use support::tracer::{Inject, Kind, Trace, chosen, trace_in};
use support::{Vmm, WATCHDOG, file, need_kvm, not_one_line};

/// A folder with a snapshot in it of a keeper that has said "12" at least.
struct Place {
    folder: tempfile::TempDir,
    dir: PathBuf,
    socket: PathBuf,
}

impl Place {
    fn with_snapshot() -> Self {
        need_kvm();
        let folder = tempfile::tempdir().unwrap();
        let (dir, socket) = (folder.path().join("snapshot"), folder.path().join("api"));
        let place = Place {
            folder,
            dir,
            socket,
        };
        let mut run = Vmm::boot(keeper64())
            .words("--cmdline 1 --memory 16M --debug-exit --api-sock")
            .arg(&place.socket)
            .stdin_pipe()
            .start();
        run.wait_for("12");
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(&place.socket);
        ctl.arg("snapshot")
            .arg(&place.dir)
            .output()
            .expect_status(0);
        run.type_in(b"q");
        run.wait().expect_status(1).expect_silence();
        place
    }

    fn restore(&self, words: &str) -> Vmm {
        let restore = Vmm::command(["restore", "--from"]).arg(&self.dir);
        restore.words(words).stdin_pipe()
    }
}

#[test]
fn the_command_line_has_a_guest_go_on_before_its_memory_is_read_and_says_what_that_took() {
    let place = Place::with_snapshot();
    let mut on = place.restore("--lazy --stats").start();
    on.wait_for("5");
    on.type_in(b"q");
    let ended = on.wait();
    ended.expect_status(1);
    let said = &ended.stderr;
    for needle in ["memory that came later: 4096 pages", "by fault"] {
        assert!(said.contains(needle), "no {needle:?} in:\n{said}");
    }
    // Nothing comes ahead while it is recorded, so the guest does fault. What is recorded is used.
    let mut on = place.restore("--record=3600 --stats").start();
    on.wait_for("5");
    on.type_in(b"q");
    let ended = on.wait();
    ended.expect_status(1);
    let said = &ended.stderr;
    let needle = "a fault waited: half up to";
    assert!(said.contains(needle), "no {needle:?} in:\n{said}");
    assert!(place.dir.join("working_set").exists());
    let picture = Vmm::command(["snapshot", "info", "--heat-map"])
        .arg(&place.dir)
        .output();
    picture.expect_status(0);
    let picture = String::from_utf8(picture.stdout).unwrap();
    // 4096 pages are 1024 characters.
    let legend = "\na character is 16 KiB of guest memory, a line 1 MiB";
    assert!(picture.contains(legend), "{picture}");
    let mut on = place.restore("--lazy --log info --stats").start();
    on.wait_for("5");
    on.wait_for_stderr("the working set was used");
    on.type_in(b"q");
    let ended = on.wait();
    ended.expect_status(1);
    let needle = "a recorded working set: ";
    assert!(ended.stderr.contains(needle), "{ended}");
    // One that is damaged is not said to be none.
    std::fs::write(place.dir.join("working_set"), b"no record").unwrap();
    let picture = Vmm::command(["snapshot", "info", "--heat-map"]);
    picture
        .arg(&place.dir)
        .output()
        .expect_status(2)
        .expect_line(&[
            "no working set: ",
            "/working_set: ",
            "--record makes another",
        ]);
    let verify = Vmm::command(["snapshot", "verify"])
        .arg(&place.dir)
        .output();
    verify.expect_status(0);
}

#[test]
fn memory_that_does_not_come_is_a_line_and_status_1_within_the_deadline() {
    let place = Place::with_snapshot();
    let memory = File::options()
        .write(true)
        .open(place.dir.join("memory"))
        .unwrap();
    let (link, _) = Link::open(&place.dir).unwrap();
    let (_, kept) = link.map().locate(KEPT).unwrap();
    memory.write_all_at(&[1; 8], kept.offset + 4096).unwrap();
    let ended = place.restore("--lazy").output();
    ended.expect_status(1);
    ended.expect_line(&[
        "does not come",
        "is damaged between byte",
        "with --on-loss poison a guest goes on",
    ]);
    // This host's KVM says too little of an access for a machine check, so the guest ends here as well.
    let ended = place.restore("--on-loss poison").output();
    ended.expect_status(1);
    for needle in [
        "; the guest goes on: where it touches what is lost",
        "memory error",
    ] {
        assert!(ended.stderr.contains(needle), "{ended}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_the_value() {
    for (words, needle) in [
        ("--lazy --on-loss retry", "--on-loss is stop or poison"),
        ("--lazy --page-deadline 0", "--page-deadline"),
        ("--record=soon", "--record"),
    ] {
        Vmm::command(["restore", "--from", "/nowhere"])
            .words(words)
            .output()
            .expect_status(2)
            .expect_line(&[needle]);
    }
}

#[test]
fn a_client_loads_a_guest_that_runs_before_its_memory_is_read_and_sees_how_far_it_is() {
    let place = Place::with_snapshot();
    let mut monitor = Vmm::command(["restore", "--record=3600", "--api-sock"])
        .arg(&place.socket)
        .stdin_pipe()
        .start();
    let mut client = loop {
        match Client::connect(&place.socket, WATCHDOG) {
            Ok(client) => break client,
            Err(_) => std::thread::yield_now(),
        }
    };
    let load = json!({
        "snapshot_path": place.dir, "resume_vm": true,
        "mem_backend": { "backend_type": "File", "backend_path": place.dir.join("memory") },
    });
    let answer = client.call("PUT", "/snapshot/load", Some(&load)).unwrap();
    assert_eq!(answer.status, 204, "{answer:?}");
    monitor.wait_for("5");
    let answer = client.call("GET", "/", None).unwrap();
    let lazy = &answer.body.unwrap()["lazy"];
    assert_eq!(
        (&lazy["state"], &lazy["pages"]),
        (&json!("recording"), &json!(4096))
    );
    let status = Vmm::command(["ctl", "--api-sock"]).arg(&place.socket);
    let status = status.arg("status").output();
    assert!(
        status.text().contains("% of its memory is there"),
        "{status}"
    );
    // A snapshot has all of it brought first.
    let to = place.folder.path().join("to");
    let create = json!({ "snapshot_path": to });
    let answer = client.call("PUT", "/snapshot/create", Some(&create));
    assert_eq!(answer.unwrap().status, 200);
    let answer = client.call("GET", "/", None).unwrap();
    assert_eq!(answer.body.unwrap()["lazy"]["state"], "whole");
    let status = Vmm::command(["ctl", "--api-sock"]).arg(&place.socket);
    status.arg("status").output().expect_stdout("running\n");
    monitor.type_in(b"q");
    // The snapshot has ended the recording.
    let ended = monitor.wait();
    ended.expect_status(1).expect_line(&["(--record) ended"]);
}

#[test]
fn a_snapshot_that_ends_a_recording_says_so() {
    let place = Place::with_snapshot();
    let mut on = place
        .restore("--record=3600 --api-sock")
        .arg(&place.socket)
        .start();
    on.wait_for("5");
    let to = place.folder.path().join("next");
    let snapshot = |json: &[&str]| {
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(&place.socket);
        let said = ctl.arg("snapshot").arg(&to).args(json).output();
        said.expect_status(0);
        String::from_utf8(said.stdout).unwrap()
    };
    let words = snapshot(&[]);
    assert!(words.contains("(--record) ended with it"), "{words}");
    assert!(place.dir.join("working_set").exists());
    // There is none any more.
    let json: Value = serde_json::from_str(&snapshot(&["--json"])).unwrap();
    assert_eq!(json["ended_recording"], Value::Null);
    on.type_in(b"q");
    let ended = on.wait();
    ended.expect_status(1);
    assert_eq!(
        ended.stderr.matches("(--record) ended after").count(),
        1,
        "{ended}"
    );
}

#[test]
fn a_guest_moves_before_its_memory_is_there_and_takes_all_of_it_along() {
    let place = Place::with_snapshot();
    let at = format!("unix:{}", place.folder.path().join("moves").display());
    let mut there = Vmm::command(["run", "--incoming", &at])
        .stdin_pipe()
        .start();
    there.wait_for_stderr("a guest is waited for");
    let mut here = place
        .restore("--record=3600 --api-sock")
        .arg(&place.socket)
        .start();
    here.wait_for("5");
    let ctl = Vmm::command(["ctl", "--api-sock"]).arg(&place.socket);
    ctl.args(["migrate", "--to", &at]).output().expect_status(0);
    here.wait().expect_status(0);
    there.wait_for("9");
    there.type_in(b"q");
    there.wait().expect_status(1);
}

/// Goes on lazily with a `q` at its console, at which the guest ends.
fn traced(place: &Place, inject: &[Inject]) -> Trace {
    let typed = file(b"q");
    let stdin: OwnedFd = File::open(&typed).unwrap().into();
    let words = [
        "restore".as_ref(),
        "--lazy".as_ref(),
        "--from".as_ref(),
        place.dir.as_os_str(),
    ];
    trace_in(
        Some(place.folder.path()),
        &words,
        Some(stdin),
        inject,
        WATCHDOG,
    )
}

#[test]
fn each_call_that_is_refused_ends_it_with_one_line_or_is_done_without() {
    if support::lab_short() {
        return;
    }
    let place = Place::with_snapshot();
    let good = traced(&place, &[]);
    assert_eq!(
        (good.status.code(), good.stderr.as_str()),
        (Some(1), ""),
        "{good}"
    );
    // Its own calls begin with the signals.
    let main = Kind::Syscall(libc::SYS_signalfd4);
    let own = good.calls.iter().skip_while(|call| call.kind != main);
    let calls = chosen(own.filter(|call| match &call.kind {
        Kind::Kvm(_) => call.kind != Kind::kvm("KVM_RUN"),
        Kind::File(nr, path) => *nr != libc::SYS_flock && path.ends_with("memory"),
        Kind::Syscall(nr) => [libc::SYS_ioctl, libc::SYS_userfaultfd].contains(nr),
        Kind::Elsewhere(nr) => *nr == libc::SYS_ioctl && call.thread.starts_with("pager"),
        _ => false,
    }));
    let kinds: BTreeSet<_> = calls.iter().map(|(kind, _)| kind).collect();
    assert!(kinds.len() > 24, "{calls:?}");
    assert!(
        kinds.contains(&Kind::Syscall(libc::SYS_userfaultfd)),
        "{calls:?}"
    );
    let errnos = [libc::EINVAL, libc::ENOMEM, libc::EPERM, libc::EIO];
    let mut ended = 0;
    for (number, (kind, nth)) in calls.into_iter().enumerate() {
        let errno = errnos[number % errnos.len()];
        let inject = Inject { kind, nth, errno };
        let trace = traced(&place, std::slice::from_ref(&inject));
        assert_eq!(trace.hung, None, "{inject}: {trace}");
        // Its threads are never twice the same, so not every run makes every call.
        if !trace.injected {
            continue;
        }
        println!("{inject}\n    {}", trace.stderr.trim_end());
        if trace.stderr.is_empty() {
            assert_eq!(trace.status.code(), Some(1), "{inject}: {trace}");
            assert!(trace.stdout.ends_with(b"!"), "{inject}: {trace}");
            continue;
        }
        ended += 1;
        assert_eq!(not_one_line(&trace.stderr), None, "{inject}: {trace}");
        let status = trace.status.code();
        assert!(matches!(status, Some(1 | 2)), "{inject}: {trace}");
    }
    assert!(ended > 15, "{ended}");
}

#[test]
fn a_signal_ends_a_monitor_that_waits_for_memory_before_there_is_a_guest() {
    let place = Place::with_snapshot();
    let handler = place.folder.path().join("handler");
    let mute = UnixListener::bind(&handler).unwrap();
    let waits = || {
        let restore = Vmm::command(["restore", "--from"]).arg(&place.dir);
        let restore = restore.words("--page-deadline 3600 --page-handler");
        let on = restore.arg(&handler).arg("--api-sock").arg(&place.socket);
        let on = on.stdin_pipe().start();
        // It has the userfaultfd, and brings nothing.
        (on, mute.accept().unwrap())
    };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let (on, _given) = waits();
        on.signal(signal);
        let ended = on.wait();
        ended.expect_status(0);
        assert!(!place.socket.exists());
    }

    // And one that a client has had load it.
    let on = Vmm::command(["restore", "--api-sock"]);
    let on = on.arg(&place.socket).stdin_pipe().start();
    while Client::connect(&place.socket, WATCHDOG).is_err() {
        std::thread::yield_now();
    }
    let load = Vmm::command(["ctl", "--api-sock"]).arg(&place.socket);
    let load = load.arg("load").arg(&place.dir);
    let load = load.words("--page-deadline 3600 --page-handler");
    let load = load.arg(&handler).start();
    let _given = mute.accept().unwrap();
    on.signal(libc::SIGTERM);
    on.wait().expect_status(0);
    load.wait().expect_status(1);
    assert!(!place.socket.exists());
}
