// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM with 256 MiB of RAM and a ROM, in a page: lay out, make slots, load, run. Needs /dev/kvm.

use kvm_ioctls::{Kvm, VcpuExit};
use memslots::{Backing, Memslots, NewSlot, SlotFlags, ram_layout};
use std::error::Error;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

fn main() -> Result<(), Box<dyn Error>> {
    let vm = Arc::new(Kvm::new()?.create_vm()?);
    let memslots = Memslots::new(Arc::clone(&vm));

    // RAM around the hole that 32-bit devices need, and a ROM in the hole.
    let ram = ram_layout(256 << 20, 3 << 30..4 << 30)?
        .into_iter()
        .map(|(start, size)| NewSlot {
            start,
            backing: Backing::anonymous(size),
            flags: SlotFlags::NONE,
        });
    let rom = NewSlot {
        start: GuestAddress(0xfffc_0000),
        backing: Backing::anonymous(256 << 10),
        flags: SlotFlags::READ_ONLY,
    };
    let slots = memslots.create_all(ram.chain([rom]))?;

    // The snapshot is a loader's view: it may write the ROM. `mov al, [0x5000]; out 0x10, al; hlt`
    memslots
        .snapshot()
        .write_slice(&[0xa0, 0x00, 0x50, 0xe6, 0x10, 0xf4], GuestAddress(0x1000))?;
    memslots
        .snapshot()
        .write_obj(b'!', GuestAddress(0xfffc_0000))?;
    // The live handle is a device's: permissions checked, slots as they are now.
    memslots
        .ram()
        .memory()
        .write_obj(b'*', GuestAddress(0x5000))?;

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::IoOut(port, data) => println!("the guest sent {:?} to port {port:#x}", data),
        other => println!("the guest did something else: {other:?}"),
    }
    println!(
        "slots: {:?}",
        slots
            .iter()
            .map(|slot| slot.extent().guest_range())
            .collect::<Vec<_>>()
    );
    Ok(())
}
