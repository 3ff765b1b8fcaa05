// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests to be debugged: instructions at known offsets, so that a debugger's test can say where it
//! expects to stop; and one that takes NMIs.

/// Offset of [`debug64`]'s loop: `inc rax`, three bytes.
pub const LOOP: u64 = 0x20;
/// Offset of the instruction behind it, the call of [`FUNCTION`].
pub const LOOP_CALL: u64 = 0x23;
/// Offset of [`debug64`]'s function, which writes EAX to [`COUNT`], in six bytes.
pub const FUNCTION: u64 = 0x60;
/// Offset of the instruction behind the write.
pub const FUNCTION_WRITTEN: u64 = 0x66;
/// Offset of the 4 bytes, 8-aligned, that the function writes.
pub const COUNT: u64 = 0x80;
/// Offset of the byte that ends the guest when it is not 0.
pub const END: u64 = 0x88;
crate::blob! {
    /// 64-bit: says \"up\", then counts in RAX for ever, with the count in memory at [`COUNT`]. A byte
    /// other than 0 at [`END`] ends it with debug-exit value 0x10 (status 0x21). Its stack is the page
    /// below 0x80000.
    debug64, "
    .code64
        mov esp, 0x80000
        mov edx, 0x3f8
        jmp 8f
        .org guest_debug64_start + 0x20, 0x90
    7:  inc rax
        call 2f
        cmp byte ptr [rip + 5f], 0
        je 7b
        mov al, 0x10
        out 0xf4, al
    4:  hlt
        jmp 4b
        .org guest_debug64_start + 0x60, 0x90
    2:  mov [rip + 6f], eax
        nop
        ret
        .org guest_debug64_start + 0x80, 0
    6:  .quad 0
    5:  .byte 0
        .org guest_debug64_start + 0x90, 0x90
    8:  mov al, 0x75
        out dx, al
        mov al, 0x70
        out dx, al
        mov al, 0x0a
        out dx, al
        xor eax, eax
        jmp 7b
    "
}

/// Offset of [`debug16`]'s loop: `inc ax`, one byte.
pub const LOOP16: u64 = 0x10;
/// Offset of the write behind it (`mov ds:[0x2000], ax`, four bytes).
pub const WRITE16: u64 = 0x11;
/// Offset of what follows the write, a jump to [`LOOP16`].
pub const WRITTEN16: u64 = 0x15;
/// Where [`debug16`] writes.
pub const COUNT16: u64 = 0x2000;

crate::blob! {
    /// 16-bit real mode: counts in AX for ever, with the count at [`COUNT16`].
    debug16, "
    .code16
        xor ax, ax
        .org guest_debug16_start + 0x10, 0x90
    7:  inc ax
        mov ds:[0x2000], ax
        jmp 7b
    "
}

crate::blob! {
    /// 16-bit real mode: an `int3`, whose handler (set in the table at 0) writes 3 to port 0x10, and
    /// then a halt. Wants CS and DS at 0 and a stack.
    own_int3, "
    .code16
        call 7f                             // pushes the address of the handler, which follows
        mov al, 3
        out 0x10, al
        iret
    7:  pop bx
        mov ds:[12], bx
        mov word ptr ds:[14], 0
        int3
    3:  hlt
        jmp 3b
    "
}

/// Offset in [`own_step`] of the first instruction behind the setting of its handler.
pub const OWN_STEP_READY: u64 = 0x40;

crate::blob! {
    /// 16-bit real mode: steps itself over one `nop` with the trap flag; the handler of #DB writes 1 to
    /// port 0x10 and clears the flag for the return. Then a halt. Wants CS and DS at 0 and a stack.
    own_step, "
    .code16
        call 7f                             // pushes the address of the handler, which follows
        mov al, 1
        out 0x10, al
        push bp
        mov bp, sp
        and word ptr [bp + 6], 0xfeff
        pop bp
        iret
    7:  pop bx
        mov ds:[4], bx
        mov word ptr ds:[6], 0
        .org guest_own_step_start + 0x40, 0x90
        pushf
        pop ax
        or ax, 0x100
        push ax
        popf
        nop
    3:  hlt
        jmp 3b
    "
}

crate::blob! {
    /// 16-bit real mode: writes 0x55 to port 0x11 and halts, with interrupts off, for ever. Each NMI is
    /// one write of 2 to port 0x10. Wants CS and DS at 0 and a stack.
    nmi, "
    .code16
        cli
        call 7f                             // pushes the address of the handler, which follows
        mov al, 2
        out 0x10, al
        iret
    7:  pop bx
        mov ds:[8], bx
        mov word ptr ds:[10], 0
        mov al, 0x55
        out 0x11, al
    3:  hlt
        jmp 3b
    "
}
