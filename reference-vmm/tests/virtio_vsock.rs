// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-vsock between a guest's sockets and programs on the host, which are threads of this test here.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::RawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use reference_vmm::devices::virtio::fake::FakeDriver;
use reference_vmm::devices::virtio::vsock::config::HOST_CID;
use reference_vmm::devices::virtio::vsock::credit::WINDOW;
use reference_vmm::devices::virtio::vsock::guest::{Guest, Life, Ports};
use reference_vmm::devices::virtio::vsock::packet::{
    HEADER_LEN, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use reference_vmm::devices::virtio::vsock::sockets::{Sockets, UnixSockets, port_path};
use reference_vmm::devices::virtio::vsock::switch::{
    EVENT, MAX_CONNECTIONS, MAX_HANDSHAKES, RX, TX,
};
use reference_vmm::devices::virtio::vsock::{Vsock, VsockConfig};

/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);
const CID: u32 = 42;

struct Host {
    _folder: tempfile::TempDir,
    uds: PathBuf,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let uds = folder.path().join("v.sock");
        Host {
            _folder: folder,
            uds,
        }
    }

    fn config(&self) -> VsockConfig {
        VsockConfig {
            cid: CID,
            uds: self.uds.clone(),
        }
    }

    fn device(&self) -> Vsock {
        self.config().open().unwrap()
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(port_path(&self.uds, port)).unwrap()
    }
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn dial(uds: &Path) -> UnixStream {
    patient(UnixStream::connect(uds).unwrap())
}

/// The line `OK N`, and nothing of what is behind it.
fn hear_ok(stream: &mut UnixStream) -> u32 {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).unwrap();
    let port = line
        .strip_prefix("OK ")
        .unwrap()
        .strip_suffix('\n')
        .unwrap();
    port.parse().unwrap()
}

/// A connection of the host's to a port of the guest's.
fn connect(host: &Host, guest: &mut Guest, port: u32) -> (UnixStream, Ports) {
    guest.listen(port);
    let mut stream = dial(&host.uds);
    writeln!(stream, "CONNECT {port}").unwrap();
    let ports = guest.accept();
    // What the guest has answered is taken by the device before it is waited for.
    let heard = std::thread::spawn(move || {
        let port = hear_ok(&mut stream);
        (stream, port)
    });
    let (stream, remote) = heard.join().unwrap();
    assert_eq!(
        ports,
        Ports {
            local: port,
            remote
        }
    );
    (stream, ports)
}

/// A connection of the guest's to a port of the host's.
fn connect_out(host: &Host, guest: &mut Guest, port: u32) -> (Ports, UnixStream) {
    let listener = host.listen(port);
    let ports = guest.connect(port);
    assert!(guest.is_connected(ports));
    let (stream, _) = listener.accept().unwrap();
    std::fs::remove_file(port_path(&host.uds, port)).unwrap();
    (ports, patient(stream))
}

/// Bytes that are the same for the same seed, and nowhere repeat soon.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        // xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next().to_le_bytes());
        words.take(len.div_ceil(8)).flatten().take(len).collect()
    }
}

/// Echoes until the end of file, in pieces of random size, and then closes.
fn echo(mut stream: UnixStream, seed: u64) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let (mut noise, mut total) = (Noise(seed), 0);
        let mut piece = vec![0; 100_000];
        loop {
            let most = 1 + noise.below(piece.len());
            let len = stream.read(&mut piece[..most]).unwrap();
            if len == 0 {
                return total;
            }
            stream.write_all(&piece[..len]).unwrap();
            total += len as u64;
        }
    })
}

#[test]
fn megabytes_that_the_guest_sends_come_back_from_a_program_on_the_host() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    assert_eq!(guest.cid, u64::from(CID));
    let (ports, stream) = connect_out(&host, &mut guest, 7);
    let echoed = echo(stream, 1);
    let mut noise = Noise(2);
    let data = noise.bytes(6 << 20);
    let (mut sent, mut back) = (0, Vec::new());
    while back.len() < data.len() {
        // As much as comes, and more than it reads at times: credit ends on both sides.
        let most = noise.below(200_000);
        sent += guest.send(ports, &data[sent..data.len().min(sent + most)]);
        let most = noise.below(60_000);
        back.extend(guest.read(ports, most));
        if back.len() < sent {
            let before = back.len();
            guest.until(|guest| {
                back.extend(guest.read(ports, 100_000));
                (back.len() > before || sent < data.len()).then_some(())
            });
        }
    }
    assert!(back == data, "it is not what was sent");
    guest.shutdown(ports, SHUTDOWN_SEND);
    assert_eq!(echoed.join().unwrap(), data.len() as u64);
    assert!(guest.read_to_end(ports).is_empty());
    // The program has closed: the guest has said so by an RST.
    assert_eq!(guest.socket(ports).life, Life::Closed);
}

#[test]
fn megabytes_that_a_program_on_the_host_sends_come_back_from_the_guest() {
    let host = Host::new();
    let mut guest = Guest::with_buffers(host.device(), 16, 10_000);
    let (stream, ports) = connect(&host, &mut guest, 1234);
    let mut noise = Noise(3);
    let data = noise.bytes(6 << 20);
    let expected = data.clone();
    let mut writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let (mut noise, mut rest) = (Noise(4), &data[..]);
        while !rest.is_empty() {
            let len = rest.len().min(1 + noise.below(300_000));
            writer.write_all(&rest[..len]).unwrap();
            rest = &rest[len..];
        }
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut reader = stream;
    let reading = std::thread::spawn(move || {
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        back
    });
    // One piece at a time.
    loop {
        let most = 1 + noise.below(90_000);
        let piece = guest.until(|guest| {
            let piece = guest.read(ports, most);
            (!piece.is_empty() || guest.socket(ports).is_at_end()).then_some(piece)
        });
        if piece.is_empty() {
            break;
        }
        guest.send_all(ports, &piece);
    }
    guest.close(ports);
    writing.join().unwrap();
    assert!(
        reading.join().unwrap() == expected,
        "it is not what was sent"
    );
}

#[test]
fn a_packet_may_be_cut_anywhere() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (ports, mut stream) = connect_out(&host, &mut guest, 7);
    let mut noise = Noise(5);
    for _ in 0..50 {
        let len = 1 + noise.below(2000);
        let data = noise.bytes(len);
        let mut cuts: Vec<_> = (0..4).map(|_| noise.below(44 + data.len())).collect();
        cuts.sort_unstable();
        let header = guest.header(ports, Op::Rw, data.len());
        guest.raw_cut(&header, &data, &cuts);
        let mut back = vec![0; data.len()];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(back, data, "{cuts:?}");
    }
}

#[test]
fn hundreds_of_connections_both_ways_have_their_own_bytes() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let mut all = Vec::new();
    for number in 0..100 {
        let (ports, stream) = connect_out(&host, &mut guest, number);
        all.push((ports, stream));
        let (stream, ports) = connect(&host, &mut guest, number);
        all.push((ports, stream));
    }
    for (number, (ports, stream)) in all.iter_mut().enumerate() {
        guest.send_all(*ports, format!("to the host, {number}").as_bytes());
        write!(stream, "to the guest, {number}").unwrap();
    }
    for (number, (ports, stream)) in all.iter_mut().enumerate() {
        let expected = format!("to the host, {number}");
        let mut came = vec![0; expected.len()];
        stream.read_exact(&mut came).unwrap();
        assert_eq!(came, expected.as_bytes());
        let expected = format!("to the guest, {number}");
        assert_eq!(
            guest.read_exact(*ports, expected.len()),
            expected.as_bytes()
        );
    }
    for (ports, stream) in all {
        drop(stream);
        assert!(guest.read_to_end(ports).is_empty());
        guest.close(ports);
    }
}

#[test]
fn what_the_guest_sent_before_its_end_arrives_before_it_and_the_other_way_goes_on() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (ports, mut stream) = connect_out(&host, &mut guest, 7);
    guest.send_all(ports, b"last words");
    guest.shutdown(ports, SHUTDOWN_SEND);
    let mut came = String::new();
    stream.read_to_string(&mut came).unwrap();
    assert_eq!(came, "last words");
    stream.write_all(b"still here").unwrap();
    assert_eq!(guest.read_exact(ports, 10), b"still here");
    drop(stream);
    guest.read_to_end(ports);
    assert_eq!(guest.socket(ports).life, Life::Closed);
}

#[test]
fn what_the_host_sent_before_its_end_arrives_before_it_and_the_other_way_goes_on() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (mut stream, ports) = connect(&host, &mut guest, 7);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read_to_end(ports), b"last words");
    let socket = guest.socket(ports);
    assert_eq!(
        (socket.life, socket.host_shut),
        (Life::Connected, SHUTDOWN_SEND)
    );
    guest.send_all(ports, b"still here");
    let mut came = [0; 10];
    stream.read_exact(&mut came).unwrap();
    assert_eq!(&came, b"still here");
    guest.close(ports);
    assert_eq!(stream.read(&mut came).unwrap(), 0);
}

#[test]
fn bytes_and_an_end_that_come_with_the_first_line_are_not_lost() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    guest.listen(7);
    let mut stream = dial(&host.uds);
    stream.write_all(b"CONNECT 7\nCONNECT 8\nmore").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let ports = guest.accept();
    assert_eq!(guest.read_to_end(ports), b"CONNECT 8\nmore");
    guest.send_all(ports, b"answer");
    guest.close(ports);
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert_eq!(all, format!("OK {}\nanswer", ports.remote));
}

#[test]
fn a_program_that_closes_has_all_that_it_sent_arrive_and_the_guest_hears_that_both_ways_are_over() {
    let host = Host::new();
    // Fewer buffers than there are bytes.
    let mut guest = Guest::with_buffers(host.device(), 2, 1000);
    let (mut stream, ports) = connect(&host, &mut guest, 7);
    let data = Noise(6).bytes(100_000);
    stream.write_all(&data).unwrap();
    drop(stream);
    assert!(guest.read_to_end(ports) == data);
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    assert_eq!(
        guest.until(|guest| Some(guest.socket(ports).host_shut)),
        both
    );
}

/// Sends until there is no credit, and the device has nothing more to say; how much.
fn fill(guest: &mut Guest, ports: Ports, data: &[u8]) -> usize {
    let mut sent = 0;
    loop {
        sent += guest.send(ports, &data[sent..]);
        // The device answers in order: this answer is behind all that it had to say of the data.
        guest.packet(ports, Op::CreditRequest, 0, &[]);
        let socket = guest.connect(u32::MAX);
        assert!(!guest.is_connected(socket));
        guest.forget(socket);
        let more = guest.send(ports, &data[sent..]);
        if more == 0 {
            return sent;
        }
        sent += more;
    }
}

#[test]
fn a_program_that_does_not_read_stops_its_own_connection_and_no_other_and_nothing_is_lost() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (stuck, mut stream) = connect_out(&host, &mut guest, 1);
    let data = Noise(7).bytes(8 << 20);
    let sent = fill(&mut guest, stuck, &data);
    assert!(sent < data.len(), "somebody keeps {sent} bytes");
    assert!(sent >= WINDOW as usize);

    let (ports, other) = connect_out(&host, &mut guest, 2);
    let echoed = echo(other, 8);
    guest.send_all(ports, b"goes on");
    assert_eq!(guest.read_exact(ports, 7), b"goes on");
    guest.close(ports);
    echoed.join().unwrap();

    let expected = data.clone();
    let reading = std::thread::spawn(move || {
        let mut came = Vec::new();
        stream.read_to_end(&mut came).unwrap();
        came
    });
    guest.send_all(stuck, &data[sent..]);
    guest.close(stuck);
    assert!(reading.join().unwrap() == expected);
}

#[test]
fn a_guest_that_does_not_read_stops_its_own_connection_and_no_other_and_nothing_is_lost() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (mut stream, stuck) = connect(&host, &mut guest, 1);
    let data = Noise(9).bytes(4 << 20);
    let expected = data.clone();
    let writing = std::thread::spawn(move || stream.write_all(&data).unwrap());
    // All its credit.
    let room = guest.buf_alloc as usize;
    guest.until(|guest| (guest.socket(stuck).received.len() == room).then_some(()));

    let (ports, other) = connect_out(&host, &mut guest, 2);
    let echoed = echo(other, 8);
    guest.send_all(ports, b"goes on");
    assert_eq!(guest.read_exact(ports, 7), b"goes on");
    guest.close(ports);
    echoed.join().unwrap();

    assert_eq!(guest.socket(stuck).received.len(), room);
    let mut came = guest.read(stuck, usize::MAX);
    came.extend(guest.read_to_end(stuck));
    assert!(came == expected);
    writing.join().unwrap();
}

#[test]
fn a_guest_without_room_is_asked_for_credit_once_however_long_it_does_not_read() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (mut stream, ports) = connect(&host, &mut guest, 1);
    let data = Noise(10).bytes(1 << 20);
    let expected = data.clone();
    let writing = std::thread::spawn(move || stream.write_all(&data).unwrap());
    for round in 1..=3 {
        let room = guest.buf_alloc as usize;
        guest.until(|guest| (guest.socket(ports).received.len() == room).then_some(()));
        // Each request is answered, with no room.
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(5));
            guest.poll();
        }
        assert!(guest.credit_requests <= round, "{}", guest.credit_requests);
        let at = (round as usize - 1) * room;
        assert!(guest.read(ports, room) == expected[at..at + room]);
    }
    let rest = 3 * guest.buf_alloc as usize;
    let came = guest.read_exact(ports, expected.len() - rest);
    assert!(came == expected[rest..]);
    writing.join().unwrap();
}

#[test]
fn the_last_bytes_of_a_guest_that_has_gone_reach_a_program_that_reads_late() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (ports, mut stream) = connect_out(&host, &mut guest, 1);
    let data = Noise(10).bytes(8 << 20);
    let sent = fill(&mut guest, ports, &data);
    guest.shutdown(ports, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    // It has waited long enough, as Linux does for 8 seconds.
    guest.reset(ports);
    // Its port is free for another, and the device reset.
    let again = guest.connect(u32::MAX);
    assert!(!guest.is_connected(again));
    guest.reboot();
    let reading = std::thread::spawn(move || {
        let mut came = Vec::new();
        stream.read_to_end(&mut came).unwrap();
        came
    });
    assert!(reading.join().unwrap() == data[..sent]);
}

#[test]
fn a_guest_that_sends_more_than_its_credit_is_reset() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (ports, stream) = connect_out(&host, &mut guest, 1);
    let data = Noise(11).bytes(8 << 20);
    fill(&mut guest, ports, &data);
    // A program that does not read, and no credit: WINDOW is the most that can be kept.
    for _ in 0..=WINDOW / 1000 {
        guest.packet(ports, Op::Rw, 0, &data[..1000]);
    }
    guest.until(|guest| (guest.socket(ports).life == Life::Closed).then_some(()));
    drop(stream);
}

#[test]
fn packets_of_no_connection_and_of_other_addresses_and_types_are_refused() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let nowhere = Ports {
        local: 5,
        remote: 6,
    };
    let good = guest.header(nowhere, Op::Rw, 0);
    let mut wrong = Vec::new();
    for op in [2, 4, 5, 6, 7, 0, 8, u16::MAX] {
        wrong.push(Header { op, ..good });
    }
    let mut request = good;
    request.op = Op::Request as u16;
    wrong.push(request);
    for kind in [0, 2, u16::MAX] {
        let mut header = request;
        header.kind = kind;
        wrong.push(header);
    }
    for cid in [0, 1, 3, u64::from(CID), u64::from(CID) | 1 << 32, u64::MAX] {
        let mut header = request;
        header.dst_cid = cid;
        wrong.push(header);
        header = request;
        header.src_cid = cid | 1 << 40;
        wrong.push(header);
    }
    for header in wrong {
        guest.raw(&header, &[]);
        let answer = guest.until(|guest| guest.strays.pop());
        assert_eq!(answer, header.reset(), "{header:?}");
    }
    // An RST is never answered: the next answer is the next packet's.
    let mut rst = good;
    rst.op = Op::Rst as u16;
    guest.raw(&rst, &[]);
    rst.dst_cid = 9;
    guest.raw(&rst, &[]);
    guest.raw(&request, &[]);
    let answer = guest.until(|guest| guest.strays.pop());
    assert_eq!(answer, request.reset());
    assert!(guest.strays.is_empty());
}

#[test]
fn a_packet_that_says_more_data_than_it_has_resets_its_connection() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (ports, mut stream) = connect_out(&host, &mut guest, 1);
    guest.send_all(ports, b"all of it");
    let mut header = guest.header(ports, Op::Rw, 0);
    header.len = 100;
    guest.raw(&header, b"less");
    guest.until(|guest| (guest.socket(ports).life == Life::Closed).then_some(()));
    let mut came = String::new();
    stream.read_to_string(&mut came).unwrap();
    assert_eq!(came, "all of it");
}

#[test]
fn a_packet_without_a_header_and_a_buffer_without_room_need_a_reset_and_it_goes_on_after() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let at = guest.driver.allocate(43);
    let short = |flags| reference_vmm::devices::virtio::fake::Descriptor {
        address: at.0,
        len: 43,
        flags,
        next: 0,
    };
    guest.driver.chain(1, &[short(0)]);
    guest.driver.notify(1);
    guest.driver.wait_needs_reset();
    guest.reboot();
    let (ports, _stream) = connect_out(&host, &mut guest, 1);
    guest.close(ports);

    let mut guest = Guest::with_buffers(Host::new().device(), 0, 44);
    guest.driver.chain(0, &[short(2)]);
    let ports = guest.connect(1);
    guest.driver.wait_needs_reset();
    guest.socket(ports).life = Life::Closed;
}

#[test]
fn a_port_where_nobody_listens_is_refused_on_both_sides() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let ports = guest.connect(99);
    assert!(!guest.is_connected(ports));
    let mut stream = dial(&host.uds);
    writeln!(stream, "CONNECT 99").unwrap();
    guest.until(|guest| guest.strays.pop());
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn lines_that_are_none_end_their_connection_alone() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    guest.listen(7);
    let mut slow = dial(&host.uds);
    slow.write_all(b"CONN").unwrap();
    for garbage in ["\n", "HELLO 7\n", "CONNECT -1\n", &"x".repeat(1000)] {
        let mut stream = dial(&host.uds);
        // It may be closed before it has said all.
        let _ = stream.write_all(garbage.as_bytes());
        let end = stream.read(&mut [0]);
        // With bytes that nobody has read its end is an error.
        assert!(matches!(end, Ok(0) | Err(_)), "{garbage}: {end:?}");
    }
    for byte in b"ECT 7\n" {
        slow.write_all(&[*byte]).unwrap();
    }
    let ports = guest.accept();
    assert_eq!(hear_ok(&mut slow), ports.remote);
}

#[test]
fn programs_that_do_not_say_where_to_keep_nobody_out() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let mut silent = Vec::new();
    for _ in 0..=MAX_HANDSHAKES {
        silent.push(dial(&host.uds));
    }
    let (mut stream, ports) = connect(&host, &mut guest, 7);
    // The first of them had to go.
    assert_eq!(silent[0].read(&mut [0]).unwrap(), 0);
    // The last has not.
    writeln!(silent[MAX_HANDSHAKES], "CONNECT 7").unwrap();
    let last = guest.accept();
    assert_eq!(hear_ok(&mut silent[MAX_HANDSHAKES]), last.remote);
    stream.write_all(b"x").unwrap();
    assert_eq!(guest.read_exact(ports, 1), b"x");
}

/// More descriptors than most systems begin with.
fn raise_descriptors(wanted: u64) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: one rlimit, which lives through both calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        if limit.rlim_cur < wanted {
            limit.rlim_cur = wanted.min(limit.rlim_max);
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        }
    }
    assert!(limit.rlim_cur >= wanted, "{} descriptors", limit.rlim_max);
}

#[test]
fn one_connection_more_than_the_most_is_refused_until_another_is_closed() {
    raise_descriptors(4096);
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let listener = host.listen(7);
    let mut all = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let ports = guest.connect(7);
        assert!(guest.is_connected(ports));
        all.push((ports, listener.accept().unwrap().0));
    }
    let more = guest.connect(7);
    assert!(!guest.is_connected(more));
    let mut stream = dial(&host.uds);
    writeln!(stream, "CONNECT 7").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);

    let (closed, _) = all.pop().unwrap();
    guest.close(closed);
    let again = guest.connect(7);
    assert!(guest.is_connected(again));
    let _again = listener.accept().unwrap();

    // One of which only the guest's farewell is missing gives way.
    let (ports, stream) = all.pop().unwrap();
    guest.socket(ports).received.push_back(0);
    drop(stream);
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    guest.until(|guest| (guest.socket(ports).host_shut == both).then_some(()));
    let again = guest.connect(7);
    assert!(guest.is_connected(again));
    guest.until(|guest| (guest.socket(ports).life == Life::Closed).then_some(()));
}

#[test]
fn a_guest_without_buffers_keeps_its_packets_and_loses_no_answer() {
    let host = Host::new();
    let mut guest = Guest::with_buffers(host.device(), 4, 100);
    guest.starve = true;
    let nowhere = Ports {
        local: 5,
        remote: 6,
    };
    let mut left = 5000;
    let mut answers = 0;
    let header = guest.header(nowhere, Op::CreditUpdate, 0);
    // Until the device takes no more: 4 buffers, 1024 answers, 32 packets in the queue.
    for _ in 0..1024 + 4 {
        guest.raw(&header, &[]);
        left -= 1;
    }
    guest.starve = false;
    while left > 0 {
        guest.raw(&header, &[]);
        left -= 1;
    }
    guest.until(|guest| {
        answers += guest.strays.drain(..).count();
        (answers == 5000).then_some(())
    });
}

#[test]
fn connections_survive_a_pause() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (ports, mut stream) = connect_out(&host, &mut guest, 1);
    let (mut inward, ports2) = connect(&host, &mut guest, 2);
    for round in 0..20_u8 {
        assert!(guest.driver.device.pause(PATIENCE));
        // What comes meanwhile waits.
        stream.write_all(&[round]).unwrap();
        guest.packet(ports2, Op::Rw, 0, &[round]);
        guest.driver.device.resume();
        assert_eq!(guest.read_exact(ports, 1), [round]);
        let mut byte = [0];
        inward.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [round]);
    }
}

#[test]
fn a_process_that_ends_without_dropping_the_device_leaves_no_file() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    let (_, mut stream) = connect_out(&host, &mut guest, 1);
    // One that serves still has its files.
    guest.driver.device.leave();
    assert!(host.uds.exists());
    assert!(guest.driver.device.pause(PATIENCE));
    guest.driver.device.leave();
    assert!(!host.uds.exists());
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone_before_it_hears_of_a_new_one() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    guest.listen(3);
    let (ports, stream) = connect_out(&host, &mut guest, 1);
    let elsewhere = Host::new();
    let mut waiting = None;
    let mut guest = guest.restored(|state| {
        assert_eq!((state.cid, &state.uds), (CID, &host.uds));
        let device = Vsock::from_state(&state, Some(&elsewhere.uds)).unwrap();
        let mut early = dial(&elsewhere.uds);
        writeln!(early, "CONNECT 3").unwrap();
        waiting = Some(early);
        device
    });
    let new = guest.accept();
    assert_eq!(guest.transport_resets, 1);
    assert_eq!(guest.socket(ports).life, Life::Closed);
    assert_eq!(guest.socket(new).life, Life::Connected);
    assert_eq!(hear_ok(waiting.as_mut().unwrap()), new.remote);
    // The program of before has its end with the process, which is the old device here.
    drop(stream);
    let (ports, mut stream) = connect_out(&elsewhere, &mut guest, 1);
    guest.send_all(ports, b"again");
    let mut came = [0; 5];
    stream.read_exact(&mut came).unwrap();
    assert_eq!((&came, guest.transport_resets), (b"again", 1));
}

#[test]
fn a_restored_guest_without_buffers_for_events_hears_of_no_connection_before_it_has_one() {
    let host = Host::new();
    let mut driver = FakeDriver::new(host.device());
    driver.start(u64::MAX);
    let packet = driver.request(RX, &[], &[4096]);
    assert!(driver.device.pause(PATIENCE));
    let state = driver.device.state().unwrap();
    let elsewhere = Host::new();
    let device = Vsock::from_state(&state.device, Some(&elsewhere.uds)).unwrap();
    let mut early = dial(&elsewhere.uds);
    writeln!(early, "CONNECT 3").unwrap();
    let mut driver = driver.restored(&state, device);
    driver.device.resume();
    // Time enough to do it wrongly.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(driver.take_used(RX), None);

    let event = driver.request(EVENT, &[], &[4]);
    driver.notify(EVENT);
    assert_eq!(driver.used(EVENT), (event.head, 4));
    assert_eq!(driver.used(RX), (packet.head, HEADER_LEN as u32));
    let bytes = driver.bytes(packet.writable[0].0, HEADER_LEN);
    let header = Header::from_bytes(bytes.as_slice().try_into().unwrap());
    assert_eq!((header.op, header.dst_port), (Op::Request as u16, 3));
}

#[test]
fn a_reset_ends_all_connections_and_who_comes_meanwhile_waits_for_the_driver() {
    let host = Host::new();
    let mut guest = Guest::new(host.device());
    guest.listen(3);
    for _ in 0..3 {
        let (_, mut out) = connect_out(&host, &mut guest, 1);
        let (mut inward, _) = connect(&host, &mut guest, 2);
        guest.driver.reset();
        assert_eq!(out.read(&mut [0]).unwrap(), 0);
        assert_eq!(inward.read(&mut [0]).unwrap(), 0);
        let mut early = dial(&host.uds);
        writeln!(early, "CONNECT 3").unwrap();
        guest.reboot();
        let ports = guest.accept();
        assert_eq!(hear_ok(&mut early), ports.remote);
        assert_eq!(guest.transport_resets, 0);
    }
}

#[test]
fn a_driver_after_a_reset_is_given_no_answer_to_what_another_has_sent() {
    let host = Host::new();
    let mut driver = FakeDriver::new(host.device());
    let from = |port| Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: port,
        dst_port: 1,
        kind: TYPE_STREAM,
        op: Op::CreditUpdate as u16,
        ..Header::default()
    };
    for (port, has_buffer) in [(10, false), (11, true)] {
        driver.start(u64::MAX);
        let packet = has_buffer.then(|| driver.request(RX, &[], &[4096]));
        let sent = driver.request(TX, &[&from(port).bytes()], &[]);
        driver.notify(TX);
        assert_eq!(driver.used(TX), (sent.head, 0));
        if let Some(packet) = packet {
            assert_eq!(driver.used(RX), (packet.head, HEADER_LEN as u32));
            let bytes = driver.bytes(packet.writable[0].0, HEADER_LEN);
            let header = Header::from_bytes(bytes.as_slice().try_into().unwrap());
            assert_eq!((header.op, header.dst_port), (Op::Rst as u16, port));
        }
        driver.reset();
    }
}

#[test]
fn a_program_that_gives_up_before_the_guest_answers_leaves_nothing_behind() {
    let host = Host::new();
    // No buffers: the guest hears of nobody.
    let mut guest = Guest::with_buffers(host.device(), 1, 4096);
    guest.starve = true;
    let first = guest.connect(99);
    assert!(!guest.is_connected(first));
    for _ in 0..100 {
        let mut stream = dial(&host.uds);
        stream.write_all(b"CONNECT 5\n").unwrap();
    }
    // The last one waits.
    guest.listen(6);
    let mut stream = dial(&host.uds);
    stream.write_all(b"CONNECT 6\n").unwrap();
    let heard = BufReader::new(stream.try_clone().unwrap());
    guest.starve = false;
    guest.refill();
    let ports = guest.accept();
    let line = heard.lines().next().unwrap().unwrap();
    assert_eq!(line, format!("OK {}", ports.remote));
    // The guest may have heard of one or the other of them, and that it is gone.
    assert!(guest.strays.len() <= 200);
}

/// The host's sockets, whose calls fail so many times with an errno.
#[derive(Debug)]
struct Failing {
    sockets: UnixSockets,
    errno: i32,
    accepts: Arc<AtomicU32>,
    connects: Arc<AtomicU32>,
}

impl Failing {
    fn fail(&self, left: &AtomicU32) -> io::Result<()> {
        let taken = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            left.checked_sub(1)
        });
        match taken {
            Ok(_) => Err(io::Error::from_raw_os_error(self.errno)),
            Err(_) => Ok(()),
        }
    }
}

impl Sockets for Failing {
    fn listener(&self) -> RawFd {
        self.sockets.listener()
    }

    fn accept(&self) -> io::Result<UnixStream> {
        self.fail(&self.accepts)?;
        self.sockets.accept()
    }

    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        self.fail(&self.connects)?;
        self.sockets.connect(port)
    }

    fn path(&self) -> &Path {
        self.sockets.path()
    }
}

#[test]
fn a_host_that_refuses_for_a_while_has_programs_wait_and_the_guest_refused_and_then_it_goes_on() {
    for errno in [
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOMEM,
        libc::ENOBUFS,
        libc::ECONNABORTED,
        libc::EINTR,
        libc::EACCES,
        libc::EAGAIN,
    ] {
        let host = Host::new();
        let (accepts, connects) = (Arc::new(AtomicU32::new(3)), Arc::new(AtomicU32::new(1)));
        let sockets = Failing {
            sockets: UnixSockets::listen(&host.uds).unwrap(),
            errno,
            accepts: accepts.clone(),
            connects: connects.clone(),
        };
        let mut guest = Guest::new(Vsock::new(CID, sockets).unwrap());
        guest.listen(7);
        let mut stream = dial(&host.uds);
        writeln!(stream, "CONNECT 7").unwrap();
        let ports = guest.accept();
        assert_eq!(hear_ok(&mut stream), ports.remote);
        assert_eq!(accepts.load(Ordering::SeqCst), 0);

        let _listener = host.listen(8);
        let refused = guest.connect(8);
        assert!(!guest.is_connected(refused));
        let connected = guest.connect(8);
        assert!(guest.is_connected(connected));
        guest.close(connected);
    }
}

mod hostile {
    use super::*;
    use proptest::prelude::*;

    /// A packet: mostly of a connection that there is, or may be.
    fn packet() -> impl Strategy<Value = (Header, usize, Vec<usize>)> {
        let rarely = |usual: u64| prop_oneof![9 => Just(usual), 1 => any::<u64>()];
        let port = || prop_oneof![Just(1_u32), Just(2), Just(1 << 30), any::<u32>()];
        let len = prop_oneof![Just(0_usize), 1..100_usize, 60_000..65_536_usize];
        let header = (
            (rarely(CID.into()), rarely(2), port(), port()),
            (prop_oneof![9 => Just(1_u16), 1 => any::<u16>()], 0..9_u16),
            prop_oneof![Just(None), any::<u32>().prop_map(Some)],
            prop_oneof![0..4_u32, any::<u32>()],
            any::<u32>(),
            prop_oneof![Just(0), any::<u32>()],
        );
        let cuts = proptest::collection::vec(0..200_usize, 0..4);
        (header, len, cuts).prop_map(|(header, len, mut cuts)| {
            let ((src_cid, dst_cid, src_port, dst_port), (kind, op), wrong_len, ..) = header;
            let (.., flags, buf_alloc, fwd_cnt) = header;
            cuts.sort_unstable();
            let header = Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len: wrong_len.unwrap_or(len as u32),
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            (header, len, cuts)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_packets_a_guest_sends_the_device_serves_its_next_connection(
            packets in proptest::collection::vec(packet(), 1..60),
        ) {
            let host = Host::new();
            let listener = host.listen(1);
            listener.set_nonblocking(true).unwrap();
            let mut guest = Guest::new(host.device());
            guest.lenient = true;
            let data = Noise(12).bytes(1 << 16);
            let mut streams = Vec::new();
            for (header, len, cuts) in &packets {
                guest.raw_cut(header, &data[..*len], cuts);
                if let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).unwrap();
                    let _ = stream.write(&data);
                    streams.push(stream);
                }
            }
            // A good one behind all of them.
            guest.reboot();
            guest.lenient = false;
            let (ports, mut stream) = connect_out(&host, &mut guest, 3);
            guest.send_all(ports, b"good");
            let mut came = [0; 4];
            stream.read_exact(&mut came).unwrap();
            prop_assert_eq!(&came, b"good");
            guest.close(ports);
        }
    }
}
