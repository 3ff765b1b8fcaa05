// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One device at one range, as a handle: how it moves, what it carries, and how it goes.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Weak;

use crate::Error;
use crate::ioeventfd::{IoEvent, SetIoEventFd, WriteMatch};
use crate::ioeventfd_set::{IoEventFdSet, IoEventId};
use crate::range::{BusKind, IoRange};
use crate::removal::{Pending, Removal};
use crate::sync::lock;
use crate::table::RowId;
use crate::tables::Shared;

/// One device at one range, for as long as this lives.
///
/// Dropping it unregisters the device, and waits as [`unregister`](Self::unregister) does. It does
/// not keep the bus alive, so a device may own the registrations that lead to it.
///
/// The ioeventfds of the device's doorbells can be [attached](Self::attach_ioeventfd) to it; then
/// they move and go with the device.
#[must_use = "dropping a registration unregisters the device; `keep` it if it is to stay"]
pub struct Registration {
    shared: Weak<Shared>,
    bus: BusKind,
    range: IoRange,
    /// None once it has been unregistered or given up.
    id: Option<RowId>,
    ioeventfds: IoEventFdSet,
}

impl Registration {
    pub(crate) fn new(shared: Weak<Shared>, bus: BusKind, range: IoRange, id: RowId) -> Self {
        Self {
            shared,
            bus,
            range,
            id: Some(id),
            ioeventfds: IoEventFdSet::default(),
        }
    }

    /// The bus that the device is on.
    pub fn bus(&self) -> BusKind {
        self.bus
    }

    /// Where the device is now.
    pub fn range(&self) -> IoRange {
        self.range
    }

    /// Has KVM signal `fd` for the writes that `writes` names at `offset` bytes into the range.
    ///
    /// It is [detached](Self::detach_ioeventfd) before the device leaves its bus, and
    /// [moves](Self::relocate) with it. `host` and `fd` are as for
    /// [`IoEventFd::attach`](crate::IoEventFd::attach). On the fast MMIO bus the address is MMIO's.
    ///
    /// # Errors
    ///
    /// [`Error::OutsideRange`] if the write would not be this range's, [`Error::NotRegistered`] if
    /// the bus is gone, [`Error::AssignIoEventFd`] with KVM's errno; nothing is attached then.
    pub fn attach_ioeventfd<S, E>(
        &mut self,
        host: S,
        offset: u64,
        writes: WriteMatch,
        fd: E,
    ) -> Result<IoEventId, Error>
    where
        S: SetIoEventFd + Send + Sync + 'static,
        E: AsRawFd + Send + Sync + 'static,
    {
        let (bus, range) = (self.bus, self.range);
        if self.id.is_none() || self.shared.strong_count() == 0 {
            return Err(Error::NotRegistered { bus, range });
        }
        self.ioeventfds.attach(bus, range, host, offset, writes, fd)
    }

    /// Detaches one ioeventfd: on return KVM signals it no more, and it is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchIoEvent`] for one that this registration does not have (any more), and
    /// [`Error::DeassignIoEventFd`], after which it is attached as before.
    pub fn detach_ioeventfd(&mut self, id: IoEventId) -> Result<(), Error> {
        self.ioeventfds.detach(id)
    }

    /// The ioeventfds that are attached, and where.
    pub fn ioeventfds(&self) -> impl Iterator<Item = (IoEventId, IoEvent)> {
        self.ioeventfds.events()
    }

    /// Takes the device off its bus (`kvm_io_bus_unregister_dev`).
    ///
    /// No access that begins after the call sees the device. Outside an access this blocks until
    /// those that had begun have ended, and answers [`Removal::Done`]. Inside one (on this thread,
    /// of any bus: [`is_inside_access`](crate::is_inside_access)) it does not block and answers [`Removal::Pending`]; the
    /// device is dropped when the last of those accesses ends. Its ioeventfds are detached first,
    /// so that none is signalled for a device that is gone; what KVM does not detach is logged.
    ///
    /// An answer that the device has [deferred](crate::Answer::Deferred) is not waited for: it is
    /// with whoever has its completion.
    ///
    /// # Deadlock
    ///
    /// Do not hold a lock here that the device takes in an access, nor have an access wait for
    /// another thread that calls this. [`unregister_later`](Self::unregister_later) never blocks.
    pub fn unregister(self) -> Removal {
        self.unregister_later().wait()
    }

    /// As [`unregister`](Self::unregister), but never blocks for an access to this device. (One that
    /// is dropped here and owns registrations of its own waits in their drop.)
    pub fn unregister_later(mut self) -> Pending {
        self.take_off()
    }

    /// Moves the device to `base` on the same bus, in one step: an access that begins at any time
    /// finds it either at the old range or at the new one.
    ///
    /// Its ioeventfds move with it, and no write is lost or seen twice: they are attached at the
    /// new address, the range moves, and they are detached at the old one. While that goes on both
    /// addresses signal. Where the new place of one is the old place of another, a write there may
    /// come to the device itself.
    ///
    /// Waits, or answers [`Removal::Pending`], exactly as [`unregister`](Self::unregister) does:
    /// after [`Removal::Done`] no access is inside the device that came by the old range.
    /// The device keeps its age among those that share its range, and its counters.
    ///
    /// # Errors
    ///
    /// [`Error::WrappingRange`] or [`Error::OutsideBus`] if the range does not fit there,
    /// [`Error::NotRegistered`] if the bus is gone, [`Error::AssignIoEventFd`] or
    /// [`Error::DeassignIoEventFd`] if KVM refused a step. The device is then where it was, and so
    /// is each ioeventfd.
    ///
    /// If KVM refuses to undo a step too, that is logged, and an ioeventfd signals at the new
    /// address as well, or not at all ([`ioeventfds`](Self::ioeventfds) lists it no more then). The
    /// next move puts that right before it begins, and fails with KVM's errno if it cannot. What
    /// signals where it should not is also detached with its ioeventfd, or with the device.
    pub fn relocate(&mut self, base: u64) -> Result<Removal, Error> {
        let (bus, old) = (self.bus, self.range);
        let range = old.at(base)?;
        if range.last() > bus.last_address() {
            return Err(Error::OutsideBus { bus, range });
        }
        let gone = Error::NotRegistered { bus, range: old };
        let (Some(shared), Some(id)) = (self.shared.upgrade(), self.id) else {
            return Err(gone);
        };
        let publish = |to: IoRange| {
            let moved = shared.tables.update(|tables| {
                let next = tables.moved(bus, id, to).ok_or_else(|| gone.clone())?;
                Ok::<_, Error>((next, ()))
            });
            moved.map(|((), grace)| grace)
        };
        let unpublish = || {
            // It was there a moment ago, and only this handle takes it away.
            if let Err(error) = publish(old) {
                log::error!("{error}, after a move that had failed");
            }
        };
        let grace = self
            .ioeventfds
            .relocate(bus, base, || publish(range), unpublish)?;
        self.range = range;
        Ok(Pending { grace: Some(grace) }.wait())
    }

    /// Leaves the device on its bus, and its ioeventfds attached, for as long as the bus lives.
    /// There is no way back.
    pub fn keep(mut self) {
        self.id = None;
        let ioeventfds = std::mem::take(&mut self.ioeventfds);
        if let Some(shared) = self.shared.upgrade()
            && !ioeventfds.is_empty()
        {
            lock(&shared.kept).push(ioeventfds);
        }
    }

    fn take_off(&mut self) -> Pending {
        let bus = self.bus;
        self.ioeventfds.clear();
        let removed = self.id.take().and_then(|id| {
            // A bus that is gone has dropped its devices.
            let shared = self.shared.upgrade()?;
            let update = shared.tables.update(|tables| {
                let next = tables.without(bus, id).ok_or(())?;
                Ok::<_, ()>((next, ()))
            });
            update.ok()
        });
        Pending {
            grace: removed.map(|((), grace)| grace),
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        match self.take_off().wait() {
            // Pending needs no one: the device goes when the accesses end.
            Removal::Done | Removal::Pending(_) => {}
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("bus", &self.bus)
            .field("range", &self.range)
            .field("registered", &self.id.is_some())
            .field("ioeventfds", &self.ioeventfds)
            .finish()
    }
}
