// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Serves a console's ports and control queues, all on one thread.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};

use super::super::device::{Cx, Handler, Source};
use super::super::fault::Fault;
use super::control::{Dialogue, Heard, Message};
use super::port::{Desk, Port, Wait};
use super::{CONTROL_RECEIVE, CONTROL_TRANSMIT, Shared};

/// What [`Shared`]'s event has as its data.
pub(super) const NUDGE: u64 = u64::MAX;

/// What a device has at rest, and its handler while it runs.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) ports: Vec<Port>,
    pub(super) dialogue: Dialogue,
    /// Has the ports' descriptors, and [`Shared`]'s.
    pub(super) epoll: Epoll,
    /// The driver was told that there is a size.
    pub(super) size_told: bool,
}

/// Serves the ports.
#[derive(Debug)]
pub struct Ports {
    pub(super) inner: Inner,
    pub(super) shared: Arc<Shared>,
    /// The driver uses the control queues.
    pub(super) multiport: bool,
    /// The driver is told sizes.
    pub(super) sizes: bool,
    pub(super) scratch: Vec<u8>,
    /// Nothing more is done with the queues.
    pub(super) failed: bool,
    /// That the driver cannot use a port was told.
    pub(super) warned: bool,
}

impl Ports {
    fn serve(&mut self, cx: &mut Cx<'_>, number: usize) -> Result<(), Fault> {
        let Inner {
            ports,
            dialogue,
            epoll,
            ..
        } = &mut self.inner;
        let Some(port) = ports.get_mut(number) else {
            return Ok(());
        };
        let mut desk = Desk {
            epoll,
            dialogue,
            scratch: &mut self.scratch,
        };
        let emergency = (number == 0).then_some(&self.shared.emergency);
        port.serve(cx, &mut desk, emergency)
    }

    fn serve_all(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        (0..self.inner.ports.len()).try_for_each(|number| self.serve(cx, number))
    }

    /// Takes the driver's control messages.
    fn hear(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let memory = cx.memory;
        while let Some(chain) = cx.queues[CONTROL_TRANSMIT].pop(&**memory)? {
            let mut bytes = [0; Message::LEN];
            // One that is too short says nothing; what is behind a message neither.
            let whole = chain.reader(&**memory).read_exact(&mut bytes)?;
            cx.queues[CONTROL_TRANSMIT].add_used(&**memory, chain, 0)?;
            if !whole {
                continue;
            }
            match self.inner.dialogue.receive(Message::from_bytes(bytes)) {
                Heard::Nothing => {}
                Heard::GuestOpen(number, open) => {
                    if let Some(port) = self.inner.ports.get_mut(number) {
                        port.guest_open(open);
                    }
                    self.serve(cx, number)?;
                }
                Heard::Refused(port) => self.warn(port),
            }
        }
        Ok(())
    }

    fn warn(&mut self, port: Option<usize>) {
        if std::mem::replace(&mut self.warned, true) {
            return;
        }
        match port {
            Some(port) => log::warn!("virtio-console: the guest's driver cannot use port {port}"),
            None => log::warn!("virtio-console: the guest's driver cannot use the device"),
        }
    }

    /// Tells the driver what it is to know, as long as it has buffers for it.
    fn tell(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let (dialogue, size) = (&mut self.inner.dialogue, self.shared.size());
        // The first time as well: Linux reads the size only when it is told of a change.
        let told = std::mem::replace(&mut self.inner.size_told, true);
        if !told || dialogue.size() != size {
            dialogue.set_size(size);
            if self.sizes && !self.multiport {
                cx.driver.configuration_changed();
            }
        }
        if !self.multiport {
            return Ok(());
        }
        let memory = &**cx.memory;
        while let Some((port, notice)) = dialogue.next() {
            let queue = &mut cx.queues[CONTROL_RECEIVE];
            let Some(chain) = queue.pop(memory)? else {
                break;
            };
            let bytes = dialogue.bytes(port, notice);
            let mut writer = chain.writer(memory);
            // A name may be cut; a message that is not whole would be another one.
            if writer.left() as usize >= Message::LEN {
                writer.write(&bytes)?;
                dialogue.told(port, notice);
            }
            let written = writer.position();
            queue.add_used(memory, chain, written)?;
        }
        Ok(())
    }

    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        match queue {
            0 | 1 => self.serve(cx, 0)?,
            CONTROL_RECEIVE => {}
            CONTROL_TRANSMIT if self.multiport => self.hear(cx)?,
            queue if self.multiport => self.serve(cx, (queue - 2) / 2)?,
            _ => {}
        }
        self.tell(cx)
    }

    fn ready(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let mut events = [EpollEvent::default(); 16];
        let ready = self.inner.epoll.wait(0, &mut events);
        let ready = match ready {
            Ok(ready) => ready,
            // It is still readable.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            Err(source) => {
                let what = "wait for ports' host sides";
                return Err(Fault::Host { what, source });
            }
        };
        let events = events.iter().take(ready);
        let number = |event: &EpollEvent| match event.data() {
            NUDGE => 0,
            data => usize::try_from(data / Wait::COUNT).unwrap_or(usize::MAX),
        };
        // All of them before any is served: to serve one may end a connection, and another's event would be taken for
        // the next one's.
        for event in events.clone() {
            if event.data() == NUDGE {
                // EAGAIN: it was not readable.
                let _ = self.shared.nudge.read();
                continue;
            }
            let wait = Wait::from_number(event.data() % Wait::COUNT);
            let port = self.inner.ports.get_mut(number(event));
            if let (Some(port), Some(wait)) = (port, wait) {
                port.woken(wait, event.event_set());
            }
        }
        for event in events {
            self.serve(cx, number(event))?;
        }
        self.tell(cx)
    }

    /// Remembers a fault: the rest is not tried with queues that are broken.
    fn checked(&mut self, done: Result<(), Fault>) -> Result<(), Fault> {
        self.failed |= done.is_err();
        done
    }
}

impl Handler for Ports {
    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.inner.epoll.as_raw_fd(),
            token: 0,
            interest: EventSet::IN,
        }]
    }

    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        let done = self.notified(cx, queue);
        self.checked(done)
    }

    fn ready(&mut self, cx: &mut Cx<'_>, _: u32, _: EventSet) -> Result<(), Fault> {
        let done = self.ready(cx);
        self.checked(done)
    }

    /// Writes once more what there is room for: the machine may be at its end.
    fn rest(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        match self.failed {
            true => Ok(()),
            false => self.serve_all(cx),
        }
    }
}
