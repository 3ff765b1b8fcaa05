// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `guest-io cold PAGES`: two tasks on one processor, of which one touches memory that may not be there, and the other
//! counts. It says `guest: cold ready` when the memory is written, and then does what each line of its stdin says:
//!
//! * `watch`: says at each step of the counting what state the toucher is in (`D` waits for a page, `R` would run);
//! * `measure`: says at the end how far the counting came meanwhile, and how far it comes alone in the same time (the first
//!   page and a second more are for warming up);
//! * `end`: ends.
//!
//! `watch first` and `measure first` put the toucher before the counting: real-time priority, and no share for others.
//! Each page begins with [`MARK`], so that whoever serves the guest's memory knows them.

use std::fs;
use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// What each page begins with, which the test and the bench know as well.
const MARK: &[u8] = b"guest: cold page";

/// Additions of a step of which a line is said, and of one that is counted in silence.
const WATCHED: u64 = 200_000;
const MEASURED: u64 = 10_000;

const WARM_UP: Duration = Duration::from_secs(1);
const CONTROL: Duration = Duration::from_millis(500);

/// Where Linux has what real-time tasks leave to others.
const REAL_TIME_SHARE: &str = "/proc/sys/kernel/sched_rt_runtime_us";

pub(crate) fn cold(pages: &str) -> io::Result<()> {
    let pages: usize = pages.parse().map_err(io::Error::other)?;
    let memory = super::buffer(pages * 4096)?;
    for page in memory.chunks_mut(4096) {
        for (to, from) in page.iter_mut().zip(MARK) {
            *to = *from;
        }
    }
    let memory: &'static [u8] = memory;
    println!("guest: cold ready");
    for line in io::stdin().lines() {
        let line = line?;
        let first = line.trim().ends_with(" first");
        match line.split_whitespace().next() {
            Some("watch") => watch(memory, first)?,
            Some("measure") => measure(memory, first)?,
            Some("end") => return Ok(()),
            _ => {
                return Err(io::Error::other(format!(
                    "watch, measure or end, not {line:?}"
                )));
            }
        }
        println!("guest: cold touched all {pages}");
    }
    Ok(())
}

/// The task that reads a byte of each page.
#[derive(Default)]
struct Toucher {
    /// Its thread, once it has begun.
    thread: AtomicI32,
    touched: AtomicUsize,
    pages: usize,
}

impl Toucher {
    fn start(memory: &'static [u8], first: bool) -> io::Result<Arc<Self>> {
        if first {
            fs::write(REAL_TIME_SHARE, "-1")?;
        }
        let toucher = Arc::new(Toucher {
            pages: memory.len() / 4096,
            ..Toucher::default()
        });
        let shared = Arc::clone(&toucher);
        thread::spawn(move || {
            if first && let Err(error) = put_first() {
                println!("guest: cold {error}");
                return;
            }
            // SAFETY: takes nothing.
            let thread = unsafe { libc::gettid() };
            // Relaxed, as with the count: a number, and no data goes with it.
            shared.thread.store(thread, Ordering::Relaxed);
            for page in memory.chunks(4096) {
                black_box(page.first().copied());
                shared.touched.fetch_add(1, Ordering::Relaxed);
            }
        });
        Ok(toucher)
    }

    /// How many pages it has touched; none when it has all.
    fn touched(&self) -> Option<usize> {
        let touched = self.touched.load(Ordering::Relaxed);
        (touched < self.pages).then_some(touched)
    }

    /// Its state, as `/proc` has it: `-` before it has begun.
    fn state(&self) -> io::Result<char> {
        let thread = match self.thread.load(Ordering::Relaxed) {
            0 => return Ok('-'),
            thread => thread,
        };
        let stat = match fs::read_to_string(format!("/proc/self/task/{thread}/stat")) {
            // It has ended between.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok('X'),
            stat => stat?,
        };
        let behind_name = stat.rsplit(") ").next();
        Ok(behind_name
            .and_then(|rest| rest.chars().next())
            .unwrap_or('?'))
    }
}

/// Puts the calling thread before all others of the processor.
fn put_first() -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure lives through the call, which reads it.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A step of the counting: no memory, no call.
fn step(additions: u64) {
    for at in 0..additions {
        black_box(at);
    }
}

fn watch(memory: &'static [u8], first: bool) -> io::Result<()> {
    let toucher = Toucher::start(memory, first)?;
    let mut number = 0_u64;
    step(WATCHED);
    while let Some(touched) = toucher.touched() {
        number += 1;
        let state = toucher.state()?;
        println!("guest: cold step {number} state {state} touched {touched}");
        step(WATCHED);
    }
    Ok(())
}

fn measure(memory: &'static [u8], first: bool) -> io::Result<()> {
    // A guest that was just restored has not its own code and kernel either: all of this once, and a while, unmeasured.
    let (page, memory) = memory.split_at(memory.len().min(4096));
    let toucher = Toucher::start(page, first)?;
    steps_while(|| toucher.touched().is_some());
    alone(WARM_UP);

    // Alone before and behind, for the host may have other work by turns.
    let before = alone(CONTROL);
    let begun = Instant::now();
    let toucher = Toucher::start(memory, first)?;
    let steps = steps_while(|| toucher.touched().is_some());
    let took = begun.elapsed();
    let behind = alone(CONTROL);
    let rate = (before + behind) as f64 / (2.0 * CONTROL.as_secs_f64());
    let alone = rate * took.as_secs_f64();
    let micros = took.as_micros();
    println!("guest: cold steps {steps} of {alone:.0} in {micros} us");
    Ok(())
}

/// How many steps there are in so much time when nobody else wants the processor.
fn alone(time: Duration) -> u64 {
    let begun = Instant::now();
    steps_while(|| begun.elapsed() < time)
}

fn steps_while(go_on: impl Fn() -> bool) -> u64 {
    let mut steps = 0;
    while go_on() {
        step(MEASURED);
        steps += 1;
    }
    steps
}
