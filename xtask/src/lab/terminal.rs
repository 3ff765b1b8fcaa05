// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! This process's terminal while a command in the lab has it: raw, and always given back as it was.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicPtr, Ordering};

/// What the terminal was before, for the signal handler, which must not lock. Never freed.
static BEFORE: AtomicPtr<libc::termios> = AtomicPtr::new(std::ptr::null_mut());

const STDIN: RawFd = 0;

/// Raw mode of stdin; ends with this value, or with the process.
pub(crate) struct Raw;

impl Raw {
    /// Puts stdin in raw mode, where it is a terminal.
    pub(crate) fn enter() -> Option<Raw> {
        let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the settings when it succeeds, and only then are they read.
        let before = unsafe {
            if libc::tcgetattr(STDIN, settings.as_mut_ptr()) != 0 {
                return None;
            }
            settings.assume_init()
        };
        // Release: pairs with the Acquire of `restore`, which may run in a handler on another thread.
        BEFORE.store(Box::into_raw(Box::new(before)), Ordering::Release);
        for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
            // SAFETY: the handler makes async-signal-safe calls alone.
            unsafe { libc::signal(signal, end_with_signal as *const () as libc::sighandler_t) };
        }
        let mut raw = before;
        // SAFETY: both calls read or write settings that live as long as they do.
        unsafe {
            libc::cfmakeraw(&raw mut raw);
            libc::tcsetattr(STDIN, libc::TCSANOW, &raw const raw);
        }
        Some(Raw)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // Acquire: pairs with the Release of `enter`, so that the settings behind the pointer are seen whole.
    let before = BEFORE.load(Ordering::Acquire);
    if !before.is_null() {
        // SAFETY: the pointer came from a box that is never freed.
        unsafe { libc::tcsetattr(STDIN, libc::TCSANOW, before) };
    }
}

extern "C" fn end_with_signal(signal: libc::c_int) {
    restore();
    // SAFETY: _exit is async-signal-safe. The machine goes with us (PDEATHSIG).
    unsafe { libc::_exit(128 + signal) };
}

/// Rows and columns of stdin's terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let mut window = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes the size, which lives as long as the call.
    let failed = unsafe { libc::ioctl(STDIN, libc::TIOCGWINSZ, &raw mut window) } != 0;
    (!failed).then_some((window.ws_row, window.ws_col))
}
