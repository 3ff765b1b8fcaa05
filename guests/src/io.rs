// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that do I/O and nothing else: 16-bit real mode, every segment's base 0, ending in `hlt`.

crate::blob! {
    /// Reads and writes in every width, on ports from 0x500 and in the page at 0x8000. What each
    /// read gave is written back to the same place, all of its bits inverted, so that a device sees
    /// what the guest saw.
    io_widths, "
    .code16
        mov dx, 0x500
        in al, dx
        not al
        out dx, al
        mov dx, 0x502
        in ax, dx
        not ax
        out dx, ax
        mov dx, 0x504
        in eax, dx
        not eax
        out dx, eax

        mov al, byte ptr [0x8000]
        not al
        mov byte ptr [0x8000], al
        mov ax, word ptr [0x8002]
        not ax
        mov word ptr [0x8002], ax
        mov eax, dword ptr [0x8004]
        not eax
        mov dword ptr [0x8004], eax
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// `rep outsb` of "abcd" to port 0x510, `rep insw` of two words from port 0x512 over them, and
    /// `rep outsb` again. Its buffer is at 0x1100.
    io_strings, "
    .code16
        cld
        mov dword ptr [0x1100], 0x64636261
        mov si, 0x1100
        mov dx, 0x510
        mov cx, 4
        rep outsb
        mov di, 0x1100
        mov dx, 0x512
        mov cx, 2
        rep insw
        mov si, 0x1100
        mov dx, 0x510
        mov cx, 4
        rep outsb
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// Four bytes written across the end of the page at 0x8000 and read again.
    io_page_crossing, "
    .code16
        mov eax, 0x44332211
        mov dword ptr [0x8ffe], eax
        mov eax, dword ptr [0x8ffe]
        mov dx, 0x500
        out dx, eax
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// Writes 1, 2 and 1 with each width (a byte, a word, four bytes) to port 0x600, then the same
    /// to 0x8000: eighteen writes.
    io_doorbells, "
    .code16
        mov dx, 0x600
        mov al, 1
        out dx, al
        mov al, 2
        out dx, al
        mov al, 1
        out dx, al
        mov ax, 1
        out dx, ax
        mov ax, 2
        out dx, ax
        mov ax, 1
        out dx, ax
        mov eax, 1
        out dx, eax
        mov eax, 2
        out dx, eax
        mov eax, 1
        out dx, eax

        mov byte ptr [0x8000], 1
        mov byte ptr [0x8000], 2
        mov byte ptr [0x8000], 1
        mov word ptr [0x8000], 1
        mov word ptr [0x8000], 2
        mov word ptr [0x8000], 1
        mov dword ptr [0x8000], 1
        mov dword ptr [0x8000], 2
        mov dword ptr [0x8000], 1
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// As often as the word at 0x1100 says: a counter, from 0, to port 0x3f8 as a word, then to
    /// 0x8000. At the end one byte in from port 0x60.
    io_counters, "
    .code16
        mov cx, word ptr [0x1100]
        xor ax, ax
    2:  mov dx, 0x3f8
        out dx, ax
        mov word ptr [0x8000], ax
        inc ax
        dec cx
        jnz 2b
        mov dx, 0x60
        in al, dx
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// As often as the four bytes at 0x1100 say: one byte to port 0x3f8. Then it halts.
    io_serial, "
    .code16
        mov ecx, dword ptr [0x1100]
        mov dx, 0x3f8
        mov al, 0x2e
    2:  out dx, al
        dec ecx
        jnz 2b
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// For 64-bit mode: 1, 2 and 1 as eight bytes to 0x8000; then four bytes of 1, which have the
    /// same address.
    io_quads, "
    .code64
        mov edi, 0x8000
        mov eax, 1
        mov qword ptr [rdi], rax
        mov eax, 2
        mov qword ptr [rdi], rax
        mov eax, 1
        mov qword ptr [rdi], rax
        mov dword ptr [rdi], eax
    7:  hlt
        jmp 7b
    "
}

crate::blob! {
    /// For 64-bit mode with SSE moves: sixteen bytes, from 0x8fe4 by way of a register to 0x8ff4,
    /// which crosses a page's end.
    io_wide, "
    .code64
        mov esi, 0x8fe4
        mov edi, 0x8ff4
        movups xmm0, xmmword ptr [rsi]
        movups xmmword ptr [rdi], xmm0
    7:  hlt
        jmp 7b
    "
}
