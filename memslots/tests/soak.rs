// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two readers and a writer: every answer is right for the moment at which it was given, and memory never goes away
//! under a reader. `LONG_TESTS=1` makes it a minute.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{Backing, Memslots, PAGE_SIZE, SlotFlags};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

#[test]
fn readers_are_always_right_while_slots_come_go_and_move() {
    // By rounds, or by the clock where that is asked for.
    let end = std::env::var_os("LONG_TESTS").map(|_| Instant::now() + Duration::from_secs(60));
    let memslots = Memslots::new(FakeHost::new(64));
    let stop = AtomicBool::new(false);
    // Each slot's first bytes say where it is; a moved one is rewritten after the move, so it may say the old place.
    let write = |at: GuestAddress| memslots.snapshot().write_obj(at.0, at).unwrap();
    let place = |index: u64| GuestAddress(index * 16 * PAGE_SIZE);
    std::thread::scope(|scope| {
        let readers = StopReaders(&stop);
        let vcpu = || {
            let mut reader = memslots.reader();
            while !stop.load(Ordering::Relaxed) {
                let table = reader.enter();
                for region in table.regions() {
                    let start = region.extent().start();
                    let found = table.translate(start).unwrap();
                    assert_eq!(found.slot, region.extent().id());
                    assert_eq!(found.host, region.extent().host_start());
                    let says = table.read_obj::<u64>(start).unwrap();
                    assert_eq!(
                        says % (16 * PAGE_SIZE),
                        0,
                        "memory of a slot, and not of something else"
                    );
                }
            }
        };
        let device = || {
            let ram = memslots.ram();
            while !stop.load(Ordering::Relaxed) {
                let memory = ram.memory();
                for index in 0..8 {
                    if let Ok(says) = memory.read_obj::<u64>(place(index)) {
                        assert_eq!(says % (16 * PAGE_SIZE), 0);
                    }
                }
            }
        };
        scope.spawn(vcpu);
        scope.spawn(device);
        let mut slots: Vec<Option<memslots::Slot>> = (0..8).map(|_| None).collect();
        let mut round = 0u64;
        while end.map_or(round < 4_000, |end| Instant::now() < end) {
            let index = (round * 5 + round / 7) % 8;
            let entry = &mut slots[index as usize];
            match entry.take() {
                None => {
                    let backing = Backing::anonymous((1 + round % 3) * PAGE_SIZE);
                    *entry = Some(
                        memslots
                            .create(place(index), backing, SlotFlags::NONE)
                            .unwrap(),
                    );
                    write(place(index));
                }
                Some(mut slot) if round.is_multiple_of(3) => {
                    let to = place(8 + index);
                    drop(slot.relocate(to).unwrap());
                    write(to);
                    drop(slot.relocate(place(index)).unwrap());
                    *entry = Some(slot);
                }
                Some(slot) if round.is_multiple_of(2) => slot.remove().unwrap().wait(),
                Some(slot) => drop(slot),
            }
            round += 1;
        }
        drop(readers);
    });
    assert_eq!(memslots.available(), 64);
}

/// Stops the readers however the writer ends: a panic of the writer fails the test, and does not hang it.
struct StopReaders<'a>(&'a AtomicBool);

impl Drop for StopReaders<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
