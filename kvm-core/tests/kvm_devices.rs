// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices in the kernel, disabled exits and halt polling, of this host's KVM.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::File;
use std::time::Duration;

use common::{kvm, watchdog};
use kvm_core::{
    DeviceAttribute, DeviceError, DeviceKind, DisabledExits, KernelHaltError, VcpuId, offered_exits,
};

#[test]
fn a_kind_that_the_test_finds_can_be_created_and_no_other() {
    let mut found = Vec::new();
    let others = [
        DeviceKind::Other(0),
        DeviceKind::Other(15),
        DeviceKind::Other(4_000_000_000),
    ];
    for kind in DeviceKind::NAMED.iter().chain(&others) {
        let vm = kvm().create_vm().unwrap().finish();
        let has = vm.has_device(*kind);
        let created = vm.create_device(*kind);
        assert_eq!(has, created.is_ok(), "{kind}: {created:?}");
        match created {
            Ok(device) => {
                assert_eq!(device.kind(), *kind);
                found.push(*kind);
            }
            Err(DeviceError::Create { errno, .. }) => {
                assert_eq!(errno.errno(), libc::ENODEV, "{kind}: {errno}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    println!("this host has: {found:?}");
}

#[test]
fn the_vfio_device_is_one_in_a_vm_and_takes_vfio_files_alone() {
    let vm = kvm().create_vm().unwrap().finish();
    let vfio = vm.create_vfio_device().expect("KVM was built with VFIO");
    let error = vm.create_vfio_device().unwrap_err();
    assert!(error.to_string().contains("the VM has one"), "{error}");
    for (attribute, there) in [(1, true), (2, true), (99, false)] {
        let attribute = DeviceAttribute {
            group: 1,
            attribute,
        };
        assert_eq!(vfio.device().has(attribute), there, "{attribute}");
    }
    for path in ["/dev/null", "/proc/self/exe"] {
        let error = vfio.add(File::open(path).unwrap().into()).unwrap_err();
        assert!(
            error.to_string().contains("it is no VFIO group or device"),
            "{error}"
        );
    }
    // A descriptor that is none: the device's group takes any, and says EBADF.
    // SAFETY: VFIO's attributes read an i32.
    let error = unsafe {
        vfio.device().set(
            DeviceAttribute {
                group: 1,
                attribute: 2,
            },
            &-1_i32,
        )
    };
    assert!(matches!(error, Err(DeviceError::Set { errno, .. }) if errno.errno() == libc::EBADF));
    // Dropped is closed: there is room for another.
    drop(vfio);
    vm.create_vfio_device().unwrap();
}

#[test]
fn kvm_takes_every_mask_of_exits_that_this_crate_takes() {
    watchdog(|| {
        let offered = offered_exits(&**kvm().create_vm().unwrap().fd());
        println!("this host can keep in the guest: {offered}");
        for bits in 0..16 {
            let wanted = DisabledExits::from_bits(bits);
            let setup = kvm().create_vm().unwrap();
            let result = setup.disable_exits(wanted);
            match wanted.without(offered).is_none() {
                true => assert_eq!(result, Ok(())),
                false => assert!(matches!(
                    result,
                    Err(KernelHaltError::ExitsNotOffered { .. })
                )),
            }
            // What is refused here KVM refuses as well.
            let raw = kvm_bindings::kvm_enable_cap {
                cap: kvm_bindings::KVM_CAP_X86_DISABLE_EXITS,
                args: [bits.into(), 0, 0, 0],
                ..Default::default()
            };
            let oracle = kvm().create_vm().unwrap().fd().enable_cap(&raw);
            assert_eq!(
                result.is_ok(),
                oracle.is_ok(),
                "{wanted}: {result:?}, {oracle:?}"
            );
        }
    });
}

#[test]
fn halt_polling_is_set_for_a_vm_and_runs_with_it() {
    watchdog(|| {
        for longest in [
            Duration::ZERO,
            Duration::from_micros(50),
            Duration::from_nanos(u32::MAX.into()),
        ] {
            let setup = kvm().create_vm().unwrap();
            setup.halt_poll(longest).unwrap();
            let vm = setup.finish();
            vm.create_vcpu(VcpuId(0)).unwrap();
        }
    });
}
