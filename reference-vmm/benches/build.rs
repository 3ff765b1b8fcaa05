// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Making a machine that is ready to run, against the bare calls that no monitor can do without:
//! what the composition itself costs.

#![allow(missing_docs, clippy::unwrap_used)]

use std::io::Write;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::Kvm;
use reference_vmm::config::{Config, Irqchip};
use reference_vmm::end::EndSignal;
use reference_vmm::vm::Machine;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY: usize = 256 << 20;

fn bare(code: &[u8]) -> impl Sized + use<> {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let memory: GuestMemoryMmap<()> =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        ..Default::default()
    };
    // SAFETY: the mapping is returned beside the VM and dropped after it.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    memory.write_slice(code, GuestAddress(0x1000)).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0x1000;
    vcpu.set_regs(&regs).unwrap();
    (vcpu, vm, memory)
}

fn build(c: &mut Criterion) {
    let code = guests::boot::hello64();
    let mut kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.write_all(&guests::image::elf64(code)).unwrap();
    let config = Config {
        irqchip: Irqchip::None,
        ..Config::new(kernel.path())
    };

    let mut group = c.benchmark_group("a machine ready to run");
    group.sample_size(20);
    group.bench_function("bare calls", |b| b.iter_with_large_drop(|| bare(code)));
    group.bench_function("Machine::build", |b| {
        b.iter_with_large_drop(|| {
            let end = Arc::new(EndSignal::new().unwrap());
            Machine::build(&config, std::io::stdout(), &end).unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, build);
criterion_main!(benches);
