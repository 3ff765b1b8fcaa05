// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The engine for hosts without io_uring: threads that read and write and wait for it.
//!
//! What is in the page cache is read on the device's own thread, without a change of threads (`RWF_NOWAIT`, where the
//! file system knows it).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::engine::{Action, Completion, Engine, Job, wait_readable};
use super::image::Image;

/// Jobs held at most.
const DEPTH: usize = 128;
/// A thread needs little: it makes one system call after the other.
const STACK: usize = 128 << 10;
/// A read up to this size is tried at once; the copy of a longer one would keep the device's thread from the others.
const NOW: u64 = 64 << 10;

/// Threads for one device's thread. They start when there is work.
pub struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    most: usize,
    /// Taken and not completed.
    held: usize,
    /// Taken and not submitted.
    pushed: VecDeque<(usize, Job)>,
    /// Done, and taken out of the shared ones.
    done: VecDeque<Completion>,
    /// The file system reads without waiting.
    now: bool,
}

struct Shared {
    image: Image,
    state: Mutex<State>,
    /// There is work, or an end.
    work: Condvar,
    /// Readable if and only if `State::done` is not empty: it is written and read with the lock held.
    event: EventFd,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(usize, Job)>,
    done: VecDeque<Completion>,
    /// Threads that wait.
    idle: usize,
    end: bool,
}

impl Threads {
    /// Up to `most` threads, of which none runs yet.
    ///
    /// # Errors
    /// No descriptor.
    pub fn new(image: &Image, most: usize) -> io::Result<Self> {
        Ok(Threads {
            shared: Arc::new(Shared {
                image: image.clone(),
                state: Mutex::default(),
                work: Condvar::new(),
                event: EventFd::new(EFD_NONBLOCK)?,
            }),
            threads: Vec::new(),
            most: most.max(1),
            held: 0,
            pushed: VecDeque::new(),
            done: VecDeque::new(),
            now: true,
        })
    }

    /// What is in the page cache, now. None: it is not, or not all of it.
    fn read_now(&mut self, job: &Job) -> Option<u64> {
        if !self.now || job.action() != Action::Read || job.len() > NOW {
            return None;
        }
        match transfer(&self.shared.image, job, libc::RWF_NOWAIT) {
            // Part of it: the rest has to be waited for.
            Ok(len) => (len == job.len()).then_some(len),
            Err(error) => {
                let unknown = [libc::EOPNOTSUPP, libc::EINVAL, libc::ENOSYS];
                self.now = !error.raw_os_error().is_some_and(|of| unknown.contains(&of));
                None
            }
        }
    }

    fn start_thread(&mut self) -> io::Result<()> {
        let shared = self.shared.clone();
        let name = std::thread::current();
        let name = name.name().unwrap_or("disk").to_owned();
        let builder = std::thread::Builder::new().name(name).stack_size(STACK);
        self.threads.push(builder.spawn(move || shared.serve())?);
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // What a thread that panicked has left is whole: each change is one call.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread's life.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if state.end {
                return;
            }
            let Some((token, job)) = state.jobs.pop_front() else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            let result = perform(&self.image, &job);
            state = self.lock();
            if state.done.is_empty() {
                // It cannot be full: it is 0.
                let _ = self.event.write(1);
            }
            state.done.push_back(Completion { token, job, result });
        }
    }
}

impl Engine for Threads {
    fn depth(&self) -> usize {
        DEPTH
    }

    fn wakers(&self) -> Vec<RawFd> {
        vec![self.shared.event.as_raw_fd()]
    }

    fn push(&mut self, token: usize, job: Job) -> Result<(), Job> {
        if self.held == DEPTH {
            return Err(job);
        }
        self.held += 1;
        match self.read_now(&job) {
            Some(len) => {
                let result = Ok(len);
                self.done.push_back(Completion { token, job, result });
            }
            None => self.pushed.push_back((token, job)),
        }
        Ok(())
    }

    fn submit(&mut self) {
        if self.pushed.is_empty() {
            return;
        }
        let shared = self.shared.clone();
        let mut state = shared.lock();
        let new = self.pushed.len();
        state.jobs.append(&mut self.pushed);
        let (waiting, idle) = (state.jobs.len(), state.idle);
        drop(state);
        for _ in 0..new.min(idle) {
            shared.work.notify_one();
        }
        for _ in idle..waiting {
            if self.threads.len() == self.most {
                break;
            }
            let Err(error) = self.start_thread() else {
                continue;
            };
            if self.threads.is_empty() {
                // Nobody else will do them.
                let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
                let jobs = shared.lock().jobs.split_off(0);
                self.done.extend(jobs.into_iter().map(|(token, job)| {
                    let result = Err(io::Error::from_raw_os_error(errno));
                    Completion { token, job, result }
                }));
            }
            break;
        }
    }

    fn completed(&mut self) -> Option<Completion> {
        if self.done.is_empty() && self.held > 0 {
            let mut state = self.shared.lock();
            if !state.done.is_empty() {
                std::mem::swap(&mut self.done, &mut state.done);
                // It was written when the first one came.
                let _ = self.shared.event.read();
            }
        }
        let completion = self.done.pop_front()?;
        self.held -= 1;
        Some(completion)
    }

    fn wait(&mut self) {
        self.submit();
        if self.done.is_empty() && self.held > 0 {
            wait_readable(&self.wakers());
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A panic in one has been told by the hook.
            let _ = thread.join();
        }
    }
}

/// Does a job, and waits for it.
fn perform(image: &Image, job: &Job) -> io::Result<u64> {
    let fd = image.as_raw_fd();
    let allocate = |mode| {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (job.offset() as libc::off_t, job.len() as libc::off_t);
        // SAFETY: no memory is involved.
        let done = unsafe { libc::fallocate(fd, mode, offset, len) };
        check(done as isize).map(|_| job.len())
    };
    match job.action() {
        Action::Read => transfer(image, job, 0),
        Action::Write { through: false } => transfer(image, job, 0),
        Action::Write { through: true } => transfer(image, job, libc::RWF_DSYNC),
        Action::Sync => {
            // SAFETY: no memory is involved.
            let done = unsafe { libc::fdatasync(fd) };
            check(done as isize)
        }
        Action::Punch => allocate(libc::FALLOC_FL_PUNCH_HOLE),
        Action::Zero => allocate(libc::FALLOC_FL_ZERO_RANGE),
        Action::Discard => {
            // linux/fs.h
            const BLKDISCARD: libc::Ioctl = 0x1277;
            let range = [job.offset(), job.len()];
            // SAFETY: the ioctl reads two u64, which live through the call.
            let done = unsafe { libc::ioctl(fd, BLKDISCARD, &raw const range) };
            check(done as isize).map(|_| job.len())
        }
    }
}

fn transfer(image: &Image, job: &Job, flags: libc::c_int) -> io::Result<u64> {
    let (fd, iovecs) = (image.as_raw_fd(), job.iovecs());
    let (at, count) = (iovecs.as_ptr(), iovecs.len() as libc::c_int);
    let offset = job.offset() as libc::off_t;
    // SAFETY: the iovecs live through the call, and what they name is guest memory that the job keeps mapped, or, for a
    // write to the image, a static. Others may access guest memory meanwhile, as the guest does: it is nobody's
    // reference.
    let done = unsafe {
        match job.action() {
            Action::Read => libc::preadv2(fd, at, count, offset, flags),
            _ => libc::pwritev2(fd, at, count, offset, flags),
        }
    };
    check(done)
}

fn check(done: isize) -> io::Result<u64> {
    u64::try_from(done).map_err(|_| io::Error::last_os_error())
}
