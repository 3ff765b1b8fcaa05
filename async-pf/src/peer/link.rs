// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Frames over a connection, for both sides, and no wait without an end.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::frame::{self, GREETING, Greeting, HEAD, Head, Kind};
use super::{PeerError, Wire};

/// The longest tick: how late a stop is heard at most.
const LONGEST_TICK: Duration = Duration::from_millis(200);

/// A connection, and how patient this side is with it. One thread reads; any write.
pub struct Link<W> {
    wire: W,
    beat: Duration,
    silence: Duration,
    /// When a frame was sent last. Held while frames are written, so that each is whole.
    sent: Mutex<Instant>,
}

/// What is done at each tick while a thread waits for a frame; an error ends the wait with it.
pub type Meanwhile<'a> = &'a mut dyn FnMut() -> Result<(), PeerError>;

impl<W: Wire> Link<W> {
    pub fn new(wire: W, beat: Duration, silence: Duration) -> Result<Self, PeerError> {
        let tick = LONGEST_TICK.min(beat / 2).min(silence / 4);
        wire.set_tick(tick.max(Duration::from_millis(1)))
            .map_err(PeerError::Broken)?;
        Ok(Self {
            wire,
            beat,
            silence,
            sent: Mutex::new(Instant::now()),
        })
    }

    pub fn shutdown(&self) {
        self.wire.shutdown();
    }

    fn writing(&self) -> MutexGuard<'_, Instant> {
        // What a holder that panicked has cut is found by the other side.
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn greet(&self, greeting: Greeting) -> Result<(), PeerError> {
        self.write_all(&greeting.to_bytes())
    }

    pub fn greeted(&self, meanwhile: Meanwhile<'_>) -> Result<Greeting, PeerError> {
        let mut bytes = [0; GREETING];
        let mut got = 0;
        let read = self.fill(&mut bytes, &mut got, Instant::now(), meanwhile);
        match read {
            Ok(()) if got < GREETING => return Err(PeerError::Closed),
            // Nobody who speaks this protocol begins otherwise, however little was said.
            Err(PeerError::Silent(after)) if got > 0 => {
                frame::check_magic(&bytes, got)?;
                return Err(PeerError::HalfGreeting { got, after });
            }
            read => read?,
        }
        let theirs = Greeting::parse(&bytes)?;
        let beat = Duration::from_millis(u64::from(theirs.beat));
        match beat.saturating_mul(2) <= self.silence {
            true => Ok(theirs),
            false => Err(PeerError::Beat {
                beat,
                silence: self.silence,
            }),
        }
    }

    /// Sends whole frames.
    pub fn send(&self, frames: &[u8]) -> Result<(), PeerError> {
        let mut sent = self.writing();
        self.write_all(frames)?;
        *sent = Instant::now();
        Ok(())
    }

    /// Sends what `frames` writes, as long as it writes something. It is called by one thread at a time, and what it
    /// writes is sent in that order: so it may number what it writes.
    pub fn send_all(&self, mut frames: impl FnMut(&mut Vec<u8>)) -> Result<(), PeerError> {
        let mut sent = self.writing();
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            frames(&mut bytes);
            if bytes.is_empty() {
                return Ok(());
            }
            self.write_all(&bytes)?;
            *sent = Instant::now();
        }
    }

    /// Says that this side lives, if it has said nothing for long. Who writes at this moment says it already.
    pub fn beat(&self) -> Result<(), PeerError> {
        let mut sent = match self.sent.try_lock() {
            Ok(sent) => sent,
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Poisoned(sent)) => sent.into_inner(),
        };
        // A tick is half of a beat at most, so the next look is not too late.
        if sent.elapsed() >= self.beat / 2 {
            self.write_all(&frame::frame(Kind::Beat, 0, &[]))?;
            *sent = Instant::now();
        }
        Ok(())
    }

    /// The next frame; its body replaces what is in `body`. None if the other side closed before it. `since` is when the
    /// last one was whole, and `allow` sees the head before its body is read.
    pub fn next(
        &self,
        body: &mut Vec<u8>,
        since: Instant,
        allow: impl FnOnce(&Head) -> Result<(), PeerError>,
        meanwhile: Meanwhile<'_>,
    ) -> Result<Option<Head>, PeerError> {
        let mut bytes = [0; HEAD];
        let mut got = 0;
        self.fill(&mut bytes, &mut got, since, meanwhile)?;
        match got {
            0 => return Ok(None),
            HEAD => {}
            _ => return Err(PeerError::Closed),
        }
        let head = Head::parse(&bytes)?;
        allow(&head)?;
        body.clear();
        body.resize(head.len as usize, 0);
        self.read_exact(body, since, meanwhile)?;
        head.check(&bytes, body)?;
        Ok(Some(head))
    }

    fn read_exact(
        &self,
        into: &mut [u8],
        since: Instant,
        meanwhile: Meanwhile<'_>,
    ) -> Result<(), PeerError> {
        let mut got = 0;
        self.fill(into, &mut got, since, meanwhile)?;
        match got == into.len() {
            true => Ok(()),
            false => Err(PeerError::Closed),
        }
    }

    /// Reads until it is full or the other side has closed; `got`, zero before, is how much came, by an error as well. Nothing may come for as long as the
    /// silence lasts, counted from `since`; and from the first byte on, the rest has as long.
    fn fill(
        &self,
        into: &mut [u8],
        got: &mut usize,
        mut since: Instant,
        meanwhile: Meanwhile<'_>,
    ) -> Result<(), PeerError> {
        while let Some(rest) = into.get_mut(*got..).filter(|rest| !rest.is_empty()) {
            match self.wire.read(rest) {
                Ok(0) => break,
                Ok(more) => {
                    if *got == 0 {
                        since = Instant::now();
                    }
                    *got += more.min(rest.len());
                }
                Err(error) if is_tick(&error) => meanwhile()?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(PeerError::Broken(error)),
            }
            // Looked at behind the read: what came while this process stood still has come in time.
            let quiet = since.elapsed();
            if quiet > self.silence && *got < into.len() {
                return Err(PeerError::Silent(quiet));
            }
        }
        Ok(())
    }

    /// Writes, for as long as the other side takes some of it within the silence, and all of it within twice that.
    fn write_all(&self, mut bytes: &[u8]) -> Result<(), PeerError> {
        let begun = Instant::now();
        while !bytes.is_empty() {
            let wrote = self.wire.write(bytes);
            let quiet = begun.elapsed();
            match wrote {
                Ok(0) => return Err(PeerError::Closed),
                Ok(_) if quiet > self.silence.saturating_mul(2) => {
                    return Err(PeerError::Silent(quiet));
                }
                Ok(more) => bytes = bytes.get(more..).unwrap_or_default(),
                Err(error) if is_tick(&error) && quiet <= self.silence => {}
                Err(error) if is_tick(&error) => return Err(PeerError::Silent(quiet)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(PeerError::Broken(error)),
            }
        }
        Ok(())
    }
}

fn is_tick(error: &io::Error) -> bool {
    use io::ErrorKind::{TimedOut, WouldBlock};
    matches!(error.kind(), TimedOut | WouldBlock)
}
