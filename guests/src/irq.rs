// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that wait for interrupts and say which one came.
//!
//! They never halt: while nothing comes they write [`IDLE`] again and again, so that a host can
//! bound how long it waits by counting exits, without a clock.

/// Where these guests are loaded and entered: their tables hold absolute addresses.
pub const LOAD: u64 = 0x1000;
/// Written once, when interrupts are about to be enabled.
pub const READY: u16 = 0x80;
/// The number of the vector that came.
pub const VECTOR: u16 = 0x81;
/// Written again and again while nothing comes.
pub const IDLE: u16 = 0x82;

crate::blob! {
    /// Real mode, with both PICs in the kernel: ISA interrupt 4 is edge-triggered and comes as
    /// vector 0x24, 5 is level-triggered and comes as 0x25. Each handler reports before it
    /// acknowledges. Uses memory below 0x8000.
    pic, "
    .code16
        cli
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x8000
        mov word ptr [0x24 * 4], 0x1080
        mov word ptr [0x24 * 4 + 2], ax
        mov word ptr [0x25 * 4], 0x10a0
        mov word ptr [0x25 * 4 + 2], ax
        mov al, 0x11            // ICW1: edge, cascade, ICW4 follows
        out 0x20, al
        mov al, 0x20            // ICW2: vectors from 0x20
        out 0x21, al
        mov al, 0x04            // ICW3: the slave is on pin 2
        out 0x21, al
        mov al, 0x01            // ICW4: 8086 mode
        out 0x21, al
        mov al, 0xcf            // all masked but 4 and 5
        out 0x21, al
        mov al, 0x20            // ELCR: 5 is level-triggered
        mov dx, 0x4d0
        out dx, al
        out 0x80, al
        sti
    2:  out 0x82, al
        jmp 2b
    .balign 128
        mov al, 0x24
        out 0x81, al
        mov al, 0x20
        out 0x20, al
        iret
    .balign 32
        mov al, 0x25
        out 0x81, al
        mov al, 0x20
        out 0x20, al
        iret
    "
}

/// The guests of the local APIC, with something to do before interrupts are enabled.
macro_rules! with_apic {
    ($setup:literal) => {
        concat!(
            "
    .code32
        mov esp, 0x8000
        lgdt [0x1100]
        lidt [0x1108]
        mov dword ptr [0x2000 + 0x50 * 8], 0x00081140
        mov dword ptr [0x2000 + 0x50 * 8 + 4], 0x8e00
        mov dword ptr [0x2000 + 0x51 * 8], 0x00081160
        mov dword ptr [0x2000 + 0x51 * 8 + 4], 0x8e00
        mov dword ptr [0xfee000f0], 0x1ff   // spurious vector 0xff, APIC enabled
    ",
            $setup,
            "
        out 0x80, al
        sti
    2:  out 0x82, al
        jmp 2b
    .balign 256
        .word 0x17              // GDTR
        .long 0x1110
        .word 0
        .word 0x7ff             // IDTR
        .long 0x2000
        .word 0
        .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
    .balign 64
        mov al, 0x50
        out 0x81, al
        mov dword ptr [0xfee000b0], 0       // EOI
        mov esp, 0x8000
        sti
        jmp 2b
    .balign 32
        mov al, 0x51
        out 0x81, al
        mov dword ptr [0xfee000b0], 0
        mov esp, 0x8000
        sti
        jmp 2b
    "
        )
    };
}

crate::blob! {
    /// 32-bit flat protected mode without paging: enables its local APIC and reports vectors 0x50
    /// and 0x51. Brings its GDT (code 0x08, data 0x10). Uses memory below 0x8000. Its handlers
    /// throw their frames away and go back to the idle loop: KVM's interpreter has no `iret` outside
    /// real mode.
    apic, with_apic!("")
}

crate::blob! {
    /// The same, and it programs the IOAPIC at 0xfec00000: pin 4 edge-triggered as vector 0x50, pin
    /// 5 level-triggered as 0x51, both to APIC 0.
    ioapic, with_apic!("
        mov dword ptr [0xfec00000], 0x19    // pin 4, destination
        mov dword ptr [0xfec00010], 0
        mov dword ptr [0xfec00000], 0x18
        mov dword ptr [0xfec00010], 0x50
        mov dword ptr [0xfec00000], 0x1b    // pin 5
        mov dword ptr [0xfec00010], 0
        mov dword ptr [0xfec00000], 0x1a
        mov dword ptr [0xfec00010], 0x8051
    ")
}

/// Where [`counter`] counts: 32 bits a vector, at `COUNTS + 4 * vector`.
pub const COUNTS: u64 = 0x9000;
/// The first vector that [`counter`] counts.
pub const COUNTED: u8 = 0x50;
/// The first that it does not count any more but reports at [`VECTOR`].
pub const REPORTED: u8 = 0x5f;

crate::blob! {
    /// As [`apic`], but it counts its vectors, [`COUNTED`] to below [`REPORTED`], in memory and sleeps in HLT meanwhile,
    /// so that it needs no exit. A vector is counted before its EOI. Programs the IOAPIC: pin 20 edge-triggered as
    /// vector 0x50, pin 21 level-triggered as 0x51, pins that lead to no PIC. Uses memory below 0xa000.
    counter, "
    .code32
        mov esp, 0x8000
        lgdt [0x1200]
        lidt [0x1208]
        mov edi, 0x2000 + 0x50 * 8
        mov eax, 0x00081240
    3:  mov [edi], eax
        mov dword ptr [edi + 4], 0x8e00
        add eax, 32
        add edi, 8
        cmp edi, 0x2000 + 0x60 * 8
        jne 3b
        mov dword ptr [0xfee000f0], 0x1ff
        mov dword ptr [0xfec00000], 0x39    // pin 20, destination
        mov dword ptr [0xfec00010], 0
        mov dword ptr [0xfec00000], 0x38
        mov dword ptr [0xfec00010], 0x50
        mov dword ptr [0xfec00000], 0x3b    // pin 21
        mov dword ptr [0xfec00010], 0
        mov dword ptr [0xfec00000], 0x3a
        mov dword ptr [0xfec00010], 0x8051
        out 0x80, al
    2:  sti
        hlt
        jmp 2b
    .balign 512
        .word 0x17              // GDTR
        .long 0x1210
        .word 0
        .word 0x7ff             // IDTR
        .long 0x2000
        .word 0
        .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
    .balign 64
    .irp vector, 0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59, 0x5a, 0x5b, 0x5c, 0x5d, 0x5e
    .balign 32
        inc dword ptr [0x9000 + \\vector * 4]
        mov dword ptr [0xfee000b0], 0       // EOI
        jmp 4f
    .endr
    .balign 32
        mov al, 0x5f
        out 0x81, al
        mov dword ptr [0xfee000b0], 0
    4:  mov esp, 0x8000
        jmp 2b
    "
}

/// Where [`accessor`] asks what to do, three times: the address, the value, and the width in bytes
/// of a write, or of a read plus [`READ`].
pub const ASK: u16 = 0x83;
/// Where [`accessor`] says what it read, after a read.
pub const ANSWER: u16 = 0x84;
/// Makes an access of [`accessor`] a read.
pub const READ: u32 = 0x10;

crate::blob! {
    /// 32-bit flat protected mode without paging, interrupts disabled: enables its local APIC, and
    /// accesses memory as it is told at [`ASK`], with 1, 2 or 4 bytes.
    accessor, "
    .code32
        mov dword ptr [0xfee000f0], 0x1ff
    2:  in eax, 0x83
        mov ebx, eax
        in eax, 0x83
        mov ecx, eax
        in eax, 0x83
        cmp eax, 1
        je 3f
        cmp eax, 2
        je 4f
        cmp eax, 4
        je 5f
        cmp eax, 0x11
        je 6f
        cmp eax, 0x12
        je 7f
        mov eax, [ebx]
        jmp 8f
    3:  mov [ebx], cl
        jmp 2b
    4:  mov [ebx], cx
        jmp 2b
    5:  mov [ebx], ecx
        jmp 2b
    6:  movzx eax, byte ptr [ebx]
        jmp 8f
    7:  movzx eax, word ptr [ebx]
    8:  out 0x84, eax
        jmp 2b
    "
}
