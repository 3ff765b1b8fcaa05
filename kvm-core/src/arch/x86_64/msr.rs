// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The MSRs that firmware would have set, and setting MSRs on a host that refuses some.

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use vmm_sys_util::errno::Error as Errno;

use super::cpuid::{Vendor, find};

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Fast string instructions on; no branch trace store and no PEBS, as KVM has them at reset.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
/// MTRRs on, everything write-back. Linux mistrusts memory whose MTRRs are off and skips PAT.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// `KVM_SET_MSRS`.
pub trait SetMsrs {
    /// Sets MSRs in order until one is refused; how many were set is returned.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<usize, Errno>;
}

/// An MSR that KVM did not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("KVM refused MSR {index:#x} = {value:#x}")]
pub struct RefusedMsr {
    /// Which.
    pub index: u32,
    /// What it was to be.
    pub value: u64,
}

/// The MSRs that firmware leaves behind for an operating system, those of them that a processor with
/// this CPUID has: `IA32_MISC_ENABLE` (Intel's alone), and the MTRRs' default type.
#[must_use]
pub fn boot_msrs(cpuid: &[kvm_cpuid_entry2]) -> Vec<kvm_msr_entry> {
    let mut msrs = Vec::with_capacity(2);
    let mut add = |index, data| {
        msrs.push(kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
    };
    if Vendor::of(cpuid) == Vendor::Intel {
        add(IA32_MISC_ENABLE, MISC_ENABLE);
    }
    if find(cpuid, 1).is_some_and(|leaf| leaf.edx & 1 << 12 != 0) {
        add(MTRR_DEF_TYPE, MTRR_WRITE_BACK);
    }
    msrs
}

/// Sets all of `msrs` that the host takes and says which it refused. One ioctl, and one more for each
/// that is refused.
///
/// # Errors
/// The errno of an ioctl that failed as a whole; what was set before stays set.
pub fn set_msrs(vcpu: &impl SetMsrs, msrs: &[kvm_msr_entry]) -> Result<Vec<RefusedMsr>, Errno> {
    let mut refused = Vec::new();
    let mut rest = msrs;
    while !rest.is_empty() {
        let set = vcpu.set_msrs(rest)?;
        let Some((entry, behind)) = rest.get(set..).and_then(<[_]>::split_first) else {
            break;
        };
        refused.push(RefusedMsr {
            index: entry.index,
            value: entry.data,
        });
        rest = behind;
    }
    Ok(refused)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::RefCell;

    struct Host {
        refuses: fn(u32) -> bool,
        fails_at: Option<usize>,
        calls: RefCell<usize>,
        set: RefCell<Vec<u32>>,
    }

    impl SetMsrs for Host {
        fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<usize, Errno> {
            let call = self.calls.replace_with(|n| *n + 1);
            if self.fails_at == Some(call) {
                return Err(Errno::new(7));
            }
            let set = msrs.iter().take_while(|m| !(self.refuses)(m.index));
            let before = self.set.borrow().len();
            self.set.borrow_mut().extend(set.map(|m| m.index));
            Ok(self.set.borrow().len() - before)
        }
    }

    fn host(refuses: fn(u32) -> bool) -> Host {
        Host {
            refuses,
            fails_at: None,
            calls: RefCell::default(),
            set: RefCell::default(),
        }
    }

    fn msrs(n: u32) -> Vec<kvm_msr_entry> {
        (0..n)
            .map(|index| kvm_msr_entry {
                index,
                data: 9,
                ..Default::default()
            })
            .collect()
    }

    #[test]
    fn every_accepted_msr_is_set_and_every_refused_one_is_told() {
        for refuses in [
            |_| false,
            |_| true,
            |i| i % 3 == 0,
            |i| i % 3 == 2,
            |i| i == 9,
        ] {
            let host = host(refuses);
            let refused = set_msrs(&host, &msrs(10)).unwrap();
            let told: Vec<_> = refused.iter().map(|r| r.index).collect();
            assert_eq!(told, (0..10).filter(|i| refuses(*i)).collect::<Vec<_>>());
            assert_eq!(
                *host.set.borrow(),
                (0..10).filter(|i| !refuses(*i)).collect::<Vec<_>>()
            );
            assert!(*host.calls.borrow() <= told.len() + 1);
        }
    }

    #[test]
    fn an_errno_ends_it() {
        let host = Host {
            fails_at: Some(1),
            ..host(|i| i == 4)
        };
        assert_eq!(set_msrs(&host, &msrs(10)), Err(Errno::new(7)));
        assert_eq!(*host.set.borrow(), [0, 1, 2, 3]);
    }
}
