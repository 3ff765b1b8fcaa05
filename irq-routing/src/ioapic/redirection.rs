// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One entry of an IOAPIC's redirection table, and the message that it stands for.

#![forbid(unsafe_code)]

use std::fmt;

use crate::route::Msi;

/// What a guest can write: vector, delivery mode, destination mode, polarity, trigger mode, mask,
/// destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;
/// Bits 8 to 14 of the destination, where the guest was told of them.
const EXTENDED: u64 = 0x00fe_0000_0000_0000;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

const MSI_BASE: u64 = 0xfee0_0000;
/// Bit 15 of a message's data: it is of a level-triggered interrupt.
pub(super) const MSI_LEVEL: u32 = 1 << 15;

/// An entry of the redirection table (82093AA datasheet, 3.2.4, `IOREDTBL`; KVM's
/// `kvm_ioapic_redirect_entry`).
///
/// Reserved bits read as 0, and so does the delivery status (bit 12): a message is never under way
/// when a guest could look. Polarity (bit 13) is kept and means nothing here: a line is asserted or
/// not, whatever voltage that were.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Redirection(u64);

impl Redirection {
    /// What reset leaves in each entry: masked, and 0 in everything else.
    pub const RESET: Redirection = Redirection(MASKED);

    /// An entry of these bits. Reserved bits, the delivery status, the extended destination where
    /// it is not `extended`, and a remote IRR that is not of a level-triggered entry are dropped.
    pub fn from_bits(bits: u64, extended: bool) -> Self {
        Self::RESET.written(bits, !0, extended).acknowledging(bits)
    }

    /// All 64 bits, as the guest reads them in two halves.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// The vector, bits 0 to 7.
    pub fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The delivery mode, bits 8 to 10: 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT.
    pub fn delivery_mode(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    /// Whether the destination is a logical one (bit 11).
    pub fn is_logical(self) -> bool {
        self.0 & 1 << 11 != 0
    }

    /// Whether a message was taken and its EOI has not come (bit 14): only of a level-triggered
    /// entry.
    pub fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    /// Whether the pin is level-triggered: bit 15, and a delivery mode that has levels. SMI, NMI,
    /// INIT and ExtINT are edges whatever the bit says (datasheet, 3.2.4).
    pub fn is_level(self) -> bool {
        self.0 & LEVEL != 0 && self.delivery_mode() <= 1
    }

    /// Whether the pin is masked (bit 16).
    pub fn is_masked(self) -> bool {
        self.0 & MASKED != 0
    }

    /// The destination: bits 56 to 63, above them bits 49 to 55 where extended destinations are in
    /// use (`KVM_FEATURE_MSI_EXT_DEST_ID`, Linux's `virt_destid_8_14`).
    pub fn destination(self) -> u32 {
        (self.0 >> 56) as u32 | ((self.0 & EXTENDED) >> 49 << 8) as u32
    }

    /// The message, as QEMU's split irqchip makes it: fixed address, destination and its mode in
    /// the address; vector, delivery and trigger mode in the data. Bits 8 to 14 of an extended
    /// destination go where KVM looks for them, into the upper half (`KVM_CAP_X2APIC_API`). The
    /// remappable format is not used.
    pub fn msi(self) -> Msi {
        let destination = u64::from(self.destination());
        let (low, high) = (destination & 0xff, destination >> 8);
        let trigger = if self.is_level() { MSI_LEVEL } else { 0 };
        Msi {
            address: MSI_BASE | low << 12 | u64::from(self.is_logical()) << 2 | high << 40,
            data: u32::from(self.vector()) | u32::from(self.delivery_mode()) << 8 | trigger,
            devid: None,
        }
    }

    /// What a guest's write makes of the entry: the bits of `mask` are `bits`, as far as they are
    /// the guest's. A remote IRR stays, unless the entry is edge-triggered now: guests clear it so
    /// where there is no EOI register (Linux's `__eoi_ioapic_pin`).
    pub(super) fn written(self, bits: u64, mask: u64, extended: bool) -> Self {
        let ours = if extended {
            WRITABLE | EXTENDED
        } else {
            WRITABLE
        } & mask;
        let next = Self(self.0 & !ours | bits & ours);
        if next.is_level() {
            next
        } else {
            next.acknowledged()
        }
    }

    pub(super) fn acknowledged(self) -> Self {
        Self(self.0 & !REMOTE_IRR)
    }

    pub(super) fn delivered(self) -> Self {
        debug_assert!(self.is_level(), "an edge has no remote IRR");
        Self(self.0 | REMOTE_IRR)
    }

    fn acknowledging(self, bits: u64) -> Self {
        if self.is_level() {
            Self(self.0 | bits & REMOTE_IRR)
        } else {
            self
        }
    }

    /// Whether these bits name a destination that needs extended ones.
    pub(super) fn names_extended(bits: u64) -> bool {
        bits & EXTENDED != 0
    }
}

impl Default for Redirection {
    fn default() -> Self {
        Self::RESET
    }
}

impl fmt::Debug for Redirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Redirection({:#018x})", self.0)
    }
}
