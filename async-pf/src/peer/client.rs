// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`PeerSource`]: the side that wants the pages.
//!
//! A fetch puts its asks into a line and sends what the window lets, itself; one thread reads the answers, and makes the
//! connection again when it breaks. What is where is in [`calls`](super::calls).
//!
//! Locks, in this order: the link's writing lock, `state`.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memslots::{Gfn, PAGE_SIZE};

use super::calls::{Answer, Calls};
use super::frame::{self, COMPRESSED, Greeting, Head, Kind, MOST_PAGES, Refusal};
use super::link::Link;
use super::{Connect, PeerError, Wire};
use crate::source::whole_pages;
use crate::{Fetched, Lane, PageSource, SourceError};

/// How a connection that broke is made again. More fields come with any version: end with `..Reconnect::default()`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reconnect {
    /// How often in a row, until it is given up: whoever waits has the reason then, and whoever asks later begins anew.
    pub tries: u32,
    /// The wait before the second of them; the first is made at once. Each further wait is twice as long.
    pub backoff: Duration,
    /// The longest of these waits.
    pub longest_backoff: Duration,
    /// How long making a connection may take.
    pub patience: Duration,
}

impl Default for Reconnect {
    fn default() -> Self {
        Reconnect {
            tries: 10,
            backoff: Duration::from_millis(10),
            longest_backoff: Duration::from_secs(1),
            patience: Duration::from_secs(2),
        }
    }
}

/// How a [`PeerSource`] works.
///
/// More fields come with any version, and features add some: say what you want of it and end with `..PeerConfig::default()`. (It is not
/// `non_exhaustive`, which would forbid that as well.)
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// How often something is said at least.
    pub beat: Duration,
    /// How long the other side may say, or take, nothing whole.
    pub silence: Duration,
    /// How long an ask may be unanswered, though the other side lives.
    pub answer: Duration,
    /// Asks that are unanswered at once, at most; fewer if the other side takes fewer.
    pub window: u16,
    /// How often an ask is sent at most, if connections break under it.
    pub tries: u32,
    /// What is done about a connection that broke.
    pub reconnect: Reconnect,
    /// Which memory is expected. None is whichever the first connection has; it stays that one.
    pub image: Option<u64>,
}

impl Default for PeerConfig {
    /// A beat each second, five seconds of silence, ten for an answer, 64 asks, each sent four times at most, ten connections
    /// in a row from 10 ms on, two seconds for each.
    fn default() -> Self {
        Self {
            beat: Duration::from_secs(1),
            silence: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            window: 64,
            tries: 4,
            reconnect: Reconnect::default(),
            image: None,
        }
    }
}

/// What a [`PeerSource`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerStats {
    /// Connections that were made, with a greeting.
    pub connections: u64,
    /// Asks that were sent.
    pub asks: u64,
    /// Those of them that were sent again, on a new connection.
    pub again: u64,
    /// Answers with pages.
    pub answers: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Beats that came.
    pub beats: u64,
}

/// Pages of a peer. [The module](super) says how, and has an example.
///
/// A fetch blocks until its pages are there, the peer's source has refused them, or the limits of the
/// [configuration](PeerConfig) are reached; [`close`](Self::close) ends all.
pub struct PeerSource {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

type Line = Link<Box<dyn Wire>>;

struct Shared {
    connect: Box<dyn Connect>,
    config: PeerConfig,
    state: Mutex<State>,
    /// For who waits for an answer.
    answered: Condvar,
    /// For the reader, where it has no connection to read from: someone asks, or it is over.
    wanted: Condvar,
}

struct State {
    calls: Calls,
    link: Option<Arc<Line>>,
    /// Of what the other side has, if that is known.
    image: Option<u64>,
    /// Nothing is asked any more, for this reason.
    over: Option<Arc<PeerError>>,
    /// The reader makes a connection, and hears nothing.
    dialling: bool,
    stats: PeerStats,
}

impl PeerSource {
    /// Connects, greets, and keeps the connection from then on. Blocks for
    /// [`patience`](Reconnect::patience) and [`silence`](PeerConfig::silence) at most.
    ///
    /// # Errors
    /// [`PeerError`]: there is no peer, or it is another, or has another memory.
    pub fn connect(connect: impl Connect + 'static, config: PeerConfig) -> Result<Self, PeerError> {
        let image = config.image;
        let shared = Arc::new(Shared {
            connect: Box::new(connect),
            config,
            state: Mutex::new(State {
                calls: Calls::default(),
                link: None,
                image,
                over: None,
                dialling: false,
                stats: PeerStats::default(),
            }),
            answered: Condvar::new(),
            wanted: Condvar::new(),
        });
        let link = shared.dial()?;
        let read = {
            let shared = Arc::clone(&shared);
            move || shared.keep(link)
        };
        let reader = thread::Builder::new().name("page-peer".into()).spawn(read);
        let reader = reader.map_err(|source| PeerError::Thread {
            name: "page-peer",
            source,
        })?;
        Ok(Self {
            shared,
            reader: Some(reader),
        })
    }

    /// What it has done.
    pub fn stats(&self) -> PeerStats {
        self.shared.lock().stats
    }

    /// Why it is of no use any more; none while it is.
    pub fn over(&self) -> Option<Arc<PeerError>> {
        self.shared.lock().over.clone()
    }

    /// Ends it: whoever waits has [`PeerError::Ended`] at once, and so has whoever asks later.
    pub fn close(&self) {
        self.shared.refuse(PeerError::Ended);
    }
}

impl PageSource for PeerSource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        whole_pages(first, into)?;
        let failed = |source| SourceError::Peer { gfn: first, source };
        let pages = into.len() as u64 / PAGE_SIZE;
        let asked = self.shared.ask(lane, first, pages).map_err(failed)?;
        let (mut done, mut all) = (0, Fetched::Zero);
        for ticket in asked.tickets() {
            let answer = self.shared.answer(ticket).map_err(failed)?;
            let end = done + answer.ask.pages as usize * PAGE_SIZE as usize;
            let (before, rest) = into.split_at_mut(done);
            let part = rest.get_mut(..end - done).unwrap_or_default();
            let fetched = self.shared.unpack(&answer, part)?;
            match (fetched, all) {
                (Fetched::Zero, Fetched::Bytes) => part.fill(0),
                (Fetched::Bytes, Fetched::Zero) => {
                    before.fill(0);
                    all = Fetched::Bytes;
                }
                _ => {}
            }
            self.shared.lock().calls.recycle(answer.body);
            done = end;
        }
        Ok(all)
    }

    fn overtakes(&self) -> bool {
        true
    }

    fn run(&self, _first: Gfn, pages: u64) -> u64 {
        pages.clamp(1, u64::from(MOST_PAGES))
    }
}

/// The asks of one fetch, which are forgotten when that ends.
struct Asked<'a> {
    shared: &'a Shared,
    tickets: std::ops::Range<u64>,
}

impl Asked<'_> {
    fn tickets(&self) -> std::ops::Range<u64> {
        self.tickets.clone()
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.shared.lock().calls.forget(self.tickets.clone());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts asks for these pages into the line, and sends what may be sent.
    fn ask(&self, lane: Lane, first: Gfn, pages: u64) -> Result<Asked<'_>, Arc<PeerError>> {
        let mut state = self.lock();
        if let Some(over) = &state.over {
            return Err(Arc::clone(over));
        }
        let tickets = state.calls.add(lane, first, pages);
        let asked = Asked {
            shared: self,
            tickets,
        };
        self.wanted.notify_all();
        drop(state);
        self.pump();
        Ok(asked)
    }

    /// Sends what may be sent, demand first.
    fn pump(&self) {
        let Some(link) = self.lock().link.clone() else {
            return; // the reader does when there is one
        };
        let sent = link.send_all(|bytes| {
            let mut state = self.lock();
            let State {
                calls, link: now, ..
            } = &mut *state;
            // Of another connection the window is another, and its reader pumps.
            if !now.as_ref().is_some_and(|now| Arc::ptr_eq(now, &link)) {
                return;
            }
            let again = calls.send(bytes, Instant::now());
            state.stats.asks += again.all;
            state.stats.again += again.again;
        });
        if sent.is_err() {
            // The reader sees it end, and says why to whoever waits.
            link.shutdown();
        }
    }

    /// Waits for an answer.
    fn answer(&self, ticket: u64) -> Result<Answer, Arc<PeerError>> {
        let mut state = self.lock();
        loop {
            if let Some(answer) = state.calls.take(ticket) {
                return answer;
            }
            if let Some(over) = &state.over {
                return Err(Arc::clone(over));
            }
            let waited = self.answered.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Puts the bytes of an answer where they belong.
    fn unpack(&self, answer: &Answer, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let ask = answer.ask;
        let failed = |source| SourceError::Peer {
            gfn: ask.first,
            source,
        };
        if let Kind::Failed(why) = answer.kind {
            let (gfn, words) = frame::take_refusal(&answer.body);
            let inside = ask.first.0..ask.first.0 + u64::from(ask.pages);
            let gfn = if inside.contains(&gfn.0) {
                gfn
            } else {
                ask.first
            };
            let transient = match why {
                Refusal::NoSuchPage => return Err(SourceError::NoSuchPage { gfn }),
                Refusal::MayPass => true,
                Refusal::ForGood => false,
            };
            return Err(failed(Arc::new(PeerError::Told {
                gfn,
                words,
                transient,
            })));
        }
        match answer.unpack(into) {
            Ok(fetched) => Ok(fetched),
            Err(lie) => Err(failed(self.refuse(lie))),
        }
    }

    /// It is over, for this reason, unless it was before: the reason that holds.
    fn refuse(&self, why: PeerError) -> Arc<PeerError> {
        let mut state = self.lock();
        let why = Arc::clone(state.over.get_or_insert_with(|| Arc::new(why)));
        let link = state.link.take();
        self.answered.notify_all();
        self.wanted.notify_all();
        drop(state);
        if let Some(link) = link {
            link.shutdown();
        }
        why
    }

    /// A connection with a peer that is the one that it should be, put in place.
    fn dial(&self) -> Result<Arc<Line>, PeerError> {
        let config = &self.config;
        let wire = self.connect.connect(config.reconnect.patience);
        let wire = wire.map_err(PeerError::Connect)?;
        let link = Link::new(wire, config.beat, config.silence)?;
        let greeting = Greeting {
            flags: if cfg!(feature = "zstd") {
                COMPRESSED
            } else {
                0
            },
            window: 0,
            beat: u32::try_from(config.beat.as_millis()).unwrap_or(u32::MAX),
            image: 0,
        };
        let theirs = link
            .greet(greeting)
            .and_then(|()| link.greeted(&mut || Ok(())));
        let theirs = theirs.inspect_err(|_| link.shutdown())?;
        let mut state = self.lock();
        let expected = *state.image.get_or_insert(theirs.image);
        let refused = if expected != theirs.image {
            Some(PeerError::Image {
                theirs: theirs.image,
                expected,
            })
        } else if theirs.window == 0 {
            Some(PeerError::Window { window: 0 })
        } else {
            state.over.is_some().then_some(PeerError::Ended)
        };
        if let Some(refused) = refused {
            link.shutdown();
            return Err(refused);
        }
        let link = Arc::new(link);
        state.link = Some(Arc::clone(&link));
        state
            .calls
            .connected(theirs.window.min(config.window.max(1)));
        state.stats.connections += 1;
        Ok(link)
    }

    /// The reader's life: reads what comes, and makes the connection again, until it is over.
    fn keep(&self, mut link: Arc<Line>) {
        let mut failures = 0;
        loop {
            self.pump();
            let begun = Instant::now();
            let before = self.lock().stats;
            let why = match self.read(&link) {
                Ok(()) => PeerError::Closed,
                Err(why) => why,
            };
            link.shutdown();
            if !why.is_transient() {
                self.refuse(why);
                return;
            }
            let mut state = self.lock();
            state.link = None;
            let (tries, why) = (self.config.tries.max(1), Arc::new(why));
            state.calls.broken(tries, &why);
            self.answered.notify_all();
            // One that answered nothing, and did not live for long either, is as none.
            let lived = state.stats.beats > before.beats && begun.elapsed() > self.config.silence;
            let good = state.stats.answers > before.answers || lived;
            drop(state);
            failures = if good { 0 } else { failures + 1 };
            match self.dial_again(&mut failures, why) {
                Some(again) => link = again,
                None => return,
            }
        }
    }

    /// Connects, as often as the limits let; none if it is over.
    fn dial_again(&self, failures: &mut u32, mut why: Arc<PeerError>) -> Option<Arc<Line>> {
        let limits = &self.config.reconnect;
        loop {
            let mut state = self.lock();
            if *failures >= limits.tries.max(1) {
                // Given up: until someone asks again.
                state.calls.fail_all(&why);
                self.answered.notify_all();
                while state.over.is_none() && !state.calls.is_waiting() {
                    let waited = self.wanted.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                }
                *failures = 0;
            }
            let end = Instant::now().checked_add(backoff(limits, *failures));
            while state.over.is_none() {
                let left = end.map(|end| end.saturating_duration_since(Instant::now()));
                let Some(left) = left.filter(|left| !left.is_zero()) else {
                    break;
                };
                let waited = self.wanted.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            if state.over.is_some() {
                return None;
            }
            state.dialling = true;
            drop(state);
            let dialled = self.dial();
            self.lock().dialling = false;
            match dialled {
                Ok(link) => return Some(link),
                Err(error) if error.is_transient() => {
                    *failures += 1;
                    why = Arc::new(error);
                }
                Err(error) => {
                    self.refuse(error);
                    return None;
                }
            }
        }
    }

    /// Reads from a connection to its end.
    fn read(&self, link: &Line) -> Result<(), PeerError> {
        let mut since = Instant::now();
        loop {
            let mut body = self.lock().calls.spare();
            let allow = |head: &Head| match head.kind {
                Kind::Pages { .. } | Kind::Failed(_) => self.lock().calls.expects(head),
                Kind::Beat => Ok(()),
                Kind::Ask(_) => Err(head.unwanted()),
            };
            let mut meanwhile = || {
                self.lock().calls.overdue(self.config.answer)?;
                link.beat()
            };
            let Some(head) = link.next(&mut body, since, allow, &mut meanwhile)? else {
                return Ok(());
            };
            since = Instant::now();
            let mut state = self.lock();
            if head.kind == Kind::Beat {
                state.stats.beats += 1;
                state.calls.recycle(body);
                drop(state);
                // A peer that says much and answers nothing is found as one that says nothing is.
                meanwhile()?;
                continue;
            }
            state.stats.answers += 1;
            state.stats.bytes += u64::from(head.len);
            state.calls.answered(&head, body)?;
            let more = state.calls.may_send();
            self.answered.notify_all();
            drop(state);
            if more {
                self.pump();
            }
        }
    }
}

fn backoff(limits: &Reconnect, failures: u32) -> Duration {
    if failures == 0 {
        return Duration::ZERO;
    }
    let doubled = 1u32.checked_shl(failures - 1).unwrap_or(u32::MAX);
    let backoff = limits.backoff.saturating_mul(doubled);
    backoff.min(limits.longest_backoff)
}

impl Drop for PeerSource {
    /// Ends it. Its thread is waited for, unless it is making a connection: then it ends with that.
    fn drop(&mut self) {
        self.close();
        if let Some(reader) = self.reader.take().filter(|_| !self.shared.lock().dialling) {
            // It does not panic; if it did, there is nothing left of it.
            let _ = reader.join();
        }
    }
}

impl fmt::Debug for PeerSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.lock();
        f.debug_struct("PeerSource")
            .field("connected", &state.link.is_some())
            .field("waiting", &state.calls.in_line())
            .field("image", &state.image)
            .field("over", &state.over)
            .field("stats", &state.stats)
            .finish_non_exhaustive()
    }
}
