// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host memory behind a slot: [`Backing`] says which, [`Mapping`] is it, unmapped when the last user lets go.
//! Everything that a number can make wrong is checked before anything is made (a file is looked at first).

mod area;
mod backing;
mod error;
mod holes;
mod hugetlb;
mod memfd;
mod numa;
mod pages;
mod place;
mod prefault;
mod sys;

pub use backing::{Backing, HugePages};
pub use error::MapError;
pub use holes::Holes;
pub use hugetlb::{HugePageSize, HugePool};
pub use numa::NumaPolicy;

use crate::{Errno, GuestMemfd, Hva, MemoryKind, PAGE_SIZE};
use area::{Area, Plan};
use backing::Source;
use numa::Binding;
pub(crate) use pages::Discarding;
#[cfg(feature = "uffd")]
pub(crate) use pages::Keeping;
use pages::Pages;
use prefault::Work;
use std::fmt;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use sys::{Kernel, System};
#[cfg(feature = "uffd")]
use vm_memory::VolatileSlice;
use vm_memory::{FileOffset, GuestAddress};

/// `f_type` of a tmpfs (memfds are on one) and of a hugetlbfs, linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Memory of this process for a guest, mapped: nobody else unmaps it, and it is unmapped when this is dropped.
///
/// Slots have theirs ([`Region::mapping`](crate::Region::mapping)). One made by hand is memory beside the slots: pages
/// to be moved into a slot, or the memory of a consumer with slots of its own.
///
/// What one costs, besides the pages that are touched and 8 bytes of page table for each:
///
/// | backing | system calls | mappings of the process (VMAs) |
/// | --- | --- | --- |
/// | anonymous | 1 | 1, merged with a neighbour of the same kind |
/// | guest_memfd | as a file | as a file |
/// | memfd, file below 2 MiB | 1 (a memfd: 4) | 1 |
/// | memfd, file from 2 MiB | 2 to 4 more, to lie in the guest's phase | 1 |
/// | hugetlb | 1 (a memfd: 4) | 1 |
/// | any, guarded | 2 more | 3 |
/// | part of a mapping | 0 | 0 |
///
/// and one call more for each piece of advice. A process may have 65,530 of those mappings (`vm.max_map_count`).
pub struct Mapping {
    /// What is to be let go of.
    _area: Area,
    /// Where the slot's memory starts in it.
    start: *mut u8,
    size: usize,
    page_size: u64,
    kind: MemoryKind,
    /// Where others find it: of shared mappings only, for a private one shows its file's contents no more.
    file: Option<FileOffset>,
    /// Whose pages these are, if a guest_memfd's: `file` says from where on.
    guest_memfd: Option<GuestMemfd>,
    /// Shared with all that is cut from the same memory.
    pages: Arc<Pages>,
    system: &'static dyn System,
}

// SAFETY: the pointers are only numbers until they are made a `VolatileSlice`, whose accesses are volatile and whose
// memory every vCPU writes anyway; the struct itself never changes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `backing`, to be seen by the guest at `guest`. Blocks as long as the kernel takes to map, and to prefault if
    /// that was asked for.
    ///
    /// # Errors
    /// [`MapError`]; then nothing is mapped.
    pub fn new(backing: &Backing, guest: GuestAddress) -> Result<Self, MapError> {
        Self::made_by(&Kernel, backing, guest)
    }

    fn made_by(
        system: &'static dyn System,
        backing: &Backing,
        guest: GuestAddress,
    ) -> Result<Self, MapError> {
        let size = backing.size;
        if size == 0 {
            return Err(MapError::Empty);
        }
        // Read once: what is checked here is what is bound to.
        let binding = match &backing.numa {
            Some(policy) => Some(policy.binding(system.numa_nodes().as_deref())?),
            None => None,
        };
        let mapping = match &backing.source {
            Source::Anonymous { huge } => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let kind = match huge {
                    None => MemoryKind::Anonymous,
                    Some(_) => MemoryKind::Hugetlb,
                };
                Plan::new(backing, kind, *huge, flags, None)?.map(system, guest)?
            }
            Source::Memfd { huge } => {
                let kind = match huge {
                    None => MemoryKind::Shmem,
                    Some(_) => MemoryKind::HugetlbShared,
                };
                let plan = Plan::new(backing, kind, *huge, libc::MAP_SHARED, None)?;
                let file = Arc::new(memfd::create(system, size, *huge)?);
                plan.of(file).map(system, guest)?
            }
            Source::File {
                file,
                offset,
                shared,
            } => Self::plan_file(backing, file, *offset, *shared)?.map(system, guest)?,
            Source::GuestMemfd { file, offset } => {
                let plan = Self::plan_guest_memfd(backing, file, *offset)?;
                Self {
                    guest_memfd: Some(file.clone()),
                    ..plan.map(system, guest)?
                }
            }
            Source::Part { mapping, offset } => Self::part(system, backing, mapping, *offset)?,
            Source::External { start, owner } => {
                if backing.guarded {
                    return Err(MapError::GuardedExternal);
                }
                check_aligned("size", size, PAGE_SIZE)?;
                check_aligned("host address", start.0 as u64, PAGE_SIZE)?;
                backing.check_choices(MemoryKind::External)?;
                let too_large = MapError::TooLarge { size };
                let size = usize::try_from(size).map_err(|_| too_large.clone())?;
                start.0.checked_add(size).ok_or(too_large)?;
                Self {
                    _area: Area::Kept {
                        _owner: Arc::clone(owner),
                    },
                    start: start.0 as *mut u8,
                    size,
                    page_size: PAGE_SIZE,
                    kind: MemoryKind::External,
                    file: None,
                    guest_memfd: None,
                    pages: Arc::default(),
                    system,
                }
            }
        };
        mapping.arrange(backing, binding.as_ref())?;
        Ok(mapping)
    }

    /// What `backing` is of `whole`, from `offset` on.
    fn part(
        system: &'static dyn System,
        backing: &Backing,
        whole: &Arc<Self>,
        offset: u64,
    ) -> Result<Self, MapError> {
        let (size, length) = (backing.size, whole.size());
        if backing.guarded {
            return Err(MapError::GuardedPart);
        }
        check_aligned("size", size, PAGE_SIZE)?;
        check_aligned("offset", offset, PAGE_SIZE)?;
        backing.check_choices(whole.kind)?;
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(MapError::BeyondMapping {
                offset,
                size,
                length,
            });
        }
        let file = whole.file.as_ref();
        Ok(Self {
            _area: Area::Kept {
                _owner: Arc::clone(whole) as _,
            },
            start: whole.start.wrapping_add(offset as usize),
            size: size as usize,
            page_size: whole.page_size,
            kind: whole.kind,
            file: file
                .map(|file| FileOffset::from_arc(Arc::clone(file.arc()), file.start() + offset)),
            guest_memfd: whole.guest_memfd.clone(),
            pages: Arc::clone(&whole.pages),
            system,
        })
    }

    /// Looks at the file that is to be mapped.
    fn plan_file(
        backing: &Backing,
        file: &Arc<File>,
        offset: u64,
        shared: bool,
    ) -> Result<Plan, MapError> {
        let size = backing.size;
        let call = |call| move |errno| MapError::Call { call, size, errno };
        let (magic, block) = sys::file_system(file).map_err(call("fstatfs"))?;
        let huge = (magic == HUGETLBFS_MAGIC)
            .then(|| HugePageSize::new(block))
            .flatten();
        let kind = match (magic, huge, shared) {
            (_, Some(_), true) => MemoryKind::HugetlbShared,
            (_, Some(_), false) => MemoryKind::HugetlbFilePrivate,
            (TMPFS_MAGIC, _, true) => MemoryKind::Shmem,
            (TMPFS_MAGIC, _, false) => MemoryKind::ShmemPrivate,
            (_, _, true) => MemoryKind::FileShared,
            (_, _, false) => MemoryKind::FilePrivate,
        };
        let flags = if shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let plan = Plan::new(backing, kind, huge, flags, Some((Arc::clone(file), offset)))?;
        check_aligned("offset", offset, plan.page_size)?;
        let metadata = file.metadata().map_err(|error| MapError::Call {
            call: "fstat",
            size,
            errno: Errno(error.raw_os_error().unwrap_or(libc::EIO)),
        })?;
        let length = metadata.len();
        let room = length
            .checked_next_multiple_of(plan.page_size)
            .unwrap_or(length);
        // What is no regular file has a driver that knows its length.
        if metadata.is_file() && offset.checked_add(size).is_none_or(|end| end > room) {
            return Err(MapError::BeyondFile {
                offset,
                size,
                length,
            });
        }
        if shared && !sys::is_writable(file).map_err(call("fcntl(F_GETFL)"))? {
            return Err(MapError::NotWritable { offset, size });
        }
        Ok(plan)
    }

    /// As [`plan_file`](Self::plan_file): its file system tells nobody what it is, and its length is known.
    fn plan_guest_memfd(
        backing: &Backing,
        file: &GuestMemfd,
        offset: u64,
    ) -> Result<Plan, MapError> {
        let (size, length) = (backing.size, file.size());
        if !file.is_mappable() {
            return Err(MapError::NotMappable { offset, size });
        }
        let whole = Some((Arc::clone(file.file()), offset));
        let plan = Plan::new(
            backing,
            MemoryKind::GuestMemfd,
            None,
            libc::MAP_SHARED,
            whole,
        )?;
        check_aligned("offset", offset, PAGE_SIZE)?;
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(MapError::BeyondFile {
                offset,
                size,
                length,
            });
        }
        Ok(plan)
    }

    /// The guest_memfd that it is memory of, and from which byte on.
    pub(crate) fn guest_memfd(&self) -> Option<(&GuestMemfd, u64)> {
        let file = self.guest_memfd.as_ref()?;
        Some((file, self.file.as_ref()?.start()))
    }

    /// All that is asked for beyond the mapping itself.
    fn arrange(&self, backing: &Backing, binding: Option<&Binding>) -> Result<(), MapError> {
        if let Some(binding) = binding {
            self.bind(binding)?;
        }
        match backing.huge_pages {
            HugePages::Host => {}
            HugePages::Advise => {
                self.advise("madvise(MADV_HUGEPAGE)", libc::MADV_HUGEPAGE)?;
            }
            HugePages::Never => {
                match self.advise("madvise(MADV_NOHUGEPAGE)", libc::MADV_NOHUGEPAGE) {
                    // Memory, or a kernel, without transparent huge pages has none to forbid.
                    Err(MapError::Call {
                        errno: Errno(libc::EINVAL),
                        ..
                    }) => {}
                    result => result?,
                }
            }
        }
        if !backing.dump {
            self.advise("madvise(MADV_DONTDUMP)", libc::MADV_DONTDUMP)?;
        }
        if !backing.fork {
            self.advise("madvise(MADV_DONTFORK)", libc::MADV_DONTFORK)?;
        }
        if backing.merge {
            let advise = || self.advise("madvise(MADV_MERGEABLE)", libc::MADV_MERGEABLE);
            self.pages.merge(advise).ok_or(MapError::MergeableKept)??;
        }
        if let Some(threads) = backing.prefault {
            self.prefault(0..self.size(), threads)?;
        }
        Ok(())
    }

    fn advise(&self, call: &'static str, advice: i32) -> Result<(), MapError> {
        let size = self.size();
        // SAFETY: the range is our own mapping; or a part of one, which `_area` keeps mapped and whose other parts may
        // have bytes in common with it; or one that its owner gave to the guest, and keeps. None of the advice above
        // changes what anybody reads there: it is about the pages behind it, about core dumps and about children.
        unsafe { self.system.madvise(self.start.cast(), self.size, advice) }
            .map_err(|errno| MapError::Call { call, size, errno })
    }

    fn bind(&self, binding: &Binding) -> Result<(), MapError> {
        // SAFETY: as for advice. A policy is about pages that come later; without a flag none that is there moves.
        let bound = unsafe { self.system.mbind(self.start.cast(), self.size, binding) };
        match bound {
            // A kernel without NUMA has one node, and that is what was checked for.
            Err(Errno(libc::ENOSYS)) if !binding.host_has_nodes => Ok(()),
            result => result.map_err(|errno| MapError::Call {
                call: "mbind",
                size: self.size(),
                errno,
            }),
        }
    }

    /// Makes a part of it present, by this many threads: `range` in bytes from the start. Its ends are ends of pages
    /// on the host. Whoever uses the memory at the same time is not disturbed. Blocks until it is done; where a
    /// userfaultfd serves the memory's faults, until that has served them.
    ///
    /// # Errors
    /// [`MapError::Prefault`] says how much is there; [`MapError::Unaligned`], [`MapError::TooLarge`] and
    /// [`MapError::Backwards`] for a range that is none of this mapping.
    pub fn prefault(&self, range: Range<u64>, threads: NonZeroUsize) -> Result<(), MapError> {
        // Pages are the host's: a part of a mapping may begin within one.
        let host = |offset: u64| (self.start as u64).saturating_add(offset);
        check_aligned(
            "host address of the start",
            host(range.start),
            self.page_size,
        )?;
        check_aligned("host address of the end", host(range.end), self.page_size)?;
        let last = range.start.max(range.end);
        if last > self.size() {
            return Err(MapError::TooLarge { size: last });
        }
        if range.start > range.end {
            return Err(MapError::Backwards { range });
        }
        let work = Work {
            start: self.start as usize + range.start as usize,
            size: (range.end - range.start) as usize,
            page_size: self.page_size as usize,
            write: !matches!(
                self.kind,
                MemoryKind::FilePrivate | MemoryKind::ShmemPrivate
            ),
        };
        // SAFETY: a part of this mapping, which lives as long as `self`, is readable and writable, and is accessed by
        // volatile and atomic accesses only.
        unsafe { prefault::populate(self.system, work, threads) }
    }

    /// Makes a part of it readable, whole pages, by this thread: what is not there and is not file's is zeros that take
    /// no memory.
    #[cfg(feature = "uffd")]
    pub(crate) fn populate_read(&self, range: Range<u64>) -> Result<(), MapError> {
        let size = range.end.saturating_sub(range.start);
        if range.end > self.size() {
            return Err(MapError::TooLarge { size: range.end });
        }
        let work = Work {
            start: self.start as usize + range.start as usize,
            size: size as usize,
            page_size: self.page_size as usize,
            write: false,
        };
        // SAFETY: a part of this mapping, which lives as long as `self` and is readable.
        unsafe { prefault::populate(self.system, work, NonZeroUsize::MIN) }
    }

    /// As one of larger pages, for a test of who refuses those: a host may have none to lend.
    #[cfg(all(test, feature = "uffd"))]
    pub(crate) fn pretend_page_size(mut self, page_size: u64) -> Self {
        self.page_size = page_size;
        self
    }

    /// Copies what is there from `offset` on; of what would lie behind its end, nothing.
    #[cfg(feature = "uffd")]
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        let Some(left) = self.size().checked_sub(offset) else {
            return;
        };
        let count = into.len().min(left as usize);
        // SAFETY: within the mapping, which lives as long as `self`, by a volatile access.
        let from = unsafe { VolatileSlice::new(self.start.add(offset as usize), count) };
        from.copy_to(into);
    }

    /// Pages may be given back until what is returned is dropped; none where a point in time keeps what they hold.
    pub(crate) fn discard(&self) -> Option<Discarding> {
        self.pages.discard()
    }

    /// No page is given back or merged until what is returned is dropped; none where they are merged. Waits for who is
    /// giving some back.
    #[cfg(feature = "uffd")]
    pub(crate) fn keep(&self) -> Option<Keeping> {
        self.pages.keep()
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    /// The address of its first byte.
    pub fn host(&self) -> Hva {
        Hva(self.start as usize)
    }

    /// Its addresses, in this process.
    pub fn host_range(&self) -> Range<usize> {
        let start = self.start as usize;
        start..start + self.size
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// The size in bytes of its pages (`kvm_host_page_size`): 4096, or that of its hugetlb pages.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// What it is made of, as the kernel sees it.
    pub fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// The file by which another process can map the same memory, and where in it; `None` for private memory.
    pub fn file(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }
}

fn check_aligned(what: &'static str, value: u64, page_size: u64) -> Result<(), MapError> {
    if value.is_multiple_of(page_size) {
        Ok(())
    } else {
        Err(MapError::Unaligned {
            what,
            value,
            page_size,
        })
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("host", &self.host())
            .field("size", &self.size)
            .field("page_size", &self.page_size)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
