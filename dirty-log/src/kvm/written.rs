// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who wrote through this process's mapping: asynchronous write-protection and `PAGEMAP_SCAN`.
//!
//! A userfaultfd with `WP_ASYNC` (Linux 6.7) protects pages; a first write takes a page's protection
//! away and waits for nobody. `PAGEMAP_SCAN` finds those pages and protects them again, page by page in
//! one step, so that a write is either found or told next time (PAGEMAP_SCAN(2const)).
//!
//! It sees whatever writes through the page tables of this process: the VMM, the kernel for it
//! (`read(2)` into guest memory, io_uring), vhost in the kernel, and KVM, whose guest mappings follow
//! these. It is for writes that KVM's log and vm-memory do not see, and for hosts and VMs where neither
//! is on. It does **not** see another process's mapping of the same memfd (that process has page tables
//! of its own), nor a device that was given the pages (VFIO), nor that pages were given back
//! (`MADV_DONTNEED`: they read as zeros, and count as clean).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use memslots::uffd::{ProtectRole, Registration};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr};

use crate::layout::PAGE_SIZE;
use crate::source::{fits, part_after};
use crate::{DirtyBitmap, DirtySource, Error, PageRun};

/// A stretch of addresses that were written (`struct page_region`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageRegion {
    /// The first address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// `PAGE_IS_…`: those that were asked for, here `PAGE_IS_WRITTEN`.
    pub categories: u64,
}

/// How far a scan came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// How many regions were filled in.
    pub regions: usize,
    /// Addresses before this one have been looked at. Short of the end where the regions ran out.
    pub end: u64,
}

/// Finds written pages of asynchronously write-protected memory, and protects them again.
///
/// Implemented for the file `/proc/self/pagemap`; a test implements it with a fake.
pub trait ScanPages {
    /// Looks at `range` from its start, until its end or until `into` is full. What it reports is
    /// protected again, and nothing else is.
    ///
    /// # Errors
    /// The errno. `ENOTTY`, `EINVAL`, `EBADF`: nothing was done. Any other: pages of `range` may have
    /// been protected without being reported.
    fn scan(&self, range: Range<u64>, into: &mut [PageRegion]) -> io::Result<Scanned>;
}

impl<T: ScanPages + ?Sized> ScanPages for &T {
    fn scan(&self, range: Range<u64>, into: &mut [PageRegion]) -> io::Result<Scanned> {
        (**self).scan(range, into)
    }
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = ioctl_expr(
    _IOC_READ | _IOC_WRITE,
    b'f' as u32,
    16,
    size_of::<ScanArgument>() as u32,
);
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

impl ScanPages for File {
    fn scan(&self, range: Range<u64>, into: &mut [PageRegion]) -> io::Result<Scanned> {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            start: range.start,
            end: range.end,
            vec: into.as_mut_ptr() as u64,
            vec_len: into.len() as u64,
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..Default::default()
        };
        // SAFETY: the argument is what the call takes and outlives it; the kernel writes `vec_len` regions
        // at most, into the exclusive slice that they are from. What it protects is memory that someone
        // registered for asynchronous protection: its contents and its writers' progress do not change.
        let found = unsafe { libc::ioctl(self.as_raw_fd(), PAGEMAP_SCAN as _, &mut argument) };
        match usize::try_from(found) {
            Ok(regions) => Ok(Scanned {
                regions: regions.min(into.len()),
                end: argument.walk_end,
            }),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

/// What was written through this process's mapping of one slot since the last look.
///
/// Works in chunks by itself, as [`KvmManualBitmap`](super::KvmManualBitmap) does: of a round of parts,
/// each part is protected again when it is handed out.
#[derive(Debug)]
pub struct WrittenPages<H> {
    host: H,
    start: u64,
    pages: u64,
    regions: Box<[PageRegion]>,
    /// Keeps the registration and its protection; whoever else wants to protect waits for it.
    _role: Option<ProtectRole>,
}

impl WrittenPages<File> {
    /// Begins to watch a registration with
    /// [`ASYNC_WRITE_PROTECT`](memslots::uffd::Modes::ASYNC_WRITE_PROTECT), which has one page in it for
    /// each of the slot's: protects it, so that it counts as clean. Takes about 20 ms a GiB. While this
    /// lives nobody else can borrow its [`ProtectRole`].
    ///
    /// # Errors
    /// [`Error::Watch`]: the role is lent, the kernel refuses the protection. [`Error::Scan`]: this kernel
    /// has no `PAGEMAP_SCAN`, or no `/proc`. The protection that was laid is gone again then.
    pub fn new(registration: &Registration) -> Result<Self, Error> {
        let range = registration.host_range();
        let bytes = (range.end - range.start) as u64;
        let watch = |why: String| Error::Watch { bytes, why };
        let role = registration
            .lend_protect()
            .map_err(|error| watch(error.to_string()))?;
        if role.is_synchronous() {
            return Err(watch(
                "its write-protection is not asynchronous: open the userfaultfd with WP_ASYNC, register \
                 it with ASYNC_WRITE_PROTECT"
                    .into(),
            ));
        }
        let pages = bytes / PAGE_SIZE;
        let failed = |source| Error::Scan {
            first: 0,
            pages,
            source,
        };
        let host = File::open("/proc/self/pagemap").map_err(failed)?;
        role.protect(0..bytes)
            .map_err(|error| watch(error.to_string()))?;
        let watch = Self {
            _role: Some(role),
            ..Self::with_host(host, range.start as u64, pages)
        };
        // A kernel without the call says so now, and not at the first harvest.
        watch
            .host
            .scan(watch.start..watch.start, &mut [])
            .map_err(failed)?;
        Ok(watch)
    }
}

impl<H: ScanPages> WrittenPages<H> {
    /// Regions that one scan reports at most: 12 KiB.
    const REGIONS: usize = 512;
    /// Pages that one call looks at at most, with this process's memory map locked for reading.
    const CHUNK: u64 = 1 << 16;

    /// The same over another host: `pages` pages from address `start`, which someone else protects.
    pub fn with_host(host: H, start: u64, pages: u64) -> Self {
        Self {
            host,
            start,
            pages,
            regions: vec![PageRegion::default(); Self::REGIONS].into(),
            _role: None,
        }
    }

    fn take_chunk(&mut self, chunk: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        let address = |page: u64| self.start.saturating_add(page.saturating_mul(PAGE_SIZE));
        let page = |address: u64| address.saturating_sub(self.start) / PAGE_SIZE;
        let end = address(chunk.end());
        let mut at = address(chunk.first);
        while at < end {
            let left = PageRun {
                first: page(at),
                pages: page(end) - page(at),
            };
            let failed = |source| Error::Scan {
                first: left.first,
                pages: left.pages,
                source,
            };
            let scanned = match self.host.scan(at..end, &mut self.regions) {
                Ok(scanned) => scanned,
                Err(source) => {
                    let untouched = [libc::ENOTTY, libc::EINVAL, libc::EBADF];
                    if !source
                        .raw_os_error()
                        .is_some_and(|errno| untouched.contains(&errno))
                    {
                        into.set(left)?;
                    }
                    return Err(failed(source));
                }
            };
            for region in self.regions.iter().take(scanned.regions) {
                let first = page(region.start.clamp(at, end));
                let last = page(region.end.clamp(at, end));
                into.set(PageRun {
                    first,
                    pages: last.saturating_sub(first),
                })?;
            }
            if scanned.end <= at {
                // It never says so; a loop for ever would be worse than an error.
                into.set(left)?;
                return Err(failed(io::Error::from_raw_os_error(libc::EIO)));
            }
            at = scanned.end;
        }
        Ok(())
    }
}

impl<H: ScanPages> DirtySource for WrittenPages<H> {
    fn pages(&self) -> u64 {
        self.pages
    }

    /// One ioctl for each 65536 pages, and one more for each 512 stretches that were written; no
    /// allocation.
    ///
    /// # Errors
    /// [`Error::Scan`]. Where the kernel may have protected pages without reporting them, the rest of
    /// their chunk counts as dirty.
    fn take(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        let all = PageRun {
            first: 0,
            pages: self.pages,
        };
        self.take_part(all, into)
    }

    fn look(&mut self, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.pages, into.pages())
    }

    fn take_part(&mut self, part: PageRun, into: &mut DirtyBitmap) -> Result<(), Error> {
        fits(self.pages, into.pages())?;
        let end = part.end().min(self.pages);
        let mut done = part.first;
        while let Some(chunk) = part_after(done, Self::CHUNK, end) {
            self.take_chunk(chunk, into)?;
            done = chunk.end();
        }
        Ok(())
    }
}
