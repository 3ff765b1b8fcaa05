// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtqueue as its device has it.
//!
//! The ring is virtio-queue's. What is added: a chain is checked as a whole before the device sees it, notifications
//! are asked for only where the device has found the queue empty, and a driver that adds buffers without end cannot
//! hold the device's thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Buffer, Chain};
use super::fault::{BadChain, Fault};

/// A virtqueue of an active device.
#[derive(Debug)]
pub struct DeviceQueue {
    number: u16,
    queue: Queue,
    /// Written by the driver's notification.
    notified: EventFd,
    /// The driver notifies of the next buffer.
    armed: bool,
    /// How many chains may still be taken in this turn.
    turn: u32,
    /// Chains were left when the turn ended.
    unfinished: bool,
    /// How many chains went back since the driver was last told, for which it may have to be interrupted.
    used: u32,
    /// Chains to be used again, for their vectors.
    spare: Vec<Chain>,
}

/// So many chains are kept for their vectors' room.
const SPARE: usize = 64;
/// Not those of a driver that makes them long: an indirect table may have 65,535 descriptors, a MiB of them here.
const SPARE_ROOM: usize = 1024;

/// So many descriptors a chain may have that comes by an indirect table, where the queue has fewer. By the
/// specification it may have as many as the queue (2.7.5.3.1); drivers that reckon with more were seen, and hypervisors
/// take this many. A table could have 65,535, for each of which the host would keep a buffer.
const MOST_INDIRECT: u16 = 1024;

impl DeviceQueue {
    /// The queue `number`, whose driver's notifications come by `notified`. One that is not ready has no chains.
    pub fn new(number: u16, queue: Queue, notified: EventFd) -> Self {
        DeviceQueue {
            number,
            queue,
            notified,
            armed: false,
            turn: 0,
            unfinished: false,
            used: 0,
            spare: Vec::new(),
        }
    }

    /// Its number in the device.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Whether the driver uses it.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// The next chain that the driver has made available, or none. After none the driver notifies of the next one, or
    /// this turn is over and there will be another at once.
    ///
    /// # Errors
    /// [`Fault::Queue`], [`Fault::Chain`].
    pub fn pop<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<Chain>, Fault> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let number = self.number;
        let failed = |source| Fault::Queue {
            queue: number,
            source,
        };
        loop {
            let next = self.queue.iter(memory).map_err(failed)?.next();
            if let Some(descriptors) = next {
                if self.turn == 0 {
                    self.queue.go_to_previous_position();
                    self.unfinished = true;
                    return Ok(None);
                }
                self.turn -= 1;
                if self.armed {
                    self.armed = false;
                    self.queue.disable_notification(memory).map_err(failed)?;
                }
                return self.check(descriptors).map(Some);
            }
            if self.armed {
                return Ok(None);
            }
            self.armed = true;
            // True: the driver may have made one available before it could see that it is to notify.
            if !self.queue.enable_notification(memory).map_err(failed)? {
                return Ok(None);
            }
        }
    }

    /// Puts the last chain back that [`pop`](Self::pop) gave, to come again: the device cannot serve it yet. Several
    /// are put back in the reverse order, the last one first, with none between them that was given back to the
    /// driver.
    pub fn push_back(&mut self, chain: Chain) {
        self.queue.go_to_previous_position();
        self.turn += 1;
        self.recycle(chain);
    }

    /// Gives a chain back to the driver, with `written` bytes in its writable buffers. The driver is interrupted for it
    /// when the turn ends, or by [`Cx::signal`](super::device::Cx::signal).
    ///
    /// # Errors
    /// [`Fault::Queue`]: the ring is not in memory.
    pub fn add_used<M: GuestMemory>(
        &mut self,
        memory: &M,
        chain: Chain,
        written: u32,
    ) -> Result<(), Fault> {
        let added = self.queue.add_used(memory, chain.head, written);
        self.recycle(chain);
        self.used += 1;
        added.map_err(|source| Fault::Queue {
            queue: self.number,
            source,
        })
    }

    /// Gives several chains back as one: the driver, which may look at any moment, sees all of them or none. For what
    /// lies in more than one chain (virtio 1.2, 5.1.6.4: merged receive buffers).
    ///
    /// # Errors
    /// [`Fault::Queue`]: the ring is not in memory.
    pub fn add_used_together<M: GuestMemory>(
        &mut self,
        memory: &M,
        chains: impl IntoIterator<Item = (Chain, u32)>,
    ) -> Result<(), Fault> {
        let mut chains = chains.into_iter().peekable();
        let mut next = self.queue.next_used();
        while let Some((chain, written)) = chains.next() {
            if chains.peek().is_none() {
                // Its index is what the driver looks at.
                self.queue.set_next_used(next);
                return self.add_used(memory, chain, written);
            }
            let size = self.queue.size().max(1);
            let at = 4 + 8 * u64::from(next % size);
            let at = GuestAddress(self.queue.used_ring().wrapping_add(at));
            // `le32 id, le32 len` (2.7.8).
            let element = u64::from(chain.head) | u64::from(written) << 32;
            let put = memory.write_obj(element.to_le(), at);
            put.map_err(|source| self.ring(source))?;
            next = next.wrapping_add(1);
            self.used += 1;
            self.recycle(chain);
        }
        Ok(())
    }

    fn ring(&self, source: vm_memory::GuestMemoryError) -> Fault {
        Fault::Queue {
            queue: self.number,
            source: virtio_queue::Error::GuestMemory(source),
        }
    }

    /// Begins a turn, in which as many chains can be taken as the queue has descriptors.
    pub(super) fn begin_turn(&mut self) {
        self.turn = self.queue.size().into();
        self.unfinished = false;
    }

    /// Whether chains were left that could not be taken in this turn.
    pub(super) fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// Whether the driver wants to be interrupted for what it was given back since the last time.
    pub(super) fn take_signal<M: GuestMemory>(&mut self, memory: &M) -> Result<bool, Fault> {
        let used = std::mem::take(&mut self.used);
        if used == 0 {
            return Ok(false);
        }
        // The used index before the driver's wish: it writes the wish, and then looks at the index once more.
        fence(Ordering::SeqCst);
        let word = |offset: u64| {
            let at = GuestAddress(self.queue.avail_ring().wrapping_add(offset));
            let word = memory.load::<u16>(at, Ordering::Relaxed);
            word.map(u16::from_le).map_err(|source| self.ring(source))
        };
        if !self.queue.event_idx_enabled() {
            return Ok(word(0)? & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        // At this index the driver wants an interrupt: whether it is among those that were added (2.7.10).
        let event = word(4 + 2 * u64::from(self.queue.size()))?;
        let behind = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
        Ok(u32::from(behind) < used)
    }

    /// Takes the driver's notification away.
    pub(super) fn take_notification(&self) {
        // EAGAIN: there was none.
        let _ = self.notified.read();
    }

    /// Has the device look at the queue again.
    pub(super) fn notify_self(&self) -> io::Result<()> {
        match self.notified.write(1) {
            // Full: it is notified as it is.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
            written => written,
        }
    }

    /// The ring's position, at rest.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    fn recycle(&mut self, mut chain: Chain) {
        let room = chain.readable.capacity().max(chain.writable.capacity());
        if self.spare.len() < SPARE && room <= SPARE_ROOM {
            chain.readable.clear();
            chain.writable.clear();
            self.spare.push(chain);
        }
    }

    fn check<M: GuestMemory>(
        &mut self,
        mut descriptors: virtio_queue::DescriptorChain<&M>,
    ) -> Result<Chain, Fault> {
        let mut chain = self.spare.pop().unwrap_or_default();
        chain.head = descriptors.head_index();
        let bad = |what| Fault::Chain {
            queue: self.number,
            head: descriptors.head_index(),
            what,
        };
        let head = bad(BadChain::Head {
            size: self.queue.size(),
        });
        let order = bad(BadChain::Order);
        let most = usize::from(self.queue.size().max(MOST_INDIRECT));
        let long = bad(BadChain::Long { most });
        let mut after = 0;
        let mut more = true;
        for descriptor in descriptors.by_ref() {
            if after == most {
                return Err(long);
            }
            after += 1;
            more = descriptor.has_next();
            let buffer = Buffer {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            let pushed = if descriptor.is_write_only() {
                chain.writable.push(buffer)
            } else if chain.writable.parts().is_empty() {
                chain.readable.push(buffer)
            } else {
                return Err(order);
            };
            if !pushed {
                more = true;
                break;
            }
        }
        if after == 0 && chain.head >= self.queue.size() {
            return Err(head);
        }
        // The iterator ends at what it cannot follow as it does at the end.
        if more {
            return Err(Fault::Chain {
                queue: self.number,
                head: chain.head,
                what: BadChain::Broken { after },
            });
        }
        Ok(chain)
    }
}

impl AsRawFd for DeviceQueue {
    /// Readable when the driver has notified.
    fn as_raw_fd(&self) -> RawFd {
        self.notified.as_raw_fd()
    }
}
