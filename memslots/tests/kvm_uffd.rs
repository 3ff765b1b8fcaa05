// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest whose pages are brought by a thread of ours, from inside `KVM_RUN`: each mode, each answer, and what becomes of
//! a vCPU that sleeps.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memslots::uffd::{
    Cause, Event, Fault, FaultKind, Features, Messages, Modes, OpenError, RegisterError,
    Registration, Uffd, Wake,
};
use memslots::{Backing, Hva, Mapping, Memslots, PAGE_SIZE, Slot, SlotFlags};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// 16-bit code at 0x1000: adds 1 to the byte at `[ds:0]`, reads it back and sends it to port 0x10, for ever.
const CODE: &[u8] = &[
    0xfe, 0x06, 0x00, 0x00, // incb [0]
    0xa0, 0x00, 0x00, //       mov al, [0]
    0xe6, 0x10, //             out 0x10, al
    0xeb, 0xf5, //             jmp start
];
const CODE_AT: GuestAddress = GuestAddress(0x1000);
/// Where the guest's data segment begins.
const DATA_AT: GuestAddress = GuestAddress(0x2_0000);
const P: u64 = PAGE_SIZE;
const PAGES: u64 = 4;

/// A VM whose data is the memory `backing`.
struct Machine {
    vcpu: VcpuFd,
    memslots: Memslots,
    memory: Arc<Mapping>,
    _slots: [Slot; 2],
}

impl Machine {
    fn new(backing: Backing) -> Self {
        let kvm = Kvm::new()
            .expect("the kvm tier needs /dev/kvm: run where it opens, or leave this tier out");
        // The kernel starts a thread for a VM, and may be interrupted there.
        let vm: Arc<VmFd> = loop {
            match kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                vm => break Arc::new(vm.unwrap()),
            }
        };
        let memslots = Memslots::new(Arc::clone(&vm));
        let code = memslots
            .create(CODE_AT, Backing::anonymous(P), SlotFlags::NONE)
            .unwrap();
        memslots.snapshot().write_slice(CODE, CODE_AT).unwrap();
        let data = memslots.create(DATA_AT, backing, SlotFlags::NONE).unwrap();
        let memory = Arc::clone(
            memslots
                .snapshot()
                .by_id(data.extent().id())
                .unwrap()
                .mapping(),
        );
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        (sregs.ds.base, sregs.ds.selector) = (DATA_AT.0, (DATA_AT.0 >> 4) as u16);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (CODE_AT.0, 2);
        vcpu.set_regs(&regs).unwrap();
        Self {
            vcpu,
            memslots,
            memory,
            _slots: [code, data],
        }
    }

    /// Runs to the guest's next byte. The kernel may interrupt a run at any time, for reasons of its own.
    fn run(&mut self) -> u8 {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, &[byte])) => return byte,
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("what this guest does not cause: {other:?}"),
            }
        }
    }

    fn byte(&self) -> u8 {
        self.memslots.snapshot().read_obj(DATA_AT).unwrap()
    }

    fn write(&self, byte: u8) {
        self.memslots.snapshot().write_obj(byte, DATA_AT).unwrap();
    }
}

fn uffd(required: Features) -> Uffd {
    Uffd::open(required, Features::NONE)
        .expect("this test needs a userfaultfd: run it as root, or as the error says")
}

/// Whether this kernel's userfaultfd has what a test is about: Linux 6.1 lacks what came later. Says so where a test that
/// passes is heard too.
fn has(features: Features) -> bool {
    let available = uffd(Features::NONE).available();
    let all = available.contains(features);
    if !all {
        let why =
            format!("NOT TRIED: this kernel's userfaultfd has {available:?}, not {features:?}\n");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), why.as_bytes());
    }
    all
}

/// The next fault. Waits for it, and fails rather than hang.
fn fault(uffd: &Uffd) -> Fault {
    let mut messages = Messages::with_capacity(1);
    loop {
        let told = uffd.wait(Some(Duration::from_secs(20))).unwrap();
        assert!(told, "a fault was to be told, and none is");
        uffd.read(&mut messages).unwrap();
        match messages.next() {
            Some(Event::Fault(fault)) => return fault,
            // Told, and gone before it was read.
            None => {}
            Some(other) => panic!("a message that nothing here causes: {other:?}"),
        }
    }
}

fn page_of(byte: u8) -> Vec<u8> {
    vec![byte; P as usize]
}

fn this_thread() -> u32 {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::gettid() as u32 }
}

#[test]
fn a_missing_page_is_brought_while_the_guest_waits() {
    for backing in [Backing::anonymous(PAGES * P), Backing::memfd(PAGES * P)] {
        let mut machine = Machine::new(backing);
        let uffd = uffd(Features::THREAD_ID);
        let registration = uffd.register_all(&machine.memory, Modes::MISSING).unwrap();
        let pager = registration.lend_fill().unwrap();
        let (vcpu, start) = (this_thread(), machine.memory.host());
        let server = thread::spawn(move || {
            let _registration = registration; // should this thread fail, the guest wakes
            let fault = fault(&uffd);
            assert_eq!((fault.kind, fault.thread), (FaultKind::Missing, vcpu));
            assert_eq!(fault.address, start, "the page, not the byte");
            let offset = pager.page_of(fault.address).unwrap();
            pager.copy(offset, &page_of(41), Wake::Now).unwrap();
            let again = pager.copy(offset, &page_of(1), Wake::Now).unwrap_err();
            assert_eq!((again.cause, again.done), (Cause::AlreadyThere, 0));
            pager.zero(P..PAGES * P, Wake::Now).unwrap();
        });
        assert_eq!(machine.run(), 42);
        server.join().unwrap();
        assert_eq!(machine.run(), 43);
    }
}

#[test]
fn a_page_that_the_page_cache_has_is_continued() {
    let mut machine = Machine::new(Backing::memfd(PAGES * P));
    let uffd = uffd(Features::MINOR_SHMEM);
    let registration = uffd.register_all(&machine.memory, Modes::MINOR).unwrap();
    let pager = registration.lend_fill().unwrap();
    let file = machine.memory.file().unwrap().clone();
    file.file().write_all_at(&[20], 0).unwrap();
    let server = thread::spawn(move || {
        let _registration = registration; // should this thread fail, the guest wakes
        let fault = fault(&uffd);
        assert_eq!(fault.kind, FaultKind::Minor);
        // Changed while the guest waits, by another way to the same page.
        file.file().write_all_at(&[30], 0).unwrap();
        pager.continue_minor(0..P, Wake::Now).unwrap();
        let absent = pager.continue_minor(P..2 * P, Wake::Now).unwrap_err();
        assert_eq!(absent.cause, Cause::NoSource);
    });
    assert_eq!(machine.run(), 31);
    server.join().unwrap();
}

#[test]
fn a_write_to_a_protected_page_waits_and_the_old_contents_are_there_to_be_saved() {
    for backing in [Backing::anonymous(PAGES * P), Backing::memfd(PAGES * P)] {
        let mut machine = Machine::new(backing);
        machine.write(6);
        let uffd = uffd(Features::NONE);
        let registration = uffd
            .register_all(&machine.memory, Modes::WRITE_PROTECT)
            .unwrap();
        let snapshot = registration.lend_protect().unwrap();
        assert!(snapshot.is_synchronous());
        snapshot.protect(0..PAGES * P).unwrap();
        let server = thread::spawn({
            let uffd = uffd.clone();
            move || {
                let fault = fault(&uffd);
                assert_eq!((fault.kind, fault.write), (FaultKind::WriteProtect, true));
                let saved = read(snapshot.mapping(), 0);
                snapshot.unprotect(0..P, Wake::Now).unwrap();
                (saved, snapshot)
            }
        });
        assert_eq!(machine.run(), 7);
        let (saved, snapshot) = server.join().unwrap();
        assert_eq!(saved, 6);
        assert_eq!(machine.run(), 8, "it waits once only");
        snapshot.protect(0..P).unwrap();
        drop(snapshot);
        assert_eq!(machine.run(), 9, "and no more when the role is gone");
        assert_eq!(uffd.wait(Some(Duration::ZERO)), Ok(false));
    }
}

/// A byte of memory whose page is there.
fn read(mapping: &Mapping, offset: usize) -> u8 {
    assert!((offset as u64) < mapping.size());
    // SAFETY: within the mapping.
    unsafe { ((mapping.host().0 + offset) as *const u8).read_volatile() }
}

/// Bit 57 of the page's entry in `/proc/self/pagemap`: write-protected by a userfaultfd.
fn is_protected(address: Hva) -> bool {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    pagemap
        .read_exact_at(&mut entry, (address.0 as u64 / P) * 8)
        .unwrap();
    u64::from_ne_bytes(entry) >> 57 & 1 == 1
}

#[test]
fn asynchronous_protection_notes_a_write_and_nobody_waits() {
    if !has(Features::WP_ASYNC | Features::WP_UNPOPULATED) {
        return;
    }
    let file = std::fs::File::from(tempfile());
    file.set_len(PAGES * P).unwrap();
    for backing in [
        Backing::anonymous(PAGES * P),
        Backing::memfd(PAGES * P),
        Backing::file_private(file, 0, PAGES * P),
    ] {
        let mut machine = Machine::new(backing);
        machine.write(6);
        let uffd = uffd(Features::WP_ASYNC | Features::WP_UNPOPULATED);
        let wrong = uffd
            .register_all(&machine.memory, Modes::WRITE_PROTECT)
            .unwrap_err();
        let synchrony = matches!(wrong, RegisterError::Synchrony { .. });
        assert!(
            synchrony || matches!(wrong, RegisterError::Unsupported(_)),
            "{wrong}"
        );
        let registration = uffd
            .register_all(&machine.memory, Modes::ASYNC_WRITE_PROTECT)
            .unwrap();
        let log = registration.lend_protect().unwrap();
        log.protect(0..PAGES * P).unwrap();
        assert!(!log.is_synchronous() && is_protected(machine.memory.host()));
        assert_eq!(machine.run(), 7);
        assert!(!is_protected(machine.memory.host()));
        assert!(is_protected(Hva(machine.memory.host().0 + P as usize)));
        log.protect(0..P).unwrap();
        assert!(is_protected(machine.memory.host()));
        assert_eq!(uffd.wait(Some(Duration::ZERO)), Ok(false));
    }
}

fn tempfile() -> OwnedFd {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!(
        "kvm_uffd-{}-{}",
        std::process::id(),
        this_thread()
    ));
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    file.into()
}

#[test]
fn a_poisoned_page_is_an_error_for_the_guest_and_never_a_hang() {
    if !has(Features::POISON) {
        return;
    }
    let mut machine = Machine::new(Backing::anonymous(PAGES * P));
    let uffd = uffd(Features::POISON);
    let registration = uffd.register_all(&machine.memory, Modes::MISSING).unwrap();
    let pager = registration.lend_fill().unwrap();
    let server = thread::spawn(move || {
        // Should this thread fail, the guest wakes.
        let registration = registration;
        let fault = fault(&uffd);
        pager
            .poison(pager.page_of(fault.address).unwrap()..P, Wake::Now)
            .unwrap();
        (registration, pager)
    });
    // The page's machine check comes to this thread as a SIGBUS where KVM tells of it so (kvm_amd of 6.12).
    static BUS_ERROR_AT: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn on_bus_error(
        _: libc::c_int,
        info: *mut libc::siginfo_t,
        _: *mut std::ffi::c_void,
    ) {
        // SAFETY: the kernel's own description of a SIGBUS, which has an address.
        BUS_ERROR_AT.store(unsafe { (*info).si_addr() } as usize, Ordering::SeqCst);
    }
    // SAFETY: a handler that stores a number; no other test of this program has a use for the signal.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
    // As HOSTS has it: an MMIO exit at an address of RAM on the software KVM, an error of KVM_RUN on kvm_amd.
    loop {
        match machine.vcpu.run() {
            Ok(VcpuExit::MmioRead(address, _)) => break assert_eq!(address, DATA_AT.0),
            Err(error) if error.errno() == libc::EINTR => {
                let at = BUS_ERROR_AT.load(Ordering::SeqCst);
                if at != 0 {
                    break assert_eq!(at & !(P as usize - 1), machine.memory.host().0);
                }
            }
            Err(error) => {
                break assert!(
                    [libc::EFAULT, libc::EHWPOISON].contains(&error.errno()),
                    "{error}"
                );
            }
            other => panic!("{other:?}"),
        }
    }
    drop(server.join().unwrap());
}

#[test]
fn a_page_is_moved_in_without_a_copy() {
    if !has(Features::MOVE) {
        return;
    }
    let mut machine = Machine::new(Backing::anonymous(PAGES * P));
    let uffd = uffd(Features::MOVE);
    let registration = uffd.register_all(&machine.memory, Modes::MISSING).unwrap();
    let pager = registration.lend_fill().unwrap();
    let server = thread::spawn(move || {
        let _registration = registration; // should this thread fail, the guest wakes
        // A page that a child shares cannot be moved, and another test of this process forks.
        let staging = Backing::anonymous(2 * P).without_fork();
        let staging = Mapping::new(&staging, GuestAddress(0)).unwrap();
        // SAFETY: within the mapping.
        unsafe { (staging.host().0 as *mut u8).write_volatile(50) };
        let _fault = fault(&uffd);
        pager
            .move_from(0, &staging, 0, P, false, Wake::Now)
            .unwrap();
        assert_eq!(read(&staging, 0), 0, "it is not here any more");
        let hole = pager
            .move_from(P, &staging, P, P, false, Wake::Now)
            .unwrap_err();
        assert_eq!(hole.cause, Cause::NotRegistered);
    });
    assert_eq!(machine.run(), 51);
    server.join().unwrap();
}

#[test]
fn a_restore_and_a_snapshot_share_one_userfaultfd() {
    let mut machine = Machine::new(Backing::anonymous(PAGES * P));
    let uffd = uffd(Features::NONE);
    let registration = uffd.register_all(&machine.memory, Modes::MISSING).unwrap();
    let pager = registration.lend_fill().unwrap();
    // The snapshot begins while nothing has arrived yet.
    registration.add(Modes::WRITE_PROTECT).unwrap();
    let snapshot = registration.lend_protect().unwrap();
    snapshot.protect(0..PAGES * P).unwrap();
    let server = thread::spawn(move || {
        let _registration = registration; // should this thread fail, the guest wakes
        let first = fault(&uffd);
        assert_eq!(first.kind, FaultKind::Missing);
        pager.copy(0, &page_of(60), Wake::Now).unwrap();
        let second = fault(&uffd);
        assert_eq!(second.kind, FaultKind::WriteProtect, "it came protected");
        let saved = read(snapshot.mapping(), 0);
        snapshot.unprotect(0..P, Wake::Now).unwrap();
        // The snapshot ends, the restore goes on.
        drop(snapshot);
        pager.zero(P..2 * P, Wake::Now).unwrap();
        saved
    });
    assert_eq!(machine.run(), 61);
    assert_eq!(server.join().unwrap(), 60);
    assert_eq!(machine.byte(), 61);
}

#[test]
fn a_sleeping_vcpu_wakes_when_the_registration_goes() {
    let mut machine = Machine::new(Backing::anonymous(PAGES * P));
    let uffd = uffd(Features::NONE);
    let registration = uffd.register_all(&machine.memory, Modes::MISSING).unwrap();
    let server = thread::spawn(move || {
        fault(&uffd);
        // It sleeps now, and nobody will bring its page.
        registration.unregister().unwrap();
    });
    assert_eq!(machine.run(), 1, "the page reads as zeros then");
    server.join().unwrap();
}

#[test]
fn a_sleeping_vcpu_that_is_kicked_tells_its_fault_again_and_is_served() {
    // A KVM as old as that (6.1) sleeps on, whoever kicks.
    if !has(Features::POISON) {
        return;
    }
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a handler that does nothing; the signal is this test's own.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut());
    }
    let mut machine = Machine::new(Backing::anonymous(PAGES * P));
    let uffd = uffd(Features::NONE);
    let registration = uffd.register_all(&machine.memory, Modes::MISSING).unwrap();
    let pager = registration.lend_fill().unwrap();
    let vcpu = thread::spawn(move || {
        loop {
            match machine.vcpu.run() {
                Ok(VcpuExit::IoOut(0x10, &[byte])) => return byte,
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("{other:?}"),
            }
        }
    });
    let first = fault(&uffd);
    // SAFETY: the thread is not joined yet.
    let killed = unsafe { libc::pthread_kill(vcpu.as_pthread_t(), libc::SIGUSR2) };
    assert_eq!(killed, 0);
    // Told again either way: at the next entry where a kick ends the sleep (hardware KVM), by a vCPU that goes to sleep
    // again and again until its signal can be taken where it does not (the software KVM).
    assert_eq!(fault(&uffd), first);
    pager.copy(0, &page_of(9), Wake::Now).unwrap();
    let byte = vcpu.join().unwrap();
    assert_eq!(byte, 10);
}

/// Memory of this test's own.
struct Raw(usize, usize);

impl Raw {
    fn new(size: u64) -> Self {
        // SAFETY: a new mapping disturbs no other.
        let base = unsafe { Self::map(std::ptr::null_mut(), size, 0) };
        Self(base, size as usize)
    }

    /// # Safety
    /// As `mmap`.
    unsafe fn map(at: *mut libc::c_void, size: u64, more_flags: libc::c_int) -> usize {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | more_flags;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the caller's promise.
        let base = unsafe { libc::mmap(at, size as usize, protection, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        base as usize
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // SAFETY: this test's own mapping.
        unsafe { libc::munmap(self.0 as *mut _, self.1) };
    }
}

#[test]
fn changes_of_the_process_memory_are_told_and_wait_until_they_are_read() {
    let uffd = uffd(Features::EVENT_REMOVE | Features::EVENT_UNMAP | Features::EVENT_REMAP);
    let raw = Arc::new(Raw::new(8 * P));
    let start = raw.0;
    // SAFETY: nobody accesses it but this test, by system calls.
    let backing = unsafe { Backing::external(Hva(start), 8 * P, raw) };
    let memory = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
    let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    let pager = registration.lend_fill().unwrap();
    pager.copy(0, &page_of(1), Wake::Now).unwrap();
    let page = move |index: u64| start + (index * P) as usize;
    let mut messages = Messages::with_capacity(4);
    let mut told = |meanwhile: &dyn Fn()| {
        assert!(uffd.wait(Some(Duration::from_secs(20))).unwrap());
        meanwhile();
        assert_eq!(uffd.read(&mut messages), Ok(1));
        messages.next().unwrap()
    };

    let change = thread::spawn(move || {
        // SAFETY: this test's own memory.
        unsafe { libc::madvise(page(0) as *mut _, 2 * P as usize, libc::MADV_DONTNEED) }
    });
    let event = told(&|| {
        // The change waits, and so nothing can be placed.
        let error = pager.copy(4 * P, &page_of(2), Wake::Now).unwrap_err();
        assert_eq!((error.cause, error.done), (Cause::Changing, 0));
    });
    assert!(matches!(event, Event::Remove(range) if range == (page(0)..page(2))));
    assert_eq!(change.join().unwrap(), 0);
    pager.copy(0, &page_of(3), Wake::Now).unwrap();

    let change = thread::spawn(move || {
        // SAFETY: as above; there is another page in its place afterwards.
        unsafe { Raw::map(page(7) as *mut _, P, libc::MAP_FIXED) }
    });
    let event = told(&|| {});
    assert!(matches!(event, Event::Unmap(range) if range == (page(7)..page(8))));
    assert_eq!(change.join().unwrap(), page(7));

    let change = thread::spawn(move || {
        // SAFETY: as above; it moves over a page of this test's own, and leaves an empty one.
        unsafe {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
            let place = Raw::new(P);
            let to = place.0;
            let moved = libc::mremap(page(5) as *mut _, P as usize, P as usize, flags, to) as usize;
            assert_eq!(moved, to);
            place
        }
    });
    let Event::Remap { from, size, .. } = told(&|| {}) else {
        panic!("a move was to be told")
    };
    assert_eq!((from, size), (Hva(page(5)), P));
    // What moved is still told of, so even its end waits for a reader.
    let end = thread::spawn(move || drop(change.join().unwrap()));
    while !end.is_finished() {
        if uffd.wait(Some(Duration::from_millis(10))).unwrap() {
            uffd.read(&mut messages).unwrap();
            messages.by_ref().for_each(drop);
        }
    }
    end.join().unwrap();
}

#[test]
fn a_fork_is_told_with_the_childs_descriptor() {
    let uffd = uffd(Features::EVENT_FORK);
    let memory = Arc::new(Mapping::new(&Backing::anonymous(P), GuestAddress(0)).unwrap());
    let _registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
    let mut messages = Messages::with_capacity(2);
    let forker = thread::spawn(|| {
        // The bare call: the C library's `fork` holds the allocator's locks until this message is read, and the other
        // tests of this process are not to wait for that.
        // SAFETY: the child, which has this thread alone, does nothing but end.
        match unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) } {
            // SAFETY: as above.
            0 => unsafe { libc::_exit(0) },
            child => child as libc::pid_t,
        }
    });
    assert!(uffd.wait(Some(Duration::from_secs(20))).unwrap());
    uffd.read(&mut messages).unwrap();
    let Some(Event::Fork(Some(child))) = messages.next() else {
        panic!("a fork was to be told")
    };
    let link = std::fs::read_link(format!("/proc/self/fd/{}", child.as_raw_fd())).unwrap();
    assert_eq!(link.to_str(), Some("anon_inode:[userfaultfd]"));
    let child = forker.join().unwrap();
    // SAFETY: a child of this process, waited for by nobody else.
    let waited = unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    assert_eq!(waited, child);
}

#[test]
fn memory_has_one_userfaultfd_and_the_second_is_told_to_borrow() {
    let memory = Arc::new(Mapping::new(&Backing::anonymous(PAGES * P), GuestAddress(0)).unwrap());
    let (first, second) = (uffd(Features::NONE), uffd(Features::NONE));
    let registration: Registration = first.register_all(&memory, Modes::MISSING).unwrap();
    let error = second
        .register_all(&memory, Modes::WRITE_PROTECT)
        .unwrap_err();
    assert!(matches!(error, RegisterError::Busy { .. }), "{error}");
    drop(registration);
    drop(second.register_all(&memory, Modes::WRITE_PROTECT).unwrap());
}

#[test]
fn a_descriptor_for_user_mode_alone_is_refused_and_a_whole_one_adopted() {
    let open = |flags: libc::c_int| {
        // SAFETY: the call takes flags alone and makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: just made, and owned by nobody else.
        unsafe { OwnedFd::from_raw_fd(fd as i32) }
    };
    /// `UFFD_USER_MODE_ONLY`.
    const USER_MODE_ONLY: libc::c_int = 1;
    let error = Uffd::adopt(open(USER_MODE_ONLY), Features::NONE).unwrap_err();
    assert!(matches!(error, OpenError::UserModeOnly), "{error}");

    /// Beyond every kernel's.
    const UNKNOWN: Features = Features::from_bits(1 << 63);
    let error = Uffd::adopt(open(0), UNKNOWN).unwrap_err();
    assert!(
        matches!(
            error,
            OpenError::Missing {
                missing: UNKNOWN,
                ..
            }
        ),
        "{error}"
    );

    let mut machine = Machine::new(Backing::anonymous(PAGES * P));
    let uffd = Uffd::adopt(open(0), Features::THREAD_ID).unwrap();
    let registration = uffd.register_all(&machine.memory, Modes::MISSING).unwrap();
    let pager = registration.lend_fill().unwrap();
    let server = thread::spawn(move || {
        let _registration = registration; // should this thread fail, the guest wakes
        fault(&uffd);
        pager.copy(0, &page_of(70), Wake::Now).unwrap();
    });
    assert_eq!(machine.run(), 71);
    server.join().unwrap();
}
