// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The IOAPIC of a split irqchip: an Intel 82093AA in user space.
//!
//! With `KVM_CAP_SPLIT_IRQCHIP` the local APICs are KVM's and the pins are the VMM's. [`Ioapic`] is
//! the chip as a pure state machine: levels, register accesses and EOIs go in, messages come out.
//! It asks nothing of KVM, takes no lock and allocates nothing. [`SplitIoapic`] is the same chip in a
//! VM.
//!
//! ```text
//!            low ◄──────────────── device lowers its line
//!             │                              ▲
//!   line up   │  masked: waits               │
//!             ▼                              │
//!          pending ── unmasked, no remote IRR: message ──► delivered (remote IRR)
//!             ▲                                                  │
//!             └── line still up ◄── EOI: remote IRR cleared ─────┘
//!
//!   edge-triggered: one message for each rise of the line while unmasked; a rise while masked is
//!   lost, as the datasheet has it.
//! ```

#![forbid(unsafe_code)]

mod device;
mod line;
mod notifier;
mod redirection;
mod state;

use crate::line::Arrival;
use crate::route::Msi;
use crate::rules::IOAPIC_PINS;

pub use device::SplitIoapic;
pub use line::PinLine;
pub use notifier::Notifier;
pub use redirection::Redirection;
pub use state::{IoapicState, IoapicStateError};

/// Where a PC's IOAPIC is: guest-physical, the first of [`IOAPIC_LEN`] bytes.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// How many bytes of guest-physical space it answers (`IOAPIC_MEM_LENGTH`).
pub const IOAPIC_LEN: u64 = 0x100;

const PINS: usize = IOAPIC_PINS as usize;

/// `IOREGSEL`, the indirect register that [`WINDOW`] shows.
const SELECT: u64 = 0x00;
/// `IOWIN`.
const WINDOW: u64 = 0x10;
/// The EOI register, which version 0x20 has.
const EOI: u64 = 0x40;

const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const FIRST_REDIRECTION: u8 = 0x10;

/// The version register: 24 pins, and version 0x20, the first with an EOI register. (KVM's own says
/// 0x11 and has none.)
const VERSION_VALUE: u32 = (IOAPIC_PINS - 1) << 16 | 0x20;

/// Where an [`Ioapic`]'s messages go.
///
/// # Contract
///
/// `send` is called with the chip borrowed, so it must not come back to it. The chip believes the
/// answer: after [`Arrival::Delivered`] or [`Arrival::Coalesced`] of a level-triggered pin an EOI is
/// to follow, after [`Arrival::Masked`] the pin stays pending.
pub trait PinMessages {
    /// Delivers the message of a pin. Bit 15 of its data says whether it is level-triggered.
    fn send(&mut self, pin: u32, msi: Msi) -> Arrival;
}

impl<F: FnMut(u32, Msi) -> Arrival> PinMessages for F {
    fn send(&mut self, pin: u32, msi: Msi) -> Arrival {
        self(pin, msi)
    }
}

/// What a write to a register asks of whoever owns the chip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an EOI is not done before it is answered"]
pub enum Written {
    /// Nothing.
    Nothing,
    /// A redirection entry was written.
    Redirection {
        /// Which.
        pin: u32,
        /// What the mask is now, if it changed: for mask notifiers.
        masked: Option<bool>,
    },
    /// The EOI register was written: to be followed by [`Ioapic::eoi`].
    Eoi {
        /// The vector whose interrupt ended.
        vector: u8,
    },
}

/// An 82093AA: 24 pins, their redirection table, and the registers to it. Pure: see the
/// [module](self) on what it is, and [`SplitIoapic`] for one in a VM.
///
/// ```
/// use irq_routing::Arrival;
/// use irq_routing::ioapic::{Ioapic, Written};
///
/// let mut chip = Ioapic::new();
/// let mut sent = Vec::new();
/// let mut messages = |pin, msi: irq_routing::Msi| {
///     sent.push((pin, msi.data));
///     Arrival::Delivered { to: 1 }
/// };
/// // Pin 9: level-triggered, vector 0x31, unmasked.
/// let _ = chip.write(0x00, &[0x10 + 2 * 9], &mut messages);
/// let written = chip.write(0x10, &0x8031u32.to_le_bytes(), &mut messages);
/// assert_eq!(written, Written::Redirection { pin: 9, masked: Some(false) });
/// // It stays asserted, so that it comes again after its EOI.
/// chip.set_line(9, true, &mut messages);
/// assert_eq!(chip.set_line(9, true, &mut messages), Arrival::Coalesced);
/// let pins = chip.pins_of(0x31);
/// chip.eoi(pins, &mut messages);
/// assert_eq!(sent, [(9, 0x8031), (9, 0x8031)]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ioapic {
    select: u8,
    id: u8,
    /// The level of each line, a bit a pin: what KVM calls `irr`.
    lines: u32,
    redirections: [Redirection; PINS],
    coalesced: [u64; PINS],
    extended: bool,
}

impl Ioapic {
    /// The chip after reset: every pin masked, every line low.
    pub fn new() -> Self {
        Self {
            select: 0,
            id: 0,
            lines: 0,
            redirections: [Redirection::RESET; PINS],
            coalesced: [0; PINS],
            extended: false,
        }
    }

    /// The same for a VM whose guest may name APIC ids up to 32767 (`KVM_FEATURE_MSI_EXT_DEST_ID`
    /// in CPUID, `KVM_CAP_X2APIC_API` with 32-bit ids enabled).
    pub fn with_extended_destinations() -> Self {
        Self {
            extended: true,
            ..Self::new()
        }
    }

    /// Sets the level of a pin's line (`kvm_ioapic_set_irq`). Several sources of one line are ORed
    /// by whoever calls.
    ///
    /// A rise says what became of it; a fall is always [`Arrival::Delivered`] to one, the pin, as
    /// KVM counts it. A pin that the chip has not is [`Arrival::Masked`].
    pub fn set_line(&mut self, pin: u32, high: bool, messages: &mut impl PinMessages) -> Arrival {
        let Some(&entry) = self.redirections.get(pin as usize) else {
            return Arrival::Masked;
        };
        let bit = 1 << pin;
        if !high {
            self.lines &= !bit;
            return Arrival::Delivered { to: 1 };
        }
        let was_high = self.lines & bit != 0;
        self.lines |= bit;
        if was_high && !entry.is_level() {
            let count = &mut self.coalesced[pin as usize];
            *count = count.saturating_add(1);
            return Arrival::Coalesced;
        }
        self.service(pin, messages)
    }

    /// Reads `data.len()` bytes at an offset from the base. As KVM has it: the offset counts modulo
    /// 0x100, what lies between the registers reads as 0, and so do bytes above a register's four.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & 0xff {
            SELECT => u32::from(self.select),
            WINDOW => self.window(),
            _ => 0,
        };
        let bytes = u64::from(value).to_le_bytes();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }

    /// Writes. As KVM has it: 1, 2, 4 or 8 bytes, of which a register sees the lower four, with 0
    /// for those that were not written; other lengths, and what lies between the registers, are
    /// ignored.
    pub fn write(&mut self, offset: u64, data: &[u8], messages: &mut impl PinMessages) -> Written {
        let value = match *data {
            [a] => u32::from(a),
            [a, b] => u32::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] | [a, b, c, d, _, _, _, _] => u32::from_le_bytes([a, b, c, d]),
            _ => return Written::Nothing,
        };
        match offset & 0xff {
            SELECT => {
                self.select = value as u8;
                Written::Nothing
            }
            WINDOW => self.write_window(value, messages),
            EOI => Written::Eoi {
                vector: value as u8,
            },
            _ => Written::Nothing,
        }
    }

    /// The level-triggered pins that a vector's EOI acknowledges, a bit a pin: for ack notifiers,
    /// and then [`Ioapic::eoi`].
    pub fn pins_of(&self, vector: u8) -> u32 {
        self.pins_where(|entry| entry.is_level() && entry.vector() == vector)
    }

    /// Ends the interrupts of these pins: their remote IRR is cleared, and those whose line is
    /// still high are sent again.
    ///
    /// A call of its own, so that ack notifiers can lower lines between the two.
    pub fn eoi(&mut self, pins: u32, messages: &mut impl PinMessages) {
        for (pin, entry) in (0..).zip(&mut self.redirections) {
            if pins & 1 << pin != 0 {
                *entry = entry.acknowledged();
            }
        }
        self.redeliver(pins, messages);
    }

    /// Sends what is pending on these pins: those level-triggered and unmasked whose line is high
    /// and for which no EOI is outstanding. After a restore, or where a message was refused.
    pub fn redeliver(&mut self, pins: u32, messages: &mut impl PinMessages) {
        for pin in 0..IOAPIC_PINS {
            let entry = self.redirections[pin as usize];
            if pins & self.lines & 1 << pin != 0 && entry.is_level() {
                self.service(pin, messages);
            }
        }
    }

    /// Reset: every pin masked, nothing outstanding. Lines keep their levels, which are not the
    /// chip's.
    pub fn reset(&mut self) {
        *self = Self {
            lines: self.lines,
            coalesced: self.coalesced,
            extended: self.extended,
            ..Self::new()
        };
    }

    /// A pin's redirection entry; none if the chip has no such pin.
    pub fn redirection(&self, pin: u32) -> Option<Redirection> {
        self.redirections.get(pin as usize).copied()
    }

    /// The level of every line, a bit a pin.
    pub fn lines(&self) -> u32 {
        self.lines
    }

    /// The pins whose EOI is outstanding, a bit a pin.
    pub fn outstanding(&self) -> u32 {
        self.pins_where(Redirection::remote_irr)
    }

    /// How many rises of an edge-triggered line came while it was high already.
    pub fn coalesced(&self, pin: u32) -> u64 {
        self.coalesced.get(pin as usize).copied().unwrap_or(0)
    }

    fn pins_where(&self, holds: impl Fn(Redirection) -> bool) -> u32 {
        let pins = (0..).zip(self.redirections);
        pins.fold(0, |set, (pin, entry)| set | u32::from(holds(entry)) << pin)
    }

    /// Sends a pin's message if nothing forbids it (KVM's `ioapic_service`).
    fn service(&mut self, pin: u32, messages: &mut impl PinMessages) -> Arrival {
        let entry = &mut self.redirections[pin as usize];
        if entry.is_masked() {
            return Arrival::Masked;
        }
        if entry.remote_irr() {
            return Arrival::Coalesced;
        }
        let arrival = messages.send(pin, entry.msi());
        // What no one took has no one to end it: the pin stays pending.
        if entry.is_level() && arrival != Arrival::Masked {
            *entry = entry.delivered();
        }
        arrival
    }

    /// The entry that the window shows and where in it, if it shows one.
    fn selected(&self) -> Option<(u32, u32)> {
        let index = self.select.checked_sub(FIRST_REDIRECTION)?;
        let pin = u32::from(index / 2);
        (pin < IOAPIC_PINS).then_some((pin, u32::from(index % 2) * 32))
    }

    fn window(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => u32::from(self.id) << 24,
            VERSION => VERSION_VALUE,
            _ => match self.selected() {
                Some((pin, shift)) => (self.redirections[pin as usize].bits() >> shift) as u32,
                // No such register: all ones, as KVM has it.
                None => !0,
            },
        }
    }

    fn write_window(&mut self, value: u32, messages: &mut impl PinMessages) -> Written {
        if self.select == ID {
            self.id = (value >> 24 & 0xf) as u8;
        }
        let Some((pin, shift)) = self.selected() else {
            return Written::Nothing;
        };
        let entry = &mut self.redirections[pin as usize];
        let was_masked = entry.is_masked();
        let (bits, mask) = (u64::from(value) << shift, 0xffff_ffff << shift);
        *entry = entry.written(bits, mask, self.extended);
        let masked = entry.is_masked();
        self.redeliver(1 << pin, messages);
        Written::Redirection {
            pin,
            masked: (masked != was_masked).then_some(masked),
        }
    }
}

impl Default for Ioapic {
    fn default() -> Self {
        Self::new()
    }
}
