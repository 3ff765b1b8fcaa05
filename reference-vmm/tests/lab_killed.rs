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
#[path = "support/records.rs"]
mod records;
mod support;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use host_fs::{HostFs, make_ext4};
use records::{KERNEL, Told, expect_in_order};
use support::lab::{alone, initrd_with_guest_io, scripted};
use support::long;

const LIMIT: Duration = Duration::from_secs(240);
/// Of a round. It takes a guest under a second, and the host writes back what nobody flushes after five at the soonest.
const RECORDS: u64 = 40;

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
