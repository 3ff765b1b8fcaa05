// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory as `readv` and `writev` take it: a frame goes between the tap and the guest without a copy of ours.

use std::io;
use std::marker::PhantomData;
use std::os::fd::RawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// So many pieces are taken by one call, but for the one behind them (`UIO_MAXIOV`).
pub const MOST: usize = libc::UIO_MAXIOV as usize - 1;

/// Pieces of guest memory, in order. They are borrowed from what keeps them mapped.
#[derive(Debug, Default)]
pub struct IoVecs<'m> {
    vecs: Vec<libc::iovec>,
    /// So many at the front are used up.
    taken: usize,
    /// Bytes of those that are not.
    len: usize,
    memory: PhantomData<&'m ()>,
}

impl<'m> IoVecs<'m> {
    /// None.
    pub fn new() -> Self {
        IoVecs::default()
    }

    /// Adds a piece at the end.
    pub fn push<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'m, B>) {
        // Outside of Xen a guard is nothing but the pointer.
        let iov_base = slice.ptr_guard_mut().as_ptr().cast();
        let iov_len = slice.len();
        self.vecs.push(libc::iovec { iov_base, iov_len });
        self.len += iov_len;
    }

    /// Leaves out the last `count` pieces.
    pub fn pop(&mut self, count: usize) {
        let keep = self.count().saturating_sub(count);
        let cut = self.vecs.drain(self.taken + keep..);
        self.len -= cut.map(|vec| vec.iov_len).sum::<usize>();
    }

    /// Leaves out the first `count` pieces.
    pub fn take(&mut self, count: usize) {
        let count = count.min(self.count());
        let taken = &self.vecs[self.taken..self.taken + count];
        self.len -= taken.iter().map(|vec| vec.iov_len).sum::<usize>();
        self.taken += count;
        if self.taken > MOST {
            self.vecs.drain(..self.taken);
            self.taken = 0;
        }
    }

    /// Leaves out all.
    pub fn clear(&mut self) {
        self.vecs.clear();
        (self.taken, self.len) = (0, 0);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.vecs.len() - self.taken
    }

    /// The length of each.
    pub fn lens(&self) -> impl Iterator<Item = usize> + '_ {
        self.vecs[self.taken..].iter().map(|vec| vec.iov_len)
    }

    /// How many bytes they have together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Reads from `fd` into them, and what they have no room for into `rest`; how many bytes that were.
    ///
    /// # Errors
    /// The errno of `readv`.
    pub fn read_from(&mut self, fd: RawFd, rest: &mut [u8]) -> io::Result<usize> {
        self.vecs.push(libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        });
        let vecs = &self.vecs[self.taken..];
        let count = vecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: the first pieces are guest memory, mapped as long as 'm, which others may write at the same time
        // as they may with any of it; the last is `rest`, which nobody else has during the call.
        let got = unsafe { libc::readv(fd, vecs.as_ptr(), count) };
        let error = io::Error::last_os_error();
        self.vecs.pop();
        usize::try_from(got).map_err(|_| error)
    }

    /// Writes them to `fd`; how many bytes that were.
    ///
    /// # Errors
    /// The errno of `writev`.
    pub fn write_to(&self, fd: RawFd) -> io::Result<usize> {
        let vecs = &self.vecs[self.taken..];
        let count = vecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
        // SAFETY: the pieces are guest memory, mapped as long as 'm, and the call only reads it.
        let put = unsafe { libc::writev(fd, vecs.as_ptr(), count) };
        usize::try_from(put).map_err(|_| io::Error::last_os_error())
    }
}

/// Writes bytes of ours to `fd` as one frame.
///
/// # Errors
/// The errno of `write`.
pub fn write_bytes(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of one slice, which lives through the call.
    let put = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(put).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_frame_fills_the_pieces_that_are_left_and_then_the_rest() {
        let (near, far) = UnixDatagram::pair().unwrap();
        let mut memory = [0u8; 12];
        let (mut rest, mut pieces) = ([0; 8], memory.chunks_mut(3));
        let mut vecs = IoVecs::new();
        for piece in &mut pieces {
            vecs.push(&VolatileSlice::from(piece));
        }
        vecs.take(1);
        vecs.pop(1);
        assert_eq!((vecs.count(), vecs.len()), (2, 6));
        far.send(b"abcdefghi").unwrap();
        assert_eq!(vecs.read_from(near.as_raw_fd(), &mut rest).unwrap(), 9);
        assert_eq!(vecs.write_to(near.as_raw_fd()).unwrap(), 6);
        let mut back = [0; 16];
        assert_eq!(far.recv(&mut back).unwrap(), 6);
        assert_eq!((&back[..6], &rest[..4]), (&b"abcdef"[..], &b"ghi\0"[..]));
        assert_eq!(memory, *b"\0\0\0abcdef\0\0\0");
    }
}
