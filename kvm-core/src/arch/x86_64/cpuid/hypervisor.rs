// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The hypervisor's leaves: where KVM's are, and how fast time goes.
//!
//! Which of KVM's features a guest sees (leaf base + 1) is a [`Template`](super::Template)'s to say: they
//! have names as others do, `kvm_clocksource` and so on. KVM itself looks for its signature in the
//! vCPU's list, so features that are hidden are also refused, and the base may be moved.

use std::num::NonZeroU32;

use kvm_bindings::kvm_cpuid_entry2;

use super::features::feature;
use super::leaves::{subleaf_mut, zeros};

/// The first leaf that is the hypervisor's, and KVM's base where nothing else is said.
const FIRST: u32 = 0x4000_0000;
/// Leaves of one interface.
const STRIDE: u32 = 0x100;
/// Linux looks for a signature below this (`cpuid_base_hypervisor`).
const END: u32 = 0x4001_0000;
const SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];
const TIMING: u32 = 0x10;

/// A base that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HypervisorLeavesError {
    /// Guests would not find it.
    #[error(
        "KVM's leaves at {0:#x}: guests look for them at multiples of 0x100 from 0x40000000 to 0x4000ff00"
    )]
    Base(u32),
}

/// How fast time goes, for a guest that would have to measure it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Frequency of the TSC in kHz: `KVM_GET_TSC_KHZ`.
    pub tsc_khz: NonZeroU32,
    /// Frequency of the local APIC's timer in kHz, before its divider.
    pub apic_khz: u32,
}

impl Timing {
    /// With the timer as KVM has it unless `KVM_CAP_X86_APIC_BUS_CYCLES_NS` was enabled: 1 GHz.
    #[must_use]
    pub const fn new(tsc_khz: NonZeroU32) -> Self {
        Self {
            tsc_khz,
            apic_khz: 1_000_000,
        }
    }
}

/// Where KVM's leaves are, and whether they tell the frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HypervisorLeaves {
    base: u32,
    timing: Option<Timing>,
}

impl Default for HypervisorLeaves {
    /// At 0x4000_0000, without frequencies: as KVM lists them.
    fn default() -> Self {
        Self {
            base: FIRST,
            timing: None,
        }
    }
}

impl HypervisorLeaves {
    /// KVM's leaves at `base`; where another interface (Hyper-V's) is at 0x4000_0000, 0x4000_0100 is usual.
    ///
    /// # Errors
    /// [`HypervisorLeavesError::Base`].
    pub const fn at(base: u32) -> Result<Self, HypervisorLeavesError> {
        if base < FIRST || base >= END || !base.is_multiple_of(STRIDE) {
            return Err(HypervisorLeavesError::Base(base));
        }
        Ok(Self { base, timing: None })
    }

    /// Where they are.
    #[must_use]
    pub const fn base(&self) -> u32 {
        self.base
    }

    /// With the frequencies in leaf base + 0x10, VMware's, which QEMU and cloud-hypervisor give as well. They are
    /// told only where the list has `invtsc`: another TSC has no one frequency. (Leaves 0x15 and 0x16
    /// speak of a crystal and a bus that a virtual machine does not have; they stay as KVM lists them.)
    #[must_use]
    pub const fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = Some(timing);
        self
    }

    /// Moves KVM's leaves of the list to their base and adds the frequencies. A list without KVM's
    /// signature stays as it is.
    pub fn apply(&self, leaves: &mut Vec<kvm_cpuid_entry2>) {
        let signed = |leaf: &kvm_cpuid_entry2| [leaf.ebx, leaf.ecx, leaf.edx] == SIGNATURE;
        let Some(from) = leaves
            .iter()
            .find(|leaf| (FIRST..END).contains(&leaf.function) && signed(leaf))
            .map(|leaf| leaf.function)
        else {
            return;
        };
        // An interface that is at the new base would be found instead.
        if from != self.base {
            let taken = self.base..self.base + STRIDE;
            leaves.retain(|leaf| !taken.contains(&leaf.function));
        }
        let moved = |function: u32| self.base + (function - from);
        let mine = from..from.saturating_add(STRIDE);
        for leaf in leaves.iter_mut().filter(|l| mine.contains(&l.function)) {
            leaf.function = moved(leaf.function);
        }
        let first = subleaf_mut(leaves, self.base, 0);
        // 0 of old hosts means the first one (cpuid.rst).
        let highest = if mine.contains(&first.eax) {
            moved(first.eax)
        } else {
            self.base + 1
        };
        let told = match self.timing {
            Some(timing) if invariant(leaves) => {
                let leaf = subleaf_mut(leaves, self.base + TIMING, 0);
                *leaf = zeros(self.base + TIMING, 0);
                (leaf.eax, leaf.ebx) = (timing.tsc_khz.get(), timing.apic_khz);
                self.base + TIMING
            }
            _ => 0,
        };
        subleaf_mut(leaves, self.base, 0).eax = highest.max(told);
    }
}

fn invariant(leaves: &[kvm_cpuid_entry2]) -> bool {
    feature("invtsc").is_some_and(|found| found.word.of(leaves) & found.mask() != 0)
}
