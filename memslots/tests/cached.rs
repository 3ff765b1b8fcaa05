// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translations that are kept: right after any change, harmless in the wrong hands, and nothing is kept alive by them.
//! (Random use of them, against a model: `fuzzed.rs`; beside writers: `punch.rs`.)

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Backing, Gfn, HvaCache, HvaError, Memslots, PAGE_SIZE, PrivateRanges, Slot, SlotFlags, SlotHint,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryRegion};

const START: GuestAddress = GuestAddress(0x4000);

fn machine(pages: u64, flags: SlotFlags) -> (Memslots, Slot) {
    let memslots = Memslots::with_policy(FakeHost::new(8), PrivateRanges::none());
    let slot = memslots
        .create(START, Backing::anonymous(pages * PAGE_SIZE), flags)
        .unwrap();
    (memslots, slot)
}

fn is_read_only(error: &GuestMemoryError) -> bool {
    let GuestMemoryError::IOError(error) = error else {
        return false;
    };
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    error.kind() == std::io::ErrorKind::PermissionDenied && inner == Some(&HvaError::ReadOnly)
}

#[test]
fn a_cache_follows_its_slot_and_keeps_nothing_alive() {
    let (memslots, mut slot) = machine(1, SlotFlags::NONE);
    let mut reader = memslots.reader();
    let (mut cache, mut hint) = (HvaCache::new(START, 8), SlotHint::new());
    cache.write_obj(&reader.enter(), 0, 7u64).unwrap();
    let host = cache.hva(&reader.enter()).unwrap().0;
    assert_eq!(hint.translate(&reader.enter(), START).unwrap().host, host);

    slot.relocate(GuestAddress(0x8000)).unwrap().wait();
    assert!(cache.read_obj::<u64>(&reader.enter(), 0).is_err());
    assert_eq!(cache.hva(&reader.enter()), None);
    assert_eq!(hint.translate(&reader.enter(), START), None);
    slot.relocate(START).unwrap().wait();
    assert_eq!(cache.read_obj::<u64>(&reader.enter(), 0).unwrap(), 7);

    let region = Arc::downgrade(reader.enter().find(START).unwrap());
    slot.remove().unwrap().wait();
    assert!(
        region.upgrade().is_none(),
        "gone, though the cache and the hint are there"
    );
    assert!(cache.read_obj::<u64>(&reader.enter(), 0).is_err());
    assert!(cache.check(&reader.enter()).is_err());
}

#[test]
fn a_cache_in_the_hands_of_another_vm_reads_that_vms_memory() {
    // The same layout and the same generation, twice.
    let (one, _slot) = machine(1, SlotFlags::NONE);
    let (other, _other) = machine(1, SlotFlags::NONE);
    assert_eq!(one.generation(), other.generation());
    let (mut cache, mut hint) = (HvaCache::new(START, 8), SlotHint::new());
    cache.write_obj(&one.snapshot(), 0, 1u64).unwrap();
    cache.write_obj(&other.snapshot(), 0, 2u64).unwrap();
    for (memslots, value) in [(&one, 1), (&other, 2)] {
        let table = memslots.snapshot();
        assert_eq!(table.read_obj::<u64>(START).unwrap(), value);
        assert_eq!(cache.read_obj::<u64>(&table, 0).unwrap(), value);
        assert_eq!(hint.translate(&table, START), table.translate(START));
    }
    let empty = Memslots::new(FakeHost::new(8));
    assert_eq!(hint.translate(&empty.snapshot(), START), None);
    assert!(cache.read_obj::<u64>(&empty.snapshot(), 0).is_err());
}

#[test]
fn a_read_only_slot_refuses_and_bounds_and_alignment_hold() {
    let (memslots, _slot) = machine(1, SlotFlags::READ_ONLY);
    let table = memslots.snapshot();
    let mut cache = HvaCache::new(GuestAddress(START.0 + 4), 16);
    let order = Ordering::Relaxed;
    assert!(is_read_only(&cache.write_obj(&table, 0, 1u32).unwrap_err()));
    assert!(is_read_only(
        &cache.write_slice(&table, 0, &[1]).unwrap_err()
    ));
    assert!(is_read_only(
        &cache.store(&table, 0, 1u32, order).unwrap_err()
    ));
    assert_eq!(cache.read_obj::<u32>(&table, 12).unwrap(), 0);
    assert_eq!(cache.load::<u32>(&table, 0, order).unwrap(), 0);
    assert!(cache.load::<u32>(&table, 1, order).is_err(), "misaligned");
    for offset in [13, 16, 17, usize::MAX] {
        assert!(cache.read_obj::<u32>(&table, offset).is_err(), "{offset}");
        assert!(cache.read_slice(&table, offset, &mut [0; 4]).is_err());
    }
    assert_eq!(cache.slice(&table).unwrap().len(), 16);
    assert!(!cache.hva(&table).unwrap().1);
    assert_eq!(table.host_page_size(Gfn::containing(START)), PAGE_SIZE);
}

#[test]
fn a_range_across_two_slots_is_accessed_whole_and_cached_by_none() {
    let (memslots, _slot) = machine(1, SlotFlags::NONE);
    let border = GuestAddress(START.0 + PAGE_SIZE);
    let _next = memslots
        .create(border, Backing::anonymous(PAGE_SIZE), SlotFlags::NONE)
        .unwrap();
    let table = memslots.snapshot();
    let mut cache = HvaCache::new(GuestAddress(border.0 - 4), 8);
    cache.check(&table).unwrap();
    assert_eq!(cache.hva(&table), None);
    cache
        .write_obj(&table, 0, 0x1122_3344_5566_7788u64)
        .unwrap();
    assert_eq!(
        cache.read_obj::<u64>(&table, 0).unwrap(),
        0x1122_3344_5566_7788
    );
    assert_eq!(table.read_obj::<u32>(border).unwrap(), 0x1122_3344);
}

#[test]
fn a_bitmap_hears_of_a_cached_write() {
    let memslots = Memslots::<AtomicBitmap>::with_policy(FakeHost::new(8), PrivateRanges::none());
    let backing = Backing::anonymous(4 * PAGE_SIZE);
    let _slot = memslots.create(START, backing, SlotFlags::NONE).unwrap();
    let table = memslots.snapshot();
    let mut cache = HvaCache::new(GuestAddress(START.0 + PAGE_SIZE), 2 * PAGE_SIZE as usize);
    cache.write_obj(&table, PAGE_SIZE as usize, 1u8).unwrap();
    let region = table.find(START).unwrap();
    let dirty = |page: u64| region.bitmap().dirty_at((page * PAGE_SIZE) as usize);
    assert_eq!([0, 1, 2, 3].map(dirty), [false, false, true, false]);
}
