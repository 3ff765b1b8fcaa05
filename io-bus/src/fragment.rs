// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How an access is cut up before a bus sees it.
//!
//! A guest's access to MMIO may be wider than a device's register (SSE and AVX moves, `rep movs`
//! batches) and may cross a page. KVM cuts it twice: at a page's end, because the second page may
//! be memory or lie elsewhere (each piece is a `struct kvm_mmio_fragment`), and then into pieces of
//! at most eight bytes, because that is what `kvm_run` carries. The same two cuts are made here, so
//! that a device sees the accesses that it would see behind KVM, whoever produced the access.

use std::ops::Range;

/// The largest piece that reaches a bus, in bytes (`KVM_MMIO_SIZE`).
pub const MMIO_SIZE: usize = 8;

/// The size of the pages that an access is cut at, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// One piece of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Where the piece begins.
    pub address: u64,
    /// Where its bytes begin in the access's data.
    pub offset: usize,
    /// How many bytes it has: 1 to [`MMIO_SIZE`].
    pub len: usize,
}

impl Fragment {
    /// The piece's bytes, as indices into the access's data.
    pub fn bytes(&self) -> Range<usize> {
        self.offset..self.offset + self.len
    }
}

/// Whether an access reaches a bus in one piece.
#[inline]
pub const fn is_whole(address: u64, len: usize) -> bool {
    len <= MMIO_SIZE && (address % PAGE_SIZE) + len as u64 <= PAGE_SIZE
}

/// The pieces of an access of `len` bytes at `address`, in ascending order.
///
/// No piece crosses a page or has more than [`MMIO_SIZE`] bytes; within a page every piece but the
/// last has exactly that many, counted from where the access begins in that page, and not aligned:
/// this is how KVM counts. Addresses wrap at the end of the address space, as the guest's do.
///
/// ```
/// use io_bus::fragments;
///
/// // Sixteen bytes, the first four of them in one page, the others in the next.
/// let pieces: Vec<_> = fragments(0x1ffc, 16).map(|f| (f.address, f.len)).collect();
/// assert_eq!(pieces, [(0x1ffc, 4), (0x2000, 8), (0x2008, 4)]);
/// ```
pub fn fragments(address: u64, len: usize) -> impl Iterator<Item = Fragment> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let rest = len.checked_sub(offset).filter(|rest| *rest > 0)?;
        let at = address.wrapping_add(offset as u64);
        let to_page_end = PAGE_SIZE - at % PAGE_SIZE;
        let len = rest.min(MMIO_SIZE).min(to_page_end as usize);
        let piece = Fragment {
            address: at,
            offset,
            len,
        };
        offset += len;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut(address: u64, len: usize) -> Vec<(u64, usize, usize)> {
        fragments(address, len)
            .map(|f| (f.address, f.offset, f.len))
            .collect()
    }

    /// KVM's two steps, one after the other: pages first, then eight bytes at a time.
    fn two_steps(address: u64, len: usize) -> Vec<(u64, usize, usize)> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < len {
            let page_start = address.wrapping_add(done as u64);
            let in_page = (len - done).min((PAGE_SIZE - page_start % PAGE_SIZE) as usize);
            for piece in (0..in_page).step_by(8) {
                pieces.push((
                    page_start.wrapping_add(piece as u64),
                    done + piece,
                    (in_page - piece).min(8),
                ));
            }
            done += in_page;
        }
        pieces
    }

    #[test]
    fn what_fits_is_left_whole() {
        for len in 1..=8 {
            assert_eq!(cut(0x1003, len), [(0x1003, 0, len)]);
        }
        assert_eq!(cut(0x1000, 0), []);
    }

    #[test]
    fn a_wide_access_goes_in_eights_from_where_it_begins() {
        assert_eq!(
            cut(0x1003, 20),
            [(0x1003, 0, 8), (0x100b, 8, 8), (0x1013, 16, 4)]
        );
    }

    #[test]
    fn a_page_crossing_is_cut_at_the_page() {
        assert_eq!(cut(0x1ffd, 8), [(0x1ffd, 0, 3), (0x2000, 3, 5)]);
        assert_eq!(cut(u64::MAX, 2), [(u64::MAX, 0, 1), (0, 1, 1)]);
    }

    proptest! {
        #[test]
        fn pieces_are_kvms(page in any::<u64>(), near in 0u64..64, len in 0usize..10_000) {
            for address in [page, (page & !0xfff).wrapping_sub(near)] {
                let pieces = cut(address, len);
                prop_assert_eq!(&pieces, &two_steps(address, len));
                if len > 0 {
                    prop_assert_eq!(pieces.len() == 1, is_whole(address, len));
                }
            }
        }
    }
}
