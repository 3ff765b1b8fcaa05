// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver for tests: guest memory, a bus, and rings that it writes as a guest would, rightly or wrongly.
//!
//! It panics where a test would.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a part of tests, in a module of its own so that tests outside of this crate have it as well"
)]

use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use io_bus::{BusKind, Dispatcher, Interrupter, IoBus, IoRange, Outcome, Registration};
use memslots::fake::FakeHost;
use memslots::{Backing, Slot, SlotFlags};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::device::{Memory, VirtioDevice};
use super::interrupt::DriverLink;
use super::mmio::{MmioDevice, MmioState, NoDoorbells, Place};
use super::registers::{
    ACKNOWLEDGE, CONFIG, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, TRANSPORT_FEATURES,
};
use crate::memory::{Memslots, slots_of};

/// Where the device's registers are.
const BASE: u64 = 0xc000_0000;
/// Guest memory, from 0.
pub const MEMORY: u64 = 64 << 20;
/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A descriptor as it is in memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// The buffer.
    pub address: u64,
    /// Its length.
    pub len: u32,
    /// `VRING_DESC_F_…`
    pub flags: u16,
    /// With `NEXT`.
    pub next: u16,
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A request that was made available.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its first descriptor.
    pub head: u16,
    /// The buffers for the device to write.
    pub writable: Vec<(GuestAddress, u32)>,
}

/// A virtqueue, the driver's side.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

/// A vCPU that accesses the device.
pub struct Vcpu(Dispatcher);

impl Vcpu {
    /// Reads `data.len()` bytes at an offset from the registers' begin. Nothing that a device refuses.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        let outcome = self.0.read(BusKind::Mmio, BASE + offset, data);
        assert_eq!(outcome, Outcome::Answered);
    }

    /// Writes. [`Outcome::Deferred`]: the answer is to be waited for.
    pub fn begin_write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        self.0.write(BusKind::Mmio, BASE + offset, data)
    }

    /// Waits for the answer to a write that was deferred; [`Outcome::Deferred`] where an [`Interrupter`] ended that.
    pub fn end_write(&mut self, data: &[u8]) -> Outcome {
        self.0.wait_write(data)
    }

    /// The answer to a write that was deferred, if it is there.
    pub fn poll_write(&mut self, data: &[u8]) -> Outcome {
        self.0.poll_write(data)
    }

    /// What ends its wait.
    pub fn interrupter(&self) -> Interrupter {
        self.0.interrupter()
    }

    /// Writes, and waits for an answer that is deferred.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let mut outcome = self.begin_write(offset, data);
        while outcome == Outcome::Deferred {
            outcome = self.end_write(data);
        }
        assert_eq!(outcome, Outcome::Answered);
    }

    /// Reads a register.
    pub fn register(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }
}

/// A device, its machine and its driver.
pub struct FakeDriver<D: VirtioDevice> {
    /// The device.
    pub device: MmioDevice<D>,
    memslots: Memslots,
    slots: Vec<Slot>,
    _registration: Registration,
    bus: IoBus,
    vcpu: Vcpu,
    interrupts: Arc<(Mutex<u64>, Condvar)>,
    seen: u64,
    rings: Vec<Ring>,
    /// Memory from here on is nobody's.
    free: u64,
}

impl<D: VirtioDevice> FakeDriver<D> {
    /// A machine with `device` after reset.
    pub fn new(device: D) -> Self {
        Self::with(|place| MmioDevice::new(device, place))
    }

    /// A machine with what `make` makes in its place.
    pub fn with(make: impl FnOnce(Place) -> MmioDevice<D>) -> Self {
        let memslots = slots_of(FakeHost::new(8));
        let backing = Backing::anonymous(MEMORY);
        let slot = memslots.create(GuestAddress(0), backing, SlotFlags::NONE);
        Self::in_machine(memslots, vec![slot.unwrap()], make)
    }

    /// Another device of the same machine, whose driver uses the upper half of memory.
    pub fn beside<E: VirtioDevice>(&self, device: E) -> FakeDriver<E> {
        let memslots = self.memslots.clone();
        let mut other =
            FakeDriver::in_machine(memslots, Vec::new(), |place| MmioDevice::new(device, place));
        other.free = MEMORY / 2;
        other
    }

    fn in_machine(
        memslots: Memslots,
        slots: Vec<Slot>,
        make: impl FnOnce(Place) -> MmioDevice<D>,
    ) -> Self {
        let interrupts = Arc::new((Mutex::new(0), Condvar::new()));
        let edge = interrupts.clone();
        let place = Place {
            name: "test0".into(),
            ram: memslots.ram(),
            driver: DriverLink::new(move || {
                *edge.0.lock().unwrap() += 1;
                edge.1.notify_all();
            }),
            doorbells: Box::new(NoDoorbells),
        };
        let device = make(place);
        let bus = IoBus::new();
        let range = IoRange::new(BASE, 0x1000).unwrap();
        let registration = bus.register(BusKind::Mmio, range, device.clone());
        FakeDriver {
            device,
            memslots,
            slots,
            _registration: registration.unwrap(),
            vcpu: Vcpu(bus.dispatcher()),
            bus,
            interrupts,
            seen: 0,
            rings: Vec::new(),
            free: 0x1_0000,
        }
    }

    /// The same guest, with its memory, rings and driver, before a device that was made from `state`: what a restore
    /// does. The old device has been paused.
    pub fn restored(self, state: &MmioState<D::State>, device: D) -> Self {
        let FakeDriver {
            memslots,
            slots,
            rings,
            free,
            ..
        } = self;
        let restored = Self::in_machine(memslots, slots, |place| {
            MmioDevice::from_state(device, place, state)
        });
        FakeDriver {
            rings,
            free,
            ..restored
        }
    }

    /// Guest memory.
    pub fn memory(&self) -> Memory {
        self.memslots.ram().memory()
    }

    /// More memory at an address.
    pub fn add_memory(&mut self, address: u64, len: u64, flags: SlotFlags) {
        let backing = Backing::anonymous(len);
        let slot = self.memslots.create(GuestAddress(address), backing, flags);
        self.slots.push(slot.unwrap());
    }

    /// Another vCPU of the machine.
    pub fn vcpu(&self) -> Vcpu {
        Vcpu(self.bus.dispatcher())
    }

    /// The vCPU that the driver runs on.
    pub fn own_vcpu(&mut self) -> &mut Vcpu {
        &mut self.vcpu
    }

    /// Reads a register.
    pub fn read(&mut self, register: u32) -> u32 {
        self.vcpu.register(register)
    }

    /// Writes a register, and waits for an answer that is deferred.
    pub fn write(&mut self, register: u32, value: u32) {
        self.vcpu.write(register.into(), &value.to_le_bytes());
    }

    /// Reads the configuration space.
    pub fn config(&mut self, offset: u64, data: &mut [u8]) {
        for (at, byte) in data.iter_mut().enumerate() {
            let mut one = [0];
            self.vcpu.read(CONFIG + offset + at as u64, &mut one);
            *byte = one[0];
        }
    }

    /// Writes the configuration space, in one access of up to 8 bytes.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.vcpu.write(CONFIG + offset, data);
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let low = self.read(VIRTIO_MMIO_DEVICE_FEATURES);
        self.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(VIRTIO_MMIO_DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Accepts the device's features in `wanted` and the transport's, sets up all queues in their largest size, and
    /// says that it is ready.
    pub fn start(&mut self, wanted: u64) {
        let features = self.offered() & (wanted | TRANSPORT_FEATURES);
        assert!(self.negotiate(features), "{features:#x} is refused");
        self.set_up_queues();
        self.write(
            VIRTIO_MMIO_STATUS,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        );
    }

    /// Up to `FEATURES_OK`: whether these features are accepted.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for (sel, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            self.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.write(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(VIRTIO_MMIO_STATUS) & FEATURES_OK != 0
    }

    /// Sets up each queue in its largest size.
    pub fn set_up_queues(&mut self) {
        self.rings.clear();
        for queue in 0.. {
            self.write(VIRTIO_MMIO_QUEUE_SEL, queue);
            let size = self.read(VIRTIO_MMIO_QUEUE_NUM_MAX) as u16;
            if size == 0 {
                break;
            }
            let ring = Ring {
                size,
                descriptors: self.allocate(16 * u64::from(size)).0,
                available: self.allocate(6 + 2 * u64::from(size)).0,
                used: self.allocate(6 + 8 * u64::from(size)).0,
                next_descriptor: 0,
                next_available: 0,
                next_used: 0,
            };
            self.set_up_queue(queue, &ring);
            self.rings.push(ring);
        }
    }

    /// Tells the device of a queue, wherever its rings are.
    pub fn set_up_queue(&mut self, queue: u32, ring: &Ring) {
        self.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        self.write(VIRTIO_MMIO_QUEUE_NUM, ring.size.into());
        for (low, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, ring.descriptors),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring.available),
            (VIRTIO_MMIO_QUEUE_USED_LOW, ring.used),
        ] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// The rings of all queues; none before they were set up.
    pub fn rings(&self) -> &[Ring] {
        &self.rings
    }

    /// A queue's rings.
    pub fn ring(&mut self, queue: usize) -> &mut Ring {
        &mut self.rings[queue]
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.write(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.read(VIRTIO_MMIO_STATUS), 0);
    }

    /// Zeroed memory that nobody uses, aligned to 4096.
    pub fn allocate(&mut self, len: u64) -> GuestAddress {
        let address = self.free;
        self.free = (address + len).next_multiple_of(4096);
        assert!(
            self.free <= MEMORY,
            "the test wants more than {MEMORY} bytes"
        );
        let zeros = vec![0; len as usize];
        let at = GuestAddress(address);
        self.memory().write_slice(&zeros, at).unwrap();
        at
    }

    /// Makes a request available: buffers with these contents to read, then buffers of these lengths to write. Does
    /// not notify.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Request {
        let mut descriptors = Vec::new();
        let mut room = Vec::new();
        for bytes in readable {
            let at = self.allocate(bytes.len() as u64);
            self.memory().write_slice(bytes, at).unwrap();
            descriptors.push((at, bytes.len() as u32, 0));
        }
        for len in writable {
            let at = self.allocate((*len).into());
            descriptors.push((at, *len, VRING_DESC_F_WRITE as u16));
            room.push((at, *len));
        }
        let chain: Vec<_> = descriptors
            .iter()
            .map(|(at, len, flags)| Descriptor {
                address: at.0,
                len: *len,
                flags: *flags,
                next: 0,
            })
            .collect();
        Request {
            head: self.chain(queue, &chain),
            writable: room,
        }
    }

    /// Makes a chain of these descriptors available, linked in order; its head. Does not notify.
    pub fn chain(&mut self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let head = self.put(queue, descriptors);
        self.make_available(queue, head);
        head
    }

    /// The same by an indirect table.
    pub fn indirect(&mut self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let table = self.allocate(16 * descriptors.len() as u64);
        for (at, descriptor) in linked(descriptors, 0, u16::MAX).enumerate() {
            let at = GuestAddress(table.0 + 16 * at as u64);
            self.memory().write_slice(&descriptor.bytes(), at).unwrap();
        }
        let one = Descriptor {
            address: table.0,
            len: 16 * descriptors.len() as u32,
            flags: VRING_DESC_F_INDIRECT as u16,
            next: 0,
        };
        self.chain(queue, &[one])
    }

    /// Writes descriptors into the table, linked in order; the first one's number. Earlier ones are overwritten when
    /// the table is full.
    pub fn put(&mut self, queue: usize, descriptors: &[Descriptor]) -> u16 {
        let ring = self.rings[queue];
        let head = ring.next_descriptor;
        for (at, descriptor) in linked(descriptors, head, ring.size).enumerate() {
            let number = (head + at as u16) % ring.size;
            self.write_descriptor(queue, number, descriptor);
        }
        self.rings[queue].next_descriptor = (head + descriptors.len() as u16) % ring.size;
        head
    }

    /// Writes one descriptor of the table as it is.
    pub fn write_descriptor(&mut self, queue: usize, number: u16, descriptor: Descriptor) {
        let at = GuestAddress(self.rings[queue].descriptors + 16 * u64::from(number));
        self.memory().write_slice(&descriptor.bytes(), at).unwrap();
    }

    /// Puts a head into the available ring. Does not notify.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let entry = ring.available + 4 + 2 * u64::from(ring.next_available % ring.size);
        ring.next_available = ring.next_available.wrapping_add(1);
        let (index, at) = (ring.next_available, ring.available + 2);
        self.memory()
            .write_obj(head.to_le(), GuestAddress(entry))
            .unwrap();
        self.memory()
            .store(
                index.to_le(),
                GuestAddress(at),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// Notifies of a queue.
    pub fn notify(&mut self, queue: usize) {
        self.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// A used chain, if there is one: its head and what was written.
    pub fn take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let memory = self.memory();
        let ring = &mut self.rings[queue];
        let index: u16 = memory
            .load(
                GuestAddress(ring.used + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .unwrap();
        if u16::from_le(index) == ring.next_used {
            return None;
        }
        let entry = ring.used + 4 + 8 * u64::from(ring.next_used % ring.size);
        ring.next_used = ring.next_used.wrapping_add(1);
        // With event indices: interrupt at the next one.
        let event = ring.available + 4 + 2 * u64::from(ring.size);
        memory
            .write_obj(ring.next_used.to_le(), GuestAddress(event))
            .unwrap();
        // Before the index is read again: with the device's own fence, one of the two sees the other's write.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let id: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((u32::from_le(id) as u16, u32::from_le(len)))
    }

    /// Waits for a used chain, by interrupts.
    pub fn used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.take_used(queue) {
                return used;
            }
            self.wait_interrupt();
        }
    }

    /// Waits until the device has interrupted since the last wait, and acknowledges.
    pub fn wait_interrupt(&mut self) -> u32 {
        let deadline = Instant::now() + PATIENCE;
        let mut count = self.interrupts.0.lock().unwrap();
        while *count == self.seen {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "the device has not interrupted in {PATIENCE:?}"
            );
            count = self.interrupts.1.wait_timeout(count, left).unwrap().0;
        }
        self.seen = *count;
        drop(count);
        let status = self.read(VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    /// How often the device has interrupted.
    pub fn interrupts(&self) -> u64 {
        *self.interrupts.0.lock().unwrap()
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&mut self) {
        while self.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET == 0 {
            self.wait_interrupt();
        }
    }

    /// What is at an address.
    pub fn bytes(&self, address: GuestAddress, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory().read_slice(&mut bytes, address).unwrap();
        bytes
    }
}

/// The descriptors linked in order, the first of them number `head` of a table of `size`.
fn linked(
    descriptors: &[Descriptor],
    head: u16,
    size: u16,
) -> impl Iterator<Item = Descriptor> + '_ {
    let last = descriptors.len().saturating_sub(1);
    descriptors.iter().enumerate().map(move |(at, descriptor)| {
        let mut linked = *descriptor;
        if at < last {
            linked.flags |= VRING_DESC_F_NEXT as u16;
            linked.next = (head + at as u16 + 1) % size;
        }
        linked
    })
}
