// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SetMemoryRegion`] by the host's KVM.
//!
//! Slots without a guest_memfd take the older call: every host has it, and for them the newer one does the same. So a
//! host without the newer call lacks guest_memfd slots, and nothing else.

use crate::{Errno, MemoryRegion, SetMemoryRegion};
use kvm_bindings::{
    kvm_create_guest_memfd, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, VmFd};
use std::os::fd::{FromRawFd, OwnedFd};

/// `KVM_CAP_GUEST_MEMFD_FLAGS`, Linux 6.18, which kvm-ioctls does not name yet: the flags that `KVM_CREATE_GUEST_MEMFD`
/// takes.
const CAP_GUEST_MEMFD_FLAGS: std::ffi::c_ulong = 244;
/// `GUEST_MEMFD_FLAG_MMAP` and `GUEST_MEMFD_FLAG_INIT_SHARED`. Of a file with the first alone every touch through a mapping
/// is a SIGBUS.
const MAPPABLE: u64 = 0b11;

impl SetMemoryRegion for VmFd {
    unsafe fn set_memory_region(&self, region: &MemoryRegion) -> Result<(), Errno> {
        let errno = |error: kvm_ioctls::Error| Errno(error.errno());
        let Some(memory) = region.guest_memfd else {
            let raw = kvm_userspace_memory_region {
                slot: region.id.0,
                flags: region.flags.bits(),
                guest_phys_addr: region.start.0,
                memory_size: region.size,
                userspace_addr: region.host.0 as u64,
            };
            // SAFETY: the caller promises what this asks for.
            return unsafe { self.set_user_memory_region(raw) }.map_err(errno);
        };
        let raw = kvm_userspace_memory_region2 {
            slot: region.id.0,
            flags: region.flags.bits(),
            guest_phys_addr: region.start.0,
            memory_size: region.size,
            userspace_addr: region.host.0 as u64,
            guest_memfd_offset: memory.offset,
            guest_memfd: memory.fd as u32,
            ..Default::default()
        };
        // SAFETY: the caller promises what this asks for; of the guest_memfd KVM keeps a reference of its own.
        unsafe { self.set_user_memory_region2(raw) }.map_err(errno)
    }

    fn max_slots(&self) -> usize {
        usize::try_from(self.check_extension_int(Cap::NrMemslots)).unwrap_or(0)
    }

    fn has_guest_memfd(&self) -> bool {
        self.check_extension(Cap::GuestMemfd) && self.check_extension(Cap::UserMemory2)
    }

    fn create_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
        if !SetMemoryRegion::has_guest_memfd(self) {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        create(self, size, 0)
    }

    fn has_mappable_guest_memfd(&self) -> bool {
        // An answer below zero is none.
        let flags = self.check_extension_raw(CAP_GUEST_MEMFD_FLAGS);
        let flags = u64::try_from(flags).unwrap_or(0);
        flags & MAPPABLE == MAPPABLE && SetMemoryRegion::has_guest_memfd(self)
    }

    fn create_mappable_guest_memfd(&self, size: u64) -> Result<OwnedFd, Errno> {
        if !SetMemoryRegion::has_mappable_guest_memfd(self) {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        create(self, size, MAPPABLE)
    }
}

fn create(vm: &VmFd, size: u64, flags: u64) -> Result<OwnedFd, Errno> {
    let request = kvm_create_guest_memfd {
        size,
        flags,
        ..Default::default()
    };
    let fd = vm.create_guest_memfd(request);
    let fd = fd.map_err(|error| Errno(error.errno()))?;
    // SAFETY: just made, and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
