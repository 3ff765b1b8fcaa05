// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine whose state is to come: from a snapshot's file, or over a wire.
//!
//! ```text
//!   Blank::new ──► check(vCPUs)  ──► allocate ──► frame ─────────────► finish(state, devices)
//!   (VM)           (host takes        (slots)      (irqchip, vCPUs)     (states in KVM's order, bus)
//!                   them?)               └───── memory is filled ─────────┘
//!                                               (mapped, read, received)
//! ```
//!
//! What the host takes is [asked](HostQuestion) on a thread of its own, and the check waits for the answer: it may come as late
//! as the frame is made, where nothing before that takes long.
//!
//! What KVM takes long to make is in the frame, which wants no state: a machine that comes from elsewhere has it before its
//! guest is stopped there.
//!
//! The states come in the order that KVM needs ([`kvm_core::state`](kvm_core::arch::x86_64::state),
//! [`irq_routing::IrqchipState`]): the clock when all vCPUs are made, the vCPUs with their local APICs, then the
//! controllers in KVM or the monitor, which send again what they had pending, then the devices' lines. virtio devices go on
//! when the machine starts, and look into their queues then: what the driver notified of before is in guest memory, and
//! nobody tells of it again.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_core::arch::x86_64::state::{ClockRestore, StateHost};
use kvm_core::{Kvm, ListedHost, PreFaultMemory, Vcpu, VcpuId, VmSetup};
use kvm_ioctls::VmFd;
use memslots::{NewSlot, Snapshot};
use vm_memory::{Bytes, GuestAddress};

use super::compose::{Composition, Frame};
use super::cpuid::{answer_of, ask_aside};
use super::tracking::{TrackError, TrackUser, Tracker};
use super::{BuildError, Machine};
use crate::arch::layout;
use crate::config::{Config, Irqchip};
use crate::devices::edge::Owing;
use crate::devices::virtio::any::Devices;
use crate::devices::virtio::rng::random_id;
use crate::end::EndSignal;
use crate::memory::{Memslots, SlotTable, slots_of};
use crate::snapshot::RestoreError;
use crate::snapshot::machine::{MachineState, VcpuSection};

/// A VM that has nothing yet.
pub(crate) struct Blank {
    config: Config,
    setup: VmSetup,
    host: HostQuestion,
    /// Its memory is to be empty, whatever the configuration says: it comes when it is touched.
    lazy: bool,
}

/// One that has its memory.
pub(crate) struct Allocated {
    blank: Blank,
    memslots: Memslots,
    tracker: Tracker,
}

/// One that has its irqchip and its vCPUs as well: all but a state.
pub(crate) struct Framed {
    config: Config,
    host: HostQuestion,
    memslots: Memslots,
    tracker: Tracker,
    frame: Frame,
    vcpus: Vec<Vcpu>,
}

/// What this host's KVM saves of a vCPU and takes, asked as [`CpuidBase`](super::cpuid::CpuidBase) is and for its reasons: of
/// a restore in 3.4 ms, one was this.
struct HostQuestion {
    kvm: Arc<Kvm>,
    /// What KVM lists, until it is waited for.
    asked: Option<JoinHandle<Result<ListedHost, kvm_core::Error>>>,
    /// Complete: all that KVM gives.
    answered: Option<StateHost>,
}

impl HostQuestion {
    fn ask(kvm: Kvm, vm: &Arc<VmFd>) -> Result<Self, BuildError> {
        let (kvm, vm) = (Arc::new(kvm), vm.clone());
        let asks = kvm.clone();
        let ask = move || asks.listed_host(&vm);
        Ok(HostQuestion {
            kvm,
            asked: Some(ask_aside(ask)?),
            answered: None,
        })
    }

    /// Waits for the answer. Where KVM gives more than it lists that is seen by `vcpu`, whose CPUID is to come still, or without
    /// one by one of a VM that is made for it.
    fn answer(&mut self, vcpu: Option<&Vcpu>) -> Result<&StateHost, BuildError> {
        let host = match (self.answered.take(), self.asked.take()) {
            (Some(host), _) => host,
            (None, Some(thread)) => {
                let listed = answer_of(thread)?;
                match vcpu {
                    Some(vcpu) => listed.complete_by(vcpu)?,
                    None => listed.complete(&self.kvm)?,
                }
            }
            // The answer was no, and is so still.
            (None, None) => return Err(BuildError::Ended),
        };
        Ok(self.answered.insert(host))
    }

    fn check(&mut self, vcpus: &[VcpuSection]) -> Result<(), BuildError> {
        let host = self.answer(None)?;
        for vcpu in vcpus {
            let checked = host.check(&vcpu.state);
            checked.map_err(|refusal| RestoreError::Vcpu {
                id: VcpuId(vcpu.id),
                source: refusal.into(),
            })?;
        }
        Ok(())
    }
}

impl Drop for HostQuestion {
    /// The thread has descriptors, of which none is left behind.
    fn drop(&mut self) {
        if let Some(thread) = self.asked.take() {
            let _ = thread.join();
        }
    }
}

impl Blank {
    /// A VM for a machine of this configuration, if this host has vCPUs enough.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub(crate) fn new(config: &Config) -> Result<Self, BuildError> {
        srcu::prepare();
        let kvm = Kvm::open_at(&config.kvm)?;
        config.memory.check_kvm(kvm.fd())?;
        let (asked, most) = (config.cpus.count, kvm.capabilities().max_vcpus());
        if asked > most {
            return Err(BuildError::Cpus { asked, most });
        }
        let setup = kvm.create_vm()?.named("guest");
        Ok(Blank {
            config: config.clone(),
            host: HostQuestion::ask(kvm, setup.fd())?,
            setup,
            lazy: false,
        })
    }

    /// Has its memory be empty, whatever its configuration says of prefaulting: what is present is never missed.
    pub(crate) fn lazy(mut self, lazy: bool) -> Self {
        self.lazy = lazy;
        self
    }

    /// Refuses vCPUs that this host does not take: CPUID bits, MSRs, state that its KVM does not have.
    ///
    /// # Errors
    /// [`RestoreError::Vcpu`], the first thing that is missing; what KVM answers to who asks.
    pub(crate) fn check(&mut self, vcpus: &[VcpuSection]) -> Result<(), BuildError> {
        self.host.check(vcpus)
    }

    /// Makes its memory. `backing` may say of what, and says whether it did; else it is what the configuration says, which
    /// the host is asked for first. Blocks for what is to be present.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub(crate) fn allocate(
        self,
        end: &EndSignal,
        backing: impl FnOnce(&mut [NewSlot]) -> bool,
    ) -> Result<Allocated, BuildError> {
        let memory = &self.config.memory;
        let ram = memslots::ram_layout(memory.size, layout::MMIO_HOLE)?;
        let mut new_slots = memory.slots(&ram, self.has_firmware());
        let told = backing(&mut new_slots);
        if !told {
            let refused = memory.check_host(&new_slots);
            refused.map_err(BuildError::HostMemory)?;
        }
        if !self.lazy {
            memory.check_available()?;
        }
        let memslots = slots_of(self.setup.fd().clone());
        if !told {
            memory.provide(&memslots, &mut new_slots)?;
        }
        let slots = memslots.create_all(new_slots)?;
        if !self.lazy {
            let present = memory.make_present(&memslots.snapshot(), || !end.is_told());
            present.map_err(BuildError::Prefault)?;
        }
        if end.is_told() {
            return Err(BuildError::Ended);
        }
        let tracker = Tracker::new(slots, self.setup.fd(), self.config.dirty_log);
        Ok(Allocated {
            memslots,
            tracker: tracker.map_err(BuildError::DirtyLog)?,
            blank: self,
        })
    }

    fn has_firmware(&self) -> bool {
        self.config.irqchip != Irqchip::None
    }
}

impl Allocated {
    /// As [`Blank::check`].
    ///
    /// # Errors
    /// As [`Blank::check`].
    pub(crate) fn check(&mut self, vcpus: &[VcpuSection]) -> Result<(), BuildError> {
        self.blank.check(vcpus)
    }

    /// Its memory, without permissions: to be filled.
    pub(crate) fn memory(&self) -> Snapshot<SlotTable> {
        self.memslots.snapshot()
    }

    /// Tracks what is written from now on, for a chain of snapshots: also what the restore itself writes, and KVM with it.
    ///
    /// # Errors
    /// [`TrackError`].
    pub(crate) fn track(&self) -> Result<(), TrackError> {
        let vm = self.blank.setup.fd();
        self.tracker.start(TrackUser::Snapshot, vm, &self.memory())
    }

    /// Makes the irqchip, and these vCPUs.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub(crate) fn frame(self, vcpus: &[VcpuSection]) -> Result<Framed, BuildError> {
        let Allocated {
            blank,
            memslots,
            tracker,
        } = self;
        let Blank {
            config,
            setup,
            host,
            ..
        } = blank;
        let frame = Frame::new(&config, setup)?;
        let vcpus = vcpus
            .iter()
            .map(|vcpu| frame.vm.create_vcpu(VcpuId(vcpu.id)));
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        Ok(Framed {
            config,
            host,
            memslots,
            tracker,
            frame,
            vcpus,
        })
    }
}

impl Framed {
    /// Its memory, without permissions: to be filled.
    pub(crate) fn memory(&self) -> Snapshot<SlotTable> {
        self.memslots.snapshot()
    }

    /// Its slots.
    pub(super) fn memslots(&self) -> &Memslots {
        &self.memslots
    }

    /// Its vCPUs, in order.
    pub(crate) fn vcpu_ids(&self) -> impl Iterator<Item = u32> {
        self.vcpus.iter().map(|vcpu| vcpu.id().0)
    }

    /// By whose leave memory is taken into KVM's page tables, where KVM does that: a vCPU that does not run yet.
    pub(crate) fn pre_faulter(&self) -> Option<&(dyn PreFaultMemory + Sync)> {
        self.vcpus.first().map(|first| first.fd() as _)
    }

    /// Gives it its state, which has its vCPUs, and `devices`, which have theirs, with the serial console's output on
    /// `console` and its end told to `end`. Memory has been filled.
    ///
    /// The guest has another generation id than it had, and hears of that where it listens
    /// ([`layout::GENERATION_ID`]), unless it is `the_same`: a machine that has moved, and goes on nowhere else.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub(crate) fn finish(
        self,
        state: &MachineState,
        devices: Devices,
        (clock, the_same): (ClockRestore, bool),
        console: impl AsFd,
        end: &Arc<EndSignal>,
    ) -> Result<Machine, BuildError> {
        let renewed = self.config.irqchip != Irqchip::None && !the_same;
        if renewed {
            let generation = random_id().map_err(RestoreError::Random)?;
            write(&self.memory(), &generation, layout::GENERATION_ID)?;
        }
        let Framed {
            config,
            mut host,
            memslots,
            tracker,
            frame,
            vcpus,
        } = self;
        let passage = frame.vm.restore(&state.vm.vm, clock);
        let passage = passage.map_err(RestoreError::from)?;
        // Which looks whether it takes the state before anything else.
        let host = host.answer(vcpus.first())?;
        for (vcpu, saved) in vcpus.iter().zip(&state.vcpus) {
            let restored = vcpu.restore(host, &saved.state, &passage);
            let restored = restored.map_err(|source| RestoreError::Vcpu {
                id: vcpu.id(),
                source,
            })?;
            log::debug!("vCPU {}: {restored:?}", vcpu.id());
        }
        let composition = Composition {
            config: &config,
            frame,
            vcpus,
            memslots,
            tracker,
            devices,
            console,
            end,
            saved: Some(&state.devices),
        };
        let machine = composition.compose()?;
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
        if renewed {
            parts.power.tell_generation();
        }
        parts.com1.send_owed();
        parts.power.send_owed();
        match end.is_told() {
            // An interrupt was refused, which has told why; or somebody else ended it.
            true => Err(BuildError::Ended),
            false => Ok(machine),
        }
    }
}

fn write(memory: &SlotTable, bytes: &[u8], address: GuestAddress) -> Result<(), RestoreError> {
    let written = memory.write_slice(bytes, address);
    written.map_err(|error| RestoreError::Memory {
        address: address.0,
        why: error.to_string(),
    })
}
