// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that runs before its memory is read.
//!
//! ```text
//!   snapshot's files ── SnapshotSource ──► async-pf's pager ──► userfaultfd ──► guest memory
//!                       (chain, zstd,        │  a vCPU, a device or this process touches a page: it comes first
//!                        checked as read)    └─ what nobody waits for comes behind, in order
//!
//!   or: a page server ── RemoteSource ──► the same pager (the snapshot's state is here, its memory is not)
//!   or: a migration's source ── PostCopySource ──► the same pager, over what has not come yet (post-copy)
//!   or: userfaultfd and mappings ──► a page-fault handler in another process (Firecracker's protocol)
//! ```
//!
//! [`Machine::restore`](crate::vm::Machine::restore) with [`RestoreRequest::lazy`](crate::snapshot::RestoreRequest::lazy):
//! memory is made as for a boot, registered, and the pager runs before any state of the VM or of a vCPU is set, for KVM
//! touches guest memory there (its clock, stolen time, asynchronous page faults). Before that the pages are placed that the
//! snapshot has in its state ([`first`](crate::snapshot::first)). So the time to the guest's first instruction does not grow with
//! its memory, and waits for nothing that is not in the state.
//!
//! # What is right when
//! - **What the guest reads** is what the snapshot has. A piece of a file (1 MiB) is compared with its checksum before the
//!   first byte of it is used, unless [`RestoreRequest::verify`](crate::snapshot::RestoreRequest::verify) is off, and a file
//!   that has been written to since is refused at each read ([but for one way](#limits)). A hole of the file is taken for
//!   zeros only where the checksum of its MiB says so too. Without `verify` it is taken for zeros as it is.
//! - **When it is whole** the pager ends and the userfaultfd with it: the guest is as any other then.
//! - **A page that does not come** (an I/O error that stays, a file that is damaged, cut off or changed, a source that does
//!   not answer within the [deadline](LazyRequest::deadline)) ends the guest with the reason and status 1 ([`OnLoss::Stop`]),
//!   or is poisoned and the guest goes on ([`OnLoss::Poison`]). Nobody waits longer than the deadline, and nobody ever reads
//!   something in its place.
//! - **A snapshot or a migration** first has everything brought, at full speed, and then is as of any guest.
//! - **Memory given back** meanwhile reads as zeros, and is not brought again.
//!
//! # Who waits for whom
//! The pager's threads read files and place pages; they touch no guest memory, and take no lock of this monitor's. Every
//! other thread may touch guest memory and then waits for them: at most for the deadline. Then the page is poisoned, and
//! who touches it
//!
//! | who | has | and then |
//! | --- | --- | --- |
//! | a vCPU in the guest | a memory error of kvm-core's | the guest stops, or has a machine check (`poison`) |
//! | a system call (a disk's read into guest memory) | `EFAULT` | the request fails |
//! | a snapshot, a migration, the debugger | an error, with the reason | it is refused |
//! | a device's thread, itself | `SIGBUS` | it is parked while the guest is stopped (`bus`) |
//!
//! The end has the pager's reason, whoever comes upon the page first.
//!
//! # Post-copy
//! A guest that migrates may come before its memory ([`postcopy`](crate::migration::postcopy)): its pages are asked for over
//! the migration's connections. A source that is cut off is waited for; [the deadline](LazyRequest::deadline) is how long.
//! Read-only memory (the firmware's) has no pager: its pages are brought at once.
//!
//! # Page servers
//! With a [page server](LazyRequest::page_server) (`reference-vmm snapshot serve`, on this host or another) only the
//! snapshot's state is here. It has to be of the same snapshot, which is asked when it is connected to, each time; what it
//! sends is the guest's memory, and is not compared with the checksums here, which are of whole MiB: the server compares
//! as it reads. A server that goes is connected to again for as long as the deadline, and then what is missing is lost.
//!
//! # External handlers
//! With a [handler](LazyRequest::handler) its process brings the pages. What is there this process does not know then: a
//! background snapshot, which needs the userfaultfd for itself, is refused; a snapshot in a pause and a migration read
//! through the handler, for as long as it lives. When its process dies the guest is stopped, as for a page that does not
//! come. So it is when somebody has waited for as long as the deadline and the handler has not brought a single page in that
//! time. One that answers others, and forgets one of them, is not found out: nobody here hears of the faults.
//!
//! # Limits
//! The kernel's userfaultfd has to have `POISON` (Linux 6.6). Memory of the lazy guest is its own from the first touch on
//! (a snapshot that is mapped shares the page cache with others). Of compressed memory, and of pieces in which something is
//! not zero while the file's holes are looked for, pages of zeros take memory as others do.
//!
//! That a file was written to is seen by its times, which the kernel sets at each `write`; of a shared mapping only at the
//! first write to a page since that was last written back, and on a tmpfs not even then where the page was read through the
//! mapping before. So who has mapped the file and written to a page before the restore began may do so again unseen: before
//! a MiB is first read the checksum finds it out (with `verify`), and behind that nothing does. To write the file back first
//! (`fsync`) would make such a write seen but for a tmpfs, and takes as long as the disk does, for all of a file that was
//! just copied there; `mincore` and `msync` of a mapping of one's own say nothing of another's. A lease of the file
//! (`F_SETLEASE`) is refused while anybody has it open for writing, a mapping included; it is the owner's alone to take, and
//! who opens the file in that moment is made to wait.

mod arrive;
pub(crate) mod bus;
mod error;
mod events;
mod handler;
pub mod kept;
mod memory;
mod peer;
mod said;
mod source;
mod stats;
mod working_set;

use std::path::PathBuf;
use std::time::Duration;

pub(crate) use arrive::check;
pub use error::LazyError;
pub(crate) use memory::{LazyMemory, Loss};
pub use peer::PageServerAt;
pub use said::LazySaid;
pub use source::SnapshotSource;
pub(crate) use stats::coming;
pub use stats::{LazyProgress, LazyState, LazyStats, ServerAway, WorkingSetHelp};
pub use working_set::{WORKING_SET, WORKING_SET_PAGES};

/// How memory comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LazyRequest {
    /// What becomes of the guest if a page does not come.
    pub on_loss: OnLoss,
    /// How long who touches a page waits for it at most.
    pub deadline: Duration,
    /// Threads that bring pages.
    pub workers: usize,
    /// For so long only what the guest touches is brought, page by page, and recorded beside the snapshot for the next
    /// restore. None: nothing is recorded, and what was is read ahead.
    pub record: Option<Duration>,
    /// The Unix socket of a page-fault handler in another process, which brings the pages instead.
    pub handler: Option<PathBuf>,
    /// Who has the memory, of which the snapshot's directory has none then, or none that is read.
    pub page_server: Option<Box<PageServerAt>>,
}

impl LazyRequest {
    /// Whether another process brings the pages, and so may be waited for before there is a guest.
    pub(crate) fn is_of_another(&self) -> bool {
        self.page_server.is_some() || self.handler.is_some()
    }
}

impl Default for LazyRequest {
    /// The guest is stopped, ten seconds, two threads.
    fn default() -> Self {
        LazyRequest {
            on_loss: OnLoss::Stop,
            deadline: Duration::from_secs(10),
            workers: 2,
            record: None,
            handler: None,
            page_server: None,
        }
    }
}

/// What becomes of the guest if a page of its memory does not come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLoss {
    /// It ends, with the reason and status 1.
    #[default]
    Stop,
    /// The page is poisoned and the guest goes on. If it touches the page it has a machine check where KVM says enough of
    /// the access and the guest takes it ([`MachineCheck`](kvm_core::arch::x86_64::MachineCheck) has who does), and ends
    /// with the reason otherwise.
    Poison,
}
