// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the threads of a pager share, and how they hand the reading of messages to each other.
//!
//! Any thread can be a reader. A worker with nothing to do becomes one; with a fault in hand it stops reading and serves it,
//! itself, for that is faster than waking another thread as long as the source answers within microseconds. Two workers
//! read at once ([`READERS`]): the kernel wakes both, and the one that runs first has the message. So two faults are served
//! at once, and one that comes while a reader has lost its processor to somebody else does not wait for that. Others wait
//! until they are told to read, where the source is slow. Where nobody is left, the [guard](super::worker) reads.
//!
//! Locks, in this order: `roles`, `state`. Neither is held across a fetch or a wait.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use memslots::uffd::{Event, Fault, FaultKind, Features, FillRole, Messages, Uffd};
use memslots::{Errno, Gfn, Hva, PAGE_SIZE};

use super::book::{Book, Job, Place, Told};
use super::config::{PagerConfig, PagerEvents};
use super::error::StartError;
use crate::sync::{
    self, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, ThreadId,
};
use crate::{PageSource, SourceError};

/// A source whose fetches take longer is one during which another thread should read messages: about what it costs to
/// wake that.
const SLOW: Duration = Duration::from_micros(50);
/// Workers that wait for messages at once, at most: each message wakes them all, and all but one for nothing.
pub(super) const READERS: usize = 2;
/// Messages a read, of a worker that is alone: a burst costs one call. Where there are more, each takes one, and leaves the
/// next to whoever has been woken for it as well.
const BATCH: usize = 16;

/// A slot, as it does not change.
pub(super) struct SlotInfo {
    pub host: Range<usize>,
    pub page_size: u64,
    pub first: Gfn,
    pub source: Arc<dyn PageSource>,
    /// Its missing pages are told of. If not, only minor faults are, and its pages are mapped from the page cache.
    pub missing: bool,
    /// What is fetched at once at most where nobody waits, in pages.
    pub ahead: u64,
    /// Those that are to come, where not all are: pages, counted from the slot's start.
    pub only: Option<Vec<Range<u64>>>,
}

impl SlotInfo {
    pub fn pages(&self) -> u64 {
        (self.host.end - self.host.start) as u64 / self.page_size
    }

    pub fn gfn(&self, page: u64) -> Gfn {
        Gfn(self.first.0 + page * (self.page_size / PAGE_SIZE))
    }

    pub fn bytes(&self, pages: &Range<u64>) -> Range<u64> {
        pages.start * self.page_size..pages.end * self.page_size
    }
}

/// The last failures of a source that are transient, a few: why a page is late, if it is one of these.
#[derive(Default)]
pub(super) struct Failing(Vec<(usize, Range<u64>, Arc<SourceError>)>);

impl Failing {
    /// So many are known: of a source that fails at everything each page of the last has its word.
    const MOST: usize = 64;

    pub fn note(&mut self, job: &Job, error: &Arc<SourceError>) {
        self.forget(job);
        if self.0.len() >= Self::MOST {
            self.0.remove(0);
        }
        let failed = (job.slot, job.pages.clone(), Arc::clone(error));
        self.0.push(failed);
    }

    /// It has come.
    pub fn forget(&mut self, job: &Job) {
        let meets = |pages: &Range<u64>| pages.start < job.pages.end && job.pages.start < pages.end;
        self.0
            .retain(|(slot, pages, _)| *slot != job.slot || !meets(pages));
    }

    pub fn at(&self, place: Place) -> Option<Arc<SourceError>> {
        let mut known = self.0.iter().rev();
        let found =
            known.find(|(slot, pages, _)| *slot == place.slot && pages.contains(&place.page));
        found.map(|(_, _, error)| Arc::clone(error))
    }
}

pub(super) struct State {
    pub book: Book,
    /// Workers that wait for messages, or are about to.
    pub readers: usize,
    /// How often a worker has read.
    pub turns: u64,
    /// Workers that wait for work.
    pub idle: usize,
    /// Workers that are inside a source, at most once each.
    pub fetching: Vec<ThreadId>,
    /// Workers that bring what nobody waits for: [so many](Shared::most_ahead) at once do.
    pub ahead: usize,
    /// The mean of what a fetch takes.
    pub fetch: Duration,
    /// The guard sleeps until what it knew to be due, or until it is [stirred](Shared::stir).
    pub guard_asleep: bool,
    /// There is a byte in the pipe.
    pub poked: bool,
    /// Dropped, whoever waits for messages wakes for ever.
    pub poke: Option<io::PipeWriter>,
    pub stop: bool,
    /// All threads were made: one that ends before it is told to is the end of the pager.
    pub promised: bool,
    /// It ended with pages that were still to come.
    pub abandoned: bool,
    /// Where the source failed at what is to be tried again.
    pub failing: Failing,
    /// Threads that have not ended.
    pub alive: usize,
    /// Which they are, as far as they have begun.
    pub threads: Vec<ThreadId>,
    /// Those of them that end the pager themselves, out of a call to whoever is told: nobody waits for them. (Nor for who
    /// does so out of its source, which is counted there.)
    pub ending: usize,
    /// Why it cannot go on.
    pub failed: Option<Errno>,
}

pub(super) struct Shared {
    pub uffd: Uffd,
    pub slots: Vec<SlotInfo>,
    /// Of each slot; none when the pager is over. Held for reading while a page is placed, for writing while a page is given
    /// up for its deadline, or a message that pages were given back is taken: so nothing is placed between the moment that the giver goes on and the
    /// moment that it is noted. (The kernel lets it go on when the message is read.)
    pub roles: RwLock<Vec<FillRole>>,
    state: Mutex<State>,
    /// For workers: there is work, or nobody reads.
    pub work: Condvar,
    /// For the guard: someone waits.
    pub watch: Condvar,
    /// For the owner: everything is there, or a thread has ended.
    pub done: Condvar,
    pub config: PagerConfig,
    /// Messages say that pages were given back.
    removes: bool,
    pokes: io::PipeReader,
}

/// What a thread of the pager has for itself.
pub(super) struct Hands {
    /// Which it is.
    pub thread: ThreadId,
    messages: Messages,
    pub answers: Vec<Answer>,
    pub buffer: Vec<u8>,
}

/// What a message asks for that is done with no lock held.
pub(super) enum Answer {
    /// A page was placed: zeros if it has been given back since, else a wake-up.
    Again(Place),
    Poison(Place),
    /// Map it, whatever the book says.
    Continue(Place),
    Map(Job),
    Protected(Fault),
    Removed(Range<usize>),
    Remapped(Hva, Hva, u64),
}

impl Shared {
    pub fn new(
        uffd: Uffd,
        slots: Vec<(SlotInfo, FillRole)>,
        config: PagerConfig,
    ) -> io::Result<Self> {
        let (pokes, poke) = io::pipe()?;
        let (slots, roles): (Vec<_>, Vec<_>) = slots.into_iter().unzip();
        let window = |slot: &SlotInfo| {
            [config.least_window, config.window].map(|bytes| (bytes / slot.page_size).max(1))
        };
        let sizes = slots.iter().map(|slot| (slot.pages(), window(slot)));
        let mut book = Book::new(sizes, config.limits());
        for (index, slot) in slots.iter().enumerate() {
            if slot.source.overtakes() {
                book.overtakes(index);
            }
            if let Some(only) = &slot.only {
                book.only(index, only);
            }
        }
        let state = State {
            book,
            readers: 0,
            turns: 0,
            idle: 0,
            fetching: Vec::with_capacity(config.workers),
            ahead: 0,
            fetch: Duration::ZERO,
            guard_asleep: false,
            poked: false,
            poke: Some(poke),
            stop: false,
            promised: false,
            abandoned: false,
            failing: Failing::default(),
            alive: 0,
            threads: Vec::new(),
            ending: 0,
            failed: None,
        };
        Ok(Self {
            removes: uffd.enabled().contains(Features::EVENT_REMOVE),
            uffd,
            slots,
            roles: RwLock::new(roles),
            state: Mutex::new(state),
            work: Condvar::new(),
            watch: Condvar::new(),
            done: Condvar::new(),
            config,
            pokes,
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for one of its condition variables, for so long at most.
    pub fn wait_for<'a>(
        &'a self,
        condvar: &Condvar,
        state: MutexGuard<'a, State>,
        limit: Duration,
    ) -> MutexGuard<'a, State> {
        sync::wait_timeout(condvar, &self.state, state, limit)
    }

    pub fn roles(&self) -> RwLockReadGuard<'_, Vec<FillRole>> {
        self.roles.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`roles`](Self::roles), and nothing is placed meanwhile.
    pub fn roles_alone(&self) -> RwLockWriteGuard<'_, Vec<FillRole>> {
        self.roles.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of so many pages from one are fetched at once, as its source likes it. Blocks for nothing.
    pub fn cut(&self, place: Place, most: u64) -> u64 {
        let Some(slot) = self.slots.get(place.slot).filter(|slot| slot.missing) else {
            return most;
        };
        let each = slot.page_size / PAGE_SIZE;
        // A panic of a source costs read-ahead here, and no more.
        let run = AssertUnwindSafe(|| slot.source.run(slot.gfn(place.page), most * each));
        catch_unwind(run).map_or(1, |run| run / each)
    }

    /// How many workers bring at once what nobody waits for: all but the two that wait for faults, and one in any case. So
    /// two faults are served at once, however long a piece of that takes.
    pub fn most_ahead(&self) -> usize {
        self.config.workers.saturating_sub(READERS).max(1)
    }

    /// Tells whoever is to be told, whose panic is theirs: `None`, and an answer that is missing.
    pub fn tell<R>(&self, what: impl FnOnce(&dyn PagerEvents) -> R) -> Option<R> {
        let told = catch_unwind(AssertUnwindSafe(|| what(&*self.config.events)));
        if told.is_err() {
            self.lock().book.stats.unanswered += 1;
        }
        told.ok()
    }

    /// From here on faults are served, if all of so many threads live, or are about to.
    pub fn promise(&self, threads: usize) -> Result<(), StartError> {
        let mut state = self.lock();
        state.promised = state.alive == threads;
        match state.promised {
            true => Ok(()),
            false => Err(StartError::Thread {
                name: "pager".into(),
                source: io::Error::other(format!(
                    "of its {threads} threads {} have ended at once, or were not made",
                    threads - state.alive
                )),
            }),
        }
    }

    pub fn hands(&self) -> Hands {
        let config = &self.config;
        let most = |slot: &SlotInfo| {
            let all = slot.pages() * slot.page_size;
            slot.page_size.max(config.window.max(config.ahead).min(all))
        };
        let buffer = self.slots.iter().map(most).max().unwrap_or(PAGE_SIZE);
        let batch = if config.workers > 1 { 1 } else { BATCH };
        Hands {
            thread: sync::thread_id(),
            messages: Messages::with_capacity(batch),
            answers: Vec::with_capacity(batch),
            buffer: vec![0; buffer as usize],
        }
    }

    pub fn place(&self, address: Hva) -> Option<Place> {
        let inside = |slot: &SlotInfo| slot.host.contains(&address.0);
        let index = self.slots.iter().position(inside)?;
        let slot = self.slots.get(index)?;
        Some(Place {
            slot: index,
            page: (address.0 - slot.host.start) as u64 / slot.page_size,
        })
    }

    /// Waits for messages, as the reader. Ends early when poked or stopped.
    pub fn wait(&self, limit: Option<Duration>) -> Result<bool, Errno> {
        match self.uffd.wait_or(&self.pokes, limit) {
            Err(Errno(EINTR)) => Ok(false),
            waited => waited,
        }
    }

    /// Takes the messages that there are, as the reader: notes them, and leaves what is to be done in `hands`.
    pub fn read(&self, hands: &mut Hands) -> Result<(), Errno> {
        let exclusive = self.removes.then(|| self.roles_alone());
        let count = match self.uffd.read(&mut hands.messages) {
            Err(Errno(EINTR)) => 0,
            read => read?,
        };
        if count == 0 {
            return Ok(());
        }
        let now = sync::now();
        let mut state = self.lock();
        let waited = state.book.waiting();
        for event in &mut hands.messages {
            hands.answers.extend(self.note(&mut state.book, event, now));
        }
        if state.book.waiting() > waited {
            self.stir(&mut state);
        }
        drop(state);
        drop(exclusive);
        Ok(())
    }

    fn note(&self, book: &mut Book, event: Event, now: Instant) -> Option<Answer> {
        match event {
            Event::Fault(fault) => self.note_fault(book, fault, now),
            Event::Remove(range) => {
                self.forget(book, &range);
                Some(Answer::Removed(range))
            }
            // There is nothing to be placed there any more.
            Event::Unmap(range) => {
                self.forget(book, &range);
                None
            }
            Event::Remap { from, to, size } => {
                self.forget(book, &(from.0..from.0.saturating_add(size as usize)));
                Some(Answer::Remapped(from, to, size))
            }
            // Dropped, the child's faults are the kernel's.
            Event::Fork(_) => None,
            _ => {
                book.stats.unanswered += 1;
                None
            }
        }
    }

    fn note_fault(&self, book: &mut Book, fault: Fault, now: Instant) -> Option<Answer> {
        if fault.kind == FaultKind::WriteProtect {
            book.stats.protected += 1;
            return Some(Answer::Protected(fault));
        }
        let Some(place) = self.place(fault.address) else {
            book.stats.unanswered += 1;
            return None;
        };
        if fault.kind == FaultKind::Minor {
            return Some(match book.minor(place, now) {
                Some(job) => Answer::Map(job),
                None => Answer::Continue(place),
            });
        }
        if let (Some(record), Some(slot)) = (&self.config.record, self.slots.get(place.slot)) {
            record.touch(slot.gfn(place.page));
        }
        match book.fault(place, now) {
            Told::InLine => None,
            Told::Placed => {
                book.stats.late += 1;
                Some(Answer::Again(place))
            }
            Told::Lost => Some(Answer::Poison(place)),
            Told::Nowhere => {
                book.stats.unanswered += 1;
                None
            }
        }
    }

    /// The pages of these addresses are zeros from now on.
    fn forget(&self, book: &mut Book, range: &Range<usize>) {
        for (index, slot) in self.slots.iter().enumerate() {
            let start = range.start.max(slot.host.start);
            let end = range.end.min(slot.host.end);
            if start < end {
                let page = |address: usize| (address - slot.host.start) as u64 / slot.page_size;
                book.removed(index, page(start)..page(end - 1) + 1);
            }
        }
        if book.is_complete() {
            self.done.notify_all();
        }
    }

    /// Wakes someone for what was put in line.
    pub fn rouse(&self, state: &mut State) {
        if state.idle > 0 {
            self.work.notify_one();
        } else if state.readers > 0 && !state.poked {
            self.poke(state);
        }
    }

    fn poke(&self, state: &mut State) {
        if let Some(poke) = &mut state.poke {
            // One byte at a time, into a pipe of its own.
            state.poked = poke.write_all(&[0]).is_ok();
        }
    }

    /// Takes the byte out of the pipe.
    pub fn unpoke(&self, state: &mut State) {
        if std::mem::take(&mut state.poked) {
            let _ = (&self.pokes).read(&mut [0]);
        }
    }

    /// Before a job is served: whoever should read meanwhile is told so, and the guard that someone waits.
    pub fn leave(&self, state: &mut State) {
        let (slow, faults) = (state.fetch > SLOW, state.book.has_faults());
        if slow && faults {
            // A reader may have looked just before they were in line, and wait for messages now.
            self.rouse(state);
        } else if state.idle > 0 && (faults || slow && state.readers == 0) {
            self.work.notify_one();
        }
        self.stir(state);
    }

    /// The guard looks again. For whoever begins to wait, puts off a page, or is about to be busy: what it sleeps until was
    /// computed before that.
    pub fn stir(&self, state: &mut State) {
        if std::mem::take(&mut state.guard_asleep) {
            self.watch.notify_one();
        }
    }

    /// Ends all threads but those inside a source, which end when it answers; and but the caller, if it is one of them, which
    /// ends when its call returns.
    pub fn stop(&self) {
        let mut state = self.lock();
        let own = sync::thread_id();
        let own = state.threads.contains(&own) && !state.fetching.contains(&own);
        let own = usize::from(own);
        state.ending += own;
        state.stop = true;
        state.poke = None;
        self.work.notify_all();
        self.watch.notify_all();
        self.done.notify_all();
        while state.alive > state.fetching.len() + state.ending {
            state = self
                .done
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.ending -= own;
    }
}

/// `EINTR`.
pub(super) const EINTR: i32 = 4;
