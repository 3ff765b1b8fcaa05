// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-console (virtio 1.2, 5.3): hvc0 as the fast console, and ports with names between programs of the guest and
//! sockets or files of the host.
//!
//! ```text
//!   guest                                             host
//!   hvc0                    ─► transmit ─► port 0 ─► stdout, a file, a socket
//!                           ◄─ receive ◄──────────── InputQueue ◄─ the main thread ◄─ stdin;  the socket
//!   /dev/virtio-ports/NAME  ◄─► port n ◄───────────► a socket, a file
//!   the driver              ◄─► control: Dialogue     who is open, names, sizes
//! ```
//!
//! All ports are served on one thread, which waits for nothing but events.
//!
//! # What happens to bytes
//! - Output: a chain is one write. Where the host has no room the chain waits, and with it the guest, as at a serial
//!   port; a stop of the machine waits for neither. **Nobody connected: the guest's bytes are dropped**, as with QEMU.
//!   A Linux guest's programs do not notice, for its driver knows by `PORT_OPEN` and lets them wait; its hvc0 does not
//!   wait. What was available when a connection ended is dropped with it, and not given to the next.
//! - Input is read when the guest's program has opened the port and there is a buffer for it. Until then it stays in
//!   the socket. A client that sends and goes at once has its bytes delivered before the guest sees the port closed.
//! - A client that ends its sending (`shutdown`, `nc -N`) is still written to. One at a time is served; the next waits
//!   in the socket's backlog.
//! - When the guest's program closes a named port, the connection ends when all that was written is out, and when the
//!   driver resets the device, at once (what was out is still read; chains that waited for room are the driver's again): so
//!   the host's side learns of it. It may connect again at once. A console's connection stays, and
//!   so does one through which nothing has gone yet: it may be meant for the program that opens the port next.
//! - A program of the guest's that reads to the end may miss it where the next client connects at once: a Linux driver
//!   that is told of a closing and an opening together wakes its reader to an open port.
//! - A file that cannot be written loses the output, which is told once; the guest goes on.
//!
//! # stdin and stdout
//! stdin has one reader: hvc0 with `--console stdio`, COM1 without. stdout has the output of both.
//!
//! # Sizes
//! `VIRTIO_CONSOLE_F_SIZE`: a device without control queues tells a change by its configuration space, one with them by
//! `RESIZE`. The two numbers of a `RESIZE` were taken the wrong way round by Linux until 2025 (commit 5326ab737a47), and are
//! by the stable kernels that do not have that commit. So [`config::open`] gives hvc0 a device of its own, without control
//! queues, and named ports another.

pub mod config;
pub mod control;
mod handler;
pub mod host;
pub mod input;
mod port;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Activation, Assignment, VirtioDevice};
use super::fault::Fault;
use control::{Dialogue, Kind, Size, Talk};
pub use handler::Ports;
use handler::{Inner, NUDGE};
use host::Host;
use port::{Desk, PIECE, Port, Progress, Wait};

/// `VIRTIO_CONSOLE_F_SIZE`: the configuration space has the console's size.
pub const F_SIZE: u32 = 0;
/// `VIRTIO_CONSOLE_F_MULTIPORT`: there are control queues.
pub const F_MULTIPORT: u32 = 1;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`: a byte can be written without queues.
pub const F_EMERG_WRITE: u32 = 2;

/// The most ports of a device, port 0 among them. Each has two queues.
pub const MOST_PORTS: usize = 32;

/// Entries of a port's queue. A driver fills the receiving one with a page each.
const QUEUE: u16 = 64;
/// Entries of a control queue.
const CONTROL_QUEUE: u16 = 32;
/// The control queues' places.
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

/// Offset of `emerg_wr` in the configuration space.
const EMERG_WR: u64 = 8;
/// So many bytes written there wait for a host that has no room.
const EMERGENCY_ROOM: usize = 16 << 10;

/// A port of a device.
#[derive(Debug)]
pub struct NamedPort {
    /// By which the guest finds it.
    pub name: String,
    /// The host's side.
    pub host: Host,
}

/// A console device. What it is made of does not change: port 0, a console, and named ports.
#[derive(Debug)]
pub struct Console {
    /// While no handler has them.
    inner: Option<Inner>,
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    multiport: bool,
}

/// What is read and written on other threads.
#[derive(Debug)]
struct Shared {
    size: Mutex<Size>,
    /// Bytes written to `emerg_wr` that are not out yet.
    emergency: Mutex<Vec<u8>>,
    /// Readable when one of these has changed.
    nudge: EventFd,
}

impl Shared {
    fn size(&self) -> Size {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emergency(&self) -> MutexGuard<'_, Vec<u8>> {
        // Bytes are valid whatever happened to who held it.
        let emergency = self.emergency.lock();
        emergency.unwrap_or_else(PoisonError::into_inner)
    }

    fn nudge(&self) {
        // EAGAIN: it is readable as it is.
        let _ = self.nudge.write(1);
    }
}

/// By which a console is told its terminal's size. Clones are of the same console.
#[derive(Clone, Debug)]
pub struct Resizer(Arc<Shared>);

impl Resizer {
    /// The terminal has this size now. Does not block.
    pub fn resize(&self, size: Size) {
        let mut current = self.0.size.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *current, size) != size {
            self.0.nudge();
        }
    }
}

/// A console at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    ports: Vec<PortState>,
    /// As the driver was told last, if it was.
    size: Option<Size>,
    /// Bytes written to `emerg_wr` that are not out yet.
    emergency: Vec<u8>,
}

/// A port at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PortState {
    name: Option<String>,
    talk: Talk,
    progress: Progress,
}

/// A state is none of this device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The ports are others.
    #[error(
        "the console had the ports {had}, and has {has}: give it the same `--console` and `--port` in the same order"
    )]
    Ports {
        /// Of the state.
        had: String,
        /// Of this device.
        has: String,
    },
    /// The host refused.
    #[error("cannot make a console: {0}")]
    Host(String),
}

impl Console {
    /// hvc0 alone, without control queues.
    ///
    /// # Errors
    /// The errno of `epoll_create(2)` or `eventfd(2)`.
    pub fn single(console: Host, size: Size) -> io::Result<Self> {
        Self::new(Some(console), Vec::new(), size, false)
    }

    /// A device with control queues: port 0 is a console or does not exist, the others have names, at most
    /// [`MOST_PORTS`] with port 0: what is beyond is left out.
    ///
    /// # Errors
    /// The errno of `epoll_create(2)` or `eventfd(2)`.
    pub fn multiport(console: Option<Host>, named: Vec<NamedPort>, size: Size) -> io::Result<Self> {
        Self::new(console, named, size, true)
    }

    fn new(
        console: Option<Host>,
        named: Vec<NamedPort>,
        size: Size,
        multiport: bool,
    ) -> io::Result<Self> {
        let first = Kind {
            exists: console.is_some(),
            is_console: console.is_some(),
            name: None,
        };
        let mut kinds = vec![first];
        let host = console.unwrap_or_else(Host::off);
        let mut ports = vec![Port::new(0, "hvc0".into(), host, false)];
        for (number, NamedPort { name, host }) in (1..MOST_PORTS).zip(named) {
            let label = format!("the port {name}");
            ports.push(Port::new(number, label, host, true));
            kinds.push(Kind {
                exists: true,
                is_console: false,
                name: Some(name),
            });
        }
        let mut queue_sizes = vec![QUEUE; 2];
        if multiport {
            queue_sizes.extend([CONTROL_QUEUE; 2]);
            queue_sizes.resize(2 + 2 * ports.len(), QUEUE);
        }
        let epoll = Epoll::new()?;
        let nudge = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let event = EpollEvent::new(EventSet::IN, NUDGE);
        epoll.ctl(ControlOperation::Add, nudge.as_raw_fd(), event)?;
        let mut dialogue = Dialogue::new(kinds, size);
        for (number, port) in ports.iter().enumerate() {
            dialogue.set_host_open(number, port.is_open());
        }
        Ok(Console {
            inner: Some(Inner {
                ports,
                dialogue,
                epoll,
                size_told: false,
            }),
            shared: Arc::new(Shared {
                size: Mutex::new(size),
                emergency: Mutex::default(),
                nudge,
            }),
            queue_sizes,
            multiport,
        })
    }

    /// This device, which is new and has the same ports, in a state. Connections are no part of it: their ports are told
    /// to be closed. The terminal's size is the new one's.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn from_state(mut self, state: &ConsoleState) -> Result<Self, StateError> {
        let Some(inner) = &mut self.inner else {
            return Ok(self);
        };
        let names = |names: &mut dyn Iterator<Item = &Option<String>>| {
            let names = names.map(|name| name.as_deref().unwrap_or("hvc0").to_owned());
            names.collect::<Vec<_>>().join(", ")
        };
        let had = names(&mut state.ports.iter().map(|port| &port.name));
        let kinds = inner.dialogue.kinds().to_vec();
        let has = names(&mut kinds.iter().map(|kind| &kind.name));
        if had != has || state.ports.len() != kinds.len() {
            return Err(StateError::Ports { had, has });
        }
        let talks = state.ports.iter().map(|port| port.talk).collect();
        inner.dialogue = Dialogue::from_state(kinds, state.size.unwrap_or_default(), talks);
        inner.size_told = state.size.is_some();
        for ((number, port), of) in inner.ports.iter_mut().enumerate().zip(&state.ports) {
            port.restore(&of.progress, of.talk.host_open);
            inner.dialogue.set_host_open(number, port.is_open());
        }
        self.shared.emergency().clone_from(&state.emergency);
        Ok(self)
    }

    /// By which it is told the terminal's size.
    pub fn resizer(&self) -> Resizer {
        Resizer(self.shared.clone())
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..4].copy_from_slice(&self.shared.size().to_bytes());
        let ports = match self.multiport {
            true => (self.queue_sizes.len() / 2 - 1) as u32,
            false => 1,
        };
        config[4..8].copy_from_slice(&ports.to_le_bytes());
        config
    }
}

impl VirtioDevice for Console {
    type Handler = Ports;
    type State = ConsoleState;
    const DEVICE_ID: u32 = VIRTIO_ID_CONSOLE;
    const NAME: &'static str = "virtio-console";

    fn features(&self) -> u64 {
        1 << F_SIZE | 1 << F_EMERG_WRITE | u64::from(self.multiport) << F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let left = config.get(from..).unwrap_or_default();
        for (byte, value) in data.iter_mut().zip(left) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let (EMERG_WR, Some(byte)) = (offset, data.first()) else {
            return;
        };
        let mut emergency = self.shared.emergency();
        if emergency.len() < EMERGENCY_ROOM {
            emergency.push(*byte);
        }
        drop(emergency);
        match &mut self.inner {
            // Nobody serves the ports.
            Some(inner) => {
                if let Some(port) = inner.ports.first_mut() {
                    // Nobody waits for room, so it is tried.
                    port.woken(Wait::Sink, EventSet::empty());
                    port.write_emergency(&self.shared.emergency);
                }
            }
            None => self.shared.nudge(),
        }
    }

    fn activate(&mut self, activation: &Activation) -> Result<Vec<Assignment<Ports>>, Fault> {
        let Some(mut inner) = self.inner.take() else {
            return Ok(Vec::new());
        };
        let multiport = activation.has(F_MULTIPORT);
        let sizes = activation.has(F_SIZE);
        inner.dialogue.set_sizes(sizes);
        if !multiport {
            inner.dialogue.set_guest_open(0);
        }
        Ok(vec![Assignment {
            queues: (0..self.queue_sizes.len() as u16).collect(),
            handler: Ports {
                inner,
                shared: self.shared.clone(),
                multiport,
                sizes,
                scratch: vec![0; PIECE],
                failed: false,
                warned: false,
            },
        }])
    }

    fn retire(&mut self, handlers: Vec<Ports>) {
        self.inner = handlers.into_iter().next().map(|ports| ports.inner);
    }

    fn reset(&mut self) {
        let Some(Inner {
            ports,
            dialogue,
            epoll,
            size_told,
        }) = &mut self.inner
        else {
            return;
        };
        *size_told = false;
        let talks = dialogue.talks().to_vec();
        dialogue.reset();
        let mut desk = Desk {
            epoll,
            dialogue,
            scratch: &mut [],
        };
        for (port, talk) in ports.iter_mut().zip(talks) {
            port.reset(&mut desk, talk.guest_open);
        }
    }

    fn leave(&mut self) {
        // The sockets' files go with it.
        self.inner = None;
    }

    fn state(&self) -> ConsoleState {
        let inner = self.inner.iter();
        let ports = inner.flat_map(
            |Inner {
                 ports, dialogue, ..
             }| {
                let kinds = dialogue.kinds().iter().zip(dialogue.talks());
                ports
                    .iter()
                    .zip(kinds)
                    .map(|(port, (kind, talk))| PortState {
                        name: kind.name.clone(),
                        talk: *talk,
                        progress: port.progress(),
                    })
            },
        );
        ConsoleState {
            ports: ports.collect(),
            size: self.inner.as_ref().and_then(|inner| {
                let told = inner.size_told;
                told.then(|| inner.dialogue.size())
            }),
            emergency: self.shared.emergency().clone(),
        }
    }
}
