// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A KVM that refuses any one call: the error says which and why, and the same call succeeds when it is
//! not refused, because nothing was changed.
//!
//! A seccomp filter of one thread makes the kernel answer one ioctl with an errno, before KVM sees it.
//! What the run loop does with each errno of `KVM_RUN` and `KVM_KVMCLOCK_CTRL` is in `lifecycle.rs` too,
//! with a vCPU that is none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::Machine;
use kvm_core::arch::x86_64::{
    BootState, GuestDebug, InjectMachineCheck, Injection, MachineCheck, McaVendor, McgCap, Unheeded,
};
use kvm_core::{
    BusError, BusErrorCode, DeviceAttribute, DeviceKind, DisabledExits, During, Errno, Exit, Flow,
    HaltReason, HostAddress, KickSignal, Kvm, MemoryError, MemoryErrorKind, MemoryErrorSource,
    Vcpu, VcpuId, VcpuSet, VcpuView,
};
use kvm_ioctls::VcpuFd;
use std::time::Duration;
use vm_memory::GuestAddress;

const ERRNOS: [i32; 8] = [
    libc::EINVAL,
    libc::ENOMEM,
    libc::EPERM,
    libc::EIO,
    libc::EBUSY,
    libc::ENOSPC,
    libc::EFAULT,
    libc::ENOTTY,
];

/// A system call that is refused.
#[derive(Clone, Copy)]
enum Refuse {
    /// An ioctl, by its request.
    Ioctl(u32),
    /// This crate's `mmap` of `kvm_run`: two pages (kvm-ioctls has a third in its own).
    Map,
    /// `rt_sigaction`.
    Action,
}

/// Calls `call` on a thread on which the kernel refuses this.
fn refused<T: Send>(refuse: Refuse, errno: i32, call: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            filter(refuse, errno);
            call()
        });
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Installs the filter, for this thread and for good.
fn filter(refuse: Refuse, errno: i32) {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
    // Offsets in `seccomp_data`: the number, and the low halves of arguments.
    let argument = |n: u32| 16 + 8 * n;
    let (number, at, value) = match refuse {
        Refuse::Ioctl(request) => (libc::SYS_ioctl, argument(1), request),
        Refuse::Map => (libc::SYS_mmap, argument(1), 2 * 4096),
        Refuse::Action => (libc::SYS_rt_sigaction, 0, libc::SYS_rt_sigaction as u32),
    };
    let load = |k| libc::sock_filter {
        code: (BPF_LD | BPF_W | BPF_ABS) as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let jump = |k, jt, jf| libc::sock_filter {
        code: (BPF_JMP | BPF_JEQ | BPF_K) as u16,
        jt,
        jf,
        k,
    };
    let ret = |k| libc::sock_filter {
        code: (BPF_RET | BPF_K) as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut program = [
        load(0),
        jump(number as u32, 0, 3),
        load(at),
        jump(value, 0, 1),
        ret(libc::SECCOMP_RET_ERRNO | errno as u32),
        ret(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: a program that lives through the call; it binds this thread alone.
    let ret = unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        libc::syscall(libc::SYS_seccomp, mode, 0, &raw const program)
    };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
}

/// Refused with each errno, `call` says so with all of `words`; not refused, it succeeds.
fn case<T, E: std::fmt::Display>(
    refuse: Refuse,
    words: &[&str],
    call: impl Fn() -> Result<T, E> + Sync,
) {
    for errno in ERRNOS {
        let text = refused(refuse, errno, || match call() {
            Ok(_) => panic!("{words:?} succeeds though refused"),
            Err(error) => error.to_string(),
        });
        let said = Errno::new(errno).to_string();
        for word in words.iter().chain([&said.as_str()]) {
            assert!(text.contains(word), "no {word:?} in {text:?}");
        }
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    if let Err(error) = call() {
        panic!("{words:?}: not refused, it fails: {error}");
    }
}

fn ioctl<T, E: std::fmt::Display>(
    request: u32,
    words: &[&str],
    call: impl Fn() -> Result<T, E> + Sync,
) {
    case(Refuse::Ioctl(request), words, call);
}

/// Some errnos say that there are none.
fn statistics<T>(call: impl Fn() -> Result<T, kvm_core::stats::StatsError> + Sync) {
    for errno in ERRNOS.into_iter().chain([libc::EMFILE]) {
        let error = refused(Refuse::Ioctl(0xaece), errno, || call().err().unwrap());
        let text = error.to_string();
        let said = text.contains(&Errno::new(errno).to_string());
        assert!(
            said || error == kvm_core::stats::StatsError::Unsupported,
            "{text}"
        );
    }
    assert!(call().is_ok());
}

#[test]
fn a_host_and_a_vm_that_refuse_a_call_say_which() {
    let kvm = common::kvm();
    ioctl(0xc008_ae05, &["CPUID"], || kvm.supported_cpuid());
    ioctl(0xae01, &["KVM creates no VM"], || kvm.create_vm());
    ioctl(0xae04, &["KVM creates no VM"], || kvm.create_vm());
    ioctl(0x8008_ae9d, &[], || kvm.machine_check_support());
    let setup = || kvm.create_vm().unwrap();
    let at = GuestAddress(0xfffb_d000);
    let one = setup();
    ioctl(0xae47, &["0xfffbd000", "TSS"], || one.set_tss_address(at));
    ioctl(0x4008_ae48, &["0xfffbd000", "identity map"], || {
        one.set_identity_map_address(at)
    });
    ioctl(0x4068_aea3, &["HLT"], || {
        one.disable_exits(DisabledExits::HLT)
    });
    ioctl(0x4068_aea3, &["halted vCPU for 9µs"], || {
        one.halt_poll(Duration::from_micros(9))
    });
    statistics(|| setup().finish().stats());
    ioctl(0xc00c_aee0, &["KVM creates no VFIO device"], || {
        setup().finish().create_vfio_device()
    });
    // Refused and so not there.
    let vm = setup().finish();
    assert!(!refused(Refuse::Ioctl(0xc00c_aee0), libc::ENODEV, || vm
        .has_device(DeviceKind::Vfio)));
    assert!(vm.has_device(DeviceKind::Vfio));
}

#[test]
fn a_device_that_refuses_an_attribute_says_which() {
    let vm = common::kvm().create_vm().unwrap().finish();
    let vfio = vm.create_vfio_device().unwrap();
    let attribute = DeviceAttribute {
        group: 1,
        attribute: 1,
    };
    for errno in ERRNOS {
        assert!(!refused(Refuse::Ioctl(0x4018_aee3), errno, || vfio
            .device()
            .has(attribute)));
        let null = || std::fs::File::open("/dev/null").unwrap().into();
        let error = refused(Refuse::Ioctl(0x4018_aee1), errno, || {
            vfio.add(null()).unwrap_err()
        });
        assert!(
            error.to_string().contains(&Errno::new(errno).to_string()),
            "{error}"
        );
        let mut value = 7_u32;
        // SAFETY: refused, nothing is written.
        let read = refused(Refuse::Ioctl(0x4018_aee2), errno, || unsafe {
            let error = vfio.device().get(attribute, &mut value).unwrap_err();
            (error.to_string(), value)
        });
        assert_eq!(read.1, 7);
        assert!(read.0.contains("attribute 0x1 of group 1"), "{}", read.0);
    }
    assert!(vfio.device().has(attribute));
}

#[test]
fn a_vcpu_that_refuses_a_call_says_which_and_takes_it_later() {
    let machine = Machine::with_irqchip(guests::vcpu::halt());
    let vcpu = machine.vcpu(5);
    let supported = common::kvm().supported_cpuid().unwrap();
    let reset = vcpu.sregs().unwrap();
    let state = BootState::real_mode(&reset, 0, common::LOAD);
    ioctl(0x4008_ae90, &["KVM_SET_CPUID2", "vCPU 5"], || {
        vcpu.set_cpuid(&supported)
    });
    ioctl(0x8138_ae83, &["KVM_GET_SREGS", "vCPU 5"], || vcpu.sregs());
    ioctl(0x4138_ae84, &["KVM_SET_SREGS", "vCPU 5"], || {
        vcpu.set_boot_state(&state)
    });
    ioctl(0x4090_ae82, &["KVM_SET_REGS", "vCPU 5"], || {
        vcpu.set_boot_state(&state)
    });
    ioctl(0x8090_ae81, &["KVM_GET_REGS", "vCPU 5"], || {
        vcpu.registers()
    });
    ioctl(0x8138_ae83, &["KVM_GET_SREGS", "vCPU 5"], || {
        vcpu.registers()
    });
    let msr = kvm_bindings::kvm_msr_entry {
        index: 0x2ff,
        data: 6,
        ..Default::default()
    };
    ioctl(0x4008_ae89, &["KVM_SET_MSRS", "vCPU 5"], || {
        vcpu.set_msrs(&[msr])
    });
    ioctl(0x8400_ae8e, &["KVM_GET_LAPIC", "vCPU 5"], || {
        vcpu.wire_local_pins()
    });
    ioctl(0x4400_ae8f, &["KVM_SET_LAPIC", "vCPU 5"], || {
        vcpu.wire_local_pins()
    });
    statistics(|| vcpu.stats());
    let cap = McgCap(0x0100_010a);
    ioctl(0x4008_ae9c, &["KVM_X86_SETUP_MCE", "vCPU 5"], || {
        vcpu.set_machine_check_cap(cap)
    });
    let error = MemoryError {
        address: Some(GuestAddress(0x1000)),
        kind: MemoryErrorKind::Poisoned,
        source: MemoryErrorSource::Signal(BusError {
            address: HostAddress(0x1000),
            code: BusErrorCode::ActionOptional,
            bytes: 4096,
            during: During::KvmRun,
        }),
    };
    // A deferred error of AMD's raises nothing, and so nobody is asked whether it would be heeded.
    let check = MachineCheck::of(&error, McaVendor::Amd).unwrap();
    ioctl(0x4040_ae9e, &[], || check.raise(vcpu.fd()));
    for request in [0xc008_ae88, 0x8138_ae83] {
        ioctl(request, &[], || vcpu.fd().mce_controls(9));
    }
    let controls = vcpu.fd().mce_controls(9).unwrap();
    // `MCG_SER_P`, which `kvm_amd` offers and does not give.
    let given = McgCap(controls.cap.0 | 1 << 24);
    assert_eq!((given, controls.bank_control), (cap, u64::MAX));
    assert_eq!(controls.heeds(), Err(Unheeded::Off));
    // There is no such bank.
    assert_eq!(vcpu.fd().mce_controls(10).unwrap().bank_control, 0);
    vcpu.fd().setup_mce(cap.0).unwrap();
}

const SET_GUEST_DEBUG: u32 = 0x4048_ae9b;
const GET_DEBUG_REGISTERS: u32 = 0x8080_aea1;
const SET_DEBUG_REGISTERS: u32 = 0x4080_aea2;

#[test]
fn a_vcpu_that_refuses_a_debuggers_call_says_which_and_takes_it_later() {
    let machine = Machine::with_irqchip(guests::vcpu::halt());
    let vcpu = machine.vcpu(5);
    let debug = GuestDebug {
        single_step: true,
        ..Default::default()
    };
    ioctl(SET_GUEST_DEBUG, &["KVM_SET_GUEST_DEBUG", "vCPU 5"], || {
        vcpu.set_guest_debug(&debug)
    });
    ioctl(0xc018_ae85, &["KVM_TRANSLATE", "vCPU 5"], || {
        vcpu.translate(0x1000)
    });
    ioctl(0xae9a, &["KVM_NMI", "vCPU 5"], || vcpu.nmi());
}

#[test]
fn an_exception_that_cannot_be_given_back_leaves_the_guests_dr6_as_it_was() {
    for (refuse, name) in [
        (SET_GUEST_DEBUG, "KVM_SET_GUEST_DEBUG"),
        (GET_DEBUG_REGISTERS, "KVM_GET_DEBUGREGS"),
        (SET_DEBUG_REGISTERS, "KVM_SET_DEBUGREGS"),
    ] {
        for errno in ERRNOS {
            let machine = Machine::new(guests::vcpu::halt());
            let vcpu = machine.vcpu(0);
            let before = vcpu.fd().get_debug_regs().unwrap().dr6;
            let halt = refused(Refuse::Ioctl(refuse), errno, || {
                let set = VcpuSet::new(kvm_core::Identity::vm("test"));
                let runner = set.enroll(vcpu).unwrap();
                let Err(halt) = runner.run(|vcpu: &VcpuView<'_, VcpuFd>, _: Exit<'_>| {
                    let stepped = Injection::Debug { dr6: 1 << 14 };
                    let error = vcpu.inject(&GuestDebug::default(), stepped).unwrap_err();
                    Flow::Stop(error.to_string())
                });
                halt
            });
            let HaltReason::Handler(text) = &halt.reason else {
                panic!("{}", halt.reason)
            };
            let said = text.contains(name) && text.contains(&Errno::new(errno).to_string());
            assert!(said, "{text}");
            assert_eq!(halt.vcpu.fd().get_debug_regs().unwrap().dr6, before);
        }
    }
}

#[test]
fn a_vcpu_that_cannot_be_made_is_refused_with_its_number() {
    let machine = Machine::new(guests::vcpu::halt());
    let id = std::sync::atomic::AtomicU32::new(0);
    let next = || VcpuId(id.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    ioctl(0xae41, &["KVM creates no vCPU"], || {
        machine.vm.create_vcpu(VcpuId(100))
    });
    // Behind its creation the number stays taken: each has its own.
    case(Refuse::Map, &["kvm_run of vCPU"], || {
        machine.vm.create_vcpu(next())
    });
    case(
        Refuse::Action,
        &["no handler can be set for signal 40"],
        || KickSignal::new(40),
    );
}

#[test]
fn a_file_that_does_not_answer_is_no_kvm() {
    for errno in ERRNOS {
        let error = refused(Refuse::Ioctl(0xae00), errno, || Kvm::open().unwrap_err());
        let says = match errno {
            libc::ENOTTY | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP => "is no KVM device",
            _ => "cannot ask /dev/kvm for its KVM API version",
        };
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn a_host_that_answers_no_capability_has_the_documented_defaults() {
    let kvm = common::kvm();
    let found = refused(Refuse::Ioctl(0xae03), libc::EINVAL, || {
        let host = kvm.capabilities();
        (
            host.recommended_vcpus(),
            host.max_memslots(),
            host.binary_stats(),
        )
    });
    assert_eq!(found, (4, 32, false));
}

fn run(vcpu: Vcpu, refuse: u32, errno: i32) -> HaltReason<()> {
    refused(Refuse::Ioctl(refuse), errno, || {
        let set = VcpuSet::new(kvm_core::Identity::vm("test"));
        let runner = set.enroll(vcpu).unwrap();
        let Err(halt) = runner.run(|_: &VcpuView<'_, _>, exit: Exit<'_>| match exit {
            Exit::Hlt => Flow::Stop(()),
            other => panic!("{other:?}"),
        });
        halt.reason
    })
}

#[test]
fn a_vcpu_whose_run_is_refused_halts_with_the_reason() {
    for errno in ERRNOS.into_iter().chain([libc::EAGAIN, libc::EHWPOISON]) {
        let machine = Machine::new(guests::vcpu::halt());
        let reason = run(machine.vcpu(0), 0xae80, errno);
        match errno {
            libc::EFAULT | libc::EHWPOISON => {
                let HaltReason::MemoryError(error) = reason else {
                    panic!("{reason}")
                };
                assert_eq!(error.source, MemoryErrorSource::Run(Errno::new(errno)));
            }
            libc::EAGAIN => assert_eq!(reason, HaltReason::Refused),
            _ => assert_eq!(reason, HaltReason::RunFailed(Errno::new(errno))),
        }
    }
}

/// The filter's threads share a vCPU, and so may a consumer's.
const _: () = {
    const fn is_of_any_thread<T: Send + Sync>() {}
    is_of_any_thread::<Vcpu>();
};
