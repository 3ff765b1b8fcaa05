// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM's clock, saved and restored, and the time between the two.
//!
//! A guest has two clocks that must agree, kvm-clock (the VM's) and the time-stamp counters (each
//! vCPU's). Restored on another host, or after that host started again, both are computed anew:
//!
//! ```text
//!   clock   = the saved one (+ the time since, by the clock on the wall, if it is to be seen)
//!   TSC     = the saved one + what the clock has moved
//!   offset' = offset + (host TSC saved - host TSC now) + what the clock has moved
//! ```
//!
//! The last line keeps differences between vCPUs to the tick and is used where KVM told the host's TSC
//! together with the clock (Linux 5.16, with a stable TSC, and a VM that has its vCPUs), as the kernel's
//! Documentation/virt/kvm/devices/vcpu.rst has it. Elsewhere the value is written, and KVM makes
//! counters equal that are written within a second and differ by less.

#![forbid(unsafe_code)]

use vmm_sys_util::errno::Error as Errno;

use super::VcpuState;
use super::msr::IA32_TSC;
use super::version::StateVersion;

/// All of a VM's that is in KVM and no vCPU's, no slot's and no interrupt controller's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct VmState {
    /// The version of the form that it came in.
    pub version: StateVersion,
    /// kvm-clock.
    pub clock: ClockState,
}

/// A VM's clock at one moment (`struct kvm_clock_data`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "with-serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "with-serde", serde(deny_unknown_fields))]
pub struct ClockState {
    /// kvm-clock, nanoseconds since the VM was made.
    pub nanoseconds: u64,
    /// The host's clock on the wall at that moment, nanoseconds since 1970, UTC. Where KVM does not
    /// tell it (`KVM_CLOCK_REALTIME`), read just after. 0: not known.
    pub realtime: u64,
    /// The host's time-stamp counter at that moment, where KVM tells it (`KVM_CLOCK_HOST_TSC`).
    pub host_tsc: Option<u64>,
    /// All vCPUs see the same clock (`KVM_CLOCK_TSC_STABLE`).
    pub tsc_stable: bool,
}

/// What the guest is to see of the time between saving and restoring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ClockRestore {
    /// Nothing: its clocks go on from where they were.
    #[default]
    AsSaved,
    /// All of it, by the clocks on the wall of both hosts: timers that would have expired do, at once.
    /// For a guest that moves, from a host whose clock is set to one whose clock is set. Of a state that says
    /// no time ([`ClockState::realtime`] 0) it is refused: the guest would age by all the years since 1970.
    Advanced,
}

/// `KVM_GET_CLOCK`, `KVM_SET_CLOCK`.
pub trait AccessClock {
    /// The clock now.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn clock(&self) -> Result<ClockState, Errno>;

    /// Sets the clock to `nanoseconds`, plus what the clock on the wall has moved `since`.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn set_clock(&self, nanoseconds: u64, since: Option<u64>) -> Result<(), Errno>;
}

/// Why a clock was not saved or restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClockError {
    /// [`ClockRestore::Advanced`] of a state that does not say when it was saved. Nothing was changed.
    #[error(
        "the saved clock does not say when it was saved (realtime is 0): it cannot be advanced by the time since, only restored as saved"
    )]
    NoRealtime,
    /// `KVM_GET_CLOCK`, before anything was changed.
    #[error("the VM's clock cannot be read: {0}")]
    Read(Errno),
    /// `KVM_SET_CLOCK`. Nothing was changed.
    #[error("KVM does not take the VM's clock: {0}")]
    Set(Errno),
    /// `KVM_GET_CLOCK`, when the clock was set.
    #[error("the VM's clock is restored and cannot be read again: {0}")]
    ReadAgain(Errno),
}

/// By how much the clock moved between saving and restoring: what the vCPUs' time-stamp counters
/// follow. The default is that of a VM whose clock was not restored: they go on from their values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passage {
    /// Nanoseconds by which the VM's clock is ahead of what was saved.
    pub elapsed: u64,
    /// The host's time-stamp counter when the state was saved, and when its clock was restored.
    pub host_tsc: Option<(u64, u64)>,
}

impl VmState {
    /// Saves what is the VM's. All vCPUs are paused, and theirs is saved before or after, soon.
    ///
    /// # Errors
    /// [`ClockError::Read`].
    pub fn save<V: AccessClock + ?Sized>(vm: &V) -> Result<Self, ClockError> {
        Ok(Self {
            version: StateVersion::CURRENT,
            clock: vm.clock().map_err(ClockError::Read)?,
        })
    }

    /// Restores it, after all vCPUs are made and before any is restored (the [module's doc](super) says
    /// why), and says what they need to follow.
    ///
    /// # Errors
    /// [`ClockError`].
    pub fn restore<V: AccessClock + ?Sized>(
        &self,
        vm: &V,
        how: ClockRestore,
    ) -> Result<Passage, ClockError> {
        let saved = &self.clock;
        if how == ClockRestore::Advanced && saved.realtime == 0 {
            return Err(ClockError::NoRealtime);
        }
        let since = (how == ClockRestore::Advanced).then_some(saved.realtime);
        vm.set_clock(saved.nanoseconds, since)
            .map_err(ClockError::Set)?;
        let now = vm.clock().map_err(ClockError::ReadAgain)?;
        Ok(Passage {
            elapsed: now.nanoseconds.saturating_sub(saved.nanoseconds),
            host_tsc: saved.host_tsc.zip(now.host_tsc),
        })
    }
}

impl Passage {
    /// Ticks of a counter of `khz` in the time that passed.
    pub(super) fn elapsed_cycles(&self, khz: u32) -> u64 {
        (u128::from(self.elapsed) * u128::from(khz) / 1_000_000) as u64
    }

    /// The offset that a vCPU's counter is to have, on a vCPU that has `khz`. None where it is not
    /// known, or where one of the hosts scales the counter: offsets are then not of the host's ticks.
    pub(super) fn offset(&self, state: &VcpuState, khz: u32) -> Option<u64> {
        let (saved, now) = self.host_tsc?;
        let offset = state.tsc_offset?;
        let value = state.msr(IA32_TSC)?;
        // Minutes apart, at most, but for a counter that was scaled.
        let apart = value.wrapping_sub(saved.wrapping_add(offset)) as i64;
        let minutes = u64::from(khz) * 1000 * 600;
        if khz != state.tsc_khz || apart.unsigned_abs() > minutes {
            return None;
        }
        let moved = saved.wrapping_sub(now);
        Some(
            offset
                .wrapping_add(moved)
                .wrapping_add(self.elapsed_cycles(khz)),
        )
    }
}
