// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an access meets: one sentence of the crate's documentation a test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use io_bus::{
    Answer, At, BusKind, Error, IoBus, IoDevice, IoRange, Locked, MmioAddress, MmioRange,
    NR_IOBUS_DEVS, Outcome, PioAddress, PioRange,
};
use vm_device::{DeviceMmio, DevicePio, MutDeviceMmio, MutDevicePio};

/// Writes down what it was asked; answers reads with its name; declines unless told to accept.
struct Witness {
    name: u8,
    accepts: bool,
    seen: Mutex<Vec<(At, Vec<u8>)>>,
}

impl Witness {
    fn new(name: u8, answer: Answer) -> Arc<Self> {
        Arc::new(Self {
            name,
            accepts: matches!(answer, Answer::Accepted),
            seen: Mutex::default(),
        })
    }

    fn answer(&self) -> Answer {
        match self.accepts {
            true => Answer::Accepted,
            false => Answer::Declined,
        }
    }

    fn seen(&self) -> Vec<(u64, Vec<u8>)> {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        seen.into_iter().map(|(at, d)| (at.address(), d)).collect()
    }
}

impl IoDevice for Witness {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        self.seen.lock().unwrap().push((at, data.to_vec()));
        // A device that declines has no say in the data, whatever it writes there.
        data.fill(self.name);
        self.answer()
    }

    fn write(&self, at: At, data: &[u8]) -> Answer {
        self.seen.lock().unwrap().push((at, data.to_vec()));
        self.answer()
    }
}

fn range(base: u64, size: u64) -> IoRange {
    IoRange::new(base, size).unwrap()
}

#[test]
fn nobody_answers_on_an_empty_bus_and_reads_are_all_ones() {
    let bus = IoBus::new();
    let mut io = bus.dispatcher();
    for len in 0..=20 {
        let mut data = vec![0xa5; len];
        let outcome = io.mmio_read(MmioAddress(0xffc), &mut data);
        assert_eq!((outcome, data), (Outcome::Unclaimed, vec![0xff; len]));
        assert_eq!(
            io.mmio_write(MmioAddress(u64::MAX), &vec![0; len]),
            Outcome::Unclaimed
        );
        let mut data = vec![0xa5; len];
        let outcome = io.pio_read(PioAddress(u16::MAX), &mut data);
        assert_eq!((outcome, data), (Outcome::Unclaimed, vec![0xff; len]));
        for kind in BusKind::ALL {
            assert_eq!(io.write(kind, u64::MAX, &vec![0; len]), Outcome::Unclaimed);
        }
    }
}

#[test]
fn an_access_that_straddles_a_ranges_end_is_nobodys() {
    let bus = IoBus::new();
    let first = Witness::new(1, Answer::Accepted);
    let second = Witness::new(2, Answer::Accepted);
    let _first = bus
        .register(BusKind::Mmio, range(0x100, 6), first.clone())
        .unwrap();
    // Not even a neighbour that answers the rest makes it anyone's.
    let _second = bus
        .register(BusKind::Mmio, range(0x106, 6), second.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    let mut data = [0; 4];
    assert_eq!(
        io.mmio_read(MmioAddress(0x104), &mut data),
        Outcome::Unclaimed
    );
    assert_eq!(io.mmio_write(MmioAddress(0xff), &data), Outcome::Unclaimed);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(
        io.mmio_read(MmioAddress(0x102), &mut data),
        Outcome::Answered
    );
    assert_eq!(data, [1; 4]);
    // The cookie, warm now, changes nothing about it.
    assert_eq!(
        io.mmio_read(MmioAddress(0x103), &mut data),
        Outcome::Unclaimed
    );
    assert_eq!(data, [0xff; 4]);
    assert_eq!((first.seen().len(), second.seen().len()), (1, 0));
}

#[test]
fn devices_share_a_range_and_the_first_that_accepts_answers() {
    let bus = IoBus::new();
    let shy = Witness::new(1, Answer::Declined);
    let able = Witness::new(2, Answer::Accepted);
    let never = Witness::new(3, Answer::Accepted);
    let mut registrations = Vec::new();
    for device in [&shy, &able, &never] {
        registrations.push(
            bus.register(BusKind::Pio, range(0x60, 5), device.clone())
                .unwrap(),
        );
    }
    let mut io = bus.dispatcher();
    for _ in 0..3 {
        let mut data = [0; 2];
        assert_eq!(io.pio_read(PioAddress(0x61), &mut data), Outcome::Answered);
        assert_eq!(data, [2; 2]);
        // What the one that declined had left in the data was gone again for the next.
        assert_eq!(able.seen(), [(0x61, vec![0xff, 0xff])]);
    }
    assert_eq!(shy.seen().len(), 3);
    drop(registrations.remove(1));
    let mut data = [0];
    assert_eq!(io.pio_read(PioAddress(0x61), &mut data), Outcome::Answered);
    assert_eq!((data, never.seen().len()), ([3], 1));
    drop(registrations.remove(1));
    assert_eq!(io.pio_read(PioAddress(0x61), &mut data), Outcome::Unclaimed);
    assert_eq!(data, [0xff]);
}

#[test]
fn a_ranges_base_tells_a_device_which_of_its_ranges_was_meant() {
    let bus = IoBus::new();
    let device = Witness::new(1, Answer::Accepted);
    let _low = bus
        .register(BusKind::Mmio, range(0x1000, 8), device.clone())
        .unwrap();
    let _high = bus
        .register(BusKind::Mmio, range(0x2000, 8), device.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    assert!(io.mmio_write(MmioAddress(0x2004), &[9]).is_answered());
    assert!(io.mmio_write(MmioAddress(0x1007), &[9]).is_answered());
    let seen: Vec<At> = device
        .seen
        .lock()
        .unwrap()
        .iter()
        .map(|(at, _)| *at)
        .collect();
    assert_eq!((seen[0].base, seen[0].offset), (0x2000, 4));
    assert_eq!((seen[1].base, seen[1].offset), (0x1000, 7));
}

#[test]
fn a_wide_or_page_crossing_access_comes_in_pieces() {
    let bus = IoBus::new();
    let device = Witness::new(7, Answer::Accepted);
    let mut registration = bus
        .register(BusKind::Mmio, range(0, 0x4000), device.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    let data: Vec<u8> = (0..16).collect();
    assert_eq!(io.mmio_write(MmioAddress(0x1ffc), &data), Outcome::Answered);
    let pieces = [
        (0x1ffc, data[0..4].to_vec()),
        (0x2000, data[4..12].to_vec()),
        (0x2008, data[12..].to_vec()),
    ];
    assert_eq!(device.seen(), pieces);
    // Where only a part is anyone's, the rest reads as all ones.
    assert!(registration.relocate(0x2000).unwrap().is_done());
    let mut data = [0; 6];
    assert_eq!(
        io.mmio_read(MmioAddress(0x1ffc), &mut data),
        Outcome::Partial
    );
    assert_eq!(data, [0xff, 0xff, 0xff, 0xff, 7, 7]);
}

#[test]
fn a_string_instruction_is_several_accesses_to_one_port() {
    let bus = IoBus::new();
    let device = Witness::new(7, Answer::Accepted);
    let _registration = bus
        .register(BusKind::Pio, range(0x1f0, 2), device.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    let outcome = io.pio_write_repeated(PioAddress(0x1f0), 2, &[1, 2, 3, 4]);
    assert_eq!(outcome, Outcome::Answered);
    assert_eq!(device.seen(), [(0x1f0, vec![1, 2]), (0x1f0, vec![3, 4])]);
    let mut data = [0; 3];
    assert_eq!(
        io.pio_read_repeated(PioAddress(0x1f0), 1, &mut data),
        Outcome::Answered
    );
    assert_eq!((data, device.seen().len()), ([7; 3], 3));
    assert_eq!(
        io.pio_read_repeated(PioAddress(0x1f0), 0, &mut data),
        Outcome::Unclaimed
    );
    assert_eq!(data, [0xff; 3]);
}

#[test]
fn a_write_is_offered_to_the_fast_bus_first_and_a_read_is_not() {
    let bus = IoBus::new();
    let registers = Witness::new(1, Answer::Accepted);
    let bell = Witness::new(2, Answer::Accepted);
    let _registers = bus
        .register(BusKind::Mmio, range(0x1000, 0x100), registers.clone())
        .unwrap();
    let _bell = bus
        .register(BusKind::FastMmio, IoRange::exact(0x1050), bell.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    assert!(
        io.mmio_write(MmioAddress(0x1050), &[1, 0, 0, 0])
            .is_answered()
    );
    assert!(io.mmio_write(MmioAddress(0x1050), &[2]).is_answered());
    assert_eq!(bell.seen(), [(0x1050, vec![1, 0, 0, 0]), (0x1050, vec![2])]);
    assert_eq!(registers.seen(), []);
    assert!(io.mmio_read(MmioAddress(0x1050), &mut [0]).is_answered());
    assert!(io.mmio_write(MmioAddress(0x1051), &[3]).is_answered());
    assert_eq!((registers.seen().len(), bell.seen().len()), (2, 0));
}

#[test]
fn a_full_bus_refuses_and_is_unchanged() {
    let bus = IoBus::new();
    assert_eq!((NR_IOBUS_DEVS, bus.capacity()), (1000, 1000));
    let bus = IoBus::with_capacity(2);
    let device = Witness::new(1, Answer::Accepted);
    let first = bus
        .register(BusKind::Mmio, range(0, 1), device.clone())
        .unwrap();
    let _second = bus
        .register(BusKind::Mmio, range(0, 1), device.clone())
        .unwrap();
    let before = bus.ranges(BusKind::Mmio);
    let full = bus
        .register(BusKind::Mmio, range(8, 1), device.clone())
        .unwrap_err();
    assert_eq!(
        full,
        Error::BusFull {
            bus: BusKind::Mmio,
            capacity: 2
        }
    );
    assert_eq!(bus.ranges(BusKind::Mmio), before);
    // Each bus has its own capacity, and what goes makes room.
    let _port = bus
        .register(BusKind::Pio, range(0, 1), device.clone())
        .unwrap();
    assert!(first.unregister().is_done());
    let _third = bus
        .register(BusKind::Mmio, range(8, 1), device.clone())
        .unwrap();
    // A refused device is not kept.
    assert!(
        bus.register(BusKind::Mmio, range(8, 1), device.clone())
            .is_err()
    );
    assert_eq!(Arc::strong_count(&device), 4);
}

#[test]
fn a_range_beyond_its_bus_is_refused_and_a_failed_move_changes_nothing() {
    let bus = IoBus::new();
    let device = Witness::new(1, Answer::Accepted);
    let ports = range(0xfff8, 9);
    let refused = bus
        .register(BusKind::Pio, ports, device.clone())
        .unwrap_err();
    assert_eq!(
        refused,
        Error::OutsideBus {
            bus: BusKind::Pio,
            range: ports
        }
    );
    let mut port = bus
        .register(BusKind::Pio, range(0x10, 4), device.clone())
        .unwrap();
    assert!(matches!(
        port.relocate(0xfffd),
        Err(Error::OutsideBus { .. })
    ));
    assert!(matches!(
        port.relocate(u64::MAX),
        Err(Error::WrappingRange { .. })
    ));
    assert_eq!(port.range(), range(0x10, 4));
    assert_eq!(bus.ranges(BusKind::Pio), [range(0x10, 4)]);
    assert!(port.relocate(0xfffc).unwrap().is_done());
    assert_eq!(bus.ranges(BusKind::Pio), [range(0xfffc, 4)]);
    drop(bus);
    assert!(matches!(port.relocate(0), Err(Error::NotRegistered { .. })));
    assert!(port.unregister().is_done());
}

#[test]
fn a_kept_registration_stays_and_a_dropped_one_goes() {
    let bus = IoBus::new();
    let device = Witness::new(1, Answer::Accepted);
    bus.register(BusKind::Mmio, range(0, 1), device.clone())
        .unwrap()
        .keep();
    drop(
        bus.register(BusKind::Mmio, range(1, 1), device.clone())
            .unwrap(),
    );
    assert_eq!(bus.ranges(BusKind::Mmio), [range(0, 1)]);
    assert_eq!(Arc::strong_count(&device), 2);
    drop(bus);
    assert_eq!(Arc::strong_count(&device), 1);
}

/// A device whose lock is poisoned, on either bus.
struct Fragile {
    value: u8,
}

impl Fragile {
    fn access(&mut self, data: &[u8]) {
        if data == [0xbd] {
            panic!("a device's own bug");
        }
        self.value += 1;
    }
}

impl MutDevicePio for Fragile {
    fn pio_read(&mut self, _: PioAddress, _: u16, data: &mut [u8]) {
        data.fill(self.value);
    }
    fn pio_write(&mut self, _: PioAddress, _: u16, data: &[u8]) {
        self.access(data);
    }
}

impl MutDeviceMmio for Fragile {
    fn mmio_read(&mut self, _: MmioAddress, _: u64, data: &mut [u8]) {
        data.fill(self.value);
    }
    fn mmio_write(&mut self, _: MmioAddress, _: u64, data: &[u8]) {
        self.access(data);
    }
}

#[test]
fn a_device_that_panicked_breaks_neither_its_lock_nor_the_dispatcher_nor_removal() {
    let bus = IoBus::new();
    let device = Arc::new(Locked::new(Fragile { value: 1 }));
    let ports = PioRange::new(PioAddress(0x70), 2).unwrap();
    let memory = MmioRange::new(MmioAddress(0x70), 2).unwrap();
    let port = bus.register_pio(ports, device.clone()).unwrap();
    let mmio = bus.register_mmio(memory, device.clone()).unwrap();
    let mut io = bus.dispatcher();
    for _ in 0..2 {
        catch_unwind(AssertUnwindSafe(|| io.pio_write(PioAddress(0x70), &[0xbd]))).unwrap_err();
        catch_unwind(AssertUnwindSafe(|| {
            io.mmio_write(MmioAddress(0x70), &[0xbd])
        }))
        .unwrap_err();
    }
    assert!(!io_bus::is_inside_access());
    assert!(io.pio_write(PioAddress(0x71), &[0]).is_answered());
    assert!(io.mmio_write(MmioAddress(0x71), &[0]).is_answered());
    let mut data = [0];
    assert!(io.pio_read(PioAddress(0x70), &mut data).is_answered());
    assert_eq!(data, [3]);
    assert!(io.mmio_read(MmioAddress(0x70), &mut data).is_answered());
    assert_eq!((data, device.lock().value), ([3], 3));
    // The panic left the access: this does not hang.
    assert!(port.unregister().is_done() && mmio.unregister().is_done());
    assert_eq!(Arc::try_unwrap(device).unwrap().into_inner().value, 3);
}

/// Leaves reads alone, as vm-superio's devices do with a width that they do not know.
struct Mute;

impl DeviceMmio for Mute {
    fn mmio_read(&self, _: MmioAddress, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
}

impl DevicePio for Mute {
    fn pio_read(&self, _: PioAddress, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: PioAddress, _: u16, _: &[u8]) {}
}

#[test]
fn vm_device_devices_plug_in_however_they_are_held() {
    let bus = IoBus::new();
    let at = |n: u64| MmioRange::new(MmioAddress(n), 0x10).unwrap();
    let shared: Arc<dyn DeviceMmio + Send + Sync> = Arc::new(Mute);
    let mutex = Arc::new(Mutex::new(Fragile { value: 5 }));
    let _registrations = [
        bus.register_mmio(at(0x00), Mute).unwrap(),
        bus.register_mmio(at(0x10), Arc::new(Mute)).unwrap(),
        bus.register_mmio(at(0x20), shared).unwrap(),
        bus.register_mmio(at(0x30), mutex).unwrap(),
        bus.register_mmio(at(0x40), Locked::new(Fragile { value: 6 }))
            .unwrap(),
        bus.register_pio(PioRange::new(PioAddress(0), 0x10).unwrap(), Mute)
            .unwrap(),
    ];
    let mut io = bus.dispatcher();
    for (address, value) in [
        (0x00, 0xff),
        (0x10, 0xff),
        (0x20, 0xff),
        (0x30, 5),
        (0x40, 6),
    ] {
        for len in 1..=8 {
            // Stale bytes of kvm_run never reach a guest.
            let mut data = vec![0x5a; len];
            assert!(io.mmio_read(MmioAddress(address), &mut data).is_answered());
            assert_eq!(data, vec![value; len]);
        }
    }
    let mut data = [0x5a; 4];
    assert!(io.pio_read(PioAddress(0xc), &mut data).is_answered());
    assert_eq!(data, [0xff; 4]);
}
