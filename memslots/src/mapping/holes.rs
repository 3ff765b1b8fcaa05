// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages of a mapping nothing has ever been put into: they are zero, and to read them would only make them
//! present.

use super::Mapping;
use super::sys::last_errno;
use crate::{Errno, MemoryKind, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// `/proc/self/pagemap`, Documentation/admin-guide/mm/pagemap.rst: 8 bytes for each page of this process.
const PAGEMAP: &str = "/proc/self/pagemap";
const ENTRY: u64 = 8;
/// Of an entry: the page is in memory, or in swap (as is a page that moves, and a marker of a userfaultfd's). All other
/// bits may be set where there is no page, soft-dirty (55) is.
const HAS_PAGE: u64 = 0b11 << 62;
/// Entries that are read at once: 2 MiB of memory.
const BATCH: usize = 512;

/// What knows where memory has holes. One serves all mappings of the process, from any thread.
#[derive(Debug)]
pub struct Holes {
    pagemap: File,
}

impl Holes {
    /// Opens the kernel's table of this process's pages.
    ///
    /// # Errors
    /// There is no `/proc`, or the kernel has no such table (`CONFIG_PROC_PAGE_MONITOR`).
    pub fn open() -> io::Result<Self> {
        let pagemap = File::open(PAGEMAP)?;
        Ok(Holes { pagemap })
    }

    /// The runs of `range`, bytes from the mapping's start and in whole pages, into which nothing has been put: ascending,
    /// none beside the next. They read as zeros, as long as nobody writes there. What is not among them may be zero too.
    ///
    /// That is known of private anonymous memory, by the page tables; of a memfd or a tmpfs's file mapped shared, by
    /// the file (`SEEK_DATA`); of a guest_memfd, which cannot seek, by its page cache (`mincore`), from which its pages never
    /// go but by a punch. Of all other kinds there are none: a private file's page that is not present has the
    /// file's contents. Reading a page that is a hole makes it present, and it is none any more.
    ///
    /// A page that a userfaultfd is yet to serve is no hole to who waits for it, and one to this: do not ask about memory
    /// that is being filled so.
    ///
    /// # Errors
    /// The kernel's answer; `EINVAL` also for a range that is none of the mapping's pages.
    pub fn of(&self, mapping: &Mapping, range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
        let whole = range.start.is_multiple_of(PAGE_SIZE) && range.end.is_multiple_of(PAGE_SIZE);
        if !whole || range.start > range.end || range.end > mapping.size() {
            return Err(Errno(libc::EINVAL));
        }
        match (mapping.kind(), mapping.file()) {
            (MemoryKind::Anonymous, _) => self.of_anonymous(mapping, range),
            (MemoryKind::Shmem, Some(file)) => of_file(file.file(), file.start(), range),
            (MemoryKind::GuestMemfd, _) => of_guest_memfd(mapping, range),
            _ => Ok(Vec::new()),
        }
    }

    fn of_anonymous(&self, mapping: &Mapping, range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
        let errno = |error: io::Error| Errno(error.raw_os_error().unwrap_or(libc::EIO));
        let first = mapping.host().0 as u64 / PAGE_SIZE;
        let mut entries = [0; BATCH * ENTRY as usize];
        let (mut holes, mut at) = (Vec::new(), range.start);
        while at < range.end {
            let pages = ((range.end - at) / PAGE_SIZE).min(BATCH as u64);
            let bytes = entries.get_mut(..(pages * ENTRY) as usize);
            let bytes = bytes.unwrap_or_default();
            let offset = (first + at / PAGE_SIZE) * ENTRY;
            self.pagemap.read_exact_at(bytes, offset).map_err(errno)?;
            for entry in bytes.as_chunks::<{ ENTRY as usize }>().0 {
                if u64::from_ne_bytes(*entry) & HAS_PAGE == 0 {
                    add(&mut holes, at..at + PAGE_SIZE);
                }
                at += PAGE_SIZE;
            }
        }
        Ok(holes)
    }
}

/// Of a file of which the mapping is shared, from `start` on.
fn of_file(file: &File, start: u64, range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
    let seek = |at: u64, whence| {
        let at = libc::off_t::try_from(start.saturating_add(at)).unwrap_or(libc::off_t::MAX);
        // SAFETY: no pointers; an open descriptor. Its place is nobody's concern: the mapping needs none.
        match unsafe { libc::lseek(file.as_raw_fd(), at, whence) } {
            -1 => Err(last_errno()),
            found => Ok((found as u64).saturating_sub(start)),
        }
    };
    let (mut holes, mut at) = (Vec::new(), range.start);
    while at < range.end {
        let data = match seek(at, libc::SEEK_DATA) {
            // No data behind it.
            Err(Errno(libc::ENXIO)) => range.end,
            data => data?.min(range.end),
        };
        if data > at {
            add(&mut holes, at..data);
        }
        if data == range.end {
            break;
        }
        at = seek(data, libc::SEEK_HOLE)?.min(range.end);
    }
    Ok(holes)
}

/// Of a guest_memfd: a page that is not in the cache has never been touched, by the guest or by this process, or was
/// given back.
fn of_guest_memfd(mapping: &Mapping, range: Range<u64>) -> Result<Vec<Range<u64>>, Errno> {
    let (mut holes, mut at) = (Vec::new(), range.start);
    let mut present = [0u8; BATCH];
    while at < range.end {
        let pages = ((range.end - at) / PAGE_SIZE).min(BATCH as u64) as usize;
        let start = mapping.host().0 + at as usize;
        let length = pages * PAGE_SIZE as usize;
        // SAFETY: a range of the mapping, which stays for the length of the call, and a byte for each of its pages.
        if unsafe { libc::mincore(start as *mut _, length, present.as_mut_ptr()) } != 0 {
            return Err(last_errno());
        }
        for page in present.get(..pages).unwrap_or_default() {
            if page & 1 == 0 {
                add(&mut holes, at..at + PAGE_SIZE);
            }
            at += PAGE_SIZE;
        }
    }
    Ok(holes)
}

fn add(holes: &mut Vec<Range<u64>>, hole: Range<u64>) {
    match holes.last_mut() {
        Some(last) if last.end == hole.start => last.end = hole.end,
        _ => holes.push(hole),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backing, HugePages};
    use vm_memory::GuestAddress;

    const PAGES: u64 = 1100;

    fn write(mapping: &Mapping, page: u64) {
        let at = mapping.host().0 + (page * PAGE_SIZE) as usize;
        // SAFETY: within the mapping, which nobody else uses.
        unsafe { (at as *mut u8).write_volatile(1) };
    }

    fn pages(range: Range<u64>) -> Range<u64> {
        range.start * PAGE_SIZE..range.end * PAGE_SIZE
    }

    #[test]
    fn what_nothing_was_put_into_is_found_and_nothing_else() {
        let holes = Holes::open().unwrap();
        for backing in [Backing::anonymous, Backing::memfd] {
            let backing = backing(PAGES * PAGE_SIZE).huge_pages(HugePages::Never);
            let mapping = Mapping::new(&backing, GuestAddress(0)).unwrap();
            let of = |range| holes.of(&mapping, pages(range)).unwrap();
            assert_eq!(of(0..PAGES), [pages(0..PAGES)]);
            // Both sides of a batch's end, the ends, and a pair.
            for page in [0, 511, 512, 700, 703, PAGES - 1] {
                write(&mapping, page);
            }
            let due = [1..511, 513..700, 701..703, 704..PAGES - 1].map(pages);
            assert_eq!(of(0..PAGES), due);
            assert_eq!(of(600..702), [pages(600..700), pages(701..702)]);
            assert_eq!(of(511..513), []);
            assert_eq!(of(5..5), []);
        }
    }

    #[test]
    fn of_other_memory_nothing_is_known_and_a_range_beyond_is_refused() {
        let holes = Holes::open().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * PAGE_SIZE).unwrap();
        let backing = Backing::file_private(file, 0, 8 * PAGE_SIZE);
        let mapping = Mapping::new(&backing, GuestAddress(0)).unwrap();
        assert_eq!(holes.of(&mapping, pages(0..8)), Ok(Vec::new()));
        #[allow(clippy::reversed_empty_ranges, reason = "one that is refused")]
        for range in [0..9 * PAGE_SIZE, 0..100, 100..PAGE_SIZE, 2 * PAGE_SIZE..0] {
            assert_eq!(holes.of(&mapping, range), Err(Errno(libc::EINVAL)));
        }
    }
}
