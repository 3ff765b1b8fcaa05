// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The smallest machine that runs a guest of the `guests` crate: four pages of memory at 0x1000, one
//! vCPU in real mode or in 64-bit mode, `kvm-ioctls` and nothing else.

#![allow(dead_code, reason = "not every test and bench uses all of it")]

use std::sync::Arc;

use io_bus::{Direction, Dispatcher, MappedRing, MmioAddress, Outcome, PioAddress, PioExit};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

const PAGES: usize = 4;

#[repr(align(4096))]
struct Memory([u8; PAGES * 4096]);

pub struct Machine {
    vcpu: VcpuFd,
    /// Shared with the handles that need it.
    pub vm: Arc<VmFd>,
    _memory: Box<Memory>,
}

/// An access that left KVM: its address, and the bytes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    In(u16, Vec<u8>),
    Out(u16, Vec<u8>),
    Read(u64, Vec<u8>),
    Write(u64, Vec<u8>),
}

/// In real mode, every segment at 0.
pub fn machine(code: &[u8]) -> Machine {
    machine_with(code, 0)
}

/// The same, with a number for the guest at 0x1100.
pub fn machine_with(code: &[u8], number: u32) -> Machine {
    let mut memory = Box::new(Memory([0; PAGES * 4096]));
    memory.0[..code.len()].copy_from_slice(code);
    memory.0[0x100..0x104].copy_from_slice(&number.to_le_bytes());
    build(memory)
}

/// In 64-bit mode, the first 2 MiB mapped as they are, SSE moves allowed.
pub fn long_machine(code: &[u8]) -> Machine {
    let mut memory = Box::new(Memory([0; PAGES * 4096]));
    memory.0[..code.len()].copy_from_slice(code);
    // The three levels of the page table, at 0x2000, 0x3000 and 0x4000; present, writable, and the
    // last one a large page.
    for (at, entry) in [(0x1000, 0x3003_u64), (0x2000, 0x4003), (0x3000, 0x83)] {
        memory.0[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    let machine = build(memory);
    let mut sregs = machine.vcpu.get_sregs().unwrap();
    let segment = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        l: 1,
        ..segment
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        db: 1,
        ..segment
    };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.cr3 = 0x2000;
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10; // PAE, OSFXSR, OSXMMEXCPT
    sregs.cr0 = 1 << 31 | 1 << 5 | 1 << 1 | 1; // PG, NE, MP, PE
    sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
    machine.vcpu.set_sregs(&sregs).unwrap();
    machine
}

fn build(mut memory: Box<Memory>) -> Machine {
    let kvm = Kvm::new().expect("this test needs /dev/kvm: see `reference-vmm doctor`");
    let vm = kvm.create_vm().unwrap();
    let slot = kvm_userspace_memory_region {
        guest_phys_addr: 0x1000,
        memory_size: (PAGES * 4096) as u64,
        userspace_addr: &raw mut *memory as u64,
        ..Default::default()
    };
    // SAFETY: the pages are whole, the guest's alone, and outlive the VM's descriptor.
    unsafe { vm.set_user_memory_region(slot).unwrap() };
    let vcpu = vm.create_vcpu(0).unwrap();
    let cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs {
        rip: 0x1000,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).unwrap();
    let vm = Arc::new(vm);
    Machine {
        vcpu,
        vm,
        _memory: memory,
    }
}

impl Machine {
    /// The VM's ring of coalesced writes.
    pub fn ring(&self) -> MappedRing {
        MappedRing::new(&self.vm, &self.vcpu).unwrap()
    }

    /// Begins again at the code's start.
    pub fn restart(&mut self) {
        let mut regs = self.vcpu.get_regs().unwrap();
        regs.rip = 0x1000;
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Runs to the `hlt` and keeps nothing but the number of exits: what a bench wants.
    pub fn drive(&mut self, io: &mut Dispatcher) -> usize {
        let mut exits = 0;
        loop {
            let exit = self.vcpu.run().unwrap();
            io.before_exit();
            exits += 1;
            let outcome = match exit {
                VcpuExit::IoOut(port, data) => io.pio_write(PioAddress(port), data),
                VcpuExit::Hlt => return exits,
                exit => panic!("unexpected exit {exit:?}"),
            };
            assert!(outcome.is_answered());
        }
    }

    /// Runs to the `hlt`. Gives every exit with the data that it ended with, and its outcome.
    pub fn run(&mut self, io: &mut Dispatcher) -> Vec<(Seen, Outcome)> {
        self.run_strings(io, |_, len| len)
    }

    /// Runs to the `hlt` a guest that uses ports alone. Gives each exit's width and outcome.
    pub fn run_ports(&mut self, io: &mut Dispatcher) -> Vec<(usize, Outcome)> {
        let mut seen = Vec::new();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => {}
                VcpuExit::Hlt => {
                    assert!(PioExit::of(&mut self.vcpu).is_none());
                    return seen;
                }
                exit => panic!("unexpected exit {exit:?}"),
            }
            let exit = PioExit::of(&mut self.vcpu).unwrap();
            let outcome = match exit.direction {
                Direction::Read => io.pio_read_repeated(exit.port, exit.width, exit.data),
                Direction::Write => io.pio_write_repeated(exit.port, exit.width, exit.data),
            };
            seen.push((exit.width, outcome));
        }
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
            let exit = self.vcpu.run().unwrap();
            io.before_exit();
            seen.push(match exit {
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
