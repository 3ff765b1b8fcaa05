// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests of a snapshot whose memory another process serves: they find all of it, or are stopped with the reason.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guests::verifier::{FIRST, verifier64};
use reference_vmm::api::Client;
use reference_vmm::end::GuestEnd;
use reference_vmm::lazy::{LazyRequest, LazyState, OnLoss, PageServerAt};
use reference_vmm::snapshot::link::Link;
use reference_vmm::snapshot::packed::Compression;
use reference_vmm::snapshot::{RestoreRequest, SnapshotKind, SnapshotRequest};
use serde_json::{Value, json};
use support::keeper::{Guest, machine};
use support::{Running, Vmm, WATCHDOG, need_kvm};

/// A folder for snapshots of guests that compare all of their memory.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        need_kvm();
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A snapshot of that name.
    fn taken(&self, name: &str, compression: Compression) -> PathBuf {
        // In the lab one vCPU's pass takes seconds by itself.
        let cpus = if support::in_lab() { 1 } else { 4 };
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
    fn elsewhere(&self, dir: &Path) -> PathBuf {
        let name = dir.file_name().unwrap().to_str().unwrap();
        let copy = self.path(&format!("{name}-elsewhere"));
        fs::create_dir_all(&copy).unwrap();
        fs::copy(dir.join("state"), copy.join("state")).unwrap();
        copy
    }
}

/// `snapshot serve`, and where it listens.
fn serve(dir: &Path, listen: &str, more: &[&str]) -> (Running, String) {
    let command = Vmm::command(["snapshot", "serve", "--json", "--listen", listen]);
    let mut server = command.args(more).arg(dir).start();
    server.wait_for("\n");
    let said: Value = serde_json::from_str(server.stdout().lines().next().unwrap()).unwrap();
    (server, said["address"].as_str().unwrap().to_owned())
}

/// Ends it: what it has served.
fn served(server: Running) -> Value {
    server.signal(libc::SIGTERM);
    let ended = server.wait();
    ended.expect_status(0);
    serde_json::from_str(ended.text().lines().last().unwrap()).unwrap()
}

fn at(address: &str) -> LazyRequest {
    LazyRequest {
        page_server: Some(Box::new(PageServerAt {
            address: address.parse().unwrap(),
            tls: None,
        })),
        ..LazyRequest::default()
    }
}

fn from(dir: &Path, lazy: LazyRequest) -> RestoreRequest {
    RestoreRequest {
        lazy: Some(lazy),
        ..RestoreRequest::new(dir)
    }
}

/// Nothing comes but what is touched, a page at a time.
fn touched_only(address: &str) -> LazyRequest {
    LazyRequest {
        record: Some(Duration::from_secs(3600)),
        ..at(address)
    }
}

fn ended(mut guest: Guest) -> String {
    while !guest.end.is_told() {
        guest.listen();
    }
    match guest.leave().1 {
        // Of an instruction that is poisoned KVM says that it cannot emulate it.
        Some(GuestEnd::Failed(why) | GuestEnd::Crashed(why)) => why,
        other => panic!("it did not fail: {other:?}"),
    }
}

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
    // One who says nothing is not waited for.
    let mute = place.path("mute");
    let _listener = UnixListener::bind(&mute).unwrap();
    restore(&format!(
        "--page-deadline 2 --page-server unix:{}",
        mute.display()
    ))
    .expect_status(1)
    .expect_line(&["has been silent for"]);
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
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
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
fn a_server_whose_file_is_damaged_says_so_and_the_guest_is_stopped_with_its_words() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
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
    served(server);
}

#[test]
fn a_server_that_dies_and_comes_back_is_gone_on_with() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
    let listen = format!("unix:{}", place.path("socket").display());
    let (server, _) = serve(&dir, &listen, &[]);
    let lazy = LazyRequest {
        deadline: WATCHDOG,
        ..touched_only(&listen)
    };
    let mut guest = Guest::restore(&from(&here, lazy));
    server.signal(libc::SIGKILL);
    server.wait();
    // It waits for a page that nobody has.
    let begun = Instant::now();
    while guest.running.lazy_stats().unwrap().faults == 0 {
        assert!(begun.elapsed() < WATCHDOG);
        std::thread::yield_now();
    }
    let (server, _) = serve(&dir, &listen, &[]);
    guest.hear(2);
    guest.has_all();
    served(server);
}

#[test]
fn a_server_that_stays_away_costs_the_guest_its_memory_within_the_deadline() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
    for on_loss in [OnLoss::Stop, OnLoss::Poison] {
        let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
        let lazy = LazyRequest {
            deadline: Duration::from_secs(1),
            on_loss,
            ..touched_only(&address)
        };
        let guest = Guest::restore(&from(&here, lazy));
        server.signal(libc::SIGKILL);
        server.wait();
        let why = ended(guest);
        // Poisoned, it is the vCPU that tells of it.
        let needles: &[&str] = match on_loss {
            OnLoss::Stop => &["does not come", "the page server at", &address],
            OnLoss::Poison => &["vCPU"],
        };
        for needle in needles {
            assert!(why.contains(needle), "{why}");
        }
    }
}

/// `ctl` of the monitor whose socket that is.
fn ctl(socket: &Path, words: &str) -> Vmm {
    Vmm::command(["ctl", "--api-sock"]).arg(socket).words(words)
}

/// A monitor with the paused guest of `dir`, of whose memory nothing comes but what is touched.
fn loaded(socket: &Path, dir: &Path, words: &str) -> Running {
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
fn is_cut_off(socket: &Path, address: &str) -> String {
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

#[test]
fn what_waits_for_a_server_that_is_away_says_so_and_is_given_up_by_who_asked_for_it() {
    if support::lab_short() {
        return;
    }
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
    let listen = format!("unix:{}", place.path("socket").display());
    let (server, _) = serve(&dir, &listen, &[]);
    let socket = place.path("api");
    let words = format!("--page-deadline 3600 --page-server {listen}");
    let mut monitor = loaded(&socket, &here, &words);
    server.signal(libc::SIGKILL);
    server.wait();
    ctl(&socket, "resume").output().expect_status(0);
    let status = is_cut_off(&socket, &listen);
    for needle in [
        "running, ",
        "% of its memory is there",
        "away for",
        "given up after 3600 s",
    ] {
        assert!(status.contains(needle), "{status}");
    }
    let json = ctl(&socket, "status --json").output();
    let json: Value = serde_json::from_str(&json.text()).unwrap();
    let away = &json["lazy"]["waits-for-server"];
    assert_eq!(
        (&away["address"], &away["given-up-after-s"]),
        (&json!(listen), &json!(3600))
    );

    // A snapshot says what it waits for, and ends with who asked for it: what is asked for behind it has its turn.
    let to = place.path("to");
    let wait = format!("waits for the page server at {listen}, away for");
    for more in ["", "--background"] {
        let mut snapshot = ctl(&socket, &format!("snapshot {} {more}", to.display())).start();
        snapshot.wait_for_stderr("a snapshot waits for all of the guest's memory, ");
        snapshot.wait_for_stderr(&wait);
        snapshot.signal(libc::SIGINT);
        snapshot.wait();
        assert!(!to.exists());
    }
    // Nothing was brought for it that the guest has not touched: that is recorded still.
    let json = ctl(&socket, "status --json").output();
    let json: Value = serde_json::from_str(&json.text()).unwrap();
    assert_eq!(json["lazy"]["state"], "recording", "{json}");
    // Whether a vCPU that waits for memory can be paused is its KVM's to say.
    let pause = ctl(&socket, "pause").output();
    let said = format!("{}{}", pause.text(), pause.stderr);
    assert!(said.contains(&wait), "{pause}");
    assert!(
        said.contains("paused, ") || said.contains("memory that has not come"),
        "{pause}"
    );
    ctl(&socket, "resume").output().expect_status(0);

    // So does a migration, which can be cancelled before it has begun.
    let mut migrate = ctl(&socket, "migrate --to unix:/nowhere").start();
    migrate.wait_for_stderr("a migration waits for all of the guest's memory, ");
    migrate.wait_for_stderr(&wait);
    ctl(&socket, "migrate-status")
        .output()
        .expect_status(1)
        .expect_line(&["all of the guest's memory is waited for first", &wait]);
    ctl(&socket, "migrate-cancel").output().expect_status(0);
    let ended = migrate.wait();
    ended.expect_status(1);
    for needle in ["the guest runs on here", "no migration was begun: given up"] {
        assert!(ended.stderr.contains(needle), "{ended}");
    }

    // It comes back, and nothing was lost.
    let (server, _) = serve(&dir, &listen, &[]);
    let taken = ctl(&socket, &format!("snapshot {}", to.display())).output();
    taken.expect_status(0);
    let said = format!("{}{}", taken.text(), taken.stderr);
    assert!(said.contains("(--record) ended with it"), "{taken}");
    ctl(&socket, "status").output().expect_stdout("running\n");
    monitor.wait_for("5");
    monitor.type_in(b"q");
    monitor.wait().expect_status(1);
    served(server);
}

#[test]
fn a_snapshot_that_waits_for_a_server_ends_within_the_deadline_with_the_reason() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
    for on_loss in ["stop", "poison"] {
        let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
        let socket = place.path(on_loss);
        let words = format!("--page-deadline 2 --on-loss {on_loss} --page-server {address}");
        let monitor = loaded(&socket, &here, &words);
        server.signal(libc::SIGKILL);
        server.wait();
        let snapshot = ctl(&socket, "snapshot").arg(place.path("to")).output();
        snapshot.expect_status(1);
        let why = format!("the page server at {address} ");
        assert!(snapshot.stderr.contains(&why), "{snapshot}");
        drop(monitor);
    }
}

#[test]
fn what_waits_behind_a_snapshot_of_a_guest_that_ends_hears_how_it_ended() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let socket = place.path("api");
    let words = format!("--page-deadline 3600 --page-server {address}");
    let monitor = loaded(&socket, &here, &words);
    server.signal(libc::SIGKILL);
    server.wait();
    let snapshots = ["first", "second", "third"].map(|to| {
        let mut snapshot = ctl(&socket, "snapshot").arg(place.path(to)).start();
        snapshot.wait_for_stderr("a snapshot waits for all of the guest's memory, ");
        snapshot
    });
    let [first, second, third] = snapshots;
    // Given up by its client, it takes nobody with it.
    first.signal(libc::SIGINT);
    first.wait();
    monitor.signal(libc::SIGINT);
    for of in [second, third] {
        let ended = of.wait();
        ended.expect_status(1);
        // Each may have had its turn, when the one before it was given up.
        let begun = "the guest ended before all of its memory was there";
        let not_begun = "not begun, for the guest has ended: SIGINT stopped it";
        let said = |why| ended.stderr.contains(why);
        assert!(said(begun) || said(not_begun), "{ended}");
    }
    monitor.wait().expect_status(0);
}

#[test]
fn a_monitor_that_is_stopped_waits_for_no_server() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let words = format!("--record=3600 --page-deadline 86400 --page-server {address}");
    let monitor = Vmm::command(["restore", "--from"]).arg(&here);
    let mut monitor = monitor.words(&words).stdin_pipe().start();
    monitor.wait_for("2");
    server.signal(libc::SIGSTOP);
    monitor.signal(libc::SIGINT);
    monitor.wait().expect_status(0);
    server.signal(libc::SIGKILL);
    server.wait();
}

#[test]
fn both_sides_have_a_certificate_where_one_has() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
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

#[test]
fn a_client_of_the_api_says_where_the_server_is() {
    let place = Place::new();
    let dir = place.taken("s", Compression::None);
    let here = place.elsewhere(&dir);
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
