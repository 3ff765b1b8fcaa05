// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that knows what it has: it may be stopped anywhere, and go on elsewhere, and finds out if anything of it was lost.

/// Where the memory that it keeps begins.
pub const KEPT: u64 = 0x40_0000;
/// How many pages of it there are.
pub const PAGES: u64 = 64;
/// The character that ends it, on COM1.
pub const QUIT: u8 = b'q';

crate::blob! {
    /// As many vCPUs as the command line's number says. The boot vCPU keeps [`PAGES`] pages, in the first and last words of
    /// which are the number of its pass and the address; it compares and rewrites them, says a digit on COM1 for each pass
    /// (1 2 3 … 9 0 1 …), and sleeps until the local APIC's timer (x2APIC, TSC-deadline mode, vector 0x40) has ticked once
    /// more, which is armed again by its own interrupt: one tick that is lost, and there is no other. The others count, as
    /// [`tally64`](crate::tally::tally64)'s. [`QUIT`] on COM1 (polled, once a pass) has all stop: `!`, and debug-exit value 0.
    /// Whoever finds anything else than it left ends the guest with debug-exit value 1.
    keeper64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  mov dword ptr [0x7f000], ebx
        mov byte ptr [0x7f004], 1
        mov dword ptr [0x7f008], 0
        mov esp, 0x40000
        cmp ebx, 1
        je 20f
    ", crate::parts::start_others!("6f", "8f"), "
    20: mov ecx, 0x1b                       // x2APIC
        rdmsr
        or eax, 0xc00
        wrmsr
        mov ecx, 0x80f
        mov eax, 0x1ff
        xor edx, edx
        wrmsr
    ", crate::parts::interrupt_gate!("21f", "22f", "0x30400"), "
        mov dword ptr [0x34000], 0
        mov ecx, 0x832                      // the timer: TSC-deadline mode, vector 0x40
        mov eax, 0x40040
        xor edx, edx
        wrmsr
        rdtsc
        mov ecx, 0x6e0
        add eax, 1000000
        adc edx, 0
        wrmsr
        mov r14, 0x9e3779b97f4a7c15
        mov r15, r14
        not r15
        xor r12d, r12d
        xor r13d, r13d
        mov edi, 0x400000
        mov esi, 64
    23: mov rax, rdi
        imul rax, r14
        mov [rdi], rax
        mov [rdi + 4088], rax
        add edi, 4096
        dec esi
        jnz 23b
        sti
    24: mov edi, 0x400000
        mov esi, 64
    25: mov rax, rdi
        imul rax, r14
        add rax, r12
        cmp [rdi], rax
        jne 29f
        cmp [rdi + 4088], rax
        jne 29f
        inc rax
        mov [rdi], rax
        mov [rdi + 4088], rax
        mov rdx, r14
        not rdx
        cmp rdx, r15
        jne 29f
        add edi, 4096
        dec esi
        jnz 25b
    ", crate::parts::say_pass!(), "
    26: cli                                 // no tick between the look and the sleep
        mov eax, [0x34000]
        cmp eax, r13d
        jne 27f
        sti
        hlt
        jmp 26b
    27: sti
        mov r13d, eax
        mov edx, 0x3fd
        in al, dx
        test al, 1
        jz 24b
        mov edx, 0x3f8
        in al, dx
        cmp al, 0x71
        jne 29f
        mov dword ptr [0x7f008], 1
        lock dec dword ptr [0x7f000]
    28: cmp dword ptr [0x7f000], 0
        jne 28b
        mov al, 0x21
        out dx, al
        xor eax, eax
        out 0xf4, al
    30: hlt
        jmp 30b
    29: mov al, 1
        out 0xf4, al
        jmp 30b
    21: push rax
        push rcx
        push rdx
        inc dword ptr [0x34000]
        xor eax, eax
        xor edx, edx
        mov ecx, 0x80b                      // EOI
        wrmsr
        rdtsc
        mov ecx, 0x6e0
        add eax, 1000000
        adc edx, 0
        wrmsr
        pop rdx
        pop rcx
        pop rax
        iretq
    22: .word 0x40f
        .quad 0x30000
    6:
    ", crate::parts::others_count!(""), "
    8:
    .code64
    ")
}
