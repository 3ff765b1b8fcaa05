// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which page is where, who waits how long, and what is done next: the pager's head. Plain data, with no thread, clock
//! or call in it: the threads of [`shared`](super::shared) hold it behind one mutex, for as long as a look takes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use super::stats::Stats;
use super::window::Window;
use crate::{PageEvent, PageState};

/// A page is put off for so long at most.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);

/// A page of a slot, counted in pages of the slot's size from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    pub slot: usize,
    pub page: u64,
}

/// Why pages are brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Someone waits.
    Fault,
    /// Someone thinks that they will be wanted: if it fails, they are forgotten, as the neighbours of a fault are.
    Guess,
    /// Everything has to come at last.
    Rest,
}

/// Pages for one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub slot: usize,
    pub pages: Range<u64>,
    /// Zeros, whatever the source says.
    pub zero: bool,
    pub why: Why,
}

/// What a fault's reader has to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// Nothing: the page is in line now, or was.
    InLine,
    /// The page was placed: it has been given back since, or the fault is an old one.
    Placed,
    /// The page will not come.
    Lost,
    /// There is no such page.
    Nowhere,
}

/// How often a page is tried, and how long it may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub deadline: Duration,
    /// None: as often as there is time for.
    pub retries: Option<u32>,
    pub backoff: Duration,
    pub longest_backoff: Duration,
    pub backlog: usize,
}

/// Where a page is, in a byte: its state, whether it was given back, whether someone waits; and of a page under way how often
/// it is.
#[derive(Clone, Copy)]
struct Page(u8);

impl Page {
    const ZERO: u8 = 1 << 3;
    const AWAITED: u8 = 1 << 4;
    /// In the lane of what nobody waits for, and its source lets faults overtake.
    const AHEAD: u8 = 1 << 5;
    /// To be fetched again in the lane of faults, for which it is in line.
    const RAISE: u8 = 1 << 6;
    /// Under way in both: the first that comes is the page, and the other is nobody's.
    const TWICE: u8 = 1 << 7;

    fn new(state: PageState, zero: bool, awaited: bool) -> Self {
        let state = match state {
            PageState::Absent => 0,
            PageState::Prefetching => 1,
            PageState::Wanted => 2,
            PageState::Fetching => 3,
            PageState::Present => 4,
            PageState::Poisoned => 5,
        };
        Self(state | if zero { Self::ZERO } else { 0 } | if awaited { Self::AWAITED } else { 0 })
    }

    fn state(self) -> PageState {
        let all = PageState::ALL;
        all.get(usize::from(self.0 & 7))
            .copied()
            .unwrap_or(PageState::Absent)
    }

    fn zero(self) -> bool {
        self.0 & Self::ZERO != 0
    }

    fn is(self, flag: u8) -> bool {
        self.0 & flag != 0
    }

    /// With these flags, until its state changes.
    fn with(self, flags: u8) -> Self {
        Self(self.0 | flags)
    }

    fn without(self, flags: u8) -> Self {
        Self(self.0 & !flags)
    }

    /// One that is under way, and that someone waits for now: whether that is to be raised.
    fn joined(self) -> (Self, bool) {
        let page = self.with(Self::AWAITED);
        let raise = self.is(Self::AHEAD) && !self.is(Self::RAISE | Self::TWICE);
        (if raise { page.with(Self::RAISE) } else { page }, raise)
    }

    fn awaited(self) -> bool {
        self.0 & Self::AWAITED != 0
    }

    /// Nothing has to be done for it: there, lost, or given back and not touched since.
    fn settled(self) -> bool {
        match self.state() {
            PageState::Present | PageState::Poisoned => true,
            PageState::Absent => self.zero(),
            _ => false,
        }
    }
}

struct Slot {
    /// Bytes of [`Page`]. A page that is absent is 0, so that the kernel gives them, and as it does only those that are looked at.
    pages: Vec<u8>,
    window: Window,
    /// A fault overtakes what its source was asked for before.
    overtakes: bool,
}

/// Pages to come before anyone touches them.
struct Stretch {
    slot: usize,
    pages: Range<u64>,
}

/// Of a page.
struct Failures {
    /// How often by itself.
    alone: u32,
    first: Instant,
}

struct Wait {
    place: Place,
    since: Instant,
}

pub(super) struct Book {
    slots: Vec<Slot>,
    limits: Limits,
    faults: VecDeque<Place>,
    guesses: VecDeque<Stretch>,
    /// Pages that nobody waits for and that failed, to be tried again now, each by itself. Before the guesses.
    again: VecDeque<Place>,
    /// Where bringing everything has come to.
    rest: Option<Place>,
    /// One for each page that someone waits for: as many as there are threads, so it is searched from end to end.
    waits: Vec<Wait>,
    /// Pages that failed. Those are brought alone.
    failures: HashMap<Place, Failures>,
    /// To be tried again, and when. Those that nobody waits for are few more than `backlog`: while there are so many, no other
    /// page is begun for nobody.
    delayed: BinaryHeap<Reverse<(Instant, Place)>>,
    total: u64,
    settled: u64,
    lost: u64,
    pub stats: Stats,
}

impl Book {
    /// Slots of so many pages, with windows of so many at least and at most.
    pub fn new(slots: impl IntoIterator<Item = (u64, [u64; 2])>, limits: Limits) -> Self {
        let slots: Vec<Slot> = slots
            .into_iter()
            .map(|(pages, [least, most])| Slot {
                pages: vec![0; pages as usize],
                window: Window::new(least, most),
                overtakes: false,
            })
            .collect();
        Self {
            total: slots.iter().map(|slot| slot.pages.len() as u64).sum(),
            slots,
            limits,
            faults: VecDeque::with_capacity(256),
            guesses: VecDeque::new(),
            again: VecDeque::new(),
            rest: None,
            waits: Vec::with_capacity(256),
            failures: HashMap::new(),
            delayed: BinaryHeap::new(),
            settled: 0,
            lost: 0,
            stats: Stats::default(),
        }
    }

    /// Only these pages of a slot are to come; the others are there. Before anything else is asked of it.
    pub fn only(&mut self, slot: usize, pages: &[Range<u64>]) {
        let Some(of) = self.slots.get_mut(slot) else {
            return;
        };
        let mut runs = pages.to_vec();
        runs.retain(|run| !run.is_empty());
        runs.sort_unstable_by_key(|run| run.start);
        // Those that are to come are not looked at, or all of the book would be memory.
        let end = of.pages.len() as u64;
        let mut next = 0;
        for run in runs.into_iter().chain(std::iter::once(end..end)) {
            let there = next as usize..run.start.clamp(next, end) as usize;
            if let Some(there) = of.pages.get_mut(there) {
                there.fill(Page::new(PageState::Present, false, false).0);
                self.settled += there.len() as u64;
            }
            next = run.end.clamp(next, end);
        }
    }

    /// Of a slot whose source lets faults overtake: a page that someone waits for is fetched again, in front of all that
    /// nobody does, where it is under way among that.
    pub fn overtakes(&mut self, slot: usize) {
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.overtakes = true;
        }
    }

    fn get(&self, place: Place) -> Option<Page> {
        let slot = self.slots.get(place.slot)?;
        slot.pages.get(place.page as usize).copied().map(Page)
    }

    /// Writes a page down, and what that changes of the totals.
    fn set(&mut self, place: Place, page: Page) {
        let at = self.slots.get_mut(place.slot);
        let Some(at) = at.and_then(|slot| slot.pages.get_mut(place.page as usize)) else {
            return;
        };
        let before = Page(std::mem::replace(at, page.0));
        self.settled = self.settled + u64::from(page.settled()) - u64::from(before.settled());
        let lost = |page: Page| u64::from(page.state() == PageState::Poisoned);
        self.lost = self.lost + lost(page) - lost(before);
    }

    /// Moves a page by the table; says where it is then. What the table does not have changes nothing.
    fn step(&mut self, place: Place, event: PageEvent) -> Option<PageState> {
        let page = self.get(place)?;
        let after = page.state().after(event)?;
        let awaited = match after {
            PageState::Wanted => true,
            PageState::Fetching => page.awaited(),
            _ => false,
        };
        self.set(place, Page::new(after, page.zero(), awaited));
        Some(after)
    }

    /// Someone touched a page that is missing.
    pub fn fault(&mut self, place: Place, now: Instant) -> Told {
        let Some(page) = self.get(place) else {
            return Told::Nowhere;
        };
        match page.state() {
            PageState::Present => return Told::Placed,
            PageState::Poisoned => return Told::Lost,
            PageState::Wanted => {}
            PageState::Fetching => {
                let (joined, raise) = page.joined();
                self.set(place, joined);
                if raise {
                    self.faults.push_back(place);
                }
            }
            _ => {
                self.step(place, PageEvent::Fault);
                self.faults.push_back(place);
                self.stats.faults += 1;
            }
        }
        if page.awaited() {
            self.stats.joined += 1;
        } else {
            if page.state() == PageState::Fetching {
                self.stats.joined += 1;
            }
            self.waits.push(Wait { place, since: now });
        }
        Told::InLine
    }

    /// Someone touched a page that the page cache has: the pages to be mapped, which are the caller's now. None where
    /// that is under way, or done.
    pub fn minor(&mut self, place: Place, now: Instant) -> Option<Job> {
        self.stats.minor += 1;
        match self.get(place)?.state() {
            PageState::Absent | PageState::Wanted => {}
            PageState::Fetching => {
                self.fault(place, now);
                return None;
            }
            // Mapped before, and taken out of the page table since.
            _ => return None,
        }
        self.fault(place, now);
        let window = self.slots.get_mut(place.slot)?.window.fault(place.page);
        Some(self.take(place, window, Why::Fault))
    }

    /// These pages will probably be wanted.
    ///
    /// Says whether there was room for it in the line.
    pub fn guess(&mut self, slot: usize, pages: Range<u64>) -> bool {
        if self.guesses.len() >= self.limits.backlog {
            return false;
        }
        self.guesses.push_back(Stretch { slot, pages });
        true
    }

    /// Everything is wanted, after all else.
    pub fn want_rest(&mut self) {
        self.rest.get_or_insert(Place { slot: 0, page: 0 });
    }

    /// The next fault's pages. `cut` says how many of so many pages from one are to be brought at once.
    pub fn start_fault(&mut self, cut: impl Fn(Place, u64) -> u64) -> Option<Job> {
        loop {
            let place = self.faults.pop_front()?;
            let page = self.get(place)?;
            match page.state() {
                PageState::Wanted => {}
                PageState::Fetching if page.is(Page::RAISE) => {
                    self.set(place, page.without(Page::RAISE).with(Page::TWICE));
                    self.stats.fetches += 1;
                    self.stats.raised += 1;
                    return Some(Job {
                        slot: place.slot,
                        pages: place.page..place.page + 1,
                        zero: false,
                        why: Why::Fault,
                    });
                }
                _ => continue, // it came with a neighbour
            }
            let window = self.slots.get_mut(place.slot)?.window.fault(place.page);
            return Some(self.take_cut(place, window, Why::Fault, cut));
        }
    }

    /// The next pages that nobody waits for, `most` bytes' worth of them.
    pub fn start_ahead(
        &mut self,
        most: impl Fn(usize) -> u64,
        cut: impl Fn(Place, u64) -> u64,
    ) -> Option<Job> {
        while let Some(place) = self.again.pop_front() {
            let only = place.page..place.page + 1;
            if self.absent(place.slot, only).is_some() {
                return Some(self.take_cut(place, 1, Why::Rest, cut));
            }
        }
        if self.is_held() {
            return None;
        }
        while let Some(mut stretch) = self.guesses.pop_front() {
            let Some(page) = self.absent(stretch.slot, stretch.pages.clone()) else {
                continue;
            };
            let place = Place {
                slot: stretch.slot,
                page,
            };
            let most = most(place.slot).min(stretch.pages.end - page);
            let job = self.take_cut(place, most, Why::Guess, cut);
            stretch.pages.start = job.pages.end;
            if !stretch.pages.is_empty() {
                self.guesses.push_front(stretch);
            }
            return Some(job);
        }
        let mut at = self.rest?;
        while let Some(slot) = self.slots.get(at.slot) {
            if let Some(page) = self.absent(at.slot, at.page..slot.pages.len() as u64) {
                let place = Place {
                    slot: at.slot,
                    page,
                };
                let job = self.take_cut(place, most(at.slot), Why::Rest, cut);
                at.page = job.pages.end;
                self.rest = Some(at);
                return Some(job);
            }
            at = Place {
                slot: at.slot + 1,
                page: 0,
            };
            self.rest = Some(at);
        }
        None
    }

    /// The first of these pages that is neither here nor under way nor given back.
    fn absent(&self, slot: usize, pages: Range<u64>) -> Option<u64> {
        let all = &self.slots.get(slot)?.pages;
        let some = all.get(pages.start as usize..all.len().min(pages.end as usize))?;
        let wanted = |page: &u8| Page(*page).state() == PageState::Absent && !Page(*page).zero();
        Some(pages.start + some.iter().position(wanted)? as u64)
    }

    fn take_cut(
        &mut self,
        place: Place,
        most: u64,
        why: Why,
        cut: impl Fn(Place, u64) -> u64,
    ) -> Job {
        let zero = self.get(place).is_some_and(Page::zero);
        let most = if zero {
            most
        } else {
            cut(place, most).clamp(1, most.max(1))
        };
        self.take(place, most, why)
    }

    /// The page, and those after it that nobody has and that are alike, begun.
    fn take(&mut self, place: Place, most: u64, why: Why) -> Job {
        let slot = place.slot;
        let zero = self.get(place).is_some_and(Page::zero);
        let alone = |book: &Self, place: &Place| {
            !book.failures.is_empty() && book.failures.contains_key(place)
        };
        let most = if alone(self, &place) { 1 } else { most.max(1) };
        let overtakes = self.slots.get(slot).is_some_and(|slot| slot.overtakes);
        let raises = overtakes && why != Why::Fault && !zero;
        let mut end = place.page;
        while end - place.page < most {
            let next = Place { slot, page: end };
            let fits = self.get(next).is_some_and(|page| {
                matches!(page.state(), PageState::Absent | PageState::Wanted) && page.zero() == zero
            });
            if !fits || end > place.page && alone(self, &next) {
                break;
            }
            self.step(next, PageEvent::Prefetch); // of a wanted one, changes nothing
            self.step(next, PageEvent::Start);
            if raises {
                self.ahead(next);
            }
            end += 1;
        }
        self.stats.fetches += 1;
        Job {
            slot,
            pages: place.page..end,
            zero,
            why,
        }
    }

    /// A page was begun for nobody. Who waits for it all the same is in line, and there it is raised.
    fn ahead(&mut self, place: Place) {
        let Some(page) = self.get(place) else {
            return;
        };
        let page = page.with(Page::AHEAD);
        let page = if page.awaited() {
            page.joined().0
        } else {
            page
        };
        self.set(place, page);
    }

    /// The pages of a job, from one on, that are still its own: not given back, given up or placed since it began.
    pub fn own(&self, job: &Job, from: u64) -> Option<Range<u64>> {
        let mine = |page: u64| {
            let page = self.get(Place {
                slot: job.slot,
                page,
            });
            page.is_some_and(|page| page.state() == PageState::Fetching && page.zero() == job.zero)
        };
        let start = (from..job.pages.end).find(|page| mine(*page))?;
        let end = (start..job.pages.end).find(|page| !mine(*page));
        Some(start..end.unwrap_or(job.pages.end))
    }

    /// Pages of a job are in memory.
    pub fn arrived(&mut self, job: &Job, pages: Range<u64>, now: Instant) {
        for page in pages {
            let place = Place {
                slot: job.slot,
                page,
            };
            let Some(before) = self.get(place) else {
                continue;
            };
            if before.zero() != job.zero || self.step(place, PageEvent::Arrived).is_none() {
                continue;
            }
            self.stats.placed += 1;
            if before.awaited() {
                if let Some(since) = self.waited(place) {
                    let took = now.saturating_duration_since(since);
                    self.stats.latency.record(took);
                }
            } else {
                self.stats.ahead += 1;
            }
            if !self.failures.is_empty() {
                self.failures.remove(&place);
            }
        }
    }

    /// A page that was to be mapped from the page cache is not in it: who waits for it waits for its source, and a neighbour
    /// is nobody's.
    pub fn not_cached(&mut self, job: &Job, page: u64) {
        let place = Place {
            slot: job.slot,
            page,
        };
        let mine = |page: &Page| page.state() == PageState::Fetching && page.zero() == job.zero;
        let Some(page) = self.get(place).filter(mine) else {
            return;
        };
        if page.awaited() {
            self.step(place, PageEvent::Retry);
            self.faults.push_back(place);
        } else {
            self.step(place, PageEvent::Forget);
        }
    }

    fn waited(&mut self, place: Place) -> Option<Instant> {
        let at = self.waits.iter().position(|wait| wait.place == place)?;
        Some(self.waits.swap_remove(at).since)
    }

    /// The pages of a job from one on did not come; trying again may help, or not. Those that are given up: they are to
    /// be poisoned.
    pub fn failed(&mut self, job: &Job, from: u64, transient: bool, now: Instant) -> Vec<Place> {
        let alone = job.pages.end - job.pages.start == 1;
        let mut given_up = Vec::new();
        for page in from..job.pages.end {
            let place = Place {
                slot: job.slot,
                page,
            };
            let Some(before) = self.get(place) else {
                continue;
            };
            if before.state() != PageState::Fetching || before.zero() != job.zero {
                continue;
            }
            // Under way once more: that decides.
            if before.is(Page::TWICE) {
                self.set(place, before.without(Page::TWICE | Page::AHEAD));
                continue;
            }
            let awaited = before.awaited();
            // Where everything is to come, this page may have been passed over already.
            if !awaited && job.why != Why::Rest && self.rest.is_none() {
                self.step(place, PageEvent::Forget);
                continue;
            }
            // A neighbour may be to blame: each by itself, at once, and this does not count.
            let failures = self.failures.entry(place).or_insert(Failures {
                alone: 0,
                first: now,
            });
            failures.alone = failures.alone.saturating_add(u32::from(alone));
            let (failures, since) = (failures.alone, failures.first);
            let often = match self.limits.retries {
                Some(retries) => failures > retries,
                // Who waits for a page of a source has a deadline of their own.
                None if awaited && !before.zero() => false,
                None => now.saturating_duration_since(since) >= self.limits.deadline,
            };
            if alone && (!transient || often) {
                self.step(place, PageEvent::GaveUp);
                self.forget(place);
                self.stats.lost += 1;
                given_up.push(place);
                continue;
            }
            let event = if awaited {
                PageEvent::Retry
            } else {
                PageEvent::Forget
            };
            self.step(place, event);
            self.stats.retries += 1;
            match (alone, awaited) {
                (true, _) => {
                    let backoff = match awaited {
                        true => self.backoff(failures),
                        false => self.limits.longest_backoff,
                    };
                    // However long is meant.
                    let due = now + backoff.min(LONGEST);
                    self.delayed.push(Reverse((due, place)));
                }
                (false, true) => self.faults.push_back(place),
                (false, false) => self.again.push_back(place),
            }
        }
        given_up
    }

    fn forget(&mut self, place: Place) {
        self.waited(place);
        self.failures.remove(&place);
    }

    /// Twice as long after each failure.
    fn backoff(&self, failures: u32) -> Duration {
        let doubled = 1u32
            .checked_shl(failures.saturating_sub(1))
            .unwrap_or(u32::MAX);
        let backoff = self.limits.backoff.saturating_mul(doubled);
        backoff.min(self.limits.longest_backoff)
    }

    /// Puts in line again what has been put off until now.
    pub fn put_due_in_line(&mut self, now: Instant) {
        while let Some(Reverse((due, place))) = self.delayed.peek().copied() {
            if due > now {
                break;
            }
            self.delayed.pop();
            match self.get(place).map(Page::state) {
                Some(PageState::Wanted) => self.faults.push_back(place),
                Some(PageState::Absent) => self.again.push_back(place),
                _ => {}
            }
        }
    }

    /// So many pages are to be tried again that what serves them is away: others have time.
    fn is_held(&self) -> bool {
        self.delayed.len() > self.limits.backlog
    }

    /// What someone has waited for for too long. Zeros are never late, for they need no source.
    pub fn late(&self, now: Instant) -> Vec<Place> {
        let deadline = self.limits.deadline;
        let is_late = |wait: &&Wait| {
            now.saturating_duration_since(wait.since) >= deadline && !self.is_zero(wait.place)
        };
        let late = self.waits.iter().filter(is_late);
        late.map(|wait| wait.place).collect()
    }

    /// Nobody could be served for so long: the deadlines of all who wait are so much later.
    pub fn excuse(&mut self, over: Duration) {
        for wait in &mut self.waits {
            wait.since = wait.since.checked_add(over).unwrap_or(wait.since);
        }
    }

    /// Whether someone waits for a page of a source.
    pub fn is_awaited(&self, place: Place) -> bool {
        self.waits.iter().any(|wait| wait.place == place) && !self.is_zero(place)
    }

    /// Gives up a page that someone waits for. Says whether it was still to come.
    pub fn lose(&mut self, place: Place) -> bool {
        if self.is_zero(place) || self.step(place, PageEvent::GaveUp).is_none() {
            return false;
        }
        self.forget(place);
        self.stats.lost += 1;
        true
    }

    /// A page that was to be given up is there.
    pub fn found(&mut self, place: Place) {
        self.step(place, PageEvent::Start); // of one under way, changes nothing
        self.step(place, PageEvent::Arrived);
        self.forget(place);
    }

    /// A page for which someone waits and which was given back: it can be served without a source.
    pub fn start_zero(&mut self) -> Option<Job> {
        let wants_zeros = |place: &Place| {
            let page = self.get(*place);
            page.is_some_and(|page| page.state() == PageState::Wanted && page.zero())
        };
        let at = self.faults.iter().position(wants_zeros)?;
        let place = self.faults.remove(at)?;
        Some(self.take(place, 1, Why::Fault))
    }

    /// When something is [late](Self::late) next, or to be [put in line](Self::put_due_in_line).
    pub fn next_due(&self) -> Option<Instant> {
        let is_late = |wait: &&Wait| !self.is_zero(wait.place);
        let late = self.waits.iter().filter(is_late);
        let late = late.filter_map(|wait| wait.since.checked_add(self.limits.deadline));
        let due = self.delayed.peek().map(|Reverse((due, _))| *due);
        late.chain(due).min()
    }

    /// Pages were given back: they are zeros from now on, whoever brings what.
    pub fn removed(&mut self, slot: usize, pages: Range<u64>) {
        for page in pages {
            let place = Place { slot, page };
            let Some(before) = self.get(place) else {
                return;
            };
            let Some(after) = before.state().after(PageEvent::Remove) else {
                continue;
            };
            self.stats.removed += 1;
            if !self.failures.is_empty() {
                self.failures.remove(&place);
            }
            let waits = before.awaited() && after == PageState::Absent;
            let after = if waits { PageState::Wanted } else { after };
            self.set(place, Page::new(after, true, after == PageState::Wanted));
            if waits {
                self.faults.push_back(place);
            }
        }
    }

    /// Whether a page was given back.
    pub fn is_zero(&self, place: Place) -> bool {
        self.get(place).is_some_and(Page::zero)
    }

    /// How many pages someone waits for.
    pub fn waiting(&self) -> usize {
        self.waits.len()
    }

    /// Whether someone waits for a page that no worker has begun.
    pub fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Whether there is something to bring that nobody waits for; may be wrong about pages that have come meanwhile.
    pub fn has_ahead(&self) -> bool {
        let behind = |at: Place| at.slot < self.slots.len();
        let more = || !self.guesses.is_empty() || self.rest.is_some_and(behind);
        !self.again.is_empty() || !self.is_held() && more()
    }

    /// Whether every page is here, lost, or given back.
    pub fn is_complete(&self) -> bool {
        self.settled == self.total
    }

    /// Pages that have to come still, those that will not, and all.
    pub fn totals(&self) -> (u64, u64, u64) {
        (self.total - self.settled, self.lost, self.total)
    }

    /// The runs of pages that are not settled, which are lost from now on. Nothing is left to be done.
    pub fn give_all_up(&mut self) -> Vec<(usize, Range<u64>)> {
        (self.guesses, self.rest) = (VecDeque::new(), None);
        self.faults.clear();
        self.again.clear();
        self.delayed.clear();
        self.waits.clear();
        let mut runs: Vec<(usize, Range<u64>)> = Vec::new();
        for (slot, of) in self.slots.iter_mut().enumerate() {
            for (page, byte) in of.pages.iter_mut().enumerate() {
                let (page, state) = (page as u64, Page(*byte));
                if state.settled() {
                    continue;
                }
                *byte = Page::new(PageState::Poisoned, state.zero(), false).0;
                self.settled += 1;
                self.lost += 1;
                match runs.last_mut() {
                    Some((of, run)) if *of == slot && run.end == page => run.end += 1,
                    _ => runs.push((slot, page..page + 1)),
                }
            }
        }
        runs
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
