// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest physical memory of a KVM virtual machine: memory slots, layout, translation, access

mod access;
mod classify;
mod extent;
pub mod fake;
mod flags;
mod frames;
mod host;
mod ids;
#[cfg(feature = "kvm")]
mod kvm;
mod layout;
mod mapping;
mod memslots;
mod private;
mod region;
mod slot;
mod table;
mod units;

pub use access::{CheckedMemory, ClearGuest, GuestRam, LoadedMemory};
pub use classify::{
    Change, Limits, MAX_PAGES, MemoryRegion, Refusal, SlotMap, SlotShape, classify,
};
pub use extent::{ExtentError, SlotExtent};
pub use flags::SlotFlags;
pub use frames::{HVA_ERR_BASE, HvaError, PFN_ERR_MASK, PFN_ERR_NOSLOT_MASK, PfnError};
pub use host::{Errno, SetMemoryRegion};
pub use layout::{LayoutError, ram_layout};
pub use mapping::{Backing, HugePages};
pub use memslots::{Error, Memslots, NewSlot};
pub use private::{PrivateRange, PrivateRanges};
pub use region::{Region, SlotBitmap};
pub use slot::{RemoveError, Slot};
pub use srcu::{Grace, Guard, Reader, Snapshot};
pub use table::{SlotTable, Translation};
pub use units::{Gfn, Hva, PAGE_SHIFT, PAGE_SIZE, SlotId};
