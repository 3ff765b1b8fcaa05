// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Just enough userfaultfd for the doctor's one check: open, register for missing pages, read a
//! fault, place a page. The layer that a pager uses is memslots' to have.
//!
//! Structures and numbers: `linux/userfaultfd.h`; meaning: userfaultfd(2), ioctl_userfaultfd(2).

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// `_IO(0xaa, 0)` on `/dev/userfaultfd`.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
/// `_IOWR(0xaa, …, …)` on the descriptor, each with its structure's size.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
/// What the kernel speaks.
const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
/// `sizeof(struct uffd_msg)`; its first byte is the event, and of a page fault bytes 16 to 23 are
/// the address.
const MESSAGE: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;

/// A userfaultfd that serves the faults of KVM too. Closed, it wakes whoever waits.
#[derive(Debug)]
pub struct Uffd {
    fd: File,
    features: u64,
}

impl Uffd {
    /// Opens one: by the system call, or where that is forbidden, by the device.
    ///
    /// # Errors
    /// What to do about it.
    pub fn open() -> io::Result<Self> {
        // SAFETY: the call takes flags alone and makes a descriptor.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = match i32::try_from(fd) {
            Ok(fd) if fd >= 0 => fd,
            _ => Self::from_device(io::Error::last_os_error())?,
        };
        // SAFETY: just made, and owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut uffd = Self {
            fd: File::from(fd),
            features: 0,
        };
        let mut api = [UFFD_API, 0, 0];
        uffd.ioctl(UFFDIO_API, &mut api)?;
        uffd.features = api[1];
        Ok(uffd)
    }

    fn from_device(refusal: io::Error) -> io::Result<i32> {
        let told = |error: &io::Error| {
            let text = format!(
                "{error}: run as root, or sudo sysctl vm.unprivileged_userfaultfd=1, or give this \
                 user /dev/userfaultfd"
            );
            io::Error::new(error.kind(), text)
        };
        if refusal.kind() != io::ErrorKind::PermissionDenied {
            return Err(refusal);
        }
        let device = File::open("/dev/userfaultfd").map_err(|_| told(&refusal))?;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: this ioctl takes flags as its argument and makes a descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if fd < 0 {
            Err(told(&io::Error::last_os_error()))
        } else {
            Ok(fd)
        }
    }

    /// `UFFD_FEATURE_…` of this kernel.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// From now on a touch of a page in `range` that is not there waits for [`place`](Self::place).
    ///
    /// # Errors
    /// The errno; EINVAL for memory of a kind that cannot be served.
    pub fn register_missing(&self, range: Range<usize>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        self.ioctl(
            UFFDIO_REGISTER,
            &mut [range.start as u64, len as u64, REGISTER_MODE_MISSING, 0],
        )
    }

    /// Waits for a fault for `limit` at most, and returns its address.
    ///
    /// # Errors
    /// What reading the descriptor said.
    pub fn wait(&self, limit: Duration) -> io::Result<Option<usize>> {
        let mut poll = libc::pollfd {
            fd: self.fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, for the length of the call.
        match unsafe { libc::poll(&raw mut poll, 1, limit) } {
            0 => return Ok(None),
            1 => {}
            _ => return Err(io::Error::last_os_error()),
        }
        let mut message = [0; MESSAGE];
        match (&self.fd).read(&mut message) {
            Ok(MESSAGE) => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        let mut address = [0; 8];
        address.copy_from_slice(&message[16..24]);
        Ok((message[0] == EVENT_PAGEFAULT).then_some(u64::from_ne_bytes(address) as usize))
    }

    /// Fills the page at `at` with a copy of `page`, or with zeros, and wakes who waits for it.
    ///
    /// # Errors
    /// The errno; EEXIST where the page is there already.
    pub fn place(&self, at: usize, page: Option<&[u8; 4096]>) -> io::Result<()> {
        let at = at as u64;
        match page {
            Some(page) => self.ioctl(
                UFFDIO_COPY,
                &mut [at, page.as_ptr() as u64, page.len() as u64, 0, 0],
            ),
            None => self.ioctl(UFFDIO_ZEROPAGE, &mut [at, 4096, 0, 0]),
        }
    }

    /// One of the ioctls above, whose structure is nothing but 64-bit words.
    fn ioctl<const WORDS: usize>(
        &self,
        request: libc::c_ulong,
        argument: &mut [u64; WORDS],
    ) -> io::Result<()> {
        // The number holds the structure's size: what the kernel reads and writes.
        debug_assert_eq!((request >> 16 & 0x3fff) as usize, size_of_val(argument));
        // SAFETY: the argument is as long as the request says. Of the calls here only COPY and
        // ZEROPAGE touch other memory, and these only fill pages of a registered range that are
        // not there yet.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument.as_mut_ptr()) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}
