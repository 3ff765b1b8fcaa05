// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writing to a descriptor whose reader may have gone to sleep, without sleeping as well: the guest's
//! console, and what the monitor says on stderr. And reading from one that others read as well: the
//! guest's console again.
//!
//! The descriptor's own flag (`O_NONBLOCK`) is no way: other processes share it. How long there may be
//! waited for room, and for what else, is the caller's.

use std::fs::File;
use std::io::{self, Read};
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
        Ok(match file_type(out.as_raw_fd())? {
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

/// A descriptor read without waiting: `WouldBlock` where there is nothing. That it was readable a moment
/// ago is no promise, for another process may have read it since.
#[derive(Debug)]
pub(crate) struct Reader {
    file: File,
    way: Way,
}

impl Reader {
    /// Reads from `file`, by the call that does not wait as long as it is not refused.
    pub(crate) fn new(file: File) -> Self {
        let way = Way::NoWait;
        Reader { file, way }
    }

    /// It can be read always, though not always from memory: a read that waits for the disk may.
    pub(crate) fn is_file(&mut self) {
        self.way = Way::Plain;
    }
}

impl AsRawFd for Reader {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.way == Way::NoWait {
            let iov = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            // SAFETY: one iovec over `buffer`, which the call may fill; offset -1 is the file's own
            // position.
            let read =
                unsafe { libc::preadv2(self.file.as_raw_fd(), &iov, 1, -1, libc::RWF_NOWAIT) };
            let error = match usize::try_from(read) {
                Ok(read) => return Ok(read),
                Err(_) => io::Error::last_os_error(),
            };
            // EINVAL: a kernel or a sandbox that does not know the flag.
            match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) => self.way = Way::AskFirst,
                _ => return Err(error),
            }
        }
        if self.way == Way::AskFirst && !is_ready(self.file.as_raw_fd(), libc::POLLIN, 0)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.file.read(buffer)
    }
}

/// What a descriptor is: `S_IFREG`, `S_IFIFO` and so on.
///
/// # Errors
/// The errno of `fstat(2)`.
pub(crate) fn file_type(fd: RawFd) -> io::Result<libc::mode_t> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat fills `stat` when it succeeds, and it is read only then.
    unsafe {
        if libc::fstat(fd, stat.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stat.assume_init().st_mode & libc::S_IFMT)
    }
}

/// Whether one of `events` (`POLLIN`, `POLLOUT`) or an error of `fd` is there, within so many milliseconds; 0 looks and
/// does not wait, -1 waits without end.
///
/// # Errors
/// The errno of `poll(2)`.
pub(crate) fn is_ready(fd: RawFd, events: libc::c_short, milliseconds: i32) -> io::Result<bool> {
    ready([(fd, events)], milliseconds).map(|[ready]| ready)
}

/// Which of `fds` have something to read or an error, within so many milliseconds: none where that time is over, and none
/// where a signal handler ran. A descriptor below zero is passed over. -1 waits without end.
///
/// # Errors
/// The errno of `poll(2)`.
pub(crate) fn readable<const N: usize>(
    fds: [RawFd; N],
    milliseconds: i32,
) -> io::Result<[bool; N]> {
    match ready(fds.map(|fd| (fd, libc::POLLIN)), milliseconds) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok([false; N]),
        ready => ready,
    }
}

/// Of which of `fds` one of its events, or an error, is there, within so many milliseconds: none where that time is over. A
/// descriptor below zero is passed over. -1 waits without end.
///
/// # Errors
/// The errno of `poll(2)`.
pub(crate) fn ready<const N: usize>(
    fds: [(RawFd, libc::c_short); N],
    milliseconds: i32,
) -> io::Result<[bool; N]> {
    let mut fds = fds.map(|(fd, events)| libc::pollfd {
        fd,
        events,
        revents: 0,
    });
    // SAFETY: an array of pollfds, and its length.
    match unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, milliseconds) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(fds.map(|fd| fd.revents != 0)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::OwnedFd;

    #[test]
    fn nothing_to_read_is_no_reason_to_wait_and_the_end_is_the_end() {
        for way in [Way::NoWait, Way::AskFirst] {
            let (reader, mut writer) = io::pipe().unwrap();
            let mut reader = Reader::new(OwnedFd::from(reader).into());
            reader.way = way;
            let mut buffer = [0; 8];
            let nothing = reader.read(&mut buffer).unwrap_err();
            assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
            writer.write_all(b"abc").unwrap();
            assert_eq!(reader.read(&mut buffer).unwrap(), 3);
            assert_eq!(&buffer[..3], b"abc");
            drop(writer);
            assert_eq!(reader.read(&mut buffer).unwrap(), 0);
        }
    }
}
