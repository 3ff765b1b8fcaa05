// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Serves a disk's queues: chains become tasks, tasks become jobs of the engine, completions go back to the driver.
//!
//! A turn hands all jobs to the host at once and gives back all that is done; the driver is interrupted once. Chains
//! for which the engine has no room stay in their queue, where they take no memory of ours.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_core::logging::{self, Admission, RateLimit};
use vm_memory::Permissions;
use vm_memory::bitmap::Bitmap;
use vmm_sys_util::epoll::EventSet;

use super::super::chain::Chain;
use super::super::device::{Cx, Handler, Source};
use super::super::fault::Fault;
use super::config::MAX_SERIAL;
use super::engine::{Action, Completion, Engine, Job, Room};
use super::image::Image;
use super::request::{Disk, HEADER, RANGE, Request, Status};
use super::space::{MAX_DISCARD_RANGES, MAX_ZERO_RANGES};
use super::task::{Next, Task};

/// So much room of jobs is kept.
const SPARE: usize = 64;

/// The time between two lines about I/O errors: a broken disk under a busy guest does not fill the log.
const COMPLAINTS: Duration = Duration::from_secs(10);

/// What all of a disk's handlers have in common.
#[derive(Debug)]
pub struct Common {
    /// What the disk is.
    pub image: Image,
    /// What requests are checked against.
    pub disk: Disk,
    /// Its serial number, filled up with zeros.
    pub serial: [u8; MAX_SERIAL],
    /// A flush makes durable.
    pub flushes: bool,
    /// Writes need not be durable when they are answered. The driver may change it at any time, on a vCPU's thread.
    pub writeback: Arc<AtomicBool>,
}

/// Serves some of a disk's queues.
pub struct BlockHandler {
    common: Arc<Common>,
    engine: Box<dyn Engine>,
    /// Requests under way, by their jobs' tokens.
    tasks: Vec<Option<UnderWay>>,
    /// Tokens without one.
    free: Vec<usize>,
    /// Jobs that the engine did not take.
    waiting: VecDeque<(usize, Job)>,
    /// Queues with chains for which there was no room.
    left: Vec<bool>,
    spare: Vec<Room>,
    complaints: RateLimit,
}

struct UnderWay {
    queue: usize,
    chain: Chain,
    /// Bytes of the data that the device writes, all or none of them for what is no read.
    output: u32,
    task: Task,
}

impl BlockHandler {
    /// With nothing under way.
    pub fn new(common: Arc<Common>, engine: Box<dyn Engine>) -> Self {
        let depth = engine.depth();
        BlockHandler {
            common,
            engine,
            tasks: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            waiting: VecDeque::new(),
            left: Vec::new(),
            spare: Vec::new(),
            complaints: RateLimit::new(COMPLAINTS, 1),
        }
    }

    /// Takes chains, as far as there is room for their jobs.
    fn take(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        while !self.free.is_empty() {
            let memory = cx.memory;
            let Some(chain) = cx.queues[queue].pop(&**memory)? else {
                return Ok(());
            };
            self.begin(cx, queue, chain)?;
        }
        if let Some(left) = self.left.get_mut(queue) {
            *left = true;
        }
        Ok(())
    }

    /// Begins a request, or answers it at once.
    fn begin(&mut self, cx: &mut Cx<'_>, queue: usize, chain: Chain) -> Result<(), Fault> {
        let memory = cx.memory;
        let Some(output) = chain.writable.len().checked_sub(1) else {
            return Err(Fault::Driver(format!(
                "a request without a byte for its status (queue {queue}, descriptor {})",
                chain.head()
            )));
        };
        let mut reader = chain.reader(&**memory);
        let mut header = [0; HEADER];
        if !reader.read_exact(&mut header)? {
            return answer(cx, queue, chain, Status::IoError, 0);
        }
        let input = reader.left();
        let request = Request::new(&header, input, output, &self.common.disk);
        let through = self.common.flushes && !self.common.writeback.load(Ordering::Relaxed);
        let mut spare = || self.spare.pop().unwrap_or_default();
        let (task, job) = match request {
            Err(status) => return answer(cx, queue, chain, status, 0),
            Ok(Request::Read(_)) if output == 0 => return answer(cx, queue, chain, Status::Ok, 0),
            Ok(Request::Write(_)) if input == 0 => return answer(cx, queue, chain, Status::Ok, 0),
            Ok(Request::Read(at)) => {
                let job = Job::read(memory, &chain.writable, (0, output), at, spare())?;
                (Task::read(), job)
            }
            Ok(Request::Write(at)) => {
                let data = (HEADER as u32, input);
                let job = Job::write(memory, &chain.readable, data, at, through, spare())?;
                (Task::write(through), job)
            }
            Ok(Request::Flush) if !self.common.flushes => {
                return answer(cx, queue, chain, Status::Ok, 0);
            }
            Ok(Request::Flush) => Task::flush(),
            Ok(Request::Id) => {
                let serial = &self.common.serial;
                let len = serial.len().min(output as usize);
                let mut writer = chain.writer(&**memory);
                let written = writer.write(&serial[..len])? as u32;
                return answer(cx, queue, chain, Status::Ok, written);
            }
            Ok(request @ (Request::Discard(count) | Request::Zero(count))) => {
                let zero = matches!(request, Request::Zero(_));
                let most = MAX_DISCARD_RANGES.max(MAX_ZERO_RANGES);
                let mut ranges = Vec::with_capacity(count.min(most) as usize);
                for _ in 0..count {
                    let mut bytes = [0; RANGE];
                    reader.read_exact(&mut bytes)?;
                    match self.common.disk.range(&bytes, zero) {
                        Ok(range) => ranges.push(range),
                        Err(status) => return answer(cx, queue, chain, status, 0),
                    }
                }
                let image = &self.common.image;
                match Task::ranges(zero, ranges, through, image) {
                    (task, Next::Job(job)) => (task, job),
                    _ => return answer(cx, queue, chain, Status::Ok, 0),
                }
            }
        };
        let Some(token) = self.free.pop() else {
            // The caller has looked: never.
            cx.queues[queue].push_back(chain);
            return Ok(());
        };
        if let Some(slot) = self.tasks.get_mut(token) {
            *slot = Some(UnderWay {
                queue,
                chain,
                output,
                task,
            });
        }
        self.push(token, job);
        Ok(())
    }

    fn push(&mut self, token: usize, job: Job) {
        if !self.waiting.is_empty() {
            self.waiting.push_back((token, job));
        } else if let Err(job) = self.engine.push(token, job) {
            self.waiting.push_back((token, job));
        }
    }

    /// Hands over what there is, and gives back what is done, until there is neither.
    fn turn(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        loop {
            self.hand_over();
            let mut any = false;
            while let Some(completion) = self.engine.completed() {
                any = true;
                self.completed(cx, completion)?;
            }
            if !any {
                return Ok(());
            }
            for queue in 0..self.left.len() {
                if std::mem::take(&mut self.left[queue]) {
                    self.take(cx, queue)?;
                }
            }
        }
    }

    fn hand_over(&mut self) {
        while let Some((token, job)) = self.waiting.pop_front() {
            if let Err(job) = self.engine.push(token, job) {
                self.waiting.push_front((token, job));
                break;
            }
        }
        self.engine.submit();
    }

    fn completed(&mut self, cx: &mut Cx<'_>, completion: Completion) -> Result<(), Fault> {
        let Completion { token, job, result } = completion;
        let Some(under_way) = self.tasks.get_mut(token).and_then(Option::as_mut) else {
            return Ok(());
        };
        let (next, job) = under_way.task.completed(job, result, &self.common.image);
        let error = match next {
            Next::Job(next) => {
                if let Some(done) = job {
                    self.recycle(done);
                }
                self.push(token, next);
                return Ok(());
            }
            Next::Done => None,
            Next::Failed(error) => Some(error),
        };
        let Some(UnderWay {
            queue,
            chain,
            output,
            ..
        }) = self.tasks.get_mut(token).and_then(Option::take)
        else {
            return Ok(());
        };
        self.free.push(token);
        let mut written = 0;
        if let Some(job) = job {
            if job.action() == Action::Read {
                written = output.saturating_sub(u32::try_from(job.len()).unwrap_or(u32::MAX));
                mark(&chain, output, &job)?;
            }
            if let Some(error) = &error {
                self.complain(&job, error);
            }
            self.recycle(job);
        }
        let status = match error {
            None => Status::Ok,
            Some(_) => Status::IoError,
        };
        answer(cx, queue, chain, status, written)
    }

    fn recycle(&mut self, job: Job) {
        if let Some(room) = job.into_room()
            && self.spare.len() < SPARE
        {
            self.spare.push(room);
        }
    }

    fn complain(&mut self, job: &Job, error: &io::Error) {
        let Admission::Passed {
            suppressed: left_out,
        } = self.complaints.admit(logging::now())
        else {
            return;
        };
        let path = self.common.image.path().display();
        let what = match job.action() {
            Action::Read => "read",
            Action::Write { .. } => "write",
            Action::Sync => "flush",
            Action::Punch | Action::Discard => "discard",
            Action::Zero => "zero",
        };
        let more = match left_out {
            0 => String::new(),
            _ => format!(" ({left_out} errors before it were not told)"),
        };
        let (offset, len) = (job.offset(), job.len());
        log::error!(
            "{path}: cannot {what} {len} bytes at {offset}: {error}{more}; the guest is told of an I/O error"
        );
    }
}

/// Says to who tracks it that the host has written to the data's buffers: all of them, for it may have written more than
/// it says where it failed.
fn mark(chain: &Chain, output: u32, job: &Job) -> Result<(), Fault> {
    let Some(memory) = job.memory() else {
        return Ok(());
    };
    let range = (0, output);
    chain
        .writable
        .slices(&**memory, range, Permissions::Write, |slice| {
            slice.bitmap().mark_dirty(0, slice.len());
        })
}

/// Answers a request: the status is the last byte for the device to write. Of the data the first `written` bytes are.
fn answer(
    cx: &mut Cx<'_>,
    queue: usize,
    chain: Chain,
    status: Status,
    written: u32,
) -> Result<(), Fault> {
    let memory = cx.memory;
    let output = chain.writable.len().saturating_sub(1);
    let mut writer = chain.writer(&**memory);
    writer.skip(output);
    writer.write_all(&[status as u8])?;
    // What was written in one piece from the start (2.7.8.2).
    let len = if written == output {
        output + 1
    } else {
        written
    };
    cx.queues[queue].add_used(&**memory, chain, len)
}

impl Handler for BlockHandler {
    fn sources(&self) -> Vec<Source> {
        let wakers = (0..).zip(self.engine.wakers());
        wakers
            .map(|(token, fd)| Source {
                fd,
                token,
                interest: EventSet::IN,
            })
            .collect()
    }

    fn notified(&mut self, cx: &mut Cx<'_>, queue: usize) -> Result<(), Fault> {
        self.left.resize(cx.queues.len(), false);
        self.take(cx, queue)?;
        self.turn(cx)
    }

    fn ready(&mut self, cx: &mut Cx<'_>, _: u32, _: EventSet) -> Result<(), Fault> {
        self.turn(cx)
    }

    /// Waits for all I/O. Chains that were not taken stay in the queue.
    fn rest(&mut self, cx: &mut Cx<'_>) -> Result<(), Fault> {
        let mut outcome = Ok(());
        while self.free.len() < self.tasks.len() {
            self.hand_over();
            while let Some(completion) = self.engine.completed() {
                outcome = outcome.and(self.completed(cx, completion));
                self.hand_over();
            }
            if self.free.len() < self.tasks.len() {
                self.engine.wait();
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_error_in_ten_seconds_is_told_and_the_others_are_counted() {
        let complaints = RateLimit::new(COMPLAINTS, 1);
        let tell = |seconds| match complaints.admit(Duration::from_secs(seconds)) {
            Admission::Passed { suppressed } => Some(suppressed),
            _ => None,
        };
        assert_eq!(tell(0), Some(0));
        assert_eq!((tell(1), tell(9)), (None, None));
        assert_eq!(tell(10), Some(2));
        assert_eq!(tell(11), None);
        assert_eq!(tell(100), Some(1));
    }
}
