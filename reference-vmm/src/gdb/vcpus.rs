// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a debugger does to the vCPUs and to guest memory; with KVM it is done through the [`Link`].

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_core::arch::x86_64::GuestDebug;
use kvm_core::arch::x86_64::state::AccessVcpu;
use kvm_core::{Kvm, VcpuId, VcpuView};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::errno::Error as Errno;

use super::fpu;
use super::link::{Armed, DEBUG, Event, Job, Link};
use super::registers::State;
use super::trial;
use crate::end::Chain;
use crate::file_pages::{self, ReadError};
use crate::memory::Memslots;

const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Why something could not be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    /// The vCPU has halted for good, or the machine ends.
    #[error("vCPU {0} has ended")]
    Gone(VcpuId),
    /// The vCPU runs guest code.
    #[error("vCPU {0} runs")]
    Running(VcpuId),
    /// There is no memory at a guest physical address.
    #[error("no memory at guest physical address {0:#x}")]
    NoMemory(u64),
    /// An ioctl on the vCPU's descriptor failed.
    #[error("{ioctl} of vCPU {id} failed: {errno}")]
    Ioctl {
        /// The vCPU.
        id: VcpuId,
        /// The ioctl's name.
        ioctl: &'static str,
        /// What KVM said.
        errno: Errno,
    },
    /// A call of kvm-core's failed.
    #[error(transparent)]
    Kvm(#[from] kvm_core::Error),
    /// The vCPUs could not be stopped.
    #[error(transparent)]
    Control(#[from] kvm_core::ControlError),
}

impl Trouble {
    /// The errno that gdb is told.
    pub(super) fn errno(&self) -> u8 {
        let errno = match self {
            Trouble::Gone(_) => libc::ESRCH,
            Trouble::Running(_) => libc::EBUSY,
            Trouble::NoMemory(_) => libc::EFAULT,
            Trouble::Ioctl { errno, .. } => errno.errno(),
            Trouble::Kvm(_) | Trouble::Control(_) => libc::EIO,
        };
        u8::try_from(errno).unwrap_or(libc::EIO as u8)
    }
}

/// The vCPUs of a guest and its memory, under a debugger.
///
/// # Contract
/// All calls come from one thread. Between [`stop`](Vcpus::stop) and [`go`](Vcpus::go) a vCPU runs no
/// guest code; calls that name a vCPU are answered only then, and otherwise are [`Trouble::Running`]: a
/// peer may ask at any time, and an answer that only the next stop would bring is none.
pub(crate) trait Vcpus {
    /// Those that have not ended.
    fn ids(&self) -> Vec<VcpuId>;

    /// Whether something has happened since the last stop.
    fn has_events(&self) -> bool;

    /// Brings all of them out of the guest, and gives what has happened since the last time. Blocks for
    /// the handlers that are at work.
    fn stop(&mut self) -> Result<Vec<Event>, Trouble>;

    /// Lets these run guest code. Does not block.
    fn go(&mut self, ids: &[VcpuId]);

    /// Its registers.
    fn state(&self, id: VcpuId) -> Result<State, Trouble>;

    /// Sets its registers to `new`, which were `old`. A call that fails has changed nothing.
    fn set_state(&self, id: VcpuId, old: &State, new: &State) -> Result<(), Trouble>;

    /// Where it finds a linear address, by its own page tables.
    fn translate(&self, id: VcpuId, linear: u64) -> Result<Option<GuestAddress>, Trouble>;

    /// What it runs with from now on, and where an `int3` of the debugger's is in memory.
    fn arm(
        &self,
        id: VcpuId,
        debug: &GuestDebug,
        patches: &Arc<[GuestAddress]>,
    ) -> Result<(), Trouble>;

    /// Reads guest memory.
    fn read(&self, at: GuestAddress, into: &mut [u8]) -> Result<(), Trouble>;

    /// Writes guest memory; what the guest can only read as well.
    fn write(&self, at: GuestAddress, bytes: &[u8]) -> Result<(), Trouble>;

    /// Whether watchpoints stop a guest on this host.
    fn has_watchpoints(&self) -> bool;

    /// Whether an `int3` of protected mode comes out of a guest on this host.
    fn has_software_breakpoints(&self) -> bool;

    /// Whether a step can keep interrupts out.
    fn can_block_interrupts(&self) -> bool;
}

/// A machine of KVM's.
pub(super) struct Live {
    link: Arc<Link>,
    memory: Memslots,
    kvm: PathBuf,
    /// Those that wait for jobs.
    held: BTreeSet<VcpuId>,
    watchpoints: OnceCell<bool>,
    software: OnceCell<bool>,
    block: OnceCell<bool>,
}

impl Live {
    pub(super) fn new(link: Arc<Link>, memory: Memslots, kvm: PathBuf) -> Self {
        Live {
            link,
            memory,
            kvm,
            held: BTreeSet::new(),
            watchpoints: OnceCell::new(),
            software: OnceCell::new(),
            block: OnceCell::new(),
        }
    }

    /// Has `call` called on the vCPU's thread and gives its answer.
    fn on<T: Send + 'static>(
        &self,
        id: VcpuId,
        call: impl FnOnce(&VcpuView<'_, VcpuFd>) -> T + Send + 'static,
    ) -> Result<T, Trouble> {
        let (answer, answered) = channel();
        let call = Job::Call(Box::new(move |vcpu: &VcpuView<'_, VcpuFd>| {
            let _ = answer.send(call(vcpu));
        }));
        self.give(id, call)?;
        // A vCPU that ends drops the job, and the answer's other end with it.
        answered.recv().map_err(|_| Trouble::Gone(id))
    }

    /// Gives a job to a vCPU that waits for jobs. One that runs would come to it at the next stop, for which
    /// this thread, waiting for the answer, would never ask.
    fn give(&self, id: VcpuId, job: Job) -> Result<(), Trouble> {
        match (self.held.contains(&id), self.link.set().ids().contains(&id)) {
            (false, true) => Err(Trouble::Running(id)),
            (true, _) if self.link.give(id, job) => Ok(()),
            _ => Err(Trouble::Gone(id)),
        }
    }
}

fn failed(id: VcpuId, ioctl: &'static str) -> impl FnOnce(Errno) -> Trouble {
    move |errno| Trouble::Ioctl { id, ioctl, errno }
}

impl Vcpus for Live {
    fn ids(&self) -> Vec<VcpuId> {
        let mut ids = self.link.set().ids();
        ids.sort();
        ids
    }

    fn has_events(&self) -> bool {
        self.link.has_events()
    }

    fn stop(&mut self) -> Result<Vec<Event>, Trouble> {
        let Some(debug) = DEBUG else {
            return Ok(Vec::new());
        };
        // Those that wait for jobs park as well: the pause waits for them like for any handler.
        let begun = self.link.set().begin_pause();
        self.go(&self.held.iter().copied().collect::<Vec<_>>());
        let whole = self.link.set().pause()?;
        let (events, pauses) = self.link.next_stop();
        self.link.set_holding(true);
        self.link.set().request_all(debug);
        drop((begun, whole, pauses));
        self.held = self.link.set().ids().into_iter().collect();
        Ok(events)
    }

    fn go(&mut self, ids: &[VcpuId]) {
        for id in ids {
            self.held.remove(id);
            self.link.go(*id);
        }
        self.link.set_holding(!self.held.is_empty());
    }

    fn state(&self, id: VcpuId) -> Result<State, Trouble> {
        self.on(id, move |vcpu| read_state(id, vcpu.fd()))?
    }

    fn set_state(&self, id: VcpuId, old: &State, new: &State) -> Result<(), Trouble> {
        let (old, new) = (*old, *new);
        self.on(id, move |vcpu| {
            write_state(id, vcpu.fd(), &old, &new).inspect_err(|_| {
                // What was set before it failed.
                if let Err(error) = write_state(id, vcpu.fd(), &new, &old) {
                    log::warn!("{error}: some of the registers have changed");
                }
            })
        })?
    }

    fn translate(&self, id: VcpuId, linear: u64) -> Result<Option<GuestAddress>, Trouble> {
        Ok(self.on(id, move |vcpu| vcpu.translate(linear))??)
    }

    fn arm(
        &self,
        id: VcpuId,
        debug: &GuestDebug,
        patches: &Arc<[GuestAddress]>,
    ) -> Result<(), Trouble> {
        let (answer, answered) = channel();
        let armed = Armed {
            debug: *debug,
            patches: patches.clone(),
        };
        self.give(id, Job::Arm(armed, answer))?;
        Ok(answered.recv().map_err(|_| Trouble::Gone(id))??)
    }

    fn read(&self, at: GuestAddress, into: &mut [u8]) -> Result<(), Trouble> {
        let memory = self.memory.snapshot();
        let read = file_pages::read(&memory, at.0, into);
        read.map_err(|error| no_memory(at, &error))
    }

    fn write(&self, at: GuestAddress, bytes: &[u8]) -> Result<(), Trouble> {
        let memory = self.memory.snapshot();
        let found = file_pages::find(&memory, at.0..at.0.saturating_add(bytes.len() as u64));
        found.map_err(|error| no_memory(at, &error))?;
        let written = memory.write_slice(bytes, at);
        written.map_err(|_| Trouble::NoMemory(at.0))
    }

    fn has_watchpoints(&self) -> bool {
        *self.watchpoints.get_or_init(|| {
            let tried = trial::watchpoints(&self.kvm);
            tried.unwrap_or_else(|error| {
                log::warn!("watchpoints cannot be tried, and are taken to work: {error}");
                true
            })
        })
    }

    fn has_software_breakpoints(&self) -> bool {
        *self.software.get_or_init(|| {
            let tried = trial::software_breakpoints(&self.kvm);
            tried.unwrap_or_else(|error| {
                log::warn!("software breakpoints cannot be tried, and are done without: {error}");
                false
            })
        })
    }

    fn can_block_interrupts(&self) -> bool {
        *self.block.get_or_init(|| {
            let kvm = Kvm::open_at(&self.kvm);
            kvm.is_ok_and(|kvm| kvm.capabilities().guest_debug_block_interrupts())
        })
    }
}

/// None is there, or it cannot be had.
fn no_memory(at: GuestAddress, error: &ReadError) -> Trouble {
    if !matches!(error, ReadError::Read(_)) {
        // Why has been told, and it may be asked for again and again.
        log::debug!(
            "the debugger cannot have guest memory at {:#x}: {}",
            at.0,
            Chain(error)
        );
    }
    Trouble::NoMemory(at.0)
}

fn read_state(id: VcpuId, fd: &VcpuFd) -> Result<State, Trouble> {
    Ok(State {
        regs: fd.get_regs().map_err(failed(id, "KVM_GET_REGS"))?,
        sregs: fd.get_sregs().map_err(failed(id, "KVM_GET_SREGS"))?,
        fpu: fpu::of_xsave(&xsave(id, fd)?)
            .ok_or_else(|| failed(id, "KVM_GET_XSAVE")(Errno::new(libc::EINVAL)))?,
        kernel_gs_base: kernel_gs_base(fd),
    })
}

/// As the host has it: an older one knows the shorter form alone.
fn xsave(id: VcpuId, fd: &VcpuFd) -> Result<Vec<u8>, Trouble> {
    fd.xsave(true)
        .or_else(|_| fd.xsave(false))
        .map_err(failed(id, "KVM_GET_XSAVE"))
}

/// A host that does not tell it has it as 0.
fn kernel_gs_base(fd: &VcpuFd) -> u64 {
    let entry = kvm_msr_entry {
        index: MSR_KERNEL_GS_BASE,
        ..Default::default()
    };
    let Ok(mut msrs) = Msrs::from_entries(&[entry]) else {
        return 0;
    };
    match fd.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map_or(0, |entry| entry.data),
        _ => 0,
    }
}

/// Writes what differs. System registers first: they are what KVM refuses.
fn write_state(id: VcpuId, fd: &VcpuFd, old: &State, new: &State) -> Result<(), Trouble> {
    if old.sregs != new.sregs {
        let set = fd.set_sregs(&new.sregs);
        set.map_err(failed(id, "KVM_SET_SREGS"))?;
    }
    if old.fpu != new.fpu {
        let mut area = xsave(id, fd)?;
        fpu::to_xsave(&new.fpu, &mut area);
        let set = AccessVcpu::set_xsave(fd, &area);
        set.map_err(failed(id, "KVM_SET_XSAVE"))?;
    }
    if old.kernel_gs_base != new.kernel_gs_base {
        let entry = kvm_msr_entry {
            index: MSR_KERNEL_GS_BASE,
            data: new.kernel_gs_base,
            ..Default::default()
        };
        let refused = || failed(id, "KVM_SET_MSRS")(Errno::new(libc::EINVAL));
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| refused())?;
        match fd.set_msrs(&msrs).map_err(failed(id, "KVM_SET_MSRS"))? {
            1 => {}
            _ => return Err(refused()),
        }
    }
    if old.regs != new.regs {
        fd.set_regs(&new.regs).map_err(failed(id, "KVM_SET_REGS"))?;
    }
    Ok(())
}
