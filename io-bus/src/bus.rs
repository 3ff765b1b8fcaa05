// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The writers' side: [`IoBus`], where devices are registered, and [`Registration`], which is how
//! they go again.
//!
//! All four tables are one published value. A change builds the next table of one bus, publishes
//! it, and then waits until no access is left that began before, so that "unregistered" means "no
//! vCPU is in the device".

use std::fmt;
use std::sync::{Arc, Weak};

use srcu::{Grace, Published};
use vm_device::bus::{MmioRange, PioRange};
use vm_device::{DeviceMmio, DevicePio};

use crate::Error;
use crate::device::{IoDevice, Mmio, Pio};
use crate::dispatcher::Dispatcher;
use crate::inside::is_inside_access;
use crate::range::{BusKind, IoRange};
use crate::table::{RowId, Table};

/// How many ranges a bus takes unless [`IoBus::with_capacity`] says otherwise: KVM's own number.
///
/// As there, ioeventfds do not count.
pub const NR_IOBUS_DEVS: usize = 1000;

/// What readers see: the four tables.
#[derive(Clone, Default)]
pub(crate) struct Tables {
    buses: [Table<Arc<dyn IoDevice>>; BusKind::COUNT],
    /// The next registration's name. It lives in the published value because writers are serialised
    /// there.
    next_id: u64,
}

impl Tables {
    #[inline]
    pub(crate) fn bus(&self, kind: BusKind) -> &Table<Arc<dyn IoDevice>> {
        // Always in bounds; the compiler sees that too.
        &self.buses[kind.index()]
    }
}

pub(crate) struct Shared {
    pub(crate) tables: Published<Tables>,
    capacity: usize,
}

/// The four I/O buses of one virtual machine: the side that registers (`struct kvm_io_bus`).
///
/// A clone is another handle to the same buses. Every method may be called from any thread while
/// vCPUs run; none makes a vCPU's access wait.
///
/// A device must not own an `IoBus` that it is registered on: neither would ever be dropped. It may
/// own its [`Registration`]s.
#[derive(Clone)]
pub struct IoBus {
    shared: Arc<Shared>,
}

impl Default for IoBus {
    fn default() -> Self {
        Self::new()
    }
}

impl IoBus {
    /// Four empty buses, for [`NR_IOBUS_DEVS`] ranges each.
    pub fn new() -> Self {
        Self::with_capacity(NR_IOBUS_DEVS)
    }

    /// Four empty buses, for at most `ranges` ranges each. Nothing is allocated for them in
    /// advance. More than `u32::MAX` is as good as that.
    pub fn with_capacity(ranges: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                tables: Published::new(Tables::default()),
                // Rows are numbered by u32.
                capacity: ranges.min(u32::MAX as usize),
            }),
        }
    }

    /// How many ranges each bus takes.
    pub fn capacity(&self) -> usize {
        self.shared.capacity
    }

    /// A vCPU thread's side. Make one a thread; it keeps the buses alive.
    ///
    /// Takes a short lock and allocates, so it belongs into a thread's start and not into an exit.
    pub fn dispatcher(&self) -> Dispatcher {
        Dispatcher::new(Arc::clone(&self.shared))
    }

    /// Registers an MMIO device that answers every access in `range`.
    ///
    /// `device` is anything with `vm_device::DeviceMmio`: a device, an `Arc` of one, an
    /// `Arc<dyn DeviceMmio + Send + Sync>`, a [`Locked`](crate::Locked) `MutDeviceMmio`.
    ///
    /// # Errors
    ///
    /// [`Error::BusFull`]. Overlapping ranges are legal; see the crate's documentation for who
    /// answers then.
    pub fn register_mmio<D>(&self, range: MmioRange, device: D) -> Result<Registration, Error>
    where
        D: DeviceMmio + Send + Sync + 'static,
    {
        self.register(BusKind::Mmio, range.into(), Mmio(device))
    }

    /// Registers a port device that answers every access in `range`.
    ///
    /// # Errors
    ///
    /// As [`register_mmio`](Self::register_mmio).
    pub fn register_pio<D>(&self, range: PioRange, device: D) -> Result<Registration, Error>
    where
        D: DevicePio + Send + Sync + 'static,
    {
        self.register(BusKind::Pio, range.into(), Pio(device))
    }

    /// Registers a device that may decline accesses, on any of the buses
    /// (`kvm_io_bus_register_dev`).
    ///
    /// Accesses that begin after this returns see the device. Blocks only for other writers, and
    /// may be called from inside an access. (A device that was removed earlier may be dropped here;
    /// if it owns registrations, their drop waits as always.)
    ///
    /// # Errors
    ///
    /// [`Error::BusFull`], and [`Error::OutsideBus`] for ports beyond 0xffff. Nothing has changed
    /// then, but `device` is dropped: pass an `Arc` to keep it.
    pub fn register<D>(
        &self,
        bus: BusKind,
        range: IoRange,
        device: D,
    ) -> Result<Registration, Error>
    where
        D: IoDevice + 'static,
    {
        if range.last() > bus.last_address() {
            return Err(Error::OutsideBus { bus, range });
        }
        let capacity = self.shared.capacity;
        let device: Arc<dyn IoDevice> = Arc::new(device);
        let (id, grace) = self.shared.tables.update(|tables| {
            if tables.bus(bus).len() >= capacity {
                return Err(Error::BusFull { bus, capacity });
            }
            let id = RowId(tables.next_id);
            let mut next = tables.clone();
            next.next_id += 1;
            next.buses[bus.index()] = tables.bus(bus).with(id, range, Arc::clone(&device));
            Ok((next, id))
        })?;
        // Who entered before does not see the device yet, and need not.
        drop(grace);
        Ok(Registration {
            shared: Arc::downgrade(&self.shared),
            bus,
            range,
            id: Some(id),
        })
    }

    /// The ranges of one bus in the order in which they are searched. For a monitor or a log.
    pub fn ranges(&self, bus: BusKind) -> Vec<IoRange> {
        let tables = self.shared.tables.load();
        let rows = tables.bus(bus).rows();
        rows.iter().map(|row| *row.range()).collect()
    }
}

impl fmt::Debug for IoBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("IoBus");
        for kind in BusKind::ALL {
            out.field(&kind.to_string(), &self.ranges(kind));
        }
        out.field("capacity", &self.shared.capacity).finish()
    }
}

/// One device at one range, for as long as this lives.
///
/// Dropping it unregisters the device, and waits as [`unregister`](Self::unregister) does. It does
/// not keep the bus alive, so a device may own the registrations that lead to it.
#[must_use = "dropping a registration unregisters the device; `keep` it if it is to stay"]
pub struct Registration {
    shared: Weak<Shared>,
    bus: BusKind,
    range: IoRange,
    /// None once it has been unregistered or given up.
    id: Option<RowId>,
}

impl Registration {
    /// The bus that the device is on.
    pub fn bus(&self) -> BusKind {
        self.bus
    }

    /// Where the device is now.
    pub fn range(&self) -> IoRange {
        self.range
    }

    /// Takes the device off its bus (`kvm_io_bus_unregister_dev`).
    ///
    /// No access that begins after the call sees the device. Outside an access this blocks until
    /// those that had begun have ended, and answers [`Removal::Done`]. Inside one (on this thread,
    /// of any bus: [`is_inside_access`]) it does not block and answers [`Removal::Pending`]; the
    /// device is dropped when the last of those accesses ends.
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
    /// Waits, or answers [`Removal::Pending`], exactly as [`unregister`](Self::unregister) does:
    /// after [`Removal::Done`] no access is inside the device that came by the old range.
    /// The device keeps its age among those that share its range.
    ///
    /// # Errors
    ///
    /// [`Error::WrappingRange`] or [`Error::OutsideBus`] if the range does not fit there, and
    /// [`Error::NotRegistered`] if the bus is gone. The device is then where it was.
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
        let ((), grace) = shared.tables.update(|tables| {
            let mut next = tables.clone();
            next.buses[bus.index()] = tables.bus(bus).moved(id, range).ok_or(gone)?;
            Ok::<_, Error>((next, ()))
        })?;
        self.range = range;
        Ok(Pending { grace: Some(grace) }.wait())
    }

    /// Leaves the device on its bus for as long as the bus lives. There is no way back.
    pub fn keep(mut self) {
        self.id = None;
    }

    fn take_off(&mut self) -> Pending {
        let bus = self.bus;
        let removed = self.id.take().and_then(|id| {
            // A bus that is gone has dropped its devices.
            let shared = self.shared.upgrade()?;
            let update = shared.tables.update(|tables| {
                let mut next = tables.clone();
                next.buses[bus.index()] = tables.bus(bus).without(id).ok_or(())?;
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
            .finish()
    }
}

/// Whether a device that was taken off its range can still be in an access that began before.
#[derive(Debug)]
#[must_use = "while a removal is pending, an access may still be inside the device"]
pub enum Removal {
    /// No access is inside the device any more, and none will be.
    Done,
    /// The caller is itself inside an access, so nobody waited. No further access will see the
    /// device; the bus drops it when those that had begun have ended.
    Pending(Pending),
}

impl Removal {
    /// Whether no access can be inside the device any more.
    pub fn is_done(&self) -> bool {
        match self {
            Removal::Done => true,
            Removal::Pending(pending) => pending.is_over(),
        }
    }
}

/// The accesses that had begun when a device was taken off its range.
///
/// Dropping this is fine: the bus lets go of the device in any case.
#[must_use = "an access may still be inside the device"]
pub struct Pending {
    /// None if there was nothing to wait for.
    grace: Option<Grace>,
}

impl Pending {
    /// Whether all of them have ended. Never blocks.
    pub fn is_over(&self) -> bool {
        self.grace.as_ref().is_none_or(Grace::is_over)
    }

    /// Blocks until all of them have ended; inside an access it does not block, and answers
    /// [`Removal::Pending`] unless they have.
    pub fn wait(self) -> Removal {
        if self.is_over() {
            return Removal::Done;
        }
        if is_inside_access() {
            return Removal::Pending(self);
        }
        if let Some(grace) = self.grace {
            grace.wait();
        }
        Removal::Done
    }

    /// Has `f` run when all of them have ended: here and now if they have, otherwise on the thread
    /// that finds it out first, which may be a vCPU's as it leaves its access. So keep it short;
    /// it must not wait for an access.
    pub fn then(self, f: impl FnOnce() + Send + 'static) {
        match self.grace {
            Some(grace) => grace.defer(f),
            None => f(),
        }
    }
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("is_over", &self.is_over())
            .finish()
    }
}
