// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connection: a stream socket of the host's, and a port of the guest's.
//!
//! What the guest sends goes to the socket at once, from guest memory; what the socket does not take is kept, up to
//! [`WINDOW`], and the guest's credit says so. What the host sends is read into the guest's buffers when there is one,
//! and nothing of it is kept: what the guest has no buffers or no credit for stays in the socket, and its sender waits.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;

use vm_memory::bitmap::BS;
use vm_memory::{
    GuestMemory, Permissions, ReadVolatile, VolatileMemoryError, VolatileSlice, WriteVolatile,
};
use vmm_sys_util::epoll::EventSet;

use super::super::chain::{Buffers, Chain, Reader};
use super::super::fault::Fault;
use super::credit::{GuestCredit, HostCredit, WINDOW};
use super::handshake::answer;
use super::packet::{HEADER_LEN, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::state::{Actions, Event, State, next};

/// The most data of one packet to the guest, bytes: what Linux takes at most, and a turn of one connection's.
pub const MAX_DATA: u32 = 64 << 10;

/// Both ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// As the guest numbers the host: 2.
    pub host_cid: u64,
    /// The guest's address.
    pub guest_cid: u64,
    /// The host's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
}

impl Key {
    /// The header of a packet to the guest.
    pub fn header(&self, op: Op) -> Header {
        Header {
            src_cid: self.host_cid,
            dst_cid: self.guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: TYPE_STREAM,
            op: op as u16,
            ..Header::default()
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    stream: UnixStream,
    state: State,
    guest_credit: GuestCredit,
    host_credit: HostCredit,
    /// What the socket has not taken yet, of the guest's.
    kept: VecDeque<u8>,
    /// By `SHUTDOWN`: what the guest does no more.
    guest_shut: u32,
    /// By `SHUTDOWN`: what the guest knows that the host does no more.
    host_shut: u32,
    /// The host's end of file comes behind what is kept.
    finishing: bool,
    /// It was told.
    finished: bool,
    /// There may be something to read, or an error to hear of. From the socket's edge until it would block.
    readable: bool,
    /// The same of room to write.
    writable: bool,
    /// The host's end is closed.
    hung_up: bool,
    /// The host sends no more, and all of it was read.
    eof: bool,
    /// The socket was found broken while something may still be read from it.
    failed: bool,
    owed: Owed,
    /// The guest was asked for credit, and has given none since.
    asked: bool,
    /// An `RST` is to be sent: it is over.
    reset: bool,
    /// It is on the list of those that have something for the guest.
    pub(super) listed: bool,
    /// Room in the socket is an event.
    pub(super) watched: bool,
}

/// Packets that the guest is to get, beside data.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: bool,
    credit: bool,
}

impl Connection {
    /// The host's: the guest will be asked.
    pub fn requested(key: Key, stream: UnixStream) -> Self {
        let mut connection = Self::new(key, stream, State::Requested);
        connection.owed.request = true;
        connection
    }

    /// The guest's, by this `REQUEST`: it will be answered.
    pub fn accepted(key: Key, stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(key, stream, State::Open);
        let Header {
            buf_alloc, fwd_cnt, ..
        } = *request;
        connection.guest_credit.update(buf_alloc, fwd_cnt);
        connection.owed.response = true;
        connection
    }

    fn new(key: Key, stream: UnixStream, state: State) -> Self {
        Connection {
            key,
            stream,
            state,
            guest_credit: GuestCredit::default(),
            host_credit: HostCredit::default(),
            kept: VecDeque::new(),
            guest_shut: 0,
            host_shut: 0,
            finishing: false,
            finished: false,
            // Until the socket says otherwise.
            readable: true,
            writable: true,
            hung_up: false,
            eof: false,
            failed: false,
            owed: Owed::default(),
            asked: false,
            reset: false,
            listed: false,
            watched: false,
        }
    }

    /// Both ends.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// The socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Bytes that are kept for the host.
    pub fn kept(&self) -> usize {
        self.kept.len()
    }

    /// Whether it is over and was the guest's to end so, but its last bytes are not with the host yet: the host gets
    /// them, and then the end of file.
    pub fn lingers(&self) -> bool {
        self.state == State::Over && self.finishing && !self.kept.is_empty()
    }

    /// The `RST` that the guest is to be sent, once.
    pub fn take_reset(&mut self) -> Option<Header> {
        std::mem::take(&mut self.reset).then(|| self.key.header(Op::Rst))
    }

    /// Whether the guest is to get a packet, if it has a buffer.
    pub fn has_packet(&self) -> bool {
        let Owed {
            request,
            response,
            shutdown,
            credit,
        } = self.owed;
        request
            || self.state != State::Over
                && (response
                    || shutdown
                    || credit
                    || self.can_read() && (self.guest_credit.room() > 0 || !self.asked))
    }

    /// The host's data is wanted, and there may be some.
    fn can_read(&self) -> bool {
        self.readable && !self.eof && matches!(self.state, State::Open | State::Inbound)
    }

    /// A packet of the guest's for this connection, with its data in `reader`.
    ///
    /// # Errors
    /// [`Fault::Buffer`].
    pub fn packet<M: GuestMemory>(
        &mut self,
        memory: &M,
        (header, op): (&Header, Op),
        chain: &Chain,
        reader: &mut Reader<'_, M>,
    ) -> Result<(), Fault> {
        self.guest_credit.update(header.buf_alloc, header.fwd_cnt);
        // A guest whose program does not read answers that it has no room, at once and each time: it says when it has.
        self.asked &= self.guest_credit.room() == 0;
        match op {
            Op::Request => self.happen(Event::Nonsense),
            Op::Response => self.happen(Event::Accepted),
            Op::Rst => self.happen(Event::Rst),
            Op::Shutdown => {
                self.guest_shut |= header.flags;
                let send = self.guest_shut & SHUTDOWN_SEND != 0;
                let receive = self.guest_shut & SHUTDOWN_RECEIVE != 0;
                match (send, receive) {
                    (true, true) => self.happen(Event::ShutBoth),
                    (true, false) => self.happen(Event::ShutSend),
                    (false, true) => self.happen(Event::ShutReceive),
                    // It says nothing.
                    (false, false) => {}
                }
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => self.owed.credit = true,
            Op::Rw => {
                let room = WINDOW as usize - self.kept.len();
                if header.len as usize > room || header.len > reader.left() {
                    self.happen(Event::Nonsense);
                    return Ok(());
                }
                let (to, actions) = next(self.state, Event::Data);
                if actions.has(Actions::DELIVER) {
                    self.deliver(memory, header.len, chain, reader)?;
                } else {
                    self.enter(to, actions);
                    self.host_credit.forward(header.len);
                }
            }
        }
        self.owed.credit |= self.host_credit.is_news();
        Ok(())
    }

    /// The socket is ready for these, or was in the meantime.
    pub fn ready(&mut self, events: EventSet) {
        let any = EventSet::HANG_UP | EventSet::ERROR;
        self.hung_up |= events.intersects(any);
        self.readable |= events.intersects(any | EventSet::IN | EventSet::READ_HANG_UP);
        self.writable |= events.intersects(any | EventSet::OUT);
        if self.hung_up && self.state == State::Requested {
            self.happen(Event::Broken);
        }
        self.flush();
        if self.hung_up && (self.eof || self.state == State::Outbound) {
            self.happen(Event::Deaf);
        }
    }

    /// The guest is gone, or the driver that knew of the connection.
    pub fn abandon(&mut self) {
        self.flush();
        self.happen(Event::Rst);
    }

    /// The guest's place for this connection is needed: it is reset.
    pub fn evict(&mut self) {
        self.happen(Event::Nonsense);
    }

    /// An event of its own, with all that follows from it.
    fn happen(&mut self, event: Event) {
        let (to, actions) = next(self.state, event);
        self.enter(to, actions);
        self.settle();
    }

    fn enter(&mut self, to: State, actions: Actions) {
        self.state = to;
        if actions.has(Actions::ANSWER) {
            // An empty socket takes so little, and a broken one is heard of when it is read.
            let _ = self.stream.write(answer(self.key.host_port).as_bytes());
        }
        if actions.has(Actions::STOP_READING) {
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if actions.has(Actions::DISCARD) {
            self.discard();
        }
        self.finishing |= actions.has(Actions::FINISH);
        for (action, flag) in [
            (Actions::TELL_SEND, SHUTDOWN_SEND),
            (Actions::TELL_RECEIVE, SHUTDOWN_RECEIVE),
        ] {
            if actions.has(action) && self.host_shut & flag == 0 {
                self.host_shut |= flag;
                self.owed.shutdown = true;
            }
        }
        if actions.has(Actions::RESET) {
            // One that the guest was never asked for is none that it knows.
            self.reset = !self.owed.request;
        }
        if to == State::Over {
            self.owed = Owed::default();
        }
    }

    /// What follows from nothing being kept any more.
    fn settle(&mut self) {
        if !self.kept.is_empty() {
            return;
        }
        if self.finishing && !self.finished {
            self.finished = true;
            // A socket that is closed at its other end has heard of it.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        let (to, actions) = next(self.state, Event::Drained);
        self.enter(to, actions);
    }

    fn discard(&mut self) {
        // Up to a window: it has 32 bits.
        self.host_credit.forward(self.kept.len() as u32);
        self.kept = VecDeque::new();
    }

    /// What of a packet's data the socket takes goes there from guest memory, and the rest is kept.
    fn deliver<M: GuestMemory>(
        &mut self,
        memory: &M,
        len: u32,
        chain: &Chain,
        reader: &mut Reader<'_, M>,
    ) -> Result<(), Fault> {
        let mut taken = 0;
        if self.kept.is_empty() && self.writable {
            let (stream, range) = (&mut self.stream, (reader.position(), len));
            let (moved, stopped) = transfer(&chain.readable, memory, range, true, |slice| {
                stream.write_volatile(slice)
            })?;
            taken = moved;
            self.host_credit.forward(taken);
            reader.skip(taken);
            if let Some(error) = stopped {
                self.write_failed(&error);
            }
        }
        if !next(self.state, Event::Data).1.has(Actions::DELIVER) {
            // It has gone deaf by this.
            self.host_credit.forward(len - taken);
            return Ok(());
        }
        let mut left = (len - taken) as usize;
        if left > 0 && self.kept.capacity() == 0 {
            // All that it can become, at once: it does not grow beyond by halves. The system gives what is used.
            self.kept.reserve_exact(WINDOW as usize);
        }
        let mut piece = [0; 4096];
        while left > 0 {
            let part = &mut piece[..left.min(4096)];
            if !reader.read_exact(part)? {
                // It was counted above.
                break;
            }
            self.kept.extend(&*part);
            left -= part.len();
        }
        // The socket may have made room since, which is an edge that nobody waits for yet.
        self.flush();
        Ok(())
    }

    /// Writes what is kept, as far as the socket takes it.
    pub fn flush(&mut self) {
        while self.writable && !self.kept.is_empty() {
            let (first, _) = self.kept.as_slices();
            match self.stream.write(first) {
                // Nothing written of something: not this way.
                Ok(0) => self.writable = false,
                Ok(len) => {
                    self.kept.drain(..len);
                    self.host_credit.forward(len as u32);
                }
                Err(error) => self.write_failed(&error),
            }
        }
        if self.kept.is_empty() {
            // Most connections keep nothing most of the time.
            self.kept = VecDeque::new();
            self.settle();
        }
        self.owed.credit |= self.state != State::Over && self.host_credit.is_news();
    }

    fn write_failed(&mut self, error: &io::Error) {
        match error.kind() {
            ErrorKind::WouldBlock => self.writable = false,
            ErrorKind::Interrupted => {}
            kind => {
                // Closed with data unread: to its writer that is an error, and once only.
                self.failed |= kind != ErrorKind::BrokenPipe;
                self.writable = false;
                if self.state == State::Over {
                    self.discard();
                } else {
                    self.happen(Event::Deaf);
                }
            }
        }
    }

    /// Writes the next packet for the guest into a chain, which has room for a header and a byte; the bytes written,
    /// or none if there is no packet.
    ///
    /// # Errors
    /// [`Fault::Buffer`].
    pub fn fill<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: &Chain,
    ) -> Result<Option<u32>, Fault> {
        loop {
            let (op, len) = if std::mem::take(&mut self.owed.request) {
                (Op::Request, 0)
            } else if std::mem::take(&mut self.owed.response) {
                (Op::Response, 0)
            } else if std::mem::take(&mut self.owed.shutdown) {
                (Op::Shutdown, 0)
            } else if self.can_read() && self.guest_credit.room() > 0 {
                match self.receive(memory, chain)? {
                    Some(len) => (Op::Rw, len),
                    // The socket has nothing: something else may be to be told.
                    None => continue,
                }
            } else if self.can_read() && !self.asked {
                self.asked = true;
                (Op::CreditRequest, 0)
            } else if self.owed.credit {
                (Op::CreditUpdate, 0)
            } else {
                return Ok(None);
            };
            // Each packet has it.
            self.owed.credit = false;
            let (buf_alloc, fwd_cnt) = self.host_credit.tell();
            let header = Header {
                len,
                flags: if op == Op::Shutdown {
                    self.host_shut
                } else {
                    0
                },
                buf_alloc,
                fwd_cnt,
                ..self.key.header(op)
            };
            chain.writer(memory).write_all(&header.bytes())?;
            return Ok(Some(HEADER_LEN as u32 + len));
        }
    }

    /// Reads from the socket into a chain, behind the header: the bytes read, or none, and then what the socket said
    /// has happened.
    fn receive<M: GuestMemory>(&mut self, memory: &M, chain: &Chain) -> Result<Option<u32>, Fault> {
        let most = self.guest_credit.room().min(MAX_DATA);
        let (stream, range) = (&mut self.stream, (HEADER_LEN as u32, most));
        let mut end = false;
        let (len, stopped) = transfer(&chain.writable, memory, range, false, |slice| {
            let read = stream.read_volatile(slice);
            end |= matches!(read, Ok(0));
            read
        })?;
        self.guest_credit.sent(len);
        if len > 0 {
            // What stopped it, it says again; only of an error it says no more, and then its end.
            let kinds = [ErrorKind::WouldBlock, ErrorKind::Interrupted];
            self.failed |= stopped.is_some_and(|error| !kinds.contains(&error.kind()));
            return Ok(Some(len));
        }
        match stopped {
            _ if end => self.read_all(),
            Some(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Some(error) if error.kind() == ErrorKind::Interrupted => {}
            Some(_) => {
                self.failed = true;
                self.read_all();
            }
            // Nothing was asked of it: a chain with no room, which is not given.
            None => self.readable = false,
        }
        Ok(None)
    }

    fn read_all(&mut self) {
        self.eof = true;
        self.happen(match self.failed {
            true => Event::Broken,
            false => Event::Eof,
        });
        if self.hung_up {
            self.happen(Event::Deaf);
        }
    }
}

/// Moves bytes between a socket and the part of `buffers` behind `skip`, up to `len`, slice by slice; how many, and the
/// error that stopped it if one did. It stops as well where the socket moves less than a slice.
fn transfer<'m, M: GuestMemory>(
    buffers: &Buffers,
    memory: &'m M,
    (skip, len): (u32, u32),
    from_guest: bool,
    mut one: impl FnMut(&mut VolatileSlice<'m, BS<'m, M::Bitmap>>) -> Result<usize, VolatileMemoryError>,
) -> Result<(u32, Option<io::Error>), Fault> {
    let access = if from_guest {
        Permissions::Read
    } else {
        Permissions::Write
    };
    let mut moved = 0;
    let mut state = ControlFlow::Continue(());
    buffers.slices(memory, (skip, len), access, |mut slice| {
        if state.is_break() || slice.is_empty() {
            return;
        }
        match one(&mut slice) {
            Ok(part) => {
                // A slice is a part of a buffer, whose length has 32 bits.
                moved += part as u32;
                if part < slice.len() {
                    state = ControlFlow::Break(None);
                }
            }
            Err(VolatileMemoryError::IOError(error)) => state = ControlFlow::Break(Some(error)),
            // The slice is as long as it says.
            Err(error) => state = ControlFlow::Break(Some(io::Error::other(error))),
        }
    })?;
    Ok((moved, state.break_value().flatten()))
}
