// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random requests and random layouts against naive models: a slot is a list entry, a lookup looks at all of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Backing, Change, Gfn, GuestMemfdRange, Hva, HvaError, Limits, MAX_PAGES, Mapping, MemoryRegion,
    Memslots, PAGE_SIZE, PrivateRanges, Refusal, Slot, SlotFlags, SlotId, SlotMap, ram_layout,
};
use proptest::prelude::*;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions};

/// KVM's rules again, by hand, over a list.
fn naive(
    slots: &mut Vec<MemoryRegion>,
    request: &MemoryRegion,
    limits: &Limits,
) -> Result<Change, i32> {
    let (einval, eexist) = (Err(libc::EINVAL), Err(libc::EEXIST));
    let flags = request.flags.bits();
    let end = u128::from(request.start.0) + u128::from(request.size);
    let host_end = request.host.0 as u128 + u128::from(request.size);
    let aligned = |value: u64| value & 0xfff == 0;
    let private = request.guest_memfd.filter(|_| flags & 4 != 0);
    let known_flags = match private {
        Some(_) => limits.guest_memfd && flags == 4,
        None => flags & !3 == 0,
    };
    let in_file = private.is_none_or(|memory| {
        aligned(memory.offset) && u128::from(memory.offset) + u128::from(request.size) < 1 << 64
    });
    let legal = known_flags
        && in_file
        && aligned(request.size)
        && aligned(request.start.0)
        && aligned(request.host.0 as u64)
        && host_end < 1 << 63
        && request.id.0 < limits.slots
        && end < 1 << 64
        && request.size / PAGE_SIZE <= MAX_PAGES;
    if !legal {
        return einval;
    }
    let place = slots.iter().position(|slot| slot.id == request.id);
    let overlaps = slots.iter().any(|slot| {
        let slot_end = u128::from(slot.start.0) + u128::from(slot.size);
        slot.id != request.id
            && u128::from(slot.start.0) < end
            && u128::from(request.start.0) < slot_end
    });
    let change = match place.map(|place| slots[place]) {
        None if request.size == 0 => return einval,
        None => Change::Create,
        Some(_) if request.size == 0 => Change::Delete,
        Some(_) if private.is_some() => return einval,
        Some(old) if old.flags.bits() & 4 != 0 => return einval,
        Some(old) if (old.host, old.size) != (request.host, request.size) => return einval,
        Some(old) if (old.flags.bits() ^ flags) & 2 != 0 => return einval,
        Some(old) if old.start != request.start => Change::Move,
        Some(old) if old.flags != request.flags => Change::FlagsOnly,
        Some(_) => Change::Nothing,
    };
    if matches!(change, Change::Create | Change::Move) && overlaps {
        return eexist;
    }
    if let (Change::Create, Some(memory)) = (change, private) {
        let end = memory.offset + request.size;
        let bound = |slot: &MemoryRegion| {
            slot.guest_memfd.is_some_and(|other| {
                other.fd == memory.fd
                    && other.offset < end
                    && memory.offset < other.offset + slot.size
            })
        };
        if end > memory.file_size || slots.iter().any(bound) {
            return einval;
        }
    }
    if matches!(change, Change::Create | Change::Move)
        && (end - 1) >> 12 > u128::from(limits.last_gfn.0)
    {
        return einval;
    }
    slots.retain(|slot| slot.id != request.id);
    if change != Change::Delete {
        slots.push(MemoryRegion {
            guest_memfd: private,
            ..*request
        });
    }
    Ok(change)
}

fn requests() -> impl Strategy<Value = MemoryRegion> {
    let odd = prop_oneof![20 => Just(0u64), 1 => Just(1), 1 => Just(0x800)];
    let pages = prop_oneof![
        3 => Just(0u64),
        12 => 1..5u64,
        1 => Just(MAX_PAGES),
        1 => Just(MAX_PAGES + 1),
        1 => Just(u64::MAX >> 12),
    ];
    let start =
        prop_oneof![20 => 0..12u64, 1 => (1 << 40) - 3..(1u64 << 40), 1 => Just((1 << 52) - 2)];
    let host = prop_oneof![20 => Just(16u64), 2 => Just(17), 1 => Just((1 << 51) - 2), 1 => Just((1 << 52) - 1)];
    let flags = prop_oneof![10 => Just(0u32), 4 => Just(1), 4 => Just(2), 1 => Just(3), 8 => Just(4), 1 => Just(6), 1 => Just(1 << 31)];
    let offset = prop_oneof![20 => (0..8u64).prop_map(|page| page << 12), 1 => Just(7), 1 => Just(!0xfff), 1 => Just(1 << 63)];
    let file = (0..2, offset).prop_map(|(fd, offset)| GuestMemfdRange {
        fd,
        offset,
        file_size: [0x8000, 0x3000][fd as usize],
    });
    let file = prop_oneof![2 => Just(None), 3 => file.prop_map(Some)];
    let numbers = (0..7u32, flags, start, pages, host, odd, file);
    numbers.prop_map(
        |(id, flags, start, pages, host, odd, guest_memfd)| MemoryRegion {
            id: SlotId(if id == 6 { 0x1_0000 } else { id }),
            flags: SlotFlags::from_bits(flags),
            start: GuestAddress((start << 12) + odd),
            size: pages << 12,
            host: Hva((host << 12) as usize),
            guest_memfd,
        },
    )
}

#[derive(Clone, Debug)]
enum Step {
    Create {
        page: u64,
        pages: u64,
        read_only: bool,
        /// From which page of the mapping that several slots are cut from; else it has memory of its own.
        part: Option<u64>,
    },
    Remove(usize),
    Relocate(usize, u64),
    Log(usize, bool),
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..64u64, 1..9u64, any::<bool>(), proptest::option::of(0..12u64))
            .prop_map(|(page, pages, read_only, part)| Step::Create { page, pages, read_only, part }),
        1 => (0..8usize).prop_map(Step::Remove),
        1 => (0..8usize, 0..64u64).prop_map(|(slot, page)| Step::Relocate(slot, page)),
        1 => (0..8usize, any::<bool>()).prop_map(|(slot, on)| Step::Log(slot, on)),
    ]
}

/// Compares every page's translation with what the list of owned slots says.
fn compare(memslots: &Memslots, slots: &[Slot], host: &FakeHost) {
    let table = memslots.snapshot();
    let view = memslots::CheckedMemory::new(table.clone());
    assert_eq!(table.num_regions(), slots.len());
    assert_eq!(host.slots().len(), slots.len());
    assert!(
        table
            .regions()
            .zip(table.regions().skip(1))
            .all(|(a, b)| a.last_addr() < b.start_addr())
    );
    for slot in slots {
        let shape = host
            .slots()
            .into_iter()
            .find(|(id, _)| *id == slot.extent().id())
            .unwrap()
            .1;
        let extent = slot.extent();
        assert_eq!(
            (shape.start, shape.size, shape.host),
            (extent.start(), extent.size(), extent.host_start())
        );
        assert_eq!(shape.flags, slot.flags());
        assert_eq!(table.by_id(extent.id()).unwrap().flags(), slot.flags());
    }
    for page in 0..80u64 {
        let address = GuestAddress((page << 12) + 5);
        let owner = slots
            .iter()
            .find(|slot| slot.extent().guest_range().contains(&address.0));
        let expected = owner.map(|slot| {
            let extent = slot.extent();
            let offset = address.0 - extent.start().0;
            (
                extent.id(),
                Hva(extent.host_start().0 + offset as usize),
                extent.size() - offset,
            )
        });
        let found = table.translate(address);
        assert_eq!(
            found.map(|found| (found.slot, found.host, found.contiguous)),
            expected
        );
        assert_eq!(table.is_visible(Gfn(page)), owner.is_some());
        let read_only = owner.is_some_and(|slot| slot.flags().contains(SlotFlags::READ_ONLY));
        let hva = expected.map(|(_, host, _)| Hva(host.0 - 5));
        let gfn_to_hva = match hva {
            None => Err(HvaError::Bad),
            Some(_) if read_only => Err(HvaError::ReadOnly),
            Some(host) => Ok(host),
        };
        assert_eq!(table.gfn_to_hva(Gfn(page)), gfn_to_hva);
        assert_eq!(
            table.gfn_to_hva_prot(Gfn(page)).ok(),
            hva.map(|host| (host, !read_only))
        );
        if let Some((_, host, _)) = expected {
            // Slots of one mapping may share it: the lowest guest address has it then.
            let sharing = slots.iter().filter_map(|slot| {
                let address = slot.extent().guest_address(host)?;
                Some((address.0, slot.extent().id()))
            });
            let (address, id) = sharing.min().unwrap();
            let address = GuestAddress(address);
            assert_eq!(table.hva_to_gpa(host), Some((id, address)));
            assert_eq!(table.hva_to_gfn(host), Some(Gfn::containing(address)));
        }
        assert_eq!(
            view.check_range(address, 8, Permissions::Read),
            owner.is_some()
        );
        assert_eq!(
            view.check_range(address, 8, Permissions::Write),
            owner.is_some() && !read_only
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_classifier_answers_as_the_naive_rules(
        requests in prop::collection::vec(requests(), 1..40), guest_memfd: bool,
    ) {
        let limits = Limits { slots: 6, address_spaces: 1, last_gfn: Gfn((1 << 40) - 2), guest_memfd };
        let mut map = SlotMap::new(limits);
        let mut list = Vec::new();
        for request in requests {
            let expected = naive(&mut list, &request, &limits);
            prop_assert_eq!(map.apply(&request).map_err(|refusal| refusal.errno()), expected, "{:?}", request);
            prop_assert_eq!(map.len(), list.len());
        }
        for slot in &list {
            let shape = map.get(slot.id).unwrap();
            prop_assert_eq!((shape.start, shape.size, shape.flags), (slot.start, slot.size, slot.flags));
            prop_assert_eq!(shape.guest_memfd, slot.guest_memfd);
        }
    }

    #[test]
    fn what_readers_see_is_what_was_made(steps in prop::collection::vec(steps(), 1..24)) {
        let host = FakeHost::new(8);
        let memslots = Memslots::new(host.clone());
        let mut slots: Vec<Slot> = Vec::new();
        let shared = Arc::new(Mapping::new(&Backing::anonymous(12 << 12), GuestAddress(0)).unwrap());
        for step in steps {
            let before = memslots.generation();
            let done = match step {
                Step::Create { page, pages, read_only, part } => {
                    let flags = SlotFlags::NONE.with(SlotFlags::READ_ONLY, read_only);
                    let backing = match part {
                        None => Backing::anonymous(pages << 12),
                        Some(part) => Backing::part(&shared, part << 12, pages.min(12 - part) << 12),
                    };
                    memslots.create(GuestAddress(page << 12), backing, flags).map(|slot| slots.push(slot)).is_ok()
                }
                Step::Remove(index) if index < slots.len() => slots.remove(index).remove().is_ok(),
                Step::Relocate(index, page) if index < slots.len() => {
                    let unchanged = slots[index].extent().start().0 == page << 12;
                    slots[index].relocate(GuestAddress(page << 12)).is_ok() && !unchanged
                }
                Step::Log(index, on) if index < slots.len() => {
                    let flags = slots[index].flags().with(SlotFlags::LOG_DIRTY_PAGES, on);
                    let unchanged = slots[index].flags() == flags;
                    slots[index].set_flags(flags).is_ok() && !unchanged
                }
                _ => false,
            };
            prop_assert_eq!(memslots.generation(), before + u64::from(done));
            compare(&memslots, &slots, &host);
        }
        drop(slots);
        prop_assert!(host.slots().is_empty());
        prop_assert_eq!(memslots.available(), 8);
        prop_assert_eq!(Arc::strong_count(&shared), 1);
    }

    #[test]
    fn a_layout_has_all_the_memory_and_none_of_the_hole(
        pages in prop_oneof![1..1u64 << 22, any::<u64>().prop_map(|n| n >> 12)],
        hole in (0..1u64 << 21, 0..1u64 << 21).prop_map(|(a, b)| a.min(b) << 12..a.max(b) << 12),
    ) {
        match ram_layout(pages << 12, hole.clone()) {
            Err(_) => prop_assert!(
                pages == 0 || u128::from(pages << 12) + u128::from(hole.end - hole.start) > u128::from(u64::MAX)
            ),
            Ok(ranges) => {
                prop_assert_eq!(ranges.iter().map(|(_, size)| size).sum::<u64>(), pages << 12);
                let mut last = 0;
                for (start, size) in ranges {
                    let end = start.0 + size;
                    prop_assert!(size > 0 && start.0 >= last);
                    prop_assert!(hole.is_empty() || end <= hole.start || start.0 >= hole.end);
                    last = end;
                }
            }
        }
    }

    #[test]
    fn private_ranges_are_refused_by_name_and_by_choice(page in 0xfedf0..0xffff0u64, pages in 1..0x20u64) {
        let (start, backing) = (GuestAddress(page << 12), Backing::anonymous(pages << 12));
        let covers = |private: u64, length: u64| page < private + length && private < page + pages;
        let private = covers(0xfee00, 1) || covers(0xfffbc, 4);
        let strict = Memslots::new(FakeHost::new(1));
        prop_assert_eq!(strict.create(start, backing.clone(), SlotFlags::NONE).is_err(), private);
        let free = Memslots::<()>::with_policy(FakeHost::new(1), PrivateRanges::none());
        prop_assert!(free.create(start, backing, SlotFlags::NONE).is_ok());
    }
}

#[test]
fn every_refusal_says_its_numbers() {
    let mut map = SlotMap::new(Limits {
        last_gfn: Gfn(0xffff),
        guest_memfd: true,
        ..Limits::new(4)
    });
    let good = MemoryRegion {
        id: SlotId(1),
        flags: SlotFlags::NONE,
        start: GuestAddress(0x4000),
        size: 0x2000,
        host: Hva(0x7000),
        guest_memfd: None,
    };
    map.apply(&good).unwrap();
    let memory = |offset| GuestMemfdRange {
        fd: 9,
        offset,
        file_size: 0x4000,
    };
    let private = |id, start, offset| MemoryRegion {
        id: SlotId(id),
        flags: SlotFlags::GUEST_MEMFD,
        start: GuestAddress(start),
        guest_memfd: Some(memory(offset)),
        ..good
    };
    map.apply(&private(3, 0x1_0000, 0x1000)).unwrap();
    let says = |request: MemoryRegion| {
        map.check(&request)
            .map_err(|refusal: Refusal| refusal.to_string())
    };
    let cases = [
        (
            private(3, 0x2_0000, 0x1000),
            "guest addresses 0x20000..0x22000 (slot 3): a slot with a guest_memfd can only be deleted, not changed",
        ),
        (
            private(2, 0x2_0000, 0x800),
            "guest addresses 0x20000..0x22000 (slot 2): the guest_memfd offset 0x800 is not a multiple of the page size 0x1000",
        ),
        (
            private(2, 0x2_0000, 0x3000),
            "guest addresses 0x20000..0x22000 (slot 2): 0x2000 bytes from offset 0x3000 are not within a guest_memfd of 0x4000 bytes",
        ),
        (
            private(2, 0x2_0000, 0x2000),
            "guest addresses 0x20000..0x22000 (slot 2): 0x2000 bytes from offset 0x2000 of the guest_memfd are in part those of 0x10000..0x12000 (slot 3)",
        ),
        (
            MemoryRegion {
                flags: SlotFlags::GUEST_MEMFD,
                ..good
            },
            "guest addresses 0x4000..0x6000 (slot 1): flags GUEST_MEMFD are not known to this call",
        ),
        (
            MemoryRegion {
                size: 0x2001,
                ..good
            },
            "guest addresses 0x4000..0x6001 (slot 1): the size 0x2001 is not a multiple of the page size 0x1000",
        ),
        (
            MemoryRegion {
                size: 0x3000,
                ..good
            },
            "guest addresses 0x4000..0x7000 (slot 1): the size of an existing slot cannot change",
        ),
        (
            MemoryRegion {
                id: SlotId(4),
                ..good
            },
            "slot 4: KVM has 1 address spaces of 4 slots here",
        ),
        (
            MemoryRegion {
                id: SlotId(0x1_0001),
                ..good
            },
            "slot 1 of address space 1: KVM has 1 address spaces of 4 slots here",
        ),
        (
            MemoryRegion {
                id: SlotId(2),
                ..good
            },
            "guest addresses 0x4000..0x6000 (slot 2) overlap 0x4000..0x6000 (slot 1)",
        ),
        (
            MemoryRegion {
                id: SlotId(2),
                size: 0,
                ..good
            },
            "slot 2: cannot be deleted, it does not exist",
        ),
        (
            MemoryRegion {
                host: Hva(1 << 63),
                ..good
            },
            "guest addresses 0x4000..0x6000 (slot 1): 0x2000 bytes from the host address 0x8000000000000000 are not in user space",
        ),
        (
            MemoryRegion {
                start: GuestAddress(0x0fff_f000),
                ..good
            },
            "guest addresses 0xffff000..0x10001000 (slot 1) go beyond gfn 0xffff, the last of this host",
        ),
    ];
    for (request, message) in cases {
        assert_eq!(says(request), Err(message.into()));
    }
}
