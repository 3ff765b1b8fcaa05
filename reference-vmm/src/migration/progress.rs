// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration's progress on stderr: one line, rewritten in place where nobody else writes, or a line a second.
//!
//! [`line()`] is what there is to say, from a record and the time. [`Progress`] says when, and is told the time as well.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

use super::postcopy::record::Followed;
use super::record::{Ahead, Converges, MigrationRecord, Outcome, Round, Step, per_second};
use crate::stderr;
use crate::units;

/// In place, a terminal is told so often; else a file or a pipe.
const IN_PLACE_INTERVAL: Duration = Duration::from_millis(100);
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// A rate of the round at work counts from here on; before, the last round's does.
const TELLING: Duration = Duration::from_millis(200);

/// Beyond this nobody waits.
const A_DAY: Duration = Duration::from_secs(24 * 3600);

/// Columns of a terminal that does not say how many it has.
const COLUMNS: usize = 80;

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// One line, rewritten: a terminal of so many columns to which nobody else writes meanwhile.
    InPlace {
        /// What is longer would wrap, and not be rewritten.
        columns: usize,
    },
    /// A line a second at most: a file, a pipe, or a terminal that shows the guest's console as well.
    Lines,
}

impl Manner {
    /// What suits stderr. `alone`: nobody else writes to a terminal meanwhile, as a guest's console on stdout would.
    pub fn of_stderr(alone: bool) -> Self {
        match alone && std::io::stderr().is_terminal() {
            true => Manner::InPlace {
                columns: columns().unwrap_or(COLUMNS),
            },
            false => Manner::Lines,
        }
    }

    /// How often there is something new to be seen: who asks more often asks in vain.
    pub fn interval(self) -> Duration {
        match self {
            Manner::InPlace { .. } => IN_PLACE_INTERVAL,
            Manner::Lines => LINE_INTERVAL,
        }
    }
}

/// Says on stderr how a migration goes, as often as is good.
#[derive(Debug)]
pub struct Progress {
    manner: Manner,
    said: Option<Duration>,
}

impl Progress {
    /// Shown like that.
    pub fn new(manner: Manner) -> Self {
        Progress { manner, said: None }
    }

    /// Says where `record` is `now`, the time since the migration began, if it is time for that. Waits for stderr's
    /// reader no longer than [`stderr::PATIENCE`], and drops the rest; a closed stderr is no error.
    pub fn show(&mut self, record: &MigrationRecord, now: Duration) {
        if let Some(text) = self.due(record, now) {
            stderr::write(text.as_bytes());
        }
    }

    /// The migration is over: ends the line that is rewritten, and says nothing where none was begun. How it went is
    /// the [summary](MigrationRecord::summary)'s.
    pub fn end(&mut self) {
        if let Some(text) = self.rest() {
            stderr::write(text.as_bytes());
        }
    }

    /// What [`show`](Self::show) writes: `None` as long as it is not time.
    pub fn due(&mut self, record: &MigrationRecord, now: Duration) -> Option<String> {
        let interval = self.manner.interval();
        if self
            .said
            .is_some_and(|said| now.saturating_sub(said) < interval)
        {
            return None;
        }
        self.said = Some(now);
        let line = line(record, now);
        Some(match self.manner {
            // The terminal's last column stays free: some wrap as soon as it is written to. What was there is erased
            // behind the new text and not before it, which would flicker.
            Manner::InPlace { columns } => {
                let fits = columns.saturating_sub(1);
                let text: String = line.chars().take(fits).collect();
                format!("\r{text}\x1b[K")
            }
            Manner::Lines => line + "\n",
        })
    }

    /// What [`end`](Self::end) writes.
    pub fn rest(&mut self) -> Option<String> {
        let begun = self.said.take().is_some();
        (begun && self.manner != Manner::Lines).then(|| "\r\x1b[K".into())
    }
}

/// One line, without its end, of ASCII: where `record` is `now`, the time since the migration began.
///
/// ```text
/// migration: round 3, 21.4 MiB left, 112 MiB/s, dirties 3.91 MiB/s, stops in 3.00 s to 5.00 s
/// ```
///
/// The round, what of it is left, bytes a second on the wire, what the guest dirties in a second by the last round
/// that tells, what the guest is slowed by if it is, and the forecast.
pub fn line(record: &MigrationRecord, now: Duration) -> String {
    format!("migration: {}", far(record, now))
}

/// The same without its first word.
pub(crate) fn far(record: &MigrationRecord, now: Duration) -> String {
    let mut text = at_work(record, now);
    if record.outcome.is_some() || record.switch_over.is_some() {
        return text;
    }
    // A string takes everything.
    if let Some(told) = record.rounds.iter().rfind(|round| !round.took.is_zero()) {
        let dirtied = per_second(units::pages(told.pages_dirtied), told.took);
        let _ = write!(text, ", dirties {}", units::rate(dirtied));
    }
    if record.throttle_percent > 0 {
        let _ = write!(text, ", slowed by {} %", record.throttle_percent);
    }
    if let Some(ahead) = &record.forecast {
        let _ = write!(text, ", {}", forecast(ahead, now));
    }
    text
}

/// What is done `now`, what of it is left, and how fast it goes.
pub(super) fn at_work(record: &MigrationRecord, now: Duration) -> String {
    let mut text = String::new();
    if let (None, Some(followed)) = (&record.outcome, gone_before(record)) {
        return followed.far();
    }
    // A string takes everything.
    let _ = match (&record.outcome, &record.at_work) {
        // It is asked for still, and the guest stands still meanwhile.
        (Some(Outcome::Unsettled { .. }), _) => write!(
            text,
            "in doubt, the destination does not answer: look where the guest is, and say so (ctl migrate-settle here|there)"
        ),
        (Some(_), _) => write!(text, "over"),
        (None, Some(round)) if round.stopped => write!(text, "guest stopped, last pages"),
        (None, Some(round)) => write!(text, "round {}", round.number),
        (None, None) if record.switch_over.is_some() => write!(text, "guest stopped, hand-over"),
        (None, None) if record.unanswered.is_some() => match record.owes_answer(now) {
            None => write!(text, "connected, the destination is to answer"),
            Some((owed, patience)) => write!(
                text,
                "connected, the destination has not answered for {} (given up after {})",
                units::time(owed),
                units::time(patience)
            ),
        },
        (None, None) if record.rounds.is_empty() => write!(text, "connecting"),
        (None, None) => write!(text, "between rounds"),
    };
    if record.outcome.is_some() {
        return text;
    }
    if let Some(round) = &record.at_work {
        let left = units::bytes(units::pages(round.pages_left()));
        let _ = write!(text, ", {left} left");
    }
    if let Some(still) = record.stands_still(now) {
        let still = units::time(still);
        let _ = write!(text, ", stands still: nothing has come about for {still}");
    } else if let Some(throughput) = throughput(record, now) {
        let _ = write!(text, ", {}", units::rate(throughput));
    }
    text
}

/// What follows a guest that has gone.
pub(super) fn gone_before(record: &MigrationRecord) -> Option<&Followed> {
    let steps = record.switch_over.iter().flat_map(|stop| &stop.steps);
    let gone = steps.last().is_some_and(|taken| taken.step == Step::Start);
    record.postcopy.as_ref().filter(|_| gone)
}

/// Bytes a second: of the round at work, or of the last one as long as that says little.
fn throughput(record: &MigrationRecord, now: Duration) -> Option<f64> {
    let at_work = record.at_work.as_ref().and_then(|round| {
        let since = now.saturating_sub(round.began);
        (since >= TELLING).then(|| per_second(round.wire_bytes, since))
    });
    let last = || record.rounds.iter().rfind(|round| !round.took.is_zero());
    at_work.or_else(|| last().map(Round::throughput))
}

/// What is ahead, in words, `now`: with its range, and no more certain than it is.
pub fn forecast(ahead: &Ahead, now: Duration) -> String {
    let gone = now.saturating_sub(ahead.at);
    let [best, _, worst] = ahead.time.map(|time| time.saturating_sub(gone));
    let stop = {
        let [least, _, most] = ahead.downtime;
        range(least, most)
    };
    match ahead.converges {
        Converges::Yes if worst.is_zero() => "stops now".into(),
        Converges::Yes if best.is_zero() => format!("stops within {}", units::time(worst)),
        Converges::Yes => format!("stops in {}", range(best, worst)),
        Converges::Perhaps if best >= A_DAY || best.is_zero() => {
            "may not converge at this rate".into()
        }
        Converges::Perhaps => format!(
            "may not converge at this rate (in {} at best)",
            units::time(best)
        ),
        Converges::No => {
            format!("will not converge at this rate (a stop would take {stop})")
        }
    }
}

/// `3.00 s to 5.00 s`; one of them where both read the same.
pub(super) fn range(least: Duration, most: Duration) -> String {
    if least >= A_DAY {
        return "more than a day".into();
    }
    let least = units::time(least);
    match units::time(most) {
        _ if most >= A_DAY => format!("{least} or more"),
        most if most == least => least,
        most => format!("{least} to {most}"),
    }
}

/// Columns of stderr's terminal.
fn columns() -> Option<usize> {
    let mut size = std::mem::MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ fills a winsize when it succeeds; zeros are one as well.
    let size = unsafe {
        if libc::ioctl(libc::STDERR_FILENO, libc::TIOCGWINSZ, size.as_mut_ptr()) != 0 {
            return None;
        }
        size.assume_init()
    };
    (size.ws_col > 0).then(|| size.ws_col.into())
}

#[cfg(test)]
mod tests {
    use super::super::postcopy::When;
    use super::super::record::{Settings, Step};
    use super::super::source::WhenStuck;
    use super::*;
    use std::time::SystemTime;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn record() -> MigrationRecord {
        let settings = Settings {
            limit_bytes_per_s: None,
            downtime: ms(100),
            connections: 1,
            compression: "none".into(),
            tls: false,
            when_stuck: WhenStuck::default(),
            postcopy: When::default(),
        };
        MigrationRecord::new("unix:/x".into(), 1 << 18, settings, SystemTime::UNIX_EPOCH)
    }

    fn ahead(converges: Converges, best: u64, worst: u64) -> Ahead {
        Ahead {
            at: ms(2000),
            converges,
            rounds: [1, 2, 3],
            time: [ms(best), ms(best), ms(worst)],
            downtime: [ms(500), ms(700), ms(900)],
        }
    }

    #[test]
    fn a_line_says_where_it_is_what_is_left_and_how_fast() {
        let mut record = record();
        assert_eq!(line(&record, ms(0)), "migration: connecting");
        record.offered(ms(0), ms(60_000));
        let answer = "migration: connected, the destination is to answer";
        assert_eq!(line(&record, ms(2999)), answer);
        let owed = "migration: connected, the destination has not answered for 3.00 s (given up after 1 min 0 s)";
        assert_eq!(line(&record, ms(3000)), owed);
        record.accepted(ms(0));
        assert_eq!(line(&record, ms(9000)), "migration: connecting");
        record.round_begins(ms(0), 1 << 18, false);
        assert_eq!(
            line(&record, ms(100)),
            "migration: round 1, 1.00 GiB left",
            "too early for a rate"
        );
        record.sent(ms(1000), 1 << 17, 0, 512 << 20);
        assert_eq!(
            line(&record, ms(1000)),
            "migration: round 1, 512 MiB left, 512 MiB/s"
        );
        record.sent(ms(2000), 1 << 17, 0, 512 << 20);
        record.round_ends(ms(2000), 2000);
        record.round_begins(ms(2000), 2000, false);
        record.forecast = Some(ahead(Converges::Yes, 3000, 5000));
        assert_eq!(
            line(&record, ms(2000)),
            "migration: round 2, 7.81 MiB left, 512 MiB/s, dirties 3.91 MiB/s, stops in 3.00 s to 5.00 s"
        );
        record.throttled(30);
        assert_eq!(
            line(&record, ms(2000)),
            "migration: round 2, 7.81 MiB left, 512 MiB/s, dirties 3.91 MiB/s, slowed by 30 %, stops in 3.00 s to 5.00 s"
        );
        record.stop_begins(ms(2100));
        record.round_begins(ms(2100), 10, true);
        assert!(line(&record, ms(2100)).starts_with("migration: guest stopped, last pages"));
        record.round_ends(ms(2101), 0);
        record.step_ends(Step::LastPages, ms(2101));
        assert!(line(&record, ms(2101)).starts_with("migration: guest stopped, hand-over"));
        let why = "it cannot be reached".into();
        record.ends(ms(2102), Outcome::Unsettled { why });
        let doubt = line(&record, ms(2102));
        assert!(doubt.starts_with("migration: in doubt, "), "{doubt}");
        record.ends(ms(2103), Outcome::Moved);
        assert_eq!(line(&record, ms(2103)), "migration: over");
    }

    #[test]
    fn a_forecast_is_no_more_certain_than_it_is_and_its_time_runs() {
        let yes = ahead(Converges::Yes, 3000, 5000);
        assert_eq!(forecast(&yes, ms(2000)), "stops in 3.00 s to 5.00 s");
        assert_eq!(forecast(&yes, ms(4000)), "stops in 1.00 s to 3.00 s");
        assert_eq!(forecast(&yes, ms(5500)), "stops within 1.50 s");
        assert_eq!(forecast(&yes, ms(60_000)), "stops now");
        let same = ahead(Converges::Yes, 3001, 3002);
        assert_eq!(forecast(&same, ms(0)), "stops in 3.00 s");
        let perhaps = ahead(Converges::Perhaps, 3000, u64::MAX);
        assert_eq!(
            forecast(&perhaps, ms(2000)),
            "may not converge at this rate (in 3.00 s at best)"
        );
        assert_eq!(
            forecast(&perhaps, ms(9000)),
            "may not converge at this rate"
        );
        let never = ahead(Converges::Perhaps, u64::MAX, u64::MAX);
        assert_eq!(forecast(&never, ms(0)), "may not converge at this rate");
        let no = ahead(Converges::No, 0, 0);
        assert_eq!(
            forecast(&no, ms(0)),
            "will not converge at this rate (a stop would take 500 ms to 900 ms)"
        );
        let long = ahead(Converges::Yes, 3000, u64::MAX);
        assert_eq!(forecast(&long, ms(2000)), "stops in 3.00 s or more");
    }

    #[test]
    fn a_terminal_of_its_own_has_one_line_rewritten_that_never_wraps() {
        let mut record = record();
        record.round_begins(ms(0), 1 << 18, false);
        let mut progress = Progress::new(Manner::InPlace { columns: 20 });
        let first = progress.due(&record, ms(0)).unwrap();
        assert_eq!(first, "\rmigration: round 1,\x1b[K");
        assert_eq!(progress.due(&record, ms(99)), None);
        assert!(progress.due(&record, ms(100)).is_some());
        assert_eq!(progress.rest().as_deref(), Some("\r\x1b[K"));
        assert_eq!(progress.rest(), None, "once");
    }

    #[test]
    fn elsewhere_it_is_a_line_a_second_at_most() {
        let record = record();
        let mut progress = Progress::new(Manner::Lines);
        let said = (0..=50).filter_map(|tenth| progress.due(&record, ms(tenth * 100)));
        let said: Vec<_> = said.collect();
        assert_eq!(said.len(), 6);
        assert!(said.iter().all(|line| line == "migration: connecting\n"));
        assert_eq!(progress.rest(), None);
    }
}
