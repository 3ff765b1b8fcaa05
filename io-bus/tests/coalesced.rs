// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ring of coalesced writes between several vCPUs: each one's writes come before its exit, once
//! and in order, whoever drains. The kernel is a fake that fills the ring as KVM does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use io_bus::{
    Answer, At, BusKind, Dispatcher, Error, IoBus, IoDevice, IoRange, MmioAddress,
    SetCoalescedZone, defer, is_inside_access,
};
use vmm_sys_util::errno;

const CAPACITY: u32 = 170;

/// KVM's side of the ring, with its lock.
struct Kernel {
    words: Arc<Box<[AtomicU32]>>,
    ring_lock: Mutex<()>,
}

impl Kernel {
    fn new() -> Self {
        let words = (0..1024).map(|_| AtomicU32::new(0));
        Self {
            words: Arc::new(words.collect()),
            ring_lock: Mutex::default(),
        }
    }

    /// Whether the write was kept.
    fn write(&self, address: u64, value: u32) -> bool {
        let _lock = self.ring_lock.lock().unwrap();
        let first = self.words[0].load(Ordering::Acquire);
        let last = self.words[1].load(Ordering::Relaxed);
        if (last + 1) % CAPACITY == first {
            return false;
        }
        let (low, high) = (address as u32, (address >> 32) as u32);
        let entry = [low, high, 4, 0, value, 0];
        for (word, value) in self.words[2 + last as usize * 6..].iter().zip(entry) {
            word.store(value, Ordering::Relaxed);
        }
        self.words[1].store((last + 1) % CAPACITY, Ordering::Release);
        true
    }
}

fn bus_with(kernel: &Kernel, device: impl IoDevice + 'static) -> (IoBus, Dispatcher) {
    let bus = IoBus::new();
    bus.attach_coalesced_ring(kernel.words.clone()).unwrap();
    let range = IoRange::new(0x1000, 0x1000).unwrap();
    bus.register(BusKind::Mmio, range, device).unwrap().keep();
    let io = bus.dispatcher();
    (bus, io)
}

/// Writes down the values, each vCPU's at its own address.
#[derive(Default)]
struct Journal(Mutex<Vec<(u64, u32)>>);

impl IoDevice for Journal {
    fn read(&self, _: At, _: &mut [u8]) -> Answer {
        Answer::Declined
    }
    fn write(&self, at: At, data: &[u8]) -> Answer {
        let value = u32::from_le_bytes(data.try_into().unwrap());
        self.0.lock().unwrap().push((at.offset, value));
        // Whoever does not wait for a drain that is under way would overtake it here.
        thread::yield_now();
        Answer::Accepted
    }
}

#[test]
fn several_vcpus_drain_one_ring_and_each_ones_order_is_kept() {
    let long = std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1");
    let rounds = if long { 20_000 } else { 400 };
    let kernel = Kernel::new();
    let journal = Arc::new(Journal::default());
    let (bus, _) = bus_with(&kernel, journal.clone());
    let exits = AtomicUsize::new(0);
    thread::scope(|scope| {
        for vcpu in 0..3_u64 {
            let (kernel, exits, mut io) = (&kernel, &exits, bus.dispatcher());
            scope.spawn(move || {
                let address = 0x1000 + vcpu * 8;
                let mut value = 0;
                for round in 0..rounds {
                    let burst = 1 + (round * 7 + vcpu as u32) % 90;
                    for last in 1..=burst {
                        value += 1;
                        // The last one of a burst leaves the guest, and so does one too many.
                        if last == burst || !kernel.write(address, value) {
                            exits.fetch_add(1, Ordering::Relaxed);
                            io.before_exit();
                            let data = value.to_le_bytes();
                            assert!(io.mmio_write(MmioAddress(address), &data).is_answered());
                        }
                    }
                }
            });
        }
    });
    let seen = journal.0.lock().unwrap();
    for vcpu in 0..3 {
        let values = seen.iter().filter(|(at, _)| *at == vcpu * 8);
        assert!(
            values
                .map(|(_, value)| *value)
                .eq(1..=seen.iter().filter(|(at, _)| *at == vcpu * 8).count() as u32)
        );
    }
    let kept = seen.len() - exits.load(Ordering::Relaxed);
    assert_eq!(bus.coalesced_writes(), kept as u64);
}

/// A vCPU whose write another thread is carrying out waits for that, and not only until it is taken
/// from the ring.
#[test]
fn no_exit_overtakes_a_write_that_another_thread_is_at() {
    struct Gate(Mutex<(Sender<()>, Receiver<()>)>);
    impl IoDevice for Gate {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            Answer::Declined
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            let gate = self.0.lock().unwrap();
            gate.0.send(()).unwrap();
            gate.1.recv().unwrap();
            Answer::Accepted
        }
    }
    let kernel = Kernel::new();
    let ((entered, is_inside), (let_go, leave)) = (channel(), channel());
    let (bus, mut io) = bus_with(&kernel, Gate(Mutex::new((entered, leave))));
    assert!(kernel.write(0x1000, 1));
    let drainer = thread::spawn(move || io.before_exit());
    is_inside.recv().unwrap();

    let (tell, thread_id) = channel();
    let mut io = bus.dispatcher();
    let vcpu = thread::spawn(move || {
        // SAFETY: takes nothing, gives the caller's thread id.
        tell.send(unsafe { libc::gettid() }).unwrap();
        io.before_exit()
    });
    // It waits, and sleeps: the kernel says so.
    let status = format!("/proc/self/task/{}/stat", thread_id.recv().unwrap());
    loop {
        assert!(!vcpu.is_finished(), "it did not wait");
        let stat = std::fs::read_to_string(&status).unwrap_or_default();
        let state = stat.rsplit(')').next().unwrap_or_default();
        if state.trim_start().starts_with('S') {
            break;
        }
        thread::yield_now();
    }
    let_go.send(()).unwrap();
    assert_eq!((drainer.join().unwrap(), vcpu.join().unwrap()), (1, 0));
}

#[test]
fn inside_an_access_there_is_nothing_to_drain() {
    /// Has a dispatcher of its own, and calls it as a vCPU would.
    struct Nested(Mutex<Option<Dispatcher>>, AtomicUsize);
    impl IoDevice for Nested {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            Answer::Declined
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            assert!(is_inside_access());
            let mut io = self.0.lock().unwrap();
            // The drain that this is in holds the ring: waiting for it would never end.
            assert_eq!(io.as_mut().unwrap().before_exit(), 0);
            self.1.fetch_add(1, Ordering::Relaxed);
            Answer::Accepted
        }
    }
    let kernel = Kernel::new();
    let device = Arc::new(Nested(Mutex::new(None), AtomicUsize::new(0)));
    let (bus, mut io) = bus_with(&kernel, device.clone());
    *device.0.lock().unwrap() = Some(bus.dispatcher());
    assert!(kernel.write(0x1000, 1) && kernel.write(0x1000, 2));
    assert_eq!(io.before_exit(), 2);
    assert_eq!(device.1.load(Ordering::Relaxed), 2);
    *device.0.lock().unwrap() = None;
}

#[test]
fn a_kept_write_is_posted_and_takes_no_waiting_accesss_place() {
    struct Slow(Mutex<Vec<io_bus::Completion>>);
    impl IoDevice for Slow {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            let (completion, deferral) = defer();
            self.0.lock().unwrap().push(completion);
            Answer::Deferred(deferral)
        }
        fn write(&self, at: At, _: &[u8]) -> Answer {
            self.read(at, &mut [])
        }
    }
    let kernel = Kernel::new();
    let device = Arc::new(Slow(Mutex::default()));
    let (_bus, mut io) = bus_with(&kernel, device.clone());
    let mut data = [0; 2];
    let _ = io.mmio_read(MmioAddress(0x1000), &mut data);
    let read = device.0.lock().unwrap().pop().unwrap();
    assert!(kernel.write(0x1000, 1));
    assert_eq!(io.before_exit(), 1);
    let write = device.0.lock().unwrap().pop().unwrap();
    assert!(!write.complete(&[]));
    assert!(read.complete(&[1, 2]));
    assert!(io.wait_read(&mut data).is_answered());
    assert_eq!(data, [1, 2]);
}

#[test]
fn a_device_that_panics_in_a_drain_loses_its_write_and_no_other() {
    struct Fragile(Arc<Journal>);
    impl IoDevice for Fragile {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            Answer::Declined
        }
        fn write(&self, at: At, data: &[u8]) -> Answer {
            assert_ne!(data[0], 2, "a device's own bug");
            self.0.write(at, data)
        }
    }
    let kernel = Kernel::new();
    let journal = Arc::new(Journal::default());
    let (bus, mut io) = bus_with(&kernel, Fragile(journal.clone()));
    for value in 1..=3 {
        assert!(kernel.write(0x1000, value));
    }
    catch_unwind(AssertUnwindSafe(|| io.before_exit())).unwrap_err();
    assert_eq!(bus.dispatcher().before_exit(), 1);
    assert_eq!(*journal.0.lock().unwrap(), [(0, 1), (0, 3)]);
}

/// The access that waits for its answer is not the write's, whose device panics.
#[test]
fn a_panic_in_a_drain_leaves_a_waiting_access_waiting() {
    struct SlowAndFragile(Mutex<Option<io_bus::Completion>>);
    impl IoDevice for SlowAndFragile {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            let (completion, deferral) = defer();
            *self.0.lock().unwrap() = Some(completion);
            Answer::Deferred(deferral)
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            panic!("a device's own bug");
        }
    }
    let kernel = Kernel::new();
    let device = Arc::new(SlowAndFragile(Mutex::default()));
    let (_bus, mut io) = bus_with(&kernel, device.clone());
    let mut data = [0; 2];
    let _ = io.mmio_read(MmioAddress(0x1000), &mut data);
    assert!(kernel.write(0x1000, 1));
    catch_unwind(AssertUnwindSafe(|| io.before_exit())).unwrap_err();
    assert!(io.is_deferred());
    let read = device.0.lock().unwrap().take().unwrap();
    assert!(read.complete(&[1, 2]));
    assert!(io.wait_read(&mut data).is_answered());
    assert_eq!(data, [1, 2]);
}

/// A guest that writes on while its writes are carried out holds nobody up.
#[test]
fn a_drain_ends_with_what_was_there_when_it_began() {
    struct Again(Arc<Kernel>, AtomicUsize);
    impl IoDevice for Again {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            Answer::Declined
        }
        fn write(&self, at: At, _: &[u8]) -> Answer {
            // So that a drain without an end fails rather than hangs.
            if self.1.fetch_add(1, Ordering::Relaxed) < 1000 {
                assert!(self.0.write(at.address(), 1));
            }
            Answer::Accepted
        }
    }
    let kernel = Arc::new(Kernel::new());
    let (_bus, mut io) = bus_with(&kernel, Again(kernel.clone(), AtomicUsize::new(0)));
    assert!((0..3).all(|_| kernel.write(0x1000, 1)));
    assert_eq!(io.before_exit(), 3);
    assert_eq!(io.before_exit(), 3);
}

#[test]
fn whether_there_is_something_to_drain_can_be_asked() {
    /// What a dispatcher answers while the write is carried out.
    struct Asks(Mutex<Option<(Dispatcher, Vec<bool>)>>);
    impl IoDevice for Asks {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            Answer::Declined
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            if let Some((io, seen)) = &mut *self.0.lock().unwrap() {
                seen.push(io.has_coalesced());
            }
            Answer::Accepted
        }
    }
    assert!(!IoBus::new().dispatcher().has_coalesced(), "no ring");
    let kernel = Kernel::new();
    let device = Arc::new(Asks(Mutex::default()));
    let (bus, mut io) = bus_with(&kernel, device.clone());
    *device.0.lock().unwrap() = Some((bus.dispatcher(), Vec::new()));
    // More than once around the ring.
    for _ in 0..CAPACITY + 3 {
        assert!(!io.has_coalesced());
        assert!(kernel.write(0x1000, 1));
        assert!(io.has_coalesced(), "and it asks only");
        assert!(bus.dispatcher().has_coalesced());
        assert_eq!(io.before_exit(), 1);
    }
    assert!(!io.has_coalesced());
    // A write that is being carried out counts until the device is back.
    let (_, seen) = device.0.lock().unwrap().take().unwrap();
    assert_eq!(seen, vec![true; CAPACITY as usize + 3]);
}

/// Refuses with any errno.
struct Refusing(Mutex<Option<i32>>);

impl SetCoalescedZone for Refusing {
    fn can_coalesce(&self, bus: BusKind) -> bool {
        bus == BusKind::Mmio
    }
    fn set_coalesced_zone(&self, _: BusKind, _: u64, _: u32, _: bool) -> Result<(), errno::Error> {
        match self.0.lock().unwrap().take() {
            Some(errno) => Err(errno::Error::new(errno)),
            None => Ok(()),
        }
    }
}

#[test]
fn a_zone_that_kvm_refuses_is_none_and_one_that_it_does_not_end_is_one() {
    let kernel = Kernel::new();
    let (bus, _io) = bus_with(&kernel, Journal::default());
    let range = IoRange::new(0x1000, 0x10).unwrap();
    for errno in [libc::ENOSPC, libc::ENOMEM, libc::EINVAL, libc::EINTR] {
        let host = Refusing(Mutex::new(Some(errno)));
        let refused = bus.coalesce(&host, BusKind::Mmio, range).unwrap_err();
        let source = errno::Error::new(errno);
        let mmio = BusKind::Mmio;
        assert_eq!(
            refused,
            Error::RegisterZone {
                bus: mmio,
                range,
                source
            }
        );
        assert_eq!(bus.coalesced_zones(), []);

        let mut zone = bus.coalesce(&host, mmio, range).unwrap();
        *host.0.lock().unwrap() = Some(errno);
        assert!(matches!(zone.end(), Err(Error::UnregisterZone { .. })));
        assert_eq!(bus.coalesced_zones(), [(mmio, range)]);
        // What overlaps it would go with it.
        let inner = IoRange::new(0x1008, 4).unwrap();
        let overlap = bus.coalesce(&host, mmio, inner).unwrap_err();
        assert!(matches!(overlap, Error::ZoneOverlap { other, .. } if other == range));
        drop(zone);
        assert_eq!(bus.coalesced_zones(), []);
    }
    let host = Refusing(Mutex::default());
    let without = bus.coalesce(&host, BusKind::Pio, range).unwrap_err();
    assert_eq!(without, Error::CannotCoalesce { bus: BusKind::Pio });
}
