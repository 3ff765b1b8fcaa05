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
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use support::lab::{Shell, alone, busybox, named};
use support::{Vmm, long, need_kvm};

/// systemd's start in an emulated machine within an emulated machine.
const LIMIT: Duration = Duration::from_secs(600);

const TAP: &str = "distro0";
/// The guest's address is in its image.
const GUEST: &str = "192.168.127.2";
const OURS: &str = "192.168.127.1";

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
    let mut shell = Shell::at(running, "# ");

    // Not `degraded`, and not `starting` any more.
    let state = shell.run("systemctl is-system-running --wait");
    assert!(state.starts_with("running"), "{state}");
    println!("running: {:.1} s", begun.elapsed().as_secs_f64());
    // The root is on the disk, and a write reaches it.
    let source = shell.run("findmnt -no SOURCE,FSTYPE /");
    assert!(source.starts_with("/dev/vda ext4"), "{source}");
    shell.run("date >/root/written && sync /root/written");
    let mut sshd = BufReader::new(TcpStream::connect((GUEST, 22)).unwrap());
    let mut greeting = String::new();
    sshd.read_line(&mut greeting).unwrap();
    assert!(greeting.starts_with("SSH-2.0-"), "{greeting}");
    // A login by vsock asks for this name, and no name server is within reach.
    let both = "getent -s files ahostsv4 UNKNOWN && getent -s files ahostsv6 UNKNOWN";
    shell.run(both);
    // Nothing of this machine is amiss in the kernel's eyes; that it has no PCI is as it should be.
    let errors = "dmesg -l emerg,alert,crit,err | grep -v PCI; true";
    assert_eq!(shell.run(errors), "");

    shell.type_in("systemctl poweroff\n");
    let ended = shell.wait();
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
/// and back by TCP and by vsock, compared; random numbers to hvc0, and bytes to a port.
const LOAD: &str = r#"
cd /tmp && head -c 8M /dev/urandom >bytes && rm -f bad done
end=$(($(cut -d. -f1 /proc/uptime) + seconds))
round() {
    rounds=0
    while [ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ]; do
        socat -t 60 - "$2" <bytes | cmp - bytes || { echo "$1" >>bad; break; }
        rounds=$((rounds + 1))
    done
    echo "$1: $((rounds * 8)) MiB" >>done
}
pour() {
    while [ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ]; do
        head -c 4096 "$1" || { echo "$2" >>bad; break; }
        sleep 1 # hvc0 takes the processor while it waits, which is for the others
    done >"$2"
}
round tcp "TCP:192.168.127.1:$port" &
round vsock VSOCK-CONNECT:2:5300 &
pour /dev/hwrng /dev/hvc0 &
pour bytes "/dev/$(cd /sys/class/virtio-ports && grep -l -x agent */name | cut -d/ -f1)" &
fio --name=load --filename=/dev/vdb --size=64M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio \
    --iodepth=16 --verify=crc32c --verify_backlog=256 --verify_fatal=1 --verify_state_save=0 --time_based \
    --runtime="$seconds" --output=fio.log || echo fio >>bad
wait
"#;

/// Memory of the monitor beside the guest's at its peak, KiB: all of it, and what is its own, without the pages of the program
/// and its libraries. Those are the page cache's, all monitors of a host share them, and how many are counted is chance in
/// part: the kernel maps what is cached of the 64 KiB around what runs.
const MEMORY: u64 = 7 << 10;
const OWN: u64 = 2 << 10;

/// One that is the first process itself: its start is short, and nothing else runs. It has all devices.
fn under_load(cpus: &str, memory: &str, seconds: u32, port: u16) {
    need_kvm();
    let tap = Tap::new();
    echo({
        let listener = TcpListener::bind((OURS, port)).unwrap();
        move || listener.accept().map(|(peer, _)| peer)
    });
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    echo({
        let listener = UnixListener::bind(path("vsock_5300")).unwrap();
        move || listener.accept().map(|(peer, _)| peer)
    });
    let file = std::fs::File::create(path("disk")).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut disk = OsString::from("path=");
    disk.push(named("LAB_DISTRO_DISK"));
    let running = Vmm::run(named("LAB_DISTRO_KERNEL"))
        .arg("--initrd")
        .arg(named("LAB_DISTRO_INITRD"))
        .args([
            "--cmdline",
            "root=LABEL=guest rw console=ttyS0 quiet init=/bin/sh",
        ])
        .args(["--memory", memory, "--cpus", cpus, "--rng"])
        .arg("--disk")
        .arg(disk)
        .args(["--disk", &format!("path={},queues={cpus}", path("disk"))])
        .args(["--net", &format!("tap={TAP}")])
        .args(["--vsock", &format!("cid=42,uds={}", path("vsock"))])
        .args(["--console", &format!("file={}", path("hvc0"))])
        .args(["--port", &format!("name=agent,unix={}", path("agent"))])
        .stdin_pipe()
        .limit(LIMIT + Duration::from_secs(2 * u64::from(seconds)))
        .start();
    let mut shell = Shell::at(running, "# ");
    // What is written to the port.
    let mut agent = UnixStream::connect(path("agent")).unwrap();
    let poured = std::thread::spawn(move || io::copy(&mut agent, &mut io::sink()).unwrap());
    shell.run("ip address add 192.168.127.2/24 dev eth0 && ip link set eth0 up");
    shell.run("modprobe -a vmw_vsock_virtio_transport virtio_console virtio_rng");
    // By lines, so that none is longer than a terminal takes.
    shell.run(&format!("seconds={seconds} port={port}"));
    shell.type_in(&format!("cat >/tmp/load <<'END'\n{LOAD}END\n"));
    shell.run(". /tmp/load");
    println!(
        "{cpus} vCPUs: {}",
        shell.run("cat done; grep -E 'WRITE|READ' fio.log")
    );
    assert_eq!(shell.run("cat bad 2>/dev/null; true"), "");
    let errors = "dmesg -l emerg,alert,crit,err | grep -v PCI; true";
    assert_eq!(shell.run(errors), "");
    if memory.contains("shared,prefault") {
        // All of the guest's memory is there from the start, so the peak is what the monitor's own adds to it.
        let monitor = shell.monitor();
        let beside = monitor.peak_rss() - monitor.guest_rss();
        let own = beside - monitor.rss_file();
        println!(
            "{cpus} vCPUs: the monitor's peak memory beside the guest's: {beside} KiB, its own {own}"
        );
        assert!(
            own <= OWN && beside <= MEMORY,
            "{beside} KiB, its own {own}"
        );
    }
    shell.type_in("sync; echo o >/proc/sysrq-trigger\n");
    shell.wait().expect_status(0).expect_silence();
    let hvc0 = std::fs::metadata(path("hvc0")).unwrap().len();
    let poured = poured.join().unwrap();
    println!("{cpus} vCPUs: {hvc0} bytes by hvc0, {poured} by the port");
    assert!(hvc0 > 0 && poured > 0);
    drop(tap);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_debian_under_load_loses_nothing_and_takes_2_mib_of_its_own_beside_the_guests_memory() {
    let _turn = alone();
    let seconds = if long() { 300 } else { 30 };
    for (cpus, memory, port) in [("1", "512M", 5201), ("4", "512M,shared,prefault", 5202)] {
        under_load(cpus, memory, seconds, port);
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
