// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From bits to runs of pages: what a copier wants, found at memory bandwidth.
//!
//! A page-by-page walk asks one question a page; most answers are "clean" or "as the page before".
//! This walk asks one question for 64 words (4096 pages) while it looks for a run, and the same while
//! it looks for the end of a long one. Among eight words the next that is not clean, and inside a word
//! the next edge, is one `tzcnt`.

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
/// passed many at a time; nothing is allocated.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    words: &'a [u64],
    /// The number of the first word, where the words are a part of a bitmap.
    base: u64,
    /// The word under the cursor.
    at: usize,
    /// What is left of it: bits already passed are zero here.
    left: u64,
    /// Where the present stride begins. The cursor is in it, or before it at the very start.
    stride: usize,
    /// The words of the stride that lie behind the cursor and are not zero, a bit each.
    more: u32,
}

impl<'a> Runs<'a> {
    /// The words must hold no bit beyond the bitmap's last page; `base` is the number of the first.
    #[inline]
    pub(crate) fn new(words: &'a [u64], base: usize) -> Self {
        let mut runs = Self {
            words,
            base: base as u64,
            at: 0,
            left: 0,
            stride: 0,
            more: 0,
        };
        runs.enter(0);
        runs
    }

    /// Goes to the stride that begins at `from`, with no word taken yet.
    #[inline]
    fn enter(&mut self, from: usize) {
        self.stride = from;
        // Which of the words are not zero is found without a branch, so that a sparse bitmap does not
        // cost a misprediction a word.
        self.more = match self.words.get(from..from + STRIDE) {
            Some(stride) => stride
                .iter()
                .rev()
                .fold(0, |more, word| more << 1 | u32::from(*word != 0)),
            None => not_zero(self.words.get(from..).unwrap_or_default()),
        };
    }

    /// Goes to the next word that is not zero; `None` at the end.
    #[inline]
    fn advance(&mut self) -> Option<()> {
        while self.more == 0 {
            // The next stride first: in a bitmap that is not clean there is something in it.
            self.enter(self.stride + STRIDE);
            if self.more == 0 {
                let from = past(self.words, self.stride + STRIDE, 0);
                if from >= self.words.len() {
                    // Stay there: an iterator that is finished stays finished.
                    self.stride = self.words.len();
                    return None;
                }
                self.enter(from);
            }
        }
        self.at = self.stride + self.more.trailing_zeros() as usize;
        self.more &= self.more - 1;
        self.left = *self.words.get(self.at)?;
        Some(())
    }

    /// Goes to the end of a run that reaches the end of the word under the cursor, and says where it is.
    #[inline]
    fn follow(&mut self) -> u64 {
        let (at, ones) = end_of_long(self.words, self.at + 1);
        self.at = at;
        let word = self.words.get(at).copied().unwrap_or(0);
        self.left = word & u64::MAX.checked_shl(ones).unwrap_or(0);
        // The word under the cursor is entered, and so no more "more".
        if at < self.stride + STRIDE {
            self.more &= u32::MAX << (at - self.stride) << 1;
        } else {
            self.enter(at);
            self.more &= !1;
        }
        at as u64 * WORD_BITS + u64::from(ones)
    }
}

/// Where a run ends that goes on at the start of word `next`: the word, and how many of its bits are the
/// run's. Takes and gives numbers alone, so that the iterator's own can stay in registers.
#[inline(never)]
fn end_of_long(words: &[u64], next: usize) -> (usize, u32) {
    let at = match words.get(next) {
        Some(&u64::MAX) => past(words, next + 1, u64::MAX),
        _ => next,
    };
    (at, words.get(at).copied().unwrap_or(0).trailing_ones())
}

/// Which words are not zero, a bit each; fewer than a stride, at the end.
#[cold]
#[inline(never)]
fn not_zero(words: &[u64]) -> u32 {
    words
        .iter()
        .rev()
        .fold(0, |more, word| more << 1 | u32::from(*word != 0))
}

/// First index from `from` on at which words that differ from `plain` (all zeros or all ones) may
/// begin: everything before it is plain. Exact for `plain` all ones.
#[inline(never)]
fn past(words: &[u64], mut from: usize, plain: u64) -> usize {
    /// Looked at together where nothing differs: eight cache lines.
    const FAR: usize = 8 * STRIDE;
    // Lane by lane, so that the compiler makes wide loads of it and no chain.
    let differs = |part: &[u64]| {
        let mut lanes = [0; STRIDE];
        for line in part.chunks_exact(STRIDE) {
            lanes
                .iter_mut()
                .zip(line)
                .for_each(|(lane, word)| *lane |= word ^ plain);
        }
        lanes.iter().fold(0, |one, other| one | other) != 0
    };
    while words
        .get(from..from + FAR)
        .is_some_and(|part| !differs(part))
    {
        from += FAR;
    }
    while words
        .get(from..from + STRIDE)
        .is_some_and(|part| !differs(part))
    {
        from += STRIDE;
    }
    if plain != 0 {
        while words.get(from) == Some(&plain) {
            from += 1;
        }
    }
    from
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    #[inline]
    fn next(&mut self) -> Option<PageRun> {
        if self.left == 0 {
            self.advance()?;
        }
        let low = self.left.trailing_zeros();
        let start = self.at as u64 * WORD_BITS + u64::from(low);
        // Adding the run's lowest bit carries through the run: the ones above stay, and a carry
        // out of the word says that the run reaches its end.
        let (rest, reaches_end) = self.left.overflowing_add(1 << low);
        let pages = if reaches_end {
            self.follow() - start
        } else {
            self.left &= rest;
            u64::from(rest.trailing_zeros() - low)
        };
        Some(PageRun {
            first: self.base * WORD_BITS + start,
            pages,
        })
    }
}

impl FusedIterator for Runs<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(words: &[u64]) -> Vec<(u64, u64)> {
        Runs::new(words, 0).map(|r| (r.first, r.pages)).collect()
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
        let mut all = Runs::new(&[1], 0);
        assert!(all.next().is_some());
        assert!(all.next().is_none());
        assert!(all.next().is_none());
    }
}
