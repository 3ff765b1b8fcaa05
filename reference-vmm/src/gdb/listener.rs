// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a debugger finds the guest: a socket that listens, and the peer that came.
//!
//! Who can connect has the guest: its memory, its registers, its life. A Unix socket is therefore its
//! user's alone from the moment when it exists (mode 0600, set before it is bound); a TCP one is bound
//! to the address that was named and no other, and everybody who reaches that address is let in.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

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
    Unix {
        listener: UnixListener,
        /// Device and inode of the file, which is removed at the end if it is this one still.
        file: Option<(u64, u64)>,
    },
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
                remove_stale(path)?;
                let listener = bind_private(path).map_err(refused)?;
                let file = fs::symlink_metadata(path).ok();
                Ok(Listener {
                    socket: Socket::Unix {
                        listener,
                        file: file.map(|file| (file.dev(), file.ino())),
                    },
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
            Socket::Unix { listener, .. } => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Stream::Unix(stream))
            }
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
            Socket::Unix { listener, .. } => listener.as_raw_fd(),
            Socket::Tcp(listener) => listener.as_raw_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let (
            Address::Unix(path),
            Socket::Unix {
                file: Some(ours), ..
            },
        ) = (&self.address, &self.socket)
        else {
            return;
        };
        let found = fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()));
        if found.is_ok_and(|found| found == *ours)
            && let Err(error) = fs::remove_file(path)
        {
            log::warn!("cannot remove the socket {}: {error}", path.display());
        }
    }
}

/// Removes a socket that nobody listens at.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let refused = |source| ListenError::Refused {
        address: Address::Unix(path.to_owned()),
        source,
    };
    let file = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(refused)?,
    };
    let path = path.to_owned();
    if !file.file_type().is_socket() {
        return Err(ListenError::Occupied { path });
    }
    // A socket of another type is told apart from one that nobody has, whether it listens or not, and its
    // owner does not notice. One of its own type would be a debugger to it, or would wait in its queue.
    let probe = UnixDatagram::unbound().map_err(refused)?;
    match probe.connect(&path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(&path).map_err(refused)
        }
        // EPROTOTYPE, or it is a datagram socket.
        _ => Err(ListenError::InUse { path }),
    }
}

/// A listening Unix socket whose file is its user's alone from the beginning.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let address = socket_address(path)?;
    // SAFETY: a new descriptor, checked, is owned at once. On Linux the file that bind makes has the
    // permissions of the descriptor's own inode, so they are set before. The address is initialised
    // and as long as is said.
    unsafe {
        let fd = libc::socket(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        if libc::fchmod(fd.as_raw_fd(), 0o600) < 0 {
            return Err(io::Error::last_os_error());
        }
        let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
        if libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) < 0 {
            return Err(io::Error::last_os_error());
        }
        if libc::listen(fd.as_raw_fd(), 4) < 0 {
            let error = io::Error::last_os_error();
            let _ = fs::remove_file(path);
            return Err(error);
        }
        Ok(fd.into())
    }
}

fn socket_address(path: &Path) -> io::Result<libc::sockaddr_un> {
    use std::os::unix::ffi::OsStrExt;
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: all zeros is an address of no family.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // One byte less than there are: the path's end is a zero.
    let room = address.sun_path.len() - 1;
    if bytes.len() > room {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "its path has {} bytes, and a socket's has {room} at most",
                bytes.len()
            ),
        ));
    }
    for (slot, byte) in address.sun_path.iter_mut().zip(bytes) {
        *slot = *byte as libc::c_char;
    }
    Ok(address)
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
    use std::os::unix::fs::PermissionsExt;

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
    fn a_unix_socket_is_its_users_alone_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let (path, address) = unix(&folder);
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(listener.address(), &address);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let would_block = listener.accept().unwrap_err();
        assert_eq!(would_block.kind(), io::ErrorKind::WouldBlock);
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_nobody_listens_at_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let (path, address) = unix(&folder);
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Listener::bind(&address).unwrap();
    }

    #[test]
    fn what_is_there_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, address) = unix(&folder);
        let live = Listener::bind(&address).unwrap();
        assert!(matches!(
            Listener::bind(&address),
            Err(ListenError::InUse { .. })
        ));
        // Who asked was no debugger to it, and does not wait where its queue is full.
        let would_block = live.accept().unwrap_err();
        assert_eq!(would_block.kind(), io::ErrorKind::WouldBlock);
        let queue: Vec<_> = (0..5)
            .map(|_| UnixStream::connect(&path).unwrap())
            .collect();
        assert!(matches!(
            Listener::bind(&address),
            Err(ListenError::InUse { .. })
        ));
        drop((queue, live));

        fs::write(&path, "mine").unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(matches!(error, ListenError::Occupied { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        // A link is not followed, to whatever it leads.
        std::os::unix::fs::symlink(folder.path().join("other"), &path).unwrap();
        let error = Listener::bind(&address).unwrap_err();
        assert!(matches!(error, ListenError::Occupied { .. }), "{error}");
    }

    #[test]
    fn a_file_that_took_the_sockets_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, address) = unix(&folder);
        let listener = Listener::bind(&address).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(listener);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_path_that_is_too_long_is_refused_with_its_length() {
        let address = Address::Unix(format!("/tmp/{}", "x".repeat(200)).into());
        let error = Listener::bind(&address).unwrap_err().to_string();
        assert!(error.contains("205 bytes"), "{error}");
    }
}
