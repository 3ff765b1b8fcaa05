// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that the host cannot give is no device access: it has a path of its own.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_bindings::{kvm_cpuid_entry2, kvm_x86_mce};
use kvm_core::arch::x86_64::{
    InjectMachineCheck, MachineCheck, McaVendor, MceControls, McgCap, RaiseError, Unheeded,
};
use kvm_core::fake::{FakeState, FakeVcpu, Step};
use kvm_core::{
    BusError, BusErrorCode, ControlError, During, Errno, Exit, ExitHandler, Flow, Halt, HaltReason,
    HostAddress, Identity, MemoryError, MemoryErrorKind, MemoryErrorSource, Remedy, Requests,
    VcpuId, VcpuSet, VcpuView,
};
use std::cell::RefCell;
use std::sync::Arc;
use vm_memory::GuestAddress;

const EFAULT: i32 = 14;
const EHWPOISON: i32 = 133;
/// Guest memory is the first MiB, of which the last 64 KiB are read-only, mapped here.
const RAM: u64 = 0x10_0000;
const ROM: u64 = 0xf_0000;
const HVA: usize = 0x7f00_0000_0000;

const SIGNAL: BusError = BusError {
    address: HostAddress(HVA + 0x5000),
    code: BusErrorCode::ActionRequired,
    bytes: 4096,
    during: During::KvmRun,
};

/// Knows its memory, notes what it sees, and has one remedy.
struct Handler {
    remedy: fn() -> Remedy<&'static str>,
    exits: Vec<String>,
    errors: Vec<MemoryError>,
    /// Takes a SIGBUS in its own code at each port write.
    touches: Option<Arc<FakeState>>,
}

impl Handler {
    fn with(remedy: fn() -> Remedy<&'static str>) -> Self {
        Self {
            remedy,
            exits: Vec::new(),
            errors: Vec::new(),
            touches: None,
        }
    }
}

impl ExitHandler<()> for Handler {
    type Stop = &'static str;

    fn exit(&mut self, _: &VcpuView<'_, ()>, exit: Exit<'_>) -> Flow<&'static str> {
        match (&exit, &self.touches) {
            (Exit::Hlt, _) => return Flow::Stop("halted"),
            (Exit::PioOut { .. }, Some(state)) => {
                state.bus_error(BusError {
                    during: During::Handler,
                    ..SIGNAL
                });
            }
            _ => {}
        }
        self.exits.push(format!("{exit:?}"));
        Flow::Continue
    }

    fn requests(&mut self, _: &VcpuView<'_, ()>, _: Requests) -> Flow<&'static str> {
        if let Some(state) = &self.touches {
            state.bus_error(BusError {
                during: During::Handler,
                ..SIGNAL
            });
        }
        Flow::Continue
    }

    fn is_memory(&mut self, address: GuestAddress, write: bool) -> bool {
        address.0 < if write { ROM } else { RAM }
    }

    fn guest_address(&mut self, address: HostAddress) -> Option<GuestAddress> {
        let offset = address.0.checked_sub(HVA)? as u64;
        (offset < RAM).then_some(GuestAddress(offset))
    }

    fn memory_error(&mut self, _: &VcpuView<'_, ()>, error: &MemoryError) -> Remedy<&'static str> {
        self.errors.push(*error);
        (self.remedy)()
    }
}

fn run<H: ExitHandler<()>>(handler: H, vcpu: FakeVcpu) -> Halt<FakeVcpu, H, H::Stop> {
    let runner = VcpuSet::new(Identity::vm("test")).enroll(vcpu).unwrap();
    let Err(halt) = runner.run(handler);
    halt
}

fn play(
    remedy: fn() -> Remedy<&'static str>,
    script: &[Step],
) -> (HaltReason<&'static str>, Handler) {
    let script = script.iter().cloned();
    let halt = run(Handler::with(remedy), FakeVcpu::new(VcpuId(0), script));
    (halt.reason, halt.handler)
}

#[test]
fn an_mmio_exit_inside_memory_is_an_error_and_one_outside_an_access() {
    let script = [
        Step::mmio_read(RAM - 1, 1),
        Step::mmio_write(ROM - 1, &[7, 8]),
        // ROM is written to: an access, which some device or nobody takes.
        Step::mmio_write(ROM, &[7]),
        Step::mmio_read(RAM, 4),
        Step::hlt(),
    ];
    let (reason, seen) = play(|| Remedy::RunOn, &script);
    assert_eq!(reason, HaltReason::Handler("halted"));
    let error = |address, write, len| MemoryError {
        address: Some(GuestAddress(address)),
        kind: MemoryErrorKind::Unserved,
        source: MemoryErrorSource::Mmio { write, len },
    };
    assert_eq!(
        seen.errors,
        [error(RAM - 1, false, 1), error(ROM - 1, true, 2)]
    );
    assert_eq!(seen.exits.len(), 2, "{:?}", seen.exits);
}

#[test]
fn every_way_to_lose_memory_comes_to_one_place_with_its_address_kind_and_source() {
    let missing = BusError {
        code: BusErrorCode::NoSuchAddress,
        ..SIGNAL
    };
    let early = BusError {
        code: BusErrorCode::ActionOptional,
        address: HostAddress(1),
        ..SIGNAL
    };
    let fault = |errno| MemoryErrorSource::Fault {
        flags: 0,
        size: 0x1000,
        errno,
    };
    let errno = |errno| Some(Errno::new(errno));
    let cases = [
        (
            Step::memory_fault(0x5000, 0x1000, EFAULT),
            Some(0x5000),
            MemoryErrorKind::Unserved,
            fault(errno(EFAULT)),
        ),
        (
            Step::memory_fault(0x5000, 0x1000, EHWPOISON),
            Some(0x5000),
            MemoryErrorKind::Poisoned,
            fault(errno(EHWPOISON)),
        ),
        (
            Step::Errno(EFAULT),
            None,
            MemoryErrorKind::Unserved,
            MemoryErrorSource::Run(Errno::new(EFAULT)),
        ),
        (
            Step::Errno(EHWPOISON),
            None,
            MemoryErrorKind::Poisoned,
            MemoryErrorSource::Run(Errno::new(EHWPOISON)),
        ),
        (
            Step::Signal(SIGNAL),
            Some(0x5000),
            MemoryErrorKind::Poisoned,
            MemoryErrorSource::Signal(SIGNAL),
        ),
        (
            Step::Signal(missing),
            Some(0x5000),
            MemoryErrorKind::Missing,
            MemoryErrorSource::Signal(missing),
        ),
        (
            Step::Signal(early),
            None,
            MemoryErrorKind::Poisoned,
            MemoryErrorSource::Signal(early),
        ),
    ];
    for (step, address, kind, source) in cases {
        let error = MemoryError {
            address: address.map(GuestAddress),
            kind,
            source,
        };
        for (remedy, expected) in [
            (
                (|| Remedy::Halt) as fn() -> _,
                HaltReason::MemoryError(error),
            ),
            (|| Remedy::Stop("lost"), HaltReason::Handler("lost")),
            (|| Remedy::RunOn, HaltReason::Handler("halted")),
        ] {
            let (reason, seen) = play(remedy, &[step.clone(), Step::hlt()]);
            assert_eq!((reason, seen.errors), (expected, vec![error]));
            assert!(seen.exits.is_empty(), "{:?}", seen.exits);
        }
    }
}

/// A conversion is the consumer's to make: the access is told whole, and runs again after it.
#[test]
fn a_guest_that_asks_for_private_or_for_shared_memory_runs_on_when_it_was_given() {
    for (flags, private) in [(8, true), (0, false), (1 << 40, false)] {
        let step = Step::memory_fault_as(flags, 0x5000, 0x1000, EFAULT);
        let (reason, seen) = play(|| Remedy::RunOn, &[step, Step::hlt()]);
        assert_eq!(reason, HaltReason::Handler("halted"));
        let [error] = seen.errors[..] else {
            panic!("{:?}", seen.errors)
        };
        assert_eq!(error.wants_private(), Some(private));
        assert!(error.is_restartable());
        assert_eq!(
            error.source,
            MemoryErrorSource::Fault {
                flags,
                size: 0x1000,
                errno: Some(Errno::new(EFAULT)),
            }
        );
    }
    // Where KVM says nothing of it nothing is made up.
    let (_, seen) = play(|| Remedy::RunOn, &[Step::Errno(EFAULT), Step::hlt()]);
    assert_eq!(seen.errors[0].wants_private(), None);
}

#[test]
fn a_handler_that_knows_nothing_of_memory_errors_halts_with_one_in_words() {
    let ignore = |_: &VcpuView<'_, ()>, _: Exit<'_>| -> Flow<()> { Flow::Continue };
    let missing = BusError {
        code: BusErrorCode::NoSuchAddress,
        during: During::Handler,
        ..SIGNAL
    };
    for (step, words) in [
        (
            Step::memory_fault(0x5000, 0x1000, EFAULT),
            "memory at 0x5000 (4096 bytes, asked for as shared, flags 0x0, KVM_RUN: Bad address",
        ),
        (
            Step::memory_fault_as(8, 0x6000, 0x2000, EFAULT),
            "memory at 0x6000 (8192 bytes, asked for as private, flags 0x8, KVM_RUN: Bad address",
        ),
        (
            Step::Errno(EHWPOISON),
            "its memory, the page is poisoned (KVM_RUN: ",
        ),
        (
            Step::Signal(missing),
            "there is nothing behind its mapping (a truncated file?) (SIGBUS in the monitor at host address 0x7f0000005000, 4096 bytes)",
        ),
    ] {
        let halt = run(ignore, FakeVcpu::new(VcpuId(0), [step]));
        let text = halt.reason.to_string();
        assert!(matches!(halt.reason, HaltReason::MemoryError(_)), "{text}");
        assert!(text.contains(words), "{text}");
    }
    // And an MMIO exit is what it always was.
    let halt = run(
        ignore,
        FakeVcpu::new(VcpuId(0), [Step::mmio_read(0, 1), Step::shutdown()]),
    );
    assert_eq!(halt.reason, HaltReason::Shutdown);
}

#[test]
fn a_fault_that_was_told_is_not_told_again_by_a_later_efault() {
    let script = [
        Step::memory_fault(0x5000, 0x1000, EFAULT),
        Step::Errno(EFAULT),
        Step::hlt(),
    ];
    let (_, seen) = play(|| Remedy::RunOn, &script);
    let addresses: Vec<_> = seen.errors.iter().map(|error| error.address).collect();
    assert_eq!(addresses, [Some(GuestAddress(0x5000)), None]);
}

#[test]
fn an_error_in_the_handlers_own_code_stops_the_vcpu_before_the_guest_runs_again() {
    let vcpu = FakeVcpu::new(
        VcpuId(0),
        [Step::pio_out(1, 1, &[1]), Step::pio_out(2, 1, &[1])],
    );
    let mut handler = Handler::with(|| Remedy::Halt);
    handler.touches = Some(vcpu.state());
    let halt = run(handler, vcpu);
    assert!(matches!(halt.reason, HaltReason::MemoryError(_)));
    assert_eq!((halt.handler.exits.len(), halt.vcpu.steps_left()), (1, 1));
    assert!(!halt.handler.errors[0].is_restartable());
}

#[test]
fn an_error_while_a_request_is_served_stops_the_vcpu_too() {
    let vcpu = FakeVcpu::new(VcpuId(0), [Step::pio_out(1, 1, &[1])]);
    let mut handler = Handler::with(|| Remedy::Halt);
    handler.touches = Some(vcpu.state());
    let state = vcpu.state();
    let set = VcpuSet::new(Identity::vm("test"));
    let runner = set.enroll(vcpu).unwrap();
    set.request_all(kvm_core::Request::consumer(0).unwrap());
    let Err(halt) = runner.run(handler);
    assert!(matches!(halt.reason, HaltReason::MemoryError(_)));
    assert_eq!(state.log().runs, 0);
}

/// Takes a SIGBUS outside of exits: just before the guest runs, or when it is asked about a halted one.
struct Outside {
    state: Arc<FakeState>,
    before_entry: bool,
    seen: usize,
}

impl ExitHandler<()> for Outside {
    type Stop = &'static str;

    fn exit(&mut self, _: &VcpuView<'_, ()>, exit: Exit<'_>) -> Flow<&'static str> {
        match exit {
            Exit::Hlt if self.before_entry => Flow::Stop("the guest has run"),
            Exit::Hlt => Flow::Block,
            _ => Flow::Stop("the guest has run on"),
        }
    }

    fn before_entry(&mut self, _: &VcpuView<'_, ()>) {
        if self.before_entry {
            self.state.bus_error(SIGNAL);
        }
    }

    fn runnable(&mut self, _: &VcpuView<'_, ()>) -> bool {
        self.state.bus_error(SIGNAL);
        true
    }

    fn memory_error(&mut self, _: &VcpuView<'_, ()>, _: &MemoryError) -> Remedy<&'static str> {
        self.seen += 1;
        Remedy::Stop("told")
    }
}

#[test]
fn an_error_in_any_other_call_of_the_handler_stops_the_vcpu_before_the_guest_runs_again() {
    for before_entry in [true, false] {
        let vcpu = FakeVcpu::new(VcpuId(0), [Step::hlt(), Step::pio_in(1, 1, 1)]);
        let state = vcpu.state();
        let handler = Outside {
            state: state.clone(),
            before_entry,
            seen: 0,
        };
        let runner = VcpuSet::new(Identity::vm("test")).enroll(vcpu).unwrap();
        // Its halt ends at once.
        runner.waker().wake();
        let Err(halt) = runner.run(handler);
        assert_eq!(halt.reason, HaltReason::Handler("told"));
        assert_eq!(halt.handler.seen, 1);
        assert_eq!(state.log().runs, usize::from(!before_entry));
    }
}

#[test]
fn an_error_while_a_paused_vcpu_is_asked_stops_it_before_the_guest_runs_again() {
    let set = VcpuSet::new(Identity::vm("test"));
    let vcpu = FakeVcpu::new(VcpuId(0), []);
    let state = vcpu.state();
    let runner = set.enroll(vcpu).unwrap();
    let thread = std::thread::spawn(move || {
        let Err(halt) = runner.run(Handler::with(|| Remedy::Stop("told")));
        halt.reason
    });
    while !state.is_in_guest() {
        std::thread::yield_now();
    }
    let pause = set.pause().unwrap();
    let runs = state.log().runs;
    let lost = state.clone();
    let touch = move |_: &VcpuView<'_, ()>| lost.bus_error(SIGNAL);
    let answer = pause.with_vcpu(VcpuId(0), touch);
    assert_eq!(answer, Err(ControlError::MemoryError(VcpuId(0))));
    drop(pause);
    // One that runs on instead is kicked out of the guest, and has run it.
    while !thread.is_finished() && !state.is_in_guest() {
        std::thread::yield_now();
    }
    set.kick(VcpuId(0)).ok();
    assert_eq!(thread.join().unwrap(), HaltReason::Handler("told"));
    assert_eq!(state.log().runs, runs);
}

#[test]
fn what_a_read_gets_where_memory_was_lost_is_zeros() {
    struct Look;
    impl ExitHandler<()> for Look {
        type Stop = u8;
        fn exit(&mut self, _: &VcpuView<'_, ()>, _: Exit<'_>) -> Flow<u8> {
            Flow::Continue
        }
        fn is_memory(&mut self, _: GuestAddress, _: bool) -> bool {
            true
        }
        fn memory_error(&mut self, _: &VcpuView<'_, ()>, _: &MemoryError) -> Remedy<u8> {
            Remedy::Halt
        }
    }
    // What KVM left there: a data buffer of ones.
    let Step::Exit {
        reason,
        mut bytes,
        errno,
    } = Step::mmio_read(0x5000, 8)
    else {
        panic!()
    };
    bytes[0].1[8..16].fill(0xff);
    let step = Step::Exit {
        reason,
        bytes,
        errno,
    };
    let mut halt = run(Look, FakeVcpu::new(VcpuId(0), [step]));
    use kvm_core::RunVcpu;
    let Ok(Exit::MmioRead { data, .. }) = Exit::decode(halt.vcpu.exit_area().0) else {
        panic!()
    };
    assert_eq!(data, [0; 8]);
}

/// A vCPU that keeps the machine checks that it is given, or fails.
#[derive(Default)]
struct Bank {
    errno: Option<i32>,
    controls: MceControls,
    set: RefCell<Vec<kvm_x86_mce>>,
}

impl InjectMachineCheck for Bank {
    fn setup_mce(&self, _: u64) -> Result<(), Errno> {
        Ok(())
    }
    fn set_mce(&self, mce: &kvm_x86_mce) -> Result<(), Errno> {
        if let Some(errno) = self.errno {
            return Err(Errno::new(errno));
        }
        self.set.borrow_mut().push(*mce);
        Ok(())
    }
    fn mce_controls(&self, bank: u8) -> Result<MceControls, Errno> {
        assert_eq!(bank, 9);
        Ok(self.controls)
    }
}

/// Of a guest that takes machine checks.
const HEEDS: MceControls = MceControls {
    cr4: 1 << 6 | 1 << 5,
    cap: McgCap(0x0100_010a),
    status: 0,
    control: u64::MAX,
    bank_control: u64::MAX,
};

fn error(source: MemoryErrorSource) -> MemoryError {
    MemoryError {
        address: Some(GuestAddress(0x1234_5000)),
        kind: MemoryErrorKind::Poisoned,
        source,
    }
}

#[test]
fn a_machine_check_says_what_the_manuals_say() {
    let restartable = error(MemoryErrorSource::Signal(SIGNAL));
    let huge = BusError {
        code: BusErrorCode::ActionOptional,
        bytes: 2 << 20,
        ..SIGNAL
    };
    let optional = error(MemoryErrorSource::Signal(huge));
    let over = error(MemoryErrorSource::Mmio {
        write: false,
        len: 1,
    });
    let (intel, amd) = (McaVendor::Intel, McaVendor::Amd);
    // VAL, UC, EN, MISCV, ADDRV; S, AR and MCACOD; PCC; AMD's Deferred and Poison.
    for (case, vendor, status, mcg_status, misc) in [
        (&restartable, intel, 0xbd80_0000_0000_0134_u64, 7, 0x8c),
        (&optional, intel, 0xbd00_0000_0000_00c0, 5, 0x95),
        (&over, intel, 0xbe00_0000_0000_0134, 4, 0x8c),
        (&restartable, amd, 0xbc00_0800_0000_0000, 7, 0x8c),
        (&optional, amd, 0x9c00_1800_0000_0000, 5, 0x95),
        (&over, amd, 0xbe00_0000_0000_0134, 4, 0x8c),
    ] {
        let check = MachineCheck::of(case, vendor).unwrap();
        let bank = Bank {
            controls: HEEDS,
            ..Bank::default()
        };
        check.raise(&bank).unwrap();
        let [mce] = bank.set.borrow()[..] else {
            panic!()
        };
        let found = (mce.status, mce.mcg_status, mce.misc, mce.addr, mce.bank);
        assert_eq!(
            found,
            (status, mcg_status, misc, 0x1234_5000, 9),
            "{case:?} {vendor:?}"
        );
        let others = check.for_others();
        assert_eq!(
            others.is_some(),
            vendor == intel && status & 1 << 61 != 0,
            "{case:?} {vendor:?}"
        );
        let others = others.map(|check| (check.as_kvm().status, check.as_kvm().mcg_status));
        assert!(others.is_none_or(|it| it == (0xa000_0000_0000_0000, 5)));
    }
}

#[test]
fn an_error_without_an_address_or_a_wish_for_private_memory_makes_no_machine_check_and_a_refused_one_says_so()
 {
    let nowhere = MemoryError {
        address: None,
        ..error(MemoryErrorSource::Run(Errno::new(EFAULT)))
    };
    assert_eq!(MachineCheck::of(&nowhere, McaVendor::Intel), None);
    // To ask for private memory is no damage; a private page that is poisoned is.
    let private = |errno, kind| MemoryError {
        kind,
        ..error(MemoryErrorSource::Fault {
            flags: 8,
            size: 0x1000,
            errno: Some(Errno::new(errno)),
        })
    };
    let asked = private(EFAULT, MemoryErrorKind::Unserved);
    let poisoned = private(EHWPOISON, MemoryErrorKind::Poisoned);
    assert_eq!(MachineCheck::of(&asked, McaVendor::Intel), None);
    assert!(MachineCheck::of(&poisoned, McaVendor::Intel).is_some());
    let bank = Bank {
        errno: Some(22),
        controls: HEEDS,
        ..Bank::default()
    };
    let check =
        MachineCheck::of(&error(MemoryErrorSource::Signal(SIGNAL)), McaVendor::Amd).unwrap();
    let refused = check.raise(&bank);
    assert_eq!(refused, Err(RaiseError::Kvm(Errno::new(22))));
}

/// A processor would shut down, or KVM would raise nothing and say nothing of it.
#[test]
fn a_guest_that_would_not_take_a_machine_check_is_given_none_and_that_is_said() {
    let off = MceControls {
        cr4: !(1 << 6),
        ..HEEDS
    };
    let in_progress = MceControls { status: 4, ..HEEDS };
    let no_control = MceControls {
        control: u64::MAX - 1,
        ..HEEDS
    };
    let no_bank = MceControls {
        bank_control: 0,
        ..HEEDS
    };
    // Without MCG_CTL_P nobody asks for that register.
    let absent = MceControls {
        cap: McgCap(0x20),
        control: 0,
        ..HEEDS
    };
    let check = MachineCheck::of(&error(MemoryErrorSource::Signal(SIGNAL)), McaVendor::Amd);
    let early = BusError {
        code: BusErrorCode::ActionOptional,
        ..SIGNAL
    };
    let deferred = MachineCheck::of(&error(MemoryErrorSource::Signal(early)), McaVendor::Amd);
    for (controls, due, words) in [
        (HEEDS, None, ""),
        (absent, None, ""),
        (off, Some(Unheeded::Off), "CR4.MCE"),
        (in_progress, Some(Unheeded::InProgress), "MCIP"),
        (no_control, Some(Unheeded::Masked), "IA32_MC9_CTL"),
        (no_bank, Some(Unheeded::Masked), "IA32_MCG_CTL"),
    ] {
        let bank = Bank {
            controls,
            ..Bank::default()
        };
        let raised = check.unwrap().raise(&bank);
        assert_eq!(raised.err(), due.map(RaiseError::Unheeded));
        assert_eq!(bank.set.borrow().len(), usize::from(due.is_none()));
        if let Some(due) = due {
            let text = due.to_string();
            assert!(text.contains(words), "{text}");
        }
        // What interrupts nobody is stored in any case.
        deferred.unwrap().raise(&bank).unwrap();
    }
}

#[test]
fn a_guest_is_given_no_more_of_machine_checks_than_its_host_has() {
    // 32 banks, MCG_CTL_P, MCG_SER_P, MCG_CMCI_P, MCG_LMCE_P: what a KVM of today says.
    let guest = McgCap(0x0900_0520).for_guest().unwrap();
    assert_eq!(guest, McgCap(0x0100_010a));
    assert!(guest.software_recovery() && guest.banks() == 10);
    assert_eq!(McgCap(0x20).for_guest(), Some(McgCap(0x0a)));
    assert_eq!(McgCap(0x0100_0109).for_guest(), None);
}

#[test]
fn the_vendor_is_that_of_the_guests_own_cpuid() {
    let leaf = |ebx, edx, ecx| {
        [kvm_cpuid_entry2 {
            ebx,
            edx,
            ecx,
            ..Default::default()
        }]
    };
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    let amd = leaf(word(b"Auth"), word(b"enti"), word(b"cAMD"));
    assert_eq!(McaVendor::of(&amd), McaVendor::Amd);
    let intel = leaf(word(b"Genu"), word(b"ineI"), word(b"ntel"));
    assert_eq!(McaVendor::of(&intel), McaVendor::Intel);
    assert_eq!(McaVendor::of(&[]), McaVendor::Intel);
}
