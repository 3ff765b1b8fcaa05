// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM with 256 MiB of RAM and a ROM, in a page: lay out, make slots, load, run. Needs /dev/kvm.

use kvm_ioctls::{Kvm, VcpuExit};
use memslots::{Backing, Memslots, NewSlot, SlotFlags, ram_layout};
use std::{error::Error, process::ExitCode, sync::Arc};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

fn slot(start: GuestAddress, size: u64, flags: SlotFlags) -> NewSlot {
    let backing = Backing::anonymous(size);
    NewSlot {
        start,
        backing,
        flags,
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let (vm, rom) = (
        Arc::new(Kvm::new()?.create_vm()?),
        GuestAddress(0xfffc_0000),
    );
    let memslots = Memslots::new(Arc::clone(&vm));
    // RAM around the hole that 32-bit devices need, and a ROM in the hole.
    let ram = ram_layout(256 << 20, 3 << 30..4 << 30)?.into_iter();
    let ram = ram.map(|(start, size)| slot(start, size, SlotFlags::NONE));
    let layout = ram
        .chain([slot(rom, 256 << 10, SlotFlags::READ_ONLY)])
        .collect();
    memslots.set_layout(&layout)?;

    // The snapshot is a loader's view: it may write the ROM. `mov al, [0x5000]; out 0x10, al; hlt`
    let loader = memslots.snapshot();
    loader.write_slice(&[0xa0, 0x00, 0x50, 0xe6, 0x10, 0xf4], GuestAddress(0x1000))?;
    loader.write_obj(b'!', rom)?;
    // The live handle is a device's: permissions checked, slots as they are now.
    memslots
        .ram()
        .memory()
        .write_obj(b'*', GuestAddress(0x5000))?;

    let mut vcpu = vm.create_vcpu(0)?;
    let (mut sregs, mut regs) = (vcpu.get_sregs()?, vcpu.get_regs()?);
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::IoOut(port, data) => println!("the guest sent {data:?} to port {port:#x}"),
        other => println!("the guest did something else: {other:?}"),
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("own_vm: {error}");
            ExitCode::FAILURE
        }
    }
}
