// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that `KVM_GET_DIRTY_LOG` writes into.
//!
//! The ioctl takes a slot number and a pointer, no length: the kernel writes as much as the slot
//! is large *at that moment*. A buffer sized by a caller, or by an extent of a slot that has been
//! deleted and made anew larger, would be overrun by safe-looking code. So the end of the buffer
//! touches a guard:
//!
//! ```text
//!            ┌──────────── readable, writable ───────────┬── PROT_NONE ──────────────┐
//!  mapping   │ slack to the page size │ the words        │ the largest bitmap's size │
//!            └────────────────────────┴──────────────────┴───────────────────────────┘
//!                                     ▲ what the kernel gets
//! ```
//!
//! The guard is as long as the largest bitmap that KVM can write (a slot has at most 2³¹ − 1
//! pages), is address space alone and costs no memory. A wrong size ends in `EFAULT`.

use std::io;
use std::ptr::{self, NonNull};

use memslots::MAX_PAGES;

use crate::Error;
use crate::layout::{PAGE_SIZE, dirty_bitmap_bytes, words_for};

/// Length of the guard, a multiple of the page size.
const GUARD: u64 = dirty_bitmap_bytes(MAX_PAGES).next_multiple_of(PAGE_SIZE);

/// A buffer for the dirty bits of one slot that the kernel cannot overrun.
///
/// Made by [`KvmBitmap`](super::KvmBitmap), or alone for a consumer with an ioctl of its own.
#[derive(Debug)]
pub struct LogBuffer {
    mapping: NonNull<u8>,
    mapped: usize,
    /// From the mapping's start to the first word.
    slack: usize,
    pages: u64,
}

// SAFETY: the mapping belongs to this value alone; nothing about it is tied to a thread.
unsafe impl Send for LogBuffer {}
// SAFETY: a shared reference only reads the words, an exclusive one is needed to write them.
unsafe impl Sync for LogBuffer {}

impl LogBuffer {
    /// A zeroed buffer for a slot of `pages` pages.
    ///
    /// # Errors
    /// [`Error::Buffer`]: `EINVAL` where no slot can have so many pages, `ENOMEM` where the host
    /// refuses the mapping.
    pub fn new(pages: u64) -> Result<Self, Error> {
        let bytes = dirty_bitmap_bytes(pages);
        let data = bytes.next_multiple_of(PAGE_SIZE);
        let mapped = data + GUARD;
        let failed = |source| Error::Buffer {
            bytes,
            mapped,
            source,
        };
        if pages > MAX_PAGES {
            return Err(failed(io::Error::from_raw_os_error(libc::EINVAL)));
        }
        let mapped = mapped as usize;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        // mmap never answers null without MAP_FIXED.
        let Some(mapping) = NonNull::new(base.cast()) else {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOMEM)));
        };
        let buffer = Self {
            mapping,
            mapped,
            slack: (data - bytes) as usize,
            pages,
        };
        // SAFETY: the range is the front of the mapping made above, and nothing refers to it yet.
        let opened =
            unsafe { libc::mprotect(base, data as usize, libc::PROT_READ | libc::PROT_WRITE) };
        if opened != 0 {
            return Err(failed(io::Error::last_os_error())); // and `buffer` unmaps
        }
        Ok(buffer)
    }

    /// How many pages the buffer has bits for.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The bits as the last ioctl left them.
    pub fn words(&self) -> &[u64] {
        // SAFETY: see `first`; shared with `&self`, and whoever writes holds `&mut self`.
        unsafe { std::slice::from_raw_parts(self.first(), words_for(self.pages)) }
    }

    /// The bits, for a fake that stands in for the kernel.
    pub fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as above, and `&mut self` makes the slice the only one.
        unsafe { std::slice::from_raw_parts_mut(self.first(), words_for(self.pages)) }
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u64 {
        self.first()
    }

    /// The first of `words_for(pages)` words: initialised (anonymous memory is zeroed), mapped
    /// readable and writable until drop, and aligned, because the words end at a page boundary.
    fn first(&self) -> *mut u64 {
        // SAFETY: `slack` is less than a page and inside the mapping.
        unsafe { self.mapping.as_ptr().add(self.slack).cast() }
    }
}

impl Drop for LogBuffer {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own and no slice of it outlives the value.
        unsafe { libc::munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_end_where_the_guard_begins() {
        for pages in [1, 63, 64, 65, 4096 * 8, 4096 * 8 + 1, 1_000_000] {
            let mut buffer = LogBuffer::new(pages).unwrap();
            let end = buffer.words_mut().as_ptr_range().end as u64;
            assert_eq!(end % PAGE_SIZE, 0, "{pages} pages");
            assert_eq!(buffer.words().len() as u64 * 8, dirty_bitmap_bytes(pages));
            buffer.words_mut().fill(u64::MAX);
            // A kernel that would write one byte too many gets EFAULT: read(2) of 8 bytes with the
            // last of them in the guard stops there.
            let zero = std::fs::File::open("/dev/zero").unwrap();
            let last = buffer.words_mut().as_mut_ptr_range().end;
            // SAFETY: the kernel checks the destination; at most the buffer's last word is written.
            let got = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), last.cast(), 1) };
            assert_eq!(got, -1);
            assert_eq!(
                io::Error::last_os_error().raw_os_error(),
                Some(libc::EFAULT)
            );
        }
    }

    #[test]
    fn no_slot_has_more_pages_than_kvm_allows() {
        assert!(LogBuffer::new(MAX_PAGES).is_ok());
        assert!(matches!(
            LogBuffer::new(MAX_PAGES + 1),
            Err(Error::Buffer { .. })
        ));
        assert!(LogBuffer::new(u64::MAX).is_err());
    }

    #[test]
    fn what_is_refused_is_told_with_the_guard() {
        let error = LogBuffer::new(u64::MAX).unwrap_err();
        let Error::Buffer { bytes, mapped, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(
            (bytes, mapped - bytes),
            (1 << 61, GUARD),
            "whole pages of words"
        );
        let text = error.to_string();
        assert!(text.contains(&mapped.to_string()), "{text}");
    }
}
