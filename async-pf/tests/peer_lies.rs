// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whoever does not keep to the protocol is refused with what it said, on both sides, and costs no memory. The bytes here
//! are written by hand, as the module's tables have them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod peers;

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use async_pf::peer::fake::{self, FakeWire};
use async_pf::peer::{PeerError, PeerSource, Wire};
use async_pf::{PageSource, SourceError};
use memslots::Gfn;
use peers::{LONG, PAGE, assert_pages, connecting, patient, server, until};

const MAGIC: [u8; 8] = *b"\x89APFP\r\n\x1a";

fn greeting(version: u16, window: u16, beat: u32, image: u64) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(window.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(beat.to_le_bytes());
    bytes.extend(image.to_le_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

fn frame(kind: u8, detail: u8, len: u32, id: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, detail, 0, 0];
    bytes.extend(len.to_le_bytes());
    bytes.extend(id.to_le_bytes());
    let mut all = bytes.clone();
    all.extend(body);
    bytes.extend(crc32fast::hash(&all).to_le_bytes());
    bytes.extend(body);
    bytes
}

fn pages(id: u64, runs: &[u32], bytes: usize) -> Vec<u8> {
    let mut body = (runs.len() as u16).to_le_bytes().to_vec();
    runs.iter().for_each(|run| body.extend(run.to_le_bytes()));
    body.resize(body.len() + bytes, 0x5a);
    frame(2, 0, body.len() as u32, id, &body)
}

fn ask(id: u64, gfn: u64, pages: u32) -> Vec<u8> {
    let mut body = gfn.to_le_bytes().to_vec();
    body.extend(pages.to_le_bytes());
    frame(1, 0, 12, id, &body)
}

/// Writes all of it, and says whether the other side has not closed.
fn write(wire: &FakeWire, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match wire.write(bytes) {
            Ok(more) => bytes = &bytes[more..],
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
            Err(_) => return false, // it has been refused
        }
    }
    true
}

/// Reads so many bytes, or to the end.
fn read(wire: &FakeWire, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut got = 0;
    while got < len {
        match wire.read(&mut bytes[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
            Err(error) => panic!("{error}"),
        }
    }
    bytes.truncate(got);
    bytes
}

/// A source at a peer that greets with `hello`, reads one ask, and then says `lies`; any further connection does the same.
fn lied_to(hello: Vec<u8>, lies: Vec<u8>) -> Result<PeerSource, PeerError> {
    let connect = move |_| {
        let (ours, theirs) = fake::pair();
        let (hello, lies) = (hello.clone(), lies.clone());
        thread::spawn(move || {
            read(&theirs, 32);
            write(&theirs, &hello);
            read(&theirs, 32);
            write(&theirs, &lies);
            read(&theirs, usize::from(u16::MAX)); // until it is refused
        });
        Ok(Box::new(ours) as Box<dyn Wire>)
    };
    PeerSource::connect(connect, patient())
}

/// What a source says to an ask of four pages, and to each after it.
fn answered(lies: Vec<u8>) -> Arc<PeerError> {
    let source = lied_to(greeting(1, 8, 1000, 7), lies).unwrap();
    let why = |error| match error {
        SourceError::Peer { source, .. } => source,
        other => panic!("{other}"),
    };
    let first = why(source.fetch(Gfn(0x40), &mut [0; 4 * PAGE]).unwrap_err());
    if !first.is_transient() {
        let second = why(source.fetch(Gfn(0), &mut [0; PAGE]).unwrap_err());
        assert!(Arc::ptr_eq(&first, &second), "{first} and then {second}");
        assert!(Arc::ptr_eq(&first, &source.over().unwrap()));
    }
    first
}

#[test]
fn a_server_that_lies_is_refused_for_good_with_what_it_said() {
    let words = |lies: Vec<u8>| {
        let why = answered(lies);
        assert!(!why.is_transient(), "{why}");
        why.to_string()
    };
    let good = pages(1, &[4], 4 * PAGE);
    let table = [
        (
            "another id",
            pages(2, &[4], 4 * PAGE),
            "answer to 2, which is not asked",
        ),
        ("twice", [good.clone(), good].concat(), ""),
        (
            "too few",
            pages(1, &[3], 3 * PAGE),
            "has 3 of 4 pages, in 1 runs",
        ),
        (
            "too many",
            pages(1, &[1, 4], 4 * PAGE),
            "has 5 of 4 pages, in 2 runs",
        ),
        (
            "beyond all",
            pages(1, &[0x7fff_ffff], PAGE),
            "has 2147483647 of 4 pages",
        ),
        (
            "no runs",
            pages(1, &[], PAGE),
            "has 0 of 4 pages, in 0 runs",
        ),
        (
            "an empty run",
            pages(1, &[0, 4], 4 * PAGE),
            "has 0 of 4 pages, in 2 runs",
        ),
        (
            "runs that are not there",
            frame(2, 0, 6, 1, &[4, 0, 4, 0, 0, 0]),
            "in 4 runs",
        ),
        (
            "bytes missing",
            pages(1, &[4], 3 * PAGE),
            "has 12288 bytes for runs of 16384",
        ),
        (
            "bytes for zeros",
            pages(1, &[4 | 1 << 31], PAGE),
            "has 4096 bytes for runs of 0",
        ),
        (
            "longer than it can be",
            pages(1, &[4], 5 * PAGE),
            "has 20486 bytes for runs of 16402",
        ),
        (
            "longer than any",
            frame(2, 0, u32::MAX, 1, &[]),
            "kind 2 with 4294967295 bytes (id 1)",
        ),
        (
            "words without an end",
            frame(3, 0, 265, 1, &[]),
            "kind 3 with 265 bytes (id 1)",
        ),
        (
            "a refusal of nothing",
            frame(3, 0, 8, 9, &[0; 8]),
            "answer to 9",
        ),
        ("no kind", frame(9, 0, 0, 1, &[]), "kind 9, detail 0"),
        ("no detail", frame(2, 7, 6, 1, &[0; 6]), "kind 2, detail 7"),
        ("an ask", ask(1, 0, 1), "kind 1, detail 0"),
        (
            "a beat with a body",
            frame(4, 0, 1, 0, &[0]),
            "kind 4 with 1 bytes",
        ),
        (
            "a beat with an id",
            frame(4, 0, 0, 3, &[]),
            "kind 4 with 0 bytes (id 3)",
        ),
        (
            "a packed nothing",
            frame(2, 1, 6 + PAGE as u32, 1, &{
                let mut body = vec![1, 0, 4, 0, 0, 0];
                body.resize(6 + PAGE, 0x5a);
                body
            }),
            "cannot be unpacked",
        ),
    ];
    for (lie, bytes, said) in table {
        if lie == "twice" {
            continue; // the first is right: below
        }
        let words = words(bytes);
        assert!(words.contains(said), "{lie}: {words}");
    }
}

#[test]
fn a_second_answer_is_refused_though_the_first_is_good() {
    let good = pages(1, &[4], 4 * PAGE);
    let source = lied_to(greeting(1, 8, 1000, 7), [good.clone(), good].concat()).unwrap();
    let mut four = [0; 4 * PAGE];
    // The first may be taken before the second is read, or not.
    let _ = source.fetch(Gfn(0x40), &mut four);
    let over = until("it is refused", || source.over());
    assert!(matches!(*over, PeerError::Unasked { id: 1 }), "{over}");
}

#[test]
fn damage_is_asked_again_and_not_for_ever() {
    let mut damaged = pages(1, &[4], 4 * PAGE);
    damaged[100] ^= 1;
    let why = answered(damaged);
    assert!(matches!(*why, PeerError::Checksum { .. }), "{why}");
}

#[test]
fn who_says_much_and_answers_nothing_is_found() {
    let connect = |_| {
        let (ours, theirs) = fake::pair();
        thread::spawn(move || {
            read(&theirs, 32);
            write(&theirs, &greeting(1, 8, 10, 7));
            let beat = frame(4, 0, 0, 0, &[]);
            while write(&theirs, &beat) {
                theirs.read(&mut [0; 64]).ok();
            }
        });
        Ok(Box::new(ours) as Box<dyn Wire>)
    };
    let mut config = patient();
    config.answer = Duration::from_millis(100);
    let source = PeerSource::connect(connect, config).unwrap();
    let error = source.fetch(Gfn(0x40), &mut [0; PAGE]).unwrap_err();
    let words = error.to_string();
    assert!(error.is_transient());
    assert!(
        words.contains("(gfn 0x40) has had no answer for "),
        "{words}"
    );
}

#[test]
fn who_drips_is_not_waited_for() {
    // An answer, a byte at a tick of 10 ms, which would take minutes; each byte is news, and none is a frame.
    for head in [0, 20] {
        let connect = move |_| {
            let (ours, theirs) = fake::pair();
            thread::spawn(move || {
                read(&theirs, 32);
                write(&theirs, &greeting(1, 8, 10, 7));
                read(&theirs, 32);
                let answer = pages(1, &[4], 4 * PAGE);
                let (now, dripping) = answer.split_at(head);
                write(&theirs, now);
                theirs.set_tick(Duration::from_millis(10)).unwrap();
                for byte in dripping {
                    // What the other side says meanwhile is beats.
                    theirs.read(&mut [0; 64]).ok();
                    write(&theirs, &[*byte]);
                }
            });
            Ok(Box::new(ours) as Box<dyn Wire>)
        };
        let mut config = patient();
        config.silence = Duration::from_millis(150);
        config.tries = 1;
        let source = PeerSource::connect(connect, config).unwrap();
        let error = source.fetch(Gfn(0x40), &mut [0; 4 * PAGE]).unwrap_err();
        let SourceError::Peer { source: why, .. } = &error else {
            panic!("{error}");
        };
        assert!(matches!(**why, PeerError::Silent(_)), "{why}");
    }
}

#[test]
fn who_ends_no_greeting_is_told_for_what_came_of_it() {
    let said = |said: Vec<u8>| {
        let connect = move |_| {
            let (ours, theirs) = fake::pair();
            write(&theirs, &said);
            // It is there, and says no more.
            thread::spawn(move || while !matches!(theirs.read(&mut [0; 64]), Ok(0)) {});
            Ok(Box::new(ours) as Box<dyn Wire>)
        };
        let mut config = patient();
        config.silence = Duration::from_millis(150);
        PeerSource::connect(connect, config).unwrap_err()
    };
    let whole = greeting(1, 8, 10, 7);
    let why = said(whole[..16].to_vec());
    assert!(why.to_string().contains("16 of the 32 bytes"), "{why}");
    assert!(why.is_transient());
    let why = said(whole[..3].to_vec());
    assert!(
        matches!(why, PeerError::HalfGreeting { got: 3, .. }),
        "{why}"
    );
    // Another protocol's first line, which is shorter than a greeting.
    let why = said(b"220 mail\r\n".to_vec());
    let PeerError::NotOurs { magic } = why else {
        panic!("{why}");
    };
    assert_eq!(&magic, b"220 mail");
    let why = said(vec![]);
    assert!(matches!(why, PeerError::Silent(_)), "{why}");
}

#[test]
fn greetings_that_do_not_fit_are_refused_before_anything_is_asked() {
    let refused = |hello: Vec<u8>| {
        let refused = lied_to(hello, vec![]);
        refused.map(drop).unwrap_err()
    };
    let http = refused(b"HTTP/1.1 400 Bad Request\r\nServer".to_vec());
    assert!(matches!(http, PeerError::NotOurs { .. }), "{http}");
    let newer = refused(greeting(2, 8, 1000, 7)).to_string();
    assert_eq!(
        newer,
        "the peer speaks version 2 of the protocol, this side 1"
    );
    let none = refused(greeting(1, 0, 1000, 7));
    assert!(matches!(none, PeerError::Window { window: 0 }), "{none}");
    let slow = refused(greeting(1, 8, 30_001, 7)).to_string();
    assert!(
        slow.contains("each 30.001s only, and is given up after 60s"),
        "{slow}"
    );
    let mut damaged = greeting(1, 8, 1000, 7);
    damaged[20] ^= 1;
    assert!(matches!(refused(damaged), PeerError::Checksum { .. }));
    let endless = refused([greeting(1, 8, 1000, 7), vec![0; 1 << 20]].concat()[5..].to_vec());
    assert!(matches!(endless, PeerError::NotOurs { .. }), "{endless}");
}

#[test]
fn a_memory_that_is_not_the_expected_one_is_refused_at_first_and_later() {
    let (connect, _) = connecting(Arc::new(server(9)), |_, _, _| Ok(()));
    let mut config = patient();
    config.image = Some(8);
    let error = PeerSource::connect(connect, config).map(drop).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the peer has memory 0x7, expected was 0x8"
    );

    // Another after the first has broken: its pages would be another guest's.
    let hellos = Arc::new(Mutex::new(vec![
        greeting(1, 8, 1000, 6),
        greeting(1, 8, 1000, 5),
    ]));
    let connect = move |_| {
        let (ours, theirs) = fake::pair();
        let hello = hellos.lock().unwrap().pop().unwrap();
        thread::spawn(move || {
            read(&theirs, 32);
            write(&theirs, &hello);
            read(&theirs, 32);
            theirs.shutdown();
        });
        Ok(Box::new(ours) as Box<dyn Wire>)
    };
    let source = PeerSource::connect(connect, patient()).unwrap();
    let error = source.fetch(Gfn(0), &mut [0; PAGE]).unwrap_err();
    assert!(!error.is_transient());
    let words = error.to_string();
    assert!(words.contains("memory 0x6, expected was 0x5"), "{words}");
}

/// How a server ends a connection on which a client says this.
fn served(said: Vec<u8>) -> PeerError {
    let (ours, theirs) = fake::pair();
    let client = thread::spawn(move || {
        write(&ours, &said);
        // Takes what comes, until it is refused.
        while !read(&ours, PAGE).is_empty() {}
    });
    let end = server(400).serve(&theirs).unwrap_err();
    client.join().unwrap();
    end
}

#[test]
fn a_client_that_does_not_keep_to_it_is_refused_with_what_it_said() {
    let hello = greeting(1, 0, 1000, 0);
    let says = |frames: &[Vec<u8>]| served([hello.clone(), frames.concat()].concat()).to_string();
    let table = [
        (vec![ask(1, 0, 0)], "ask 1 of 0 pages from gfn 0x0 on"),
        (vec![ask(1, 5, 65)], "ask 1 of 65 pages from gfn 0x5 on"),
        (
            vec![ask(1, u64::MAX, 2)],
            "ask 1 of 2 pages from gfn 0xffffffffffffffff on",
        ),
        (vec![ask(2, 0, 1), ask(2, 0, 1)], "ask 2 comes behind ask 2"),
        (vec![ask(9, 0, 1), ask(3, 0, 1)], "ask 3 comes behind ask 9"),
        (vec![ask(0, 0, 1)], "ask 0 comes behind ask 0"),
        (vec![pages(1, &[1], PAGE)], "kind 2, detail 0"),
        (vec![frame(1, 2, 12, 1, &[0; 12])], "kind 1, detail 2"),
        (
            vec![frame(1, 0, 1 << 30, 1, &[])],
            "kind 1 with 1073741824 bytes (id 1)",
        ),
    ];
    for (frames, expected) in table {
        let words = says(&frames);
        assert!(words.contains(expected), "{words} where {expected} was due");
    }
    assert!(matches!(
        served(b"GET / HTTP/1.1\r\nHost: example.com\r\n".to_vec()),
        PeerError::NotOurs { .. }
    ));
}

#[test]
fn a_client_that_asks_without_an_end_is_refused_at_the_window() {
    /// Never comes back while the test runs.
    struct Stuck(Arc<(Mutex<bool>, std::sync::Condvar)>);
    impl PageSource for Stuck {
        fn fetch(&self, _: Gfn, _: &mut [u8]) -> Result<async_pf::Fetched, SourceError> {
            let mut over = self.0.0.lock().unwrap();
            while !*over {
                over = self.0.1.wait_timeout(over, LONG).unwrap().0;
            }
            Ok(async_pf::Fetched::Zero)
        }
    }
    let over = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
    let stuck = peers::serving(Stuck(Arc::clone(&over)));
    let (ours, theirs) = fake::pair();
    let server = thread::spawn(move || stuck.serve(&theirs));
    let mut said = greeting(1, 0, 1000, 0);
    (1..=65).for_each(|id| said.extend(ask(id, id, 64)));
    write(&ours, &said);
    while !read(&ours, PAGE).is_empty() {}
    *over.0.lock().unwrap() = true;
    over.1.notify_all();
    let end = server.join().unwrap().unwrap_err();
    assert!(
        matches!(end, PeerError::TooMany { id: 65, window: 64 }),
        "{end}"
    );
}

#[test]
fn a_client_that_takes_no_answers_is_given_up() {
    let config = async_pf::peer::ServerConfig {
        beat: Duration::from_millis(20),
        silence: Duration::from_millis(200),
        ..Default::default()
    };
    let short = async_pf::peer::PageServer::new(Arc::new(peers::Named { pages: 400 }), config);
    let (ours, theirs) = fake::pair();
    let server = thread::spawn(move || short.serve(&theirs));
    let mut said = greeting(1, 0, 50, 0);
    (1..=9).for_each(|id| said.extend(ask(id, id, 64)));
    write(&ours, &said);
    // It lives, and says so; the link holds less than nine answers.
    while write(&ours, &frame(4, 0, 0, 0, &[])) {
        thread::yield_now();
    }
    let end = server.join().unwrap().unwrap_err();
    assert!(matches!(end, PeerError::Silent(_)), "{end}");
}

#[test]
fn who_has_not_greeted_is_given_up_or_leaves_with_the_server_and_who_has_is_told_of() {
    let config = async_pf::peer::ServerConfig {
        beat: Duration::from_millis(20),
        silence: Duration::from_millis(200),
        ..Default::default()
    };
    let with =
        |config| async_pf::peer::PageServer::new(Arc::new(peers::Named { pages: 4 }), config);
    let short = with(config);
    let whole = greeting(1, 0, 50, 0);
    for said in [&whole[..0], &whole[..whole.len() - 1], &whole[..]] {
        let (ours, theirs) = fake::pair();
        write(&ours, said);
        let mut told = false;
        let end = short.serve_when(&theirs, || told = true).unwrap_err();
        match (&end, said.len()) {
            (PeerError::Silent(_), 0 | 32) => {}
            (PeerError::HalfGreeting { got: 31, .. }, 31) => {}
            (_, said) => panic!("{said} bytes: {end}"),
        }
        assert_eq!(told, said == whole, "{} bytes", said.len());
    }
    // One that would be waited for much longer.
    let long = with(async_pf::peer::ServerConfig {
        silence: Duration::from_secs(3600),
        ..Default::default()
    });
    let (_ours, theirs) = fake::pair();
    thread::scope(|scope| {
        let served = scope.spawn(|| long.serve(&theirs));
        long.stop();
        let end = served.join().unwrap().unwrap_err();
        assert!(matches!(end, PeerError::Ended), "{end}");
    });
}

#[test]
fn the_words_of_a_refusal_move_no_cursor() {
    let mut body = 5u64.to_le_bytes().to_vec();
    body.extend(b"\x1b[2Jgone\n\xff");
    let refusal = frame(3, 2, body.len() as u32, 1, &body);
    let source = lied_to(greeting(1, 8, 1000, 7), refusal).unwrap();
    let error = source.fetch(Gfn(0x40), &mut [0; 4 * PAGE]).unwrap_err();
    assert!(source.over().is_none(), "only this page is refused");
    let SourceError::Peer { source: why, .. } = error else {
        panic!("{error}");
    };
    match &*why {
        // Gfn 5 is none of those that were asked for.
        PeerError::Told {
            gfn,
            words,
            transient,
        } => {
            assert_eq!(
                (gfn.0, words.as_str(), *transient),
                (0x40, "[2Jgone\u{fffd}", false)
            );
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_good_peer_is_no_liar() {
    let (connect, ends) = connecting(Arc::new(server(400)), |_, _, _| Ok(()));
    let source = PeerSource::connect(connect, patient()).unwrap();
    assert_pages(&source, 0, 300);
    drop(source);
    until("it ends well", || ends.lock().unwrap().pop()).unwrap();
}
