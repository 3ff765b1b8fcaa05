// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads: workers, which read messages, fetch and place; and the guard, which has the clock.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::config::LostReason;
use super::shared::{Hands, READERS, Shared, State};
use crate::sync::{self, MutexGuard};

/// How often the guard looks whether someone reads messages, while there is something to do.
const TICK: Duration = Duration::from_millis(2);
/// A source whose fetches take longer is one of which several bring more at once than one: it is far away, and they wait.
const FAR: Duration = Duration::from_micros(500);
/// After so many looks at which nothing was done, it sleeps until something is. In a model, soon.
const QUIET: u32 = if cfg!(loom) { 1 } else { 50 };

/// A guard that sleeps so much longer than it would was stopped, and the process with it (SIGSTOP, a terminal's Ctrl-Z, a virtual
/// machine that was paused): nobody was served meanwhile, and nobody waits any longer for that.
const STOPPED: Duration = Duration::from_secs(1);

/// How much longer than `limit` it was since `begun`, if that is no chance.
fn overslept(begun: Instant, limit: Duration) -> Option<Duration> {
    let slept = sync::now().saturating_duration_since(begun);
    slept.checked_sub(limit).filter(|over| *over >= STOPPED)
}

/// errno(3): "owner died".
const EOWNERDEAD: i32 = 130;

/// Counts a thread out when it ends, however that comes: before it was told to, the pager cannot go on.
pub(super) struct Living(pub Arc<Shared>);

impl Living {
    /// Its thread has begun.
    pub fn begin(&self) {
        self.0.lock().threads.push(sync::thread_id());
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.alive -= 1;
        let own = sync::thread_id();
        state.threads.retain(|thread| *thread != own);
        // It has unwound, or was never run.
        let forsaken = state.promised && !state.stop;
        drop(state);
        if forsaken {
            self.0.fail(memslots::Errno(EOWNERDEAD));
        }
        self.0.done.notify_all();
    }
}

/// Takes back what a thread has said of itself, if it unwinds.
struct Unwinds<'a>(&'a Shared, fn(&mut State));

impl Drop for Unwinds<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.1)(&mut self.0.lock());
        }
    }
}

impl Shared {
    /// A worker's life.
    pub fn work(&self) {
        let mut hands = self.hands();
        let mut state = self.lock();
        while !state.stop {
            if let Some(job) = state.book.start_fault(|place, most| self.cut(place, most)) {
                self.leave(&mut state);
                drop(state);
                self.serve(&job, &mut hands);
                state = self.lock();
                continue;
            }
            // Some bring what nobody waits for; between two pieces they look for faults, if nobody else does.
            let ahead = self.wants_ahead(&state);
            // The guard only stands in: whoever comes back reads again, and does not wait for it to be scheduled.
            let most = if ahead { 1 } else { READERS };
            if state.readers < most {
                state.readers += 1;
                drop(state);
                let unwinds = Unwinds(self, |state| state.readers -= 1);
                let read = self.take_turn(!ahead, &mut hands);
                drop(unwinds);
                state = self.lock();
                state.readers -= 1;
                state.turns += 1;
                self.unpoke(&mut state);
                if read.is_err() || !hands.answers.is_empty() {
                    drop(state);
                    read.unwrap_or_else(|errno| self.fail(errno));
                    self.answer(&mut hands);
                    state = self.lock();
                }
                if ahead && self.wants_ahead(&state) && !state.stop && !state.book.has_faults() {
                    state = self.bring_ahead(state, &mut hands);
                }
                continue; // from the top: whatever it had seen may have changed meanwhile
            }
            if ahead {
                state = self.bring_ahead(state, &mut hands);
                continue;
            }
            // Others read, and the lock was not let go of since that was seen, nor since `stop` was.
            state.idle += 1;
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    /// A piece of what nobody waits for.
    fn bring_ahead<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        hands: &mut Hands,
    ) -> MutexGuard<'a, State> {
        let most = |slot: usize| self.slots.get(slot).map_or(1, |slot| slot.ahead);
        let Some(job) = state
            .book
            .start_ahead(most, |place, most| self.cut(place, most))
        else {
            return state;
        };
        state.ahead += 1;
        if state.readers == 0 && state.idle > 0 {
            self.work.notify_one();
        }
        self.leave(&mut state);
        drop(state);
        let unwinds = Unwinds(self, |state| state.ahead -= 1);
        self.serve(&job, hands);
        drop(unwinds);
        state = self.lock();
        state.ahead -= 1;
        state
    }

    /// Whether one more worker may bring what nobody waits for, and there is some. Of a source that is near, one brings as
    /// much as several would, and those would take the processors from who serves faults.
    fn wants_ahead(&self, state: &State) -> bool {
        let most = if state.fetch > FAR {
            self.most_ahead()
        } else {
            1
        };
        state.ahead < most && state.book.has_ahead()
    }

    fn take_turn(&self, wait: bool, hands: &mut Hands) -> Result<(), memslots::Errno> {
        if wait && !self.wait(None)? {
            return Ok(());
        }
        self.read(hands)
    }

    /// The guard's life. It answers who has waited too long, puts in line what is to be tried again, and reads messages
    /// where every worker is inside a source.
    pub fn guard(&self) {
        let mut hands = self.hands();
        let (mut seen, mut quiet) = (0, 0);
        let mut state = self.lock();
        while !state.stop {
            let now = sync::now();
            state.book.put_due_in_line(now);
            let late = state.book.late(now);
            if state.book.has_faults() || self.wants_ahead(&state) {
                self.rouse(&mut state);
            }
            if !late.is_empty() {
                drop(state);
                let within = self.config.deadline;
                for place in late {
                    let failed = self.lock().failing.at(place);
                    let reason = match failed {
                        Some(source) => LostReason::Failing { within, source },
                        None => LostReason::Deadline(within),
                    };
                    self.expire(place, &reason, &mut hands);
                }
                self.answer(&mut hands);
                state = self.lock();
                continue;
            }
            let nobody = state.readers == 0;
            let unmoved = nobody && state.turns == seen;
            if unmoved && state.idle > 0 {
                self.work.notify_one();
            } else if unmoved {
                state = self.read_for_others(state, &mut hands);
                continue;
            }
            let still = !nobody && state.turns == seen;
            quiet = if still { quiet + 1 } else { 0 };
            seen = state.turns;
            let due = state.book.next_due();
            let due = due.map(|due| due.saturating_duration_since(sync::now()));
            state.guard_asleep = quiet >= QUIET;
            let limit = match (state.guard_asleep, due) {
                (true, due) => due,
                (false, due) => Some(due.unwrap_or(TICK).min(TICK)),
            };
            let (begun, fetches) = (sync::now(), state.book.stats.fetches);
            state = match limit {
                Some(limit) => {
                    let mut state = self.wait_for(&self.watch, state, limit);
                    if let Some(over) = overslept(begun, limit) {
                        state.book.excuse(over);
                    }
                    state
                }
                None => {
                    let waited = self.watch.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
            // What has been under way all the time takes that long, and may have been the first.
            let same = state.ahead > 0 && state.book.stats.fetches == fetches;
            if same && self.most_ahead() > 1 {
                state.fetch = state.fetch.max(begun.elapsed().min(TICK));
            }
            if std::mem::take(&mut state.guard_asleep) {
                // It was time, and nobody who [stirs](Shared::stir) it.
                quiet = QUIET;
            } else if quiet >= QUIET {
                quiet = 0;
            }
        }
    }

    /// Every worker is busy and none has read since the last look: reads in their place, for a moment.
    fn read_for_others<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        hands: &mut Hands,
    ) -> MutexGuard<'a, State> {
        let due = state.book.next_due();
        drop(state);
        let limit = due.map_or(TICK, |due| {
            due.saturating_duration_since(sync::now()).min(TICK)
        });
        let begun = sync::now();
        let waited = self.wait(Some(limit));
        let over = overslept(begun, limit);
        let read = waited.and_then(|told| match told {
            true => self.read(hands),
            false => Ok(()),
        });
        let mut state = self.lock();
        if let Some(over) = over {
            state.book.excuse(over);
        }
        if state.idle > 0 {
            self.work.notify_one();
        }
        // What needs no source waits for none.
        let zeros = state.book.start_zero();
        drop(state);
        read.unwrap_or_else(|errno| self.fail(errno));
        if let Some(job) = zeros {
            self.serve(&job, hands);
        }
        self.answer(hands);
        self.lock()
    }
}
