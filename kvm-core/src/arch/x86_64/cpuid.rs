// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! CPUID for one vCPU, from what the host's KVM supports: the leaves that say *which* processor this
//! is and how many there are, made true; every other one, the brand and KVM's own among them, kept.
//!
//! The processors are cores of one socket, one thread each, with the vCPU's number as APIC id. Leaves:
//! Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; the hypervisor's:
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::identity::VcpuId;

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
const AMD_CMP_LEGACY: u32 = 1 << 1;

const LEVEL_INVALID: u32 = 0;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Why a CPUID cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuidError {
    /// No processor, or a processor beyond their number.
    #[error("vCPU {id} of {cpus}: numbers run from 0 and below the count")]
    Id {
        /// The vCPU.
        id: VcpuId,
        /// How many there are.
        cpus: u32,
    },
    /// More leaves than KVM takes.
    #[error("{0} CPUID leaves, more than KVM takes")]
    TooMany(usize),
}

/// What one vCPU's CPUID is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidPlan {
    /// The vCPU's number, which is its APIC id.
    pub id: VcpuId,
    /// How many vCPUs the guest is to see.
    pub cpus: u32,
    /// Offer the TSC-deadline timer. To be set when `KVM_CAP_TSC_DEADLINE_TIMER` is there *and* the
    /// local APIC is in the kernel: `KVM_GET_SUPPORTED_CPUID` of many hosts leaves the bit out.
    pub tsc_deadline: bool,
    /// "APIC timer always running" (leaf 6): as the host has it, or set or cleared.
    pub arat: Option<bool>,
}

impl CpuidPlan {
    /// The CPUID: `host` is `KVM_GET_SUPPORTED_CPUID`'s answer.
    ///
    /// # Errors
    /// [`CpuidError`].
    pub fn apply(&self, host: &[kvm_cpuid_entry2]) -> Result<CpuId, CpuidError> {
        let Self { id, cpus, .. } = *self;
        if id.0 >= cpus {
            return Err(CpuidError::Id { id, cpus });
        }
        let amd = is_amd(host);
        // Extended topology leaves are made anew below.
        let made_anew = |leaf: &kvm_cpuid_entry2| matches!(leaf.function, 0xb | 0x1f | 0x8000_0026);
        let mut leaves: Vec<_> = host
            .iter()
            .filter(|leaf| !made_anew(leaf))
            .copied()
            .collect();
        for leaf in &mut leaves {
            self.edit(leaf, amd);
        }
        let highest = find(host, 0).map_or(0, |leaf| leaf.eax);
        for function in [0xb, 0x1f] {
            // The host's list has 0x1f only where the processor does; 0xb it may leave to us.
            let listed = host.iter().any(|leaf| leaf.function == function);
            if highest >= function && (listed || function == 0xb) {
                leaves.extend(self.topology(function));
            }
        }
        CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooMany(leaves.len()))
    }

    /// APIC ids come in powers of two: how many of them the package spans.
    fn span(&self) -> u32 {
        self.cpus.checked_next_power_of_two().unwrap_or(1 << 31)
    }

    fn edit(&self, leaf: &mut kvm_cpuid_entry2, amd: bool) {
        let (id, cpus, span) = (self.id.0, self.cpus, self.span());
        match leaf.function {
            1 => {
                // EBX: CLFLUSH and brand index kept; the initial APIC id and the count have 8 bits.
                leaf.ebx = leaf.ebx & 0xffff | span.min(255) << 16 | (id & 0xff) << 24;
                leaf.ecx |= LEAF1_ECX_HYPERVISOR;
                set_to(&mut leaf.ecx, LEAF1_ECX_TSC_DEADLINE, self.tsc_deadline);
                set_to(&mut leaf.edx, LEAF1_EDX_HTT, cpus > 1);
                // APIC ids beyond 8 bits need it; KVM emulates it everywhere.
                if cpus > 255 {
                    leaf.ecx |= LEAF1_ECX_X2APIC;
                }
            }
            4 if leaf.eax & 0x1f != 0 => {
                leaf.eax = self.shared(leaf.eax) & 0x03ff_ffff | (span - 1).min(63) << 26;
            }
            6 => {
                if let Some(arat) = self.arat {
                    set_to(&mut leaf.eax, LEAF6_EAX_ARAT, arat);
                }
            }
            0x8000_0001 if amd => set_to(&mut leaf.ecx, AMD_CMP_LEGACY, cpus > 1),
            0x8000_0008 if amd => {
                let width = span.trailing_zeros();
                leaf.ecx = leaf.ecx & !0xf0ff | (cpus - 1).min(255) | width.min(15) << 12;
            }
            0x8000_001d if leaf.eax & 0x1f != 0 => leaf.eax = self.shared(leaf.eax),
            0x8000_001e => {
                // Extended APIC id; compute unit (a core of one thread); one node, number 0.
                leaf.eax = id;
                leaf.ebx = id & 0xff;
                leaf.ecx = 0;
            }
            _ => {}
        }
    }

    /// EAX of a cache leaf with bits 25:14, the processors that share the cache less one: levels 1 and
    /// 2 are a core's own, higher ones the package's.
    fn shared(&self, eax: u32) -> u32 {
        let level = eax >> 5 & 7;
        let sharing = if level >= 3 {
            (self.span() - 1).min(0xfff)
        } else {
            0
        };
        eax & !(0xfff << 14) | sharing << 14
    }

    /// Leaf 0xb or 0x1f: threads of a core (1), cores of the package, the end.
    fn topology(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        let width = self.span().trailing_zeros();
        let level = |index: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | kind << 8,
            edx: self.id.0,
            ..Default::default()
        };
        [
            level(0, LEVEL_SMT, 0, 1),
            level(1, LEVEL_CORE, width, self.cpus & 0xffff),
            level(2, LEVEL_INVALID, 0, 0),
        ]
    }
}

fn set_to(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

pub(super) fn find(leaves: &[kvm_cpuid_entry2], function: u32) -> Option<&kvm_cpuid_entry2> {
    leaves
        .iter()
        .find(|leaf| leaf.function == function && leaf.index == 0)
}

/// Leaf 0's vendor: EBX, EDX, ECX.
fn vendor(leaves: &[kvm_cpuid_entry2]) -> [u8; 12] {
    let mut name = [0; 12];
    if let Some(leaf) = find(leaves, 0) {
        for (i, word) in [leaf.ebx, leaf.edx, leaf.ecx].into_iter().enumerate() {
            name[4 * i..4 * i + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
    name
}

pub(super) fn is_intel(leaves: &[kvm_cpuid_entry2]) -> bool {
    vendor(leaves) == *b"GenuineIntel"
}

pub(super) fn is_amd(leaves: &[kvm_cpuid_entry2]) -> bool {
    matches!(&vendor(leaves), b"AuthenticAMD" | b"HygonGenuine")
}
