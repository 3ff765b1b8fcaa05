// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a device holds to raise its interrupt, without knowing how.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::error::Error;
use crate::host::{AttachIrqfd, SetGsiRouting};
use crate::irqchip::IrqchipKind;
use crate::irqfd::Irqfd;
use crate::routing::{GsiHandle, Routing};

/// An edge-triggered interrupt of a device: COM1's GSI 4, a virtio device's pin, an MSI-X vector.
///
/// It is an irqfd, attached when the interrupt is first raised (or by
/// [`enable`](IrqSource::enable)): a device that the guest never uses costs no call. For a pin in
/// the irqchip's default table nothing is committed, so no grace period is waited for, ever. Later
/// interrupts are one write to an eventfd and take no lock.
///
/// In a VM without an irqchip it is connected to nothing, as a pin without a wire: raising it does
/// nothing and is no error ([`is_connected`](IrqSource::is_connected) tells).
///
/// Clones are the same source. With the feature `vm-superio` it is a `vm_superio::Trigger`.
pub struct IrqSource<H: AttachIrqfd> {
    inner: Arc<Inner<H>>,
}

struct Inner<H: AttachIrqfd> {
    routing: Routing<H>,
    gsi: GsiHandle,
    irqfd: OnceLock<Irqfd<H>>,
    // Held while the irqfd is being attached: of two threads that raise it first, one attaches.
    attaching: Mutex<()>,
}

impl<H: SetGsiRouting + AttachIrqfd + Clone> Routing<H> {
    /// The source of a GSI's interrupts, for a device. Asks nothing of the kernel.
    pub fn source(&self, gsi: &GsiHandle) -> IrqSource<H> {
        IrqSource {
            inner: Arc::new(Inner {
                routing: self.clone(),
                gsi: gsi.clone(),
                irqfd: OnceLock::new(),
                attaching: Mutex::new(()),
            }),
        }
    }
}

impl<H: SetGsiRouting + AttachIrqfd + Clone> IrqSource<H> {
    /// Raises the interrupt.
    ///
    /// # Errors
    ///
    /// The first time, as [`Routing::irqfd`]; the next call tries again.
    pub fn trigger(&self) -> Result<(), Error> {
        match self.attached()? {
            Some(irqfd) => irqfd.trigger(),
            None => Ok(()),
        }
    }

    /// The same, and never waits (`kvm_set_irq_inatomic`): one write to the eventfd, once it is
    /// attached.
    ///
    /// # Errors
    ///
    /// [`Error::WouldBlock`] before that: [`IrqSource::enable`] attaches. [`Error::EventFd`].
    pub fn try_trigger(&self) -> Result<(), Error> {
        match self.inner.irqfd.get() {
            Some(irqfd) => irqfd.trigger(),
            None if self.is_connected() => Err(Error::WouldBlock),
            None => Ok(()),
        }
    }

    /// Attaches now instead of at the first interrupt: for a thread whose seccomp filter has no
    /// `eventfd2` and no `KVM_IRQFD`.
    ///
    /// # Errors
    ///
    /// As [`Routing::irqfd`].
    pub fn enable(&self) -> Result<(), Error> {
        self.attached().map(drop)
    }

    /// The irqfd, attached now if it was not: for what writes eventfds by itself (vhost). None
    /// without an irqchip.
    ///
    /// # Errors
    ///
    /// As [`Routing::irqfd`].
    pub fn irqfd(&self) -> Result<Option<&Irqfd<H>>, Error> {
        self.attached()
    }

    /// Whether the VM has an irqchip that this can reach.
    pub fn is_connected(&self) -> bool {
        self.inner.routing.irqchip() != IrqchipKind::None
    }

    /// The GSI that it raises.
    pub fn gsi(&self) -> &GsiHandle {
        &self.inner.gsi
    }

    fn attached(&self) -> Result<Option<&Irqfd<H>>, Error> {
        let inner = &*self.inner;
        if !self.is_connected() {
            return Ok(None);
        }
        if let Some(irqfd) = inner.irqfd.get() {
            return Ok(Some(irqfd));
        }
        let _one = inner
            .attaching
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if inner.irqfd.get().is_none() {
            let irqfd = inner.routing.irqfd(&inner.gsi)?;
            // Empty: this thread alone attaches.
            let _ = inner.irqfd.set(irqfd);
        }
        Ok(inner.irqfd.get())
    }
}

// By hand: a derive would ask for `H: Clone` and `H: Debug`, which neither needs.
impl<H: AttachIrqfd> Clone for IrqSource<H> {
    fn clone(&self) -> Self {
        let inner = Arc::clone(&self.inner);
        Self { inner }
    }
}

impl<H: AttachIrqfd> fmt::Debug for IrqSource<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqSource")
            .field("gsi", &self.inner.gsi.gsi())
            .field("attached", &self.inner.irqfd.get().is_some())
            .finish()
    }
}

#[cfg(feature = "vm-superio")]
impl<H: SetGsiRouting + AttachIrqfd + Clone> vm_superio::Trigger for IrqSource<H> {
    type E = Error;

    fn trigger(&self) -> Result<(), Error> {
        IrqSource::trigger(self)
    }
}
