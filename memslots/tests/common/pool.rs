// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Huge pages for a test: a host's root lets the pool of 2 MiB pages grow for a while. The pool is the host's, and tests
//! run as processes beside each other: who has it has it alone.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Lets the pool grow for a while. Nothing is taken from the host but while it is used.
pub struct Overcommit {
    before: Option<String>,
    /// Locked: by another test in this process or in another, no more than one has it.
    _file: Option<File>,
}

impl Overcommit {
    const PATH: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

    /// By this many pages, if this process may. Waits for whoever else has the pool.
    pub fn raise(by: u64) -> Self {
        let Ok(file) = File::open(Self::PATH) else {
            return Self {
                before: None,
                _file: None,
            };
        };
        // SAFETY: a system call on an open descriptor, with integers.
        let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
        assert_eq!(locked, 0, "{}", io::Error::last_os_error());
        let before = std::fs::read_to_string(Self::PATH).unwrap();
        let wanted = before.trim().parse::<u64>().unwrap() + by;
        let raised = std::fs::write(Self::PATH, wanted.to_string());
        Self {
            before: raised.is_ok().then_some(before),
            _file: Some(file),
        }
    }
}

impl Drop for Overcommit {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            std::fs::write(Self::PATH, before.trim()).unwrap();
        }
    }
}
