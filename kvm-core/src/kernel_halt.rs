// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What KVM itself does when a guest halts, waits or pauses: how long it polls before it sleeps
//! (`KVM_CAP_HALT_POLL`), and which of these instructions leave the guest at all
//! (`KVM_CAP_X86_DISABLE_EXITS`). api.rst 7.20 and 7.13.
//!
//! For vCPUs whose halts come to user space it is [`HaltPolling`](crate::HaltPolling) instead.

use std::fmt;
use std::time::Duration;

use kvm_bindings as kvm;
use vmm_sys_util::errno::Error as Errno;

use crate::capability::CheckExtension;

const EINVAL: i32 = 22;

/// `KVM_ENABLE_CAP`, of a VM.
pub trait EnableCapability {
    /// Enables a `KVM_CAP_…` with its arguments.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn enable_capability(&self, capability: u32, args: [u64; 4]) -> Result<(), Errno>;
}

/// Instructions that stay in the guest instead of leaving it to KVM. The guest then keeps its physical CPU
/// while it waits: for vCPUs that have one to themselves.
///
/// `KVM_CAP_X86_DISABLE_EXITS`, api.rst 7.13: chosen before the first vCPU ([`disable_exits`]), from those that
/// the host offers ([`offered_exits`]). Of halts that do leave the guest KVM polls for a time before the
/// thread sleeps ([`set_halt_poll`]); where they come out to user space that is
/// [`HaltPolling`](crate::HaltPolling)'s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DisabledExits(u32);

impl DisabledExits {
    /// None of them: what a VM begins with.
    pub const NONE: Self = Self(0);
    /// `MWAIT` and `MONITOR`.
    pub const MWAIT: Self = Self(kvm::KVM_X86_DISABLE_EXITS_MWAIT);
    /// `HLT`. A halted vCPU then looks busy to the host.
    pub const HLT: Self = Self(kvm::KVM_X86_DISABLE_EXITS_HLT);
    /// `PAUSE`, and with it KVM's help for guests that spin on a lock.
    pub const PAUSE: Self = Self(kvm::KVM_X86_DISABLE_EXITS_PAUSE);
    /// Reads of the C-state residency MSRs.
    pub const CSTATE: Self = Self(kvm::KVM_X86_DISABLE_EXITS_CSTATE);

    const NAMES: [(Self, &'static str); 4] = [
        (Self::MWAIT, "MWAIT"),
        (Self::HLT, "HLT"),
        (Self::PAUSE, "PAUSE"),
        (Self::CSTATE, "C-state MSRs"),
    ];

    /// As `KVM_X86_DISABLE_EXITS_…` bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Of `KVM_X86_DISABLE_EXITS_…` bits, such as newer ones than this crate names.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// Both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those that are not in `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for DisabledExits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("none");
        }
        let mut rest = *self;
        let mut between = "";
        for (exits, name) in Self::NAMES {
            if rest.0 & exits.0 != 0 {
                write!(f, "{between}{name}")?;
                between = ", ";
                rest = rest.without(exits);
            }
        }
        match rest.0 {
            0 => Ok(()),
            bits => write!(f, "{between}{bits:#x}"),
        }
    }
}

/// Why KVM's own halting is not as it was to be. The VM is what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelHaltError {
    /// The host's KVM cannot keep these in the guest.
    #[error("this host's KVM cannot keep in the guest: {missing}; it can: {offered}")]
    ExitsNotOffered {
        /// Asked for and not to be had.
        missing: DisabledExits,
        /// What can be had.
        offered: DisabledExits,
    },
    /// `KVM_CAP_X86_DISABLE_EXITS`.
    #[error("KVM keeps none of these in the guest: {exits}: {errno}{}", late(*errno))]
    DisableExits {
        /// Asked for.
        exits: DisabledExits,
        /// What KVM said.
        errno: Errno,
    },
    /// The host's KVM has one window for all VMs (before Linux 5.11).
    #[error(
        "this host's KVM polls for all of its VMs alike; kvm.halt_poll_ns is the host's setting"
    )]
    NoHaltPoll,
    /// KVM takes no more than 2³² − 1 ns.
    #[error("halt polling for {asked:?} is more than the 4.29 s that KVM takes at most")]
    HaltPollTooLong {
        /// Asked for.
        asked: Duration,
    },
    /// `KVM_CAP_HALT_POLL`.
    #[error("KVM refuses to poll a halted vCPU for {asked:?}: {errno}")]
    HaltPoll {
        /// Asked for.
        asked: Duration,
        /// What KVM said.
        errno: Errno,
    },
}

fn late(errno: Errno) -> &'static str {
    match errno.errno() {
        EINVAL => " (newer KVMs take it before the first vCPU only)",
        _ => "",
    }
}

/// What of these a VM can keep in its guest.
pub fn offered_exits(vm: &impl CheckExtension) -> DisabledExits {
    let answer = vm.check_extension(kvm::KVM_CAP_X86_DISABLE_EXITS);
    DisabledExits(u32::try_from(answer).unwrap_or(0))
}

/// `KVM_CAP_X86_DISABLE_EXITS`: keeps `exits` in the guest from now on, those kept already too; before
/// the first vCPU. Nothing is asked of KVM for none.
///
/// # Errors
/// [`KernelHaltError`].
pub fn disable_exits(
    vm: &(impl CheckExtension + EnableCapability),
    exits: DisabledExits,
) -> Result<(), KernelHaltError> {
    if exits.is_none() {
        return Ok(());
    }
    let offered = offered_exits(vm);
    let missing = exits.without(offered);
    if !missing.is_none() {
        return Err(KernelHaltError::ExitsNotOffered { missing, offered });
    }
    let args = [exits.0.into(), 0, 0, 0];
    vm.enable_capability(kvm::KVM_CAP_X86_DISABLE_EXITS, args)
        .map_err(|errno| KernelHaltError::DisableExits { exits, errno })
}

/// `KVM_CAP_HALT_POLL`: how long KVM polls a halted vCPU of this VM at most before it sleeps; zero is not
/// at all. At any time.
///
/// # Errors
/// [`KernelHaltError`].
pub fn set_halt_poll(
    vm: &(impl CheckExtension + EnableCapability),
    longest: Duration,
) -> Result<(), KernelHaltError> {
    let asked = longest;
    if vm.check_extension(kvm::KVM_CAP_HALT_POLL) <= 0 {
        return Err(KernelHaltError::NoHaltPoll);
    }
    let nanos = u32::try_from(longest.as_nanos())
        .map_err(|_| KernelHaltError::HaltPollTooLong { asked })?;
    vm.enable_capability(kvm::KVM_CAP_HALT_POLL, [nanos.into(), 0, 0, 0])
        .map_err(|errno| KernelHaltError::HaltPoll { asked, errno })
}
