// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtio devices of a configuration: a line a kind.

use std::collections::BTreeSet;
use std::error::Error;
use std::os::fd::AsFd;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::any::Devices;
use super::bay::MOST;
use super::block::BlockState;
use super::console::ConsoleState;
use super::console::config::{self as console, Files};
use super::mmio::MmioState;
use super::net::NetState;
use super::rng::{Rng, RngState};
use super::vsock::{Vsock, VsockState};
use crate::config::Config;

/// A device of the configuration cannot be had. Found before the VM exists.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// What it needs of the host cannot be had.
    #[error("{flag}: {source}")]
    Open {
        /// The flag that asks for it.
        flag: &'static str,
        /// Why.
        source: Box<dyn Error + Send + Sync>,
        /// Whether the user asked for what cannot be; else the host refused.
        users_fault: bool,
    },
    /// A state is none of the device that the configuration has in its place.
    #[error("the snapshot's state of {name}: {why}")]
    State {
        /// The device's name in the machine.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// More than there are places.
    #[error("{0} virtio devices: a machine has places for {MOST}, an interrupt for each")]
    TooMany(usize),
}

impl DeviceError {
    /// Whether the user asked for what cannot be; else the host refused.
    pub fn is_users_fault(&self) -> bool {
        match self {
            DeviceError::Open { users_fault, .. } => *users_fault,
            DeviceError::TooMany(_) | DeviceError::State { .. } => true,
        }
    }
}

/// A virtio device at rest, whatever kind it is of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Its name in the machine.
    pub name: String,
    /// [`MmioState`] of its kind, as JSON.
    pub state: serde_json::Value,
}

/// States of a snapshot, to be taken in order.
struct States<'a>(std::slice::Iter<'a, DeviceState>);

impl States<'_> {
    fn next<S: DeserializeOwned>(&mut self, name: &str) -> Result<MmioState<S>, DeviceError> {
        let wrong = |why: String| DeviceError::State {
            name: name.to_owned(),
            why,
        };
        let state = self.0.next();
        let state = state.ok_or_else(|| wrong("it is not there".into()))?;
        if state.name != name {
            return Err(wrong(format!(
                "in its place there is one of {}",
                state.name
            )));
        }
        MmioState::deserialize(&state.state).map_err(|error| wrong(error.to_string()))
    }

    fn end(mut self) -> Result<(), DeviceError> {
        let left = self.0.next();
        left.map_or(Ok(()), |state| {
            Err(DeviceError::State {
                name: state.name.clone(),
                why: "the configuration beside it has no such device".into(),
            })
        })
    }
}

fn failed(
    flag: &'static str,
    users_fault: bool,
    source: impl Error + Send + Sync + 'static,
) -> DeviceError {
    let source = Box::new(source);
    DeviceError::Open {
        flag,
        source,
        users_fault,
    }
}

impl Devices {
    /// Opens what `config` has, in the order in which a guest finds it. `stdout` is where a console goes that leads to
    /// the monitor's own.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is left behind, but that files of consoles and ports may have been emptied.
    pub fn open(config: &Config, stdout: impl AsFd) -> Result<Self, DeviceError> {
        let mut devices = Devices::new();
        for (number, disk) in config.disks.iter().enumerate() {
            let disk = disk.open();
            let disk = disk.map_err(|error| failed("--disk", error.is_users_fault(), error))?;
            devices.add(format!("disk{number}"), disk);
        }
        for (number, net) in config.nets.iter().enumerate() {
            let net = net.open();
            let net = net.map_err(|error| failed("--net", error.is_users_fault(), error))?;
            devices.add(format!("net{number}"), net);
        }
        if let Some(vsock) = &config.vsock {
            let vsock = vsock.open();
            let vsock = vsock.map_err(|error| failed("--vsock", error.is_users_fault(), error))?;
            devices.add("vsock", vsock);
        }
        let opened = console::open(&config.console, &config.ports, stdout, Files::Empty)
            .map_err(|error| failed(error.flag(), error.is_users_fault(), error))?;
        if let Some(console) = opened.console {
            devices.add("hvc0", console);
        }
        if let Some(ports) = opened.ports {
            devices.add("ports", ports);
        }
        devices.stdio = opened.stdio;
        if config.rng {
            devices.add("rng", Rng);
        }
        devices.configured = devices.len();
        Ok(devices)
    }

    /// Opens what `config` has, each in the state of its name, of which `states` has those of all devices, in order.
    /// What a new process has to bring is `config`'s, and so is what a clone has of its own: paths, taps, a network
    /// card's address and the CID. `copies` says of which disks another file than that of the state may be the image.
    ///
    /// # Errors
    /// [`DeviceError`]; nothing is left behind.
    pub(crate) fn open_from(
        config: &Config,
        states: &[DeviceState],
        copies: &BTreeSet<usize>,
        stdout: impl AsFd,
    ) -> Result<Self, DeviceError> {
        let mut devices = Devices::new();
        let mut states = States(states.iter());
        for (number, disk) in config.disks.iter().enumerate() {
            let name = format!("disk{number}");
            let state = states.next::<BlockState>(&name)?;
            let opened = disk.open_from(&state.device, copies.contains(&number));
            let opened = opened.map_err(|error| failed("--disk", error.is_users_fault(), error))?;
            devices.add_resumed(name, opened, state);
        }
        for (number, net) in config.nets.iter().enumerate() {
            let name = format!("net{number}");
            let mut state = states.next::<NetState>(&name)?;
            state.device.mac = net.mac.unwrap_or(state.device.mac);
            let opened = net.restore(&state.device);
            let opened = opened.map_err(|error| failed("--net", error.is_users_fault(), error))?;
            devices.add_resumed(name, opened, state);
        }
        if let Some(vsock) = &config.vsock {
            let mut state = states.next::<VsockState>("vsock")?;
            state.device.cid = vsock.cid;
            let opened = Vsock::from_state(&state.device, Some(&vsock.uds));
            let opened =
                opened.map_err(|error| failed("--vsock", error.is_users_fault(), error))?;
            devices.add_resumed("vsock", opened, state);
        }
        let opened = console::open(&config.console, &config.ports, stdout, Files::Keep)
            .map_err(|error| failed(error.flag(), error.is_users_fault(), error))?;
        let consoles = [
            ("hvc0", "--console", opened.console),
            ("ports", "--port", opened.ports),
        ];
        for (name, flag, console) in consoles {
            let Some(console) = console else { continue };
            let state = states.next::<ConsoleState>(name)?;
            let console = console.from_state(&state.device);
            let console = console.map_err(|error| failed(flag, true, error))?;
            devices.add_resumed(name, console, state);
        }
        devices.stdio = opened.stdio;
        if config.rng {
            let state = states.next::<RngState>("rng")?;
            devices.add_resumed("rng", Rng::from_state(RngState), state);
        }
        states.end()?;
        devices.configured = devices.len();
        Ok(devices)
    }

    /// Refuses disks that [`open_from`](Self::open_from) would refuse, as far as it can be known while another process has
    /// them. Takes nothing of the host.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub(crate) fn look_for_disks(
        config: &Config,
        states: &[DeviceState],
        copies: &BTreeSet<usize>,
    ) -> Result<(), DeviceError> {
        let mut states = States(states.iter());
        for (number, disk) in config.disks.iter().enumerate() {
            let state = states.next::<BlockState>(&format!("disk{number}"))?;
            let found = disk.look_for(&state.device, copies.contains(&number));
            found.map_err(|error| failed("--disk", error.is_users_fault(), error))?;
        }
        Ok(())
    }

    /// Refuses more than a machine has places for.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        match self.len() > MOST {
            true => Err(DeviceError::TooMany(self.len())),
            false => Ok(()),
        }
    }
}
