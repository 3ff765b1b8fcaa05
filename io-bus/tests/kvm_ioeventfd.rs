// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! ioeventfds on the real KVM: which of a guest's writes signal, and which come to user space.

#![cfg(feature = "kvm")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use io_bus::{
    Error, IoBus, IoEvent, IoEventAddress, IoEventFd, MmioAddress, PioAddress, WriteLength,
    WriteMatch,
};
use vm::Seen;
use vmm_sys_util::eventfd::EventFd;

const PORT: IoEventAddress = IoEventAddress::Pio(PioAddress(0x600));
const MEMORY: IoEventAddress = IoEventAddress::Mmio(MmioAddress(0x8000));

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

/// Runs the doorbell guest with these ioeventfds; gives how often each was signalled, and the
/// writes that came to user space.
fn ring(events: &[IoEvent]) -> (Vec<u64>, Vec<Seen>) {
    let mut machine = vm::machine(guests::io::io_doorbells());
    let bells: Vec<_> = events
        .iter()
        .map(|event| IoEventFd::attach(machine.vm.clone(), *event, eventfd()).unwrap())
        .collect();
    let exits = machine.run(&mut IoBus::new().dispatcher());
    let counts = bells.iter().map(|bell| bell.fd().read().unwrap_or(0));
    (
        counts.collect(),
        exits.into_iter().map(|(seen, _)| seen).collect(),
    )
}

/// The guest's eighteen writes, in order: which are to `address` and match `writes`?
///
/// `None`: any.
fn matching(
    address: IoEventAddress,
    wanted_len: Option<usize>,
    wanted: Option<u8>,
) -> (u64, Vec<Seen>) {
    let mut count = 0;
    let mut rest = Vec::new();
    for to in [PORT, MEMORY] {
        for len in [1_usize, 2, 4] {
            for value in [1_u8, 2, 1] {
                let length = wanted_len.is_none_or(|wanted| wanted == len);
                let data = wanted.is_none_or(|wanted| wanted == value);
                if to == address && length && data {
                    count += 1;
                    continue;
                }
                let mut bytes = vec![0; len];
                bytes[0] = value;
                rest.push(match to {
                    IoEventAddress::Pio(port) => Seen::Out(port.0, bytes),
                    _ => Seen::Write(to.value(), bytes),
                });
            }
        }
    }
    (count, rest)
}

#[test]
fn each_length_and_value_signals_for_its_writes_and_no_others() {
    let all = [
        (WriteMatch::Any, None, None),
        (WriteMatch::Length(WriteLength::One), Some(1), None),
        (WriteMatch::Length(WriteLength::Two), Some(2), None),
        (WriteMatch::Length(WriteLength::Four), Some(4), None),
        (WriteMatch::Length(WriteLength::Eight), Some(8), None),
        (WriteMatch::U8(1), Some(1), Some(1)),
        (WriteMatch::U16(2), Some(2), Some(2)),
        (WriteMatch::U32(1), Some(4), Some(1)),
        (WriteMatch::U32(3), Some(4), Some(3)),
        (WriteMatch::U64(1), Some(8), Some(1)),
    ];
    for address in [PORT, MEMORY] {
        for (writes, len, value) in all {
            let (count, rest) = matching(address, len, value);
            let got = ring(&[IoEvent { address, writes }]);
            assert_eq!(got, (vec![count], rest), "{address} {writes:?}");
        }
    }
}

#[test]
fn values_at_one_address_signal_apart() {
    let writes = [WriteMatch::U32(1), WriteMatch::U32(2), WriteMatch::U16(1)];
    let events = writes.map(|writes| IoEvent {
        address: MEMORY,
        writes,
    });
    let (counts, rest) = ring(&events);
    assert_eq!(counts, [2, 1, 2]);
    assert_eq!(rest.len(), 18 - 5);
}

#[test]
fn what_is_detached_signals_no_more_and_what_moved_signals_there() {
    let bus = IoBus::new();
    let event = |address| IoEvent {
        address,
        writes: WriteMatch::Any,
    };
    let mut machine = vm::machine(guests::io::io_doorbells());
    let mut bell = IoEventFd::attach(machine.vm.clone(), event(PORT), eventfd()).unwrap();
    bell.detach().unwrap();
    assert_eq!(machine.run(&mut bus.dispatcher()).len(), 18);
    assert!(bell.fd().read().is_err());

    let mut machine = vm::machine(guests::io::io_doorbells());
    let mut bell = IoEventFd::attach(machine.vm.clone(), event(PORT), eventfd()).unwrap();
    bell.relocate(MEMORY).unwrap();
    let exits = machine.run(&mut bus.dispatcher());
    assert_eq!(exits.len(), 9);
    assert!(
        exits
            .iter()
            .all(|(seen, _)| matches!(seen, Seen::Out(0x600, _)))
    );
    assert_eq!(bell.fd().read().unwrap(), 9);
}

#[test]
fn kvm_names_a_collision_and_frees_the_address_with_the_handle() {
    let machine = vm::machine(&[]);
    let at = |writes| IoEvent {
        address: PORT,
        writes,
    };
    let one = IoEventFd::attach(&machine.vm, at(WriteMatch::U8(1)), eventfd()).unwrap();
    let _two = IoEventFd::attach(&machine.vm, at(WriteMatch::U8(2)), eventfd()).unwrap();
    for writes in [
        WriteMatch::U8(1),
        WriteMatch::Any,
        WriteMatch::Length(WriteLength::One),
    ] {
        let error = IoEventFd::attach(&machine.vm, at(writes), eventfd()).unwrap_err();
        let Error::AssignIoEventFd { event, source } = error else {
            panic!("{error}");
        };
        assert_eq!((event, source.errno()), (at(writes), libc::EEXIST));
    }
    drop(one);
    let _again = IoEventFd::attach(&machine.vm, at(WriteMatch::U8(1)), eventfd()).unwrap();
}

/// Eight bytes take 64-bit mode; the four-byte write at the same address is none of them.
#[test]
fn eight_byte_writes_signal_by_length_and_by_value() {
    let cases = [
        (WriteMatch::Any, 4),
        (WriteMatch::Length(WriteLength::Eight), 3),
        (WriteMatch::Length(WriteLength::Four), 1),
        (WriteMatch::U64(1), 2),
        (WriteMatch::U64(2), 1),
        (WriteMatch::U64(3), 0),
        (WriteMatch::U32(1), 1),
    ];
    for (writes, count) in cases {
        let mut machine = vm::long_machine(guests::io::io_quads());
        let event = IoEvent {
            address: MEMORY,
            writes,
        };
        let bell = IoEventFd::attach(machine.vm.clone(), event, eventfd()).unwrap();
        let exits = machine.run(&mut IoBus::new().dispatcher());
        assert_eq!(bell.fd().read().unwrap_or(0), count, "{event}");
        assert_eq!(exits.len() as u64, 4 - count, "{event}");
    }
}

/// KVM is the oracle of [`IoEvent::collides`].
#[test]
fn kvm_refuses_the_pairs_that_collide_and_no_others() {
    let machine = vm::machine(&[]);
    let writes = [
        WriteMatch::Any,
        WriteMatch::Length(WriteLength::One),
        WriteMatch::Length(WriteLength::Eight),
        WriteMatch::U8(1),
        WriteMatch::U8(2),
        WriteMatch::U32(1),
        WriteMatch::U64(1),
    ];
    let elsewhere = IoEventAddress::Mmio(MmioAddress(0x8004));
    let all = writes
        .into_iter()
        .flat_map(|writes| [PORT, MEMORY, elsewhere].map(|address| IoEvent { address, writes }));
    let all: Vec<_> = all.collect();
    for first in &all {
        let _first = IoEventFd::attach(&machine.vm, *first, eventfd()).unwrap();
        for second in &all {
            let refused = IoEventFd::attach(&machine.vm, *second, eventfd()).is_err();
            assert_eq!(refused, first.collides(second), "{first} and {second}");
        }
    }
}

/// A registration's doorbells go with it: where it is, they signal; where it was, they do not.
#[test]
fn a_devices_ioeventfds_move_with_it() {
    use io_bus::{BusKind, IoRange};
    struct Nothing;
    impl io_bus::IoDevice for Nothing {
        fn read(&self, _: io_bus::At, _: &mut [u8]) -> io_bus::Answer {
            io_bus::Answer::Accepted
        }
        fn write(&self, _: io_bus::At, _: &[u8]) -> io_bus::Answer {
            io_bus::Answer::Accepted
        }
    }

    let mut machine = vm::machine(guests::io::io_doorbells());
    let bus = IoBus::new();
    let range = IoRange::new(0x7000, 0x100).unwrap();
    let mut device = bus.register(BusKind::Mmio, range, Nothing).unwrap();
    let fd = std::sync::Arc::new(eventfd());
    let id = device
        .attach_ioeventfd(machine.vm.clone(), 0, WriteMatch::U32(1), fd.clone())
        .unwrap();
    let mut io = bus.dispatcher();
    let rounds = [(0x7000, 0), (0x8000, 2), (0x9000, 0), (0x8000, 2)];
    for (base, count) in rounds {
        assert!(device.relocate(base).unwrap().is_done());
        let exits = machine.run(&mut io);
        assert_eq!(fd.read().unwrap_or(0), count, "at {base:#x}");
        assert_eq!(exits.len() as u64, 18 - count);
        machine.restart();
    }
    device.detach_ioeventfd(id).unwrap();
    assert_eq!(machine.run(&mut io).len(), 18);
    // Whoever unregisters frees the address.
    device
        .attach_ioeventfd(machine.vm.clone(), 0, WriteMatch::Any, fd.clone())
        .unwrap();
    assert!(device.unregister().is_done());
    let event = IoEvent {
        address: MEMORY,
        writes: WriteMatch::Any,
    };
    let _again = IoEventFd::attach(&machine.vm, event, fd).unwrap();
}
