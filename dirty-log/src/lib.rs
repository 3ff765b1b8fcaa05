// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a KVM guest wrote: dirty bitmaps, runs of pages, transactional harvests.
//!
//! Whoever snapshots or migrates a running guest asks one question over and over: which pages have
//! changed since I last looked? Three things make the answer harder than it seems, and this crate
//! owns them:
//!
//! * **There is more than one writer.** KVM logs the guest's writes. What the VMM itself writes (a
//!   virtio device filling a buffer) goes past that log; [`HostWrites`] sees it.
//! * **Asking is destructive.** The kernel forgets what it hands out. A [`Harvest`] is a
//!   transaction: commit forgets, anything else puts every bit back.
//! * **The kernel is told no length.** `KVM_GET_DIRTY_LOG` writes as much as the slot is large;
//!   the buffer here has the size of the slot's extent and ends at a guard, so that no mistake
//!   overruns it.
//!
//! ```text
//!    guest ──▶ KVM ── KVM_GET_DIRTY_LOG ──▶ KvmBitmap ─┐
//!                                                      ├─▶ DirtyLog ──▶ Harvest ──▶ runs of pages
//!    devices ──▶ vm-memory ── mark_dirty ─▶ HostWrites ┘   (pending)      │ commit / forget / drop
//!                                                              ▲──────────┘
//! ```
//!
//! The core ([`DirtyBitmap`], [`Runs`], [`DirtyLog`]) is plain data in and out and knows no ioctl;
//! a [`DirtySource`] is whatever knows about writes. The `kvm` feature (default) adds KVM's bitmap
//! behind the [`GetDirtyLog`] trait.
//!
//! # Example
//! Copying what changed, with a wire that breaks:
//!
//! ```
//! use dirty_log::{DirtyLog, HostWrites};
//! use memslots::{Hva, SlotExtent, SlotId};
//! use vm_memory::{GuestAddress, bitmap::Bitmap};
//!
//! # // A slot that no VM has: its extent is used for its numbers only.
//! # fn extent() -> SlotExtent {
//! #     unsafe { SlotExtent::new(SlotId(0), GuestAddress(0x10_0000), 0x40_0000, Hva(0x7000_0000)) }
//! #         .unwrap()
//! # }
//! let writes = HostWrites::new(1024);
//! let mut log = DirtyLog::new(extent(), writes.clone())?;
//! writes.mark_dirty(0x3000, 0x2000);
//!
//! // The first attempt fails before anything was sent: the harvest is dropped.
//! let harvest = log.harvest()?;
//! assert_eq!(harvest.count(), 2);
//! drop(harvest);
//!
//! // The second one finds the same pages, and forgets them.
//! let harvest = log.harvest()?;
//! let gfns: Vec<_> = harvest.gfns().map(|run| run.start.0..run.end.0).collect();
//! assert_eq!(gfns, [0x103..0x105]);
//! harvest.commit();
//! assert!(log.harvest()?.bitmap().is_clean());
//! # Ok::<(), dirty_log::Error>(())
//! ```
//!
//! `examples/harvest_vm.rs` is a whole VM in a page: a guest writes, a harvest tells where.
//!
//! # Header map
//! What became of the identifiers of Linux's `include/linux/kvm_host.h` (3.17) that this crate
//! answers for.
//!
//! | kvm_host.h | here |
//! | --- | --- |
//! | `kvm_dirty_bitmap_bytes` | [`dirty_bitmap_bytes`] |
//! | `mark_page_dirty` | kernel: sets the bit when the guest, or KVM for it, writes a page; user space does the same for its own writes with [`HostWrites`] |
//! | `kvm_get_dirty_log` | kernel: copies a slot's bits out; user space asks with [`GetDirtyLog`] and gets a [`Harvest`] |
//! | `kvm_vm_ioctl_get_dirty_log` | kernel: the architecture's end of the ioctl, which write-protects the pages again; [`KvmBitmap`] calls it |
//!
//! # Concurrency
//! A [`DirtyLog`] has one owner, who harvests. vCPUs run meanwhile; a page written after the
//! harvest is in the next one, so contents are copied after the harvest, never before. Any number
//! of threads mark [`HostWrites`], without locks; its module says which orderings make that sound
//! and `tests/loom_host_writes.rs` models them. Nothing here blocks but the ioctl itself, which
//! holds KVM's slot lock while it write-protects pages.
//!
//! # Threat model
//! The guest chooses which pages are dirty, and so how many runs there are: at most one for two
//! pages; nothing is allocated per run. It cannot make an index leave a bitmap. A process that
//! shares a log writes what it likes into it ([`DirtyBitmap::merge_words`] ignores bits that stand
//! for no page). A wrong extent makes the log useless but not unsound: [`LogBuffer`]'s guard turns
//! the overrun into `EFAULT`.
//!
//! # Save and restore
//! Nothing: a snapshot has been told what is dirty, and a restored guest starts clean.
//!
//! # Known limits
//! * KVM's plain bitmap only. The dirty ring, manual protect with clearing in chunks, and logs
//!   shared by other processes come with the migration work; [`DirtySource`] is where they fit.
//! * One harvest of a large slot is one ioctl, under KVM's MMU lock for its whole length.
//! * Pages of 4 KiB, as KVM counts on x86-64.
//! * [`HostWrites`] tracks from when it is made: a region that should track by turns needs a new
//!   one, or an `Option` chosen at configuration.
//! * `EFAULT` from the ioctl makes the whole slot dirty, because the kernel clears before it
//!   copies. With this crate's buffer it happens only where the extent is a lie.

#![cfg_attr(not(feature = "kvm"), forbid(unsafe_code))]

mod barrier;
mod bitmap;
mod error;
pub mod estimate;
mod harvest;
mod host_writes;
#[cfg(feature = "kvm")]
mod kvm;
mod layout;
mod ring;
mod runs;
mod shared;
mod source;
mod sync;

pub use bitmap::DirtyBitmap;
pub use error::Error;
pub use harvest::{DirtyLog, Harvest, Parts};
pub use host_writes::{HostWrites, HostWritesSlice};
#[cfg(feature = "kvm")]
pub use kvm::{
    ChooseLog, ClearDirtyLog, GetDirtyLog, KvmBitmap, KvmManualBitmap, LogBuffer, LogChoice,
    LogInForce, MappedRing, SharedLog,
};
#[cfg(feature = "uffd")]
pub use kvm::{PageRegion, ScanPages, Scanned, WrittenPages};
pub use layout::{PAGE_SIZE, dirty_bitmap_bytes};
pub use ring::{
    DirtyRings, Reaped, ResetRings, RingEntry, RingMemory, RingSize, RingSource, SlotKey,
    UnknownEntry,
};
pub use runs::{PageRun, Runs};
pub use shared::{SharedSource, SharedWords};
pub use source::{DirtySource, Union};

/// The README's example, so that it compiles.
#[cfg(all(doctest, feature = "kvm"))]
#[doc = include_str!("../README.md")]
mod readme {}
