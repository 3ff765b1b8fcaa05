// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Frames from the tap to the guest (virtio 1.2, 5.1.6.3 and 5.1.6.4).
//!
//! ```text
//!   driver's buffers ─► prepared ─► readv ──► fits: used, no copy of ours
//!                        in order     │
//!                                     └─► is longer: frame, kept until there are buffers for all of it
//! ```
//!
//! A frame's length is known when it has been read, and what does not fit would be cut off without a word. So a read
//! always has room for the largest frame: first the guest's buffers, behind them ours.

use std::collections::VecDeque;
use std::io;

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{Bytes, GuestMemory, Permissions};

use super::FRAME_MOST;
use super::iovecs::{self, IoVecs};
use super::pair::Counters;
use super::tap::{HEADER, Tap};
use crate::devices::virtio::chain::Chain;
use crate::devices::virtio::fault::Fault;
use crate::devices::virtio::queue::DeviceQueue;

/// Frames of one turn; then the pair's transmit queue has one.
const BURST: usize = 64;

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: u32 = 10;

/// The receiving half of a queue pair.
#[derive(Debug)]
pub struct Rx {
    /// A frame may lie in several chains (`MRG_RXBUF`).
    merged: bool,
    /// So much room is made before a read, bytes, if frames may lie in several chains.
    wanted: usize,
    /// Chains taken from the queue, which nothing was written to that counts; the oldest first.
    prepared: VecDeque<Chain>,
    /// Their bytes.
    room: usize,
    /// Their buffers.
    parts: usize,
    /// A frame that was read and that the guest has no buffers for yet, with its header. Empty: none.
    frame: Vec<u8>,
    /// What the guest's buffers had no room for.
    rest: Box<[u8]>,
}

/// How a turn ended.
#[derive(Debug)]
pub enum RxEnd {
    /// The tap has no more.
    Empty,
    /// The tap may have more.
    Burst,
    /// The guest has no buffers: its notification is what goes on.
    NoBuffers,
    /// The tap cannot be read any more.
    Gone(io::Error),
}

/// What of the prepared chains a read can go to.
struct Window<'m, M: GuestMemory> {
    vecs: IoVecs<'m>,
    /// For what is written: of each vector.
    bitmaps: VecDeque<BS<'m, M::Bitmap>>,
    /// How many vectors each chain has. Chains at the end may have none: there are too many.
    counts: VecDeque<usize>,
}

/// What a call works with.
pub struct Turn<'a, 'm, M, T> {
    /// Guest memory.
    pub memory: &'m M,
    /// The receive queue.
    pub queue: &'a mut DeviceQueue,
    /// Where frames come from.
    pub tap: &'a T,
    /// What is counted.
    pub counters: &'a Counters,
}

impl Rx {
    /// Receives for a driver that takes frames of up to `wanted` bytes, header included, `merged` from several
    /// buffers or each in one. `frame` is one that was read before and not delivered.
    pub fn new(merged: bool, wanted: usize, frame: Vec<u8>) -> Self {
        Rx {
            merged,
            wanted,
            prepared: VecDeque::new(),
            room: 0,
            parts: 0,
            frame,
            rest: vec![0; FRAME_MOST].into(),
        }
    }

    /// Reads frames into the guest's buffers, as many as a turn has.
    ///
    /// # Errors
    /// [`Fault`].
    pub fn turn<M: GuestMemory, T: Tap>(
        &mut self,
        mut turn: Turn<'_, '_, M, T>,
    ) -> Result<RxEnd, Fault> {
        let turn = &mut turn;
        let mut window = self.window(turn.memory)?;
        for _ in 0..BURST {
            if !self.frame.is_empty() {
                if !self.deliver(turn)? {
                    return Ok(RxEnd::NoBuffers);
                }
                window = self.window(turn.memory)?;
            }
            self.fill(turn, &mut window)?;
            if self.prepared.is_empty() {
                return Ok(RxEnd::NoBuffers);
            }
            match turn.tap.read(&mut window.vecs, &mut self.rest) {
                Ok(0) => return Ok(RxEnd::Gone(io::ErrorKind::UnexpectedEof.into())),
                Ok(len) => self.received(turn, &mut window, len)?,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(RxEnd::Empty),
                    Some(libc::EINTR) => {}
                    Some(libc::EFAULT) => {
                        let what = "read a frame into guest memory";
                        return Err(Fault::Host {
                            what,
                            source: error,
                        });
                    }
                    _ => return Ok(RxEnd::Gone(error)),
                },
            }
        }
        Ok(RxEnd::Burst)
    }

    /// Gives the queue back what it gave, and the frame that was read and not delivered, if there is one.
    pub fn rest(&mut self, queue: &mut DeviceQueue) {
        while let Some(chain) = self.prepared.pop_back() {
            queue.push_back(chain);
        }
        (self.room, self.parts) = (0, 0);
    }

    /// The frame that was read and not delivered; empty: none.
    pub fn into_frame(self) -> Vec<u8> {
        self.frame
    }

    /// The prepared chains' memory.
    fn window<'m, M: GuestMemory>(&self, memory: &'m M) -> Result<Window<'m, M>, Fault> {
        let mut window = Window::new();
        for chain in &self.prepared {
            if !window.add(memory, chain)? {
                break;
            }
        }
        Ok(window)
    }

    /// Prepares chains for the next frame.
    fn fill<'m, M: GuestMemory, T>(
        &mut self,
        turn: &mut Turn<'_, 'm, M, T>,
        window: &mut Window<'m, M>,
    ) -> Result<(), Fault> {
        // A chain of buffers without bytes is bounded by the parts.
        while self.wants(self.wanted) && self.parts < iovecs::MOST && self.prepare(turn)? {
            if window.counts.len() + 1 == self.prepared.len()
                && let Some(chain) = self.prepared.back()
            {
                window.add(turn.memory, chain)?;
            }
        }
        Ok(())
    }

    /// Whether another chain is of use for `len` bytes.
    fn wants(&self, len: usize) -> bool {
        self.prepared.is_empty() || self.merged && self.room < len
    }

    /// Takes a chain from the queue; false if there is none.
    fn prepare<M: GuestMemory, T>(&mut self, turn: &mut Turn<'_, '_, M, T>) -> Result<bool, Fault> {
        let Some(chain) = turn.queue.pop(turn.memory)? else {
            return Ok(false);
        };
        let len = chain.writable.len();
        if (len as usize) < HEADER {
            let queue = turn.queue.number();
            return Err(Fault::Driver(format!(
                "queue {queue} has a receive buffer of {len} bytes: a frame's header alone has {HEADER}"
            )));
        }
        self.room = self.room.saturating_add(len as usize);
        self.parts += chain.writable.parts().len() + chain.readable.parts().len();
        self.prepared.push_back(chain);
        Ok(true)
    }

    /// A frame of `len` bytes lies in the prepared chains, and what they had no room for in `rest`.
    fn received<M: GuestMemory, T>(
        &mut self,
        turn: &mut Turn<'_, '_, M, T>,
        window: &mut Window<'_, M>,
        len: usize,
    ) -> Result<(), Fault> {
        if len <= HEADER {
            turn.counters.rx_dropped.add(1);
            return Ok(());
        }
        let Some(rest) = len.checked_sub(window.vecs.len()).filter(|rest| *rest > 0) else {
            let chains = self.chains_for(len);
            window.take(chains, len);
            return self.use_up(turn, chains, len);
        };
        let whole = self.rest.get(..rest);
        let (Some(rest), true) = (whole, self.merged || window.counts.is_empty()) else {
            // Its one buffer is too small for it, and so would the next be (5.1.6.3.1: the driver knows how large
            // they have to be).
            turn.counters.rx_dropped.add(1);
            return Ok(());
        };
        self.frame.reserve(len);
        for chain in self.prepared.iter().take(window.counts.len()) {
            for part in chain.writable.parts() {
                let at = self.frame.len();
                self.frame.resize(at + part.len as usize, 0);
                let read = turn.memory.read_slice(&mut self.frame[at..], part.address);
                read.map_err(|source| Fault::Buffer {
                    address: part.address,
                    source,
                })?;
            }
        }
        self.frame.extend_from_slice(rest);
        Ok(())
    }

    /// Copies the frame into the guest's buffers; false if there are not enough yet.
    fn deliver<M: GuestMemory, T>(&mut self, turn: &mut Turn<'_, '_, M, T>) -> Result<bool, Fault> {
        let len = self.frame.len();
        while self.wants(len) && self.prepare(turn)? {}
        if self.room < len || self.prepared.is_empty() {
            // All that it can have are here, or this one is all that counts.
            let all = self.prepared.len() >= usize::from(turn.queue.size());
            let one = !self.merged && !self.prepared.is_empty();
            if all || one {
                turn.counters.rx_dropped.add(1);
                self.frame.clear();
            }
            return Ok(all || one);
        }
        let chains = self.chains_for(len);
        let mut left = &self.frame[..];
        for chain in self.prepared.iter().take(chains) {
            let put = chain.writer(turn.memory).write(left)?;
            left = left.get(put..).unwrap_or_default();
        }
        self.frame.clear();
        self.use_up(turn, chains, len)?;
        Ok(true)
    }

    /// How many of the prepared chains have the first `len` bytes.
    fn chains_for(&self, len: usize) -> usize {
        let mut before = 0usize;
        let chains = self.prepared.iter().take_while(|chain| {
            let needed = before < len;
            before = before.saturating_add(chain.writable.len() as usize);
            needed
        });
        chains.count()
    }

    /// Gives the first chains to the driver, with a frame of `len` bytes.
    fn use_up<M: GuestMemory, T>(
        &mut self,
        turn: &mut Turn<'_, '_, M, T>,
        chains: usize,
        len: usize,
    ) -> Result<(), Fault> {
        if let Some(first) = self.prepared.front() {
            let mut header = first.writer(turn.memory);
            header.skip(NUM_BUFFERS);
            // A queue has fewer than 65,536.
            header.write_all(&(chains as u16).to_le_bytes())?;
        }
        let (mut left, room, parts) = (len, &mut self.room, &mut self.parts);
        let used = self.prepared.drain(..chains).map(|chain| {
            let of_chain = chain.writable.len() as usize;
            *room -= of_chain;
            *parts -= chain.writable.parts().len() + chain.readable.parts().len();
            let written = left.min(of_chain);
            left -= written;
            (chain, written as u32)
        });
        turn.counters.rx_frames.add(1);
        turn.queue.add_used_together(turn.memory, used)
    }
}

impl<'m, M: GuestMemory> Window<'m, M> {
    fn new() -> Self {
        Window {
            vecs: IoVecs::new(),
            bitmaps: VecDeque::new(),
            counts: VecDeque::new(),
        }
    }

    /// Adds a chain, behind which no other is missing; false if it is too much.
    fn add(&mut self, memory: &'m M, chain: &Chain) -> Result<bool, Fault> {
        let before = self.vecs.count();
        let all = (0, chain.writable.len());
        let (vecs, bitmaps) = (&mut self.vecs, &mut self.bitmaps);
        chain
            .writable
            .slices(memory, all, Permissions::Write, |slice| {
                vecs.push(&slice);
                bitmaps.push_back(slice.bitmap().clone());
            })?;
        let count = self.vecs.count() - before;
        if self.vecs.count() > iovecs::MOST {
            self.vecs.pop(count);
            self.bitmaps.truncate(before);
            return Ok(false);
        }
        self.counts.push_back(count);
        Ok(true)
    }

    /// Leaves out the first chains, to which `len` bytes were written.
    fn take(&mut self, chains: usize, mut len: usize) {
        for count in self.counts.drain(..chains) {
            for (bitmap, piece) in self.bitmaps.drain(..count).zip(self.vecs.lens()) {
                let written = piece.min(len);
                bitmap.mark_dirty(0, written);
                len -= written;
            }
            self.vecs.take(count);
        }
    }
}
