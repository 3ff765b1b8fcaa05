// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration did and does, as plain data. The source fills it while it goes.
//!
//! ```text
//!   new ──► round_begins ─ sent* ─ round_ends ──► … ──► stop_begins ─ step_ends(Pause) ─┐
//!             ▲                        │                                                │
//!             └── forecast_is ◄────────┘     ends ◄── step_ends(State, HandOver, Start) ◄─┴ a last round, stopped,
//!                                                                                         step_ends(LastPages)
//! ```
//!
//! Between two rounds [`throttled`](MigrationRecord::throttled) says what the guest is slowed by.
//!
//! Each of these takes the time since the migration began, so that nothing here asks a clock. Any may be left out, and
//! [`ends`](MigrationRecord::ends) may come at every place. The record stays small however long a migration takes:
//! at most [`MOST_ROUNDS`] rounds and [`MOST_SAMPLES`] samples are kept.
//!
//! As JSON it is what `ctl migrate --json` and `GET /migrate` say. Times are whole microseconds (`-us`).

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use dirty_log::estimate::{Forecast, Outcome as ForecastOutcome};
use serde::{Deserialize, Serialize};

use super::codec::MOST_CONTENTS;
use super::postcopy::When;
use super::postcopy::record::Followed;
use super::progress;
use super::source::WhenStuck;
use crate::text::printable;
use crate::units;

/// After so long in which nothing came about it is said that a migration stands still.
const STILL: Duration = Duration::from_secs(5);
/// And that the destination has not answered yet.
const UNANSWERED: Duration = Duration::from_secs(3);

/// Rounds that are kept: the first and the newest others.
pub const MOST_ROUNDS: usize = 1000;
/// Samples that are kept. When there would be more, every second one goes.
pub const MOST_SAMPLES: usize = 512;

/// Samples are at least so far apart, in the beginning.
const FIRST_INTERVAL: Duration = Duration::from_millis(10);

/// What a migration did, or does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationRecord {
    /// Where to, as it was asked for: `unix:PATH`, `tcp:HOST:PORT`.
    pub to: String,
    /// When it began, in seconds since 1970.
    pub began_unix_s: u64,
    /// How long it took; `None` while it goes.
    #[serde(rename = "took-us", with = "micros::optional")]
    pub took: Option<Duration>,
    /// How long it has been going, as of when it was [asked](Self::as_of); of one that is over, how long it took.
    #[serde(rename = "elapsed-us", with = "micros", default)]
    pub elapsed: Duration,
    /// Pages of guest memory, of 4 KiB each.
    pub memory_pages: u64,
    /// The destination is connected with, and has not said yet whether it takes the guest.
    #[serde(default)]
    pub unanswered: Option<Unanswered>,
    /// When something came about last, pages that were sent for one, since the migration's beginning.
    #[serde(rename = "progress-us", with = "micros", default)]
    pub progress: Duration,
    /// Somebody had paused the guest: it is moved, or stays, as it is.
    #[serde(default)]
    pub paused: bool,
    /// What was asked for.
    pub settings: Settings,
    /// All rounds together, those that are no longer in [`rounds`](Self::rounds) and the one at work among them.
    pub total: Total,
    /// The rounds that are done, oldest first.
    pub rounds: Vec<Round>,
    /// The round at work: `took` is of [so far](Self::as_of), and `pages_dirtied` is not known yet.
    pub at_work: Option<Round>,
    /// The newest forecast; of a migration that is over, the last one.
    pub forecast: Option<Ahead>,
    /// What the guest is slowed by, in percent of its vCPUs' time; of a migration that is over, what it was slowed by at
    /// last.
    #[serde(default)]
    pub throttle_percent: u8,
    /// The guest's stop, from when it began.
    pub switch_over: Option<SwitchOver>,
    /// What followed the guest, if it went before its memory.
    #[serde(default)]
    pub postcopy: Option<Followed>,
    /// How it ended; `None` while it goes.
    pub outcome: Option<Outcome>,
    /// What became of the report that was asked for, which is written when it is over.
    #[serde(default)]
    pub report: Option<Report>,
    /// What had been sent by when, for a plot.
    pub samples: Vec<Sample>,
    /// How far samples are apart, at least.
    #[serde(rename = "sample-interval-us", with = "micros")]
    pub sample_interval: Duration,
}

/// An answer that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Unanswered {
    /// Since when, since the migration's beginning.
    #[serde(rename = "since-us", with = "micros")]
    pub since: Duration,
    /// How long, until it is given up.
    #[serde(rename = "patience-us", with = "micros")]
    pub patience: Duration,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// The most bytes a second on the wire.
    pub limit_bytes_per_s: Option<u64>,
    /// The downtime that is aimed at.
    #[serde(rename = "downtime-us", with = "micros")]
    pub downtime: Duration,
    /// Connections that carry pages.
    pub connections: u32,
    /// How pages are packed, by its name on the command line: `none`, `zstd`.
    pub compression: String,
    /// Whether the connections are encrypted.
    pub tls: bool,
    /// What is done with a guest that writes faster than its pages go.
    #[serde(default)]
    pub when_stuck: WhenStuck,
    /// When the guest goes before its memory.
    #[serde(default)]
    pub postcopy: When,
}

/// A pass over the pages that were dirty when it began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", into = "RoundForm")]
pub struct Round {
    /// From 1 on.
    pub number: u32,
    /// When it began, since the migration's beginning.
    #[serde(rename = "began-us", with = "micros")]
    pub began: Duration,
    /// How long it took.
    #[serde(rename = "took-us", with = "micros")]
    pub took: Duration,
    /// The pages that were dirty.
    pub pages_to_send: u64,
    /// Those that were sent, zero pages among them.
    pub pages_sent: u64,
    /// Those that were nothing but zeros, of which only that is told.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Different pages that the guest and its devices wrote meanwhile, which are the next round's.
    pub pages_dirtied: u64,
    /// The guest was paused: the last round.
    pub stopped: bool,
    /// What the guest was slowed by, in percent of its vCPUs' time.
    #[serde(default)]
    pub throttle_percent: u8,
}

/// A round with what follows from it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct RoundForm {
    number: u32,
    #[serde(rename = "began-us", with = "micros")]
    began: Duration,
    #[serde(rename = "took-us", with = "micros")]
    took: Duration,
    pages_to_send: u64,
    pages_sent: u64,
    zero_pages: u64,
    wire_bytes: u64,
    pages_dirtied: u64,
    stopped: bool,
    throttle_percent: u8,
    pages_dirtied_per_s: u64,
    wire_bytes_per_s: u64,
}

impl From<Round> for RoundForm {
    fn from(round: Round) -> Self {
        let pages_dirtied_per_s = round.dirty_rate() as u64;
        let wire_bytes_per_s = round.throughput() as u64;
        let Round {
            number,
            began,
            took,
            pages_to_send,
            pages_sent,
            zero_pages,
            wire_bytes,
            pages_dirtied,
            stopped,
            throttle_percent,
        } = round;
        RoundForm {
            number,
            began,
            took,
            pages_to_send,
            pages_sent,
            zero_pages,
            wire_bytes,
            pages_dirtied,
            stopped,
            throttle_percent,
            pages_dirtied_per_s,
            wire_bytes_per_s,
        }
    }
}

impl Round {
    /// Different pages dirtied a second; 0 of a round that took no time.
    pub fn dirty_rate(&self) -> f64 {
        per_second(self.pages_dirtied, self.took)
    }

    /// Bytes on the wire a second; 0 of a round that took no time.
    pub fn throughput(&self) -> f64 {
        per_second(self.wire_bytes, self.took)
    }

    /// Pages that it has yet to send.
    pub fn pages_left(&self) -> u64 {
        self.pages_to_send.saturating_sub(self.pages_sent)
    }

    /// When it ended, since the migration's beginning.
    pub fn ended(&self) -> Duration {
        self.began.saturating_add(self.took)
    }
}

/// `amount` in `time`, a second; 0 where no time has passed.
pub(crate) fn per_second(amount: u64, time: Duration) -> f64 {
    match time.is_zero() {
        true => 0.0,
        false => amount as f64 / time.as_secs_f64(),
    }
}

/// Of all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Total {
    /// Rounds that have begun.
    pub rounds: u32,
    /// Pages sent, a page as often as it was.
    pub pages_sent: u64,
    /// Those of them that were nothing but zeros.
    pub zero_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
}

/// What is ahead, as [`dirty_log::estimate::forecast`] sees it: the least, the middle and the greatest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Ahead {
    /// When this was said, since the migration's beginning.
    #[serde(rename = "at-us", with = "micros")]
    pub at: Duration,
    /// Whether it ends.
    pub converges: Converges,
    /// Rounds until the stop.
    pub rounds: [u32; 3],
    /// Time until the stop.
    #[serde(rename = "time-us", with = "micros::span")]
    pub time: [Duration; 3],
    /// Of the stop what goes for pages. Where it does not converge, what a stop would cost.
    #[serde(rename = "downtime-us", with = "micros::span")]
    pub downtime: [Duration; 3],
}

impl Ahead {
    /// `forecast`, which was made at `at`.
    pub fn new(at: Duration, forecast: &Forecast) -> Self {
        let Forecast {
            rounds,
            time,
            downtime,
            ..
        } = forecast;
        Ahead {
            at,
            converges: match forecast.outcome {
                ForecastOutcome::Converges => Converges::Yes,
                ForecastOutcome::Uncertain => Converges::Perhaps,
                ForecastOutcome::Diverges => Converges::No,
            },
            rounds: [rounds.low, rounds.mean, rounds.high],
            time: [time.low, time.mean, time.high],
            downtime: [downtime.low, downtime.mean, downtime.high],
        }
    }
}

/// Whether a pre-copy ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Converges {
    /// It does, whatever of what was seen goes on.
    Yes,
    /// It depends.
    Perhaps,
    /// Not at this rate.
    No,
}

/// The guest's stop, and where the time goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", into = "SwitchOverForm")]
pub struct SwitchOver {
    /// When the guest was told to pause, since the migration's beginning.
    #[serde(rename = "began-us", with = "micros")]
    pub began: Duration,
    /// What was done, in this order, each from where the one before ended.
    pub steps: Vec<StepTaken>,
}

/// A stop with what follows from it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct SwitchOverForm {
    #[serde(rename = "began-us", with = "micros")]
    began: Duration,
    steps: Vec<StepTaken>,
    #[serde(rename = "downtime-us", with = "micros")]
    downtime: Duration,
}

impl From<SwitchOver> for SwitchOverForm {
    fn from(stop: SwitchOver) -> Self {
        SwitchOverForm {
            downtime: stop.downtime(),
            began: stop.began,
            steps: stop.steps,
        }
    }
}

/// A step of the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StepTaken {
    /// Which.
    pub step: Step,
    /// How long it took.
    #[serde(rename = "took-us", with = "micros")]
    pub took: Duration,
}

/// Where a stop's time goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// vCPUs and devices came to rest.
    Pause,
    /// The pages that were still dirty were sent and taken.
    LastPages,
    /// The state was saved, sent and taken.
    State,
    /// The guest was handed over, and that was acknowledged.
    HandOver,
    /// The other side let it go on, and said so.
    Start,
}

impl Step {
    /// All, in their order.
    pub const ALL: [Step; 5] = [
        Step::Pause,
        Step::LastPages,
        Step::State,
        Step::HandOver,
        Step::Start,
    ];

    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Step::Pause => "pause",
            Step::LastPages => "last pages",
            Step::State => "state",
            Step::HandOver => "hand-over",
            Step::Start => "start",
        }
    }
}

impl SwitchOver {
    /// How long the guest stood still: all steps.
    pub fn downtime(&self) -> Duration {
        let each = self.steps.iter().map(|taken| taken.took);
        each.fold(Duration::ZERO, Duration::saturating_add)
    }

    /// When its last step ended, since the migration's beginning.
    pub fn ended(&self) -> Duration {
        self.began.saturating_add(self.downtime())
    }
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "result")]
pub enum Outcome {
    /// The guest runs on the other side.
    Moved,
    /// It was called off, and the guest is still here.
    Cancelled,
    /// It failed, and the guest has not gone.
    Failed {
        /// Where the guest is, and why, in one line.
        why: String,
    },
    /// The guest had gone to the other side, and is nowhere any more: its memory was in both places, and one of them ended.
    Lost {
        /// Why, in one line.
        why: String,
    },
    /// The guest has gone to the other side, and some of its memory could not follow it: it was stopped there for that, or has
    /// poison in its place.
    Damaged {
        /// How much, and why, in one line.
        why: String,
    },
    /// The other side may have the guest and does not say so: it stays paused here until that is known.
    Unsettled {
        /// Why, in one line.
        why: String,
    },
}

/// A report that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Where it is.
    pub path: String,
    /// Why it is not, in one line.
    pub failed: Option<String>,
}

/// What had been sent by when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sample {
    /// When, since the migration's beginning.
    #[serde(rename = "at-us", with = "micros")]
    pub at: Duration,
    /// Pages, of all rounds so far.
    pub pages_sent: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Of the pages those that somebody waited for at the destination, behind a switch to post-copy.
    #[serde(default)]
    pub demand_pages: u64,
}

impl MigrationRecord {
    /// Of a migration that begins `now`.
    pub fn new(to: String, memory_pages: u64, settings: Settings, now: SystemTime) -> Self {
        let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH);
        MigrationRecord {
            to,
            began_unix_s: since_1970.map_or(0, |since| since.as_secs()),
            took: None,
            elapsed: Duration::ZERO,
            memory_pages,
            unanswered: None,
            progress: Duration::ZERO,
            paused: false,
            settings,
            total: Total::default(),
            rounds: Vec::new(),
            at_work: None,
            forecast: None,
            throttle_percent: 0,
            switch_over: None,
            postcopy: None,
            outcome: None,
            report: None,
            samples: Vec::new(),
            sample_interval: FIRST_INTERVAL,
        }
    }

    /// The guest is offered to the destination, whose answer is waited for so long.
    pub fn offered(&mut self, at: Duration, patience: Duration) {
        self.progress = at;
        let since = at;
        self.unanswered = Some(Unanswered { since, patience });
    }

    /// The destination takes it.
    pub fn accepted(&mut self, at: Duration) {
        (self.progress, self.unanswered) = (at, None);
    }

    /// A round begins, of `pages` that are dirty. `stopped`: the guest is paused, and this is the last one. A round
    /// that is at work ends.
    pub fn round_begins(&mut self, at: Duration, pages: u64, stopped: bool) {
        self.round_ends(at, 0);
        (self.progress, self.unanswered) = (at, None);
        self.total.rounds = self.total.rounds.saturating_add(1);
        self.at_work = Some(Round {
            number: self.total.rounds,
            began: at,
            pages_to_send: pages,
            stopped,
            throttle_percent: self.throttle_percent,
            ..Round::default()
        });
        self.sample(at);
    }

    /// The round at work has sent `pages` more, of which `zero_pages` are nothing but zeros, with `wire_bytes`. Cheap
    /// enough for each batch of some pages.
    pub fn sent(&mut self, at: Duration, pages: u64, zero_pages: u64, wire_bytes: u64) {
        let add = |to: &mut u64, more: u64| *to = to.saturating_add(more);
        if let Some(round) = &mut self.at_work {
            add(&mut round.pages_sent, pages);
            add(&mut round.zero_pages, zero_pages);
            add(&mut round.wire_bytes, wire_bytes);
        }
        self.progress = at;
        add(&mut self.total.pages_sent, pages);
        add(&mut self.total.zero_pages, zero_pages);
        add(&mut self.total.wire_bytes, wire_bytes);
        let last = self.samples.last().map_or(Duration::ZERO, |last| last.at);
        if at.saturating_sub(last) >= self.sample_interval {
            self.sample(at);
        }
    }

    /// The round at work is done; meanwhile the guest and its devices have dirtied `pages_dirtied` different pages.
    /// Nothing happens if none is.
    pub fn round_ends(&mut self, at: Duration, pages_dirtied: u64) {
        let Some(mut round) = self.at_work.take() else {
            return;
        };
        self.progress = at;
        round.took = at.saturating_sub(round.began);
        round.pages_dirtied = pages_dirtied;
        if self.rounds.len() >= MOST_ROUNDS {
            self.rounds.remove(1);
        }
        self.rounds.push(round);
        self.sample(at);
    }

    /// What is ahead, seen at `at`.
    pub fn forecast_is(&mut self, at: Duration, forecast: &Forecast) {
        self.forecast = Some(Ahead::new(at, forecast));
    }

    /// The guest is slowed by `percent` of its vCPUs' time from the next round on.
    pub fn throttled(&mut self, percent: u8) {
        self.throttle_percent = percent;
    }

    /// The guest is told to pause.
    pub fn stop_begins(&mut self, at: Duration) {
        self.progress = at;
        self.switch_over = Some(SwitchOver {
            began: at,
            steps: Vec::new(),
        });
    }

    /// `step` of the stop is done: it took from where the one before ended until `at`. Nothing happens before
    /// [`stop_begins`](Self::stop_begins).
    pub fn step_ends(&mut self, step: Step, at: Duration) {
        if let Some(stop) = &mut self.switch_over {
            self.progress = at;
            let took = at.saturating_sub(stop.ended());
            stop.steps.push(StepTaken { step, took });
        }
    }

    /// The migration is over.
    pub fn ends(&mut self, at: Duration, outcome: Outcome) {
        self.round_ends(at, 0);
        self.unanswered = None;
        (self.took, self.elapsed) = (Some(at), at);
        self.outcome = Some(outcome);
    }

    /// The same as it is `now`: how long it and its round at work have been going, by which that has a rate.
    #[must_use]
    pub fn as_of(mut self, now: Duration) -> Self {
        if self.took.is_none() {
            self.elapsed = now;
        }
        if let Some(round) = &mut self.at_work {
            round.took = now.saturating_sub(round.began);
        }
        self
    }

    /// For how long nothing has come about `now`, where that is longer than what is asked for lets expect: a frame of a
    /// limited bandwidth takes its time.
    pub fn stands_still(&self, now: Duration) -> Option<Duration> {
        let frame = self.settings.limit_bytes_per_s.map_or(0.0, |limit| {
            let frames = MOST_CONTENTS as f64 * f64::from(self.settings.connections);
            2.0 * frames / limit.max(1) as f64
        });
        let frame = Duration::try_from_secs_f64(frame).unwrap_or(Duration::MAX);
        let still = now.saturating_sub(self.progress);
        let goes = self.outcome.is_none() && self.unanswered.is_none() && self.total.rounds > 0;
        (goes && still >= STILL.max(frame)).then_some(still)
    }

    /// For how long the destination owes its answer `now`, where that is long, and after how long it is given up.
    pub fn owes_answer(&self, now: Duration) -> Option<(Duration, Duration)> {
        let Unanswered { since, patience } = self.unanswered?;
        let owed = now.saturating_sub(since);
        (owed >= UNANSWERED).then_some((owed, patience))
    }

    /// The guest's downtime: none if it was never stopped.
    pub fn downtime(&self) -> Option<Duration> {
        self.switch_over.as_ref().map(SwitchOver::downtime)
    }

    /// In words, for people: some lines, each with its end. Control characters are escaped.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        let (to, took) = (printable(&self.to), self.took.unwrap_or_default());
        // A string takes everything.
        let _ = match &self.outcome {
            None => {
                let now = progress::at_work(self, self.elapsed);
                let sent = self.at_work.as_ref().and_then(|round| {
                    let sent = round.pages_sent.min(round.pages_to_send);
                    // In numbers that hold it, whatever they are.
                    (u128::from(sent) * 100).checked_div(round.pages_to_send.into())
                });
                let sent = sent.map_or(String::new(), |sent| {
                    format!(", {sent} % of its pages sent")
                });
                let so_far = units::time(self.elapsed);
                let way = match progress::gone_before(self) {
                    None => format!("on its way to {to}"),
                    Some(followed) => {
                        let other = followed.recovered_to.as_deref();
                        let other = other.map_or(String::new(), |other| {
                            format!(", by way of {}", printable(other))
                        });
                        format!("gone to {to}, and its memory follows{other}; under way")
                    }
                };
                writeln!(text, "{way} for {so_far} by now\nnow: {now}{sent}")
            }
            Some(Outcome::Moved) => writeln!(
                text,
                "moved to {to} in {}{}",
                units::time(took),
                if self.paused {
                    ", paused as it was"
                } else {
                    ""
                }
            ),
            Some(Outcome::Cancelled) => writeln!(
                text,
                "called off after {}; the guest is still here",
                units::time(took)
            ),
            Some(Outcome::Failed { why }) => writeln!(
                text,
                "failed after {}: {}",
                units::time(took),
                printable(why)
            ),
            Some(Outcome::Lost { why }) => writeln!(
                text,
                "lost after {}, when it was at {to}: {}",
                units::time(took),
                printable(why)
            ),
            Some(Outcome::Damaged { why }) => writeln!(
                text,
                "damaged after {}, when it was at {to}: {}",
                units::time(took),
                printable(why)
            ),
            Some(Outcome::Unsettled { why }) => writeln!(
                text,
                "unsettled after {}, the guest stays paused here: {}",
                units::time(took),
                printable(why)
            ),
        };
        let Total {
            rounds,
            pages_sent,
            zero_pages,
            wire_bytes,
        } = self.total;
        let _ = writeln!(
            text,
            "memory {}; sent {} pages ({} of zeros) in {} {}, {} on the wire",
            units::bytes(units::pages(self.memory_pages)),
            units::count(pages_sent),
            units::count(zero_pages),
            units::count(rounds.into()),
            if rounds == 1 { "round" } else { "rounds" },
            units::bytes(wire_bytes),
        );
        match (self.throttle_percent, &self.outcome) {
            (0, _) => {}
            (percent, None) => {
                let _ = writeln!(text, "the guest is slowed by {percent} %");
            }
            (percent, Some(_)) => {
                let _ = writeln!(text, "the guest was slowed by up to {percent} %");
            }
        }
        if let Some(stop) = &self.switch_over {
            let steps: Vec<String> = stop
                .steps
                .iter()
                .map(|taken| format!("{} {}", taken.step.name(), units::time(taken.took)))
                .collect();
            let _ = writeln!(
                text,
                "downtime {}: {}",
                units::time(stop.downtime()),
                steps.join(", ")
            );
        }
        if let Some(followed) = &self.postcopy {
            let _ = writeln!(text, "{}", followed.words());
        }
        if let Some(foretold) = self.foretold() {
            let _ = writeln!(text, "foretold: {foretold}");
        }
        match &self.report {
            None => {}
            Some(Report { path, failed: None }) => {
                let _ = writeln!(text, "report in {}", printable(path));
            }
            Some(Report {
                failed: Some(why), ..
            }) => {
                let _ = writeln!(text, "no report: {}", printable(why));
            }
        }
        text
    }

    /// What was foretold last, in words: what is ahead while the guest runs here, and of its stop how long its pages would
    /// take.
    pub fn foretold(&self) -> Option<String> {
        let ahead = self.forecast.as_ref()?;
        let [least, _, most] = ahead.downtime;
        match (&self.switch_over, &self.outcome) {
            // Its last pages were none.
            _ if self.postcopy.is_some() => None,
            (Some(_), _) if most.is_zero() => Some(
                "no last pages; the downtime is for the guest's state and the hand-over alone"
                    .into(),
            ),
            (Some(_), _) => {
                let range = progress::range(least, most);
                Some(format!("{range} of the downtime for the last pages"))
            }
            (None, None) => {
                let last = self.samples.last().map_or(ahead.at, |last| last.at);
                Some(progress::forecast(ahead, last.max(self.elapsed)))
            }
            // It came to nothing for another reason, or by this.
            (None, Some(_)) => Some(progress::forecast(ahead, ahead.at)),
        }
    }

    fn sample(&mut self, at: Duration) {
        let sample = Sample {
            at,
            pages_sent: self.total.pages_sent,
            wire_bytes: self.total.wire_bytes,
            demand_pages: self.postcopy.as_ref().map_or(0, |of| of.demand_pages),
        };
        if self.samples.last() == Some(&sample) {
            return;
        }
        if self.samples.len() >= MOST_SAMPLES {
            let mut keep = false;
            self.samples.retain(|_| {
                keep = !keep;
                keep
            });
            self.sample_interval = self.sample_interval.saturating_mul(2);
        }
        self.samples.push(sample);
    }
}

/// Durations as whole microseconds.
pub(in crate::migration) mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    fn number(time: &Duration) -> u64 {
        u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
    }

    pub fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        number(time).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_micros)
    }

    pub mod optional {
        use super::*;

        pub fn serialize<S: Serializer>(time: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
            time.as_ref().map(number).serialize(to)
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Duration>, D::Error> {
            Option::<u64>::deserialize(from).map(|time| time.map(Duration::from_micros))
        }
    }

    pub mod span {
        use super::*;

        pub fn serialize<S: Serializer>(span: &[Duration; 3], to: S) -> Result<S::Ok, S::Error> {
            span.each_ref().map(number).serialize(to)
        }

        pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<[Duration; 3], D::Error> {
            <[u64; 3]>::deserialize(from).map(|span| span.map(Duration::from_micros))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dirty_log::estimate::Span;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn span<T>(low: T, mean: T, high: T) -> Span<T> {
        Span { low, mean, high }
    }

    fn record() -> MigrationRecord {
        let settings = Settings {
            limit_bytes_per_s: None,
            downtime: ms(100),
            connections: 2,
            compression: "none".into(),
            tls: false,
            when_stuck: WhenStuck::default(),
            postcopy: When::default(),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        MigrationRecord::new("unix:/x".into(), 1000, settings, now)
    }

    #[test]
    fn what_is_told_in_order_is_rounds_a_stop_and_an_end() {
        let mut record = record();
        record.round_begins(ms(10), 1000, false);
        record.sent(ms(500), 600, 100, 2_000_000);
        record.sent(ms(1000), 400, 0, 1_600_000);
        record.round_ends(ms(1010), 50);
        record.stop_begins(ms(1020));
        record.step_ends(Step::Pause, ms(1021));
        record.round_begins(ms(1021), 50, true);
        record.sent(ms(1022), 50, 0, 200_000);
        record.round_ends(ms(1023), 0);
        record.step_ends(Step::LastPages, ms(1023));
        record.step_ends(Step::State, ms(1026));
        record.step_ends(Step::HandOver, ms(1027));
        record.step_ends(Step::Start, ms(1030));
        record.ends(ms(1040), Outcome::Moved);

        let [first, last] = &record.rounds[..] else {
            panic!("{record:?}");
        };
        assert_eq!((first.number, first.took), (1, ms(1000)));
        assert_eq!((first.pages_sent, first.zero_pages), (1000, 100));
        assert_eq!(
            (first.dirty_rate(), first.throughput()),
            (50.0, 3_600_000.0)
        );
        assert!(last.stopped && last.number == 2 && last.took == ms(2));
        assert_eq!(record.total.pages_sent, 1050);
        assert_eq!(record.downtime(), Some(ms(10)));
        assert_eq!(record.took, Some(ms(1040)));
        assert_eq!(
            record.summary(),
            "moved to unix:/x in 1.04 s\n\
             memory 3.91 MiB; sent 1,050 pages (100 of zeros) in 2 rounds, 3.62 MiB on the wire\n\
             downtime 10.0 ms: pause 1.00 ms, last pages 2.00 ms, state 3.00 ms, hand-over 1.00 ms, start 3.00 ms\n"
        );
    }

    #[test]
    fn what_was_foretold_is_kept_and_told_with_what_came_of_it() {
        let forecast = Forecast {
            outcome: ForecastOutcome::Converges,
            rounds: span(1, 1, 1),
            time: span(ms(3000), ms(4000), ms(5000)),
            pages: span(1, 2, 3),
            downtime: span(ms(4), ms(5), ms(6)),
        };
        let mut record = record();
        assert_eq!(record.foretold(), None);
        record.round_begins(ms(0), 1000, false);
        record.round_ends(ms(1000), 50);
        record.forecast_is(ms(1000), &forecast);
        assert!(
            record
                .summary()
                .contains("\nforetold: stops in 3.00 s to 5.00 s\n")
        );
        // One that idles stops at once behind that.
        record.stop_begins(ms(1001));
        record.step_ends(Step::Pause, ms(1002));
        record.ends(ms(1010), Outcome::Moved);
        let last = "\nforetold: 4.00 ms to 6.00 ms of the downtime for the last pages\n";
        assert!(record.summary().ends_with(last), "{}", record.summary());
        record.paused = true;
        let first = "moved to unix:/x in 1.01 s, paused as it was\n";
        assert!(record.summary().starts_with(first), "{}", record.summary());
        record.report = Some(Report {
            path: "/r".into(),
            failed: None,
        });
        assert!(record.summary().ends_with("\nreport in /r\n"));
        record.report.as_mut().unwrap().failed = Some("full".into());
        assert!(record.summary().ends_with("\nno report: full\n"));
    }

    #[test]
    fn it_comes_back_from_json_as_it_went_and_says_there_what_follows_from_it() {
        let mut record = record();
        record.round_begins(ms(0), 1000, false);
        record.sent(ms(500), 600, 100, 2_000_000);
        record.round_ends(ms(1000), 50);
        record.round_begins(ms(1000), 50, false);
        let forecast = Forecast {
            outcome: ForecastOutcome::Uncertain,
            rounds: span(1, 2, 3),
            time: span(ms(1), ms(2), ms(3)),
            pages: span(1, 2, 3),
            downtime: span(ms(4), ms(5), ms(6)),
        };
        record.forecast_is(ms(1000), &forecast);
        record.stop_begins(ms(1500));
        record.step_ends(Step::Pause, ms(1502));
        for outcome in [
            None,
            Some(Outcome::Moved),
            Some(Outcome::Failed { why: "x".into() }),
        ] {
            record.outcome = outcome;
            let json = serde_json::to_value(&record).unwrap();
            assert_eq!(json["rounds"][0]["pages-dirtied-per-s"], 50);
            assert_eq!(json["rounds"][0]["wire-bytes-per-s"], 2_000_000);
            assert_eq!(json["switch-over"]["downtime-us"], 2000);
            assert_eq!(json["switch-over"]["steps"][0]["step"], "pause");
            assert_eq!(json["forecast"]["time-us"][2], 3000);
            assert_eq!(json["took-us"], serde_json::Value::Null);
            let back: MigrationRecord = serde_json::from_value(json).unwrap();
            assert_eq!(back, record);
        }
        let failed = serde_json::to_value(&record.outcome).unwrap();
        assert_eq!(failed, serde_json::json!({"result": "failed", "why": "x"}));
    }

    #[test]
    fn in_words_it_says_how_long_it_has_been_going_what_is_left_and_how_fast_it_goes() {
        let mut record = record();
        let first = |record: &MigrationRecord| {
            let summary = record.summary();
            summary.lines().take(2).collect::<Vec<_>>().join("; ")
        };
        let early = record.clone().as_of(ms(300));
        assert_eq!(
            first(&early),
            "on its way to unix:/x for 300 ms by now; now: connecting"
        );
        record.round_begins(ms(500), 1000, false);
        record.sent(ms(1000), 600, 100, 2 << 20);
        assert_eq!(
            first(&record.clone().as_of(ms(2500))),
            "on its way to unix:/x for 2.50 s by now; now: round 1, 1.56 MiB left, 1.00 MiB/s, 60 % of its pages sent"
        );
        // A round of no pages, and numbers that cannot be.
        record.round_begins(ms(3000), 0, true);
        record.sent(ms(3001), u64::MAX, 0, 0);
        let last = first(&record.as_of(ms(3001)));
        assert!(
            last.contains("now: guest stopped, last pages, 0 B left, "),
            "{last}"
        );
        assert!(!last.contains('%'), "{last}");
    }

    #[test]
    fn of_a_guest_that_has_gone_it_says_so_and_where_its_memory_goes_now() {
        let mut record = record();
        record.stop_begins(ms(100));
        record.goes_before(ms(100), 1000);
        record.step_ends(Step::Start, ms(110));
        let first = |record: &MigrationRecord| {
            let summary = record.clone().as_of(ms(300)).summary();
            summary.lines().next().unwrap().to_owned()
        };
        assert_eq!(
            first(&record),
            "gone to unix:/x, and its memory follows; under way for 300 ms by now"
        );
        record.postcopy.as_mut().unwrap().recovered_to = Some("unix:/y".into());
        assert_eq!(
            first(&record),
            "gone to unix:/x, and its memory follows, by way of unix:/y; under way for 300 ms by now"
        );
    }

    #[test]
    fn a_round_that_stands_still_is_told_from_one_that_may_send_little() {
        let mut record = record();
        assert_eq!(record.stands_still(ms(99_000)), None, "it connects");
        record.round_begins(ms(1000), 1000, false);
        record.sent(ms(2000), 1, 0, 4096);
        assert_eq!(record.stands_still(ms(6999)), None);
        assert_eq!(record.stands_still(ms(7000)), Some(ms(5000)));
        let said = record.clone().as_of(ms(9000)).summary();
        assert!(
            said.contains("stands still: nothing has come about for 7.00 s"),
            "{said}"
        );
        record.sent(ms(9000), 1, 0, 4096);
        assert_eq!(record.stands_still(ms(9001)), None);
        // Two connections, each with a frame of a MiB under way.
        record.settings.limit_bytes_per_s = Some(128 << 10);
        assert_eq!(record.stands_still(ms(9000 + 31_999)), None);
        assert!(record.stands_still(ms(9000 + 32_000)).is_some());
        record.ends(ms(50_000), Outcome::Cancelled);
        assert_eq!(record.stands_still(ms(99_000)), None);
    }

    #[test]
    fn a_stop_that_had_no_pages_before_it_says_so() {
        let forecast = Forecast {
            outcome: ForecastOutcome::Converges,
            rounds: span(1, 1, 1),
            time: span(ms(0), ms(0), ms(0)),
            pages: span(0, 0, 0),
            downtime: span(ms(0), ms(0), ms(0)),
        };
        let mut record = record();
        record.forecast_is(ms(1), &forecast);
        record.stop_begins(ms(2));
        record.step_ends(Step::Pause, ms(9));
        record.ends(ms(10), Outcome::Moved);
        let summary = record.summary();
        assert!(summary.contains("\ndowntime 7.00 ms"), "{summary}");
        assert!(
            summary.contains("\nforetold: no last pages; the downtime is "),
            "{summary}"
        );
    }

    #[test]
    fn asked_while_a_round_is_at_work_it_says_how_long_and_how_fast_that_has_been_going() {
        let mut record = record();
        record.round_begins(ms(500), 1000, false);
        record.sent(ms(1000), 600, 100, 2_000_000);
        let json = |now| serde_json::to_value(record.clone().as_of(ms(now))).unwrap();
        let said = json(2500);
        assert_eq!(said["elapsed-us"], 2_500_000);
        assert_eq!(said["at-work"]["took-us"], 2_000_000);
        assert_eq!(said["at-work"]["wire-bytes-per-s"], 1_000_000);
        assert_eq!(said["took-us"], serde_json::Value::Null);
        // Time that cannot be, or has not passed.
        assert_eq!(json(0)["at-work"]["wire-bytes-per-s"], 0);
        record.ends(ms(3000), Outcome::Cancelled);
        let over = record.clone().as_of(ms(9000));
        assert_eq!((over.elapsed, over.took), (ms(3000), Some(ms(3000))));
        assert_eq!(over.rounds[0].took, ms(2500), "it is the round's own");
    }

    #[test]
    fn it_stays_small_however_long_it_goes_and_loses_no_count() {
        let mut record = record();
        for round in 0..2 * MOST_ROUNDS as u64 {
            record.round_begins(ms(round * 100), 10, false);
            record.sent(ms(round * 100 + 50), 10, 1, 100);
            record.round_ends(ms(round * 100 + 100), 10);
        }
        assert_eq!(record.rounds.len(), MOST_ROUNDS);
        let numbers = [0, 1, MOST_ROUNDS - 1].map(|at| record.rounds[at].number);
        assert_eq!(numbers, [1, MOST_ROUNDS as u32 + 2, 2 * MOST_ROUNDS as u32]);
        assert_eq!(record.total.pages_sent, 20 * MOST_ROUNDS as u64);
        assert!(record.samples.len() <= MOST_SAMPLES);
        assert!(record.samples.len() > MOST_SAMPLES / 4);
        assert!(record.samples.is_sorted_by_key(|sample| sample.at));
        assert_eq!(record.samples[0].at, ms(0));
    }

    #[test]
    fn nothing_that_is_told_out_of_order_is_a_panic() {
        let mut record = record();
        record.step_ends(Step::Start, ms(5));
        record.round_ends(ms(5), 1);
        record.sent(ms(4), u64::MAX, u64::MAX, u64::MAX);
        record.sent(ms(3), 1, 1, 1);
        record.stop_begins(ms(9));
        record.step_ends(Step::Start, ms(1));
        record.round_begins(ms(9), u64::MAX, true);
        record.round_ends(ms(1), u64::MAX);
        record.ends(Duration::MAX, Outcome::Cancelled);
        assert_eq!(record.downtime(), Some(Duration::ZERO));
        record.summary();
        serde_json::to_string(&record).unwrap();
    }
}
