// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where RAM goes: from address 0 up, around the hole that 32-bit devices need. Pure arithmetic.

use crate::PAGE_SIZE;
use std::ops::Range;
use thiserror::Error;
use vm_memory::GuestAddress;

/// Why there is no layout.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// No memory at all.
    #[error("a guest with 0 bytes of memory")]
    Empty,
    /// The size is not a multiple of [`PAGE_SIZE`].
    #[error("a memory size of {size:#x} bytes is not a multiple of the page size {PAGE_SIZE:#x}")]
    UnalignedSize {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The hole does not begin and end on page boundaries, or ends before it begins.
    #[error("{:#x}..{:#x} is no hole in page-aligned memory", hole.start, hole.end)]
    BadHole {
        /// The hole given.
        hole: Range<u64>,
    },
    /// The memory and the hole together need more than 64 bits of address.
    #[error("{size:#x} bytes of memory around the hole {:#x}..{:#x} end beyond the 64-bit address space", hole.start, hole.end)]
    TooLarge {
        /// The size asked for, in bytes.
        size: u64,
        /// The hole given.
        hole: Range<u64>,
    },
}

/// `size` bytes of RAM from guest address 0 up, leaving `hole` (an address range, for example 3 GiB..4 GiB) free: one
/// range, or two if the memory does not fit below the hole, or one that starts behind a hole at 0. An empty hole is
/// none. Each is an address and a size in bytes; they are in order of address.
///
/// Whether the host's KVM and the guest's CPUs reach that far is theirs to say: here only the 64 bits end it.
///
/// ```
/// use memslots::ram_layout;
/// use vm_memory::GuestAddress;
/// const GIB: u64 = 1 << 30;
/// let ranges = ram_layout(6 * GIB, 3 * GIB..4 * GIB)?;
/// assert_eq!(ranges, [(GuestAddress(0), 3 * GIB), (GuestAddress(4 * GIB), 3 * GIB)]);
/// # Ok::<(), memslots::LayoutError>(())
/// ```
///
/// # Errors
/// [`LayoutError`]: an empty or unaligned size, a hole that is not page-aligned or ends before it begins, a sum beyond
/// the address space.
pub fn ram_layout(size: u64, hole: Range<u64>) -> Result<Vec<(GuestAddress, u64)>, LayoutError> {
    if size == 0 {
        return Err(LayoutError::Empty);
    }
    if !size.is_multiple_of(PAGE_SIZE) {
        return Err(LayoutError::UnalignedSize { size });
    }
    if !hole.start.is_multiple_of(PAGE_SIZE)
        || !hole.end.is_multiple_of(PAGE_SIZE)
        || hole.end < hole.start
    {
        return Err(LayoutError::BadHole { hole });
    }
    if hole.is_empty() {
        return Ok(vec![(GuestAddress(0), size)]);
    }
    let below = size.min(hole.start);
    let above = size - below;
    if hole.end.checked_add(above).is_none() {
        return Err(LayoutError::TooLarge { size, hole });
    }
    let ranges = [(GuestAddress(0), below), (GuestAddress(hole.end), above)];
    Ok(ranges.into_iter().filter(|(_, size)| *size != 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    const GIB: u64 = 1 << 30;
    const HOLE: Range<u64> = 3 * GIB..4 * GIB;

    #[test]
    fn memory_that_fits_below_the_hole_is_one_range() {
        assert_eq!(
            ram_layout(128 << 20, HOLE).unwrap(),
            [(GuestAddress(0), 128 << 20)]
        );
        assert_eq!(
            ram_layout(3 * GIB, HOLE).unwrap(),
            [(GuestAddress(0), 3 * GIB)]
        );
    }

    #[test]
    fn one_page_too_many_goes_above_the_hole() {
        assert_eq!(
            ram_layout(3 * GIB + PAGE_SIZE, HOLE).unwrap(),
            [
                (GuestAddress(0), 3 * GIB),
                (GuestAddress(4 * GIB), PAGE_SIZE)
            ]
        );
    }

    #[test]
    fn an_empty_hole_is_none_and_a_hole_at_zero_shifts_all() {
        assert_eq!(
            ram_layout(4 * GIB, GIB..GIB).unwrap(),
            [(GuestAddress(0), 4 * GIB)]
        );
        assert_eq!(ram_layout(GIB, 0..GIB).unwrap(), [(GuestAddress(GIB), GIB)]);
    }

    #[test]
    fn what_is_no_layout_is_refused_with_its_values() {
        assert_eq!(ram_layout(0, HOLE), Err(LayoutError::Empty));
        assert_eq!(
            ram_layout(4097, HOLE),
            Err(LayoutError::UnalignedSize { size: 4097 })
        );
        let size = !0xfffu64;
        assert_eq!(
            ram_layout(size, HOLE),
            Err(LayoutError::TooLarge { size, hole: HOLE })
        );
        assert!(matches!(
            ram_layout(GIB, 5..4096),
            Err(LayoutError::BadHole { .. })
        ));
        assert!(matches!(
            ram_layout(GIB, 4096..4097),
            Err(LayoutError::BadHole { .. })
        ));
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = 8192..4096;
        assert!(matches!(
            ram_layout(GIB, reversed),
            Err(LayoutError::BadHole { .. })
        ));
    }
}
