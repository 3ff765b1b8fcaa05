// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KVM_X86_GET_MCE_CAP_SUPPORTED`, `KVM_X86_SETUP_MCE`, `KVM_X86_SET_MCE`.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_x86_mce};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::Error as Errno;

use super::system::Kvm;
use super::vcpu::Vcpu;
use super::vm::Error;
use crate::arch::x86_64::{InjectMachineCheck, MceControls, McgCap};
use crate::capability::CheckExtension;

/// `_IOW(KVMIO, 0x9c, __u64)`.
pub(super) const KVM_X86_SETUP_MCE: u64 = 0x4008_ae9c;
/// `_IOR(KVMIO, 0x9d, __u64)`.
const KVM_X86_GET_MCE_CAP_SUPPORTED: u64 = 0x8008_ae9d;
/// `_IOW(KVMIO, 0x9e, struct kvm_x86_mce)`.
const KVM_X86_SET_MCE: u64 = 0x4040_ae9e;

const IA32_MCG_CAP: u32 = 0x179;
const IA32_MCG_STATUS: u32 = 0x17a;
const IA32_MCG_CTL: u32 = 0x17b;
/// Of bank 0; each has four MSRs.
const IA32_MC0_CTL: u32 = 0x400;
const _: () = assert!(size_of::<kvm_x86_mce>() == 0x40);

fn answered(ret: libc::c_int) -> Result<(), Errno> {
    if ret < 0 {
        Err(Errno::from(io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

impl Kvm {
    /// What of the machine-check architecture this host's KVM can give a guest
    /// (`KVM_X86_GET_MCE_CAP_SUPPORTED`, and the number of banks, which `KVM_CAP_MCE` says).
    ///
    /// # Errors
    /// The errno of the ioctl.
    pub fn machine_check_support(&self) -> Result<McgCap, Errno> {
        let mut cap = 0_u64;
        // SAFETY: the kernel writes one u64 there.
        answered(unsafe {
            libc::ioctl(
                self.fd().as_raw_fd(),
                KVM_X86_GET_MCE_CAP_SUPPORTED as _,
                &raw mut cap,
            )
        })?;
        let banks = u64::try_from(CheckExtension::check_extension(
            self.fd(),
            kvm_bindings::KVM_CAP_MCE,
        ));
        Ok(McgCap(cap & !0xff | banks.unwrap_or(0).min(0xff)))
    }
}

impl InjectMachineCheck for VcpuFd {
    fn setup_mce(&self, mcg_cap: u64) -> Result<(), Errno> {
        // SAFETY: the kernel reads one u64 there.
        answered(unsafe {
            libc::ioctl(self.as_raw_fd(), KVM_X86_SETUP_MCE as _, &raw const mcg_cap)
        })
    }

    fn set_mce(&self, mce: &kvm_x86_mce) -> Result<(), Errno> {
        // SAFETY: the kernel reads one such structure there.
        answered(unsafe {
            libc::ioctl(
                self.as_raw_fd(),
                KVM_X86_SET_MCE as _,
                std::ptr::from_ref(mce),
            )
        })
    }

    fn mce_controls(&self, bank: u8) -> Result<MceControls, Errno> {
        // A bank that there is not ends the list.
        let wanted = [
            IA32_MCG_CAP,
            IA32_MCG_STATUS,
            IA32_MCG_CTL,
            IA32_MC0_CTL + 4 * u32::from(bank),
        ];
        let entries = wanted.map(|index| kvm_msr_entry {
            index,
            ..Default::default()
        });
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Errno::new(libc::ENOMEM))?;
        let read = self.get_msrs(&mut msrs)?;
        let value = |at: usize| match msrs.as_slice().get(at) {
            Some(msr) if at < read => msr.data,
            _ => 0,
        };
        Ok(MceControls {
            cr4: self.get_sregs()?.cr4,
            cap: McgCap(value(0)),
            status: value(1),
            control: value(2),
            bank_control: value(3),
        })
    }
}

impl Vcpu {
    /// `KVM_X86_SETUP_MCE`: gives the vCPU a machine-check architecture; before it runs. Without it a
    /// guest has KVM's default, with banks and no software recovery.
    ///
    /// # Errors
    /// [`Error::VcpuSetup`].
    pub fn set_machine_check_cap(&self, cap: McgCap) -> Result<(), Error> {
        let failed = |errno| Error::VcpuSetup {
            id: self.id(),
            ioctl: "KVM_X86_SETUP_MCE",
            errno,
        };
        self.fd().setup_mce(cap.0).map_err(failed)
    }
}
