// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A request under way: which job it needs next, and what became of the last one. No I/O of its own.
//!
//! ```text
//!   read, write   job ─► short: the rest ─► … ─► done
//!   flush         sync ─► done
//!   discard       hole, hole, … ─► (sync) ─► done        the host has none: done, a discard is advice
//!   zeros         hole or range ─► (sync) ─► done        the host has none: writes, 1 MiB each
//! ```

#![forbid(unsafe_code)]

use std::io;

use super::engine::{Action, Job, MAX_ZEROS};
use super::image::Image;
use super::request::Range;

/// How often in a row a host may say that it did nothing and is to be asked again.
const PATIENCE: u8 = 100;

/// A request's work.
#[derive(Debug)]
pub struct Task {
    work: Work,
    /// Each write is durable before it is answered.
    through: bool,
    /// Answers in a row that did nothing.
    stalls: u8,
}

#[derive(Debug)]
enum Work {
    Read,
    Write,
    Sync,
    Ranges {
        zero: bool,
        ranges: Vec<Range>,
        /// The range that is worked on.
        at: usize,
        /// How much of it is written with zeros.
        written: u64,
        /// The host refused holes or ranges for this request.
        refused: Refused,
    },
}

/// What the host did not do for one request, whatever it does for others.
#[derive(Clone, Copy, Debug, Default)]
struct Refused {
    punch: bool,
    zero: bool,
}

/// What follows from a completion.
#[derive(Debug)]
#[must_use]
pub enum Next {
    /// This job.
    Job(Job),
    /// The end.
    Done,
    /// The end: the host's errno.
    Failed(io::Error),
}

impl Task {
    /// A read. Its first job is at hand.
    pub fn read() -> Self {
        Task::new(Work::Read, false)
    }

    /// A write. Its first job is at hand.
    pub fn write(through: bool) -> Self {
        Task::new(Work::Write, through)
    }

    /// A flush, and its only job.
    pub fn flush() -> (Self, Job) {
        (Task::new(Work::Sync, false), sync())
    }

    /// Zeros, or else a discard, on these ranges; and its first job, unless there is nothing to do.
    pub fn ranges(zero: bool, ranges: Vec<Range>, through: bool, image: &Image) -> (Self, Next) {
        let work = Work::Ranges {
            zero,
            ranges,
            at: 0,
            written: 0,
            refused: Refused::default(),
        };
        let mut task = Task::new(work, through);
        let next = task.next_range(image);
        (task, next)
    }

    fn new(work: Work, through: bool) -> Self {
        Task {
            work,
            through,
            stalls: 0,
        }
    }

    /// Takes a job's completion.
    pub fn completed(
        &mut self,
        mut job: Job,
        result: io::Result<u64>,
        image: &Image,
    ) -> (Next, Option<Job>) {
        let done = match result {
            Ok(done) => done,
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                if [libc::EINTR, libc::EAGAIN].contains(&errno) && self.stalls < PATIENCE {
                    self.stalls += 1;
                    return (Next::Job(job), None);
                }
                return match self.refused(&job, errno, image) {
                    true => (self.next_range(image), Some(job)),
                    false => (Next::Failed(error), Some(job)),
                };
            }
        };
        self.stalls = 0;
        if !matches!(job.action(), Action::Read | Action::Write { .. }) {
            return (self.passed(&job, image), Some(job));
        }
        let done = job.advance(done);
        if let Work::Ranges { written, .. } = &mut self.work {
            *written += done;
        }
        if job.is_empty() {
            return (self.passed(&job, image), Some(job));
        }
        if done == 0 {
            // The image has become shorter; a file that takes none of a write is out of order.
            let kind = match job.action() {
                Action::Read => io::ErrorKind::UnexpectedEof,
                _ => io::ErrorKind::WriteZero,
            };
            return (Next::Failed(kind.into()), Some(job));
        }
        (Next::Job(job), None)
    }

    /// A job has been done as a whole.
    fn passed(&mut self, job: &Job, image: &Image) -> Next {
        match &mut self.work {
            Work::Read | Work::Write | Work::Sync => Next::Done,
            Work::Ranges { .. } if job.action() == Action::Sync => Next::Done,
            Work::Ranges {
                at,
                written,
                ranges,
                ..
            } => {
                let whole = ranges.get(*at).map_or(0, |range| range.len);
                // Zeros are written piece by piece; all else is done at once.
                if !matches!(job.action(), Action::Write { .. }) || *written >= whole {
                    *at += 1;
                    *written = 0;
                }
                self.next_range(image)
            }
        }
    }

    /// Whether the host only lacks a way to do it, and there may be another.
    fn refused(&mut self, job: &Job, errno: i32, image: &Image) -> bool {
        let Work::Ranges { refused, .. } = &mut self.work else {
            return false;
        };
        let never = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY].contains(&errno);
        // EINVAL: this range, which is no multiple of what a device wants. EPERM, ENODEV: a kind of file that has none.
        if !never && ![libc::EINVAL, libc::EPERM, libc::ENODEV].contains(&errno) {
            return false;
        }
        match job.action() {
            Action::Discard => refused.punch = true,
            Action::Punch => {
                refused.punch = true;
                if never {
                    image.cannot_punch();
                }
            }
            Action::Zero => {
                refused.zero = true;
                if never {
                    image.cannot_zero();
                }
            }
            _ => return false,
        }
        true
    }

    /// The job of the range that it is at, or what comes behind all of them.
    fn next_range(&mut self, image: &Image) -> Next {
        let Work::Ranges {
            zero,
            ranges,
            at,
            written,
            refused,
        } = &mut self.work
        else {
            return Next::Done;
        };
        while ranges.get(*at).is_some_and(|range| range.len == 0) {
            *at += 1;
        }
        let Some(Range { offset, len, unmap }) = ranges.get(*at).copied() else {
            return match self.through {
                true => Next::Job(sync()),
                false => Next::Done,
            };
        };
        let punch = image.can_punch() && !refused.punch;
        let action = match (*zero, image.is_device()) {
            (true, _) if *written > 0 => None,
            (true, _) if unmap && punch => Some(Action::Punch),
            (true, _) if image.can_zero() && !refused.zero => Some(Action::Zero),
            (true, _) => None,
            (false, true) if image.can_discard() && !refused.punch => Some(Action::Discard),
            (false, false) if punch => Some(Action::Punch),
            // A discard that cannot be: what it was told of keeps its space.
            (false, _) => return Next::Done,
        };
        Next::Job(match action {
            Some(action) => Job::range(action, offset, len),
            None => {
                let left = len - *written;
                Job::zeros(offset + *written, left.min(MAX_ZEROS), false)
            }
        })
    }
}

fn sync() -> Job {
    Job::range(Action::Sync, 0, 0)
}
