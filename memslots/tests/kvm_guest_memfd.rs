// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest_memfd that is mapped is one memory: what the guest writes this process reads, and the other way round. Which
//! of its pages were ever touched is known, whoever touched them, and what is given back reads as zeros. What KVM does not
//! do with such a slot is refused, and the slot is as it was.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use memslots::{
    Backing, Error, GuestMemfd, Holes, HugePages, MapError, Mapping, MemoryKind, Memslots, NewSlot,
    NumaPolicy, PAGE_SIZE, SetMemoryRegion, SlotFlags,
};
use std::ops::Range;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// 16-bit code: adds 1 to each of the words in pages 3 to 7, then tells the last one's low byte.
const CODE: &[u8] = &[
    0xbb, 0x00, 0x30, //       mov bx, 0x3000
    0xff, 0x07, //             inc word [bx]
    0x81, 0xc3, 0x00, 0x10, // add bx, 0x1000
    0x81, 0xfb, 0x00, 0x80, // cmp bx, 0x8000
    0x72, 0xf4, //             jb inc
    0xa0, 0x00, 0x70, //       mov al, [0x7000]
    0xe6, 0x10, //             out 0x10, al
    0xf4, //                   hlt
];
const PAGES: u64 = 16;
const SIZE: u64 = PAGES * PAGE_SIZE;

fn vm() -> Arc<VmFd> {
    let kvm = Kvm::new()
        .expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out");
    Arc::new(kvm.create_vm().unwrap())
}

/// A VM's slots and a file for them; `None`, and it is said, where the host has none: then that is what the call says.
fn slots_and_file(vm: &Arc<VmFd>) -> Option<(Memslots, GuestMemfd)> {
    let memslots = Memslots::new(Arc::clone(vm));
    match memslots.create_mappable_guest_memfd(SIZE) {
        Ok(file) => Some((memslots, file)),
        Err(error @ Error::NoMappableGuestMemfd) => {
            assert!(!vm.has_mappable_guest_memfd());
            let errno = vm.create_mappable_guest_memfd(SIZE).unwrap_err();
            assert_eq!(errno.0, libc::EOPNOTSUPP);
            println!("NOT TRIED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn ram(file: &GuestMemfd) -> NewSlot {
    NewSlot {
        start: GuestAddress(0),
        backing: Backing::guest_memfd(file, 0, SIZE),
        flags: SlotFlags::NONE,
    }
}

fn pages(range: Range<u64>) -> Range<u64> {
    range.start * PAGE_SIZE..range.end * PAGE_SIZE
}

#[test]
fn a_mapped_guest_memfd_is_one_memory_for_the_guest_and_this_process() {
    let vm = vm();
    let Some((memslots, file)) = slots_and_file(&vm) else {
        return;
    };
    let slots = memslots.create_all([ram(&file)]).unwrap();
    drop(file); // The slot has it.
    let memory = memslots.snapshot();
    let region = memory.by_id(slots[0].extent().id()).unwrap();
    assert_eq!(region.mapping().kind(), MemoryKind::GuestMemfd);
    assert!(slots[0].flags().contains(SlotFlags::GUEST_MEMFD));
    let holes = Holes::open().unwrap();
    let of = || holes.of(region.mapping(), 0..SIZE).unwrap();
    assert_eq!(of(), [pages(0..PAGES)]);

    memory.write_slice(CODE, GuestAddress(0x1000)).unwrap();
    memory.write_obj(0x41u16, GuestAddress(0x7000)).unwrap();
    assert_eq!(of(), [pages(0..1), pages(2..7), pages(8..PAGES)]);
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x10, &[byte]) => assert_eq!(byte, 0x42),
        other => panic!("an exit that this guest does not cause: {other:?}"),
    }
    // The pages that the guest alone has touched as well, before this process looks at them.
    assert_eq!(of(), [pages(0..1), pages(2..3), pages(8..PAGES)]);
    for page in 3..7 {
        let word: u16 = memory.read_obj(GuestAddress(page * PAGE_SIZE)).unwrap();
        assert_eq!(word, 1, "page {page}");
    }

    let ram = memslots.ram();
    let given = [pages(3..5)].map(|range| GuestAddress(range.start)..GuestAddress(range.end));
    assert_eq!(ram.punch(&given).unwrap(), 2 * PAGE_SIZE);
    assert_eq!(of(), [pages(0..1), pages(2..5), pages(8..PAGES)]);
    for (page, due) in [(3, 0), (4, 0), (5, 1)] {
        let word: u16 = memory.read_obj(GuestAddress(page * PAGE_SIZE)).unwrap();
        assert_eq!(word, due, "page {page}");
    }
}

/// KVM goes to the file for each of them, and so knows what it does not do for them.
#[test]
fn slots_that_are_cut_from_one_mapping_of_it_are_bound_to_their_bytes() {
    let vm = vm();
    let Some((memslots, file)) = slots_and_file(&vm) else {
        return;
    };
    let half = SIZE / 2;
    // It begins within the file, and a part of a part within that.
    let backing = Backing::guest_memfd(&file, PAGE_SIZE, SIZE - PAGE_SIZE);
    let whole = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
    let rest = Backing::part(&whole, PAGE_SIZE, SIZE - 2 * PAGE_SIZE);
    let rest = Arc::new(Mapping::new(&rest, GuestAddress(0)).unwrap());
    let cut = |start, of: &Arc<Mapping>, offset, size| NewSlot {
        start: GuestAddress(start),
        backing: Backing::part(of, offset, size),
        flags: SlotFlags::NONE,
    };
    // Bytes from 1 page on, and from 9 pages on.
    let low = cut(0, &whole, 0, half);
    let high = cut(1 << 20, &rest, half - PAGE_SIZE, half - PAGE_SIZE);
    let logged = NewSlot {
        flags: SlotFlags::LOG_DIRTY_PAGES,
        ..low.clone()
    };
    let refused = memslots.create_all([logged]).unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused}");
    let bound = |slot: &NewSlot| {
        let slot = memslots::LayoutSlot::from(slot.clone());
        slot.guest_memfd()
            .map(|(of, from)| (of.clone(), from, slot.size()))
    };
    assert_eq!(bound(&low), Some((file.clone(), PAGE_SIZE, half)));
    let due = (file.clone(), half + PAGE_SIZE, half - PAGE_SIZE);
    assert_eq!(bound(&high), Some(due));
    let slots = memslots.create_all([low, high.clone()]).unwrap();
    for slot in &slots {
        assert!(slot.flags().contains(SlotFlags::GUEST_MEMFD));
    }
    // The other slot has these bytes, or there are none.
    for (offset, size) in [(half, PAGE_SIZE), (0, SIZE), (u64::MAX - 4095, PAGE_SIZE)] {
        let refused = memslots.create_all([cut(2 << 20, &whole, offset, size)]);
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    }
    // And beyond the mapping, of bytes that nobody has.
    drop(slots);
    let middle = Backing::part(&whole, 0, PAGE_SIZE);
    let middle = Arc::new(Mapping::new(&middle, GuestAddress(0)).unwrap());
    let refused = memslots.create_all([cut(0, &middle, PAGE_SIZE, PAGE_SIZE)]);
    assert!(matches!(refused, Err(Error::Map { .. })), "{refused:?}");

    let slots = memslots.create_all([high]).unwrap();
    let memory = memslots.snapshot();
    memory.write_obj(0x41u16, GuestAddress(1 << 20)).unwrap();
    let other = Backing::guest_memfd(&file, half + PAGE_SIZE, PAGE_SIZE);
    let other = Mapping::new(&other, GuestAddress(0)).unwrap();
    // SAFETY: mapped, and nobody writes there now.
    let word = unsafe { (other.host().0 as *const u16).read_volatile() };
    assert_eq!(word, 0x41);
    let all = GuestAddress(1 << 20)..GuestAddress((1 << 20) + PAGE_SIZE);
    assert_eq!(memslots.ram().punch(&[all]).unwrap(), PAGE_SIZE);
    let word: u16 = memory.read_obj(GuestAddress(1 << 20)).unwrap();
    assert_eq!(word, 0);
    drop(slots);
}

#[test]
fn what_kvm_does_not_do_with_such_a_slot_is_refused_and_it_stays_as_it_was() {
    let vm = vm();
    let Some((memslots, file)) = slots_and_file(&vm) else {
        return;
    };
    for flags in [SlotFlags::LOG_DIRTY_PAGES, SlotFlags::READ_ONLY] {
        let refused = memslots.create_all([NewSlot {
            flags,
            ..ram(&file)
        }]);
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    }
    let mut slots = memslots.create_all([ram(&file)]).unwrap();
    let before = slots[0].flags();
    let refused = slots[0].set_flags(before | SlotFlags::LOG_DIRTY_PAGES);
    let refused = refused.err().unwrap().to_string();
    assert!(
        refused.contains("flags LOG_DIRTY_PAGES | GUEST_MEMFD are not known"),
        "{refused}"
    );
    assert_eq!(slots[0].flags(), before);
    // The same bytes in another slot, which KVM refuses as well.
    let twice = NewSlot {
        start: GuestAddress(1 << 20),
        ..ram(&file)
    };
    let refused = memslots.create_all([twice]).unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused}");
    assert_eq!(memslots.snapshot().num_regions(), 1);
}

#[test]
fn a_guest_memfd_is_mapped_only_where_it_can_be_and_as_what_it_is() {
    let vm = vm();
    let Some((memslots, file)) = slots_and_file(&vm) else {
        return;
    };
    let map = |backing: &Backing| Mapping::new(backing, GuestAddress(0));
    let part = map(&Backing::guest_memfd(&file, PAGE_SIZE, 2 * PAGE_SIZE)).unwrap();
    assert_eq!(
        (part.size(), part.file().unwrap().start()),
        (2 * PAGE_SIZE, PAGE_SIZE)
    );
    assert_eq!(
        map(&Backing::guest_memfd(&file, PAGE_SIZE, SIZE)).unwrap_err(),
        MapError::BeyondFile {
            offset: PAGE_SIZE,
            size: SIZE,
            length: SIZE
        }
    );
    let all = Backing::guest_memfd(&file, 0, SIZE);
    for wish in [
        all.clone().huge_pages(HugePages::Advise),
        all.clone().numa(NumaPolicy::Bind(vec![0])),
        all.mergeable(),
    ] {
        let refused = map(&wish).unwrap_err();
        assert!(matches!(refused, MapError::Unsupported(_)), "{refused}");
    }
    let closed = memslots.create_guest_memfd(SIZE).unwrap();
    assert!(file.is_mappable() && !closed.is_mappable());
    let refused = map(&Backing::guest_memfd(&closed, 0, SIZE)).unwrap_err();
    let text = format!("{refused}");
    assert!(
        text.starts_with("0x10000 bytes from offset 0x0 of a guest_memfd that cannot be mapped"),
        "{text}"
    );

    // KVM would go to one memory for the guest, and this process to another.
    let other = NewSlot {
        backing: Backing::anonymous(SIZE),
        ..ram(&file)
    };
    for slot in [
        other.with_guest_memfd(&file, 0),
        ram(&file).with_guest_memfd(&closed, 0),
    ] {
        let refused = memslots.create_all([slot]).unwrap_err();
        assert!(
            matches!(refused, Error::OtherThanGuestMemfd { offset: 0, .. }),
            "{refused}"
        );
    }
    // Another VM's is another VM's, though the process is the same.
    let stranger = Memslots::new(self::vm());
    stranger.create_guest_memfd(SIZE).unwrap();
    let refused = stranger.create_all([ram(&file)]).unwrap_err();
    assert!(
        matches!(
            refused,
            Error::OtherVm {
                what: "guest_memfd"
            }
        ),
        "{refused}"
    );
    assert_eq!(part.host_range().len() as u64, 2 * PAGE_SIZE);
}
