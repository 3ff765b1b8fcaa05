// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A whole Debian on virtio devices, and Debian's installer, where the KVM is hardware-style:
//! `cargo xtask test` runs these in the lab, whose machine has the Debian's image for its disk
//! (`xtask/src/distro` makes it). `LAB_DISTRO_*` and `LAB_INSTALLER_*` name the files.
//!
//! Times are printed and never asserted.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use support::{Running, Vmm, need_kvm};

/// systemd's start in an emulated machine within an emulated machine.
const LIMIT: Duration = Duration::from_secs(600);

const TAP: &str = "distro0";
/// The guest's address is in its image.
const GUEST: &str = "192.168.127.2";
const OURS: &str = "192.168.127.1";

/// One guest at a time: the disk, the tap and the lab's processor are one.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

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
    let _turn = alone();
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

/// Gives back what each peer sends, behind its end too, for as long as the test lives.
fn echo<S: Read + Write + Send + 'static>(
    mut accept: impl FnMut() -> io::Result<S> + Send + 'static,
) {
    std::thread::spawn(move || {
        while let Ok(mut peer) = accept() {
            std::thread::spawn(move || {
                let mut data = vec![0; 64 << 10];
                while let Ok(some @ 1..) = peer.read(&mut data) {
                    if peer.write_all(&data[..some]).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

/// What the guest does at once, for `$seconds`: a disk written at random and read back with checksums; bytes to the host
/// and back by TCP and by vsock, compared.
const LOAD: &str = r#"
cd /tmp && head -c 8M /dev/urandom >bytes && rm -f bad
end=$(($(cut -d. -f1 /proc/uptime) + seconds))
round() {
    rounds=0
    while [ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ]; do
        socat -t 60 - "$2" <bytes | cmp - bytes || { echo "$1" >>bad; break; }
        rounds=$((rounds + 1))
    done
    echo "$1: $((rounds * 8)) MiB" >>done
}
round tcp "TCP:192.168.127.1:$port" &
round vsock VSOCK-CONNECT:2:5300 &
fio --name=load --filename=/dev/vdb --size=64M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio \
    --iodepth=16 --verify=crc32c --verify_backlog=256 --verify_fatal=1 --verify_state_save=0 --time_based \
    --runtime="$seconds" --output=fio.log || echo fio >>bad
wait
"#;

/// One that is the first process itself: its start is short, and nothing else runs.
fn under_load(cpus: &str, seconds: u32, port: u16) {
    need_kvm();
    let tap = Tap::new();
    echo({
        let listener = TcpListener::bind((OURS, port)).unwrap();
        move || listener.accept().map(|(peer, _)| peer)
    });
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let vsock = folder.path().join("vsock");
    echo({
        let listener = UnixListener::bind(folder.path().join("vsock_5300")).unwrap();
        move || listener.accept().map(|(peer, _)| peer)
    });
    let data = folder.path().join("disk");
    let file = std::fs::File::create(&data).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut disk = OsString::from("path=");
    disk.push(named("LAB_DISTRO_DISK"));
    let mut running = Vmm::run(named("LAB_DISTRO_KERNEL"))
        .arg("--initrd")
        .arg(named("LAB_DISTRO_INITRD"))
        .args([
            "--cmdline",
            "root=LABEL=guest rw console=ttyS0 quiet init=/bin/sh",
        ])
        .args(["--memory", "512M", "--cpus", cpus, "--rng"])
        .arg("--disk")
        .arg(disk)
        .args(["--disk", &format!("path={},queues={cpus}", data.display())])
        .args(["--net", &format!("tap={TAP}")])
        .args(["--vsock", &format!("cid=42,uds={}", vsock.display())])
        .stdin_pipe()
        .limit(LIMIT + Duration::from_secs(2 * u64::from(seconds)))
        .start();
    running.wait_for("# ");
    shell(&mut running, 0, "stty -echo; PS1=");
    shell(
        &mut running,
        1,
        "ip address add 192.168.127.2/24 dev eth0 && ip link set eth0 up",
    );
    shell(&mut running, 2, "modprobe vmw_vsock_virtio_transport");
    // By lines, so that none is longer than a terminal takes.
    shell(&mut running, 3, &format!("seconds={seconds} port={port}"));
    running.type_in(format!("cat >/tmp/load <<'END'\n{LOAD}END\n").as_bytes());
    shell(&mut running, 4, ". /tmp/load");
    println!(
        "{cpus} vCPUs: {}",
        shell(&mut running, 5, "cat done; grep -E 'WRITE|READ' fio.log")
    );
    assert_eq!(shell(&mut running, 6, "cat bad 2>/dev/null; true"), "");
    let errors = "dmesg -l emerg,alert,crit,err | grep -v PCI; true";
    assert_eq!(shell(&mut running, 7, errors), "");
    running.type_in(b"sync; echo o >/proc/sysrq-trigger\n");
    running.wait().expect_status(0).expect_silence();
    drop(tap);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_debian_under_load_loses_nothing_on_its_disk_its_network_and_its_vsock() {
    let long = std::env::var_os("LONG_TESTS").is_some();
    let _turn = alone();
    for (cpus, port) in [("1", 5201), ("4", 5202)] {
        under_load(cpus, if long { 300 } else { 30 }, port);
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn debians_installer_asks_for_a_language() {
    let _turn = alone();
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
