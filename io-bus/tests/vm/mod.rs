// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The smallest machine that runs a guest of the `guests` crate: one page of memory at 0x1000, one
//! vCPU in real mode, `kvm-ioctls` and nothing else.

use std::sync::Arc;

use io_bus::{Dispatcher, MmioAddress, Outcome, PioAddress};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

#[repr(align(4096))]
struct Page([u8; 4096]);

pub struct Machine {
    vcpu: VcpuFd,
    /// Shared with the handles that need it.
    #[allow(dead_code, reason = "not every test attaches something")]
    pub vm: Arc<VmFd>,
    _page: Box<Page>,
}

/// An access that left KVM: its address, and the bytes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    In(u16, Vec<u8>),
    Out(u16, Vec<u8>),
    Read(u64, Vec<u8>),
    Write(u64, Vec<u8>),
}

pub fn machine(code: &[u8]) -> Machine {
    let kvm = Kvm::new().expect("this test needs /dev/kvm: see `reference-vmm doctor`");
    let vm = kvm.create_vm().unwrap();
    let mut page = Box::new(Page([0; 4096]));
    page.0[..code.len()].copy_from_slice(code);
    let slot = kvm_userspace_memory_region {
        guest_phys_addr: 0x1000,
        memory_size: 4096,
        userspace_addr: &raw mut *page as u64,
        ..Default::default()
    };
    // SAFETY: the page is whole, the guest's alone, and outlives the VM's descriptor.
    unsafe { vm.set_user_memory_region(slot).unwrap() };
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip: 0x1000,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    let _page = page;
    let vm = Arc::new(vm);
    Machine { vcpu, vm, _page }
}

impl Machine {
    /// Runs to the `hlt`. Gives every exit with the data that it ended with, and its outcome.
    pub fn run(&mut self, io: &mut Dispatcher) -> Vec<(Seen, Outcome)> {
        self.run_strings(io, |_, len| len)
    }

    /// As `run`; an exit at a port may carry several items, each of the width that `width` gives
    /// for the port and the length of the data. (kvm-ioctls does not tell.)
    pub fn run_strings(
        &mut self,
        io: &mut Dispatcher,
        width: impl Fn(u16, usize) -> usize,
    ) -> Vec<(Seen, Outcome)> {
        let mut seen = Vec::new();
        loop {
            seen.push(match self.vcpu.run().unwrap() {
                VcpuExit::IoIn(port, data) => {
                    let width = width(port, data.len());
                    let outcome = io.pio_read_repeated(PioAddress(port), width, data);
                    (Seen::In(port, data.to_vec()), outcome)
                }
                VcpuExit::IoOut(port, data) => {
                    let width = width(port, data.len());
                    let outcome = io.pio_write_repeated(PioAddress(port), width, data);
                    (Seen::Out(port, data.to_vec()), outcome)
                }
                VcpuExit::MmioRead(address, data) => {
                    let outcome = io.mmio_read(MmioAddress(address), data);
                    (Seen::Read(address, data.to_vec()), outcome)
                }
                VcpuExit::MmioWrite(address, data) => {
                    let outcome = io.mmio_write(MmioAddress(address), data);
                    (Seen::Write(address, data.to_vec()), outcome)
                }
                VcpuExit::Hlt => return seen,
                exit => panic!("unexpected exit {exit:?}"),
            });
        }
    }
}
