// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A whole Debian on virtio devices, and Debian's installer, where the KVM is hardware-style:
//! `cargo xtask test` runs these in the lab, whose machine has the Debian's image for its disk
//! (`xtask/src/distro` makes it). `LAB_DISTRO_*` and `LAB_INSTALLER_*` name the files.
//!
//! Times are printed and never asserted.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use support::{Running, Vmm, need_kvm};

/// systemd's start in an emulated machine within an emulated machine.
const LIMIT: Duration = Duration::from_secs(600);

const TAP: &str = "distro0";
/// The guest's address is in its image.
const GUEST: &str = "192.168.127.2";
const OURS: &str = "192.168.127.1";

fn named(name: &str) -> OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: cargo xtask test"))
}

fn busybox(words: &[&str]) {
    let status = Command::new(named("LAB_BUSYBOX"))
        .args(words)
        .status()
        .unwrap();
    assert!(status.success(), "busybox {words:?}: {status}");
}

/// The interface of the host that the guest's network is.
struct Tap;

impl Tap {
    fn new() -> Self {
        busybox(&["tunctl", "-t", TAP]);
        busybox(&["ifconfig", TAP, OURS, "netmask", "255.255.255.0", "up"]);
        Tap
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // A test that fails has said why already.
        let words = ["tunctl", "-d", TAP];
        let _ = Command::new(named("LAB_BUSYBOX")).args(words).status();
    }
}

/// Types a command into the guest's shell, where it is to succeed; what it wrote.
fn shell(running: &mut Running, number: u32, command: &str) -> String {
    let before = running.stdout().len();
    // The marks are not in what is typed, which the console echoes at first.
    let marks = format!("echo status-$(({number} + 1000))=$?; echo end-$(({number} + 1000))");
    running.type_in(format!("{command}; {marks}\n").as_bytes());
    running.wait_for(&format!("end-{}\r\n", number + 1000));
    let said = running.stdout().split_off(before);
    let (answer, status) = said
        .split_once(&format!("status-{}=", number + 1000))
        .unwrap();
    assert!(status.starts_with("0\r\n"), "{command}: {said}");
    answer.to_owned()
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_debian_runs_all_its_services_from_a_virtio_disk_and_powers_off() {
    need_kvm();
    let tap = Tap::new();
    let begun = Instant::now();
    let mut disk = OsString::from("path=");
    disk.push(named("LAB_DISTRO_DISK"));
    let mut running = Vmm::run(named("LAB_DISTRO_KERNEL"))
        .arg("--initrd")
        .arg(named("LAB_DISTRO_INITRD"))
        // Every character of the serial console costs the lab about a millisecond.
        .args(["--cmdline", "root=LABEL=guest console=ttyS0 quiet"])
        .args(["--memory", "512M", "--rng"])
        .arg("--disk")
        .arg(disk)
        .args(["--net", &format!("tap={TAP}")])
        .stdin_pipe()
        .limit(LIMIT)
        .start();
    running.wait_for("guest login: ");
    println!("login: {:.1} s", begun.elapsed().as_secs_f64());
    running.type_in(b"root\n");
    running.wait_for("root@guest:~# ");
    // Plainer than the login's shell, whose editing of lines is for people.
    running.type_in(b"exec sh\n");
    shell(&mut running, 0, "stty -echo; PS1=");

    // Not `degraded`, and not `starting` any more.
    let state = shell(&mut running, 1, "systemctl is-system-running --wait");
    assert!(state.starts_with("running"), "{state}");
    println!("running: {:.1} s", begun.elapsed().as_secs_f64());
    // The root is on the disk, and a write reaches it.
    let source = shell(&mut running, 2, "findmnt -no SOURCE,FSTYPE /");
    assert!(source.starts_with("/dev/vda ext4"), "{source}");
    shell(&mut running, 3, "date >/root/written && sync /root/written");
    let mut sshd = BufReader::new(TcpStream::connect((GUEST, 22)).unwrap());
    let mut greeting = String::new();
    sshd.read_line(&mut greeting).unwrap();
    assert!(greeting.starts_with("SSH-2.0-"), "{greeting}");
    // Nothing of this machine is amiss in the kernel's eyes; that it has no PCI is as it should be.
    let errors = "dmesg -l emerg,alert,crit,err | grep -v PCI; true";
    let errors = shell(&mut running, 4, errors);
    assert_eq!(errors, "");

    running.type_in(b"systemctl poweroff\n");
    let ended = running.wait();
    ended.expect_status(0).expect_silence();
    println!("power-off: {:.1} s", begun.elapsed().as_secs_f64());
    drop(tap);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn debians_installer_asks_for_a_language() {
    need_kvm();
    let begun = Instant::now();
    let mut running = Vmm::run(named("LAB_INSTALLER_KERNEL"))
        .arg("--initrd")
        .arg(named("LAB_INSTALLER_INITRD"))
        // With less memory its first screen is a word about that.
        .args(["--memory", "1G", "--shutdown-timeout", "0"])
        .args(["--cmdline", "console=ttyS0 loglevel=5"])
        .stdin_pipe()
        .limit(LIMIT)
        .start();
    running.wait_for("Select a language");
    println!("first screen: {:.1} s", begun.elapsed().as_secs_f64());
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}
