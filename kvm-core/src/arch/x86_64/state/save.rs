// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Saving a vCPU: one piece after the other.

#![forbid(unsafe_code)]

use vmm_sys_util::errno::Error as Errno;

use super::error::SaveError;
use super::host::{AccessVcpu, StateHost};
use super::piece::VcpuPiece;
use super::registers::Msr;
use super::{StateBytes, VcpuState, msr};

pub(super) const ENXIO: i32 = 6;
pub(super) const EINVAL: i32 = 22;
pub(super) const ENOTTY: i32 = 25;

/// `None` where the errno says that there is no such thing.
pub(super) fn where_there<T>(answer: Result<T, Errno>, absent: &[i32]) -> Result<Option<T>, Errno> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(errno) if absent.contains(&errno.errno()) => Ok(None),
        Err(errno) => Err(errno),
    }
}

impl StateHost {
    /// All that KVM knows of a vCPU. It and the VM's others are paused (the [module's doc](super) says
    /// how), and it is the same for the ioctls alone.
    ///
    /// # Errors
    /// [`SaveError`]. Nothing was changed, but that a pending INIT, SIPI or exception payload was
    /// taken, as the next entry would have.
    pub fn save<V: AccessVcpu + ?Sized>(&self, vcpu: &V) -> Result<VcpuState, SaveError> {
        let mut state = VcpuState::default();
        for &piece in VcpuPiece::SAVE_ORDER {
            self.get(vcpu, piece, &mut state)
                .map_err(|errno| SaveError { piece, errno })?;
        }
        Ok(state)
    }

    fn get<V: AccessVcpu + ?Sized>(
        &self,
        vcpu: &V,
        piece: VcpuPiece,
        state: &mut VcpuState,
    ) -> Result<(), Errno> {
        match piece {
            VcpuPiece::MpState => state.mp_state = vcpu.mp_state()?,
            VcpuPiece::Events => state.events = vcpu.events()?,
            VcpuPiece::GeneralRegisters => state.registers = vcpu.registers()?,
            VcpuPiece::SystemRegisters => state.system = vcpu.system(self.sregs2)?,
            VcpuPiece::DebugRegisters => state.debug = vcpu.debug()?,
            VcpuPiece::Xcrs if self.xcrs => state.xcrs = vcpu.xcrs()?,
            VcpuPiece::Xsave => {
                let mut area = vcpu.xsave(self.xsave2)?;
                area.truncate(self.xsave_bytes);
                state.xsave = StateBytes(area);
            }
            VcpuPiece::Cpuid => state.cpuid = vcpu.cpuid()?,
            VcpuPiece::TscFrequency => state.tsc_khz = vcpu.tsc_khz()?,
            VcpuPiece::TscOffset => {
                // EINVAL of kernels that know no attributes of a vCPU.
                state.tsc_offset = where_there(vcpu.tsc_offset(), &[ENXIO, EINVAL, ENOTTY])?;
            }
            VcpuPiece::MachineCheckBanks => state.mcg_cap = mcg_cap(vcpu)?,
            VcpuPiece::Msrs => {
                let listed = self.msrs.iter().copied();
                let banks = msr::banks(state.mcg_cap).filter(|bank| !self.msrs.contains(bank));
                (state.msrs, state.unreadable_msrs) = msr::read(vcpu, listed.chain(banks))?;
            }
            VcpuPiece::OneRegisters if self.one_reg => {
                state.one_registers = vcpu.one_registers()?
            }
            VcpuPiece::Lapic => {
                state.lapic = where_there(vcpu.lapic(), &[EINVAL])?.map(StateBytes);
            }
            VcpuPiece::Nested if self.nested_bytes > 0 => {
                state.nested = Some(StateBytes(vcpu.nested(self.nested_bytes)?));
            }
            VcpuPiece::Xcrs | VcpuPiece::OneRegisters | VcpuPiece::Nested | VcpuPiece::ClockGap => {
            }
        }
        Ok(())
    }
}

/// `IA32_MCG_CAP`, where the vCPU has machine check banks.
pub(super) fn mcg_cap<V: AccessVcpu + ?Sized>(vcpu: &V) -> Result<Option<u64>, Errno> {
    let mut cap = [Msr {
        index: msr::IA32_MCG_CAP,
        value: 0,
    }];
    Ok((vcpu.get_msrs(&mut cap)? == 1).then_some(cap[0].value))
}
