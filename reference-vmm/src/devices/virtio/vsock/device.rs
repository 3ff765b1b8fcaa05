// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device: three queues, one thread, one number of configuration.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::EventSet;

use super::super::device::{Activation, Assignment, Cx, Handler, Source, VirtioDevice};
use super::super::fault::Fault;
use super::config::{VsockConfig, VsockError};
use super::packet::F_STREAM;
use super::sockets::{Sockets, UnixSockets};
use super::switch::Switch;

/// rx, tx, event. Linux takes the most; of events it wants eight.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// A vsock device.
#[derive(Debug)]
pub struct Vsock<S: Sockets = UnixSockets> {
    cid: u32,
    uds: PathBuf,
    /// While no driver is served.
    switch: Option<Box<Switch<S>>>,
}

/// The guest's address and where the host finds it. Connections are none of it: a restored guest is told that it has
/// none (virtio 1.2, 5.10.6.7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's address.
    pub cid: u32,
    /// The Unix socket that was listened at.
    pub uds: PathBuf,
}

impl<S: Sockets> Vsock<S> {
    /// A device for the guest `cid`, with these sockets on the host.
    ///
    /// # Errors
    /// [`VsockError::Cid`], [`VsockError::Host`].
    pub fn new(cid: u32, sockets: S) -> Result<Self, VsockError> {
        if !(3..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let uds = sockets.path().to_owned();
        let host = |(what, source)| VsockError::Host { what, source };
        let switch = Switch::new(cid, sockets).map_err(host)?;
        let switch = Some(Box::new(switch));
        Ok(Vsock { cid, uds, switch })
    }

    /// The device in this state, with these sockets. When it goes on, its driver is told that its connections are gone.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn restored(state: &VsockState, sockets: S) -> Result<Self, VsockError> {
        let mut device = Self::new(state.cid, sockets)?;
        if let Some(switch) = &mut device.switch {
            switch.reset_transport();
        }
        Ok(device)
    }
}

impl Vsock {
    /// The device in this state, which listens where it did, or at `uds` instead.
    ///
    /// # Errors
    /// [`VsockError`]; nothing was made.
    pub fn from_state(state: &VsockState, uds: Option<&Path>) -> Result<Self, VsockError> {
        let config = VsockConfig {
            cid: state.cid,
            uds: uds.unwrap_or(&state.uds).to_owned(),
        };
        let mut device = config.open()?;
        if let Some(switch) = &mut device.switch {
            switch.reset_transport();
        }
        Ok(device)
    }
}

impl<S: Sockets> VirtioDevice for Vsock<S> {
    type Handler = Packets<S>;
    type State = VsockState;
    const DEVICE_ID: u32 = VIRTIO_ID_VSOCK;
    const NAME: &'static str = "virtio-vsock";

    fn features(&self) -> u64 {
        1 << F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // 5.10.4: guest_cid.
        let cid = u64::from(self.cid).to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, of) in data.iter_mut().zip(cid.iter().skip(from)) {
            *byte = *of;
        }
    }

    fn activate(&mut self, _: &Activation) -> Result<Vec<Assignment<Packets<S>>>, Fault> {
        let switch = self.switch.take().ok_or_else(|| Fault::Host {
            what: "serve a vsock device that is served",
            source: std::io::Error::from_raw_os_error(libc::EBUSY),
        })?;
        let (queues, handler) = (vec![0, 1, 2], Packets { switch });
        Ok(vec![Assignment { queues, handler }])
    }

    fn retire(&mut self, handlers: Vec<Packets<S>>) {
        for Packets { switch } in handlers {
            self.switch = Some(switch);
        }
    }

    fn reset(&mut self) {
        if let Some(switch) = &mut self.switch {
            switch.forget_guest();
        }
    }

    fn leave(&mut self) {
        self.switch = None;
    }

    fn state(&self) -> VsockState {
        VsockState {
            cid: self.cid,
            uds: self.uds.clone(),
        }
    }
}

/// Serves all three queues.
#[derive(Debug)]
pub struct Packets<S> {
    switch: Box<Switch<S>>,
}

impl<S: Sockets> Handler for Packets<S> {
    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.switch.fd(),
            token: 0,
            interest: EventSet::IN,
        }]
    }

    fn notified(&mut self, cx: &mut Cx<'_>, _: usize) -> Result<(), Fault> {
        self.switch.serve(cx)
    }

    fn ready(&mut self, cx: &mut Cx<'_>, _: u32, _: EventSet) -> Result<(), Fault> {
        self.switch.hear(cx)
    }
}
