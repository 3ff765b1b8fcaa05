// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! 64-bit guests that try the monitor's own manners: its console under load, the serial port's
//! interrupt, the power button.

crate::blob! {
    /// Writes `x` to COM1 for ever.
    flood64, "
    .code64
        mov edx, 0x3f8
        mov al, 0x78
    7:  out dx, al
        jmp 7b
    "
}

crate::blob! {
    /// Says \"ready\" and a newline, and echoes what comes in on COM1 when the port's interrupt
    /// says so: GSI 4 through the IOAPIC, vector 0x24, asleep in HLT meanwhile. A `q` ends it
    /// with debug-exit value 0x10 (status 0x21). Uses memory from 0x30000 to 0x40000.
    echo_irq64, concat!("
    .code64
        mov esp, 0x40000
    ", crate::parts::com1_interrupt!("5f", "6f"), "
        mov edx, 0x3fc
        mov al, 0x0b
        out dx, al
        mov edx, 0x3f9
        mov al, 1
        out dx, al
        lea rsi, [rip + 8f]
        mov ecx, 6
        mov edx, 0x3f8
        cld
    2:  lodsb
        out dx, al
        loop 2b
    7:  sti
        hlt
        jmp 7b
    5:  mov edx, 0x3fd
        in al, dx
        test al, 1
        jz 4f
        mov edx, 0x3f8
        in al, dx
        out dx, al
        cmp al, 0x71
        jne 5b
        mov al, 0x10
        out 0xf4, al
    4:  ", crate::parts::end_of_interrupt!(), "
        iretq
    6:  .word 0x24f
        .quad 0x30000
    8:  .ascii \"ready\\n\"
    ")
}

crate::blob! {
    /// Makes each interrupt of COM1 as dear as it can: its pin of the IOAPIC, 4, is level-triggered and gets
    /// another vector each round; then a dot is written, of which the transmitter interrupts, and that is
    /// acknowledged at the IOAPIC's EOI register. With a command line that begins with `1` the transmitter
    /// does not interrupt, but input does. Says \"ready\" and a newline after 100 rounds, and goes on; from then
    /// on a byte of what comes in on COM1 is echoed each round, polled. A `q` ends it with debug-exit value 0x10
    /// (status 0x21). At the power button it says \"button\" and a newline, and powers off. Takes no interrupt.
    /// Entered by Linux's 64-bit protocol; uses memory from 0x32000 to 0x33000.
    reroute64, "
    .code64
        mov rcx, cr3
        mov rdi, [rcx]
        and rdi, -4096
        mov qword ptr [rdi + 24], 0x32003   // the fourth GiB
        mov edi, 0x32000
        mov eax, 0xfec0009b                 // 2 MiB each, uncached
        mov [rdi + 502 * 8], rax
        mov eax, 0xfee0009b
        mov [rdi + 503 * 8], rax
        mov cr3, rcx
        mov ebp, 0xfee00000
        mov dword ptr [rbp + 0xf0], 0x1ff
        mov edi, 0xfec00000
        mov dword ptr [rdi], 0x19           // pin 4, destination
        mov dword ptr [rdi + 0x10], 0
        mov edx, 0x602                      // it listens to the button
        mov al, 1
        out dx, al
        mov esi, [rsi + 0x228]              // the command line
        mov al, [rsi]
        and al, 3
        mov edx, 0x3f9
        out dx, al
        xor ecx, ecx
    2:  inc ecx
        mov ebx, ecx
        and ebx, 0x3f
        add ebx, 0x8040
        mov dword ptr [rdi], 0x18
        mov [rdi + 0x10], ebx
        mov edx, 0x3f8
        mov al, 0x2e
        out dx, al
        mov edx, 0x3fa                      // which the port forgets when it is read
        in al, dx
        movzx ebx, bl
        mov [rdi + 0x40], ebx               // EOI
        cmp ecx, 100
        jb 2b
        ja 3f
        lea rsi, [rip + 8f]
        mov r8d, 6
        jmp 6f
    3:  mov edx, 0x602
        in al, dx
        test al, 1
        jnz 4f
        mov edx, 0x3fd
        in al, dx
        test al, 1
        jz 2b
        mov edx, 0x3f8
        in al, dx
        out dx, al
        cmp al, 0x71
        mov edx, 0x3fa
        in al, dx
        mov [rdi + 0x40], ebx
        jne 2b
        mov al, 0x10
        out 0xf4, al
    4:  lea rsi, [rip + 9f]
        mov r8d, 7
        call 5f
        mov edx, 0x600
        mov al, 0x34
        out dx, al
    7:  hlt
        jmp 7b
    6:  call 5f
        jmp 2b
    5:  mov edx, 0x3f8
        cld
    10: lodsb
        out dx, al
        dec r8d
        jnz 10b
        ret
    8:  .ascii \"ready\\n\"
    9:  .ascii \"button\\n\"
    "
}

crate::blob! {
    /// Tells the ACPI event device that it listens, says \"up\" and a newline, polls the device
    /// until the power button is pressed, says \"button\" and a newline, and powers off.
    button64, "
    .code64
        mov edx, 0x602
        mov al, 1
        out dx, al
        mov edx, 0x3f8
        mov al, 0x75
        out dx, al
        mov al, 0x70
        out dx, al
        mov al, 0x0a
        out dx, al
        mov edx, 0x602
    7:  in al, dx
        test al, 1
        jz 7b
        lea rsi, [rip + 8f]
        mov ecx, 7
        mov edx, 0x3f8
        cld
    2:  lodsb
        out dx, al
        loop 2b
        mov edx, 0x600
        mov al, 0x34
        out dx, al
    4:  hlt
        jmp 4b
    8:  .ascii \"button\\n\"
    "
}

crate::blob! {
    /// The same, but it does not care about the button: spins for ever.
    deaf64, "
    .code64
        mov edx, 0x602
        mov al, 1
        out dx, al
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
    /// Says \"up\" and a newline and halts with interrupts off: nothing can wake it.
    halt64, "
    .code64
        cli
        mov edx, 0x3f8
        mov al, 0x75
        out dx, al
        mov al, 0x70
        out dx, al
        mov al, 0x0a
        out dx, al
    7:  hlt
        jmp 7b
    "
}

/// How many bytes each vCPU of [`chorus64`] writes.
pub const CHORUS_BYTES: usize = 3000;

crate::blob! {
    /// As many vCPUs as the command line's number says write [`CHORUS_BYTES`] bytes each to COM1, all at once: the
    /// first one `A`s, each of the others a letter of its own. The last to be done ends the guest with debug-exit value
    /// 0 (status 1). Starts the others by INIT and SIPI to all, through the x2APIC; vector 8.
    chorus64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  mov dword ptr [0x7f000], ebx
        mov byte ptr [0x7f004], 0x42
    ", crate::parts::start_others!("6f", "8f"), "
        mov edx, 0x3f8
        mov al, 0x41
        mov ecx, 3000
    7:  out dx, al
        dec ecx
        jnz 7b
        lock dec dword ptr [0x7f000]
        jnz 4f
        xor eax, eax
        out 0xf4, al
    4:  hlt
        jmp 4b
    6:
    .code16
        mov ax, 0x7f00
        mov ds, ax
        mov al, 1
        lock xadd byte ptr ds:[4], al
        mov dx, 0x3f8
        mov cx, 3000
    7:  out dx, al
        dec cx
        jnz 7b
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

crate::blob! {
    /// Asks 1,000 times for what is not there: OUT to port 0x5658 and IN from port 0x511. Then it ends
    /// with debug-exit value 0 (status 1).
    absent64, "
    .code64
        mov ecx, 1000
    2:  mov edx, 0x5658
        out dx, al
        mov edx, 0x511
        in al, dx
        loop 2b
        xor eax, eax
        out 0xf4, al
    3:  hlt
        jmp 3b
    "
}

crate::blob! {
    /// Says \"up\" and a newline and sends INIT to its own processor, the boot one. Uses memory from 0x32000
    /// to 0x33000.
    init_self64, "
    .code64
        mov rcx, cr3
        mov rdi, [rcx]
        and rdi, -4096
        mov qword ptr [rdi + 24], 0x32003   // the fourth GiB
        mov edi, 0x32000
        mov eax, 0xfee0009b                 // 2 MiB, uncached
        mov [rdi + 503 * 8], rax
        mov cr3, rcx
        mov edx, 0x3f8
        mov al, 0x75
        out dx, al
        mov al, 0x70
        out dx, al
        mov al, 0x0a
        out dx, al
        mov ebp, 0xfee00000
        mov dword ptr [rbp + 0xf0], 0x1ff
        mov dword ptr [rbp + 0x310], 0
        mov dword ptr [rbp + 0x300], 0x4500
    7:  jmp 7b
    "
}
