// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a pager is told to be: how many threads, how patient, and whom it tells what.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use memslots::uffd::{Fault, OpError};
use memslots::{Errno, Gfn, Hva};

use super::book::Limits;
use crate::SourceError;
use crate::working_set::Recorder;

/// What becomes of a page that will not come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum GiveUp {
    /// It is poisoned: who touches it has a memory error (of a guest, what its monitor makes of it). Needs the userfaultfd
    /// feature `POISON` (Linux 6.6).
    #[default]
    Poison,
    /// [`PagerEvents::lost`] is told, and who touched it sleeps on. The machine is to be stopped then: when the
    /// registration goes, what is missing reads as zeros.
    Tell,
}

/// Why a page will not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LostReason {
    /// Its source did not answer in time.
    #[error("it did not come within {0:?}")]
    Deadline(Duration),
    /// Its source did not bring it in time, and failed at it meanwhile, as it did the last time.
    #[error("it did not come within {within:?}")]
    Failing {
        /// The deadline.
        within: Duration,
        /// What the source said.
        source: Arc<SourceError>,
    },
    /// Its source has failed, for good or too often.
    #[error(transparent)]
    Source(#[from] Arc<SourceError>),
    /// Its source panicked.
    #[error("its source panicked")]
    Panic,
    /// It cannot be placed.
    #[error(transparent)]
    Place(#[from] OpError),
}

/// A page that will not come.
#[derive(Debug)]
#[non_exhaustive]
pub struct Lost<'a> {
    /// The slot, by its place in the list that the pager was started with.
    pub slot: usize,
    /// The page.
    pub gfn: Gfn,
    /// Why.
    pub reason: &'a LostReason,
}

/// Whom a pager tells of what it does not answer itself. Each has a default that does nothing.
///
/// # Contract
/// Called on the pager's threads, with no lock held. Whoever faults waits meanwhile, so a call is short; and it follows
/// the rules of [who may block on whom](memslots::uffd#who-may-block-on-whom): above all it touches no memory that the
/// pager serves. It may end the pager ([`Pager::close`](super::Pager::close), or its drop), and waits for nothing else of it.
///
/// A panic is caught where panics unwind, and counted in [`Stats::unanswered`](super::Stats::unanswered): of
/// [`write_protected`](Self::write_protected), who writes sleeps on until the protection is taken away.
pub trait PagerEvents: Send + Sync {
    /// Someone writes to a write-protected page, and waits for whoever has the
    /// [`ProtectRole`](memslots::uffd::ProtectRole). Returns whether it is answered: where the role said
    /// [`Cause::Changing`](memslots::uffd::Cause::Changing), it is `false`, and the fault is told again when other messages
    /// have been read.
    fn write_protected(&self, fault: &Fault) -> bool {
        let _ = fault;
        true
    }

    /// A page will not come. Who waits for it is woken after this, or not ([`GiveUp`]).
    fn lost(&self, lost: &Lost<'_>) {
        let _ = lost;
    }

    /// Memory was given back; the pager brings zeros from now on.
    fn removed(&self, addresses: Range<usize>) {
        let _ = addresses;
    }

    /// Registered memory was moved within the process, which a pager cannot follow: its pages are not served any more.
    fn remapped(&self, from: Hva, to: Hva, size: u64) {
        let _ = (from, to, size);
    }

    /// The pager cannot go on: the kernel refuses to be read, or (`EOWNERDEAD`) one of its threads has ended by a panic, or was not
    /// run. What is missing has been given up.
    fn failed(&self, errno: Errno) {
        let _ = errno;
    }
}

/// Nobody is told.
impl PagerEvents for () {}

/// A thread that cannot be made is an error with its name; one that is never run ends the pager as soon as what it was to run is
/// dropped. As [`thread::Builder::spawn`], for a consumer who has rules
/// about threads (affinity, seccomp), or a test.
pub type Spawn = dyn Fn(String, Box<dyn FnOnce() + Send>) -> io::Result<()> + Send + Sync;

/// How a [`Pager`](super::Pager) works.
///
/// More fields come with any version, and features add some: say what you want of it and end with `..PagerConfig::default()`. (It is not
/// `non_exhaustive`, which would forbid that as well.)
///
/// ```
/// use async_pf::pager::{GiveUp, PagerConfig};
/// use std::time::Duration;
///
/// let config = PagerConfig {
///     workers: 2,
///     deadline: Duration::from_secs(2),
///     give_up: GiveUp::Tell,
///     ..PagerConfig::default()
/// };
/// assert_eq!(config.retries, None);
/// ```
#[derive(Clone)]
pub struct PagerConfig {
    /// Threads that fetch, at least one; one more watches over them. What nobody waits for is fetched by one at a time, so that
    /// who faults finds another; of more than three, and from a source whose fetches take more than half a millisecond, by
    /// all but two at once. More than 256 are as 256.
    pub workers: usize,
    /// How long who touched a page waits for it at most, from the moment that the fault was read.
    pub deadline: Duration,
    /// How often a page is tried again after a [transient](SourceError::is_transient) failure of its source. None: until its
    /// time is over, which is the deadline of who waits for it; of a page that nobody waits for, so long after its first
    /// failure.
    pub retries: Option<u32>,
    /// How long a page that someone waits for waits for its second try; each further wait is twice as long.
    pub backoff: Duration,
    /// The longest of these waits, and each of a page that nobody waits for.
    pub longest_backoff: Duration,
    /// What a fault brings at most where faults follow each other, in bytes. At least a page; more than 64 MiB is as that, unless
    /// a page is larger. Each thread has a buffer for this, or for `ahead`.
    pub window: u64,
    /// What a fault brings in any case, in bytes, of what is missing behind its page: worth it where a round trip costs more
    /// than some pages do. At least a page, and no more than `window`.
    pub least_window: u64,
    /// What is fetched at once where nobody waits, in bytes: a fault may have to wait for it if all workers do this. At
    /// least a page; more than 64 MiB is as that, as above.
    pub ahead: u64,
    /// How many ranges may be in line that nobody waits for. While more pages than that have failed and are to be tried again,
    /// nothing else is begun for nobody: its source is away.
    pub backlog: usize,
    /// What becomes of a page that will not come.
    pub give_up: GiveUp,
    /// Who is told.
    pub events: Arc<dyn PagerEvents>,
    /// Notes each page that someone faulted on. What came before it was touched is in no record: where all of them are to
    /// be, let [`window`](Self::window) be a page and nothing be prefetched.
    pub record: Option<Arc<Recorder>>,
    /// How threads are made; they end when the pager is dropped or finished.
    pub spawn: Arc<Spawn>,
}

impl Default for PagerConfig {
    /// One worker, ten seconds, retries until then from 2 ms on, windows of 128 KiB, poison.
    fn default() -> Self {
        Self {
            workers: 1,
            deadline: Duration::from_secs(10),
            retries: None,
            backoff: Duration::from_millis(2),
            longest_backoff: Duration::from_millis(500),
            window: 128 << 10,
            least_window: 0,
            ahead: 128 << 10,
            backlog: 1024,
            give_up: GiveUp::default(),
            events: Arc::new(()),
            record: None,
            spawn: Arc::new(|name, run| thread::Builder::new().name(name).spawn(run).map(drop)),
        }
    }
}

/// What is fetched at once at most where a page is not larger: no source is faster for more, and each thread has room for it.
const MOST_AT_ONCE: u64 = 64 << 20;
const MOST_WORKERS: usize = 256;

impl PagerConfig {
    /// With what is beyond all measure as much as there can be.
    pub(super) fn bounded(mut self) -> Self {
        self.workers = self.workers.clamp(1, MOST_WORKERS);
        self.window = self.window.min(MOST_AT_ONCE);
        self.least_window = self.least_window.min(MOST_AT_ONCE);
        self.ahead = self.ahead.min(MOST_AT_ONCE);
        self
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            deadline: self.deadline,
            retries: self.retries,
            backoff: self.backoff,
            longest_backoff: self.longest_backoff,
            backlog: self.backlog,
        }
    }
}

impl fmt::Debug for PagerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagerConfig")
            .field("workers", &self.workers)
            .field("deadline", &self.deadline)
            .field("retries", &self.retries)
            .field("backoff", &self.backoff)
            .field("window", &self.window)
            .field("least_window", &self.least_window)
            .field("ahead", &self.ahead)
            .field("give_up", &self.give_up)
            .finish_non_exhaustive()
    }
}
