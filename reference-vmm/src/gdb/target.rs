// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What gdb may do to a guest, as gdbstub asks for it. All-stop: while gdb talks, no vCPU runs; each
//! vCPU is a thread to it, numbered from 1.
//!
//! `int3`s are in guest memory only while the guest runs. What gdb reads and writes while it is stopped
//! is the guest's own memory, and a session that breaks off leaves nothing behind.

use std::collections::BTreeMap;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as BreakpointsExt, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint,
    HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use kvm_core::VcpuId;
use kvm_core::arch::x86_64::{Access, DebugCause, GuestDebug, pages};
use vm_memory::GuestAddress;

use super::breakpoints::{Breakpoints, Plan, Wanted};
use super::link::Event;
use super::registers::{Block, Reg, State, X86};
use super::vcpus::{Trouble, Vcpus};

/// The instruction `int3`.
const INT3: u8 = 0xcc;

/// What gdb wants a vCPU to do when it resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
}

/// A guest under a debugger.
pub(crate) struct GuestTarget<V> {
    vcpus: V,
    breakpoints: Breakpoints,
    actions: BTreeMap<VcpuId, Action>,
    /// Only those with an action of their own run.
    locked: bool,
    running: bool,
    /// The guest has run under a debugger.
    started: bool,
    /// The vCPU that stopped last.
    focus: VcpuId,
    /// `int3`s in memory, and what is beneath them.
    patches: Vec<(GuestAddress, u8)>,
    /// Watchpoints that were met at the same time as what gdb was told of.
    untold: Vec<Event>,
}

pub(super) type StopReason = MultiThreadStopReason<u64>;

fn tid(id: VcpuId) -> Tid {
    let number = usize::try_from(id.0).unwrap_or(usize::MAX);
    Tid::MIN.saturating_add(number)
}

fn vcpu(tid: Tid) -> VcpuId {
    VcpuId(u32::try_from(tid.get() - 1).unwrap_or(u32::MAX))
}

impl<V: Vcpus> GuestTarget<V> {
    pub(crate) fn new(vcpus: V) -> Self {
        GuestTarget {
            vcpus,
            breakpoints: Breakpoints::default(),
            actions: BTreeMap::new(),
            locked: false,
            running: false,
            started: false,
            focus: VcpuId(0),
            patches: Vec::new(),
            untold: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn vcpus(&self) -> &V {
        &self.vcpus
    }

    #[cfg(test)]
    pub(super) fn vcpus_mut(&mut self) -> &mut V {
        &mut self.vcpus
    }

    /// A debugger comes: the guest stops, with no breakpoint.
    ///
    /// # Errors
    /// [`Trouble`].
    pub(super) fn attach(&mut self) -> Result<(), Trouble> {
        self.breakpoints.clear();
        self.stop()?;
        self.untold.clear();
        Ok(())
    }

    /// A debugger goes: the guest runs on without breakpoints. One that went before it ever had the guest
    /// run leaves it as it was, waiting for the next.
    ///
    /// # Errors
    /// [`Trouble`]; what could be let go runs.
    pub(super) fn detach(&mut self, asked: bool) -> Result<(), Trouble> {
        self.breakpoints.clear();
        self.untold.clear();
        self.actions.clear();
        self.locked = false;
        if !self.running && !self.started && !asked {
            return Ok(());
        }
        if self.running {
            self.stop()?;
            self.untold.clear();
        }
        self.resume_all()
    }

    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// Stops the guest because gdb asks for it.
    ///
    /// # Errors
    /// [`Trouble`].
    pub(super) fn interrupt(&mut self) -> Result<StopReason, Trouble> {
        self.stop()?;
        // What happened by itself happens again, but for watchpoints, which stay untold.
        Ok(MultiThreadStopReason::SignalWithThread {
            tid: tid(self.focus),
            signal: Signal::SIGINT,
        })
    }

    /// Something happened on a vCPU: stops the guest. What gdb is to be told, if anything.
    ///
    /// # Errors
    /// [`Trouble`].
    pub(super) fn happened(&mut self) -> Result<Option<StopReason>, Trouble> {
        // Word of what an earlier stop has seen to already.
        if !self.vcpus.has_events() {
            return Ok(None);
        }
        let events = self.stop()?;
        let Some(event) = events.first().copied() else {
            return Ok(None);
        };
        self.untold.retain(|untold| *untold != event);
        self.focus = event.vcpu;
        Ok(Some(self.reason(event)))
    }

    /// What there is to be told without the guest's running at all: after a resume, before any wait.
    pub(super) fn next_untold(&mut self) -> Option<StopReason> {
        if self.untold.is_empty() {
            return None;
        }
        let event = self.untold.remove(0);
        self.running = false;
        self.focus = event.vcpu;
        Some(self.reason(event))
    }

    fn take_out_patches(&mut self) {
        for (at, beneath) in self.patches.drain(..).rev() {
            // A guest that has written something else there has changed its code, and keeps it.
            let mut now = [0];
            let there = self.vcpus.read(at, &mut now);
            if there.is_ok()
                && now == [INT3]
                && let Err(error) = self.vcpus.write(at, &[beneath])
            {
                log::warn!("gdb: an int3 stays in guest memory: {error}");
            }
        }
    }

    /// Stops all vCPUs and takes the `int3`s out of memory.
    fn stop(&mut self) -> Result<Vec<Event>, Trouble> {
        let events = self.vcpus.stop()?;
        self.running = false;
        self.take_out_patches();
        // A breakpoint is met again, and a step that gdb was not told of it takes again; a watchpoint's
        // instruction is done.
        let watched = |event: &&Event| matches!(event.cause, DebugCause::Hardware(b) if b.access() != Access::Execute);
        self.untold.extend(events.iter().filter(watched));
        let alive = self.vcpus.ids();
        if !alive.contains(&self.focus) {
            self.focus = alive.first().copied().unwrap_or(VcpuId(0));
        }
        Ok(events)
    }

    fn reason(&self, event: Event) -> StopReason {
        let id = tid(event.vcpu);
        let trap = MultiThreadStopReason::SignalWithThread {
            tid: id,
            signal: Signal::SIGTRAP,
        };
        match event.cause {
            DebugCause::Hardware(hit) => match self.breakpoints.of(hit) {
                Some(Wanted::Soft(_)) => MultiThreadStopReason::SwBreak(id),
                Some(Wanted::Hard(_)) => MultiThreadStopReason::HwBreak(id),
                Some(Wanted::Watch { address, kind, .. }) => MultiThreadStopReason::Watch {
                    tid: id,
                    kind,
                    addr: address,
                },
                None => trap,
            },
            DebugCause::Software => MultiThreadStopReason::SwBreak(id),
            _ => trap,
        }
    }

    /// Where an `int3` would do for a breakpoint at this address.
    fn patch_at(&self, state: Option<&State>, linear: u64) -> Option<GuestAddress> {
        // In real mode it comes out of the guest on hardly any host.
        if !self.vcpus.has_software_breakpoints() || !state.is_some_and(State::is_protected) {
            return None;
        }
        let at = self.vcpus.translate(self.focus, linear).ok()??;
        self.vcpus.read(at, &mut [0]).ok()?;
        Some(at)
    }

    fn plan(&self) -> Plan {
        let state = std::cell::OnceCell::new();
        let state = || {
            state
                .get_or_init(|| self.vcpus.state(self.focus).ok())
                .as_ref()
        };
        self.breakpoints
            .plan(|linear| self.patch_at(state(), linear).is_some())
            .unwrap_or_else(|refusal| {
                // A page that was mapped when gdb set a breakpoint there is not any more.
                log::warn!("gdb: no breakpoint is set: {refusal}");
                Plan::default()
            })
    }

    fn add(&mut self, wanted: Wanted) -> TargetResult<bool, Self> {
        let state = std::cell::OnceCell::new();
        let mut breakpoints = std::mem::take(&mut self.breakpoints);
        let added = breakpoints.add(wanted, |linear| {
            let state = state.get_or_init(|| self.vcpus.state(self.focus).ok());
            self.patch_at(state.as_ref(), linear).is_some()
        });
        self.breakpoints = breakpoints;
        added.map(|()| true).map_err(|refusal| {
            log::warn!("gdb: {refusal}");
            TargetError::Errno(libc::ENOSPC as u8)
        })
    }

    /// Has the vCPUs run that are to.
    fn resume_all(&mut self) -> Result<(), Trouble> {
        let plan = self.plan();
        for linear in &plan.patches {
            let at = self.vcpus.translate(self.focus, *linear);
            // The guest stands still on: what it is to run into is not left in its memory.
            let at = at.inspect_err(|_| self.take_out_patches())?;
            let mut beneath = [0];
            let patched = at.map(|at| {
                self.vcpus.read(at, &mut beneath)?;
                self.vcpus.write(at, &[INT3])?;
                Ok::<_, Trouble>(at)
            });
            match patched {
                Some(Ok(at)) => {
                    // Two linear addresses of one byte: the first has it.
                    if !self.patches.iter().any(|(there, _)| *there == at) {
                        self.patches.push((at, beneath[0]));
                    }
                }
                Some(Err(error)) => log::warn!("gdb: no breakpoint at {linear:#x}: {error}"),
                None => log::warn!("gdb: no breakpoint at {linear:#x}: nothing is mapped there"),
            }
        }
        let patches: Arc<[GuestAddress]> = self.patches.iter().map(|(at, _)| *at).collect();
        let mut go = Vec::new();
        let mut result = Ok(());
        for id in self.vcpus.ids() {
            let action = self.actions.get(&id).copied();
            if self.locked && action.is_none() {
                continue;
            }
            let single_step = action == Some(Action::Step);
            let debug = GuestDebug {
                hardware: plan.hardware,
                software: !patches.is_empty(),
                single_step,
                block_interrupts: single_step && self.vcpus.can_block_interrupts(),
            };
            match self.vcpus.arm(id, &debug, &patches) {
                Ok(()) | Err(Trouble::Gone(_)) => {}
                Err(error) => result = Err(error),
            }
            go.push(id);
        }
        self.running = true;
        self.started = true;
        self.vcpus.go(&go);
        result
    }

    fn registers(&self, id: Tid) -> TargetResult<State, Self> {
        self.vcpus.state(vcpu(id)).map_err(told)
    }

    fn set_registers(&self, id: Tid, old: &State, new: &State) -> TargetResult<(), Self> {
        let set = self.vcpus.set_state(vcpu(id), old, new);
        set.inspect_err(|error| log::warn!("gdb: {error}"))
            .map_err(told)
    }

    /// The pieces of a range of linear addresses, each with its place in guest memory.
    fn pieces(
        &self,
        id: Tid,
        linear: u64,
        len: usize,
    ) -> impl Iterator<Item = Result<(Option<GuestAddress>, usize), Trouble>> {
        pages(linear, len as u64).map(move |(at, len)| {
            let found = self.vcpus.translate(vcpu(id), at)?;
            Ok((found, usize::try_from(len).unwrap_or(usize::MAX)))
        })
    }
}

fn told<E>(trouble: Trouble) -> TargetError<E> {
    TargetError::Errno(trouble.errno())
}

impl<V: Vcpus> Target for GuestTarget<V> {
    type Arch = X86;
    type Error = Trouble;

    fn base_ops(&mut self) -> BaseOps<'_, X86, Trouble> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpus> MultiThreadBase for GuestTarget<V> {
    fn read_registers(&mut self, regs: &mut Block, tid: Tid) -> TargetResult<(), Self> {
        *regs = self.registers(tid)?.block();
        Ok(())
    }

    fn write_registers(&mut self, regs: &Block, tid: Tid) -> TargetResult<(), Self> {
        let old = self.registers(tid)?;
        let mut new = old;
        new.set_block(regs).map_err(|refusal| {
            log::warn!("gdb: {refusal}");
            TargetError::Errno(libc::EINVAL as u8)
        })?;
        self.set_registers(tid, &old, &new)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    /// As much as is mapped; what begins unmapped is an error.
    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let mut done = 0;
        for piece in self.pieces(tid, start, data.len()) {
            let (found, len) = piece.map_err(told)?;
            let into = data.get_mut(done..done + len).unwrap_or_default();
            match found.map(|at| self.vcpus.read(at, into)) {
                Some(Ok(())) => done += len,
                _ => break,
            }
        }
        match done {
            0 if !data.is_empty() => Err(TargetError::Errno(libc::EFAULT as u8)),
            done => Ok(done),
        }
    }

    /// All or nothing: what is not mapped to its end is not written.
    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let unmapped = TargetError::Errno(libc::EFAULT as u8);
        let mut pieces = Vec::new();
        let mut done = 0;
        for piece in self.pieces(tid, start, data.len()) {
            let (found, len) = piece.map_err(told)?;
            let Some(at) = found else {
                return Err(unmapped);
            };
            // There must be memory; what is there is not needed.
            self.vcpus.read(at, &mut vec![0; len]).map_err(told)?;
            pieces.push((at, done..done + len));
            done += len;
        }
        if done < data.len() {
            return Err(unmapped);
        }
        for (at, range) in pieces {
            let bytes = data.get(range).unwrap_or_default();
            self.vcpus.write(at, bytes).map_err(told)?;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Trouble> {
        let ids = self.vcpus.ids();
        // The one that gdb is told about first is the one that it shows.
        let focus = ids.iter().filter(|id| **id == self.focus);
        let others = ids.iter().filter(|id| **id != self.focus);
        focus.chain(others).for_each(|id| active(tid(*id)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpus> SingleRegisterAccess<Tid> for GuestTarget<V> {
    fn read_register(&mut self, tid: Tid, reg: Reg, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let bytes = self.registers(tid)?.get(reg);
        let room = buf.get_mut(..bytes.len()).ok_or(TargetError::NonFatal)?;
        room.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(&mut self, tid: Tid, reg: Reg, val: &[u8]) -> TargetResult<(), Self> {
        let old = self.registers(tid)?;
        let mut new = old;
        new.set(reg, val).map_err(|refusal| {
            log::warn!("gdb: {refusal}");
            TargetError::Errno(libc::EINVAL as u8)
        })?;
        self.set_registers(tid, &old, &new)
    }
}

impl<V: Vcpus> MultiThreadResume for GuestTarget<V> {
    fn resume(&mut self) -> Result<(), Trouble> {
        if self.running {
            // A peer that does not wait for the guest to stop.
            return Ok(());
        }
        let alive = self.vcpus.ids();
        let breakpoints = &self.breakpoints;
        // A watchpoint that gdb has given up meanwhile is of no interest.
        self.untold.retain(|event| match event.cause {
            DebugCause::Hardware(hit) => {
                breakpoints.of(hit).is_some() && alive.contains(&event.vcpu)
            }
            _ => false,
        });
        if !self.untold.is_empty() {
            // Told at once instead; see `next_untold`.
            self.running = true;
            return Ok(());
        }
        self.resume_all()
    }

    fn clear_resume_actions(&mut self) -> Result<(), Trouble> {
        self.actions.clear();
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Trouble> {
        // gdb's first action for a thread is the one that counts.
        self.actions.entry(vcpu(tid)).or_insert(Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpus> MultiThreadSingleStep for GuestTarget<V> {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Trouble> {
        self.actions.entry(vcpu(tid)).or_insert(Action::Step);
        Ok(())
    }
}

impl<V: Vcpus> MultiThreadSchedulerLocking for GuestTarget<V> {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Trouble> {
        self.locked = true;
        Ok(())
    }
}

impl<V: Vcpus> ThreadExtraInfo for GuestTarget<V> {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Trouble> {
        let text = format!("vCPU {}", vcpu(tid));
        let taken = buf.iter_mut().zip(text.bytes());
        Ok(taken.map(|(slot, byte)| *slot = byte).count())
    }
}

impl<V: Vcpus> BreakpointsExt for GuestTarget<V> {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl<V: Vcpus> SwBreakpoint for GuestTarget<V> {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.add(Wanted::Soft(address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(Wanted::Soft(address)))
    }
}

impl<V: Vcpus> HwBreakpoint for GuestTarget<V> {
    fn add_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        self.add(Wanted::Hard(address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(Wanted::Hard(address)))
    }
}

impl<V: Vcpus> HwWatchpoint for GuestTarget<V> {
    fn add_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        if !self.vcpus.has_watchpoints() {
            log::warn!(
                "gdb: no watchpoint at {address:#x}: this host's KVM, which interprets guests, does not report \
                 accesses; `set can-use-hw-watchpoints 0` has gdb step instead"
            );
            return Err(TargetError::Errno(libc::EOPNOTSUPP as u8));
        }
        self.add(Wanted::Watch { address, len, kind })
    }

    fn remove_hw_watchpoint(
        &mut self,
        address: u64,
        len: u64,
        kind: WatchKind,
    ) -> TargetResult<bool, Self> {
        Ok(self
            .breakpoints
            .remove(Wanted::Watch { address, len, kind }))
    }
}
