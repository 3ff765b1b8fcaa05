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
    /// No memory for a bitmap.
    #[error("no memory for a bitmap of {pages} pages, {bytes} bytes")]
    Memory {
        /// What it was to cover.
        pages: u64,
        /// Its size.
        bytes: u64,
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
    /// The host refused to forget dirty bits that it had handed out.
    #[error("KVM_CLEAR_DIRTY_LOG of slot {}, pages {first}+{pages}: {source}", slot.0)]
    ClearDirtyLog {
        /// The slot.
        slot: SlotId,
        /// The chunk's first page.
        first: u64,
        /// Its number of pages.
        pages: u64,
        /// The errno. `ENOENT`: the slot does not log dirty pages (or is gone); `EINVAL`: the slot is
        /// smaller than its extent says.
        source: io::Error,
    },
    /// The host refused to watch again the pages that its rings had told. Their bits are kept: no
    /// harvest is handed out before it does.
    #[error("KVM_RESET_DIRTY_RINGS: {source}")]
    ResetRings {
        /// The errno. `EINVAL`: the VM has no dirty rings.
        source: io::Error,
    },
    /// The host said that it had watched pages again, and some ring's entries say it has not. Their
    /// bits are kept: no harvest is handed out before it does.
    #[error(
        "KVM_RESET_DIRTY_RINGS left {left} harvested entries of the ring of vCPU {vcpu} as they were"
    )]
    NotReset {
        /// The vCPU.
        vcpu: u32,
        /// How many.
        left: u32,
    },
    /// KVM says that a ring is full which has nothing in it, again and again: it was overrun, and its vCPU
    /// cannot enter any more. All pages count as dirty.
    #[error(
        "the dirty ring of vCPU {vcpu} is full by KVM's count and empty by its entries: it was overrun, and the vCPU cannot go on; use a larger ring, reap more often, or the bitmap"
    )]
    RingStuck {
        /// The vCPU.
        vcpu: u32,
    },
    /// A dirty ring of a size that KVM takes nowhere.
    #[error("a dirty ring of {entries} entries: it is a power of two, from 1024 to 65536")]
    RingSize {
        /// The size asked for.
        entries: u32,
    },
    /// A dirty ring that is larger than this host's.
    #[error(
        "a dirty ring of {entries} entries: this host's KVM has {most} at most (0: it has no dirty ring)"
    )]
    RingTooLarge {
        /// The size asked for.
        entries: u32,
        /// The host's limit.
        most: u32,
    },
    /// The host's KVM has no manual protect, or not all of it that was asked for.
    #[error(
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with flags {wanted:#x}: this host's KVM has {has:#x}"
    )]
    NoManualProtect {
        /// The flags asked for.
        wanted: u32,
        /// The flags that there are; 0 without the capability.
        has: u32,
    },
    /// The host refused to log in that way.
    #[error("enabling {what}: {source}{}", match source.raw_os_error() {
        Some(22) => " (after the first vCPU, or a second time?)",
        _ => "",
    })]
    Enable {
        /// The capability.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// A ring could not be mapped.
    #[error("mapping the dirty ring of vCPU {vcpu} ({bytes} bytes): {source}")]
    MapRing {
        /// The vCPU.
        vcpu: u32,
        /// The ring's size.
        bytes: u64,
        /// What `mmap` said. `EINVAL`: the VM has no dirty rings, or smaller ones.
        source: io::Error,
    },
    /// The VM's rings are reaped already for this slot, or this vCPU.
    #[error("{what} {number} is with these dirty rings already")]
    Twice {
        /// A slot, or a vCPU.
        what: &'static str,
        /// Its number.
        number: u32,
    },
    /// A log of this process's writes could not be turned on.
    #[error(
        "turning the log of the VMM's writes on: membarrier(2): {source}; a seccomp filter must let it pass"
    )]
    Barrier {
        /// The errno.
        source: io::Error,
    },
    /// A bitmap that other processes share could not be made.
    #[error("a shared dirty bitmap of {bytes} bytes: {call}: {source}")]
    Shared {
        /// Its size.
        bytes: u64,
        /// Which call.
        call: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// A slot does not lie in the guest memory that a shared bitmap is for.
    #[error("slot {} ends at frame {end:#x}, beyond a shared bitmap of {frames:#x} frames", slot.0)]
    BeyondShared {
        /// The slot.
        slot: SlotId,
        /// One past its last frame.
        end: u64,
        /// What the bitmap covers.
        frames: u64,
    },
    /// `PAGEMAP_SCAN` could not be set up, or failed.
    #[error("PAGEMAP_SCAN of pages {first}+{pages}: {source}{}", match source.raw_os_error() {
        Some(25) => " (Linux 6.7 has it)",
        Some(1) => " (a part of it is not registered for asynchronous write-protection)",
        _ => "",
    })]
    Scan {
        /// The part's first page.
        first: u64,
        /// Its number of pages.
        pages: u64,
        /// The errno.
        source: io::Error,
    },
    /// Memory that `PAGEMAP_SCAN` cannot watch.
    #[error("watching {bytes:#x} bytes for writes: {why}")]
    Watch {
        /// The memory's size.
        bytes: u64,
        /// What is in the way.
        why: String,
    },
}
