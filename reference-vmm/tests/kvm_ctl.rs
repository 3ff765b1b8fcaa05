// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a user of `ctl` hears of migrations and snapshots, from monitors with guests over the real KVM.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use guests::keeper::keeper64;
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
        need_kvm();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let vmm = Vmm::boot(keeper64()).args(["--cmdline", "1 "]);
        let vmm = vmm.words("--memory 16M --debug-exit --irqchip split --api-sock");
        let mut running = vmm.arg(&socket).start();
        running.wait_for("1");
        Process {
            running,
            socket,
            folder,
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
        "resume".into(),
        format!("snapshot {}", dir.display()),
        format!("snapshot {} --background", dir.display()),
        format!("migrate --to unix:{to}"),
    ] {
        let refused = source.ctl(&words);
        refused.expect_status(1).expect_line(&[
            "a migration is under way (connecting)",
            "ctl migrate-cancel",
        ]);
    }
    assert!(!dir.exists());
    assert_eq!(source.says("status"), "running\n");
    assert!(source.says("migrate-status").contains("on its way to"));
    assert_eq!(source.says("migrate-cancel"), "cancelled\n");
    let ended = migrates.wait();
    ended.expect_status(1).expect_line(&["was cancelled"]);
    drop(connection);
    assert_eq!(source.says("pause"), "paused\n");
    assert_eq!(source.says("resume"), "running\n");
    source.running.signal(libc::SIGTERM);
    source.running.wait().expect_status(0);
}
