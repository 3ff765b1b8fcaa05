// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a host can take a state: all that can be known before anything is changed.

#![forbid(unsafe_code)]

use super::error::Refusal;
use super::host::StateHost;
use super::piece::VcpuPiece;
use super::{LAPIC_BYTES, VcpuState};

/// `struct kvm_nested_state` without its data.
const NESTED_HEADER: usize = 128;

impl StateHost {
    /// Whether this host can take a state, as far as can be known without a vCPU: before a migration,
    /// for example. [`StateHost::restore`] asks as well.
    ///
    /// # Errors
    /// [`Refusal`]: the first reason that was found.
    pub fn check(&self, state: &VcpuState) -> Result<(), Refusal> {
        self.check_cpuid(&state.cpuid)?;
        self.check_xsave(state)?;
        self.check_msrs(state)?;
        self.check_nested(state)?;
        if let Some(page) = &state.lapic
            && page.len() != LAPIC_BYTES
        {
            return Err(Refusal::LapicSize(page.len()));
        }
        let needs = [
            (
                !state.xcrs.is_empty() && !self.xcrs,
                VcpuPiece::Xcrs,
                "KVM_CAP_XCRS",
            ),
            (
                !state.one_registers.is_empty() && !self.one_reg,
                VcpuPiece::OneRegisters,
                "KVM_CAP_ONE_REG",
            ),
        ];
        match needs.into_iter().find(|need| need.0) {
            Some((_, piece, capability)) => Err(Refusal::Capability { piece, capability }),
            None => Ok(()),
        }
    }

    fn check_msrs(&self, state: &VcpuState) -> Result<(), Refusal> {
        if let Some(msr) = super::msr::told_by_no_vector(&state.msrs) {
            return Err(Refusal::AsyncPfVector { enable: msr.value });
        }
        let lost = |msr: &&super::Msr| msr.value != 0 && !self.has_msr(msr.index, state.mcg_cap);
        match state.msrs.iter().find(lost) {
            Some(msr) => Err(Refusal::Msr {
                index: msr.index,
                value: msr.value,
            }),
            None => Ok(()),
        }
    }

    fn check_nested(&self, state: &VcpuState) -> Result<(), Refusal> {
        let Some(nested) = &state.nested else {
            return Ok(());
        };
        if self.nested_bytes == 0 {
            return Err(Refusal::Capability {
                piece: VcpuPiece::Nested,
                capability: "KVM_CAP_NESTED_STATE (nested virtualization)",
            });
        }
        let (len, min, max) = (nested.len(), NESTED_HEADER, self.nested_bytes);
        // The header says its own length, and KVM reads as much as it says.
        let says = nested.get(4..).and_then(<[u8]>::first_chunk::<4>);
        let says = says.map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize);
        if !(min..=max).contains(&len) || says > len {
            return Err(Refusal::NestedSize { len, min, max });
        }
        Ok(())
    }
}
