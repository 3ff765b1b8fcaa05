// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a stock Linux makes of the processors that it is given: `/sys/devices/system/cpu` (which `lscpu`
//! reads) and `/proc/cpuinfo`. In the lab, as `lab_boot.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use kvm_core::arch::x86_64::Topology;
use support::lab::lab_file;
use support::{Ended, Vmm, long, need_kvm};

/// All processors take their turns on one emulated one.
const LIMIT: Duration = Duration::from_secs(600);

/// A kernel whose init tells of its processors.
fn linux(kernel: &str, args: &[&str]) -> Ended {
    need_kvm();
    let ended = Vmm::run(lab_file(kernel))
        .arg("--initrd")
        .arg(lab_file("initrd-scripted.cpio.gz"))
        .args(["--cmdline", "console=ttyS0 quiet guest.cpus"])
        .args(args)
        .limit(LIMIT)
        .output();
    ended.expect_status(0).expect_silence();
    ended
}

/// What stands behind each `guest: NAME`.
fn said(ended: &Ended, name: &str) -> Vec<String> {
    let prefix = format!("guest: {name} ");
    let text = ended.text();
    let lines = text.lines().map(str::trim_end);
    lines
        .filter_map(|line| line.strip_prefix(&prefix).map(str::to_owned))
        .collect()
}

/// `0-5`, or `3` where there is one.
fn run_of(first: u32, count: u32) -> String {
    match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + count - 1),
    }
}

/// Boots with these processors, and holds what Linux says of each against where it should be.
fn stands(sockets: u32, cores: u32, threads: u32, model: &str) -> Ended {
    let topology = Topology::new(sockets, cores, threads).unwrap();
    let count = topology.cpus();
    let cpus = format!("{count},sockets={sockets},cores={cores},threads={threads}");
    let args = ["--cpus", &cpus, "--cpu", model, "--memory", "256M"];
    let ended = linux("vmlinuz-6.12", &args);
    // Files under /sys/devices/system/cpu and what is in them.
    let files: BTreeMap<_, _> = said(&ended, "sys")
        .iter()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, text)| (file.to_owned(), text.to_owned()))
        .collect();
    let infos = said(&ended, "cpuinfo");
    assert_eq!(infos.len(), count as usize, "{ended}");
    for index in 0..count {
        let place = topology.place(index).unwrap();
        let socket = topology.cpus_of_socket();
        let of_core = run_of(index - place.thread, threads);
        let of_socket = run_of(place.socket * socket, socket);
        for (file, expected) in [
            ("physical_package_id", &place.socket.to_string()),
            ("thread_siblings_list", &of_core),
            ("core_siblings_list", &of_socket),
        ] {
            let found = files.get(&format!("cpu{index}/topology/{file}"));
            assert_eq!(found, Some(expected), "cpu{index}: {file}\n{ended}");
        }
        let apic_id = topology.apic_id(index).unwrap();
        let expected = format!("{index} apicid {apic_id} siblings {socket} cores {cores}");
        assert!(infos.contains(&expected), "{expected}\n{ended}");

        // The first two levels of cache are the core's own, the third is the socket's.
        let mut caches = 0;
        for cache in 0..4 {
            let folder = format!("cpu{index}/cache/index{cache}");
            if let Some(level) = files.get(&format!("{folder}/level")) {
                let expected = if level == "3" { &of_socket } else { &of_core };
                let shared = files.get(&format!("{folder}/shared_cpu_list"));
                assert_eq!(shared, Some(expected), "{folder}\n{ended}");
                caches += 1;
            }
        }
        assert!(caches > 0, "cpu{index} has no cache\n{ended}");
    }
    ended
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_finds_the_sockets_cores_and_threads_and_the_instructions_that_it_was_given() {
    let ended = stands(2, 1, 2, "x86-64-v2");
    // The first one can what the model says, and no more of it.
    let flags = said(&ended, "flags");
    let flags: Vec<_> = flags[0].split_whitespace().collect();
    for there in ["sse4_2", "popcnt", "cx16", "rdrand", "hypervisor"] {
        assert!(flags.contains(&there), "no {there}\n{ended}");
    }
    for hidden in ["avx", "avx2", "bmi1", "fma", "aes", "movbe", "abm"] {
        assert!(!flags.contains(&hidden), "{hidden}\n{ended}");
    }
    if long() {
        // With ids that nobody has. Twelve processors take minutes for their clocks' ticks alone.
        stands(2, 3, 2, "host");
    }
}
