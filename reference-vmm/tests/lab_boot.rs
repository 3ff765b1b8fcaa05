// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stock Debian kernels as guests, where the KVM is hardware-style: `cargo xtask test` runs these in
//! the lab. `LAB_KERNELS` names a folder with the kernels and an initramfs whose init says what the
//! guest sees (`xtask/src/guest-init.sh`) and does what `guest.then=` on its command line asks for.
//!
//! Times are printed and never asserted.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::{Duration, Instant};

use support::lab::{alone, lab_file, no_complaints};
use support::pty::Pty;
use support::{Ended, Running, Vmm, need_kvm};

/// An emulated machine inside an emulated machine takes its time, and a broken one must not take
/// all of it.
const LIMIT: Duration = Duration::from_secs(180);

/// A kernel with the initramfs that reports, its console on stdout.
fn linux(kernel: &str, cmdline: &str) -> Vmm {
    need_kvm();
    Vmm::run(lab_file(kernel))
        .arg("--initrd")
        .arg(lab_file("initrd-scripted.cpio.gz"))
        .args(["--cmdline", &format!("console=ttyS0 {cmdline}")])
        .limit(LIMIT)
}

/// What `guest: NAME …` said.
fn said(ended: &Ended, name: &str) -> String {
    let prefix = format!("guest: {name} ");
    let text = ended.text();
    let line = text
        .lines()
        .find_map(|line| line.trim_end().strip_prefix(&prefix));
    line.unwrap_or_else(|| panic!("the guest's init said no {name:?}\n{ended}"))
        .to_owned()
}

/// Boots to the power-off, and checks what the guest says of its machine.
fn boots(kernel: &str, cpus: u32, memory: &str, mib: u64) {
    let begun = Instant::now();
    let ended = linux(kernel, "")
        .args(["--cpus", &cpus.to_string(), "--memory", memory])
        .output();
    ended.expect_status(0).expect_silence();
    println!(
        "{kernel}, {cpus} vCPUs, {memory}: {:.1} s",
        begun.elapsed().as_secs_f64()
    );

    assert_eq!(said(&ended, "cpus"), cpus.to_string(), "{ended}");
    let online = match cpus {
        1 => "0".to_owned(),
        n => format!("0-{}", n - 1),
    };
    assert_eq!(said(&ended, "online"), online, "{ended}");
    let total: u64 = said(&ended, "memory")
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .unwrap();
    // The kernel keeps its image, its page array (1/64) and, on small machines, a few MiB more.
    let least = (mib - mib / 32).saturating_sub(72) * 1024;
    assert!(
        (least..=mib * 1024).contains(&total),
        "{total} KiB of {mib} MiB\n{ended}"
    );
    let clock = said(&ended, "clocksource");
    assert!(
        ["kvm-clock", "tsc"].contains(&&*clock),
        "clock source {clock}\n{ended}"
    );
    no_complaints(&ended);
}

/// Every pair of kernel, number of vCPUs, size of memory and kind of image is in one of nine boots:
/// a Latin square.
macro_rules! pairwise {
    ($($name:ident: $kernel:literal, $cpus:literal, $memory:literal, $mib:literal;)*) => {$(
        #[test]
        #[ignore = "needs the lab: cargo xtask test"]
        fn $name() {
            let _turn = alone();
            boots($kernel, $cpus, $memory, $mib);
        }
    )*};
}

pairwise! {
    cloud_6_1_with_1_vcpu_and_128_mib: "vmlinuz-cloud-6.1", 1, "128M", 128;
    cloud_6_1_elf_with_2_vcpus_and_1_gib: "vmlinux-cloud-6.1", 2, "1G", 1024;
    cloud_6_1_with_4_vcpus_and_6_gib: "vmlinuz-cloud-6.1", 4, "6G", 6144;
    full_6_1_elf_with_1_vcpu_and_1_gib: "vmlinux-full-6.1", 1, "1G", 1024;
    full_6_1_with_2_vcpus_and_6_gib: "vmlinuz-full-6.1", 2, "6G", 6144;
    full_6_1_with_4_vcpus_and_128_mib: "vmlinuz-full-6.1", 4, "128M", 128;
    newer_6_12_with_1_vcpu_and_6_gib: "vmlinuz-6.12", 1, "6G", 6144;
    newer_6_12_with_2_vcpus_and_128_mib: "vmlinuz-6.12", 2, "128M", 128;
    newer_6_12_elf_with_4_vcpus_and_1_gib: "vmlinux-6.12", 4, "1G", 1024;
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_has_the_same_interrupts_on_both_irqchips() {
    let _turn = alone();
    for kernel in ["vmlinuz-cloud-6.1", "vmlinuz-6.12"] {
        let pins = ["split", "kernel"].map(|irqchip| {
            let ended = linux(kernel, "quiet")
                .args(["--cpus", "2", "--irqchip", irqchip])
                .output();
            ended.expect_status(0).expect_silence();
            no_complaints(&ended);
            let text = ended.text();
            let pins = text
                .lines()
                .filter_map(|line| line.trim_end().strip_prefix("guest: pin "));
            pins.map(str::to_owned).collect::<Vec<_>>()
        });
        assert_eq!(pins[0], pins[1], "{kernel}");
        for device in ["4-edge ttyS0", "9-edge ACPI:Ged"] {
            assert!(
                pins[0].iter().any(|pin| pin == device),
                "{kernel}: {pins:?}"
            );
        }
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn reboot_ends_the_monitor_with_status_0() {
    let _turn = alone();
    let ended = linux("vmlinuz-cloud-6.1", "quiet guest.then=reboot").output();
    ended.expect_status(0).expect_silence();
    assert!(ended.text().contains("guest: reboot"), "{ended}");
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn sigterm_reaches_the_guest_as_its_power_button() {
    let _turn = alone();
    for kernel in ["vmlinuz-cloud-6.1", "vmlinuz-6.12"] {
        let mut running = linux(kernel, "quiet guest.then=wait")
            .args(["--shutdown-timeout", "3600"])
            .start();
        running.wait_for("guest: waiting");
        running.signal(libc::SIGTERM);
        let ended = running.wait();
        ended.expect_status(0).expect_silence();
        assert!(ended.text().contains("guest: button"), "{kernel}: {ended}");
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_kernel_panic_ends_the_monitor_with_status_3() {
    let _turn = alone();
    for kernel in ["vmlinuz-full-6.1", "vmlinuz-6.12"] {
        // pvpanic's driver tells of it; the kernel itself would wait for ever.
        let ended = linux(kernel, "quiet panic=0 guest.then=panic").output();
        ended.expect_status(3).expect_line(&["panic"]);
        assert!(ended.text().contains("Kernel panic"), "{kernel}: {ended}");
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_panic_before_the_pvpanic_driver_reboots_where_the_kernel_is_told_to() {
    let _turn = alone();
    let ended = linux("vmlinuz-cloud-6.1", "quiet panic=-1 rdinit=/no/such/init").output();
    ended.expect_status(0).expect_silence();
    assert!(ended.text().contains("Kernel panic"), "{ended}");
}

fn type_and_wait(running: &mut Running, line: &str, answer: &str) {
    running.type_in(line.as_bytes());
    running.wait_for(answer);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_shell_on_the_serial_console_answers() {
    let _turn = alone();
    let mut running = linux("vmlinuz-cloud-6.1", "quiet guest.then=shell")
        .stdin_pipe()
        .start();
    running.wait_for("guest: a shell");
    type_and_wait(&mut running, "echo answer-$((6 * 7))\n", "answer-42");
    type_and_wait(&mut running, "nproc | sed s/^/cpus-/\n", "cpus-1");
    running.type_in(b"exit\n");
    let ended = running.wait();
    ended.expect_status(0).expect_silence();
    assert!(ended.text().contains("guest: poweroff"), "{ended}");
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_terminal_talks_to_the_guests_shell_and_is_restored() {
    let _turn = alone();
    let pty = Pty::new();
    let before = pty.settings();
    let mut running = linux("vmlinuz-cloud-6.1", "quiet guest.then=shell")
        .stdin_file(pty.terminal())
        .start();
    running.wait_for("guest: a shell");
    assert!(pty.settings().is_raw());
    // Ctrl-C is the guest's: it ends the sleep and not the monitor.
    pty.type_in(b"sleep 1000; echo after-$((1 + 1))\r");
    running.wait_for("sleep 1000");
    pty.type_in(b"\x03");
    pty.type_in(b"echo still-$((20 + 3))\r");
    running.wait_for("still-23");
    pty.type_in(b"\x01x");
    running.wait().expect_status(0).expect_silence();
    assert_eq!(pty.settings(), before);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_kilobyte_typed_at_once_reaches_the_guest_whole() {
    let _turn = alone();
    let mut running = linux("vmlinuz-cloud-6.1", "quiet guest.then=echo")
        .stdin_pipe()
        .start();
    running.wait_for("guest: listening");
    let lines: Vec<_> = (0..20)
        .map(|i| format!("line-{i}-{}", "x".repeat(50)))
        .collect();
    running.type_in((lines.join("\n") + "\nquit\n").as_bytes());
    let ended = running.wait();
    ended.expect_status(0).expect_silence();
    let text = ended.text();
    for line in lines {
        assert!(
            text.contains(&format!("guest: echo {line}")),
            "no {line}\n{ended}"
        );
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn memtest86_shows_its_banner() {
    let _turn = alone();
    need_kvm();
    let mut running = Vmm::run(lab_file("memtest86+x64.bin"))
        .args([
            "--cmdline",
            "console=ttyS0,115200",
            "--memory",
            "64M",
            "--shutdown-timeout",
            "0",
        ])
        .limit(LIMIT)
        .start();
    running.wait_for("Memtest86+");
    running.signal(libc::SIGTERM);
    running.wait().expect_status(0);
}
