// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU that is halted in user space, and who wakes it (`kvm_vcpu_block`, `kvm_vcpu_wake_up`).
//!
//! Where KVM has no local APIC, a guest's `HLT` comes out ([`Exit::Hlt`](crate::Exit::Hlt)), and it is
//! user space that waits for the guest's next interrupt. The handler says
//! [`Flow::Block`](crate::Flow::Block), and the run loop waits here; the interrupt controller has the
//! vCPU's [`Waker`]. A pause, a stop, a kick and a request reach a vCPU that waits as they reach one in
//! the guest, and leave it halted.
//!
//! # Why no wake-up is lost
//!
//! One word holds what has come and whether the waiter sleeps, and everything that changes it is an
//! atomic read-modify-write, so of each two of them one sees the other's:
//!
//! ```text
//!   waiter                               waker
//!   ──────────────────────────           ─────────────────────────
//!   lock                                 word |= EVENT
//!   word |= SLEEPS                       SLEEPS was there?
//!   EVENT was there? ► do not sleep        lock; unlock; notify
//!   wait (unlocks), look again
//! ```
//!
//! If the waiter's comes first the waker sees `SLEEPS` and notifies, and the lock makes that notice
//! come after the waiter's wait began; if the waker's comes first the waiter sees `EVENT`. An event
//! that comes while nobody waits stays, and the next wait ends at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::halt_poll::HaltPolling;
use crate::sync::{AtomicU32, Condvar, Mutex, Ordering, lock, wait, wait_for};

/// Something has come that may end the halt.
const EVENT: u32 = 1;
/// The waiter has something else to look at.
const NUDGE: u32 = 2;
/// The waiter sleeps, or is about to.
const SLEEPS: u32 = 4;

#[derive(Debug)]
struct Shared {
    word: AtomicU32,
    asleep: Mutex<()>,
    changed: Condvar,
}

/// Wakes a vCPU that is halted in user space ([`Runner::waker`](crate::Runner::waker),
/// [`VcpuSet::waker`](crate::VcpuSet::waker)). Cheap to clone; from any thread, at any time.
#[derive(Clone, Debug)]
pub struct Waker(Arc<Shared>);

/// What ended a [`Blocker::block`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Woken {
    /// [`Waker::wake`].
    Event,
    /// [`Waker::nudge`].
    Nudge,
}

impl Waker {
    /// An event for the vCPU (an interrupt, most often): its halt is over. One that comes while it is not
    /// halted ends its next halt at once. What the caller wrote before is visible to the vCPU's thread.
    ///
    /// Does not block, but for the moment in which the vCPU falls asleep.
    pub fn wake(&self) {
        self.set(EVENT);
    }

    /// Ends the wait and not the halt: whoever waits looks at what else there is to do, and waits again.
    pub fn nudge(&self) {
        self.set(NUDGE);
    }

    fn set(&self, bit: u32) {
        // Release pairs with the acquire of `Blocker::take`: what was written before is there for whoever
        // wakes by it.
        let before = self.0.word.fetch_or(bit, Ordering::Release);
        if before & SLEEPS != 0 {
            // Whoever set SLEEPS holds this lock until it waits.
            drop(lock(&self.0.asleep));
            self.0.changed.notify_one();
        }
    }
}

/// A vCPU that is halted in user space, as its thread waits for it (`kvm_vcpu_block`): one thread at a time.
///
/// The run loop has one for each vCPU and waits here after [`Flow::Block`](crate::Flow::Block); who writes a
/// run loop of their own uses it as it is. It polls for a time that grows while that pays and shrinks while
/// it does not, as the kernel's ([`HaltPolling`]), then sleeps. [`Waker::wake`] is for what ends the guest's
/// halt, and [`Waker::nudge`] for what the thread is to look at meanwhile.
///
/// No wake-up is lost: one that comes while nobody waits stays, and ends the next wait at once. What has
/// come and whether the waiter sleeps are bits of one word that both sides change by atomic
/// read-modify-writes, so a waker either sees that the waiter sleeps, and notifies it, or its event is seen
/// by the waiter before that sleeps.
#[derive(Debug)]
pub struct Blocker {
    shared: Arc<Shared>,
    polling: HaltPolling,
    window: Duration,
}

impl Blocker {
    /// One that polls by this rule before it sleeps.
    #[must_use]
    pub fn new(polling: HaltPolling) -> Self {
        Self {
            shared: Arc::new(Shared {
                word: AtomicU32::new(0),
                asleep: Mutex::new(()),
                changed: Condvar::new(),
            }),
            polling,
            window: Duration::ZERO,
        }
    }

    /// The other side.
    #[must_use]
    pub fn waker(&self) -> Waker {
        Waker(self.shared.clone())
    }

    /// Changes the rule. The window is what it was, within it.
    pub fn set_polling(&mut self, polling: HaltPolling) {
        self.polling = polling;
        self.window = self.window.min(polling.max);
    }

    /// Whether an event has come that no wait has taken.
    pub(crate) fn is_woken(&self) -> bool {
        // Relaxed: who acts on the event takes it, and `take` acquires.
        self.shared.word.load(Ordering::Relaxed) & EVENT != 0
    }

    /// How long the next halt is polled for.
    #[must_use]
    pub const fn window(&self) -> Duration {
        self.window
    }

    /// Waits until the vCPU is woken: polls for [`Blocker::window`], then sleeps, for as long as it takes.
    /// Several wakes are one. Where an event and a nudge have both come it is the event, and the nudge is
    /// over with it: who waits looks at everything then.
    pub fn block(&mut self) -> Woken {
        // Without a rule there is no clock to read.
        if self.polling.max.is_zero() {
            return self.take().unwrap_or_else(|| self.sleep());
        }
        let began = Instant::now();
        let woken = loop {
            if let Some(woken) = self.take() {
                break woken;
            }
            if began.elapsed() >= self.window {
                break self.sleep();
            }
            std::hint::spin_loop();
        };
        // A nudge is no wake-up of the guest's (`vcpu_valid_wakeup`), and says nothing about the next.
        if woken == Woken::Event {
            self.window = self.polling.next(self.window, began.elapsed());
        }
        woken
    }

    /// Sleeps until `until`, or a nudge: true. An event ends no rest, and is there for the halt that it ends.
    pub(crate) fn rest(&self, until: Instant) -> bool {
        let mut guard = lock(&self.shared.asleep);
        // Acquire as in `take`: what came with a nudge is seen.
        let mut word = self.shared.word.fetch_or(SLEEPS, Ordering::Acquire);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if word & NUDGE != 0 || left.is_zero() {
                // A nudge that comes between is one with it: who rests looks at everything then.
                let bits = !(NUDGE | SLEEPS);
                word |= self.shared.word.fetch_and(bits, Ordering::Acquire);
                return word & NUDGE != 0;
            }
            guard = wait_for(&self.shared.changed, guard, left);
            word = self.shared.word.load(Ordering::Acquire);
        }
    }

    /// What has come, if anything.
    fn take(&self) -> Option<Woken> {
        // A look first: polling must not take the line from who wakes.
        if self.shared.word.load(Ordering::Relaxed) & (EVENT | NUDGE) == 0 {
            return None;
        }
        // Acquire pairs with the release of `Waker::set`. SLEEPS is not there but for `sleep`, which is
        // over with it.
        Self::read(self.shared.word.swap(0, Ordering::Acquire))
    }

    fn sleep(&self) -> Woken {
        let mut guard = lock(&self.shared.asleep);
        // Acquire as in `take`: this may be where the event is seen.
        let mut word = self.shared.word.fetch_or(SLEEPS, Ordering::Acquire);
        loop {
            if let Some(woken) = Self::read(word) {
                // Everything seen is taken, and what comes between is one with it.
                let more = self.shared.word.swap(0, Ordering::Acquire);
                return Self::read(word | more).unwrap_or(woken);
            }
            guard = wait(&self.shared.changed, guard);
            word = self.shared.word.load(Ordering::Acquire);
        }
    }

    const fn read(word: u32) -> Option<Woken> {
        if word & EVENT != 0 {
            Some(Woken::Event)
        } else if word & NUDGE != 0 {
            Some(Woken::Nudge)
        } else {
            None
        }
    }
}
