// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU's registers as gdb sees them: which there are, in which order, and their bytes.
//!
//! The order is that of the target description, which is made from the same table. It is always that of
//! a 64-bit processor, whatever mode the vCPU is in: gdb cannot change its mind during a session, and a
//! kernel goes through all modes. Names and features are those of gdb's manual ("Standard Target
//! Features", i386); control registers have a feature of our own, which gdb shows in their group.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::sync::LazyLock;

use gdbstub::arch;
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

/// What of a vCPU's state gdb sees, as KVM has it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct State {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) fpu: kvm_fpu,
    /// `MSR_KERNEL_GS_BASE`.
    pub(crate) kernel_gs_base: u64,
}

/// Why a register cannot be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} cannot be set: {1}")]
pub(crate) struct NotSet(&'static str, &'static str);

/// A register, by its number in the target description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reg(usize);

#[derive(Clone, Copy)]
enum What {
    Gpr(usize),
    Rip,
    Flags,
    Segment(usize),
    St(usize),
    Fctrl,
    Fstat,
    Ftag,
    Fiseg,
    Fioff,
    Foseg,
    Fooff,
    Fop,
    Xmm(usize),
    Mxcsr,
    FsBase,
    GsBase,
    KernelGsBase,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Efer,
}

struct Row {
    name: &'static str,
    bits: usize,
    /// gdb's name of its type.
    kind: &'static str,
    what: What,
}

/// The features, in order, each with its registers.
static FEATURES: LazyLock<Vec<(&'static str, Vec<Row>)>> = LazyLock::new(|| {
    let row = |name, bits, kind, what| Row {
        name,
        bits,
        kind,
        what,
    };
    let gprs = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    let mut core = Vec::new();
    for (n, name) in gprs.into_iter().enumerate() {
        let kind = match name {
            "rbp" | "rsp" => "data_ptr",
            _ => "int64",
        };
        core.push(row(name, 64, kind, What::Gpr(n)));
    }
    core.push(row("rip", 64, "code_ptr", What::Rip));
    core.push(row("eflags", 32, "i386_eflags", What::Flags));
    for (n, name) in ["cs", "ss", "ds", "es", "fs", "gs"].into_iter().enumerate() {
        core.push(row(name, 32, "int32", What::Segment(n)));
    }
    let st = ["st0", "st1", "st2", "st3", "st4", "st5", "st6", "st7"];
    for (n, name) in st.into_iter().enumerate() {
        core.push(row(name, 80, "i387_ext", What::St(n)));
    }
    for (name, what) in [
        ("fctrl", What::Fctrl),
        ("fstat", What::Fstat),
        ("ftag", What::Ftag),
        ("fiseg", What::Fiseg),
        ("fioff", What::Fioff),
        ("foseg", What::Foseg),
        ("fooff", What::Fooff),
        ("fop", What::Fop),
    ] {
        core.push(row(name, 32, "int", what));
    }
    let xmm = [
        "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15",
    ];
    let xmm = xmm.into_iter().enumerate();
    let mut sse: Vec<_> = xmm
        .map(|(n, name)| row(name, 128, "vec128", What::Xmm(n)))
        .collect();
    sse.push(row("mxcsr", 32, "int", What::Mxcsr));
    let segments = vec![
        row("fs_base", 64, "int64", What::FsBase),
        row("gs_base", 64, "int64", What::GsBase),
    ];
    let system = vec![
        row("k_gs_base", 64, "int64", What::KernelGsBase),
        row("cr0", 64, "int64", What::Cr0),
        row("cr2", 64, "int64", What::Cr2),
        row("cr3", 64, "int64", What::Cr3),
        row("cr4", 64, "int64", What::Cr4),
        row("cr8", 64, "int64", What::Cr8),
        row("efer", 64, "int64", What::Efer),
    ];
    vec![
        ("org.gnu.gdb.i386.core", core),
        ("org.gnu.gdb.i386.sse", sse),
        ("org.gnu.gdb.i386.segments", segments),
        ("reference-vmm.system", system),
    ]
});

fn rows() -> impl Iterator<Item = &'static Row> {
    FEATURES.iter().flat_map(|(_, rows)| rows)
}

impl Reg {
    fn row(self) -> Option<&'static Row> {
        rows().nth(self.0)
    }

    /// The register of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        rows().position(|row| row.name == name).map(Reg)
    }

    /// All of them, in order.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..rows().count()).map(Reg)
    }

    /// Bytes that gdb has for it.
    pub(crate) fn len(self) -> usize {
        self.row().map_or(0, |row| row.bits / 8)
    }
}

impl arch::RegId for Reg {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let reg = Reg(id);
        Some((reg, Some(NonZeroUsize::new(reg.len())?)))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0)
    }
}

impl State {
    /// A register's bytes, least significant first.
    pub(crate) fn get(&self, reg: Reg) -> Vec<u8> {
        let Some(row) = reg.row() else {
            return Vec::new();
        };
        let (fpu, sregs) = (&self.fpu, &self.sregs);
        let value: u128 = match row.what {
            What::Gpr(n) => gpr(&self.regs, n).into(),
            What::Rip => self.regs.rip.into(),
            What::Flags => self.regs.rflags.into(),
            What::Segment(n) => segment(sregs, n).selector.into(),
            What::St(n) => fpu.fpr.get(n).map_or(0, |st| u128::from_le_bytes(*st)),
            What::Fctrl => fpu.fcw.into(),
            What::Fstat => fpu.fsw.into(),
            What::Ftag => full_tag(fpu.ftwx).into(),
            // In 64-bit mode a pointer has 64 bits and no segment; the upper half is where gdb has it.
            What::Fiseg => (fpu.last_ip >> 32).into(),
            What::Fioff => fpu.last_ip.into(),
            What::Foseg => (fpu.last_dp >> 32).into(),
            What::Fooff => fpu.last_dp.into(),
            What::Fop => fpu.last_opcode.into(),
            What::Xmm(n) => fpu.xmm.get(n).map_or(0, |xmm| u128::from_le_bytes(*xmm)),
            What::Mxcsr => fpu.mxcsr.into(),
            What::FsBase => sregs.fs.base.into(),
            What::GsBase => sregs.gs.base.into(),
            What::KernelGsBase => self.kernel_gs_base.into(),
            What::Cr0 => sregs.cr0.into(),
            What::Cr2 => sregs.cr2.into(),
            What::Cr3 => sregs.cr3.into(),
            What::Cr4 => sregs.cr4.into(),
            What::Cr8 => sregs.cr8.into(),
            What::Efer => sregs.efer.into(),
        };
        let bytes = value.to_le_bytes();
        bytes.iter().copied().take(row.bits / 8).collect()
    }

    /// Sets a register from its bytes. What there is no room for in the processor's is dropped.
    ///
    /// # Errors
    /// [`NotSet`]; nothing has changed.
    pub(crate) fn set(&mut self, reg: Reg, bytes: &[u8]) -> Result<(), NotSet> {
        let Some(row) = reg.row().filter(|row| row.bits / 8 == bytes.len()) else {
            return Err(NotSet("a register", "it has another size"));
        };
        // As it is already: also where it cannot be set at all.
        if self.get(reg) == bytes {
            return Ok(());
        }
        let mut wide = [0; 16];
        for (slot, byte) in wide.iter_mut().zip(bytes) {
            *slot = *byte;
        }
        let value = u128::from_le_bytes(wide);
        let long = value as u64;
        let upper = |old: u64| old & 0xffff_ffff | long << 32;
        let lower = |old: u64| old & !0xffff_ffff | long & 0xffff_ffff;
        let (fpu, sregs) = (&mut self.fpu, &mut self.sregs);
        match row.what {
            What::Gpr(n) => *gpr_mut(&mut self.regs, n) = long,
            What::Rip => self.regs.rip = long,
            What::Flags => self.regs.rflags = lower(self.regs.rflags),
            What::Segment(_) => {
                return Err(NotSet(
                    row.name,
                    "a selector without its descriptor is a state that no processor is in",
                ));
            }
            What::St(n) => {
                if let Some(st) = fpu.fpr.get_mut(n) {
                    *st = wide;
                }
            }
            What::Fctrl => fpu.fcw = value as u16,
            What::Fstat => fpu.fsw = value as u16,
            What::Ftag => fpu.ftwx = short_tag(value as u16),
            What::Fiseg => fpu.last_ip = upper(fpu.last_ip),
            What::Fioff => fpu.last_ip = lower(fpu.last_ip),
            What::Foseg => fpu.last_dp = upper(fpu.last_dp),
            What::Fooff => fpu.last_dp = lower(fpu.last_dp),
            What::Fop => fpu.last_opcode = value as u16,
            What::Xmm(n) => {
                if let Some(xmm) = fpu.xmm.get_mut(n) {
                    *xmm = wide;
                }
            }
            What::Mxcsr => fpu.mxcsr = value as u32,
            What::FsBase => sregs.fs.base = long,
            What::GsBase => sregs.gs.base = long,
            What::KernelGsBase => self.kernel_gs_base = long,
            What::Cr0 => sregs.cr0 = long,
            What::Cr2 => sregs.cr2 = long,
            What::Cr3 => sregs.cr3 = long,
            What::Cr4 => sregs.cr4 = long,
            What::Cr8 => sregs.cr8 = long,
            What::Efer => sregs.efer = long,
        }
        Ok(())
    }

    /// All registers, as gdb's `g` packet has them.
    pub(crate) fn block(&self) -> Block {
        Block(Reg::all().flat_map(|reg| self.get(reg)).collect())
    }

    /// Sets all registers.
    ///
    /// # Errors
    /// [`NotSet`]; nothing has changed.
    pub(crate) fn set_block(&mut self, block: &Block) -> Result<(), NotSet> {
        let mut new = *self;
        let mut rest = &block.0[..];
        for reg in Reg::all() {
            let short = NotSet("a register", "there are not enough bytes");
            let (bytes, behind) = rest.split_at_checked(reg.len()).ok_or(short)?;
            new.set(reg, bytes)?;
            rest = behind;
        }
        *self = new;
        Ok(())
    }

    /// Whether the vCPU is in protected mode, 64-bit mode included.
    pub(crate) fn is_protected(&self) -> bool {
        self.sregs.cr0 & 1 != 0
    }
}

fn segment(sregs: &kvm_sregs, n: usize) -> kvm_segment {
    let all = [sregs.cs, sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs];
    all.get(n).copied().unwrap_or_default()
}

fn gpr(regs: &kvm_regs, n: usize) -> u64 {
    *gpr_mut(&mut regs.clone(), n)
}

fn gpr_mut(regs: &mut kvm_regs, n: usize) -> &mut u64 {
    match n {
        0 => &mut regs.rax,
        1 => &mut regs.rbx,
        2 => &mut regs.rcx,
        3 => &mut regs.rdx,
        4 => &mut regs.rsi,
        5 => &mut regs.rdi,
        6 => &mut regs.rbp,
        7 => &mut regs.rsp,
        8 => &mut regs.r8,
        9 => &mut regs.r9,
        10 => &mut regs.r10,
        11 => &mut regs.r11,
        12 => &mut regs.r12,
        13 => &mut regs.r13,
        14 => &mut regs.r14,
        _ => &mut regs.r15,
    }
}

/// x87's tag word with two bits a register, from FXSAVE's with one: empty (3), or valid (0), which is
/// not told from zero and special.
fn full_tag(short: u8) -> u16 {
    (0..8)
        .filter(|n| short >> n & 1 == 0)
        .fold(0, |tag, n| tag | 3 << (2 * n))
}

fn short_tag(full: u16) -> u8 {
    (0..8)
        .filter(|n| full >> (2 * n) & 3 != 3)
        .fold(0, |tag, n| tag | 1 << n)
}

/// The bytes of all registers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Block(Vec<u8>);

impl arch::Registers for Block {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        let before: usize =
            Reg::named("rip").map_or(0, |rip| Reg::all().take(rip.0).map(Reg::len).sum());
        let bytes = self.0.get(before..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for byte in &self.0 {
            write_byte(Some(*byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        if bytes.len() != Reg::all().map(Reg::len).sum::<usize>() {
            return Err(());
        }
        self.0 = bytes.to_vec();
        Ok(())
    }
}

/// x86-64 with its control registers.
#[derive(Debug)]
pub(crate) enum X86 {}

impl arch::Arch for X86 {
    type Usize = u64;
    type Registers = Block;
    type BreakpointKind = usize;
    type RegId = Reg;

    fn target_description_xml() -> Option<&'static str> {
        static XML: LazyLock<String> = LazyLock::new(description);
        Some(&XML)
    }
}

/// Types that gdb does not have by itself.
const FLAGS: &str = r#"<flags id="i386_eflags" size="4">
<field name="CF" start="0" end="0"/><field name="" start="1" end="1"/>
<field name="PF" start="2" end="2"/><field name="AF" start="4" end="4"/>
<field name="ZF" start="6" end="6"/><field name="SF" start="7" end="7"/>
<field name="TF" start="8" end="8"/><field name="IF" start="9" end="9"/>
<field name="DF" start="10" end="10"/><field name="OF" start="11" end="11"/>
<field name="NT" start="14" end="14"/><field name="RF" start="16" end="16"/>
<field name="VM" start="17" end="17"/><field name="AC" start="18" end="18"/>
<field name="VIF" start="19" end="19"/><field name="VIP" start="20" end="20"/>
<field name="ID" start="21" end="21"/></flags>
"#;
const VECTORS: &str = r#"<vector id="v4f" type="ieee_single" count="4"/>
<vector id="v2d" type="ieee_double" count="2"/>
<vector id="v16i8" type="int8" count="16"/>
<vector id="v8i16" type="int16" count="8"/>
<vector id="v4i32" type="int32" count="4"/>
<vector id="v2i64" type="int64" count="2"/>
<union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/>
<field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/>
<field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/>
<field name="uint128" type="uint128"/></union>
"#;

fn description() -> String {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE target SYSTEM \"gdb-target.dtd\">\n\
         <target version=\"1.0\">\n<architecture>i386:x86-64</architecture>\n",
    );
    for (feature, rows) in FEATURES.iter() {
        // Writing to a String does not fail.
        let _ = writeln!(xml, "<feature name=\"{feature}\">");
        match *feature {
            "org.gnu.gdb.i386.core" => xml += FLAGS,
            "org.gnu.gdb.i386.sse" => xml += VECTORS,
            _ => {}
        }
        for Row {
            name, bits, kind, ..
        } in rows
        {
            let group = match *feature {
                "reference-vmm.system" => " group=\"system\"",
                _ => "",
            };
            let _ = writeln!(
                xml,
                "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"{group}/>"
            );
        }
        xml += "</feature>\n";
    }
    xml + "</target>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use gdbstub::arch::{Arch as _, RegId as _, Registers as _};
    use proptest::prelude::*;

    fn reg(name: &str) -> Reg {
        Reg::named(name).unwrap()
    }

    #[test]
    fn the_description_has_each_register_in_the_order_of_the_packet() {
        let xml = X86::target_description_xml().unwrap();
        let names: Vec<_> = xml
            .match_indices("<reg name=\"")
            .map(|(at, start)| xml[at + start.len()..].split('"').next().unwrap())
            .collect();
        for (n, name) in names.iter().enumerate() {
            assert_eq!(reg(name).to_raw_id(), Some(n));
        }
        assert_eq!(names.len(), Reg::all().count());
        // What gdb's manual wants of the core, by number.
        assert_eq!(
            [names[0], names[7], names[16], names[17]],
            ["rax", "rsp", "rip", "eflags"]
        );
        assert_eq!(
            [names[24], names[39], names[40], names[56]],
            ["st0", "fop", "xmm0", "mxcsr"]
        );
    }

    #[test]
    fn a_number_beyond_the_last_is_no_register() {
        let count = Reg::all().count();
        assert!(Reg::from_raw_id(count - 1).is_some());
        for id in [count, count + 1, usize::MAX] {
            assert!(Reg::from_raw_id(id).is_none());
        }
    }

    #[test]
    fn selectors_stay_as_they_are() {
        let mut state = State::default();
        state.sregs.cs.selector = 0x10;
        let cs = reg("cs");
        assert!(state.set(cs, &0x10u32.to_le_bytes()).is_ok());
        let error = state.set(cs, &8u32.to_le_bytes()).unwrap_err();
        assert!(error.to_string().starts_with("cs cannot be set"), "{error}");
        assert_eq!(state.sregs.cs.selector, 0x10);
    }

    #[test]
    fn x87_tags_of_empty_registers_come_and_go() {
        for short in 0..=u8::MAX {
            assert_eq!(short_tag(full_tag(short)), short);
        }
        assert_eq!(full_tag(0xff), 0);
        assert_eq!(full_tag(0), 0xffff);
        assert_eq!(short_tag(0b01_10_00), 0xff);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_nothing_else_changes(
            number in 0..Reg::all().count(), value: u128, others: [u64; 4],
        ) {
            let mut before = State::default();
            before.regs.rax = others[0];
            before.regs.r15 = others[1];
            before.fpu.last_ip = others[2];
            before.sregs.cr3 = others[3];
            let reg = Reg(number);
            let bytes = &value.to_le_bytes()[..reg.len()];
            let mut after = before;
            let set = after.set(reg, bytes);
            for other in Reg::all().filter(|other| *other != reg) {
                prop_assert_eq!(before.get(other), after.get(other));
            }
            let row = reg.row().unwrap();
            match row.what {
                What::Segment(_) => prop_assert_eq!(set.is_ok(), before.get(reg) == bytes),
                // Registers that the processor has fewer bits of.
                What::Fctrl | What::Fstat | What::Fop => {
                    prop_assert_eq!(&after.get(reg)[..2], &bytes[..2]);
                }
                What::Ftag => {}
                _ => prop_assert_eq!(after.get(reg), bytes),
            }
        }

        #[test]
        fn all_registers_at_once_are_the_same_as_each(rax: u64, rip: u64, xmm: [u8; 16], base: u64) {
            let mut state = State::default();
            state.regs.rax = rax;
            state.regs.rip = rip;
            state.fpu.xmm[15] = xmm;
            state.sregs.gs.base = base;
            let block = state.block();
            prop_assert_eq!(block.pc(), rip);
            let mut copy = State::default();
            copy.set_block(&block).unwrap();
            prop_assert_eq!(copy, state);
            let mut sent = Vec::new();
            block.gdb_serialize(|byte| sent.push(byte.unwrap()));
            let mut received = Block::default();
            prop_assert!(received.gdb_deserialize(&sent).is_ok());
            prop_assert_eq!(&received, &block);
            prop_assert!(received.gdb_deserialize(&sent[1..]).is_err());
        }
    }
}
