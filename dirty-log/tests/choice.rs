// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a VM is asked for, of a fake host that has this and has not that.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::io;

use dirty_log::{ChooseLog, Error, LogChoice, LogInForce, RingSize};

struct Vm {
    capabilities: Vec<(u32, i32)>,
    refuse: Option<i32>,
    enabled: RefCell<Vec<(u32, u64)>>,
}

impl ChooseLog for Vm {
    fn capability(&self, capability: u32) -> i32 {
        let known = self.capabilities.iter().find(|(cap, _)| *cap == capability);
        known.map_or(0, |(_, value)| *value)
    }

    fn enable(&self, capability: u32, argument: u64) -> io::Result<()> {
        if let Some(errno) = self.refuse {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.enabled.borrow_mut().push((capability, argument));
        Ok(())
    }
}

const MANUAL: u32 = kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
const RING: u32 = kvm_bindings::KVM_CAP_DIRTY_LOG_RING;
const RING_ACQ_REL: u32 = kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL;

fn choose(
    choice: LogChoice,
    capabilities: &[(u32, i32)],
    refuse: Option<i32>,
) -> (Result<LogInForce, Error>, Vec<(u32, u64)>) {
    let vm = Vm {
        capabilities: capabilities.to_vec(),
        refuse,
        enabled: RefCell::default(),
    };
    (choice.apply(&vm), vm.enabled.into_inner())
}

#[test]
fn what_is_in_force_is_what_the_host_was_asked_for_and_nothing_is_asked_in_vain() {
    let (initially_set, not) = (true, false);
    let both = LogChoice::ManualProtect { initially_set };
    let (in_force, enabled) = choose(both, &[(MANUAL, 3)], None);
    assert_eq!(
        in_force.unwrap(),
        LogInForce::ManualProtect { initially_set }
    );
    assert_eq!(enabled, [(MANUAL, 3)]);
    for has in [0, -22, 1, 2] {
        let (in_force, enabled) = choose(both, &[(MANUAL, has)], None);
        assert!(matches!(
            in_force,
            Err(Error::NoManualProtect { wanted: 3, .. })
        ));
        assert!(enabled.is_empty());
    }
    let best = LogChoice::BestBitmap { initially_set };
    for (has, want, asked) in [
        (0, LogInForce::Bitmap, &[][..]),
        (
            1,
            LogInForce::ManualProtect { initially_set: not },
            &[(MANUAL, 1)],
        ),
        (
            3,
            LogInForce::ManualProtect { initially_set },
            &[(MANUAL, 3)],
        ),
    ] {
        let (in_force, enabled) = choose(best, &[(MANUAL, has)], None);
        assert_eq!((in_force.unwrap(), &enabled[..]), (want, asked));
    }
    let (in_force, enabled) = choose(LogChoice::Bitmap, &[(MANUAL, 3)], Some(libc::EIO));
    assert_eq!((in_force.unwrap(), enabled.len()), (LogInForce::Bitmap, 0));
}

#[test]
fn a_ring_is_enabled_by_the_newer_capability_and_its_size_is_checked_first() {
    let size = RingSize::new(4096).unwrap();
    let ring = LogChoice::Ring(size);
    let (in_force, enabled) = choose(ring, &[(RING, 1 << 20), (RING_ACQ_REL, 1 << 20)], None);
    assert_eq!(in_force.unwrap(), LogInForce::Ring(size));
    assert_eq!(enabled, [(RING_ACQ_REL, 65536)]);
    let (in_force, enabled) = choose(ring, &[(RING, 1 << 20)], None);
    assert!(in_force.is_ok());
    assert_eq!(enabled, [(RING, 65536)]);
    for (bytes, most) in [(0, 0), (32768, 2048)] {
        let (in_force, enabled) = choose(ring, &[(RING_ACQ_REL, bytes)], None);
        let error = in_force.unwrap_err();
        assert!(
            matches!(error, Error::RingTooLarge { most: m, .. } if m == most),
            "{error}"
        );
        assert!(enabled.is_empty());
    }
    let (in_force, _) = choose(ring, &[(RING_ACQ_REL, 1 << 20)], Some(libc::EINVAL));
    let text = in_force.unwrap_err().to_string();
    assert!(text.contains("after the first vCPU"), "{text}");
}
