// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The destination's side of a migration: [`receive`], from the first connection to a guest that runs.
//!
//! ```text
//!   acceptor ── control ──► receive ── Offer, Round, State, Go ──► machine
//!      │                       ▲ marks
//!      ├───── data ──► taker ──┘ one for each data connection: pages into memory
//!      ├───── pages ─► PostCopySource ──► a pager: what comes later (postcopy)
//!      └───── settle ──► the decision: undecided ──► started | never
//! ```
//!
//! What is decided once, under one lock, is whether the guest starts here ([`Decision`]): the word that starts it and the
//! question that forbids it race for that, and whichever comes first has it. [`mod`](super) has the conversation.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::callers::{Callers, Place, Silent};
use super::codec::{DecodeError, Decoder, Frame, Sink};
use super::guest::{ArrivingMemory, Blank, DestinationGuest, Prepared, Refusal};
use super::link::{
    Accept, Duplex, LinkError, Patient, TICK, Watch, Wire, greeted, receive as hear_from,
    receive_now, send,
};
use super::message::{Ending, Greeting, Message, MigrationId, Role, Side};
use super::postcopy::LastWord;
use super::postcopy::ask::{Later, Next, PostCopySource};
use super::postcopy::missing::{MOST_ALL, Missing};
use super::proof::{is_same, recognise};
use super::sender::LAST;

/// How long is waited for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For who has connected to say all of what for.
    pub greeting: Duration,
    /// For a sign of life, on any connection; and for all of the source's offer.
    pub quiet: Duration,
    /// For the source to say that the guest is not its own any more, or to ask.
    pub word: Duration,
    /// For the source to make a connection for pages again that broke, as long as the guest has not started. Behind that it is
    /// waited for as long as whoever touches a page waits.
    pub pages: Duration,
    /// For the source to ask, when it can only be told that the guest has not started. Not where it has heard so, and for a
    /// second only in a process that is to end.
    pub asked: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            greeting: Duration::from_secs(2),
            quiet: Duration::from_secs(60),
            word: Duration::from_secs(60),
            pages: Duration::from_secs(5),
            asked: Duration::from_secs(20),
        }
    }
}

/// Who has said nothing for so long makes room on a host that is out of descriptors: a source says at once what for.
const SILENT: Duration = Duration::from_millis(500);

/// Between two tries to accept connections.
const AGAIN: Duration = Duration::from_secs(1);

/// For the source to ask a process that is to end: it does so right behind the connection's end.
const STOPPED: Duration = Duration::from_secs(1);

/// Why there is no guest here. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// There is no thread to accept connections.
    #[error("cannot accept connections: {0}")]
    Accept(#[source] io::Error),
    /// It is not waited for any more.
    #[error("{0}")]
    Stopped(String),
    /// Such a machine cannot be here.
    #[error("the guest cannot be here: {0}")]
    Refused(Refusal),
    /// The conversation broke off.
    #[error("{doing}: {source}")]
    Link {
        /// At what.
        doing: &'static str,
        /// Why.
        source: LinkError,
    },
    /// The source gave up.
    #[error("the source gave up: {0}")]
    GivenUp(String),
    /// Memory did not come.
    #[error("guest memory did not arrive: {0}")]
    Pages(String),
    /// The source took the guest back before it was told that it has gone.
    #[error("the guest was handed over and taken back: it runs where it came from")]
    TakenBack,
    /// It was the destination's, and could not be started: it is lost.
    #[error("the guest was handed over, and does not start: {0}")]
    Lost(Refusal),
}

/// Whether the guest starts here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Decision {
    /// Nobody has said so yet.
    #[default]
    Undecided,
    /// It does. The source has no guest any more.
    Started,
    /// It never will.
    Never,
}

/// A connection for pages.
#[derive(Default)]
struct ForPages {
    /// The newest, which nobody has taken yet.
    next: Option<Duplex>,
    /// And the newest, taken or not.
    newest: Option<Arc<dyn async_pf::peer::Wire>>,
    /// Since when one is waited for.
    waits: Option<Instant>,
    /// When something came last on the one before, while another is waited for.
    heard: Option<Instant>,
}

impl ForPages {
    /// Since when nothing was heard of the source, if another connection is waited for.
    fn quiet_since(&self) -> Option<Instant> {
        let waits = self.waits?;
        Some(self.heard.map_or(waits, |heard| heard.min(waits)))
    }
}

#[derive(Default)]
struct State<W> {
    /// The migration that is under way.
    id: Option<MigrationId>,
    control: Option<W>,
    /// Numbers of data connections that are to come, and those that have.
    due: Vec<u32>,
    data: Vec<(u32, W)>,
    /// Of each data connection the rounds of which it has all.
    marks: Vec<u32>,
    /// When something came last.
    life: Option<Instant>,
    failed: Option<String>,
    decision: Decision,
    /// Nothing of a guest is held here.
    released: bool,
    /// The source knows how it ended.
    told: bool,
    /// The guest came before its memory: pages are asked for.
    asks: bool,
    /// Where they are asked for, when there is such.
    asked: Weak<PostCopySource>,
    /// Connections for pages: what somebody waits for first, and what nobody does behind it.
    pages: Vec<ForPages>,
    /// No more pages are asked for, and what is to be said of that.
    enough: Option<LastWord>,
    /// The source knows that.
    told_enough: bool,
    /// The acceptor is to end.
    over: bool,
}

impl<W> State<W> {
    /// The source knows how it ended.
    fn is_told(&mut self) {
        self.told = true;
        self.see_it_over();
    }

    /// Of a guest that has started the source asks nothing more when it knows that, and needs no memory of its any more. One
    /// alone is not enough: who is no longer heard looks as if nobody were here, and the guest would be taken back.
    fn see_it_over(&mut self) {
        let all = self.told && (self.told_enough || !self.asks);
        self.over |= all && self.decision == Decision::Started;
    }

    /// The source has been away for as long as it would be waited for: it does not hear a last word. One that was there until
    /// a moment ago connects again within a second, and one that has connected need not have been noticed yet.
    fn is_cut_off(&self, patience: Duration) -> bool {
        let away = |pages: &ForPages| {
            let since = pages.waits.filter(|_| pages.next.is_none());
            since.is_some_and(|since| since.elapsed() >= patience)
        };
        self.pages.iter().any(away)
    }
}

struct Shared<W> {
    state: Mutex<State<W>>,
    changed: Condvar,
}

impl<W: Wire> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State<W>) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_all();
        changed
    }

    /// Waits until `ready` has something, up to `patience`.
    fn wait<T>(
        &self,
        patience: Duration,
        mut ready: impl FnMut(&mut State<W>) -> Option<T>,
    ) -> Option<T> {
        let until = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&mut state) {
                return Some(found);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Decides, unless that has been done; what holds. Where the guest never starts, nobody waits for a page of its.
    fn decide(&self, decision: Decision) -> Decision {
        let (decision, asked) = self.change(|state| {
            if state.decision == Decision::Undecided {
                state.decision = decision;
            }
            (state.decision, state.asked.upgrade())
        });
        if let (Decision::Never, Some(asked)) = (decision, asked) {
            asked.close();
        }
        decision
    }

    /// The next connection for pages of that number; on the one before something came last at `heard`.
    fn next_for_pages(
        &self,
        number: u32,
        heard: Option<Instant>,
        patience: Duration,
    ) -> Option<Duplex> {
        let at = number as usize;
        self.change(|state| {
            if let Some(pages) = state.pages.get_mut(at) {
                pages.waits.get_or_insert_with(Instant::now);
                pages.heard = pages.heard.or(heard);
            }
        });
        self.wait(patience, |state| {
            let pages = state.pages.get_mut(at)?;
            let wire = pages.next.take()?;
            (pages.waits, pages.heard) = (None, None);
            Some(wire)
        })
    }

    /// Whether nobody comes to serve pages any more: a guest that has not started is the source's, which has taken it back,
    /// or is gone for as long as `limit`.
    fn is_in_vain(&self, limit: Duration) -> bool {
        let state = self.lock();
        match state.decision {
            Decision::Started => false,
            Decision::Never => true,
            Decision::Undecided => {
                let mut waits = state.pages.iter().filter_map(|pages| pages.waits);
                waits.any(|since| since.elapsed() >= limit)
            }
        }
    }

    /// Nothing of a guest is here any more, and what the source asks from here on has this answer; what was decided.
    fn release(&self) -> Decision {
        let decision = self.decide(Decision::Never);
        self.change(|state| state.released = true);
        decision
    }
}

/// A guest that came.
pub struct Arrived<R> {
    /// It runs.
    pub running: R,
    /// Which migration it was.
    pub id: MigrationId,
}

/// Waits for a guest, and has it go on here. `stop` says why that is not wanted any more, if so; it is asked a few times a
/// second, until the guest is this process's, or this returns.
///
/// Connections of who is no monitor are closed, and the wait goes on; the first that offers a guest is the one.
///
/// Behind a guest that runs a thread goes on accepting connections, until the source has heard that it does: it may have to
/// ask. If it never hears it the thread ends with the process.
///
/// # Errors
/// [`ReceiveError`].
pub fn receive<A, G>(
    accept: A,
    guest: G,
    patience: Patience,
    stop: &(dyn Fn() -> Option<String> + Sync),
) -> Result<Arrived<<<G::Blank as Blank>::Prepared as Prepared>::Running>, ReceiveError>
where
    A: Accept + 'static,
    A::Wire: 'static,
    G: DestinationGuest,
{
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            id: None,
            control: None,
            due: Vec::new(),
            data: Vec::new(),
            marks: Vec::new(),
            life: None,
            failed: None,
            decision: Decision::Undecided,
            released: false,
            told: false,
            asks: false,
            asked: Weak::new(),
            pages: Vec::new(),
            enough: None,
            told_enough: false,
            over: false,
        }),
        changed: Condvar::new(),
    });
    let acceptor = {
        let shared = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("incoming".into());
        let thread = builder.spawn(move || serve(&accept, &shared, &patience));
        thread.map_err(ReceiveError::Accept)?
    };
    let destination = Destination {
        shared: &shared,
        patience,
        stop,
    };
    let result = destination.run(guest);
    if result.is_err() {
        // Also where no source has come.
        shared.release();
        shared.change(|state| state.over = true);
        // It looks each tick, and has told by then who was asking.
        let _ = acceptor.join();
    }
    result
}

struct Destination<'a, W> {
    shared: &'a Arc<Shared<W>>,
    patience: Patience,
    stop: &'a (dyn Fn() -> Option<String> + Sync),
}

impl<W: Wire + 'static> Destination<'_, W> {
    fn run<G: DestinationGuest>(
        &self,
        guest: G,
    ) -> Result<Arrived<<<G::Blank as Blank>::Prepared as Prepared>::Running>, ReceiveError> {
        // 1. A source.
        let (id, mut control) = loop {
            if let Some(why) = (self.stop)() {
                return Err(ReceiveError::Stopped(why));
            }
            let came = self
                .shared
                .wait(TICK, |state| Some((state.id?, state.control.take()?)));
            if let Some(came) = came {
                break came;
            }
        };
        let mut handed = false;
        let result = self.converse(id, &mut control, guest, &mut handed);
        if let Err(error) = &result {
            // The machine is gone by now, and with it all that it held.
            let decision = self.shared.release();
            if !matches!(error, ReceiveError::GivenUp(_) | ReceiveError::Lost(_)) {
                let watch = Watch {
                    quiet: Duration::from_secs(1),
                    stop: &|| None,
                };
                let _ = send(&mut control, &Message::GivenUp(error.to_string()), &watch);
                if handed && decision == Decision::Never {
                    self.answer(&mut control);
                }
            }
        }
        let running = result?;
        let shared = Arc::clone(self.shared);
        let quiet = self.patience.word;
        let hear_it = move || {
            let watch = Watch {
                quiet,
                stop: &|| None,
            };
            // Anything else, and the source may ask.
            if let Ok(Message::Done) = hear(&mut control, &watch) {
                shared.change(State::is_told);
            }
        };
        let builder = std::thread::Builder::new().name("incoming".into());
        // Without it the acceptor goes on, which is as good.
        let _ = builder.spawn(hear_it);
        Ok(Arrived { running, id })
    }

    /// Stays for the source's question whether the guest is here, as long as it may have one: one that gives up itself, or
    /// has its answer, has none. A process that is to end stays for a moment only.
    fn answer(&self, control: &mut W) {
        let watch = Watch {
            quiet: STOPPED,
            stop: &|| None,
        };
        let mut until = Instant::now() + self.patience.asked;
        let mut hears = true;
        loop {
            let patience = if hears { Duration::ZERO } else { TICK };
            let told = |state: &mut State<W>| state.told.then_some(());
            if self.shared.wait(patience, told).is_some() {
                return;
            }
            if hears {
                match receive_now(control, Side::Source, &watch) {
                    Err(LinkError::GivenUp(_)) => return,
                    // What was said before it heard.
                    Ok(_) => {}
                    Err(_) => hears = false,
                }
            }
            let now = Instant::now();
            if (self.stop)().is_some() {
                until = until.min(now + STOPPED);
            }
            if now >= until {
                return;
            }
        }
    }

    /// `handed` becomes true when the source may have let go of the guest's disks.
    fn converse<G: DestinationGuest>(
        &self,
        id: MigrationId,
        control: &mut W,
        mut guest: G,
        handed: &mut bool,
    ) -> Result<<<G::Blank as Blank>::Prepared as Prepared>::Running, ReceiveError> {
        let patience = self.patience;
        let stop = || self.why_to_end();
        let watch = Watch {
            quiet: patience.quiet,
            stop: &stop,
        };
        let at = |doing| move |source| self.broke(doing, source);

        guest.is_from(control.from());

        // 2. Can it be here?
        let doing = "the source does not offer a guest";
        let offer = hear(control, &watch).map_err(at(doing))?;
        let (connections, postcopy, offered) = match offer {
            Message::Offer {
                connections,
                postcopy,
                state,
                ..
            } => (connections, postcopy, state),
            other => return Err(unexpected(doing, "Offer", &other)),
        };
        let blank = guest.offered(&offered).map_err(ReceiveError::Refused)?;
        drop(offered);
        if postcopy {
            let can = blank.can_come_later();
            can.map_err(|Refusal(why)| {
                let why = format!("{why}; or migrate without post-copy (--postcopy=never)");
                ReceiveError::Refused(Refusal(why))
            })?;
        }
        self.shared.change(|state| {
            state.due = (0..connections).collect();
            state.marks = vec![0; connections as usize];
            // As many carry what nobody waits for.
            state
                .pages
                .resize_with(1 + connections as usize, ForPages::default);
            state.life = Some(Instant::now());
        });
        let doing = "cannot answer the source";
        let ready = Message::Ready(control.line().unwrap_or_default());
        send(control, &ready, &watch).map_err(at(doing))?;

        // 3. Memory. Rounds are counted from 1 on here: 0 is none.
        let memory = blank.memory();
        // Relaxed: who misses it does a little more.
        let enough = AtomicBool::new(false);
        let state = std::thread::scope(|scope| {
            let mut takers = Vec::new();
            // When nearly all is there: what comes behind it is in the same places.
            let mut pre_fault = Some(|| {
                let work = || memory.pre_fault(&|| enough.load(Ordering::Relaxed));
                let builder = std::thread::Builder::new().name("incoming".into());
                // Without it the guest faults.
                let _ = builder.spawn_scoped(scope, work);
            });
            let whole = || pre_fault.take().map_or((), |start| start());
            let took = self.take_memory(
                id,
                connections,
                control,
                |number, mut wire| {
                    let (shared, memory) = (self.shared, &memory);
                    let stop = self.stop;
                    let taker = move || {
                        let taken = take(&mut wire, number, shared, memory, stop);
                        if let Err(why) = taken {
                            shared.change(|state| {
                                state.failed.get_or_insert(why);
                            });
                        }
                    };
                    let builder = std::thread::Builder::new().name("incoming".into());
                    takers.push(builder.spawn_scoped(scope, taker)?);
                    Ok(())
                },
                whole,
            );
            enough.store(true, Ordering::Relaxed);
            // The takers end now: they look each tick.
            self.shared.change(|state| {
                state
                    .failed
                    .get_or_insert_with(|| "the memory is whole".into());
            });
            took
        });
        drop(memory);
        let (state, missing) = state?;
        self.shared
            .change(|state| (state.failed, state.life) = (None, None));
        *handed = true;

        // 4. The machine.
        let prepared = match missing {
            None => blank.prepare(&state),
            Some(missing) if postcopy => {
                let later = self.later(id, missing, control)?;
                blank.prepare_later(&state, later)
            }
            Some(_) => Err(Refusal(
                "it comes before its memory, which was not offered".into(),
            )),
        };
        let prepared = prepared.map_err(ReceiveError::Refused)?;
        drop(state);
        let watch = Watch {
            quiet: patience.word,
            stop: &stop,
        };
        let said = send(control, &Message::Prepared, &watch).and_then(|()| hear(control, &watch));
        let doing = "the source does not say that the guest is not its own any more";
        match said {
            Ok(Message::Go) => {}
            Ok(other) => return Err(unexpected(doing, "Go", &other)),
            Err(source) => return Err(self.broke(doing, source)),
        }
        // While it is the source's still: a process that is to end does not take it along.
        if let Some(why) = (self.stop)() {
            return Err(ReceiveError::Stopped(why));
        }
        if self.shared.decide(Decision::Started) != Decision::Started {
            return Err(ReceiveError::TakenBack);
        }
        // Said before it runs: if this process is killed in between there is no guest that ran and is gone, of whose doings
        // the source would know nothing. Not heard, it is asked for.
        let watch = Watch {
            quiet: Duration::from_secs(1),
            stop: &|| None,
        };
        let _ = send(control, &Message::Started, &watch);
        prepared.start().map_err(ReceiveError::Lost)
    }

    /// What comes later, from connections that the source makes.
    fn later(
        &self,
        id: MigrationId,
        missing: Missing,
        control: &mut W,
    ) -> Result<Later, ReceiveError> {
        let shared = Arc::clone(self.shared);
        shared.change(|state| state.asks = true);
        let limit = self.patience.pages;
        let next: Arc<Next> = Arc::new(move |number, heard, patience| {
            let next = shared.next_for_pages(number, heard, patience);
            // Who waits for a page would wait for nothing, and hold what the source wants back.
            if next.is_none() && shared.is_in_vain(limit) {
                let asked = shared.lock().asked.upgrade();
                if let Some(asked) = asked {
                    asked.close();
                }
            }
            next
        });
        let stop = || self.why_to_end();
        let watch = Watch {
            quiet: Duration::MAX,
            stop: &stop,
        };
        // The source has nothing to say until it has an answer: that it gives up, or by its end that it is gone.
        let mut said = None;
        let go_on = || {
            said = match (stop(), receive_now(control, Side::Source, &watch)) {
                (None, Ok(None)) => return true,
                (Some(why), _) => Some(LinkError::Stopped(why)),
                (None, Err(why)) => Some(why),
                (None, Ok(Some(other))) => Some(LinkError::Unexpected {
                    said: other.kind(),
                    due: "a connection for pages",
                }),
            };
            false
        };
        let bulk = self.shared.lock().pages.len().saturating_sub(1);
        let patience = self.patience.quiet;
        let asked = PostCopySource::connect((id, bulk as u32), &next, patience, go_on);
        let source = asked.map(Arc::new);
        let doing = "the source does not connect for pages";
        let source = source.map_err(|why| match said {
            Some(said) => self.broke(doing, said),
            None => ReceiveError::Pages(why.to_string()),
        })?;
        let never = self.shared.change(|state| {
            state.asked = Arc::downgrade(&source);
            state.decision == Decision::Never
        });
        if never {
            source.close();
        }
        let (shared, of) = (Arc::clone(self.shared), Arc::clone(self.shared));
        let asks = Arc::clone(&source);
        Ok(Later {
            missing,
            source,
            waits: Arc::new(move || {
                let state = of.lock();
                let waits = state.pages.iter().filter_map(ForPages::quiet_since);
                waits.map(|since| since.elapsed()).max()
            }),
            enough: Box::new(move |word, patience| {
                // In this order: the source asks why the connections end.
                shared.change(|state| state.enough = Some(word));
                asks.close();
                // Where it is not to be reached it will not hear it.
                let told = |state: &mut State<W>| {
                    let heard = state.told_enough || state.is_cut_off(patience);
                    heard.then_some(())
                };
                shared.wait(patience, told);
            }),
        })
    }

    /// Hears of rounds and waits for their pages, until the state comes and all pages that it is of are there. `whole_round` is
    /// called behind each round that is answered.
    fn take_memory(
        &self,
        id: MigrationId,
        connections: u32,
        control: &mut W,
        mut spawn: impl FnMut(u32, W) -> io::Result<()>,
        mut whole_round: impl FnMut(),
    ) -> Result<(Vec<u8>, Option<Missing>), ReceiveError> {
        log::debug!("migration {id}: pages over {connections} connections");
        let stop = || self.why_to_end();
        let watch = Watch {
            quiet: Duration::MAX,
            stop: &stop,
        };
        let mut came = 0;
        // What does not come in rounds.
        let mut missing: Option<Missing> = None;
        // A round may be over, for the source, before all its connections are known here.
        let mut early = None;
        while came < connections {
            let next = self.shared.wait(TICK, |state| state.data.pop());
            match next {
                Some((number, wire)) => {
                    came += 1;
                    spawn(number, wire).map_err(|error| ReceiveError::Link {
                        doing: "cannot start a thread that takes pages",
                        source: error.into(),
                    })?;
                }
                None => {
                    self.go_on(control)?;
                    // The source has no more to say yet than that: that it gives up, or by its end that it is gone.
                    let doing = "the source does not connect again to send pages";
                    match receive_now(control, Side::Source, &watch) {
                        Ok(None) => {}
                        Ok(Some(Message::Missing(runs))) if early.is_none() => {
                            self.add(&mut missing, runs)?;
                        }
                        Ok(Some(round @ (Message::Round(_) | Message::State { .. })))
                            if early.is_none() =>
                        {
                            early = Some(round);
                        }
                        Ok(Some(other)) => return Err(unexpected(doing, "a connection", &other)),
                        Err(source) => return Err(self.broke(doing, source)),
                    }
                }
            }
        }
        loop {
            let doing = "the source has stopped sending";
            let message = match early.take().map_or_else(|| hear(control, &watch), Ok) {
                Ok(message) => message,
                Err(LinkError::Stopped(why)) => return Err(self.stopped(why, control)),
                Err(source) => return Err(self.broke(doing, source)),
            };
            let (round, state) = match message {
                Message::Round(round) => (round, None),
                Message::State { round, state } => (round, Some(state)),
                Message::Missing(runs) => {
                    self.add(&mut missing, runs)?;
                    continue;
                }
                other => return Err(unexpected(doing, "Round", &other)),
            };
            let whole = |state: &mut State<W>| {
                let done = state.marks.iter().all(|mark| *mark > round);
                done.then_some(())
            };
            while self.shared.wait(TICK, whole).is_none() {
                self.go_on(control)?;
            }
            match state {
                Some(state) => return Ok((state, missing)),
                None => {
                    let told = send(control, &Message::Taken(round), &watch);
                    told.map_err(|source| self.broke(doing, source))?;
                    whole_round();
                }
            }
        }
    }

    /// Takes a message's runs to those before: a list of pages is long, and as good a sign of life as pages are.
    fn add(
        &self,
        missing: &mut Option<Missing>,
        runs: Vec<Range<u64>>,
    ) -> Result<(), ReceiveError> {
        self.shared.lock().life = Some(Instant::now());
        add(missing, runs)
    }

    /// Why it is to end, if so.
    fn why_to_end(&self) -> Option<String> {
        if let Some(why) = (self.stop)() {
            return Some(why);
        }
        let state = self.shared.lock();
        if state.decision == Decision::Never {
            return Some("the source took the guest back".into());
        }
        if let Some(why) = &state.failed {
            return Some(why.clone());
        }
        let quiet = state.life.map(|life| life.elapsed());
        let quiet =
            quiet.filter(|quiet| *quiet >= self.patience.quiet && !state.marks.is_empty())?;
        // While pages are due something always comes.
        (!state.marks.is_empty()).then(|| {
            format!(
                "nothing has come from the source for {} seconds",
                quiet.as_secs()
            )
        })
    }

    fn go_on(&self, control: &mut W) -> Result<(), ReceiveError> {
        match self.why_to_end() {
            Some(why) => Err(self.stopped(why, control)),
            None => Ok(()),
        }
    }

    /// It ends for this reason; or for the one that the source gave, which closes all connections by that.
    fn stopped(&self, why: String, control: &mut W) -> ReceiveError {
        if let Some(why) = (self.stop)() {
            return ReceiveError::Stopped(why);
        }
        let until = Instant::now() + Duration::from_millis(200);
        let over = || (Instant::now() >= until).then(|| "it says no reason".to_owned());
        let watch = Watch {
            quiet: Duration::from_millis(200),
            stop: &over,
        };
        // Rounds may stand before it.
        loop {
            if over().is_some() {
                return ReceiveError::Pages(why);
            }
            match hear(control, &watch) {
                Ok(Message::Round(_)) => {}
                Err(LinkError::GivenUp(why)) => return ReceiveError::GivenUp(why),
                _ => return ReceiveError::Pages(why),
            }
        }
    }

    fn broke(&self, doing: &'static str, source: LinkError) -> ReceiveError {
        match source {
            _ if self.shared.lock().decision == Decision::Never => ReceiveError::TakenBack,
            LinkError::GivenUp(why) => ReceiveError::GivenUp(why),
            LinkError::Stopped(why) => ReceiveError::Stopped(why),
            source => ReceiveError::Link { doing, source },
        }
    }
}

/// Takes a message's runs to those before.
fn add(missing: &mut Option<Missing>, runs: Vec<Range<u64>>) -> Result<(), ReceiveError> {
    let missing = missing.get_or_insert_default();
    let added = missing.extend(runs);
    added.map_err(|why| {
        ReceiveError::Pages(format!("the source lists pages that are none: {why}"))
    })?;
    match missing.runs().len() {
        0..=MOST_ALL => Ok(()),
        runs => Err(ReceiveError::Pages(format!(
            "the source lists {runs} runs of pages that are to follow: {MOST_ALL} is the most"
        ))),
    }
}

fn hear(wire: &mut impl Wire, watch: &Watch<'_>) -> Result<Message, LinkError> {
    hear_from(wire, Side::Source, watch)
}

fn unexpected(doing: &'static str, due: &'static str, said: &Message) -> ReceiveError {
    let said = said.kind();
    let source = LinkError::Unexpected { said, due };
    ReceiveError::Link { doing, source }
}

/// Pages of one connection, into memory.
struct Into<'a, M, W> {
    memory: &'a M,
    shared: &'a Shared<W>,
}

impl<M: ArrivingMemory, W: Wire> Sink for Into<'_, M, W> {
    fn pages(&mut self, address: u64, contents: &[u8]) -> io::Result<()> {
        let put = self.memory.page(address, contents);
        put.map_err(io::Error::other)
    }

    fn lend(
        &mut self,
        runs: &[Range<u64>],
        fill: &mut dyn FnMut(&[VolatileSlice<'_>]),
    ) -> io::Result<bool> {
        let lent = self.memory.lend(runs, fill);
        lent.map_err(io::Error::other)
    }

    fn zeros(&mut self, address: u64, len: u64) -> io::Result<()> {
        let put = self.memory.zero(address, len);
        put.map_err(io::Error::other)
    }
}

/// Takes what comes on one data connection, until it ends or all is over; why it failed.
fn take<M: ArrivingMemory, W: Wire>(
    wire: &mut W,
    number: u32,
    shared: &Shared<W>,
    memory: &M,
    stop: &(dyn Fn() -> Option<String> + Sync),
) -> Result<(), String> {
    let ended = || {
        let state = shared.lock();
        match state.decision {
            Decision::Never => Some("the source took the guest back".into()),
            _ => state.failed.clone(),
        }
        .or_else(|| {
            drop(state);
            stop()
        })
    };
    // How long may be silent is for all connections together: one may have nothing to carry.
    let watch = Watch {
        quiet: Duration::MAX,
        stop: &ended,
    };
    let mut patient = Patient::new(wire, watch);
    let mut decoder = Decoder::new().map_err(|error| error.to_string())?;
    let mut sink = Into { memory, shared };
    loop {
        let frame = decoder.frame(&mut patient, &mut sink);
        let frame = match frame {
            Ok(frame) => frame,
            Err(_) if patient.stopped().is_some() => return Ok(()),
            Err(DecodeError::Connection(error)) => return Err(patient.why(error).to_string()),
            Err(error) => return Err(error.to_string()),
        };
        let end = sink.shared.change(|state| {
            state.life = Some(Instant::now());
            match frame {
                Frame::Pages => Ok(false),
                Frame::Mark(said) => {
                    let mark = state.marks.get_mut(number as usize);
                    let mark = mark.ok_or("a connection that there is not")?;
                    match u64::from(*mark) == said & !LAST {
                        true => *mark += 1,
                        false => return Err(format!("the mark {said} where {mark} was due")),
                    }
                    Ok(said & LAST != 0)
                }
                Frame::End => Err("the source has closed a connection".into()),
            }
        })?;
        if end {
            return Ok(());
        }
    }
}

/// Accepts connections, and has each its place, until all is over. Each is heard on a thread of its own: who says nothing keeps
/// nobody waiting, and makes room for others ([`Callers`]).
fn serve<A: Accept>(accept: &A, shared: &Shared<A::Wire>, patience: &Patience) {
    let callers = Callers::default();
    std::thread::scope(|scope| {
        accept_all(
            accept,
            shared,
            || callers.make_room(SILENT),
            |caller| {
                let entered = callers.enter(A::host(&caller), A::hang_up(&caller), AGAIN);
                // Nobody of those who were to go is gone: their connections are closed, so it is a matter of moments.
                let Some(place) = entered else {
                    return;
                };
                let meet = move || meet::<A>(caller, &place, shared, patience);
                let builder = std::thread::Builder::new().name("incoming".into());
                if let Err(error) = builder.spawn_scoped(scope, meet) {
                    log::warn!(
                        "a connection was closed, because there is no thread to hear it: {error}"
                    );
                }
            },
        );
    });
}

/// A host that is out of descriptors, or of memory, has some again when others have ended: it is said once, and tried again. Who
/// has been silent the longest makes `room` from the first time on: the source of a guest that is here already may be behind it.
/// (It is said also where nobody has come: the kernel looks for a descriptor before it looks for a connection.)
fn accept_all<A: Accept>(
    accept: &A,
    shared: &Shared<A::Wire>,
    room: impl Fn() -> Silent,
    mut came: impl FnMut(A::Caller),
) {
    // Since when it cannot, and nobody has made room.
    let mut deaf: Option<Instant> = None;
    while !shared.lock().over {
        match accept.accept() {
            // It can again.
            Ok(None) => deaf = None,
            Ok(Some(caller)) => {
                deaf = None;
                came(caller);
            }
            Err(error) => {
                if deaf.is_none() {
                    // Whoever has a guest here may have to ask: who is no longer heard for good looks as if nobody were here.
                    log::warn!("cannot accept connections, and tries again: {error}");
                }
                let silent = room();
                let now = Instant::now();
                let since = match silent {
                    Silent::Closed => *deaf.insert(now),
                    Silent::New | Silent::None => *deaf.get_or_insert(now),
                };
                // Who is no stranger has said by then what for.
                let hopeless = silent == Silent::None && now.duration_since(since) >= AGAIN;
                shared.change(|state| {
                    // The source waits, and would not know what for.
                    if hopeless && !state.due.is_empty() {
                        let why = format!("cannot accept the source's connections: {error}");
                        state.failed.get_or_insert(why);
                    }
                });
                // Whose connection was closed is gone in a moment, and who has come has said what for, or is silent.
                let pause = match silent {
                    Silent::Closed | Silent::New => TICK,
                    Silent::None => AGAIN,
                };
                shared.wait(pause, |state| state.over.then_some(()));
            }
        }
    }
}

/// Hears what somebody has connected for.
fn meet<A: Accept>(
    caller: A::Caller,
    place: &Place<'_>,
    shared: &Shared<A::Wire>,
    patience: &Patience,
) {
    let over = || shared.lock().over.then(|| "it is over".to_owned());
    let ended = || over().or_else(|| place.is_lost().then(|| "another has its place".to_owned()));
    let Some(mut wire) = A::answer(caller, &|| ended().is_some()) else {
        return;
    };
    place.is_known();
    let quiet = patience.greeting;
    let stranger = Watch {
        quiet,
        stop: &ended,
    };
    // Of the migration, nobody has its place any more.
    let watch = Watch { quiet, stop: &over };
    let said = greeted(&mut wire, &stranger);
    match said {
        Ok(greeting) => {
            let watches = [&stranger, &watch];
            hear_out(wire, greeting, place, shared, patience, watches);
        }
        // Many may be.
        Err(_) if place.is_lost() => {}
        Err(error) => {
            let waits = shared.lock().id.is_none();
            let still = if waits {
                ", and a guest is waited for still"
            } else {
                ""
            };
            log::warn!("a connection was closed{still}: {error}");
        }
    }
}

/// Hears what a connection is for. `watches`: until it is known to be one of the migration, and behind that.
fn hear_out<W: Wire>(
    mut wire: W,
    greeting: Greeting,
    place: &Place<'_>,
    shared: &Shared<W>,
    patience: &Patience,
    watches: [&Watch<'_>; 2],
) {
    let Greeting { id, role } = greeting;
    let [stranger, watch] = watches;
    let refused = match role {
        Role::Control => {
            let mut state = shared.lock();
            match state.id {
                None if state.decision == Decision::Undecided => {
                    if !place.is_heard() {
                        return;
                    }
                    (state.id, state.control) = (Some(id), Some(wire));
                    drop(state);
                    shared.changed.notify_all();
                    return;
                }
                _ => "another guest is coming here, or has come",
            }
        }
        Role::Data(number) => {
            let mut state = shared.lock();
            let due = state.due.iter().position(|due| *due == number);
            let is = state.id.is_some_and(|known| is_same(known, id));
            if let (true, Some(at)) = (is, due) {
                if !place.is_heard() {
                    return;
                }
                state.due.swap_remove(at);
                state.data.push((number, wire));
                drop(state);
                shared.changed.notify_all();
                return;
            }
            "this connection was not waited for"
        }
        Role::Settle | Role::Pages(_) => {
            let known = shared.lock().id;
            let Some(known) = known else {
                let unknown = Message::Settled(Ending::Unknown);
                let _ = send(&mut wire, &unknown, stranger);
                return;
            };
            match recognise(&mut wire, known, greeting, stranger) {
                Ok(true) if place.is_heard() => {}
                Ok(true) => return,
                Ok(false) => {
                    log::warn!("a connection was closed that does not prove to be the source's");
                    return;
                }
                // One of another migration goes without a word.
                Err(error) => {
                    log::debug!("a connection was closed that may be another migration's: {error}");
                    return;
                }
            }
            return match role {
                Role::Pages(number) => for_pages(wire, number, shared, watch),
                _ => settle(wire, shared, patience, watch),
            };
        }
    };
    let _ = send(&mut wire, &Message::GivenUp(refused.into()), stranger);
}

/// Says how it ended, which is decided now if it was not before.
fn settle<W: Wire>(mut wire: W, shared: &Shared<W>, patience: &Patience, watch: &Watch<'_>) {
    let ending = match shared.decide(Decision::Never) {
        Decision::Started => Ending::Started,
        Decision::Never | Decision::Undecided => {
            // The pledge is that nothing is held either.
            let released = |state: &mut State<W>| state.released.then_some(());
            match shared.wait(patience.quiet, released) {
                Some(()) => Ending::Never,
                // It will ask again.
                None => return,
            }
        }
    };
    let said = send(&mut wire, &Message::Settled(ending), watch);
    if let Ok(Message::Done) = said.and_then(|()| hear(&mut wire, watch)) {
        shared.change(State::is_told);
    }
}

/// A connection on which pages may be asked for; or the word that no more will be.
fn for_pages<W: Wire>(mut wire: W, number: u32, shared: &Shared<W>, watch: &Watch<'_>) {
    let (enough, never) = {
        let state = shared.lock();
        (state.enough.clone(), state.decision == Decision::Never)
    };
    let message = match enough {
        Some(word) => Message::Enough(word),
        // What is held here is another connection's to say.
        None if never => Message::GivenUp("the guest does not start here".into()),
        None => Message::Wanted,
    };
    if send(&mut wire, &message, watch).is_err() {
        return;
    }
    match message {
        Message::Enough(_) => {
            if let Ok(Message::Done) = hear(&mut wire, watch) {
                shared.change(|state| {
                    state.told_enough = true;
                    state.see_it_over();
                });
            }
        }
        Message::Wanted => match wire.duplex() {
            Ok(wire) => {
                let wire: Arc<dyn async_pf::peer::Wire> = Arc::from(wire);
                let before = shared.change(|state| {
                    // Nobody asks on it any more: the source comes again, and hears that.
                    if state.enough.is_some() {
                        return Some(wire);
                    }
                    let pages = state.pages.get_mut(number as usize)?;
                    pages.next = Some(Box::new(Arc::clone(&wire)));
                    pages.newest.replace(wire)
                });
                // The source makes a new one when that is of no use, of which nothing need be heard here.
                if let Some(before) = before {
                    before.shutdown();
                }
            }
            Err(error) => log::warn!("a connection for pages is of no use: {error}"),
        },
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::migration::pages::{ReadPages, WritePages};

    /// Nobody connects.
    #[derive(Default)]
    struct Nobody;

    impl Read for Nobody {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }
    }

    impl Write for Nobody {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl ReadPages for Nobody {}
    impl WritePages for Nobody {}
    impl Wire for Nobody {}

    /// Whether the host has a descriptor, each time; it is over behind the last.
    struct Host<'a>(Mutex<Vec<bool>>, &'a Shared<Nobody>);

    impl Accept for Host<'_> {
        type Wire = Nobody;
        type Caller = Nobody;

        fn accept(&self) -> io::Result<Option<Nobody>> {
            let mut has = self.0.lock().unwrap();
            let now = has.remove(0);
            if has.is_empty() {
                self.1.change(|state| state.over = true);
            }
            match now {
                true => Ok(None),
                false => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            }
        }

        fn answer(caller: Nobody, _: &dyn Fn() -> bool) -> Option<Nobody> {
            Some(caller)
        }
    }

    /// Nobody asks for more by the time that pages may be asked for over it.
    #[derive(Default)]
    struct Late(Option<(Arc<Shared<Late>>, UnixStream)>);

    impl Read for Late {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }
    }

    impl Write for Late {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl ReadPages for Late {}
    impl WritePages for Late {}

    impl Wire for Late {
        fn duplex(self) -> io::Result<Duplex> {
            let (shared, stream) = self.0.ok_or(io::ErrorKind::Unsupported)?;
            shared.change(|state| state.enough = Some(LastWord::default()));
            Ok(Box::new(stream))
        }
    }

    #[test]
    fn a_connection_for_pages_that_comes_behind_the_last_ask_is_closed_and_not_taken() {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                pages: vec![ForPages::default()],
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let wire = Late(Some((Arc::clone(&shared), ours)));
        let watch = Watch {
            quiet: Duration::from_secs(60),
            stop: &|| None,
        };
        for_pages(wire, 0, &shared, &watch);
        let state = shared.lock();
        assert!(state.pages[0].next.is_none() && state.pages[0].newest.is_none());
        // The source comes again for it, and hears that it is enough.
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn who_says_nothing_makes_room_as_soon_as_the_host_lacks_a_descriptor() {
        let shared = Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        let host = Host(Mutex::new(vec![false, true]), &shared);
        let made = std::cell::Cell::new(0);
        let room = || {
            made.set(made.get() + 1);
            Silent::Closed
        };
        accept_all(&host, &shared, room, |_| {});
        assert_eq!(made.get(), 1);
    }

    #[test]
    fn a_source_that_was_silent_before_its_connection_was_given_up_was_away_since_its_last_word() {
        let shared = Shared::<Nobody> {
            state: Mutex::new(State {
                pages: vec![ForPages::default()],
                ..State::default()
            }),
            changed: Condvar::new(),
        };
        let ago = |time: u64| Instant::now().checked_sub(Duration::from_secs(time));
        for heard in [ago(60), ago(30)] {
            assert!(shared.next_for_pages(0, heard, Duration::ZERO).is_none());
        }
        let state = shared.lock();
        assert!(state.pages[0].quiet_since() <= ago(60));
        // It is given as long to connect again as ever.
        assert!(!state.is_cut_off(Duration::from_secs(30)));
        drop(state);
        let (wire, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        shared.lock().pages[0].next = Some(Box::new(wire));
        assert!(shared.next_for_pages(0, None, Duration::ZERO).is_some());
        assert_eq!(shared.lock().pages[0].quiet_since(), None);
    }

    #[test]
    fn a_source_that_connects_again_hears_the_last_word_and_one_that_is_away_does_not() {
        let patience = Duration::from_secs(60);
        let long_ago = Instant::now().checked_sub(patience);
        let cut_off = |waits, next| {
            let pages = ForPages {
                waits,
                next,
                ..ForPages::default()
            };
            let state = State::<Nobody> {
                pages: vec![ForPages::default(), pages],
                ..State::default()
            };
            state.is_cut_off(patience)
        };
        let wire = || {
            let (wire, _) = UnixStream::pair().unwrap();
            Some(Box::new(wire) as Duplex)
        };
        assert!(long_ago.is_some() && cut_off(long_ago, None));
        // It comes back within a second, or has, and its connection has not been taken.
        assert!(!cut_off(Some(Instant::now()), None) && !cut_off(None, None));
        assert!(!cut_off(long_ago, wire()));
    }

    #[test]
    fn a_host_that_lacked_a_descriptor_once_ends_no_migration_when_it_lacks_another_later() {
        for (has, hopeless, ends) in [
            ([false, true, false], true, false),
            ([true, false, false], true, true),
            ([true, false, false], false, false),
        ] {
            let shared = Shared {
                state: Mutex::new(State {
                    due: vec![0],
                    ..State::default()
                }),
                changed: Condvar::new(),
            };
            let host = Host(Mutex::new(has.to_vec()), &shared);
            // As long as somebody makes room it is not hopeless.
            let room = || match hopeless {
                true => Silent::None,
                false => Silent::Closed,
            };
            accept_all(&host, &shared, room, |_| {});
            let failed = shared.lock().failed.clone();
            assert_eq!(failed.is_some(), ends, "{has:?} {hopeless}: {failed:?}");
        }
    }
}
