// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Serial output that KVM keeps until the next exit, on this host's KVM: every byte comes, in order,
//! in time, and with fewer exits; and what such a guest did, in numbers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use guests::{boot, console, monitor};
use serde_json::Value;
use support::{Ended, Running, Vmm, WATCHDOG, need_kvm};

/// Enough that the zone is there long before the last byte: the bytes before it cost an exit each.
const MUCH: usize = 20_000;

/// A guest that writes `count` bytes and then does what `mode` says.
fn polled(count: usize, mode: char) -> Vmm {
    need_kvm();
    Vmm::boot(console::polled64())
        .words("--debug-exit --stats=json --cmdline")
        .arg(format!("{count}{mode}"))
}

/// The counters, which are the last line of stderr.
fn stats(ended: &Ended) -> Value {
    let line = ended.stderr.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {ended}"))
}

fn device<'a>(stats: &'a Value, name: &str) -> &'a Value {
    let devices = stats["devices"].as_array().unwrap();
    let found = devices.iter().find(|device| device["device"] == name);
    found.unwrap_or_else(|| panic!("no {name}: {stats}"))
}

fn exits(stats: &Value, kind: &str) -> u64 {
    let vcpus = stats["exits"].as_array().unwrap();
    vcpus.iter().map(|vcpu| vcpu[kind].as_u64().unwrap()).sum()
}

#[track_caller]
fn expect(ended: &Ended, count: usize, then: &[u8]) {
    let expected = [&console::pattern(count), then].concat();
    let same = ended.stdout.iter().zip(&expected);
    let at = same.take_while(|(got, wanted)| got == wanted).count();
    assert!(
        ended.stdout == expected,
        "{} bytes of {}, the first difference at {at}",
        ended.stdout.len(),
        expected.len()
    );
}

/// Host without `KVM_CAP_COALESCED_PIO` are right too, and say so.
fn is_coalesced(stats: &Value) -> bool {
    let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
    let can = vm.check_extension(kvm_ioctls::Cap::CoalescedPio);
    let writes = stats["coalesced-writes"].as_u64().unwrap();
    if !can {
        println!("NOT TRIED: this KVM has no KVM_CAP_COALESCED_PIO, every byte was an exit");
        assert_eq!(writes, 0);
    }
    can
}

#[test]
fn a_guest_that_ends_right_after_its_last_byte_loses_none() {
    for count in [1, 255, 256, 257, 10_000] {
        let ended = polled(count, 'e').output();
        ended.expect_status(1);
        expect(&ended, count, b"");
        let stats = stats(&ended);
        let serial = device(&stats, "the serial port");
        assert_eq!(serial["writes"], count, "{stats}");
        // Each write was either an exit of its own or kept; the last exit is the guest's end.
        let kept = stats["coalesced-writes"].as_u64().unwrap();
        assert_eq!(exits(&stats, "pio-out") + kept, count as u64 + 1, "{stats}");
        if count <= 256 {
            assert_eq!(kept, 0, "{stats}");
        }
        if count == 10_000 && is_coalesced(&stats) {
            assert!(kept > 0, "{stats}");
        }
    }
}

#[test]
fn a_guest_that_crashes_right_after_its_last_byte_loses_none() {
    let ended = polled(MUCH, 't').output();
    ended.expect_status(3);
    expect(&ended, MUCH, b"");
}

/// Of a pipe of one page, whose reader waits until the guest has nothing left to do but to end.
#[test]
fn a_guest_that_ends_while_its_console_is_full_loses_nothing() {
    for (end, status) in [('e', 1), ('p', 0), ('r', 0), ('t', 3)] {
        // By the instruction after its last byte, and when `com1-drain` has taken the ring's bytes.
        for mode in [end, end.to_ascii_uppercase()] {
            for more in [20, 60, 100, 150, 600] {
                let (reader, writer) = std::io::pipe().unwrap();
                // SAFETY: plain numbers.
                let size = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
                assert!(size >= 4096);
                let count = size as usize + more;
                let running = polled(count, mode).stdout_file(writer).start();
                running.wait_until_idle("vcpu0");
                let mut bytes = Vec::new();
                File::from(OwnedFd::from(reader))
                    .read_to_end(&mut bytes)
                    .unwrap();
                running.wait().expect_status(status);
                assert_eq!(bytes.len(), count, "{mode}");
                assert!(bytes == console::pattern(count), "{mode}");
            }
        }
    }
}

/// Four vCPUs and a pipe of one page that nobody reads until all of them wait for it.
fn chorus() -> (Running, std::io::PipeReader) {
    need_kvm();
    let (reader, writer) = std::io::pipe().unwrap();
    // SAFETY: plain numbers.
    assert!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } >= 4096);
    let running = Vmm::boot(monitor::chorus64())
        .words("--debug-exit --cpus 4 --cmdline 4")
        .stdout_file(writer)
        .start();
    for vcpu in ["vcpu0", "vcpu1", "vcpu2", "vcpu3"] {
        running.wait_until_idle(vcpu);
    }
    (running, reader)
}

#[test]
fn vcpus_that_wait_together_for_a_full_console_lose_nothing() {
    let (running, reader) = chorus();
    let mut bytes = Vec::new();
    File::from(OwnedFd::from(reader))
        .read_to_end(&mut bytes)
        .unwrap();
    running.wait().expect_status(1);
    bytes.sort_unstable();
    let each: Vec<_> = bytes.chunk_by(u8::eq).map(|of| (of[0], of.len())).collect();
    let count = monitor::CHORUS_BYTES;
    assert_eq!(each, [b'A', b'B', b'C', b'D'].map(|letter| (letter, count)));
}

#[test]
fn vcpus_that_wait_together_for_a_full_console_can_be_stopped() {
    let (running, reader) = chorus();
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
    drop(reader);
}

#[test]
fn the_last_bytes_of_a_guest_that_halts_for_ever_appear() {
    let mut running = polled(MUCH, 'h').start();
    running.wait_for("end\n");
    running.signal(libc::SIGTERM);
    let ended = running.wait();
    ended.expect_status(0);
    expect(&ended, MUCH, b"end\n");
    let stats = stats(&ended);
    if is_coalesced(&stats) {
        assert!(stats["coalesced-writes"].as_u64() > Some(0), "{stats}");
    }
}

#[test]
fn a_guest_that_goes_on_by_interrupts_gets_them() {
    let ended = polled(MUCH, 'i').output();
    ended.expect_status(1);
    expect(&ended, MUCH, &[b'!'; 16]);
}

#[test]
fn the_divisor_latch_and_the_loop_back_see_their_own_bytes() {
    let ended = polled(MUCH, 'd').output();
    ended.expect_status(1);
    expect(&ended, MUCH, b"LZ\n");
}

#[test]
fn every_kind_of_irqchip_has_its_output_in_order() {
    for irqchip in ["none", "split", "kernel"] {
        let ended = polled(MUCH, 'd').args(["--irqchip", irqchip]).output();
        ended.expect_status(1);
        expect(&ended, MUCH, b"LZ\n");
    }
}

#[test]
fn much_output_takes_fewer_exits_than_bytes() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut reader = File::from(OwnedFd::from(reader));
    need_kvm();
    let running = Vmm::boot(monitor::flood64())
        .arg("--stats=json")
        .stdout_file(writer)
        .limit(4 * WATCHDOG)
        .start();
    let mut bytes = vec![0; 60_000];
    reader.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == b'x'));
    running.signal(libc::SIGTERM);
    let ended = running.wait();
    ended.expect_status(0);
    let stats = stats(&ended);
    if is_coalesced(&stats) {
        let (exits, kept) = (exits(&stats, "pio-out"), &stats["coalesced-writes"]);
        println!("{exits} exits, {kept} bytes without one");
        assert!(kept.as_u64().unwrap() > exits, "{stats}");
    }
}

fn kvm_counts() -> bool {
    let kvm = kvm_core::Kvm::open().unwrap();
    let counts = kvm.capabilities().binary_stats();
    if !counts {
        println!("NOT TRIED: this KVM has no KVM_CAP_BINARY_STATS_FD");
    }
    counts
}

#[test]
fn the_numbers_are_shown_when_they_are_asked_for() {
    need_kvm();
    let ended = Vmm::boot(boot::hello64())
        .words("--debug-exit --stats")
        .output();
    ended.expect_status(1).expect_stdout("hello\n");
    for needle in [
        "exits",
        "vcpu0",
        "pio-out",
        "the serial port",
        "PIO 0x3f8..=0x3ff",
        "debug-exit",
        "slot 0",
    ]
    .into_iter()
    .chain(kvm_counts().then_some("KVM's counts of vcpu0"))
    {
        assert!(ended.stderr.contains(needle), "{needle}: {ended}");
    }
    let ended = Vmm::boot(boot::smp64())
        .words("--debug-exit --stats=json --cpus 3 --cmdline 3")
        .output();
    ended.expect_status(1);
    let stats = stats(&ended);
    assert_eq!(stats["exits"].as_array().unwrap().len(), 3, "{stats}");
    assert_eq!(exits(&stats, "pio-out"), 4, "{stats}");
    assert_eq!(device(&stats, "the serial port")["written-bytes"], 3);
    assert_eq!(device(&stats, "debug-exit")["writes"], 1);
    if kvm_counts() {
        let of = |vcpu: usize| stats["kvm"]["vcpus"][vcpu].as_array().unwrap();
        for vcpu in 0..3 {
            let ours = &stats["exits"][vcpu];
            let ours: u64 = ours
                .as_object()
                .unwrap()
                .values()
                .filter_map(Value::as_u64)
                .sum();
            let theirs = of(vcpu).iter().find(|one| one["name"] == "exits").unwrap();
            // KVM counts those as well that it serves alone.
            assert!(theirs["value"].as_u64() >= Some(ours), "{stats}");
            assert!(of(vcpu).iter().all(|one| one["value"] != 0), "{stats}");
        }
        assert!(stats["kvm"]["vm"].is_array(), "{stats}");
    } else {
        assert_eq!(stats["kvm"], Value::Null);
    }
    assert_eq!(stats["unclaimed"], Value::Array(Vec::new()), "{stats}");
    let size = |slot: &Value| slot["size"].as_u64().unwrap();
    let slots = stats["slots"].as_array().unwrap();
    assert_eq!(slots.iter().map(size).sum::<u64>(), 256 << 20);
    // And not when they are not.
    let ended = Vmm::boot(boot::hello64()).arg("--debug-exit").output();
    ended.expect_status(1).expect_silence();
}
