// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All connections of a guest: who gets a packet, whose turn it is, and what there can be at most.
//!
//! ```text
//!   tx queue ─► packet ─► Connection ─► socket         Unix socket ─► handshake ─► Connection
//!                 │ unknown, wrong                                                    │ has something
//!                 ▼                                                                   ▼
//!              replies (RST) ──────────────── in turns ──────────────────────────► rx queue
//! ```
//!
//! # Bounds
//! Connections, handshakes and replies have a number each that is never exceeded by what a guest or a program does:
//! - A connection too many is refused, the guest's by `RST`, the host's by its end. One that only waits for the guest's
//!   farewell gives way.
//! - A handshake too many takes the place of the oldest: who connects and does not say where to keeps nobody else out.
//! - Where the guest takes no replies, its packets stay in its queue (5.10.6.2.2).
//!
//! # Turns
//! A connection with something for the guest gets one packet, and then the others' turn comes. The guest's own packets
//! are taken in its order, as many a turn as its queue has places.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vm_memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::super::chain::Chain;
use super::super::device::Cx;
use super::super::fault::Fault;
use super::config::HOST_CID;
use super::connection::{Connection, Key};
use super::handshake::{Heard, Line};
use super::packet::{EVENT_TRANSPORT_RESET, HEADER_LEN, Header, Op, TYPE_STREAM};
use super::sockets::Sockets;
use super::state::State;
use super::table::{Id, Table};

/// So many connections at once, those among them whose last bytes are on the way to the host. Where the process may
/// have few descriptors they are half of those: the rest of the machine needs the others, and ends without them.
pub const MAX_CONNECTIONS: usize = 1024;
/// So many programs at once that have not said yet which port they want; an eighth of the descriptors at most.
pub const MAX_HANDSHAKES: usize = 128;
/// So many replies wait for the guest's buffers before its packets do. When connections end there may be one more for
/// each.
pub const MAX_REPLIES: usize = 1024;

/// The queues (5.10.2).
pub const RX: usize = 0;
/// The guest's packets.
pub const TX: usize = 1;
/// Events.
pub const EVENT: usize = 2;

/// What the host's ports of programs on the host begin from. Lower ones are those that guests connect to.
const FIRST_PORT: u32 = 1 << 30;
/// And where they begin again.
const LAST_PORT: u32 = (1 << 31) - 1;

/// So many programs are accepted at a time.
const ACCEPTS: usize = 16;
/// So many sockets are heard at a time.
const EVENTS: usize = 64;
/// When a host that has no descriptor left is asked again.
const RETRY: Duration = Duration::from_millis(100);

/// What a socket is heard of, once for each time that it happens.
const EDGES: EventSet = EventSet::from_bits_truncate(
    EventSet::IN.bits() | EventSet::READ_HANG_UP.bits() | EventSet::EDGE_TRIGGERED.bits(),
);

const LISTENER: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// What has a socket.
#[derive(Debug)]
enum Slot {
    /// A program that has not said yet which port it wants.
    Handshake(UnixStream, Line),
    Connection(Box<Connection>),
}

/// The connections of one guest, and who listens for more.
#[derive(Debug)]
pub struct Switch<S> {
    guest_cid: u64,
    sockets: S,
    epoll: Epoll,
    timer: TimerFd,
    slots: Table<Slot>,
    by_key: HashMap<Key, Id>,
    /// In the order in which they came.
    handshakes: VecDeque<Id>,
    /// Connections that have something for the guest, each once.
    listed: VecDeque<Id>,
    /// For packets that are no connection's, and the last of connections.
    replies: VecDeque<Header>,
    /// A reply is next, if there is one.
    reply_next: bool,
    next_port: u32,
    /// [`MAX_CONNECTIONS`], or what the limit of descriptors permits.
    most_connections: usize,
    /// [`MAX_HANDSHAKES`], likewise.
    most_handshakes: usize,
    /// The guest is to be told that no connection of before is left, before it hears of another.
    transport_reset: bool,
    /// The host has refused a descriptor, which was said.
    starved: bool,
}

impl<S: Sockets> Switch<S> {
    /// No connections.
    ///
    /// # Errors
    /// The host's, with what was refused.
    pub fn new(guest_cid: u32, sockets: S) -> Result<Self, (&'static str, io::Error)> {
        let epoll = Epoll::new().map_err(|error| ("make an epoll descriptor", error))?;
        let timer = TimerFd::new().map_err(|error| ("make a timer", error.into()))?;
        for (fd, data) in [(sockets.listener(), LISTENER), (timer.as_raw_fd(), TIMER)] {
            let event = EpollEvent::new(EventSet::IN, data);
            let added = epoll.ctl(ControlOperation::Add, fd, event);
            added.map_err(|error| ("wait for a descriptor", error))?;
        }
        let (most_connections, most_handshakes) = bounds(most_descriptors());
        Ok(Switch {
            guest_cid: guest_cid.into(),
            sockets,
            epoll,
            timer,
            slots: Table::new(),
            by_key: HashMap::new(),
            handshakes: VecDeque::new(),
            listed: VecDeque::new(),
            replies: VecDeque::new(),
            reply_next: false,
            next_port: FIRST_PORT,
            most_connections,
            most_handshakes,
            transport_reset: false,
            starved: false,
        })
    }

    /// Readable when a socket is ready for something.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Where programs connect.
    pub fn sockets(&self) -> &S {
        &self.sockets
    }

    /// The guest knows of connections that are not here: it is told.
    pub fn reset_transport(&mut self) {
        self.transport_reset = true;
    }

    /// The guest knows of no connection any more. What it has finished sending goes to the host all the same, as soon
    /// as a driver is there again.
    pub fn forget_guest(&mut self) {
        self.transport_reset = false;
        self.replies.clear();
        self.listed.clear();
        self.by_key.clear();
        let mut over = Vec::new();
        for (id, slot) in self.slots.iter_mut() {
            if let Slot::Connection(connection) = slot {
                connection.abandon();
                connection.listed = false;
                if !connection.lingers() {
                    over.push(id);
                }
            }
        }
        for id in over {
            self.slots.remove(id);
        }
    }

    /// Closes a socket, and forgets all about it.
    fn remove(&mut self, id: Id) -> Option<Slot> {
        let slot = self.slots.remove(id)?;
        match &slot {
            Slot::Handshake(..) => self.handshakes.retain(|of| *of != id),
            // A guest without buffers must not have it grow by those that come and go.
            Slot::Connection(connection) if connection.listed => {
                self.listed.retain(|of| *of != id);
            }
            Slot::Connection(_) => {}
        }
        Some(slot)
    }

    /// Hears the sockets, and then does what [`serve`](Self::serve) does.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn hear(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(source) => {
                let what = "wait for sockets";
                return Err(Fault::Host { what, source });
            }
        };
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => self.accept(),
                TIMER => {
                    let _ = self.timer.clear();
                    self.listen(EventSet::IN);
                }
                data => {
                    let id = Id::from_u64(data);
                    match self.slots.get_mut(id) {
                        Some(Slot::Connection(connection)) => {
                            connection.ready(event.event_set());
                            self.after(id);
                        }
                        Some(Slot::Handshake(..)) => self.greet(id),
                        // It was closed by an event before this one.
                        None => {}
                    }
                }
            }
        }
        self.serve(cx)
    }

    /// Takes the guest's packets and gives it others, as far as its queues go.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn serve(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        self.tell_reset(cx)?;
        loop {
            let full = self.take_packets(cx)?;
            self.give_packets(cx)?;
            // Packets were left in their queue, for replies that have found their buffers now.
            if !full || self.replies.len() >= MAX_REPLIES {
                return Ok(());
            }
        }
    }

    fn tell_reset(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let memory = &**cx.memory;
        let Some(queue) = cx.queues.get_mut(EVENT) else {
            return Ok(());
        };
        // A driver without this queue wants to hear nothing.
        self.transport_reset &= queue.is_ready();
        if !self.transport_reset {
            return Ok(());
        }
        if let Some(chain) = queue.pop(memory)? {
            if !chain
                .writer(memory)
                .write_all(&EVENT_TRANSPORT_RESET.to_le_bytes())?
            {
                return Err(too_short("an event", &chain, 4));
            }
            queue.add_used(memory, chain, 4)?;
            self.transport_reset = false;
        }
        Ok(())
    }

    /// Takes packets until there are none, or too many replies wait: true then.
    fn take_packets(&mut self, cx: &mut Cx<'_>) -> Result<bool, Fault> {
        let memory = &**cx.memory;
        while self.replies.len() < MAX_REPLIES {
            let Some(queue) = cx.queues.get_mut(TX) else {
                return Ok(false);
            };
            let Some(chain) = queue.pop(memory)? else {
                return Ok(false);
            };
            self.packet(memory, &chain)?;
            if let Some(queue) = cx.queues.get_mut(TX) {
                queue.add_used(memory, chain, 0)?;
            }
        }
        Ok(true)
    }

    fn packet<M: GuestMemory>(&mut self, memory: &M, chain: &Chain) -> Result<(), Fault> {
        let mut reader = chain.reader(memory);
        let mut bytes = [0; HEADER_LEN];
        if !reader.read_exact(&mut bytes)? {
            let len = chain.readable.len();
            return Err(Fault::Driver(format!(
                "a packet of {len} bytes, less than its header's {HEADER_LEN}"
            )));
        }
        let header = Header::from_bytes(&bytes);
        let op = Op::new(header.op);
        let known = op.filter(|_| {
            header.kind == TYPE_STREAM
                && header.src_cid == self.guest_cid
                && header.dst_cid == HOST_CID
        });
        let Some(op) = known else {
            if op != Some(Op::Rst) {
                self.replies.push_back(header.reset());
            }
            return Ok(());
        };
        let key = Key {
            host_cid: HOST_CID,
            guest_cid: self.guest_cid,
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        if let Some(id) = self.by_key.get(&key).copied()
            && let Some(Slot::Connection(connection)) = self.slots.get_mut(id)
        {
            connection.packet(memory, (&header, op), chain, &mut reader)?;
            self.after(id);
            return Ok(());
        }
        match op {
            Op::Request => self.requested(key, &header),
            Op::Rst => {}
            _ => self.replies.push_back(header.reset()),
        }
        Ok(())
    }

    /// The guest asks for a connection.
    fn requested(&mut self, key: Key, request: &Header) {
        let connected = match self.make_room() {
            true => self.sockets.connect(key.host_port),
            false => Err(io::Error::other(format!(
                "there are {} connections",
                self.most_connections
            ))),
        };
        let stream = match connected {
            Ok(stream) => stream,
            Err(error) => {
                log::debug!("the guest's connection to port {}: {error}", key.host_port);
                self.replies.push_back(request.reset());
                return;
            }
        };
        let connection = Connection::accepted(key, stream, request);
        if let Some(id) = self.insert(Slot::Connection(Box::new(connection))) {
            self.by_key.insert(key, id);
            self.after(id);
        } else {
            self.replies.push_back(request.reset());
        }
    }

    /// Gives the guest packets until it has no buffers, or there are none.
    fn give_packets(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        if self.transport_reset {
            return Ok(());
        }
        let memory = &**cx.memory;
        let Some(queue) = cx.queues.get_mut(RX) else {
            return Ok(());
        };
        let mut taken: Option<Chain> = None;
        while !self.replies.is_empty() || !self.listed.is_empty() {
            let chain = match taken.take() {
                Some(chain) => chain,
                None => match queue.pop(memory)? {
                    Some(chain) => chain,
                    None => return Ok(()),
                },
            };
            if (chain.writable.len() as usize) <= HEADER_LEN {
                return Err(too_short("a packet", &chain, HEADER_LEN + 1));
            }
            match self.next_packet(memory, &chain)? {
                Some(written) => queue.add_used(memory, chain, written)?,
                None => taken = Some(chain),
            }
        }
        if let Some(chain) = taken {
            queue.push_back(chain);
        }
        Ok(())
    }

    /// Writes the packet whose turn it is; the bytes written, or none if the connection whose turn it was had none.
    fn next_packet<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &Chain,
    ) -> Result<Option<u32>, Fault> {
        self.reply_next = !self.reply_next || self.listed.is_empty();
        if self.reply_next
            && let Some(reply) = self.replies.pop_front()
        {
            chain.writer(memory).write_all(&reply.bytes())?;
            return Ok(Some(HEADER_LEN as u32));
        }
        let Some(id) = self.listed.pop_front() else {
            return Ok(None);
        };
        let Some(Slot::Connection(connection)) = self.slots.get_mut(id) else {
            return Ok(None);
        };
        connection.listed = false;
        let written = connection.fill(memory, chain)?;
        self.after(id);
        Ok(written)
    }

    /// What may follow when something has happened to a connection: it is listed, or over.
    fn after(&mut self, id: Id) {
        let Some(Slot::Connection(connection)) = self.slots.get_mut(id) else {
            return;
        };
        let key = connection.key();
        self.replies.extend(connection.take_reset());
        if connection.state() == State::Over {
            let lingers = connection.lingers();
            // The guest may use its port again, while the host gets its last bytes.
            if self.by_key.get(&key) == Some(&id) {
                self.by_key.remove(&key);
            }
            if !lingers {
                self.remove(id);
                return;
            }
        } else if !connection.listed && connection.has_packet() {
            connection.listed = true;
            self.listed.push_back(id);
        }
        self.watch_room(id);
    }

    /// Room in a socket is an event only while something is kept for it: otherwise each read of its program would wake
    /// this thread.
    fn watch_room(&mut self, id: Id) {
        let Some(Slot::Connection(connection)) = self.slots.get_mut(id) else {
            return;
        };
        let blocked = connection.kept() > 0;
        if blocked == connection.watched {
            return;
        }
        let edges = match blocked {
            true => EDGES | EventSet::OUT,
            false => EDGES,
        };
        let event = EpollEvent::new(edges, id.to_u64());
        let fd = connection.stream().as_raw_fd();
        // Changed, it is asked at once what it is ready for: no edge is lost.
        match self.epoll.ctl(ControlOperation::Modify, fd, event) {
            Ok(()) => connection.watched = blocked,
            Err(error) => {
                log::warn!("a connection is ended, for the host cannot wait for it: {error}");
                connection.evict();
                self.replies.extend(connection.take_reset());
                let key = connection.key();
                if self.by_key.get(&key) == Some(&id) {
                    self.by_key.remove(&key);
                }
                self.remove(id);
            }
        }
    }

    /// Programs that have connected.
    fn accept(&mut self) {
        for _ in 0..ACCEPTS {
            match self.sockets.accept() {
                Ok(stream) => {
                    self.starved = false;
                    self.greet_new(stream);
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    // Gone again.
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted => {}
                    _ => return self.starve(&error),
                },
            }
        }
    }

    /// Who waits there waits on: the host has no descriptor for it, and would say so without end.
    fn starve(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.starved, true) {
            let path = self.sockets.path().display();
            log::warn!("{path}: connections wait, for the host refuses them: {error}");
        }
        if self.timer.reset(RETRY, None).is_ok() {
            self.listen(EventSet::empty());
        }
    }

    fn listen(&mut self, events: EventSet) {
        let event = EpollEvent::new(events, LISTENER);
        let fd = self.sockets.listener();
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
            log::warn!("{}: {error}", self.sockets.path().display());
        }
    }

    fn greet_new(&mut self, stream: UnixStream) {
        if self.handshakes.len() >= self.most_handshakes
            && let Some(oldest) = self.handshakes.front().copied()
        {
            self.remove(oldest);
        }
        if let Some(id) = self.insert(Slot::Handshake(stream, Line::default())) {
            self.handshakes.push_back(id);
            // Most have said it by now.
            self.greet(id);
        }
    }

    /// Reads what a program says first, byte by byte: what is behind the line is the guest's.
    fn greet(&mut self, id: Id) {
        let Some(Slot::Handshake(stream, line)) = self.slots.get_mut(id) else {
            return;
        };
        let mut byte = [0];
        let port = loop {
            match io::Read::read(stream, &mut byte) {
                Ok(1) => match line.push(byte[0]) {
                    Heard::More => {}
                    Heard::Connect(port) => break Some(port),
                    Heard::Garbage => break None,
                },
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // It has hung up.
                Ok(_) | Err(_) => break None,
            }
        };
        // A connection gets another id: what epoll has said of the handshake is not taken for its.
        let Some(Slot::Handshake(stream, _)) = self.remove(id) else {
            return;
        };
        if let Some(port) = port {
            self.connect(stream, port);
        }
    }

    /// A program asks for a port of the guest's. It is closed where there can be no connection.
    fn connect(&mut self, stream: UnixStream, guest_port: u32) {
        if !self.make_room() {
            return;
        }
        let key = self.free_key(guest_port);
        // Only now the epoll descriptor has it by the new id: what it is ready for it says again.
        let fd = stream.as_raw_fd();
        let gone = EpollEvent::default();
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, gone);
        let connection = Connection::requested(key, stream);
        if let Some(id) = self.insert(Slot::Connection(Box::new(connection))) {
            self.by_key.insert(key, id);
            self.after(id);
        }
    }

    /// A port of the host's that no connection to this port of the guest's has. There are a million times more ports
    /// than connections.
    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key {
                host_cid: HOST_CID,
                guest_cid: self.guest_cid,
                host_port: self.next_port,
                guest_port,
            };
            self.next_port = match self.next_port {
                LAST_PORT => FIRST_PORT,
                port => port + 1,
            };
            if !self.by_key.contains_key(&key) {
                return key;
            }
        }
    }

    /// Whether there can be one connection more. If there are too many, one that only waits for the guest's farewell
    /// gives way, or else one that the guest knows of no more.
    fn make_room(&mut self) -> bool {
        if self.slots.len() - self.handshakes.len() < self.most_connections {
            return true;
        }
        let connections = self.slots.iter_mut().filter_map(|(id, slot)| match slot {
            Slot::Connection(connection) => Some((id, connection.state())),
            Slot::Handshake(..) => None,
        });
        let spare = connections.filter_map(|(id, state)| match state {
            State::Parting => Some((0, id)),
            State::Over => Some((1, id)),
            _ => None,
        });
        let Some((_, id)) = spare.min_by_key(|(rank, _)| *rank) else {
            return false;
        };
        if let Some(Slot::Connection(connection)) = self.slots.get_mut(id) {
            connection.evict();
        }
        self.after(id);
        self.remove(id);
        true
    }

    /// A slot whose socket is listened to: every edge of it, once.
    fn insert(&mut self, slot: Slot) -> Option<Id> {
        let id = self.slots.insert(slot);
        let fd = match self.slots.get_mut(id) {
            Some(Slot::Handshake(stream, _)) => stream.as_raw_fd(),
            Some(Slot::Connection(connection)) => connection.stream().as_raw_fd(),
            None => return None,
        };
        let event = EpollEvent::new(EDGES, id.to_u64());
        match self.epoll.ctl(ControlOperation::Add, fd, event) {
            Ok(()) => Some(id),
            Err(error) => {
                if !std::mem::replace(&mut self.starved, true) {
                    log::warn!(
                        "connections are refused, for the host cannot wait for them: {error}"
                    );
                }
                self.slots.remove(id);
                None
            }
        }
    }
}

/// How many connections and how many handshakes there may be, where the process may have so many descriptors.
fn bounds(descriptors: usize) -> (usize, usize) {
    (
        (descriptors / 2).clamp(1, MAX_CONNECTIONS),
        (descriptors / 8).clamp(1, MAX_HANDSHAKES),
    )
}

/// How many descriptors this process may have (`ulimit -n`).
fn most_descriptors() -> usize {
    let mut limit = MaybeUninit::<libc::rlimit>::uninit();
    // SAFETY: the call fills `limit` when it succeeds, and it is read only then.
    let soft = unsafe {
        match libc::getrlimit(libc::RLIMIT_NOFILE, limit.as_mut_ptr()) {
            0 => limit.assume_init().rlim_cur,
            _ => return usize::MAX,
        }
    };
    usize::try_from(soft).unwrap_or(usize::MAX)
}

fn too_short(what: &str, chain: &Chain, least: usize) -> Fault {
    Fault::Driver(format!(
        "a buffer of {} bytes for {what}, which has {least} at least",
        chain.writable.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_to_the_rest_of_the_machine() {
        // What most systems begin with.
        assert_eq!(bounds(1024), (512, 128));
        assert_eq!(bounds(4096), (MAX_CONNECTIONS, MAX_HANDSHAKES));
        assert_eq!(bounds(usize::MAX), (MAX_CONNECTIONS, MAX_HANDSHAKES));
        assert_eq!(bounds(0), (1, 1));
        for descriptors in 8..=4096 {
            let (connections, handshakes) = bounds(descriptors);
            assert!(connections + handshakes <= descriptors * 5 / 8);
        }
    }
}
