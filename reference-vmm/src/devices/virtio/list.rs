// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The virtio devices of a configuration: a line a kind.

use std::error::Error;
use std::os::fd::AsFd;

use super::any::Devices;
use super::bay::MOST;
use super::console::config::{self as console, Files};
use super::rng::Rng;
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
    /// More than there are places.
    #[error("{0} virtio devices: a machine has places for {MOST}, an interrupt for each")]
    TooMany(usize),
}

impl DeviceError {
    /// Whether the user asked for what cannot be; else the host refused.
    pub fn is_users_fault(&self) -> bool {
        match self {
            DeviceError::Open { users_fault, .. } => *users_fault,
            DeviceError::TooMany(_) => true,
        }
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
        Ok(devices)
    }

    /// Refuses more than a machine has places for.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        match self.len() > MOST {
            true => Err(DeviceError::TooMany(self.len())),
            false => Ok(()),
        }
    }
}
