// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the monitor says on stderr, whose reader may have gone to sleep.
//!
//! A vCPU's thread says something here, and the main thread, which alone serves signals: neither may
//! wait for a reader for ever. A write waits [`PATIENCE`] for room and drops the rest; after that
//! nothing waits for it until stderr has taken something again. Nor does a write wait longer than that
//! for others' writes: hundreds of vCPUs that have much to say would keep the main thread from its turn.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::no_wait::{Way, is_ready};

/// The longest that what is said waits for stderr's reader.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// The last that was said found no room.
static STUCK: AtomicBool = AtomicBool::new(false);

/// Whose turn it is to write. Not std's lock, for which there is no waiting with an end.
static WRITERS: Writers = Writers::new();

/// Writes `text` in as few pieces as stderr takes, in a turn of its own, so that several threads' texts
/// do not mix. What has no turn and is not taken in [`PATIENCE`] is dropped, also where stderr is closed.
pub fn write(text: &[u8]) {
    let deadline = Instant::now() + PATIENCE;
    let Some(_turn) = WRITERS.turn(deadline) else {
        return;
    };
    let deadline = match STUCK.load(Ordering::Relaxed) {
        true => Instant::now(),
        false => deadline,
    };
    let stderr = io::stderr();
    let taken = match Way::of(&stderr) {
        Ok(way) => write_to(&stderr, way, text, deadline),
        Err(_) => true,
    };
    STUCK.store(!taken, Ordering::Relaxed);
}

/// A lock that is waited for until a deadline.
struct Writers {
    busy: Mutex<bool>,
    free: Condvar,
}

impl Writers {
    const fn new() -> Self {
        Writers {
            busy: Mutex::new(false),
            free: Condvar::new(),
        }
    }

    /// The turn, which ends with what is returned, or `None` if it has not come before `deadline`.
    fn turn(&self, deadline: Instant) -> Option<Turn<'_>> {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.free.wait_timeout_while(busy, left, |busy| *busy);
        let (mut busy, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // Asked and not concluded from the time: who was woken and is late has the turn all the same.
        let had = std::mem::replace(&mut *busy, true);
        (!had).then(|| Turn(self))
    }
}

/// Nobody else writes as long as this lives.
struct Turn<'a>(&'a Writers);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.busy.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.free.notify_one();
    }
}

/// Whether all of it was written, or cannot be at all; false for want of room.
fn write_to(out: &impl AsRawFd, mut way: Way, mut text: &[u8], deadline: Instant) -> bool {
    while !text.is_empty() {
        match way.write(out, text, || has_room(out.as_raw_fd(), deadline)) {
            Ok(Some(written)) => text = text.get(written..).unwrap_or_default(),
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
    true
}

/// Whether there is room before `deadline`. An error of `fd` counts as room: the write says which.
fn has_room(fd: i32, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
    is_ready(fd, libc::POLLOUT, left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_a_full_pipe_does_not_take_is_dropped_and_the_rest_is_whole() {
        let (mut reader, writer) = io::pipe().unwrap();
        // More than a pipe holds, of which nobody reads a byte.
        let text: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        assert!(!write_to(&writer, Way::NoWait, &text, Instant::now()));
        assert!(!write_to(&writer, Way::AskFirst, &text, Instant::now()));
        drop(writer);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert!(got.len() >= 4096 && text.starts_with(&got));
    }

    #[test]
    fn a_turn_is_one_writers_and_is_not_waited_for_without_end() {
        let writers = Writers::new();
        let turn = writers.turn(Instant::now()).unwrap();
        for patience in [Duration::ZERO, Duration::from_millis(1)] {
            assert!(writers.turn(Instant::now() + patience).is_none());
        }
        let late = Instant::now() + Duration::from_secs(30);
        std::thread::scope(|scope| {
            let waiting = [(); 8].map(|()| scope.spawn(|| writers.turn(late).is_some()));
            drop(turn);
            assert_eq!(waiting.map(|one| one.join().unwrap()), [true; 8]);
        });
        assert!(writers.turn(Instant::now()).is_some());
    }

    #[test]
    fn what_has_no_turn_is_dropped() {
        let turn = WRITERS.turn(Instant::now() + Duration::from_secs(30));
        // Comes back, though nobody lets go.
        write(b"of which nobody hears\n");
        drop(turn);
    }

    #[test]
    fn a_reader_that_reads_gets_all() {
        for way in [Way::NoWait, Way::AskFirst] {
            let (mut reader, writer) = io::pipe().unwrap();
            let text: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
            let expected = text.clone();
            let deadline = Instant::now() + Duration::from_secs(30);
            let writing = std::thread::spawn(move || write_to(&writer, way, &text, deadline));
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            assert!(writing.join().unwrap());
            assert!(got == expected);
        }
    }
}
