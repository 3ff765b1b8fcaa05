// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The answers of a translation that are no translation. The kernel hides them in the high bits of a frame number or
//! of an address; here they are enums, and convert to and from the kernel's encodings for whoever logs or compares.

use crate::PAGE_SIZE;
use thiserror::Error;

/// Any of these bits: an error (`KVM_PFN_ERR_MASK`).
pub const PFN_ERR_MASK: u64 = 0x7ff << 52;
/// Any of these bits: an error, or no slot (`KVM_PFN_ERR_NOSLOT_MASK`).
pub const PFN_ERR_NOSLOT_MASK: u64 = 0xfff << 52;
const PFN_NOSLOT: u64 = 1 << 63;

/// Where the kernel's half of the address space began on x86-64 in the header's time (`PAGE_OFFSET`): the base of
/// error addresses, which no user address reaches.
pub const HVA_ERR_BASE: u64 = 0xffff_8800_0000_0000;

/// Why a guest frame has no host frame.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum PfnError {
    /// No slot has the frame: an access is MMIO (`KVM_PFN_NOSLOT`, `is_noslot_pfn`).
    #[error("no slot has this guest frame")]
    NoSlot,
    /// The host page cannot be had (`KVM_PFN_ERR_FAULT`).
    #[error("the host page cannot be had")]
    Fault,
    /// The host page is poisoned (`KVM_PFN_ERR_HWPOISON`).
    #[error("the host page is poisoned")]
    HwPoison,
    /// A write to a read-only slot (`KVM_PFN_ERR_RO_FAULT`).
    #[error("a write to a read-only slot")]
    ReadOnlyFault,
}

/// Why a guest frame has no host address.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum HvaError {
    /// No slot has the frame (`KVM_HVA_ERR_BAD`).
    #[error("no slot has this guest frame")]
    Bad,
    /// The slot is read-only and the access a write (`KVM_HVA_ERR_RO_BAD`).
    #[error("a write to a read-only slot")]
    ReadOnly,
}

impl PfnError {
    /// The kernel's encoding.
    pub const fn to_raw(self) -> u64 {
        match self {
            Self::NoSlot => PFN_NOSLOT,
            Self::Fault => PFN_ERR_MASK,
            Self::HwPoison => PFN_ERR_MASK + 1,
            Self::ReadOnlyFault => PFN_ERR_MASK + 2,
        }
    }

    /// The error that `raw` encodes; `None` for a frame number, and for error bits of no known meaning.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        const HWPOISON: u64 = PfnError::HwPoison.to_raw();
        const RO_FAULT: u64 = PfnError::ReadOnlyFault.to_raw();
        match raw {
            PFN_NOSLOT => Some(Self::NoSlot),
            PFN_ERR_MASK => Some(Self::Fault),
            HWPOISON => Some(Self::HwPoison),
            RO_FAULT => Some(Self::ReadOnlyFault),
            _ => None,
        }
    }

    /// Whether the raw frame number is an error; a missing slot is none (`is_error_pfn`).
    pub const fn is_error(raw: u64) -> bool {
        raw & PFN_ERR_MASK != 0
    }

    /// Whether the raw frame number is an error or a missing slot (`is_error_noslot_pfn`).
    pub const fn is_error_or_no_slot(raw: u64) -> bool {
        raw & PFN_ERR_NOSLOT_MASK != 0
    }
}

impl HvaError {
    /// The kernel's encoding.
    pub const fn to_raw(self) -> u64 {
        match self {
            Self::Bad => HVA_ERR_BASE,
            Self::ReadOnly => HVA_ERR_BASE + PAGE_SIZE,
        }
    }

    /// The error that `raw` encodes; `None` for a user address, and for kernel addresses of no known meaning.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        const READ_ONLY: u64 = HvaError::ReadOnly.to_raw();
        match raw {
            HVA_ERR_BASE => Some(Self::Bad),
            READ_ONLY => Some(Self::ReadOnly),
            _ => None,
        }
    }

    /// Whether the raw address is an error (`kvm_is_error_hva`).
    pub const fn is_error(raw: u64) -> bool {
        raw >= HVA_ERR_BASE
    }
}

/// A missing host address is a missing or a write-protected host frame.
impl From<HvaError> for PfnError {
    fn from(error: HvaError) -> Self {
        match error {
            HvaError::Bad => Self::NoSlot,
            HvaError::ReadOnly => Self::ReadOnlyFault,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_convert_both_ways_and_no_frame_looks_like_one() {
        for error in [
            PfnError::NoSlot,
            PfnError::Fault,
            PfnError::HwPoison,
            PfnError::ReadOnlyFault,
        ] {
            assert_eq!(PfnError::from_raw(error.to_raw()), Some(error));
            assert!(PfnError::is_error_or_no_slot(error.to_raw()));
            assert_eq!(
                PfnError::is_error(error.to_raw()),
                error != PfnError::NoSlot
            );
        }
        let last_frame = (1 << 52) - 1;
        assert!(!PfnError::is_error_or_no_slot(last_frame));
        assert_eq!(
            (
                PfnError::from_raw(last_frame),
                PfnError::from_raw(PFN_ERR_MASK + 3)
            ),
            (None, None)
        );
        for error in [HvaError::Bad, HvaError::ReadOnly] {
            assert_eq!(HvaError::from_raw(error.to_raw()), Some(error));
            assert!(HvaError::is_error(error.to_raw()));
        }
        assert!(!HvaError::is_error(0x7fff_ffff_f000));
        assert_eq!(PfnError::from(HvaError::ReadOnly), PfnError::ReadOnlyFault);
    }
}
