// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An 8259A's state as plain data.

#![forbid(unsafe_code)]

/// What one of the in-kernel 8259As knows (`struct kvm_pic_state`). A bit a pin where it says so;
/// a flag is 0 or 1, and taken and given back as KVM has it.
///
/// The levels of the lines are in `last_irr`; which of their sources are high is not: each device
/// sets its own once more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct PicState {
    /// The level that each line had last, a bit a pin: an edge is what rises above it.
    pub last_irr: u8,
    /// The interrupts that wait, a bit a pin.
    pub irr: u8,
    /// The masked pins, a bit a pin.
    pub imr: u8,
    /// The interrupts in service, a bit a pin.
    pub isr: u8,
    /// The pin of the highest priority (rotation).
    pub priority_add: u8,
    /// The vector of pin 0 (ICW2).
    pub irq_base: u8,
    /// Flag: reads give `isr` instead of `irr` (OCW3).
    pub read_reg_select: u8,
    /// Flag: the next read is a poll (OCW3).
    pub poll: u8,
    /// Flag: special mask mode (OCW3).
    pub special_mask: u8,
    /// How far the guest is with its initialization: 0 done, else the ICW that follows.
    pub init_state: u8,
    /// Flag: interrupts end by themselves (ICW4).
    pub auto_eoi: u8,
    /// Flag: priorities rotate at each automatic end (OCW2).
    pub rotate_on_auto_eoi: u8,
    /// Flag: special fully nested mode (ICW4).
    pub special_fully_nested_mode: u8,
    /// Flag: an ICW4 belongs to the initialization (ICW1).
    pub init4: u8,
    /// The level-triggered pins, a bit a pin: port 0x4d0 or 0x4d1.
    pub elcr: u8,
    /// The pins that the guest may make level-triggered, a bit a pin.
    pub elcr_mask: u8,
}
