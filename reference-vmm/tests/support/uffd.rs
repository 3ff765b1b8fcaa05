// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a page-fault handler does, without this project's code.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Puts a page in its place, if none is there.
pub fn copy_page(uffd: &OwnedFd, page: u64, bytes: &[u8; 4096]) {
    // `struct uffdio_copy`, and UFFDIO_COPY.
    let mut copy: [u64; 5] = [page, bytes.as_ptr() as u64, 4096, 0, 0];
    // SAFETY: as many words as the call takes, and the bytes that they name.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc028_aa03, copy.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    assert!(
        done == 0 || error.raw_os_error() == Some(libc::EEXIST),
        "{error}"
    );
}

/// Has whoever touches this page, which is not there, have a memory error.
pub fn poison_page(uffd: &OwnedFd, page: u64) {
    // `struct uffdio_poison`, and UFFDIO_POISON.
    let mut poison: [u64; 4] = [page, 4096, 0, 0];
    // SAFETY: as many words as the call takes.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), 0xc020_aa08, poison.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}
