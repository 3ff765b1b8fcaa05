// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's layout of a dirty bitmap: one bit a page, little-endian `u64` words, whole words only.
//!
//! Everything that touches words goes through the two functions here, so that the rule about the
//! last, partly used word is written once.

use crate::{Error, PageRun};

// Bytes of guest memory that one bit stands for: KVM counts in pages of the host, as it does for slots.
pub use memslots::PAGE_SIZE;

pub(crate) const WORD_BITS: u64 = u64::BITS as u64;

// A page index is used as a `usize` below.
const _: () = assert!(
    usize::BITS == 64,
    "dirty-log needs a 64-bit host, as KVM on x86-64 does"
);

/// How many bytes the kernel writes for a slot of `pages` pages: `ALIGN(pages, 64) / 8`.
///
/// The kernel's `kvm_dirty_bitmap_bytes`. A buffer shorter than this is written past its end by
/// `KVM_GET_DIRTY_LOG`: an ioctl that has no length argument.
///
/// ```
/// assert_eq!(dirty_log::dirty_bitmap_bytes(0), 0);
/// assert_eq!(dirty_log::dirty_bitmap_bytes(1), 8);
/// assert_eq!(dirty_log::dirty_bitmap_bytes(64), 8);
/// assert_eq!(dirty_log::dirty_bitmap_bytes(65), 16);
/// ```
pub const fn dirty_bitmap_bytes(pages: u64) -> u64 {
    pages.div_ceil(WORD_BITS) * (WORD_BITS / 8)
}

/// How many words hold the bits of `pages` pages.
pub(crate) const fn words_for(pages: u64) -> usize {
    pages.div_ceil(WORD_BITS) as usize
}

/// That many words, each made by `word`: the one place where a bitmap is allocated.
///
/// # Errors
/// [`Error::Memory`], where `vec!` would panic or abort.
pub(crate) fn words<T>(pages: u64, word: impl FnMut() -> T) -> Result<Box<[T]>, Error> {
    let mut words = Vec::new();
    words
        .try_reserve_exact(words_for(pages))
        .map_err(|_| Error::Memory {
            pages,
            bytes: dirty_bitmap_bytes(pages),
        })?;
    words.resize_with(words_for(pages), word);
    Ok(words.into_boxed_slice())
}

/// The bits of the last word that stand for a page; all ones where the last word is full.
pub(crate) const fn tail_mask(pages: u64) -> u64 {
    match pages % WORD_BITS {
        0 => u64::MAX,
        used => (1 << used) - 1,
    }
}

/// Calls `each(word index, mask)` for every word that `run` touches, in ascending order.
///
/// The run must lie inside the bitmap; callers check or clip it first.
#[inline]
pub(crate) fn for_each_word(run: PageRun, mut each: impl FnMut(usize, u64)) {
    if run.pages == 0 {
        return;
    }
    let last_page = run.first + (run.pages - 1);
    let (first, last) = (
        (run.first / WORD_BITS) as usize,
        (last_page / WORD_BITS) as usize,
    );
    let head = u64::MAX << (run.first % WORD_BITS);
    let tail = u64::MAX >> (WORD_BITS - 1 - last_page % WORD_BITS);
    if first == last {
        each(first, head & tail);
        return;
    }
    each(first, head);
    for word in first + 1..last {
        each(word, u64::MAX);
    }
    each(last, tail);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_inside_one_word_is_one_mask() {
        let mut seen = Vec::new();
        for_each_word(PageRun { first: 3, pages: 2 }, |w, m| seen.push((w, m)));
        assert_eq!(seen, [(0, 0b11000)]);
    }

    #[test]
    fn a_run_over_three_words_has_a_head_a_body_and_a_tail() {
        let mut seen = Vec::new();
        for_each_word(
            PageRun {
                first: 63,
                pages: 66,
            },
            |w, m| seen.push((w, m)),
        );
        assert_eq!(seen, [(0, 1 << 63), (1, u64::MAX), (2, 1)]);
    }

    #[test]
    fn an_empty_run_touches_nothing() {
        for_each_word(
            PageRun {
                first: 64,
                pages: 0,
            },
            |_, _| panic!("touched"),
        );
    }
}
