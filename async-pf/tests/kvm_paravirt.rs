// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel is the oracle: KVM accepts a value for an asynchronous-page-fault MSR exactly where
//! this crate decodes it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use async_pf::{
    AsyncPfEnable, AsyncPfFeatures, AsyncPfMsrs, AsyncPfVector, KVM_CPUID_FEATURES,
    MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT,
};
use kvm_bindings::{
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_enable_cap, kvm_msr_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u64 = 0x10_0000;

struct Host {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

/// A vCPU whose CPUID offers `features`, and no more than that is enforced.
fn host(features: AsyncPfFeatures) -> Host {
    let kvm = Kvm::new().expect("these tests need /dev/kvm, readable and writable");
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap(); // KVM delivers through its own local APIC only
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap();
    let host = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    // SAFETY: the memory outlives the VM, and no vCPU runs.
    unsafe {
        vm.set_user_memory_region(kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SIZE,
            userspace_addr: host,
        })
        .unwrap();
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    for entry in cpuid.as_mut_slice() {
        if entry.function == KVM_CPUID_FEATURES {
            entry.eax = features.apply(entry.eax);
        }
    }
    let cap = kvm_enable_cap {
        cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        args: [1, 0, 0, 0],
        ..Default::default()
    };
    vcpu.enable_cap(&cap).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    Host {
        vcpu,
        _vm: vm,
        _memory: memory,
    }
}

impl Host {
    fn accepts(&self, index: u32, data: u64) -> bool {
        let msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }])
        .unwrap();
        self.vcpu.set_msrs(&msrs).unwrap() == 1
    }

    fn read(&self, index: u32) -> u64 {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
            index,
            ..Default::default()
        }])
        .unwrap();
        assert_eq!(self.vcpu.get_msrs(&mut msrs).unwrap(), 1);
        msrs.as_slice()[0].data
    }
}

#[test]
fn kvm_accepts_exactly_the_values_that_decode() {
    let mut compared = 0;
    for pick in 0..8u8 {
        let features = AsyncPfFeatures {
            async_pf: pick & 1 != 0,
            vmexit: pick & 2 != 0,
            interrupt: pick & 4 != 0,
        };
        let host = host(features);
        for low in 0..64 {
            for address in [0, 0x1000, 0x8_0040] {
                // Zero disables; some kernels let the host write it whatever CPUID says.
                let value = address | low;
                if value == 0 {
                    continue;
                }
                let ours = AsyncPfEnable::decode(value, features);
                let kvm = host.accepts(MSR_KVM_ASYNC_PF_EN, value);
                assert_eq!(
                    ours.is_ok(),
                    kvm,
                    "EN {value:#x} with {features:?}: {ours:?}"
                );
                compared += 1;
            }
        }
        for value in [1, 0x20, 0xff, 0x100, 0x1ff, 1 << 32, 1 << 63, u64::MAX] {
            let ours = AsyncPfVector::decode(value, features);
            let kvm = host.accepts(MSR_KVM_ASYNC_PF_INT, value);
            assert_eq!(
                ours.is_ok(),
                kvm,
                "INT {value:#x} with {features:?}: {ours:?}"
            );
            compared += 1;
        }
    }
    assert!(compared > 1500, "{compared}");
}

#[test]
fn the_msrs_of_one_vcpu_restored_into_another_are_the_same() {
    let features = AsyncPfFeatures {
        async_pf: true,
        vmexit: false,
        interrupt: true,
    };
    let (old, new) = (host(features), host(features));
    let msrs = AsyncPfMsrs {
        enable: AsyncPfEnable::at(0x2040).unwrap(),
        vector: AsyncPfVector(0xf3),
    };
    for (index, value) in msrs.restore() {
        assert!(old.accepts(index, value));
    }
    let saved = AsyncPfMsrs::SAVED.map(|index| (index, old.read(index)));
    assert_eq!(saved, msrs.restore());
    for (index, value) in saved {
        assert!(new.accepts(index, value), "{index:#x}");
    }
    assert_eq!(
        AsyncPfMsrs::SAVED.map(|index| new.read(index)),
        saved.map(|(_, value)| value)
    );
}
