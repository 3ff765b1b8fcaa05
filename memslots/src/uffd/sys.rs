// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`UffdHost`] by the kernel: the edge, with the system calls.

use super::abi::USERFAULTFD_IOC_NEW;
use super::{Call, OpenError, RawMessage, UffdHost};
use crate::{Errno, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// A userfaultfd of the kernel.
#[derive(Debug)]
pub(super) struct Kernel(OwnedFd);

const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;

fn last_errno() -> Errno {
    // The last OS error always has a number.
    Errno(
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO),
    )
}

impl Kernel {
    /// By the system call, or where that is forbidden, by the device.
    pub fn open() -> Result<Self, OpenError> {
        // SAFETY: the call takes flags alone and makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
        let errno = match i32::try_from(fd) {
            // SAFETY: just made, and owned by nobody else.
            Ok(fd) if fd >= 0 => return Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            _ => last_errno(),
        };
        match errno.0 {
            libc::ENOSYS => Err(OpenError::NotThere),
            libc::EPERM | libc::EACCES => {
                Self::from_device().map_err(|error| OpenError::Denied {
                    errno,
                    // An error of the system, which has a number.
                    device: Errno(error.raw_os_error().unwrap_or(libc::EIO)),
                })
            }
            _ => Err(OpenError::Call {
                call: "userfaultfd",
                errno,
            }),
        }
    }

    fn from_device() -> io::Result<Self> {
        let device = File::open("/dev/userfaultfd")?;
        // SAFETY: this ioctl takes flags as its argument and makes a descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, FLAGS) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// One for faults of user mode alone, which any process may have: enough to ask what this kernel can do.
    pub fn open_to_ask() -> Result<Self, OpenError> {
        /// `UFFD_USER_MODE_ONLY`, Linux 5.11.
        const USER_MODE_ONLY: i32 = 1;
        // SAFETY: the call takes flags alone and makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS | USER_MODE_ONLY) };
        match i32::try_from(fd) {
            // SAFETY: just made, and owned by nobody else.
            Ok(fd) if fd >= 0 => Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) })),
            _ => Self::open(),
        }
    }

    /// What a descriptor is, as `/proc` names it.
    pub fn name(descriptor: &OwnedFd) -> io::Result<String> {
        let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        Ok(std::fs::read_link(link)?.to_string_lossy().into_owned())
    }

    /// Takes a descriptor that someone else has opened. From now on it does not block.
    pub fn adopt(descriptor: OwnedFd) -> Result<Self, OpenError> {
        let call = |errno| OpenError::Call {
            call: "fcntl(F_SETFL)",
            errno,
        };
        // SAFETY: an fcntl on an open descriptor without an argument.
        let flags = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(call(last_errno()));
        }
        let flags = flags | libc::O_NONBLOCK;
        // SAFETY: an fcntl on an open descriptor with an integer argument.
        if unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFL, flags) } < 0 {
            return Err(call(last_errno()));
        }
        Ok(Self(descriptor))
    }
}

/// Waits until one of the descriptors can be read or is closed, and says which.
pub(super) fn poll<const N: usize>(
    descriptors: [RawFd; N],
    limit: Option<Duration>,
) -> Result<[bool; N], Errno> {
    let mut polled = descriptors.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // Rounded up, so that a short limit is not none.
    let limit = limit.map_or(-1, |limit| {
        i32::try_from(limit.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    });
    // SAFETY: an array of as many pollfds as are told, for the length of the call.
    match unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, limit) } {
        -1 => Err(last_errno()),
        _ => Ok(polled.map(|polled| polled.revents != 0)),
    }
}

/// [`UffdHost::present`], of a kernel's memory.
pub(super) fn mincore(at: usize, pages: &mut [u8]) -> Result<(), Errno> {
    let length = pages.len() * PAGE_SIZE as usize;
    // SAFETY: it looks at no memory, mapped or not, and writes a byte for each page.
    if unsafe { libc::mincore(at as *mut _, length, pages.as_mut_ptr()) } != 0 {
        return Err(last_errno());
    }
    // The other bits mean nothing yet.
    pages.iter_mut().for_each(|page| *page &= 1);
    Ok(())
}

impl UffdHost for Kernel {
    unsafe fn ioctl(&self, call: Call, argument: &mut [u64]) -> Result<(), Errno> {
        if argument.len() != call.words() {
            return Err(Errno(libc::EINVAL));
        }
        // SAFETY: the argument is as long as the request says; the caller promises what it names.
        let result = unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                call.request() as _,
                argument.as_mut_ptr(),
            )
        };
        if result < 0 {
            Err(last_errno())
        } else {
            Ok(())
        }
    }

    fn read(&self, messages: &mut [RawMessage]) -> Result<usize, Errno> {
        // SAFETY: the buffer is ours for the length of the call, and any bytes are messages.
        let read = unsafe {
            libc::read(
                self.0.as_raw_fd(),
                messages.as_mut_ptr().cast(),
                size_of_val(messages),
            )
        };
        // The kernel reads whole messages.
        usize::try_from(read)
            .map(|bytes| bytes / size_of::<RawMessage>())
            .map_err(|_| last_errno())
    }

    fn wait(&self, limit: Option<Duration>) -> Result<bool, Errno> {
        poll([self.0.as_raw_fd()], limit).map(|[ready]| ready)
    }

    fn wait_or(&self, other: BorrowedFd<'_>, limit: Option<Duration>) -> Result<bool, Errno> {
        poll([self.0.as_raw_fd(), other.as_raw_fd()], limit).map(|[ready, _]| ready)
    }

    fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    unsafe fn claim(&self, descriptor: u32) -> Option<OwnedFd> {
        let descriptor = RawFd::try_from(descriptor).ok()?;
        // SAFETY: the kernel has made it for this process, and as the caller promises nobody owns it yet.
        Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}
