// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket's thread: connections, and what each has sent and is still to get. Waits with event-manager, and
//! never for a client or for an action that takes its time ([`worker`](super::worker)).

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::http::{CONTINUE, Decoder, Incoming};
use super::monitor::Monitor;
use super::router::{Action, Outcome, respond, route};
use super::worker::{Busy, Thread, Ticket, Worker};
use crate::unix_socket::{BindError, Listener};

/// So many connections at once. One more takes the place of the one that has been silent for longest, of those that wait for
/// no answer.
pub const MAX_CONNECTIONS: usize = 10;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 32;
/// What is read at a time, so that each client gets its turn.
const CHUNK: usize = 4096;
/// How much of what is still sent behind a refusal is read and forgotten, bytes. A connection that is closed while something
/// is unread is reset, and its client may never see the answer.
const DRAINED: usize = 16 << 20;
/// How long that goes on at most.
const DRAIN: Duration = Duration::from_secs(2);
/// So many chunks of it are read at a time.
const DRAIN_CHUNKS: usize = 16;
/// How long no connection is accepted where the host has no descriptor for one.
const DEAF_MS: i32 = 500;

const STOP: u32 = 0;
const ACCEPT: u32 = 1;
const DONE: u32 = 2;
const FIRST: u32 = 3;

/// The control socket cannot be listened at.
#[derive(Debug, thiserror::Error)]
#[error("--api-sock {}: {source}", path.display())]
pub struct ListenError {
    /// Where.
    pub path: PathBuf,
    /// Why.
    pub source: BindError,
}

impl ListenError {
    /// Whether another path would do.
    pub fn is_users_fault(&self) -> bool {
        self.source.is_users_fault()
    }
}

/// A control socket that listens. Dropped, its file is removed.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    stop: Arc<Stop>,
}

#[derive(Debug)]
struct Stop {
    told: AtomicBool,
    event: EventFd,
}

impl Server {
    /// Listens at `path`: its user's alone, in the place of a socket that nobody listens at any more. Clients may connect
    /// from now on, and are answered by [`serve`](Self::serve).
    ///
    /// # Errors
    /// [`ListenError`]; nothing was made.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |source| ListenError {
            path: path.to_owned(),
            source,
        };
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(|error| failed(BindError::Refused(error)))?;
        let told = AtomicBool::new(false);
        Ok(Server {
            listener: Listener::bind(path, BACKLOG).map_err(failed)?,
            stop: Arc::new(Stop { told, event }),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// Removes the socket, if it is this one's still: for a process that exits. Who has connected is not heard of it.
    pub fn unlink(&self) {
        self.listener.unlink();
    }

    /// Serves clients on this thread until it is told to [`stop`](Self::stop), and does what is
    /// [long](super::router::Action::is_long) on others, `api-work`, `api-background` and `api-migration`. Comes back when what is at work
    /// there is done.
    ///
    /// # Errors
    /// epoll cannot be set up, or fails; there is no other thread.
    pub fn serve(&self, monitor: &dyn Monitor) -> io::Result<()> {
        /// Also where something unwinds: the scope below waits for the thread.
        struct CloseAtEnd<'a>(&'a Worker);
        impl Drop for CloseAtEnd<'_> {
            fn drop(&mut self) {
                self.0.close();
            }
        }
        let worker = Worker::new()?;
        std::thread::scope(|scope| {
            let _close = CloseAtEnd(&worker);
            for thread in Thread::ALL {
                let builder = std::thread::Builder::new().name(thread.name().into());
                let worker = &worker;
                builder.spawn_scoped(scope, move || worker.work(monitor, thread))?;
            }
            self.serve_clients(monitor, &worker)
        })
    }

    fn serve_clients(&self, monitor: &dyn Monitor, worker: &Worker) -> io::Result<()> {
        let failed = |error: event_manager::Error| io::Error::other(error.to_string());
        let mut manager = EventManager::new_with_capacity(16).map_err(failed)?;
        let id = manager.add_subscriber(Clients {
            server: self,
            monitor,
            worker,
            connections: std::array::from_fn(|_| None),
            turns: 0,
            listening: false,
            failed: None,
        });
        // Relaxed: the eventfd wakes after it was set.
        while !self.stop.told.load(Ordering::Relaxed) {
            let clients = manager.subscriber_mut(id).map_err(failed)?;
            if let Some(error) = clients.failed.take() {
                return Err(io::Error::other(error));
            }
            let patience = clients.end_drains(Instant::now());
            if clients.listening {
                match patience {
                    None => manager.run().map_err(failed)?,
                    Some(patience) => {
                        let millis = patience.as_millis().min(DRAIN.as_millis()) as i32;
                        manager.run_with_timeout(millis + 1).map_err(failed)?
                    }
                };
            } else {
                manager.run_with_timeout(DEAF_MS).map_err(failed)?;
                let mut ops = manager.event_ops(id).map_err(failed)?;
                let accept = Events::with_data(&self.listener, ACCEPT, EventSet::IN);
                ops.add(accept).map_err(failed)?;
                manager.subscriber_mut(id).map_err(failed)?.listening = true;
            }
        }
        // Before the connections: who sees the end of one has seen the last action begin.
        worker.close();
        let clients = manager.subscriber_mut(id).map_err(failed)?;
        clients.close_all_but(worker.begun());
        // What was done is answered: a guest that is resumed may end before its client hears of that.
        worker.settle();
        clients.last_answers();
        Ok(())
    }

    /// Has [`serve`](Self::serve) come back, now or when it begins. Does not block.
    pub fn stop(&self) {
        self.stop.told.store(true, Ordering::Relaxed);
        // EAGAIN: it is readable as it is.
        let _ = self.stop.event.write(1);
    }
}

struct Clients<'a> {
    server: &'a Server,
    monitor: &'a dyn Monitor,
    worker: &'a Worker,
    connections: [Option<Connection>; MAX_CONNECTIONS],
    /// Counts what the connections do, to find the one that has done nothing for longest.
    turns: u64,
    /// The listener is waited for.
    listening: bool,
    failed: Option<String>,
}

struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    /// What the client has not taken yet.
    out: Vec<u8>,
    /// Bytes of `out` that it has.
    sent: usize,
    /// The client sends no more.
    read_all: bool,
    /// The connection ends when `out` is out.
    closing: bool,
    /// What it said last was no request: what else it sends is forgotten before the end.
    drain: Option<Drain>,
    /// Its last request wants to hear all.
    wants_all: bool,
    /// The action that it waits for. It is read from no more until that is done.
    awaits: Option<Ticket>,
    /// What is waited for.
    interest: EventSet,
    /// When it was accepted, or made its last request.
    turn: u64,
}

/// What is still read of a connection whose answer is the last.
struct Drain {
    until: Instant,
    /// Bytes.
    left: usize,
    /// The client has heard that nothing more is said.
    told: bool,
}

impl Connection {
    /// Everything that can be done without waiting; false when the connection is at its end.
    fn turn(&mut self, monitor: &dyn Monitor, worker: &Worker, now: u64) -> io::Result<bool> {
        self.send()?;
        if self.out.is_empty() && !self.read_all && !self.closing {
            self.read()?;
        }
        // A client that does not take its answers gets no more of them.
        while self.out.is_empty() && !self.closing && self.awaits.is_none() {
            match self.decoder.next() {
                None => break,
                Some(Incoming::Continue) => self.out.extend_from_slice(CONTINUE),
                Some(Incoming::Refused(response)) => {
                    self.closing = true;
                    self.drain = Some(Drain {
                        until: Instant::now() + DRAIN,
                        left: DRAINED,
                        told: false,
                    });
                    response.encode(false, &mut self.out);
                }
                Some(Incoming::Request(request)) => {
                    self.turn = now;
                    self.closing = !request.keep_alive;
                    self.wants_all = request.wants_all;
                    let action = route(&request);
                    log::debug!(
                        "api: {} {:?}: {action:?}",
                        request.method.escape_debug(),
                        request.path
                    );
                    let resumes = matches!(action, Ok(Action::Resume));
                    let response = match action {
                        Ok(action) if action.is_long() => match worker.ask(action) {
                            Ok(ticket) => {
                                self.awaits = Some(ticket);
                                break;
                            }
                            // Nothing is to be done, and nobody stands in its way.
                            Err(Busy::Migration) if resumes && monitor.runs() => {
                                respond(Outcome::Done, self.wants_all)
                            }
                            Err(busy) => {
                                respond(Outcome::Refused(monitor.busy(busy)), self.wants_all)
                            }
                        },
                        Ok(action) => respond(monitor.perform(action), self.wants_all),
                        Err(response) => response,
                    };
                    response.encode(request.keep_alive, &mut self.out);
                }
            }
            self.send()?;
        }
        self.interest = match (self.awaits, self.out.is_empty()) {
            // Only that the client is gone, which is told in any case.
            (Some(_), _) => EventSet::empty(),
            (None, true) => EventSet::IN,
            (None, false) => EventSet::OUT,
        };
        if self.closing && self.out.is_empty() && !self.read_all && self.drain.is_some() {
            return self.drain();
        }
        let at_end = self.closing || self.read_all;
        Ok(self.awaits.is_some() || !self.out.is_empty() || !at_end)
    }

    /// Says that nothing more comes, and forgets what does; false when that is over.
    fn drain(&mut self) -> io::Result<bool> {
        let Some(drain) = &mut self.drain else {
            return Ok(false);
        };
        if !drain.told {
            self.stream.shutdown(Shutdown::Write)?;
            drain.told = true;
        }
        let mut chunk = [0; CHUNK];
        for _ in 0..DRAIN_CHUNKS {
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(false),
                Ok(len) => drain.left = drain.left.saturating_sub(len),
                Err(error) if is_soon(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(drain.left > 0)
    }

    /// What it waited for is done.
    fn answer(&mut self, outcome: Outcome) {
        self.awaits = None;
        respond(outcome, self.wants_all).encode(!self.closing, &mut self.out);
    }

    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.read_all = true,
            Ok(len) => self.decoder.feed(chunk.get(..len).unwrap_or_default()),
            Err(error) if is_soon(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(len) => self.sent += len,
                Err(error) if is_soon(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(())
    }
}

fn is_soon(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, WouldBlock};
    matches!(error.kind(), Interrupted | WouldBlock)
}

fn events(fd: RawFd, place: usize, interest: EventSet) -> Events {
    Events::with_data_raw(fd, FIRST + place as u32, interest)
}

impl Clients<'_> {
    /// Accepts who has connected.
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        // Then the others have their turn.
        for _ in 0..MAX_CONNECTIONS {
            match self.server.listener.accept() {
                Ok(stream) => self.take(stream, ops),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    log::debug!("api: cannot accept a connection: {error}");
                    // A descriptor for the newcomer.
                    if !self.close_quietest(ops) {
                        let listener = &self.server.listener;
                        let accept = Events::with_data(listener, ACCEPT, EventSet::IN);
                        self.listening = ops.remove(accept).is_err();
                    }
                    return;
                }
            }
        }
    }

    fn take(&mut self, stream: UnixStream, ops: &mut EventOps<'_>) {
        if self.connections.iter().all(Option::is_some) {
            self.close_quietest(ops);
        }
        let free = self.connections.iter_mut().enumerate();
        let Some((place, free)) = free.into_iter().find(|(_, place)| place.is_none()) else {
            return;
        };
        self.turns += 1;
        // Refused, the connection is closed.
        match ops.add(events(stream.as_raw_fd(), place, EventSet::IN)) {
            Err(error) => log::debug!("api: cannot wait for a connection: {error}"),
            Ok(()) => {
                *free = Some(Connection {
                    stream,
                    decoder: Decoder::default(),
                    out: Vec::new(),
                    sent: 0,
                    read_all: false,
                    closing: false,
                    drain: None,
                    wants_all: false,
                    awaits: None,
                    interest: EventSet::IN,
                    turn: self.turns,
                });
            }
        }
    }

    /// Closes the connection that has asked for nothing for longest, and waits for nothing; false if there is none.
    fn close_quietest(&mut self, ops: &mut EventOps<'_>) -> bool {
        let all = self.connections.iter().enumerate();
        let all = all.filter_map(|(place, of)| Some((of.as_ref()?, place)));
        let all = all.filter(|(of, _)| of.awaits.is_none());
        let all = all.map(|(of, place)| (of.turn, place));
        match all.min() {
            Some((_, place)) => {
                self.close(place, ops);
                true
            }
            None => false,
        }
    }

    fn close(&mut self, place: usize, ops: &mut EventOps<'_>) {
        if let Some(of) = self.connections.get_mut(place).and_then(Option::take) {
            if let Some(ticket) = of.awaits {
                self.worker.withdraw(ticket);
            }
            let _ = ops.remove(events(of.stream.as_raw_fd(), place, of.interest));
        }
    }

    /// Ends the connections whose refusal has been there for long enough; how long the next of them has yet.
    fn end_drains(&mut self, now: Instant) -> Option<Duration> {
        let mut next = None;
        for of in self.connections.iter_mut().flatten() {
            let Some(drain) = of.drain.as_mut().filter(|drain| drain.left > 0) else {
                continue;
            };
            match drain.until.checked_duration_since(now) {
                Some(left) if !left.is_zero() => {
                    next = Some(next.map_or(left, |next: Duration| next.min(left)));
                }
                _ => {
                    drain.left = 0;
                    // Readable by that, it has its last turn. What is not connected is at its end as it is.
                    let _ = of.stream.shutdown(Shutdown::Both);
                }
            }
        }
        next
    }

    fn turn(&mut self, place: usize, ops: &mut EventOps<'_>) {
        self.turns += 1;
        let Some(Some(of)) = self.connections.get_mut(place) else {
            return;
        };
        let before = of.interest;
        match of.turn(self.monitor, self.worker, self.turns) {
            Ok(true) if of.interest == before => {}
            Ok(true) => {
                let interest = events(of.stream.as_raw_fd(), place, of.interest);
                if let Err(error) = ops.modify(interest) {
                    log::debug!("api: cannot wait for a connection: {error}");
                    self.close(place, ops);
                }
            }
            Ok(false) => self.close(place, ops),
            // A client that is gone.
            Err(error) => {
                log::debug!("api: a connection breaks off: {error}");
                self.close(place, ops);
            }
        }
    }

    /// Gives those that waited their answers, and what they have asked for meanwhile its turn.
    fn answer_all(&mut self, ops: &mut EventOps<'_>) {
        for (ticket, outcome) in self.worker.take() {
            if let Some((place, of)) = self.asked(ticket, &outcome) {
                of.answer(outcome);
                self.turn(place, ops);
            }
            self.monitor.answered();
        }
    }

    /// Closes the connections but those that wait for what is done, or for this. Who waits for what is never begun hears why.
    fn close_all_but(&mut self, begun: [Option<Ticket>; 3]) {
        self.last_answers();
        for place in &mut self.connections {
            match place {
                Some(of) if of.awaits.is_some() && begun.contains(&of.awaits) => continue,
                Some(of) if of.awaits.is_some() => {
                    of.closing = true;
                    of.answer(Outcome::Refused(self.monitor.ends()));
                    // A client that is gone misses nothing.
                    let _ = of.send();
                }
                _ => {}
            }
            *place = None;
        }
    }

    /// The same at the end, when nobody has a turn any more.
    fn last_answers(&mut self) {
        for (ticket, outcome) in self.worker.take() {
            if let Some((_, of)) = self.asked(ticket, &outcome) {
                of.answer(outcome);
                // A client that is gone misses nothing.
                let _ = of.send();
            }
            self.monitor.answered();
        }
    }

    /// Who waits for this.
    fn asked(&mut self, ticket: Ticket, outcome: &Outcome) -> Option<(usize, &mut Connection)> {
        let mut all = self.connections.iter_mut().enumerate();
        let asked = all.find_map(|(place, of)| {
            let of = of.as_mut()?;
            (of.awaits == Some(ticket)).then_some((place, of))
        });
        if asked.is_none() {
            log::debug!("api: nobody waits for this any more: {outcome:?}");
        }
        asked
    }
}

impl MutEventSubscriber for Clients<'_> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let stop = Events::with_data(&self.server.stop.event, STOP, EventSet::IN);
        let done = Events::with_data(self.worker.done(), DONE, EventSet::IN);
        let accept = Events::with_data(&self.server.listener, ACCEPT, EventSet::IN);
        let added = [stop, done, accept].map(|events| ops.add(events));
        match added.into_iter().collect::<Result<Vec<_>, _>>() {
            Ok(_) => self.listening = true,
            Err(error) => self.failed = Some(error.to_string()),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            // The loop looks.
            STOP => {}
            _ if self.server.stop.told.load(Ordering::Relaxed) => {}
            ACCEPT => self.accept(ops),
            DONE => self.answer_all(ops),
            place => {
                let place = (place - FIRST) as usize;
                match self.connections.get(place) {
                    // Its client is gone: nothing else was waited for.
                    Some(Some(of)) if of.awaits.is_some() => self.close(place, ops),
                    _ => self.turn(place, ops),
                }
            }
        }
    }
}
