// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`Layout`]: what guest memory should be, as a value; and [`ram_layout`], where RAM goes: from address 0 up, around
//! the hole that 32-bit devices need.

use crate::guest_memfd::Binding;
use crate::{Backing, GuestMemfd, PAGE_SIZE, SlotFlags};
use std::ops::Range;
use std::sync::Arc;
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

/// A slot to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSlot {
    /// Its first guest physical address.
    pub start: GuestAddress,
    /// Its memory, and so its size.
    pub backing: Backing,
    /// Its flags.
    pub flags: SlotFlags,
}

impl NewSlot {
    /// The same with a name, by which a later [`Layout`] means the same memory wherever it then lies.
    pub fn named(self, name: impl Into<Arc<str>>) -> LayoutSlot {
        LayoutSlot::from(self).named(name)
    }

    /// The same with private memory: the part of `file` from byte `offset` on, as long as the slot.
    pub fn with_guest_memfd(self, file: &GuestMemfd, offset: u64) -> LayoutSlot {
        LayoutSlot::from(self).with_guest_memfd(file, offset)
    }
}

/// A slot of a [`Layout`]: what is to be made, and how memory that is there already is known to be it.
///
/// Memory is the same if it has the same [`Backing`] (and the same part of the same [`GuestMemfd`]) and either the same
/// name, wherever it lies, or the same place, if at most one of the two has a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutSlot {
    /// What is to be made.
    pub slot: NewSlot,
    pub(crate) name: Option<Arc<str>>,
    pub(crate) guest_memfd: Option<Binding>,
}

impl LayoutSlot {
    /// The same with a name.
    #[must_use]
    pub fn named(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The same with private memory: the part of `file` from byte `offset` on, as long as the slot. KVM takes neither
    /// flag for such a slot, and never changes it: a [`Plan`](crate::Plan) that has to deletes it and makes it again.
    ///
    /// For one that cannot be mapped: a slot of one that can has it by its [`Backing::guest_memfd`].
    #[must_use]
    pub fn with_guest_memfd(mut self, file: &GuestMemfd, offset: u64) -> Self {
        let file = file.clone();
        self.guest_memfd = Some(Binding { file, offset });
        self
    }

    /// The name.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The private memory: which file, and from which byte on.
    pub fn guest_memfd(&self) -> Option<(&GuestMemfd, u64)> {
        let binding = self.guest_memfd.as_ref()?;
        Some((&binding.file, binding.offset))
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.slot.backing.size()
    }

    /// The guest physical addresses, cut at the end of the address space.
    pub fn guest_range(&self) -> Range<u64> {
        let start = self.slot.start.0;
        start..start.saturating_add(self.size())
    }

    /// The flags that KVM is given.
    pub(crate) fn flags(&self) -> SlotFlags {
        match self.guest_memfd {
            Some(_) => self.slot.flags | SlotFlags::GUEST_MEMFD,
            None => self.slot.flags,
        }
    }
}

impl From<NewSlot> for LayoutSlot {
    fn from(slot: NewSlot) -> Self {
        Self {
            guest_memfd: slot.backing.guest_memfd_binding(),
            slot,
            name: None,
        }
    }
}

/// What guest memory should be: a value, to be compared with what there is ([`Memslots::plan`](crate::Memslots::plan))
/// or made so ([`Memslots::set_layout`](crate::Memslots::set_layout)). The order of its slots is the order in which
/// their extents come back, and no more.
///
/// ```
/// use memslots::{Backing, Layout, NewSlot, SlotFlags};
/// use vm_memory::GuestAddress;
/// let ram = |start, size| NewSlot {
///     start: GuestAddress(start), backing: Backing::anonymous(size), flags: SlotFlags::NONE,
/// };
/// let mut layout = Layout::new().with(ram(0, 1 << 30)).with(ram(4 << 30, 1 << 30).named("dimm1"));
/// layout.get_mut("dimm1").unwrap().slot.start = GuestAddress(8 << 30); // a move, if it is there
/// assert_eq!(layout.remove("dimm1").unwrap().guest_range().start, 8 << 30);
/// assert_eq!(layout.slots().len(), 1);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout(Vec<LayoutSlot>);

impl Layout {
    /// No memory.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The same and `slot`.
    #[must_use]
    pub fn with(mut self, slot: impl Into<LayoutSlot>) -> Self {
        self.push(slot);
        self
    }

    /// Adds `slot` at the end.
    pub fn push(&mut self, slot: impl Into<LayoutSlot>) {
        self.0.push(slot.into());
    }

    /// Takes out the slot with this name.
    pub fn remove(&mut self, name: &str) -> Option<LayoutSlot> {
        let at = self.0.iter().position(|slot| slot.name() == Some(name))?;
        Some(self.0.remove(at))
    }

    /// The slot with this name.
    pub fn get(&self, name: &str) -> Option<&LayoutSlot> {
        self.0.iter().find(|slot| slot.name() == Some(name))
    }

    /// The slot with this name, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut LayoutSlot> {
        self.0.iter_mut().find(|slot| slot.name() == Some(name))
    }

    /// All slots, in the order in which they were added.
    pub fn slots(&self) -> &[LayoutSlot] {
        &self.0
    }

    /// All slots, to be changed.
    pub fn slots_mut(&mut self) -> &mut [LayoutSlot] {
        &mut self.0
    }
}

impl<S: Into<LayoutSlot>> FromIterator<S> for Layout {
    fn from_iter<I: IntoIterator<Item = S>>(slots: I) -> Self {
        Self(slots.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<LayoutSlot>> Extend<S> for Layout {
    fn extend<I: IntoIterator<Item = S>>(&mut self, slots: I) {
        self.0.extend(slots.into_iter().map(Into::into));
    }
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
