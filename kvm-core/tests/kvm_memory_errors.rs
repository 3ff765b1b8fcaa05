// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose memory is lost while they run, on a real KVM: each of its ways to say so comes to the
//! same place, and none is an access.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use common::{Machine, watchdog};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_core::arch::x86_64::{MachineCheck, McaVendor};
use kvm_core::{
    BusErrorCode, BusErrors, ControlError, During, Exit, ExitHandler, Flow, HaltReason,
    HostAddress, MemoryError, MemoryErrorKind, MemoryErrorSource, Remedy, VcpuId, VcpuSet,
    VcpuView,
};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestAddress;

const PAGE: usize = 4096;
/// Where the memory is that gets lost: two pages.
const LOST: u64 = 0x2_0000;
const LEN: usize = 2 * PAGE;

/// Two pages of a file, as guest memory at [`LOST`].
struct Lost {
    file: OwnedFd,
    start: *mut u8,
}

// SAFETY: a mapping is no thread's own.
unsafe impl Send for Lost {}

impl Lost {
    fn new(machine: &Machine) -> Self {
        // SAFETY: a new file and a new mapping of it.
        let (file, start) = unsafe {
            let file = libc::memfd_create(c"lost".as_ptr(), libc::MFD_CLOEXEC);
            assert!(file >= 0 && libc::ftruncate(file, LEN as libc::off_t) == 0);
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
            let start = libc::mmap(std::ptr::null_mut(), LEN, protection, flags, file, 0);
            assert_ne!(start, libc::MAP_FAILED);
            (OwnedFd::from_raw_fd(file), start.cast::<u8>())
        };
        let region = kvm_userspace_memory_region {
            slot: 1,
            flags: 0,
            guest_phys_addr: LOST,
            memory_size: LEN as u64,
            userspace_addr: start as u64,
        };
        // SAFETY: the mapping is as long as the slot, and is never unmapped.
        unsafe { machine.vm.fd().set_user_memory_region(region) }.unwrap();
        Self { file, start }
    }

    fn truncate(&self) {
        self.resize(0);
    }

    fn grow(&self) {
        self.resize(LEN);
    }

    /// Takes the right to touch both pages away, or gives it back.
    fn allow(&self, yes: bool) {
        let protection = match yes {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_NONE,
        };
        // SAFETY: this mapping's own range, which nothing here refers to.
        let ret = unsafe { libc::mprotect(self.start.cast(), LEN, protection) };
        assert_eq!(ret, 0);
    }

    fn resize(&self, len: usize) {
        // SAFETY: only changes the file's length.
        let ret = unsafe { libc::ftruncate(self.file.as_raw_fd(), len as libc::off_t) };
        assert_eq!(ret, 0);
    }

    /// Poisons the first page with a userfaultfd, which is returned: closed, the poison stays. None on a kernel
    /// that poisons no page so (before 6.6), and that is said.
    fn poison(&self) -> Option<OwnedFd> {
        #[repr(C)]
        #[derive(Default)]
        struct Words([u64; 4]);
        const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
        const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
        const UFFDIO_POISON: libc::c_ulong = 0xc020_aa08;
        const FEATURE_POISON: u64 = 1 << 14;
        let range = [self.start as u64, PAGE as u64];
        // SAFETY: each structure is as long as its ioctl wants; the range is this mapping's.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
            assert!(fd >= 0, "userfaultfd: {}", std::io::Error::last_os_error());
            let fd = OwnedFd::from_raw_fd(fd);
            let try_it = |request, mut words: Words| match libc::ioctl(
                fd.as_raw_fd(),
                request,
                &raw mut words,
            ) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            };
            let ask = |request, words| {
                let asked = try_it(request, words);
                assert!(asked.is_ok(), "{request:#x}: {asked:?}");
            };
            let api = try_it(UFFDIO_API, Words([0xaa, FEATURE_POISON, 0, 0]));
            if let Err(error) = api {
                assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
                println!("NOT TRIED: this kernel has no UFFDIO_POISON");
                return None;
            }
            ask(UFFDIO_REGISTER, Words([range[0], range[1], 1, 0]));
            ask(UFFDIO_POISON, Words([range[0], range[1], 0, 0]));
            Some(fd)
        }
    }
}

type AtOut<'a> = dyn FnMut(u16, &Lost) + 'a;
type OnError<'a> =
    dyn FnMut(&VcpuView<'_, VcpuFd>, &MemoryError, &Lost) -> Remedy<&'static str> + 'a;

/// Knows where guest memory is, and takes what comes.
struct Handler<'a> {
    lost: &'a Lost,
    outs: Vec<(u16, Vec<u8>)>,
    errors: Vec<MemoryError>,
    at_out: Box<AtOut<'a>>,
    remedy: Box<OnError<'a>>,
}

impl<'a> Handler<'a> {
    fn new(lost: &'a Lost) -> Self {
        Self {
            lost,
            outs: Vec::new(),
            errors: Vec::new(),
            at_out: Box::new(|_, _| {}),
            remedy: Box::new(|_, _, _| Remedy::Halt),
        }
    }
}

impl ExitHandler<VcpuFd> for Handler<'_> {
    type Stop = &'static str;

    fn exit(&mut self, _: &VcpuView<'_, VcpuFd>, exit: Exit<'_>) -> Flow<&'static str> {
        match exit {
            Exit::PioOut { port, data, .. } => {
                self.outs.push((port, data.to_vec()));
                (self.at_out)(port, self.lost);
                Flow::Continue
            }
            Exit::Hlt => Flow::Stop("halted"),
            other => panic!("{other:?}"),
        }
    }

    fn is_memory(&mut self, address: GuestAddress, _: bool) -> bool {
        address.0 < 0x1_0000 || (LOST..LOST + LEN as u64).contains(&address.0)
    }

    fn guest_address(&mut self, address: HostAddress) -> Option<GuestAddress> {
        let offset = address.0.checked_sub(self.lost.start as usize)?;
        (offset < LEN).then_some(GuestAddress(LOST + offset as u64))
    }

    fn memory_error(
        &mut self,
        vcpu: &VcpuView<'_, VcpuFd>,
        error: &MemoryError,
    ) -> Remedy<&'static str> {
        self.errors.push(*error);
        (self.remedy)(vcpu, error, self.lost)
    }
}

/// Whether it is about the page at `address`, as far as this KVM says.
fn is_at(error: &MemoryError, address: u64) -> bool {
    match error.source {
        MemoryErrorSource::Run(_) => error.address.is_none(),
        _ => error
            .address
            .is_some_and(|found| found.0 & !0xfff == address),
    }
}

#[test]
fn a_file_truncated_behind_the_guest_is_a_memory_error_at_its_next_access() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::lost_memory());
        let lost = Lost::new(&machine);
        let mut handler = Handler::new(&lost);
        handler.at_out = Box::new(|_, lost| lost.truncate());
        let set = VcpuSet::new(machine.vm.identity().clone());
        let Err(halt) = set.enroll(machine.vcpu(0)).unwrap().run(handler);
        let [error] = halt.handler.errors[..] else {
            panic!("{:?}", halt.handler.errors)
        };
        println!("this KVM says: {error}");
        assert!(is_at(&error, LOST), "{error}");
        assert_eq!(halt.reason, HaltReason::MemoryError(error));
        assert_eq!(halt.handler.outs.len(), 1, "{:?}", halt.handler.outs);
    });
}

#[test]
fn memory_that_the_consumer_brings_back_is_run_on_with() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::lost_memory());
        let lost = Lost::new(&machine);
        let mut handler = Handler::new(&lost);
        handler.at_out = Box::new(|port, lost| {
            if port == 0x80 {
                lost.truncate();
            }
        });
        handler.remedy = Box::new(|_, _, lost| {
            lost.grow();
            Remedy::RunOn
        });
        let set = VcpuSet::new(machine.vm.identity().clone());
        let Err(halt) = set.enroll(machine.vcpu(0)).unwrap().run(handler);
        assert_eq!(halt.reason, HaltReason::Handler("halted"));
        let ports: Vec<_> = halt.handler.outs.iter().map(|(port, _)| *port).collect();
        assert_eq!(
            (ports, halt.handler.errors.len()),
            (vec![0x80, 0x81, 0x82], 1)
        );
        // SAFETY: mapped, and the guest is over.
        assert_eq!(unsafe { lost.start.add(PAGE).read_volatile() }, 0x5a);
    });
}

/// A real `KVM_EXIT_MEMORY_FAULT` has to say where, of how much, and that shared memory was wanted. None of the KVMs that
/// this was written on gives one for it (`MemoryError`'s documentation says which does); one that does is held to it.
#[test]
fn memory_that_this_process_may_not_touch_is_an_error_with_what_kvm_says_of_it() {
    watchdog(|| {
        let machine = Machine::new(guests::vcpu::lost_memory());
        let lost = Lost::new(&machine);
        let mut handler = Handler::new(&lost);
        handler.at_out = Box::new(|port, lost| {
            if port == 0x80 {
                lost.allow(false);
            }
        });
        handler.remedy = Box::new(|_, _, lost| {
            lost.allow(true);
            Remedy::RunOn
        });
        let set = VcpuSet::new(machine.vm.identity().clone());
        let Err(halt) = set.enroll(machine.vcpu(0)).unwrap().run(handler);
        assert_eq!(halt.reason, HaltReason::Handler("halted"));
        let [error] = halt.handler.errors[..] else {
            panic!("{:?}", halt.handler.errors)
        };
        println!("this KVM says: {error}");
        assert!(is_at(&error, LOST), "{error}");
        assert_eq!(error.kind, MemoryErrorKind::Unserved);
        match error.source {
            MemoryErrorSource::Fault { size, errno, .. } => {
                assert_eq!(error.address, Some(GuestAddress(LOST)), "{error}");
                assert!(size.is_power_of_two() && size >= PAGE as u64, "{error}");
                assert_eq!(error.wants_private(), Some(false), "{error}");
                assert_eq!(errno.map(|errno| errno.errno()), Some(libc::EFAULT));
            }
            MemoryErrorSource::Run(errno) => assert_eq!(errno.errno(), libc::EFAULT),
            MemoryErrorSource::Mmio { .. } => {}
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_poisoned_page_is_a_memory_error_and_no_access() {
    watchdog(|| {
        BusErrors::install().unwrap();
        let machine = Machine::new(guests::vcpu::lost_memory());
        let lost = Lost::new(&machine);
        let Some(_uffd) = lost.poison() else { return };
        let set = VcpuSet::new(machine.vm.identity().clone());
        let Err(halt) = set
            .enroll(machine.vcpu(0))
            .unwrap()
            .run(Handler::new(&lost));
        let [error] = halt.handler.errors[..] else {
            panic!("{:?}", halt.handler.errors)
        };
        println!("this KVM says: {error}");
        assert!(is_at(&error, LOST), "{error}");
        assert_eq!(halt.reason, HaltReason::MemoryError(error));
    });
}

#[test]
fn a_handler_that_touches_a_truncated_file_lives_and_its_vcpu_stops() {
    watchdog(|| {
        let errors = BusErrors::install().unwrap();
        let machine = Machine::new(guests::vcpu::lost_memory());
        let lost = Lost::new(&machine);
        // SAFETY: guest memory, which is touched through raw pointers alone.
        let _watched = unsafe { errors.watch(HostAddress(lost.start as usize), LEN) }.unwrap();
        let mut handler = Handler::new(&lost);
        handler.at_out = Box::new(|_, lost| {
            lost.truncate();
            // SAFETY: mapped; both pages are lost.
            let read = unsafe {
                lost.start.add(PAGE + 9).write_volatile(7);
                (
                    lost.start.add(7).read_volatile(),
                    lost.start.add(PAGE + 9).read_volatile(),
                )
            };
            assert_eq!(read, (0, 7));
        });
        let set = VcpuSet::new(machine.vm.identity().clone());
        let Err(halt) = set.enroll(machine.vcpu(0)).unwrap().run(handler);
        let [error] = halt.handler.errors[..] else {
            panic!("{:?}", halt.handler.errors)
        };
        assert_eq!(halt.reason, HaltReason::MemoryError(error));
        assert_eq!(error.kind, MemoryErrorKind::Missing);
        assert_eq!(error.address, Some(GuestAddress(LOST + 0x1009)));
        let MemoryErrorSource::Signal(signal) = error.source else {
            panic!("{error}")
        };
        assert_eq!(
            (signal.code, signal.during),
            (BusErrorCode::NoSuchAddress, During::Handler)
        );
    });
}

#[test]
fn a_paused_vcpu_that_is_asked_for_lost_memory_has_no_answer_and_then_stops() {
    watchdog(|| {
        let errors = BusErrors::install().unwrap();
        let machine = Machine::new(guests::vcpu::lost_memory());
        let lost = Lost::new(&machine);
        // SAFETY: guest memory, which is touched through raw pointers alone.
        let _watched = unsafe { errors.watch(HostAddress(lost.start as usize), LEN) }.unwrap();
        let set = VcpuSet::new(machine.vm.identity().clone());
        let pause = set.pause().unwrap();
        let ignore = |_: &VcpuView<'_, VcpuFd>, _: Exit<'_>| Flow::<()>::Continue;
        let thread = set.spawn("vcpu", machine.vcpu(0), ignore).unwrap();
        let ask = |page: usize| {
            let at = lost.start as usize + page * PAGE;
            // SAFETY: mapped, and watched where it is lost.
            let read = move |_: &VcpuView<'_, VcpuFd>| unsafe { (at as *const u8).read_volatile() };
            pause.with_vcpu(VcpuId(0), read)
        };
        while ask(0) == Err(ControlError::NotStarted(VcpuId(0))) {
            std::thread::yield_now();
        }
        assert_eq!(ask(0), Ok(0));
        lost.truncate();
        let nothing = Err(ControlError::MemoryError(VcpuId(0)));
        assert_eq!((ask(0), ask(1)), (nothing, nothing));
        drop(pause);
        let HaltReason::MemoryError(error) = thread.join().unwrap().reason else {
            panic!("it ran on")
        };
        assert_eq!(error.kind, MemoryErrorKind::Missing);
    });
}

#[test]
fn a_guest_that_is_told_of_its_lost_page_takes_the_machine_check() {
    watchdog(|| {
        let support = common::kvm().machine_check_support().unwrap();
        println!("IA32_MCG_CAP of this host: {:#x}", support.0);
        let machine = Machine::new(guests::vcpu::machine_check());
        let lost = Lost::new(&machine);
        let vcpu = machine.vcpu(0);
        vcpu.set_machine_check_cap(support.for_guest().unwrap())
            .unwrap();
        let mut handler = Handler::new(&lost);
        handler.at_out = Box::new(|port, lost| {
            if port == 0x80 {
                lost.truncate();
            }
        });
        handler.remedy = Box::new(|vcpu, error, _| {
            // Older KVMs say EFAULT and no address: this guest has one page to lose.
            let error = MemoryError {
                address: error.address.or(Some(GuestAddress(LOST))),
                ..*error
            };
            let check = MachineCheck::of(&error, McaVendor::Intel).unwrap();
            check.raise(vcpu.fd()).unwrap();
            Remedy::RunOn
        });
        let set = VcpuSet::new(machine.vm.identity().clone());
        let Err(halt) = set.enroll(vcpu).unwrap().run(handler);
        assert_eq!(halt.reason, HaltReason::Handler("halted"));
        let [error] = halt.handler.errors[..] else {
            panic!("{:?}", halt.handler.errors)
        };
        let said = |port| {
            let found = halt.handler.outs.iter().find(|(found, _)| *found == port);
            let (_, bytes) = found.unwrap_or_else(|| panic!("{port:#x}: {:?}", halt.handler.outs));
            u64::from(u32::from_le_bytes(bytes.as_slice().try_into().unwrap()))
        };
        let error = MemoryError {
            address: error.address.or(Some(GuestAddress(LOST))),
            ..error
        };
        let check = *MachineCheck::of(&error, McaVendor::Intel).unwrap().as_kvm();
        assert_eq!(said(0x84), check.mcg_status);
        assert_eq!(said(0x88) | said(0x8c) << 32, check.status);
        assert_eq!((said(0x90), said(0x94)), (LOST, check.misc));
    });
}

#[test]
fn a_machine_check_without_its_bank_is_refused_with_the_vcpus_number() {
    let machine = Machine::new(guests::vcpu::lost_memory());
    let error = machine
        .vcpu(3)
        .set_machine_check_cap(kvm_core::arch::x86_64::McgCap(0xff));
    let text = error.unwrap_err().to_string();
    assert!(
        text.starts_with("KVM_X86_SETUP_MCE of vCPU 3 failed: "),
        "{text}"
    );
}
