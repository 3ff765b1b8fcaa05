// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the tests against the real KVM share: a small machine, and a watchdog.
#![allow(dead_code)]

mod watchdog;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_userspace_memory_region};
use kvm_core::arch::x86_64::BootState;
use kvm_core::{Kvm, Vcpu, VcpuId, Vm, VmSetup};
use vm_memory::GuestAddress;

/// Where guests are loaded and start.
pub const LOAD: u16 = 0x1000;
const LEN: usize = 0x1_0000;

/// 64 KiB of guest memory from 0, with a guest in it.
pub struct Memory(NonNull<u8>);

// SAFETY: it is a mapping, which is no thread's own.
unsafe impl Send for Memory {}

impl Memory {
    fn with(guest: &[u8]) -> Self {
        assert!(guest.len() <= LEN - usize::from(LOAD));
        // SAFETY: a new anonymous mapping; the result is checked.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        let start = NonNull::new(start.cast::<u8>()).unwrap();
        // SAFETY: inside the mapping (asserted above), which nobody else knows yet.
        unsafe {
            let code = start.as_ptr().add(usize::from(LOAD));
            std::ptr::copy_nonoverlapping(guest.as_ptr(), code, guest.len());
        }
        Self(start)
    }
}

impl Memory {
    /// Writes guest memory, before a guest runs.
    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let address = usize::try_from(address).unwrap();
        assert!(address + bytes.len() <= LEN);
        // SAFETY: inside the mapping (asserted above); no vCPU runs yet.
        unsafe {
            let at = self.0.as_ptr().add(address);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
        }
    }
}

impl Memory {
    /// A word that a guest writes while this reads it.
    pub fn word(&self, address: u64) -> u32 {
        let address = usize::try_from(address).unwrap();
        assert!(address + 4 <= LEN && address.is_multiple_of(4));
        // SAFETY: inside the mapping and aligned (asserted above). The process reads it as an atomic, and what a guest
        // does is no access of this program's.
        let word = unsafe { self.0.as_ptr().add(address).cast::<AtomicU32>().as_ref() };
        // Relaxed: a number that stands for itself.
        word.unwrap().load(Ordering::Relaxed)
    }
}

impl Memory {
    /// What is in guest memory, while no guest runs.
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: the whole mapping; no vCPU runs, so nobody writes it.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), LEN) }.to_vec()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the VM that used it is dropped before (field order in `Machine`).
        unsafe { libc::munmap(self.0.as_ptr().cast(), LEN) };
    }
}

pub struct Machine {
    pub vm: Vm,
    pub memory: Memory,
}

pub fn kvm() -> Kvm {
    Kvm::open().expect("this test needs KVM")
}

impl Machine {
    /// A VM without an interrupt controller.
    pub fn new(guest: &[u8]) -> Self {
        Self::with(guest, |_| {})
    }

    /// A VM with KVM's own interrupt controller.
    pub fn with_irqchip(guest: &[u8]) -> Self {
        Self::with(guest, |setup| setup.fd().create_irq_chip().unwrap())
    }

    /// A VM that `set_up` adds something to before its first vCPU.
    pub fn with(guest: &[u8], set_up: impl FnOnce(&VmSetup)) -> Self {
        let memory = Memory::with(guest);
        let setup = kvm().create_vm().unwrap().named("test");
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: LEN as u64,
            userspace_addr: memory.0.as_ptr() as u64,
        };
        // SAFETY: the mapping is as long as the slot and outlives the VM.
        unsafe { setup.fd().set_user_memory_region(region) }.unwrap();
        set_up(&setup);
        Self {
            vm: setup.finish(),
            memory,
        }
    }

    /// A vCPU that starts the guest in real mode with its number in EBX and a stack below the guest.
    pub fn vcpu(&self, id: u32) -> Vcpu {
        let vcpu = self.vm.create_vcpu(VcpuId(id)).unwrap();
        let mut state = BootState::real_mode(&vcpu.sregs().unwrap(), 0, LOAD);
        state.regs.rbx = id.into();
        state.regs.rsp = LOAD.into();
        vcpu.set_boot_state(&state).unwrap();
        vcpu
    }

    /// A vCPU that starts the guest in flat 32-bit mode.
    pub fn protected_mode(&self, id: u32) -> Vcpu {
        let vcpu = self.vm.create_vcpu(VcpuId(id)).unwrap();
        let start = GuestAddress(LOAD.into());
        let state = BootState::protected_mode(&vcpu.sregs().unwrap(), start, 0, 0);
        vcpu.set_boot_state(&state).unwrap();
        vcpu
    }

    /// As [`Machine::vcpu`], and it runs at once: one of a VM with KVM's irqchip, but for the first, would wait for
    /// its start-up interrupt.
    pub fn runnable(&self, id: u32) -> Vcpu {
        let vcpu = self.vcpu(id);
        let mp_state = KVM_MP_STATE_RUNNABLE;
        vcpu.fd().set_mp_state(kvm_mp_state { mp_state }).unwrap();
        vcpu
    }
}

/// Fails a test that hangs, instead of hanging with it.
pub fn watchdog<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    // 100,000 pauses of spinning guests took half an hour on a host that others kept busy.
    let limit = if long_tests() { 2 * 3600 } else { 300 };
    watchdog::within(Duration::from_secs(limit), test)
}

pub fn long_tests() -> bool {
    std::env::var_os("LONG_TESTS").is_some_and(|value| value == "1")
}
