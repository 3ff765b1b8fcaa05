// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many bytes a second a migration may send, on all of its data connections together.
//!
//! [`TokenBucket`] is the rule, a pure one. [`Limiter`] is one that threads share and wait by, and [`Limited`] a writer
//! that asks it before each write. A wait that is long goes by ticks, in which the connection is looked at ([`Rest`]): that
//! it has ended, or is not wanted any more, is noticed however little may be sent.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::link::{Rest, TICK};
use super::pages::{Parts, WritePages};

/// What may be sent at once after a rest, as a part of a second.
const BURST_PART: u64 = 20;
/// And what may always, bytes: less is not worth a system call.
const LEAST_BURST: u64 = 4096;
const NANOSECONDS: i128 = 1_000_000_000;

/// The least rate that a migration takes for each of its connections, bytes a second. A frame of pages is under way for
/// seconds then; at less than a tenth of it the other side would take that for silence.
pub const LEAST_RATE: u64 = 64 << 10;

/// So many bytes a second, with a rest of 1/20 s to make up for at once. Over any time no more is let pass than the rate's
/// share of it, one burst, and the last piece.
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    rate: u64,
    /// What may be sent, in bytes times nanoseconds, so that nothing is rounded away. Below 0 after a piece that was
    /// larger than what was there.
    level: i128,
    filled: Instant,
}

impl TokenBucket {
    /// Full at `now`. The rate is in bytes a second.
    pub fn new(rate: NonZeroU64, now: Instant) -> Self {
        let mut bucket = TokenBucket {
            rate: rate.get(),
            level: 0,
            filled: now,
        };
        bucket.level = bucket.most();
        bucket
    }

    /// What may be sent at once after a rest, bytes.
    pub fn burst(&self) -> u64 {
        (self.rate / BURST_PART).max(LEAST_BURST)
    }

    fn most(&self) -> i128 {
        i128::from(self.burst()) * NANOSECONDS
    }

    /// Lets `bytes` pass, as long as anything may: a piece larger than what is left is paid for by who comes next.
    ///
    /// # Errors
    /// How long it takes until something may pass; nothing is taken.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Result<(), Duration> {
        let passed = now.saturating_duration_since(self.filled).as_nanos();
        // At most 2^64 * 2^73: a Duration has that many nanoseconds.
        let gained = i128::try_from(passed).unwrap_or(i128::MAX);
        let gained = gained.saturating_mul(self.rate.into());
        self.level = self.level.saturating_add(gained).min(self.most());
        self.filled = self.filled.max(now);
        if self.level <= 0 {
            // One more, so that then it is more than nothing.
            let wait = -self.level / i128::from(self.rate) + 1;
            let wait = u64::try_from(wait).unwrap_or(u64::MAX);
            return Err(Duration::from_nanos(wait));
        }
        self.level -= i128::from(bytes) * NANOSECONDS;
        Ok(())
    }
}

/// A limit that threads share, that can be changed while they wait, and that lets them go when all is cancelled.
#[derive(Debug)]
pub struct Limiter {
    state: Mutex<State>,
    /// The state has changed.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    bucket: Option<TokenBucket>,
    cancelled: bool,
}

impl Limiter {
    /// So many bytes a second, or without a limit.
    pub fn new(rate: Option<NonZeroU64>) -> Self {
        let state = State {
            bucket: rate.map(|rate| TokenBucket::new(rate, Instant::now())),
            cancelled: false,
        };
        Limiter {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Another limit, or none, from now on: also for who waits.
    pub fn set(&self, rate: Option<NonZeroU64>) {
        self.lock().bucket = rate.map(|rate| TokenBucket::new(rate, Instant::now()));
        self.changed.notify_all();
    }

    /// Whether there is a limit.
    pub fn is_set(&self) -> bool {
        self.lock().bucket.is_some()
    }

    /// Who waits, and who comes, is refused.
    pub fn cancel(&self) {
        self.lock().cancelled = true;
        self.changed.notify_all();
    }

    /// Waits until up to `wanted` bytes may be sent, and says how many of them. It is asked again for the rest. None, and at
    /// once, if that would take longer than `patience`.
    ///
    /// # Errors
    /// `ConnectionAborted`: cancelled.
    pub fn wait(&self, wanted: usize, patience: Duration) -> io::Result<Option<usize>> {
        let mut state = self.lock();
        loop {
            if state.cancelled {
                let why = "the migration was cancelled";
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
            }
            let Some(bucket) = &mut state.bucket else {
                return Ok(Some(wanted));
            };
            let burst = usize::try_from(bucket.burst()).unwrap_or(usize::MAX);
            let piece = wanted.min(burst);
            let Err(wait) = bucket.take(Instant::now(), piece as u64) else {
                return Ok(Some(piece));
            };
            if wait > patience {
                return Ok(None);
            }
            let waited = self.changed.wait_timeout(state, wait);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A writer that sends no faster than a [`Limiter`] lets it.
#[derive(Debug)]
pub struct Limited<W> {
    to: W,
    limit: Arc<Limiter>,
}

impl<W> Limited<W> {
    /// What is written goes to `to`.
    pub fn new(to: W, limit: Arc<Limiter>) -> Self {
        Limited { to, limit }
    }

    /// Past the limit.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.to
    }
}

impl<W: Rest> Limited<W> {
    /// Waits until up to `wanted` bytes may be sent, and says how many of them.
    fn wait(&mut self, wanted: usize) -> io::Result<usize> {
        loop {
            match self.limit.wait(wanted, TICK)? {
                Some(piece) => return Ok(piece),
                None => self.to.rest()?,
            }
        }
    }
}

impl<W: WritePages + Rest> WritePages for Limited<W> {
    fn write_pages(&mut self, parts: Parts<'_>) -> io::Result<usize> {
        let piece = self.wait(parts.len())?;
        self.to.write_pages(parts.first(piece))
    }
}

impl<W: Write + Rest> Write for Limited<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = self.wait(bytes.len())?;
        self.to.write(bytes.get(..piece).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate(bytes: u64) -> NonZeroU64 {
        NonZeroU64::new(bytes).unwrap()
    }

    proptest! {
        #[test]
        fn over_any_time_no_more_passes_than_the_rate_allows_and_who_waits_as_told_gets_it_all(
            bytes_a_second in 1_u64..=1 << 40,
            steps in proptest::collection::vec((1_u64..=1 << 21, 0_u64..=1 << 31), 1..50),
        ) {
            let begun = Instant::now();
            let mut now = begun;
            let mut bucket = TokenBucket::new(rate(bytes_a_second), now);
            let mut sent = 0_u128;
            for (bytes, rest) in steps {
                now += Duration::from_nanos(rest);
                if let Err(wait) = bucket.take(now, bytes) {
                    prop_assert!(!wait.is_zero());
                    now += wait;
                    prop_assert_eq!(bucket.take(now, bytes), Ok(()));
                }
                sent += u128::from(bytes);
                let share = (now - begun).as_nanos() * u128::from(bytes_a_second) / 1_000_000_000;
                prop_assert!(sent <= share + u128::from(bucket.burst() + bytes));
            }
        }

        #[test]
        fn who_sends_without_a_rest_sends_at_the_rate(
            bytes_a_second in 1_u64..=1 << 40,
            piece in 1_u64..=1 << 21,
        ) {
            let begun = Instant::now();
            let mut now = begun;
            let mut bucket = TokenBucket::new(rate(bytes_a_second), now);
            let mut sent = 0_u128;
            for _ in 0..200 {
                while let Err(wait) = bucket.take(now, piece) {
                    now += wait;
                }
                sent += u128::from(piece);
            }
            let took = (now - begun).as_nanos();
            // A nanosecond more for each wait.
            let due = sent * 1_000_000_000 / u128::from(bytes_a_second) + 200;
            prop_assert!(took <= due, "{} ns for what takes {}", took, due);
        }
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing_and_takes_nothing() {
        let now = Instant::now() + Duration::from_secs(1);
        let mut bucket = TokenBucket::new(rate(1000), now);
        assert_eq!(bucket.take(now, 1 << 20), Ok(()));
        let wait = bucket.take(now, 1).unwrap_err();
        let earlier = now - Duration::from_secs(1);
        assert_eq!(bucket.take(earlier, 1).unwrap_err(), wait);
        assert_eq!(bucket.take(now + wait, 1), Ok(()));
    }

    #[test]
    fn who_waits_goes_on_when_the_limit_is_lifted_and_is_refused_when_all_is_cancelled() {
        let limit = Limiter::new(Some(rate(1)));
        // The second is paid for by who comes next, who has to wait for more than an hour.
        for _ in 0..2 {
            assert_eq!(limit.wait(1 << 20, Duration::MAX).unwrap(), Some(4096));
        }
        assert_eq!(limit.wait(1, Duration::from_secs(1000)).unwrap(), None);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limit.wait(1 << 20, Duration::MAX));
            limit.set(None);
            assert_eq!(waiting.join().unwrap().unwrap(), Some(1 << 20));
        });
        limit.set(Some(rate(1)));
        for _ in 0..2 {
            limit.wait(1 << 20, Duration::MAX).unwrap();
        }
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limit.wait(1, Duration::MAX));
            limit.cancel();
            let error = waiting.join().unwrap().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        });
    }

    /// A connection, which ends in the third rest.
    #[derive(Default)]
    struct Wire {
        took: Vec<u8>,
        rests: u32,
    }

    impl Write for Wire {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.took.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Rest for Wire {
        fn rest(&mut self) -> io::Result<()> {
            self.rests += 1;
            match self.rests {
                3 => Err(io::ErrorKind::BrokenPipe.into()),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn a_limited_writer_loses_no_byte() {
        let limit = Arc::new(Limiter::new(Some(rate(1 << 30))));
        let mut out = Limited::new(Wire::default(), limit);
        let bytes: Vec<u8> = (0..1 << 20).map(|at: u32| (at >> 3) as u8).collect();
        out.write_all(&bytes).unwrap();
        out.flush().unwrap();
        let Wire { took, rests } = out.get_mut();
        assert!(*took == bytes && *rests == 0);
    }

    #[test]
    fn who_waits_to_send_notices_that_the_connection_has_ended() {
        let limit = Arc::new(Limiter::new(Some(rate(1))));
        let mut out = Limited::new(Wire::default(), limit);
        // The third has to wait for an hour.
        let error = out.write_all(&[7; 3 * 4096]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(out.get_mut().took.len(), 2 * 4096);
    }
}
