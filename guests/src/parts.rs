// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What several 64-bit guests begin with, as text for [`blob`](crate::blob).

/// The number at the start of the command line, of a kernel entered by Linux's 64-bit protocol: into `ebx`, with the
/// character behind it, less 0x30, in `al`, and on to the label `2` that follows. Uses `rsi` and `rax`.
macro_rules! command_line_number {
    () => {
        "
        mov esi, [rsi + 0x228]
        xor ebx, ebx
        xor eax, eax
        cld
    7:  lodsb
        sub al, 0x30
        cmp al, 9
        ja 2f
        imul ebx, ebx, 10
        add ebx, eax
        jmp 7b
    "
    };
}
pub(crate) use command_line_number;

/// COM1's interrupt, IRQ 4 through the PIC, as vector 0x24: the IDT at 0x30000 with a gate to the label `$handler`, the
/// IDT's register from the label `$idtr`, the PIC set up, all other pins masked. Uses `rax`, `rcx` and `rdi`.
macro_rules! com1_interrupt {
    ($handler:literal, $idtr:literal) => {
        concat!(
            "\n        lea rax, [rip + ",
            $handler,
            "]
        mov edi, 0x30240
        mov [rdi], ax
        mov cx, cs
        mov [rdi + 2], cx
        mov word ptr [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], ax
        shr rax, 16
        mov [rdi + 8], eax
        mov dword ptr [rdi + 12], 0
        lidt [rip + ",
            $idtr,
            "]
        mov al, 0x11
        out 0x20, al
        mov al, 0x20
        out 0x21, al
        mov al, 4
        out 0x21, al
        mov al, 1
        out 0x21, al
        mov al, 0xef
        out 0x21, al
    "
        )
    };
}
pub(crate) use com1_interrupt;
