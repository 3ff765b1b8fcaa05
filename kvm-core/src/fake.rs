// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU without KVM, for tests: it plays a script, and fails where it is told to; and statistics
//! without KVM.
//!
//! [`FakeVcpu`] is a [`RunVcpu`] as KVM's own is, so a run loop, a handler or a whole monitor's
//! lifecycle can be driven on it, with any exit and any errno, on a machine without `/dev/kvm`.
//!
//! ```
//! use kvm_core::fake::{FakeVcpu, Step};
//! use kvm_core::{Exit, Flow, HaltReason, Identity, VcpuId, VcpuSet, VcpuView};
//!
//! let vcpu = FakeVcpu::new(VcpuId(0), [Step::pio_out(0x3f8, 1, b"hi"), Step::hlt()]);
//! let runner = VcpuSet::new(Identity::vm("test")).enroll(vcpu).unwrap();
//! let mut seen = Vec::new();
//! let Err(halt) = runner.run(|_: &VcpuView<'_, _>, exit: Exit<'_>| match exit {
//!     Exit::PioOut { port: 0x3f8, data, .. } => {
//!         seen.extend_from_slice(data);
//!         Flow::Continue
//!     }
//!     _ => Flow::Stop("halted"),
//! });
//! assert_eq!(halt.reason, HaltReason::Handler("halted"));
//! assert_eq!(seen, b"hi");
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings as kvm;
use vmm_sys_util::errno::Error as Errno;

use crate::exit::EXIT_AREA_START;
use crate::identity::VcpuId;
use crate::kick::Doorbell;
use crate::memory_error::BusError;
use crate::run::RunVcpu;
pub use crate::stats::fake::{FakeStat, FakeStats};
use crate::sync::{AtomicU8, Condvar, Mutex, Ordering, lock, wait};

const EINTR: i32 = 4;
const AREA: usize = 2 * 4096 - EXIT_AREA_START;
const PIO_DATA: usize = 4096;
const UNION: usize = 32;

/// What a [`FakeVcpu`] does in one `KVM_RUN`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Runs guest code until it is kicked. What a script ends with.
    Guest,
    /// Fails with this errno.
    Errno(i32),
    /// A `SIGBUS` interrupts it.
    Signal(BusError),
    /// Exits with this reason; the bytes go to the given offsets of `kvm_run`.
    Exit {
        /// `KVM_EXIT_…`.
        reason: u32,
        /// Offset in `kvm_run`, and what is there.
        bytes: Vec<(usize, Vec<u8>)>,
        /// The errno that comes with it, if any.
        errno: Option<i32>,
    },
}

impl Step {
    /// An exit without data.
    #[must_use]
    pub fn exit(reason: u32) -> Self {
        Self::Exit {
            reason,
            bytes: Vec::new(),
            errno: None,
        }
    }

    /// A halt.
    #[must_use]
    pub fn hlt() -> Self {
        Self::exit(kvm::KVM_EXIT_HLT)
    }

    /// A triple fault.
    #[must_use]
    pub fn shutdown() -> Self {
        Self::exit(kvm::KVM_EXIT_SHUTDOWN)
    }

    /// A port write of `data.len() / size` items.
    #[must_use]
    pub fn pio_out(port: u16, size: u8, data: &[u8]) -> Self {
        Self::pio(kvm::KVM_EXIT_IO_OUT as u8, port, size, data)
    }

    /// A port read of `count` items.
    #[must_use]
    pub fn pio_in(port: u16, size: u8, count: usize) -> Self {
        Self::pio(
            kvm::KVM_EXIT_IO_IN as u8,
            port,
            size,
            &vec![0; usize::from(size) * count],
        )
    }

    fn pio(direction: u8, port: u16, size: u8, data: &[u8]) -> Self {
        let count = data.len() / usize::from(size.max(1));
        let mut header = vec![direction, size];
        header.extend_from_slice(&port.to_ne_bytes());
        header.extend_from_slice(&(count as u32).to_ne_bytes());
        header.extend_from_slice(&(PIO_DATA as u64).to_ne_bytes());
        let bytes = vec![(UNION, header), (PIO_DATA, data.to_vec())];
        Self::Exit {
            reason: kvm::KVM_EXIT_IO,
            bytes,
            errno: None,
        }
    }

    /// A memory-mapped read of `len` bytes.
    #[must_use]
    pub fn mmio_read(addr: u64, len: u32) -> Self {
        Self::mmio(addr, &[], len, 0)
    }

    /// A memory-mapped write.
    #[must_use]
    pub fn mmio_write(addr: u64, data: &[u8]) -> Self {
        Self::mmio(addr, data, data.len() as u32, 1)
    }

    fn mmio(addr: u64, data: &[u8], len: u32, is_write: u8) -> Self {
        let mut padded = [0; 8];
        for (slot, byte) in padded.iter_mut().zip(data) {
            *slot = *byte;
        }
        let mut bytes = addr.to_ne_bytes().to_vec();
        bytes.extend_from_slice(&padded);
        bytes.extend_from_slice(&len.to_ne_bytes());
        bytes.push(is_write);
        Self::Exit {
            reason: kvm::KVM_EXIT_MMIO,
            bytes: vec![(UNION, bytes)],
            errno: None,
        }
    }

    /// A memory fault at `addr`, with `errno` (`EFAULT` or `EHWPOISON` in the kernel).
    #[must_use]
    pub fn memory_fault(addr: u64, size: u64, errno: i32) -> Self {
        Self::memory_fault_as(0, addr, size, errno)
    }

    /// The same of memory that was asked for with `flags` (`KVM_MEMORY_EXIT_FLAG_…`).
    #[must_use]
    pub fn memory_fault_as(flags: u64, addr: u64, size: u64, errno: i32) -> Self {
        let words = [flags, addr, size].map(u64::to_ne_bytes).concat();
        let reason = kvm::KVM_EXIT_MEMORY_FAULT;
        Self::Exit {
            reason,
            bytes: vec![(UNION, words)],
            errno: Some(errno),
        }
    }
}

/// What a [`FakeVcpu`] has seen, and what it is to do at calls other than `run`. Shared, so that a
/// test can look while the vCPU is on its thread.
pub struct FakeState {
    immediate_exit: AtomicU8,
    signal: Mutex<Signal>,
    arrived: Condvar,
    /// The standard library's: a test's own, which loom need not try every order of.
    bus_errors: std::sync::Mutex<VecDeque<BusError>>,
    /// A test's own as well.
    cpu_time: std::sync::Mutex<Duration>,
}

#[derive(Default)]
struct Signal {
    pending: bool,
    in_guest: bool,
    log: FakeLog,
}

/// How often a [`FakeVcpu`] was called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FakeLog {
    /// Signals that it got.
    pub rings: usize,
    /// `KVM_RUN`.
    pub runs: usize,
    /// `KVM_RUN` that ran guest code.
    pub guest: usize,
    /// Accesses completed.
    pub completed: usize,
    /// `KVM_KVMCLOCK_CTRL`.
    pub clock: usize,
    /// `KVM_NMI`.
    pub nmis: usize,
}

impl FakeState {
    /// How often it was called so far.
    pub fn log(&self) -> FakeLog {
        lock(&self.signal).log
    }

    /// Whether it runs guest code at this moment. Unlike [`GuestMode::InGuestMode`](crate::GuestMode), which
    /// a vCPU has a little longer, on its way in and out.
    pub fn is_in_guest(&self) -> bool {
        lock(&self.signal).in_guest
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, VecDeque<BusError>> {
        let kept = self.bus_errors.lock();
        kept.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Its thread has used so much more CPU time; by itself it uses none.
    pub fn has_run(&self, time: Duration) {
        let mut used = self.used();
        *used = used.saturating_add(time);
    }

    fn used(&self) -> std::sync::MutexGuard<'_, Duration> {
        let used = self.cpu_time.lock();
        used.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The vCPU's thread takes a `SIGBUS` now: in a handler, for example.
    pub fn bus_error(&self, error: BusError) {
        self.kept().push_back(error);
    }
}

impl Doorbell for FakeState {
    fn set_immediate_exit(&self, on: bool) {
        self.immediate_exit.store(u8::from(on), Ordering::Relaxed);
    }

    fn ring(&self) {
        let mut signal = lock(&self.signal);
        signal.pending = true;
        signal.log.rings += 1;
        self.arrived.notify_all();
    }

    fn cpu_time(&self) -> Option<Duration> {
        Some(*self.used())
    }
}

/// A vCPU that plays a script.
pub struct FakeVcpu {
    id: VcpuId,
    script: VecDeque<Step>,
    state: Arc<FakeState>,
    area: Vec<u8>,
    access_pending: bool,
    attach: Option<i32>,
    clock: Option<i32>,
    nmi: Option<i32>,
    waits: usize,
}

impl FakeVcpu {
    /// A vCPU that takes one step of `script` in each `KVM_RUN`, and after them runs guest code until
    /// it is kicked, for ever.
    pub fn new(id: VcpuId, script: impl IntoIterator<Item = Step>) -> Self {
        Self {
            id,
            script: script.into_iter().collect(),
            state: Arc::new(FakeState {
                immediate_exit: AtomicU8::new(0),
                signal: Mutex::new(Signal::default()),
                arrived: Condvar::new(),
                bus_errors: std::sync::Mutex::default(),
                cpu_time: std::sync::Mutex::default(),
            }),
            area: vec![0; AREA],
            access_pending: false,
            attach: None,
            clock: None,
            nmi: None,
            waits: 0,
        }
    }

    /// Attaching fails with this errno.
    #[must_use]
    pub fn attach_fails(mut self, errno: i32) -> Self {
        self.attach = Some(errno);
        self
    }

    /// `KVM_KVMCLOCK_CTRL` fails with this errno.
    #[must_use]
    pub fn kvmclock_ctrl_fails(mut self, errno: i32) -> Self {
        self.clock = Some(errno);
        self
    }

    /// `KVM_NMI` fails with this errno.
    #[must_use]
    pub fn nmi_fails(mut self, errno: i32) -> Self {
        self.nmi = Some(errno);
        self
    }

    /// It waits for INIT until it has said `EAGAIN` so many times: an AP that is woken.
    #[must_use]
    pub fn waits_for_init(mut self, wakes: usize) -> Self {
        self.waits = wakes;
        self
    }

    /// What it has seen.
    #[must_use]
    pub fn state(&self) -> Arc<FakeState> {
        self.state.clone()
    }

    /// The steps not taken yet.
    #[must_use]
    pub fn steps_left(&self) -> usize {
        self.script.len()
    }

    /// As KVM does it: a signal that was taken before `KVM_RUN` is gone, `immediate_exit` is read,
    /// then only a signal ends it.
    fn guest(&self) {
        let mut signal = lock(&self.state.signal);
        signal.log.guest += 1;
        signal.in_guest = true;
        while !signal.pending {
            signal = wait(&self.state.arrived, signal);
        }
        signal.in_guest = false;
    }

    fn exit(&mut self, reason: u32, bytes: Vec<(usize, Vec<u8>)>) {
        let reason = (8, reason.to_ne_bytes().to_vec());
        for (offset, bytes) in bytes.into_iter().chain([reason]) {
            let at = offset.saturating_sub(EXIT_AREA_START);
            for (slot, byte) in self.area.iter_mut().skip(at).zip(bytes) {
                *slot = byte;
            }
        }
    }
}

impl RunVcpu for FakeVcpu {
    type Fd = ();

    fn id(&self) -> VcpuId {
        self.id
    }

    fn doorbell(&self) -> Arc<dyn Doorbell> {
        self.state.clone()
    }

    fn attach(&mut self) -> Result<(), Errno> {
        self.attach.map_or(Ok(()), |errno| Err(Errno::new(errno)))
    }

    fn run(&mut self) -> Result<(), Errno> {
        // The handler of a signal that arrived in user space ran there and did nothing.
        let mut signal = lock(&self.state.signal);
        signal.pending = false;
        signal.log.runs += 1;
        signal.log.completed += usize::from(std::mem::take(&mut self.access_pending));
        drop(signal);
        if self.state.immediate_exit.load(Ordering::Relaxed) != 0 {
            return Err(Errno::new(EINTR));
        }
        match self.script.pop_front() {
            None | Some(Step::Guest) => {
                self.guest();
                Err(Errno::new(EINTR))
            }
            Some(Step::Errno(errno)) => Err(Errno::new(errno)),
            Some(Step::Signal(error)) => {
                self.state.bus_error(error);
                Err(Errno::new(EINTR))
            }
            Some(Step::Exit {
                reason,
                bytes,
                errno,
            }) => {
                self.access_pending = matches!(reason, kvm::KVM_EXIT_IO | kvm::KVM_EXIT_MMIO);
                self.exit(reason, bytes);
                errno.map_or(Ok(()), |errno| Err(Errno::new(errno)))
            }
        }
    }

    fn exit_area(&mut self) -> (&mut [u8], &()) {
        (&mut self.area, &())
    }

    fn kvmclock_ctrl(&mut self) -> Result<(), Errno> {
        lock(&self.state.signal).log.clock += 1;
        self.clock.map_or(Ok(()), |errno| Err(Errno::new(errno)))
    }

    fn nmi(&mut self) -> Result<(), Errno> {
        lock(&self.state.signal).log.nmis += 1;
        self.nmi.map_or(Ok(()), |errno| Err(Errno::new(errno)))
    }

    fn waits_for_init(&mut self) -> bool {
        // Asked once for each EAGAIN; the last wake is by INIT.
        self.waits = self.waits.saturating_sub(1);
        self.waits > 0
    }
    fn take_bus_error(&mut self) -> Option<BusError> {
        self.state.kept().pop_front()
    }
}
