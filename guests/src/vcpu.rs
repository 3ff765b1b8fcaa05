// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that make a vCPU exit in every way, spin, halt, or fault. All are 16-bit real mode and
//! position-independent but for what each says.

crate::blob!(
    /// Port, string and memory-mapped accesses of every width, in a fixed order, then a halt.
    ///
    /// Wants segments at 0 and memory from 0 to 64 KiB alone; 0x2000 is its buffer, and 0xd0000 is
    /// where it does MMIO.
    /// - OUT 0x3f8: `al` 0x41, `ax` 0x4342, `eax` 0x47464544
    /// - IN 0x60 `al`, its value to OUT 0x80; IN 0x64 `eax`, to OUT 0x84 `eax`
    /// - `rep insb` of 4 from 0x70 to 0x2000, `rep outsb` of the 4 to 0x90
    /// - `rep insw` of 3 from 0x72, `rep outsw` of the 3 to 0x92
    /// - MMIO: write 1, 2, 4 bytes to 0xd0000, 0xd0002, 0xd0004; read 4 from 0xd0008, to OUT 0xa0
    exits,
    "
    .code16
        mov dx, 0x3f8
        mov al, 0x41
        out dx, al
        mov ax, 0x4342
        out dx, ax
        mov eax, 0x47464544
        out dx, eax

        in al, 0x60
        out 0x80, al
        in eax, 0x64
        out 0x84, eax

        cld
        mov di, 0x2000
        mov cx, 4
        mov dx, 0x70
        rep insb
        mov si, 0x2000
        mov cx, 4
        mov dx, 0x90
        rep outsb

        mov di, 0x2000
        mov cx, 3
        mov dx, 0x72
        rep insw
        mov si, 0x2000
        mov cx, 3
        mov dx, 0x92
        rep outsw

        mov ax, 0xd000
        mov ds, ax
        mov byte ptr [0], 0x11
        mov word ptr [2], 0x2233
        mov dword ptr [4], 0x44556677
        mov eax, [8]
        out 0xa0, eax
        hlt
    "
);

crate::blob!(
    /// Writes EBX to port 0x10 and halts.
    announce,
    "
    .code16
        mov eax, ebx
        out 0x10, eax
    1:  hlt
        jmp 1b
    "
);

/// Where [`counts`] counts: 32 bits for each vCPU.
pub const COUNTS_AT: u64 = 0x2000;

crate::blob!(
    /// Counts in memory for ever, each vCPU where its number, in EBX, says: [`COUNTS_AT`].
    counts,
    "
    .code16
    1:  inc dword ptr [ebx * 4 + 0x2000]
        jmp 1b
    "
);

crate::blob!(
    /// Counts in EAX for ever.
    spin,
    "
    .code16
    1:  inc eax
        jmp 1b
    "
);

crate::blob!(
    /// Halts for ever, with interrupts off.
    halt,
    "
    .code16
        cli
    1:  hlt
        jmp 1b
    "
);

crate::blob!(
    /// 32-bit protected mode, entered without an interrupt table: puts 0xc0de into EAX and divides by
    /// zero, which nobody can be told: a triple fault.
    triple_fault,
    "
    .code32
        xor edx, edx
        xor ecx, ecx
        mov eax, 0xc0de
        div ecx
    "
);

crate::blob!(
    /// Writes one byte to port 0x10 for ever: for counting round trips.
    out_for_ever,
    "
    .code16
    1:  out 0x10, al
        jmp 1b
    "
);

crate::blob!(
    /// 64-bit, entered with tables that map what it touches: writes ESI to port 0x10, CS to 0x12, the
    /// upper half of a 64-bit sum to 0x14, and halts.
    long_mode,
    "
    .code64
        mov eax, esi
        out 0x10, eax
        mov eax, cs
        out 0x12, eax
        mov rax, 0x1122334400000000
        add rax, rsi
        shr rax, 32
        out 0x14, eax
        hlt
    "
);

crate::blob!(
    /// 32-bit, flat: writes EAX to port 0x10, EBX to 0x12, and halts.
    protected_mode,
    "
    .code32
        out 0x10, eax
        mov eax, ebx
        out 0x12, eax
        hlt
    "
);

crate::blob!(
    /// Touches memory that its host may have lost: a read of one byte at 0x20000, a write of 0x5a to
    /// 0x21000, with OUT 0x80 before, OUT 0x81 of what was read between, and OUT 0x82 after; then a halt.
    ///
    /// Wants a stack, and memory at 0x20000 and 0x21000.
    lost_memory,
    "
    .code16
        mov ax, 0x2000
        mov ds, ax
        out 0x80, al
        mov al, [0]
        out 0x81, al
        mov byte ptr [0x1000], 0x5a
        out 0x82, al
        hlt
    "
);

/// Where [`start_aps`] asks for the APIC id of the next processor to start; 0 is none yet.
pub const NEXT_AP: u16 = 0x20;
/// Where a processor that [`start_aps`] starts begins, which is to have [`ap`].
pub const AP_PAGE: u64 = 0x8000;
/// Where [`ap`] says once, in two bytes, which code segment it began in.
pub const AP_SAYS: u16 = 0x10;
/// Where [`ap`] says again and again, in two bytes, what it and the others have counted to together.
pub const AP_COUNTS: u16 = 0x12;

crate::blob!(
    /// 32-bit flat protected mode without paging, interrupts disabled: enables its local APIC, asks for
    /// APIC ids at [`NEXT_AP`] again and again, and starts each at [`AP_PAGE`] with INIT and one SIPI.
    start_aps,
    "
    .code32
        mov dword ptr [0xfee000f0], 0x1ff
    2:  in eax, 0x20
        test eax, eax
        jz 2b
        shl eax, 24
        mov [0xfee00310], eax
        mov dword ptr [0xfee00300], 0x4500  // INIT
        mov [0xfee00310], eax
        mov dword ptr [0xfee00300], 0x4608  // SIPI, page 8
        jmp 2b
    "
);

crate::blob!(
    /// Reads a byte at 0x20000 with machine checks on, between OUT 0x80 and OUT 0x81, and halts. At a
    /// machine check it sends, all as `eax`, MCG_STATUS to 0x84, bank 9's status to 0x88 (low half) and
    /// 0x8c (high half), its address to 0x90 and its MISC to 0x94; then it halts.
    ///
    /// Wants to be loaded in the lowest 64 KiB with CS and SS at 0, a stack, and memory from 0.
    machine_check,
    "
    .code16
        xor ax, ax
        mov ds, ax
        call 2f
        mov ecx, 0x17a
        rdmsr
        out 0x84, eax
        mov ecx, 0x425
        rdmsr
        out 0x88, eax
        mov eax, edx
        out 0x8c, eax
        mov ecx, 0x426
        rdmsr
        out 0x90, eax
        mov ecx, 0x427
        rdmsr
        out 0x94, eax
        hlt
    2:  pop bx
        mov [72], bx
        mov [74], ax
        mov eax, cr4
        or eax, 0x40
        mov cr4, eax
        mov ax, 0x2000
        mov ds, ax
        out 0x80, al
        mov al, [0]
        out 0x81, al
        hlt
    "
);

crate::blob!(
    /// 16-bit, as a start-up interrupt begins it: says its segment at [`AP_SAYS`], and then counts in
    /// memory at 0x9000, which all share, and says the count at [`AP_COUNTS`], for ever.
    ap,
    "
    .code16
        mov ax, cs
        out 0x10, ax
        xor ax, ax
        mov ds, ax
    2:  mov ax, 1
        lock xadd word ptr [0x9000], ax
        out 0x12, ax
        jmp 2b
    "
);
