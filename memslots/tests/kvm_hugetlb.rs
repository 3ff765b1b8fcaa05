// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Huge pages behind a slot: reserved when they are mapped, or refused with the pool's numbers; seen by KVM; and brought
//! one by one through a userfaultfd.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/pool.rs"]
mod pool;

use kvm_ioctls::Kvm;
use memslots::uffd::{
    Cause, Event, FaultKind, Features, Messages, Modes, RegisterError, Uffd, Wake,
};
use memslots::{
    Backing, HugePageSize, HugePool, MapError, Mapping, MemoryKind, Memslots, NewSlot, PAGE_SIZE,
    PunchError, SlotFlags, fake::FakeHost,
};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryRegion};

const PAGE: HugePageSize = HugePageSize::MIB_2;
const SIZE: u64 = 2 * PAGE.bytes();

/// Whether there are pages for the test; says so if not.
fn has_pages(pages: u64) -> bool {
    let has = HugePool::of_host(PAGE).is_some_and(|pool| pool.available() >= pages);
    if !has {
        eprintln!("NOT TRIED: this host has no pool of 2 MiB pages, and lends none");
    }
    has
}

fn backings() -> [Backing; 4] {
    [
        Backing::hugetlb(SIZE, PAGE),
        Backing::hugetlb_memfd(SIZE, PAGE),
        Backing::hugetlb(SIZE, PAGE).guarded(),
        Backing::hugetlb_memfd(SIZE, PAGE).guarded(),
    ]
}

#[test]
fn pages_are_reserved_when_mapped_and_given_back_when_unmapped() {
    let _pool = pool::Overcommit::raise(2);
    if !has_pages(2) {
        return;
    }
    for backing in backings() {
        let before = HugePool::of_host(PAGE).unwrap();
        let mapping = Mapping::new(&backing, GuestAddress(0x1000)).unwrap();
        assert_eq!((mapping.page_size(), mapping.size()), (PAGE.bytes(), SIZE));
        assert_eq!(mapping.host().0 as u64 % PAGE.bytes(), 0);
        let during = HugePool::of_host(PAGE).unwrap();
        assert_eq!(during.reserved, before.reserved + 2, "{backing:?}");
        assert_eq!(during.available(), before.available() - 2);
        // All of the pool is promised: who comes late is told, with the numbers.
        let wanted = during.available() + 1;
        let error = Mapping::new(
            &Backing::hugetlb(wanted * PAGE.bytes(), PAGE),
            GuestAddress(0),
        )
        .unwrap_err();
        assert!(matches!(error, MapError::NoHugePages { .. }), "{error}");
        let text = error.to_string();
        let plural = if wanted == 1 { "" } else { "s" };
        let start = format!(
            "{wanted} huge page{plural} of 2 MiB wanted, {} to be had",
            wanted - 1
        );
        assert!(text.starts_with(&start), "{text}");
        assert!(
            text.ends_with("raise /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"),
            "{text}"
        );
        drop(mapping);
        assert_eq!(HugePool::of_host(PAGE).unwrap(), before);
    }
}

#[test]
fn a_pool_of_gigantic_pages_that_is_empty_is_shown() {
    let page = HugePageSize::GIB_1;
    let Some(pool) = HugePool::of_host(page) else {
        eprintln!("NOT TRIED: this host has no pages of 1 GiB");
        return;
    };
    let wanted = pool.available() + 1;
    for backing in [
        Backing::hugetlb(wanted << 30, page),
        Backing::hugetlb_memfd(wanted << 30, page),
    ] {
        let error = Mapping::new(&backing, GuestAddress(0)).unwrap_err();
        let plural = if wanted == 1 { "" } else { "s" };
        let start = format!(
            "{wanted} huge page{plural} of 1 GiB wanted, {} to be had",
            pool.available()
        );
        assert!(error.to_string().starts_with(&start), "{error}");
    }
    if pool.available() > 0 {
        let mapping = Mapping::new(&Backing::hugetlb(1 << 30, page), GuestAddress(0)).unwrap();
        assert_eq!(
            (mapping.page_size(), mapping.host().0 % (1 << 30)),
            (1 << 30, 0)
        );
    }
}

#[test]
fn a_slot_of_huge_pages_is_memory_to_both_sides_and_its_page_size_is_told() {
    let _pool = pool::Overcommit::raise(2);
    if !has_pages(2) {
        return;
    }
    for backing in backings() {
        let vm = Arc::new(
            Kvm::new()
                .expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out")
                .create_vm()
                .unwrap(),
        );
        let memslots = Memslots::new(vm);
        let backing = backing.prefault(NonZeroUsize::new(2).unwrap());
        let slot = memslots
            .create(GuestAddress(0), backing, SlotFlags::LOG_DIRTY_PAGES)
            .unwrap();
        let snapshot = memslots.snapshot();
        snapshot.write_obj(7u64, GuestAddress(SIZE - 8)).unwrap();
        assert_eq!(snapshot.read_obj::<u64>(GuestAddress(SIZE - 8)).unwrap(), 7);
        let region = snapshot.by_id(slot.extent().id()).unwrap();
        assert_eq!(region.mapping().page_size(), PAGE.bytes());
        assert_eq!(
            region.mapping().file().is_some(),
            region.file_offset().is_some()
        );
    }
}

#[test]
fn huge_pages_are_brought_whole_and_zeros_are_copied() {
    let _pool = pool::Overcommit::raise(2);
    if !has_pages(2) {
        return;
    }
    for backing in [
        Backing::hugetlb(SIZE, PAGE),
        Backing::hugetlb_memfd(SIZE, PAGE),
    ] {
        let memory = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
        let uffd = Uffd::open(Features::NONE, Features::NONE)
            .expect("this test needs a userfaultfd: run it as root, or as the error says");
        let small = uffd
            .register(&memory, 0..PAGE_SIZE, Modes::MISSING)
            .unwrap_err();
        assert!(
            matches!(
                small,
                RegisterError::Range {
                    page_size: 0x20_0000,
                    ..
                }
            ),
            "{small}"
        );
        let registration = uffd
            .register_all(&memory, Modes::MISSING | Modes::WRITE_PROTECT)
            .unwrap();
        let pager = registration.lend_fill().unwrap();
        let toucher = thread::spawn({
            let memory = Arc::clone(&memory);
            move || {
                let byte = |offset: u64| (memory.host().0 + offset as usize) as *const u8;
                // SAFETY: within the mapping.
                unsafe {
                    (
                        byte(0x12_3456).read_volatile(),
                        byte(PAGE.bytes() + 1).read_volatile(),
                    )
                }
            }
        });
        let mut messages = Messages::with_capacity(1);
        let mut page_of_next_fault = || {
            uffd.wait(None).unwrap();
            uffd.read(&mut messages).unwrap();
            let Some(Event::Fault(fault)) = messages.next() else {
                panic!("a message that nothing here causes")
            };
            assert_eq!(fault.kind, FaultKind::Missing);
            pager.page_of(fault.address).unwrap()
        };
        assert_eq!(page_of_next_fault(), 0);
        let part = pager
            .copy(0, &[1; PAGE_SIZE as usize], Wake::Now)
            .unwrap_err();
        assert_eq!(part.cause, Cause::OutOfRange);
        let page = vec![9; PAGE.bytes() as usize];
        pager.copy(0, &page, Wake::Now).unwrap();
        assert_eq!(page_of_next_fault(), PAGE.bytes());
        pager.zero(PAGE.bytes()..SIZE, Wake::Now).unwrap();
        assert_eq!(toucher.join().unwrap(), (9, 0));
    }
}

#[test]
fn a_huge_page_is_cut_into_a_read_only_slot_and_ram_and_only_a_whole_one_is_given_back() {
    let _pool = pool::Overcommit::raise(2);
    if !has_pages(2) {
        return;
    }
    // The firmware at the end of the first page, as at the end of the first 4 GiB; RAM before it, and behind it.
    let firmware = PAGE.bytes() - 0x1_0000..PAGE.bytes();
    for backing in [
        Backing::hugetlb(SIZE, PAGE),
        Backing::hugetlb_memfd(SIZE, PAGE),
    ] {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        let memslots = Memslots::new(vm);
        let whole = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
        let slot = |range: &Range<u64>, flags| NewSlot {
            start: GuestAddress(range.start),
            backing: Backing::part(&whole, range.start, range.end - range.start),
            flags,
        };
        let slots = memslots.create_all([
            slot(&(0..firmware.start), SlotFlags::NONE),
            slot(&firmware, SlotFlags::READ_ONLY),
            slot(&(PAGE.bytes()..SIZE), SlotFlags::NONE),
        ]);
        let slots = slots.unwrap();
        let (snapshot, ram) = (memslots.snapshot(), memslots.ram());
        let at = GuestAddress(firmware.start);
        snapshot.write_obj(7u64, at).unwrap();
        ram.memory().write_obj(8u64, at).unwrap_err();
        ram.memory()
            .write_obj(9u64, GuestAddress(SIZE - 8))
            .unwrap();
        let region = snapshot.find(at).unwrap();
        assert_eq!(
            (region.page_size(), region.mapping().kind()),
            (PAGE.bytes(), whole.kind())
        );
        let punch =
            |range: Range<u64>| ram.punch(&[GuestAddress(range.start)..GuestAddress(range.end)]);
        let part_of_a_page = punch(0..firmware.start).unwrap_err();
        assert!(
            matches!(part_of_a_page, PunchError::Unaligned { address, .. } if address == at.0),
            "{part_of_a_page}"
        );
        assert_eq!(punch(PAGE.bytes()..SIZE).unwrap(), PAGE.bytes());
        assert_eq!(snapshot.read_obj::<u64>(GuestAddress(SIZE - 8)).unwrap(), 0);
        assert_eq!(snapshot.read_obj::<u64>(at).unwrap(), 7);

        // As long as a page, and none: from the middle of one to the middle of the next.
        let half = GuestAddress(PAGE.bytes() / 2);
        let middle = memslots.create(
            GuestAddress(1 << 30),
            Backing::part(&whole, half.0, PAGE.bytes()),
            SlotFlags::NONE,
        );
        let middle = middle.unwrap().keep().guest_range();
        let snapshot = memslots.snapshot();
        let no_page = snapshot.find(GuestAddress(middle.start)).unwrap();
        let refused = punch(middle.clone()).unwrap_err();
        assert!(
            matches!(refused, PunchError::Unaligned { address, .. } if address == middle.start),
            "{refused}"
        );
        let threads = NonZeroUsize::MIN;
        let uffd = Uffd::open(Features::NONE, Features::NONE).unwrap();
        for mapping in [region.mapping(), no_page.mapping()] {
            let refused = uffd.register_all(mapping, Modes::MISSING);
            let at = mapping.host();
            assert!(matches!(refused, Err(RegisterError::Range { host, .. }) if host == at));
            mapping.prefault(0..0, threads).unwrap_err();
        }
        let last = slots[2].extent().start();
        let mapping = snapshot.find(last).unwrap().mapping();
        drop(uffd.register_all(mapping, Modes::MISSING).unwrap());
        mapping.prefault(0..PAGE.bytes(), threads).unwrap();

        // Pages are counted from the host's: in a part that begins in the middle of one, a whole one begins there too.
        let rest = Backing::part(&whole, half.0, SIZE - half.0);
        let rest = Mapping::new(&rest, GuestAddress(2 << 30)).unwrap();
        rest.prefault(half.0..half.0 + PAGE.bytes(), threads)
            .unwrap();
        rest.prefault(0..PAGE.bytes(), threads).unwrap_err();
    }
}

#[test]
fn a_private_view_of_a_file_of_huge_pages_is_not_given_back_as_it_would_show_the_file() {
    let _pool = pool::Overcommit::raise(2);
    if !has_pages(2) {
        return;
    }
    let shared = Backing::hugetlb_memfd(PAGE.bytes(), PAGE);
    let shared = Mapping::new(&shared, GuestAddress(0)).unwrap();
    let file = shared.file().unwrap().arc().clone();
    // SAFETY: within the mapping, and a u64 is aligned there.
    unsafe { (shared.host().0 as *mut u64).write_volatile(0x55) };
    let memslots = Memslots::<()>::new(FakeHost::new(8));
    let private = Backing::file_private(file, 0, PAGE.bytes());
    let _slot = memslots
        .create(GuestAddress(0), private, SlotFlags::NONE)
        .unwrap();
    let snapshot = memslots.snapshot();
    for word in [0x55_u64, 0x77] {
        // As the file has it, and as a page of its own has it.
        snapshot.write_obj(word, GuestAddress(0)).unwrap();
        let refused = memslots
            .ram()
            .punch(&[GuestAddress(0)..GuestAddress(PAGE.bytes())]);
        let Err(PunchError::Unsupported { source, .. }) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(source.kind, MemoryKind::HugetlbFilePrivate);
        assert_eq!(snapshot.read_obj::<u64>(GuestAddress(0)).unwrap(), word);
    }
}
