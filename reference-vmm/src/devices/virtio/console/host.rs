// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A port's other end: where the guest's bytes go on the host, and where those for it come from. Nothing here waits.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::gdb::Listener;
use crate::no_wait::{Way, file_type, is_ready};

/// Where bytes for the guest come from.
pub trait Source: Send {
    /// What can be waited for: readable when there are bytes.
    fn fd(&self) -> RawFd;
    /// Reads what there is; 0 at the end.
    ///
    /// # Errors
    /// `WouldBlock`: nothing for now. Everything else is the end as well.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
    /// Whether [`read`](Self::read) would give bytes now, as far as that is known without reading.
    fn has_bytes(&self) -> bool {
        false
    }
    /// What was taken from the host already and belongs to a state.
    fn pending(&self) -> Vec<u8> {
        Vec::new()
    }
    /// Takes what [`pending`](Self::pending) was, to be read first.
    fn restore(&mut self, bytes: &[u8]) {
        let _ = bytes;
    }
}

/// Where the guest's bytes go.
pub trait Sink: Send {
    /// What can be waited for: writable when there is room.
    fn fd(&self) -> RawFd;
    /// Writes what there is room for.
    ///
    /// # Errors
    /// `WouldBlock`: no room for now. Everything else: these bytes cannot be written.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
}

/// Both ends of a connection.
pub type Ends = (Box<dyn Source>, Box<dyn Sink>);

/// Who is waited for to connect.
pub trait Accept: Send {
    /// Readable when somebody has.
    fn fd(&self) -> RawFd;
    /// Who has connected.
    ///
    /// # Errors
    /// `WouldBlock`: nobody has.
    fn accept(&self) -> io::Result<Ends>;
}

/// A port's host side.
pub enum Host {
    /// Open as long as the machine is there. Without a sink what the guest writes is dropped.
    Fixed {
        /// Input.
        source: Option<Box<dyn Source>>,
        /// Output.
        sink: Option<Box<dyn Sink>>,
    },
    /// Open while somebody is connected, one at a time. What the guest writes while nobody is, is dropped.
    Served {
        /// Where they connect.
        listener: Box<dyn Accept>,
        /// Who is connected.
        connection: Option<Ends>,
    },
}

impl Host {
    /// Nobody ever.
    pub fn off() -> Self {
        Host::Fixed {
            source: None,
            sink: None,
        }
    }

    /// Whether somebody is there.
    pub fn is_open(&self) -> bool {
        match self {
            Host::Fixed { source, sink } => source.is_some() || sink.is_some(),
            Host::Served { connection, .. } => connection.is_some(),
        }
    }

    /// What was taken from the host and not given to the guest.
    pub(super) fn pending(&self) -> Vec<u8> {
        match self {
            Host::Fixed {
                source: Some(source),
                ..
            } => source.pending(),
            Host::Fixed { source: None, .. } => Vec::new(),
            Host::Served { connection, .. } => {
                let source = connection.as_ref().map(|(source, _)| source);
                source.map_or_else(Vec::new, |source| source.pending())
            }
        }
    }

    pub(super) fn source(&mut self) -> Option<&mut Box<dyn Source>> {
        match self {
            Host::Fixed { source, .. } => source.as_mut(),
            Host::Served { connection, .. } => connection.as_mut().map(|(source, _)| source),
        }
    }

    pub(super) fn sink(&mut self) -> Option<&mut Box<dyn Sink>> {
        match self {
            Host::Fixed { sink, .. } => sink.as_mut(),
            Host::Served { connection, .. } => connection.as_mut().map(|(_, sink)| sink),
        }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Host::Fixed { .. } => "Fixed",
            Host::Served { .. } => "Served",
        };
        f.debug_struct(kind)
            .field("open", &self.is_open())
            .finish_non_exhaustive()
    }
}

/// A file to write to that was there before, stdout as a rule, and that other processes may have as well: their
/// `O_NONBLOCK` is left alone.
#[derive(Debug)]
pub struct Shared {
    out: File,
    /// How not to wait, where the description is not this sink's own.
    way: Option<Way>,
}

impl Shared {
    /// Writes to what `out` is. Of a terminal, a pipe and the like it opens a description of its own, which does not
    /// block; where that is refused it asks for room before it writes.
    ///
    /// # Errors
    /// The errno of `dup(2)` or `fstat(2)`.
    pub fn new(out: impl AsFd) -> io::Result<Self> {
        let fd = out.as_fd();
        let mode = file_type(fd.as_raw_fd())?;
        if matches!(mode, libc::S_IFCHR | libc::S_IFIFO) {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            if let Ok(out) = OpenOptions::new()
                .write(true)
                .custom_flags(flags)
                .open(path)
            {
                return Ok(Shared { out, way: None });
            }
        }
        let out = File::from(fd.try_clone_to_owned()?);
        let way = Way::of(&out)?;
        Ok(Shared {
            out,
            way: Some(way),
        })
    }
}

impl Sink for Shared {
    fn fd(&self) -> RawFd {
        self.out.as_raw_fd()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Shared { out, way } = self;
        match way {
            None => io::Write::write(out, bytes),
            Some(way) => {
                let room = || is_ready(out.as_raw_fd(), libc::POLLOUT, 0);
                let written = way.write(out, bytes, room)?;
                written.ok_or_else(|| io::ErrorKind::WouldBlock.into())
            }
        }
    }
}

/// A file of a port's own.
#[derive(Debug)]
pub struct Output(pub(super) File);

impl Sink for Output {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::Write::write(&mut self.0, bytes)
    }
}

/// A connected stream socket, one direction of it.
#[derive(Debug)]
struct Stream(OwnedFd);

impl Stream {
    fn receive(&self, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
        let (at, len) = (buffer.as_mut_ptr().cast(), buffer.len());
        let flags = flags | libc::MSG_DONTWAIT;
        // SAFETY: the pointer and the length are those of one slice, which lives through the call.
        let read = unsafe { libc::recv(self.0.as_raw_fd(), at, len, flags) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

impl Source for Stream {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive(buffer, 0)
    }

    fn has_bytes(&self) -> bool {
        self.receive(&mut [0], libc::MSG_PEEK)
            .is_ok_and(|read| read > 0)
    }
}

impl Sink for Stream {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (at, len) = (bytes.as_ptr().cast(), bytes.len());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the pointer and the length are those of one slice, which lives through the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), at, len, flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// A connected stream socket as both ends.
///
/// # Errors
/// The errno of `dup(2)`.
pub fn stream(socket: OwnedFd) -> io::Result<Ends> {
    // Two descriptors: each direction is waited for by itself.
    let sink = socket.try_clone()?;
    Ok((Box::new(Stream(socket)), Box::new(Stream(sink))))
}

impl Accept for Listener {
    fn fd(&self) -> RawFd {
        self.as_raw_fd()
    }

    fn accept(&self) -> io::Result<Ends> {
        let null = std::ptr::null_mut();
        // SAFETY: no address is asked for; the new descriptor is checked, and owned at once.
        let socket = unsafe {
            let fd = libc::accept4(self.as_raw_fd(), null, null.cast(), libc::SOCK_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        stream(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_full_pipe_takes_no_more_and_nobody_else_notices() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut own = Shared::new(&writer).unwrap();
        assert!(own.way.is_none());
        let mut asking = Shared {
            out: OwnedFd::from(writer.try_clone().unwrap()).into(),
            way: Some(Way::of(&writer).unwrap()),
        };
        let mut written = Vec::new();
        let mut fill = |sink: &mut Shared, byte: u8| loop {
            match sink.write(&[byte; 1000]) {
                Ok(len) => written.extend(std::iter::repeat_n(byte, len)),
                Err(error) => return assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        };
        fill(&mut own, b'a');
        fill(&mut asking, b'b');
        // SAFETY: asks for the flags of an open descriptor.
        let flags = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_NONBLOCK, 0);
        drop((own, asking, writer));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read, written);
    }

    #[test]
    fn a_socket_has_bytes_until_they_are_read_and_a_closed_one_is_an_error_not_a_signal() {
        let (socket, peer) = UnixStream::pair().unwrap();
        let (mut source, mut sink) = stream(socket.into()).unwrap();
        assert!(!source.has_bytes());
        assert_eq!(sink.write(b"ab").unwrap(), 2);
        io::Write::write_all(&mut &peer, b"cd").unwrap();
        assert!(source.has_bytes());
        let mut buffer = [0; 8];
        assert_eq!(source.read(&mut buffer).unwrap(), 2);
        let nothing = source.read(&mut buffer).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        drop(peer);
        assert!(!source.has_bytes());
        assert!(sink.write(b"e").is_err());
    }
}
