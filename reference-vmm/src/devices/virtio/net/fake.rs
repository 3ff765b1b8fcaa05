// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A tap for tests: a socket pair, with any errno at any call.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::iovecs::{IoVecs, write_bytes};
use super::tap::{Offload, Tap};

/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A queue of a tap that is none.
#[derive(Debug)]
pub struct FakeTap {
    near: OwnedFd,
    state: Arc<State>,
}

/// The other side of a [`FakeTap`]: the host's network, and its kernel's moods.
#[derive(Debug)]
pub struct Network {
    far: OwnedFd,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    attached: AtomicBool,
    offload: AtomicU32,
    refusals: Mutex<VecDeque<(Call, i32)>>,
    calls: [AtomicU32; 4],
}

/// A call of a [`Tap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`Tap::read`].
    Read,
    /// [`Tap::write`] and [`Tap::write_bytes`].
    Write,
    /// [`Tap::set_attached`].
    Attach,
    /// [`Tap::set_offload`].
    Offload,
}

impl FakeTap {
    /// A queue, and what is behind it.
    ///
    /// # Errors
    /// No descriptors.
    pub fn new() -> io::Result<(FakeTap, Network)> {
        let mut fds = [0; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: room for two descriptors.
        if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: they were just made, and nobody else has them.
        let [near, far] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let state = Arc::new(State {
            attached: AtomicBool::new(true),
            offload: AtomicU32::new(0),
            refusals: Mutex::default(),
            calls: Default::default(),
        });
        let of_tap = state.clone();
        let tap = FakeTap {
            near,
            state: of_tap,
        };
        Ok((tap, Network { far, state }))
    }

    fn refused(&self, call: Call) -> io::Result<()> {
        self.state.calls[call as usize].fetch_add(1, Ordering::SeqCst);
        // SeqCst, here and below: tests compare several of these, and none of it is fast.
        if matches!(call, Call::Read | Call::Write) && !self.state.attached.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EBADFD));
        }
        let refusals = self.state.refusals.lock();
        let mut refusals = refusals.unwrap_or_else(PoisonError::into_inner);
        let at = refusals.iter().position(|(of, _)| *of == call);
        match at.and_then(|at| refusals.remove(at)) {
            Some((_, errno)) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }
}

impl AsRawFd for FakeTap {
    fn as_raw_fd(&self) -> RawFd {
        self.near.as_raw_fd()
    }
}

impl Tap for FakeTap {
    fn read(&self, into: &mut IoVecs<'_>, rest: &mut [u8]) -> io::Result<usize> {
        self.refused(Call::Read)?;
        into.read_from(self.as_raw_fd(), rest)
    }

    fn write(&self, from: &IoVecs<'_>) -> io::Result<usize> {
        self.refused(Call::Write)?;
        from.write_to(self.as_raw_fd())
    }

    fn write_bytes(&self, frame: &[u8]) -> io::Result<usize> {
        self.refused(Call::Write)?;
        write_bytes(self.as_raw_fd(), frame)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.refused(Call::Attach)?;
        self.state.attached.store(attached, Ordering::SeqCst);
        Ok(())
    }

    fn set_offload(&self, offload: Offload) -> io::Result<()> {
        self.refused(Call::Offload)?;
        self.state.offload.store(offload.0, Ordering::SeqCst);
        Ok(())
    }
}

impl Network {
    /// The next call of this kind fails with this errno; the one after it, with the next.
    pub fn refuse(&self, call: Call, errno: i32) {
        let refusals = self.state.refusals.lock();
        let mut refusals = refusals.unwrap_or_else(PoisonError::into_inner);
        refusals.push_back((call, errno));
    }

    /// How many refusals are left.
    pub fn refusals(&self) -> usize {
        let refusals = self.state.refusals.lock();
        refusals.unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How often that was called.
    pub fn calls(&self, call: Call) -> u32 {
        self.state.calls[call as usize].load(Ordering::SeqCst)
    }

    /// Whether the queue is attached.
    pub fn is_attached(&self) -> bool {
        self.state.attached.load(Ordering::SeqCst)
    }

    /// What the guest has taken over.
    pub fn offload(&self) -> Offload {
        Offload(self.state.offload.load(Ordering::SeqCst))
    }

    /// Sends a frame, its header before it; false if there is no room.
    ///
    /// # Errors
    /// The socket's.
    pub fn send(&self, frame: &[u8]) -> io::Result<bool> {
        match write_bytes(self.far.as_raw_fd(), frame) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A frame that the guest has sent, if there is one. There is none when the tap is closed.
    ///
    /// # Errors
    /// The socket's.
    pub fn try_receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut frame = vec![0; 1 << 17];
        match IoVecs::new().read_from(self.far.as_raw_fd(), &mut frame) {
            Ok(0) => Ok(None),
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for a frame of the guest's.
    ///
    /// # Errors
    /// The socket's, none in a minute, and none before the tap is closed.
    pub fn receive(&self) -> io::Result<Vec<u8>> {
        let mut closed = false;
        loop {
            if let Some(frame) = self.try_receive()? {
                return Ok(frame);
            }
            if closed {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut fd = libc::pollfd {
                fd: self.far.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd, which lives through the call.
            if unsafe { libc::poll(&mut fd, 1, PATIENCE.as_millis() as i32) } == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            closed = fd.revents & libc::POLLHUP != 0;
        }
    }
}
