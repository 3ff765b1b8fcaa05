// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong, with the values that did.

use std::io;

use memslots::SlotId;

/// Why a call on a dirty log or bitmap failed. A call that fails has lost no bit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A run of pages leaves the bitmap.
    #[error("pages {first}+{count} are beyond a bitmap of {pages} pages")]
    OutOfRange {
        /// The run's first page.
        first: u64,
        /// The run's number of pages.
        count: u64,
        /// What the bitmap covers.
        pages: u64,
    },
    /// Two bitmaps, or a source and its slot, cover different numbers of pages.
    #[error("a bitmap of {got} pages does not fit one of {want} pages")]
    SizeMismatch {
        /// The pages expected.
        want: u64,
        /// The pages given.
        got: u64,
    },
    /// The host refused to hand out the dirty bits of a slot.
    #[error("KVM_GET_DIRTY_LOG of slot {}: {source}", slot.0)]
    GetDirtyLog {
        /// The slot.
        slot: SlotId,
        /// The errno. `ENOENT`: the slot does not log dirty pages (or is gone); `ENXIO`: the VM
        /// uses the dirty ring; `EFAULT`: the slot is larger than its extent says.
        source: io::Error,
    },
    /// No memory for the buffer that the kernel writes into.
    #[error(
        "mapping a dirty-log buffer of {bytes} bytes, which with its guard takes {mapped} of address space: {source}"
    )]
    Buffer {
        /// The buffer's size.
        bytes: u64,
        /// What was to be mapped: with the guard behind it, which is address space alone and for every
        /// buffer as large as the largest one.
        mapped: u64,
        /// What `mmap` or `mprotect` said.
        source: io::Error,
    },
}
