// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread of a [`Handler`]: waits with event-manager for its queues' notifications and its sources, until it is
//! told to rest.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Cx, Handler, Memory, Ram, Source, SourceChange};
use super::fault::{Complaints, Fault};
use super::interrupt::DriverLink;
use super::queue::DeviceQueue;
use crate::no_wait::is_ready;

/// A handler that has rested, with its queues.
#[derive(Debug)]
pub struct Rested<H> {
    /// The handler.
    pub handler: H,
    /// Its queues, in its assignment's order.
    pub queues: Vec<DeviceQueue>,
}

/// What a worker begins with.
pub struct Job<H> {
    /// The thread's name, for people: at most 15 bytes are shown.
    pub name: String,
    /// For messages.
    pub(super) complaints: Complaints,
    /// Who serves.
    pub handler: H,
    /// Its queues.
    pub queues: Vec<DeviceQueue>,
    /// Guest memory.
    pub ram: Ram,
    /// The driver.
    pub driver: DriverLink,
    /// Called on the thread as its last act, with the handler at rest.
    pub at_rest: Box<dyn FnOnce(Rested<H>) + Send>,
}

/// A handler's thread. Dropped, it is told to rest and not waited for.
#[derive(Debug)]
pub struct Worker {
    stop: Arc<Stop>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Stop {
    told: AtomicBool,
    event: EventFd,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Fault::Host`]: no descriptor, or no thread, with the handler, which has done nothing. `at_rest` is not
    /// called.
    pub fn start<H: Handler>(job: Job<H>) -> Result<Self, (Fault, Rested<H>)> {
        let give_back =
            |what,
             source,
             Job {
                 handler, queues, ..
             }: Job<H>| { (Fault::Host { what, source }, Rested { handler, queues }) };
        let event = match EventFd::new(EFD_NONBLOCK) {
            Ok(event) => event,
            Err(source) => return Err(give_back("make an eventfd", source, job)),
        };
        let told = AtomicBool::new(false);
        let stop = Arc::new(Stop { told, event });
        let of_thread = stop.clone();
        // std panics at a NUL in it.
        let name = job.name.replace('\0', " ");
        let builder = std::thread::Builder::new().name(name);
        // A thread that cannot be started drops its closure: the job is handed over beside it.
        let (hand_over, take) = channel();
        let spawned = builder.spawn(move || {
            if let Ok(job) = take.recv() {
                run(job, &of_thread);
            }
        });
        match spawned {
            Ok(thread) => {
                // It waits for this, so it takes it.
                let _ = hand_over.send(job);
                Ok(Worker { stop, thread })
            }
            Err(source) => Err(give_back("start a device's thread", source, job)),
        }
    }

    /// Has the handler come to rest, and does not wait for it.
    pub fn rest(&self) {
        // Relaxed: the eventfd orders.
        self.stop.told.store(true, Ordering::Relaxed);
        // EAGAIN: it is full, so it wakes as it is.
        let _ = self.stop.event.write(1);
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the thread's end, if this is not the thread itself.
    pub fn join_elsewhere(self) {
        self.rest();
        if self.thread.thread().id() != std::thread::current().id() && self.thread.join().is_err() {
            log::error!("a device's thread panicked");
        }
    }
}

const STOP: u32 = 0;
/// Events of queues, then of sources.
const FIRST_QUEUE: u32 = 1;

struct Subscriber<H> {
    complaints: Complaints,
    stop: Arc<Stop>,
    handler: H,
    queues: Vec<DeviceQueue>,
    ram: Ram,
    driver: DriverLink,
    /// Tokens and descriptors of the sources, each at its place; none where one was forgotten.
    sources: Vec<Option<(u32, RawFd)>>,
    /// What the current call has asked for.
    changes: Vec<SourceChange>,
    /// No more is served.
    failed: bool,
}

fn run<H: Handler>(job: Job<H>, stop: &Arc<Stop>) {
    let Job {
        complaints,
        handler,
        queues,
        ram,
        driver,
        at_rest,
        ..
    } = job;
    let mut subscriber = Subscriber {
        complaints,
        stop: stop.clone(),
        handler,
        queues,
        ram,
        driver,
        sources: Vec::new(),
        changes: Vec::new(),
        failed: false,
    };
    let mut subscriber = match EventManager::new_with_capacity(16) {
        Ok(mut manager) => {
            let id = manager.add_subscriber(subscriber);
            // Failed so early that the loop may not hear of the end.
            if manager.subscriber_mut(id).is_ok_and(|of| of.failed) {
                wait_for(&stop.event);
            }
            // Relaxed: the eventfd wakes after it was set.
            while !stop.told.load(Ordering::Relaxed) {
                if let Err(error) = manager.run() {
                    let error = io::Error::other(error.to_string());
                    fail_in(&mut manager, id, error);
                    wait_for(&stop.event);
                }
            }
            match manager.remove_subscriber(id) {
                Ok(subscriber) => subscriber,
                // It was added above and never removed.
                Err(_) => return,
            }
        }
        Err(error) => {
            let source = io::Error::other(error.to_string());
            let what = "make an epoll descriptor";
            subscriber.fail(&Fault::Host { what, source });
            wait_for(&stop.event);
            subscriber
        }
    };
    subscriber.rest();
    let Subscriber {
        handler, queues, ..
    } = subscriber;
    at_rest(Rested { handler, queues });
}

fn fail_in<H: Handler>(
    manager: &mut EventManager<Subscriber<H>>,
    id: event_manager::SubscriberId,
    source: io::Error,
) {
    if let Ok(subscriber) = manager.subscriber_mut(id) {
        let what = "wait for events";
        subscriber.fail(&Fault::Host { what, source });
    }
}

/// Waits until the eventfd is written.
fn wait_for(event: &EventFd) {
    let interrupted = |error: &io::Error| error.kind() == io::ErrorKind::Interrupted;
    while is_ready(event.as_raw_fd(), libc::POLLIN, -1).is_err_and(|error| interrupted(&error)) {}
}

impl<H: Handler> Subscriber<H> {
    /// One call of the handler, with what goes before and after each.
    fn call(&mut self, call: impl FnOnce(&mut H, &mut Cx<'_>) -> Result<(), Fault>) {
        let memory: Memory = self.ram.memory();
        let mut cx = Cx {
            memory: &memory,
            queues: &mut self.queues,
            driver: &self.driver,
            changes: &mut self.changes,
        };
        for queue in &mut *cx.queues {
            queue.begin_turn();
        }
        // A handler that panicked is in some state: nothing but its rest is asked of it. The driver's reset ends it.
        let handler = &mut self.handler;
        let called = catch_unwind(AssertUnwindSafe(|| call(handler, &mut cx)));
        let mut done = called.unwrap_or(Err(Fault::Panicked));
        // What was used is told also where the call failed behind it.
        let signalled = cx.signal();
        done = done.and(signalled);
        for queue in &*cx.queues {
            if queue.is_unfinished() {
                let host = |source| Fault::Host {
                    what: "write an eventfd",
                    source,
                };
                done = done.and(queue.notify_self().map_err(host));
            }
        }
        if let Err(fault) = done {
            self.fail(&fault);
        }
    }

    fn fail(&mut self, fault: &Fault) {
        if self.failed {
            return;
        }
        self.failed = true;
        let text = crate::end::Chain(fault);
        self.complaints.line(
            log::Level::Error,
            format_args!("needs a reset by its driver: {text}"),
        );
        self.driver.needs_reset();
    }

    fn rest(&mut self) {
        self.call(|handler, cx| handler.rest(cx));
    }

    fn apply_changes(&mut self, ops: &mut EventOps<'_>) {
        for change in std::mem::take(&mut self.changes) {
            let (SourceChange::Add(Source { token, .. })
            | SourceChange::Interest(token, _)
            | SourceChange::Forget(token)) = change;
            let is = |of: &Option<(u32, RawFd)>| of.is_some_and(|(of, _)| of == token);
            let at = self.sources.iter().position(is);
            let found = at.and_then(|at| Some((at, self.sources[at]?.1)));
            let changed = match (change, found) {
                (SourceChange::Add(source), None) => self.add(source, ops),
                (SourceChange::Interest(_, interest), Some((at, fd))) => {
                    ops.modify(self.events(at, fd, interest))
                }
                (SourceChange::Forget(_), Some((at, fd))) => {
                    self.sources[at] = None;
                    ops.remove(self.events(at, fd, EventSet::empty()))
                }
                _ => continue,
            };
            if let Err(error) = changed {
                self.refused(&error);
            }
        }
    }

    fn add(&mut self, source: Source, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        let Source {
            fd,
            token,
            interest,
        } = source;
        let free = self.sources.iter().position(Option::is_none);
        let at = free.unwrap_or(self.sources.len());
        ops.add(self.events(at, fd, interest))?;
        match self.sources.get_mut(at) {
            Some(place) => *place = Some((token, fd)),
            None => self.sources.push(Some((token, fd))),
        }
        Ok(())
    }

    /// How event-manager knows a source: by its place behind the queues', for a token can be any number.
    fn events(&self, at: usize, fd: RawFd, interest: EventSet) -> Events {
        let data = FIRST_QUEUE + (self.queues.len() + at) as u32;
        Events::with_data_raw(fd, data, interest)
    }

    fn refused(&mut self, error: &event_manager::Error) {
        let source = io::Error::other(error.to_string());
        let what = "wait for a descriptor";
        self.fail(&Fault::Host { what, source });
    }

    /// A device that has failed waits for its reset alone.
    fn let_go(&mut self, ops: &mut EventOps<'_>) {
        for (number, queue) in (FIRST_QUEUE..).zip(&self.queues) {
            let _ = ops.remove(Events::with_data(queue, number, EventSet::IN));
        }
        for (at, source) in std::mem::take(&mut self.sources).into_iter().enumerate() {
            if let Some((_, fd)) = source {
                let _ = ops.remove(self.events(at, fd, EventSet::empty()));
            }
        }
    }
}

impl<H: Handler> MutEventSubscriber for Subscriber<H> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let stop = Events::with_data(&self.stop.event, STOP, EventSet::IN);
        if let Err(error) = ops.add(stop) {
            self.refused(&error);
            return;
        }
        for (number, queue) in (FIRST_QUEUE..).zip(&self.queues) {
            let added = ops.add(Events::with_data(queue, number, EventSet::IN));
            // Once at the start: what the driver made available before it was heard.
            let noticed = queue.notify_self();
            let noticed = noticed.map_err(|error| event_manager::Error::Epoll(error.into()));
            if let Err(error) = added.and(noticed) {
                self.refused(&error);
                return;
            }
        }
        let handler = &self.handler;
        let Ok(sources) = catch_unwind(AssertUnwindSafe(|| handler.sources())) else {
            self.fail(&Fault::Panicked);
            return;
        };
        for source in sources {
            if let Err(error) = self.add(source, ops) {
                self.refused(&error);
                return;
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        // Relaxed: the eventfd that says so is readable, and the loop looks again.
        if self.failed || self.stop.told.load(Ordering::Relaxed) || events.data() == STOP {
            return;
        }
        // Another handler of the device has failed: all of the device waits for its reset.
        if self.driver.is_reset_needed() {
            self.failed = true;
            self.let_go(ops);
            return;
        }
        let number = (events.data() - FIRST_QUEUE) as usize;
        match self.queues.get(number) {
            Some(queue) => {
                queue.take_notification();
                self.call(|handler, cx| handler.notified(cx, number));
            }
            None => {
                if let Some(Some((token, _))) = self.sources.get(number - self.queues.len()) {
                    let token = *token;
                    self.call(|handler, cx| handler.ready(cx, token, events.event_set()));
                }
            }
        }
        self.apply_changes(ops);
        if self.failed {
            self.let_go(ops);
        }
    }
}
