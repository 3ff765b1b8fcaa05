// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Memslots`]: the writers' side. One lock, under which a change is checked, made in KVM, and published; every
//! failure takes back what was done before it.
//!
//! The order of things is what keeps memory sound:
//! - created: mapped, then known to KVM, then published to readers;
//! - deleted: gone from KVM, then from what is published, and unmapped when the last reader and the last snapshot have
//!   let go. What KVM refuses to delete stays published and mapped.

use crate::ids::{IdClaim, Ids};
use crate::mapping::Mapping;
use crate::{
    Backing, Change, Errno, GuestRam, Hva, Limits, MapError, MemoryRegion, PrivateRange,
    PrivateRanges, Refusal, Region, SetMemoryRegion, Slot, SlotBitmap, SlotExtent, SlotFlags,
    SlotId, SlotMap, SlotTable,
};
use srcu::{Grace, Published, Reader, Snapshot};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use thiserror::Error;
use vm_memory::GuestAddress;

/// Why slots could not be made or changed. Except for [`Undo`](Self::Undo), everything is as it was before.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// KVM would refuse it; it was not asked.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A slot without memory: in KVM's call a size of 0 deletes.
    #[error("a slot of 0 bytes at guest address {:#x}", start.0)]
    Empty {
        /// The first guest address asked for.
        start: GuestAddress,
    },
    /// KVM keeps some of these guest addresses for itself.
    #[error(
        "{size:#x} bytes from guest address {:#x} overlap {} ({:#x}..{:#x})",
        start.0, private.name, private.range.start, private.range.end
    )]
    Private {
        /// The first guest address asked for.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
        /// What is there.
        private: PrivateRange,
    },
    /// More slots than the host has ids for.
    #[error("{wanted} more slots, but {available} of this host's {limit} are free")]
    NoFreeId {
        /// The slots asked for.
        wanted: usize,
        /// The ids that are free.
        available: usize,
        /// The host's limit.
        limit: u32,
    },
    /// The host gave no memory.
    #[error("no mapping of {size:#x} bytes for guest address {:#x}", start.0)]
    Map {
        /// Where in the guest it was to be.
        start: GuestAddress,
        /// The size in bytes.
        size: u64,
        /// The reason.
        source: MapError,
    },
    /// KVM refused.
    #[error("KVM did not {change} {}, {:#x} bytes at guest address {:#x}", region.id, region.size, region.start.0)]
    Kvm {
        /// What was to be done.
        change: Change,
        /// The request.
        region: MemoryRegion,
        /// The reason.
        source: Errno,
    },
    /// A change failed, and then what had been done before it could not be taken back: `left` stays a slot of the VM,
    /// with its memory, until the [`Memslots`] is dropped.
    #[error("{left} could not be deleted again ({errno}) after: {cause}")]
    Undo {
        /// The slot that stays.
        left: SlotId,
        /// Why it could not be deleted.
        errno: Errno,
        /// The first failure.
        cause: Box<Error>,
    },
}

/// A slot to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSlot {
    /// Its first guest physical address.
    pub start: GuestAddress,
    /// Its memory, and so its size.
    pub backing: Backing,
    /// Its flags.
    pub flags: SlotFlags,
}

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

pub(crate) struct Inner<B: SlotBitmap> {
    host: Box<dyn SetMemoryRegion + Send + Sync>,
    ids: Arc<Ids>,
    private: PrivateRanges,
    /// Held throughout a change, and not while what has become free is dropped ([`Inner::change`]).
    state: Mutex<State<B>>,
    /// Written by [`Inner::change`], which keeps it in step with `state`.
    table: Arc<Published<SlotTable<B>>>,
}

struct State<B> {
    /// What KVM has.
    slots: SlotMap,
    /// Slots that KVM has and that were never published, because they could not be deleted when something else failed.
    stranded: Vec<Arc<Region<B>>>,
}

impl Memslots {
    /// The slots of the VM `host`, none yet; [`PrivateRanges::x86`] is left free. One ioctl, for the limit.
    pub fn new(host: impl SetMemoryRegion + Send + Sync + 'static) -> Self {
        Self::with_policy(host, PrivateRanges::x86())
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
        let state = State {
            slots: SlotMap::new(Limits::new(limit)),
            stranded: Vec::new(),
        };
        Self {
            inner: Arc::new(Inner {
                host: Box::new(host),
                ids: Ids::new(limit),
                private,
                state: Mutex::new(state),
                table: Arc::new(Published::new(SlotTable::new())),
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
    /// slot, and one publication.
    ///
    /// # Errors
    /// [`enum@Error`]; then nothing has changed, [`Error::Undo`] excepted.
    pub fn create_all(&self, new: impl IntoIterator<Item = NewSlot>) -> Result<Vec<Slot>, Error> {
        let new: Vec<NewSlot> = new.into_iter().collect();
        let inner = &self.inner;
        let (slots, grace) = inner.change(|state, table| {
            let planned = inner.plan(&state.slots, &new)?;
            let regions = planned.into_iter().map(Arc::new).collect::<Vec<_>>();
            for (done, region) in regions.iter().enumerate() {
                if let Err(error) = inner.install(state, region) {
                    return Err(inner.undo(state, regions.get(..done).unwrap_or_default(), error));
                }
            }
            let owner: Arc<dyn Owner> = Arc::clone(inner) as _;
            let slots = regions
                .iter()
                .map(|region| Slot::new(region, &owner))
                .collect();
            Ok((table.edited(&[], regions), slots))
        })?;
        // Nobody needs to wait: what was published before is still right about every slot that it shows.
        drop(grace);
        Ok(slots)
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

impl<B: SlotBitmap> Inner<B> {
    fn lock(&self) -> MutexGuard<'_, State<B>> {
        // A holder that panicked (in a bitmap's `with_len`, say) had changed nothing yet or left it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One change, no other coming in between: `f` asks KVM, and makes the next table of the current one. If it fails,
    /// nothing is published.
    ///
    /// The publication may end grace periods, and so unmap memory and run what callers have [deferred](Grace::defer).
    /// That comes after `f`, with no lock held: it may change slots in its turn.
    fn change<R, E>(
        &self,
        f: impl FnOnce(&mut State<B>, &SlotTable<B>) -> Result<(SlotTable<B>, R), E>,
    ) -> Result<(R, Grace), E> {
        // The writers' lock of `table` first, then `state`'s: the only order there is.
        self.table.update(|table| f(&mut self.lock(), table))
    }

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

    /// Everything about new slots that can fail before KVM is asked: ids, legality, private ranges, mappings.
    fn plan(&self, slots: &SlotMap, new: &[NewSlot]) -> Result<Vec<Region<B>>, Error> {
        let (limit, available) = (self.ids.limit(), self.ids.available());
        let no_id = || Error::NoFreeId {
            wanted: new.len(),
            available,
            limit,
        };
        if new.len() > available {
            return Err(no_id());
        }
        // Among themselves first, then each with what is there: neither needs a copy of what is there.
        let mut among_themselves = SlotMap::new(*slots.limits());
        let mut claims: Vec<Arc<IdClaim>> = Vec::with_capacity(new.len());
        for slot in new {
            let claim = self.ids.claim().ok_or_else(no_id)?;
            let (size, host) = (slot.backing.size(), Hva(0));
            if size == 0 {
                return Err(Error::Empty { start: slot.start });
            }
            let region = MemoryRegion {
                id: claim.id(),
                flags: slot.flags,
                start: slot.start,
                size,
                host,
            };
            among_themselves.apply(&region)?;
            slots.check(&region)?;
            self.check_private(slot.start, size)?;
            claims.push(claim);
        }
        let map = |(slot, claim): (&NewSlot, Arc<IdClaim>)| {
            let (start, size, id) = (slot.start, slot.backing.size(), claim.id());
            let mapping = Mapping::new(&slot.backing, start).map_err(|source| Error::Map {
                start,
                size,
                source,
            })?;
            let host = mapping.host();
            let extent = SlotExtent::claimed(claim, start, size, host)
                .map_err(|_| Refusal::HostRange { id, host, size })?;
            Ok(Region::new(extent, slot.flags, mapping))
        };
        new.iter().zip(claims).map(map).collect()
    }

    /// Asks KVM, and notes what it did.
    fn set(&self, state: &mut State<B>, region: &MemoryRegion) -> Result<Change, Error> {
        let change = state.slots.check(region)?;
        if change == Change::Nothing {
            return Ok(change);
        }
        // SAFETY: the host range of a request is that of a region's mapping, which is nobody else's memory; whoever
        // holds the region does not let go of it before the slot is deleted (see the top of this file).
        let result = unsafe { self.host.set_memory_region(region) };
        result.map_err(|source| Error::Kvm {
            change,
            region: *region,
            source,
        })?;
        state.slots.apply(region)?;
        Ok(change)
    }

    fn install(&self, state: &mut State<B>, region: &Arc<Region<B>>) -> Result<(), Error> {
        self.set(state, &request(region.extent(), region.flags()))
            .map(drop)
    }

    /// Deletes `done` again, the last first. What cannot be deleted is kept, mapping and id.
    fn undo(&self, state: &mut State<B>, done: &[Arc<Region<B>>], mut error: Error) -> Error {
        for region in done.iter().rev() {
            if let Err(Error::Kvm { source: errno, .. }) =
                self.set(state, &deletion(region.extent()))
            {
                let left = region.extent().id();
                state.stranded.push(Arc::clone(region));
                error = Error::Undo {
                    left,
                    errno,
                    cause: Box::new(error),
                };
            }
        }
        error
    }

    /// Changes one published slot into what `change` makes of it.
    fn alter(
        &self,
        old: &SlotExtent,
        change: impl FnOnce(&Region<B>) -> Result<(SlotExtent, SlotFlags), Error>,
    ) -> Result<(SlotExtent, Grace), Error> {
        let id = old.id();
        let changed = self.change(|state, table| {
            let region = table.by_id(id).ok_or(Refusal::NoSuchSlot { id })?;
            let (extent, flags) = change(region)?;
            if self.set(state, &request(&extent, flags))? == Change::Nothing {
                return Err(Stop::Unchanged(extent));
            }
            let region = Arc::new(region.changed(extent.clone(), flags));
            Ok((table.edited(&[id], vec![region]), extent))
        });
        match changed {
            Ok(changed) => Ok(changed),
            Err(Stop::Unchanged(extent)) => Ok((extent, self.table.grace())),
            Err(Stop::Failed(error)) => Err(error),
        }
    }
}

/// Why a change of a slot publishes nothing.
enum Stop {
    /// The slot is so already.
    Unchanged(SlotExtent),
    /// It is not to be.
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// What a [`Slot`] asks of its `Memslots`, whatever `B` is.
pub(crate) trait Owner: Send + Sync {
    fn delete(&self, extent: &SlotExtent) -> Result<Grace, Error>;
    fn relocate(
        &self,
        extent: &SlotExtent,
        start: GuestAddress,
    ) -> Result<(SlotExtent, Grace), Error>;
    fn set_flags(&self, extent: &SlotExtent, flags: SlotFlags) -> Result<Grace, Error>;
    fn flags(&self, extent: &SlotExtent) -> SlotFlags;
}

impl<B: SlotBitmap> Owner for Inner<B> {
    fn delete(&self, extent: &SlotExtent) -> Result<Grace, Error> {
        let ((), grace) = self.change(|state, table| {
            self.set(state, &deletion(extent))?;
            Ok::<_, Error>((table.edited(&[extent.id()], Vec::new()), ()))
        })?;
        Ok(grace)
    }

    fn relocate(
        &self,
        extent: &SlotExtent,
        start: GuestAddress,
    ) -> Result<(SlotExtent, Grace), Error> {
        let (id, size) = (extent.id(), extent.size());
        self.check_private(start, size)?;
        self.alter(extent, |region| {
            let moved = extent
                .moved_to(start)
                .map_err(|_| match start.0.checked_add(size) {
                    None => Refusal::Wraps { id, start, size },
                    Some(_) => Refusal::Unaligned {
                        id,
                        what: "guest address",
                        value: start.0,
                    },
                })?;
            Ok((moved, region.flags()))
        })
    }

    fn set_flags(&self, extent: &SlotExtent, flags: SlotFlags) -> Result<Grace, Error> {
        self.alter(extent, |_| Ok((extent.clone(), flags)))
            .map(|(_, grace)| grace)
    }

    fn flags(&self, extent: &SlotExtent) -> SlotFlags {
        self.lock()
            .slots
            .get(extent.id())
            .map_or(SlotFlags::NONE, |shape| shape.flags)
    }
}

/// The request that describes a slot as it is or is to be.
fn request(extent: &SlotExtent, flags: SlotFlags) -> MemoryRegion {
    let (id, start, size, host) = (
        extent.id(),
        extent.start(),
        extent.size(),
        extent.host_start(),
    );
    MemoryRegion {
        id,
        flags,
        start,
        size,
        host,
    }
}

fn deletion(extent: &SlotExtent) -> MemoryRegion {
    MemoryRegion {
        size: 0,
        ..request(extent, SlotFlags::NONE)
    }
}

impl<B: SlotBitmap> Drop for Inner<B> {
    fn drop(&mut self) {
        // No `Slot` is left, so what is left are the kept ones, and those that KVM did not delete when asked.
        let table = self.table.load();
        let stranded = std::mem::take(&mut self.lock().stranded);
        let mut deleted = Vec::new();
        for region in table.regions().chain(&stranded) {
            match self.set(&mut self.lock(), &deletion(region.extent())) {
                Ok(_) => deleted.push(region.extent().id()),
                Err(error) => {
                    log::error!("{error}: its memory stays mapped");
                    // The guest may run on and use it.
                    std::mem::forget(Arc::clone(region));
                }
            }
        }
        // Devices that still have a handle see the memory go, as with any other deletion.
        drop(self.table.publish(table.edited(&deleted, Vec::new())));
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
