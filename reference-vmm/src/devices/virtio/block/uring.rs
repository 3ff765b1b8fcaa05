// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The engine on io_uring: jobs of a turn are handed over by one system call, and done beside the device's thread.
//!
//! Whether a host has it is found out by trying: containers and hardened hosts forbid it (seccomp,
//! `kernel.io_uring_disabled`), and old kernels lack an operation. The ring's own descriptor wakes the device's thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use super::engine::{Action, Completion, Engine, Job, wait_readable};
use super::image::Image;
use super::threads::Threads;

/// Jobs held at most: entries of the submission queue. The completion queue has twice as many and cannot overflow.
const DEPTH: usize = 128;
/// Tries of a submission that the host has no memory for, where there is nothing whose end could be waited for.
const TRIES: usize = 100;

/// A ring for one device's thread.
pub struct Uring {
    ring: IoUring,
    /// Jobs in the ring, by their entries' `user_data`.
    jobs: Vec<Option<(usize, Job)>>,
    /// Places without one.
    free: Vec<usize>,
    /// Places of jobs that are in the submission queue, in its order.
    queued: VecDeque<usize>,
    /// The host takes no more, with this errno.
    broken: Option<i32>,
    /// Jobs that came to nothing without the host.
    failed: VecDeque<Completion>,
    /// For what the ring cannot do.
    helper: Option<Threads>,
    image: Image,
}

impl Uring {
    /// A ring on this image.
    ///
    /// # Errors
    /// The host permits none, or one that lacks an operation (`EOPNOTSUPP`).
    pub fn new(image: &Image) -> io::Result<Self> {
        let mut ring = IoUring::new(DEPTH as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // A filter may permit rings and nothing to be done with them.
        let nothing = opcode::Nop::new().build();
        // SAFETY: it names no memory.
        let pushed = unsafe { ring.submission().push(&nothing) };
        pushed.map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))?;
        ring.submit_and_wait(1)?;
        let _ = ring.completion().next();
        let helper = image.is_device() && image.can_discard();
        Ok(Uring {
            ring,
            jobs: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            queued: VecDeque::with_capacity(DEPTH),
            broken: None,
            failed: VecDeque::new(),
            helper: match helper {
                true => Some(Threads::new(image, 1)?),
                false => None,
            },
            image: image.clone(),
        })
    }

    /// Jobs that the kernel has.
    fn in_kernel(&self) -> usize {
        DEPTH - self.free.len() - self.queued.len()
    }

    /// Takes account of what the kernel has taken.
    fn count_queued(&mut self) {
        let left = self.ring.submission().len();
        let taken = self.queued.len().saturating_sub(left);
        self.queued.drain(..taken);
    }

    /// The host takes no more. What it has not seen comes back; its entries stay in the ring, which is never entered
    /// again.
    fn give_up(&mut self, errno: i32) {
        self.broken = Some(errno);
        for place in std::mem::take(&mut self.queued) {
            if let Some((token, job)) = self.take(place) {
                let result = Err(io::Error::from_raw_os_error(errno));
                self.failed.push_back(Completion { token, job, result });
            }
        }
    }

    fn take(&mut self, place: usize) -> Option<(usize, Job)> {
        let taken = self.jobs.get_mut(place)?.take()?;
        self.free.push(place);
        Some(taken)
    }
}

/// A job for the kernel. The file is not registered with the ring: a ring's end is worked off by the kernel some time
/// after the process's own, and so long the image would stay locked.
fn entry(job: &Job, file: types::Fd) -> squeue::Entry {
    let (offset, iovecs) = (job.offset(), job.iovecs());
    let allocate = |mode: i32| {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        let call = opcode::Fallocate::new(file, job.len());
        call.offset(offset).mode(mode).build()
    };
    let flags = match job.action() {
        Action::Write { through: true } => libc::RWF_DSYNC,
        _ => 0,
    };
    match (job.action(), iovecs) {
        (Action::Read, [one]) if one.iov_len <= u32::MAX as usize => {
            let call = opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32);
            call.offset(offset).build()
        }
        (Action::Read, _) => {
            let call = opcode::Readv::new(file, iovecs.as_ptr(), iovecs.len() as u32);
            call.offset(offset).build()
        }
        (Action::Write { .. }, [one]) if one.iov_len <= u32::MAX as usize => {
            let call = opcode::Write::new(file, one.iov_base.cast(), one.iov_len as u32);
            call.offset(offset).rw_flags(flags).build()
        }
        (Action::Write { .. }, _) => {
            let call = opcode::Writev::new(file, iovecs.as_ptr(), iovecs.len() as u32);
            call.offset(offset).rw_flags(flags).build()
        }
        (Action::Sync, _) => {
            let call = opcode::Fsync::new(file);
            call.flags(types::FsyncFlags::DATASYNC).build()
        }
        (Action::Punch | Action::Discard, _) => allocate(libc::FALLOC_FL_PUNCH_HOLE),
        (Action::Zero, _) => allocate(libc::FALLOC_FL_ZERO_RANGE),
    }
}

impl Engine for Uring {
    fn depth(&self) -> usize {
        DEPTH
    }

    fn wakers(&self) -> Vec<RawFd> {
        let helper = self.helper.iter().flat_map(Engine::wakers);
        std::iter::once(self.ring.as_raw_fd())
            .chain(helper)
            .collect()
    }

    fn push(&mut self, token: usize, job: Job) -> Result<(), Job> {
        if let (Action::Discard, Some(helper)) = (job.action(), &mut self.helper) {
            return helper.push(token, job);
        }
        if let Some(errno) = self.broken {
            let result = Err(io::Error::from_raw_os_error(errno));
            self.failed.push_back(Completion { token, job, result });
            return Ok(());
        }
        let Some(place) = self.free.pop() else {
            return Err(job);
        };
        let entry = entry(&job, types::Fd(self.image.as_raw_fd())).user_data(place as u64);
        // SAFETY: what the entry names is the job's, which stays in `jobs`, unmoved in its vector's heap memory, until
        // the completion has come (or for ever, if it never does). The file is open as long as the ring.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // There are no more places than entries; so this is never.
            self.free.push(place);
            return Err(job);
        }
        if let Some(slot) = self.jobs.get_mut(place) {
            *slot = Some((token, job));
        }
        self.queued.push_back(place);
        Ok(())
    }

    fn submit(&mut self) {
        if let Some(helper) = &mut self.helper {
            helper.submit();
        }
        let mut tries = 0;
        while !self.queued.is_empty() {
            let submitted = self.ring.submit();
            self.count_queued();
            let error = match submitted {
                Ok(1..) => continue,
                Ok(0) => io::Error::from_raw_os_error(libc::EAGAIN),
                Err(error) => error,
            };
            match error.raw_os_error().unwrap_or(libc::EIO) {
                libc::EINTR => {}
                // No memory, or completions to be taken first: after the next completion it is tried again.
                libc::EAGAIN | libc::EBUSY if self.in_kernel() > 0 => return,
                libc::EAGAIN | libc::EBUSY if tries < TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                }
                errno => self.give_up(errno),
            }
        }
    }

    fn completed(&mut self) -> Option<Completion> {
        if self.in_kernel() > 0 {
            let next = self.ring.completion().next();
            let next = next.map(|entry: cqueue::Entry| (entry.user_data(), entry.result()));
            if let Some((place, result)) = next
                && let Some((token, job)) = self.take(place as usize)
            {
                let result = match u64::try_from(result) {
                    // fallocate says 0 for all of it.
                    Ok(_) if matches!(job.action(), Action::Punch | Action::Zero) => Ok(job.len()),
                    Ok(len) => Ok(len),
                    Err(_) => Err(io::Error::from_raw_os_error(-result)),
                };
                return Some(Completion { token, job, result });
            }
        }
        self.failed
            .pop_front()
            .or_else(|| self.helper.as_mut()?.completed())
    }

    fn wait(&mut self) {
        self.submit();
        if self.failed.is_empty() {
            wait_readable(&self.wakers());
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // What the kernel has not seen it never will.
        self.give_up(libc::ECANCELED);
        while self.in_kernel() > 0 {
            let next = self.ring.completion().next();
            match next.map(|entry: cqueue::Entry| entry.user_data()) {
                Some(place) => drop(self.take(place as usize)),
                None => wait_readable(&[self.ring.as_raw_fd()]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DiskConfig, Io};
    use super::*;

    /// Has this thread's `io_uring_enter` refused from now on.
    fn forbid_enter() {
        let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        };
        let mut steps = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            step(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                1,
                libc::SYS_io_uring_enter as u32,
            ),
            step(
                libc::BPF_RET | libc::BPF_K,
                0,
                0,
                libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
            ),
            step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: steps.len() as u16,
            filter: steps.as_mut_ptr(),
        };
        // SAFETY: a valid program, which is read during the call; both are of this thread alone.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let mode = libc::SECCOMP_MODE_FILTER;
            let program = &raw const program;
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, program), 0);
        }
    }

    #[test]
    fn a_ring_that_can_be_made_and_not_entered_is_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let image = Image::open(file.path(), true).unwrap();
        let without = std::thread::spawn(move || {
            forbid_enter();
            assert!(Uring::new(&image).is_err());
            let disk = |io| DiskConfig {
                readonly: true,
                io,
                ..DiskConfig::new(image.path())
            };
            assert!(disk(Io::Uring).open().is_err());
            disk(Io::Auto).open().unwrap();
        });
        without.join().unwrap();
    }
}
