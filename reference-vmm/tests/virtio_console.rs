// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-console as its driver and its host's side see it: what is said on the control queues, and that bytes arrive
//! unchanged, in order and once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/virtio_console.rs"]
mod guest;

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use guest::{CONTROL_IN, Guest, PATIENCE, says};
use proptest::prelude::*;
use reference_vmm::devices::virtio::console::config::{
    ConsoleConfig, Files, PortConfig, PortEnd, open,
};
use reference_vmm::devices::virtio::console::control::{Message, Size};
use reference_vmm::devices::virtio::console::host::{
    Accept, Ends, Host, Shared, Sink, Source, stream,
};
use reference_vmm::devices::virtio::console::input::InputQueue;
use reference_vmm::devices::virtio::console::{
    Console, F_EMERG_WRITE, F_MULTIPORT, F_SIZE, NamedPort, StateError,
};
use reference_vmm::devices::virtio::fake::Descriptor;
use vmm_sys_util::eventfd::EventFd;

const SIZE: Size = Size { cols: 80, rows: 24 };

/// hvc0 on a pipe or socket, without input.
fn console_on(out: impl Into<OwnedFd>) -> Console {
    let out = out.into();
    let sink = Shared::new(&out).unwrap();
    let host = Host::Fixed {
        source: None,
        sink: Some(Box::new(sink)),
    };
    Console::single(host, SIZE).unwrap()
}

/// A port that a test connects to.
struct Socket {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Socket {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

/// A device with one named port, at a socket.
fn named() -> (Console, Socket) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port.sock");
    (
        named_at(&path),
        Socket {
            _folder: folder,
            path,
        },
    )
}

fn named_at(path: &std::path::Path) -> Console {
    let port = PortConfig {
        name: "agent".into(),
        to: PortEnd::Unix(path.into()),
    };
    let opened = open(&ConsoleConfig::Off, &[port], io::stdout(), Files::Empty).unwrap();
    opened.ports.unwrap()
}

/// hvc0 and a named port in one device.
fn both(console: Host, named: Host, size: Size) -> Console {
    let named = NamedPort {
        name: "agent".into(),
        host: named,
    };
    Console::multiport(Some(console), vec![named], size).unwrap()
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn no_host() -> Host {
    Host::off()
}

#[test]
fn the_driver_learns_of_the_ports_what_they_are_and_who_is_open() {
    let (host, _peer) = UnixStream::pair().unwrap();
    let (source, sink) = stream(host.into()).unwrap();
    let connected = Host::Fixed {
        source: Some(source),
        sink: Some(sink),
    };
    let mut guest = Guest::new(both(connected, no_host(), SIZE));
    let expected = 1 << F_SIZE | 1 << F_MULTIPORT | 1 << F_EMERG_WRITE;
    assert_eq!(guest.driver.offered() & 0xffff, expected);
    guest.start();
    let mut config = [0; 12];
    guest.driver.config(0, &mut config);
    assert_eq!(config, [80, 0, 24, 0, 2, 0, 0, 0, 0, 0, 0, 0]);

    guest.say(says::device_ready(1));
    assert_eq!(guest.hear(), says::add(0));
    assert_eq!(guest.hear(), says::add(1));
    guest.say(says::port_ready(0, 1));
    assert_eq!(guest.hear(), says::console(0));
    assert_eq!(guest.hear(), says::resize(0, 80, 24));
    assert_eq!(guest.hear(), says::open(0, 1));
    guest.say(says::port_ready(1, 1));
    assert_eq!(guest.hear(), says::name(1, "agent"));
    guest.quiet();
}

#[test]
fn a_driver_without_the_features_has_a_console_all_the_same() {
    let (mut reader, writer) = io::pipe().unwrap();
    let sink = Shared::new(&writer).unwrap();
    let console = Host::Fixed {
        source: None,
        sink: Some(Box::new(sink)),
    };
    let mut guest = Guest::new(both(console, no_host(), SIZE));
    guest.driver.start(0);
    guest.send(1, b"hello");
    let mut read = [0; 5];
    reader.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"hello");
}

#[test]
fn a_driver_that_cannot_is_told_nothing_and_one_that_asks_nonsense_neither() {
    let (device, _socket) = named();
    let mut guest = Guest::new(device);
    guest.start();
    guest.say(says::device_ready(0));
    for event in 0..10 {
        for port in [0, 2, 31, 32, u32::MAX] {
            if event != 0 {
                guest.say(
                    Message {
                        port,
                        event,
                        value: 1,
                    }
                    .to_bytes(),
                );
            }
        }
    }
    guest.say(b"");
    guest.say(&says::device_ready(1)[..7]);
    guest.quiet();
    // A message may have more behind it.
    let mut long = says::device_ready(1).to_vec();
    long.extend([0xff; 5000]);
    guest.say(long);
    assert_eq!(guest.hear(), says::add(1));
    guest.say(says::port_ready(1, 0));
    guest.quiet();
    // It has thought better of it.
    guest.say(says::port_ready(1, 1));
    assert_eq!(guest.hear(), says::name(1, "agent"));
    guest.quiet();
}

#[test]
fn a_buffer_that_a_message_does_not_fit_is_given_back_and_the_message_kept() {
    let (device, _socket) = named();
    let mut guest = Guest::new(device);
    guest.start();
    for len in [0, 7] {
        guest.post(CONTROL_IN, len);
    }
    guest.post(CONTROL_IN, 8);
    guest.say(says::device_ready(1));
    assert_eq!(guest.got(CONTROL_IN), b"");
    assert_eq!(guest.got(CONTROL_IN), b"");
    assert_eq!(guest.got(CONTROL_IN), says::add(1));
    guest.post(CONTROL_IN, 10);
    guest.say(says::port_ready(1, 1));
    assert_eq!(guest.got(CONTROL_IN), says::name(1, "agent")[..10]);
}

#[test]
fn megabytes_of_output_arrive_unchanged_and_in_order() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut guest = Guest::new(console_on(writer));
    guest.start();
    let data = bytes(5 << 20);
    let expected = data.clone();
    let reads = std::thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(got == expected);
    });
    let (mut rest, mut seed) = (&data[..], 1u32);
    while !rest.is_empty() {
        let mut sent = 0;
        while sent < 40 && !rest.is_empty() {
            seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12345);
            let len = ((seed >> 8) as usize % 30_000).min(rest.len());
            guest.send_later(1, &rest[..len]);
            rest = &rest[len..];
            sent += 1;
        }
        guest.driver.notify(1);
        for _ in 0..sent {
            guest.driver.used(1);
        }
    }
    reads.join().unwrap();
}

#[test]
fn megabytes_of_input_arrive_unchanged_and_in_order() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    let mut peer = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    let data = bytes(5 << 20);
    let sent = data.clone();
    let writes = std::thread::spawn(move || {
        for (at, piece) in sent.chunks(7919).enumerate() {
            let (one, two) = piece.split_at(piece.len() * (at % 7) / 7);
            peer.write_all(one).unwrap();
            peer.write_all(two).unwrap();
        }
    });
    let (mut got, mut seed) = (Vec::new(), 1u32);
    while got.len() < data.len() {
        for _ in 0..30 {
            seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12345);
            guest.post_later(4, (seed >> 8) % 9000);
        }
        guest.driver.notify(4);
        for _ in 0..30 {
            if got.len() == data.len() {
                break;
            }
            got.extend(guest.got(4));
        }
    }
    writes.join().unwrap();
    assert!(got == data);
    // What it sent is delivered before its end is told.
    assert_eq!(guest.hear(), says::open(1, 0));
}

#[test]
fn a_full_pipe_has_its_chain_wait_and_a_stop_waits_for_nothing() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut guest = Guest::new(console_on(writer));
    guest.start();
    let data = bytes(200_000);
    for piece in data.chunks(50_000) {
        guest.send_later(1, piece);
    }
    guest.driver.notify(1);
    guest.driver.used(1);
    // At rest in the middle of a chain, and on.
    for _ in 0..3 {
        assert!(guest.driver.device.pause(PATIENCE));
        assert!(guest.driver.take_used(1).is_none());
        guest.driver.device.resume();
    }
    let mut got = vec![0; data.len()];
    reader.read_exact(&mut got).unwrap();
    assert!(got == data);
    for _ in 0..3 {
        guest.driver.used(1);
    }
}

#[test]
fn a_chain_that_is_partly_out_goes_on_where_it_was_in_another_process() {
    let (mut reader, writer) = io::pipe().unwrap();
    let second = OwnedFd::from(writer.try_clone().unwrap());
    let mut guest = Guest::new(console_on(writer));
    guest.start();
    let data = bytes(150_000);
    for piece in data.chunks(50_000) {
        guest.send_later(1, piece);
    }
    guest.driver.notify(1);
    guest.driver.used(1);
    let guest = guest.restore(|state| console_on(second).from_state(state).unwrap());
    let mut got = vec![0; data.len()];
    reader.read_exact(&mut got).unwrap();
    assert!(got == data);
    let mut guest = guest;
    guest.driver.used(1);
    guest.driver.used(1);
    guest.send(1, b"!");
    let mut one = [0];
    reader.read_exact(&mut one).unwrap();
    assert_eq!(&one, b"!");
}

/// hvc0 with an input queue.
fn typed_at() -> (Console, InputQueue) {
    let queue = InputQueue::new().unwrap();
    let host = Host::Fixed {
        source: Some(Box::new(queue.clone())),
        sink: None,
    };
    (Console::single(host, SIZE).unwrap(), queue)
}

#[test]
fn input_waits_for_the_guest_and_the_main_thread_does_not() {
    let (device, queue) = typed_at();
    let mut guest = Guest::new(device);
    let data = bytes(100_000);
    // No driver yet.
    let mut taken = queue.offer(&data);
    assert!(taken > 1000 && queue.offer(&data[taken..]) == 0);
    guest.start();
    let mut got = Vec::new();
    while got.len() < data.len() {
        guest.post(0, 3000);
        got.extend(guest.got(0));
        taken += queue.offer(&data[taken..]);
    }
    assert!(got == data);
    assert!(queue.drained().read().is_ok());
}

#[test]
fn input_that_the_guest_has_not_taken_is_part_of_the_state() {
    let (device, queue) = typed_at();
    let mut guest = Guest::new(device);
    guest.start();
    assert_eq!(queue.offer(b"hello, "), 7);
    guest.post(0, 3);
    assert_eq!(guest.got(0), b"hel");
    let (device, queue) = typed_at();
    assert_eq!(queue.offer(b"world"), 5);
    let mut guest = guest.restore(|state| device.from_state(state).unwrap());
    guest.post(0, 100);
    assert_eq!(guest.got(0), b"lo, world");
}

#[test]
fn a_port_is_told_to_be_closed_after_a_restore_and_open_when_somebody_connects_again() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    let mut first = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    // More than the socket takes: partly out.
    send_chains(&mut guest);
    let other = socket.path.with_extension("other");
    let mut second = None;
    let mut guest = guest.restore(|state| {
        let device = named_at(&other).from_state(state).unwrap();
        // Is there before the device goes on.
        second = Some(UnixStream::connect(&other).unwrap());
        device
    });
    let mut old = Vec::new();
    first.read_to_end(&mut old).unwrap();
    assert_eq!(guest.hear(), says::open(1, 0));
    assert_eq!(guest.hear(), says::open(1, 1));
    expect_a_new_beginning(guest, &old, second.unwrap());
}

/// Chains of [`CHAIN`] bytes, each with its number, of which the first is out and the last are not.
fn send_chains(guest: &mut Guest) {
    for number in 0..CHAINS {
        guest.send_later(5, &[number; CHAIN]);
    }
    guest.driver.notify(5);
    guest.driver.used(5);
    guest.sync();
}

const CHAINS: u8 = 20;
const CHAIN: usize = 60_000;

/// The first peer had these of the chains, in order and the last of them in part: the second has none of them.
fn expect_a_new_beginning(mut guest: Guest, first: &[u8], mut second: UnixStream) {
    assert!(first.is_sorted() && !first.len().is_multiple_of(CHAIN));
    for _ in 1..CHAINS {
        guest.driver.used(5);
    }
    guest.send(5, b"!");
    let mut got = [0];
    second.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"!");
}

#[test]
fn a_state_of_other_ports_is_refused() {
    let (device, _socket) = named();
    let mut guest = Guest::new(device);
    guest.start();
    assert!(guest.driver.device.pause(PATIENCE));
    let state = guest.driver.device.state().unwrap().device;
    let error = Console::single(no_host(), SIZE).unwrap().from_state(&state);
    assert!(matches!(error, Err(StateError::Ports { .. })));
}

#[test]
fn nobody_connected_means_that_output_is_dropped() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    guest.send(5, b"nobody reads this");
    let mut peer = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    guest.send(5, b"this");
    let mut read = [0; 4];
    peer.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"this");
}

#[test]
fn one_at_a_time_is_connected_and_the_next_gets_nothing_of_what_was_the_first_one_s() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    let first = socket.connect();
    let mut second = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    second.write_all(b"second").unwrap();
    // Fills the first one's socket in the middle of a chain.
    send_chains(&mut guest);
    let mut first = first;
    first.shutdown(std::net::Shutdown::Both).unwrap();
    let mut old = Vec::new();
    first.read_to_end(&mut old).unwrap();
    assert_eq!(guest.hear(), says::open(1, 0));
    assert_eq!(guest.hear(), says::open(1, 1));
    guest.post(4, 100);
    assert_eq!(guest.got(4), b"second");
    expect_a_new_beginning(guest, &old, second);
}

#[test]
fn who_sends_and_goes_before_the_guest_has_opened_is_heard_nevertheless() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.start();
    guest.say(says::device_ready(1));
    assert_eq!(guest.hear(), says::add(1));
    guest.say(says::port_ready(1, 1));
    assert_eq!(guest.hear(), says::name(1, "agent"));
    guest.post(4, 100);
    socket.connect().write_all(b"early").unwrap();
    assert_eq!(guest.hear(), says::open(1, 1));
    guest.quiet();
    guest.say(says::open(1, 1));
    assert_eq!(guest.got(4), b"early");
    assert_eq!(guest.hear(), says::open(1, 0));
    // One that said nothing is not waited for.
    guest.say(says::open(1, 0));
    let silent = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    drop(silent);
    assert_eq!(guest.hear(), says::open(1, 0));
}

#[test]
fn who_has_ended_its_sending_still_gets_the_answer() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    let mut peer = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    peer.write_all(b"question").unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    guest.post(4, 100);
    assert_eq!(guest.got(4), b"question");
    guest.post(4, 100);
    guest.quiet();
    guest.send(5, b"answer");
    let mut answer = [0; 6];
    peer.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    drop(peer);
    assert_eq!(guest.hear(), says::open(1, 0));
}

#[test]
fn a_port_that_the_guest_closes_ends_the_connection_behind_all_that_was_written() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    let mut peer = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    let data = bytes(600_000);
    for piece in data.chunks(30_000) {
        guest.send_later(5, piece);
    }
    guest.driver.notify(5);
    guest.say(says::open(1, 0));
    let mut read = Vec::new();
    peer.read_to_end(&mut read).unwrap();
    assert!(read == data);
    assert_eq!(guest.hear(), says::open(1, 0));
}

#[test]
fn a_reset_ends_a_port_s_connection_and_another_may_come() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    for _ in 0..3 {
        guest.open_port(1);
        let mut peer = socket.connect();
        assert_eq!(guest.hear(), says::open(1, 1));
        guest.send(5, b"x");
        guest.driver.reset();
        assert_eq!(peer.read(&mut [0; 2]).unwrap(), 1);
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_reset_ends_a_connection_of_which_the_close_still_waits_for_room() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    let mut first = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    // More than a socket takes.
    send_chains(&mut guest);
    guest.say(says::open(1, 0));
    guest.sync();
    // As a driver does that is unbound behind its program.
    guest.driver.reset();
    let mut read = Vec::new();
    first.read_to_end(&mut read).unwrap();
    // What was out is read first, and the rest belongs to nobody.
    assert!(read.len() >= CHAIN && read.len() < CHAIN * usize::from(CHAINS));
    assert!(read.is_sorted());

    guest.open_port(1);
    let mut second = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    guest.send(5, b"!");
    guest.say(says::open(1, 0));
    read.clear();
    second.read_to_end(&mut read).unwrap();
    assert_eq!(read, b"!");
}

#[test]
fn a_connection_that_nothing_has_gone_through_is_there_for_the_next_program() {
    let (device, socket) = named();
    let mut guest = Guest::new(device);
    guest.open_port(1);
    let mut peer = socket.connect();
    assert_eq!(guest.hear(), says::open(1, 1));
    guest.say(says::open(1, 0));
    guest.quiet();
    guest.say(says::open(1, 1));
    guest.send(5, b"hello");
    guest.say(says::open(1, 0));
    let mut read = Vec::new();
    peer.read_to_end(&mut read).unwrap();
    assert_eq!(read, b"hello");
}

#[test]
fn a_driver_after_a_reset_loses_nothing_to_what_was_partly_out_before() {
    let (mut peer, ours) = UnixStream::pair().unwrap();
    let mut guest = Guest::new(console_on(ours));
    guest.start();
    guest.send_later(1, &bytes(1 << 20));
    guest.driver.notify(1);
    peer.read_exact(&mut [0]).unwrap();
    guest.driver.reset();
    peer.set_nonblocking(true).unwrap();
    let mut rest = Vec::new();
    let error = peer.read_to_end(&mut rest).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(rest.len() < (1 << 20) - 1);

    guest.start();
    guest.send(1, b"boot");
    let mut read = [0; 4];
    peer.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"boot");
}

#[test]
fn a_console_s_connection_outlives_the_driver() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console.sock");
    let config = ConsoleConfig::Unix(path.clone());
    let opened = open(&config, &[], io::stdout(), Files::Empty).unwrap();
    let mut guest = Guest::new(opened.console.unwrap());
    let mut peer = UnixStream::connect(&path).unwrap();
    for _ in 0..3 {
        guest.start();
        guest.send(1, b"boot");
        let mut read = [0; 4];
        peer.read_exact(&mut read).unwrap();
        guest.driver.reset();
    }
}

#[test]
fn the_terminal_s_size_comes_by_the_configuration_space_or_by_a_message() {
    let device = Console::single(no_host(), SIZE).unwrap();
    let resizer = device.resizer();
    let mut guest = Guest::new(device);
    guest.start();
    // Linux does not read it before it is told.
    guest.wait_configuration_change();
    resizer.resize(SIZE);
    guest.send(1, b"");
    guest.send(1, b"");
    let before = guest.generation();
    resizer.resize(Size {
        cols: 300,
        rows: 100,
    });
    guest.wait_configuration_change();
    assert_ne!(guest.generation(), before);
    let mut config = [0; 4];
    guest.driver.config(0, &mut config);
    assert_eq!(config, [44, 1, 100, 0]);
    // The next driver knows of none.
    guest.driver.reset();
    guest.start();
    guest.wait_configuration_change();

    let device = both(no_host(), no_host(), SIZE);
    let resizer = device.resizer();
    let mut guest = Guest::new(device);
    guest.start();
    guest.say(says::port_ready(0, 1));
    assert_eq!(guest.hear(), says::console(0));
    assert_eq!(guest.hear(), says::resize(0, 80, 24));
    resizer.resize(Size {
        cols: 300,
        rows: 100,
    });
    assert_eq!(guest.hear(), says::resize(0, 300, 100));
}

#[test]
fn a_restored_console_tells_the_size_of_its_new_terminal() {
    let mut guest = Guest::new(Console::single(no_host(), SIZE).unwrap());
    guest.start();
    guest.wait_configuration_change();
    let other = Size {
        cols: 132,
        rows: 43,
    };
    let make = |state: &_| {
        let console = Console::single(no_host(), other).unwrap();
        console.from_state(state).unwrap()
    };
    let mut guest = guest.restore(make);
    guest.wait_configuration_change();
    let before = guest.generation();
    let mut guest = guest.restore(make);
    guest.send(1, b"");
    assert_eq!(guest.generation(), before);
}

#[test]
fn emergency_writes_come_out_before_during_and_after_a_driver_and_wait_for_room() {
    let (reader, writer) = io::pipe().unwrap();
    let second = OwnedFd::from(writer.try_clone().unwrap());
    let mut guest = Guest::new(console_on(writer));
    let read = |expected: &[u8]| {
        let mut got = vec![0; expected.len()];
        (&reader).read_exact(&mut got).unwrap();
        assert!(got == expected);
    };
    guest.driver.write_config(8, &[b'a', 0, 0, 0]);
    read(b"a");
    guest.start();
    guest.driver.write_config(8, b"b");
    read(b"b");
    // Not there.
    guest.driver.write_config(4, b"x");
    guest.driver.write_config(9, b"x");
    let data = bytes(60_000);
    guest.send_later(1, &data);
    guest.send_later(1, &data);
    guest.driver.notify(1);
    guest.driver.used(1);
    guest.driver.device.pause(PATIENCE);
    guest.driver.device.resume();
    guest.driver.write_config(8, b"c");
    let mut guest = guest.restore(|state| console_on(second).from_state(state).unwrap());
    read(&data);
    // In the middle of the second chain, where the pipe was full.
    let mut second = vec![0; data.len() + 1];
    (&reader).read_exact(&mut second).unwrap();
    let mut between = 0..second.len();
    assert!(
        between.any(|at| second[at] == b'c' && [&second[..at], &second[at + 1..]].concat() == data)
    );
    guest.driver.used(1);
    guest.driver.reset();
    guest.driver.write_config(8, b"d");
    read(b"d");
}

/// Somebody has connected, and cannot be accepted for a while.
struct Refusing {
    ready: EventFd,
    calls: Arc<AtomicUsize>,
    works: Arc<AtomicBool>,
}

impl Accept for Refusing {
    fn fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    fn accept(&self) -> io::Result<Ends> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        match self.works.load(Ordering::SeqCst) {
            true => stream(UnixStream::pair()?.0.into()),
            false => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        }
    }
}

#[test]
fn connections_that_cannot_be_accepted_are_not_tried_without_end_and_are_later() {
    let (calls, works) = (Arc::default(), Arc::new(AtomicBool::new(false)));
    let listener = Refusing {
        ready: EventFd::new(0).unwrap(),
        calls: Arc::clone(&calls),
        works: works.clone(),
    };
    listener.ready.write(1).unwrap();
    let host = Host::Served {
        listener: Box::new(listener),
        connection: None,
    };
    let named = NamedPort {
        name: "agent".into(),
        host,
    };
    let mut guest = Guest::new(Console::multiport(None, vec![named], SIZE).unwrap());
    guest.open_port(1);
    let before = calls.load(Ordering::SeqCst);
    // Only the guest's own doings have it tried.
    for _ in 0..100 {
        guest.say(b"");
    }
    assert!(calls.load(Ordering::SeqCst) <= before + 1);
    works.store(true, Ordering::SeqCst);
    guest.send(5, b"x");
    assert_eq!(guest.hear(), says::open(1, 1));
}

/// One connection, whose source counts how often it is looked at.
struct One(std::sync::Mutex<Option<Ends>>, EventFd);

impl Accept for One {
    fn fd(&self) -> RawFd {
        self.1.as_raw_fd()
    }

    fn accept(&self) -> io::Result<Ends> {
        let ends = self.0.lock().unwrap().take();
        ends.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

struct Counted(Box<dyn Source>, Arc<AtomicUsize>);

impl Source for Counted {
    fn fd(&self) -> RawFd {
        self.0.fd()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }

    fn has_bytes(&self) -> bool {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.has_bytes()
    }
}

#[test]
fn who_has_gone_and_left_bytes_that_the_guest_does_not_take_keeps_nobody_busy() {
    let looked = Arc::new(AtomicUsize::new(0));
    let (host, mut peer) = UnixStream::pair().unwrap();
    let (source, sink) = stream(host.into()).unwrap();
    let source = Box::new(Counted(source, looked.clone()));
    let listener = One(Some((source as _, sink)).into(), EventFd::new(0).unwrap());
    let host = Host::Served {
        listener: Box::new(listener),
        connection: None,
    };
    let name = "agent".into();
    let named = vec![NamedPort { name, host }];
    let mut guest = Guest::new(Console::multiport(None, named, SIZE).unwrap());
    guest.open_port(1);
    assert_eq!(guest.hear(), says::open(1, 1));
    peer.write_all(b"last words").unwrap();
    drop(peer);
    guest.sync();
    let before = looked.load(Ordering::SeqCst);
    for _ in 0..100 {
        guest.sync();
    }
    assert!(looked.load(Ordering::SeqCst) <= before + 2);
    guest.post(4, 100);
    assert_eq!(guest.got(4), b"last words");
    assert_eq!(guest.hear(), says::open(1, 0));
}

/// Fails as it is told, once.
struct Failing {
    errors: Vec<io::Error>,
    out: std::sync::mpsc::Sender<u8>,
    ready: EventFd,
}

impl Sink for Failing {
    fn fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.errors.pop() {
            Some(error) => Err(error),
            None => {
                self.out.send(bytes[0]).unwrap();
                Ok(1)
            }
        }
    }
}

#[test]
fn a_sink_that_fails_loses_its_output_and_the_guest_goes_on() {
    for (errno, lost) in [
        (libc::EAGAIN, false),
        (libc::EINTR, false),
        (libc::ENOSPC, true),
        (libc::EIO, true),
        (libc::EPIPE, true),
        (libc::EINVAL, true),
    ] {
        let (out, got) = std::sync::mpsc::channel();
        let sink = Failing {
            errors: vec![io::Error::from_raw_os_error(errno)],
            out,
            ready: EventFd::new(0).unwrap(),
        };
        let host = Host::Fixed {
            source: None,
            sink: Some(Box::new(sink)),
        };
        let mut guest = Guest::new(Console::single(host, SIZE).unwrap());
        guest.start();
        guest.send(1, b"abc");
        guest.send(1, b"def");
        drop(guest);
        let got: Vec<u8> = got.iter().collect();
        let expected: &[u8] = if lost { b"def" } else { b"abcdef" };
        assert_eq!(got, expected, "{errno}");
    }
}

#[test]
fn a_file_has_the_output_behind_what_it_is_told_to_keep() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    std::fs::write(&path, "old").unwrap();
    for (files, expected) in [(Files::Empty, "new"), (Files::Keep, "newnew")] {
        let config = ConsoleConfig::File(path.clone());
        let opened = open(&config, &[], io::stdout(), files).unwrap();
        let mut guest = Guest::new(opened.console.unwrap());
        guest.start();
        guest.send(1, b"new");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }
}

#[test]
fn a_chain_of_gigabytes_is_written_in_turns_and_others_have_theirs() {
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    let mut guest = Guest::new(console_on(null));
    guest.start();
    // The same 4 MiB thirty times: 120 MiB in one chain.
    let at = guest.driver.allocate(4 << 20);
    let same = Descriptor {
        address: at.0,
        len: 4 << 20,
        ..Descriptor::default()
    };
    guest.driver.chain(1, &[same; 30]);
    guest.driver.notify(1);
    // Comes between.
    assert!(guest.driver.device.pause(PATIENCE));
    guest.driver.device.resume();
    guest.driver.used(1);
}

/// What happens to a named port.
#[derive(Clone, Debug)]
enum Step {
    Connect,
    Disconnect,
    HalfClose,
    HostSends(u16),
    GuestSends(u16),
    GuestPosts(u16),
    GuestOpens(bool),
    Restart,
    Pause,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        Just(Step::Connect),
        Just(Step::Disconnect),
        Just(Step::HalfClose),
        (1..3000u16).prop_map(Step::HostSends),
        (1..3000u16).prop_map(Step::GuestSends),
        (1..3000u16).prop_map(Step::GuestPosts),
        any::<bool>().prop_map(Step::GuestOpens),
        Just(Step::Restart),
        Just(Step::Pause),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn at_every_moment_a_connection_s_bytes_are_in_order_and_once(steps in steps()) {
        let (device, socket) = named();
        let mut guest = Guest::new(device);
        guest.open_port(1);
        let mut peer: Option<UnixStream> = None;
        // Each byte that is sent is another one than its neighbours, on either way.
        let (mut to_guest, mut to_host) = (0u32, 0u32);
        let pattern = |from: u32, len: u16| -> Vec<u8> {
            (from..from + u32::from(len)).flat_map(|n| n.to_le_bytes()).collect()
        };
        let (mut at_guest, mut at_host) = (Vec::new(), Vec::new());
        let rising = |bytes: &[u8]| {
            // A piece may have been cut where a connection ended; within one all is there.
            let words: Vec<_> = bytes.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
            words.windows(2).all(|w| w[0] + 1 == w[1])
        };
        for step in steps {
            match step {
                Step::Connect if peer.is_none() => peer = Some(socket.connect()),
                Step::Disconnect => peer = None,
                Step::HalfClose => {
                    if let Some(peer) = &peer {
                        let _ = peer.shutdown(std::net::Shutdown::Write);
                    }
                }
                Step::HostSends(len) => {
                    if let Some(peer) = &mut peer {
                        // It may have been closed, by the guest's closing.
                        if peer.write_all(&pattern(to_guest, len)).is_ok() {
                            to_guest += u32::from(len);
                        } else {
                            to_guest += 1 << 16;
                        }
                    }
                }
                Step::GuestSends(len) => {
                    guest.send(5, &pattern(to_host, len));
                    to_host += u32::from(len);
                }
                Step::GuestPosts(len) => {
                    // Whole words: what a connection's end leaves in the device is never a piece of one.
                    guest.post(4, u32::from(len) * 4);
                    guest.sync();
                    while let Some(bytes) = guest.got_now(4) {
                        at_guest.extend(bytes);
                    }
                }
                Step::GuestOpens(open) => guest.say(says::open(1, open.into())),
                Step::Restart => {
                    guest.driver.reset();
                    guest.open_port(1);
                }
                Step::Pause => guest.sync(),
                Step::Connect => {}
            }
            // Reads what is there, so that the guest's side does not wait.
            if let Some(of) = &mut peer {
                of.set_nonblocking(true).unwrap();
                let mut piece = [0; 65536];
                loop {
                    match of.read(&mut piece) {
                        Ok(0) => { at_host.clear(); break }
                        Ok(read) => at_host.extend_from_slice(&piece[..read]),
                        Err(_) => break,
                    }
                }
                of.set_nonblocking(false).unwrap();
            } else {
                at_host.clear();
            }
        }
        // Between two connections there are gaps; none goes back.
        let words: Vec<_> = at_guest.chunks_exact(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        prop_assert!(words.windows(2).all(|w| w[0] < w[1]), "to the guest");
        prop_assert!(rising(&at_host), "to the host");
        prop_assert_eq!(guest.driver.read(0x70) & 0x40, 0, "it needs a reset");
    }

    #[test]
    fn whatever_a_driver_puts_into_the_queues_the_device_is_there_after_a_reset(
        chains in proptest::collection::vec(
            (0..8usize, any::<[u8; 16]>(), proptest::collection::vec((0..5u64, 0..70_000u32, any::<u16>()), 0..5)),
            0..60,
        )
    ) {
        let (reader, writer) = UnixStream::pair().unwrap();
        let (source, sink) = stream(writer.into()).unwrap();
        let console = Host::Fixed { source: Some(source), sink: Some(sink) };
        let (other, _peer) = UnixStream::pair().unwrap();
        let (source, sink) = stream(other.into()).unwrap();
        let named = Host::Fixed { source: Some(source), sink: Some(sink) };
        let mut guest = Guest::new(both(console, named, SIZE));
        guest.start();
        (&reader).write_all(&[7; 3000]).unwrap();
        let at = guest.driver.allocate(1 << 20).0;
        for (queue, message, parts) in chains {
            let queue = queue.min(5);
            use vm_memory::{Bytes, GuestAddress};
            guest.driver.memory().write_slice(&message, GuestAddress(at)).unwrap();
            let descriptors: Vec<_> = parts.iter().map(|(place, len, flags)| Descriptor {
                // Some are beyond memory.
                address: at + [0, 3, 4096, 1 << 40, u64::MAX - 100 - at][*place as usize],
                len: *len,
                flags: flags & 2,
                next: 0,
            }).collect();
            if descriptors.is_empty() {
                guest.driver.make_available(queue, u16::from_le_bytes([message[0], message[1]]));
            } else {
                guest.driver.chain(queue, &descriptors);
            }
            guest.driver.notify(queue);
        }
        guest.driver.device.pause(PATIENCE);
        guest.driver.reset();
        guest.open_port(1);
    }
}

#[test]
fn a_socket_that_is_closed_for_good_gives_its_path_back() {
    let (device, socket) = named();
    let path = socket.path.clone();
    drop(Guest::new(device));
    assert!(!path.exists());
    UnixListener::bind(path).unwrap();
}
