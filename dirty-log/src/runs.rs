// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From bits to runs of pages: what a copier wants, found at memory bandwidth.
//!
//! A page-by-page walk asks one question a page; most answers are "clean" or "as the page before".
//! This walk asks one question for eight words (512 pages) while it looks for a run, and the same
//! while it looks for the end of a long one. Inside a word the next edge is one `tzcnt`.

use std::iter::FusedIterator;
use std::ops::Range;

use crate::layout::{PAGE_SIZE, WORD_BITS};

/// Words that are looked at together: one cache line.
const STRIDE: usize = 8;

/// Consecutive pages, counted from the start of the slot (or bitmap) that they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// The first page, as an index into the slot: 0 is the page at the slot's first address.
    pub first: u64,
    /// How many pages. A run that an iterator of this crate yields has at least one.
    pub pages: u64,
}

impl PageRun {
    /// The run as byte offsets into the slot, for slicing a mapping.
    ///
    /// ```
    /// let run = dirty_log::PageRun { first: 2, pages: 3 };
    /// assert_eq!(run.bytes(), 0x2000..0x5000);
    /// ```
    pub const fn bytes(&self) -> Range<u64> {
        self.first.saturating_mul(PAGE_SIZE)..self.end().saturating_mul(PAGE_SIZE)
    }

    /// One past the last page.
    pub const fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// The part of the run that lies below page `limit`; empty where none does.
    pub(crate) const fn clipped(self, limit: u64) -> Self {
        let first = if self.first < limit {
            self.first
        } else {
            limit
        };
        let room = limit - first;
        Self {
            first,
            pages: if self.pages < room { self.pages } else { room },
        }
    }
}

/// The runs of set bits in a bitmap, ascending and maximal: two runs never touch.
///
/// Made by [`DirtyBitmap::runs`](crate::DirtyBitmap::runs). Clean words and fully dirty words are
/// passed eight at a time; nothing is allocated.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    words: &'a [u64],
    /// The word under the cursor.
    at: usize,
    /// What is left of it: bits already passed are zero here.
    left: u64,
}

impl<'a> Runs<'a> {
    /// The words must hold no bit beyond the bitmap's last page.
    pub(crate) fn new(words: &'a [u64]) -> Self {
        Self {
            words,
            at: 0,
            left: words.first().copied().unwrap_or(0),
        }
    }

    /// First index from `from` on whose word differs from `plain` (all zeros or all ones).
    fn past(&self, mut from: usize, plain: u64) -> usize {
        // Words up to the next stride first: every later stride is then one whole line.
        while let Some(stride) = self.words.get(from..from + STRIDE) {
            if stride
                .iter()
                .fold(0, |differs, word| differs | (word ^ plain))
                != 0
            {
                break;
            }
            from += STRIDE;
        }
        while self.words.get(from).is_some_and(|word| *word == plain) {
            from += 1;
        }
        from
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        if self.left == 0 {
            self.at = self.past(self.at + 1, 0);
            self.left = *self.words.get(self.at)?;
        }
        let low = self.left.trailing_zeros();
        let first = self.at as u64 * WORD_BITS + u64::from(low);
        // Adding the run's lowest bit carries through the run: the ones above stay, and a carry
        // out of the word says that the run reaches its end.
        let (rest, reaches_end) = self.left.overflowing_add(1 << low);
        if !reaches_end {
            let high = rest.trailing_zeros();
            self.left &= rest;
            return Some(PageRun {
                first,
                pages: u64::from(high - low),
            });
        }
        self.at = self.past(self.at + 1, u64::MAX);
        let word = self.words.get(self.at).copied().unwrap_or(0);
        let ones = word.trailing_ones();
        self.left = word & (u64::MAX << ones);
        let end = self.at as u64 * WORD_BITS + u64::from(ones);
        Some(PageRun {
            first,
            pages: end - first,
        })
    }
}

impl FusedIterator for Runs<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(words: &[u64]) -> Vec<(u64, u64)> {
        Runs::new(words).map(|r| (r.first, r.pages)).collect()
    }

    #[test]
    fn nothing_set_yields_nothing() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[0; 33]), []);
    }

    #[test]
    fn a_run_goes_on_over_word_ends() {
        assert_eq!(runs(&[1 << 63, u64::MAX, 1]), [(63, 66)]);
        assert_eq!(runs(&[u64::MAX; 20]), [(0, 20 * 64)]);
    }

    #[test]
    fn a_word_may_hold_many_runs() {
        assert_eq!(
            runs(&[0b1011_0001, 0, 0b10]),
            [(0, 1), (4, 2), (7, 1), (129, 1)]
        );
    }

    #[test]
    fn the_iterator_stays_finished() {
        let mut all = Runs::new(&[1]);
        assert!(all.next().is_some());
        assert!(all.next().is_none());
        assert!(all.next().is_none());
    }
}
