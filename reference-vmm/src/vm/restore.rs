// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine that goes on from a snapshot.
//!
//! ```text
//!   Snapshot::open ──► asked of KVM ──► devices opened ──► memory ──► irqchip, vCPUs, bus ──► states
//!   (all is read       (does this host   (disks as they     (mapped,     (as for a boot)        clock, vCPUs,
//!    and checked)       take them?)       were? locks)       or read)                           controllers, lines
//! ```
//!
//! The states come in the order that KVM needs ([`kvm_core::state`], [`irq_routing::IrqchipState`]): the clock when all
//! vCPUs are made, the vCPUs with their local APICs, then the controllers in KVM or the monitor, which send again what
//! they had pending, then the devices' lines. virtio devices go on when the machine starts, and look into their queues
//! then: what the driver notified of before the snapshot is in guest memory, and nobody tells of it again.

use std::os::fd::AsFd;
use std::sync::Arc;

use kvm_core::{Kvm, Vcpu, VcpuId};
use memslots::Memslots;
use vm_memory::{Bytes, GuestAddress};

use super::compose::Composition;
use super::{BuildError, Machine};
use crate::arch::layout;
use crate::config::Irqchip;
use crate::devices::edge::Owing;
use crate::devices::virtio::rng::random_id;
use crate::end::EndSignal;
use crate::snapshot::{RestoreError, RestoreRequest, Snapshot};

impl Machine {
    /// Makes the machine of a snapshot, to go on where it was, with the serial console's output on `console` and its end
    /// told to `end`.
    ///
    /// The guest has another generation id than it had, and hears of that where it listens
    /// ([`layout::GENERATION_ID`]): it was not the same machine twice.
    ///
    /// Blocks for the reading of the snapshot ([`Snapshot::open`]), and for memory that is not mapped.
    ///
    /// # Errors
    /// [`BuildError`], of which [`BuildError::Restore`] is the snapshot's; nothing is left behind.
    pub fn restore(
        request: &RestoreRequest,
        console: impl AsFd,
        end: &Arc<EndSignal>,
    ) -> Result<Self, BuildError> {
        // 1. Files and numbers.
        let snapshot = Snapshot::open(request)?;
        let (config, state) = (snapshot.config(), &snapshot.state);
        let ram = memslots::ram_layout(config.memory.size, layout::MMIO_HOLE)?;
        let acpi = config.irqchip != Irqchip::None;

        // 2. and 3. What KVM takes at all.
        srcu::prepare();
        let kvm = Kvm::open_at(&config.kvm)?;
        let capabilities = kvm.capabilities();
        let (asked, most) = (state.vcpus.len() as u32, capabilities.max_vcpus());
        if asked > most {
            return Err(BuildError::Cpus { asked, most });
        }
        let setup = kvm.create_vm()?.named("guest");
        let vm_host = setup.state_host(&kvm)?;
        for vcpu in &state.vcpus {
            let id = VcpuId(vcpu.id);
            vm_host
                .check(&vcpu.state)
                .map_err(|refusal| RestoreError::Vcpu {
                    id,
                    source: refusal.into(),
                })?;
        }
        let mut new_slots = config.memory.slots(&ram, acpi);
        let mapped = snapshot.map(&mut new_slots);
        if !mapped {
            let refused = config.memory.check_host(&new_slots);
            refused.map_err(BuildError::HostMemory)?;
        }
        config.memory.check_available()?;
        let devices = snapshot.devices(&console)?;
        devices.check()?;

        // 4. Memory.
        let memslots = Memslots::new(setup.fd().clone());
        let slots = memslots.create_all(new_slots)?;
        let memory = memslots.snapshot();
        let present = config.memory.make_present(&memory, || !end.is_told());
        present.map_err(BuildError::Prefault)?;
        if end.is_told() {
            return Err(BuildError::Ended);
        }
        snapshot.load(&memory, mapped)?;
        if acpi {
            let generation = random_id().map_err(RestoreError::Random)?;
            write(&memory, &generation, layout::GENERATION_ID)?;
        }
        drop(memory);

        // 5. to 7.
        let composition = Composition {
            config,
            setup,
            memslots,
            slots,
            devices,
            console,
            end,
            saved: Some(&state.devices),
        };
        let machine = composition.compose(|vm| {
            let make = |vcpu: &crate::snapshot::machine::VcpuSection| {
                vm.create_vcpu(VcpuId(vcpu.id)).map_err(BuildError::from)
            };
            let vcpus = state.vcpus.iter().map(make);
            let vcpus = vcpus.collect::<Result<Vec<Vcpu>, _>>()?;
            let passage = vm.restore(&state.vm.vm, snapshot.clock);
            let passage = passage.map_err(RestoreError::from)?;
            for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
                let restored = vcpu.restore(&vm_host, &saved.state, &passage);
                let restored = restored.map_err(|source| RestoreError::Vcpu {
                    id: vcpu.id(),
                    source,
                })?;
                log::debug!("vCPU {}: {restored:?}", vcpu.id());
            }
            Ok(vcpus)
        })?;

        // The controllers behind the local APICs, and the lines behind the controllers.
        let parts = &machine.parts;
        let restored = parts
            .irqchip
            .restore(parts.vm.fd().as_ref(), &state.vm.irqchip);
        restored.map_err(RestoreError::from)?;
        if let (Some(chip), Some(ioapic)) = (&parts.chip, &state.vm.ioapic) {
            chip.restore(ioapic).map_err(RestoreError::from)?;
            chip.redeliver().map_err(RestoreError::Pending)?;
        }
        parts.power.tell_generation();
        parts.com1.send_owed();
        parts.power.send_owed();
        match end.is_told() {
            // An interrupt was refused, which has told why; or somebody else ended it.
            true => Err(BuildError::Ended),
            false => Ok(machine),
        }
    }
}

fn write(
    memory: &memslots::SlotTable,
    bytes: &[u8],
    address: GuestAddress,
) -> Result<(), RestoreError> {
    let written = memory.write_slice(bytes, address);
    written.map_err(|error| RestoreError::Memory {
        address: address.0,
        why: error.to_string(),
    })
}
