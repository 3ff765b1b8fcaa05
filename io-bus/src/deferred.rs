// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An answer that comes later, from another thread.
//!
//! A device that cannot answer at once (its state is in another process, or behind a request to the
//! host) makes a pair with [`defer`]: the [`Deferral`] goes back as
//! [`Answer::Deferred`](crate::Answer::Deferred), the [`Completion`] to whoever will know the
//! answer. The access on the bus ends there and then, so nobody who unregisters the device, or any
//! other, waits for the answer; the vCPU alone does, in its [`Dispatcher`](crate::Dispatcher).
//!
//! ```text
//!   device, in an access          another thread             vCPU's thread
//!   defer() ─► Completion ───────► complete / decline ─┐
//!       └────► Deferral ── Answer::Deferred ─► Outcome::Deferred
//!                                  or dropped ─────────┴───► wait_read, wait_write, poll_…
//!                                              Interrupter ─► (comes back: Outcome::Deferred)
//! ```
//!
//! The pair is one small allocation, and the only one: devices that do not defer pay nothing.

use std::fmt;
use std::sync::Arc;

use crate::fragment::MMIO_SIZE;
use crate::sync::{Condvar, Mutex, lock, wait};

/// What both halves of a pair share.
struct Slot(Mutex<State>);

enum State {
    /// No answer yet; whom to wake when there is one.
    Waiting(Option<Arc<Parker>>),
    /// The answer: of a read, its first `len` bytes.
    Given(Given),
    /// The vCPU waits no more.
    Abandoned,
}

/// What a completion said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    /// Done; of a read, `len` bytes of `bytes`.
    Done { bytes: [u8; MMIO_SIZE], len: usize },
    /// Nobody answers after all.
    Declined,
}

/// Makes the two halves of an answer that comes later.
///
/// ```
/// use io_bus::{Answer, At, BusKind, Completion, IoBus, IoDevice, IoRange, Outcome, defer};
/// use std::sync::mpsc::{Sender, channel};
///
/// /// Asks another thread.
/// struct Remote(Sender<Completion>);
///
/// impl IoDevice for Remote {
///     fn read(&self, _: At, _: &mut [u8]) -> Answer {
///         let (completion, deferral) = defer();
///         // Were the thread gone, the completion would be dropped, and the guest read all ones.
///         let _ = self.0.send(completion);
///         Answer::Deferred(deferral)
///     }
///     fn write(&self, _: At, _: &[u8]) -> Answer {
///         Answer::Accepted
///     }
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (requests, inbox) = channel::<Completion>();
/// let other = std::thread::spawn(move || {
///     for request in inbox {
///         request.complete(&[0x2a]);
///     }
/// });
/// let bus = IoBus::new();
/// let remote = bus.register(BusKind::Pio, IoRange::new(0x70, 2)?, Remote(requests))?;
///
/// let mut io = bus.dispatcher();
/// let mut data = [0];
/// let mut outcome = io.read(BusKind::Pio, 0x71, &mut data);
/// while outcome == Outcome::Deferred {
///     // Back without an answer only if an `Interrupter` says so.
///     outcome = io.wait_read(&mut data);
/// }
/// assert_eq!((outcome, data), (Outcome::Answered, [0x2a]));
/// # drop(remote);
/// # other.join().map_err(|_| "it panicked")?;
/// # Ok(())
/// # }
/// ```
pub fn defer() -> (Completion, Deferral) {
    let slot = Arc::new(Slot(Mutex::new(State::Waiting(None))));
    (Completion(Some(Arc::clone(&slot))), Deferral(slot))
}

/// The half that answers: for whoever will know.
///
/// Dropping it [declines](Self::decline), so a device that goes, or a thread that panics, hangs no
/// vCPU.
#[must_use = "dropped, it declines: the guest reads all ones"]
pub struct Completion(Option<Arc<Slot>>);

impl Completion {
    /// Answers. Of a read, `data` is what the guest reads: bytes beyond the access's length, and
    /// beyond eight, are ignored, and bytes that are missing are all ones. Of a write, `data` means
    /// nothing.
    ///
    /// True if the vCPU gets it, false if it waits no more. Wakes a vCPU that waits; never blocks
    /// but for the length of a copy.
    pub fn complete(mut self, data: &[u8]) -> bool {
        let mut bytes = [0xff; MMIO_SIZE];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let len = data.len().min(MMIO_SIZE);
        self.give(Given::Done { bytes, len })
    }

    /// Has nobody answer: a read is all ones, and the outcome [`Unclaimed`](crate::Outcome). The
    /// devices after this one that share its range are not asked; their turn has passed.
    ///
    /// True if the vCPU gets it.
    pub fn decline(mut self) -> bool {
        self.give(Given::Declined)
    }

    /// Whether nobody waits any more: the vCPU gave up, or is gone.
    pub fn is_abandoned(&self) -> bool {
        self.0
            .as_ref()
            .is_none_or(|slot| matches!(*lock(&slot.0), State::Abandoned))
    }

    fn give(&mut self, given: Given) -> bool {
        let Some(slot) = self.0.take() else {
            return false;
        };
        let mut state = lock(&slot.0);
        match std::mem::replace(&mut *state, State::Given(given)) {
            State::Waiting(waiter) => {
                // Wakes with the slot's lock let go: a waiter holds its parker's as it looks here.
                drop(state);
                if let Some(parker) = waiter {
                    parker.wake();
                }
                true
            }
            other => {
                *state = other;
                false
            }
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.give(Given::Declined);
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("is_abandoned", &self.is_abandoned())
            .finish()
    }
}

/// The half that waits: a device returns it as [`Answer::Deferred`](crate::Answer::Deferred).
///
/// Dropping it instead tells the completion that nobody waits.
pub struct Deferral(Arc<Slot>);

impl Deferral {
    /// The answer, if there is one.
    pub(crate) fn poll(&self) -> Option<Given> {
        match *lock(&self.0.0) {
            State::Given(given) => Some(given),
            State::Waiting(_) | State::Abandoned => None,
        }
    }

    /// Has `parker` woken when the answer comes. One that has come already wakes nobody.
    pub(crate) fn wake_when_given(&self, parker: &Arc<Parker>) {
        if let State::Waiting(waiter) = &mut *lock(&self.0.0) {
            *waiter = Some(Arc::clone(parker));
        }
    }
}

impl Drop for Deferral {
    fn drop(&mut self) {
        let mut state = lock(&self.0.0);
        if matches!(*state, State::Waiting(_)) {
            *state = State::Abandoned;
        }
    }
}

impl fmt::Debug for Deferral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deferral")
            .field("is_given", &self.poll().is_some())
            .finish()
    }
}

/// Where the thread of one dispatcher sleeps.
pub(crate) struct Parker {
    /// Set by an [`Interrupter`], taken by the wait that it ends.
    interrupted: Mutex<bool>,
    changed: Condvar,
}

impl Parker {
    pub(crate) fn new() -> Self {
        Self {
            interrupted: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    /// Sleeps until `deferral` is given (its answer) or someone interrupts (`None`).
    ///
    /// An answer that is there counts more than an interruption, which then stays for the next.
    pub(crate) fn wait_for(self: &Arc<Self>, deferral: &Deferral) -> Option<Given> {
        deferral.wake_when_given(self);
        let mut interrupted = lock(&self.interrupted);
        loop {
            // Under our lock: an answer that comes after this look wakes only once we sleep.
            if let Some(given) = deferral.poll() {
                return Some(given);
            }
            if std::mem::take(&mut *interrupted) {
                return None;
            }
            interrupted = wait(&self.changed, interrupted);
        }
    }

    fn wake(&self) {
        // Taken and let go: whoever has looked and found nothing sleeps by now.
        drop(lock(&self.interrupted));
        self.changed.notify_all();
    }
}

/// Gets a vCPU's thread out of its wait for a deferred answer, from any thread: part of a kick.
///
/// From [`Dispatcher::interrupter`](crate::Dispatcher::interrupter). A signal does not end such a
/// wait, so whoever kicks a vCPU out of `KVM_RUN` does this as well.
#[derive(Clone)]
pub struct Interrupter(pub(crate) Arc<Parker>);

impl Interrupter {
    /// Ends the dispatcher's wait with [`Outcome::Deferred`](crate::Outcome::Deferred), or if it
    /// does not wait just now, its next one: an interruption that comes a moment early is not lost,
    /// and one that nobody needed costs one turn of a loop. Never blocks.
    pub fn interrupt(&self) {
        *lock(&self.0.interrupted) = true;
        self.0.changed.notify_all();
    }
}

impl fmt::Debug for Interrupter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupter").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn done(data: &[u8]) -> Given {
        let mut bytes = [0xff; MMIO_SIZE];
        bytes[..data.len()].copy_from_slice(data);
        let len = data.len();
        Given::Done { bytes, len }
    }

    #[test]
    fn what_is_completed_is_what_is_polled() {
        let (completion, deferral) = defer();
        assert_eq!(deferral.poll(), None);
        assert!(!completion.is_abandoned());
        assert!(completion.complete(&[1, 2]));
        assert_eq!(deferral.poll(), Some(done(&[1, 2])));

        let (completion, deferral) = defer();
        assert!(completion.complete(&[7; 40]));
        assert_eq!(deferral.poll(), Some(done(&[7; 8])));
    }

    #[test]
    fn a_completion_that_is_dropped_declines() {
        let (completion, deferral) = defer();
        drop(completion);
        assert_eq!(deferral.poll(), Some(Given::Declined));
        let (completion, deferral) = defer();
        assert!(completion.decline());
        assert_eq!(deferral.poll(), Some(Given::Declined));
    }

    #[test]
    fn a_deferral_that_is_dropped_is_told_to_its_completion() {
        let (completion, deferral) = defer();
        drop(deferral);
        assert!(completion.is_abandoned());
        assert!(!completion.complete(&[1]));
    }
}
