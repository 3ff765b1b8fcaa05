// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-net at taps of the kernel's, each in a network namespace of its test's own: for root, with /dev/net/tun.

#![allow(clippy::unwrap_used, reason = "in functions of tests")]

#[path = "support/tap.rs"]
mod tap;

use std::ffi::{CString, c_int};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use reference_vmm::devices::virtio::fake::FakeDriver;
use reference_vmm::devices::virtio::net::tap::{HEADER, TapError};
use reference_vmm::devices::virtio::net::{Net, NetConfig, NetError};
use tap::{alone, await_carrier, make, make_up, set_up, socket};
use virtio_bindings::virtio_net::*;

const RX: usize = 0;
const TX: usize = 1;
/// For local experiments (IEEE 802): nobody else sends such frames.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MULTIQUEUE: u64 = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;

type Driver = FakeDriver<Net>;

/// The host's side of a tap: every frame that passes it.
struct Host(File);

impl Host {
    fn at(name: &str) -> Self {
        await_carrier(name);
        let host = Host::anywhere();
        let name = CString::new(name).unwrap();
        // SAFETY: plain numbers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: a string that ends in 0.
        address.sll_ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) } as c_int;
        let len = size_of_val(&address) as u32;
        // SAFETY: an address and its length.
        let done = unsafe { libc::bind(host.0.as_raw_fd(), (&raw const address).cast(), len) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
        host
    }

    /// At no interface in particular: what passes one that has just come up is heard. A socket of its own is only put back
    /// to an interface some time after that has frames.
    fn anywhere() -> Self {
        let all = (libc::ETH_P_ALL as u16).to_be();
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, all.into());
        let patience = libc::timeval {
            tv_sec: 60,
            tv_usec: 0,
        };
        let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
        let len = size_of_val(&patience) as u32;
        let value = (&raw const patience).cast();
        // SAFETY: an option's value and its length.
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, len) };
        Host(File::from(socket))
    }

    fn send(&mut self, frame: &[u8]) {
        assert_eq!(self.0.write(frame).unwrap(), frame.len());
    }

    /// The next frame of a test's with this first byte.
    fn receive(&mut self, seed: u8) -> Vec<u8> {
        loop {
            let mut frame = vec![0; 1 << 16];
            let len = self.0.read(&mut frame).unwrap();
            frame.truncate(len);
            if frame.get(12..14) == Some(&ETHERTYPE) && frame.get(14) == Some(&seed) {
                return frame;
            }
        }
    }
}

fn frame(seed: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(ETHERTYPE);
    frame.extend((14..len).map(|at| seed.wrapping_add((at - 14) as u8)));
    frame
}

fn transmit(driver: &mut Driver, queue: usize, frame: &[u8]) -> u16 {
    let request = driver.request(queue, &[&[0; HEADER], frame], &[]);
    driver.notify(queue);
    request.head
}

/// What the guest has been given, and no other network's frames.
fn received(driver: &mut Driver, queue: usize) -> Vec<u8> {
    loop {
        let request = driver.request(queue, &[], &[2000]);
        driver.notify(queue);
        let (head, len) = driver.used(queue);
        assert_eq!(head, request.head);
        let frame = driver.bytes(request.writable[0].0, len as usize);
        if frame[HEADER + 12..][..2] == ETHERTYPE {
            return frame[HEADER..].to_vec();
        }
    }
}

fn link(driver: &mut Driver) -> u16 {
    let mut status = [0; 2];
    driver.config(6, &mut status);
    u16::from_le_bytes(status)
}

fn open(text: &str) -> Driver {
    let net = NetConfig::parse(text).unwrap().open().unwrap();
    FakeDriver::new(net)
}

fn refused(text: &str) -> (String, bool) {
    let error = NetConfig::parse(text).unwrap().open().unwrap_err();
    (error.to_string(), error.is_users_fault())
}

#[test]
fn frames_go_between_the_guest_and_the_hosts_network() {
    alone();
    make_up("vm0", 0);
    let mut driver = open("tap=vm0");
    for features in [0, u64::MAX] {
        driver.start(features);
        let mut host = Host::at("vm0");
        for (seed, len) in [(1, 14), (2, 60), (3, 1514)] {
            let sent = frame(seed, len.max(15));
            let head = transmit(&mut driver, TX, &sent);
            assert_eq!(driver.used(TX), (head, 0));
            assert_eq!(host.receive(seed), sent);
            let sent = frame(seed + 10, len.max(15));
            host.send(&sent);
            assert_eq!(received(&mut driver, RX), sent);
        }
        driver.reset();
    }
}

#[test]
fn a_tap_that_goes_down_is_a_link_without_a_carrier_until_it_is_up() {
    alone();
    make_up("vm0", 0);
    let mut driver = open("tap=vm0");
    driver.start(u64::MAX);
    await_carrier("vm0");
    let mut host = Host::anywhere();
    set_up("vm0", false);
    let head = transmit(&mut driver, TX, &frame(1, 60));
    while link(&mut driver) == 1 {
        driver.wait_interrupt();
    }
    assert_eq!(driver.take_used(TX), None);
    set_up("vm0", true);
    while link(&mut driver) == 0 {
        driver.wait_interrupt();
    }
    assert_eq!(host.receive(1), frame(1, 60));
    assert_eq!(driver.used(TX), (head, 0));
}

#[test]
fn a_tap_that_is_deleted_leaves_a_guest_without_a_carrier_whose_frames_come_back() {
    // Whether the guest has buffers, so that frames are waited for, or not.
    for buffers in [0, 64] {
        deleted(buffers);
    }
}

fn deleted(buffers: usize) {
    alone();
    make_up("vm0", libc::IFF_MULTI_QUEUE);
    let mut driver = open("tap=vm0,queues=2");
    driver.start(!MULTIQUEUE);
    for _ in 0..buffers {
        driver.request(RX, &[], &[2000]);
    }
    driver.notify(RX);
    transmit(&mut driver, TX, &frame(1, 60));
    driver.used(TX);
    let done = Command::new("ip").args(["link", "del", "vm0"]).status();
    assert!(done.unwrap().success());
    while link(&mut driver) == 1 {
        driver.wait_interrupt();
    }
    for seed in 0..5 {
        let head = transmit(&mut driver, TX, &frame(seed, 60));
        assert_eq!(driver.used(TX), (head, 0));
    }
    assert!(driver.device.pause(Duration::from_secs(60)));
    assert!(!driver.device.state().unwrap().device.link);
}

#[test]
fn each_queue_pair_in_use_has_a_queue_of_the_tap_and_no_other_has() {
    alone();
    make_up("vm0", libc::IFF_MULTI_QUEUE);
    let mut driver = open("tap=vm0,queues=3");
    driver.start(MULTIQUEUE | 1 << VIRTIO_NET_F_STATUS);
    let mut host = Host::at("vm0");
    for pairs in [3u8, 1, 2, 1, 3] {
        let request = driver.request(6, &[&[4, 0, pairs, 0]], &[1]);
        driver.notify(6);
        driver.used(6);
        assert_eq!(driver.bytes(request.writable[0].0, 1), [0]);
        for pair in 0..usize::from(pairs) {
            let seed = pairs * 16 + pair as u8;
            let head = transmit(&mut driver, 2 * pair + 1, &frame(seed, 100));
            assert_eq!(driver.used(2 * pair + 1), (head, 0));
            assert_eq!(host.receive(seed), frame(seed, 100));
        }
        // Wherever the kernel sends it, it is one of those in use.
        let sent = frame(pairs + 100, 200);
        let mut room = Vec::new();
        for pair in 0..usize::from(pairs) {
            room.push(driver.request(2 * pair, &[], &[2000]));
            driver.notify(2 * pair);
        }
        host.send(&sent);
        let found = 'found: loop {
            for (pair, room) in room.iter_mut().enumerate() {
                while let Some((_, len)) = driver.take_used(2 * pair) {
                    let frame = driver.bytes(room.writable[0].0, len as usize);
                    if frame[HEADER..] == sent {
                        break 'found true;
                    }
                    *room = driver.request(2 * pair, &[], &[2000]);
                    driver.notify(2 * pair);
                }
            }
            driver.wait_interrupt();
        };
        assert!(found);
        // The buffers that are left would be the next round's.
        driver.reset();
        driver.start(MULTIQUEUE | 1 << VIRTIO_NET_F_STATUS);
    }
    assert_eq!(link(&mut driver), 1);
}

#[test]
fn a_tap_with_many_queues_serves_a_guest_with_one() {
    alone();
    make_up("vm0", libc::IFF_MULTI_QUEUE);
    let mut driver = open("tap=vm0");
    driver.start(0);
    let mut host = Host::at("vm0");
    transmit(&mut driver, TX, &frame(1, 60));
    assert_eq!(host.receive(1), frame(1, 60));
}

#[test]
fn a_device_goes_on_at_a_tap_of_another_process() {
    alone();
    make_up("vm0", 0);
    make_up("vm1", 0);
    let mut driver = open("tap=vm0,mac=02:00:00:00:00:07");
    driver.start(u64::MAX);
    assert!(driver.device.pause(Duration::from_secs(60)));
    let state = driver.device.state().unwrap();
    let there = NetConfig::parse("tap=vm1").unwrap();
    let net = there.restore(&state.device).unwrap();
    driver = driver.restored(&state, net);
    driver.device.resume();
    let mut mac = [0; 6];
    driver.config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 7]);
    let mut host = Host::at("vm1");
    transmit(&mut driver, TX, &frame(1, 60));
    assert_eq!(host.receive(1), frame(1, 60));
    host.send(&frame(2, 60));
    assert_eq!(received(&mut driver, RX), frame(2, 60));
}

#[test]
fn a_device_at_rest_lets_go_of_its_tap_and_takes_it_back_if_nobody_has_it() {
    alone();
    make_up("vm0", 0);
    let mut driver = open("tap=vm0");
    driver.start(u64::MAX);
    let busy = driver.device.let_go().unwrap_err();
    assert_eq!(busy.kind(), std::io::ErrorKind::ResourceBusy);
    assert!(driver.device.pause(Duration::from_secs(60)));
    driver.device.let_go().unwrap();
    let elsewhere = NetConfig::parse("tap=vm0").unwrap().open().unwrap();
    let taken = driver.device.take_back().unwrap_err();
    assert_eq!(taken.raw_os_error(), Some(libc::EBUSY));
    drop(elsewhere);
    driver.device.take_back().unwrap();
    driver.device.resume();
    let mut host = Host::at("vm0");
    transmit(&mut driver, TX, &frame(1, 60));
    assert_eq!(host.receive(1), frame(1, 60));
    host.send(&frame(2, 60));
    assert_eq!(received(&mut driver, RX), frame(2, 60));
}

#[test]
fn a_tap_that_cannot_be_had_is_told_with_what_to_do() {
    alone();
    make("one", libc::IFF_TAP);
    make("tun", libc::IFF_TUN);
    let (error, users) = refused("tap=none,queues=2");
    assert!(error.contains("`ip tuntap add none mode tap user $USER multi_queue`"));
    assert!(users);
    for name in ["lo", "tun"] {
        let (error, users) = refused(&format!("tap={name}"));
        assert!(error.contains("is no tap"), "{error}");
        assert!(users);
        let (error, _) = refused(&format!("tap={name},queues=2"));
        assert!(error.contains("is no tap"), "{error}");
    }
    let (error, users) = refused("tap=one,queues=2");
    assert!(error.contains("has one queue, and queues=2"), "{error}");
    assert!(users);
    let first = NetConfig::new("one").open().unwrap();
    let again = NetConfig::new("one").open().unwrap_err();
    assert!(matches!(again, NetError::Tap(TapError::Busy { .. })));
    assert!(!again.is_users_fault());
    drop(first);
    NetConfig::new("one").open().unwrap();
}
