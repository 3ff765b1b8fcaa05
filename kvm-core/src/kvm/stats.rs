// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `KVM_GET_STATS_FD`, and the file that it gives.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vmm_sys_util::errno::Error as Errno;

use crate::stats::ReadStats;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: u64 = 0xaece;

/// KVM's file of the statistics of a VM or a vCPU. The VM lives for as long as it does.
#[derive(Debug)]
pub struct StatsFd {
    // Closed before what it needs is let go of: fields are dropped in this order.
    file: File,
    /// The VM's file descriptor, or the vCPU's mapping. Linux before 6.5 (and before its fix reached the
    /// stable kernels, "KVM: Grab a reference to KVM for VM and vCPU stats file descriptors") let the
    /// file outlive the VM, and reading it then read freed memory.
    _vm: Arc<dyn Any + Send + Sync>,
}

impl StatsFd {
    /// Opens the statistics of `of`, which `vm` keeps alive.
    pub(super) fn open(of: &impl AsRawFd, vm: Arc<dyn Any + Send + Sync>) -> Result<Self, Errno> {
        // SAFETY: the call takes no argument and writes no memory of ours.
        let fd = unsafe { libc::ioctl(of.as_raw_fd(), KVM_GET_STATS_FD as _, 0 as libc::c_ulong) };
        if fd < 0 {
            return Err(Errno::from(io::Error::last_os_error()));
        }
        // SAFETY: KVM has just made this descriptor (close-on-exec), for us.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file, _vm: vm })
    }
}

impl AsFd for StatsFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl ReadStats for StatsFd {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        self.file.read_at(buf, offset).map_err(Errno::from)
    }
}
