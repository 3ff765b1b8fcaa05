// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's command line: its limits, and its place in guest memory.

use vm_memory::GuestAddress;

use super::BootError;
use crate::arch::layout;

/// The longest command line that x86 Linux reads, without the NUL (`COMMAND_LINE_SIZE` - 1). A
/// bzImage says its own limit; an ELF file has no place for it.
pub(super) const LINUX_LIMIT: u64 = 2047;

/// Checks that a kernel reads all of `cmdline`, of which it takes `limit` bytes.
pub(super) fn check(cmdline: &str, limit: u64) -> Result<(), BootError> {
    if let Some(position) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul { position });
    }
    let len = cmdline.len() as u64;
    let limit = limit.min(layout::CMDLINE_MAX as u64 - 1);
    if len > limit {
        return Err(BootError::CmdlineTooLong { len, limit });
    }
    Ok(())
}

/// The bytes to write for it. None for an empty one: guest memory is zero, and a page not touched is
/// a page not resident.
pub(super) fn write(cmdline: &str) -> Option<(GuestAddress, Vec<u8>)> {
    if cmdline.is_empty() {
        return None;
    }
    let mut bytes = Vec::with_capacity(cmdline.len() + 1);
    bytes.extend_from_slice(cmdline.as_bytes());
    bytes.push(0);
    Some((layout::CMDLINE_ADDR, bytes))
}
