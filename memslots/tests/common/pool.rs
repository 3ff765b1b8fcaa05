// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Huge pages for a test: a host's root lets the pool of 2 MiB pages grow for a while.

/// Lets the pool grow for a while. Nothing is taken from the host but while it is used.
pub struct Overcommit(Option<String>);

impl Overcommit {
    const PATH: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";

    /// By this many pages, if this process may.
    pub fn raise(by: u64) -> Self {
        let Ok(before) = std::fs::read_to_string(Self::PATH) else {
            return Self(None);
        };
        let wanted = before.trim().parse::<u64>().unwrap() + by;
        let raised = std::fs::write(Self::PATH, wanted.to_string());
        Self(raised.is_ok().then_some(before))
    }
}

impl Drop for Overcommit {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            std::fs::write(Self::PATH, before.trim()).unwrap();
        }
    }
}
