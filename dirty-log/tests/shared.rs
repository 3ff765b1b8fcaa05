// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bitmaps that other processes share: a slot takes its own bits, and nobody makes the log smaller.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod slots;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dirty_log::{DirtyBitmap, DirtyLog, DirtySource, Error, SharedLog, SharedSource, SharedWords};
use memslots::SlotId;
use proptest::prelude::*;
use slots::{PAGES, extent, extent_of, pages as pages_in, set};

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_window_of_a_shared_bitmap_takes_its_own_bits_and_leaves_the_neighbours(
        first in 0u64..200, pages in 1u64..300, marked in proptest::collection::btree_set(0u64..512, 0..200)
    ) {
        let shared: Arc<Vec<AtomicU64>> = Arc::new((0..8).map(|_| AtomicU64::new(0)).collect());
        for frame in &marked {
            shared[(frame / 64) as usize].fetch_or(1 << (frame % 64), Ordering::Release);
        }
        let mut source = SharedSource::new(shared.clone(), &extent_of(1, first, pages)).unwrap();
        let mut dirty = DirtyBitmap::new(pages).unwrap();
        source.take(&mut dirty).unwrap();
        let inside = |frame: &u64| (first..first + pages).contains(frame);
        let want = set(marked.iter().filter(|frame| inside(frame)).map(|frame| frame - first));
        prop_assert_eq!(pages_in(&dirty), want);
        let left = (0..512).filter(|frame| {
            shared[(frame / 64) as usize].load(Ordering::Relaxed) & 1 << (frame % 64) != 0
        });
        prop_assert_eq!(set(left), set(marked.iter().copied().filter(|frame| !inside(frame))));
        prop_assert!(source.take(&mut DirtyBitmap::new(pages + 1).unwrap()).is_err());
    }
}

#[test]
fn a_shared_log_is_sealed_and_another_mapping_of_it_is_heard() {
    let log = Arc::new(SharedLog::new(0x100 + PAGES).unwrap());
    assert_eq!(log.size(), 4096, "whole pages");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&log.fd());
    for size in [0, 4095, 8192] {
        // SAFETY: integers alone.
        let cut = unsafe { libc::ftruncate(fd, size) };
        assert_eq!(cut, -1, "a peer cannot make it {size} bytes");
    }
    // A peer: a mapping of its own, through the descriptor.
    let bit = 0x100 + 77;
    let peer = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{fd}"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&peer, &[1 << (bit % 8)], bit / 8).unwrap();
    let mut dirty =
        DirtyLog::new(extent(), SharedSource::new(log.clone(), &extent()).unwrap()).unwrap();
    assert_eq!(pages_in(dirty.harvest().unwrap().bitmap()), set([77]));
    assert!(
        log.words()
            .iter()
            .all(|word| word.load(Ordering::Relaxed) == 0)
    );
    let beyond = extent_of(1, 32768 - 5, 6);
    assert!(matches!(
        SharedSource::new(log, &beyond),
        Err(Error::BeyondShared {
            slot: SlotId(1),
            end: 32769,
            frames: 32768
        })
    ));
}
