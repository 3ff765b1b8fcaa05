// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that writes page after page at a rate of its own, for as long as it runs.

/// How many pages it writes, from [`FIRST`] on.
pub const PAGES: u64 = 1024;
/// Where the first one is.
pub const FIRST: u64 = 0x40_0000;

crate::blob! {
    /// Adds one to the first word of page after page, each 125,000 ticks of the TSC later than the one before or when it
    /// runs again: some 20,000 pages a second of a vCPU that runs, and as many fewer as that sleeps. Says a digit on COM1
    /// for each pass over all [`PAGES`] (1 2 3 … 9 0 1 …); a page that is not what it left ends it with debug-exit value 1.
    /// Entered by Linux's 64-bit protocol.
    dirtier64, concat!("
    .code64
        xor r12d, r12d
    1:  mov edi, 0x400000
        mov esi, 1024
    2:  rdtsc
        shl rdx, 32
        or rax, rdx
        mov r8, rax
    3:  rdtsc
        shl rdx, 32
        or rax, rdx
        sub rax, r8
        cmp rax, 125000
        jb 3b
        cmp [rdi], r12
        jne 5f
        inc qword ptr [rdi]
        add edi, 4096
        dec esi
        jnz 2b
    ", crate::parts::say_pass!(), "
        jmp 1b
    5:  mov al, 1
        out 0xf4, al
    6:  hlt
        jmp 6b
    ")
}
