// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A limit for one kind of line: so many in an interval (the kernel's `ratelimit_state`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bits of [`RateLimit::window`] that count; the others are the window's begin, in milliseconds.
const COUNT_BITS: u32 = 16;

/// So many lines in an interval that begins with the first of them. `const`, so that it can be a static
/// at the place that logs; lock-free.
///
/// ```
/// use std::time::Duration;
/// use kvm_core::logging::{Admission, RateLimit};
///
/// let limit = RateLimit::new(Duration::from_secs(5), 1);
/// let at = Duration::from_secs;
/// assert_eq!(limit.admit(at(100)), Admission::Passed { suppressed: 0 });
/// assert_eq!(limit.admit(at(101)), Admission::Suppressed);
/// assert_eq!(limit.admit(at(105)), Admission::Passed { suppressed: 1 });
/// ```
#[derive(Debug)]
pub struct RateLimit {
    interval_ms: u64,
    burst: u16,
    /// When the window began, plus one, above [`COUNT_BITS`]; what passed in it, below. 0: none yet.
    ///
    /// Relaxed everywhere: it is the only word that decides, and guards no other memory.
    window: AtomicU64,
    /// What was suppressed and has not been told.
    missed: AtomicU64,
}

/// What a [`RateLimit`] says to a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Admission {
    /// Log it, and say that so many before it were not.
    Passed {
        /// Lines suppressed since the last time that this was told.
        suppressed: u64,
    },
    /// Do not.
    Suppressed,
}

impl RateLimit {
    /// 10 in 5 seconds, as the kernel's `DEFAULT_RATELIMIT_INTERVAL` and `…_BURST`.
    #[allow(clippy::declare_interior_mutable_const)] // What a static begins as, at each of its uses.
    pub const KERNEL: Self = Self::new(Duration::from_secs(5), 10);

    /// `burst` lines in each `interval` (milliseconds count).
    #[must_use]
    pub const fn new(interval: Duration, burst: u16) -> Self {
        Self {
            interval_ms: millis(interval),
            burst,
            window: AtomicU64::new(0),
            missed: AtomicU64::new(0),
        }
    }

    /// Whether a line may be logged at `now`, a time on any monotonic clock, the same at each call.
    /// Never blocks.
    pub fn admit(&self, now: Duration) -> Admission {
        let begin = (millis(now) + 1) & (u64::MAX >> COUNT_BITS);
        let mut window = self.window.load(Ordering::Relaxed);
        loop {
            let (began, passed) = (window >> COUNT_BITS, window & u64::from(u16::MAX));
            // A thread may come with an older time than the one who opened the window.
            let over = began == 0 || begin.saturating_sub(began) >= self.interval_ms;
            let next = match over {
                true => (begin << COUNT_BITS) | 1,
                false => window + 1,
            };
            let full = match over {
                true => self.burst == 0,
                false => passed >= u64::from(self.burst),
            };
            if full {
                self.missed.fetch_add(1, Ordering::Relaxed);
                return Admission::Suppressed;
            }
            match self.window.compare_exchange_weak(
                window,
                next,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    // Each is told once: by whoever takes it.
                    let suppressed = self.missed.swap(0, Ordering::Relaxed);
                    return Admission::Passed { suppressed };
                }
                Err(found) => window = found,
            }
        }
    }

    /// Lines suppressed that no line has told of yet.
    #[must_use]
    pub fn untold(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }
}

const fn millis(time: Duration) -> u64 {
    // More than a u64 holds is half a billion years.
    let millis = time.as_millis();
    if millis > (u64::MAX >> COUNT_BITS) as u128 - 1 {
        (u64::MAX >> COUNT_BITS) - 1
    } else {
        millis as u64
    }
}
