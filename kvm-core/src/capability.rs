// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a host's KVM can do, asked once and by type (`KVM_CHECK_EXTENSION`).

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicI32, Ordering};

use kvm_bindings as kvm;

/// `KVM_CHECK_EXTENSION`. Implemented for `kvm_ioctls::Kvm` (the host's answer) and
/// `kvm_ioctls::VmFd` (the VM's, which may be narrower).
pub trait CheckExtension {
    /// The answer for a `KVM_CAP_…`: 0 or negative is no; positive is yes, or the capability's value.
    fn check_extension(&self, capability: u32) -> i32;
}

impl<T: CheckExtension + ?Sized> CheckExtension for &T {
    fn check_extension(&self, capability: u32) -> i32 {
        (**self).check_extension(capability)
    }
}

impl<T: CheckExtension + ?Sized> CheckExtension for std::sync::Arc<T> {
    fn check_extension(&self, capability: u32) -> i32 {
        (**self).check_extension(capability)
    }
}

/// Capabilities below this number are remembered, the others asked for each time.
const REMEMBERED: usize = 256;
const NOT_ASKED: i32 = i32::MIN;

/// The capabilities of a host, or of a VM. Nothing is asked before it is wanted: a system call saved
/// at start-up is one.
#[derive(Debug)]
pub struct Capabilities<H> {
    host: H,
    answers: [AtomicI32; REMEMBERED],
}

impl<H: CheckExtension> Capabilities<H> {
    /// The capabilities of `host`.
    pub fn new(host: H) -> Self {
        Self {
            host,
            answers: [const { AtomicI32::new(NOT_ASKED) }; REMEMBERED],
        }
    }

    /// The answer for any `KVM_CAP_…`, as the kernel gives it.
    pub fn raw(&self, capability: u32) -> i32 {
        let Some(slot) = self.answers.get(capability as usize) else {
            return self.host.check_extension(capability);
        };
        // Relaxed: two threads that ask at once get the same answer.
        match slot.load(Ordering::Relaxed) {
            NOT_ASKED => {
                let answer = self.host.check_extension(capability);
                slot.store(answer, Ordering::Relaxed);
                answer
            }
            answer => answer,
        }
    }

    /// Whether it is there at all.
    pub fn has(&self, capability: u32) -> bool {
        self.raw(capability) > 0
    }

    /// The value of a capability that has one; `None` when it is not there.
    pub fn value(&self, capability: u32) -> Option<NonZeroU32> {
        u32::try_from(self.raw(capability))
            .ok()
            .and_then(NonZeroU32::new)
    }

    /// How many vCPUs are recommended at most. api.rst 4.4: 4 where the host does not say.
    pub fn recommended_vcpus(&self) -> u32 {
        self.value(kvm::KVM_CAP_NR_VCPUS).map_or(4, NonZeroU32::get)
    }

    /// How many vCPUs a VM can have (`KVM_MAX_VCPUS`).
    pub fn max_vcpus(&self) -> u32 {
        self.value(kvm::KVM_CAP_MAX_VCPUS)
            .map_or_else(|| self.recommended_vcpus(), NonZeroU32::get)
    }

    /// vCPU numbers (and so APIC ids) are below this.
    pub fn max_vcpu_id(&self) -> u32 {
        self.value(kvm::KVM_CAP_MAX_VCPU_ID)
            .map_or_else(|| self.max_vcpus(), NonZeroU32::get)
    }

    /// Memory slots of a VM.
    pub fn max_memslots(&self) -> u32 {
        self.value(kvm::KVM_CAP_NR_MEMSLOTS)
            .map_or(32, NonZeroU32::get)
    }

    /// `kvm_run.immediate_exit` works (Linux 4.11). Without it this crate's kicks are not safe.
    pub fn immediate_exit(&self) -> bool {
        self.has(kvm::KVM_CAP_IMMEDIATE_EXIT)
    }

    /// The local APIC's TSC-deadline timer can be offered to guests.
    pub fn tsc_deadline_timer(&self) -> bool {
        self.has(kvm::KVM_CAP_TSC_DEADLINE_TIMER)
    }

    /// VMs and vCPUs have [`stats`](crate::stats) (Linux 5.14).
    pub fn binary_stats(&self) -> bool {
        self.has(kvm::KVM_CAP_BINARY_STATS_FD)
    }

    /// Breakpoints, watchpoints and single step ([`GuestDebug`](crate::arch::x86_64::GuestDebug)).
    #[cfg(target_arch = "x86_64")]
    pub fn guest_debug(&self) -> bool {
        self.has(kvm::KVM_CAP_SET_GUEST_DEBUG)
    }

    /// A step can keep interrupts out (Linux 5.16).
    #[cfg(target_arch = "x86_64")]
    pub fn guest_debug_block_interrupts(&self) -> bool {
        let flags = self.value(kvm::KVM_CAP_SET_GUEST_DEBUG2);
        flags.is_some_and(|flags| flags.get() & kvm::KVM_GUESTDBG_BLOCKIRQ != 0)
    }

    /// NMIs can be injected ([`VcpuSet::nmi`](crate::VcpuSet::nmi)).
    pub fn user_nmi(&self) -> bool {
        self.has(kvm::KVM_CAP_USER_NMI)
    }

    /// Guest memory can be taken into KVM's page tables before the guest runs ([`pre_fault`](crate::pre_fault); Linux 6.11).
    pub fn pre_fault_memory(&self) -> bool {
        self.has(kvm::KVM_CAP_PRE_FAULT_MEMORY)
    }

    /// Bytes of a vCPU's extended state; `None` on hosts where the old 4 KiB structure is all.
    pub fn xsave_bytes(&self) -> Option<NonZeroU32> {
        self.value(kvm::KVM_CAP_XSAVE2)
    }

    /// Bytes of a dirty ring at most; `None` without it.
    pub fn dirty_ring_bytes(&self) -> Option<NonZeroU32> {
        self.value(kvm::KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
            .or_else(|| self.value(kvm::KVM_CAP_DIRTY_LOG_RING))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::RefCell;

    struct Host {
        asked: RefCell<Vec<u32>>,
        answer: i32,
    }

    impl CheckExtension for Host {
        fn check_extension(&self, capability: u32) -> i32 {
            self.asked.borrow_mut().push(capability);
            self.answer
        }
    }

    #[test]
    fn a_capability_is_asked_for_once_and_only_when_wanted() {
        let host = Host {
            asked: RefCell::default(),
            answer: 7,
        };
        let caps = Capabilities::new(&host);
        assert!(host.asked.borrow().is_empty());
        assert!(caps.has(3) && caps.has(3));
        assert_eq!(caps.value(3).map(NonZeroU32::get), Some(7));
        assert_eq!(*host.asked.borrow(), [3]);
        assert_eq!(caps.raw(100_000), 7);
    }

    #[test]
    fn a_host_that_says_no_gets_the_documented_defaults() {
        for answer in [0, -1, -22] {
            let caps = Capabilities::new(Host {
                asked: RefCell::default(),
                answer,
            });
            assert_eq!(
                (caps.max_vcpus(), caps.max_vcpu_id(), caps.max_memslots()),
                (4, 4, 32)
            );
            assert!(!caps.immediate_exit() && !caps.binary_stats());
            assert!(caps.xsave_bytes().is_none());
        }
    }
}
