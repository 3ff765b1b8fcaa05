// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio devices under stock Debian kernels: found through ACPI, driven by Debian's own drivers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use std::time::Duration;

use support::Vmm;
use support::lab::{alone, expect_done, lab_file, scripted};

const LIMIT: Duration = Duration::from_secs(180);

/// A guest that loads `modules` and runs `script`.
fn guest(kernel: &str, modules: &str, script: &str) -> Vmm {
    scripted(kernel, modules, script)
        .arg("--initrd")
        .arg(lab_file("initrd-devices.cpio.gz"))
        .limit(LIMIT)
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_draws_random_numbers_from_the_entropy_device_on_both_irqchips() {
    let _turn = alone();
    // Twice what the driver asks for at once, and again behind a rebind, which resets the device.
    let script = "
        cat /sys/class/misc/hw_random/rng_current | grep virtio
        dd if=/dev/hwrng bs=1 count=4096 2>/dev/null | wc -c | grep -x 4096
        cd /sys/bus/virtio/drivers/virtio_rng
        echo virtio0 >unbind
        echo virtio0 >bind
        dd if=/dev/hwrng bs=64 count=64 2>/dev/null | wc -c | grep -x 4096
        grep virtio0 /proc/interrupts
    ";
    for (kernel, irqchip, cpus) in [
        ("vmlinuz-cloud-6.1", "split", "1"),
        ("vmlinuz-cloud-6.1", "kernel", "4"),
        ("vmlinuz-6.12", "split", "4"),
        ("vmlinuz-6.12", "kernel", "1"),
    ] {
        let ended = guest(kernel, "virtio_rng", script)
            .args(["--rng", "--irqchip", irqchip, "--cpus", cpus])
            .output();
        expect_done(&ended);
    }
}

#[test]
#[ignore = "needs the lab: cargo xtask test"]
fn linux_reads_and_writes_disks_by_both_engines_and_keeps_to_a_readonly_one() {
    let _turn = alone();
    let pattern: Vec<u8> = (0..8 << 20u32)
        .map(|at: u32| (at * 7 + at / 512 * 13) as u8)
        .collect();
    for (kernel, irqchip, cpus, io) in [
        ("vmlinuz-cloud-6.1", "split", "2", "uring"),
        ("vmlinuz-6.12", "kernel", "1", "threads"),
    ] {
        let disk = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(disk.path(), &pattern).unwrap();
        let fixed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(fixed.path(), &pattern[..1 << 20]).unwrap();
        // Both halves are changed: the second becomes the first, and pieces of the first are zeroed. What is read
        // is read from the disk, and not from the guest's memory.
        let script = format!(
            "
            cd /sys/block
            grep -x 16384 vda/size
            grep -x disk-7 vda/serial
            grep -x 'write back' vda/queue/write_cache
            ls vda/mq | wc -l | grep -x {cpus}
            dd if=/dev/vda of=/dev/vda bs=64k count=64 seek=64 conv=notrunc,fsync 2>/dev/null
            echo 3 >/proc/sys/vm/drop_caches
            dd if=/dev/vda bs=64k count=64 2>/dev/null >/tmp/first
            dd if=/dev/vda bs=64k skip=64 2>/dev/null | cmp - /tmp/first
            dd if=/dev/zero of=/dev/vda bs=4k count=8 seek=3 conv=notrunc,fsync 2>/dev/null
            echo 'write through' >vda/queue/write_cache
            dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=100 conv=notrunc 2>/dev/null
            grep -x 1 vdb/ro
            grep -x 2048 vdb/size
            ! dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null
            head -c 1048576 /tmp/first | cmp - /dev/vdb
            cd /sys/bus/virtio/drivers/virtio_blk
            echo virtio0 >unbind
            echo virtio0 >bind
            dd if=/dev/vda bs=64k skip=64 2>/dev/null | cmp - /tmp/first
            sync
            "
        );
        let vda = format!(
            "path={},id=disk-7,queues={cpus},io={io}",
            disk.path().display()
        );
        let vdb = format!("path={},readonly,io={io}", fixed.path().display());
        let ended = guest(kernel, "virtio_blk", &script)
            .args(["--disk", &vda, "--disk", &vdb])
            .args(["--irqchip", irqchip, "--cpus", cpus])
            .output();
        expect_done(&ended);
        assert!(!ended.text().contains("I/O error"), "{ended}");
        let mut expected = pattern.clone();
        expected.copy_within(..4 << 20, 4 << 20);
        expected[3 * 4096..11 * 4096].fill(0);
        expected[100 * 4096..101 * 4096].fill(0);
        assert!(std::fs::read(disk.path()).unwrap() == expected);
        assert!(std::fs::read(fixed.path()).unwrap() == pattern[..1 << 20]);
    }
}
