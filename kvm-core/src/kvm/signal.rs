// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kick signal: which one, its handler that does nothing, and the doorbell that sends it.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use vmm_sys_util::errno::Error as Errno;

use super::mapping::RunMapping;
use crate::kick::Doorbell;

/// Why a signal cannot be the kick signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KickSignalError {
    /// There is no such signal.
    #[error("{number} is no signal; 1 to {max} are")]
    NoSuchSignal {
        /// The number.
        number: i32,
        /// `SIGRTMAX`.
        max: i32,
    },
    /// Its handler could not be set (`SIGKILL` and `SIGSTOP` have none).
    #[error("no handler can be set for signal {number}: {errno}")]
    Handler {
        /// The number.
        number: i32,
        /// What `sigaction` said.
        errno: Errno,
    },
}

/// The signal that brings a vCPU's thread out of `KVM_RUN`, with a handler in place.
///
/// The handler does nothing: a signal that has one interrupts `KVM_RUN`, and that is all there is to
/// do. It is set without `SA_RESTART`, where the signal had its default action or was ignored
/// (`SIG_IGN` never interrupts). A handler that the consumer set before is left alone. A kick signals only a thread in the guest, so a
/// consumer's handler code is not interrupted by it, but for the rare late one: system calls there
/// treat `EINTR` as usual.
///
/// A real-time signal, the default, needs room in the user's queue of pending signals
/// (`RLIMIT_SIGPENDING`); when there is none the sender yields and tries again. Where that limit may
/// be zero, choose a signal below `SIGRTMIN`: those are never refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KickSignal {
    number: i32,
}

extern "C" fn do_nothing(_: libc::c_int) {}

impl KickSignal {
    /// The signal of this number; its handler is set now, for the process.
    ///
    /// # Errors
    /// [`KickSignalError`].
    pub fn new(number: i32) -> Result<Self, KickSignalError> {
        let max = libc::SIGRTMAX();
        if !(1..=max).contains(&number) {
            return Err(KickSignalError::NoSuchSignal { number, max });
        }
        let failed = || KickSignalError::Handler {
            number,
            errno: Errno::from(io::Error::last_os_error()),
        };
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: only asks; `old` is a sigaction to be written.
        if unsafe { libc::sigaction(number, std::ptr::null(), old.as_mut_ptr()) } != 0 {
            return Err(failed());
        }
        // SAFETY: all zeroes are a valid sigaction, and the call has filled it.
        let old = unsafe { old.assume_init() };
        if old.sa_sigaction == libc::SIG_DFL || old.sa_sigaction == libc::SIG_IGN {
            // SAFETY: all zeroes are a valid sigaction: no flags, an empty mask.
            let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
            new.sa_sigaction = do_nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
            // SAFETY: the handler touches nothing, so it is safe at any moment on any thread.
            if unsafe { libc::sigaction(number, &new, std::ptr::null_mut()) } != 0 {
                return Err(failed());
            }
        }
        Ok(Self { number })
    }

    /// The first real-time signal, `SIGRTMIN`.
    ///
    /// # Errors
    /// [`KickSignalError`].
    pub fn first_real_time() -> Result<Self, KickSignalError> {
        Self::new(libc::SIGRTMIN())
    }

    /// The signal's number.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.number
    }

    /// Lets the signal through on the calling thread: a blocked one would not end `KVM_RUN`.
    pub(super) fn unblock(self) -> Result<(), Errno> {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: `sigemptyset` initialises the set that the others then use; the number was checked
        // in `new`; the mask is the calling thread's own.
        let error = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), self.number);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut())
        };
        if error == 0 {
            Ok(())
        } else {
            Err(Errno::new(error))
        }
    }
}

/// A [`Doorbell`] that is a thread's signal and the vCPU's `immediate_exit`.
#[derive(Debug)]
pub(super) struct ThreadDoorbell {
    run: Arc<RunMapping>,
    signal: KickSignal,
    /// Both 0 until a thread is attached. The process is kept as well, so that a forked child that
    /// inherits the handle signals nobody of its own.
    process: AtomicI32,
    thread: AtomicI32,
}

impl ThreadDoorbell {
    pub(super) fn new(run: Arc<RunMapping>, signal: KickSignal) -> Self {
        Self {
            run,
            signal,
            process: AtomicI32::new(0),
            thread: AtomicI32::new(0),
        }
    }

    /// The calling thread is the vCPU's from now on.
    pub(super) fn attach(&self) -> Result<(), Errno> {
        self.signal.unblock()?;
        // SAFETY: both calls only ask.
        let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
        self.process.store(process, Ordering::Relaxed);
        // Relaxed: who rings has acquired the mode that the thread stored after this (`mode.rs`).
        self.thread.store(thread, Ordering::Relaxed);
        Ok(())
    }
}

impl Doorbell for ThreadDoorbell {
    fn set_immediate_exit(&self, on: bool) {
        self.run.set_immediate_exit(on);
    }

    fn ring(&self) {
        let thread = self.thread.load(Ordering::Relaxed);
        let process = self.process.load(Ordering::Relaxed);
        if thread == 0 {
            return;
        }
        loop {
            // SAFETY: sends a signal that has a handler. tgkill names a thread of one process: if it has
            // ended, that is ESRCH, or (its number taken again meanwhile) a signal to another thread
            // of this process, whose handler does nothing.
            let sent =
                unsafe { libc::syscall(libc::SYS_tgkill, process, thread, self.signal.number()) };
            // EAGAIN: the queue of real-time signals is full (see `KickSignal`). Anything else but
            // success means that the thread has ended, and then nobody waits for it.
            if sent == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN) {
                return;
            }
            std::thread::yield_now();
        }
    }

    fn cpu_time(&self) -> Option<Duration> {
        // Relaxed: one that is just being attached has run nothing yet.
        let thread = self.thread.load(Ordering::Relaxed);
        let clock = thread_clock(thread).filter(|_| thread != 0)?;
        let mut time = MaybeUninit::<libc::timespec>::zeroed();
        // SAFETY: fills a timespec. A thread that has ended has no clock (EINVAL); if its number was taken again by
        // another thread of this process, the time is that one's.
        let told = unsafe { libc::clock_gettime(clock, time.as_mut_ptr()) };
        if told != 0 {
            return None;
        }
        // SAFETY: all zeroes are a valid timespec, and the call has filled it.
        let time = unsafe { time.assume_init() };
        let secs = Duration::from_secs(time.tv_sec.try_into().ok()?);
        Some(secs + Duration::from_nanos(time.tv_nsec.try_into().ok()?))
    }
}

/// The clock of a thread's CPU time, as the kernel numbers it (`MAKE_THREAD_CPUCLOCK` of `posix-timers.h`): what
/// `pthread_getcpuclockid` gives, which wants a thread that is alive.
fn thread_clock(thread: libc::pid_t) -> Option<libc::clockid_t> {
    const PER_THREAD: libc::clockid_t = 4;
    const SCHED: libc::clockid_t = 2;
    (!thread).checked_mul(8).map(|of| of | PER_THREAD | SCHED)
}
