// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that is told of memory that it has lost, and goes on with the rest.

/// Where the memory begins that is compared.
pub const FIRST: u64 = 0x40_0000;
/// How many pages of it there are: four MiB, and one page that is the only one of its MiB.
pub const PAGES: u64 = 1025;
/// What the machine checks said, record after record, of [`RECORD`] bytes each.
pub const RECORDS: u64 = 0x20_0000;
/// How many there are of them, 32 bits: behind the 1,024th the first is written again.
pub const COUNT: u64 = 0x7_f018;
/// Bytes of a record: MCG_STATUS, and bank 9's STATUS, ADDR and MISC, 64 bits each.
pub const RECORD: u64 = 32;
/// IA32_MCG_CAP, 64 bits.
pub const MCG_CAP: u64 = 0x7_f020;
/// Which pages are compared: the first, and the one behind the last. 32 bits each, which whoever may write the guest's
/// memory may change; all of them at first.
pub const FROM: u64 = 0x7_f028;
/// See there.
pub const TO: u64 = 0x7_f02c;
/// What it ends of: the page that it was at, what it read there (32 bits each), and the instruction that a machine check
/// was at, if it was another (64 bits).
pub const WRONG: u64 = 0x7_f040;
/// The character that ends it, on COM1.
pub const QUIT: u8 = b'q';

/// What it does with a machine check, as its command line says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Manner {
    /// It takes it, writes down what it says, and goes on behind the page.
    Heeds = 0,
    /// CR4.MCE is not set.
    Off = 1,
    /// Bank 9's control register is 0.
    Masked = 2,
    /// It goes back to the same instruction.
    Returns = 3,
    /// It touches the lost page again, in its handler.
    Nests = 4,
}

crate::blob! {
    /// Its command line is the number of a [`Manner`]. It writes [`PAGES`] pages (the first word of each is
    /// [`key`](crate::verifier::key) of its address, and the last the complement of that) and says `f`. Then it compares them
    /// again and again, [`FROM`] and [`TO`] saying which, and says a digit on COM1 for each pass (1 2 3 … 9 0 1 …). What its
    /// handler needs it touches in each pass. A machine check at its read of a page is
    /// written to [`RECORDS`], the bank and MCG_STATUS are cleared, and it goes on with the next page. [`QUIT`] on COM1
    /// (polled, once a pass) is `!`, and debug-exit value 0. Anything else than it wrote is debug-exit value 1, a machine check
    /// elsewhere 2, and one of another bank 3; [`WRONG`] has where.
    heeder64, concat!(".code64", crate::parts::command_line_number!(), "
    2:  mov r14d, ebx
        mov esp, 0x40000
    ", crate::parts::interrupt_gate!("21f", "22f", "0x30120"), "
        mov dword ptr [0x7f018], 0
        mov dword ptr [0x7f028], 0
        mov dword ptr [0x7f02c], 1025
        cmp r14d, 1
        je 30f
        mov rax, cr4
        or eax, 0x40
        mov cr4, rax
    30: mov ecx, 0x179
        rdmsr
        mov [0x7f020], eax
        mov [0x7f024], edx
        test eax, 0x100                     // MCG_CTL_P
        jz 31f
        mov ecx, 0x17b
        mov eax, -1
        mov edx, -1
        wrmsr
    31: mov ecx, 0x424                      // IA32_MC9_CTL
        xor eax, eax
        cmp r14d, 2
        je 32f
        dec eax
    32: mov edx, eax
        wrmsr
        xor ebx, ebx
    20: mov esi, ebx
        shl esi, 12
        add esi, 0x400000
        imul eax, esi, 0x9e3779b1
        mov dword ptr [rsi], eax
        not eax
        mov dword ptr [rsi + 4092], eax
        inc ebx
        cmp ebx, 1025
        jb 20b
        mov al, 0x66
        mov edx, 0x3f8
        out dx, al
        xor r12d, r12d
    23: mov rax, [0x30120]                  // the gate, the stack, the GDT and where records go
        push rax
        pop rax
        sgdt [0x7f030]
        mov rax, [0x7f032]
        mov rax, [rax]
        mov rax, [0x200000]
        mov ebx, [0x7f028]
    24: cmp ebx, [0x7f02c]
        jae 28f
        mov esi, ebx
        shl esi, 12
        add esi, 0x400000
        imul eax, esi, 0x9e3779b1
        mov edx, eax
        not edx
    25: mov ecx, dword ptr [rsi]            // a machine check is taken from here
    26: mov [0x7f044], ecx
        cmp ecx, eax
        jne 29f
        cmp dword ptr [rsi + 4092], edx
        je 27f
    29: mov [0x7f040], esi
        jmp 9f
    27: inc ebx                             // to here
        jmp 24b
    28: ", crate::parts::say_pass!(), crate::parts::again_or_quit!("23", "9"), "
    21: push rax
        push rcx
        push rdx
        push rdi
        lea rax, [rip + 25b]                // or behind it, of who was there when it was saved
        cmp [rsp + 32], rax
        jb 38f
        lea rax, [rip + 27b]
        cmp [rsp + 32], rax
        jae 38f
        mov edi, [0x7f018]
        and edi, 1023
        shl edi, 5
        add edi, 0x200000
        mov ecx, 0x17a
        rdmsr
        mov [rdi], eax
        mov [rdi + 4], edx
        movzx r13d, byte ptr [0x7f020]      // all banks
        mov ecx, 0x401
    33: rdmsr
        cmp ecx, 0x425
        je 34f
        test edx, edx
        js 39f
        jmp 35f
    34: mov [rdi + 8], eax
        mov [rdi + 12], edx
    35: add ecx, 4
        dec r13d
        jnz 33b
        mov ecx, 0x426
        rdmsr
        mov [rdi + 16], eax
        mov [rdi + 20], edx
        mov ecx, 0x427
        rdmsr
        mov [rdi + 24], eax
        mov [rdi + 28], edx
        inc dword ptr [0x7f018]
        cmp r14d, 4
        jne 36f
        mov ecx, dword ptr [rsi]
    36: xor eax, eax
        xor edx, edx
        mov ecx, 0x425
        wrmsr
        mov ecx, 0x17a
        wrmsr
        cmp r14d, 3
        je 37f
        lea rax, [rip + 27b]
        mov [rsp + 32], rax
    37: pop rdi
        pop rdx
        pop rcx
        pop rax
        iretq
    38: mov rcx, [rsp + 32]
        mov [0x7f048], rcx
        mov [0x7f040], rsi
        mov al, 2
        out 0xf4, al
    39: mov al, 3
        out 0xf4, al
    22: .word 0x40f
        .quad 0x30000
    ")
}
