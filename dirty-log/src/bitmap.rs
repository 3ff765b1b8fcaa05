// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A dirty bitmap in KVM's layout that knows how many pages it covers.

use crate::layout::{WORD_BITS, for_each_word, tail_mask, words, words_for};
use crate::{Error, PageRun, Runs};

/// One bit a page, in the layout that KVM writes and vhost devices share.
///
/// The number of pages travels with the bits, and the bits of the last word that stand for no page
/// are always zero: counting, inverting and walking need no special case at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Box<[u64]>,
    pages: u64,
}

impl DirtyBitmap {
    /// A clean bitmap for `pages` pages.
    ///
    /// The only allocation that this type makes ([`dirty_bitmap_bytes`](crate::dirty_bitmap_bytes)
    /// of zeroed memory).
    ///
    /// # Errors
    /// [`Error::Memory`] where the host has no memory for it.
    pub fn new(pages: u64) -> Result<Self, Error> {
        let words = words(pages, || 0)?;
        Ok(Self { words, pages })
    }

    /// How many pages the bitmap covers.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The words, as KVM writes them.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether `page` is dirty. A page beyond the end is not.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Marks a run of pages dirty; word by word, not bit by bit.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] where the run leaves the bitmap; nothing is marked then.
    pub fn set(&mut self, run: PageRun) -> Result<(), Error> {
        let words = &mut self.words;
        Self::check(self.pages, run)?;
        for_each_word(run, |word, mask| words[word] |= mask);
        Ok(())
    }

    /// Marks a run of pages clean.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] where the run leaves the bitmap; nothing is cleared then.
    pub fn clear(&mut self, run: PageRun) -> Result<(), Error> {
        let words = &mut self.words;
        Self::check(self.pages, run)?;
        for_each_word(run, |word, mask| words[word] &= !mask);
        Ok(())
    }

    /// Marks every page clean.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Marks every page dirty: the honest answer where bits may have been lost.
    pub fn set_all(&mut self) {
        self.words.fill(u64::MAX);
        self.trim();
    }

    /// Adds what is dirty in `other`.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] where the two cover different numbers of pages; nothing changes.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        self.same_size(other)?;
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(mine, theirs)| *mine |= theirs);
        Ok(())
    }

    /// Takes away what is dirty in `other`.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] where the two cover different numbers of pages; nothing changes.
    pub fn subtract(&mut self, other: &Self) -> Result<(), Error> {
        self.same_size(other)?;
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(mine, theirs)| *mine &= !theirs);
        Ok(())
    }

    /// Adds bits in KVM's layout that came from elsewhere: the kernel, or a device's shared log.
    ///
    /// Bits beyond the last page are ignored: what another process writes there names no page.
    ///
    /// # Errors
    /// [`Error::SizeMismatch`] where `words` is not exactly as long as this bitmap's own.
    pub fn merge_words(&mut self, words: &[u64]) -> Result<(), Error> {
        if words.len() != self.words.len() {
            return Err(Error::SizeMismatch {
                want: self.pages,
                got: words.len() as u64 * 64,
            });
        }
        self.words
            .iter_mut()
            .zip(words)
            .for_each(|(mine, theirs)| *mine |= theirs);
        self.trim();
        Ok(())
    }

    /// Turns clean into dirty and dirty into clean.
    pub fn invert(&mut self) {
        self.words.iter_mut().for_each(|word| *word = !*word);
        self.trim();
    }

    /// How many pages are dirty.
    pub fn count(&self) -> u64 {
        count(&self.words)
    }

    /// Whether no page is dirty; stops at the first that is.
    pub fn is_clean(&self) -> bool {
        self.runs().next().is_none()
    }

    /// The dirty pages as ascending, maximal runs.
    ///
    /// ```
    /// use dirty_log::{DirtyBitmap, PageRun};
    /// let mut dirty = DirtyBitmap::new(1000)?;
    /// dirty.set(PageRun { first: 60, pages: 10 })?;
    /// dirty.set(PageRun { first: 999, pages: 1 })?;
    /// let runs: Vec<_> = dirty.runs().map(|run| run.first..run.end()).collect();
    /// assert_eq!(runs, [60..70, 999..1000]);
    /// # Ok::<(), dirty_log::Error>(())
    /// ```
    #[inline]
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(&self.words, 0)
    }

    /// The dirty pages of a part that begins and ends at a word's end, or at the bitmap's: runs that
    /// reach beyond it are cut.
    pub(crate) fn runs_in(&self, part: PageRun) -> Runs<'_> {
        Runs::new(self.words_in(part), (part.first / WORD_BITS) as usize)
    }

    /// How many pages of such a part are dirty.
    pub(crate) fn count_in(&self, part: PageRun) -> u64 {
        count(self.words_in(part))
    }

    fn words_in(&self, part: PageRun) -> &[u64] {
        self.words
            .get((part.first / WORD_BITS) as usize..words_for(part.end()))
            .unwrap_or_default()
    }

    /// Adds `words`, whose first is this bitmap's word `first`; what lies beyond the end is ignored.
    #[cfg(feature = "kvm")]
    pub(crate) fn merge_at(&mut self, first: usize, words: &[u64]) {
        if let Some(mine) = self.words.get_mut(first..) {
            mine.iter_mut()
                .zip(words)
                .for_each(|(mine, theirs)| *mine |= theirs);
        }
        self.trim();
    }

    /// Callers keep the bits beyond the last page zero.
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Holds the invariant: no bit stands for no page.
    pub(crate) fn trim(&mut self) {
        if let Some(last) = self.words.last_mut() {
            *last &= tail_mask(self.pages);
        }
    }

    fn same_size(&self, other: &Self) -> Result<(), Error> {
        if self.pages == other.pages {
            Ok(())
        } else {
            Err(Error::SizeMismatch {
                want: self.pages,
                got: other.pages,
            })
        }
    }

    fn check(pages: u64, run: PageRun) -> Result<(), Error> {
        match run.first.checked_add(run.pages) {
            Some(end) if end <= pages => Ok(()),
            _ => Err(Error::OutOfRange {
                first: run.first,
                count: run.pages,
                pages,
            }),
        }
    }
}

fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}
