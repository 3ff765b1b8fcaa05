// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! 64-bit guests of the Linux protocol that write much to COM1, to see that nothing is lost, doubled
//! or late when a monitor has KVM keep those writes.

/// The bytes that [`polled64`] writes, `count` of them: `0` to `z`, again and again.
pub fn pattern(count: usize) -> Vec<u8> {
    (b'0'..=b'z').cycle().take(count).collect()
}

crate::blob! {
    /// The command line is a number and a letter, such as `10000e`. Writes as many bytes of the
    /// [`pattern`] to COM1 (at least one) and asks the port nothing meanwhile. Then, by the letter:
    ///
    /// - `e`: debug-exit value 0, by the instruction after the last byte.
    /// - `t`: a triple fault, likewise; `p`: power-off by ACPI; `r`: a reset by the i8042.
    /// - `h`: \"end\" and a newline; then halts with interrupts off, for ever.
    /// - `i`: sixteen times `!`, one each time the port's interrupt says that its transmitter is
    ///   empty, asleep in HLT meanwhile (GSI 4 through the IOAPIC, vector 0x24); debug-exit value 0. The
    ///   IDT is at 0x30000, the stack below 0x40000.
    /// - `d`: puts 0x5a into the divisor latch's low byte, sends `L` round the port's loop, and
    ///   writes what came back, what the latch's low byte reads as, and a newline; debug-exit value 0.
    ///
    /// A capital does the same some hundred thousand instructions after the last byte.
    polled64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  add al, 0x30
        mov ebp, eax
        mov edx, 0x3f8
        mov al, 0x30
    3:  out dx, al
        inc al
        cmp al, 0x7b
        jne 4f
        mov al, 0x30
    4:  dec ebx
        jnz 3b
        test ebp, 0x20
        jnz 2f
        or ebp, 0x20
        mov ecx, 300000
    4:  dec ecx
        jnz 4b
    2:  cmp ebp, 0x65
        je 8f
        cmp ebp, 0x68
        je 5f
        cmp ebp, 0x69
        je 6f
        cmp ebp, 0x70
        je 1f
        cmp ebp, 0x72
        je 4f
        cmp ebp, 0x74
        jne 3f
        lidt [rip + 2f]
        ud2
    2:  .quad 0, 0

    1:  mov edx, 0x600
        mov al, 0x34
        out dx, al
        cli
        hlt
        jmp 1b
    4:  mov al, 0xfe
        out 0x64, al
        cli
        hlt
        jmp 4b
    3:
        mov edx, 0x3fb
        mov al, 0x83
        out dx, al
        mov edx, 0x3f8
        mov al, 0x5a
        out dx, al
        mov edx, 0x3fb
        mov al, 0x03
        out dx, al
        mov edx, 0x3fc
        mov al, 0x10
        out dx, al
        mov edx, 0x3f8
        mov al, 0x4c
        out dx, al
        in al, dx
        mov bl, al
        mov edx, 0x3fc
        mov al, 0
        out dx, al
        mov edx, 0x3fb
        mov al, 0x83
        out dx, al
        mov edx, 0x3f8
        in al, dx
        mov bh, al
        mov edx, 0x3fb
        mov al, 0x03
        out dx, al
        mov edx, 0x3f8
        mov al, bl
        out dx, al
        mov al, bh
        out dx, al
        mov al, 0x0a
        out dx, al
    8:  xor eax, eax
        out 0xf4, al
        cli
        hlt
        jmp 8b

    5:  mov al, 0x65
        out dx, al
        mov al, 0x6e
        out dx, al
        mov al, 0x64
        out dx, al
        mov al, 0x0a
        out dx, al
        cli
    9:  hlt
        jmp 9b

    6:  mov esp, 0x40000
    ", crate::parts::com1_interrupt!("2f", "3f"), "
        mov ebx, 16
        mov edx, 0x3fc
        mov al, 0x0b
        out dx, al
        mov edx, 0x3f9
        mov al, 2
        out dx, al
    9:  sti
        hlt
        jmp 9b
    2:  mov edx, 0x3fa
        in al, dx
        test ebx, ebx
        jz 8b
        dec ebx
        mov edx, 0x3f8
        mov al, 0x21
        out dx, al
    ", crate::parts::end_of_interrupt!(), "
        iretq
    3:  .word 0x24f
        .quad 0x30000
    ")
}

crate::blob! {
    /// Tries to change the byte at 0xffff0 and the four at 0xe0000, and says of each whether it could:
    /// `R` it reads as before, `W` as it was written. A newline; debug-exit value 0.
    rom64, "
    .code64
        mov edx, 0x3f8
        mov edi, 0xffff0
        mov bl, byte ptr [rdi]
        not bl
        mov byte ptr [rdi], bl
        mov al, 0x57
        cmp byte ptr [rdi], bl
        je 2f
        mov al, 0x52
    2:  out dx, al
        mov edi, 0xe0000
        mov ebx, dword ptr [rdi]
        not ebx
        mov dword ptr [rdi], ebx
        mov al, 0x57
        cmp dword ptr [rdi], ebx
        je 3f
        mov al, 0x52
    3:  out dx, al
        mov al, 0x0a
        out dx, al
        xor eax, eax
        out 0xf4, al
    7:  hlt
        jmp 7b
    "
}
