// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of a KVM guest that arrives later: who waits for which page, what is fetched next, from
//! where, and how the guest is told.
//!
//! A guest whose memory is still on a disk or on another host runs at once; each page that it
//! touches too early is a fault that somebody serves. In the kernel that somebody is
//! `virt/kvm/async_pf.c`; in user space it is a pager over userfaultfd. [`pager`] is one, with its
//! threads. The rest of this crate is the bookkeeping for whoever writes another, or passes
//! asynchronous page faults on to a guest: plain data in and out, with no thread, lock or
//! descriptor (but in [`peer`], [`external`] and a working set's file). There is no `unsafe` in either.
//!
//! ```text
//!   vCPU 0 ──fault──▶ VcpuQueue.setup ─token─┐
//!   vCPU 1 ──fault──▶ VcpuQueue.setup ─token─┤        ┌──────── Schedule ─────────┐
//!                                            ├──────▶ │ fault lane    ▶▶▶ │ start │──▶ worker
//!   a guess (neighbours, a recording) ───────┴──────▶ │ prefetch lane ▶   │       │     │ fetch
//!                                                     └──────────▲────────────────┘     ▼
//!   vCPU ◀─check_completion─ VcpuQueue.arrived ◀─waiters─ finish ┘◀── page placed ── PageSource
//! ```
//!
//! * [`VcpuQueue`] is a vCPU's queue and done lists with their bound, and the functions on them
//!   under the kernel's names.
//! * [`Schedule`] holds the pages of a slot: two faults on one page are one fetch, faults overtake
//!   guesses, a guess that is touched becomes a fault.
//! * [`PageState`] and [`RequestState`] are the two state machines, each one `const` table.
//! * [`PageSource`] has the contents: [`FileSource`], [`SparseSource`], [`CompositeSource`],
//!   [`ZeroSource`], [`peer::PeerSource`], or yours.
//! * [`AsyncPfFeatures`], [`AsyncPfEnable`], [`AsyncPfVector`], [`AsyncPfMsrs`] and [`ApfData`] are
//!   the guest's side: CPUID bits, MSRs and the shared structure, decoded and encoded.
//! * [`working_set`] remembers which pages a restored guest touches first, and reads them ahead the
//!   next time.
//! * [`peer`] brings pages from another process or host, and serves them there.
//! * [`external`] hands a userfaultfd to a pager in another process, or takes one, as Firecracker
//!   does it.
//!
//! # Example
//! [`pager`] has one that serves real faults. This is the bookkeeping's round, by hand:
//!
//! ```
//! use async_pf::*;
//! use memslots::Gfn;
//!
//! let source = ZeroSource;
//! let mut pages: Schedule<Token> = Schedule::new(Gfn(0), 1024, 32)?;
//! let mut vcpu = VcpuQueue::new(0)?;
//!
//! // A vCPU touches a page that is not there.
//! let token = vcpu.setup(Gfn(7))?;
//! assert_eq!(pages.fault(Gfn(7), token)?, FaultAnswer::Waiting { fetch: true });
//!
//! // A worker serves it.
//! let job = pages.start().unwrap();
//! let mut buffer = [0; 4096];
//! let outcome = match source.fetch(job.gfn, &mut buffer) {
//!     Ok(_place_it_in_guest_memory) => Outcome::Arrived,
//!     Err(error) if error.is_transient() && job.failures < 3 => Outcome::Retry,
//!     Err(_) => Outcome::GaveUp,
//! };
//! for token in pages.finish(job.gfn, outcome)? {
//!     if vcpu.arrived(token)? { /* kick the vCPU */ }
//! }
//! assert_eq!(vcpu.check_completion(), Some(Completion::Ready { token, gfn: Gfn(7) }));
//! # Ok::<(), async_pf::Error>(())
//! ```
//!
//! # Header map
//! What became of the identifiers of Linux's `include/linux/kvm_host.h` (3.17) that this crate
//! answers for.
//!
//! | kvm_host.h | here |
//! | --- | --- |
//! | `kvm_async_pf` | a request, named by its [`Token`], in a [`RequestState`] |
//! | `kvm_clear_async_pf_completion_queue` | [`VcpuQueue::clear_completion`] |
//! | `kvm_check_async_pf_completion` | [`VcpuQueue::check_completion`] |
//! | `kvm_setup_async_pf` | [`VcpuQueue::setup`] |
//! | `kvm_async_pf_wakeup_all` | [`VcpuQueue::wake_all`] |
//!
//! # Concurrency
//! [`pager::Pager`] is `Send` and `Sync`, and its threads are its own. Every other type but the
//! sources is plain data with `&mut self` methods: put a [`Schedule`] behind one
//! mutex and hold it for the call, never across a fetch. A [`VcpuQueue`] belongs to its vCPU's
//! state; whoever finishes a page reaches it under that vCPU's lock. Sources are shared by workers
//! and may block, so they are called from workers alone. Nothing here waits.
//!
//! # Threat model
//! The guest chooses which pages fault, in which order, and how often: a vCPU holds at most its
//! bound of requests, a page at most one place in a lane, and an address outside of the slot is an
//! error. What a guest writes into its MSRs is decoded or refused, never trusted to be sane. A
//! source is a file or a peer that may lie, shrink or stop: short and failed reads are typed, and
//! say whether trying again may help; the contents of a page are the source's word. What a peer may
//! say, and what it costs, is [`peer`]'s essay.
//!
//! # Save and restore
//! Requests and lanes are not saved: a restored guest faults again, and
//! [`wake_all`](VcpuQueue::wake_all) makes it look again at what it waited for. The guest's side is:
//! [`AsyncPfMsrs`] keeps the MSRs, in the order in which they must be written. Of KVM's own tokens
//! nothing can be drained or saved: the vector, then the MSR that switches them on, and KVM wakes
//! all that wait ([`AsyncPfMsrs::restore`] has what else that takes).
//!
//! # Known limits
//! * The pager keeps a byte a page of guest memory, and does not follow memory that is moved within
//!   the process (`mremap`) or forked.
//! * A schedule covers one slot, and its pages are of 4 KiB.
//! * [`FileSource`] reads holes of a sparse file as zeros and says [`Fetched::Bytes`] to them.
//! * A page of another process ([`external`]) that was write-protected there before it came cannot be poisoned: if it is lost, who
//!   waits for it waits on. Stop the guest when [`PagerEvents::lost`](pager::PagerEvents::lost) tells of it.
//! * [`external`]'s pager does not hear that the monitor has ended: its caller watches that.
//! * [`peer`] neither encrypts nor authenticates: give it connections that do. A prefetch that a peer
//!   has been asked for does not become a demand when its page is touched.

#![forbid(unsafe_code)]

mod error;
pub mod external;
mod intervals;
#[cfg(feature = "uffd")]
pub mod pager;
mod paravirt;
pub mod peer;
mod queue;
mod schedule;
mod source;
mod state;
#[cfg(feature = "uffd")]
mod sync;
#[cfg(any(test, feature = "test-utilities"))]
pub mod trouble;
pub mod working_set;

pub use error::Error;
pub use paravirt::{
    ApfData, AsyncPfEnable, AsyncPfFeatures, AsyncPfMsrs, AsyncPfVector, KVM_CPUID_FEATURES,
    MSR_KVM_ASYNC_PF_ACK, MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MsrError,
};
pub use queue::{ASYNC_PF_PER_VCPU, Completion, Token, VcpuQueue, WAKE_ALL_TOKEN};
pub use schedule::{FaultAnswer, Job, Lane, Outcome, Schedule};
pub use source::{
    CompositeSource, Fetched, FilePiece, FileSource, PageSource, SourceError, SparseSource,
    ZeroSource,
};
pub use state::{PageEvent, PageState, RequestEvent, RequestState};

/// The README's example, so that it compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
