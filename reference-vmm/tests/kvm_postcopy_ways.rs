// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that have gone before their memory, which follows them on other ways than it began on: at another address of the
//! destination's, over several connections, by TLS, into huge pages.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use guests::verifier::verifier64;
use reference_vmm::end::EndSignal;
use reference_vmm::migration::address::Address;
use reference_vmm::migration::incoming::{Incoming, IncomingRequest};
use reference_vmm::migration::message::{GREETING, Message};
use reference_vmm::migration::outgoing::{MigrateRequest, Outgoing, OutgoingError};
use reference_vmm::migration::record::{MigrationRecord, Outcome};
use reference_vmm::vm::{Machine, RunState};
use support::huge::{Reserved, not_tried};
use support::keeper::{Guest, machine};
use support::moving::{
    Line, Moving, NOWHERE, Ready, bind, has_lost_nothing, is_whole, laden, moving, ready,
    ready_with, request, slow,
};
use support::{WATCHDOG, lab_short, need_kvm};

fn broken(record: &MigrationRecord) -> Option<&str> {
    record.postcopy.as_ref()?.broken.as_deref()
}

/// Waits until nobody can ask, for a reason with this in it.
fn is_broken(moving: &Moving<'_>, why: &str) {
    moving.until(|record| broken(record).is_some_and(|broken| broken.contains(why)));
}

fn recover(moving: &Moving<'_>, to: &Address) -> Result<(), OutgoingError> {
    moving.outgoing.recover(&to.to_string(), None)
}

fn unix(folder: &tempfile::TempDir, name: &str) -> Address {
    Address::Unix(folder.path().join(name))
}

#[test]
fn a_guest_whose_way_is_gone_has_its_memory_at_another_address_and_at_a_third() {
    need_kvm();
    if lab_short() {
        return;
    }
    let Ready {
        guest,
        folder,
        path,
        incoming,
    } = ready();
    let also = incoming.also();
    let first = Line::new(folder.path(), path, NOWHERE);
    // When the destination knows that the source knows where the guest is: else it listens for that question without end.
    *first.closes_behind.lock().unwrap() = Some(Message::Done.encode().unwrap());
    let behind = tempfile::tempdir().unwrap();
    let (moved, mut there) = moving(&guest, incoming, &slow(&first.address()), |moving| {
        let there = moving.there();
        is_broken(moving, "");
        // By another kind of socket.
        let second = also.listen(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        assert_eq!(also.address(), Some(second.clone()));
        recover(moving, &second).unwrap();
        moving.until(|record| broken(record).is_none());
        // And while there is a way: what is under way on it comes by the next.
        let third = also.listen(&unix(&folder, "third")).unwrap();
        let Address::Unix(third) = third else {
            panic!("{third}");
        };
        let line = Line::new(behind.path(), third, NOWHERE);
        recover(moving, &line.address()).unwrap();
        moving.until(|_| line.bytes[0].load(SeqCst) > 256 << 10);
        // Who would listen there is not there any more.
        assert!(std::net::TcpStream::connect(tcp(&second)).is_err());
        there
    });
    let record = moved.unwrap();
    assert_eq!(record.outcome, Some(Outcome::Moved));
    let followed = record.postcopy.unwrap();
    let to = followed.recovered_to.clone().unwrap();
    assert!(
        to.ends_with("/line") && followed.broken.is_none(),
        "{to}: {followed:?}"
    );
    is_whole(&there);
    // Nobody waits for connections when all is there.
    let begun = std::time::Instant::now();
    while also.address().is_some() {
        assert!(begun.elapsed() < WATCHDOG);
        std::thread::yield_now();
    }
    let why = also.listen(&unix(&folder, "late")).unwrap_err().to_string();
    assert!(why.contains("all of its memory"), "{why}");
    there.hear(2);
    has_lost_nothing(guest, there);
}

/// `HOST:PORT`.
fn tcp(address: &Address) -> String {
    let text = address.to_string();
    text.strip_prefix("tcp:").unwrap().to_owned()
}

/// Another monitor, which waits for a guest at `address`, until it is told not to.
fn waits_there(incoming: Incoming, stop: &AtomicBool) -> String {
    let end = Arc::new(EndSignal::new().unwrap());
    let (_console, writer) = std::io::pipe().unwrap();
    let stop = || stop.load(SeqCst).then(|| "it was not for me".to_owned());
    let came = incoming.receive(writer, &end, &stop, Machine::start);
    came.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn at_an_address_of_somebody_else_nothing_is_said_and_the_guest_waits_for_its_own() {
    need_kvm();
    if lab_short() {
        return;
    }
    let Ready {
        guest,
        folder,
        path,
        incoming,
    } = ready();
    let also = incoming.also();
    let first = Line::new(folder.path(), path, NOWHERE);
    // A monitor that waits for another guest, and one who would like to have this one's memory.
    let other = bind(unix(&folder, "other"));
    let elsewhere = other.address().clone();
    let thief = folder.path().join("thief");
    let listener = UnixListener::bind(&thief).unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = Arc::clone(&heard);
    // It ends with the process.
    std::thread::spawn(move || {
        for caller in listener.incoming() {
            let mut caller = caller.unwrap();
            let mut greeting = [0; GREETING];
            caller.read_exact(&mut greeting).unwrap();
            // What the true one would say, but for what it cannot know; and what it says then.
            let known = Message::Known {
                chance: [7; 16],
                proof: [7; 32],
            };
            for message in [known, Message::Wanted] {
                let _ = caller.write_all(&message.encode().unwrap());
            }
            let mut more = Vec::new();
            let _ = caller.read_to_end(&mut more);
            hears.lock().unwrap().push((greeting, more));
        }
    });
    let stop = AtomicBool::new(false);
    let (moved, there) = std::thread::scope(|scope| {
        let waits = scope.spawn(|| waits_there(other, &stop));
        let moved = moving(&guest, incoming, &slow(&first.address()), |moving| {
            let there = moving.there();
            first.close();
            for wrong in [elsewhere.clone(), Address::Unix(thief.clone())] {
                recover(moving, &wrong).unwrap();
                is_broken(moving, "is not the monitor that the guest has gone to");
            }
            while heard.lock().unwrap().len() < 4 {
                std::thread::yield_now();
            }
            // Nobody there is nobody's end.
            recover(moving, &unix(&folder, "nobody")).unwrap();
            is_broken(moving, "nobody");
            let right = also.listen(&unix(&folder, "right")).unwrap();
            recover(moving, &right).unwrap();
            moving.until(|record| broken(record).is_none());
            there
        });
        stop.store(true, SeqCst);
        assert!(waits.join().unwrap().contains("it was not for me"));
        moved
    });
    assert_eq!(moved.unwrap().outcome, Some(Outcome::Moved));
    is_whole(&there);
    let heard = heard.lock().unwrap();
    for (greeting, more) in &*heard {
        assert!(more.is_empty(), "{} bytes", more.len());
        // The number is another one each time.
        let others = heard
            .iter()
            .filter(|(other, _)| other[16..32] == greeting[16..32]);
        assert_eq!(others.count(), 1);
    }
    has_lost_nothing(guest, there);
}

#[test]
fn another_way_is_refused_where_there_is_nothing_to_recover_or_it_is_none() {
    need_kvm();
    if lab_short() {
        return;
    }
    let Ready {
        guest,
        folder,
        path,
        incoming,
    } = ready();
    let also = incoming.also();
    let request = MigrateRequest {
        bandwidth_limit: Some(1 << 20),
        ..request(incoming.address(), "by-hand")
    };
    assert!(matches!(
        Outgoing::default().recover("unix:/s", None),
        Err(OutgoingError::None)
    ));
    let (moved, there) = moving(&guest, incoming, &request, |moving| {
        let refused = |to: &str, name: Option<&str>, why: &str| {
            let error = moving.outgoing.recover(to, name).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        moving.until(|record| record.total.pages_sent > 0);
        refused("unix:/s", None, "the guest is here still");
        moving
            .outgoing
            .order(reference_vmm::migration::outgoing::Order::Postcopy)
            .unwrap();
        let there = moving.there();
        refused("nonsense", None, "\"nonsense\" is no address");
        refused("tcp:192.0.2.1:4444", None, "only an address of this host");
        refused("unix:/s", Some("name"), "without TLS");
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        refused(&format!("unix:{}", file.display()), None, "a regular file");
        let listen = |at: Address| also.listen(&at).unwrap_err().to_string();
        let why = listen("tcp:0.0.0.0:0".parse().unwrap());
        assert!(why.contains("only an address of this host"), "{why}");
        let taken = folder.path().join("taken");
        let _other = std::os::unix::net::UnixListener::bind(&taken).unwrap();
        let why = listen(Address::Unix(taken));
        assert!(why.contains("another process listens there"), "{why}");
        // Where it listens already it may be told to again.
        also.listen(&Address::Unix(path.clone())).unwrap();
        assert_eq!(also.address(), None);
        // It goes as before.
        assert_eq!(broken(&moving.outgoing.record().unwrap()), None);
        there
    });
    let record = moved.unwrap();
    assert_eq!(record.postcopy.unwrap().recovered_to, None);
    is_whole(&there);
    drop(folder);
    has_lost_nothing(guest, there);
}

#[test]
fn a_source_in_doubt_finds_out_at_another_address_where_the_guest_is_and_serves_it_there() {
    need_kvm();
    if lab_short() {
        return;
    }
    let Ready {
        guest,
        folder,
        path,
        incoming,
    } = ready();
    let also = incoming.also();
    let line = Line::new(folder.path(), path, NOWHERE);
    // The word arrives, and what the destination says to it does not.
    *line.closes_behind.lock().unwrap() = Some(Message::Go.encode().unwrap());
    let (moved, there) = moving(&guest, incoming, &slow(&line.address()), |moving| {
        moving.until(|record| matches!(record.outcome, Some(Outcome::Unsettled { .. })));
        assert_eq!(guest.running.state(), RunState::Paused);
        let at = also.listen(&unix(&folder, "other")).unwrap();
        recover(moving, &at).unwrap();
        moving.there()
    });
    let record = moved.unwrap();
    assert_eq!(record.outcome, Some(Outcome::Moved));
    assert!(record.postcopy.unwrap().recovered_to.is_some());
    is_whole(&there);
    has_lost_nothing(guest, there);
}

/// Else the test that looks would wait for a source that asks, or serves, for ever.
#[test]
fn a_look_that_fails_ends_the_migration_and_says_why() {
    need_kvm();
    if lab_short() {
        return;
    }
    for in_doubt in [true, false] {
        let Ready {
            guest,
            folder,
            path,
            incoming,
        } = ready();
        let line = Line::new(folder.path(), path, NOWHERE);
        if in_doubt {
            *line.closes_behind.lock().unwrap() = Some(Message::Go.encode().unwrap());
        }
        let looks = || {
            moving(&guest, incoming, &slow(&line.address()), |moving| {
                match in_doubt {
                    true => moving.until(|record| record.outcome.is_some()),
                    false => {
                        let _there = moving.there();
                        line.close();
                        is_broken(moving, "");
                    }
                }
                panic!("what was looked for is not there");
            })
        };
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(looks));
        let why = failed.map(drop).unwrap_err();
        let why = why.downcast_ref::<&str>().unwrap();
        assert_eq!(*why, "what was looked for is not there");
    }
}

const CONNECTIONS: u32 = 3;

/// Control and data before them, the connections for pages: what is waited for, and the rest.
const FIRST_FOR_PAGES: usize = 1 + CONNECTIONS as usize;

#[test]
fn what_nobody_waits_for_follows_over_all_connections_and_one_that_ends_or_stands_still_loses_nothing()
 {
    need_kvm();
    if lab_short() {
        return;
    }
    // One of which most is never touched, and one that compares all of its memory.
    for (what, code, cpus) in [
        ("none", laden(), 1),
        ("cut", verifier64().to_vec(), 2),
        ("hold", verifier64().to_vec(), 2),
    ] {
        let Ready {
            guest,
            folder,
            path,
            incoming,
        } = ready_with(&code, cpus, "32M");
        let line = Line::new(folder.path(), path, NOWHERE);
        let request = MigrateRequest {
            connections: CONNECTIONS,
            ..request(&line.address(), "after-rounds=0")
        };
        let (moved, mut there) = moving(&guest, incoming, &request, |moving| {
            let there = moving.there();
            let all = FIRST_FOR_PAGES..FIRST_FOR_PAGES + 1 + CONNECTIONS as usize;
            match what {
                "cut" => all.for_each(|number| line.cut_one(number)),
                "hold" => {
                    // Until it is taken for one that is gone, and made again.
                    line.hold(Some(all.start + 1));
                    let made = line.connections();
                    moving.until(|record| line.connections() > made || record.outcome.is_some());
                }
                _ => {}
            }
            there
        });
        line.hold(None);
        let record = moved.unwrap();
        assert_eq!(record.outcome, Some(Outcome::Moved), "{what}");
        let followed = record.postcopy.unwrap();
        let pages = followed.demand_pages + followed.bulk_pages;
        let each = line.each.lock().unwrap();
        match what {
            "none" => {
                assert_eq!(pages, followed.missing_pages, "once each");
                // Which is the one that carries what somebody waits for is by chance.
                let carried = each[FIRST_FOR_PAGES..].iter();
                let busy = carried.filter(|bytes| bytes[0] > 512 << 10).count();
                assert!(busy >= CONNECTIONS as usize, "{each:?}");
            }
            _ => {
                assert!(pages >= followed.missing_pages, "{what}");
                assert!(each.len() > FIRST_FOR_PAGES + 1 + CONNECTIONS as usize);
            }
        }
        drop(each);
        is_whole(&there);
        there.hear(2);
        let (said, end) = guest.leave();
        assert_eq!(end, None, "{what}: {said}");
        there.has_all();
    }
}

#[test]
fn by_tls_all_connections_are_authenticated_and_a_cut_one_is_made_again_at_another_name() {
    need_kvm();
    if lab_short() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let tls = support::tls::files(folder.path(), &["127.0.0.1", "the-other"]);
    let (_kernel, config) = machine(verifier64(), 2, "16M");
    let mut guest = Guest::boot(&config);
    guest.hear(1);
    let mut waits = IncomingRequest::new("tcp:127.0.0.1:0".parse().unwrap());
    waits.tls = Some(tls.clone());
    let incoming = Incoming::bind(&waits).unwrap();
    let also = incoming.also();
    let request = MigrateRequest {
        connections: 2,
        compression: "zstd".into(),
        bandwidth_limit: Some(4 << 20),
        tls: Some(tls),
        ..request(incoming.address(), "after-rounds=0")
    };
    let (moved, mut there) = moving(&guest, incoming, &request, |moving| {
        let there = moving.there();
        // Without a name nobody is known at a path.
        let at = also.listen(&unix(&folder, "other")).unwrap();
        let why = recover(moving, &at).unwrap_err().to_string();
        assert!(why.contains("--tls-name"), "{why}");
        // And of another name he is refused.
        let to = |name| moving.outgoing.recover(&at.to_string(), Some(name));
        to("somebody").unwrap();
        is_broken(moving, "its certificate is for another name");
        to("the-other").unwrap();
        there
    });
    let record = moved.unwrap();
    assert_eq!(record.outcome, Some(Outcome::Moved));
    assert!(record.settings.tls && record.postcopy.unwrap().broken.is_none());
    is_whole(&there);
    there.hear(2);
    guest.leave();
    there.has_all();
}

#[test]
fn memory_of_huge_pages_follows_whole_pages_and_where_there_are_none_the_guest_stays() {
    need_kvm();
    if lab_short() {
        return;
    }
    // Two machines of 32 MiB, but for their first two MiB.
    let reserved = match Reserved::new(2048, 30) {
        Ok(reserved) => reserved,
        Err(why) => return not_tried(&why),
    };
    for kind in ["32M,hugepages", "32M,hugepages=2M,shared"] {
        let Ready {
            guest,
            incoming,
            folder: _folder,
            ..
        } = ready_with(verifier64(), 2, kind);
        let request = MigrateRequest {
            connections: 2,
            ..request(incoming.address(), "after-rounds=0")
        };
        let (moved, mut there) = moving(&guest, incoming, &request, |moving| moving.there());
        let record = moved.unwrap();
        assert_eq!(record.outcome, Some(Outcome::Moved), "{kind}");
        assert!(record.postcopy.unwrap().ended.is_some());
        is_whole(&there);
        there.hear(2);
        guest.leave();
        there.has_all();
    }
    // As many as one machine has.
    drop(reserved);
    let _reserved = Reserved::new(2048, 16).unwrap();
    let Ready {
        mut guest,
        incoming,
        folder: _folder,
        ..
    } = ready_with(verifier64(), 2, "32M,hugepages");
    let request = request(incoming.address(), "after-rounds=0");
    let (moved, came) = moving(&guest, incoming, &request, |moving| moving.came());
    let why = moved.unwrap_err().to_string();
    for needle in ["the guest runs on here", "nr_hugepages"] {
        assert!(why.contains(needle), "{why}");
    }
    assert!(came.is_err());
    assert_eq!(guest.running.state(), RunState::Running);
    guest.hear(1);
    guest.has_all();
}
