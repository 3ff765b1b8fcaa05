// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memfds that can be handed to another process without trust in it: their size is sealed, since a touch beyond a
//! shrunk file's end would be a SIGBUS here, and they can not be made executable.

use super::sys::System;
use super::{HugePageSize, MapError};
use crate::Errno;
use std::fs::File;

/// `MFD_NOEXEC_SEAL`, Linux 6.3.
const MFD_NOEXEC_SEAL: u32 = 8;

/// A memfd of `size` bytes that cannot change its size.
pub(super) fn create(
    system: &dyn System,
    size: u64,
    huge: Option<HugePageSize>,
) -> Result<File, MapError> {
    let refused = |call| move |errno| MapError::Call { call, size, errno };
    let mut flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    if let Some(page) = huge {
        flags |= libc::MFD_HUGETLB | page.flag();
    }
    let file = match system.memfd_create(flags | MFD_NOEXEC_SEAL) {
        // A kernel that does not know the flag.
        Err(Errno(libc::EINVAL)) => system.memfd_create(flags),
        result => result,
    };
    let file = file.map_err(refused("memfd_create"))?;
    system.set_len(&file, size).map_err(refused("ftruncate"))?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    system
        .add_seals(&file, seals)
        .map_err(refused("fcntl(F_ADD_SEALS)"))?;
    Ok(file)
}
