// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A port: moves bytes between two queues and the host's side, and loses none of them.
//!
//! A chain that the host has no room for stays in its queue; how much of it is out already is all that is remembered.
//! Input is read when the guest has given a buffer for it, so what the guest does not take stays with who sent it.

use std::io::{self, ErrorKind};
use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::super::device::{Cx, Memory};
use super::super::fault::Fault;
use super::super::queue::DeviceQueue;
use super::control::Dialogue;
use super::host::Host;

/// The most that is moved at once, bytes.
pub(super) const PIECE: usize = 64 << 10;
/// The most that a port writes before others have their turn, bytes. A chain may have 4 GiB.
const TURN: usize = 1 << 20;

/// What of a port is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Source = 0,
    Sink = 1,
    Listener = 2,
}

impl Wait {
    /// So many there are.
    pub(super) const COUNT: u64 = 3;

    pub(super) fn from_number(number: u64) -> Option<Self> {
        [Wait::Source, Wait::Sink, Wait::Listener]
            .into_iter()
            .find(|wait| *wait as u64 == number)
    }
}

/// Waits for a descriptor, for one event a time: `HANG_UP` would come again and again.
#[derive(Debug, Default)]
struct Watch {
    fd: Option<RawFd>,
    armed: Option<EventSet>,
}

impl Watch {
    fn arm(&mut self, epoll: &Epoll, fd: RawFd, data: u64, interest: EventSet) -> io::Result<()> {
        if self.armed == Some(interest) {
            return Ok(());
        }
        let operation = match self.fd {
            Some(_) => ControlOperation::Modify,
            None => ControlOperation::Add,
        };
        let event = EpollEvent::new(interest | EventSet::ONE_SHOT, data);
        epoll.ctl(operation, fd, event)?;
        (self.fd, self.armed) = (Some(fd), Some(interest));
        Ok(())
    }

    /// Before the descriptor is closed: one that has duplicates would be waited for on.
    fn forget(&mut self, epoll: &Epoll) {
        if let Some(fd) = self.fd.take() {
            // It was added, so it is there.
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
        self.armed = None;
    }
}

/// What a port's data path needs to know after a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// So many bytes of the first chain that is available are out.
    pub(super) sent: u32,
    /// Input that was taken from the host and not given to the guest.
    pub(super) input: Vec<u8>,
}

/// What a port works with.
pub(super) struct Desk<'a> {
    pub(super) epoll: &'a Epoll,
    pub(super) dialogue: &'a mut Dialogue,
    /// [`PIECE`] bytes.
    pub(super) scratch: &'a mut [u8],
}

#[derive(Debug)]
pub(super) struct Port {
    number: usize,
    /// For messages.
    label: String,
    host: Host,
    /// The guest's closing of the port ends the host's connection.
    hangs_up: bool,
    /// [`Progress::sent`].
    sent: u32,
    /// The sink has no room.
    blocked: bool,
    /// The source has nothing.
    waiting: bool,
    /// The source has come to its end.
    ended: bool,
    /// Who was connected is gone. What it sent before may still be there.
    hung_up: bool,
    /// The sink takes no more.
    broken: bool,
    /// The guest has closed the port.
    closing: bool,
    /// Bytes have gone through the connection, either way.
    used: bool,
    /// A connection has ended: what the guest had made available by then was for it, and is dropped.
    dropping: bool,
    /// Connections cannot be accepted now. They are when the guest does something with the port, or another ends.
    refusing: bool,
    /// Failures were told.
    told: bool,
    watches: [Watch; Wait::COUNT as usize],
}

impl Port {
    pub(super) fn new(number: usize, label: String, host: Host, hangs_up: bool) -> Self {
        Port {
            number,
            label,
            host,
            hangs_up,
            sent: 0,
            blocked: false,
            waiting: false,
            ended: false,
            hung_up: false,
            broken: false,
            closing: false,
            used: false,
            dropping: false,
            refusing: false,
            told: false,
            watches: Default::default(),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.host.is_open()
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            sent: self.sent,
            input: self.host.pending(),
        }
    }

    /// Goes on from there; `was_open`: with somebody at the host's side.
    pub(super) fn restore(&mut self, progress: &Progress, was_open: bool) {
        self.sent = progress.sent;
        self.dropping = was_open && matches!(self.host, Host::Served { .. });
        if let Some(source) = self.host.source() {
            source.restore(&progress.input);
        }
    }

    /// The driver has reset the device; `was_open`: with the port open.
    ///
    /// A close that waited for room goes through without it: the chains that were not out are the driver's again, and who is
    /// connected still reads what was.
    pub(super) fn reset(&mut self, desk: &mut Desk<'_>, was_open: bool) {
        self.sent = 0;
        if (was_open || self.closing) && self.hangs_up && self.used {
            self.disconnect(desk);
        }
        self.closing = false;
        // The next driver's bytes are for the next connection.
        self.dropping = false;
    }

    /// The guest has opened or closed the port.
    pub(super) fn guest_open(&mut self, open: bool) {
        // One that nothing has gone through may be for the program that opens it next.
        self.closing = !open && self.hangs_up && self.used;
    }

    /// Something that was waited for has come.
    pub(super) fn woken(&mut self, wait: Wait, events: EventSet) {
        self.watches[wait as usize].armed = None;
        match wait {
            Wait::Source => {
                self.waiting = false;
                let gone = EventSet::HANG_UP | EventSet::ERROR;
                self.hung_up |= events.intersects(gone) && matches!(self.host, Host::Served { .. });
            }
            Wait::Sink => self.blocked = false,
            Wait::Listener => {}
        }
    }

    /// Writes what the driver has written to the configuration space, as far as there is room.
    pub(super) fn write_emergency(&mut self, emergency: &Mutex<Vec<u8>>) {
        let mut bytes = emergency.lock().unwrap_or_else(PoisonError::into_inner);
        while !bytes.is_empty() && !self.blocked {
            match self.write(&bytes) {
                Some(written) => drop(bytes.drain(..written)),
                None => return,
            }
        }
    }

    /// Does all that can be done now. `emergency` comes before everything else.
    ///
    /// # Errors
    /// [`Fault`].
    pub(super) fn serve(
        &mut self,
        cx: &mut Cx<'_>,
        desk: &mut Desk<'_>,
        emergency: Option<&Mutex<Vec<u8>>>,
    ) -> Result<(), Fault> {
        let (receive, transmit) = queues(self.number);
        let memory = cx.memory;
        self.accept_next(cx, desk)?;
        if let Some(emergency) = emergency {
            self.write_emergency(emergency);
        }
        let mut drained = true;
        if let Some(queue) = cx.queues.get_mut(transmit) {
            drained = self.transmit(queue, memory, desk.scratch)?;
        }
        let guest_open = desk.dialogue.is_guest_open(self.number);
        if guest_open && let Some(queue) = cx.queues.get_mut(receive) {
            self.receive(queue, memory, desk.scratch)?;
        }
        if self.hung_up && !self.has_unread() || self.closing && drained {
            self.disconnect(desk);
            self.accept_next(cx, desk)?;
        }
        self.arm(desk.epoll).map_err(|source| Fault::Host {
            what: "wait for a port's host side",
            source,
        })
    }

    /// Whether who was connected has left bytes for the guest.
    fn has_unread(&mut self) -> bool {
        let source = self.host.source();
        !self.ended && source.is_some_and(|source| source.has_bytes())
    }

    /// Takes the guest's bytes to the host. Whether all of them are there.
    fn transmit(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &Memory,
        scratch: &mut [u8],
    ) -> Result<bool, Fault> {
        let memory = &**memory;
        let mut left = TURN;
        while !self.blocked
            && let Some(chain) = queue.pop(memory)?
        {
            loop {
                let mut reader = chain.reader(memory);
                reader.skip(self.sent);
                if reader.left() == 0 || !self.takes_output() {
                    break;
                }
                let read = reader.read(scratch)?;
                let written = scratch.get(..read).and_then(|bytes| self.write(bytes));
                let Some(written) = written else {
                    queue.push_back(chain);
                    return Ok(false);
                };
                // At most what the chain has.
                self.sent = self.sent.saturating_add(written as u32);
                left = left.saturating_sub(written);
                if left == 0 && self.sent < chain.readable.len() {
                    queue.push_back(chain);
                    queue.notify_self().map_err(|source| Fault::Host {
                        what: "write an eventfd",
                        source,
                    })?;
                    return Ok(false);
                }
            }
            self.sent = 0;
            queue.add_used(memory, chain, 0)?;
        }
        Ok(!self.blocked && !queue.is_unfinished())
    }

    /// Whether there is somebody to whom the guest's bytes go. Else they are dropped.
    fn takes_output(&mut self) -> bool {
        !self.broken && !self.dropping && self.host.sink().is_some()
    }

    /// Writes some of these; none where there is no room. What cannot be written counts as written.
    fn write(&mut self, bytes: &[u8]) -> Option<usize> {
        if self.broken {
            return Some(bytes.len());
        }
        let Some(sink) = self.host.sink() else {
            return Some(bytes.len());
        };
        let error = loop {
            match sink.write(bytes) {
                Ok(0) if !bytes.is_empty() => break ErrorKind::WriteZero.into(),
                Ok(written) => {
                    self.used = true;
                    return Some(written.min(bytes.len()));
                }
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => {
                        self.blocked = true;
                        return None;
                    }
                    _ => break error,
                },
            }
        };
        match self.host {
            // What it had sent before is still read.
            Host::Served { .. } => (self.broken, self.hung_up) = (true, true),
            Host::Fixed { .. } => {
                if !std::mem::replace(&mut self.told, true) {
                    log::error!(
                        "{} takes no more output, which is lost: {error}",
                        self.label
                    );
                }
            }
        }
        Some(bytes.len())
    }

    /// Takes the host's bytes to the guest, as long as it has buffers for them.
    fn receive(
        &mut self,
        queue: &mut DeviceQueue,
        memory: &Memory,
        scratch: &mut [u8],
    ) -> Result<(), Fault> {
        let memory = &**memory;
        while !self.ended && !self.waiting {
            let Some(source) = self.host.source() else {
                return Ok(());
            };
            let Some(chain) = queue.pop(memory)? else {
                return Ok(());
            };
            let room = scratch.len().min(chain.writable.len() as usize);
            if room == 0 {
                queue.add_used(memory, chain, 0)?;
                continue;
            }
            let read = source.read(scratch.get_mut(..room).unwrap_or_default());
            let bytes = match &read {
                Ok(read @ 1..) => {
                    self.used = true;
                    scratch.get(..*read).unwrap_or_default()
                }
                _ => {
                    queue.push_back(chain);
                    self.no_input(read.err());
                    continue;
                }
            };
            let mut writer = chain.writer(memory);
            writer.write(bytes)?;
            let written = writer.position();
            queue.add_used(memory, chain, written)?;
        }
        Ok(())
    }

    /// The source gave nothing: it has nothing for now, or it has ended.
    fn no_input(&mut self, error: Option<io::Error>) {
        match error.map(|error| (error.kind(), error)) {
            Some((ErrorKind::Interrupted, _)) => {}
            Some((ErrorKind::WouldBlock, _)) => self.waiting = true,
            Some((_, error)) => {
                log::debug!("{} has no more input: {error}", self.label);
                (self.ended, self.hung_up) = (true, matches!(self.host, Host::Served { .. }));
            }
            // Of a connection one direction: what the guest writes is still read there.
            None => self.ended = true,
        }
    }

    /// Drops what was for a connection that has ended, and has in who waits to connect.
    fn accept_next(&mut self, cx: &mut Cx<'_>, desk: &mut Desk<'_>) -> Result<(), Fault> {
        let memory = cx.memory;
        if self.dropping
            && let Some(queue) = cx.queues.get_mut(queues(self.number).1)
        {
            self.transmit(queue, memory, desk.scratch)?;
            self.dropping = false;
        }
        self.accept(desk);
        Ok(())
    }

    /// Has in who waits to connect, if nobody is.
    fn accept(&mut self, desk: &mut Desk<'_>) {
        let Host::Served {
            listener,
            connection: connection @ None,
        } = &mut self.host
        else {
            return;
        };
        match listener.accept() {
            Ok(ends) => {
                *connection = Some(ends);
                self.refusing = false;
                desk.dialogue.set_host_open(self.number, true);
                log::debug!("{}: somebody has connected", self.label);
            }
            // Also of one that has gone again already: `arm` finds out whether there are others.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) =>
            {
                self.refusing = false;
            }
            Err(error) => {
                // No descriptors, no memory: it would be tried again at once, and again.
                self.refusing = true;
                if !std::mem::replace(&mut self.told, true) {
                    log::error!("{}: cannot accept a connection: {error}", self.label);
                }
            }
        }
    }

    /// Ends the connection, if there is one.
    fn disconnect(&mut self, desk: &mut Desk<'_>) {
        let Host::Served { connection, .. } = &mut self.host else {
            return;
        };
        self.watches[Wait::Source as usize].forget(desk.epoll);
        self.watches[Wait::Sink as usize].forget(desk.epoll);
        *connection = None;
        desk.dialogue.set_host_open(self.number, false);
        (self.blocked, self.broken) = (false, false);
        (self.waiting, self.ended) = (false, false);
        (self.hung_up, self.closing) = (false, false);
        (self.used, self.dropping) = (false, true);
        log::debug!("{}: the connection has ended", self.label);
    }

    /// Waits for what can make a difference.
    fn arm(&mut self, epoll: &Epoll) -> io::Result<()> {
        let Port {
            host,
            watches,
            number,
            refusing,
            ..
        } = self;
        let [source, sink, listener] = watches;
        let data = |wait| token(*number, wait);
        if let Host::Served {
            listener: accept,
            connection: None,
        } = host
            && !*refusing
        {
            listener.arm(epoll, accept.fd(), data(Wait::Listener), EventSet::IN)?;
        }
        let interest = match (self.waiting && !self.ended, self.hung_up) {
            (true, _) => Some(EventSet::IN),
            // There are bytes for which the guest has no buffers: it notifies.
            (false, true) => None,
            // That it hangs up.
            (false, false) => Some(EventSet::empty()),
        };
        if let (Some(of), Some(interest)) = (host.source(), interest) {
            source.arm(epoll, of.fd(), data(Wait::Source), interest)?;
        }
        match host.sink() {
            Some(of) if self.blocked => sink.arm(epoll, of.fd(), data(Wait::Sink), EventSet::OUT),
            _ => Ok(()),
        }
    }
}

/// The places of a port's receiving and transmitting queue (virtio 1.2, 5.3.2): between port 0's and port 1's are
/// those of the control messages.
pub(super) fn queues(port: usize) -> (usize, usize) {
    match port {
        0 => (0, 1),
        port => (2 * port + 2, 2 * port + 3),
    }
}

/// What an event of the port's has as its data.
pub(super) fn token(port: usize, wait: Wait) -> u64 {
    port as u64 * Wait::COUNT + wait as u64
}
