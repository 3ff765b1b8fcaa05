// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU's thread: what becomes of its exits, and of its end.
//!
//! Every exit begins with what KVM has coalesced since the last one, so that a device sees the guest's
//! writes in the guest's order. Accesses go to io-bus; one that a device defers is waited for here,
//! until its answer comes or the machine stops. What comes out as an access and lies in guest memory is
//! none, but for a write to read-only memory: the host cannot serve the page, and the guest stops rather
//! than going on with data that its memory never held ([`Handler::memory_error`]). What the guest asks
//! for and nobody has is logged once.
//!
//! Nothing of the published tables is held between exits: the dispatcher and the reader of the slots
//! are entered for an access and left after it, so a vCPU that sleeps in the guest keeps no device and
//! no memory alive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use dirty_log::DirtyRings;
use io_bus::{Dispatcher, Interrupter, IoBus, MappedRing, Outcome};
use kvm_core::arch::x86_64::RegisterDump;
use kvm_core::{
    Exit, ExitHandler, Flow, Halt, HaltReason, HostAddress, Identity, MemoryError, Remedy, Request,
    Requests, Runner, Vcpu, VcpuId, VcpuView, vcpu_unimpl,
};
use kvm_ioctls::{VcpuFd, VmFd};
use memslots::Hva;
use vm_device::bus::{MmioAddress, PioAddress};
use vm_memory::GuestAddress;

use crate::devices::coalesce::{Coalescing, PolledOutput};
use crate::devices::edge::Owing;
use crate::devices::ioapic::Ioapic;
use crate::end::{EndSignal, GuestEnd};
use crate::gdb::{self, VcpuSide};
use crate::lazy::Loss;
use crate::machine_checks::MachineChecks;
use crate::mapped_file::{self, MappedFile};
use crate::memory::{Memslots, SlotTable};
use crate::msrs::Unserved;
use crate::stats::{ExitCounters, ExitKind};
use crate::timeline::{Event, timeline};

/// What the exits of all vCPUs share.
pub(crate) struct Shared<P> {
    pub(crate) bus: IoBus,
    pub(crate) memslots: Memslots,
    pub(crate) console: Arc<Coalescing<Arc<VmFd>, P>>,
    /// The IOAPIC of the split irqchip.
    pub(crate) ioapic: Option<Arc<Ioapic<Arc<VmFd>>>>,
    /// With `--dirty-log ring`.
    pub(crate) rings: Option<DirtyRings<Arc<VmFd>>>,
    /// What may owe the guest an interrupt.
    pub(crate) owing: [Arc<dyn Owing>; 2],
    pub(crate) end: Arc<EndSignal>,
    /// The guest learns of memory that does not come, if KVM tells enough of it: how many vCPUs it has.
    pub(crate) machine_checks: Option<usize>,
    /// The file that guest memory is mapped from, which may be cut off.
    pub(crate) mapped: Option<MappedFile>,
    /// Where memory comes later.
    pub(crate) loss: Option<Loss>,
    /// The vCPUs are being stopped: nobody waits for a deferred answer any more.
    pub(crate) stopping: Arc<AtomicBool>,
}

/// The request of a vCPU to show its registers.
pub(crate) const SHOW_REGISTERS: Option<Request> = Request::consumer(0);

/// The request of any vCPU to send the interrupts that the main thread could not send without waiting: the
/// first that comes does it.
pub(crate) const SEND_OWED: Option<Request> = Request::consumer(1);

/// A vCPU's exits, on its thread.
pub(crate) struct Handler<P> {
    /// Who its log lines are about.
    who: Identity,
    shared: Arc<Shared<P>>,
    io: Dispatcher,
    memory: memslots::Reader<SlotTable>,
    counters: Arc<ExitCounters>,
    entered: bool,
    /// Where the guest is told of memory that does not come.
    checks: Option<MachineChecks>,
    /// Under a debugger.
    debug: Option<Box<VcpuSide>>,
}

/// Why a vCPU stopped by itself.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The guest's end has been told.
    Ended,
    /// HLT, and there is no interrupt controller that could wake it.
    Halted,
}

impl<P: PolledOutput + 'static> Handler<P> {
    pub(crate) fn new(
        who: Identity,
        shared: &Arc<Shared<P>>,
        counters: Arc<ExitCounters>,
        debug: Option<VcpuSide>,
    ) -> Self {
        Handler {
            who,
            io: shared.bus.dispatcher(),
            memory: shared.memslots.reader(),
            shared: shared.clone(),
            counters,
            entered: false,
            checks: shared.machine_checks.map(MachineChecks::new),
            debug: debug.map(Box::new),
        }
    }

    /// Ends this vCPU's wait for a device, as the kick ends its stay in the guest.
    pub(crate) fn interrupter(&self) -> Interrupter {
        self.io.interrupter()
    }

    fn access(&mut self, vcpu: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Result<(), Stop> {
        match exit {
            Exit::PioIn { port, size, data } => {
                let outcome = self
                    .io
                    .pio_read_repeated(PioAddress(port), size.into(), data);
                let outcome = self.settled(outcome, Wait::Read(data))?;
                self.nobody_at_port(outcome, port);
            }
            Exit::PioOut { port, size, data } => {
                let outcome = self
                    .io
                    .pio_write_repeated(PioAddress(port), size.into(), data);
                let outcome = self.settled(outcome, Wait::Write(data))?;
                self.nobody_at_port(outcome, port);
                let ring = |vm: &Arc<VmFd>| MappedRing::new(vm, vcpu.fd());
                self.shared.console.after_write(&self.shared.bus, ring);
            }
            Exit::MmioRead { addr, data } => {
                let outcome = self.io.mmio_read(MmioAddress(addr.0), data);
                let outcome = self.settled(outcome, Wait::Read(data))?;
                self.nobody_at(outcome, addr);
            }
            Exit::MmioWrite { addr, data } => {
                let outcome = self.io.mmio_write(MmioAddress(addr.0), data);
                let outcome = self.settled(outcome, Wait::Write(data))?;
                self.nobody_at(outcome, addr);
            }
            Exit::IoapicEoi { vector } => {
                if let Some(ioapic) = &self.shared.ioapic {
                    ioapic.eoi(vector);
                }
            }
            Exit::X86Rdmsr {
                index,
                reason,
                mut reply,
            } => {
                reply.refuse();
                self.unserved(Unserved {
                    index,
                    value: None,
                    reason,
                });
            }
            Exit::X86Wrmsr {
                index,
                reason,
                value,
                mut reply,
            } => {
                reply.refuse();
                self.unserved(Unserved {
                    index,
                    value: Some(value),
                    reason,
                });
            }
            Exit::Hlt => return Err(Stop::Halted),
            Exit::DirtyRingFull => self.reap(vcpu.id())?,
            Exit::Debug {
                exception, pc, dr6, ..
            } => {
                if let Some(debug) = &mut self.debug {
                    debug.debug_exit(vcpu, exception, pc, dr6);
                }
            }
            Exit::SystemEvent { kind, .. } => match kind {
                kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => self.tell(GuestEnd::PoweredOff),
                kvm_bindings::KVM_SYSTEM_EVENT_RESET => self.tell(GuestEnd::Reset),
                kvm_bindings::KVM_SYSTEM_EVENT_CRASH => self.tell(GuestEnd::Panicked),
                other => {
                    vcpu_unimpl!(&self.who, other.into(); "system event {other}, which is ignored");
                }
            },
            // Nothing of these was asked for.
            other => {
                let kind = kvm_core::logging::key(std::mem::discriminant(&other));
                vcpu_unimpl!(Info, &self.who, kind; "{other:?}, which is ignored");
            }
        }
        Ok(())
    }

    /// What became of an access; where the machine stops before its answer comes, the vCPU halts.
    #[inline]
    fn settled(&mut self, outcome: Outcome, wait: Wait<'_>) -> Result<Outcome, Stop> {
        match answer(&mut self.io, &self.shared.stopping, outcome, wait) {
            Outcome::Deferred => Err(Stop::Ended),
            outcome => Ok(outcome),
        }
    }

    /// Says once of each port that nobody answers there.
    #[inline]
    fn nobody_at_port(&self, outcome: Outcome, port: u16) {
        if !outcome.is_answered() {
            vcpu_unimpl!(Info, &self.who, port.into(); "nobody answers at port {port:#x}");
        }
    }

    fn unserved(&self, access: Unserved) {
        vcpu_unimpl!(Info, &self.who, access.key(); "{access}");
    }

    /// An access that no device answered: a write to memory that the guest can only read is dropped, as
    /// a PC's ROM drops it. Of others each page is logged once.
    fn nobody_at(&mut self, outcome: Outcome, addr: GuestAddress) {
        if outcome.is_answered() {
            return;
        }
        let found = self.memory.enter().translate(addr).is_some();
        let (page, at) = (addr.0 >> 12, addr.0);
        if found {
            self.counters.count_read_only_write();
            vcpu_unimpl!(Debug, &self.who, page; "a write to read-only memory at {at:#x} is dropped");
        } else {
            vcpu_unimpl!(Info, &self.who, page; "nobody answers at {at:#x}");
        }
    }

    /// This vCPU's list of what it wrote is full: what all lists say is kept for the next harvest.
    fn reap(&self, vcpu: VcpuId) -> Result<(), Stop> {
        let Some(rings) = &self.shared.rings else {
            return Ok(());
        };
        match rings.full(vcpu.0) {
            Ok(reaped) if reaped.overrun => {
                log::warn!(
                    "vCPU {vcpu}: KVM overran its dirty ring: all of memory counts as written"
                );
                Ok(())
            }
            Ok(_) => Ok(()),
            // It would leave the guest for this again and again.
            Err(error) => {
                self.tell(GuestEnd::Failed(format!("vCPU {vcpu}: {error}")));
                Err(Stop::Ended)
            }
        }
    }

    fn tell(&self, end: GuestEnd) {
        // Also before a failure, which by itself waits for nobody.
        self.shared.console.sync();
        self.shared.end.tell(end);
    }
}

impl<P: PolledOutput + 'static> ExitHandler<VcpuFd> for Handler<P> {
    type Stop = Stop;

    fn exit(&mut self, vcpu: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Flow<Stop> {
        self.counters.count(kind(&exit));
        self.shared.console.before_exit(&mut self.io);
        match self.access(vcpu, exit) {
            Err(stop) => Flow::Stop(stop),
            Ok(()) if self.shared.end.is_told() => Flow::Stop(Stop::Ended),
            Ok(()) => Flow::Continue,
        }
    }

    /// [`SHOW_REGISTERS`], [`SEND_OWED`] and the debugger's.
    fn requests(&mut self, vcpu: &VcpuView<'_, VcpuFd>, requests: Requests) -> Flow<Stop> {
        let wants = |request: Option<Request>| request.is_some_and(|it| requests.contains(it));
        if wants(SEND_OWED) {
            for owing in &self.shared.owing {
                owing.send_owed();
            }
        }
        if wants(SHOW_REGISTERS) {
            show_registers(vcpu);
        }
        if let Some(debug) = &mut self.debug
            && wants(gdb::DEBUG)
        {
            debug.serve(vcpu);
        }
        Flow::Continue
    }

    fn is_memory(&mut self, addr: GuestAddress, write: bool) -> bool {
        let found = self.memory.enter().translate(addr);
        found.is_some_and(|memory| memory.writable || !write)
    }

    fn guest_address(&mut self, address: HostAddress) -> Option<GuestAddress> {
        let found = self.memory.enter().hva_to_gpa(Hva(address.0));
        found.map(|(_, address)| address)
    }

    /// Going on would give the guest what is not in its memory.
    fn memory_error(&mut self, vcpu: &VcpuView<'_, VcpuFd>, error: &MemoryError) -> Remedy<Stop> {
        let told = self.checks.as_mut().map(|checks| checks.tell(vcpu, error));
        if let Some(Ok(())) = told {
            // Of a piece of a file it may have hundreds.
            let level = match self.counters.count_machine_check() {
                0 => log::Level::Warn,
                _ => log::Level::Debug,
            };
            log::log!(
                level,
                "vCPU {}: {error}: the guest has a machine check",
                vcpu.id()
            );
            return Remedy::RunOn;
        }
        if let Some(Err(why)) = &told
            && error.is_optional()
        {
            log::warn!(
                "vCPU {}: {error}: nobody has run into it yet, and the guest is not told: {why}",
                vcpu.id()
            );
            return Remedy::RunOn;
        }
        let lost = self.shared.mapped.as_ref().and_then(|file| {
            let at = error.address.map(|address| address.0);
            file.lost(&self.memory.enter(), at)
        });
        let lost = lost.or_else(|| self.shared.loss.as_ref().and_then(|loss| loss.why(true)));
        let mut error = format!("vCPU {}: {error}", vcpu.id());
        if let Some(Err(why)) = told {
            error = format!("{error}; the guest has no machine check for it: {why}");
        }
        self.tell(GuestEnd::Failed(match lost {
            Some(lost) => format!("{lost} ({error})"),
            None => error,
        }));
        Remedy::Stop(Stop::Ended)
    }

    fn before_entry(&mut self, _vcpu: &VcpuView<'_, VcpuFd>) {
        if !self.entered {
            self.entered = true;
            timeline().mark(Event::FirstEntry);
        }
    }
}

pub(crate) fn show_registers(vcpu: &VcpuView<'_, VcpuFd>) {
    let id = vcpu.id();
    // One write each, so that several vCPUs' do not mix. Stderr closed or full stops no guest.
    let text = match vcpu.registers() {
        Ok(registers) => format!("reference-vmm: vCPU {id}:\n{registers}\n"),
        Err(error) => {
            format!("reference-vmm: vCPU {id}: its registers cannot be read: {error}\n")
        }
    };
    crate::stderr::write(text.as_bytes());
}

/// The data of an access that may have to be waited for.
enum Wait<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

/// What became of an access in the end: the answer to a deferred one is waited for, until the machine
/// stops. It is `Deferred` still then, and the vCPU halts: the guest never sees what is missing.
#[inline]
fn answer(
    io: &mut Dispatcher,
    stopping: &AtomicBool,
    mut outcome: Outcome,
    mut wait: Wait<'_>,
) -> Outcome {
    while outcome == Outcome::Deferred {
        // Relaxed: who stops sets it before it interrupts, and the interrupter's lock makes it visible.
        if stopping.load(Ordering::Relaxed) {
            io.abandon();
            break;
        }
        outcome = match &mut wait {
            Wait::Read(data) => io.wait_read(data),
            Wait::Write(data) => io.wait_write(data),
        };
    }
    outcome
}

fn kind(exit: &Exit<'_>) -> ExitKind {
    match exit {
        Exit::PioIn { .. } => ExitKind::PioIn,
        Exit::PioOut { .. } => ExitKind::PioOut,
        Exit::MmioRead { .. } => ExitKind::MmioRead,
        Exit::MmioWrite { .. } => ExitKind::MmioWrite,
        Exit::Hlt => ExitKind::Hlt,
        _ => ExitKind::Other,
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
pub(crate) fn run_vcpu<P: PolledOutput + 'static>(
    runner: Runner<Vcpu>,
    handler: Handler<P>,
    end: &EndSignal,
    running: &AtomicUsize,
) {
    let id = runner.id();
    let _tell_panic = TellPanic { id, end };
    let shared = handler.shared.clone();
    let Err(Halt { reason, vcpu, .. }) = runner.run(handler);
    // A triple fault and its like pass by the handler, and so by the ring.
    if !matches!(
        reason,
        HaltReason::Stopped | HaltReason::Handler(Stop::Ended)
    ) {
        shared.console.finish(&shared.bus);
    }
    // What looks like the guest's crash may be its memory's loss.
    let is_crash = matches!(
        reason,
        HaltReason::Shutdown
            | HaltReason::InternalError(_)
            | HaltReason::FailEntry { .. }
            | HaltReason::Unknown { .. }
    );
    let certain = match &reason {
        HaltReason::RunFailed(errno) => [libc::EFAULT, libc::EHWPOISON].contains(&errno.errno()),
        HaltReason::MemoryError(_) => true,
        _ => false,
    };
    let later = shared.loss.as_ref().filter(|_| certain || is_crash);
    let later = later.and_then(|loss| loss.why(certain));
    // One that goes on without what is lost may crash of that, or by itself.
    let (later, before) = match shared.machine_checks {
        Some(_) if is_crash => (None, later),
        _ => (later, None),
    };
    let before = before.map_or_else(String::new, |why| {
        format!("\nsome of the guest's memory was lost before: {why}")
    });
    let lost = is_crash.then(|| lost(&shared, &vcpu)).flatten();
    if let Some(lost) = lost.or(later) {
        let what = Describe(&reason);
        return end.tell(GuestEnd::Failed(format!("{lost} (vCPU {id}: {what})")));
    }
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
        let what = format!("vCPU {id}: {what}\n{registers}{before}");
        end.tell(GuestEnd::Crashed(what));
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
        HaltReason::InternalError(error) => match vcpu.registers() {
            // A triple fault ends otherwise, so it is no state that KVM has reset.
            Ok(registers) if is_reset(&registers) => {
                end.tell(GuestEnd::Crashed(format!(
                    "vCPU {id}: {}{before}",
                    initialised(&error)
                )));
            }
            _ => crash(&advised(&error)),
        },
        HaltReason::FailEntry { .. } | HaltReason::Unknown { .. } => crash(&Describe(&reason)),
        other => end.tell(GuestEnd::Failed(format!("vCPU {id}: {}", Describe(&other)))),
    }
}

/// What of its memory's file a vCPU that crashed needed and cannot have, in words.
fn lost<P>(shared: &Shared<P>, vcpu: &Vcpu) -> Option<String> {
    let mapped = shared.mapped.as_ref()?;
    let registers = vcpu.registers().ok()?;
    let translate = |linear| {
        let found = vcpu.fd().translate_gva(linear).ok()?;
        (found.valid != 0).then_some(found.physical_address)
    };
    let needed = mapped_file::needed(&registers, translate);
    mapped.lost(&shared.memslots.snapshot(), needed)
}

/// An internal error of KVM, and what its user can do: most often this KVM interprets guests, and a stock
/// Linux is beyond it.
fn advised(error: &dyn std::fmt::Display) -> String {
    format!(
        "{error}\n`reference-vmm doctor` says whether this host's KVM is a software one, which interprets guests; a \
         stock Linux boots in the lab there: `cargo xtask boot`"
    )
}

/// An internal error of KVM at the reset vector. Of no use to say what KVM is, or to show the registers, which
/// are those of any processor there.
fn initialised(error: &dyn std::fmt::Display) -> String {
    format!(
        "{error}\nthe guest sent it an INIT: it began anew at its reset vector, 0xfffffff0, where this machine has no \
         firmware. A guest resets the machine through ACPI's reset register or the keyboard controller"
    )
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
    use io_bus::{Answer, At, BusKind, Completion, IoDevice, IoRange, defer};
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Hands every access on to the test.
    struct Remote(Sender<Completion>);

    impl IoDevice for Remote {
        fn read(&self, _: At, _: &mut [u8]) -> Answer {
            let (completion, deferral) = defer();
            self.0.send(completion).unwrap();
            Answer::Deferred(deferral)
        }
        fn write(&self, at: At, _: &[u8]) -> Answer {
            self.read(at, &mut [])
        }
    }

    fn remote() -> (IoBus, io_bus::Registration, Receiver<Completion>) {
        let (requests, inbox) = channel();
        let bus = IoBus::new();
        let range = IoRange::new(0x70, 1).unwrap();
        let remote = bus.register(BusKind::Pio, range, Remote(requests)).unwrap();
        (bus, remote, inbox)
    }

    #[test]
    fn a_deferred_access_is_waited_for() {
        let (bus, _remote, inbox) = remote();
        let stopping = AtomicBool::new(false);
        let mut io = bus.dispatcher();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                inbox.recv().unwrap().complete(&[0x2a]);
                inbox.recv().unwrap().complete(&[]);
            });
            let mut data = [0];
            let outcome = io.pio_read(PioAddress(0x70), &mut data);
            let outcome = answer(&mut io, &stopping, outcome, Wait::Read(&mut data));
            assert_eq!((outcome, data), (Outcome::Answered, [0x2a]));
            let outcome = io.pio_write(PioAddress(0x70), &data);
            let outcome = answer(&mut io, &stopping, outcome, Wait::Write(&data));
            assert_eq!(outcome, Outcome::Answered);
        });
    }

    #[test]
    fn a_machine_that_stops_waits_for_no_answer() {
        let (bus, _remote, inbox) = remote();
        let stopping = AtomicBool::new(false);
        let mut io = bus.dispatcher();
        let interrupter = io.interrupter();
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| {
                let mut data = [0];
                let outcome = io.pio_read(PioAddress(0x70), &mut data);
                answer(&mut io, &stopping, outcome, Wait::Read(&mut data))
            });
            let completion = inbox.recv().unwrap();
            // Without a stop it comes back to the wait.
            interrupter.interrupt();
            assert!(!completion.is_abandoned());
            stopping.store(true, Ordering::Relaxed);
            interrupter.interrupt();
            assert_eq!(vcpu.join().unwrap(), Outcome::Deferred);
            assert!(completion.is_abandoned());
        });
    }

    #[test]
    fn an_internal_error_of_kvm_points_to_the_doctor_and_the_lab() {
        let text = advised(&"KVM internal error 1");
        assert!(text.starts_with("KVM internal error 1\n"), "{text}");
        for needle in ["`reference-vmm doctor`", "`cargo xtask boot`"] {
            assert!(text.contains(needle), "{text}");
        }
    }

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
