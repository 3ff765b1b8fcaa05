// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that is a file's pages, which may be gone by the time that somebody reads them: the file was cut off, or its
//! disk cannot read any more. Or that [comes later](crate::lazy), or never. An access would be a `SIGBUS`, and only a vCPU's
//! thread survives that ([`kvm_core::BusErrors`]). So whoever else reads much of it has the host find it first.

#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::num::NonZeroUsize;
use std::ops::Range;

use dirty_log::HostWrites;
use memslots::{Holes, MapError, MemoryKind, Region};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::lazy::bus::{self, Lost};
use crate::memory::SlotTable;

/// Why guest memory cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// A page of its file cannot be had.
    #[error(transparent)]
    Find(#[from] MapError),
    /// A page does not come.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// There is no such memory.
    #[error(transparent)]
    Read(#[from] GuestMemoryError),
}

/// Reads guest memory, all of which the host [finds](find) first.
///
/// # Errors
/// [`ReadError`].
pub(crate) fn read(table: &SlotTable, address: u64, into: &mut [u8]) -> Result<(), ReadError> {
    let end = address.saturating_add(into.len() as u64);
    find(table, address..end)?;
    Ok(table.read_slice(into, GuestAddress(address))?)
}

/// [`read`], of a guest that stands still, and of a guest_memfd nothing but what is there: a page of it that is read is made,
/// and then takes memory that the host cannot swap. What is not there is zeros.
///
/// # Errors
/// [`ReadError`].
pub(crate) fn read_present(
    table: &SlotTable,
    holes: &OnceCell<Option<Holes>>,
    address: u64,
    into: &mut [u8],
) -> Result<(), ReadError> {
    let whole = address..address.saturating_add(into.len() as u64);
    let region = table.find(GuestAddress(address)).filter(|region| {
        let within = whole.end <= region.extent().guest_range().end;
        within && region.mapping().kind() == MemoryKind::GuestMemfd
    });
    let known = region.and_then(|region| {
        let holes = holes.get_or_init(|| Holes::open().ok()).as_ref()?;
        let start = region.extent().guest_range().start;
        let within = whole.start - start..whole.end - start;
        // Not known, all of it is read.
        holes
            .of(region.mapping(), within)
            .ok()
            .map(|found| (start, found))
    });
    let Some((start, found)) = known else {
        return read(table, address, into);
    };
    into.fill(0);
    let mut at = address;
    let holes = found
        .iter()
        .map(|hole| start + hole.start..start + hole.end);
    for hole in holes.chain(std::iter::once(whole.end..whole.end)) {
        let there = (at - address) as usize..(hole.start - address) as usize;
        table.read_slice(into.get_mut(there).unwrap_or_default(), GuestAddress(at))?;
        at = hole.end;
    }
    Ok(())
}

/// Has the host find the pages in a range of guest memory, those of them that are a file's or come later, which blocks until
/// they are read. Memory that nobody has is not looked for. On Linux before 5.14, which cannot be asked, they are touched.
///
/// # Errors
/// [`ReadError::Find`], [`ReadError::Lost`]: a page cannot be had.
pub(crate) fn find(table: &SlotTable, range: Range<u64>) -> Result<(), ReadError> {
    let mut at = range.start;
    while at < range.end {
        let Some(region) = table.find(GuestAddress(at)) else {
            return Ok(());
        };
        let end = range.end.min(region.extent().guest_range().end);
        if region.mapping().kind() == MemoryKind::FilePrivate {
            find_in(region, at..end)?;
        } else {
            let start = region.extent().guest_range().start;
            let host = |at: u64| region.mapping().host().0 + (at - start) as usize;
            bus::find(host(at)..host(end))?;
        }
        at = end;
    }
    Ok(())
}

/// [`find`], of any memory, in a region that has all of the range: waits for pages that come later.
///
/// # Errors
/// [`MapError::Prefault`]: a page cannot be had.
pub(crate) fn find_in(region: &Region<HostWrites>, range: Range<u64>) -> Result<(), MapError> {
    let start = region.extent().guest_range().start;
    let page = region.page_size();
    let first = (range.start - start) / page * page;
    let last = (range.end - start).next_multiple_of(page);
    region.mapping().prefault(first..last, NonZeroUsize::MIN)
}
