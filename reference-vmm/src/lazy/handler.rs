// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page-fault handler in another process, which has the userfaultfd: Firecracker's protocol.
//!
//! Its process is watched. When it dies, every page that it has not brought is lost: the guest's end is told, and then they
//! are poisoned, so that who waits for one wakes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use async_pf::external::{self, Mapping, Mappings};
use async_pf::pager::{GiveUp, PagedSlot, Pager, PagerConfig};
use async_pf::{Fetched, PageSource, SourceError};
use memslots::Gfn;
use memslots::uffd::{Registration, Uffd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::LazyError;
use super::events::Events;
use crate::snapshot::pages::Region;
use crate::unix_socket;

/// The handler, and what it was given. Dropped, it is told by the end of its connection.
pub(super) struct Handler {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    given: Arc<Given>,
}

struct Given {
    path: PathBuf,
    uffd: Uffd,
    registrations: Vec<Registration>,
    /// Kept: a handler that looks sees by it that this process lives.
    _stream: UnixStream,
    events: Arc<Events>,
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
        let stream = UnixStream::connect(path).map_err(|source| LazyError::Connect {
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
                uffd,
                registrations,
                _stream: stream,
                events,
            }),
        );
        let thread = match lives {
            Ok(lives) => {
                let (stop, given) = (Arc::clone(&stop), Arc::clone(&given));
                let thread = std::thread::Builder::new().name("lazy-handler".into());
                let run = move || {
                    if died(&lives, &stop) {
                        given.give_up();
                    }
                };
                Some(thread.spawn(run).map_err(process("start a thread"))?)
            }
            Err(error) => {
                log::warn!(
                    "the page-fault handler at {} cannot be watched ({error}): if it dies, the guest waits for ever",
                    path.display()
                );
                None
            }
        };
        Ok(Handler {
            stop,
            thread,
            given,
        })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // It cannot be full.
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

/// Waits until the process has ended, which is true, or the machine has.
fn died(lives: &OwnedFd, stop: &EventFd) -> bool {
    let mut fds = [stop.as_raw_fd(), lives.as_raw_fd()].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        // SAFETY: an array of pollfds, and its length.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        let [stop, lives] = fds;
        match ready {
            _ if ready > 0 && stop.revents != 0 => return false,
            _ if ready > 0 && lives.revents != 0 => return true,
            // Memory, for one, of which the kernel has none.
            _ if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted => {
                return false;
            }
            _ => {}
        }
    }
}

impl Given {
    fn give_up(&self) {
        let path = self.path.display();
        self.events.tell(format!(
            "the page-fault handler at {path} has ended, and the guest's memory with it"
        ));
        self.poison();
    }

    /// Poisons what is not there, and wakes who waits for it.
    fn poison(&self) {
        let slots = self
            .registrations
            .iter()
            .map(|of| PagedSlot::new(of, Gfn(0), Arc::new(Nothing)));
        let config = PagerConfig {
            give_up: GiveUp::Poison,
            ..PagerConfig::default()
        };
        let pager = slots
            .collect::<Result<_, _>>()
            .and_then(|slots| Pager::start(&self.uffd, slots, config));
        match pager {
            Ok(pager) => pager.close(),
            Err(error) => log::error!("cannot give the guest's memory up: {error}"),
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
