// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest physical memory of a KVM virtual machine: memory slots, layout, translation, access.
//!
//! A slot tells KVM "these guest addresses are that memory of this process". KVM keeps the slots and gives no way to
//! read them back, so a VMM keeps them too: to make legal requests, to find its own way to the guest's memory, and to
//! unmap memory neither too early (the guest, or a thread of ours, would use someone else's) nor never. This crate is
//! that second book, kept in step with KVM's:
//!
//! ```text
//!     Layout ─▶ plan ─▶ apply     create, remove, relocate, set_flags
//!                     └───────┬────────┘
//!                     ┌───────▼────────┐   checked by   ┌───────────────────────────┐
//!  ChangeListener ◀───┤    Memslots    ├───────────────▶│ SlotMap (KVM's rules) and │
//!  (VFIO, vhost-user) │  (one lock)    │                │ PrivateRanges (a policy)  │
//!                     └─┬────────────┬─┘                └───────────────────────────┘
//!       SetMemoryRegion │            │ publishes, through srcu
//!                     ┌─▼──┐   ┌─────▼─────┐  enter    vCPU threads: Reader, no lock
//!                     │KVM │   │ SlotTable ├──────────▶
//!                     └────┘   │ immutable │  load     loaders: a Snapshot, no permissions
//!                              └───────────┘  memory   devices: GuestRam, CheckedMemory
//! ```
//!
//! # Example
//! With KVM, the host is an `Arc<kvm_ioctls::VmFd>` (`examples/own_vm.rs` is a whole VM in a page); here, a fake.
//! ```
//! use memslots::fake::FakeHost;
//! use memslots::{Backing, Gfn, Memslots, NewSlot, SlotFlags, ram_layout};
//! use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
//!
//! let memslots = Memslots::new(FakeHost::new(32_764));
//!
//! // 6 GiB around the hole below 4 GiB: two slots, no page of them touched yet.
//! let ranges = ram_layout(6 << 30, 3 << 30..4 << 30)?;
//! let slots = memslots.create_all(ranges.into_iter().map(|(start, size)| NewSlot {
//!     start,
//!     backing: Backing::anonymous(size),
//!     flags: SlotFlags::NONE,
//! }))?;
//!
//! let ram = memslots.ram(); // a clone for each device
//! ram.memory().write_obj(0x1234u32, GuestAddress(4 << 30))?;
//!
//! let mut reader = memslots.reader(); // one for each vCPU thread
//! let table = reader.enter(); // at an exit
//! let found = table.translate(GuestAddress((4 << 30) + 8)).expect("there is memory");
//! assert_eq!((found.slot, found.writable), (slots[1].extent().id(), true));
//! assert!(!table.is_visible(Gfn::containing(GuestAddress(3 << 30))));
//! drop(table); // before KVM_RUN
//!
//! drop(slots); // a dropped slot is deleted; its memory goes when the last reader has left
//! assert_eq!(memslots.snapshot().regions().len(), 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Layouts and plans
//! A [`Slot`] is for who has one piece of memory and gives it back by dropping it. A [`Layout`] is for who knows what
//! memory should be as a whole: a value, whose slots are known again by name or by place ([`LayoutSlot`]).
//! [`Memslots::plan`] compares it with what there is and gives the fewest calls of KVM in an order that KVM accepts, and
//! for each whether a running vCPU could miss memory ([`Step::gap`]); [`Memslots::apply`] carries that out, takes all of
//! it back if a call fails, and shows readers the whole at once. The two get along: a layout is about the slots that no
//! [`Slot`] owns.
//! ```
//! use memslots::fake::FakeHost;
//! use memslots::{Backing, Layout, Memslots, NewSlot, SlotFlags};
//! use vm_memory::GuestAddress;
//!
//! let memory = |start, size| NewSlot {
//!     start: GuestAddress(start), backing: Backing::anonymous(size), flags: SlotFlags::NONE,
//! };
//! let memslots = Memslots::new(FakeHost::new(32_764));
//! let mut layout = Layout::new().with(memory(0, 1 << 30)).with(memory(4 << 30, 1 << 28).named("dimm0"));
//! memslots.set_layout(&layout)?; // plan and apply in one
//!
//! layout.get_mut("dimm0").expect("just named").slot.start = GuestAddress(8 << 30);
//! let plan = memslots.plan(&layout)?;
//! assert_eq!(plan.steps().len(), 1);
//! assert!(plan.has_gap()); // pause the vCPUs that use it
//! let applied = memslots.apply(plan)?;
//! assert_eq!(applied.extents[1].start(), GuestAddress(8 << 30));
//! # Ok::<(), memslots::Error>(())
//! ```
//! Whoever mirrors guest memory registers a [`ChangeListener`]: it can refuse a change before KVM is asked, and has let
//! go of removed memory before that memory can be unmapped. Its contract has the order of things. A slot can have
//! private memory beside its user mapping ([`NewSlot::with_guest_memfd`], [`Memslots::create_guest_memfd`]) where the
//! host has guest_memfds; where not, that call says so, and everything else is as it was. From Linux 6.18 on a guest_memfd
//! can be all of a slot's memory, mapped here as well ([`Memslots::create_mappable_guest_memfd`], [`Backing::guest_memfd`]).
//!
//! # Header map
//! Where `include/linux/kvm_host.h` (Linux 3.17) went.
//!
//! ## Error frames and error addresses
//! | kvm_host.h | here |
//! | --- | --- |
//! | `KVM_PFN_ERR_MASK` | [`PFN_ERR_MASK`] |
//! | `KVM_PFN_ERR_NOSLOT_MASK` | [`PFN_ERR_NOSLOT_MASK`] |
//! | `KVM_PFN_NOSLOT` | [`PfnError::NoSlot`] |
//! | `KVM_PFN_ERR_FAULT` | [`PfnError::Fault`] |
//! | `KVM_PFN_ERR_HWPOISON` | [`PfnError::HwPoison`] |
//! | `KVM_PFN_ERR_RO_FAULT` | [`PfnError::ReadOnlyFault`] |
//! | `is_error_pfn` | [`PfnError::is_error`] |
//! | `is_error_noslot_pfn` | [`PfnError::is_error_or_no_slot`] |
//! | `is_noslot_pfn` | [`PfnError::from_raw`] gives [`PfnError::NoSlot`] |
//! | `KVM_HVA_ERR_BAD` | [`HvaError::Bad`] |
//! | `KVM_HVA_ERR_RO_BAD` | [`HvaError::ReadOnly`] |
//! | `kvm_is_error_hva` | [`HvaError::is_error`] for a raw address; here a translation is a `Result` |
//! | `KVM_ERR_PTR_BAD_PAGE` | kernel: `struct page` pointers; user space has addresses, and [`HvaError`] |
//! | `is_error_page` | kernel: as `KVM_ERR_PTR_BAD_PAGE` |
//! | `kvm_is_error_gpa` | kernel: a guest-virtual address without translation; user space asks `KVM_TRANSLATE`, whose answer has a `valid` field |
//! | `kvm_is_mmio_pfn` | kernel: whether a host frame is RAM; user space knows what it mapped ([`Backing`]) |
//!
//! ## Slots
//! | kvm_host.h | here |
//! | --- | --- |
//! | `KVM_MEMSLOT_INVALID` | kernel: marks a slot for the moment of its deletion or move; here readers see the table before or after, never between |
//! | `KVM_MEM_MAX_NR_PAGES` | [`MAX_PAGES`] |
//! | `KVM_USER_MEM_SLOTS` | [`SetMemoryRegion::max_slots`], [`Limits::slots`] |
//! | `KVM_PRIVATE_MEM_SLOTS` | kernel: its own slots have ids beyond the user's; their addresses are [`PrivateRanges`] |
//! | `KVM_MEM_SLOTS_NUM` | kernel: the sum of the two before; user space can name only [`Limits::slots`] |
//! | `kvm_memory_slot` | [`Region`], its shape alone [`SlotShape`], its extent [`SlotExtent`] |
//! | `kvm_memslots` | [`SlotTable`] |
//! | `kvm_for_each_memslot` | [`SlotTable::regions`] |
//! | `id_to_memslot` | [`SlotTable::by_id`] |
//! | `search_memslots` | [`SlotTable::find`] |
//! | `__gfn_to_memslot` | [`SlotTable::find`] |
//! | `gfn_to_memslot` | [`Memslots::reader`], then [`SlotTable::find`] |
//! | `memslot_id` | [`Translation::slot`] |
//! | `kvm_is_visible_gfn` | [`SlotTable::is_visible`] |
//!
//! ## Changing the slots
//! | kvm_host.h | here |
//! | --- | --- |
//! | `kvm_mr_change` | [`Change`] |
//! | `KVM_MR_CREATE` | [`Change::Create`] |
//! | `KVM_MR_DELETE` | [`Change::Delete`] |
//! | `KVM_MR_MOVE` | [`Change::Move`] |
//! | `KVM_MR_FLAGS_ONLY` | [`Change::FlagsOnly`] |
//! | `kvm_set_memory_region` | [`Memslots::apply`]; [`Memslots::create`], [`Slot::remove`], [`Slot::relocate`], [`Slot::set_flags`] |
//! | `__kvm_set_memory_region` | [`classify`](classify()) and [`SlotMap::check`], its rules as a pure function; [`SetMemoryRegion`], the call |
//! | `kvm_arch_free_memslot` | kernel: reverse maps of a slot; user space drops the [`Region`] |
//! | `kvm_arch_create_memslot` | kernel: reverse maps of a slot; user space maps the [`Backing`] |
//! | `kvm_arch_memslots_updated` | kernel: stale MMIO translations by generation; user space has [`Memslots::generation`] |
//! | `kvm_arch_prepare_memory_region` | kernel: its architecture's veto; user space has [`ChangeListener::prepare`] |
//! | `kvm_arch_commit_memory_region` | kernel: its architecture's follow-up; user space has [`ChangeListener::commit`] |
//! | `kvm_largepages_enabled` | kernel: a module's switch; user space chooses by mapping with [`HugePages`], or [`Backing::hugetlb`] |
//! | `kvm_disable_largepages` | kernel: as `kvm_largepages_enabled` |
//! | `kvm_arch_flush_shadow_all` | kernel: its page tables at a VM's end; user space deletes its slots when [`Memslots`] drops |
//! | `kvm_arch_flush_shadow_memslot` | kernel: its page tables at a slot's end, done when [`Slot::remove`] returns |
//!
//! ## Translation
//! | kvm_host.h | here |
//! | --- | --- |
//! | `gfn_to_hva` | [`SlotTable::gfn_to_hva`] |
//! | `gfn_to_hva_prot` | [`SlotTable::gfn_to_hva_prot`] |
//! | `gfn_to_hva_memslot` | [`SlotExtent::hva`] |
//! | `__gfn_to_hva_memslot` | [`SlotExtent::hva`] |
//! | `hva_to_gfn_memslot` | [`SlotExtent::guest_address`], over all slots [`SlotTable::hva_to_gfn`] |
//! | `gfn_to_gpa` | [`Gfn::address`] |
//! | `gpa_to_gfn` | [`Gfn::containing`] |
//! | `pfn_to_hpa` | kernel: user space sees no host frames |
//! | `kvm_host_page_size` | [`SlotTable::host_page_size`], [`Region::page_size`] |
//! | `gfn_to_page` | kernel: pins a host page; user space has an address, [`SlotTable::gfn_to_hva`], which the mapping keeps good |
//! | `gfn_to_page_many_atomic` | kernel: as `gfn_to_page`; [`Translation::contiguous`] says how far one translation reaches |
//! | `gfn_to_pfn` | kernel: as `gfn_to_page`; its errors are [`PfnError`] |
//! | `gfn_to_pfn_atomic` | kernel: as `gfn_to_pfn`, without sleeping |
//! | `gfn_to_pfn_async` | kernel: as `gfn_to_pfn`, faulting apart; user space serves such faults by userfaultfd (async-pf) |
//! | `gfn_to_pfn_prot` | kernel: as `gfn_to_pfn`; user space has [`SlotTable::gfn_to_hva_prot`] |
//! | `gfn_to_pfn_memslot` | kernel: as `gfn_to_pfn`; user space has [`SlotExtent::hva`] |
//! | `gfn_to_pfn_memslot_atomic` | kernel: as `gfn_to_pfn_memslot` |
//! | `kvm_release_page_clean` | kernel: unpins a host page; user space pins none |
//! | `kvm_release_page_dirty` | kernel: as `kvm_release_page_clean`; written pages are told to a [`SlotBitmap`] |
//! | `kvm_set_page_accessed` | kernel: its page aging |
//! | `kvm_release_pfn_clean` | kernel: as `kvm_release_page_clean` |
//! | `kvm_set_pfn_dirty` | kernel: the host's dirty bit, set for user space by its own writes |
//! | `kvm_set_pfn_accessed` | kernel: its page aging |
//! | `kvm_get_pfn` | kernel: pins a host page; user space keeps the mapping by a [`Snapshot`] |
//! | `mmu_notifier_retry` | [`Invalidations::retry_any`], for a range [`Invalidations::retry`]; [`GuestRam::punch`] and [`GuestRam::invalidate`] are what they tell of. ([`Memslots::generation`] tells of slot changes) |
//!
//! ## Guest access
//! vm-memory's `Bytes` on [`CheckedMemory`] (permissions checked) or on [`SlotTable`] (not).
//!
//! | kvm_host.h | here |
//! | --- | --- |
//! | `kvm_read_guest` | [`Bytes::read_slice`](vm_memory::Bytes::read_slice) on [`CheckedMemory`] |
//! | `kvm_read_guest_page` | as `kvm_read_guest`: [`CheckedMemory`] crosses pages and slots by itself |
//! | `kvm_read_guest_atomic` | kernel: without sleeping; user space may always fault. [`Bytes::load`](vm_memory::Bytes::load) is the access in one piece |
//! | `kvm_read_guest_cached` | [`HvaCache::read_obj`] |
//! | `kvm_write_guest` | [`Bytes::write_slice`](vm_memory::Bytes::write_slice) on [`CheckedMemory`] |
//! | `kvm_write_guest_page` | as `kvm_write_guest`: [`CheckedMemory`] crosses pages and slots by itself |
//! | `kvm_write_guest_cached` | [`HvaCache::write_obj`] |
//! | `gfn_to_hva_cache` | [`HvaCache`]; for whole slots [`SlotHint`] |
//! | `kvm_gfn_to_hva_cache_init` | [`HvaCache::new`], [`HvaCache::check`] |
//! | `kvm_clear_guest` | [`ClearGuest::clear`] |
//! | `kvm_clear_guest_page` | [`ClearGuest::clear`] |
//!
//! # Concurrency contract
//! - Call `srcu::prepare` first thing in `main`, before the first other thread: what publishes the table registers the
//!   process for `membarrier(2)` once, in microseconds while there is one thread, in milliseconds later on.
//! - Changes to one [`Memslots`] exclude each other; each may wait some milliseconds for KVM (a grace period there).
//! - Readers wait for none of them. [`Memslots::reader`] is the vCPU threads' way and takes no lock;
//!   [`GuestRam::memory`](vm_memory::GuestAddressSpace::memory) and [`Memslots::snapshot`] take one for the cloning of
//!   a reference.
//! - A slot is made in KVM before readers see it, and deleted from KVM before they stop seeing it. So a reader may see
//!   a slot that the guest sees no more, for as long as it stays inside, and its memory is still there. Several slots
//!   changed by one call (a layout, say) change for readers at once, for the guest one after the other.
//! - Listeners are told before KVM is asked, and again after KVM and before readers, on the thread that makes the change
//!   and with other changes kept out; they may read, and get an error if they change the same slots.
//! - Memory can be taken away under a slot that stays ([`GuestRam::punch`]). Reads find zeros then, and no reader waits;
//!   the one who punches waits for the readers that are inside. Whoever keeps something derived from memory asks
//!   [`Invalidations::retry`] before each use, inside a guard.
//! - What is kept of a translation ([`HvaCache`], [`SlotHint`]) keeps nothing alive, and is used with a table at hand.
//! - Memory is unmapped when the slot is gone from KVM, no reader that could see it is inside, and no [`Snapshot`] of
//!   it is left, on whichever thread lets go last.
//! - What that thread lets go of, and what was [deferred](Grace::defer), it lets go of with no lock of this crate held:
//!   a deferred closure may change slots in its turn.
//! - A [`SlotExtent`] keeps the slot's id from being reused, not the slot.
//! - KVM refuses all but the flags and the guest address of an existing slot to change; of these, a move has a moment
//!   in which the guest sees nothing there.
//!
//! # Threat model
//! The guest is hostile: its addresses come here through devices. Every access is checked against the table, in
//! arithmetic that cannot wrap, and ends in an error, never a panic; guest memory is read and written through volatile
//! or atomic accesses only, and may change at any time. A guest can make a VMM clone, look up and copy, and no more:
//! what allocates is under the control plane's hands. The safety of the crate's callers rests on KVM and the mapping
//! alone, and so on a [`SetMemoryRegion`] that does what it says: one that reports a slot deleted which KVM still has
//! leaves the guest with memory that is unmapped, and then someone else's.
//!
//! # Save and restore
//! The layout is the caller's value, or [`Memslots::layout`], or what [`SlotTable::regions`] shows (start, size, flags);
//! the contents are read through a [`Snapshot`]. Ids are not part of it: they are given anew.
//!
//! # Backings, and what works on which
//! [`Backing`] says what is behind a slot: anonymous memory, a memfd, a file, hugetlb pages, a [guest_memfd](Backing::guest_memfd), a
//! [part](Backing::part) of a [`Mapping`] that several slots are cut from, a mapping of the consumer's own; from which NUMA nodes, prefaulted, between guard pages, left out of core dumps. What cannot be is
//! refused before anything is made or mapped, with the numbers. [`Holes`] says where nothing has been put yet.
//! [`MemoryKind::support`] is the table of which
//! [`Mechanism`] works on which memory, checked against the kernel; what a VM will want later (a pager, a snapshot, a
//! dirty log) is to be asked of it when the VM is configured. With the feature `uffd` the module of that name has the
//! userfaultfd layer.
//!
//! # Known limits
//! - A plan looks at every slot that a layout governs (at 1,000 slots some 0.2 ms), and, if there is anything to do,
//!   copies the model of what KVM has. Circles of moves are broken at the fewest slots unless they are so tangled that a
//!   million steps of search do not find which; then at a few more.
//! - A plan needs a free id for each new slot: the ids of those that it deletes come free when the last reader has left.
//! - What is deleted and made again has an empty dirty log in KVM: where a circle of moves is broken, where a read-only
//!   flag changes, and where a failed plan brings a deleted slot back.
//! - Which pages of a guest_memfd slot are private is not kept here (`KVM_SET_MEMORY_ATTRIBUTES` is the caller's).
//! - A publication among tens of thousands of slots costs some 40 µs beside KVM's own milliseconds; the README has the
//!   figures. Memory that two slots have at once makes lookups by host address look at each slot, and what is written
//!   through one of them is no news to the other's dirty log or bitmap.
//! - An invalidation that has ended is noticed by whoever derived anything before it, whatever the range, as in the
//!   kernel.
//! - Whoever truncates a file that is behind a slot turns touches of it into SIGBUS; memfds made here are sealed against
//!   it, other files are the caller's care.
//! - [`PAGE_SIZE`] is 4096: x86-64, and arm64 hosts with 4 KiB pages.
//! - Address space 1 (SMM) is known to the classifier, not to [`Memslots`].

#[forbid(unsafe_code)]
mod access;
#[forbid(unsafe_code)]
mod book;
mod cache;
mod change;
#[forbid(unsafe_code)]
mod classify;
#[forbid(unsafe_code)]
mod cycles;
#[forbid(unsafe_code)]
mod error;
mod extent;
pub mod fake;
#[forbid(unsafe_code)]
mod flags;
mod found;
#[forbid(unsafe_code)]
mod frames;
#[forbid(unsafe_code)]
mod guest_memfd;
mod host;
#[forbid(unsafe_code)]
mod ids;
#[forbid(unsafe_code)]
mod inner;
#[forbid(unsafe_code)]
mod invalidation;
#[cfg(feature = "kvm")]
mod kvm;
#[forbid(unsafe_code)]
mod layout;
#[forbid(unsafe_code)]
mod listener;
mod mapping;
#[forbid(unsafe_code)]
mod matrix;
#[forbid(unsafe_code)]
mod memslots;
#[forbid(unsafe_code)]
mod ordered;
#[forbid(unsafe_code)]
mod plan;
#[forbid(unsafe_code)]
mod planning;
#[forbid(unsafe_code)]
mod private;
mod punch;
mod region;
#[forbid(unsafe_code)]
mod slot;
#[forbid(unsafe_code)]
mod slot_map;
#[forbid(unsafe_code)]
mod sync;
#[forbid(unsafe_code)]
mod table;
#[cfg(feature = "uffd")]
pub mod uffd;
#[forbid(unsafe_code)]
mod units;

pub use access::{CheckedMemory, CheckedView, ClearGuest, GuestRam, LoadedMemory};
pub use cache::{HvaCache, SlotHint};
pub use classify::{
    Change, GuestMemfdRange, Limits, MAX_PAGES, MemoryRegion, Refusal, SlotShape, classify,
};
pub use error::{Error, Left, Unrestored};
pub use extent::{ExtentError, SlotExtent};
pub use flags::SlotFlags;
pub use frames::{HVA_ERR_BASE, HvaError, PFN_ERR_MASK, PFN_ERR_NOSLOT_MASK, PfnError};
pub use guest_memfd::GuestMemfd;
pub use host::{Errno, SetMemoryRegion};
pub use invalidation::{Invalidation, InvalidationSeq, Invalidations};
pub use layout::{Layout, LayoutError, LayoutSlot, NewSlot, ram_layout};
pub use listener::{ChangeListener, LayoutChange, Listening, SlotChange, Veto};
pub use mapping::{
    Backing, Holes, HugePageSize, HugePages, HugePool, MapError, Mapping, NumaPolicy,
};
pub use matrix::{Mechanism, MemoryKind, Support, Unsupported};
pub use memslots::{Applied, Memslots};
pub use plan::{Plan, Step};
pub use private::{PrivateRange, PrivateRanges};
pub use punch::PunchError;
pub use region::{Region, SlotBitmap};
pub use slot::{RemoveError, Slot};
pub use slot_map::SlotMap;
pub use srcu::{Grace, Guard, Reader, Snapshot};
pub use table::{SlotTable, Translation};
pub use units::{Gfn, Hva, PAGE_SHIFT, PAGE_SIZE, SlotId};

/// The README's example, so that it compiles.
#[cfg(all(doctest, feature = "kvm"))]
#[doc = include_str!("../README.md")]
mod readme {}
