// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The oracle of tracking: a copy of all of guest memory from one pause to the next.

use std::collections::BTreeSet;

use reference_vmm::vm::Running;
use reference_vmm::vm::tracking::{Harvested, TrackUser};
use vm_memory::{Bytes, GuestAddress};

const PAGE: u64 = 4096;

/// A paused machine's memory: each page's address and bytes.
pub struct Copy(Vec<(u64, Vec<u8>)>);

impl Copy {
    /// Of now.
    pub fn of(running: &Running) -> Self {
        let table = running.memory();
        let pages = table.regions().flat_map(|region| {
            let range = region.extent().guest_range();
            (range.start..range.end).step_by(PAGE as usize)
        });
        let page = |address| {
            let mut bytes = vec![0; PAGE as usize];
            let read = table.read_slice(&mut bytes, GuestAddress(address));
            read.unwrap();
            (address, bytes)
        };
        Copy(pages.map(page).collect())
    }

    /// The pages that have changed since `before`.
    pub fn changed(&self, before: &Copy) -> BTreeSet<u64> {
        let pairs = self.0.iter().zip(&before.0);
        let changed = pairs.filter(|(now, before)| now != before);
        changed.map(|(now, _)| now.0).collect()
    }
}

/// The addresses of what was harvested.
pub fn addresses(harvested: &Harvested<'_>) -> BTreeSet<u64> {
    let slots = harvested.slots().iter();
    let pages = slots.flat_map(|slot| {
        let start = slot.extent.guest_range().start;
        let pages = slot.pages.runs().flat_map(|run| run.first..run.end());
        pages.map(move |page| start + page * PAGE)
    });
    pages.collect()
}

/// Pauses it, and takes what was written since `before`, which becomes what is there now: how many pages that were. Fails
/// if a page has changed and was not among them.
pub fn round(running: &Running, user: TrackUser, before: &mut Copy) -> usize {
    running.pause().unwrap();
    let harvested = running.harvest(user).unwrap();
    let now = Copy::of(running);
    let (changed, told) = (now.changed(before), addresses(&harvested));
    let missing: Vec<_> = changed.difference(&told).collect();
    assert!(missing.is_empty(), "{missing:x?} of {changed:x?}");
    harvested.commit();
    *before = now;
    running.resume().unwrap();
    told.len()
}
