// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `PUT /migrate`: the migration that a machine is at, and what it did last.

#![forbid(unsafe_code)]

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::address::Address;
use super::codec::{Compression, PAGE};
use super::dial::{Dial, WayError};
use super::event::{Event, Observer, Step};
use super::guest::{Refusal, SourceGuest};
use super::limit::{LEAST_RATE, Limiter};
use super::live::{Given, LiveGuest};
use super::message::{MOST_CONNECTIONS, MigrationId};
use super::orders::{OrderError, Orders, Whereabouts};
use super::postcopy::When;
use super::record::{self, MigrationRecord, Outcome, Report};
use super::source::{After, MigrateError, Patience, Settings, WhenStuck, Why, migrate};
use super::tls::{Tls, TlsFiles};
use super::{progress, report};
use crate::devices::virtio::rng::random_id;
use crate::end::{Chain, EndSignal};
use crate::lazy::LazyError;
use crate::text::printable;
use crate::vm::{ControlError, Running};

/// How to migrate, as it is asked for: the body of `PUT /migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where to: `unix:PATH` or `tcp:HOST:PORT`.
    pub destination: String,
    /// Connections that carry pages, 1 to [`MOST_CONNECTIONS`].
    #[serde(default = "one")]
    pub connections: u32,
    /// `none`, `zstd` or `zstd:LEVEL`.
    #[serde(default = "none")]
    pub compression: String,
    /// The most bytes a second on the wire, [`LEAST_RATE`] or more for each connection.
    #[serde(default)]
    pub bandwidth_limit: Option<u64>,
    /// How long the guest may stand still, in milliseconds.
    #[serde(default = "downtime")]
    pub downtime_ms: u64,
    /// How long memory is sent while it runs, in seconds.
    #[serde(default = "time")]
    pub time_s: u64,
    /// When that does not go: `cancel`, `throttle` it until it does, or `stop` it for as long as it takes.
    #[serde(default)]
    pub when_stuck: WhenStuck,
    /// When the guest goes before its memory: `never`, `by-hand`, `auto`, `after-rounds=N` or `after=SECONDS`.
    #[serde(default)]
    pub postcopy: When,
    /// By what the two know each other.
    #[serde(default)]
    pub tls: Option<TlsFiles>,
    /// Where a [report] is written when it is over, whoever waits for that.
    #[serde(default)]
    pub report: Option<PathBuf>,
}

fn one() -> u32 {
    1
}

fn none() -> String {
    "none".into()
}

fn downtime() -> u64 {
    100
}

fn time() -> u64 {
    3600
}

impl MigrateRequest {
    /// To `destination`, with all else as it comes.
    pub fn new(destination: impl Into<String>) -> Self {
        MigrateRequest {
            destination: destination.into(),
            connections: one(),
            compression: none(),
            bandwidth_limit: None,
            downtime_ms: downtime(),
            time_s: time(),
            when_stuck: WhenStuck::Cancel,
            postcopy: When::Never,
            tls: None,
            report: None,
        }
    }

    /// The limit, if it is one with which pages arrive.
    fn rate(&self) -> Result<Option<NonZeroU64>, String> {
        let least = LEAST_RATE * u64::from(self.connections);
        match self.bandwidth_limit {
            Some(rate) if rate < least => Err(format!(
                "a bandwidth of {rate} bytes a second is too little for {} connections: {}K is the least",
                self.connections,
                least >> 10
            )),
            rate => Ok(rate.and_then(NonZeroU64::new)),
        }
    }
}

/// Says where the guest is, to give up, or to switch to post-copy: the body of `PATCH /migrate`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// To give up.
    Cancel,
    /// The guest is to go now, and its memory to follow it.
    Postcopy,
    /// The guest is here, says who has looked.
    Here,
    /// It is there.
    There,
}

/// Why nothing was begun, or what came of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutgoingError {
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
    /// One is under way.
    #[error("a migration is under way: cancel it first")]
    Busy,
    /// The guest is somebody else's.
    #[error("it has moved to {0:?}")]
    Moved(String),
    /// The last one has left the guest standing still: whose it is is to be said first, or it is to be resumed.
    #[error("{}: resume it first (ctl resume)", ControlError::HandOver)]
    HandedOver,
    /// There has been none.
    #[error("there has been no migration")]
    None,
    /// An order at the wrong time.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// Connections cannot go there.
    #[error(transparent)]
    Way(#[from] WayError),
    /// Memory that was to come later does not.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// It has not begun yet.
    #[error(
        "a migration was asked for, and all of the guest's memory is waited for first{0}; to give it up: ctl migrate-cancel"
    )]
    Settling(String),
    /// The guest did not go.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
}

/// The migrations of one machine, one at a time.
#[derive(Default)]
pub struct Outgoing {
    job: Mutex<Option<Arc<Job>>>,
    /// Called when a guest has gone, on the thread that migrates: much is left to do there.
    started: Option<fn()>,
    settling: Mutex<Option<Settling>>,
}

/// One waits for all of the guest's memory, and has not begun.
#[derive(Clone, Copy)]
struct Settling {
    cancelled: bool,
}

struct Job {
    orders: Orders,
    /// It was asked to be one that can switch to post-copy.
    may_switch: bool,
    limit: Arc<Limiter>,
    given: Arc<Given>,
    dial: Dial,
    recorder: Recorder,
}

impl Job {
    fn moved_to(&self) -> Option<String> {
        let record = self.recorder.lock();
        (record.outcome == Some(Outcome::Moved)).then(|| record.to.clone())
    }
}

impl Outgoing {
    /// One that has `started` called as soon as a guest is the destination's, on the thread that migrates, before anything
    /// else that is left to do here.
    pub(crate) fn telling(started: fn()) -> Self {
        Outgoing {
            started: Some(started),
            ..Outgoing::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Job>>> {
        self.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Migrates, and returns when the guest is at the destination, with what it took, or goes on here.
    ///
    /// # Errors
    /// [`OutgoingError`].
    pub fn migrate(
        &self,
        running: &Running,
        end: &EndSignal,
        request: &MigrateRequest,
    ) -> Result<MigrationRecord, OutgoingError> {
        self.migrate_while(running, end, request, &|| true)
    }

    /// The same. Where the guest's memory has to come first, that is waited for as long as it is `wanted`.
    ///
    /// # Errors
    /// [`OutgoingError`].
    pub(crate) fn migrate_while(
        &self,
        running: &Running,
        end: &EndSignal,
        request: &MigrateRequest,
        wanted: &dyn Fn() -> bool,
    ) -> Result<MigrationRecord, OutgoingError> {
        let wrong = |why: String| OutgoingError::Request(why);
        let address: Address = request
            .destination
            .parse()
            .map_err(|error: super::address::AddressError| wrong(error.to_string()))?;
        let compression: Compression = request.compression.parse().map_err(wrong)?;
        if !(1..=MOST_CONNECTIONS).contains(&request.connections) {
            let (asked, most) = (request.connections, MOST_CONNECTIONS);
            return Err(wrong(format!("{asked} connections: there are 1 to {most}")));
        }
        let rate = request.rate().map_err(wrong)?;
        let tls = request.tls.as_ref().map(Tls::load).transpose();
        let tls = tls.map_err(|error| wrong(error.to_string()))?;
        if let Some(path) = &request.report {
            report::check(path).map_err(|error| wrong(error.to_string()))?;
        }
        let id = random_id().map_err(|error| wrong(format!("no random number: {error}")))?;
        let limit = Arc::new(Limiter::new(rate));
        let settings = Settings {
            connections: request.connections,
            compression,
            limit: Arc::clone(&limit),
            downtime: Duration::from_millis(request.downtime_ms),
            time: Duration::from_secs(request.time_s),
            when_stuck: request.when_stuck,
            postcopy: request.postcopy,
            patience: Patience::default(),
        };
        self.settle(running, wanted)?;
        let given = Arc::default();
        let guest = LiveGuest::after(running, end, Arc::clone(&given));
        let pages = guest.memory() / PAGE as u64;
        let asked = record::Settings {
            limit_bytes_per_s: request.bandwidth_limit,
            downtime: settings.downtime,
            connections: settings.connections,
            compression: compression.to_string(),
            tls: tls.is_some(),
            when_stuck: settings.when_stuck,
            postcopy: settings.postcopy,
        };
        let now = SystemTime::now();
        let mut record = MigrationRecord::new(request.destination.clone(), pages, asked, now);
        record.paused = guest.is_paused();
        let dial = Dial::new(address, tls);
        let job = Arc::new(Job {
            dial: dial.clone(),
            orders: Orders::default(),
            may_switch: request.postcopy.may(),
            limit,
            given,
            recorder: Recorder {
                began: Instant::now(),
                record: Mutex::new(record),
                started: self.started,
            },
        });
        {
            let mut current = self.lock();
            let busy = current.as_ref().is_some_and(|job| !job.recorder.is_over());
            if busy {
                return Err(OutgoingError::Busy);
            }
            // What the last one knows of the guest's owner, and of what it let go of, is kept.
            if let Some(to) = current.as_ref().and_then(|job| job.moved_to()) {
                return Err(OutgoingError::Moved(to));
            }
            if running.is_handed_over() {
                return Err(OutgoingError::HandedOver);
            }
            *current = Some(Arc::clone(&job));
        }
        let (to, recorder) = (&request.destination, &job.recorder);
        log::info!("migration {} to {to} begins", MigrationId(id));
        let moved = migrate(
            &guest,
            &dial,
            MigrationId(id),
            &settings,
            &job.orders,
            recorder,
        );
        if moved.is_ok() {
            // Somebody may have paused or resumed it meanwhile.
            let paused = running.while_handed_over(|_, paused| paused);
            recorder.lock().paused = paused.unwrap_or_default();
        }
        recorder.ends(&moved);
        if let Some(path) = &request.report {
            recorder.write_report(path);
        }
        moved?;
        Ok(recorder.record())
    }

    /// Has all of the guest's memory come.
    fn settle(&self, running: &Running, wanted: &dyn Fn() -> bool) -> Result<(), OutgoingError> {
        let settling = || self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        *settling() = Some(Settling { cancelled: false });
        let cancelled = || settling().is_some_and(|of| of.cancelled);
        let settled = running.settle_memory_while(&|| wanted() && !cancelled());
        let was = settling().take();
        settled?;
        match was {
            // At the last moment.
            Some(Settling { cancelled: true }) => Err(LazyError::Unwanted(String::new()).into()),
            _ => Ok(()),
        }
    }

    fn is_settling(&self) -> bool {
        let settling = self.settling.lock();
        settling.unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// What the one that is under way does, or the last one did, of the guest that `running` is.
    ///
    /// # Errors
    /// [`OutgoingError::None`], [`OutgoingError::Settling`].
    pub(crate) fn record_of(&self, running: &Running) -> Result<MigrationRecord, OutgoingError> {
        if !self.is_settling() {
            return self.record();
        }
        let words = running.lazy_progress().and_then(|of| of.words());
        Err(OutgoingError::Settling(words.unwrap_or_default()))
    }

    /// Where the last one has taken the guest, if it has.
    pub fn moved_to(&self) -> Option<String> {
        self.lock().as_ref()?.moved_to()
    }

    /// Why the guest that the last one has taken away is nowhere any more, or not as it was, if it is so.
    pub fn lost(&self) -> Option<String> {
        match self.record().ok()?.outcome? {
            Outcome::Lost { why } | Outcome::Damaged { why } => Some(why),
            _ => None,
        }
    }

    /// Has a guest go on that the last migration left standing still, because what it had let go of could not be taken back.
    ///
    /// # Errors
    /// Why it cannot; none where it is not so.
    pub fn resume(&self, running: &Running, end: &EndSignal) -> Result<(), Option<Refusal>> {
        // Held, no other one begins meanwhile.
        let job = self.lock();
        let Some(job) = &*job else {
            return Err(None);
        };
        let outcome = job.recorder.lock().outcome.clone();
        match outcome {
            Some(Outcome::Failed { .. } | Outcome::Cancelled) => {
                let guest = LiveGuest::after(running, end, Arc::clone(&job.given));
                guest.take_back().map_err(Some)
            }
            Some(
                Outcome::Moved
                | Outcome::Lost { .. }
                | Outcome::Damaged { .. }
                | Outcome::Unsettled { .. },
            )
            | None => Err(None),
        }
    }

    /// What the one that is under way does, or the last one did.
    ///
    /// # Errors
    /// [`OutgoingError::None`].
    pub fn record(&self) -> Result<MigrationRecord, OutgoingError> {
        let job = self.lock();
        let job = job.as_ref().ok_or(OutgoingError::None)?;
        Ok(job.recorder.record())
    }

    /// Why nothing else is done while one is under way: how far it is, and how it is ended. Does not block.
    pub(crate) fn under_way(&self) -> String {
        let job = self.lock().clone();
        if let Some(to) = job.as_ref().and_then(|job| job.moved_to()) {
            return format!("the guest has moved to {to:?}, and this monitor ends");
        }
        let Some(job) = job.filter(|job| !job.recorder.is_over()) else {
            if self.is_settling() {
                let text = "a migration has been asked for, and all of the guest's memory is waited for first: ask again when it \
                            is done, or give it up (ctl migrate-cancel)";
                return text.into();
            }
            // It waits for what is at work, or has just come to its turn.
            let text = "a migration has been asked for, and begins: ask again when it is done";
            return text.into();
        };
        let record = job.recorder.record();
        if record.outcome.is_some() {
            let to = printable(&record.to);
            return format!(
                "a migration is in doubt, and whether the guest runs at {to} is not known: who knows says so first (ctl \
                 migrate-settle here|there)"
            );
        }
        let far = progress::far(&record, job.recorder.began.elapsed());
        if record.postcopy.is_some() {
            let to = printable(&record.to);
            return format!(
                "the guest is at {to} now, and its memory follows ({far}): ask its monitor there"
            );
        }
        format!(
            "a migration is under way ({far}): ask again when it is done, or give it up first (ctl migrate-cancel, PATCH \
             /migrate with {{\"order\": \"Cancel\"}})"
        )
    }

    /// Tells it something. Does not block.
    ///
    /// # Errors
    /// [`OutgoingError::None`], [`OutgoingError::Order`].
    pub fn order(&self, order: Order) -> Result<(), OutgoingError> {
        let mut settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Order::Cancel, Some(of)) = (order, &mut *settling) {
            of.cancelled = true;
            return Ok(());
        }
        drop(settling);
        let job = self.lock();
        let job = job.as_ref().ok_or(OutgoingError::None)?;
        match order {
            Order::Cancel => {
                job.orders.cancel()?;
                // Who waits to be let send is waiting for nothing.
                job.limit.cancel();
            }
            Order::Postcopy if job.may_switch => job.orders.switch()?,
            Order::Postcopy => return Err(OrderError::NoPostCopy.into()),
            Order::Here => match job.orders.settle(Whereabouts::Here) {
                // It stands still here, because it may have run there.
                Err(OrderError::Over) if job.given.vouch() => {}
                settled => settled?,
            },
            Order::There => job.orders.settle(Whereabouts::There)?,
        }
        Ok(())
    }
}

impl Outgoing {
    /// Has the connections of a migration go to another address from now on, when the guest has been given away: those for its
    /// memory that there are are closed, and all are made there. `tls_name` is whom the certificate there is for; without it, whom the
    /// migration was begun with one for, and if nobody was said then, the host in the address. Who does not prove to be the destination gets nothing. Blocks for as long as the resolver takes.
    ///
    /// # Errors
    /// [`OutgoingError`]; connections go as before.
    pub fn recover(&self, to: &str, tls_name: Option<&str>) -> Result<(), OutgoingError> {
        let job = self.lock().clone().ok_or(OutgoingError::None)?;
        job.orders.may_recover()?;
        let address: Address = to.parse().map_err(|error: super::address::AddressError| {
            OutgoingError::Request(error.to_string())
        })?;
        job.dial.go(&address, tls_name)?;
        log::info!("the guest that has gone is asked, and served, at {to} from now on");
        if let Some(followed) = &mut job.recorder.lock().postcopy {
            followed.recovered_to = Some(to.to_owned());
        }
        Ok(())
    }
}

/// Keeps the record.
struct Recorder {
    began: Instant,
    record: Mutex<MigrationRecord>,
    started: Option<fn()>,
}

impl Recorder {
    fn lock(&self) -> MutexGuard<'_, MigrationRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As it is now.
    fn record(&self) -> MigrationRecord {
        self.lock().clone().as_of(self.began.elapsed())
    }

    fn is_over(&self) -> bool {
        self.lock().took.is_some()
    }

    fn ends(&self, moved: &Result<(), MigrateError>) {
        let outcome = match moved {
            Ok(()) => Outcome::Moved,
            Err(error) if matches!(error.why, Why::Cancelled) => Outcome::Cancelled,
            Err(error) => {
                let why = Chain(error).to_string();
                match error.after {
                    After::Lost => Outcome::Lost { why },
                    After::Damaged => Outcome::Damaged { why },
                    _ => Outcome::Failed { why },
                }
            }
        };
        self.lock().ends(self.began.elapsed(), outcome);
    }

    /// Writes the report of a migration that is over.
    fn write_report(&self, path: &Path) {
        let failed = report::write(&self.record(), path).err();
        let failed = failed.map(|error| Chain(&error).to_string());
        if let Some(why) = &failed {
            log::warn!("the migration has no report: {why}");
        }
        let path = path.to_string_lossy().into_owned();
        self.lock().report = Some(Report { path, failed });
    }
}

impl Observer for Recorder {
    fn event(&self, event: Event<'_>) {
        let now = self.began.elapsed();
        let mut record = self.lock();
        match event {
            Event::Round { pages, stopped, .. } => record.round_begins(now, pages, stopped),
            Event::Sent { pages, zero, bytes } => record.sent(now, pages, zero, bytes),
            Event::RoundDone(done) => record.round_ends(now, done.dirtied),
            Event::Ahead { forecast, .. } => record.forecast_is(now, forecast),
            Event::Throttled(throttle) => record.throttled(throttle.as_percent()),
            Event::Step(step) => match step {
                Step::Stopping => record.stop_begins(now),
                Step::Held => record.step_ends(record::Step::Pause, now),
                Step::PagesSent => record.step_ends(record::Step::LastPages, now),
                Step::StateSent => record.step_ends(record::Step::State, now),
                Step::Prepared => record.step_ends(record::Step::HandOver, now),
                Step::Started => {
                    record.step_ends(record::Step::Start, now);
                    if let Some(tell) = self.started {
                        tell();
                    }
                }
                Step::Released | Step::StateRead => {}
            },
            Event::Connected { patience } => record.offered(now, patience),
            Event::Accepted { rehearsal, .. } => {
                record.accepted(now);
                log::info!("the destination takes the guest; its state takes {rehearsal:?}");
            }
            Event::PostCopy { missing } => {
                log::info!("the guest goes before its memory, of which {missing} pages follow it");
                record.goes_before(now, missing);
            }
            Event::Served { served, broken } => {
                let before = record.postcopy.as_ref();
                let before = before.and_then(|before| before.broken.as_deref());
                match (before, broken) {
                    (None, Some(why)) => log::warn!(
                        "the guest at {} waits for its memory, and there is no connection, which is tried again and again: \
                         {why}",
                        record.to
                    ),
                    (Some(_), None) => {
                        log::warn!("the guest at {} has its memory again", record.to)
                    }
                    _ => {}
                }
                record.served(now, served, broken);
            }
            Event::Enough(word) => record.no_more_is_wanted(now, word),
            Event::InDoubt(why) => {
                log::error!(
                    "whether the guest runs at {} is not known ({why}): it stands still here, and is asked for again and \
                     again. If it is known to you, say so: ctl migrate-settle here|there",
                    record.to
                );
                let why = why.to_owned();
                record.outcome = Some(Outcome::Unsettled { why });
            }
            Event::NotTakenBack(why) => {
                log::warn!("what was let go of for the migration cannot be taken back yet: {why}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_with_which_frames_would_take_too_long_is_refused_with_its_value() {
        let rate = |connections, limit| {
            let request = MigrateRequest {
                connections,
                bandwidth_limit: limit,
                ..MigrateRequest::new("unix:/s")
            };
            request.rate().map(|rate| rate.map(NonZeroU64::get))
        };
        assert_eq!(rate(4, None), Ok(None));
        assert_eq!(rate(4, Some(256 << 10)), Ok(Some(256 << 10)));
        for (connections, limit) in [(1, 0), (1, 1), (1, LEAST_RATE - 1), (64, LEAST_RATE)] {
            let refused = rate(connections, Some(limit)).unwrap_err();
            assert!(refused.contains(&format!("of {limit} bytes")), "{refused}");
        }
    }
}
