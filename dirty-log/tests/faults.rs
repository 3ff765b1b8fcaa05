// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whatever the host answers, no bit is lost: a fake host with a log of its own refuses each call
//! in turn, with each errno.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;

use dirty_log::{
    DirtyBitmap, DirtyLog, DirtySource, Error, GetDirtyLog, HostWrites, KvmBitmap, LogBuffer,
    PAGE_SIZE, PageRun,
};
use memslots::{Hva, SlotExtent, SlotId};
use vm_memory::{GuestAddress, bitmap::Bitmap};

const PAGES: u64 = 200;

/// A kernel with one slot.
struct FakeHost {
    dirty: RefCell<DirtyBitmap>,
    /// Refuse the call after this many, with this errno.
    refuse: Cell<Option<(u32, i32)>>,
}

impl FakeHost {
    fn new() -> Self {
        Self {
            dirty: RefCell::new(DirtyBitmap::new(PAGES).unwrap()),
            refuse: Cell::new(None),
        }
    }

    fn write(&self, first: u64, pages: u64) {
        self.dirty
            .borrow_mut()
            .set(PageRun { first, pages })
            .unwrap();
    }
}

impl GetDirtyLog for FakeHost {
    fn get_dirty_log(&self, slot: SlotId, buffer: &mut LogBuffer) -> io::Result<()> {
        assert_eq!(slot, SlotId(4));
        match self.refuse.get() {
            Some((0, errno)) => {
                self.refuse.set(None);
                if errno == libc::EFAULT {
                    self.dirty.borrow_mut().clear_all(); // as the kernel: cleared, then not copied
                }
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some((calls, errno)) => self.refuse.set(Some((calls - 1, errno))),
            None => {}
        }
        buffer
            .words_mut()
            .copy_from_slice(self.dirty.borrow().words());
        self.dirty.borrow_mut().clear_all();
        Ok(())
    }
}

fn extent() -> SlotExtent {
    // SAFETY: the fake host's slot; no memory is touched through it.
    unsafe {
        SlotExtent::new(
            SlotId(4),
            GuestAddress(0x10_0000),
            PAGES * PAGE_SIZE,
            Hva(0x7000_0000),
        )
        .unwrap()
    }
}

fn pages(bitmap: &DirtyBitmap) -> BTreeSet<u64> {
    bitmap.runs().flat_map(|run| run.first..run.end()).collect()
}

const ERRNOS: [i32; 9] = [
    libc::EINTR,
    libc::ENOENT,
    libc::EINVAL,
    libc::ENXIO,
    libc::ENOMEM,
    libc::EIO,
    libc::EBADF,
    libc::EAGAIN,
    libc::ENOSYS,
];

#[test]
fn a_refused_harvest_loses_nothing_and_the_next_has_it_all() {
    for errno in ERRNOS {
        for call in 0..3 {
            let host = FakeHost::new();
            let kvm = KvmBitmap::new(&host, extent()).unwrap();
            let mut log = DirtyLog::new(extent(), kvm).unwrap();
            host.refuse.set(Some((call, errno)));
            let mut wrote = BTreeSet::new();
            let mut failed = 0;
            for round in 0..4 {
                host.write(round * 60, 5);
                wrote.extend(round * 60..round * 60 + 5);
                let pending = log.pending().clone();
                let in_kernel = host.dirty.borrow().clone();
                match log.harvest() {
                    Ok(harvest) => assert_eq!(pages(harvest.bitmap()), wrote), // then dropped
                    Err(Error::GetDirtyLog { slot, source }) => {
                        failed += 1;
                        assert_eq!((slot, source.raw_os_error()), (SlotId(4), Some(errno)));
                        assert_eq!(log.pending(), &pending, "changed by a call that failed");
                        assert_eq!(*host.dirty.borrow(), in_kernel);
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            assert_eq!(failed, 1);
            let harvest = log.harvest().unwrap();
            assert_eq!(pages(harvest.bitmap()), wrote);
            harvest.commit();
            assert!(log.harvest().unwrap().bitmap().is_clean());
        }
    }
}

#[test]
fn after_efault_the_whole_slot_is_dirty() {
    let host = FakeHost::new();
    let mut log = DirtyLog::new(extent(), KvmBitmap::new(&host, extent()).unwrap()).unwrap();
    host.write(3, 1);
    host.refuse.set(Some((0, libc::EFAULT)));
    assert!(log.harvest().is_err());
    assert_eq!(log.harvest().unwrap().count(), PAGES);
}

#[test]
fn where_one_of_two_sources_fails_the_bits_of_the_other_stay() {
    let host = FakeHost::new();
    let writes = HostWrites::new(PAGES).unwrap();
    let kvm = KvmBitmap::new(&host, extent()).unwrap();
    // The failing one second: the first has given its bits by then.
    let mut log = DirtyLog::new(extent(), (writes.clone(), kvm)).unwrap();
    writes.mark_dirty(0, 1);
    host.write(9, 2);
    host.refuse.set(Some((0, libc::EIO)));
    assert!(log.harvest().is_err());
    writes.mark_dirty(0x1000, 1);
    assert_eq!(
        pages(log.harvest().unwrap().bitmap()),
        BTreeSet::from([0, 1, 9, 10])
    );
}

#[test]
fn a_half_committed_harvest_keeps_the_other_half() {
    let host = FakeHost::new();
    let mut log = DirtyLog::new(extent(), KvmBitmap::new(&host, extent()).unwrap()).unwrap();
    host.write(10, 10);
    host.write(100, 10);
    let mut harvest = log.harvest().unwrap();
    harvest
        .forget(PageRun {
            first: 10,
            pages: 10,
        })
        .unwrap();
    assert!(
        harvest
            .forget(PageRun {
                first: 150,
                pages: 51
            })
            .is_err(),
        "beyond the slot"
    );
    assert_eq!(harvest.count(), 10);
    drop(harvest);
    assert_eq!(pages(log.harvest().unwrap().bitmap()), (100..110).collect());
}

#[test]
fn a_source_of_another_size_is_refused_before_it_is_asked() {
    let host = FakeHost::new();
    assert!(matches!(
        DirtyLog::new(extent(), HostWrites::new(PAGES + 1).unwrap()),
        Err(Error::SizeMismatch {
            want: PAGES,
            got: 201
        })
    ));
    let kvm = KvmBitmap::new(&host, extent()).unwrap();
    let mut log = DirtyLog::new(extent(), (kvm, HostWrites::new(1).unwrap())).unwrap();
    host.write(1, 1);
    assert!(log.harvest().is_err());
    assert_eq!(host.dirty.borrow().count(), 1, "the kernel was not asked");
    let mut kvm = KvmBitmap::new(&host, extent()).unwrap();
    assert!(kvm.take(&mut DirtyBitmap::new(PAGES - 1).unwrap()).is_err());
    assert_eq!(host.dirty.borrow().count(), 1);
}
