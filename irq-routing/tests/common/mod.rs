// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A one-vCPU VM on the real KVM, by kvm-ioctls alone.

#![allow(dead_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use guests::irq::{ANSWER, ASK, COUNTS, IDLE, LOAD, READ, READY, VECTOR};
use irq_routing::ioapic::{IOAPIC_BASE, IOAPIC_LEN, SplitIoapic};
use irq_routing::{Irqchip, IrqchipKind, Routing};
use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// A 64 KiB page-aligned piece of guest memory, at guest address 0.
#[repr(align(4096))]
pub struct Ram([AtomicU32; 0x4000]);

impl Ram {
    /// The memory with a guest in it.
    fn holding(code: &[u8]) -> Self {
        let ram = Self([const { AtomicU32::new(0) }; 0x4000]);
        for (to, from) in ram.0[LOAD as usize / 4..].iter().zip(code.chunks(4)) {
            let mut word = [0; 4];
            word[..from.len()].copy_from_slice(from);
            to.store(u32::from_le_bytes(word), Ordering::Relaxed);
        }
        ram
    }

    /// How many interrupts of a vector `guests::irq::counter` has counted.
    pub fn counted(&self, vector: u8) -> u32 {
        self.0[COUNTS as usize / 4 + usize::from(vector)].load(Ordering::Relaxed)
    }
}

pub fn kvm() -> Kvm {
    Kvm::new().expect("/dev/kvm must be there and open: this test asks the real KVM")
}

pub struct Machine {
    pub vm: Arc<VmFd>,
    pub routing: Routing<Arc<VmFd>>,
    /// Answers at its place on the bus, if there is one.
    pub ioapic: Option<SplitIoapic<Arc<VmFd>>>,
    /// The EOIs that were given to it.
    pub eois: usize,
    /// An EOI came before its handler's report, which is the first thing that each handler does. The software KVM of
    /// some hosts does so three times in a thousand, and lets the handler run twice then.
    pub is_replayed: Arc<AtomicBool>,
    reported: bool,
    vcpu: VcpuFd,
    // Freed after the vCPU and, as far as this test holds it, the VM.
    pub ram: Arc<Ram>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Real,
    Protected,
}

impl Machine {
    pub fn new(kind: IrqchipKind, mode: Mode, code: &[u8]) -> Self {
        let vm = Arc::new(kvm().create_vm().unwrap());
        let ram = Arc::new(Ram::holding(code));
        let region = kvm_userspace_memory_region {
            memory_size: size_of::<Ram>() as u64,
            userspace_addr: ram.0.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the memory lives as long as the machine, and the host looks at it by atomics alone.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let irqchip = Irqchip::create(&vm, kind).unwrap();
        let routing = Routing::new(Arc::clone(&vm), &irqchip);
        let vcpu = vm.create_vcpu(0).unwrap();

        let mut sregs = vcpu.get_sregs().unwrap();
        match mode {
            Mode::Real => {
                sregs.cs.base = 0;
                sregs.cs.selector = 0;
            }
            Mode::Protected => {
                sregs.cs = flat(8, 0xb);
                let data = flat(16, 0x3);
                (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
                (sregs.fs, sregs.gs) = (data, data);
                sregs.cr0 |= 1;
            }
        }
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (LOAD, 2);
        vcpu.set_regs(&regs).unwrap();
        Self {
            vm,
            routing,
            ioapic: None,
            eois: 0,
            is_replayed: Arc::default(),
            reported: false,
            vcpu,
            ram,
        }
    }

    /// Runs until the guest is about to enable interrupts.
    pub fn ready(&mut self) {
        assert_eq!(self.next_io().0, READY, "the guest should have been ready");
    }

    /// Runs until the guest reports a vector, with no idle exits before it.
    pub fn reported_vector(&mut self) -> u8 {
        match self.next_io() {
            (VECTOR, vector) => vector,
            other => panic!("a port that this guest has not: {other:x?}"),
        }
    }

    /// The port of the next exit.
    pub fn next_port(&mut self) -> u16 {
        self.next_io().0
    }

    /// Lets `guests::irq::accessor` write a number of bytes.
    pub fn write_mmio(&mut self, address: u64, bytes: u32, value: u32) {
        self.tell([address as u32, value, bytes]);
    }

    /// Lets it read.
    pub fn read_mmio(&mut self, address: u64, bytes: u32) -> u32 {
        self.tell([address as u32, 0, bytes + READ]);
        match self.vcpu.run().unwrap() {
            VcpuExit::IoOut(ANSWER, data) => u32::from_le_bytes(data.try_into().unwrap()),
            other => panic!("an answer was to come: {other:?}"),
        }
    }

    /// Lets it come back for more, so that what it was told is done.
    pub fn settle_mmio(&mut self) {
        self.read_mmio(LOAD, 4);
    }

    fn tell(&mut self, words: [u32; 3]) {
        for word in words {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoIn(ASK, data) => data.copy_from_slice(&word.to_le_bytes()),
                other => panic!("the guest was to ask: {other:?}"),
            }
        }
    }

    /// Runs until a port is accessed: which, and what was written.
    fn next_io(&mut self) -> (u16, u8) {
        let offset = |address: u64| {
            let offset = address.wrapping_sub(IOAPIC_BASE);
            assert!(offset < IOAPIC_LEN, "nothing is at {address:#x}");
            offset
        };
        loop {
            match (self.vcpu.run().unwrap(), &self.ioapic) {
                (VcpuExit::IoOut(port, data), _) => {
                    self.reported |= port == VECTOR;
                    return (port, data[0]);
                }
                (VcpuExit::IoIn(port, _), _) => return (port, 0),
                (VcpuExit::MmioRead(address, data), Some(ioapic)) => {
                    ioapic.read(offset(address), data);
                }
                (VcpuExit::MmioWrite(address, data), Some(ioapic)) => {
                    ioapic.write(offset(address), data);
                }
                (VcpuExit::IoapicEoi(vector), Some(ioapic)) => {
                    if !std::mem::take(&mut self.reported) {
                        self.is_replayed.store(true, Ordering::Relaxed);
                    }
                    ioapic.eoi(vector);
                    self.eois += 1;
                }
                (other, _) => panic!("an exit that this guest has not: {other:?}"),
            }
        }
    }

    /// The next vector that the guest reports; None when it stayed idle for many exits.
    pub fn next_vector(&mut self) -> Option<u8> {
        self.idle_until(1_000_000)
    }

    /// That no vector comes for a while.
    pub fn stays_idle(&mut self) -> bool {
        self.idle_until(500).is_none()
    }

    fn idle_until(&mut self, exits: usize) -> Option<u8> {
        for _ in 0..exits {
            match self.next_io() {
                (IDLE, _) => {}
                (VECTOR, vector) => return Some(vector),
                other => panic!("a port that this guest has not: {other:x?}"),
            }
        }
        None
    }
}

fn flat(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
