// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pager's threads hand messages, faults and their end to each other, in every interleaving:
//! `RUSTFLAGS="--cfg loom" cargo test --release --target-dir target/loom -p async-pf --test loom_pager`
//!
//! The kernel is a model too. Its clock stands still: a fault that nobody serves, or a thread that nobody wakes, waits for
//! ever, and loom says so. A wait with a limit may end at once. A deadline or a delay of nothing is over as soon as someone
//! looks: so who has to look is modelled, and how long it takes is not.

#![cfg(loom)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use async_pf::pager::{GiveUp, PagedSlot, Pager, PagerConfig};
use async_pf::{Fetched, PageSource, SourceError};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use memslots::uffd::{
    Call, Fault, FaultKind, Features, ForeignRange, Message, Modes, RawMessage, Uffd, UffdHost,
    decode, encode,
};
use memslots::{Errno, Gfn, Hva, PAGE_SIZE};

const BASE: usize = 0x10_0000;
const P: usize = PAGE_SIZE as usize;

fn model(preemptions: usize, test: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(test);
}

/// A page that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    /// What its source has.
    Bytes,
    Zeros,
    Poisoned,
}

/// What the kernel knows.
#[derive(Default)]
struct Memory {
    messages: VecDeque<RawMessage>,
    pages: BTreeMap<usize, Page>,
    asleep: BTreeSet<usize>,
    /// A page is being given back, and its message has not been read; nothing is placed from the one to the other.
    changing: bool,
    unread: bool,
}

#[derive(Default)]
struct Kernel {
    memory: Mutex<Memory>,
    woken: Condvar,
}

impl Kernel {
    fn address(page: usize) -> usize {
        BASE + page * P
    }

    /// A thread touches a page, and goes on when it is there: whether it is, or is poisoned.
    fn touch(&self, page: usize) -> bool {
        self.read(page) != Page::Poisoned
    }

    /// As [`touch`](Self::touch): what it finds.
    fn read(&self, page: usize) -> Page {
        let address = Self::address(page);
        let mut memory = self.memory.lock().unwrap();
        loop {
            if let Some(page) = memory.pages.get(&address) {
                return *page;
            }
            memory.messages.push_back(encode(&Message::Fault(Fault {
                address: Hva(address),
                kind: FaultKind::Missing,
                write: false,
                thread: 0,
            })));
            memory.asleep.insert(address);
            while memory.asleep.contains(&address) {
                memory = self.woken.wait(memory).unwrap();
            }
        }
    }

    /// Gives a page back, as `MADV_DONTNEED` does: it goes some time after its message has been read, and what is placed
    /// between the two goes with it.
    fn give_back(&self, page: usize) {
        let address = Self::address(page);
        let mut memory = self.memory.lock().unwrap();
        let gone = Message::Remove(address..address + P);
        memory.messages.push_back(encode(&gone));
        (memory.changing, memory.unread) = (true, true);
        while memory.unread {
            memory = self.woken.wait(memory).unwrap();
        }
        memory.changing = false;
        drop(memory);
        self.memory.lock().unwrap().pages.remove(&address);
    }

    fn placed(&self, page: usize) -> Option<Page> {
        let memory = self.memory.lock().unwrap();
        let page = memory.pages.get(&Self::address(page)).copied();
        page.filter(|page| *page != Page::Poisoned)
    }
}

struct Host(Arc<Kernel>);

/// Whether the other end of the pipe has written, or is closed.
fn is_ready(fd: BorrowedFd<'_>) -> bool {
    let mut polled = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd, for the length of the call.
    unsafe { libc::poll(&raw mut polled, 1, 0) > 0 }
}

impl UffdHost for Host {
    unsafe fn ioctl(&self, call: Call, argument: &mut [u64]) -> Result<(), Errno> {
        let (start, size) = match (call, &*argument) {
            (Call::Copy, &[start, _, size, _, _]) => (start as usize, size as usize),
            (_, &[start, size, ..]) => (start as usize, size as usize),
            _ => return Err(Errno(libc::EINVAL)),
        };
        let placed = match call {
            Call::Copy => Some(Page::Bytes),
            Call::ZeroPage => Some(Page::Zeros),
            Call::Poison => Some(Page::Poisoned),
            _ => None,
        };
        let mut memory = self.0.memory.lock().unwrap();
        let mut done = 0;
        let mut refusal = None;
        for page in (start..start + size).step_by(P) {
            if let Some(placed) = placed {
                refusal = match memory.changing {
                    true => Some(libc::EAGAIN),
                    false => memory.pages.contains_key(&page).then_some(libc::EEXIST),
                };
                if refusal.is_some() {
                    break;
                }
                memory.pages.insert(page, placed);
            }
            memory.asleep.remove(&page);
            done += P;
        }
        self.0.woken.notify_all();
        drop(memory);
        let errno = match refusal {
            None => return Ok(()),
            Some(_) if done > 0 => libc::EAGAIN,
            Some(errno) => errno,
        };
        if let Some(field) = argument.last_mut() {
            *field = if done > 0 {
                done as u64
            } else {
                -i64::from(errno) as u64
            };
        }
        Err(Errno(errno))
    }

    fn read(&self, messages: &mut [RawMessage]) -> Result<usize, Errno> {
        let mut memory = self.0.memory.lock().unwrap();
        let count = memory.messages.len().min(messages.len());
        if count == 0 {
            return Err(Errno(libc::EAGAIN));
        }
        for (to, from) in messages.iter_mut().zip(memory.messages.drain(..count)) {
            *to = from;
        }
        // One thread gives back at a time. It goes on when its message is read.
        let removes = |message| matches!(decode(message), Ok(Message::Remove(_)));
        if messages.iter().take(count).any(removes) {
            memory.unread = false;
            self.0.woken.notify_all();
        }
        Ok(count)
    }

    fn wait(&self, _: Option<Duration>) -> Result<bool, Errno> {
        unimplemented!("the pager waits for its pipe as well")
    }

    fn wait_or(&self, other: BorrowedFd<'_>, limit: Option<Duration>) -> Result<bool, Errno> {
        loop {
            if !self.0.memory.lock().unwrap().messages.is_empty() {
                return Ok(true);
            }
            if is_ready(other) {
                return Ok(false);
            }
            // To loom this thread goes on when another one has done something.
            thread::yield_now();
            if limit.is_some() {
                return Ok(!self.0.memory.lock().unwrap().messages.is_empty());
            }
        }
    }

    fn descriptor(&self) -> RawFd {
        -1
    }

    unsafe fn claim(&self, _: u32) -> Option<OwnedFd> {
        None
    }
}

/// Counts what is asked of it.
#[derive(Default)]
struct Counted(Mutex<BTreeMap<u64, u32>>);

impl PageSource for Counted {
    fn fetch(&self, first: Gfn, into: &mut [u8]) -> Result<Fetched, SourceError> {
        let mut asked = self.0.lock().unwrap();
        for gfn in first.0..first.0 + (into.len() / P) as u64 {
            *asked.entry(gfn).or_default() += 1;
        }
        Ok(Fetched::Bytes)
    }
}

/// A pager of two pages, and its threads.
fn start(kernel: &Arc<Kernel>, source: Arc<dyn PageSource>, workers: usize) -> Pager {
    let config = PagerConfig::default();
    start_with(kernel, source, PagerConfig { workers, ..config })
}

fn start_with(kernel: &Arc<Kernel>, source: Arc<dyn PageSource>, config: PagerConfig) -> Pager {
    let host = Box::new(Host(Arc::clone(kernel)));
    let uffd = Uffd::foreign(host, Features::POISON);
    let range = ForeignRange::new(&uffd, BASE..BASE + 2 * P, PAGE_SIZE, Modes::MISSING).unwrap();
    let slot = PagedSlot::foreign(&range, Gfn(0), source).unwrap();
    let config = PagerConfig {
        window: PAGE_SIZE,
        ahead: PAGE_SIZE,
        give_up: GiveUp::Poison,
        spawn: Arc::new(|_, run| {
            thread::spawn(run);
            Ok(())
        }),
        ..config
    };
    Pager::start(&uffd, vec![slot], config).unwrap()
}

/// Ends a pager when it has noted that every page is there: who waits for one goes on a moment before that.
fn finish(pager: Pager) {
    assert!(pager.wait(Duration::MAX));
    pager.finish().map(drop).unwrap();
}

#[test]
fn a_fault_is_served_once_and_finish_ends_all() {
    model(2, || {
        let kernel = Arc::new(Kernel::default());
        let source = Arc::new(Counted::default());
        let pager = start(&kernel, source.clone(), 1);
        assert!(kernel.touch(0));
        drop(pager);
        assert_eq!(source.0.lock().unwrap().get(&0), Some(&1));
        assert_eq!(kernel.placed(0), Some(Page::Bytes));
        assert_eq!(kernel.placed(1), None, "poisoned by the drop");
    });
}

#[test]
fn two_threads_on_one_page_are_one_fetch() {
    model(1, || {
        let kernel = Arc::new(Kernel::default());
        let source = Arc::new(Counted::default());
        let pager = start(&kernel, source.clone(), 1);
        let vcpu = {
            let kernel = Arc::clone(&kernel);
            thread::spawn(move || assert!(kernel.touch(0)))
        };
        assert!(kernel.touch(0));
        vcpu.join().unwrap();
        drop(pager);
        assert_eq!(source.0.lock().unwrap().get(&0), Some(&1));
    });
}

#[test]
fn two_workers_serve_two_faults_and_neither_is_fetched_twice() {
    model(0, || {
        let kernel = Arc::new(Kernel::default());
        let source = Arc::new(Counted::default());
        let pager = start(&kernel, source.clone(), 2);
        let vcpu = {
            let kernel = Arc::clone(&kernel);
            thread::spawn(move || assert!(kernel.touch(0)))
        };
        assert!(kernel.touch(1));
        vcpu.join().unwrap();
        finish(pager);
        assert_eq!(*source.0.lock().unwrap(), BTreeMap::from([(0, 1), (1, 1)]));
        assert_eq!(
            (kernel.placed(0), kernel.placed(1)),
            (Some(Page::Bytes), Some(Page::Bytes))
        );
    });
}

/// Brings page 0 only when page 1 is there.
struct Behind(Arc<Kernel>);

impl PageSource for Behind {
    fn fetch(&self, first: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        if first == Gfn(0) {
            let mut memory = self.0.memory.lock().unwrap();
            while !memory.pages.contains_key(&Kernel::address(1)) {
                memory = self.0.woken.wait(memory).unwrap();
            }
        }
        Ok(Fetched::Bytes)
    }
}

#[test]
fn a_fault_behind_a_worker_that_is_inside_its_source_is_served_by_the_other() {
    model(0, || {
        let kernel = Arc::new(Kernel::default());
        let pager = start(&kernel, Arc::new(Behind(Arc::clone(&kernel))), 2);
        let vcpu = {
            let kernel = Arc::clone(&kernel);
            thread::spawn(move || assert!(kernel.touch(0)))
        };
        assert!(kernel.touch(1));
        vcpu.join().unwrap();
        finish(pager);
    });
}

#[test]
fn what_nobody_waits_for_and_a_fault_on_it_are_one_fetch_and_everything_comes() {
    model(1, || {
        let kernel = Arc::new(Kernel::default());
        let source = Arc::new(Counted::default());
        let pager = start(&kernel, source.clone(), 1);
        let vcpu = {
            let kernel = Arc::clone(&kernel);
            thread::spawn(move || assert!(kernel.touch(1)))
        };
        pager.prefetch_rest();
        vcpu.join().unwrap();
        finish(pager);
        assert_eq!(*source.0.lock().unwrap(), BTreeMap::from([(0, 1), (1, 1)]));
    });
}

#[test]
fn a_drop_beside_a_fault_leaves_nobody_asleep() {
    model(2, || {
        let kernel = Arc::new(Kernel::default());
        let pager = start(&kernel, Arc::new(Counted::default()), 1);
        let vcpu = {
            let kernel = Arc::clone(&kernel);
            // Placed or poisoned: it goes on.
            thread::spawn(move || kernel.touch(0))
        };
        drop(pager);
        let came = vcpu.join().unwrap();
        assert_eq!(kernel.placed(0).is_some(), came);
    });
}

#[test]
fn what_is_given_back_while_it_is_brought_is_zeros_from_then_on() {
    model(2, || {
        let kernel = Arc::new(Kernel::default());
        let pager = start(&kernel, Arc::new(Counted::default()), 1);
        pager.prefetch(0, Gfn(0)..Gfn(1)).unwrap();
        kernel.give_back(0);
        assert_eq!(kernel.read(0), Page::Zeros);
        drop(pager);
    });
}

#[test]
fn what_is_given_back_beside_a_fault_on_it_is_zeros_from_then_on_and_nobody_sleeps() {
    for workers in [1, 2] {
        model(0, move || {
            let kernel = Arc::new(Kernel::default());
            let pager = start(&kernel, Arc::new(Counted::default()), workers);
            let vcpu = {
                let kernel = Arc::clone(&kernel);
                // Before that or behind it.
                thread::spawn(move || assert!(kernel.touch(0)))
            };
            kernel.give_back(0);
            assert_eq!(kernel.read(0), Page::Zeros);
            vcpu.join().unwrap();
            drop(pager);
        });
    }
}

#[test]
fn what_is_given_back_while_everything_is_brought_is_waited_for_by_nobody() {
    model(0, || {
        let kernel = Arc::new(Kernel::default());
        let pager = start(&kernel, Arc::new(Counted::default()), 1);
        pager.prefetch_rest();
        kernel.give_back(0);
        finish(pager);
        assert_ne!(kernel.placed(0), Some(Page::Bytes));
        assert_eq!(kernel.placed(1), Some(Page::Bytes));
    });
}

/// Fails once, but not for good, as soon as whoever is to be asleep may be.
#[derive(Default)]
struct Falters(Mutex<u32>);

impl PageSource for Falters {
    fn fetch(&self, first: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        let mut asked = self.0.lock().unwrap();
        *asked += 1;
        if *asked > 1 {
            return Ok(Fetched::Bytes);
        }
        drop(asked);
        // Each lets all others go on to where they wait.
        for _ in 0..4 {
            thread::yield_now();
        }
        Err(SourceError::Other {
            gfn: first,
            transient: true,
            source: "it was away".into(),
        })
    }
}

#[test]
fn a_page_that_is_to_be_tried_again_wakes_the_guard() {
    model(0, || {
        let kernel = Arc::new(Kernel::default());
        let config = PagerConfig {
            workers: 2,
            deadline: Duration::MAX,
            backoff: Duration::ZERO,
            ..PagerConfig::default()
        };
        let pager = start_with(&kernel, Arc::new(Falters::default()), config);
        assert!(kernel.touch(0));
        drop(pager);
    });
}

/// Answers when it is let go.
#[derive(Default)]
struct Stuck {
    inside: Mutex<bool>,
    let_go: Mutex<bool>,
    told: Condvar,
}

impl PageSource for Stuck {
    fn fetch(&self, _: Gfn, _: &mut [u8]) -> Result<Fetched, SourceError> {
        *self.inside.lock().unwrap() = true;
        let mut let_go = self.let_go.lock().unwrap();
        while !*let_go {
            let_go = self.told.wait(let_go).unwrap();
        }
        Ok(Fetched::Bytes)
    }
}

#[test]
fn a_fault_on_what_is_under_way_for_nobody_wakes_the_guard_which_keeps_its_deadline() {
    model(0, || {
        let kernel = Arc::new(Kernel::default());
        let config = PagerConfig {
            workers: 2,
            deadline: Duration::ZERO,
            ..PagerConfig::default()
        };
        let source = Arc::new(Stuck::default());
        let pager = start_with(&kernel, source.clone(), config);
        pager.prefetch(0, Gfn(0)..Gfn(1)).unwrap();
        while !*source.inside.lock().unwrap() {
            thread::yield_now();
        }
        // The guard may sleep by now.
        for _ in 0..4 {
            thread::yield_now();
        }
        assert!(!kernel.touch(0), "its source has not answered");
        *source.let_go.lock().unwrap() = true;
        source.told.notify_all();
        drop(pager);
    });
}
