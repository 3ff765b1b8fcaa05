// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest with a full memory, that waits to be asked: what a restore of it takes until it answers.

/// Where the memory that it fills begins.
pub const FIRST: u64 = 0x40_0000;
/// How many pages it looks at before it answers, each at a place that is a random one of all.
pub const ASKED: u64 = 2048;

crate::blob! {
    /// Fills memory from [`FIRST`] on with pages that begin with their addresses, as many as the command line's number says
    /// (up to 2 GiB), and says `r` on COM1. A character on COM1 (polled) is answered with `<` at once, and with `>` when [`ASKED`] pages
    /// have been looked at, always the same ones in the same order; then it halts for good. A page that has not what it should
    /// have is debug-exit value 1. Entered by Linux's 64-bit protocol.
    sleeper64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  mov rcx, cr3                        // the second GiB, by a page directory at 0x32000
        mov rdi, [rcx]
        and rdi, -4096
        mov qword ptr [rdi + 8], 0x32003
        mov edi, 0x32000
        mov eax, 0x40000083
    8:  mov [rdi], rax
        add rax, 0x200000
        add rdi, 8
        cmp edi, 0x33000
        jne 8b
        mov edi, 0x400000
        mov ecx, ebx
    3:  mov [rdi], rdi
        add rdi, 4096
        dec ecx
        jnz 3b
        mov edx, 0x3f8
        mov al, 0x72
        out dx, al
        mov edx, 0x3fd
    4:  in al, dx
        test al, 1
        jz 4b
        mov edx, 0x3f8
        in al, dx
        mov al, 0x3c
        out dx, al
        mov r8, 0x5851f42d4c957f2d
        mov r9d, 1
        mov ecx, 2048
    5:  imul r9, r8
        inc r9
        mov rax, r9
        shr rax, 32
        imul rax, rbx
        shr rax, 32
        shl rax, 12
        add rax, 0x400000
        cmp [rax], rax
        jne 6f
        dec ecx
        jnz 5b
        mov al, 0x3e
        out dx, al
        jmp 7f
    6:  mov al, 1
        out 0xf4, al
    7:  cli
        hlt
        jmp 7b
    ")
}
