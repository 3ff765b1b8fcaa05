// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`PageServer`]: the side that has the pages.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use memslots::PAGE_SIZE;

use super::frame::{self, Ask, COMPRESSED, Greeting, Head, Kind, Refusal, Run};
use super::link::Link;
use super::{PeerError, Wire};
use crate::{Fetched, Lane, PageSource, SourceError};

/// How a [`PageServer`] works.
///
/// More fields come with any version, and features add some: say what you want of it and end with `..ServerConfig::default()`. (It is not
/// `non_exhaustive`, which would forbid that as well.)
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Threads that fetch and answer, of each connection; at least one. One more, the caller's, reads.
    pub workers: usize,
    /// Asks of a connection that may be unanswered at once, at least one. Each takes a few bytes.
    pub window: u16,
    /// How often something is said at least.
    pub beat: Duration,
    /// How long the other side may say, or take, nothing whole.
    pub silence: Duration,
    /// Which memory this is: who comes back after a broken connection sees that it is the same. A number by chance, or of
    /// the snapshot; zero is a number like any other.
    pub image: u64,
    /// Compresses answers at this level of zstd (-7 to 22), if the other side understands it. Where they get no smaller
    /// they are sent as they are.
    #[cfg(feature = "zstd")]
    pub compress: Option<i32>,
}

impl Default for ServerConfig {
    /// Two workers, 64 asks, a beat each second, five seconds of silence.
    fn default() -> Self {
        Self {
            workers: 2,
            window: 64,
            beat: Duration::from_secs(1),
            silence: Duration::from_secs(5),
            image: 0,
            #[cfg(feature = "zstd")]
            compress: None,
        }
    }
}

impl ServerConfig {
    #[cfg(feature = "zstd")]
    fn level(&self) -> Option<i32> {
        self.compress
    }

    #[cfg(not(feature = "zstd"))]
    fn level(&self) -> Option<i32> {
        None
    }
}

/// What a connection came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Served {
    /// Asks that were answered, failures among them.
    pub asks: u64,
    /// Pages that were sent.
    pub pages: u64,
    /// Those of them that were zeros, and took no bytes.
    pub zeros: u64,
    /// Bytes that were sent for pages.
    pub bytes: u64,
}

/// Serves the pages of a source over connections. [The module](super) has an example.
///
/// # Threat model
/// Who is connected may ask for any page that the source has. It can make this side do work, a
/// [window](ServerConfig::window) of asks at a time, and hold no more memory than that.
pub struct PageServer {
    source: Arc<dyn PageSource>,
    config: ServerConfig,
    stop: AtomicBool,
    /// Of all connections.
    served: Mutex<Served>,
}

/// Asks that wait, and what a connection's threads tell each other.
#[derive(Default)]
struct Queue {
    lanes: [VecDeque<(u64, Lane, Ask)>; 2],
    /// Those that wait, and those that are being fetched.
    unanswered: u16,
    last: u64,
    over: bool,
    failed: Option<PeerError>,
    served: Served,
}

struct Desk<'a> {
    link: Link<&'a dyn Wire>,
    queue: Mutex<Queue>,
    work: Condvar,
    /// Of zstd, if answers are compressed.
    level: Option<i32>,
}

impl PageServer {
    /// Of these pages.
    pub fn new(source: Arc<dyn PageSource>, config: ServerConfig) -> Self {
        Self {
            source,
            config,
            stop: AtomicBool::new(false),
            served: Mutex::default(),
        }
    }

    /// What all connections came to so far, those that are open or broke among them.
    pub fn served(&self) -> Served {
        *self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection, on this thread and some of its own, until the other side closes it. Several may be served at
    /// once, each on its thread; how many is the caller's to bound. A worker inside the source is waited for at the end. A TCP
    /// stream is to be `set_nodelay` before.
    ///
    /// # Errors
    /// [`PeerError`], which says what the other side did, or that the link broke; it is closed then.
    pub fn serve(&self, wire: &dyn Wire) -> Result<Served, PeerError> {
        self.serve_when(wire, || {})
    }

    /// The same, and calls `greeted` when the other side has greeted. Until then it may be anybody, who says nothing: it has
    /// [`ServerConfig::silence`] to begin and as long again to end, and whose it is to bound how many there are knows by
    /// this that it is none of those.
    ///
    /// # Errors
    /// As of [`serve`](Self::serve).
    pub fn serve_when(&self, wire: &dyn Wire, greeted: impl FnOnce()) -> Result<Served, PeerError> {
        let desk = self.open(wire, greeted);
        let served = desk.and_then(|desk| self.run(&desk));
        wire.shutdown();
        served
    }

    /// Ends all connections, those to come among them: each [`serve`](Self::serve) returns [`PeerError::Ended`] soon.
    pub fn stop(&self) {
        // Nothing else is told by it.
        self.stop.store(true, Ordering::Relaxed);
    }

    fn open<'a>(&self, wire: &'a dyn Wire, greeted: impl FnOnce()) -> Result<Desk<'a>, PeerError> {
        let config = &self.config;
        let link = Link::new(wire, config.beat, config.silence)?;
        let theirs = link.greeted(&mut || match self.stop.load(Ordering::Relaxed) {
            true => Err(PeerError::Ended),
            false => Ok(()),
        })?;
        greeted();
        let level = config.level().filter(|_| theirs.flags & COMPRESSED != 0);
        link.greet(Greeting {
            flags: if level.is_some() { COMPRESSED } else { 0 },
            window: config.window.max(1),
            beat: u32::try_from(config.beat.as_millis()).unwrap_or(u32::MAX),
            image: config.image,
        })?;
        Ok(Desk {
            link,
            queue: Mutex::default(),
            work: Condvar::new(),
            level,
        })
    }

    fn run(&self, desk: &Desk<'_>) -> Result<Served, PeerError> {
        let ended = thread::scope(|scope| {
            let mut ended = Ok(());
            for number in 0..self.config.workers.max(1) {
                let thread = thread::Builder::new().name(format!("page-server-{number}"));
                let spawned = thread.spawn_scoped(scope, || self.work(desk));
                ended = ended.and(spawned.map(drop).map_err(|source| PeerError::Thread {
                    name: "page-server",
                    source,
                }));
            }
            let ended = ended.and_then(|()| self.listen(desk));
            desk.end();
            ended
        });
        let mut queue = desk.lock();
        match queue.failed.take() {
            Some(why) => Err(why),
            None => ended.map(|()| queue.served),
        }
    }

    /// Reads asks until there are no more.
    fn listen(&self, desk: &Desk<'_>) -> Result<(), PeerError> {
        let (mut body, mut since) = (Vec::new(), Instant::now());
        loop {
            let allow = |head: &Head| match head.kind {
                Kind::Ask(_) => desk.lock().admit(head.id, self.config.window.max(1)),
                Kind::Beat => Ok(()),
                _ => Err(head.unwanted()),
            };
            let mut meanwhile = || match self.stop.load(Ordering::Relaxed) {
                true => Err(PeerError::Ended),
                false => desk.link.beat(),
            };
            let Some(head) = desk.link.next(&mut body, since, allow, &mut meanwhile)? else {
                return Ok(());
            };
            since = Instant::now();
            // Whoever asks without a pause is owed beats and a stop as well.
            meanwhile()?;
            if let Kind::Ask(lane) = head.kind {
                let ask = Ask::parse(head.id, &body)?;
                let mut queue = desk.lock();
                queue.unanswered += 1;
                if let Some(line) = queue.lanes.get_mut(lane as usize) {
                    line.push_back((head.id, lane, ask));
                }
                desk.work.notify_one();
            }
        }
    }

    /// Answers asks until it is over.
    fn work(&self, desk: &Desk<'_>) {
        let (mut pages, mut out) = (Vec::new(), Vec::new());
        while let Some((id, lane, ask)) = desk.next() {
            pages.resize(ask.pages as usize * PAGE_SIZE as usize, 0);
            // A panic of the source is a page's failure, not the server's.
            let fetched = catch_unwind(AssertUnwindSafe(|| {
                self.source.fetch_for(lane, ask.first, &mut pages)
            }));
            let mut served = Served {
                asks: 1,
                ..Served::default()
            };
            let bytes = match fetched {
                Ok(Ok(fetched)) => {
                    served.pages = u64::from(ask.pages);
                    served.zeros = answer(&mut out, id, fetched, &pages, desk.level);
                    served.bytes = out.len() as u64;
                    std::mem::take(&mut out)
                }
                Ok(Err(error)) => refuse(id, ask, &error),
                Err(_) => frame::refusal(Refusal::ForGood, id, ask.first, "its source panicked"),
            };
            let mut queue = desk.lock();
            // Before it is sent: who has the answer may ask again at once.
            queue.unanswered -= 1;
            queue.served.add(served);
            drop(queue);
            let mut all = self.served.lock().unwrap_or_else(PoisonError::into_inner);
            all.add(served);
            drop(all);
            match desk.link.send(&bytes) {
                // Its room is used again.
                Ok(()) => out = bytes,
                Err(error) => desk.fail(error),
            }
        }
    }
}

impl Desk<'_> {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // What is in it is whole after each statement.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be answered next; none if it is over.
    fn next(&self) -> Option<(u64, Lane, Ask)> {
        let mut queue = self.lock();
        loop {
            if queue.over {
                return None;
            }
            if let Some(next) = queue.lanes.iter_mut().find_map(VecDeque::pop_front) {
                return Some(next);
            }
            queue = self
                .work
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn fail(&self, why: PeerError) {
        let mut queue = self.lock();
        // The first reason: what comes behind it follows from that. And an end is none.
        if !queue.over {
            queue.failed.get_or_insert(why);
        }
        drop(queue);
        self.end();
    }

    fn end(&self) {
        self.lock().over = true;
        self.work.notify_all();
        self.link.shutdown();
    }
}

impl Queue {
    /// Whether there may be an ask with this number.
    fn admit(&mut self, id: u64, window: u16) -> Result<(), PeerError> {
        if id <= self.last {
            let before = self.last;
            return Err(PeerError::Order { id, before });
        }
        if self.unanswered >= window {
            return Err(PeerError::TooMany { id, window });
        }
        self.last = id;
        Ok(())
    }
}

impl Served {
    fn add(&mut self, more: Self) {
        self.asks += more.asks;
        self.pages += more.pages;
        self.zeros += more.zeros;
        self.bytes += more.bytes;
    }
}

fn refuse(id: u64, ask: Ask, error: &SourceError) -> Vec<u8> {
    let (kind, gfn) = match error {
        SourceError::NoSuchPage { gfn } => (Refusal::NoSuchPage, *gfn),
        error if error.is_transient() => (Refusal::MayPass, ask.first),
        _ => (Refusal::ForGood, ask.first),
    };
    // Which page it is stands beside it.
    let words = match error {
        SourceError::Other { source, .. } => source.to_string(),
        SourceError::Peer { source, .. } => source.to_string(),
        other => other.to_string(),
    };
    frame::refusal(kind, id, gfn, &words)
}

/// Writes an answer, and says how many of its pages are zeros.
fn answer(out: &mut Vec<u8>, id: u64, fetched: Fetched, pages: &[u8], level: Option<i32>) -> u64 {
    let each = PAGE_SIZE as usize;
    let is_zero = |page: &[u8]| fetched == Fetched::Zero || page == ZERO;
    let mut runs: Vec<Run> = Vec::new();
    for page in pages.chunks(each) {
        let zeros = is_zero(page);
        match runs.last_mut() {
            Some(run) if run.zeros == zeros => run.pages += 1,
            _ => runs.push(Run { pages: 1, zeros }),
        }
    }
    frame::begin(out);
    frame::put_runs(out, &runs);
    let (mut at, mut zeros, body) = (0, 0, out.len());
    for run in runs {
        let end = at + run.pages as usize * each;
        match run.zeros {
            true => zeros += u64::from(run.pages),
            false => out.extend_from_slice(pages.get(at..end).unwrap_or_default()),
        }
        at = end;
    }
    let compressed = pack(out, body, level);
    frame::end(out, Kind::Pages { compressed }, id);
    zeros
}

/// Compresses what is behind `body`, if that makes it smaller; says whether it does.
#[cfg(feature = "zstd")]
fn pack(out: &mut Vec<u8>, body: usize, level: Option<i32>) -> bool {
    let plain = out.get(body..).filter(|plain| !plain.is_empty());
    let (Some(plain), Some(level)) = (plain, level) else {
        return false;
    };
    match zstd::bulk::compress(plain, level) {
        Ok(packed) if packed.len() < plain.len() => {
            out.truncate(body);
            out.extend_from_slice(&packed);
            true
        }
        // No memory for it, or no level: as it is.
        _ => false,
    }
}

#[cfg(not(feature = "zstd"))]
fn pack(_out: &mut Vec<u8>, _body: usize, _level: Option<i32>) -> bool {
    false
}

static ZERO: &[u8] = &[0; PAGE_SIZE as usize];
