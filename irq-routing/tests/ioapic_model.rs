// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The IOAPIC behaves as the simplest model of it: no level-triggered interrupt is lost, no edge
//! comes twice, whatever a guest and its devices do.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod models;

use irq_routing::ioapic::{Ioapic, IoapicState, IoapicStateError, Redirection, Written};
use irq_routing::{Arrival, Msi};
use models::ioapic::Model;
use proptest::prelude::*;
use proptest::sample::select;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

#[derive(Clone, Copy, Debug)]
enum Op {
    Line(u32, bool),
    Low(u32, u32),
    High(u32, u32),
    Mask(u32, bool),
    Eoi(u8),
    EoiRegister(u8),
    /// Whether an APIC takes messages from now on.
    Listen(bool),
    SaveAndRestore,
}

fn op() -> impl Strategy<Value = Op> {
    let pin = || select(vec![0u32, 1, 2, 23]);
    let vector = || select(vec![0x30u8, 0x31, 0x32]);
    // Mostly entries that interrupt; sometimes any bits.
    let low = prop_oneof![
        6 => (vector(), any::<bool>(), 0..4u32).prop_map(|(vector, level, mask)| {
            u32::from(vector) | u32::from(level) << 15 | u32::from(mask == 0) << 16
        }),
        1 => any::<u32>(),
    ];
    prop_oneof![
        8 => (pin(), any::<bool>()).prop_map(|(pin, high)| Op::Line(pin, high)),
        4 => (pin(), low).prop_map(|(pin, value)| Op::Low(pin, value)),
        1 => (pin(), any::<u32>()).prop_map(|(pin, value)| Op::High(pin, value)),
        3 => (pin(), any::<bool>()).prop_map(|(pin, masked)| Op::Mask(pin, masked)),
        4 => vector().prop_map(Op::Eoi),
        1 => vector().prop_map(Op::EoiRegister),
        1 => any::<bool>().prop_map(Op::Listen),
        1 => Just(Op::SaveAndRestore),
    ]
}

fn get(chip: &Ioapic, register: u8) -> u32 {
    let mut chip = chip.clone();
    let _ = chip.write(SELECT, &[register], &mut |_: u32, _: Msi| -> Arrival {
        panic!("selecting a register sends nothing")
    });
    let mut data = [0; 4];
    chip.read(WINDOW, &mut data);
    u32::from_le_bytes(data)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_chip_is_its_model(ops in prop::collection::vec(op(), 1..80)) {
        let mut chip = Ioapic::new();
        let mut model = Model::new();
        for op in ops {
            let mut sent = Vec::new();
            let listens = model.listens;
            let mut messages = |pin: u32, msi: Msi| {
                sent.push((pin, msi));
                if listens { Arrival::Delivered { to: 1 } } else { Arrival::Masked }
            };
            match op {
                Op::Line(pin, high) => {
                    let arrival = chip.set_line(pin, high, &mut messages);
                    prop_assert_eq!(arrival, model.line(pin, high));
                }
                Op::Low(pin, value) => {
                    let was = model.pins[pin as usize].masked;
                    model.low(pin, value);
                    let now = model.pins[pin as usize].masked;
                    let select = [0x10 + 2 * pin as u8];
                    prop_assert_eq!(chip.write(SELECT, &select, &mut messages), Written::Nothing);
                    let written = chip.write(WINDOW, &value.to_le_bytes(), &mut messages);
                    let masked = (was != now).then_some(now);
                    prop_assert_eq!(written, Written::Redirection { pin, masked });
                }
                Op::High(pin, value) => {
                    model.pins[pin as usize].destination = (value >> 24) as u8;
                    model.changed(pin);
                    let select = [0x11 + 2 * pin as u8];
                    let _ = chip.write(SELECT, &select, &mut messages);
                    let _ = chip.write(WINDOW, &value.to_le_bytes(), &mut messages);
                }
                Op::Mask(pin, masked) => {
                    let value = model.pins[pin as usize].bits() as u32 & !0x10000
                        | u32::from(masked) << 16;
                    model.low(pin, value);
                    let _ = chip.write(SELECT, &[0x10 + 2 * pin as u8], &mut messages);
                    let _ = chip.write(WINDOW, &value.to_le_bytes(), &mut messages);
                }
                Op::Eoi(vector) => {
                    model.eoi(vector);
                    let pins = chip.pins_of(vector);
                    chip.eoi(pins, &mut messages);
                }
                Op::EoiRegister(vector) => {
                    model.eoi(vector);
                    let written = chip.write(EOI, &[vector, 0, 0, 0], &mut messages);
                    prop_assert_eq!(written, Written::Eoi { vector });
                    let pins = chip.pins_of(vector);
                    chip.eoi(pins, &mut messages);
                }
                Op::Listen(listens) => model.listens = listens,
                Op::SaveAndRestore => {
                    let mut other = Ioapic::new();
                    other.restore(&chip.state()).unwrap();
                    prop_assert_eq!(other.state(), chip.state());
                    chip = other;
                    chip.redeliver(!0, &mut messages);
                    model.redeliver();
                }
            }
            prop_assert_eq!(&sent, &model.sent);
            model.sent.clear();
            for (at, pin) in (0..).zip(&model.pins) {
                let entry = chip.redirection(at).unwrap();
                prop_assert_eq!(entry.bits(), pin.bits(), "pin {}", at);
                let select = 0x10 + 2 * at as u8;
                prop_assert_eq!(get(&chip, select), pin.bits() as u32);
                prop_assert_eq!(get(&chip, select + 1), (pin.bits() >> 32) as u32);
                // The promises, told without the model's steps.
                prop_assert!(!entry.remote_irr() || entry.is_level());
                let high = chip.lines() & 1 << at != 0;
                if entry.is_level() && !entry.is_masked() && high && !pin.refused {
                    prop_assert!(entry.remote_irr(), "pin {} is lost", at);
                }
                prop_assert_eq!(pin.rises, pin.sent + pin.dropped);
            }
        }
    }

    #[test]
    fn the_registers_are_what_kvm_has(
        register in any::<u8>(),
        value in any::<u32>(),
        width in select(vec![1usize, 2, 4, 8]),
    ) {
        let mut chip = Ioapic::new();
        let mut messages = |_: u32, _: Msi| Arrival::Masked;
        let _ = chip.write(SELECT, &[register], &mut messages);
        let mut data = [0xff; 8];
        data[..4].copy_from_slice(&value.to_le_bytes());
        let _ = chip.write(WINDOW, &data[..width], &mut messages);
        let seen = if width < 4 { value & ((1 << (8 * width)) - 1) } else { value };
        let expected = match register {
            // Id, and arbitration which follows it.
            0 => seen & 0x0f00_0000,
            1 => 0x0017_0020,
            2 => 0,
            0x10..=0x3f if register % 2 == 0 => seen & 0x0001_afff,
            0x10..=0x3f => seen & 0xff00_0000,
            _ => !0,
        };
        let mut read = [0xaa; 8];
        chip.read(WINDOW, &mut read);
        prop_assert_eq!(u64::from_le_bytes(read), u64::from(expected));
        chip.read(WINDOW + 0x300, &mut read[..width]);
        prop_assert_eq!(&read[..width], &u64::from(expected).to_le_bytes()[..width]);
        chip.read(SELECT, &mut read);
        prop_assert_eq!(u64::from_le_bytes(read), u64::from(register));
    }

    #[test]
    fn what_lies_between_the_registers_reads_zero_and_ignores_writes(
        offset in (0u64..0x1000).prop_filter("a register", |offset| {
            ![SELECT, WINDOW, EOI].contains(&(offset & 0xff))
        }),
        data in prop::collection::vec(any::<u8>(), 0..9),
    ) {
        let mut chip = Ioapic::new();
        let before = chip.clone();
        let mut messages = |_: u32, _: Msi| -> Arrival { panic!("a message of nothing") };
        prop_assert_eq!(chip.write(offset, &data, &mut messages), Written::Nothing);
        prop_assert_eq!(&chip, &before);
        let mut read = vec![0xaa; data.len()];
        chip.read(offset, &mut read);
        prop_assert_eq!(read, vec![0; data.len()]);
    }

    #[test]
    fn a_state_is_taken_whole_or_not_at_all(
        ioregsel in any::<u8>(),
        id in 0..32u8,
        lines in select(vec![0u32, 1, 0xff_ffff, 0x100_0000, !0]),
        entry in any::<u64>(),
        extended in any::<bool>(),
    ) {
        let mut state = Ioapic::new().state();
        state = IoapicState { ioregsel, id, lines, ..state };
        state.redirections[7] = entry;
        let fresh = if extended { Ioapic::with_extended_destinations() } else { Ioapic::new() };
        let mut chip = fresh.clone();
        let above_255 = entry & 0x00fe_0000_0000_0000 != 0;
        match chip.restore(&state) {
            Ok(()) => {
                prop_assert!(id < 16 && lines < 1 << 24 && (extended || !above_255));
                state.redirections[7] = Redirection::from_bits(entry, extended).bits();
                prop_assert_eq!(chip.state(), state);
            }
            Err(error) => {
                let told = match error {
                    IoapicStateError::Id(_) => id >= 16,
                    IoapicStateError::Lines(_) => lines >= 1 << 24,
                    IoapicStateError::Destination { pin: 7, .. } => above_255 && !extended,
                    _ => false,
                };
                prop_assert!(told, "{}", error);
                prop_assert_eq!(chip, fresh);
            }
        }
    }
}

#[test]
fn a_rise_on_a_high_edge_line_is_counted_as_coalesced() {
    let mut chip = Ioapic::new();
    let mut sent = 0;
    let mut messages = |_: u32, _: Msi| {
        sent += 1;
        Arrival::Delivered { to: 1 }
    };
    let _ = chip.write(SELECT, &[0x10 + 2 * 4], &mut messages);
    let _ = chip.write(WINDOW, &0x41u32.to_le_bytes(), &mut messages);
    assert_eq!(
        chip.set_line(4, true, &mut messages),
        Arrival::Delivered { to: 1 }
    );
    for _ in 0..3 {
        assert_eq!(chip.set_line(4, true, &mut messages), Arrival::Coalesced);
    }
    chip.set_line(4, false, &mut messages);
    chip.set_line(4, true, &mut messages);
    assert_eq!(chip.coalesced(4), 3);
    assert_eq!(chip.coalesced(99), 0);
    assert_eq!(sent, 2);
}

#[test]
fn an_extended_destination_goes_where_kvm_looks_for_it() {
    // Linux' `IO_APIC_route_entry`: bits 0 to 7 of the id from bit 56, 8 to 14 from bit 49.
    let id = 0x5a34_u64;
    let bits = (id & 0xff) << 56 | (id >> 8) << 49 | 0x31;
    let entry = Redirection::from_bits(bits, true);
    assert_eq!(entry.destination(), 0x5a34);
    // KVM: bits 8 to 31 of the address's upper half are the id's.
    assert_eq!(entry.msi().address, 0x0000_5a00_fee3_4000);
    let plain = Redirection::from_bits(bits, false);
    assert_eq!(plain.destination(), 0x34);
    assert_eq!(plain.msi().address, 0xfee3_4000);
}

#[test]
fn reset_masks_every_pin_and_leaves_the_lines() {
    let mut chip = Ioapic::new();
    let mut messages = |_: u32, _: Msi| Arrival::Delivered { to: 1 };
    let _ = chip.write(SELECT, &[0x10], &mut messages);
    let _ = chip.write(WINDOW, &0x8031u32.to_le_bytes(), &mut messages);
    chip.set_line(0, true, &mut messages);
    assert_eq!(chip.outstanding(), 1);
    chip.reset();
    assert_eq!(chip.outstanding(), 0);
    assert_eq!(chip.lines(), 1);
    assert_eq!(chip.redirection(0), Some(Redirection::RESET));
    // A pin that is not there has no entry and takes nothing.
    assert_eq!(chip.redirection(24), None);
    assert_eq!(chip.set_line(24, true, &mut messages), Arrival::Masked);
}

#[cfg(feature = "with-serde")]
#[test]
fn a_state_survives_serde() {
    let mut state = Ioapic::new().state();
    state.redirections[3] = 0x0200_0000_0000_8031;
    state.lines = 8;
    let text = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<IoapicState>(&text).unwrap(), state);
}
