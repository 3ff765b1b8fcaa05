// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What others tell a migration that is under way on the source: to give up, or where the guest is when nobody can ask.

#![forbid(unsafe_code)]

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Where the guest is said to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// Here: the destination has not started it, and never will.
    Here,
    /// There.
    There,
}

/// An order comes at the wrong time, and has changed nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OrderError {
    /// The guest is handed over.
    #[error("it is too late to cancel: the guest is being handed over, or has gone")]
    TooLate,
    /// And so it is for this.
    #[error("it is too late to switch to post-copy: the guest is being handed over, or has gone")]
    Gone,
    /// It has ended.
    #[error("there is no migration under way")]
    Over,
    /// The migration was not asked to be one that can switch.
    #[error(
        "the migration was begun without post-copy: say so when it is begun (--postcopy=by-hand)"
    )]
    NoPostCopy,
    /// The guest has not been given away: what breaks now ends the migration, and the guest goes on here.
    #[error(
        "the guest is here still, and nothing is to be recovered: a migration that breaks now gives up, and the guest goes \
         on here"
    )]
    Here,
    /// Where the guest is, is known or will be at once.
    #[error("nobody has to say where the guest is: the destination has not failed to answer")]
    NotInDoubt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The guest is the source's.
    Ours,
    /// The source has said that it is not any more.
    Committed,
    /// And does not know what came of that.
    InDoubt,
    Over,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    cancelled: bool,
    /// The guest is to go before its memory.
    switch: bool,
    said: Option<Whereabouts>,
}

/// Orders to one migration.
#[derive(Debug)]
pub struct Orders {
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Orders {
    fn default() -> Self {
        Orders {
            state: Mutex::new(State {
                stage: Stage::Ours,
                cancelled: false,
                switch: false,
                said: None,
            }),
            changed: Condvar::new(),
        }
    }
}

impl Orders {
    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it give up. Does not block: the guest is its own again when the migration has ended.
    ///
    /// # Errors
    /// [`OrderError::TooLate`], [`OrderError::Over`].
    pub fn cancel(&self) -> Result<(), OrderError> {
        let mut state = self.lock();
        match state.stage {
            Stage::Ours => {
                state.cancelled = true;
                self.changed.notify_all();
                Ok(())
            }
            Stage::Committed | Stage::InDoubt => Err(OrderError::TooLate),
            Stage::Over => Err(OrderError::Over),
        }
    }

    /// Has the guest go on at the destination now, and its memory follow it. Does not block: the guest is stopped when the
    /// frames that are under way have been sent. Said again, it changes nothing.
    ///
    /// # Errors
    /// [`OrderError::Gone`], [`OrderError::Over`].
    pub fn switch(&self) -> Result<(), OrderError> {
        let mut state = self.lock();
        match state.stage {
            Stage::Ours => {
                state.switch = true;
                Ok(())
            }
            Stage::Committed | Stage::InDoubt => Err(OrderError::Gone),
            Stage::Over => Err(OrderError::Over),
        }
    }

    /// Whether the guest is to go before its memory.
    pub(super) fn is_to_switch(&self) -> bool {
        self.lock().switch
    }

    /// Says where the guest is, when the destination cannot be asked. Who says so wrongly has two guests, or none.
    ///
    /// # Errors
    /// [`OrderError::NotInDoubt`], [`OrderError::Over`].
    pub fn settle(&self, whereabouts: Whereabouts) -> Result<(), OrderError> {
        let mut state = self.lock();
        match state.stage {
            Stage::InDoubt => {
                state.said = Some(whereabouts);
                self.changed.notify_all();
                Ok(())
            }
            Stage::Ours | Stage::Committed => Err(OrderError::NotInDoubt),
            Stage::Over => Err(OrderError::Over),
        }
    }

    /// Whether connections may go another way from here on: the guest has been given away, and its destination is to be asked
    /// or served.
    ///
    /// # Errors
    /// [`OrderError::Here`], [`OrderError::Over`].
    pub fn may_recover(&self) -> Result<(), OrderError> {
        match self.lock().stage {
            Stage::Ours => Err(OrderError::Here),
            Stage::Committed | Stage::InDoubt => Ok(()),
            Stage::Over => Err(OrderError::Over),
        }
    }

    /// Whether it is to give up.
    pub fn is_cancelled(&self) -> bool {
        self.lock().cancelled
    }

    /// The guest is not the source's any more, unless it was to give up: false.
    pub(super) fn commit(&self) -> bool {
        let mut state = self.lock();
        if !state.cancelled {
            state.stage = Stage::Committed;
        }
        !state.cancelled
    }

    /// What has been said, for which is waited up to `patience`.
    pub(super) fn in_doubt(&self, patience: Duration) -> Option<Whereabouts> {
        let mut state = self.lock();
        state.stage = Stage::InDoubt;
        let untold = |state: &mut State| state.said.is_none();
        let waited = self.changed.wait_timeout_while(state, patience, untold);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.said
    }

    pub(super) fn over(&self) {
        self.lock().stage = Stage::Over;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cancel_comes_before_the_guest_is_given_away_or_is_refused() {
        let orders = Orders::default();
        assert_eq!(
            orders.settle(Whereabouts::Here),
            Err(OrderError::NotInDoubt)
        );
        orders.cancel().unwrap();
        assert!(!orders.commit());
        let orders = Orders::default();
        assert!(orders.commit());
        assert_eq!(orders.cancel(), Err(OrderError::TooLate));
        assert_eq!(orders.in_doubt(Duration::ZERO), None);
        assert_eq!(orders.cancel(), Err(OrderError::TooLate));
        orders.settle(Whereabouts::There).unwrap();
        assert_eq!(
            orders.in_doubt(Duration::from_secs(60)),
            Some(Whereabouts::There)
        );
        orders.over();
        assert_eq!(orders.cancel(), Err(OrderError::Over));
    }
}
