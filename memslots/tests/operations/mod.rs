// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the fuzz target (`fuzz/fuzz_targets/operations.rs`) and the test beside this (`tests/fuzzed.rs`) share: bytes
//! become operations on a [`Memslots`] with a fake host, and a naive model, which is a list of slots and their bytes,
//! says what each must do.

use memslots::fake::FakeHost;
use memslots::{
    Backing, ClearGuest, Errno, Gfn, GuestRam, HvaCache, InvalidationSeq, Memslots, PAGE_SIZE,
    PrivateRanges, PunchError, Reader, Slot, SlotFlags, SlotHint, SlotTable,
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
    handle: Slot,
    read_only: bool,
    bytes: Vec<u8>,
}

impl ModelSlot {
    fn start(&self) -> u64 {
        self.handle.extent().start().0
    }
}

impl Model {
    fn byte(&mut self, address: u64) -> Option<(&mut u8, bool)> {
        let slot = self
            .slots
            .iter_mut()
            .find(|slot| slot.handle.extent().contains(GuestAddress(address)))?;
        let offset = (address - slot.start()) as usize;
        Some((&mut slot.bytes[offset], slot.read_only))
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
        match input.below(12) {
            0 | 1 => self.create(input),
            2 => {
                if let Some(slot) = self.pick(input) {
                    // Dropped, which deletes it.
                    self.model.slots.swap_remove(slot);
                }
            }
            3 => {
                let to = GuestAddress(input.below(PAGES) * PAGE_SIZE);
                if let Some(slot) = self.pick(input) {
                    let _ = self.model.slots[slot].handle.relocate(to);
                }
            }
            4 => {
                let flags = SlotFlags::from_bits(input.below(4) as u32);
                if let Some(slot) = self.pick(input) {
                    let _ = self.model.slots[slot].handle.set_flags(flags);
                }
            }
            5 => {
                self.host.fail(input.below(3) as usize, Errno(libc::ENOMEM));
                self.create(input);
                self.host.fail_no_more();
            }
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

    fn pick(&self, input: &mut Input<'_>) -> Option<usize> {
        let count = self.model.slots.len() as u64;
        (count > 0).then(|| input.below(count) as usize)
    }

    fn create(&mut self, input: &mut Input<'_>) {
        let start = GuestAddress(input.below(PAGES) * PAGE_SIZE);
        let size = (1 + input.below(6)) * PAGE_SIZE;
        let flags = SlotFlags::from_bits(input.below(4) as u32);
        let backing = if input.below(8) == 0 {
            Backing::memfd(size)
        } else {
            Backing::anonymous(size)
        };
        if let Ok(handle) = self.memslots.create(start, backing, flags) {
            self.model.slots.push(ModelSlot {
                handle,
                read_only: flags.contains(SlotFlags::READ_ONLY),
                bytes: vec![0; size as usize],
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
                .find(|slot| slot.handle.extent().contains(address));
            let expected = slot.map(|slot| {
                let extent = slot.handle.extent();
                (extent.id(), extent.hva(address), !slot.read_only)
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
            let extent = slot.handle.extent();
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
