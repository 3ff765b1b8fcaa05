// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection of which one thread reads while another writes: the form in which pages are asked for.
//!
//! A plain socket can do that by itself. TLS has one state for both directions: it is locked for as long as bytes are
//! turned over, and never while somebody waits for the socket.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Connection, Socket, is_not_tls};
use crate::migration::tls::Session;
use crate::no_wait::is_ready;

/// A [`Connection`] in both directions at once.
pub struct Both {
    socket: Socket,
    session: Option<Mutex<Session>>,
    /// Milliseconds that a call with TLS may stand still.
    tick: AtomicU64,
    /// Something has been read.
    begun: AtomicBool,
}

impl Connection {
    /// The same for two threads.
    pub fn duplex(self) -> Both {
        Both {
            socket: self.wire.socket,
            session: self.session.map(Mutex::new),
            tick: AtomicU64::new(1),
            begun: AtomicBool::new(self.begun),
        }
    }
}

/// The socket, which is asked never to wait.
struct NoWait<'a>(&'a Socket);

impl Read for NoWait<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let (fd, len) = (self.0.as_raw_fd(), into.len());
        // SAFETY: an open socket, and so many bytes that may be written.
        let got = unsafe { libc::recv(fd, into.as_mut_ptr().cast(), len, libc::MSG_DONTWAIT) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }
}

impl Write for NoWait<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let (fd, len) = (self.0.as_raw_fd(), from.len());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: an open socket, and so many bytes, which are only read.
        let sent = unsafe { libc::send(fd, from.as_ptr().cast(), len, flags) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn waits(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    // What a holder that panicked has left is found by the other side.
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Both {
    /// Waits until the socket can be read, or written.
    fn ready(&self, events: libc::c_short) -> io::Result<bool> {
        // Relaxed: it is set before any other call.
        let tick = i32::try_from(self.tick.load(Ordering::Relaxed)).unwrap_or(i32::MAX);
        match is_ready(self.socket.as_raw_fd(), events, tick) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            ready => ready,
        }
    }

    fn read_tls(&self, session: &Mutex<Session>, into: &mut [u8]) -> io::Result<usize> {
        let mut socket = NoWait(&self.socket);
        let mut now = || {
            let mut session = lock(session);
            match session.flush(&mut socket) {
                Err(error) if !waits(&error) => return Err(error),
                _ => {}
            }
            session.read(&mut socket, into)
        };
        match now() {
            Err(error) if waits(&error) && self.ready(libc::POLLIN)? => now(),
            read => read,
        }
    }

    fn write_tls(&self, session: &Mutex<Session>, from: &[u8]) -> io::Result<usize> {
        let mut socket = NoWait(&self.socket);
        let taken = loop {
            // The lock is let go of before anything waits.
            let taken = lock(session).write(&mut socket, from);
            match taken {
                Err(error) if waits(&error) && self.ready(libc::POLLOUT)? => {}
                taken => break taken?,
            }
        };
        // It is taken; what the socket has no room for within a tick goes with the next call in either direction.
        let tick = Duration::from_millis(self.tick.load(Ordering::Relaxed));
        let until = Instant::now() + tick;
        loop {
            let flushed = lock(session).flush(&mut socket);
            match flushed {
                Err(error) if waits(&error) && Instant::now() < until => {
                    self.ready(libc::POLLOUT)?;
                }
                Err(error) if !waits(&error) => return Err(error),
                _ => return Ok(taken),
            }
        }
    }
}

fn read_by(mut socket: impl Read, into: &mut [u8]) -> io::Result<usize> {
    socket.read(into)
}

fn write_by(mut socket: impl Write, from: &[u8]) -> io::Result<usize> {
    socket.write(from)
}

impl async_pf::peer::Wire for Both {
    fn set_tick(&self, tick: Duration) -> io::Result<()> {
        let milliseconds = u64::try_from(tick.as_millis()).unwrap_or(u64::MAX).max(1);
        self.tick.store(milliseconds, Ordering::Relaxed);
        let tick = Some(tick.max(Duration::from_millis(1)));
        match &self.socket {
            Socket::Unix(socket) => {
                socket.set_read_timeout(tick)?;
                socket.set_write_timeout(tick)
            }
            Socket::Tcp(socket) => {
                socket.set_read_timeout(tick)?;
                socket.set_write_timeout(tick)
            }
            Socket::UnixListener(_) | Socket::TcpListener(_) => {
                Err(io::ErrorKind::Unsupported.into())
            }
        }
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        let got = match (&self.session, &self.socket) {
            (Some(session), _) => return self.read_tls(session, into),
            (None, Socket::Unix(socket)) => read_by(socket, into)?,
            (None, Socket::Tcp(socket)) => read_by(socket, into)?,
            (None, _) => 0,
        };
        // Relaxed: one thread reads.
        if got > 0 && !self.begun.swap(true, Ordering::Relaxed) {
            is_not_tls(&self.socket, into.get(..got).unwrap_or_default())?;
        }
        Ok(got)
    }

    fn write(&self, from: &[u8]) -> io::Result<usize> {
        match (&self.session, &self.socket) {
            (Some(session), _) => self.write_tls(session, from),
            (None, Socket::Unix(socket)) => write_by(socket, from),
            (None, Socket::Tcp(socket)) => write_by(socket, from),
            (None, _) => Ok(0),
        }
    }

    fn shutdown(&self) {
        if let Some(session) = &self.session {
            // So that the other side knows that it was not cut off, if there is room for a word.
            lock(session).close(&mut NoWait(&self.socket));
        }
        // SAFETY: an open socket; no pointers. One that is not connected any more has ended already.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
    }
}
