// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A stock Linux goes on from its snapshot: with its disk, with the right time, and with other random numbers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use support::lab::{base64, lab_file};
use support::{Running, Vmm, need_kvm};

const LIMIT: Duration = Duration::from_secs(180);

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Lets the guest at the prompt go on, to its end; the line that begins so.
fn go(mut guest: Running, prefix: &str) -> String {
    guest.type_in(b"go\n");
    let ended = guest.wait();
    ended.expect_status(0).expect_silence();
    let text = ended.text();
    assert!(text.contains("guest: script done"), "{ended}");
    for bad in [
        "Oops",
        "BUG:",
        "WARNING:",
        "soft lockup",
        "I/O error",
        "rcu_sched",
        "damaged",
    ] {
        assert!(!text.contains(bad), "{bad}\n{ended}");
    }
    let mut lines = text.lines();
    let line = lines.find_map(|line| line.trim().strip_prefix(prefix));
    line.unwrap_or_else(|| panic!("no {prefix:?}\n{ended}"))
        .to_owned()
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_goes_on_with_its_disk_at_the_right_time_and_draws_other_numbers() {
    need_kvm();
    let script = "
        dd if=/dev/urandom of=/dev/vda bs=64k count=32 conv=fsync 2>/dev/null
        md5sum /dev/vda >/tmp/sum
        echo guest: ready
        read line
        echo 3 >/proc/sys/vm/drop_caches
        md5sum -c /tmp/sum
        dmesg | grep 'crng reseeded due to virtual machine fork'
        sleep 1
        dd if=/dev/urandom of=/dev/vda bs=64k count=8 conv=fsync 2>/dev/null
        echo drawn $(head -c 16 /dev/urandom | md5sum) at $(date +%s)
    ";
    for (kernel, irqchip, cpus) in [
        ("vmlinuz-full-6.1", "split", "2"),
        ("vmlinuz-6.12", "kernel", "1"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let disk = std::fs::File::create(at("disk")).unwrap();
        disk.set_len(2 << 20).unwrap();
        drop(disk);
        let cmdline = format!(
            "console=ttyS0 quiet guest.modules=virtio_blk guest.script={}",
            base64(script)
        );
        let mut first = Vmm::run(lab_file(kernel))
            .arg("--initrd")
            .arg(lab_file("initrd-devices.cpio.gz"))
            .args(["--cmdline", &cmdline, "--irqchip", irqchip, "--cpus", cpus])
            .args(["--disk", &format!("path={}", at("disk").display())])
            .arg("--api-sock")
            .arg(at("api"))
            .stdin_pipe()
            .limit(LIMIT)
            .start();
        first.wait_for("guest: ready");
        for words in [
            &["pause"][..],
            &["snapshot", at("snapshot").to_str().unwrap()],
        ] {
            let asked = Vmm::command(["ctl", "--api-sock"])
                .arg(at("api"))
                .args(words);
            asked.limit(LIMIT).output().expect_status(0);
        }
        // Paused, it ends at once.
        first.signal(libc::SIGTERM);
        first.wait().expect_status(0);
        std::fs::copy(at("disk"), at("copy")).unwrap();

        let restore = |disk: Option<&str>| {
            let vmm = Vmm::command(["restore", "--from"]).arg(at("snapshot"));
            let vmm = match disk {
                Some(disk) => vmm.args(["--disk", &format!("0:path={}", at(disk).display())]),
                None => vmm,
            };
            vmm.stdin_pipe().limit(LIMIT)
        };
        let drawn: Vec<_> = [Some("copy"), None]
            .into_iter()
            .map(|disk| {
                let before = now();
                let line = go(restore(disk).start(), "drawn ");
                println!("{kernel} {irqchip}: {line}");
                let (numbers, time) = line.split_once(" at ").unwrap();
                let time: u64 = time.trim().parse().unwrap();
                // By the seconds' rounding, and none of the time that it stood still.
                assert!(time + 1 >= before, "{time}, and it was {before} before");
                numbers.to_owned()
            })
            .collect();
        assert_ne!(drawn[0], drawn[1], "both drew the same");
        // The guest has written to it.
        let moved_on = restore(None).output();
        moved_on
            .expect_status(2)
            .expect_line(&["has been written since"]);
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_at_work_goes_on_from_a_snapshot_in_the_background_and_so_does_its_original() {
    need_kvm();
    let script = "
        touch /tmp/rounds
        (
            while [ ! -e /tmp/stop ]; do
                dd if=/dev/urandom of=/tmp/a bs=64k count=16 2>/dev/null
                cp /tmp/a /tmp/b
                [ \"$(md5sum </tmp/a)\" = \"$(md5sum </tmp/b)\" ] || echo guest: damaged
                echo x >>/tmp/rounds
            done
        ) &
        echo guest: ready
        read line
        before=$(wc -l </tmp/rounds)
        sleep 2
        touch /tmp/stop
        wait
        echo rounds $before and $(wc -l </tmp/rounds)
    ";
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let cmdline = format!("console=ttyS0 quiet guest.script={}", base64(script));
    let mut first = Vmm::run(lab_file("vmlinuz-6.12"))
        .arg("--initrd")
        .arg(lab_file("initrd-devices.cpio.gz"))
        .args(["--cmdline", &cmdline])
        .arg("--api-sock")
        .arg(at("api"))
        .stdin_pipe()
        .limit(LIMIT)
        .start();
    first.wait_for("guest: ready");
    let asked = Vmm::command(["ctl", "--api-sock"]).arg(at("api")).args([
        "snapshot",
        at("s").to_str().unwrap(),
        "--background",
    ]);
    let told = asked.limit(LIMIT).output();
    println!("{}", told.expect_status(0).text());
    let restored = Vmm::command(["restore", "--from"]).arg(at("s"));
    let worked = |guest: Running| {
        let line = go(guest, "rounds ");
        println!("{line}");
        let (before, behind) = line.split_once(" and ").unwrap();
        assert!(behind.trim().parse::<u32>().unwrap() > before.parse().unwrap());
    };
    worked(first);
    worked(restored.stdin_pipe().limit(LIMIT).start());
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_goes_on_before_its_memory_is_read() {
    need_kvm();
    let script = "
        dd if=/dev/urandom of=/dev/vda bs=64k count=32 conv=fsync 2>/dev/null
        dd if=/dev/urandom of=/tmp/a bs=64k count=128 2>/dev/null
        md5sum /dev/vda /tmp/a >/tmp/sum
        echo guest: ready
        read line
        ( while [ ! -e /tmp/stop ]; do cat /tmp/a >/tmp/b; done ) &
        echo 3 >/proc/sys/vm/drop_caches
        md5sum -c /tmp/sum >/tmp/said || echo guest: damaged
        dd if=/dev/urandom of=/dev/vda bs=64k count=8 conv=fsync 2>/dev/null
        touch /tmp/stop
        wait
        cmp /tmp/a /tmp/b || echo guest: damaged
        echo kept $(grep -c OK /tmp/said)
    ";
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let disk = std::fs::File::create(at("disk")).unwrap();
    disk.set_len(2 << 20).unwrap();
    let cmdline = format!(
        "console=ttyS0 quiet guest.modules=virtio_blk guest.script={}",
        base64(script)
    );
    let mut first = Vmm::run(lab_file("vmlinuz-6.12"))
        .arg("--initrd")
        .arg(lab_file("initrd-devices.cpio.gz"))
        .args(["--cmdline", &cmdline, "--cpus", "2"])
        .args(["--disk", &format!("path={}", at("disk").display())])
        .arg("--api-sock")
        .arg(at("api"))
        .stdin_pipe()
        .limit(LIMIT)
        .start();
    first.wait_for("guest: ready");
    for words in [
        &["pause"][..],
        &["snapshot", at("plain").to_str().unwrap()],
        &[
            "snapshot",
            at("packed").to_str().unwrap(),
            "--compress",
            "zstd",
        ],
    ] {
        let asked = Vmm::command(["ctl", "--api-sock"])
            .arg(at("api"))
            .args(words);
        asked.limit(LIMIT).output().expect_status(0);
    }
    first.signal(libc::SIGTERM);
    first.wait().expect_status(0);
    for (from, words) in [
        ("plain", "--record=3"),
        ("plain", "--lazy"),
        ("plain", "--lazy --verify=off"),
        ("packed", "--lazy"),
    ] {
        std::fs::copy(at("disk"), at("copy")).unwrap();
        let restore = Vmm::command(["restore", "--from"])
            .arg(at(from))
            .args(["--disk", &format!("0:path={}", at("copy").display())])
            .words(words);
        let kept = go(restore.stdin_pipe().limit(LIMIT).start(), "kept ");
        assert_eq!(kept.trim(), "2", "{from} {words}");
    }
    assert!(at("plain").join("working_set").exists());
}
