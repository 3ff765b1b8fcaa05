// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`MapError`]: why there is no mapping, with the numbers.

use super::{HugePageSize, HugePool, hugetlb};
use crate::{Errno, Unsupported};
use std::ops::Range;
use thiserror::Error;

/// Why a [`Backing`](crate::Backing) could not be mapped. Nothing is left mapped then. (A mapping of which it was to be
/// a [part](crate::Backing::part), or the consumer's own, is as it was but for what had been chosen of those bytes.)
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum MapError {
    /// No bytes at all.
    #[error("a mapping of 0 bytes")]
    Empty,
    /// More than an address space has.
    #[error("{size:#x} bytes, with what surrounds them, are more than an address space has")]
    TooLarge {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// A range that ends before it begins.
    #[error("a range from {:#x} back to {:#x}", range.start, range.end)]
    Backwards {
        /// The range, in bytes from the start of the mapping.
        range: Range<u64>,
    },
    /// A number that is no multiple of the backing's page size.
    #[error("the {what} {value:#x} is not a multiple of the page size {page_size:#x}")]
    Unaligned {
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The page size of this backing, in bytes.
        page_size: u64,
    },
    /// The file ends before the slot: a touch beyond its end would be a SIGBUS.
    #[error("{size:#x} bytes from offset {offset:#x} of a file that has {length:#x}")]
    BeyondFile {
        /// The offset asked for, in bytes.
        offset: u64,
        /// The size asked for, in bytes.
        size: u64,
        /// The file's length, in bytes.
        length: u64,
    },
    /// The mapping ends before the part of it.
    #[error("{size:#x} bytes from offset {offset:#x} of a mapping that has {length:#x}")]
    BeyondMapping {
        /// The offset asked for, in bytes.
        offset: u64,
        /// The size asked for, in bytes.
        size: u64,
        /// The mapping's length, in bytes.
        length: u64,
    },
    /// A part that is to be merged of a mapping whose contents somebody keeps as they were (`uffd::PointInTime`).
    #[error(
        "pages whose contents are kept as they were cannot be merged until they are not kept any more"
    )]
    MergeableKept,
    /// A shared mapping of a file that was opened for reading only: what a loader writes could not go there.
    #[error(
        "a shared mapping of {size:#x} bytes from offset {offset:#x} of a file that is open for reading only: open it \
         for writing, or map it private (with a read-only slot nothing is copied)"
    )]
    NotWritable {
        /// The offset asked for, in bytes.
        offset: u64,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// A guest_memfd whose memory is the guest's alone.
    #[error(
        "{size:#x} bytes from offset {offset:#x} of a guest_memfd that cannot be mapped: take one that can \
         (Memslots::create_mappable_guest_memfd)"
    )]
    NotMappable {
        /// The offset asked for, in bytes.
        offset: u64,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The kernel has no huge pages of this size.
    #[error(
        "this host has huge pages of {}, and not of {page_size}: {} is missing",
        hugetlb::list(available), page_size.directory()
    )]
    NoHugePageSize {
        /// The size asked for.
        page_size: HugePageSize,
        /// The sizes that it has pools of.
        available: Vec<HugePageSize>,
    },
    /// The pool of huge pages is too small. (Where it is not, or the process may map no more, `ENOMEM` is a
    /// [`MapError::Call`].)
    #[error(
        "{wanted} huge page{} of {page_size} wanted, {}",
        if *wanted == 1 { "" } else { "s" },
        HugePool::describe(*pool, *page_size)
    )]
    NoHugePages {
        /// The page size.
        page_size: HugePageSize,
        /// How many pages were wanted.
        wanted: u64,
        /// The pool's numbers right after the refusal, where sysfs shows them.
        pool: Option<HugePool>,
    },
    /// A NUMA node that is not there or has no memory.
    #[error("NUMA node {node} has no memory here; the nodes that have are {available}")]
    NoSuchNode {
        /// The first such node of the policy.
        node: u32,
        /// Those that have memory, as sysfs lists them.
        available: String,
    },
    /// A policy of no node.
    #[error("a NUMA policy without nodes")]
    NoNodes,
    /// A choice that does not go with this memory.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// Guard pages around a mapping that is not ours to surround.
    #[error("guard pages around a mapping of the consumer's own: it must bring them")]
    GuardedExternal,
    /// Guard pages around a part of a mapping.
    #[error("guard pages around a part of a mapping: the mapping itself is to have them")]
    GuardedPart,
    /// Not all of it could be made present beforehand.
    #[error("{populated:#x} of {size:#x} bytes were made present, then: {errno}")]
    Prefault {
        /// How many bytes surely are; more may be.
        populated: u64,
        /// How many were to be.
        size: u64,
        /// What the kernel said: `ENOMEM`, no memory (or none on the bound nodes, or in the cgroup); `EHWPOISON`, a
        /// page with a hardware error; `EFAULT`, a file that ends early or hugetlb pages that are not there.
        #[source]
        errno: Errno,
    },
    /// Any other refusal.
    #[error("{call} of {size:#x} bytes: {errno}")]
    Call {
        /// The system call.
        call: &'static str,
        /// The size, in bytes.
        size: u64,
        /// What it said.
        #[source]
        errno: Errno,
    },
}
