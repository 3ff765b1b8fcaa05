// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the monitor says on stderr, whose reader may have gone to sleep.
//!
//! A vCPU's thread says something here, and the main thread, which alone serves signals: neither may
//! wait for a reader for ever. A write waits [`PATIENCE`] for room and drops the rest; after that
//! nothing waits until stderr has taken something again.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
    let taken = write_to(&stderr, stderr.is_terminal(), text, patience);
    STUCK.store(!taken, Ordering::Relaxed);
}

/// Whether all of it was written, or cannot be at all; false for want of room.
fn write_to(out: &impl AsRawFd, terminal: bool, mut text: &[u8], patience: Duration) -> bool {
    let fd = out.as_raw_fd();
    let deadline = Instant::now() + patience;
    // A terminal has no such call: there must be room before each write, of one byte, for how much
    // room there is nobody tells.
    let mut ask_first = terminal;
    while !text.is_empty() {
        let written = if ask_first {
            if !has_room(fd, deadline) {
                return false;
            }
            // SAFETY: reads the one byte that is there.
            unsafe { libc::write(fd, text.as_ptr().cast(), 1) }
        } else {
            let iov = libc::iovec {
                iov_base: text.as_ptr() as *mut _,
                iov_len: text.len(),
            };
            // SAFETY: one valid iovec over `text`, which the call only reads; offset -1 is the file's
            // own position.
            unsafe { libc::pwritev2(fd, &iov, 1, -1, libc::RWF_NOWAIT) }
        };
        if let Some(rest) = usize::try_from(written).ok().and_then(|n| text.get(n..)) {
            text = rest;
            continue;
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) => {
                if !has_room(fd, deadline) {
                    return false;
                }
                // A pipe with room for less than a piece: byte by byte what there is room for.
                ask_first = true;
            }
            // A file, an older kernel, or a sandbox that does not know the flag.
            Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS) if !ask_first => {
                if is_file(fd) {
                    return write_file(text);
                }
                ask_first = true;
            }
            _ => return true,
        }
    }
    true
}

/// A regular file waits for no reader.
fn write_file(text: &[u8]) -> bool {
    let _ = io::stderr().write_all(text);
    true
}

fn is_file(fd: i32) -> bool {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: fstat fills `stat` when it succeeds, and it is read only then.
    unsafe {
        libc::fstat(fd, stat.as_mut_ptr()) == 0
            && stat.assume_init().st_mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// Whether there is room before `deadline`. An error of `fd` counts as room: the write says which.
fn has_room(fd: i32, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLOUT,
            revents: 0,
        };
        let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd.
        match unsafe { libc::poll(&mut poll, 1, left) } {
            0 => return false,
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return true,
        }
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
        assert!(!write_to(&writer, false, &text, Duration::ZERO));
        assert!(!write_to(&writer, true, &text, Duration::ZERO));
        drop(writer);
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        assert!(got.len() >= 4096 && text.starts_with(&got));
    }

    #[test]
    fn a_reader_that_reads_gets_all() {
        for terminal in [false, true] {
            let (mut reader, writer) = io::pipe().unwrap();
            let text: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
            let expected = text.clone();
            let writing = std::thread::spawn(move || {
                write_to(&writer, terminal, &text, Duration::from_secs(30))
            });
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            assert!(writing.join().unwrap());
            assert!(got == expected);
        }
    }
}
