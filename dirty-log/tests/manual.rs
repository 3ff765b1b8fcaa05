// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Manual protect against a fake kernel that refuses any call with any errno: nothing is lost, also without
//! manual protect, and only what is handed out is cleared.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod slots;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;

use dirty_log::{
    ClearDirtyLog, DirtyBitmap, DirtyLog, DirtySource, Error, GetDirtyLog, KvmManualBitmap,
    LogBuffer, PageRun,
};
use memslots::SlotId;
use slots::{ERRNOS, PAGES, extent, pages, run, set};

/// A kernel with manual protect, or without: a look forgets what it tells then.
struct Manual {
    dirty: RefCell<DirtyBitmap>,
    protect: bool,
    /// Refuses the call after so many, of either kind.
    refuse: Cell<Option<(u32, i32)>>,
    /// Each clear: first page, pages.
    clears: RefCell<Vec<(u64, u32)>>,
}

impl Manual {
    fn new() -> Self {
        Self {
            protect: true,
            dirty: RefCell::new(DirtyBitmap::new(PAGES).unwrap()),
            refuse: Cell::new(None),
            clears: RefCell::default(),
        }
    }

    fn without() -> Self {
        Self {
            protect: false,
            ..Self::new()
        }
    }

    fn write(&self, pages: PageRun) {
        self.dirty.borrow_mut().set(pages).unwrap();
    }

    fn may(&self) -> io::Result<()> {
        match self.refuse.get() {
            Some((0, errno)) => {
                self.refuse.set(None);
                Err(io::Error::from_raw_os_error(errno))
            }
            Some((calls, errno)) => {
                self.refuse.set(Some((calls - 1, errno)));
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl GetDirtyLog for Manual {
    fn get_dirty_log(&self, slot: SlotId, buffer: &mut LogBuffer) -> io::Result<()> {
        assert_eq!(slot, SlotId(4));
        // What a failed call leaves in the buffer is anybody's guess.
        buffer.words_mut().fill(0x5555_5555_5555_5555);
        self.may()?;
        let mut dirty = self.dirty.borrow_mut();
        buffer.words_mut().copy_from_slice(dirty.words());
        if !self.protect {
            dirty.clear_all();
        }
        Ok(())
    }
}

impl ClearDirtyLog for Manual {
    fn clear_dirty_log(
        &self,
        slot: SlotId,
        first: u64,
        pages: u32,
        bits: &[u64],
    ) -> io::Result<()> {
        assert_eq!(slot, SlotId(4));
        self.may()?;
        // KVM's own rules.
        let end = first + u64::from(pages);
        assert!(first.is_multiple_of(64) && end <= PAGES);
        assert!(pages.is_multiple_of(64) || end == PAGES);
        assert_eq!(bits.len() as u32, pages.div_ceil(64));
        self.clears.borrow_mut().push((first, pages));
        let mut cleared = DirtyBitmap::new(PAGES).unwrap();
        let mut words = vec![0; cleared.words().len()];
        words[(first / 64) as usize..][..bits.len()].copy_from_slice(bits);
        cleared.merge_words(&words).unwrap();
        self.dirty.borrow_mut().subtract(&cleared).unwrap();
        Ok(())
    }
}

#[test]
fn a_look_clears_nothing_and_a_part_clears_only_what_it_hands_out() {
    let host = Manual::new();
    let source = KvmManualBitmap::new(&host, extent()).unwrap();
    let mut log = DirtyLog::new(extent(), source).unwrap();
    for page in [3, 70, 130, 699] {
        host.write(run(page, 1));
    }
    let mut parts = log.parts(64).unwrap();
    assert!(host.clears.borrow().is_empty());
    // Written after the look, before its part: told again, for the look did not see it.
    host.write(run(71, 1));
    let part = parts.next_part().unwrap().unwrap();
    assert_eq!((part.range(), part.count()), (run(0, 64), 1));
    part.commit();
    assert_eq!(*host.clears.borrow(), [(0, 64)]);
    let part = parts.next_part().unwrap().unwrap();
    assert_eq!(set(part.runs().map(|run| run.first)), set([70]));
    part.commit();
    drop(parts); // the rest is not asked for
    assert_eq!(pages(&host.dirty.borrow()), set([71, 130, 699]));
    let harvest = log.harvest().unwrap();
    assert_eq!(pages(harvest.bitmap()), set([71, 130, 699]));
    harvest.commit();
    assert!(host.dirty.borrow().is_clean());
}

#[test]
fn a_chunk_is_as_large_as_what_is_dirty_in_it_and_no_larger_than_it_may_be() {
    let host = Manual::new();
    let source = KvmManualBitmap::new(&host, extent())
        .unwrap()
        .with_chunk(130); // rounded up to 192
    let mut log = DirtyLog::new(extent(), source).unwrap();
    host.write(run(65, 1));
    host.write(run(200, 400));
    host.write(run(699, 1));
    log.harvest().unwrap().commit();
    assert_eq!(
        *host.clears.borrow(),
        [(64, 64), (192, 192), (384, 192), (576, 124)]
    );
    log.harvest().unwrap().commit();
    assert_eq!(host.clears.borrow().len(), 4, "a clean slot is not cleared");
}

#[test]
fn manual_protect_loses_nothing_whichever_call_is_refused() {
    for (errno, call) in ERRNOS.iter().flat_map(|e| (0..12).map(move |c| (*e, c))) {
        for in_parts in [false, true] {
            refuse_one(Manual::new(), errno, call, in_parts);
            refuse_one(Manual::without(), errno, call, in_parts);
        }
    }
}

fn refuse_one(host: Manual, errno: i32, call: u32, in_parts: bool) {
    let what = format!(
        "{errno} at call {call}, parts: {in_parts}, protect: {}",
        host.protect
    );
    let source = KvmManualBitmap::new(&host, extent())
        .unwrap()
        .with_chunk(64);
    let mut log = DirtyLog::new(extent(), source).unwrap();
    let wrote = set((0..PAGES).step_by(97));
    for page in &wrote {
        host.write(run(*page, 1));
    }
    host.refuse.set(Some((call, errno)));
    let mut got = BTreeSet::new();
    for _ in 0..3 {
        let failed = take_all(&mut log, in_parts, &mut got).is_err();
        if failed && host.protect {
            // Not dealt with: pending, or still the kernel's.
            let mut all = log.pending().clone();
            all.merge(&host.dirty.borrow()).unwrap();
            assert_eq!(&pages(&all) | &got, wrote, "{what}");
        }
    }
    assert_eq!(got, wrote, "{what}");
    assert!(host.dirty.borrow().is_clean());
}

#[test]
fn a_round_that_is_dropped_half_way_puts_back_what_it_did_not_hand_out() {
    for host in [Manual::new(), Manual::without()] {
        let source = KvmManualBitmap::new(&host, extent()).unwrap();
        let mut log = DirtyLog::new(extent(), source).unwrap();
        for page in [3, 70, 130, 699] {
            host.write(run(page, 1));
        }
        let mut parts = log.parts(64).unwrap();
        parts.next_part().unwrap().unwrap().commit();
        drop(parts);
        // Given up once more, before anything was handed out.
        host.write(run(200, 1));
        drop(log.parts(64).unwrap());
        let harvest = log.harvest().unwrap();
        assert_eq!(pages(harvest.bitmap()), set([70, 130, 200, 699]));
        harvest.commit();
        assert!(log.harvest().unwrap().bitmap().is_clean(), "told once");
    }
}

#[test]
fn what_a_failed_look_left_in_the_buffer_is_told_to_nobody() {
    let host = Manual::new();
    let source = KvmManualBitmap::new(&host, extent()).unwrap();
    let mut log = DirtyLog::new(extent(), source).unwrap();
    host.write(run(9, 1));
    host.refuse.set(Some((0, libc::EINTR)));
    assert!(log.harvest().is_err());
    assert!(log.pending().is_clean());
    assert_eq!(pages(log.harvest().unwrap().bitmap()), set([9]));
}

fn take_all(
    log: &mut DirtyLog<impl DirtySource>,
    in_parts: bool,
    got: &mut BTreeSet<u64>,
) -> Result<(), Error> {
    if !in_parts {
        let harvest = log.harvest()?;
        got.extend(pages(harvest.bitmap()));
        harvest.commit();
        return Ok(());
    }
    let mut parts = log.parts(128)?;
    while let Some(part) = parts.next_part()? {
        got.extend(part.runs().flat_map(|run| run.first..run.end()));
        part.commit();
    }
    Ok(())
}
