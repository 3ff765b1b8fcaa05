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

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use io_bus::{BusKind, Interrupter, IoBus, IoDevice, IoRange, Registration};
use irq_routing::ioapic::{IOAPIC_LEN, Notifier, SplitIoapic};
use irq_routing::{Gsi, Irqchip, IrqchipError, IrqchipKind, Pit, Routing};
use kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR;
use kvm_core::arch::x86_64::cpuid::{HypervisorLeaves, Template, TemplateError, Timing};
use kvm_core::arch::x86_64::{
    BootState, CpuidError, CpuidPlan, LongModeTables, TablesError, Topology, boot_msrs, gdt,
};
use kvm_core::stats::{StatsError, StatsFd};
use kvm_core::{KickSignal, Kvm, Vcpu, VcpuId, VcpuSet, Vm};
use kvm_ioctls::VmFd;
use memslots::{GuestRam, Memslots, Slot};
use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_memory::GuestAddress;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::boot::{self, BootConfig, BootError, Image, ImageKind};
use crate::arch::{acpi, layout, reset_vector};
use crate::config::{self, Config};
use crate::console::{CHUNK, MOST_AT_ONCE};
use crate::devices::FIXED_PORTS;
use crate::devices::acpi_power::AcpiPower;
use crate::devices::coalesce::{Coalescing, PolledOutput};
use crate::devices::interrupt::{Interrupt, Wire};
use crate::devices::ioapic::Ioapic;
use crate::devices::power::{DebugExit, I8042, Pvpanic};
use crate::devices::rtc::Rtc;
use crate::devices::serial::{ConsoleOut, SerialPort};
use crate::devices::virtio::any::{AnyDevice, Devices, PlacedDevice};
use crate::devices::virtio::bay::{self, KvmDoorbells};
use crate::devices::virtio::console::config::{Stdio, terminal_size};
use crate::devices::virtio::interrupt::DriverLink;
use crate::devices::virtio::list::DeviceError;
use crate::devices::virtio::mmio::Place;
use crate::end::EndSignal;
use crate::exits::{self, Handler, SEND_OWED, SHOW_REGISTERS, run_vcpu};
use crate::gdb;
use crate::host_memory::SYSFS;
use crate::kvm_stats::{KvmReaders, KvmStats};
use crate::main_loop::GuestSide;
use crate::msrs;
use crate::stats::{ExitCounters, Named, Stats};

/// How long the end of a machine waits for a device's I/O that is under way.
const DEVICE_PATIENCE: Duration = Duration::from_secs(5);

/// The vCPU that KVM starts at once; the others wait for it.
const BOOT_VCPU: VcpuId = VcpuId(0);

type Host = Arc<VmFd>;
type Com1 = SerialPort<Interrupt<Wire<Host>>, ConsoleOut>;
type Power = AcpiPower<Interrupt<Wire<Host>>>;

/// A VM could not be built or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The kernel, an initrd or the command line cannot be used.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Memory does not fit into the machine's address space.
    #[error(transparent)]
    Layout(#[from] memslots::LayoutError),
    /// The machine cannot be described to the guest.
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    /// The page tables to start with cannot be made.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// A vCPU cannot be told what it is.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// The debug-exit ports lie over another device.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// The KVM device cannot be used.
    #[error(transparent)]
    Open(#[from] kvm_core::OpenError),
    /// KVM refused to make the VM or a vCPU.
    #[error(transparent)]
    Kvm(#[from] kvm_core::Error),
    /// This host has not the memory that was asked for: no such huge pages, or not enough of them, or
    /// no such NUMA node. Found before anything was made.
    #[error("this host has no such memory for the guest")]
    HostMemory(#[source] memslots::MapError),
    /// Guest memory could not be made.
    #[error("cannot make the guest's memory")]
    Memory(#[from] memslots::Error),
    /// Not all of guest memory could be made present.
    #[error("cannot make the guest's memory present")]
    Prefault(#[source] memslots::MapError),
    /// The end was told while the machine was built.
    #[error("the machine was ended before it was built")]
    Ended,
    /// The guest's memory would end above what the host's processor can address. Found before anything
    /// was made.
    #[error(
        "{given} bytes of memory would end at {end:#x}, and a guest of this host has {bits} address bits: \
         they end at {:#x}", 1u128 << bits
    )]
    AddressBits {
        /// The memory asked for.
        given: u64,
        /// Its end, with the hole below 4 GiB.
        end: u64,
        /// Width of guest physical addresses on this host.
        bits: u32,
    },
    /// More vCPUs than the host's KVM takes. Found before anything was made.
    #[error("{asked} vCPUs: this host's KVM takes at most {most}")]
    Cpus {
        /// Configured.
        asked: u32,
        /// `KVM_CAP_MAX_VCPUS`.
        most: u32,
    },
    /// An APIC id beyond those that the host's KVM takes. Found before anything was made.
    #[error("APIC id {highest}: this host's KVM takes numbers up to {most}")]
    ApicId {
        /// The topology's highest.
        highest: u32,
        /// `KVM_CAP_MAX_VCPU_ID`, less one.
        most: u32,
    },
    /// The host cannot be the processor that was asked for. Found before anything was made.
    #[error(transparent)]
    CpuModel(#[from] TemplateError),
    /// The interrupt controllers could not be made.
    #[error(transparent)]
    Irqchip(#[from] IrqchipError),
    /// The host's KVM has no local APICs without the rest.
    #[error("{0}; --irqchip kernel does without")]
    NoSplitIrqchip(IrqchipError),
    /// An interrupt could not be had.
    #[error("no interrupt for {device}")]
    Interrupt {
        /// The device.
        device: &'static str,
        /// Why.
        source: irq_routing::Error,
    },
    /// A device could not be put on the bus.
    #[error("cannot register {device}")]
    Bus {
        /// The device.
        device: &'static str,
        /// Why.
        source: io_bus::Error,
    },
    /// A virtio device cannot be had. Found before anything was made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A debugger cannot be listened for.
    #[error(transparent)]
    Gdb(#[from] gdb::ListenError),
    /// A vCPU is in the set already; two vCPUs with one number.
    #[error(transparent)]
    Control(#[from] kvm_core::ControlError),
    /// A system call of the monitor's own process failed.
    #[error("cannot {what}: {source}")]
    Process {
        /// What it was for.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
}

impl BuildError {
    /// The process's exit status: 2 what the user asked for cannot be, 1 the host refused.
    pub fn exit_status(&self) -> u8 {
        use memslots::MapError;
        match self {
            // Of the kernel's or initrd's file nothing is known yet: this process may open no more.
            BuildError::Boot(BootError::Open { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) =>
            {
                1
            }
            // Any other error of the host's memory is an errno: the host refused.
            BuildError::HostMemory(
                MapError::NoHugePageSize { .. }
                | MapError::NoHugePages { .. }
                | MapError::NoSuchNode { .. },
            ) => 2,
            // A path that is longer than a socket's can be.
            BuildError::Gdb(gdb::ListenError::Refused { source, .. })
                if source.kind() == io::ErrorKind::InvalidInput =>
            {
                2
            }
            BuildError::Device(error) if !error.is_users_fault() => 1,
            BuildError::Device(_)
            | BuildError::AddressBits { .. }
            | BuildError::Cpus { .. }
            | BuildError::ApicId { .. }
            | BuildError::CpuModel(_)
            | BuildError::Boot(_)
            | BuildError::Layout(_)
            | BuildError::Gdb(gdb::ListenError::Occupied { .. })
            | BuildError::Config(_)
            | BuildError::Acpi(_) => 2,
            _ => 1,
        }
    }
}

/// A machine that has been built and whose vCPUs have not run yet.
pub struct Machine {
    parts: Parts,
    vcpus: Vec<Vcpu>,
    end: Arc<EndSignal>,
    kvm_stats: Option<KvmReaders<StatsFd>>,
    /// Where a debugger is listened for.
    gdb: Option<gdb::Listener>,
    /// The KVM device.
    kvm: PathBuf,
}

/// What lives as long as the guest. Fields are dropped in this order: devices first, which hold
/// interrupts, then interrupts' owner, then memory.
struct Parts {
    com1: Arc<Com1>,
    power: Arc<Power>,
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
    /// Kept for their drop, which deletes the slots.
    _slots: Vec<Slot>,
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
        let new_slots = config.memory.slots(&ram, acpi.is_some());

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
        let sysfs = Path::new(SYSFS);
        let told = [config.memory.thp_obstacle(sysfs), config.memory.excess()];
        for told in told.into_iter().flatten() {
            log::warn!("{told}");
        }

        // 4. The VM and its memory.
        let setup = kvm.create_vm()?.named("guest");
        let memslots = Memslots::new(setup.fd().clone());
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
        }
        let start = StartState::of(&plan.entry)?;
        boot::write_all(&*memory, &[start.tables()])?;
        drop((memory, kernel, initrds));

        // 5. The irqchip.
        setup.set_tss_address(layout::TSS_ADDR)?;
        let irqchip =
            Irqchip::create(setup.fd(), irqchip_kind(config)).map_err(|error| {
                match (&error, config.irqchip) {
                    (IrqchipError::Unsupported(_), config::Irqchip::Split) => {
                        BuildError::NoSplitIrqchip(error)
                    }
                    _ => error.into(),
                }
            })?;
        let routing = Routing::new(setup.fd().clone(), &irqchip);
        // Only to be told of them: the guest gets the fault that KVM would give it.
        if setup.capabilities().has(KVM_CAP_X86_USER_SPACE_MSR) {
            setup.exit_on_msrs(msrs::EXITS)?;
        }

        // 6. vCPUs.
        // Below SIGRTMIN: a kick arrives also where the user's pending signals have reached their
        // limit. SIGURG of these: one that comes from elsewhere does no harm and never did.
        let kick = KickSignal::new(libc::SIGURG).map_err(kvm_core::Error::from)?;
        let vm = setup.kick_signal(kick).finish();
        let mut cpuid = cpuid.answer(&ram)?;
        let vcpus = topology
            .apic_ids()
            .map(|id| {
                let vcpu = vm.create_vcpu(id)?;
                if id == BOOT_VCPU {
                    cpuid.tell_time(&vcpu);
                }
                cpuid.set_up(&vcpu, config)?;
                if id == BOOT_VCPU {
                    start.set(&vcpu, &plan.entry)?;
                }
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, BuildError>>()?;

        // 7. Devices.
        let chip = match config.irqchip {
            config::Irqchip::Split => Some(SplitIoapic::new(&routing).map_err(|source| {
                let device = "the IOAPIC";
                BuildError::Interrupt { device, source }
            })?),
            _ => None,
        };
        let interrupt = |device: &'static str, gsi| {
            let refused = |source| BuildError::Interrupt { device, source };
            let gsi = routing.reserve(Gsi(gsi)).map_err(refused)?;
            let wire = match &chip {
                Some(chip) => Wire::Pin(chip.line(&gsi).map_err(refused)?),
                None => Wire::Eventfd(routing.source(&gsi)),
            };
            Ok::<_, BuildError>(Interrupt::new(device, wire, end.clone()))
        };
        let out = ConsoleOut::new(console, end.clone()).map_err(|source| BuildError::Process {
            what: "duplicate stdout",
            source,
        })?;
        let com1 =
            SerialPort::new(interrupt("COM1", layout::COM1_GSI)?, out).map_err(|source| {
                BuildError::Process {
                    what: "make the serial port's event",
                    source,
                }
            })?;
        let com1 = Arc::new(com1);
        // Weak: the port's console has the end.
        let console_of = Arc::downgrade(&com1);
        end.before_own_end(move || {
            if let Some(com1) = console_of.upgrade() {
                com1.sync();
            }
        });
        let power = Arc::new(Power::new(end.clone(), interrupt("ACPI", layout::GED_GSI)?));
        let bus = IoBus::new();
        let (mut registrations, mut names) = register_devices(&bus, config, &com1, &power, end)?;
        let ioapic = chip
            .clone()
            .map(|chip| Arc::new(Ioapic::new(chip, end.clone())));
        if let Some(ioapic) = &ioapic {
            let (registration, name) = register_ioapic(&bus, ioapic)?;
            registrations.push(registration);
            names.push(name);
        }
        let mut virtio = Vec::with_capacity(devices.len());
        let mut unmasked = Vec::new();
        for ((name, device), place) in devices.list.into_iter().zip(&places) {
            let wiring = Wiring {
                routing: &routing,
                chip: chip.as_ref(),
                ram: &memslots.ram(),
                host: vm.fd(),
                bus: &bus,
                end,
            };
            let wired = wire_virtio(&wiring, name, device, place)?;
            virtio.push(wired.device);
            unmasked.extend(wired.unmasked);
            registrations.push(wired.registration);
            names.push(wired.name);
        }
        // Only the transmit register; nothing is asked of KVM before a guest writes much.
        let transmit = PioRange::new(PioAddress(layout::COM1_PORT), 1).map(IoRange::from);
        let transmit = transmit.map_err(|_| BuildError::Process {
            what: "name the serial port's transmit register",
            source: io::ErrorKind::InvalidInput.into(),
        })?;
        let console = Coalescing::new(vm.fd().clone(), com1.clone(), transmit);
        if !config.coalesce_console {
            console.leave_off();
        }
        let parts = Parts {
            com1,
            power,
            console,
            ioapic,
            virtio,
            stdio: devices.stdio,
            _unmasked: unmasked,
            _registrations: registrations,
            names,
            bus,
            _slots: slots,
            memslots,
            vm,
        };
        Ok(Machine {
            parts,
            vcpus,
            end: end.clone(),
            kvm_stats: None,
            gdb: None,
            kvm: config.kvm.clone(),
        })
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

    /// Starts a thread for each vCPU, named `vcpu0` and so on, the boot vCPU's as the last.
    ///
    /// # Errors
    /// A thread cannot be started; those that were have been stopped again, and the guest has not run.
    pub fn start(self) -> Result<Running, BuildError> {
        let Machine {
            parts,
            vcpus,
            end,
            kvm_stats,
            gdb,
            kvm,
        } = self;
        let set = VcpuSet::new(parts.vm.identity().clone());
        let process = |what| move |source| BuildError::Process { what, source };
        // Before there is a vCPU's thread: none runs an instruction before the debugger lets it.
        let link = gdb.is_some().then(|| gdb::Link::new(&set));
        let link = link.transpose().map_err(process("make an eventfd"))?;
        let live = Arc::new(AtomicUsize::new(vcpus.len()));
        let stopping = Arc::new(AtomicBool::new(false));
        let shared = Arc::new(exits::Shared {
            bus: parts.bus.clone(),
            memslots: parts.memslots.clone(),
            console: parts.console.clone(),
            ioapic: parts.ioapic.clone(),
            owing: [parts.com1.clone(), parts.power.clone()],
            end: end.clone(),
            stopping: stopping.clone(),
        });
        let mut running = Running {
            debugger: None,
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
        // The boot vCPU is the first, and begins as soon as it has a thread; KVM has the others wait until
        // it starts them. So it is the last here: a start that fails has run nothing of the guest.
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
        // Last: a debugger that connects at once stops those vCPUs that are enrolled.
        if let (Some(listener), Some(link)) = (gdb, &link) {
            let memory = &running.parts.memslots;
            let debugger = gdb::Debugger::start(listener, link, memory, &kvm, &end);
            running.debugger = Some(debugger.map_err(process("start the debugger's thread"))?);
        }
        Ok(running)
    }
}

/// A machine whose vCPUs run.
pub struct Running {
    /// Before the vCPUs' set and the memory, which it uses.
    debugger: Option<gdb::Debugger>,
    set: VcpuSet,
    threads: Vec<JoinHandle<()>>,
    stopping: Arc<AtomicBool>,
    /// Each vCPU's way out of a wait for a deferred answer.
    waits: Vec<Interrupter>,
    counters: Vec<Arc<ExitCounters>>,
    kvm_stats: Option<Mutex<KvmReaders<StatsFd>>>,
    /// A device did not come to rest.
    left_behind: AtomicBool,
    parts: Parts,
}

impl Running {
    /// Brings every vCPU out of the guest for good and waits until it is. An access under way is
    /// finished by its device first, but for one that the device has deferred. What the guest has
    /// written to its console is on it then.
    pub fn stop(&self) {
        // Relaxed: the locks of what follows make it visible.
        self.stopping.store(true, Ordering::Relaxed);
        for wait in &self.waits {
            wait.interrupt();
        }
        if let Some(debugger) = &self.debugger {
            // In this order: those that wait for the debugger run no more of the guest.
            self.set.begin_stop();
            debugger.close();
        }
        if let Err(error) = self.set.stop() {
            log::error!("cannot stop the vCPUs: {error}");
        }
        self.parts.console.stop(&self.parts.bus);
        self.rest_devices();
    }

    /// Has the virtio devices finish what is under way; false if one does not come to an end.
    fn rest_devices(&self) -> bool {
        let mut rested = true;
        // Waited for once: this is asked again on the way to the end.
        let patience = match self.left_behind.load(Ordering::Relaxed) {
            true => Duration::ZERO,
            false => DEVICE_PATIENCE,
        };
        for device in &self.parts.virtio {
            if !device.pause(patience) {
                if patience.is_zero() {
                    return false;
                }
                log::error!(
                    "{}: I/O of its host's has not ended in {DEVICE_PATIENCE:?}, and is left behind",
                    device.name()
                );
                rested = false;
                self.left_behind.store(true, Ordering::Relaxed);
            }
        }
        rested
    }

    /// What the guest has done so far, in numbers. Devices are among them if
    /// [`Machine::count_accesses`] was called, and KVM's own numbers if [`Machine::read_kvm_statistics`]
    /// was. Does not make a vCPU wait.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::collect(
            self.counters.iter().map(|counters| &**counters),
            &self.parts.bus,
            &self.parts.names,
            &self.parts.memslots.snapshot(),
        );
        stats.kvm = self.kvm_statistics();
        stats
    }

    fn kvm_statistics(&self) -> Option<KvmStats> {
        let readers = self.kvm_stats.as_ref()?.lock();
        // One left by a panic has whole samples all the same.
        let sample = readers.unwrap_or_else(PoisonError::into_inner).sample();
        sample
            .inspect_err(|error| log::warn!("the statistics are without KVM's own: {error}"))
            .ok()
    }

    /// Stops the vCPUs and closes the VM, for a process that exits next: the rest is left to the
    /// process's end.
    ///
    /// Neither way there by itself is fast. Dropping a `Running` deletes the slots one by one, and
    /// KVM waits for a grace period with each. Leaving the open VM to the process's exit makes two
    /// kernel threads wait for the same grace period at once (the one frees the VM, the other the
    /// address space), and the second of them waits for the slow kind: 13 ms in half of the runs of a
    /// guest that lives for one.
    pub fn leave_to_exit(mut self) {
        self.stop();
        self.join();
        let rested = self.rest_devices();
        // None of them is dropped.
        self.parts.virtio.iter().for_each(|device| device.leave());
        if !rested {
            // What is under way uses the VM still: the process's end takes both.
            std::mem::forget(self);
            return;
        }
        // The mapping of the ring of coalesced writes holds the VM as well. The bus has it.
        self.parts.console.forget();
        self.parts.bus = IoBus::new();
        // And so have KVM's files of statistics.
        self.kvm_stats = None;
        let vm = self.parts.vm.fd().as_raw_fd();
        std::mem::forget(self);
        // SAFETY: what owns the descriptor has been forgotten, and the threads that shared it have
        // ended: nobody uses or closes it any more. Guest memory stays mapped.
        unsafe { libc::close(vm) };
    }

    fn join(&mut self) {
        // First: it tells the debugger of the end.
        self.debugger = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU's thread panicked");
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}

impl Running {
    /// Readable when who has the input has room for more.
    fn drained_event(&self) -> &EventFd {
        match &self.parts.stdio {
            Some(stdio) => stdio.input.drained(),
            None => self.parts.com1.drained(),
        }
    }

    /// Has an interrupt sent that could not be sent without waiting, by a vCPU's thread. Does not wait.
    fn have_owed_sent(&self, owed: bool) {
        if let (true, Some(request)) = (owed, SEND_OWED) {
            self.set.request_all(request);
        }
    }
}

impl GuestSide for Running {
    fn input(&self, bytes: &[u8]) -> usize {
        if let Some(stdio) = &self.parts.stdio {
            return stdio.input.offer(bytes);
        }
        let taken = self.parts.com1.enqueue(bytes);
        self.have_owed_sent(self.parts.com1.owes_interrupt());
        taken
    }

    fn input_chunk(&self) -> usize {
        match self.parts.stdio {
            Some(_) => MOST_AT_ONCE,
            None => CHUNK,
        }
    }

    fn resized(&self) {
        if let Some(stdio) = &self.parts.stdio
            && let Some(size) = terminal_size(&io::stdout())
        {
            stdio.resizer.resize(size);
        }
    }

    fn drained(&self) -> RawFd {
        self.drained_event().as_raw_fd()
    }

    fn clear_drained(&self) {
        // EAGAIN: not readable, as wanted.
        let _ = self.drained_event().read();
    }

    fn press_power_button(&self) -> bool {
        let pressed = self.parts.power.press().unwrap_or_else(|error| {
            log::error!("cannot press the power button: {error}");
            false
        });
        self.have_owed_sent(self.parts.power.owes_interrupt());
        pressed
    }

    fn show_registers(&self) {
        if let Some(request) = SHOW_REGISTERS {
            self.set.request_all(request);
        }
    }
}

/// Opens KVM, and asks it for what decides whether there can be such a machine at all.
fn ask_kvm(
    config: &Config,
    topology: Topology,
    template: Template,
    ram: &[(GuestAddress, u64)],
) -> Result<(Arc<Kvm>, CpuidQuestion), BuildError> {
    let kvm = Arc::new(Kvm::open_at(&config.kvm)?);
    let capabilities = kvm.capabilities();
    let (asked, most) = (topology.cpus(), capabilities.max_vcpus());
    if asked > most {
        return Err(BuildError::Cpus { asked, most });
    }
    // Without gaps in their ids the number of vCPUs has said it already.
    let highest = topology.highest_apic_id().0;
    if highest >= asked && highest >= capabilities.max_vcpu_id() {
        let most = capabilities.max_vcpu_id().saturating_sub(1);
        return Err(BuildError::ApicId { highest, most });
    }
    let chosen = template != Template::host();
    let cpuid = CpuidBase::ask(&kvm, config.irqchip, topology, template)?.early_for(ram, chosen)?;
    Ok((kvm, cpuid))
}

/// What the guest's processors are to be, but for what each has of its own.
struct CpuidBase {
    model: Vec<kvm_bindings::kvm_cpuid_entry2>,
    topology: Topology,
    tsc_deadline: bool,
    arat: Option<bool>,
}

/// The answer, or where it is on its way.
enum CpuidQuestion {
    Asked(JoinHandle<Result<CpuidBase, BuildError>>),
    Answered(CpuidBase),
}

impl CpuidQuestion {
    /// Waits for the answer now where it may be no: a processor model was `chosen`, or this RAM is more than
    /// any processor can be relied on to address.
    fn early_for(self, ram: &[(GuestAddress, u64)], chosen: bool) -> Result<Self, BuildError> {
        match chosen || end_of(ram) > 1 << LEAST_ADDRESS_BITS {
            true => Ok(CpuidQuestion::Answered(self.answer(ram)?)),
            false => Ok(self),
        }
    }

    /// Waits for the answer. Refuses RAM that the guest's processors could not address: KVM itself takes
    /// any slot, and the guest would meet the hole much later.
    fn answer(self, ram: &[(GuestAddress, u64)]) -> Result<CpuidBase, BuildError> {
        let cpuid = match self {
            CpuidQuestion::Answered(cpuid) => cpuid,
            CpuidQuestion::Asked(thread) => thread.join().unwrap_or_else(|_| {
                Err(BuildError::Process {
                    what: "ask for the host's CPUID",
                    source: io::Error::other("its thread panicked"),
                })
            })?,
        };
        let (end, bits) = (end_of(ram), address_bits(&cpuid.model));
        if bits < u64::BITS && end > 1 << bits {
            let given = ram.iter().map(|(_, len)| len).sum();
            return Err(BuildError::AddressBits { given, end, bits });
        }
        Ok(cpuid)
    }
}

/// Where RAM ends.
fn end_of(ram: &[(GuestAddress, u64)]) -> u64 {
    let ends = ram.iter().map(|(start, len)| start.0.saturating_add(*len));
    ends.max().unwrap_or(0)
}

/// What x86-64 processors have at least, and one has that does not say.
const LEAST_ADDRESS_BITS: u32 = 36;

/// Width of guest physical addresses: the processor's, or what of it KVM can map, where it says so (its
/// page tables may have a level less than the processor's widest address wants).
fn address_bits(supported: &[kvm_bindings::kvm_cpuid_entry2]) -> u32 {
    let leaf = supported.iter().find(|leaf| leaf.function == 0x8000_0008);
    let Some(leaf) = leaf else {
        return LEAST_ADDRESS_BITS;
    };
    match (leaf.eax & 0xff, leaf.eax >> 16 & 0xff) {
        (bits, 0) => bits,
        (bits, mappable) => bits.min(mappable),
    }
}

impl CpuidBase {
    /// Asks on a thread of its own: KVM executes CPUID a hundred times for its answer, each of which
    /// traps where the host is a virtual machine itself, and nothing needs the answer before the
    /// vCPUs. In a start of 1.5 ms it was 0.4 ms.
    fn ask(
        kvm: &Arc<Kvm>,
        irqchip: config::Irqchip,
        topology: Topology,
        template: Template,
    ) -> Result<CpuidQuestion, BuildError> {
        let kvm = kvm.clone();
        let ask = move || {
            // The timer is the local APIC's: it is there only where the kernel has that, and without a PIT
            // the timer of a sleeping processor is its own. A template may do without both.
            let apic = irqchip != config::Irqchip::None;
            let wanted = |name| template.says(name) != Some(false);
            Ok(CpuidBase {
                model: template.apply(kvm.supported_cpuid()?.as_slice())?,
                topology,
                tsc_deadline: apic
                    && wanted("tsc_deadline_timer")
                    && kvm.capabilities().tsc_deadline_timer(),
                arat: apic.then(|| wanted("arat")),
            })
        };
        let thread = std::thread::Builder::new().name("cpuid".into()).spawn(ask);
        let thread = thread.map_err(|source| BuildError::Process {
            what: "start a thread for CPUID",
            source,
        })?;
        Ok(CpuidQuestion::Asked(thread))
    }

    /// Tells the guest how fast its TSC is, where KVM does: a host whose own is unstable has no answer.
    fn tell_time(&mut self, vcpu: &Vcpu) {
        let khz = vcpu.fd().get_tsc_khz().ok().and_then(NonZeroU32::new);
        if let Some(khz) = khz {
            let leaves = HypervisorLeaves::default().with_timing(Timing::new(khz));
            leaves.apply(&mut self.model);
        }
    }

    /// CPUID, MSRs and local interrupt pins of a vCPU.
    fn set_up(&self, vcpu: &Vcpu, config: &Config) -> Result<(), BuildError> {
        let plan = CpuidPlan {
            id: vcpu.id(),
            topology: self.topology,
            tsc_deadline: self.tsc_deadline,
            arat: self.arat,
        };
        let cpuid = plan.apply(&self.model)?;
        vcpu.set_cpuid(&cpuid)?;
        for refused in vcpu.set_msrs(&boot_msrs(cpuid.as_slice()))? {
            log::debug!("vCPU {}: {refused}", vcpu.id());
        }
        if config.irqchip == config::Irqchip::Kernel {
            vcpu.wire_local_pins()?;
        }
        Ok(())
    }
}

/// How the boot vCPU starts, and the tables that it starts with.
enum StartState {
    Long64(LongModeTables),
    Protected32(GuestAddress),
}

impl StartState {
    fn of(entry: &boot::Entry) -> Result<Self, TablesError> {
        Ok(match entry.mode {
            boot::CpuMode::Long64 => {
                // At most 4 (arch::boot says so), and what does not fit is refused here.
                let gib = u16::try_from(entry.identity_gib).unwrap_or(u16::MAX);
                StartState::Long64(LongModeTables::new(entry.page_tables, gib)?)
            }
            boot::CpuMode::Protected32 => StartState::Protected32(entry.gdt),
        })
    }

    /// What has to be in guest memory, and where.
    fn tables(&self) -> (GuestAddress, Vec<u8>) {
        match self {
            StartState::Long64(tables) => (tables.base(), tables.bytes()),
            StartState::Protected32(at) => (*at, gdt(false).to_vec()),
        }
    }

    fn set(&self, vcpu: &Vcpu, entry: &boot::Entry) -> Result<(), BuildError> {
        let reset = vcpu.sregs()?;
        let rip = GuestAddress(entry.rip);
        let mut state = match self {
            StartState::Long64(tables) => BootState::long_mode(&reset, tables, rip, entry.rsi),
            StartState::Protected32(at) => {
                let mut state = BootState::protected_mode(&reset, rip, 0, 0);
                (state.sregs.gdt.base, state.sregs.gdt.limit) = (at.0, gdt(false).len() as u16 - 1);
                state
            }
        };
        state.regs.rsp = entry.rsp;
        state.regs.rax = entry.rax;
        state.regs.rbx = entry.rbx;
        state.regs.rsi = entry.rsi;
        vcpu.set_boot_state(&state)?;
        Ok(())
    }
}

fn irqchip_kind(config: &Config) -> IrqchipKind {
    match config.irqchip {
        config::Irqchip::Kernel => IrqchipKind::Kernel {
            pit: if config.pit {
                Pit::PresentWithSpeaker
            } else {
                Pit::Absent
            },
        },
        config::Irqchip::Split => IrqchipKind::Split {
            pins: layout::IOAPIC_PINS,
        },
        config::Irqchip::None => IrqchipKind::None,
    }
}

/// Puts the machine's devices on the bus. All of them are ports, in the order of [`FIXED_PORTS`].
fn register_devices(
    bus: &IoBus,
    config: &Config,
    com1: &Arc<Com1>,
    power: &Arc<Power>,
    end: &Arc<EndSignal>,
) -> Result<(Vec<Registration>, Vec<Named>), BuildError> {
    let mut registrations = Vec::with_capacity(8);
    let mut names = Vec::with_capacity(8);
    let i8042 = Arc::new(I8042::new(end.clone()));
    let mut add = |device: &'static str, port: u16, len: u16, model: Port| {
        let range = PioRange::new(PioAddress(port), len).map_err(|_| {
            let why = format!("its {len} ports go past 0xffff");
            config::ConfigError::DebugExit { port, why }
        })?;
        let registration = bus
            .register_pio(range, model)
            .map_err(|source| BuildError::Bus { device, source })?;
        registrations.push(registration);
        names.push((device.into(), BusKind::Pio, IoRange::from(range)));
        Ok::<_, BuildError>(())
    };
    let fixed: [Port; FIXED_PORTS.len()] = [
        com1.clone(),
        i8042.clone(),
        i8042,
        Arc::new(Rtc::new()),
        power.clone(),
        Arc::new(Pvpanic::new(end.clone())),
    ];
    for ((device, port, len), model) in FIXED_PORTS.into_iter().zip(fixed) {
        add(device, port, len, model)?;
    }
    if let Some(port) = config.debug_exit {
        add(
            "debug-exit",
            port,
            DebugExit::LEN,
            Arc::new(DebugExit::new(end.clone())),
        )?;
    }
    Ok((registrations, names))
}

type Port = Arc<dyn vm_device::DevicePio + Send + Sync>;

fn register_ioapic(
    bus: &IoBus,
    ioapic: &Arc<Ioapic<Host>>,
) -> Result<(Registration, Named), BuildError> {
    let device = "the IOAPIC";
    let base = MmioAddress(layout::IOAPIC_ADDR.0);
    let range = MmioRange::new(base, IOAPIC_LEN).map_err(|_| BuildError::Process {
        what: "name the IOAPIC's registers",
        source: io::ErrorKind::InvalidInput.into(),
    })?;
    let model: Arc<dyn vm_device::DeviceMmio + Send + Sync> = ioapic.clone();
    let registration = bus
        .register_mmio(range, model)
        .map_err(|source| BuildError::Bus { device, source })?;
    Ok((registration, (device.into(), BusKind::Mmio, range.into())))
}

/// What a virtio device is connected to.
struct Wiring<'a> {
    routing: &'a Routing<Host>,
    /// With the split irqchip.
    chip: Option<&'a SplitIoapic<Host>>,
    ram: &'a GuestRam,
    host: &'a Host,
    bus: &'a IoBus,
    end: &'a Arc<EndSignal>,
}

/// A virtio device that is connected.
struct Wired {
    device: Arc<dyn PlacedDevice>,
    registration: Registration,
    name: Named,
    unmasked: Option<Notifier>,
}

/// Gives a virtio device its interrupt, an irqfd that is attached when it is first raised; its doorbells, ioeventfds
/// that are attached when its driver is ready; and its place on the bus.
fn wire_virtio(
    wiring: &Wiring<'_>,
    name: String,
    device: Box<dyn AnyDevice>,
    place: &acpi::VirtioMmio,
) -> Result<Wired, BuildError> {
    let kind = device.kind();
    let refused = |source| BuildError::Interrupt {
        device: kind,
        source,
    };
    let gsi = wiring.routing.reserve(Gsi(place.gsi)).map_err(refused)?;
    let source = wiring.routing.source(&gsi);
    let interrupt = Interrupt::new(name.clone(), source, wiring.end.clone());
    // Refused, it has ended the guest.
    let driver = DriverLink::new(move || drop(interrupt.trigger()));
    let base = MmioAddress(place.address.into());
    let device = device.put(Place {
        name: name.clone(),
        ram: wiring.ram.clone(),
        driver: driver.clone(),
        doorbells: Box::new(KvmDoorbells::new(wiring.host.clone(), base.0)),
    });
    // With KVM's own IOAPIC nobody is told, and an edge that comes while the guest moves the pin to another vCPU is
    // lost, as to the chip itself.
    let unmasked = wiring.chip.map(|chip| {
        chip.register_mask_notifier(Gsi(place.gsi), move |masked| {
            if !masked {
                driver.repeat();
            }
        })
    });
    let unmasked = unmasked.transpose().map_err(refused)?;
    let bus = |source| BuildError::Bus {
        device: kind,
        source,
    };
    let range = IoRange::new(base.0, place.len.into()).map_err(bus)?;
    let model: Arc<dyn IoDevice> = device.clone();
    let registration = wiring.bus.register(BusKind::Mmio, range, model);
    Ok(Wired {
        device,
        registration: registration.map_err(bus)?,
        name: (name.into(), BusKind::Mmio, range),
        unmasked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn leaf(eax: u32) -> [kvm_cpuid_entry2; 2] {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        [leaf(1, 0xff), leaf(0x8000_0008, eax)]
    }

    #[test]
    fn address_bits_are_the_fewer_of_the_processors_and_those_that_kvm_maps() {
        assert_eq!(address_bits(&leaf(0x3027)), 39);
        assert_eq!(address_bits(&leaf(0x30_3934)), 48);
        assert_eq!(address_bits(&leaf(0x34_3930)), 48);
        assert_eq!(address_bits(&leaf(0)[..1]), LEAST_ADDRESS_BITS);
    }

    #[test]
    fn memory_above_the_address_bits_is_refused_with_all_the_numbers() {
        let check = |bits, size| {
            let base = CpuidBase {
                model: leaf(bits).to_vec(),
                topology: Topology::flat(1).unwrap(),
                tsc_deadline: false,
                arat: None,
            };
            let ram = memslots::ram_layout(size, layout::MMIO_HOLE).unwrap();
            let question = CpuidQuestion::Answered(base).early_for(&ram, false)?;
            question.answer(&ram).map(drop)
        };
        let gib = 1 << 30;
        check(39, 511 * gib).unwrap();
        check(36, gib).unwrap();
        let error = check(39, 512 * gib).unwrap_err();
        assert_eq!(error.exit_status(), 2);
        let text = error.to_string();
        for needle in [
            "549755813888 bytes",
            "0x8040000000",
            "39 address bits",
            "0x8000000000",
        ] {
            assert!(text.contains(needle), "{text}");
        }
        // An odd one is found out later.
        assert!(check(32, 8 * gib).is_err());
    }
}
