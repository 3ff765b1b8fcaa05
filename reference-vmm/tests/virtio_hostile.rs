// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Drivers that break the rules of virtqueues (virtio 1.2, 2.7): the request is answered or the device needs a reset,
//! which heals it. No panic, no thread that spins, and the machine's other devices go on.
//!
//! `LONG_TESTS=1` runs more scripts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod virtio_script;

use std::sync::atomic::{AtomicBool, Ordering};

use memslots::SlotFlags;
use proptest::prelude::*;
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver, MEMORY};
use reference_vmm::devices::virtio::registers::{NEEDS_RESET, TRANSPORT_FEATURES};
use reference_vmm::devices::virtio::rng::Rng;
use virtio_bindings::virtio_mmio::*;
use virtio_script::READ_ONLY;
use virtio_script::probe::{Control, PATIENCE, Probe, device_panics};
use vm_memory::{Bytes, GuestAddress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// The probe's queue.
const SIZE: u16 = 8;

fn buffer(address: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        address,
        len,
        flags,
        next,
    }
}

fn machine() -> (Control, FakeDriver<Probe>) {
    let control = Control::default();
    let mut driver = FakeDriver::new(Probe::new(&control, &[&[SIZE]]));
    driver.add_memory(READ_ONLY, 0x1_0000, SlotFlags::READ_ONLY);
    (control, driver)
}

/// Ends the other threads of a test, also where it fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a driver does to queue 0 of a device that is started, but for the notification.
type Wrong = fn(&mut FakeDriver<Probe>);

/// Two readable and one writable buffer, chained as they are given.
fn table(driver: &mut FakeDriver<Probe>, descriptors: &[Descriptor]) {
    for (number, descriptor) in (0..).zip(descriptors) {
        driver.write_descriptor(0, number, *descriptor);
    }
    driver.make_available(0, 0);
}

fn indirect(driver: &mut FakeDriver<Probe>, descriptors: &[Descriptor], len: u32, flags: u16) {
    let at = driver.allocate(16 * descriptors.len() as u64 + 16);
    for (number, descriptor) in (0_u64..).zip(descriptors) {
        let bytes = [
            &descriptor.address.to_le_bytes()[..],
            &descriptor.len.to_le_bytes(),
            &descriptor.flags.to_le_bytes(),
            &descriptor.next.to_le_bytes(),
        ]
        .concat();
        let to = GuestAddress(at.0 + 16 * number);
        driver.memory().write_slice(&bytes, to).unwrap();
    }
    table(
        driver,
        &[
            buffer(at.0, len, INDIRECT | flags, 1),
            buffer(0x8000, 1, 0, 0),
        ],
    );
}

/// A hole's address.
const HOLE: u64 = MEMORY + 0x10_0000;

/// Each with whether a device can answer it.
const WRONGS: &[(&str, bool, Wrong)] = &[
    ("a descriptor that is its own next", false, |driver| {
        table(driver, &[buffer(0x8000, 4, NEXT, 0)]);
    }),
    ("a loop of two", false, |driver| {
        table(
            driver,
            &[buffer(0x8000, 4, NEXT, 1), buffer(0x8000, 4, NEXT, 0)],
        );
    }),
    ("a next that is beyond the table", false, |driver| {
        table(driver, &[buffer(0x8000, 4, NEXT, SIZE)]);
    }),
    ("a head that is beyond the table", false, |driver| {
        driver.make_available(0, SIZE)
    }),
    ("the last head that there is", false, |driver| {
        driver.make_available(0, u16::MAX)
    }),
    (
        "more available than there are descriptors",
        false,
        |driver| {
            let at = GuestAddress(driver.ring(0).available + 2);
            driver.memory().write_obj(SIZE + 1, at).unwrap();
        },
    ),
    ("an index that goes back", false, |driver| {
        let at = GuestAddress(driver.ring(0).available + 2);
        driver.memory().write_obj(u16::MAX, at).unwrap();
    }),
    ("a buffer to read behind one to write", false, |driver| {
        table(
            driver,
            &[buffer(0x8000, 4, WRITE | NEXT, 1), buffer(0x8000, 4, 0, 0)],
        );
    }),
    ("an indirect table in an indirect table", false, |driver| {
        indirect(driver, &[buffer(0x8000, 16, INDIRECT, 0)], 16, 0);
    }),
    ("an empty indirect table", false, |driver| {
        indirect(driver, &[], 0, 0)
    }),
    ("an indirect table of one and a half", false, |driver| {
        indirect(driver, &[buffer(0x8000, 4, 0, 0)], 24, 0);
    }),
    ("an indirect table longer than 65,535", false, |driver| {
        indirect(driver, &[buffer(0x8000, 4, 0, 0)], 16 << 16, 0);
    }),
    (
        "an indirect table of 65,535, of which the first ends it",
        true,
        |driver| {
            table(driver, &[buffer(0, 16 * 65_535, INDIRECT, 0)]);
        },
    ),
    ("an indirect table in a hole", false, |driver| {
        table(driver, &[buffer(HOLE, 16, INDIRECT, 0)]);
    }),
    ("an indirect table half beyond memory", false, |driver| {
        table(driver, &[buffer(MEMORY - 8, 16, INDIRECT, 0)]);
    }),
    (
        "an indirect table at the end of all addresses",
        false,
        |driver| {
            table(driver, &[buffer(u64::MAX - 7, 16, INDIRECT, 0)]);
        },
    ),
    ("an indirect loop", false, |driver| {
        indirect(driver, &[buffer(0x8000, 4, NEXT, 0)], 16, 0);
    }),
    ("an indirect chain of 1,025", false, |driver| {
        let next = |at: u16| buffer(0x8000, 1, NEXT, at + 1);
        let mut chain: Vec<_> = (0..1024).map(next).collect();
        chain.push(buffer(0x8000, 1, WRITE, 0));
        indirect(driver, &chain, 16 * 1025, 0);
    }),
    ("an indirect chain of 1,024", true, |driver| {
        let next = |at: u16| buffer(0x8000, 1, NEXT, at + 1);
        let mut chain: Vec<_> = (0..1023).map(next).collect();
        chain.push(buffer(0x8000, 1, WRITE, 0));
        indirect(driver, &chain, 16 * 1024, 0);
    }),
    (
        "an indirect table that says there is a next",
        true,
        |driver| {
            indirect(driver, &[buffer(0x8000, 4, WRITE, 0)], 16, NEXT);
        },
    ),
    (
        "an indirect table that says it is to be written",
        true,
        |driver| {
            indirect(driver, &[buffer(0x8000, 4, WRITE, 0)], 16, WRITE);
        },
    ),
    ("a buffer to read in a hole", false, |driver| {
        table(
            driver,
            &[buffer(HOLE, 4, NEXT, 1), buffer(0x8000, 4, WRITE, 0)],
        );
    }),
    ("a buffer to write in a hole", false, |driver| {
        table(
            driver,
            &[buffer(0x8000, 4, NEXT, 1), buffer(HOLE, 4, WRITE, 0)],
        );
    }),
    ("a buffer to write in read-only memory", false, |driver| {
        table(
            driver,
            &[buffer(0x8000, 4, NEXT, 1), buffer(READ_ONLY, 4, WRITE, 0)],
        );
    }),
    ("a buffer to read in read-only memory", true, |driver| {
        table(
            driver,
            &[buffer(READ_ONLY, 4, NEXT, 1), buffer(0x8000, 4, WRITE, 0)],
        );
    }),
    ("a buffer half beyond memory", false, |driver| {
        table(
            driver,
            &[buffer(MEMORY - 2, 4, NEXT, 1), buffer(0x8000, 4, WRITE, 0)],
        );
    }),
    ("a buffer beyond all addresses", false, |driver| {
        table(
            driver,
            &[
                buffer(u64::MAX - 1, 4, NEXT, 1),
                buffer(0x8000, 4, WRITE, 0),
            ],
        );
    }),
    ("more than 4 GiB of buffers", false, |driver| {
        let most = |next| buffer(0, u32::MAX, NEXT, next);
        table(driver, &[most(1), most(2), buffer(0x8000, 4, WRITE, 0)]);
    }),
    ("a buffer of 4 GiB that nobody needs", true, |driver| {
        table(
            driver,
            &[
                buffer(0x8000, 4, NEXT, 1),
                buffer(0, u32::MAX - 4, WRITE, 0),
            ],
        );
    }),
    ("no buffer at all", true, |driver| {
        table(driver, &[buffer(0, 0, 0, 0)])
    }),
    ("a buffer that is the used ring", true, |driver| {
        let used = driver.ring(0).used;
        table(
            driver,
            &[buffer(0x8000, 4, NEXT, 1), buffer(used, 2, WRITE, 0)],
        );
    }),
];

#[test]
fn whatever_a_driver_makes_available_is_answered_or_needs_a_reset_which_heals_it() {
    let panics = device_panics();
    for event_index in [false, true] {
        for (what, answered, wrong) in WRONGS {
            println!("{what}");
            let (control, mut driver) = machine();
            let mut other = driver.beside(Rng);
            other.start(0);
            driver.start(if event_index { TRANSPORT_FEATURES } else { 0 });
            wrong(&mut driver);
            for _ in 0..20 {
                driver.notify(0);
            }
            // One that is answered is so before the device rests.
            match answered {
                true => control.wait(|log| log.chains > 0),
                false => driver.wait_needs_reset(),
            }
            // Notified again and again it does nothing more.
            let calls = control.log().notified[0];
            for _ in 0..100 {
                driver.notify(0);
            }
            other.request(0, &[], &[16]);
            other.notify(0);
            assert_eq!(other.used(0).1, 16, "{what}");
            assert!(driver.device.pause(PATIENCE), "{what}");
            let needs_reset = driver.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET != 0;
            assert_eq!(needs_reset, !answered, "{what}");
            let after = control.log().notified[0];
            let most = if *answered { calls + 101 } else { calls };
            assert!(after <= most, "{what}: {after} calls");
            driver.device.resume();

            driver.reset();
            driver.start(0);
            let request = driver.request(0, &[b"healed"], &[6]);
            driver.notify(0);
            assert_eq!(driver.used(0), (request.head, 6), "{what}");
            assert_eq!(driver.bytes(request.writable[0].0, 6), b"healed", "{what}");
        }
    }
    assert_eq!(device_panics(), panics);
}

#[test]
fn rings_that_are_nowhere_or_cannot_be_written_are_found_when_the_driver_is_ready() {
    let (control, mut driver) = machine();
    let fine = (0x1_0000, 0x2_0000, 0x3_0000);
    // Of each: descriptor table, available ring, used ring; whether it can be served.
    let table = [
        (fine, true),
        ((HOLE, fine.1, fine.2), false),
        ((fine.0, HOLE, fine.2), false),
        ((fine.0, fine.1, HOLE), false),
        ((MEMORY - 112, fine.1, fine.2), false),
        ((MEMORY - 128, fine.1, fine.2), true),
        ((fine.0, MEMORY - 20, fine.2), false),
        ((fine.0, MEMORY - 22, fine.2), true),
        ((fine.0, fine.1, MEMORY - 68), false),
        ((fine.0, fine.1, MEMORY - 72), true),
        ((u64::MAX - 15, fine.1, fine.2), false),
        ((fine.0, u64::MAX - 1, fine.2), false),
        ((fine.0, fine.1, u64::MAX - 3), false),
        ((READ_ONLY, fine.1, fine.2), true),
        ((fine.0, READ_ONLY, fine.2), true),
        ((fine.0, fine.1, READ_ONLY), false),
        ((fine.0 + 8, fine.1, fine.2), false),
        ((fine.0, fine.1 + 1, fine.2), false),
        ((fine.0, fine.1, fine.2 + 2), false),
        ((fine.0, 0, fine.2), false),
        ((fine.0, fine.0, fine.0), true),
        ((0, fine.1, fine.2), true),
    ];
    for ((descriptors, available, used), served) in table {
        driver.set_up_queues();
        let ring = {
            let ring = driver.ring(0);
            (ring.descriptors, ring.available, ring.used) = (descriptors, available, used);
            *ring
        };
        driver.reset();
        assert!(driver.negotiate(TRANSPORT_FEATURES));
        driver.set_up_queue(0, &ring);
        let before = control.log().activations.len();
        driver.write(VIRTIO_MMIO_STATUS, 0xf);
        let needs_reset = driver.read(VIRTIO_MMIO_STATUS) & NEEDS_RESET != 0;
        assert_eq!(
            needs_reset, !served,
            "{descriptors:#x} {available:#x} {used:#x}"
        );
        let activated = control.log().activations.len() - before;
        assert_eq!(activated, usize::from(served));
        driver.reset();
    }
}

#[test]
fn rings_that_lie_on_each_other_harm_the_driver_alone() {
    let panics = device_panics();
    for (available, used) in [(0, 0), (0, 0x100), (0x40, 0), (0x10, 0x20), (0x100, 0x100)] {
        let (_, mut driver) = machine();
        assert!(driver.negotiate(TRANSPORT_FEATURES));
        driver.set_up_queues();
        let ring = {
            let ring = driver.ring(0);
            ring.available = ring.descriptors + available;
            ring.used = ring.descriptors + used;
            *ring
        };
        driver.reset();
        assert!(driver.negotiate(TRANSPORT_FEATURES));
        driver.set_up_queue(0, &ring);
        driver.write(VIRTIO_MMIO_STATUS, 0xf);
        for _ in 0..20 {
            driver.request(0, &[b"over and over"], &[13]);
            driver.notify(0);
        }
        assert!(driver.device.pause(PATIENCE));
        driver.device.resume();
        driver.reset();
        driver.start(0);
        let request = driver.request(0, &[b"x"], &[1]);
        driver.notify(0);
        assert_eq!(driver.used(0), (request.head, 1));
    }
    assert_eq!(device_panics(), panics);
}

#[test]
fn a_storm_of_notifications_costs_a_call_each_at_most_and_others_are_served() {
    let (control, mut driver) = machine();
    let mut other = driver.beside(Rng);
    driver.start(0);
    other.start(0);
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        let mut vcpu = driver.vcpu();
        let stop = &stop;
        let storm = scope.spawn(move || {
            let mut sent = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                vcpu.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4]);
                sent += 1;
            }
            sent
        });
        for _ in 0..200 {
            other.request(0, &[], &[16]);
            other.notify(0);
            other.used(0);
            let request = driver.request(0, &[b"x"], &[1]);
            driver.notify(0);
            assert_eq!(driver.used(0), (request.head, 1));
        }
        // In the middle of it the device can be stopped, and go on.
        assert!(driver.device.pause(PATIENCE));
        driver.device.resume();
        stop.store(true, Ordering::Relaxed);
        storm.join().unwrap()
    });
    assert!(driver.device.pause(PATIENCE));
    let log = control.log();
    assert!(
        log.notified[0] <= 2 + sent + 200,
        "{} of {sent}",
        log.notified[0]
    );
    assert_eq!(log.chains, 200);
}

#[test]
fn a_driver_that_makes_buffers_available_without_end_does_not_keep_the_device_from_its_rest() {
    let (control, mut driver) = machine();
    driver.start(0);
    let ring = *driver.ring(0);
    let memory = driver.memory();
    let stop = AtomicBool::new(false);
    driver.write_descriptor(0, 0, buffer(0x8000, 1, WRITE, 0));
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        // Every entry names the one descriptor; the index runs ahead of the used one, as fast as it can.
        let (stop, memory, mut vcpu) = (&stop, &memory, driver.vcpu());
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                vcpu.write(VIRTIO_MMIO_QUEUE_NOTIFY.into(), &[0; 4]);
                let used: u16 = memory
                    .load(GuestAddress(ring.used + 2), Ordering::Acquire)
                    .unwrap();
                let index = used.wrapping_add(SIZE);
                memory
                    .store(index, GuestAddress(ring.available + 2), Ordering::Release)
                    .unwrap();
            }
        });
        driver.notify(0);
        control.wait(|log| log.chains > 1000);
        for _ in 0..20 {
            assert!(driver.device.pause(PATIENCE));
            let chains = control.log().chains;
            driver.device.resume();
            control.wait(|log| log.chains > chains);
        }
        // And a reset does not wait for the driver to be done.
        driver.reset();
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn rings_that_change_while_the_device_reads_them_harm_the_driver_alone() {
    let panics = device_panics();
    let (control, mut driver) = machine();
    let mut other = driver.beside(Rng);
    other.start(0);
    // What the writers may overwrite; the rings move at each start, within this.
    let memory = driver.memory();
    let stop = AtomicBool::new(false);
    let mut resets = 0;
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for seed in 1..=2_u64 {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
                while !stop.load(Ordering::Relaxed) {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    // Of the three rings' first bytes, each on a page.
                    let page = 0x1_0000 + (random >> 8) % 3 * 0x1000;
                    let at = GuestAddress(page + (random >> 16) % 128);
                    let value = (random >> 32) as u8 & 0x1f;
                    memory.write_obj(value, at).unwrap();
                }
            });
        }
        assert!(driver.negotiate(TRANSPORT_FEATURES));
        driver.set_up_queues();
        let ring = *driver.ring(0);
        assert!(ring.descriptors == 0x1_0000 && ring.used == 0x1_2000);
        // On a busy host the writers may have no turn in the first hundreds.
        let begun = std::time::Instant::now();
        let mut round = 0;
        while round < 400 || resets < 2 && begun.elapsed() < PATIENCE {
            round += 1;
            if driver.read(VIRTIO_MMIO_STATUS) & (NEEDS_RESET | 4) != 4 {
                driver.reset();
                assert!(driver.negotiate(TRANSPORT_FEATURES));
                driver.set_up_queue(0, &ring);
                driver.write(VIRTIO_MMIO_STATUS, 0xf);
                resets += 1;
            }
            driver.notify(0);
            if round % 16 == 0 {
                other.request(0, &[], &[16]);
                other.notify(0);
                other.used(0);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(resets > 1);
    assert!(driver.device.pause(PATIENCE));
    driver.device.resume();
    driver.reset();
    driver.start(0);
    let before = control.log().chains;
    driver.request(0, &[b"x"], &[1]);
    driver.notify(0);
    driver.used(0);
    assert_eq!(control.log().chains, before + 1);
    assert_eq!(device_panics(), panics);
}

#[test]
fn whatever_script_a_driver_follows_the_device_rests_and_a_reset_heals_it() {
    let long = std::env::var_os("LONG_TESTS").is_some_and(|value| value != "0");
    let cases = if long { 20_000 } else { 400 };
    let script = proptest::collection::vec(any::<u8>(), 0..500);
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    proptest!(config, |(script in script)| virtio_script::run(&script));
}
