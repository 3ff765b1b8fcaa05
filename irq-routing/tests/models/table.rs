// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A routing table as a list.

use irq_routing::{ChipPin, Entry, Gsi, Route};

/// The kernel's rules, told as the kernel tells them: a list, looked through from the start.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub entries: Vec<Entry>,
    pub limit: u32,
    /// Whether the chips are the kernel's.
    pub pins: bool,
}

impl Model {
    pub fn new(limit: u32) -> Self {
        Self {
            entries: Vec::new(),
            limit,
            pins: true,
        }
    }

    pub fn insert(&mut self, new: Entry) -> bool {
        let possible = match new.route {
            Route::Pin(at) => {
                self.pins
                    && match at.chip.0 {
                        0 | 1 => at.pin < 8,
                        2 => at.pin < 24,
                        _ => false,
                    }
            }
            Route::Msi(_) | Route::HvSint(_) => true,
            _ => false,
        };
        let excluded = self
            .entries
            .iter()
            .filter(|old| old.gsi == new.gsi)
            .any(|old| match (old.route, new.route) {
                (Route::Pin(old), Route::Pin(new)) => old.chip == new.chip,
                _ => true,
            });
        let taken = possible
            && !excluded
            && new.gsi.0 < self.limit
            && self.entries.len() < self.limit as usize;
        if taken {
            self.entries.push(new);
            // By GSI, and of one GSI by chip, whatever the order of arrival.
            self.entries.sort();
        }
        taken
    }

    pub fn clear(&mut self, gsi: Gsi) {
        self.entries.retain(|entry| entry.gsi != gsi);
    }

    pub fn replace(&mut self, gsi: Gsi, routes: &[Route]) -> bool {
        let mut next = self.clone();
        next.clear(gsi);
        // All conflicts first: a table that is too full is so for the whole, not for one entry.
        let done = routes
            .iter()
            .all(|&route| next.insert(Entry { gsi, route }));
        if done {
            *self = next;
        }
        done
    }

    pub fn owner(&self, pin: ChipPin) -> Option<Gsi> {
        let route = Route::Pin(pin);
        self.entries
            .iter()
            .rfind(|entry| entry.route == route)
            .map(|entry| entry.gsi)
    }
}
