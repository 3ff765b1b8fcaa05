// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Slot`]: the handle that owns a slot. Dropped, the slot goes.

use crate::classify::place;
use crate::inner::Owner;
use crate::{Error, SlotExtent, SlotFlags};
use srcu::Grace;
use std::fmt;
use std::sync::Arc;
use thiserror::Error;
use vm_memory::GuestAddress;

/// A slot of the VM, owned: dropping it deletes the slot. Its memory is unmapped when nobody reads it any more.
///
/// The drop waits as [`remove`](Self::remove) does: for KVM, and for a change that another thread is making. Dropped
/// in a call of a [`ChangeListener`](crate::ChangeListener), the slot goes when that change is over. It keeps the host side of its [`Memslots`](crate::Memslots) alive (and with it the VM's descriptor).
#[must_use = "dropping a slot deletes it; `keep` it if nobody is to own it"]
pub struct Slot {
    extent: SlotExtent,
    /// `None` in the moment between the slot's deletion or keeping and the drop of this handle.
    owner: Option<Arc<dyn Owner>>,
}

/// A slot that could not be deleted: here it is again, unchanged.
#[derive(Debug, Error)]
#[error("{} was not deleted: {reason}", place(slot.extent().id(), slot.extent().start(), slot.extent().size()))]
pub struct RemoveError {
    /// The slot.
    pub slot: Slot,
    /// Why.
    #[source]
    pub reason: Error,
}

impl Slot {
    pub(crate) fn new(extent: SlotExtent, owner: Arc<dyn Owner>) -> Self {
        let owner = Some(owner);
        Self { extent, owner }
    }

    /// Which slot, which guest pages, which host pages: for dirty logs and pagers. A clone that was taken before a
    /// [`relocate`](Self::relocate) says the old place.
    pub fn extent(&self) -> &SlotExtent {
        &self.extent
    }

    /// The slot's flags. Waits for a change that another thread is making.
    pub fn flags(&self) -> SlotFlags {
        self.owner
            .as_ref()
            .map_or(SlotFlags::NONE, |owner| owner.flags(&self.extent))
    }

    /// Deletes the slot. The guest does not see it any more when this returns (KVM has waited for its vCPUs); the
    /// [`Grace`] tells when no reader of this process does. Nobody needs to wait for it for memory's sake.
    ///
    /// # Errors
    /// [`RemoveError`], with the slot, if KVM refuses.
    pub fn remove(mut self) -> Result<Grace, Box<RemoveError>> {
        match self.owner().and_then(|owner| owner.delete(&self.extent)) {
            Ok(grace) => {
                self.owner = None;
                Ok(grace)
            }
            Err(reason) => Err(Box::new(RemoveError { slot: self, reason })),
        }
    }

    /// Moves the slot to another guest address (`KVM_MR_MOVE`): the same memory, the same id. A running vCPU can see
    /// the moment in which it is nowhere, and takes it for MMIO: stop those that use it.
    ///
    /// # Errors
    /// [`enum@Error`]; then nothing has changed.
    pub fn relocate(&mut self, start: GuestAddress) -> Result<Grace, Error> {
        let owner = Arc::clone(self.owner()?);
        owner.relocate(&mut self.extent, start)
    }

    /// Sets the slot's flags; of those, only [`SlotFlags::LOG_DIRTY_PAGES`] can change.
    ///
    /// # Errors
    /// [`enum@Error`]; then nothing has changed.
    pub fn set_flags(&mut self, flags: SlotFlags) -> Result<Grace, Error> {
        self.owner()?.set_flags(&self.extent, flags)
    }

    fn owner(&self) -> Result<&Arc<dyn Owner>, Error> {
        self.owner
            .as_ref()
            .ok_or(Error::Refused(crate::Refusal::NoSuchSlot {
                id: self.extent.id(),
            }))
    }

    /// Gives up the handle and leaves the slot to its [`Memslots`](crate::Memslots), for as long as that exists: it is a
    /// part of the [layout](crate::Memslots::layout) then. Waits for a change that another thread is making.
    pub fn keep(mut self) -> SlotExtent {
        if let Some(owner) = self.owner.take() {
            owner.keep(&self.extent);
        }
        self.extent.clone()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(owner) = self.owner.take() {
            owner.discard(&self.extent);
        }
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("extent", &self.extent)
            .finish_non_exhaustive()
    }
}
