// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`send`] and [`receive`]: the one message, with its descriptor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{MOST_BYTES, Mappings, MappingsError};

/// What a monitor has handed off.
#[derive(Debug)]
#[non_exhaustive]
pub struct HandOff {
    /// Its userfaultfd, negotiated, with the mappings registered; closed on `exec`. That it is one is taken on trust.
    pub userfaultfd: OwnedFd,
    /// Where its guest's memory is.
    pub mappings: Mappings,
}

/// Why nothing was handed off.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandOffError {
    /// The other side took too long.
    #[error("the hand-off was not done within {limit:?}")]
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// It closed in the middle of it.
    #[error("the other side closed after {got} bytes of the hand-off")]
    Closed {
        /// Bytes that had come.
        got: usize,
    },
    /// There came mappings and no descriptor.
    #[error("there came {got} bytes of mappings and no userfaultfd with them")]
    NoDescriptor {
        /// Bytes that had come.
        got: usize,
    },
    /// There came more than one descriptor.
    #[error("there came more descriptors than the userfaultfd")]
    ManyDescriptors,
    /// More than a message may have.
    #[error("a hand-off of more than {MOST_BYTES} bytes")]
    TooLong,
    /// The mappings cannot be.
    #[error(transparent)]
    Mappings(#[from] MappingsError),
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Hands `userfaultfd` off to the handler at the other end of `stream`. Blocks for `limit` at most (to be exact, until
/// the message is in the socket's buffer). Keep the stream for as long as the handler shall see that this process lives.
///
/// The stream's write timeout is `limit` afterwards.
///
/// # Errors
/// [`HandOffError`]. A handler may have the descriptor even so, if the message was cut: do not use the stream again.
pub fn send(
    stream: &UnixStream,
    userfaultfd: impl AsFd,
    mappings: &Mappings,
    limit: Duration,
) -> Result<(), HandOffError> {
    let json = mappings.to_json()?;
    if json.len() > MOST_BYTES {
        return Err(HandOffError::TooLong);
    }
    let end = Instant::now().checked_add(limit);
    stream
        .set_write_timeout(Some(limit.max(Duration::from_millis(1))))
        .map_err(failed("setsockopt(SO_SNDTIMEO)"))?;
    let raw = userfaultfd.as_fd().as_raw_fd();
    let mut sent = 0;
    while let Some(rest) = json.get(sent..).filter(|rest| !rest.is_empty()) {
        // The descriptor goes with the first byte.
        let fds = [raw];
        let fds = if sent == 0 { &fds[..] } else { &[] };
        match stream.send_with_fds(&[rest], fds) {
            Ok(more) => sent += more,
            Err(error) => retry(error.into(), "sendmsg", limit)?,
        }
        if sent < json.len() && end.is_some_and(|end| Instant::now() >= end) {
            return Err(HandOffError::TimedOut { limit });
        }
    }
    Ok(())
}

/// Takes what a monitor hands off through `stream`. Blocks for `limit` at most, whatever the other side does.
///
/// The message has no length before it: it ends where its array does. The stream's read timeout is changed.
///
/// # Errors
/// [`HandOffError`]; what came is closed then.
pub fn receive(stream: &UnixStream, limit: Duration) -> Result<HandOff, HandOffError> {
    let end = Instant::now().checked_add(limit);
    let mut bytes = Vec::new();
    let mut userfaultfd: Option<OwnedFd> = None;
    let mut buffer = [0; 4096];
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(HandOffError::TimedOut { limit });
        }
        stream
            .set_read_timeout(left)
            .map_err(failed("setsockopt(SO_RCVTIMEO)"))?;
        let (got, file) = match stream.recv_with_fd(&mut buffer) {
            Ok(received) => received,
            // Two in one message: they have been closed.
            Err(error) if error.errno() == NO_BUFFERS => return Err(HandOffError::ManyDescriptors),
            Err(error) => {
                retry(error.into(), "recvmsg", limit)?;
                continue;
            }
        };
        if let Some(file) = file {
            // A copy that is closed on exec: recvmsg was not asked for one.
            let copy = OwnedFd::from(file)
                .try_clone()
                .map_err(failed("fcntl(F_DUPFD_CLOEXEC)"))?;
            if userfaultfd.replace(copy).is_some() {
                return Err(HandOffError::ManyDescriptors);
            }
        }
        if got == 0 {
            return Err(HandOffError::Closed { got: bytes.len() });
        }
        bytes.extend_from_slice(buffer.get(..got).unwrap_or_default());
        if bytes.len() > MOST_BYTES {
            return Err(HandOffError::TooLong);
        }
        match Mappings::from_json(&bytes) {
            Err(MappingsError::Json(error)) if error.is_eof() => {}
            Err(error) => return Err(error.into()),
            Ok(mappings) => {
                let got = bytes.len();
                let userfaultfd = userfaultfd.ok_or(HandOffError::NoDescriptor { got })?;
                return Ok(HandOff {
                    userfaultfd,
                    mappings,
                });
            }
        }
    }
}

/// `ENOBUFS`, as vmm-sys-util says that control data was cut.
const NO_BUFFERS: i32 = 105;

fn failed(call: &'static str) -> impl FnOnce(io::Error) -> HandOffError {
    move |source| HandOffError::Call { call, source }
}

/// Whether to try again: after a signal.
fn retry(source: io::Error, call: &'static str, limit: Duration) -> Result<(), HandOffError> {
    match source.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            Err(HandOffError::TimedOut { limit })
        }
        _ => Err(failed(call)(source)),
    }
}
