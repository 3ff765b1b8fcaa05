// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What readers see: the four tables as one published value, and who looks on.

use std::sync::Arc;

use srcu::Published;

use crate::coalesced::Coalescing;
use crate::device::IoDevice;
use crate::ioeventfd_set::IoEventFdSet;
use crate::range::{BusKind, IoRange};
use crate::stats::{BusCounters, RangeCounters};
use crate::sync::Mutex;
use crate::table::{RowId, Table};
use crate::trace::Trace;

/// A row's content: the device, and while counting is on, its counters.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) device: Arc<dyn IoDevice>,
    pub(crate) counters: Option<Arc<RangeCounters>>,
}

/// Who is told of accesses. While nobody is, the tables hold none of these.
#[derive(Clone, Default)]
pub(crate) struct Observers {
    pub(crate) counters: Option<Arc<[BusCounters; BusKind::COUNT]>>,
    pub(crate) hook: Option<Arc<dyn Trace>>,
}

#[derive(Clone, Default)]
pub(crate) struct Tables {
    buses: [Table<Entry>; BusKind::COUNT],
    /// The next registration's name. It lives in the published value because writers are serialised
    /// there.
    next_id: u64,
    /// Looked at by an access that is searched for, and while there are any, each one is.
    observers: Option<Arc<Observers>>,
}

impl Tables {
    #[inline]
    pub(crate) fn bus(&self, kind: BusKind) -> &Table<Entry> {
        // Always in bounds; the compiler sees that too.
        &self.buses[kind.index()]
    }

    #[inline]
    pub(crate) fn observers(&self) -> Option<&Observers> {
        self.observers.as_deref()
    }

    /// The tables with one device more, and its name.
    pub(crate) fn with(
        &self,
        bus: BusKind,
        range: IoRange,
        device: Arc<dyn IoDevice>,
    ) -> (Self, RowId) {
        let id = RowId(self.next_id);
        let counting = self.observers().is_some_and(|o| o.counters.is_some());
        let counters = counting.then(Arc::default);
        let mut next = self.clone();
        next.next_id += 1;
        next.buses[bus.index()] = self.bus(bus).with(id, range, Entry { device, counters });
        (next, id)
    }

    /// The tables without a device, or `None` if it is not there.
    pub(crate) fn without(&self, bus: BusKind, id: RowId) -> Option<Self> {
        let mut next = self.clone();
        next.buses[bus.index()] = self.bus(bus).without(id)?;
        Some(next)
    }

    /// The tables with a device at another range, or `None` if it is not there.
    pub(crate) fn moved(&self, bus: BusKind, id: RowId, range: IoRange) -> Option<Self> {
        let mut next = self.clone();
        next.buses[bus.index()] = self.bus(bus).moved(id, range)?;
        Some(next)
    }

    /// The tables with fresh counters everywhere, or with none.
    pub(crate) fn counting(&self, on: bool) -> Self {
        let counters = on.then(Arc::default);
        let hook = self.observers().and_then(|o| o.hook.clone());
        self.observed(Observers { counters, hook }, |_| on.then(Arc::default))
    }

    /// The tables with another hook, or none.
    pub(crate) fn traced(&self, hook: Option<Arc<dyn Trace>>) -> Self {
        let counters = self.observers().and_then(|o| o.counters.clone());
        let observers = Observers { counters, hook };
        self.observed(observers, |entry| entry.counters.clone())
    }

    /// The tables under other observers. While there are any, every access is searched for: the
    /// cookie's way, which is short because it asks for nothing, would not tell them.
    fn observed(
        &self,
        observers: Observers,
        counters: impl Fn(&Entry) -> Option<Arc<RangeCounters>>,
    ) -> Self {
        let any = observers.counters.is_some() || observers.hook.is_some();
        let mut next = self.clone();
        for table in &mut next.buses {
            *table = table.map(any, |entry| Entry {
                device: Arc::clone(&entry.device),
                counters: counters(entry),
            });
        }
        next.observers = any.then(|| Arc::new(observers));
        next
    }
}

/// What a bus's handles and dispatchers share.
pub(crate) struct Shared {
    /// The ioeventfds of registrations that were kept: they stay as their devices do. First, since
    /// they go before the devices.
    pub(crate) kept: Mutex<Vec<IoEventFdSet>>,
    pub(crate) tables: Published<Tables>,
    /// How many ranges each bus takes.
    pub(crate) capacity: usize,
    /// KVM's ring of coalesced writes and the zones that feed it.
    pub(crate) coalescing: Coalescing,
}
