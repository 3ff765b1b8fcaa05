// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory on its way through a connection, without a copy of it in between.
//!
//! ```text
//!   frame's head ┐                              ┌ frame's head
//!   guest memory ┼─► sendmsg ──► recvmsg ───────┼ guest memory
//!   guest memory ┘                              └ guest memory
//! ```
//!
//! [`Parts`] is what goes at once. A connection that knows nothing of guest memory copies it ([`WritePages::write_pages`],
//! [`ReadPages::read_pages`]): TLS, which has to anyway, and the wires of tests.
//!
//! The guest writes its memory while it is sent, and what arrives is then of no one moment. Only who looks at bytes twice
//! has to copy them first. Memory that a connection is read into has a part of it when that breaks: it must be one that
//! nobody runs in yet, and that is thrown away then.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::snapshot::pages;

/// What is copied at once where it has to be, bytes.
pub(super) const STAGE: usize = 64 << 10;
/// What is looked at behind a page's first bytes, which tell most pages from zero.
const LOOK: usize = 1008;
const FIRST: usize = 64;
/// Pieces that one system call takes.
const MOST_PIECES: usize = 1024;

/// Memory at guest physical addresses.
pub type Lent<'a> = (u64, VolatileSlice<'a>);

/// `slice` for who has no use for its bitmap: that it was written is then for the caller to note.
pub fn unnoted<'a>(slice: &VolatileSlice<'a, impl BitmapSlice>) -> VolatileSlice<'a> {
    let start = slice.ptr_guard_mut();
    // SAFETY: the same memory, for as long, and all who have it go by volatile accesses as before.
    unsafe { VolatileSlice::new(start.as_ptr(), slice.len()) }
}

/// Whether all bytes of guest memory are zero: the guest may write there meanwhile.
pub(super) fn is_zero(memory: &VolatileSlice<'_>) -> bool {
    let mut look = [0; LOOK];
    let (mut at, mut step) = (0, FIRST);
    while at < memory.len() {
        let rest = memory.offset(at);
        let seen = rest.map_or(0, |rest| {
            rest.copy_to(look.get_mut(..step).unwrap_or(&mut []))
        });
        if seen == 0 || !pages::is_zero(look.get(..seen).unwrap_or_default()) {
            return false;
        }
        at += seen;
        step = LOOK;
    }
    true
}

/// Bytes of this program's, and guest memory behind them, as one.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    head: &'a [u8],
    memory: &'a [VolatileSlice<'a>],
    /// What the first of `memory` is without.
    skip: usize,
    len: usize,
}

impl fmt::Debug for Parts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("head", &self.head.len())
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl<'a> Parts<'a> {
    /// All of them.
    pub fn new(head: &'a [u8], memory: &'a [VolatileSlice<'a>]) -> Self {
        let len = memory.iter().map(VolatileSlice::len).sum::<usize>();
        Parts {
            head,
            memory,
            skip: 0,
            len: head.len() + len,
        }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `len` bytes.
    #[must_use]
    pub fn first(self, len: usize) -> Self {
        let len = self.len.min(len);
        Parts { len, ..self }
    }

    /// What is behind the first `len` bytes.
    #[must_use]
    pub fn behind(self, len: usize) -> Self {
        let gone = self.len.min(len);
        let of_head = self.head.len().min(gone);
        let mut rest = Parts {
            head: self.head.get(of_head..).unwrap_or_default(),
            len: self.len - gone,
            skip: self.skip + gone - of_head,
            ..self
        };
        while let [first, others @ ..] = rest.memory
            && rest.skip >= first.len()
        {
            rest.skip -= first.len();
            rest.memory = others;
        }
        rest
    }

    /// The bytes before the memory.
    pub fn head(&self) -> &'a [u8] {
        self.head.get(..self.len).unwrap_or(self.head)
    }

    /// The memory.
    pub fn memory(&self) -> impl Iterator<Item = VolatileSlice<'a>> {
        let (mut skip, mut left) = (self.skip, self.len - self.head().len());
        self.memory.iter().map_while(move |slice| {
            let len = (slice.len() - skip.min(slice.len())).min(left);
            let piece = slice.subslice(skip, len).ok().filter(|_| left > 0);
            (skip, left) = (0, left - len);
            piece
        })
    }

    /// Copies the first of them; how many.
    pub fn copy_to(&self, into: &mut [u8]) -> usize {
        let head = self.head();
        let mut at = head.len().min(into.len());
        let (first, _) = into.split_at_mut(at);
        first.copy_from_slice(head.get(..at).unwrap_or_default());
        for piece in self.memory() {
            at += piece.copy_to(into.get_mut(at..).unwrap_or_default());
        }
        at
    }

    /// Copies `bytes` into the memory, as far as both reach.
    pub fn copy_from(&self, mut bytes: &[u8]) {
        for piece in self.memory() {
            piece.copy_from(bytes);
            bytes = bytes.get(piece.len()..).unwrap_or_default();
        }
    }
}

/// Where guest memory can be written to.
pub trait WritePages: Write {
    /// As [`Write::write`], of the first of these bytes. By itself it copies them.
    ///
    /// # Errors
    /// As `write`'s. A [`Fault`] is the memory's, not the connection's.
    fn write_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        let mut stage = vec![0; parts.len().min(STAGE)];
        let len = parts.copy_to(&mut stage);
        self.write(stage.get(..len).unwrap_or_default())
    }
}

/// What guest memory can be read from.
pub trait ReadPages: Read {
    /// As [`Read::read`], into the first of this memory. By itself it copies what came.
    ///
    /// # Errors
    /// As `read`'s. A [`Fault`] is the memory's, not the connection's.
    fn read_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        let mut stage = vec![0; parts.len().min(STAGE)];
        let len = self.read(&mut stage)?;
        parts.copy_from(stage.get(..len).unwrap_or_default());
        Ok(len)
    }
}

impl WritePages for Vec<u8> {}
impl WritePages for io::Sink {}
impl ReadPages for &[u8] {}

/// The system cannot reach guest memory: it was unmapped, or the file that it is in cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the system cannot reach this guest memory (EFAULT): is the file that it is in shorter than it was?"
)]
pub struct Fault;

/// Whether the error is a [`Fault`].
pub fn is_fault(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Fault>())
}

/// Writes all of them.
///
/// # Errors
/// As [`Write::write_all`]'s.
pub(super) fn write_all<W: WritePages + ?Sized>(
    to: &mut W,
    mut parts: Parts<'_>,
) -> io::Result<()> {
    while !parts.is_empty() {
        match to.write_pages(parts) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => parts = parts.behind(len),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills all of them.
///
/// # Errors
/// As [`Read::read_exact`]'s.
pub(super) fn read_all<R: ReadPages + ?Sized>(
    from: &mut R,
    mut parts: Parts<'_>,
) -> io::Result<()> {
    while !parts.is_empty() {
        match from.read_pages(parts) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => parts = parts.behind(len),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The pieces as the kernel is told of them.
fn pieces(parts: Parts<'_>) -> Vec<libc::iovec> {
    let head = parts.head();
    let head = (!head.is_empty()).then(|| libc::iovec {
        iov_base: head.as_ptr().cast_mut().cast(),
        iov_len: head.len(),
    });
    let memory = parts.memory().map(|piece| libc::iovec {
        iov_base: piece.ptr_guard_mut().as_ptr().cast(),
        iov_len: piece.len(),
    });
    head.into_iter().chain(memory).take(MOST_PIECES).collect()
}

fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: plain numbers and pointers, of which zero says that there is none.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len() as _;
    message
}

fn done(len: isize) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| {
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EFAULT) => io::Error::other(Fault),
            _ => error,
        }
    })
}

/// Sends the first of `parts` by one `sendmsg`.
pub(super) fn send(socket: &impl AsRawFd, parts: Parts<'_>) -> io::Result<usize> {
    let mut pieces = pieces(parts);
    let message = message(&mut pieces);
    // SAFETY: an open socket; as many pieces as are there, of memory that `parts` keeps there and that is only read.
    done(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) })
}

/// Fills the first of `parts` by one `recvmsg`: memory alone, of which a head would be none.
pub(super) fn receive(socket: &impl AsRawFd, parts: Parts<'_>) -> io::Result<usize> {
    let parts = Parts {
        head: &[],
        len: parts.len - parts.head().len(),
        ..parts
    };
    let mut pieces = pieces(parts);
    let mut message = message(&mut pieces);
    // SAFETY: an open socket; as many pieces as are there, all of guest memory, which `parts` keeps there and whose users
    // expect that it is written at any time.
    done(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, 0) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn parts_are_one_wherever_they_are_cut() {
        let head = [1, 2, 3];
        let mut memory = [[4_u8, 5], [6, 7], [8, 9]];
        let all = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        let slices: Vec<_> = memory
            .iter_mut()
            .map(|piece| VolatileSlice::from(&mut piece[..]))
            .collect();
        let parts = Parts::new(&head, &slices);
        for from in 0..=all.len() {
            for len in 0..=all.len() - from {
                let piece = parts.behind(from).first(len);
                assert_eq!((piece.len(), piece.is_empty()), (len, len == 0));
                let mut copied = [0; 10];
                assert_eq!(piece.copy_to(&mut copied), len);
                assert_eq!(copied[..len], all[from..from + len]);
                // In steps it comes to the same.
                for step in 0..=len {
                    let mut rest = [0; 10];
                    let copied = piece.behind(step).copy_to(&mut rest);
                    assert_eq!(rest[..copied], all[from + step..from + len]);
                }
            }
        }
        assert!(parts.behind(20).is_empty());
    }

    #[test]
    fn one_byte_that_is_not_zero_is_found_wherever_it_is() {
        let mut page = [0_u8; 4096];
        assert!(is_zero(&VolatileSlice::from(&mut page[..])));
        for at in 0..page.len() {
            page[at] = 1;
            assert!(!is_zero(&VolatileSlice::from(&mut page[..])), "{at}");
            page[at] = 0;
        }
    }
}
