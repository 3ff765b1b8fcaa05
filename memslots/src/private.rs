// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest pages that KVM keeps for itself. A slot over one of them is refused by some hosts (EEXIST, at the slot or at
//! whatever comes second) and accepted by others; this policy refuses it everywhere, with the page's name.

use crate::PAGE_SIZE;
use std::ops::Range;
use vm_memory::GuestAddress;

/// A range of guest addresses that KVM uses itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrivateRange {
    /// What it is.
    pub name: &'static str,
    /// Its guest physical addresses.
    pub range: Range<u64>,
}

/// The ranges in which [`Memslots`](crate::Memslots) makes no slot. A policy, for the consumer to set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrivateRanges(Vec<PrivateRange>);

impl PrivateRanges {
    /// No private ranges: let KVM decide.
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// What an x86 VM has if its VMM does the usual: the APIC access page at `0xfee00000`, the identity map at
    /// `0xfffbc000` (KVM's default) and the TSS in the three pages above it (where VMMs put it).
    pub fn x86() -> Self {
        Self::none()
            .with("the APIC access page", GuestAddress(0xfee0_0000), 1)
            .with_identity_map(GuestAddress(0xfffb_c000))
            .with_tss(GuestAddress(0xfffb_d000))
    }

    /// And the page of `KVM_SET_IDENTITY_MAP_ADDR`.
    #[must_use]
    pub fn with_identity_map(self, at: GuestAddress) -> Self {
        self.with("KVM's identity map", at, 1)
    }

    /// And the three pages of `KVM_SET_TSS_ADDR`.
    #[must_use]
    pub fn with_tss(self, at: GuestAddress) -> Self {
        self.with("KVM's TSS", at, 3)
    }

    /// And `pages` pages from `at`, by any name; cut at the end of the address space.
    #[must_use]
    pub fn with(mut self, name: &'static str, at: GuestAddress, pages: u64) -> Self {
        let end = at.0.saturating_add(pages.saturating_mul(PAGE_SIZE));
        self.0.push(PrivateRange {
            name,
            range: at.0..end,
        });
        self
    }

    /// The first private range that has a part of `size` bytes from `start`.
    pub fn overlap(&self, start: GuestAddress, size: u64) -> Option<&PrivateRange> {
        let end = start.0.saturating_add(size);
        self.0
            .iter()
            .find(|private| private.range.start < end && start.0 < private.range.end)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &PrivateRange> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_neighbours_of_a_private_page_are_free() {
        let ranges = PrivateRanges::x86();
        let name = |start, size| {
            ranges
                .overlap(GuestAddress(start), size)
                .map(|private| private.name)
        };
        assert_eq!(name(0xfedf_f000, 0x1000), None);
        assert_eq!(name(0xfedf_f000, 0x2000), Some("the APIC access page"));
        assert_eq!(name(0xfee0_1000, 0x1000), None);
        assert_eq!(name(0xfffb_f000, 0x1000), Some("KVM's TSS"));
        assert_eq!(
            name(0xfffc_0000, 0x4_0000),
            None,
            "the BIOS's usual 256 KiB"
        );
        assert_eq!(
            PrivateRanges::none().overlap(GuestAddress(0), u64::MAX),
            None
        );
    }
}
