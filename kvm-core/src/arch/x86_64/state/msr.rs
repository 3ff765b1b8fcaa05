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
/// Asynchronous page faults: where the guest is told of them, and that it is.
pub(super) const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// By which vector it is told that a page is ready.
pub(super) const KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;
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

/// The MSRs in the order in which they are written: the TSC first, its deadline last. Before it, that asynchronous page
/// faults are on: KVM then queues a wake-up of all who wait for a page (what they were promised named pages of another
/// VM's), which goes out by the vector. KVM lists them the other way round.
pub(super) fn ordered(msrs: &[Msr]) -> Vec<Msr> {
    let mut ordered = msrs.to_vec();
    // Stable: all others stay as they are.
    ordered.sort_by_key(|msr| match msr.index {
        IA32_TSC => 0,
        KVM_ASYNC_PF_EN => 2,
        IA32_TSC_DEADLINE => 3,
        _ => 1,
    });
    ordered
}

/// Whether the guest hears of pages that are ready by a vector that is not among these MSRs: then the MSR that says so.
pub(super) fn told_by_no_vector(msrs: &[Msr]) -> Option<Msr> {
    /// Enabled, and told by interrupt.
    const ON: u64 = 1 << 0 | 1 << 3;
    let has = |msr: &Msr| msr.index == KVM_ASYNC_PF_INT;
    let on = |msr: &&Msr| msr.index == KVM_ASYNC_PF_EN && msr.value & ON == ON;
    msrs.iter()
        .find(on)
        .filter(|_| !msrs.iter().any(has))
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_comes_first_its_deadline_last_and_a_vector_before_what_uses_it() {
        let listed = [
            IA32_TSC_DEADLINE,
            0x174,
            KVM_ASYNC_PF_EN,
            0x4b56_4d03,
            KVM_ASYNC_PF_INT,
            IA32_TSC,
            0x277,
        ];
        let msrs = listed.map(|index| Msr { index, value: 1 });
        let written: Vec<u32> = ordered(&msrs).iter().map(|msr| msr.index).collect();
        let expected = [
            IA32_TSC,
            0x174,
            0x4b56_4d03,
            KVM_ASYNC_PF_INT,
            0x277,
            KVM_ASYNC_PF_EN,
            IA32_TSC_DEADLINE,
        ];
        assert_eq!(written, expected);
    }
}
