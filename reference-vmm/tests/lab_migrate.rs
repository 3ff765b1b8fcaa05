// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock Linux moves from process to process while it works: its memory, its disk and its connections go with it.
//!
//! The guest writes records to an ext4 with `fsync` (`guest-io records`), fills memory with random bytes and compares
//! their checksum, and counts on a TCP connection to the host. It moves back and forth between two addresses; what the
//! host hears has no gap, and the image is in order behind it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/host_fs.rs"]
mod host_fs;
#[path = "support/records.rs"]
mod records;
mod support;
#[path = "support/tap.rs"]
mod tap;

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use host_fs::make_ext4;
use records::{KERNEL, Told, expect_in_order};
use support::lab::{alone, initrd_with_guest_io, no_complaints, scripted};
use support::{Running, Vmm, long};

const HOST: [u8; 4] = [192, 168, 77, 1];
const LIMIT: Duration = Duration::from_secs(600);

/// The guest's numbers, as they come over its one connection.
fn numbers(port: u16) -> Receiver<u64> {
    let listener = TcpListener::bind((Ipv4Addr::from(HOST), port)).unwrap();
    let (say, heard) = channel();
    std::thread::spawn(move || {
        let (peer, _) = listener.accept().unwrap();
        for line in BufReader::new(peer).lines() {
            let Ok(Ok(number)) = line.map(|line| line.parse()) else {
                return;
            };
            if say.send(number).is_err() {
                return;
            }
        }
    });
    heard
}

/// Takes `count` numbers, each the one behind the last.
fn hear(heard: &Receiver<u64>, next: &mut u64, count: u64) {
    for _ in 0..count {
        let number = heard.recv_timeout(LIMIT);
        let number = number.expect("the guest's connection has gone on");
        assert_eq!(number, *next, "a number is lost, or comes again");
        *next += 1;
    }
}

/// A monitor at which a guest is waited for.
fn incoming(wire: &Path, api: &Path) -> Running {
    let to = format!("unix:{}", wire.display());
    let vmm = Vmm::command(["run", "--incoming", &to, "--api-sock"]).arg(api);
    let mut vmm = vmm.limit(LIMIT).start();
    vmm.wait_for_stderr("a guest is waited for");
    vmm
}

fn ctl(api: &Path, words: &[&str]) {
    let asked = Vmm::command(["ctl", "--timeout", "300", "--api-sock"]).arg(api);
    asked.args(words).limit(LIMIT).output().expect_status(0);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_moves_back_and_forth_under_load_and_loses_no_byte_of_memory_disk_or_connection() {
    let _turn = alone();
    let moves = if long() { 20 } else { 3 };
    tap::alone();
    tap::make_up("vm0", 0);
    tap::set_address("vm0", HOST);
    let heard = numbers(1001);
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| folder.path().join(name);
    let image = at("image");
    make_ext4(&image, 48);
    let initrd = initrd_with_guest_io();
    let script = "
        ifconfig eth0 192.168.77.2 up
        mkdir /mnt; mount -t ext4 /dev/vda /mnt
        (n=0; while :; do echo $n; n=$((n + 1)); usleep 50000; done | nc 192.168.77.1 1001) &
        (while :; do
            head -c 4194304 /dev/urandom >/tmp/noise
            md5sum /tmp/noise >/tmp/sum
            usleep 20000
            md5sum -c /tmp/sum >/dev/null || echo guest: damaged
        done) &
        exec guest-io records /mnt
    ";
    let api = |number: u32| at(&format!("api{}", number % 2));
    let mut vmm = scripted(KERNEL, "virtio_blk,virtio_net", script)
        .arg("--initrd")
        .arg(&*initrd)
        .args(["--disk", &format!("path={}", image.display())])
        .args(["--net", "tap=vm0,mac=02:00:00:00:00:77"])
        .arg("--api-sock")
        .arg(api(0))
        .limit(LIMIT)
        .start();
    let (mut next, mut told) = (0, Told::default());
    hear(&heard, &mut next, 10);
    for number in 1..=moves {
        let wire = at(&format!("wire{}", number % 2));
        let there = incoming(&wire, &api(number));
        let to = OsString::from(format!("unix:{}", wire.display()));
        let began = std::time::Instant::now();
        // A machine that is emulated on a busy host may send slower than its guest writes: a longer stop loses nothing.
        let words = [
            "migrate",
            "--to",
            to.to_str().unwrap(),
            "--when-stuck",
            "stop",
        ];
        ctl(&api(number - 1), &words);
        println!("move {number}: {:.1} s", began.elapsed().as_secs_f64());
        let here = std::mem::replace(&mut vmm, there).wait();
        here.expect_status(0);
        assert!(!here.text().contains("guest: damaged"), "{here}");
        no_complaints(&here);
        told.read(&here.text());
        // It goes on there.
        hear(&heard, &mut next, 20);
        let record = told.records.last().map_or(0, |last| last + 5);
        vmm.wait_for(&format!("guest: record {record}\r\n"));
    }
    vmm.signal(libc::SIGKILL);
    let ended = vmm.wait();
    assert_eq!(ended.status.signal(), Some(libc::SIGKILL), "{ended}");
    assert!(!ended.text().contains("guest: damaged"), "{ended}");
    told.read(&ended.text());
    expect_in_order(&image);
    let missing = told.missing(&image);
    assert!(missing.is_empty(), "{missing:?}");
}
