// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writing to a descriptor whose reader may have gone to sleep, without sleeping as well: the guest's
//! console, and what the monitor says on stderr.
//!
//! The descriptor's own flag (`O_NONBLOCK`) is no way: other processes share it. How long there may be
//! waited for room, and for what else, is the caller's.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};

/// How to write to a descriptor without blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A regular file: a write does not wait for a reader.
    Plain,
    /// The call itself is asked not to wait (`RWF_NOWAIT`: pipes and sockets from Linux 6.5 on).
    NoWait,
    /// A terminal, or an older kernel: there must be room before each write, of one byte, for how
    /// much room there is nobody tells.
    AskFirst,
}

impl Way {
    /// The way for `out`, as far as it is known before the first write.
    ///
    /// # Errors
    /// The errno of `fstat(2)`.
    pub(crate) fn of(out: &impl AsRawFd) -> io::Result<Self> {
        let mut stat = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: fstat fills `stat` when it succeeds, and it is read only then.
        let mode = unsafe {
            if libc::fstat(out.as_raw_fd(), stat.as_mut_ptr()) < 0 {
                return Err(io::Error::last_os_error());
            }
            stat.assume_init().st_mode
        };
        Ok(match mode & libc::S_IFMT {
            libc::S_IFREG => Way::Plain,
            _ => Way::NoWait,
        })
    }

    /// Writes some of `bytes` to `out`, and says how many. Where there is no room for any, `room` waits
    /// for it, and says false to give up: then it is `None`.
    ///
    /// # Errors
    /// Of the write, and of `room`; an interrupted call is made again.
    pub(crate) fn write(
        &mut self,
        out: &impl AsRawFd,
        bytes: &[u8],
        mut room: impl FnMut() -> io::Result<bool>,
    ) -> io::Result<Option<usize>> {
        let fd = out.as_raw_fd();
        // Whether there has to be room before the next write.
        let mut ask = *self == Way::AskFirst;
        loop {
            let result = match ask.then(&mut room).transpose() {
                Ok(Some(false)) => return Ok(None),
                Ok(_) => self.write_now(fd, bytes),
                Err(error) => Err(error),
            };
            let error = match result {
                Ok(written) => return Ok(Some(written)),
                Err(error) => error,
            };
            match (error.kind(), error.raw_os_error()) {
                (io::ErrorKind::Interrupted, _) => {}
                (io::ErrorKind::WouldBlock, _) => ask = true,
                // EINVAL: a kernel or a sandbox that does not know the flag.
                (_, Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS))
                    if *self == Way::NoWait =>
                {
                    *self = Way::AskFirst;
                    ask = true;
                }
                _ => return Err(error),
            }
        }
    }

    /// Writes what there is room for at once; `WouldBlock` if there is none.
    fn write_now(self, fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
        let bytes = match self {
            Way::AskFirst => bytes.get(..1).unwrap_or(bytes),
            Way::Plain | Way::NoWait => bytes,
        };
        let iov = libc::iovec {
            iov_base: bytes.as_ptr() as *mut _,
            iov_len: bytes.len(),
        };
        // SAFETY: `bytes` is valid memory, which both calls only read; one iovec over it, and offset -1
        // is the file's own position.
        let written = unsafe {
            match self {
                Way::NoWait => libc::pwritev2(fd, &iov, 1, -1, libc::RWF_NOWAIT),
                Way::Plain | Way::AskFirst => libc::write(fd, bytes.as_ptr().cast(), bytes.len()),
            }
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }
}
