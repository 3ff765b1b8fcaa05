// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Backing`]: what memory is to be behind a slot, as a value. Nothing is mapped before a slot is made of it.

use super::{HugePageSize, MapError, Mapping, NumaPolicy};
use crate::guest_memfd::Binding;
use crate::{GuestMemfd, Hva, Mechanism, MemoryKind, PAGE_SIZE};
use std::any::Any;
use std::fmt;
use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// What is behind a slot, how much of it, and how it is to be had.
///
/// | backing | pages | may be shared | what a clone of a snapshot costs |
/// | --- | --- | --- | --- |
/// | [`anonymous`](Self::anonymous) | as touched | no | all that is restored |
/// | [`memfd`](Self::memfd) | as touched | yes | as above |
/// | [`file_private`](Self::file_private) | the page cache's until written | no | what it writes |
/// | [`file_shared`](Self::file_shared) | the page cache's | yes | it is no clone: writes are the file's |
/// | [`hugetlb`](Self::hugetlb), [`hugetlb_memfd`](Self::hugetlb_memfd) | reserved when mapped | the second | all |
/// | [`guest_memfd`](Self::guest_memfd) | as touched | no | all that is restored |
/// | [`part`](Self::part) | the mapping's | as it is | as it is |
/// | [`external`](Self::external) | the consumer's | as it is | as it is |
///
/// ```
/// use memslots::{Backing, HugePages, NumaPolicy};
/// use std::num::NonZeroUsize;
/// let ram = Backing::anonymous(128 << 20)
///     .huge_pages(HugePages::Advise)
///     .numa(NumaPolicy::Preferred(0))
///     .prefault(NonZeroUsize::new(4).ok_or("threads")?)
///     .guarded()
///     .without_core_dump();
/// let shared = Backing::memfd(1 << 20);
/// assert_eq!((ram.size(), ram.page_size()), (128 << 20, 4096));
/// # let _ = shared;
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    pub(super) source: Source,
    pub(super) size: u64,
    pub(super) huge_pages: HugePages,
    pub(super) numa: Option<NumaPolicy>,
    pub(super) prefault: Option<NonZeroUsize>,
    pub(super) guarded: bool,
    pub(super) dump: bool,
    pub(super) fork: bool,
    pub(super) merge: bool,
}

#[derive(Clone)]
pub(super) enum Source {
    Anonymous {
        huge: Option<HugePageSize>,
    },
    Memfd {
        huge: Option<HugePageSize>,
    },
    File {
        file: Arc<File>,
        offset: u64,
        shared: bool,
    },
    GuestMemfd {
        file: GuestMemfd,
        offset: u64,
    },
    Part {
        mapping: Arc<Mapping>,
        offset: u64,
    },
    External {
        start: Hva,
        /// Keeps it mapped.
        owner: Arc<dyn Any + Send + Sync>,
    },
}

/// Whether transparent huge pages serve the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugePages {
    /// As the host is set (`/sys/kernel/mm/transparent_hugepage`). No system call.
    #[default]
    Host,
    /// Asks for them (`MADV_HUGEPAGE`): fewer faults and faster translation, but the first touch of 2 MiB costs 2 MiB.
    Advise,
    /// Asks for none (`MADV_NOHUGEPAGE`): the guest costs what it touches to the page.
    Never,
}

impl Backing {
    const fn new(source: Source, size: u64) -> Self {
        Self {
            source,
            size,
            huge_pages: HugePages::Host,
            numa: None,
            prefault: None,
            guarded: false,
            dump: true,
            fork: true,
            merge: false,
        }
    }

    /// `size` bytes of anonymous, private memory, zero at first, given by the host as it is touched and not reserved
    /// before (`MAP_NORESERVE`): the sum of the guests may exceed the host. If it is large, it lies in the host as it
    /// does in the guest relative to 2 MiB, so that huge pages can serve both translations.
    pub const fn anonymous(size: u64) -> Self {
        Self::new(Source::Anonymous { huge: None }, size)
    }

    /// `size` bytes of a memfd of its own, mapped shared: can be handed to another process (vhost-user) by the region's
    /// [`file_offset`](vm_memory::GuestMemoryRegion::file_offset). Given as it is touched, and placed as
    /// [`anonymous`](Self::anonymous) is. Its size is sealed, so whoever it is handed to cannot shrink it; it is sealed
    /// against execution where the kernel can (6.3).
    pub const fn memfd(size: u64) -> Self {
        Self::new(Source::Memfd { huge: None }, size)
    }

    /// `size` bytes of private memory in hugetlb pages of the host's pool. `size` is a multiple of the page; all pages
    /// are reserved when it is mapped, so that the guest never meets an empty pool (a cgroup's limit on hugetlb usage
    /// is still met by touch: set `hugetlb.….rsvd.max`, which is met here). It lies at a multiple of the page in the
    /// host, so let it do so in the guest, or KVM maps it in small pages.
    pub const fn hugetlb(size: u64, page: HugePageSize) -> Self {
        Self::new(Source::Anonymous { huge: Some(page) }, size)
    }

    /// As [`hugetlb`](Self::hugetlb), in a memfd that can be handed to another process as [`memfd`](Self::memfd)'s.
    pub const fn hugetlb_memfd(size: u64, page: HugePageSize) -> Self {
        Self::new(Source::Memfd { huge: Some(page) }, size)
    }

    /// `size` bytes of `file` from `offset`, both multiples of the page size, copied page by page when they are
    /// written: what clones of one snapshot share. The file may be open for reading only. With a
    /// [read-only slot](crate::SlotFlags::READ_ONLY) it is a ROM, and nothing is copied but what a loader writes.
    ///
    /// Whoever else writes the file changes what is not copied yet, and whoever truncates it turns touches into SIGBUS:
    /// the file is to be left alone (or a memfd sealed against it). Of the userfaultfd mechanisms none works on it;
    /// see [`MemoryKind`](crate::MemoryKind).
    pub fn file_private(file: impl Into<Arc<File>>, offset: u64, size: u64) -> Self {
        let (file, shared) = (file.into(), false);
        let source = Source::File {
            file,
            offset,
            shared,
        };
        Self::new(source, size)
    }

    /// `size` bytes of `file` from `offset`, both multiples of the page size (of the huge page on a hugetlbfs), mapped
    /// shared: the guest writes the file. The file is open for reading and writing. That others do not truncate it is
    /// the caller's care, as with [`file_private`](Self::file_private).
    pub fn file_shared(file: impl Into<Arc<File>>, offset: u64, size: u64) -> Self {
        let (file, shared) = (file.into(), true);
        let source = Source::File {
            file,
            offset,
            shared,
        };
        Self::new(source, size)
    }

    /// `size` bytes of `file`, a [mappable](GuestMemfd::is_mappable) guest_memfd, from `offset` on, both multiples of
    /// [`PAGE_SIZE`]. Given as it is touched. A slot made of it is bound to the same bytes (`KVM_MEM_GUEST_MEMFD`): KVM asks
    /// the file for what the guest touches, and not this process's page tables, so a page that the guest alone has touched is
    /// mapped nowhere here and counts as nobody's resident memory until this process touches it too (or a KVM that
    /// interprets the guest, which goes by the mapping).
    ///
    /// It is never swapped or moved, and of what can be done with other memory it has little: no dirty log, no read-only
    /// slot, no userfaultfd, no huge pages, no NUMA node ([`MemoryKind`]). Pages can be given back.
    pub fn guest_memfd(file: &GuestMemfd, offset: u64, size: u64) -> Self {
        let file = file.clone();
        Self::new(Source::GuestMemfd { file, offset }, size)
    }

    /// `size` bytes of `mapping` from `offset`, both multiples of [`PAGE_SIZE`] (and not more, even of huge pages): what
    /// several slots are cut from one [`Mapping`] with, each with flags of its own. The mapping goes with the last of
    /// them, and is of the same kind and in the same pages for each. Cut from the memory of a
    /// [`guest_memfd`](Self::guest_memfd), each slot is bound to its own bytes of the file, of which no two slots may have
    /// any in common.
    ///
    /// So the firmware in the last 64 KiB of a page of 1 GiB is a read-only slot, and what is below it is RAM:
    /// ```
    /// use memslots::{Backing, Mapping, Memslots, NewSlot, SlotFlags, fake::FakeHost};
    /// use std::sync::Arc;
    /// use vm_memory::GuestAddress;
    ///
    /// let memory = Arc::new(Mapping::new(&Backing::anonymous(1 << 20), GuestAddress(0))?);
    /// let rom = (1 << 20) - (64 << 10);
    /// let memslots = Memslots::new(FakeHost::new(8));
    /// let slot = |start, size, flags| NewSlot {
    ///     start: GuestAddress(start), backing: Backing::part(&memory, start, size), flags,
    /// };
    /// let slots = memslots.create_all([
    ///     slot(0, rom, SlotFlags::NONE),
    ///     slot(rom, 64 << 10, SlotFlags::READ_ONLY),
    /// ])?;
    /// assert_eq!(slots[0].extent().host_range().end, slots[1].extent().host_start().0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    /// A huge page serves both translations only where the guest address and the offset are congruent modulo its size,
    /// and only a whole one that lies in one slot can be punched, registered with a userfaultfd, or prefaulted. Nothing
    /// keeps parts of different slots from having bytes in common: each slot has a dirty log, a bitmap and permissions
    /// of its own, and none hears of what is written through another, or punched: who lets slots have bytes in common
    /// marks and invalidates them for all. What else can be chosen of a backing is asked for of these bytes of the
    /// mapping, except for guard pages, which it has or has not. It stays with them when the slot is gone; and where one
    /// of the calls is refused there is no slot, but what was chosen before it stays as well, for the kernel does not
    /// tell what was before. None of it changes what the bytes contain.
    pub fn part(mapping: &Arc<Mapping>, offset: u64, size: u64) -> Self {
        let mapping = Arc::clone(mapping);
        Self::new(Source::Part { mapping, offset }, size)
    }

    /// `size` bytes that the consumer has mapped at `start` (both multiples of the page size), and that `owner` keeps
    /// mapped: it is dropped when nobody uses the memory any more.
    ///
    /// # Safety
    /// For as long as `owner` exists, the range is mapped readable and writable, and it is memory that is the guest's to
    /// read and write: nobody accesses it but by volatile or atomic accesses, and nothing's safety rests on what it
    /// contains.
    pub unsafe fn external(start: Hva, size: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self::new(Source::External { start, owner }, size)
    }

    /// The same with a choice about transparent huge pages.
    #[must_use]
    pub const fn huge_pages(mut self, choice: HugePages) -> Self {
        self.huge_pages = choice;
        self
    }

    /// The same from certain NUMA nodes.
    #[must_use]
    pub fn numa(mut self, policy: NumaPolicy) -> Self {
        self.numa = Some(policy);
        self
    }

    /// The same, all of it made present when it is mapped, by this many threads: the guest has no page faults later, and
    /// a pool of huge pages or a node that has not enough says so now. (Of ordinary memory Linux says so to nobody: it
    /// kills a process, perhaps this one, so ask `/proc/meminfo` for `MemAvailable` first.) Private files are read in and
    /// not copied. It takes time: about half a
    /// second for each GiB and thread in pages of 4 KiB (measured).
    #[must_use]
    pub const fn prefault(mut self, threads: NonZeroUsize) -> Self {
        self.prefault = Some(threads);
        self
    }

    /// The same, touched by nobody before the guest: for who only wants to know whether it can be had.
    #[must_use]
    pub const fn without_prefault(mut self) -> Self {
        self.prefault = None;
        self
    }

    /// The same between two pages that nobody can touch, so that a run beyond its end, in this process or in a device
    /// that is given its addresses, is a SIGSEGV and not another mapping's contents. Costs one `mmap`, two pages of
    /// address space and no memory; and two more of the process's mappings, of which the kernel allows 65,530
    /// (`vm.max_map_count`): fine for RAM, too much for tens of thousands of slots, and so not the default.
    #[must_use]
    pub const fn guarded(mut self) -> Self {
        self.guarded = true;
        self
    }

    /// The same left out of core dumps (`MADV_DONTDUMP`): a crash of the VMM writes no guest's memory to the disk.
    #[must_use]
    pub const fn without_core_dump(mut self) -> Self {
        self.dump = false;
        self
    }

    /// The same not there in children made by `fork` (`MADV_DONTFORK`): no copy-on-write of guest memory while a child
    /// gets to its `exec`.
    #[must_use]
    pub const fn without_fork(mut self) -> Self {
        self.fork = false;
        self
    }

    /// The same offered for the merging of equal pages (`MADV_MERGEABLE`, KSM). Between tenants that do not trust each
    /// other, merged pages tell by their timing who has what. Such memory cannot be kept as it was at one moment
    /// (`uffd::PointInTime`).
    #[must_use]
    pub const fn mergeable(mut self) -> Self {
        self.merge = true;
        self
    }

    /// The size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The size in bytes of the pages that it asks for. A file on a hugetlbfs has that one's, which only
    /// [`Mapping::page_size`](crate::Mapping::page_size) tells.
    pub fn page_size(&self) -> u64 {
        match &self.source {
            Source::Anonymous { huge: Some(page) } | Source::Memfd { huge: Some(page) } => {
                page.bytes()
            }
            Source::Part { mapping, .. } => mapping.page_size(),
            _ => PAGE_SIZE,
        }
    }
}

impl Backing {
    /// What a slot made of it is bound to. Of a part beyond its mapping it is one that is refused.
    pub(crate) fn guest_memfd_binding(&self) -> Option<Binding> {
        match &self.source {
            Source::GuestMemfd { file, offset } => Some(Binding {
                file: file.clone(),
                offset: *offset,
            }),
            Source::Part { mapping, offset } => {
                mapping.guest_memfd().map(|(file, start)| Binding {
                    file: file.clone(),
                    offset: start.saturating_add(*offset),
                })
            }
            _ => None,
        }
    }

    /// Whether what is asked for goes with memory of this kind.
    pub(super) fn check_choices(&self, kind: MemoryKind) -> Result<(), MapError> {
        if self.numa.is_some() {
            kind.check(Mechanism::Numa)?;
        }
        if self.huge_pages == HugePages::Advise {
            kind.check(Mechanism::TransparentHugePages)?;
        }
        if self.merge {
            kind.check(Mechanism::Merge)?;
        }
        Ok(())
    }
}

/// The same kind; files, mappings and external ones, the same one.
impl PartialEq for Source {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Anonymous { huge: a }, Self::Anonymous { huge: b })
            | (Self::Memfd { huge: a }, Self::Memfd { huge: b }) => a == b,
            (
                Self::File {
                    file: a,
                    offset: at_a,
                    shared: shared_a,
                },
                Self::File {
                    file: b,
                    offset: at_b,
                    shared: shared_b,
                },
            ) => Arc::ptr_eq(a, b) && (at_a, shared_a) == (at_b, shared_b),
            (
                Self::Part {
                    mapping: a,
                    offset: at_a,
                },
                Self::Part {
                    mapping: b,
                    offset: at_b,
                },
            ) => Arc::ptr_eq(a, b) && at_a == at_b,
            (
                Self::GuestMemfd {
                    file: a,
                    offset: at_a,
                },
                Self::GuestMemfd {
                    file: b,
                    offset: at_b,
                },
            ) => a == b && at_a == at_b,
            (Self::External { start: a, owner: x }, Self::External { start: b, owner: y }) => {
                a == b && Arc::ptr_eq(x, y)
            }
            _ => false,
        }
    }
}

impl Eq for Source {}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous { huge: None } => f.write_str("Anonymous"),
            Self::Anonymous { huge: Some(page) } => write!(f, "Hugetlb({page})"),
            Self::Memfd { huge: None } => f.write_str("Memfd"),
            Self::Memfd { huge: Some(page) } => write!(f, "HugetlbMemfd({page})"),
            Self::File {
                file,
                offset,
                shared,
            } => f
                .debug_struct(if *shared { "FileShared" } else { "FilePrivate" })
                .field("file", file)
                .field("offset", offset)
                .finish(),
            Self::GuestMemfd { file, offset } => f
                .debug_struct("GuestMemfd")
                .field("file", file)
                .field("offset", offset)
                .finish(),
            Self::Part { mapping, offset } => f
                .debug_struct("Part")
                .field("mapping", mapping)
                .field("offset", offset)
                .finish(),
            Self::External { start, .. } => f.debug_tuple("External").field(start).finish(),
        }
    }
}
