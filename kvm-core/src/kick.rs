// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a vCPU is brought out of the guest, and why neither a kick nor a request is ever lost.
//!
//! Two parties, each with a store, a fence and a load (Dekker's pattern):
//!
//! ```text
//!   vCPU thread: Gate::enter              anyone: Gate::ask
//!   ─────────────────────────             ─────────────────────────
//!   immediate_exit = 0
//!   mode = InGuest                        requests |= bit
//!   fence(SeqCst) ─────── pairs with ──── fence(SeqCst)
//!   requests pending? ► do not enter      mode is InGuest? ► Exiting,
//!   KVM_RUN                                 immediate_exit = 1, signal
//! ```
//!
//! Of the two fences one comes first. If the vCPU's does, the asker sees `InGuest` and kicks; if the
//! asker's does, the vCPU sees the request and stays outside. Without the fences both could miss.
//!
//! Between the vCPU's last look and the moment when `KVM_RUN` can see a signal there is a gap, in
//! which a signal alone would be lost (its handler does nothing). Hence `immediate_exit`, stored
//! *before* the signal is sent: a signal taken in the gap means that the byte is set by the time of
//! `KVM_RUN`, which reads it after it made itself interruptible and returns `EINTR`.
//!
//! A kicker may be late: it moved the mode in one entry, and by the time it sets the byte and
//! signals, the vCPU is in the next. That entry ends early with `EINTR`, once, and is no harm.
//! A second kicker that finds `Exiting` sends nothing: its request is seen at the next entry, and
//! there is one, because the first kicker's signal is on its way.
//!
//! A vCPU that is halted in user space (`blocker.rs`) is outside, and so an asker nudges whoever it finds
//! there: [`Gate::is_asked`] is the same pattern once more, with the wait in the place of `KVM_RUN`. So is one that is
//! held out of the guest (`hold.rs`).

use std::sync::Arc;
use std::time::Duration;

use crate::blocker::Waker;
use crate::mode::{GuestMode, ModeCell};
use crate::request::{RequestCell, Requests};
use crate::sync::{Ordering, fence};

/// The kicker's side of one vCPU: the `immediate_exit` byte and the means to interrupt `KVM_RUN`.
///
/// # Contract
/// - Both calls may come from any thread at any time, before the vCPU's thread exists and after it
///   has ended as well; then [`Doorbell::ring`] does nothing.
/// - A `ring` after `set_immediate_exit(true)` ends a `run` that is in progress, or that begins later
///   and before the byte is cleared again.
/// - Neither blocks.
pub trait Doorbell: Send + Sync {
    /// Sets or clears `kvm_run.immediate_exit`.
    fn set_immediate_exit(&self, on: bool);
    /// Interrupts the vCPU's thread if it is in `KVM_RUN`.
    fn ring(&self);
    /// The CPU time that the vCPU's thread has used so far, the guest's among it. `None`: it has no thread, or it cannot
    /// be told; then a [`Throttle`](crate::Throttle) does not slow it.
    fn cpu_time(&self) -> Option<Duration> {
        None
    }
}

/// The gate between a vCPU's thread and the guest: its mode, its requests and its doorbell.
pub(crate) struct Gate {
    mode: ModeCell,
    requests: RequestCell,
    doorbell: Arc<dyn Doorbell>,
    /// Brings a vCPU that is halted in user space back to its run loop.
    waker: Waker,
}

impl Gate {
    pub(crate) fn new(doorbell: Arc<dyn Doorbell>, waker: Waker) -> Self {
        Self {
            waker,
            mode: ModeCell::new(),
            requests: RequestCell::new(),
            doorbell,
        }
    }

    pub(crate) fn waker(&self) -> Waker {
        self.waker.clone()
    }

    pub(crate) fn mode(&self) -> GuestMode {
        self.mode.load()
    }

    /// [`Doorbell::cpu_time`].
    pub(crate) fn cpu_time(&self) -> Option<Duration> {
        self.doorbell.cpu_time()
    }

    /// The vCPU's thread wants in. True: it is in guest mode and must call `KVM_RUN` and then
    /// [`Gate::leave`]. False: requests are pending, it is outside, take them first.
    pub(crate) fn enter(&self) -> bool {
        self.doorbell.set_immediate_exit(false);
        self.mode.enter();
        // Pairs with the fence in `ask`: either that asker's request is seen below, or the asker sees
        // the mode stored above.
        fence(Ordering::SeqCst);
        if self.requests.any() {
            self.mode.leave();
            return false;
        }
        true
    }

    /// Whether requests are pending. For a vCPU that is halted or held, outside the guest, before it waits.
    pub(crate) fn is_asked(&self) -> bool {
        // Pairs with the fence in `ask`. If that one is first, its request is seen below. If this is, the
        // asker sees this vCPU outside, kicks nobody and nudges: the wait that follows ends at once.
        fence(Ordering::SeqCst);
        self.requests.any()
    }

    /// The vCPU's thread is back from `KVM_RUN`.
    pub(crate) fn leave(&self) {
        self.mode.leave();
    }

    /// Takes what is pending. On the vCPU's thread, outside the guest.
    pub(crate) fn take(&self) -> Requests {
        self.requests.take()
    }

    /// From the vCPU's own thread: the next `KVM_RUN` completes a pending access and comes straight
    /// back.
    pub(crate) fn only_complete(&self) {
        self.doorbell.set_immediate_exit(true);
    }

    /// Makes requests and brings the vCPU out of the guest to serve them; where it was is returned.
    /// `OutsideGuestMode` means that it will serve them before it runs guest code again.
    pub(crate) fn ask(&self, requests: Requests) -> GuestMode {
        self.requests.make(requests);
        // Pairs with the fence in `enter`: either the mode read below is the one of an entry that did
        // not see the request, or the entry sees it.
        fence(Ordering::SeqCst);
        if self.mode.kick() {
            // In this order: whoever takes the signal too early finds the byte set.
            self.doorbell.set_immediate_exit(true);
            self.doorbell.ring();
            return GuestMode::InGuestMode;
        }
        // After the request was made: a vCPU that wakes by it finds the request. One that is not halted
        // finds the nudge at its next halt, looks at its requests once more, and waits.
        self.waker.nudge();
        self.mode.load()
    }
}
