// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a user of `ctl` hears of migrations and snapshots, from monitors with guests over the real KVM.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use guests::keeper::keeper64;
use guests::monitor;
use reference_vmm::units;
use serde_json::Value;
use support::{Ended, Running, Vmm, need_kvm};

/// A monitor with its control socket, in a folder of its own.
struct Process {
    running: Running,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Process {
    /// With a keeper that has begun to speak.
    fn boot() -> Self {
        let keeper = Vmm::boot(keeper64()).args(["--cmdline", "1 "]);
        Self::start(keeper.words("--memory 16M --debug-exit"), "1")
    }

    /// With a guest that does nothing any more.
    fn idle() -> Self {
        Self::start(Vmm::boot(monitor::halt64()).words("--debug-exit"), "up\n")
    }

    fn start(vmm: Vmm, says: &str) -> Self {
        need_kvm();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let mut running = vmm.arg("--api-sock").arg(&socket).start();
        running.wait_for(says);
        Process {
            running,
            socket,
            folder,
        }
    }

    /// One that waits for a guest, and where.
    fn waits(&self) -> (Running, PathBuf, String) {
        let (socket, path) = (self.path("there.api"), self.path("incoming"));
        let to = format!("unix:{}", path.display());
        let vmm = Vmm::command(["run", "--incoming", &to, "--api-sock"]);
        let mut running = vmm.arg(&socket).start();
        running.wait_for_stderr("a guest is waited for at");
        (running, socket, to)
    }

    /// Waits until memory is being sent.
    fn sends(&self) {
        let begun = || {
            let status = self.ctl("migrate-status --json").text();
            let said: Value = serde_json::from_str(&status).unwrap();
            said["total"]["rounds"].as_u64() > Some(0)
        };
        while !begun() {
            std::thread::yield_now();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, words: &str) -> Vmm {
        ctl(&self.socket, words)
    }

    fn ctl(&self, words: &str) -> Ended {
        self.command(words).output()
    }

    /// What `ctl` says of what was done.
    #[track_caller]
    fn says(&self, words: &str) -> String {
        let ended = self.ctl(words);
        ended.expect_status(0);
        ended.text()
    }
}

fn ctl(socket: &Path, words: &str) -> Vmm {
    Vmm::command(["ctl", "--api-sock"]).arg(socket).words(words)
}

#[test]
fn what_cannot_be_done_while_the_guest_is_moved_is_refused_at_once_with_how_far_that_is() {
    if support::lab_short() {
        return;
    }
    let source = Process::boot();
    let silent = source.path("silent");
    let destination = UnixListener::bind(&silent).unwrap();
    let to = silent.display();
    let migrates = source.command(&format!("migrate --to unix:{to}")).start();
    // It has begun, and waits for an answer that never comes.
    let connection = destination.accept().unwrap();
    let dir = source.path("snapshot");
    for words in [
        "pause".to_owned(),
        format!("snapshot {}", dir.display()),
        format!("snapshot {} --background", dir.display()),
        format!("migrate --to unix:{to}"),
    ] {
        let refused = source.ctl(&words);
        refused
            .expect_status(1)
            .expect_line(&["a migration is under way (connect", "ctl migrate-cancel"]);
    }
    assert!(!dir.exists());
    assert_eq!(source.says("status"), "running\n");
    // That is so already.
    assert_eq!(source.says("resume"), "running\n");
    // After a while it says whom it waits for, and how long it will.
    let owes = loop {
        let status = source.says("migrate-status");
        assert!(status.contains("on its way to"), "{status}");
        if status.contains("has not answered for ") {
            break status;
        }
        std::thread::yield_now();
    };
    assert!(owes.contains("(given up after 1 min 0 s)"), "{owes}");
    assert_eq!(source.says("migrate-cancel"), "cancelled\n");
    let ended = migrates.wait();
    ended.expect_status(1);
    assert!(ended.to_string().contains("was cancelled"), "{ended}");
    drop(connection);
    assert_eq!(source.says("pause"), "paused\n");
    assert_eq!(source.says("resume"), "running\n");
    source.running.signal(libc::SIGTERM);
    source.running.wait().expect_status(0);
}

#[test]
fn a_report_is_the_monitors_and_is_there_whatever_becomes_of_who_asked_for_it() {
    if support::lab_short() {
        return;
    }
    let source = Process::boot();
    // Where none can be written nothing is begun.
    for (path, needle) in [
        ("/no/such/folder/r.html", "No such file"),
        ("/", "no regular file"),
    ] {
        let refused = source.ctl(&format!("migrate --to unix:/nobody --report {path}"));
        refused.expect_status(1).expect_line(&["--report", needle]);
        let none = source.ctl("migrate-status");
        none.expect_status(1)
            .expect_line(&["there has been no migration"]);
    }
    let silent = source.path("silent");
    let destination = UnixListener::bind(&silent).unwrap();
    let report = source.path("report.html");
    let words = format!("migrate --to unix:{} --report", silent.display());
    let asker = source.command(&words).arg(&report).start();
    let connection = destination.accept().unwrap();
    asker.signal(libc::SIGKILL);
    asker.wait();
    assert!(source.says("migrate-status").contains("on its way to"));
    source.says("migrate-cancel");
    let record = loop {
        let record: Value = serde_json::from_str(&source.says("migrate-status --json")).unwrap();
        if !record["report"].is_null() {
            break record;
        }
    };
    assert_eq!(record["report"]["failed"], Value::Null, "{record}");
    assert_eq!(record["report"]["path"], report.to_str().unwrap());
    let html = std::fs::read_to_string(&report).unwrap();
    assert!(html.contains("It was called off"), "{html}");
    assert!(html.contains("the guest was not stopped"), "{html}");
    assert!(source.says("migrate-status").contains("\nreport in "));
    drop(connection);
    source.running.signal(libc::SIGTERM);
    source.running.wait().expect_status(0);
}

#[test]
fn the_destination_says_what_it_waits_for_and_an_idle_guests_forecast_is_told() {
    if support::lab_short() {
        return;
    }
    let source = Process::idle();
    let (there, socket, to) = source.waits();
    let status = |words: &str| {
        let ended = ctl(&socket, words).output();
        ended.expect_status(0).expect_silence();
        ended.text()
    };
    let waits = status("migrate-status");
    assert!(waits.contains(&format!("waited for at {to}")), "{waits}");
    let report = source.path("report.html");
    let moved = source.command(&format!("migrate --to {to} --report"));
    let moved = moved.arg(&report).output();
    moved.expect_status(0);
    // Nothing was left, or some pages that the host's devices had written.
    let foretold = [
        "no last pages; the downtime is ",
        "of the downtime for the last pages",
    ];
    let is_told = |text: &str| foretold.iter().any(|needle| text.contains(needle));
    assert!(is_told(&moved.text()), "{moved}");
    let html = std::fs::read_to_string(&report).unwrap();
    assert!(is_told(&html), "{html}");
    source.running.wait().expect_status(0);
    let came = status("migrate-status");
    let begins = format!("the guest has come here, to {to}, from process ");
    assert!(came.starts_with(&begins), "{came}");
    let said: Value = serde_json::from_str(&status("migrate-status --json")).unwrap();
    assert_eq!(said["state"], "arrived");
    assert!(said["guest"]["received-bytes"].as_u64() > Some(0), "{said}");
    there.signal(libc::SIGINT);
    let there = there.wait();
    there.expect_status(0);
    // Its terminal has heard of each step.
    let heard = there.to_string();
    for needle in ["a guest comes from process ", ", and runs here now"] {
        assert_eq!(heard.matches(needle).count(), 1, "{heard}");
    }
}

#[test]
fn a_guest_that_is_paused_is_moved_as_it_is_and_both_sides_say_so() {
    if support::lab_short() {
        return;
    }
    let source = Process::boot();
    let (there, socket, to) = source.waits();
    source.says("pause");
    let moved = source.says(&format!("migrate --to {to}"));
    assert!(moved.contains(", paused as it was\n"), "{moved}");
    source.running.wait().expect_status(0);
    let at_destination = |words: &str| {
        let ended = ctl(&socket, words).output();
        ended.expect_status(0);
        ended.text()
    };
    assert_eq!(at_destination("status"), "paused\n");
    assert_eq!(at_destination("resume"), "running\n");
    assert_eq!(at_destination("status"), "running\n");
    there.signal(libc::SIGINT);
    there.wait().expect_status(0);
}

#[test]
fn a_monitor_that_waits_says_of_a_failure_whether_it_waits_on_or_ends() {
    if support::lab_short() {
        return;
    }
    let source = Process::boot();
    let (mut there, socket, to) = source.waits();
    // No monitor.
    let mut stranger = UnixStream::connect(source.path("incoming")).unwrap();
    stranger.write_all(&[b'x'; 64]).unwrap();
    there.wait_for_stderr("a guest is waited for still: ");
    let status = ctl(&socket, "migrate-status").output();
    assert!(status.text().contains("waited for"), "{status}");
    // A guest that is called off, of which so little may be sent that it takes its time.
    let words = format!("migrate --bandwidth 64K --to {to}");
    let migrates = source.command(&words).start();
    source.sends();
    let status = ctl(&socket, "migrate-status").output().text();
    let here = format!("a guest is on its way here, to {to}, from process ");
    assert!(status.starts_with(&here), "{status}");
    assert!(
        status.contains(" for ") && status.contains("have come"),
        "{status}"
    );
    source.says("migrate-cancel");
    migrates.wait().expect_status(1);
    let ended = there.wait();
    ended.expect_status(1);
    let why = "no guest has come, and none is waited for any more: the source gave up: the migration was cancelled";
    assert!(ended.to_string().contains(why), "{ended}");
    assert_eq!(source.says("status"), "running\n");
    source.running.signal(libc::SIGTERM);
    source.running.wait().expect_status(0);
}

#[test]
fn who_asked_a_monitor_that_was_killed_hears_that_the_guest_is_in_doubt() {
    if support::lab_short() {
        return;
    }
    let source = Process::boot();
    let (there, _socket, to) = source.waits();
    let words = format!("migrate --bandwidth 64K --to {to}");
    let migrates = source.command(&words).start();
    source.sends();
    source.running.signal(libc::SIGKILL);
    let ended = migrates.wait();
    ended.expect_status(1);
    let needle = "in doubt: the guest may be here or at the destination, or have ended";
    assert!(ended.to_string().contains(needle), "{ended}");
    source.running.wait();
    // No word had given it away.
    there.wait().expect_status(1);
}

#[test]
fn a_snapshot_says_how_long_the_guest_stood_still_and_of_which_moment_it_is() {
    if support::lab_short() {
        return;
    }
    let guest = Process::boot();
    let dir = guest.path("s");
    let dir = dir.display();
    let words = guest.says(&format!("snapshot {dir}"));
    assert!(
        words.starts_with(&format!("{dir}: the guest stood still for ")),
        "{words}"
    );
    let said = |words: &str| -> Value { serde_json::from_str(&guest.says(words)).unwrap() };
    let told = said(&format!("snapshot {dir} --json"));
    assert!(
        told["pause_us"].as_u64() <= told["total_us"].as_u64(),
        "{told}"
    );
    assert!(told["pause_us"].is_u64(), "{told}");
    // Firecracker's clients hear what they wait for.
    let bytes = std::process::Command::new("curl")
        .args(["-s", "-X", "PUT", "-w", "%{http_code}", "--unix-socket"])
        .arg(&guest.socket)
        .args(["-d", &format!("{{\"snapshot_path\": \"{dir}\"}}")])
        .arg("http://localhost/snapshot/create")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&bytes.stdout), "204");
    guest.says("pause");
    let words = guest.says(&format!("snapshot {dir}"));
    assert!(words.contains("the guest stays paused"), "{words}");
    // The moment is the guest's clock's, and not the file's.
    let now = std::time::SystemTime::now();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let state = std::fs::File::options()
        .append(true)
        .open(guest.path("s/state"));
    state.unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let info = |more: &[&str]| {
        let info = Vmm::command(["snapshot", "info"])
            .arg(guest.path("s"))
            .args(more);
        let info = info.output();
        info.expect_status(0).expect_silence();
        info.text()
    };
    let of: Value = serde_json::from_str(&info(&["--json"])).unwrap();
    let taken = of["taken"].as_u64().unwrap();
    assert!(now.abs_diff(taken) < 600, "{of}");
    let line = format!("taken       {}\n", units::utc(taken));
    assert!(info(&[]).contains(&line), "{}", info(&[]));
    guest.running.signal(libc::SIGTERM);
    guest.running.wait().expect_status(0);
}

#[test]
fn a_full_snapshot_of_a_guest_that_is_tracked_moves_its_chain_on_without_track_as_well() {
    if support::lab_short() {
        return;
    }
    let guest = Process::boot();
    let at = |name: &str| guest.path(name).display().to_string();
    let [a, b, c] = ["a", "b", "c"].map(at);
    guest.says(&format!("snapshot {a} --track"));
    guest.says(&format!("snapshot {b}"));
    let refused = guest.ctl(&format!("snapshot {c} --base {a}"));
    refused.expect_status(1).expect_line(&["build on that", &b]);
    guest.says(&format!("snapshot {c} --base {b}"));
    guest.says(&format!("snapshot {a} --track=off"));
    let refused = guest.ctl(&format!("snapshot {c} --base {a}"));
    refused
        .expect_status(1)
        .expect_line(&["take a full one with --track first"]);
    guest.running.signal(libc::SIGTERM);
    guest.running.wait().expect_status(0);
}

#[test]
fn a_destination_that_is_no_socket_and_a_folder_for_no_disks_are_said_to_be_that() {
    if support::lab_short() {
        return;
    }
    let guest = Process::boot();
    let mine = guest.path("mine");
    std::fs::write(&mine, "mine").unwrap();
    let refused = guest.ctl(&format!("migrate --to unix:{}", mine.display()));
    let path = mine.to_str().unwrap();
    let line = refused.expect_status(1).one_line();
    assert!(
        line.contains(path) && line.contains("a regular file"),
        "{line}"
    );
    // Said once.
    assert_eq!(line.matches("a regular file").count(), 1, "{line}");
    // And where the guest is, before anything else.
    let begins = |line: &str, where_it_is: &str| {
        let line = line.strip_prefix("reference-vmm: ").unwrap_or(line);
        assert!(line.starts_with(where_it_is), "{line}");
    };
    begins(line, "the guest runs on here: ");
    let status = guest.says("migrate-status");
    assert!(status.contains(": the guest runs on here: "), "{status}");
    let not_begun = format!("migrate --to unix:{} --report /none/r.html", mine.display());
    let refused = guest.ctl(&not_begun);
    let line = refused.expect_status(1).one_line();
    begins(line, "the guest runs on here, no migration was begun: ");
    let dir = guest.path("s");
    guest.says(&format!("snapshot {}", dir.display()));
    let restore = Vmm::command(["restore", "--from"]).arg(&dir);
    let refused = restore.arg("--disks-to").arg(guest.folder.path()).output();
    refused
        .expect_status(2)
        .expect_line(&["--disks-to: the guest has no disk"]);
    guest.running.signal(libc::SIGTERM);
    guest.running.wait().expect_status(0);
}
