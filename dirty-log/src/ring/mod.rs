// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! KVM's dirty ring: a list of pages for each vCPU, instead of a bitmap for each slot.
//!
//! Each vCPU has a ring of entries that it shares with user space
//! (Documentation/virt/kvm/api.rst, `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`). An entry goes round:
//!
//! ```text
//!             KVM: slot, offset, then flags := DIRTY (release)
//!      ┌───────────────────────────────────────────────────────┐
//!      │                                                       ▼
//!    free (0)                                          DIRTY: user space reads it (acquire),
//!      ▲                                               then flags := RESET (release)
//!      │                                                       │
//!      └───────────────────────────────────────────────────────┘
//!             KVM_RESET_DIRTY_RINGS: the page is watched again, flags := 0
//! ```
//!
//! The page's contents are read after the reset, or a write between the read and the reset would be
//! told to nobody. Entries are taken in their order, none is skipped. A ring that is almost full makes
//! its vCPU leave the guest (`KVM_EXIT_DIRTY_RING_FULL`): whoever gets that exit calls
//! [`DirtyRings::full`], and enters again. So a ring is back-pressure on the guest by itself.
//!
//! `entry.rs` is an entry and one ring's cursor; `reap.rs` all rings of a VM and what they tell of
//! each slot.
//!
//! # Overruns
//! "Almost full" leaves KVM 64 entries of reserve (and 512 where the processor has a log of its own), and
//! it looks whether a ring is so full when it enters the guest. Hardware comes back after each page that
//! was watched. A KVM that *interprets* the guest (the software KVM of the development hosts, Linux 6.18) makes an
//! entry for each write, watched or not, and was seen to make more than a thousand before it looked: it
//! goes on over entries that nobody has taken. Two things give it away, a ring that is taken whole and a
//! reset that counts less than was taken, and then every page counts as dirty ([`Reaped::overrun`]).
//!
//! # Signals during the reset
//! Linux 6.16 and later look for a signal at each entry of the reset, and return when there is one;
//! the entries of the batch that they were gathering are marked free by then, and their pages are
//! *not* watched again: writes to them are lost for good. So the reset runs with this thread's signals
//! blocked (which costs two system calls a reap); they are delivered right behind it.
//! Should entries be left all the same, the reset is made again, and what was harvested counts as dirty
//! in each later harvest ([`Reaped::suspect`]).

#[forbid(unsafe_code)]
mod entry;
#[forbid(unsafe_code)]
mod reap;

#[cfg(feature = "kvm")]
pub(crate) use entry::ENTRY_BYTES;
pub use entry::{RingEntry, RingMemory, RingSize, SlotKey};
pub use reap::{DirtyRings, Reaped, ResetRings, RingSource, UnknownEntry};
