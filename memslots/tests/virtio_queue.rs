// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-queue 0.18 at work on this crate's memory: a driver's side written by hand, a device's side by `Queue`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{Backing, Memslots, NewSlot, PAGE_SIZE, Slot, SlotFlags};
use std::io::{Read, Write};
use std::ops::Deref;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory};

const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const ROM: u64 = 4 * PAGE_SIZE;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// RAM in two slots that meet at page 2, and a ROM.
fn machine() -> (Memslots, Vec<Slot>) {
    let memslots = Memslots::new(FakeHost::new(8));
    let slot = |page: u64, flags| NewSlot {
        start: GuestAddress(page * PAGE_SIZE),
        backing: Backing::anonymous(2 * PAGE_SIZE),
        flags,
    };
    let none = SlotFlags::NONE;
    let slots = memslots
        .create_all([slot(0, none), slot(2, none), slot(4, SlotFlags::READ_ONLY)])
        .unwrap();
    (memslots, slots)
}

fn queue() -> Queue {
    let mut queue = Queue::new(16).unwrap();
    queue.set_size(16);
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    queue
}

/// The driver: a chain of a request to be read and a buffer for the answer, made available as number `count`.
fn offer(memory: &impl GuestMemory, count: u16, request: (u64, u32), answer: (u64, u32)) {
    let descriptors = [(request, NEXT, 1u16), (answer, WRITE, 0)];
    for (index, ((address, length), flags, next)) in descriptors.into_iter().enumerate() {
        let at = TABLE + 16 * index as u64;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }
    let entry = GuestAddress(AVAILABLE + 4 + 2 * u64::from((count - 1) % 16));
    memory.write_obj(0u16, entry).unwrap();
    memory
        .write_obj(count, GuestAddress(AVAILABLE + 2))
        .unwrap();
}

/// The device: upper case of what was asked. The bytes written, or the error's text.
fn serve<M>(queue: &mut Queue, memory: M) -> Result<usize, String>
where
    M: Clone + Deref,
    M::Target: GuestMemory + Sized,
{
    let chain = queue.pop_descriptor_chain(memory.clone()).unwrap();
    let head = chain.head_index();
    let mut request = Vec::new();
    let mut reader = chain
        .clone()
        .reader(&*memory)
        .map_err(|error| error.to_string())?;
    reader
        .read_to_end(&mut request)
        .map_err(|error| error.to_string())?;
    let mut writer = chain.writer(&*memory).map_err(|error| error.to_string())?;
    let result = writer
        .write_all(&request.to_ascii_uppercase())
        .map_err(|error| error.to_string());
    queue
        .add_used(&*memory, head, writer.bytes_written() as u32)
        .map_err(|error| error.to_string())?;
    result.map(|()| writer.bytes_written())
}

#[test]
fn a_queue_is_served_through_the_live_handle_and_through_a_devices_own_reader() {
    let (memslots, _slots) = machine();
    let (ram, mut queue) = (memslots.ram(), queue());
    let mut reader = ram.reader();
    // The request lies across the border of two slots, the answer too.
    let border = 2 * PAGE_SIZE;
    for round in 1..=40u16 {
        let memory = ram.memory();
        memory
            .write_slice(b"a request", GuestAddress(border - 4))
            .unwrap();
        offer(
            &*memory,
            round,
            (border - 4, 9),
            (border + PAGE_SIZE - 5, 9),
        );
        memory
            .write_slice(&[0; 9], GuestAddress(border + PAGE_SIZE - 5))
            .unwrap();
        let written = if round % 2 == 0 {
            serve(&mut queue, ram.memory())
        } else {
            let table = reader.enter();
            serve(&mut queue, &table.checked())
        };
        assert_eq!(written, Ok(9));
        let mut answer = [0; 9];
        memory
            .read_slice(&mut answer, GuestAddress(border + PAGE_SIZE - 5))
            .unwrap();
        assert_eq!(&answer, b"A REQUEST");
        assert_eq!(
            memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(),
            round
        );
    }
}

#[test]
fn a_guest_that_has_the_device_write_into_rom_or_nowhere_gets_an_error_and_an_intact_rom() {
    let (memslots, slots) = machine();
    memslots
        .snapshot()
        .write_slice(b"rom", GuestAddress(ROM))
        .unwrap();
    let (ram, mut queue) = (memslots.ram(), queue());
    offer(&*ram.memory(), 1, (0x1000, 3), (ROM, 3));
    let refused = serve(&mut queue, ram.memory());
    assert!(refused.is_err(), "{refused:?}");
    let mut rom = [0; 3];
    ram.memory()
        .read_slice(&mut rom, GuestAddress(ROM))
        .unwrap();
    assert_eq!(&rom, b"rom");

    offer(&*ram.memory(), 2, (0x1000, 3), (2 * PAGE_SIZE, 3));
    drop(slots.into_iter().nth(1)); // into_iter drops the others as well: all memory is gone
    assert!(queue.pop_descriptor_chain(ram.memory()).is_none());
}
