// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page server that is away: it is waited for, for as long as was said and somebody wants it, and then that is the reason.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::{Duration, Instant};

use reference_vmm::lazy::{LazyRequest, OnLoss};
use serde_json::{Value, json};
use support::keeper::Guest;
use support::page_server::{
    Place, ctl, ended, from, is_cut_off, killed, loaded, serve, served, touched_only,
};
use support::{Vmm, WATCHDOG};

#[test]
fn a_server_that_dies_and_comes_back_is_gone_on_with() {
    let (place, dir, here) = Place::with_snapshot();
    let listen = format!("unix:{}", place.path("socket").display());
    let (server, _) = serve(&dir, &listen, &[]);
    let lazy = LazyRequest {
        deadline: WATCHDOG,
        ..touched_only(&listen)
    };
    let mut guest = Guest::restore(&from(&here, lazy));
    killed(server);
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
    let (_place, dir, here) = Place::with_snapshot();
    for on_loss in [OnLoss::Stop, OnLoss::Poison] {
        let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
        let lazy = LazyRequest {
            deadline: Duration::from_secs(1),
            on_loss,
            ..touched_only(&address)
        };
        let guest = Guest::restore(&from(&here, lazy));
        killed(server);
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

#[test]
fn what_waits_for_a_server_that_is_away_says_so_and_is_given_up_by_who_asked_for_it() {
    if support::lab_short() {
        return;
    }
    let (place, dir, here) = Place::with_snapshot();
    let listen = format!("unix:{}", place.path("socket").display());
    let (server, _) = serve(&dir, &listen, &[]);
    let socket = place.path("api");
    let words = format!("--page-deadline 3600 --page-server {listen}");
    let mut monitor = loaded(&socket, &here, &words);
    killed(server);
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
    let (place, dir, here) = Place::with_snapshot();
    for on_loss in ["stop", "poison"] {
        let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
        let socket = place.path(on_loss);
        let words = format!("--page-deadline 2 --on-loss {on_loss} --page-server {address}");
        let monitor = loaded(&socket, &here, &words);
        killed(server);
        let snapshot = ctl(&socket, "snapshot").arg(place.path("to")).output();
        snapshot.expect_status(1);
        let why = format!("the page server at {address} ");
        assert!(snapshot.stderr.contains(&why), "{snapshot}");
        drop(monitor);
    }
}

#[test]
fn what_waits_behind_a_snapshot_of_a_guest_that_ends_hears_how_it_ended() {
    let (place, dir, here) = Place::with_snapshot();
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let socket = place.path("api");
    let words = format!("--page-deadline 3600 --page-server {address}");
    let monitor = loaded(&socket, &here, &words);
    killed(server);
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
    let (_place, dir, here) = Place::with_snapshot();
    let (server, address) = serve(&dir, "tcp:127.0.0.1:0", &[]);
    let words = format!("--record=3600 --page-deadline 86400 --page-server {address}");
    let monitor = Vmm::command(["restore", "--from"]).arg(&here);
    let mut monitor = monitor.words(&words).stdin_pipe().start();
    monitor.wait_for("2");
    server.signal(libc::SIGSTOP);
    monitor.signal(libc::SIGINT);
    let ended = monitor.wait();
    ended.expect_status(0);
    // It is the monitor that has hung up.
    assert!(!ended.stderr.contains("page server"), "{ended}");
    killed(server);
}
