// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The routing table as a value: what `struct kvm_irq_routing_table` is in the kernel.
//!
//! KVM's rule that a GSI goes to at most one pin of each chip, and that a route which is no pin
//! stands alone, is the shape of the data here, so no table of this type breaks it. Entries have
//! one order, by GSI and then by chip. Order matters in one place: when two GSIs share a pin, the
//! pin belongs to the later one (its acknowledgement goes there), which is so the one with the
//! higher number, in KVM and in [`Table::map_chip_pin`].

#![forbid(unsafe_code)]

use crate::gsi::Gsi;
use crate::route::{Chip, ChipPin, Entry, Route};
use crate::rules::{IOAPIC_PINS, PIC_PINS, RouteError, Rules};

/// Chips that a GSI can be wired to at the same time (`KVM_NR_IRQCHIPS` of x86, the architecture
/// with most).
const CHIPS: usize = 3;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Target {
    #[default]
    Nothing,
    /// By chip number, the pin.
    Pins([Option<u32>; CHIPS]),
    /// Never a pin.
    Alone(Route),
}

impl Target {
    fn routes(self) -> impl Iterator<Item = Route> {
        let (pins, alone) = match self {
            Target::Nothing => ([None; CHIPS], None),
            Target::Pins(pins) => (pins, None),
            Target::Alone(route) => ([None; CHIPS], Some(route)),
        };
        let pins = (0..).map(Chip).zip(pins);
        pins.filter_map(|(chip, pin)| Some(Route::Pin(ChipPin { chip, pin: pin? })))
            .chain(alone)
    }

    /// Each route, in the order of `routes`: for tables of thousands, where an iterator of one or three
    /// kinds of things costs more than the things.
    #[cfg(feature = "kvm")]
    #[inline]
    fn for_each(&self, mut with: impl FnMut(Route)) {
        match self {
            Target::Nothing => {}
            Target::Alone(route) => with(*route),
            Target::Pins(pins) => {
                for (chip, pin) in (0..).map(Chip).zip(*pins) {
                    if let Some(pin) = pin {
                        with(Route::Pin(ChipPin { chip, pin }));
                    }
                }
            }
        }
    }

    #[inline]
    fn len(&self) -> usize {
        match self {
            Target::Nothing => 0,
            Target::Pins(pins) => pins.iter().flatten().count(),
            Target::Alone(_) => 1,
        }
    }

    /// With one route more; none when what is here excludes it.
    fn with(self, route: Route) -> Option<Self> {
        match (self, route) {
            (Target::Nothing, Route::Pin(_)) => Target::Pins([None; CHIPS]).with(route),
            (Target::Pins(mut pins), Route::Pin(new)) => {
                let place = pins.get_mut(new.chip.0 as usize)?;
                if place.is_some() {
                    return None;
                }
                *place = Some(new.pin);
                Some(Target::Pins(pins))
            }
            (Target::Nothing, alone) => Some(Target::Alone(alone)),
            _ => None,
        }
    }
}

/// A routing table: every GSI and where it goes.
#[derive(Clone, Debug, Default)]
pub struct Table {
    // Indexed by GSI. Dense: a copy is one memcpy, and GSIs are handed out from the bottom.
    targets: Vec<Target>,
    entries: usize,
}

impl Table {
    /// The table with no entry: what KVM starts a VM with, and what a split irqchip keeps.
    pub fn new() -> Self {
        Self::default()
    }

    /// The table that KVM installs when it creates the in-kernel irqchip of an x86 VM
    /// (`kvm_setup_default_irq_routing`): GSIs 0 to 15 go to the IOAPIC and to a PIC, 16 to 23 to
    /// the IOAPIC.
    pub fn x86_default() -> Self {
        let mut table = Self::new();
        for gsi in 0..IOAPIC_PINS {
            let pic = |chip: u32| (gsi / PIC_PINS == chip).then_some(gsi % PIC_PINS);
            // By chip number: the two PICs, then the IOAPIC.
            table.put(Gsi(gsi), Target::Pins([pic(0), pic(1), Some(gsi)]));
        }
        table
    }

    /// A table of these entries, each judged as KVM judges it.
    pub fn from_entries(
        rules: &Rules,
        entries: impl IntoIterator<Item = Entry>,
    ) -> Result<Self, RouteError> {
        let mut table = Self::new();
        for entry in entries {
            table.insert(rules, entry)?;
        }
        Ok(table)
    }

    /// Adds one entry (`setup_routing_entry`). An error changes nothing.
    pub fn insert(&mut self, rules: &Rules, entry: Entry) -> Result<(), RouteError> {
        let Entry { gsi, route } = entry;
        let next = added(rules, gsi, self.target(gsi), route)?;
        self.put_within(rules, gsi, next)
    }

    /// Gives a GSI these routes in place of those that it has. An error changes nothing.
    #[inline]
    pub fn replace(&mut self, rules: &Rules, gsi: Gsi, routes: &[Route]) -> Result<(), RouteError> {
        // The usual one by itself: a message, of which a device may have thousands.
        if let [route @ Route::Msi(_)] = routes {
            rules.check_route(gsi, route)?;
            return self.put_within(rules, gsi, Target::Alone(*route));
        }
        let mut next = Target::Nothing;
        for &route in routes {
            next = added(rules, gsi, next, route)?;
        }
        self.put_within(rules, gsi, next)
    }

    /// Takes every route of a GSI away.
    pub fn clear(&mut self, gsi: Gsi) {
        self.put(gsi, Target::Nothing);
    }

    /// Gives a GSI the routes that it has in another table.
    pub fn copy_from(&mut self, other: &Table, gsi: Gsi) {
        self.put(gsi, other.target(gsi));
    }

    /// The same, unless the table would have more entries than the host takes.
    pub(crate) fn copy_within(
        &mut self,
        rules: &Rules,
        other: &Table,
        gsi: Gsi,
    ) -> Result<(), RouteError> {
        self.put_within(rules, gsi, other.target(gsi))
    }

    /// Where a GSI goes (`kvm_irq_map_gsi`): nowhere, to pins of different chips, or to one other
    /// place.
    pub fn map_gsi(&self, gsi: Gsi) -> impl Iterator<Item = Route> {
        self.target(gsi).routes()
    }

    /// Which GSI a pin belongs to (`kvm_irq_map_chip_pin`): of several, the highest. Looks at every
    /// GSI.
    pub fn map_chip_pin(&self, pin: ChipPin) -> Option<Gsi> {
        let index = self
            .targets
            .iter()
            .rposition(|target| target.routes().any(|route| route == Route::Pin(pin)))?;
        Some(Gsi(index as u32))
    }

    /// Every entry, in the order in which KVM gets them.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        self.targets()
            .flat_map(|(gsi, target)| target.routes().map(move |route| Entry { gsi, route }))
    }

    /// Calls `with` for every entry, in the same order.
    #[cfg(feature = "kvm")]
    pub(crate) fn for_each(&self, mut with: impl FnMut(Entry)) {
        for (gsi, target) in (0..).map(Gsi).zip(&self.targets) {
            target.for_each(|route| with(Entry { gsi, route }));
        }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The GSIs that go elsewhere in the other table, in ascending order.
    pub fn differences(&self, other: &Table) -> impl Iterator<Item = Gsi> {
        let gsis = self.targets.len().max(other.targets.len()) as u32;
        (0..gsis)
            .map(Gsi)
            .filter(|&gsi| !self.agrees_on(other, gsi))
    }

    /// Whether a GSI goes to the same places in both tables.
    pub fn agrees_on(&self, other: &Table, gsi: Gsi) -> bool {
        match (
            self.targets.get(gsi.0 as usize),
            other.targets.get(gsi.0 as usize),
        ) {
            (Some(here), Some(there)) => here == there,
            (Some(one), None) | (None, Some(one)) => *one == Target::Nothing,
            (None, None) => true,
        }
    }

    /// Whether a GSI is wired to a pin.
    pub(crate) fn has_pins(&self, gsi: Gsi) -> bool {
        matches!(self.target(gsi), Target::Pins(_))
    }

    fn targets(&self) -> impl Iterator<Item = (Gsi, Target)> {
        (0..).map(Gsi).zip(self.targets.iter().copied())
    }

    fn target(&self, gsi: Gsi) -> Target {
        self.targets
            .get(gsi.0 as usize)
            .copied()
            .unwrap_or_default()
    }

    /// Puts a target there, unless the table would have more entries than the host takes.
    #[inline]
    fn put_within(&mut self, rules: &Rules, gsi: Gsi, target: Target) -> Result<(), RouteError> {
        let limit = rules.limit;
        let entries = self.entries - self.len_at(gsi) + target.len();
        if entries > limit as usize {
            return Err(RouteError::TableFull { gsi, limit });
        }
        match self.targets.get_mut(gsi.0 as usize) {
            Some(at) => {
                *at = target;
                self.entries = entries;
            }
            None => self.put(gsi, target),
        }
        Ok(())
    }

    #[inline]
    fn len_at(&self, gsi: Gsi) -> usize {
        self.targets.get(gsi.0 as usize).map_or(0, Target::len)
    }

    #[inline]
    fn put(&mut self, gsi: Gsi, target: Target) {
        let index = gsi.0 as usize;
        self.entries = self.entries - self.len_at(gsi) + target.len();
        match self.targets.get_mut(index) {
            Some(at) => *at = target,
            None if target == Target::Nothing => {}
            None => {
                self.targets.resize(index + 1, Target::Nothing);
                self.targets[index] = target;
            }
        }
    }
}

/// Tables are equal when they route alike, however large they once were.
impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        self.entries == other.entries && self.differences(other).next().is_none()
    }
}

impl Eq for Table {}

/// What a GSI's target becomes with one route more.
fn added(rules: &Rules, gsi: Gsi, to: Target, route: Route) -> Result<Target, RouteError> {
    rules.check(&Entry { gsi, route })?;
    to.with(route).ok_or(RouteError::Conflict { gsi, route })
}
