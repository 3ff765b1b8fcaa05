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
//! 2. **CPUID** is asked for on a thread of its own while the rest goes on: KVM's slowest answer, and
//!    the vCPUs are the first to need it.
//! 3. **Memory slots** before anything that registers on KVM's buses: a slot made after the
//!    in-kernel irqchip waits for a grace period.
//! 4. **The irqchip** before the first vCPU, as KVM demands it.
//! 5. **vCPUs**, their CPUID, MSRs and registers.
//! 6. **Devices**, which are user-space tables: no call to KVM. Their interrupts are irqfds that are
//!    attached when they are first raised; no routing table is committed as long as it is KVM's
//!    default. An ioeventfd would come here or later: with one, the VM's end waits as well.
//!
//! `tests/kvm_ioctl_order.rs` holds it against the ioctls of a real run.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use io_bus::{Dispatcher, IoBus, Registration};
use irq_routing::{Gsi, IrqSource, Irqchip, IrqchipKind, Pit, Routing};
use kvm_core::arch::x86_64::{
    BootState, CpuidError, CpuidPlan, LongModeTables, RegisterDump, TablesError, boot_msrs, gdt,
};
use kvm_core::{
    Exit, ExitHandler, Flow, Halt, HaltReason, KickSignal, Kvm, Request, Requests, Runner, Vcpu,
    VcpuId, VcpuSet, VcpuView, Vm,
};
use kvm_ioctls::{VcpuFd, VmFd};
use memslots::{Backing, Gfn, Memslots, NewSlot, PAGE_SHIFT, Slot, SlotFlags, SlotTable};
use vm_device::bus::{MmioAddress, PioAddress, PioRange};
use vm_memory::GuestAddress;

use crate::arch::boot::{self, BootConfig, BootError, Image, ImageKind};
use crate::arch::{acpi, layout, reset_vector};
use crate::config::{self, Config};
use crate::devices::FIXED_PORTS;
use crate::devices::acpi_power::AcpiPower;
use crate::devices::interrupt::Interrupt;
use crate::devices::power::{DebugExit, I8042, Pvpanic};
use crate::devices::rtc::Rtc;
use crate::devices::serial::{ConsoleOut, SerialPort};
use crate::end::{EndSignal, GuestEnd};
use crate::main_loop::GuestSide;
use crate::timeline::{Event, timeline};

type Host = Arc<VmFd>;
type Com1 = SerialPort<Interrupt<IrqSource<Host>>, ConsoleOut>;
type Power = AcpiPower<Interrupt<IrqSource<Host>>>;

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
    /// Guest memory could not be made.
    #[error("cannot make the guest's memory")]
    Memory(#[from] memslots::Error),
    /// The guest's memory would end above what the host's processor can address.
    #[error("the guest's memory ends at {end:#x}, and this host's guests have {bits} address bits")]
    AddressBits {
        /// End of the memory.
        end: u64,
        /// Width of guest physical addresses on this host.
        bits: u32,
    },
    /// More vCPUs than the host's KVM takes.
    #[error("{asked} vCPUs: this host's KVM takes at most {most}")]
    Cpus {
        /// Configured.
        asked: u32,
        /// `KVM_CAP_MAX_VCPUS`.
        most: u32,
    },
    /// The interrupt controllers could not be made.
    #[error(transparent)]
    Irqchip(#[from] irq_routing::IrqchipError),
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
        match self {
            BuildError::Boot(_)
            | BuildError::Layout(_)
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
}

/// What lives as long as the guest. Fields are dropped in this order: devices first, which hold
/// interrupts, then interrupts' owner, then memory.
struct Parts {
    com1: Arc<Com1>,
    power: Arc<Power>,
    /// Kept for their drop, which takes the devices off the bus.
    _registrations: Vec<Registration>,
    bus: IoBus,
    /// Kept for their drop, which deletes the slots.
    _slots: Vec<Slot>,
    memslots: Memslots,
    vm: Vm,
}

impl Machine {
    /// Builds what `config` describes, with the serial console's output on `console` and its end
    /// told to `end`. Blocks for the reading of the kernel and the initrd.
    ///
    /// # Errors
    /// [`BuildError`]; nothing is left behind.
    pub fn build(
        config: &Config,
        console: impl AsFd,
        end: &Arc<EndSignal>,
    ) -> Result<Self, BuildError> {
        config.validate()?;

        // 1. Files and numbers.
        let mut kernel = Image::open(ImageKind::Kernel, &config.kernel)?;
        let mut initrds = config
            .initrd
            .iter()
            .map(|path| Image::open(ImageKind::Initrd, path))
            .collect::<Result<Vec<_>, _>>()?;
        let ram = memslots::ram_layout(config.memory, layout::MMIO_HOLE)?;
        // A guest without pin interrupts could not use what the tables describe.
        let acpi = (config.irqchip == config::Irqchip::Kernel)
            .then(|| acpi::tables(&acpi::AcpiConfig::new(config.cpus)))
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

        // 2. and 3. The VM and its memory, with CPUID asked for meanwhile.
        let kvm = Arc::new(Kvm::open_at(&config.kvm)?);
        let cpuid = CpuidBase::ask(&kvm, config.irqchip)?;
        let setup = kvm.create_vm()?;
        let memslots = Memslots::new(setup.fd().clone());
        let slots = make_memory(&memslots, &ram)?;
        let memory = memslots.snapshot();
        plan.load(&*memory, &mut kernel, &mut initrds)?;
        if let Some(acpi) = &acpi {
            boot::write_all(&*memory, &acpi.writes)?;
            boot::write_all(&*memory, &[reset_vector::block()])?;
        }
        let start = StartState::of(&plan.entry)?;
        boot::write_all(&*memory, &[start.tables()])?;
        drop((memory, kernel, initrds));

        // 4. The irqchip.
        let most = setup.capabilities().max_vcpus();
        if config.cpus > most {
            return Err(BuildError::Cpus {
                asked: config.cpus,
                most,
            });
        }
        setup.set_tss_address(layout::TSS_ADDR)?;
        let irqchip = Irqchip::create(setup.fd(), irqchip_kind(config))?;
        let routing = Routing::new(setup.fd().clone(), &irqchip);

        // 5. vCPUs.
        // Below SIGRTMIN: a kick arrives also where the user's pending signals have reached their
        // limit. SIGURG of these: one that comes from elsewhere does no harm and never did.
        let kick = KickSignal::new(libc::SIGURG).map_err(kvm_core::Error::from)?;
        let vm = setup.kick_signal(kick).finish();
        let cpuid = cpuid.answer()?;
        cpuid.check_memory(&ram)?;
        let vcpus = (0..config.cpus)
            .map(|index| {
                let vcpu = vm.create_vcpu(VcpuId(index))?;
                cpuid.set_up(&vcpu, config)?;
                if index == 0 {
                    start.set(&vcpu, &plan.entry)?;
                }
                Ok(vcpu)
            })
            .collect::<Result<Vec<_>, BuildError>>()?;

        // 6. Devices.
        let interrupt = |device, gsi| {
            let gsi = routing
                .reserve(Gsi(gsi))
                .map_err(|source| BuildError::Interrupt { device, source })?;
            Ok::<_, BuildError>(Interrupt::new(device, routing.source(&gsi), end.clone()))
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
        let power = Arc::new(Power::new(end.clone(), interrupt("ACPI", layout::GED_GSI)?));
        let bus = IoBus::new();
        let registrations = register_devices(&bus, config, &com1, &power, end)?;
        let parts = Parts {
            com1,
            power,
            _registrations: registrations,
            bus,
            _slots: slots,
            memslots,
            vm,
        };
        Ok(Machine {
            parts,
            vcpus,
            end: end.clone(),
        })
    }

    /// Starts a thread for each vCPU, named `vcpu0` and so on.
    ///
    /// # Errors
    /// A thread cannot be started; those that were have been stopped again.
    pub fn start(self) -> Result<Running, BuildError> {
        let Machine { parts, vcpus, end } = self;
        let set = VcpuSet::new(parts.vm.identity().clone());
        let live = Arc::new(AtomicUsize::new(vcpus.len()));
        let mut running = Running {
            set,
            threads: Vec::with_capacity(vcpus.len()),
            parts,
        };
        for vcpu in vcpus {
            // On an error `running` is dropped, which stops the threads started so far.
            let handler = Handler {
                bus: running.parts.bus.dispatcher(),
                memory: running.parts.memslots.reader(),
                end: end.clone(),
                entered: false,
            };
            let runner = running.set.enroll(vcpu)?;
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
        Ok(running)
    }
}

/// A machine whose vCPUs run.
pub struct Running {
    set: VcpuSet,
    threads: Vec<JoinHandle<()>>,
    parts: Parts,
}

impl Running {
    /// Brings every vCPU out of the guest for good and waits until it is. An access under way is
    /// finished by its device first.
    pub fn stop(&self) {
        if let Err(error) = self.set.stop() {
            log::error!("cannot stop the vCPUs: {error}");
        }
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
        let vm = self.parts.vm.fd().as_raw_fd();
        std::mem::forget(self);
        // SAFETY: what owns the descriptor has been forgotten, and the threads that shared it have
        // ended: nobody uses or closes it any more. Guest memory stays mapped.
        unsafe { libc::close(vm) };
    }

    fn join(&mut self) {
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

impl GuestSide for Running {
    fn input(&self, bytes: &[u8]) -> usize {
        self.parts.com1.enqueue(bytes)
    }

    fn drained(&self) -> RawFd {
        self.parts.com1.drained().as_raw_fd()
    }

    fn clear_drained(&self) {
        // EAGAIN: not readable, as wanted.
        let _ = self.parts.com1.drained().read();
    }

    fn press_power_button(&self) -> bool {
        self.parts.power.press().unwrap_or_else(|error| {
            log::error!("cannot press the power button: {error}");
            false
        })
    }

    fn show_registers(&self) {
        if let Some(request) = SHOW_REGISTERS {
            self.set.request_all(request);
        }
    }
}

/// The request of a vCPU to show its registers.
const SHOW_REGISTERS: Option<Request> = Request::consumer(0);

/// What this host's processors can be for a guest.
struct CpuidBase {
    supported: kvm_bindings::CpuId,
    tsc_deadline: bool,
}

/// The answer to be, on its way.
struct CpuidQuestion(JoinHandle<Result<CpuidBase, kvm_core::Error>>);

impl CpuidQuestion {
    fn answer(self) -> Result<CpuidBase, BuildError> {
        match self.0.join() {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(BuildError::Process {
                what: "ask for the host's CPUID",
                source: io::Error::other("its thread panicked"),
            }),
        }
    }
}

impl CpuidBase {
    /// Asks on a thread of its own: KVM executes CPUID a hundred times for its answer, each of which
    /// traps where the host is a virtual machine itself, and nothing needs the answer before the
    /// vCPUs. In a start of 1.5 ms it was 0.4 ms.
    fn ask(kvm: &Arc<Kvm>, irqchip: config::Irqchip) -> Result<CpuidQuestion, BuildError> {
        let kvm = kvm.clone();
        let ask = move || {
            // The timer is the local APIC's: it is there only where the kernel has that.
            let tsc_deadline =
                irqchip != config::Irqchip::None && kvm.capabilities().tsc_deadline_timer();
            Ok(CpuidBase {
                supported: kvm.supported_cpuid()?,
                tsc_deadline,
            })
        };
        let thread = std::thread::Builder::new().name("cpuid".into()).spawn(ask);
        let thread = thread.map_err(|source| BuildError::Process {
            what: "start a thread for CPUID",
            source,
        })?;
        Ok(CpuidQuestion(thread))
    }

    /// Refuses memory that the guest's processors could not address: KVM itself takes any slot, and
    /// the guest would meet the hole much later.
    fn check_memory(&self, ram: &[(GuestAddress, u64)]) -> Result<(), BuildError> {
        let bits = self
            .supported
            .as_slice()
            .iter()
            .find(|leaf| leaf.function == 0x8000_0008)
            .map_or(36, |leaf| leaf.eax & 0xff);
        let end = ram
            .iter()
            .map(|(start, len)| start.0 + len)
            .max()
            .unwrap_or(0);
        if bits < 64 && end > 1 << bits {
            return Err(BuildError::AddressBits { end, bits });
        }
        Ok(())
    }

    /// CPUID, MSRs and local interrupt pins of a vCPU.
    fn set_up(&self, vcpu: &Vcpu, config: &Config) -> Result<(), BuildError> {
        let plan = CpuidPlan {
            id: vcpu.id(),
            cpus: config.cpus,
            tsc_deadline: self.tsc_deadline,
            arat: None,
        };
        let cpuid = plan.apply(self.supported.as_slice())?;
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

/// Guest memory: one slot a range of `ram`, backed by memory that the host gives when it is touched.
fn make_memory(
    memslots: &Memslots,
    ram: &[(GuestAddress, u64)],
) -> Result<Vec<Slot>, memslots::Error> {
    memslots.create_all(ram.iter().map(|&(start, size)| NewSlot {
        start,
        backing: Backing::anonymous(size),
        flags: SlotFlags::default(),
    }))
}

/// Puts the machine's devices on the bus. All of them are ports, in the order of [`FIXED_PORTS`].
fn register_devices(
    bus: &IoBus,
    config: &Config,
    com1: &Arc<Com1>,
    power: &Arc<Power>,
    end: &Arc<EndSignal>,
) -> Result<Vec<Registration>, BuildError> {
    let mut registrations = Vec::with_capacity(8);
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
    Ok(registrations)
}

type Port = Arc<dyn vm_device::DevicePio + Send + Sync>;

/// A vCPU's exits, on its thread.
struct Handler {
    bus: Dispatcher,
    memory: memslots::Reader<SlotTable>,
    end: Arc<EndSignal>,
    entered: bool,
}

/// Why a vCPU stopped by itself.
#[derive(Debug)]
enum Stop {
    /// The guest's end has been told.
    Ended,
    /// HLT, and there is no interrupt controller that could wake it.
    Halted,
}

impl ExitHandler<VcpuFd> for Handler {
    type Stop = Stop;

    fn exit(&mut self, vcpu: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Flow<Stop> {
        match exit {
            Exit::PioIn { port, size, data } => {
                let _ = self
                    .bus
                    .pio_read_repeated(PioAddress(port), size.into(), data);
            }
            Exit::PioOut { port, size, data } => {
                let _ = self
                    .bus
                    .pio_write_repeated(PioAddress(port), size.into(), data);
            }
            Exit::MmioRead { addr, data } => {
                let outcome = self.bus.mmio_read(MmioAddress(addr.0), data);
                self.check_memory(vcpu, addr, outcome.is_answered());
            }
            Exit::MmioWrite { addr, data } => {
                let outcome = self.bus.mmio_write(MmioAddress(addr.0), data);
                self.check_memory(vcpu, addr, outcome.is_answered());
            }
            Exit::Hlt => return Flow::Stop(Stop::Halted),
            Exit::SystemEvent { kind, .. } => match kind {
                kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => self.end.tell(GuestEnd::PoweredOff),
                kvm_bindings::KVM_SYSTEM_EVENT_RESET => self.end.tell(GuestEnd::Reset),
                kvm_bindings::KVM_SYSTEM_EVENT_CRASH => self.end.tell(GuestEnd::Panicked),
                other => log::warn!("vCPU {}: system event {other}, which is ignored", vcpu.id()),
            },
            Exit::MemoryFault { addr, size, .. } => self.end.tell(GuestEnd::Failed(format!(
                "vCPU {}: the host cannot give the guest its memory at {:#x} ({size} bytes)",
                vcpu.id(),
                addr.0
            ))),
            // Nothing of these was asked for.
            other => log::debug!("vCPU {}: {other:?}, which is ignored", vcpu.id()),
        }
        if self.end.is_told() {
            Flow::Stop(Stop::Ended)
        } else {
            Flow::Continue
        }
    }

    /// The only request there is: [`SHOW_REGISTERS`].
    fn requests(&mut self, vcpu: &VcpuView<'_, VcpuFd>, _: Requests) -> Flow<Stop> {
        let (id, fd) = (vcpu.id(), vcpu.fd());
        let registers = fd
            .get_regs()
            .and_then(|regs| fd.get_sregs().map(|sregs| RegisterDump { regs, sregs }));
        // One write each, so that several vCPUs' do not mix. Stderr closed or full stops no guest.
        let text = match registers {
            Ok(registers) => format!("reference-vmm: vCPU {id}:\n{registers}\n"),
            Err(errno) => {
                format!("reference-vmm: vCPU {id}: its registers cannot be read: {errno}\n")
            }
        };
        let _ = io::stderr().lock().write_all(text.as_bytes());
        Flow::Continue
    }

    fn before_entry(&mut self, _vcpu: &VcpuView<'_, VcpuFd>) {
        if !self.entered {
            self.entered = true;
            timeline().mark(Event::FirstEntry);
        }
    }
}

impl Handler {
    /// An access that no device answered at an address that is the guest's memory is no access: the
    /// host could not serve the page (a poisoned one, for example), and what a read would give the
    /// guest is not what is in its memory. The guest stops rather than going on with that.
    fn check_memory(&mut self, vcpu: &VcpuView<'_, VcpuFd>, addr: GuestAddress, answered: bool) {
        if answered {
            return;
        }
        if self.memory.enter().is_visible(Gfn(addr.0 >> PAGE_SHIFT)) {
            self.end.tell(GuestEnd::Failed(format!(
                "vCPU {}: memory error: the host cannot serve the guest's memory at {:#x}",
                vcpu.id(),
                addr.0
            )));
        } else {
            log::debug!("vCPU {}: nobody answers at {:#x}", vcpu.id(), addr.0);
        }
    }
}

/// Tells the end of a guest whose vCPU's thread unwinds: without it nobody would know that one of
/// its processors has stopped. (The binary aborts at a panic; a program with the library may not.)
struct TellPanic<'a> {
    id: VcpuId,
    end: &'a EndSignal,
}

impl Drop for TellPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let what = format!("vCPU {}: its thread panicked", self.id);
            self.end.tell(GuestEnd::Failed(what));
        }
    }
}

/// A vCPU thread: runs until the vCPU halts, and tells the end that it came to.
fn run_vcpu(runner: Runner<Vcpu>, handler: Handler, end: &EndSignal, running: &AtomicUsize) {
    let id = runner.id();
    let _tell_panic = TellPanic { id, end };
    let Err(Halt { reason, vcpu, .. }) = runner.run(handler);
    let crash = |what: &dyn std::fmt::Display| {
        let registers = match vcpu.registers() {
            // After a triple fault kvm_amd resets the vCPU, for what AMD's processors leave of its
            // state is undefined.
            Ok(registers) if is_reset(&registers) => {
                format!("its registers are lost: this host's KVM reset it at once\n{registers}")
            }
            Ok(registers) => registers.to_string(),
            Err(error) => format!("its registers cannot be read: {error}"),
        };
        end.tell(GuestEnd::Crashed(format!("vCPU {id}: {what}\n{registers}")));
    };
    match reason {
        HaltReason::Stopped | HaltReason::Handler(Stop::Ended) => {}
        HaltReason::Handler(Stop::Halted) => {
            // AcqRel: the last to halt has seen what the others did before they halted.
            if running.fetch_sub(1, Ordering::AcqRel) == 1 {
                end.tell(GuestEnd::Halted);
            }
        }
        HaltReason::Shutdown => crash(&"triple fault"),
        HaltReason::InternalError(error) => crash(&error),
        HaltReason::FailEntry { .. } | HaltReason::Unknown { .. } => crash(&Describe(&reason)),
        other => end.tell(GuestEnd::Failed(format!("vCPU {id}: {}", Describe(&other)))),
    }
}

/// Whether these are the registers of a vCPU at its reset vector.
fn is_reset(registers: &RegisterDump) -> bool {
    const PROTECTED_MODE: u64 = 1;
    let RegisterDump { regs, sregs, .. } = registers;
    regs.rip == 0xfff0 && sregs.cs.base == 0xffff_0000 && sregs.cr0 & PROTECTED_MODE == 0
}

/// [`HaltReason`]'s own words.
struct Describe<'a>(&'a HaltReason<Stop>);

impl std::fmt::Display for Describe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_thread_that_panics_ends_the_guest() {
        let end = EndSignal::new().unwrap();
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                let _tell_panic = TellPanic {
                    id: VcpuId(3),
                    end: &end,
                };
                panic!("on purpose");
            });
            assert!(vcpu.join().is_err());
        });
        let told = Some(GuestEnd::Failed("vCPU 3: its thread panicked".into()));
        assert_eq!(end.get().cloned(), told);
    }
}
