// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's side of a virtio console: buffers, and the control messages.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;
use std::time::Duration;

use reference_vmm::devices::virtio::console::{Console, ConsoleState, F_MULTIPORT, F_SIZE};
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use vm_memory::{Bytes, GuestAddress};

/// A test that waits longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The queue by which the device sends control messages.
pub const CONTROL_IN: usize = 2;
/// The queue by which the driver does.
pub const CONTROL_OUT: usize = 3;

/// A buffer's length.
const ROOM: usize = 64 << 10;
/// Buffers of a queue.
const SLOTS: usize = 64;

/// Control messages as bytes.
pub mod says {
    use reference_vmm::devices::virtio::console::control::*;

    fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
        let message = Message { port, event, value };
        message.to_bytes().to_vec()
    }

    pub fn device_ready(value: u16) -> Vec<u8> {
        message(0, DEVICE_READY, value)
    }
    pub fn add(port: u32) -> Vec<u8> {
        message(port, PORT_ADD, 1)
    }
    pub fn port_ready(port: u32, value: u16) -> Vec<u8> {
        message(port, PORT_READY, value)
    }
    pub fn console(port: u32) -> Vec<u8> {
        message(port, CONSOLE_PORT, 1)
    }
    pub fn open(port: u32, value: u16) -> Vec<u8> {
        message(port, PORT_OPEN, value)
    }
    pub fn name(port: u32, name: &str) -> Vec<u8> {
        [&message(port, PORT_NAME, 1)[..], name.as_bytes()].concat()
    }
    pub fn resize(port: u32, cols: u16, rows: u16) -> Vec<u8> {
        let size = [cols.to_le_bytes(), rows.to_le_bytes()].concat();
        [message(port, RESIZE, 1), size].concat()
    }
}

/// A guest with a console.
pub struct Guest {
    pub driver: FakeDriver<Console>,
    /// Each queue's buffers, and which is next.
    buffers: HashMap<usize, (u64, usize)>,
    /// Where the chain of a queue and head has its buffer.
    chains: HashMap<(usize, u16), u64>,
    /// Control buffers that the device has.
    posted: usize,
}

impl Guest {
    pub fn new(device: Console) -> Self {
        Guest {
            driver: FakeDriver::new(device),
            buffers: HashMap::new(),
            chains: HashMap::new(),
            posted: 0,
        }
    }

    /// Accepts all features.
    pub fn start(&mut self) {
        self.posted = 0;
        self.driver.start(1 << F_SIZE | 1 << F_MULTIPORT);
    }

    /// Starts, and has a port ready and open.
    pub fn open_port(&mut self, port: u32) {
        self.start();
        self.say(says::device_ready(1));
        while self.hear() != says::add(port) {}
        self.say(says::port_ready(port, 1));
        assert_eq!(self.hear(), says::name(port, "agent"));
        self.say(says::open(port, 1));
    }

    /// In another process: pauses, takes the state as text, and goes on with the device that `make` gives.
    pub fn restore(self, make: impl FnOnce(&ConsoleState) -> Console) -> Self {
        assert!(self.driver.device.pause(PATIENCE));
        let state = self.driver.device.state().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let state = serde_json::from_str(&text).unwrap();
        let device = {
            let state: &reference_vmm::devices::virtio::mmio::MmioState<ConsoleState> = &state;
            make(&state.device)
        };
        let driver = self.driver.restored(&state, device);
        driver.device.resume();
        Guest { driver, ..self }
    }

    fn buffer(&mut self, queue: usize) -> u64 {
        let driver = &mut self.driver;
        let new = || (driver.allocate((ROOM * SLOTS) as u64).0, 0);
        let (base, next) = self.buffers.entry(queue).or_insert_with(new);
        let at = *base + (*next * ROOM) as u64;
        *next = (*next + 1) % SLOTS;
        at
    }

    fn chain(&mut self, queue: usize, address: u64, len: usize, flags: u32) {
        let one = Descriptor {
            address,
            len: len as u32,
            flags: flags as u16,
            next: 0,
        };
        let head = self.driver.chain(queue, &[one]);
        self.chains.insert((queue, head), address);
    }

    /// Has the device read this, later.
    pub fn send_later(&mut self, queue: usize, bytes: &[u8]) {
        let at = self.buffer(queue);
        let memory = self.driver.memory();
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.chain(queue, at, bytes.len(), 0);
    }

    /// Has the device read this, and waits until it has.
    pub fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.send_later(queue, bytes);
        self.driver.notify(queue);
        self.driver.used(queue);
    }

    /// Gives the device a buffer, later.
    pub fn post_later(&mut self, queue: usize, len: u32) {
        let at = self.buffer(queue);
        self.chain(queue, at, len as usize, VRING_DESC_F_WRITE);
    }

    /// Gives the device a buffer.
    pub fn post(&mut self, queue: usize, len: u32) {
        self.post_later(queue, len);
        self.driver.notify(queue);
    }

    fn contents(&mut self, queue: usize, (head, len): (u16, u32)) -> Vec<u8> {
        let at = self.chains[&(queue, head)];
        self.driver.bytes(GuestAddress(at), len as usize)
    }

    /// What the device has written, waited for.
    pub fn got(&mut self, queue: usize) -> Vec<u8> {
        let used = self.driver.used(queue);
        self.contents(queue, used)
    }

    /// What the device has written, if it has.
    pub fn got_now(&mut self, queue: usize) -> Option<Vec<u8>> {
        let used = self.driver.take_used(queue)?;
        Some(self.contents(queue, used))
    }

    /// Sends a control message.
    pub fn say(&mut self, message: impl AsRef<[u8]>) {
        self.send(CONTROL_OUT, message.as_ref());
    }

    /// The next control message, waited for.
    pub fn hear(&mut self) -> Vec<u8> {
        if self.posted == 0 {
            self.post(CONTROL_IN, 256);
            self.posted = 1;
        }
        self.posted = 0;
        self.got(CONTROL_IN)
    }

    /// No more control messages are to come, of what has happened so far.
    #[track_caller]
    pub fn quiet(&mut self) {
        if self.posted == 0 {
            self.post(CONTROL_IN, 256);
            self.posted = 1;
        }
        self.sync();
        assert_eq!(self.got_now(CONTROL_IN), None);
    }

    /// The device has seen what happened before. One round goes behind events that are being served, a second behind
    /// those that were ready.
    pub fn sync(&mut self) {
        for _ in 0..2 {
            self.say(b"");
        }
    }

    /// `ConfigGeneration`.
    pub fn generation(&mut self) -> u32 {
        self.driver.read(VIRTIO_MMIO_CONFIG_GENERATION)
    }

    /// Waits until the device says that its configuration has changed.
    pub fn wait_configuration_change(&mut self) {
        while self.driver.wait_interrupt() & 2 == 0 {}
    }
}
