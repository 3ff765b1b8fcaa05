// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The composition: a VM from a [`Config`], out of the crates and the devices.
//!
//! ```text
//!  Config ──► boot::plan ──► VmSetup ──► memslots ──► irqchip ──► vCPUs ──► bus ──► threads
//!             (files and       │                                                     │
//!              numbers only)   └ from here on KVM may refuse            KVM_RUN ◄────┘
//! ```
//!
//! # The order of set-up
//!
//! It decides how long a start takes, because some of KVM's calls wait for an SRCU grace period of
//! KVM's own I/O buses or memory slots (6 to 15 ms on the hosts of HOSTS.md's table):
//!
//! 1. **Everything that needs no KVM** first: the kernel's headers, the boot plan, the ACPI tables.
//!    What is wrong with the configuration is found before anything exists.
//! 2. **Readers' barriers** are made free (`srcu::prepare`) while the process has one thread: with two,
//!    the kernel waits for a grace period of its own.
//! 3. **CPUID** is asked for on a thread of its own while the rest goes on: KVM's slowest answer, and
//!    the vCPUs are the first to need it. Only a guest that is to have a certain processor, or so much memory
//!    that the processor's address bits may not reach, waits for it at once. Only then the
//!    host is asked for what it may not have, huge pages and nodes.
//! 4. **Memory slots** before anything that registers on KVM's buses: a slot made after the
//!    in-kernel irqchip waits for a grace period. The firmware's is one of them, read-only
//!    ([`memory`](crate::memory)): where there are ACPI tables, for elsewhere there is no firmware.
//! 5. **The irqchip** before the first vCPU, as KVM demands it.
//! 6. **vCPUs**, their CPUID, MSRs and registers.
//! 7. **Devices**, which are user-space tables: no call to KVM. The split irqchip's IOAPIC is one of
//!    them, and its edges are messages (`KVM_SIGNAL_MSI`), for which KVM waits for nothing. With the
//!    in-kernel one interrupts are irqfds that are attached when they are first raised. In neither is
//!    a routing table committed as long as no level-triggered pin is raised. An ioeventfd would come here or later: with one, the VM's end waits as well. So does
//!    it with a coalesced zone, which comes when a guest has written much
//!    ([`coalesce`](crate::devices::coalesce)).
//!
//! `tests/kvm_ioctl_order.rs` holds it against the ioctls of a real run.

mod blank;
mod compose;
pub mod control;
mod cpuid;
mod error;
mod lazy;
mod restore;
mod running;
mod saving;
mod start;
pub mod tracking;
mod wiring;

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex};

use io_bus::{IoBus, Registration};
use irq_routing::Irqchip;
use irq_routing::ioapic::{Notifier, SplitIoapic};
use kvm_core::stats::{StatsError, StatsFd};
use kvm_core::{Vcpu, VcpuId, VcpuSet, Vm};
use kvm_ioctls::VmFd;

use crate::arch::boot::{self, BootConfig, Image, ImageKind};
use crate::arch::{acpi, layout, reset_vector};
use crate::config::{self, Config};
use crate::devices::acpi_power::AcpiPower;
use crate::devices::coalesce::Coalescing;
use crate::devices::interrupt::{Interrupt, Wire};
use crate::devices::ioapic::Ioapic;
use crate::devices::rtc::Rtc;
use crate::devices::serial::{ConsoleOut, SerialPort};
use crate::devices::virtio::any::{Devices, PlacedDevice};
use crate::devices::virtio::bay;
use crate::devices::virtio::console::config::Stdio;
use crate::devices::virtio::rng::random_id;
use crate::end::EndSignal;
use crate::exits::{self, Handler, run_vcpu};
use crate::gdb;
use crate::host_memory::SYSFS;
use crate::kvm_stats::KvmReaders;
use crate::lazy::LazyMemory;
use crate::mapped_file::MappedFile;
use crate::memory::{Memslots, slots_of};
use crate::snapshot::ChainTip;
use crate::stats::{ExitCounters, Named};
pub(crate) use blank::{Blank as BlankVm, Framed};
use compose::{Composition, Frame};
pub use control::{ControlError, RunState};
use cpuid::ask_kvm;
pub use error::BuildError;
pub use running::Running;
pub use saving::HostSideError;
use start::StartState;
use tracking::Tracker;

/// The vCPU that KVM starts at once; the others wait for it.
const BOOT_VCPU: VcpuId = VcpuId(0);

type Host = Arc<VmFd>;
type Com1 = SerialPort<Interrupt<Wire<Host>>, ConsoleOut>;
type Power = AcpiPower<Interrupt<Wire<Host>>>;

/// A machine that has been built and whose vCPUs have not run yet.
pub struct Machine {
    parts: Parts,
    vcpus: Vec<Vcpu>,
    end: Arc<EndSignal>,
    kvm_stats: Option<KvmReaders<StatsFd>>,
    /// Where a debugger is listened for.
    gdb: Option<gdb::Listener>,
    /// It goes on from a snapshot.
    restored: bool,
    /// It comes from another process, which has the guest until it says otherwise.
    handed_over: bool,
}

/// What lives as long as the guest. Fields are dropped in this order: devices first, which hold
/// interrupts, then interrupts' owner, then memory.
struct Parts {
    /// What it is made of.
    config: Config,
    /// So many of the virtio devices are of the configuration.
    configured: usize,
    irqchip: Irqchip,
    /// The chip of `ioapic`.
    chip: Option<SplitIoapic<Host>>,
    com1: Arc<Com1>,
    power: Arc<Power>,
    rtc: Arc<Rtc>,
    /// Before the bus: its zone is one of the bus's.
    console: Arc<Coalescing<Host, Com1>>,
    /// With the split irqchip.
    ioapic: Option<Arc<Ioapic<Host>>>,
    /// virtio devices, before their interrupts' owner and before memory.
    virtio: Vec<Arc<dyn PlacedDevice>>,
    /// Where a virtio console has stdin.
    stdio: Option<Stdio>,
    /// Kept for their drop, which ends the calls.
    _unmasked: Vec<Notifier>,
    /// Kept for their drop, which takes the devices off the bus.
    _registrations: Vec<Registration>,
    /// What is on it, by name.
    names: Vec<Named>,
    bus: IoBus,
    /// Has the slots, which its drop deletes.
    tracker: Tracker,
    /// On which snapshot the next one may build.
    chain: ChainTip,
    /// Before the slots: its memory comes while it runs.
    lazy: Option<LazyMemory>,
    /// Of a machine that was restored, the file that its memory is mapped from.
    mapped: Option<MappedFile>,
    memslots: Memslots,
    vm: Vm,
}

impl Machine {
    /// Builds what `config` describes, with the serial console's output on `console` and its end
    /// told to `end`. Blocks for the reading of the kernel and the initrd, and until memory is present
    /// that is to be so: [`build_watched`](Self::build_watched) can end that.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn build(
        config: &Config,
        console: impl AsFd,
        end: &Arc<EndSignal>,
    ) -> Result<Self, BuildError> {
        Self::build_watched(config, console, end, || {})
    }

    /// [`build`](Self::build) with these virtio devices instead of the configuration's: for devices of a program's
    /// own.
    ///
    /// ```no_run
    /// # use std::sync::Arc;
    /// # use reference_vmm::{config::Config, end::EndSignal, vm::Machine};
    /// use reference_vmm::devices::virtio::{any::Devices, rng::Rng};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let (config, end) = (Config::new("vmlinux"), Arc::new(EndSignal::new()?));
    /// let mut devices = Devices::open(&config, std::io::stdout())?;
    /// devices.add("mine", Rng);
    /// let machine = Machine::build_with(&config, devices, std::io::stdout(), &end)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn build_with(
        config: &Config,
        devices: Devices,
        console: impl AsFd,
        end: &Arc<EndSignal>,
    ) -> Result<Self, BuildError> {
        Self::build_all(config, Some(devices), console, end, || {})
    }

    /// [`build`](Self::build), and while memory is made present `watch` is called, several times a second
    /// or before each huge page. An `end` that is told meanwhile, by it or by another thread, ends the
    /// building.
    ///
    /// # Errors
    /// [`BuildError`], of which [`BuildError::Ended`] is no failure; nothing is left behind.
    pub fn build_watched(
        config: &Config,
        console: impl AsFd,
        end: &Arc<EndSignal>,
        watch: impl Fn(),
    ) -> Result<Self, BuildError> {
        Self::build_all(config, None, console, end, watch)
    }

    fn build_all(
        config: &Config,
        devices: Option<Devices>,
        console: impl AsFd,
        end: &Arc<EndSignal>,
        watch: impl Fn(),
    ) -> Result<Self, BuildError> {
        config.validate()?;

        // 1. Files and numbers.
        let kernel = config.kernel.as_deref();
        let kernel = kernel.ok_or(config::ConfigError::NoKernel)?;
        let mut kernel = Image::open(ImageKind::Kernel, kernel)?;
        let mut initrds = config
            .initrd
            .iter()
            .map(|path| Image::open(ImageKind::Initrd, path))
            .collect::<Result<Vec<_>, _>>()?;
        let ram = memslots::ram_layout(config.memory.size, layout::MMIO_HOLE)?;
        let topology = config.cpus.topology()?;
        let template = config.cpu.template()?;
        let devices = devices.map_or_else(|| Devices::open(config, &console), Ok)?;
        devices.check()?;
        if config.irqchip == config::Irqchip::None && !devices.is_empty() {
            return Err(config::ConfigError::VirtioWithoutInterrupts.into());
        }
        let places = bay::places(devices.len());
        // A guest without pin interrupts could not use what the tables describe.
        let acpi = (config.irqchip != config::Irqchip::None)
            .then(|| {
                acpi::tables(&acpi::AcpiConfig {
                    virtio_mmio: &places,
                    ..acpi::AcpiConfig::new(topology)
                })
            })
            .transpose()?;
        let plan = boot::plan(
            &mut kernel,
            &initrds,
            &BootConfig {
                ram: &ram,
                cmdline: &config.cmdline,
                rsdp: acpi.as_ref().map(|acpi| acpi.rsdp),
                preference: boot::Preference::Fastest,
            },
        )?;
        // A slot for the firmware where there is any.
        let mut new_slots = config.memory.slots(&ram, acpi.is_some());

        // 2. and 3. What KVM takes at all, with CPUID asked for while the rest goes on.
        srcu::prepare();
        let kvm = match ask_kvm(config, topology, template, &ram) {
            // A wish that cannot be is told where there is no KVM as well.
            Err(error @ BuildError::Open(_)) => Err(error),
            asked => Ok(asked?),
        };
        // What the host has, and after what KVM takes: more huge pages do not help a guest that could
        // not address them.
        let refused = config.memory.check_host(&new_slots);
        refused.map_err(BuildError::HostMemory)?;
        config.memory.check_available()?;
        let (kvm, cpuid) = kvm?;
        config.memory.check_kvm(kvm.fd())?;
        let sysfs = Path::new(SYSFS);
        let told = [config.memory.thp_obstacle(sysfs), config.memory.excess()];
        for told in told.into_iter().flatten() {
            log::warn!("{told}");
        }

        // 4. The VM and its memory.
        let setup = kvm.create_vm()?.named("guest");
        let memslots = slots_of(setup.fd().clone());
        config.memory.provide(&memslots, &mut new_slots)?;
        let slots = memslots.create_all(new_slots)?;
        let memory = memslots.snapshot();
        // Before anything is written there: a huge page that its node has not is a SIGBUS at a touch.
        let go_on = || {
            watch();
            !end.is_told()
        };
        let present = config.memory.make_present(&memory, go_on);
        present.map_err(BuildError::Prefault)?;
        if end.is_told() {
            return Err(BuildError::Ended);
        }
        plan.load(&*memory, &mut kernel, &mut initrds)?;
        if let Some(acpi) = &acpi {
            boot::write_all(&*memory, &acpi.writes)?;
            boot::write_all(&*memory, &[reset_vector::block()])?;
            let generation = random_id().map_err(|source| BuildError::Process {
                what: "make the machine's generation id",
                source,
            })?;
            boot::write_all(&*memory, &[(layout::GENERATION_ID, generation.to_vec())])?;
        }
        let start = StartState::of(&plan.entry)?;
        boot::write_all(&*memory, &[start.tables()])?;
        drop((memory, kernel, initrds));

        // 5. to 7.
        let tracker = Tracker::new(slots, setup.fd(), config.dirty_log);
        let tracker = tracker.map_err(BuildError::DirtyLog)?;
        let frame = Frame::new(config, setup)?;
        let mut cpuid = cpuid.answer(&ram)?;
        let vcpus = topology.apic_ids().map(|id| {
            let vcpu = frame.vm.create_vcpu(id)?;
            if id == BOOT_VCPU {
                cpuid.tell_time(&vcpu);
            }
            cpuid.set_up(&vcpu, config)?;
            if id == BOOT_VCPU {
                start.set(&vcpu, &plan.entry)?;
            }
            Ok::<_, BuildError>(vcpu)
        });
        let vcpus = vcpus.collect::<Result<_, _>>()?;
        let composition = Composition {
            config,
            frame,
            vcpus,
            memslots,
            tracker,
            devices,
            console,
            end,
            saved: None,
        };
        composition.compose()
    }

    /// Every snapshot of it begins to track what is written behind it, so that an incremental one may build on it
    /// ([`SnapshotRequest::track`](crate::snapshot::SnapshotRequest::track)).
    pub fn track_snapshots(&mut self) {
        self.parts.chain.track_always();
    }

    /// Puts the guest under a debugger: it waits for one that connects to `listener` before its first
    /// instruction.
    pub fn debug(&mut self, listener: gdb::Listener) {
        self.gdb = Some(listener);
    }

    /// Has the accesses of each device counted from now on: [`Running::stats`] shows them then. Each
    /// costs some nanoseconds more.
    pub fn count_accesses(&self) {
        self.parts.bus.count(true);
    }

    /// Has KVM's own numbers read as well: [`Running::stats`] shows them then. It takes a file descriptor
    /// for the VM and one for each vCPU.
    ///
    /// # Errors
    /// [`StatsError`]; the machine is what it was.
    pub fn read_kvm_statistics(&mut self) -> Result<(), StatsError> {
        self.kvm_stats = Some(KvmReaders::open(&self.parts.vm, &self.vcpus)?);
        Ok(())
    }

    /// It is another process's guest still: however it is started it stands still, and [`Running::take_over`] alone lets it
    /// go on.
    pub(crate) fn await_hand_over(&mut self) {
        self.handed_over = true;
    }

    /// Starts a thread for each vCPU, named `vcpu0` and so on, the boot vCPU's as the last.
    ///
    /// # Errors
    /// A thread cannot be started; those that were have been stopped again. A guest that was built has not run; one that was
    /// restored, and not paused, may have: each of its vCPUs runs as soon as it has a thread.
    pub fn start(self) -> Result<Running, BuildError> {
        self.start_as(RunState::Running)
    }

    /// As [`start`](Self::start), or [paused](Running::pause) before the first instruction: `state` is what it is then.
    ///
    /// # Errors
    /// As of [`start`](Self::start).
    pub fn start_as(self, state: RunState) -> Result<Running, BuildError> {
        let Machine {
            parts,
            vcpus,
            end,
            kvm_stats,
            gdb,
            restored,
            handed_over,
        } = self;
        // Who comes from elsewhere stands still, whatever was asked for.
        let state = match handed_over {
            true => RunState::Paused,
            false => state,
        };
        let set = VcpuSet::new(parts.vm.identity().clone());
        let process = |what| move |source| BuildError::Process { what, source };
        // Before there is a vCPU's thread: none runs an instruction before the debugger lets it.
        let link = gdb.is_some().then(|| gdb::Link::new(&set));
        let link = link.transpose().map_err(process("make an eventfd"))?;
        let control = match state {
            RunState::Running => control::Control::default(),
            // As early.
            RunState::Paused if handed_over => control::Control::handed_over(set.begin_pause()),
            RunState::Paused => control::Control::held(set.begin_pause()),
        };
        let live = Arc::new(AtomicUsize::new(vcpus.len()));
        let stopping = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(exits::Shared {
            bus: parts.bus.clone(),
            memslots: parts.memslots.clone(),
            console: parts.console.clone(),
            ioapic: parts.ioapic.clone(),
            rings: parts.tracker.rings().cloned(),
            owing: [parts.com1.clone(), parts.power.clone()],
            end: end.clone(),
            machine_checks: (parts.lazy.as_ref())
                .and_then(|lazy| lazy.poisons().then_some(vcpus.len())),
            mapped: parts.mapped.clone(),
            loss: parts.lazy.as_ref().map(LazyMemory::loss),
            stopping: stopping.clone(),
        });
        let mut running = Running {
            debugger: None,
            control,
            set,
            threads: Vec::with_capacity(vcpus.len()),
            stopping,
            waits: Vec::with_capacity(vcpus.len()),
            counters: Vec::with_capacity(vcpus.len()),
            kvm_stats: kvm_stats.map(Mutex::new),
            left_behind: AtomicBool::new(false),
            parts,
        };
        let mut ready = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let counters = Arc::new(ExitCounters::default());
            let who = running.parts.vm.identity().vcpu(vcpu.id());
            let side = link.as_ref().map(|link| link.vcpu(vcpu.id()));
            let handler = Handler::new(who, &shared, counters.clone(), side);
            running.counters.push(counters);
            running.waits.push(handler.interrupter());
            ready.push((running.set.enroll(vcpu)?, handler));
        }
        for device in &running.parts.virtio {
            match (restored, state) {
                // Before the vCPUs, so that what these tell them finds them awake.
                (true, RunState::Running) => device.resume(),
                // No driver has told it anything: it has nothing under way.
                (false, RunState::Paused) => _ = device.pause(control::PATIENCE),
                (true, RunState::Paused) | (false, RunState::Running) => {}
            }
        }
        // The boot vCPU is the first, and begins as soon as it has a thread; KVM has the others wait until
        // it starts them. So it is the last here: a start that fails has run nothing of the guest, unless that was
        // restored, for then all of them begin. Where that must not be (a guest that another process has still) it is
        // started paused.
        for (runner, handler) in ready.into_iter().rev() {
            // On an error `running` is dropped, which stops the threads started so far.
            let name = format!("vcpu{}", runner.id().0);
            let end = end.clone();
            let live = live.clone();
            let thread = std::thread::Builder::new()
                .name(name)
                .spawn(move || run_vcpu(runner, handler, &end, &live))
                .map_err(|source| BuildError::Process {
                    what: "start a vCPU thread",
                    source,
                })?;
            running.threads.push(thread);
        }
        if let Some(lazy) = &running.parts.lazy {
            lazy.machine_is(state);
        }
        // Last: a debugger that connects at once stops those vCPUs that are enrolled.
        if let (Some(listener), Some(link)) = (gdb, &link) {
            let (memory, kvm) = (&running.parts.memslots, &running.parts.config.kvm);
            let debugger = gdb::Debugger::start(listener, link, memory, kvm, &end);
            running.debugger = Some(debugger.map_err(process("start the debugger's thread"))?);
        }
        Ok(running)
    }
}
