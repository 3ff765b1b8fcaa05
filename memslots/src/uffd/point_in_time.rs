// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory as it was at one moment, for who reads it later, while those that write it go on: what a background snapshot is
//! made of.
//!
//! ```text
//!   begin          lay …            freeze                 read, done …               drop
//!   registered ──► protected ─────► all protected ───────► taken, and free again ───► nothing protected
//!                  the guest runs   the guest is paused    the guest runs
//!                  a write: noted,  what was written is    a write: copied first,
//!                  and goes on      protected again        and goes on
//! ```
//!
//! Protection is laid while the guest runs, so the pause at [`freeze`](PointInTime::freeze) costs what was written since,
//! whatever the size of memory ([what the rest costs](self#what-it-costs)). Behind it a thread of this answers writes: the
//! page's contents are put aside before the first one. [`read`](PointInTime::read) gives each page as it was then, from
//! there or from memory.
//!
//! # Who may write when
//! Anyone whose write is a page fault: vCPUs, threads, system calls that copy to user space. What was pinned before the
//! moment and is written by a device behind it is not told: let all I/O end before, as a paused machine does anyway, and
//! begin none that was pinned before.
//!
//! # What takes protection away without a write
//! Pages that are given back, and those that the kernel merges with equal ones, come again without protection, and no one
//! is told. So nothing of the kind happens here while this lives: [`GuestRam::punch`](crate::GuestRam::punch) is refused
//! ([`PunchError::Kept`](crate::PunchError::Kept)), and a mapping that is
//! [`mergeable`](crate::Backing::mergeable), or of which a part is, is not taken. What a consumer does by itself is its
//! own to leave: `MADV_DONTNEED`, a hole in the file, `MADV_MERGEABLE` or `PR_SET_MEMORY_MERGE`, here or in a process
//! that shares the memory.
//!
//! # What it costs
//! A byte for each page of each mapping, as long as this lives. A page table's 8 bytes for each page of 4 KiB that is
//! protected, there or not, and that stays when this has gone (4 GiB of nothing: page tables of 68 KiB before, 8.1 MiB
//! then). The pause looks at what was written since it was protected and at what is wanted besides, and at nothing else:
//! where nothing was written, it is 3 µs for 1 GiB and 4 µs for 64.
//!
//! # When it goes wrong
//! Dropped at any time, and whenever its thread ends for whatever reason, all protection is gone and who waited goes on.
//! [`read`](PointInTime::read) then says that the moment is lost.

use super::copy_book::{Contents, CopyBook, OnWrite};
use super::sys::poll;
use super::{
    Event, Features, LendError, Messages, Modes, OpError, OpenError, ProtectRole, RegisterError,
    Registration, Uffd, Wake,
};
use crate::mapping::Keeping;
use crate::{Errno, MapError, Mapping, MemoryKind};
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// What is protected, or copied for a reader, while writers wait for it: tens of microseconds.
const LAY: u64 = 2 << 20;
const READ: u64 = 64 << 10;
/// The largest pages that a write may have to wait for the copy of.
const MOST_PAGE: u64 = 2 << 20;

/// There is no such moment, or no more.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PointInTimeError {
    /// There is no userfaultfd.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Memory cannot be registered.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// Somebody else protects it.
    #[error(transparent)]
    Lend(#[from] LendError),
    /// A write would wait for the copy of such a page.
    #[error(
        "pages of {0:#x} bytes, of which each would be copied while its writer waits: {MOST_PAGE:#x} are the most"
    )]
    PageSize(u64),
    /// The kernel merges equal pages of it: what becomes of them is not told.
    #[error(
        "mapping {area}, or a part of it, is mergeable (KSM): what is in pages that the kernel merges cannot be kept as \
         it was"
    )]
    Mergeable {
        /// Which mapping.
        area: usize,
    },
    /// Its thread cannot be made.
    #[error("cannot make the thread that answers page faults: {0}")]
    Thread(io::Error),
    /// Pages that are not there cannot be made readable, which this kernel needs to protect them.
    #[error(transparent)]
    Populate(#[from] MapError),
    /// The kernel does not protect.
    #[error(transparent)]
    Protect(#[from] OpError),
    /// The moment is lost: everything is free to be written.
    #[error("memory is not kept as it was any more: {0}")]
    Lost(String),
    /// The moment has been: nothing can be added to it.
    #[error(
        "memory is kept as it was at a moment that has been; another moment is another PointInTime"
    )]
    Frozen,
    /// These bytes are not of the moment: they were taken before, or not wanted.
    #[error("{offset:#x} of mapping {area} is not kept as it was")]
    NotKept {
        /// Which mapping.
        area: usize,
        /// Bytes from its start.
        offset: u64,
    },
}

/// What was protected in the pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// Pages, each of its mapping's size.
    pub pages: u64,
    /// How long that took.
    pub took: Duration,
}

/// Memory that is kept as it was. [The module](self) says how it is used.
pub struct PointInTime {
    shared: Arc<Shared>,
    /// Dropped, the thread ends.
    stop: Option<io::PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    uffd: Uffd,
    state: Mutex<State>,
    /// There is more room for copies, or nothing is kept any more.
    room: Condvar,
    /// Pages that were copied aside.
    copied: AtomicU64,
    /// Behind the roles, so that those go first.
    areas: Vec<Area>,
}

struct State {
    book: CopyBook,
    /// Of each area; none when the moment is over.
    roles: Vec<ProtectRole>,
    /// Why it is over.
    lost: Option<String>,
}

struct Area {
    mapping: Arc<Mapping>,
    /// Pages that are not there have to be made readable, to be protected.
    populate: bool,
    /// Kept for its drop.
    _registration: Registration,
    /// Behind it: what is given back before would be lost.
    _keeping: Keeping,
}

impl PointInTime {
    /// Registers these mappings with a userfaultfd of their own, and starts the thread. They are known by their place from
    /// then on. `room` is how many bytes of copies there may be: when they are, writers wait for the reader. Nothing is
    /// protected yet. Waits for a [`punch`](crate::GuestRam::punch) that is under way; none begins while this lives.
    ///
    /// # Errors
    /// [`PointInTimeError`]; nothing has changed.
    pub fn begin(
        mappings: impl IntoIterator<Item = Arc<Mapping>>,
        room: u64,
    ) -> Result<Self, PointInTimeError> {
        let uffd = Uffd::open(Features::PAGEFAULT_FLAG_WP, Features::WP_UNPOPULATED)?;
        let shared = Arc::new(Shared::new(uffd, mappings, room)?);
        let (stopped, stop) = io::pipe().map_err(PointInTimeError::Thread)?;
        let of = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("copy-aside".into());
        let thread = builder.spawn(move || of.run(stopped.as_raw_fd()));
        Ok(PointInTime {
            shared,
            stop: Some(stop),
            thread: Some(thread.map_err(PointInTimeError::Thread)?),
        })
    }

    /// Protects a part of a mapping, whole pages, while its writers run. Each of them waits for tens of microseconds at
    /// most, and the first time that it writes to a page.
    ///
    /// # Errors
    /// [`PointInTimeError::Frozen`] behind [`freeze`](Self::freeze), and nothing has changed. The others of
    /// [`PointInTimeError`]; what was laid until then is.
    pub fn lay(&self, area: usize, range: Range<u64>) -> Result<(), PointInTimeError> {
        self.shared.lay(area, range)
    }

    /// Keeps everything as it is now that was [laid](Self::lay), and these parts of mappings besides. Nobody writes
    /// meanwhile: the machine is paused, and its I/O has ended. Once: there is one moment.
    ///
    /// # Errors
    /// [`PointInTimeError::Frozen`] when it has been, and it stays as it is. The others of [`PointInTimeError`]; then it
    /// has not been, and may be tried again unless it is lost.
    pub fn freeze(&self, wanted: &[(usize, Range<u64>)]) -> Result<Frozen, PointInTimeError> {
        self.shared.freeze(wanted)
    }

    /// What was at `offset` of a mapping at the moment. Pages of 4 KiB are given once.
    ///
    /// # Errors
    /// [`PointInTimeError::Lost`], [`PointInTimeError::NotKept`].
    pub fn read(&self, area: usize, offset: u64, into: &mut [u8]) -> Result<(), PointInTimeError> {
        self.shared.read(area, offset, into)
    }

    /// Whole pages of a mapping that nobody wants any more: they are written without a fault.
    ///
    /// # Errors
    /// [`PointInTimeError`].
    pub fn done(&self, area: usize, range: Range<u64>) -> Result<(), PointInTimeError> {
        self.shared.done(area, range)
    }

    /// Where a copy waits to be read, if there is not much room left for others: a mapping, and bytes from its start.
    pub fn urgent(&self) -> Option<(usize, u64)> {
        self.shared.lock().book.urgent()
    }

    /// How many pages were copied because they were written before they were read.
    pub fn copied(&self) -> u64 {
        // Relaxed: a number for people.
        self.shared.copied.load(Ordering::Relaxed)
    }
}

impl Drop for PointInTime {
    fn drop(&mut self) {
        // First: the thread answers until nobody can wait for it.
        self.shared.free_all(None);
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that answers page faults panicked");
        }
    }
}

impl fmt::Debug for PointInTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PointInTime")
            .field("uffd", &self.shared.uffd)
            .finish_non_exhaustive()
    }
}

/// Frees all memory when the thread ends.
struct FreeAtEnd<'a>(&'a Shared);

impl Drop for FreeAtEnd<'_> {
    fn drop(&mut self) {
        self.0.free_all(Some("its thread has ended"));
    }
}

impl Shared {
    fn new(
        uffd: Uffd,
        mappings: impl IntoIterator<Item = Arc<Mapping>>,
        room: u64,
    ) -> Result<Self, PointInTimeError> {
        let unpopulated = uffd.enabled().contains(Features::WP_UNPOPULATED);
        let (mut areas, mut roles, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
        for (area, mapping) in mappings.into_iter().enumerate() {
            let unit = mapping.page_size();
            if unit > MOST_PAGE {
                return Err(PointInTimeError::PageSize(unit));
            }
            let keeping = mapping.keep();
            let _keeping = keeping.ok_or(PointInTimeError::Mergeable { area })?;
            let registration = uffd.register_all(&mapping, Modes::WRITE_PROTECT)?;
            roles.push(registration.lend_protect()?);
            sizes.push((mapping.size(), unit));
            areas.push(Area {
                populate: mapping.kind() == MemoryKind::Anonymous && !unpopulated,
                mapping,
                _registration: registration,
                _keeping,
            });
        }
        Ok(Shared {
            uffd,
            state: Mutex::new(State {
                book: CopyBook::new(sizes, room),
                roles,
                lost: None,
            }),
            room: Condvar::new(),
            copied: AtomicU64::new(0),
            areas,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // What is in it is whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lay(&self, area: usize, range: Range<u64>) -> Result<(), PointInTimeError> {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + LAY);
            if let Some(of) = self.areas.get(area).filter(|of| of.populate) {
                of.mapping.populate_read(start..end)?;
            }
            let mut state = self.lock();
            state.check_before()?;
            state.protect(area, start..end)?;
            start = end;
        }
        Ok(())
    }

    fn freeze(&self, wanted: &[(usize, Range<u64>)]) -> Result<Frozen, PointInTimeError> {
        let begun = Instant::now();
        let mut state = self.lock();
        state.check_before()?;
        let mut pages = 0;
        for (area, run) in state.book.to_freeze(wanted) {
            // What never was laid may not be there.
            if let Some(of) = self.areas.get(area).filter(|of| of.populate) {
                of.mapping.populate_read(run.clone())?;
            }
            pages += (run.end - run.start) / state.book.unit(area).max(1);
            state.protect(area, run)?;
        }
        state.check()?;
        state.book.freeze();
        let took = begun.elapsed();
        Ok(Frozen { pages, took })
    }

    fn read(&self, area: usize, offset: u64, into: &mut [u8]) -> Result<(), PointInTimeError> {
        let mut done = 0;
        while done < into.len() {
            let mut state = self.lock();
            // As long as one turn lasts: then those that wait to write have theirs.
            let turn = done + READ as usize;
            while done < into.len().min(turn) {
                let rest = into.get_mut(done..).unwrap_or_default();
                done += self.read_one(&mut state, area, offset + done as u64, rest)?;
            }
        }
        Ok(())
    }

    /// What of `into` is in one unit: how many bytes.
    fn read_one(
        &self,
        state: &mut State,
        area: usize,
        offset: u64,
        into: &mut [u8],
    ) -> Result<usize, PointInTimeError> {
        state.check()?;
        let not_kept = || PointInTimeError::NotKept { area, offset };
        let mapping = &self.areas.get(area).ok_or_else(not_kept)?.mapping;
        let size = mapping.page_size();
        let (unit, within) = ((offset / size) as usize, (offset % size) as usize);
        let count = into.len().min(size as usize - within);
        let into = into.get_mut(..count).unwrap_or_default();
        match state.book.contents(area, unit).ok_or_else(not_kept)? {
            Contents::Memory => mapping.read(offset, into),
            Contents::Aside(copy) => {
                into.copy_from_slice(copy.get(within..within + count).ok_or_else(not_kept)?);
            }
        }
        // Of a larger page the rest may be read later.
        if count as u64 == size && state.book.free(area, unit..unit + 1) {
            self.room.notify_all();
        }
        Ok(count)
    }

    fn done(&self, area: usize, range: Range<u64>) -> Result<(), PointInTimeError> {
        let mut state = self.lock();
        state.check()?;
        let units = state.book.units(area, &range);
        state.book.free(area, units);
        self.room.notify_all();
        if let Some(role) = state.roles.get(area) {
            role.unprotect(range, Wake::Now)?;
        }
        Ok(())
    }

    /// The thread.
    fn run(&self, stopped: RawFd) {
        // Whatever ends it: nobody waits for it then.
        let _free = FreeAtEnd(self);
        self.serve(stopped);
    }

    /// Answers writers until `stopped` can be read or is closed.
    fn serve(&self, stopped: RawFd) {
        let mut messages = Messages::with_capacity(64);
        let ended = loop {
            match poll([self.uffd.as_raw_fd(), stopped], None) {
                Ok([_, true]) => return,
                Ok([true, _]) => {}
                Ok(_) | Err(Errno(libc::EINTR)) => continue,
                Err(errno) => break format!("poll: {errno}"),
            }
            if let Err(error) = self.answer(&mut messages) {
                break error.to_string();
            }
        };
        log::error!("the userfaultfd fails, and memory is free to be written: {ended}");
        self.free_all(Some(&ended));
    }

    /// Answers those that have been told.
    fn answer(&self, messages: &mut Messages) -> Result<(), PointInTimeError> {
        let read = self.uffd.read(messages);
        read.map_err(|errno| PointInTimeError::Lost(format!("userfaultfd: {errno}")))?;
        for event in messages {
            if let Event::Fault(fault) = event {
                self.on_write(fault.address.0)?;
            }
        }
        Ok(())
    }

    fn on_write(&self, address: usize) -> Result<(), PointInTimeError> {
        let mut areas = self.areas.iter().enumerate();
        let found = areas.find(|(_, of)| of.mapping.host_range().contains(&address));
        let Some((area, of)) = found else {
            return Ok(());
        };
        let size = of.mapping.page_size();
        let unit = (address - of.mapping.host().0) as u64 / size;
        let start = unit * size;
        let mut state = self.lock();
        while state.lost.is_none() {
            match state.book.on_write(area, unit as usize) {
                OnWrite::Release => {}
                OnWrite::Copy => {
                    let mut copy = vec![0; size as usize].into_boxed_slice();
                    of.mapping.read(start, &mut copy);
                    state.book.set_aside(area, unit as usize, copy);
                    self.copied.fetch_add(1, Ordering::Relaxed);
                }
                OnWrite::Wait => {
                    let waited = self.room.wait(state);
                    state = waited.unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            }
            if let Some(role) = state.roles.get(area) {
                role.unprotect(start..start + size, Wake::Now)?;
            }
            return Ok(());
        }
        Ok(())
    }

    /// Takes all protection away, for good, and wakes who waits.
    fn free_all(&self, why: Option<&str>) {
        let mut state = self.lock();
        if state.lost.is_none() {
            state.lost = Some(why.unwrap_or("it was given up").to_owned());
        }
        // A role that is dropped unprotects.
        state.roles.clear();
        drop(state);
        self.room.notify_all();
    }
}

impl State {
    fn check(&self) -> Result<(), PointInTimeError> {
        match &self.lost {
            None => Ok(()),
            Some(why) => Err(PointInTimeError::Lost(why.clone())),
        }
    }

    /// Refuses what is for before the moment.
    fn check_before(&self) -> Result<(), PointInTimeError> {
        self.check()?;
        match self.book.is_frozen() {
            true => Err(PointInTimeError::Frozen),
            false => Ok(()),
        }
    }

    fn protect(&mut self, area: usize, range: Range<u64>) -> Result<(), PointInTimeError> {
        self.check()?;
        if let Some(role) = self.roles.get(area) {
            role.protect(range.clone())?;
            self.book.protected(area, range);
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "point_in_time_tests.rs"]
mod tests;
