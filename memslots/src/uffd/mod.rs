// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The userfaultfd layer: who brings a guest's pages, and who hears of its writes.
//!
//! A userfaultfd is told of page faults in registered memory, KVM's among them, and the faulting thread sleeps until
//! someone has done something about the page. A mapping can have one userfaultfd only, so what uses one shares it: a
//! lazy restore brings pages, a background snapshot protects them, maybe at once. Here [`Uffd`] is the descriptor,
//! [`Registration`] a range of a [`Mapping`](crate::Mapping), and each lends its two roles to one borrower at a time:
//!
//! ```text
//!   Uffd::open ── register ──▶ Registration ── lend_fill ─────▶ FillRole     copy, zero, continue, poison, move, wake
//!     │                          │      └───── lend_protect ──▶ ProtectRole  protect, unprotect
//!     │ read, epoll              │ add(modes): more modes, without a gap
//!     ▼                          ▼
//!   Messages: Fault, Remove …    dropped, and its roles: unregistered, sleepers wake; then unmapped
//! ```
//!
//! # Example
//! A thread touches a page that is not there; another brings it. (For a guest the thread is a vCPU, inside `KVM_RUN`.)
//! ```
//! use memslots::uffd::{Event, Features, Messages, Modes, OpenError, Uffd, Wake};
//! use memslots::{Backing, Mapping};
//! use std::sync::Arc;
//! use vm_memory::GuestAddress;
//!
//! let uffd = match Uffd::open(Features::NONE, Features::THREAD_ID) {
//!     Err(OpenError::Denied { .. }) => return Ok(()), // the error says what to do about it
//!     opened => opened?,
//! };
//! let memory = Arc::new(Mapping::new(&Backing::anonymous(1 << 20), GuestAddress(0))?);
//! let registration = uffd.register_all(&memory, Modes::MISSING)?;
//! let pager = registration.lend_fill()?;
//! let touch = memory.host().0 + 0x5008;
//! # let keep = Arc::clone(&memory);
//! let vcpu = std::thread::spawn(move || {
//!     # let _keep = keep;
//!     // SAFETY: mapped for as long as this runs; a guest's memory is read volatile.
//!     unsafe { (touch as *const u8).read_volatile() }
//! });
//! let mut messages = Messages::with_capacity(64);
//! uffd.wait(None)?;
//! uffd.read(&mut messages)?;
//! for event in &mut messages {
//!     if let Event::Fault(fault) = event {
//!         let page = pager.page_of(fault.address).ok_or("not ours")?;
//!         pager.copy(page, &[7; 4096], Wake::Now)?;
//!     }
//! }
//! assert_eq!(vcpu.join().unwrap(), 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Which memory has what
//! [`MemoryKind::support`](crate::MemoryKind::support) is the table, and [`Uffd::register`] asks it first. In short:
//! anonymous memory has missing-page and write-protect faults, poison and move; memfds and hugetlb pages have minor faults
//! and no move; files on a disk have asynchronous write-protection alone; a guest_memfd has nothing.
//!
//! # Both roles at once
//! A page that arrives while a snapshot protects memory must come protected, or the guest could write it before the
//! snapshot has it. [`ProtectRole::protect`] therefore turns that on for all of the registration before it protects, after
//! waiting for what is being filled at that moment; and dropping the role turns it off before it takes the protection
//! away. Neither borrower does anything about the other.
//!
//! A mode that has been registered stays until the registration goes ([`Registration::add`] says why), so missing faults
//! go on after a restore is complete, where pages are given back afterwards (a balloon). Someone has to answer those, with
//! [`FillRole::zero`]: a handler that keeps its role, or borrows it again.
//!
//! # Memory of one moment
//! [`PointInTime`] is a background snapshot's half that any monitor would write the same: it lays protection while the guest
//! runs, protects again in the pause what was written since, and then copies a page before its first write, until it has
//! been read.
//!
//! # Another process's memory
//! A monitor may hand its userfaultfd to a handler in another process, as Firecracker does. There, [`Uffd::receive`] takes
//! it, and a [`ForeignRange`] stands for a registration of the monitor's: it lends a [`FillRole`], whose pages go into the
//! other process. Nothing of that memory can be looked at here, so there is no [`ProtectRole`] of it; and its end ends no
//! registration, which is the monitor's own.
//!
//! # Who may block on whom
//! A fault is a dependency of the faulting thread on whoever reads the messages. So that it is no circle, the thread that
//! reads and answers them
//! - never touches registered memory, neither itself (a device's access, a debugger's look) nor through a system call
//!   (`read` into guest memory, `KVM_SET_MSRS` of a clock whose page is missing): it would wait for itself;
//! - never takes a lock that is held across such a touch (a device's lock in a vCPU thread's MMIO exit);
//! - changes no slots of the VM, nor waits for who does: KVM lets a change wait for every vCPU that is inside a page fault
//!   (measured: a slot was made 0.3 s after the page was brought, 1.8 s after it was asked for);
//! - starts before the first of them: before vCPU and VM state is set, not only before `KVM_RUN`.
//!
//! With the events of [`Features`] it is more: `fork`, `mremap`, `munmap` and giving pages back (`MADV_DONTNEED`) sleep
//! until their message has been *read*, so the reading thread does none of these, and takes no lock that is held across
//! one. (The C library's `fork` holds the allocator's locks: [`Uffd::wait`] and [`Uffd::read`] allocate nothing before the
//! messages are read, and what is done between the two should not either.) Until then operations answer
//! [`Cause::Changing`](Cause). Registering, unregistering and the operations themselves wait for no guest.
//!
//! # What becomes of sleepers
//! | what happens | who sleeps on a page |
//! | --- | --- |
//! | its page is filled, continued, moved, unprotected | wakes (with [`Wake::Later`], at the next wake) |
//! | it is poisoned | wakes with a memory error |
//! | a role is dropped | `FillRole`: sleeps on. `ProtectRole`: wakes, all protection is gone |
//! | … and the kernel keeps refusing that (an event is not read) | wakes, faults again, and is told of again |
//! | [`ProtectRole::end`] is refused | sleeps on; the role is there to answer |
//! | the registration, or the descriptor, goes | wakes; **a missing page reads as zeros**, a protected one is written |
//! | a signal comes for it (a kick of a vCPU) | see below |
//! | the process ends | ends |
//!
//! A message that was read is not told again while its thread sleeps: what takes messages must answer all of them. And
//! since a page may be told of again after it was placed (two threads, a kick), [`Cause::AlreadyThere`] is an everyday
//! answer: whoever has it wakes the page.
//!
//! A signal ends the sleep where KVM's fault can be interrupted (hardware KVM, Linux 6.2): `KVM_RUN` returns `EINTR`, and
//! the fault is told again at the next entry. Elsewhere it does not: on the software KVM, whose guest's access is a
//! kernel's copy, the vCPU tells its fault again and again at full speed until the page is there, and only then takes
//! the signal. So who pauses a guest keeps its pager at work until the last vCPU has come out.
//!
//! # Costs
//! A registration costs one ioctl of a microsecond or two, splits the mapping's VMA if it is a part of it, and keeps
//! transparent huge pages from serving its missing pages (each comes as it is placed). An operation is one ioctl;
//! nothing here allocates after its set-up.

mod abi;
#[forbid(unsafe_code)]
mod copy_book;
mod error;
#[cfg(any(test, feature = "test-utilities"))]
pub mod fake;
#[forbid(unsafe_code)]
mod features;
#[forbid(unsafe_code)]
mod foreign;
mod host;
#[forbid(unsafe_code)]
mod message;
#[forbid(unsafe_code)]
mod modes;
#[forbid(unsafe_code)]
mod outcome;
pub mod point_in_time;
#[forbid(unsafe_code)]
mod ranges;
mod registration;
mod roles;
mod sys;
mod trial;
#[expect(clippy::module_inception, reason = "a file per concept")]
mod uffd;

pub use abi::Call;
pub use error::{LendError, OpenError, RegisterError};
pub use features::Features;
pub use foreign::ForeignRange;
pub use host::UffdHost;
pub use message::{Fault, FaultKind, Message, RawMessage, UnknownMessage, decode, encode};
pub use modes::Modes;
pub use outcome::{Cause, OpError};
pub use point_in_time::PointInTime;
pub use registration::{Registration, UnregisterError, UnregisterReason};
pub use roles::{EndError, FillRole, ProtectRole, Wake};
pub use uffd::{Event, Messages, Uffd};
