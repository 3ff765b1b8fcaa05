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

/// Counts a pass in `r12`, and says its last digit on COM1. Uses `rax`, `rcx` and `rdx`.
macro_rules! say_pass {
    () => {
        "
        inc r12
        mov rax, r12
        xor edx, edx
        mov ecx, 10
        div rcx
        lea eax, [rdx + 0x30]
        mov edx, 0x3f8
        out dx, al
    "
    };
}
pub(crate) use say_pass;

/// On to the label `$again`, until a `q` comes on COM1: `!` then, and debug-exit value 0. Another character, and the label
/// `$wrong`, which is here, are debug-exit value 1. Uses `eax` and `edx`, and the label 4.
macro_rules! again_or_quit {
    ($again:literal, $wrong:literal) => {
        concat!(
            "
        mov edx, 0x3fd
        in al, dx
        test al, 1
        jz ",
            $again,
            "b
        mov edx, 0x3f8
        in al, dx
        cmp al, 0x71
        jne ",
            $wrong,
            "f
        mov al, 0x21
        out dx, al
        xor eax, eax
        out 0xf4, al
    4:  hlt
        jmp 4b
    ",
            $wrong,
            ":  mov al, 1
        out 0xf4, al
        jmp 4b
    "
        )
    };
}
pub(crate) use again_or_quit;

/// An IDT at 0x30000, its register from the label `$idtr`, with a gate at `$gate` (16 bytes a vector) to the label
/// `$handler`. No pin of a PIC interrupts. Uses `rax`, `rcx` and `rdi`.
macro_rules! interrupt_gate {
    ($handler:literal, $idtr:literal, $gate:literal) => {
        concat!(
            "\n        lea rax, [rip + ",
            $handler,
            "]
        mov edi, ",
            $gate,
            "
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
        mov al, 0xff                        // no pin of a PIC, where there is one
        out 0x21, al
        out 0xa1, al
    "
        )
    };
}
pub(crate) use interrupt_gate;

/// COM1's interrupt, GSI 4 through the IOAPIC, as vector 0x24, edge-triggered: the IDT at 0x30000 with a gate to the
/// label `$handler`, the IDT's register from the label `$idtr`, both APICs mapped by a page directory at 0x32000, the
/// local one enabled. For a guest whose tables map less than 3 GiB. Uses `rax`, `rcx` and `rdi`; leaves the local
/// APIC's address in `rbp`, for [`end_of_interrupt`].
macro_rules! com1_interrupt {
    ($handler:literal, $idtr:literal) => {
        concat!(
            crate::parts::interrupt_gate!($handler, $idtr, "0x30240"),
            "\n        mov rcx, cr3
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
        mov dword ptr [rdi], 0x19
        mov dword ptr [rdi + 0x10], 0
        mov dword ptr [rdi], 0x18
        mov dword ptr [rdi + 0x10], 0x24
    "
        )
    };
}
pub(crate) use com1_interrupt;

/// The end of an interrupt, where [`com1_interrupt`] was.
macro_rules! end_of_interrupt {
    () => {
        "
        mov dword ptr [rbp + 0xb0], 0
    "
    };
}
pub(crate) use end_of_interrupt;

/// The code from the label `$code` to the label `$end` is copied to 0x8000, and all other processors start there, by
/// INIT and SIPI to all through the x2APIC. Uses `eax`, `ecx`, `edx`, `rsi`, `rdi` and `ebp`.
macro_rules! start_others {
    ($code:literal, $end:literal) => {
        concat!(
            "\n        lea rsi, [rip + ",
            $code,
            "]
        mov edi, 0x8000
        lea rcx, [rip + ",
            $end,
            "]
        sub ecx, esi
        rep movsb
        mov ecx, 0x1b
        rdmsr
        or eax, 0xc00
        wrmsr
        mov ecx, 0x80f
        mov eax, 0x1ff
        xor edx, edx
        wrmsr
        mov ecx, 0x830
        mov eax, 0x000c4500
        wrmsr
        mov ebp, 10000
    3:  dec ebp
        jnz 3b
        mov eax, 0x000c4608
        wrmsr
    "
        )
    };
}
pub(crate) use start_others;

/// What the others do from there, in 16-bit mode, as [`tally`](crate::tally) has it: each counts, compares what it counts
/// in a register with what it counts in memory, and halts when it is told to stop, behind what `$stopped` does (0 is in
/// the zero flag of who is the last). One that finds another number ends the guest with debug-exit value 1.
macro_rules! others_count {
    ($stopped:literal) => {
        concat!(
            "
    .code16
        mov ax, 0x7f00
        mov ds, ax
        mov al, 1
        lock xadd byte ptr ds:[4], al
        xor ah, ah
        shl ax, 6
        add ax, 0x40
        mov di, ax
        xor ecx, ecx
    7:  inc ecx
        inc dword ptr ds:[di]
        cmp dword ptr ds:[di], ecx
        jne 9f
        cmp dword ptr ds:[8], 0
        je 7b
        lock dec dword ptr ds:[0]
        ",
            $stopped,
            "
    5:  hlt
        jmp 5b
    9:  mov al, 1
        out 0xf4, al
        jmp 5b
    "
        )
    };
}
pub(crate) use others_count;
