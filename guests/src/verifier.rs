// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vCPUs that compare all of their memory with what it should be, in no order, again and again: a page that is another's, or
//! zeros in place of a page, are found by the first pass.

/// Where the memory begins that is compared.
pub const FIRST: u64 = 0x40_0000;
/// How many pages of it there are. Each eighth is zero; of another the first word is [`key`] of its address, and the last
/// the complement of that.
pub const PAGES: u64 = 2048;
/// How often the vCPUs behind the first have been through all of it, 32 bits: all of them together.
pub const PASSES: u64 = 0x7_f010;
/// The character that ends it, on COM1.
pub const QUIT: u8 = b'q';

/// The first word of a page.
pub const fn key(address: u64) -> u32 {
    (address as u32).wrapping_mul(0x9e37_79b1)
}

/// Compares all pages once, from the one in `ebx` on, in the order of a generator that comes to each; goes to the label 9
/// where one is not as it should be. The same text in 32-bit and in 64-bit mode. Uses `eax`, `ecx`, `edx`, `esi`, `ebx`.
macro_rules! pass {
    () => {
        "
        mov ecx, 2048
    7:  mov esi, ebx
        shl esi, 12
        add esi, 0x400000
        xor eax, eax
        xor edx, edx
        test ebx, 7
        jz 3f
        imul eax, esi, 0x9e3779b1
        mov edx, eax
        not edx
    3:  cmp dword ptr [esi], eax
        jne 9f
        cmp dword ptr [esi + 4092], edx
        jne 9f
        imul ebx, ebx, 1664525
        add ebx, 1013904223
        and ebx, 2047
        dec ecx
        jnz 7b
    "
    };
}

crate::blob! {
    /// As many vCPUs as the command line's number says. The boot vCPU writes [`PAGES`] pages and says `f`; then it compares
    /// them again and again, and says a digit on COM1 for each pass (1 2 3 … 9 0 1 …). The others do the same without a word
    /// and count ([`PASSES`]). Whoever finds anything else ends the guest with debug-exit value 1; [`QUIT`] on COM1 (polled,
    /// once a pass) is `!`, and debug-exit value 0.
    verifier64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  mov dword ptr [0x7f000], ebx
        mov dword ptr [0x7f010], 0
        mov dword ptr [0x7f014], 0
        mov esp, 0x40000
        xor ebx, ebx
    20: mov esi, ebx
        shl esi, 12
        add esi, 0x400000
        test ebx, 7
        jz 21f
        imul eax, esi, 0x9e3779b1
        mov dword ptr [esi], eax
        not eax
        mov dword ptr [esi + 4092], eax
    21: inc ebx
        cmp ebx, 2048
        jb 20b
        mov al, 0x66
        mov edx, 0x3f8
        out dx, al
        mov rax, 0                          // a GDT of flat 32-bit segments, and its register at 0x7e020
        mov [0x7e000], rax
        mov rax, 0x00cf9a000000ffff
        mov [0x7e008], rax
        mov rax, 0x00cf92000000ffff
        mov [0x7e010], rax
        mov word ptr [0x7e020], 23
        mov dword ptr [0x7e022], 0x7e000
        lea rsi, [rip + 12f]                // what they do in it, at 0x9000
        mov edi, 0x9000
        lea rcx, [rip + 13f]
        sub ecx, esi
        rep movsb
        cmp dword ptr [0x7f000], 1
        je 22f
    ", crate::parts::start_others!("6f", "8f"), "
    22: xor r12d, r12d
        xor ebx, ebx
    23: ", pass!(), crate::parts::say_pass!(), crate::parts::again_or_quit!("23", "9"), "
    6:
    .code16
        cli
        mov ax, 0x7e00
        mov ds, ax
        .byte 0x66                          // all of the address
        lgdt [0x20]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        .byte 0x66, 0xea                    // into the 32-bit segment
        .long 0x9000
        .word 8
    8:
    12:
    .code32
        mov ax, 0x10
        mov ds, ax
        mov ebx, 1
        lock xadd dword ptr [0x7f014], ebx
        imul ebx, ebx, 977
        and ebx, 2047
    14: ", pass!(), "
        lock inc dword ptr [0x7f010]
        jmp 14b
    9:  mov al, 1
        out 0xf4, al
    5:  hlt
        jmp 5b
    13:
    .code64
    ")
}
