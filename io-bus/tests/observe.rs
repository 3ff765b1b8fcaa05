// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counters and the trace hook: what they tell, and that their absence is one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use io_bus::{
    Access, Answer, At, BusKind, Direction, IoBus, IoDevice, IoRange, MmioAddress, Outcome,
    PioAddress, Removal, Trace, defer,
};

/// Accepts, but for odd addresses.
struct Even;

impl Even {
    fn answer(at: At) -> Answer {
        match at.address() % 2 {
            0 => Answer::Accepted,
            _ => Answer::Declined,
        }
    }
}

impl IoDevice for Even {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        data.fill(7);
        Self::answer(at)
    }
    fn write(&self, at: At, _: &[u8]) -> Answer {
        Self::answer(at)
    }
}

fn range(base: u64, size: u64) -> IoRange {
    IoRange::new(base, size).unwrap()
}

#[test]
fn each_range_counts_what_it_was_asked_and_each_bus_what_nobody_took() {
    let bus = IoBus::new();
    let mut device = bus
        .register(BusKind::Mmio, range(0x100, 0x10), Even)
        .unwrap();
    let mut io = bus.dispatcher();
    let mut data = [0; 4];
    assert!(io.mmio_read(MmioAddress(0x100), &mut data).is_answered());
    assert_eq!(bus.stats(), None);

    bus.count(true);
    // A device that comes later is counted as well.
    let _port = bus.register(BusKind::Pio, range(0x60, 1), Even).unwrap();
    let _ = io.mmio_read(MmioAddress(0x100), &mut data);
    let _ = io.mmio_read(MmioAddress(0x102), &mut data[..2]);
    let _ = io.mmio_write(MmioAddress(0x104), &data);
    let _ = io.mmio_write(MmioAddress(0x105), &data[..1]);
    let _ = io.mmio_write(MmioAddress(0x900), &data[..1]);
    let _ = io.pio_write(PioAddress(0x60), &data[..1]);
    let stats = bus.stats().unwrap();
    let [mmio, port] = stats.ranges[..] else {
        panic!("{stats:?}");
    };
    assert_eq!((mmio.bus, mmio.range), (BusKind::Mmio, range(0x100, 0x10)));
    assert_eq!((mmio.reads, mmio.read_bytes), (2, 6));
    assert_eq!((mmio.writes, mmio.written_bytes), (1, 4));
    assert_eq!((mmio.declined, mmio.deferred), (1, 0));
    assert_eq!((port.bus, port.writes, port.reads), (BusKind::Pio, 1, 0));
    let unclaimed = stats.unclaimed.map(|u| (u.accesses, u.last_address));
    assert_eq!(
        unclaimed,
        [(2, Some(0x900)), (0, None), (0, None), (0, None)]
    );

    // The counters go with the device.
    assert!(device.relocate(0x800).unwrap().is_done());
    let moved = bus.stats().unwrap().ranges[0];
    assert_eq!((moved.range, moved.reads), (range(0x800, 0x10), 2));
    // On again is from zero, and off is off.
    bus.count(true);
    assert_eq!(bus.stats().unwrap().ranges[0].reads, 0);
    bus.count(false);
    let _ = io.mmio_read(MmioAddress(0x800), &mut data);
    assert_eq!(bus.stats(), None);
}

/// What an access was, without how long it took.
type Seen = (BusKind, u64, Direction, Vec<u8>, Outcome);

/// Keeps all it is told.
#[derive(Default)]
struct Recorder {
    seen: Mutex<Vec<Seen>>,
    timed: AtomicUsize,
    clock: bool,
}

impl Trace for Recorder {
    fn access(&self, a: &Access<'_>) {
        let seen = (a.bus, a.address, a.direction, a.data.to_vec(), a.outcome);
        self.seen.lock().unwrap().push(seen);
        let timed = usize::from(a.duration.is_some());
        self.timed.fetch_add(timed, Ordering::Relaxed);
    }
    fn wants_duration(&self) -> bool {
        self.clock
    }
}

#[test]
fn the_hook_sees_each_access_as_it_ended_while_it_is_installed() {
    use Direction::{Read, Write};
    struct Late;
    impl IoDevice for Late {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            let (completion, deferral) = defer();
            assert!(completion.complete(&[4]));
            Answer::Deferred(deferral)
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            Answer::Accepted
        }
    }
    let bus = IoBus::new();
    let _even = bus
        .register(BusKind::Mmio, range(0x100, 0x10), Even)
        .unwrap();
    let _bell = bus
        .register(BusKind::FastMmio, IoRange::exact(0x108), Even)
        .unwrap();
    let _late = bus.register(BusKind::Pio, range(0x60, 1), Late).unwrap();
    let mut io = bus.dispatcher();
    let mut data = [0; 2];
    let _ = io.mmio_read(MmioAddress(0x100), &mut data);
    for clock in [false, true] {
        let recorder = Arc::new(Recorder {
            clock,
            ..Recorder::default()
        });
        assert!(bus.trace(Some(recorder.clone())).is_done());
        let _ = io.mmio_read(MmioAddress(0x100), &mut data);
        let _ = io.mmio_write(MmioAddress(0x108), &[1, 2]);
        let _ = io.mmio_write(MmioAddress(0x10e), &[1]);
        let _ = io.mmio_read(MmioAddress(0x101), &mut data[..1]);
        let _ = io.pio_read(PioAddress(0x60), &mut data[..1]);
        assert!(io.wait_read(&mut data[..1]).is_answered());
        assert!(bus.trace(None).is_done());
        let _ = io.mmio_read(MmioAddress(0x100), &mut data);
        let seen = recorder.seen.lock().unwrap();
        let (answered, unclaimed) = (Outcome::Answered, Outcome::Unclaimed);
        assert_eq!(
            *seen,
            [
                (BusKind::Mmio, 0x100, Read, vec![7, 7], answered),
                (BusKind::FastMmio, 0x108, Write, vec![1, 2], answered),
                (BusKind::Mmio, 0x10e, Write, vec![1], answered),
                (BusKind::Mmio, 0x101, Read, vec![0xff], unclaimed),
                (BusKind::Pio, 0x60, Read, vec![0xff], Outcome::Deferred),
                (BusKind::Pio, 0x60, Read, vec![4], answered),
            ]
        );
        let timed = recorder.timed.load(Ordering::Relaxed);
        assert_eq!(timed, if clock { 5 } else { 0 });
        assert_eq!(Arc::strong_count(&recorder), 1);
    }
}

/// Once the removal is done, nobody is inside the hook; from inside it, it is pending.
#[test]
fn a_hook_goes_as_a_device_does() {
    struct Leaver(IoBus);
    impl Trace for Leaver {
        fn access(&self, _: &Access<'_>) {
            assert!(matches!(self.0.trace(None), Removal::Pending(_)));
        }
    }
    let bus = IoBus::new();
    let elsewhere = IoBus::new();
    let leaver = Arc::new(Leaver(bus.clone()));
    assert!(bus.trace(Some(leaver.clone())).is_done());
    let mut io = bus.dispatcher();
    let _ = io.pio_write(PioAddress(1), &[0]);
    assert_eq!(Arc::strong_count(&leaver), 1);
    drop(elsewhere);

    struct Inside(AtomicUsize);
    impl Trace for Inside {
        fn access(&self, _: &Access<'_>) {
            self.0.fetch_add(1, Ordering::Relaxed);
            thread::yield_now();
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let started = Barrier::new(2);
    let stop = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            started.wait();
            while stop.load(Ordering::Relaxed) == 0 {
                let _ = io.pio_write(PioAddress(1), &[0]);
            }
        });
        started.wait();
        for _ in 0..2_000 {
            let hook = Arc::new(Inside(AtomicUsize::new(0)));
            assert!(bus.trace(Some(hook.clone())).is_done());
            assert!(bus.trace(None).is_done());
            assert_eq!(hook.0.load(Ordering::Relaxed), 0);
        }
        stop.store(1, Ordering::Relaxed);
    });
}
