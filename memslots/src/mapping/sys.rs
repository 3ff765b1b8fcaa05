// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The system calls that mappings are made with: the edge. A trait, so that a test refuses each of them in turn.

use super::numa::Binding;
use crate::Errno;
use std::ffi::{c_int, c_void};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Where and how to map.
#[derive(Clone, Copy)]
pub(super) struct MapRequest<'a> {
    /// There, if nobody is there (EEXIST), or, of a kernel before 4.17, elsewhere; `None` is anywhere.
    pub at: Option<*mut c_void>,
    pub length: usize,
    pub protection: c_int,
    pub flags: c_int,
    pub file: Option<(&'a File, i64)>,
}

/// The calls. Each answers as the kernel does.
pub(super) trait System: Sync {
    /// # Safety
    /// The flags replace no mapping.
    unsafe fn mmap(&self, request: MapRequest<'_>) -> Result<*mut c_void, Errno>;

    /// # Safety
    /// The range is the caller's own and nobody uses it any more.
    unsafe fn munmap(&self, start: *mut c_void, length: usize) -> Result<(), Errno>;

    /// # Safety
    /// The range is mapped, and stays so during the call; the advice takes no contents away from who else uses it.
    unsafe fn madvise(&self, start: *mut c_void, length: usize, advice: c_int)
    -> Result<(), Errno>;

    /// # Safety
    /// The range is mapped, and stays so during the call. (A policy takes no contents away.)
    unsafe fn mbind(
        &self,
        start: *mut c_void,
        length: usize,
        binding: &Binding,
    ) -> Result<(), Errno>;

    /// The NUMA nodes with memory as sysfs lists them; `None` on a host without NUMA (or without sysfs).
    fn numa_nodes(&self) -> Option<String>;

    fn memfd_create(&self, flags: u32) -> Result<File, Errno>;

    fn set_len(&self, file: &File, length: u64) -> Result<(), Errno>;

    fn add_seals(&self, file: &File, seals: c_int) -> Result<(), Errno>;
}

/// The kernel.
#[derive(Debug)]
pub(super) struct Kernel;

pub(super) fn last_errno() -> Errno {
    // The last OS error always has a number.
    Errno(
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO),
    )
}

fn check(result: c_int) -> Result<(), Errno> {
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

impl System for Kernel {
    unsafe fn mmap(&self, request: MapRequest<'_>) -> Result<*mut c_void, Errno> {
        let MapRequest {
            at,
            length,
            protection,
            mut flags,
            file,
        } = request;
        if at.is_some() {
            flags |= libc::MAP_FIXED_NOREPLACE;
        }
        let at = at.unwrap_or(std::ptr::null_mut());
        let (fd, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
        // SAFETY: a new mapping disturbs no other; nor does one at a given place, which takes nobody's.
        let base = unsafe { libc::mmap(at, length, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            Err(last_errno())
        } else {
            Ok(base)
        }
    }

    unsafe fn munmap(&self, start: *mut c_void, length: usize) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        check(unsafe { libc::munmap(start, length) })
    }

    unsafe fn madvise(
        &self,
        start: *mut c_void,
        length: usize,
        advice: c_int,
    ) -> Result<(), Errno> {
        // SAFETY: the caller's promise.
        check(unsafe { libc::madvise(start, length, advice) })
    }

    unsafe fn mbind(
        &self,
        start: *mut c_void,
        length: usize,
        binding: &Binding,
    ) -> Result<(), Errno> {
        let bits = binding.nodes.len() as libc::c_ulong * libc::c_ulong::from(libc::c_ulong::BITS);
        // The kernel looks at one bit fewer than it is told of.
        let max_node = bits + 1;
        // SAFETY: the caller's promise for the range; the mask has as many bits as are told, and the word that the
        // count's last bit could begin is not read, for that bit is dropped.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                start,
                length,
                binding.mode,
                binding.nodes.as_ptr(),
                max_node,
                0,
            )
        };
        if result < 0 {
            Err(last_errno())
        } else {
            Ok(())
        }
    }

    fn numa_nodes(&self) -> Option<String> {
        fs::read_to_string("/sys/devices/system/node/has_memory").ok()
    }

    fn memfd_create(&self, flags: u32) -> Result<File, Errno> {
        // SAFETY: the name is a C string, the flags are documented ones.
        let fd = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) };
        check(fd)?;
        // SAFETY: just made, and owned by nobody else.
        Ok(unsafe { File::from_raw_fd(fd) })
    }

    fn set_len(&self, file: &File, length: u64) -> Result<(), Errno> {
        file.set_len(length)
            .map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EINVAL)))
    }

    fn add_seals(&self, file: &File, seals: c_int) -> Result<(), Errno> {
        // SAFETY: an fcntl on an open descriptor with an integer argument.
        check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })
    }
}

/// What kind of file system a file is on: its magic, and its block size (on a hugetlbfs, the page size).
pub(super) fn file_system(file: &File) -> Result<(u64, u64), Errno> {
    let mut found = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the structure is the kernel's to fill for the length of the call.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), found.as_mut_ptr()) })?;
    // SAFETY: filled, and all zeros is a value as well.
    let found = unsafe { found.assume_init() };
    Ok((found.f_type as u64, found.f_bsize as u64))
}

/// Whether a file is open for writing.
pub(super) fn is_writable(file: &File) -> Result<bool, Errno> {
    // SAFETY: an fcntl on an open descriptor without an argument.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    Ok(flags & libc::O_ACCMODE == libc::O_RDWR)
}
