// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The book of a [point in time](super::PointInTime): what is protected, what was written, what has been copied. Plain
//! data; who uses it holds a lock and makes the kernel's protection agree.
//!
//! ```text
//!             protect            a write                 freeze
//!   Untracked ───────► Protected ───────► Open ──────────────────────► Protected
//!                         │  frozen: a write          taken │
//!                         ├──────────────────► Aside ──────►│
//!                         └────────────────────────────────►└─► Free
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What one unit of memory is: a page of the mapping's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// Nobody wants it.
    Untracked,
    /// A write to it is told. When frozen: its contents are still those of that moment.
    Protected,
    /// It was written since it was protected, before the moment.
    Open,
    /// A copy is kept: it was written behind the moment.
    Aside,
    /// Its contents have been taken.
    Free,
}

/// What is to be done about a write that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnWrite {
    /// Let it go on.
    Release,
    /// Copy the unit, tell the [book](CopyBook::set_aside), then let it go on.
    Copy,
    /// It waits until there is room for a copy.
    Wait,
}

/// Where a unit's contents of the moment are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Contents<'a> {
    /// In memory, which is protected.
    Memory,
    /// In this copy.
    Aside(&'a [u8]),
}

/// One mapping.
#[derive(Debug)]
struct Area {
    unit: u64,
    units: Vec<Unit>,
}

/// All mappings, by number.
#[derive(Debug)]
pub(super) struct CopyBook {
    areas: Vec<Area>,
    frozen: bool,
    /// The units that are [`Unit::Open`], by area and number: what the pause looks at, whatever the size of memory.
    open: BTreeSet<(usize, usize)>,
    aside: BTreeMap<(usize, usize), Box<[u8]>>,
    aside_bytes: u64,
    /// The most bytes of copies, unless there is none.
    room: u64,
}

impl CopyBook {
    /// Of mappings with these sizes and units, bytes, and room for so many bytes of copies.
    pub fn new(areas: impl IntoIterator<Item = (u64, u64)>, room: u64) -> Self {
        let area = |(size, unit): (u64, u64)| Area {
            unit,
            units: vec![Unit::Untracked; size.div_ceil(unit) as usize],
        };
        CopyBook {
            areas: areas.into_iter().map(area).collect(),
            frozen: false,
            open: BTreeSet::new(),
            aside: BTreeMap::new(),
            aside_bytes: 0,
            room,
        }
    }

    /// The size of a unit of this area; 0 of none.
    pub fn unit(&self, area: usize) -> u64 {
        self.areas.get(area).map_or(0, |area| area.unit)
    }

    fn get(&self, area: usize, unit: usize) -> Unit {
        let area = self.areas.get(area);
        let unit = area.and_then(|area| area.units.get(unit));
        unit.copied().unwrap_or(Unit::Untracked)
    }

    fn set(&mut self, area: usize, unit: usize, to: Unit) {
        let of = self.areas.get_mut(area);
        let Some(state) = of.and_then(|of| of.units.get_mut(unit)) else {
            return;
        };
        let before = std::mem::replace(state, to);
        match (before == Unit::Open, to == Unit::Open) {
            (false, true) => drop(self.open.insert((area, unit))),
            (true, false) => drop(self.open.remove(&(area, unit))),
            _ => {}
        }
    }

    /// These bytes are protected now.
    pub fn protected(&mut self, area: usize, range: Range<u64>) {
        for unit in self.units(area, &range) {
            self.set(area, unit, Unit::Protected);
        }
    }

    /// The numbers of the units that bytes lie in.
    pub fn units(&self, area: usize, range: &Range<u64>) -> Range<usize> {
        let Some(area) = self.areas.get(area).filter(|_| !range.is_empty()) else {
            return 0..0;
        };
        let end = range.end.div_ceil(area.unit) as usize;
        (range.start / area.unit) as usize..end.min(area.units.len())
    }

    /// The bytes to protect at the moment: what was written since it was protected, and of `wanted` what never was. As
    /// runs of whole units. Looks at those alone, and at what is `wanted`.
    pub fn to_freeze(&self, wanted: &[(usize, Range<u64>)]) -> Vec<(usize, Range<u64>)> {
        let mut runs: Vec<(usize, Range<u64>)> = Vec::new();
        let mut push = |number, unit: u64, at: usize| {
            let start = at as u64 * unit;
            match runs.last_mut() {
                Some((of, run)) if *of == number && run.end == start => run.end += unit,
                _ => runs.push((number, start..start + unit)),
            }
        };
        for (number, at) in &self.open {
            push(*number, self.unit(*number), *at);
        }
        for (number, range) in wanted {
            for at in self.units(*number, range) {
                if self.get(*number, at) == Unit::Untracked {
                    push(*number, self.unit(*number), at);
                }
            }
        }
        runs
    }

    /// From now on contents are kept.
    pub fn freeze(&mut self) {
        self.frozen = true;
    }

    /// Whether they are.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Somebody wants to write there.
    pub fn on_write(&mut self, area: usize, unit: usize) -> OnWrite {
        match (self.get(area, unit), self.frozen) {
            (Unit::Protected, false) => {
                self.set(area, unit, Unit::Open);
                OnWrite::Release
            }
            (Unit::Protected, true) => {
                let size = self.unit(area);
                match self.aside_bytes == 0 || self.aside_bytes + size <= self.room {
                    true => OnWrite::Copy,
                    false => OnWrite::Wait,
                }
            }
            (Unit::Untracked | Unit::Open | Unit::Aside | Unit::Free, _) => OnWrite::Release,
        }
    }

    /// Keeps the contents of a unit, which may be written then.
    pub fn set_aside(&mut self, area: usize, unit: usize, contents: Box<[u8]>) {
        self.aside_bytes += contents.len() as u64;
        self.set(area, unit, Unit::Aside);
        self.aside.insert((area, unit), contents);
    }

    /// Where the contents of the moment are; none where they are no more, or never were wanted.
    pub fn contents(&self, area: usize, unit: usize) -> Option<Contents<'_>> {
        match self.get(area, unit) {
            Unit::Protected if self.frozen => Some(Contents::Memory),
            Unit::Aside => {
                let aside = self.aside.get(&(area, unit))?;
                Some(Contents::Aside(aside))
            }
            _ => None,
        }
    }

    /// These units have been taken, or nobody wants them any more; whether there is more room for copies by that.
    pub fn free(&mut self, area: usize, units: Range<usize>) -> bool {
        let mut more = false;
        for unit in units {
            if let Some(aside) = self.aside.remove(&(area, unit)) {
                self.aside_bytes -= aside.len() as u64;
                more = true;
            }
            self.set(area, unit, Unit::Free);
        }
        more
    }

    /// Where a copy waits to be taken, if half of the room is taken up.
    pub fn urgent(&self) -> Option<(usize, u64)> {
        let (area, unit) = *self.aside.keys().next()?;
        let half = self.aside_bytes >= self.room / 2;
        half.then(|| (area, unit as u64 * self.unit(area)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    /// What the pause looks at is kept beside the units: it agrees with them whatever comes.
    #[test]
    fn what_is_protected_again_is_what_was_written_and_not_taken_back_since() {
        let mut book = CopyBook::new([(8 * PAGE, PAGE), (8 * PAGE, PAGE)], 0);
        let all = 0..8 * PAGE;
        book.protected(0, all.clone());
        book.protected(1, all.clone());
        for (area, unit) in [(1, 7), (0, 3), (0, 2), (0, 6), (0, 3)] {
            assert_eq!(book.on_write(area, unit), OnWrite::Release);
        }
        let written = |area, units: Range<u64>| (area, units.start * PAGE..units.end * PAGE);
        let all_written = [written(0, 2..4), written(0, 6..7), written(1, 7..8)];
        assert_eq!(book.to_freeze(&[]), all_written);
        // Laid again, and wanted no more.
        book.protected(0, 3 * PAGE..4 * PAGE);
        book.free(0, 6..7);
        let left = [written(0, 2..3), written(1, 7..8)];
        assert_eq!(book.to_freeze(&[(0, all)]), left);
    }
}
