// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Between the vCPUs' threads and the debugger's: how vCPUs are stopped, and what they do while they are.
//!
//! ```text
//!   debugger                                        a vCPU's thread
//!   ────────                                        ───────────────
//!                    ◄── event, begin_pause ──      a debug exit: it parks, and so do the others
//!   pause   (all are out, accesses completed)
//!   request DEBUG
//!   resume                                          takes the request before it enters the guest
//!   job     ──────────────────────────────────►     serves jobs: registers, translation, arming…
//!   go      ──────────────────────────────────►     runs guest code
//! ```
//!
//! Pause, request and resume are [`VcpuSet`]'s; its gate sees to it that a request made while a vCPU
//! is parked is served before the vCPU runs guest code, so no instruction is executed between the
//! pause and the jobs. The pause comes first because it completes the access that a vCPU is at:
//! registers are those behind it.
//!
//! A vCPU that waits for jobs is, for its set, in its handler. So another pause of the same set would wait
//! until the debugger lets the guest go on, and who wants one asks first ([`Link::is_holding`]); the end of the
//! machine does not wait, for [`Link::close`] lets all of them go.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_core::arch::x86_64::{DebugCause, GuestDebug, Injection};
use kvm_core::{Pause, Request, VcpuId, VcpuSet, VcpuView};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The request of a vCPU to serve the debugger's jobs.
pub(crate) const DEBUG: Option<Request> = Request::consumer(8);

/// A debug exit that is the debugger's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// Whose.
    pub(crate) vcpu: VcpuId,
    /// Why.
    pub(crate) cause: DebugCause,
}

/// What a vCPU runs with.
#[derive(Clone, Debug, Default)]
pub(super) struct Armed {
    pub(super) debug: GuestDebug,
    /// Where an `int3` of the debugger's is.
    pub(super) patches: Arc<[GuestAddress]>,
}

type Call = Box<dyn for<'a, 'b> FnOnce(&'a VcpuView<'b, VcpuFd>) + Send>;

/// Something that a stopped vCPU's thread does.
pub(super) enum Job {
    /// Call this.
    Call(Call),
    /// Run with this from now on; whether KVM took it is the answer.
    Arm(Armed, Sender<Result<(), kvm_core::Error>>),
    /// Run guest code, if this is the stop that the vCPU waits in. One that was parked when it was let go
    /// finds the word of it only in the next stop, where it does not count.
    Go(u64),
}

/// What the threads share.
pub(crate) struct Link {
    set: VcpuSet,
    state: Mutex<State>,
    /// Readable when there are events.
    happened: EventFd,
    /// Readable once the machine ends, and from then on.
    closing: EventFd,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// vCPUs wait for jobs, or are about to.
    holding: bool,
    /// How often the vCPUs were stopped.
    stops: u64,
    events: Vec<Event>,
    /// What keeps the vCPUs out until the debugger's thread has seen to it itself.
    pauses: Vec<Pause>,
    jobs: BTreeMap<VcpuId, Sender<Job>>,
}

impl Link {
    /// For the vCPUs of `set`, which from now on do not run guest code until the debugger has them do so.
    ///
    /// # Errors
    /// The errno of `eventfd(2)`.
    pub(crate) fn new(set: &VcpuSet) -> io::Result<Arc<Self>> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK);
        let link = Link {
            set: set.clone(),
            state: Mutex::default(),
            happened: event()?,
            closing: event()?,
        };
        link.state().pauses.push(set.begin_pause());
        Ok(Arc::new(link))
    }

    /// The side of a vCPU.
    pub(crate) fn vcpu(self: &Arc<Self>, id: VcpuId) -> VcpuSide {
        let (sender, jobs) = channel();
        self.state().jobs.insert(id, sender);
        VcpuSide {
            id,
            link: self.clone(),
            jobs,
            armed: Armed::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement, so also after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every vCPU go, for good, and tells the debugger's thread: the machine ends. What the vCPUs do
    /// then is their set's business. Does not block.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.jobs.clear();
        let pauses = std::mem::take(&mut state.pauses);
        drop(state);
        drop(pauses);
        wake(&self.closing);
    }

    pub(super) fn set(&self) -> &VcpuSet {
        &self.set
    }

    /// A descriptor that is readable when there are events.
    pub(super) fn happened(&self) -> RawFd {
        self.happened.as_raw_fd()
    }

    /// A descriptor that is readable once the machine ends.
    pub(super) fn closing(&self) -> RawFd {
        self.closing.as_raw_fd()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Whether there are events. What made [`Link::happened`] readable is forgotten.
    pub(super) fn has_events(&self) -> bool {
        // EAGAIN: nothing did. Before the look: what comes later is readable again.
        let _ = self.happened.read();
        !self.state().events.is_empty()
    }

    /// The vCPUs are all out: a new stop begins. Takes the events, and the pauses that came with them.
    pub(super) fn next_stop(&self) -> (Vec<Event>, Vec<Pause>) {
        let mut state = self.state();
        state.stops += 1;
        (
            std::mem::take(&mut state.events),
            std::mem::take(&mut state.pauses),
        )
    }

    /// Says whether there are vCPUs that wait for jobs.
    pub(super) fn set_holding(&self, holding: bool) {
        self.state().holding = holding;
    }

    /// Whether the debugger has vCPUs that wait for it.
    pub(crate) fn is_holding(&self) -> bool {
        let state = self.state();
        state.holding && !state.closed
    }

    /// Lets a vCPU go that waits in the stop that is now. One that has ended needs no leave.
    pub(super) fn go(&self, id: VcpuId) {
        let stop = self.state().stops;
        let _ = self.give(id, Job::Go(stop));
    }

    /// Gives a job to a vCPU; false if it has ended.
    pub(super) fn give(&self, id: VcpuId, job: Job) -> bool {
        let sender = self.state().jobs.get(&id).cloned();
        sender.is_some_and(|sender| sender.send(job).is_ok())
    }
}

/// An eventfd whose counter is not full: the write cannot fail, and if it did the debugger would wait for
/// an event that its user can ask for with Ctrl-C.
fn wake(event: &EventFd) {
    if let Err(error) = event.write(1) {
        log::error!("cannot wake the debugger's thread: {error}");
    }
}

/// A vCPU's side, used by its handler.
pub(crate) struct VcpuSide {
    id: VcpuId,
    link: Arc<Link>,
    jobs: Receiver<Job>,
    armed: Armed,
}

impl VcpuSide {
    /// [`DEBUG`] was asked of the vCPU: serves jobs until the debugger lets it go. Blocks for as long.
    pub(crate) fn serve(&mut self, vcpu: &VcpuView<'_, VcpuFd>) {
        while let Some(job) = self.next() {
            match job {
                Job::Call(call) => call(vcpu),
                Job::Arm(armed, answer) => {
                    let result = vcpu.set_guest_debug(&armed.debug);
                    if result.is_ok() {
                        self.armed = armed;
                    }
                    // Who asked is waiting, unless the machine ends.
                    let _ = answer.send(result);
                }
                // Kept by `next`.
                Job::Go(_) => {}
            }
        }
    }

    /// The next job, waited for; `None` once the vCPU is let go.
    fn next(&self) -> Option<Job> {
        loop {
            // No sender: the machine ends.
            match self.jobs.recv().ok()? {
                Job::Go(stop) if stop == self.link.state().stops => return None,
                // Of a stop before.
                Job::Go(_) => {}
                job => return Some(job),
            }
        }
    }

    /// A debug exit. The debugger's own stops all vCPUs; the guest's own is given back to it.
    pub(crate) fn debug_exit(
        &mut self,
        vcpu: &VcpuView<'_, VcpuFd>,
        exception: u32,
        pc: u64,
        dr6: u64,
    ) {
        let cause = match self.armed.debug.cause(exception, dr6) {
            DebugCause::Guest(injection) => return self.give_back(vcpu, injection),
            DebugCause::Software if !self.is_patch(vcpu, pc) => {
                return self.give_back(vcpu, Injection::Breakpoint);
            }
            cause => cause,
        };
        let mut state = self.link.state();
        if state.closed {
            return;
        }
        let vcpu = self.id;
        state.events.push(Event { vcpu, cause });
        // Not inside the set's locks, and this thread parks when the handler has returned.
        state.pauses.push(self.link.set.begin_pause());
        drop(state);
        wake(&self.link.happened);
    }

    /// Whether an `int3` is the debugger's: by where it lies in memory, which may be mapped more than
    /// once.
    fn is_patch(&self, vcpu: &VcpuView<'_, VcpuFd>, pc: u64) -> bool {
        match vcpu.translate(pc) {
            Ok(found) => found.is_some_and(|found| self.armed.patches.contains(&found)),
            Err(error) => {
                log::warn!("{error}; an int3 at {pc:#x} is taken for a breakpoint");
                true
            }
        }
    }

    fn give_back(&self, vcpu: &VcpuView<'_, VcpuFd>, injection: Injection) {
        if let Err(error) = vcpu.inject(&self.armed.debug, injection) {
            log::warn!(
                "{error}; an exception of the guest's own on vCPU {} is lost",
                self.id
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_core::Identity;

    #[test]
    fn the_leave_of_a_stop_before_lets_no_vcpu_go() {
        let link = Link::new(&VcpuSet::new(Identity::vm("stops"))).unwrap();
        let side = link.vcpu(VcpuId(0));
        link.next_stop();
        // It was parked, and has not looked, when the next stop came.
        link.go(VcpuId(0));
        link.next_stop();
        assert!(link.give(VcpuId(0), Job::Call(Box::new(|_| {}))));
        link.go(VcpuId(0));
        assert!(matches!(side.next(), Some(Job::Call(_))));
        assert!(side.next().is_none());
        // Nor does one wait that the machine's end lets go.
        link.close();
        assert!(side.next().is_none());
    }
}
