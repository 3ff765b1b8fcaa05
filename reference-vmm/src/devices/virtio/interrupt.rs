// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a virtio device tells its driver: the interrupt status register (virtio 1.2, 4.2.2, `InterruptStatus`) and the
//! interrupt behind it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// `InterruptStatus`, bit 0: a queue has used buffers.
pub const USED_BUFFER: u32 = 1 << 0;
/// `InterruptStatus`, bit 1: the configuration has changed, or the device needs a reset.
pub const CONFIGURATION_CHANGE: u32 = 1 << 1;

/// An edge to the guest. What becomes of a refused one is the implementation's: a device does not wait for its answer.
pub trait Raise: Send + Sync {
    /// Interrupts the guest. May be called on any thread.
    fn raise(&self);
}

impl<F: Fn() + Send + Sync> Raise for F {
    fn raise(&self) {
        self();
    }
}

/// A device's way to its driver, shared by the device's threads and its registers.
#[derive(Clone)]
pub struct DriverLink(Arc<Inner>);

struct Inner {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    edge: Box<dyn Raise>,
}

impl DriverLink {
    /// Nothing is told yet.
    pub fn new(edge: impl Raise + 'static) -> Self {
        DriverLink(Arc::new(Inner {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            edge: Box::new(edge),
        }))
    }

    /// Tells the driver that there are used buffers.
    pub fn used_buffers(&self) {
        self.tell(USED_BUFFER);
    }

    /// Tells the driver that the device's configuration has changed. Call it after the change.
    pub fn configuration_changed(&self) {
        // Release, with the Acquire of `generation`: who sees the new number sees the new configuration.
        self.0.generation.fetch_add(1, Ordering::Release);
        self.tell(CONFIGURATION_CHANGE);
    }

    /// Tells the driver that the device does nothing more until it is reset.
    pub fn needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::Release);
        self.tell(CONFIGURATION_CHANGE);
    }

    /// Whether [`needs_reset`](Self::needs_reset) was told since the last reset.
    pub fn is_reset_needed(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    /// `ConfigGeneration`: another one after each change.
    pub fn generation(&self) -> u32 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// `InterruptStatus`.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// `InterruptACK`: the driver has seen these bits.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// After the device's reset: nothing is told.
    pub(super) fn clear(&self) {
        self.0.needs_reset.store(false, Ordering::Release);
        self.0.status.store(0, Ordering::Release);
    }

    /// What is to be told after a restore.
    pub(super) fn restore(&self, status: u32, needs_reset: bool, generation: u32) {
        self.0.needs_reset.store(needs_reset, Ordering::Release);
        self.0.status.store(status, Ordering::Release);
        self.0.generation.store(generation, Ordering::Release);
    }

    /// Interrupts once more for what the driver has not acknowledged: an edge that came while the interrupt was masked
    /// is lost to an IOAPIC, and with it all later ones would be to a driver that waits for it.
    pub fn repeat(&self) {
        if self.status() != 0 {
            self.0.edge.raise();
        }
    }

    fn tell(&self, bit: u32) {
        // Release: the driver that sees the bit sees what it is about. The edge is raised even if the bit was set: the
        // driver may have read the register before and acknowledge it after.
        self.0.status.fetch_or(bit, Ordering::AcqRel);
        self.0.edge.raise();
    }
}

impl fmt::Debug for DriverLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverLink")
            .field("status", &self.status())
            .field("needs_reset", &self.is_reset_needed())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_told_driver_is_interrupted_until_it_has_acknowledged() {
        let edges = Arc::new(AtomicU32::new(0));
        let counted = edges.clone();
        let link = DriverLink::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        let count = || edges.load(Ordering::Relaxed);
        link.repeat();
        assert_eq!(count(), 0);
        link.used_buffers();
        link.configuration_changed();
        link.repeat();
        assert_eq!((count(), link.status()), (3, 3));
        link.acknowledge(USED_BUFFER);
        assert_eq!(link.status(), CONFIGURATION_CHANGE);
        link.acknowledge(CONFIGURATION_CHANGE);
        link.repeat();
        assert_eq!((count(), link.generation()), (3, 1));
        link.needs_reset();
        assert!(link.is_reset_needed());
        link.clear();
        assert!(!link.is_reset_needed() && link.status() == 0);
    }
}
