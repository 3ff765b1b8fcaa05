// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices of any kind: what a machine takes, and what it has of one in its place.

use std::sync::Arc;
use std::time::Duration;

use io_bus::IoDevice;

use super::console::config::Stdio;
use super::device::VirtioDevice;
use super::interrupt::DriverLink;
use super::mmio::{MmioDevice, MmioState, Place};

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
    /// [`MmioDevice::make_durable`].
    ///
    /// # Errors
    /// The host's.
    fn make_durable(&self) -> std::io::Result<()>;
    /// [`MmioDevice::let_go`].
    ///
    /// # Errors
    /// As there.
    fn let_go(&self) -> std::io::Result<()>;
    /// [`MmioDevice::take_back`].
    ///
    /// # Errors
    /// As there.
    fn take_back(&self) -> std::io::Result<()>;
    /// [`MmioDevice::announce`].
    fn announce(&self);
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

    fn make_durable(&self) -> std::io::Result<()> {
        MmioDevice::make_durable(self)
    }

    fn let_go(&self) -> std::io::Result<()> {
        MmioDevice::let_go(self)
    }

    fn take_back(&self) -> std::io::Result<()> {
        MmioDevice::take_back(self)
    }

    fn announce(&self) {
        MmioDevice::announce(self);
    }

    fn leave(&self) {
        MmioDevice::leave(self);
    }

    fn driver(&self) -> &DriverLink {
        MmioDevice::driver(self)
    }
}

/// A device that goes on in a state: its own is in `device`, the transport's in `state`.
struct Resumed<D: VirtioDevice> {
    device: D,
    state: MmioState<D::State>,
}

impl<D: VirtioDevice> AnyDevice for Resumed<D> {
    fn kind(&self) -> &'static str {
        D::NAME
    }

    fn put(self: Box<Self>, place: Place) -> Arc<dyn PlacedDevice> {
        let Resumed { device, state } = *self;
        Arc::new(MmioDevice::from_state(device, place, &state))
    }
}

/// The virtio devices that a machine is to have, in order. A driver finds them in this order.
#[derive(Default)]
pub struct Devices {
    pub(crate) list: Vec<(String, Box<dyn AnyDevice>)>,
    /// What of the monitor's stdin and terminal one of them has.
    pub(crate) stdio: Option<Stdio>,
    /// So many of them, from the first on, are of a configuration, by which they can be opened again.
    pub(crate) configured: usize,
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

    /// Adds a device that goes on in a state: `device` has been made from `state.device`.
    pub(crate) fn add_resumed<D: VirtioDevice>(
        &mut self,
        name: impl Into<String>,
        device: D,
        state: MmioState<D::State>,
    ) {
        let resumed = Resumed { device, state };
        self.list.push((name.into(), Box::new(resumed)));
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
