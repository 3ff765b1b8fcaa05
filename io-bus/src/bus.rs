// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The writers' side: [`IoBus`], where devices are registered and everything else about the buses is
//! set. [`Registration`] is how they go again.
//!
//! All four tables are one published value. A change builds the next table of one bus, publishes
//! it, and then waits until no access is left that began before, so that "unregistered" means "no
//! vCPU is in the device".

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use srcu::Published;
use vm_device::bus::{MmioRange, PioRange};
use vm_device::{DeviceMmio, DevicePio};

use crate::Error;
use crate::coalesced::{Coalescing, RingMemory};
use crate::device::{IoDevice, Mmio, Pio};
use crate::dispatcher::Dispatcher;
use crate::range::{BusKind, IoRange};
use crate::registration::Registration;
use crate::removal::{Pending, Removal};
use crate::stats::{BusStats, RangeStats};
use crate::sync::Mutex;
use crate::tables::{Shared, Tables};
use crate::trace::Trace;
use crate::zone::{CoalescedZone, SetCoalescedZone};

/// How many ranges a bus takes unless [`IoBus::with_capacity`] says otherwise: KVM's own number.
///
/// As there, ioeventfds do not count.
pub const NR_IOBUS_DEVS: usize = 1000;

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
                coalescing: Coalescing::default(),
                kept: Mutex::new(Vec::new()),
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
            Ok(tables.with(bus, range, Arc::clone(&device)))
        })?;
        // Who entered before does not see the device yet, and need not.
        drop(grace);
        let shared = Arc::downgrade(&self.shared);
        Ok(Registration::new(shared, bus, range, id))
    }

    /// The ranges of one bus in the order in which they are searched. For a monitor or a log.
    pub fn ranges(&self, bus: BusKind) -> Vec<IoRange> {
        let tables = self.shared.tables.load();
        let rows = tables.bus(bus).rows();
        rows.iter().map(|row| row.range()).collect()
    }

    /// Gives the buses KVM's ring of coalesced writes: a [`MappedRing`](crate::MappedRing), or a
    /// test's memory. Once, before the first [zone](Self::coalesce); it stays as long as the buses.
    ///
    /// From then on each vCPU's thread calls [`Dispatcher::before_exit`] after each return of
    /// `KVM_RUN`.
    ///
    /// # Errors
    ///
    /// [`Error::RingAttached`] if there is one, [`Error::RingTooSmall`] for memory that has no room
    /// for two entries.
    pub fn attach_coalesced_ring(&self, memory: impl RingMemory + 'static) -> Result<(), Error> {
        self.shared.coalescing.attach(Box::new(memory))
    }

    /// Has KVM keep the writes to `range` until the next exit, for as long as the handle lives
    /// (`KVM_REGISTER_COALESCED_MMIO`).
    ///
    /// For addresses where a write has no effect that the guest could wait for: a serial port's data,
    /// a frame buffer. Reads of the range leave the guest as before, and so does a write that finds
    /// the ring full; either comes to the device after the writes that were kept.
    ///
    /// A zone is KVM's, and no device needs to be at it; it does not move with one. Blocks in KVM
    /// for a grace period.
    ///
    /// # Errors
    ///
    /// [`Error::NoRing`] without a ring, for the writes would be lost; [`Error::NotCoalescible`] for
    /// other buses than MMIO and PIO, an exact address, or more than 4 GiB;
    /// [`Error::CannotCoalesce`] on a host whose KVM lacks it; [`Error::ZoneOverlap`];
    /// [`Error::RegisterZone`] with KVM's errno. Nothing is changed then.
    pub fn coalesce<S: SetCoalescedZone>(
        &self,
        host: S,
        bus: BusKind,
        range: IoRange,
    ) -> Result<CoalescedZone<S>, Error> {
        CoalescedZone::register(&self.shared, host, bus, range)
    }

    /// The zones there are, in the order in which they were made.
    pub fn coalesced_zones(&self) -> Vec<(BusKind, IoRange)> {
        self.shared.coalescing.zones()
    }

    /// How many coalesced writes have been carried out. Counted always: it costs nothing beside a
    /// drain.
    pub fn coalesced_writes(&self) -> u64 {
        self.shared.coalescing.drained()
    }

    /// Turns counting on, from zero, or off. On already, it starts at zero again.
    ///
    /// Publishes a table, as a registration does, and waits for nobody: an access that began before
    /// is counted, or not, by the table that it found.
    pub fn count(&self, on: bool) {
        let updated = self
            .shared
            .tables
            .update(|tables| Ok::<_, Infallible>((tables.counting(on), ())));
        match updated {
            Ok(((), grace)) => drop(grace),
            Err(never) => match never {},
        }
    }

    /// What has been counted, or `None` while [counting](Self::count) is off. Takes no lock that an
    /// access takes.
    pub fn stats(&self) -> Option<BusStats> {
        let tables = self.shared.tables.load();
        let buses = tables.observers()?.counters.as_ref()?;
        let mut ranges: Vec<RangeStats> = Vec::new();
        for bus in BusKind::ALL {
            for row in tables.bus(bus).rows() {
                if let Some(counters) = &row.device().counters {
                    ranges.push(counters.stats(bus, row.range()));
                }
            }
        }
        let unclaimed = BusKind::ALL.map(|bus| buses[bus.index()].stats(bus));
        Some(BusStats { ranges, unclaimed })
    }

    /// Installs a trace hook in place of the one that there was, or takes it away with `None`.
    ///
    /// Accesses that begin after the call see the new one. Waits, or answers [`Removal::Pending`],
    /// exactly as [`Registration::unregister`] does: after [`Removal::Done`] no access is inside
    /// the old one.
    pub fn trace(&self, hook: Option<Arc<dyn Trace>>) -> Removal {
        let updated = self
            .shared
            .tables
            .update(|tables| Ok::<_, Infallible>((tables.traced(hook), ())));
        let grace = match updated {
            Ok(((), grace)) => grace,
            Err(never) => match never {},
        };
        Pending { grace: Some(grace) }.wait()
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
