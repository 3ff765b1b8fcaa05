// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sources that fail, dawdle and are cut off as a test draws it, the same for each seed.
//!
//! ```
//! use async_pf::trouble::{Draw, Troubled};
//! use async_pf::{Fetched, PageSource, ZeroSource};
//! use memslots::Gfn;
//!
//! let source = Troubled::new(ZeroSource, Draw::of(1, 0)).without(7);
//! let mut page = [0; 4096];
//! assert_eq!(source.fetch(Gfn(6), &mut page)?, Fetched::Zero);
//! assert!(source.fetch(Gfn(7), &mut page).is_err());
//! # Ok::<(), async_pf::SourceError>(())
//! ```

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use memslots::{Gfn, PAGE_SIZE};

use crate::peer::{PageServer, PeerConfig, PeerError, PeerSource, ServerConfig, Wire, fake};
use crate::{Fetched, PageSource, SourceError};

/// The errno of an input/output error.
const EIO: i32 = 5;

/// Numbers that look random, the same for each seed.
#[derive(Clone, Debug)]
pub struct Draw(u64);

impl Draw {
    /// Those of this number, of all that `seed` has.
    pub fn of(seed: u64, number: u64) -> Self {
        // SplitMix64's finisher: neighbouring numbers draw nothing alike.
        let mut mixed = seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Draw((mixed ^ mixed >> 31) | 1)
    }

    /// Those that begin with this state; of 0, nothing but zeros.
    pub fn at(state: u64) -> Self {
        Draw(state)
    }

    /// What [`at`](Self::at) goes on from.
    pub fn state(&self) -> u64 {
        self.0
    }

    /// One below `end`, which is more than 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % end.max(1)
    }

    /// Whether it happens this time, of what happens once in so many.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

/// What is done at each fetch, by how many were before.
type At = dyn Fn(u64) + Send + Sync;

/// A source that dawdles now and then, and more.
pub struct Troubled<S> {
    pages: S,
    draw: Mutex<Draw>,
    /// How often a fetch from here has failed: not too often for those who try again. None: it never does.
    failed: Option<Mutex<HashMap<u64, u32>>>,
    without: Option<u64>,
    mute: Option<u64>,
    fetched: AtomicU64,
    at: Option<Box<At>>,
}

impl<S: fmt::Debug> fmt::Debug for Troubled<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Troubled");
        shown.field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl<S> Troubled<S> {
    /// One that only dawdles: up to 3 ms, once in 40 fetches.
    pub fn new(pages: S, draw: Draw) -> Self {
        Troubled {
            pages,
            draw: Mutex::new(draw),
            failed: None,
            without: None,
            mute: None,
            fetched: AtomicU64::new(0),
            at: None,
        }
    }

    /// It fails as well, but not for good: once in six fetches, by `EIO`, and from one place three times at most.
    pub fn rough(mut self) -> Self {
        self.failed = Some(Mutex::default());
        self
    }

    /// It has not this page.
    pub fn without(mut self, page: u64) -> Self {
        self.without = Some(page);
        self
    }

    /// It never answers for this page.
    pub fn mute(mut self, page: u64) -> Self {
        self.mute = Some(page);
        self
    }

    /// Does `at` at each fetch, which is told how many were before.
    pub fn at_each(mut self, at: impl Fn(u64) + Send + Sync + 'static) -> Self {
        self.at = Some(Box::new(at));
        self
    }
}

impl<S: PageSource> PageSource for Troubled<S> {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let pages: Range<u64> = first.0..first.0 + into.len() as u64 / PAGE_SIZE;
        let has = |page: Option<u64>| page.is_some_and(|page| pages.contains(&page));
        // Relaxed: a number that orders nothing else.
        let fetched = self.fetched.fetch_add(1, Ordering::Relaxed);
        let (fails, naps) = {
            let mut draw = self.draw.lock().unwrap_or_else(PoisonError::into_inner);
            (draw.once_in(6), draw.once_in(40).then(|| draw.below(3000)))
        };
        if let Some(at) = &self.at {
            at(fetched);
        }
        if has(self.without) {
            return Err(SourceError::NoSuchPage { gfn: first });
        }
        while has(self.mute) {
            thread::park();
        }
        if let Some(failed) = &self.failed {
            let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
            let often = failed.entry(first.0).or_default();
            if fails && *often < 3 {
                *often += 1;
                return Err(SourceError::Read {
                    gfn: first,
                    offset: first.0 * PAGE_SIZE,
                    want: into.len(),
                    source: io::Error::from_raw_os_error(EIO),
                });
            }
        }
        if let Some(nap) = naps {
            thread::sleep(Duration::from_micros(nap));
        }
        self.pages.fetch(first, into)
    }
}

/// `source` at the other end of connections that break and carry little at once, and are made again: each breaks behind 500
/// bytes and fewer than `breaks` more, and carries `least` bytes and fewer than 40,000 more at once.
///
/// # Errors
/// [`PeerError`], of the first of them.
pub fn severed(
    source: Arc<dyn PageSource>,
    seed: u64,
    breaks: u64,
    least: u64,
) -> Result<PeerSource, PeerError> {
    let server = Arc::new(PageServer::new(source, ServerConfig::default()));
    let count = AtomicU64::new(0);
    let connect = move |_| {
        let (ours, theirs) = fake::pair();
        // Relaxed: a number that orders nothing else.
        let mut draw = Draw::of(seed, count.fetch_add(1, Ordering::Relaxed));
        theirs.break_after(500 + draw.below(breaks));
        theirs.at_once((least + draw.below(40_000)) as usize);
        let server = Arc::clone(&server);
        thread::spawn(move || server.serve(&theirs).ok());
        Ok(Box::new(ours) as Box<dyn Wire>)
    };
    let config = PeerConfig {
        tries: 1000,
        ..PeerConfig::default()
    };
    PeerSource::connect(connect, config)
}
