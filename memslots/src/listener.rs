// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`ChangeListener`]: whoever mirrors guest memory (an IOMMU's mappings, VFIO, vhost-user's memory table) and so must
//! know of a change in time, and may refuse it. The counterpart of the kernel's own `kvm_arch_prepare_memory_region`
//! and `kvm_arch_commit_memory_region`.

use crate::Region;
use crate::inner::Owner;
use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A listener's reason to refuse.
pub type Veto = Box<dyn std::error::Error + Send + Sync>;

/// What happens to one slot.
#[derive(Debug)]
#[non_exhaustive]
pub enum SlotChange<B = ()> {
    /// Memory appears.
    Added(Arc<Region<B>>),
    /// Memory goes.
    Removed(Arc<Region<B>>),
    /// The same memory, at another guest address and perhaps with other flags.
    Moved {
        /// As it was.
        from: Arc<Region<B>>,
        /// As it will be.
        to: Arc<Region<B>>,
    },
    /// The same memory in the same place, with other flags: of a dirty log, or, through a plan, read-only or not.
    Flags {
        /// As it was.
        from: Arc<Region<B>>,
        /// As it will be.
        to: Arc<Region<B>>,
    },
}

/// One change of the slots, whole: every slot that it touches, once.
#[derive(Debug)]
pub struct LayoutChange<'a, B = ()> {
    slots: &'a [SlotChange<B>],
}

impl<B> Clone for LayoutChange<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for LayoutChange<'_, B> {}

impl<'a, B> LayoutChange<'a, B> {
    pub(crate) const fn new(slots: &'a [SlotChange<B>]) -> Self {
        Self { slots }
    }

    /// Slot by slot.
    pub const fn slots(&self) -> &'a [SlotChange<B>] {
        self.slots
    }

    /// Guest addresses that have this memory no more: of what is removed, and the old place of what moves.
    pub fn removed(&self) -> impl Iterator<Item = &'a Arc<Region<B>>> {
        self.slots.iter().filter_map(|slot| match slot {
            SlotChange::Removed(region) | SlotChange::Moved { from: region, .. } => Some(region),
            _ => None,
        })
    }

    /// Whether `region`, which is [added](Self::added), takes guest addresses that the same change takes from other
    /// memory, or from the same memory that moves: a mirror that has one thing at an address must wait for the commit,
    /// and let go of what is [removed](Self::removed) first. Looks at each slot of the change.
    pub fn displaces(&self, region: &Region<B>) -> bool {
        let new = region.extent().guest_range();
        self.removed().any(|old| {
            let old = old.extent().guest_range();
            old.start < new.end && new.start < old.end
        })
    }

    /// Guest addresses that have this memory now: of what is added, and the new place of what moves.
    pub fn added(&self) -> impl Iterator<Item = &'a Arc<Region<B>>> {
        self.slots.iter().filter_map(|slot| match slot {
            SlotChange::Added(region) | SlotChange::Moved { to: region, .. } => Some(region),
            _ => None,
        })
    }
}

/// Is told of every change of the slots, before and after.
///
/// # Contract
/// A change goes through these steps, on the thread that makes it:
///
/// 1. New memory is mapped in this process.
/// 2. **prepare**, listener after listener. Nothing has changed: neither the guest nor readers see what is added, and
///    what is removed is all there. A listener takes what it can fail to get here: for VFIO, the mappings of
///    [`added`](LayoutChange::added) memory, so that a device can reach it from the moment at which the guest can name
///    it. One that refuses has undone what it did itself; those before it are told to abort, the last first.
/// 3. KVM is asked, call by call. If one fails, what was done is taken back, and then all listeners **abort**.
/// 4. **commit**, listener after listener. The guest sees the new layout; readers and snapshots still show the old one,
///    and memory that is removed is still mapped. A listener lets go of what is [`removed`](LayoutChange::removed) here
///    and *before it returns*: after that the memory may be unmapped, and a device that still reaches it writes into
///    whatever comes there next.
/// 5. Readers see the new layout, and memory without users goes.
///
/// Where added memory [displaces](LayoutChange::displaces) removed memory (at the same IOVA, say), a listener can only
/// replace the one by the other at commit, when it cannot refuse any more. Who needs a refusal there makes two changes
/// of it.
///
/// If KVM refuses in step 3 and then refuses to take a step back as well ([`Error::Undo`](crate::Error::Undo)), abort
/// comes as ever, and then one commit *without a prepare*, which says how what readers see differs from before: slots
/// that are missing, or elsewhere.
///
/// No lock is held that reading needs: a listener may enter readers, take snapshots and plan. The lock that keeps other
/// changes out is held: a listener that changes the same slots gets [`Error::InListener`](crate::Error::InListener), one
/// that waits for another thread to change them waits for ever.
///
/// A panic in prepare unwinds through the change, with the same effect as a refusal. One in abort or commit is held up
/// until every listener has been told and what has become of the change is published, and goes on then (the first, if
/// there are several; what the others carry is dropped first, when no lock is held any more). Of a change that is made, slots whose handles it so keeps from the caller are a part of the
/// [layout](crate::Memslots::layout).
///
/// A [`Slot`](crate::Slot) that is dropped in a listener's call goes when the change at hand is over, before that returns.
pub trait ChangeListener<B = ()>: Send + Sync {
    /// The change will be made, unless someone refuses.
    ///
    /// # Errors
    /// Whatever makes the change impossible; the change fails with it.
    fn prepare(&self, change: &LayoutChange<'_, B>) -> Result<(), Veto>;

    /// The change is made.
    fn commit(&self, change: &LayoutChange<'_, B>);

    /// The change that was prepared is not made.
    fn abort(&self, change: &LayoutChange<'_, B>);
}

/// A registration. Dropped, the listener hears no more: when the drop returns, no call of it is running or will be
/// (dropped within a call of any listener: no further one will be). It is told nothing at that; it knows what it has.
///
/// Keeps its [`Memslots`](crate::Memslots) alive, so that no memory is unmapped which the listener has mirrored. (A
/// listener that owns its own registration, or a clone of the `Memslots`, so keeps itself.)
#[must_use = "dropping a registration ends it"]
pub struct Listening {
    owner: Arc<dyn Owner>,
    key: Arc<AtomicBool>,
}

impl Listening {
    pub(crate) fn new(owner: Arc<dyn Owner>, key: Arc<AtomicBool>) -> Self {
        Self { owner, key }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.key.store(false, Ordering::Relaxed);
        self.owner.unlisten(&self.key);
    }
}

impl fmt::Debug for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listening").finish_non_exhaustive()
    }
}

/// A listener, and whether it still is one.
pub(crate) struct Registered<B> {
    pub(crate) listener: Arc<dyn ChangeListener<B>>,
    pub(crate) alive: Arc<AtomicBool>,
}

impl<B> Clone for Registered<B> {
    fn clone(&self) -> Self {
        Self {
            listener: Arc::clone(&self.listener),
            alive: Arc::clone(&self.alive),
        }
    }
}

impl<B> Registered<B> {
    /// For those who are told on the thread that may have ended the registration.
    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }
}

/// A listener's panic, caught. Its drop may run code of consumers, and so does not happen here, where a lock is held:
/// who calls listeners keeps them in a list, and goes on with the first.
pub(crate) type Panic = Box<dyn Any + Send>;

/// The panic to go on with: the first, when the others have been let go of. With no lock held.
pub(crate) fn first(panics: Vec<Panic>) -> Option<Panic> {
    panics.into_iter().next()
}

/// Listeners that are prepared for a change. Dropped before the commit, in a panic, they abort.
pub(crate) struct Prepared<'a, B> {
    listeners: &'a [Registered<B>],
    change: LayoutChange<'a, B>,
    /// So many of them, from the first, are prepared.
    count: usize,
    /// What is caught.
    panics: &'a mut Vec<Panic>,
}

impl<'a, B> Prepared<'a, B> {
    /// Prepares all, or none.
    pub(crate) fn all(
        listeners: &'a [Registered<B>],
        change: LayoutChange<'a, B>,
        panics: &'a mut Vec<Panic>,
    ) -> Result<Self, Veto> {
        let mut prepared = Self {
            listeners,
            change,
            count: 0,
            panics,
        };
        for registered in listeners {
            if registered.is_alive()
                && let Err(veto) = registered.listener.prepare(&change)
            {
                prepared.abort();
                return Err(veto);
            }
            prepared.count += 1;
        }
        Ok(prepared)
    }

    pub(crate) fn abort(self) {
        drop(self);
    }

    pub(crate) fn commit(mut self) {
        self.count = 0;
        commit(self.listeners, self.change, self.panics);
    }
}

impl<B> Drop for Prepared<'_, B> {
    fn drop(&mut self) {
        let prepared = self.listeners.iter().take(self.count);
        let alive = prepared.rev().filter(|registered| registered.is_alive());
        tell(alive, |listener| listener.abort(&self.change), self.panics);
    }
}

/// Tells all of them of a change that is made.
pub(crate) fn commit<B>(
    listeners: &[Registered<B>],
    change: LayoutChange<'_, B>,
    panics: &mut Vec<Panic>,
) {
    let alive = listeners.iter().filter(|registered| registered.is_alive());
    tell(alive, |listener| listener.commit(&change), panics);
}

fn tell<'a, B: 'a>(
    listeners: impl Iterator<Item = &'a Registered<B>>,
    call: impl Fn(&dyn ChangeListener<B>),
    panics: &mut Vec<Panic>,
) {
    for registered in listeners {
        // What the listener leaves broken is its own; ours is whole.
        panics.extend(catch_unwind(AssertUnwindSafe(|| call(&*registered.listener))).err());
    }
}
