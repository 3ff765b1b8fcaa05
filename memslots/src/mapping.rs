// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host memory behind a slot: what kinds there are, and one mapping of it, unmapped when the last user lets go.
//!
//! A mapping costs one `mmap` (a memfd: three calls) and nothing is touched: pages come when they are used, so a guest
//! costs what it has touched. Hugetlb, private files, guest_memfd, prefault and NUMA will be further kinds here.

use crate::Hva;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use vm_memory::{FileOffset, GuestAddress};

/// The size of a transparent huge page on x86-64.
const HUGE: usize = 2 << 20;

/// What is behind a slot, and how much of it.
///
/// ```
/// use memslots::{Backing, HugePages};
/// let ram = Backing::anonymous(128 << 20).huge_pages(HugePages::Advise);
/// let shared = Backing::memfd(1 << 20);
/// assert_eq!(ram.size(), 128 << 20);
/// # let _ = shared;
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    kind: Kind,
    size: u64,
    huge_pages: HugePages,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Anonymous,
    Memfd,
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
    /// `size` bytes of anonymous, private memory, zero at first, given by the host as it is touched and not reserved
    /// before (`MAP_NORESERVE`): the sum of the guests may exceed the host. If it is large, it lies in the host as it
    /// does in the guest relative to 2 MiB, so that huge pages can serve both translations.
    pub const fn anonymous(size: u64) -> Self {
        Self {
            kind: Kind::Anonymous,
            size,
            huge_pages: HugePages::Host,
        }
    }

    /// `size` bytes of a memfd of its own, mapped shared: can be handed to another process (vhost-user) by the region's
    /// [`file_offset`](vm_memory::GuestMemoryRegion::file_offset). Given as it is touched.
    pub const fn memfd(size: u64) -> Self {
        Self {
            kind: Kind::Memfd,
            size,
            huge_pages: HugePages::Host,
        }
    }

    /// The same with a choice about transparent huge pages.
    #[must_use]
    pub const fn huge_pages(mut self, choice: HugePages) -> Self {
        self.huge_pages = choice;
        self
    }

    /// The size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }
}

/// A mapping of this process that nobody else unmaps.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// What was mapped, slack included.
    base: *mut libc::c_void,
    length: usize,
    /// Where the slot's memory starts in it.
    start: *mut u8,
    size: usize,
    file: Option<FileOffset>,
}

// SAFETY: the pointers are only numbers until they are made a `VolatileSlice`, whose accesses are volatile and whose
// memory every vCPU writes anyway; the struct itself never changes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `backing`, to be seen by the guest at `guest`. Its size is a multiple of the page size, not 0.
    pub(crate) fn new(backing: &Backing, guest: GuestAddress) -> io::Result<Self> {
        let too_large = || io::Error::from_raw_os_error(libc::ENOMEM);
        let size = usize::try_from(backing.size).map_err(|_| too_large())?;
        let mapping = match backing.kind {
            Kind::Anonymous => {
                // Slack that is never touched costs nothing and spares the two calls that would cut it off.
                let slack = if size >= HUGE { HUGE } else { 0 };
                let length = size.checked_add(slack).ok_or_else(too_large)?;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                let base = map(length, flags, -1)?;
                let shift = if slack == 0 {
                    0
                } else {
                    // Congruent to the guest's address; both are multiples of the page size, so this is one as well.
                    (guest.0 as usize).wrapping_sub(base as usize) % HUGE
                };
                // SAFETY: `shift` is below `slack`, so `start` and the `size` bytes behind it lie in the mapping.
                let start = unsafe { base.cast::<u8>().add(shift) };
                Self {
                    base,
                    length,
                    start,
                    size,
                    file: None,
                }
            }
            Kind::Memfd => {
                let file = memfd(backing.size)?;
                let base = map(size, libc::MAP_SHARED | libc::MAP_NORESERVE, raw(&file))?;
                let file = Some(FileOffset::new(file, 0));
                Self {
                    base,
                    length: size,
                    start: base.cast(),
                    size,
                    file,
                }
            }
        };
        mapping.advise(backing.huge_pages)?;
        Ok(mapping)
    }

    fn advise(&self, choice: HugePages) -> io::Result<()> {
        let advice = match choice {
            HugePages::Host => return Ok(()),
            HugePages::Advise => libc::MADV_HUGEPAGE,
            HugePages::Never => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: the range is our own mapping; the advice changes none of its contents.
        match unsafe { libc::madvise(self.start.cast(), self.size, advice) } {
            0 => Ok(()),
            _ => {
                let error = io::Error::last_os_error();
                // A kernel without transparent huge pages has none to forbid.
                let harmless =
                    choice == HugePages::Never && error.raw_os_error() == Some(libc::EINVAL);
                if harmless { Ok(()) } else { Err(error) }
            }
        }
    }

    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    pub(crate) fn host(&self) -> Hva {
        Hva(self.start as usize)
    }

    pub(crate) fn file(&self) -> Option<&FileOffset> {
        self.file.as_ref()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length, unmapped by nobody else, and no slice of it is left: slices borrow
        // from the region that owns this. No slot refers to it: `Memslots` deletes a slot before it lets go of its
        // region, and never lets go of one that could not be deleted.
        let result = unsafe { libc::munmap(self.base, self.length) };
        if result != 0 {
            log::error!(
                "munmap of {:#x} bytes: {}",
                self.length,
                io::Error::last_os_error()
            );
        }
    }
}

fn raw(file: &File) -> i32 {
    use std::os::fd::AsRawFd;
    file.as_raw_fd()
}

/// A new mapping anywhere.
fn map(length: usize, flags: i32, fd: i32) -> io::Result<*mut libc::c_void> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: without MAP_FIXED a new mapping disturbs no other.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, 0) };
    if base == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(base)
    }
}

/// A memfd of `size` bytes that cannot change its size.
fn memfd(size: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string, the flags are documented ones.
    let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size)?;
    // Whoever it is handed to cannot shrink it under our feet: a touch beyond its end would be a SIGBUS.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: an fcntl on our own descriptor with an integer argument.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_mapping_lies_in_the_host_as_in_the_guest() {
        for guest in [0, 0x1000, 0x10_0000, 0x1f_f000, 3 << 30] {
            let mapping = Mapping::new(&Backing::anonymous(4 << 20), GuestAddress(guest)).unwrap();
            assert_eq!(mapping.host().0 % HUGE, guest as usize % HUGE);
            assert!(mapping.host().0 + mapping.size <= mapping.base as usize + mapping.length);
        }
    }

    #[test]
    fn an_impossible_size_is_an_error_and_no_mapping() {
        let huge = !0xfffu64;
        assert!(Mapping::new(&Backing::anonymous(huge), GuestAddress(0)).is_err());
        assert!(Mapping::new(&Backing::memfd(huge), GuestAddress(0)).is_err());
    }

    #[test]
    fn a_memfd_can_be_had_back_and_cannot_shrink() {
        let mapping = Mapping::new(&Backing::memfd(0x3000), GuestAddress(0)).unwrap();
        let file = mapping.file().unwrap().file();
        assert_eq!(file.metadata().unwrap().len(), 0x3000);
        assert!(file.set_len(0).is_err());
    }
}
