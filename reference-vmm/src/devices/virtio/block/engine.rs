// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reading and writing an image without waiting for it: jobs in, completions out.
//!
//! A [`Job`] owns what the host reads or writes for it: the addresses, and the guest memory that they are in, which
//! stays mapped as long as the job lives. An [`Engine`] owns a job from [`push`](Engine::push) to its completion. So
//! the host never touches memory that is gone, whatever a device does.

use std::fmt;
use std::io;
use std::os::fd::RawFd;

use vm_memory::Permissions;

use super::super::chain::Buffers;
use super::super::device::Memory;
use super::super::fault::Fault;

/// What a job does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reads into guest memory.
    Read,
    /// Writes from guest memory, or zeros.
    Write {
        /// It is durable when it is done (`RWF_DSYNC`).
        through: bool,
    },
    /// All that was done before is durable when this is done (`fdatasync`).
    Sync,
    /// Makes a hole: no space, zeros when read (`FALLOC_FL_PUNCH_HOLE`).
    Punch,
    /// Has a range read as zeros, with its space kept (`FALLOC_FL_ZERO_RANGE`).
    Zero,
    /// Gives a block device's range up; what it reads as is open (`BLKDISCARD`).
    Discard,
}

/// One piece of work for the host.
pub struct Job {
    action: Action,
    offset: u64,
    len: u64,
    iovecs: Vec<libc::iovec>,
    /// Iovecs before this one are done.
    first: usize,
    /// Where the iovecs point; none: into [`ZEROS`].
    memory: Option<Memory>,
}

// SAFETY: the pointers are addresses of guest memory, which `memory` keeps mapped and any thread may touch, or of a
// static. Nothing is thread-bound.
unsafe impl Send for Job {}

/// Room for a job's addresses, without any in it.
#[derive(Default)]
pub struct Room(Vec<libc::iovec>);

// SAFETY: it is empty.
unsafe impl Send for Room {}

/// What is written where the host cannot zero otherwise.
static ZEROS: [u8; 4096] = [0; 4096];

/// The most that one job writes of zeros.
pub const MAX_ZEROS: u64 = 1 << 20;
/// The host takes so many iovecs in one call (`IOV_MAX`); the rest waits for the next one.
const MAX_IOVECS: usize = 1024;

impl Job {
    /// A job without memory: [`Action::Sync`], and those on ranges. `len` bytes from `offset` on.
    pub fn range(action: Action, offset: u64, len: u64) -> Self {
        Job {
            action,
            offset,
            len,
            iovecs: Vec::new(),
            first: 0,
            memory: None,
        }
    }

    /// Reads from `offset` of the image into `len` bytes of `buffers` after the first `skip`.
    ///
    /// # Errors
    /// [`Fault::Buffer`]: not all of it is memory that can be written.
    pub fn read(
        memory: &Memory,
        buffers: &Buffers,
        range: (u32, u32),
        offset: u64,
        room: Room,
    ) -> Result<Self, Fault> {
        let access = Permissions::Write;
        Job::transfer(Action::Read, memory, buffers, range, access, (offset, room))
    }

    /// Writes `len` bytes of `buffers` after the first `skip` to `offset` of the image.
    ///
    /// # Errors
    /// [`Fault::Buffer`]: not all of it is memory.
    pub fn write(
        memory: &Memory,
        buffers: &Buffers,
        range: (u32, u32),
        offset: u64,
        through: bool,
        room: Room,
    ) -> Result<Self, Fault> {
        let (action, access) = (Action::Write { through }, Permissions::Read);
        Job::transfer(action, memory, buffers, range, access, (offset, room))
    }

    /// Writes up to `len` zeros to `offset`, [`MAX_ZEROS`] at the most.
    pub fn zeros(offset: u64, len: u64, through: bool) -> Self {
        let len = len.min(MAX_ZEROS);
        let page = ZEROS.len() as u64;
        let iovecs = (0..len.div_ceil(page)).map(|at| libc::iovec {
            // Never written to: the action is a write to the image.
            iov_base: ZEROS.as_ptr().cast_mut().cast(),
            iov_len: page.min(len - at * page) as usize,
        });
        let iovecs = iovecs.collect();
        Job {
            iovecs,
            ..Job::range(Action::Write { through }, offset, len)
        }
    }

    fn transfer(
        action: Action,
        memory: &Memory,
        buffers: &Buffers,
        (skip, len): (u32, u32),
        access: Permissions,
        (offset, Room(mut iovecs)): (u64, Room),
    ) -> Result<Self, Fault> {
        let memory = memory.clone();
        buffers.slices(&*memory, (skip, len), access, |slice| {
            let guard = slice.ptr_guard_mut();
            iovecs.push(libc::iovec {
                iov_base: guard.as_ptr().cast(),
                iov_len: guard.len(),
            });
        })?;
        Ok(Job {
            action,
            offset,
            len: len.into(),
            iovecs,
            first: 0,
            memory: Some(memory),
        })
    }

    /// What it does.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Where in the image, bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes are left to do.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What the host is given of it, as far as it takes it in one call.
    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        let left = self.iovecs.get(self.first..).unwrap_or_default();
        left.get(..MAX_IOVECS).unwrap_or(left)
    }

    /// The guest memory that it reads or writes.
    pub fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// The first `done` bytes are done; how many those were, for a host that says more than there is.
    pub fn advance(&mut self, done: u64) -> u64 {
        let done = done.min(self.len);
        self.offset += done;
        self.len -= done;
        let mut left = done;
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            let of = left.min(iovec.iov_len as u64);
            left -= of;
            if of == iovec.iov_len as u64 {
                self.first += 1;
                continue;
            }
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(of as usize);
            iovec.iov_len -= of as usize;
            break;
        }
        done
    }

    /// A job that does only the first `len` bytes of it, as a host does that reads or writes less than it was asked for.
    /// For tests that play such a host.
    #[must_use]
    pub fn first(&self, len: u64) -> Job {
        let mut left = len.min(self.len);
        let mut iovecs = self.iovecs.get(self.first..).unwrap_or_default().to_vec();
        let len = left;
        iovecs.retain_mut(|iovec| {
            iovec.iov_len = left.min(iovec.iov_len as u64) as usize;
            left -= iovec.iov_len as u64;
            iovec.iov_len > 0
        });
        Job {
            action: self.action,
            offset: self.offset,
            len,
            iovecs,
            first: 0,
            memory: self.memory.clone(),
        }
    }

    /// Its room, for another one; none, if it had none.
    pub(super) fn into_room(self) -> Option<Room> {
        let mut iovecs = self.iovecs;
        iovecs.clear();
        (iovecs.capacity() > 0).then_some(Room(iovecs))
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("action", &self.action)
            .field("offset", &self.offset)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// A job that the host has done with.
#[derive(Debug)]
pub struct Completion {
    /// The number that it was pushed with.
    pub token: usize,
    /// The job, as it was.
    pub job: Job,
    /// How many bytes were read or written, or why not. Fewer than were asked for is no error.
    pub result: io::Result<u64>,
}

/// Does jobs on an image, many at a time, in any order.
///
/// # Contract
/// - What is pushed is begun by [`submit`](Self::submit) at the latest, and each job comes back once.
/// - Nothing fails but jobs: an engine that the host leaves in the lurch completes them with its errno.
/// - Dropped, it waits for what the host has begun.
pub trait Engine: Send {
    /// How many jobs it holds at most.
    fn depth(&self) -> usize;

    /// Descriptors that are readable while there are completions to take. They stay the same.
    fn wakers(&self) -> Vec<RawFd>;

    /// Takes a job. It comes back with this `token`.
    ///
    /// # Errors
    /// It holds [`depth`](Self::depth) jobs: the job.
    fn push(&mut self, token: usize, job: Job) -> Result<(), Job>;

    /// Has the host begin what was pushed. Does not wait.
    fn submit(&mut self);

    /// The next completion, if there is one.
    fn completed(&mut self) -> Option<Completion>;

    /// Waits until there may be a completion, while jobs are under way.
    fn wait(&mut self);
}

/// Waits until one of these is readable, or a signal comes.
pub(super) fn wait_readable(fds: &[RawFd]) {
    let mut fds: Vec<_> = fds
        .iter()
        .map(|fd| libc::pollfd {
            fd: *fd,
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: as many pollfds as are said, which live through the call.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    if ready < 0 {
        // The caller looks and waits again.
        std::thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::chain::Buffer;
    use super::super::{Image, Threads, Uring};
    use super::*;
    use crate::memory::slots_of;
    use memslots::fake::FakeHost;
    use memslots::{Backing, SlotFlags};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    fn buffers(parts: &[(u64, u32)]) -> Buffers {
        let mut buffers = Buffers::default();
        for (address, len) in parts {
            let address = GuestAddress(*address);
            assert!(buffers.push(Buffer { address, len: *len }));
        }
        buffers
    }

    fn lens(job: &Job) -> Vec<usize> {
        job.iovecs().iter().map(|iovec| iovec.iov_len).collect()
    }

    #[test]
    fn guest_memory_stays_mapped_while_the_host_reads_into_it_although_its_slot_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [7; 8192]).unwrap();
        let image = Image::open(file.path(), true).unwrap();
        let threads: Box<dyn Engine> = Box::new(Threads::new(&image, 1).unwrap());
        let uring = Uring::new(&image).ok();
        let uring = uring.map(|uring| Box::new(uring) as Box<dyn Engine>);
        for mut engine in std::iter::once(threads).chain(uring) {
            let memslots = slots_of(FakeHost::new(8));
            let backing = Backing::anonymous(1 << 20);
            let slot = memslots.create(GuestAddress(0), backing, SlotFlags::NONE);
            let slot = slot.unwrap();
            let memory = memslots.ram().memory();
            let data = buffers(&[(0, 4096), (0x8000, 4096)]);
            let job = Job::read(&memory, &data, (0, 8192), 0, Room::default()).unwrap();
            drop(memory);
            drop(slot);
            assert!(engine.push(3, job).is_ok());
            let done = loop {
                engine.submit();
                match engine.completed() {
                    Some(done) => break done,
                    None => engine.wait(),
                }
            };
            assert_eq!((done.token, done.result.unwrap()), (3, 8192));
            let memory = done.job.memory().unwrap();
            let mut bytes = [0; 4096];
            memory.read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
            assert_eq!(bytes, [7; 4096]);
        }
    }

    #[test]
    fn an_engine_that_is_dropped_has_no_io_under_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let image = Image::open(file.path(), false).unwrap();
        for uring in [true, false] {
            let engine: Box<dyn Engine> = match uring {
                false => Box::new(Threads::new(&image, 4).unwrap()),
                true => match Uring::new(&image) {
                    Ok(ring) => Box::new(ring),
                    Err(_) => continue,
                },
            };
            let mut engine = engine;
            for at in 0..engine.depth() as u64 {
                let job = Job::zeros(at << 19, 1 << 19, true);
                assert!(engine.push(at as usize, job).is_ok());
            }
            assert!(engine.push(0, Job::zeros(0, 1, false)).is_err());
            engine.submit();
            drop(engine);
        }
    }

    #[test]
    fn what_is_done_of_a_job_is_not_done_again() {
        let memslots = slots_of(FakeHost::new(8));
        let backing = Backing::anonymous(1 << 20);
        let slot = memslots.create(GuestAddress(0), backing, SlotFlags::NONE);
        let memory = memslots.ram().memory();
        let data = buffers(&[(0, 100), (200, 10), (300, 50)]);
        let job = || Job::write(&memory, &data, (5, 150), 1000, false, Room::default()).unwrap();
        assert_eq!(lens(&job()), [95, 10, 45]);
        for first in 0..=150 {
            let mut job = job();
            let part = job.first(first);
            assert_eq!((part.len(), part.offset()), (first, 1000));
            assert_eq!(lens(&part).iter().sum::<usize>() as u64, first);
            assert_eq!(job.advance(first), first);
            assert_eq!((job.len(), job.offset()), (150 - first, 1000 + first));
            let left = lens(&job).iter().sum::<usize>() as u64;
            assert_eq!(left, 150 - first);
        }
        assert_eq!(job().advance(1000), 150);
        drop(slot);
    }

    #[test]
    fn a_host_is_given_no_more_iovecs_than_it_takes() {
        let memslots = slots_of(FakeHost::new(8));
        let backing = Backing::anonymous(1 << 20);
        let slot = memslots.create(GuestAddress(0), backing, SlotFlags::NONE);
        let memory = memslots.ram().memory();
        let parts: Vec<_> = (0..1500).map(|at| (at * 512, 256)).collect();
        let data = buffers(&parts);
        let range = (0, 1500 * 256);
        let mut job = Job::read(&memory, &data, range, 0, Room::default()).unwrap();
        assert_eq!(job.iovecs().len(), MAX_IOVECS);
        job.advance(1024 * 256);
        assert_eq!(job.iovecs().len(), 1500 - MAX_IOVECS);
        drop(slot);
    }
}
