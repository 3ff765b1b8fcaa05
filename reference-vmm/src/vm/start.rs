// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the boot vCPU starts, and the tables that it starts with.

use kvm_core::Vcpu;
use kvm_core::arch::x86_64::{BootState, LongModeTables, TablesError, gdt};
use vm_memory::GuestAddress;

use super::error::BuildError;
use crate::arch::boot;

/// How the boot vCPU starts, and the tables that it starts with.
pub(super) enum StartState {
    Long64(LongModeTables),
    Protected32(GuestAddress),
}

impl StartState {
    pub(super) fn of(entry: &boot::Entry) -> Result<Self, TablesError> {
        Ok(match entry.mode {
            boot::CpuMode::Long64 => {
                // At most 4 (arch::boot says so), and what does not fit is refused here.
                let gib = u16::try_from(entry.identity_gib).unwrap_or(u16::MAX);
                StartState::Long64(LongModeTables::new(entry.page_tables, gib)?)
            }
            boot::CpuMode::Protected32 => StartState::Protected32(entry.gdt),
        })
    }

    /// What has to be in guest memory, and where.
    pub(super) fn tables(&self) -> (GuestAddress, Vec<u8>) {
        match self {
            StartState::Long64(tables) => (tables.base(), tables.bytes()),
            StartState::Protected32(at) => (*at, gdt(false).to_vec()),
        }
    }

    pub(super) fn set(&self, vcpu: &Vcpu, entry: &boot::Entry) -> Result<(), BuildError> {
        let reset = vcpu.sregs()?;
        let rip = GuestAddress(entry.rip);
        let mut state = match self {
            StartState::Long64(tables) => BootState::long_mode(&reset, tables, rip, entry.rsi),
            StartState::Protected32(at) => {
                let mut state = BootState::protected_mode(&reset, rip, 0, 0);
                (state.sregs.gdt.base, state.sregs.gdt.limit) = (at.0, gdt(false).len() as u16 - 1);
                state
            }
        };
        state.regs.rsp = entry.rsp;
        state.regs.rax = entry.rax;
        state.regs.rbx = entry.rbx;
        state.regs.rsi = entry.rsi;
        vcpu.set_boot_state(&state)?;
        Ok(())
    }
}
