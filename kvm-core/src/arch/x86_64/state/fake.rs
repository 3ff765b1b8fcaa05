// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU's state, and a VM's clock, without KVM: what was set is what is read, in the order in which
//! it was asked for, with any errno at any call.

#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};

use vmm_sys_util::errno::Error as Errno;

use super::clock::{AccessClock, ClockState};
use super::events::Events;
use super::host::AccessVcpu;
use super::registers::{
    CpuidLeaf, DebugRegisters, GeneralRegisters, Msr, OneRegister, SystemRegisters, Xcr,
};
use super::save::{EINVAL, ENXIO};
use super::{StateBytes, VcpuState, msr};

/// Calls that are noted by name, one of which may fail.
#[derive(Clone, Debug, Default)]
struct Calls {
    names: RefCell<Vec<&'static str>>,
    fails: Cell<Option<(usize, i32)>>,
}

impl Calls {
    fn note(&self, name: &'static str) -> Result<(), Errno> {
        let number = self.names.borrow().len();
        self.names.borrow_mut().push(name);
        match self.fails.get() {
            Some((at, errno)) if at == number => Err(Errno::new(errno)),
            _ => Ok(()),
        }
    }
}

/// A vCPU that has a state and no guest.
#[derive(Clone, Debug, Default)]
pub struct FakeState {
    state: RefCell<VcpuState>,
    read_only: Vec<u32>,
    calls: Calls,
}

impl FakeState {
    /// A vCPU in this state. Its MSRs are those of the state; others are neither read nor written.
    #[must_use]
    pub fn new(state: VcpuState) -> Self {
        Self {
            state: RefCell::new(state),
            ..Self::default()
        }
    }

    /// These MSRs are read and not written.
    #[must_use]
    pub fn read_only(mut self, msrs: &[u32]) -> Self {
        self.read_only = msrs.to_vec();
        self
    }

    /// The call of this number, from 0, fails with this errno, and does nothing.
    pub fn fail_at(&self, call: usize, errno: i32) {
        self.calls.fails.set(Some((call, errno)));
    }

    /// The calls so far: the methods of [`AccessVcpu`] by name.
    #[must_use]
    pub fn calls(&self) -> Vec<&'static str> {
        self.calls.names.borrow().clone()
    }

    /// What the vCPU is in now.
    #[must_use]
    pub fn state(&self) -> VcpuState {
        self.state.borrow().clone()
    }

    fn read<T>(&self, name: &'static str, get: impl FnOnce(&VcpuState) -> T) -> Result<T, Errno> {
        self.calls.note(name)?;
        Ok(get(&self.state.borrow()))
    }

    fn write(&self, name: &'static str, set: impl FnOnce(&mut VcpuState)) -> Result<(), Errno> {
        self.calls.note(name)?;
        set(&mut self.state.borrow_mut());
        Ok(())
    }
}

impl AccessVcpu for FakeState {
    fn cpuid(&self) -> Result<Vec<CpuidLeaf>, Errno> {
        self.read("cpuid", |state| state.cpuid.clone())
    }

    fn set_cpuid(&self, leaves: &[CpuidLeaf]) -> Result<(), Errno> {
        self.write("set_cpuid", |state| state.cpuid = leaves.to_vec())
    }

    fn mp_state(&self) -> Result<u32, Errno> {
        self.read("mp_state", |state| state.mp_state)
    }

    fn set_mp_state(&self, mp_state: u32) -> Result<(), Errno> {
        self.write("set_mp_state", |state| state.mp_state = mp_state)
    }

    fn events(&self) -> Result<Events, Errno> {
        self.read("events", |state| state.events)
    }

    fn set_events(&self, events: &Events) -> Result<(), Errno> {
        self.write("set_events", |state| state.events = *events)
    }

    fn registers(&self) -> Result<GeneralRegisters, Errno> {
        self.read("registers", |state| state.registers)
    }

    fn set_registers(&self, registers: &GeneralRegisters) -> Result<(), Errno> {
        self.write("set_registers", |state| state.registers = *registers)
    }

    fn system(&self, sregs2: bool) -> Result<SystemRegisters, Errno> {
        self.read("system", |state| SystemRegisters {
            pdptrs: state.system.pdptrs.filter(|_| sregs2),
            ..state.system
        })
    }

    fn set_system(&self, registers: &SystemRegisters, sregs2: bool) -> Result<(), Errno> {
        let pdptrs = registers.pdptrs.filter(|_| sregs2);
        self.write("set_system", |state| {
            state.system = SystemRegisters {
                pdptrs,
                ..*registers
            }
        })
    }

    fn debug(&self) -> Result<DebugRegisters, Errno> {
        self.read("debug", |state| state.debug)
    }

    fn set_debug(&self, registers: &DebugRegisters) -> Result<(), Errno> {
        self.write("set_debug", |state| state.debug = *registers)
    }

    fn xcrs(&self) -> Result<Vec<Xcr>, Errno> {
        self.read("xcrs", |state| state.xcrs.clone())
    }

    fn set_xcrs(&self, xcrs: &[Xcr]) -> Result<(), Errno> {
        self.write("set_xcrs", |state| state.xcrs = xcrs.to_vec())
    }

    fn xsave(&self, _: bool) -> Result<Vec<u8>, Errno> {
        self.read("xsave", |state| state.xsave.to_vec())
    }

    fn set_xsave(&self, area: &[u8]) -> Result<(), Errno> {
        self.write("set_xsave", |state| state.xsave = StateBytes(area.to_vec()))
    }

    fn lapic(&self) -> Result<Vec<u8>, Errno> {
        let page = self.read("lapic", |state| state.lapic.clone())?;
        page.map(|page| page.0).ok_or(Errno::new(EINVAL))
    }

    fn set_lapic(&self, page: &[u8]) -> Result<(), Errno> {
        self.write("set_lapic", |state| {
            state.lapic = Some(StateBytes(page.to_vec()));
        })
    }

    fn tsc_khz(&self) -> Result<u32, Errno> {
        self.read("tsc_khz", |state| state.tsc_khz)
    }

    fn set_tsc_khz(&self, khz: u32) -> Result<(), Errno> {
        self.write("set_tsc_khz", |state| state.tsc_khz = khz)
    }

    fn tsc_offset(&self) -> Result<u64, Errno> {
        self.read("tsc_offset", |state| state.tsc_offset)?
            .ok_or(Errno::new(ENXIO))
    }

    fn set_tsc_offset(&self, offset: u64) -> Result<(), Errno> {
        self.write("set_tsc_offset", |state| state.tsc_offset = Some(offset))
    }

    fn get_msrs(&self, msrs: &mut [Msr]) -> Result<usize, Errno> {
        self.read("get_msrs", |state| {
            for (done, msr) in msrs.iter_mut().enumerate() {
                let value = match msr.index {
                    msr::IA32_MCG_CAP => state.mcg_cap,
                    index => state.msr(index),
                };
                let Some(value) = value else {
                    return done;
                };
                msr.value = value;
            }
            msrs.len()
        })
    }

    fn put_msrs(&self, msrs: &[Msr]) -> Result<usize, Errno> {
        let mut done = 0;
        self.write("put_msrs", |state| {
            for msr in msrs {
                let to = state.msrs.iter_mut().find(|to| to.index == msr.index);
                let Some(to) = to.filter(|_| !self.read_only.contains(&msr.index)) else {
                    return;
                };
                to.value = msr.value;
                done += 1;
            }
        })?;
        Ok(done)
    }

    fn set_up_mce(&self, mcg_cap: u64) -> Result<(), Errno> {
        self.write("set_up_mce", |state| state.mcg_cap = Some(mcg_cap))
    }

    fn one_registers(&self) -> Result<Vec<OneRegister>, Errno> {
        self.read("one_registers", |state| state.one_registers.clone())
    }

    fn set_one_register(&self, register: &OneRegister) -> Result<(), Errno> {
        self.write("set_one_register", |state| {
            state.one_registers.retain(|old| old.id != register.id);
            state.one_registers.push(*register);
        })
    }

    fn nested(&self, _: usize) -> Result<Vec<u8>, Errno> {
        self.read("nested", |state| state.nested.clone().unwrap_or_default().0)
    }

    fn set_nested(&self, nested: &[u8]) -> Result<(), Errno> {
        self.write("set_nested", |state| {
            state.nested = Some(StateBytes(nested.to_vec()));
        })
    }

    fn tell_clock_gap(&self) -> Result<(), Errno> {
        self.write("tell_clock_gap", |_| {})
    }
}

/// A VM that has a clock that stands still but for what it is told.
#[derive(Clone, Debug, Default)]
pub struct FakeClock {
    clock: Cell<ClockState>,
    calls: Calls,
}

impl FakeClock {
    /// A clock at this moment: `realtime` and `host_tsc` are what the host's say.
    #[must_use]
    pub fn new(clock: ClockState) -> Self {
        Self {
            clock: Cell::new(clock),
            ..Self::default()
        }
    }

    /// The call of this number, from 0, fails with this errno, and does nothing.
    pub fn fail_at(&self, call: usize, errno: i32) {
        self.calls.fails.set(Some((call, errno)));
    }
}

impl AccessClock for FakeClock {
    fn clock(&self) -> Result<ClockState, Errno> {
        self.calls.note("clock")?;
        Ok(self.clock.get())
    }

    fn set_clock(&self, nanoseconds: u64, since: Option<u64>) -> Result<(), Errno> {
        self.calls.note("set_clock")?;
        let clock = self.clock.get();
        let passed = since.map_or(0, |since| clock.realtime.saturating_sub(since));
        self.clock.set(ClockState {
            nanoseconds: nanoseconds.saturating_add(passed),
            ..clock
        });
        Ok(())
    }
}
