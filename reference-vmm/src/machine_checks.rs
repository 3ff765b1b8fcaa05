// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Telling a guest of memory that did not come: a machine check, where it takes one and gets on by it.
//!
//! What each guest needs for it, and which KVM tells enough, is in kvm-core's documentation
//! (`arch::x86_64::MachineCheck`); every guest is built so that it can
//! ([`CpuidBase`](crate::vm), `McgCap::for_guest`). A guest that cannot be told is stopped with the reason.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs};
use kvm_core::arch::x86_64::{MachineCheck, McaVendor, RaiseError};
use kvm_core::{Errno, MemoryError, VcpuView};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::GuestAddress;

/// Machine checks of one page that a guest has at the same instruction, with the same in all its registers, before it is
/// taken for one that does not get on by them: its handler has it go back to where it was, for ever. One that goes on and
/// comes back has something else in some register: the number of its pass, its stack, its address space.
const MOST: u32 = 8;

/// The machine checks of one vCPU's guest.
pub(crate) struct MachineChecks {
    vcpus: usize,
    /// Where the guest was at the last one, and how often without another place between.
    last: Option<(Place, u32)>,
}

/// What the guest was at.
#[derive(PartialEq)]
struct Place {
    lost: Option<GuestAddress>,
    registers: kvm_regs,
    cr3: u64,
}

/// Why a guest was not told.
#[derive(Debug, Error)]
pub(crate) enum Untold {
    /// It would not know what its instruction did.
    #[error("this KVM tells of it when the instruction is over")]
    Over,
    #[error("KVM does not say where it is")]
    Nowhere,
    /// Intel's go to all processors of a machine.
    #[error(
        "a guest of several vCPUs with Intel's CPUID waits for it on all of them, and is not told here"
    )]
    Several,
    #[error("it went back to the same instruction from {MOST} machine checks for it")]
    GetsNowhere,
    #[error(transparent)]
    Raise(#[from] RaiseError),
    #[error("the vCPU's registers cannot be read: {0}")]
    Registers(#[from] Errno),
}

impl MachineChecks {
    /// Of a guest of so many vCPUs.
    pub(crate) fn new(vcpus: usize) -> Self {
        MachineChecks { vcpus, last: None }
    }

    /// Has the vCPU take a machine check of `error` at its next entry.
    ///
    /// # Errors
    /// [`Untold`]; the guest has none.
    pub(crate) fn tell(
        &mut self,
        vcpu: &VcpuView<'_, VcpuFd>,
        error: &MemoryError,
    ) -> Result<(), Untold> {
        if !error.is_restartable() {
            return Err(Untold::Over);
        }
        let cpuid = vcpu.fd().get_cpuid2(KVM_MAX_CPUID_ENTRIES)?;
        let vendor = McaVendor::of(cpuid.as_slice());
        let check = MachineCheck::of(error, vendor).ok_or(Untold::Nowhere)?;
        if self.vcpus > 1 && check.for_others().is_some() {
            return Err(Untold::Several);
        }
        let place = Place {
            lost: error.address,
            registers: vcpu.fd().get_regs()?,
            cr3: vcpu.fd().get_sregs()?.cr3,
        };
        let times = match self.last.take() {
            Some((last, times)) if last == place => times + 1,
            _ => 1,
        };
        self.last = Some((place, times));
        if times > MOST {
            return Err(Untold::GetsNowhere);
        }
        Ok(check.raise(vcpu.fd())?)
    }
}
