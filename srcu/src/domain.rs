// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The grace-period machinery: who is inside, what waits for them to leave, and what runs then. Knows nothing of tables.
//!
//! A reader's whole shared state is its [`Slot`], a cache line of its own: a word that it alone writes, and a flag that
//! writers raise.
//!
//! ```text
//!   63                                   1        0
//!  +-------------------------------------+--------+      +---------+
//!  |  ticket, +1 at each enter           | INSIDE |      | PENDING |
//!  +-------------------------------------+--------+      +---------+
//! ```
//!
//! A grace period is the list of the words that had `INSIDE` set when it began; it is over when each of them has
//! changed. A word never comes back before its ticket has wrapped, 2^63 enters later. `PENDING` is raised by whoever
//! begins a grace period and tells the reader that its leave is waited for: that leave takes the lock and reclaims.
//!
//! Entering and leaving are one store and one load each, in this order, and a writer's two looks are the same the other
//! way round. What would go wrong if both loads saw the old:
//! - *enter*: the reader follows the old pointer, the writer finds nobody inside and frees what it points to;
//! - *leave*: the reader sees no `PENDING` and goes, the writer has seen it inside and sleeps for ever.
//!
//! [`Barrier`] has the pair of barriers that rules this out, and who pays for it.

use crate::barrier::Barrier;
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, MutexGuard, Ordering, lock, wait};
use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

/// The reader is inside.
const INSIDE: u64 = 1 << 0;
/// One step of the ticket.
const TICKET: u64 = 1 << 1;

/// What one reader and the writers share. 128 bytes: x86 prefetches cache lines in pairs.
#[repr(align(128))]
pub(crate) struct Slot {
    /// Written by the reader alone.
    word: AtomicU64,
    /// Someone waits for this reader to leave. Raised by writers and lowered by the reader, each with the registry's
    /// lock held; looked at by the reader, at each leave, without.
    pending: AtomicBool,
}

/// A reader's own side of its [`Slot`].
pub(crate) struct Membership {
    slot: Arc<Slot>,
    /// The ticket of the last enter, without `INSIDE`: what its leave stores. Leaving does not write it, so that one
    /// access waits for nothing that the one before it has stored late.
    ticket: u64,
    barrier: Barrier,
}

/// What happens when a grace period is over.
pub(crate) enum Payload {
    /// A table that no reader sees any more.
    Value(#[allow(dead_code, reason = "held to be dropped")] Arc<dyn Any + Send + Sync>),
    /// A caller's closure.
    Run(Box<dyn FnOnce() + Send>),
}

/// The readers that were inside when a grace period began, each with the word it had. `None`: there were none.
type Inside = Option<Arc<[(Arc<Slot>, u64)]>>;

#[derive(Default)]
struct Registry {
    slots: Vec<Arc<Slot>>,
    /// In the order in which they were retired.
    retired: Vec<(Inside, Payload)>,
}

/// A grace period begun, and what had become ready by then.
#[must_use = "what is ready is to be run"]
pub(crate) struct Retired {
    ready: Vec<Payload>,
    grace: Grace,
}

impl Retired {
    /// Runs what is ready. To be called with no lock held.
    pub(crate) fn run(self) -> Grace {
        run(self.ready);
        self.grace
    }
}

/// The readers of one published table and what waits for them.
pub(crate) struct Domain {
    /// Held for list operations only, never while a caller's code runs.
    registry: Mutex<Registry>,
    /// A leave that was waited for has happened.
    left: Condvar,
    barrier: Barrier,
}

impl Membership {
    /// Makes this reader count as inside. On return, whatever was published before the last grace period that does not
    /// wait for this reader is visible to it.
    ///
    /// If the previous guard was forgotten (`mem::forget`), this is also its end: its borrow is over, and the word is
    /// another now. Who waits for it is told at the next leave.
    #[inline]
    pub(crate) fn enter(&mut self) {
        let ticket = self.ticket.wrapping_add(TICKET);
        self.ticket = ticket;
        // Release: pairs with the Acquire of `is_over`. Whoever sees this word knows that the previous guard is left,
        // and what was read through it must have happened before what is done about it. (A later plain store does not
        // carry on the release sequence of the leave, and its light barrier orders nothing on weaker processors.)
        self.slot.word.store(ticket | INSIDE, Ordering::Release);
        // Pairs with the first heavy barrier of `inside`: of the store above and the caller's load of the table's
        // pointer on this side, and the store of that pointer and the load of this word on the other, at least one load
        // sees the other side's store. So either the writer waits for us or we see the new table.
        self.barrier.light();
    }

    /// Makes this reader count as outside, and if that was waited for, reclaims and wakes.
    #[inline]
    pub(crate) fn leave(&self, domain: &Domain) {
        let slot = &*self.slot;
        // Release: what was read through the guard happens before whoever sees this word (`is_over`, `inside`).
        slot.word.store(self.ticket, Ordering::Release);
        // Pairs with the second heavy barrier of `inside`: of the store above and the load below on this side, and the
        // store of PENDING and the load of this word (`is_over`) on the other, at least one load sees the other side's
        // store. So either we see that we are waited for, or the writer sees that it need not wait.
        self.barrier.light();
        // Relaxed: what was written before PENDING was raised is seen by way of the lock that the slow path takes.
        if slot.pending.load(Ordering::Relaxed) {
            domain.someone_left(slot);
        }
    }

    /// Leaves, if a guard was forgotten; then takes the reader out of the list.
    pub(crate) fn unregister(&self, domain: &Domain) {
        // Relaxed: nobody else writes it.
        if self.slot.word.load(Ordering::Relaxed) & INSIDE != 0 {
            self.leave(domain);
        }
        lock(&domain.registry)
            .slots
            .retain(|slot| !Arc::ptr_eq(slot, &self.slot));
    }
}

/// Whether every one of `inside` has left since.
fn is_over(inside: &Inside) -> bool {
    // Acquire: pairs with the Release of `enter` and of `leave`.
    inside
        .iter()
        .flat_map(|list| list.iter())
        .all(|(slot, word)| slot.word.load(Ordering::Acquire) != *word)
}

impl Registry {
    /// Who is inside; tells each that its leave is waited for.
    fn waited_for(&self) -> Vec<(Arc<Slot>, u64)> {
        let listed = |slot: &Arc<Slot>| {
            // Acquire: a reader found outside has left, and what it read there happens before what the caller goes on to
            // do (Release of `leave`).
            let word = slot.word.load(Ordering::Acquire);
            (word & INSIDE != 0).then(|| {
                // Relaxed: ordered by the lock, and by the second barrier of `inside`.
                slot.pending.store(true, Ordering::Relaxed);
                (Arc::clone(slot), word)
            })
        };
        self.slots.iter().filter_map(listed).collect()
    }

    /// Takes out what no reader holds back any more.
    fn ready(&mut self) -> Vec<Payload> {
        let mut ready = Vec::new();
        let mut index = 0;
        while let Some((inside, _)) = self.retired.get(index) {
            if is_over(inside) {
                ready.push(self.retired.remove(index).1);
            } else {
                index += 1;
            }
        }
        ready
    }
}

impl Domain {
    pub(crate) fn new(barrier: Barrier) -> Self {
        Self {
            registry: Mutex::new(Registry::default()),
            left: Condvar::new(),
            barrier,
        }
    }

    /// A new reader, outside.
    pub(crate) fn register(&self) -> Membership {
        self.register_at(0)
    }

    /// A new reader whose tickets go on from `ticket` (`INSIDE` clear).
    pub(crate) fn register_at(&self, ticket: u64) -> Membership {
        let slot = Arc::new(Slot {
            word: AtomicU64::new(ticket),
            pending: AtomicBool::new(false),
        });
        // A grace period that begins after this sees the slot; one that began before is none of this reader's
        // business: the lock orders its publication before this reader's first load.
        lock(&self.registry).slots.push(Arc::clone(&slot));
        Membership {
            slot,
            ticket,
            barrier: self.barrier,
        }
    }

    /// Lists who is inside, after it has told them that their leave is waited for. The registry's lock is not held
    /// during the barriers: a leave that is waited for does not wait for them.
    fn inside(&self) -> Inside {
        // Pairs with the light barrier of `enter`.
        self.barrier.heavy();
        let list = lock(&self.registry).waited_for();
        if list.is_empty() {
            return None;
        }
        // Pairs with the light barrier of `leave`. Every look at a listed word comes after it (`is_over`), so a leave
        // that has not seen PENDING is seen by the first such look, before anyone sleeps.
        self.barrier.heavy();
        Some(list.into())
    }

    /// Begins a grace period.
    pub(crate) fn begin(self: &Arc<Self>) -> Grace {
        Grace {
            inside: self.inside(),
            domain: Arc::clone(self),
        }
    }

    /// Begins a grace period and retires `payload` until it is over. Runs nothing yet: the caller holds a lock.
    pub(crate) fn retire(self: &Arc<Self>, payload: Payload) -> Retired {
        let inside = self.inside();
        let mut registry = lock(&self.registry);
        registry.retired.push((inside.clone(), payload));
        // A reader that left, and had its slow path, before we took the lock found nothing of ours: we find it gone.
        let ready = registry.ready();
        Retired {
            ready,
            grace: Grace {
                domain: Arc::clone(self),
                inside,
            },
        }
    }

    /// Runs and drops what is ready, after the lock is let go: it is callers' code and may come back here.
    fn reclaim(&self, mut registry: MutexGuard<'_, Registry>) {
        let ready = registry.ready();
        drop(registry);
        run(ready);
    }

    /// Does what is ready.
    pub(crate) fn collect(&self) {
        self.reclaim(lock(&self.registry));
    }

    /// `slot`'s reader has left, and is outside.
    #[cold]
    fn someone_left(&self, slot: &Slot) {
        let registry = lock(&self.registry);
        // Whoever raised it did so for a word that is left by now. It is raised for a later one by who has seen that
        // later word, and so (Release of `enter`, Acquire of `waited_for`) after this.
        slot.pending.store(false, Ordering::Relaxed);
        // Under the lock: who waits has either not looked yet, and will see that we have left, or sleeps already.
        self.left.notify_all();
        self.reclaim(registry);
    }

    /// The number of registered readers, and of retired things still held back.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let registry = lock(&self.registry);
        (registry.slots.len(), registry.retired.len())
    }
}

/// Runs all of `ready`, even if one panics; then lets the first panic go on.
fn run(ready: Vec<Payload>) {
    let mut first_panic = None;
    for payload in ready {
        let outcome = catch_unwind(AssertUnwindSafe(|| match payload {
            Payload::Value(value) => drop(value),
            Payload::Run(closure) => closure(),
        }));
        if let Err(panic) = outcome {
            first_panic.get_or_insert(panic);
        }
    }
    // A second panic while one unwinds would abort the process.
    if let Some(panic) = first_panic
        && !std::thread::panicking()
    {
        resume_unwind(panic);
    }
}

/// A grace period: the time until every reader that was inside when it began has left.
///
/// Returned by whatever makes something invisible to later readers. Nothing needs to be done with it for memory's
/// sake: the old table is freed when the grace period is over whether or not anyone asks. It answers "is it certain
/// that nobody uses the old one?" for those who must know.
///
/// ```
/// let table = srcu::Published::new(1);
/// let mut reader = table.reader();
/// let guard = reader.enter();
/// let grace = table.publish(2); // by this very thread, inside its own guard: waiting here would never end
/// assert_eq!((*guard, grace.is_over()), (1, false));
/// drop(guard);
/// assert!(grace.is_over());
/// grace.wait(); // returns at once
/// ```
#[must_use = "what was replaced may still be in use: `wait`, `defer` what depends on it, or drop the token knowingly"]
pub struct Grace {
    domain: Arc<Domain>,
    inside: Inside,
}

impl Grace {
    /// Whether every reader that was inside has left. Once true, always true. Never blocks.
    pub fn is_over(&self) -> bool {
        is_over(&self.inside)
    }

    /// Blocks until every reader that was inside when the grace period began has left. Later readers are not waited
    /// for. No polling: the leave that is waited for wakes.
    ///
    /// On return the readers are gone; what they held back has been dropped, or is being dropped at this moment on the
    /// thread of the reader that left last.
    ///
    /// # Deadlock
    /// Never returns when called inside a guard of the same table by the thread that holds it, or when two threads wait
    /// in this way for each other from inside; nor when it waits for a guard that was forgotten, and the next one of that
    /// reader waits for this. Code that can run inside an access uses [`defer`](Self::defer) or
    /// [`is_over`](Self::is_over) instead.
    pub fn wait(self) {
        if self.is_over() {
            return;
        }
        let mut registry = lock(&self.domain.registry);
        while !self.is_over() {
            registry = wait(&self.domain.left, registry);
        }
        self.domain.reclaim(registry);
    }

    /// Has `f` run once the grace period is over: now and on this thread if it is, otherwise on the thread of a reader
    /// that leaves, as part of its leaving, or of a writer that publishes, whichever finds it over first. Never blocks,
    /// so this is what code inside a guard uses to let go of what it has just removed.
    ///
    /// `f` runs with no lock of this crate held, outside the guard that made it ready, and may publish, enter or defer
    /// in its turn. It must not wait for another thread's leave. If it panics, what else was ready still runs, and the
    /// panic goes on in the thread that ran it.
    pub fn defer(self, f: impl FnOnce() + Send + 'static) {
        let mut registry = lock(&self.domain.registry);
        registry
            .retired
            .push((self.inside.clone(), Payload::Run(Box::new(f))));
        // Under the lock, the readers that are still inside have their slow path, and so this closure, before them.
        self.domain.reclaim(registry);
    }
}

impl fmt::Debug for Grace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inside = self.inside.as_ref().map_or(0, |list| list.len());
        f.debug_struct("Grace")
            .field("inside_at_start", &inside)
            .field("is_over", &self.is_over())
            .finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_that_wraps_is_a_word_like_any_other() {
        let domain = Arc::new(Domain::new(Barrier::choose()));
        let mut reader = domain.register_at(!(TICKET - 1));
        for _ in 0..3 {
            let before = domain.begin();
            assert!(before.is_over());
            reader.enter();
            let during = domain.begin();
            assert!(!during.is_over());
            reader.leave(&domain);
            assert!(during.is_over());
        }
        reader.unregister(&domain);
        assert_eq!(domain.counts(), (0, 0));
    }
}
