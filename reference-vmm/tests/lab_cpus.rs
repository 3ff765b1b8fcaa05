// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a stock Linux makes of the processors that it is given: `/sys/devices/system/cpu` (which `lscpu`
//! reads) and `/proc/cpuinfo`. In the lab, as `lab_boot.rs`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use kvm_core::arch::x86_64::Topology;
use support::{Ended, Vmm, need_kvm};

/// Twelve processors take their turns on one emulated one.
const LIMIT: Duration = Duration::from_secs(300);

fn lab_file(name: &str) -> PathBuf {
    let folder = std::env::var_os("LAB_KERNELS").expect("LAB_KERNELS is not set: cargo xtask test");
    let path = PathBuf::from(folder).join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

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

/// The words behind each `guest: NAME`, by their first.
fn said(ended: &Ended, name: &str) -> BTreeMap<String, Vec<Vec<String>>> {
    let prefix = format!("guest: {name} ");
    let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for line in ended.text().lines() {
        if let Some(rest) = line.trim_end().strip_prefix(&prefix) {
            let mut words = rest.split(' ').map(str::to_owned);
            let first = words.next().unwrap();
            all.entry(first).or_default().push(words.collect());
        }
    }
    all
}

/// `0-5`, or `3` where there is one.
fn run_of(first: u32, count: u32) -> String {
    match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first + count - 1),
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_finds_the_sockets_cores_and_threads_that_were_asked_for() {
    let topology = Topology::new(2, 3, 2).unwrap();
    let cpus = "12,sockets=2,cores=3,threads=2";
    let model = "x86-64-v2";
    let args = ["--cpus", cpus, "--cpu", model, "--memory", "512M"];
    let ended = linux("vmlinuz-6.12", &args);
    let (places, infos) = (said(&ended, "cpu"), said(&ended, "cpuinfo"));
    assert_eq!(places.len(), 12, "{ended}");
    let caches = said(&ended, "cache");
    for index in 0..topology.cpus() {
        let place = topology.place(index).unwrap();
        let key = index.to_string();
        let (threads, socket) = (topology.threads(), topology.cpus_of_socket());
        let core = run_of(index - place.thread, threads);
        let siblings = run_of(place.socket * socket, socket);
        let package = place.socket.to_string();
        let expected = ["package", &package, "threads", &core, "socket", &siblings];
        assert_eq!(places[&key], [expected], "cpu {index}\n{ended}");

        let apic_id = topology.apic_id(index).unwrap().to_string();
        let (siblings_count, cores) = (socket.to_string(), topology.cores().to_string());
        let expected = [
            "apicid",
            &apic_id,
            "siblings",
            &siblings_count,
            "cores",
            &cores,
        ];
        assert_eq!(infos[&key], [expected], "cpu {index}\n{ended}");

        // The first two levels of cache are the core's own, the third is the socket's.
        for cache in caches.get(&key).into_iter().flatten() {
            let [_, level, _, shared] = &cache[..] else {
                panic!("{cache:?}\n{ended}");
            };
            let expected = if level == "3" { &siblings } else { &core };
            assert_eq!(shared, expected, "cpu {index}, level {level}\n{ended}");
        }
    }
    assert!(!caches.is_empty(), "{ended}");

    // And the first one can what the model says, and no more of it.
    let text = ended.text();
    let flags = text.lines().find_map(|l| l.strip_prefix("guest: flags "));
    let flags: Vec<_> = flags.unwrap().split_whitespace().collect();
    for there in ["sse4_2", "popcnt", "cx16", "rdrand", "hypervisor"] {
        assert!(flags.contains(&there), "no {there}\n{ended}");
    }
    for hidden in ["avx", "avx2", "bmi1", "fma", "aes", "movbe", "abm"] {
        assert!(!flags.contains(&hidden), "{hidden}\n{ended}");
    }
}
