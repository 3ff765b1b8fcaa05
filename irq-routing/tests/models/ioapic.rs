// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An IOAPIC, pin by pin.

use irq_routing::{Arrival, Msi};

/// One pin, as the datasheet tells of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pin {
    pub vector: u8,
    pub mode: u8,
    pub logical: bool,
    pub active_low: bool,
    pub level: bool,
    pub masked: bool,
    pub destination: u8,
    pub line: bool,
    pub remote_irr: bool,
    /// The last try to send found no one.
    pub refused: bool,
    /// Of an edge-triggered pin: calls that found the line low, and what became of them.
    pub rises: u64,
    pub sent: u64,
    pub dropped: u64,
}

impl Pin {
    pub fn levels(&self) -> bool {
        self.level && self.mode <= 1
    }

    pub fn bits(&self) -> u64 {
        u64::from(self.vector)
            | u64::from(self.mode) << 8
            | u64::from(self.logical) << 11
            | u64::from(self.active_low) << 13
            | u64::from(self.remote_irr) << 14
            | u64::from(self.level) << 15
            | u64::from(self.masked) << 16
            | u64::from(self.destination) << 56
    }

    pub fn message(&self) -> Msi {
        let logical = if self.logical { 4 } else { 0 };
        let trigger = if self.levels() { 0x8000 } else { 0 };
        Msi {
            address: 0xfee0_0000 + u64::from(self.destination) * 0x1000 + logical,
            data: u32::from(self.vector) + u32::from(self.mode) * 0x100 + trigger,
            devid: None,
        }
    }
}

/// All pins, and what they sent.
pub struct Model {
    pub pins: [Pin; 24],
    pub listens: bool,
    pub sent: Vec<(u32, Msi)>,
}

impl Model {
    pub fn new() -> Self {
        let pin = Pin {
            masked: true,
            ..Pin::default()
        };
        Self {
            pins: [pin; 24],
            listens: true,
            sent: Vec::new(),
        }
    }

    pub fn send(&mut self, at: u32) -> Arrival {
        let pin = &mut self.pins[at as usize];
        if pin.masked {
            return Arrival::Masked;
        }
        if pin.remote_irr {
            return Arrival::Coalesced;
        }
        self.sent.push((at, pin.message()));
        pin.refused = !self.listens;
        if pin.refused {
            return Arrival::Masked;
        }
        pin.remote_irr = pin.levels();
        Arrival::Delivered { to: 1 }
    }

    pub fn line(&mut self, at: u32, high: bool) -> Arrival {
        let pin = &mut self.pins[at as usize];
        let rises = high && !pin.line;
        pin.line = high;
        if !high {
            return Arrival::Delivered { to: 1 };
        }
        if pin.levels() {
            return self.send(at);
        }
        if !rises {
            return Arrival::Coalesced;
        }
        let arrival = self.send(at);
        let pin = &mut self.pins[at as usize];
        pin.rises += 1;
        match arrival {
            Arrival::Delivered { .. } => pin.sent += 1,
            _ => pin.dropped += 1,
        }
        arrival
    }

    pub fn changed(&mut self, at: u32) {
        let pin = &mut self.pins[at as usize];
        if !pin.levels() {
            pin.remote_irr = false;
        } else if pin.line {
            self.send(at);
        }
    }

    pub fn low(&mut self, at: u32, value: u32) {
        let pin = &mut self.pins[at as usize];
        pin.vector = value as u8;
        pin.mode = (value >> 8 & 7) as u8;
        pin.logical = value >> 11 & 1 != 0;
        pin.active_low = value >> 13 & 1 != 0;
        pin.level = value >> 15 & 1 != 0;
        pin.masked = value >> 16 & 1 != 0;
        self.changed(at);
    }

    /// The level-triggered pins of a vector, a bit a pin.
    pub fn levels_of(&self, vector: u8) -> u32 {
        let pins = (0..).zip(&self.pins);
        let pins = pins.filter(|(_, pin)| pin.levels() && pin.vector == vector);
        pins.fold(0, |set, (at, _)| set | 1 << at)
    }

    /// What is pending is sent.
    pub fn redeliver(&mut self) {
        for at in 0..24 {
            let pin = self.pins[at as usize];
            if pin.levels() && pin.line && !pin.masked && !pin.remote_irr {
                self.send(at);
            }
        }
    }

    pub fn eoi(&mut self, vector: u8) {
        let ended = self.pins.map(|pin| pin.levels() && pin.vector == vector);
        for (pin, ended) in self.pins.iter_mut().zip(ended) {
            pin.remote_irr &= !ended;
        }
        for (at, ended) in (0..).zip(ended) {
            if ended && self.pins[at as usize].line {
                self.send(at);
            }
        }
    }
}
