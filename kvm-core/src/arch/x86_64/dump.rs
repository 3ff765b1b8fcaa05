// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU's registers, for people: what a crash report shows.

use std::fmt;

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// General and system registers, to be displayed on several lines.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RegisterDump {
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
}

impl RegisterDump {
    /// The processor's mode, as CR0, EFER and CS say.
    #[must_use]
    pub const fn mode(&self) -> &'static str {
        let sregs = &self.sregs;
        match (
            sregs.cr0 & 1 != 0,
            sregs.efer & 1 << 10 != 0,
            sregs.cs.l != 0,
            sregs.cs.db != 0,
        ) {
            (false, ..) => "real mode",
            (true, true, true, _) => "64-bit mode",
            (true, true, false, _) => "compatibility mode",
            (true, false, _, true) => "32-bit protected mode",
            (true, false, _, false) => "16-bit protected mode",
        }
    }
}

impl fmt::Display for RegisterDump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.regs, &self.sregs);
        writeln!(
            f,
            "RIP {:04x}:{:016x}  RFLAGS {:08x}  {}",
            s.cs.selector,
            r.rip,
            r.rflags,
            self.mode()
        )?;
        let rows = [
            [
                ("RAX", r.rax),
                ("RBX", r.rbx),
                ("RCX", r.rcx),
                ("RDX", r.rdx),
            ],
            [
                ("RSI", r.rsi),
                ("RDI", r.rdi),
                ("RBP", r.rbp),
                ("RSP", r.rsp),
            ],
            [("R8 ", r.r8), ("R9 ", r.r9), ("R10", r.r10), ("R11", r.r11)],
            [
                ("R12", r.r12),
                ("R13", r.r13),
                ("R14", r.r14),
                ("R15", r.r15),
            ],
            [
                ("CR0", s.cr0),
                ("CR2", s.cr2),
                ("CR3", s.cr3),
                ("CR4", s.cr4),
            ],
        ];
        for row in rows {
            let row = row.map(|(name, value)| format!("{name} {value:016x}"));
            writeln!(f, "{}", row.join("  "))?;
        }
        writeln!(
            f,
            "EFER {:x}  APIC base {:x}  CR8 {:x}",
            s.efer, s.apic_base, s.cr8
        )?;
        let segments = [
            ("CS", &s.cs),
            ("DS", &s.ds),
            ("ES", &s.es),
            ("FS", &s.fs),
            ("GS", &s.gs),
            ("SS", &s.ss),
            ("TR", &s.tr),
            ("LDT", &s.ldt),
        ];
        for (name, segment) in segments {
            write_segment(f, name, segment)?;
        }
        write_table(f, "GDT", &s.gdt)?;
        writeln!(f)?;
        write_table(f, "IDT", &s.idt)
    }
}

fn write_segment(f: &mut fmt::Formatter<'_>, name: &str, s: &kvm_segment) -> fmt::Result {
    write!(
        f,
        "{name:3} {:04x}  base {:016x}  limit {:08x}",
        s.selector, s.base, s.limit
    )?;
    if s.unusable != 0 || s.present == 0 {
        return writeln!(f, "  not usable");
    }
    let size = match (s.s, s.l, s.db) {
        (0, ..) => "system",
        (_, 1, _) => "64-bit",
        (_, _, 1) => "32-bit",
        _ => "16-bit",
    };
    writeln!(f, "  type {:x}  dpl {}  {size}", s.type_, s.dpl)
}

fn write_table(f: &mut fmt::Formatter<'_>, name: &str, table: &kvm_dtable) -> fmt::Result {
    write!(
        f,
        "{name}       base {:016x}  limit {:08x}",
        table.base, table.limit
    )
}
