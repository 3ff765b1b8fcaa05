// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a kind of virtio device has to say and do. The transport does the rest: registers, feature negotiation,
//! queues, threads, interrupts, reset, state.
//!
//! ```text
//!   VirtioDevice   what it is: id, features, queues, configuration space; no thread of its own
//!        │ activate: the driver is ready          ▲ retire: reset, or at rest for its state
//!        ▼                                        │
//!   Handler × n    what it does: on a thread of its own each, with some of the queues
//!        notified(queue)   the driver has made buffers available
//!        ready(source)     a descriptor of its own: a tap, a socket, a completion
//!        rest()            finish what is under way
//! ```

use std::os::fd::RawFd;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_sys_util::epoll::EventSet;

use super::fault::Fault;
use super::interrupt::DriverLink;
use super::queue::DeviceQueue;
use crate::memory::{GuestRam, LoadedMemory};

/// Guest memory as devices have it: with permissions.
pub type Ram = GuestRam;
/// Guest memory of one moment. A clone keeps it mapped, for I/O that is under way.
pub type Memory = LoadedMemory;

/// A kind of virtio device. One value is one device of one machine.
///
/// # Contract
/// - Methods are called with the device's register lock held, on a vCPU's thread: they do not block.
/// - [`activate`](Self::activate) and [`retire`](Self::retire) alternate; between them the handlers run, each on a
///   thread of its own. What both sides need is shared by the device's own means.
/// - Everything that the driver says is data: features are checked before they come here, offsets and lengths of the
///   configuration space are not.
pub trait VirtioDevice: Send + 'static {
    /// What serves the queues.
    type Handler: Handler;
    /// What a restored device needs to know beside its configuration and the transport's own state.
    type State: Serialize + DeserializeOwned + Send;

    /// Device type (virtio 1.2, section 5).
    const DEVICE_ID: u32;
    /// For messages: `virtio-block`.
    const NAME: &'static str;

    /// Feature bits that it offers, but for the transport's own (`VERSION_1`, `RING_INDIRECT_DESC`, `RING_EVENT_IDX`).
    fn features(&self) -> u64;

    /// The largest size of each queue, in order: powers of two up to 32768. It never changes.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the configuration space from `offset`. What is beyond it stays as it is: zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the configuration space. Most have nothing there for the driver to write.
    /// No handler is told: one that has to know at once waits for an eventfd of its own ([`Handler::sources`]).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready (`DRIVER_OK`), with these features, all of which were offered. Gives a handler for each
    /// thread that is to serve queues, with the queues' numbers. A queue in no assignment is never served. A queue
    /// that the driver left alone is among them all the same, and is never ready.
    ///
    /// # Errors
    /// [`Fault`]: the device needs a reset, and no handler runs.
    fn activate(
        &mut self,
        activation: &Activation,
    ) -> Result<Vec<Assignment<Self::Handler>>, Fault>;

    /// The handlers of the last activation, which have rested, in its order.
    fn retire(&mut self, handlers: Vec<Self::Handler>);

    /// The driver has reset the device, after [`retire`](Self::retire): nothing of what it negotiated is left.
    fn reset(&mut self) {}

    /// The process ends and drops nothing: what would outlast it is removed, such as a socket's file. After
    /// [`retire`](Self::retire), if the device came to rest; nothing is called behind it.
    fn leave(&mut self) {}

    /// At rest, before its [`state`](Self::state) goes into a snapshot: has the host keep for good what it has of the
    /// guest's, such as a disk's contents. May block for the host's I/O.
    ///
    /// # Errors
    /// The host's; there is no snapshot then.
    fn make_durable(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// At rest, for a machine that goes on in another process: lets go of what only one process may have at a time, such as
    /// the lock on a disk's image. Nothing is read or written until [`take_back`](Self::take_back).
    ///
    /// # Errors
    /// The host's; nothing was let go.
    fn let_go(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// The machine goes on here after all: takes what [`let_go`](Self::let_go) let go of.
    ///
    /// # Errors
    /// Somebody else has it (`WouldBlock`), or the host's.
    fn take_back(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// At rest, for a machine that goes on where it was not before: tells the host's side of it that it is here now.
    fn announce(&self) {}

    /// At rest, after [`retire`](Self::retire): what [`State`](Self::State) says. Each device has a `from_state` of its
    /// own beside it, which takes what a new process has to bring: files, taps, sockets.
    fn state(&self) -> Self::State;
}

/// What the driver has settled.
#[derive(Debug)]
#[non_exhaustive]
pub struct Activation {
    /// The features that it accepted, the transport's own among them.
    pub features: u64,
    /// For what is told outside of a queue's turn: a changed configuration.
    pub driver: DriverLink,
}

impl Activation {
    pub(super) fn new(features: u64, driver: DriverLink) -> Self {
        Activation { features, driver }
    }

    /// Whether feature bit `bit` was accepted.
    pub fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }
}

/// A handler and the queues that it serves.
#[derive(Debug)]
pub struct Assignment<H> {
    /// Numbers of the device's queues; [`Cx`] has them in this order.
    pub queues: Vec<u16>,
    /// Who serves them.
    pub handler: H,
}

/// Serves some of a device's queues on a thread of its own.
///
/// # Contract
/// - A call does not block for long; what takes long is begun, and its end comes by a [`Source`]. Whoever resets the
///   device or ends the machine waits for the call.
/// - [`notified`](Self::notified) takes chains until [`DeviceQueue::pop`] gives none; only then the driver notifies
///   again. Chains that wait for something else (a network's receive buffers) stay where they are.
/// - Used chains are told to the driver after each call, or by [`Cx::signal`] in the middle.
/// - After a [`Fault`] nothing but [`rest`](Self::rest) is called.
pub trait Handler: Send + 'static {
    /// Descriptors of its own that it waits for, asked once. They stay open as long as the handler lives, or until they
    /// are forgotten. Later ones are [added](Cx::add_source).
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// The driver has made buffers available in `cx.queues[queue]`, or may have: also once at the start.
    ///
    /// # Errors
    /// [`Fault`].
    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault>;

    /// The source with this token is ready for these, and comes again as long as it is: what made it ready is taken
    /// here, or its interest given up. `ERROR` and `HANG_UP` come even where there is no interest in
    /// them, again and again until the cause is gone or the source is [forgotten](Cx::forget_source).
    ///
    /// # Errors
    /// [`Fault`].
    fn ready(&mut self, cx: &mut Cx<'_>, token: u32, events: EventSet) -> Result<(), Fault> {
        let _ = (cx, token, events);
        Ok(())
    }

    /// Comes to rest: finishes or gives up what is under way, so that nothing of guest memory is touched any more and
    /// the rest is in its state. May wait for I/O that cannot be called back.
    ///
    /// # Errors
    /// [`Fault`]; it is at rest all the same.
    fn rest(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let _ = cx;
        Ok(())
    }
}

/// A descriptor that wakes a handler.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// The handler's own, open as long as the handler lives.
    pub fd: RawFd,
    /// By which [`Handler::ready`] knows it.
    pub token: u32,
    /// What is waited for; [`EventSet::empty`] for nothing yet.
    pub interest: EventSet,
}

/// What a handler's call works with.
#[derive(Debug)]
pub struct Cx<'a> {
    /// Guest memory, as it is now.
    pub memory: &'a Memory,
    /// Its queues, in its assignment's order.
    pub queues: &'a mut [DeviceQueue],
    /// Its driver.
    pub driver: &'a DriverLink,
    pub(super) changes: &'a mut Vec<SourceChange>,
}

/// What a call asks of its thread.
#[derive(Clone, Copy, Debug)]
pub(super) enum SourceChange {
    Add(Source),
    Interest(u32, EventSet),
    Forget(u32),
}

impl Cx<'_> {
    /// From now on waits for this of the source with `token`.
    pub fn set_interest(&mut self, token: u32, interest: EventSet) {
        self.changes.push(SourceChange::Interest(token, interest));
    }

    /// Waits for nothing of the source with `token` any more, errors among it, until it is [added](Self::add_source)
    /// again.
    pub fn forget_source(&mut self, token: u32) {
        self.changes.push(SourceChange::Forget(token));
    }

    /// Waits for one more source, whose token no other has.
    pub fn add_source(&mut self, source: Source) {
        self.changes.push(SourceChange::Add(source));
    }

    /// Interrupts the driver for what it was given back, if it wants that, instead of at the call's end.
    ///
    /// # Errors
    /// [`Fault::Queue`].
    pub fn signal(&mut self) -> Result<(), Fault> {
        let mut wanted = false;
        for queue in &mut *self.queues {
            wanted |= queue.take_signal(&**self.memory)?;
        }
        if wanted {
            self.driver.used_buffers();
        }
        Ok(())
    }
}
