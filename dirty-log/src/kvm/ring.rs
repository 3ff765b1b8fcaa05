// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vCPU's dirty ring, mapped; and the reset, with signals blocked.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

use crate::Error;
use crate::layout::PAGE_SIZE;
use crate::ring::{ResetRings, RingEntry, RingMemory, RingSize};

const KVM_RESET_DIRTY_RINGS: libc::c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0xc7, 0);

impl ResetRings for VmFd {
    fn reset_dirty_rings(&self) -> io::Result<u32> {
        // See the module `ring`: a kernel that sees a signal leaves pages unwatched.
        let blocked = BlockedSignals::all()?;
        // SAFETY: the fd is a VM's, and the call takes no argument.
        let result = match unsafe { ioctl(self, KVM_RESET_DIRTY_RINGS) } {
            count @ 0.. => Ok(count as u32),
            _ => Err(io::Error::last_os_error()),
        };
        drop(blocked);
        result
    }
}

/// This thread's signals, blocked until it is dropped.
struct BlockedSignals {
    before: libc::sigset_t,
}

impl BlockedSignals {
    fn all() -> io::Result<Self> {
        // SAFETY: both sets are whole, and initialised: `before` by zeros (a set of none), `all` so and by
        // sigfillset. The call writes `before` alone.
        let (result, before) = unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            let result = libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            (result, before)
        };
        match result {
            0 => Ok(Self { before }),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set was written by the kernel; the call changes this thread's mask alone. It cannot
        // fail: its arguments are valid.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.before, ptr::null_mut()) };
    }
}

/// The ring of one vCPU, mapped from its file descriptor. The mapping holds the vCPU.
#[derive(Debug)]
pub struct MappedRing {
    start: NonNull<RingEntry>,
    size: RingSize,
}

// SAFETY: a mapping is no thread's own, and its entries are atomics.
unsafe impl Send for MappedRing {}
// SAFETY: as above.
unsafe impl Sync for MappedRing {}

impl MappedRing {
    /// Maps the ring of a vCPU whose VM has [`LogInForce::Ring`](super::LogInForce::Ring) of this size.
    /// `number` is for the error, and for nothing else. Of a vCPU alone: what is behind any other descriptor
    /// may be made smaller, or be written by others in their own ways, while it is mapped.
    ///
    /// # Errors
    /// [`Error::MapRing`].
    pub fn map(vcpu: &VcpuFd, number: u32, size: RingSize) -> Result<Self, Error> {
        let bytes = size.bytes() as usize;
        let failed = |source| Error::MapRing {
            vcpu: number,
            bytes: bytes as u64,
            source,
        };
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing; the result is
        // checked.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_SIZE as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(failed(io::Error::last_os_error()));
        }
        let Some(start) = NonNull::new(start.cast()) else {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOMEM)));
        };
        let ring = Self { start, size };
        // KVM maps whatever it is asked for, and a page behind the ring is a SIGBUS on its first touch. So
        // the pages are asked for here: populating fails where touching would.
        // SAFETY: the range is the mapping just made; populating it changes nothing in it.
        let populated =
            unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_POPULATE_READ) };
        match populated {
            0 => Ok(ring),
            _ => match io::Error::last_os_error() {
                // A kernel before 5.14 has no such advice: then the size that the caller gives is trusted.
                error if error.raw_os_error() == Some(libc::EINVAL) => Ok(ring),
                error => Err(failed(error)),
            },
        }
    }
}

impl RingMemory for MappedRing {
    fn entries(&self) -> &[RingEntry] {
        // SAFETY: mapped for `size` entries until drop, page-aligned, any bytes are an entry, and the
        // kernel, who shares them, is answered with atomics alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.size.entries() as usize) }
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whole, and nobody borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size.bytes() as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The signals that this thread does not get now.
    fn blocked() -> Vec<i32> {
        // SAFETY: the set is initialised by zeros, and written by the call, which changes nothing.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            assert_eq!(
                libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &mut set),
                0
            );
            set
        };
        // SAFETY: the set is initialised, and the numbers are signals'.
        let has = |signal: &i32| unsafe { libc::sigismember(&set, *signal) } == 1;
        (1..=libc::SIGRTMAX()).filter(has).collect()
    }

    #[test]
    fn a_reset_sees_no_signal_and_the_thread_has_its_own_mask_again_behind_it() {
        let before = blocked();
        let held = BlockedSignals::all().unwrap();
        let within = blocked();
        // Two that cannot be blocked, and those that the C library keeps for itself, below SIGRTMIN.
        let can = |signal: &i32| {
            ![libc::SIGKILL, libc::SIGSTOP].contains(signal)
                && !(32..libc::SIGRTMIN()).contains(signal)
        };
        let want: Vec<_> = (1..=libc::SIGRTMAX()).filter(can).collect();
        assert_eq!(within, want);
        drop(held);
        assert_eq!(blocked(), before);
    }
}
