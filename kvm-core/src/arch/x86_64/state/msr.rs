// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSRs, read and written in bulk: KVM stops at the first that it refuses, and takes 255 at a time.

#![forbid(unsafe_code)]

use vmm_sys_util::errno::Error as Errno;

use super::error::RestoreError;
use super::host::AccessVcpu;
use super::piece::VcpuPiece;
use super::registers::Msr;

pub(super) const IA32_TSC: u32 = 0x10;
pub(super) const IA32_TSC_DEADLINE: u32 = 0x6e0;
pub(super) const IA32_MCG_CAP: u32 = 0x179;
const MC0_CTL: u32 = 0x400;
const MC0_CTL2: u32 = 0x280;
/// `MCG_CAP.MCG_CMCI_P`: each bank has an `IA32_MCi_CTL2`.
const MCG_CMCI_P: u64 = 1 << 10;
/// KVM says `E2BIG` to 256 (`MAX_IO_MSRS`).
const AT_ONCE: usize = 255;

/// The MSRs of a vCPU's machine check banks: four each, and a fifth (when to raise an interrupt for what was
/// corrected) where it has those. Of 32 banks at most, which is KVM's limit.
pub(super) fn banks(mcg_cap: Option<u64>) -> impl Iterator<Item = u32> {
    let cap = mcg_cap.unwrap_or(0);
    let count = (cap & 0xff).min(32) as u32;
    let corrected = if cap & MCG_CMCI_P == 0 { 0 } else { count };
    (MC0_CTL..MC0_CTL + 4 * count).chain(MC0_CTL2..MC0_CTL2 + corrected)
}

/// Reads MSRs; those that cannot be read are told apart.
pub(super) fn read<V: AccessVcpu + ?Sized>(
    vcpu: &V,
    indices: impl Iterator<Item = u32>,
) -> Result<(Vec<Msr>, Vec<u32>), Errno> {
    let mut all: Vec<Msr> = indices.map(|index| Msr { index, value: 0 }).collect();
    let mut unreadable = Vec::new();
    let mut done = 0;
    while done < all.len() {
        let end = all.len().min(done + AT_ONCE);
        let Some(some) = all.get_mut(done..end) else {
            break;
        };
        done += vcpu.get_msrs(some)?.min(some.len());
        if done < end {
            unreadable.push(all.remove(done).index);
        }
    }
    Ok((all, unreadable))
}

/// Writes MSRs. One that is refused and has its value already is as good as written: KVM lets nobody
/// write some that it makes up itself.
pub(super) fn write<V: AccessVcpu + ?Sized>(vcpu: &V, msrs: &[Msr]) -> Result<(), RestoreError> {
    let failed = |errno| RestoreError::Failed {
        piece: VcpuPiece::Msrs,
        errno,
    };
    let mut rest = msrs;
    while !rest.is_empty() {
        let some = rest.get(..AT_ONCE).unwrap_or(rest);
        let set = vcpu.put_msrs(some).map_err(failed)?.min(some.len());
        rest = rest.get(set..).unwrap_or_default();
        if set == some.len() {
            continue;
        }
        let Some((refused, behind)) = rest.split_first() else {
            break;
        };
        let mut now = [Msr {
            index: refused.index,
            value: 0,
        }];
        let host = (vcpu.get_msrs(&mut now).map_err(failed)? == 1).then_some(now[0].value);
        if host != Some(refused.value) {
            let Msr { index, value } = *refused;
            return Err(RestoreError::Msr { index, value, host });
        }
        rest = behind;
    }
    Ok(())
}

/// The MSRs in the order in which they are written: the TSC first, its deadline last.
pub(super) fn ordered(msrs: &[Msr]) -> Vec<Msr> {
    let mut ordered = msrs.to_vec();
    // Stable: all others stay as they are.
    ordered.sort_by_key(|msr| match msr.index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    ordered
}
