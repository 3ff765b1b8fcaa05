// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The map of guest physical memory that kernels are told, by whatever protocol: what a PC's BIOS
//! answers to INT 15h, function E820h.

use std::ops::Range;

use vm_memory::GuestAddress;

use crate::arch::layout;

/// What a range of guest physical memory is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM that the guest may use (E820 type 1; PVH and multiboot have the same number).
    Ram = 1,
    /// Something that the guest must leave alone (type 2).
    Reserved = 2,
}

/// A range of guest physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address.
    pub start: GuestAddress,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: MemoryKind,
}

impl MemoryRange {
    fn new(range: Range<u64>, kind: MemoryKind) -> Self {
        MemoryRange {
            start: GuestAddress(range.start),
            len: range.end.saturating_sub(range.start),
            kind,
        }
    }
}

/// The memory map of a machine with this RAM (start and length in bytes, ascending): the RAM
/// without a PC's BIOS areas, the area with the ACPI tables, and the pages that KVM keeps for
/// itself. Ascending, without overlaps.
pub fn memory_map(ram: &[(GuestAddress, u64)]) -> Vec<MemoryRange> {
    use MemoryKind::{Ram, Reserved};
    let low_end = layout::EBDA.start;
    let high_start = layout::HIGH_RAM.0;
    let mut map = Vec::with_capacity(ram.len() + 4);
    for &(start, len) in ram {
        let (start, end) = (start.0, start.0.saturating_add(len));
        if start < low_end {
            map.push(MemoryRange::new(start..end.min(low_end), Ram));
        }
        if end > high_start {
            map.push(MemoryRange::new(start.max(high_start)..end, Ram));
        }
    }
    map.push(MemoryRange::new(layout::EBDA, Reserved));
    map.push(MemoryRange::new(layout::FIRMWARE, Reserved));
    map.push(MemoryRange::new(layout::KVM_PRIVATE, Reserved));
    map.sort_by_key(|range| range.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_across_the_hole_tells_all_its_ram_but_the_bios_areas() {
        let ram = [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 3 << 30)];
        let map = memory_map(&ram);
        let shape: Vec<_> = map
            .iter()
            .map(|r| (r.start.0, r.start.0 + r.len, r.kind))
            .collect();
        use MemoryKind::{Ram, Reserved};
        assert_eq!(
            shape,
            [
                (0, 0x9_fc00, Ram),
                (0x9_fc00, 0xa_0000, Reserved),
                (0xe_0000, 0x10_0000, Reserved),
                (0x10_0000, 0xc000_0000, Ram),
                (0xfffb_c000, 0xfffc_0000, Reserved),
                (0x1_0000_0000, 0x1_c000_0000, Ram),
            ]
        );
    }
}
