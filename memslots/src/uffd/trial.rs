// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a userfaultfd hears of faults inside the kernel, as KVM's are. Nothing shows whether a descriptor was made
//! with `UFFD_USER_MODE_ONLY`, so it is tried: a system call reads a missing page.

use super::sys::poll;
use super::{Modes, OpenError, Uffd, Wake};
use crate::{Backing, Errno, Mapping};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vm_memory::GuestAddress;

/// # Errors
/// [`OpenError::UserModeOnly`], and what else can go wrong.
pub(super) fn hears_of_kernel_faults(uffd: &Uffd) -> Result<(), OpenError> {
    let failed = |call| {
        move |error: io::Error| OpenError::Call {
            call,
            errno: Errno(error.raw_os_error().unwrap_or(libc::EIO)),
        }
    };
    let other = |call| OpenError::Call {
        call,
        errno: Errno(libc::EINVAL),
    };
    let page = Mapping::new(&Backing::anonymous(crate::PAGE_SIZE), GuestAddress(0))
        .map_err(|_| other("mmap of a page"))?;
    let page = Arc::new(page);
    // Gone at the end of this function, and whoever still sleeps on the page with it.
    let registration = uffd
        .register_all(&page, Modes::MISSING)
        .map_err(|_| other("registration of a page"))?;
    let (_reader, writer) = io::pipe().map_err(failed("pipe"))?;
    let (ended, ends) = io::pipe().map_err(failed("pipe"))?;
    let thread = std::thread::Builder::new()
        .name("uffd-trial".into())
        .spawn({
            let page = Arc::clone(&page);
            move || {
                let _ends = ends;
                // SAFETY: one byte of a mapping that lives through the call.
                unsafe { libc::write(writer.as_raw_fd(), page.start().cast(), 1) == 1 }
            }
        })
        .map_err(failed("clone"))?;
    // Either the fault is told, or the thread is refused and ends. No limit is needed: one of the two comes.
    let polled = loop {
        match poll([uffd.as_raw_fd(), ended.as_raw_fd()], None) {
            Err(Errno(libc::EINTR)) => {}
            polled => break polled,
        }
    };
    let told = matches!(polled, Ok([true, _]));
    let filled = registration
        .lend_fill()
        .map_err(|_| other("a role of a page"))
        .and_then(|role| {
            role.zero(0..page.size(), Wake::Now)
                .map_err(|_| other("UFFDIO_ZEROPAGE of a page"))
        });
    // Whatever went wrong, this wakes the thread, and it ends.
    drop(registration);
    let written = thread.join().unwrap_or(false);
    let mut messages = super::Messages::with_capacity(1);
    let _ = uffd.read(&mut messages);
    polled.map_err(|errno| OpenError::Call {
        call: "poll",
        errno,
    })?;
    if !told || !written {
        return Err(OpenError::UserModeOnly);
    }
    filled
}
