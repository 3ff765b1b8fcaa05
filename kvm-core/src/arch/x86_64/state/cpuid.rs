// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a host's KVM offers the features that a guest was told of. KVM itself takes almost any
//! CPUID, and the guest then dies at its first instruction that is not there.

#![forbid(unsafe_code)]

use super::error::Refusal;
use super::host::StateHost;
use super::registers::CpuidLeaf;

const KVM_LEAVES: u32 = 0x4000_0000;
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
const TSC_DEADLINE: u32 = 1 << 24;
const MWAIT: u32 = 1 << 3;
const DISABLE_MWAIT: u32 = 1;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    const fn name(self) -> &'static str {
        match self {
            Eax => "EAX",
            Ebx => "EBX",
            Ecx => "ECX",
            Edx => "EDX",
        }
    }

    const fn of(self, leaf: &CpuidLeaf) -> u32 {
        match self {
            Eax => leaf.eax,
            Ebx => leaf.ebx,
            Ecx => leaf.ecx,
            Edx => leaf.edx,
        }
    }
}

/// The registers that are sets of features, and those of their bits that say no feature of the host:
/// function, index, register, bits left out.
///
/// Left out are x2APIC, which KVM emulates everywhere; "hypervisor"; OSXSAVE and OSPKE, which mirror
/// CR4; HTT and CmpLegacy, which say how many processors there are; and TopologyExtensions, which says that
/// there are leaves of it ([`CpuidPlan`](super::super::CpuidPlan) makes them where a host lists none).
const FEATURES: &[(u32, u32, Register, u32)] = &[
    (1, 0, Ecx, 1 << 21 | 1 << 27 | 1 << 31),
    (1, 0, Edx, 1 << 28),
    (7, 0, Ebx, 0),
    (7, 0, Ecx, 1 << 4),
    (7, 0, Edx, 0),
    (7, 1, Eax, 0),
    (7, 1, Ebx, 0),
    (7, 1, Ecx, 0),
    (7, 1, Edx, 0),
    (7, 2, Edx, 0),
    (0xd, 0, Eax, 0),
    (0xd, 0, Edx, 0),
    (0xd, 1, Eax, 0),
    (0xd, 1, Ecx, 0),
    (0xd, 1, Edx, 0),
    (0x8000_0001, 0, Ecx, 1 << 1 | 1 << 22),
    (0x8000_0001, 0, Edx, 0),
    (0x8000_0007, 0, Edx, 0),
    (0x8000_0008, 0, Ebx, 0),
    (0x8000_000a, 0, Edx, 0),
    (0x8000_0021, 0, Eax, 0),
];

pub(super) fn find(leaves: &[CpuidLeaf], function: u32, index: u32) -> Option<&CpuidLeaf> {
    leaves
        .iter()
        .find(|leaf| leaf.function == function && leaf.index == index)
}

impl StateHost {
    pub(super) fn check_cpuid(&self, guest: &[CpuidLeaf]) -> Result<(), Refusal> {
        if guest.len() > kvm_bindings::KVM_MAX_CPUID_ENTRIES {
            return Err(Refusal::TooManyLeaves(guest.len()));
        }
        for &(function, index, register, left_out) in FEATURES {
            let at = (function, index);
            self.compare(
                guest,
                at,
                at,
                register,
                left_out | self.beyond_the_list(at, register),
            )?;
        }
        // KVM's own features may stand behind another hypervisor's, 0x100 leaves apart.
        let mut bases = (KVM_LEAVES..KVM_LEAVES + 0x1_0000).step_by(0x100);
        let is_kvms = |base: &u32| {
            find(guest, *base, 0).is_some_and(|l| [l.ebx, l.ecx, l.edx] == KVM_SIGNATURE)
        };
        if let Some(base) = bases.find(is_kvms) {
            self.compare(guest, (base + 1, 0), (KVM_LEAVES + 1, 0), Eax, 0)?;
        }
        let bits = |leaves| find(leaves, 0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xff);
        let (state, host) = (bits(guest), bits(&self.cpuid));
        if state > host {
            return Err(Refusal::PhysicalAddressBits { state, host });
        }
        Ok(())
    }

    /// Bits that a guest may have although `KVM_GET_SUPPORTED_CPUID` leaves them out.
    fn beyond_the_list(&self, at: (u32, u32), register: Register) -> u32 {
        if (at, register) != ((1, 0), Ecx) {
            return 0;
        }
        let deadline = if self.tsc_deadline { TSC_DEADLINE } else { 0 };
        let mwait = if self.disable_exits & DISABLE_MWAIT != 0 {
            MWAIT
        } else {
            0
        };
        deadline | mwait
    }

    fn compare(
        &self,
        guest: &[CpuidLeaf],
        (function, index): (u32, u32),
        host_at: (u32, u32),
        register: Register,
        left_out: u32,
    ) -> Result<(), Refusal> {
        let of = |leaf| register.of(leaf);
        let wanted = find(guest, function, index).map_or(0, of);
        let has = find(&self.cpuid, host_at.0, host_at.1).map_or(0, of);
        match wanted & !has & !left_out {
            0 => Ok(()),
            bits => Err(Refusal::Cpuid {
                function,
                index,
                register: register.name(),
                bits,
            }),
        }
    }
}
