// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The grace-period machinery: who is inside, what waits for them to leave, and what runs then. Knows nothing of tables.
//!
//! A reader's whole shared state is one word on a cache line of its own, its [`Slot`]:
//!
//! ```text
//!   63                          2    1        0
//!  +----------------------------+--------+---------+
//!  |  ticket, +1 at each enter  | INSIDE | PENDING |
//!  +----------------------------+--------+---------+
//! ```
//!
//! A grace period is the list of the words that had `INSIDE` set when it began; it is over when each of them has
//! changed (`PENDING` aside). A word never comes back before its ticket has wrapped, 2^62 enters later.
//! `PENDING` is set by whoever begins a grace period and tells the reader that its leave is waited for: that leave, and
//! no other, takes the lock and reclaims. Because the same word carries both, and is left by a swap, the bit can not be
//! missed.

use crate::sync::{AtomicU64, Condvar, Mutex, MutexGuard, Ordering, fence, lock, wait};
use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

/// Someone waits for this reader to leave.
const PENDING: u64 = 1 << 0;
/// The reader is inside.
const INSIDE: u64 = 1 << 1;
/// One step of the ticket.
const TICKET: u64 = 1 << 2;

/// The word of one reader. 128 bytes: x86 prefetches cache lines in pairs.
#[repr(align(128))]
pub(crate) struct Slot(AtomicU64);

/// A reader's own side of its [`Slot`].
pub(crate) struct Membership {
    slot: Arc<Slot>,
    /// What this reader last stored, `PENDING` aside.
    word: u64,
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
}

impl Membership {
    /// Makes this reader count as inside. On return, whatever was published before the last grace period that does not
    /// wait for this reader is visible to it.
    #[inline]
    pub(crate) fn enter(&mut self, domain: &Domain) {
        if self.word & INSIDE != 0 {
            // The previous guard was forgotten (`mem::forget`): its borrow is over, so it has left.
            self.leave(domain);
        }
        self.word = self.word.wrapping_add(TICKET) | INSIDE;
        // Release: pairs with the Acquire of `is_over`. Whoever sees this word knows that the previous guard is left,
        // and what was read through it must have happened before what is done about it. (A later plain store does not
        // carry on the release sequence of the leave.)
        self.slot.0.store(self.word, Ordering::Release);
        // Pairs with the fence of `begin`: of the store above and the caller's load of the table's pointer on this
        // side, and the swap of that pointer and the load of this word on the other, at least one load sees the other
        // side's store. So either the writer waits for us or we see the new table.
        fence(Ordering::SeqCst);
    }

    /// Makes this reader count as outside, and if that was waited for, reclaims and wakes.
    #[inline]
    pub(crate) fn leave(&mut self, domain: &Domain) {
        self.word &= !INSIDE;
        // Release: what was read through the guard happens before whoever sees this word (`is_over`, `begin`).
        // No Acquire: whoever set PENDING did so under the lock that the slow path takes, so it comes after them.
        // A swap and not a store, because PENDING may be set in between and must not be overwritten unseen.
        if self.slot.0.swap(self.word, Ordering::Release) & PENDING != 0 {
            domain.someone_left();
        }
    }

    /// As `leave`, if a forgotten guard left it undone; then takes the reader out of the list.
    pub(crate) fn unregister(&mut self, domain: &Domain) {
        if self.word & INSIDE != 0 {
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
        .all(|(slot, word)| slot.0.load(Ordering::Acquire) & !PENDING != *word)
}

impl Registry {
    /// Begins a grace period: lists who is inside and tells each that its leave is waited for.
    fn begin(&self) -> Inside {
        // Pairs with the fence of `enter`.
        fence(Ordering::SeqCst);
        let mut inside = Vec::new();
        for slot in &self.slots {
            // Acquire, here and below: a reader found outside has left, and what it read there happens before what the
            // caller goes on to do (Release of `leave`).
            let word = slot.0.load(Ordering::Acquire);
            if word & INSIDE == 0 {
                continue;
            }
            let pending = word | PENDING;
            // A PENDING that is set already will do: its owner's slow path needs the registry's lock, that we hold, and
            // will find what we list here; or it has had it before us, and then the load above saw the leave.
            // A failed exchange: the reader has left since. If it is inside again, it entered after our fence.
            // One that succeeds needs no ordering: it reads the very store that the load above has acquired from, and
            // keeps up that store's release sequence; AcqRel is for whoever reads this without the proof.
            if word == pending
                || slot
                    .0
                    .compare_exchange(word, pending, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
            {
                inside.push((Arc::clone(slot), word & !PENDING));
            }
        }
        if inside.is_empty() {
            None
        } else {
            Some(inside.into())
        }
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
    pub(crate) fn new() -> Self {
        Self {
            registry: Mutex::new(Registry::default()),
            left: Condvar::new(),
        }
    }

    /// A new reader, outside.
    pub(crate) fn register(&self) -> Membership {
        self.register_at(0)
    }

    /// A new reader whose ticket starts at `word` (the two low bits clear).
    pub(crate) fn register_at(&self, word: u64) -> Membership {
        let slot = Arc::new(Slot(AtomicU64::new(word)));
        // A grace period that begins after this sees the slot; one that began before is none of this reader's
        // business: the lock orders its publication before this reader's first load.
        lock(&self.registry).slots.push(Arc::clone(&slot));
        Membership { slot, word }
    }

    /// Begins a grace period.
    pub(crate) fn begin(self: &Arc<Self>) -> Grace {
        let inside = lock(&self.registry).begin();
        Grace {
            domain: Arc::clone(self),
            inside,
        }
    }

    /// Begins a grace period and retires `payload` until it is over. Runs nothing yet: the caller holds a lock.
    pub(crate) fn retire(self: &Arc<Self>, payload: Payload) -> Retired {
        let mut registry = lock(&self.registry);
        let inside = registry.begin();
        registry.retired.push((inside.clone(), payload));
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

    #[cold]
    fn someone_left(&self) {
        let registry = lock(&self.registry);
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
    /// in this way for each other from inside. Code that can run inside an access uses [`defer`](Self::defer) or
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
        let domain = Arc::new(Domain::new());
        let mut reader = domain.register_at(!(TICKET - 1));
        for _ in 0..3 {
            let before = domain.begin();
            assert!(before.is_over());
            reader.enter(&domain);
            let during = domain.begin();
            assert!(!during.is_over());
            reader.leave(&domain);
            assert!(during.is_over());
        }
        reader.unregister(&domain);
        assert_eq!(domain.counts(), (0, 0));
    }
}
