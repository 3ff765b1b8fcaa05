// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What KVM says that it can do, capability by capability, with the crate that wants it.

use kvm_core::{CheckExtension, Kvm};

/// kvm-bindings' names, and those of newer kernels.
mod kvm {
    pub use kvm_bindings::*;

    pub const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = crate::memory::CAP_GUEST_MEMFD_FLAGS;
}

/// How much this monitor depends on a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Guests do not run without it.
    Required,
    /// Used where it is there.
    Used,
    /// Not used yet, or for special purposes.
    Optional,
}

impl Need {
    /// One word for programs.
    pub fn name(self) -> &'static str {
        match self {
            Need::Required => "required",
            Need::Used => "used",
            Need::Optional => "optional",
        }
    }
}

/// One of KVM's capabilities.
#[derive(Debug)]
pub struct Capability {
    /// The crate that wants it.
    pub wanted_by: &'static str,
    /// Its name, without `KVM_CAP_`.
    pub name: &'static str,
    /// How much it is wanted.
    pub need: Need,
    /// What it is for.
    pub purpose: &'static str,
    /// KVM's answer: 0 is no; 1 is yes, and what is above is a value of its own.
    pub value: i32,
}

impl Capability {
    /// Whether KVM has it.
    pub fn is_there(&self) -> bool {
        self.value > 0
    }
}

/// Asks for all of them, in the table's order: by crate.
pub(super) fn ask(kvm: &Kvm) -> Vec<Capability> {
    TABLE
        .iter()
        .map(|&(wanted_by, name, number, need, purpose)| Capability {
            wanted_by,
            name,
            need,
            purpose,
            value: CheckExtension::check_extension(kvm.fd(), number).max(0),
        })
        .collect()
}

type Row = (&'static str, &'static str, u32, Need, &'static str);

macro_rules! table {
    ($($krate:literal { $($name:ident $need:ident $purpose:literal)* })*) => {
        &[$($((
            $krate,
            // `KVM_CAP_` is cut off at compile time, so that a name cannot differ from its number.
            without_prefix(stringify!($name)),
            kvm::$name,
            Need::$need,
            $purpose,
        ),)*)*]
    };
}

const fn without_prefix(name: &'static str) -> &'static str {
    name.split_at("KVM_CAP_".len()).1
}

const TABLE: &[Row] = table! {
    "kvm-core" {
        KVM_CAP_IMMEDIATE_EXIT Required "kicks that are never lost"
        KVM_CAP_EXT_CPUID Required "CPUID as the host can give it"
        KVM_CAP_SET_TSS_ADDR Used "real mode on Intel processors"
        KVM_CAP_SET_IDENTITY_MAP_ADDR Used "the same"
        KVM_CAP_NR_VCPUS Used "how many vCPUs a VM should have"
        KVM_CAP_MAX_VCPUS Used "how many it can have"
        KVM_CAP_MAX_VCPU_ID Used "their highest number"
        KVM_CAP_TSC_DEADLINE_TIMER Used "the guest's cheapest timer"
        KVM_CAP_KVMCLOCK_CTRL Used "a pause is no soft lockup"
        KVM_CAP_MP_STATE Used "which vCPUs run"
        KVM_CAP_ADJUST_CLOCK Optional "kvm-clock across a snapshot"
        KVM_CAP_VCPU_EVENTS Optional "pending exceptions across a snapshot"
        KVM_CAP_DEBUGREGS Optional "debug registers across a snapshot"
        KVM_CAP_XCRS Optional "extended control registers across a snapshot"
        KVM_CAP_XSAVE Optional "extended state across a snapshot"
        KVM_CAP_XSAVE2 Optional "the same, beyond 4 KiB (AMX)"
        KVM_CAP_NESTED_STATE Optional "guests with guests across a snapshot"
        KVM_CAP_TSC_CONTROL Optional "a TSC of another frequency"
        KVM_CAP_SYNC_REGS Optional "registers without an ioctl"
        KVM_CAP_HALT_POLL Optional "how long an idle vCPU spins"
        KVM_CAP_X86_DISABLE_EXITS Optional "HLT, MWAIT and PAUSE without exits (a mask)"
        KVM_CAP_X86_USER_SPACE_MSR Optional "MSRs answered by the monitor"
        KVM_CAP_X86_MSR_FILTER Optional "which of them"
        KVM_CAP_X86_SMM Optional "system management mode"
        KVM_CAP_X86_NOTIFY_VMEXIT Optional "guests that block the processor are found"
        KVM_CAP_SET_GUEST_DEBUG Optional "breakpoints, single step"
        KVM_CAP_BINARY_STATS_FD Optional "KVM's statistics"
    }
    "memslots" {
        KVM_CAP_USER_MEMORY Required "guest memory"
        KVM_CAP_DESTROY_MEMORY_REGION_WORKS Required "slots that go again"
        KVM_CAP_NR_MEMSLOTS Used "how many slots a VM can have"
        KVM_CAP_READONLY_MEM Used "read-only slots"
        KVM_CAP_SYNC_MMU Used "host memory that changes under a guest"
        KVM_CAP_USER_MEMORY2 Optional "slots with a guest_memfd"
        KVM_CAP_GUEST_MEMFD Optional "memory that the host cannot map"
        KVM_CAP_GUEST_MEMFD_FLAGS Optional "3: memory that it can (--memory SIZE,guest-memfd)"
        KVM_CAP_MEMORY_ATTRIBUTES Optional "private and shared pages"
        KVM_CAP_MEMORY_FAULT_INFO Optional "why a memory access failed"
        KVM_CAP_PRE_FAULT_MEMORY Optional "a guest that moved here begins without page faults"
    }
    "io-bus" {
        KVM_CAP_IOEVENTFD Used "a guest's write as an eventfd"
        KVM_CAP_IOEVENTFD_ANY_LENGTH Used "the same, of any length"
        KVM_CAP_COALESCED_MMIO Used "MMIO writes without an exit each"
        KVM_CAP_COALESCED_PIO Used "port writes without an exit each"
    }
    "irq-routing" {
        KVM_CAP_IRQCHIP Required "interrupt controllers in the kernel"
        KVM_CAP_IRQ_ROUTING Required "how many GSI routes a VM can have"
        KVM_CAP_IRQFD Used "an eventfd as an interrupt"
        KVM_CAP_SPLIT_IRQCHIP Required "local APICs alone in the kernel"
        KVM_CAP_SIGNAL_MSI Required "an MSI without a route"
        KVM_CAP_PIT2 Used "the i8254 timer in the kernel"
        KVM_CAP_PIT_STATE2 Optional "that timer across a snapshot"
        KVM_CAP_IRQFD_RESAMPLE Used "level-triggered irqfds"
        KVM_CAP_X2APIC_API Optional "more than 255 vCPUs"
    }
    "dirty-log" {
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 Optional "clearing dirty bits in chunks"
        KVM_CAP_DIRTY_LOG_RING Optional "dirty pages in a ring (its bytes)"
        KVM_CAP_DIRTY_LOG_RING_ACQ_REL Optional "the same, on weakly ordered hosts too"
        KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP Optional "ring and bitmap together"
    }
    "async-pf" {
        KVM_CAP_ASYNC_PF Optional "a guest that runs on while a page is read"
        KVM_CAP_ASYNC_PF_INT Optional "the same, told by interrupt"
    }
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_lost_their_prefix_and_are_there_once() {
        let names: std::collections::BTreeSet<_> = TABLE.iter().map(|row| row.1).collect();
        assert_eq!(names.len(), TABLE.len());
        assert!(names.contains("IMMEDIATE_EXIT"));
        assert!(names.iter().all(|name| !name.starts_with("KVM_")));
    }
}
