// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which bus, and which addresses on it: [`BusKind`] and [`IoRange`].
//!
//! A range is inclusive at both ends inside, so that the last byte of the address space can belong
//! to one. It carries its own size; nothing else in the crate takes a length beside a range.

use std::fmt;

use vm_device::bus::{MmioRange, PioRange};

use crate::Error;

/// One of the four buses of a virtual machine (`enum kvm_bus`).
///
/// The numbers are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum BusKind {
    /// Guest physical addresses that no memory answers.
    Mmio = 0,
    /// The 65,536 ports of x86.
    Pio = 1,
    /// s390's channel notifications: the address is the subchannel, the data the queue and cookie.
    CcwNotify = 2,
    /// Doorbells in the MMIO space: a write to exactly this address, whatever its length and data.
    ///
    /// KVM looks here before it decodes the instruction; [`Dispatcher::mmio_write`] looks here
    /// before it looks at [`BusKind::Mmio`].
    ///
    /// [`Dispatcher::mmio_write`]: crate::Dispatcher::mmio_write
    FastMmio = 3,
}

impl BusKind {
    /// How many buses there are (`KVM_NR_BUSES`).
    pub const COUNT: usize = 4;

    /// Every bus, in the kernel's order.
    pub const ALL: [BusKind; Self::COUNT] = [
        BusKind::Mmio,
        BusKind::Pio,
        BusKind::CcwNotify,
        BusKind::FastMmio,
    ];

    /// The highest address of this bus.
    pub const fn last_address(self) -> u64 {
        match self {
            BusKind::Pio => u16::MAX as u64,
            BusKind::Mmio | BusKind::CcwNotify | BusKind::FastMmio => u64::MAX,
        }
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// A list of this bus alone.
    #[inline]
    pub(crate) const fn alone(self) -> &'static [BusKind] {
        match self {
            BusKind::Mmio => &[BusKind::Mmio],
            BusKind::Pio => &[BusKind::Pio],
            BusKind::CcwNotify => &[BusKind::CcwNotify],
            BusKind::FastMmio => &[BusKind::FastMmio],
        }
    }
}

impl fmt::Display for BusKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BusKind::Mmio => "MMIO",
            BusKind::Pio => "PIO",
            BusKind::CcwNotify => "CCW-notify",
            BusKind::FastMmio => "fast MMIO",
        })
    }
}

/// The addresses that a device answers on its bus (`struct kvm_io_range` without its device).
///
/// Either `size` bytes from `base`, or [exactly](IoRange::exact) one address for accesses of every
/// length, which is what KVM means by a range of length 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IoRange {
    base: u64,
    last: u64,
    exact: bool,
}

impl IoRange {
    /// `size` bytes from `base`.
    ///
    /// # Errors
    ///
    /// [`Error::EmptyRange`] for a size of 0 (see [`IoRange::exact`] for what KVM means by it), and
    /// [`Error::WrappingRange`] when the range would run past the last address.
    pub fn new(base: u64, size: u64) -> Result<Self, Error> {
        let rest = size.checked_sub(1).ok_or(Error::EmptyRange { base })?;
        let last = base
            .checked_add(rest)
            .ok_or(Error::WrappingRange { base, size })?;
        Ok(Self {
            base,
            last,
            exact: false,
        })
    }

    /// This one address, for accesses of every length that begin at it.
    pub const fn exact(address: u64) -> Self {
        Self {
            base: address,
            last: address,
            exact: true,
        }
    }

    /// A range from what its methods say of it.
    pub(crate) const fn from_parts(base: u64, last: u64, exact: bool) -> Self {
        Self { base, last, exact }
    }

    /// The first address.
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// The last address (inclusive).
    pub const fn last(&self) -> u64 {
        self.last
    }

    /// The number of bytes; 0 for an exact address, as in `struct kvm_io_range`.
    pub const fn size(&self) -> u64 {
        // Cannot overflow: `new` was given the size as a u64.
        if self.exact {
            0
        } else {
            self.last - self.base + 1
        }
    }

    /// Whether this is an exact address, which takes accesses of every length.
    pub const fn is_exact(&self) -> bool {
        self.exact
    }

    /// The same size at another base.
    ///
    /// # Errors
    ///
    /// [`Error::WrappingRange`] when it does not fit there.
    pub fn at(&self, base: u64) -> Result<Self, Error> {
        if self.exact {
            Ok(Self::exact(base))
        } else {
            Self::new(base, self.size())
        }
    }

    /// Whether an access of `len` bytes at `address` is this range's to answer.
    ///
    /// As `kvm_io_bus_cmp` decides it: the access must lie whole inside the range. One that begins
    /// in it and runs past its end is nobody's, and so is one of no bytes.
    #[inline]
    pub const fn holds(&self, address: u64, len: usize) -> bool {
        if len == 0 {
            return false;
        }
        if self.exact {
            return address == self.base;
        }
        match address.checked_add(len as u64 - 1) {
            Some(last) => self.base <= address && last <= self.last,
            None => false,
        }
    }

    /// Whether any address belongs to both.
    pub const fn overlaps(&self, other: &IoRange) -> bool {
        self.base <= other.last && other.base <= self.last
    }
}

impl From<MmioRange> for IoRange {
    fn from(range: MmioRange) -> Self {
        Self {
            base: range.base().0,
            last: range.last().0,
            exact: false,
        }
    }
}

impl From<PioRange> for IoRange {
    fn from(range: PioRange) -> Self {
        Self {
            base: u64::from(range.base().0),
            last: u64::from(range.last().0),
            exact: false,
        }
    }
}

impl fmt::Display for IoRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.exact {
            write!(f, "{:#x} (any length)", self.base)
        } else {
            write!(f, "{:#x}..={:#x}", self.base, self.last)
        }
    }
}

impl fmt::Debug for IoRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoRange({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_device::bus::{MmioAddress, PioAddress};

    #[test]
    fn a_range_may_end_at_the_last_address_and_not_beyond() {
        let top = IoRange::new(u64::MAX - 7, 8).unwrap();
        assert_eq!(top.last(), u64::MAX);
        assert_eq!(top.size(), 8);
        assert!(top.holds(u64::MAX - 7, 8));
        assert!(top.holds(u64::MAX, 1));
        assert!(!top.holds(u64::MAX, 2));
        assert!(IoRange::new(u64::MAX - 6, 8).is_err());
        assert!(IoRange::new(5, 0).is_err());
    }

    #[test]
    fn an_exact_address_takes_every_length_and_no_other_address() {
        let bell = IoRange::exact(0x1000);
        assert_eq!(bell.size(), 0);
        for len in [1, 2, 4, 8, 4096] {
            assert!(bell.holds(0x1000, len));
            assert!(!bell.holds(0x1001, len));
            assert!(!bell.holds(0xfff, len));
        }
        assert!(!bell.holds(0x1000, 0));
        assert_eq!(bell.at(0x2000).unwrap(), IoRange::exact(0x2000));
    }

    #[test]
    fn an_access_that_straddles_either_end_is_not_held() {
        let range = IoRange::new(0x100, 0x10).unwrap();
        assert!(range.holds(0x100, 16));
        assert!(range.holds(0x10f, 1));
        assert!(!range.holds(0x10f, 2));
        assert!(!range.holds(0xff, 2));
        assert!(!range.holds(0x100, 17));
        assert!(!range.holds(0x108, 0));
    }

    #[test]
    fn vm_device_ranges_convert() {
        let mmio = MmioRange::new(MmioAddress(0x1000), 0x20).unwrap();
        assert_eq!(IoRange::from(mmio), IoRange::new(0x1000, 0x20).unwrap());
        let pio = PioRange::new(PioAddress(0xffff), 1).unwrap();
        assert_eq!(IoRange::from(pio), IoRange::new(0xffff, 1).unwrap());
    }
}
