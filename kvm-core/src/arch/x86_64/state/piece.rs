// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pieces of a vCPU's state, and their two orders.

#![forbid(unsafe_code)]

use std::fmt;

/// A piece of a vCPU's state, read and written by ioctls of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VcpuPiece {
    /// `KVM_GET_CPUID2`, `KVM_SET_CPUID2`.
    Cpuid,
    /// `KVM_GET_TSC_KHZ`, `KVM_SET_TSC_KHZ`.
    TscFrequency,
    /// `IA32_MCG_CAP`, `KVM_X86_SETUP_MCE`.
    MachineCheckBanks,
    /// `KVM_GET_SREGS2`, `KVM_SET_SREGS2`, or the older pair.
    SystemRegisters,
    /// `KVM_GET_XCRS`, `KVM_SET_XCRS`.
    Xcrs,
    /// `KVM_GET_XSAVE2` (or `KVM_GET_XSAVE`), `KVM_SET_XSAVE`.
    Xsave,
    /// `KVM_GET_DEBUGREGS`, `KVM_SET_DEBUGREGS`.
    DebugRegisters,
    /// `KVM_GET_REGS`, `KVM_SET_REGS`.
    GeneralRegisters,
    /// `KVM_GET_LAPIC`, `KVM_SET_LAPIC`.
    Lapic,
    /// The vCPU's attribute `KVM_VCPU_TSC_OFFSET`.
    TscOffset,
    /// `KVM_GET_MSRS`, `KVM_SET_MSRS`.
    Msrs,
    /// `KVM_GET_REG_LIST`, `KVM_GET_ONE_REG`, `KVM_SET_ONE_REG`.
    OneRegisters,
    /// `KVM_GET_NESTED_STATE`, `KVM_SET_NESTED_STATE`.
    Nested,
    /// `KVM_GET_VCPU_EVENTS`, `KVM_SET_VCPU_EVENTS`.
    Events,
    /// `KVM_GET_MP_STATE`, `KVM_SET_MP_STATE`.
    MpState,
    /// `KVM_KVMCLOCK_CTRL`, when it is restored: kvm-clock's guest is told that it stood still.
    ClockGap,
}

impl VcpuPiece {
    /// The order of saving; the [module's doc](super) argues it.
    pub const SAVE_ORDER: &'static [Self] = &[
        Self::MpState,
        Self::Events,
        Self::GeneralRegisters,
        Self::SystemRegisters,
        Self::DebugRegisters,
        Self::Xcrs,
        Self::Xsave,
        Self::Cpuid,
        Self::TscFrequency,
        Self::TscOffset,
        Self::MachineCheckBanks,
        Self::Msrs,
        Self::OneRegisters,
        Self::Lapic,
        Self::Nested,
    ];

    /// The order of restoring; the [module's doc](super) argues it.
    pub const RESTORE_ORDER: &'static [Self] = &[
        Self::Cpuid,
        Self::TscFrequency,
        Self::MachineCheckBanks,
        Self::SystemRegisters,
        Self::Xcrs,
        Self::Xsave,
        Self::DebugRegisters,
        Self::GeneralRegisters,
        Self::Lapic,
        Self::TscOffset,
        Self::Msrs,
        Self::OneRegisters,
        Self::Nested,
        Self::Events,
        Self::MpState,
        Self::ClockGap,
    ];
}

impl fmt::Display for VcpuPiece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpuid => "CPUID",
            Self::TscFrequency => "TSC frequency",
            Self::MachineCheckBanks => "machine check banks",
            Self::SystemRegisters => "system registers",
            Self::Xcrs => "extended control registers",
            Self::Xsave => "XSAVE area",
            Self::DebugRegisters => "debug registers",
            Self::GeneralRegisters => "general registers",
            Self::Lapic => "local APIC",
            Self::TscOffset => "TSC offset",
            Self::Msrs => "MSRs",
            Self::OneRegisters => "KVM's own registers",
            Self::Nested => "nested state",
            Self::Events => "events",
            Self::MpState => "MP state",
            Self::ClockGap => "kvm-clock's gap",
        })
    }
}
