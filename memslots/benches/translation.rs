// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Translation and access against vm-memory's own `GuestMemoryMmap`; cached access against a raw pointer; what a
//! publication and a slot cost. `cargo bench -p memslots --bench translation`, and a part of a group's title for that
//! group alone (`search`, `read_obj`, `cached`, `flag`, …).
//!
//! What a group compares takes turns, a fraction of a millisecond each: on a machine that others use as well, minutes
//! are not alike, and means that were taken one after the other (criterion's, which this was once) compare those. Of
//! each the least turn is given, in which nobody disturbed, and the quartile, for who would rather have what happens.

#![allow(missing_docs, reason = "a program")]
#![allow(clippy::unwrap_used)]

use memslots::{
    Backing, Errno, HvaCache, MemoryRegion, Memslots, NewSlot, PAGE_SIZE, PrivateRanges, Region,
    SetMemoryRegion, Slot, SlotFlags, SlotHint,
};
use std::hint::black_box;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

/// How many turns everyone has.
const ROUNDS: usize = 400;

/// What is compared. A turn gives the nanoseconds of one operation.
struct Turns<'a> {
    rows: Vec<Row<'a>>,
}

struct Row<'a> {
    name: String,
    turn: Box<dyn FnMut() -> f64 + 'a>,
    times: Vec<f64>,
}

impl<'a> Turns<'a> {
    const fn new() -> Self {
        Self { rows: Vec::new() }
    }

    /// `look` on each of `of`, the loop around it being as small as it can be.
    fn each<T: Copy, R>(
        &mut self,
        name: impl Into<String>,
        of: &'a [T],
        mut look: impl FnMut(T) -> R + 'a,
    ) {
        let turn = move || {
            let start = Instant::now();
            for one in of {
                black_box(look(*one));
            }
            start.elapsed().as_nanos() as f64 / of.len() as f64
        };
        self.rows.push(Row {
            name: name.into(),
            turn: Box::new(turn),
            times: Vec::new(),
        });
    }

    /// Lets all have their turns, and prints them.
    fn run(&mut self, title: &str, arguments: &Arguments) {
        for _ in 0..arguments.rounds {
            for row in &mut self.rows {
                // Once to bring back what the others have driven out of the caches.
                (row.turn)();
                row.times.push((row.turn)());
            }
        }
        println!(
            "\n{title}: ns, the least turn and the quartile of {}",
            arguments.rounds
        );
        for row in &self.rows {
            let (least, quartile) = (quantile(&row.times, 0.0), quantile(&row.times, 0.25));
            println!("  {:<44}{least:>10.2}{quartile:>10.2}", row.name);
        }
    }

    fn times(&self, name: &str) -> &[f64] {
        &self.rows.iter().find(|row| row.name == name).unwrap().times
    }
}

fn quantile(numbers: &[f64], part: f64) -> f64 {
    let mut numbers = numbers.to_vec();
    numbers.sort_by(f64::total_cmp);
    numbers[((numbers.len() - 1) as f64 * part) as usize]
}

/// What the command line asks for.
struct Arguments {
    rounds: usize,
    filter: String,
}

impl Arguments {
    fn new() -> Self {
        let (mut rounds, mut filter) = (1, String::new());
        for argument in std::env::args().skip(1) {
            match argument.as_str() {
                // Cargo's. Without it this is a test that the benches run at all.
                "--bench" => rounds = ROUNDS,
                option if option.starts_with('-') => {}
                part => filter = part.to_owned(),
            }
        }
        Self { rounds, filter }
    }
}

/// A host that says yes and keeps nothing, so that what is measured is ours.
struct YesHost;

impl SetMemoryRegion for YesHost {
    unsafe fn set_memory_region(&self, _region: &MemoryRegion) -> Result<(), Errno> {
        Ok(())
    }

    fn max_slots(&self) -> usize {
        32_764
    }
}

const SIZE: u64 = PAGE_SIZE;

fn address(index: u64) -> GuestAddress {
    GuestAddress(index * 2 * SIZE)
}

/// Addresses in all slots in an order that no prefetcher guesses.
fn addresses(count: u64) -> Vec<GuestAddress> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    (0..1 << 14)
        .map(|_| GuestAddress(address(next() % count).0 + next() % (SIZE - 8)))
        .collect()
}

fn slots(count: u64) -> (Memslots, Vec<Slot>) {
    let memslots = Memslots::<()>::with_policy(YesHost, PrivateRanges::none());
    let new = (0..count).map(|index| NewSlot {
        start: address(index),
        backing: Backing::anonymous(SIZE),
        flags: SlotFlags::NONE,
    });
    let slots = memslots.create_all(new).unwrap();
    (memslots, slots)
}

fn mmap(count: u64) -> GuestMemoryMmap {
    let ranges: Vec<_> = (0..count)
        .map(|index| (address(index), SIZE as usize))
        .collect();
    GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap()
}

/// Which slot: nothing but the search.
fn search(title: &str, arguments: &Arguments) {
    const COUNTS: [u64; 5] = [1, 4, 32, 512, 32_000];
    let memories = COUNTS.map(|count| {
        // 32,000 mappings twice are more than a process may have.
        let mmap = (count <= 512).then(|| mmap(count));
        (count, slots(count), mmap, addresses(count))
    });
    let snapshots = memories.each_ref().map(|(_, slots, ..)| slots.0.snapshot());
    let key = |region: &Region| (region.extent().id(), region.extent().host_start());
    let keys: Vec<Vec<_>> = memories
        .iter()
        .zip(&snapshots)
        .map(|((.., addresses), table)| {
            addresses
                .iter()
                .map(|at| key(table.find(*at).unwrap()))
                .collect()
        })
        .collect();

    let mut turns = Turns::new();
    turns.each("an empty loop", &memories[0].3, |at| at);
    for (((count, (memslots, _), mmap, addresses), table), keys) in
        memories.iter().zip(&snapshots).zip(&keys)
    {
        let name = |name: &str| format!("{name}, {count}");
        turns.each(name("SlotTable::find"), addresses, |at| {
            table.find(at).is_some()
        });
        turns.each(name("SlotTable::translate"), addresses, |at| {
            table.translate(at).map(|found| found.host)
        });
        let mut reader = memslots.reader();
        turns.each(
            name("Reader, enter, translate, leave"),
            addresses,
            move |at| reader.enter().translate(at).map(|found| found.host),
        );
        turns.each(name("SlotTable::by_id"), keys, |(id, _)| {
            table.by_id(id).is_some()
        });
        turns.each(name("SlotTable::hva_to_gpa"), keys, |(_, host)| {
            table.hva_to_gpa(host).is_some()
        });
        if let Some(mmap) = mmap {
            turns.each(name("GuestMemoryMmap::find_region"), addresses, |at| {
                mmap.find_region(at).is_some()
            });
            turns.each(name("GuestMemoryMmap::get_host_address"), addresses, |at| {
                mmap.get_host_address(at).ok()
            });
        }
    }
    turns.run(title, arguments);
    for what in ["SlotTable::find", "SlotTable::translate"] {
        let (few, many) = (
            turns.times(&format!("{what}, 512")),
            turns.times(&format!("{what}, 32000")),
        );
        let ratios: Vec<_> = few.iter().zip(many).map(|(few, many)| many / few).collect();
        println!(
            "  {what}: 32,000 slots take {:.2} times what 512 do (least turns), {:.2} in the median round",
            quantile(many, 0.0) / quantile(few, 0.0),
            quantile(&ratios, 0.5),
        );
    }
}

fn access(title: &str, arguments: &Arguments) {
    let memories = [1u64, 4, 512].map(|count| (count, slots(count), mmap(count), addresses(count)));
    let rams = memories.each_ref().map(|(_, slots, ..)| slots.0.ram());
    let held = rams.each_ref().map(|ram| (ram.memory(), ram));
    let snapshots = memories.each_ref().map(|(_, slots, ..)| slots.0.snapshot());
    let mut turns = Turns::new();
    for (index, (count, _, mmap, addresses)) in memories.iter().enumerate() {
        let (snapshot, (checked, ram)) = (&snapshots[index], &held[index]);
        let mut reader = ram.reader();
        // One closure for each kind of memory, read or written.
        macro_rules! measure {
            ($name:literal, $memory:expr) => {
                let name = format!("{}, {count}", $name);
                if title == "write_obj" {
                    turns.each(name, addresses, move |at| {
                        $memory.write_obj(black_box(7u64), at).unwrap()
                    });
                } else {
                    turns.each(name, addresses, move |at| {
                        $memory.read_obj::<u64>(at).unwrap()
                    });
                }
            };
        }
        measure!("SlotTable", snapshot);
        measure!("CheckedMemory", checked);
        measure!("Reader, CheckedView", reader.enter().checked());
        measure!("GuestRam::memory each time", ram.memory());
        measure!("GuestMemoryMmap", mmap);
    }
    turns.run(title, arguments);
}

/// The same range over and over, at changing offsets.
fn cached(title: &str, arguments: &Arguments) {
    const LENGTH: usize = 0x800;
    let (memslots, _slots) = slots(512);
    let snapshot = memslots.snapshot();
    let base = GuestAddress(address(77).0 + 0x100);
    let mut state = 1usize;
    let offsets: Vec<usize> = (0..1 << 14)
        .map(|_| {
            state = state.wrapping_mul(25_214_903_917).wrapping_add(11);
            (state >> 16) % (LENGTH - 8)
        })
        .collect();

    let table = &*snapshot;
    let raw = table.get_host_address(base).unwrap();
    let raw_read = |base: *const u8, length: usize, offset: usize| {
        if offset > length || length - offset < size_of::<u64>() {
            return None;
        }
        // SAFETY: within the range, which the slot has and the snapshot keeps mapped; a u64 has no invalid value.
        Some(unsafe { base.add(offset).cast::<u64>().read_unaligned() })
    };
    let mut turns = Turns::new();
    turns.each("raw pointer add and bounds check", &offsets, |offset| {
        raw_read(black_box(raw), black_box(LENGTH), offset)
    });
    let mut cache = HvaCache::new(base, LENGTH);
    turns.each("HvaCache::read_obj", &offsets, move |offset| {
        cache.read_obj::<u64>(table, offset).ok()
    });
    let mut cache = HvaCache::new(base, LENGTH);
    let mut reader = memslots.reader();
    turns.each("Reader, HvaCache::read_obj", &offsets, move |offset| {
        cache.read_obj::<u64>(&reader.enter(), offset).ok()
    });
    let mut hint = SlotHint::new();
    let at = move |offset: usize| GuestAddress(base.0 + offset as u64);
    turns.each("SlotHint::translate", &offsets, move |offset| {
        hint.translate(table, at(offset)).map(|found| found.host)
    });
    turns.each("SlotTable::translate", &offsets, move |offset| {
        table.translate(at(offset)).map(|found| found.host)
    });
    turns.run(title, arguments);
}

fn flag(title: &str, arguments: &Arguments) {
    let mut memories = [4u64, 512, 32_000].map(|count| (count, slots(count)));
    let mut turns = Turns::new();
    for (count, (memslots, slots)) in &mut memories {
        println!(
            "{count} slots: {} bytes a slot in the table",
            memslots.snapshot().memory() as u64 / *count
        );
        let slot = &mut slots[(*count / 2) as usize];
        let flags = &[SlotFlags::LOG_DIRTY_PAGES, SlotFlags::NONE];
        turns.each(format!("among {count}"), flags, |flags| {
            drop(slot.set_flags(flags).unwrap());
        });
    }
    turns.run(title, arguments);
}

fn create(title: &str, arguments: &Arguments) {
    let memslots = Memslots::new(YesHost);
    let mut turns = Turns::new();
    turns.each("Memslots on no host", &[(); 8], |()| {
        let (start, backing) = (GuestAddress(1 << 32), Backing::anonymous(6 << 30));
        memslots.create(start, backing, SlotFlags::NONE).unwrap()
    });
    turns.each("GuestMemoryMmap", &[(); 8], |()| {
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(1 << 32), 6 << 30)]).unwrap()
    });
    turns.run(title, arguments);
}

/// Measures and prints, under a title.
type Group = fn(&str, &Arguments);

fn main() {
    let arguments = Arguments::new();
    let groups: [(&str, Group); 6] = [
        ("search", search),
        ("read_obj", access),
        ("write_obj", access),
        ("cached", cached),
        ("one slot's flag changed, without KVM", flag),
        ("create and drop, 6 GiB", create),
    ];
    for (title, group) in groups {
        if title.contains(&arguments.filter) {
            group(title, &arguments);
        }
    }
}
