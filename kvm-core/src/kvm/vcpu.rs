// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU of KVM: its file descriptor, its own mapping of `kvm_run`, and `KVM_RUN`.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

#[cfg(target_arch = "x86_64")]
use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_sregs};
use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::Error as Errno;

use super::bus_error::Attachment;
use super::mapping::RunMapping;
use super::signal::{KickSignal, ThreadDoorbell};
use super::stats::StatsFd;
#[cfg(target_arch = "x86_64")]
use super::vm::Error;
#[cfg(target_arch = "x86_64")]
use crate::arch::x86_64::{
    BootState, RefusedMsr, RegisterDump, SetMsrs, set_msrs, set_virtual_wire,
};
use crate::identity::VcpuId;
use crate::kick::Doorbell;
use crate::memory_error::BusError;
use crate::run::RunVcpu;
#[cfg(target_arch = "x86_64")]
use crate::run::VcpuView;
use crate::stats::{GetStats, StatsError, StatsReader};

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u64 = 0xae80;

/// A vCPU (`struct kvm_vcpu`). Set up through [`Vcpu::fd`], then enrolled in a
/// [`VcpuSet`](crate::VcpuSet) and run.
///
/// The file descriptor's own `run`, and what else of it needs `&mut`, cannot be reached: its exits
/// would bypass the gate, and its mapping hands out references to the whole of `kvm_run`.
#[derive(Debug)]
pub struct Vcpu {
    id: VcpuId,
    fd: VcpuFd,
    run: Arc<RunMapping>,
    doorbell: Arc<ThreadDoorbell>,
    bus_errors: Attachment,
}

impl Vcpu {
    pub(super) fn new(id: VcpuId, fd: VcpuFd, run: Arc<RunMapping>, signal: KickSignal) -> Self {
        let doorbell = Arc::new(ThreadDoorbell::new(run.clone(), signal));
        Self {
            id,
            fd,
            run,
            doorbell,
            bus_errors: Attachment::default(),
        }
    }

    /// The vCPU's number.
    #[must_use]
    pub const fn id(&self) -> VcpuId {
        self.id
    }

    /// Its file descriptor: registers, CPUID, MSRs, local APIC and the rest.
    #[must_use]
    pub const fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// `kvm_run.request_interrupt_window`: exit with `IrqWindowOpen` once the guest can take an
    /// interrupt. For interrupt controllers in user space.
    pub fn request_interrupt_window(&self, on: bool) {
        self.run.request_interrupt_window(on);
    }

    /// Opens KVM's statistics of the vCPU (`KVM_GET_STATS_FD`), and takes a first sample: before the
    /// vCPU is enrolled. The reader is then sampled from any thread, while the vCPU runs.
    ///
    /// # Errors
    /// [`StatsError`]; [`StatsError::Unsupported`] where
    /// [`Capabilities::binary_stats`](crate::Capabilities::binary_stats) says no.
    pub fn stats(&self) -> Result<StatsReader<StatsFd>, StatsError> {
        StatsReader::open(self)
    }
}

impl GetStats for Vcpu {
    type File = StatsFd;

    fn get_stats_fd(&self) -> Result<StatsFd, Errno> {
        // The mapping is one of the vCPU's file, which holds the VM.
        StatsFd::open(&self.fd, self.run.clone())
    }
}

impl RunVcpu for Vcpu {
    type Fd = VcpuFd;

    fn id(&self) -> VcpuId {
        self.id
    }

    fn doorbell(&self) -> Arc<dyn Doorbell> {
        self.doorbell.clone()
    }

    fn attach(&mut self) -> Result<(), Errno> {
        self.doorbell.attach()?;
        self.bus_errors.attach()
    }

    fn run(&mut self) -> Result<(), Errno> {
        // The argument must be 0 in its whole width (KVM says EINVAL otherwise), so its type is given.
        // SAFETY: the fd is a vCPU's and `&mut self` is the only way to its KVM_RUN, so no slice of
        // the exit area is alive: each borrows `self`. What the guest may write is the memory that
        // the consumer gave to the VM.
        let ret = self.bus_errors.in_kvm_run(|| unsafe {
            libc::ioctl(self.fd.as_raw_fd(), KVM_RUN as _, 0 as libc::c_ulong)
        });
        if ret < 0 {
            Err(Errno::from(io::Error::last_os_error()))
        } else {
            Ok(())
        }
    }

    fn exit_area(&mut self) -> (&mut [u8], &VcpuFd) {
        // SAFETY: the slice borrows `self` exclusively, and `KVM_RUN` of this vCPU and every other
        // slice need `&mut self` as well.
        (unsafe { self.run.exit_area() }, &self.fd)
    }

    fn kvmclock_ctrl(&mut self) -> Result<(), Errno> {
        self.fd.kvmclock_ctrl()
    }

    fn nmi(&mut self) -> Result<(), Errno> {
        self.fd.nmi()
    }

    fn waits_for_init(&mut self) -> bool {
        // x86's name for it; other architectures have a state `STOPPED` and say no `EAGAIN` in it.
        let waits = |state: kvm_mp_state| state.mp_state == KVM_MP_STATE_UNINITIALIZED;
        self.fd.get_mp_state().is_ok_and(waits)
    }

    fn take_bus_error(&mut self) -> Option<BusError> {
        self.bus_errors.take()
    }

    fn detach(&mut self) {
        self.bus_errors.detach();
    }
}

/// Setting up, with errors that say which vCPU and which ioctl.
#[cfg(target_arch = "x86_64")]
impl Vcpu {
    pub(super) fn failed(&self, ioctl: &'static str) -> impl FnOnce(Errno) -> Error {
        failed(self.id, ioctl)
    }

    /// `KVM_SET_CPUID2`; see [`CpuidPlan`](crate::arch::x86_64::CpuidPlan).
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), Error> {
        self.fd
            .set_cpuid2(cpuid)
            .map_err(self.failed("KVM_SET_CPUID2"))
    }

    /// `KVM_GET_SREGS`: before the first run, the system registers of a vCPU at its reset.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn sregs(&self) -> Result<kvm_sregs, Error> {
        self.fd.get_sregs().map_err(self.failed("KVM_GET_SREGS"))
    }

    /// Sets the registers to start with: `KVM_SET_SREGS`, `KVM_SET_REGS`.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`]; the system registers may be set by then.
    pub fn set_boot_state(&self, state: &BootState) -> Result<(), Error> {
        self.fd
            .set_sregs(&state.sregs)
            .map_err(self.failed("KVM_SET_SREGS"))?;
        self.fd
            .set_regs(&state.regs)
            .map_err(self.failed("KVM_SET_REGS"))
    }

    /// `KVM_SET_MSRS`, of all that the host takes; those that it refused are returned.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<Vec<RefusedMsr>, Error> {
        set_msrs(&self.fd, msrs).map_err(self.failed("KVM_SET_MSRS"))
    }

    /// Wires the local APIC's pins as firmware does ([`set_virtual_wire`]): `KVM_GET_LAPIC`,
    /// `KVM_SET_LAPIC`. Needs an interrupt controller in the kernel.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn wire_local_pins(&self) -> Result<(), Error> {
        let mut lapic = self.fd.get_lapic().map_err(self.failed("KVM_GET_LAPIC"))?;
        set_virtual_wire(&mut lapic);
        self.fd
            .set_lapic(&lapic)
            .map_err(self.failed("KVM_SET_LAPIC"))
    }

    /// Its registers, to be shown.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn registers(&self) -> Result<RegisterDump, Error> {
        registers(self.id, &self.fd)
    }
}

#[cfg(target_arch = "x86_64")]
impl VcpuView<'_, VcpuFd> {
    /// The vCPU's registers, to be shown. In an access exit they are those before the access.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn registers(&self) -> Result<RegisterDump, Error> {
        registers(self.id(), self.fd())
    }
}

#[cfg(target_arch = "x86_64")]
fn registers(id: VcpuId, fd: &VcpuFd) -> Result<RegisterDump, Error> {
    Ok(RegisterDump {
        regs: fd.get_regs().map_err(failed(id, "KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(failed(id, "KVM_GET_SREGS"))?,
    })
}

#[cfg(target_arch = "x86_64")]
pub(super) fn failed(id: VcpuId, ioctl: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::VcpuSetup { id, ioctl, errno }
}

#[cfg(target_arch = "x86_64")]
impl SetMsrs for VcpuFd {
    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<usize, Errno> {
        let msrs = Msrs::from_entries(msrs).map_err(|_| Errno::new(libc::E2BIG))?;
        VcpuFd::set_msrs(self, &msrs)
    }
}
