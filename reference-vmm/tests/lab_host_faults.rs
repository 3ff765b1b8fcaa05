// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a stock guest sees of a host that fails: an I/O error, or a wait. The monitor lives and says why, and all goes
//! on when the cause is gone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/host_fs.rs"]
mod host_fs;
mod support;
#[path = "support/tap.rs"]
mod tap;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use host_fs::{HostFs, Small};
use support::lab::{PROMPT, Shell, alone, initrd_with_guest_io, interactive, lab_file};

const LIMIT: Duration = Duration::from_secs(300);
const KERNEL: &str = "vmlinuz-cloud-6.1";
/// Of each image, bytes.
const LEN: usize = 4 << 20;

/// What is written: no two blocks of it are the same.
const PATTERN: &str = "cd /tmp; seq 700000 | head -c 4194304 >pattern";

fn pattern() -> Vec<u8> {
    let mut all = Vec::new();
    for number in 1.. {
        if all.len() >= LEN {
            break;
        }
        all.extend(format!("{number}\n").bytes());
    }
    all.truncate(LEN);
    all
}

/// Writes the pattern to a disk, past the guest's cache.
fn write(disk: &str) -> String {
    format!("dd if=pattern of=/dev/{disk} bs=64k oflag=direct conv=fsync 2>/dev/null")
}

/// A disk that has room for a half of its file system's: writes fail until there is room for all.
fn full(shell: &mut Shell, disk: &str, small: &Small, image: &Path) {
    shell.run(&format!("! {}", write(disk)));
    let monitor = shell.monitor();
    monitor.wait_for_stderr("No space left on device (os error 28)");
    let told = format!("{}: cannot write ", image.display());
    assert!(monitor.stderr().contains(&told), "{}", monitor.stderr());
    // What fitted is there.
    shell.run(&format!("cmp -n 1048576 pattern /dev/{disk}"));
    small.resize(64);
    shell.run(&write(disk));
}

/// A disk whose image is cut to a quarter: reads behind that fail until it is long again.
fn short(shell: &mut Shell, disk: &str, image: &Path) {
    shell.run(&write(disk));
    let file = File::options().write(true).open(image).unwrap();
    file.set_len(LEN as u64 / 4).unwrap();
    let read =
        |at: u64| format!("dd if=/dev/{disk} bs=64k count=1 skip={at} iflag=direct 2>/dev/null");
    shell.run(&format!("! {} >part", read(32)));
    let monitor = shell.monitor();
    let told = format!("{}: cannot read ", image.display());
    monitor.wait_for_stderr(&told);
    let said = monitor.stderr();
    assert!(
        said.contains(" bytes at 2097152: unexpected end of file"),
        "{said}"
    );
    shell.run(&format!("{} >part; cmp -n 65536 part pattern", read(0)));
    file.set_len(LEN as u64).unwrap();
    // What was cut off is lost, and reads as zeros until it is written again.
    shell.run(&format!("{} | tr -d '\\0' | wc -c | grep -x 0", read(32)));
    shell.run(&write(disk));
}

/// A disk whose host stands still: writes wait, the guest's shell does not, and `other` is read.
fn hung(shell: &mut Shell, disk: &str, other: &str, host: &HostFs) {
    let frozen = host.frozen();
    shell.run(&format!("{{ {} && echo yes >written & }}", write(disk)));
    // Reads and writes under way.
    let busy = format!("awk '{{ print ($2 > 0) }}' /sys/block/{disk}/inflight");
    shell.until(&busy, "1");
    shell.run(&format!(
        "dd if=/dev/{other} of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null"
    ));
    shell.run("! [ -e written ]");
    drop(frozen);
    shell.run("wait; grep -x yes written");
}

/// Three disks of a guest: one whose host has no room, one that is cut short, one that stands still.
fn disks(io: &str) {
    let _turn = alone();
    let (small, host) = (Small::new(2), HostFs::new(64));
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let images = [
        small.path("image"),
        folder.path().join("image"),
        host.path("image"),
    ];
    let mut guest = interactive(KERNEL, "virtio_blk")
        .arg("--initrd")
        .arg(lab_file("initrd-devices.cpio.gz"))
        .limit(LIMIT);
    for image in &images {
        File::create(image).unwrap().set_len(LEN as u64).unwrap();
        let disk = format!("path={},io={io}", image.display());
        guest = guest.args(["--disk", &disk]);
    }
    let mut shell = Shell::at(guest.start(), PROMPT);
    shell.run(PATTERN);
    full(&mut shell, "vda", &small, &images[0]);
    short(&mut shell, "vdb", &images[1]);
    let said = shell.monitor().stderr();
    hung(&mut shell, "vdc", "vda", &host);
    // To wait is no error.
    assert_eq!(shell.monitor().stderr(), said);
    shell.type_in("exit\n");
    shell.wait().expect_status(0);
    let pattern = pattern();
    for image in images {
        let same = std::fs::read(&image).unwrap() == pattern;
        assert!(same, "{}", image.display());
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn io_uring_hands_on_a_full_a_cut_and_a_hung_image_to_the_guest_and_goes_on_behind_each() {
    disks("uring");
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn threads_hand_on_a_full_a_cut_and_a_hung_image_to_the_guest_and_go_on_behind_each() {
    disks("threads");
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_tap_that_goes_down_and_up_is_a_carrier_that_does_and_one_that_is_deleted_takes_it_for_good() {
    let _turn = alone();
    tap::alone();
    tap::make_up("vm0", 0);
    tap::set_address("vm0", [192, 168, 77, 1]);
    let guest = interactive(KERNEL, "virtio_net")
        .arg("--initrd")
        .arg(lab_file("initrd-devices.cpio.gz"))
        .args(["--net", "tap=vm0"])
        .limit(LIMIT);
    let mut shell = Shell::at(guest.start(), PROMPT);
    const CARRIER: &str = "cat /sys/class/net/eth0/carrier";
    // Whether a tap is up is found out by sending.
    const SEND: &str = "ping -c 1 -W 1 192.168.77.1 >/dev/null";
    shell.run("ifconfig eth0 192.168.77.2 up; ping -c 3 192.168.77.1");
    tap::set_up("vm0", false);
    shell.until(&format!("{SEND}; {CARRIER}"), "0");
    shell.monitor().wait_for_stderr("the tap \"vm0\" is down");
    tap::set_up("vm0", true);
    shell.until(CARRIER, "1");
    shell.run("ping -c 3 192.168.77.1");
    let deleted = Command::new("ip").args(["link", "del", "vm0"]).status();
    assert!(deleted.unwrap().success());
    shell.until(CARRIER, "0");
    shell.monitor().wait_for_stderr("the tap \"vm0\" is gone (");
    // The guest lives, and so does its device.
    shell.run(&format!("! {SEND}; ifconfig eth0 down && ifconfig eth0 up"));
    shell.type_in("exit\n");
    shell.wait().expect_status(0);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_program_that_does_not_read_stops_its_own_connection_and_costs_the_monitor_no_memory() {
    const BYTES: usize = 8 << 20;
    let _turn = alone();
    let initrd = initrd_with_guest_io();
    let folder = tempfile::tempdir().unwrap();
    let uds = folder.path().join("v.sock");
    // Echoes, when it may.
    let slow = UnixListener::bind(folder.path().join("v.sock_5001")).unwrap();
    let (go_on, may) = mpsc::channel::<()>();
    let echoed = std::thread::spawn(move || {
        let (mut peer, _) = slow.accept().unwrap();
        may.recv().unwrap();
        let mut all = Vec::new();
        peer.read_to_end(&mut all).unwrap();
        peer.write_all(&all).unwrap();
        all.len()
    });
    let quick = UnixListener::bind(folder.path().join("v.sock_5000")).unwrap();
    std::thread::spawn(move || {
        let (mut peer, _) = quick.accept().unwrap();
        std::io::copy(&mut peer.try_clone().unwrap(), &mut peer).unwrap();
    });
    let guest = interactive(KERNEL, "vmw_vsock_virtio_transport")
        .arg("--initrd")
        .arg(&*initrd)
        .args(["--memory", "256M,shared"])
        .args(["--vsock", &format!("cid=42,uds={}", uds.display())])
        .limit(LIMIT);
    let mut shell = Shell::at(guest.start(), PROMPT);
    let before = shell.monitor().rss_anon();
    shell.run("{ guest-io vsock slow >/tmp/said 2>&1 & }");
    // A thousand messages there and back, while nobody reads the other's.
    shell.run("guest-io round-trips");
    assert_eq!(shell.run("cat /tmp/said"), "");
    let monitor = shell.monitor();
    let beside = monitor.rss() - monitor.guest_rss();
    let grown = monitor.rss_anon().saturating_sub(before);
    println!(
        "the monitor's memory beside the guest's: {beside} KiB, {grown} more of its own than before"
    );
    // Of the first the program's own pages are some 5 MiB. What nobody reads would be 8 more, each way.
    assert!(grown < 1 << 10, "{grown} KiB more");
    assert!(beside < 6 << 10, "{beside} KiB");
    go_on.send(()).unwrap();
    shell.until("grep out /tmp/said | cat", "guest: vsock out 8388608");
    assert_eq!(echoed.join().unwrap(), BYTES);
    shell.type_in("exit\n");
    shell.wait().expect_status(0).expect_silence();
}
