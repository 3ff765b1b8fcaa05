// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests for a monitor's boot protocols: position-independent code for the mode that a protocol
//! starts a kernel in, to be put into an [image](crate::image). COM1 is their voice, isa-debug-exit
//! at 0xf4 their end (status 1 for value 0).

crate::blob! {
    /// 64-bit: says "hello" and a newline, then exits with debug-exit value 0.
    hello64, "
    .code64
        lea rsi, [rip + 2f]
        mov ecx, 6
        mov edx, 0x3f8
        cld
    7:  lodsb
        out dx, al
        loop 7b
        xor eax, eax
        out 0xf4, al
    3:  hlt
        jmp 3b
    2:  .ascii \"hello\\n\"
    "
}

crate::blob! {
    /// 64-bit: writes one byte to COM1 and resets through the keyboard controller. The shortest
    /// life of a guest with an output.
    byte_and_reset64, "
    .code64
        mov edx, 0x3f8
        mov al, 0x2a
        out dx, al
        mov al, 0xfe
        out 0x64, al
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// 64-bit: powers off through ACPI's sleep control register at port 0x600.
    poweroff64, "
    .code64
        mov edx, 0x600
        mov al, 0x34
        out dx, al
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// 64-bit: a triple fault, with a mark in rax and rbx to be found in the register dump.
    triple_fault64, "
    .code64
        mov rax, 0x1122334455667788
        mov rbx, 0xfeedface
        lidt [rip + 2f]
        ud2
    2:  .quad 0, 0
    "
}

crate::blob! {
    /// 64-bit: says \"up\", then spins with interrupts off, for ever.
    spin64, "
    .code64
        mov edx, 0x3f8
        mov al, 0x75
        out dx, al
        mov al, 0x70
        out dx, al
        mov al, 0x0a
        out dx, al
    7:  jmp 7b
    "
}

crate::blob! {
    /// 64-bit: writes to pvpanic's port that the kernel panicked.
    pvpanic64, "
    .code64
        mov edx, 0x505
        mov al, 1
        out dx, al
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// 64-bit: echoes what comes in on COM1 (polled) until a `q`, then exits with debug-exit value
    /// 0x10 (status 0x21).
    echo64, "
    .code64
    7:  mov edx, 0x3fd
    2:  in al, dx
        test al, 1
        jz 2b
        mov edx, 0x3f8
        in al, dx
        out dx, al
        cmp al, 0x71
        jne 7b
        mov al, 0x10
        out 0xf4, al
    3:  hlt
        jmp 3b
    "
}

crate::blob! {
    /// 64-bit Linux protocol: prints the command line that boot_params (rsi) points at, a newline,
    /// the size of the initrd in hexadecimal (8 digits), a newline, and the number of e820 entries
    /// as one digit, a newline; debug-exit value 0.
    boot_params64, "
    .code64
        mov rbp, rsi
        mov edx, 0x3f8
        mov esi, [rbp + 0x228]
        cld
    7:  lodsb
        test al, al
        jz 2f
        out dx, al
        jmp 7b
    2:  mov al, 0x0a
        out dx, al
        mov ebx, [rbp + 0x21c]
        mov ecx, 8
    3:  rol ebx, 4
        mov eax, ebx
        and eax, 15
        cmp al, 10
        jb 4f
        add al, 0x27
    4:  add al, 0x30
        out dx, al
        loop 3b
        mov al, 0x0a
        out dx, al
        mov al, [rbp + 0x1e8]
        add al, 0x30
        out dx, al
        mov al, 0x0a
        out dx, al
        xor eax, eax
        out 0xf4, al
    5:  hlt
        jmp 5b
    "
}

crate::blob! {
    /// 32-bit PVH: checks hvm_start_info's magic at ebx, prints `P` and the command line, or `?`
    /// if the magic is wrong; debug-exit value 0.
    pvh32, "
    .code32
        mov edx, 0x3f8
        mov al, 0x3f
        cmp dword ptr [ebx], 0x336ec578
        jne 3f
        mov al, 0x50
        out dx, al
        mov esi, [ebx + 24]
        cld
    7:  lodsb
        test al, al
        jz 2f
        out dx, al
        jmp 7b
    2:  mov al, 0x0a
    3:  out dx, al
        xor eax, eax
        out 0xf4, al
    4:  hlt
        jmp 4b
    "
}

crate::blob! {
    /// 32-bit multiboot 1: checks the magic in eax, prints `M`, the number of modules as a digit,
    /// the command line and a newline, or `?` if the magic is wrong; debug-exit value 0.
    multiboot32, "
    .code32
        cmp eax, 0x2badb002
        mov edx, 0x3f8
        mov al, 0x3f
        jne 3f
        mov al, 0x4d
        out dx, al
        mov eax, [ebx + 20]
        add al, 0x30
        out dx, al
        mov esi, [ebx + 16]
        cld
    7:  lodsb
        test al, al
        jz 2f
        out dx, al
        jmp 7b
    2:  mov al, 0x0a
    3:  out dx, al
        xor eax, eax
        out 0xf4, al
    4:  hlt
        jmp 4b
    "
}

crate::blob! {
    /// 64-bit Linux protocol: the command line begins with the number of vCPUs. Starts all the
    /// others with INIT and SIPI through the x2APIC; each vCPU, the boot one too,
    /// writes a `.` to COM1, and the last one ends the guest with debug-exit value 0. Uses the
    /// page at 0x8000 for the trampoline and the one at 0x7f000 for its count.
    smp64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  mov dword ptr [0x7f000], ebx
    ", crate::parts::start_others!("6f", "8f"), "
        mov edx, 0x3f8
        mov al, 0x2e
        out dx, al
        lock dec dword ptr [0x7f000]
        jnz 4f
        xor eax, eax
        out 0xf4, al
    4:  hlt
        jmp 4b
    6:
    .code16
        mov dx, 0x3f8
        mov al, 0x2e
        out dx, al
        mov ax, 0x7f00
        mov ds, ax
        lock dec dword ptr ds:[0]
        jnz 5f
        xor ax, ax
        out 0xf4, al
    5:  hlt
        jmp 5b
    8:
    .code64
    ")
}
