// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which MSRs a guest may touch, and which of its accesses come to user space
//! (`KVM_X86_SET_MSR_FILTER`, `KVM_CAP_X86_USER_SPACE_MSR`: Documentation/virt/kvm/api.rst).
//!
//! An access that the filter denies is a general protection fault in the guest, or an exit
//! ([`Exit::X86Rdmsr`](crate::Exit::X86Rdmsr), [`Exit::X86Wrmsr`](crate::Exit::X86Wrmsr)) where
//! [`MsrExits::filtered`] asks for that. The x2APIC's MSRs, 0x800 to 0x8ff, are never filtered.
//!
//! ```
//! use kvm_core::arch::x86_64::msr_filter::{Direction, MsrAccess, MsrFilter, MsrRange};
//!
//! // The guest may read its platform information and not change it.
//! let mut range = MsrRange::new(MsrAccess::Write, 0xce, 1)?;
//! range.allow(0xce, false);
//! let filter = MsrFilter::allowing().with(range)?;
//! assert!(filter.allows(0xce, Direction::Read) && !filter.allows(0xce, Direction::Write));
//! # Ok::<(), kvm_core::arch::x86_64::msr_filter::MsrFilterError>(())
//! ```

use std::ops::Range;

use kvm_bindings as kvm;
use vmm_sys_util::errno::Error as Errno;

/// Ranges of a filter at most.
pub const MAX_RANGES: usize = kvm::KVM_MSR_FILTER_MAX_RANGES as usize;
/// MSRs of a range at most: what fits into the longest bitmap that KVM takes.
pub const MAX_RANGE_MSRS: u32 = kvm::KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8;
/// The x2APIC's MSRs, which no filter touches.
const X2APIC: Range<u32> = 0x800..0x900;

/// Which way an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// RDMSR.
    Read,
    /// WRMSR.
    Write,
}

/// The accesses that a range speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MsrAccess {
    /// RDMSR alone.
    Read,
    /// WRMSR alone.
    Write,
    /// Both.
    Both,
}

impl MsrAccess {
    /// `KVM_MSR_FILTER_…`.
    #[must_use]
    pub const fn flags(self) -> u32 {
        match self {
            Self::Read => kvm::KVM_MSR_FILTER_READ,
            Self::Write => kvm::KVM_MSR_FILTER_WRITE,
            Self::Both => kvm::KVM_MSR_FILTER_READ | kvm::KVM_MSR_FILTER_WRITE,
        }
    }

    /// From `KVM_MSR_FILTER_…`; `None` of what KVM refuses: none, or unknown ones.
    #[must_use]
    pub const fn from_flags(flags: u32) -> Option<Self> {
        const BOTH: u32 = kvm::KVM_MSR_FILTER_READ | kvm::KVM_MSR_FILTER_WRITE;
        match flags {
            kvm::KVM_MSR_FILTER_READ => Some(Self::Read),
            kvm::KVM_MSR_FILTER_WRITE => Some(Self::Write),
            BOTH => Some(Self::Both),
            _ => None,
        }
    }

    const fn is_about(self, direction: Direction) -> bool {
        match direction {
            Direction::Read => !matches!(self, Self::Write),
            Direction::Write => !matches!(self, Self::Read),
        }
    }
}

/// Why there is no such filter: KVM would say `EINVAL`, or do something else than is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MsrFilterError {
    /// Flags of the whole filter.
    #[error("MSR filter flags {0:#x}: 0 (allow by default) or 1 (deny by default)")]
    Flags(u32),
    /// A filter that denies everything cannot be: KVM takes it for a mistake.
    #[error(
        "an MSR filter that denies by default has a range that allows something, or KVM refuses it"
    )]
    DeniesAll,
    /// More ranges than KVM has room for.
    #[error("an MSR filter has at most {MAX_RANGES} ranges")]
    TooManyRanges,
    /// Flags of a range.
    #[error("MSR range at {base:#x}: flags {flags:#x}, and 1 (reads), 2 (writes) or 3 are there")]
    RangeFlags {
        /// Its first MSR.
        base: u32,
        /// The flags.
        flags: u32,
    },
    /// A range without an MSR, or with more than its bitmap may have bits.
    #[error("MSR range at {base:#x} of {count} MSRs: 1 to {MAX_RANGE_MSRS}")]
    RangeLength {
        /// Its first MSR.
        base: u32,
        /// How many.
        count: u32,
    },
    /// A range to or over the end of the numbers. KVM takes it, and it matches nothing.
    #[error(
        "MSR range at {base:#x} of {count} MSRs: it would pass 0xfffffffe, and KVM match none of it"
    )]
    RangeEnd {
        /// Its first MSR.
        base: u32,
        /// How many.
        count: u32,
    },
}

/// A run of MSRs, each allowed or denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrRange {
    access: MsrAccess,
    base: u32,
    count: u32,
    /// Whole longs, as KVM reads them.
    bitmap: Vec<u64>,
}

impl MsrRange {
    /// `count` MSRs from `base` on, all allowed.
    ///
    /// # Errors
    /// [`MsrFilterError::RangeLength`], [`MsrFilterError::RangeEnd`].
    pub fn new(access: MsrAccess, base: u32, count: u32) -> Result<Self, MsrFilterError> {
        if count == 0 || count > MAX_RANGE_MSRS {
            return Err(MsrFilterError::RangeLength { base, count });
        }
        if base.checked_add(count).is_none() {
            return Err(MsrFilterError::RangeEnd { base, count });
        }
        Ok(Self {
            access,
            base,
            count,
            bitmap: vec![u64::MAX; count.div_ceil(u64::BITS) as usize],
        })
    }

    /// Allows or denies an MSR of the range; of one that is not in it nothing changes, and `false` is
    /// returned.
    pub fn allow(&mut self, index: u32, allowed: bool) -> bool {
        let Some((word, bit)) = self.position(index) else {
            return false;
        };
        let word = &mut self.bitmap[word];
        *word = if allowed { *word | bit } else { *word & !bit };
        true
    }

    /// Denies all of it.
    #[must_use]
    pub fn denied(mut self) -> Self {
        self.bitmap.fill(0);
        self
    }

    /// The accesses that it speaks of.
    #[must_use]
    pub const fn access(&self) -> MsrAccess {
        self.access
    }

    /// Its MSRs.
    #[must_use]
    pub const fn msrs(&self) -> Range<u32> {
        // `new` has seen that the end is one.
        self.base..self.base + self.count
    }

    /// Its bitmap: bit `i` of the whole is the MSR `base + i`, set where it is allowed.
    #[must_use]
    pub fn bitmap(&self) -> &[u64] {
        &self.bitmap
    }

    fn position(&self, index: u32) -> Option<(usize, u64)> {
        let at = index.checked_sub(self.base).filter(|at| *at < self.count)?;
        Some(((at / u64::BITS) as usize, 1 << (at % u64::BITS)))
    }

    fn allows(&self, index: u32) -> Option<bool> {
        let (word, bit) = self.position(index)?;
        Some(self.bitmap.get(word)? & bit != 0)
    }
}

/// Which MSRs a guest may read and write. The first range that has an MSR decides, and where there is
/// none the default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrFilter {
    denies: bool,
    ranges: Vec<MsrRange>,
}

impl MsrFilter {
    /// Everything is allowed that no range denies. Without a range it is the filter of a new VM.
    #[must_use]
    pub const fn allowing() -> Self {
        Self {
            denies: false,
            ranges: Vec::new(),
        }
    }

    /// Everything is denied that `first` and the ranges after it do not allow.
    #[must_use]
    pub fn denying(first: MsrRange) -> Self {
        Self {
            denies: true,
            ranges: vec![first],
        }
    }

    /// With one range more, which is asked after those that are there.
    ///
    /// # Errors
    /// [`MsrFilterError::TooManyRanges`].
    pub fn with(mut self, range: MsrRange) -> Result<Self, MsrFilterError> {
        if self.ranges.len() == MAX_RANGES {
            return Err(MsrFilterError::TooManyRanges);
        }
        self.ranges.push(range);
        Ok(self)
    }

    /// Whether it denies what no range speaks of.
    #[must_use]
    pub const fn denies_by_default(&self) -> bool {
        self.denies
    }

    /// Its ranges, in the order in which they are asked.
    #[must_use]
    pub fn ranges(&self) -> &[MsrRange] {
        &self.ranges
    }

    /// KVM's verdict on an access (`kvm_msr_allowed`).
    #[must_use]
    pub fn allows(&self, index: u32, direction: Direction) -> bool {
        if X2APIC.contains(&index) {
            return true;
        }
        let mut about = self
            .ranges
            .iter()
            .filter(|range| range.access.is_about(direction));
        let found = about.find_map(|range| range.allows(index));
        found.unwrap_or(!self.denies)
    }

    /// `kvm_msr_filter.flags`.
    #[must_use]
    pub const fn flags(&self) -> u32 {
        if self.denies {
            kvm::KVM_MSR_FILTER_DEFAULT_DENY
        } else {
            kvm::KVM_MSR_FILTER_DEFAULT_ALLOW
        }
    }

    /// A filter from the numbers of a `kvm_msr_filter`, by KVM's own rules: flags, and of each range that is
    /// not empty flags, first MSR, count and bitmap. A bitmap that is shorter than its count denies the rest.
    ///
    /// # Errors
    /// [`MsrFilterError`]: all that KVM refuses, and [`MsrFilterError::RangeEnd`], which it takes.
    pub fn from_raw<'a>(
        flags: u32,
        ranges: impl IntoIterator<Item = (u32, u32, u32, &'a [u64])>,
    ) -> Result<Self, MsrFilterError> {
        let denies = match flags {
            kvm::KVM_MSR_FILTER_DEFAULT_ALLOW => false,
            kvm::KVM_MSR_FILTER_DEFAULT_DENY => true,
            _ => return Err(MsrFilterError::Flags(flags)),
        };
        let mut filter = Self {
            denies,
            ranges: Vec::new(),
        };
        for (flags, base, count, bits) in ranges {
            if count == 0 {
                continue;
            }
            let access =
                MsrAccess::from_flags(flags).ok_or(MsrFilterError::RangeFlags { base, flags })?;
            let mut range = MsrRange::new(access, base, count)?.denied();
            for (word, bits) in range.bitmap.iter_mut().zip(bits) {
                *word = *bits;
            }
            filter = filter.with(range)?;
        }
        if denies && filter.ranges.is_empty() {
            return Err(MsrFilterError::DeniesAll);
        }
        Ok(filter)
    }
}

/// Which MSR accesses come to user space instead of being a general protection fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsrExits {
    /// Of an MSR that KVM does not know.
    pub unknown: bool,
    /// Of an MSR that KVM knows, with a value or in a state that it refuses.
    pub invalid: bool,
    /// Of an MSR that the filter denies.
    pub filtered: bool,
}

impl MsrExits {
    /// `KVM_MSR_EXIT_REASON_…` together: the argument of `KVM_CAP_X86_USER_SPACE_MSR`.
    #[must_use]
    pub const fn mask(self) -> u32 {
        let mut mask = 0;
        if self.unknown {
            mask |= kvm::KVM_MSR_EXIT_REASON_UNKNOWN;
        }
        if self.invalid {
            mask |= kvm::KVM_MSR_EXIT_REASON_INVAL;
        }
        if self.filtered {
            mask |= kvm::KVM_MSR_EXIT_REASON_FILTER;
        }
        mask
    }
}

/// `KVM_X86_SET_MSR_FILTER`, and the capability that decides what its denials become.
pub trait FilterMsrs {
    /// Replaces the VM's filter.
    ///
    /// # Errors
    /// The errno of the ioctl; the filter is what it was.
    fn set_msr_filter(&self, filter: &MsrFilter) -> Result<(), Errno>;

    /// `KVM_ENABLE_CAP` of `KVM_CAP_X86_USER_SPACE_MSR`.
    ///
    /// # Errors
    /// The errno of the ioctl; nothing changes.
    fn exit_on_msrs(&self, exits: MsrExits) -> Result<(), Errno>;
}
