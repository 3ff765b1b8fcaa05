// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that is in KVM's page tables before the guest runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Machine, kvm, watchdog};
use kvm_core::stats::{StatsFd, StatsReader};
use kvm_core::{Exit, Flow, HaltReason, PreFaultError, VcpuSet, VcpuView};

const ENOENT: i32 = 2;
const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;
const PAGE: u64 = 0x1000;
/// Of the machine's memory.
const PAGES: u64 = 16;

fn sampled(reader: &mut StatsReader<StatsFd>, name: &str) -> u64 {
    let now = reader.sample().unwrap();
    now.named(name).unwrap().number().unwrap()
}

#[test]
fn memory_that_was_taken_beforehand_costs_the_guest_no_page_fault() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::halt());
        let vcpu = machine.vcpu(0);
        let error = |result: Result<(), PreFaultError>| {
            let error = result.unwrap_err();
            (error.address, error.errno.errno())
        };
        if !kvm().capabilities().pre_fault_memory() {
            println!("NOT TRIED: this KVM has no KVM_CAP_PRE_FAULT_MEMORY");
            // Of a KVM that knows no such ioctl, and of one that knows it and has no two-dimensional paging.
            let (address, errno) = error(vcpu.pre_fault(0..PAGE));
            assert!(
                address == 0 && [EINVAL, EOPNOTSUPP].contains(&errno),
                "{errno}"
            );
            return;
        }
        let mut of_vm = machine.vm.stats().unwrap();
        let mut of_vcpu = vcpu.stats().unwrap();
        assert_eq!(sampled(&mut of_vm, "pages_4k"), 0);
        vcpu.pre_fault(0..PAGES * PAGE).unwrap();
        assert_eq!(sampled(&mut of_vm, "pages_4k"), PAGES);
        // Again is nothing new.
        vcpu.pre_fault(0..PAGES * PAGE).unwrap();
        // What is refused says where, and what lies before it is done.
        let beyond = (PAGES - 1) * PAGE..(PAGES + 1) * PAGE;
        assert_eq!(error(vcpu.pre_fault(beyond)), (PAGES * PAGE, ENOENT));
        assert_eq!(error(vcpu.pre_fault(1..PAGE + 1)), (1, EINVAL));
        assert_eq!(sampled(&mut of_vm, "pages_4k"), PAGES);

        let before = sampled(&mut of_vcpu, "pf_taken");
        let set = VcpuSet::new(machine.vm.identity().clone());
        let stop = |_: &VcpuView<'_, _>, exit: Exit<'_>| match exit {
            Exit::Hlt => Flow::Stop("it halts"),
            other => panic!("{other:?}"),
        };
        let Err(halt) = set.enroll(vcpu).unwrap().run(stop);
        assert_eq!(halt.reason, HaltReason::Handler("it halts"));
        assert_eq!(sampled(&mut of_vcpu, "pf_taken"), before);
    });
}
