// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Published tables for VMMs: readers never lock, writers wait for the readers that are inside.
//!
//! What a vCPU thread looks at on every exit (memory slots, device ranges, interrupt routes) changes rarely and is read
//! all the time, by threads that must not wait for whoever changes it. The kernel's KVM keeps such tables behind SRCU:
//! a reader announces itself and follows a pointer; a writer builds the next table beside the old one, swaps the
//! pointer, and waits until those who may still see the old one have left. This crate is that pattern for a VMM:
//!
//! ```text
//!   vCPU thread                          writer
//!   ───────────                          ──────
//!   enter:  my word := inside            build the next table
//!           light barrier ───┐           swap the pointer
//!           load the pointer │  ┌─────── heavy barrier
//!   …       look up          └──┼──────▶ look at each reader's word: who is inside?
//!   leave:  my word := outside  │        Grace: over when each of those words has changed
//!             └─ waited for? wake, and drop what has become free
//! ```
//!
//! The two barriers make sure that at least one side sees the other: either the reader finds the new table, or the
//! writer finds the reader. The light one costs nothing: the heavy one is `membarrier(2)`, which makes the readers'
//! CPUs execute what the readers leave out. Each reader writes a cache line of its own and no other.
//!
//! # Example
//! ```
//! use srcu::Published;
//!
//! let ports = Published::new(vec![0x3f8u16]);
//!
//! std::thread::scope(|scope| {
//!     let mut reader = ports.reader(); // once a thread
//!     scope.spawn(move || {
//!         let table = reader.enter(); // at each exit; holds the table as it is now
//!         assert!(table.contains(&0x3f8));
//!     }); // leaving: the guard is dropped before the guest is entered again
//!
//!     ports.publish(vec![0x3f8, 0x2f8]).wait(); // on return nobody sees the old table
//! });
//! assert_eq!(ports.generation(), 1);
//! ```
//!
//! # Removing from inside an access
//! A device that unplugs itself, or another device, does so from inside a guard, where [`Grace::wait`] would wait for
//! its own thread. There, take the token and leave: [`Grace::defer`] has a closure run (or a value dropped: move it in)
//! when the grace period is over, at the latest as the last of the readers that were inside leaves;
//! [`Grace::is_over`] asks. The old table itself needs neither: it is always freed by then. Two devices that remove
//! each other at once, each inside an access, both return and both go.
//!
//! # Concurrency contract
//! - [`Reader::enter`] and the drop of a [`Guard`] never wait, with one exception: a leave that a writer has asked to
//!   be told of takes a short lock (held for list operations only), wakes, and drops what has become free, outside the
//!   lock. It is one leave for each publication that found the reader inside.
//! - [`Published::publish`] and [`Published::update`] exclude each other; [`Published::load`] waits for neither.
//! - No one polls. [`Grace::wait`] sleeps until the leave that it waits for.
//! - A guard holds back the freeing of everything that is replaced while it lives. A vCPU thread holds none across
//!   `KVM_RUN`: a vCPU asleep in the guest keeps nothing alive.
//! - What is dropped or run at the end of a grace period is dropped or run on whichever thread ends it, a vCPU's
//!   perhaps. Keep destructors short, or send the work elsewhere from there.
//! - A panic inside a guard leaves. A guard that is forgotten counts as inside until its reader enters again or goes,
//!   and who sleeps for it is woken at that reader's next leave; nothing worse happens.
//! - Numbers do not run out in practice: a reader enters 2^63 times before its word repeats, and the generation has 64
//!   bits; both wrap without harm unless somebody slept through a whole turn.
//!
//! # Who pays for the barrier
//! - Readers execute no fence and no locked instruction. A publication makes one `membarrier(2)` call (a second one if
//!   it finds a reader inside), which interrupts every CPU that runs a thread of this process at that moment, a vCPU in
//!   the guest included: one exit for each.
//! - The process registers for this once, which takes microseconds while it has one thread and a grace period of the
//!   kernel (10 ms and more) later on; `examples/prepare.rs` measures both. So call [`prepare`] first thing in `main`,
//!   before the first other thread is started.
//! - Where the kernel has no such call or a seccomp filter forbids it, readers and writers pay a fence each, for the
//!   life of the process; [`Published::with_fences`] has it so by choice. A filter that is installed *later* must let
//!   `membarrier` pass: a writer that cannot make its readers' barriers happen can not go on soundly, and aborts.
//!
//! # How it is checked
//! `tests/loom_srcu.rs` runs this very code (behind the `sync` shim) through every interleaving and permitted
//! reordering of small scenarios under loom. Loom knows no `membarrier`: there, both halves are SeqCst fences, which
//! give the same guarantee and no more. Each ordering and each half was weakened or left out in turn, and each time a
//! model failed, but for one: the Release of an enter's store, which loom's fence at the leave before it makes up for.
//! `tests/threads.rs` does the rest on real threads, `tests/no_membarrier.rs` where the call is refused.
//!
//! # Threat model
//! No guest input comes here. Memory safety rests on this crate's own code alone: no use of its safe interface, guards
//! forgotten included, leads to a use after free.
//!
//! # Save and restore
//! Nothing: a published table is its owner's state.
//!
//! # Known limits
//! - A publication looks at each reader's word: its cost grows with the number of readers (64 vCPUs: 64 cache lines).
//! - After [`Grace::wait`], the old table may be in the middle of being dropped, on the thread that left last.

mod barrier;
mod domain;
mod published;
mod sync;

pub use domain::Grace;
pub use published::{Guard, Published, Reader, Snapshot};

/// Makes the barriers of readers free, if the host can (Linux 4.14, and no seccomp filter against `membarrier(2)`);
/// tells whether they are. The first call decides for the life of the process, the others ask.
///
/// The first [`Published::new`] does it if nobody has. But registering waits for a grace period of the kernel, 10 ms
/// and more, in a process of several threads, and for nothing in one of one: so call it first thing in `main`, before
/// the first other thread is started.
pub fn prepare() -> bool {
    barrier::Barrier::choose() == barrier::Barrier::Asymmetric
}

/// The README's example, so that it compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
