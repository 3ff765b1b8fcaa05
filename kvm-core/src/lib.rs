// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A KVM virtual machine, its vCPUs and their lifecycle.
//!
//! `kvm-ioctls` has the calls; this crate has what every monitor writes on top of them by hand, and
//! most get wrong: the run loop, the way to bring a vCPU out of the guest without losing the kick,
//! the pause of all vCPUs without a sleep in it, requests that a vCPU must serve before it runs guest
//! code again, and exits decoded whole. It follows `struct kvm`, `struct kvm_vcpu`, the guest modes
//! and the request bits of the kernel's `kvm_host.h`, on the other side of the ioctl.
//!
//! ```text
//!   Kvm ──create_vm──► VmSetup ──finish──► Vm ──create_vcpu──► Vcpu
//!                        │  other crates                         │ enroll
//!                        │  contribute here                      ▼
//!                        ▼                      ┌──── VcpuSet: pause, resume, stop,
//!              slots, irqchip, rings            │     kick, request
//!                                               ▼
//!      ┌─ a thread of yours ──────────────────────────────────────────────┐
//!      │ Runner::run:  requests? ► KVM_RUN ► Exit::decode ► your handler ─┼─► Halt
//!      └──────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The crate knows no bus, no slot and no interrupt controller: exits go to an [`ExitHandler`], which
//! passes them on in a few lines. How a vCPU's thread is made (name, affinity, cgroup, seccomp) and
//! which signal kicks it are yours too.
//!
//! # Example
//!
//! A run loop and its control, here on a vCPU that plays a script; with `/dev/kvm` the vCPU comes
//! from [`Vm::create_vcpu`] and nothing else changes (`examples/tiny_vm.rs` is a whole VM in thirty
//! lines).
//!
//! ```
//! use kvm_core::fake::{FakeVcpu, Step};
//! use kvm_core::{Exit, Flow, HaltReason, Identity, VcpuId, VcpuSet, VcpuView};
//!
//! let set = VcpuSet::new(Identity::vm("web-1"));
//! let vcpu = FakeVcpu::new(VcpuId(0), [Step::pio_out(0x3f8, 1, b"hello"), Step::Guest]);
//! let runner = set.enroll(vcpu)?;
//! let thread = std::thread::spawn(move || {
//!     let mut console = Vec::new();
//!     let Err(halt) = runner.run(move |_: &VcpuView<'_, ()>, exit: Exit<'_>| match exit {
//!         Exit::PioOut { port: 0x3f8, data, .. } => {
//!             console.extend_from_slice(data);
//!             Flow::Continue
//!         }
//!         _ => Flow::Stop("an exit that this guest should not make"),
//!     });
//!     halt.reason
//! });
//!
//! let pause = set.pause()?; // No vCPU runs guest code now,
//! pause.resume(); //           and now they do again.
//! set.stop()?;
//! assert_eq!(thread.join().unwrap(), HaltReason::Stopped);
//! # Ok::<(), kvm_core::ControlError>(())
//! ```
//!
//! # How to read it
//!
//! `mode.rs` (the guest modes and their table), `request.rs`, `kick.rs` (the protocol of the two, and
//! why nothing is lost), `run.rs` (the loop), `control.rs` (all vCPUs together), `exit.rs` (the
//! decoder), `stats/` (KVM's own statistics), `kvm/` (the ioctls, and all `unsafe`), `arch/` (CPUID,
//! MSRs, registers, tables, debug registers as data), `fake.rs` (a vCPU without KVM).
//!
//! # Concurrency
//!
//! - One thread runs a vCPU: [`Runner::run`] takes the vCPU and gives it back in a [`Halt`]. It comes
//!   back to halt, and for nothing else: its type is `Result<Infallible, Halt>`.
//! - [`VcpuSet`] is the other side, for any thread. What waits there waits on a condition variable
//!   for vCPU threads to pass a lock; there is no time-out, no sleep and no poll. Waiting for one's
//!   own vCPU is refused with [`ControlError::OnVcpuThread`].
//! - A vCPU thread that halts, fails at its first ioctl or panics leaves its set on the way, and one
//!   that was never started is not waited for; neither leaves a pause or a stop hanging.
//! - From one exit to the next entry a vCPU thread takes no lock and makes no system call but
//!   `KVM_RUN`. A reader of published tables (io-bus, memslots) that holds a guard for one access
//!   only needs nothing more; one that caches across accesses lets go in
//!   [`ExitHandler::before_entry`].
//! - A kick costs a signal only if the vCPU is in the guest, and the signal then interrupts `KVM_RUN`
//!   and not a handler's system call, but for a late one now and then: treat `EINTR` as usual.
//! - Memory orderings are argued in `kick.rs`, `mode.rs` and `request.rs`, and loom explores run loop,
//!   kick, request, pause and stop with every stale value that they allow and every interleaving of
//!   at most two to four preemptions (`tests/loom_lifecycle.rs`).
//!
//! `kvm_run` is mapped by this crate itself, and no reference to the whole of it ever exists: the
//! kicker has `immediate_exit` as an atomic byte, the vCPU's thread the rest. The mapping lives for as
//! long as either does.
//!
//! # Threat model
//!
//! The guest is hostile. What it controls in an exit (port, size, count, address, data) arrives
//! checked: no exit panics, and a `kvm_run` that cannot be is [`HaltReason::Undecodable`]. The
//! handler's answers are its own affair. KVM is trusted to write only what it documents, but not to
//! be free of errors: the decoder checks its offsets all the same. Consumers of this crate are
//! trusted with the file descriptors that [`Vm::fd`] and [`Vcpu::fd`] show.
//!
//! # Saved and restored
//!
//! Nothing yet by this crate itself. A paused vCPU is in the right state for it: its access is
//! completed (`KVM_RUN` with `immediate_exit`, until it says `EINTR`) and kvm-clock was told. Requests
//! that are pending are not part of a guest's state.
//!
//! # Known limits
//!
//! - x86-64. The lifecycle, the decoder's frame and the ioctls' edge are free of it; `arch` is not.
//! - Exits that end a vCPU in any case (triple fault, internal error, failed entry) come as
//!   [`HaltReason`]s; a monitor that wants to mend such a vCPU takes it from the [`Halt`], and enrols
//!   it again.
//! - Halts that come to user space (no local APIC in the kernel) are the handler's; blocking with
//!   adaptive polling is planned, as are whole state, in-kernel devices, and a path for memory errors
//!   that arrive as MMIO inside a slot.
//! - Guest debugging is the vCPU's: while it has a hardware breakpoint of a debugger's, the guest's own
//!   debug registers do nothing. A KVM that interprets guests has no data watchpoints, and ends a guest
//!   at an `int3` outside real mode, whosever it is.
//! - While a pause holds, a vCPU's registers are its thread's: read them before parking by a
//!   [`Request`], until the planned access from the control plane is there.
//! - A real-time kick signal needs room in `RLIMIT_SIGPENDING` ([`KickSignal`]).
//! - `Vcpu::fd` gives a `kvm_ioctls::VcpuFd`, whose `sync_regs` makes a reference to the whole of its
//!   own mapping of `kvm_run` (rust-vmm/kvm 357, 373): do not call it while the vCPU can be kicked.
//!
#![doc = include_str!("header_map.md")]
#![deny(unsafe_code)]

pub mod arch;
mod capability;
mod control;
mod exit;
#[cfg(any(test, feature = "test-utilities"))]
pub mod fake;
mod identity;
mod kick;
#[cfg(all(feature = "kvm", not(loom)))]
#[allow(unsafe_code)]
mod kvm;
mod mode;
mod request;
mod run;
pub mod stats;
mod sync;

pub use capability::{Capabilities, CheckExtension};
pub use control::{ControlError, Pause, VcpuSet};
pub use exit::{
    DecodeError, EXIT_AREA_MIN, EXIT_AREA_START, Exit, InternalError, MsrReply, Reply, Words,
};
pub use identity::{Identity, VcpuId};
pub use kick::Doorbell;
#[cfg(all(feature = "kvm", not(loom)))]
pub use kvm::{Error, KickSignal, KickSignalError, Kvm, OpenError, Vcpu, Vm, VmSetup};
pub use mode::{GuestMode, ModeEvent};
pub use request::{Request, Requests};
pub use run::{ExitHandler, Flow, Halt, HaltReason, RunVcpu, Runner, VcpuView};
pub use vmm_sys_util::errno::Error as Errno;

/// The README's example compiles.
#[cfg(all(doctest, feature = "kvm"))]
#[doc = include_str!("../README.md")]
struct Readme;
