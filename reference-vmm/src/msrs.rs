// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSRs that nobody serves: the guest gets the general protection fault that it would have had from KVM,
//! and the first access of each is logged.

use std::fmt;

use kvm_bindings::{KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN};
use kvm_core::arch::x86_64::msr_filter::MsrExits;

/// The accesses that come to user space.
pub(crate) const EXITS: MsrExits = MsrExits {
    unknown: true,
    invalid: true,
    filtered: false,
};

/// An access that is refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unserved {
    pub(crate) index: u32,
    /// Of a write.
    pub(crate) value: Option<u64>,
    /// `KVM_MSR_EXIT_REASON_…`.
    pub(crate) reason: u32,
}

impl Unserved {
    /// What it is told once for.
    pub(crate) fn key(&self) -> u64 {
        kvm_core::logging::key((self.index, self.value.is_some(), self.reason))
    }
}

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = match self.value {
            Some(value) => format!("write of {value:#x} to"),
            None => "read of".to_owned(),
        };
        let why = match self.reason {
            KVM_MSR_EXIT_REASON_UNKNOWN => "which KVM does not know",
            KVM_MSR_EXIT_REASON_INVAL => "which KVM refuses",
            _ => "which is filtered",
        };
        write!(f, "{how} MSR {:#x}, {why}: a #GP for the guest", self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_was_done_to_which_msr() {
        let access = Unserved {
            index: 0x123,
            value: Some(7),
            reason: KVM_MSR_EXIT_REASON_UNKNOWN,
        };
        assert_eq!(
            access.to_string(),
            "write of 0x7 to MSR 0x123, which KVM does not know: a #GP for the guest"
        );
    }
}
