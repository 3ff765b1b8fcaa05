// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When the first of each thing happened: what `--timeline` prints and `cargo xtask boot` shows.
//!
//! Times are `CLOCK_MONOTONIC`, told in microseconds since `main` began. What the kernel did before
//! `main` (exec, mapping the binary) is not in them.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// A moment in the VMM's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `main` began.
    Start = 0,
    /// Just before the boot vCPU's first `KVM_RUN`.
    FirstEntry = 1,
    /// The guest's first byte on the serial console.
    FirstOutput = 2,
    /// The vCPUs have stopped.
    Exit = 3,
}

impl Event {
    const ALL: [Event; 4] = [
        Event::Start,
        Event::FirstEntry,
        Event::FirstOutput,
        Event::Exit,
    ];

    const fn name(self) -> &'static str {
        match self {
            Event::Start => "start",
            Event::FirstEntry => "first-entry",
            Event::FirstOutput => "first-output",
            Event::Exit => "exit",
        }
    }
}

/// The first time of each [`Event`], in nanoseconds of `CLOCK_MONOTONIC`; 0 is "not yet".
#[derive(Debug, Default)]
pub struct Timeline {
    first: [AtomicU64; 4],
}

/// The process's timeline. There is one: it begins with `main`.
pub fn timeline() -> &'static Timeline {
    static TIMELINE: OnceLock<Timeline> = OnceLock::new();
    TIMELINE.get_or_init(Timeline::default)
}

impl Timeline {
    /// Notes that `event` happens now, if it has not happened before. Does not block.
    pub fn mark(&self, event: Event) {
        let slot = &self.first[event as usize];
        // Relaxed: a time stamp publishes nothing but itself.
        if slot.load(Ordering::Relaxed) == 0 {
            let _ = slot.compare_exchange(0, now(), Ordering::Relaxed, Ordering::Relaxed);
        }
    }
}

impl fmt::Display for Timeline {
    /// One line an event that happened: `timeline: <event> <microseconds since start>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = self.first[Event::Start as usize].load(Ordering::Relaxed);
        for event in Event::ALL {
            match self.first[event as usize].load(Ordering::Relaxed) {
                0 => {}
                at => writeln!(
                    f,
                    "timeline: {} {}",
                    event.name(),
                    at.saturating_sub(start) / 1000
                )?,
            }
        }
        Ok(())
    }
}

fn now() -> u64 {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `ts` is a valid timespec for the call to fill.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_mark_counts_and_what_never_happened_is_not_shown() {
        let timeline = Timeline::default();
        timeline.mark(Event::Start);
        timeline.mark(Event::FirstEntry);
        let first = timeline.first[Event::FirstEntry as usize].load(Ordering::Relaxed);
        timeline.mark(Event::FirstEntry);
        assert_eq!(
            first,
            timeline.first[Event::FirstEntry as usize].load(Ordering::Relaxed)
        );
        let text = timeline.to_string();
        assert!(text.contains("timeline: start 0\n"), "{text}");
        assert!(text.contains("timeline: first-entry "), "{text}");
        assert!(!text.contains("first-output"), "{text}");
    }
}
