// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A terminal for the monitor to sit on: the test holds the master side.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    pub master: File,
    pub slave: OwnedFd,
}

impl Pty {
    pub fn new() -> Self {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: both descriptors are written by the call and owned only if it succeeded; no name,
        // settings or size are passed.
        unsafe {
            let done = libc::openpty(
                &mut master,
                &mut slave,
                std::ptr::null_mut(),
                std::ptr::null(),
                std::ptr::null(),
            );
            assert_eq!(done, 0, "openpty: {}", std::io::Error::last_os_error());
            // Not for the processes that other tests start meanwhile.
            for fd in [master, slave] {
                libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            }
            Pty {
                master: File::from_raw_fd(master),
                slave: OwnedFd::from_raw_fd(slave),
            }
        }
    }

    /// A descriptor of the terminal, for the monitor's stdin.
    pub fn terminal(&self) -> OwnedFd {
        self.slave.try_clone().unwrap()
    }

    /// Types on the terminal.
    pub fn type_in(&self, bytes: &[u8]) {
        (&self.master).write_all(bytes).unwrap();
    }

    /// The terminal's settings, as comparable data.
    pub fn settings(&self) -> Settings {
        // SAFETY: a zeroed termios is valid, and the call fills it.
        let termios = unsafe {
            let mut termios: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.slave.as_raw_fd(), &mut termios), 0);
            termios
        };
        Settings {
            flags: [
                termios.c_iflag,
                termios.c_oflag,
                termios.c_cflag,
                termios.c_lflag,
            ],
            characters: termios.c_cc.to_vec(),
        }
    }
}

/// What `tcgetattr` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    flags: [u32; 4],
    characters: Vec<u8>,
}

impl Settings {
    /// Whether the terminal hands on each key as it is typed, without echo, signals and editing.
    pub fn is_raw(&self) -> bool {
        self.flags[3] & (libc::ICANON | libc::ECHO | libc::ISIG) == 0
    }
}
