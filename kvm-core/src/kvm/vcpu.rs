// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU of KVM: its file descriptor, its own mapping of `kvm_run`, and `KVM_RUN`.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::Error as Errno;

use super::mapping::RunMapping;
use super::signal::{KickSignal, ThreadDoorbell};
use crate::identity::VcpuId;
use crate::kick::Doorbell;
use crate::run::RunVcpu;

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
}

impl Vcpu {
    pub(super) fn new(id: VcpuId, fd: VcpuFd, run: Arc<RunMapping>, signal: KickSignal) -> Self {
        let doorbell = Arc::new(ThreadDoorbell::new(run.clone(), signal));
        Self {
            id,
            fd,
            run,
            doorbell,
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
        self.doorbell.attach()
    }

    fn run(&mut self) -> Result<(), Errno> {
        // SAFETY: the fd is a vCPU's and `&mut self` is the only way to its KVM_RUN, so no slice of
        // the exit area is alive: each borrows `self`. What the guest may write is the memory that
        // the consumer gave to the VM.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN as _, 0) };
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
}
