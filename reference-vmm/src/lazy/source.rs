// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages out of a snapshot and those that it builds on.

use std::io;
use std::sync::Arc;

use async_pf::{Fetched, PageSource, SourceError};
use memslots::{Gfn, PAGE_SIZE};

use crate::snapshot::chain::Chain;
use crate::snapshot::pages::is_zero;
use crate::snapshot::{RestoreError, link::Link};

/// The pages of a chain's guest, whatever form its files have. A page of a file that is checked as it is read
/// ([`Chain::check_as_read`]) costs the reading of the piece that it is in, the first time.
#[derive(Clone, Debug)]
pub struct SnapshotSource(Arc<Chain>);

impl SnapshotSource {
    /// Of this chain.
    pub fn new(chain: Arc<Chain>) -> Self {
        SnapshotSource(chain)
    }

    /// Looks where the files have holes: from then on zeros are known page by page. Blocks for the file systems; ends early
    /// if `go_on` says so.
    pub fn find_holes(&self, go_on: impl Fn() -> bool) {
        self.0
            .links()
            .iter()
            .for_each(|link| link.find_holes(&go_on));
    }

    /// From `at` up to `end` at most: whether it is known to be zero, and where that ends.
    fn known(&self, at: u64, end: u64) -> (bool, u64) {
        match self.0.link_at(at) {
            Some((link, until)) => link.stored_from(at, until.min(end)),
            None => (false, end),
        }
    }

    /// Refuses pages that are not the guest's.
    fn check(&self, first: Gfn, bytes: usize) -> Result<u64, SourceError> {
        let whole = bytes > 0 && (bytes as u64).is_multiple_of(PAGE_SIZE);
        if !whole {
            return Err(SourceError::Buffer { bytes });
        }
        let nowhere = || SourceError::NoSuchPage { gfn: first };
        let at = first.0.checked_mul(PAGE_SIZE).ok_or_else(nowhere)?;
        let end = at.checked_add(bytes as u64).ok_or_else(nowhere)?;
        let mut regions = self.0.base().map(Link::map).into_iter();
        let mut regions = regions.by_ref().flat_map(|map| map.regions.iter());
        let inside = regions.any(|region| region.guest <= at && end <= region.guest + region.len);
        inside.then_some(at).ok_or_else(nowhere)
    }
}

impl PageSource for SnapshotSource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let at = self.check(first, into.len())?;
        let end = at + into.len() as u64;
        let other = |source: RestoreError| SourceError::Other {
            gfn: first,
            transient: is_transient(&source),
            source: Box::new(source),
        };
        if self.known(at, end) == (true, end)
            && let Some((link, _)) = self.0.link_at(at)
            && link.are_zeros(at..end).map_err(other)?
        {
            return Ok(Fetched::Zero);
        }
        self.0.read(at..end, into).map_err(other)?;
        // A page of zeros that was not known to be one takes no memory either.
        Ok(match is_zero(into) {
            true => Fetched::Zero,
            false => Fetched::Bytes,
        })
    }

    fn run(&self, first: Gfn, pages: u64) -> u64 {
        let at = first.0.saturating_mul(PAGE_SIZE);
        let end = at.saturating_add(pages.saturating_mul(PAGE_SIZE));
        let (_, until) = self.known(at, end);
        // What ends within a page is that page's.
        (until.saturating_sub(at).div_ceil(PAGE_SIZE)).clamp(1, pages.max(1))
    }
}

/// Whether to try again may help: the medium failed, and not the snapshot.
fn is_transient(error: &RestoreError) -> bool {
    match error {
        RestoreError::Read { source, .. } => source.kind() != io::ErrorKind::UnexpectedEof,
        _ => false,
    }
}
