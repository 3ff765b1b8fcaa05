// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tables that a 64-bit entry needs in guest memory: descriptors and an identity map. Made as
//! bytes; the caller writes them.

use kvm_bindings::kvm_segment;
use vm_memory::GuestAddress;

use super::boot::{code, data, task};

/// Linux's `__BOOT_CS`, `__BOOT_DS` and `__BOOT_TSS`.
pub(super) const BOOT_CODE: u16 = 0x10;
pub(super) const BOOT_DATA: u16 = 0x18;
pub(super) const BOOT_TSS: u16 = 0x20;
/// Bytes of the table: null, unused, code, data, and 16 for the TSS.
pub(super) const GDT_LEN: u16 = 48;

const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;
const GIB: u64 = 1 << 30;
const MIB2: u64 = 2 << 20;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Why there can be no such tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TablesError {
    /// The base is not a page's.
    #[error("boot tables at {:#x}: not on a page boundary", .0.0)]
    Unaligned(GuestAddress),
    /// Nothing, or more than one page directory pointer table can map.
    #[error("an identity map of {0} GiB: 1 to 512 can be mapped")]
    Size(u16),
    /// The tables would reach beyond the address space, or beyond what they map themselves.
    #[error("boot tables of {len:#x} bytes at {:#x} do not lie in the first {gib} GiB that they map", base.0)]
    OutOfReach {
        /// Where.
        base: GuestAddress,
        /// How long.
        len: u64,
        /// What they map.
        gib: u16,
    },
}

/// A place in guest memory for the GDT and the page tables of a 64-bit entry, which maps the first
/// `gib` GiB to themselves in pages of 2 MiB.
///
/// ```text
///   base   ┌──────┐ GDT
///   +4 KiB ├──────┤ PML4 (CR3)
///   +8 KiB ├──────┤ PDPT
///  +12 KiB ├──────┤ one page directory a GiB
///          └──────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongModeTables {
    base: GuestAddress,
    gib: u16,
}

impl LongModeTables {
    /// Tables at `base` (a page boundary) that map the first `gib` GiB.
    ///
    /// # Errors
    /// [`TablesError`].
    pub fn new(base: GuestAddress, gib: u16) -> Result<Self, TablesError> {
        if !base.0.is_multiple_of(PAGE) {
            return Err(TablesError::Unaligned(base));
        }
        if !(1..=512).contains(&gib) {
            return Err(TablesError::Size(gib));
        }
        let tables = Self { base, gib };
        let len = tables.len();
        match base.0.checked_add(len) {
            Some(end) if end <= u64::from(gib) * GIB => Ok(tables),
            _ => Err(TablesError::OutOfReach { base, len, gib }),
        }
    }

    /// Where they lie.
    #[must_use]
    pub const fn base(&self) -> GuestAddress {
        self.base
    }

    /// How many bytes they take: 12 KiB and 4 KiB a GiB.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        (3 + u64::from(self.gib)) * PAGE
    }

    /// Address of the descriptor table.
    #[must_use]
    pub const fn gdt(&self) -> GuestAddress {
        self.base
    }

    /// Address of the top page table.
    #[must_use]
    pub const fn cr3(&self) -> GuestAddress {
        GuestAddress(self.base.0 + PAGE)
    }

    /// The bytes to be written at [`LongModeTables::base`].
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let gib = u64::from(self.gib);
        let mut bytes = Vec::with_capacity((self.len()) as usize);
        bytes.extend_from_slice(&gdt(true));
        bytes.resize(PAGE as usize, 0);

        let pdpt = self.base.0 + 2 * PAGE;
        let first_pd = self.base.0 + 3 * PAGE;
        let table = |entry: &dyn Fn(u64) -> Option<u64>, bytes: &mut Vec<u8>| {
            for i in 0..ENTRIES {
                bytes.extend_from_slice(&entry(i).unwrap_or(0).to_le_bytes());
            }
        };
        table(&|i| (i == 0).then_some(pdpt | PRESENT_WRITABLE), &mut bytes);
        table(
            &|i| (i < gib).then_some((first_pd + i * PAGE) | PRESENT_WRITABLE),
            &mut bytes,
        );
        for g in 0..gib {
            table(
                &|i| Some((g * GIB + i * MIB2) | PRESENT_WRITABLE | LARGE),
                &mut bytes,
            );
        }
        bytes
    }
}

/// The descriptor table: 0x10 code (64-bit if `long`), 0x18 data, 0x20 the TSS; all flat.
#[must_use]
pub fn gdt(long: bool) -> [u8; GDT_LEN as usize] {
    let mut bytes = [0; GDT_LEN as usize];
    let all = [
        (BOOT_CODE, code(long)),
        (BOOT_DATA, data()),
        (BOOT_TSS, task()),
    ];
    for (selector, segment) in all {
        let at = usize::from(selector);
        if let Some(slot) = bytes.get_mut(at..at + 8) {
            slot.copy_from_slice(&descriptor(&segment).to_le_bytes());
        }
    }
    bytes
}

/// A segment as its descriptor (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let (base, limit) = (segment.base & 0xffff_ffff, u64::from(limit & 0xf_ffff));
    let bit = |value: u8, at: u32| u64::from(value & 1) << at;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(segment.type_ & 0xf) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl & 3) << 45
        | bit(segment.present, 47)
        | (limit >> 16) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (base >> 24) << 56
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_linux_boot_protocol() {
        let at = |bytes: &[u8], selector: usize| {
            u64::from_le_bytes(bytes[selector..selector + 8].try_into().unwrap())
        };
        let long = gdt(true);
        assert_eq!(at(&long, 0), 0);
        assert_eq!(at(&long, 0x10), 0x00af_9b00_0000_ffff);
        assert_eq!(at(&long, 0x18), 0x00cf_9300_0000_ffff);
        assert_eq!(at(&long, 0x20), 0x0000_8b00_0000_0067);
        assert_eq!(at(&gdt(false), 0x10), 0x00cf_9b00_0000_ffff);
    }
}
