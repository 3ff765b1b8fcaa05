// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a layout and the book to a [`Plan`]: which memory is the same, which calls lead from the one to the other
//! (`plan.rs`), and whether KVM would accept each of them when its turn comes.

use crate::book::{Book, Entry, Place, deletion, shape};
use crate::guest_memfd::Binding;
use crate::ids::{IdClaim, Ids};
use crate::plan::{Op, Plan, Present, Step, Wanted, calls};
use crate::{Change, Error, Hva, Layout, LayoutSlot, MemoryRegion, Refusal, SlotId};
use std::collections::HashMap;
use std::sync::Arc;

impl<B> Book<B> {
    /// How to get from what there is to `layout`, whose slots are each possible by themselves and do not overlap. Also
    /// an id for each slot that is new, in the layout's order. The plan's own layout is the caller's to set.
    ///
    /// The book is as before when this returns.
    pub(crate) fn plan(
        &mut self,
        layout: &Layout,
        ids: &Arc<Ids>,
    ) -> Result<(Plan, Vec<Arc<IdClaim>>), Error> {
        self.check_names(layout.slots(), false)?;
        let entries = self.governed();
        let (same, taken) = recognise(&entries, layout.slots());
        let claims = ids.claim_many(same.iter().filter(|same| same.is_none()).count())?;
        let present: Vec<Present> = entries
            .iter()
            .map(|(_, entry)| Present {
                shape: shape(&entry.region, entry),
                in_kvm: entry.place != Place::HereOnly,
            })
            .collect();
        let wanted: Vec<Wanted> = layout
            .slots()
            .iter()
            .zip(&same)
            .map(|(slot, same)| Wanted {
                start: slot.slot.start.0,
                size: slot.size(),
                flags: slot.flags(),
                same: *same,
                guest_memfd: slot.guest_memfd.as_ref().map(Binding::range),
            })
            .collect();
        let mut new_ids = claims.iter().map(|claim| claim.id());
        let mut id_of = |same: &Option<usize>| match same {
            Some(index) => entries.get(*index).map(|(id, _)| *id),
            None => new_ids.next(),
        };
        let wanted_ids: Vec<Option<SlotId>> = same.iter().map(&mut id_of).collect();

        let (mut ops, mut steps, mut requests) = (Vec::new(), Vec::new(), Vec::new());
        for (op, gap) in calls(&present, &wanted) {
            let described = match op {
                Op::Delete(index) => {
                    let found = entries.get(index).zip(present.get(index));
                    found.map(|((id, entry), old)| delete(*id, entry, old))
                }
                Op::Make(index) | Op::Alter(index) => {
                    let id = wanted_ids.get(index).copied().flatten();
                    let found = id.zip(layout.slots().get(index)).zip(same.get(index));
                    found.map(|((id, slot), same)| {
                        make(id, slot, same.and_then(|same| present.get(same)))
                    })
                }
            };
            if let Some((request, mut step)) = described {
                step.gap = gap;
                ops.push(op);
                steps.push(step);
                requests.push(request);
            }
        }
        let gone = (0..).zip(&taken).filter(|(_, taken)| !**taken);
        let gone = gone.map(|(index, _)| index).collect();
        self.check_in_turn(&requests, &mut steps)?;
        let plan = Plan {
            steps,
            ops,
            same,
            gone,
            layout: Layout::new(),
            epoch: self.epoch(),
            vm: Arc::clone(ids),
        };
        Ok((plan, claims))
    }

    /// Checks each request against what those before it have left, and notes in its step what it does.
    fn check_in_turn(
        &mut self,
        requests: &[MemoryRegion],
        steps: &mut [Step],
    ) -> Result<(), Error> {
        let mut undo = Vec::with_capacity(requests.len());
        let mut refused = None;
        for (request, step) in requests.iter().zip(steps) {
            match self.slots.check(request) {
                Ok(change) => {
                    step.change = change;
                    step.from = step.from.filter(|_| change == Change::Move);
                    // New slots at the beginning are over nothing that a layout governs, nor over each other, and what
                    // comes later is not over them: nothing that is still to be checked depends on them. (A first
                    // layout is nothing else.)
                    let free = undo.is_empty() && step.slot.is_none();
                    if !free || request.guest_memfd.is_some() {
                        undo.push(self.slots.commit(request));
                    }
                }
                Err(refusal) => {
                    refused = Some(refusal);
                    break;
                }
            }
        }
        for request in undo.iter().rev() {
            self.slots.commit(request);
        }
        refused.map_or(Ok(()), |refusal| Err(refusal.into()))
    }
}

fn delete<B>(id: SlotId, entry: &Entry<B>, old: &Present) -> (MemoryRegion, Step) {
    let step = Step {
        change: Change::Delete,
        slot: Some(id),
        name: entry.name.clone(),
        start: old.shape.start,
        from: None,
        size: old.shape.size,
        flags: old.shape.flags,
        gap: None,
    };
    (deletion(id, &old.shape), step)
}

/// The slot made, or altered; which of the two, and how, comes out when it is checked.
fn make(id: SlotId, slot: &LayoutSlot, old: Option<&Present>) -> (MemoryRegion, Step) {
    let (start, size, flags) = (slot.slot.start, slot.size(), slot.flags());
    let request = MemoryRegion {
        id,
        flags,
        start,
        size,
        // Of memory that is not there yet, any legal address will do for the check.
        host: old.map_or(Hva(0), |old| old.shape.host),
        guest_memfd: slot.guest_memfd.as_ref().map(Binding::range),
    };
    let step = Step {
        change: Change::Create,
        slot: old.map(|_| id),
        name: slot.name.clone(),
        start,
        from: old.map(|old| old.shape.start),
        size,
        flags,
        gap: None,
    };
    (request, step)
}

/// For each wanted slot, which of the present has its memory: by name first, then by place. And which of the present
/// are wanted so.
fn recognise<B>(
    present: &[(SlotId, &Entry<B>)],
    wanted: &[LayoutSlot],
) -> (Vec<Option<usize>>, Vec<bool>) {
    let is_memory = |entry: &Entry<B>| entry.place != Place::KvmOnly;
    let memory = present
        .iter()
        .enumerate()
        .filter(|(_, (_, entry))| is_memory(entry));
    let mut by_start: Vec<(u64, bool, usize)> = memory
        .map(|(index, (_, entry))| {
            let start = entry.region.extent().start().0;
            // What KVM has comes before what was lost at the same place, of which there may be several.
            (start, entry.place != Place::Both, index)
        })
        .collect();
    by_start.sort_unstable();
    let at = |start: u64| {
        let first = by_start.partition_point(|(other, ..)| *other < start);
        let from = by_start.get(first..).unwrap_or_default().iter();
        from.take_while(move |(other, ..)| *other == start)
            .map(|(.., index)| *index)
    };
    let mut by_name = HashMap::new();
    if wanted.iter().any(|slot| slot.name.is_some()) {
        for &(_, _, index) in &by_start {
            let name = present
                .get(index)
                .and_then(|(_, entry)| entry.name.as_deref());
            if let Some(name) = name {
                by_name.insert(name, index);
            }
        }
    }
    let same_memory = |index: usize, slot: &LayoutSlot| {
        present.get(index).is_some_and(|(_, entry)| {
            entry.backing == slot.slot.backing && entry.guest_memfd == slot.guest_memfd
        })
    };
    let mut taken = vec![false; present.len()];
    let mut take = |index: usize| match taken.get_mut(index) {
        Some(taken) => !std::mem::replace(taken, true),
        None => false,
    };
    let mut same: Vec<Option<usize>> = wanted
        .iter()
        .map(|slot| {
            let index = *by_name.get(slot.name()?)?;
            (same_memory(index, slot) && take(index)).then_some(index)
        })
        .collect();
    for (slot, same) in wanted.iter().zip(&mut same) {
        let may_be = |index: usize| {
            let entry = present.get(index).map(|(_, entry)| entry);
            entry.is_some_and(|entry| entry.name.is_none() || slot.name.is_none())
                && same_memory(index, slot)
        };
        if same.is_none() {
            *same = at(slot.slot.start.0).find(|index| may_be(*index) && take(*index));
        }
    }
    (same, taken)
}

/// Checks each slot of a layout by itself, and that no two overlap.
pub(crate) fn check_layout(slots: &[LayoutSlot]) -> Result<(), Error> {
    let mut ranges = Vec::with_capacity(slots.len());
    for slot in slots {
        let (start, size) = (slot.slot.start, slot.size());
        if size == 0 {
            return Err(Error::Empty { start });
        }
        if start.0.checked_add(size).is_none() {
            let id = SlotId::default();
            return Err(Refusal::Wraps { id, start, size }.into());
        }
        ranges.push(slot.guest_range());
    }
    ranges.sort_unstable_by_key(|range| range.start);
    let overlap = ranges.windows(2).find_map(|pair| match pair {
        [first, second] if second.start < first.end => Some((first.clone(), second.clone())),
        _ => None,
    });
    match overlap {
        Some((first, second)) => Err(Error::LayoutOverlap { first, second }),
        None => Ok(()),
    }
}
