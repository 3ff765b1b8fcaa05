// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A paused machine as files, and a machine that goes on from them.
//!
//! ```text
//!   Running::snapshot                                          Machine::restore
//!      │ paused: devices, controllers, vCPUs, clock               ▲ clock, vCPUs, controllers, lines
//!      ▼                                                          │
//!   MachineState ── machine ──► sections ── format ──► state ── parsed, checked
//!   guest memory ── pages ────► pieces ──────────────► memory ─ checked, mapped
//!                                 files: written beside, synced, renamed
//! ```
//!
//! # The directory
//!
//! | file | what it is | where it is described |
//! | --- | --- | --- |
//! | `state` | a header, a table of sections, the sections | [`format`](mod@format), byte by byte |
//! | `memory` | guest memory, sparse: what is zero is a hole | [`pages`] |
//! | `working_set` | where a restore recorded it: what its guest touched first; a hint, and no part of it | [`async_pf::working_set`] |
//!
//! The sections of `state` are
//!
//! | kind | what | form |
//! | --- | --- | --- |
//! | 1 config | what the machine is made of, paths absolute | JSON, as `--config` reads it ([`config_form`]) |
//! | 2 vm | clock, PICs, IOAPIC and timer in KVM, or the monitor's IOAPIC | JSON ([`machine::VmSection`]) |
//! | 3 vcpus | of each its number and all that KVM knows of it | JSON ([`machine::VcpuSection`]) |
//! | 4 devices | COM1, clock, power switch, virtio devices with their queues | JSON ([`machine::DevicesSection`]) |
//! | 5 memory | regions and their places in the file, a checksum for each MiB | binary ([`pages`]) |
//! | 6 parent | of an incremental one: on which it builds | binary ([`parent`]) |
//! | 7 page-sources | of an incremental one: the pages that it has | binary ([`ranges`]) |
//! | 8 packed, 9 duplicates | of compressed memory: where each piece is, and pages that are there once | binary ([`packed`]) |
//! | 10 disks | which disks are in the directory, as `disk0`, … | JSON ([`disks`]) |
//! | 11 first-pages | pages of `memory` that the machine touches first when it goes on, once more; may be passed over | binary ([`first`]) |
//!
//! The state of KVM's parts has versions of its own
//! ([`kvm_core::state::StateVersion`](kvm_core::arch::x86_64::state::StateVersion) has the policy), and a field that a build
//! does not know is refused there and here, never passed over.
//!
//! # While the guest runs
//!
//! One in the [`background`] reads devices and vCPUs in a pause, and memory behind it, as it was in the pause. Its files are
//! the same.
//!
//! # Chains
//!
//! An incremental snapshot ([`SnapshotKind::Diff`]) has the machine whole, and of memory what was written since the one
//! before: by the guest and by devices ([`tracking`](crate::vm::tracking)). A page that became zero is one of those. What is
//! written is tracked from the moment of a full snapshot on that asks for it ([`SnapshotRequest::track`]), or of the one
//! that the machine was restored from; the next one may build on the last alone, known by its id. One that fails has
//! changed nothing: the next has what it would have had.
//!
//! One that others build on is not replaced ([`children`]): they would be lost with it.
//!
//! A restore ([`chain`]) and [`merge`] open all links and check them before anything is made; a link that is missing, was
//! replaced, is damaged or comes twice is named.
//!
//! # What is in it, and what is not
//!
//! All that the guest can tell: memory, registers, clocks, interrupts that are pending, devices. A virtio device rests when
//! it is saved: what it had begun for the driver is finished, and what it had not is in its queue, into which it looks
//! first when it goes on. Connections are not: of vsock, of sockets behind ports, of a debugger. The guest is told of those
//! as if the other side had closed them. The contents of disks are only where [`disks`] are asked for: else a snapshot
//! knows by what it finds a disk again ([`Fingerprint`](crate::devices::virtio::block::Fingerprint)), and a restore refuses
//! one that has moved on. What the monitor counts begins at zero.
//!
//! # Old and new
//!
//! The machine has a number, its generation id, that is another one after each restore, and a guest that listens hears of
//! it at once (ACPI; Linux has `vmgenid` from 5.18 on, Debian's cloud kernels leave it out). Two guests of one snapshot
//! would else have the same random numbers, and the same session keys.
//!
//! # Who may write to it
//!
//! Who owns the snapshot owns the guest: there is a checksum against damage and none against forgery. The files are
//! readable by their owner alone. The parser holds for any bytes all the same: it is fuzzed
//! (`cargo xtask fuzz snapshot`), and what it lets pass is data to KVM and to the devices, which refuse what cannot be.
//!
//! # What went wrong elsewhere, and here cannot
//!
//! - A worker waited after the restore for a notification that the driver had given before it (cloud-hypervisor 8004):
//!   queues are looked into at each start.
//! - A device that no driver had set up was restored with rings at address 0, and the monitor panicked (cloud-hypervisor
//!   8693): rings are made when the driver is ready, and only then.
//! - What was not synced was full of zeros after a crash of the host, with the right name and length (reported of
//!   Firecracker's files): both files, the directory and its parent are synced, in this order.
//! - A snapshot of a guest whose memory is still being paged in took the pages that were not there for empty
//!   (cloud-hypervisor 8525): memory is read through the mapping, which pages them in.
//! - State that was added to without a version, and read by position (Firecracker, before its format 2): all fields have
//!   names.

pub mod background;
pub mod chain;
pub mod children;
pub mod config_form;
mod contents;
pub mod disks;
pub mod files;
pub mod first;
pub mod format;
pub mod info;
pub mod link;
pub mod machine;
mod memory_out;
pub mod merge;
pub mod packed;
pub mod pages;
pub mod parent;
pub mod ranges;
mod restore;
mod save;
pub mod serve;
mod tick;
mod tip;
mod written;

pub use restore::{NoSnapshot, Overrides, RestoreError, RestoreRequest, Snapshot};
pub use save::{SnapshotError, SnapshotKind, SnapshotReport, SnapshotRequest};
pub(crate) use tip::ChainTip;
