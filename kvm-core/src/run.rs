// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The run loop: enter, come out, decode, hand on, again; it comes back only to halt.
//!
//! ```text
//!        ┌──────────────────────────────────────────────────────────────┐
//!        ▼                                                              │
//!   before_entry ─► requests? ──yes─► the consumer's, then park or stop ┤
//!                      │no                                              │
//!                      ├─► halted in user space, or held ─► wait ───────┤
//!                      ▼                                                │
//!                   KVM_RUN ─► EINTR, EAGAIN ───────────────────────────┤
//!                      │                                                │
//!                      ├─► fatal exit, errno ─► Halt                    │
//!                      ├─► memory error ─► handler.memory_error ────────┤
//!                      └─► any other exit ─► handler.exit ─► Continue ──┘
//!                                                 └─► Stop(value) ─► Halt
//! ```
//!
//! The loop is generic over [`RunVcpu`], the calls that it makes: a KVM vCPU is one
//! implementation, the scripted one of `fake` (feature `test-utilities`) another.
//!
//! # `EAGAIN`
//!
//! `KVM_RUN` says it for two reasons, and they want opposite answers:
//!
//! - A vCPU that waits for INIT (`KVM_MP_STATE_UNINITIALIZED`: an AP that the guest has not started)
//!   was woken. Each wake is one `EAGAIN`, and nothing is wrong, however many there are: an NMI that
//!   the guest sends to such an AP stays pending and wakes it at every entry. The wake by INIT itself
//!   is the last one.
//!
//!   Such an AP takes the host as much time as one that spins in the guest, for as long as the guest does
//!   not start it; kicks, pauses and a stop reach it at each turn. Nothing sound makes it sleep. INIT
//!   comes from another vCPU, inside KVM, of which user space hears nothing but the end of `KVM_RUN`:
//!   one that waited at its doorbell would miss it, and looking again after a while is a poll. To take
//!   the NMI back (`KVM_SET_VCPU_EVENTS`; INIT would drop it anyway) does not help: it clears what is
//!   pending, and leaves KVM's own request for it, which wakes the vCPU until it enters the guest (seen
//!   on Linux 6.18). And a change of its state by `KVM_SET_MP_STATE` would race with the INIT.
//!
//! - KVM cannot start a worker thread of the VM, which it does at the first `KVM_RUN` (the one that
//!   recovers huge pages; Linux 6.13 and later): the user or the cgroup may have no more threads.
//!   Each `KVM_RUN` tries again, so one that is tried for ever spins and runs no guest.
//!
//! Telling them apart takes the vCPU's state, which [`RunVcpu::waits_for_init`] gives. An `EAGAIN` of a
//! vCPU that waits is no refusal. Of one that does not, one may be the wake by INIT; [`MAX_REFUSALS`]
//! of them, with no other answer of `KVM_RUN` in between, are [`HaltReason::Refused`]. (`EINTR` is
//! another answer: KVM looks at signals and at `immediate_exit` only once it has its thread.)

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::GuestAddress;
use vmm_sys_util::errno::Error as Errno;

use crate::access::Parked;
use crate::blocker::{Blocker, Waker, Woken};
use crate::control::{Member, Verdict};
use crate::exit::{DecodeError, Exit, InternalError, forget};
use crate::halt_poll::HaltPolling;
use crate::hold::Held;
use crate::identity::VcpuId;
use crate::kick::Doorbell;
use crate::memory_error::{BusError, HostAddress, MemoryError, Remedy};
use crate::request::{Request, Requests};

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const EFAULT: i32 = 14;
const EINVAL: i32 = 22;
const ENOTTY: i32 = 25;
const EHWPOISON: i32 = 133;

/// So many times in succession `KVM_RUN` may say `EAGAIN` to a vCPU that waits for nothing. One is
/// KVM's way to start an AP; a shortage that is over at once is given the others.
const MAX_REFUSALS: u32 = 16;

/// What the run loop asks of a vCPU.
///
/// # Contract
/// - All calls but [`RunVcpu::doorbell`] come from one thread, the one that called [`Runner::run`].
/// - [`RunVcpu::run`] returns `EINTR` without running guest code while the doorbell's
///   `immediate_exit` is set (having completed a pending access), and when the doorbell rings.
pub trait RunVcpu: Send {
    /// What a handler, and who has paused it, may use of the vCPU besides its exit: registers and the
    /// like.
    type Fd: 'static;

    /// The vCPU's number in its VM.
    fn id(&self) -> VcpuId;

    /// The kicker's side. The same for the vCPU's whole life.
    fn doorbell(&self) -> Arc<dyn Doorbell>;

    /// The thread that calls this is the vCPU's from now on: the doorbell rings there.
    ///
    /// # Errors
    /// The errno of what failed; the vCPU halts with [`HaltReason::StartFailed`].
    fn attach(&mut self) -> Result<(), Errno>;

    /// `KVM_RUN`. Blocks until the guest exits.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn run(&mut self) -> Result<(), Errno>;

    /// The exit area of `kvm_run` (see [`Exit::decode`]), and beside it what handlers may use.
    fn exit_area(&mut self) -> (&mut [u8], &Self::Fd);

    /// `KVM_KVMCLOCK_CTRL`: the guest is being paused and must not take the gap for a hang.
    ///
    /// # Errors
    /// The errno of the ioctl; `EINVAL` is that of a guest without kvm-clock.
    fn kvmclock_ctrl(&mut self) -> Result<(), Errno>;

    /// `KVM_NMI`: a non-maskable interrupt for the guest, at its next entry. A vCPU that has none says
    /// `ENOTTY`, as this does.
    ///
    /// # Errors
    /// The errno of the ioctl.
    fn nmi(&mut self) -> Result<(), Errno> {
        Err(Errno::new(ENOTTY))
    }

    /// Whether the vCPU waits for another to start it (`KVM_MP_STATE_UNINITIALIZED`), in which case
    /// `EAGAIN` of [`RunVcpu::run`] is no refusal. Asked after each `EAGAIN`. A vCPU that never
    /// waits so, as one without a local APIC in the kernel, says no.
    fn waits_for_init(&mut self) -> bool {
        false
    }

    /// The next `SIGBUS` that this thread took since it was attached, oldest first. Asked after each
    /// [`RunVcpu::run`], each handler and each task of a pause, and before the guest runs.
    fn take_bus_error(&mut self) -> Option<BusError> {
        None
    }

    /// The thread is the vCPU's no more: its run loop has ended.
    fn detach(&mut self) {}
}

/// What a handler wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Flow<S> {
    /// Run on.
    Continue,
    /// The vCPU is halted ([`Exit::Hlt`]): run on once it is woken ([`Runner::waker`]) and
    /// [`ExitHandler::runnable`], or gets an NMI ([`VcpuSet::nmi`](crate::VcpuSet::nmi)). Requests, pauses and
    /// stops are served meanwhile and leave it halted.
    ///
    /// For a VM without local APICs in KVM: there a guest's `HLT` comes out, and it is user space that waits
    /// for the guest's next interrupt. The thread polls ([`Runner::halt_polling`]), then sleeps on a
    /// condition variable; no wake-up is lost, and one that comes before the halt ends it at once. Where KVM
    /// has the local APICs it waits itself, `HLT` makes no exit, and this is for nothing.
    ///
    /// KVM knows nothing of such a halt: its `mp_state` says runnable. [`VcpuView::is_halted`] says it, and
    /// [`Halt::halted`] at the end; [`Runner::halted`] makes a vCPU that is restored or enrolled again halted
    /// as it was.
    Block,
    /// Halt this vCPU with a value of the consumer's.
    Stop(S),
}

/// The vCPU as its handler sees it.
#[derive(Debug)]
pub struct VcpuView<'a, F: ?Sized> {
    id: VcpuId,
    fd: &'a F,
    halted: bool,
}

impl<'a, F: ?Sized> VcpuView<'a, F> {
    pub(crate) const fn new(id: VcpuId, fd: &'a F, halted: bool) -> Self {
        Self { id, fd, halted }
    }

    /// The vCPU's number.
    #[must_use]
    pub const fn id(&self) -> VcpuId {
        self.id
    }

    /// The vCPU itself, for its registers and the like: `kvm_ioctls::VcpuFd` with KVM. In an access
    /// exit its registers are those before the access ([`Exit::is_access`]).
    #[must_use]
    pub const fn fd(&self) -> &'a F {
        self.fd
    }

    /// Whether the vCPU is halted in user space ([`Flow::Block`]) and nothing has woken it since. A part of
    /// the guest's state that KVM does not know: who saves it (in [`Pause::with_vcpu`](crate::Pause::with_vcpu))
    /// gives it back with [`Runner::halted`]. A wake-up that has come while the vCPU is paused ends the halt
    /// as far as this says, since no state would hold it: the restored vCPU runs on, as if
    /// [`ExitHandler::runnable`] had said yes.
    #[must_use]
    pub const fn is_halted(&self) -> bool {
        self.halted
    }
}

/// What a consumer does with exits. On the vCPU's own thread, outside the guest.
///
/// A closure `FnMut(&VcpuView<F>, Exit) -> Flow<S>` is a handler.
///
/// # Contract
/// A pause or stop of the VM waits for the handler to return. So a handler never waits for something
/// that only comes once the VM is paused or stopped, and never calls the blocking calls of its own
/// [`VcpuSet`](crate::VcpuSet) (they refuse).
pub trait ExitHandler<F: ?Sized> {
    /// What a vCPU may be stopped with.
    type Stop;

    /// Serves an exit. Those that end a vCPU in any case ([`Exit::Shutdown`], [`Exit::FailEntry`],
    /// [`Exit::InternalError`], [`Exit::Unknown`]) do not come here; they are [`HaltReason`]s. Nor does
    /// [`Exit::MemoryFault`]: it is a [`MemoryError`].
    fn exit(&mut self, vcpu: &VcpuView<'_, F>, exit: Exit<'_>) -> Flow<Self::Stop>;

    /// Serves requests of the consumer's own, before the vCPU runs guest code again.
    fn requests(&mut self, vcpu: &VcpuView<'_, F>, requests: Requests) -> Flow<Self::Stop> {
        let _ = (vcpu, requests);
        Flow::Continue
    }

    /// Whether a halted vCPU that was woken has something to run for (`kvm_arch_vcpu_runnable`). With no,
    /// it stays halted: the wake-up was for what is over by now. The default is yes.
    fn runnable(&mut self, vcpu: &VcpuView<'_, F>) -> bool {
        let _ = vcpu;
        true
    }

    /// Whether a guest physical address is memory: in a slot, and one that the guest may write if it
    /// does. Asked of each MMIO exit before anybody answers it; where this says yes the exit is a
    /// [`MemoryError`] (there is why). The default is no, for all addresses.
    ///
    /// A write to read-only memory is an access, and the way in which KVM reports it: no.
    fn is_memory(&mut self, address: GuestAddress, write: bool) -> bool {
        let _ = (address, write);
        false
    }

    /// Which guest physical address is mapped at an address of this process. Asked of each `SIGBUS`.
    fn guest_address(&mut self, address: HostAddress) -> Option<GuestAddress> {
        let _ = address;
        None
    }

    /// The host cannot give the guest a part of its memory: what is to be done? The default halts the
    /// vCPU with [`HaltReason::MemoryError`]. Whoever tells the guest does it here, for example with
    /// a machine check (`arch::x86_64::MachineCheck`).
    fn memory_error(&mut self, vcpu: &VcpuView<'_, F>, error: &MemoryError) -> Remedy<Self::Stop> {
        let _ = (vcpu, error);
        Remedy::Halt
    }

    /// Called before each `KVM_RUN` that runs guest code (and at times before one that a request then
    /// prevents). A reader that caches published tables between accesses lets go of them here, since
    /// the vCPU may now sleep for ever; with guards that live for one access only there is nothing
    /// to do.
    fn before_entry(&mut self, vcpu: &VcpuView<'_, F>) {
        let _ = vcpu;
    }
}

impl<F, S, C> ExitHandler<F> for C
where
    F: ?Sized,
    C: FnMut(&VcpuView<'_, F>, Exit<'_>) -> Flow<S>,
{
    type Stop = S;

    fn exit(&mut self, vcpu: &VcpuView<'_, F>, exit: Exit<'_>) -> Flow<S> {
        self(vcpu, exit)
    }
}

/// Why a vCPU halted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HaltReason<S> {
    /// [`VcpuSet::stop`](crate::VcpuSet::stop) or `begin_stop`.
    Stopped,
    /// The handler's own value.
    Handler(S),
    /// The guest shut down: a triple fault on x86.
    Shutdown,
    /// KVM gave up on the guest.
    InternalError(Box<InternalError>),
    /// The hardware refused to run the guest's state.
    FailEntry {
        /// Vendor-specific.
        reason: u64,
        /// The physical CPU it happened on.
        cpu: u32,
    },
    /// An exit that KVM itself has no name for.
    Unknown {
        /// The hardware's exit reason.
        hardware_reason: u64,
    },
    /// `kvm_run` made no sense.
    Undecodable(DecodeError),
    /// `KVM_RUN` failed.
    RunFailed(Errno),
    /// The host cannot give the guest a part of its memory, and nobody had a remedy
    /// ([`ExitHandler::memory_error`]).
    MemoryError(MemoryError),
    /// `KVM_RUN` says `EAGAIN` again and again to a vCPU that waits for nothing: KVM cannot start a
    /// thread of its own for the VM. It can be run again once threads can be had.
    Refused,
    /// The thread could not be made the vCPU's ([`RunVcpu::attach`]).
    StartFailed(Errno),
}

impl<S: fmt::Debug> fmt::Display for HaltReason<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => write!(f, "stopped"),
            Self::Handler(value) => write!(f, "ended by its handler: {value:?}"),
            Self::Shutdown => write!(f, "the guest shut down (triple fault)"),
            Self::InternalError(error) => write!(f, "{error}"),
            Self::FailEntry { reason, cpu } => write!(
                f,
                "the hardware refused to enter the guest: reason {reason:#x} on physical CPU {cpu}"
            ),
            Self::Unknown { hardware_reason } => {
                write!(
                    f,
                    "KVM does not know the hardware's exit reason {hardware_reason:#x}"
                )
            }
            Self::Undecodable(error) => write!(f, "an exit that cannot be: {error}"),
            Self::RunFailed(errno) => write!(f, "KVM_RUN failed: {errno}"),
            Self::MemoryError(error) => write!(f, "{error}"),
            Self::Refused => write!(
                f,
                "KVM_RUN fails again and again ({}): KVM cannot start a thread of its own for the VM; \
                 the user's limit of processes (ulimit -u), or the cgroup's (pids.max), is too low",
                Errno::new(EAGAIN)
            ),
            Self::StartFailed(errno) => write!(f, "the thread cannot run a vCPU: {errno}"),
        }
    }
}

/// A vCPU that halted: why, and its parts back, so that registers can be read, or the vCPU enrolled
/// again. An access that its last exit asked for is not completed.
pub struct Halt<V, H, S> {
    /// Why.
    pub reason: HaltReason<S>,
    /// The vCPU.
    pub vcpu: V,
    /// The handler, with what it gathered.
    pub handler: H,
    /// Whether the vCPU was halted in user space ([`VcpuView::is_halted`]): for [`Runner::halted`] where it
    /// is enrolled again.
    pub halted: bool,
}

impl<V, H, S: fmt::Debug> fmt::Debug for Halt<V, H, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Halt")
            .field("reason", &self.reason)
            .finish_non_exhaustive()
    }
}

/// A vCPU enrolled in a [`VcpuSet`](crate::VcpuSet), ready to be run on a thread of the consumer's.
pub struct Runner<V> {
    vcpu: V,
    member: Member,
    /// `EAGAIN`s in succession of a vCPU that waits for nothing.
    refusals: u32,
    /// The vCPU's handler said [`Flow::Block`], and it has not been woken since.
    halted: bool,
    blocker: Blocker,
    /// It is held out of the guest.
    held: Held,
    /// What a paused vCPU's thread ran into.
    untold: VecDeque<BusError>,
}

impl<V: RunVcpu> Runner<V> {
    pub(crate) fn new(vcpu: V, member: Member, blocker: Blocker) -> Self {
        Self {
            vcpu,
            member,
            refusals: 0,
            halted: false,
            blocker,
            held: Held::default(),
            untold: VecDeque::new(),
        }
    }

    /// Wakes the vCPU where it is halted in user space ([`Flow::Block`]).
    pub fn waker(&self) -> Waker {
        self.blocker.waker()
    }

    /// The vCPU begins halted in user space, as after [`Flow::Block`]: one that was when it was saved
    /// ([`VcpuView::is_halted`]) or when it left ([`Halt::halted`]). Without this it runs on behind its
    /// `HLT`, which the guest takes for an interrupt.
    ///
    /// A [`Waker::wake`] ends the halt, one before the vCPU's thread starts too: an interrupt controller that
    /// is restored with something pending for the vCPU wakes it.
    #[must_use]
    pub fn halted(mut self) -> Self {
        self.halted = true;
        self
    }

    /// How a halted vCPU ([`Flow::Block`]) is polled for before it sleeps; without this it is not.
    #[must_use]
    pub fn halt_polling(mut self, polling: HaltPolling) -> Self {
        self.blocker.set_polling(polling);
        self
    }

    /// The vCPU's number.
    pub fn id(&self) -> VcpuId {
        self.vcpu.id()
    }

    /// The vCPU, for setting it up.
    pub fn vcpu_mut(&mut self) -> &mut V {
        &mut self.vcpu
    }

    /// Runs the vCPU on this thread until it halts. Blocks for as long.
    ///
    /// Whatever happens, a panic in the handler included, the vCPU leaves its set at the end, so no
    /// pause or stop ever waits for it.
    ///
    /// # Errors
    /// Always: there is no other way back. `let Err(halt) = runner.run(handler);`
    pub fn run<H: ExitHandler<V::Fd>>(
        mut self,
        mut handler: H,
    ) -> Result<Infallible, Halt<V, H, H::Stop>> {
        let reason = match self.run_to_halt(&mut handler) {
            Ok(never) => match never {},
            Err(reason) => reason,
        };
        let halted = self.is_halted();
        let Self {
            mut vcpu, member, ..
        } = self;
        vcpu.detach();
        log::debug!("{}: {}", member.identity(), HaltReason::describe(&reason));
        drop(member);
        Err(Halt {
            reason,
            vcpu,
            handler,
            halted,
        })
    }

    fn is_halted(&self) -> bool {
        self.halted && !self.blocker.is_woken()
    }

    fn view(&mut self) -> VcpuView<'_, V::Fd> {
        let halted = self.is_halted();
        VcpuView::new(self.vcpu.id(), self.vcpu.exit_area().1, halted)
    }

    /// The vCPU's place in its set, and what is asked there while it is parked.
    fn at_the_set(&mut self) -> (&mut Member, Parked<'_, V>) {
        let parked = Parked {
            vcpu: &mut self.vcpu,
            untold: &mut self.untold,
            halted: self.halted,
            blocker: &self.blocker,
        };
        (&mut self.member, parked)
    }

    fn run_to_halt<H: ExitHandler<V::Fd>>(
        &mut self,
        handler: &mut H,
    ) -> Result<Infallible, HaltReason<H::Stop>> {
        self.vcpu.attach().map_err(HaltReason::StartFailed)?;
        let (member, mut parked) = self.at_the_set();
        if member.start(&mut parked) == Verdict::Stop {
            return Err(HaltReason::Stopped);
        }
        let mut access_pending = false;
        self.refusals = 0;
        loop {
            handler.before_entry(&self.view());
            // Behind all that may have touched guest memory since the last look: the handler, and tasks of
            // a pause.
            self.bus_errors(handler)?;
            let waits = self.halted || self.held.until().is_some();
            if waits && !self.member.gate().is_asked() {
                self.block(handler);
            } else if self.member.gate().enter() {
                self.run_once(handler, &mut access_pending)?;
            } else {
                let requests = self.member.gate().take();
                self.serve(handler, requests, &mut access_pending)?;
            }
        }
    }

    /// Waits until the vCPU is woken or its hold is over, or somebody asks for something.
    #[cold]
    fn block<H: ExitHandler<V::Fd>>(&mut self, handler: &mut H) {
        if self.halted {
            if self.blocker.block() == Woken::Event {
                self.halted = !handler.runnable(&self.view());
            }
        } else if let Some(until) = self.held.until()
            && !self.blocker.rest(until)
        {
            self.held.over();
        }
    }

    /// Somebody holds it, or releases it.
    #[cold]
    fn sentenced(&mut self) {
        self.held.serve(self.member.sentences(), Instant::now());
    }

    /// One `KVM_RUN`, and what comes of it.
    fn run_once<H: ExitHandler<V::Fd>>(
        &mut self,
        handler: &mut H,
        access_pending: &mut bool,
    ) -> Result<(), HaltReason<H::Stop>> {
        let result = self.vcpu.run();
        self.member.gate().leave();
        *access_pending = false;
        if matches!(&result, Err(errno) if errno.errno() == EAGAIN) {
            return self.refused();
        }
        self.refusals = 0;
        self.bus_errors(handler)?;
        let (id, halted) = (self.vcpu.id(), self.is_halted());
        let (area, fd) = self.vcpu.exit_area();
        let (mut exit, errno) = match result {
            Ok(()) => (Exit::decode(area).map_err(HaltReason::Undecodable)?, None),
            Err(errno) => match errno.errno() {
                // A kick or a signal.
                EINTR => return Ok(()),
                EFAULT | EHWPOISON => match Exit::decode(area) {
                    Ok(exit @ Exit::MemoryFault { .. }) => (exit, Some(errno)),
                    _ => return self.memory_error(handler, &MemoryError::run(errno)),
                },
                _ => return Err(HaltReason::RunFailed(errno)),
            },
        };
        match &mut exit {
            Exit::Shutdown => return Err(HaltReason::Shutdown),
            Exit::InternalError(error) => return Err(HaltReason::InternalError(Box::new(*error))),
            Exit::FailEntry { reason, cpu } => {
                let (reason, cpu) = (*reason, *cpu);
                return Err(HaltReason::FailEntry { reason, cpu });
            }
            Exit::Unknown { hardware_reason } => {
                let hardware_reason = *hardware_reason;
                return Err(HaltReason::Unknown { hardware_reason });
            }
            Exit::Intr => return Ok(()),
            Exit::MemoryFault { flags, addr, size } => {
                let error = MemoryError::fault(*addr, *flags, *size, errno);
                // So that a later EFAULT of an older kernel, which leaves the reason as it was, is not
                // taken for this one.
                forget(area);
                return self.memory_error(handler, &error);
            }
            Exit::MmioRead { addr, data } if handler.is_memory(*addr, false) => {
                // Whatever becomes of it, it is not what was left here.
                data.fill(0);
                *access_pending = true;
                let error = MemoryError::mmio(*addr, false, data.len());
                return self.memory_error(handler, &error);
            }
            Exit::MmioWrite { addr, data } if handler.is_memory(*addr, true) => {
                *access_pending = true;
                let error = MemoryError::mmio(*addr, true, data.len());
                return self.memory_error(handler, &error);
            }
            _ => {}
        }
        *access_pending = exit.is_access();
        match handler.exit(&VcpuView::new(id, fd, halted), exit) {
            Flow::Continue => {}
            Flow::Block => self.halted = true,
            Flow::Stop(value) => return Err(HaltReason::Handler(value)),
        }
        // What the handler ran into is told before the next entry.
        Ok(())
    }

    /// The `SIGBUS`es of this thread since the last look.
    #[inline]
    fn bus_errors<H: ExitHandler<V::Fd>>(
        &mut self,
        handler: &mut H,
    ) -> Result<(), HaltReason<H::Stop>> {
        while let Some(error) = self.next_bus_error() {
            let address = handler.guest_address(error.address);
            self.memory_error(handler, &MemoryError::signal(error, address))?;
        }
        Ok(())
    }

    fn next_bus_error(&mut self) -> Option<BusError> {
        let untold = self.untold.pop_front();
        untold.or_else(|| self.vcpu.take_bus_error())
    }

    #[cold]
    fn memory_error<H: ExitHandler<V::Fd>>(
        &mut self,
        handler: &mut H,
        error: &MemoryError,
    ) -> Result<(), HaltReason<H::Stop>> {
        match handler.memory_error(&self.view(), error) {
            Remedy::RunOn => Ok(()),
            Remedy::Halt => Err(HaltReason::MemoryError(*error)),
            Remedy::Stop(value) => Err(HaltReason::Handler(value)),
        }
    }

    /// `KVM_RUN` said `EAGAIN`; the module's doc says what that may be.
    fn refused<S>(&mut self) -> Result<(), HaltReason<S>> {
        if self.vcpu.waits_for_init() {
            self.refusals = 0;
            return Ok(());
        }
        self.refusals += 1;
        match self.refusals < MAX_REFUSALS {
            true => Ok(()),
            false => Err(HaltReason::Refused),
        }
    }

    fn serve<H: ExitHandler<V::Fd>>(
        &mut self,
        handler: &mut H,
        requests: Requests,
        access_pending: &mut bool,
    ) -> Result<(), HaltReason<H::Stop>> {
        let consumers = requests.consumers();
        if !consumers.is_empty() {
            match handler.requests(&self.view(), consumers) {
                Flow::Continue => {}
                Flow::Block => self.halted = true,
                Flow::Stop(value) => return Err(HaltReason::Handler(value)),
            }
            self.bus_errors(handler)?;
        }
        if requests.contains(Request::HOLD) {
            self.sentenced();
        }
        if requests.contains(Request::NMI) {
            match self.vcpu.nmi() {
                // KVM would end its own halt by it; this one is the loop's.
                Ok(()) => self.halted = false,
                Err(errno) => log::warn!("{}: KVM_NMI failed: {errno}", self.member.identity()),
            }
        }
        // Before parking: who waits for the acknowledgement must not wait for the end of a pause.
        if requests.contains(Request::ACKNOWLEDGE) {
            self.member.acknowledge();
        }
        if requests.contains(Request::CONTROL) {
            match self.member.verdict() {
                Verdict::Run => {}
                Verdict::Stop => return Err(HaltReason::Stopped),
                Verdict::Park => {
                    self.complete_access(handler, access_pending)?;
                    self.tell_the_clock();
                    let (member, mut parked) = self.at_the_set();
                    if member.park(&mut parked) == Verdict::Stop {
                        return Err(HaltReason::Stopped);
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets KVM finish the access that the last exit asked for, so that registers and memory are
    /// those after it. Completing one may ask for the next (an MMIO access in fragments), so this
    /// goes on until `KVM_RUN` has nothing to do and says `EINTR`; no guest code runs.
    fn complete_access<H: ExitHandler<V::Fd>>(
        &mut self,
        handler: &mut H,
        access_pending: &mut bool,
    ) -> Result<(), HaltReason<H::Stop>> {
        while *access_pending {
            self.member.gate().only_complete();
            self.run_once(handler, access_pending)?;
        }
        Ok(())
    }

    fn tell_the_clock(&mut self) {
        match self.vcpu.kvmclock_ctrl() {
            Ok(()) => {}
            // The guest has no kvm-clock (yet).
            Err(errno) if errno.errno() == EINVAL => {}
            // A guest may see a soft lockup; no reason to refuse to pause.
            Err(errno) => log::warn!(
                "{}: KVM_KVMCLOCK_CTRL failed: {errno}",
                self.member.identity()
            ),
        }
    }
}

impl<S> HaltReason<S> {
    /// For the log, where nothing is known of `S`.
    fn describe(&self) -> String {
        match self {
            Self::Handler(_) => "ended by its handler".into(),
            Self::Stopped => HaltReason::<()>::Stopped.to_string(),
            Self::Shutdown => HaltReason::<()>::Shutdown.to_string(),
            Self::InternalError(e) => HaltReason::<()>::InternalError(e.clone()).to_string(),
            Self::FailEntry { reason, cpu } => HaltReason::<()>::FailEntry {
                reason: *reason,
                cpu: *cpu,
            }
            .to_string(),
            Self::Unknown { hardware_reason } => HaltReason::<()>::Unknown {
                hardware_reason: *hardware_reason,
            }
            .to_string(),
            Self::Undecodable(e) => HaltReason::<()>::Undecodable(*e).to_string(),
            Self::RunFailed(e) => HaltReason::<()>::RunFailed(*e).to_string(),
            Self::MemoryError(e) => e.to_string(),
            Self::Refused => HaltReason::<()>::Refused.to_string(),
            Self::StartFailed(e) => HaltReason::<()>::StartFailed(*e).to_string(),
        }
    }
}
