// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! CPUID: what a guest is told about its processor, from what the host's KVM supports.
//!
//! ```text
//!  KVM_GET_SUPPORTED_CPUID ──► Template::apply ──► HypervisorLeaves ──► CpuidPlan::apply ──► KVM_SET_CPUID2
//!   what this host can do       which model it       base, TSC            which of how many,
//!                               is to be             frequency            each vCPU its own
//! ```
//!
//! Each step takes a list of leaves and gives one; only the last differs from vCPU to vCPU. A machine that
//! is to be what the host is needs the last alone.
//!
//! `topology.rs` has sockets, cores, threads and their APIC ids, `levels.rs` the leaves that tell them;
//! `features.rs` the names of bits, `template.rs` models as data with `bits.rs` and `json.rs` as their
//! written form, `baseline.rs` the x86-64 levels, `diff.rs` what a model changes, in those names;
//! `xsave.rs` what follows when a feature goes; `hypervisor.rs` KVM's own leaves.
//!
//! Leaves: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; the hypervisor's:
//! Documentation/virt/kvm/x86/cpuid.rst.

mod baseline;
mod bits;
mod diff;
mod features;
mod hypervisor;
#[cfg(feature = "with-serde")]
mod json;
mod leaves;
mod levels;
mod template;
mod topology;
mod xsave;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

pub use baseline::{Baseline, UnknownBaseline};
pub use bits::{BitPattern, BitPatternError};
pub use diff::{Difference, differences};
pub use features::{FEATURE_WORDS, Feature, FeatureKind, FeatureWord, bit_names, feature};
pub use hypervisor::{HypervisorLeaves, HypervisorLeavesError, Timing};
pub use leaves::{Register, Signature, Vendor, Word, vendor_name};
pub use levels::TopologyLevels;
pub use template::{Edit, Template, TemplateError};
pub use topology::{Place, Topology, TopologyError};

pub(super) use leaves::find;

use crate::identity::VcpuId;
use leaves::set_to;

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF6_EAX_ARAT: u32 = 1 << 2;
const LEAF8000_0007_EBX_OVERFLOW_RECOV: u32 = 1 << 0;
const LEAF8000_0007_EBX_SUCCOR: u32 = 1 << 1;

/// Why a CPUID cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuidError {
    /// No processor of this topology has this number.
    #[error("vCPU {id}: {topology} have other APIC ids, up to {}", topology.highest_apic_id())]
    Id {
        /// The vCPU.
        id: VcpuId,
        /// What it should be part of.
        topology: Topology,
    },
    /// More leaves than KVM takes.
    #[error("{0} CPUID leaves, more than KVM takes")]
    TooMany(usize),
}

/// What one vCPU's CPUID is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidPlan {
    /// The vCPU's number, which is its APIC id: one of [`Topology::apic_ids`].
    pub id: VcpuId,
    /// The machine's processors.
    pub topology: Topology,
    /// Offer the TSC-deadline timer. To be set when `KVM_CAP_TSC_DEADLINE_TIMER` is there *and* the
    /// local APIC is in the kernel: `KVM_GET_SUPPORTED_CPUID` of many hosts leaves the bit out.
    pub tsc_deadline: bool,
    /// "APIC timer always running" (leaf 6): as the list has it, or set or cleared.
    pub arat: Option<bool>,
    /// Tell a guest with AMD's (or Hygon's) CPUID that a machine check is none that all of the machine dies of: that
    /// an uncorrectable error is contained and software can recover from it (`succor`), also where several came before
    /// one was looked at (`overflow_recov`). AMD APM volume 3, leaf 0x80000007. To be set where the guest
    /// [has banks](super::McgCap::for_guest) and is told of errors as [`MachineCheck`](super::MachineCheck) tells them:
    /// Linux recovers from none without it. `KVM_GET_SUPPORTED_CPUID` leaves the bits out, for KVM has no part in it
    /// (QEMU adds them as well, of late where the host's processor has them: but of an error that the host's processor
    /// cannot contain the host dies, and its guests are told nothing). Not set, the list's stay as they are; others'
    /// CPUID does not have it.
    pub mca_recovery: bool,
}

impl CpuidPlan {
    /// The CPUID: `model` is `KVM_GET_SUPPORTED_CPUID`'s answer, or what [`Template::apply`] made of it.
    /// The topology's leaves are made true, the hypervisor bit is set, and every other leaf is kept.
    ///
    /// # Errors
    /// [`CpuidError`].
    pub fn apply(&self, model: &[kvm_cpuid_entry2]) -> Result<CpuId, CpuidError> {
        let Self { id, topology, .. } = *self;
        let place = topology
            .place_of(id)
            .ok_or(CpuidError::Id { id, topology })?;
        let mut leaves = model.to_vec();
        let mca_recovery = self.mca_recovery && Vendor::of(model) == Vendor::Amd;
        for leaf in &mut leaves {
            match leaf.function {
                1 => {
                    leaf.ecx |= LEAF1_ECX_HYPERVISOR;
                    set_to(&mut leaf.ecx, LEAF1_ECX_TSC_DEADLINE, self.tsc_deadline);
                }
                6 => {
                    if let Some(arat) = self.arat {
                        set_to(&mut leaf.eax, LEAF6_EAX_ARAT, arat);
                    }
                }
                0x8000_0007 if mca_recovery => {
                    leaf.ebx |= LEAF8000_0007_EBX_OVERFLOW_RECOV | LEAF8000_0007_EBX_SUCCOR;
                }
                _ => {}
            }
        }
        let writer = levels::Writer {
            topology,
            id,
            place,
        };
        writer.write(&mut leaves);
        CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooMany(leaves.len()))
    }
}
