// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages of a guest's memory, for whoever serves them to another host.

use memslots::{Gfn, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::source::whole_pages;
use crate::{Fetched, PageSource, SourceError};

/// The memory of a guest that stands still: what it writes afterwards, who has asked before does not see. `M` is any of
/// vm-memory's guest memories.
///
/// A page that is missing itself (in a restore of its own) blocks who reads it until it comes.
#[derive(Clone, Debug)]
pub struct MemorySource<M>(pub M);

impl<M: Bytes<GuestAddress, E = GuestMemoryError> + Send + Sync> PageSource for MemorySource<M> {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        whole_pages(first, into)?;
        let none = |page: usize| SourceError::NoSuchPage {
            gfn: Gfn(first.0.saturating_add(page as u64)),
        };
        for (page, bytes) in into.chunks_mut(PAGE_SIZE as usize).enumerate() {
            let gfn = first.0 + page as u64;
            let at = gfn.checked_mul(PAGE_SIZE).ok_or_else(|| none(page))?;
            self.0
                .read_slice(bytes, GuestAddress(at))
                .map_err(|_| none(page))?;
        }
        Ok(Fetched::Bytes)
    }
}
