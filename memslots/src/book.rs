// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What [`Memslots`](crate::Memslots) knows under its lock: what KVM has, whose memory each slot is, and what of both
//! readers do not see. Plain data; KVM is asked elsewhere (`change.rs`).

use crate::guest_memfd::Binding;
use crate::{
    Backing, Change, Error, Layout, LayoutSlot, Left, MemoryRegion, NewSlot, Region, SlotChange,
    SlotFlags, SlotId, SlotMap, SlotShape,
};
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// One slot's memory, and what is known of it.
pub(crate) struct Entry<B> {
    /// The slot as it is, or, if KVM does not have it, was.
    pub(crate) region: Arc<Region<B>>,
    /// By which it is known again.
    pub(crate) backing: Backing,
    /// Keeps the file open.
    pub(crate) guest_memfd: Option<Binding>,
    pub(crate) name: Option<Arc<str>>,
    /// A [`Slot`](crate::Slot) has it, so layouts leave it alone.
    pub(crate) owned: bool,
    pub(crate) place: Place,
}

/// Who has a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// KVM, and readers see it.
    Both,
    /// KVM alone: it was made, and could not be deleted when something else failed.
    KvmOnly,
    /// Nobody but us: it was deleted, and could not be made again when something else failed.
    HereOnly,
}

/// What a change makes of one slot's entry.
pub(crate) enum Edit<B> {
    /// A new one.
    New(Entry<B>),
    /// The same memory as another region, or in KVM again.
    Now(Arc<Region<B>>, Option<Arc<str>>),
    /// Another name, and nothing else.
    Named(SlotId, Option<Arc<str>>),
    /// None.
    Gone(SlotId),
}

impl<B> Edit<B> {
    /// The id of one that is new.
    pub(crate) fn new_id(&self) -> Option<SlotId> {
        match self {
            Self::New(entry) => Some(entry.region.extent().id()),
            _ => None,
        }
    }
}

/// A change, ready to be made: KVM's calls, which are legal in this order, and what is so when all have succeeded.
pub(crate) struct Transaction<B> {
    pub(crate) calls: Vec<(Change, MemoryRegion)>,
    pub(crate) edits: Vec<Edit<B>>,
}

pub(crate) struct Book<B> {
    /// What KVM has.
    pub(crate) slots: SlotMap,
    entries: BTreeMap<SlotId, Entry<B>>,
    /// Counts the changes, those that readers do not see included.
    epoch: u64,
}

impl<B> Book<B> {
    pub(crate) const fn new(slots: SlotMap) -> Self {
        Self {
            slots,
            entries: BTreeMap::new(),
            epoch: 0,
        }
    }

    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn get(&self, id: SlotId) -> Option<&Entry<B>> {
        self.entries.get(&id)
    }

    /// What KVM has, and so must be deleted before its memory goes.
    pub(crate) fn in_kvm(&self) -> impl Iterator<Item = &Entry<B>> {
        let entries = self.entries.values();
        entries.filter(|entry| entry.place != Place::HereOnly)
    }

    /// Nobody owns the slot any more.
    pub(crate) fn keep(&mut self, id: SlotId) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.owned = false;
            self.epoch += 1;
        }
    }

    /// The slots that layouts are about, by guest address.
    pub(crate) fn layout(&self) -> Layout {
        let ours = |entry: &&Entry<B>| !entry.owned && entry.place == Place::Both;
        let mut entries: Vec<_> = self.entries.values().filter(ours).collect();
        entries.sort_by_key(|entry| entry.region.extent().start().0);
        let slot = |entry: &Entry<B>| LayoutSlot {
            slot: NewSlot {
                start: entry.region.extent().start(),
                backing: entry.backing.clone(),
                flags: entry.region.flags().with(SlotFlags::GUEST_MEMFD, false),
            },
            name: entry.name.clone(),
            guest_memfd: entry.guest_memfd.clone(),
        };
        entries.into_iter().map(slot).collect()
    }

    /// Checks that no two of these slots, nor one of them and one that a [`Slot`](crate::Slot) has, or, if `all`, any,
    /// have one name.
    pub(crate) fn check_names(&self, new: &[LayoutSlot], all: bool) -> Result<(), Error> {
        if new.iter().all(|slot| slot.name.is_none()) {
            return Ok(());
        }
        let taken = self.entries.values().filter(|entry| all || entry.owned);
        let mut names: HashSet<_> = taken.filter_map(|entry| entry.name.as_deref()).collect();
        match new
            .iter()
            .find_map(|slot| slot.name.as_ref().filter(|name| !names.insert(name)))
        {
            Some(name) => Err(Error::NameTwice {
                name: Arc::clone(name),
            }),
            None => Ok(()),
        }
    }

    /// The slots that layouts are about, by id.
    pub(crate) fn governed(&self) -> Vec<(SlotId, &Entry<B>)> {
        let ours = self.entries.iter().filter(|(_, entry)| !entry.owned);
        ours.map(|(id, entry)| (*id, entry)).collect()
    }

    /// What listeners are told of `edits`, before they are made.
    pub(crate) fn changes(&self, edits: &[Edit<B>]) -> Vec<SlotChange<B>> {
        let seen = |id: SlotId| {
            let entry = self.entries.get(&id);
            entry.filter(|entry| entry.place == Place::Both)
        };
        let change = |edit: &Edit<B>| match edit {
            Edit::New(entry) => Some(SlotChange::Added(Arc::clone(&entry.region))),
            Edit::Now(to, _) => {
                let from = seen(to.extent().id()).map(|entry| Arc::clone(&entry.region));
                Some(difference(from, Arc::clone(to)))
            }
            Edit::Named(..) => None,
            Edit::Gone(id) => seen(*id).map(|entry| SlotChange::Removed(Arc::clone(&entry.region))),
        };
        edits.iter().filter_map(change).collect()
    }

    /// What `edits` change for readers, and the book after them. What leaves the book is in `gone` then.
    pub(crate) fn commit(&mut self, edits: Vec<Edit<B>>, gone: &mut Vec<Entry<B>>) -> Shown<B> {
        let mut shown = Shown {
            gone: Vec::new(),
            added: Vec::new(),
        };
        self.epoch += 1;
        for edit in edits {
            match edit {
                Edit::New(entry) => {
                    shown.added.push(Arc::clone(&entry.region));
                    self.entries.insert(entry.region.extent().id(), entry);
                }
                Edit::Now(region, name) => {
                    let id = region.extent().id();
                    if let Some(entry) = self.entries.get_mut(&id) {
                        if entry.place == Place::Both {
                            shown.gone.push(id);
                        }
                        shown.added.push(Arc::clone(&region));
                        (entry.region, entry.name, entry.place) = (region, name, Place::Both);
                    }
                }
                Edit::Named(id, name) => {
                    if let Some(entry) = self.entries.get_mut(&id) {
                        entry.name = name;
                    }
                }
                Edit::Gone(id) => {
                    if let Some(entry) = self.entries.remove(&id) {
                        if entry.place == Place::Both {
                            shown.gone.push(id);
                        }
                        gone.push(entry);
                    }
                }
            }
        }
        shown
    }

    /// After a change that failed and could not be taken back whole: makes the book say what KVM has. `edits` is what
    /// the change was to be; what of it has come to nothing is in `gone` then.
    pub(crate) fn reconcile(
        &mut self,
        edits: Vec<Edit<B>>,
        gone: &mut Vec<Entry<B>>,
    ) -> Reconciled<B>
    where
        B: crate::SlotBitmap,
    {
        let (mut left, mut changes) = (Vec::new(), Vec::new());
        let mut shown = Shown {
            gone: Vec::new(),
            added: Vec::new(),
        };
        self.epoch += 1;
        for edit in edits {
            let id = match &edit {
                Edit::New(entry) => entry.region.extent().id(),
                Edit::Now(region, _) => region.extent().id(),
                Edit::Named(id, _) | Edit::Gone(id) => *id,
            };
            let in_kvm = self.slots.get(id).copied();
            match (edit, in_kvm) {
                (Edit::New(mut entry), Some(_)) => {
                    (entry.place, entry.owned) = (Place::KvmOnly, false);
                    left.push((id, Left::Stays, entry.region.extent().guest_range()));
                    self.entries.insert(id, entry);
                }
                (Edit::New(entry), None) => gone.push(entry),
                (_, in_kvm) => {
                    let Some(entry) = self.entries.get_mut(&id) else {
                        continue;
                    };
                    let was = (entry.place == Place::Both).then(|| Arc::clone(&entry.region));
                    match in_kvm {
                        None if entry.place != Place::HereOnly => {
                            entry.place = Place::HereOnly;
                            left.push((id, Left::Missing, entry.region.extent().guest_range()));
                            if let Some(was) = was {
                                shown.gone.push(id);
                                changes.push(SlotChange::Removed(was));
                            }
                        }
                        Some(now)
                            if now != shape(&entry.region, entry)
                                || entry.place == Place::HereOnly =>
                        {
                            // The same memory, so the same size: the place is one that a slot had or was to have.
                            let Ok(extent) = entry.region.extent().moved_to(now.start) else {
                                continue;
                            };
                            let region = Arc::new(entry.region.changed(extent, now.flags));
                            entry.region = Arc::clone(&region);
                            left.push((id, Left::Changed, region.extent().guest_range()));
                            if entry.place != Place::KvmOnly {
                                entry.place = Place::Both;
                                if was.is_some() {
                                    shown.gone.push(id);
                                }
                                shown.added.push(Arc::clone(&region));
                                changes.push(difference(was, region));
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
        Reconciled {
            left,
            changes,
            shown,
        }
    }
}

/// What a change has left that failed and could not be taken back.
pub(crate) struct Reconciled<B> {
    /// The slots that are not as before.
    pub(crate) left: Vec<(SlotId, Left, Range<u64>)>,
    /// What listeners are told of it.
    pub(crate) changes: Vec<SlotChange<B>>,
    pub(crate) shown: Shown<B>,
}

/// What readers see differently: the ids that go, and the regions that come. A slot that changes does both.
pub(crate) struct Shown<B> {
    pub(crate) gone: Vec<SlotId>,
    pub(crate) added: Vec<Arc<Region<B>>>,
}

impl<B> Shown<B> {
    pub(crate) fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.added.is_empty()
    }
}

fn difference<B>(from: Option<Arc<Region<B>>>, to: Arc<Region<B>>) -> SlotChange<B> {
    match from {
        None => SlotChange::Added(to),
        Some(from) if from.extent().start() == to.extent().start() => {
            SlotChange::Flags { from, to }
        }
        Some(from) => SlotChange::Moved { from, to },
    }
}

/// The slot as `region` and its entry have it.
pub(crate) fn shape<B>(region: &Region<B>, entry: &Entry<B>) -> SlotShape {
    let extent = region.extent();
    SlotShape {
        start: extent.start(),
        size: extent.size(),
        host: extent.host_start(),
        flags: region.flags(),
        guest_memfd: entry.guest_memfd.as_ref().map(Binding::range),
    }
}

/// The request that makes the slot as `region` has it.
pub(crate) fn request<B>(region: &Region<B>, guest_memfd: Option<&Binding>) -> MemoryRegion {
    let extent = region.extent();
    MemoryRegion {
        id: extent.id(),
        flags: region.flags(),
        start: extent.start(),
        size: extent.size(),
        host: extent.host_start(),
        guest_memfd: guest_memfd.map(Binding::range),
    }
}

/// The request that deletes a slot. The older call does it for slots of either kind.
pub(crate) fn deletion(id: SlotId, shape: &SlotShape) -> MemoryRegion {
    MemoryRegion {
        size: 0,
        flags: SlotFlags::NONE,
        guest_memfd: None,
        ..shape.request(id)
    }
}
