// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device moves with its ioeventfds: what a write meets at every moment of the move, and that a
//! move that fails has moved nothing, whichever step it was and whatever KVM said.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use io_bus::{
    Answer, At, BusKind, Error, IoBus, IoDevice, IoEvent, IoEventAddress, IoRange, MmioAddress,
    Registration, SetIoEventFd, WriteMatch,
};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

const ERRNOS: [i32; 4] = [libc::EEXIST, libc::ENOSPC, libc::ENOMEM, libc::EBADF];

struct Nothing;

impl IoDevice for Nothing {
    fn read(&self, _: At, _: &mut [u8]) -> Answer {
        Answer::Accepted
    }
    fn write(&self, _: At, _: &[u8]) -> Answer {
        Answer::Accepted
    }
}

/// What there was after a step: the ioeventfds, and the device's range on the bus.
type Moment = (Vec<IoEvent>, Vec<IoRange>);

/// A VM that writes down what holds before and after each call, and can refuse one.
struct Watch {
    bus: IoBus,
    attached: Mutex<Vec<IoEvent>>,
    moments: Mutex<Vec<Moment>>,
    refuse: Mutex<Option<(usize, i32)>>,
    /// So many calls are answered first, then so many refused.
    refuse_many: Mutex<(usize, usize)>,
}

impl Watch {
    fn new(bus: &IoBus) -> Arc<Self> {
        Arc::new(Self {
            bus: bus.clone(),
            attached: Mutex::default(),
            moments: Mutex::default(),
            refuse: Mutex::default(),
            refuse_many: Mutex::default(),
        })
    }

    fn look(&self) {
        let attached = self.attached.lock().unwrap().clone();
        let ranges = self.bus.ranges(BusKind::Mmio);
        self.moments.lock().unwrap().push((attached, ranges));
    }

    fn events(&self) -> Vec<IoEvent> {
        let mut events = self.attached.lock().unwrap().clone();
        events.sort_by_key(|event| (event.address.value(), event.writes.datamatch()));
        events
    }
}

impl SetIoEventFd for Watch {
    fn set_ioeventfd(&self, event: &IoEvent, _: RawFd, attach: bool) -> Result<(), errno::Error> {
        self.look();
        {
            let mut refuse = self.refuse.lock().unwrap();
            match &mut *refuse {
                Some((0, errno)) => {
                    let errno = *errno;
                    *refuse = None;
                    return Err(errno::Error::new(errno));
                }
                Some((calls, _)) => *calls -= 1,
                None => {}
            }
            match &mut *self.refuse_many.lock().unwrap() {
                (0, 0) => {}
                (0, refused) => {
                    *refused -= 1;
                    return Err(errno::Error::new(libc::ENOMEM));
                }
                (answered, _) => *answered -= 1,
            }
            let mut attached = self.attached.lock().unwrap();
            if attach {
                if attached.iter().any(|known| known.collides(event)) {
                    return Err(errno::Error::new(libc::EEXIST));
                }
                attached.push(*event);
            } else {
                let place = attached.iter().position(|known| known == event);
                attached.remove(place.ok_or(errno::Error::new(libc::ENOENT))?);
            }
        }
        self.look();
        Ok(())
    }
}

fn bell(at: u64, value: u32) -> IoEvent {
    IoEvent {
        address: IoEventAddress::Mmio(MmioAddress(at)),
        writes: WriteMatch::U32(value),
    }
}

fn page(base: u64) -> IoRange {
    IoRange::new(base, 0x1000).unwrap()
}

/// A device at 0x1000 with a doorbell at each of `offsets`.
fn device(bus: &IoBus, watch: &Arc<Watch>, offsets: &[u64]) -> Registration {
    let mut device = bus.register(BusKind::Mmio, page(0x1000), Nothing).unwrap();
    for offset in offsets {
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        device
            .attach_ioeventfd(watch.clone(), *offset, WriteMatch::U32(0), fd)
            .unwrap();
    }
    watch.moments.lock().unwrap().clear();
    device
}

#[test]
fn at_every_moment_of_a_move_a_write_signals_where_the_device_is() {
    let bus = IoBus::new();
    let watch = Watch::new(&bus);
    let mut device = device(&bus, &watch, &[0x50, 0x60]);
    assert!(device.relocate(0x8000).unwrap().is_done());
    let moments = watch.moments.lock().unwrap().clone();
    assert!(!moments.is_empty());
    let mut steps = Vec::new();
    for (attached, ranges) in moments {
        for offset in [0x50, 0x60] {
            let old = attached.contains(&bell(0x1000 + offset, 0));
            let new = attached.contains(&bell(0x8000 + offset, 0));
            // Wherever the table has it, KVM signals for it.
            match ranges[..] {
                [range] if range == page(0x1000) => assert!(old),
                [range] if range == page(0x8000) => assert!(new),
                _ => panic!("{ranges:?}"),
            }
            steps.push((old, ranges[0].base(), new));
        }
    }
    // The order of the three steps for each: attach, publish, detach.
    steps.dedup();
    assert!(steps.contains(&(true, 0x1000, true)));
    assert!(steps.contains(&(true, 0x8000, true)));
    assert!(!steps.contains(&(false, 0x1000, true)));
    assert!(!steps.contains(&(true, 0x8000, false)));
    assert_eq!(watch.events(), [bell(0x8050, 0), bell(0x8060, 0)]);
}

#[test]
fn a_move_that_any_step_refuses_moves_nothing() {
    for errno in ERRNOS {
        for call in 0..4 {
            let bus = IoBus::new();
            let watch = Watch::new(&bus);
            let mut device = device(&bus, &watch, &[0x50, 0x60]);
            *watch.refuse.lock().unwrap() = Some((call, errno));
            let error = device.relocate(0x8000).unwrap_err();
            match (call, &error) {
                (0 | 1, Error::AssignIoEventFd { source, .. })
                | (2 | 3, Error::DeassignIoEventFd { source, .. }) => {
                    assert_eq!(source.errno(), errno);
                }
                _ => panic!("{call}: {error}"),
            }
            assert_eq!(watch.events(), [bell(0x1050, 0), bell(0x1060, 0)]);
            assert_eq!(bus.ranges(BusKind::Mmio), [page(0x1000)]);
            assert_eq!(device.range(), page(0x1000));
            // And it moves when it may.
            assert!(device.relocate(0x8000).unwrap().is_done());
            assert_eq!(watch.events(), [bell(0x8050, 0), bell(0x8060, 0)]);
        }
    }
}

/// The second attach is refused, and so is the undoing of the first.
fn device_with_a_stray(bus: &IoBus, watch: &Arc<Watch>) -> Registration {
    let mut device = device(bus, watch, &[0x50, 0x60]);
    *watch.refuse_many.lock().unwrap() = (1, 2);
    let error = device.relocate(0x8000).unwrap_err();
    assert!(matches!(error, Error::AssignIoEventFd { event, .. } if event == bell(0x8060, 0)));
    let stray = bell(0x8050, 0);
    assert_eq!(
        watch.events(),
        [bell(0x1050, 0), bell(0x1060, 0), stray],
        "the case that is to be tested"
    );
    assert_eq!(device.range(), page(0x1000));
    device
}

#[test]
fn what_an_undo_left_goes_with_the_next_move() {
    for base in [0x8000, 0x9000, 0x1000] {
        let bus = IoBus::new();
        let watch = Watch::new(&bus);
        let mut device = device_with_a_stray(&bus, &watch);
        assert!(device.relocate(base).unwrap().is_done());
        assert_eq!(watch.events(), [bell(base + 0x50, 0), bell(base + 0x60, 0)]);
    }
}

#[test]
fn a_move_does_not_begin_while_kvm_keeps_what_an_undo_left() {
    let bus = IoBus::new();
    let watch = Watch::new(&bus);
    let mut device = device_with_a_stray(&bus, &watch);
    let before = watch.events();
    *watch.refuse_many.lock().unwrap() = (0, 1);
    let error = device.relocate(0x9000).unwrap_err();
    assert!(matches!(error, Error::DeassignIoEventFd { event, .. } if event == bell(0x8050, 0)));
    assert_eq!(watch.events(), before);
    assert_eq!(bus.ranges(BusKind::Mmio), [page(0x1000)]);
    assert!(device.relocate(0x9000).unwrap().is_done());
    assert_eq!(watch.events(), [bell(0x9050, 0), bell(0x9060, 0)]);
}

#[test]
fn what_an_undo_left_goes_with_the_device() {
    for way in 0..3 {
        let bus = IoBus::new();
        let watch = Watch::new(&bus);
        let mut device = device_with_a_stray(&bus, &watch);
        match way {
            0 => assert!(device.unregister().is_done()),
            1 => drop(device),
            // Refused once more: the others go all the same, and it stays noted.
            _ => {
                let (id, event) = device.ioeventfds().next().unwrap();
                *watch.refuse_many.lock().unwrap() = (0, 1);
                device.detach_ioeventfd(id).unwrap_err();
                assert!(device.ioeventfds().any(|known| known == (id, event)));
                device.detach_ioeventfd(id).unwrap();
                assert_eq!(watch.events(), [bell(0x1060, 0)]);
                drop(device);
            }
        }
        assert_eq!(watch.events(), [], "{way}");
    }
}

/// The first detach was answered and the second not, and the first would not be attached again.
#[test]
fn what_an_undo_could_not_attach_again_is_listed_no_more_and_comes_back() {
    for goes in [false, true] {
        let bus = IoBus::new();
        let watch = Watch::new(&bus);
        let mut device = device(&bus, &watch, &[0x50, 0x60]);
        *watch.refuse_many.lock().unwrap() = (3, 2);
        device.relocate(0x8000).unwrap_err();
        assert_eq!(watch.events(), [bell(0x1060, 0)]);
        let listed: Vec<_> = device.ioeventfds().map(|(_, event)| event).collect();
        assert_eq!(listed, watch.events());
        if goes {
            drop(device);
            assert_eq!(watch.events(), []);
            continue;
        }
        assert!(device.relocate(0x8000).unwrap().is_done());
        assert_eq!(watch.events(), [bell(0x8050, 0), bell(0x8060, 0)]);
        assert_eq!(device.ioeventfds().count(), 2);
    }
}

/// The new place of one doorbell is the old place of another: KVM would not have both.
#[test]
fn doorbells_that_move_onto_each_other_move_too_and_fail_whole() {
    for refused in [None, Some(0), Some(1), Some(2), Some(3), Some(4), Some(5)] {
        let bus = IoBus::new();
        let watch = Watch::new(&bus);
        let mut device = device(&bus, &watch, &[0x50, 0x60, 0x70]);
        *watch.refuse.lock().unwrap() = refused.map(|call| (call, libc::ENOMEM));
        let moved = device.relocate(0x1010);
        let base = match refused {
            None => 0x1010,
            Some(_) => 0x1000,
        };
        assert_eq!(moved.is_ok(), refused.is_none(), "{refused:?}");
        let expected = [0x50, 0x60, 0x70].map(|offset| bell(base + offset, 0));
        assert_eq!(watch.events(), expected);
        assert_eq!(bus.ranges(BusKind::Mmio), [page(base)]);
        // While a place is free of both, the device is there for a write that leaves the guest.
        for (attached, ranges) in watch.moments.lock().unwrap().iter() {
            for at in [0x1060, 0x1070] {
                let signals = attached.contains(&bell(at, 0));
                assert!(signals || ranges[0].holds(at, 4));
            }
        }
    }
}

#[test]
fn a_place_that_is_anothers_is_refused_and_nothing_has_moved() {
    let bus = IoBus::new();
    let watch = Watch::new(&bus);
    let mut first = device(&bus, &watch, &[0x50, 0x60]);
    let mut other = bus.register(BusKind::Mmio, page(0x8000), Nothing).unwrap();
    let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let id = other
        .attach_ioeventfd(watch.clone(), 0x60, WriteMatch::Any, fd)
        .unwrap();
    let error = first.relocate(0x8000).unwrap_err();
    assert!(matches!(error, Error::AssignIoEventFd { event, .. } if event == bell(0x8060, 0)));
    assert_eq!(first.ioeventfds().count(), 2);
    assert_eq!(bus.ranges(BusKind::Mmio), [page(0x1000), page(0x8000)]);
    other.detach_ioeventfd(id).unwrap();
    assert_eq!(other.detach_ioeventfd(id), Err(Error::NoSuchIoEvent));
    assert!(first.relocate(0x8000).unwrap().is_done());
}

#[test]
fn a_device_goes_after_its_ioeventfds() {
    for explicit in [true, false] {
        let bus = IoBus::new();
        let watch = Watch::new(&bus);
        let device = device(&bus, &watch, &[0x50, 0x60]);
        match explicit {
            true => assert!(device.unregister().is_done()),
            false => drop(device),
        }
        assert_eq!(watch.events(), []);
        // Until the last was detached, the device was there.
        let moments = watch.moments.lock().unwrap();
        assert!(moments.iter().all(|(_, ranges)| *ranges == [page(0x1000)]));
        assert_eq!(bus.ranges(BusKind::Mmio), []);
    }
}

#[test]
fn a_registration_that_is_kept_keeps_its_ioeventfds() {
    struct Vm(Mutex<Vec<IoEvent>>);
    impl SetIoEventFd for Vm {
        fn set_ioeventfd(&self, event: &IoEvent, _: RawFd, on: bool) -> Result<(), errno::Error> {
            let mut attached = self.0.lock().unwrap();
            attached.retain(|known| known != event);
            attached.extend(on.then_some(*event));
            Ok(())
        }
    }
    /// Looks, as it goes, whether its ioeventfds have gone.
    struct Leaves(Arc<Vm>, Arc<Mutex<Option<usize>>>);
    impl IoDevice for Leaves {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            Answer::Accepted
        }
        fn write(&self, _: At, _: &[u8]) -> Answer {
            Answer::Accepted
        }
    }
    impl Drop for Leaves {
        fn drop(&mut self) {
            *self.1.lock().unwrap() = Some(self.0.0.lock().unwrap().len());
        }
    }
    let bus = IoBus::new();
    let vm = Arc::new(Vm(Mutex::default()));
    let left = Arc::new(Mutex::new(None));
    let leaves = Leaves(vm.clone(), left.clone());
    let mut device = bus.register(BusKind::Mmio, page(0x1000), leaves).unwrap();
    let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    device
        .attach_ioeventfd(vm.clone(), 0x50, WriteMatch::U32(0), fd)
        .unwrap();
    device.keep();
    assert_eq!(*vm.0.lock().unwrap(), [bell(0x1050, 0)]);
    drop(bus);
    assert_eq!(*vm.0.lock().unwrap(), []);
    assert_eq!(*left.lock().unwrap(), Some(0), "they go before it");
}

#[test]
fn an_ioeventfd_lies_inside_its_devices_range() {
    let bus = IoBus::new();
    let watch = Watch::new(&bus);
    let mut device = device(&bus, &watch, &[]);
    let mut attach = |offset, writes| {
        let fd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        device
            .attach_ioeventfd(watch.clone(), offset, writes, fd)
            .map(drop)
    };
    for (offset, writes, fits) in [
        (0xffc, WriteMatch::U32(1), true),
        (0xffd, WriteMatch::U32(1), false),
        (0xfff, WriteMatch::Any, true),
        (0x1000, WriteMatch::Any, false),
        (u64::MAX, WriteMatch::U8(1), false),
    ] {
        let attached = attach(offset, writes);
        assert_eq!(attached.is_ok(), fits, "{offset:#x} {writes:?}");
        if let Err(error) = attached {
            assert!(matches!(error, Error::OutsideRange { .. }), "{error}");
        }
    }
}
