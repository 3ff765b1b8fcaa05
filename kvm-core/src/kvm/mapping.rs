// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `kvm_run`, mapped: who may touch which byte of it.
//!
//! Three parties share these pages: the kernel (only inside `KVM_RUN` of this vCPU, but for
//! `immediate_exit`, which it reads), the vCPU's thread, and whoever kicks. So no reference to the
//! whole of it ever exists. The thread gets a slice that begins behind the bytes that others write,
//! and the kicker gets one atomic byte.
//!
//! ```text
//!   byte 0              1                2…7       8 …                     2 pages
//!        │ request_      │ immediate_     │ padding │ exit area: exit_reason, the union, registers, │
//!        │ interrupt_    │ exit:          │         │ and in the second page (x86) port I/O data    │
//!        │ window        │ AtomicU8       │         │                                               │
//! ```
//!
//! The last page that KVM offers (x86's third), the coalesced MMIO ring, is one for the whole VM and
//! written while other vCPUs run; it is not mapped here (io-bus maps its own).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::errno::Error as Errno;

use crate::exit::{EXIT_AREA_MIN, EXIT_AREA_START};

const REQUEST_INTERRUPT_WINDOW: usize = 0;
const IMMEDIATE_EXIT: usize = 1;
/// `kvm_run` and, on x86, the page of port I/O data (`KVM_PIO_PAGE_OFFSET` is 1). Elsewhere there is
/// none, and the second page, where there is one (arm64), is the coalesced MMIO ring already.
const PAGES: usize = if cfg!(target_arch = "x86_64") { 2 } else { 1 };
const PAGE: usize = 4096;

/// This crate's own mapping of one vCPU's `kvm_run`. Unmapped when the last `Arc` of it goes: the
/// vCPU's, or a kicker's.
#[derive(Debug)]
pub struct RunMapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is a mapping, which is no thread's own. Through `&RunMapping` only the two atomic bytes
// can be reached; the exit area needs the unsafe `exit_area`, whose caller promises to be alone.
unsafe impl Send for RunMapping {}
// SAFETY: as above.
unsafe impl Sync for RunMapping {}

impl RunMapping {
    /// Maps the `kvm_run` of a vCPU. `size` is `KVM_GET_VCPU_MMAP_SIZE`'s answer.
    pub(crate) fn new(vcpu: BorrowedFd<'_>, size: usize) -> Result<Self, Errno> {
        let len = size.min(PAGES * PAGE);
        if len < EXIT_AREA_START + EXIT_AREA_MIN {
            return Err(Errno::new(libc::EINVAL));
        }
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing; the result is
        // checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(Errno::from(io::Error::last_os_error()));
        }
        let start = NonNull::new(start.cast()).ok_or(Errno::new(libc::ENOMEM))?;
        Ok(Self { start, len })
    }

    /// Sets or clears `immediate_exit`.
    ///
    /// Relaxed: what orders it against the signal and against the vCPU's entry is the kernel (a
    /// signal is sent and taken under its locks) and the mode's release and acquire (`mode.rs`).
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        self.byte(IMMEDIATE_EXIT)
            .store(u8::from(on), Ordering::Relaxed);
    }

    pub(crate) fn request_interrupt_window(&self, on: bool) {
        self.byte(REQUEST_INTERRUPT_WINDOW)
            .store(u8::from(on), Ordering::Relaxed);
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        debug_assert!(offset < EXIT_AREA_START);
        // SAFETY: the byte is mapped (`new` checked the length) for as long as `self` lives, and all
        // access to the bytes before the exit area is atomic: no other reference covers them.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) }
    }

    /// The exit area, for the vCPU's thread.
    ///
    /// # Safety
    /// While the slice lives, the caller is not in `KVM_RUN` of this vCPU, no other thread can enter
    /// it, and no other slice of this area exists.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn exit_area(&self) -> &mut [u8] {
        // SAFETY: mapped and initialised (the kernel's pages) for `len` bytes; exclusive by the
        // caller's promise, as the kernel writes the area during KVM_RUN alone.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.start.as_ptr().add(EXIT_AREA_START),
                self.len - EXIT_AREA_START,
            )
        }
    }
}

impl Drop for RunMapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whole, and nobody borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
