// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the monitor says on stderr, whose reader may have gone to sleep.
//!
//! A vCPU's thread says something here, and the main thread, which alone serves signals: neither may
//! wait for a reader for ever. A write waits [`PATIENCE`] for room and drops the rest; after that
//! nothing waits until stderr has taken something again.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::no_wait::Way;

/// The longest that what is said waits for stderr's reader.
pub const PATIENCE: Duration = Duration::from_millis(500);

/// The last that was said found no room.
static STUCK: AtomicBool = AtomicBool::new(false);

/// Writes `text` in as few pieces as stderr takes, each time with its lock held, so that several
/// threads' texts do not mix. What it does not take in [`PATIENCE`] is dropped, also where it is
/// closed.
pub fn write(text: &[u8]) {
    let stderr = io::stderr().lock();
    let patience = if STUCK.load(Ordering::Relaxed) {
        Duration::ZERO
    } else {
        PATIENCE
    };
    let taken = match Way::of(&stderr) {
        Ok(way) => write_to(&stderr, way, text, patience),
        Err(_) => true,
    };
    STUCK.store(!taken, Ordering::Relaxed);
}

/// Whether all of it was written, or cannot be at all; false for want of room.
fn write_to(out: &impl AsRawFd, mut way: Way, mut text: &[u8], patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
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
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one valid pollfd.
    match unsafe { libc::poll(&mut poll, 1, left) } {
        -1 => Err(io::Error::last_os_error()),
        ready => Ok(ready > 0),
    }
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
        assert!(!write_to(&writer, Way::NoWait, &text, Duration::ZERO));
        assert!(!write_to(&writer, Way::AskFirst, &text, Duration::ZERO));
        drop(writer);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert!(got.len() >= 4096 && text.starts_with(&got));
    }

    #[test]
    fn a_reader_that_reads_gets_all() {
        for way in [Way::NoWait, Way::AskFirst] {
            let (mut reader, writer) = io::pipe().unwrap();
            let text: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
            let expected = text.clone();
            let writing =
                std::thread::spawn(move || write_to(&writer, way, &text, Duration::from_secs(30)));
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            assert!(writing.join().unwrap());
            assert!(got == expected);
        }
    }
}
