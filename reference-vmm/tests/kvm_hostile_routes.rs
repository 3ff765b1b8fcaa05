// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest that makes each of its interrupts a commit of KVM's routing table cannot make the main thread
//! wait for them: console input goes on, SIGTERM arrives, and the commits are made on the guest's own time.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::io::Write;

use guests::monitor;
use support::tracer::{Call, Kind, trace};
use support::{Ended, Vmm, WATCHDOG, elf, need_kvm};

/// What the guest said without the dots, of which it writes one a round.
fn said(ended: &Ended) -> String {
    ended.text().replace('.', "")
}

#[test]
fn a_guest_that_reroutes_its_serial_port_without_rest_gets_every_byte_of_input() {
    need_kvm();
    // Many times what the FIFO holds.
    let input = [b"0123456789abcdef".repeat(40), b"q".to_vec()].concat();
    let mut running = Vmm::boot(monitor::reroute64())
        .arg("--debug-exit")
        .stdin_pipe()
        .start();
    running.wait_for("ready\n");
    running.type_in(&input);
    let ended = running.wait();
    let echo = String::from_utf8(input).unwrap();
    ended.expect_status(0x21);
    assert_eq!(said(&ended), format!("ready\n{echo}"), "{ended}");
}

#[test]
fn sigterm_and_sigint_reach_the_monitor_of_a_guest_that_reroutes_without_rest() {
    need_kvm();
    let mut running = Vmm::boot(monitor::reroute64()).start();
    running.wait_for("ready\n");
    running.signal(libc::SIGTERM);
    let ended = running.wait();
    ended.expect_status(0);
    assert_eq!(said(&ended), "ready\nbutton\n", "{ended}");
    let mut running = Vmm::boot(monitor::reroute64()).start();
    running.wait_for("ready\n");
    running.signal(libc::SIGINT);
    running.wait().expect_status(0);
}

/// What the main thread and the vCPU's asked of KVM, with much input: `FIFOS` times what the serial port's
/// FIFO holds, for each of which the main thread interrupts the guest.
fn commits(cmdline: &str) -> (usize, usize) {
    let kernel = elf(monitor::reroute64());
    let kernel = kernel.to_str().unwrap();
    let args = ["run", "--debug-exit", "--kernel", kernel, "--cmdline"];
    let args = [&args[..], &[cmdline]].concat();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let input = [b"x".repeat(64 * FIFOS), b"q".to_vec()].concat();
    writer.write_all(&input).unwrap();
    let trace = trace(&args, Some(reader.into()), &[], 4 * WATCHDOG);
    assert_eq!(trace.status.code(), Some(0x21), "{trace}");
    let by = |of_vcpu: bool| {
        let kind = Kind::kvm("KVM_SET_GSI_ROUTING");
        let on = |call: &&Call| call.kind == kind && call.thread.starts_with("vcpu") == of_vcpu;
        trace.calls.iter().filter(on).count()
    };
    drop(writer);
    (by(false), by(true))
}

const FIFOS: usize = 4;

#[test]
fn every_commit_of_such_a_guests_routes_is_made_by_its_vcpu_and_none_by_the_main_thread() {
    need_kvm();
    // One a round, and more than a round a byte.
    let (main, vcpu) = commits("3");
    assert!(main == 0 && vcpu >= 64 * FIFOS, "{main}, {vcpu}");
    // What the main thread alone wants an interrupt for, the vCPU commits all the same.
    let (main, vcpu) = commits("1");
    assert!(main == 0 && vcpu >= 1, "{main}, {vcpu}");
}
