// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vCPUs that count, and compare what they count in a register with what they count in memory.

/// How many vCPUs count still, 32 bits.
pub const COUNTING: u64 = 0x7_f000;
/// Any number but 0 here has the vCPUs stop, 32 bits; the last of them ends the guest with debug-exit value 0.
pub const STOP: u64 = 0x7_f008;
/// The boot vCPU's count, 32 bits; each other vCPU's is [`STRIDE`] behind the one before, in the order in which they came.
pub const COUNTS: u64 = 0x7_f040;
/// From count to count, bytes.
pub const STRIDE: u64 = 0x40;

crate::blob! {
    /// As many vCPUs as the command line's number says count, each on its own, without rest, until they are told to stop.
    /// One that finds another number in memory than in its register ends the guest with debug-exit value 1 (status 3).
    /// Starts the others by INIT and SIPI to all, through the x2APIC; vector 8.
    tally64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  mov dword ptr [0x7f000], ebx
        mov byte ptr [0x7f004], 1
        mov dword ptr [0x7f008], 0
    ", crate::parts::start_others!("6f", "8f"), "
        mov edi, 0x7f040
        xor ecx, ecx
    7:  inc ecx
        inc dword ptr [rdi]
        cmp dword ptr [rdi], ecx
        jne 9f
        cmp dword ptr [0x7f008], 0
        je 7b
        lock dec dword ptr [0x7f000]
        jnz 4f
        xor eax, eax
        out 0xf4, al
    4:  hlt
        jmp 4b
    9:  mov al, 1
        out 0xf4, al
        jmp 4b
    6:
    ", crate::parts::others_count!("jnz 5f
        xor ax, ax
        out 0xf4, al"), "
    8:
    .code64
    ")
}
