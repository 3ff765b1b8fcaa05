// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `--memory` with each of its options on this host's KVM, and the firmware that a guest cannot change.
//!
//! Huge pages are the host's to reserve: where the test may (as root), it reserves them and gives them
//! back, and where it may not it says so. Other tests of the workspace do the same at times, so it
//! takes what it needs on top of what there is.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::path::Path;

use guests::{boot, console};
use memslots::{HugePageSize, HugePool};
use reference_vmm::host_memory::{SYSFS, Transparent};
use serde_json::Value;
use support::huge::{Reserved, not_tried};
use support::{Ended, Vmm, need_kvm};

fn stats(ended: &Ended) -> Value {
    let line = ended.stderr.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {ended}"))
}

fn run(memory: &str, words: &str) -> Ended {
    need_kvm();
    Vmm::boot(console::rom64())
        .words("--debug-exit --stats=json --memory")
        .arg(memory)
        .words(words)
        .output()
}

/// The slots: start, size, backing, page size, read-only.
fn slots(stats: &Value) -> Vec<(u64, u64, String, u64, bool)> {
    let slots = stats["slots"].as_array().unwrap();
    let one = |slot: &Value| {
        let number = |name: &str| slot[name].as_u64().unwrap();
        let backing = slot["backing"].as_str().unwrap().to_owned();
        let read_only = slot["read-only"].as_bool().unwrap();
        (
            number("start"),
            number("size"),
            backing,
            number("page-size"),
            read_only,
        )
    };
    slots.iter().map(one).collect()
}

#[test]
fn a_guest_cannot_change_its_firmware() {
    for memory in ["2M", "256M", "6G", "256M,shared", "64M,thp=always"] {
        let ended = run(memory, "");
        ended.expect_status(1).expect_stdout("RR\n");
        let stats = stats(&ended);
        assert_eq!(stats["read-only-writes"], 2, "{stats}");
        // And nowhere else.
        assert_eq!(stats["unclaimed"], Value::Array(vec![]), "{stats}");
        let firmware: Vec<_> = slots(&stats).into_iter().filter(|slot| slot.4).collect();
        assert_eq!(firmware.len(), 1, "{stats}");
        assert_eq!(
            (firmware[0].0, firmware[0].1),
            (0xe_0000, 0x2_0000),
            "{stats}"
        );
    }
    // At the debug level it is said, and nowhere else.
    let ended = run("256M", "--log debug");
    assert!(
        ended.stderr.contains("read-only memory at 0xffff0"),
        "{ended}"
    );
}

#[test]
fn a_guest_without_firmware_has_plain_memory() {
    let ended = run("256M", "--irqchip none");
    ended.expect_status(1).expect_stdout("WW\n");
    let stats = stats(&ended);
    assert_eq!(stats["read-only-writes"], 0, "{stats}");
    assert_eq!(slots(&stats).len(), 1, "{stats}");
}

#[test]
fn shared_memory_is_in_memfds() {
    let ended = run("6G,shared", "");
    ended.expect_status(1);
    for (start, _, backing, _, read_only) in slots(&stats(&ended)) {
        let shared = backing.contains("memfd");
        assert!(shared != read_only, "{start:#x}: {backing}");
    }
}

/// The resident memory that a run of a guest had, KiB.
fn resident(memory: &str) -> u64 {
    need_kvm();
    let mut running = Vmm::boot(boot::spin64()).args(["--memory", memory]).start();
    running.wait_for("up\n");
    let peak = running.peak_rss();
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
    peak
}

#[test]
fn prefaulted_memory_is_present_and_other_memory_is_not() {
    for shared in ["", ",shared"] {
        let lazy = resident(&format!("64M{shared}"));
        let present = resident(&format!("64M{shared},prefault"));
        assert!(present >= 63 << 10, "{present} KiB of 64 MiB");
        assert!(lazy < 32 << 10, "{lazy} KiB");
    }
}

/// The largest that any process was that this one has waited for, KiB.
fn peak_rss_of_children() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call writes a rusage, and zeroes are one already.
    let usage = unsafe {
        let told = libc::getrusage(libc::RUSAGE_CHILDREN, usage.as_mut_ptr());
        assert_eq!(told, 0);
        usage.assume_init()
    };
    usage.ru_maxrss
}

#[test]
fn a_signal_ends_the_making_present_and_the_guest_never_runs() {
    need_kvm();
    for (signal, words) in [
        (libc::SIGTERM, ""),
        (libc::SIGINT, ""),
        (libc::SIGTERM, "--stats=json --cpus 2"),
    ] {
        let vmm = Vmm::boot(boot::hello64()).words("--memory 512M,prefault");
        let ended = vmm.words(words).pending(signal).output();
        ended.expect_status(0).expect_stdout("");
        match words {
            "" => ended.expect_silence(),
            // What was asked for is said, and that is nothing.
            _ => {
                let stats = stats(&ended);
                assert_eq!(stats["exits"].as_array().unwrap().len(), 2, "{ended}");
                assert_eq!(stats["exits"][0]["pio-out"], 0, "{ended}");
                &ended
            }
        };
        // No other test here makes as much present.
        let peak = peak_rss_of_children();
        assert!(peak < 256 << 10, "{peak} KiB were resident");
    }
    // What asks for registers stops nothing.
    let vmm = Vmm::boot(boot::hello64()).words("--debug-exit --memory 64M,prefault");
    let ended = vmm.pending(libc::SIGUSR1).output();
    ended.expect_status(1).expect_stdout("hello\n");
}

#[test]
fn transparent_huge_pages_and_a_numa_node_are_taken() {
    for memory in [
        "64M,thp=always",
        "64M,thp=never",
        "64M,numa=0",
        "64M,shared,numa=0,prefault",
    ] {
        let ended = run(memory, "--irqchip none");
        // A kernel without transparent huge pages says so.
        if ended.status.code() == Some(1) && ended.stdout.is_empty() {
            assert!(memory.contains("thp=always"), "{ended}");
            println!("this host has none: {}", ended.stderr);
            continue;
        }
        ended.expect_status(1).expect_stdout("WW\n");
    }
}

#[test]
fn transparent_huge_pages_that_cannot_be_had_are_told_in_one_line() {
    need_kvm();
    let host = Transparent::read(Path::new(SYSFS));
    for (memory, setting) in [
        ("64M,thp=always", &host.private),
        ("64M,shared,thp=always", &host.shared),
    ] {
        let vmm = Vmm::boot(boot::hello64()).words("--debug-exit --memory");
        let ended = vmm.arg(memory).output();
        let Some(setting) = setting else { continue };
        ended.expect_status(1).expect_stdout("hello\n");
        match setting.obstacle() {
            None => ended.expect_silence(),
            Some((file, word)) => ended.expect_line(&["no effect", file.to_str().unwrap(), word]),
        };
    }
}

#[test]
fn what_the_host_has_not_is_told_with_numbers_before_anything_is_made() {
    need_kvm();
    let refused = |memory: &str, needles: &[&str]| {
        let ended = Vmm::boot(boot::hello64())
            .args(["--memory", memory])
            .output();
        ended
            .expect_status(2)
            .expect_stdout("")
            .expect_line(needles);
    };
    refused(
        "1023G,numa=1023",
        &["NUMA node 1023", "nodes that have are"],
    );
    // More than the host has, by the whole machine's count: the first 2 MiB are ordinary ones.
    for (page, outside) in [(HugePageSize::MIB_2, 1), (HugePageSize::GIB_1, 0)] {
        let Some(pool) = HugePool::of_host(page) else {
            continue;
        };
        // Above 4 GiB, so that it is in two slots.
        let gib = ((pool.available() * page.bytes()) >> 30) + 6;
        let pages = (gib << 30) / page.bytes() - outside;
        let wanted = format!("{pages} huge pages of {page} wanted");
        refused(
            &format!("{gib}G,hugepages={}", page.bytes()),
            &[&wanted, "to be had", "nr_hugepages"],
        );
    }
    refused("64M,hugepages=64K", &["not of 64 KiB", "hugepages-64kB"]);
}

#[test]
fn huge_pages_of_2_mib_serve_all_but_the_first_two_mib() {
    let _reserved = match Reserved::new(2048, 16) {
        Ok(reserved) => reserved,
        Err(why) => return not_tried(&why),
    };
    for (memory, backing) in [
        ("32M,hugepages", "private hugetlb pages"),
        ("32M,hugepages=2M,shared,prefault", "shared hugetlb pages"),
    ] {
        let ended = run(memory, "");
        ended.expect_status(1).expect_stdout("RR\n");
        let slots = slots(&stats(&ended));
        let huge: Vec<_> = slots.iter().filter(|slot| slot.3 == 2 << 20).collect();
        assert_eq!(huge.len(), 1, "{slots:?}");
        assert_eq!((huge[0].0, huge[0].1), (2 << 20, 30 << 20), "{slots:?}");
        assert_eq!(huge[0].2, backing);
        // No firmware, and so all of it.
        let ended = run(memory, "--irqchip none");
        ended.expect_status(1).expect_stdout("WW\n");
    }
}

#[test]
fn huge_pages_of_1_gib_leave_the_firmware_writable() {
    let _reserved = match Reserved::new(1 << 20, 1) {
        Ok(reserved) => reserved,
        Err(why) => return not_tried(&why),
    };
    let ended = run("1G,hugepages=1G", "");
    ended.expect_status(1).expect_stdout("WW\n");
    let stats = stats(&ended);
    let page = 1 << 30;
    let expected = [(0, page, "private hugetlb pages".to_owned(), page, false)];
    assert_eq!(slots(&stats), expected);
}
