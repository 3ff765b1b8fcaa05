// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's sockets for tests: a driver of the device over [`FakeDriver`], which keeps the rules of virtio 1.2, 5.10
//! and panics where the device breaks one.
//!
//! It has one thread, the test's: what the device has sent is taken by [`Guest::poll`], and waited for by
//! [`Guest::until`].

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a part of tests, in a module of its own so that tests outside of this crate have it as well"
)]

use std::collections::{HashMap, HashSet, VecDeque};

use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use vm_memory::{Bytes, GuestAddress};

use super::super::fake::{Descriptor, FakeDriver};
use super::super::mmio::MmioState;
use super::config::HOST_CID;
use super::credit::GuestCredit;
use super::device::{Vsock, VsockState};
use super::packet::{
    EVENT_TRANSPORT_RESET, HEADER_LEN, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::sockets::{Sockets, UnixSockets};
use super::switch::{EVENT, RX, TX};

/// The most data of one packet to the device.
pub const MAX_DATA: usize = 64 << 10;
/// So many packets can be under way to the device.
const TX_BUFFERS: usize = 32;
const EVENT_BUFFERS: usize = 8;

/// A socket of the guest's: its own port, and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The guest's.
    pub local: u32,
    /// The host's.
    pub remote: u32,
}

/// Where a socket of the guest's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// The host was asked.
    Connecting,
    /// Data may go.
    Connected,
    /// By an `RST` of the host's, or of its own.
    Closed,
}

/// A socket of the guest's.
#[derive(Debug)]
pub struct Socket {
    /// Where it is.
    pub life: Life,
    /// What the host does no more, by `SHUTDOWN`.
    pub host_shut: u32,
    /// What the guest does no more.
    pub shut: u32,
    /// What has come and was not read.
    pub received: VecDeque<u8>,
    /// The room that the host is told of.
    pub buf_alloc: u32,
    /// What the host may be sent.
    credit: GuestCredit,
    came: u32,
    read: u32,
    told: u32,
}

impl Socket {
    fn new(life: Life, buf_alloc: u32) -> Self {
        Socket {
            life,
            host_shut: 0,
            shut: 0,
            received: VecDeque::new(),
            buf_alloc,
            credit: GuestCredit::default(),
            came: 0,
            read: 0,
            told: 0,
        }
    }

    /// Whether all has come that will.
    pub fn is_at_end(&self) -> bool {
        self.life == Life::Closed || self.host_shut & SHUTDOWN_SEND != 0
    }
}

/// A guest with a driver for the device.
pub struct Guest<S: Sockets = UnixSockets> {
    /// The device, its machine and its queues.
    pub driver: FakeDriver<Vsock<S>>,
    /// Its address, as the device says it.
    pub cid: u64,
    /// Connections that the host has asked for, in order.
    pub accepted: VecDeque<Ports>,
    /// Packets that no socket has wanted.
    pub strays: Vec<Header>,
    /// How often the device has said that no connection is left.
    pub transport_resets: u32,
    /// How often the device has asked for credit.
    pub credit_requests: u32,
    /// The room of a new socket.
    pub buf_alloc: u32,
    /// No buffers are given back to the device from now on.
    pub starve: bool,
    /// What comes is not looked at: the guest has sent what no driver sends.
    pub lenient: bool,
    sockets: HashMap<Ports, Socket>,
    listening: HashSet<u32>,
    next_port: u32,
    /// Buffers that the device has, by descriptor.
    rx: HashMap<u16, GuestAddress>,
    /// Those that it would have had.
    rx_kept: Vec<GuestAddress>,
    /// Packets that have come and are not taken yet, in order.
    came: VecDeque<(Header, Vec<u8>)>,
    rx_len: u32,
    tx: HashMap<u16, GuestAddress>,
    tx_free: Vec<GuestAddress>,
    events: HashMap<u16, GuestAddress>,
    /// How often the device had done something.
    polled: u64,
}

impl<S: Sockets> Guest<S> {
    /// A guest whose driver is ready, with Linux's buffers: of 4 KiB, the header among it.
    pub fn new(device: Vsock<S>) -> Self {
        Self::with_buffers(device, 64, 4096)
    }

    /// The same with so many buffers of so many bytes for the device's packets.
    pub fn with_buffers(device: Vsock<S>, count: usize, len: u32) -> Self {
        let driver = FakeDriver::new(device);
        let mut guest = Guest {
            driver,
            cid: 0,
            accepted: VecDeque::new(),
            strays: Vec::new(),
            transport_resets: 0,
            credit_requests: 0,
            buf_alloc: 64 << 10,
            starve: false,
            lenient: false,
            sockets: HashMap::new(),
            listening: HashSet::new(),
            next_port: 1 << 20,
            rx: HashMap::new(),
            rx_kept: Vec::new(),
            came: VecDeque::new(),
            rx_len: len,
            tx: HashMap::new(),
            tx_free: Vec::new(),
            events: HashMap::new(),
            polled: 0,
        };
        guest.rx_kept = (0..count)
            .map(|_| guest.driver.allocate(len.into()))
            .collect();
        guest.tx_free = (0..TX_BUFFERS)
            .map(|_| guest.driver.allocate((HEADER_LEN + MAX_DATA) as u64))
            .collect();
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.driver.start(u64::MAX);
        let mut cid = [0; 8];
        self.driver.config(0, &mut cid);
        self.cid = u64::from_le_bytes(cid);
        for _ in 0..EVENT_BUFFERS {
            let at = self.driver.allocate(4);
            self.give_event(at);
        }
        self.driver.notify(EVENT);
        self.refill();
    }

    /// Resets the device and begins anew, as a guest that reboots.
    pub fn reboot(&mut self) {
        self.driver.reset();
        self.rx_kept.extend(self.rx.drain().map(|(_, at)| at));
        self.tx_free.extend(self.tx.drain().map(|(_, at)| at));
        self.events.clear();
        self.sockets.clear();
        self.accepted.clear();
        self.start();
    }

    /// The same guest before a device that was restored from the state of this one, which `make` makes: at another
    /// path, as the device of before listens still.
    pub fn restored(mut self, make: impl FnOnce(VsockState) -> Vsock<S>) -> Self {
        let paused = self.driver.device.pause(std::time::Duration::from_secs(60));
        assert!(paused, "the device does not come to rest");
        let state = self.driver.device.state().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let state: MmioState<VsockState> = serde_json::from_str(&text).unwrap();
        let device = make(state.device.clone());
        self.driver = self.driver.restored(&state, device);
        self.driver.device.resume();
        self
    }

    /// Accepts connections to a port from now on.
    pub fn listen(&mut self, port: u32) {
        self.listening.insert(port);
    }

    /// Asks for a connection to the host's port.
    pub fn connect(&mut self, remote: u32) -> Ports {
        let local = self.next_port;
        self.next_port += 1;
        let ports = Ports { local, remote };
        let socket = Socket::new(Life::Connecting, self.buf_alloc);
        self.sockets.insert(ports, socket);
        self.packet(ports, Op::Request, 0, &[]);
        ports
    }

    /// A socket.
    pub fn socket(&mut self, ports: Ports) -> &mut Socket {
        let socket = self.sockets.get_mut(&ports);
        socket.unwrap_or_else(|| panic!("there was never a socket {ports:?}"))
    }

    /// Forgets a socket that is closed.
    pub fn forget(&mut self, ports: Ports) {
        let socket = self.sockets.remove(&ports).unwrap();
        assert_eq!(socket.life, Life::Closed);
    }

    /// Waits until the host has accepted or refused; whether it has accepted.
    pub fn is_connected(&mut self, ports: Ports) -> bool {
        self.until(|guest| match guest.socket(ports).life {
            Life::Connecting => None,
            life => Some(life == Life::Connected),
        })
    }

    /// Waits for a connection of the host's to a port that is listened to.
    pub fn accept(&mut self) -> Ports {
        self.until(|guest| guest.accepted.pop_front())
    }

    /// Sends of `data` what the host has given credit for; how much.
    pub fn send(&mut self, ports: Ports, data: &[u8]) -> usize {
        let mut sent = 0;
        loop {
            let socket = self.socket(ports);
            assert_eq!(socket.life, Life::Connected);
            assert!(socket.shut & SHUTDOWN_SEND == 0, "it has said its end");
            let most = MAX_DATA.min(socket.credit.room() as usize);
            let part = &data[sent..data.len().min(sent + most)];
            if part.is_empty() {
                return sent;
            }
            socket.credit.sent(part.len() as u32);
            self.packet(ports, Op::Rw, 0, part);
            sent += part.len();
        }
    }

    /// Sends all of `data`, and waits for credit.
    pub fn send_all(&mut self, ports: Ports, data: &[u8]) {
        let mut sent = 0;
        while sent < data.len() {
            sent += self.until(|guest| match guest.send(ports, &data[sent..]) {
                0 => None,
                sent => Some(sent),
            });
        }
    }

    /// Reads up to `most` bytes that have come, and gives credit for them when half of the room is used.
    pub fn read(&mut self, ports: Ports, most: usize) -> Vec<u8> {
        let socket = self.socket(ports);
        let len = most.min(socket.received.len());
        // Not byte by byte, or a bench of streams is one of this.
        let rest = socket.received.split_off(len);
        let data = std::mem::replace(&mut socket.received, rest).into();
        socket.read = socket.read.wrapping_add(len as u32);
        let used = socket.read.wrapping_sub(socket.told);
        if used > 0 && used >= socket.buf_alloc / 2 && socket.life == Life::Connected {
            self.packet(ports, Op::CreditUpdate, 0, &[]);
        }
        self.answer_end(ports);
        data
    }

    /// Reads until the host's end of file, or the connection's.
    pub fn read_to_end(&mut self, ports: Ports) -> Vec<u8> {
        let mut data = Vec::new();
        self.until(|guest| {
            data.extend(guest.read(ports, usize::MAX));
            let socket = guest.socket(ports);
            (socket.is_at_end() && socket.received.is_empty()).then_some(())
        });
        data
    }

    /// Reads so many bytes.
    pub fn read_exact(&mut self, ports: Ports, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        self.until(|guest| {
            let more = guest.read(ports, len - data.len());
            data.extend(more);
            let ended = guest.socket(ports).is_at_end() && guest.socket(ports).received.is_empty();
            assert!(!ended || data.len() == len, "the end comes too soon");
            (data.len() == len).then_some(())
        });
        data
    }

    /// Sends or receives no more, or both: `SHUTDOWN_…` of [`packet`](super::packet).
    pub fn shutdown(&mut self, ports: Ports, flags: u32) {
        let socket = self.socket(ports);
        socket.shut |= flags;
        let all = socket.shut;
        self.packet(ports, Op::Shutdown, all, &[]);
    }

    /// Shuts both, and waits for the host's `RST`.
    pub fn close(&mut self, ports: Ports) {
        if self.socket(ports).life != Life::Closed {
            self.shutdown(ports, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
            self.until(|guest| (guest.socket(ports).life == Life::Closed).then_some(()));
        }
        self.forget(ports);
    }

    /// Ends a connection at once.
    pub fn reset(&mut self, ports: Ports) {
        self.packet(ports, Op::Rst, 0, &[]);
        self.socket(ports).life = Life::Closed;
    }

    /// Sends a packet of a socket's.
    pub fn packet(&mut self, ports: Ports, op: Op, flags: u32, data: &[u8]) {
        let socket = self.socket(ports);
        socket.told = socket.read;
        let header = Header {
            buf_alloc: socket.buf_alloc,
            fwd_cnt: socket.told,
            flags,
            ..self.header(ports, op, data.len())
        };
        self.raw(&header, data);
    }

    /// A header without credit.
    pub fn header(&self, ports: Ports, op: Op, len: usize) -> Header {
        Header {
            src_cid: self.cid,
            dst_cid: HOST_CID,
            src_port: ports.local,
            dst_port: ports.remote,
            len: len as u32,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Header::default()
        }
    }

    /// Sends any packet, cut into two descriptors as Linux does.
    pub fn raw(&mut self, header: &Header, data: &[u8]) {
        self.raw_cut(header, data, &[HEADER_LEN]);
    }

    /// Sends any packet, cut at these places.
    pub fn raw_cut(&mut self, header: &Header, data: &[u8], cuts: &[usize]) {
        let at = self.until(|guest| guest.tx_free.pop());
        let packet = [&header.bytes()[..], data].concat();
        let memory = self.driver.memory();
        memory.write_slice(&packet, at).unwrap();
        let mut descriptors = Vec::new();
        let mut from = 0;
        for cut in cuts.iter().copied().chain([packet.len()]) {
            let to = cut.clamp(from, packet.len());
            if to > from {
                descriptors.push(Descriptor {
                    address: at.0 + from as u64,
                    len: (to - from) as u32,
                    ..Descriptor::default()
                });
            }
            from = to;
        }
        let head = self.driver.chain(TX, &descriptors);
        self.tx.insert(head, at);
        self.driver.notify(TX);
    }

    /// Waits until `done` says something. It is asked again after whatever the device has done.
    pub fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        loop {
            self.poll();
            let before = self.polled;
            if let Some(said) = done(self) {
                return said;
            }
            // What it has done meanwhile counts, and what `done` has waited for itself.
            self.poll();
            if self.polled == before {
                self.driver.wait_interrupt();
            }
        }
    }

    /// Takes what the device has done so far.
    pub fn poll(&mut self) {
        let before = (self.rx.len(), self.tx.len(), self.transport_resets);
        while let Some((head, _)) = self.driver.take_used(TX) {
            let at = self.tx.remove(&head);
            self.tx_free.push(at.expect("a packet that was sent"));
        }
        while let Some((head, written)) = self.driver.take_used(EVENT) {
            let at = self.events.remove(&head).expect("a buffer of its own");
            assert_eq!(written, 4);
            let id = self.driver.bytes(at, 4);
            assert_eq!(id, EVENT_TRANSPORT_RESET.to_le_bytes());
            self.transport_resets += 1;
            for socket in self.sockets.values_mut() {
                socket.life = Life::Closed;
            }
            self.give_event(at);
            self.driver.notify(EVENT);
        }
        while let Some((head, written)) = self.driver.take_used(RX) {
            let at = self.rx.remove(&head).expect("a buffer of its own");
            assert!(written >= HEADER_LEN as u32 && written <= self.rx_len);
            let bytes = self.driver.bytes(at, written as usize);
            let (header, data) = bytes.split_at(HEADER_LEN);
            let header = Header::from_bytes(header.try_into().unwrap());
            assert_eq!(header.len as usize, data.len());
            self.came.push_back((header, data.to_vec()));
            self.rx_kept.push(at);
        }
        if before != (self.rx.len(), self.tx.len(), self.transport_resets) {
            self.polled += 1;
        }
        if !self.starve {
            self.refill();
        }
        // An answer may wait for room and poll meanwhile: what came later is taken behind what came before.
        while let Some((header, data)) = self.came.pop_front() {
            if !self.lenient {
                self.take(&header, &data);
            }
        }
    }

    /// Gives the device all buffers that it does not have.
    pub fn refill(&mut self) {
        if self.rx_kept.is_empty() {
            return;
        }
        for at in std::mem::take(&mut self.rx_kept) {
            let one = Descriptor {
                address: at.0,
                len: self.rx_len,
                flags: VRING_DESC_F_WRITE as u16,
                next: 0,
            };
            let head = self.driver.chain(RX, &[one]);
            self.rx.insert(head, at);
        }
        self.driver.notify(RX);
    }

    fn give_event(&mut self, at: GuestAddress) {
        let one = Descriptor {
            address: at.0,
            len: 4,
            flags: VRING_DESC_F_WRITE as u16,
            next: 0,
        };
        let head = self.driver.chain(EVENT, &[one]);
        self.events.insert(head, at);
    }

    fn take(&mut self, header: &Header, data: &[u8]) {
        let op = Op::new(header.op).expect("an operation that there is");
        let ports = Ports {
            local: header.dst_port,
            remote: header.src_port,
        };
        let live = self.sockets.get_mut(&ports);
        let live = live.filter(|socket| socket.life != Life::Closed);
        let Some(socket) = live else {
            self.stray(header, op, ports);
            return;
        };
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, self.cid));
        assert_eq!(header.kind, TYPE_STREAM);
        assert!(data.is_empty() || op == Op::Rw);
        socket.credit.update(header.buf_alloc, header.fwd_cnt);
        match op {
            Op::Request => panic!("{ports:?} is connected, and is asked for again"),
            Op::Response => {
                assert_eq!(socket.life, Life::Connecting);
                socket.life = Life::Connected;
            }
            Op::Rst => socket.life = Life::Closed,
            Op::Shutdown => {
                assert!(header.flags & !socket.host_shut != 0, "it says nothing new");
                socket.host_shut |= header.flags;
                self.answer_end(ports);
            }
            Op::Rw => {
                assert_eq!(socket.life, Life::Connected);
                assert!(!data.is_empty(), "data of no bytes");
                assert_eq!(socket.host_shut & SHUTDOWN_SEND, 0, "data behind its end");
                socket.came = socket.came.wrapping_add(data.len() as u32);
                let under_way = socket.came.wrapping_sub(socket.told);
                assert!(under_way <= socket.buf_alloc, "more than its credit");
                if socket.shut & SHUTDOWN_RECEIVE == 0 {
                    socket.received.extend(data);
                }
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => {
                self.credit_requests += 1;
                self.packet(ports, Op::CreditUpdate, 0, &[]);
            }
        }
    }

    /// Not of a socket: a new one's, or a mistake.
    fn stray(&mut self, header: &Header, op: Op, ports: Ports) {
        if op == Op::Request && self.listening.contains(&ports.local) {
            let mut socket = Socket::new(Life::Connected, self.buf_alloc);
            socket.credit.update(header.buf_alloc, header.fwd_cnt);
            self.sockets.insert(ports, socket);
            self.accepted.push_back(ports);
            self.packet(ports, Op::Response, 0, &[]);
            return;
        }
        self.strays.push(*header);
        if op != Op::Rst {
            self.raw(&header.reset(), &[]);
        }
    }

    /// A host that does nothing more is answered by an `RST` when all that it sent was read, as Linux does.
    fn answer_end(&mut self, ports: Ports) {
        let socket = self.socket(ports);
        let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
        if socket.life == Life::Connected
            && socket.host_shut & both == both
            && socket.received.is_empty()
        {
            self.reset(ports);
        }
    }
}
