// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `restore` without `--from`: a monitor that waits for a client to say what its guest goes on from, over the real KVM.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::{Path, PathBuf};

use guests::keeper::keeper64;
use reference_vmm::api::Client;
use serde_json::json;
use support::{Ended, Running, Vmm, WATCHDOG, need_kvm};

/// A folder with a snapshot in it of a keeper that has said "12" at least.
struct Place {
    folder: tempfile::TempDir,
    dir: PathBuf,
    socket: PathBuf,
}

impl Place {
    fn with_snapshot(words: &str) -> Self {
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
            .words(words)
            .stdin_pipe()
            .start();
        run.wait_for("12");
        let refused = place.ctl(&["load", place.text()]);
        refused.expect_status(1).expect_line(&[
            "Loading a microVM snapshot is not allowed after starting the microVM: this monitor has its guest. Start another \
             one for the snapshot: reference-vmm restore --from DIR",
        ]);
        place.ctl(&["snapshot", place.text()]).expect_status(0);
        run.type_in(b"q");
        run.wait().expect_status(1).expect_silence();
        place
    }

    fn text(&self) -> &str {
        self.dir.to_str().unwrap()
    }

    fn ctl(&self, words: &[&str]) -> Ended {
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(&self.socket);
        ctl.args(words).output()
    }

    fn says(&self, words: &[&str]) -> String {
        let ended = self.ctl(words);
        ended.expect_status(0).expect_silence();
        ended.text()
    }

    /// A monitor that waits for a load.
    fn wait(&self, words: &str) -> Running {
        let waiting = Vmm::command(["restore", "--api-sock"])
            .arg(&self.socket)
            .words(words)
            .stdin_pipe()
            .start();
        while !self.socket.exists() {
            std::thread::yield_now();
        }
        waiting
    }

    fn put(&self, body: &serde_json::Value) -> reference_vmm::api::client::Answer {
        let mut client = Client::connect(&self.socket, WATCHDOG).unwrap();
        client.call("PUT", "/snapshot/load", Some(body)).unwrap()
    }
}

fn quits(mut guest: Running) {
    guest.type_in(b"q");
    let ended = guest.wait();
    ended.expect_status(1).expect_silence();
    assert!(ended.text().ends_with('!'), "{ended}");
}

#[test]
fn it_says_that_it_has_not_started_and_goes_on_from_what_it_is_told_at_last() {
    if support::lab_short() {
        return;
    }
    let place = Place::with_snapshot("");
    let mut guest = place.wait("");
    assert_eq!(place.says(&["status"]), "not started\n");
    for words in [
        &["pause"][..],
        &["resume"],
        &["stats"],
        &["config"],
        &["power-button"],
        &["snapshot", "/nowhere"],
    ] {
        let refused = place.ctl(words);
        refused
            .expect_status(1)
            .expect_line(&["before starting the microVM"]);
    }
    // What cannot be gone on from is told to who asked, and leaves nothing behind.
    for (dir, needle) in [
        (Path::new("/nowhere/at/all"), "/nowhere/at/all is not there"),
        (place.folder.path(), "has no file `state`"),
    ] {
        let refused = place.ctl(&["load", dir.to_str().unwrap(), "--resume"]);
        refused.expect_status(1).expect_line(&[needle]);
    }
    let net = json!({
        "snapshot_path": place.text(), "network_overrides": [{"iface_id": "net0", "host_dev_name": "t"}],
    });
    let refused = place.put(&net);
    let why = refused.fault().unwrap();
    assert!(
        refused.status == 400 && why.contains("no network card 0"),
        "{why}"
    );
    assert_eq!(place.says(&["status"]), "not started\n");
    assert_eq!(place.says(&["load", place.text(), "--resume"]), "running\n");
    assert_eq!(place.says(&["status"]), "running\n");
    guest.wait_for("5");
    // There is one machine.
    let again = place.ctl(&["load", place.text()]);
    again
        .expect_status(1)
        .expect_line(&["not allowed after starting"]);
    quits(guest);
    assert!(!place.socket.exists());
}

#[test]
fn a_guest_that_is_loaded_paused_runs_nothing_before_it_is_resumed() {
    if support::lab_short() {
        return;
    }
    // Devices rest as well, and are woken.
    let place = Place::with_snapshot("--rng");
    let mut guest = place.wait("--stats=json");
    let body = json!({
        "snapshot_path": place.text(),
        "mem_backend": {"backend_type": "File", "backend_path": place.dir.join("memory")},
        "resume_vm": false, "clock_realtime": true,
    });
    let answer = place.put(&body);
    assert_eq!((answer.status, answer.body), (204, None));
    assert_eq!(place.says(&["status"]), "paused\n");
    // It was not let go for a moment: no vCPU has come out of the guest.
    let stats = place.says(&["stats"]);
    let mut exits = stats.lines().filter(|line| line.starts_with("exits.0."));
    assert!(exits.all(|line| line.ends_with(" 0")), "{stats}");
    assert!(stats.contains("exits.0.pio-out 0\n"), "{stats}");
    // A snapshot of it is the same guest again.
    let second = place.folder.path().join("second");
    place.says(&["snapshot", second.to_str().unwrap()]);
    assert_eq!(place.says(&["status"]), "paused\n");
    assert_eq!(guest.stdout(), "");
    assert_eq!(place.says(&["resume"]), "running\n");
    guest.wait_for("5");
    guest.type_in(b"q");
    let ended = guest.wait();
    ended.expect_status(1);
    let first = ended.text();

    let mut guest = place.wait("");
    place.says(&["load", second.to_str().unwrap(), "--resume"]);
    guest.wait_for("5");
    let begins = first.chars().next().unwrap();
    assert!(guest.stdout().starts_with(begins), "{first}");
    quits(guest);
}

#[test]
fn a_client_says_that_memory_is_to_come_later_and_how() {
    if support::lab_short() {
        return;
    }
    let place = Place::with_snapshot("");
    let mut guest = place.wait("");
    // One that fails has left nothing behind, and nothing of what it said holds for the next.
    let nowhere = place.ctl(&["load", place.text(), "--page-handler", "/nowhere"]);
    nowhere.expect_status(1).expect_line(&["/nowhere"]);
    assert_eq!(place.says(&["status"]), "not started\n");
    let words = [
        "load",
        place.text(),
        "--resume",
        "--record=3600",
        "--on-loss=poison",
        "--page-deadline=5",
    ];
    assert_eq!(place.says(&words), "running\n");
    guest.wait_for("5");
    // It is recorded for an hour, so that it is under way whenever this is asked.
    let answer = place.says(&["status", "--json"]);
    assert!(answer.contains("\"state\":\"recording\""), "{answer}");
    quits(guest);

    // Without a word of it memory is there when the guest begins.
    let mut guest = place.wait("");
    place.says(&["load", place.text(), "--resume"]);
    guest.wait_for("5");
    let answer = place.says(&["status", "--json"]);
    assert!(!answer.contains("\"lazy\""), "{answer}");
    quits(guest);
}

#[test]
fn a_signal_ends_it_while_it_waits_and_while_its_guest_is_paused() {
    if support::lab_short() {
        return;
    }
    let place = Place::with_snapshot("");
    for (signal, load) in [
        (libc::SIGTERM, false),
        (libc::SIGINT, false),
        (libc::SIGTERM, true),
    ] {
        let guest = place.wait("--shutdown-timeout 3600");
        if load {
            assert_eq!(place.says(&["load", place.text()]), "paused\n");
        } else {
            // It has come as far as to answer.
            place.says(&["status"]);
        }
        guest.signal(signal);
        let ended = guest.wait();
        ended.expect_status(0).expect_stdout("").expect_silence();
        assert!(!place.socket.exists());
    }
}

#[test]
fn what_the_command_line_said_holds_for_what_is_loaded() {
    if support::lab_short() {
        return;
    }
    let place = Place::with_snapshot("");
    let guest = place.wait("--kvm /nonexistent");
    let refused = place.ctl(&["load", place.text()]);
    refused.expect_status(1).expect_line(&["/nonexistent"]);
    guest.signal(libc::SIGTERM);
    guest.wait().expect_status(0);

    // A debugger holds it, and is waited for once it is there.
    let address = place.folder.path().join("gdb");
    let mut guest = place.wait(&format!("--gdb unix:{}", address.display()));
    place.says(&["load", place.text(), "--resume"]);
    let mut gdb = support::rsp::Gdb::unix(&address);
    assert!(gdb.ask("?").starts_with('T'));
    assert_eq!(guest.stdout(), "");
    gdb.send("c");
    guest.wait_for("5");
    guest.signal(libc::SIGINT);
    guest.wait().expect_status(0);
}
