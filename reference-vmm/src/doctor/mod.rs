// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `reference-vmm doctor`: what this host's KVM offers, and whether it does what it says.
//!
//! ```text
//!   host          which kind of host this is, and what to do where it has no KVM
//!   coming        whether memory can come later here, and be written in the background
//!   capabilities  what KVM says it can do, and which crate wants it
//!   checks        what it does: each of `trials` builds a VM of its own with the guest of `guest`,
//!                 and drives it through the crates that a monitor is made of
//!   report        all of it as data, as text and as JSON
//! ```
//!
//! Nothing here can hang: every check runs on a thread of its own with a limit, and what does not
//! come back is reported and left behind.

mod capabilities;
mod checks;
mod coming;
mod guest;
mod host;
mod report;
mod trials;

use std::io;
use std::path::Path;

pub use capabilities::{Capability, Need};
pub use checks::{Check, Verdict};
pub use coming::{UFFD_USES, UffdUse};
pub use host::{Host, Kind};
pub use report::Report;

/// Exit status where something that was tried does not work, or nothing could be tried.
const SOMETHING_IS_WRONG: u8 = 1;

/// Examines the host whose KVM device is at `kvm_path`. Blocks for a fraction of a second; where
/// checks fail because the guest does not answer, for some seconds each.
pub fn examine(kvm_path: &Path) -> Report {
    let (host, kvm) = host::examine(kvm_path);
    let Some(kvm) = kvm else {
        return Report {
            host,
            capabilities: Vec::new(),
            checks: Vec::new(),
        };
    };
    let capabilities = capabilities::ask(&kvm);
    drop(kvm);
    Report {
        host,
        capabilities,
        checks: checks::run_all(kvm_path),
    }
}

/// Says what this host's KVM offers and tries it, and returns the process's exit status: 0 where
/// everything that could be tried works.
///
/// # Errors
/// `out` takes no more. A reader that has seen enough (`| head`) is no error.
pub fn run(json: bool, kvm_path: &Path, out: &mut dyn io::Write) -> io::Result<u8> {
    let report = examine(kvm_path);
    let text = if json {
        report.to_json()
    } else {
        report.to_string()
    };
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
        _ => {}
    }
    Ok(if report.is_well() {
        0
    } else {
        SOMETHING_IS_WRONG
    })
}
