// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory whose parts come from several sources.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use memslots::{Gfn, PAGE_SIZE};

use super::{Fetched, PageSource, SourceError, whole_pages};
use crate::Lane;

/// Several sources, each for its part of guest memory: a snapshot and those that it builds upon, or a file for each slot.
///
/// ```
/// use async_pf::{CompositeSource, Fetched, PageSource, ZeroSource};
/// use memslots::Gfn;
/// use std::sync::Arc;
///
/// let zeros: Arc<dyn PageSource> = Arc::new(ZeroSource);
/// let source = CompositeSource::new([
///     (Gfn(0)..Gfn(0x100), zeros.clone()),
///     (Gfn(0x1000)..Gfn(0x1100), zeros),
/// ])?;
/// assert_eq!(source.fetch(Gfn(0x10ff), &mut [1; 0x1000])?, Fetched::Zero);
/// assert!(source.fetch(Gfn(0xfff), &mut [1; 0x1000]).is_err());
/// # Ok::<(), async_pf::SourceError>(())
/// ```
pub struct CompositeSource {
    /// Ascending, disjoint.
    parts: Vec<(Range<Gfn>, Arc<dyn PageSource>)>,
}

impl CompositeSource {
    /// A source of these parts, in any order. Each is asked for pages by their number in the guest, as they are.
    ///
    /// # Errors
    /// [`SourceError::Layout`] of a part that overlaps another or ends before its start.
    pub fn new(
        parts: impl IntoIterator<Item = (Range<Gfn>, Arc<dyn PageSource>)>,
    ) -> Result<Self, SourceError> {
        let mut parts: Vec<_> = parts.into_iter().collect();
        parts.sort_by_key(|(range, _)| (range.start, range.end));
        let mut free_from = Gfn(0);
        for (range, _) in &parts {
            if range.start < free_from || range.end < range.start {
                return Err(SourceError::Layout {
                    gfn: range.start,
                    pages: range.end.0.saturating_sub(range.start.0),
                });
            }
            free_from = range.end;
        }
        parts.retain(|(range, _)| !range.is_empty());
        Ok(Self { parts })
    }

    /// The source that has the page, and how many pages from it on it has.
    fn locate(&self, gfn: Gfn) -> Option<(&dyn PageSource, u64)> {
        let after = self.parts.partition_point(|(range, _)| range.start <= gfn);
        let (range, source) = self.parts.get(after.checked_sub(1)?)?;
        (gfn < range.end).then(|| (&**source, range.end.0 - gfn.0))
    }
}

impl PageSource for CompositeSource {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        self.fetch_for(Lane::Fault, first, into)
    }

    fn fetch_for(&self, lane: Lane, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        whole_pages(first, into)?;
        let (mut done, mut all) = (0, Fetched::Zero);
        while done < into.len() {
            let gfn = Gfn(first.0 + done as u64 / PAGE_SIZE);
            let (source, there) = self.locate(gfn).ok_or(SourceError::NoSuchPage { gfn })?;
            let left = (into.len() - done) as u64;
            let end = done + there.saturating_mul(PAGE_SIZE).min(left) as usize;
            let part = into.get_mut(done..end).unwrap_or_default();
            match (source.fetch_for(lane, gfn, part)?, all) {
                (Fetched::Zero, Fetched::Zero) => {}
                (Fetched::Zero, Fetched::Bytes) => part.fill(0),
                (Fetched::Bytes, Fetched::Bytes) => {}
                // What was zeros so far is written as such, now that something else follows.
                (Fetched::Bytes, Fetched::Zero) => {
                    into.get_mut(..done).unwrap_or_default().fill(0);
                    all = Fetched::Bytes;
                }
            }
            done = end;
        }
        Ok(all)
    }

    fn overtakes(&self) -> bool {
        self.parts.iter().any(|(_, source)| source.overtakes())
    }

    fn run(&self, first: Gfn, pages: u64) -> u64 {
        self.locate(first).map_or(1, |(source, there)| {
            source.run(first, there.min(pages)).clamp(1, pages.max(1))
        })
    }
}

impl fmt::Debug for CompositeSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.parts.iter().map(|(range, _)| range);
        f.debug_list().entries(parts).finish()
    }
}
