// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which mechanism works on which memory: one table, asked when a VM is configured, so that a pair that the kernel
//! would refuse in the middle of a snapshot is refused at the start, by name.
//!
//! The table is the kernel's: `tests/kvm_matrix.rs` asks the kernel for each cell that the host can show. Where the
//! table says less than the kernel does, a comment at the cell says why.

use std::fmt;
use thiserror::Error;

/// What a mapping is made of, as the kernel's memory management tells kinds apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Private anonymous memory.
    Anonymous,
    /// Shared memory: a memfd, or a file of a tmpfs, mapped shared.
    Shmem,
    /// A memfd or a file of a tmpfs, mapped private (copy-on-write).
    ShmemPrivate,
    /// A file with a page cache, mapped private (copy-on-write).
    FilePrivate,
    /// A file with a page cache, mapped shared.
    FileShared,
    /// Private anonymous hugetlb pages.
    Hugetlb,
    /// Hugetlb pages of a memfd or of a hugetlbfs file, mapped private (copy-on-write).
    HugetlbFilePrivate,
    /// Hugetlb pages of a memfd or of a hugetlbfs file, mapped shared.
    HugetlbShared,
    /// A guest_memfd, of a slot that is bound to it.
    GuestMemfd,
    /// A mapping that the consumer brought: nothing is known of it.
    External,
}

/// What one may want to do with memory that is behind a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Mechanism {
    /// userfaultfd: faults on pages that are not there, and `UFFDIO_COPY` to place them.
    Missing,
    /// userfaultfd: faults on pages that the page cache has and the mapping has not, and `UFFDIO_CONTINUE`.
    Minor,
    /// userfaultfd: faults on writes to protected pages.
    WriteProtect,
    /// userfaultfd: protected pages note their first write and nobody is asked (`UFFD_FEATURE_WP_ASYNC`).
    AsyncWriteProtect,
    /// `UFFDIO_ZEROPAGE`.
    ZeroPage,
    /// `UFFDIO_POISON`.
    Poison,
    /// `UFFDIO_MOVE`.
    Move,
    /// KVM's dirty log or dirty ring (`KVM_MEM_LOG_DIRTY_PAGES`).
    DirtyLog,
    /// A read-only slot (`KVM_MEM_READONLY`).
    ReadOnly,
    /// A slot that moves to another guest address (`KVM_MR_MOVE`).
    Relocate,
    /// Giving pages back so that they read as zeros afterwards.
    Punch,
    /// Transparent huge pages (`MADV_HUGEPAGE`).
    TransparentHugePages,
    /// Handing the memory to another process by its descriptor (vhost-user).
    Share,
    /// Binding to NUMA nodes (`mbind`).
    Numa,
    /// Merging of equal pages (`MADV_MERGEABLE`, KSM).
    Merge,
}

/// The answer of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Support {
    /// It works.
    Yes,
    /// It works where the kernel's userfaultfd has this feature (one bit, `UFFD_FEATURE_…`).
    Feature(u64),
    /// It does not, and why.
    No(&'static str),
    /// Only trying tells.
    Unknown,
}

/// A mechanism that does not work on this kind of memory.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{mechanism} on {kind}: {why}")]
pub struct Unsupported {
    /// The memory.
    pub kind: MemoryKind,
    /// What was wanted of it.
    pub mechanism: Mechanism,
    /// Why not, and what does.
    pub why: &'static str,
}

// `UFFD_FEATURE_…` bits, linux/userfaultfd.h.
const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const MISSING_HUGETLBFS: u64 = 1 << 4;
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_HUGETLBFS: u64 = 1 << 9;
const MINOR_SHMEM: u64 = 1 << 10;
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const POISON: u64 = 1 << 14;
const WP_ASYNC: u64 = 1 << 15;
const MOVE: u64 = 1 << 16;

const NO_MINOR: &str = "there is no page cache that other mappings fill; take a memfd";
const NO_FILE_FAULTS: &str =
    "the kernel serves a file's faults by itself; take anonymous memory or a memfd";
const NO_GUEST_MEMFD: &str = "KVM has no such thing for a guest_memfd";
const ONLY_ANONYMOUS: &str = "only private anonymous pages have it";
const PRIVATE: &str = "it is this process's alone; take a memfd or a shared file";

impl MemoryKind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Anonymous,
        Self::Shmem,
        Self::ShmemPrivate,
        Self::FilePrivate,
        Self::FileShared,
        Self::Hugetlb,
        Self::HugetlbFilePrivate,
        Self::HugetlbShared,
        Self::GuestMemfd,
        Self::External,
    ];

    /// Whether `mechanism` works on memory of this kind.
    pub const fn support(self, mechanism: Mechanism) -> Support {
        use Mechanism as M;
        use MemoryKind as K;
        use Support::{Feature, No, Unknown, Yes};
        match (mechanism, self) {
            (_, K::External) => Unknown,

            (M::Punch, K::GuestMemfd) => Yes,
            (M::Share, K::GuestMemfd) => No("its private pages are the guest's alone"),
            // The calls succeed, and Linux 6.18 asks for neither advice nor policy when it makes a page.
            (M::TransparentHugePages | M::Numa, K::GuestMemfd) => {
                No("KVM makes its pages, ordinary ones, where it likes; take a memfd")
            }
            (_, K::GuestMemfd) => No(NO_GUEST_MEMFD),

            (M::Missing, K::Anonymous) => Yes,
            (M::Missing, K::Shmem | K::ShmemPrivate) => Feature(MISSING_SHMEM),
            (M::Missing, K::Hugetlb | K::HugetlbFilePrivate | K::HugetlbShared) => {
                Feature(MISSING_HUGETLBFS)
            }

            (M::Minor, K::Anonymous) => No(NO_MINOR),
            (M::Minor, K::Shmem) => Feature(MINOR_SHMEM),
            (M::Minor, K::HugetlbShared) => Feature(MINOR_HUGETLBFS),
            // The kernel lets these be registered. UFFDIO_CONTINUE would map the page cache's page into a mapping that
            // is to be copied on write; and private hugetlb pages without a file have no cache for one to be in.
            (M::Minor, K::ShmemPrivate | K::Hugetlb | K::HugetlbFilePrivate) => {
                No("a private mapping has pages of its own; map it shared")
            }

            (M::WriteProtect, K::Anonymous) => Feature(PAGEFAULT_FLAG_WP),
            (
                M::WriteProtect,
                K::Shmem | K::ShmemPrivate | K::Hugetlb | K::HugetlbFilePrivate | K::HugetlbShared,
            ) => Feature(WP_HUGETLBFS_SHMEM),
            (M::AsyncWriteProtect, _) => Feature(WP_ASYNC),

            (M::ZeroPage, K::Anonymous) => Yes,
            (M::ZeroPage, K::Shmem | K::ShmemPrivate) => Feature(MISSING_SHMEM),
            (M::ZeroPage, K::Hugetlb | K::HugetlbFilePrivate | K::HugetlbShared) => {
                No("there is no huge zero page to map; copy zeros")
            }

            (
                M::Poison,
                K::Anonymous
                | K::Shmem
                | K::ShmemPrivate
                | K::Hugetlb
                | K::HugetlbFilePrivate
                | K::HugetlbShared,
            ) => Feature(POISON),

            (M::Move, K::Anonymous) => Feature(MOVE),
            (
                M::Move,
                K::Shmem | K::ShmemPrivate | K::Hugetlb | K::HugetlbFilePrivate | K::HugetlbShared,
            ) => No(ONLY_ANONYMOUS),

            (
                M::Missing | M::Minor | M::WriteProtect | M::ZeroPage | M::Poison | M::Move,
                K::FilePrivate | K::FileShared,
            ) => No(NO_FILE_FAULTS),

            (M::DirtyLog | M::ReadOnly | M::Relocate, _) => Yes,

            (M::Punch, K::FilePrivate | K::ShmemPrivate | K::HugetlbFilePrivate) => {
                No("a page given back reads as the file says, not as zeros; map it shared")
            }
            (M::Punch, _) => Yes,

            (M::TransparentHugePages, K::Anonymous | K::Shmem | K::ShmemPrivate) => Yes,
            (M::TransparentHugePages, K::Hugetlb | K::HugetlbFilePrivate | K::HugetlbShared) => {
                No("its pages are huge already")
            }
            (M::TransparentHugePages, K::FilePrivate | K::FileShared) => {
                No("the file system chooses the pages of its cache")
            }

            (M::Share, K::Shmem | K::FileShared | K::HugetlbShared) => Yes,
            (
                M::Share,
                K::Anonymous
                | K::ShmemPrivate
                | K::FilePrivate
                | K::Hugetlb
                | K::HugetlbFilePrivate,
            ) => No(PRIVATE),

            (M::Numa, K::FileShared) => No("its page cache follows who reads the file first"),
            (M::Numa, _) => Yes,

            (M::Merge, K::Anonymous | K::ShmemPrivate | K::FilePrivate) => Yes,
            (
                M::Merge,
                K::Shmem | K::FileShared | K::Hugetlb | K::HugetlbFilePrivate | K::HugetlbShared,
            ) => No(ONLY_ANONYMOUS),
        }
    }

    /// As [`support`](Self::support), with an error that names the pair; what only a newer kernel or only trying can
    /// tell is no error.
    ///
    /// ```
    /// use memslots::{Mechanism, MemoryKind};
    /// assert!(MemoryKind::Shmem.check(Mechanism::Minor).is_ok());
    /// assert_eq!(
    ///     MemoryKind::Anonymous.check(Mechanism::Minor).unwrap_err().to_string(),
    ///     "minor faults on anonymous memory: there is no page cache that other mappings fill; take a memfd",
    /// );
    /// ```
    ///
    /// # Errors
    /// [`Unsupported`].
    pub const fn check(self, mechanism: Mechanism) -> Result<(), Unsupported> {
        match self.support(mechanism) {
            Support::No(why) => Err(Unsupported {
                kind: self,
                mechanism,
                why,
            }),
            Support::Yes | Support::Feature(_) | Support::Unknown => Ok(()),
        }
    }
}

impl Mechanism {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Missing,
        Self::Minor,
        Self::WriteProtect,
        Self::AsyncWriteProtect,
        Self::ZeroPage,
        Self::Poison,
        Self::Move,
        Self::DirtyLog,
        Self::ReadOnly,
        Self::Relocate,
        Self::Punch,
        Self::TransparentHugePages,
        Self::Share,
        Self::Numa,
        Self::Merge,
    ];
}

impl fmt::Display for MemoryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous memory",
            Self::Shmem => "shared memory (memfd, tmpfs)",
            Self::ShmemPrivate => "a privately mapped memfd or tmpfs file",
            Self::FilePrivate => "a privately mapped file",
            Self::FileShared => "a shared file",
            Self::Hugetlb => "private hugetlb pages",
            Self::HugetlbFilePrivate => "a privately mapped file of hugetlb pages",
            Self::HugetlbShared => "shared hugetlb pages",
            Self::GuestMemfd => "a guest_memfd",
            Self::External => "a mapping of the consumer's own",
        })
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing-page faults",
            Self::Minor => "minor faults",
            Self::WriteProtect => "write-protect faults",
            Self::AsyncWriteProtect => "asynchronous write-protection",
            Self::ZeroPage => "UFFDIO_ZEROPAGE",
            Self::Poison => "UFFDIO_POISON",
            Self::Move => "UFFDIO_MOVE",
            Self::DirtyLog => "the dirty log",
            Self::ReadOnly => "a read-only slot",
            Self::Relocate => "a move of the slot",
            Self::Punch => "giving pages back",
            Self::TransparentHugePages => "transparent huge pages",
            Self::Share => "sharing with another process",
            Self::Numa => "NUMA binding",
            Self::Merge => "merging of equal pages",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_names_the_pair_and_a_reason() {
        for kind in MemoryKind::ALL {
            for mechanism in Mechanism::ALL {
                let Err(refusal) = kind.check(mechanism) else {
                    continue;
                };
                let text = refusal.to_string();
                assert!(
                    text.starts_with(&format!("{mechanism} on {kind}: ")),
                    "{text}"
                );
                assert!(refusal.why.len() > 10, "{text}");
            }
        }
    }

    #[test]
    fn a_feature_is_one_bit() {
        for kind in MemoryKind::ALL {
            for mechanism in Mechanism::ALL {
                if let Support::Feature(bit) = kind.support(mechanism) {
                    assert_eq!(bit.count_ones(), 1, "{mechanism} on {kind}");
                }
            }
        }
    }
}
