// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Restoring a vCPU: checked against host and vCPU first, then written piece by piece.

#![forbid(unsafe_code)]

use vmm_sys_util::errno::Error as Errno;

use super::clock::Passage;
use super::error::{Refusal, RestoreError};
use super::host::{AccessVcpu, StateHost};
use super::piece::VcpuPiece;
use super::registers::Msr;
use super::save::{EINVAL, ENOTTY, ENXIO, mcg_cap, where_there};
use super::{VcpuState, msr};

/// What a restore did that is not plain from the state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// MSRs that this host does not have, and whose value was 0: nothing is lost by leaving them out.
    pub skipped_msrs: Vec<u32>,
    /// What became of the time-stamp counter.
    pub tsc: TscRestored,
}

/// What became of a restored vCPU's time-stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TscRestored {
    /// Its offset was set.
    Offset,
    /// Its value was written, and KVM makes the counters of vCPUs that are restored within a second of
    /// each other equal.
    #[default]
    Value,
    /// KVM said yes, and the counter is where it was: the guest sees the host's, which may jump.
    /// KVM's PVM back end does so.
    HostsOwn,
}

/// What is known of the vCPU before the first piece is written.
struct Target {
    khz: u32,
    mcg_cap: Option<u64>,
    /// The offset to set, if the TSC goes by offset.
    offset: Option<u64>,
}

impl StateHost {
    /// Lets a vCPU take a state on: one that has never run, of a VM whose memory is in place and whose
    /// clock is restored (`passage`; [`Passage::default`] where it was not). One that has run may be
    /// taken back to an earlier state of its own: KVM then refuses another CPUID.
    ///
    /// # Errors
    /// [`RestoreError::Refused`] has changed nothing. After any other the vCPU is to be thrown away.
    pub fn restore<V: AccessVcpu + ?Sized>(
        &self,
        vcpu: &V,
        state: &VcpuState,
        passage: &Passage,
    ) -> Result<Restored, RestoreError> {
        self.check(state)?;
        let target = self.target(vcpu, state, passage)?;
        for &piece in VcpuPiece::RESTORE_ORDER {
            self.put(vcpu, piece, state, passage, &target)?;
        }
        let lost = |msr: &&Msr| !self.has_msr(msr.index, state.mcg_cap);
        Ok(Restored {
            skipped_msrs: state.msrs.iter().filter(lost).map(|m| m.index).collect(),
            tsc: self.tsc_restored(vcpu, state, passage, &target)?,
        })
    }

    /// Looks where the counter is. Ten seconds lie between writing and reading at most, or this host is
    /// too busy for its guest's timers anyway.
    fn tsc_restored<V: AccessVcpu + ?Sized>(
        &self,
        vcpu: &V,
        state: &VcpuState,
        passage: &Passage,
        target: &Target,
    ) -> Result<TscRestored, RestoreError> {
        let failed = |piece| move |errno| RestoreError::Failed { piece, errno };
        if let Some(offset) = target.offset {
            let now = vcpu.tsc_offset().map_err(failed(VcpuPiece::TscOffset))?;
            let set = now == offset;
            return Ok(if set {
                TscRestored::Offset
            } else {
                TscRestored::HostsOwn
            });
        }
        let mut now = [Msr {
            index: msr::IA32_TSC,
            value: 0,
        }];
        let Some(saved) = state.msr(msr::IA32_TSC) else {
            return Ok(TscRestored::Value);
        };
        if vcpu.get_msrs(&mut now).map_err(failed(VcpuPiece::Msrs))? == 0 {
            return Ok(TscRestored::HostsOwn);
        }
        let wanted = saved.wrapping_add(passage.elapsed_cycles(state.tsc_khz));
        let apart = now[0].value.wrapping_sub(wanted) as i64;
        let near = apart.unsigned_abs() <= u64::from(state.tsc_khz) * 10_000;
        Ok(if near {
            TscRestored::Value
        } else {
            TscRestored::HostsOwn
        })
    }

    /// Asks the vCPU what must be known of it. Reads only.
    fn target<V: AccessVcpu + ?Sized>(
        &self,
        vcpu: &V,
        state: &VcpuState,
        passage: &Passage,
    ) -> Result<Target, Refusal> {
        let read = |piece| move |errno| Refusal::Read { piece, errno };
        let lapic = where_there(vcpu.lapic(), &[EINVAL]).map_err(read(VcpuPiece::Lapic))?;
        if lapic.is_some() != state.lapic.is_some() {
            let state = state.lapic.is_some();
            return Err(Refusal::LapicPlace { state });
        }
        let khz = vcpu.tsc_khz().map_err(read(VcpuPiece::TscFrequency))?;
        if !self.tsc_control && !near(state.tsc_khz, khz) {
            let state = state.tsc_khz;
            return Err(Refusal::TscFrequency { state, host: khz });
        }
        let has = mcg_cap(vcpu).map_err(read(VcpuPiece::MachineCheckBanks))?;
        if has.is_none() && state.mcg_cap.is_some() {
            return Err(Refusal::Capability {
                piece: VcpuPiece::MachineCheckBanks,
                capability: "KVM_CAP_MCE",
            });
        }
        let mut offset = passage.offset(state, khz);
        if offset.is_some() {
            let has = where_there(vcpu.tsc_offset(), &[ENXIO, EINVAL, ENOTTY])
                .map_err(read(VcpuPiece::TscOffset))?;
            offset = has.and(offset);
        }
        Ok(Target {
            khz,
            mcg_cap: has,
            offset,
        })
    }

    fn put<V: AccessVcpu + ?Sized>(
        &self,
        vcpu: &V,
        piece: VcpuPiece,
        state: &VcpuState,
        passage: &Passage,
        target: &Target,
    ) -> Result<(), RestoreError> {
        let plain =
            |done: Result<(), Errno>| done.map_err(|errno| RestoreError::Failed { piece, errno });
        match piece {
            VcpuPiece::Cpuid => match vcpu.set_cpuid(&state.cpuid) {
                // A vCPU that has run takes no other CPUID, and until Linux 6.2 not always its own.
                Err(refused) if refused.errno() == EINVAL => match vcpu.cpuid() {
                    Ok(has) if has == state.cpuid => Ok(()),
                    _ => plain(Err(refused)),
                },
                done => plain(done),
            },
            VcpuPiece::TscFrequency if state.tsc_khz != target.khz => {
                plain(vcpu.set_tsc_khz(state.tsc_khz))
            }
            VcpuPiece::MachineCheckBanks => match state.mcg_cap {
                Some(cap) if target.mcg_cap != Some(cap) => plain(vcpu.set_up_mce(cap)),
                _ => Ok(()),
            },
            VcpuPiece::SystemRegisters => plain(vcpu.set_system(&state.system, self.sregs2)),
            VcpuPiece::Xcrs if !state.xcrs.is_empty() => plain(vcpu.set_xcrs(&state.xcrs)),
            VcpuPiece::Xsave => plain(vcpu.set_xsave(&state.xsave)),
            VcpuPiece::DebugRegisters => plain(vcpu.set_debug(&state.debug)),
            VcpuPiece::GeneralRegisters => plain(vcpu.set_registers(&state.registers)),
            VcpuPiece::Lapic => match &state.lapic {
                Some(page) => plain(vcpu.set_lapic(page)),
                None => Ok(()),
            },
            VcpuPiece::TscOffset => match target.offset {
                Some(offset) => plain(vcpu.set_tsc_offset(offset)),
                None => Ok(()),
            },
            VcpuPiece::Msrs => msr::write(vcpu, &self.msrs_to_write(state, passage, target)),
            VcpuPiece::OneRegisters => state
                .one_registers
                .iter()
                .try_for_each(|register| plain(vcpu.set_one_register(register))),
            VcpuPiece::Nested => match &state.nested {
                Some(nested) => plain(vcpu.set_nested(nested)),
                None => Ok(()),
            },
            VcpuPiece::Events => plain(vcpu.set_events(&state.events)),
            VcpuPiece::MpState => plain(vcpu.set_mp_state(state.mp_state)),
            VcpuPiece::ClockGap => plain(where_there(vcpu.tell_clock_gap(), &[EINVAL]).map(drop)),
            VcpuPiece::TscFrequency | VcpuPiece::Xcrs => Ok(()),
        }
    }

    fn msrs_to_write(&self, state: &VcpuState, passage: &Passage, target: &Target) -> Vec<Msr> {
        let mut msrs = msr::ordered(&state.msrs);
        msrs.retain(|msr| {
            let by_offset = msr.index == msr::IA32_TSC && target.offset.is_some();
            self.has_msr(msr.index, state.mcg_cap) && !by_offset
        });
        if let Some(tsc) = msrs.iter_mut().find(|msr| msr.index == msr::IA32_TSC) {
            tsc.value = tsc
                .value
                .wrapping_add(passage.elapsed_cycles(state.tsc_khz));
        }
        msrs
    }
}

/// KVM takes a frequency for its own within 250 parts in a million.
fn near(wanted: u32, host: u32) -> bool {
    u64::from(wanted.abs_diff(host)) * 1_000_000 <= u64::from(host) * 250
}
