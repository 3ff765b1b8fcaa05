// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What KVM is to do when a guest halts: asked for only where it can be had, and a refusal changes nothing.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::time::Duration;

use kvm_bindings as kvm;
use kvm_core::{
    CheckExtension, DisabledExits, EnableCapability, Errno, KernelHaltError, disable_exits,
    offered_exits, set_halt_poll,
};

/// A VM with these answers, which fails with an errno or notes what was enabled.
struct Host {
    exits: i32,
    halt_poll: i32,
    errno: Option<i32>,
    enabled: RefCell<Vec<(u32, [u64; 4])>>,
}

fn host(exits: i32, halt_poll: i32, errno: Option<i32>) -> Host {
    Host {
        exits,
        halt_poll,
        errno,
        enabled: RefCell::default(),
    }
}

impl CheckExtension for Host {
    fn check_extension(&self, capability: u32) -> i32 {
        match capability {
            kvm::KVM_CAP_X86_DISABLE_EXITS => self.exits,
            kvm::KVM_CAP_HALT_POLL => self.halt_poll,
            _ => 0,
        }
    }
}

impl EnableCapability for Host {
    fn enable_capability(&self, capability: u32, args: [u64; 4]) -> Result<(), Errno> {
        if let Some(errno) = self.errno {
            return Err(Errno::new(errno));
        }
        self.enabled.borrow_mut().push((capability, args));
        Ok(())
    }
}

#[test]
fn every_mask_is_asked_for_only_where_the_host_offers_all_of_it() {
    for offered in 0..32 {
        for wanted in 0..32_u32 {
            let host = host(offered, 1, None);
            let (offered, wanted) = (
                DisabledExits::from_bits(offered as u32),
                DisabledExits::from_bits(wanted),
            );
            let expected = match wanted.without(offered) {
                none if none.is_none() => Ok(()),
                missing => Err(KernelHaltError::ExitsNotOffered { missing, offered }),
            };
            assert_eq!(disable_exits(&host, wanted), expected);
            let asked = expected.is_ok() && !wanted.is_none();
            let call = (
                kvm::KVM_CAP_X86_DISABLE_EXITS,
                [wanted.bits().into(), 0, 0, 0],
            );
            assert_eq!(*host.enabled.borrow(), vec![call; usize::from(asked)]);
        }
    }
    assert!(offered_exits(&host(-1, 0, None)).is_none());
}

#[test]
fn any_errno_says_what_was_asked_for() {
    for errno in 1..=133 {
        let host = host(14, 1, Some(errno));
        let said = Errno::new(errno).to_string();
        let error = disable_exits(&host, DisabledExits::HLT.and(DisabledExits::PAUSE)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("HLT, PAUSE") && text.contains(&said),
            "{text}"
        );
        assert_eq!(
            text.contains("before the first vCPU"),
            errno == 22,
            "{text}"
        );
        let error = set_halt_poll(&host, Duration::from_micros(50)).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("50µs") && text.contains(&said), "{text}");
    }
}

#[test]
fn halt_polling_is_in_nanoseconds_and_of_32_bits() {
    let there = host(0, 1, None);
    for (longest, nanos) in [
        (Duration::ZERO, Some(0)),
        (Duration::from_micros(200), Some(200_000)),
        (
            Duration::from_nanos(u32::MAX.into()),
            Some(u64::from(u32::MAX)),
        ),
        (Duration::from_nanos(1 << 32), None),
        (Duration::MAX, None),
    ] {
        let refused = KernelHaltError::HaltPollTooLong { asked: longest };
        let expected = nanos.map(|_| ()).ok_or(refused);
        assert_eq!(set_halt_poll(&there, longest), expected);
        let calls: Vec<_> = there.enabled.borrow_mut().drain(..).collect();
        let call = nanos.map(|nanos| (kvm::KVM_CAP_HALT_POLL, [nanos, 0, 0, 0]));
        assert_eq!(calls, Vec::from_iter(call));
    }
    let error = set_halt_poll(&host(0, 0, None), Duration::ZERO);
    assert_eq!(error, Err(KernelHaltError::NoHaltPoll));
}

#[test]
fn exits_have_names_and_newer_ones_a_number() {
    assert_eq!(DisabledExits::NONE.to_string(), "none");
    let all = DisabledExits::from_bits(0x1f);
    assert_eq!(all.to_string(), "MWAIT, HLT, PAUSE, C-state MSRs, 0x10");
    let error = disable_exits(&host(2, 0, None), all)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "this host's KVM cannot keep in the guest: MWAIT, PAUSE, C-state MSRs, 0x10; it can: HLT"
    );
}
