// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Actions that take their time, done one after another on a thread of their own, so that the server's is free for all
//! other requests.
//!
//! ```text
//!   ask ──► at work ───────────────────► done ──► the server's thread (an eventfd wakes it)
//!      └──► waiting, MAX_WAITING at most ──▲
//! ```
//!
//! In the order in which they came: who pauses a guest and has it resumed by another connection finds it running, as
//! behind Firecracker's socket, where each request waits for the one before.
//!
//! What is done in the [background](Action::is_background) has a thread of its own, and others go on beside it: one at a
//! time, and none waits for it.
//!
//! Nothing waits for a migration, which may take minutes, or for ever if its destination is in doubt: what comes while
//! one is at work, or waits to be, is [refused](Busy) at once, and so is what cannot be done beside a snapshot in the
//! background. Short actions are answered meanwhile, by which a migration is watched and cancelled. What is long and
//! [of the migration](Action::is_of_migration) has a thread of its own, too.

use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::monitor::Monitor;
use super::router::{Action, Outcome};

/// So many actions wait for the one that is at work. One more is refused: each keeps a connection, and some are to be left
/// for those that ask for something else.
pub const MAX_WAITING: usize = 4;

/// Why an action is not taken, and does not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Busy {
    /// The machine is being moved, or will be next.
    #[error(
        "a migration is under way: ask again when it is done, or give it up first (ctl migrate-cancel)"
    )]
    Migration,
    /// A snapshot is being taken in the background, for so long by now.
    #[error(
        "a snapshot is being taken in the background, for {} s by now: ask again when it is done", .0.as_secs()
    )]
    Background(Duration),
    /// So many wait already.
    #[error(
        "one request is at work, and {MAX_WAITING} others wait for it already: ask again when it is done"
    )]
    Full,
}

/// A thread that does what is long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thread {
    /// What others wait for.
    Foreground,
    /// What is done in the [background](Action::is_background).
    Background,
    /// What is [of a migration](Action::is_of_migration) that is at work.
    OfMigration,
}

impl Thread {
    pub(super) const ALL: [Thread; 3] =
        [Thread::Foreground, Thread::Background, Thread::OfMigration];

    fn of(action: &Action) -> Self {
        match (action.is_background(), action.is_of_migration()) {
            (true, _) => Thread::Background,
            (_, true) => Thread::OfMigration,
            _ => Thread::Foreground,
        }
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Thread::Foreground => "api-work",
            Thread::Background => "api-background",
            Thread::OfMigration => "api-migration",
        }
    }
}

/// An action that was taken, by which its outcome is known. None is given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// What was asked for, and what came of it.
pub(super) struct Worker {
    state: Mutex<State>,
    /// Something was handed over, or nothing will be any more; or something is done.
    handed: Condvar,
    /// Readable when there are outcomes.
    done: EventFd,
}

#[derive(Default)]
struct State {
    tickets: u64,
    foreground: Lane,
    background: Lane,
    of_migration: Lane,
    outcomes: Vec<(Ticket, Outcome)>,
    closed: bool,
}

/// What one thread is at.
#[derive(Default)]
struct Lane {
    at_work: Option<Ticket>,
    /// Since when.
    since: Option<Instant>,
    /// It moves the machine.
    migrates: bool,
    /// Nobody waits for it any more.
    unwanted: bool,
    /// What is at work, until the thread has come to it.
    to_begin: Option<Action>,
    waiting: VecDeque<(Ticket, Action)>,
}

impl Worker {
    /// # Errors
    /// The host has no descriptor for an eventfd.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Worker {
            state: Mutex::default(),
            handed: Condvar::new(),
            done: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an action: at work from now on, or behind those that are. Does not block.
    ///
    /// # Errors
    /// [`Busy`]: why not.
    pub(super) fn ask(&self, action: Action) -> Result<Ticket, Busy> {
        let mut state = self.lock();
        if let Some(busy) = state.in_the_way_of(&action) {
            return Err(busy);
        }
        let ticket = Ticket(state.tickets);
        let lane = state.lane(Thread::of(&action));
        if lane.at_work.is_none() {
            lane.begin(ticket, action);
            self.handed.notify_all();
        } else if lane.waiting.len() < MAX_WAITING {
            lane.waiting.push_back((ticket, action));
        } else {
            return Err(Busy::Full);
        }
        state.tickets += 1;
        Ok(ticket)
    }

    /// Nobody waits for this one any more. It is not begun if it has not been; one that is at work may ask, where it waits for
    /// something, and goes on to its end otherwise.
    pub(super) fn withdraw(&self, ticket: Ticket) {
        let mut state = self.lock();
        for thread in Thread::ALL {
            let lane = state.lane(thread);
            lane.waiting.retain(|(of, _)| *of != ticket);
            lane.unwanted |= lane.at_work == Some(ticket);
        }
    }

    /// Whether somebody waits for what a thread is at.
    fn is_wanted(&self, thread: Thread) -> bool {
        !self.lock().lane(thread).unwanted
    }

    /// Readable when there is something to [`take`](Self::take).
    pub(super) fn done(&self) -> &EventFd {
        &self.done
    }

    /// What has been done since this was asked last.
    pub(super) fn take(&self) -> Vec<(Ticket, Outcome)> {
        // EAGAIN: there is nothing. In this order, or one that is done between would be told by nothing.
        let _ = self.done.read();
        std::mem::take(&mut self.lock().outcomes)
    }

    /// Has [`work`](Self::work) come back as soon as what it is at is done. What waits is not begun.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.handed.notify_all();
    }

    /// What has been begun and is not done.
    pub(super) fn begun(&self) -> [Option<Ticket>; 3] {
        let mut state = self.lock();
        Thread::ALL.map(|thread| state.lane(thread).begun())
    }

    /// Waits for what is at work, when it is closed.
    pub(super) fn settle(&self) {
        let mut state = self.lock();
        // What has not been begun never is.
        while Thread::ALL.map(|thread| state.lane(thread).begun()) != [None; 3] {
            let waited = self.handed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Does what is asked for of one kind, on this thread, until it is closed.
    pub(super) fn work(&self, monitor: &dyn Monitor, thread: Thread) {
        let mut state = self.lock();
        loop {
            if state.closed {
                return;
            }
            let lane = state.lane(thread);
            let (Some(ticket), Some(action)) = (lane.at_work, lane.to_begin.take()) else {
                let waited = self.handed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let outcome = monitor.perform_while(action, &|| self.is_wanted(thread));
            state = self.lock();
            state.outcomes.push((ticket, outcome));
            let lane = state.lane(thread);
            lane.end();
            if let Some((ticket, action)) = lane.waiting.pop_front() {
                lane.begin(ticket, action);
            }
            self.handed.notify_all();
            // EAGAIN: it is readable as it is.
            let _ = self.done.write(1);
        }
    }
}

impl State {
    fn lane(&mut self, thread: Thread) -> &mut Lane {
        match thread {
            Thread::Foreground => &mut self.foreground,
            Thread::Background => &mut self.background,
            Thread::OfMigration => &mut self.of_migration,
        }
    }

    /// What `action` is not done beside, and does not wait for.
    fn in_the_way_of(&self, action: &Action) -> Option<Busy> {
        if action.is_of_migration() {
            return None;
        }
        if self.foreground.is_to_migrate() {
            return Some(Busy::Migration);
        }
        let beside = !matches!(action, Action::Snapshot(_) | Action::Migrate(_));
        let since = self.background.since.filter(|_| !beside)?;
        Some(Busy::Background(since.elapsed()))
    }
}

impl Lane {
    fn begin(&mut self, ticket: Ticket, action: Action) {
        self.at_work = Some(ticket);
        self.since = Some(Instant::now());
        self.migrates = matches!(action, Action::Migrate(_));
        self.unwanted = false;
        self.to_begin = Some(action);
    }

    fn end(&mut self) {
        (self.at_work, self.since, self.migrates) = (None, None, false);
    }

    /// A migration is at work, or waits.
    fn is_to_migrate(&self) -> bool {
        let mut waiting = self.waiting.iter();
        self.migrates || waiting.any(|(_, action)| matches!(action, Action::Migrate(_)))
    }

    fn begun(&self) -> Option<Ticket> {
        self.at_work.filter(|_| self.to_begin.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::outgoing::MigrateRequest;
    use crate::migration::recover::Recover;
    use crate::snapshot::SnapshotRequest;

    /// Remembers what it did.
    #[derive(Default)]
    struct Fake(Mutex<Vec<Action>>);

    impl Monitor for Fake {
        fn perform(&self, action: Action) -> Outcome {
            self.0.lock().unwrap().push(action);
            Outcome::Done
        }
    }

    fn in_pause() -> Action {
        Action::Snapshot(SnapshotRequest::new("/s"))
    }

    fn migrate() -> Action {
        Action::Migrate(Box::new(MigrateRequest::new("unix:/there")))
    }

    #[test]
    fn nothing_waits_for_a_migration_that_is_at_work_or_waits_itself() {
        let snapshot = Action::Snapshot(SnapshotRequest {
            background: true,
            ..SnapshotRequest::new("/s")
        });
        let long = [
            Action::Pause,
            Action::Resume,
            in_pause(),
            snapshot,
            migrate(),
        ];
        for before in [None, Some(Action::Pause)] {
            let worker = Worker::new().unwrap();
            before.map(|before| worker.ask(before).unwrap());
            let moves = worker.ask(migrate()).unwrap();
            for action in &long {
                assert_eq!(worker.ask(action.clone()), Err(Busy::Migration));
            }
            let fake = Fake::default();
            std::thread::scope(|scope| {
                scope.spawn(|| worker.work(&fake, Thread::Foreground));
                while !worker.take().iter().any(|(of, _)| *of == moves) {
                    std::thread::yield_now();
                }
                // It is over.
                worker.ask(Action::Resume).unwrap();
                worker.close();
            });
        }
    }

    #[test]
    fn what_is_withdrawn_before_its_turn_is_not_begun_and_what_has_had_its_turn_is() {
        let worker = Worker::new().unwrap();
        // Nobody has come to the first yet; it has had its turn all the same.
        let first = worker.ask(Action::Pause).unwrap();
        let second = worker.ask(in_pause()).unwrap();
        let third = worker.ask(Action::Resume).unwrap();
        worker.withdraw(first);
        worker.withdraw(second);
        let fake = Fake::default();
        std::thread::scope(|scope| {
            scope.spawn(|| worker.work(&fake, Thread::Foreground));
            let mut outcomes = Vec::new();
            while outcomes.len() < 2 {
                outcomes.extend(worker.take());
                std::thread::yield_now();
            }
            assert_eq!(outcomes, [(first, Outcome::Done), (third, Outcome::Done)]);
            worker.close();
        });
        assert_eq!(*fake.0.lock().unwrap(), [Action::Pause, Action::Resume]);
    }

    #[test]
    fn what_is_at_work_can_ask_whether_somebody_waits_for_it() {
        /// Waits until nobody does.
        struct Waits;
        impl Monitor for Waits {
            fn perform(&self, _: Action) -> Outcome {
                Outcome::Done
            }
            fn perform_while(&self, action: Action, wanted: &dyn Fn() -> bool) -> Outcome {
                while matches!(action, Action::Snapshot(_)) && wanted() {
                    std::thread::yield_now();
                }
                Outcome::Refused(wanted().to_string())
            }
        }
        let worker = Worker::new().unwrap();
        let first = worker.ask(in_pause()).unwrap();
        let second = worker.ask(Action::Pause).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| worker.work(&Waits, Thread::Foreground));
            worker.withdraw(first);
            let mut outcomes = Vec::new();
            while outcomes.len() < 2 {
                outcomes.extend(worker.take());
                std::thread::yield_now();
            }
            let said = |wanted: bool| Outcome::Refused(wanted.to_string());
            assert_eq!(outcomes, [(first, said(false)), (second, said(true))]);
            worker.close();
        });
    }

    #[test]
    fn what_is_done_in_the_background_holds_nothing_up_and_is_done_once_at_a_time() {
        /// Comes back from a snapshot when something else has been done.
        struct Beside(Fake, Condvar);
        impl Monitor for Beside {
            fn perform(&self, action: Action) -> Outcome {
                let mut done = self.0.0.lock().unwrap();
                if action.is_background() {
                    while done.is_empty() {
                        done = self.1.wait(done).unwrap();
                    }
                }
                done.push(action);
                self.1.notify_all();
                Outcome::Done
            }
        }
        let worker = Worker::new().unwrap();
        let snapshot = Action::Snapshot(SnapshotRequest {
            background: true,
            ..SnapshotRequest::new("/s")
        });
        let first = worker.ask(snapshot.clone()).unwrap();
        for beside in [snapshot.clone(), in_pause(), migrate()] {
            let refused = worker.ask(beside).unwrap_err();
            assert!(matches!(refused, Busy::Background(_)), "{refused}");
        }
        let second = worker.ask(Action::Pause).unwrap();
        let monitor = Beside(Fake::default(), Condvar::new());
        let mut outcomes = Vec::new();
        std::thread::scope(|scope| {
            for thread in [Thread::Background, Thread::Foreground] {
                let (worker, monitor) = (&worker, &monitor);
                scope.spawn(move || worker.work(monitor, thread));
            }
            while outcomes.len() < 2 {
                outcomes.extend(worker.take());
                std::thread::yield_now();
            }
            worker.close();
        });
        worker.settle();
        // Each has a thread: which of the two says so first is not promised.
        for ticket in [first, second] {
            assert!(outcomes.contains(&(ticket, Outcome::Done)), "{outcomes:?}");
        }
        assert_eq!(*monitor.0.0.lock().unwrap(), [Action::Pause, snapshot]);
    }

    #[test]
    fn another_way_for_a_migration_that_is_at_work_is_found_beside_it() {
        /// Is at work on a migration until there is another way.
        #[derive(Default)]
        struct Moves(Mutex<bool>, Condvar);
        impl Monitor for Moves {
            fn perform(&self, action: Action) -> Outcome {
                let mut found = self.0.lock().unwrap();
                *found |= action.is_of_migration();
                self.1.notify_all();
                drop(self.1.wait_while(found, |found| !*found).unwrap());
                Outcome::Done
            }
        }
        let worker = Worker::new().unwrap();
        let recover = || {
            Action::Recover(Recover::Listen {
                address: "unix:/s".into(),
            })
        };
        let moves = worker.ask(migrate()).unwrap();
        let way = worker.ask(recover()).unwrap();
        let monitor = Moves::default();
        let mut outcomes = Vec::new();
        std::thread::scope(|scope| {
            for thread in Thread::ALL {
                let (worker, monitor) = (&worker, &monitor);
                scope.spawn(move || worker.work(monitor, thread));
            }
            while outcomes.len() < 2 {
                outcomes.extend(worker.take());
                std::thread::yield_now();
            }
            worker.close();
        });
        for ticket in [moves, way] {
            assert!(outcomes.contains(&(ticket, Outcome::Done)), "{outcomes:?}");
        }
        assert!(recover().is_long());
    }

    #[test]
    fn one_too_many_is_refused_and_has_its_turn_when_one_of_them_is_done() {
        let worker = Worker::new().unwrap();
        for _ in 0..=MAX_WAITING {
            worker.ask(Action::Pause).unwrap();
        }
        assert_eq!(worker.ask(Action::Resume), Err(Busy::Full));
        let fake = Fake::default();
        std::thread::scope(|scope| {
            scope.spawn(|| worker.work(&fake, Thread::Foreground));
            let mut done = 0;
            while done <= MAX_WAITING {
                done += worker.take().len();
                std::thread::yield_now();
            }
            worker.ask(Action::Resume).unwrap();
            while worker.take().is_empty() {
                std::thread::yield_now();
            }
            worker.close();
        });
        assert_eq!(fake.0.lock().unwrap().len(), MAX_WAITING + 2);
    }
}
