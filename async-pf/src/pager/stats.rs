// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a pager has done, in numbers: no allocation to count, none to read.

use std::fmt;
use std::time::Duration;

const BUCKETS: usize = 44;

/// How long faults waited, by powers of two of a nanosecond: bucket *n* has those from 2^(n-1) up to 2^n ns, the last
/// everything from an hour on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            count: 0,
            max: Duration::ZERO,
        }
    }
}

impl Histogram {
    /// Counts one.
    pub fn record(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - nanos.leading_zeros()) as usize;
        if let Some(bucket) = self.buckets.get_mut(bucket.min(BUCKETS - 1)) {
            *bucket += 1;
        }
        self.count += 1;
        self.max = self.max.max(took);
    }

    /// How many were counted.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The longest, exactly.
    pub const fn max(&self) -> Duration {
        self.max
    }

    /// The time within which `percent` of 100 ended: the upper end of its bucket, so at most twice too much, and never
    /// more than the longest. Zero where nothing was counted.
    pub fn percentile(&self, percent: f64) -> Duration {
        let wanted =
            ((self.count as f64 * percent / 100.0).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(1 << bucket).min(self.max);
            }
        }
        self.max
    }

    /// Each bucket that has something: the upper end, exclusive, and how many.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> {
        let buckets = self.buckets.iter().enumerate();
        buckets
            .filter(|(_, count)| **count > 0)
            .map(|(bucket, count)| (Duration::from_nanos(1 << bucket), *count))
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.buckets()).finish()
    }
}

/// What a [`Pager`](super::Pager) has done since it was started. Pages are of their registration's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Faults of missing pages that put a page in line.
    pub faults: u64,
    /// Faults on a page that was under way already.
    pub joined: u64,
    /// Faults on a page that was there by then, or had been given back.
    pub late: u64,
    /// Minor faults.
    pub minor: u64,
    /// Write-protect faults, which went to [`PagerEvents`](super::PagerEvents).
    pub protected: u64,
    /// Fetches, of one or more pages.
    pub fetches: u64,
    /// Those of a page that was under way for nobody, and for which someone waits now: the first that comes is taken.
    pub raised: u64,
    /// Pages that have been placed, zeros among them.
    pub placed: u64,
    /// Pages of zeros that were placed without a copy.
    pub zeros: u64,
    /// Pages that were placed before someone waited for them.
    pub ahead: u64,
    /// Fetches that were tried again.
    pub retries: u64,
    /// Pages that will not come.
    pub lost: u64,
    /// Pages that were given back.
    pub removed: u64,
    /// Messages and answers that the pager could do nothing with.
    pub unanswered: u64,
    /// From the moment that a fault's message was read to the page's arrival.
    pub latency: Histogram,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_upper_end_of_their_bucket_and_never_beyond_the_longest() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(99.0), Duration::ZERO);
        for _ in 0..99 {
            histogram.record(Duration::from_nanos(5000));
        }
        histogram.record(Duration::from_millis(3));
        assert_eq!(histogram.percentile(50.0), Duration::from_nanos(8192));
        assert_eq!(histogram.percentile(99.0), Duration::from_nanos(8192));
        assert_eq!(histogram.percentile(100.0), Duration::from_millis(3));
        assert_eq!((histogram.count(), histogram.buckets().count()), (100, 2));
    }

    #[test]
    fn nothing_is_too_short_or_too_long_to_be_counted() {
        let mut histogram = Histogram::default();
        histogram.record(Duration::ZERO);
        histogram.record(Duration::MAX);
        assert_eq!(histogram.count(), 2);
        assert_eq!(histogram.percentile(1.0), Duration::from_nanos(1));
    }
}
