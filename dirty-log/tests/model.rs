// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bitmap, its walk and its arithmetic are a set of page numbers, whatever the size.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use dirty_log::{
    DirtyBitmap, DirtySource, Error, HostWrites, PAGE_SIZE, PageRun, dirty_bitmap_bytes,
};
use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;

type Model = BTreeSet<u64>;

/// A size and, over it, runs that mix lone pages with long stretches and hit the word ends.
fn sized_runs() -> impl Strategy<Value = (u64, Vec<PageRun>)> {
    (1u64..5000).prop_flat_map(|pages| {
        let run = (0..pages).prop_flat_map(move |first| {
            let most = pages - first;
            prop_oneof![Just(1), 1..=most.min(130), 1..=most, Just(most)].prop_map(move |count| {
                PageRun {
                    first,
                    pages: count,
                }
            })
        });
        (Just(pages), proptest::collection::vec(run, 0..20))
    })
}

fn build(pages: u64, runs: &[PageRun]) -> (DirtyBitmap, Model) {
    let (mut bitmap, mut model) = (DirtyBitmap::new(pages).unwrap(), Model::new());
    for run in runs {
        bitmap.set(*run).unwrap();
        model.extend(run.first..run.end());
    }
    (bitmap, model)
}

fn agree(bitmap: &DirtyBitmap, model: &Model) {
    assert_eq!(bitmap.count(), model.len() as u64);
    assert_eq!(bitmap.is_clean(), model.is_empty());
    let walked: Vec<u64> = bitmap.runs().flat_map(|run| run.first..run.end()).collect();
    assert!(
        walked.iter().eq(model.iter()),
        "the walk differs from the model"
    );
    let runs: Vec<PageRun> = bitmap.runs().collect();
    for pair in runs.windows(2) {
        assert!(pair[0].end() < pair[1].first, "{pair:?} touch");
    }
    for page in 0..bitmap.pages() + 130 {
        assert_eq!(bitmap.contains(page), model.contains(&page), "page {page}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn setting_walking_and_counting_agree_with_a_set((pages, runs) in sized_runs()) {
        let (bitmap, model) = build(pages, &runs);
        agree(&bitmap, &model);
        prop_assert_eq!(bitmap.words().len() as u64 * 8, dirty_bitmap_bytes(pages));
    }

    #[test]
    fn merge_subtract_clear_and_invert_agree_with_sets(
        (pages, runs) in sized_runs(), cut in 0usize..20, seed in any::<[u64; 4]>()
    ) {
        let (a, b) = runs.split_at(cut.min(runs.len()));
        let ((left, left_model), (right, right_model)) = (build(pages, a), build(pages, b));
        let all: Model = (0..pages).collect();

        let mut merged = left.clone();
        merged.merge(&right).unwrap();
        agree(&merged, &(&left_model | &right_model));

        let mut difference = left.clone();
        difference.subtract(&right).unwrap();
        agree(&difference, &(&left_model - &right_model));

        let mut cleared = left.clone();
        for run in b { cleared.clear(*run).unwrap(); }
        prop_assert_eq!(&cleared, &difference);

        let mut inverse = left.clone();
        inverse.invert();
        agree(&inverse, &(&all - &left_model));
        inverse.invert();
        prop_assert_eq!(&inverse, &left);

        // Words from elsewhere, with rubbish behind the last page.
        let mut foreign: Vec<u64> = right.words().to_vec();
        if pages % 64 != 0 { *foreign.last_mut().unwrap() |= seed[0] << (pages % 64); }
        let mut from_words = left.clone();
        from_words.merge_words(&foreign).unwrap();
        prop_assert_eq!(&from_words, &merged);

        let mut full = left;
        full.set_all();
        agree(&full, &all);
        full.clear_all();
        agree(&full, &Model::new());
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing(
        (pages, runs) in sized_runs(), first in any::<u64>(), count in any::<u64>()
    ) {
        let (mut bitmap, _) = build(pages, &runs);
        let before = bitmap.clone();
        let run = PageRun { first, pages: count };
        if first.checked_add(count).is_none_or(|end| end > pages) {
            let refused = matches!(bitmap.set(run), Err(Error::OutOfRange { .. }));
            prop_assert!(refused);
            prop_assert!(bitmap.clear(run).is_err());
        }
        prop_assert!(bitmap.merge(&DirtyBitmap::new(pages + 1).unwrap()).is_err());
        prop_assert!(bitmap.subtract(&DirtyBitmap::new(pages + 1).unwrap()).is_err());
        prop_assert!(bitmap.merge_words(&vec![u64::MAX; before.words().len() + 1]).is_err());
        prop_assert_eq!(bitmap, before);
    }

    #[test]
    fn host_writes_mark_every_page_that_a_write_touches(
        pages in 1u64..600,
        writes in proptest::collection::vec((any::<u32>(), 0usize..600_000), 0..12),
        wild in any::<(usize, usize)>(),
    ) {
        let mut log = HostWrites::new(pages).unwrap();
        let mut model = Model::new();
        let bytes = (pages * PAGE_SIZE) as usize;
        for (offset, len) in &writes {
            let offset = *offset as usize % bytes;
            // Half of them through a slice, as vm-memory does it.
            if len % 2 == 0 {
                log.mark_dirty(offset, *len);
            } else {
                log.slice_at(offset / 2).slice_at(offset - offset / 2).mark_dirty(0, *len);
            }
            for byte in (offset..(offset + len).min(bytes)).step_by(64).chain(
                (*len > 0).then(|| (offset + len - 1).min(bytes - 1))) {
                model.insert(byte as u64 / PAGE_SIZE);
            }
        }
        for page in 0..pages + 2 {
            prop_assert_eq!(log.dirty_at((page * PAGE_SIZE + 5) as usize), model.contains(&page));
        }
        let mut dirty = DirtyBitmap::new(pages).unwrap();
        log.take(&mut dirty).unwrap();
        agree(&dirty, &model);

        // Taken is taken, and what vm-memory would never ask for harms nobody.
        dirty.clear_all();
        log.take(&mut dirty).unwrap();
        prop_assert!(dirty.is_clean());
        log.mark_dirty(wild.0, wild.1);
        log.slice_at(wild.0).mark_dirty(wild.1, wild.0);
        prop_assert!(log.take(&mut DirtyBitmap::new(pages + 1).unwrap()).is_err());
    }
}

/// The sizes around a stride's end, exhaustively: each single run of a bitmap of up to 600 pages
/// would be 180,000 walks; runs that start or end near a word's end are enough.
#[test]
fn each_run_near_a_word_end_is_found_exactly() {
    let near = |limit: u64| (0..=limit).filter(|page| matches!(page % 64, 0 | 1 | 62 | 63));
    for pages in near(700) {
        for first in near(pages) {
            for end in near(pages).filter(|end| *end > first) {
                let mut bitmap = DirtyBitmap::new(pages).unwrap();
                let run = PageRun {
                    first,
                    pages: end - first,
                };
                bitmap.set(run).unwrap();
                assert!(bitmap.runs().eq([run]), "{run:?} of {pages}");
            }
        }
    }
}
