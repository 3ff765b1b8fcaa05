// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! On a host with KVM, `reference-vmm doctor` tries everything and everything works.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::process::Command;

use reference_vmm::doctor::{self, Kind, Verdict};
use serde_json::Value;

const KVM: &str = "/dev/kvm";

fn doctor(args: &[&str]) -> (Option<i32>, String) {
    let program = env!("CARGO_BIN_EXE_reference-vmm");
    let output = Command::new(program)
        .arg("doctor")
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
    )
}

#[test]
fn every_check_passes_or_says_what_the_host_lacks() {
    let report = doctor::examine(Path::new(KVM));
    assert_ne!(
        report.host.kind,
        Kind::None,
        "these tests need {KVM}: {:?}",
        report.host.problem
    );
    assert_eq!(report.checks.len(), 11);
    for check in &report.checks {
        match &check.verdict {
            Verdict::Ok { micros } => assert!(*micros > 0.0, "{}", check.name),
            // Older kernels have none, and the capability says so.
            Verdict::Unavailable(why) if check.name == "guest_memfd" => {
                assert!(why.contains("Linux 6.18"), "{why}");
                let mut capabilities = report.capabilities.iter();
                let flags = capabilities.find(|cap| cap.name == "GUEST_MEMFD_FLAGS");
                assert_ne!(flags.unwrap().value & 3, 3);
            }
            // The one thing that a host with KVM may keep from a user.
            Verdict::Unavailable(why) if check.name == "page fault" => {
                assert_eq!(Some(why), report.host.userfaultfd.as_ref().err());
            }
            other => panic!("{}: {other:?}", check.name),
        }
    }
    assert!(report.is_well());
}

#[test]
fn the_text_has_a_line_for_each_check_and_the_json_the_same() {
    let (status, text) = doctor(&[]);
    assert_eq!(status, Some(0), "{text}");
    let (status, json) = doctor(&["--json"]);
    assert_eq!(status, Some(0), "{json}");
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["well"], true);
    assert_eq!(json["host"]["kvm"], KVM);
    for check in json["checks"].as_array().unwrap() {
        let (status, name) = (
            check["status"].as_str().unwrap(),
            check["name"].as_str().unwrap(),
        );
        let line = format!("  {status:<12} {name:<12}");
        assert!(
            text.lines().any(|shown| shown.starts_with(&line)),
            "no {line:?} in {text}"
        );
        assert_eq!(check["micros"].is_f64(), status == "ok");
    }
    for crate_name in [
        "kvm-core",
        "memslots",
        "io-bus",
        "irq-routing",
        "dirty-log",
        "async-pf",
    ] {
        for list in ["checks", "capabilities"] {
            let of_crate = |entry: &&Value| entry["crate"] == crate_name;
            let entries = json[list].as_array().unwrap();
            assert!(
                entries.iter().any(|entry| of_crate(&entry)),
                "{list} of {crate_name}"
            );
        }
    }
}

#[test]
fn without_descriptors_it_says_what_it_could_not_read() {
    use std::os::unix::process::CommandExt;
    let program = env!("CARGO_BIN_EXE_reference-vmm");
    let mut command = Command::new(program);
    // KVM gets the last descriptor: what this test has inherited goes no further.
    // SAFETY: close_range and setrlimit are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            let limit = libc::rlimit {
                rlim_cur: 4,
                rlim_max: 4,
            };
            let on_exec = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
            if libc::close_range(3, libc::c_uint::MAX, on_exec) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            match libc::setrlimit(libc::RLIMIT_NOFILE, &limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let output = command.arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("  not read     "), "{text}");
    assert!(text.contains("Too many open files"), "{text}");
    assert!(!text.contains("none to be seen"), "{text}");
}
