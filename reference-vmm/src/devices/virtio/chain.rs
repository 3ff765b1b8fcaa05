// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A request: the buffers of a descriptor chain, and what reads and writes them.
//!
//! The descriptors are read once, when the chain is taken from the queue, and checked as a whole: what the driver
//! changes afterwards changes nothing. The buffers' contents are the guest's and may change at any moment; a device
//! copies what it decides by.

use std::io;

use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::fault::Fault;

/// A piece of guest memory that a descriptor names. Whether there is memory is found out at the access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its first byte.
    pub address: GuestAddress,
    /// Its length, bytes.
    pub len: u32,
}

/// The buffers of one direction, in the chain's order; a run of bytes for those who read and write it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    parts: Vec<Buffer>,
    len: u32,
}

impl Buffers {
    /// Adds a buffer at the end; false if they would be more than `u32::MAX` bytes together.
    pub(super) fn push(&mut self, buffer: Buffer) -> bool {
        let Some(len) = self.len.checked_add(buffer.len) else {
            return false;
        };
        self.len = len;
        self.parts.push(buffer);
        true
    }

    pub(super) fn clear(&mut self) {
        self.parts.clear();
        self.len = 0;
    }

    /// For how many buffers there is memory.
    pub(super) fn capacity(&self) -> usize {
        self.parts.capacity()
    }

    /// How many bytes they have together.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers themselves.
    pub fn parts(&self) -> &[Buffer] {
        &self.parts
    }

    /// What of the buffers lies behind the first `skip` bytes, up to `len` bytes of it.
    pub fn range(&self, skip: u32, len: u32) -> impl Iterator<Item = Buffer> + '_ {
        let (mut skip, mut left) = (skip, len);
        self.parts.iter().filter_map(move |part| {
            let before = skip.min(part.len);
            skip -= before;
            let take = (part.len - before).min(left);
            left -= take;
            // A sum beyond 2^64 is no address: the access will say so.
            let address = GuestAddress(part.address.0.wrapping_add(before.into()));
            (take > 0).then_some(Buffer { address, len: take })
        })
    }

    /// Calls `each` with every slice of host memory behind up to `len` bytes after the first `skip`. For system calls
    /// that take addresses (`readv`, io_uring): who uses a slice's address keeps `memory` until the call is done, and
    /// says what was written through the slice's bitmap.
    ///
    /// # Errors
    /// [`Fault::Buffer`]: not all of it is memory, or it is to be written and is read-only. `each` has been called for
    /// what comes before.
    pub fn slices<'a, M: GuestMemory>(
        &self,
        memory: &'a M,
        (skip, len): (u32, u32),
        access: Permissions,
        mut each: impl FnMut(VolatileSlice<'a, BS<'a, M::Bitmap>>),
    ) -> Result<(), Fault> {
        for Buffer { address, len } in self.range(skip, len) {
            let failed = |source| Fault::Buffer { address, source };
            let slices = memory.get_slices(address, len as usize, access);
            for slice in slices.map_err(failed)? {
                each(slice.map_err(failed)?);
            }
        }
        Ok(())
    }
}

/// A chain of buffers that the driver has made available: first those for the device to read, then those for it to
/// write. It goes back to the driver by [`DeviceQueue::add_used`](super::queue::DeviceQueue::add_used).
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use = "a chain that is not given back is lost to the driver until a reset"]
pub struct Chain {
    pub(super) head: u16,
    /// For the device to read.
    pub readable: Buffers,
    /// For the device to write.
    pub writable: Buffers,
}

impl Chain {
    /// Its first descriptor, by which the driver knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Reads the readable buffers from their start.
    pub fn reader<'a, M: GuestMemory>(&'a self, memory: &'a M) -> Reader<'a, M> {
        Reader {
            memory,
            buffers: &self.readable,
            at: 0,
        }
    }

    /// Writes the writable buffers from their start.
    pub fn writer<'a, M: GuestMemory>(&'a self, memory: &'a M) -> Writer<'a, M> {
        Writer {
            memory,
            buffers: &self.writable,
            at: 0,
        }
    }
}

/// A position in a chain's readable buffers.
#[derive(Debug)]
pub struct Reader<'a, M> {
    memory: &'a M,
    buffers: &'a Buffers,
    at: u32,
}

impl<M: GuestMemory> Reader<'_, M> {
    /// Bytes that are left.
    pub fn left(&self) -> u32 {
        self.buffers.len - self.at
    }

    /// Bytes that were read, the position.
    pub fn position(&self) -> u32 {
        self.at
    }

    /// Passes over `len` bytes, or what is left.
    pub fn skip(&mut self, len: u32) {
        self.at += len.min(self.left());
    }

    /// Fills `data`; false, with the position unmoved, if so much is not left.
    ///
    /// # Errors
    /// [`Fault::Buffer`].
    pub fn read_exact(&mut self, data: &mut [u8]) -> Result<bool, Fault> {
        if data.len() > self.left() as usize {
            return Ok(false);
        }
        self.read(data).map(|_| true)
    }

    /// Fills `data` as far as there is something left; how many bytes that were.
    ///
    /// # Errors
    /// [`Fault::Buffer`]; the position is unmoved.
    pub fn read(&mut self, data: &mut [u8]) -> Result<usize, Fault> {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut done = 0;
        for Buffer { address, len } in self.buffers.range(self.at, len) {
            let failed = |source| Fault::Buffer { address, source };
            let part = &mut data[done..done + len as usize];
            self.memory.read_slice(part, address).map_err(failed)?;
            done += len as usize;
        }
        self.at += done as u32;
        Ok(done)
    }
}

/// A position in a chain's writable buffers.
#[derive(Debug)]
pub struct Writer<'a, M> {
    memory: &'a M,
    buffers: &'a Buffers,
    at: u32,
}

impl<M: GuestMemory> Writer<'_, M> {
    /// Bytes of room that are left.
    pub fn left(&self) -> u32 {
        self.buffers.len - self.at
    }

    /// Bytes that were written, the position: the length that goes with
    /// [`add_used`](super::queue::DeviceQueue::add_used).
    pub fn position(&self) -> u32 {
        self.at
    }

    /// Passes over `len` bytes, or what is left: they were written by other means, or will be.
    pub fn skip(&mut self, len: u32) {
        self.at += len.min(self.left());
    }

    /// Writes all of `data`; false, with nothing written, if there is not so much room.
    ///
    /// # Errors
    /// [`Fault::Buffer`].
    pub fn write_all(&mut self, data: &[u8]) -> Result<bool, Fault> {
        if data.len() > self.left() as usize {
            return Ok(false);
        }
        self.write(data).map(|_| true)
    }

    /// Writes as much of `data` as there is room for; how many bytes that were.
    ///
    /// # Errors
    /// [`Fault::Buffer`]; the position is unmoved.
    pub fn write(&mut self, data: &[u8]) -> Result<usize, Fault> {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let mut done = 0;
        for Buffer { address, len } in self.buffers.range(self.at, len) {
            let failed = |source| Fault::Buffer { address, source };
            let part = &data[done..done + len as usize];
            self.memory.write_slice(part, address).map_err(failed)?;
            done += len as usize;
        }
        self.at += done as u32;
        Ok(done)
    }
}

/// For what takes a [`io::Read`]. A [`Fault`] becomes an error of kind `InvalidData` with it inside.
impl<M: GuestMemory> io::Read for Reader<'_, M> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let invalid = |fault| io::Error::new(io::ErrorKind::InvalidData, fault);
        Reader::read(self, data).map_err(invalid)
    }
}

/// For what takes a [`io::Write`]. A [`Fault`] becomes an error of kind `InvalidData` with it inside.
impl<M: GuestMemory> io::Write for Writer<'_, M> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let invalid = |fault| io::Error::new(io::ErrorKind::InvalidData, fault);
        Writer::write(self, data).map_err(invalid)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(parts: &[(u64, u32)]) -> Buffers {
        let mut buffers = Buffers::default();
        for (address, len) in parts {
            let address = GuestAddress(*address);
            assert!(buffers.push(Buffer { address, len: *len }));
        }
        buffers
    }

    #[test]
    fn a_range_of_the_buffers_has_the_bytes_of_that_range() {
        let buffers = buffers(&[(0x1000, 4), (0x2000, 0), (0x3000, 4), (0x4000, 4)]);
        let bytes = |skip, len| {
            let parts = buffers.range(skip, len);
            let bytes = parts.flat_map(|part| part.address.0..part.address.0 + u64::from(part.len));
            bytes.collect::<Vec<_>>()
        };
        let all = bytes(0, 12);
        assert_eq!(all.len(), 12);
        for skip in 0..=13 {
            for len in 0..=13 {
                let end = (skip + len).min(12);
                let expected = all.get(skip.min(12)..end).unwrap_or_default();
                assert_eq!(bytes(skip as u32, len as u32), expected);
            }
        }
    }

    #[test]
    fn buffers_are_at_most_4_gib_together() {
        let mut buffers = buffers(&[(0, u32::MAX - 1)]);
        let more = |len| Buffer {
            address: GuestAddress(0),
            len,
        };
        assert!(!buffers.push(more(2)));
        assert!(buffers.push(more(1)));
        assert_eq!((buffers.len(), buffers.parts().len()), (u32::MAX, 2));
    }
}
