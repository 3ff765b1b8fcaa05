// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's ring of coalesced writes as mapped memory, and the zones' ioctls.
//!
//! `kvm_ioctls::VcpuFd` has a mapping of the ring too. It makes a `&mut` of memory that the kernel
//! writes at the same time, trusts the index that it finds there, reads entries without an order
//! after `last`, and lets each vCPU consume the VM's one ring on its own. Hence ours: the same page,
//! once a VM, as atomic words, with everything that is done with them in safe code.

use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU32;

use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use vmm_sys_util::errno;

use crate::Error;
use crate::coalesced::RingMemory;
use crate::range::BusKind;
use crate::zone::SetCoalescedZone;

/// The ring of a virtual machine (`struct kvm_coalesced_mmio_ring`), mapped.
///
/// For [`IoBus::attach_coalesced_ring`](crate::IoBus::attach_coalesced_ring). The mapping holds the
/// vCPU's file, and with it KVM's VM, until it is dropped.
#[derive(Debug)]
pub struct MappedRing {
    page: NonNull<AtomicU32>,
    page_size: usize,
}

impl MappedRing {
    /// Maps the ring through any one of the VM's vCPUs; all of them show the same. `vm` must be that
    /// vCPU's: of another VM's, zones' writes would go where nobody looks.
    ///
    /// # Errors
    ///
    /// [`Error::MapRing`]: ENOSYS where KVM lacks `KVM_CAP_COALESCED_MMIO`, otherwise `mmap`'s.
    pub fn new(vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, Error> {
        // The capability's value is the page of the vCPU's mapping at which the ring is.
        let offset = usize::try_from(vm.check_extension_int(Cap::CoalescedMmio)).unwrap_or(0);
        if offset == 0 {
            let source = errno::Error::new(libc::ENOSYS);
            return Err(Error::MapRing { source });
        }
        // SAFETY: takes a number, gives a number.
        let page_size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let size = usize::try_from(page_size).unwrap_or(4096);
        // SAFETY: a new mapping of a vCPU's file at an address that the kernel chooses touches no
        // memory of ours; KVM has said that it has this page.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                (offset * size) as libc::off_t,
            )
        };
        match NonNull::new(address.cast::<AtomicU32>()) {
            Some(page) if address != libc::MAP_FAILED => Ok(Self {
                page,
                page_size: size,
            }),
            _ => Err(Error::MapRing {
                source: errno::Error::last(),
            }),
        }
    }
}

impl RingMemory for MappedRing {
    fn words(&self) -> &[AtomicU32] {
        // SAFETY: a page that is mapped for reading and writing as long as `self` lives, aligned,
        // any contents of which are words. The kernel writes it too, and all our accesses are
        // atomic.
        unsafe {
            std::slice::from_raw_parts(self.page.as_ptr(), self.page_size / size_of::<AtomicU32>())
        }
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // SAFETY: this very mapping, which nothing refers to any more: `words` borrows `self`.
        let result = unsafe { libc::munmap(self.page.as_ptr().cast(), self.page_size) };
        if result != 0 {
            log::error!(
                "the ring of coalesced writes stays mapped: {}",
                errno::Error::last()
            );
        }
    }
}

// SAFETY: a mapping belongs to the process, not to a thread, and is reached through atomics alone.
unsafe impl Send for MappedRing {}
// SAFETY: as above.
unsafe impl Sync for MappedRing {}

impl SetCoalescedZone for VmFd {
    fn can_coalesce(&self, bus: BusKind) -> bool {
        match bus {
            BusKind::Mmio => self.check_extension(Cap::CoalescedMmio),
            BusKind::Pio => self.check_extension(Cap::CoalescedPio),
            BusKind::CcwNotify | BusKind::FastMmio => false,
        }
    }

    fn set_coalesced_zone(
        &self,
        bus: BusKind,
        address: u64,
        size: u32,
        register: bool,
    ) -> Result<(), errno::Error> {
        let at = match bus {
            BusKind::Mmio => IoEventAddress::Mmio(address),
            BusKind::Pio => IoEventAddress::Pio(address),
            BusKind::CcwNotify | BusKind::FastMmio => {
                return Err(errno::Error::new(libc::EINVAL));
            }
        };
        match register {
            true => self.register_coalesced_mmio(at, size),
            false => self.unregister_coalesced_mmio(at, size),
        }
    }
}
