// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one owner of a VM's routing table.
//!
//! There are two tables. The *wanted* one is what the VMM said; the *committed* one is what KVM
//! has. They come apart on purpose, because making them equal costs a grace period in the kernel: a
//! GSI that was dropped keeps its old message in KVM (nothing can raise it any more), and a change
//! may be deferred. They are made equal by [`Change::commit`], and by whatever attaches to a GSI on
//! which they differ, so that nothing is ever raised along a stale route.
//!
//! ```text
//!   GsiHandle ──┐ route / unroute          commit: one KVM_SET_GSI_ROUTING,
//!   GsiHandle ──┼────────────► wanted ───────────► committed   none when no one
//!   (dropped) ──┘ back to the                      = KVM's     could see a difference
//!                 irqchip's default
//! ```

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::gsi::{Gsi, GsiPool};
use crate::host::SetGsiRouting;
use crate::irqchip::{Irqchip, IrqchipKind};
use crate::route::{ChipPin, Msi, Route};
use crate::rules::{IOAPIC_PINS, Rules};
use crate::table::Table;
use crate::wait::Wait;

/// The owner of a VM's routing table (`kvm->irq_routing`). Clones are the same table.
///
/// `H` is the VM: `Arc<VmFd>`, `&VmFd`, or a fake.
#[derive(Clone, Debug)]
pub struct Routing<H> {
    host: H,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    rules: Rules,
    /// Held across `KVM_SET_GSI_ROUTING`: commits have one order, the kernel's.
    /// Order: `writer` before `committed`.
    writer: Mutex<Writer>,
    /// Held for the copy of a pointer alone, so that looking at the table never waits for the
    /// kernel.
    committed: Mutex<Arc<Table>>,
}

#[derive(Debug)]
struct Writer {
    pool: GsiPool,
    wanted: Arc<Table>,
    /// What a GSI goes back to when its owner drops it: what KVM installed when it made the irqchip,
    /// and the pins' messages where the irqchip is split and has an IOAPIC.
    default: Table,
    /// How many irqfds are attached to each pin of a split irqchip: to those, a change of the pin's
    /// route is visible at once.
    attached: Vec<u32>,
}

/// Whether a commit asked anything of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Committed {
    /// No one could have seen a difference: no ioctl.
    Unchanged,
    /// One `KVM_SET_GSI_ROUTING`.
    Written {
        /// Entries in the table that KVM has now.
        entries: usize,
    },
}

impl<H: SetGsiRouting> Routing<H> {
    /// Takes charge of the table of a VM whose irqchip was just made. Asks the host for its limits
    /// (three `KVM_CHECK_EXTENSION`) and commits nothing: the table of a fresh irqchip is known.
    pub fn new(host: H, irqchip: &Irqchip) -> Self {
        let rules = host.rules(irqchip.kind());
        Self::with_rules(host, rules)
    }

    /// The same with rules that the caller knows better (a VM with `KVM_CAP_X2APIC_API` enabled).
    pub fn with_rules(host: H, rules: Rules) -> Self {
        let default = match rules.irqchip {
            IrqchipKind::Kernel { .. } => Table::x86_default(),
            IrqchipKind::None | IrqchipKind::Split { .. } => Table::new(),
        };
        let pins = match rules.irqchip {
            IrqchipKind::Split { pins } => pins.min(rules.limit),
            IrqchipKind::None | IrqchipKind::Kernel { .. } => 0,
        };
        let wanted = Arc::new(default.clone());
        let shared = Shared {
            rules,
            committed: Mutex::new(Arc::clone(&wanted)),
            writer: Mutex::new(Writer {
                pool: GsiPool::new(rules.limit),
                wanted,
                default,
                attached: vec![0; pins as usize],
            }),
        };
        Self {
            host,
            shared: Arc::new(shared),
        }
    }

    /// Begins a change. Nothing happens before [`Change::commit`] or [`Change::defer`]; dropped, it
    /// never was.
    pub fn change(&self) -> Change<'_, H> {
        Change {
            routing: self,
            edits: Vec::new(),
        }
    }

    /// Sends a GSI to one place and commits: a [`Change`] of one step.
    ///
    /// # Errors
    ///
    /// As [`Change::commit`].
    pub fn route(&self, gsi: &GsiHandle, route: impl Into<Route>) -> Result<Committed, Error> {
        let mut change = self.change();
        change.route(gsi, route);
        change.commit()
    }

    /// Commits what was deferred or is left of dropped GSIs, if anyone could see it.
    ///
    /// # Errors
    ///
    /// As [`Change::commit`].
    pub fn flush(&self) -> Result<Committed, Error> {
        let writer = self.shared.writer();
        self.write(&writer.pool, &writer.wanted)
    }

    /// Makes sure that KVM's route for this GSI is the wanted one, before something raises it.
    pub(crate) fn settle(&self, gsi: &GsiHandle) -> Result<(), Error> {
        self.raisable(gsi)?;
        self.settle_in(&self.shared.writer(), gsi.gsi())
    }

    /// The same for an irqfd that is about to be attached. Until [`Routing::detached`], changes of a
    /// split irqchip's pin are committed at once.
    pub(crate) fn attaching(&self, gsi: &GsiHandle) -> Result<(), Error> {
        self.raisable(gsi)?;
        let mut writer = self.shared.writer();
        self.settle_in(&writer, gsi.gsi())?;
        // Still under the lock: a pin that is masked from now on knows of the irqfd.
        if let Some(count) = writer.attached.get_mut(gsi.gsi().0 as usize) {
            *count += 1;
        }
        Ok(())
    }

    /// Routes a pin of the split irqchip's IOAPIC and makes sure that KVM has it, before its message
    /// is sent: KVM reports the EOIs of what it finds in the table.
    pub(crate) fn settle_pin(&self, pin: Gsi, route: Msi) -> Result<(), Error> {
        let mut writer = self.shared.writer();
        self.set_pin(&mut writer, pin, Some(route))?;
        self.settle_in(&writer, pin)
    }

    /// Routes a pin of the split irqchip's IOAPIC, or not, and leaves the commit to whoever needs
    /// it, unless an irqfd is attached to the pin.
    pub(crate) fn route_pin(&self, pin: Gsi, route: Option<Msi>) -> Result<(), Error> {
        let mut writer = self.shared.writer();
        self.set_pin(&mut writer, pin, route)?;
        let attached = writer.attached.get(pin.0 as usize);
        if attached.is_some_and(|&irqfds| irqfds > 0) {
            self.settle_in(&writer, pin)?;
        }
        Ok(())
    }

    /// The committed table, if KVM's route for this GSI is the wanted one. Never waits.
    pub(crate) fn try_settled(&self, gsi: Gsi) -> Result<Arc<Table>, Error> {
        let writer = Wait::Never.lock(&self.shared.writer)?;
        let committed = Wait::Never.lock(&self.shared.committed)?;
        if writer.wanted.agrees_on(&committed, gsi) {
            Ok(Arc::clone(&committed))
        } else {
            Err(Error::WouldBlock)
        }
    }

    fn set_pin(&self, writer: &mut Writer, pin: Gsi, route: Option<Msi>) -> Result<(), Error> {
        let route = route.map(Route::Msi);
        if writer.wanted.map_gsi(pin).eq(route) && writer.default.map_gsi(pin).eq(route) {
            return Ok(());
        }
        let wanted = Arc::make_mut(&mut writer.wanted);
        wanted.replace(&self.shared.rules, pin, route.as_slice())?;
        writer.default.copy_from(wanted, pin);
        Ok(())
    }

    /// The writer's lock is held.
    fn settle_in(&self, writer: &Writer, gsi: Gsi) -> Result<(), Error> {
        if !writer.wanted.agrees_on(&self.table(), gsi) {
            // Deferred changes of other GSIs go with it: one grace period for all of them.
            self.write(&writer.pool, &writer.wanted)?;
        }
        Ok(())
    }

    pub(crate) fn raisable(&self, gsi: &GsiHandle) -> Result<(), Error> {
        self.own(gsi)?;
        match self.irqchip() {
            IrqchipKind::None => Err(Error::NoIrqchip),
            IrqchipKind::Kernel { .. } | IrqchipKind::Split { .. } => Ok(()),
        }
    }

    /// Gives the kernel a table, if anyone could see that it did. Called with the writer's lock
    /// held.
    fn write(&self, pool: &GsiPool, next: &Arc<Table>) -> Result<Committed, Error> {
        let committed = self.table();
        if Arc::ptr_eq(&committed, next) {
            return Ok(Committed::Unchanged);
        }
        // A message of a GSI that no one has cannot be raised: not worth a grace period. A pin can
        // (a timer in the kernel raises GSI 0 by itself), and it decides whom an acknowledgement
        // reaches.
        let visible = |gsi| pool.is_taken(gsi) || committed.has_pins(gsi) || next.has_pins(gsi);
        if !committed.differences(next).any(visible) {
            return Ok(Committed::Unchanged);
        }
        let entries = next.len();
        self.host
            .set_gsi_routing(next)
            .map_err(|source| Error::SetRouting { entries, source })?;
        *self.shared.committed() = Arc::clone(next);
        Ok(Committed::Written { entries })
    }

    pub(crate) fn own(&self, gsi: &GsiHandle) -> Result<(), Error> {
        if Arc::ptr_eq(&self.shared, &gsi.lease.shared) {
            Ok(())
        } else {
            Err(Error::ForeignGsi(gsi.gsi()))
        }
    }
}

impl<H> Routing<H> {
    /// The lowest free GSI that is no pin of an IOAPIC: for a message.
    ///
    /// # Errors
    ///
    /// [`Error::NoFreeGsi`].
    pub fn allocate(&self) -> Result<GsiHandle, Error> {
        let first = match self.irqchip() {
            IrqchipKind::None => 0,
            IrqchipKind::Kernel { .. } => IOAPIC_PINS,
            IrqchipKind::Split { pins } => pins,
        };
        self.allocate_in(first..self.shared.rules.limit)
    }

    /// The lowest free GSI of a range: for a device that takes any of some pins.
    ///
    /// # Errors
    ///
    /// [`Error::NoFreeGsi`].
    pub fn allocate_in(&self, range: Range<u32>) -> Result<GsiHandle, Error> {
        let end = range.end.min(self.shared.rules.limit);
        let start = range.start;
        let taken = self.shared.writer().pool.take_lowest(start..end);
        let gsi = taken.ok_or(Error::NoFreeGsi { start, end })?;
        Ok(self.lease(gsi))
    }

    /// A GSI by its number: the pin that a PC's device has by tradition. Its route is the irqchip's
    /// default one, in KVM already, or what a [`SplitIoapic`](crate::ioapic::SplitIoapic) makes of
    /// the pin; this asks nothing of the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::GsiTaken`]; [`Error::Route`] when the number is not below the host's limit.
    pub fn reserve(&self, gsi: Gsi) -> Result<GsiHandle, Error> {
        self.shared.rules.check_gsi(gsi)?;
        if self.shared.writer().pool.take(gsi) {
            Ok(self.lease(gsi))
        } else {
            Err(Error::GsiTaken(gsi))
        }
    }

    /// The table that KVM has: for [`Table::map_gsi`] and [`Table::map_chip_pin`]. Never waits for
    /// a commit.
    pub fn table(&self) -> Arc<Table> {
        Arc::clone(&self.shared.committed())
    }

    /// What the host accepts.
    pub fn rules(&self) -> &Rules {
        &self.shared.rules
    }

    /// The VM's interrupt controllers.
    pub fn irqchip(&self) -> IrqchipKind {
        self.shared.rules.irqchip
    }

    /// The VM.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// An irqfd that was attached is no more.
    pub(crate) fn detached(&self, gsi: &GsiHandle) {
        let mut writer = self.shared.writer();
        if let Some(count) = writer.attached.get_mut(gsi.gsi().0 as usize) {
            *count -= 1;
        }
    }

    fn lease(&self, gsi: Gsi) -> GsiHandle {
        let shared = Arc::clone(&self.shared);
        GsiHandle {
            lease: Arc::new(Lease { gsi, shared }),
        }
    }
}

impl Shared {
    // Neither lock guards anything that a panic could leave half done: each change is one
    // assignment.
    fn writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn committed(&self) -> MutexGuard<'_, Arc<Table>> {
        self.committed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A GSI that is someone's. Clones share it (several devices on one level-triggered pin do); so do
/// the irqfds and lines made from it. When the last is dropped the number is free again and its
/// route the irqchip's default (or none, where others have filled the table meanwhile); that asks
/// nothing of the kernel, but may wait for a commit that is under way.
#[derive(Clone, Debug)]
pub struct GsiHandle {
    lease: Arc<Lease>,
}

impl GsiHandle {
    /// The number.
    pub fn gsi(&self) -> Gsi {
        self.lease.gsi
    }
}

#[derive(Debug)]
struct Lease {
    gsi: Gsi,
    shared: Arc<Shared>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut writer = self.shared.writer();
        let Writer {
            pool,
            wanted,
            default,
            ..
        } = &mut *writer;
        pool.free(self.gsi);
        if !wanted.agrees_on(default, self.gsi) {
            let wanted = Arc::make_mut(wanted);
            let rules = &self.shared.rules;
            if wanted.copy_within(rules, default, self.gsi).is_err() {
                // Others took the room of its default routes, and a table that is too full could
                // never be committed.
                wanted.clear(self.gsi);
            }
        }
    }
}

/// Changes to the table, gathered: all of them happen, or none.
///
/// Holds no lock: other threads may commit meanwhile, and the steps apply to what the table is by
/// then. A step touches its own GSI alone, so those of different devices do not disturb one
/// another.
#[derive(Debug)]
#[must_use = "nothing happens before commit or defer"]
pub struct Change<'a, H> {
    routing: &'a Routing<H>,
    edits: Vec<(&'a GsiHandle, Edit)>,
}

#[derive(Clone, Copy, Debug)]
enum Edit {
    Route(Route),
    AddPin(ChipPin),
    Unroute,
    Reset,
}

impl<'a, H> Change<'a, H> {
    /// Sends the GSI there and nowhere else.
    pub fn route(&mut self, gsi: &'a GsiHandle, route: impl Into<Route>) {
        self.push(gsi, Edit::Route(route.into()));
    }

    /// Wires the GSI to one more pin, on a chip on which it has none.
    pub fn add_pin(&mut self, gsi: &'a GsiHandle, pin: ChipPin) {
        self.push(gsi, Edit::AddPin(pin));
    }

    /// Sends the GSI nowhere.
    pub fn unroute(&mut self, gsi: &'a GsiHandle) {
        self.push(gsi, Edit::Unroute);
    }

    /// Gives the GSI back the route that the irqchip's default table has for it, or its IOAPIC in
    /// user space.
    pub fn reset(&mut self, gsi: &'a GsiHandle) {
        self.push(gsi, Edit::Reset);
    }

    #[inline]
    fn push(&mut self, gsi: &'a GsiHandle, edit: Edit) {
        if self.edits.len() == self.edits.capacity() {
            // A device has one vector or thousands: fewer copies than doubling makes.
            self.edits.reserve(3 * self.edits.len() + 16);
        }
        self.edits.push((gsi, edit));
    }
}

impl<H: SetGsiRouting> Change<'_, H> {
    /// Makes the change: one `KVM_SET_GSI_ROUTING`, or none when no one could see a difference.
    ///
    /// Blocks for a grace period in the kernel, and for another thread's commit. Interrupts that
    /// irqfds raise meanwhile go along the old route or the new one. What was deferred before goes
    /// with it.
    ///
    /// # Errors
    ///
    /// [`Error::Route`] for the first step that KVM would refuse, [`Error::ForeignGsi`], and
    /// [`Error::SetRouting`]. The table, both the wanted one and KVM's, is then what it was.
    pub fn commit(self) -> Result<Committed, Error> {
        self.apply(|routing, pool, next| routing.write(pool, next))
    }

    /// Makes the change later: with the next commit, or when something attaches to one of its GSIs.
    /// For routes that no one can raise yet, such as those of masked MSI-X vectors: many of them
    /// then cost one ioctl.
    ///
    /// # Errors
    ///
    /// [`Error::Route`] and [`Error::ForeignGsi`], as [`Change::commit`].
    pub fn defer(self) -> Result<(), Error> {
        self.apply(|_, _, _| Ok(()))
    }

    fn apply<T>(
        self,
        then: impl FnOnce(&Routing<H>, &GsiPool, &Arc<Table>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Self { routing, edits } = self;
        let mut writer = routing.shared.writer();
        let mut next = Arc::clone(&writer.wanted);
        if !edits.is_empty() {
            let table = Arc::make_mut(&mut next);
            for (handle, edit) in &edits {
                routing.own(handle)?;
                edit.apply(&routing.shared.rules, &writer.default, table, handle.gsi())?;
            }
        }
        let done = then(routing, &writer.pool, &next)?;
        writer.wanted = next;
        Ok(done)
    }
}

impl Edit {
    #[inline]
    fn apply(
        &self,
        rules: &Rules,
        default: &Table,
        table: &mut Table,
        gsi: Gsi,
    ) -> Result<(), Error> {
        match *self {
            Edit::Route(route) => table.replace(rules, gsi, &[route])?,
            Edit::AddPin(pin) => {
                let route = Route::Pin(pin);
                table.insert(rules, crate::route::Entry { gsi, route })?;
            }
            Edit::Unroute => table.clear(gsi),
            Edit::Reset => table.copy_within(rules, default, gsi)?,
        }
        Ok(())
    }
}
