// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM in a page: a real-mode guest writes into three of its pages and halts; a harvest says which
//! ones. `cargo run -p dirty-log --example harvest_vm` (needs /dev/kvm).

use std::error::Error;
use std::process::ExitCode;

use dirty_log::{DirtyLog, KvmBitmap};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use memslots::{Hva, SlotExtent, SlotId};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// mov [0x2000], al; mov [0x2fff], al; mov [0x5000], al; hlt
const GUEST: [u8; 10] = [0xa2, 0x00, 0x20, 0xa2, 0xff, 0x2f, 0xa2, 0x00, 0x50, 0xf4];

fn run() -> Result<(), Box<dyn Error>> {
    let size = 0x10_0000;
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)])?;
    memory.write_slice(&GUEST, GuestAddress(0x1000))?;
    let host = memory.get_host_address(GuestAddress(0))? as usize;

    let vm = Kvm::new()?.create_vm()?;
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: KVM_MEM_LOG_DIRTY_PAGES,
        guest_phys_addr: 0,
        memory_size: size as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the memory outlives the VM.
    unsafe { vm.set_user_memory_region(slot)? };
    // SAFETY: these are the numbers of the slot just made, which stays as it is.
    let extent = unsafe { SlotExtent::new(SlotId(0), GuestAddress(0), size as u64, Hva(host))? };
    let mut log = DirtyLog::new(extent.clone(), KvmBitmap::new(&vm, extent)?)?;

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs)?;
    while !matches!(vcpu.run()?, VcpuExit::Hlt) {}

    let harvest = log.harvest()?;
    for run in harvest.gfns() {
        println!("written: gfn {:#x} to {:#x}", run.start.0, run.end.0 - 1);
    }
    harvest.commit(); // or drop it, and the next harvest has them again
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("harvest_vm: {error}");
            ExitCode::FAILURE
        }
    }
}
