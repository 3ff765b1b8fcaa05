// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Processors as they are asked for, on this host's KVM: arranged, of a model, and what the guest asks of
//! them that nobody serves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use guests::{boot, cpu};
use kvm_core::arch::x86_64::cpuid::{Baseline, Template};
use support::{Vmm, elf, file, need_kvm};

#[test]
fn every_vcpu_starts_where_apic_ids_are_left_out_too() {
    need_kvm();
    let kernel = elf(boot::smp64());
    for (cpus, irqchip) in [
        ("6,sockets=2,cores=3", "split"),
        ("12,sockets=2,cores=3,threads=2", "kernel"),
        ("5,cores=1", "split"),
    ] {
        let count = cpus.split(',').next().unwrap();
        let ended = Vmm::run(&kernel)
            .args(["--debug-exit", "--cpus", cpus, "--irqchip", irqchip])
            .args(["--cmdline", count])
            .output();
        let dots = ".".repeat(count.parse().unwrap());
        ended.expect_status(1).expect_stdout(&dots).expect_silence();
    }
}

#[test]
fn a_model_that_the_host_cannot_be_is_refused_with_what_it_lacks_and_another_runs() {
    need_kvm();
    let kernel = elf(boot::hello64());
    let host = kvm_core::Kvm::open().unwrap().supported_cpuid().unwrap();
    let mut runs = 0;
    for (level, missing) in Template::levels(host.as_slice()) {
        let ended = Vmm::run(&kernel)
            .args(["--debug-exit", "--cpu", level.name()])
            .output();
        let told = Vmm::command(["cpu", "--cpu", level.name()]).output();
        if missing.is_empty() {
            ended
                .expect_status(1)
                .expect_stdout("hello\n")
                .expect_silence();
            told.expect_status(0).expect_silence();
            runs += 1;
        } else {
            let needles: Vec<_> = missing.iter().map(String::as_str).collect();
            for ended in [ended, told] {
                ended.expect_status(2).expect_stdout("");
                ended.expect_line(&[level.name()]).expect_line(&needles);
            }
            let json = Vmm::command(["cpu", "--json", "--cpu", level.name()]).output();
            json.expect_status(2).expect_line(&needles);
            let report: serde_json::Value = serde_json::from_str(&json.text()).unwrap();
            assert_eq!(report["missing"], serde_json::json!(missing));
        }
    }
    assert!(runs > 0, "not even {}", Baseline::V1);
}

#[test]
fn a_template_in_a_file_runs_and_what_it_changes_is_told() {
    need_kvm();
    let template = file(br#"{"name": "fleet", "clear": ["kvm_steal_time"]}"#);
    let path = template.display().to_string();
    let kernel = elf(boot::hello64());
    let ended = Vmm::run(&kernel)
        .args(["--debug-exit", "--cpu", &path])
        .output();
    ended
        .expect_status(1)
        .expect_stdout("hello\n")
        .expect_silence();

    let told = Vmm::command(["cpu", "--cpu", &path]).output();
    told.expect_status(0).expect_silence();
    assert!(told.text().starts_with("host: "), "{told}");
    for line in ["--cpu fleet:", "  0x40000001.0 eax: -kvm_steal_time\n"] {
        assert!(told.text().contains(line), "{told}");
    }
    let json = Vmm::command(["cpu", "--json", "--cpu", &path]).output();
    json.expect_status(0).expect_silence();
    let report: serde_json::Value = serde_json::from_str(&json.text()).unwrap();
    let changed = &report["differences"][0];
    assert_eq!(report["cpu"], "fleet");
    assert_eq!(report["missing"], serde_json::json!([]));
    assert_eq!(changed["leaf"], "0x40000001");
    assert_eq!(changed["removed"][0], "kvm_steal_time");
    assert_eq!(report["levels"][0]["name"], "x86-64-v1");
}

#[test]
fn a_refused_model_says_in_json_what_is_missing() {
    need_kvm();
    // No processor has both vendors' virtualization.
    let template = file(br#"{"name": "both", "set": ["vmx", "svm"]}"#);
    let path = template.display().to_string();
    let json = Vmm::command(["cpu", "--json", "--cpu", &path]).output();
    json.expect_status(2).expect_line(&["both needs what"]);
    let report: serde_json::Value = serde_json::from_str(&json.text()).unwrap();
    let missing = report["missing"].as_array().unwrap();
    assert!(!missing.is_empty() && report["differences"] == serde_json::json!([]));
}

#[test]
fn the_host_itself_is_told_to_be_unchanged() {
    need_kvm();
    let told = Vmm::command(["cpu"]).output();
    told.expect_status(0).expect_silence();
    assert!(
        told.text()
            .contains("--cpu host: what this host's KVM supports, unchanged")
    );
}

#[test]
fn an_msr_that_nobody_serves_is_told_once_and_faults() {
    need_kvm();
    for irqchip in ["split", "kernel", "none"] {
        let ended = Vmm::boot(cpu::unknown_msr64())
            .args(["--irqchip", irqchip, "--log", "info"])
            .output();
        // The guest has no handler for its fault.
        ended.expect_status(3);
        let line = " vcpu 0: read of MSR 0x4b564dee, which KVM does not know";
        assert_eq!(ended.stderr.matches(line).count(), 1, "{ended}");
        // On the usual level nothing is said of it.
        let quiet = Vmm::boot(cpu::unknown_msr64())
            .args(["--irqchip", irqchip])
            .output();
        quiet.expect_status(3);
        assert!(!quiet.stderr.contains("MSR"), "{quiet}");
    }
}
