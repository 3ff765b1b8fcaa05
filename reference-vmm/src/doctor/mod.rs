// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What this host's KVM offers.

use std::io;
use std::path::Path;

/// Says what this host's KVM offers and tries it.
///
/// # Errors
/// `out` takes no more.
pub fn run(_json: bool, kvm_path: &Path, out: &mut dyn io::Write) -> io::Result<u8> {
    writeln!(out, "{}", kvm_path.display())?;
    Ok(1)
}
