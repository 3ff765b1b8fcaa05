// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Post-copy over the real KVM: guests that know what they have go before their memory, which follows them, over
//! connections that break; or they are lost, with the reason.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use guests::heeder::{Manner, PAGES};
use guests::image;
use guests::scribe::scribe64;
use guests::verifier::verifier64;
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::end::{GuestEnd, StopCause};
use reference_vmm::lazy::{LazyState, OnLoss};
use reference_vmm::migration::address::Address;
use reference_vmm::migration::incoming::{Incoming, IncomingRequest};
use reference_vmm::migration::outgoing::{MigrateRequest, Order, OutgoingError};
use reference_vmm::migration::record::Outcome;
use reference_vmm::migration::source::After;
use reference_vmm::vm::RunState;
use support::heeder::{
    checks, compares, expect_words, has_the_rest, heeder, host_is_amd, page, tells, told,
};
use support::keeper::{Guest, digits, keeper, machine};
use support::moving::{
    Line, NOWHERE, Ready, bind, ends_whole, has_lost_nothing, is_whole, laden, moving, place,
    ready, request, slow,
};
use support::{Vmm, WATCHDOG, need_kvm};

/// A guest that has written all that it has, and goes on.
fn guests() -> Vec<(&'static str, tempfile::TempPath, Config)> {
    let named = |name, (kernel, config)| (name, kernel, config);
    vec![
        named("writes without rest", machine(scribe64(), 1, "16M")),
        named(
            "compares all, shared",
            machine(verifier64(), 4, "16M,shared"),
        ),
        named("compares all", machine(verifier64(), 4, "16M")),
        named("sleeps and wakes", keeper(4, Irqchip::Kernel)),
        named("sleeps and wakes, split", keeper(2, Irqchip::Split)),
    ]
}

#[test]
fn a_guest_that_goes_before_its_memory_has_lost_nothing() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for (name, _kernel, config) in guests() {
        let mut guest = Guest::boot(&config);
        let mut all = String::new();
        for (hop, when) in [
            "after-rounds=0",
            "after-rounds=1",
            "by-hand",
            "after=0",
            "auto",
        ]
        .into_iter()
        .enumerate()
        {
            guest.hear(2);
            let (_folder, path) = place();
            let incoming = bind(match hop % 2 {
                0 => Address::Unix(path),
                _ => "tcp:127.0.0.1:0".parse().unwrap(),
            });
            let request = MigrateRequest {
                connections: 1 + hop as u32 % 2,
                compression: ["none", "zstd"][hop % 2].into(),
                downtime_ms: if name.starts_with("sleeps") { 100 } else { 1 },
                ..request(incoming.address(), when)
            };
            let (moved, mut there) = moving(&guest, incoming, &request, |moving| {
                if when == "by-hand" {
                    moving.until(|record| record.total.rounds > 0);
                    // One that idles may be gone by then.
                    let _ = moving.outgoing.order(Order::Postcopy);
                }
                moving.there()
            });
            let record = moved.unwrap();
            println!("{name}, {when}: {}", record.summary());
            assert_eq!(record.outcome, Some(Outcome::Moved));
            let at_once = ["after-rounds=0", "after=0"].contains(&when);
            assert!(record.postcopy.is_some() || !at_once, "{name} {when}");
            if let Some(followed) = &record.postcopy {
                assert!(followed.ended.is_some() && followed.broken.is_none());
                let pages = followed.demand_pages + followed.bulk_pages;
                assert_eq!(pages, followed.missing_pages, "{name} {when}: once each");
                let zeros = (followed.zero_pages, record.total.zero_pages);
                assert!(followed.zero_pages <= pages && zeros.0 <= zeros.1);
                // Of 16 MiB there is little that is anything else.
                let untouched = name == "writes without rest" && at_once;
                assert!(!untouched || zeros.0 > pages / 2, "{zeros:?} of {pages}");
            }
            if when == "after-rounds=0" {
                let (sent, of) = (record.total.pages_sent, record.memory_pages);
                assert!(sent * 100 <= of * 105, "{sent} of {of} pages");
            }
            if record.postcopy.is_some() {
                is_whole(&there);
            }
            there.hear(3);
            assert_eq!(guest.running.state(), RunState::Paused);
            let (said, end) = guest.leave();
            assert_eq!(end, None, "{name} {when}: {said}");
            all += &said;
            guest = there;
        }
        let (said, end) = guest.quit();
        all += &said;
        assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{name}: {all}");
        let said = all.trim_start_matches('f');
        assert_eq!(said, digits(said.len() - 1) + "!", "{name}");
    }
}

#[test]
fn a_line_that_is_cut_anywhere_is_made_again_and_the_guest_has_lost_nothing() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, config) = machine(scribe64(), 1, "16M");
    let mut guest = Guest::boot(&config);
    let (mut all, mut moved, mut stayed) = (String::new(), 0, 0);
    let mut sizes = [0; 2];
    let steps = if support::long() { 40 } else { 7 };
    let mut places = vec![NOWHERE];
    let mut next = 0;
    while let Some(place_of_cut) = places.get(next).copied() {
        next += 1;
        guest.hear(1);
        let (folder, path) = place();
        let incoming = bind(Address::Unix(path.clone()));
        let line = Line::new(folder.path(), path, place_of_cut);
        let request = request(&line.address(), "after-rounds=0");
        let (here, there) = moving(&guest, incoming, &request, |moving| moving.came());
        match (here, there) {
            (Ok(record), Ok(there)) => {
                let followed = record.postcopy.unwrap();
                let pages = followed.demand_pages + followed.bulk_pages;
                // What was under way when it broke comes again.
                assert!(
                    pages <= followed.missing_pages + 5 * 256,
                    "{place_of_cut:?}"
                );
                let (said, end) = guest.leave();
                assert_eq!(end, None, "{place_of_cut:?}: {said}");
                all += &said;
                guest = there;
                is_whole(&guest);
                moved += u32::from(line.cut.load(SeqCst));
            }
            (Err(_), Err(_)) => {
                assert_eq!(guest.running.state(), RunState::Running, "{place_of_cut:?}");
                stayed += 1;
            }
            (here, there) => panic!("{place_of_cut:?}: {here:?}, {:?}", there.err()),
        }
        if next == 1 {
            sizes = [0, 1].map(|way| line.bytes[way].load(SeqCst));
            for way in [0, 1] {
                places.extend((0..steps).map(|step| (way, sizes[way] * step / steps)));
            }
        }
    }
    println!("{sizes:?} bytes: moved {moved}, stayed {stayed}");
    assert!(moved >= 3 && stayed >= 1, "{moved} {stayed}");
    guest.hear(2);
    ends_whole(all, guest);
}

#[test]
fn while_there_is_no_way_both_sides_say_so_and_wait_for_each_other() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let Ready {
        guest,
        folder,
        path,
        incoming,
    } = ready();
    let line = Line::new(folder.path(), path, NOWHERE);
    let (moved, there) = moving(&guest, incoming, &slow(&line.address()), |moving| {
        let there = moving.there();
        line.close();
        moving.until(|record| {
            let followed = record.postcopy.as_ref();
            followed.is_some_and(|followed| followed.broken.is_some())
        });
        let words = moving.outgoing.record().unwrap().summary();
        assert!(words.contains("nobody can ask now"), "{words}");
        let begun = Instant::now();
        let progress = || there.running.lazy_progress().unwrap();
        while progress().waits_for_source_s.is_none_or(|since| since < 1) {
            assert!(begun.elapsed() < WATCHDOG, "{:?}", progress());
            std::thread::yield_now();
        }
        assert_eq!(progress().state, LazyState::Bringing);
        // Five minutes, where nobody says.
        assert_eq!(progress().source_given_up_after_s, Some(300));
        // It stands still, and nobody has ended it.
        assert!(!there.end.is_told());
        line.closed.store(false, SeqCst);
        there
    });
    let followed = moved.unwrap().postcopy.unwrap();
    assert!(followed.broken.is_none() && followed.ended.is_some());
    is_whole(&there);
    assert_eq!(
        there.running.lazy_progress().unwrap().waits_for_source_s,
        None
    );
    let mut there = there;
    there.hear(2);
    has_lost_nothing(guest, there);
}

#[test]
fn a_guest_that_waits_for_a_page_is_stopped_at_once_and_its_source_hears_that_nothing_more_is_wanted()
 {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for cut in [true, false] {
        let stopped = || GuestEnd::Stopped(StopCause::Signal(libc::SIGTERM));
        let Ready {
            guest,
            folder,
            path,
            incoming,
        } = ready();
        let line = Line::new(folder.path(), path, NOWHERE);
        let (moved, ()) = moving(&guest, incoming, &slow(&line.address()), |moving| {
            let there = moving.there();
            if cut {
                line.close();
                while there
                    .running
                    .lazy_progress()
                    .unwrap()
                    .waits_for_source_s
                    .is_none()
                {
                    std::thread::yield_now();
                }
            }
            let begun = Instant::now();
            // As a signal to its monitor does it.
            there.end.tell(stopped());
            let (_, end) = there.leave();
            // Far from the page deadline.
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "{:?}",
                begun.elapsed()
            );
            assert_eq!(end, Some(stopped()));
            line.closed.store(false, SeqCst);
        });
        // It has heard that, at the latest when there was a line again.
        let of = moved.unwrap().postcopy.unwrap();
        assert!(of.ended.is_some());
        assert_eq!(of.unwanted.as_deref(), Some("SIGTERM stopped it"));
    }
}

#[test]
fn a_source_that_does_not_come_back_is_the_guests_end_within_the_page_deadline() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    for comes_back in [false, true] {
        it_is_the_guests_end(comes_back);
    }
}

/// `comes_back`: too late, and hears of it.
fn it_is_the_guests_end(comes_back: bool) {
    let (_kernel, config) = machine(scribe64(), 1, "16M");
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    let (folder, path) = place();
    let mut waits = IncomingRequest::new(Address::Unix(path.clone()));
    waits.lazy.deadline = Duration::from_secs(1);
    let incoming = Incoming::bind(&waits).unwrap();
    let line = Line::new(folder.path(), path, NOWHERE);
    let (moved, why) = moving(&guest, incoming, &slow(&line.address()), |moving| {
        let mut there = moving.there();
        line.close();
        while !there.end.is_told() {
            there.listen();
        }
        let Some(GuestEnd::Failed(why)) = there.leave().1 else {
            panic!("it did not fail");
        };
        match comes_back {
            true => line.closed.store(false, SeqCst),
            // Its monitor ends too.
            false => guest.running.stop(),
        }
        why
    });
    for needle in [
        "it did not come within 1s",
        "the migration's source, which alone has what is missing, is gone or out of reach",
        "runs nowhere else, and is stopped",
    ] {
        assert!(why.contains(needle), "{why}");
    }
    match moved {
        Err(OutgoingError::Migrate(error)) if comes_back => {
            assert_eq!(error.after, After::Damaged, "{error}");
            let why = error.to_string();
            assert!(why.contains("did not come within 1s"), "{why}");
        }
        Err(OutgoingError::Migrate(error)) => {
            assert_eq!(error.after, After::Lost, "{error}");
            let why = error.to_string();
            assert!(why.contains("pages were left"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}

/// What it lost it is told of, page by page, when it touches it.
#[test]
fn a_guest_whose_source_does_not_come_back_may_go_on_without_what_it_lost() {
    need_kvm();
    let (_kernel, config) = heeder(Manner::Heeds, 1);
    let mut guest = Guest::boot(&config);
    guest.hear(3);
    // There it begins with none.
    compares(&guest, 0, 0);
    guest.hear(3);
    let (folder, path) = place();
    let mut waits = IncomingRequest::new(Address::Unix(path.clone()));
    // What comes still is not to be late: poison in the guest's code would be its end.
    waits.lazy.deadline = Duration::from_secs(5);
    waits.lazy.on_loss = OnLoss::Poison;
    let incoming = Incoming::bind(&waits).unwrap();
    let line = Line::new(folder.path(), path, NOWHERE);
    let request = MigrateRequest {
        bandwidth_limit: Some(256 << 10),
        ..slow(&line.address())
    };
    let (moved, there) = moving(&guest, incoming, &request, |moving| {
        let mut there = moving.there();
        // What it needs for that has come, and the last pages have not.
        there.hear(3);
        line.close();
        compares(&there, PAGES as u32 - 4, PAGES as u32);
        // Each of them twice.
        checks(&mut there, 8);
        // Its source's monitor ends too.
        guest.running.stop();
        there
    });
    assert!(moved.is_err(), "{moved:?}");
    if !tells(&there) {
        return;
    }
    let progress = there.running.lazy_progress().unwrap();
    assert!(progress.lost.is_some_and(|lost| lost >= 4), "{progress:?}");
    let told = told(&there);
    let places: BTreeSet<_> = told.iter().map(|told| told.address).collect();
    assert_eq!(places, (PAGES - 4..PAGES).map(page).collect());
    for told in &told {
        expect_words(told, host_is_amd());
    }
    assert!(there.running.stats().machine_checks >= 8);
    has_the_rest(there);
}

/// Two monitors, and a guest that has gone from one to the other, without most of its memory.
fn gone_on(folder: &Path, words: &str) -> (support::Running, support::Running, support::Running) {
    let [here, there] = ["here.api", "there.api"].map(|name| folder.join(name));
    let (kernel, path) = (folder.join("kernel"), folder.join("incoming"));
    std::fs::write(&kernel, image::elf64(&laden())).unwrap();
    let vmm = Vmm::run(&kernel).words("--memory 16M --debug-exit --irqchip split --api-sock");
    let mut source = vmm.arg(&here).start();
    source.wait_for("12");
    let vmm = Vmm::command(["run", "--incoming"]).arg(format!("unix:{}", path.display()));
    let mut destination = vmm.words(words).arg("--api-sock").arg(&there).start();
    destination.wait_for_stderr("a guest is waited for at");
    let ctl = |socket: &Path| Vmm::command(["ctl", "--api-sock"]).arg(socket);
    let migrate = ctl(&here).arg("migrate").arg("--to");
    let migrate = migrate.arg(format!("unix:{}", path.display()));
    let migrate = migrate
        .words("--postcopy=by-hand --connections 3 --bandwidth 192K")
        .start();
    let begun = Instant::now();
    // There is none, in the beginning.
    while !ctl(&here)
        .arg("migrate-postcopy")
        .output()
        .text()
        .contains("switched")
    {
        assert!(begun.elapsed() < WATCHDOG);
    }
    while !ctl(&there)
        .arg("status")
        .output()
        .text()
        .contains("of its memory is there")
    {
        assert!(begun.elapsed() < WATCHDOG);
    }
    (source, destination, migrate)
}

#[test]
fn a_monitor_that_is_killed_while_memory_follows_takes_the_guest_along_and_the_other_says_so() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, destination, migrate) = gone_on(folder.path(), "");
    destination.signal(libc::SIGKILL);
    let ended = source.wait();
    ended.expect_status(1);
    let text = ended.to_string();
    for needle in [
        "the guest is lost",
        "has not said that it had all of the guest's memory",
    ] {
        assert!(text.contains(needle), "{text}");
    }
    migrate.wait().expect_status(1);

    let folder = tempfile::tempdir().unwrap();
    let (source, mut destination, migrate) = gone_on(folder.path(), "--page-deadline 1");
    // It has what it works with.
    destination.wait_for("0123456789012");
    destination.wait_for_stderr("% of its memory is there, and what is missing follows from there");
    source.signal(libc::SIGKILL);
    migrate.wait().expect_status(1);
    destination.wait_for_stderr(
        "it is waited for up to 1.00 s (--page-deadline): the guest is stopped then",
    );
    // What needs the rest is told, and the guest goes on.
    let there = folder.path().join("there.api");
    let snapshot = Vmm::command(["ctl", "--api-sock"])
        .arg(&there)
        .arg("snapshot");
    let snapshot = snapshot.arg(folder.path().join("snapshot")).output();
    snapshot.expect_status(1);
    let text = snapshot.to_string();
    assert!(text.contains("has not been heard of for "), "{text}");
    destination.wait_for("9012345678901234567890");
    destination.signal(libc::SIGTERM);
    destination.wait();
    let left = folder.path().join("incoming");
    assert!(!left.exists(), "{left:?}");
}

#[test]
fn a_monitor_that_is_stopped_while_memory_follows_says_what_it_takes_along() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, destination, migrate) = gone_on(folder.path(), "--page-deadline 1");
    // Nobody waits for the answer any more.
    migrate.signal(libc::SIGKILL);
    migrate.wait();
    source.signal(libc::SIGTERM);
    let ended = source.wait();
    ended.expect_status(1);
    ended.expect_line(&["the guest is lost", "this monitor ends before", "SIGTERM"]);
    destination.signal(libc::SIGTERM);
    destination.wait();
}

#[test]
fn by_ctl_a_guest_that_has_gone_is_found_at_another_address() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, destination, migrate) = gone_on(folder.path(), "");
    let ctl = |api: &str, words: &str| {
        let ctl = Vmm::command(["ctl", "--api-sock"]).arg(folder.path().join(api));
        ctl.words(words).output()
    };
    let says = |api: &str, words: &str| {
        let said = ctl(api, words);
        said.expect_status(0);
        said.text()
    };
    let path = folder.path().join("elsewhere").display().to_string();
    let said = says(
        "there.api",
        &format!("migrate-recover --listen unix:{path}"),
    );
    assert_eq!(said, format!("listens at unix:{path} too\n"));
    let status = says("there.api", "migrate-status --json");
    assert!(
        status.contains(&format!("\"also\":\"unix:{path}\"")),
        "{status}"
    );
    // Somebody has removed the first one meanwhile.
    std::fs::remove_file(folder.path().join("incoming")).unwrap();
    let said = says("here.api", &format!("migrate-recover --to unix:{path}"));
    assert_eq!(said, format!("connections go to unix:{path}\n"));
    ctl("here.api", "migrate-recover --listen unix:/s")
        .expect_status(1)
        .expect_line(&["nor has come by migration: --listen", "and --to"]);
    ctl("there.api", "migrate-recover --to unix:/s")
        .expect_status(1)
        .expect_line(&["there has been no migration"]);
    let begun = Instant::now();
    let follows = |status: &str| {
        let record: serde_json::Value = serde_json::from_str(status).unwrap();
        let followed = &record["postcopy"];
        let there = followed["recovered-to"] == format!("unix:{path}");
        there && followed["broken"].is_null() && followed["bulk-pages"].as_u64() > Some(0)
    };
    while !follows(&says("here.api", "migrate-status --json")) {
        assert!(begun.elapsed() < WATCHDOG);
    }
    destination.signal(libc::SIGTERM);
    destination.wait();
    source.wait();
    migrate.wait();
}

#[test]
fn an_order_to_switch_is_refused_where_nobody_asked_for_that() {
    need_kvm();
    if support::lab_short() {
        return;
    }
    let (_kernel, config) = machine(scribe64(), 1, "16M");
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let (_folder, path) = place();
    let incoming = bind(Address::Unix(path));
    let request = MigrateRequest {
        bandwidth_limit: Some(1 << 20),
        ..request(incoming.address(), "never")
    };
    let (moved, ()) = moving(&guest, incoming, &request, |moving| {
        moving.until(|record| record.total.rounds > 0);
        let why = moving
            .outgoing
            .order(Order::Postcopy)
            .unwrap_err()
            .to_string();
        assert!(why.contains("--postcopy"), "{why}");
        moving.outgoing.order(Order::Cancel).unwrap();
    });
    assert!(moved.unwrap_err().to_string().contains("cancelled"));
}
