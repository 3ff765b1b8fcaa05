// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes exactly the pages that it is told to.

use std::arch::global_asm;

/// I/O port that the guest reads its orders from, as a 32-bit number: the address of a byte to
/// write, or [`PAGE_WRITER_STOP`].
pub const PAGE_WRITER_PORT: u16 = 0x10;

/// The order to halt; the next order is asked for after that.
pub const PAGE_WRITER_STOP: u32 = u32::MAX;

global_asm!(
    ".pushsection .rodata.guest_page_writer, \"a\"",
    ".code32",
    "guest_page_writer_start:",
    "2: in eax, 0x10",
    "cmp eax, -1",
    "je 3f",
    "mov byte ptr [eax], al", // the only store; there is no stack
    "jmp 2b",
    "3: hlt",
    "jmp 2b",
    "guest_page_writer_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static guest_page_writer_start: u8;
    static guest_page_writer_end: u8;
}

/// 32-bit flat protected mode without paging, position-independent, no stack: reads an address
/// from port [`PAGE_WRITER_PORT`], writes the address's low byte there, and asks again.
/// [`PAGE_WRITER_STOP`] halts it.
pub fn page_writer() -> &'static [u8] {
    // SAFETY: both labels are in one read-only section of this binary, the end after the start.
    unsafe {
        let start = &raw const guest_page_writer_start;
        let end = &raw const guest_page_writer_end;
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    }
}
