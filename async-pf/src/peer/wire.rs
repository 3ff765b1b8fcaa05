// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connections, as the caller gives them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A connection of bytes, both ways.
///
/// # Contract
/// One thread reads while another writes. A call that does not get on comes back after a [tick](Self::set_tick), or
/// some of it, with [`io::ErrorKind::WouldBlock`] or [`io::ErrorKind::TimedOut`], and has then done nothing: bytes that
/// were taken are said to be. Reading 0 bytes is the end.
pub trait Wire: Send + Sync {
    /// How long a call may stand still. Called once, before any other.
    ///
    /// # Errors
    /// The connection is of no use.
    fn set_tick(&self, tick: Duration) -> io::Result<()>;

    /// Reads some bytes.
    ///
    /// # Errors
    /// As [the trait](Self) says; any other error is the connection's end.
    fn read(&self, into: &mut [u8]) -> io::Result<usize>;

    /// Writes some bytes, and holds none of them back.
    ///
    /// # Errors
    /// As [the trait](Self) says; any other error is the connection's end.
    fn write(&self, from: &[u8]) -> io::Result<usize>;

    /// Ends it, in both directions and for good: calls that wait come back soon.
    fn shutdown(&self);
}

macro_rules! sockets {
    ($($stream:ty),*) => {$(
        impl Wire for $stream {
            fn set_tick(&self, tick: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(tick))?;
                self.set_write_timeout(Some(tick))
            }

            fn read(&self, into: &mut [u8]) -> io::Result<usize> {
                let mut stream = self;
                Read::read(&mut stream, into)
            }

            fn write(&self, from: &[u8]) -> io::Result<usize> {
                let mut stream = self;
                Write::write(&mut stream, from)
            }

            fn shutdown(&self) {
                // One that is not connected any more has ended already.
                let _ = <$stream>::shutdown(self, Shutdown::Both);
            }
        }
    )*};
}

// Of a TCP stream that was accepted, `set_nodelay` is the caller's.
sockets!(UnixStream, TcpStream);

macro_rules! pointers {
    ($($pointer:ty),*) => {$(
        impl<W: Wire + ?Sized> Wire for $pointer {
            fn set_tick(&self, tick: Duration) -> io::Result<()> {
                (**self).set_tick(tick)
            }

            fn read(&self, into: &mut [u8]) -> io::Result<usize> {
                (**self).read(into)
            }

            fn write(&self, from: &[u8]) -> io::Result<usize> {
                (**self).write(from)
            }

            fn shutdown(&self) {
                (**self).shutdown();
            }
        }
    )*};
}

pointers!(Box<W>, Arc<W>, &W);

/// Makes connections to the peer, the first and each that comes after one that broke.
///
/// A closure `Fn(Duration) -> io::Result<Box<dyn Wire>>` is one.
pub trait Connect: Send + Sync {
    /// Connects, within `patience`.
    ///
    /// # Errors
    /// Why there is no connection now. It is tried again ([`Reconnect`](super::Reconnect)).
    fn connect(&self, patience: Duration) -> io::Result<Box<dyn Wire>>;
}

impl<F: Fn(Duration) -> io::Result<Box<dyn Wire>> + Send + Sync> Connect for F {
    fn connect(&self, patience: Duration) -> io::Result<Box<dyn Wire>> {
        self(patience)
    }
}

/// A peer at the path of a Unix socket. Its `connect` waits, without regard to patience, while the listener's queue is full.
#[derive(Clone, Debug)]
pub struct UnixPeer(pub PathBuf);

impl Connect for UnixPeer {
    fn connect(&self, _patience: Duration) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(UnixStream::connect(&self.0)?))
    }
}

/// A peer at a TCP address.
#[derive(Clone, Copy, Debug)]
pub struct TcpPeer(pub SocketAddr);

impl Connect for TcpPeer {
    fn connect(&self, patience: Duration) -> io::Result<Box<dyn Wire>> {
        let stream = TcpStream::connect_timeout(&self.0, patience.max(Duration::from_millis(1)))?;
        // A fault's ask is one small write, and nothing follows that it could wait for.
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}
