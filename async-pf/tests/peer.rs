// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages come from a peer as from a file, over whichever connection, and over one that breaks at any byte.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod peers;

use std::io;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::peer::{
    MemorySource, PageServer, PeerConfig, PeerError, PeerSource, Reconnect, ServerConfig, TcpPeer,
    UnixPeer, Wire,
};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::Gfn;
use peers::{LONG, Named, PAGE, assert_pages, connecting, patient, server, serving, until};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Everything there is to ask, once, by two threads.
fn walk(source: &PeerSource) {
    thread::scope(|scope| {
        for half in 0..2 {
            scope.spawn(move || {
                for (first, count) in [(0, 1), (3, 1), (1, 2), (0, 200), (64, 64), (199, 1)] {
                    assert_pages(source, first + half * 200, count);
                }
            });
        }
    });
    for lane in [Lane::Fault, Lane::Prefetch] {
        let beyond = source.fetch_for(lane, Gfn(399), &mut [0; 2 * PAGE]);
        match beyond.unwrap_err() {
            SourceError::NoSuchPage { gfn } => assert_eq!(gfn, Gfn(400)),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn pages_come_over_unix_sockets_tcp_and_a_pair() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("pages");
    let unix = UnixListener::bind(&path).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Arc::new(server(400));
    let serve = |accept: Box<dyn FnOnce() -> Box<dyn Wire> + Send>| {
        let server = Arc::clone(&server);
        thread::spawn(move || server.serve(&accept()))
    };
    let serving = [
        serve(Box::new(move || Box::new(unix.accept().unwrap().0))),
        serve(Box::new(move || Box::new(tcp.accept().unwrap().0))),
        serve(Box::new(move || Box::new(theirs))),
    ];
    let ours = Mutex::new(Some(ours));
    let pair = move |_| match ours.lock().unwrap().take() {
        Some(ours) => Ok(Box::new(ours) as Box<dyn Wire>),
        None => Err(io::ErrorKind::ConnectionRefused.into()),
    };
    let sources = [
        PeerSource::connect(UnixPeer(path), patient()).unwrap(),
        PeerSource::connect(TcpPeer(address), patient()).unwrap(),
        PeerSource::connect(pair, patient()).unwrap(),
    ];
    for (source, served) in sources.into_iter().zip(serving) {
        walk(&source);
        assert_eq!(source.stats().connections, 1);
        drop(source);
        let served = served.join().unwrap().unwrap();
        assert!(served.pages == 538 && served.zeros == 181, "{served:?}");
        // Zeros take no bytes.
        assert!(served.bytes < (served.pages - served.zeros) * (PAGE as u64 + 64));
    }
}

#[cfg(feature = "zstd")]
#[test]
fn answers_are_compressed_by_choice_and_are_the_same_pages() {
    let config = ServerConfig {
        compress: Some(1),
        ..ServerConfig::default()
    };
    let packing = Arc::new(PageServer::new(Arc::new(Named { pages: 400 }), config));
    let (connect, ends) = connecting(packing, |_, _, _| Ok(()));
    let source = PeerSource::connect(connect, patient()).unwrap();
    walk(&source);
    drop(source);
    let served = until("it is over", || ends.lock().unwrap().pop()).unwrap();
    assert!(served.bytes < served.pages * 400, "{served:?}");
}

#[test]
fn a_guests_memory_is_served_as_it_is() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[
        (GuestAddress(0), 4 * PAGE),
        (GuestAddress(8 * PAGE as u64), PAGE),
    ])
    .unwrap();
    for gfn in [0, 1, 2, 3, 8] {
        let at = GuestAddress(gfn * PAGE as u64);
        memory.write_slice(&peers::contents(gfn), at).unwrap();
    }
    let server = Arc::new(serving(MemorySource(memory)));
    let (connect, _) = connecting(server, |_, _, _| Ok(()));
    let source = PeerSource::connect(connect, patient()).unwrap();
    assert_pages(&source, 0, 4);
    assert_pages(&source, 8, 1);
    for none in [4, 7, 9, u64::MAX - 1] {
        match source.fetch(Gfn(none), &mut [0; PAGE]).unwrap_err() {
            SourceError::NoSuchPage { gfn } => assert_eq!(gfn, Gfn(none)),
            other => panic!("{other}"),
        }
    }
}

/// What a conversation of [`short`] has written, by each end.
fn length() -> (u64, u64) {
    let wires = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&wires);
    let (connect, _) = connecting(Arc::new(server(400)), move |ours, theirs, _| {
        *kept.lock().unwrap() = Some((ours.clone(), theirs.clone()));
        Ok(())
    });
    let source = PeerSource::connect(connect, patient()).unwrap();
    short(&source);
    let wires = wires.lock().unwrap().take().unwrap();
    (wires.0.written(), wires.1.written())
}

/// A conversation with every kind of message in it.
fn short(source: &PeerSource) {
    assert_pages(source, 1, 1);
    assert_pages(source, 3, 1);
    assert_pages(source, 60, 70);
    let beyond = source.fetch(Gfn(400), &mut [0; PAGE]);
    assert!(matches!(
        beyond,
        Err(SourceError::NoSuchPage { gfn: Gfn(400) })
    ));
}

/// Every byte of the small messages, and some of each page.
fn cuts(length: u64) -> impl Iterator<Item = u64> {
    (0..length).filter(move |at| *at < 150 || at % 4001 == 0 || length - at < 50)
}

#[test]
fn a_connection_that_breaks_at_any_byte_is_made_again_and_loses_nothing() {
    let (asks, answers) = length();
    let sides = [(true, asks), (false, answers)];
    for (ask, length) in sides {
        for at in cuts(length) {
            let (connect, _) = connecting(Arc::new(server(400)), move |ours, theirs, number| {
                if number == 1 {
                    // The second: the first only greets.
                    (if ask { ours } else { theirs }).break_after(at);
                }
                if number == 0 {
                    theirs.break_after(32);
                }
                Ok(())
            });
            let source = PeerSource::connect(connect, patient()).unwrap();
            short(&source);
            assert!(source.stats().connections >= 2, "{at} of {length}");
            assert!(source.over().is_none());
        }
    }
}

#[test]
fn bytes_that_come_one_by_one_are_the_same_pages() {
    for most in [1, 3, 4095] {
        let (connect, _) = connecting(Arc::new(server(400)), move |ours, _, _| {
            ours.at_once(most);
            Ok(())
        });
        let source = PeerSource::connect(connect, patient()).unwrap();
        short(&source);
    }
}

/// As [`patient`], but not with silence.
fn hasty() -> PeerConfig {
    PeerConfig {
        beat: Duration::from_millis(20),
        silence: Duration::from_millis(300),
        answer: Duration::from_millis(500),
        // On a busy host a good connection may seem silent too.
        tries: 50,
        ..patient()
    }
}

/// A server that greets hasty ones.
fn lively() -> Arc<PageServer> {
    let config = ServerConfig {
        beat: Duration::from_millis(20),
        silence: LONG,
        ..ServerConfig::default()
    };
    Arc::new(PageServer::new(Arc::new(Named { pages: 400 }), config))
}

#[test]
fn a_connection_that_falls_silent_is_found_and_made_again() {
    let (asks, answers) = length();
    for (ask, length) in [(true, asks), (false, answers)] {
        for at in [0, 20, 32, 40, 52, length / 2] {
            // A beat may come between, so that a message is cut elsewhere: any place is good.
            let (connect, _) = connecting(lively(), move |ours, theirs, number| {
                if number == 1 {
                    (if ask { ours } else { theirs }).stall_after(at);
                }
                if number == 0 {
                    theirs.break_after(32);
                }
                Ok(())
            });
            let source = PeerSource::connect(connect, hasty()).unwrap();
            short(&source);
            assert!(source.stats().connections >= 2, "{at} of {length}");
        }
    }
}

#[test]
fn one_that_is_always_silent_is_given_up_with_the_reason_and_tried_anew_by_who_asks_later() {
    let good = Arc::new(AtomicBool::new(false));
    let is_good = Arc::clone(&good);
    let (connect, _) = connecting(lively(), move |_, theirs, _| {
        if !is_good.load(Ordering::Relaxed) {
            theirs.stall_after(32);
        }
        Ok(())
    });
    let source = PeerSource::connect(connect, hasty()).unwrap();
    let begun = Instant::now();
    let error = source.fetch(Gfn(1), &mut [0; PAGE]).unwrap_err();
    assert!(error.is_transient());
    match &error {
        SourceError::Peer {
            gfn: Gfn(1),
            source,
        } => {
            assert!(matches!(**source, PeerError::Silent(_)), "{source}");
        }
        other => panic!("{other}"),
    }
    // Three connections of 300 ms and a tick each; the rest is for a busy host.
    assert!(begun.elapsed() < Duration::from_secs(20));
    good.store(true, Ordering::Relaxed);
    assert_pages(&source, 1, 1);
}

#[test]
fn a_link_with_nothing_to_say_lives_by_its_beats() {
    let (connect, ends) = connecting(lively(), |_, _, _| Ok(()));
    let config = PeerConfig {
        silence: Duration::from_secs(2),
        answer: LONG,
        ..hasty()
    };
    let source = PeerSource::connect(connect, config).unwrap();
    until("it would have been given up long ago", || {
        (source.stats().beats > 150).then_some(())
    });
    assert_pages(&source, 1, 1);
    assert_eq!(source.stats().connections, 1);
    assert!(ends.lock().unwrap().is_empty());
}

#[test]
fn a_peer_that_lives_and_does_not_answer_is_asked_again_elsewhere() {
    /// Never comes back the first time.
    struct Stuck(AtomicUsize);
    impl PageSource for Stuck {
        fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
            if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
                thread::park_timeout(LONG);
            }
            Named { pages: 9 }.fetch(first, into)
        }
    }
    let stuck = Arc::new(serving(Stuck(AtomicUsize::new(0))));
    let (connect, _) = connecting(stuck, |_, _, _| Ok(()));
    let config = PeerConfig {
        answer: Duration::from_millis(200),
        ..patient()
    };
    let source = PeerSource::connect(connect, config).unwrap();
    assert_pages(&source, 1, 1);
    let stats = source.stats();
    assert_eq!((stats.connections, stats.asks, stats.again), (2, 2, 1));
}

#[test]
fn an_ask_is_sent_so_often_and_no_more() {
    let (connect, _) = connecting(Arc::new(server(400)), |_, theirs, _| {
        theirs.break_after(40); // greets, and begins to answer
        Ok(())
    });
    let config = PeerConfig {
        reconnect: Reconnect {
            tries: 100,
            ..patient().reconnect
        },
        ..patient()
    };
    let source = PeerSource::connect(connect, config).unwrap();
    let error = source.fetch(Gfn(1), &mut [0; PAGE]).unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(source.stats().asks, 3);
}

#[test]
fn who_waits_is_told_of_the_last_refusal_when_no_connection_can_be_made() {
    let (connect, _) = connecting(Arc::new(server(400)), |_, theirs, number| {
        theirs.break_after(32);
        match number {
            0 => Ok(()),
            number => Err(io::Error::other(format!("refusal {number}"))),
        }
    });
    let source = PeerSource::connect(connect, patient()).unwrap();
    let error = source.fetch(Gfn(1), &mut [0; PAGE]).unwrap_err();
    assert!(error.is_transient());
    let words = error.to_string();
    let refusals = ["refusal 2", "refusal 3", "refusal 4", "refusal 5"];
    assert!(
        refusals.iter().any(|refusal| words.ends_with(refusal)),
        "{words}"
    );
}

/// Holds back who fetches, until it is opened, and notes in which order they came.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    came: Mutex<Vec<u64>>,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

struct Gated(Arc<Gate>);

impl PageSource for Gated {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.0.came.lock().unwrap().push(first.0);
        let mut open = self.0.open.lock().unwrap();
        while !*open {
            open = self.0.opened.wait(open).unwrap();
        }
        Named { pages: 10_000 }.fetch(first, into)
    }
}

#[test]
fn faults_overtake_what_is_prefetched_on_both_sides() {
    let gate = Arc::new(Gate::default());
    let config = ServerConfig {
        workers: 1,
        window: 3,
        ..ServerConfig::default()
    };
    let gated = PageServer::new(Arc::new(Gated(Arc::clone(&gate))), config);
    let (connect, _) = connecting(Arc::new(gated), |_, _, _| Ok(()));
    let source = PeerSource::connect(connect, patient()).unwrap();
    thread::scope(|scope| {
        let source = &source;
        // Ten asks: one is fetched, two wait at the server, seven here.
        scope.spawn(move || {
            let mut pages = vec![0; 640 * PAGE];
            source
                .fetch_for(Lane::Prefetch, Gfn(1000), &mut pages)
                .unwrap()
        });
        until("the server is at it", || {
            (gate.came.lock().unwrap().len() == 1).then_some(())
        });
        until("the window is full", || {
            (source.stats().asks == 3).then_some(())
        });
        scope.spawn(move || assert_pages(source, 7, 1));
        until("the fault is in line", || {
            // Nothing shows it from outside but that it is sent first.
            format!("{source:?}").contains("waiting: 8").then_some(())
        });
        gate.open();
    });
    let came = gate.came.lock().unwrap();
    // It overtakes what waits here. At the server it comes behind the two that were sent, at most.
    let at = came.iter().position(|first| *first == 7).unwrap();
    assert!(at <= 3, "{came:?}");
    assert_eq!(came.len(), 11);
}

#[test]
fn a_fault_overtakes_at_the_server_too() {
    let gate = Arc::new(Gate::default());
    let config = ServerConfig {
        workers: 1,
        ..ServerConfig::default()
    };
    let gated = PageServer::new(Arc::new(Gated(Arc::clone(&gate))), config);
    let (connect, _) = connecting(Arc::new(gated), |_, _, _| Ok(()));
    let source = PeerSource::connect(connect, patient()).unwrap();
    thread::scope(|scope| {
        let source = &source;
        scope.spawn(move || {
            let mut pages = vec![0; 640 * PAGE];
            source
                .fetch_for(Lane::Prefetch, Gfn(1000), &mut pages)
                .unwrap()
        });
        until("the server is at it", || {
            (gate.came.lock().unwrap().len() == 1).then_some(())
        });
        scope.spawn(move || assert_pages(source, 7, 1));
        until("all are sent", || (source.stats().asks == 11).then_some(()));
        gate.open();
    });
    let came = gate.came.lock().unwrap();
    let at = came.iter().position(|first| *first == 7).unwrap();
    // The asks are sent before the server has read them: it may have begun one more.
    assert!(at <= 2, "{came:?}");
}

#[test]
fn closing_ends_who_waits_and_who_asks_later() {
    let gate = Arc::new(Gate::default());
    let gated = Arc::new(serving(Gated(Arc::clone(&gate))));
    let (connect, _) = connecting(gated, |_, _, _| Ok(()));
    let source = PeerSource::connect(connect, patient()).unwrap();
    let ended = |error: SourceError| match error {
        SourceError::Peer { source, .. } => {
            assert!(matches!(*source, PeerError::Ended) && !source.is_transient());
        }
        other => panic!("{other}"),
    };
    let both = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            both.wait();
            ended(source.fetch(Gfn(1), &mut [0; PAGE]).unwrap_err());
        });
        both.wait();
        until("it is asked", || (source.stats().asks == 1).then_some(()));
        source.close();
    });
    ended(source.fetch(Gfn(1), &mut [0; PAGE]).unwrap_err());
    gate.open();
}

#[test]
fn a_server_that_is_stopped_ends_its_connections() {
    let stopped = Arc::new(server(9));
    let (connect, ends) = connecting(Arc::clone(&stopped), |_, _, number| match number {
        0 => Ok(()),
        _ => Err(io::ErrorKind::ConnectionRefused.into()),
    });
    let source = PeerSource::connect(connect, patient()).unwrap();
    assert_pages(&source, 1, 1);
    stopped.stop();
    let end = until("it has ended", || ends.lock().unwrap().pop());
    assert!(matches!(end, Err(PeerError::Ended)), "{end:?}");
    assert!(
        source
            .fetch(Gfn(1), &mut [0; PAGE])
            .unwrap_err()
            .is_transient()
    );
}

#[test]
fn what_the_peers_source_says_comes_with_its_words() {
    struct Broken;
    impl PageSource for Broken {
        fn fetch(&self, first: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
            match first.0 {
                0 => panic!("as a bug would"),
                1 => Err(SourceError::Buffer { bytes: 5 }),
                _ => Err(SourceError::Read {
                    gfn: first,
                    offset: 0,
                    want: 1,
                    source: io::Error::from_raw_os_error(5),
                }),
            }
        }
    }
    let (connect, _) = connecting(Arc::new(serving(Broken)), |_, _, _| Ok(()));
    let source = PeerSource::connect(connect, patient()).unwrap();
    for (gfn, words, passes) in [
        (0, "its source panicked", false),
        (1, "a buffer of 5 bytes", false),
        (2, "Input/output error", true),
    ] {
        let error = source.fetch(Gfn(gfn), &mut [0; PAGE]).unwrap_err();
        assert_eq!(error.is_transient(), passes, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(source.stats().connections, 1, "the link is not to blame");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24, failure_persistence: None, ..ProptestConfig::default()
    })]
    /// Connections that break anywhere, again and again.
    #[test]
    fn whatever_breaks_each_page_is_the_right_one(
        breaks in prop::collection::vec((any::<bool>(), 32u64..60_000), 0..12),
        fetches in prop::collection::vec((0u64..300, 1usize..90), 1..12),
    ) {
        let (connect, _) = connecting(Arc::new(server(400)), move |ours, theirs, number| {
            if let Some((ask, at)) = breaks.get(number) {
                (if *ask { ours } else { theirs }).break_after(*at);
            }
            Ok(())
        });
        let config = PeerConfig {
            tries: 100,
            reconnect: Reconnect { tries: 100, ..patient().reconnect },
            ..patient()
        };
        let source = PeerSource::connect(connect, config).unwrap();
        thread::scope(|scope| {
            for part in fetches.chunks(4) {
                let source = &source;
                scope.spawn(move || part.iter().for_each(|(first, count)| {
                    assert_pages(source, *first, *count);
                }));
            }
        });
    }
}
