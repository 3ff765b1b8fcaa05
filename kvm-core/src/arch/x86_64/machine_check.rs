// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A memory error, told to the guest as its processor would: a machine check (#MC, vector 18).
//!
//! A guest that is told which page it lost can go on without it: Linux kills the process that the page
//! belongs to, or drops a clean page of its cache, and panics only where the page is its own. SDM volume
//! 3, chapter 17 (Machine-Check Architecture), and for AMD's the APM volume 2, chapter 9.
//!
//! A guest that has switched machine checks off (CR4.MCE), or that is in one already, would shut down
//! instead: so does a processor, and so does KVM. Of one that has not switched on the bank KVM tells nobody.
//! [`MachineCheck::raise`] looks first, and raises none then ([`Unheeded`]).
//!
//! # Who heeds
//! | guest | needs | and then |
//! | --- | --- | --- |
//! | Linux with AMD's CPUID (`CONFIG_X86_MCE`, `CONFIG_MEMORY_FAILURE`) | `succor` and `overflow_recov` in CPUID ([`CpuidPlan::mca_recovery`](super::CpuidPlan::mca_recovery)) | kills the process that touched the page, and never uses it again; without them it panics |
//! | Linux with Intel's CPUID (the same) | `MCG_SER_P` ([`McgCap::for_guest`]), which `kvm_amd` has not, and the check on all vCPUs ([`MachineCheck::for_others`]) | the same; without `MCG_SER_P` it panics |
//! | Linux without `CONFIG_X86_MCE` (Debian's cloud kernel 6.1) | | panics: CR4.MCE is set, and there is no handler |
//! | one whose kernel itself touched the page | | panics, but where it copies from or to a process (Intel's alone) |
//! | your own, with CR4.MCE, a gate for vector 18 and its bank's control register all ones | | what its handler does |
//!
//! | KVM | tells of a page that is lost so that |
//! | --- | --- |
//! | `kvm_amd`, and others that run the guest on the processor | it can be told: `SIGBUS` (`BUS_MCEERR_AR`) while in `KVM_RUN` |
//! | one that interprets guests (the PVM back end's emulator) | it cannot: an MMIO exit, and the instruction is over ([`MemoryError::is_restartable`]) |
//!
//! Measured with Debian's kernels 6.1 and 6.12 as guests of 6.12's `kvm_amd` (`reference-vmm`'s `lab_machine_check`; its README has
//! the runs); Intel's with a bare-metal guest alone, on the same KVM.

use kvm_bindings::{kvm_cpuid_entry2, kvm_x86_mce};
use vm_memory::GuestAddress;
use vmm_sys_util::errno::Error as Errno;

use super::cpuid::Vendor;
use crate::memory_error::{MemoryError, MemoryErrorKind, MemoryErrorSource};

/// The bank that reports; memory controllers' are above the processor's own. QEMU's choice too.
const BANK: u8 = 9;
/// Banks that a guest is given: the first that has [`BANK`].
const BANKS: u64 = BANK as u64 + 1;

/// `KVM_X86_SETUP_MCE` and `KVM_X86_SET_MCE`, of a vCPU.
pub trait InjectMachineCheck {
    /// Gives the vCPU its `IA32_MCG_CAP`; before it runs.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn setup_mce(&self, mcg_cap: u64) -> Result<(), Errno>;

    /// Raises a machine check, or stores what needs none.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn set_mce(&self, mce: &kvm_x86_mce) -> Result<(), Errno>;

    /// What decides whether the vCPU takes a machine check that `bank` reports.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn mce_controls(&self, bank: u8) -> Result<MceControls, Errno>;
}

/// What decides whether a vCPU takes a machine check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MceControls {
    /// CR4.
    pub cr4: u64,
    /// `IA32_MCG_CAP`.
    pub cap: McgCap,
    /// `IA32_MCG_STATUS`.
    pub status: u64,
    /// `IA32_MCG_CTL`; counts where [`McgCap`] has it.
    pub control: u64,
    /// The bank's `IA32_MCi_CTL`; 0 where there is no such bank.
    pub bank_control: u64,
}

/// Why a guest does not take a machine check that is raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Unheeded {
    /// CR4.MCE is not set: the processor would shut down.
    #[error("the guest has not switched machine checks on (CR4.MCE)")]
    Off,
    /// `MCG_STATUS.MCIP` is set: the processor would shut down.
    #[error("the guest is in a machine check already (MCG_STATUS.MCIP)")]
    InProgress,
    /// `IA32_MCG_CTL` or the bank's `IA32_MCi_CTL` is not all ones: KVM raises none.
    #[error("the guest has not switched on what reports them (IA32_MCG_CTL, IA32_MC{BANK}_CTL)")]
    Masked,
}

impl MceControls {
    const CR4_MCE: u64 = 1 << 6;

    /// Whether a machine check is taken, by the rules of the SDM (volume 3, 17.3.1.2 and 17.3.2.1) and those
    /// of KVM, which takes a control register that is not all ones for one that is off.
    ///
    /// # Errors
    /// [`Unheeded`].
    pub const fn heeds(&self) -> Result<(), Unheeded> {
        let all = !self.cap.has_control() || self.control == u64::MAX;
        if self.cr4 & Self::CR4_MCE == 0 {
            Err(Unheeded::Off)
        } else if self.status & IN_PROGRESS != 0 {
            Err(Unheeded::InProgress)
        } else if !all || self.bank_control != u64::MAX {
            Err(Unheeded::Masked)
        } else {
            Ok(())
        }
    }
}

/// Why a machine check was not raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RaiseError {
    /// The guest would not take it; KVM was not asked.
    #[error(transparent)]
    Unheeded(#[from] Unheeded),
    /// KVM refused.
    #[error("KVM gives it no machine check: {0}")]
    Kvm(#[from] Errno),
}

/// `IA32_MCG_CAP`: what a machine-check architecture can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct McgCap(pub u64);

impl McgCap {
    /// `MCG_CTL_P`: there is an `IA32_MCG_CTL`.
    const CONTROL: u64 = 1 << 8;
    /// `MCG_SER_P`: errors that software can recover from are told as such.
    const SOFTWARE_RECOVERY: u64 = 1 << 24;

    /// How many banks.
    #[must_use]
    pub const fn banks(self) -> u8 {
        self.0 as u8
    }

    /// Whether there is an `IA32_MCG_CTL` (`MCG_CTL_P`).
    #[must_use]
    pub const fn has_control(self) -> bool {
        self.0 & Self::CONTROL != 0
    }

    /// Whether memory errors can be recovered from (`MCG_SER_P`).
    #[must_use]
    pub const fn software_recovery(self) -> bool {
        self.0 & Self::SOFTWARE_RECOVERY != 0
    }

    /// What a guest is given so that it takes a [`MachineCheck`], on a host that supports `self`
    /// (`Kvm::machine_check_support`): ten banks, a control register, software recovery,
    /// those that the host has. `None` where it has too few banks. (`kvm_amd` takes software recovery, and gives a guest
    /// none: AMD's processors say it in CPUID.)
    #[must_use]
    pub const fn for_guest(self) -> Option<Self> {
        if self.banks() <= BANK {
            return None;
        }
        Some(Self(
            self.0 & (Self::CONTROL | Self::SOFTWARE_RECOVERY) | BANKS,
        ))
    }
}

/// Whose machine checks the guest knows: their bits differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum McaVendor {
    /// Intel's, and others' that follow it.
    Intel,
    /// AMD's and Hygon's.
    Amd,
}

impl McaVendor {
    /// By the CPUID that the guest was given.
    #[must_use]
    pub fn of(cpuid: &[kvm_cpuid_entry2]) -> Self {
        match Vendor::of(cpuid) {
            Vendor::Amd => Self::Amd,
            _ => Self::Intel,
        }
    }
}

/// A machine check for a guest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MachineCheck(kvm_x86_mce, McaVendor);

// IA32_MCi_STATUS
const VALID: u64 = 1 << 63;
const UNCORRECTED: u64 = 1 << 61;
const ENABLED: u64 = 1 << 60;
const MISC_VALID: u64 = 1 << 59;
const ADDRESS_VALID: u64 = 1 << 58;
const CONTEXT_CORRUPT: u64 = 1 << 57;
const SIGNALED: u64 = 1 << 56;
const ACTION_REQUIRED: u64 = 1 << 55;
const AMD_DEFERRED: u64 = 1 << 44;
const AMD_POISON: u64 = 1 << 43;
/// MCACOD of a data load, SDM table 17-20.
const DATA_LOAD: u64 = 0x134;
/// MCACOD of a memory scrubber's find, without the channel.
const SCRUB: u64 = 0xc0;
// IA32_MCG_STATUS
const RESTART_IP_VALID: u64 = 1;
const ERROR_IP_VALID: u64 = 1 << 1;
const IN_PROGRESS: u64 = 1 << 2;
/// IA32_MCi_MISC, bits 8:6: the address is a physical one.
const PHYSICAL: u64 = 2 << 6;

impl MachineCheck {
    /// The machine check that tells a guest of `error`; `None` where its guest address is not known, and
    /// where the guest asked for private memory that there is not
    /// ([`MemoryError::wants_private`]): a wish, and no damage.
    ///
    /// One that the guest has run into and whose instruction can be restarted is "action required"; one
    /// that nobody has run into is "action optional". Where the instruction is over, or was half done by
    /// the monitor ([`MemoryError::is_restartable`]), the processor's context is corrupt: no guest goes
    /// on from that, and Linux says so and panics.
    #[must_use]
    pub fn of(error: &MemoryError, vendor: McaVendor) -> Option<Self> {
        let GuestAddress(addr) = error.address?;
        if error.wants_private() == Some(true) && error.kind != MemoryErrorKind::Poisoned {
            return None;
        }
        let common = VALID | ENABLED | MISC_VALID | ADDRESS_VALID;
        let (status, mcg_status) = match (vendor, error.is_optional(), error.is_restartable()) {
            (McaVendor::Intel, true, _) => (UNCORRECTED | SIGNALED | SCRUB, RESTART_IP_VALID),
            (McaVendor::Intel, false, true) => (
                UNCORRECTED | SIGNALED | ACTION_REQUIRED | DATA_LOAD,
                RESTART_IP_VALID | ERROR_IP_VALID,
            ),
            // A deferred error: nothing is raised, the guest finds it when it looks.
            (McaVendor::Amd, true, _) => (AMD_DEFERRED | AMD_POISON, RESTART_IP_VALID),
            (McaVendor::Amd, false, true) => {
                (UNCORRECTED | AMD_POISON, RESTART_IP_VALID | ERROR_IP_VALID)
            }
            (_, false, false) => (UNCORRECTED | CONTEXT_CORRUPT | DATA_LOAD, 0),
        };
        let bytes = match error.source {
            MemoryErrorSource::Signal(signal) => signal.bytes as u64,
            _ => 4096,
        };
        // The lowest bit of the address that is valid, in 6 bits.
        let lsb = u64::from(bytes.max(1).ilog2());
        let mce = kvm_x86_mce {
            status: common | status,
            addr,
            misc: PHYSICAL | lsb,
            mcg_status: IN_PROGRESS | mcg_status,
            bank: BANK,
            ..Default::default()
        };
        Some(Self(mce, vendor))
    }

    /// What `KVM_X86_SET_MCE` is given.
    #[must_use]
    pub const fn as_kvm(&self) -> &kvm_x86_mce {
        &self.0
    }

    /// Raises it on a vCPU, which takes it at its next entry.
    ///
    /// Intel's processors raise it on all of a machine at once, and Linux waits there for all to come; so
    /// a guest of several vCPUs that knows Intel's should get [`MachineCheck::for_others`] on the others
    /// as well.
    ///
    /// # Errors
    /// [`RaiseError`]; nothing was raised. `EINVAL` of KVM where the vCPU has too few banks
    /// ([`McgCap::for_guest`]).
    pub fn raise(&self, vcpu: &impl InjectMachineCheck) -> Result<(), RaiseError> {
        // Others are stored, and interrupt nobody.
        if self.0.status & UNCORRECTED != 0 {
            vcpu.mce_controls(self.0.bank)?.heeds()?;
        }
        Ok(vcpu.set_mce(&self.0)?)
    }

    /// What the machine's other processors are told meanwhile: that there is a machine check, not theirs.
    /// `None` where nothing is raised, and for AMD's, which raise theirs on one processor alone.
    #[must_use]
    pub fn for_others(&self) -> Option<Self> {
        let is_broadcast = self.1 == McaVendor::Intel && self.0.status & UNCORRECTED != 0;
        is_broadcast.then(|| {
            let mce = kvm_x86_mce {
                status: VALID | UNCORRECTED,
                mcg_status: IN_PROGRESS | RESTART_IP_VALID,
                bank: 1,
                ..Default::default()
            };
            Self(mce, self.1)
        })
    }
}
