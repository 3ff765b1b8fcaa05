// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a KVM guest wrote: dirty bitmaps and rings, runs of pages, transactional harvests, forecasts.
//!
//! Whoever snapshots or migrates a running guest asks one question over and over: which pages have
//! changed since I last looked? Four things make the answer harder than it seems, and this crate
//! owns them:
//!
//! * **There is more than one writer.** KVM logs the guest's writes. What the VMM itself writes (a
//!   virtio device filling a buffer) goes past that log ([`HostWrites`] sees it), and so does what
//!   another process writes (a vhost-user back end: [`SharedSource`]).
//! * **Asking is destructive.** The kernel forgets what it hands out. A [`Harvest`] is a
//!   transaction: commit forgets, anything else puts every bit back.
//! * **The order matters.** A page is watched again *before* its contents are read, or a write in
//!   between is in neither the copy nor the next answer. A harvest exists only after that.
//! * **The kernel is told no length.** `KVM_GET_DIRTY_LOG` writes as much as the slot is large;
//!   the buffer here has the size of the slot's extent and ends at a guard, so that no mistake
//!   overruns it.
//!
//! ```text
//!             ┌─ bitmap ──────── KVM_GET_DIRTY_LOG ─────────────▶ KvmBitmap ───────┐
//!    guest ──▶ KVM ─ manual ──── the same, KVM_CLEAR_DIRTY_LOG ─▶ KvmManualBitmap ─┤
//!             └─ ring ────────── KVM_RESET_DIRTY_RINGS ─────────▶ RingSource ──────┤
//!    devices ──▶ vm-memory ───── mark_dirty ────────────────────▶ HostWrites ──────┼─▶ DirtyLog
//!    vhost, other processes ──── a sealed memfd ────────────────▶ SharedSource ────┤     │
//!    whoever writes here ─────── PAGEMAP_SCAN ──────────────────▶ WrittenPages ────┘     │ harvest
//!                                                                 (tuples, Union)        ▼
//!       DirtyRate, WorkingSet ◀── bits ──────────────── Harvest ──▶ runs of pages ──▶ your copier
//!             │                                            ▲ drop: back   │ commit, forget: gone
//!             ▼                                            └──────────────┘
//!       forecast, AutoConverge, DirtyLimit, advise
//! ```
//!
//! The core ([`DirtyBitmap`], [`Runs`], [`DirtyLog`], [`estimate`]) is plain data in and out and knows no
//! ioctl; a [`DirtySource`] is whatever knows about writes. The `kvm` feature (default) adds the
//! kernel's logs, each behind a trait that a test can fake ([`GetDirtyLog`], [`ClearDirtyLog`],
//! [`ResetRings`], [`ChooseLog`]); `uffd` (default) adds [`WrittenPages`].
//!
//! # Which log
//! Bitmap or ring is an option of the VM, fixed when it is made: [`LogChoice::apply`] in the creation stage
//! of the VMM (kvm-core's `VmSetup::fd`), before the first vCPU; [`LogInForce`] says which sources can be
//! made. The rest, manual protect too, is chosen when tracking starts.
//!
//! | | cost of a look | of starting | for |
//! | --- | --- | --- | --- |
//! | [`KvmBitmap`] | the whole slot under KVM's MMU lock | every page write-protected | small guests, snapshots |
//! | [`KvmManualBitmap`] | a chunk under it at a time, what is handed out alone | with *initially set*: nothing | migrations |
//! | [`DirtyRings`] | what was written, not what there is | every page write-protected | large guests that write little; limits by vCPU |
//! | [`WrittenPages`] | the page tables | 20 ms a GiB | writes that neither KVM nor vm-memory sees |
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
//! let writes = HostWrites::new(1024)?;
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
//! answers for. (The ring and manual protect are younger.)
//!
//! | kvm_host.h | here |
//! | --- | --- |
//! | `kvm_dirty_bitmap_bytes` | [`dirty_bitmap_bytes`] |
//! | `mark_page_dirty` | kernel: sets the bit, or fills a ring's entry, when the guest, or KVM for it, writes a page; user space does the same for its own writes with [`HostWrites`] |
//! | `kvm_get_dirty_log` | kernel: copies a slot's bits out; user space asks with [`GetDirtyLog`] and gets a [`Harvest`] |
//! | `kvm_vm_ioctl_get_dirty_log` | kernel: the architecture's end of the ioctl, which write-protects the pages again; [`KvmBitmap`] calls it, and [`KvmManualBitmap`] does the second half apart |
//!
//! # Concurrency
//! A [`DirtyLog`] has one owner, who harvests. vCPUs run meanwhile; a page written after the
//! harvest is in the next one, so contents are copied after the harvest, never before. Any number
//! of threads mark [`HostWrites`], without locks, and it is turned on and off meanwhile; its module says
//! which orderings make that sound and `tests/loom_host_writes.rs` models them. [`DirtyRings`] is one lock
//! for all rings of a VM: vCPU threads with a full ring, a reaper and harvests take turns, as they do in
//! the kernel; `tests/loom_ring.rs` models the entries. The ioctls block while KVM write-protects pages,
//! with its slot lock and its MMU lock held: for a slot, a chunk, or what the rings told.
//!
//! The last harvest, the one that must be complete, comes after every vCPU has left the guest: some
//! processors keep a log of their own until then.
//!
//! # Threat model
//! The guest chooses which pages are dirty, and so how many runs there are: at most one for two
//! pages; nothing is allocated per run. It fills its rings as fast as it likes; a reap takes one lap of
//! each at most. It cannot make an index leave a bitmap: an entry that names no page of a registered
//! slot is counted ([`DirtyRings::unknown`]) and dropped. A process that shares a log writes what it likes
//! into it; bits that stand for no page are not read, and the log's size is sealed. A wrong extent makes the
//! log useless but not unsound: [`LogBuffer`]'s guard turns the overrun into `EFAULT`.
//!
//! # Save and restore
//! Nothing: a snapshot has been told what is dirty, and a restored guest starts clean. What is pending
//! ([`DirtyLog::into_parts`]) is for whoever goes on with the same memory.
//!
//! # Known limits
//! * Pages of 4 KiB, as KVM counts on x86-64.
//! * What is given back to the host (`MADV_DONTNEED`, a balloon) reads as zeros afterwards and is no write to
//!   anybody: whoever gives back marks it ([`HostWrites`], [`DirtyLog::mark`]).
//! * Devices that were given pages (VFIO) are seen by none of the sources.
//! * `EFAULT` from `KVM_GET_DIRTY_LOG` makes the whole slot dirty, because the kernel clears before it
//!   copies. With this crate's buffer it happens only where the extent is a lie.
//! * x86's ring and bitmap exclude each other. The combination that arm64 has
//!   (`KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP`) is not made use of.
//! * A ring that KVM overran ([`Reaped::overrun`]), or whose reset was interrupted ([`Reaped::suspect`]), makes
//!   pages dirty for good. The lab's `kvm_amd` (Linux 6.12) was seen to do neither; the software
//!   KVM of the development hosts overruns small rings.
//! * The working-set curve and what is built on it know writes, not reads.

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
mod switch;
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
