// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSRs that nobody serves: the guest gets the general protection fault that it would have had from KVM,
//! and the first access of each is logged. What Linux tries on its way up is a handful; a guest that asks
//! for ever fills no log.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN};
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::msr_filter::MsrExits;

/// The accesses that come to user space.
pub(crate) const EXITS: MsrExits = MsrExits {
    unknown: true,
    invalid: true,
    filtered: false,
};

/// So many accesses are told one by one: a guest that tries all numbers is told of once more.
const MOST: usize = 100;

/// The accesses that were told.
#[derive(Debug, Default)]
pub(crate) struct UnservedMsrs(Mutex<BTreeSet<Access>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Access {
    index: u32,
    write: bool,
    reason: u32,
}

impl UnservedMsrs {
    /// Logs an access if it is the first of its kind. `written` is the value of a write.
    pub(crate) fn log(&self, vcpu: VcpuId, index: u32, written: Option<u64>, reason: u32) {
        let access = Access {
            index,
            write: written.is_some(),
            reason,
        };
        if let Some(news) = self.news(access) {
            let value = Value(written);
            log::info!("vCPU {vcpu}: {access}{value}: a #GP for the guest, told once{news}");
        }
    }

    /// What to say behind it; `None` where nothing is said any more.
    fn news(&self, access: Access) -> Option<&'static str> {
        // One left by a panic is a set all the same.
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() == MOST || !told.insert(access) {
            return None;
        }
        match told.len() {
            MOST => Some("; MSRs beyond this one are not told"),
            _ => Some(""),
        }
    }
}

struct Value(Option<u64>);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, " (value {value:#x})"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.write { "write to" } else { "read of" };
        let why = match self.reason {
            KVM_MSR_EXIT_REASON_UNKNOWN => "which KVM does not know",
            KVM_MSR_EXIT_REASON_INVAL => "which KVM refuses",
            _ => "which is filtered",
        };
        write!(f, "{how} MSR {:#x}, {why}", self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(index: u32, write: bool) -> Access {
        Access {
            index,
            write,
            reason: KVM_MSR_EXIT_REASON_UNKNOWN,
        }
    }

    #[test]
    fn each_access_is_told_once_and_a_guest_that_tries_them_all_ends_it() {
        let msrs = UnservedMsrs::default();
        let mut told = 0;
        for round in 0..3 {
            for index in 0..1000 {
                for write in [false, true] {
                    let news = msrs.news(access(index, write));
                    told += usize::from(news.is_some());
                    let last = news.is_some_and(|news| !news.is_empty());
                    assert_eq!(last, (round, index, write) == (0, 49, true));
                }
            }
        }
        assert_eq!(told, MOST);
    }

    #[test]
    fn the_line_says_what_was_done_to_which_msr() {
        let text = format!("{}{}", access(0x123, true), Value(Some(7)));
        assert_eq!(
            text,
            "write to MSR 0x123, which KVM does not know (value 0x7)"
        );
    }
}
