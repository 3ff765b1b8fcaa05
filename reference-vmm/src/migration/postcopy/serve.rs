// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The source's side: memory that stands still, served to who has the guest.
//!
//! ```text
//!   dial ──► Pages(lane) ──► Wanted ──► served ──► closed ──► dial …
//!     ▲          │                         └ broke ─┐           ├──► Enough: over
//!     └── a second later ◄──────────────────────────┘           └──► refused where it was, on both lanes: gone
//! ```
//!
//! One thread a lane. A connection that ends says nothing of why: the next one does.

#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_pf::peer::{PageServer, ServerConfig};
use async_pf::{Fetched, Lane, PageSource, SourceError};
use memslots::Gfn;

use super::LastWord;
use super::ask::{LANES, image};
use crate::migration::codec::{Compression, PAGE};
use crate::migration::limit::Limiter;
use crate::migration::link::{Connect, TICK, Watch, Wire, greet, receive, send};
use crate::migration::message::{Ending, Greeting, Message, MigrationId, Role, Side};
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
    /// Bytes of both, but for those of pieces that were nothing but zeros.
    pub bytes: u64,
}

/// Where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Pages may be asked for, on both lanes.
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
            Lane::Prefetch => self.stand_back(),
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

struct State {
    /// Why a lane has no connection; none where it has one.
    broken: [Option<String>; 2],
    /// Since when each try of a lane was refused where the destination was.
    refused: [Option<Instant>; 2],
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

impl<'a, C: Connect> Serving<'a, C> {
    pub(in crate::migration) fn new(
        (connect, direct): (&'a C, &'a OnceLock<String>),
        id: MigrationId,
        patience: Patience,
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
                broken: [const { Some(String::new()) }; 2],
                refused: [None; 2],
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
        Served {
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

    /// A lane's life. Returns when it is over, one way or another.
    pub(in crate::migration) fn run(&self, lane: Lane) {
        let connected = || self.change(|state| state.stands(lane, None, None));
        while !self.lock().is_over() {
            let pause = match self.once(lane, &connected) {
                // The other lane need not ask.
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
                        state.stands(lane, Some(why), Some(Instant::now()));
                        // The other lane is refused as well, or it lives.
                        let since = state.refused.map(|since| since.map(|at| at.elapsed()));
                        if let [Some(one), Some(other)] = since
                            && one.min(other) >= limit
                            && state.enough.is_none()
                        {
                            let why = "nobody listens there any more".to_owned();
                            state.gone.get_or_insert(why);
                        }
                    });
                    self.patience.again
                }
                Came::Closed => SOON,
                Came::Broke(why) => {
                    self.change(|state| state.stands(lane, Some(why), None));
                    self.patience.again
                }
            };
            let on = |state: &mut State| !state.is_over();
            let waited = self.changed.wait_timeout_while(self.lock(), pause, on);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn is_direct(&self) -> bool {
        let line = self.direct.get();
        line.is_some_and(|line| self.connect.is_still(line))
    }

    /// One connection, from its beginning to its end.
    fn once(&self, lane: Lane, connected: &dyn Fn()) -> Came {
        let stop = || self.lock().is_over().then(|| "it is over".to_owned());
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
        let (id, role) = (self.id, Role::Pages(lane));
        let greeted = greet(&mut wire, &Greeting { id, role }, &watch);
        let said = greeted.and_then(|()| receive(&mut wire, Side::Destination, &watch));
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
            Ok(Message::Settled(Ending::Unknown)) if self.is_direct() => {
                return Came::Gone("another one listens there now".into());
            }
            Ok(other) => return Came::Broke(format!("it answers {:?}", other.kind())),
            Err(error) => return Came::Broke(error.to_string()),
        }
        let wire = match wire.duplex() {
            Ok(wire) => wire,
            Err(error) => return Came::Broke(error.to_string()),
        };
        connected();
        match self.server.serve(&*wire) {
            Ok(_) => Came::Closed,
            Err(error) => Came::Broke(error.to_string()),
        }
    }
}

impl State {
    /// A lane's connection is broken for that reason, or not; and was refused now, or not.
    fn stands(&mut self, lane: Lane, broken: Option<String>, refused: Option<Instant>) {
        let places = self.broken.iter_mut().zip(&mut self.refused);
        let at = LANES.into_iter().zip(places).find(|(of, _)| *of == lane);
        if let Some((_, (why, since))) = at {
            *why = broken;
            *since = refused.map(|now| since.unwrap_or(now));
        }
    }

    fn is_over(&self) -> bool {
        self.stop || self.enough.is_some() || self.gone.is_some()
    }

    fn standing(&self) -> Standing {
        match (&self.enough, &self.gone) {
            (Some(word), _) => Standing::Enough(word.clone()),
            (_, Some(why)) => Standing::Gone(why.clone()),
            _ => match self.broken.iter().flatten().next() {
                Some(why) => Standing::Broken(why.clone()),
                None => Standing::Connected,
            },
        }
    }
}
