// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One change of the slots from its first call to its publication: every change, of one slot or of a whole layout, goes
//! through [`Inner::transact`]. A failure takes back what was done before it.
//!
//! The order of things is what keeps memory sound:
//! - created: mapped, then known to KVM, then published to readers;
//! - deleted: gone from KVM, then from listeners, then from what is published, and unmapped when the last reader and
//!   the last snapshot have let go. What KVM refuses to delete stays in the book, and mapped.

use crate::book::{Book, Edit, Entry, Reconciled, Shown, Transaction};
use crate::classify::place;
use crate::inner::{Inner, Owner};
use crate::listener::{Panic, Prepared, Registered, commit, first};
use crate::{
    Change, Errno, Error, LayoutChange, MemoryRegion, SlotBitmap, SlotChange, SlotExtent, SlotId,
    SlotTable, Unrestored,
};
use srcu::Grace;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use vm_memory::GuestAddress;

/// Why nothing is published.
enum Quiet<R> {
    /// Nothing that readers see has changed.
    Done(R),
    Failed(Error),
}

/// What a change comes to that readers see: the next table, and its result.
type Outcome<B, R> = (SlotTable<B>, Result<R, Error>);

/// What a change has no use for any more, or not yet. Its drop may run code of consumers (the drop of a listener, of the
/// owner of external memory, of a bitmap, of what a panic carries), which may change slots in its turn: it comes when no
/// lock is held.
struct Leftovers<B> {
    transaction: Transaction<B>,
    listeners: Vec<Registered<B>>,
    changes: [Vec<SlotChange<B>>; 2],
    entries: Vec<Entry<B>>,
    /// Of listeners.
    panics: Vec<Panic>,
}

/// A call that failed, and what was not taken back after it.
struct Failure {
    error: Error,
    unrestored: BTreeMap<SlotId, Errno>,
}

impl<B: SlotBitmap> Inner<B> {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Book<B>> {
        // A holder that panicked (in a bitmap's `with_len`, say) had changed nothing yet: KVM is asked later, and a host
        // that panics while it is takes the process with it.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes one change, no other coming in between: `f` says which, and what the caller gets for it.
    ///
    /// The publication may end grace periods, and so unmap memory and run what callers have [deferred](Grace::defer).
    /// That comes last, with no lock held: it may change slots in its turn. Listeners are called with the lock of
    /// `table`'s writers held and no other.
    pub(crate) fn transact<R>(
        &self,
        f: impl FnOnce(&mut Book<B>, &mut Transaction<B>) -> Result<R, Error>,
    ) -> Result<(R, Grace), Error> {
        let (result, grace, panic) = self.change(f)?;
        match panic {
            Some(panic) => resume_unwind(panic),
            None => Ok((result, grace)),
        }
    }

    /// The same; a listener's panic in the commit of a change that is made is the caller's to go on with.
    pub(crate) fn change<R>(
        &self,
        f: impl FnOnce(&mut Book<B>, &mut Transaction<B>) -> Result<R, Error>,
    ) -> Result<(R, Grace, Option<Panic>), Error> {
        self.check_not_in_listener()?;
        let _late = self.late_deletions();
        let mut left = Leftovers {
            transaction: Transaction::with_capacity(0),
            listeners: Vec::new(),
            changes: [Vec::new(), Vec::new()],
            entries: Vec::new(),
            panics: Vec::new(),
        };
        // The writers' lock of `table` first, then the book's: the only order there is.
        let done = self.table.update(|table| {
            let result = f(&mut self.lock(), &mut left.transaction).map_err(Quiet::Failed)?;
            if left.transaction.calls.is_empty() && left.transaction.edits.is_empty() {
                return Err(Quiet::Done(result));
            }
            self.make(table, &mut left, result)
        });
        let panics = std::mem::take(&mut left.panics);
        drop(left);
        let panic = first(panics);
        match (done, panic) {
            (Ok((Ok(result), grace)), panic) => Ok((result, grace, panic)),
            (Err(Quiet::Done(result)), panic) => Ok((result, self.table.grace(), panic)),
            (Ok((Err(_), _)) | Err(Quiet::Failed(_)), Some(panic)) => resume_unwind(panic),
            (Ok((Err(error), _)) | Err(Quiet::Failed(error)), None) => Err(error),
        }
    }

    fn make<R>(
        &self,
        table: &SlotTable<B>,
        left: &mut Leftovers<B>,
        result: R,
    ) -> Result<Outcome<B, R>, Quiet<R>> {
        let Leftovers {
            transaction: Transaction { calls, edits },
            listeners,
            changes: [changes, undone],
            entries,
            panics,
        } = left;
        *listeners = self.listeners();
        if !listeners.is_empty() {
            *changes = self.lock().changes(edits);
        }
        // What only the book sees is no listener's business.
        let listeners = match changes.is_empty() {
            true => &[],
            false => listeners.as_slice(),
        };
        let _calling = (!listeners.is_empty()).then(|| self.call_listeners());
        let prepared = Prepared::all(listeners, LayoutChange::new(changes), panics)
            .map_err(|source| Quiet::Failed(Error::Vetoed { source }))?;

        let mut book = self.lock();
        match self.run(&mut book, calls) {
            Ok(()) => {
                let new: Vec<SlotId> = edits.iter().filter_map(Edit::new_id).collect();
                let shown = book.commit(std::mem::take(edits), entries);
                drop(book);
                prepared.commit();
                if !panics.is_empty() {
                    // Nobody will get a handle to them: they are a part of the layout, as kept ones are.
                    let mut book = self.lock();
                    new.into_iter().for_each(|id| book.keep(id));
                }
                match shown.is_empty() {
                    true => Err(Quiet::Done(result)),
                    false => Ok((next(table, shown), Ok(result))),
                }
            }
            Err(Failure { error, unrestored }) if unrestored.is_empty() => {
                drop(book);
                prepared.abort();
                Err(Quiet::Failed(error))
            }
            Err(Failure { error, unrestored }) => {
                let Reconciled {
                    left,
                    changes,
                    shown,
                } = book.reconcile(std::mem::take(edits), entries);
                drop(book);
                *undone = changes;
                // A panic waits until it is published what KVM has.
                prepared.abort();
                let left = left
                    .into_iter()
                    .map(|(id, left, range)| Unrestored {
                        id,
                        start: GuestAddress(range.start),
                        size: range.end - range.start,
                        left,
                        errno: unrestored.get(&id).copied().unwrap_or(Errno(0)),
                    })
                    .collect::<Vec<_>>();
                let error = match left.is_empty() {
                    true => error,
                    false => Error::Undo {
                        left,
                        cause: Box::new(error),
                    },
                };
                if shown.is_empty() {
                    return Err(Quiet::Failed(error));
                }
                commit(listeners, LayoutChange::new(undone), panics);
                Ok((next(table, shown), Err(error)))
            }
        }
    }

    /// Asks KVM, call by call. After one that fails, takes back those before it, the last first, as far as KVM lets it.
    fn run(&self, book: &mut Book<B>, calls: &[(Change, MemoryRegion)]) -> Result<(), Failure> {
        let mut undo = Vec::with_capacity(calls.len());
        for (number, (change, region)) in calls.iter().enumerate() {
            if *change == Change::Nothing {
                continue;
            }
            match self.call(region) {
                Ok(()) => undo.push(book.slots.commit(region)),
                Err(source) => {
                    let error = Error::Kvm {
                        change: *change,
                        region: *region,
                        old: book.slots.get(region.id).copied().map(Box::new),
                        step: number + 1,
                        steps: calls.len(),
                        source,
                    };
                    let unrestored = self.undo(book, undo);
                    return Err(Failure { error, unrestored });
                }
            }
        }
        Ok(())
    }

    fn undo(&self, book: &mut Book<B>, undo: Vec<MemoryRegion>) -> BTreeMap<SlotId, Errno> {
        let mut unrestored = BTreeMap::new();
        for region in undo.into_iter().rev() {
            // Where an earlier one failed, this one may have become impossible.
            let checked = book.slots.check(&region);
            let done = match checked.map_err(|refusal| Errno(refusal.errno())) {
                Ok(Change::Nothing) => Ok(()),
                Ok(_) => self.call(&region),
                Err(errno) => Err(errno),
            };
            match done {
                Ok(()) => {
                    book.slots.commit(&region);
                }
                Err(errno) => {
                    let which = place(region.id, region.start, region.size);
                    log::error!("{which} could not be put back: {errno}");
                    unrestored.insert(region.id, errno);
                }
            }
        }
        unrestored
    }

    pub(crate) fn call(&self, region: &MemoryRegion) -> Result<(), Errno> {
        // After a panic in there nobody would know what KVM has, and memory that it has would be unmapped.
        let unwinding = AbortOnDrop;
        // SAFETY: the host range of a request is that of a region's mapping, which is nobody else's memory. The book or
        // the change at hand holds the region, and lets go of it only after the slot was deleted (see the top of this
        // file). The guest_memfd is this VM's, and KVM keeps a reference of its own to it.
        let answer = unsafe { self.host.set_memory_region(region) };
        std::mem::forget(unwinding);
        answer
    }

    fn listeners(&self) -> Vec<Registered<B>> {
        let listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        listeners.clone()
    }

    /// Whether this thread is in a call of a listener, and so within a change already.
    pub(crate) fn is_in_listener(&self) -> bool {
        let calling = self.calling.lock().unwrap_or_else(PoisonError::into_inner);
        *calling == Some(thread::current().id())
    }

    pub(crate) fn check_not_in_listener(&self) -> Result<(), Error> {
        match self.is_in_listener() {
            true => Err(Error::InListener),
            false => Ok(()),
        }
    }

    /// Notes that this thread calls listeners, until the result is dropped.
    pub(crate) fn call_listeners(&self) -> Calling<'_> {
        let mut calling = self.calling.lock().unwrap_or_else(PoisonError::into_inner);
        *calling = Some(thread::current().id());
        Calling(&self.calling)
    }

    /// Deletes a slot whose handle is dropped; after the change at hand if that is in a listener's call. What cannot be
    /// deleted stays a slot like a kept one.
    pub(crate) fn discard(&self, extent: &SlotExtent) {
        if self.is_in_listener() {
            let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
            late.push(extent.clone());
        } else if let Err(error) = self.delete(extent) {
            self.keep(extent);
            log::error!("{error}");
        }
    }

    /// Whoever calls listeners has this, and drops it with no lock held, when the call is over.
    pub(crate) fn late_deletions(&self) -> LateDeletions<'_, B> {
        LateDeletions(self)
    }

    /// Runs `f` with other changes kept out.
    pub(crate) fn exclusively<R>(&self, f: impl FnOnce(&SlotTable<B>) -> R) -> R {
        enum Never {}
        let done = self
            .table
            .update(|table| Err::<(SlotTable<B>, Never), R>(f(table)));
        match done {
            Ok((never, _)) => match never {},
            Err(result) => result,
        }
    }

    /// What listeners are told when they register: everything is new.
    pub(crate) fn replay(table: &SlotTable<B>) -> Vec<SlotChange<B>> {
        let regions = table.regions();
        regions
            .map(|region| SlotChange::Added(region.clone()))
            .collect()
    }
}

/// Dropped, deletes the slots whose handles were dropped in listeners' calls.
pub(crate) struct LateDeletions<'a, B: SlotBitmap>(&'a Inner<B>);

impl<B: SlotBitmap> Drop for LateDeletions<'_, B> {
    fn drop(&mut self) {
        let next = || {
            let late = &self.0.late;
            late.lock().unwrap_or_else(PoisonError::into_inner).pop()
        };
        while let Some(extent) = next() {
            // A listener of this deletion may panic where the change before it has done so.
            let done = catch_unwind(AssertUnwindSafe(|| self.0.discard(&extent)));
            if let Err(panic) = done
                && !thread::panicking()
            {
                resume_unwind(panic);
            }
        }
    }
}

struct AbortOnDrop;

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        log::error!("the host panicked while it was asked for a slot");
        std::process::abort();
    }
}

/// The table that readers see next.
fn next<B>(table: &SlotTable<B>, shown: Shown<B>) -> SlotTable<B> {
    table.edited(&shown.gone, shown.added)
}

/// For as long as it exists, a thread is known to be in a listener's call.
pub(crate) struct Calling<'a>(&'a std::sync::Mutex<Option<ThreadId>>);

impl Drop for Calling<'_> {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
