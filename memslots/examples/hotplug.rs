// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory by layout: say what it should be, look at the plan, apply it, and see a mirror (an IOMMU's, say) keep up. Needs
//! /dev/kvm.

use kvm_ioctls::Kvm;
use memslots::{
    Backing, ChangeListener, Layout, LayoutChange, Memslots, NewSlot, Region, SlotFlags, Veto,
};
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use vm_memory::GuestAddress;

/// Where VFIO would map before the guest sees memory, and unmap before memory goes.
struct Mirror;

impl ChangeListener for Mirror {
    fn prepare(&self, change: &LayoutChange<'_>) -> Result<(), Veto> {
        let free = |region: &&Arc<Region>| !change.displaces(region);
        say("map", change.added().filter(free));
        Ok(())
    }

    fn commit(&self, change: &LayoutChange<'_>) {
        say("unmap", change.removed());
        let displaced = |region: &&Arc<Region>| change.displaces(region);
        say("map", change.added().filter(displaced));
    }

    fn abort(&self, change: &LayoutChange<'_>) {
        let free = |region: &&Arc<Region>| !change.displaces(region);
        say("unmap", change.added().filter(free));
    }
}

fn say<'a>(what: &str, regions: impl Iterator<Item = &'a Arc<Region>>) {
    for region in regions {
        println!("   {what} {:#x?}", region.extent().guest_range());
    }
}

fn memory(start: u64, size: u64) -> NewSlot {
    let (start, backing) = (GuestAddress(start), Backing::anonymous(size));
    NewSlot {
        start,
        backing,
        flags: SlotFlags::NONE,
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let memslots = Memslots::new(Arc::new(Kvm::new()?.create_vm()?));
    let _mirror = memslots.listen(Arc::new(Mirror))?;

    let mut layout = Layout::new().with(memory(0, 128 << 20).named("ram"));
    memslots.set_layout(&layout)?;

    println!("A DIMM is plugged, and ram's dirty log is switched on:");
    layout.push(memory(4 << 30, 64 << 20).named("dimm0"));
    if let Some(ram) = layout.get_mut("ram") {
        ram.slot.flags = SlotFlags::LOG_DIRTY_PAGES;
    }
    let plan = memslots.plan(&layout)?;
    println!("{plan}\nvCPUs must pause: {}", plan.has_gap());
    memslots.apply(plan)?;

    println!("It moves, and a second one takes its place:");
    if let Some(dimm) = layout.get_mut("dimm0") {
        dimm.slot.start = GuestAddress(8 << 30);
    }
    layout.push(memory(4 << 30, 32 << 20).named("dimm1"));
    let plan = memslots.plan(&layout)?;
    println!("{plan}\nvCPUs must pause: {}", plan.has_gap());
    memslots.apply(plan)?;

    println!("Both are unplugged:");
    layout.remove("dimm0");
    layout.remove("dimm1");
    println!("{}", memslots.plan(&layout)?);
    // When this returns, neither the guest nor the mirror reaches them; readers that are still inside may.
    memslots.set_layout(&layout)?.grace.wait();
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hotplug: {error}");
            ExitCode::FAILURE
        }
    }
}
