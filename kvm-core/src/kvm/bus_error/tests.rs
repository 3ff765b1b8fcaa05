// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What hardware KVM does when a guest runs into a lost page: `SIGBUS` to the vCPU's thread in the midst
//! of `KVM_RUN`. A thread may send itself a signal with the kernel's own code, so it does that here.

use super::*;

/// `siginfo_t`, as far as a memory error's goes.
#[repr(C, align(8))]
struct Info {
    signo: i32,
    errno: i32,
    code: i32,
    pad: i32,
    address: usize,
    lsb: i16,
    rest: [u8; 102],
}
const _: () = assert!(size_of::<Info>() == size_of::<libc::siginfo_t>());

/// A hardware memory error at an address, as the kernel tells this thread.
fn strike(code: i32, address: usize, lsb: i16) {
    let info = Info {
        signo: libc::SIGBUS,
        errno: 0,
        code,
        pad: 0,
        address,
        lsb,
        rest: [0; 102],
    };
    // SAFETY: a siginfo of the right length, to this very thread, whose handler is installed.
    let sent = unsafe {
        let (process, thread) = (libc::getpid(), libc::gettid());
        let info = &raw const info;
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            process,
            thread,
            libc::SIGBUS,
            info,
        )
    };
    assert_eq!(sent, 0, "{}", io::Error::last_os_error());
}

fn attached() -> Attachment {
    BusErrors::install().unwrap();
    let attachment = Attachment::default();
    attachment.attach().unwrap();
    attachment
}

/// An address that no test watches.
const NOWHERE: usize = 0x1234_5000;

#[test]
fn an_error_in_kvm_run_is_kept_with_its_address_and_extent() {
    let here = attached();
    here.in_kvm_run(|| strike(BUS_MCEERR_AR, NOWHERE, 12));
    here.in_kvm_run(|| strike(BUS_MCEERR_AR, NOWHERE + 7, 21));
    let error = |address, bytes| BusError {
        address: HostAddress(address),
        code: BusErrorCode::ActionRequired,
        bytes,
        during: During::KvmRun,
    };
    assert_eq!(here.take(), Some(error(NOWHERE, 4096)));
    assert_eq!(here.take(), Some(error(NOWHERE + 7, 2 << 20)));
    assert_eq!(here.take(), None);
}

#[test]
fn an_error_that_nobody_ran_into_is_kept_wherever_the_thread_is() {
    let here = attached();
    strike(BUS_MCEERR_AO, NOWHERE, 12);
    let error = here.take().unwrap();
    assert_eq!(
        (error.code, error.during),
        (BusErrorCode::ActionOptional, During::Handler)
    );
}

#[test]
fn a_flood_keeps_the_oldest_and_room_comes_back() {
    let here = attached();
    for round in 0..3 {
        let first = NOWHERE + round * 100 * PAGE;
        here.in_kvm_run(|| (0..20).for_each(|i| strike(BUS_MCEERR_AR, first + i * PAGE, 12)));
        let kept: Vec<_> = std::iter::from_fn(|| here.take()).collect();
        let expected: Vec<_> = (0..KEPT).map(|i| HostAddress(first + i * PAGE)).collect();
        let found: Vec<_> = kept.iter().map(|error| error.address).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn the_next_vcpu_of_a_thread_does_not_get_the_last_ones_errors() {
    let here = attached();
    here.in_kvm_run(|| strike(BUS_MCEERR_AR, NOWHERE, 12));
    drop(here);
    assert_eq!(attached().take(), None);
}

#[test]
fn a_thread_that_is_no_vcpus_any_more_keeps_nothing() {
    let here = attached();
    here.detach();
    KEPT_HERE.with(|kept| assert!(!kept.attached.load(Ordering::Relaxed)));
    here.in_kvm_run(|| KEPT_HERE.with(|kept| assert!(!kept.in_kvm_run.load(Ordering::Relaxed))));
    // One whose vCPU was replaced by another on this thread takes nothing from it.
    let (old, new) = (attached(), attached());
    drop(new);
    drop(old);
    KEPT_HERE.with(|kept| assert!(!kept.attached.load(Ordering::Relaxed)));
}

#[test]
fn errno_is_what_it_was() {
    let here = attached();
    let page = lost_page();
    let errors = BusErrors::install().unwrap();
    // SAFETY: nobody else knows of it.
    let watched = unsafe { errors.watch(HostAddress(page.expose_provenance()), PAGE) }.unwrap();
    // SAFETY: as above.
    let (read, errno) = unsafe {
        *libc::__errno_location() = 77;
        let read = page.cast::<u8>().read_volatile();
        (read, *libc::__errno_location())
    };
    assert_eq!((read, errno), (0, 77));
    assert_eq!(
        here.take().map(|error| error.code),
        Some(BusErrorCode::NoSuchAddress)
    );
    drop(watched);
}

/// A page of a file that has none.
fn lost_page() -> *mut libc::c_void {
    // SAFETY: a new file and a new mapping of it.
    let page = unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let file = libc::memfd_create(c"lost".as_ptr(), libc::MFD_CLOEXEC);
        libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, file, 0)
    };
    assert_ne!(page, libc::MAP_FAILED);
    page
}

#[test]
fn memory_that_nobody_declared_the_guests_is_not_replaced_on_a_vcpus_thread_either() {
    use std::os::unix::process::ExitStatusExt;

    const CHILD: &str = "KVM_CORE_UNWATCHED";
    const NAME: &str = "kvm::bus_error::tests::memory_that_nobody_declared_the_guests_is_not_replaced_on_a_vcpus_thread_either";
    if std::env::var_os(CHILD).is_some() {
        let _here = attached();
        // SAFETY: mapped; that it is lost ends this process.
        unsafe { lost_page().cast::<u8>().read_volatile() };
        std::process::exit(7);
    }
    let status = child(NAME, CHILD);
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

#[test]
fn what_is_to_become_of_a_vcpus_own_access_outside_of_it_is_asked() {
    const CHILD: &str = "KVM_CORE_OTHERWISE";
    const NAME: &str =
        "kvm::bus_error::tests::what_is_to_become_of_a_vcpus_own_access_outside_of_it_is_asked";
    /// Safe at any moment.
    fn ends(_: HostAddress) -> bool {
        // SAFETY: ends the process, whatever is held.
        unsafe { libc::_exit(7) }
    }
    if std::env::var_os(CHILD).is_some() {
        let here = attached();
        // SAFETY: see it.
        unsafe { BusErrors::install().unwrap().otherwise(ends) };
        // What is kept is not asked about.
        here.in_kvm_run(|| strike(BUS_MCEERR_AR, NOWHERE, 12));
        assert!(here.take().is_some());
        // SAFETY: mapped; that it is lost ends this process.
        unsafe { lost_page().cast::<u8>().read_volatile() };
    }
    let status = child(NAME, CHILD);
    assert_eq!(status.code(), Some(7), "{status}");
}

/// Runs one test in a process of its own, whose `SIGBUS` is its own.
fn child(test: &str, variable: &str) -> std::process::ExitStatus {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child
        .args(["--exact", test, "--test-threads=1"])
        .env(variable, "1");
    child.output().unwrap().status
}

#[test]
fn a_vcpus_errors_are_kept_after_one_that_the_standard_librarys_handler_was_given() {
    const CHILD: &str = "KVM_CORE_FOREIGN";
    const NAME: &str = "kvm::bus_error::tests::a_vcpus_errors_are_kept_after_one_that_the_standard_librarys_handler_was_given";
    if std::env::var_os(CHILD).is_some() {
        let here = attached();
        let std_has_one = PREVIOUS.get().is_some_and(|p| p.sa_sigaction > 1);
        assert!(std_has_one, "the test is about the standard library's");
        // SAFETY: a signal to the new thread, which is no vCPU's.
        let foreign = std::thread::spawn(|| unsafe { libc::raise(libc::SIGBUS) });
        assert_eq!(foreign.join().unwrap(), 0);
        here.in_kvm_run(|| strike(BUS_MCEERR_AR, NOWHERE, 12));
        let kept = here.take().map(|error| error.address);
        assert_eq!(kept, Some(HostAddress(NOWHERE)));
        std::process::exit(7);
    }
    let status = child(NAME, CHILD);
    assert_eq!(status.code(), Some(7), "{status}");
}
