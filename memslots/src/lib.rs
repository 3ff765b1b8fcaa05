// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest physical memory of a KVM virtual machine: memory slots, layout, translation, access

mod extent;
mod ids;
mod layout;
mod units;

pub use extent::{ExtentError, SlotExtent};
pub use layout::{LayoutError, ram_layout};
pub use units::{Gfn, Hva, PAGE_SHIFT, PAGE_SIZE, SlotId};
