// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Plan`]: how to get from the slots that there are to those of a [`Layout`], in the fewest calls of
//! KVM and in an order in which each of them is legal. Planning is arithmetic on the two; carrying a plan out is
//! [`Memslots::apply`](crate::Memslots::apply)'s.
//!
//! The order, and why:
//! 1. What is new and needs nobody's place is made. It is what may fail for want of memory, and nothing has been taken
//!    away then.
//! 2. Flags change.
//! 3. What is in the way goes (whose place, or whose private memory, what comes will have); then moves, each when its place is free. Of moves that wait for each other in a circle
//!    one slot is deleted, and made again in step 4.
//! 4. What had to wait is made.
//! 5. What is nobody's any more and in nobody's way goes. It comes last, so that no failure has to bring it back.
//!
//! A call each for what is made, deleted, moved or flagged; two for what KVM changes only by deletion (the read-only
//! flag, a slot with a guest_memfd) and for one slot of each circle. No order does with fewer.

use crate::cycles::{break_circles, order};
use crate::ids::Ids;
use crate::{Change, GuestMemfdRange, Layout, SlotFlags, SlotId, SlotShape};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::GuestAddress;

/// One call of KVM in a [`Plan`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Step {
    /// What it does.
    pub change: Change,
    /// To which slot; `None` for one that is new, which gets the lowest id that is free then.
    pub slot: Option<SlotId>,
    /// The slot's name in the layout, or the one that it had.
    pub name: Option<Arc<str>>,
    /// The slot's guest physical address: after the step, or, of a deletion, before it.
    pub start: GuestAddress,
    /// Where a move comes from.
    pub from: Option<GuestAddress>,
    /// The slot's size in bytes.
    pub size: u64,
    /// The slot's flags after the step, or, of a deletion, before it.
    pub flags: SlotFlags,
    /// Guest physical addresses at which a running vCPU could miss memory: a part of them is memory before the plan and
    /// after it and not throughout, or is memory that goes elsewhere and is nowhere for a moment. A vCPU that looks
    /// there then takes it for MMIO: pause those that may. `None`: no vCPU can tell, except that what is to go is gone.
    pub gap: Option<Range<u64>>,
}

/// The calls of KVM that make a [`Layout`] of what there was when the plan was made
/// ([`Memslots::plan`](crate::Memslots::plan)). A value: it holds no memory and no ids.
#[derive(Clone, Debug)]
#[must_use = "a plan does nothing until it is applied"]
pub struct Plan {
    pub(crate) steps: Vec<Step>,
    pub(crate) ops: Vec<Op>,
    pub(crate) layout: Layout,
    /// For each slot of the layout, whose memory it has: numbers, here and in `ops`, are places among the slots that the
    /// layout governs, by id, of the book of this epoch.
    pub(crate) same: Vec<Option<usize>>,
    /// Whose memory the layout does not have.
    pub(crate) gone: Vec<usize>,
    /// When, and for whom, it was made.
    pub(crate) epoch: u64,
    pub(crate) vm: Arc<Ids>,
}

impl Plan {
    /// The calls, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Whether a running vCPU could miss memory in one of the steps ([`Step::gap`]).
    pub fn has_gap(&self) -> bool {
        self.steps.iter().any(|step| step.gap.is_some())
    }

    /// The layout that it makes.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, end) = (self.start.0, self.start.0.saturating_add(self.size));
        write!(f, "{} ", self.change)?;
        match (self.slot, &self.name) {
            (Some(id), Some(name)) => write!(f, "{id} ({name})")?,
            (Some(id), None) => write!(f, "{id}")?,
            (None, Some(name)) => write!(f, "a slot ({name})")?,
            (None, None) => f.write_str("a slot")?,
        }
        match self.from {
            Some(from) => write!(f, " from {:#x} to {start:#x}..{end:#x}", from.0)?,
            None => write!(f, " at {start:#x}..{end:#x}")?,
        }
        if self.change != Change::Delete && self.flags != SlotFlags::NONE {
            write!(f, ", {:?}", self.flags)?;
        }
        match &self.gap {
            Some(gap) => write!(f, "; vCPUs may miss {:#x}..{:#x}", gap.start, gap.end),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("nothing to do");
        }
        for (number, step) in self.steps.iter().enumerate() {
            let line = if number == 0 { "" } else { "\n" };
            write!(f, "{line}{}. {step}", number + 1)?;
        }
        Ok(())
    }
}

/// Memory that there is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Present {
    pub(crate) shape: SlotShape,
    /// Whether KVM has it; not if a failed plan could not bring it back.
    pub(crate) in_kvm: bool,
}

/// Memory that there is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) start: u64,
    pub(crate) size: u64,
    pub(crate) flags: SlotFlags,
    /// Which of the present it is.
    pub(crate) same: Option<usize>,
    pub(crate) guest_memfd: Option<GuestMemfdRange>,
}

/// One call: numbers are indices of [`Present`] and [`Wanted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// The slot goes.
    Delete(usize),
    /// The slot is made, of new memory or of memory that there is.
    Make(usize),
    /// The slot of the same memory moves, or only its flags change.
    Alter(usize),
}

/// What becomes of one that is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    New,
    Flags,
    Move,
    /// Deleted and made again of the same memory.
    Remade,
}

fn fate(wanted: &Wanted, present: &[Present]) -> Fate {
    let Some(old) = wanted.same.and_then(|same| present.get(same)) else {
        return Fate::New;
    };
    let (start, flags) = (old.shape.start.0, old.shape.flags);
    if !old.in_kvm {
        Fate::New
    } else if (start, flags) == (wanted.start, wanted.flags) {
        Fate::Kept
    } else if flags.contains(SlotFlags::GUEST_MEMFD)
        || (flags ^ wanted.flags).contains(SlotFlags::READ_ONLY)
    {
        Fate::Remade
    } else if start != wanted.start {
        Fate::Move
    } else {
        Fate::Flags
    }
}

/// The calls, in order, each with its gap. Neither the present (those in KVM) nor the wanted overlap among themselves.
pub(crate) fn calls(present: &[Present], wanted: &[Wanted]) -> Vec<(Op, Option<Range<u64>>)> {
    let range = |index: usize| {
        let shape = present.get(index).map(|present| present.shape);
        shape.map_or(0..0, |shape| {
            shape.start.0..shape.start.0.saturating_add(shape.size)
        })
    };
    let fates: Vec<Fate> = wanted.iter().map(|wanted| fate(wanted, present)).collect();
    let wanted_range = |wanted: &Wanted| wanted.start..wanted.start.saturating_add(wanted.size);

    let mut places: Vec<(Range<u64>, usize)> = (0..present.len())
        .filter(|index| present.get(*index).is_some_and(|present| present.in_kvm))
        .map(|index| (range(index), index))
        .collect();
    places.sort_unstable_by_key(|(range, _)| range.start);
    let mut targets: Vec<Range<u64>> = wanted.iter().map(wanted_range).collect();
    targets.sort_unstable_by_key(|range| range.start);

    // Whose wanted slot a present one becomes.
    let mut becomes = vec![None; present.len()];
    for (index, wanted) in wanted.iter().enumerate() {
        if let Some(becomes) = wanted.same.and_then(|same| becomes.get_mut(same)) {
            *becomes = Some(index);
        }
    }
    let becomes = |index: usize| becomes.get(index).copied().flatten();
    let fate_of = |present: usize| {
        let wanted = becomes(present)?;
        fates.get(wanted).copied()
    };

    // What goes, with private memory that another slot can have only after it.
    let mut bound: Vec<(PrivateBytes, usize)> = places
        .iter()
        .filter(|(_, index)| becomes(*index).is_none())
        .filter_map(|&(_, index)| {
            let shape = present.get(index)?.shape;
            Some((private_bytes(shape.guest_memfd?, shape.size), index))
        })
        .collect();
    bound.sort_unstable_by_key(|((file, bytes), _)| (*file, bytes.start));

    // Who is in whose way.
    let mut in_the_way = vec![false; present.len()];
    let mut blocked = vec![false; wanted.len()];
    let mut waits_for = vec![Vec::new(); wanted.len()];
    let mut bound_anew = vec![false; present.len()];
    for (index, (wanted, fate)) in wanted.iter().zip(&fates).enumerate() {
        if matches!(fate, Fate::Kept | Fate::Flags) {
            continue;
        }
        let target = wanted_range(wanted);
        let first = places.partition_point(|(range, _)| range.end <= target.start);
        let there = places.get(first..).unwrap_or_default().iter();
        for &(_, occupant) in there.take_while(|(range, _)| range.start < target.end) {
            if wanted.same == Some(occupant) {
                continue;
            }
            mark(&mut blocked, index);
            match (fate_of(occupant), becomes(occupant)) {
                (Some(Fate::Move), Some(mover)) if *fate == Fate::Move => {
                    if let Some(list) = waits_for.get_mut(index) {
                        list.push(mover);
                    }
                }
                // It is gone from there before anything is made.
                (Some(Fate::Move), _) => {}
                _ => mark(&mut in_the_way, occupant),
            }
        }
        let Some(binding) = wanted.guest_memfd else {
            continue;
        };
        let (file, bytes) = private_bytes(binding, wanted.size);
        // In KVM no two slots share any, so their ends are in order as well.
        let first =
            bound.partition_point(|((other, there), _)| (*other, there.end) <= (file, bytes.start));
        let there = bound.get(first..).unwrap_or_default().iter();
        let shared =
            there.take_while(|((other, there), _)| *other == file && there.start < bytes.end);
        for &(_, occupant) in shared {
            mark(&mut blocked, index);
            mark(&mut in_the_way, occupant);
            mark(&mut bound_anew, occupant);
        }
    }
    let logs = |index: usize| {
        let flags = wanted.get(index).map(|wanted| wanted.flags);
        flags.is_some_and(|flags| flags.contains(SlotFlags::LOG_DIRTY_PAGES))
    };
    // A deletion forgets which pages were dirty, and a move does not.
    let broken = break_circles(&waits_for, |index| !logs(index));
    let moves = order(&waits_for, &broken);
    let is = |index: usize, fate: Fate| fates.get(index) == Some(&fate);
    let indices = |fate: Fate| (0..wanted.len()).filter(move |index| is(*index, fate));
    let is_blocked = |index: usize| blocked.get(index).copied().unwrap_or(false);
    let is_in_the_way = |index: usize| in_the_way.get(index).copied().unwrap_or(false);

    let mut calls = Vec::new();
    for index in indices(Fate::New).filter(|index| !is_blocked(*index)) {
        calls.push((Op::Make(index), None));
    }
    for index in indices(Fate::Flags) {
        calls.push((Op::Alter(index), None));
    }
    for &(ref place, index) in &places {
        if is_in_the_way(index) {
            let gap = match fate_of(index) {
                Some(_) => Some(place.clone()),
                // Its private memory goes elsewhere.
                None if bound_anew.get(index) == Some(&true) => Some(place.clone()),
                None => common(place, &targets),
            };
            calls.push((Op::Delete(index), gap));
        }
    }
    let same = |index: usize| wanted.get(index).and_then(|wanted| wanted.same);
    for old in broken.iter().filter_map(|index| same(*index)) {
        calls.push((Op::Delete(old), Some(range(old))));
    }
    for index in moves.into_iter().filter(|index| is(*index, Fate::Move)) {
        let gap = same(index).map(&range);
        calls.push((Op::Alter(index), gap));
    }
    for index in 0..wanted.len() {
        match fates.get(index) {
            Some(Fate::New) if is_blocked(index) => calls.push((Op::Make(index), None)),
            Some(Fate::Remade) => {
                if let Some(old) = same(index).filter(|old| !is_in_the_way(*old)) {
                    calls.push((Op::Delete(old), Some(range(old))));
                }
                calls.push((Op::Make(index), None));
            }
            Some(Fate::Move) if broken.contains(&index) => calls.push((Op::Make(index), None)),
            _ => {}
        }
    }
    for &(_, index) in &places {
        if becomes(index).is_none() && !is_in_the_way(index) {
            calls.push((Op::Delete(index), None));
        }
    }
    calls
}

/// A guest_memfd, and bytes of it.
type PrivateBytes = (i32, Range<u64>);

/// Those that a slot of `size` bytes has.
const fn private_bytes(binding: GuestMemfdRange, size: u64) -> PrivateBytes {
    let (start, end) = (binding.offset, binding.offset.saturating_add(size));
    (binding.fd, start..end)
}

fn mark(marks: &mut [bool], index: usize) {
    if let Some(mark) = marks.get_mut(index) {
        *mark = true;
    }
}

/// From the first to the last address that `range` has in common with one of `others` (in order).
fn common(range: &Range<u64>, others: &[Range<u64>]) -> Option<Range<u64>> {
    let first = others.partition_point(|other| other.end <= range.start);
    let end = others.partition_point(|other| other.start < range.end);
    let there = others.get(first..end)?;
    let start = there.first()?.start.max(range.start);
    Some(start..there.last()?.end.min(range.end))
}
