// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Several sources as one, and a slot in parts: each page once, and none lost whichever source fails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod slots;

use std::io;
use std::sync::{Arc, Mutex};

use dirty_log::{DirtyBitmap, DirtyLog, DirtySource, Error, HostWrites, PAGE_SIZE, PageRun, Union};
use proptest::prelude::*;
use slots::{PAGES, extent, pages, run, set};
use vm_memory::bitmap::Bitmap;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn parts_are_the_whole(
        dirty in proptest::collection::btree_set(0u64..PAGES, 0..300), each in 1u64..900
    ) {
        let writes = HostWrites::new(PAGES).unwrap();
        let mut log = DirtyLog::new(extent(), writes.clone()).unwrap();
        for page in &dirty {
            writes.mark_dirty((page * PAGE_SIZE) as usize, 1);
        }
        let mut seen = Vec::new();
        let mut parts = log.parts(each).unwrap();
        while let Some(mut part) = parts.next_part().unwrap() {
            let range = part.range();
            let runs: Vec<PageRun> = part.runs().collect();
            prop_assert_eq!(part.count(), runs.iter().map(|run| run.pages).sum::<u64>());
            prop_assert!(part.count() > 0 && range.first.is_multiple_of(64));
            for each in &runs {
                prop_assert!(each.first >= range.first && each.end() <= range.end());
                seen.extend(each.first..each.end());
            }
            if range.first > 0 {
                let refused = part.forget(run(0, 1)).is_err();
                prop_assert!(refused);
            }
            // Forgotten one by one, or all at once.
            if seen.len() % 2 == 0 {
                for each in runs { part.forget(each).unwrap(); }
                prop_assert_eq!(part.count(), 0);
            } else {
                part.commit();
            }
        }
        prop_assert!(seen.iter().eq(dirty.iter()));
        prop_assert!(log.pending().is_clean());
    }
}

/// Fails its next `take` without having moved anything.
struct Fails(Arc<Mutex<bool>>);

impl DirtySource for Fails {
    fn pages(&self) -> u64 {
        PAGES
    }

    fn take(&mut self, _: &mut DirtyBitmap) -> Result<(), Error> {
        if std::mem::take(&mut *self.0.lock().unwrap()) {
            return Err(Error::ResetRings {
                source: io::Error::other("injected"),
            });
        }
        Ok(())
    }
}

#[test]
fn a_union_loses_nothing_whichever_of_its_sources_fails() {
    for position in 0..3 {
        let fail = Arc::new(Mutex::new(true));
        let writes = [
            HostWrites::new(PAGES).unwrap(),
            HostWrites::new(PAGES).unwrap(),
        ];
        let mut union = Union::new(PAGES);
        for at in 0..3 {
            if at as u64 == position {
                union.add(Fails(fail.clone())).unwrap();
            } else {
                union.add(writes[at % 2].clone()).unwrap();
            }
        }
        let mut log = DirtyLog::new(extent(), union).unwrap();
        writes[0].mark_dirty(0, 1);
        writes[1].mark_dirty(4096, 1);
        assert!(log.harvest().is_err());
        // The two that are left, whichever they are, have the same source once or twice.
        let heard = set((0..3).filter(|at| *at != position).map(|at| at % 2));
        assert_eq!(pages(log.harvest().unwrap().bitmap()), heard);
    }
    assert!(Union::new(PAGES).with(HostWrites::new(1).unwrap()).is_err());
}
