// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Memslots`]: the writers' side. What is asked of it becomes a transaction (`inner.rs`) on what it knows
//! (`book.rs`), which is carried out as one change (`change.rs`).

use crate::book::{Book, Edit, Entry, Transaction, request};
use crate::ids::Ids;
use crate::inner::{Inner, Owner};
use crate::listener::{Listening, Prepared, Registered, first};
use crate::{
    Backing, Change, ChangeListener, Error, GuestMemfd, GuestRam, Layout, LayoutChange, LayoutSlot,
    Limits, NewSlot, Plan, PrivateRanges, Refusal, SetMemoryRegion, Slot, SlotBitmap, SlotExtent,
    SlotFlags, SlotId, SlotMap, SlotTable,
};
use srcu::{Grace, Published, Reader, Snapshot};
use std::fmt;
use std::panic::resume_unwind;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::GuestAddress;

/// The memory slots of one VM.
///
/// Cheap to clone (all clones are one); `Send + Sync`. `B` notes the writes that this process makes.
///
/// One `Memslots` for a VM: it takes every slot id for its own (of two, each would take the other's ids for free, and KVM
/// refuse; and a [`SlotExtent`] could outlive its id's meaning). When it, its clones and all its [`Slot`]s are gone, the
/// slots that were [kept](Slot::keep) are deleted from KVM, which takes KVM's time for each (milliseconds, once KVM has
/// buses to wait for). A VMM whose VM ends with the process spares itself that: `keep` all slots, and let the process
/// end, or [`std::mem::forget`] the `Memslots`; memory stays mapped to the end then.
pub struct Memslots<B: SlotBitmap = ()> {
    inner: Arc<Inner<B>>,
}

/// What [`Memslots::apply`] and [`Memslots::set_layout`] give back.
#[derive(Debug)]
#[non_exhaustive]
pub struct Applied {
    /// The slots, in the layout's order.
    pub extents: Vec<SlotExtent>,
    /// Tells when no reader of this process sees the old layout any more. Nobody needs to wait for it for memory's sake.
    pub grace: Grace,
}

impl Memslots {
    /// The slots of the VM `host`, none yet; on x86, [`PrivateRanges::x86`] is left free. One ioctl, for the limit.
    pub fn new(host: impl SetMemoryRegion + Send + Sync + 'static) -> Self {
        let private = match cfg!(any(target_arch = "x86", target_arch = "x86_64")) {
            true => PrivateRanges::x86(),
            // What a VMM of another architecture puts where is its own to say.
            false => PrivateRanges::none(),
        };
        Self::with_policy(host, private)
    }
}

impl<B: SlotBitmap> Memslots<B> {
    /// As [`new`](Memslots::new), with a bitmap type and a choice of what is left free.
    pub fn with_policy(
        host: impl SetMemoryRegion + Send + Sync + 'static,
        private: PrivateRanges,
    ) -> Self {
        // KVM's ids have 16 bits.
        let limit = u32::try_from(host.max_slots())
            .unwrap_or(u32::MAX)
            .min(1 << 16);
        let book = Book::new(SlotMap::new(Limits::new(limit)));
        Self {
            inner: Arc::new(Inner {
                host: Box::new(host),
                ids: Ids::new(limit),
                private,
                book: Mutex::new(book),
                table: Arc::new(Published::new(SlotTable::new())),
                listeners: Mutex::new(Vec::new()),
                calling: Mutex::new(None),
                late: Mutex::new(Vec::new()),
            }),
        }
    }

    /// Makes a slot: `backing` is mapped, and the guest sees it at `start`. The id is the lowest free one. May wait for
    /// KVM, and for another thread's change; running vCPUs need not stop.
    ///
    /// # Errors
    /// [`enum@Error`]; then nothing has changed.
    pub fn create(
        &self,
        start: GuestAddress,
        backing: Backing,
        flags: SlotFlags,
    ) -> Result<Slot, Error> {
        let size = backing.size();
        let mut slots = self.create_all([NewSlot {
            start,
            backing,
            flags,
        }])?;
        // One was asked for, so one is there.
        slots.pop().ok_or(Error::Refused(Refusal::Wraps {
            id: SlotId::default(),
            start,
            size,
        }))
    }

    /// Makes several slots, or none: readers see all of them at once. The slots are in the order of the requests.
    /// Everything that can be known before is checked before the first call; then there is one `mmap` and one ioctl a
    /// slot, and one publication. A [`NewSlot`] can have a [name](NewSlot::named) and [private
    /// memory](NewSlot::with_guest_memfd).
    ///
    /// # Errors
    /// [`enum@Error`]; then nothing has changed, [`Error::Undo`] excepted.
    pub fn create_all<S: Into<LayoutSlot>>(
        &self,
        new: impl IntoIterator<Item = S>,
    ) -> Result<Vec<Slot>, Error> {
        let new: Vec<LayoutSlot> = new.into_iter().map(Into::into).collect();
        let inner = &self.inner;
        let (extents, grace) = inner.transact(|book, transaction| {
            let claims = inner.check_new(book, &new)?;
            *transaction = Transaction::with_capacity(new.len());
            let mut extents = Vec::with_capacity(new.len());
            for (slot, claim) in new.iter().zip(claims) {
                let region = inner.map(slot, claim)?;
                extents.push(region.extent().clone());
                let call = request(&region, slot.guest_memfd.as_ref());
                transaction.calls.push((Change::Create, call));
                let entry = Entry::new(region, slot, true);
                transaction.edits.push(Edit::New(entry));
            }
            Ok(extents)
        })?;
        // Nobody needs to wait: what was published before is still right about every slot that it shows.
        drop(grace);
        let owner: Arc<dyn Owner> = Arc::clone(inner) as _;
        let slot = |extent| Slot::new(extent, Arc::clone(&owner));
        Ok(extents.into_iter().map(slot).collect())
    }

    /// The layout of now: the slots that no [`Slot`] owns, by guest address.
    pub fn layout(&self) -> Layout {
        self.inner.lock().layout()
    }

    /// How to get from what there is to `layout`: which calls of KVM, in which order, and which of them a running vCPU
    /// could notice. Asks nobody and maps nothing; waits for a change that another thread is making.
    ///
    /// A layout is about the slots that no [`Slot`] owns: those made by earlier layouts, and those that were
    /// [kept](Slot::keep). What a [`Slot`] owns is its owner's, and in the way.
    ///
    /// # Errors
    /// [`enum@Error`]: what KVM would refuse, private ranges, too few ids, two slots of one name or with common
    /// addresses.
    pub fn plan(&self, layout: &Layout) -> Result<Plan, Error> {
        let (mut plan, claims) = self.inner.plan(&mut self.inner.lock(), layout)?;
        drop(claims);
        plan.layout = layout.clone();
        Ok(plan)
    }

    /// Carries `plan` out: makes the memory that is new, asks KVM step by step, and shows readers all of it at once.
    /// May wait for KVM at each step, and for another thread's change.
    ///
    /// A plan is for the slots as they were when it was made: whoever has paused vCPUs, or not, because of what it
    /// says, must be able to rely on it. So one that has become old is refused, and not made anew;
    /// [`set_layout`](Self::set_layout) plans and applies in one and cannot become old.
    ///
    /// A slot that is deleted and made again, by a plan or to undo one, has a new dirty log in KVM, without the pages
    /// that the old one had noted: harvest those before.
    ///
    /// # Errors
    /// [`Error::Stale`], [`enum@Error`]; then nothing has changed, [`Error::Undo`] excepted. [`Error::Kvm`] says which
    /// step it was.
    pub fn apply(&self, plan: Plan) -> Result<Applied, Error> {
        let inner = &self.inner;
        if !Arc::ptr_eq(&plan.vm, &inner.ids) {
            return Err(Error::OtherVm { what: "plan" });
        }
        let (extents, grace) = inner.transact(|book, transaction| {
            let changes = book.epoch().wrapping_sub(plan.epoch);
            if changes != 0 {
                return Err(Error::Stale { changes });
            }
            let new = plan.same.iter().filter(|same| same.is_none()).count();
            let claims = inner.ids.claim_many(new)?;
            inner.carry_out(book, &plan, &plan.layout, claims, transaction)
        })?;
        Ok(Applied { extents, grace })
    }

    /// Makes guest memory what `layout` says: [`plan`](Self::plan) and [`apply`](Self::apply) in one, with no change of
    /// another thread between them. What is so already costs no call.
    ///
    /// # Errors
    /// As the two.
    pub fn set_layout(&self, layout: &Layout) -> Result<Applied, Error> {
        let inner = &self.inner;
        let (extents, grace) = inner.transact(|book, transaction| {
            let (plan, claims) = inner.plan(book, layout)?;
            inner.carry_out(book, &plan, layout, claims, transaction)
        })?;
        Ok(Applied { extents, grace })
    }

    /// Makes a guest_memfd of `size` bytes (a multiple of the page size) for slots of this VM. One ioctl, three the
    /// first time; no slot is made.
    ///
    /// # Errors
    /// [`Error::NoGuestMemfd`] where this VM can have none, [`Error::GuestMemfd`] if the host refuses.
    pub fn create_guest_memfd(&self, size: u64) -> Result<GuestMemfd, Error> {
        self.guest_memfd(size, false)
    }

    /// As [`create_guest_memfd`](Self::create_guest_memfd), of one that this process maps as well, and that so is the memory
    /// of slots ([`Backing::guest_memfd`]). Two ioctls more.
    ///
    /// # Errors
    /// [`Error::NoMappableGuestMemfd`] where this VM can have none, [`Error::GuestMemfd`] if the host refuses.
    pub fn create_mappable_guest_memfd(&self, size: u64) -> Result<GuestMemfd, Error> {
        self.guest_memfd(size, true)
    }

    fn guest_memfd(&self, size: u64, mappable: bool) -> Result<GuestMemfd, Error> {
        let inner = &self.inner;
        if mappable && !inner.host.has_mappable_guest_memfd() {
            return Err(Error::NoMappableGuestMemfd);
        }
        if !inner.lock().slots.limits().guest_memfd {
            if !inner.host.has_guest_memfd() {
                return Err(Error::NoGuestMemfd);
            }
            inner.lock().slots.allow_guest_memfd();
        }
        let file = match mappable {
            true => inner.host.create_mappable_guest_memfd(size),
            false => inner.host.create_guest_memfd(size),
        };
        let file = file.map_err(|source| Error::GuestMemfd { size, source })?;
        let vm = Arc::clone(&inner.ids);
        Ok(GuestMemfd::new(file, size, mappable, vm))
    }

    /// Registers a listener, after those that there are. It is told of all the slots that there are now, as of one
    /// change, and of every change from then on; for how long, the result says.
    ///
    /// # Errors
    /// [`Error::Vetoed`] if it refuses what there is; then it is not registered.
    pub fn listen(&self, listener: Arc<dyn ChangeListener<B>>) -> Result<Listening, Error> {
        let inner = &self.inner;
        inner.check_not_in_listener()?;
        let _late = inner.late_deletions();
        let registered = Registered {
            listener,
            alive: Arc::new(AtomicBool::new(true)),
        };
        let alive = Arc::clone(&registered.alive);
        let mut panics = Vec::new();
        let told = inner.exclusively(|table| {
            let _calling = inner.call_listeners();
            let changes = Inner::replay(table);
            let one = std::slice::from_ref(&registered);
            match Prepared::all(one, LayoutChange::new(&changes), &mut panics) {
                Ok(prepared) => prepared.commit(),
                Err(source) => return Err(Error::Vetoed { source }),
            }
            if panics.is_empty() {
                let mut listeners = inner
                    .listeners
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                listeners.push(registered.clone());
            }
            Ok(())
        });
        if let Some(panic) = first(panics) {
            resume_unwind(panic);
        }
        told?;
        Ok(Listening::new(Arc::clone(inner) as _, alive))
    }

    /// The slots of now, immutable. For the control plane and for loaders: it keeps its slots' memory mapped.
    pub fn snapshot(&self) -> Snapshot<SlotTable<B>> {
        self.inner.table.load()
    }

    /// A vCPU thread's own way to the slots: entering it takes no lock. It keeps nothing mapped while it is not inside,
    /// so it must not be inside during `KVM_RUN`.
    pub fn reader(&self) -> Reader<SlotTable<B>> {
        self.inner.table.reader()
    }

    /// The live handle for devices.
    pub fn ram(&self) -> GuestRam<B> {
        GuestRam::new(Arc::clone(&self.inner.table))
    }

    /// The number of the slots' current state; it changes with every change that readers can see.
    pub fn generation(&self) -> u64 {
        self.inner.table.generation()
    }

    /// How many slots the host can have.
    pub fn limit(&self) -> u32 {
        self.inner.ids.limit()
    }

    /// How many more slots there can be now.
    pub fn available(&self) -> usize {
        self.inner.ids.available()
    }
}

impl<B: SlotBitmap> Clone for Memslots<B> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<B: SlotBitmap> fmt::Debug for Memslots<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let snapshot = self.snapshot();
        f.debug_struct("Memslots")
            .field("limit", &self.limit())
            .field("slots", &*snapshot)
            .finish()
    }
}
