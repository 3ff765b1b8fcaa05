// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control plane's way to a paused vCPU: a task that the vCPU's own thread does while it is parked.
//!
//! ```text
//!   Pause::with_vcpu                         the vCPU's thread, parked
//!   ────────────────                         ──────────────────────────
//!   lock; is it started and not gone?
//!   post the task; wake the parked    ────►  take it; unlock; do it; lock
//!   wait until it is no longer posted ◄────  strike it off; wake who waits
//! ```
//!
//! # Why on its own thread
//!
//! KVM would take the ioctls from any thread: `vcpu->mutex` makes them wait for each other. But the
//! vCPU belongs to its thread ([`Runner`](crate::Runner) has it, and gives it back in a
//! [`Halt`](crate::Halt)), which a second holder of the descriptor would undo; a vCPU that is still in
//! `KVM_RUN` holds the mutex, so that the control plane would sleep in the kernel without a way out;
//! state that another CPU asks for has to be fetched from the one that has it loaded (an interrupt for
//! each, on Intel hosts); and the vCPUs' own threads save all vCPUs at once.
//!
//! # Why nobody waits for ever
//!
//! All of it happens under the control's one lock. A task is posted only for a vCPU that is inside
//! [`Runner::run`](crate::Runner::run) and has not left, and only under a [`Pause`], which lives until
//! the task is done or struck off: so the vCPU is parked, or on its way there, or on its way out. Parked
//! it does the task; a stop, a failed ioctl or a panic (the task's own too) takes it out through
//! [`Member`](crate::control::Member)'s destructor, which strikes its tasks off and wakes who waits.

use std::any::{Any, TypeId};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::blocker::Blocker;
use crate::control::{Control, ControlError, Enrolled, Pause, State};
use crate::identity::VcpuId;
use crate::memory_error::{BusError, BusErrorCode};
use crate::run::{RunVcpu, VcpuView};
use crate::sync::{Mutex, MutexGuard, lock, wait, wait_for};

/// What is done with a vCPU, on its thread.
pub(crate) type Task = Box<dyn FnOnce(VcpuId, &mut dyn OnThread) + Send>;

/// What a task has of the vCPU whose thread does it.
pub(crate) trait OnThread {
    /// The `V::Fd` of its [`RunVcpu`].
    fn fd(&mut self) -> &dyn Any;

    /// Its handler said [`Flow::Block`](crate::Flow::Block), and nobody has woken it since.
    fn is_halted(&self) -> bool;

    /// Whether the thread has run into memory that is lost since this was asked last. What it has is kept
    /// for the handler.
    fn ran_into_lost_memory(&mut self) -> bool;
}

/// A vCPU that is parked.
pub(crate) struct Parked<'a, V> {
    pub(crate) vcpu: &'a mut V,
    /// The errors that its handler has not been told of.
    pub(crate) untold: &'a mut VecDeque<BusError>,
    pub(crate) halted: bool,
    /// Who wakes it may do so while it is parked.
    pub(crate) blocker: &'a Blocker,
}

impl<V: RunVcpu> OnThread for Parked<'_, V> {
    fn fd(&mut self) -> &dyn Any {
        self.vcpu.exit_area().1
    }

    fn is_halted(&self) -> bool {
        self.halted && !self.blocker.is_woken()
    }

    fn ran_into_lost_memory(&mut self) -> bool {
        let mut ran_into = false;
        while let Some(error) = self.vcpu.take_bus_error() {
            // Nobody has run into one that is told early.
            ran_into |= error.code != BusErrorCode::ActionOptional;
            self.untold.push_back(error);
        }
        ran_into
    }
}

/// What a task leaves for who asked: nothing as long as it is not done.
type Slot<R> = Arc<Mutex<Option<Result<R, ControlError>>>>;

/// A task that is not done.
struct Posted {
    /// The vCPU's key in the control: its number may be another's already.
    vcpu: usize,
    ticket: u64,
    /// None while the vCPU's thread is at it.
    task: Option<Task>,
}

/// The tasks of a set, in the order of posting. A part of the control's state, under its lock.
#[derive(Default)]
pub(crate) struct Tasks {
    posted: Vec<Posted>,
    tickets: u64,
}

impl std::fmt::Debug for Tasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} posted", self.posted.len())
    }
}

impl Tasks {
    fn post(&mut self, vcpu: usize, task: Task) -> u64 {
        self.tickets += 1;
        self.posted.push(Posted {
            vcpu,
            ticket: self.tickets,
            task: Some(task),
        });
        self.tickets
    }

    /// A task for this vCPU, to be done without the lock, and its ticket.
    pub(crate) fn take(&mut self, vcpu: usize) -> Option<(u64, Task)> {
        let mine = |posted: &&mut Posted| posted.vcpu == vcpu && posted.task.is_some();
        let posted = self.posted.iter_mut().find(mine)?;
        Some((posted.ticket, posted.task.take()?))
    }

    /// A task is over.
    pub(crate) fn strike_off(&mut self, ticket: u64) {
        self.posted.retain(|posted| posted.ticket != ticket);
    }

    /// This vCPU has left, and does no more. What it has not done is to be dropped without the lock: it may
    /// hold what takes the lock to drop, such as a [`Pause`].
    #[must_use]
    pub(crate) fn strike_off_all_of(&mut self, vcpu: usize) -> Vec<Task> {
        let its = self.posted.extract_if(.., |posted| posted.vcpu == vcpu);
        its.filter_map(|posted| posted.task).collect()
    }

    fn has_any(&self, tickets: &[u64]) -> bool {
        self.posted.iter().any(|p| tickets.contains(&p.ticket))
    }
}

/// A task that calls `f` and leaves its result where the second half finds it.
fn package<F: 'static, R: Send + 'static>(
    f: impl FnOnce(&VcpuView<'_, F>) -> R + Send + 'static,
) -> (Task, Slot<R>) {
    let slot = Arc::new(Mutex::new(None));
    let result = slot.clone();
    let task = move |id, thread: &mut dyn OnThread| {
        // What came before is not this task's.
        thread.ran_into_lost_memory();
        let halted = thread.is_halted();
        // The vCPU's kind was compared before the task was posted.
        if let Some(fd) = thread.fd().downcast_ref::<F>() {
            let value = f(&VcpuView::new(id, fd, halted));
            *lock(&result) = Some(match thread.ran_into_lost_memory() {
                // It was computed from zeros that no memory held.
                true => Err(ControlError::MemoryError(id)),
                false => Ok(value),
            });
        }
    };
    (Box::new(task), slot)
}

impl Pause {
    /// Lets the thread of a paused vCPU call `f` with it, and waits for the result: registers, whole
    /// state and all else that [`VcpuView::fd`] gives, as they are behind the access that the vCPU was
    /// at, and whether it is halted in user space ([`VcpuView::is_halted`]). Waits for this vCPU's handler too, if the pause began without waiting
    /// ([`VcpuSet::begin_pause`](crate::VcpuSet::begin_pause)).
    ///
    /// `F` is the vCPU's [`RunVcpu::Fd`](crate::RunVcpu::Fd): `kvm_ioctls::VcpuFd` with KVM. A panic in
    /// `f` ends the vCPU's thread, as one in a handler does.
    ///
    /// # Errors
    /// [`ControlError::NoSuchVcpu`]; [`ControlError::NotStarted`] of a vCPU that no thread runs (its
    /// [`Runner`](crate::Runner) has it); [`ControlError::OtherFd`]; [`ControlError::OnVcpuThread`]: `f`
    /// is then not called. [`ControlError::Left`] if the vCPU leaves before `f` has returned.
    /// [`ControlError::MemoryError`] if `f` ran into guest memory that is lost, where the process's `SIGBUS`
    /// is caught (`BusErrors`): it went on with zeros, so its result is dropped. The vCPU's handler gets the
    /// [`MemoryError`](crate::MemoryError) when the pause ends. Asked once more, `f` finds the zeros that
    /// took the page's place, and no error.
    pub fn with_vcpu<F: 'static, R: Send + 'static>(
        &self,
        id: VcpuId,
        f: impl FnOnce(&VcpuView<'_, F>) -> R + Send + 'static,
    ) -> Result<R, ControlError> {
        let (task, slot) = package(f);
        let (mut state, vcpus) = self.control().at_hand::<F>(Some(id))?;
        let Some(&(_, vcpu)) = vcpus.first() else {
            return Err(ControlError::NoSuchVcpu(id));
        };
        let ticket = state.tasks.post(vcpu, task);
        self.control().wait_for(state, &[ticket]);
        let result = lock(&slot).take();
        result.unwrap_or(Err(ControlError::Left(id)))
    }

    /// The same of every vCPU that is enrolled, each on its own thread, all at once. The results are in
    /// the order of enrolment.
    ///
    /// # Errors
    /// As [`Pause::with_vcpu`]. One vCPU that is not started or not of this kind, and `f` is called for
    /// none. [`ControlError::Left`] and [`ControlError::MemoryError`] name the first of whom this is so; `f`
    /// may have been called for the others.
    pub fn with_each<F: 'static, R: Send + 'static>(
        &self,
        f: impl Fn(&VcpuView<'_, F>) -> R + Send + Sync + 'static,
    ) -> Result<Vec<(VcpuId, R)>, ControlError> {
        let f = Arc::new(f);
        let (mut state, vcpus) = self.control().at_hand::<F>(None)?;
        let (mut tickets, mut slots) = (Vec::new(), Vec::new());
        for (id, vcpu) in vcpus {
            let f = f.clone();
            let (task, slot) = package(move |view: &VcpuView<'_, F>| f(view));
            tickets.push(state.tasks.post(vcpu, task));
            slots.push((id, slot));
        }
        self.control().wait_for(state, &tickets);
        let result = |(id, slot): (VcpuId, Slot<R>)| match lock(&slot).take() {
            Some(result) => Ok((id, result?)),
            None => Err(ControlError::Left(id)),
        };
        slots.into_iter().map(result).collect()
    }
}

impl Pause {
    /// Waits until each vCPU that is enrolled has its thread, up to `patience`: before that it cannot be asked
    /// ([`ControlError::NotStarted`]). Whether each has.
    ///
    /// A thread that is spawned comes to its vCPU when the host lets it, and a pause may hold before.
    pub fn wait_started(&self, patience: Duration) -> bool {
        let begun = Instant::now();
        loop {
            let members = lock(&self.control().members);
            let state = lock(&self.control().state);
            let has_thread =
                |member: &Arc<Enrolled>| state.threads.contains(&Arc::as_ptr(member).addr());
            if members.iter().all(has_thread) {
                return true;
            }
            drop(members);
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return false;
            }
            drop(wait_for(&self.control().changed, state, left));
        }
    }
}

/// The held lock, and the vCPUs that may be asked while it is: their numbers and keys.
type AtHand<'a> = (MutexGuard<'a, State>, Vec<(VcpuId, usize)>);

impl Control {
    /// The vCPUs (all, or one) that tasks may be posted for as long as the lock is held, with their
    /// keys: each is inside `Runner::run`, has not left, and has an `F`.
    fn at_hand<F: 'static>(
        self: &Arc<Self>,
        only: Option<VcpuId>,
    ) -> Result<AtHand<'_>, ControlError> {
        self.not_on_vcpu_thread()?;
        let members = lock(&self.members);
        let state = lock(&self.state);
        let wanted = |id| only.is_none_or(|only| only == id);
        let mut vcpus = Vec::new();
        for member in members.iter().filter(|member| wanted(member.id)) {
            // A member that has not left the list has not struck off its tasks either: it takes both
            // locks to leave, in this order.
            let key = Arc::as_ptr(member).addr();
            if !state.threads.contains(&key) {
                return Err(ControlError::NotStarted(member.id));
            }
            if member.fd != TypeId::of::<F>() {
                return Err(ControlError::OtherFd(member.id));
            }
            vcpus.push((member.id, key));
        }
        Ok((state, vcpus))
    }

    /// Wakes the parked vCPUs, and waits until none of these tasks is posted any more.
    fn wait_for(&self, mut state: MutexGuard<'_, State>, tickets: &[u64]) {
        // All are woken; those that have nothing to do park again.
        self.resumed.notify_all();
        while state.tasks.has_any(tickets) {
            state = wait(&self.changed, state);
        }
    }
}
