// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that writes without rest, and knows from its registers what each page has.

/// How many pages it writes.
pub const PAGES: u64 = 512;

crate::blob! {
    /// Writes [`PAGES`] pages again and again: the first and last words of each are the number of the pass and the address,
    /// and are compared before. Says a digit on COM1 for each pass (1 2 3 … 9 0 1 …). Memory of another moment than the
    /// registers is debug-exit value 1. A `q` on COM1 (polled, once a pass) is `!`, and debug-exit value 0.
    scribe64, concat!("
    .code64
        mov r14, 0x9e3779b97f4a7c15
        xor r12d, r12d
        mov edi, 0x400000
        mov esi, 512
    1:  mov rax, rdi
        imul rax, r14
        mov [rdi], rax
        mov [rdi + 4088], rax
        add edi, 4096
        dec esi
        jnz 1b
    2:  mov edi, 0x400000
        mov esi, 512
    3:  mov rax, rdi
        imul rax, r14
        add rax, r12
        cmp [rdi], rax
        jne 8f
        cmp [rdi + 4088], rax
        jne 8f
        inc rax
        mov [rdi], rax
        mov [rdi + 4088], rax
        add edi, 4096
        dec esi
        jnz 3b
    ", crate::parts::say_pass!(), crate::parts::again_or_quit!("2", "8"))
}
