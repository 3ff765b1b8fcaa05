// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that move from one machine of this process to another, over lines that break.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use guests::scribe::scribe64;
use reference_vmm::end::{EndSignal, GuestEnd};
use reference_vmm::lazy::LazyState;
use reference_vmm::migration::address::Address;
use reference_vmm::migration::incoming::{Incoming, IncomingError, IncomingRequest};
use reference_vmm::migration::outgoing::{MigrateRequest, Outgoing, OutgoingError};
use reference_vmm::migration::record::{MigrationRecord, Step};
use reference_vmm::vm::Machine;

use super::WATCHDOG;
use super::keeper::{Guest, digits, machine};

pub fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("incoming");
    (folder, path)
}

/// The scribe, with 3 MiB behind it that it never touches and that are not zero: up to where it writes. What nobody waits for
/// follows it as slowly as the limit has it.
pub fn laden() -> Vec<u8> {
    let mut code = scribe64().to_vec();
    code.resize(3 << 20, 0xa5);
    code
}

/// A guest that has begun, and who waits for it.
pub struct Ready {
    pub guest: Guest,
    pub folder: tempfile::TempDir,
    pub path: PathBuf,
    pub incoming: Incoming,
}

/// One with memory that it never touches and that is not zero.
pub fn ready() -> Ready {
    ready_with(&laden(), 1, "16M")
}

/// One of another machine.
pub fn ready_with(code: &[u8], cpus: u32, memory: &str) -> Ready {
    let (_kernel, config) = machine(code, cpus, memory);
    let mut guest = Guest::boot(&config);
    guest.hear(2);
    let (folder, path) = place();
    let incoming = bind(Address::Unix(path.clone()));
    Ready {
        guest,
        folder,
        path,
        incoming,
    }
}

/// One guest's halves: what it said here, where it is no more, and there is all that it was to say.
pub fn has_lost_nothing(here: Guest, there: Guest) {
    let (said, end) = here.leave();
    assert_eq!(end, None, "{said}");
    ends_whole(said, there);
}

/// `said` before is the beginning of what the guest says until it ends.
pub fn ends_whole(said: String, there: Guest) {
    let (rest, end) = there.quit();
    let all = said + &rest;
    assert_eq!(end, Some(GuestEnd::DebugExit(0)), "{all}");
    assert_eq!(all, digits(all.len() - 1) + "!");
}

/// A guest on its way.
pub struct Moving<'a> {
    pub outgoing: &'a Outgoing,
    there: &'a Mutex<Option<Result<Guest, IncomingError>>>,
    came: &'a Condvar,
}

impl Moving<'_> {
    /// Waits until it is so.
    pub fn until(&self, what: impl Fn(&MigrationRecord) -> bool) {
        let begun = Instant::now();
        while !self.outgoing.record().is_ok_and(|record| what(&record)) {
            assert!(begun.elapsed() < WATCHDOG, "{:?}", self.outgoing.record());
            std::thread::yield_now();
        }
    }

    /// The guest, when it is there, or why it does not come.
    pub fn came(&self) -> Result<Guest, IncomingError> {
        let there = self.there.lock().unwrap();
        let none = |there: &mut Option<_>| there.is_none();
        let waited = self.came.wait_timeout_while(there, WATCHDOG, none);
        let came = waited.unwrap().0.take();
        came.expect("nobody has come")
    }

    /// The guest, when it is there and the source knows that.
    pub fn there(&self) -> Guest {
        let there = self.came().unwrap();
        self.until(|record| {
            let stop = record.switch_over.as_ref();
            let last = stop.and_then(|stop| stop.steps.last());
            last.is_some_and(|taken| taken.step == Step::Start)
        });
        there
    }
}

pub type Moved = Result<MigrationRecord, OutgoingError>;

/// Ends the source with a look that fails: else it may ask, or serve, for ever, and the test would wait for that and not say
/// what it has found.
struct EndsWithIt<'a>(&'a Guest);

impl Drop for EndsWithIt<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.running.stop();
        }
    }
}

/// Moves `guest` as asked, and does something meanwhile. If that panics the migration ends, and so does this.
pub fn moving<T>(
    guest: &Guest,
    incoming: Incoming,
    request: &MigrateRequest,
    meanwhile: impl FnOnce(&Moving<'_>) -> T,
) -> (Moved, T) {
    let outgoing = Outgoing::default();
    let (there, came) = (Mutex::new(None), Condvar::new());
    let end = Arc::new(EndSignal::new().unwrap());
    let (console, writer) = std::io::pipe().unwrap();
    let gone = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (there, came, gone, outgoing) = (&there, &came, &gone, &outgoing);
        let _ends = EndsWithIt(guest);
        scope.spawn(move || {
            let stop = || gone.load(SeqCst).then(|| "no source is left".to_owned());
            let running = incoming.receive(writer, &end, &stop, Machine::start);
            let guest = running.map(|running| Guest {
                running,
                end,
                console,
                said: Vec::new(),
            });
            *there.lock().unwrap() = Some(guest);
            came.notify_all();
        });
        let here = scope.spawn(move || {
            let moved = outgoing.migrate(&guest.running, &guest.end, request);
            gone.store(moved.is_err(), SeqCst);
            moved
        });
        let meanwhile = meanwhile(&Moving {
            outgoing,
            there,
            came,
        });
        (here.join().unwrap(), meanwhile)
    })
}

pub fn request(to: &Address, postcopy: &str) -> MigrateRequest {
    MigrateRequest {
        postcopy: postcopy.parse().unwrap(),
        ..MigrateRequest::new(to.to_string())
    }
}

pub fn bind(address: Address) -> Incoming {
    Incoming::bind(&IncomingRequest::new(address)).unwrap()
}

pub fn is_whole(guest: &Guest) {
    let begun = Instant::now();
    while guest.running.lazy_progress().unwrap().state != LazyState::Whole {
        assert!(
            begun.elapsed() < WATCHDOG,
            "{:?}",
            guest.running.lazy_progress()
        );
        std::thread::yield_now();
    }
}

/// What passes connections on to who waits at another socket. It can be cut, which ends all of them, and be closed; and one
/// of them can be cut alone, or stand still.
pub struct Line {
    pub path: PathBuf,
    /// Bytes that went to the destination, and back.
    pub bytes: [AtomicUsize; 2],
    /// It is cut once, when so many went in this direction.
    cut_at: (usize, usize),
    pub cut: AtomicBool,
    pub closed: AtomicBool,
    open: Mutex<Vec<UnixStream>>,
    /// Bytes of each connection, in the order in which they came, to the destination and back.
    pub each: Mutex<Vec<[usize; 2]>>,
    /// The one that stands still.
    held: Mutex<Option<usize>>,
    let_go: Condvar,
    /// It is closed behind these bytes to the destination, whose answer to them does not come through.
    pub closes_behind: Mutex<Option<Vec<u8>>>,
}

impl Line {
    pub fn new(folder: &Path, to: PathBuf, cut_at: (usize, usize)) -> Arc<Self> {
        let path = folder.join("line");
        let listener = UnixListener::bind(&path).unwrap();
        let line = Arc::new(Line {
            path,
            bytes: Default::default(),
            cut_at,
            cut: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            open: Mutex::default(),
            each: Mutex::default(),
            held: Mutex::default(),
            let_go: Condvar::new(),
            closes_behind: Mutex::default(),
        });
        let this = Arc::clone(&line);
        // It ends with the process.
        std::thread::spawn(move || {
            for from in listener.incoming() {
                let from = from.unwrap();
                // Who connects hears its end.
                let Ok(to) = UnixStream::connect(&to) else {
                    continue;
                };
                let mut open = this.open.lock().unwrap();
                if this.closed.load(SeqCst) {
                    continue;
                }
                let ends = [&from, &to].map(|end| end.try_clone().unwrap());
                open.extend(ends);
                drop(open);
                let number = {
                    let mut each = this.each.lock().unwrap();
                    each.push([0; 2]);
                    each.len() - 1
                };
                let back = (to.try_clone().unwrap(), from.try_clone().unwrap());
                for (way, (from, to)) in [(from, to), back].into_iter().enumerate() {
                    let this = Arc::clone(&this);
                    std::thread::spawn(move || this.pass(number, way, from, to));
                }
            }
        });
        line
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.path.clone())
    }

    pub fn cut(&self) {
        for end in self.open.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Until it is open again, nobody comes through.
    pub fn close(&self) {
        self.closed.store(true, SeqCst);
        self.cut();
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.each.lock().unwrap().len()
    }

    /// Ends one that is open still.
    pub fn cut_one(&self, number: usize) {
        for end in &self.open.lock().unwrap()[2 * number..2 * number + 2] {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Nothing comes through on this one, until another is said or none.
    pub fn hold(&self, number: Option<usize>) {
        *self.held.lock().unwrap() = number;
        self.let_go.notify_all();
    }

    fn pass(&self, number: usize, way: usize, mut from: UnixStream, mut to: UnixStream) {
        let mut chunk = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut chunk) {
            let held = self.held.lock().unwrap();
            let waits = |held: &mut Option<usize>| *held == Some(number);
            drop(self.let_go.wait_while(held, waits).unwrap());
            self.each.lock().unwrap()[number][way] += len;
            let before = self.bytes[way].fetch_add(len, SeqCst);
            let strikes = way == self.cut_at.0 && before + len > self.cut_at.1;
            let mut pass = len;
            if strikes && !self.cut.swap(true, SeqCst) {
                pass = self.cut_at.1.saturating_sub(before);
            }
            let last = self.closes_behind.lock().unwrap();
            let closes = last
                .as_ref()
                .is_some_and(|last| chunk[..len].ends_with(last));
            drop(last);
            if way == 0 && closes {
                // Before the destination has them, or it may answer before this thread goes on. Nor may who hears that the line
                // is cut come back by another connection.
                self.closed.store(true, SeqCst);
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.write_all(&chunk[..len]);
                return self.close();
            }
            if to.write_all(&chunk[..pass]).is_err() || pass < len {
                if pass < len {
                    self.cut();
                }
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}

pub const NOWHERE: (usize, usize) = (0, usize::MAX);

/// A guest that has gone, by a line that carries the rest of its memory slowly.
pub fn slow(to: &Address) -> MigrateRequest {
    MigrateRequest {
        bandwidth_limit: Some(1 << 20),
        ..request(to, "after-rounds=0")
    }
}
