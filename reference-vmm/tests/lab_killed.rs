// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a stock guest was told to be durable is there when its monitor is killed in the middle of writes, and when its
//! host crashes right behind that.
//!
//! A guest with an ext4 on a virtio disk adds records to a file and files to a folder, each with `fsync`, and says so
//! when that has returned (`guest-io records`, xtask/src/bin/guest_io.rs). The monitor is killed (SIGKILL), and the
//! image is looked at twice:
//! - As it is. A killed process takes no page cache with it, so this shows that the monitor answers nothing that it
//!   holds itself, and that what was under way has torn nothing that the journal does not mend.
//! - After the host's file system has lost all that was not synced to it ([`HostFs::crash`]). This shows that a flush is
//!   answered behind the host's own, and nothing else would. A disk with `cache=unsafe` is the counter-proof.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/host_fs.rs"]
mod host_fs;
mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use host_fs::{HostFs, e2fsprogs, make_ext4};
use support::lab::{alone, initrd_with_guest_io, scripted};
use support::long;

const LIMIT: Duration = Duration::from_secs(240);
/// The only one of the lab's kernels that has ext4 within.
const KERNEL: &str = "vmlinuz-cloud-6.1";
const RECORD: usize = 4096;
/// Of a round. It takes a guest under a second, and the host writes back what nobody flushes after five at the soonest.
const RECORDS: u64 = 40;

/// The record of that number, as `guest-io` writes it.
fn record(number: u64) -> Vec<u8> {
    (0..RECORD as u64 / 8)
        .flat_map(|at| {
            (number << 16 | at)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .to_le_bytes()
        })
        .collect()
}

/// What the guest has said to be durable.
#[derive(Default)]
struct Told {
    records: Vec<u64>,
    files: Vec<u64>,
}

impl Told {
    /// Takes in what a guest has said. Its last line may be cut off.
    fn read(&mut self, text: &str) {
        for line in text.split_inclusive('\n') {
            let Some(line) = line.strip_suffix("\r\n") else {
                continue;
            };
            for (prefix, list) in [
                ("guest: record ", &mut self.records),
                ("guest: file ", &mut self.files),
            ] {
                list.extend(line.strip_prefix(prefix).map(|n| n.parse::<u64>().unwrap()));
            }
        }
    }

    /// What of it is not in the image, or is not what was written.
    fn missing(&self, image: &Path) -> Vec<String> {
        let all = content(image, "records");
        let mut missing = Vec::new();
        for number in &self.records {
            let at = usize::try_from(*number).unwrap() * RECORD;
            if all.get(at..at + RECORD) != Some(&record(*number)) {
                missing.push(format!("record {number}"));
            }
        }
        for number in &self.files {
            let name = format!("file-{number}");
            if content(image, &name) != record(*number) {
                missing.push(name);
            }
        }
        missing
    }
}

/// A file within an image.
fn content(image: &Path, name: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let request = format!("dump /{name} {}", out.display());
    let (status, said) = e2fsprogs("debugfs", &["-R", &request, image.to_str().unwrap()]);
    assert_eq!(status, 0, "{said}");
    std::fs::read(out).unwrap_or_default()
}

/// The file system is in order behind its journal, and nothing but that had to be done.
fn expect_in_order(image: &Path) {
    let path = image.to_str().unwrap();
    // 1: the journal was worked off.
    let (status, said) = e2fsprogs("e2fsck", &["-p", path]);
    assert!(status <= 1, "e2fsck -p: status {status}\n{said}");
    let (status, said) = e2fsprogs("e2fsck", &["-fn", path]);
    assert_eq!(status, 0, "e2fsck -fn: {said}");
}

/// Runs a guest that writes, kills its monitor after some records, and notes what was told.
fn killed_in_the_middle(image: &Path, options: &str, told: &mut Told) {
    let first = told.records.last().map_or(0, |last| last + 1);
    let initrd = initrd_with_guest_io();
    let script = "mkdir /mnt; mount -t ext4 /dev/vda /mnt; exec guest-io records /mnt";
    let mut running = scripted(KERNEL, "virtio_blk", script)
        .arg("--initrd")
        .arg(&*initrd)
        .args(["--disk", &format!("path={},{options}", image.display())])
        .limit(LIMIT)
        .start();
    running.wait_for(&format!("guest: record {}\r\n", first + RECORDS));
    running.signal(libc::SIGKILL);
    let ended = running.wait();
    assert_eq!(ended.status.signal(), Some(libc::SIGKILL), "{ended}");
    assert!(!ended.text().contains("guest: noise"), "{ended}");
    let before = told.records.len();
    told.read(&ended.text());
    println!("{options}: {} records", told.records.len() - before);
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn what_was_flushed_outlives_the_monitors_kill_and_the_hosts_crash_and_fsck_accepts_the_rest() {
    let _turn = alone();
    let host = HostFs::new(256);
    let image = host.path("image");
    make_ext4(&image, 48);
    let mut told = Told::default();
    for _ in 0..if long() { 5 } else { 1 } {
        for options in ["io=uring", "io=threads", "io=uring,queues=2"] {
            killed_in_the_middle(&image, options, &mut told);
            // A check's own writes are not to help.
            let copy = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
            std::fs::copy(&image, copy.path()).unwrap();
            expect_in_order(copy.path());
            assert!(!told.files.is_empty());
            let missing = told.missing(copy.path());
            assert!(missing.is_empty(), "{options}: {missing:?}");

            host.crash();
            expect_in_order(&image);
            let missing = told.missing(&image);
            assert!(missing.is_empty(), "{options}, crash: {missing:?}");
        }
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn an_unsafe_disk_outlives_the_monitors_kill_and_not_the_hosts_crash() {
    let _turn = alone();
    let host = HostFs::new(256);
    let image = host.path("image");
    make_ext4(&image, 48);
    let mut told = Told::default();
    killed_in_the_middle(&image, "cache=unsafe", &mut told);
    let copy = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    std::fs::copy(&image, copy.path()).unwrap();
    expect_in_order(copy.path());
    assert_eq!(told.missing(copy.path()), Vec::<String>::new());
    host.crash();
    let last = told.records.last().unwrap();
    let missing = told.missing(&image);
    assert!(missing.contains(&format!("record {last}")), "{missing:?}");
}
