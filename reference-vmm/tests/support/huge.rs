// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Huge pages for tests, where the host has some.

use std::io::Write as _;
use std::path::PathBuf;

/// Huge pages reserved for a test, and given back.
pub struct Reserved {
    file: PathBuf,
    before: String,
}

impl Reserved {
    /// `pages` more pages of this size; what stands in the way otherwise.
    pub fn new(kib: u64, pages: u64) -> Result<Self, String> {
        let folder = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB"));
        let file = folder.join("nr_hugepages");
        let read = |name: &str| std::fs::read_to_string(folder.join(name));
        let before = read("nr_hugepages").map_err(|e| format!("{}: {e}", file.display()))?;
        let wanted = before.trim().parse::<u64>().unwrap() + pages;
        std::fs::write(&file, wanted.to_string())
            .map_err(|e| format!("{}: {e}", file.display()))?;
        let reserved = Reserved { file, before };
        let free: u64 = read("free_hugepages").unwrap().trim().parse().unwrap();
        match free >= pages {
            true => Ok(reserved),
            false => Err(format!("{free} of {pages} pages of {kib} KiB")),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.file, &self.before);
    }
}

/// Says it where also a test that passes is heard.
pub fn not_tried(why: &str) {
    let _ = writeln!(
        std::io::stderr(),
        "NOT TRIED: no huge pages can be reserved on this host: {why}"
    );
}
