// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The registers that a vCPU starts with, for each way in: 64-bit, flat 32-bit and real mode.
//!
//! A state is made from the system registers that KVM gave the vCPU at its reset, so that what a way
//! in does not speak of (the APIC base above all) stays as KVM made it.

use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestAddress;

use super::tables::{BOOT_CODE, BOOT_DATA, BOOT_TSS, GDT_LEN, LongModeTables};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set; interrupts are off.
const RFLAGS: u64 = 2;

/// The registers to start with. [`Vcpu::set_boot_state`](crate::Vcpu::set_boot_state) writes them;
/// general registers may be changed before that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BootState {
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
}

impl BootState {
    /// 64-bit entry at `entry` with `tables` in guest memory, paging on and interrupts off.
    ///
    /// With `rsi` the address of the boot parameters this is Linux's 64-bit protocol
    /// (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol": CS 0x10, data segments 0x18).
    #[must_use]
    pub fn long_mode(
        reset: &kvm_sregs,
        tables: &LongModeTables,
        entry: GuestAddress,
        rsi: u64,
    ) -> Self {
        let mut sregs = *reset;
        sregs.gdt = kvm_dtable {
            base: tables.gdt().0,
            limit: GDT_LEN - 1,
            ..Default::default()
        };
        sregs.idt = kvm_dtable::default();
        sregs.cr3 = tables.cr3().0;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.efer = EFER_LME | EFER_LMA;
        set_segments(&mut sregs, code(true), data());
        let regs = kvm_regs {
            rip: entry.0,
            rsi,
            rflags: RFLAGS,
            ..Default::default()
        };
        Self { regs, sregs }
    }

    /// Flat 32-bit protected mode at `entry`, paging off and interrupts off; 4 GiB code and data
    /// segments at 0.
    ///
    /// With `ebx` the address of `hvm_start_info` this is PVH (xen's docs/misc/pvh.pandoc); with `eax`
    /// 0x2badb002 and `ebx` the address of its information it is Multiboot 1 (its specification,
    /// section 3.2).
    #[must_use]
    pub fn protected_mode(reset: &kvm_sregs, entry: GuestAddress, eax: u32, ebx: u32) -> Self {
        let mut sregs = *reset;
        sregs.gdt = kvm_dtable::default();
        sregs.idt = kvm_dtable::default();
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.efer = 0;
        set_segments(&mut sregs, code(false), data());
        let regs = kvm_regs {
            rip: entry.0,
            rax: eax.into(),
            rbx: ebx.into(),
            rflags: RFLAGS,
            ..Default::default()
        };
        Self { regs, sregs }
    }

    /// Real mode at `cs:ip`; the other segments at 0.
    #[must_use]
    pub fn real_mode(reset: &kvm_sregs, cs: u16, ip: u16) -> Self {
        let mut sregs = *reset;
        let segment = |selector: u16, type_| kvm_segment {
            base: u64::from(selector) << 4,
            limit: 0xffff,
            selector,
            type_,
            present: 1,
            s: 1,
            ..Default::default()
        };
        sregs.cr0 = CR0_ET;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
        sregs.cs = segment(cs, 0xb);
        let data = segment(0, 3);
        (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
        (sregs.gs, sregs.ss) = (data, data);
        let regs = kvm_regs {
            rip: ip.into(),
            rflags: RFLAGS,
            ..Default::default()
        };
        Self { regs, sregs }
    }
}

/// The floating-point state after a reset as operating systems expect it: all exceptions masked
/// (FCW 0x37f, MXCSR 0x1f80). KVM starts a vCPU so; this is for setting it back.
#[must_use]
pub fn initial_fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment, data: kvm_segment) {
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.tr = task();
}

/// A 4 GiB code segment: readable, executable, accessed.
pub(super) fn code(long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: BOOT_CODE,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// A 4 GiB data segment: writable, accessed.
pub(super) fn data() -> kvm_segment {
    kvm_segment {
        selector: BOOT_DATA,
        type_: 3,
        db: 1,
        l: 0,
        ..code(false)
    }
}

/// A busy TSS, which VMX wants to see in TR in every mode but real mode.
pub(super) fn task() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0x67,
        selector: BOOT_TSS,
        type_: 0xb,
        present: 1,
        s: 0,
        g: 0,
        ..Default::default()
    }
}
