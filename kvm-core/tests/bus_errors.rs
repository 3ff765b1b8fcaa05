// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A `SIGBUS` that is not a vCPU's goes where it went before. (What becomes of a vCPU's is in
//! `kvm_memory_errors.rs`.)
#![cfg(all(feature = "kvm", not(loom)))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};

use kvm_core::{BusErrors, BusErrorsError, HostAddress};

const PAGE: usize = 4096;
const CHILD: &str = "KVM_CORE_BUS_ERRORS";

/// Runs one of the cases below in a process of its own, whose `SIGBUS` is its own.
fn child(case: &str) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "cases", "--nocapture", "--test-threads=1"]);
    child.env(CHILD, case).output().unwrap().status
}

/// Two pages of a file that has none of them.
fn truncated() -> *mut u8 {
    // SAFETY: a new file and a new mapping of it.
    unsafe {
        let file = libc::memfd_create(c"truncated".as_ptr(), libc::MFD_CLOEXEC);
        assert!(file >= 0);
        let flags = libc::MAP_SHARED;
        let map = libc::mmap(
            std::ptr::null_mut(),
            2 * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            file,
            0,
        );
        assert_ne!(map, libc::MAP_FAILED);
        map.cast()
    }
}

fn touch(page: *mut u8) -> u8 {
    // SAFETY: mapped; that it is lost is what is tested.
    unsafe { page.read_volatile() }
}

fn set(action: libc::sighandler_t, flags: libc::c_int) {
    // SAFETY: all zeroes are a sigaction; the handlers below are safe at any moment.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        (new.sa_sigaction, new.sa_flags) = (action, flags);
        assert_eq!(libc::sigaction(libc::SIGBUS, &new, std::ptr::null_mut()), 0);
    }
}

fn action() -> libc::sighandler_t {
    // SAFETY: only asks; all zeroes are a sigaction.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        assert_eq!(libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut now), 0);
        now.sa_sigaction
    }
}

static LOST: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// Brings the page back.
fn mend(page: usize) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: this process's own page.
    unsafe {
        libc::mmap(page as *mut _, PAGE, libc::PROT_READ, flags, -1, 0);
        *libc::__errno_location() = 99;
    }
}

extern "C" fn with_info(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel's siginfo of a fault; errno is to come back as it was.
    mend(unsafe { (*info).si_addr() } as usize);
}

extern "C" fn plain(_: libc::c_int) {
    mend(LOST.load(Ordering::Relaxed));
}

static ASKED: AtomicUsize = AtomicUsize::new(0);

/// Safe at any moment: nothing but atomics, and what `mend` does.
fn mends(at: HostAddress) -> bool {
    ASKED.fetch_add(1, Ordering::Relaxed);
    mend(at.0);
    true
}

fn declines(_: HostAddress) -> bool {
    ASKED.fetch_add(1, Ordering::Relaxed);
    false
}

/// A hardware memory error that nobody has run into (`BUS_MCEERR_AO`), told as the kernel tells it.
fn tell_early() {
    const EARLY: i32 = 5;
    // SAFETY: all zeroes are a siginfo, and a signal to this very thread may have any code.
    let sent = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        (info.si_signo, info.si_code) = (libc::SIGBUS, EARLY);
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
    assert_eq!(sent, 0);
}

/// Not a test by itself: the cases of the tests below, in their children.
#[test]
fn cases() {
    let Ok(case) = std::env::var(CHILD) else {
        return;
    };
    let page = truncated();
    LOST.store(page as usize, Ordering::Relaxed);
    match case.as_str() {
        "handler with siginfo" | "siginfo, asked" => {
            set(with_info as *const () as usize, libc::SA_SIGINFO)
        }
        "plain handler" => set(plain as *const () as usize, 0),
        "default" | "default sent" | "default early" | "mended" => set(libc::SIG_DFL, 0),
        "ignored" | "ignored sent" | "ignored early" => set(libc::SIG_IGN, 0),
        "asked, ignored sent" | "asked, ignored early" => set(libc::SIG_IGN, 0),
        // What a Rust program has: the standard library's.
        "watched" | "std" | "std sent" | "std sent twice" | "std, mended" | "std, asked" => {}
        _ => panic!(),
    }
    let errors = BusErrors::install().unwrap();
    // Twice is once.
    BusErrors::install().unwrap();
    if case == "watched" {
        // SAFETY: guest memory for all that anybody knows.
        let watched = unsafe { errors.watch(HostAddress(page as usize), 2 * PAGE) };
        std::mem::forget(watched.unwrap());
    }
    let asked: Option<fn(HostAddress) -> bool> = match case.as_str() {
        "mended" | "std, mended" => Some(mends),
        _ if case.contains("asked") => Some(declines),
        _ => None,
    };
    if let Some(asked) = asked {
        // SAFETY: both are safe at any moment.
        unsafe { errors.otherwise(asked) };
    }
    if case == "std, mended" {
        // One that was sent before is none of it, and takes nothing away from it.
        let before = action();
        // SAFETY: a signal to this thread.
        unsafe { libc::raise(libc::SIGBUS) };
        assert_eq!((action(), ASKED.load(Ordering::Relaxed)), (before, 0));
    }
    if case.starts_with("std sent") {
        let before = action();
        for _ in 0..1 + usize::from(case.ends_with("twice")) {
            // SAFETY: a signal to this thread.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        assert_eq!(action(), before);
    } else if case.ends_with("sent") {
        // SAFETY: a signal to this thread.
        unsafe { libc::raise(libc::SIGBUS) };
    } else if case.ends_with("early") {
        tell_early();
    } else {
        // SAFETY: this thread's own.
        unsafe { *libc::__errno_location() = 77 };
        let read = touch(page);
        // SAFETY: this thread's own. That handler changes it; no code that is interrupted may notice.
        let errno = unsafe { *libc::__errno_location() };
        assert_eq!((read, errno), (0, 77));
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
    }
    let is_fault = !case.ends_with("sent") && !case.ends_with("early");
    let due = usize::from(asked.is_some() && is_fault);
    assert_eq!(ASKED.load(Ordering::Relaxed), due);
    std::process::exit(7);
}

#[test]
fn who_had_a_handler_before_is_called_as_before() {
    assert_eq!(child("handler with siginfo").code(), Some(7));
    assert_eq!(child("plain handler").code(), Some(7));
}

#[test]
fn a_fault_that_nobody_catches_ends_the_process_as_before() {
    assert_eq!(child("default").signal(), Some(libc::SIGBUS));
    // The kernel too lets nobody ignore a fault.
    assert_eq!(child("ignored").signal(), Some(libc::SIGBUS));
}

#[test]
fn a_signal_that_was_sent_does_what_it_did_before() {
    assert_eq!(child("default sent").signal(), Some(libc::SIGBUS));
    assert_eq!(child("ignored sent").code(), Some(7));
}

#[test]
fn the_standard_librarys_handler_which_gives_its_place_up_does_not_give_up_this_ones() {
    assert_eq!(child("std sent").code(), Some(7));
    // What it gave its place to is what there is from then on.
    assert_eq!(child("std sent twice").signal(), Some(libc::SIGBUS));
    assert_eq!(child("std").signal(), Some(libc::SIGBUS));
}

#[test]
fn an_error_that_nobody_ran_into_does_on_other_threads_what_it_did_before() {
    assert_eq!(child("default early").signal(), Some(libc::SIGBUS));
    assert_eq!(child("ignored early").code(), Some(7));
}

#[test]
fn what_is_to_become_of_another_threads_fault_is_asked_first() {
    assert_eq!(child("mended").code(), Some(7));
    assert_eq!(child("std, mended").code(), Some(7));
    // What is not taken goes where it went.
    assert_eq!(child("siginfo, asked").code(), Some(7));
    assert_eq!(child("std, asked").signal(), Some(libc::SIGBUS));
}

#[test]
fn nobody_is_asked_about_what_no_access_waits_for() {
    assert_eq!(child("asked, ignored sent").code(), Some(7));
    assert_eq!(child("asked, ignored early").code(), Some(7));
}

#[test]
fn watched_memory_is_replaced_for_vcpus_threads_alone() {
    assert_eq!(child("watched").signal(), Some(libc::SIGBUS));
}

#[test]
fn what_is_watched_is_whole_pages_and_no_more_than_there_is_room_for() {
    // This process never loses a page: the ranges are numbers.
    let errors = BusErrors::install().unwrap();
    // SAFETY: nothing is mapped there, and nothing touches it.
    let watch = |address, bytes| unsafe { errors.watch(HostAddress(address), bytes) };
    let none = (PAGE, 0);
    for (address, bytes) in [
        (1, PAGE),
        (PAGE, 1),
        none,
        (usize::MAX - PAGE + 1, 2 * PAGE),
    ] {
        let error = watch(address, bytes).unwrap_err();
        let expected = BusErrorsError::NotPages {
            address: HostAddress(address),
            bytes,
        };
        assert_eq!(error, expected);
    }
    let mut all = Vec::new();
    let full = loop {
        match watch(PAGE, PAGE) {
            Ok(watched) => all.push(watched),
            Err(error) => break error,
        }
    };
    assert_eq!((full, all.len()), (BusErrorsError::TooMany, 128));
    assert!(full.to_string().contains("128 ranges"));
    // One that is let go of makes room.
    all.pop();
    all.push(watch(PAGE, PAGE).unwrap());
}
