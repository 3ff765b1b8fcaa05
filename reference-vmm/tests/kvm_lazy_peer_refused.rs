// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is no page server for a guest, and who is none of its guests: each is told why, and keeps nobody else out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;

use reference_vmm::snapshot::packed::Compression;
use serde_json::Value;
use support::keeper::Guest;
use support::page_server::{Place, from, serve, served, touched_only};
use support::{Vmm, WATCHDOG};

#[test]
fn a_server_of_another_snapshot_is_refused_with_both_numbers() {
    let place = Place::new();
    let one = place.taken("one", Compression::None);
    let two = place.taken("two", Compression::None);
    let (server, address) = serve(&two, "tcp:127.0.0.1:0", &[]);
    let id = |dir: &Path| {
        let info = Vmm::command(["snapshot", "info", "--json"]).arg(dir);
        let info: Value = serde_json::from_str(&info.output().text()).unwrap();
        info["id"].as_str().unwrap().to_owned()
    };
    Vmm::command(["restore", "--page-server", &address, "--from"])
        .arg(place.elsewhere(&one))
        .output()
        .expect_status(2)
        .expect_line(&[&address, &id(&two)[..16], &id(&one)]);
    served(server);
}

#[test]
fn who_cannot_be_asked_is_an_error_before_there_is_a_guest() {
    let place = Place::new();
    let here = place.elsewhere(&place.taken("s", Compression::None));
    let restore = |words: &str| {
        let restore = Vmm::command(["restore", "--from"]).arg(&here);
        restore.words(words).output()
    };
    restore("--page-server unix:/nowhere/s")
        .expect_status(1)
        .expect_line(&["nobody listens at unix:/nowhere/s"]);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    restore(&format!("--page-server tcp:{}", nobody.unwrap()))
        .expect_status(1)
        .expect_line(&["nobody listens at tcp:127.0.0.1"]);
    restore("--page-handler /nowhere/s")
        .expect_status(2)
        .expect_line(&["--page-server"]);
    restore(&format!("--page-server unix:{}/state", here.display()))
        .expect_status(2)
        .expect_line(&["a regular file"]);
    restore("--page-server tcp:192.0.2.1:4444")
        .expect_status(2)
        .expect_line(&["tcp:192.0.2.1:4444", "--tls-cert"]);
    restore("--page-server tcp:127.0.0.1")
        .expect_status(2)
        .expect_line(&["\"tcp:127.0.0.1\" is no address"]);
    restore("--page-server unix:/s --page-handler /h")
        .expect_status(2)
        .expect_line(&["one of the two"]);
    restore("--tls-cert c --tls-key k --tls-ca a")
        .expect_status(2)
        .expect_line(&["--page-server"]);
    // Without it there is no memory.
    for words in ["--lazy", "--verify=off"] {
        restore(words)
            .expect_status(2)
            .expect_line(&["the file `state` alone", "--page-server"]);
    }
    // Here is all that a handler has.
    let whole = place.path("s");
    let handler = |at: &Path| {
        let restore = Vmm::command(["restore", "--from"]).arg(&whole);
        restore.arg("--page-handler").arg(at).output()
    };
    handler(Path::new("/nowhere/s")).expect_status(1).expect_line(&[
        "nobody listens at /nowhere/s: there is no such socket; start the page-fault handler first",
    ]);
    let gone = place.path("gone");
    drop(UnixListener::bind(&gone).unwrap());
    handler(&gone).expect_status(1).expect_line(&[
        "nobody listens at ",
        "gone: start the page-fault handler first",
    ]);
    // One who says nothing is not waited for.
    let mute = place.path("mute");
    let _listener = UnixListener::bind(&mute).unwrap();
    restore(&format!(
        "--page-deadline 2 --page-server unix:{}",
        mute.display()
    ))
    .expect_status(1)
    .expect_line(&[
        "has said nothing for 1.00 s",
        "a first connection is not tried again",
    ]);
}

#[test]
fn what_cannot_be_served_is_refused() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let serve = |listen: &str| {
        let command = Vmm::command(["snapshot", "serve", "--listen", listen]);
        command.arg(&dir).output()
    };
    serve("tcp:0.0.0.0:0")
        .expect_status(2)
        .expect_line(&["within reach of other hosts", "--tls-cert"]);
    // Another has it now, and may be gone in a moment.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    serve(&format!("tcp:{}", taken.local_addr().unwrap()))
        .expect_status(1)
        .expect_line(&["cannot listen at tcp:127.0.0.1"]);
    serve(&format!("unix:{}", dir.join("state").display()))
        .expect_status(2)
        .expect_line(&["no socket"]);
    fs::remove_file(dir.join("memory")).unwrap();
    serve("tcp:127.0.0.1:0")
        .expect_status(2)
        .expect_line(&["the file `state` alone", "--page-server"]);
}

#[test]
fn who_connects_and_says_nothing_is_given_up_and_keeps_no_guest_out() {
    let (_place, dir, here) = Place::with_snapshot();
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let connect = || {
        let stream = TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        stream
    };
    // More than are heard at once, and the last one stops in the midst of it.
    let mut silent: Vec<_> = (0..200).map(|_| connect()).collect();
    silent.last_mut().unwrap().write_all(&[0x89]).unwrap();
    let mut guest = Guest::restore(&from(&here, touched_only(&address)));
    guest.hear(1);
    for stream in &mut silent {
        // Nothing is said to it before the end.
        match stream.read(&mut [0; 1]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    }
    // By beats alone it is there still.
    guest.hear(1);
    guest.has_all();
    // And who is silent when the server ends holds that up for nothing.
    let _silent = connect();
    Guest::restore(&from(&here, touched_only(&address))).leave();
    server.signal(libc::SIGTERM);
    let ended = server.wait();
    ended.expect_status(0);
    let lines = ended.stderr.lines();
    let crowds = lines.filter(|line| line.contains("128 have connected and say nothing"));
    assert_eq!(crowds.count(), 1, "{ended}");
    assert!(!ended.stderr.contains("sent away"), "{ended}");
}

#[test]
fn a_directory_with_the_state_alone_is_told_for_what_it_is() {
    let place = Place::new();
    place.taken("s", Compression::Zstd);
    for dir in ["s", "later"] {
        let here = place.elsewhere(&place.path(dir));
        let asked = |words: &str| {
            let command = Vmm::command(["snapshot"]).words(words);
            command.arg(&here).output()
        };
        let info = asked("info");
        info.expect_status(0);
        for needle in [
            "memory      16.0 MiB\n",
            "memory is not here",
            "--page-server",
        ] {
            assert!(info.text().contains(needle), "{info}");
        }
        assert!(!info.text().contains("broken"), "{info}");
        let json: Value = serde_json::from_str(&asked("info --json").text()).unwrap();
        assert_eq!(json["memory_is_here"], false, "{json}");
        assert_eq!(json["memory"], "16777216", "{json}");
        let whole = Vmm::command(["snapshot", "info", "--json"]).arg(place.path(dir));
        let whole: Value = serde_json::from_str(&whole.output().text()).unwrap();
        assert_eq!(whole["memory_is_here"], true, "{whole}");
        for field in ["id", "parent", "own_bytes", "vcpus", "compressed"] {
            assert_eq!(whole[field], json[field], "{field}");
        }
        asked("verify")
            .expect_status(2)
            .expect_line(&["the file `state` alone", "--page-server"]);
        asked("info --heat-map")
            .expect_status(2)
            .expect_line(&["no working set"]);
        let merge = format!("merge --to {}", place.path("merged").display());
        asked(&merge)
            .expect_status(2)
            .expect_line(&["the file `state` alone"]);
    }
}

#[test]
fn both_sides_have_a_certificate_where_one_has() {
    let (place, dir, here) = Place::with_snapshot();
    let tls = support::tls::files(place.0.path(), &["127.0.0.1"]);
    let flags = [
        ("--tls-cert", &tls.cert),
        ("--tls-key", &tls.key),
        ("--tls-ca", &tls.ca),
    ];
    let flags = flags.map(|(flag, path)| format!("{flag}={}", path.display()));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &flags);
    let command = Vmm::command(["restore", "--page-server", &address, "--from"]).arg(&here);
    let mut monitor = command.args(&flags).stdin_pipe().start();
    monitor.wait_for(if support::in_lab() { "3" } else { "5" });
    monitor.type_in(b"q");
    monitor.wait().expect_status(1).expect_silence();
    let command = Vmm::command(["restore", "--page-deadline", "2", "--page-server", &address]);
    let without = command.arg("--from").arg(&here).output();
    without
        .expect_status(1)
        .expect_line(&[&address, "speaks TLS: give --tls-cert"]);
    // One that is killed is no concern of the server's.
    let command = Vmm::command(["restore", "--page-server", &address, "--from"]).arg(&here);
    let mut killed = command.args(&flags).stdin_pipe().start();
    killed.wait_for("5");
    killed.signal(libc::SIGKILL);
    killed.wait();
    server.signal(libc::SIGTERM);
    let ended = server.wait();
    // Of all these guests there was one that did not belong here.
    ended
        .expect_status(0)
        .expect_line(&["is not let in", "what came is not TLS", "--tls-cert"]);
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let command = Vmm::command(["restore", "--page-server", &address, "--from"]).arg(&here);
    let with = command.args(&flags).output();
    with.expect_status(1)
        .expect_line(&[&address, "does it listen with TLS?"]);
    server.signal(libc::SIGTERM);
    let ended = server.wait();
    ended
        .expect_status(0)
        .expect_line(&["speaks TLS: give --tls-cert"]);
}
