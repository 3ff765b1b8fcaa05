// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Eventfds that raise interrupts: `KVM_IRQFD`.
//!
//! An irqfd follows its GSI's route, so the route can change while it is attached. To hold
//! interrupts back (a masked vector) it is detached: what is written to the eventfd meanwhile stays
//! in its counter, and arrives when it is attached again, because KVM looks at the counter when it
//! attaches. The types say which of the two it is: [`Irqfd`] is attached, [`DetachedIrqfd`] is not.
//!
//! Costs: to attach is cheap (no grace period, unless the GSI's route must first be committed); to
//! detach waits for a grace period, because after it nothing may arrive any more.

#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::gsi::Gsi;
use crate::host::{AttachIrqfd, SetGsiRouting};
use crate::routing::{GsiHandle, Routing};

impl<H: SetGsiRouting + AttachIrqfd + Clone> Routing<H> {
    /// Attaches a new eventfd to a GSI: each write raises an edge.
    ///
    /// # Errors
    ///
    /// [`Error::NoIrqchip`], [`Error::EventFd`], [`Error::Attach`]; as
    /// [`Change::commit`](crate::Change::commit) where the GSI's route is not committed yet. When
    /// only the attaching failed, what was deferred before is committed.
    pub fn irqfd(&self, gsi: &GsiHandle) -> Result<Irqfd<H>, Error> {
        self.irqfd_with(gsi, new_eventfd(gsi.gsi())?)
    }

    /// The same with an eventfd from elsewhere: a clone of one that a vhost device or another
    /// process writes. An eventfd can be attached once.
    ///
    /// # Errors
    ///
    /// As [`Routing::irqfd`].
    pub fn irqfd_with(&self, gsi: &GsiHandle, fd: EventFd) -> Result<Irqfd<H>, Error> {
        self.attach(gsi, fd, None)
    }

    /// Attaches an eventfd to a level-triggered pin: a write raises the line, which stays up until
    /// the guest acknowledges; then KVM lowers it and writes `resample`, and a device that still
    /// wants attention writes `fd` again. Only for pins of the in-kernel irqchip.
    ///
    /// # Errors
    ///
    /// As [`Routing::irqfd`].
    pub fn irqfd_resample(
        &self,
        gsi: &GsiHandle,
        fd: EventFd,
        resample: EventFd,
    ) -> Result<Irqfd<H>, Error> {
        self.attach(gsi, fd, Some(resample))
    }

    fn attach(
        &self,
        gsi: &GsiHandle,
        fd: EventFd,
        resample: Option<EventFd>,
    ) -> Result<Irqfd<H>, Error> {
        let parts = Parts {
            routing: self.clone(),
            fd,
            resample,
            gsi: gsi.clone(),
        };
        let parts = Arc::new(parts);
        DetachedIrqfd { parts }.attach().map_err(|(_, error)| error)
    }
}

/// An eventfd attached to a GSI. Dropped, it is detached, which waits for a grace period.
#[derive(Debug)]
pub struct Irqfd<H: AttachIrqfd> {
    parts: Arc<Parts<H>>,
    attached: bool,
}

/// An eventfd and the GSI that it is not attached to now. What is written to it stays pending.
#[derive(Debug)]
pub struct DetachedIrqfd<H> {
    parts: Arc<Parts<H>>,
}

#[derive(Debug)]
struct Parts<H> {
    routing: Routing<H>,
    fd: EventFd,
    resample: Option<EventFd>,
    // Last: the number is free again only when nothing of this is left.
    gsi: GsiHandle,
}

impl<H: AttachIrqfd> Irqfd<H> {
    /// Raises the interrupt. Does not block; one that is pending already absorbs it.
    ///
    /// # Errors
    ///
    /// [`Error::EventFd`]: not seen unless the eventfd came from elsewhere and is none.
    pub fn trigger(&self) -> Result<(), Error> {
        self.parts.trigger()
    }

    /// The eventfd, for whoever writes it: vhost, VFIO, another thread.
    pub fn eventfd(&self) -> &EventFd {
        &self.parts.fd
    }

    /// The GSI that it raises.
    pub fn gsi(&self) -> &GsiHandle {
        &self.parts.gsi
    }

    /// Holds interrupts back from now on: when it returns, none is under way. Waits for a grace
    /// period.
    ///
    /// # Errors
    ///
    /// [`Error::Detach`], with the irqfd, still attached.
    pub fn detach(mut self) -> Result<DetachedIrqfd<H>, (Self, Error)> {
        let gsi = self.parts.gsi.gsi();
        match self.parts.detach() {
            Ok(()) => {
                self.attached = false;
                self.parts.routing.detached(&self.parts.gsi);
                let parts = Arc::clone(&self.parts);
                Ok(DetachedIrqfd { parts })
            }
            Err(source) => Err((self, Error::Detach { gsi, source })),
        }
    }
}

impl<H: AttachIrqfd> Drop for Irqfd<H> {
    fn drop(&mut self) {
        if self.attached {
            // KVM refuses this only for what is no eventfd, which was not attached. And if it did:
            // the eventfd is closed next, and KVM detaches one whose last descriptor is closed.
            let _ = self.parts.detach();
            self.parts.routing.detached(&self.parts.gsi);
        }
    }
}

impl<H: SetGsiRouting + AttachIrqfd> DetachedIrqfd<H> {
    /// Lets interrupts through again; one that was raised meanwhile arrives now. Commits the GSI's
    /// route first if it was deferred.
    ///
    /// # Errors
    ///
    /// As [`Routing::irqfd`], with the irqfd, still detached.
    pub fn attach(self) -> Result<Irqfd<H>, (Self, Error)> {
        match self.parts.attach() {
            Ok(()) => Ok(Irqfd {
                parts: self.parts,
                attached: true,
            }),
            Err(error) => Err((self, error)),
        }
    }
}

impl<H> DetachedIrqfd<H> {
    /// Raises the interrupt, to arrive when it is attached again.
    ///
    /// # Errors
    ///
    /// As [`Irqfd::trigger`].
    pub fn trigger(&self) -> Result<(), Error> {
        self.parts.trigger()
    }

    /// The eventfd.
    pub fn eventfd(&self) -> &EventFd {
        &self.parts.fd
    }

    /// The GSI that it will raise.
    pub fn gsi(&self) -> &GsiHandle {
        &self.parts.gsi
    }
}

impl<H> Parts<H> {
    fn trigger(&self) -> Result<(), Error> {
        match self.fd.write(1) {
            // The counter is full: an interrupt is pending, and one is all that an edge can be.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other.map_err(|source| Error::EventFd {
                gsi: self.gsi.gsi(),
                source,
            }),
        }
    }
}

impl<H: AttachIrqfd> Parts<H> {
    fn detach(&self) -> Result<(), crate::host::Errno> {
        self.routing.host().detach_irqfd(&self.fd, self.gsi.gsi())
    }
}

impl<H: SetGsiRouting + AttachIrqfd> Parts<H> {
    fn attach(&self) -> Result<(), Error> {
        self.routing.attaching(&self.gsi)?;
        let gsi = self.gsi.gsi();
        let host = self.routing.host();
        host.attach_irqfd(&self.fd, self.resample.as_ref(), gsi)
            .map_err(|source| {
                self.routing.detached(&self.gsi);
                Error::Attach { gsi, source }
            })
    }
}

fn new_eventfd(gsi: Gsi) -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|source| Error::EventFd { gsi, source })
}
