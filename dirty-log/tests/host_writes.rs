// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The VMM's own writes: a log is on or off, and a size that no host has memory for is an error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod slots;

use dirty_log::{DirtyBitmap, DirtyLog, DirtySource, Error, HostWrites};
use slots::{PAGES, extent, pages, set};
use vm_memory::bitmap::{Bitmap, NewBitmap};

#[test]
fn a_log_that_is_off_marks_nothing_and_one_that_is_turned_on_marks_from_then_on() {
    let writes = HostWrites::off(PAGES);
    let mut log = DirtyLog::new(extent(), writes.clone()).unwrap();
    writes.mark_dirty(0, 1);
    assert!(!writes.is_on() && !writes.dirty_at(0));
    assert!(log.harvest().unwrap().bitmap().is_clean());
    writes.start().unwrap();
    writes.start().unwrap();
    writes.clone().mark_dirty(4096, 1);
    writes.stop();
    writes.mark_dirty(8192, 1);
    assert_eq!(
        pages(log.harvest().unwrap().bitmap()),
        set([1]),
        "what was marked stays"
    );
    HostWrites::new(1).unwrap().stop();
}

#[test]
fn a_log_that_a_region_makes_for_itself_is_off_and_one_of_no_pages_is_harmless() {
    let writes = HostWrites::with_len(PAGES as usize * 4096);
    assert!(!writes.is_on());
    writes.mark_dirty(0, 1);
    assert!(!writes.dirty_at(0));
    let mut none = HostWrites::default();
    none.mark_dirty(0, 4096);
    none.start().unwrap();
    none.mark_dirty(0, 4096);
    assert!(none.is_on() && !none.dirty_at(0));
    none.take(&mut DirtyBitmap::new(0).unwrap()).unwrap();
}

#[test]
fn a_bitmap_of_more_pages_than_there_is_memory_for_is_an_error_with_its_size() {
    for pages in [1 << 62, u64::MAX] {
        let log = HostWrites::off(pages);
        let errors = [
            DirtyBitmap::new(pages).unwrap_err(),
            HostWrites::new(pages).unwrap_err(),
            log.start().unwrap_err(),
        ];
        for error in errors {
            assert!(
                matches!(error, Error::Memory { pages: of, .. } if of == pages),
                "{error}"
            );
            assert!(error.to_string().contains(&pages.to_string()), "{error}");
        }
        assert!(!log.is_on(), "a start that failed has turned nothing on");
    }
}
