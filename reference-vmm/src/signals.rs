// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The signals that ask the monitor to stop, or what the guest is doing, as file descriptors for the
//! event loop: one for the stop signals, one for SIGUSR1 and one for SIGWINCH, which says that the terminal has
//! another size. In one, SIGUSR1 would come before SIGTERM, whose number is higher, for as long as somebody sends it
//! without rest.
//!
//! They are blocked in the main thread before any other thread exists, so that every thread
//! inherits the mask and the signals reach the event loop alone.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Shows the vCPUs' registers; all others stop the guest.
pub const SHOW_REGISTERS: i32 = libc::SIGUSR1;

/// Signals that stop the guest.
const STOPS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// A signalfd for SIGTERM, SIGINT, SIGHUP and SIGQUIT, another for SIGUSR1, and another for SIGWINCH.
#[derive(Debug)]
pub struct Signals {
    stops: OwnedFd,
    shows: OwnedFd,
    resizes: OwnedFd,
}

/// Has a stop signal come once more that was taken, for who looks next.
pub(crate) fn again(signal: i32) {
    // SAFETY: numbers; of this process's own signals none is refused.
    unsafe { libc::kill(libc::getpid(), signal) };
}

impl Signals {
    /// Blocks the signals in this thread and those that it starts from now on, and takes them over.
    /// A signal that was ignored when the process began (`nohup` ignores SIGHUP) stays ignored.
    ///
    /// # Errors
    /// The errno of `signalfd(2)`.
    pub fn take_over() -> io::Result<Self> {
        Ok(Signals {
            stops: take_over(&STOPS)?,
            shows: take_over(&[SHOW_REGISTERS])?,
            resizes: take_over(&[libc::SIGWINCH])?,
        })
    }

    /// The number of a stop signal that has come, `None` when there is none. Does not block.
    pub fn next_stop(&self) -> Option<i32> {
        next(&self.stops)
    }

    /// Whether [`SHOW_REGISTERS`] has come. Does not block. Who sends it without rest makes this true
    /// without end.
    pub fn next_show(&self) -> bool {
        next(&self.shows).is_some()
    }

    /// Whether SIGWINCH has come. Does not block.
    pub fn next_resize(&self) -> bool {
        next(&self.resizes).is_some()
    }

    /// Readable when SIGWINCH has come.
    pub fn resizes(&self) -> RawFd {
        self.resizes.as_raw_fd()
    }

    /// Readable when a stop signal has come.
    pub fn stops(&self) -> RawFd {
        self.stops.as_raw_fd()
    }

    /// Readable when [`SHOW_REGISTERS`] has come.
    pub fn shows(&self) -> RawFd {
        self.shows.as_raw_fd()
    }
}

/// Blocks those of `signals` that are not ignored; a signalfd of them.
fn take_over(signals: &[i32]) -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset takes valid signal numbers; the mask
    // of this thread is changed with a valid set and no interest in the old one; signalfd
    // gets that set, and its result is checked before it is owned.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            if !is_ignored(signal) {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
        }
        let set = set.assume_init();
        let error = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The number of the next signal of a signalfd that does not block.
fn next(fd: &OwnedFd) -> Option<i32> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    // SAFETY: the buffer has the size that is passed; its content is used only after a whole
    // record was read into it.
    unsafe {
        let read = libc::read(
            fd.as_raw_fd(),
            info.as_mut_ptr().cast(),
            size_of::<libc::signalfd_siginfo>(),
        );
        (read == size_of::<libc::signalfd_siginfo>() as isize)
            .then(|| info.assume_init().ssi_signo as i32)
    }
}

/// Keeps SIGUSR1, which asks and does not stop, until [`Signals::take_over`]: for the main thread before
/// there is another. One that is ignored stays so.
pub fn hold_show_registers() {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, sigaddset takes a valid signal number; the mask of this
    // thread is changed with a valid set and no interest in the old one, which cannot fail.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), SHOW_REGISTERS);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: with no new action the call only writes the current one to `action`, which is read
    // only if it succeeded.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// The name of a signal that [`Signals`] takes over.
pub fn name(signal: i32) -> &'static str {
    match signal {
        libc::SIGTERM => "SIGTERM",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGUSR1 => "SIGUSR1",
        _ => "a signal",
    }
}
