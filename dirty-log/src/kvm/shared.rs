// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory of a bitmap that other processes log into: a memfd, sealed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use crate::Error;
use crate::layout::{PAGE_SIZE, dirty_bitmap_bytes};
use crate::shared::SharedWords;

/// A bitmap over guest physical memory from address 0, in memory that other processes map: what
/// `VHOST_USER_SET_LOG_BASE` is given ([`fd`](Self::fd), [`size`](Self::size), offset 0), and
/// `VHOST_SET_LOG_BASE` ([`address`](Self::address)).
///
/// Its size is sealed: no peer can shrink it under this process's feet. Pages of it take memory when
/// they are first marked.
#[derive(Debug)]
pub struct SharedLog {
    file: OwnedFd,
    start: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: a mapping is no thread's own, and its words are atomics.
unsafe impl Send for SharedLog {}
// SAFETY: as above.
unsafe impl Sync for SharedLog {}

impl SharedLog {
    /// A clean bitmap for the guest frames `0..frames`: up to the end of the highest slot.
    ///
    /// # Errors
    /// [`Error::Shared`].
    pub fn new(frames: u64) -> Result<Self, Error> {
        // Whole pages, since peers map it.
        let bytes = dirty_bitmap_bytes(frames.min(1 << 52))
            .next_multiple_of(PAGE_SIZE)
            .max(PAGE_SIZE);
        let failed = |call| {
            move |source| Error::Shared {
                bytes,
                call,
                source,
            }
        };
        // SAFETY: the name is a C string; the result is checked.
        let fd = unsafe {
            libc::memfd_create(
                c"dirty-log".as_ptr(),
                libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING,
            )
        };
        checked(fd).map_err(failed("memfd_create"))?;
        // SAFETY: the descriptor is new, and nobody else's.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: integers alone.
        checked(unsafe { libc::ftruncate(file.as_raw_fd(), bytes as libc::off_t) })
            .map_err(failed("ftruncate"))?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: integers alone.
        checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })
            .map_err(failed("F_ADD_SEALS"))?;
        // SAFETY: a new mapping at an address of the kernel's choice; the result is checked.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed("mmap")(io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast())
            .ok_or_else(|| failed("mmap")(io::Error::from_raw_os_error(libc::ENOMEM)))?;
        Ok(Self {
            file,
            start,
            bytes: bytes as usize,
        })
    }

    /// The memfd, to be sent to a peer.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes of the bitmap, a multiple of the page size.
    pub const fn size(&self) -> u64 {
        self.bytes as u64
    }

    /// Where it is mapped in this process, for vhost in the kernel.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl SharedWords for SharedLog {
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped for `bytes` until drop, page-aligned, sealed against shrinking, any bytes are a
        // word, and who shares them uses atomics, or harms its own log alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes / 8) }
    }
}

impl Drop for SharedLog {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whole, and nobody borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
