// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bytes to and from a debugger: buffered both ways, and never waited for past the machine's end.
//!
//! A peer owes nothing: it may send half a packet and no more, read nothing, or go. Each wait is for
//! the peer and for the machine's end at once.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use super::listener::Stream;
use crate::no_wait::ready;

/// So many bytes are gathered before they are sent. gdbstub writes one at a time.
const CHUNK: usize = 4096;

/// A debugger that is connected.
pub(super) struct Peer {
    stream: Stream,
    closing: RawFd,
    input: Vec<u8>,
    /// Those of `input` that were taken.
    taken: usize,
    output: Vec<u8>,
}

/// What a wait ended with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    /// The machine ends.
    Closing,
    /// The first descriptor is ready, or has an error that its use will tell.
    First,
    /// The second is.
    Second,
}

impl Peer {
    /// `closing` is readable once the machine ends; its owner outlives this.
    pub(super) fn new(stream: Stream, closing: RawFd) -> Self {
        Peer {
            stream,
            closing,
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
        }
    }

    /// A byte that has been received already.
    pub(super) fn buffered(&mut self) -> Option<u8> {
        let byte = self.input.get(self.taken).copied()?;
        self.taken += 1;
        Some(byte)
    }

    /// Receives what there is; false where there is nothing now.
    ///
    /// # Errors
    /// The errno of the read, or `UnexpectedEof` where the peer has gone.
    pub(super) fn receive(&mut self) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => {
                self.input.clear();
                self.input.extend(chunk.iter().take(len));
                self.taken = 0;
                Ok(true)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Waits until the peer has sent something, has gone, or `other` is readable.
    pub(super) fn wait(&self, other: Option<RawFd>) -> io::Result<Ready> {
        wait(
            self.closing,
            (self.stream.as_raw_fd(), libc::POLLIN),
            other.map(|other| (other, libc::POLLIN)),
        )
    }
}

impl gdbstub::conn::Connection for Peer {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.output.push(byte);
        match self.output.len() < CHUNK {
            true => Ok(()),
            false => self.flush(),
        }
    }

    fn write_all(&mut self, buf: &[u8]) -> io::Result<()> {
        buf.iter().try_for_each(|byte| self.write(*byte))
    }

    /// Sends what was gathered. Where the peer takes no more, it waits; not once the machine ends, when
    /// the rest is dropped.
    fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while let Some(rest) = self.output.get(sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(len) => sent += len,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => {
                        let fd = (self.stream.as_raw_fd(), libc::POLLOUT);
                        if wait(self.closing, fd, None)? == Ready::Closing {
                            return Err(io::Error::other("the machine ends"));
                        }
                    }
                    _ => return Err(error),
                },
            }
        }
        self.output.clear();
        Ok(())
    }
}

/// Waits until one of the descriptors is ready. `closing` has precedence, then the second: an event
/// comes before what the debugger says to it.
pub(super) fn wait(
    closing: RawFd,
    first: (RawFd, libc::c_short),
    second: Option<(RawFd, libc::c_short)>,
) -> io::Result<Ready> {
    // poll(2) passes over a negative descriptor.
    let second = second.unwrap_or((-1, 0));
    let fds = [(closing, libc::POLLIN), first, second];
    loop {
        let [closing, first, second] = match ready(fds, -1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            ready => ready?,
        };
        match (closing, second, first) {
            (true, ..) => return Ok(Ready::Closing),
            (_, true, _) => return Ok(Ready::Second),
            (_, _, true) => return Ok(Ready::First),
            _ => {}
        }
    }
}
