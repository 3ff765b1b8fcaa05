// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest on the real KVM, its exits answered by a [`Dispatcher`](io_bus::Dispatcher).

#![cfg(feature = "kvm")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod vm;

use std::sync::{Arc, Mutex};

use io_bus::{Answer, At, BusKind, IoBus, IoDevice, IoRange, Outcome, fragments};
use vm::Seen;

/// Bytes that count up from 0x10 at each address, and everything that was written.
#[derive(Default)]
struct Registers(Mutex<Vec<(u64, Vec<u8>)>>);

impl IoDevice for Registers {
    fn read(&self, at: At, data: &mut [u8]) -> Answer {
        for (byte, place) in data.iter_mut().zip(at.offset..) {
            *byte = (place as u8).wrapping_add(0x10);
        }
        Answer::Accepted
    }

    fn write(&self, at: At, data: &[u8]) -> Answer {
        self.0.lock().unwrap().push((at.address(), data.to_vec()));
        Answer::Accepted
    }
}

#[test]
fn a_guest_reads_and_writes_each_width() {
    let bus = IoBus::new();
    let registers = Arc::new(Registers::default());
    let ports = IoRange::new(0x500, 8).unwrap();
    let memory = IoRange::new(0x8000, 0x100).unwrap();
    let _ports = bus
        .register(BusKind::Pio, ports, registers.clone())
        .unwrap();
    let _memory = bus
        .register(BusKind::Mmio, memory, registers.clone())
        .unwrap();
    let mut machine = vm::machine(guests::io::io_widths());
    let exits = machine.run(&mut bus.dispatcher());
    assert_eq!(exits.len(), 12);
    assert!(exits.iter().all(|(_, outcome)| outcome.is_answered()));
    let written = |base: u64| {
        [
            (base, vec![!0x10]),
            (base + 2, vec![!0x12, !0x13]),
            (base + 4, vec![!0x14, !0x15, !0x16, !0x17]),
        ]
    };
    let expected = [written(0x500), written(0x8000)].concat();
    assert_eq!(*registers.0.lock().unwrap(), expected);
}

#[test]
fn a_guest_reads_all_ones_where_nobody_answers_and_goes_on() {
    let bus = IoBus::new();
    let mut machine = vm::machine(guests::io::io_widths());
    let exits = machine.run(&mut bus.dispatcher());
    assert_eq!(exits.len(), 12);
    for (seen, outcome) in exits {
        assert_eq!(outcome, Outcome::Unclaimed);
        match seen {
            Seen::In(_, data) | Seen::Read(_, data) => assert!(data.iter().all(|b| *b == 0xff)),
            // What the guest read, inverted.
            Seen::Out(_, data) | Seen::Write(_, data) => assert!(data.iter().all(|b| *b == 0)),
        }
    }
}

#[test]
fn string_instructions_arrive_item_by_item() {
    let bus = IoBus::new();
    let bytes = Arc::new(Registers::default());
    let out = IoRange::new(0x510, 1).unwrap();
    let words = IoRange::new(0x512, 2).unwrap();
    let _out = bus.register(BusKind::Pio, out, bytes.clone()).unwrap();
    let _words = bus.register(BusKind::Pio, words, bytes.clone()).unwrap();
    let mut machine = vm::machine(guests::io::io_strings());
    let width = |port, _| if port == 0x512 { 2 } else { 1 };
    let exits = machine.run_strings(&mut bus.dispatcher(), width);
    assert!(exits.iter().all(|(_, outcome)| outcome.is_answered()));
    let written: Vec<_> = bytes
        .0
        .lock()
        .unwrap()
        .iter()
        .map(|(_, d)| d.clone())
        .collect();
    let mut expected: Vec<_> = b"abcd".iter().map(|byte| vec![*byte]).collect();
    expected.extend([0x10, 0x11, 0x10, 0x11].map(|byte| vec![byte]));
    assert_eq!(written, expected);
}

/// As above, with the width from KVM.
#[test]
fn an_exit_at_a_port_tells_the_width_of_its_items() {
    let bus = IoBus::new();
    let bytes = Arc::new(Registers::default());
    let out = IoRange::new(0x510, 1).unwrap();
    let words = IoRange::new(0x512, 2).unwrap();
    let _out = bus.register(BusKind::Pio, out, bytes.clone()).unwrap();
    let _words = bus.register(BusKind::Pio, words, bytes.clone()).unwrap();
    let mut machine = vm::machine(guests::io::io_strings());
    let exits = machine.run_ports(&mut bus.dispatcher());
    assert!(exits.iter().all(|(_, outcome)| outcome.is_answered()));
    assert!(exits.iter().any(|(width, _)| *width == 2));
    let written = bytes.0.lock().unwrap();
    let written: Vec<_> = written.iter().map(|(_, data)| data.clone()).collect();
    let mut expected: Vec<_> = b"abcd".iter().map(|byte| vec![*byte]).collect();
    expected.extend([0x10, 0x11, 0x10, 0x11].map(|byte| vec![byte]));
    assert_eq!(written, expected);
}

/// KVM is the oracle of [`fragments`]: it cuts a guest's access where we do.
#[test]
fn kvm_cuts_a_page_crossing_access_as_fragments_does() {
    let bus = IoBus::new();
    let registers = Arc::new(Registers::default());
    let memory = IoRange::new(0x8000, 0x2000).unwrap();
    let _memory = bus
        .register(BusKind::Mmio, memory, registers.clone())
        .unwrap();
    let mut machine = vm::machine(guests::io::io_page_crossing());
    let exits = machine.run(&mut bus.dispatcher());
    let ours: Vec<_> = fragments(0x8ffe, 4)
        .map(|piece| (piece.address, piece.len))
        .collect();
    let writes: Vec<_> = exits
        .iter()
        .filter_map(|(seen, _)| match seen {
            Seen::Write(address, data) => Some((*address, data.len())),
            _ => None,
        })
        .collect();
    let reads: Vec<_> = exits
        .iter()
        .filter_map(|(seen, _)| match seen {
            Seen::Read(address, data) => Some((*address, data.len())),
            _ => None,
        })
        .collect();
    assert_eq!((&writes, &reads), (&ours, &ours));
    let written = registers.0.lock().unwrap();
    assert_eq!(
        *written,
        [(0x8ffe, vec![0x11, 0x22]), (0x9000, vec![0x33, 0x44])]
    );
    // And it joins what was read: 0x8ffe's and 0x9000's bytes as the device counts them.
    let (Seen::Out(0x500, joined), Outcome::Unclaimed) = exits.last().unwrap() else {
        panic!("the guest ended otherwise: {exits:?}");
    };
    let byte = |offset: u16| (offset as u8).wrapping_add(0x10);
    assert_eq!(
        *joined,
        [byte(0xffe), byte(0xfff), byte(0x1000), byte(0x1001)]
    );
}

/// One instruction of the guest that is wider than eight bytes and crosses a page: KVM makes an exit
/// of each piece, and they are [`fragments`]' pieces; it joins what they read.
#[test]
fn kvm_cuts_a_wide_access_as_fragments_does_and_joins_it_again() {
    let bus = IoBus::new();
    let registers = Arc::new(Registers::default());
    let memory = IoRange::new(0x8000, 0x2000).unwrap();
    let _memory = bus
        .register(BusKind::Mmio, memory, registers.clone())
        .unwrap();
    let mut machine = vm::long_machine(guests::io::io_wide());
    let exits = machine.run(&mut bus.dispatcher());
    let pieces = |from: u64| fragments(from, 16).map(|f| (f.address, f.len));
    let seen = exits.iter().map(|(seen, _)| match seen {
        Seen::Read(address, data) | Seen::Write(address, data) => (*address, data.len()),
        seen => panic!("{seen:?}"),
    });
    let expected: Vec<_> = pieces(0x8fe4).chain(pieces(0x8ff4)).collect();
    assert_eq!(seen.collect::<Vec<_>>(), expected);
    // What was read in pieces is written in other pieces, as one value.
    let value: Vec<u8> = (0xfe4..0xff4)
        .map(|at: u16| (at as u8).wrapping_add(0x10))
        .collect();
    let written = registers.0.lock().unwrap();
    let joined: Vec<u8> = written.iter().flat_map(|(_, data)| data.clone()).collect();
    assert_eq!(joined, value);
    // The same access in one call to our dispatcher is cut and joined alike.
    let mut whole = [0; 16];
    let outcome = bus
        .dispatcher()
        .mmio_read(io_bus::MmioAddress(0x8fe4), &mut whole);
    assert_eq!((outcome, whole.to_vec()), (Outcome::Answered, value));
}
