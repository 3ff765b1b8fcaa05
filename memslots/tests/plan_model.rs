// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random layouts one after the other, against naive models: what is there after is what was asked for, each byte of
//! memory that was to be kept is kept, no plan has a call too many, and one that fails has changed nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Backing, Change, Errno, Layout, LayoutSlot, Memslots, NewSlot, PAGE_SIZE, SlotExtent,
    SlotFlags, SlotId, SlotShape,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashSet, VecDeque};
use vm_memory::{Bytes, GuestAddress};

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// A slot of the model: its name's number, its first page, its pages, its flags.
type Small = (usize, u64, u64, u32);

fn layout(slots: &[Small]) -> Layout {
    slots
        .iter()
        .map(|&(name, page, pages, flags)| {
            let new = NewSlot {
                start: GuestAddress(page * PAGE_SIZE),
                backing: Backing::anonymous(pages * PAGE_SIZE),
                flags: SlotFlags::from_bits(flags),
            };
            new.named(NAMES[name])
        })
        .collect()
}

/// At most one slot of each name, none over another: later ones that break this are left out.
fn tidy(slots: Vec<Small>, room: u64) -> Vec<Small> {
    let mut tidy: Vec<Small> = Vec::new();
    for slot in slots {
        let end = slot.1 + slot.2;
        let clash =
            |other: &Small| other.0 == slot.0 || (other.1 < end && slot.1 < other.1 + other.2);
        if end <= room && !tidy.iter().any(clash) {
            tidy.push(slot);
        }
    }
    tidy
}

/// Sizes go with names mostly, so that memory is often the same.
fn small(names: usize, room: u64) -> impl Strategy<Value = Vec<Small>> {
    let flags = prop_oneof![4 => Just(0u32), 2 => Just(1), 1 => Just(2)];
    let slot = (0..names, 0..room, 0..8u64, flags).prop_map(|(name, page, odd, flags)| {
        let pages = [1, 1, 2, 1, 3][name];
        (name, page, if odd == 0 { pages + 1 } else { pages }, flags)
    });
    prop::collection::vec(slot, 0..names * 3).prop_map(move |slots| tidy(slots, room))
}

#[derive(Debug, PartialEq)]
struct Everything {
    kvm: Vec<(SlotId, SlotShape)>,
    published: Vec<(SlotExtent, SlotFlags, u64)>,
    generation: u64,
    free_ids: usize,
    layout: Layout,
}

fn everything(host: &FakeHost, memslots: &Memslots) -> Everything {
    let snapshot = memslots.snapshot();
    let published = snapshot.regions().map(|region| {
        let mark = snapshot.read_obj(region.extent().start()).unwrap();
        (region.extent().clone(), region.flags(), mark)
    });
    Everything {
        kvm: host.slots(),
        published: published.collect(),
        generation: snapshot.generation(),
        free_ids: memslots.available(),
        layout: memslots.layout(),
    }
}

/// What is installed is `layout`, for KVM, for readers and for the book.
fn is_whole(host: &FakeHost, memslots: &Memslots, extents: &[SlotExtent], layout: &Layout) {
    let mut expected: Vec<_> = layout
        .slots()
        .iter()
        .zip(extents)
        .map(|(slot, extent)| (slot.slot.start, slot.size(), slot.slot.flags, extent.id()))
        .collect();
    expected.sort_by_key(|(start, ..)| start.0);
    let snapshot = memslots.snapshot();
    let regions = snapshot.regions().map(|region| {
        let extent = region.extent();
        (extent.start(), extent.size(), region.flags(), extent.id())
    });
    assert_eq!(regions.collect::<Vec<_>>(), expected);
    let mut kvm: Vec<_> = host
        .slots()
        .into_iter()
        .map(|(id, shape)| (shape.start, shape.size, shape.flags, id))
        .collect();
    kvm.sort_by_key(|(start, ..)| start.0);
    assert_eq!(kvm, expected);
    for (id, shape) in host.slots() {
        let extent = snapshot.by_id(id).unwrap().extent().clone();
        assert_eq!(shape.host, extent.host_start());
    }
    assert!(memslots.plan(layout).unwrap().is_empty());
}

/// The fewest calls from `from` to `to`, by trying all: breadth first over everything that KVM's rules allow, memory
/// parked anywhere in the room included.
fn fewest(from: &[Small], to: &[Small], room: u64) -> usize {
    // A slot's state: nowhere, or a page and its flags. Memory is the same if name and size are; other memory of the
    // same name is another slot.
    let mut memories: Vec<(usize, u64)> = Vec::new();
    for slot in from.iter().chain(to) {
        if !memories.contains(&(slot.0, slot.2)) {
            memories.push((slot.0, slot.2));
        }
    }
    let state = |slots: &[Small]| -> Vec<Option<(u64, u32)>> {
        memories
            .iter()
            .map(|memory| {
                let slot = slots.iter().find(|slot| (slot.0, slot.2) == *memory)?;
                Some((slot.1, slot.3))
            })
            .collect()
    };
    let (start, goal) = (state(from), state(to));
    let mut seen = HashSet::from([start.clone()]);
    let mut queue = VecDeque::from([(start, 0)]);
    while let Some((state, calls)) = queue.pop_front() {
        if state == goal {
            return calls;
        }
        for index in 0..state.len() {
            let pages = memories[index].1;
            let free = |page: u64| {
                (0..state.len()).all(|other| {
                    other == index
                        || state[other].is_none_or(|(at, _)| {
                            at + memories[other].1 <= page || page + pages <= at
                        })
                })
            };
            let mut next = Vec::new();
            for page in (0..=room - pages).filter(|page| free(*page)) {
                for flags in [0u32, 1, 2] {
                    let legal = match state[index] {
                        None => true,
                        Some(old) => (old.1 ^ flags) & 2 == 0 && old != (page, flags),
                    };
                    if legal {
                        next.push(Some((page, flags)));
                    }
                }
            }
            if state[index].is_some() {
                next.push(None);
            }
            for slot in next {
                let mut state = state.clone();
                state[index] = slot;
                if seen.insert(state.clone()) {
                    queue.push_back((state, calls + 1));
                }
            }
        }
    }
    unreachable!("every layout can be reached: delete all, make all")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_after_whatever_is_there_after(layouts in prop::collection::vec(small(5, 14), 1..8)) {
        let host = FakeHost::new(10);
        let memslots = Memslots::new(host.clone());
        // Name and size to what was written there.
        let mut marks: BTreeMap<(String, u64), u64> = BTreeMap::new();
        let mut next_mark = 1;
        for slots in layouts {
            let layout = layout(&slots);
            let plan = memslots.plan(&layout).unwrap();
            let (calls, steps) = (host.calls().len(), plan.steps().to_vec());
            let generation = memslots.generation();
            let applied = memslots.apply(plan).unwrap();
            prop_assert_eq!(host.calls().len() - calls, steps.len());
            prop_assert_eq!(memslots.generation() - generation, u64::from(!steps.is_empty()));
            for (step, call) in steps.iter().zip(&host.calls()[calls..]) {
                let deleted = step.change == Change::Delete;
                prop_assert_eq!((step.start, deleted), (call.start, call.size == 0));
                prop_assert!(step.slot.is_none_or(|id| id == call.id));
            }
            is_whole(&host, &memslots, &applied.extents, &layout);
            let snapshot = memslots.snapshot();
            let mut now = BTreeMap::new();
            for slot in layout.slots() {
                let key = (slot.name().unwrap().to_owned(), slot.size());
                let at = slot.slot.start;
                let mark = snapshot.read_obj::<u64>(at).unwrap();
                prop_assert_eq!(mark, marks.get(&key).copied().unwrap_or(0), "{:?}", key);
                snapshot.write_obj(next_mark, at).unwrap();
                now.insert(key, next_mark);
                next_mark += 1;
            }
            marks = now;
        }
    }

    #[test]
    fn a_plan_that_fails_at_any_call_has_changed_nothing(
        before in small(5, 14), after in small(5, 14), errno in prop::sample::select(vec![libc::ENOMEM, libc::EEXIST, libc::EINTR]),
    ) {
        let host = FakeHost::new(10);
        let memslots = Memslots::new(host.clone());
        memslots.set_layout(&layout(&before)).unwrap();
        for (mark, region) in memslots.snapshot().regions().enumerate() {
            memslots.snapshot().write_obj(mark as u64 + 1, region.extent().start()).unwrap();
        }
        let there = everything(&host, &memslots);
        let after = layout(&after);
        let steps = memslots.plan(&after).unwrap().steps().len();
        for failing in 0..steps {
            host.fail(failing, Errno(errno));
            let error = memslots.set_layout(&after).unwrap_err();
            let named = format!("in step {} of {steps}: ", failing + 1);
            prop_assert!(error.to_string().contains(&named), "{}", error);
            prop_assert_eq!(&everything(&host, &memslots), &there);
        }
        let applied = memslots.set_layout(&after).unwrap();
        is_whole(&host, &memslots, &applied.extents, &after);
    }

    #[test]
    fn a_plan_says_every_gap_that_there_is(before in small(5, 14), after in small(5, 14)) {
        let host = FakeHost::new(10);
        let memslots = Memslots::new(host.clone());
        memslots.set_layout(&layout(&before)).unwrap();
        let plan = memslots.plan(&layout(&after)).unwrap();
        let covered = |slots: &[Small], page: u64| slots.iter().any(|slot| (slot.1..slot.1 + slot.2).contains(&page));
        let said = |page: u64| plan.steps().iter().filter_map(|step| step.gap.clone()).any(|gap| gap.contains(&(page * PAGE_SIZE)));
        // Page by page, what KVM has after each step.
        let mut now: BTreeMap<SlotId, (u64, u64)> =
            host.slots().iter().map(|(id, shape)| (*id, (shape.start.0 / PAGE_SIZE, shape.size / PAGE_SIZE))).collect();
        let mut new_ids = 100..;
        for step in plan.steps() {
            let id = step.slot.unwrap_or_else(|| SlotId(new_ids.next().unwrap()));
            match step.change {
                Change::Delete => { now.remove(&id); }
                _ => { now.insert(id, (step.start.0 / PAGE_SIZE, step.size / PAGE_SIZE)); }
            }
            for page in 0..14 {
                let there = now.values().any(|(start, pages)| (*start..start + pages).contains(&page));
                if covered(&before, page) && covered(&after, page) && !there {
                    prop_assert!(said(page), "page {} in {}", page, plan);
                }
            }
        }
        // And none where nothing moves or is replaced.
        let only_more = after.iter().chain(before.iter().filter(|old| after.iter().any(|new| new == *old))).count();
        if before.iter().all(|old| after.contains(old)) {
            prop_assert!(!plan.has_gap(), "{} of {}", plan, only_more);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if std::env::var_os("LONG_TESTS").is_some() { 400 } else { 40 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_plan_has_a_call_too_many(before in small(3, 6), after in small(3, 6)) {
        let memslots = Memslots::new(FakeHost::new(10));
        memslots.set_layout(&layout(&before)).unwrap();
        let plan = memslots.plan(&layout(&after)).unwrap();
        prop_assert_eq!(plan.steps().len(), fewest(&before, &after, 6), "{}", plan);
    }

    /// Rooms with no page to spare: what is moved waits for others, often in circles.
    #[test]
    fn no_plan_has_a_call_too_many_where_all_change_places(
        order in Just(vec![0usize, 1, 2, 3]).prop_shuffle(), spare in 0..2u64,
    ) {
        let pages = [1, 1, 2, 1];
        let packed = |order: &[usize]| {
            let mut page = 0;
            let place = |&name: &usize| {
                page += pages[name];
                (name, page - pages[name], pages[name], 0)
            };
            order.iter().map(place).collect::<Vec<Small>>()
        };
        let (before, after) = (packed(&[0, 1, 2, 3]), packed(&order));
        let memslots = Memslots::new(FakeHost::new(10));
        memslots.set_layout(&layout(&before)).unwrap();
        let plan = memslots.plan(&layout(&after)).unwrap();
        prop_assert_eq!(plan.steps().len(), fewest(&before, &after, 5 + spare), "{}", plan);
    }
}

#[test]
fn a_layout_of_thousands_that_all_change_places_is_planned() {
    let memslots = Memslots::new(FakeHost::new(20_000));
    let at = |index: u64, page: u64| -> LayoutSlot {
        let new = NewSlot {
            start: GuestAddress(page * PAGE_SIZE),
            backing: Backing::anonymous(PAGE_SIZE),
            flags: SlotFlags::NONE,
        };
        new.named(index.to_string())
    };
    let count = 2000;
    let turned = |by: u64| {
        (0..count)
            .map(|index| at(index, (index + by) % count))
            .collect::<Layout>()
    };
    let pairs: Layout = (0..count).map(|index| at(index, index ^ 1)).collect();
    memslots.set_layout(&turned(0)).unwrap();
    assert_eq!(
        memslots.plan(&turned(1)).unwrap().steps().len() as u64,
        count + 1
    );
    assert_eq!(
        memslots.plan(&pairs).unwrap().steps().len() as u64,
        count + count / 2
    );
    memslots.set_layout(&turned(1)).unwrap();
    assert!(memslots.plan(&turned(1)).unwrap().is_empty());
}
