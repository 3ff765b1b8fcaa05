// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is in force is what the real KVM does: the choice comes before the first vCPU, a ring and the
//! bitmap exclude each other, and manual protect forgets nothing at a look.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Machine, Order};
use dirty_log::{
    ChooseLog, ClearDirtyLog, DirtyLog, Error, GetDirtyLog, KvmBitmap, KvmManualBitmap, LogBuffer,
    LogChoice, LogInForce, MappedRing, RingSize,
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

#[test]
fn a_round_in_parts_that_is_dropped_half_way_loses_nothing_with_manual_protect_or_without() {
    let manual = LogChoice::ManualProtect {
        initially_set: false,
    };
    for choice in [manual, LogChoice::Bitmap] {
        let mut machine = Machine::new(choice, PAGES);
        machine.install(true);
        machine.start(1);
        let order = Order {
            state: 3,
            steps: 80,
        };
        machine.give(&[order]);
        machine.wait_one();
        let source = KvmManualBitmap::new(machine.vm.clone(), machine.extent()).unwrap();
        let mut log = DirtyLog::new(machine.extent(), source).unwrap();
        let mut wrote = order.pages(PAGES);
        let mut parts = log.parts(64).unwrap();
        let part = parts.next_part().unwrap().unwrap();
        for page in part.runs().flat_map(|run| run.first..run.end()) {
            assert!(wrote.remove(&page), "page {page} was written");
        }
        part.commit();
        drop(parts);
        assert!(!wrote.is_empty());
        drop(log.parts(64).unwrap());
        let harvest = log.harvest().unwrap();
        let found = harvest.runs().flat_map(|run| run.first..run.end());
        assert!(found.eq(wrote), "{choice:?}");
        harvest.commit();
        assert!(log.harvest().unwrap().bitmap().is_clean(), "{choice:?}");
    }
}

#[test]
fn fewer_bits_than_there_are_pages_to_clear_never_reach_the_kernel() {
    let manual = LogChoice::ManualProtect {
        initially_set: true,
    };
    let machine = Machine::new(manual, PAGES);
    machine.install(true);
    // The words behind the slice are there, so that a call that reads them breaks nothing but this promise.
    let bits = [u64::MAX; 4];
    let refused = machine
        .vm
        .clear_dirty_log(machine.extent().id(), 0, PAGES as u32, &bits[..3])
        .unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
    let mut seen = LogBuffer::new(PAGES).unwrap();
    let slot = machine.extent().id();
    machine.vm.get_dirty_log(slot, &mut seen).unwrap();
    assert_eq!(seen.words(), bits, "nothing was cleared");
    machine
        .vm
        .clear_dirty_log(slot, 0, PAGES as u32, &bits)
        .unwrap();
    machine.vm.get_dirty_log(slot, &mut seen).unwrap();
    assert_eq!(seen.words(), [0; 4]);
}

#[test]
fn manual_protect_may_come_behind_the_first_vcpu_and_a_slot_that_logs_and_is_heeded_at_once() {
    let mut machine = Machine::new(LogChoice::Bitmap, PAGES);
    machine.install(true);
    machine.start(1);
    let order = Order {
        state: 3,
        steps: 50,
    };
    machine.give(&[order]);
    machine.wait_one();
    let count = || {
        let mut seen = LogBuffer::new(PAGES).unwrap();
        let slot = machine.extent().id();
        machine.vm.get_dirty_log(slot, &mut seen).unwrap();
        seen.words()
            .iter()
            .map(|word| word.count_ones())
            .sum::<u32>()
    };
    for initially_set in [false, true] {
        let manual = LogChoice::ManualProtect { initially_set };
        manual.apply(&machine.vm).unwrap();
        assert_eq!(count() as usize, order.pages(PAGES).len());
    }
    // Initially set is for slots whose log begins from now on.
    machine.install(false);
    machine.install(true);
    assert_eq!(u64::from(count()), PAGES);
}
