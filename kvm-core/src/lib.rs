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
//! decoder), `memory_error.rs` (guest memory that the host cannot give) with `kvm/bus_error.rs`
//! (`SIGBUS`), `access.rs` (what a paused vCPU is asked), `blocker.rs` and `halt_poll.rs` (a vCPU that
//! is halted in user space), `hold.rs` and `throttle.rs` (vCPUs that are slowed down), `kernel_halt.rs` (one that is halted in KVM), `pre_fault.rs` (memory in KVM's
//! page tables before the guest runs), `device.rs` (devices in the kernel), `stats/` (KVM's own statistics), `logging/` (log lines that no guest can make flow), `kvm/`
//! (the ioctls, and all `unsafe`), `arch/` (CPUID with topologies and processor models, MSRs and their
//! filter, registers, tables, debug registers, machine checks as data; whole state), `fake.rs` (a vCPU without KVM).
//!
//! # vCPUs that come later
//!
//! [`Vm::create_vcpu`] and [`VcpuSet::enroll`] may be called at any time, from any thread. A vCPU that is
//! added while others run is part of the next pause; one that is added while a pause holds parks before
//! its first instruction. It is set up as any other, before it is enrolled: CPUID and MSRs are the
//! monitor's. With local APICs in the kernel it waits in `KVM_RUN` until the guest sends it INIT and SIPI,
//! and `create_vcpu` sees to it that these find it, in a restored VM too (KVM alone may not: see there). How the guest hears
//! that there is one more (ACPI, a paravirtual device) is the monitor's; so is `max_vcpu_id`, which KVM
//! wants told before the first vCPU where it is to be lower. A vCPU that halts can be enrolled again. KVM
//! has no call that removes one.
//!
//! # Concurrency
//!
//! - One thread runs a vCPU: [`Runner::run`] takes the vCPU and gives it back in a [`Halt`]. It comes
//!   back to halt, and for nothing else: its type is `Result<Infallible, Halt>`.
//! - [`VcpuSet`] is the other side, for any thread. What waits there waits on a condition variable
//!   for vCPU threads to pass a lock, with no time-out (but for [`VcpuSet::pause_within`], which is asked for one), no
//!   sleep and no poll. Waiting for one's own vCPU is refused with [`ControlError::OnVcpuThread`].
//! - A paused vCPU is asked through its own thread ([`Pause::with_vcpu`]); who asks one that leaves
//!   instead is told, and never left waiting (`access.rs` argues it).
//! - A vCPU thread that halts, fails at its first ioctl or panics leaves its set on the way, and one
//!   that was never started is not waited for; neither leaves a pause or a stop hanging.
//! - From one exit to the next entry a vCPU thread takes no lock and makes no system call but
//!   `KVM_RUN`. A reader of published tables (io-bus, memslots) that holds a guard for one access
//!   only needs nothing more; one that caches across accesses lets go in
//!   [`ExitHandler::before_entry`].
//! - A kick costs a signal only if the vCPU is in the guest, and the signal then interrupts `KVM_RUN`
//!   and not a handler's system call, but for a late one now and then: treat `EINTR` as usual.
//! - A vCPU that is halted in user space ([`Flow::Block`]) sleeps on a condition variable of its own, after
//!   polling for as long as [`Runner::halt_polling`] allows. Its [`Waker`] wakes it from any thread; all
//!   that reaches a vCPU in the guest reaches it there as well.
//! - vCPUs are slowed down by [`VcpuSet::throttle`], all of them by a part of their time, or one by one with
//!   [`VcpuSet::hold`]: each sleeps outside the guest, on its own thread, and all that reaches a vCPU in the guest
//!   reaches it there at once. One that sleeps in HLT is not woken for it. These alone go by the clock: a hold ends at its
//!   time, and while a throttle is not 0 its thread looks each 10 ms, more often beyond 95 %, at what each vCPU has run.
//! - Memory orderings are argued in `kick.rs`, `mode.rs`, `request.rs` and `blocker.rs`, and loom explores
//!   run loop, kick, request, pause, stop and halt with every stale value that they allow and every
//!   interleaving of at most two to four preemptions (`tests/loom_*.rs`).
//! - [`BusErrors::install`] sets the process's `SIGBUS` handler, which no other part of this crate touches;
//!   `kvm/bus_error.rs` argues why it is sound.
//!
//! `kvm_run` is mapped by this crate itself, and no reference to the whole of it ever exists: the
//! kicker has `immediate_exit` as an atomic byte, the vCPU's thread the rest. The mapping lives for as
//! long as either does.
//!
//! # Threat model
//!
//! The guest is hostile. What it controls in an exit (port, size, count, address, data) arrives
//! checked: no exit panics, and a `kvm_run` that cannot be is [`HaltReason::Undecodable`]. The
//! handler's answers are its own affair. What it makes a monitor log is bounded in number and in memory
//! ([`logging`]). KVM is trusted to write only what it documents, but not to
//! be free of errors: the decoder checks its offsets all the same. Consumers of this crate are
//! trusted with the file descriptors that [`Vm::fd`] and [`Vcpu::fd`] show.
//!
//! # Saved and restored
//!
//! All that KVM knows of a vCPU is [`state::VcpuState`], and of a VM's clock [`state::VmState`]: plain
//! data with named fields, serde's traits with the feature `with-serde`, and a version whose policy is
//! [`state::StateVersion`]'s. Guest memory is memslots', the interrupt controllers are irq-routing's.
//!
//! A paused vCPU is in the right state for it: its access is completed (`KVM_RUN` with
//! `immediate_exit`, until it says `EINTR`) and kvm-clock was told. Its own thread reads its state
//! ([`Pause::with_vcpu`], [`Pause::with_each`] for all at once), so that nobody shares its descriptor.
//! Requests that are pending are not part of a guest's state, nor is what a debugger has set. A device in
//! the kernel has the state that its attributes say; the VFIO device has none.
//!
//! Whether a vCPU is halted in user space ([`Flow::Block`]) is part of it, and KVM does not know: its
//! `mp_state` says runnable. [`VcpuView::is_halted`] says it beside the state, and [`Runner::halted`] makes
//! the restored vCPU begin so; without it the guest's `HLT` is over. Where KVM has the local APICs nothing
//! is halted in user space, and `mp_state` says all.
//!
//! ```no_run
//! # #[cfg(all(feature = "kvm", target_arch = "x86_64"))]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use kvm_core::state::ClockRestore;
//! # use kvm_core::{Kvm, Vcpu, VcpuView, VcpuSet, RunVcpu};
//! # let kvm = Kvm::open()?;
//! # let vm = kvm.create_vm()?.finish();
//! # let new_vm = kvm.create_vm()?.finish();
//! # let set = VcpuSet::new(vm.identity().clone());
//! # let new_set = VcpuSet::new(new_vm.identity().clone());
//! let host = vm.state_host(&kvm)?;
//! let pause = set.pause()?;
//! let vcpus = pause.with_each(move |vcpu: &VcpuView<'_, <Vcpu as RunVcpu>::Fd>| {
//!     (vcpu.state(&host), vcpu.is_halted())
//! })?;
//! let clock = vm.state()?;
//! // …and guest memory, devices, interrupt controllers. Then, in a new VM with its memory in place:
//! let host = new_vm.state_host(&kvm)?;
//! let mut made = Vec::new();
//! for (id, (state, halted)) in vcpus {
//!     made.push((new_vm.create_vcpu(id)?, state?, halted));
//! }
//! // All vCPUs are there, and none is restored: only so does KVM tell what the TSC's offsets need.
//! let passage = new_vm.restore(&clock, ClockRestore::AsSaved)?;
//! for (vcpu, state, halted) in made {
//!     vcpu.restore(&host, &state, &passage)?;
//!     let runner = new_set.enroll(vcpu)?;
//!     let runner = if halted { runner.halted() } else { runner };
//!     // …interrupt controllers, which wake (`runner.waker()`) whom they have something for; then its thread.
//! }
//! # Ok(())
//! # }
//! # #[cfg(not(all(feature = "kvm", target_arch = "x86_64")))]
//! # fn main() {}
//! ```
//!
//! A host that cannot take a state refuses it before it changes anything, and names what it lacks
//! ([`state::Refusal`]): the CPUID leaf with its bits, the MSR with its value, the XSAVE component, the
//! capability. What only KVM finds out names its piece ([`state::RestoreError`]), and the vCPU, with
//! its VM, is thrown away. The orders of saving and restoring, and what each of their steps is for, are
//! argued in [`state`].
//!
//! # Known limits
//!
//! - x86-64. The lifecycle, the decoder's frame and the ioctls' edge are free of it; `arch` is not.
//! - Exits that end a vCPU in any case (triple fault, internal error, failed entry) come as
//!   [`HaltReason`]s; a monitor that wants to mend such a vCPU takes it from the [`Halt`], and enrols
//!   it again.
//! - Guest debugging is the vCPU's: while it has a hardware breakpoint of a debugger's, the guest's own
//!   debug registers do nothing. A KVM that interprets guests has no data watchpoints, and ends a guest
//!   at an `int3` outside real mode, whosever it is.
//! - A memory error that comes out as MMIO is found only where [`ExitHandler::is_memory`] knows the slots,
//!   and the guest's instruction is over then: what a guest can be told is that its context is corrupt. An
//!   access that raced with the slot's creation looks the same. `EFAULT` alone has no address.
//! - `SIGBUS` on a thread that is no vCPU's goes where it went before, as does an error that nobody has run
//!   into and that the kernel tells another thread. Of a thread's errors eight are kept.
//! - A machine check goes to one vCPU; Intel's guests of several expect it on all
//!   ([`arch::x86_64::MachineCheck::for_others`], which the monitor hands to the others); LMCE is not offered. It tells of
//!   one page: of others that are lost with it the guest hears when it touches them, and its kernel may do so first.
//! - A one-shot or periodic tick of the local APIC's timer that expired since the vCPU left the guest
//!   is in no ioctl's answer: a periodic timer goes on, a one-shot one (which Linux uses where there is
//!   no TSC deadline) is lost in a saved state. KVM shows no way to it.
//! - Restoring believes KVM: a value that it takes and drops (its PVM back end drops paging outside long
//!   mode, and the TSC, of which [`state::Restored`] tells) is not read again. State of Xen and Hyper-V
//!   guests that has ioctls of its own, and that of confidential guests, is not saved.
//! - On Intel's processors KVM does not take back the nested state of a guest hypervisor that was saved in
//!   system management mode, if the SMI came while it was in VMX operation (`EINVAL`, naming the piece): KVM
//!   would have to know of that mode by then, and it comes with the events, which go later ([`state`]).
//! - Two threads that run into one lost page may each put zeros in its place, and huge pages that are lost by
//!   truncation are not replaced (`kvm/bus_error.rs`).
//! - On a host without `KVM_CAP_SREGS2` the PDPTRs of a guest in PAE paging come from its memory.
//! - CPUID has three levels of topology: no dies, modules or hybrid cores; one NUMA node a socket. A
//!   [`Template`](arch::x86_64::cpuid::Template) that says what a feature's leaves hold (PMU, SGX) is not
//!   checked in them, and MSRs that tell features follow no template by themselves. A software KVM may
//!   show its guests instructions that their list hides (`tests/kvm_cpuid.rs` says which).
//! - A real-time kick signal needs room in `RLIMIT_SIGPENDING` ([`KickSignal`]).
//! - `Vcpu::fd` gives a `kvm_ioctls::VcpuFd`, whose `sync_regs` makes a reference to the whole of its
//!   own mapping of `kvm_run` (rust-vmm/kvm 357, 373): do not call it while the vCPU can be kicked.
//!
#![doc = include_str!("header_map.md")]
#![deny(unsafe_code)]

mod access;
pub mod arch;
mod blocker;
mod capability;
mod control;
mod device;
mod exit;
#[cfg(any(test, feature = "test-utilities"))]
pub mod fake;
mod halt_poll;
mod hold;
mod identity;
mod kernel_halt;
mod kick;
#[cfg(all(feature = "kvm", not(loom)))]
#[allow(unsafe_code)]
mod kvm;
pub mod logging;
mod memory_error;
mod mode;
mod pre_fault;
mod request;
mod run;
pub mod stats;
mod sync;
mod throttle;

#[cfg(target_arch = "x86_64")]
pub use arch::x86_64::state;
pub use blocker::{Blocker, Waker, Woken};
pub use capability::{Capabilities, CheckExtension};
pub use control::{ControlError, Pause, VcpuSet};
pub use device::{DeviceAttribute, DeviceError, DeviceKind};
pub use exit::{
    DecodeError, EXIT_AREA_MIN, EXIT_AREA_START, Exit, InternalError, MsrReply, Reply, Words,
};
pub use halt_poll::HaltPolling;
pub use identity::{Identity, VcpuId};
pub use kernel_halt::{
    DisabledExits, EnableCapability, KernelHaltError, disable_exits, offered_exits, set_halt_poll,
};
pub use kick::Doorbell;
#[cfg(all(feature = "kvm", not(loom)))]
pub use kvm::{
    BusErrors, BusErrorsError, CreateDevice, Device, DeviceAttributes, DeviceFd, Error, KickSignal,
    KickSignalError, Kvm, ListedHost, OpenError, Otherwise, RefusedFile, Vcpu, VfioDevice,
    VfioFile, Vm, VmSetup, Watched,
};
pub use memory_error::{
    BusError, BusErrorCode, During, HostAddress, MemoryError, MemoryErrorKind, MemoryErrorSource,
    Remedy,
};
pub use mode::{GuestMode, ModeEvent};
pub use pre_fault::{PreFaultError, PreFaultMemory, pre_fault};
pub use request::{Request, Requests};
pub use run::{ExitHandler, Flow, Halt, HaltReason, RunVcpu, Runner, VcpuView};
pub use throttle::{Throttle, ThrottleError};
pub use vmm_sys_util::errno::Error as Errno;

/// The README's example compiles.
#[cfg(all(doctest, feature = "kvm"))]
#[doc = include_str!("../README.md")]
struct Readme;
