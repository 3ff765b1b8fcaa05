// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that is in KVM's own page tables before the guest runs ([`pre_fault`], `KVM_PRE_FAULT_MEMORY`; Linux 6.11):
//! what was put into it by somebody else, a restore or a migration, costs the guest no exit then when it comes to it first.

#![forbid(unsafe_code)]

use std::ops::Range;

use kvm_bindings::kvm_pre_fault_memory;
use vmm_sys_util::errno::Error as Errno;

const ENOENT: i32 = 2;
const EINTR: i32 = 4;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;

/// `KVM_PRE_FAULT_MEMORY`, which is a vCPU's: which tables it fills is what the vCPU goes by.
pub trait PreFaultMemory {
    /// Fills in some of `range`, and takes what it did off its front. Blocks for pages that the host has yet to find, and
    /// while the vCPU runs.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn pre_fault_memory(&self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno>;
}

/// Memory is not in KVM's page tables, or not all of it. What is there is of use all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("KVM takes no memory into its page tables at {address:#x}: {errno}{}", match errno.errno() {
    EOPNOTSUPP => " (a VM without two-dimensional paging, or a vCPU in system management mode or a nested guest)",
    ENOENT => " (there is no memory slot)",
    EINVAL => " (the range is not of whole pages, or this KVM has no KVM_PRE_FAULT_MEMORY)",
    _ => "",
})]
pub struct PreFaultError {
    /// The guest physical address of the first page that is missing.
    pub address: u64,
    /// What KVM said.
    pub errno: Errno,
}

/// Has the guest physical addresses `range` (whole pages, in memory slots) in KVM's page tables. Pages that the host does not
/// have yet are made, as if the guest had read them; a large page of the host's is one entry. It is for a vCPU that does not
/// run; with two-dimensional paging its tables are those of all vCPUs of its VM.
///
/// Blocks for as long as that takes: who wants to be able to end it asks for a few MiB at a time.
///
/// # Errors
/// [`PreFaultError`]. Nothing is lost by it: the guest faults as it would have.
pub fn pre_fault<V: PreFaultMemory + ?Sized>(
    vcpu: &V,
    range: Range<u64>,
) -> Result<(), PreFaultError> {
    let mut left = kvm_pre_fault_memory {
        gpa: range.start,
        size: range.end.saturating_sub(range.start),
        ..Default::default()
    };
    while left.size > 0 {
        match vcpu.pre_fault_memory(&mut left) {
            Ok(()) => {}
            // A signal, before anything was done.
            Err(errno) if errno.errno() == EINTR => {}
            Err(errno) => {
                let address = left.gpa;
                return Err(PreFaultError { address, errno });
            }
        }
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Takes so many bytes at a call, or says so.
    struct Kvm {
        answers: RefCell<Vec<Result<u64, i32>>>,
        seen: RefCell<Vec<(u64, u64)>>,
    }

    impl PreFaultMemory for Kvm {
        fn pre_fault_memory(&self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
            assert_eq!((range.flags, range.padding), (0, [0; 5]));
            self.seen.borrow_mut().push((range.gpa, range.size));
            let taken = self.answers.borrow_mut().remove(0).map_err(Errno::new)?;
            range.gpa += taken;
            range.size -= taken;
            Ok(())
        }
    }

    fn kvm(answers: &[Result<u64, i32>]) -> Kvm {
        Kvm {
            answers: RefCell::new(answers.to_vec()),
            seen: RefCell::default(),
        }
    }

    #[test]
    fn it_goes_on_where_kvm_or_a_signal_left_off_until_nothing_is_left() {
        let kvm = kvm(&[Ok(0x1000), Err(EINTR), Ok(0x2000)]);
        assert_eq!(pre_fault(&kvm, 0x4000..0x7000), Ok(()));
        let due = [(0x4000, 0x3000), (0x5000, 0x2000), (0x5000, 0x2000)];
        assert_eq!(*kvm.seen.borrow(), due);
    }

    #[test]
    fn what_kvm_refuses_says_where_and_nothing_is_asked_behind_it() {
        let kvm = kvm(&[Ok(0x1000), Err(ENOENT)]);
        let refused = pre_fault(&kvm, 0..0x3000).map_err(|error| error.to_string());
        let due = "KVM takes no memory into its page tables at 0x1000: No such file or directory (os error 2) (there is no memory slot)";
        assert_eq!(refused, Err(due.into()));
        assert_eq!(kvm.seen.borrow().len(), 2);
    }

    #[test]
    fn an_empty_range_asks_nothing() {
        assert_eq!(pre_fault(&kvm(&[]), 0x1000..0x1000), Ok(()));
        let backwards = Range {
            start: 0x2000,
            end: 0x1000,
        };
        assert_eq!(pre_fault(&kvm(&[]), backwards), Ok(()));
    }
}
