// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of any kind: what a machine takes, and what it has of one in its place.

use std::sync::Arc;
use std::time::Duration;

use io_bus::IoDevice;

use super::console::config::Stdio;
use super::device::VirtioDevice;
use super::interrupt::DriverLink;
use super::mmio::{MmioDevice, Place};

/// A virtio device that has no place in a machine yet. Every [`VirtioDevice`] is one.
pub trait AnyDevice: Send {
    /// Its kind, for messages.
    fn kind(&self) -> &'static str;
    /// Gives it its place.
    fn put(self: Box<Self>, place: Place) -> Arc<dyn PlacedDevice>;
}

impl<D: VirtioDevice> AnyDevice for D {
    fn kind(&self) -> &'static str {
        D::NAME
    }

    fn put(self: Box<Self>, place: Place) -> Arc<dyn PlacedDevice> {
        Arc::new(MmioDevice::new(*self, place))
    }
}

/// A virtio device in its place: registers on the bus, and what a machine does with it.
pub trait PlacedDevice: IoDevice {
    /// Its name in the machine.
    fn name(&self) -> &str;
    /// [`MmioDevice::pause`].
    fn pause(&self, patience: Duration) -> bool;
    /// [`MmioDevice::resume`].
    fn resume(&self);
    /// [`MmioDevice::state`] as JSON; none while it is not at rest.
    ///
    /// # Errors
    /// The state is none that JSON has a form for.
    fn state(&self) -> Option<serde_json::Result<serde_json::Value>>;
    /// [`MmioDevice::leave`].
    fn leave(&self);
    /// Its way to its driver.
    fn driver(&self) -> &DriverLink;
}

impl<D: VirtioDevice> PlacedDevice for MmioDevice<D> {
    fn name(&self) -> &str {
        MmioDevice::name(self)
    }

    fn pause(&self, patience: Duration) -> bool {
        MmioDevice::pause(self, patience)
    }

    fn resume(&self) {
        MmioDevice::resume(self);
    }

    fn state(&self) -> Option<serde_json::Result<serde_json::Value>> {
        MmioDevice::state(self).map(serde_json::to_value)
    }

    fn leave(&self) {
        MmioDevice::leave(self);
    }

    fn driver(&self) -> &DriverLink {
        MmioDevice::driver(self)
    }
}

/// The virtio devices that a machine is to have, in order. A driver finds them in this order.
#[derive(Default)]
pub struct Devices {
    pub(crate) list: Vec<(String, Box<dyn AnyDevice>)>,
    /// What of the monitor's stdin and terminal one of them has.
    pub(crate) stdio: Option<Stdio>,
}

impl Devices {
    /// None.
    pub fn new() -> Self {
        Devices::default()
    }

    /// Adds a device. `name` is for people: its threads', and messages'.
    pub fn add(&mut self, name: impl Into<String>, device: impl AnyDevice + 'static) {
        self.list.push((name.into(), Box::new(device)));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}
