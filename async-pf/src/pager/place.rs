// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages into memory, and what to do about each of the kernel's refusals.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use memslots::uffd::{Cause, Event, Fault, FaultKind, FillRole, Messages, OpError, Wake};

use super::book::{Job, Place, Why};
use super::config::{GiveUp, Lost, LostReason};
use super::shared::{Answer, Hands, Shared};
use crate::{Fetched, Lane, sync};

/// How often others have their turn before a thread that waits for a change of memory sleeps between two looks.
const TURNS: u32 = 64;
/// How long it sleeps then.
const NAP: Duration = Duration::from_micros(100);

/// What is placed by one call at most, in bytes: a message that pages were given back is not read meanwhile, nor a fault
/// behind it, and a mebibyte takes half a millisecond.
const STEP: u64 = 128 << 10;

/// How long an operation is asked for again while memory is being changed: that ends when the changing thread has been
/// scheduled, after its message was read. Until the deadline of a fault.
struct Patience {
    turns: u32,
    until: Option<Instant>,
}

/// What is placed.
#[derive(Clone, Copy)]
enum With<'a> {
    Bytes(&'a [u8]),
    Zeros,
    /// What the page cache has.
    Cache,
}

/// What becomes of a late page.
enum Decided {
    /// It is given up.
    Lost,
    /// It has come.
    There,
    /// Memory is being changed: later.
    Changing,
}

impl Shared {
    /// Brings the pages of a job, and does what else is to be done.
    pub fn serve(&self, job: &Job, hands: &mut Hands) {
        self.bring(job, hands);
        self.answer(hands);
    }

    fn bring(&self, job: &Job, hands: &mut Hands) {
        let Some(slot) = self.slots.get(job.slot) else {
            return;
        };
        if !slot.missing {
            return self.put(job, With::Cache, hands);
        }
        if job.zero {
            return self.put(job, With::Zeros, hands);
        }
        let size = ((job.pages.end - job.pages.start) * slot.page_size) as usize;
        let mut buffer = std::mem::take(&mut hands.buffer);
        if buffer.len() < size {
            buffer.resize(size, 0);
        }
        let bytes = buffer.get_mut(..size).unwrap_or_default();
        let first = slot.gfn(job.pages.start);
        let mut state = self.lock();
        if state.stop {
            return; // whoever ends the pager does not wait for a source
        }
        state.fetching.push(hands.thread);
        drop(state);
        let begun = sync::now();
        let lane = match job.why {
            Why::Fault => Lane::Fault,
            Why::Guess | Why::Rest => Lane::Prefetch,
        };
        // A panic of a source is the page's failure, not the pager's. What it leaves behind is its own affair.
        let fetched = catch_unwind(AssertUnwindSafe(|| {
            slot.source.fetch_for(lane, first, bytes)
        }));
        let took = begun.elapsed();
        let fetched = fetched.map(|answer| answer.map_err(Arc::new));
        let mut state = self.lock();
        state.fetching.retain(|thread| *thread != hands.thread);
        state.fetch = (state.fetch * 7 + took) / 8;
        match &fetched {
            Ok(Ok(_)) => state.failing.forget(job),
            Ok(Err(error)) if error.is_transient() => state.failing.note(job, error),
            Ok(Err(_)) | Err(_) => {}
        }
        drop(state);
        match fetched {
            Ok(Ok(Fetched::Bytes)) => self.put(job, With::Bytes(bytes), hands),
            Ok(Ok(Fetched::Zero)) => self.put(job, With::Zeros, hands),
            Ok(Err(error)) => {
                let transient = error.is_transient();
                self.failed(job, job.pages.start, transient, &error.into(), hands);
            }
            Err(_) => self.failed(job, job.pages.start, false, &LostReason::Panic, hands),
        }
        hands.buffer = buffer;
    }

    /// Places the pages of a job that are still its own.
    fn put(&self, job: &Job, with: With<'_>, hands: &mut Hands) {
        let (mut at, mut patience) = (job.pages.start, self.patience());
        // Up to here one page at a time: the kernel refuses all of what lies in two of its mappings.
        let mut singly = at;
        while at < job.pages.end {
            let roles = self.roles();
            // Asked under `roles`: until it is let go of, nobody notes that a page was given back.
            let Some(run) = self.lock().book.own(job, at) else {
                return;
            };
            let (Some(role), Some(slot)) = (roles.get(job.slot), self.slots.get(job.slot)) else {
                return; // the pager is over
            };
            let most = if run.start < singly {
                1
            } else {
                (STEP / slot.page_size).max(1)
            };
            let run = run.start..run.end.min(run.start + most);
            let bytes = slot.bytes(&run);
            let placed = match with {
                With::Bytes(all) => {
                    let skip = ((run.start - job.pages.start) * slot.page_size) as usize;
                    let size = (bytes.end - bytes.start) as usize;
                    let part = all.get(skip..skip + size).unwrap_or_default();
                    role.copy(bytes.start, part, Wake::Now)
                }
                With::Zeros => role.zero(bytes, Wake::Now),
                With::Cache => role.continue_minor(bytes, Wake::Now),
            };
            let (stopped, cause) = match placed {
                Ok(()) => (run.end, None),
                Err(error) => (run.start + error.done / slot.page_size, Some(error)),
            };
            let there = cause.is_some_and(|error| error.cause == Cause::AlreadyThere);
            // Noted under `roles` too: or the page could be given back, and wanted again, before it counts as placed.
            let placed = run.start..stopped + u64::from(there);
            self.arrived(job, placed, matches!(with, With::Zeros));
            drop(roles);
            at = stopped;
            let Some(error) = cause else {
                continue;
            };
            match error.cause {
                Cause::AlreadyThere => {
                    self.wake(Place {
                        slot: job.slot,
                        page: at,
                    });
                    at += 1;
                }
                Cause::Changing if self.let_change(&mut patience, hands) => {}
                Cause::NotRegistered if run.end - run.start > 1 => singly = run.end,
                // It will not come, which is no word about its neighbours.
                Cause::NotRegistered => {
                    let alone = Job {
                        pages: at..at + 1,
                        ..job.clone()
                    };
                    self.failed(&alone, at, false, &error.into(), hands);
                    at += 1;
                }
                // Nobody can wait for these any more.
                Cause::ProcessGone => {
                    self.arrived(job, at..job.pages.end, false);
                    return;
                }
                // It has left the page cache, or never was in it: the source has it.
                Cause::NoSource if matches!(with, With::Cache) && slot.missing => {
                    let mut state = self.lock();
                    state.book.not_cached(job, at);
                    self.rouse(&mut state);
                    at += 1;
                }
                // And then, it is the kernel's to bring.
                Cause::NoSource if matches!(with, With::Cache) => {
                    self.wake(Place {
                        slot: job.slot,
                        page: at,
                    });
                    self.arrived(job, at..at + 1, false);
                    at += 1;
                }
                cause => {
                    let transient = matches!(cause, Cause::NoMemory | Cause::Changing);
                    return self.failed(job, at, transient, &error.into(), hands);
                }
            }
        }
    }

    fn arrived(&self, job: &Job, pages: Range<u64>, zeros: bool) {
        if pages.is_empty() {
            return;
        }
        let now = sync::now();
        let mut state = self.lock();
        if zeros {
            state.book.stats.zeros += pages.end - pages.start;
        }
        state.book.arrived(job, pages, now);
        if state.book.is_complete() {
            self.done.notify_all();
        }
    }

    fn patience(&self) -> Patience {
        Patience {
            turns: 0,
            until: sync::now().checked_add(self.config.deadline),
        }
    }

    /// Memory is being changed: reads the message that this may wait for, whoever else is about to, and lets others have
    /// their turn. Says whether it is worth asking again.
    fn let_change(&self, patience: &mut Patience, hands: &mut Hands) -> bool {
        if let Err(errno) = self.read(hands) {
            self.fail(errno);
        }
        patience.turns = patience.turns.saturating_add(1);
        if patience.turns < TURNS {
            sync::yield_now();
            return true;
        }
        sync::sleep(NAP);
        patience.until.is_none_or(|until| sync::now() < until) && !self.lock().stop
    }

    fn failed(
        &self,
        job: &Job,
        from: u64,
        transient: bool,
        reason: &LostReason,
        hands: &mut Hands,
    ) {
        let mut state = self.lock();
        let lost = state.book.failed(job, from, transient, sync::now());
        self.rouse(&mut state);
        self.stir(&mut state);
        drop(state);
        for place in lost {
            self.give_up(place, reason, hands);
        }
    }

    /// Gives up a page that is late, unless it is there at this very moment.
    pub fn expire(&self, place: Place, reason: &LostReason, hands: &mut Hands) {
        let (mut patience, mut last) = (self.patience(), false);
        let lost = loop {
            match self.decide(place, last) {
                Some(Decided::Changing) => last = !self.let_change(&mut patience, hands),
                Some(Decided::Lost) => break true,
                Some(Decided::There) => break false,
                None => return,
            }
        };
        if lost {
            self.tell_lost(place, reason);
        }
        if self.config.give_up == GiveUp::Poison {
            self.wake(place);
        }
    }

    /// What becomes of a late page. Nothing is placed meanwhile, so what is poisoned here and what is noted are one; who waits
    /// is not woken yet. None: nobody waits for it any more.
    fn decide(&self, place: Place, last: bool) -> Option<Decided> {
        let roles = self.roles_alone();
        if !self.lock().book.is_awaited(place) {
            return None;
        }
        let (role, slot) = (roles.get(place.slot)?, self.slots.get(place.slot)?);
        let bytes = slot.bytes(&(place.page..place.page + 1));
        let answer = match self.config.give_up {
            GiveUp::Poison => role.poison(bytes, Wake::Later),
            GiveUp::Tell => Ok(()),
        };
        let cause = answer.err().map(|error| error.cause);
        if cause == Some(Cause::Changing) && !last {
            return Some(Decided::Changing);
        }
        let mut state = self.lock();
        let there = cause == Some(Cause::AlreadyThere);
        if there {
            state.book.found(place);
        } else if !state.book.lose(place) {
            return None;
        } else if cause.is_some() {
            state.book.stats.unanswered += 1;
        }
        if state.book.is_complete() {
            self.done.notify_all();
        }
        Some(if there { Decided::There } else { Decided::Lost })
    }

    fn tell_lost(&self, place: Place, reason: &LostReason) {
        if let Some(slot) = self.slots.get(place.slot) {
            let lost = Lost {
                slot: place.slot,
                gfn: slot.gfn(place.page),
                reason,
            };
            self.tell(|events| events.lost(&lost));
        }
    }

    /// Tells of a page that will not come, and poisons it.
    pub fn give_up(&self, place: Place, reason: &LostReason, hands: &mut Hands) {
        self.tell_lost(place, reason);
        if self.config.give_up == GiveUp::Poison {
            self.poison(place, hands);
        }
        if self.lock().book.is_complete() {
            self.done.notify_all();
        }
    }

    fn poison(&self, place: Place, hands: &mut Hands) {
        let mut patience = self.patience();
        loop {
            match self.on_page(place, |role, bytes| role.poison(bytes, Wake::Now)) {
                Err(Cause::Changing) if self.let_change(&mut patience, hands) => {}
                // A worker was first.
                Err(Cause::AlreadyThere) => return self.wake(place),
                Err(_) => break,
                Ok(()) => return,
            }
        }
        self.lock().book.stats.unanswered += 1;
    }

    fn wake(&self, place: Place) {
        if self.on_page(place, |role, bytes| role.wake(bytes)).is_err() {
            self.lock().book.stats.unanswered += 1;
        }
    }

    /// An operation on one page. That the pager is over is no failure.
    fn on_page(
        &self,
        place: Place,
        operate: impl FnOnce(&FillRole, Range<u64>) -> Result<(), OpError>,
    ) -> Result<(), Cause> {
        let roles = self.roles();
        match (roles.get(place.slot), self.slots.get(place.slot)) {
            (Some(role), Some(slot)) => operate(role, slot.bytes(&(place.page..place.page + 1)))
                .map_err(|error| error.cause),
            _ => Ok(()),
        }
    }

    /// Does what the messages asked for that were read.
    pub fn answer(&self, hands: &mut Hands) {
        while let Some(answer) = hands.answers.pop() {
            match answer {
                Answer::Again(place) => self.again(place, hands),
                Answer::Poison(place) if self.config.give_up == GiveUp::Poison => {
                    self.poison(place, hands);
                }
                Answer::Poison(_) => {}
                Answer::Map(job) => self.put(&job, With::Cache, hands),
                Answer::Continue(place) => self.map_again(place, hands),
                Answer::Protected(fault) => self.protected(&fault, hands),
                Answer::Removed(range) => drop(self.tell(|events| events.removed(range))),
                Answer::Remapped(from, to, size) => {
                    self.tell(|events| events.remapped(from, to, size));
                }
            }
        }
    }

    /// A fault on a page that was placed. It is missing only if it has been given back since without a message, and then
    /// reads as zeros; otherwise whoever waits has only to look again.
    fn again(&self, place: Place, hands: &mut Hands) {
        let mut patience = self.patience();
        loop {
            match self.on_page(place, |role, bytes| role.zero(bytes, Wake::Now)) {
                Err(Cause::Changing) if self.let_change(&mut patience, hands) => {}
                Err(_) => return self.wake(place),
                Ok(()) => return,
            }
        }
    }

    fn protected(&self, fault: &Fault, hands: &mut Hands) {
        let mut patience = self.patience();
        while self.tell(|events| events.write_protected(fault)) == Some(false) {
            if !self.let_change(&mut patience, hands) {
                // Then it is told of again.
                if let Some(place) = self.place(fault.address) {
                    self.wake(place);
                }
                return;
            }
        }
    }

    fn map_again(&self, place: Place, hands: &mut Hands) {
        let mut patience = self.patience();
        loop {
            match self.on_page(place, |role, bytes| role.continue_minor(bytes, Wake::Now)) {
                Err(Cause::Changing) if self.let_change(&mut patience, hands) => {}
                Err(_) => return self.wake(place),
                Ok(()) => return,
            }
        }
    }

    /// The kernel refuses to be read: nobody can be served any more.
    pub fn fail(&self, errno: memslots::Errno) {
        let mut state = self.lock();
        let first = state.failed.replace(errno).is_none();
        state.stop = true;
        state.poke = None;
        self.work.notify_all();
        self.watch.notify_all();
        self.done.notify_all();
        drop(state);
        if first {
            self.abandon();
            self.tell(|events| events.failed(errno));
        }
    }

    /// Gives up all that is missing, so that nobody waits for a pager that is not there, or reads zeros in its place.
    /// Where nothing is poisoned, who waits is woken, and is told of again.
    pub fn abandon(&self) {
        let roles = self.roles();
        if roles.is_empty() {
            return;
        }
        let mut protected = Vec::new();
        let mut state = self.lock();
        let runs = state.book.give_all_up();
        state.abandoned |= !runs.is_empty();
        drop(state);
        if self.config.give_up != GiveUp::Poison {
            return self.wake_all(&roles);
        }
        for (slot, mut run) in runs {
            let (Some(role), Some(slot)) = (roles.get(slot), self.slots.get(slot)) else {
                continue;
            };
            let (mut patience, mut most) = (self.patience(), u64::MAX);
            while !run.is_empty() {
                let part = run.start..run.end.min(run.start.saturating_add(most));
                let Err(error) = role.poison(slot.bytes(&part), Wake::Now) else {
                    run.start = part.end;
                    most = most.saturating_mul(2);
                    continue;
                };
                run.start += error.done / slot.page_size;
                match error.cause {
                    // It lies in two of the kernel's mappings, or in none.
                    Cause::NotRegistered if part.end - part.start > 1 => {
                        most = (part.end - part.start) / 2;
                    }
                    Cause::NotRegistered => run.start += 1,
                    // A worker was first; whoever waits for it is woken below.
                    Cause::AlreadyThere => run.start += 1,
                    Cause::Changing if self.drain(&mut patience, &mut protected) => {}
                    _ => break,
                }
            }
        }
        self.wake_all(&roles);
        drop(roles);
        for fault in protected {
            self.tell(|events| events.write_protected(&fault));
        }
    }

    /// Who waits looks again. That memory is not registered any more is no failure: nobody waits there.
    pub fn wake_all(&self, roles: &[FillRole]) {
        for role in roles {
            let _ = role.wake(0..role.size());
        }
    }

    /// Reads messages, for nobody else does: a change of memory waits for that. Faults of missing pages need no answer,
    /// for all of these are given up at this moment; those of protected ones are left in `protected`.
    fn drain(&self, patience: &mut Patience, protected: &mut Vec<Fault>) -> bool {
        let mut messages = Messages::with_capacity(16);
        // What cannot be read is not waited for either.
        let read = self.uffd.read(&mut messages);
        for event in messages {
            if let Event::Fault(fault) = event
                && fault.kind == FaultKind::WriteProtect
            {
                protected.push(fault);
            }
        }
        patience.turns = patience.turns.saturating_add(1);
        match patience.turns < TURNS {
            true => sync::yield_now(),
            false => sync::sleep(NAP),
        }
        read.is_ok() && patience.until.is_none_or(|until| sync::now() < until)
    }
}
