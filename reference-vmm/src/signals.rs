// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The signals that ask the monitor to stop, or what the guest is doing, as a file descriptor for the
//! event loop.
//!
//! They are blocked in the main thread before any other thread exists, so that every thread
//! inherits the mask and the signals reach the event loop alone.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Shows the vCPUs' registers; all others stop the guest.
pub const SHOW_REGISTERS: i32 = libc::SIGUSR1;

/// Signals taken over.
const SIGNALS: [i32; 5] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    SHOW_REGISTERS,
];

/// A signalfd for SIGTERM, SIGINT, SIGHUP, SIGQUIT and SIGUSR1.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in this thread and those that it starts from now on, and takes them over.
    /// A signal that was ignored when the process began (`nohup` ignores SIGHUP) stays ignored.
    ///
    /// # Errors
    /// The errno of `signalfd(2)`.
    pub fn take_over() -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set, sigaddset takes valid signal numbers; the mask
        // of this thread is changed with a valid set and no interest in the old one; signalfd
        // gets that set, and its result is checked before it is owned.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in SIGNALS {
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
            Ok(Signals(OwnedFd::from_raw_fd(fd)))
        }
    }

    /// The number of a signal that has come, `None` when there is none. Does not block.
    pub fn next(&self) -> Option<i32> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        // SAFETY: the buffer has the size that is passed; its content is used only after a whole
        // record was read into it.
        unsafe {
            let read = libc::read(
                self.0.as_raw_fd(),
                info.as_mut_ptr().cast(),
                size_of::<libc::signalfd_siginfo>(),
            );
            (read == size_of::<libc::signalfd_siginfo>() as isize)
                .then(|| info.assume_init().ssi_signo as i32)
        }
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
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
