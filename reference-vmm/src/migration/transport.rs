// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The connections of a migration: Unix sockets and TCP, with TLS or without.
//!
//! ```text
//!   Listener::bind ──► accept ──► Connection ◄── connect
//! ```
//!
//! # No wait without an end
//!
//! A read waits until something comes and a write until there is room, but never longer than the connection's patience
//! ([`Connection::set_patience`], 30 s at first): then it is an error that says so with the seconds. TLS is agreed upon
//! within [`HANDSHAKE`], and who drips a byte now and then is held to a time by who reads
//! ([`link::Watch`](super::link::Watch)). Who is to be able to end a wait early waits a little at a time
//! ([`Listener::caller`], [`TICK`](super::link::TICK)).
//!
//! # Who is at the other end
//!
//! A tunnel passes on what both sides say, and dies alone. So each end has words for the line ([`Connection::line`]) that
//! are the same at both only where there is nobody between: of a Unix socket the host's boot and the inode of the socket's
//! file, of TCP both ports and addresses, and on loopback the host's boot and the network namespace.
//!
//! # Who may connect
//!
//! A Unix socket is its user's alone (mode 0600). TCP without TLS is for this host alone: memory of guests would be there
//! for all to read and to write, so [`Listener::bind`] and [`connect`] refuse an address beyond loopback. With TLS both
//! sides authenticate each other before either has the connection ([`tls`](super::tls)). Who connects and says nothing
//! holds up others who connect for [`HANDSHAKE`] at most.

mod duplex;

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::address::{Address, resolve};
use super::callers::HangUp;
use super::pages::{self, Parts, ReadPages, WritePages, is_fault};
use super::tls::{Session, Tls};
use crate::no_wait::{is_ready, readable};
use crate::unix_socket;

pub use duplex::Both;

/// How long a peer may be silent, unless the connection is told otherwise.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long TLS may take to be agreed upon.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often it is asked meanwhile whether it is wanted still.
const LOOK: Duration = Duration::from_millis(50);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// A TCP peer that is gone is noticed after KEEP_IDLE + KEEP_COUNT * KEEP_INTERVAL seconds.
const KEEP_IDLE: libc::c_int = 10;
const KEEP_INTERVAL: libc::c_int = 5;
const KEEP_COUNT: libc::c_int = 4;

/// One cannot listen there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindError {
    /// Other hosts reach it, and there is no TLS.
    #[error(
        "{0} is within reach of other hosts, and without TLS all of them could read the guest's memory: give --tls-cert, \
         --tls-key and --tls-ca, or take tcp:127.0.0.1:PORT or unix:PATH"
    )]
    Exposed(Address),
    /// The path is not free.
    #[error("{address}: {source}")]
    Unix {
        /// Where.
        address: Address,
        /// Why not.
        source: unix_socket::BindError,
    },
    /// The system or the resolver refused.
    #[error("cannot listen at {address}: {source}")]
    Tcp {
        /// Where.
        address: Address,
        /// The errno.
        source: io::Error,
    },
}

impl BindError {
    /// Whether another address is to be given, whatever becomes of this one; that it is in use is the host's state.
    pub fn is_users_fault(&self) -> bool {
        match self {
            BindError::Exposed(_) => true,
            BindError::Unix { source, .. } => source.is_users_fault(),
            BindError::Tcp { .. } => false,
        }
    }
}

/// Nobody was accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// It was time.
    #[error("nobody has connected to {0} in time")]
    Nobody(Address),
    /// Who connected is not let in; the listener is as good as before.
    #[error("{peer} has connected and is not let in: {source}")]
    Peer {
        /// Who.
        peer: String,
        /// Why not.
        source: io::Error,
    },
    /// The listener's errno.
    #[error("cannot accept connections at {address}: {source}")]
    Listener {
        /// Where.
        address: Address,
        /// The errno.
        source: io::Error,
    },
}

/// There is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Other hosts are on the way, and there is no TLS.
    #[error(
        "{0} is another host, and without TLS those between could read the guest's memory: give --tls-cert, --tls-key and \
         --tls-ca"
    )]
    Exposed(Address),
    /// Nobody listens there: its host, or the file system, says so at once.
    #[error("nobody listens at {0}")]
    Refused(Address),
    /// There is no such socket.
    #[error("nobody listens at {0}: there is no such socket")]
    Missing(Address),
    /// The name has no address, the host cannot be reached, it was too late, or TLS was not agreed upon.
    #[error("{address}: {source}")]
    Failed {
        /// Where.
        address: Address,
        /// Why not.
        source: io::Error,
    },
}

impl ConnectError {
    /// Whether another address, or other words for TLS, are to be given, whatever becomes of this one. That nobody listens
    /// there, or that it cannot be reached, is the hosts' state.
    pub fn is_users_fault(&self) -> bool {
        match self {
            ConnectError::Exposed(_) => true,
            // What is there is no socket, or no certificate can be for that name.
            ConnectError::Failed { source, .. } => source.kind() == io::ErrorKind::InvalidInput,
            ConnectError::Refused(_) | ConnectError::Missing(_) => false,
        }
    }
}

#[derive(Debug)]
enum Socket {
    UnixListener(unix_socket::Listener),
    TcpListener(TcpListener),
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Socket::UnixListener(socket) => socket.as_raw_fd(),
            Socket::TcpListener(socket) => socket.as_raw_fd(),
            Socket::Unix(socket) => socket.as_raw_fd(),
            Socket::Tcp(socket) => socket.as_raw_fd(),
        }
    }
}

/// Waits for connections. Dropped, it is closed, and a Unix socket's file removed.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: Address,
    tls: Option<Tls>,
}

impl Listener {
    /// Listens at `address`. A Unix socket that nobody listens at any more is replaced. The name of a host is asked for up
    /// to 10 s.
    ///
    /// # Errors
    /// [`BindError`]; nothing was made.
    pub fn bind(address: &Address, tls: Option<&Tls>) -> Result<Self, BindError> {
        let failed = |source| BindError::Tcp {
            address: address.clone(),
            source,
        };
        let (socket, address) = match address {
            Address::Unix(path) => {
                let listener = unix_socket::Listener::bind(path, BACKLOG);
                let listener = listener.map_err(|source| BindError::Unix {
                    address: address.clone(),
                    source,
                })?;
                (Socket::UnixListener(listener), address.clone())
            }
            Address::Tcp { host, port } => {
                let soon = Instant::now() + HANDSHAKE;
                let places = resolve(host, *port, soon).map_err(failed)?;
                if tls.is_none() && !places.iter().all(|place| place.ip().is_loopback()) {
                    return Err(BindError::Exposed(address.clone()));
                }
                let listener = TcpListener::bind(&places[..]).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let host = host.clone();
                (Socket::TcpListener(listener), Address::Tcp { host, port })
            }
        };
        Ok(Listener {
            socket,
            address,
            tls: tls.cloned(),
        })
    }

    /// Where, with the port that it has.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether it listens at `address`, by whichever name: of a Unix socket the file there is this one's still. Blocks for as
    /// long as the resolver takes, seconds at most.
    pub(super) fn is_at(&self, address: &Address) -> bool {
        match (&self.socket, address) {
            (Socket::UnixListener(listener), Address::Unix(path)) => match listener.file() {
                Some(file) => {
                    std::fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == file)
                }
                None => self.address == *address,
            },
            (Socket::TcpListener(listener), Address::Tcp { host, port }) => {
                if self.address == *address {
                    return true;
                }
                let deadline = Instant::now() + HANDSHAKE;
                let places = resolve(host, *port, deadline).unwrap_or_default();
                let bound = listener.local_addr();
                // Unknown, it is as most hosts have it.
                let six_alone = six_alone(listener).unwrap_or(false);
                let is_at = |place: &SocketAddr| {
                    bound
                        .as_ref()
                        .is_ok_and(|bound| takes_in(*bound, six_alone, *place))
                };
                places.iter().any(is_at)
            }
            _ => false,
        }
    }

    /// Removes the file of a Unix socket, if it is this one's still. Nobody new finds it then.
    pub(super) fn unlink(&self) {
        if let Socket::UnixListener(listener) = &self.socket {
            listener.unlink();
        }
    }

    /// One more, at another address, for who has the same certificates.
    ///
    /// # Errors
    /// [`BindError`]; nothing was made.
    pub(super) fn another(&self, address: &Address) -> Result<Self, BindError> {
        Listener::bind(address, self.tls.as_ref())
    }

    /// Waits until `deadline` for somebody to connect, and where there is TLS until both sides are authenticated.
    ///
    /// # Errors
    /// [`AcceptError`]; after [`AcceptError::Peer`] it may be called again.
    pub fn accept(&self, deadline: Instant) -> Result<Connection, AcceptError> {
        self.caller(deadline)?.answer(deadline, &|| false)
    }

    /// Waits until `deadline` for somebody to connect.
    ///
    /// # Errors
    /// [`AcceptError`]; after [`AcceptError::Peer`] it may be called again.
    pub fn caller(&self, deadline: Instant) -> Result<Caller, AcceptError> {
        let failed = |source| AcceptError::Listener {
            address: self.address.clone(),
            source,
        };
        let (socket, peer, line) = loop {
            let nobody = match self.accept_now() {
                Ok(accepted) => break accepted,
                Err(error) => error,
            };
            match nobody.kind() {
                // Gone again before it was accepted, or a signal.
                io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock => {}
                _ => return Err(failed(nobody)),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AcceptError::Nobody(self.address.clone()));
            }
            // A millisecond more, so that it is not asked again and again at the end.
            let milliseconds = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
            match is_ready(self.socket.as_raw_fd(), libc::POLLIN, milliseconds) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(failed(error));
                }
                _ => {}
            }
        };
        let session = self.tls.as_ref().map(Tls::accepting).transpose();
        let session = session.map_err(|source| AcceptError::Peer {
            peer: peer.clone(),
            source,
        })?;
        Ok(Caller {
            socket,
            peer,
            line,
            session,
        })
    }

    fn accept_now(&self) -> io::Result<(Socket, String, Option<String>)> {
        match &self.socket {
            Socket::UnixListener(listener) => {
                let stream = listener.accept()?;
                stream.set_nonblocking(false)?;
                let line = listener.file().and_then(line_of_file);
                Ok((Socket::Unix(stream), self.address.to_string(), line))
            }
            Socket::TcpListener(listener) => {
                let (stream, peer) = listener.accept()?;
                stream.set_nonblocking(false)?;
                let line = stream.local_addr().ok();
                let line = line.and_then(|here| tcp_line(peer, here));
                Ok((Socket::Tcp(stream), format!("tcp:{peer}"), line))
            }
            // None of these is made a listener of.
            Socket::Unix(_) | Socket::Tcp(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// Whether who listens at `bound` does so at `place`: all of the host's addresses are one.
fn takes_in(bound: SocketAddr, six_alone: bool, place: SocketAddr) -> bool {
    let (all, wanted) = (bound.ip(), place.ip().to_canonical());
    // `::` has those of IPv4 as well, if it is not of IPv6 alone.
    let same = all.is_ipv4() == wanted.is_ipv4() || all.is_ipv6() && !six_alone;
    let of_all = all.is_unspecified() && same;
    let is_ours = || std::net::UdpSocket::bind((wanted, 0)).is_ok();
    bound == place || of_all && bound.port() == place.port() && is_ours()
}

/// Whether a socket of IPv6 takes no IPv4 (`IPV6_V6ONLY`, ipv6(7)); one of IPv4 is asked in vain.
fn six_alone(listener: &TcpListener) -> io::Result<bool> {
    let (mut only, mut len) = (
        0 as libc::c_int,
        size_of::<libc::c_int>() as libc::socklen_t,
    );
    // SAFETY: the socket is open; both pointers are valid for writes as long as the call, the first of `len` bytes.
    let asked = unsafe {
        libc::getsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_V6ONLY,
            (&raw mut only).cast(),
            &raw mut len,
        )
    };
    match asked {
        0 => Ok(only != 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until somebody has connected to one of two, or `deadline`.
///
/// # Errors
/// [`AcceptError::Listener`].
pub(super) fn wait_for_any(
    listeners: [&Listener; 2],
    deadline: Instant,
) -> Result<(), AcceptError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let milliseconds = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
    let fds = listeners.map(|listener| listener.socket.as_raw_fd());
    let ready = readable(fds, milliseconds);
    ready.map(drop).map_err(|source| AcceptError::Listener {
        address: listeners[0].address.clone(),
        source,
    })
}

/// Somebody who has connected, and need not be one of the two who know each other.
#[derive(Debug)]
pub struct Caller {
    socket: Socket,
    peer: String,
    line: Option<String>,
    session: Option<Session>,
}

impl Caller {
    /// Who it is, for messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The host, as far as it can be told: an address, of IPv6 its network. Who comes by a Unix socket is of this host, which
    /// is no name.
    pub(crate) fn host(&self) -> String {
        let Socket::Tcp(stream) = &self.socket else {
            return String::new();
        };
        match stream.peer_addr().map(|peer| peer.ip().to_canonical()) {
            Ok(IpAddr::V6(ip)) if !ip.is_loopback() => {
                let [a, b, c, d, ..] = ip.segments();
                format!("{a:x}:{b:x}:{c:x}:{d:x}")
            }
            Ok(ip) => ip.to_string(),
            Err(_) => String::new(),
        }
    }

    /// What ends the connection from another thread. Out of descriptors it does nothing.
    pub(crate) fn hang_up(&self) -> HangUp {
        match &self.socket {
            Socket::Unix(stream) => ends(stream.try_clone(), UnixStream::shutdown),
            Socket::Tcp(stream) => ends(stream.try_clone(), TcpStream::shutdown),
            Socket::UnixListener(_) | Socket::TcpListener(_) => Box::new(|| {}),
        }
    }

    /// Waits, where there is TLS, until both sides are authenticated: until `deadline`, no longer than [`HANDSHAKE`], and no
    /// longer than `stop` lets it, which is asked a few times a second.
    ///
    /// # Errors
    /// [`AcceptError::Peer`].
    pub fn answer(
        self,
        deadline: Instant,
        stop: &dyn Fn() -> bool,
    ) -> Result<Connection, AcceptError> {
        let Caller {
            socket,
            peer,
            line,
            session,
        } = self;
        let deadline = deadline.min(Instant::now() + HANDSHAKE);
        let begun = Connection::begin(socket, peer.clone(), line, session, (deadline, stop));
        begun.map_err(|source| AcceptError::Peer { peer, source })
    }
}

fn ends<S: Send + 'static>(
    stream: io::Result<S>,
    shutdown: fn(&S, Shutdown) -> io::Result<()>,
) -> HangUp {
    match stream {
        Ok(stream) => Box::new(move || {
            // One that is not connected any more has ended already.
            let _ = shutdown(&stream, Shutdown::Both);
        }),
        Err(_) => Box::new(|| {}),
    }
}

/// Whether one may connect to `address` with what there is: asks the resolver, and connects to nobody.
///
/// # Errors
/// [`ConnectError`]: another host without TLS, a path at which is something else than a socket, a name that has no address, or whom the certificate is for is not known.
pub(super) fn may_connect(
    address: &Address,
    tls: Option<&Tls>,
    deadline: Instant,
) -> Result<(), ConnectError> {
    let failed = |source| ConnectError::Failed {
        address: address.clone(),
        source,
    };
    let host = match address {
        Address::Unix(path) => {
            unix_socket::may_lead_to_one(path).map_err(failed)?;
            None
        }
        Address::Tcp { host, port } => {
            let places = resolve(host, *port, deadline).map_err(failed)?;
            if tls.is_none() && !places.iter().all(|place| place.ip().is_loopback()) {
                return Err(ConnectError::Exposed(address.clone()));
            }
            Some(host.as_str())
        }
    };
    let session = tls.map(|tls| tls.connecting(host)).transpose();
    session.map(drop).map_err(failed)
}

/// Connects to `address` until `deadline`, and where there is TLS until both sides are authenticated: for that it waits
/// [`HANDSHAKE`] at most.
///
/// # Errors
/// [`ConnectError`].
pub fn connect(
    address: &Address,
    tls: Option<&Tls>,
    deadline: Instant,
) -> Result<Connection, ConnectError> {
    connect_to(address, None, tls, deadline)
}

/// The same, over TCP to `place`, which `address` led to before: nobody is asked where it leads to now.
///
/// # Errors
/// [`ConnectError`]; [`Refused`](ConnectError::Refused) is of that place.
pub(super) fn connect_at(
    address: &Address,
    place: SocketAddr,
    tls: Option<&Tls>,
    deadline: Instant,
) -> Result<Connection, ConnectError> {
    connect_to(address, Some(place), tls, deadline)
}

fn connect_to(
    address: &Address,
    place: Option<SocketAddr>,
    tls: Option<&Tls>,
    deadline: Instant,
) -> Result<Connection, ConnectError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::ConnectionRefused => ConnectError::Refused(address.clone()),
        io::ErrorKind::NotFound if matches!(address, Address::Unix(_)) => {
            ConnectError::Missing(address.clone())
        }
        _ => ConnectError::Failed {
            address: address.clone(),
            source,
        },
    };
    // 0 would be to wait for ever.
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        left.max(Duration::from_millis(1))
    };
    let (socket, host, line) = match address {
        Address::Unix(path) => {
            let stream = unix_socket::connect_within(path, left());
            let stream = stream.map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => {
                    let why = "it accepts nobody";
                    failed(io::Error::new(io::ErrorKind::TimedOut, why))
                }
                _ => failed(error),
            })?;
            (Socket::Unix(stream), None, unix_line(path))
        }
        Address::Tcp { host, port } => {
            let places = match place {
                Some(place) => vec![place],
                None => resolve(host, *port, deadline).map_err(failed)?,
            };
            if tls.is_none() && !places.iter().all(|place| place.ip().is_loopback()) {
                return Err(ConnectError::Exposed(address.clone()));
            }
            let mut stream: io::Result<TcpStream> = Err(io::ErrorKind::NotFound.into());
            for place in &places {
                // One that cannot be reached says more than one that refuses.
                match (TcpStream::connect_timeout(place, left()), &stream) {
                    (Ok(connected), _) => {
                        stream = Ok(connected);
                        break;
                    }
                    (Err(error), Err(earlier))
                        if error.kind() == io::ErrorKind::ConnectionRefused
                            && earlier.kind() != io::ErrorKind::NotFound => {}
                    (Err(error), _) => stream = Err(error),
                }
            }
            let stream = stream.map_err(failed)?;
            let ends = (stream.local_addr().ok(), stream.peer_addr().ok());
            let line = ends.0.zip(ends.1);
            let line = line.and_then(|(here, there)| tcp_line(here, there));
            (Socket::Tcp(stream), Some(host.as_str()), line)
        }
    };
    // That TLS is refused is not that nobody listens.
    let failed = |source| ConnectError::Failed {
        address: address.clone(),
        source,
    };
    let session = tls.map(|tls| tls.connecting(host)).transpose();
    let session = session.map_err(failed)?;
    let deadline = deadline.min(Instant::now() + HANDSHAKE);
    let never = || false;
    let peer = address.to_string();
    Connection::begin(socket, peer, line, session, (deadline, &never)).map_err(failed)
}

/// The line to who listens at this path now.
pub(super) fn unix_line(path: &Path) -> Option<String> {
    let file = std::fs::metadata(path).ok()?;
    line_of_file((file.dev(), file.ino()))
}

/// Of a socket's file, which on one host no other has at the time: a socket keeps its inode, also when the path is gone.
fn line_of_file((device, inode): (u64, u64)) -> Option<String> {
    Some(format!("unix {device}:{inode} {}", boot()?))
}

/// Of who connected, and to where. Loopback is another one in each network namespace.
fn tcp_line(from: SocketAddr, to: SocketAddr) -> Option<String> {
    let place = match from.ip().to_canonical().is_loopback() {
        true => format!("{} {}", boot()?, network()?),
        false => String::new(),
    };
    let [from, to] = [from, to].map(|end| (end.ip().to_canonical(), end.port()));
    Some(format!(
        "tcp {}:{} {}:{} {place}",
        from.0, from.1, to.0, to.1
    ))
}

/// The process at the other end; none of one in another namespace, which has no number here.
fn process(stream: &UnixStream) -> Option<i32> {
    unix_socket::peer(stream).ok().filter(|pid| *pid > 0)
}

/// The host since it was booted.
fn boot() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

fn network() -> Option<String> {
    let name = std::fs::read_link("/proc/self/ns/net").ok()?;
    Some(name.display().to_string())
}

/// A stream to the other side. What is written is on its way at once; with TLS, where the other side takes nothing for as
/// long as is waited, with the next write or flush. A write that fails for want of time has taken nothing. Dropped, it is
/// closed: that all has been sent is the messages' to say.
pub struct Connection {
    wire: Wire,
    session: Option<Session>,
    line: Option<String>,
    /// Something has been read.
    begun: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.wire.peer)
            .field("tls", &self.session.is_some())
            .finish_non_exhaustive()
    }
}

impl Connection {
    fn begin(
        socket: Socket,
        peer: String,
        line: Option<String>,
        session: Option<Session>,
        (deadline, stop): (Instant, &dyn Fn() -> bool),
    ) -> io::Result<Self> {
        if let Socket::Tcp(stream) = &socket {
            stream.set_nodelay(true)?;
            keep_alive(stream)?;
        }
        let mut connection = Connection {
            wire: Wire {
                socket,
                peer,
                patience: PATIENCE,
                deadline: None,
                armed: [None; 2],
            },
            session,
            line,
            begun: false,
        };
        if let Some(session) = &mut connection.session {
            loop {
                let soon = Instant::now() + LOOK;
                connection.wire.deadline = Some(deadline.min(soon));
                match session.handshake(&mut connection.wire) {
                    Ok(()) => break,
                    // As far as it has come by now it goes on from there.
                    Err(error)
                        if error.kind() == io::ErrorKind::TimedOut
                            && session.is_handshaking()
                            && soon < deadline =>
                    {
                        if stop() {
                            let why = "it is not heard any more";
                            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
            connection.wire.deadline = None;
        }
        Ok(connection)
    }

    /// The line as this end sees it: the same as the other end's, if nobody stands between. None where it cannot be told.
    pub fn line(&self) -> Option<&str> {
        self.line.as_deref()
    }

    /// Who has connected: an address, or on this host a process.
    pub fn from(&self) -> String {
        let process = match &self.wire.socket {
            Socket::Unix(stream) => process(stream),
            _ => None,
        };
        process.map_or_else(
            || self.wire.peer.clone(),
            |process| format!("process {process} of this host"),
        )
    }

    /// Where the other end is, over TCP.
    pub(super) fn place(&self) -> Option<SocketAddr> {
        match &self.wire.socket {
            Socket::Tcp(stream) => stream.peer_addr().ok(),
            _ => None,
        }
    }

    /// How long a read may wait for the first byte and a write for room, from now on; at least a millisecond.
    pub fn set_patience(&mut self, patience: Duration) {
        self.wire.patience = patience.max(Duration::from_millis(1));
    }
}

impl Read for Connection {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => session
                .read(&mut self.wire, into)
                .map_err(|error| of_session(error, &self.wire.peer)),
            None => {
                let got = self.wire.read(into)?;
                if got > 0 && !std::mem::replace(&mut self.begun, true) {
                    is_not_tls(&self.wire.socket, into.get(..got).unwrap_or_default())?;
                }
                Ok(got)
            }
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => session
                .write(&mut self.wire, bytes)
                .map_err(|error| of_session(error, &self.wire.peer)),
            None => self.wire.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.session {
            Some(session) => session
                .flush(&mut self.wire)
                .map_err(|error| of_session(error, &self.wire.peer)),
            None => Ok(()),
        }
    }
}

// With TLS it is copied, as it has to be.
impl ReadPages for Connection {
    fn read_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => session
                .read_pages(&mut self.wire, parts)
                .map_err(|error| of_session(error, &self.wire.peer)),
            None => self.wire.read_pages(parts),
        }
    }
}

impl WritePages for Connection {
    fn write_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        match &mut self.session {
            Some(session) => session
                .write_pages(&mut self.wire, parts)
                .map_err(|error| of_session(error, &self.wire.peer)),
            None => self.wire.write_pages(parts),
        }
    }
}

/// Refuses a side that speaks TLS where none is spoken: `first` is what it has said first. Nothing of ours begins as a TLS
/// record does, with its kind and its version.
fn is_not_tls(socket: &Socket, first: &[u8]) -> io::Result<()> {
    const ALERT: u8 = 21;
    const HANDSHAKE: u8 = 22;
    const VERSION: u8 = 3;
    let second = || match first.get(1) {
        Some(second) => Some(*second),
        None => peek(socket),
    };
    let is_record = matches!(first.first(), Some(&(ALERT | HANDSHAKE)));
    if !is_record || second() != Some(VERSION) {
        return Ok(());
    }
    let why = "the other side speaks TLS: give --tls-cert, --tls-key and --tls-ca here as well";
    Err(io::Error::new(io::ErrorKind::InvalidData, why))
}

/// The next byte, if it is there; it stays to be read.
fn peek(socket: &Socket) -> Option<u8> {
    let mut byte = [0];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: an open socket, and one byte that may be written.
    let got = unsafe { libc::recv(socket.as_raw_fd(), byte.as_mut_ptr().cast(), 1, flags) };
    (got == 1).then_some(byte[0])
}

/// With the peer, which the wire's own errors name already.
fn of_session(error: io::Error, peer: &str) -> io::Error {
    let kind = error.kind();
    match kind {
        io::ErrorKind::UnexpectedEof => {
            io::Error::new(kind, format!("the connection with {peer} was cut"))
        }
        io::ErrorKind::InvalidData => io::Error::new(kind, format!("{peer}: {error}")),
        _ => error,
    }
}

/// The socket itself, with its times.
struct Wire {
    socket: Socket,
    peer: String,
    patience: Duration,
    /// Until when reads and writes may wait whatever comes, while TLS is agreed upon.
    deadline: Option<Instant>,
    /// The times that the socket was told, of reads and of writes.
    armed: [Option<Duration>; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

impl Wire {
    /// Tells the socket how long it may wait.
    fn arm(&mut self, way: Way) -> io::Result<()> {
        let mut wait = self.patience;
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.late());
            }
            // The kernel counts microseconds, and 0 is for ever.
            wait = wait.min(left).max(Duration::from_micros(1));
        }
        let armed = match way {
            Way::Read => &mut self.armed[0],
            Way::Write => &mut self.armed[1],
        };
        if *armed == Some(wait) {
            return Ok(());
        }
        let told = match (&self.socket, way) {
            (Socket::Unix(socket), Way::Read) => socket.set_read_timeout(Some(wait)),
            (Socket::Unix(socket), Way::Write) => socket.set_write_timeout(Some(wait)),
            (Socket::Tcp(socket), Way::Read) => socket.set_read_timeout(Some(wait)),
            (Socket::Tcp(socket), Way::Write) => socket.set_write_timeout(Some(wait)),
            (Socket::UnixListener(_) | Socket::TcpListener(_), _) => Ok(()),
        };
        *armed = told.is_ok().then_some(wait);
        told
    }

    fn late(&self) -> io::Error {
        let why = format!("{} is not done in time", self.peer);
        io::Error::new(io::ErrorKind::TimedOut, why)
    }

    /// An error with the peer in it, and with the seconds where it was silent.
    fn explain(&self, error: io::Error, way: Way) -> io::Error {
        let peer = &self.peer;
        let kind = error.kind();
        if kind == io::ErrorKind::Interrupted || is_fault(&error) {
            return error;
        }
        if kind != io::ErrorKind::WouldBlock {
            return io::Error::new(kind, format!("{peer}: {error}"));
        }
        if self.deadline.is_some_and(|at| at <= Instant::now()) {
            return self.late();
        }
        let seconds = self.patience.as_secs_f64();
        let why = match way {
            Way::Read => format!("{peer} has sent nothing for {seconds} s"),
            Way::Write => format!("{peer} has taken nothing for {seconds} s"),
        };
        io::Error::new(io::ErrorKind::TimedOut, why)
    }

    /// Not of nothing, as which the end is read.
    fn read_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        self.arm(Way::Read)?;
        let read = pages::receive(&self.socket, parts);
        read.map_err(|error| self.explain(error, Way::Read))
    }

    fn write_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        self.arm(Way::Write)?;
        let socket = &self.socket;
        let head = parts.head().len();
        let written = match socket {
            // A Unix socket keeps what each call sends for itself, and copies pages that begin at one's beginning a tenth
            // faster, on either side, than behind a head.
            Socket::Unix(_) if (1..parts.len()).contains(&head) => {
                match pages::send(socket, parts.first(head)) {
                    // What is wrong with the rest is said when it is tried again.
                    Ok(sent) if sent == head => {
                        let rest = pages::send(socket, parts.behind(head));
                        Ok(head + rest.unwrap_or(0))
                    }
                    sent => sent,
                }
            }
            _ => pages::send(socket, parts),
        };
        written.map_err(|error| self.explain(error, Way::Write))
    }

    fn write_by(
        &mut self,
        write: impl Fn(&mut dyn Write) -> io::Result<usize>,
    ) -> io::Result<usize> {
        self.arm(Way::Write)?;
        let written = match &self.socket {
            Socket::Unix(socket) => write(&mut &*socket),
            Socket::Tcp(socket) => write(&mut &*socket),
            Socket::UnixListener(_) | Socket::TcpListener(_) => Ok(0),
        };
        written.map_err(|error| self.explain(error, Way::Write))
    }
}

impl Read for Wire {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.arm(Way::Read)?;
        let read = match &self.socket {
            Socket::Unix(socket) => (&*socket).read(into),
            Socket::Tcp(socket) => (&*socket).read(into),
            Socket::UnixListener(_) | Socket::TcpListener(_) => Ok(0),
        };
        read.map_err(|error| self.explain(error, Way::Read))
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_by(|socket| socket.write(bytes))
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.write_by(|socket| socket.write_vectored(pieces))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has the kernel notice a peer that is gone: by questions where nothing is on its way, and by what is not acknowledged.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let gone = 1000 * (KEEP_IDLE + KEEP_COUNT * KEEP_INTERVAL);
    for (level, option, value) in [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEP_IDLE),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEP_INTERVAL),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEP_COUNT),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, gone),
    ] {
        let len = size_of::<libc::c_int>() as libc::socklen_t;
        let value: *const libc::c_int = &value;
        // SAFETY: an open socket, and an initialised int, which is only read.
        let set = unsafe { libc::setsockopt(stream.as_raw_fd(), level, option, value.cast(), len) };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_listens_at_all_addresses_of_a_host_does_so_at_each_and_at_no_other_hosts() {
        let place = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (bound, at, takes) in [
            ("127.0.0.1:9", "127.0.0.1:9", true),
            ("127.0.0.1:9", "127.0.0.2:9", false),
            ("0.0.0.0:9", "127.0.0.1:9", true),
            ("0.0.0.0:9", "127.0.0.1:8", false),
            ("0.0.0.0:9", "[::1]:9", false),
            ("[::]:9", "127.0.0.1:9", true),
            // Of documentation (RFC 5737): no host's.
            ("0.0.0.0:9", "192.0.2.1:9", false),
        ] {
            let (bound, at) = (place(bound), place(at));
            assert_eq!(takes_in(bound, false, at), takes, "{bound} {at}");
            // A host may have `::` be of IPv6 alone.
            let takes = takes && bound.is_ipv4() == at.is_ipv4();
            assert_eq!(takes_in(bound, true, at), takes, "{bound} {at}");
        }
    }
}
