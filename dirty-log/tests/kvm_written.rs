// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Asynchronous write-protection and `PAGEMAP_SCAN` against the real kernel: a guest without any log of
//! KVM's, the VMM without vm-memory, and the kernel for it, all write, and all are found. And a fake that
//! refuses each scan.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;

use common::{Machine, Order, Random, long};
use dirty_log::{
    DirtyBitmap, DirtyLog, DirtySource, Error, LogChoice, PAGE_SIZE, PageRegion, PageRun,
    ScanPages, Scanned, WrittenPages,
};
use memslots::uffd::{Features, Modes, Registration, Uffd};

/// `None`, and said why, where the kernel is older than 6.7 or nobody may open a userfaultfd.
fn watch(machine: &Machine) -> Option<(Uffd, Registration)> {
    let uffd = match Uffd::open(Features::WP_ASYNC, Features::NONE) {
        Ok(uffd) => uffd,
        Err(error) => {
            println!("NOT TRIED: asynchronous write-protection is not to be had here: {error}");
            return None;
        }
    };
    let registration = uffd
        .register_all(&machine.data, Modes::ASYNC_WRITE_PROTECT)
        .unwrap();
    Some((uffd, registration))
}

fn harvested(log: &mut DirtyLog<impl DirtySource>) -> BTreeSet<u64> {
    let harvest = log.harvest().unwrap();
    let pages = harvest
        .runs()
        .flat_map(|run| run.first..run.end())
        .collect();
    harvest.commit();
    pages
}

#[test]
fn whoever_writes_through_this_mapping_is_found() {
    const PAGES: u64 = 2048;
    let mut machine = Machine::new(LogChoice::Bitmap, PAGES);
    machine.install(false);
    machine.start(1);
    let Some((_uffd, registration)) = watch(&machine) else {
        return;
    };
    let source = WrittenPages::new(&registration).unwrap();
    assert!(
        registration.lend_protect().is_err(),
        "one protector at a time"
    );
    let mut log = DirtyLog::new(machine.extent(), source).unwrap();
    assert_eq!(harvested(&mut log), BTreeSet::new());

    let mut random = Random(77);
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    for round in 0..if long() { 1500 } else { 30 } {
        let order = Order {
            state: random.below(1 << 32) as u32,
            steps: 1 + random.below(400) as u32,
        };
        let mut wrote = order.pages(PAGES);
        machine.give(&[order]);
        let mut seen = BTreeSet::new();
        while machine.finished() == 0 {
            seen.extend(harvested(&mut log)); // while the guest writes
        }
        let page = random.below(PAGES);
        machine.vmm_writes(page, round);
        wrote.insert(page);
        // The kernel, for this process: read(2) into guest memory.
        let page = random.below(PAGES);
        let at = machine.data.host().0 + (page * PAGE_SIZE) as usize + 3000;
        // SAFETY: sixteen bytes of the data that nobody else writes.
        let got = unsafe {
            libc::read(
                std::os::fd::AsRawFd::as_raw_fd(&zeros),
                at as *mut libc::c_void,
                16,
            )
        };
        assert_eq!(got, 16);
        wrote.insert(page);
        seen.extend(harvested(&mut log));
        let missing: Vec<_> = wrote.difference(&seen).collect();
        let made_up: Vec<_> = seen.difference(&wrote).collect();
        assert!(
            missing.is_empty() && made_up.is_empty(),
            "round {round}: missing {missing:?}, never written {made_up:?}"
        );
    }
    drop(log);
    assert!(
        registration.lend_protect().is_ok(),
        "the role is given back"
    );
}

#[test]
fn memory_that_is_not_registered_so_is_refused() {
    let machine = Machine::new(LogChoice::Bitmap, 64);
    let uffd = match Uffd::open(Features::PAGEFAULT_FLAG_WP, Features::NONE) {
        Ok(uffd) => uffd,
        Err(error) => return println!("NOT TRIED: {error}"),
    };
    let registration = uffd
        .register_all(&machine.data, Modes::WRITE_PROTECT)
        .unwrap();
    let error = WrittenPages::new(&registration).unwrap_err();
    assert!(matches!(error, Error::Watch { .. }), "{error}");
    assert!(error.to_string().contains("WP_ASYNC"), "{error}");
}

const START: u64 = 0x7000_0000;

/// Reports one region a call, so that a look takes many.
struct Fake {
    written: RefCell<DirtyBitmap>,
    refuse: Cell<Option<(u32, i32)>>,
}

impl ScanPages for &Fake {
    fn scan(&self, range: Range<u64>, into: &mut [PageRegion]) -> io::Result<Scanned> {
        match self.refuse.get() {
            Some((0, errno)) => {
                self.refuse.set(None);
                if errno != libc::EINVAL {
                    // It protected what it found and reported nothing of it.
                    self.written.borrow_mut().clear_all();
                }
                return Err(io::Error::from_raw_os_error(errno));
            }
            Some((calls, errno)) => self.refuse.set(Some((calls - 1, errno))),
            None => {}
        }
        let (from, to) = (
            (range.start - START) / PAGE_SIZE,
            (range.end - START) / PAGE_SIZE,
        );
        let found = self
            .written
            .borrow()
            .runs()
            .find(|run| run.end() > from)
            .filter(|run| run.first < to);
        let Some(run) = found else {
            return Ok(Scanned {
                regions: 0,
                end: range.end,
            });
        };
        let run = PageRun {
            first: run.first.max(from),
            pages: run.end().min(to) - run.first.max(from),
        };
        self.written.borrow_mut().clear(run).unwrap();
        into[0] = PageRegion {
            start: START + run.bytes().start,
            end: START + run.bytes().end,
            categories: 2,
        };
        Ok(Scanned {
            regions: 1,
            end: into[0].end,
        })
    }
}

#[test]
fn a_refused_scan_loses_nothing() {
    for errno in [libc::EINVAL, libc::EPERM, libc::EFAULT, libc::EINTR] {
        for call in 0..8 {
            let fake = Fake {
                written: RefCell::new(DirtyBitmap::new(500).unwrap()),
                refuse: Cell::new(Some((call, errno))),
            };
            let wrote = BTreeSet::from([0, 1, 63, 64, 200, 499]);
            for page in &wrote {
                let page = PageRun {
                    first: *page,
                    pages: 1,
                };
                fake.written.borrow_mut().set(page).unwrap();
            }
            let mut source = WrittenPages::with_host(&fake, START, 500);
            let mut dirty = DirtyBitmap::new(500).unwrap();
            let refused = (0..3).filter(|_| source.take(&mut dirty).is_err()).count();
            let seen: BTreeSet<u64> = dirty.runs().flat_map(|run| run.first..run.end()).collect();
            assert!(seen.is_superset(&wrote), "{errno} at call {call}");
            if refused == 0 || errno == libc::EINVAL {
                assert_eq!(seen, wrote, "{errno} at call {call}");
            }
            fake.refuse.set(None);
            dirty.clear_all();
            source.take(&mut dirty).unwrap();
            assert!(dirty.is_clean());
        }
    }
}
