// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A slot that no VM has, and sets of its pages: for tests against fake kernels.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;

use dirty_log::{DirtyBitmap, PAGE_SIZE, PageRun};
use memslots::{Hva, SlotExtent, SlotId};
use vm_memory::GuestAddress;

pub const PAGES: u64 = 700;

pub fn extent_of(slot: u32, first: u64, pages: u64) -> SlotExtent {
    let (at, size) = (GuestAddress(first * PAGE_SIZE), pages * PAGE_SIZE);
    // SAFETY: a fake's slot; no memory is touched through it.
    unsafe { SlotExtent::new(SlotId(slot), at, size, Hva(0x7000_0000)).unwrap() }
}

pub fn extent() -> SlotExtent {
    extent_of(4, 0x100, PAGES)
}

pub fn set(pages: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    pages.into_iter().collect()
}

pub fn pages(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
    set(bitmap.runs().flat_map(|run| run.first..run.end()))
}

pub fn run(first: u64, pages: u64) -> PageRun {
    PageRun { first, pages }
}

/// What a refused call says.
pub const ERRNOS: [i32; 6] = [
    libc::EINTR,
    libc::ENOENT,
    libc::EINVAL,
    libc::ENOMEM,
    libc::EIO,
    libc::EBADF,
];
