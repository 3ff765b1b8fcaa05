// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SetMemoryRegion`] by the host's KVM.

use crate::{Errno, MemoryRegion, SetMemoryRegion};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, VmFd};

impl SetMemoryRegion for VmFd {
    unsafe fn set_memory_region(&self, region: &MemoryRegion) -> Result<(), Errno> {
        let raw = kvm_userspace_memory_region {
            slot: region.id.0,
            flags: region.flags.bits(),
            guest_phys_addr: region.start.0,
            memory_size: region.size,
            userspace_addr: region.host.0 as u64,
        };
        // SAFETY: the caller promises what this asks for.
        unsafe { self.set_user_memory_region(raw) }.map_err(|error| Errno(error.errno()))
    }

    fn max_slots(&self) -> usize {
        usize::try_from(self.check_extension_int(Cap::NrMemslots)).unwrap_or(0)
    }
}
