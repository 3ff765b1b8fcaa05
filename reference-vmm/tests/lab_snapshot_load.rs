// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Debian is snapshotted again and again while it works, and goes on from old snapshots with the disk of each: nothing
//! of its memory and nothing that it was told to be durable is lost.
//!
//! On an ext4 fio writes blocks and verifies them, `guest-io records` appends records with `fsync`, and beside them random
//! bytes are written to memory and compared with their checksum. Full and incremental snapshots, plain and compressed,
//! make two chains or more. Some have the disk with them; from each of these a guest goes on, with all that was under way,
//! until it is told to end: then fio has found no block that is not what was written, e2fsck accepts the file system as it
//! is, and every record that was acknowledged is there.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/host_fs.rs"]
mod host_fs;
#[path = "support/records.rs"]
mod records;
mod support;

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use host_fs::{e2fsprogs, make_ext4};
use records::Told;
use support::lab::{Shell, alone, named, no_complaints};
use support::{Running, Vmm, long, need_kvm};

/// From the first snapshot to the last, of the long form in an emulated machine.
const LIMIT: Duration = Duration::from_secs(3000);

/// What the guest does until a line comes, and how it ends then. The root is read-only, so that every guest of it may have
/// the same; only what ends on `/dev/vdb` is the guest's own.
const LOAD: &str = r#"
mkdir /tmp/disk && mount -t ext4 /dev/vdb /tmp/disk
cat /dev/vdc >/tmp/guest-io && chmod +x /tmp/guest-io
/tmp/guest-io records /tmp/disk &
records=$!
verify() {
    rounds=0
    while [ ! -e /tmp/stop ]; do
        fio --name=load --directory=/tmp/disk --size=8M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio \
            --iodepth=16 --verify=crc32c --verify_backlog=128 --verify_fatal=1 --verify_state_save=0 \
            --eta=never --output=/tmp/fio.log || { echo "guest: fio failed"; cat /tmp/fio.log; break; }
        rounds=$((rounds + 1))
    done
    echo "guest: fio verified $rounds times"
}
verify &
verify=$!
remember() {
    while [ ! -e /tmp/stop ]; do
        head -c 2097152 /dev/urandom >/tmp/noise
        md5sum /tmp/noise >/tmp/sum
        sleep 0.05
        md5sum -c --quiet /tmp/sum || echo "guest: damaged"
    done
}
remember &
remember=$!
echo "guest: at work"
read -r line
touch /tmp/stop
kill $records
wait $records
wait $verify $remember
dmesg -l emerg,alert,crit,err | grep -v PCI | sed 's/^/guest: error /'
umount /tmp/disk && echo "guest: done"
echo o >/proc/sysrq-trigger
"#;

/// What the guest says of each record, with its number.
const RECORD: &str = "guest: record ";

fn disk(path: impl Into<OsString>, options: &str) -> OsString {
    let mut disk = OsString::from("path=");
    disk.push(path.into());
    disk.push(options);
    disk
}

/// Tells a guest to end, and looks at what it leaves behind in its disk.
fn ends_well(mut guest: Running, image: &Path, mut told: Told) {
    guest.type_in(b"go\n");
    let ended = guest.wait();
    ended.expect_status(0).expect_silence();
    let text = ended.text();
    assert!(text.contains("guest: done"), "{ended}");
    assert!(text.contains("guest: fio verified"), "{ended}");
    for bad in [
        "guest: fio failed",
        "guest: damaged",
        "guest: error",
        "guest-io:",
        "guest: noise",
    ] {
        assert!(!text.contains(bad), "{bad}\n{ended}");
    }
    no_complaints(&ended);
    let (status, said) = e2fsprogs("e2fsck", &["-fn", image.to_str().unwrap()]);
    assert_eq!(status, 0, "e2fsck -fn: {said}");
    told.read(&text);
    let missing = told.missing(image);
    assert!(missing.is_empty(), "{missing:?}");
    assert!(!told.files.is_empty());
    println!("  {} records are there", told.records.len());
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn a_debian_under_load_goes_on_from_old_snapshots_with_their_disks_and_has_lost_nothing() {
    // Its short form takes more than CI has.
    if !long() {
        return;
    }
    let _turn = alone();
    need_kvm();
    let (snapshots, full_each) = if long() { (50, 17) } else { (4, 2) };
    let has_disk = |number: usize| match long() {
        true => number % 5 == 2,
        false => matches!(number, 1 | 2),
    };
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| folder.path().join(name);
    let dir = |number: usize| at(&format!("s{number}"));
    make_ext4(&at("image"), 96);
    // The guest's program comes as a disk, in whole sectors.
    let mut program = std::fs::read(named("LAB_GUEST_IO")).unwrap();
    program.resize(program.len().next_multiple_of(512), 0);
    std::fs::write(at("guest-io"), program).unwrap();
    let running = Vmm::run(named("LAB_DISTRO_KERNEL"))
        .arg("--initrd")
        .arg(named("LAB_DISTRO_INITRD"))
        // Another test's guest may have left a journal behind that is to be worked off.
        .args([
            "--cmdline",
            "root=LABEL=guest ro rootflags=noload console=ttyS0 quiet init=/bin/sh",
        ])
        .args(["--memory", "256M", "--cpus", "2", "--rng"])
        .arg("--disk")
        .arg(disk(named("LAB_DISTRO_DISK"), ",readonly"))
        .arg("--disk")
        .arg(disk(at("image"), ""))
        .arg("--disk")
        .arg(disk(at("guest-io"), ",readonly"))
        .args(["--track-dirty-pages", "--api-sock"])
        .arg(at("api"))
        .stdin_pipe()
        .limit(LIMIT)
        .start();
    let mut shell = Shell::at(running, "# ");
    shell.run("mount -t tmpfs tmp /tmp");
    // By lines, so that none is longer than a terminal takes.
    shell.type_in(&format!("cat >/tmp/load <<'END'\n{LOAD}END\n"));
    shell.type_in(". /tmp/load\n");
    let mut guest = shell.into_monitor();
    guest.wait_for("guest: at work");

    // What was told before each snapshot that has the disk.
    let mut before = Vec::new();
    for number in 0..snapshots {
        guest.wait_for_more(RECORD, 11);
        if has_disk(number) {
            before.push((number, guest.stdout()));
        }
        let mut words = vec!["snapshot".into(), dir(number).into_os_string()];
        if number % full_each != 0 {
            words.extend(["--base".into(), dir(number - 1).into_os_string()]);
        }
        if number % 3 == 2 {
            words.extend(["--compress".into(), "zstd".into()]);
        }
        if has_disk(number) {
            words.extend(["--disks".into(), "copy".into()]);
        }
        let begun = Instant::now();
        let ctl = Vmm::command(["ctl", "--timeout", "300", "--api-sock"]).arg(at("api"));
        ctl.args(words).limit(LIMIT).output().expect_status(0);
        println!("snapshot {number}: {:.1} s", begun.elapsed().as_secs_f64());
    }
    // The first guest has lost nothing by all that.
    guest.wait_for_more(RECORD, 11);
    ends_well(guest, &at("image"), Told::default());
    std::fs::remove_file(at("image")).unwrap();

    for (number, said) in before {
        println!("from snapshot {number}");
        let to = at("to");
        std::fs::create_dir(&to).unwrap();
        let mut guest = Vmm::command(["restore", "--from"])
            .arg(dir(number))
            .arg("--disks-to")
            .arg(&to)
            .stdin_pipe()
            .limit(LIMIT)
            .start();
        guest.wait_for_more(RECORD, 11);
        let mut told = Told::default();
        told.read(&said);
        ends_well(guest, &to.join("disk1"), told);
        std::fs::remove_dir_all(&to).unwrap();
    }
}
