// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes as steps on the safe interface of one VM, beside the models in `tests/models/`: the table's
//! owner with its handles, transactions and irqfds, and the IOAPIC in user space with its lines,
//! accesses and EOIs, while ioctls fail. `tests/fuzzed.rs` and `fuzz/fuzz_targets/interrupts.rs` run
//! it.
//!
//! After each step: KVM's table is the committed one; a call that failed has changed nothing; a step
//! is at most one commit; the chip's registers and messages are the model's; and what has just been
//! attached, sent or committed goes where its owner said.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use irq_routing::fake::{Call, FakeHost, FakeVm};
use irq_routing::ioapic::{PinLine, SplitIoapic};
use irq_routing::{
    Arrival, Change, Chip, ChipPin, DetachedIrqfd, Entry, Error, Gsi, GsiHandle, HvSint, Irqchip,
    IrqchipKind, Irqfd, Msi, Pit, Route, Routing, S390Adapter, Table,
};

use crate::models::ioapic::{Model as Chip82093, Pin};
use crate::models::table::Model as List;

const ENOMEM: i32 = 12;
/// The host's: few enough that tables are full and numbers run out.
const LIMIT: u32 = 56;
/// GSIs that the steps name.
const NAMED: u32 = LIMIT + 2;
/// Pins that have two sources each.
const PINS: [u32; 3] = [0, 5, 23];

/// Runs the steps that some bytes stand for, whatever they are; panics where a model differs.
pub fn run(input: &[u8]) {
    let mut bytes = Bytes(input.iter());
    let kind = if bytes.next() & 1 == 0 {
        IrqchipKind::Kernel { pit: Pit::Absent }
    } else {
        IrqchipKind::Split { pins: 24 }
    };
    let (host, irqchip) = FakeHost::with_irqchip(kind);
    host.set_limit(LIMIT);
    let mut world = World::new(&host, &irqchip);
    while !bytes.0.as_slice().is_empty() {
        world.step(&mut bytes);
    }
    world.end();
}

struct Bytes<'a>(std::slice::Iter<'a, u8>);

impl Bytes<'_> {
    /// The next byte; 0 after the last.
    fn next(&mut self) -> u8 {
        self.0.next().copied().unwrap_or(0)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.next()) % end.max(1)
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.next(), self.next(), self.next(), self.next()])
    }

    fn route(&mut self) -> Route {
        let byte = self.next();
        match byte % 8 {
            0..=2 => Route::Pin(self.pin()),
            3..=5 => Route::Msi(Msi {
                address: 0xfee0_0000,
                data: u32::from(byte >> 3),
                devid: None,
            }),
            6 => Route::HvSint(HvSint::default()),
            _ => Route::S390Adapter(S390Adapter::default()),
        }
    }

    fn pin(&mut self) -> ChipPin {
        let (chip, pin) = (self.below(4) as u32, self.below(26) as u32);
        let chip = Chip(chip);
        ChipPin { chip, pin }
    }
}

type Host<'a> = &'a FakeHost;

/// What can be raised, and by whom; and what it should be.
struct World<'a> {
    host: Host<'a>,
    routing: Routing<Host<'a>>,
    /// Where a GSI goes that is no one's: with the chip here, what its entries say.
    default: List,
    /// What the owners of the GSIs want.
    wanted: List,
    handles: Vec<GsiHandle>,
    irqfds: Vec<Irqfd<Host<'a>>>,
    detached: Vec<DetachedIrqfd<Host<'a>>>,
    chip: Option<Split<'a>>,
}

/// The IOAPIC, if it is in user space.
struct Split<'a> {
    ioapic: SplitIoapic<Host<'a>>,
    /// Of each of [`PINS`], two sources, and whether they are high.
    lines: Vec<(u32, PinLine<Host<'a>>, bool)>,
    pins: Vec<GsiHandle>,
    model: Chip82093,
    select: u8,
    id: u8,
    coalesced: BTreeMap<u32, u64>,
}

impl<'a> World<'a> {
    fn new(host: Host<'a>, irqchip: &Irqchip) -> Self {
        let routing = Routing::new(host, irqchip);
        let mut default = List::new(LIMIT);
        default.pins = matches!(irqchip.kind(), IrqchipKind::Kernel { .. });
        if default.pins {
            default.entries = Table::x86_default().entries().collect();
        }
        let chip = SplitIoapic::new(&routing).ok().map(|ioapic| {
            let pins: Vec<_> = PINS.map(|pin| routing.reserve(Gsi(pin)).unwrap()).into();
            let line = |gsi: &GsiHandle| (gsi.gsi().0, ioapic.line(gsi).unwrap(), false);
            let lines = pins.iter().chain(&pins).map(line).collect();
            Split {
                ioapic,
                lines,
                pins,
                model: Chip82093::new(),
                select: 0,
                id: 0,
                coalesced: BTreeMap::new(),
            }
        });
        Self {
            host,
            routing,
            wanted: default.clone(),
            default,
            handles: Vec::new(),
            irqfds: Vec::new(),
            detached: Vec::new(),
            chip,
        }
    }

    fn step(&mut self, bytes: &mut Bytes<'_>) {
        self.host.take_calls();
        let before = self.host.vm();
        let choice = bytes.next();
        match choice & 0x3f {
            0..=3 => self.handles.extend(self.routing.allocate()),
            4..=5 => self.reserve(Gsi(bytes.next().into())),
            6..=9 if !self.handles.is_empty() => {
                let at = bytes.below(self.handles.len());
                let gone = self.handles.remove(at).gsi();
                self.released(gone);
            }
            10..=19 => self.change(bytes, &before),
            20..=23 => self.attach(bytes, &before),
            24..=25 if !self.irqfds.is_empty() => {
                let at = bytes.below(self.irqfds.len());
                let irqfd = self.irqfds.remove(at);
                let gone = irqfd.gsi().gsi();
                drop(irqfd);
                self.released(gone);
            }
            26..=27 => self.detach_or_attach(bytes, &before),
            28 => {
                self.routing.flush().unwrap();
                self.is_settled();
            }
            29..=31 if !self.handles.is_empty() => self.signal(bytes),
            32..=63 => self.chip_step(choice, bytes, &before),
            _ => {}
        }
        self.compare();
    }

    fn reserve(&mut self, gsi: Gsi) {
        let taken = self.is_owned(gsi);
        match self.routing.reserve(gsi) {
            Ok(handle) => {
                assert!(!taken && gsi.0 < LIMIT, "{gsi}");
                self.handles.push(handle);
            }
            Err(_) => assert!(taken || gsi.0 >= LIMIT, "{gsi}"),
        }
    }

    fn is_owned(&self, gsi: Gsi) -> bool {
        let pins = self.chip.iter().flat_map(|chip| &chip.pins);
        let handles = self.handles.iter().chain(pins);
        let attached = self.irqfds.iter().map(|irqfd| irqfd.gsi());
        let detached = self.detached.iter().map(|irqfd| irqfd.gsi());
        handles
            .chain(attached)
            .chain(detached)
            .any(|of| of.gsi() == gsi)
    }

    /// If it was the last, the GSI goes back to its default.
    fn released(&mut self, gsi: Gsi) {
        if !self.is_owned(gsi) {
            self.reset(gsi);
        }
    }

    /// Whether the table had room for the default route; else there is none.
    fn reset(&mut self, gsi: Gsi) -> bool {
        let routes = routes(&self.default, gsi);
        let fits = self.wanted.replace(gsi, &routes);
        if !fits {
            self.wanted.clear(gsi);
        }
        fits
    }

    /// A transaction of a few steps, committed, deferred or forgotten.
    fn change(&mut self, bytes: &mut Bytes<'_>, before: &FakeVm) {
        if self.handles.is_empty() {
            return;
        }
        let (end, fails) = (bytes.below(4), bytes.next() & 7 == 0);
        let mut wanted = self.wanted.clone();
        let mut possible = true;
        let mut change: Change<'_, _> = self.routing.change();
        for _ in 0..=bytes.below(4) {
            let handle = &self.handles[bytes.below(self.handles.len())];
            let gsi = handle.gsi();
            possible &= match bytes.below(5) {
                0 | 1 => {
                    let route = bytes.route();
                    change.route(handle, route);
                    possible && wanted.replace(gsi, &[route])
                }
                2 => {
                    let pin = bytes.pin();
                    change.add_pin(handle, pin);
                    let route = Route::Pin(pin);
                    possible && wanted.insert(Entry { gsi, route })
                }
                3 => {
                    change.unroute(handle);
                    wanted.clear(gsi);
                    true
                }
                _ => {
                    change.reset(handle);
                    possible && wanted.replace(gsi, &routes(&self.default, gsi))
                }
            };
        }
        if fails {
            self.host.fail_after(0, ENOMEM);
        }
        let done = match end {
            0 => return self.host.fail_after(usize::MAX, 0),
            1 => change.defer().map(|()| false),
            _ => change.commit().map(|_| true),
        };
        self.host.fail_after(usize::MAX, 0);
        match done {
            Ok(committed) => {
                assert!(possible, "KVM refuses this");
                self.wanted = wanted;
                if committed {
                    self.is_settled();
                }
            }
            Err(Error::Route(error)) => assert!(!possible, "{error}"),
            Err(error) => assert!(fails && possible, "{error}"),
        }
        if !possible {
            assert_eq!(self.host.vm(), *before);
            assert_eq!(self.host.take_calls(), []);
        }
    }

    fn attach(&mut self, bytes: &mut Bytes<'_>, before: &FakeVm) {
        let pins = self.chip.iter().flat_map(|chip| &chip.pins);
        let handles: Vec<_> = self.handles.iter().chain(pins).collect();
        if handles.is_empty() {
            return;
        }
        let gsi = handles[bytes.below(handles.len())];
        let skip = usize::from(bytes.next() & 7);
        self.host.fail_after(skip, ENOMEM);
        let attached = self.routing.irqfd(gsi);
        self.host.fail_after(usize::MAX, 0);
        let gsi = gsi.gsi();
        match attached {
            Ok(irqfd) => {
                self.irqfds.push(irqfd);
                self.goes_as_wanted(gsi);
            }
            Err(_) => {
                let after = self.host.vm();
                assert_eq!(after.irqfds, before.irqfds);
                assert!(skip > 0 || after == *before);
            }
        }
    }

    fn detach_or_attach(&mut self, bytes: &mut Bytes<'_>, before: &FakeVm) {
        let fails = bytes.next() & 7 == 0;
        if bytes.next() & 1 == 0 && !self.irqfds.is_empty() {
            let irqfd = self.irqfds.remove(bytes.below(self.irqfds.len()));
            self.host
                .fail_after(if fails { 0 } else { usize::MAX }, ENOMEM);
            match irqfd.detach() {
                Ok(now) => self.detached.push(now),
                Err((still, _)) => self.irqfds.push(still),
            }
        } else if !self.detached.is_empty() {
            let irqfd = self.detached.remove(bytes.below(self.detached.len()));
            let gsi = irqfd.gsi().gsi();
            self.host
                .fail_after(if fails { 0 } else { usize::MAX }, ENOMEM);
            match irqfd.attach() {
                Ok(now) => {
                    self.irqfds.push(now);
                    self.goes_as_wanted(gsi);
                }
                Err((still, _)) => self.detached.push(still),
            }
        } else {
            return;
        }
        self.host.fail_after(usize::MAX, 0);
        if fails {
            assert_eq!(self.host.vm(), *before);
        }
    }

    /// Without waiting: along KVM's route if it is the wanted one.
    fn signal(&mut self, bytes: &mut Bytes<'_>) {
        let handle = &self.handles[bytes.below(self.handles.len())];
        let gsi = handle.gsi();
        let wanted = routes(&self.wanted, gsi);
        let settled = self.host.vm().table.map_gsi(gsi).eq(wanted.clone());
        let answer = self.routing.try_signal(handle);
        let calls = self.host.take_calls();
        match answer {
            Err(Error::WouldBlock) => assert!(!settled && calls.is_empty()),
            Err(Error::NoMessage(_)) => {
                assert!(settled && calls.is_empty());
                assert!(!matches!(wanted[..], [] | [Route::Msi(_)]));
            }
            Ok(Arrival::Masked) if wanted.is_empty() => assert!(settled && calls.is_empty()),
            Ok(_) => match (&wanted[..], &calls[..]) {
                ([Route::Msi(wanted)], [Call::SignalMsi(sent)]) => assert_eq!(wanted, sent),
                other => panic!("{other:?}"),
            },
            Err(error) => panic!("{error}"),
        }
    }

    /// KVM has what is wanted, wherever someone could raise it.
    fn is_settled(&self) {
        for gsi in (0..NAMED).map(Gsi) {
            if self.is_owned(gsi) {
                self.goes_as_wanted(gsi);
            }
        }
    }

    fn goes_as_wanted(&self, gsi: Gsi) {
        let kvms: Vec<_> = self.host.vm().table.map_gsi(gsi).collect();
        assert_eq!(kvms, routes(&self.wanted, gsi), "{gsi}");
    }

    fn compare(&mut self) {
        let vm = self.host.vm();
        assert_eq!(vm.table, *self.routing.table());
        assert!(vm.table.len() <= LIMIT as usize);
        let commits = self.host.take_calls();
        let commits = commits
            .iter()
            .filter(|call| matches!(call, Call::SetGsiRouting(_)));
        assert!(commits.count() <= 1);
        assert_eq!(vm.irqfds.len(), self.irqfds.len());
    }

    fn end(mut self) {
        self.routing.flush().unwrap();
        self.is_settled();
        self.compare();
        let host = self.host;
        drop(self);
        assert!(host.vm().irqfds.is_empty());
    }

    /// A step of the chip in user space.
    fn chip_step(&mut self, choice: u8, bytes: &mut Bytes<'_>, before: &FakeVm) {
        let Some(chip) = &mut self.chip else { return };
        // Pins whose entries the step touches.
        let (mut touched, mut restored) = (0u32, false);
        match choice & 0x1f {
            0..=9 => {
                if !chip.set_line(bytes, self.host, before) {
                    return;
                }
            }
            10..=21 => {
                let pin = match bytes.below(4) {
                    3 => bytes.below(24) as u32,
                    at => PINS[at],
                };
                let low = match bytes.next() {
                    0..=31 => bytes.word(),
                    byte => 0x30 + u32::from(byte & 3) + (u32::from(byte & 0xc) << 13),
                };
                touched |= chip.write(0x00, &[0x10 + 2 * pin as u8]);
                touched |= chip.write(0x10, &low.to_le_bytes());
            }
            22..=24 => {
                let offset = u64::from(bytes.next());
                let width = [1, 2, 4, 8, 3][bytes.below(5)];
                let mut data = [0; 8];
                data.fill_with(|| bytes.next());
                touched |= chip.write(offset, &data[..width]);
                chip.read(offset, width);
            }
            25..=27 => {
                let vector = 0x30 + bytes.next() % 4;
                touched |= chip.model.levels_of(vector);
                chip.model.eoi(vector);
                chip.ioapic.eoi(vector);
            }
            28 => {
                chip.model.listens = bytes.next() & 1 == 0;
                self.host.set_status(i32::from(chip.model.listens));
            }
            29 => {
                let state = chip.ioapic.state();
                chip.ioapic.restore(&state).unwrap();
                assert_eq!(chip.ioapic.state(), state);
                chip.ioapic.redeliver().unwrap();
                chip.model.redeliver();
                (touched, restored) = (!0, true);
            }
            30 => {
                chip.ioapic.reset();
                chip.reset();
                touched = !0;
            }
            _ => {
                let vector = 0x30 + bytes.next() % 4;
                touched |= chip.write(0x40, &[vector]);
            }
        }
        let calls = self.host.take_calls();
        let Some(chip) = &mut self.chip else { return };
        chip.compare(&calls, &self.host.vm());
        let pins = chip.model.pins;
        for pin in (0..24).filter(|pin| touched & 1 << pin != 0) {
            let of = pins[pin as usize];
            let Pin {
                masked, remote_irr, ..
            } = of;
            let route = Route::Msi(of.message());
            match (masked, remote_irr) {
                (false, _) => assert!(self.wanted.replace(Gsi(pin), &[route])),
                // KVM still has an EOI to report: of the vector that was sent, or, as a state does not
                // tell that, of the entry's.
                (true, true) if restored => assert!(self.wanted.replace(Gsi(pin), &[route])),
                (true, true) => continue,
                (true, false) => self.wanted.clear(Gsi(pin)),
            }
            // Whoever changes a pin's route and gives it back gives it back to the chip.
            let routes = routes(&self.wanted, Gsi(pin));
            assert!(self.default.replace(Gsi(pin), &routes));
            // What an irqfd raises is the pin's route at once.
            if self
                .irqfds
                .iter()
                .any(|irqfd| irqfd.gsi().gsi() == Gsi(pin))
            {
                self.goes_as_wanted(Gsi(pin));
            }
        }
    }
}

impl Split<'_> {
    /// Sets a source's level, with or without waiting, or pulses it; false where that failed.
    fn set_line(&mut self, bytes: &mut Bytes<'_>, host: Host<'_>, before: &FakeVm) -> bool {
        let at = bytes.below(self.lines.len());
        let (pin, line, was) = &self.lines[at];
        let (pin, was) = (*pin, *was);
        let choice = bytes.next();
        let (waits, pulse, level) = (choice & 1 == 0, choice & 6 == 0, choice & 8 == 0);
        let state = self.ioapic.state();
        let fails = choice & 0x70 == 0;
        host.fail_after(if fails { 0 } else { usize::MAX }, ENOMEM);
        let answer = match (pulse, waits) {
            (true, true) => line.pulse(),
            (true, false) => line.try_pulse(),
            (false, true) => line.set(level),
            (false, false) => line.try_set(level),
        };
        host.fail_after(usize::MAX, 0);
        let calls = host.take_calls();
        let arrival = match answer {
            Ok(arrival) => arrival,
            Err(error) => {
                if let Error::WouldBlock = error {
                    assert!(!waits && calls.is_empty());
                    assert!(self.model.pins[pin as usize].levels());
                } else {
                    assert!(fails, "{error}");
                }
                assert_eq!(self.ioapic.state(), state);
                assert_eq!(host.vm(), *before);
                return false;
            }
        };
        self.lines[at].2 = level && !pulse;
        let others = self.lines.iter().enumerate();
        let others = others.filter(|&(n, (of, _, high))| n != at && *of == pin && *high);
        let held = others.count() > 0;
        let fall = |model: &mut Chip82093| {
            if held {
                Arrival::Delivered { to: 1 }
            } else {
                model.line(pin, false)
            }
        };
        let rises = pulse || level;
        let expected = if rises {
            let edge = !self.model.pins[pin as usize].levels();
            let merged = edge && self.model.pins[pin as usize].line;
            *self.coalesced.entry(pin).or_default() += u64::from(merged);
            let arrival = self.model.line(pin, true);
            if pulse {
                fall(&mut self.model);
            }
            arrival
        } else {
            fall(&mut self.model)
        };
        assert_eq!(arrival, expected, "pin {pin}, {was} before");
        self.compare(&calls, &host.vm());
        true
    }

    /// The guest writes; the pins whose routes follow.
    fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.ioapic.write(offset, data);
        let value = match *data {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] | [a, b, c, d, ..] if data.len() != 3 => u32::from_le_bytes([a, b, c, d]),
            _ => return 0,
        };
        match (offset, self.select) {
            (0x00, _) => self.select = value as u8,
            (0x10, 0) => self.id = (value >> 24 & 0xf) as u8,
            (0x10, register @ 0x10..=0x3f) => {
                let pin = u32::from(register - 0x10) / 2;
                if register % 2 == 0 {
                    self.model.low(pin, value);
                } else {
                    self.model.pins[pin as usize].destination = (value >> 24) as u8;
                    self.model.changed(pin);
                }
                return 1 << pin;
            }
            (0x40, _) => {
                let pins = self.model.levels_of(value as u8);
                self.model.eoi(value as u8);
                return pins;
            }
            _ => {}
        }
        0
    }

    fn read(&self, offset: u64, width: usize) {
        let register = match (offset, self.select) {
            (0x00, select) => select.into(),
            (0x10, 0 | 2) => u32::from(self.id) << 24,
            (0x10, 1) => 0x0017_0020,
            (0x10, register @ 0x10..=0x3f) => {
                let bits = self.model.pins[usize::from(register - 0x10) / 2].bits();
                (bits >> (32 * (register % 2))) as u32
            }
            (0x10, _) => !0,
            _ => 0,
        };
        let mut data = [0xaa; 8];
        self.ioapic.read(offset, &mut data[..width]);
        assert_eq!(data[..width], u64::from(register).to_le_bytes()[..width]);
    }

    fn reset(&mut self) {
        let levels = self.model.pins.map(|pin| pin.line);
        let fresh = Chip82093::new();
        self.model.pins = fresh.pins;
        for (pin, line) in self.model.pins.iter_mut().zip(levels) {
            pin.line = line;
        }
        (self.select, self.id) = (0, 0);
    }

    /// The registers and the messages of the step, and that KVM reports the EOIs of those.
    fn compare(&mut self, calls: &[Call], vm: &FakeVm) {
        assert!(self.ioapic.take_error().is_none());
        let messages = calls.iter().filter_map(|call| match call {
            Call::SignalMsi(msi) => Some(*msi),
            _ => None,
        });
        let sent = std::mem::take(&mut self.model.sent);
        assert!(messages.eq(sent.iter().map(|&(_, msi)| msi)));
        for (pin, msi) in sent {
            if msi.data & 0x8000 != 0 {
                assert!(vm.table.map_gsi(Gsi(pin)).eq([Route::Msi(msi)]));
            }
        }
        let state = self.ioapic.state();
        assert_eq!((state.ioregsel, state.id), (self.select, self.id));
        for (at, pin) in (0..).zip(&self.model.pins) {
            assert_eq!(state.redirections[at], pin.bits(), "pin {at}");
            assert_eq!(state.lines & 1 << at != 0, pin.line, "pin {at}");
            let high = pin.line && pin.levels() && !pin.masked && !pin.refused;
            assert!(!high || pin.remote_irr, "pin {at} is lost");
            let coalesced = self.coalesced.get(&(at as u32)).copied();
            let gsi = Gsi(at as u32);
            assert_eq!(self.ioapic.coalesced(gsi), coalesced.unwrap_or(0));
        }
    }
}

fn routes(list: &List, gsi: Gsi) -> Vec<Route> {
    let entries = list.entries.iter().filter(|entry| entry.gsi == gsi);
    entries.map(|entry| entry.route).collect()
}
