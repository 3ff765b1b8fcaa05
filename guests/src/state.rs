// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest whose work can be interrupted anywhere, saved, and finished elsewhere: what it says at its end depends on all
//! that it did before, and on nothing else.

/// Where [`checksum`] reads how many rounds it does, a 32-bit number that the host writes before it starts.
pub const ROUNDS: u64 = 0x800;
/// Where it reads how many ticks of its timer it waits for at least.
pub const TICKS: u64 = 0x804;
/// Read once a round: 32 bits that go into the checksum.
pub const INPUT: u16 = 0x11;
/// The same by memory: 32 bits.
pub const INPUT_MMIO: u64 = 0xd0008;
/// The number of the round that is over.
pub const ROUND: u16 = 0x10;
/// Written again and again once the rounds are over and ticks are awaited.
pub const WAITING: u16 = 0x12;
/// The checksum.
pub const RESULT: u16 = 0x20;

crate::blob! {
    /// 16-bit real mode, position-independent, for two vCPUs at most: EBX is the vCPU's number. Wants segments at 0 and
    /// memory from 0 to 64 KiB alone; uses all of it below 0x1000 and from 0x4000 to 0x6000.
    ///
    /// Works in registers, in memory, with [`INPUT`] and with [`INPUT_MMIO`], while the local APIC's timer in
    /// TSC-deadline mode (x2APIC, vector 0x40) interrupts it and is armed again by its own interrupt: one tick that is
    /// lost, and there is no other. Says its checksum at [`RESULT`] and halts.
    checksum, "
    .code16
        cli
        xor ax, ax
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov ax, 0xd000
        mov fs, ax
        movzx ebp, bx
        shl ebp, 12
        add ebp, 0x4000                 // this vCPU's page: a table, at 0x900 the ticks, the stack
        mov esp, ebp
        add esp, 0x1000
        call 1f
        push eax                        // the timer's handler
        push ecx
        push edx
        inc dword ptr [ebp + 0x900]
        xor eax, eax
        xor edx, edx
        mov ecx, 0x80b                  // EOI
        wrmsr
        rdtsc
        add eax, 10000000
        adc edx, 0
        mov ecx, 0x6e0
        wrmsr
        pop edx
        pop ecx
        pop eax
        iret
    1:  pop ax                          // where the handler is
        mov word ptr [0x40 * 4], ax
        mov word ptr [0x40 * 4 + 2], 0
        mov ecx, 0x1b                   // x2APIC
        rdmsr
        or eax, 0xc00
        wrmsr
        xor edx, edx
        mov ecx, 0x80f
        mov eax, 0x1ff
        wrmsr
        mov ecx, 0x832                  // the timer: TSC-deadline mode, vector 0x40
        mov eax, 0x40040
        wrmsr
        rdtsc
        add eax, 10000000
        adc edx, 0
        mov ecx, 0x6e0
        wrmsr
        xor edi, edi
        mov esi, 0x811c9dc5
        add esi, ebx
        sti
    2:  mov dx, 0x11
        in eax, dx
        xor esi, eax
        imul esi, esi, 0x01000193
        mov eax, dword ptr fs:[8]
        add esi, eax
        rol esi, 5
        mov ecx, edi
        and ecx, 0x7f
        mov eax, dword ptr [ebp + ecx * 4]
        add eax, esi
        rol eax, 7
        mov dword ptr [ebp + ecx * 4], eax
        xor esi, eax
        mov ecx, 40
    3:  imul esi, esi, 1664525
        add esi, 1013904223
        dec ecx
        jnz 3b
        mov eax, edi
        out 0x10, eax
        inc edi
        cmp edi, dword ptr [0x800]
        jne 2b
    4:  out 0x12, al
        mov eax, dword ptr [ebp + 0x900]
        cmp eax, dword ptr [0x804]
        jb 4b
        cli
        mov eax, esi
        out 0x20, eax
    6:  hlt
        jmp 6b
    "
}
