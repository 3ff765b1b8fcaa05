// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that does what a list of [`Op`]s says to the virtio-mmio device at [`REGISTERS`], rightly or wrongly, and
//! takes its interrupts: so that a test writes its driver in its own language.

use crate::image;

/// The first virtio device's registers.
pub const REGISTERS: u32 = 0xc000_0000;
/// Its pin of the IOAPIC.
pub const PIN: u32 = 16;
/// How many interrupts have come, 32 bits. Each is acknowledged at the device, in [`SEEN`].
pub const INTERRUPTS: u32 = 0x3_4000;
/// All bits of `InterruptStatus` that interrupts have brought, 32 bits.
pub const SEEN: u32 = 0x3_4004;
/// Memory from here to 0x80000 is the list's own, zeros at the start.
pub const MEMORY: u32 = 0x4_0000;

/// What the guest does. Addresses are below 4 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Ends the guest with this debug-exit value.
    End(u8),
    /// Writes 32 bits.
    Write(u32, u32),
    /// Writes 16 bits.
    Write16(u32, u16),
    /// Asleep in HLT until the 32 bits at the address, under the mask, are the value. Only for what an interrupt's
    /// handler changes or what is changed before an interrupt: nothing else wakes it.
    Sleep {
        /// Where.
        address: u32,
        /// What is to be there.
        value: u32,
        /// Bits that count.
        mask: u32,
    },
    /// The same, awake.
    Poll {
        /// Where.
        address: u32,
        /// What is to be there.
        value: u32,
        /// Bits that count.
        mask: u32,
    },
    /// Writes the 32 bits at an address to COM1, eight hexadecimal digits, and a newline.
    Show(u32),
    /// Writes a character to COM1.
    Say(u8),
    /// Writes to the IOAPIC: the register, the value.
    Ioapic(u32, u32),
}

impl Op {
    fn words(self) -> [u32; 4] {
        match self {
            Op::End(value) => [0, 0, value.into(), 0],
            Op::Write(address, value) => [1, address, value, 0],
            Op::Write16(address, value) => [2, address, value.into(), 0],
            Op::Sleep {
                address,
                value,
                mask,
            } => [3, address, value, mask],
            Op::Poll {
                address,
                value,
                mask,
            } => [4, address, value, mask],
            Op::Show(address) => [5, address, 0, 0],
            Op::Say(character) => [6, 0, character.into(), 0],
            Op::Ioapic(register, value) => [7, register, value, 0],
        }
    }
}

/// An ELF64 kernel for Linux's 64-bit protocol that does this.
pub fn driver(ops: &[Op]) -> Vec<u8> {
    let mut code = driver64().to_vec();
    for op in ops {
        code.extend(op.words().into_iter().flat_map(u32::to_le_bytes));
    }
    image::elf64(&code)
}

crate::blob! {
    /// The code of [`driver`], whose list is to come behind it. The device's pin is edge-triggered, vector 0x24. Uses
    /// memory from 0x30000 to 0x40000.
    driver64, concat!("
    .code64
        mov esp, 0x40000
    ", crate::parts::com1_interrupt!("5f", "6f"), "
        mov eax, 0xc000009b                 // the device's registers, 2 MiB, uncached
        mov edi, 0x32000
        mov [rdi], rax
        mov rcx, cr3
        mov cr3, rcx
        mov edi, 0xfec00000
        mov dword ptr [rdi], 0x18           // not COM1's pin
        mov dword ptr [rdi + 0x10], 0x10024
        mov dword ptr [rdi], 0x31           // pin 16, destination
        mov dword ptr [rdi + 0x10], 0
        mov dword ptr [rdi], 0x30
        mov dword ptr [rdi + 0x10], 0x24
        mov dword ptr [0x34000], 0
        mov dword ptr [0x34004], 0
        lea rbx, [rip + 99f]
        sti
    2:  mov eax, [rbx]
        mov edi, [rbx + 4]
        mov ecx, [rbx + 8]
        mov edx, [rbx + 12]
        add rbx, 16
        cmp eax, 1
        jb 30f
        je 31f
        cmp eax, 3
        jb 32f
        je 33f
        cmp eax, 5
        jb 34f
        je 35f
        cmp eax, 6
        je 36f
        mov esi, 0xfec00000
        mov [rsi], edi
        mov [rsi + 0x10], ecx
        jmp 2b
    30: mov eax, ecx
        out 0xf4, al
        cli
        hlt
        jmp 30b
    31: mov [rdi], ecx
        jmp 2b
    32: mov [rdi], cx
        jmp 2b
    33: cli                                 // no interrupt between the look and the sleep
        mov eax, [rdi]
        and eax, edx
        cmp eax, ecx
        je 37f
        sti
        hlt
        jmp 33b
    37: sti
        jmp 2b
    34: mov eax, [rdi]
        and eax, edx
        cmp eax, ecx
        jne 34b
        jmp 2b
    36: mov eax, ecx
        mov edx, 0x3f8
        out dx, al
        jmp 2b
    35: mov esi, [rdi]
        mov ecx, 8
        mov edx, 0x3f8
    38: rol esi, 4
        mov eax, esi
        and eax, 15
        cmp al, 10
        jb 39f
        add al, 0x27
    39: add al, 0x30
        out dx, al
        loop 38b
        mov al, 0x0a
        out dx, al
        jmp 2b
    5:  push rax
        push rdi
        mov edi, 0xc0000060                 // InterruptStatus, InterruptACK
        mov eax, [rdi]
        mov [rdi + 4], eax
        or dword ptr [0x34004], eax
        inc dword ptr [0x34000]
    ", crate::parts::end_of_interrupt!(), "
        pop rdi
        pop rax
        iretq
    6:  .word 0x24f
        .quad 0x30000
    .balign 16
    99:
    ")
}
