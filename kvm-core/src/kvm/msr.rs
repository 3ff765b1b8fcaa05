// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! MSRs of a VM and of the host: the filter, exits to user space, feature MSRs.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, Msrs, kvm_enable_cap, kvm_msr_entry, kvm_msr_filter,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno::Error as Errno;

use super::system::Kvm;
use super::vm::{Error, Vm, VmSetup};
use crate::arch::x86_64::msr_features::{GetMsrFeatures, MsrFeatures};
use crate::arch::x86_64::msr_filter::{FilterMsrs, MsrExits, MsrFilter};

impl FilterMsrs for VmFd {
    fn set_msr_filter(&self, filter: &MsrFilter) -> Result<(), Errno> {
        let mut raw = kvm_msr_filter {
            flags: filter.flags(),
            ..Default::default()
        };
        for (to, range) in raw.ranges.iter_mut().zip(filter.ranges()) {
            let msrs = range.msrs();
            to.flags = range.access().flags();
            (to.base, to.nmsrs) = (msrs.start, msrs.end - msrs.start);
            // KVM only reads it.
            to.bitmap = range.bitmap().as_ptr().cast_mut().cast();
        }
        // SAFETY: KVM reads a bitmap of `nmsrs` bits in whole longs, and each is a `u64` slice of as many
        // words, which `filter` holds for the length of the call. Ranges of no MSRs are not looked at.
        unsafe { self.set_msr_filter_unchecked(&raw) }
    }

    fn exit_on_msrs(&self, exits: MsrExits) -> Result<(), Errno> {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            ..Default::default()
        };
        cap.args[0] = exits.mask().into();
        self.enable_cap(&cap)
    }
}

impl<T: FilterMsrs + ?Sized> FilterMsrs for Arc<T> {
    fn set_msr_filter(&self, filter: &MsrFilter) -> Result<(), Errno> {
        (**self).set_msr_filter(filter)
    }

    fn exit_on_msrs(&self, exits: MsrExits) -> Result<(), Errno> {
        (**self).exit_on_msrs(exits)
    }
}

impl GetMsrFeatures for kvm_ioctls::Kvm {
    fn msr_feature_list(&self) -> Result<Vec<u32>, Errno> {
        Ok(self.get_msr_feature_index_list()?.as_slice().to_vec())
    }

    fn read_msr_features(&self, indices: &[u32]) -> Result<Vec<u64>, Errno> {
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        let entries: Vec<_> = indices.iter().map(entry).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Errno::new(libc::E2BIG))?;
        let read = self.get_msrs(&mut msrs)?;
        Ok(msrs.as_slice().iter().take(read).map(|m| m.data).collect())
    }
}

impl Kvm {
    /// `KVM_GET_MSR_FEATURE_INDEX_LIST` and their values: what of the processor's features MSRs tell.
    ///
    /// # Errors
    /// [`Error::MsrFeatures`].
    pub fn msr_features(&self) -> Result<MsrFeatures, Error> {
        MsrFeatures::read(self.fd()).map_err(|errno| Error::MsrFeatures { errno })
    }
}

impl VmSetup {
    /// Which MSR accesses of the guest come to user space ([`Exit::X86Rdmsr`](crate::Exit::X86Rdmsr),
    /// [`Exit::X86Wrmsr`](crate::Exit::X86Wrmsr)): `KVM_CAP_X86_USER_SPACE_MSR` (Linux 5.10).
    ///
    /// # Errors
    /// [`Error::MsrExits`]; nothing changes.
    pub fn exit_on_msrs(&self, exits: MsrExits) -> Result<(), Error> {
        FilterMsrs::exit_on_msrs(self.fd(), exits).map_err(|errno| Error::MsrExits { errno })
    }

    /// Sets the VM's MSR filter: `KVM_X86_SET_MSR_FILTER` (Linux 5.10).
    ///
    /// # Errors
    /// [`Error::MsrFilter`]; the filter is what it was.
    pub fn set_msr_filter(&self, filter: &MsrFilter) -> Result<(), Error> {
        FilterMsrs::set_msr_filter(self.fd(), filter).map_err(|errno| Error::MsrFilter { errno })
    }
}

impl Vm {
    /// Replaces the VM's MSR filter, while vCPUs run too: an access that begins after the call sees the new
    /// one. Waits until no vCPU uses the old one any more.
    ///
    /// # Errors
    /// [`Error::MsrFilter`]; the filter is what it was.
    pub fn set_msr_filter(&self, filter: &MsrFilter) -> Result<(), Error> {
        FilterMsrs::set_msr_filter(self.fd(), filter).map_err(|errno| Error::MsrFilter { errno })
    }
}
