// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A monitor in a process of its own hands its userfaultfd off, and this crate's pager brings its memory: what it reads, what
//! it gives back, what becomes of it when the pages do not come, and of the pager when it ends.
//!
//! The monitor is this test's own program, started again with a part to play.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::env;
use std::io::{self, BufRead, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use async_pf::external::{HandOff, Mapping, Mappings, ServeError, receive, send, serve};
use async_pf::pager::{GiveUp, Pager, PagerConfig};
use async_pf::{Fetched, FilePiece, FileSource, PageSource, SourceError};
use memslots::uffd::{Features, Modes, OpenError, Uffd};
use memslots::{Backing, Gfn, Mapping as Memory, PAGE_SIZE};
use vm_memory::GuestAddress;

const P: u64 = PAGE_SIZE;
const LONG: Duration = Duration::from_secs(60);
/// What the monitor's memory is: pages, and at which page of the file they begin.
const AREAS: [(u64, u64); 2] = [(300, 100), (100, 0)];
const PART: &str = "ASYNC_PF_TEST_MONITOR";

/// The word of page `page` of the file; of every fifth it is none.
fn word(page: u64) -> u64 {
    match page % 5 {
        0 => 0,
        _ => page << 20 | 0xfeed,
    }
}

struct Words;

impl PageSource for Words {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        for (page, bytes) in (first.0..).zip(into.chunks_mut(P as usize)) {
            bytes.fill(0);
            bytes[..8].copy_from_slice(&word(page).to_ne_bytes());
        }
        Ok(Fetched::Bytes)
    }
}

fn read(memory: &Memory, page: u64) -> u64 {
    let at = memory.host().0 + (page * P) as usize;
    // SAFETY: within the mapping; read volatile, as another process fills it.
    unsafe { (at as *const u64).read_volatile() }
}

/// Not a test: the monitor, if this process was started as one.
#[test]
fn monitor() {
    let (Ok(part), Ok(socket)) = (env::var(PART), env::var("ASYNC_PF_TEST_SOCKET")) else {
        return;
    };
    let uffd = Uffd::open(Features::EVENT_REMOVE, Features::POISON)
        .expect("this test needs a userfaultfd: run it as root, or as the error says");
    let backings = [Backing::anonymous(300 * P), Backing::memfd(100 * P)];
    let memories =
        backings.map(|backing| Arc::new(Memory::new(&backing, GuestAddress(0)).unwrap()));
    let registrations =
        [0, 1].map(|area: usize| uffd.register_all(&memories[area], Modes::MISSING).unwrap());
    let mapping = |area: usize| Mapping {
        base: registrations[area].host_range().start as u64,
        size: AREAS[area].0 * P,
        offset: AREAS[area].1 * P,
        page_size: P,
    };
    let mappings = Mappings::new(vec![mapping(0), mapping(1)]).unwrap();
    let stream = UnixStream::connect(socket).unwrap();
    if part == "pipe" {
        let pipe = io::pipe().unwrap().0;
        send(&stream, OwnedFd::from(pipe), &mappings, LONG).unwrap();
        return;
    }
    send(&stream, &Borrowed(&uffd), &mappings, LONG).unwrap();
    match part.as_str() {
        "read" => {
            thread::scope(|scope| {
                for (memory, (pages, offset)) in memories.iter().zip(AREAS) {
                    for step in [1, 7] {
                        scope.spawn(move || {
                            for at in 0..pages {
                                let page = at * step % pages;
                                assert_eq!(read(memory, page), word(offset + page), "page {page}");
                            }
                        });
                    }
                }
            });
            // What it gives back is zeros, fetched or not.
            let at = (memories[0].host().0 + 50 * P as usize) as *mut libc::c_void;
            // SAFETY: whole pages of the mapping, which nobody has a reference to.
            let given = unsafe { libc::madvise(at, 10 * P as usize, libc::MADV_DONTNEED) };
            assert_eq!(given, 0);
            assert!((50..60).all(|page| read(&memories[0], page) == 0));
            assert_eq!(read(&memories[0], 61), word(161));
        }
        "touch" => {
            println!("{}", read(&memories[0], 299));
        }
        "wait" => {
            println!("{}", read(&memories[0], 1));
            // Until it is killed.
            let mut line = String::new();
            io::stdin().lock().read_line(&mut line).unwrap();
        }
        part => panic!("no part {part}"),
    }
}

/// The descriptor of a userfaultfd, to be sent.
struct Borrowed<'a>(&'a Uffd);

impl std::os::fd::AsFd for &Borrowed<'_> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        use std::os::fd::AsRawFd;
        // SAFETY: the userfaultfd is open for as long as it is borrowed.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// A monitor that plays this part, and what it has handed off.
fn start(part: &str) -> (Child, UnixStream, HandOff) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("handler");
    let listener = UnixListener::bind(&socket).unwrap();
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "monitor", "--nocapture"])
        .env(PART, part)
        .env("ASYNC_PF_TEST_SOCKET", &socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (stream, _) = listener.accept().unwrap();
    let hand_off = receive(&stream, LONG).unwrap();
    (child, stream, hand_off)
}

fn served(hand_off: HandOff, source: impl PageSource + 'static) -> Pager {
    let config = PagerConfig {
        workers: 2,
        give_up: match poisons() {
            true => GiveUp::Poison,
            false => GiveUp::Tell,
        },
        ..PagerConfig::default()
    };
    serve(hand_off, Arc::new(source), config).unwrap()
}

/// Whether a page that will not come can be a memory error; says so if not.
fn poisons() -> bool {
    let uffd = Uffd::open(Features::NONE, Features::NONE).unwrap();
    let poisons = uffd.available().contains(Features::POISON);
    if !poisons {
        eprintln!("NOT TRIED: this kernel's userfaultfd has no POISON (Linux 6.6)");
    }
    poisons
}

#[test]
fn a_monitors_memory_comes_when_it_is_touched_and_zeros_where_it_gave_it_back() {
    let (child, _stream, hand_off) = start("read");
    let pager = served(hand_off, Words);
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success(), "{said}");
    // The last page is noted a moment after who waited for it goes on.
    assert!(pager.wait(LONG));
    let stats = pager.stats();
    assert_eq!(stats.removed, 10);
    assert_eq!(stats.lost, 0);
    assert_eq!(
        stats.placed, 410,
        "each page once, and those given back again"
    );
}

#[test]
fn everything_comes_behind_what_is_touched() {
    let (mut child, _stream, hand_off) = start("wait");
    let pager = served(hand_off, Words);
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(pager.progress().total, 400);
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert!(child.wait().unwrap().success());
    pager.finish().unwrap();
}

#[test]
fn a_monitor_that_is_killed_leaves_a_pager_that_ends() {
    let (mut child, _stream, hand_off) = start("wait");
    let pager = served(hand_off, Words);
    let mut lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
    let expected = word(101).to_string();
    assert!(lines.any(|line| line.unwrap().contains(&expected)));
    child.kill().unwrap();
    child.wait().unwrap();
    // Nobody can wait for what is missing.
    pager.prefetch_rest();
    assert!(pager.wait(LONG));
    assert_eq!(pager.progress().lost, 0);
}

#[test]
fn pages_that_do_not_come_are_a_memory_error_in_the_monitor() {
    if !poisons() {
        return; // then it would wait, as the configuration says
    }
    let (child, _stream, hand_off) = start("touch");
    // The file ends in the middle of its last mapping.
    let file = tempfile::tempfile().unwrap();
    file.set_len(400 * P).unwrap();
    let piece = FilePiece {
        first: Gfn(0),
        pages: 400,
        offset: 0,
    };
    let source = FileSource::new(file.try_clone().unwrap(), [piece]).unwrap();
    file.set_len(350 * P).unwrap();
    let pager = served(hand_off, source);
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
    assert_eq!(pager.progress().lost, 1);
}

#[test]
fn a_pager_that_is_dropped_leaves_memory_errors_and_nobody_who_waits() {
    if !poisons() {
        return;
    }
    let (child, _stream, hand_off) = start("touch");
    drop(served(hand_off, Never));
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{ended:?}");
}

/// Does not come back while anyone waits.
struct Never;

impl PageSource for Never {
    fn fetch(&self, _: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        thread::sleep(LONG);
        Ok(Fetched::Zero)
    }
}

#[test]
fn what_is_no_userfaultfd_is_refused_by_its_name() {
    let (mut child, _stream, hand_off) = start("pipe");
    let refused = serve(hand_off, Arc::new(Words), PagerConfig::default()).unwrap_err();
    let words = refused.to_string();
    assert!(
        matches!(refused, ServeError::Open(OpenError::NoUserfaultfd { .. })),
        "{words}"
    );
    assert!(words.contains("is no userfaultfd but pipe:["), "{words}");
    child.wait().unwrap();
}
