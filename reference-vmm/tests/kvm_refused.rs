// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest asks for in vain, and what the host cannot give it: the first is logged once, the
//! second ends the guest with a line that says what was lost.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use guests::{boot, monitor};
use support::tracer::{Inject, Kind, trace};
use support::{Vmm, WATCHDOG, elf, need_kvm, not_one_line};

#[test]
fn a_port_that_nobody_has_is_logged_once_and_not_a_thousand_times() {
    need_kvm();
    let kernel = elf(monitor::absent64());
    let ended = Vmm::run(&kernel).words("--debug-exit --log info").output();
    ended.expect_status(1);
    let lines = |needle: &str| ended.stderr.lines().filter(|l| l.contains(needle)).count();
    for port in ["0x5658", "0x511"] {
        let line = format!("info: vm guest vcpu 0: nobody answers at port {port}");
        assert_eq!((lines(&line), lines(port)), (1, 1), "{ended}");
    }
    // And nothing of it unless it is asked for.
    let ended = Vmm::run(&kernel).words("--debug-exit").output();
    ended.expect_status(1).expect_silence();
}

#[test]
fn memory_that_the_host_cannot_give_ends_the_guest_with_status_1_and_a_line() {
    need_kvm();
    let kernel = elf(boot::boot_params64());
    let args = [
        "run".to_owned(),
        "--debug-exit".to_owned(),
        "--kernel".to_owned(),
        kernel.display().to_string(),
    ];
    for (errno, what) in [
        (
            libc::EFAULT,
            "cannot give the guest its memory (KVM_RUN: Bad address",
        ),
        (
            libc::EHWPOISON,
            "cannot give the guest its memory, the page is poisoned (KVM_RUN: ",
        ),
    ] {
        let inject = Inject {
            kind: Kind::kvm("KVM_RUN"),
            nth: 1,
            errno,
        };
        let trace = trace(&args, None, &[inject], WATCHDOG);
        assert!(trace.injected && trace.hung.is_none(), "{trace}");
        assert_eq!(trace.status.code(), Some(1), "{trace}");
        assert_eq!(not_one_line(&trace.stderr), None, "{trace}");
        let line = format!("vCPU 0: memory error: the host {what}");
        assert!(trace.stderr.contains(&line), "{trace}");
    }
}
