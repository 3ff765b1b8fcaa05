// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine's memory while it comes.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_pf::pager::{GiveUp, PagedSlot, Pager, PagerConfig, PrefetchError, StartError, Stats};
use async_pf::{Fetched, PageSource};
use memslots::uffd::{Features, Modes, Registration, Uffd, Wake};
use memslots::{Gfn, PAGE_SIZE};

use super::arrive::{Enough, NEAR, Waits, faults, is_away};
use super::bus::{self, Parked};
use super::events::{Events, REASON};
use super::handler::Handler;
use super::kept::KeptFirst;
use super::peer::RemoteSource;
use super::source::SnapshotSource;
use super::stats::{LazyProgress, LazyState, LazyStats, WorkingSetHelp};
use super::working_set::{Ended, Recording, Replay, Unread, WorkingSets};
use super::{LazyError, LazyRequest, OnLoss};
use crate::end::EndSignal;
use crate::memory::SlotTable;
use crate::migration::postcopy::LastWord;
use crate::snapshot::chain::Chain;
use crate::snapshot::first::FirstPages;
use crate::snapshot::link::Link;
use crate::snapshot::machine::VcpuSection;
use crate::snapshot::{first, pages};
use crate::units;
use crate::vm::RunState;

/// How long who waits for all of it sleeps before it looks whether the guest has ended.
const LOOK: Duration = Duration::from_millis(50);
/// What is brought at once where nobody waits: a piece of a file, which is read as a whole where it is checked. One of the
/// threads does that, and a fault elsewhere is served by another.
pub(super) const AHEAD: u64 = pages::PIECE as u64;
/// How long the machine has to start before what nobody has touched is brought, at most: where processors are few its set-up
/// would wait for that. And how long it is let go on, at most, while it touches something in each of these.
const STARTS: Duration = Duration::from_millis(50);
const GOES_ON: Duration = Duration::from_millis(10);
const STILL: Duration = Duration::from_millis(1);
/// Of a guest that has come before its memory: how long nothing is brought but what it touches, at least and at most, if it
/// touches something in each of these.
const LEAST: Duration = Duration::from_millis(100);
const BEGINS: Duration = Duration::from_secs(1);
const TOUCHES: Duration = Duration::from_millis(50);
/// How long a machine that stops waits for a migration's source to hear that it wants no more memory.
const LEAVE: Duration = Duration::from_secs(2);
/// How long a migration's source is away before that is said: it connects again within a second where it can.
const AWAY: Duration = Duration::from_secs(1);
/// The same as [`REASON`], of what may be another error of KVM's as well, where no page is known to be lost.
const PERHAPS: Duration = Duration::from_millis(100);
/// How long what is to be read ahead waits for room among what is.
const ROOM: Duration = Duration::from_millis(2);

/// Memory that comes while the guest runs. Dropped, what is missing is poisoned: the machine is over by then.
pub(crate) struct LazyMemory {
    pub(super) shared: Arc<Shared>,
    /// Brings what nobody waits for, and ends the pager when all is there.
    pub(super) thread: Option<JoinHandle<()>>,
    /// In another process.
    pub(super) handler: Option<Handler>,
    pub(super) on_loss: OnLoss,
    /// Behind the others: as long as there is a page that does not come.
    pub(super) _parked: Parked,
}

pub(super) struct Shared {
    /// None when all is there, or another process brings it. Held for writing by the thread, once, to take it out.
    pub(super) pager: RwLock<Option<Pager>>,
    pub(super) state: Mutex<State>,
    /// Of [`State`].
    pub(super) changed: Condvar,
    pub(super) events: Arc<Events>,
    pub(super) from: From,
    /// Who has a snapshot's memory, if that is not here.
    pub(super) server: Option<Arc<RemoteSource>>,
    pub(super) pages: u64,
    /// How many of them were there before the pager, out of the snapshot's state.
    pub(super) at_once: u64,
    pub(super) begun: Instant,
}

/// Where memory comes from.
pub(super) enum From {
    /// A snapshot's files; none where a page server has them, or all has been read.
    Snapshot(Mutex<Option<SnapshotSource>>, WorkingSets),
    /// A migration's source: since when it is waited for, if it is; and for how long that is done where all of it is wanted.
    Migration(Arc<Waits>, Duration),
}

pub(super) struct State {
    pub(super) phase: LazyState,
    /// Of a pager that has ended.
    pub(super) stats: Stats,
    pub(super) took: Option<Duration>,
    /// The machine has started.
    pub(super) started: bool,
    /// Its guest does not stand still.
    pub(super) runs: bool,
    /// The machine is over.
    pub(super) close: bool,
    /// Nobody waits for more to be recorded.
    pub(super) recorded: bool,
    /// Somebody waits for all of it.
    pub(super) hurry: bool,
    /// Until the pager goes.
    pub(super) registrations: Vec<Registration>,
    /// To be called when nothing more is asked for.
    pub(super) enough: Option<Enough>,
    /// Where a record was read ahead by.
    pub(super) help: Option<WorkingSetHelp>,
}

impl State {
    /// Of a pager that has just begun, or of none.
    pub(super) fn new(phase: LazyState, registrations: Vec<Registration>) -> Self {
        State {
            phase,
            stats: Stats::default(),
            took: None,
            started: false,
            runs: false,
            close: false,
            recorded: false,
            hurry: false,
            registrations,
            enough: None,
            help: None,
        }
    }
}

impl LazyMemory {
    /// Has the memory of `table`, which is empty, come from `chain` as `request` says, and first what these vCPUs touch when they
    /// go on. A page that does not come is told to `end`. When this returns faults are served.
    ///
    /// # Errors
    /// [`LazyError`]; nothing is left behind.
    pub(crate) fn begin(
        request: &LazyRequest,
        chain: &Arc<Chain>,
        table: &SlotTable,
        vcpus: &[VcpuSection],
        end: &Arc<EndSignal>,
    ) -> Result<Self, LazyError> {
        if request.handler.is_some() && request.page_server.is_some() {
            return Err(LazyError::Both);
        }
        if request.handler.is_some() && request.record.is_some() {
            return Err(LazyError::Unseen);
        }
        if let (Some(_), Some(link)) = (&request.handler, chain.newest()) {
            let form = match (link.parent(), link.is_packed()) {
                (Some(_), _) => Some("an incremental snapshot's"),
                (None, true) => Some("compressed"),
                (None, false) => None,
            };
            if let Some(form) = form {
                return Err(LazyError::Form(link.dir().to_owned(), form));
            }
        }
        // Firecracker's has it only where memory may be given back (a balloon): a handler need not know the message.
        let events = match request.handler {
            Some(_) => Features::NONE,
            None => Features::EVENT_REMOVE,
        };
        let uffd = Uffd::open(Features::NONE, events)?;
        if !uffd.available().contains(Features::POISON) {
            return Err(LazyError::NoPoison);
        }
        let mut registrations = Vec::new();
        let mut slots = Vec::new();
        let (mut count, mut hosts) = (0, Vec::new());
        for region in table.regions() {
            let mapping = region.mapping();
            registrations.push(uffd.register_all(mapping, Modes::MISSING)?);
            slots.push(region.extent().guest_range());
            count += mapping.size() / mapping.page_size();
            hosts.push(mapping.host_range());
        }
        let events = Arc::new(Events::new(Arc::clone(end), request.on_loss));
        let parked = Parked::new(hosts, Arc::clone(&events));
        let remote = match &request.page_server {
            Some(at) => Some(Arc::new(RemoteSource::connect(
                at,
                chain,
                request.deadline,
                end,
            )?)),
            None => None,
        };
        let (source, of): (_, Arc<dyn PageSource>) = match &remote {
            Some(remote) => (None, Arc::clone(remote) as _),
            None => {
                let source = SnapshotSource::new(Arc::clone(chain));
                (Some(source.clone()), Arc::new(source))
            }
        };
        let sets = WorkingSets::new(chain);
        let shared = |phase, pager, at_once, registrations, source, sets| {
            Arc::new(Shared {
                pager: RwLock::new(pager),
                state: Mutex::new(State::new(phase, registrations)),
                changed: Condvar::new(),
                events: Arc::clone(&events),
                from: From::Snapshot(Mutex::new(source), sets),
                server: remote.clone(),
                pages: count,
                at_once: at_once as u64,
                begun: Instant::now(),
            })
        };
        if let Some(path) = &request.handler {
            let regions = chain.newest().map(|link| link.map().regions.as_slice());
            let regions = regions.unwrap_or_default();
            let told = Arc::clone(&events);
            let handler =
                Handler::hand_off(path, request.deadline, uffd, registrations, regions, told)?;
            bus::hear();
            return Ok(LazyMemory {
                shared: shared(LazyState::External, None, 0, Vec::new(), source, sets),
                thread: None,
                handler: Some(handler),
                on_loss: request.on_loss,
                _parked: parked,
            });
        }

        let span = slots.last().map_or(0, |last| last.end / PAGE_SIZE);
        if let Some(remote) = &remote {
            let remote = Arc::clone(remote);
            events.ask(Box::new(move || remote.waits_for()));
        }
        let (recording, unread) = sets.prepare(request.record, span);
        let mut phase = LazyState::Bringing;
        let mut config = PagerConfig {
            workers: request.workers,
            deadline: request.deadline,
            give_up: GiveUp::Poison,
            ahead: AHEAD,
            events: Arc::clone(&events) as _,
            ..PagerConfig::default()
        };
        if remote.is_some() {
            config.least_window = NEAR;
        }
        if let Some(recording) = &recording {
            config.least_window = 0;
            config.record = Some(Arc::clone(recording.recorder()));
            config.window = PAGE_SIZE;
            phase = LazyState::Recording;
        } else if let Some(unread) = &unread {
            config.record = Some(Arc::clone(unread.recorder()));
        }
        let of = match &unread {
            Some(unread) => Arc::new(KeptFirst::new(unread.kept(), of)),
            None => of,
        };
        // What is recorded is touched.
        let known = chain.newest().and_then(Link::first_pages);
        let known = known.filter(|_| recording.is_none());
        let starts: Vec<_> = match known {
            None if recording.is_none() => vcpus.iter().map(first::Start::of).collect(),
            _ => Vec::new(),
        };
        let source_of = Arc::clone(&of);
        let (mut paged, mut there) = (Vec::new(), BTreeSet::new());
        for (registration, range) in registrations.iter().zip(&slots) {
            if let Some(known) = known {
                place_first(registration, range, known, &mut there)?;
            }
            let all = Gfn(range.start / PAGE_SIZE)..Gfn(range.end / PAGE_SIZE);
            let slot = PagedSlot::new(registration, all.start, Arc::clone(&of))?;
            paged.push(slot.only(all_but(all, &there)));
        }
        let order = known.map_or(&[][..], |known| known.order());
        let left = order.iter().filter(|gfn| !there.contains(&gfn.0));
        let mut wanted: Vec<Gfn> = left.copied().collect();
        let pager = Pager::start(&uffd, paged, config)?;
        let shared = shared(phase, Some(pager), there.len(), registrations, source, sets);
        if let Some(remote) = remote.clone() {
            let enough = move |_: LastWord, _: Duration| remote.close();
            shared.lock().enough = Some(Box::new(enough));
        }
        let bring = move |of: &Shared| {
            let mut read = |gfn: Gfn, into: &mut [u8]| {
                // A page of zeros is a table without an entry.
                matches!(source_of.fetch(gfn, into), Ok(Fetched::Bytes))
            };
            wanted.extend(first::pages(&starts, &mut read));
            of.bring_first(&wanted, &slots);
            of.bring(recording, unread, &slots);
        };
        LazyMemory::with_thread(shared, request.on_loss, parked, bring)
    }

    /// One whose thread does `bring`.
    pub(super) fn with_thread(
        shared: Arc<Shared>,
        on_loss: OnLoss,
        parked: Parked,
        bring: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<Self, LazyError> {
        let thread = std::thread::Builder::new().name("lazy".into());
        let of = Arc::clone(&shared);
        let thread = thread.spawn(move || bring(&of));
        Ok(LazyMemory {
            thread: Some(thread.map_err(|source| LazyError::Process {
                what: "start its thread",
                source,
            })?),
            shared,
            handler: None,
            on_loss,
            _parked: parked,
        })
    }

    /// The machine has started, or was paused or resumed: what it does not touch is brought as well.
    pub(crate) fn machine_is(&self, is: RunState) {
        let mut state = self.shared.lock();
        (state.started, state.runs) = (true, is == RunState::Running);
        self.shared.changed.notify_all();
    }

    /// How far it has come.
    pub(crate) fn progress(&self) -> LazyProgress {
        let mut progress = self.shared.progress();
        if let Some(handler) = &self.handler {
            progress.lost = handler.lost();
        }
        progress
    }

    /// Who knows why some of it has not come.
    pub(crate) fn loss(&self) -> Loss {
        Loss(Arc::clone(&self.shared))
    }

    /// What it took.
    pub(crate) fn stats(&self) -> LazyStats {
        self.shared.stats()
    }

    /// Whether what is not there in this process's memory may be something else than zeros.
    pub(crate) fn is_missing(&self) -> bool {
        !matches!(self.progress().state, LazyState::Whole)
    }

    /// Whether a page that does not come is the guest's to learn of.
    pub(crate) fn poisons(&self) -> bool {
        self.on_loss == OnLoss::Poison
    }

    /// Another process brings it.
    pub(crate) fn is_external(&self) -> bool {
        self.handler.is_some()
    }

    /// Has all of it brought, and waits for that while `go_on` says so. Of another process's nothing is known, as long as that
    /// lives: what is read comes then. It is waited for as long as it is `wanted`. Whether a recording ended early for it,
    /// which is told of as well: there is nothing left that the guest could touch first.
    /// As long as a page server is away nothing could be brought, and a recording goes on: who asked may give up until then.
    ///
    /// # Errors
    /// [`LazyError::Lost`], [`LazyError::Away`], [`LazyError::Ended`], [`LazyError::Unwanted`].
    pub(crate) fn settle(
        &self,
        go_on: impl Fn() -> bool,
        wanted: &dyn Fn() -> bool,
    ) -> Result<bool, LazyError> {
        if let Some(handler) = &self.handler {
            return match handler.lost() {
                Some(pages @ 1..) => Err(LazyError::Lost {
                    pages,
                    why: self.shared.events.why(),
                }),
                _ => Ok(false),
            };
        }
        let goes_on = || match (go_on(), wanted()) {
            (false, _) => Err(self.shared.ended()),
            (_, false) => {
                let words = self.progress().words();
                Err(LazyError::Unwanted(words.unwrap_or_default()))
            }
            (true, true) => Ok(()),
        };
        while self.shared.records_alone() {
            goes_on()?;
            let state = self.shared.lock();
            drop(self.shared.changed.wait_timeout(state, LOOK));
        }
        self.shared.lock().hurry = true;
        let recording = self.shared.stop_recording();
        if recording {
            log::warn!(
                "the recording of what the guest touches first (--record) ended after {}: a snapshot or a migration has all \
                 of its memory brought. What was touched until then is recorded",
                units::time(self.shared.begun.elapsed())
            );
        }
        if let Some(pager) = &*self.shared.pager() {
            pager.prefetch_rest();
        }
        let mut state = self.shared.lock();
        loop {
            match state.phase {
                LazyState::Whole | LazyState::External => return Ok(recording),
                LazyState::Ended => {
                    drop(state);
                    return Err(self.shared.ended());
                }
                LazyState::Damaged => {
                    drop(state);
                    return Err(self.shared.lost());
                }
                LazyState::Bringing | LazyState::Recording => {}
            }
            // Who is asked may ask how far it is.
            drop(state);
            goes_on()?;
            state = self.shared.lock();
            if let From::Migration(waits, deadline) = &self.shared.from
                && let Some(away) = waits().filter(|away| away >= deadline)
            {
                return Err(LazyError::Away(away));
            }
            let waited = self.shared.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The machine is to stop for good: of a migration's source, a page server, or a page-fault handler, nothing more is asked,
    /// and who waits for it waits no longer, but goes on with memory that is poisoned. Blocks for a moment, in which the source
    /// is told.
    pub(crate) fn leave(&self) {
        if let Some(handler) = &self.handler {
            self.shared.events.machine_is_over();
            handler.leave();
        }
        if self.shared.lock().enough.is_some() {
            self.shared.events.machine_is_over();
            self.shared.is_enough(LEAVE);
        }
    }

    /// The machine ends: what was recorded is saved. Blocks for the disk.
    pub(crate) fn end_recording(&self) {
        let lives = || self.thread.as_ref().is_some_and(|of| !of.is_finished());
        if self.shared.stop_recording() {
            let mut state = self.shared.lock();
            while state.phase == LazyState::Recording && lives() {
                let waited = self.shared.changed.wait_timeout(state, LOOK);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

/// Places what the snapshot's state has of a region, which is at `range` in the guest, and notes the pages that are `there` then.
/// Of larger pages none is.
fn place_first(
    registration: &Registration,
    range: &Range<u64>,
    first: &FirstPages,
    there: &mut BTreeSet<u64>,
) -> Result<(), LazyError> {
    let role = registration.lend_fill().map_err(StartError::from)?;
    if role.page_size() != PAGE_SIZE {
        return Ok(());
    }
    for gfn in first.order() {
        let at = gfn.0.saturating_mul(PAGE_SIZE);
        if let (true, Some(page)) = (range.contains(&at), first.get(*gfn)) {
            // Refused, it comes as any other.
            if role.copy(at - range.start, page, Wake::Now).is_ok() {
                there.insert(gfn.0);
            }
        }
    }
    Ok(())
}

/// The runs of pages of `all` that are none of `there`.
fn all_but(all: Range<Gfn>, there: &BTreeSet<u64>) -> Vec<Range<Gfn>> {
    let mut runs = Vec::new();
    let mut next = all.start.0;
    let there = there.range(all.start.0..all.end.0);
    for page in there.copied().chain([all.end.0]) {
        if next < page {
            runs.push(Gfn(next)..Gfn(page));
        }
        next = page + 1;
    }
    runs
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.close = true;
        state.recorded = true;
        self.shared.changed.notify_all();
        drop(state);
        self.shared.is_enough(Duration::ZERO);
        if let Some(pager) = &*self.shared.pager() {
            pager.close();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that brings memory panicked");
        }
    }
}

/// Why memory has not come, for who finds that out by an error of KVM's.
pub(crate) struct Loss(Arc<Shared>);

impl Loss {
    /// The reason; none where nothing is lost. It is waited for, for it may come behind the error: for a moment unless it is
    /// `certain` that the error is about memory.
    pub(crate) fn why(&self, certain: bool) -> Option<String> {
        let begun = Instant::now();
        loop {
            // Asked first: the reason stands before the end is told for it.
            let is_over = self.0.events.is_over();
            let why = self.0.events.why();
            if !why.is_empty() && self.0.events.is_dealt_with() {
                return Some(why);
            }
            // It has ended otherwise: what does not come now is not told of.
            if is_over && why.is_empty() {
                return None;
            }
            let waited = begun.elapsed();
            let over = {
                let state = self.0.lock();
                state.close || state.phase == LazyState::Whole
            };
            if over || waited >= REASON || !certain && waited >= PERHAPS && !self.0.loses() {
                return None;
            }
            std::thread::sleep(STILL);
        }
    }
}

impl Shared {
    /// Whether a page is lost.
    fn loses(&self) -> bool {
        let pager = self.pager();
        pager.as_ref().is_some_and(|of| of.progress().lost > 0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pager(&self) -> RwLockReadGuard<'_, Option<Pager>> {
        self.pager.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The snapshot's files, where they are here and something may be read of them still.
    fn files(&self) -> Option<SnapshotSource> {
        match &self.from {
            From::Snapshot(source, _) => {
                let source = source.lock().unwrap_or_else(PoisonError::into_inner);
                source.clone()
            }
            From::Migration(..) => None,
        }
    }

    fn go_on(&self) -> bool {
        !self.lock().close
    }

    /// And nobody wants all of it.
    fn is_to_go_on(&self) -> bool {
        let state = self.lock();
        !state.close && !state.hurry
    }

    /// The thread's life.
    pub(super) fn bring(
        &self,
        recording: Option<Recording>,
        unread: Option<Unread>,
        slots: &[Range<u64>],
    ) {
        let mut replay = None;
        if let From::Snapshot(_, sets) = &self.from {
            // The disk has a head start.
            replay = unread.and_then(|unread| sets.read(unread));
            // Until then what this process does is the machine's.
            self.let_it_be_made();
        }
        bus::hear();
        // Where all is wanted at once its pages are kept behind that.
        let left = recording
            .filter(|recording| self.record(recording))
            .filter(|recording| !self.keep(recording, &|| self.is_to_go_on()));
        if self.lock().phase == LazyState::Recording {
            self.turn(LazyState::Bringing);
        }
        match (&mut replay, &self.from) {
            // It wants that at once.
            (Some(replay), _) => {
                self.lock().help = Some(replay.help());
                self.read_ahead(replay, slots);
                self.let_it_use(replay);
                self.lock().help = Some(replay.help());
            }
            (None, From::Snapshot(..)) => self.let_it_touch(STILL, GOES_ON),
            (None, From::Migration(..)) => {}
        }
        if let Some(source) = self.files() {
            source.find_holes(|| self.go_on());
        }
        if let From::Migration(..) = self.from {
            self.let_it_begin();
        }
        let whole = match &*self.pager() {
            None => return,
            Some(pager) => {
                pager.prefetch_rest();
                self.see_it_there(pager)
            }
        };
        if whole {
            self.finish();
        } else {
            self.turn(match self.go_on() {
                true => LazyState::Damaged,
                false => LazyState::Ended,
            });
        }
        if let Some(recording) = left {
            self.keep(&recording, &|| self.go_on());
        }
        if whole && let From::Snapshot(source, _) = &self.from {
            // The guest needs them no more: a file that was removed goes with this.
            let source = source.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(source);
        }
        if let (Some(replay), From::Snapshot(_, sets)) = (replay, &self.from) {
            sets.refresh(&replay);
        }
    }

    /// Waits until all of it is there, or lost, and says whether it is; meanwhile who reads the log hears of a migration's
    /// source that is away. Ends when the pager does as well.
    fn see_it_there(&self, pager: &Pager) -> bool {
        let From::Migration(waits, deadline) = &self.from else {
            return pager.wait(Duration::MAX);
        };
        let mut told = false;
        loop {
            let since = Instant::now();
            match pager.wait(AWAY) {
                true => return true,
                // Before it was time, it has ended.
                false if since.elapsed() < AWAY => return false,
                false => {}
            }
            match (waits().is_some_and(|away| away >= AWAY), told) {
                (true, false) => log::warn!("{}", is_away(*deadline, self.events.on_loss())),
                (false, true) => {
                    log::warn!(
                        "the migration's source is there again, and the guest's memory comes"
                    );
                }
                (true, true) | (false, false) => continue,
            }
            told = !told;
        }
    }

    /// Compares what was recorded with what is touched, before the rest is brought: of what is there nobody sees whether it is
    /// touched. Unless that is wanted at once.
    fn let_it_use(&self, replay: &mut Replay) {
        let lasts = replay.lasts();
        let mut state = self.lock();
        while !state.close && !state.hurry {
            let elapsed = self.begun.elapsed();
            let left = lasts.saturating_sub(elapsed);
            if left.is_zero() {
                drop(state);
                return replay.judge(elapsed);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Until the machine has started, or does not.
    fn let_it_be_made(&self) {
        let mut state = self.lock();
        while !state.started && !state.close && !state.hurry {
            let left = STARTS.saturating_sub(self.begun.elapsed());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How often something was touched that was not there.
    fn touches(&self) -> u64 {
        let stats = self.pager().as_ref().map(Pager::stats).unwrap_or_default();
        stats.faults + stats.joined
    }

    /// What nobody waits for is brought when the guest has what it begins with: waits until nothing was touched for `still`, but
    /// no longer than `most`.
    fn let_it_touch(&self, still: Duration, most: Duration) {
        let begun = Instant::now();
        let mut seen = None;
        let mut state = self.lock();
        while !state.close && !state.hurry && begun.elapsed() < most {
            drop(state);
            let faults = self.touches();
            if seen.replace(faults) == Some(faults) {
                return;
            }
            state = self.lock();
            let waited = self.changed.wait_timeout(state, still);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The guest has come before its memory, and wants what it works with at once: all else waits until it touches no more for
    /// a while, but not for long.
    fn let_it_begin(&self) {
        let mut seen = 0;
        let mut state = self.lock();
        while !state.close && self.begun.elapsed() < BEGINS {
            let waited = self.changed.wait_timeout(state, TOUCHES);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            drop(state);
            let faults = self.touches();
            state = self.lock();
            if faults == seen && self.begun.elapsed() >= LEAST {
                return;
            }
            seen = faults;
        }
    }

    /// Until its time, or its end; whether what was recorded is saved.
    fn record(&self, recording: &Recording) -> bool {
        // A guest that stands still touches nothing.
        let mut left = recording.time();
        let mut state = self.lock();
        while !state.recorded && !left.is_zero() {
            if !state.runs {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let begun = Instant::now();
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            left = left.saturating_sub(begun.elapsed());
        }
        drop(state);
        let ended = match (self.events.why().is_empty(), left) {
            (false, _) => Ended::Lost,
            (true, Duration::ZERO) => Ended::Whole,
            (true, left) => Ended::Early(recording.time().saturating_sub(left)),
        };
        match &self.from {
            From::Snapshot(_, sets) => sets.save(recording, ended),
            From::Migration(..) => false,
        }
    }

    /// Keeps the first pages of what was recorded; whether there is no more to do.
    fn keep(&self, recording: &Recording, go_on: &dyn Fn() -> bool) -> bool {
        match (&self.from, self.files()) {
            (From::Snapshot(_, sets), Some(source)) => sets.keep(recording, &source, go_on),
            // Another host's disk is no matter of where they lie here.
            _ => true,
        }
    }

    /// Whether there is a recording, and nothing else could come meanwhile, for the page server is away.
    fn records_alone(&self) -> bool {
        let server = self.server.as_ref();
        let away = server.is_some_and(|server| server.is_away_for_now());
        away && self.lock().phase == LazyState::Recording
    }

    /// Ends the recording, if there is one; whether there was.
    fn stop_recording(&self) -> bool {
        let mut state = self.lock();
        state.recorded = true;
        self.changed.notify_all();
        state.phase == LazyState::Recording
    }

    /// What vCPUs touch first and is not there yet: a few pages, for which there is room.
    fn bring_first(&self, pages: &[Gfn], slots: &[Range<u64>]) {
        let pager = self.pager();
        for gfn in pages {
            let at = gfn.0.saturating_mul(PAGE_SIZE);
            let slot = slots.iter().position(|range| range.contains(&at));
            if let (Some(slot), Some(pager)) = (slot, &*pager) {
                // A hint: who touches it has it brought.
                let _ = pager.prefetch(slot, *gfn..Gfn(gfn.0 + 1));
            }
        }
    }

    fn read_ahead(&self, replay: &Replay, slots: &[Range<u64>]) {
        for read in replay.reads() {
            for (slot, range) in slots.iter().enumerate() {
                let first = (read.start.0).max(range.start / PAGE_SIZE);
                let end = (read.end.0).min(range.end / PAGE_SIZE);
                if first >= end {
                    continue;
                }
                loop {
                    let pager = self.pager();
                    let Some(pager) = pager.as_ref().filter(|_| self.go_on()) else {
                        return;
                    };
                    match pager.prefetch(slot, Gfn(first)..Gfn(end)) {
                        Err(PrefetchError::Backlog { .. }) => {
                            if pager.wait(ROOM) {
                                return;
                            }
                        }
                        // A page of the guest's that is none: the record is another memory's, and a hint at best.
                        Ok(()) | Err(_) => break,
                    }
                }
            }
        }
    }

    /// All is there: the pager ends, and the userfaultfd with it. Where pages are lost it stays, for they are its.
    fn finish(&self) {
        let lost = self.pager().as_ref().map(|pager| pager.progress().lost);
        if lost.is_some_and(|lost| lost > 0) {
            // No more is asked for all the same.
            self.is_enough(Duration::ZERO);
            return self.turn(LazyState::Damaged);
        }
        self.is_enough(Duration::ZERO);
        let mut place = self.pager.write().unwrap_or_else(PoisonError::into_inner);
        let Some(pager) = place.take() else {
            return;
        };
        let stats = pager.stats();
        match pager.finish() {
            Ok(roles) => drop(roles),
            // It was complete: nothing becomes missing again.
            Err(error) => {
                log::error!("{error}");
                *place = Some(error.pager);
                drop(place);
                return self.turn(LazyState::Damaged);
            }
        }
        drop(place);
        let mut state = self.lock();
        let registrations = std::mem::take(&mut state.registrations);
        (state.stats, state.took) = (stats, Some(self.begun.elapsed()));
        drop(state);
        for registration in registrations {
            if let Err(error) = registration.unregister() {
                log::warn!("{error}");
            }
        }
        // Nobody has an error for memory that comes later any more.
        bus::forget(&self.events);
        self.turn(LazyState::Whole);
        log::info!("{}", self.stats());
    }

    /// Tells who brings it that nothing more will be asked for, once. Nobody waits for more: all is there but what is lost, or
    /// the machine is over.
    fn is_enough(&self, patience: Duration) {
        let enough = self.lock().enough.take();
        if let Some(tell) = enough {
            let word = self.last_word();
            tell(word, patience);
        }
    }

    fn last_word(&self) -> LastWord {
        let pager = self.pager();
        let stats = pager.as_ref().map(Pager::stats).unwrap_or_default();
        let progress = pager.as_ref().map(Pager::progress);
        drop(pager);
        let (missing, lost) = progress.map_or((0, 0), |of| (of.missing, of.lost));
        let why = match (missing, lost) {
            (0, 0) => String::new(),
            (_, 0) => self.events.ended(),
            _ => self.events.why(),
        };
        LastWord {
            faults: faults(&stats),
            missing,
            lost,
            why,
        }
    }

    fn turn(&self, phase: LazyState) {
        self.lock().phase = phase;
        self.changed.notify_all();
    }

    /// The guest has ended, for want of memory or otherwise.
    fn ended(&self) -> LazyError {
        let why = self.events.why();
        LazyError::Ended(match why.is_empty() {
            true => why,
            false => format!(": {why}"),
        })
    }

    fn lost(&self) -> LazyError {
        let lost = self.pager().as_ref().map(|pager| pager.progress().lost);
        LazyError::Lost {
            pages: lost.unwrap_or_default(),
            why: self.events.why(),
        }
    }

    fn progress(&self) -> LazyProgress {
        let (state, help) = {
            let state = self.lock();
            (state.phase, state.help)
        };
        let progress = self.pager().as_ref().map(Pager::progress);
        let pages = self.pages;
        let (missing, lost) = match (progress, state) {
            (Some(of), _) => (Some(of.missing), Some(of.lost)),
            (None, LazyState::External) => (None, None),
            (None, _) => (Some(0), Some(0)),
        };
        let coming = matches!(state, LazyState::Bringing);
        let source = match &self.from {
            From::Migration(waits, limit) if coming => waits().map(|since| (since, *limit)),
            _ => None,
        };
        let comes = coming || state == LazyState::Recording;
        let server = self.server.as_ref().filter(|_| comes);
        LazyProgress {
            state,
            pages,
            missing,
            lost,
            waits_for_source_s: source.map(|(since, _)| since.as_secs()),
            source_given_up_after_s: source.map(|(_, limit)| limit.as_secs()),
            waits_for_server: server.and_then(|server| server.is_away()),
            working_set: help,
        }
    }

    fn stats(&self) -> LazyStats {
        let progress = self.progress();
        let live = self.pager().as_ref().map(Pager::stats);
        let state = self.lock();
        let mut stats = live.unwrap_or(state.stats);
        stats.placed += self.at_once;
        stats.ahead += self.at_once;
        LazyStats::of(progress, &stats, state.took)
    }
}

#[cfg(test)]
mod tests {
    use super::super::events::is_at_once;
    use super::*;
    use crate::end::GuestEnd;

    #[test]
    fn all_pages_are_there_or_in_a_run_of_those_that_come() {
        let runs = |there: &[u64]| {
            let runs = all_but(Gfn(4)..Gfn(9), &there.iter().copied().collect());
            let ends = runs.iter().map(|run| (run.start.0, run.end.0));
            ends.collect::<Vec<_>>()
        };
        assert_eq!(runs(&[]), [(4, 9)]);
        assert_eq!(runs(&[4]), [(5, 9)]);
        assert_eq!(runs(&[8]), [(4, 8)]);
        assert_eq!(runs(&[5, 7]), [(4, 5), (6, 7), (8, 9)]);
        assert_eq!(runs(&[4, 5, 6, 7, 8]), []);
    }

    fn shared(phase: LazyState, on_loss: OnLoss) -> (Arc<Shared>, Arc<EndSignal>) {
        let end = Arc::new(EndSignal::new().unwrap());
        let shared = Shared {
            pager: RwLock::new(None),
            state: Mutex::new(State::new(phase, Vec::new())),
            changed: Condvar::new(),
            events: Arc::new(Events::new(Arc::clone(&end), on_loss)),
            from: From::Migration(Arc::new(|| None), Duration::ZERO),
            server: None,
            pages: 1,
            at_once: 0,
            begun: Instant::now(),
        };
        (Arc::new(shared), end)
    }

    #[test]
    fn who_runs_into_lost_memory_first_has_the_reason_that_is_told_behind_that() {
        for on_loss in [OnLoss::Stop, OnLoss::Poison] {
            let (of, end) = shared(LazyState::Bringing, on_loss);
            let events = Arc::clone(&of.events);
            let asked = std::thread::spawn(move || Loss(of).why(true));
            events.tell("the reason".into());
            assert_eq!(asked.join().unwrap().as_deref(), Some("the reason"));
            let told = matches!(end.get(), Some(GuestEnd::Failed(_)));
            assert_eq!(told, on_loss == OnLoss::Stop);
        }
    }

    #[test]
    fn behind_an_end_that_is_told_otherwise_an_error_of_kvms_is_its_own_at_once() {
        for on_loss in [OnLoss::Stop, OnLoss::Poison] {
            let (of, end) = shared(LazyState::Bringing, on_loss);
            end.tell(GuestEnd::PoweredOff);
            let why = || Loss(Arc::clone(&of)).why(true);
            assert!(is_at_once(|| assert_eq!(why(), None)));
            // Of memory that did not come before that it is none.
            of.events.tell("the reason".into());
            assert_eq!(why().as_deref(), Some("the reason"));
        }
    }

    #[test]
    fn an_error_of_kvms_is_its_own_where_nothing_is_lost() {
        for (phase, certain) in [(LazyState::Whole, true), (LazyState::Bringing, false)] {
            let (of, _end) = shared(phase, OnLoss::Stop);
            assert_eq!(Loss(of).why(certain), None);
        }
    }
}
