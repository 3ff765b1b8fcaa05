// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KVM_PRE_FAULT_MEMORY`, which kvm-ioctls does not have.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use kvm_bindings::kvm_pre_fault_memory;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::Error as Errno;

use super::vcpu::Vcpu;
use crate::pre_fault::{PreFaultError, PreFaultMemory, pre_fault};

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`, of 64 bytes.
const KVM_PRE_FAULT_MEMORY: u64 = 0xc040_aed5;
const _: () = assert!(size_of::<kvm_pre_fault_memory>() == 64);

impl PreFaultMemory for VcpuFd {
    fn pre_fault_memory(&self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
        // SAFETY: KVM reads and writes the 64 bytes of the structure, which is exclusively borrowed, and of guest memory
        // it changes nothing: it maps what is in the VM's slots.
        let done = unsafe { libc::ioctl(self.as_raw_fd(), KVM_PRE_FAULT_MEMORY as _, range) };
        match done {
            0 => Ok(()),
            _ => Err(Errno::from(io::Error::last_os_error())),
        }
    }
}

impl Vcpu {
    /// [`pre_fault`], before the vCPU is enrolled.
    ///
    /// # Errors
    /// [`PreFaultError`]; also where
    /// [`Capabilities::pre_fault_memory`](crate::Capabilities::pre_fault_memory) says no.
    pub fn pre_fault(&self, range: Range<u64>) -> Result<(), PreFaultError> {
        pre_fault(self.fd(), range)
    }
}
