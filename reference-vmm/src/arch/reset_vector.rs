// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The one piece of firmware that this machine has: what a processor finds where a PC's BIOS begins.
//!
//! Linux on a hardware-reduced ACPI machine assumes UEFI, and asks that to reset the machine before
//! anything else; without one it returns to real mode and jumps to the BIOS. Its other ways, the
//! FADT's reset register among them, come after that, so they are never tried.

use vm_memory::GuestAddress;

use super::layout::{RESET_PORT, RESET_VALUE, RESET_VECTOR};

/// 16-bit code that resets the machine through the keyboard controller, and where it goes.
pub fn block() -> (GuestAddress, Vec<u8>) {
    let code = vec![
        0xb0,
        RESET_VALUE, // mov al, RESET_VALUE
        0xe6,
        RESET_PORT as u8, // out RESET_PORT, al
        0xfa,             // cli
        0xf4,             // hlt
        0xeb,
        0xfd, // jmp to the hlt
    ];
    (RESET_VECTOR, code)
}

const _: () = assert!(RESET_PORT <= 0xff, "out has an 8-bit port");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout;

    #[test]
    fn the_code_ends_before_the_bios_does_and_after_the_tables_may() {
        let (at, code) = block();
        assert!(at.0 + code.len() as u64 <= 0x10_0000);
        assert!(layout::ISA_WINDOW.contains(&at.0));
        assert!(layout::ACPI_TABLES.end <= at.0);
    }
}
