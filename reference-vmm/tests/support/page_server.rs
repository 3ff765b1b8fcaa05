// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `snapshot serve`, and guests whose memory comes from there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guests::verifier::verifier64;
use reference_vmm::api::Client;
use reference_vmm::end::GuestEnd;
use reference_vmm::lazy::{LazyRequest, PageServerAt};
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotKind, SnapshotRequest};
use serde_json::Value;

use super::keeper::{Guest, machine};
use super::{Running, Vmm, WATCHDOG, need_kvm};

/// A folder for snapshots of guests that compare all of their memory.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        need_kvm();
        Place(tempfile::tempdir().unwrap())
    }

    /// With a snapshot, which has its memory, and that as another host has it.
    pub fn with_snapshot() -> (Self, PathBuf, PathBuf) {
        let place = Place::new();
        let dir = place.taken("s", Compression::None);
        let here = place.elsewhere(&dir);
        (place, dir, here)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A snapshot of that name.
    pub fn taken(&self, name: &str, compression: Compression) -> PathBuf {
        // In the lab one vCPU's pass takes seconds by itself.
        let cpus = if super::in_lab() { 1 } else { 4 };
        let (_kernel, config) = machine(verifier64(), cpus, "16M");
        let dir = self.path(name);
        let mut guest = Guest::boot(&config);
        guest.hear(2);
        guest.snapshot(&SnapshotRequest {
            compression,
            track: Some(true),
            ..SnapshotRequest::new(&dir)
        });
        if compression == Compression::Zstd {
            // One more that builds on it.
            guest.hear(1);
            guest.snapshot(&SnapshotRequest {
                kind: SnapshotKind::Diff { base: None },
                ..SnapshotRequest::new(self.path("later"))
            });
        }
        guest.leave();
        dir
    }

    /// The snapshot as another host has it: without memory.
    pub fn elsewhere(&self, dir: &Path) -> PathBuf {
        let name = dir.file_name().unwrap().to_str().unwrap();
        let copy = self.path(&format!("{name}-elsewhere"));
        fs::create_dir_all(&copy).unwrap();
        fs::copy(dir.join("state"), copy.join("state")).unwrap();
        copy
    }
}

/// `snapshot serve`, and where it listens.
pub fn serve(dir: &Path, listen: &str, more: &[&str]) -> (Running, String) {
    let command = Vmm::command(["snapshot", "serve", "--json", "--listen", listen]);
    let mut server = command.args(more).arg(dir).start();
    server.wait_for("\n");
    let said: Value = serde_json::from_str(server.stdout().lines().next().unwrap()).unwrap();
    (server, said["address"].as_str().unwrap().to_owned())
}

/// Ends it: what it has served.
pub fn served(server: Running) -> Value {
    server.signal(libc::SIGTERM);
    let ended = server.wait();
    ended.expect_status(0);
    serde_json::from_str(ended.text().lines().last().unwrap()).unwrap()
}

/// Ends it as nobody expects it.
pub fn killed(server: Running) {
    server.signal(libc::SIGKILL);
    server.wait();
}

pub fn at(address: &str) -> LazyRequest {
    LazyRequest {
        page_server: Some(Box::new(PageServerAt {
            address: address.parse().unwrap(),
            tls: None,
        })),
        ..LazyRequest::default()
    }
}

pub fn from(dir: &Path, lazy: LazyRequest) -> RestoreRequest {
    RestoreRequest {
        lazy: Some(lazy),
        ..RestoreRequest::new(dir)
    }
}

/// Nothing comes but what is touched, a page at a time.
pub fn touched_only(address: &str) -> LazyRequest {
    LazyRequest {
        record: Some(Duration::from_secs(3600)),
        ..at(address)
    }
}

pub fn ended(mut guest: Guest) -> String {
    while !guest.end.is_told() {
        guest.listen();
    }
    match guest.leave().1 {
        // Of an instruction that is poisoned KVM says that it cannot emulate it.
        Some(GuestEnd::Failed(why) | GuestEnd::Crashed(why)) => why,
        other => panic!("it did not fail: {other:?}"),
    }
}

/// `ctl` of the monitor whose socket that is.
pub fn ctl(socket: &Path, words: &str) -> Vmm {
    Vmm::command(["ctl", "--api-sock"]).arg(socket).words(words)
}

/// A monitor with the paused guest of `dir`, of whose memory nothing comes but what is touched.
pub fn loaded(socket: &Path, dir: &Path, words: &str) -> Running {
    let monitor = Vmm::command(["restore", "--api-sock"]).arg(socket);
    let monitor = monitor.stdin_pipe().start();
    while Client::connect(socket, WATCHDOG).is_err() {
        std::thread::yield_now();
    }
    let load = ctl(socket, "load --record=3600").words(words).arg(dir);
    load.output().expect_status(0);
    monitor
}

/// Asks until it is said that the guest's memory waits for the server.
pub fn is_cut_off(socket: &Path, address: &str) -> String {
    let begun = Instant::now();
    loop {
        let status = ctl(socket, "status").output();
        let text = status.text();
        if text.contains(&format!(
            "and the rest waits for the page server at {address}"
        )) {
            return text;
        }
        assert!(begun.elapsed() < WATCHDOG, "{status}");
    }
}
