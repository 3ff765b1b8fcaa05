// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the clones of a [`Memslots`](crate::Memslots), its [`Slot`](crate::Slot)s and its [`Listening`](crate::Listening)s
//! share: and what each of them asks for, made into a [`Transaction`]. How that is carried out is `change.rs`.

use crate::book::{Book, Edit, Entry, Place, Transaction, deletion, request, shape};
use crate::classify::place;
use crate::guest_memfd::Binding;
use crate::ids::{IdClaim, Ids};
use crate::listener::{Panic, Registered};
use crate::mapping::Mapping;
use crate::plan::Op;
use crate::planning::check_layout;
use crate::{
    Change, Error, Hva, Layout, LayoutSlot, MemoryRegion, Plan, PrivateRanges, Refusal, Region,
    SetMemoryRegion, SlotBitmap, SlotExtent, SlotFlags, SlotMap, SlotTable,
};
use srcu::{Grace, Published};
use std::panic::resume_unwind;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use vm_memory::GuestAddress;

pub(crate) struct Inner<B: SlotBitmap> {
    pub(crate) host: Box<dyn SetMemoryRegion + Send + Sync>,
    pub(crate) ids: Arc<Ids>,
    pub(crate) private: PrivateRanges,
    /// Held while KVM is asked; not while listeners are called or what has become free is dropped.
    pub(crate) book: Mutex<Book<B>>,
    /// Written by [`Inner::transact`], which keeps it in step with `book`.
    pub(crate) table: Arc<Published<SlotTable<B>>>,
    /// In the order of their registration. Held for a moment only.
    pub(crate) listeners: Mutex<Vec<Registered<B>>>,
    /// The thread that calls listeners now.
    pub(crate) calling: Mutex<Option<ThreadId>>,
    /// Slots whose handles were dropped in such a call. Held for a moment only.
    pub(crate) late: Mutex<Vec<SlotExtent>>,
}

impl<B> Transaction<B> {
    pub(crate) fn with_capacity(calls: usize) -> Self {
        Self {
            calls: Vec::with_capacity(calls),
            edits: Vec::with_capacity(calls),
        }
    }
}

impl<B> Entry<B> {
    pub(crate) fn new(region: Arc<Region<B>>, slot: &LayoutSlot, owned: bool) -> Self {
        Self {
            region,
            backing: slot.slot.backing.clone(),
            guest_memfd: slot.guest_memfd.clone(),
            name: slot.name.clone(),
            owned,
            place: Place::Both,
        }
    }
}

impl<B: SlotBitmap> Inner<B> {
    fn check_private(&self, start: GuestAddress, size: u64) -> Result<(), Error> {
        match self.private.overlap(start, size) {
            Some(private) => Err(Error::Private {
                start,
                size,
                private: private.clone(),
            }),
            None => Ok(()),
        }
    }

    /// What the classifier does not know about a slot: the policy above it, and whose its guest_memfd is.
    fn check_slot(&self, slot: &LayoutSlot) -> Result<(), Error> {
        let mapped = slot.slot.backing.guest_memfd_binding();
        if let Some(binding) = &slot.guest_memfd {
            if !binding.file.belongs_to(&self.ids) {
                return Err(Error::OtherVm {
                    what: "guest_memfd",
                });
            }
            if (binding.file.is_mappable() || mapped.is_some()) && mapped.as_ref() != Some(binding)
            {
                return Err(Error::OtherThanGuestMemfd {
                    start: slot.slot.start,
                    offset: binding.offset,
                });
            }
        }
        self.check_private(slot.slot.start, slot.size())
    }

    /// Everything about new slots that can be known before anything is mapped; and an id for each.
    pub(crate) fn check_new(
        &self,
        book: &Book<B>,
        new: &[LayoutSlot],
    ) -> Result<Vec<Arc<IdClaim>>, Error> {
        book.check_names(new, true)?;
        let claims = self.ids.claim_many(new.len())?;
        // Among themselves first, then each with what is there: neither needs a copy of what is there.
        let mut among_themselves = SlotMap::new(*book.slots.limits());
        for (slot, claim) in new.iter().zip(&claims) {
            let size = slot.size();
            if size == 0 {
                return Err(Error::Empty {
                    start: slot.slot.start,
                });
            }
            let region = MemoryRegion {
                id: claim.id(),
                flags: slot.flags(),
                start: slot.slot.start,
                size,
                host: Hva(0),
                guest_memfd: slot.guest_memfd.as_ref().map(Binding::range),
            };
            among_themselves.apply(&region)?;
            book.slots.check(&region)?;
            self.check_slot(slot)?;
        }
        Ok(claims)
    }

    /// Makes a slot's memory.
    pub(crate) fn map(
        &self,
        slot: &LayoutSlot,
        claim: Arc<IdClaim>,
    ) -> Result<Arc<Region<B>>, Error> {
        let (start, size, id) = (slot.slot.start, slot.size(), claim.id());
        let mapping = Mapping::new(&slot.slot.backing, start).map_err(|source| Error::Map {
            start,
            size,
            source,
        })?;
        let host = mapping.host();
        let extent =
            SlotExtent::claimed(claim, start, size, host).map_err(|_| Refusal::HostRange {
                id,
                start,
                size,
                host,
            })?;
        let guest_memfd = slot.guest_memfd.clone();
        let region = Region::new(extent, slot.flags(), mapping, guest_memfd);
        Ok(Arc::new(region))
    }

    pub(crate) fn plan(
        &self,
        book: &mut Book<B>,
        layout: &Layout,
    ) -> Result<(Plan, Vec<Arc<IdClaim>>), Error> {
        check_layout(layout.slots())?;
        for slot in layout.slots() {
            self.check_slot(slot)?;
        }
        book.plan(layout, &self.ids)
    }

    /// A plan that was made of this book and `layout`, as a change: its new memory mapped, its calls made out.
    pub(crate) fn carry_out(
        &self,
        book: &Book<B>,
        plan: &Plan,
        layout: &Layout,
        claims: Vec<Arc<IdClaim>>,
        transaction: &mut Transaction<B>,
    ) -> Result<Vec<SlotExtent>, Error> {
        let slots = layout.slots();
        let present = book.governed();
        let stale = || Error::Stale { changes: 0 };
        *transaction = Transaction::with_capacity(plan.ops.len());
        let mut regions = Vec::with_capacity(slots.len());
        let mut claims = claims.into_iter();
        for (slot, same) in slots.iter().zip(&plan.same) {
            let Some(same) = *same else {
                let claim = claims.next().ok_or_else(stale)?;
                let region = self.map(slot, claim)?;
                let entry = Entry::new(Arc::clone(&region), slot, false);
                transaction.edits.push(Edit::New(entry));
                regions.push(region);
                continue;
            };
            let (id, entry) = *present.get(same).ok_or_else(stale)?;
            let old = &entry.region;
            let name = slot.name.clone();
            let (start, flags) = (slot.slot.start, slot.flags());
            if (old.extent().start(), old.flags()) != (start, flags) || entry.place != Place::Both {
                let extent = moved(old.extent(), start)?;
                let region = Arc::new(old.changed(extent, flags));
                transaction.edits.push(Edit::Now(Arc::clone(&region), name));
                regions.push(region);
            } else {
                if entry.name != name {
                    transaction.edits.push(Edit::Named(id, name));
                }
                regions.push(Arc::clone(old));
            }
        }
        for (op, step) in plan.ops.iter().zip(&plan.steps) {
            let call = match op {
                Op::Delete(index) => {
                    let (id, entry) = *present.get(*index).ok_or_else(stale)?;
                    deletion(id, &shape(&entry.region, entry))
                }
                Op::Make(index) | Op::Alter(index) => {
                    let found = regions.get(*index).zip(slots.get(*index));
                    let (region, slot) = found.ok_or_else(stale)?;
                    request(region, slot.guest_memfd.as_ref())
                }
            };
            transaction.calls.push((step.change, call));
        }
        for index in &plan.gone {
            let (id, _) = *present.get(*index).ok_or_else(stale)?;
            transaction.edits.push(Edit::Gone(id));
        }
        let extents = regions.iter().map(|region| region.extent().clone());
        Ok(extents.collect())
    }

    /// Changes one slot into what `change` makes of it.
    fn alter(
        &self,
        old: &SlotExtent,
        change: impl FnOnce(&Region<B>) -> Result<(SlotExtent, SlotFlags), Error>,
    ) -> Result<(SlotExtent, Grace, Option<Panic>), Error> {
        let id = old.id();
        self.change(|book, transaction| {
            let entry = book.get(id).ok_or(Refusal::NoSuchSlot { id })?;
            let (extent, flags) = change(&entry.region)?;
            let region = Arc::new(entry.region.changed(extent.clone(), flags));
            let call = request(&region, entry.guest_memfd.as_ref());
            let change = match book.slots.check(&call) {
                // KVM refuses even this of such a slot.
                Err(Refusal::GuestMemfdFixed { .. })
                    if book.slots.get(id) == Some(&shape(&region, entry)) =>
                {
                    Change::Nothing
                }
                checked => checked?,
            };
            if change != Change::Nothing {
                transaction.calls.push((change, call));
                let edit = Edit::Now(region, entry.name.clone());
                transaction.edits.push(edit);
            }
            Ok(extent)
        })
    }
}

/// The extent of the same slot at `start`.
fn moved(extent: &SlotExtent, start: GuestAddress) -> Result<SlotExtent, Refusal> {
    let (id, size) = (extent.id(), extent.size());
    extent
        .moved_to(start)
        .map_err(|_| match start.0.checked_add(size) {
            None => Refusal::Wraps { id, start, size },
            Some(_) => Refusal::Unaligned {
                id,
                start,
                size,
                what: "guest address",
                value: start.0,
            },
        })
}

/// What a [`Slot`] or a [`Listening`] asks of its `Memslots`, whatever `B` is.
pub(crate) trait Owner: Send + Sync {
    fn delete(&self, extent: &SlotExtent) -> Result<Grace, Error>;
    /// Deletes the slot of a handle that is dropped.
    fn discard(&self, extent: &SlotExtent);
    /// The slot's new extent is in `extent` whenever it has moved.
    fn relocate(&self, extent: &mut SlotExtent, start: GuestAddress) -> Result<Grace, Error>;
    fn set_flags(&self, extent: &SlotExtent, flags: SlotFlags) -> Result<Grace, Error>;
    fn flags(&self, extent: &SlotExtent) -> SlotFlags;
    fn keep(&self, extent: &SlotExtent);
    fn unlisten(&self, key: &Arc<AtomicBool>);
}

impl<B: SlotBitmap> Owner for Inner<B> {
    fn delete(&self, extent: &SlotExtent) -> Result<Grace, Error> {
        let id = extent.id();
        let ((), grace) = self.transact(|book, transaction| {
            let shape = book.slots.get(id).ok_or(Refusal::NoSuchSlot { id })?;
            *transaction = Transaction {
                calls: vec![(Change::Delete, deletion(id, shape))],
                edits: vec![Edit::Gone(id)],
            };
            Ok(())
        })?;
        Ok(grace)
    }

    fn discard(&self, extent: &SlotExtent) {
        Self::discard(self, extent);
    }

    fn relocate(&self, extent: &mut SlotExtent, start: GuestAddress) -> Result<Grace, Error> {
        self.check_private(start, extent.size())?;
        let (now, grace, panic) =
            self.alter(extent, |region| Ok((moved(extent, start)?, region.flags())))?;
        *extent = now;
        match panic {
            Some(panic) => resume_unwind(panic),
            None => Ok(grace),
        }
    }

    fn set_flags(&self, extent: &SlotExtent, flags: SlotFlags) -> Result<Grace, Error> {
        let (_, grace, panic) = self.alter(extent, |region| {
            // Not a flag that can be asked for or not, but what the slot is.
            let private = region.flags().contains(SlotFlags::GUEST_MEMFD);
            let flags = flags.with(
                SlotFlags::GUEST_MEMFD,
                private || flags.contains(SlotFlags::GUEST_MEMFD),
            );
            Ok((extent.clone(), flags))
        })?;
        match panic {
            Some(panic) => resume_unwind(panic),
            None => Ok(grace),
        }
    }

    fn flags(&self, extent: &SlotExtent) -> SlotFlags {
        self.lock()
            .slots
            .get(extent.id())
            .map_or(SlotFlags::NONE, |shape| shape.flags)
    }

    fn keep(&self, extent: &SlotExtent) {
        self.lock().keep(extent.id());
    }

    fn unlisten(&self, key: &Arc<AtomicBool>) {
        let mut listeners = self
            .listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let at = listeners
            .iter()
            .position(|registered| Arc::ptr_eq(&registered.alive, key));
        let registered = at.map(|at| listeners.remove(at));
        drop(listeners);
        // A change that another thread is making may be about to call it.
        if !self.is_in_listener() {
            self.exclusively(|_| ());
        }
        drop(registered);
    }
}

impl<B: SlotBitmap> Drop for Inner<B> {
    fn drop(&mut self) {
        // No `Slot` and no listener is left. What is left are the slots that nobody owns, and those that KVM did not
        // delete when asked.
        let book = self.book.get_mut().unwrap_or_else(PoisonError::into_inner);
        let left = book
            .in_kvm()
            .map(|entry| (Arc::clone(&entry.region), entry.guest_memfd.clone()));
        let mut deleted = Vec::new();
        for (region, guest_memfd) in left.collect::<Vec<_>>() {
            let id = region.extent().id();
            let shape = self.lock().slots.get(id).copied();
            match shape.map(|shape| self.call(&deletion(id, &shape))) {
                Some(Err(error)) => {
                    let extent = region.extent();
                    let which = place(id, extent.start(), extent.size());
                    log::error!("{which} was not deleted, and its memory stays mapped: {error}");
                    // The guest may run on and use it.
                    std::mem::forget((region, guest_memfd));
                }
                _ => deleted.push(id),
            }
        }
        // Devices that still have a handle see the memory go, as with any other deletion.
        let table = self.table.load();
        drop(self.table.publish(table.edited(&deleted, Vec::new())));
    }
}
