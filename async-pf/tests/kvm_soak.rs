// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pager again and again, while its source fails, dawdles or is cut off, and the pager itself goes: beside prefetch, memory
//! that is given back and write protection. Four threads in place of vCPUs read what is right, or have an error where the
//! page was lost; nobody waits for ever.
//!
//! What goes wrong in a round is drawn from its number and the seed, which is printed: `SOAK_SEED=N` draws the same again, and
//! `SOAK_ROUND=N` does that one alone. `LONG_TESTS=1` makes it 1,000 rounds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Read;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_pf::pager::{PagedSlot, Pager, PagerConfig, PagerEvents};
use async_pf::trouble::{Draw, Troubled, severed};
use async_pf::{Fetched, PageSource, SourceError};
use memslots::uffd::{Cause, Fault, Features, Modes, ProtectRole, Uffd, Wake};
use memslots::{Backing, Gfn, Mapping, PAGE_SIZE};
use vm_memory::GuestAddress;

const P: u64 = PAGE_SIZE;
const PAGES: u64 = 1024;
const DEADLINE: Duration = Duration::from_secs(1);
/// Who is not done by then hangs.
const WATCHDOG: Duration = Duration::from_secs(60);

/// What becomes of the pages on their way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Nothing,
    /// The source fails and dawdles, but not for good.
    Rough,
    /// The same, behind connections that are cut and short of breath.
    Severed,
    /// The source has not this page, or never answers for it.
    Bad(u64),
    Mute(u64),
    /// The pager is dropped when its source was asked so often.
    Dropped(u64),
}

impl Trouble {
    fn draw(draw: &mut Draw) -> Self {
        // One that is not given back.
        let page = draw.below(PAGES / 64) * 64 + draw.below(60);
        match draw.below(8) {
            0 | 1 => Trouble::Nothing,
            2 | 3 => Trouble::Rough,
            4 => Trouble::Severed,
            5 => Trouble::Bad(page),
            6 if draw.once_in(4) => Trouble::Mute(page),
            6 => Trouble::Rough,
            _ => Trouble::Dropped(draw.below(100)),
        }
    }

    fn is_harmless(self) -> bool {
        matches!(self, Trouble::Nothing | Trouble::Rough | Trouble::Severed)
    }

    /// Whether there may be an error in place of this page: no other goes with one that the source has not.
    fn may_lose(self, page: u64) -> bool {
        match self {
            Trouble::Nothing | Trouble::Rough | Trouble::Severed => false,
            Trouble::Bad(bad) => page == bad,
            // Who waits behind it may be late, and what has not come when the pager goes does not.
            Trouble::Mute(_) | Trouble::Dropped(_) => true,
        }
    }
}

/// The first and the last word of a page; every seventh is zero.
fn expected(gfn: u64) -> [u64; 2] {
    let key = gfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    match gfn % 7 {
        0 => [0, 0],
        _ => [key, !key],
    }
}

/// Of the last four of 64 pages: they are given back.
fn is_given_back(page: u64) -> bool {
    page % 64 >= 60
}

/// Pages with a keyed pattern.
#[derive(Debug)]
struct Keyed;

impl PageSource for Keyed {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        for (gfn, page) in (first.0..).zip(into.chunks_mut(P as usize)) {
            page.fill(0);
            let [head, tail] = expected(gfn);
            page[..8].copy_from_slice(&head.to_ne_bytes());
            page[4088..].copy_from_slice(&tail.to_ne_bytes());
        }
        Ok(Fetched::Bytes)
    }
}

/// They, with trouble.
fn troubled(trouble: Trouble, draw: &Draw, drop: mpsc::Sender<()>) -> Arc<dyn PageSource> {
    let source = Troubled::new(Keyed, draw.clone());
    match trouble {
        Trouble::Nothing => Arc::new(source),
        Trouble::Rough => Arc::new(source.rough()),
        Trouble::Severed => {
            let source = Arc::new(source.rough());
            Arc::new(severed(source, draw.state(), 1_000_000, 100).unwrap())
        }
        Trouble::Bad(page) => Arc::new(source.without(page)),
        Trouble::Mute(page) => Arc::new(source.mute(page)),
        Trouble::Dropped(after) => Arc::new(source.at_each(move |fetched| {
            if fetched == after {
                drop.send(()).unwrap_or_default();
            }
        })),
    }
}

/// Lets who writes to a protected page go on.
#[derive(Default)]
struct Unprotect {
    role: OnceLock<ProtectRole>,
    start: usize,
}

impl PagerEvents for Unprotect {
    fn write_protected(&self, fault: &Fault) -> bool {
        let page = (fault.address.0 - self.start) as u64 / P * P;
        let role = self.role.get().expect("nothing is protected before");
        match role.unprotect(page..page + P, Wake::Now) {
            Err(error) => {
                assert_eq!(error.cause, Cause::Changing);
                false
            }
            Ok(()) => true,
        }
    }
}

/// The first and the last word of a page, by a system call, which says `EFAULT` where a load would end the process.
fn peek(start: usize, page: u64) -> Option<[u64; 2]> {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let at = start + (page * P) as usize;
    for at in [at, at + 4088] {
        // SAFETY: eight bytes of a mapping that lives as long as the test; the kernel reads them.
        let wrote = unsafe { libc::write(writer.as_raw_fd(), at as *const libc::c_void, 8) };
        if wrote < 0 {
            let errno = std::io::Error::last_os_error().raw_os_error();
            assert_eq!(errno, Some(libc::EFAULT));
            return None;
        }
        assert_eq!(wrote, 8);
    }
    let mut words = [0; 16];
    reader.read_exact(&mut words).unwrap();
    let (head, tail) = words.split_at(8);
    Some([head, tail].map(|word| u64::from_ne_bytes(word.try_into().unwrap())))
}

fn round(trouble: Trouble, mut draw: Draw) {
    let uffd = Uffd::open(
        Features::EVENT_REMOVE | Features::POISON,
        Features::WP_UNPOPULATED,
    )
    .expect("this test needs a userfaultfd that can poison: run it as root, or as the error says");
    let is_memfd = draw.once_in(2);
    let backing = match is_memfd {
        true => Backing::memfd(PAGES * P),
        false => Backing::anonymous(PAGES * P),
    };
    let memory = Arc::new(Mapping::new(&backing, GuestAddress(0)).unwrap());
    let modes = Modes::MISSING | Modes::WRITE_PROTECT;
    let registration = uffd.register_all(&memory, modes).unwrap();
    let start = memory.host().0;
    let events = Arc::new(Unprotect {
        start,
        ..Unprotect::default()
    });
    let (drop_it, dropped) = mpsc::channel();
    let seed = draw.state();
    let source = troubled(trouble, &draw, drop_it);
    let slot = PagedSlot::new(&registration, Gfn(0), source).unwrap();
    let config = PagerConfig {
        workers: 1 + draw.below(3) as usize,
        // What is tried again, and what is not there, is late only if it hangs.
        deadline: match trouble {
            Trouble::Mute(_) | Trouble::Dropped(_) => DEADLINE,
            _ => WATCHDOG,
        },
        events: events.clone(),
        ..PagerConfig::default()
    };
    let pager = Mutex::new(Some(Pager::start(&uffd, vec![slot], config).unwrap()));
    let role = registration.lend_protect().unwrap();
    // What is lost of it was protected before it came.
    role.protect(0..PAGES / 2 * P).unwrap();
    assert!(events.role.set(role).is_ok());
    let seen = |page: u64| {
        let has = peek(start, page);
        let right = has.is_none_or(|words| words == expected(page));
        assert!(right, "page {page} has {has:x?}");
        assert!(
            has.is_some() || trouble.may_lose(page),
            "page {page} is lost"
        );
        has.is_some()
    };
    // A guest that has lost a page is stopped.
    let stopped = AtomicBool::new(false);
    let stopped = &stopped;
    // Who gives memory back waits for a pager that reads of it.
    let gives_back = !matches!(trouble, Trouble::Dropped(_));
    let settled = |page| !gives_back || !is_given_back(page);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..4u64)
            .map(|vcpu| {
                let mut draw = Draw::of(seed, vcpu + 1);
                scope.spawn(move || {
                    for _ in 0..PAGES {
                        let page = draw.below(PAGES);
                        if !settled(page) {
                            continue;
                        }
                        // Relaxed: it orders nothing else.
                        if !seen(page) || stopped.load(Ordering::Relaxed) {
                            stopped.store(true, Ordering::Relaxed);
                            return;
                        }
                        if trouble.is_harmless() && page % 4 == vcpu {
                            // A write of what is there: the page stays right, and is written.
                            let at = (start + (page * P) as usize) as *mut u64;
                            // SAFETY: of the mapping; no other thread writes this page.
                            unsafe { at.write_volatile(expected(page)[0]) };
                        }
                    }
                })
            })
            .collect();
        if gives_back {
            scope.spawn(|| {
                for block in 0..PAGES / 64 {
                    let first = block * 64 + 60;
                    let at = (start + (first * P) as usize) as *mut libc::c_void;
                    // SAFETY: whole pages of the mapping, which nobody has a reference to.
                    let given = unsafe { libc::madvise(at, 4 * P as usize, libc::MADV_DONTNEED) };
                    assert_eq!(given, 0);
                    for page in first..first + 4 {
                        let has = peek(start, page);
                        // What a memfd has is there still.
                        let right = match has {
                            Some(words) => words == [0, 0] || is_memfd && words == expected(page),
                            None => trouble.may_lose(page),
                        };
                        assert!(right, "page {page} was given back and has {has:x?}");
                    }
                }
            });
        }
        for _ in 0..draw.below(60) {
            let first = draw.below(PAGES - 32);
            if let Some(pager) = &*pager.lock().unwrap() {
                let _ = pager.prefetch(0, Gfn(first)..Gfn(first + 32));
            }
        }
        if trouble.is_harmless() || draw.once_in(2) {
            pager.lock().unwrap().as_ref().unwrap().prefetch_rest();
        }
        if let Trouble::Dropped(_) = trouble {
            // Sooner or later, or never.
            while dropped.recv_timeout(Duration::from_millis(5)).is_err()
                && !threads.iter().all(|thread| thread.is_finished())
            {}
            drop(pager.lock().unwrap().take());
        }
    });
    let mut left = pager.into_inner().unwrap();
    if let Trouble::Mute(_) = trouble {
        // Each page would be as late.
        left = None;
    }
    if let (Some(pager), true) = (&left, trouble.is_harmless()) {
        assert!(pager.wait(WATCHDOG));
        assert_eq!((pager.progress().lost, pager.stats().unanswered), (0, 0));
    }
    for page in (0..PAGES).filter(|page| settled(*page)) {
        seen(page);
    }
    if let (Some(pager), Trouble::Bad(page)) = (&left, trouble) {
        assert_eq!(peek(start, page), None, "page {page}");
        // That one, and no other.
        assert_eq!(pager.progress().lost, 1);
    }
    drop(left);
}

/// Ends the process if a round does not end.
fn watched(name: &str, run: impl FnOnce()) {
    let (over, ends) = mpsc::channel::<()>();
    let said = name.to_owned();
    let failed = Arc::new(AtomicBool::new(true));
    let watch = thread::spawn(move || {
        if ends.recv_timeout(WATCHDOG * 2) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("it hangs: {said}");
            std::process::abort();
        }
    });
    struct Says<'a>(&'a str, Arc<AtomicBool>);
    impl Drop for Says<'_> {
        fn drop(&mut self) {
            // Relaxed: of this thread alone.
            if self.1.load(Ordering::Relaxed) {
                eprintln!("failed: {}", self.0);
            }
        }
    }
    let says = Says(name, Arc::clone(&failed));
    run();
    // Relaxed: as above.
    failed.store(false, Ordering::Relaxed);
    drop((says, over));
    watch.join().unwrap();
}

#[test]
fn what_is_read_is_right_or_an_error_whatever_becomes_of_the_pages_on_their_way() {
    let number = |name: &str| std::env::var(name).ok().map(|said| said.parse().unwrap());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = number("SOAK_SEED").unwrap_or(now.as_nanos() as u64 % 1_000_000_000);
    let long = std::env::var_os("LONG_TESTS").is_some_and(|value| value != "0");
    let rounds = match number("SOAK_ROUND") {
        Some(one) => one..one + 1,
        None if long => 0..1000,
        None => 0..24,
    };
    eprintln!("SOAK_SEED={seed}, {} rounds", rounds.end - rounds.start);
    for number in rounds {
        let mut draw = Draw::of(seed, number);
        let trouble = Trouble::draw(&mut draw);
        let name = format!("SOAK_SEED={seed} SOAK_ROUND={number}: {trouble:?}");
        watched(&name, || round(trouble, draw));
    }
}
