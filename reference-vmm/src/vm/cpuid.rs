// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest's processors are to be: asked of KVM on a thread of its own, given to each vCPU.

use std::io;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_core::arch::x86_64::cpuid::{HypervisorLeaves, Template, Timing};
use kvm_core::arch::x86_64::{CpuidPlan, McgCap, Topology, boot_msrs};
use kvm_core::{Kvm, Vcpu};
use vm_memory::GuestAddress;

use super::error::BuildError;
use crate::config::{self, Config};

/// Opens KVM, and asks it for what decides whether there can be such a machine at all.
pub(super) fn ask_kvm(
    config: &Config,
    topology: Topology,
    template: Template,
    ram: &[(GuestAddress, u64)],
) -> Result<(Arc<Kvm>, CpuidQuestion), BuildError> {
    let kvm = Arc::new(Kvm::open_at(&config.kvm)?);
    let capabilities = kvm.capabilities();
    let (asked, most) = (topology.cpus(), capabilities.max_vcpus());
    if asked > most {
        return Err(BuildError::Cpus { asked, most });
    }
    // Without gaps in their ids the number of vCPUs has said it already.
    let highest = topology.highest_apic_id().0;
    if highest >= asked && highest >= capabilities.max_vcpu_id() {
        let most = capabilities.max_vcpu_id().saturating_sub(1);
        return Err(BuildError::ApicId { highest, most });
    }
    let chosen = template != Template::host();
    let cpuid = CpuidBase::ask(&kvm, config.irqchip, topology, template)?.early_for(ram, chosen)?;
    Ok((kvm, cpuid))
}

/// What the guest's processors are to be, but for what each has of its own.
pub(super) struct CpuidBase {
    model: Vec<kvm_bindings::kvm_cpuid_entry2>,
    topology: Topology,
    tsc_deadline: bool,
    arat: Option<bool>,
    /// The guest's machine-check banks, and whether it is told that it can recover.
    machine_checks: Option<McgCap>,
    mca_recovery: bool,
}

/// The answer, or where it is on its way.
pub(super) enum CpuidQuestion {
    Asked(JoinHandle<Result<CpuidBase, BuildError>>),
    Answered(CpuidBase),
}

impl CpuidQuestion {
    /// Waits for the answer now where it may be no: a processor model was `chosen`, or this RAM is more than
    /// any processor can be relied on to address.
    fn early_for(self, ram: &[(GuestAddress, u64)], chosen: bool) -> Result<Self, BuildError> {
        match chosen || end_of(ram) > 1 << LEAST_ADDRESS_BITS {
            true => Ok(CpuidQuestion::Answered(self.answer(ram)?)),
            false => Ok(self),
        }
    }

    /// Waits for the answer. Refuses RAM that the guest's processors could not address: KVM itself takes
    /// any slot, and the guest would meet the hole much later.
    pub(super) fn answer(self, ram: &[(GuestAddress, u64)]) -> Result<CpuidBase, BuildError> {
        let cpuid = match self {
            CpuidQuestion::Answered(cpuid) => cpuid,
            CpuidQuestion::Asked(thread) => answer_of(thread)?,
        };
        let (end, bits) = (end_of(ram), address_bits(&cpuid.model));
        if bits < u64::BITS && end > 1 << bits {
            let given = ram.iter().map(|(_, len)| len).sum();
            return Err(BuildError::AddressBits { given, end, bits });
        }
        Ok(cpuid)
    }
}

/// Asks KVM something about CPUID on a thread of its own.
pub(super) fn ask_aside<T: Send + 'static, E: Send + 'static>(
    ask: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<JoinHandle<Result<T, E>>, BuildError> {
    let thread = std::thread::Builder::new().name("cpuid".into()).spawn(ask);
    thread.map_err(|source| BuildError::Process {
        what: "start a thread for CPUID",
        source,
    })
}

/// Waits for what [was asked](ask_aside).
pub(super) fn answer_of<T, E>(thread: JoinHandle<Result<T, E>>) -> Result<T, BuildError>
where
    BuildError: From<E>,
{
    let answer = thread.join().map_err(|_| BuildError::Process {
        what: "ask for the host's CPUID",
        source: io::Error::other("its thread panicked"),
    });
    Ok(answer??)
}

/// Where RAM ends.
fn end_of(ram: &[(GuestAddress, u64)]) -> u64 {
    let ends = ram.iter().map(|(start, len)| start.0.saturating_add(*len));
    ends.max().unwrap_or(0)
}

/// What x86-64 processors have at least, and one has that does not say.
const LEAST_ADDRESS_BITS: u32 = 36;

/// Width of guest physical addresses: the processor's, or what of it KVM can map, where it says so (its
/// page tables may have a level less than the processor's widest address wants).
fn address_bits(supported: &[kvm_bindings::kvm_cpuid_entry2]) -> u32 {
    let leaf = supported.iter().find(|leaf| leaf.function == 0x8000_0008);
    let Some(leaf) = leaf else {
        return LEAST_ADDRESS_BITS;
    };
    match (leaf.eax & 0xff, leaf.eax >> 16 & 0xff) {
        (bits, 0) => bits,
        (bits, mappable) => bits.min(mappable),
    }
}

impl CpuidBase {
    /// Asks on a thread of its own: KVM executes CPUID a hundred times for its answer, each of which
    /// traps where the host is a virtual machine itself, and nothing needs the answer before the
    /// vCPUs. In a start of 1.5 ms it was 0.4 ms.
    fn ask(
        kvm: &Arc<Kvm>,
        irqchip: config::Irqchip,
        topology: Topology,
        template: Template,
    ) -> Result<CpuidQuestion, BuildError> {
        let kvm = kvm.clone();
        let ask = move || {
            // The timer is the local APIC's: it is there only where the kernel has that, and without a PIT
            // the timer of a sleeping processor is its own. A template may do without both.
            let apic = irqchip != config::Irqchip::None;
            let wanted = |name| template.says(name) != Some(false);
            let machine_checks = kvm
                .machine_check_support()
                .map_err(BuildError::MachineChecks)?;
            let machine_checks = machine_checks.for_guest();
            Ok(CpuidBase {
                model: template.apply(kvm.supported_cpuid()?.as_slice())?,
                topology,
                tsc_deadline: apic
                    && wanted("tsc_deadline_timer")
                    && kvm.capabilities().tsc_deadline_timer(),
                arat: apic.then(|| wanted("arat")),
                machine_checks,
                mca_recovery: machine_checks.is_some()
                    && wanted("succor")
                    && wanted("overflow_recov"),
            })
        };
        Ok(CpuidQuestion::Asked(ask_aside(ask)?))
    }

    /// Tells the guest how fast its TSC is, where KVM does: a host whose own is unstable has no answer.
    pub(super) fn tell_time(&mut self, vcpu: &Vcpu) {
        let khz = vcpu.fd().get_tsc_khz().ok().and_then(NonZeroU32::new);
        if let Some(khz) = khz {
            let leaves = HypervisorLeaves::default().with_timing(Timing::new(khz));
            leaves.apply(&mut self.model);
        }
    }

    /// CPUID, MSRs and local interrupt pins of a vCPU.
    pub(super) fn set_up(&self, vcpu: &Vcpu, config: &Config) -> Result<(), BuildError> {
        let plan = CpuidPlan {
            id: vcpu.id(),
            topology: self.topology,
            tsc_deadline: self.tsc_deadline,
            arat: self.arat,
            mca_recovery: self.mca_recovery,
        };
        let cpuid = plan.apply(&self.model)?;
        vcpu.set_cpuid(&cpuid)?;
        // It may be restored some day where memory comes later, and is lost.
        if let Some(cap) = self.machine_checks {
            vcpu.set_machine_check_cap(cap)?;
        }
        for refused in vcpu.set_msrs(&boot_msrs(cpuid.as_slice()))? {
            log::debug!("vCPU {}: {refused}", vcpu.id());
        }
        if config.irqchip == config::Irqchip::Kernel {
            vcpu.wire_local_pins()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout;
    use kvm_bindings::kvm_cpuid_entry2;

    fn leaf(eax: u32) -> [kvm_cpuid_entry2; 2] {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        [leaf(1, 0xff), leaf(0x8000_0008, eax)]
    }

    #[test]
    fn address_bits_are_the_fewer_of_the_processors_and_those_that_kvm_maps() {
        assert_eq!(address_bits(&leaf(0x3027)), 39);
        assert_eq!(address_bits(&leaf(0x30_3934)), 48);
        assert_eq!(address_bits(&leaf(0x34_3930)), 48);
        assert_eq!(address_bits(&leaf(0)[..1]), LEAST_ADDRESS_BITS);
    }

    #[test]
    fn memory_above_the_address_bits_is_refused_with_all_the_numbers() {
        let check = |bits, size| {
            let base = CpuidBase {
                model: leaf(bits).to_vec(),
                topology: Topology::flat(1).unwrap(),
                tsc_deadline: false,
                arat: None,
                machine_checks: None,
                mca_recovery: false,
            };
            let ram = memslots::ram_layout(size, layout::MMIO_HOLE).unwrap();
            let question = CpuidQuestion::Answered(base).early_for(&ram, false)?;
            question.answer(&ram).map(drop)
        };
        let gib = 1 << 30;
        check(39, 511 * gib).unwrap();
        check(36, gib).unwrap();
        let error = check(39, 512 * gib).unwrap_err();
        assert_eq!(error.exit_status(), 2);
        let text = error.to_string();
        for needle in [
            "549755813888 bytes",
            "0x8040000000",
            "39 address bits",
            "0x8000000000",
        ] {
            assert!(text.contains(needle), "{text}");
        }
        // An odd one is found out later.
        assert!(check(32, 8 * gib).is_err());
    }
}
