// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a change of the slots sets free (memory, deferred closures, what panics carry) is let go of with no lock held, so it may change
//! slots in its turn.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use memslots::fake::FakeHost;
use memslots::{
    Backing, ChangeListener, Errno, Error, Layout, LayoutChange, Listening, Mapping, Memslots,
    NewSlot, NumaPolicy, PAGE_SIZE, PrivateRanges, Slot, SlotFlags, Veto,
};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;
use vm_memory::GuestAddress;
use vm_memory::bitmap::{Bitmap, NewBitmap, WithBitmapSlice};

/// A deadlock fails the test instead of hanging it. Nothing is timed: a test that ends, ends before.
fn within_reason(test: impl FnOnce() + Send + 'static) {
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        tell.send(()).unwrap();
    });
    if told.recv_timeout(Duration::from_secs(120)) == Err(mpsc::RecvTimeoutError::Timeout) {
        panic!("a deadlock");
    }
    thread.join().unwrap();
}

fn page(memslots: &Memslots, index: u64) -> Slot {
    let backing = Backing::anonymous(PAGE_SIZE);
    memslots
        .create(GuestAddress(index * PAGE_SIZE), backing, SlotFlags::NONE)
        .unwrap()
}

thread_local! {
    /// What the drop of the next bitmap does.
    static AT_DROP: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// Notes nothing; its drop is the moment at which a slot's memory is unmapped.
#[derive(Debug, Default)]
struct AtDrop;

impl Drop for AtDrop {
    fn drop(&mut self) {
        if let Some(f) = AT_DROP.with_borrow_mut(Option::take) {
            f();
        }
    }
}

impl WithBitmapSlice<'_> for AtDrop {
    type S = ();
}

impl Bitmap for AtDrop {
    fn mark_dirty(&self, _: usize, _: usize) {}
    fn dirty_at(&self, _: usize) -> bool {
        false
    }
    fn slice_at(&self, _: usize) {}
}

impl NewBitmap for AtDrop {
    fn with_len(_: usize) -> Self {
        Self
    }
}

#[test]
fn memory_is_let_go_of_with_no_lock_held() {
    within_reason(|| {
        let memslots = Memslots::<AtDrop>::with_policy(FakeHost::new(8), PrivateRanges::none());
        let create = |memslots: &Memslots<AtDrop>, page: u64| {
            let start = GuestAddress(page * PAGE_SIZE);
            memslots.create(start, Backing::anonymous(PAGE_SIZE), SlotFlags::NONE)
        };
        let first = create(&memslots, 0).unwrap();
        let (tell, told) = mpsc::channel();
        let again = memslots.clone();
        AT_DROP.set(Some(Box::new(move || {
            tell.send(create(&again, 1).unwrap()).unwrap();
        })));
        first.remove().unwrap().wait();
        let second = told.try_recv().unwrap();
        assert_eq!(second.extent().start(), GuestAddress(PAGE_SIZE));
        assert_eq!(memslots.snapshot().regions().len(), 1);
    });
}

/// Whoever finds the grace period over runs the closure: the reader that leaves, or a thread that changes slots.
#[test]
fn a_deferred_closure_may_change_slots_whoever_runs_it() {
    let rounds = if std::env::var_os("LONG_TESTS").is_some() {
        100_000u64
    } else {
        4_000
    };
    within_reason(move || {
        let memslots = Memslots::new(FakeHost::new(64));
        let stop = AtomicBool::new(false);
        let mut reader = memslots.reader();
        thread::scope(|scope| {
            let _stop = StopReaders(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(reader.enter());
                }
            });
            for round in 0..rounds {
                let (gone, with_it) = (page(&memslots, 0), page(&memslots, 1 + round % 32));
                let (tell, told) = mpsc::channel();
                gone.remove().unwrap().defer(move || {
                    drop(with_it);
                    tell.send(()).unwrap();
                });
                drop(page(&memslots, 40));
                told.recv().unwrap();
            }
        });
        assert_eq!(memslots.available(), 64);
    });
}

struct StopReaders<'a>(&'a AtomicBool);

impl Drop for StopReaders<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A listener that has a slot, and ends its own registration at the first commit after that.
struct Device {
    _slot: Slot,
    own: Mutex<Option<Listening>>,
}

impl ChangeListener for Device {
    fn prepare(&self, _: &LayoutChange<'_>) -> Result<(), Veto> {
        Ok(())
    }
    fn commit(&self, _: &LayoutChange<'_>) {
        drop(self.own.lock().unwrap().take());
    }
    fn abort(&self, _: &LayoutChange<'_>) {}
}

fn new(index: u64, backing: Backing) -> NewSlot {
    NewSlot {
        start: GuestAddress(index * PAGE_SIZE),
        backing,
        flags: SlotFlags::NONE,
    }
}

#[test]
fn a_listener_whose_last_call_it_was_may_change_slots_as_it_goes() {
    within_reason(|| {
        let memslots = Memslots::new(FakeHost::new(8));
        let device = Arc::new(Device {
            _slot: page(&memslots, 0),
            own: Mutex::new(None),
        });
        let listening = memslots.listen(Arc::clone(&device) as _).unwrap();
        *device.own.lock().unwrap() = Some(listening);
        drop(device);
        let layout = Layout::new().with(new(5, Backing::anonymous(PAGE_SIZE)));
        memslots.set_layout(&layout).unwrap();
        assert_eq!(memslots.snapshot().regions().len(), 1);
    });
}

#[test]
fn the_owner_of_memory_that_was_lost_may_change_slots_as_it_goes() {
    within_reason(|| {
        let host = FakeHost::new(8);
        let memslots = Memslots::new(host.clone());
        let beside = page(&memslots, 1 << 18);
        let mapping = Mapping::new(&Backing::anonymous(PAGE_SIZE), GuestAddress(0)).unwrap();
        let at = mapping.host();
        // SAFETY: the owner has the mapping, which is guest memory.
        let external = unsafe { Backing::external(at, PAGE_SIZE, Arc::new((mapping, beside))) };
        memslots
            .set_layout(&Layout::new().with(new(0, external).named("lost")))
            .unwrap();
        host.fail(1, Errno(libc::ENOMEM));
        host.fail(2, Errno(libc::EIO));
        let in_its_place = new(0, Backing::anonymous(2 * PAGE_SIZE)).named("larger");
        let error = memslots
            .set_layout(&Layout::new().with(in_its_place))
            .unwrap_err();
        assert!(matches!(error, Error::Undo { .. }), "{error}");
        host.fail_no_more();
        memslots.set_layout(&Layout::new()).unwrap();
        assert!(host.slots().is_empty(), "the owner's slot has gone with it");
    });
}

#[test]
fn new_memory_of_a_change_that_fails_is_let_go_of_with_no_lock_held() {
    within_reason(|| {
        let host = FakeHost::new(8);
        let memslots = Memslots::<AtDrop>::with_policy(host.clone(), PrivateRanges::none());
        let create = |memslots: &Memslots<AtDrop>, index| {
            memslots.create_all([new(index, Backing::anonymous(PAGE_SIZE))])
        };
        let mut nowhere = new(8, Backing::anonymous(PAGE_SIZE));
        nowhere.backing = nowhere.backing.numa(NumaPolicy::Bind(vec![1000]));
        let fit = || new(0, Backing::anonymous(PAGE_SIZE));
        // KVM refuses; or there is no memory for the second.
        for slots in [vec![fit()], vec![fit(), nowhere]] {
            let (tell, told) = mpsc::channel();
            let again = memslots.clone();
            AT_DROP.set(Some(Box::new(move || {
                tell.send(create(&again, 1).unwrap()).unwrap();
            })));
            if slots.len() == 1 {
                host.fail(0, Errno(libc::EIO));
            }
            memslots.create_all(slots).unwrap_err();
            drop(told.try_recv().unwrap());
        }
        assert_eq!(memslots.snapshot().regions().len(), 0);
    });
}

/// What a panic carries: its drop makes a slot.
struct Payload(Memslots, mpsc::Sender<Result<Slot, Error>>);

impl Drop for Payload {
    fn drop(&mut self) {
        let slot = new(9, Backing::anonymous(PAGE_SIZE));
        let made = self.0.create_all([slot]);
        let made = made.map(|mut slots| slots.remove(0));
        self.1.send(made).unwrap();
    }
}

/// Panics once, and refuses once, as it is told.
#[derive(Default)]
struct Panicking {
    panics_in: Mutex<Option<(&'static str, Payload)>>,
    refuses: AtomicBool,
}

impl Panicking {
    fn called(&self, what: &'static str) {
        let payload = self
            .panics_in
            .lock()
            .unwrap()
            .take_if(|(call, _)| *call == what);
        if let Some((_, payload)) = payload {
            std::panic::panic_any(payload);
        }
    }
}

impl ChangeListener for Panicking {
    fn prepare(&self, _: &LayoutChange<'_>) -> Result<(), Veto> {
        self.called("prepare");
        match self.refuses.swap(false, Ordering::Relaxed) {
            true => Err("refused".into()),
            false => Ok(()),
        }
    }
    fn commit(&self, _: &LayoutChange<'_>) {
        self.called("commit");
    }
    fn abort(&self, _: &LayoutChange<'_>) {
        self.called("abort");
    }
}

#[test]
fn what_panics_of_listeners_carry_is_let_go_of_with_no_lock_held() {
    // The calls that two listeners panic in, whether a third one refuses, and whether KVM does.
    for (calls, refuses, fails) in [
        (["commit", "commit"], false, false),
        (["abort", "abort"], true, false),
        (["abort", "abort"], false, true),
        (["abort", "prepare"], false, false),
    ] {
        within_reason(move || {
            let host = FakeHost::new(8);
            let memslots = Memslots::new(host.clone());
            let (tell, told) = mpsc::channel();
            let panicking = calls.map(|_| Arc::new(Panicking::default()));
            let _listening = panicking
                .each_ref()
                .map(|one| memslots.listen(Arc::clone(one) as _).unwrap());
            let last = Arc::new(Panicking::default());
            let _last = memslots.listen(Arc::clone(&last) as _).unwrap();
            last.refuses.store(refuses, Ordering::Relaxed);
            for (one, call) in panicking.iter().zip(calls) {
                let payload = Payload(memslots.clone(), tell.clone());
                *one.panics_in.lock().unwrap() = Some((call, payload));
            }
            if fails {
                host.fail(0, Errno(libc::EIO));
            }
            let change = || memslots.create_all([new(0, Backing::anonymous(PAGE_SIZE))]);
            let first = catch_unwind(AssertUnwindSafe(change)).err().unwrap();
            // The second's is gone, the first's goes on.
            let made = told.try_recv().unwrap();
            assert_eq!(made.unwrap().extent().start(), GuestAddress(9 * PAGE_SIZE));
            assert!(told.try_recv().is_err());
            drop(first);
            drop(told.try_recv().unwrap().unwrap());
        });
    }
}
