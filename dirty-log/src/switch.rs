// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a log of this process's writes is on: a byte that writers look at, and that is changed while they do.
//!
//! A log that is off costs a load of a byte that nobody writes, a branch, and no memory. Turning it on
//! while devices write meets a reordering: a writer stores the data, looks, and sees "off", while its
//! store still waits; who turned it on then copies the page without the data, and nobody knows. So both
//! sides need a full barrier between their store and their look:
//!
//! ```text
//!   writer                        who turns it on
//!   data := new                   state := on
//!   LIGHT ──────────────┐  ┌───── HEAVY
//!   look at the state   └──┘      copy the data
//! ```
//!
//! The heavy half is `membarrier(2)`, which has every CPU that runs this process execute the light
//! one, so that the writers need a compiler's fence alone (the `srcu` crate has the whole argument).
//! Where there is no `membarrier`, or the crate is built without the feature `kvm`, the state says so,
//! and a writer that finds the log off executes the fence itself. Which of the two it is never changes in
//! a switch's life: a writer that once read "off, and somebody else makes the barrier" may have its store
//! waiting still, and no fence that writers execute from then on is about that store.
//!
//! Whoever changes the state holds a lock until the barrier is done: a second starter that finds the log
//! on has the first one's barrier behind it, and one that fails turns off nobody's log but its own.

use std::sync::PoisonError;

use crate::Error;
use crate::barrier::{Barrier, Process};
use crate::sync::{AtomicU8, Mutex, MutexGuard, Ordering, compiler_fence, fence};

/// Writers mark.
const ON: u8 = 0;
/// Writers do not mark; who turns it on makes their barrier happen.
const OFF: u8 = 1;
/// Writers do not mark, and execute the barrier themselves before they believe it.
const OFF_FENCED: u8 = 2;

/// On or off.
pub(crate) struct Switch<B = Process> {
    state: AtomicU8,
    /// Held by whoever changes the state, also for the barrier behind the change.
    change: Mutex<()>,
    barrier: B,
}

impl<B: Barrier> Switch<B> {
    pub(crate) fn on(barrier: B) -> Self {
        Self::in_state(ON, barrier)
    }

    pub(crate) fn off(barrier: B) -> Self {
        Self::in_state(off_state(&barrier), barrier)
    }

    fn in_state(state: u8, barrier: B) -> Self {
        Self {
            state: AtomicU8::new(state),
            change: Mutex::new(()),
            barrier,
        }
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // Nothing is behind it that a panic could have left half done.
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Turns it on: each write whose data are not visible to the caller after this will see it. Blocks for
    /// another one's change, and for the barrier.
    ///
    /// # Errors
    /// [`Error::Barrier`]: it is off as before, and stays so until a barrier succeeds.
    pub(crate) fn start(&self) -> Result<(), Error> {
        let _change = self.lock();
        // Relaxed: the lock orders all changes. Who turned it on had its barrier before it let go of the
        // lock, and what was visible then is visible here.
        if self.state.load(Ordering::Relaxed) == ON {
            return Ok(());
        }
        // Release: what the caller made for the writers is there for whoever sees ON.
        self.state.store(ON, Ordering::Release);
        // Pairs with the fence in `is_on_after_fence`.
        fence(Ordering::SeqCst);
        if let Err(source) = self.barrier.heavy() {
            // Relaxed: nothing is ordered by it but what a writer would mark anyway.
            self.state
                .store(off_state(&self.barrier), Ordering::Relaxed);
            return Err(Error::Barrier { source });
        }
        Ok(())
    }

    /// Turns it off. Blocks for another one's change.
    pub(crate) fn stop(&self) {
        let _change = self.lock();
        // Relaxed: as above.
        self.state
            .store(off_state(&self.barrier), Ordering::Relaxed);
    }

    /// Whether it is on, for whoever is curious.
    pub(crate) fn peek(&self) -> bool {
        // Relaxed: it may change right behind the look.
        self.state.load(Ordering::Relaxed) == ON
    }

    /// Whether a write that was made must be marked.
    #[inline(always)]
    pub(crate) fn is_on(&self) -> bool {
        // The processor's barrier, where one is needed, comes from `start` (see the module).
        compiler_fence(Ordering::SeqCst);
        // Acquire, free on x86: who sees ON has what was made before it.
        match self.state.load(Ordering::Acquire) {
            ON => true,
            OFF => false,
            _ => self.is_on_after_fence(),
        }
    }

    #[cold]
    fn is_on_after_fence(&self) -> bool {
        // Pairs with the fence in `start`: of this writer's data and that state, one is seen.
        fence(Ordering::SeqCst);
        // Acquire: as in `is_on`.
        self.state.load(Ordering::Acquire) == ON
    }
}

/// One state for a switch's life, since one kind of barrier answers so.
fn off_state(barrier: &impl Barrier) -> u8 {
    if barrier.is_asymmetric() {
        OFF
    } else {
        OFF_FENCED
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::collections::VecDeque;
    use std::io;
    use std::sync::{Arc, Mutex, OnceLock, mpsc};
    use std::thread;

    use super::*;

    /// What happens while a barrier is under way.
    type Meanwhile = Box<dyn FnOnce(&Arc<Switch<Fake>>) + Send>;

    /// A kernel that answers as the test says, and does something meanwhile.
    #[derive(Default)]
    struct Fake {
        asymmetric: bool,
        /// An errno, or 0; a call beyond them fails.
        answers: Mutex<VecDeque<i32>>,
        meanwhile: Mutex<Option<Meanwhile>>,
        of: OnceLock<Arc<Switch<Fake>>>,
    }

    impl Barrier for Fake {
        fn is_asymmetric(&self) -> bool {
            self.asymmetric
        }

        fn heavy(&self) -> io::Result<()> {
            if !self.asymmetric {
                return Ok(());
            }
            let meanwhile = lock(&self.meanwhile).take();
            if let (Some(meanwhile), Some(switch)) = (meanwhile, self.of.get()) {
                meanwhile(switch);
            }
            match lock(&self.answers).pop_front() {
                Some(0) => Ok(()),
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                None => Err(io::Error::other("a barrier that nobody needs")),
            }
        }
    }

    fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
        of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    const EPERM: i32 = 1;

    fn off(asymmetric: bool, answers: impl IntoIterator<Item = i32>) -> Arc<Switch<Fake>> {
        let switch = Arc::new(Switch::off(Fake {
            asymmetric,
            answers: Mutex::new(answers.into_iter().collect()),
            ..Fake::default()
        }));
        // A circle, which a test may leave behind.
        assert!(switch.barrier.of.set(switch.clone()).is_ok());
        switch
    }

    fn state(switch: &Switch<Fake>) -> u8 {
        switch.state.load(Ordering::Relaxed)
    }

    #[test]
    fn without_membarrier_the_writers_fence_whenever_it_is_off() {
        let switch = off(false, []);
        assert_eq!(state(&switch), OFF_FENCED);
        assert!(!switch.is_on());
        switch.start().unwrap();
        assert!(switch.is_on() && switch.peek());
        switch.stop();
        assert_eq!(state(&switch), OFF_FENCED);
        // A writer that saw it off looks again behind its fence.
        switch.start().unwrap();
        assert!(switch.is_on_after_fence());
    }

    #[test]
    fn with_membarrier_each_start_from_off_makes_one_and_a_start_from_on_none() {
        let switch = off(true, [0, 0]);
        assert_eq!(state(&switch), OFF);
        switch.start().unwrap();
        switch.start().unwrap();
        switch.stop();
        switch.stop();
        assert_eq!(state(&switch), OFF);
        switch.start().unwrap();
        assert!(switch.barrier.answers.lock().unwrap().is_empty());
        assert!(switch.is_on());
    }

    #[test]
    fn a_start_whose_barrier_failed_leaves_it_off_and_the_next_one_needs_a_barrier_too() {
        let switch = off(true, [EPERM, EPERM, 0]);
        for _ in 0..2 {
            match switch.start() {
                Err(Error::Barrier { source }) => assert_eq!(source.raw_os_error(), Some(EPERM)),
                other => panic!("{other:?}"),
            }
            // Not OFF_FENCED: a writer that read OFF has not fenced, and no later start may believe it has.
            assert_eq!(state(&switch), OFF);
        }
        switch.start().unwrap();
        assert!(switch.is_on());
    }

    #[test]
    fn a_second_starter_has_a_barrier_behind_it_or_an_error() {
        for second in [0, EPERM] {
            let switch = off(true, [EPERM, second]);
            let (send, receive) = mpsc::channel();
            *switch.barrier.meanwhile.lock().unwrap() = Some(Box::new(move |switch| {
                // It is on by its byte, and nobody may take that for an answer yet.
                assert!(switch.peek() && switch.change.try_lock().is_err());
                let switch = switch.clone();
                let starter = thread::spawn(move || switch.start().is_ok());
                send.send(starter).unwrap();
            }));
            assert!(switch.start().is_err());
            let started = receive.recv().unwrap().join().unwrap();
            assert_eq!(started, second == 0);
            assert_eq!(switch.is_on(), started, "Ok is on, an error is off");
        }
    }

    #[test]
    fn a_stop_while_it_is_being_started_comes_behind_the_start() {
        for answer in [0, EPERM] {
            let switch = off(true, [answer]);
            let (send, receive) = mpsc::channel();
            *switch.barrier.meanwhile.lock().unwrap() = Some(Box::new(move |switch| {
                let switch = switch.clone();
                send.send(thread::spawn(move || switch.stop())).unwrap();
            }));
            assert_eq!(switch.start().is_ok(), answer == 0);
            receive.recv().unwrap().join().unwrap();
            assert_eq!(state(&switch), OFF);
        }
    }
}
