// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The local APIC's two pins, wired as a PC's firmware leaves them: LINT0 takes the 8259 (ExtINT),
//! LINT1 the NMI ("virtual wire mode" of the MultiProcessor specification 1.4, 3.6.2.2).

use kvm_bindings::kvm_lapic_state;

const DELIVERY: u32 = 0x700;
const MASKED: u32 = 1 << 16;
const NMI: u32 = 0x400;
const EXT_INT: u32 = 0x700;

/// One of the two pins; its value is the offset of its register in the APIC page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum LocalPin {
    /// LINT0.
    Lint0 = 0x350,
    /// LINT1.
    Lint1 = 0x360,
}

/// The pin's local vector table entry (Intel SDM volume 3, 11.5.1).
#[must_use]
pub fn local_pin(lapic: &kvm_lapic_state, pin: LocalPin) -> u32 {
    let at = pin as usize;
    let mut bytes = [0; 4];
    for (byte, reg) in bytes.iter_mut().zip(lapic.regs.iter().skip(at)) {
        *byte = *reg as u8;
    }
    u32::from_le_bytes(bytes)
}

/// Wires LINT0 to the 8259 and LINT1 to the NMI, both unmasked; nothing else changes.
pub fn set_virtual_wire(lapic: &mut kvm_lapic_state) {
    for (pin, delivery) in [(LocalPin::Lint0, EXT_INT), (LocalPin::Lint1, NMI)] {
        let value = local_pin(lapic, pin) & !(DELIVERY | MASKED) | delivery;
        let at = pin as usize;
        for (reg, byte) in lapic.regs.iter_mut().skip(at).zip(value.to_le_bytes()) {
            *reg = byte as _;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn only_delivery_mode_and_mask_of_the_two_pins_change() {
        let mut lapic = kvm_lapic_state::default();
        for (i, reg) in lapic.regs.iter_mut().enumerate() {
            *reg = (i * 7 + 3) as _;
        }
        let before = lapic;
        set_virtual_wire(&mut lapic);
        for (pin, delivery) in [(LocalPin::Lint0, EXT_INT), (LocalPin::Lint1, NMI)] {
            let (old, new) = (local_pin(&before, pin), local_pin(&lapic, pin));
            assert_eq!(new & (DELIVERY | MASKED), delivery);
            assert_eq!(new & !(DELIVERY | MASKED), old & !(DELIVERY | MASKED));
        }
        let changed = (0..1024).filter(|i| lapic.regs[*i] != before.regs[*i]);
        assert!(
            changed
                .into_iter()
                .all(|i| (0x350..0x354).contains(&i) || (0x360..0x364).contains(&i))
        );
    }
}
