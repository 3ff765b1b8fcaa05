// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that ask their processor what the monitor wants to know. All are 16-bit real mode, entered
//! with code and data segments at 0, a stack, and memory from 0 to 64 KiB, but for what each says.

crate::blob!(
    /// For ever: reads a leaf from port 0x10 and a subleaf from 0x12, executes CPUID, and writes EAX, EBX,
    /// ECX and EDX to 0x20, 0x22, 0x24 and 0x26.
    cpuid,
    "
    .code16
    1:  in eax, 0x10
        mov esi, eax
        in eax, 0x12
        mov ecx, eax
        mov eax, esi
        cpuid
        out 0x20, eax
        mov eax, ebx
        out 0x22, eax
        mov eax, ecx
        out 0x24, eax
        mov eax, edx
        out 0x26, eax
        jmp 1b
    "
);

crate::blob!(
    /// For ever: reads the number of an MSR from port 0x10, and from 0x12 what to do: 0 reads it and writes
    /// its halves to 0x20 (low) and 0x22; else the value with this low half is written, and then the
    /// number to 0x24. A general protection fault writes the number to 0x26 instead.
    msrs,
    "
    .code16
        call 9f                             // pushes the address of the handler
        add sp, 6
        mov eax, ecx
        out 0x26, eax
        jmp 1f
    9:  pop word ptr [13 * 4]
        mov word ptr [13 * 4 + 2], cs
    1:  in eax, 0x10
        mov ecx, eax
        in eax, 0x12
        test eax, eax
        jnz 2f
        rdmsr
        out 0x20, eax
        mov eax, edx
        out 0x22, eax
        jmp 1b
    2:  xor edx, edx
        wrmsr
        mov eax, ecx
        out 0x24, eax
        jmp 1b
    "
);

crate::blob!(
    /// 64-bit, without an interrupt table: reads an MSR that no KVM has, and what comes of that is a
    /// triple fault.
    unknown_msr64,
    "
    .code64
        mov ecx, 0x4b564dee
        rdmsr
    1:  hlt
        jmp 1b
    "
);
