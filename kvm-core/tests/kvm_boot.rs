// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the arch module makes, accepted and executed by a real KVM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{LOAD, Machine, kvm, watchdog};
use kvm_core::arch::x86_64::{
    BootState, CpuidPlan, LocalPin, LongModeTables, Topology, boot_msrs, initial_fpu, local_pin,
};
use kvm_core::{Exit, Flow, HaltReason, Kvm, OpenError, Vcpu, VcpuId, VcpuSet, VcpuView};
use vm_memory::GuestAddress;

/// Runs until the guest halts; what it wrote to which port.
fn outputs(machine: &Machine, vcpu: Vcpu) -> Vec<(u16, u32)> {
    let set = VcpuSet::new(machine.vm.identity().clone());
    let mut seen = Vec::new();
    let Err(halt) =
        set.enroll(vcpu)
            .unwrap()
            .run(|_: &VcpuView<'_, _>, exit: Exit<'_>| match exit {
                Exit::PioOut {
                    port,
                    size: 4,
                    data,
                } => {
                    seen.push((port, u32::from_le_bytes(data.try_into().unwrap())));
                    Flow::Continue
                }
                Exit::Hlt => Flow::Stop(()),
                other => panic!("{other:?}"),
            });
    assert_eq!(
        halt.reason,
        HaltReason::Handler(()),
        "{}",
        halt.vcpu.registers().unwrap()
    );
    seen
}

#[test]
fn a_64_bit_guest_runs_on_the_tables_and_registers_made_for_it() {
    let seen = watchdog(|| {
        let mut machine = Machine::new(guests::vcpu::long_mode());
        let tables = LongModeTables::new(GuestAddress(0x4000), 1).unwrap();
        machine.memory.write(tables.base().0, &tables.bytes());
        let vcpu = machine.vm.create_vcpu(VcpuId(0)).unwrap();
        let plan = CpuidPlan {
            id: VcpuId(0),
            topology: Topology::flat(1).unwrap(),
            tsc_deadline: false,
            arat: None,
            mca_recovery: false,
        };
        vcpu.set_cpuid(
            &plan
                .apply(kvm().supported_cpuid().unwrap().as_slice())
                .unwrap(),
        )
        .unwrap();
        let entry = GuestAddress(LOAD.into());
        let state = BootState::long_mode(&vcpu.sregs().unwrap(), &tables, entry, 0x7_0000);
        vcpu.set_boot_state(&state).unwrap();
        vcpu.fd().set_fpu(&initial_fpu()).unwrap();
        outputs(&machine, vcpu)
    });
    assert_eq!(seen, [(0x10, 0x7_0000), (0x12, 0x10), (0x14, 0x1122_3344)]);
}

#[test]
fn a_32_bit_guest_gets_its_magic_and_its_information() {
    let seen = watchdog(|| {
        let machine = Machine::new(guests::vcpu::protected_mode());
        let vcpu = machine.vm.create_vcpu(VcpuId(0)).unwrap();
        let entry = GuestAddress(LOAD.into());
        let reset = vcpu.sregs().unwrap();
        vcpu.set_boot_state(&BootState::protected_mode(
            &reset,
            entry,
            0x2bad_b002,
            0x6000,
        ))
        .unwrap();
        outputs(&machine, vcpu)
    });
    assert_eq!(seen, [(0x10, 0x2bad_b002), (0x12, 0x6000)]);
}

#[test]
fn kvm_takes_the_cpuid_of_every_vcpu_and_the_boot_msrs() {
    let machine = Machine::with_irqchip(&[]);
    let host = kvm().supported_cpuid().unwrap();
    let tsc_deadline = kvm().capabilities().tsc_deadline_timer();
    for id in [0, 1, 5, 63] {
        let vcpu = machine.vm.create_vcpu(VcpuId(id)).unwrap();
        let plan = CpuidPlan {
            id: VcpuId(id),
            topology: Topology::flat(64).unwrap(),
            tsc_deadline,
            arat: None,
            mca_recovery: false,
        };
        let cpuid = plan.apply(host.as_slice()).unwrap();
        vcpu.set_cpuid(&cpuid).unwrap();
        let msrs = boot_msrs(cpuid.as_slice());
        assert_eq!(vcpu.set_msrs(&msrs).unwrap(), []);
        // An MSR that no host has is told, and the one behind it is set.
        let mut with_stranger = msrs.clone();
        with_stranger.insert(
            0,
            kvm_bindings::kvm_msr_entry {
                index: 0xdead,
                ..msrs[0]
            },
        );
        let refused = vcpu.set_msrs(&with_stranger).unwrap();
        assert_eq!(
            refused.iter().map(|r| r.index).collect::<Vec<_>>(),
            [0xdead]
        );

        vcpu.wire_local_pins().unwrap();
        let lapic = vcpu.fd().get_lapic().unwrap();
        assert_eq!(local_pin(&lapic, LocalPin::Lint0) & 0x1_0700, 0x700);
        assert_eq!(local_pin(&lapic, LocalPin::Lint1) & 0x1_0700, 0x400);
    }
}

#[test]
fn the_set_up_stage_takes_addresses_and_refuses_impossible_ones() {
    let setup = kvm().create_vm().unwrap();
    setup
        .set_identity_map_address(GuestAddress(0xfeff_c000))
        .unwrap();
    setup.set_tss_address(GuestAddress(0xfeff_d000)).unwrap();
    let error = setup
        .set_tss_address(GuestAddress(0xffff_f000))
        .unwrap_err();
    assert!(error.to_string().contains("0xfffff000"), "{error}");
    assert!(setup.capabilities().immediate_exit());
}

#[test]
fn a_missing_or_wrong_device_is_an_error_that_says_what_to_do() {
    let missing = Kvm::open_at("/nonexistent/kvm").unwrap_err();
    let text = missing.to_string();
    assert!(
        text.contains("/nonexistent/kvm") && text.contains("usually /dev/kvm"),
        "{text}"
    );
    // What is said of the host is said where it is the host's device that is not there.
    assert!(!text.contains("modprobe"), "{text}");
    let absent = OpenError::Open {
        path: "/dev/kvm".into(),
        errno: kvm_core::Errno::new(libc::ENOENT),
    };
    assert!(absent.to_string().contains("modprobe"), "{absent}");
    let wrong = Kvm::open_at("/dev/null").unwrap_err();
    assert!(matches!(wrong, OpenError::ApiVersion { .. }), "{wrong}");
    assert!(wrong.to_string().contains("/dev/null is no KVM device"));
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(Kvm::from_fd(null.into()).is_err());
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    assert!(Kvm::from_fd(kvm.into()).unwrap().create_vm().is_ok());
    let nul = std::ffi::OsStr::new("/dev/kvm\0");
    assert!(matches!(Kvm::open_at(nul), Err(OpenError::Open { .. })));
}

#[test]
fn capabilities_are_the_hosts() {
    let kvm = kvm();
    let caps = kvm.capabilities();
    assert!(caps.max_vcpus() >= caps.recommended_vcpus() && caps.recommended_vcpus() >= 1);
    assert!(caps.max_vcpu_id() >= caps.max_vcpus());
    assert!(caps.max_memslots() >= 32);
    assert_eq!(caps.raw(kvm_bindings::KVM_CAP_IMMEDIATE_EXIT), 1);
}
