// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The source's side of a migration: [`migrate`], from the first connection to the guest's end here, or to its going on.
//!
//! [`mod`](super) has the conversation, and why no break of it leaves two guests or none.

#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_pf::PageSource;
use dirty_log::estimate::{Advice, AutoConverge, Curve, CurvePoint, Forecast, Link, Policy, Spent};
use dirty_log::estimate::{Steps, Throttle, advise, forecast};
use serde::{Deserialize, Serialize};

use super::codec::{Compression, PAGE};
use super::event::{Event, Observer, RoundDone, Step};
use super::guest::{Dirty, Refusal, SourceGuest};
use super::limit::Limiter;
use super::link::{Connect, LinkError, TICK, Watch, Wire, greet, receive, receive_now, send};
use super::message::{Ending, Greeting, Message, MigrationId, Role, Side};
use super::orders::{Orders, Whereabouts};
use super::postcopy::missing::{MOST_RUNS, Missing};
use super::postcopy::serve::{Serving, Standing};
use super::postcopy::{LastWord, When};
use super::proof::introduce;
use super::sender::{LAST, Lane, Tally, send_round};

/// How long is waited for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For a connection.
    pub connect: Duration,
    /// For the destination to make the machine, and to make it whole.
    pub prepare: Duration,
    /// For a sign of life while pages go.
    pub pages: Duration,
    /// For the destination to say that it has the guest.
    pub start: Duration,
    /// For the answer to the question where it is. Short against [`asked`](super::destination::Patience::asked), how long the
    /// destination stays for it: one that is lost on its way is not the last.
    pub ask: Duration,
    /// Between two questions where it is, and between two tries to take it back.
    pub again: Duration,
    /// For what was let go of to be free again.
    pub take_back: Duration,
    /// For a destination that refuses each connection to be heard again, where a firewall might do that in its place: when it is
    /// not known whether it has the guest, and while memory follows that.
    pub refused: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            connect: Duration::from_secs(10),
            prepare: Duration::from_secs(60),
            pages: Duration::from_secs(30),
            start: Duration::from_secs(5),
            ask: Duration::from_secs(3),
            again: Duration::from_secs(1),
            take_back: Duration::from_secs(30),
            refused: Duration::from_secs(30),
        }
    }
}

/// What to do with a guest that writes faster than its pages can be sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenStuck {
    /// Give up: it runs on here.
    #[default]
    Cancel,
    /// Slow it, step by step (20 % of its vCPUs' time, then 10 % more each, up to 99 %), and give up where that does not
    /// help. It is as fast as it was when it has moved, and when it has not.
    Throttle,
    /// Stop it, and send what is left, however long that takes.
    Stop,
}

/// How to migrate.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Data connections, at least one.
    pub connections: u32,
    /// What pages are made smaller by.
    pub compression: Compression,
    /// What all data connections together may send.
    pub limit: Arc<Limiter>,
    /// The guest stands still no longer than this, as far as can be foretold.
    pub downtime: Duration,
    /// Memory is sent no longer than this while the guest runs. A round that is at work then is given up, or where the guest
    /// is to be stopped, ends with the frame that is under way.
    pub time: Duration,
    /// When that does not go.
    pub when_stuck: WhenStuck,
    /// When the guest goes before its memory, if that does not go by itself until then.
    pub postcopy: When,
    /// How long is waited for what.
    pub patience: Patience,
}

/// The guest did not go, or it is not known. Its words begin with where the guest is now.
#[derive(Debug, thiserror::Error)]
#[error("{after}{why}")]
pub struct MigrateError {
    /// What happened.
    #[source]
    pub why: Why,
    /// What became of the guest.
    pub after: After,
}

/// What became of a guest that did not go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    /// It runs on here.
    RunsOn,
    /// It is paused here, as it was before.
    StaysPaused,
    /// It stands still here, and is nowhere else: what was let go of for the migration could not be taken back.
    StandsStill(String),
    /// It has ended here, and is nowhere else.
    Ended,
    /// It was ended here while it was in doubt: it may run at the destination.
    InDoubt,
    /// It is nowhere any more: it ran at the destination, and its memory was in both places.
    Lost,
    /// It has gone to the destination, and some of its memory could not follow it: it was stopped there for that, or has
    /// poison in its place.
    Damaged,
}

impl std::fmt::Display for After {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            After::RunsOn => write!(f, "the guest runs on here: "),
            After::StaysPaused => write!(f, "the guest is paused here, as it was: "),
            After::Lost => write!(f, "the guest is lost: "),
            After::Damaged => write!(f, "the guest has gone, and not all of its memory: "),
            After::StandsStill(why) => write!(
                f,
                "the guest is paused here, because what was let go of for the migration cannot be taken back ({why}): \
                 resume it when it can; it did not go because "
            ),
            After::Ended => write!(f, "the guest runs nowhere: "),
            After::InDoubt => write!(
                f,
                "the guest has ended here, and may run at the destination: "
            ),
        }
    }
}

/// Why the guest did not go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Why {
    /// The destination cannot be reached.
    #[error("cannot connect to the destination: {0}")]
    Connect(#[source] io::Error),
    /// It cannot have the guest.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The conversation broke off.
    #[error("{doing}: {source}")]
    Link {
        /// At what.
        doing: &'static str,
        /// Why.
        source: LinkError,
    },
    /// The guest's side of it failed.
    #[error("{doing}: {source}")]
    Guest {
        /// At what.
        doing: &'static str,
        /// Why.
        source: Refusal,
    },
    /// It was cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The guest has ended.
    #[error("the guest ended before it could go: {0}")]
    Over(String),
    /// It writes faster than pages can be sent.
    #[error(
        "the guest{} writes faster than its memory can be sent: after {rounds} rounds in {} s, {left} pages are left, \
         with which it would stand still for {} ms; {}",
        slowed(*.throttle), .spent.as_secs(), .downtime.as_millis(), remedy(*.throttle)
    )]
    Stuck {
        /// Rounds that were sent.
        rounds: u32,
        /// In what time.
        spent: Duration,
        /// Pages that are dirty.
        left: u64,
        /// How long they would take.
        downtime: Duration,
        /// What it was slowed by.
        throttle: Throttle,
    },
    /// Memory was to be sent within a time, and a round is at work still.
    #[error(
        "the guest's memory was not sent within {} s: of round {round} {left} of {pages} pages are left; allow more time \
         (--max-time) or bandwidth (--bandwidth), or have it stopped then (--when-stuck stop)", .time.as_secs()
    )]
    OutOfTime {
        /// The time.
        time: Duration,
        /// The round, from 1 on.
        round: u32,
        /// Pages that it had.
        pages: u64,
        /// Those that have not been sent.
        left: u64,
    },
    /// The destination does not run it, and says that it never will.
    #[error("the destination did not start the guest")]
    NotStarted,
    /// The guest ran at the destination, without all of its memory, and that is gone.
    #[error(
        "the destination has ended and has not said that it had all of the guest's memory (of which {left} pages or more \
         were left): {why}"
    )]
    DestinationGone {
        /// Why that is known.
        why: String,
        /// Pages that it has not asked for, at least: some may have been sent twice.
        left: u64,
    },
    /// The guest has gone, and some of its memory did not come to the destination in time.
    #[error("pages that did not come to the destination: {lost} ({why})")]
    PagesLost {
        /// How many.
        lost: u64,
        /// Why the first of them did not.
        why: String,
    },
    /// The guest runs at the destination, without all of its memory, and this process ends.
    #[error(
        "this monitor ends before the destination has all of the guest's memory ({left} pages were left): {why}"
    )]
    TakenAlong {
        /// Why it ends.
        why: String,
        /// Pages that the destination has not asked for.
        left: u64,
    },
    /// Somebody said that it is here.
    #[error("the destination did not answer, and the guest was said to be here")]
    SaidToBeHere,
}

fn slowed(throttle: Throttle) -> String {
    match throttle.as_percent() {
        0 => String::new(),
        percent => format!(", slowed by {percent} %,"),
    }
}

/// What helps a guest that is stuck. One that was slowed in vain is a case for post-copy.
fn remedy(throttle: Throttle) -> &'static str {
    match throttle {
        Throttle::NONE => {
            "allow a longer downtime (--downtime), more bandwidth (--bandwidth) or time (--max-time), have it slowed or \
             stopped (--when-stuck throttle, stop), or have it go before its memory (--postcopy)"
        }
        _ => {
            "allow a longer downtime (--downtime), more bandwidth (--bandwidth) or time (--max-time), have it stopped \
             (--when-stuck stop), or have it go before its memory (--postcopy)"
        }
    }
}

/// Moves the guest to where `connect` leads. It returns when the guest is there, `Ok`, or goes on here. As long as neither
/// is known it asks.
///
/// # Errors
/// [`MigrateError`].
pub fn migrate<G: SourceGuest, C: Connect>(
    guest: &G,
    connect: &C,
    id: MigrationId,
    settings: &Settings,
    orders: &Orders,
    observer: &dyn Observer,
) -> Result<(), MigrateError> {
    let source = Source {
        guest,
        connect,
        id,
        settings,
        orders,
        observer,
        tracked: AtomicBool::new(false),
        direct: &OnceLock::new(),
        serving: OnceLock::new(),
        missing: AtomicU64::new(0),
    };
    let ended = source.run();
    orders.over();
    ended
}

/// How far the guest has been taken from its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Taken {
    #[default]
    Nothing,
    Held,
    /// Its state may have been sent: the destination may hold what was let go of.
    Released,
}

/// The connection of the conversation, and those that carried pages.
type Wires<W> = (W, Vec<Lane<W>>);

struct Source<'a, G, C> {
    guest: &'a G,
    connect: &'a C,
    id: MigrationId,
    settings: &'a Settings,
    orders: &'a Orders,
    observer: &'a dyn Observer,
    tracked: AtomicBool,
    /// The line to the destination, if nobody stands between: who refuses a connection there does so in its own place.
    direct: &'a OnceLock<String>,
    /// Behind the switch to post-copy.
    serving: OnceLock<Serving<'a, C>>,
    /// Pages that follow the guest.
    missing: AtomicU64,
}

/// Has threads begin to serve these pages.
type Serve<'a> = &'a dyn Fn(Arc<dyn PageSource>) -> Result<(), Why>;

impl<G: SourceGuest, C: Connect> Source<'_, G, C> {
    fn run(&self) -> Result<(), MigrateError> {
        std::thread::scope(|scope| {
            let serve = |pages: Arc<dyn PageSource>| {
                let how = (self.settings.compression, Arc::clone(&self.settings.limit));
                // As many as the rounds had.
                let patience = (self.settings.patience, self.settings.connections);
                let serving = self.serving.get_or_init(|| {
                    Serving::new((self.connect, self.direct), self.id, patience, pages, how)
                });
                for number in serving.numbers() {
                    let thread = std::thread::Builder::new().name("pages".into());
                    let spawned = thread.spawn_scoped(scope, move || serving.run(number));
                    spawned.map_err(|error| Why::Link {
                        doing: "cannot start a thread that serves pages",
                        source: error.into(),
                    })?;
                }
                Ok(())
            };
            let result = self.move_it(&serve);
            // All has been asked for, or nothing is to be: its threads end.
            self.stop_serving();
            result
        })
    }

    fn move_it(&self, serve: Serve<'_>) -> Result<(), MigrateError> {
        let mut control = None;
        let mut taken = Taken::Nothing;
        let handed = self.hand_over(&mut control, &mut taken, serve);
        let result = match handed {
            // What carried pages is closed behind that: it takes its time.
            Ok((control, _data)) => self
                .see_it_start(control)
                .and_then(|()| self.see_it_whole()),
            Err(why) => {
                // Heard, the destination ends at once with the reason; if not, by the connection's end.
                if let Some(control) = &mut control {
                    let text = Message::GivenUp(why.to_string());
                    let watch = Watch {
                        quiet: Duration::from_secs(1),
                        stop: &|| None,
                    };
                    let _ = send(control, &text, &watch);
                }
                drop(control);
                self.stop_serving();
                // Of one that was not held.
                self.lift();
                let after = match taken {
                    Taken::Nothing => self.as_it_was(),
                    Taken::Held | Taken::Released => self.take_back(taken),
                };
                Err(MigrateError { why, after })
            }
        };
        // A guest that has gone writes nothing more here, and KVM's grace periods would only be in the way of its start there.
        if result.is_err() && self.tracked.load(Ordering::Relaxed) {
            self.guest.stop_tracking();
        }
        result
    }

    /// Nobody reads the guest's memory any more: it goes on here.
    fn stop_serving(&self) {
        if let Some(serving) = self.serving.get() {
            serving.stop();
        }
    }

    /// The guest is as fast as it was.
    fn lift(&self) {
        if let Err(why) = self.guest.throttle(Throttle::NONE) {
            log::error!("the guest is slowed still: {why}");
        }
    }

    /// Why it is to end.
    fn stop(&self) -> Option<Why> {
        if self.orders.is_cancelled() {
            return Some(Why::Cancelled);
        }
        self.guest.over().map(Why::Over)
    }

    /// A failure of the connection at something; or what made it fail here.
    fn link(&self, doing: &'static str) -> impl Fn(LinkError) -> Why {
        move |source| match (self.stop(), source) {
            (Some(why), _) => why,
            (None, LinkError::GivenUp(why)) => Why::Refused(why),
            (None, source) => Why::Link { doing, source },
        }
    }

    /// All up to the word after which the guest is not the source's any more; the connection on which it is to be said, and
    /// those that carried pages.
    fn hand_over(
        &self,
        control: &mut Option<C::Wire>,
        taken: &mut Taken,
        serve: Serve<'_>,
    ) -> Result<Wires<C::Wire>, Why> {
        let (guest, patience) = (self.guest, &self.settings.patience);
        let stop = || self.stop().map(|why| why.to_string());
        let quiet = |quiet| Watch { quiet, stop: &stop };
        let refused = |doing| move |source| Why::Guest { doing, source };
        let at = |doing| self.link(doing);

        // 1. Can such a machine be there?
        let begun = Instant::now();
        let state = guest
            .rehearse()
            .map_err(refused("the guest cannot be moved as it is"))?;
        let rehearsal = begun.elapsed();
        if let Some(why) = self.stop() {
            return Err(why);
        }
        let connected = self.connect.connect(patience.connect);
        let wire = control.insert(connected.map_err(Why::Connect)?);
        let connections = self.settings.connections.max(1);
        let connected = Event::Connected {
            patience: patience.prepare,
        };
        self.observer.event(connected);
        let (id, role) = (self.id, Role::Control);
        let doing = "cannot offer the guest to the destination";
        let broke = |doing| {
            // Before it has said anything.
            move |error: LinkError| at(doing)(error.hinted(self.connect.hint()))
        };
        greet(wire, &Greeting { id, role }, &quiet(patience.connect)).map_err(broke(doing))?;
        let offer = Message::Offer {
            connections,
            compressed: self.settings.compression != Compression::None,
            postcopy: self.settings.postcopy.may(),
            state,
        };
        send(wire, &offer, &quiet(patience.pages)).map_err(broke(doing))?;
        drop(offer);
        let doing = "the destination does not say whether it takes the guest";
        match receive(wire, Side::Destination, &quiet(patience.prepare)).map_err(broke(doing))? {
            Message::Ready(line) => {
                if !line.is_empty() && wire.line().as_ref() == Some(&line) {
                    let _ = self.direct.set(line);
                }
            }
            other => {
                let (said, due) = (other.kind(), "Ready");
                return Err(broke(doing)(LinkError::Unexpected { said, due }));
            }
        }
        let mut data = Vec::new();
        for number in 0..connections {
            let connected = self.connect.connect(patience.connect);
            let mut wire = connected.map_err(Why::Connect)?;
            let role = Role::Data(number);
            let greeted = greet(&mut wire, &Greeting { id, role }, &quiet(patience.connect));
            greeted.map_err(at("cannot connect to the destination"))?;
            let lane = Lane::new(wire, self.settings.compression);
            data.push(lane.map_err(|error| at("cannot compress pages")(error.into()))?);
        }
        let memory = guest.memory();
        self.observer.event(Event::Accepted { memory, rehearsal });

        // 2. Memory, while the guest runs.
        let started = guest.start_tracking();
        started.map_err(refused("cannot see what the guest writes"))?;
        self.tracked.store(true, Ordering::Relaxed);
        let unseen = "cannot see what the guest has written";
        let mut rounds = Rounds::new(self.settings, memory / PAGE as u64, rehearsal);
        // All of it.
        let dirty = guest.harvest().map_err(refused(unseen))?;
        // What is to follow the guest, besides what is dirty when it stands still.
        let mut later: Option<Vec<Range<u64>>> = None;
        let at_once = self.settings.postcopy == When::AfterRounds(0);
        let mut sent = match at_once {
            true => {
                later = Some(all_of(&dirty));
                dirty.commit();
                Default::default()
            }
            false => self.round(dirty, 0, &mut data, wire, Some(&rounds))?,
        };
        let last = loop {
            if at_once {
                break 0;
            }
            let (mut done, left) = sent;
            let since = rounds.since;
            let dirty = guest.harvest().map_err(refused(unseen))?;
            done.dirtied = dirty.pages();
            done.took = since.elapsed();
            self.observer.event(Event::RoundDone(&done));
            let next = done.number + 1;
            if left.is_some() {
                later = left;
            }
            if done.cut {
                break next;
            }
            match rounds.advice(&done, dirty.pages(), self.observer) {
                Next::Switch => break next,
                Next::PostCopy => later = Some(Vec::new()),
                _ if self.is_to_switch(next, &rounds) => later = Some(Vec::new()),
                Next::Round => {}
                Next::Slower(throttle) => {
                    let slowed = guest.throttle(throttle);
                    slowed.map_err(refused("cannot slow the guest"))?;
                    self.observer.event(Event::Throttled(throttle));
                }
                Next::Stuck(why) => match self.settings.when_stuck {
                    WhenStuck::Stop => break next,
                    WhenStuck::Cancel | WhenStuck::Throttle => return Err(why),
                },
            }
            if later.is_some() {
                break next;
            }
            sent = self.round(dirty, next, &mut data, wire, Some(&rounds))?;
        };
        if later.is_some() {
            // While it runs: the connections for pages are made.
            let pages = guest.serve();
            serve(pages.map_err(refused("the guest's memory cannot follow it"))?)?;
            self.see_it_connected(wire)?;
        }

        // 3. The guest stands still.
        self.observer.event(Event::Step(Step::Stopping));
        guest.hold().map_err(refused("cannot stop the guest"))?;
        *taken = Taken::Held;
        // Whether it goes on here or there, it is as fast as it was.
        self.lift();
        self.observer.event(Event::Step(Step::Held));
        let since = Instant::now();
        let dirty = guest.harvest().map_err(refused(unseen))?;
        let missing = later.map(|mut runs| {
            runs.extend(all_of(&dirty));
            Missing::of(runs)
        });
        let (mut done, _) = match &missing {
            None => self.round(dirty, last, &mut data, wire, None)?,
            // Nothing more comes on these connections.
            Some(_) => {
                dirty.commit();
                self.round(Nothing, last, &mut data, wire, None)?
            }
        };
        done.took = since.elapsed();
        self.observer.event(Event::RoundDone(&done));
        self.observer.event(Event::Step(Step::PagesSent));
        let state = guest
            .state()
            .map_err(refused("cannot read the guest's state"))?;
        self.observer.event(Event::Step(Step::StateRead));
        *taken = Taken::Released;
        let released = guest.release();
        released.map_err(refused("cannot let go of the guest's disks"))?;
        self.observer.event(Event::Step(Step::Released));
        if let Some(missing) = &missing {
            let missing_pages = missing.pages();
            // Relaxed: this thread's own.
            self.missing.store(missing_pages, Ordering::Relaxed);
            let event = Event::PostCopy {
                missing: missing_pages,
            };
            self.observer.event(event);
            for runs in missing.runs().chunks(MOST_RUNS) {
                let message = Message::Missing(runs.to_vec());
                let doing = "cannot tell the destination which pages follow the guest";
                send(wire, &message, &quiet(patience.pages)).map_err(at(doing))?;
            }
        }
        let message = Message::State { round: last, state };
        let doing = "cannot send the guest's state";
        send(wire, &message, &quiet(patience.pages)).map_err(at(doing))?;
        drop(message);
        self.observer.event(Event::Step(Step::StateSent));
        let doing = "the destination does not say that it has the guest's state";
        expect(wire, &quiet(patience.prepare), "Prepared", |said| {
            *said == Message::Prepared
        })
        .map_err(at(doing))?;
        self.observer.event(Event::Step(Step::Prepared));

        // 4. From the commit on it is not ours, whether the word arrives or not.
        if let Some(why) = self.stop() {
            return Err(why);
        }
        match (self.orders.commit(), control.take()) {
            (true, Some(control)) => Ok((control, data)),
            _ => Err(Why::Cancelled),
        }
    }

    /// Sends a round, and has the destination say that it has taken it, unless it is the last, for which the guest stands
    /// still: `running` is of the others.
    fn round<D: Dirty>(
        &self,
        dirty: D,
        number: u32,
        data: &mut [Lane<C::Wire>],
        control: &mut C::Wire,
        running: Option<&Rounds>,
    ) -> Result<Sent, Why> {
        let patience = &self.settings.patience;
        let pages = dirty.pages();
        let stopped = running.is_none();
        self.observer.event(Event::Round {
            number,
            pages,
            stopped,
        });
        let is_late = || running.is_some_and(Rounds::is_late);
        // Of what is cut short what is left is known, if the guest is to go before it.
        let switches = || running.is_some_and(|rounds| self.is_to_switch(number, rounds));
        let cuts =
            self.settings.when_stuck == WhenStuck::Stop || self.settings.postcopy == When::Auto;
        let in_vain = || is_late() && !cuts;
        let stop = || match self.stop() {
            Some(why) => Some(why.to_string()),
            None => in_vain().then(|| "its time is over".to_owned()),
        };
        let quiet = |quiet| Watch { quiet, stop: &stop };
        let enough = || is_late() && cuts || switches();
        let tally = Tally::new(self.observer, &enough);
        let out_of_time = || Why::OutOfTime {
            time: self.settings.time,
            round: number + 1,
            pages,
            left: pages.saturating_sub(tally.pages()),
        };
        let mark = u64::from(number) | if stopped { LAST } else { 0 };
        let sent = send_round(self.guest, &dirty, mark, data, self.settings, &stop, &tally);
        let failed = sent.err().or_else(|| self.stop());
        if let Some(why) = failed {
            // If the destination gave up, it has said why, and its connections end by that.
            let heard = receive(
                control,
                Side::Destination,
                &quiet(Duration::from_millis(200)),
            );
            return Err(match (self.stop(), heard) {
                (Some(why), _) => why,
                (None, Err(LinkError::GivenUp(why))) => Why::Refused(why),
                _ if in_vain() => out_of_time(),
                _ => why,
            });
        }
        if !stopped {
            let doing = "the destination does not take the guest's memory";
            let watch = quiet(patience.pages);
            let told = send(control, &Message::Round(number), &watch);
            let taken = told.and_then(|()| {
                expect(control, &watch, "Taken", |said| {
                    *said == Message::Taken(number)
                })
            });
            taken.map_err(|error| match error {
                LinkError::Stopped(_) if self.stop().is_none() => out_of_time(),
                error => self.link(doing)(error),
            })?;
        }
        let cut = tally.is_cut();
        let left = (cut && switches()).then(|| tally.take_left());
        let sent = match (cut, &left) {
            // Dropped, all of them come again.
            (true, None) => tally.pages(),
            (true, Some(_)) => {
                dirty.commit();
                tally.pages()
            }
            (false, _) => {
                dirty.commit();
                pages
            }
        };
        let done = RoundDone {
            number,
            pages: sent,
            zero: tally.zero(),
            cut,
            ..RoundDone::default()
        };
        Ok((done, left))
    }

    /// Whether the guest is to go before its memory now, with so many rounds sent.
    fn is_to_switch(&self, rounds: u32, so_far: &Rounds) -> bool {
        let asked = match self.settings.postcopy {
            When::Never => return false,
            When::ByHand => false,
            When::AfterRounds(most) => rounds >= most,
            When::After(time) => so_far.began.elapsed() >= time,
            When::Auto => so_far.is_late(),
        };
        asked || self.orders.is_to_switch()
    }

    /// Waits until pages can be asked for, on all connections.
    fn see_it_connected(&self, control: &mut C::Wire) -> Result<(), Why> {
        let Some(serving) = self.serving.get() else {
            return Ok(());
        };
        let until = Instant::now() + self.settings.patience.connect;
        loop {
            let standing = serving.wait(TICK, |standing| *standing == Standing::Connected);
            let why = match standing {
                Standing::Connected => return Ok(()),
                Standing::Enough(_) => "it wants no pages".to_owned(),
                Standing::Broken(_) if Instant::now() < until => {
                    // The destination has nothing to say yet but that it gives up, or by its end that it is gone.
                    let stop = || self.stop().map(|why| why.to_string());
                    let watch = Watch {
                        quiet: Duration::MAX,
                        stop: &stop,
                    };
                    let at = self.link("the destination takes no connections for pages");
                    match receive_now(control, Side::Destination, &watch).map_err(at)? {
                        None => continue,
                        Some(other) => format!("it says {:?}", other.kind()),
                    }
                }
                Standing::Broken(why) | Standing::Gone(why) => why,
            };
            return Err(Why::Connect(io::Error::other(why)));
        }
    }

    /// Serves what of the memory is not at the destination, whose the guest is, until that has all or is gone.
    fn see_it_whole(&self) -> Result<(), MigrateError> {
        let Some(serving) = self.serving.get() else {
            return Ok(());
        };
        loop {
            let ended =
                |standing: &Standing| matches!(standing, Standing::Enough(_) | Standing::Gone(_));
            let standing = serving.wait(TICK, ended);
            serving.follow();
            let served = serving.served();
            let broken = match &standing {
                Standing::Broken(why) | Standing::Gone(why) => Some(why.as_str()),
                Standing::Connected | Standing::Enough(_) => None,
            };
            self.observer.event(Event::Served { served, broken });
            let left = self.missing.load(Ordering::Relaxed);
            let left = left.saturating_sub(served.demand + served.bulk);
            let why = match (standing, self.guest.over()) {
                (Standing::Enough(word), _) => {
                    self.observer.event(Event::Enough(&word));
                    let LastWord { lost, why, .. } = word;
                    if lost == 0 {
                        return Ok(());
                    }
                    let (why, after) = (Why::PagesLost { lost, why }, After::Damaged);
                    return Err(MigrateError { why, after });
                }
                (Standing::Gone(why), _) => Why::DestinationGone { why, left },
                (_, Some(why)) => Why::TakenAlong { why, left },
                (Standing::Connected | Standing::Broken(_), None) => continue,
            };
            let after = After::Lost;
            return Err(MigrateError { why, after });
        }
    }

    /// Says that the guest is not the source's any more, and hears that it is the destination's. If that is not heard it is
    /// asked for.
    fn see_it_start(&self, mut control: C::Wire) -> Result<(), MigrateError> {
        let watch = Watch {
            quiet: self.settings.patience.start,
            stop: &|| None,
        };
        let said = send(&mut control, &Message::Go, &watch).and_then(|()| {
            expect(&mut control, &watch, "Started", |said| {
                *said == Message::Started
            })
        });
        match said {
            Ok(()) => {
                // Not heard, the destination goes on answering a question that nobody asks.
                let _ = send(&mut control, &Message::Done, &watch);
                self.observer.event(Event::Step(Step::Started));
                Ok(())
            }
            Err(error) => {
                // Its end tells the destination that no more comes on it.
                drop(control);
                self.settle(&error.to_string())
            }
        }
    }

    /// Asks where the guest is until that is known.
    fn settle(&self, broke: &str) -> Result<(), MigrateError> {
        let mut told = false;
        // Since when each question was refused where the destination was.
        let mut refused: Option<Instant> = None;
        let limit = match self.connect.is_refusal_proof() {
            true => Duration::ZERO,
            false => self.settings.patience.refused,
        };
        let why = loop {
            let asked = self.ask();
            if !matches!(asked, Asked::Gone(_)) {
                refused = None;
            }
            let why = match asked {
                Asked::Ending(Ending::Started) => {
                    self.observer.event(Event::Step(Step::Started));
                    return Ok(());
                }
                Asked::Ending(Ending::Never) => break Why::NotStarted,
                Asked::Gone(why) => {
                    let since = *refused.get_or_insert_with(Instant::now);
                    if since.elapsed() >= limit {
                        break Why::NotStarted;
                    }
                    let limit = limit.as_secs();
                    format!("{why}, which a firewall might say: it is believed after {limit} s")
                }
                // Who listens there now knows nothing of it: who took part is gone, if it was there.
                Asked::Ending(Ending::Unknown) if self.is_direct() => break Why::NotStarted,
                Asked::Ending(Ending::Unknown) => {
                    let why = "who answers knows nothing of this guest, but may be another than who has it";
                    format!("{why} ({BETWEEN})")
                }
                Asked::Nothing(why) => why,
            };
            if !told {
                let text = format!("{broke}; and then: {why}");
                self.observer.event(Event::InDoubt(&text));
                told = true;
            }
            match self.orders.in_doubt(self.settings.patience.again) {
                Some(Whereabouts::There) => return Ok(()),
                Some(Whereabouts::Here) => break Why::SaidToBeHere,
                None => {}
            }
            // Somebody ended what stood still here, and no more is to be decided.
            if let Some(why) = self.guest.over() {
                let (why, after) = (Why::Over(why), After::InDoubt);
                return Err(MigrateError { why, after });
            }
        };
        self.stop_serving();
        let after = self.take_back(Taken::Released);
        Err(MigrateError { why, after })
    }

    /// Nobody stands between the destination and this side, and who answers or refuses now is where it was.
    fn is_direct(&self) -> bool {
        let line = self.direct.get();
        line.is_some_and(|line| self.connect.is_still(line))
    }

    /// Asks once.
    fn ask(&self) -> Asked {
        let watch = Watch {
            quiet: self.settings.patience.ask,
            stop: &|| None,
        };
        let mut wire = match self.connect.connect(self.settings.patience.ask) {
            Ok(wire) => wire,
            Err(error) => {
                return match error.kind() {
                    io::ErrorKind::ConnectionRefused if self.is_direct() => {
                        Asked::Gone(error.to_string())
                    }
                    io::ErrorKind::ConnectionRefused => {
                        Asked::Nothing(format!("{error}, but the destination may live ({BETWEEN})"))
                    }
                    _ => Asked::Nothing(format!("it cannot be reached: {error}")),
                };
            }
        };
        let said = match introduce(&mut wire, self.id, Role::Settle, &watch) {
            Ok(true) => receive(&mut wire, Side::Destination, &watch),
            Ok(false) => return Asked::Ending(Ending::Unknown),
            Err(error) => Err(error),
        };
        match said {
            Ok(Message::Settled(ending)) => {
                // Not heard, it goes on answering.
                let _ = send(&mut wire, &Message::Done, &watch);
                Asked::Ending(ending)
            }
            Ok(other) => Asked::Nothing(format!("it answers {:?}", other.kind())),
            Err(error) => Asked::Nothing(error.to_string()),
        }
    }

    /// What a guest is that is as it was before.
    fn as_it_was(&self) -> After {
        match (self.guest.over(), self.guest.is_paused()) {
            (Some(_), _) => After::Ended,
            (None, true) => After::StaysPaused,
            (None, false) => After::RunsOn,
        }
    }

    /// The guest is the source's again.
    fn take_back(&self, taken: Taken) -> After {
        let begun = Instant::now();
        let mut told = false;
        loop {
            let why = match self.guest.take_back() {
                Ok(()) => return self.as_it_was(),
                Err(why) => why.to_string(),
            };
            if !told {
                self.observer.event(Event::NotTakenBack(&why));
                told = true;
            }
            if self.guest.over().is_some() {
                return After::Ended;
            }
            if begun.elapsed() >= self.settings.patience.take_back {
                return After::StandsStill(why);
            }
            // The destination cannot start it, and lets go of all when it is told so.
            if taken == Taken::Released {
                self.ask();
            }
            std::thread::sleep(self.settings.patience.again);
        }
    }
}

/// Why nobody's word is taken for the destination's death.
const BETWEEN: &str = "a tunnel or a proxy may stand between";

enum Asked {
    Ending(Ending),
    /// It was refused where the destination was.
    Gone(String),
    Nothing(String),
}

/// A round that was sent, or a part of it; and what of it was not, where it was cut short for the guest to go before it.
type Sent = (RoundDone, Option<Vec<Range<u64>>>);

/// No page.
struct Nothing;

impl Dirty for Nothing {
    fn pages(&self) -> u64 {
        0
    }

    fn runs(&self, _: &mut dyn FnMut(Range<u64>) -> bool) {}

    fn commit(self) {}
}

/// The runs of what is dirty.
fn all_of(dirty: &impl Dirty) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    dirty.runs(&mut |run| {
        all.push(run);
        true
    });
    all
}

/// Waits for one message.
fn expect(
    wire: &mut impl Wire,
    watch: &Watch<'_>,
    due: &'static str,
    is: impl Fn(&Message) -> bool,
) -> Result<(), LinkError> {
    let message = receive(wire, Side::Destination, watch)?;
    match is(&message) {
        true => Ok(()),
        false => Err(LinkError::Unexpected {
            said: message.kind(),
            due,
        }),
    }
}

enum Next {
    Round,
    /// Another round, of a guest that is slowed so.
    Slower(Throttle),
    Switch,
    /// The guest goes before its memory.
    PostCopy,
    Stuck(Why),
}

/// What the rounds so far say of the next.
struct Rounds {
    began: Instant,
    /// When no more is sent while the guest runs; none is never.
    until: Option<Instant>,
    /// When the last one ended.
    since: Instant,
    memory: u64,
    policy: Policy,
    steps: AutoConverge,
    /// Rounds since the last step.
    since_step: usize,
    /// How many pages were written in how long, of the last rounds.
    points: Vec<CurvePoint>,
    /// Pages a second that were sent, of the last rounds.
    rates: Vec<f64>,
    /// No round has told yet: the first one's rate stands for it.
    guessed: bool,
}

/// So many rounds are looked back upon.
const WINDOW: usize = 8;

impl Rounds {
    /// `memory` pages, and a guest that stands still for `state` besides what is left of them.
    fn new(settings: &Settings, memory: u64, state: Duration) -> Self {
        let now = Instant::now();
        // What the state takes is no time for pages; some is, or none would ever be few enough.
        let downtime = settings.downtime.saturating_sub(state);
        let downtime = downtime.max(settings.downtime / 10);
        let steps = Steps::default();
        Rounds {
            began: now,
            until: now.checked_add(settings.time),
            since: now,
            memory,
            policy: Policy {
                downtime,
                patience: settings.time,
                least_rounds: 3,
                throttle: match settings.when_stuck {
                    WhenStuck::Throttle => Throttle::percent(steps.most),
                    WhenStuck::Cancel | WhenStuck::Stop => Throttle::NONE,
                },
                post_copy: settings.postcopy == When::Auto,
            },
            steps: AutoConverge::new(steps),
            since_step: 0,
            points: Vec::new(),
            rates: Vec::new(),
            guessed: false,
        }
    }

    fn is_late(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }

    fn advice(&mut self, done: &RoundDone, left: u64, observer: &dyn Observer) -> Next {
        let now = Instant::now();
        self.since = now;
        let took = done.took.max(Duration::from_micros(1));
        // A round of a few pages says how long a round trip is, and little of what the link carries; and pages of zeros
        // are none that it carried.
        let carried = done.pages.saturating_sub(done.zero);
        if carried >= 256 {
            if std::mem::take(&mut self.guessed) {
                self.rates.clear();
            }
            keep(&mut self.rates, carried as f64 / took.as_secs_f64());
        } else if self.rates.is_empty() {
            self.guessed = true;
            keep(&mut self.rates, done.pages as f64 / took.as_secs_f64());
        }
        let pages = left as f64;
        let point = CurvePoint {
            window: took,
            pages,
            low: pages,
            high: pages,
        };
        keep(&mut self.points, point);
        let ahead = self.ahead(left, observer);
        let spent = Spent {
            rounds: done.number + 1,
            time: now.duration_since(self.began),
            throttle: self.steps.now(),
        };
        self.since_step += 1;
        match advise(&ahead, spent, &self.policy) {
            // Nothing is left at all.
            _ if left == 0 => Next::Switch,
            // What was written while all was sent is most of what the guest writes at all; what it writes in the moment that
            // this takes is less, and only that is to be sent while it stands still.
            Advice::StopAndCopy if done.number == 0 => Next::Round,
            Advice::StopAndCopy => Next::Switch,
            Advice::GoOn => Next::Round,
            Advice::SlowDown => {
                let throttle = self.steps.step();
                self.since_step = 0;
                // What it wrote when it was faster takes it longer now.
                for point in &mut self.points {
                    *point = point.throttled(spent.throttle, throttle);
                }
                self.ahead(left, observer);
                Next::Slower(throttle)
            }
            Advice::SwitchToPostCopy => Next::PostCopy,
            // It runs in bursts: until all that is looked back upon is of a guest as slow as this, it is not known.
            Advice::GiveUp
                if spent.throttle != Throttle::NONE
                    && self.since_step < WINDOW
                    && spent.time <= self.policy.patience =>
            {
                Next::Round
            }
            _ => Next::Stuck(Why::Stuck {
                rounds: spent.rounds,
                spent: spent.time,
                left,
                downtime: ahead.downtime.mean,
                throttle: spent.throttle,
            }),
        }
    }

    /// How it goes on with `left` pages, as far as the last rounds tell.
    fn ahead(&self, left: u64, observer: &dyn Observer) -> Forecast {
        let curve = Curve::new(self.points.iter().copied(), self.memory);
        let ahead = forecast(left, &curve, link(&self.rates), self.policy.downtime);
        let event = Event::Ahead {
            left,
            forecast: &ahead,
        };
        observer.event(event);
        ahead
    }
}

fn keep<T>(list: &mut Vec<T>, item: T) {
    if list.len() == WINDOW {
        list.remove(0);
    }
    list.push(item);
}

/// From the slowest round to the fastest.
fn link(rates: &[f64]) -> Link {
    let mean = rates.iter().sum::<f64>() / rates.len().max(1) as f64;
    Link {
        low: rates.iter().copied().fold(f64::INFINITY, f64::min),
        mean,
        high: rates.iter().copied().fold(0.0, f64::max),
    }
}
