// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `SIGBUS` on a thread that is no vCPU's and has touched a page that did not come.
//!
//! The page is poisoned and the guest's end has been told, or is told now: the main thread stops the guest and says why. The
//! thread that touched the page must not go on meanwhile, for there is nothing that it could go on with, and need not die,
//! for with it the process would, without a word. So it is parked. A device that is left so does not come to rest, which
//! the machine's end waits for, for a moment, and then leaves ([`Running::leave_to_exit`](crate::vm::Running::leave_to_exit)).
//! Where the parked thread is one that the end has to wait for, who heard of it ends the process, with the reason and the end's
//! status; and the parked thread itself does if nobody has, with status 1 and a word.
//!
//! Who can be told by an error has the memory [found](find) first, which is no signal: a snapshot, a migration, the debugger.
//!
//! The signal's handler is kvm-core's ([`BusErrors`]): it keeps what is a vCPU's, asks here about the rest, and what is not
//! ours goes where it went before.
//!
//! # Why it is sound
//! What is called in the handler does nothing but loads and stores of atomics and system calls that are safe there (`write` to
//! an eventfd, which is never closed, and to stderr, `nanosleep`, `tcsetattr`, `_exit`), takes no lock that it would wait for,
//! and allocates nothing. It comes back only where the address is none of a guest's.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_core::{BusErrors, BusErrorsError, HostAddress};
use memslots::PAGE_SIZE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::events::Events;

/// How long a parked thread waits for the process to end before it ends it: longer than the end waits for devices.
const PARKED_SECONDS: u32 = 12;
/// How long who heard of a parked thread waits for that: longer than the end waits for a device that is parked.
const HEARD: Duration = Duration::from_secs(3);

/// Machines whose memory may be looked for, and ranges of each.
const RANGES: usize = 64;

/// A range of guest memory; none where the end is 0. Written under [`KNOWN`]: the others, then the end with release, which
/// pairs with the handler's acquire.
struct Place {
    start: AtomicUsize,
    end: AtomicUsize,
    /// A thread is parked there, and its machine has not been told.
    parked: AtomicBool,
}

static PLACES: [Place; RANGES] = [const {
    Place {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        parked: AtomicBool::new(false),
    }
}; RANGES];

/// The descriptor of the process's eventfd, which is written to when a thread is parked; -1 before there is one. Written under
/// [`KNOWN`], before any place is.
static BELL: AtomicI32 = AtomicI32::new(-1);

/// A thread is parked.
static ANY: AtomicBool = AtomicBool::new(false);
/// Somebody says how it ended.
static SAID: AtomicBool = AtomicBool::new(false);

/// Whose the places are.
static KNOWN: Mutex<Known> = Mutex::new(Known {
    machines: Vec::new(),
    bell: None,
    hears: false,
});

struct Known {
    machines: Vec<(Vec<usize>, Arc<Events>)>,
    /// For the process's life.
    bell: Option<Arc<EventFd>>,
    /// A thread waits at it.
    hears: bool,
}

fn known() -> MutexGuard<'static, Known> {
    // What is in it is whole after each statement.
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

const LAST_WORDS: &[u8] = b"reference-vmm: a thread that needs guest memory which did not come keeps the guest from being stopped: the monitor ends\n";

/// Installs kvm-core's handler, and has it ask here.
///
/// # Errors
/// [`BusErrorsError::Handler`]; the action of `SIGBUS` is what it was.
pub(crate) fn install() -> Result<(), BusErrorsError> {
    let errors = BusErrors::install()?;
    // SAFETY: it does what may be done at any moment (see above), and never has the access made again.
    unsafe { errors.otherwise(park) };
    Ok(())
}

/// In the signal's handler.
fn park(HostAddress(address): HostAddress) -> bool {
    let place = PLACES.iter().find(|place| {
        let end = place.end.load(Ordering::Acquire);
        address < end && address >= place.start.load(Ordering::Relaxed)
    });
    let Some(place) = place else {
        return false;
    };
    // Relaxed: who misses it waits for as long as for a device that is at work.
    ANY.store(true, Ordering::Relaxed);
    // Release: who hears the bell finds it.
    place.parked.store(true, Ordering::Release);
    let bell = BELL.load(Ordering::Relaxed);
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes; the descriptor is -1, which is refused, or the eventfd's, which is never closed. It cannot be full.
    unsafe { libc::write(bell, one.as_ptr().cast(), one.len()) };
    for _ in 0..PARKED_SECONDS {
        let second = libc::timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        // SAFETY: a valid time; what is left of it is not asked for.
        unsafe { libc::nanosleep(&second, std::ptr::null_mut()) };
    }
    crate::console::restore();
    // SAFETY: so many bytes of a static; the process ends, whatever is held.
    unsafe {
        libc::write(2, LAST_WORDS.as_ptr().cast(), LAST_WORDS.len());
        libc::_exit(1);
    }
}

/// The memory of a machine, while some of it may not come.
pub(super) struct Parked(Arc<Events>);

impl Parked {
    /// These addresses are guest memory until this is dropped. A thread that is parked there is told to `events`, when
    /// [somebody hears](hear) of it.
    pub(super) fn new(hosts: Vec<Range<usize>>, events: Arc<Events>) -> Self {
        let mut known = known();
        if known.bell.is_none() {
            match EventFd::new(EFD_CLOEXEC) {
                // Relaxed: published with the places.
                Ok(bell) => {
                    BELL.store(bell.as_raw_fd(), Ordering::Relaxed);
                    known.bell = Some(Arc::new(bell));
                }
                Err(error) => log::warn!("{NOBODY}: {error}"),
            }
        }
        let mut places = Vec::new();
        for host in hosts {
            let free = |place: &Place| place.end.load(Ordering::Relaxed) == 0;
            // One too many meets what there was before.
            let Some(at) = PLACES.iter().position(free) else {
                break;
            };
            if let Some(place) = PLACES.get(at) {
                place.start.store(host.start, Ordering::Relaxed);
                place.parked.store(false, Ordering::Relaxed);
                place.end.store(host.end, Ordering::Release);
            }
            places.push(at);
        }
        known.machines.push((places, Arc::clone(&events)));
        Parked(events)
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        forget(&self.0);
    }
}

/// All of the memory is there whose loss would be told to `events`, or nobody uses it.
pub(super) fn forget(events: &Arc<Events>) {
    let mut known = known();
    let own = |(_, of): &(_, Arc<Events>)| Arc::ptr_eq(of, events);
    while let Some(at) = known.machines.iter().position(own) {
        let (places, _) = known.machines.swap_remove(at);
        for place in places.iter().filter_map(|at| PLACES.get(*at)) {
            place.end.store(0, Ordering::Relaxed);
        }
    }
}

/// Some guest memory will not come.
#[derive(Debug, thiserror::Error)]
#[error("it does not come: {0}")]
pub(crate) struct Lost(String);

/// Waits for guest memory that may not come, at these addresses, if there is such there: who reads it behind this has no
/// signal. It is read and not touched by this process: a system call says that there is none.
///
/// # Errors
/// [`Lost`], with the reason.
pub(crate) fn find(host: Range<usize>) -> Result<(), Lost> {
    let is_there = |place: &Place| {
        let end = place.end.load(Ordering::Acquire);
        host.start < end && place.start.load(Ordering::Relaxed) < host.end
    };
    if host.is_empty() || !PLACES.iter().any(is_there) {
        return Ok(());
    }
    let each = PAGE_SIZE as usize;
    let start = host.start / each * each;
    let len = host.end.next_multiple_of(each) - start;
    loop {
        // SAFETY: the advice makes pages present that are not, and changes none; memory of this process's that may be shared
        // with others is no matter to it, nor that there may be none.
        let asked = unsafe { libc::madvise(start as *mut _, len, libc::MADV_POPULATE_READ) };
        if asked == 0 {
            return Ok(());
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => {}
            // What memory that was poisoned is told by, in one or another kernel.
            Some(libc::EFAULT | libc::EHWPOISON) => break,
            // A kernel that does not know of it has no poison either.
            _ => return Ok(()),
        }
    }
    let known = known();
    let machines = known.machines.iter();
    let mut of = machines.filter(|(places, _)| {
        let mut places = places.iter().filter_map(|at| PLACES.get(*at));
        places.any(is_there)
    });
    let events = of.next().map(|(_, events)| Arc::clone(events));
    drop(known);
    Err(Lost(events.map_or_else(String::new, |of| of.reason())))
}

/// Whether a thread is parked: what it is at does not come to its end.
pub(crate) fn is_any_parked() -> bool {
    ANY.load(Ordering::Relaxed)
}

/// Whether it is the caller's to say how it ended: where a thread is parked somebody else may end the process for it.
pub(crate) fn may_say() -> bool {
    !is_any_parked() || !SAID.swap(true, Ordering::Relaxed)
}

const NOBODY: &str =
    "nobody is told of a thread that needs memory which did not come, and the process ends with it";

/// From now on machines are told of threads that are parked, and of those that have been: by a thread of the process's, which a
/// signal's handler cannot start. It costs a tenth of a millisecond, which a guest's beginning need not wait for.
pub(super) fn hear() {
    let mut known = known();
    let Some(bell) = known.bell.clone().filter(|_| !known.hears) else {
        return;
    };
    let thread = std::thread::Builder::new().name("lazy-bus".into());
    match thread.spawn(move || listen(&bell)) {
        Ok(_) => known.hears = true,
        Err(error) => log::warn!("{NOBODY}: {error}"),
    }
}

fn listen(bell: &EventFd) {
    loop {
        match bell.read() {
            Ok(_) => {
                let told = tell();
                // Otherwise it is one whose machine is gone.
                if !told.is_empty() {
                    end_for(&told);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                log::error!("{NOBODY}: {error}");
                return;
            }
        }
    }
}

/// Ends the process with the word of these machines' end, if it does not end by itself.
fn end_for(told: &[Arc<Events>]) {
    thread::sleep(HEARD);
    if !may_say() {
        return;
    }
    let ends = told.iter().filter_map(|events| events.last_word());
    let mut status = 1;
    for end in ends {
        status = end.exit_status();
        if let Some(words) = end.words() {
            crate::stderr::write(format!("reference-vmm: {words}\n").as_bytes());
        }
    }
    crate::console::restore();
    // SAFETY: the process ends, whatever is held.
    unsafe { libc::_exit(status.into()) };
}

/// Tells the machines at whose memory a thread is parked.
fn tell() -> Vec<Arc<Events>> {
    let known = known();
    let machines = known.machines.iter().filter(|(places, _)| {
        let mut places = places.iter().filter_map(|at| PLACES.get(*at));
        // Acquire: pairs with the handler's. One is enough: a machine has one end.
        places.any(|place| place.parked.swap(false, Ordering::Acquire))
    });
    let told: Vec<_> = machines.map(|(_, events)| Arc::clone(events)).collect();
    drop(known);
    told.iter().for_each(|events| events.parked());
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::end::{EndSignal, GuestEnd};
    use crate::lazy::OnLoss;
    use memslots::uffd::{Features, Modes, Uffd, Wake};
    use memslots::{Backing, Mapping};
    use std::process::Command;
    use std::time::Duration;
    use vm_memory::GuestAddress;

    const CHILD: &str = "LAZY_BUS_CHILD";

    /// In a process of its own, for the handler is a process's: a thread (or two) touches a page that was poisoned, another waits for
    /// the end, and all of it ends with status 42.
    #[test]
    fn child() {
        let Ok(what) = std::env::var(CHILD) else {
            return;
        };
        install().unwrap();
        if what == "ours, after one that was sent" {
            // The standard library's handler gives its place up for it.
            // SAFETY: a signal to this thread.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        let uffd = Uffd::open(Features::POISON, Features::NONE).unwrap();
        let memory = Mapping::new(&Backing::anonymous(0x2000), GuestAddress(0)).unwrap();
        let memory = Arc::new(memory);
        let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
        let role = registration.lend_fill().unwrap();
        role.poison(0..0x1000, Wake::Now).unwrap();
        let end = Arc::new(EndSignal::new().unwrap());
        let events = Arc::new(Events::new(Arc::clone(&end), OnLoss::Poison));
        events.tell("the reason".into());
        let ranges = match what.as_str() {
            "another's" => Vec::new(),
            _ => vec![memory.host_range()],
        };
        let _parked = Parked::new(ranges, events);
        let at = memory.host().0;
        let touch = move || {
            // SAFETY: mapped for as long as the process lives.
            let byte = unsafe { (at as *const u8).read_volatile() };
            panic!("it went on with {byte}");
        };
        let late = what == "ours, two before anybody hears";
        if !late {
            hear();
        }
        std::thread::spawn(touch);
        if late {
            std::thread::spawn(touch);
            let bell = BELL.load(Ordering::Relaxed);
            while count_of(bell) < 2 {
                std::thread::yield_now();
            }
            hear();
        }
        if what == "ours, and nobody ends" {
            loop {
                std::thread::park();
            }
        }
        while !end.is_told() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let Some(GuestEnd::Failed(why)) = end.get() else {
            panic!("{end:?}");
        };
        assert_eq!(why, "a device needs what is lost: the reason");
        std::process::exit(42);
    }

    /// What an eventfd has counted.
    fn count_of(eventfd: i32) -> u64 {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{eventfd}")).unwrap();
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("eventfd-count:"));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    }

    fn output(what: &str) -> std::process::Output {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "lazy::bus::tests::child", "--nocapture"]);
        child.env(CHILD, what).output().unwrap()
    }

    fn run(what: &str) -> std::process::ExitStatus {
        output(what).status
    }

    #[test]
    fn who_touches_what_did_not_come_is_parked_and_the_end_is_told() {
        assert_eq!(run("ours").code(), Some(42));
        assert_eq!(run("ours, after one that was sent").code(), Some(42));
        assert_eq!(run("ours, two before anybody hears").code(), Some(42));
    }

    #[test]
    fn a_process_that_does_not_end_for_it_is_ended_with_the_reason() {
        let ended = output("ours, and nobody ends");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        let reason = "reference-vmm: a device needs what is lost: the reason\n";
        assert!(said.contains(reason), "{said}");
    }

    #[test]
    fn what_is_found_lost_is_told_with_the_reason_and_no_signal() {
        let uffd = Uffd::open(Features::POISON, Features::NONE).unwrap();
        let memory = Mapping::new(&Backing::anonymous(0x3000), GuestAddress(0)).unwrap();
        let memory = Arc::new(memory);
        let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
        let role = registration.lend_fill().unwrap();
        role.zero(0..0x1000, Wake::Now).unwrap();
        role.poison(0x1000..0x2000, Wake::Now).unwrap();
        let end = Arc::new(EndSignal::new().unwrap());
        let events = Arc::new(Events::new(end, OnLoss::Poison));
        let start = memory.host().0;
        let at = |from: usize, to: usize| find(start + from..start + to);
        let parked = Parked::new(vec![memory.host_range()], Arc::clone(&events));
        at(8, 16).unwrap();
        at(0xfff, 0xfff).unwrap();
        // It comes upon it before that is told.
        std::thread::scope(|scope| {
            let found = scope.spawn(|| at(0xff8, 0x1001));
            events.tell("the reason".into());
            let lost = found.join().unwrap().unwrap_err().to_string();
            assert_eq!(lost, "it does not come: the reason");
        });
        let lost = at(0x1ff8, 0x2000).unwrap_err().to_string();
        assert_eq!(lost, "it does not come: the reason");
        // Of another's memory nothing is asked.
        drop(parked);
        at(0x1000, 0x3000).unwrap();
    }

    #[test]
    fn who_touches_what_is_no_guests_has_what_there_was_before() {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(run("another's").signal(), Some(libc::SIGBUS));
    }
}
