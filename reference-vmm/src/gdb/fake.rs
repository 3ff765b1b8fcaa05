// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! vCPUs without KVM, for the tests of the target and the session: two pages of memory, an event on
//! command, any call refused.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use kvm_core::VcpuId;
use kvm_core::arch::x86_64::GuestDebug;
use vm_memory::GuestAddress;
use vmm_sys_util::errno::Error as Errno;

use super::link::Event;
use super::registers::State;
use super::vcpus::{Trouble, Vcpus};

/// Linear addresses from here on are mapped, to guest physical 0.
pub(super) const MAPPED: u64 = 0xffff_ffff_8100_0000;
/// Bytes of memory.
pub(super) const LEN: u64 = 2 * 4096;

pub(super) struct Fake {
    pub(super) states: RefCell<BTreeMap<VcpuId, State>>,
    pub(super) memory: RefCell<Vec<u8>>,
    /// What each runs with, and how many `int3`s there are.
    pub(super) armed: RefCell<BTreeMap<VcpuId, (GuestDebug, usize)>>,
    /// What happens next.
    pub(super) events: Vec<Event>,
    /// Those that run.
    pub(super) gone: Vec<VcpuId>,
    pub(super) software: bool,
    /// Arming fails with this errno.
    pub(super) arm_fails: Option<i32>,
}

impl Fake {
    pub(super) fn new(vcpus: u32) -> Self {
        let mut state = State::default();
        state.sregs.cr0 = 1 << 31 | 1;
        Fake {
            states: RefCell::new((0..vcpus).map(|id| (VcpuId(id), state)).collect()),
            memory: RefCell::new((0..LEN).map(|n| n as u8).collect()),
            armed: RefCell::default(),
            events: Vec::new(),
            gone: Vec::new(),
            software: true,
            arm_fails: None,
        }
    }

    fn range(at: GuestAddress, len: usize) -> Result<std::ops::Range<usize>, Trouble> {
        let start = usize::try_from(at.0).unwrap();
        let end = start.checked_add(len).filter(|end| *end <= LEN as usize);
        Ok(start..end.ok_or(Trouble::NoMemory(at.0))?)
    }
}

impl Vcpus for Fake {
    fn ids(&self) -> Vec<VcpuId> {
        self.states.borrow().keys().copied().collect()
    }

    fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    fn stop(&mut self) -> Result<Vec<Event>, Trouble> {
        self.gone.clear();
        Ok(std::mem::take(&mut self.events))
    }

    fn go(&mut self, ids: &[VcpuId]) {
        self.gone.extend(ids);
    }

    fn state(&self, id: VcpuId) -> Result<State, Trouble> {
        let states = self.states.borrow();
        let state = states.get(&id).copied().ok_or(Trouble::Gone(id))?;
        match self.gone.contains(&id) {
            true => Err(Trouble::Running(id)),
            false => Ok(state),
        }
    }

    fn set_state(&self, id: VcpuId, old: &State, new: &State) -> Result<(), Trouble> {
        assert_eq!(self.state(id)?, *old);
        self.states.borrow_mut().insert(id, *new);
        Ok(())
    }

    fn translate(&self, id: VcpuId, linear: u64) -> Result<Option<GuestAddress>, Trouble> {
        self.state(id)?;
        let offset = linear.checked_sub(MAPPED);
        Ok(offset.filter(|at| *at < LEN).map(GuestAddress))
    }

    fn arm(
        &self,
        id: VcpuId,
        debug: &GuestDebug,
        patches: &Arc<[GuestAddress]>,
    ) -> Result<(), Trouble> {
        if let Some(errno) = self.arm_fails {
            let ioctl = "KVM_SET_GUEST_DEBUG";
            let errno = Errno::new(errno);
            return Err(Trouble::Ioctl { id, ioctl, errno });
        }
        self.state(id)?;
        self.armed.borrow_mut().insert(id, (*debug, patches.len()));
        Ok(())
    }

    fn read(&self, at: GuestAddress, into: &mut [u8]) -> Result<(), Trouble> {
        let range = Self::range(at, into.len())?;
        into.copy_from_slice(&self.memory.borrow()[range]);
        Ok(())
    }

    fn write(&self, at: GuestAddress, bytes: &[u8]) -> Result<(), Trouble> {
        let range = Self::range(at, bytes.len())?;
        self.memory.borrow_mut()[range].copy_from_slice(bytes);
        Ok(())
    }

    fn has_watchpoints(&self) -> bool {
        true
    }

    fn has_software_breakpoints(&self) -> bool {
        self.software
    }

    fn can_block_interrupts(&self) -> bool {
        true
    }
}
