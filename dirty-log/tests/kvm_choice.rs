// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is in force is what the real KVM does: the choice comes before the first vCPU, a ring and the
//! bitmap exclude each other, and manual protect forgets nothing at a look.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Machine, Order};
use dirty_log::{
    ChooseLog, DirtyLog, Error, KvmBitmap, KvmManualBitmap, LogChoice, LogInForce, MappedRing,
    RingSize,
};
use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2};
use kvm_ioctls::Kvm;

const PAGES: u64 = 256;

fn small() -> RingSize {
    RingSize::new(1024).unwrap()
}

#[test]
fn the_host_has_what_it_says_and_refuses_what_it_has_not() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let flags = vm.capability(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
    let bytes = vm.capability(KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
    println!("manual protect: {flags:#x}; dirty ring: {bytes} bytes");
    let manual = LogChoice::ManualProtect {
        initially_set: true,
    };
    assert_eq!(manual.apply(&vm).is_ok(), flags & 3 == 3);
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    assert_eq!(
        LogChoice::Ring(RingSize::MAX).apply(&vm).is_ok(),
        bytes as u64 >= u64::from(RingSize::MAX.bytes())
    );
}

#[test]
fn a_ring_comes_before_the_first_vcpu_and_once() {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let _vcpu = vm.create_vcpu(0).unwrap();
    let late = LogChoice::Ring(small()).apply(&vm).unwrap_err();
    assert!(
        matches!(&late, Error::Enable { source, .. } if source.raw_os_error() == Some(libc::EINVAL)),
        "{late}"
    );
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let ring = LogChoice::Ring(small());
    assert_eq!(ring.apply(&vm).unwrap(), LogInForce::Ring(small()));
    assert!(ring.apply(&vm).is_err(), "a second time");
}

#[test]
fn with_a_ring_the_bitmap_answers_enxio_and_without_one_nothing_is_mapped() {
    let machine = Machine::new(LogChoice::Ring(small()), PAGES);
    machine.install(true);
    let source = KvmBitmap::new(machine.vm.clone(), machine.extent()).unwrap();
    let mut log = DirtyLog::new(machine.extent(), source).unwrap();
    match log.harvest() {
        Err(Error::GetDirtyLog { source, .. }) => {
            assert_eq!(source.raw_os_error(), Some(libc::ENXIO));
        }
        other => panic!("{other:?}"),
    };
    // A ring that is claimed to be larger than it is, and one of a VM that has none: no SIGBUS later on.
    let vcpu = machine.vm.create_vcpu(0).unwrap();
    assert!(MappedRing::map(&vcpu, 0, small()).is_ok());
    let error = MappedRing::map(&vcpu, 0, RingSize::MAX).unwrap_err();
    assert!(matches!(error, Error::MapRing { vcpu: 0, .. }), "{error}");
    let without = Kvm::new().unwrap().create_vm().unwrap();
    let vcpu = without.create_vcpu(0).unwrap();
    assert!(MappedRing::map(&vcpu, 0, small()).is_err());
}

#[test]
fn manual_protect_keeps_the_bits_until_they_are_cleared() {
    let manual = LogChoice::ManualProtect {
        initially_set: false,
    };
    let mut machine = Machine::new(manual, PAGES);
    machine.install(true);
    machine.start(1);
    let order = Order {
        state: 3,
        steps: 50,
    };
    machine.give(&[order]);
    machine.wait_one();
    let log = || {
        let source = KvmManualBitmap::new(machine.vm.clone(), machine.extent()).unwrap();
        DirtyLog::new(machine.extent(), source).unwrap()
    };
    // A look of parts that is given up, and its log with it: KVM has the bits still.
    let mut first = log();
    drop(first.parts(64).unwrap());
    assert!(first.pending().is_clean());
    drop(first);
    let mut second = log();
    let harvest = second.harvest().unwrap();
    assert_eq!(harvest.count() as usize, order.pages(PAGES).len());
    harvest.commit();
    assert!(log().harvest().unwrap().bitmap().is_clean());
}
