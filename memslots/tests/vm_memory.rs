// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The three views of vm-memory 0.18: the snapshot for loaders, the checked view for devices, the live handle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use linux_loader::loader::{Elf, KernelLoader};
use memslots::fake::FakeHost;
use memslots::{
    Backing, CheckedMemory, ClearGuest, HvaError, Memslots, NewSlot, PAGE_SIZE, PrivateRanges,
    SlotFlags,
};
use std::io::Cursor;
use std::sync::atomic::Ordering;
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, MemoryRegionAddress, Permissions,
};

fn slot(page: u64, pages: u64, flags: SlotFlags) -> NewSlot {
    NewSlot {
        start: GuestAddress(page * PAGE_SIZE),
        backing: Backing::anonymous(pages * PAGE_SIZE),
        flags,
    }
}

/// RAM in pages 0..4, more RAM in 4..8 (another slot), a ROM in 8..10, nothing above.
fn machine() -> (Memslots, Vec<memslots::Slot>) {
    let memslots = Memslots::new(FakeHost::new(8));
    let new = [
        slot(0, 4, SlotFlags::NONE),
        slot(4, 4, SlotFlags::NONE),
        slot(8, 2, SlotFlags::READ_ONLY),
    ];
    let slots = memslots.create_all(new).unwrap();
    (memslots, slots)
}

const BORDER: GuestAddress = GuestAddress(4 * PAGE_SIZE);
const ROM: GuestAddress = GuestAddress(8 * PAGE_SIZE);
const END: GuestAddress = GuestAddress(10 * PAGE_SIZE);

fn is_read_only(error: &GuestMemoryError) -> bool {
    let GuestMemoryError::IOError(error) = error else {
        return false;
    };
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<HvaError>());
    error.kind() == std::io::ErrorKind::PermissionDenied && inner == Some(&HvaError::ReadOnly)
}

/// An ELF64 executable for x86-64 with one segment, `contents` at `load_at`.
fn elf(load_at: u64, contents: &[u8]) -> Vec<u8> {
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    image.extend([2u16, 62].iter().flat_map(|n| n.to_le_bytes())); // ET_EXEC, x86-64
    image.extend(1u32.to_le_bytes());
    image.extend([load_at, 64, 0].iter().flat_map(|n| n.to_le_bytes())); // entry, program headers, sections
    image.extend(0u32.to_le_bytes());
    image.extend([64u16, 56, 1, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
    image.extend([1u32, 5].iter().flat_map(|n| n.to_le_bytes())); // PT_LOAD, R+X
    let length = contents.len() as u64;
    image.extend(
        [120, load_at, load_at, length, length, 4096]
            .iter()
            .flat_map(|n| n.to_le_bytes()),
    );
    image.extend(contents);
    image
}

#[test]
fn linux_loader_loads_an_elf_into_a_snapshot_across_slots_and_into_a_rom() {
    let (memslots, _slots) = machine();
    let snapshot = memslots.snapshot();
    let code: Vec<u8> = (0..=255).cycle().take(5000).collect();
    for at in [GuestAddress(BORDER.0 - 2500), ROM] {
        let mut image = Cursor::new(elf(at.0, &code));
        let loaded = Elf::load(&*snapshot, None, &mut image, Some(GuestAddress(0))).unwrap();
        assert_eq!(loaded.kernel_load, at);
        let mut back = vec![0; code.len()];
        snapshot.read_slice(&mut back, at).unwrap();
        assert!(back == code);
    }
    let mut too_high = Cursor::new(elf(END.0 - 4096, &code));
    assert!(Elf::load(&*snapshot, None, &mut too_high, None).is_err());
}

#[test]
fn accesses_cross_slots_and_end_where_memory_ends() {
    let (memslots, _slots) = machine();
    let memory = memslots.ram().memory();
    let data: Vec<u8> = (0..200).collect();
    let at = GuestAddress(BORDER.0 - 100);
    memory.write_slice(&data, at).unwrap();
    let mut back = vec![0; 200];
    memory.read_slice(&mut back, at).unwrap();
    assert_eq!(back, data);
    assert_eq!(
        memory
            .get_slices(at, 200, Permissions::ReadWrite)
            .unwrap()
            .map(|slice| slice.unwrap().len())
            .collect::<Vec<_>>(),
        [100, 100]
    );
    assert!(matches!(
        memory.read_obj::<u64>(END),
        Err(GuestMemoryError::InvalidGuestAddress(END))
    ));
    let cut = memory
        .read_slice(&mut back, GuestAddress(END.0 - 50))
        .unwrap_err();
    assert!(
        matches!(
            cut,
            GuestMemoryError::PartialBuffer {
                expected: 200,
                completed: 50
            }
        ),
        "{cut}"
    );
    memory
        .store(7u32, GuestAddress(8), Ordering::Release)
        .unwrap();
    assert_eq!(
        memory
            .load::<u32>(GuestAddress(8), Ordering::Acquire)
            .unwrap(),
        7
    );
    assert!(
        memory
            .store(7u32, GuestAddress(9), Ordering::Release)
            .is_err(),
        "misaligned"
    );
    assert!(memory.read_obj::<u64>(GuestAddress(u64::MAX - 3)).is_err());
    assert_eq!(memory.write(&[], END).unwrap(), 0);
}

#[test]
fn a_device_reads_a_rom_and_cannot_write_it() {
    let (memslots, _slots) = machine();
    memslots.snapshot().write_obj(0x55aau16, ROM).unwrap();
    let memory = memslots.ram().memory();
    assert_eq!(memory.read_obj::<u16>(ROM).unwrap(), 0x55aa);
    assert!(is_read_only(&memory.write_obj(1u16, ROM).unwrap_err()));
    assert!(is_read_only(
        &memory.store(1u16, ROM, Ordering::Relaxed).unwrap_err()
    ));
    let from = &mut Cursor::new(vec![1u8; 8]);
    assert!(
        memory
            .read_exact_volatile_from(ROM, &mut from.get_ref().as_slice(), 8)
            .is_err()
    );
    assert!(is_read_only(&memory.clear(ROM, 2).unwrap_err()));
    assert_eq!(memory.read_obj::<u16>(ROM).unwrap(), 0x55aa);
    assert!(memory.check_range(ROM, 16, Permissions::Read));
    assert!(!memory.check_range(ROM, 16, Permissions::Write));
    assert!(
        memory.physical_memory().is_none(),
        "there is no way around the permissions"
    );
    // From RAM into the ROM: as far as it goes.
    let partial = memory
        .write_slice(&[9; 10], GuestAddress(ROM.0 - 4))
        .unwrap_err();
    assert!(
        matches!(
            partial,
            GuestMemoryError::PartialBuffer {
                expected: 10,
                completed: 4
            }
        ),
        "{partial}"
    );
}

#[test]
fn clear_zeroes_across_slots_or_touches_nothing() {
    let (memslots, _slots) = machine();
    let memory = memslots.ram().memory();
    memory
        .write_slice(&vec![0xff; 8 * 4096], GuestAddress(0))
        .unwrap();
    memory.clear(GuestAddress(100), 6 * 4096).unwrap();
    let mut all = vec![0; 8 * 4096];
    memory.read_slice(&mut all, GuestAddress(0)).unwrap();
    let zeroed = 100..100 + 6 * 4096;
    assert!(
        all.iter()
            .enumerate()
            .all(|(index, byte)| *byte == if zeroed.contains(&index) { 0 } else { 0xff })
    );
    assert!(is_read_only(
        &memory.clear(GuestAddress(ROM.0 - 8), 16).unwrap_err()
    ));
    assert_eq!(
        memory.read_obj::<u64>(GuestAddress(ROM.0 - 8)).unwrap(),
        u64::MAX,
        "none of it"
    );
    memory.clear(END, 0).unwrap();
}

#[test]
fn the_live_handle_sees_changes_and_what_it_gave_before_does_not() {
    let (memslots, mut slots) = machine();
    let ram = memslots.ram();
    let other = ram.clone();
    let before = ram.memory();
    let generation = ram.generation();
    slots.truncate(1);
    assert!(other.memory().read_obj::<u8>(BORDER).is_err());
    assert_eq!(ram.generation(), generation + 2);
    before.write_obj(1u8, BORDER).unwrap(); // mapped as long as `before` is
    assert_eq!(before.clone().read_obj::<u8>(BORDER).unwrap(), 1);
    assert_eq!(
        CheckedMemory::new(memslots.snapshot())
            .table()
            .num_regions(),
        1
    );
}

#[test]
fn a_vcpu_threads_reader_sees_the_slots_without_a_lock() {
    let (memslots, slots) = machine();
    let mut reader = memslots.reader();
    let guard = reader.enter();
    guard.write_obj(3u8, BORDER).unwrap();
    drop(slots);
    assert_eq!(
        guard.read_obj::<u8>(BORDER).unwrap(),
        3,
        "mapped until the reader leaves"
    );
    drop(guard);
    assert_eq!(reader.enter().num_regions(), 0);
}

#[test]
fn a_region_gives_no_slice_beyond_its_end() {
    let (memslots, _slots) = machine();
    let snapshot = memslots.snapshot();
    let region = snapshot.find(ROM).unwrap();
    let size = 2 * PAGE_SIZE;
    let slice =
        |offset: u64, count: u64| region.get_slice(MemoryRegionAddress(offset), count as usize);
    assert_eq!(slice(0, size).unwrap().len() as u64, size);
    assert_eq!(slice(size, 0).unwrap().len(), 0);
    for (offset, count) in [
        (0, size + 1),
        (1, size),
        (size, 1),
        (size + 1, 0),
        (u64::MAX, 2),
        (1, u64::MAX),
    ] {
        assert!(slice(offset, count).is_err(), "{offset:#x}, {count:#x}");
    }
    assert!(
        region
            .get_host_address(MemoryRegionAddress(size - 1))
            .is_ok()
    );
    assert!(region.get_host_address(MemoryRegionAddress(size)).is_err());
}

#[test]
fn a_memfd_slot_can_be_handed_on() {
    let memslots = Memslots::new(FakeHost::new(8));
    let backing = Backing::memfd(3 * PAGE_SIZE);
    let _slot = memslots
        .create(GuestAddress(PAGE_SIZE), backing, SlotFlags::NONE)
        .unwrap();
    let snapshot = memslots.snapshot();
    snapshot
        .write_obj(0xabcdu16, GuestAddress(2 * PAGE_SIZE))
        .unwrap();
    let region = GuestMemoryBackend::iter(&*snapshot).next().unwrap();
    let file = region.file_offset().unwrap();
    let mut there = [0; 2];
    std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut there, file.start() + PAGE_SIZE)
        .unwrap();
    assert_eq!(u16::from_le_bytes(there), 0xabcd);
    assert_eq!(region.len(), 3 * PAGE_SIZE);
    let host = snapshot
        .get_host_address(GuestAddress(2 * PAGE_SIZE))
        .unwrap() as usize;
    assert_eq!(host, region.extent().host_start().0 + PAGE_SIZE as usize);
}

/// A bitmap that counts the bytes marked.
#[derive(Debug, Default)]
struct Count(std::sync::atomic::AtomicUsize);

#[derive(Clone, Debug)]
struct CountSlice<'a>(&'a Count);

impl Bitmap for Count {
    fn mark_dirty(&self, _offset: usize, len: usize) {
        self.0.fetch_add(len, Ordering::Relaxed);
    }
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, _offset: usize) -> CountSlice<'_> {
        CountSlice(self)
    }
}

impl<'a> WithBitmapSlice<'a> for Count {
    type S = CountSlice<'a>;
}

impl<'a> WithBitmapSlice<'a> for CountSlice<'_> {
    type S = Self;
}

impl BitmapSlice for CountSlice<'_> {}

impl Bitmap for CountSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark_dirty(offset, len);
    }
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, _offset: usize) -> Self {
        self.clone()
    }
}

impl NewBitmap for Count {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

#[test]
fn a_bitmap_hears_of_every_write_and_moves_with_its_slot() {
    let memslots = Memslots::<Count>::with_policy(FakeHost::new(8), PrivateRanges::none());
    let mut slot = memslots
        .create(
            GuestAddress(0),
            Backing::anonymous(PAGE_SIZE),
            SlotFlags::NONE,
        )
        .unwrap();
    memslots
        .snapshot()
        .write_slice(&[1; 10], GuestAddress(5))
        .unwrap();
    slot.relocate(GuestAddress(PAGE_SIZE)).unwrap().wait();
    memslots
        .ram()
        .memory()
        .write_slice(&[1; 20], GuestAddress(PAGE_SIZE))
        .unwrap();
    memslots
        .ram()
        .memory()
        .read_slice(&mut [1; 20], GuestAddress(PAGE_SIZE))
        .unwrap();
    let snapshot = memslots.snapshot();
    let region = snapshot.find(GuestAddress(PAGE_SIZE)).unwrap();
    assert_eq!(region.bitmap().0.0.load(Ordering::Relaxed), 30);
}
