// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-rng, the entropy device (virtio 1.2, 5.4): random bytes of the host's kernel. The smallest device there is,
//! and the one to begin another from.

use std::io;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{Activation, Assignment, Cx, Handler, VirtioDevice};
use super::fault::Fault;

/// The most that a driver is given for one request, bytes. It may ask for 4 GiB, and asks again for what it did not
/// get (5.4.6: the device gives at least one byte).
const MOST: usize = 4096;

/// An entropy device.
#[derive(Debug, Default)]
pub struct Rng;

/// Nothing: every request is answered at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState;

impl Rng {
    /// A device in this state.
    pub fn from_state(_: RngState) -> Self {
        Rng
    }
}

impl VirtioDevice for Rng {
    type Handler = Source;
    type State = RngState;
    const DEVICE_ID: u32 = VIRTIO_ID_RNG;
    const NAME: &'static str = "virtio-rng";

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, _: &Activation) -> Result<Vec<Assignment<Source>>, Fault> {
        let (queues, handler) = (vec![0], Source);
        Ok(vec![Assignment { queues, handler }])
    }

    fn retire(&mut self, _: Vec<Source>) {}

    fn state(&self) -> RngState {
        RngState
    }
}

/// Fills the driver's buffers.
#[derive(Debug)]
pub struct Source;

impl Handler for Source {
    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        let memory = &**cx.memory;
        while let Some(chain) = cx.queues[queue].pop(memory)? {
            let mut bytes = [0; MOST];
            let len = MOST.min(chain.writable.len() as usize);
            random(&mut bytes[..len])?;
            let mut writer = chain.writer(memory);
            writer.write(&bytes[..len])?;
            let written = writer.position();
            cx.queues[queue].add_used(memory, chain, written)?;
        }
        Ok(())
    }
}

/// A number that nothing else has, of 16 random bytes.
///
/// # Errors
/// The host gives none.
pub(crate) fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    random(&mut id).map_err(io::Error::other)?;
    Ok(id)
}

/// The host's own randomness. Waits only on a host that has just started and has none yet.
pub(super) fn random(mut bytes: &mut [u8]) -> Result<(), Fault> {
    while !bytes.is_empty() {
        // SAFETY: the pointer and the length are those of one slice, which lives through the call.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => bytes = bytes.get_mut(got..).unwrap_or_default(),
            Err(_) => {
                let source = io::Error::last_os_error();
                if source.kind() != io::ErrorKind::Interrupted {
                    let what = "read the host's random numbers";
                    return Err(Fault::Host { what, source });
                }
            }
        }
    }
    Ok(())
}
