// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Without KVM, `reference-vmm doctor` says what to do and ends with status 1.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::{Command, Output};

use serde_json::Value;

fn doctor(args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_reference-vmm");
    Command::new(program)
        .arg("doctor")
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn without_the_device_it_says_what_to_do() {
    let output = doctor(&["--kvm", "/no/such/kvm"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("No KVM: cannot open /no/such/kvm"), "{text}");
    // Another file than KVM's says nothing about the host.
    let usual = std::path::Path::new("/dev/kvm").exists();
    let (advice, other) = match usual {
        true => ("there is a /dev/kvm", "cargo xtask lab"),
        false => ("cargo xtask lab", "there is a /dev/kvm"),
    };
    assert!(text.contains(advice) && !text.contains(other), "{text}");
    assert!(!text.contains("Checks"), "{text}");
}

#[test]
fn what_is_no_kvm_is_told_apart() {
    let output = doctor(&["--kvm", "/dev/null"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("/dev/null is no KVM device"), "{text}");
    for word in ["usermod", "modprobe"] {
        assert!(!text.contains(word), "{text}");
    }
}

#[test]
fn the_json_says_the_same() {
    let output = doctor(&["--json", "--kvm", "/no/such/\"kvm\"\t"]);
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["well"], false);
    assert_eq!(json["host"]["kind"], "none");
    assert_eq!(json["host"]["kvm"], "/no/such/\"kvm\"\t");
    assert_eq!(json["checks"], Value::Array(vec![]));
    let problem = json["host"]["problem"].as_array().unwrap();
    assert!(problem.len() >= 2, "{problem:?}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    // The reading end is closed before anything is written.
    let program = env!("CARGO_BIN_EXE_reference-vmm");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = Command::new(program)
        .args(["doctor", "--kvm", "/no/such/kvm"])
        .stdout(writer)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
}
