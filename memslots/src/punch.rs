// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`GuestRam::punch`]: memory given back to the host under slots that stay, while vCPUs run. What a balloon, free page
//! reporting and virtio-mem ask for.
//!
//! The order: note the ranges in [`Invalidations`](crate::Invalidations), wait for the readers that are inside, discard,
//! be done. Readers take no lock for it: a read that meets a punched page finds zeros, and a page comes back when it is
//! written (KVM's own mapping of it is taken away by the kernel, through its MMU notifier).

use crate::invalidation::frames;
use crate::{
    Errno, Gfn, GuestRam, Invalidation, Mechanism, Region, SlotBitmap, SlotId, SlotTable, Support,
    Unsupported,
};
use srcu::Grace;
use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryRegion};

/// Why memory was not given back.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PunchError {
    /// A range is empty, or ends before it starts.
    #[error("no bytes from guest address {start:#x} to {end:#x}")]
    Empty {
        /// Its first address.
        start: u64,
        /// The address after its last.
        end: u64,
    },
    /// An end of a range is not on a page of the slot's memory.
    #[error(
        "guest address {address:#x} does not begin one of {slot}'s pages of {page_size:#x} bytes"
    )]
    Unaligned {
        /// The slot.
        slot: SlotId,
        /// The address.
        address: u64,
        /// The size of the host's pages there, in bytes.
        page_size: u64,
    },
    /// No slot has an address.
    #[error("no slot has guest address {address:#x}")]
    NoSlot {
        /// The address.
        address: u64,
    },
    /// The slot is read-only: what is in it would not come back.
    #[error("guest address {address:#x} is in {slot}, which is read-only")]
    ReadOnly {
        /// The slot.
        slot: SlotId,
        /// The first such address.
        address: u64,
    },
    /// The memory behind the slot cannot be given back so that it reads as zeros.
    #[error("guest address {address:#x} is in {slot}: {source}")]
    Unsupported {
        /// The slot.
        slot: SlotId,
        /// The first such address.
        address: u64,
        /// Which memory, and why not.
        source: Unsupported,
    },
    /// Somebody keeps what is in memory as it was (`uffd::PointInTime`): what is given back would be lost to it. Behind
    /// that it may be asked for again.
    #[error(
        "guest address {address:#x} is in {slot}, whose memory is kept as it was at one moment, for a snapshot: it \
         cannot be given back before that has ended"
    )]
    Kept {
        /// The slot.
        slot: SlotId,
        /// The first such address.
        address: u64,
    },
    /// The host refused. What was asked for before this range is given back; where it refused for the slot's guest_memfd,
    /// which comes second, the user mapping of this range too.
    #[error(
        "{call} of {size:#x} bytes at guest address {start:#x} in {slot}, after {done:#x} bytes that were given back: \
         {source}"
    )]
    Host {
        /// The system call.
        call: &'static str,
        /// The slot.
        slot: SlotId,
        /// The guest address of the part that was refused.
        start: u64,
        /// Its size in bytes.
        size: u64,
        /// The bytes of this request that were given back before it.
        done: u64,
        /// Its answer.
        source: Errno,
    },
}

impl<B: SlotBitmap> GuestRam<B> {
    /// Begins an invalidation of the frames `range`, for an invalidator beside [`punch`](Self::punch). Before it takes
    /// anything away it waits for the [`Grace`]: then whoever has asked
    /// [`retry`](crate::Invalidations::retry) inside a guard, and was told no, has left. When it is done it drops the
    /// [`Invalidation`]. Blocks for another invalidator's begin or end only.
    pub fn invalidate(&self, range: Range<Gfn>) -> (Invalidation, Grace) {
        let invalidation = self.snapshot().invalidations().begin(range);
        (invalidation, self.table().grace())
    }

    /// Gives the memory of `ranges` back to the host: the slots stay, and the pages read as zeros until they are written
    /// again. Gives the number of bytes. vCPUs and devices may run on.
    ///
    /// The ranges are whole pages of the memory behind them ([`Region::page_size`]), of any slots that are not
    /// read-only, and may cross from one slot to the next. Anonymous memory is given back by `MADV_DONTNEED`, shared
    /// memory by punching a hole into its file (`FALLOC_FL_PUNCH_HOLE`), for every process that has it. Private mappings
    /// of files, which would read as the file, are refused, and so is memory that the consumer mapped
    /// ([`MemoryKind::support`](crate::MemoryKind::support) is the table). Bitmaps are told, since the contents change.
    ///
    /// Of a slot with a [`GuestMemfd`](crate::GuestMemfd) both are given back, whichever of the two the VM's memory
    /// attributes say now: the pages of the user mapping (what is shared lives there) and those of the guest_memfd (what
    /// is private lives there). A page that is both takes memory twice until it is punched. (One that is mapped is the only
    /// memory of its slot, and punched once.)
    ///
    /// While a `uffd::PointInTime` keeps a mapping of these slots, pages of it are not given back.
    ///
    /// A slot that another thread moves or removes meanwhile is punched all the same, where it was.
    ///
    /// Blocks until the readers that are inside have left: not to be called inside a guard of the same VM's slots. One
    /// call for many ranges waits once.
    ///
    /// # Errors
    /// [`PunchError`]. All ranges are checked first: then nothing has changed, but for [`PunchError::Host`], which says
    /// what has.
    pub fn punch(&self, ranges: &[Range<GuestAddress>]) -> Result<u64, PunchError> {
        self.punch_by(&Kernel, ranges)
    }

    fn punch_by(
        &self,
        host: &impl Discard,
        ranges: &[Range<GuestAddress>],
    ) -> Result<u64, PunchError> {
        // Holds the regions, and so the mappings, to the end, whatever happens to the slots meanwhile.
        let snapshot = self.snapshot();
        let mut parts = Vec::new();
        for range in ranges {
            parts_of(&snapshot, range, &mut parts)?;
        }
        let Some(hull) = parts
            .iter()
            .map(|(_, range)| range.clone())
            .reduce(|all, range| all.start.min(range.start)..all.end.max(range.end))
        else {
            return Ok(0);
        };
        // To the end: nobody begins to keep what is in them.
        let discarding = parts.iter().map(|(region, range)| {
            let kept = PunchError::Kept {
                slot: region.extent().id(),
                address: range.start,
            };
            region.mapping().discard().ok_or(kept)
        });
        let _discarding = discarding.collect::<Result<Vec<_>, _>>()?;
        let (invalidation, grace) = self.invalidate(frames(&hull));
        grace.wait();
        let mut done = 0;
        for (region, range) in parts {
            let offset = range.start - region.extent().start().0;
            let size = range.end - range.start;
            let refused = |(call, source)| PunchError::Host {
                call,
                slot: region.extent().id(),
                start: range.start,
                size,
                done,
                source,
            };
            discard(host, region, offset, size).map_err(refused)?;
            region.bitmap().mark_dirty(offset as usize, size as usize);
            if let Some(private) = region.guest_memfd()
                && !private.file.is_mappable()
            {
                host.punch_hole(private.file.as_fd(), private.offset + offset, size)
                    .map_err(|errno| refused((PUNCH_PRIVATE, errno)))?;
            }
            done += size;
        }
        drop(invalidation);
        Ok(done)
    }
}

const ADVISE: &str = "madvise(MADV_DONTNEED)";
const PUNCH: &str = "fallocate(FALLOC_FL_PUNCH_HOLE)";
const PUNCH_PRIVATE: &str = "fallocate(FALLOC_FL_PUNCH_HOLE) of the guest_memfd";

/// The calls that give memory back: the edge. A trait, so that a test refuses each of them in turn, and looks at what is
/// true in the moment of each. A call that is refused has given nothing back.
trait Discard {
    /// `MADV_DONTNEED`.
    ///
    /// # Safety
    /// The range is of a mapping of guest memory, which stays for the length of the call.
    unsafe fn dont_need(&self, start: *mut c_void, size: usize) -> Result<(), Errno>;

    /// `FALLOC_FL_PUNCH_HOLE`. The file's pages are a guest's, whose contents may change at any time; none is unmapped.
    fn punch_hole(&self, file: BorrowedFd<'_>, offset: u64, size: u64) -> Result<(), Errno>;
}

/// The kernel.
struct Kernel;

fn last_errno() -> Errno {
    let error = io::Error::last_os_error().raw_os_error();
    // The last OS error always has a number.
    Errno(error.unwrap_or(libc::EIO))
}

impl Discard for Kernel {
    unsafe fn dont_need(&self, start: *mut c_void, size: usize) -> Result<(), Errno> {
        // SAFETY: the caller's promise: guest memory, whose contents may change at any time, and it stays mapped.
        match unsafe { libc::madvise(start, size, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(last_errno()),
        }
    }

    fn punch_hole(&self, file: BorrowedFd<'_>, offset: u64, size: u64) -> Result<(), Errno> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a system call on an open descriptor, with integers.
        match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, size as i64) } {
            0 => Ok(()),
            _ => Err(last_errno()),
        }
    }
}

/// Cuts `range` up by slots, and checks it.
fn parts_of<'a, B>(
    table: &'a SlotTable<B>,
    range: &Range<GuestAddress>,
    parts: &mut Vec<(&'a Region<B>, Range<u64>)>,
) -> Result<(), PunchError> {
    let (mut address, end) = (range.start.0, range.end.0);
    if address >= end {
        return Err(PunchError::Empty {
            start: address,
            end,
        });
    }
    while address < end {
        let region = table
            .find(GuestAddress(address))
            .ok_or(PunchError::NoSlot { address })?;
        let slot = region.extent().id();
        if region.is_read_only() {
            return Err(PunchError::ReadOnly { slot, address });
        }
        let kind = region.mapping().kind();
        let why = match kind.support(Mechanism::Punch) {
            Support::Yes => None,
            Support::No(why) => Some(why),
            _ => Some("nothing is known of it; who mapped it can give it back"),
        };
        if let Some(why) = why {
            let mechanism = Mechanism::Punch;
            let source = Unsupported {
                kind,
                mechanism,
                why,
            };
            return Err(PunchError::Unsupported {
                slot,
                address,
                source,
            });
        }
        let start = region.extent().start().0;
        let here = address..end.min(region.extent().guest_range().end);
        let page_size = region.page_size();
        // The host's pages: a slot of a part of a mapping may begin or end within one.
        let host = region.extent().host_start().0 as u64;
        let unaligned = [here.start, here.end]
            .into_iter()
            .find(|address| !(address - start + host).is_multiple_of(page_size));
        if let Some(address) = unaligned {
            return Err(PunchError::Unaligned {
                slot,
                address,
                page_size,
            });
        }
        address = here.end;
        parts.push((region, here));
    }
    Ok(())
}

/// Gives `size` bytes at `offset` of the region's mapping back; they lie in it, and are whole pages. An error names the
/// call.
fn discard<B: Bitmap>(
    host: &impl Discard,
    region: &Region<B>,
    offset: u64,
    size: u64,
) -> Result<(), (&'static str, Errno)> {
    match region.file_offset() {
        Some(file) => host
            .punch_hole(file.file().as_fd(), file.start() + offset, size)
            .map_err(|errno| (PUNCH, errno)),
        None => {
            let start = region.extent().host_start().0 + offset as usize;
            // SAFETY: the range lies in the region's mapping, which is the guest's memory, and which the caller keeps.
            unsafe { host.dont_need(start as *mut _, size as usize) }
                .map_err(|errno| (ADVISE, errno))
        }
    }
}

#[cfg(test)]
mod tests;
