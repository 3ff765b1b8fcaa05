// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as what a driver does: register accesses, descriptors, indices, notifications, in any order. libFuzzer's
//! target `virtio` and `virtio_hostile.rs` share it.
//!
//! Whatever the script: no thread of the device panics, it comes to rest when it is told to, it calls its handler for
//! no more than it was notified of, and a reset makes it one that a driver can start.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../virtio_probe/mod.rs"]
pub mod probe;

use reference_vmm::devices::virtio::device::VirtioDevice;
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver, MEMORY};
use reference_vmm::devices::virtio::registers::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET,
};
use reference_vmm::devices::virtio::rng::Rng;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

use probe::{Control, PATIENCE, Probe};

/// Read-only memory of the machine.
pub const READ_ONLY: u64 = 0x1000_0000;

/// Runs a script on the device that its first byte names. A line a device.
pub fn run(bytes: &[u8]) {
    let Some((which, script)) = bytes.split_first() else {
        return;
    };
    match which % 3 {
        0 => on(Rng, script, |_| {}),
        1 => on_probe(&[&[8]], script),
        _ => on_probe(&[&[8, 4], &[16]], script),
    }
}

fn on_probe(groups: &[&[u16]], script: &[u8]) {
    let control = Control::default();
    on(Probe::new(&control, groups), script, |notifications| {
        let log = control.log();
        let calls: u64 = log.notified.iter().sum();
        // One at each start of each queue, and one more for each turn that was full.
        let begins = log.activations.len() as u64 * log.notified.len() as u64;
        let most = begins + notifications + log.chains / 4 + 1;
        assert!(
            calls <= most,
            "{calls} calls for {notifications} notifications"
        );
    });
}

/// Runs a script on a device; `check` gets the number of notifications.
pub fn on<D: VirtioDevice>(device: D, script: &[u8], check: impl FnOnce(u64)) {
    let panics = probe::device_panics();
    let mut driver = FakeDriver::new(device);
    driver.add_memory(READ_ONLY, 0x1_0000, memslots::SlotFlags::READ_ONLY);
    let mut script = Script(script);
    let mut notifications = 0;
    while let Some(op) = script.byte() {
        notifications += step(&mut driver, &mut script, op);
    }
    assert!(driver.device.pause(PATIENCE), "it does not come to rest");
    check(notifications);
    assert!(driver.device.state().is_some());
    driver.device.resume();
    driver.reset();
    // In memory that the script's last requests have not reached.
    driver.start(u64::MAX);
    let status = driver.read(VIRTIO_MMIO_STATUS);
    assert_eq!(
        status & !NEEDS_RESET,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    assert!(driver.device.pause(PATIENCE));
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    assert_eq!(probe::device_panics(), panics, "a device's thread panicked");
}

struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Zeros behind the end.
    fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes).fold(0, |number, _| {
            number << 8 | u64::from(self.byte().unwrap_or(0))
        })
    }

    /// An address, often one that means something.
    fn address<D: VirtioDevice>(&mut self, driver: &FakeDriver<D>) -> u64 {
        let ring = driver.rings().first().copied();
        match self.number(1) % 12 {
            0 => MEMORY - 1,
            1 => MEMORY,
            2 => u64::MAX - self.number(1),
            3 => READ_ONLY + self.number(1),
            4 => READ_ONLY + 0x1_0000 - 1,
            5 => ring.map_or(0, |ring| ring.used),
            6 => ring.map_or(0, |ring| ring.descriptors),
            7 => ring.map_or(0, |ring| ring.available),
            8 => self.number(8),
            _ => MEMORY / 2 + self.number(2) * 16,
        }
    }

    fn len(&mut self) -> u32 {
        match self.number(1) % 6 {
            0 => u32::MAX,
            1 => 0,
            2 => self.number(4) as u32,
            3 => 16 * self.number(1) as u32,
            _ => self.number(1) as u32,
        }
    }

    fn descriptor<D: VirtioDevice>(&mut self, driver: &FakeDriver<D>) -> Descriptor {
        Descriptor {
            address: self.address(driver),
            len: self.len(),
            flags: match self.number(1) {
                flags @ 0..=7 => flags as u16,
                flags => flags as u16 & 3,
            },
            next: match self.number(1) {
                255 => u16::MAX,
                next => next as u16 % 20,
            },
        }
    }
}

/// One step; how many notifications it was.
fn step<D: VirtioDevice>(driver: &mut FakeDriver<D>, script: &mut Script<'_>, op: u8) -> u64 {
    const REGISTERS: [u32; 16] = [
        VIRTIO_MMIO_DEVICE_FEATURES_SEL,
        VIRTIO_MMIO_DRIVER_FEATURES,
        VIRTIO_MMIO_DRIVER_FEATURES_SEL,
        VIRTIO_MMIO_QUEUE_SEL,
        VIRTIO_MMIO_QUEUE_NUM,
        VIRTIO_MMIO_QUEUE_READY,
        VIRTIO_MMIO_QUEUE_NOTIFY,
        VIRTIO_MMIO_INTERRUPT_ACK,
        VIRTIO_MMIO_STATUS,
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
        VIRTIO_MMIO_SHM_SEL,
    ];
    let queues = driver.rings().len();
    let queue = match queues {
        0 => None,
        queues => Some(script.number(1) as usize % queues),
    };
    match (op % 14, queue) {
        (0, _) => {
            let register = REGISTERS[script.number(1) as usize % REGISTERS.len()];
            let value = match script.number(1) {
                255 => script.number(4) as u32,
                254 => script.address(driver) as u32,
                small => small as u32,
            };
            driver.write(register, value);
            return u64::from(register == VIRTIO_MMIO_QUEUE_NOTIFY);
        }
        (1, _) => {
            let offset = script.number(2) % 0xff8;
            let len = 1 << (script.number(1) % 4);
            let bytes = script.number(8).to_le_bytes();
            driver.own_vcpu().write(offset, &bytes[..len]);
            driver.own_vcpu().read(offset, &mut [0; 8][..len]);
            return u64::from(offset == u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        }
        (2 | 3, _) if queues == 0 || op % 28 == 2 => {
            driver.reset();
            let features = script.number(1) << 28;
            driver.start(features | script.number(1));
        }
        (4 | 5, Some(queue)) => {
            let number = script.number(1) as u16 % driver.ring(queue).size;
            let descriptor = script.descriptor(driver);
            driver.write_descriptor(queue, number, descriptor);
        }
        (6, Some(queue)) => {
            // An indirect table of anything.
            let count = script.number(1) as usize % 8;
            let chain: Vec<_> = (0..count).map(|_| script.descriptor(driver)).collect();
            if !chain.is_empty() {
                driver.indirect(queue, &chain);
            }
        }
        (7 | 8, Some(queue)) => {
            let head = script.number(1) as u16;
            driver.make_available(
                queue,
                if head > 250 {
                    u16::MAX - head
                } else {
                    head % 20
                },
            );
        }
        (9, Some(queue)) => {
            let index = script.number(2) as u16;
            let at = GuestAddress(driver.ring(queue).available + 2);
            driver.memory().write_obj(index, at).unwrap();
        }
        (10, Some(queue)) => {
            // Anything anywhere in the rings.
            let at = GuestAddress(driver.ring(queue).descriptors + script.number(2) % 0x4000);
            driver
                .memory()
                .write_obj(script.number(1) as u8, at)
                .unwrap();
        }
        (11, Some(queue)) => {
            let writable = script.number(1) as u32;
            driver.request(queue, &[b"from the driver"], &[writable, 3]);
            driver.notify(queue);
            return 1;
        }
        (12, _) => {
            assert!(driver.device.pause(PATIENCE));
            driver.device.resume();
            // Each queue is looked at once when it goes on.
            return queues.max(4) as u64;
        }
        (_, Some(queue)) => {
            driver.notify(queue);
            return 1;
        }
        _ => {}
    }
    0
}
