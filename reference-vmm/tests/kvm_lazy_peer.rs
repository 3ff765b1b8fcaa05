// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests of a snapshot whose memory another process serves: they find all of it, or are stopped with the reason.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use guests::verifier::FIRST;
use reference_vmm::api::Client;
use reference_vmm::lazy::LazyState;
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::packed::Compression;
use serde_json::json;
use support::keeper::Guest;
use support::page_server::{Place, at, ctl, ended, from, serve, served, touched_only};
use support::{Vmm, WATCHDOG};

#[test]
fn guests_side_by_side_find_all_of_the_memory_that_a_server_has() {
    // There a pass over all of memory, page by page, takes seconds.
    let side_by_side = if support::in_lab() { 1 } else { 3 };
    let place = Place::new();
    let plain = place.taken("plain", Compression::None);
    place.taken("packed", Compression::Zstd);
    let later = place.path("later");
    let unix = format!("unix:{}", place.path("socket").display());
    for (dir, listen) in [(&plain, &*unix), (&later, "tcp:127.0.0.1:0")] {
        let here = place.elsewhere(dir);
        let (server, address) = serve(dir, listen, &[]);
        for how in [at(&address), touched_only(&address)] {
            let by_itself = how.record.is_some();
            let restore = || Guest::restore(&from(&here, how.clone()));
            let mut guests: Vec<_> = (0..side_by_side).map(|_| restore()).collect();
            for guest in &mut guests {
                guest.hear(if support::in_lab() { 1 } else { 2 });
            }
            for guest in guests {
                if !by_itself {
                    guest.running.settle_memory().unwrap();
                    let progress = guest.running.lazy_progress().unwrap();
                    assert_eq!(progress.state, LazyState::Whole);
                }
                guest.has_all();
            }
        }
        // What was recorded is read ahead: of a server's as well.
        assert!(here.join("working_set").exists());
        let mut guest = Guest::restore(&from(&here, at(&address)));
        guest.hear(2);
        guest.has_all();
        let said = served(server);
        assert_eq!(said["connections"], 2 * (2 * side_by_side + 1), "{said}");
        assert!(said["pages"].as_u64().unwrap() > 1000, "{said}");
        assert!(!here.join("memory").exists());
    }
}

#[test]
fn a_server_whose_file_is_damaged_says_so_and_the_guest_is_stopped_with_its_words() {
    let (_place, dir, here) = Place::with_snapshot();
    let (link, _) = Link::open(&dir).unwrap();
    let (_, piece) = link.map().locate(FIRST).unwrap();
    let memory = fs::File::options().write(true).open(dir.join("memory"));
    memory
        .unwrap()
        .write_all_at(&[1; 8], piece.offset + 4096)
        .unwrap();
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let guest = Guest::restore(&from(&here, at(&address)));
    let why = ended(guest);
    assert!(why.contains("is damaged between byte"), "{why}");
    // However many ask for it, it is one line there.
    let guest = Guest::restore(&from(&here, at(&address)));
    ended(guest);
    server.signal(libc::SIGTERM);
    let server = server.wait();
    let memory = dir.join("memory");
    let said = server.expect_status(0).one_line();
    for needle in [
        "guests do not get their memory from 0x",
        memory.to_str().unwrap(),
        "is damaged between byte",
    ] {
        assert!(said.contains(needle), "{server}");
    }
}

#[test]
fn when_all_memory_is_there_nothing_of_where_it_came_from_is_held() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let socket = place.path("api");
    for (from, words) in [
        (&here, format!("--page-server {address}")),
        (&dir, "--lazy".to_owned()),
    ] {
        let command = Vmm::command(["restore", "--api-sock"]).arg(&socket);
        let monitor = command.arg("--from").arg(from).words(&words);
        let mut monitor = monitor.stdin_pipe().start();
        let begun = Instant::now();
        // The last word of a connection comes behind the guest's memory.
        loop {
            let status = ctl(&socket, "status").output();
            let whole = status.status.success() && status.text() == "running\n";
            let open = open_files(monitor.pid());
            let held = |of: &&String| of.contains("/memory") || of.contains("working_set");
            let sockets = open.iter().filter(|of| of.starts_with("socket:")).count();
            // The control socket's own, and no other.
            if whole && sockets <= 1 && open.iter().filter(held).count() == 0 {
                break;
            }
            assert!(begun.elapsed() < WATCHDOG, "{status} {open:?}");
            std::thread::yield_now();
        }
        monitor.wait_for("5");
        monitor.type_in(b"q");
        monitor.wait().expect_status(1);
    }
    served(server);
}

/// What a process has open, by name.
fn open_files(pid: libc::pid_t) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    // One that is closed meanwhile has none.
    let names = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    names
        .map(|name| name.to_string_lossy().into_owned())
        .collect()
}

#[test]
fn a_client_of_the_api_says_where_the_server_is() {
    let (place, dir, here) = Place::with_snapshot();
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let socket = place.path("api");
    let command = Vmm::command(["restore", "--api-sock"]).arg(&socket);
    let mut monitor = command.stdin_pipe().start();
    let mut client = loop {
        match Client::connect(&socket, WATCHDOG) {
            Ok(client) => break client,
            Err(_) => std::thread::yield_now(),
        }
    };
    // One that fails is answered, and another may come.
    let nowhere = json!({
        "snapshot_path": here, "resume_vm": true,
        "mem_backend": { "backend_type": "PageServer", "backend_path": "unix:/nowhere" },
    });
    let refused = client.call("PUT", "/snapshot/load", Some(&nowhere));
    let refused = refused.unwrap();
    assert!(refused.fault().unwrap().contains("/nowhere"), "{refused:?}");
    let ctl = Vmm::command(["ctl", "load", "--resume", "--api-sock"]).arg(&socket);
    let loaded = ctl.args(["--page-server", &address]).arg(&here).output();
    loaded.expect_status(0);
    monitor.wait_for("5");
    monitor.type_in(b"q");
    monitor.wait().expect_status(1).expect_silence();
    served(server);
}
