// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk with a fake driver, and a host that fails as the test wants it.

#![allow(dead_code, reason = "not every test file uses all of it")]

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use reference_vmm::devices::virtio::block::engine::{Completion, Engine, Job};
use reference_vmm::devices::virtio::block::{Block, DiskConfig, Image, Io, Threads, Uring};
use reference_vmm::devices::virtio::device::VirtioDevice;
use reference_vmm::devices::virtio::fake::{FakeDriver, Request};
use tempfile::NamedTempFile;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// Every feature that a disk offers.
pub const ALL: u64 = 0xffff_ffff;

/// An image of so many bytes, with a pattern in it.
pub fn image(len: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), pattern(len)).unwrap();
    file
}

/// Bytes that differ from their neighbours, sector by sector too.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 512 * 13) as u8).collect()
}

pub fn config(path: &Path, io: Io) -> DiskConfig {
    DiskConfig {
        io,
        ..DiskConfig::new(path)
    }
}

/// The engines that this host has.
pub fn engines() -> Vec<Io> {
    let file = image(512);
    let has_uring = config(file.path(), Io::Uring).open().is_ok();
    if !has_uring {
        eprintln!("this host permits no io_uring: threads alone are tried");
    }
    match has_uring {
        true => vec![Io::Uring, Io::Threads],
        false => vec![Io::Threads],
    }
}

pub fn engine(image: &Image, io: Io) -> io::Result<Box<dyn Engine>> {
    Ok(match io {
        Io::Threads => Box::new(Threads::new(image, 4)?),
        _ => Box::new(Uring::new(image)?),
    })
}

/// A driver that has accepted everything.
pub fn driver(disk: Block) -> FakeDriver<Block> {
    let mut driver = FakeDriver::new(disk);
    driver.start(ALL);
    driver
}

pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

pub fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&count.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    range
}

/// What a request came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    /// As the used ring says.
    pub written: u32,
    pub data: Vec<u8>,
}

/// Reads what a used request has in its buffers; its last one is the status.
pub fn answer<D: VirtioDevice>(driver: &FakeDriver<D>, request: &Request, written: u32) -> Answer {
    let (status, data) = request.writable.split_last().unwrap();
    let data = data
        .iter()
        .flat_map(|(at, len)| driver.bytes(*at, *len as usize));
    Answer {
        status: driver.bytes(status.0, 1)[0],
        written,
        data: data.collect(),
    }
}

/// Makes a request of a header, data to write and room for what is read, available, and waits for it.
pub fn ask<D: VirtioDevice>(
    driver: &mut FakeDriver<D>,
    queue: usize,
    readable: &[&[u8]],
    room: &[u32],
) -> Answer {
    let writable: Vec<u32> = room.iter().copied().chain([1]).collect();
    let request = driver.request(queue, readable, &writable);
    driver.notify(queue);
    let (head, written) = driver.used(queue);
    assert_eq!(head, request.head);
    answer(driver, &request, written)
}

pub fn read<D: VirtioDevice>(driver: &mut FakeDriver<D>, sector: u64, len: u32) -> Answer {
    ask(driver, 0, &[&header(IN, sector)], &[len])
}

pub fn write<D: VirtioDevice>(driver: &mut FakeDriver<D>, sector: u64, data: &[u8]) -> u8 {
    ask(driver, 0, &[&header(OUT, sector), data], &[]).status
}

pub fn flush<D: VirtioDevice>(driver: &mut FakeDriver<D>) -> u8 {
    ask(driver, 0, &[&header(FLUSH, 0)], &[]).status
}

/// What a host does with a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// All of it, rightly.
    Pass,
    /// The first bytes of a read or a write, at least one.
    Short(u64),
    /// Nothing, with this errno.
    Fail(i32),
    /// Nothing until [`Host::release`], then rightly.
    Hold,
}

type Script = Box<dyn FnMut(&Job) -> Fate + Send>;

/// A host that fails as the test wants it. Clones are the same.
#[derive(Clone)]
pub struct Host(Arc<Mutex<Inner>>);

struct Inner {
    script: Script,
    held: bool,
    events: Vec<Arc<EventFd>>,
    /// What was begun (`true`) and done, in order: the job's text.
    log: Vec<(bool, String)>,
}

impl Host {
    pub fn new(script: impl FnMut(&Job) -> Fate + Send + 'static) -> Self {
        Host(Arc::new(Mutex::new(Inner {
            script: Box::new(script),
            held: true,
            events: Vec::new(),
            log: Vec::new(),
        })))
    }

    /// A disk on this host.
    pub fn disk(&self, config: &DiskConfig, depth: usize) -> Block {
        let image = Image::open(&config.path, config.readonly).unwrap();
        self.disk_of(image, config, depth)
    }

    /// A disk of this image on this host.
    pub fn disk_of(&self, image: Image, config: &DiskConfig, depth: usize) -> Block {
        let (host, io) = (self.clone(), config.io);
        Block::with_engines(image, config, move |image, _| {
            let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
            host.0.lock().unwrap().events.push(event.clone());
            Ok(Box::new(FakeEngine {
                inner: engine(image, io)?,
                host: host.clone(),
                depth,
                event,
                originals: HashMap::new(),
                held: VecDeque::new(),
                failed: VecDeque::new(),
            }))
        })
    }

    /// Lets go what is held, and holds nothing any more.
    pub fn release(&self) {
        let mut inner = self.0.lock().unwrap();
        inner.held = false;
        inner
            .events
            .iter()
            .for_each(|event| event.write(1).unwrap());
    }

    /// What was begun and done so far.
    pub fn log(&self) -> Vec<(bool, String)> {
        self.0.lock().unwrap().log.clone()
    }
}

struct FakeEngine {
    inner: Box<dyn Engine>,
    host: Host,
    depth: usize,
    event: Arc<EventFd>,
    /// The whole jobs, by token, of which the inner engine has what the host does.
    originals: HashMap<usize, Job>,
    held: VecDeque<(usize, Job)>,
    failed: VecDeque<Completion>,
}

impl FakeEngine {
    fn let_go(&mut self) {
        if self.held.is_empty() || self.host.0.lock().unwrap().held {
            return;
        }
        let _ = self.event.read();
        for (token, job) in self.held.drain(..) {
            assert!(self.inner.push(token, job).is_ok());
        }
        self.inner.submit();
    }
}

fn text(job: &Job) -> String {
    format!("{:?} {}+{}", job.action(), job.offset(), job.len())
}

impl Engine for FakeEngine {
    fn depth(&self) -> usize {
        self.depth
    }

    fn wakers(&self) -> Vec<RawFd> {
        let mut wakers = self.inner.wakers();
        wakers.push(self.event.as_raw_fd());
        wakers
    }

    fn push(&mut self, token: usize, job: Job) -> Result<(), Job> {
        if self.originals.len() + self.failed.len() == self.depth {
            return Err(job);
        }
        let mut inner = self.host.0.lock().unwrap();
        inner.log.push((true, text(&job)));
        let fate = (inner.script)(&job);
        let hold = fate == Fate::Hold && inner.held;
        drop(inner);
        let part = match fate {
            Fate::Fail(errno) => {
                let result = Err(io::Error::from_raw_os_error(errno));
                self.failed.push_back(Completion { token, job, result });
                return Ok(());
            }
            Fate::Short(len) => job.first(len.max(1)),
            Fate::Pass | Fate::Hold => job.first(job.len()),
        };
        self.originals.insert(token, job);
        match hold {
            true => self.held.push_back((token, part)),
            false => assert!(self.inner.push(token, part).is_ok()),
        }
        Ok(())
    }

    fn submit(&mut self) {
        self.let_go();
        self.inner.submit();
    }

    fn completed(&mut self) -> Option<Completion> {
        self.let_go();
        let completion = self.failed.pop_front().or_else(|| {
            let Completion { token, result, .. } = self.inner.completed()?;
            let job = self.originals.remove(&token).unwrap();
            Some(Completion { token, job, result })
        })?;
        let mut inner = self.host.0.lock().unwrap();
        inner.log.push((false, text(&completion.job)));
        Some(completion)
    }

    fn wait(&mut self) {
        self.let_go();
        if !self.failed.is_empty() {
            return;
        }
        if self.held.is_empty() {
            return self.inner.wait();
        }
        let mut fd = libc::pollfd {
            fd: self.event.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which lives through the call.
        unsafe { libc::poll(&raw mut fd, 1, -1) };
    }
}
