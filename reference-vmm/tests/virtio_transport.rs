// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtio-mmio transport: what its documentation promises drivers and devices (virtio 1.2, 2.1 and 4.2).
//!
//! Broken drivers' queues are in `virtio_hostile.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod virtio_probe;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use io_bus::Outcome;
use proptest::prelude::*;
use reference_vmm::devices::virtio::fake::FakeDriver;
use reference_vmm::devices::virtio::interrupt::{CONFIGURATION_CHANGE, USED_BUFFER};
use reference_vmm::devices::virtio::mmio::{Doorbells, MmioDevice, MmioState};
use reference_vmm::devices::virtio::registers::{
    ACKNOWLEDGE, CONFIG, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET, TRANSPORT_FEATURES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use virtio_probe::{CONFIG_LEN, Control, FEATURE, PATIENCE, Probe};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

fn probe(groups: &[&[u16]]) -> (Control, FakeDriver<Probe>) {
    let control = Control::default();
    let driver = FakeDriver::new(Probe::new(&control, groups));
    (control, driver)
}

/// A request whose bytes are to come back.
fn echo(driver: &mut FakeDriver<Probe>, queue: usize, text: &[u8]) {
    let request = driver.request(queue, &[text], &[text.len() as u32]);
    driver.notify(queue);
    assert_eq!(driver.used(queue), (request.head, text.len() as u32));
    assert_eq!(driver.bytes(request.writable[0].0, text.len()), text);
}

fn heals(driver: &mut FakeDriver<Probe>) {
    driver.reset();
    driver.start(FEATURE);
    echo(driver, 0, b"as new");
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), READY);
}

// ---- Identity, features

#[test]
fn a_driver_finds_what_the_device_is_before_it_has_said_anything() {
    let (_, mut driver) = probe(&[&[8], &[4]]);
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_ID), 0x7e57);
    assert_ne!(driver.read(VIRTIO_MMIO_VENDOR_ID), 0);
    assert_eq!(driver.offered(), TRANSPORT_FEATURES | FEATURE);
    driver.write(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(VIRTIO_MMIO_DEVICE_FEATURES), 0);
    // A shared memory region that is not there has a length of all ones (4.2.2).
    driver.write(VIRTIO_MMIO_SHM_SEL, 0);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
    for (queue, most) in [(0, 8), (1, 4), (2, 0), (u32::MAX, 0)] {
        driver.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), most);
        assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    }
}

#[test]
fn any_subset_of_the_offer_that_has_version_1_is_accepted_and_nothing_else() {
    let offer = TRANSPORT_FEATURES | FEATURE;
    for bit in 0..64 {
        for features in [
            VERSION_1 | 1 << bit,
            1 << bit,
            offer | 1 << bit,
            offer & !(1 << bit),
        ] {
            let (control, mut driver) = probe(&[&[8]]);
            let acceptable = features & VERSION_1 != 0 && features & !offer == 0;
            assert_eq!(driver.negotiate(features), acceptable, "{features:#x}");
            driver.write(VIRTIO_MMIO_STATUS, READY);
            let status = driver.read(VIRTIO_MMIO_STATUS);
            // A driver that was refused may try again; only here it does not.
            assert_eq!(status & DRIVER_OK != 0, acceptable || features_ok(status));
            let given = control.log().activations.first().copied();
            assert_eq!(given, acceptable.then_some(features));
        }
    }
}

fn features_ok(status: u32) -> bool {
    status & FEATURES_OK != 0
}

#[test]
fn a_driver_that_was_refused_may_ask_for_less_and_one_that_was_accepted_may_not_change_its_mind() {
    let (control, mut driver) = probe(&[&[8]]);
    assert!(!driver.negotiate(VERSION_1 | 1 << 20));
    assert!(driver.negotiate(VERSION_1));
    driver.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    driver.write(VIRTIO_MMIO_DRIVER_FEATURES, u32::MAX);
    driver.write(VIRTIO_MMIO_STATUS, READY);
    assert_eq!(control.log().activations, [VERSION_1]);
}

// ---- Status, queues: against a model

/// What a driver can do with the registers.
#[derive(Clone, Debug)]
enum Step {
    Status(u32),
    Features(u32, u32),
    Select(u32),
    Size(u32),
    Address(u32, u32),
    Ready(u32),
    Notify(u32),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let status = prop_oneof![
        6 => proptest::sample::select(vec![
            ACKNOWLEDGE,
            ACKNOWLEDGE | DRIVER,
            ACKNOWLEDGE | DRIVER | FEATURES_OK,
            READY,
            DRIVER_OK,
            FEATURES_OK,
            FAILED,
            NEEDS_RESET,
        ]),
        1 => 1..=u32::MAX,
    ];
    let features = prop_oneof![
        Just((0, 0)),
        Just((1, 1)),
        Just((0, FEATURE as u32)),
        (0_u32..4, any::<u32>())
    ];
    let size = prop_oneof![4 => proptest::sample::select(vec![1, 2, 4, 8]), 1 => 0_u32..70, 1 => any::<u32>()];
    let address = prop_oneof![
        6 => proptest::sample::select(vec![0x1_0000, 0x2_0000, 0x3_0000, 0]),
        1 => any::<u32>(),
    ];
    let registers = vec![
        VIRTIO_MMIO_QUEUE_DESC_LOW,
        VIRTIO_MMIO_QUEUE_AVAIL_LOW,
        VIRTIO_MMIO_QUEUE_USED_LOW,
        VIRTIO_MMIO_QUEUE_DESC_HIGH,
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
        VIRTIO_MMIO_QUEUE_USED_HIGH,
    ];
    let low = proptest::sample::select(registers.clone());
    prop_oneof![
        8 => status.prop_map(Step::Status),
        4 => features.prop_map(|(sel, half)| Step::Features(sel, half)),
        2 => (0_u32..4).prop_map(Step::Select),
        4 => size.prop_map(Step::Size),
        4 => (low, address).prop_map(|(register, value)| Step::Address(register, value)),
        3 => (0_u32..4).prop_map(Step::Ready),
        1 => (0_u32..4).prop_map(Step::Notify),
        1 => Just(Step::Reset),
    ]
}

/// The specification's rules, as a driver would tell them.
#[derive(Default)]
struct Model {
    status: u32,
    features: [u32; 2],
    selected: u32,
    /// Size, ready, the addresses by register.
    queues: [(u32, bool, [u32; 6]); 2],
    broken: bool,
}

/// The largest sizes of the model's queues.
const SIZES: [u16; 2] = [8, 4];

impl Model {
    fn step(&mut self, step: &Step) {
        let active = self.status & DRIVER_OK != 0;
        let settled = self.status & FEATURES_OK != 0;
        let most = SIZES.get(self.selected as usize).copied();
        let queue = self.queues.get_mut(self.selected as usize);
        match *step {
            Step::Reset | Step::Status(0) => {
                *self = Model {
                    selected: 0,
                    ..Model::default()
                }
            }
            Step::Status(value) => {
                let offer = TRANSPORT_FEATURES | FEATURE;
                let features = u64::from(self.features[1]) << 32 | u64::from(self.features[0]);
                let fine = features & VERSION_1 != 0 && features & !offer == 0;
                self.status |= value & (ACKNOWLEDGE | DRIVER | FAILED);
                if value & FEATURES_OK != 0 && fine {
                    self.status |= FEATURES_OK;
                }
                if value & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
                    self.status |= DRIVER_OK;
                    if !active {
                        self.broken = self.queues.iter().any(Model::is_impossible);
                    }
                }
            }
            Step::Features(sel, half) if !settled => {
                if let Some(features) = self.features.get_mut(sel as usize) {
                    *features = half;
                }
            }
            Step::Select(to) => self.selected = to,
            Step::Size(size) => {
                if let (Some(queue), Some(most), false) = (queue, most, active)
                    && !queue.1
                {
                    let possible = size.is_power_of_two() && size <= most.into();
                    queue.0 = if possible { size } else { 0 };
                }
            }
            Step::Address(register, value) => {
                if let (Some(queue), false) = (queue, active)
                    && !queue.1
                {
                    queue.2[Model::place(register)] = value;
                }
            }
            Step::Ready(value) => match (queue, active) {
                (Some(queue), false) => queue.1 = value & 1 == 1,
                (Some(queue), true) if queue.1 && value & 1 == 0 => {
                    queue.1 = false;
                    self.broken = true;
                }
                _ => {}
            },
            Step::Features(..) | Step::Notify(_) => {}
        }
    }

    fn place(register: u32) -> usize {
        let of = |base| (register - base) as usize / 4;
        match register {
            VIRTIO_MMIO_QUEUE_DESC_LOW | VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                of(VIRTIO_MMIO_QUEUE_DESC_LOW)
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW | VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                2 + of(VIRTIO_MMIO_QUEUE_AVAIL_LOW)
            }
            _ => 4 + of(VIRTIO_MMIO_QUEUE_USED_LOW),
        }
    }

    /// A ready queue that no device could serve.
    fn is_impossible((size, ready, addresses): &(u32, bool, [u32; 6])) -> bool {
        let address = |at: usize| u64::from(addresses[at + 1]) << 32 | u64::from(addresses[at]);
        let size = u64::from(*size);
        let outside = |at, len, align| {
            let address = address(at);
            address % align != 0
                || address
                    .checked_add(len)
                    .is_none_or(|end| end > reference_vmm::devices::virtio::fake::MEMORY)
        };
        *ready
            && (size == 0
                || outside(0, 16 * size, 16)
                || outside(2, 6 + 2 * size, 2)
                || address(2) == 0
                || outside(4, 6 + 8 * size, 4))
    }
}

fn take(driver: &mut FakeDriver<Probe>, step: &Step) {
    match *step {
        Step::Status(value) => driver.write(VIRTIO_MMIO_STATUS, value),
        Step::Features(sel, half) => {
            driver.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            driver.write(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        Step::Select(queue) => driver.write(VIRTIO_MMIO_QUEUE_SEL, queue),
        Step::Size(size) => driver.write(VIRTIO_MMIO_QUEUE_NUM, size),
        Step::Address(register, value) => driver.write(register, value),
        Step::Ready(value) => driver.write(VIRTIO_MMIO_QUEUE_READY, value),
        Step::Notify(queue) => driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, queue),
        Step::Reset => driver.reset(),
    }
}

#[test]
fn in_whatever_order_a_driver_writes_the_registers_they_follow_the_specification() {
    let steps = proptest::collection::vec(step(), 1..60);
    let (active, broken) = (Mutex::new(0), Mutex::new(0));
    proptest!(ProptestConfig::with_cases(300), |(steps in steps, shortcut: bool)| {
        let (control, mut driver) = probe(&[&SIZES]);
        let mut model = Model::default();
        let mut all = Vec::new();
        if shortcut {
            // Most random drivers do not get so far.
            all.extend([Step::Features(1, 1), Step::Status(ACKNOWLEDGE | DRIVER | FEATURES_OK), Step::Size(4)]);
            all.extend([
                Step::Address(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1_0000),
                Step::Address(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x2_0000),
                Step::Address(VIRTIO_MMIO_QUEUE_USED_LOW, 0x3_0000),
            ]);
        }
        all.extend(steps);
        for step in &all {
            let before = control.log().activations.len();
            let was = model.status;
            take(&mut driver, step);
            model.step(step);
            let failed = if model.broken { NEEDS_RESET } else { 0 };
            prop_assert_eq!(driver.read(VIRTIO_MMIO_STATUS), model.status | failed, "{:?}", step);
            let queue = model.queues.get(model.selected as usize);
            let most = SIZES.get(model.selected as usize).copied().unwrap_or(0);
            prop_assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), u32::from(queue.is_some_and(|queue| queue.1)));
            prop_assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(most));
            // The device is started once, and only with rings that can be.
            let begins = was & DRIVER_OK == 0 && model.status & DRIVER_OK != 0;
            let started = control.log().activations.len() - before;
            prop_assert_eq!(started, usize::from(begins && !model.broken));
            *active.lock().unwrap() += started;
            *broken.lock().unwrap() += usize::from(begins && model.broken);
        }
        heals(&mut driver);
    });
    assert!(
        *active.lock().unwrap() > 30 && *broken.lock().unwrap() > 5,
        "{active:?} {broken:?}"
    );
}

// ---- Accesses

#[test]
fn an_access_that_is_no_aligned_word_reads_zeros_and_changes_nothing() {
    let (_, mut driver) = probe(&[&[8]]);
    assert!(driver.negotiate(VERSION_1));
    driver.set_up_queues();
    for offset in 0..CONFIG {
        for len in [1, 2, 4, 8] {
            if len == 4 && offset % 4 == 0 {
                continue;
            }
            let mut data = [0xa5; 8];
            driver.own_vcpu().read(offset, &mut data[..len]);
            assert!(
                data[..len].iter().all(|byte| *byte == 0),
                "{offset:#x}, {len}"
            );
            driver.own_vcpu().write(offset, &[0; 8][..len]);
            driver.own_vcpu().write(offset, &[0xff; 8][..len]);
        }
    }
    // Registers that are only written read 0, those that are only read keep what they have.
    for register in (0..CONFIG as u32).step_by(4) {
        match register {
            VIRTIO_MMIO_STATUS | VIRTIO_MMIO_QUEUE_READY | VIRTIO_MMIO_QUEUE_NUM_MAX => {}
            0x100.. => {}
            _ => {
                driver.read(register);
            }
        }
    }
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_DESC_LOW), 0);
    driver.write(VIRTIO_MMIO_MAGIC_VALUE, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    // It is still set up as it was.
    driver.write(VIRTIO_MMIO_STATUS, READY);
    echo(&mut driver, 0, b"still there");
}

#[test]
fn the_configuration_space_ends_where_the_devices_ends() {
    let (control, mut driver) = probe(&[&[8]]);
    let bytes: Vec<u8> = (1..=CONFIG_LEN as u8).collect();
    for at in (0..CONFIG_LEN).step_by(8) {
        driver.write_config(at as u64, &bytes[at..at + 8]);
    }
    assert_eq!(control.log().config, bytes);
    let last = 0x1000 - CONFIG;
    for offset in (0..40).chain(last - 16..last) {
        for len in [1_usize, 2, 4, 8] {
            if offset + len as u64 > last {
                continue;
            }
            let mut data = [0xa5; 8];
            driver.own_vcpu().read(CONFIG + offset, &mut data[..len]);
            let there = |at: u64| bytes.get(at as usize).copied().unwrap_or(0);
            let expected: Vec<u8> = (offset..offset + len as u64).map(there).collect();
            assert_eq!(data[..len], expected, "{offset:#x}");
            driver.write_config(offset, &expected);
        }
    }
    assert_eq!(control.log().config, bytes);
}

// ---- What the driver is told

#[test]
fn each_change_of_the_configuration_has_a_generation_and_an_interrupt_of_its_own() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(0);
    let link = control.log().driver.clone().unwrap();
    let mut generation = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
    for change in 1..=3 {
        let before = driver.interrupts();
        control.log().config[0] = change;
        link.configuration_changed();
        assert_eq!(driver.interrupts(), before + 1);
        let next = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
        assert_ne!(next, generation);
        generation = next;
        let mut config = [0];
        driver.config(0, &mut config);
        assert_eq!(config, [change]);
        assert_eq!(driver.wait_interrupt(), CONFIGURATION_CHANGE);
    }
}

#[test]
fn what_is_told_stays_until_it_is_acknowledged_and_each_time_it_is_told_there_is_an_edge() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(0);
    let link = control.log().driver.clone().unwrap();
    let before = driver.interrupts();
    link.used_buffers();
    link.used_buffers();
    link.configuration_changed();
    assert_eq!(driver.interrupts(), before + 3);
    assert_eq!(
        driver.read(VIRTIO_MMIO_INTERRUPT_STATUS),
        USED_BUFFER | CONFIGURATION_CHANGE
    );
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, USED_BUFFER | 0xf0);
    assert_eq!(
        driver.read(VIRTIO_MMIO_INTERRUPT_STATUS),
        CONFIGURATION_CHANGE
    );
    // Told again what it has not acknowledged: an edge all the same, for it may have read the register before.
    link.configuration_changed();
    assert_eq!(driver.interrupts(), before + 4);
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    link.used_buffers();
    driver.reset();
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_driver_that_asks_for_no_interrupts_by_event_index_gets_none_and_loses_none() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(TRANSPORT_FEATURES);
    // The event index is where the first used buffer is: one interrupt, at that one.
    let before = driver.interrupts();
    echo(&mut driver, 0, b"one");
    let told = driver.interrupts();
    assert_eq!(told, before + 1);
    // `used` has moved it to the next; moved back by hand, the next buffers are not told.
    let ring = *driver.ring(0);
    let event = vm_memory::GuestAddress(ring.available + 4 + 2 * u64::from(ring.size));
    vm_memory::Bytes::write_obj(&*driver.memory(), 0_u16, event).unwrap();
    for _ in 0..3 {
        driver.request(0, &[b"x"], &[1]);
    }
    driver.notify(0);
    control.wait(|log| log.chains == 4);
    assert!(driver.device.pause(PATIENCE));
    assert_eq!(driver.interrupts(), told);
    for _ in 0..3 {
        assert!(driver.take_used(0).is_some());
    }
}

// ---- Reset

#[test]
fn a_reset_waits_for_io_that_is_under_way_and_holds_nobody_else() {
    let (control, mut driver) = probe(&[&[8], &[8]]);
    driver.start(FEATURE);
    echo(&mut driver, 0, b"before");
    control.set(|log| log.hold_rest = true);
    let (mut resetting, zero) = (driver.vcpu(), 0_u32.to_le_bytes());
    let status = u64::from(VIRTIO_MMIO_STATUS);
    assert_eq!(resetting.begin_write(status, &zero), Outcome::Deferred);
    control.wait(|log| log.resting == 2);
    // The echo's, which may have been found in its ring before the device had told of it.
    driver.write(VIRTIO_MMIO_INTERRUPT_ACK, USED_BUFFER);
    // Another vCPU sees a device that is not reset yet, and waits for nothing.
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), READY);
    driver.write(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    driver.write(VIRTIO_MMIO_STATUS, READY);
    assert_eq!(driver.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    // The machine can be stopped meanwhile: the vCPU comes out of its wait, and the devices say that they are not at
    // rest.
    resetting.interrupter().interrupt();
    assert_eq!(resetting.end_write(&zero), Outcome::Deferred);
    assert!(!driver.device.pause(Duration::ZERO));
    assert!(driver.device.state().is_none());
    assert_eq!(control.ends(), (0, 0));
    assert_eq!(resetting.poll_write(&zero), Outcome::Deferred);

    control.set(|log| log.hold_rest = false);
    assert_eq!(resetting.end_write(&zero), Outcome::Answered);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
    assert_eq!(control.ends(), (1, 1));
    driver.start(0);
    echo(&mut driver, 1, b"after");
}

#[test]
fn a_pause_that_io_keeps_waiting_is_given_up_and_the_device_goes_on_behind_its_io() {
    let (control, mut driver) = probe(&[&[8], &[8]]);
    driver.start(0);
    echo(&mut driver, 0, b"before");
    control.set(|log| log.hold_rest = true);
    assert!(!driver.device.pause(Duration::from_millis(1)));
    control.wait(|log| log.resting == 2);
    driver.device.resume();
    // What the driver asks for meanwhile waits for that.
    let request = driver.request(0, &[b"meanwhile"], &[16]);
    driver.notify(0);
    control.set(|log| log.hold_rest = false);
    assert_eq!(driver.used(0).0, request.head);
    echo(&mut driver, 1, b"after");
    // A later pause that is not given up holds.
    assert!(driver.device.pause(PATIENCE));
    assert!(driver.device.state().is_some());
    // One that is given up, and then asked for again.
    driver.device.resume();
    control.set(|log| log.hold_rest = true);
    assert!(!driver.device.pause(Duration::from_millis(1)));
    driver.device.resume();
    assert!(!driver.device.pause(Duration::from_millis(1)));
    control.set(|log| log.hold_rest = false);
    assert!(driver.device.pause(PATIENCE));
    assert!(driver.device.state().is_some());
    driver.device.resume();
    echo(&mut driver, 0, b"end");
}

#[test]
fn a_vcpu_that_no_longer_waits_for_its_reset_holds_nobody() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(0);
    control.set(|log| log.hold_rest = true);
    let mut gone = driver.vcpu();
    let status = u64::from(VIRTIO_MMIO_STATUS);
    assert_eq!(gone.begin_write(status, &[0; 4]), Outcome::Deferred);
    drop(gone);
    control.set(|log| log.hold_rest = false);
    heals(&mut driver);
}

#[test]
fn two_vcpus_that_reset_at_once_both_find_it_reset_once() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(0);
    control.set(|log| log.hold_rest = true);
    let status = u64::from(VIRTIO_MMIO_STATUS);
    let mut vcpus = [driver.vcpu(), driver.vcpu(), driver.vcpu()];
    for vcpu in &mut vcpus {
        assert_eq!(vcpu.begin_write(status, &[0; 4]), Outcome::Deferred);
    }
    control.set(|log| log.hold_rest = false);
    for vcpu in &mut vcpus {
        assert_eq!(vcpu.end_write(&[0; 4]), Outcome::Answered);
    }
    assert_eq!(control.ends(), (1, 1));
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), 0);
    heals(&mut driver);
}

#[test]
fn many_vcpus_may_reset_and_start_it_at_the_same_time_and_it_ends_in_a_state_that_a_driver_can_use()
{
    let (_, mut driver) = probe(&[&[8], &[4]]);
    assert!(driver.negotiate(VERSION_1));
    driver.set_up_queues();
    let vcpus: Vec<_> = (0..4).map(|_| driver.vcpu()).collect();
    std::thread::scope(|scope| {
        for (number, mut vcpu) in vcpus.into_iter().enumerate() {
            scope.spawn(move || {
                let mut write = |register: u32, value: u32| {
                    vcpu.write(register.into(), &value.to_le_bytes());
                };
                for round in 0..40 {
                    if (round + number) % 3 == 0 {
                        write(VIRTIO_MMIO_STATUS, 0);
                    }
                    write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
                    write(VIRTIO_MMIO_DRIVER_FEATURES, 1);
                    write(VIRTIO_MMIO_STATUS, READY);
                    write(VIRTIO_MMIO_QUEUE_NOTIFY, number as u32);
                }
            });
        }
    });
    heals(&mut driver);
}

#[test]
fn a_dropped_device_waits_for_its_handlers_to_rest() {
    let (control, mut driver) = probe(&[&[8], &[8]]);
    driver.start(0);
    echo(&mut driver, 0, b"in use");
    drop(driver);
    assert_eq!(control.log().resting, 2);
}

// ---- What fails

#[test]
fn a_device_that_refuses_its_activation_needs_a_reset_which_heals_it() {
    let (control, mut driver) = probe(&[&[8]]);
    control.set(|log| log.refuse_activation = true);
    driver.start(0);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), READY | NEEDS_RESET);
    assert_eq!(driver.wait_interrupt(), CONFIGURATION_CHANGE);
    driver.request(0, &[b"x"], &[1]);
    driver.notify(0);
    // No handler runs, and neither a pause nor a resume starts one.
    assert!(driver.device.pause(PATIENCE));
    driver.device.resume();
    assert_eq!(control.log().notified, [0]);
    assert!(driver.take_used(0).is_none());
    heals(&mut driver);
}

#[test]
fn one_handler_that_fails_has_the_others_serve_no_more_until_the_reset() {
    let (control, mut driver) = probe(&[&[8], &[8]]);
    driver.start(0);
    echo(&mut driver, 0, b"a");
    echo(&mut driver, 1, b"b");
    control.set(|log| log.fault_next = true);
    driver.notify(0);
    driver.wait_needs_reset();
    let calls = control.log().notified[1];
    driver.request(1, &[b"x"], &[1]);
    driver.notify(1);
    assert!(driver.device.pause(PATIENCE));
    assert!(driver.take_used(1).is_none());
    assert_eq!(control.log().notified[1], calls);
    heals(&mut driver);
}

#[test]
fn a_handler_that_panics_needs_a_reset_like_any_other_that_failed() {
    for in_rest in [false, true] {
        let (control, mut driver) = probe(&[&[8], &[8]]);
        driver.start(0);
        echo(&mut driver, 0, b"a");
        control.set(|log| {
            log.panic_next = true;
            log.panic_in_rest = in_rest;
        });
        driver.notify(0);
        driver.wait_needs_reset();
        // It rests all the same, and is a state.
        assert!(driver.device.pause(PATIENCE));
        assert!(driver.device.state().unwrap().needs_reset);
        assert_eq!(control.log().retired, 1);
        heals(&mut driver);
    }
}

#[test]
fn a_queue_that_is_stopped_while_it_is_served_has_the_device_need_a_reset() {
    let (control, mut driver) = probe(&[&[8], &[8]]);
    driver.start(0);
    driver.write(VIRTIO_MMIO_QUEUE_SEL, 1);
    // The ring is the driver's own when its write is done: not before the handlers have let it go.
    control.set(|log| log.hold_rest = true);
    let (mut stopping, ready) = (driver.vcpu(), u64::from(VIRTIO_MMIO_QUEUE_READY));
    assert_eq!(stopping.begin_write(ready, &[0; 4]), Outcome::Deferred);
    control.wait(|log| log.resting == 2);
    assert_eq!(stopping.poll_write(&[0; 4]), Outcome::Deferred);
    control.set(|log| log.hold_rest = false);
    assert_eq!(stopping.end_write(&[0; 4]), Outcome::Answered);
    assert_eq!(control.log().retired, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), READY | NEEDS_RESET);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    driver.write(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.read(VIRTIO_MMIO_QUEUE_READY), 0);
    // Nothing is served from then on.
    driver.request(0, &[b"x"], &[1]);
    driver.notify(0);
    assert!(driver.take_used(0).is_none());
    heals(&mut driver);
}

/// Doorbells of a host that has none left, and how often it was asked.
struct Refused(Arc<Mutex<Vec<u16>>>);

impl Doorbells for Refused {
    fn attach(&self, queue: u16, _: &EventFd) -> Result<Box<dyn Send>, io_bus::Error> {
        self.0.lock().unwrap().push(queue);
        Err(refused(queue, libc::ENOSPC))
    }
}

fn refused(queue: u16, errno: i32) -> io_bus::Error {
    io_bus::Error::AssignIoEventFd {
        event: io_bus::IoEvent {
            address: io_bus::IoEventAddress::Mmio(vm_device::bus::MmioAddress(0)),
            writes: io_bus::WriteMatch::U32(queue.into()),
        },
        source: vmm_sys_util::errno::Error::new(errno),
    }
}

#[test]
fn doorbells_that_the_host_refuses_are_done_without() {
    let (control, asked) = (Control::default(), Arc::new(Mutex::new(Vec::new())));
    let mut driver = FakeDriver::with(|mut place| {
        place.doorbells = Box::new(Refused(asked.clone()));
        MmioDevice::new(Probe::new(&control, &[&[8], &[8]]), place)
    });
    driver.start(0);
    echo(&mut driver, 0, b"a");
    echo(&mut driver, 1, b"b");
    // After a reset it is asked again, and not before.
    assert!(driver.device.pause(PATIENCE));
    driver.device.resume();
    assert_eq!(*asked.lock().unwrap(), [0, 1]);
    heals(&mut driver);
    assert_eq!(*asked.lock().unwrap(), [0, 1, 0, 1]);
}

/// Doorbells that say when they are attached and detached.
struct Counted(Arc<Mutex<(u32, u32)>>);

struct Attached(Arc<Mutex<(u32, u32)>>);

impl Doorbells for Counted {
    fn attach(&self, _: u16, _: &EventFd) -> Result<Box<dyn Send>, io_bus::Error> {
        self.0.lock().unwrap().0 += 1;
        Ok(Box::new(Attached(self.0.clone())))
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Of a test that has failed as well.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1 += 1;
    }
}

#[test]
fn doorbells_are_attached_when_the_driver_is_first_ready_and_gone_with_the_device() {
    let (control, count) = (Control::default(), Arc::new(Mutex::new((0, 0))));
    let mut driver = FakeDriver::with(|mut place| {
        place.doorbells = Box::new(Counted(count.clone()));
        MmioDevice::new(Probe::new(&control, &[&[8, 8]]), place)
    });
    assert!(driver.negotiate(VERSION_1));
    driver.set_up_queues();
    assert_eq!(*count.lock().unwrap(), (0, 0));
    driver.write(VIRTIO_MMIO_STATUS, READY);
    assert_eq!(*count.lock().unwrap(), (2, 0));
    assert!(driver.device.pause(PATIENCE));
    driver.device.resume();
    assert_eq!(*count.lock().unwrap(), (2, 0));
    heals(&mut driver);
    assert_eq!(*count.lock().unwrap(), (2, 0));
    drop(driver);
    // The thread of a handler that has rested may have the device a moment longer.
    let deadline = Instant::now() + PATIENCE;
    while *count.lock().unwrap() != (2, 2) {
        assert!(Instant::now() < deadline, "they are attached still");
        std::thread::yield_now();
    }
}

/// Doorbells of a host that never lets one go, and refuses a second one for the same queue.
#[derive(Clone, Default)]
struct Sticky(Arc<Mutex<HashMap<u16, EventFd>>>);

impl Doorbells for Sticky {
    fn attach(&self, queue: u16, event: &EventFd) -> Result<Box<dyn Send>, io_bus::Error> {
        match self.0.lock().unwrap().entry(queue) {
            Entry::Occupied(_) => Err(refused(queue, libc::EEXIST)),
            Entry::Vacant(place) => {
                place.insert(event.try_clone().unwrap());
                Ok(Box::new(()))
            }
        }
    }
}

#[test]
fn a_host_that_refuses_to_detach_a_doorbell_loses_no_notification_after_a_reset() {
    let (control, host) = (Control::default(), Sticky::default());
    let mut driver = FakeDriver::with(|mut place| {
        place.doorbells = Box::new(host.clone());
        MmioDevice::new(Probe::new(&control, &[&[8]]), place)
    });
    driver.start(0);
    for _ in 0..3 {
        heals(&mut driver);
        let request = driver.request(0, &[b"x"], &[1]);
        host.0.lock().unwrap()[&0].write(1).unwrap();
        assert_eq!(driver.used(0), (request.head, 1));
    }
}

// ---- Sources

fn pair() -> (UnixStream, OwnedFd) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, theirs.into())
}

fn with_sources(sources: Vec<(u32, OwnedFd, EventSet)>) -> (Control, FakeDriver<Probe>) {
    let control = Control::default();
    let device = Probe::new(&control, &[&[8]]).with_sources(sources);
    (control, FakeDriver::new(device))
}

#[test]
fn a_source_that_hangs_up_says_so_until_it_is_forgotten_and_is_then_silent() {
    // Any number may be a token.
    for token in [0, 7, u32::MAX] {
        let (ours, theirs) = pair();
        let (control, mut driver) = with_sources(vec![(token, theirs, EventSet::empty())]);
        driver.start(0);
        echo(&mut driver, 0, b"no interest, no call");
        assert!(control.log().ready.is_empty());
        drop(ours);
        control.wait(|log| log.ready.len() >= 3);
        let hung =
            |(of, events): &(u32, EventSet)| *of == token && events.contains(EventSet::HANG_UP);
        assert!(control.log().ready.iter().all(hung));
        // The call that forgets it is the last one: whatever the queue is asked meanwhile.
        let mut seen = 0;
        control.set(|log| {
            log.on_ready = vec![(token, None)];
            seen = log.ready.len();
        });
        control.wait(|log| log.ready.len() > seen);
        echo(&mut driver, 0, b"on the same thread");
        let calls = control.log().ready.len();
        for _ in 0..50 {
            echo(&mut driver, 0, b"again");
        }
        assert_eq!(control.log().ready.len(), calls);
        heals(&mut driver);
    }
}

#[test]
fn interest_in_a_source_can_be_taken_and_given_and_what_is_forgotten_is_forgotten() {
    let (mut ours, theirs) = pair();
    let (_other, other) = pair();
    let sources = vec![(1, theirs, EventSet::empty()), (2, other, EventSet::IN)];
    let (control, mut driver) = with_sources(sources);
    ours.write_all(b"x").unwrap();
    driver.start(0);
    echo(&mut driver, 0, b"nothing is waited for");
    assert!(control.log().ready.is_empty());
    // From a queue's call; a token that is nobody's changes nothing.
    control.set(|log| {
        log.on_notified = vec![(1, Some(EventSet::IN)), (9, Some(EventSet::IN)), (9, None)]
    });
    driver.notify(0);
    control.wait(|log| log.ready.len() >= 3);
    assert!(
        control
            .log()
            .ready
            .iter()
            .all(|of| *of == (1, EventSet::IN))
    );
    control.set(|log| log.on_notified = vec![(1, Some(EventSet::empty()))]);
    driver.notify(0);
    echo(&mut driver, 0, b"x");
    let calls = control.log().ready.len();
    echo(&mut driver, 0, b"y");
    assert_eq!(control.log().ready.len(), calls);
    // Forgotten, it is not waited for again, whoever asks.
    control.set(|log| log.on_notified = vec![(1, None), (1, None), (1, Some(EventSet::IN))]);
    driver.notify(0);
    echo(&mut driver, 0, b"x");
    echo(&mut driver, 0, b"y");
    assert_eq!(control.log().ready.len(), calls);
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), READY);
    // The next activation waits for all of them again.
    driver.reset();
    control.set(|log| log.on_notified = vec![(1, Some(EventSet::IN))]);
    driver.start(0);
    control.wait(|log| log.ready.len() > calls);
    heals(&mut driver);
}

#[test]
fn a_source_that_cannot_be_waited_for_has_the_device_need_a_reset() {
    // epoll takes no regular file.
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let (_, mut driver) = with_sources(vec![(1, file.into(), EventSet::IN)]);
    driver.start(0);
    driver.wait_needs_reset();
    assert!(driver.device.pause(PATIENCE));
    driver.reset();
}

// ---- Pause, state

#[derive(Clone, Debug)]
enum Moment {
    Request(usize),
    Notify(usize),
    Used(usize),
    Pause,
    Resume,
    Restore,
    Change,
}

fn moment() -> impl Strategy<Value = Moment> {
    prop_oneof![
        6 => (0_usize..2).prop_map(Moment::Request),
        4 => (0_usize..2).prop_map(Moment::Notify),
        3 => (0_usize..2).prop_map(Moment::Used),
        2 => Just(Moment::Pause),
        2 => Just(Moment::Resume),
        1 => Just(Moment::Restore),
        1 => Just(Moment::Change),
    ]
}

#[test]
fn whenever_it_is_paused_saved_and_restored_no_request_and_no_notification_is_lost() {
    let moments = proptest::collection::vec(moment(), 1..60);
    proptest!(ProptestConfig::with_cases(150), |(moments in moments, event_index: bool)| {
        let control = Control::default();
        let groups: &[&[u16]] = &[&[8], &[4]];
        let mut driver = FakeDriver::new(Probe::new(&control, groups));
        driver.start(if event_index { TRANSPORT_FEATURES } else { VERSION_1 });
        let mut waiting = [Vec::new(), Vec::new()];
        let mut told = [true; 2];
        for moment in &moments {
            match *moment {
                // Two descriptors each: no more than half of the ring at once.
                Moment::Request(queue) if waiting[queue].len() < groups[queue][0] as usize / 2 => {
                    let request = driver.request(queue, &[b"ping"], &[4]);
                    waiting[queue].push((request.head, request.writable[0].0));
                    told[queue] = false;
                }
                Moment::Notify(queue) => {
                    driver.notify(queue);
                    told[queue] = true;
                }
                Moment::Used(queue) => while let Some((head, len)) = driver.take_used(queue) {
                    let (first, at) = waiting[queue].remove(0);
                    prop_assert_eq!((head, len), (first, 4));
                    prop_assert_eq!(driver.bytes(at, 4), b"ping");
                },
                Moment::Pause => {
                    prop_assert!(driver.device.pause(PATIENCE));
                    prop_assert!(driver.device.state().is_some());
                }
                Moment::Resume => driver.device.resume(),
                Moment::Restore => {
                    prop_assert!(driver.device.pause(PATIENCE));
                    let state = serde_json::to_string(&driver.device.state().unwrap()).unwrap();
                    let state: MmioState<Vec<u8>> = serde_json::from_str(&state).unwrap();
                    driver = driver.restored(&state, Probe::new(&control, groups));
                    prop_assert_eq!(&driver.device.state().unwrap(), &state);
                    // What the old device had been told is the restored one's to find out.
                    driver.device.resume();
                }
                Moment::Change => {
                    let generation = driver.read(VIRTIO_MMIO_CONFIG_GENERATION);
                    driver.device.driver().configuration_changed();
                    prop_assert_ne!(driver.read(VIRTIO_MMIO_CONFIG_GENERATION), generation);
                }
                Moment::Request(_) => {}
            }
        }
        driver.device.resume();
        for queue in 0..2 {
            if !told[queue] {
                driver.notify(queue);
            }
            for (head, at) in waiting[queue].drain(..) {
                prop_assert_eq!(driver.used(queue), (head, 4));
                prop_assert_eq!(driver.bytes(at, 4), b"ping");
            }
        }
        prop_assert_eq!(driver.read(VIRTIO_MMIO_STATUS), READY);
    });
}

#[test]
fn a_notification_that_comes_while_it_is_paused_is_served_when_it_goes_on() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(0);
    echo(&mut driver, 0, b"before");
    assert!(driver.device.pause(PATIENCE));
    let calls = control.log().notified[0];
    let request = driver.request(0, &[b"late"], &[4]);
    driver.notify(0);
    assert!(driver.take_used(0).is_none());
    assert_eq!(control.log().notified[0], calls);
    driver.device.resume();
    assert_eq!(driver.used(0), (request.head, 4));
    // Twice is once.
    driver.device.resume();
    driver.device.resume();
    echo(&mut driver, 0, b"after");
}

#[test]
fn a_reset_while_it_is_paused_leaves_nothing_to_resume() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(0);
    assert!(driver.device.pause(PATIENCE));
    driver.reset();
    driver.device.resume();
    assert_eq!(control.log().activations.len(), 1);
    heals(&mut driver);
}

#[test]
fn a_pause_may_wait_for_ever_and_no_longer_than_it_takes() {
    let (control, mut driver) = probe(&[&[8]]);
    driver.start(0);
    control.set(|log| log.hold_rest = true);
    let device = driver.device.clone();
    let pausing = std::thread::spawn(move || device.pause(Duration::MAX));
    control.wait(|log| log.resting == 1);
    control.set(|log| log.hold_rest = false);
    assert!(pausing.join().unwrap());
    driver.device.resume();
    echo(&mut driver, 0, b"goes on");
}

#[test]
fn a_pause_that_is_given_up_goes_on_when_it_has_come_to_rest() {
    let (control, mut driver) = probe(&[&[8], &[8]]);
    driver.start(0);
    control.set(|log| log.hold_rest = true);
    assert!(!driver.device.pause(Duration::ZERO));
    driver.device.resume();
    control.set(|log| log.hold_rest = false);
    echo(&mut driver, 0, b"goes on");
    echo(&mut driver, 1, b"so does this");
    // One that is not given up stays at rest.
    assert!(driver.device.pause(PATIENCE));
    assert!(driver.device.state().is_some());
    driver.device.resume();
    echo(&mut driver, 0, b"and on");
    assert_eq!(driver.read(VIRTIO_MMIO_STATUS), READY);
}

/// Any number, often one that means something.
fn number(of: &'static [u64], most: u64) -> impl Strategy<Value = u64> {
    prop_oneof![3 => proptest::sample::select(of), 1 => 0..=most]
}

fn state() -> impl Strategy<Value = serde_json::Value> {
    const WORD: u64 = u32::MAX as u64;
    let queue = (
        number(&[0, 1, 4, 8, 3, 0x8000], 0xffff),
        any::<bool>(),
        number(
            &[0x1_0000, 0x2_0000, 0x2_0001, 0x3ff_fff0, u64::MAX - 15],
            u64::MAX,
        ),
        number(&[0x3_0000, 0x4_0000, 0, 0x3ff_fffe, u64::MAX - 1], u64::MAX),
        number(
            &[0x5_0000, 0x6_0000, 0x1_0000, 0x3ff_fffc, u64::MAX - 3],
            u64::MAX,
        ),
    );
    let queue = queue.prop_map(|(size, ready, descriptors, driver, device)| {
        serde_json::json!({
            "size": size, "ready": ready, "descriptors": descriptors, "driver": driver, "device": device,
        })
    });
    let registers = (
        number(&[0, 0xf, 0xf, 0xf, 0x4f, 0xb, 0x8f], WORD),
        number(
            &[
                VERSION_1,
                VERSION_1,
                TRANSPORT_FEATURES,
                TRANSPORT_FEATURES | FEATURE,
                0,
            ],
            u64::MAX,
        ),
        number(&[0, 1, 2, WORD], WORD),
        proptest::collection::vec(queue, 0..5),
    );
    let position = (any::<u16>(), any::<u16>());
    let position = prop_oneof![Just((0, 0)), position];
    let position = position
        .prop_map(|(avail, used)| serde_json::json!({ "next_avail": avail, "next_used": used }));
    (
        registers,
        number(&[0, 1, 2, 3], WORD),
        number(&[0, 1, WORD], WORD),
        any::<bool>(),
        proptest::collection::vec(position, 0..5),
    )
        .prop_map(
            |((status, features, sel, queues), interrupt, generation, broken, positions)| {
                serde_json::json!({
                    "registers": {
                        "status": status,
                        "device_features_sel": sel,
                        "driver_features_sel": sel,
                        "driver_features": features,
                        "queue_sel": sel,
                        "queues": queues,
                    },
                    "interrupt_status": interrupt,
                    "generation": generation,
                    "needs_reset": broken,
                    "positions": positions,
                    "device": [],
                })
            },
        )
}

#[test]
fn a_device_in_any_state_whatever_is_no_worse_than_one_that_needs_a_reset() {
    let served = Mutex::new(0);
    proptest!(ProptestConfig::with_cases(400), |(state in state(), avail: u16)| {
        let state: MmioState<Vec<u8>> = serde_json::from_value(state).unwrap();
        let control = Control::default();
        let mut driver = FakeDriver::with(|place| {
            MmioDevice::from_state(Probe::new(&control, &[&[8], &[4]]), place, &state)
        });
        for ring in [0x3_0002, 0x4_0002] {
            let at = vm_memory::GuestAddress(ring);
            vm_memory::Bytes::write_obj(&*driver.memory(), avail, at).unwrap();
        }
        driver.device.resume();
        for register in (0..CONFIG as u32).step_by(4) {
            driver.read(register);
        }
        driver.notify(0);
        prop_assert!(driver.device.pause(PATIENCE));
        let after = driver.device.state().unwrap();
        let given = control.log().activations.clone();
        // A device gets only features that it offered.
        prop_assert!(given.iter().all(|features| features & !(TRANSPORT_FEATURES | FEATURE) == 0));
        *served.lock().unwrap() += given.len();
        prop_assert!(given.is_empty() || !state.needs_reset);
        driver.device.resume();
        prop_assert!(driver.device.pause(PATIENCE));
        if after.needs_reset {
            prop_assert_eq!(control.log().activations.len(), given.len());
        }
        driver.device.resume();
        heals(&mut driver);
    });
    assert!(*served.lock().unwrap() > 20, "{served:?}");
}
