// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page-fault handler in another process, which has the userfaultfd: Firecracker's protocol.
//!
//! Its process is watched, and where that has given the connection to another, the connection. When it dies, every page that it has not brought is lost: the guest's end is told, and then they
//! are poisoned, so that who waits for one wakes. So it is with one that lives and brings nothing while somebody waits, for
//! as long as a page may take. Faults are told to the handler alone; but the kernel says how many wait at a userfaultfd, and
//! which pages of memory are there.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_pf::external::{self, Mapping, Mappings};
use async_pf::pager::{PagedSlot, Pager};
use async_pf::{Fetched, PageSource, SourceError};
use memslots::uffd::{Registration, Uffd};
use memslots::{Gfn, PAGE_SIZE};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::LazyError;
use super::events::Events;
use crate::no_wait::ready;
use crate::snapshot::pages::Region;
use crate::{units, unix_socket};

/// How often it is looked whether the handler hangs, within the time that a page may take.
const LOOKS: u32 = 8;
/// How long it is waited for at once where as many wait at its socket as can.
const SLICE: Duration = Duration::from_millis(200);

/// The handler, and what it was given. Dropped, it is told by the end of its connection.
pub(super) struct Handler {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    given: Arc<Given>,
}

struct Given {
    path: PathBuf,
    /// How long a page may take.
    limit: Duration,
    uffd: Uffd,
    registrations: Vec<Registration>,
    /// Kept: a handler that looks sees by it that this process lives, and this one that somebody has its other end.
    stream: UnixStream,
    events: Arc<Events>,
    /// It has been said that who waits is not known. Relaxed: it is said once, about.
    blind: AtomicBool,
    /// It has been given up. Release, before anything is poisoned.
    lost: AtomicBool,
    /// One at a time lends the registrations.
    poisoning: Mutex<()>,
}

impl Handler {
    /// Connects to the handler at `path` and gives it `uffd`, and where `regions` of the file `memory` are in
    /// `registrations`. Blocks for `limit` at most.
    ///
    /// # Errors
    /// [`LazyError`]; it may have the userfaultfd all the same, of memory that nobody uses then.
    pub(super) fn hand_off(
        path: &Path,
        limit: Duration,
        uffd: Uffd,
        registrations: Vec<Registration>,
        regions: &[Region],
        events: Arc<Events>,
    ) -> Result<Self, LazyError> {
        let process = |what| move |source| LazyError::Process { what, source };
        let mappings = registrations.iter().zip(regions).map(|(of, region)| {
            let host = of.host_range();
            Mapping {
                base: host.start as u64,
                size: (host.end - host.start) as u64,
                offset: region.offset,
                page_size: of.mapping().page_size(),
            }
        });
        let mappings = Mappings::new(mappings.collect());
        let mappings = mappings.map_err(|source| LazyError::Mappings {
            path: path.to_owned(),
            source,
        })?;
        let stream = connect(path, limit, &events);
        let stream = stream.map_err(|source| LazyError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let lives = peer(&stream);
        // SAFETY: open for as long as `uffd` lives, which is longer than this.
        let descriptor = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) };
        let sent = external::send(&stream, descriptor, &mappings, limit);
        sent.map_err(|source| LazyError::HandOff {
            path: path.to_owned(),
            source,
        })?;
        let stop = EventFd::new(EFD_CLOEXEC).map_err(process("make an eventfd"))?;
        let (stop, given) = (
            Arc::new(stop),
            Arc::new(Given {
                path: path.to_owned(),
                limit,
                uffd,
                registrations,
                stream,
                events,
                blind: AtomicBool::new(false),
                lost: AtomicBool::new(false),
                poisoning: Mutex::new(()),
            }),
        );
        let lives = lives.inspect_err(|error| {
            log::warn!(
                "the page-fault handler at {} cannot be watched ({error}): that it died is known when somebody has waited \
                 for as long as a page may take",
                path.display()
            );
        });
        let thread = {
            let (stop, given) = (Arc::clone(&stop), Arc::clone(&given));
            let thread = std::thread::Builder::new().name("lazy-handler".into());
            let run = move || given.watch(lives.ok().as_ref(), &stop);
            Some(thread.spawn(run).map_err(process("start a thread"))?)
        };
        Ok(Handler {
            stop,
            thread,
            given,
        })
    }
}

impl Handler {
    /// How many pages are lost with it, once it has been given up: none where all had come.
    pub(super) fn lost(&self) -> Option<u64> {
        if !self.given.lost.load(Ordering::Acquire) {
            return None;
        }
        let registrations = &self.given.registrations;
        let sizes = registrations.iter().map(|of| of.mapping().size());
        let all = sizes.sum::<u64>() / PAGE_SIZE;
        // Where it cannot be known none is relied on.
        Some(all - present(registrations).unwrap_or(0).min(all))
    }

    /// The machine is to stop: who waits for memory waits no longer, but goes on with memory that is poisoned.
    pub(super) fn leave(&self) {
        // It cannot be full.
        let _ = self.stop.write(1);
        self.given.poison();
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // As above.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that watches the page-fault handler panicked");
        }
        // Nobody of this machine uses its memory any more; who did, in an unserved page, goes on with an error.
        self.given.poison();
    }
}

/// Connects within `limit`; where the machine ends meanwhile, nobody waits that long.
fn connect(path: &Path, limit: Duration, events: &Events) -> io::Result<UnixStream> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match unix_socket::connect_within(path, left.clamp(Duration::from_millis(1), SLICE)) {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    && left > SLICE
                    && !events.is_over() => {}
            connected => return connected,
        }
    }
}

/// A descriptor that is readable when the process at the other end has ended.
fn peer(stream: &UnixStream) -> io::Result<OwnedFd> {
    let process = unix_socket::peer(stream)?;
    // SAFETY: the call takes two numbers; a process of number 0, of another namespace, is refused.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    if pidfd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd as i32) })
}

/// What ended a wait.
enum Came {
    /// The machine is over.
    Stop,
    /// The process has ended.
    Died,
    /// It was time.
    Time,
}

/// Waits for one of them, for so long at most. Of whose life an event of `lives` is the end.
fn wait(lives: (RawFd, libc::c_short), stop: &EventFd, limit: Duration) -> Came {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Came::Time;
        }
        // Rounded up, so that the last millisecond is not spent looking.
        let left = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        match ready([(stop.as_raw_fd(), libc::POLLIN), lives], left) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Memory, for one, of which the kernel has none.
            Ok([true, _]) | Err(_) => return Came::Stop,
            Ok([_, true]) => return Came::Died,
            Ok(_) => {}
        }
    }
}

/// How many wait at a userfaultfd, whether their messages were read or not: `total` of its fdinfo, in `userfaultfd_show_fdinfo`
/// of Linux since 4.3.
fn waiting(fdinfo: &str) -> Option<u64> {
    let line = fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("total:"))?;
    line.trim().parse().ok()
}

/// Shows which pages of this memory are there, some at a time: the first one's number, and a byte for each, whose lowest bit
/// says so.
fn residence(range: Range<usize>, mut see: impl FnMut(u64, &[u8])) -> io::Result<()> {
    const CHUNK: usize = 1 << 20;
    let each = PAGE_SIZE as usize;
    let mut pages = vec![0u8; CHUNK.min(range.len() / each)];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(pages.len() * each);
        // SAFETY: mapped for as long as the registration is there, in whole pages, with a byte of room for each.
        let asked = unsafe { libc::mincore(at as *mut _, len, pages.as_mut_ptr()) };
        if asked != 0 {
            return Err(io::Error::last_os_error());
        }
        let first = ((at - range.start) / each) as u64;
        see(first, pages.get(..len / each).unwrap_or_default());
        at += len;
    }
    Ok(())
}

/// Pages of registered memory that are there.
fn present(registrations: &[Registration]) -> io::Result<u64> {
    let mut count = 0;
    for range in registrations.iter().map(Registration::host_range) {
        residence(range, |_, pages| {
            count += pages.iter().filter(|page| **page & 1 != 0).count() as u64;
        })?;
    }
    Ok(count)
}

/// The runs of a registration's pages that are not there, from 0 on.
fn missing(registration: &Registration) -> io::Result<Vec<Range<Gfn>>> {
    let mut runs: Vec<Range<Gfn>> = Vec::new();
    residence(registration.host_range(), |first, pages| {
        let absent = (first..).zip(pages).filter(|(_, page)| **page & 1 == 0);
        for (number, _) in absent {
            match runs.last_mut() {
                Some(run) if run.end.0 == number => run.end.0 += 1,
                _ => runs.push(Gfn(number)..Gfn(number + 1)),
            }
        }
    })?;
    Ok(runs)
}

impl Given {
    /// Until the machine is over, or the guest's memory is.
    fn watch(&self, lives: Option<&OwnedFd>, stop: &EventFd) {
        let path = self.path.display();
        let (mut looks, mut before) = (0, None);
        // A descriptor below zero is passed over.
        let mut watched = (lives.map_or(-1, AsRawFd::as_raw_fd), libc::POLLIN);
        let connection = (self.stream.as_raw_fd(), libc::POLLRDHUP);
        // Looks are counted, and not the time: this process may have been stopped meanwhile, and the handler with it.
        while looks < LOOKS {
            match wait(watched, stop, self.limit / LOOKS) {
                Came::Stop => return,
                // Who listens, and is known by that, need not be who serves.
                Came::Died
                    if watched != connection && matches!(ready([connection], 0), Ok([false])) =>
                {
                    log::info!(
                        "the process that listened at {path} has ended, and another one has its connection: that one is the \
                         page-fault handler"
                    );
                    watched = connection;
                    continue;
                }
                Came::Died => {
                    let why = "has ended, and the guest's memory with it";
                    return self.give_up(format!("the page-fault handler at {path} {why}"));
                }
                Came::Time => {}
            }
            // Who waits may be kicked out of it, and back again: a moment at which nobody waits says nothing.
            if self.waiting() == 0 {
                continue;
            }
            // What cannot be known is not counted.
            let there = present(&self.registrations).ok();
            looks = match there.is_some() && there == before {
                true => looks + 1,
                false => 0,
            };
            before = there;
        }
        self.give_up(format!(
            "the page-fault handler at {path} lives and has brought nothing for {}, while somebody waits for the guest's memory",
            units::time(self.limit)
        ));
    }

    /// How many wait for pages.
    fn waiting(&self) -> u64 {
        let file = format!("/proc/self/fdinfo/{}", self.uffd.as_raw_fd());
        let found = std::fs::read_to_string(&file)
            .map_err(|error| error.to_string())
            .and_then(|text| waiting(&text).ok_or_else(|| format!("{text:?}")));
        found.unwrap_or_else(|why| {
            if !self.blind.swap(true, Ordering::Relaxed) {
                log::warn!(
                    "a page-fault handler that brings nothing is not found out: {file} does not say who waits: {why}"
                );
            }
            0
        })
    }

    fn give_up(&self, why: String) {
        self.lost.store(true, Ordering::Release);
        self.events.tell(why);
        self.poison();
    }

    /// Poisons what is not there, and wakes who waits for it. To try it with each page that is costs as much time as memory is
    /// large: a second for 4 GiB.
    fn poison(&self) {
        let _alone = self
            .poisoning
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let slots = self.registrations.iter().map(|of| {
            let slot = PagedSlot::new(of, Gfn(0), Arc::new(Nothing))?;
            Ok(match missing(of) {
                Ok(runs) => slot.only(runs),
                // Each is tried.
                Err(_) => slot,
            })
        });
        // No message is read: the handler shares the userfaultfd, and may have a read of it wait.
        let poisoned = slots
            .collect::<Result<_, _>>()
            .and_then(|slots| Pager::poison(&self.uffd, slots));
        if let Err(error) = poisoned {
            log::error!("cannot give the guest's memory up: {error}");
        }
    }
}

/// Has no page.
struct Nothing;

impl PageSource for Nothing {
    fn fetch(&self, first: Gfn, _into: &mut [u8]) -> Result<Fetched, SourceError> {
        Err(SourceError::NoSuchPage { gfn: first })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::end::{EndSignal, GuestEnd, StopCause};
    use crate::lazy::OnLoss;

    #[test]
    fn a_handler_that_takes_nobody_is_not_waited_for_by_a_machine_that_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handler");
        let listener = unix_socket::Listener::bind(&path, 0).unwrap();
        let _first = unix_socket::connect(&path).unwrap();
        let end = Arc::new(EndSignal::new().unwrap());
        let events = Events::new(Arc::clone(&end), OnLoss::Stop);
        let (limit, begun) = (Duration::from_secs(60), Instant::now());
        end.tell(GuestEnd::Stopped(StopCause::Signal(libc::SIGTERM)));
        let refused = connect(&path, limit, &events).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        assert!(begun.elapsed() < limit / 2, "{:?}", begun.elapsed());
        // One that lives waits, and for as long as it may.
        let end = Arc::new(EndSignal::new().unwrap());
        let events = Events::new(end, OnLoss::Stop);
        let (limit, begun) = (SLICE * 2, Instant::now());
        let refused = connect(&path, limit, &events).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
        drop(listener);
    }

    #[test]
    fn who_waits_is_counted_whether_the_message_was_read_or_not() {
        let text =
            "pos:\t0\nflags:\t02000002\npending:\t1\ntotal:\t3\nAPI:\taa:1ffff:f00000000000001f\n";
        assert_eq!(waiting(text), Some(3));
        assert_eq!(waiting("pos:\t0\n"), None);
    }
}
