// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The units of guest memory: frame numbers, host addresses, slot ids. Guest physical addresses are vm-memory's
//! [`GuestAddress`].

use std::fmt;
use vm_memory::GuestAddress;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// The granule of every slot, in bytes: the host's base page size, which is 4096 on x86-64 (the header's
/// `kvm_host_page_size` of anonymous memory).
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// A guest frame number: a guest physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(pub u64);

/// A host virtual address, of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hva(pub usize);

/// The number of a slot as KVM's calls take it: the address space in bits 31..16 (0 but for SMM), the id below.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl Gfn {
    /// The frame that `address` lies in (`gpa_to_gfn`).
    pub const fn containing(address: GuestAddress) -> Self {
        Self(address.0 >> PAGE_SHIFT)
    }

    /// The address of the frame's first byte (`gfn_to_gpa`). `None` if no 64-bit address reaches it.
    pub const fn address(self) -> Option<GuestAddress> {
        if self.0 > u64::MAX >> PAGE_SHIFT {
            None
        } else {
            Some(GuestAddress(self.0 << PAGE_SHIFT))
        }
    }
}

impl SlotId {
    /// The address space (`as_id`): 0 is what a vCPU sees outside SMM.
    pub const fn address_space(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The id within its address space.
    pub const fn index(self) -> u16 {
        self.0 as u16
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

impl fmt::Display for Hva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.address_space() == 0 {
            write!(f, "slot {}", self.index())
        } else {
            write!(
                f,
                "slot {} of address space {}",
                self.index(),
                self.address_space()
            )
        }
    }
}
