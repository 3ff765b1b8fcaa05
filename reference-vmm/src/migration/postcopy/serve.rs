// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The source's side: memory that stands still, served to who has the guest.
//!
//! ```text
//!   dial ──► Pages(number) ──► Known, Proof ──► Wanted ──► served ──► closed ──► dial …
//!     ▲          │                                            └ broke ─┐           ├──► Enough: over
//!     └── a second later, or on another way ◄──────────────────────────┘           └──► refused where it was, on all: gone
//! ```
//!
//! One thread a connection. A connection that ends says nothing of why: the next one does.

#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_pf::peer::{PageServer, ServerConfig};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::Gfn;

use super::LastWord;
use crate::migration::codec::{Compression, PAGE};
use crate::migration::limit::Limiter;
use crate::migration::link::{Connect, TICK, Watch, Wire, receive, send};
use crate::migration::message::{Message, MigrationId, Role, Side};
use crate::migration::proof::{image, introduce};
use crate::migration::source::Patience;
use crate::text::printable;

/// What nobody waits for is sent when nobody has waited for something for so long; or when it has stood back for so long:
/// beside a guest that never ceases to wait some 50 MiB a second go all the same.
const QUIET: Duration = Duration::from_millis(2);
const STANDS_BACK: Duration = Duration::from_millis(10);

/// Behind a connection that was closed, before the next one asks why.
const SOON: Duration = Duration::from_millis(20);

/// Pages that were served, so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Those that somebody waited for, and their neighbours.
    pub demand: u64,
    /// Those that nobody waited for.
    pub bulk: u64,
    /// Of both, those that were nothing but zeros, of which only that is told.
    pub zero: u64,
    /// Bytes of both, but for those of pieces that were nothing but zeros.
    pub bytes: u64,
}

/// Where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Pages may be asked for, on all connections.
    Connected,
    /// There is no connection, for this reason: it is tried again and again.
    Broken(String),
    /// No more will be asked for.
    Enough(LastWord),
    /// Who has the guest is gone, and nobody will ask.
    Gone(String),
}

/// Guest memory as it was at the switch, counted.
struct Counted {
    pages: Arc<dyn PageSource>,
    limit: Arc<Limiter>,
    /// Relaxed: counts, and a flag that nothing else is told by.
    lanes: [AtomicU64; 2],
    bytes: AtomicU64,
    stop: AtomicU64,
    begun: Instant,
    /// When somebody waited last, in microseconds from the beginning on.
    waited: AtomicU64,
}

impl Counted {
    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Has its turn when nobody waits, or soon.
    fn stand_back(&self) {
        let until = Instant::now() + STANDS_BACK;
        let quiet = QUIET.as_micros() as u64;
        while self.stop.load(Ordering::Relaxed) == 0
            && self.now() < self.waited.load(Ordering::Relaxed).saturating_add(quiet)
            && Instant::now() < until
        {
            std::thread::sleep(QUIET / 2);
        }
    }
}

impl PageSource for Counted {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        match lane {
            Lane::Fault => self.waited.store(self.now(), Ordering::Relaxed),
            _ => self.stand_back(),
        }
        let fetched = self.pages.fetch_for(lane, first, into)?;
        if fetched == Fetched::Bytes {
            let mut left = if lane == Lane::Prefetch {
                into.len()
            } else {
                0
            };
            while left > 0 && self.stop.load(Ordering::Relaxed) == 0 {
                match self.limit.wait(left, TICK) {
                    Ok(let_pass) => left -= let_pass.unwrap_or(0).min(left),
                    Err(source) => {
                        let source = Box::new(source);
                        return Err(SourceError::Other {
                            gfn: first,
                            transient: true,
                            source,
                        });
                    }
                }
            }
            let bytes = into.len() as u64;
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        let [fault, prefetch] = &self.lanes;
        let of = if lane == Lane::Fault { fault } else { prefetch };
        of.fetch_add((into.len() / PAGE) as u64, Ordering::Relaxed);
        Ok(fetched)
    }
}

/// A connection, or none.
struct Line {
    /// Why there is none.
    broken: Option<String>,
    /// Since when each try was refused where the destination was.
    refused: Option<Instant>,
    wire: Option<Arc<dyn async_pf::peer::Wire>>,
}

struct State {
    /// By their numbers.
    lines: Vec<Line>,
    /// Which way they go ([`Connect::way`]).
    way: u64,
    enough: Option<LastWord>,
    gone: Option<String>,
    stop: bool,
}

/// Serves the memory of a guest that stands still, until the destination has all.
pub(in crate::migration) struct Serving<'a, C> {
    connect: &'a C,
    id: MigrationId,
    patience: Patience,
    /// The line to the destination, if nobody stands between.
    direct: &'a OnceLock<String>,
    counted: Arc<Counted>,
    server: PageServer,
    state: Mutex<State>,
    /// Of the state.
    changed: Condvar,
}

/// What a connection came to.
enum Came {
    Enough,
    Gone(String),
    /// Nobody listens in the destination's place.
    Refused(String),
    /// It was closed, and the next one says why.
    Closed,
    Broke(String),
}

impl Default for Line {
    fn default() -> Self {
        Line {
            broken: Some(String::new()),
            refused: None,
            wire: None,
        }
    }
}

impl<'a, C: Connect> Serving<'a, C> {
    /// With as many connections for what nobody waits for as `bulk` says, and at least one.
    pub(in crate::migration) fn new(
        (connect, direct): (&'a C, &'a OnceLock<String>),
        id: MigrationId,
        (patience, bulk): (Patience, u32),
        pages: Arc<dyn PageSource>,
        (compression, limit): (Compression, Arc<Limiter>),
    ) -> Self {
        let counted = Arc::new(Counted {
            pages,
            limit,
            lanes: Default::default(),
            bytes: AtomicU64::new(0),
            stop: AtomicU64::new(0),
            begun: Instant::now(),
            waited: AtomicU64::new(0),
        });
        let config = ServerConfig {
            image: image(id),
            compress: match compression {
                Compression::None => None,
                Compression::Zstd { level } => Some(level),
            },
            ..ServerConfig::default()
        };
        Serving {
            connect,
            id,
            patience,
            direct,
            server: PageServer::new(Arc::clone(&counted) as _, config),
            counted,
            state: Mutex::new(State {
                lines: (0..=bulk.max(1)).map(|_| Line::default()).collect(),
                way: connect.way(),
                enough: None,
                gone: None,
                stop: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// What has been served.
    pub(in crate::migration) fn served(&self) -> Served {
        let [fault, prefetch] = &self.counted.lanes;
        // Before those of which they are a part, which are counted first.
        let zero = self.server.served().zeros;
        Served {
            zero,
            demand: fault.load(Ordering::Relaxed),
            bulk: prefetch.load(Ordering::Relaxed),
            bytes: self.counted.bytes.load(Ordering::Relaxed),
        }
    }

    /// Where it is, if that is as `wanted` within `limit`; else where it is then.
    pub(in crate::migration) fn wait(
        &self,
        limit: Duration,
        wanted: impl Fn(&Standing) -> bool,
    ) -> Standing {
        let not_yet = |state: &mut State| !wanted(&state.standing());
        let waited = self.changed.wait_timeout_while(self.lock(), limit, not_yet);
        waited.unwrap_or_else(PoisonError::into_inner).0.standing()
    }

    /// Nobody is served any more: the guest goes on here.
    pub(in crate::migration) fn stop(&self) {
        self.counted.stop.store(1, Ordering::Relaxed);
        self.change(|state| state.stop = true);
        self.server.stop();
    }

    /// The numbers of its connections.
    pub(in crate::migration) fn numbers(&self) -> std::ops::Range<u32> {
        0..self.lock().lines.len() as u32
    }

    /// If connections are to go another way than those that there are, those are closed, and new ones made at once. Nothing is
    /// lost by that: what was asked for and not answered is asked for again.
    pub(in crate::migration) fn follow(&self) {
        let way = self.connect.way();
        let mut state = self.lock();
        if std::mem::replace(&mut state.way, way) == way {
            return;
        }
        for line in &mut state.lines {
            line.refused = None;
            if let Some(wire) = line.wire.take() {
                wire.shutdown();
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A connection's life, and that of those behind it. Returns when it is over, one way or another.
    pub(in crate::migration) fn run(&self, number: u32) {
        while !self.lock().is_over() {
            let way = self.lock().way;
            let pause = match self.once(number) {
                // The others need not ask.
                Came::Enough => return self.stop(),
                Came::Gone(why) => {
                    self.change(|state| {
                        if state.enough.is_none() {
                            state.gone.get_or_insert(why);
                        }
                    });
                    return self.stop();
                }
                Came::Refused(why) => {
                    let limit = match self.connect.is_refusal_proof() {
                        true => Duration::ZERO,
                        false => self.patience.refused,
                    };
                    self.change(|state| {
                        state.stands(number, Some(why), Some(Instant::now()));
                        // The others are refused as well, or it lives.
                        let since = state.lines.iter().map(|line| line.refused);
                        let all = since.collect::<Option<Vec<_>>>();
                        let last = all.and_then(|all| all.into_iter().max());
                        if last.is_some_and(|at| at.elapsed() >= limit) && state.enough.is_none() {
                            let why = "nobody listens there any more".to_owned();
                            state.gone.get_or_insert(why);
                        }
                    });
                    self.patience.again
                }
                Came::Closed => SOON,
                Came::Broke(why) => {
                    self.change(|state| state.stands(number, Some(why), None));
                    self.patience.again
                }
            };
            let on = |state: &mut State| !state.is_over() && state.way == way;
            let waited = self.changed.wait_timeout_while(self.lock(), pause, on);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn is_direct(&self) -> bool {
        let line = self.direct.get();
        line.is_some_and(|line| self.connect.is_still(line))
    }

    /// One connection, from its beginning to its end.
    fn once(&self, number: u32) -> Came {
        let way = self.lock().way;
        let stop = || {
            let state = self.lock();
            let over = state.is_over().then(|| "it is over".to_owned());
            over.or_else(|| (state.way != way).then(|| "another way is gone".to_owned()))
        };
        let watch = Watch {
            quiet: self.patience.ask,
            stop: &stop,
        };
        let mut wire = match self.connect.connect(self.patience.ask) {
            Ok(wire) => wire,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && self.is_direct() => {
                return Came::Refused(error.to_string());
            }
            Err(error) => return Came::Broke(error.to_string()),
        };
        let said = match introduce(&mut wire, self.id, Role::Pages(number), &watch) {
            Ok(true) => receive(&mut wire, Side::Destination, &watch),
            Ok(false) if self.is_direct() => {
                return Came::Gone("another one listens there now".into());
            }
            Ok(false) => return Came::Broke(OTHER.into()),
            Err(error) => Err(error),
        };
        match said {
            Ok(Message::Wanted) => {}
            Ok(Message::Enough(mut word)) => {
                word.why = printable(&word.why);
                // Before the destination hears it and listens no more, which the other lane would take for its end. Not heard,
                // it goes on answering.
                self.change(|state| state.enough = Some(word));
                let quiet = self.patience.ask;
                let _ = send(
                    &mut wire,
                    &Message::Done,
                    &Watch {
                        quiet,
                        stop: &|| None,
                    },
                );
                return Came::Enough;
            }
            Ok(other) => return Came::Broke(format!("it answers {:?}", other.kind())),
            Err(error) => return Came::Broke(error.to_string()),
        }
        let wire: Arc<dyn async_pf::peer::Wire> = match wire.duplex() {
            Ok(wire) => Arc::from(wire),
            Err(error) => return Came::Broke(error.to_string()),
        };
        let mut state = self.lock();
        // Whoever finds another way from here on closes this connection.
        if state.way != way {
            return Came::Closed;
        }
        state.stands(number, None, None);
        if let Some(line) = state.lines.get_mut(number as usize) {
            line.wire = Some(Arc::clone(&wire));
        }
        drop(state);
        self.changed.notify_all();
        let served = self.server.serve(&*wire);
        if let Some(line) = self.lock().lines.get_mut(number as usize) {
            line.wire = None;
        }
        match served {
            Ok(_) => Came::Closed,
            Err(error) => Came::Broke(error.to_string()),
        }
    }
}

/// Why nobody is served who has not proven to be the migration's destination.
const OTHER: &str =
    "who listens there is not the monitor that the guest has gone to, and gets nothing";

impl State {
    /// A connection is broken for that reason, or not; and was refused now, or not.
    fn stands(&mut self, number: u32, broken: Option<String>, refused: Option<Instant>) {
        if let Some(line) = self.lines.get_mut(number as usize) {
            line.broken = broken;
            line.refused = refused.map(|now| line.refused.unwrap_or(now));
        }
    }

    fn is_over(&self) -> bool {
        self.stop || self.enough.is_some() || self.gone.is_some()
    }

    fn standing(&self) -> Standing {
        let mut broken = self.lines.iter().filter_map(|line| line.broken.as_ref());
        match (&self.enough, &self.gone) {
            (Some(word), _) => Standing::Enough(word.clone()),
            (_, Some(why)) => Standing::Gone(why.clone()),
            _ => match broken.next() {
                Some(why) => Standing::Broken(why.clone()),
                None => Standing::Connected,
            },
        }
    }
}
