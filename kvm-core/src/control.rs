// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All vCPUs of a VM under one hand: enrol, pause, resume, stop, request.
//!
//! ```text
//!            enroll            run               pause
//!   RunVcpu ───────► enrolled ─────► active ◄─────────────► parked
//!                                      │      resume          │
//!                                      └────────► gone ◄──────┘
//!                                          halt, stop, death
//! ```
//!
//! A pause is a counted barrier: it asks every member to look here, and sleeps on a condition
//! variable until no member is active. A member is active from the moment when its thread passed
//! this lock until it parks or leaves under the same lock, so there is nothing to poll. A thread
//! that halts, fails or unwinds leaves through [`Member`]'s destructor, and one that was never
//! started is not active; neither can leave a pause or a stop hanging.
//!
//! A parked thread does what it is asked (`access.rs`) and parks again.
//!
//! Lock order: `members`, then `state`; a vCPU's ledger is the last of all. vCPU threads take `state` when they start, park, acknowledge
//! and leave, and `members` when they leave; on the way from exit to entry they take none.

use std::any::TypeId;
use std::cell::RefCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::access::{OnThread, Tasks};
use crate::blocker::{Blocker, Waker};
use crate::halt_poll::HaltPolling;
use crate::hold::{Ledger, Look, SLICE, Sentences};
use crate::identity::{Identity, VcpuId};
use crate::kick::Gate;
use crate::mode::GuestMode;
use crate::request::{Request, Requests};
use crate::run::{ExitHandler, Halt, RunVcpu, Runner};
use crate::sync::{
    AtomicU64, Condvar, Mutex, MutexGuard, Ordering, lock, thread_local, wait, wait_for,
};
use crate::throttle::{Throttle, ThrottleError};

thread_local! {
    /// The sets whose vCPUs this thread is running, by address: one, or several where a handler runs another
    /// VM's vCPU.
    // Loom's twin of the macro knows no `const` blocks.
    #[allow(clippy::missing_const_for_thread_local)]
    static RUNNING: RefCell<Vec<usize>> = RefCell::new(Vec::new());
}

/// Why a set's control refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The caller is a vCPU thread of this very set: it would wait for itself.
    #[error("a vCPU thread cannot wait for its own VM; use the begin_… form or another thread")]
    OnVcpuThread,
    /// No vCPU of this number is enrolled.
    #[error("no vCPU {0} is enrolled")]
    NoSuchVcpu(VcpuId),
    /// A vCPU of this number is enrolled already.
    #[error("vCPU {0} is enrolled already")]
    AlreadyEnrolled(VcpuId),
    /// The vCPU is enrolled, and no thread runs it: its `Runner` has it.
    #[error("vCPU {0} is not started; use its Runner's vcpu_mut")]
    NotStarted(VcpuId),
    /// The vCPU left before it had done what it was asked: it was stopped, or ended.
    #[error("vCPU {0} left its thread meanwhile")]
    Left(VcpuId),
    /// The vCPU is not of the kind that was asked for.
    #[error("vCPU {0} has another type of descriptor than was asked for")]
    OtherFd(VcpuId),
    /// What the vCPU's thread was asked touched guest memory that is lost: its answer is worth nothing.
    #[error(
        "vCPU {0}'s thread ran into guest memory that is lost; what it was asked has no answer"
    )]
    MemoryError(VcpuId),
}

/// What a vCPU thread is to do, by the control state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Run,
    Park,
    Stop,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    /// Pauses that are held. The set runs at 0.
    pauses: usize,
    stopping: bool,
    /// Threads that may enter the guest.
    active: usize,
    /// Threads inside `Runner::run`, active or parked.
    started: usize,
    /// Incremented by each who waits for acknowledgements, under the lock under which it then asks.
    epoch: u64,
    /// The members inside `Runner::run`, by key.
    pub(crate) threads: Vec<usize>,
    /// What parked members are asked to do (`access.rs`).
    pub(crate) tasks: Tasks,
    /// A [`Throttle`] is there.
    throttled: bool,
}

impl State {
    fn verdict(&self) -> Verdict {
        match (self.stopping, self.pauses) {
            (true, _) => Verdict::Stop,
            (false, 0) => Verdict::Run,
            (false, _) => Verdict::Park,
        }
    }
}

/// One vCPU as the set knows it.
pub(crate) struct Enrolled {
    pub(crate) id: VcpuId,
    /// The type of its `RunVcpu::Fd`.
    pub(crate) fd: TypeId,
    gate: Gate,
    /// The newest epoch acknowledged, or `u64::MAX` once the vCPU has left. Written under the state
    /// lock, so Relaxed.
    acknowledged: AtomicU64,
    /// How long it is held out of the guest (`hold.rs`).
    ledger: Mutex<Ledger>,
}

impl Enrolled {
    fn change_hold(&self, change: impl FnOnce(&mut Ledger)) {
        change(&mut lock(&self.ledger));
        self.gate.ask(Requests::default().with(Request::HOLD));
    }
}

pub(crate) struct Control {
    identity: Identity,
    pub(crate) members: Mutex<Vec<Arc<Enrolled>>>,
    pub(crate) state: Mutex<State>,
    /// vCPU threads wait here for a pause to end, or for a task.
    pub(crate) resumed: Condvar,
    /// The control plane waits here for vCPU threads.
    pub(crate) changed: Condvar,
}

impl Control {
    pub(crate) fn not_on_vcpu_thread(self: &Arc<Self>) -> Result<(), ControlError> {
        let address = Arc::as_ptr(self).addr();
        if RUNNING.with(|running| running.borrow().contains(&address)) {
            return Err(ControlError::OnVcpuThread);
        }
        Ok(())
    }

    fn ask_all(&self, requests: Requests) {
        for member in lock(&self.members).iter() {
            member.gate.ask(requests);
        }
    }

    /// False: there is a throttle.
    pub(crate) fn begin_throttle(&self) -> bool {
        !std::mem::replace(&mut lock(&self.state).throttled, true)
    }

    pub(crate) fn end_throttle(&self) {
        lock(&self.state).throttled = false;
    }

    /// Holds those that have run for a slice, and says when the next may have.
    pub(crate) fn charge_all(&self, percent: u8) -> Duration {
        let mut next = SLICE;
        for member in lock(&self.members).iter() {
            let Some(cpu) = member.gate.cpu_time() else {
                continue;
            };
            let look = lock(&member.ledger).look(cpu, percent);
            match look {
                Look::Hold => drop(member.gate.ask(Requests::default().with(Request::HOLD))),
                Look::Again(after) => next = next.min(after),
            }
        }
        next
    }

    /// Nobody owes a throttle anything.
    pub(crate) fn lift_all(&self) {
        for member in lock(&self.members).iter() {
            member.change_hold(Ledger::lift);
        }
    }

    fn resume(&self) {
        let mut state = lock(&self.state);
        state.pauses = state.pauses.saturating_sub(1);
        let run = state.pauses == 0;
        // Unlocked first, or each vCPU that is woken would have to wait for the lock. A pause that begins
        // in between is seen by those that wake for nothing.
        drop(state);
        if run {
            self.resumed.notify_all();
        }
    }
}

/// The vCPUs of a VM: the handle that starts, pauses, resumes, stops and kicks them. Cheap to clone.
///
/// Every method may be called from any thread. Those that wait ([`VcpuSet::pause`], [`VcpuSet::pause_within`],
/// [`VcpuSet::stop`], [`VcpuSet::wait`], [`VcpuSet::request_all_and_wait`]) refuse on a vCPU thread
/// of the same set. A wait is for handlers to return and no longer than that, and with
/// [`VcpuSet::pause_within`] no longer than it is told; it never sleeps for a time and never polls.
#[derive(Clone)]
pub struct VcpuSet {
    control: Arc<Control>,
}

impl VcpuSet {
    /// An empty set, running. `identity` is what its log lines begin with.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        Self {
            control: Arc::new(Control {
                identity,
                members: Mutex::new(Vec::new()),
                state: Mutex::new(State::default()),
                resumed: Condvar::new(),
                changed: Condvar::new(),
            }),
        }
    }

    /// Takes a vCPU in. It runs once [`Runner::run`] is called on a thread of the consumer's; at any
    /// time, before or after others run, while the set is paused (then it parks first) or stopped
    /// (then it returns at once).
    ///
    /// # Errors
    /// [`ControlError::AlreadyEnrolled`].
    pub fn enroll<V: RunVcpu>(&self, vcpu: V) -> Result<Runner<V>, ControlError> {
        let id = vcpu.id();
        let mut members = lock(&self.control.members);
        if members.iter().any(|member| member.id == id) {
            return Err(ControlError::AlreadyEnrolled(id));
        }
        let blocker = Blocker::new(HaltPolling::OFF);
        let enrolled = Arc::new(Enrolled {
            id,
            fd: TypeId::of::<V::Fd>(),
            gate: Gate::new(vcpu.doorbell(), blocker.waker()),
            acknowledged: AtomicU64::new(0),
            ledger: Mutex::default(),
        });
        members.push(enrolled.clone());
        drop(members);
        let identity = self.control.identity.vcpu(id);
        let control = self.control.clone();
        Ok(Runner::new(
            vcpu,
            Member {
                control,
                enrolled,
                identity,
                started: false,
            },
            blocker,
        ))
    }

    /// Enrols a vCPU and runs it on a new thread named `name`: the spawner for those who need no
    /// other (no affinity, cgroup or seccomp of its own). Who wakes a vCPU that says
    /// [`Flow::Block`](crate::Flow::Block) asks [`VcpuSet::waker`] for its waker.
    ///
    /// # Errors
    /// `AlreadyExists` as [`VcpuSet::enroll`], or what the system says about a new thread; the vCPU
    /// has then left the set again.
    #[allow(clippy::type_complexity)]
    pub fn spawn<V, H>(
        &self,
        name: &str,
        vcpu: V,
        handler: H,
    ) -> io::Result<JoinHandle<Halt<V, H, H::Stop>>>
    where
        V: RunVcpu + 'static,
        H: ExitHandler<V::Fd> + Send + 'static,
        H::Stop: Send + 'static,
    {
        let runner = self
            .enroll(vcpu)
            .map_err(|e| io::Error::new(io::ErrorKind::AlreadyExists, e))?;
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let Err(halt) = runner.run(handler);
                halt
            })
    }

    /// Brings every vCPU out of the guest and keeps it out until the [`Pause`] is dropped. Returns
    /// when no vCPU runs guest code: each has completed the access it was at and told kvm-clock
    /// (`KVM_KVMCLOCK_CTRL`), or has left. Pauses nest: the VM runs when none is held.
    ///
    /// Blocks for the handlers that are at work.
    ///
    /// # Errors
    /// [`ControlError::OnVcpuThread`].
    pub fn pause(&self) -> Result<Pause, ControlError> {
        self.not_on_vcpu_thread()?;
        let pause = self.begin_pause();
        let mut state = lock(&self.control.state);
        while state.active > 0 {
            state = wait(&self.control.changed, state);
        }
        drop(state);
        Ok(pause)
    }

    /// As [`VcpuSet::pause`], but waits no longer than `patience` for the handlers that are at work, for those whose
    /// device may never come to an end. `None`: one is at work still, and no pause holds; those vCPUs that had parked
    /// run on.
    ///
    /// # Errors
    /// [`ControlError::OnVcpuThread`].
    pub fn pause_within(&self, patience: Duration) -> Result<Option<Pause>, ControlError> {
        self.not_on_vcpu_thread()?;
        let begun = Instant::now();
        let pause = self.begin_pause();
        let mut state = lock(&self.control.state);
        while state.active > 0 {
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                // Unlocked first: the pause takes the lock to end.
                drop(state);
                return Ok(None);
            }
            state = wait_for(&self.control.changed, state, left);
        }
        drop(state);
        Ok(Some(pause))
    }

    /// As [`VcpuSet::pause`], but does not wait: vCPUs park as they come out. May be called by a
    /// handler, whose own vCPU parks before it runs guest code again.
    #[must_use = "the pause ends when it is dropped"]
    pub fn begin_pause(&self) -> Pause {
        lock(&self.control.state).pauses += 1;
        let pause = Pause {
            control: self.control.clone(),
        };
        self.control
            .ask_all(Requests::default().with(Request::CONTROL));
        pause
    }

    /// Halts every vCPU with [`HaltReason::Stopped`](crate::HaltReason::Stopped), paused ones
    /// too, and waits until the last has left. For good: who is enrolled later halts at once.
    ///
    /// # Errors
    /// [`ControlError::OnVcpuThread`].
    pub fn stop(&self) -> Result<(), ControlError> {
        self.not_on_vcpu_thread()?;
        self.begin_stop();
        self.wait()
    }

    /// As [`VcpuSet::stop`], but does not wait. May be called by a handler.
    pub fn begin_stop(&self) {
        let mut state = lock(&self.control.state);
        state.stopping = true;
        self.control.resumed.notify_all();
        drop(state);
        self.control
            .ask_all(Requests::default().with(Request::CONTROL));
    }

    /// Waits until no vCPU of the set is inside [`Runner::run`], for whatever reason.
    ///
    /// # Errors
    /// [`ControlError::OnVcpuThread`].
    pub fn wait(&self) -> Result<(), ControlError> {
        self.not_on_vcpu_thread()?;
        let mut state = lock(&self.control.state);
        while state.started > 0 {
            state = wait(&self.control.changed, state);
        }
        Ok(())
    }

    /// `kvm_vcpu_kick`: makes a vCPU come out of the guest and go round once. Costs a signal only if
    /// it is in the guest; a vCPU that waits for its start-up interrupt (SIPI) comes out too.
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`].
    pub fn kick(&self, id: VcpuId) -> Result<(), ControlError> {
        self.ask_one(id, Request::KICK)
    }

    /// `KVM_NMI`, from any thread: the vCPU is brought out of the guest, raises a non-maskable interrupt
    /// for it on its own thread, and takes it as it goes back in; one that sleeps in HLT wakes by it, in KVM or
    /// in user space ([`Flow::Block`](crate::Flow::Block)).
    /// (The ioctl itself would wait for the vCPU to come out.) A vCPU that is paused takes it when it is
    /// resumed. Two that come before the vCPU has served the first are one. An AP that the guest has not
    /// started keeps it pending, and goes round without sleep until it is started.
    ///
    /// What KVM says is logged and not told here: `EINVAL` and its like on a host without
    /// [`Capabilities::user_nmi`](crate::Capabilities::user_nmi).
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`].
    pub fn nmi(&self, id: VcpuId) -> Result<(), ControlError> {
        self.ask_one(id, Request::NMI)
    }

    /// `kvm_make_request` and a kick: the vCPU's handler gets `request`
    /// ([`ExitHandler::requests`]) before the vCPU runs guest code again. Made twice before it is
    /// served, it is served once. What the caller wrote before is visible to the handler.
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`].
    pub fn request(&self, id: VcpuId, request: Request) -> Result<(), ControlError> {
        self.ask_one(id, request)
    }

    /// [`VcpuSet::request`], of every vCPU.
    pub fn request_all(&self, request: Request) {
        self.control.ask_all(Requests::default().with(request));
    }

    /// `kvm_make_all_cpus_request` with `KVM_REQUEST_WAIT`: when it returns, no vCPU runs guest code
    /// that has not served `request`. A vCPU that was in the guest has served it; one that was
    /// outside (in a handler, parked, not started) serves it before it goes in.
    ///
    /// Blocks until those in the guest have come out and served it.
    ///
    /// # Errors
    /// [`ControlError::OnVcpuThread`].
    pub fn request_all_and_wait(&self, request: Request) -> Result<(), ControlError> {
        self.not_on_vcpu_thread()?;
        let both = Requests::default().with(request).with(Request::ACKNOWLEDGE);
        let members = lock(&self.control.members);
        // The state lock is held from the new epoch until all are asked: a vCPU that serves an
        // earlier waiter's request between the two would acknowledge this epoch without having been
        // asked for it, and could be back in the guest by the time that it is.
        let mut state = lock(&self.control.state);
        state.epoch += 1;
        let epoch = state.epoch;
        let waited_for: Vec<_> = members
            .iter()
            .filter(|member| member.gate.ask(both) != GuestMode::OutsideGuestMode)
            .cloned()
            .collect();
        drop(members);
        while waited_for
            .iter()
            .any(|m| m.acknowledged.load(Ordering::Relaxed) < epoch)
        {
            state = wait(&self.control.changed, state);
        }
        Ok(())
    }

    /// Keeps a vCPU out of the guest for `time`, or for so much longer where it is held already: a year at most. It sleeps
    /// meanwhile; a pause, a stop, a kick and requests wake it and are served at once, and what is left of the hold
    /// goes on behind them. Interrupts wait for its next entry. In a pause the time goes on as well.
    ///
    /// Does not block. May be called by a handler, also for its own vCPU: who answers a full dirty ring by slowing the one
    /// who filled it, for instance.
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`].
    pub fn hold(&self, id: VcpuId, time: Duration) -> Result<(), ControlError> {
        self.find(id)?.change_hold(|ledger| ledger.hold(time));
        Ok(())
    }

    /// Ends a vCPU's [hold](Self::hold) at once; one that is not held runs on. What it sleeps for a
    /// [throttle](Self::throttle) it sleeps on. Does not block.
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`].
    pub fn release(&self, id: VcpuId) -> Result<(), ControlError> {
        self.find(id)?.change_hold(Ledger::release);
        Ok(())
    }

    /// What slows all vCPUs down, from 0 % on: those that are enrolled later too. Each sleeps as if it were
    /// [held](Self::hold), and besides what it is held for, for a part of its time, in slices of about 10 ms that it ran (2 ms at 99 %); one that sleeps in HLT is
    /// left alone. It has a thread of its own.
    ///
    /// ([`Doorbell::cpu_time`](crate::Doorbell::cpu_time) tells how long a vCPU ran; without it one is not slowed.)
    ///
    /// # Errors
    /// [`ThrottleError`].
    pub fn throttle(&self) -> Result<Throttle, ThrottleError> {
        Throttle::new(&self.control)
    }

    /// Wakes a vCPU where it is halted in user space ([`Flow::Block`](crate::Flow::Block)): its
    /// [`Runner::waker`], also once a thread has the runner. A waker outlives its vCPU, and then wakes
    /// nobody.
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`].
    pub fn waker(&self, id: VcpuId) -> Result<Waker, ControlError> {
        self.find(id).map(|member| member.gate.waker())
    }

    /// The mode of a vCPU at some moment of this call (`vcpu->mode`); a hint, as it changes.
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`].
    pub fn mode(&self, id: VcpuId) -> Result<GuestMode, ControlError> {
        self.find(id).map(|member| member.gate.mode())
    }

    /// The numbers of those enrolled, in the order in which they came (`kvm_for_each_vcpu`).
    #[must_use]
    pub fn ids(&self) -> Vec<VcpuId> {
        lock(&self.control.members)
            .iter()
            .map(|member| member.id)
            .collect()
    }

    /// How many vCPU threads may enter the guest now; 0 while a pause holds.
    #[must_use]
    pub fn active(&self) -> usize {
        lock(&self.control.state).active
    }

    fn ask_one(&self, id: VcpuId, request: Request) -> Result<(), ControlError> {
        self.find(id)?.gate.ask(Requests::default().with(request));
        Ok(())
    }

    fn find(&self, id: VcpuId) -> Result<Arc<Enrolled>, ControlError> {
        let members = lock(&self.control.members);
        let found = members.iter().find(|member| member.id == id);
        found.cloned().ok_or(ControlError::NoSuchVcpu(id))
    }

    fn not_on_vcpu_thread(&self) -> Result<(), ControlError> {
        self.control.not_on_vcpu_thread()
    }
}

impl std::fmt::Debug for VcpuSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = lock(&self.control.state);
        f.debug_struct("VcpuSet")
            .field("identity", &self.control.identity)
            .field("state", &*state)
            .finish_non_exhaustive()
    }
}

/// A pause that holds. Dropped, it ends, and with the last one the vCPUs run on. Meanwhile the vCPUs'
/// state can be had ([`Pause::with_vcpu`], [`Pause::with_each`]).
#[must_use = "the pause ends when it is dropped"]
pub struct Pause {
    control: Arc<Control>,
}

impl Pause {
    /// Ends the pause: the same as dropping it, as a word. Does not wait for vCPUs to be in the guest.
    pub fn resume(self) {}

    pub(crate) const fn control(&self) -> &Arc<Control> {
        &self.control
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        self.control.resume();
    }
}

impl std::fmt::Debug for Pause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pause of {}", self.control.identity)
    }
}

/// A vCPU's place in its set; leaves it when dropped.
pub(crate) struct Member {
    control: Arc<Control>,
    enrolled: Arc<Enrolled>,
    identity: Identity,
    /// Counted in `State::started` and `State::active`.
    started: bool,
}

impl Member {
    pub(crate) fn gate(&self) -> &Gate {
        &self.enrolled.gate
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The thread begins: active at once, or when the pause that holds is over.
    ///
    /// `thread` is what tasks get meanwhile.
    pub(crate) fn start(&mut self, thread: &mut dyn OnThread) -> Verdict {
        let address = Arc::as_ptr(&self.control).addr();
        RUNNING.with(|running| running.borrow_mut().push(address));
        let mut state = lock(&self.control.state);
        state.started += 1;
        state.threads.push(self.key());
        self.started = true;
        self.control.changed.notify_all();
        state = self.until_resumed(state, thread);
        state.active += 1;
        state.verdict()
    }

    pub(crate) fn verdict(&self) -> Verdict {
        lock(&self.control.state).verdict()
    }

    /// Is not active until no pause holds. Never returns [`Verdict::Park`]. `thread` is what tasks get.
    pub(crate) fn park(&self, thread: &mut dyn OnThread) -> Verdict {
        let mut state = lock(&self.control.state);
        if state.verdict() == Verdict::Park {
            state.active -= 1;
            if state.active == 0 {
                self.control.changed.notify_all();
            }
            state = self.until_resumed(state, thread);
            state.active += 1;
        }
        state.verdict()
    }

    /// Sleeps while a pause holds, but for the tasks that it is given (`access.rs`).
    fn until_resumed<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        thread: &mut dyn OnThread,
    ) -> MutexGuard<'a, State> {
        while state.verdict() == Verdict::Park {
            let Some((ticket, task)) = state.tasks.take(self.key()) else {
                state = wait(&self.control.resumed, state);
                continue;
            };
            drop(state);
            let done = catch_unwind(AssertUnwindSafe(|| task(self.enrolled.id, thread)));
            state = lock(&self.control.state);
            state.tasks.strike_off(ticket);
            self.control.changed.notify_all();
            if let Err(panic) = done {
                // The destructor takes a started member for an active one.
                state.active += 1;
                drop(state);
                resume_unwind(panic);
            }
        }
        state
    }

    /// What is to be done about its hold, once.
    pub(crate) fn sentences(&self) -> Sentences {
        lock(&self.enrolled.ledger).take()
    }

    /// What tells it from every other member that is alive.
    fn key(&self) -> usize {
        Arc::as_ptr(&self.enrolled).addr()
    }

    /// Requests were served, outside the guest.
    pub(crate) fn acknowledge(&self) {
        let state = lock(&self.control.state);
        self.enrolled
            .acknowledged
            .store(state.epoch, Ordering::Relaxed);
        // Unlocked first, or who is woken would have to wait for the lock.
        drop(state);
        self.control.changed.notify_all();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        lock(&self.control.members).retain(|member| !Arc::ptr_eq(member, &self.enrolled));
        let mut not_done = Vec::new();
        let mut state = lock(&self.control.state);
        self.enrolled
            .acknowledged
            .store(u64::MAX, Ordering::Relaxed);
        if self.started {
            state.active -= 1;
            state.started -= 1;
            let key = self.key();
            state.threads.retain(|thread| *thread != key);
            not_done = state.tasks.strike_off_all_of(key);
            let address = Arc::as_ptr(&self.control).addr();
            // Nobody asks any more where a thread's end has taken the list away.
            let _ = RUNNING.try_with(|running| {
                let mut running = running.borrow_mut();
                if let Some(last) = running.iter().rposition(|set| *set == address) {
                    running.remove(last);
                }
            });
        }
        // One who waits for this vCPU's acknowledgement, or for the last to leave, must look again.
        self.control.changed.notify_all();
        drop(state);
        drop(not_done);
    }
}
