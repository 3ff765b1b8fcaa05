// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM: first in set-up, where other crates add what must come before the first vCPU; then whole.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kvm_bindings::kvm_enable_cap;
#[cfg(target_arch = "x86_64")]
use kvm_ioctls::VcpuFd;
use kvm_ioctls::VmFd;
use vm_memory::GuestAddress;
use vmm_sys_util::errno::Error as Errno;

use super::mapping::RunMapping;
use super::signal::{KickSignal, KickSignalError};
use super::stats::StatsFd;
use super::vcpu::Vcpu;
use crate::capability::Capabilities;
use crate::identity::{Identity, VcpuId};
#[cfg(target_arch = "x86_64")]
use crate::kernel_halt::{DisabledExits, disable_exits};
use crate::kernel_halt::{EnableCapability, KernelHaltError, set_halt_poll};
use crate::stats::{GetStats, StatsError, StatsReader};

/// Why KVM refused something about a VM. Each says which call it was, and the errno.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `KVM_CREATE_VM`.
    #[error("KVM creates no VM: {errno}")]
    CreateVm {
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_GET_SUPPORTED_CPUID`.
    #[error("KVM does not tell the CPUID that it supports: {errno}")]
    SupportedCpuid {
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_GET_MSR_INDEX_LIST`.
    #[error("KVM does not tell the MSRs that it has: {errno}")]
    MsrList {
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_SET_TSS_ADDR`.
    #[error("KVM refuses {:#x} for its three TSS pages (they must lie below 4 GiB): {errno}", address.0)]
    TssAddress {
        /// The address asked for.
        address: GuestAddress,
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_SET_IDENTITY_MAP_ADDR`.
    #[error("KVM refuses {:#x} for its identity map page: {errno}", address.0)]
    IdentityMapAddress {
        /// The address asked for.
        address: GuestAddress,
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_CREATE_VCPU`.
    #[error("KVM creates no vCPU {id}: {errno}{}", match errno.errno() {
        libc::EEXIST => " (the VM has one of this number)",
        libc::EINVAL => " (beyond the host's highest vCPU number, or its limit of vCPUs)",
        _ => "",
    })]
    CreateVcpu {
        /// The number asked for.
        id: VcpuId,
        /// What KVM said.
        errno: Errno,
    },
    /// `mmap` of a vCPU's `kvm_run`.
    #[error("the kvm_run of vCPU {id} cannot be mapped: {errno}")]
    MapRun {
        /// The vCPU.
        id: VcpuId,
        /// What the system said.
        errno: Errno,
    },
    /// `KVM_X86_SET_MSR_FILTER`.
    #[error("KVM refuses the MSR filter: {errno}")]
    MsrFilter {
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_CAP_X86_USER_SPACE_MSR`.
    #[error("KVM does not pass MSR accesses on to user space (Linux 5.10 and later do): {errno}")]
    MsrExits {
        /// What KVM said.
        errno: Errno,
    },
    /// `KVM_GET_MSR_FEATURE_INDEX_LIST` or `KVM_GET_MSRS` of the host.
    #[error("KVM does not tell its feature MSRs: {errno}")]
    MsrFeatures {
        /// What KVM said.
        errno: Errno,
    },
    /// The kick signal.
    #[error(transparent)]
    KickSignal(#[from] KickSignalError),
    /// An ioctl of a vCPU that sets it up.
    #[error("{ioctl} of vCPU {id} failed: {errno}")]
    VcpuSetup {
        /// The vCPU.
        id: VcpuId,
        /// The ioctl's name.
        ioctl: &'static str,
        /// What KVM said.
        errno: Errno,
    },
}

/// A VM before its first vCPU.
///
/// What cannot come later is added here, by this crate's methods or by others through
/// [`VmSetup::fd`]: the kind of interrupt controller, the size of the dirty ring, disabled exits, the
/// TSS pages. And what should come early for speed: memory slots before anything that registers on
/// KVM's I/O buses (an in-kernel irqchip, ioeventfds), or creating them waits for a grace period.
#[derive(Debug)]
pub struct VmSetup {
    fd: Arc<VmFd>,
    name: Option<Arc<str>>,
    kick_signal: Option<KickSignal>,
}

impl VmSetup {
    pub(super) fn new(fd: VmFd) -> Self {
        Self {
            fd: Arc::new(fd),
            name: None,
            kick_signal: None,
        }
    }

    /// The VM's file descriptor, for other crates' contributions.
    #[must_use]
    pub const fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// What this VM can do, which may be less than what the host can.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities<&VmFd> {
        Capabilities::new(&self.fd)
    }

    /// Names the VM, for its log lines. Without it its name is that of its file descriptor.
    #[must_use]
    pub fn named(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Chooses the kick signal. Without it it is `SIGRTMIN`.
    #[must_use]
    pub const fn kick_signal(mut self, signal: KickSignal) -> Self {
        self.kick_signal = Some(signal);
        self
    }

    /// `KVM_SET_TSS_ADDR`: three pages below 4 GiB, in no memory slot and no device, that Intel hosts
    /// need to run real mode. Others ignore it.
    ///
    /// # Errors
    /// [`Error::TssAddress`].
    #[cfg(target_arch = "x86_64")]
    pub fn set_tss_address(&self, address: GuestAddress) -> Result<(), Error> {
        usize::try_from(address.0)
            .map_err(|_| Errno::new(libc::EINVAL))
            .and_then(|offset| self.fd.set_tss_address(offset))
            .map_err(|errno| Error::TssAddress { address, errno })
    }

    /// `KVM_SET_IDENTITY_MAP_ADDR`: one page of the same kind; 0xfffbc000 where it is not set.
    ///
    /// # Errors
    /// [`Error::IdentityMapAddress`].
    #[cfg(target_arch = "x86_64")]
    pub fn set_identity_map_address(&self, address: GuestAddress) -> Result<(), Error> {
        self.fd
            .set_identity_map_address(address.0)
            .map_err(|errno| Error::IdentityMapAddress { address, errno })
    }

    /// `KVM_CAP_X86_DISABLE_EXITS`: keeps these instructions in the guest.
    ///
    /// # Errors
    /// [`KernelHaltError`]; one that the host does not offer is refused before KVM is asked.
    #[cfg(target_arch = "x86_64")]
    pub fn disable_exits(&self, exits: DisabledExits) -> Result<(), KernelHaltError> {
        disable_exits(&*self.fd, exits)
    }

    /// `KVM_CAP_HALT_POLL`: how long KVM polls a halted vCPU of this VM at most before it sleeps.
    ///
    /// # Errors
    /// [`KernelHaltError`].
    pub fn halt_poll(&self, longest: Duration) -> Result<(), KernelHaltError> {
        set_halt_poll(&*self.fd, longest)
    }

    /// Ends the set-up. No system call.
    #[must_use]
    pub fn finish(self) -> Vm {
        let name = self
            .name
            .unwrap_or_else(|| format!("fd{}", self.fd.as_raw_fd()).into());
        let signal = OnceLock::new();
        if let Some(chosen) = self.kick_signal {
            // A new cell takes its first value.
            let _ = signal.set(chosen);
        }
        Vm {
            fd: self.fd,
            identity: Identity::vm(name),
            signal,
            has_vcpu: AtomicBool::new(false),
        }
    }
}

/// A VM (`struct kvm`). It lives for as long as this, its vCPUs, a reader of its statistics or another
/// holder of [`Vm::fd`] does.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    identity: Identity,
    signal: OnceLock<KickSignal>,
    has_vcpu: AtomicBool,
}

impl Vm {
    /// The VM's file descriptor.
    #[must_use]
    pub const fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// Who its log lines are about.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
    }

    /// `KVM_CREATE_VCPU`, and its `kvm_run` mapped. At any time, from any thread, while others run or are
    /// paused: a hot-added vCPU is then enrolled and run as any other. One of a VM with local APICs in the
    /// kernel waits in `KVM_RUN` until the guest starts it with INIT and SIPI.
    ///
    /// Its local APIC, if it has one in the kernel and is not the VM's first, is written back as it is (`KVM_GET_LAPIC`,
    /// `KVM_SET_LAPIC`): KVM puts a vCPU into the map by which it finds an interrupt's destination at the
    /// next change of any APIC, and a guest that has set up its APICs, or was restored with them set up,
    /// changes none. Without it that guest's INIT and SIPI are lost. Who sets the whole APIC state later
    /// does no harm.
    ///
    /// # Errors
    /// [`Error::CreateVcpu`], [`Error::MapRun`], [`Error::KickSignal`], [`Error::VcpuSetup`] of the local
    /// APIC. KVM has no call that removes a vCPU: after a failure behind its creation the number stays taken
    /// in this VM.
    pub fn create_vcpu(&self, id: VcpuId) -> Result<Vcpu, Error> {
        let signal = match self.signal.get() {
            Some(signal) => *signal,
            None => {
                let signal = KickSignal::first_real_time()?;
                *self.signal.get_or_init(|| signal)
            }
        };
        let fd = self
            .fd
            .create_vcpu(u64::from(id.0))
            .map_err(|errno| Error::CreateVcpu { id, errno })?;
        // SAFETY: `fd` is open for as long as this borrow, which ends in this call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let run = RunMapping::new(borrowed, self.fd.run_size())
            .map_err(|errno| Error::MapRun { id, errno })?;
        // Of each but the first, which nobody can look for: whether the VM's other APICs are set up already, by a
        // guest that ran, by a restore or by the consumer through a descriptor, is not known here. KVM has a
        // vCPU in its list before the ioctl that makes it returns, and makes the map anew under a lock of its
        // own. AcqRel: of two that are made at once, whose swap comes second finds the other's vCPU there, and
        // maps both.
        #[cfg(target_arch = "x86_64")]
        if self.has_vcpu.swap(true, Ordering::AcqRel) {
            map_local_apic(id, &fd)?;
        }
        Ok(Vcpu::new(id, fd, Arc::new(run), signal))
    }

    /// Opens KVM's statistics of the VM (`KVM_GET_STATS_FD`), and takes a first sample. At any time.
    ///
    /// # Errors
    /// [`StatsError`]; [`StatsError::Unsupported`] where [`Capabilities::binary_stats`] says no.
    pub fn stats(&self) -> Result<StatsReader<StatsFd>, StatsError> {
        StatsReader::open(self)
    }
}

/// Has KVM find the vCPU by its APIC id from now on ([`Vm::create_vcpu`]).
#[cfg(target_arch = "x86_64")]
fn map_local_apic(id: VcpuId, vcpu: &VcpuFd) -> Result<(), Error> {
    let failed = |ioctl| move |errno| Error::VcpuSetup { id, ioctl, errno };
    match vcpu.get_lapic() {
        Ok(lapic) => vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC")),
        // No local APIC in the kernel.
        Err(errno) if errno.errno() == libc::EINVAL => Ok(()),
        Err(errno) => Err(failed("KVM_GET_LAPIC")(errno)),
    }
}

impl GetStats for Vm {
    type File = StatsFd;

    fn get_stats_fd(&self) -> Result<StatsFd, Errno> {
        StatsFd::open(&self.fd, self.fd.clone())
    }
}

impl EnableCapability for VmFd {
    fn enable_capability(&self, capability: u32, args: [u64; 4]) -> Result<(), Errno> {
        self.enable_cap(&kvm_enable_cap {
            cap: capability,
            args,
            ..Default::default()
        })
    }
}
