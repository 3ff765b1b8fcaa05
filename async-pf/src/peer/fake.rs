// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection in memory that breaks, stalls and stutters as a test tells it.
//!
//! ```
//! use async_pf::peer::{Wire, fake};
//!
//! let (one, other) = fake::pair();
//! one.break_after(2); // of what it writes
//! assert_eq!(one.write(b"page")?, 2);
//! assert!(one.write(b"ge").is_err());
//! let mut bytes = [0; 8];
//! assert_eq!(other.read(&mut bytes)?, 2);
//! assert_eq!(other.read(&mut bytes)?, 0);
//! # Ok::<(), std::io::Error>(())
//! ```

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Wire;

/// Bytes that are on their way, at most.
const ROOM: usize = 64 << 10;

#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    /// All that was ever written.
    written: u64,
    closed: bool,
}

#[derive(Default)]
struct Both {
    /// To the first end, and to the second.
    pipes: [Pipe; 2],
    /// What each end may write until the connection breaks.
    breaks: [Option<u64>; 2],
    /// What each end may write until its bytes go nowhere any more, and nobody says so.
    stalls: [Option<u64>; 2],
    /// What is read or written at once, at most.
    most: Option<usize>,
    tick: Duration,
}

/// One end of a connection. Clones are the same end.
#[derive(Clone)]
pub struct FakeWire {
    both: Arc<(Mutex<Both>, Condvar)>,
    end: usize,
}

/// Both ends of a connection.
pub fn pair() -> (FakeWire, FakeWire) {
    let both = Both {
        tick: Duration::from_millis(10),
        ..Both::default()
    };
    let both = Arc::new((Mutex::new(both), Condvar::new()));
    let end = |end| FakeWire {
        both: Arc::clone(&both),
        end,
    };
    (end(0), end(1))
}

impl FakeWire {
    fn lock(&self) -> MutexGuard<'_, Both> {
        let both = self.both.0.lock();
        both.unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection breaks, both ways, when this end has written so many bytes in all.
    pub fn break_after(&self, bytes: u64) {
        self.lock().breaks[self.end] = Some(bytes);
    }

    /// When this end has written so many bytes in all, the rest is taken and lost, in silence.
    pub fn stall_after(&self, bytes: u64) {
        self.lock().stalls[self.end] = Some(bytes);
    }

    /// Neither end reads or writes more than so many bytes at once.
    pub fn at_once(&self, bytes: usize) {
        self.lock().most = Some(bytes.max(1));
    }

    /// What this end has written, in bytes.
    pub fn written(&self) -> u64 {
        self.lock().pipes[1 - self.end].written
    }

    /// Waits, for a tick at most, until `ready` has something to say.
    fn wait<T>(&self, mut ready: impl FnMut(&mut Both) -> Option<T>) -> io::Result<T> {
        let mut both = self.lock();
        let end = Instant::now() + both.tick;
        loop {
            if let Some(said) = ready(&mut both) {
                self.both.1.notify_all();
                return Ok(said);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let waited = self.both.1.wait_timeout(both, left);
            both = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Wire for FakeWire {
    fn set_tick(&self, tick: Duration) -> io::Result<()> {
        self.lock().tick = tick;
        Ok(())
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.wait(|both| {
            let most = both.most.unwrap_or(usize::MAX).min(into.len());
            let pipe = &mut both.pipes[self.end];
            let count = pipe.bytes.len().min(most);
            let came = pipe.bytes.drain(..count);
            into.iter_mut().zip(came).for_each(|(to, from)| *to = from);
            (count > 0 || pipe.closed).then_some(count)
        })
    }

    fn write(&self, from: &[u8]) -> io::Result<usize> {
        self.wait(|both| {
            let other = 1 - self.end;
            let most = both.most.unwrap_or(usize::MAX).min(from.len());
            let (breaks, stalls) = (both.breaks[self.end], both.stalls[self.end]);
            let pipe = &mut both.pipes[other];
            if pipe.closed {
                return Some(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let until = |limit: Option<u64>| {
                let left = limit.map_or(u64::MAX, |limit| limit.saturating_sub(pipe.written));
                usize::try_from(left).unwrap_or(usize::MAX)
            };
            let whole = until(breaks);
            if whole == 0 {
                both.pipes.iter_mut().for_each(|pipe| pipe.closed = true);
                return Some(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let heard = until(stalls);
            let room = match heard {
                0 => usize::MAX,
                _ => ROOM.saturating_sub(pipe.bytes.len()).min(heard),
            };
            let count = most.min(whole).min(room);
            if count == 0 {
                return None;
            }
            pipe.written += count as u64;
            if heard > 0 {
                pipe.bytes.extend(from.iter().take(count));
            }
            Some(Ok(count))
        })?
    }

    fn shutdown(&self) {
        self.lock()
            .pipes
            .iter_mut()
            .for_each(|pipe| pipe.closed = true);
        self.both.1.notify_all();
    }
}
