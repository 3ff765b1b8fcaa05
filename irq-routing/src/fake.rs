// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host for tests: it remembers what it was asked, keeps what a VM would keep, and fails or stands
//! still on demand.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::gsi::Gsi;
use crate::host::{
    AccessIrqchip, AttachIrqfd, CreateIrqchip, Errno, SetGsiRouting, SetIrqLine, SignalMsi,
};
use crate::ioapic::IoapicState;
use crate::irqchip::{
    Irqchip, IrqchipKind, IrqchipPart, KernelIrqchipState, PicState, Pit, PitState,
};
use crate::route::Msi;
use crate::rules::Rules;
use crate::table::Table;

const ENXIO: i32 = 6;
const EEXIST: i32 = 17;
const EINVAL: i32 = 22;
const EBUSY: i32 = 16;

/// One thing that the host was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Call {
    /// `KVM_CREATE_IRQCHIP`.
    CreateIrqchip,
    /// `KVM_CREATE_PIT2`.
    CreatePit2,
    /// `KVM_CAP_SPLIT_IRQCHIP`.
    CreateSplitIrqchip,
    /// `KVM_GET_IRQCHIP` or `KVM_GET_PIT2`.
    GetState(IrqchipPart),
    /// `KVM_SET_IRQCHIP` or `KVM_SET_PIT2`.
    SetState(IrqchipPart),
    /// `KVM_SET_GSI_ROUTING` with this many entries.
    SetGsiRouting(usize),
    /// `KVM_IRQFD`.
    AttachIrqfd(Gsi),
    /// `KVM_IRQFD` with `KVM_IRQFD_FLAG_DEASSIGN`.
    DetachIrqfd(Gsi),
    /// `KVM_IRQ_LINE_STATUS`.
    SetIrqLine(Gsi, bool),
    /// `KVM_SIGNAL_MSI`.
    SignalMsi(Msi),
}

/// What the VM behind a [`FakeHost`] has: to be compared before and after a call that fails.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FakeVm {
    /// The controllers made.
    pub irqchip: IrqchipKind,
    /// What they know, if they are in the kernel.
    pub chips: KernelIrqchipState,
    /// The table.
    pub table: Table,
    /// The attached eventfds, by descriptor, and the GSI of each.
    pub irqfds: BTreeMap<i32, Gsi>,
    /// The lines that were set, and their levels.
    pub lines: BTreeMap<Gsi, bool>,
}

/// A VM that is none. Every capability trait of [`crate::host`] is there.
#[derive(Debug)]
pub struct FakeHost {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    vm: FakeVm,
    calls: Vec<Call>,
    limit: u32,
    status: i32,
    fail: Option<(usize, i32)>,
    hold: Option<Arc<Gate>>,
}

#[derive(Debug, Default)]
struct Gate {
    place: Mutex<Place>,
    moved: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// No call has come.
    #[default]
    Outside,
    /// One stands still.
    Inside,
    /// Whoever comes may pass.
    Open,
}

impl Gate {
    fn move_to(&self, place: Place) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = place;
        self.moved.notify_all();
    }

    fn wait_for(&self, place: Place) {
        let mut now = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        while *now < place {
            now = self.moved.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn pass(&self) {
        let mut now = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == Place::Outside {
            *now = Place::Inside;
            self.moved.notify_all();
        }
        drop(now);
        self.wait_for(Place::Open);
    }
}

/// One call to a [`FakeHost`] that is to stand still, as if it waited for a grace period. Dropped,
/// it lets the call go on.
#[derive(Debug)]
pub struct Hold(Arc<Gate>);

impl Hold {
    /// Waits until the call is there.
    pub fn entered(&self) {
        self.0.wait_for(Place::Inside);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.move_to(Place::Open);
    }
}

impl Default for FakeHost {
    fn default() -> Self {
        let state = State {
            vm: FakeVm::default(),
            calls: Vec::new(),
            limit: 4096,
            status: 1,
            fail: None,
            hold: None,
        };
        Self {
            state: Mutex::new(state),
        }
    }
}

impl FakeHost {
    /// A fresh VM on a host that accepts 4096 routes.
    pub fn new() -> Self {
        Self::default()
    }

    /// A VM with these controllers, whose making is not remembered as a call.
    pub fn with_irqchip(kind: IrqchipKind) -> (Self, Irqchip) {
        let host = Self::new();
        host.state().vm = FakeVm {
            irqchip: kind,
            table: default_table(kind),
            ..FakeVm::default()
        };
        (host, Irqchip::assume(kind))
    }

    /// Lets the host accept this many routes.
    pub fn set_limit(&self, limit: u32) {
        self.state().limit = limit;
    }

    /// What `KVM_IRQ_LINE_STATUS` and `KVM_SIGNAL_MSI` report from now on.
    pub fn set_status(&self, status: i32) {
        self.state().status = status;
    }

    /// Lets one call fail with this errno and change nothing: the next one, or the one after `skip`
    /// more.
    pub fn fail_after(&self, skip: usize, errno: i32) {
        self.state().fail = Some((skip, errno));
    }

    /// Lets the next call stand still, and no other.
    pub fn hold_next(&self) -> Hold {
        let gate = Arc::new(Gate::default());
        self.state().hold = Some(Arc::clone(&gate));
        Hold(gate)
    }

    /// The calls since the last time, those that failed among them.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// What the VM has now.
    pub fn vm(&self) -> FakeVm {
        self.state().vm.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, call: Call) -> Result<MutexGuard<'_, State>, Errno> {
        let mut state = self.state();
        state.calls.push(call);
        if let Some(gate) = state.hold.take() {
            drop(state);
            gate.pass();
            state = self.state();
        }
        match state.fail {
            Some((0, errno)) => {
                state.fail = None;
                Err(Errno::new(errno))
            }
            Some((skip, errno)) => {
                state.fail = Some((skip - 1, errno));
                Ok(state)
            }
            None => Ok(state),
        }
    }

    fn chips(&self, call: Call) -> Result<MutexGuard<'_, State>, Errno> {
        let state = self.call(call)?;
        let (Call::GetState(part) | Call::SetState(part)) = call else {
            return Ok(state);
        };
        match state.vm.irqchip {
            IrqchipKind::Kernel { pit } if part != IrqchipPart::Pit || pit != Pit::Absent => {
                Ok(state)
            }
            _ => Err(Errno::new(ENXIO)),
        }
    }

    fn make(&self, call: Call, kind: IrqchipKind) -> Result<(), Errno> {
        let mut state = self.call(call)?;
        if state.vm.irqchip != IrqchipKind::None {
            return Err(Errno::new(EEXIST));
        }
        state.vm.irqchip = kind;
        state.vm.table = default_table(kind);
        Ok(())
    }
}

fn default_table(kind: IrqchipKind) -> Table {
    match kind {
        IrqchipKind::Kernel { .. } => Table::x86_default(),
        _ => Table::new(),
    }
}

impl CreateIrqchip for FakeHost {
    fn has_pit2(&self) -> bool {
        true
    }

    fn has_split_irqchip(&self) -> bool {
        true
    }

    fn create_irqchip(&self) -> Result<(), Errno> {
        let pit = Pit::Absent;
        self.make(Call::CreateIrqchip, IrqchipKind::Kernel { pit })
    }

    fn create_pit2(&self, speaker: bool) -> Result<(), Errno> {
        let mut state = self.call(Call::CreatePit2)?;
        let pit = if speaker {
            Pit::PresentWithSpeaker
        } else {
            Pit::Present
        };
        match state.vm.irqchip {
            IrqchipKind::Kernel { pit: Pit::Absent } => {
                state.vm.irqchip = IrqchipKind::Kernel { pit };
                Ok(())
            }
            _ => Err(Errno::new(EEXIST)),
        }
    }

    fn create_split_irqchip(&self, pins: u32) -> Result<(), Errno> {
        self.make(Call::CreateSplitIrqchip, IrqchipKind::Split { pins })
    }
}

const PICS: [IrqchipPart; 2] = [IrqchipPart::FirstPic, IrqchipPart::SecondPic];

fn pic_part(pic: usize) -> Result<IrqchipPart, Errno> {
    PICS.get(pic).copied().ok_or(Errno::new(ENXIO))
}

impl AccessIrqchip for FakeHost {
    fn pic(&self, pic: usize) -> Result<PicState, Errno> {
        let call = Call::GetState(pic_part(pic)?);
        Ok(self.chips(call)?.vm.chips.pics[pic])
    }

    fn set_pic(&self, pic: usize, state: &PicState) -> Result<(), Errno> {
        let call = Call::SetState(pic_part(pic)?);
        self.chips(call)?.vm.chips.pics[pic] = *state;
        Ok(())
    }

    fn ioapic(&self) -> Result<IoapicState, Errno> {
        let call = Call::GetState(IrqchipPart::Ioapic);
        Ok(self.chips(call)?.vm.chips.ioapic)
    }

    fn set_ioapic(&self, state: &IoapicState) -> Result<(), Errno> {
        let call = Call::SetState(IrqchipPart::Ioapic);
        self.chips(call)?.vm.chips.ioapic = *state;
        Ok(())
    }

    fn pit(&self) -> Result<PitState, Errno> {
        let call = Call::GetState(IrqchipPart::Pit);
        Ok(self.chips(call)?.vm.chips.pit.unwrap_or_default())
    }

    fn set_pit(&self, state: &PitState) -> Result<(), Errno> {
        let call = Call::SetState(IrqchipPart::Pit);
        self.chips(call)?.vm.chips.pit = Some(*state);
        Ok(())
    }
}

impl SetGsiRouting for FakeHost {
    fn rules(&self, irqchip: IrqchipKind) -> Rules {
        Rules {
            hv_sint: true,
            xen_evtchn: true,
            ..Rules::new(irqchip, self.state().limit)
        }
    }

    fn set_gsi_routing(&self, table: &Table) -> Result<(), Errno> {
        let mut state = self.call(Call::SetGsiRouting(table.len()))?;
        if state.vm.irqchip == IrqchipKind::None {
            return Err(Errno::new(EINVAL));
        }
        state.vm.table = table.clone();
        Ok(())
    }
}

impl AttachIrqfd for FakeHost {
    fn attach_irqfd(
        &self,
        fd: &EventFd,
        _resample: Option<&EventFd>,
        gsi: Gsi,
    ) -> Result<(), Errno> {
        let mut state = self.call(Call::AttachIrqfd(gsi))?;
        if state.vm.irqfds.contains_key(&fd.as_raw_fd()) {
            return Err(Errno::new(EBUSY));
        }
        state.vm.irqfds.insert(fd.as_raw_fd(), gsi);
        Ok(())
    }

    fn detach_irqfd(&self, fd: &EventFd, gsi: Gsi) -> Result<(), Errno> {
        let mut state = self.call(Call::DetachIrqfd(gsi))?;
        state.vm.irqfds.remove(&fd.as_raw_fd());
        Ok(())
    }
}

impl SetIrqLine for FakeHost {
    fn set_irq_line(&self, gsi: Gsi, level: bool) -> Result<i32, Errno> {
        let mut state = self.call(Call::SetIrqLine(gsi, level))?;
        state.vm.lines.insert(gsi, level);
        Ok(state.status)
    }
}

impl SignalMsi for FakeHost {
    fn signal_msi(&self, msi: Msi) -> Result<i32, Errno> {
        Ok(self.call(Call::SignalMsi(msi))?.status)
    }
}
