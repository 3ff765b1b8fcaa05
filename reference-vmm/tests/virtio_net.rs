// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-net before a driver that writes its rings by hand, and a tap that is a socket.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "in functions of tests"
)]

use std::time::Duration;

use proptest::prelude::*;
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver, Request};
use reference_vmm::devices::virtio::mmio::MmioState;
use reference_vmm::devices::virtio::net::fake::{Call, FakeTap, Network};
use reference_vmm::devices::virtio::net::tap::{HEADER, Offload};
use reference_vmm::devices::virtio::net::{FRAME_MOST, Mac, Net, NetError, NetState};
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;

const RX: usize = 0;
const TX: usize = 1;
const PATIENCE: Duration = Duration::from_secs(60);
const MERGED: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const STATUS: u64 = 1 << VIRTIO_NET_F_STATUS;
const MULTIQUEUE: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

type Driver = FakeDriver<Net<FakeTap>>;

fn taps(queues: usize) -> (Vec<FakeTap>, Vec<Network>) {
    (0..queues).map(|_| FakeTap::new().unwrap()).unzip()
}

fn net(queues: usize) -> (Net<FakeTap>, Vec<Network>) {
    let (taps, networks) = taps(queues);
    let mac = "02:00:00:12:34:56".parse().unwrap();
    let net = Net::new("tap0", mac, Some(1400), taps, Offload::UDP);
    (net.unwrap(), networks)
}

/// A driver that has accepted these features, and its tap's other side.
fn started(features: u64) -> (Driver, Network) {
    let (net, mut networks) = net(1);
    let mut driver = FakeDriver::new(net);
    driver.start(features);
    (driver, networks.remove(0))
}

/// A frame with its header, as the tap has it: `len` bytes of the frame, different for each `seed`.
fn frame(seed: usize, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER + len];
    for (at, byte) in frame.iter_mut().enumerate() {
        *byte = (seed * 31 + at * 7 + (at >> 8)) as u8;
    }
    frame[10..HEADER].fill(0);
    frame
}

/// What the guest has of a frame in these buffers.
fn received(driver: &mut Driver, queue: usize, buffers: &mut Vec<Request>) -> Vec<u8> {
    let mut frame = Vec::new();
    let mut left = 1;
    while left > 0 {
        // The first is waited for, the others are there.
        let (head, len) = match frame.is_empty() {
            true => driver.used(queue),
            false => driver.take_used(queue).expect("the frame's other buffers"),
        };
        let buffer = buffers.remove(0);
        assert_eq!(head, buffer.head);
        let mut written = len;
        for (at, room) in buffer.writable {
            let part = room.min(written);
            frame.extend(driver.bytes(at, part as usize));
            written -= part;
        }
        assert_eq!(written, 0);
        if left == 1 && frame.len() == len as usize {
            left = u16::from_le_bytes([frame[10], frame[11]]);
            frame[10..12].fill(0);
        }
        left -= 1;
    }
    frame
}

fn link(driver: &mut Driver) -> u16 {
    let mut status = [0; 2];
    driver.config(6, &mut status);
    u16::from_le_bytes(status)
}

/// Through a pause and a text into a new device with new taps.
fn restored(driver: Driver, taps: Vec<FakeTap>) -> Driver {
    let state = saved(&driver);
    let net = Net::from_state("tap0", &state.device, taps, Offload::UDP).unwrap();
    let driver = driver.restored(&state, net);
    driver.device.resume();
    driver
}

fn saved(driver: &Driver) -> MmioState<NetState> {
    assert!(driver.device.pause(PATIENCE));
    let state = driver.device.state().unwrap();
    serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap()
}

#[test]
fn the_configuration_space_has_the_address_the_link_the_pairs_and_the_mtu() {
    let (net, _networks) = net(3);
    let mut driver = FakeDriver::new(net);
    driver.start(u64::MAX);
    let mut config = [0xff; 14];
    driver.config(0, &mut config);
    let mtu = 1400u16.to_le_bytes();
    assert_eq!(config[..6], [2, 0, 0, 0x12, 0x34, 0x56]);
    assert_eq!(config[6..10], [1, 0, 3, 0]);
    assert_eq!((&config[10..12], &config[12..]), (&mtu[..], &[0, 0][..]));
    let mut beyond = [0xff; 4];
    driver.config(0xe00, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn frames_go_both_ways_as_they_are() {
    for features in [0, MERGED, u64::MAX] {
        let (mut driver, network) = started(features);
        for (seed, len) in [(1, 60), (2, 1514), (3, 14)] {
            let mut buffers = vec![driver.request(RX, &[], &[12, 700, 830])];
            driver.notify(RX);
            assert!(network.send(&frame(seed, len)).unwrap());
            assert_eq!(received(&mut driver, RX, &mut buffers), frame(seed, len));
            let sent = frame(seed + 9, len);
            let request = driver.request(TX, &[&sent[..4], &sent[4..20], &sent[20..]], &[]);
            driver.notify(TX);
            assert_eq!(driver.used(TX), (request.head, 0));
            assert_eq!(network.receive().unwrap(), sent);
        }
    }
}

#[test]
fn a_header_says_1_buffer_where_frames_are_not_merged() {
    let (mut driver, network) = started(0);
    let buffer = driver.request(RX, &[], &[2000]);
    driver.notify(RX);
    let mut sent = frame(1, 100);
    sent[10..12].fill(0xee);
    network.send(&sent).unwrap();
    assert_eq!(driver.used(RX), (buffer.head, 112));
    assert_eq!(driver.bytes(buffer.writable[0].0, 12)[10..], [1, 0]);
}

#[test]
fn a_merged_frame_fills_buffers_in_order_and_the_driver_sees_all_of_them_at_once() {
    let (mut driver, network) = started(u64::MAX);
    let mut buffers = Vec::new();
    for len in [100, 12, 13, 3000, 40_000, 30_000, 64] {
        buffers.push(driver.request(RX, &[], &[len]));
    }
    driver.notify(RX);
    for (seed, len) in [(1, 3000), (2, 65_550)] {
        assert!(network.send(&frame(seed, len)).unwrap());
        assert_eq!(received(&mut driver, RX, &mut buffers), frame(seed, len));
    }
    assert_eq!(buffers.len(), 1);
}

#[test]
fn a_frame_that_was_read_waits_for_buffers_enough_and_for_a_new_process() {
    let (mut driver, network) = started(MERGED);
    let mut buffers = vec![driver.request(RX, &[], &[1000])];
    driver.notify(RX);
    network.send(&frame(1, 3000)).unwrap();
    network.send(&frame(2, 200)).unwrap();
    // It has been read once it is in the state.
    while saved(&driver).device.frames == [Vec::<u8>::new()] {
        driver.device.resume();
    }
    assert_eq!(saved(&driver).device.frames, [frame(1, 3000)]);
    let (mut taps, mut networks) = taps(1);
    driver = restored(driver, std::mem::take(&mut taps));
    let network = (network, networks.remove(0)).1;
    network.send(&frame(3, 200)).unwrap();
    for _ in 0..3 {
        buffers.push(driver.request(RX, &[], &[1500]));
        driver.notify(RX);
    }
    assert_eq!(received(&mut driver, RX, &mut buffers), frame(1, 3000));
    assert_eq!(received(&mut driver, RX, &mut buffers), frame(3, 200));
}

#[test]
fn nothing_is_read_while_the_guest_has_no_buffers() {
    let (mut driver, network) = started(MERGED);
    for seed in 0..8 {
        network.send(&frame(seed, 100)).unwrap();
    }
    // What is transmitted behind them shows that they were noticed.
    for _ in 0..3 {
        driver.request(TX, &[&frame(1, 60)], &[]);
        driver.notify(TX);
        driver.used(TX);
    }
    assert_eq!(network.calls(Call::Read), 0);
    let mut buffers = Vec::new();
    for _ in 0..8 {
        buffers.push(driver.request(RX, &[], &[200]));
        driver.notify(RX);
    }
    for seed in 0..8 {
        assert_eq!(received(&mut driver, RX, &mut buffers), frame(seed, 100));
    }
}

#[test]
fn a_frame_that_is_too_long_for_one_buffer_is_dropped_and_the_buffer_takes_the_next() {
    let (net, networks) = net(1);
    let counters = net.counters();
    let mut driver = FakeDriver::new(net);
    driver.start(0);
    let mut buffers = vec![driver.request(RX, &[], &[100])];
    driver.notify(RX);
    networks[0].send(&frame(1, 89)).unwrap();
    networks[0].send(&frame(2, 88)).unwrap();
    assert_eq!(received(&mut driver, RX, &mut buffers), frame(2, 88));
    assert_eq!(counters()[..2], [("rx_frames", 1), ("rx_dropped", 1)]);
}

#[test]
fn a_frame_that_all_buffers_together_are_too_small_for_is_dropped() {
    let (mut driver, network) = started(MERGED);
    let mut buffers = Vec::new();
    for _ in 0..256 {
        buffers.push(driver.request(RX, &[], &[12]));
    }
    driver.notify(RX);
    network.send(&frame(1, 12 * 256)).unwrap();
    network.send(&frame(2, 30)).unwrap();
    assert_eq!(received(&mut driver, RX, &mut buffers), frame(2, 30));
}

#[test]
fn what_the_tap_has_no_room_for_waits_and_goes_in_order() {
    let (mut driver, network) = started(0);
    // More than the socket takes.
    let count = 200;
    for seed in 0..count {
        driver.request(TX, &[&frame(seed, 9000)], &[]);
    }
    driver.notify(TX);
    driver.used(TX);
    for seed in 0..count {
        assert_eq!(network.receive().unwrap(), frame(seed, 9000));
    }
    for _ in 1..count {
        driver.used(TX);
    }
}

#[test]
fn a_host_without_memory_is_asked_again_and_not_for_ever() {
    let (mut driver, network) = started(0);
    for _ in 0..15 {
        network.refuse(Call::Write, libc::ENOBUFS);
    }
    driver.request(TX, &[&frame(1, 60)], &[]);
    driver.notify(TX);
    driver.used(TX);
    assert_eq!(network.receive().unwrap(), frame(1, 60));
    for _ in 0..16 {
        network.refuse(Call::Write, libc::ENOMEM);
    }
    driver.request(TX, &[&frame(2, 60)], &[]);
    driver.request(TX, &[&frame(3, 60)], &[]);
    driver.notify(TX);
    driver.used(TX);
    driver.used(TX);
    assert_eq!(network.receive().unwrap(), frame(3, 60));
    assert_eq!(network.refusals(), 0);
}

#[test]
fn a_frame_waits_for_a_tap_that_is_down_and_the_driver_hears_that_it_went_and_that_it_is_back() {
    for (features, changes) in [(STATUS, 2), (0, 0)] {
        let (mut driver, network) = started(features);
        network.refuse(Call::Write, libc::EIO);
        driver.request(TX, &[&frame(1, 60)], &[]);
        driver.notify(TX);
        driver.used(TX);
        // The socket is writable as soon as it is asked. How it is meanwhile, virtio_net_tap.rs has of a true tap.
        assert_eq!(network.receive().unwrap(), frame(1, 60));
        assert_eq!(link(&mut driver), 1);
        assert_eq!(driver.device.driver().generation(), changes);
    }
}

#[test]
fn a_tap_that_is_gone_leaves_a_guest_without_a_carrier_whose_frames_come_back() {
    for call in [Call::Read, Call::Write] {
        let (mut driver, network) = started(STATUS);
        network.refuse(call, libc::EBADFD);
        driver.request(RX, &[], &[2000]);
        driver.notify(RX);
        network.send(&frame(1, 60)).unwrap();
        for _ in 0..10 {
            driver.request(TX, &[&frame(1, 60)], &[]);
            driver.notify(TX);
            driver.used(TX);
        }
        while link(&mut driver) == 1 {
            driver.wait_interrupt();
        }
        // A new tap, in a new process: the link is up, and the driver is told.
        let generation = driver.device.driver().generation();
        let (taps, networks) = taps(1);
        driver = restored(driver, taps);
        assert_eq!(link(&mut driver), 1);
        assert_eq!(driver.device.driver().generation(), generation + 1);
        driver.request(TX, &[&frame(2, 60)], &[]);
        driver.notify(TX);
        assert_eq!(networks[0].receive().unwrap(), frame(2, 60));
    }
    let (mut driver, network) = started(STATUS);
    drop(network);
    while link(&mut driver) == 1 {
        driver.wait_interrupt();
    }
    driver.reset();
    driver.start(STATUS);
    driver.request(TX, &[&frame(1, 60)], &[]);
    driver.notify(TX);
    driver.used(TX);
    assert_eq!(link(&mut driver), 0);
}

#[test]
fn frames_that_are_none_are_dropped_and_counted_and_the_next_one_goes() {
    let (net, networks) = net(1);
    let counters = net.counters();
    let mut driver = FakeDriver::new(net);
    driver.start(0);
    networks[0].refuse(Call::Write, libc::EINVAL);
    let long = vec![0; FRAME_MOST + 1];
    let wrong: [&[&[u8]]; 6] = [
        // The one that the kernel refuses.
        &[&frame(0, 60)],
        &[],
        &[&[]],
        &[&[0; 12]],
        &[&[0; 12], &[0; 13]],
        &[&long],
    ];
    for parts in wrong {
        let request = match parts {
            // A chain has at least one descriptor.
            [] => driver.request(TX, &[], &[10]),
            parts => driver.request(TX, parts, &[]),
        };
        driver.notify(TX);
        assert_eq!(driver.used(TX), (request.head, 0));
    }
    driver.request(TX, &[&frame(1, 14)], &[]);
    driver.notify(TX);
    assert_eq!(networks[0].receive().unwrap(), frame(1, 14));
    driver.used(TX);
    assert_eq!(counters()[2..], [("tx_frames", 1), ("tx_dropped", 6)]);
}

#[test]
fn chains_of_as_many_buffers_as_can_be_work_in_both_directions() {
    let (mut driver, network) = started(MERGED);
    let sent = frame(1, 490);
    let at = driver.allocate(8192);
    let memory = driver.memory();
    vm_memory::Bytes::write_slice(&*memory, &sent, at).unwrap();
    let part = |at: u64, len, flags| Descriptor {
        address: at,
        len,
        flags,
        next: 0,
    };
    // Zero-length buffers among them, and not more than 1,024 in all.
    let bytes = (0..sent.len() as u64).flat_map(|of| [part(at.0 + of, 1, 0), part(at.0, 0, 0)]);
    let head = driver.indirect(TX, &bytes.collect::<Vec<_>>());
    driver.notify(TX);
    assert_eq!(driver.used(TX), (head, 0));
    assert_eq!(network.receive().unwrap(), sent);

    let write = VRING_DESC_F_WRITE as u16;
    let room = driver.allocate(8192);
    let bytes = (0..1024).map(|of| part(room.0 + of, 1, write));
    let head = driver.indirect(RX, &bytes.collect::<Vec<_>>());
    driver.notify(RX);
    network.send(&sent).unwrap();
    assert_eq!(driver.used(RX), (head, sent.len() as u32));
    assert_eq!(driver.bytes(room, sent.len())[HEADER..], sent[HEADER..]);
}

#[test]
fn buffers_that_cannot_be_need_a_reset_after_which_all_works() {
    let write = VRING_DESC_F_WRITE as u16;
    let one = |address, len, flags| {
        vec![Descriptor {
            address,
            len,
            flags,
            next: 0,
        }]
    };
    let frames = frame(1, 60);
    for features in [0, u64::MAX] {
        let (mut driver, network) = started(features);
        for (queue, chain) in [
            (RX, one(0x1000, 0, write)),
            (RX, one(0x1000, 11, write)),
            (RX, one(0x1000, 64, 0)),
            (RX, one(1 << 40, 2000, write)),
            (RX, one((64 << 20) - 100, 2000, write)),
            (RX, one(u64::MAX - 100, 2000, write)),
            (TX, one(1 << 40, 200, 0)),
            (TX, one((64 << 20) - 100, 2000, 0)),
        ] {
            driver.chain(queue, &chain);
            driver.notify(queue);
            network.send(&frames).unwrap();
            driver.wait_needs_reset();
            driver.reset();
            driver.start(features);
            let mut buffers = vec![driver.request(RX, &[], &[2000])];
            driver.notify(RX);
            assert_eq!(received(&mut driver, RX, &mut buffers), frames);
        }
    }
}

#[test]
fn the_kernel_leaves_to_the_guest_what_its_driver_accepted_and_all_else_is_done_for_it() {
    let (net, networks) = net(1);
    let mut driver = FakeDriver::new(net);
    let [csum, tso4, tso6, ecn] = [
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
    ]
    .map(|bit| 1u64 << bit);
    let uso = 1u64 << VIRTIO_NET_F_GUEST_USO4 | 1u64 << VIRTIO_NET_F_GUEST_USO6;
    for (features, offload) in [
        (csum, libc::TUN_F_CSUM),
        (csum | tso4, libc::TUN_F_CSUM | libc::TUN_F_TSO4),
        (tso4 | tso6, 0),
        (csum | ecn, libc::TUN_F_CSUM),
        (csum | tso4 | tso6 | ecn, Offload::TCP.0),
        (csum | tso4 | tso6 | ecn | uso, Offload::UDP.0),
        (csum | 1 << VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_CSUM),
        (0, 0),
    ] {
        driver.start(features);
        assert_eq!(networks[0].offload(), Offload(offload), "{features:#x}");
        driver.reset();
    }
    networks[0].refuse(Call::Offload, libc::EINVAL);
    driver.start(csum);
    driver.wait_needs_reset();
}

#[test]
fn a_driver_without_multiqueue_has_one_pair_and_the_control_queue_behind_it() {
    let (net, networks) = net(3);
    let mut driver = FakeDriver::new(net);
    driver.start(1 << VIRTIO_NET_F_CTRL_VQ);
    let attached = || networks.iter().map(Network::is_attached);
    assert!(attached().eq([true, false, false]));
    let request = driver.request(2, &[&[4, 0], &[2, 0]], &[1]);
    driver.notify(2);
    assert_eq!(driver.used(2), (request.head, 1));
    assert_eq!(
        driver.bytes(request.writable[0].0, 1),
        [VIRTIO_NET_ERR as u8]
    );
    assert!(attached().eq([true, false, false]));
}

/// What the device answers to a command.
fn command(driver: &mut Driver, control: usize, command: &[u8]) -> u8 {
    let request = driver.request(control, &[command], &[1, 3]);
    driver.notify(control);
    assert_eq!(driver.used(control), (request.head, 1));
    driver.bytes(request.writable[0].0, 1)[0]
}

#[test]
fn the_driver_sets_how_many_pairs_it_uses() {
    let (net, networks) = net(3);
    let mut driver = FakeDriver::new(net);
    driver.start(MULTIQUEUE | MERGED);
    let control = 6;
    let attached = |networks: &[Network]| {
        let attached = networks.iter().map(Network::is_attached);
        attached.collect::<Vec<_>>()
    };
    assert_eq!(attached(&networks), [true, false, false]);
    let set = |driver: &mut Driver, pairs: u16| {
        let [low, high] = pairs.to_le_bytes();
        u32::from(command(driver, control, &[4, 0, low, high]))
    };
    assert_eq!(set(&mut driver, 3), VIRTIO_NET_OK);
    assert_eq!(attached(&networks), [true, true, true]);
    // Each pair is one of its own.
    for (pair, network) in networks.iter().enumerate() {
        let mut buffers = vec![driver.request(2 * pair, &[], &[2000])];
        driver.notify(2 * pair);
        network.send(&frame(pair, 60)).unwrap();
        assert_eq!(
            received(&mut driver, 2 * pair, &mut buffers),
            frame(pair, 60)
        );
        driver.request(2 * pair + 1, &[&frame(pair + 5, 60)], &[]);
        driver.notify(2 * pair + 1);
        assert_eq!(network.receive().unwrap(), frame(pair + 5, 60));
    }
    for pairs in [0, 4, 256, u16::MAX] {
        assert_eq!(set(&mut driver, pairs), VIRTIO_NET_ERR);
    }
    // Not offered, malformed, or unknown.
    for bytes in [&[4, 0, 1][..], &[4, 1, 1, 0], &[0, 0, 1, 0], &[9, 9, 1, 0]] {
        assert_eq!(
            u32::from(command(&mut driver, control, bytes)),
            VIRTIO_NET_ERR
        );
    }
    assert_eq!(attached(&networks), [true, true, true]);
    // A queue that the kernel does not detach undoes the other.
    networks[2].refuse(Call::Attach, libc::ENOMEM);
    assert_eq!(set(&mut driver, 1), VIRTIO_NET_ERR);
    assert_eq!(attached(&networks), [true, true, true]);
    assert_eq!(set(&mut driver, 1), VIRTIO_NET_OK);
    assert_eq!(attached(&networks), [true, false, false]);
    // What comes by a queue that is not used waits for its use.
    let mut buffers = vec![driver.request(2, &[], &[2000])];
    driver.notify(2);
    networks[1].send(&frame(1, 60)).unwrap();
    assert_eq!(set(&mut driver, 2), VIRTIO_NET_OK);
    assert_eq!(received(&mut driver, 2, &mut buffers), frame(1, 60));
    // The number outlives a restore, and not a reset.
    let (taps, networks) = taps(3);
    driver = restored(driver, taps);
    assert_eq!(attached(&networks), [true, true, false]);
    let mut buffers = vec![driver.request(2, &[], &[2000])];
    driver.notify(2);
    networks[1].send(&frame(2, 60)).unwrap();
    assert_eq!(received(&mut driver, 2, &mut buffers), frame(2, 60));
    driver.reset();
    driver.start(MULTIQUEUE);
    assert_eq!(attached(&networks), [true, false, false]);
    // A command that cannot be answered.
    driver.request(control, &[&[4, 0, 1, 0]], &[]);
    driver.notify(control);
    driver.wait_needs_reset();
}

#[test]
fn a_state_that_the_tap_does_not_fit_is_refused() {
    let (driver, _network) = started(u64::MAX);
    let good = saved(&driver).device;
    let from = |state: &NetState, queues, offload| {
        Net::from_state("tap0", state, taps(queues).0, offload).map(|net| net.mac())
    };
    assert_eq!(from(&good, 1, Offload::UDP).unwrap(), good.mac);
    let error = from(&good, 1, Offload::TCP).unwrap_err();
    assert!(matches!(error, NetError::Features { .. }), "{error}");
    assert!(!error.is_users_fault());
    let bad = |change: fn(&mut NetState)| {
        let mut state = good.clone();
        change(&mut state);
        state
    };
    for state in [
        bad(|state| state.queues = 2),
        bad(|state| state.pairs = 0),
        bad(|state| state.pairs = 2),
        bad(|state| state.frames = vec![]),
        bad(|state| state.frames = vec![vec![0; FRAME_MOST + 1]]),
        bad(|state| state.frames = vec![vec![0; 12]]),
    ] {
        let error = from(&state, 1, Offload::UDP).unwrap_err();
        assert!(matches!(error, NetError::State(_)), "{error}");
    }
    assert!(Mac::new([1, 0, 0, 0, 0, 0]).is_err());
}

/// A step of the host's or the guest's.
#[derive(Clone, Debug)]
enum Step {
    /// The guest makes a buffer available for frames, of these parts.
    Buffer(Vec<u32>),
    /// The host sends a frame of this length.
    Send(usize),
    /// The guest sends a frame, cut at these places.
    Transmit(usize, Vec<usize>),
    /// All is saved and goes on in a new device.
    Restore,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let parts = prop::collection::vec(prop_oneof![0..20u32, 0..2000u32, 0..9000u32], 1..5);
    let cuts = prop::collection::vec(0..2000usize, 0..4);
    let len = || prop_oneof![14..80usize, 14..1515usize, 14..9000usize];
    let step = prop_oneof![
        8 => parts.prop_map(Step::Buffer),
        6 => len().prop_map(Step::Send),
        6 => (len(), cuts).prop_map(|(len, cuts)| Step::Transmit(len, cuts)),
        1 => Just(Step::Restore),
    ];
    prop::collection::vec(step, 1..45)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_arrive_unchanged_and_in_order_whatever_the_buffers_and_through_restores(
        steps in steps(),
        features in prop_oneof![Just(MERGED), Just(u64::MAX)],
    ) {
        let (mut driver, network) = started(features);
        // Those before the last restore have what was sent before it.
        let mut networks = vec![network];
        let mut buffers = Vec::new();
        let (mut to_guest, mut to_host) = (Vec::new(), Vec::new());
        let mut before_restore = 0;
        let mut taken = 0;
        for (seed, step) in steps.into_iter().enumerate() {
            match step {
                Step::Buffer(mut parts) => {
                    if parts.iter().sum::<u32>() < HEADER as u32 {
                        parts.push(HEADER as u32);
                    }
                    buffers.push(driver.request(RX, &[], &parts));
                    driver.notify(RX);
                }
                Step::Send(len) => {
                    networks.last().unwrap().send(&frame(seed, len)).unwrap();
                    to_guest.push(frame(seed, len));
                }
                Step::Transmit(len, cuts) => {
                    let sent = frame(seed, len);
                    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut % sent.len()).collect();
                    cuts.sort_unstable();
                    let (mut parts, mut from) = (Vec::new(), 0);
                    for cut in cuts {
                        parts.push(&sent[from..cut]);
                        from = cut;
                    }
                    parts.push(&sent[from..]);
                    driver.request(TX, &parts, &[]);
                    driver.notify(TX);
                    to_host.push(sent.clone());
                }
                Step::Restore => {
                    // The new tap has none of what the old one's kernel still had, so all of that arrives first.
                    for _ in before_restore..to_guest.len() {
                        buffers.push(driver.request(RX, &[], &[9100]));
                    }
                    driver.notify(RX);
                    for sent in &to_guest[before_restore..] {
                        prop_assert_eq!(&received(&mut driver, RX, &mut buffers), sent);
                    }
                    before_restore = to_guest.len();
                    let (taps, mut new) = taps(1);
                    driver = restored(driver, taps);
                    networks.append(&mut new);
                }
            }
        }
        for _ in before_restore..to_guest.len() {
            buffers.push(driver.request(RX, &[], &[9100]));
        }
        driver.notify(RX);
        for sent in &to_guest[before_restore..] {
            prop_assert_eq!(&received(&mut driver, RX, &mut buffers), sent);
        }
        for _ in &to_host {
            driver.used(TX);
        }
        for network in &networks {
            while let Some(frame) = network.try_receive().unwrap() {
                prop_assert_eq!(&frame, &to_host[taken]);
                taken += 1;
            }
        }
        prop_assert_eq!(taken, to_host.len());
    }
}
