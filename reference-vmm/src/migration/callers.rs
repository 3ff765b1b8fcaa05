// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Those who have connected and have not said yet what for, of whom there are no more than [`MOST`] at once.
//!
//! # The promise
//! Who says nothing keeps nobody out. When all places are taken, the one who has waited the longest makes room for who comes:
//! of the address that has the most of them, and of these first one who has not shown who he is by TLS. So
//! - who comes from an address of its own is heard, however many come from fewer than [`MOST`] other addresses, and however
//!   fast: one of those has two places or more, and makes room;
//! - who shares one with strangers (all of this host's users do) has the time until so many more have come: at 200 a second two
//!   thirds of a second, where TLS takes milliseconds;
//! - so has who has an address of its own, where strangers have as many as there are places: all of them have one place then,
//!   and the oldest goes. Against such a crowd helps what keeps it from the port.
//!
//! Who has said what for leaves its place: a connection of the migration is never closed for another.
//!
//! An IPv6 address counts by its first 64 bits, which one host may have to itself: who has more than that, as a /56, or all of
//! 127.0.0.0/8 on this host, has many.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::message::MOST_CONNECTIONS;

/// So many are heard at once: twice a source's own, all of which may come together ([`MOST_CONNECTIONS`] and one more for pages).
pub const MOST: usize = 2 * MOST_CONNECTIONS as usize;
/// And so many threads are at it, with those of whom was closed and who are on their way out.
const MOST_THREADS: usize = 2 * MOST;

/// Ends a caller's connection at once, from another thread.
pub type HangUp = Box<dyn Fn() + Send>;

struct Entry {
    number: u64,
    since: Instant,
    from: String,
    known: bool,
    hang_up: HangUp,
}

#[derive(Default)]
struct Room {
    /// In the order in which they came.
    waiting: Vec<Entry>,
    next: u64,
    threads: usize,
    /// It has been said that there is no room.
    told: bool,
}

/// The places.
#[derive(Default)]
pub(crate) struct Callers {
    room: Mutex<Room>,
    left: Condvar,
}

/// A caller's, until this is dropped.
pub(crate) struct Place<'a> {
    callers: &'a Callers,
    number: u64,
}

impl Callers {
    fn lock(&self) -> MutexGuard<'_, Room> {
        // What is in it is whole after each statement.
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for who comes from `from`, which may cost another his. Waits up to `patience` for a thread of one who had to go;
    /// none where there is none by then.
    pub(crate) fn enter(
        &self,
        from: String,
        hang_up: HangUp,
        patience: Duration,
    ) -> Option<Place<'_>> {
        let full = |room: &mut Room| room.threads >= MOST_THREADS;
        let waited = self.left.wait_timeout_while(self.lock(), patience, full);
        let (mut room, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        if room.waiting.len() >= MOST
            && let Some(at) = room.who_goes(&from)
        {
            let goes = room.waiting.remove(at);
            (goes.hang_up)();
            if !std::mem::replace(&mut room.told, true) {
                log::warn!(
                    "{MOST} have connected and say nothing: who has waited the longest is closed for who comes now"
                );
            }
        }
        let number = room.next;
        room.next += 1;
        room.threads += 1;
        room.waiting.push(Entry {
            number,
            since: Instant::now(),
            from,
            known: false,
            hang_up,
        });
        Some(Place {
            callers: self,
            number,
        })
    }
}

/// Who could make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Silent {
    /// Somebody, who has been closed for it.
    Closed,
    /// They have but come, and may say what for in a moment.
    New,
    /// Nobody: all have said what for.
    None,
}

impl Callers {
    /// Closes who makes room for who comes next, where it is not places that there are too few of: nobody who has been here for
    /// less than `silent`.
    pub(crate) fn make_room(&self, silent: Duration) -> Silent {
        let mut room = self.lock();
        let Some(at) = room.who_goes("") else {
            return Silent::None;
        };
        let is_old = |entry: &Entry| entry.since.elapsed() >= silent;
        match room.waiting.get(at).is_some_and(is_old) {
            true => {
                (room.waiting.remove(at).hang_up)();
                Silent::Closed
            }
            false => Silent::New,
        }
    }

    /// Closes all of them: nobody is heard any more.
    pub(crate) fn close(&self) {
        self.lock()
            .waiting
            .drain(..)
            .for_each(|goes| (goes.hang_up)());
    }
}

impl Room {
    /// Who makes room for one of `from`.
    fn who_goes(&self, from: &str) -> Option<usize> {
        let of = |from: &str| {
            self.waiting
                .iter()
                .filter(|other| other.from == from)
                .count()
        };
        // One that would have more than any other with it makes room for itself.
        let has = |entry: &Entry| of(&entry.from) + usize::from(entry.from == from);
        let most = self.waiting.iter().map(has).max()?;
        let of_most = |known: bool| {
            let mut waiting = self.waiting.iter();
            waiting.position(|entry| entry.known == known && has(entry) == most)
        };
        of_most(false).or_else(|| of_most(true))
    }
}

impl Place<'_> {
    fn is(&self, mut entry: impl FnMut(&mut Entry)) -> bool {
        let mut room = self.callers.lock();
        let mut waiting = room.waiting.iter_mut();
        let found = waiting.find(|entry| entry.number == self.number);
        found.map(&mut entry).is_some()
    }

    /// Another needed it.
    pub(crate) fn is_lost(&self) -> bool {
        !self.is(|_| {})
    }

    /// Its caller has shown who he is.
    pub(crate) fn is_known(&self) {
        self.is(|entry| entry.known = true);
    }

    /// He has said what for, and is one of those that are waited for: his connection is closed for nobody. False: it has been.
    pub(crate) fn is_heard(&self) -> bool {
        let mut room = self.callers.lock();
        let before = room.waiting.len();
        room.waiting.retain(|entry| entry.number != self.number);
        room.waiting.len() < before
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut room = self.callers.lock();
        room.waiting.retain(|entry| entry.number != self.number);
        room.threads = room.threads.saturating_sub(1);
        room.told &= room.waiting.len() > MOST / 2;
        drop(room);
        self.callers.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn enter<'a>(callers: &'a Callers, from: &str) -> Place<'a> {
        let entered = callers.enter(from.into(), Box::new(|| {}), Duration::ZERO);
        entered.unwrap()
    }

    #[test]
    fn who_has_an_address_of_its_own_keeps_its_place_however_many_come_from_another() {
        let callers = Callers::default();
        let mut strangers: Vec<_> = (0..MOST).map(|_| enter(&callers, "a")).collect();
        let source = enter(&callers, "b");
        assert!(strangers[0].is_lost() && !strangers[1].is_lost());
        for _ in 0..10 * MOST {
            drop(strangers.remove(0));
            strangers.push(enter(&callers, "a"));
            strangers.push(enter(&callers, "a"));
            drop(strangers.remove(0));
            assert!(!source.is_lost());
        }
    }

    #[test]
    fn all_of_a_sources_connections_have_a_place_at_once() {
        let callers = Callers::default();
        let of_source = || enter(&callers, "b");
        let all: Vec<_> = (0..=MOST_CONNECTIONS).map(|_| of_source()).collect();
        assert!(all.iter().all(|place| !place.is_lost()));
    }

    #[test]
    fn among_those_of_one_address_the_longest_silent_goes_and_one_that_is_known_last() {
        let callers = Callers::default();
        let first = enter(&callers, "a");
        first.is_known();
        let heard = enter(&callers, "a");
        assert!(heard.is_heard());
        let others: Vec<_> = (0..MOST - 1).map(|_| enter(&callers, "a")).collect();
        assert!(!others[0].is_lost());
        let _one = enter(&callers, "a");
        assert!(others[0].is_lost() && !others[1].is_lost() && !first.is_lost());
        // It has said all: there is nothing to close, and its connection is its own.
        assert!(!heard.is_heard());
        assert!(!others[0].is_heard());
        let _known: Vec<_> = others[2..].iter().map(|place| place.is_known()).collect();
    }

    #[test]
    fn at_the_end_all_are_closed_who_have_not_been_heard() {
        use std::sync::Mutex;
        let closed = Mutex::new(Vec::new());
        let closed: &'static _ = Box::leak(Box::new(closed));
        let callers = Callers::default();
        let enter = |name: &'static str| {
            let hang_up = Box::new(move || closed.lock().unwrap().push(name));
            let entered = callers.enter("a".into(), hang_up, Duration::ZERO);
            entered.unwrap()
        };
        let (_silent, heard, known) = (enter("silent"), enter("heard"), enter("known"));
        heard.is_heard();
        known.is_known();
        callers.close();
        assert_eq!(*closed.lock().unwrap(), ["silent", "known"]);
        assert!(known.is_lost());
    }

    #[test]
    fn who_has_but_come_makes_no_room_for_want_of_descriptors_and_who_has_said_what_for_never() {
        let callers = Callers::default();
        assert_eq!(callers.make_room(Duration::ZERO), Silent::None);
        let source = enter(&callers, "a");
        assert_eq!(callers.make_room(Duration::from_secs(60)), Silent::New);
        assert!(!source.is_lost());
        let silent = enter(&callers, "a");
        assert!(source.is_heard());
        assert_eq!(callers.make_room(Duration::ZERO), Silent::Closed);
        assert!(silent.is_lost());
        assert_eq!(callers.make_room(Duration::ZERO), Silent::None);
    }

    #[test]
    fn who_is_closed_is_told_once_and_his_thread_is_counted_until_it_ends() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicUsize, Ordering};
        let callers = Callers::default();
        let closed = Arc::new(AtomicUsize::new(0));
        let mut places = Vec::new();
        for _ in 0..MOST_THREADS {
            let closed = Arc::clone(&closed);
            let hang_up = Box::new(move || {
                closed.fetch_add(1, Ordering::Relaxed);
            });
            let place = callers.enter("a".into(), hang_up, Duration::ZERO);
            places.push(place.unwrap());
        }
        assert_eq!(closed.load(Ordering::Relaxed), MOST_THREADS - MOST);
        let more = callers.enter("a".into(), Box::new(|| {}), Duration::ZERO);
        assert!(more.is_none());
        drop(places.remove(0));
        enter(&callers, "a");
    }
}
