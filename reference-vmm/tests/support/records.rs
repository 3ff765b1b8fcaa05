// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `guest-io records` (xtask/src/bin/guest_io.rs) has said to be durable in an ext4, and whether it is there.

#![allow(dead_code, reason = "each test has use for some")]

use std::path::Path;

use super::host_fs::e2fsprogs;

/// The only one of the lab's kernels that has ext4 within.
pub const KERNEL: &str = "vmlinuz-cloud-6.1";
const RECORD: usize = 4096;

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
pub struct Told {
    pub records: Vec<u64>,
    pub files: Vec<u64>,
}

impl Told {
    /// Takes in what a guest has said. Its last line may be cut off.
    pub fn read(&mut self, text: &str) {
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
    pub fn missing(&self, image: &Path) -> Vec<String> {
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
pub fn expect_in_order(image: &Path) {
    let path = image.to_str().unwrap();
    // 1: the journal was worked off.
    let (status, said) = e2fsprogs("e2fsck", &["-p", path]);
    assert!(status <= 1, "e2fsck -p: status {status}\n{said}");
    let (status, said) = e2fsprogs("e2fsck", &["-fn", path]);
    assert_eq!(status, 0, "e2fsck -fn: {said}");
}
