// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Frames from the guest to the tap (virtio 1.2, 5.1.6.2). The kernel reads the guest's header and its frame where
//! they are, and checks them; what it does not like is dropped, as a network may.

use std::io;

use vm_memory::{GuestMemory, Permissions};

use super::FRAME_MOST;
use super::iovecs::{self, IoVecs};
use super::pair::Counters;
use super::tap::{HEADER, Tap};
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::queue::DeviceQueue;

/// An Ethernet header, bytes: no frame is shorter.
const ETHERNET: usize = 14;

/// So often a frame waits for a host without memory (`ENOBUFS`), which says nothing when it has some.
const PATIENCE: u32 = 16;

/// The transmitting half of a queue pair.
#[derive(Debug, Default)]
pub struct Tx {
    /// How often the next frame met a host without memory.
    refused: u32,
    /// For a frame in too many pieces.
    bounce: Vec<u8>,
}

/// How a turn ended.
#[derive(Debug)]
pub enum TxEnd {
    /// The guest has no more, or this turn is over and another will be.
    Empty,
    /// The tap has no room: it becomes writable.
    Full,
    /// The tap is down: it becomes writable when it is up.
    Down,
    /// The tap cannot be written any more.
    Gone(io::Error),
}

enum Sent {
    Yes,
    Dropped,
    Not(TxEnd),
}

impl Tx {
    /// Writes the guest's frames to the tap; without a tap they are dropped.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn turn<M: GuestMemory, T: Tap>(
        &mut self,
        memory: &M,
        queue: &mut DeviceQueue,
        tap: Option<&T>,
        counters: &Counters,
    ) -> Result<TxEnd, Fault> {
        let mut vecs = IoVecs::new();
        while let Some(chain) = queue.pop(memory)? {
            let len = chain.readable.len() as usize;
            let possible = (HEADER + ETHERNET..=FRAME_MOST).contains(&len);
            let sent = match tap.filter(|_| possible) {
                Some(tap) => {
                    vecs.clear();
                    self.send(memory, &chain, &mut vecs, tap)?
                }
                None => Sent::Dropped,
            };
            match sent {
                Sent::Yes => counters.tx_frames.add(1),
                Sent::Dropped => counters.tx_dropped.add(1),
                Sent::Not(end) => {
                    queue.push_back(chain);
                    return Ok(end);
                }
            }
            self.refused = 0;
            queue.add_used(memory, chain, 0)?;
        }
        Ok(TxEnd::Empty)
    }

    fn send<'m, M: GuestMemory, T: Tap>(
        &mut self,
        memory: &'m M,
        chain: &Chain,
        vecs: &mut IoVecs<'m>,
        tap: &T,
    ) -> Result<Sent, Fault> {
        let all = (0, chain.readable.len());
        let push = |slice| vecs.push(&slice);
        chain
            .readable
            .slices(memory, all, Permissions::Read, push)?;
        let bounced = vecs.count() > iovecs::MOST;
        if bounced {
            self.bounce.resize(chain.readable.len() as usize, 0);
            chain.reader(memory).read(&mut self.bounce)?;
        }
        loop {
            let put = match bounced {
                false => tap.write(vecs),
                true => tap.write_bytes(&self.bounce),
            };
            let Err(error) = put else {
                return Ok(Sent::Yes);
            };
            return Ok(match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::EAGAIN) => Sent::Not(TxEnd::Full),
                Some(libc::ENOBUFS | libc::ENOMEM) => {
                    self.refused += 1;
                    match self.refused < PATIENCE {
                        true => Sent::Not(TxEnd::Full),
                        false => Sent::Dropped,
                    }
                }
                Some(libc::EIO) => Sent::Not(TxEnd::Down),
                Some(libc::EFAULT) => {
                    let what = "write a frame from guest memory";
                    return Err(Fault::Host {
                        what,
                        source: error,
                    });
                }
                Some(libc::EBADFD | libc::EBADF | libc::ENODEV | libc::ENXIO | libc::EPIPE) => {
                    Sent::Not(TxEnd::Gone(error))
                }
                // Of this frame: EINVAL, EMSGSIZE.
                _ => Sent::Dropped,
            });
        }
    }
}
