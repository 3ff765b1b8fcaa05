// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The routing table as a value: what `struct kvm_irq_routing_table` is in the kernel.
//!
//! KVM's rule that a GSI goes to at most one pin of each chip, and that a route which is no pin stands alone, is
//! the shape of the data here, so no table of this type breaks it. Entries have one order, by GSI and then by
//! chip. Order matters in one place: when two GSIs share a pin, the pin belongs to the later one (its
//! acknowledgement goes there), which is so the one with the higher number, in KVM and in
//! [`Table::map_chip_pin`].

#![forbid(unsafe_code)]

use crate::gsi::Gsi;
use crate::route::{Chip, ChipPin, Entry, Route};
use crate::rules::{IOAPIC_PINS, PIC_PINS, RouteError, Rules};

/// Chips that a GSI can be wired to at the same time (`KVM_NR_IRQCHIPS` of x86, the architecture with most).
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

    fn len(self) -> usize {
        self.routes().count()
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
    /// (`kvm_setup_default_irq_routing`): GSIs 0 to 15 go to the IOAPIC and to a PIC, 16 to 23 to the IOAPIC.
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
        rules.check(&entry)?;
        let Entry { gsi, route } = entry;
        if self.entries >= rules.limit as usize {
            let limit = rules.limit;
            return Err(RouteError::TableFull { gsi, limit });
        }
        let conflict = RouteError::Conflict { gsi, route };
        let next = match (self.target(gsi), route) {
            (Target::Nothing, Route::Pin(pin)) => with_pin([None; CHIPS], pin),
            (Target::Pins(pins), Route::Pin(pin)) => with_pin(pins, pin),
            (Target::Nothing, alone) => Some(Target::Alone(alone)),
            _ => None,
        };
        self.put(gsi, next.ok_or(conflict)?);
        Ok(())
    }

    /// Gives a GSI these routes in place of those that it has. An error changes nothing.
    pub fn replace(&mut self, rules: &Rules, gsi: Gsi, routes: &[Route]) -> Result<(), RouteError> {
        let old = self.target(gsi);
        self.clear(gsi);
        for &route in routes {
            if let Err(error) = self.insert(rules, Entry { gsi, route }) {
                self.put(gsi, old);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes every route of a GSI away.
    pub fn clear(&mut self, gsi: Gsi) {
        self.put(gsi, Target::Nothing);
    }

    /// Gives a GSI the routes that it has in another table.
    pub fn copy_from(&mut self, other: &Table, gsi: Gsi) {
        self.put(gsi, other.target(gsi));
    }

    /// Where a GSI goes (`kvm_irq_map_gsi`): nowhere, to pins of different chips, or to one other place.
    pub fn map_gsi(&self, gsi: Gsi) -> impl Iterator<Item = Route> {
        self.target(gsi).routes()
    }

    /// Which GSI a pin belongs to (`kvm_irq_map_chip_pin`): of several, the highest. Looks at every GSI.
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
        self.target(gsi) == other.target(gsi)
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

    fn put(&mut self, gsi: Gsi, target: Target) {
        let index = gsi.0 as usize;
        self.entries = self.entries - self.target(gsi).len() + target.len();
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

/// The pins of a GSI and one more, unless its chip has one already or is none that a table can hold.
fn with_pin(mut pins: [Option<u32>; CHIPS], new: ChipPin) -> Option<Target> {
    let place = pins.get_mut(new.chip.0 as usize)?;
    match place {
        Some(_) => None,
        None => {
            *place = Some(new.pin);
            Some(Target::Pins(pins))
        }
    }
}
