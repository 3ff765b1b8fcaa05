// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What it costs to serve a fault from a file in the page cache: one thread, or two, touch every page of a memory once, and
//! their faults are served by
//! * a loop without any bookkeeping (poll, read, `pread`, `UFFDIO_COPY`, by the C library alone), on one thread or two;
//! * a handler as Firecracker's example is: one thread, which reads until there is no message left and copies a page a
//!   fault out of a mapped file;
//! * the [`Pager`], with one worker or two.
//!
//! All have the same file, the same kind of memory and the same order of pages, and take turns, each time in another order:
//! what this host does meanwhile happens to all of them. Ratios are of turns of one round, in the middle and from the tenth
//! to the ninetieth of 100. Latency is as who touches has it. In random order no read-ahead helps; in a row it does.
//!
//! `cargo bench -p async-pf --bench pager [-- --rounds N] [--real-time] [--json FILE]`; needs a userfaultfd. With
//! `--real-time`, which takes root, all threads have a real-time priority: others' work on a busy host does not come between,
//! and each thread that wakes has a processor. `cargo xtask bench faults` draws it.
#![allow(missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::hint::black_box;
use std::io::{self, PipeReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use async_pf::pager::{PagedSlot, Pager, PagerConfig};
use async_pf::{FilePiece, FileSource};
use memslots::uffd::{Features, Modes, Registration, Uffd};
use memslots::{Backing, Gfn, Mapping, PAGE_SIZE};
use serde_json::json;
use vm_memory::GuestAddress;

const PAGES: u64 = 4096;
const SIZE: u64 = PAGES * PAGE_SIZE;
/// Turns of each. In a row one turn is nearly as good as another.
const ROUNDS: usize = 25;

/// `UFFDIO_COPY`, and the kind of a message that is a fault.
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const FAULT: u8 = 0x12;

struct World {
    uffd: Uffd,
    memory: Arc<Mapping>,
    registration: Registration,
}

impl World {
    fn new() -> Self {
        let uffd = Uffd::open(Features::POISON, Features::NONE).unwrap();
        let memory = Arc::new(Mapping::new(&Backing::anonymous(SIZE), GuestAddress(0)).unwrap());
        let registration = uffd.register_all(&memory, Modes::MISSING).unwrap();
        Self {
            uffd,
            memory,
            registration,
        }
    }

    /// Each thread touches its share of the pages in their order.
    fn touch(&self, threads: usize, order: &[u64]) -> Turn {
        let host = self.memory.host().0;
        let begun = Instant::now();
        let waited = thread::scope(|scope| {
            let shares = order.chunks(order.len() / threads);
            let all: Vec<_> = shares
                .map(|share| scope.spawn(move || touch_all(host, share)))
                .collect();
            let waited = all.into_iter().flat_map(|one| one.join().unwrap());
            waited.collect()
        });
        Turn {
            took: begun.elapsed(),
            waited,
        }
    }

    /// Serves faults on so many threads while all pages are touched.
    fn beside(
        &self,
        servers: usize,
        serve: impl Fn(&PipeReader) + Sync,
        touch: impl Fn() -> Turn,
    ) -> Turn {
        let (stopped, stop) = io::pipe().unwrap();
        thread::scope(|scope| {
            for _ in 0..servers {
                scope.spawn(|| serve(&stopped));
            }
            let turn = touch();
            drop(stop);
            turn
        })
    }

    /// Waits until there is a message; no more when it is to stop.
    fn wait(&self, stopped: &PipeReader) -> bool {
        let fds = [self.uffd.as_raw_fd(), stopped.as_raw_fd()];
        let mut fds = fds.map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: two pollfds, which live as long as the call.
        assert!(unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } > 0);
        fds[0].revents != 0
    }

    /// The page of the next fault, in bytes from the memory's start, if there is one.
    fn read(&self) -> Option<u64> {
        let mut message = [0_u64; 4];
        // SAFETY: the message has room for 32 bytes.
        let read = unsafe { libc::read(self.uffd.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        if read != 32 {
            assert_eq!(io::Error::last_os_error().kind(), io::ErrorKind::WouldBlock);
            return None;
        }
        assert_eq!(message[0] as u8, FAULT);
        Some((message[2] - self.memory.host().0 as u64) / PAGE_SIZE * PAGE_SIZE)
    }

    /// Places a page, which lies at `source` as long as this takes.
    fn copy(&self, offset: u64, source: usize) {
        let to = self.memory.host().0 as u64 + offset;
        let mut argument = [to, source as u64, PAGE_SIZE, 0, 0];
        let fd = self.uffd.as_raw_fd();
        // SAFETY: the argument is as the call has it; the page is of a memory that is there for this, and so is its source.
        let done = unsafe { libc::ioctl(fd, UFFDIO_COPY, argument.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", io::Error::last_os_error());
    }
}

/// How long each of these pages was waited for, in nanoseconds.
fn touch_all(host: usize, pages: &[u64]) -> Vec<f64> {
    let mut waited = Vec::with_capacity(pages.len());
    for page in pages {
        let begun = Instant::now();
        let at = host + (page * PAGE_SIZE) as usize;
        // SAFETY: within a mapping that lives as long as the turn; read volatile.
        black_box(unsafe { (at as *const u64).read_volatile() });
        waited.push(begun.elapsed().as_nanos() as f64);
    }
    waited
}

struct Turn {
    took: Duration,
    waited: Vec<f64>,
}

/// Who serves.
#[derive(Clone, Copy, PartialEq)]
enum Server {
    Bare(usize),
    Pager(usize),
    Firecracker,
}

const SERVERS: [Server; 5] = [
    Server::Bare(1),
    Server::Pager(1),
    Server::Firecracker,
    Server::Bare(2),
    Server::Pager(2),
];

impl Server {
    fn name(self) -> String {
        match self {
            Self::Bare(1) => "bare loop, 1 thread".into(),
            Self::Bare(threads) => format!("bare loop, {threads} threads"),
            Self::Pager(1) => "pager, 1 worker".into(),
            Self::Pager(workers) => format!("pager, {workers} workers"),
            Self::Firecracker => "as Firecracker's example".into(),
        }
    }

    /// The loop that does nothing but serve, on as many threads.
    fn floor(self) -> Option<Self> {
        match self {
            Self::Bare(_) => None,
            Self::Pager(workers) => Some(Self::Bare(workers)),
            Self::Firecracker => Some(Self::Bare(1)),
        }
    }

    fn turn(self, files: &Files, threads: usize, order: &[u64]) -> Turn {
        let world = World::new();
        let touch = || world.touch(threads, order);
        let bare = |stopped: &PipeReader| {
            let mut page = [0; PAGE_SIZE as usize];
            while world.wait(stopped) {
                if let Some(offset) = world.read() {
                    files.file.read_exact_at(&mut page, offset).unwrap();
                    world.copy(offset, page.as_ptr() as usize);
                }
            }
        };
        let example = |stopped: &PipeReader| {
            let mut faults = Vec::new();
            while world.wait(stopped) {
                faults.extend(std::iter::from_fn(|| world.read()));
                for offset in faults.drain(..) {
                    world.copy(offset, files.mapped.host().0 + offset as usize);
                }
            }
        };
        match self {
            Self::Bare(threads) => world.beside(threads, bare, touch),
            Self::Firecracker => world.beside(1, example, touch),
            Self::Pager(workers) => {
                let pager = pager(&world, &files.file, workers);
                let turn = touch();
                assert!(pager.wait(Duration::from_secs(9)));
                turn
            }
        }
    }
}

fn pager(world: &World, file: &File, workers: usize) -> Pager {
    let piece = FilePiece {
        first: Gfn(0),
        pages: PAGES,
        offset: 0,
    };
    let source = FileSource::new(file.try_clone().unwrap(), [piece]).unwrap();
    let slot = PagedSlot::new(&world.registration, Gfn(0), Arc::new(source)).unwrap();
    let config = PagerConfig {
        workers,
        ..PagerConfig::default()
    };
    Pager::start(&world.uffd, vec![slot], config).unwrap()
}

struct Files {
    file: File,
    mapped: Mapping,
}

impl Files {
    fn new() -> Self {
        let mut file = tempfile::tempfile().unwrap();
        for page in 0..PAGES {
            file.write_all(&[page as u8 | 1; PAGE_SIZE as usize])
                .unwrap();
        }
        let mapped = Backing::file_private(file.try_clone().unwrap(), 0, SIZE);
        let mapped = Mapping::new(&mapped, GuestAddress(0)).unwrap();
        Self { file, mapped }
    }
}

/// All pages, shuffled; in another way each round.
fn shuffled(round: usize) -> Vec<u64> {
    let mut pages: Vec<u64> = (0..PAGES).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ (round as u64 + 1);
    for last in (1..pages.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pages.swap(last, (state % (last as u64 + 1)) as usize);
    }
    pages
}

/// What one server has done, a number a round; `waited` is of all of them together.
#[derive(Default)]
struct Done {
    seconds: Vec<f64>,
    half: Vec<f64>,
    worst: Vec<f64>,
    waited: Vec<f64>,
}

impl Done {
    fn note(&mut self, mut turn: Turn) {
        self.seconds.push(turn.took.as_secs_f64());
        self.half.push(quantile(&mut turn.waited, 0.5));
        self.worst.push(quantile(&mut turn.waited, 0.99));
        self.waited.append(&mut turn.waited);
    }
}

fn quantile(of: &mut [f64], part: f64) -> f64 {
    of.sort_by(f64::total_cmp);
    of[((of.len() - 1) as f64 * part).round() as usize]
}

/// The middle, and from where to where eight of ten are.
fn spread(of: &[f64], decimals: usize) -> String {
    let [low, middle, high] = [0.1, 0.5, 0.9].map(|part| quantile(&mut of.to_vec(), part));
    format!("{middle:.decimals$} ({low:.decimals$}–{high:.decimals$})")
}

fn compare(files: &Files, random: bool, threads: usize, rounds: usize) -> serde_json::Value {
    let mut done = SERVERS.map(|_| Done::default());
    for round in 0..rounds {
        let order = match random {
            true => shuffled(round),
            false => (0..PAGES).collect(),
        };
        for step in 0..SERVERS.len() {
            let which = (round + step) % SERVERS.len();
            done[which].note(SERVERS[which].turn(files, threads, &order));
        }
    }
    let order = if random { "at random" } else { "in a row" };
    println!("\n{PAGES} pages touched {order} by {threads}, {rounds} turns of each");
    println!(
        "{:<26}{:>26}{:>22}{:>24}{:>20}{:>20}{:>20}",
        "",
        "pages/s",
        "half within, µs",
        "99 of 100, µs",
        "time, of bare",
        "half, of bare",
        "time, of example"
    );
    let ratio = |what: fn(&Done) -> &[f64], own: &Done, other: Option<Server>| {
        let other = SERVERS.iter().position(|it| Some(*it) == other);
        other.map_or_else(String::new, |at| {
            let both = what(own).iter().zip(what(&done[at]));
            spread(
                &both.map(|(own, other)| own / other).collect::<Vec<f64>>(),
                2,
            )
        })
    };
    let mut all = Vec::new();
    for (server, own) in SERVERS.iter().zip(&done) {
        let rates: Vec<f64> = own.seconds.iter().map(|it| PAGES as f64 / it).collect();
        let micros = |of: &[f64]| of.iter().map(|it| it / 1e3).collect::<Vec<f64>>();
        let example = matches!(server, Server::Pager(_)).then_some(Server::Firecracker);
        println!(
            "{:<26}{:>26}{:>22}{:>24}{:>20}{:>20}{:>20}",
            server.name(),
            spread(&rates, 0),
            spread(&micros(&own.half), 1),
            spread(&micros(&own.worst), 1),
            ratio(|of| &of.seconds, own, server.floor()),
            ratio(|of| &of.half, own, server.floor()),
            ratio(|of| &of.seconds, own, example),
        );
        let mut waited = own.waited.clone();
        waited.sort_by(f64::total_cmp);
        let at = |share: usize| waited[(waited.len() - 1) * share / 1000];
        all.push(json!({
            "name": server.name(),
            "nanoseconds_by_permille": (0..=1000).map(at).collect::<Vec<f64>>(),
        }));
    }
    json!({ "random": random, "threads": threads, "rounds": rounds, "servers": all })
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let after = |word: &str| words.iter().skip_while(|it| *it != word).nth(1);
    // `cargo test --benches` asks whether it runs at all.
    let rounds = match words.iter().any(|word| word == "--bench") {
        true => after("--rounds").map_or(ROUNDS, |rounds| rounds.parse().unwrap()),
        false => 1,
    };
    let files = Files::new();
    if words.iter().any(|word| word == "--real-time") {
        let priority = libc::sched_param { sched_priority: 10 };
        // SAFETY: of this thread, which those that it starts inherit; the priority lives as long as the call.
        let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) };
        assert_eq!(set, 0, "--real-time: {}", io::Error::last_os_error());
    }
    let mut all = Vec::new();
    for random in [true, false] {
        for threads in [1, 2] {
            all.push(compare(&files, random, threads, rounds));
        }
    }
    if let Some(file) = after("--json") {
        std::fs::write(file, json!(all).to_string()).unwrap();
    }
}
