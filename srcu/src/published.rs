// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The published table itself: the pointer that readers load, and the writers' side around it.

use crate::barrier::Barrier;
use crate::domain::{Domain, Grace, Membership, Payload};
use crate::sync::{AtomicPtr, AtomicU64, Mutex, Ordering, lock};
use std::convert::Infallible;
use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

/// A table and the number of the publication that brought it.
struct Node<T> {
    generation: u64,
    value: T,
}

/// What every reader loads, apart from what writers write often.
#[repr(align(128))]
struct Head<T> {
    /// The current table; kept alive by `Shared::table`.
    current: AtomicPtr<Node<T>>,
    /// The generation of the current table, for those who only want to know whether it changed.
    generation: AtomicU64,
}

struct Shared<T: Send + Sync + 'static> {
    head: Head<T>,
    domain: Arc<Domain>,
    /// Serialises writers; held while a caller's closure runs. Taken before the two other locks, never after them.
    writers: Mutex<()>,
    /// The current table's reference. Held for a clone or a replacement only, so that [`Published::load`] does not
    /// wait for a writer that is at work.
    table: Mutex<Arc<Node<T>>>,
}

/// A table that many threads read without locks and that is replaced as a whole: the writers' side.
///
/// `Send + Sync`; share it by reference or in an `Arc`. Readers are made with [`reader`](Self::reader), and keep what
/// they need alive: the writers' side may go first.
pub struct Published<T: Send + Sync + 'static> {
    shared: Arc<Shared<T>>,
}

/// One thread's way to read the table. Owns a cache line that no other reader writes.
///
/// `Send`, but used by one thread at a time ([`enter`](Self::enter) takes `&mut self`). Dropping it unregisters it.
pub struct Reader<T: Send + Sync + 'static> {
    shared: Arc<Shared<T>>,
    membership: Membership,
}

/// A reader that is inside: the table as it was at [`Reader::enter`], unchanged until this is dropped.
///
/// Holds back the reclaiming of whatever is replaced meanwhile, so keep it short; a vCPU thread holds none across
/// `KVM_RUN`. A guard that is forgotten (`mem::forget`) counts as inside until its reader enters again or is dropped;
/// who sleeps for it is woken when that reader leaves next.
pub struct Guard<'a, T: Send + Sync + 'static> {
    reader: &'a mut Reader<T>,
    // Not a reference: the table may be freed the moment that we have left, while this struct still exists.
    node: NonNull<Node<T>>,
}

/// A counted reference to one published table, for the control plane: may be held for as long as you like, and keeps
/// the table (only the table) alive.
pub struct Snapshot<T> {
    node: Arc<Node<T>>,
}

impl<T: Send + Sync + 'static> Published<T> {
    /// Publishes `value` as generation 0.
    ///
    /// Readers pay no barrier where the host lets writers pay for them ([`prepare`](crate::prepare), which the first
    /// call in a process does if nobody has).
    pub fn new(value: T) -> Self {
        Self::with(value, Barrier::choose())
    }

    /// As [`new`](Self::new), but readers and writers pay a fence each: for tables that are replaced often and read
    /// seldom, for readers that an interrupt must not disturb, and for processes in which a seccomp filter is to
    /// forbid `membarrier(2)` later on.
    pub fn with_fences(value: T) -> Self {
        Self::with(value, Barrier::Symmetric)
    }

    fn with(value: T, barrier: Barrier) -> Self {
        let node = Arc::new(Node {
            generation: 0,
            value,
        });
        Self {
            shared: Arc::new(Shared {
                head: Head {
                    current: AtomicPtr::new(Arc::as_ptr(&node).cast_mut()),
                    generation: AtomicU64::new(0),
                },
                domain: Arc::new(Domain::new(barrier)),
                writers: Mutex::new(()),
                table: Mutex::new(node),
            }),
        }
    }

    /// Registers a reader. Takes a short lock and allocates one cache line pair: once a thread, not once an access.
    pub fn reader(&self) -> Reader<T> {
        Reader {
            membership: self.shared.domain.register(),
            shared: Arc::clone(&self.shared),
        }
    }

    /// Replaces the table. Readers that enter from now on see `next`; the old table is dropped when those inside have
    /// left, on the thread that finds this out first (this one, if nobody is inside).
    ///
    /// Blocks only while another writer is in [`update`](Self::update). May be called inside a guard.
    pub fn publish(&self, next: T) -> Grace {
        match self.update(|_| Ok::<_, Infallible>((next, ()))) {
            Ok(((), grace)) => grace,
            Err(never) => match never {},
        }
    }

    /// Replaces the table by what `f` makes of the current one, no other writer coming in between. If `f` fails (or
    /// panics), nothing has changed.
    ///
    /// `f` runs with the writers' lock held: it may use readers and `load`, but a `publish` or `update` of the same
    /// table in it deadlocks.
    ///
    /// # Errors
    /// What `f` returns.
    pub fn update<R, E>(&self, f: impl FnOnce(&T) -> Result<(T, R), E>) -> Result<(R, Grace), E> {
        let shared = &*self.shared;
        let writing = lock(&shared.writers);
        let current = Arc::clone(&lock(&shared.table));
        let (value, result) = f(&current.value)?;
        let generation = current.generation.wrapping_add(1);
        let next = Arc::new(Node { generation, value });
        // Release: pairs with the Acquire load of `Reader::enter`, the new table's contents before its address.
        shared
            .head
            .current
            .store(Arc::as_ptr(&next).cast_mut(), Ordering::Release);
        let old = std::mem::replace(&mut *lock(&shared.table), next);
        // Last, with Release (pairs with the Acquire of `generation`): who reads this number sees what we did before.
        shared.head.generation.store(generation, Ordering::Release);
        // The grace period begins inside the writers' lock and after the store, so an earlier publication's is over
        // whenever a later one's is; and what is ready is run outside it.
        drop(current);
        let retired = shared.domain.retire(Payload::Value(old));
        drop(writing);
        Ok((result, retired.run()))
    }

    /// Begins a grace period without publishing anything: it is over when every reader that is inside now has left.
    pub fn grace(&self) -> Grace {
        self.shared.domain.begin()
    }

    /// The number of the current table: 0 at first, one more at each publication (it wraps after 2^64).
    ///
    /// Something that was derived from generation `g` is still right if this is `g`. Who sees a number also sees what its
    /// writer had done before it published, and finds that table or a later one. Never blocks.
    pub fn generation(&self) -> u64 {
        self.shared.head.generation()
    }

    /// A counted reference to the current table. Takes a lock that is held for the cloning of a reference only (not
    /// while a writer is at work): for the control plane and for devices, not for every exit of a vCPU.
    pub fn load(&self) -> Snapshot<T> {
        self.shared.load()
    }
}

impl<T> Head<T> {
    fn generation(&self) -> u64 {
        // Acquire: pairs with the Release of `update`.
        self.generation.load(Ordering::Acquire)
    }
}

impl<T: Send + Sync + 'static> Shared<T> {
    fn load(&self) -> Snapshot<T> {
        Snapshot {
            node: Arc::clone(&lock(&self.table)),
        }
    }
}

impl<T: Send + Sync + 'static> Drop for Shared<T> {
    fn drop(&mut self) {
        // No reader is left (each holds a reference to us), so whatever is retired is ready.
        self.domain.collect();
    }
}

impl<T: Send + Sync + 'static> Reader<T> {
    /// Goes inside and gives the current table. Wait-free: a store and a load, and leaving is the same again. (Unless
    /// a writer waits for this very leave: then it takes a short lock, wakes, and drops what has become free.)
    ///
    /// `&mut self`: one guard at a time, so a reader cannot be inside twice.
    #[inline]
    pub fn enter(&mut self) -> Guard<'_, T> {
        self.membership.enter();
        // Acquire: pairs with the Release store of `update`. After the barrier in `Membership::enter`, for the reason
        // given there.
        let current = self.shared.head.current.load(Ordering::Acquire);
        // SAFETY: `current` is only ever set from an `Arc`'s pointer, which is not null.
        let node = unsafe { NonNull::new_unchecked(current) };
        Guard { reader: self, node }
    }

    /// As [`Published::generation`], outside a guard: whether a cached answer is worth keeping. Never blocks.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.shared.head.generation()
    }

    /// A counted reference to the current table, as [`Published::load`].
    pub fn load(&self) -> Snapshot<T> {
        self.shared.load()
    }
}

impl<T: Send + Sync + 'static> Drop for Reader<T> {
    fn drop(&mut self) {
        self.membership.unregister(&self.shared.domain);
    }
}

impl<T: Send + Sync + 'static> Guard<'_, T> {
    #[inline]
    fn node(&self) -> &Node<T> {
        // SAFETY: the table was current after this reader's word said INSIDE and the barrier. It was alive then, or the
        // writer that replaced it, whose scan of the words comes after its store and barrier, had seen the word and keeps
        // the table until the word changes; which happens when `self` is dropped, or when the reader is used again,
        // and then the borrow that `self` has of it is over.
        unsafe { self.node.as_ref() }
    }

    /// The number of the table that this guard shows.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.node().generation
    }
}

impl<T: Send + Sync + 'static> Deref for Guard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.node().value
    }
}

impl<T: Send + Sync + 'static> Drop for Guard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.reader.membership.leave(&self.reader.shared.domain);
    }
}

impl<T> Snapshot<T> {
    /// The number of this table.
    pub fn generation(&self) -> u64 {
        self.node.generation
    }
}

impl<T> Deref for Snapshot<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.node.value
    }
}

impl<T> Clone for Snapshot<T> {
    fn clone(&self) -> Self {
        Self {
            node: Arc::clone(&self.node),
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Snapshot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("generation", &self.generation())
            .field("value", &self.node.value)
            .finish()
    }
}

impl<T: Send + Sync + 'static> fmt::Debug for Published<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (readers, retired) = self.shared.domain.counts();
        f.debug_struct("Published")
            .field("generation", &self.generation())
            .field("readers", &readers)
            .field("retired", &retired)
            .finish()
    }
}

impl<T: Send + Sync + 'static> fmt::Debug for Reader<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("generation", &self.generation())
            .finish_non_exhaustive()
    }
}

impl<T: Send + Sync + fmt::Debug + 'static> fmt::Debug for Guard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("generation", &self.generation())
            .field("value", &**self)
            .finish()
    }
}
