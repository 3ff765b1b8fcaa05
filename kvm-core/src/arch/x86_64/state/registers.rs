// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Registers: general, system, debug, and the extended control registers.

#![forbid(unsafe_code)]

use kvm_bindings as kvm;

use super::mirror::mirror;

mirror! {
    /// The general registers (`struct kvm_regs`).
    GeneralRegisters of kvm_regs {
        /// RAX.
        rax: u64,
        /// RBX.
        rbx: u64,
        /// RCX.
        rcx: u64,
        /// RDX.
        rdx: u64,
        /// RSI.
        rsi: u64,
        /// RDI.
        rdi: u64,
        /// RSP.
        rsp: u64,
        /// RBP.
        rbp: u64,
        /// R8.
        r8: u64,
        /// R9.
        r9: u64,
        /// R10.
        r10: u64,
        /// R11.
        r11: u64,
        /// R12.
        r12: u64,
        /// R13.
        r13: u64,
        /// R14.
        r14: u64,
        /// R15.
        r15: u64,
        /// RIP.
        rip: u64,
        /// RFLAGS.
        rflags: u64,
    }
}

mirror! {
    /// A segment register with its hidden part (`struct kvm_segment`). A flag is 0 or 1.
    Segment of kvm_segment {
        /// Linear address.
        base: u64,
        /// The last offset, in bytes, whatever the granularity.
        limit: u32,
        /// The visible part.
        selector: u16,
        /// The descriptor's type, 4 bits.
        kind as type_: u8,
        /// Flag P.
        present: u8,
        /// Privilege level, 2 bits.
        dpl: u8,
        /// Flag D/B.
        db: u8,
        /// Flag S: code or data.
        s: u8,
        /// Flag L: 64-bit code.
        l: u8,
        /// Flag G.
        g: u8,
        /// Flag AVL.
        avl: u8,
        /// Flag: the null selector was loaded.
        unusable: u8,
    }
}

mirror! {
    /// GDTR or IDTR (`struct kvm_dtable`).
    DescriptorTable of kvm_dtable {
        /// Linear address.
        base: u64,
        /// The last offset, in bytes.
        limit: u16,
    }
}

/// The system registers (`struct kvm_sregs2`; of older hosts `struct kvm_sregs`).
///
/// The `interrupt_bitmap` of the older structure is not here: it says once more which external
/// interrupt is being injected, and [`Events`](super::Events) says that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
#[allow(missing_docs, reason = "the processor's own names")]
pub struct SystemRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// The task priority; with a local APIC in the kernel it is the APIC's.
    pub cr8: u64,
    pub efer: u64,
    /// The MSR `IA32_APIC_BASE`.
    pub apic_base: u64,
    /// The four PDPTRs, of a vCPU in PAE paging on a host with `KVM_CAP_SREGS2`. They were loaded when
    /// CR3 was and need not be what memory says now; an older host loads them from memory.
    pub pdptrs: Option<[u64; 4]>,
}

macro_rules! system_registers {
    ($kvm:ident, $($field:ident)+) => {
        impl From<kvm::$kvm> for SystemRegisters {
            fn from(kvm: kvm::$kvm) -> Self {
                Self { $( $field: kvm.$field.into(), )+ pdptrs: None }
            }
        }

        impl From<SystemRegisters> for kvm::$kvm {
            fn from(ours: SystemRegisters) -> Self {
                Self { $( $field: ours.$field.into(), )+ ..Default::default() }
            }
        }
    };
}
system_registers!(kvm_sregs, cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base);
system_registers!(kvm_sregs2, cs ds es fs gs ss tr ldt gdt idt cr0 cr2 cr3 cr4 cr8 efer apic_base);

impl SystemRegisters {
    /// From `KVM_GET_SREGS2`.
    #[must_use]
    pub fn from_sregs2(kvm: &kvm::kvm_sregs2) -> Self {
        let valid = kvm.flags & u64::from(kvm::KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
        Self {
            pdptrs: valid.then_some(kvm.pdptrs),
            ..Self::from(*kvm)
        }
    }

    /// For `KVM_SET_SREGS2`.
    #[must_use]
    pub fn to_sregs2(&self) -> kvm::kvm_sregs2 {
        let mut kvm = kvm::kvm_sregs2::from(*self);
        if let Some(pdptrs) = self.pdptrs {
            kvm.flags = kvm::KVM_SREGS2_FLAGS_PDPTRS_VALID.into();
            kvm.pdptrs = pdptrs;
        }
        kvm
    }
}

mirror! {
    /// The debug registers (`struct kvm_debugregs`): the guest's own, whatever a debugger has set
    /// beside them by `KVM_SET_GUEST_DEBUG`.
    DebugRegisters of kvm_debugregs {
        /// DR0 to DR3.
        db: [u64; 4],
        /// DR6.
        dr6: u64,
        /// DR7.
        dr7: u64,
    }
}

mirror! {
    /// An extended control register (`struct kvm_xcr`). XCR0 is the only one so far.
    Xcr of kvm_xcr {
        /// Its number.
        index as xcr: u32,
        /// Its value.
        value: u64,
    }
}

mirror! {
    /// An MSR.
    Msr of kvm_msr_entry {
        /// Its index.
        index: u32,
        /// Its value.
        value as data: u64,
    }
}

/// A register that KVM has for itself and that is no MSR (`struct kvm_one_reg`): the shadow stack
/// pointer (Linux 6.18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct OneRegister {
    /// `KVM_REG_X86`, its size (64 bits, as all of x86's have) and its number.
    pub id: u64,
    /// Its value.
    pub value: u64,
}

mirror! {
    /// A leaf of CPUID (`struct kvm_cpuid_entry2`).
    CpuidLeaf of kvm_cpuid_entry2 {
        /// EAX that asks for it.
        function: u32,
        /// ECX that asks for it, where `flags` say that it matters.
        index: u32,
        /// `KVM_CPUID_FLAG_*`.
        flags: u32,
        /// EAX.
        eax: u32,
        /// EBX.
        ebx: u32,
        /// ECX.
        ecx: u32,
        /// EDX.
        edx: u32,
    }
}
