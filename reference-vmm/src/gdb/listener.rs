// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a debugger finds the guest: a socket that listens, and the peer that came.
//!
//! Who can connect has the guest: its memory, its registers, its life. A Unix socket is therefore its
//! user's alone ([`unix_socket`]); a TCP one is bound to the address that was named and no other, and
//! everybody who reaches that address is let in.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;

use crate::unix_socket::{self, BindError};

/// `unix:PATH` or `tcp:ADDRESS:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket of this path.
    Unix(PathBuf),
    /// A TCP port; port 0 is one that the system chooses.
    Tcp(SocketAddr),
}

/// An address that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?}: unix:PATH or tcp:ADDRESS:PORT is wanted, as unix:/tmp/gdb.sock or tcp:127.0.0.1:1234"
)]
pub struct NoAddress(pub String);

impl FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let none = || NoAddress(text.to_owned());
        match text.split_once(':') {
            // NUL ends a path for the kernel, and at the beginning names no file at all.
            Some(("unix", path)) if !path.is_empty() && !path.contains('\0') => {
                Ok(Address::Unix(path.into()))
            }
            Some(("tcp", address)) => address.parse().map(Address::Tcp).map_err(|_| none()),
            _ => Err(none()),
        }
    }
}

/// As gdb's `target remote` takes it.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => path.display().fmt(f),
            Address::Tcp(address) => address.fmt(f),
        }
    }
}

/// Nobody can be listened for at an address.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// There is something else, which is left alone.
    #[error("--gdb {}: there is something that is no socket; name another path", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens there.
    #[error("--gdb {}: another process listens there; name another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("--gdb {address}: cannot listen there: {source}")]
    Refused {
        /// The address.
        address: Address,
        /// The errno.
        source: io::Error,
    },
}

/// A socket that waits for a debugger. Dropped, it is closed, and a Unix one's file removed.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
}

#[derive(Debug)]
enum Socket {
    Unix(unix_socket::Listener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `address`. A socket that nobody listens at any more, which a killed monitor leaves
    /// behind, is replaced; any other file is left alone.
    ///
    /// # Errors
    /// [`ListenError`]; nothing was made.
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        let refused = |source| ListenError::Refused {
            address: address.clone(),
            source,
        };
        match address {
            Address::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).map_err(refused)?;
                listener.set_nonblocking(true).map_err(refused)?;
                let address = Address::Tcp(listener.local_addr().map_err(refused)?);
                Ok(Listener {
                    socket: Socket::Tcp(listener),
                    address,
                })
            }
            Address::Unix(path) => {
                let path = path.clone();
                // One debugger at a time; who comes beside it waits a little.
                let listener = unix_socket::Listener::bind(&path, 4);
                let listener = listener.map_err(|error| match error {
                    BindError::Occupied => ListenError::Occupied { path },
                    BindError::InUse => ListenError::InUse { path },
                    BindError::Refused(source) => refused(source),
                })?;
                Ok(Listener {
                    socket: Socket::Unix(listener),
                    address: address.clone(),
                })
            }
        }
    }

    /// Where it listens; of TCP with the port that the system chose.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Who has connected; `WouldBlock` where nobody has.
    pub(super) fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Unix(listener) => listener.accept().map(Stream::Unix),
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                // A packet is an answer that somebody waits for.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match &self.socket {
            Socket::Unix(listener) => listener.as_raw_fd(),
            Socket::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}

/// A connected peer. Never blocks.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(buf),
            Stream::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.write(buf),
            Stream::Tcp(stream) => stream.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Stream::Unix(stream) => stream.as_raw_fd(),
            Stream::Tcp(stream) => stream.as_raw_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(folder: &tempfile::TempDir) -> (PathBuf, Address) {
        let path = folder.path().join("gdb.sock");
        (path.clone(), Address::Unix(path))
    }

    #[test]
    fn an_address_is_a_unix_path_or_a_numeric_tcp_address() {
        assert_eq!("unix:/a:b".parse(), Ok(Address::Unix("/a:b".into())));
        for tcp in ["127.0.0.1:1234", "[::1]:0"] {
            let parsed = format!("tcp:{tcp}").parse();
            assert_eq!(parsed, Ok(Address::Tcp(tcp.parse().unwrap())));
        }
        for none in [
            "",
            "unix:",
            "tcp:",
            "tcp::1234",
            "tcp:1234",
            "tcp:localhost:1234",
            "tcp:127.0.0.1",
            "tcp:127.0.0.1:65536",
            "/tmp/x",
            "udp:1",
            "unix:\0x",
        ] {
            let error = none.parse::<Address>().unwrap_err();
            assert!(error.to_string().contains(&format!("{none:?}")), "{error}");
        }
    }

    #[test]
    fn a_unix_socket_is_listened_at_and_its_file_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let (path, address) = unix(&folder);
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(listener.address(), &address);
        let would_block = listener.accept().unwrap_err();
        assert_eq!(would_block.kind(), io::ErrorKind::WouldBlock);
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_there_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, address) = unix(&folder);
        let live = Listener::bind(&address).unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(matches!(error, ListenError::InUse { .. }), "{error}");
        drop(live);
        std::fs::write(&path, "mine").unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(matches!(error, ListenError::Occupied { .. }), "{error}");
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_with_its_length() {
        let address = Address::Unix(format!("/tmp/{}", "x".repeat(200)).into());
        let error = Listener::bind(&address).unwrap_err().to_string();
        assert!(error.contains("205 bytes"), "{error}");
    }
}
