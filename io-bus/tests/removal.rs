// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices that come, go and move while accesses run. No test waits by sleeping: what must have
//! happened is awaited on a channel, what must not have happened is asked where it can be known.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex, Weak};
use std::thread;

use io_bus::{
    Answer, At, BusKind, Dispatcher, IoBus, IoDevice, IoRange, Outcome, Registration, Removal,
    is_inside_access,
};

fn page(n: u64) -> IoRange {
    IoRange::new(n * 0x1000, 0x1000).unwrap()
}

fn write(io: &mut Dispatcher, page: u64) -> Outcome {
    io.write(BusKind::Mmio, page * 0x1000, &[0])
}

/// Runs a closure on every write.
struct Hook<F>(F);

impl<F: Fn() + Send + Sync> IoDevice for Hook<F> {
    fn read(&self, _: At, _: &mut [u8]) -> Answer {
        Answer::Declined
    }

    fn write(&self, _: At, _: &[u8]) -> Answer {
        (self.0)();
        Answer::Accepted
    }
}

/// A device whose access, once begun, lasts until the test lets it end.
struct Gate {
    entered: Sender<()>,
    leave: Mutex<Receiver<()>>,
}

fn gate() -> (Gate, Receiver<()>, Sender<()>) {
    let (entered, is_inside) = channel();
    let (let_go, leave) = channel();
    let leave = Mutex::new(leave);
    (Gate { entered, leave }, is_inside, let_go)
}

impl IoDevice for Gate {
    fn read(&self, _: At, _: &mut [u8]) -> Answer {
        Answer::Declined
    }

    fn write(&self, _: At, _: &[u8]) -> Answer {
        self.entered.send(()).unwrap();
        self.leave.lock().unwrap().recv().unwrap();
        Answer::Accepted
    }
}

/// Ends the readers' loops at the end of a test, a failed one too.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_removal_is_not_over_while_an_access_is_inside_and_is_when_it_has_left() {
    let bus = IoBus::new();
    let (device, is_inside, let_go) = gate();
    let device = Arc::new(device);
    let registration = bus
        .register(BusKind::Mmio, page(1), device.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    let vcpu = thread::spawn(move || (write(&mut io, 1), write(&mut io, 1), io));
    is_inside.recv().unwrap();

    let pending = registration.unregister_later();
    assert!(!pending.is_over());
    assert_eq!(bus.ranges(BusKind::Mmio), []);
    // Gone for everyone who comes now, although one is inside still.
    assert_eq!(write(&mut bus.dispatcher(), 1), Outcome::Unclaimed);
    assert!(!pending.is_over());

    // Someone waits for it, and sleeps: the kernel says so.
    let (tell, thread_id) = channel();
    let waiter = thread::spawn(move || {
        // SAFETY: takes nothing, gives the caller's thread id.
        tell.send(unsafe { libc::gettid() }).unwrap();
        pending.wait().is_done()
    });
    let status = format!("/proc/self/task/{}/stat", thread_id.recv().unwrap());
    loop {
        assert!(!waiter.is_finished(), "it did not wait");
        let stat = std::fs::read_to_string(&status).unwrap_or_default();
        if stat
            .rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with('S'))
        {
            break;
        }
        thread::yield_now();
    }
    let_go.send(()).unwrap();
    assert!(waiter.join().unwrap());
    // The second access never came to the gate.
    let (inside, after, io) = vcpu.join().unwrap();
    assert_eq!((inside, after), (Outcome::Answered, Outcome::Unclaimed));
    // The dispatcher lives, idle, as a vCPU's does that sleeps in the guest. It holds nothing.
    assert_eq!(Arc::strong_count(&device), 1);
    drop(io);
}

#[test]
fn a_dispatcher_that_is_idle_keeps_no_device_alive() {
    let bus = IoBus::new();
    let device = Arc::new(Hook(|| ()));
    let registration = bus
        .register(BusKind::Mmio, page(1), device.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    assert!(write(&mut io, 1).is_answered());
    assert!(registration.unregister().is_done());
    assert_eq!(Arc::strong_count(&device), 1);
    assert_eq!(write(&mut io, 1), Outcome::Unclaimed);
}

#[test]
fn a_device_that_removes_itself_gets_a_pending_token_and_goes_with_its_access() {
    struct Flag(Arc<AtomicBool>);
    impl Drop for Flag {
        fn drop(&mut self) {
            assert!(is_inside_access(), "dropped by the access that ends");
            self.0.store(true, Ordering::SeqCst);
        }
    }

    let bus = IoBus::new();
    let slot: Arc<Mutex<Option<Registration>>> = Arc::default();
    let dropped = Arc::new(AtomicBool::new(false));
    let then = Arc::new(AtomicBool::new(false));
    let (mine, flag, told) = (slot.clone(), Flag(dropped.clone()), then.clone());
    let device = Hook(move || {
        assert!(is_inside_access());
        let removal = mine.lock().unwrap().take().unwrap().unregister();
        assert!(!removal.is_done());
        let Removal::Pending(pending) = removal else {
            panic!("waited for itself");
        };
        // Waiting here is answered the same way, and not with a deadlock.
        let Removal::Pending(pending) = pending.wait() else {
            panic!("waited for itself");
        };
        let told = told.clone();
        pending.then(move || told.store(true, Ordering::SeqCst));
        assert!(!flag.0.load(Ordering::SeqCst));
    });
    *slot.lock().unwrap() = Some(bus.register(BusKind::Mmio, page(1), device).unwrap());
    let mut io = bus.dispatcher();
    assert_eq!(write(&mut io, 1), Outcome::Answered);
    assert!(dropped.load(Ordering::SeqCst) && then.load(Ordering::SeqCst));
    assert_eq!(write(&mut io, 1), Outcome::Unclaimed);
    assert!(!is_inside_access());
}

/// Two devices, each on its own vCPU and both inside at the same time, take each other off: on one
/// bus, and on two (where each would wait for the other's bus).
#[test]
fn two_devices_that_remove_each_other_do_not_deadlock() {
    for two_buses in [false, true] {
        for _ in 0..200 {
            let one = IoBus::new();
            let other = if two_buses { IoBus::new() } else { one.clone() };
            let buses = [one, other];
            let slots: Arc<[Mutex<Option<Registration>>; 2]> = Arc::default();
            let both_inside = Arc::new(Barrier::new(2));
            let alive: Vec<Arc<()>> = (0..2).map(|_| Arc::default()).collect();
            for me in 0..2 {
                let (slots_, both_inside, life) = (
                    Arc::downgrade(&slots),
                    both_inside.clone(),
                    alive[me].clone(),
                );
                let device = Hook(move || {
                    let _life = &life;
                    both_inside.wait();
                    let peer = slots_.upgrade().unwrap()[1 - me]
                        .lock()
                        .unwrap()
                        .take()
                        .unwrap();
                    assert!(matches!(
                        peer.unregister(),
                        Removal::Done | Removal::Pending(_)
                    ));
                });
                let range = page(me as u64);
                *slots[me].lock().unwrap() =
                    Some(buses[me].register(BusKind::Mmio, range, device).unwrap());
            }
            thread::scope(|scope| {
                for (me, bus) in (0..).zip(&buses) {
                    let mut io = bus.dispatcher();
                    scope.spawn(move || assert!(write(&mut io, me).is_answered()));
                }
            });
            for (bus, life) in buses.iter().zip(&alive) {
                assert_eq!(bus.ranges(BusKind::Mmio), []);
                assert_eq!(Arc::strong_count(life), 1);
            }
        }
    }
}

/// The promise of `unregister`, a great many times: once it is back, nobody is inside.
#[test]
fn nobody_is_inside_a_device_that_is_unregistered() {
    let rounds = if long() { 200_000 } else { 4_000 };
    let bus = IoBus::new();
    let stop = AtomicBool::new(false);
    let started = Barrier::new(3);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..2 {
            let mut io = bus.dispatcher();
            let (stop, started) = (&stop, &started);
            scope.spawn(move || {
                started.wait();
                while !stop.load(Ordering::Relaxed) {
                    assert_ne!(write(&mut io, 1), Outcome::Partial);
                }
            });
        }
        started.wait();
        for _ in 0..rounds {
            let inside = Arc::new(AtomicUsize::new(0));
            let count = inside.clone();
            let device = Hook(move || {
                count.fetch_add(1, Ordering::Relaxed);
                // Whoever did not wait would find us here.
                thread::yield_now();
                count.fetch_sub(1, Ordering::Relaxed);
            });
            let registration = bus.register(BusKind::Mmio, page(1), device).unwrap();
            assert!(registration.unregister().is_done());
            assert_eq!(inside.load(Ordering::Relaxed), 0);
        }
    });
}

/// The device has two pages and moves by one, back and forth: the page in the middle is its own at
/// any time.
#[test]
fn a_move_leaves_no_moment_without_the_device() {
    let rounds = if long() { 200_000 } else { 4_000 };
    let bus = IoBus::new();
    let two_pages = IoRange::new(0, 0x2000).unwrap();
    let mut registration = bus.register(BusKind::Mmio, two_pages, Hook(|| ())).unwrap();
    let stop = AtomicBool::new(false);
    let started = Barrier::new(3);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..2 {
            let mut io = bus.dispatcher();
            let (stop, started) = (&stop, &started);
            scope.spawn(move || {
                started.wait();
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(write(&mut io, 1), Outcome::Answered);
                }
            });
        }
        started.wait();
        for round in 0..rounds {
            let base = if round % 2 == 0 { 0x1000 } else { 0 };
            assert!(registration.relocate(base).unwrap().is_done());
        }
    });
}

#[test]
fn a_device_may_own_its_registrations_and_others() {
    /// Dropped, it takes two registrations with it, from inside whatever drops it.
    struct Owner(Mutex<Vec<Registration>>);
    impl IoDevice for Owner {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            Answer::Accepted
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            self.0.lock().unwrap().clear();
            Answer::Accepted
        }
    }

    // Dropped with its bus.
    let bus = IoBus::new();
    let owner = Arc::new(Owner(Mutex::default()));
    let gone: Weak<Owner> = Arc::downgrade(&owner);
    for n in 0..2 {
        let mine = bus.register(BusKind::Mmio, page(n), owner.clone()).unwrap();
        owner.0.lock().unwrap().push(mine);
    }
    drop(owner);
    drop(bus);
    assert!(gone.upgrade().is_none());

    // By unregistering, which drops the owner, which drops another registration.
    let bus = IoBus::new();
    let other = bus.register(BusKind::Mmio, page(1), Hook(|| ())).unwrap();
    let owner = Owner(Mutex::new(vec![other]));
    let first = bus.register(BusKind::Mmio, page(0), owner).unwrap();
    assert!(first.unregister().is_done());
    assert_eq!(bus.ranges(BusKind::Mmio), []);

    // From inside its own access, both of them.
    let owner = Arc::new(Owner(Mutex::default()));
    for n in 0..2 {
        let mine = bus.register(BusKind::Mmio, page(n), owner.clone()).unwrap();
        owner.0.lock().unwrap().push(mine);
    }
    let mut io = bus.dispatcher();
    assert!(write(&mut io, 1).is_answered());
    assert_eq!(bus.ranges(BusKind::Mmio), []);
    assert_eq!(Arc::strong_count(&owner), 1);
}

#[test]
fn a_device_may_register_and_move_and_reach_others_from_inside_an_access() {
    let bus = IoBus::new();
    let far = bus.register(BusKind::Mmio, page(8), Hook(|| ())).unwrap();
    // A device must not own the bus that it is on; it may own a way to it.
    let slots: Arc<Mutex<Vec<Registration>>> = Arc::new(Mutex::new(vec![far]));
    let (hands, io) = (slots.clone(), Mutex::new(bus.dispatcher()));
    let new_home = bus.clone();
    let device = Hook(move || {
        let mut hands = hands.lock().unwrap();
        assert!(write(&mut io.lock().unwrap(), 8).is_answered());
        let removal = hands[0].relocate(page(9).base()).unwrap();
        assert!(!removal.is_done());
        assert!(write(&mut io.lock().unwrap(), 9).is_answered());
        let new = new_home
            .register(BusKind::Mmio, page(10), Hook(|| ()))
            .unwrap();
        assert!(write(&mut io.lock().unwrap(), 10).is_answered());
        hands.push(new);
    });
    let registration = bus.register(BusKind::Mmio, page(1), device).unwrap();
    assert!(write(&mut bus.dispatcher(), 1).is_answered());
    assert_eq!(bus.ranges(BusKind::Mmio), [page(1), page(9), page(10)]);
    assert!(registration.unregister().is_done());
}

#[test]
fn registrations_outlive_the_bus_handle_while_a_dispatcher_lives() {
    let bus = IoBus::new();
    let registration = bus.register(BusKind::Mmio, page(1), Hook(|| ())).unwrap();
    let mut io = bus.dispatcher();
    drop(bus);
    assert!(write(&mut io, 1).is_answered());
    assert!(registration.unregister().is_done());
    assert_eq!(write(&mut io, 1), Outcome::Unclaimed);
}

fn long() -> bool {
    std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1")
}
