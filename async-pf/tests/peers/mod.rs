// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the tests of peers share: pages that name themselves, and peers over connections that break as they are told.
#![allow(dead_code, reason = "each test takes what it needs")]

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_pf::peer::fake::{self, FakeWire};
use async_pf::peer::{PageServer, PeerConfig, PeerError, Reconnect, Served, ServerConfig, Wire};
use async_pf::{Fetched, PageSource, SourceError};
use memslots::Gfn;

pub const PAGE: usize = 4096;
/// Nothing here takes this long; what hangs fails in the end.
pub const LONG: Duration = Duration::from_secs(60);

/// Which page it is, in each of its words; every third is zeros.
pub fn contents(gfn: u64) -> Vec<u8> {
    let word = if gfn.is_multiple_of(3) {
        0
    } else {
        gfn | 1 << 40
    };
    word.to_le_bytes().repeat(PAGE / 8)
}

/// Pages up to this one.
pub struct Named {
    pub pages: u64,
}

impl PageSource for Named {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        for (gfn, page) in (first.0..).zip(into.chunks_mut(PAGE)) {
            if gfn >= self.pages {
                return Err(SourceError::NoSuchPage { gfn: Gfn(gfn) });
            }
            page.copy_from_slice(&contents(gfn));
        }
        Ok(Fetched::Bytes)
    }
}

/// Fetches pages and sees that each is the one that it should be.
pub fn assert_pages(source: &dyn PageSource, first: u64, count: usize) {
    let mut pages = vec![0xee; count * PAGE];
    match source.fetch(Gfn(first), &mut pages).unwrap() {
        Fetched::Zero => assert!((first..first + count as u64).all(|gfn| gfn % 3 == 0)),
        Fetched::Bytes => {
            for (gfn, page) in (first..).zip(pages.chunks(PAGE)) {
                assert_eq!(page, contents(gfn), "gfn {gfn:#x}");
            }
        }
        other => panic!("{other:?}"),
    }
}

/// Patient, so that a busy host breaks nothing; but with no pauses where a connection is to be made again.
pub fn patient() -> PeerConfig {
    PeerConfig {
        beat: Duration::from_millis(100),
        silence: LONG,
        answer: LONG,
        tries: 3,
        reconnect: Reconnect {
            tries: 3,
            backoff: Duration::from_millis(1),
            longest_backoff: Duration::from_millis(2),
            patience: LONG,
        },
        ..PeerConfig::default()
    }
}

pub fn server(pages: u64) -> PageServer {
    serving(Named { pages })
}

pub fn serving(source: impl PageSource + 'static) -> PageServer {
    let config = ServerConfig {
        beat: Duration::from_millis(100),
        silence: LONG,
        image: 7,
        ..ServerConfig::default()
    };
    PageServer::new(Arc::new(source), config)
}

/// How connections ended, on the side of the server.
pub type Ends = Arc<Mutex<Vec<Result<Served, PeerError>>>>;

/// Connects to the server by connections in memory; `prepare` has the asking end, the serving end, and the connection's
/// number, from 0 on, and may refuse it.
pub fn connecting(
    server: Arc<PageServer>,
    prepare: impl Fn(&FakeWire, &FakeWire, usize) -> io::Result<()> + Send + Sync,
) -> (
    impl Fn(Duration) -> io::Result<Box<dyn Wire>> + Send + Sync,
    Ends,
) {
    let (count, ends) = (AtomicUsize::new(0), Ends::default());
    let noted = Arc::clone(&ends);
    let connect = move |_| {
        let (ours, theirs) = fake::pair();
        prepare(&ours, &theirs, count.fetch_add(1, Ordering::Relaxed))?;
        let (server, noted) = (Arc::clone(&server), Arc::clone(&noted));
        thread::spawn(move || {
            let end = server.serve(&theirs);
            noted.lock().unwrap().push(end);
        });
        Ok(Box::new(ours) as Box<dyn Wire>)
    };
    (connect, ends)
}

/// Looks until there is something. No sleep decides a test: only one that would fail takes long.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < LONG, "waited in vain until {what}");
        thread::yield_now();
    }
}
