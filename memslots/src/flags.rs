// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The flags of a slot, as KVM's calls take them.

use std::fmt;
use std::ops::{BitOr, BitXor};

/// Flags of a slot (`flags` of `struct kvm_userspace_memory_region`, Documentation/virt/kvm/api.rst 4.35).
///
/// ```
/// use memslots::SlotFlags;
/// let flags = SlotFlags::LOG_DIRTY_PAGES | SlotFlags::READ_ONLY;
/// assert!(flags.contains(SlotFlags::READ_ONLY) && !SlotFlags::NONE.contains(SlotFlags::READ_ONLY));
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct SlotFlags(u32);

impl SlotFlags {
    /// Plain memory.
    pub const NONE: Self = Self(0);
    /// KVM notes which pages the guest writes (`KVM_MEM_LOG_DIRTY_PAGES`).
    pub const LOG_DIRTY_PAGES: Self = Self(1 << 0);
    /// The guest reads; its writes become MMIO exits (`KVM_MEM_READONLY`).
    pub const READ_ONLY: Self = Self(1 << 1);
    /// The slot has private memory of a guest_memfd (`KVM_MEM_GUEST_MEMFD`): for `KVM_SET_USER_MEMORY_REGION2` only, and
    /// together with no other flag. Set for a slot that is asked for
    /// [`with_guest_memfd`](crate::NewSlot::with_guest_memfd).
    pub const GUEST_MEMFD: Self = Self(1 << 2);

    /// From the raw bits, unknown ones included: KVM, and the classifier, refuse those.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The raw bits.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other`'s flags are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These and `other`'s if `on`, these without `other`'s otherwise.
    #[must_use]
    pub const fn with(self, other: Self, on: bool) -> Self {
        if on {
            Self(self.0 | other.0)
        } else {
            Self(self.0 & !other.0)
        }
    }
}

impl BitOr for SlotFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitXor for SlotFlags {
    type Output = Self;

    fn bitxor(self, other: Self) -> Self {
        Self(self.0 ^ other.0)
    }
}

impl fmt::Debug for SlotFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::LOG_DIRTY_PAGES, "LOG_DIRTY_PAGES"),
            (Self::READ_ONLY, "READ_ONLY"),
            (Self::GUEST_MEMFD, "GUEST_MEMFD"),
        ];
        let mut rest = *self;
        let mut separator = "";
        for (flag, name) in names {
            if rest.contains(flag) {
                write!(f, "{separator}{name}")?;
                rest = rest.with(flag, false);
                separator = " | ";
            }
        }
        if rest.0 != 0 || separator.is_empty() {
            write!(f, "{separator}{:#x}", rest.0)?;
        }
        Ok(())
    }
}
