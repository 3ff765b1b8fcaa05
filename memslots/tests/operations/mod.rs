// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the fuzz target (`fuzz/fuzz_targets/operations.rs`) and the test beside this (`tests/fuzzed.rs`) share: bytes
//! become operations on a [`Memslots`] with a fake host, and a naive model, which is a list of slots and their bytes,
//! says what each must do. Any call of the host may fail, and the call after it too: then what was is what is, or what
//! the layout of before brings back.

use memslots::fake::FakeHost;
use memslots::{
    Backing, ClearGuest, Errno, Error, Gfn, GuestRam, HvaCache, InvalidationSeq, LayoutSlot,
    Memslots, NewSlot, PAGE_SIZE, PrivateRanges, PunchError, Reader, Slot, SlotExtent, SlotFlags,
    SlotHint, SlotTable,
};
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

const PAGE: usize = PAGE_SIZE as usize;
/// Slots lie in the pages below.
const PAGES: u64 = 48;

struct Model {
    slots: Vec<ModelSlot>,
}

struct ModelSlot {
    /// `None`: it is the layout's.
    handle: Option<Slot>,
    extent: SlotExtent,
    name: Option<Name>,
    flags: SlotFlags,
    memfd: bool,
    bytes: Vec<u8>,
}

type Name = u64;

impl ModelSlot {
    fn start(&self) -> u64 {
        self.extent.start().0
    }

    fn range(&self) -> Range<u64> {
        self.start()..self.start() + self.bytes.len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.flags.contains(SlotFlags::READ_ONLY)
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// A slot of a layout, as the input asks for it.
struct Wanted {
    name: Name,
    range: Range<u64>,
    memfd: bool,
    flags: SlotFlags,
}

impl Wanted {
    fn new(input: &mut Input<'_>) -> Self {
        let start = input.below(PAGES) * PAGE_SIZE;
        let kind = input.byte();
        Self {
            name: kind % 4,
            range: start..start + (1 + kind / 4 % 4) * PAGE_SIZE,
            memfd: (kind / 16).is_multiple_of(8),
            flags: SlotFlags::from_bits((kind / 64) as u32),
        }
    }

    fn slot(&self) -> LayoutSlot {
        let size = self.range.end - self.range.start;
        let new = NewSlot {
            start: GuestAddress(self.range.start),
            backing: backing(size, self.memfd),
            flags: self.flags,
        };
        new.named(self.name.to_string())
    }

    fn has_backing_of(&self, old: &ModelSlot) -> bool {
        let size = self.range.end - self.range.start;
        (size, self.memfd) == (old.bytes.len() as u64, old.memfd)
    }
}

fn backing(size: u64, memfd: bool) -> Backing {
    match memfd {
        true => Backing::memfd(size),
        false => Backing::anonymous(size),
    }
}

impl Model {
    fn byte(&mut self, address: u64) -> Option<(&mut u8, bool)> {
        let slot = self
            .slots
            .iter_mut()
            .find(|slot| slot.extent.contains(GuestAddress(address)))?;
        let offset = (address - slot.start()) as usize;
        let read_only = slot.is_read_only();
        Some((&mut slot.bytes[offset], read_only))
    }

    fn is_writable(&mut self, range: Range<u64>) -> bool {
        range
            .into_iter()
            .all(|address| self.byte(address).is_some_and(|(_, read_only)| !read_only))
    }

    /// As far as it goes; whether that is all.
    fn write(&mut self, address: u64, data: &[u8]) -> bool {
        for (from, address) in data.iter().zip(address..) {
            let Some((to, false)) = self.byte(address) else {
                return false;
            };
            *to = *from;
        }
        true
    }

    fn read(&mut self, address: u64, count: usize) -> Option<Vec<u8>> {
        (address..address + count as u64)
            .map(|address| self.byte(address).map(|(byte, _)| *byte))
            .collect()
    }
}

/// The bytes of the input, then zeros.
struct Input<'a>(std::slice::Iter<'a, u8>);

impl Input<'_> {
    fn byte(&mut self) -> u64 {
        self.0.next().copied().unwrap_or(0).into()
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.byte() % limit
    }

    /// An address in the pages that there are, or a little beyond, more often than not near the border of two pages.
    fn address(&mut self) -> u64 {
        let near = self.byte().wrapping_sub(128) as i8;
        (self.below(PAGES + 2) * PAGE_SIZE).saturating_add_signed(near.into())
    }
}

struct Run {
    host: FakeHost,
    memslots: Memslots,
    ram: GuestRam,
    reader: Reader<SlotTable>,
    model: Model,
    caches: Vec<HvaCache>,
    hint: SlotHint,
    /// A number taken, and whether something was punched since.
    seq: (InvalidationSeq, bool),
}

/// Does what `input` says, and panics where the crate and the model differ.
pub fn run(input: &[u8]) {
    let host = FakeHost::new(12);
    let memslots = Memslots::with_policy(host.clone(), PrivateRanges::none());
    let mut run = Run {
        ram: memslots.ram(),
        reader: memslots.reader(),
        seq: (memslots.snapshot().invalidations().sequence(), false),
        host,
        memslots,
        model: Model { slots: Vec::new() },
        // Within a page, across two, and large.
        caches: [
            (0x10, 64),
            (3 * PAGE_SIZE - 24, 48),
            (8 * PAGE_SIZE, 3 * PAGE),
        ]
        .map(|(address, length)| HvaCache::new(GuestAddress(address), length))
        .into(),
        hint: SlotHint::new(),
    };
    let mut input = Input(input.iter());
    while input.0.len() > 0 {
        run.step(&mut input);
    }
    run.compare();
}

impl Run {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(14) {
            0 | 1 => self.create(input),
            2 => self.delete(input),
            3 => self.relocate(input),
            4 => self.set_flags(input),
            5 | 12 | 13 => self.set_layout(input),
            6 | 7 => {
                let (address, value) = (input.address(), input.byte() as u8);
                let data = vec![value; input.byte() as usize + 1];
                let written = self.ram.memory().write_slice(&data, GuestAddress(address));
                assert_eq!(written.is_ok(), self.model.write(address, &data));
            }
            8 => {
                let (address, count) = (input.address(), 32 * input.byte() as usize + 1);
                let range = address..address + count as u64;
                let cleared = self
                    .reader
                    .enter()
                    .checked()
                    .clear(GuestAddress(address), count);
                let legal = self.model.is_writable(range);
                assert_eq!(cleared.is_ok(), legal);
                if legal {
                    self.model.write(address, &vec![0; count]);
                }
            }
            9 => self.punch(input),
            10 => self.cached(input),
            _ => self.compare(),
        }
    }

    /// One that has a handle.
    fn pick(&self, input: &mut Input<'_>) -> Option<usize> {
        let slots = self.model.slots.iter().enumerate();
        let owned: Vec<_> = slots
            .filter_map(|(index, slot)| slot.handle.is_some().then_some(index))
            .collect();
        let count = owned.len() as u64;
        (count > 0).then(|| owned[input.below(count) as usize])
    }

    /// Lets one of the next calls fail, now and then, and perhaps the one after it as well; says if it might.
    fn perhaps_fail(&self, input: &mut Input<'_>) -> bool {
        let byte = input.byte();
        let fails = byte.is_multiple_of(4);
        if fails {
            let call = (byte / 4 % 8) as usize;
            self.host.fail(call, Errno(libc::ENOMEM));
            if byte >= 128 {
                self.host.fail(call + 1, Errno(libc::EIO));
            }
        }
        fails
    }

    fn create(&mut self, input: &mut Input<'_>) {
        let start = input.below(PAGES) * PAGE_SIZE;
        let size = (1 + input.below(6)) * PAGE_SIZE;
        let flags = SlotFlags::from_bits(input.below(4) as u32);
        let memfd = input.below(8) == 0;
        let range = start..start + size;
        let free = !self
            .model
            .slots
            .iter()
            .any(|slot| overlap(&slot.range(), &range));
        let fails = self.perhaps_fail(input);
        let created = self
            .memslots
            .create(GuestAddress(start), backing(size, memfd), flags);
        self.host.fail_no_more();
        match created {
            Ok(handle) => {
                assert!(free);
                self.model.slots.push(ModelSlot {
                    extent: handle.extent().clone(),
                    handle: Some(handle),
                    name: None,
                    flags,
                    memfd,
                    bytes: vec![0; size as usize],
                });
            }
            Err(Error::Kvm { .. }) => assert!(free && fails),
            Err(Error::NoFreeId { .. }) => {}
            Err(error) => assert!(!free, "{error}"),
        }
    }

    fn delete(&mut self, input: &mut Input<'_>) {
        let Some(index) = self.pick(input) else {
            return;
        };
        let fails = self.perhaps_fail(input);
        let slot = &mut self.model.slots[index];
        drop(slot.handle.take());
        self.host.fail_no_more();
        let id = slot.extent.id();
        if self.host.slots().iter().any(|(there, _)| *there == id) {
            // Refused: it stays, and is the next layout's.
            assert!(fails);
        } else {
            self.model.slots.swap_remove(index);
        }
    }

    fn relocate(&mut self, input: &mut Input<'_>) {
        let to = input.below(PAGES) * PAGE_SIZE;
        let Some(index) = self.pick(input) else {
            return;
        };
        let fails = self.perhaps_fail(input);
        let range = to..to + self.model.slots[index].bytes.len() as u64;
        let mut others = self.model.slots.iter().enumerate();
        let free = !others.any(|(other, slot)| other != index && overlap(&slot.range(), &range));
        let slot = &mut self.model.slots[index];
        let handle = slot.handle.as_mut().unwrap();
        let moved = handle.relocate(GuestAddress(to)).map(drop);
        self.host.fail_no_more();
        match moved {
            Ok(()) => assert!(free && handle.extent().start().0 == to),
            Err(error) => {
                assert!(!free || fails, "{error}");
                assert_eq!(*handle.extent(), slot.extent);
            }
        }
        slot.extent = handle.extent().clone();
    }

    fn set_flags(&mut self, input: &mut Input<'_>) {
        let flags = SlotFlags::from_bits(input.below(4) as u32);
        let Some(index) = self.pick(input) else {
            return;
        };
        let fails = self.perhaps_fail(input);
        let slot = &mut self.model.slots[index];
        // KVM has no change of the read-only flag.
        let legal = slot.is_read_only() == flags.contains(SlotFlags::READ_ONLY);
        let handle = slot.handle.as_mut().unwrap();
        let set = handle.set_flags(flags).map(drop);
        self.host.fail_no_more();
        match set {
            Ok(()) => {
                assert!(legal);
                slot.flags = flags;
            }
            Err(error) => assert!(!legal || fails, "{error}"),
        }
        assert_eq!(handle.flags(), slot.flags);
    }

    fn set_layout(&mut self, input: &mut Input<'_>) {
        let wanted: Vec<_> = (0..input.below(5)).map(|_| Wanted::new(input)).collect();
        let fails = self.perhaps_fail(input);
        let before = self.memslots.layout();
        let layout = wanted.iter().map(Wanted::slot).collect();
        let applied = self.memslots.set_layout(&layout);
        self.host.fail_no_more();
        let owned = self.model.slots.iter().filter(|slot| slot.handle.is_some());
        let taken: Vec<_> = owned.map(ModelSlot::range).collect();
        let legal = wanted.iter().enumerate().all(|(index, slot)| {
            let mut earlier = wanted[..index].iter();
            !earlier.any(|other| other.name == slot.name || overlap(&other.range, &slot.range))
                && !taken.iter().any(|range| overlap(range, &slot.range))
        });
        match applied {
            Ok(applied) => {
                assert!(legal);
                self.is_laid(&wanted, &applied.extents);
                // Something to lose in each.
                let mark = [input.byte() as u8 | 1; 16];
                for slot in wanted {
                    let at = slot.range.start;
                    let written = self.ram.memory().write_slice(&mark, GuestAddress(at));
                    assert_eq!(written.is_ok(), self.model.write(at, &mark));
                }
            }
            Err(Error::Kvm { .. }) => assert!(legal && fails),
            Err(Error::Undo { .. }) => {
                assert!(legal && fails);
                // No memory is lost: asked for again, what was is there.
                let applied = self.memslots.set_layout(&before).unwrap();
                for extent in applied.extents {
                    let start = extent.start().0;
                    let mut slots = self.model.slots.iter_mut();
                    let same =
                        |slot: &&mut ModelSlot| slot.handle.is_none() && slot.start() == start;
                    slots.find(same).unwrap().extent = extent;
                }
                self.compare();
            }
            Err(Error::NoFreeId { .. }) => {}
            Err(error) => assert!(!legal, "{error}"),
        }
    }

    /// A memory is the same if it has the same backing and the same name, or else the same place, if one of the two has
    /// no name; all other memory is new, and zeros.
    fn is_laid(&mut self, wanted: &[Wanted], extents: &[SlotExtent]) {
        let all = std::mem::take(&mut self.model.slots);
        let (owned, mut old): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|slot| slot.handle.is_some());
        self.model.slots = owned;
        let mut kept: Vec<Option<ModelSlot>> = wanted.iter().map(|_| None).collect();
        for by_name in [true, false] {
            for (slot, kept) in wanted.iter().zip(&mut kept) {
                let same = |old: &ModelSlot| {
                    let same = match by_name {
                        true => old.name == Some(slot.name),
                        false => old.name.is_none() && old.start() == slot.range.start,
                    };
                    same && slot.has_backing_of(old)
                };
                if kept.is_none()
                    && let Some(index) = old.iter().position(same)
                {
                    *kept = Some(old.swap_remove(index));
                }
            }
        }
        assert_eq!(wanted.len(), extents.len());
        for ((slot, kept), extent) in wanted.iter().zip(kept).zip(extents) {
            let size = slot.range.end - slot.range.start;
            assert_eq!((extent.start().0, extent.size()), (slot.range.start, size));
            self.model.slots.push(ModelSlot {
                handle: None,
                extent: extent.clone(),
                name: Some(slot.name),
                flags: slot.flags,
                memfd: slot.memfd,
                bytes: kept.map_or_else(|| vec![0; size as usize], |kept| kept.bytes),
            });
        }
    }

    fn punch(&mut self, input: &mut Input<'_>) {
        let mut ranges = Vec::new();
        for _ in 0..input.below(3) {
            let start = input.below(PAGES) * PAGE_SIZE + input.below(16) / 15;
            ranges.push(start..start + input.below(5) * PAGE_SIZE);
        }
        let legal = ranges.iter().all(|range| {
            range.start % PAGE_SIZE == 0
                && !range.is_empty()
                && self.model.is_writable(range.clone())
        });
        let asked: Vec<_> = ranges
            .iter()
            .map(|range| GuestAddress(range.start)..GuestAddress(range.end))
            .collect();
        match self.ram.punch(&asked) {
            Ok(done) => {
                assert!(legal);
                assert_eq!(
                    done,
                    ranges
                        .iter()
                        .map(|range| range.end - range.start)
                        .sum::<u64>()
                );
                self.seq.1 |= done > 0;
                for range in ranges {
                    let zeros = vec![0; (range.end - range.start) as usize];
                    self.model.write(range.start, &zeros);
                }
            }
            Err(PunchError::Host { .. }) => panic!("the host does not refuse"),
            Err(_) => assert!(!legal),
        }
    }

    fn cached(&mut self, input: &mut Input<'_>) {
        let cache = &mut self.caches[input.below(3) as usize];
        let offset = (input.byte() * 37) as usize % (cache.length() + 2);
        let at = cache.address().0 + offset as u64;
        let inside = offset + 8 <= cache.length();
        let table = self.reader.enter();
        if input.below(2) == 0 {
            let value = input.byte() * 0x0101_0101_0101_0101;
            let written = cache.write_obj(&table, offset, value);
            let legal = inside && self.model.write(at, &value.to_ne_bytes());
            assert_eq!(written.is_ok(), legal);
        } else {
            let read = cache.read_obj::<u64>(&table, offset).ok();
            let expected = self.model.read(at, 8).filter(|_| inside);
            assert_eq!(read.map(|value| value.to_ne_bytes().to_vec()), expected);
        }
        let whole = self.model.read(cache.address().0, cache.length());
        assert_eq!(cache.check(&table).is_ok(), whole.is_some());
    }

    /// Everything that can be asked.
    fn compare(&mut self) {
        let table = self.reader.enter();
        assert_eq!(table.num_regions(), self.model.slots.len());
        assert_eq!(self.host.slots().len(), self.model.slots.len());
        for page in 0..PAGES + 6 {
            let address = GuestAddress(page * PAGE_SIZE + 7);
            let found = table.translate(address);
            assert_eq!(self.hint.translate(&table, address), found);
            let slot = self
                .model
                .slots
                .iter()
                .find(|slot| slot.extent.contains(address));
            let expected = slot.map(|slot| {
                let extent = &slot.extent;
                (extent.id(), extent.hva(address), !slot.is_read_only())
            });
            assert_eq!(
                found.map(|found| (found.slot, Some(found.host), found.writable)),
                expected
            );
            assert_eq!(table.is_visible(Gfn(page)), slot.is_some());
            if let Some(found) = found {
                assert_eq!(table.hva_to_gpa(found.host), Some((found.slot, address)));
            }
        }
        for slot in &self.model.slots {
            let extent = &slot.extent;
            let region = table.by_id(extent.id());
            assert_eq!(region.map(|region| region.extent()), Some(extent));
            let mut bytes = vec![0; slot.bytes.len()];
            table.read_slice(&mut bytes, extent.start()).unwrap();
            assert!(bytes == slot.bytes, "the contents of {}", extent.id());
        }
        let (seq, punched) = self.seq;
        assert_eq!(table.invalidations().retry(seq, Gfn(0)..Gfn(1)), punched);
        self.seq = (table.invalidations().sequence(), false);
    }
}
